//! Requests that are answered before their end: what is left of them is sent on, and they are open until then.

use std::{
    future::poll_fn,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt, stream};
use h2::Reason;
use http::{Method, Response};
use http_body_util::{BodyExt, StreamBody};
use sluice_proxy::{
    metrics::Metrics,
    snapshot::{Cluster, FilterChain, Limits, Listener, TrafficPolicy, UpstreamProtocol},
    workers::{Options, Role},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::mpsc,
    time::sleep,
};

use crate::{
    frames::{self, DATA, END_HEADERS, END_STREAM, Frame, GET, HEADERS, POST, RST_STREAM, SETTINGS, frame},
    http2::client,
    support::*,
};

const ACTIVE: &str = "sluice_requests_active{listener=\"shop/cart:80\"}";
const OPEN: &str = "sluice_connections_open{listener=\"shop/cart:80\"}";
const LIMIT: Duration = Duration::from_millis(100);
/// Both protocols towards the application.
const UPSTREAM: [UpstreamProtocol; 2] = [UpstreamProtocol::Http1, UpstreamProtocol::Http2];

/// What came of a request, and whether its end came, too.
type Received = (String, bool);

/// Answers at once, and reads on.
async fn app() -> (App, mpsc::Receiver<Received>) {
    let (sender, received) = mpsc::channel(16);
    let app = App::start(own_ip(), 8080, move |request| {
        let sender = sender.clone();
        async move {
            if request.method() == Method::POST {
                tokio::spawn(async move {
                    let (mut body, mut content, mut whole) = (request.into_body(), Vec::new(), true);
                    while let Some(frame) = body.frame().await {
                        match frame {
                            Ok(frame) => content.extend_from_slice(frame.data_ref().unwrap_or(&Bytes::new())),
                            Err(_) => {
                                whole = false;
                                break;
                            }
                        }
                    }
                    let _ = sender.send((String::from_utf8(content).unwrap(), whole)).await;
                });
            }
            Response::new(full("early"))
        }
    })
    .await;
    (app, received)
}

/// A proxy with one thread.
async fn proxy_to(cluster: Cluster, idle: Option<Duration>, change: impl FnOnce(&mut Options)) -> Proxy {
    let proxy = Proxy::with(Role::Fleet, Default::default(), |options| {
        options.metrics = Metrics::new("test", 1);
        change(options);
    });
    let chains = vec![FilterChain { server_name: None, tls: None, protocol: http_to([(cluster, 100)]), idle }];
    let name = "shop/cart:80".to_owned();
    proxy.apply([Arc::new(Listener { name, address: proxy.address, chains, max_connections: None })]).await;
    proxy
}

fn over(protocol: UpstreamProtocol, app: &App) -> Cluster {
    Cluster { protocol, ..cluster("a", &[app.address]) }
}

/// A client in the middle of its request, which has been answered. By hand: those of hyper end a request with its answer.
struct Http1(TcpStream);

impl Http1 {
    async fn begin(proxy: &Proxy) -> Self {
        let mut stream = TcpStream::connect(proxy.address).await.unwrap();
        let head = "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut client = Self(stream);
        client.answer().await;
        client
    }

    async fn answer(&mut self) {
        let mut answer = Vec::new();
        while !answer.ends_with(b"early") {
            answer.push(soon("the answer", self.0.read_u8()).await.unwrap());
        }
        assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
    }

    async fn send(&mut self, bytes: &str) {
        self.0.write_all(bytes.as_bytes()).await.unwrap();
    }

    /// What comes until the connection ends.
    async fn rest(mut self) -> String {
        let mut rest = String::new();
        soon("the end of the connection", self.0.read_to_string(&mut rest)).await.unwrap();
        rest
    }
}

/// The same on the first stream of a connection.
struct Http2(OwnedReadHalf, OwnedWriteHalf);

impl Http2 {
    async fn begin(proxy: &Proxy) -> Self {
        let (read, mut write) = frames::connect(proxy).await;
        write.write_all(&frame(HEADERS, END_HEADERS, 1, POST)).await.unwrap();
        write.write_all(&frame(DATA, 0, 1, b"first")).await.unwrap();
        let mut client = Self(read, write);
        client.answer(1).await;
        client
    }

    async fn next(&mut self) -> Frame {
        soon("a frame", Frame::read(&mut self.0)).await.expect("the connection has ended")
    }

    async fn reset(&mut self) -> (u32, u32) {
        loop {
            if let Some(reset) = self.next().await.reset() {
                return reset;
            }
        }
    }

    async fn answer(&mut self, stream: u32) {
        loop {
            let frame = self.next().await;
            assert_ne!(frame.kind, RST_STREAM, "{frame:?}");
            if frame.stream == stream && frame.flags & END_STREAM != 0 && matches!(frame.kind, DATA | HEADERS) {
                return;
            }
        }
    }

    async fn send(&mut self, frame: Bytes) {
        self.1.write_all(&frame).await.unwrap();
    }
}

fn received(content: &str, whole: bool) -> Option<Received> {
    Some((content.to_owned(), whole))
}

#[tokio::test]
async fn a_request_is_open_until_its_end_though_it_was_answered_before() {
    for protocol in UPSTREAM {
        let (app, mut got) = app().await;
        let limits = Limits { requests: Some(1), ..Limits::default() };
        let cluster = Cluster { traffic: TrafficPolicy { limits, ..TrafficPolicy::default() }, ..over(protocol, &app) };
        let proxy = proxy_to(cluster, None, |_| {}).await;
        let mut other = crate::support::Http1::connect(proxy.address).await;

        let mut http1 = Http1::begin(&proxy).await;
        assert_eq!((proxy.metric(ACTIVE), proxy.counted("a", "2xx", "")), (1, 1));
        assert_eq!(other.get("/").await.header("x-sluice-response-flag"), "UO");
        http1.send("6\r\nsecond\r\n0\r\n\r\n").await;
        assert_eq!(soon("the request", got.recv()).await, received("firstsecond", true));
        eventually("the end", || proxy.metric(ACTIVE) == 0).await;
        assert_eq!(other.get("/").await.body, "early");
        http1.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
        http1.answer().await;

        let mut http2 = Http2::begin(&proxy).await;
        assert_eq!((proxy.metric(ACTIVE), proxy.counted("a", "2xx", "")), (1, 4));
        assert_eq!(other.get("/").await.header("x-sluice-response-flag"), "UO");
        http2.send(frame(DATA, END_STREAM, 1, b"second")).await;
        assert_eq!(soon("the request", got.recv()).await, received("firstsecond", true));
        eventually("the end", || proxy.metric(ACTIVE) == 0).await;
        http2.send(frame(HEADERS, END_HEADERS | END_STREAM, 3, GET)).await;
        http2.answer(3).await;
        assert_eq!((proxy.counted("a", "2xx", ""), proxy.counted("a", "5xx", "")), (5, 2));
    }
}

#[tokio::test]
async fn one_of_which_nothing_more_comes_ends_on_both_sides() {
    for protocol in UPSTREAM {
        let (app, mut got) = app().await;
        let proxy = proxy_to(over(protocol, &app), Some(LIMIT), |_| {}).await;
        assert_eq!(Http1::begin(&proxy).await.rest().await, "");
        assert_eq!(soon("the end upstream", got.recv()).await, received("first", false));
        eventually("the end", || (proxy.metric(ACTIVE), proxy.metric(OPEN)) == (0, 0)).await;

        let mut http2 = Http2::begin(&proxy).await;
        // The answer was whole: only the rest of the request is not wanted (RFC 9113, 8.1).
        assert_eq!(http2.reset().await, (1, 0));
        assert_eq!(soon("the end upstream", got.recv()).await, received("first", false));
        // The other streams of that connection are not concerned.
        http2.send(frame(HEADERS, END_HEADERS | END_STREAM, 3, GET)).await;
        http2.answer(3).await;
        eventually("the end", || proxy.metric(ACTIVE) == 0).await;
        // As of the version's, all is well.
        assert_eq!((proxy.counted("a", "2xx", ""), proxy.counted("a", "5xx", "")), (3, 0));
        assert_eq!(proxy.metric("sluice_local_errors_total{listener=\"shop/cart:80\",flag=\"SI\"}"), 2);
        assert_eq!(proxy.refused("answer_timeout"), 2);
    }
}

#[tokio::test]
async fn one_that_rests_for_longer_than_a_connection_may_arrives_whole() {
    for protocol in UPSTREAM {
        let (app, mut got) = app().await;
        let proxy = proxy_to(over(protocol, &app), None, |options| options.timing.downstream_idle = Some(LIMIT)).await;
        let (mut http1, mut http2) = (Http1::begin(&proxy).await, Http2::begin(&proxy).await);
        // What is tested is that this time does not count.
        sleep(4 * LIMIT).await;
        http1.send("6\r\nsecond\r\n").await;
        http2.send(frame(DATA, 0, 1, b"second")).await;
        sleep(LIMIT).await;
        http1.send("5\r\nthird\r\n0\r\n\r\n").await;
        assert_eq!(soon("the request", got.recv()).await, received("firstsecondthird", true));
        http2.send(frame(DATA, END_STREAM, 1, b"third")).await;
        assert_eq!(soon("the request", got.recv()).await, received("firstsecondthird", true));
    }
}

#[tokio::test]
async fn one_whose_client_goes_has_no_end_upstream() {
    for protocol in UPSTREAM {
        let (app, mut got) = app().await;
        let proxy = proxy_to(over(protocol, &app), None, |_| {}).await;
        drop(Http1::begin(&proxy).await);
        assert_eq!(soon("the end upstream", got.recv()).await, received("first", false));
        drop(Http2::begin(&proxy).await);
        assert_eq!(soon("the end upstream", got.recv()).await, received("first", false));
        eventually("the end", || (proxy.metric(ACTIVE), proxy.metric(OPEN)) == (0, 0)).await;
        // They had their answers.
        assert_eq!(proxy.metric("sluice_client_aborts_total{listener=\"shop/cart:80\"}"), 0);
    }
}

#[tokio::test]
async fn one_whose_upstream_goes_ends_though_its_client_is_silent() {
    let listener = TcpListener::bind((own_ip(), 8080)).await.unwrap();
    let cluster = cluster("a", &[listener.local_addr().unwrap()]);
    let proxy = proxy_to(Cluster { protocol: UpstreamProtocol::Http1, ..cluster }, None, |_| {}).await;
    let answer = async |answer: &[u8]| {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut content = Vec::new();
        while !content.ends_with(b"first\r\n") {
            content.push(stream.read_u8().await.unwrap());
        }
        stream.write_all(answer).await.unwrap();
        stream
    };
    let known = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nearly";
    let (http1, upstream) = tokio::join!(Http1::begin(&proxy), answer(known));
    drop(upstream);
    assert_eq!(http1.rest().await, "");
    let (mut http2, upstream) = tokio::join!(Http2::begin(&proxy), answer(known));
    drop(upstream);
    assert_eq!(http2.reset().await, (1, 0));
    // One whose end is that of the connection.
    let (http1, upstream) = tokio::join!(Http1::begin(&proxy), answer(b"HTTP/1.1 200 OK\r\n\r\nearly"));
    drop(upstream);
    assert_eq!(http1.rest().await, "\r\n0\r\n\r\n");
    eventually("the end", || proxy.metric(ACTIVE) == 0).await;
    assert_eq!((proxy.counted("a", "2xx", ""), proxy.counted("a", "5xx", "")), (3, 0));
}

#[tokio::test]
async fn one_ends_with_its_connection_when_a_drain_is_over() {
    let (app, mut got) = app().await;
    let proxy = proxy_to(over(UpstreamProtocol::Http1, &app), None, |_| {}).await;
    let _clients = (Http1::begin(&proxy).await, Http2::begin(&proxy).await);
    assert_eq!(soon("the end of the drain", proxy.workers.drain(LIMIT)).await.unwrap().cut, 2);
    for _ in 0..2 {
        assert_eq!(soon("the end upstream", got.recv()).await, received("first", false));
    }
}

/// An application that answers some frames of its clients with frames. Returns how many connections it has had.
async fn by_hand(ip: IpAddr, answer: fn(Frame) -> Vec<Bytes>) -> Arc<AtomicUsize> {
    let listener = TcpListener::bind((ip, 8080)).await.unwrap();
    let connections = Arc::new(AtomicUsize::new(0));
    let opened = connections.clone();
    tokio::spawn(async move {
        loop {
            let (mut from, mut to) = listener.accept().await.unwrap().0.into_split();
            opened.fetch_add(1, SeqCst);
            tokio::spawn(async move {
                from.read_exact(&mut [0; 24]).await.unwrap();
                to.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
                while let Some(frame) = Frame::read(&mut from).await {
                    to.write_all(&answer(frame).concat()).await.unwrap();
                }
            });
        }
    });
    connections
}

/// `:status: 200`, as HPACK's static table has it.
const OK: &[u8] = b"\x88";

/// Answers at the first content of a request, and wants no more of one that does not end with it.
fn wants_no_more(Frame { kind, flags, stream, payload }: Frame) -> Vec<Bytes> {
    const REJECTED: &[u8] = b"\x88\x00\x0bgrpc-status\x017";
    if kind != DATA {
        return Vec::new();
    }
    let mut answer = if payload == b"message" {
        vec![frame(HEADERS, END_HEADERS | END_STREAM, stream, REJECTED)]
    } else {
        vec![frame(HEADERS, END_HEADERS, stream, OK), frame(DATA, END_STREAM, stream, b"early")]
    };
    if flags & END_STREAM == 0 {
        // NO_ERROR.
        answer.push(frame(RST_STREAM, 0, stream, &[0; 4]));
    }
    answer
}

/// RFC 9113, 8.1: such a reset is no reason to discard the answer.
#[tokio::test]
async fn an_answer_is_whole_though_its_upstream_wants_no_more_of_the_request() {
    for meshed in [false, true] {
        let (ip, ca) = (own_ip(), Ca::new());
        let connections = by_hand(ip, wants_no_more).await;
        let sidecar = sidecar_with(ca.identity(APP), ip, false, |it| it.metrics = Metrics::new("test", 1)).await;
        let direct = cluster("a", &[(ip, 8080).into()]);
        let cluster = if meshed { mesh_cluster("a", &[&sidecar]) } else { direct };
        let cluster = Cluster { protocol: UpstreamProtocol::Http2, ..cluster };
        let proxy = proxy_to(cluster, None, |options| options.identity = ca.identity(FLEET)).await;

        let (read, mut write) = frames::connect(&proxy).await;
        write.write_all(&frame(HEADERS, END_HEADERS, 1, POST)).await.unwrap();
        let mut neighbour = Http2(read, write);
        eventually("the neighbour's request", || proxy.metric(ACTIVE) == 1).await;

        assert_eq!(Http1::begin(&proxy).await.rest().await, "\r\n0\r\n\r\n");
        assert_eq!(Http2::begin(&proxy).await.reset().await, (1, 0));
        let upload = call("/shop.Cart/Fill").map(drop);
        let (answer, mut content) = client(&proxy).await.send_request(upload, false).unwrap();
        content.send_data("message".into(), false).unwrap();
        let answer = soon("the status", answer).await.unwrap();
        assert_eq!((answer.status().as_u16(), answer.headers()["grpc-status"].as_bytes()), (200, &b"7"[..]));
        assert!(answer.body().is_end_stream());
        let reset = soon("the reset", poll_fn(|cx| content.poll_reset(cx))).await;
        assert_eq!(reset.unwrap(), Reason::NO_ERROR);

        neighbour.send(frame(DATA, END_STREAM, 1, b"")).await;
        neighbour.answer(1).await;
        assert_eq!(connections.load(SeqCst), 1, "all on one connection");
        assert_eq!((proxy.counted("a", "2xx", ""), proxy.counted("a", "2xx", "PERMISSION_DENIED")), (3, 1));
        let metrics = proxy.metrics.render();
        let failed = metrics.lines().find(|it| it.starts_with("sluice_local_errors_total{") && !it.ends_with(" 0"));
        assert_eq!((failed, proxy.counted("a", "5xx", "")), (None, 0));
        eventually("the end", || proxy.metric(ACTIVE) == 0).await;
        assert_eq!(proxy.metric("sluice_client_aborts_total{listener=\"shop/cart:80\"}"), 0);
    }
}

/// Answers whoever has ended, with three DATA frames of no content before the last.
fn says_little(Frame { kind, flags, stream, .. }: Frame) -> Vec<Bytes> {
    if flags & END_STREAM == 0 || !matches!(kind, HEADERS | DATA) {
        return Vec::new();
    }
    let empty = frame(DATA, 0, stream, &[]);
    let (head, end) = (frame(HEADERS, END_HEADERS, stream, OK), frame(DATA, END_STREAM, stream, b"enough"));
    vec![head, empty.clone(), empty.clone(), empty, end]
}

/// As some servers send before trailers, or for each empty part of a body.
#[tokio::test]
async fn empty_data_frames_of_an_application_end_no_connection() {
    let ip = own_ip();
    let connections = by_hand(ip, says_little).await;
    let cluster = Cluster { protocol: UpstreamProtocol::Http2, ..cluster("a", &[(ip, 8080).into()]) };
    let proxy = proxy_to(cluster, None, |options| options.metrics = Metrics::new("test", 1)).await;
    let (read, mut write) = frames::connect(&proxy).await;
    write.write_all(&frame(HEADERS, END_HEADERS, 1, POST)).await.unwrap();
    let mut neighbour = Http2(read, write);
    eventually("the neighbour's request", || proxy.metric(ACTIVE) == 1).await;
    let mut client = crate::support::Http1::connect(proxy.address).await;
    for _ in 0..150 {
        assert_eq!(client.get("/").await.body, "enough");
    }
    neighbour.send(frame(DATA, END_STREAM, 1, b"")).await;
    neighbour.answer(1).await;
    assert_eq!((connections.load(SeqCst), proxy.counted("a", "2xx", "")), (1, 151));
}

/// As of gRPC's streams both ways.
#[tokio::test]
async fn one_that_its_client_cancels_while_both_are_under_way_is_no_failure_of_its_version() {
    for protocol in UPSTREAM {
        let app = App::start(own_ip(), 8080, |request| async move {
            tokio::spawn(request.into_body().collect());
            let begin = stream::iter([Ok(hyper::body::Frame::data("early".into()))]);
            Response::new(BodyExt::boxed(StreamBody::new(begin.chain(stream::pending()))))
        })
        .await;
        let proxy = proxy_to(over(protocol, &app), None, |_| {}).await;
        let (read, mut write) = frames::connect(&proxy).await;
        write.write_all(&frame(HEADERS, END_HEADERS, 1, POST)).await.unwrap();
        let mut client = Http2(read, write);
        while client.next().await.payload != b"early" {}
        // So that one read finds both. CANCEL.
        let last = [frame(DATA, 0, 1, b"last"), frame(RST_STREAM, 0, 1, &8_u32.to_be_bytes())];
        client.send(last.concat().into()).await;
        eventually("the end", || proxy.metric(ACTIVE) == 0).await;
        assert_eq!(proxy.metric("sluice_client_aborts_total{listener=\"shop/cart:80\"}"), 1, "{protocol:?}");
        assert_eq!(proxy.metric("sluice_local_errors_total{listener=\"shop/cart:80\",flag=\"UC\"}"), 0);
        assert_eq!((proxy.counted("a", "5xx", ""), proxy.outcomes("a", LIMIT).bad), (0, 0));
    }
}
