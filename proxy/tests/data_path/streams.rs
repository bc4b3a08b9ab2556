//! `stream_idle_timeout` and its like: streams on which nothing moves.

use std::{future, io::ErrorKind, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::StreamExt;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::{body::Frame, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use sluice_proxy::{
    snapshot::{Action, FilterChain, Listener, Policy, Protocol, Route, RouteMatch, StringMatch, StringRule},
    workers::Role,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::sleep,
};

use crate::support::*;

const LIMIT: Duration = Duration::from_millis(100);
const PART: Bytes = Bytes::from_static(&[7; 16 * 1024]);

async fn serve(proxy: &Proxy, protocol: Protocol, limit: Duration) {
    let chains = vec![FilterChain { server_name: None, tls: None, protocol, idle: Some(limit) }];
    let name = "shop/cart:80".to_owned();
    proxy.apply([Arc::new(Listener { name, address: proxy.address, chains, max_connections: None })]).await;
}

/// A proxy in front of one application.
async fn limited(app: SocketAddr, limit: Duration) -> Proxy {
    let proxy = Proxy::start(Role::Fleet);
    serve(&proxy, http_to([(cluster("a", &[app]), 100)]), limit).await;
    proxy
}

pub(crate) fn frames(parts: impl futures::Stream<Item = Bytes> + Send + Sync + 'static) -> AnyBody {
    BodyExt::boxed(StreamBody::new(parts.map(|part| Ok(Frame::data(part)))))
}

/// One part, and no end.
fn stuck() -> AnyBody {
    frames(futures::stream::iter([PART]).chain(futures::stream::pending()))
}

/// `/never` is not answered, `/stuck` has an answer without an end, `/endless` one that never stops, `/back` sends parts back as
/// they come, and anything else is echoed when it is whole.
pub(crate) async fn app() -> App {
    App::start(own_ip(), 8080, |request| async move {
        match request.uri().path() {
            "/never" => future::pending().await,
            "/stuck" => Response::new(stuck()),
            "/endless" => Response::new(frames(futures::stream::repeat(PART))),
            "/back" => {
                let parts = request.into_body().into_data_stream().map(Result::unwrap_or_default);
                Response::new(frames(parts))
            }
            _ => match request.into_body().collect().await {
                Ok(body) => Response::new(full(body.to_bytes())),
                Err(_) => Response::new(full("broken")),
            },
        }
    })
    .await
}

impl Proxy {
    fn idle(&self) -> u64 {
        self.metric("sluice_local_errors_total{listener=\"shop/cart:80\",flag=\"SI\"}")
    }

    /// Answers that were counted for the version: 2xx, 4xx, 5xx.
    fn of_the_version(&self) -> [u64; 3] {
        ["2xx", "4xx", "5xx"].map(|class| self.counted("a", class, ""))
    }

    async fn has_no_connection(&self) {
        let open = || self.metric("sluice_connections_open{listener=\"shop/cart:80\"}");
        eventually("the end of all connections", || open() == 0).await;
    }
}

fn post_stuck() -> Request<AnyBody> {
    Request::post("/").header("host", "a").body(stuck()).unwrap()
}

async fn read_to_end(stream: &mut TcpStream) -> String {
    let mut answer = Vec::new();
    soon("the end", stream.read_to_end(&mut answer)).await.unwrap();
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn a_request_without_an_end_is_answered_with_408_and_counts_for_no_version() {
    let app = app().await;
    let proxy = limited(app.address, LIMIT).await;
    let mut http1 = TcpStream::connect(proxy.address).await.unwrap();
    http1.write_all(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nhalf").await.unwrap();
    let answer = read_to_end(&mut http1).await;
    assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("x-sluice-response-flag: SI\r\n"), "{answer}");
    assert!(answer.contains("connection: close\r\n"), "{answer}");
    let mut http2 = Http2::connect(proxy.address).await;
    let mut other = http2.clone();
    let (answer, other) = tokio::join!(http2.send(post_stuck()), other.send(post("/", "whole")));
    let answer = answer.unwrap();
    assert_eq!((answer.status, answer.header("x-sluice-response-flag")), (StatusCode::REQUEST_TIMEOUT, "SI"));
    assert_eq!(other.unwrap().body, "whole");
    assert_eq!(soon("an answer", http2.send(get("/"))).await.unwrap().status, StatusCode::OK);
    assert_eq!((proxy.idle(), proxy.refused("body_timeout"), proxy.of_the_version()), (2, 2, [2, 0, 0]));
}

#[tokio::test]
async fn an_upstream_that_says_nothing_is_answered_for_with_504_and_has_failed() {
    let app = app().await;
    let proxy = Proxy::start(Role::Fleet);
    let protocol = || http_to([(cluster("a", &[app.address]), 100)]);
    // A limit may come later than its listener.
    proxy.serve(protocol()).await;
    let (mut http1, mut http2) = (Http1::connect(proxy.address).await, Http2::connect(proxy.address).await);
    assert_eq!(http1.get("/").await.status, StatusCode::OK);
    serve(&proxy, protocol(), LIMIT).await;
    for _ in 0..2 {
        let answer = soon("an answer", http1.get("/never")).await;
        assert_eq!((answer.status, answer.header("x-sluice-response-flag")), (StatusCode::GATEWAY_TIMEOUT, "SI"));
    }
    let answer = soon("an answer", http2.send(post("/never", "whole"))).await.unwrap();
    assert_eq!((answer.status, answer.header("x-sluice-response-flag")), (StatusCode::GATEWAY_TIMEOUT, "SI"));
    let answer = soon("an answer", http2.send(call("/never"))).await.unwrap();
    assert_eq!((answer.header("grpc-status"), answer.header("x-sluice-response-flag")), ("14", "SI"));
    assert_eq!((proxy.idle(), proxy.refused("body_timeout"), proxy.of_the_version()), (4, 0, [1, 0, 3]));
    assert_eq!(proxy.counted("a", "2xx", "UNAVAILABLE"), 1);
}

#[tokio::test]
async fn an_upstream_that_does_not_take_the_request_has_failed() {
    let deaf = TcpListener::bind((own_ip(), 8080)).await.unwrap();
    let proxy = limited(deaf.local_addr().unwrap(), LIMIT).await;
    // What nobody reads here soon fills the buffers.
    let endless = || Request::post("/").header("host", "a").body(frames(futures::stream::repeat(PART))).unwrap();
    let answer = soon("an answer", Http2::connect(proxy.address).await.send(endless())).await.unwrap();
    assert_eq!((answer.status, answer.header("x-sluice-response-flag")), (StatusCode::GATEWAY_TIMEOUT, "SI"));
    let mut http1 = TcpStream::connect(proxy.address).await.unwrap();
    http1.write_all(b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n").await.unwrap();
    let (mut answer, mut request) = http1.split();
    let send = async { while request.write_all(b"4\r\nmore\r\n".repeat(10_000).as_slice()).await.is_ok() {} };
    let mut status = [0; 12];
    let received = tokio::select! {
        read = soon("an answer", answer.read_exact(&mut status)) => read,
        () = send => panic!("the connection ended"),
    };
    received.unwrap();
    assert_eq!(&status, b"HTTP/1.1 504");
    assert_eq!((proxy.idle(), proxy.of_the_version()), (2, [0, 0, 2]));
}

#[tokio::test]
async fn an_answer_that_is_not_read_is_broken_off_and_counts_for_no_version() {
    let app = app().await;
    let proxy = limited(app.address, LIMIT).await;
    let mut http1 = TcpStream::connect(proxy.address).await.unwrap();
    http1.write_all(b"GET /endless HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    eventually("its end", || proxy.refused("answer_timeout") == 1).await;
    proxy.has_no_connection().await;
    let mut http2 = Http2::connect(proxy.address).await;
    let answer = http2.start(get("/endless")).await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    eventually("its end", || proxy.refused("answer_timeout") == 2).await;
    soon("the end", answer.into_body().collect()).await.unwrap_err();
    // The other streams of that connection are not concerned.
    assert_eq!(soon("an answer", http2.send(get("/"))).await.unwrap().status, StatusCode::OK);
    assert_eq!((proxy.idle(), proxy.of_the_version()), (2, [1, 0, 0]));
    eventually("the end of the requests", || proxy.metric("sluice_requests_active{listener=\"shop/cart:80\"}") == 0)
        .await;
}

#[tokio::test]
async fn an_answer_without_an_end_is_broken_off_and_the_upstream_has_failed() {
    let app = app().await;
    let proxy = limited(app.address, LIMIT).await;
    let answer = Http1::connect(proxy.address).await.start(get("/stuck")).await.unwrap();
    soon("the end", answer.into_body().collect()).await.unwrap_err();
    let mut http2 = Http2::connect(proxy.address).await;
    let answer = http2.start(get("/stuck")).await.unwrap();
    soon("the end", answer.into_body().collect()).await.unwrap_err();
    assert_eq!(soon("an answer", http2.send(get("/"))).await.unwrap().status, StatusCode::OK);
    eventually("both are counted", || proxy.idle() == 2).await;
    assert_eq!((proxy.refused("answer_timeout"), proxy.of_the_version()), (0, [1, 0, 2]));
}

#[tokio::test]
async fn a_stream_that_moves_slowly_is_left_alone() {
    let limit = Duration::from_secs(1);
    let app = app().await;
    let proxy = limited(app.address, limit).await;
    // Each part is far within the limit, all of them are not.
    let slowly = || {
        let parts = futures::stream::unfold(0, |sent| async move {
            sleep(Duration::from_millis(20)).await;
            (sent < 75).then_some((Bytes::from_static(b"x"), sent + 1))
        });
        Request::post("/back").header("host", "a").body(frames(parts)).unwrap()
    };
    let (mut http1, mut http2) = (Http1::connect(proxy.address).await, Http2::connect(proxy.address).await);
    let (first, second) = tokio::join!(http1.send(slowly()), http2.send(slowly()));
    assert_eq!((first.unwrap().body.len(), second.unwrap().body.len(), proxy.idle()), (75, 75, 0));
}

#[tokio::test]
async fn a_route_may_have_a_limit_of_its_own() {
    let app = app().await;
    let proxy = Proxy::start(Role::Fleet);
    let route = |path: &str, limit: Option<Duration>| Route {
        matches: RouteMatch {
            path: StringMatch { rule: StringRule::Prefix(path.to_owned()), ignore_case: false },
            ..RouteMatch::default()
        },
        action: Action::Forward {
            split: split([(cluster("a", &[app.address]), 100)]),
            policy: Arc::new(Policy { stream_idle: limit, ..Policy::default() }),
        },
    };
    let routes = || vec![route("/never", Some(LIMIT)), route("/stuck", Some(Duration::ZERO)), route("/", Some(LIMIT))];
    serve(&proxy, Protocol::Http(routes()), Duration::from_secs(3600)).await;
    let answer = soon("an answer", Http1::connect(proxy.address).await.get("/never")).await;
    assert_eq!(answer.status, StatusCode::GATEWAY_TIMEOUT);
    serve(&proxy, Protocol::Http(routes()), LIMIT).await;
    let mut client = Http2::connect(proxy.address).await;
    let mut unlimited = client.start(get("/stuck")).await.unwrap().into_body();
    soon("the part", unlimited.frame()).await.unwrap().unwrap();
    let limited = client.start(post_stuck()).await.unwrap();
    assert_eq!(limited.status(), StatusCode::REQUEST_TIMEOUT);
    // By now the other one would be over, too.
    assert!(futures::FutureExt::now_or_never(unlimited.frame()).is_none());
}

/// Reads to a reset.
async fn read_to_reset(stream: &mut TcpStream) -> String {
    let mut came = Vec::new();
    let error = soon("the reset", stream.read_to_end(&mut came)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    String::from_utf8(came).unwrap()
}

/// Nobody has ended them: an end in order would make half of something look whole.
#[tokio::test]
async fn a_websocket_and_a_connection_of_tcp_are_streams_too_and_end_in_a_reset() {
    let app = websocket_echo(own_ip()).await;
    let proxy = limited(app.address, LIMIT).await;
    let mut stream = websocket(proxy.address).await;
    stream.write_all(b"ping").await.unwrap();
    assert_eq!(read_to_reset(&mut stream).await, "ping");
    eventually("it is counted", || proxy.idle() == 1).await;
    let silent = TcpListener::bind((own_ip(), 8080)).await.unwrap();
    serve(&proxy, Protocol::Tcp(split([(cluster("a", &[silent.local_addr().unwrap()]), 100)])), LIMIT).await;
    let mut client = TcpStream::connect(proxy.address).await.unwrap();
    client.write_all(b"anybody?").await.unwrap();
    let (mut upstream, _) = soon("the connection", silent.accept()).await.unwrap();
    assert_eq!(read_to_reset(&mut client).await, "");
    assert_eq!(read_to_reset(&mut upstream).await, "anybody?");
    eventually("it is counted", || proxy.idle() == 2).await;
    proxy.has_no_connection().await;
}

#[tokio::test]
async fn bytes_that_a_receiver_does_not_take_end_in_a_reset() {
    let silent = TcpListener::bind((own_ip(), 8080)).await.unwrap();
    let proxy = Proxy::start(Role::Fleet);
    serve(&proxy, Protocol::Tcp(split([(cluster("a", &[silent.local_addr().unwrap()]), 100)])), LIMIT).await;
    let mut client = TcpStream::connect(proxy.address).await.unwrap();
    let error = soon("the end", async {
        loop {
            if let Err(error) = client.write_all(&PART).await {
                break error;
            }
        }
    })
    .await;
    assert!([ErrorKind::ConnectionReset, ErrorKind::BrokenPipe].contains(&error.kind()), "{error}");
    assert_eq!(proxy.idle(), 1);
}

#[tokio::test]
async fn a_connection_without_a_stream_has_no_such_limit() {
    let app = app().await;
    let proxy = limited(app.address, LIMIT).await;
    let (mut http1, mut http2) = (Http1::connect(proxy.address).await, Http2::connect(proxy.address).await);
    for _ in 0..2 {
        assert_eq!(http1.get("/").await.status, StatusCode::OK);
        assert_eq!(soon("an answer", http2.send(get("/"))).await.unwrap().status, StatusCode::OK);
        // What is tested is that this time does not count.
        sleep(2 * LIMIT).await;
    }
    assert_eq!((proxy.idle(), proxy.metric("sluice_connections_open{listener=\"shop/cart:80\"}")), (0, 2));
}

#[tokio::test]
async fn a_connection_whose_last_answer_is_not_read_ends_too() {
    let app = App::start(own_ip(), 8080, |_| async { Response::new(full(PART)) }).await;
    let proxy = Proxy::with(Role::Fleet, sluice_proxy::tls::IdentityHandle::default(), |options| {
        options.timing.downstream_idle = Some(LIMIT);
    });
    serve(&proxy, http_to([(cluster("a", &[app.address]), 100)]), LIMIT).await;
    let stream = TokioIo::new(TcpStream::connect(proxy.address).await.unwrap());
    let builder = http2::Builder::new(TokioExecutor::new()).initial_stream_window_size(10).clone();
    let (sender, connection) = builder.handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let mut client = Http2(sender);
    // Of its answer 10 bytes are taken. For the proxy it is over then, and the rest is with h2.
    let answer = client.start(get("/")).await.unwrap();
    eventually("its end", || proxy.of_the_version() == [1, 0, 0]).await;
    proxy.has_no_connection().await;
    soon("the end", answer.into_body().collect()).await.unwrap_err();
    assert_eq!(proxy.refused("answer_timeout"), 1);
}
