//! Circuit breakers, and how long a connection to an upstream is used.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use http::{Request, Response, StatusCode};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use sluice_proxy::{
    metrics::Metrics,
    snapshot::{Action, Cluster, ConnectionPolicy, Limits, Policy, Protocol, RetryOn, RetryPolicy, TrafficPolicy},
    tls::IdentityHandle,
    workers::Role,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinHandle,
};

use crate::support::*;

const UO: &str = "sluice_local_errors_total{listener=\"shop/cart:80\",flag=\"UO\"}";
const ACTIVE: &str = "sluice_requests_active{listener=\"shop/cart:80\"}";
const ABORTS: &str = "sluice_client_aborts_total{listener=\"shop/cart:80\"}";

/// A proxy with one thread, which has all of a limit.
async fn one_thread(cluster: Cluster) -> Proxy {
    let proxy =
        Proxy::with(Role::Fleet, IdentityHandle::default(), |options| options.metrics = Metrics::new("test", 1));
    proxy.serve(http_to([(cluster, 100)])).await;
    proxy
}

fn limited(app: SocketAddr, limits: Limits) -> Cluster {
    Cluster { traffic: TrafficPolicy { limits, ..TrafficPolicy::default() }, ..cluster("a", &[app]) }
}

fn connections(app: SocketAddr, connections: ConnectionPolicy) -> Cluster {
    Cluster { traffic: TrafficPolicy { connections, ..TrafficPolicy::default() }, ..cluster("a", &[app]) }
}

/// Asks on an HTTP/1.1 connection of its own.
fn ask(proxy: &Proxy, path: &'static str) -> JoinHandle<Answer> {
    let address = proxy.address;
    tokio::spawn(async move { Http1::connect(address).await.get(path).await })
}

fn assert_overflow(answer: &Answer) {
    assert_eq!((answer.status, answer.header("x-sluice-response-flag")), (StatusCode::SERVICE_UNAVAILABLE, "UO"));
}

#[tokio::test]
async fn a_request_too_many_is_refused_and_is_an_error_of_the_revision_that_was_drawn() {
    let (app, gate) = gated().await;
    let proxy = one_thread(limited(app.address, Limits { requests: Some(2), ..Limits::default() })).await;
    let mut http2 = Http2::connect(proxy.address).await;
    let mut other = http2.clone();
    let held = [ask(&proxy, "/1"), tokio::spawn(async move { other.send(call("/2")).await.unwrap() })];
    eventually("both are held", || app.requests() == 2).await;

    let mut client = Http1::connect(proxy.address).await;
    assert_overflow(&client.send(post("/", "body")).await.unwrap());
    let refused = http2.send(call("/")).await.unwrap();
    assert_eq!((refused.status, refused.header("grpc-status")), (StatusCode::OK, "14"));
    assert_eq!(refused.header("x-sluice-response-flag"), "UO");
    assert_eq!((proxy.metric(UO), app.requests()), (2, 2));
    assert_eq!((proxy.counted("a", "5xx", ""), proxy.counted("a", "2xx", "UNAVAILABLE")), (1, 1));

    gate.add_permits(3);
    for held in held {
        assert_eq!(soon("an answer", held).await.unwrap().status, StatusCode::OK);
    }
    // The connection of the one that was refused is in order.
    assert_eq!(client.get("/3").await.body, "/3");
}

#[tokio::test]
async fn a_request_waits_for_a_connection_and_one_too_many_is_refused() {
    let (app, gate) = gated().await;
    let limits = Limits { connections: Some(1), pending: Some(1), ..Limits::default() };
    let proxy = one_thread(limited(app.address, limits)).await;
    let first = ask(&proxy, "/1");
    eventually("the first is held", || app.requests() == 1).await;
    let second = ask(&proxy, "/2");
    eventually("the second waits", || proxy.metric(ACTIVE) == 2).await;
    assert_overflow(&soon("a refusal", ask(&proxy, "/3")).await.unwrap());
    assert_eq!((app.requests(), proxy.metric(UO)), (1, 1));
    gate.add_permits(2);
    assert_eq!(soon("an answer", first).await.unwrap().body, "/1");
    assert_eq!(soon("an answer", second).await.unwrap().body, "/2");
    assert_eq!((app.connections(), app.requests()), (1, 2));
}

#[tokio::test]
async fn a_request_does_not_wait_for_a_connection_of_the_other_protocol() {
    let app = App::named("a").await;
    let proxy = one_thread(limited(app.address, Limits { connections: Some(1), ..Limits::default() })).await;
    assert_eq!(Http2::connect(proxy.address).await.send(call("/")).await.unwrap().body, "a");
    assert_eq!(Http1::connect(proxy.address).await.get("/").await.body, "a");
    assert_eq!(app.connections(), 2);
}

#[tokio::test]
async fn a_client_that_goes_while_its_request_waits_for_room_upstream_leaves_the_room_to_others() {
    let (app, gate) = gated().await;
    let limits = Limits { connections: Some(1), pending: Some(1), ..Limits::default() };
    let proxy = one_thread(limited(app.address, limits)).await;
    let first = ask(&proxy, "/1");
    eventually("the first is held", || app.requests() == 1).await;
    for gone in 1..=3 {
        let mut leaving = TcpStream::connect(proxy.address).await.unwrap();
        leaving.write_all(b"GET /gone HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        eventually("it waits", || proxy.metric(ACTIVE) == 2).await;
        drop(leaving);
        eventually("it is gone", || proxy.metric(ABORTS) == gone && proxy.metric(ACTIVE) == 1).await;
    }
    let second = ask(&proxy, "/2");
    eventually("the second waits", || proxy.metric(ACTIVE) == 2).await;
    gate.add_permits(2);
    assert_eq!(soon("an answer", first).await.unwrap().body, "/1");
    assert_eq!(soon("an answer", second).await.unwrap().body, "/2");
    assert_eq!((app.requests(), proxy.metric(UO)), (2, 0));
}

#[tokio::test]
async fn who_waits_for_a_connection_of_http1_holds_no_stream_of_http2_up() {
    let (app, gate) = gated().await;
    let proxy = one_thread(limited(app.address, Limits { connections: Some(1), ..Limits::default() })).await;
    let client = Http2::connect(proxy.address).await;
    let call = |path: &'static str| {
        let mut client = client.clone();
        tokio::spawn(async move { client.send(call(path)).await.unwrap() })
    };
    let mut asking = vec![call("/1")];
    eventually("the first is held", || app.requests() == 1).await;
    asking.push(ask(&proxy, "/2"));
    eventually("the second is held", || app.requests() == 2).await;
    asking.push(ask(&proxy, "/3"));
    eventually("the third waits", || proxy.metric(ACTIVE) == 3).await;
    asking.push(call("/4"));
    eventually("the fourth is held", || app.requests() == 3).await;
    gate.add_permits(4);
    for asking in asking {
        assert_eq!(soon("an answer", asking).await.unwrap().status, StatusCode::OK);
    }
}

/// A server that takes one stream at a time, and notes what it was asked.
async fn one_stream_at_a_time(gate: Arc<Semaphore>) -> (SocketAddr, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind((own_ip(), 8080)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let note = seen.clone();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (gate, note) = (gate.clone(), note.clone());
            tokio::spawn(async move {
                let service = service_fn(move |request: Request<Incoming>| {
                    note.lock().unwrap().push(request.uri().path().to_owned());
                    let gate = gate.clone();
                    async move {
                        gate.acquire().await.unwrap().forget();
                        Ok::<_, hyper::Error>(Response::new(full("ok")))
                    }
                });
                let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                let _ = builder.max_concurrent_streams(1).serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
    (address, seen)
}

#[tokio::test]
async fn a_stream_that_is_reset_while_it_waits_for_the_server_s_limit_leaves_its_place_to_others() {
    let gate = Arc::new(Semaphore::new(1));
    let (address, seen) = one_stream_at_a_time(gate.clone()).await;
    let proxy = one_thread(limited(address, Limits { connections: Some(1), ..Limits::default() })).await;
    let mut client = Http2::connect(proxy.address).await;
    // Until the server has said what it takes, a client may begin any number (RFC 9113, 6.5.2).
    assert_eq!(client.send(call("/0")).await.unwrap().status, StatusCode::OK);
    let start = |path: &'static str| {
        let mut client = client.clone();
        tokio::spawn(async move { client.send(call(path)).await.unwrap() })
    };
    let first = start("/1");
    eventually("the first is held", || seen.lock().unwrap().len() == 2).await;
    for gone in 1..=3 {
        let leaving = start("/gone");
        eventually("it waits", || proxy.metric(ACTIVE) == 2).await;
        leaving.abort();
        eventually("it is gone", || proxy.metric(ABORTS) == gone && proxy.metric(ACTIVE) == 1).await;
    }
    let second = start("/2");
    eventually("the second waits", || proxy.metric(ACTIVE) == 2).await;
    gate.add_permits(3);
    assert_eq!(soon("an answer", first).await.unwrap().status, StatusCode::OK);
    assert_eq!(soon("an answer", second).await.unwrap().status, StatusCode::OK);
    let seen = seen.lock().unwrap();
    assert_eq!(*seen, ["/0", "/1", "/2"]);
}

#[tokio::test]
async fn a_server_that_takes_few_streams_at_once_gets_more_connections() {
    let gate = Arc::new(Semaphore::new(1));
    let (address, seen) = one_stream_at_a_time(gate.clone()).await;
    let proxy = one_thread(cluster("a", &[address])).await;
    let mut client = Http2::connect(proxy.address).await;
    assert_eq!(client.send(call("/0")).await.unwrap().status, StatusCode::OK);
    let mut asking = Vec::new();
    // One after the other, as a server has not said what it takes when a connection is new.
    for held in 2..=4 {
        let mut client = client.clone();
        asking.push(tokio::spawn(async move { client.send(call("/")).await.unwrap() }));
        eventually("it is held", || seen.lock().unwrap().len() == held).await;
    }
    gate.add_permits(3);
    for asking in asking {
        assert_eq!(soon("an answer", asking).await.unwrap().status, StatusCode::OK);
    }
}

#[tokio::test]
async fn http2_requests_share_the_connections_that_there_may_be() {
    let (app, gate) = gated().await;
    let proxy = one_thread(limited(app.address, Limits { connections: Some(1), ..Limits::default() })).await;
    let client = Http2::connect(proxy.address).await;
    let asking: Vec<_> = (0..150)
        .map(|_| {
            let mut client = client.clone();
            tokio::spawn(async move { client.send(call("/")).await.unwrap() })
        })
        .collect();
    eventually("all are open", || app.requests() == 150).await;
    gate.add_permits(150);
    for asking in asking {
        assert_eq!(soon("an answer", asking).await.unwrap().status, StatusCode::OK);
    }
    assert_eq!(app.connections(), 1);
}

#[tokio::test]
async fn an_opaque_connection_too_many_is_refused() {
    let echo = TcpListener::bind((own_ip(), 8080)).await.unwrap();
    let address = echo.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = echo.accept().await.unwrap();
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await
            });
        }
    });
    let proxy = one_thread(cluster("a", &[])).await;
    let limits = Limits { connections: Some(1), ..Limits::default() };
    proxy.serve(Protocol::Tcp(split([(limited(address, limits), 1)]))).await;
    let mut echoed = [0; 4];
    let mut first = TcpStream::connect(proxy.address).await.unwrap();
    first.write_all(b"ping").await.unwrap();
    soon("the echo", first.read_exact(&mut echoed)).await.unwrap();
    // It may be refused before the client knows that it is connected.
    if let Ok(mut second) = TcpStream::connect(proxy.address).await {
        assert!(matches!(soon("a refusal", second.read(&mut echoed)).await, Ok(0) | Err(_)));
    }
    eventually("it is counted", || proxy.metric(UO) == 1).await;
    drop(first);
    eventually("the first is over", || proxy.metric("sluice_connections_open{listener=\"shop/cart:80\"}") == 0).await;
    let mut third = TcpStream::connect(proxy.address).await.unwrap();
    third.write_all(b"ping").await.unwrap();
    soon("the echo", third.read_exact(&mut echoed)).await.unwrap();
}

#[tokio::test]
async fn as_many_retries_as_the_cluster_allows_and_no_more() {
    let app = App::start(own_ip(), 8080, |_| async {
        Response::builder().status(StatusCode::SERVICE_UNAVAILABLE).body(full("")).unwrap()
    })
    .await;
    for (retries, tries) in [(None, 3), (Some(1), 3), (Some(0), 1)] {
        let before = app.requests();
        let proxy = one_thread(cluster("a", &[])).await;
        let retry = RetryPolicy { on: vec![RetryOn::ServerError], retries: 2, per_try_timeout: None };
        let policy = Policy { retry: Some(retry), ..Policy::default() };
        let split = split([(limited(app.address, Limits { retries, ..Limits::default() }), 1)]);
        proxy.serve(Protocol::http(Action::Forward { split, policy: Arc::new(policy) })).await;
        assert_eq!(Http1::connect(proxy.address).await.get("/").await.status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(app.requests() - before, tries, "{retries:?}");
    }
}

#[tokio::test]
async fn a_connection_takes_no_more_requests_than_it_may_and_none_when_it_is_too_old() {
    let table = [
        (ConnectionPolicy { requests: Some(2), ..ConnectionPolicy::default() }, 3),
        (ConnectionPolicy { age: Some(Duration::from_nanos(1)), ..ConnectionPolicy::default() }, 5),
    ];
    for (policy, expected) in table {
        let app = App::named("a").await;
        let proxy = one_thread(connections(app.address, policy)).await;
        let mut http1 = Http1::connect(proxy.address).await;
        for _ in 0..5 {
            assert_eq!(http1.get("/").await.body, "a");
        }
        let made = |expected| match policy.age {
            None => assert_eq!(app.connections(), expected, "{policy:?}"),
            // One that is old at once may be swept away before it has a request.
            Some(_) => assert!(app.connections() >= expected, "{} for {policy:?}", app.connections()),
        };
        made(expected);
        let mut http2 = Http2::connect(proxy.address).await;
        for _ in 0..5 {
            assert_eq!(http2.send(call("/")).await.unwrap().body, "a");
        }
        made(2 * expected);
    }
}

#[tokio::test]
async fn a_connection_is_kept_for_as_long_as_the_cluster_says() {
    let listener = TcpListener::bind((own_ip(), 8080)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let proxy = Proxy::with(Role::Fleet, IdentityHandle::default(), |options| {
        options.timing.application_idle = Duration::from_secs(3600);
    });
    let policy = ConnectionPolicy { idle: Some(Duration::from_millis(1)), ..ConnectionPolicy::default() };
    proxy.serve(http_to([(connections(address, policy), 100)])).await;
    let asking = ask(&proxy, "/");
    let (mut stream, _) = soon("a connection", listener.accept()).await.unwrap();
    let mut head = [0; 1024];
    assert!(soon("a request", stream.read(&mut head)).await.unwrap() > 0);
    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
    assert_eq!(soon("an answer", asking).await.unwrap().status, StatusCode::OK);
    assert_eq!(soon("the end", stream.read(&mut head)).await.unwrap(), 0);
}

#[tokio::test]
async fn an_upstream_that_falls_silent_with_a_request_is_asked_for_a_sign_of_life_soon() {
    let (app, gate) = gated().await;
    let proxy = one_thread(cluster("a", &[app.address])).await;
    let asking = ask(&proxy, "/");
    eventually("it is held", || app.requests() == 1).await;
    eventually("the timer", || kernel_timer(app.address).is_some_and(|(kind, due)| kind == KEEPALIVE && due <= 15))
        .await;
    gate.add_permits(1);
    assert_eq!(soon("an answer", asking).await.unwrap().status, StatusCode::OK);
}
