use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::Bytes;
use h2::server::{self, SendResponse};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use sluice_proxy::{
    metrics::Metrics,
    snapshot::{ClientTls, Cluster, UpstreamProtocol},
    workers::Role,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{mpsc, oneshot},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use crate::{
    http2::client,
    support::*,
    upstream_http1::{head, upstream},
};

const RETRIES: &str = "sluice_retries_total{listener=\"shop/cart:80\",reason=";

fn dead() -> SocketAddr {
    SocketAddr::new(own_ip(), 9)
}

#[tokio::test]
async fn an_unreachable_endpoint_costs_no_request_while_another_of_the_revision_lives() {
    let (app, other) = (App::named("a").await, App::named("other").await);
    let proxy = Proxy::start(Role::Fleet);
    let (a, b) = (cluster("a", &[dead(), app.address, dead()]), cluster("b", &[other.address]));
    proxy.serve(http_to([(a, 100), (b, 0)])).await;
    let (mut http1, mut http2) = (Http1::connect(proxy.address).await, Http2::connect(proxy.address).await);
    for _ in 0..50 {
        assert_eq!(http1.send(post("/", "body")).await.unwrap().body, "a");
        let request = Request::post("http://cart.shop/").body(full("body")).unwrap();
        assert_eq!(http2.send(request).await.unwrap().body, "a");
    }
    assert_eq!(other.requests(), 0);
    assert!(proxy.metric(&format!("{RETRIES}\"connect\"}}")) > 10);
    assert_eq!(proxy.counted("a", "2xx", ""), 100);
}

#[tokio::test]
async fn an_endpoint_that_cannot_be_reached_is_left_alone_and_found_again() {
    let app = App::named("a").await;
    let late = SocketAddr::new(own_ip(), 8080);
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(cluster("a", &[late, app.address]), 100)])).await;
    let mut client = Http1::connect(proxy.address).await;
    for _ in 0..100 {
        assert_eq!(client.get("/").await.body, "a");
    }
    // Once, and once more if the hundred requests took longer than a second: not half of them.
    let tried = proxy.metric(&format!("{RETRIES}\"connect\"}}"));
    assert!((1..10).contains(&tried), "{tried}");

    let found = App::start(late.ip(), late.port(), |_| async { Response::new(full("late")) }).await;
    let back = async {
        while client.get("/").await.body != "late" {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    soon("the endpoint to be found again", back).await;
    assert!(found.requests() > 0);
}

#[tokio::test]
async fn a_dead_side_fails_its_own_share_and_never_the_other_serves_it() {
    let app = App::named("a").await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(cluster("a", &[app.address]), 50), (cluster("b", &[]), 50)])).await;
    let mut client = Http1::connect(proxy.address).await;
    let mut failed = 0;
    for _ in 0..400 {
        failed += usize::from(client.get("/").await.status == StatusCode::SERVICE_UNAVAILABLE);
    }
    // 5 standard deviations of a fair coin.
    assert!((150..=250).contains(&failed), "{failed} of 400");
    assert_eq!(proxy.counted("b", "5xx", ""), failed as u64);
}

#[tokio::test]
async fn a_request_that_a_sidecar_did_not_process_is_sent_again_whole() {
    let (ip, without_app, ca) = (own_ip(), own_ip(), Ca::new());
    let app = App::start(ip, 8080, |request| async move {
        assert!(!request.headers().contains_key("x-sluice-not-processed"));
        let body = request.into_body().collect().await.unwrap();
        let sum = body.trailers().and_then(|trailers| trailers.get("x-sum")).cloned();
        let mut answer = Response::builder().header("x-sluice-not-processed", "1");
        answer.headers_mut().unwrap().extend(sum.map(|sum| (HeaderName::from_static("x-sum"), sum)));
        answer.body(full(body.to_bytes())).unwrap()
    })
    .await;
    let (good, bad) = (sidecar(&ca, ip, false).await, sidecar(&ca, without_app, false).await);
    let fleet = Proxy::with(Role::Fleet, ca.identity(FLEET), |_| {});
    fleet.serve(http_to([(mesh_cluster("abc", &[&good, &bad]), 100)])).await;
    let (mut http1, mut http2) = (Http1::connect(fleet.address).await, Http2::connect(fleet.address).await);
    for round in 0..30 {
        // In several frames, of known and of unknown length; that has trailers, too.
        let body = format!("{round:-<32000}");
        let chunked = || {
            let chunks = body.as_bytes().chunks(10_000).map(|c| Frame::data(Bytes::copy_from_slice(c)));
            let sum = HeaderMap::from_iter([(HeaderName::from_static("x-sum"), HeaderValue::from(round))]);
            let frames: Vec<_> = chunks.chain([Frame::trailers(sum)]).map(Ok).collect();
            StreamBody::new(futures::stream::iter(frames)).boxed()
        };
        let announced = Request::post("/").header("host", "a").header("trailer", "x-sum").body(chunked()).unwrap();
        let multiplexed = Request::post("http://a/").body(full(body.clone())).unwrap();
        let of_unknown_length = Request::post("http://a/").body(chunked()).unwrap();
        let sum = round.to_string();
        for (answer, sum) in [
            (http1.send(post("/", body.clone())).await.unwrap(), ""),
            (http1.send(announced).await.unwrap(), &*sum),
            (http2.send(multiplexed).await.unwrap(), ""),
            (http2.send(of_unknown_length).await.unwrap(), &*sum),
        ] {
            assert_eq!((answer.status, answer.body == body, answer.header("x-sum")), (StatusCode::OK, true, sum));
            assert!(!answer.headers.contains_key("x-sluice-not-processed"));
        }
    }
    assert_eq!(app.requests(), 120);
    assert!(fleet.metric(&format!("{RETRIES}\"not_processed\"}}")) > 10);
    assert_eq!((fleet.counted("abc", "2xx", ""), fleet.counted("abc", "5xx", "")), (120, 0));
}

#[tokio::test]
async fn a_sidecar_without_its_application_says_so_to_the_fleet_and_the_fleet_says_503() {
    let (ip, ca) = (own_ip(), Ca::new());
    let sidecar = sidecar(&ca, ip, false).await;
    let fleet = Proxy::with(Role::Fleet, ca.identity(FLEET), |_| {});
    fleet.serve(http_to([(mesh_cluster("abc", &[&sidecar]), 100)])).await;
    let answer = Http1::connect(fleet.address).await.get("/").await;
    assert_eq!((answer.status, answer.header("x-sluice-response-flag")), (StatusCode::SERVICE_UNAVAILABLE, "UF"));
    assert!(!answer.headers.contains_key("x-sluice-not-processed"));
    let answer = Http2::connect(fleet.address).await.send(call("/")).await.unwrap();
    assert_eq!((answer.status, answer.header("grpc-status")), (StatusCode::OK, "14"));
}

#[tokio::test]
async fn an_application_cannot_ask_for_a_retry() {
    let app = App::start(own_ip(), 8080, |_| async {
        Response::builder().status(503).header("x-sluice-not-processed", "1").body(full("mine")).unwrap()
    })
    .await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(cluster("a", &[app.address, dead()]), 100)])).await;
    let answer = Http1::connect(proxy.address).await.get("/").await;
    assert_eq!((answer.status.as_u16(), answer.body.as_str()), (503, "mine"));
    assert!(!answer.headers.contains_key("x-sluice-not-processed"));
    assert_eq!(app.requests(), 1);
}

/// A server that answers the first `answers` requests of each connection, and closes it on the next, unanswered.
async fn closes_after(answers: usize) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind((own_ip(), 8080)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let received = Arc::new(AtomicUsize::new(0));
    let count = received.clone();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let count = count.clone();
            tokio::spawn(async move {
                for round in 0..=answers {
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        let Ok(byte) = stream.read_u8().await else {
                            return;
                        };
                        head.push(byte);
                    }
                    count.fetch_add(1, SeqCst);
                    if round < answers {
                        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
                    }
                }
            });
        }
    });
    (address, received)
}

#[tokio::test]
async fn a_request_that_may_have_been_processed_is_not_sent_again() {
    let ((first, one), (second, two)) = (closes_after(0).await, closes_after(0).await);
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(cluster("a", &[first, second]), 100)])).await;
    let answer = Http1::connect(proxy.address).await.get("/").await;
    assert_eq!((answer.status.as_u16(), answer.header("x-sluice-response-flag")), (503, "UC"));
    assert_eq!(one.load(SeqCst) + two.load(SeqCst), 1);
}

#[tokio::test]
async fn a_kept_connection_that_the_application_closes_meanwhile_costs_no_request() {
    // Closes right behind each answer, without saying so in it: the close races with the next request.
    let listener = TcpListener::bind((own_ip(), 8080)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let Ok(byte) = stream.read_u8().await else {
                        return;
                    };
                    head.push(byte);
                }
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
            });
        }
    });
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(cluster("a", &[address]), 100)])).await;
    let mut client = Http1::connect(proxy.address).await;
    for _ in 0..20 {
        assert_eq!(client.get("/").await.body, "ok");
        // The close has arrived before the next request when a neighbour has been served on this thread meanwhile.
        assert_eq!(Http1::connect(proxy.address).await.get("/").await.body, "ok");
        tokio::task::yield_now().await;
    }
}

/// A server that answers one request of each connection, and closes it when it has read another.
async fn answers_once() -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind((own_ip(), 8080)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let heads = Arc::new(AtomicUsize::new(0));
    let seen = heads.clone();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let seen = seen.clone();
            tokio::spawn(async move {
                for answered in [true, false] {
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        let Ok(byte) = stream.read_u8().await else { return };
                        head.push(byte);
                    }
                    seen.fetch_add(1, SeqCst);
                    if answered {
                        let content = if head.starts_with(b"PUT /x?y=1 ") { "put" } else { "ok" };
                        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{content}", content.len());
                        stream.write_all(answer.as_bytes()).await.unwrap();
                    }
                }
            });
        }
    });
    (address, heads)
}

/// RFC 9110, 9.2.2; RFC 9112, 9.3.1.
#[tokio::test]
async fn what_may_be_sent_twice_is_when_an_application_closes_a_kept_connection_instead_of_answering() {
    let (address, heads) = answers_once().await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(cluster("a", &[address]), 100)])).await;
    let stale = || proxy.metric(&format!("{RETRIES}\"stale\"}}"));
    let mut client = Http1::connect(proxy.address).await;
    let empty = |method: Method, target: &str| {
        Request::builder().method(method).uri(target).header("host", "cart.shop").body(full("")).unwrap()
    };
    assert_eq!(client.get("/").await.body, "ok");
    let put = client.send(empty(Method::PUT, "/x?y=1")).await.unwrap();
    assert_eq!((put.status, put.body.as_str()), (StatusCode::OK, "put"));
    assert_eq!((heads.load(SeqCst), stale()), (3, 1));
    // It might have been carried out.
    let post = client.send(empty(Method::POST, "/")).await.unwrap();
    assert_eq!((post.status, post.header("x-sluice-response-flag")), (StatusCode::SERVICE_UNAVAILABLE, "UC"));
    assert_eq!((heads.load(SeqCst), stale()), (4, 1));
}

/// An application that stops resets what it has accepted, or had not accepted yet, and has not read.
#[tokio::test]
async fn what_may_be_sent_twice_is_when_an_application_resets_a_new_connection_unread() {
    let resets = AtomicBool::new(false);
    let (address, connections) = upstream(move |mut stream| {
        let reset = !resets.fetch_not(SeqCst);
        async move {
            if reset {
                // With bytes that nobody has read, the close is a reset (RFC 2525, 2.17). That there are some is only known
                // when one was seen: `readable` may say so too early.
                assert_eq!(stream.peek(&mut [0]).await.unwrap(), 1);
            } else {
                assert!(head(&mut stream).await.is_some());
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok").await.unwrap();
            }
        }
    })
    .await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(cluster("a", &[address]), 100)])).await;
    let mut client = Http1::connect(proxy.address).await;
    assert_eq!(client.get("/").await.body, "ok");
    assert_eq!((connections.load(SeqCst), proxy.metric(&format!("{RETRIES}\"stale\"}}"))), (2, 1));
    // It might have been carried out.
    let post = Request::post("/").header("host", "cart.shop").body(full("")).unwrap();
    let post = client.send(post).await.unwrap();
    assert_eq!((post.status, post.header("x-sluice-response-flag")), (StatusCode::SERVICE_UNAVAILABLE, "UC"));
    assert_eq!(connections.load(SeqCst), 3);
}

/// An HTTP/2 server that says GOAWAY again and again, on each connection after a few requests.
async fn goes_away() -> SocketAddr {
    let listener = TcpListener::bind((own_ip(), 8080)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let served = Arc::new(AtomicUsize::new(0));
                let enough = Arc::new(tokio::sync::Notify::new());
                let (count, tell) = (served.clone(), enough.clone());
                let service = hyper::service::service_fn(move |request: Request<_>| {
                    if count.fetch_add(1, SeqCst) == 4 {
                        tell.notify_one();
                    }
                    async move {
                        let request: Request<hyper::body::Incoming> = request;
                        let body = request.into_body().collect().await?.to_bytes();
                        Ok::<_, hyper::Error>(Response::new(full(body)))
                    }
                });
                let connection = hyper::server::conn::http2::Builder::new(hyper_util::rt::TokioExecutor::new())
                    .serve_connection(hyper_util::rt::TokioIo::new(stream), service);
                let mut connection = std::pin::pin!(connection);
                tokio::select! {
                    _ = connection.as_mut() => return,
                    () = enough.notified() => connection.as_mut().graceful_shutdown(),
                }
                let _ = connection.await;
            });
        }
    });
    address
}

#[tokio::test]
async fn an_http2_server_that_goes_away_costs_no_request() {
    let address = goes_away().await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(cluster("a", &[address]), 100)])).await;
    let client = Http2::connect(proxy.address).await;
    let mut tasks = tokio::task::JoinSet::new();
    for worker in 0..8 {
        let mut client = client.clone();
        tasks.spawn(async move {
            for round in 0..40 {
                let body = format!("{worker}/{round}");
                let request = Request::post("http://a/").body(full(body.clone())).unwrap();
                let answer = client.send(request).await.unwrap();
                assert_eq!((answer.status, answer.body), (StatusCode::OK, body), "{:?}", answer.headers);
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    assert_eq!(proxy.counted("a", "2xx", ""), 320);
}

/// Serves two requests at once, which the test answers. Answers one when it has been told to end.
fn serve_two_at_once(
    stream: TlsStream<TcpStream>,
    taken: mpsc::Sender<SendResponse<Bytes>>,
) -> oneshot::Sender<SendResponse<Bytes>> {
    let (end, mut ends) = oneshot::channel::<SendResponse<Bytes>>();
    tokio::spawn(async move {
        let mut connection = server::Builder::new().max_concurrent_streams(2).handshake(stream).await.unwrap();
        let mut told = false;
        loop {
            tokio::select! {
                request = connection.accept() => match request {
                    Some(Ok((_, respond))) => taken.send(respond).await.unwrap(),
                    Some(Err(_)) | None => return,
                },
                last = &mut ends, if !told => {
                    told = true;
                    let Ok(mut last) = last else { continue };
                    connection.graceful_shutdown();
                    last.send_response(Response::new(()), true).unwrap();
                }
            }
        }
    });
    end
}

#[tokio::test]
async fn a_request_that_waited_for_a_new_connection_and_met_one_that_ends_goes_on_the_new_one() {
    let (ca, listener) = (Ca::new(), TcpListener::bind((own_ip(), 20443)).await.unwrap());
    let acceptor = TlsAcceptor::from(ca.identity(APP).server_config(FLEET, &[b"h2"]));
    let tls = Some(ClientTls { sni: "p8080.abc".into(), server_id: APP.into() });
    let address = listener.local_addr().unwrap();
    let cluster = Cluster { tls, protocol: UpstreamProtocol::Http2, ..cluster("a", &[address]) };
    let proxy = Proxy::with(Role::Fleet, ca.identity(FLEET), |options| options.metrics = Metrics::new("test", 1));
    proxy.serve(http_to([(cluster, 100)])).await;
    let mut client = client(&proxy).await;
    let mut ask = || client.send_request(Request::get("http://cart.shop/").body(()).unwrap(), true).unwrap().0;
    let (taken, mut requests) = mpsc::channel(8);
    let connection = async || soon("a connection", listener.accept()).await.unwrap().0;
    let handshake = async |stream| soon("the handshake", acceptor.accept(stream)).await.unwrap();

    let first = ask();
    let end = serve_two_at_once(handshake(connection().await).await, taken.clone());
    let to_first = soon("the first request", requests.recv()).await.unwrap();
    let _second = ask();
    let _to_second = soon("the second request", requests.recv()).await.unwrap();
    let third = ask();
    let new = connection().await;
    // Behind the GOAWAY comes an answer, by which the old connection seems to have room.
    end.send(to_first).unwrap();
    assert_eq!(soon("the first answer", first).await.unwrap().status(), 200);
    let _end = serve_two_at_once(handshake(new).await, taken);
    let mut third = std::pin::pin!(third);
    tokio::select! {
        to_third = soon("the third request", requests.recv()) => {
            to_third.unwrap().send_response(Response::new(()), true).unwrap();
        }
        answer = &mut third => panic!("it reached nobody: {answer:?}"),
    }
    assert_eq!(soon("the third answer", third).await.unwrap().status(), 200);
    assert_eq!(proxy.metric(&format!("{RETRIES}\"connect\"}}")), 0);
}
