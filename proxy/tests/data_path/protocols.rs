//! Clusters that are spoken to in one protocol, whatever the client speaks.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version, header};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use sluice_proxy::{
    snapshot::{Action, Cluster, Mirror, Policy, Protocol, RetryOn, RetryPolicy, Share, UpstreamProtocol},
    workers::Role,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::{mpsc, oneshot},
};

use crate::{
    downstream_http1::raw,
    support::*,
    upstream_http1::{answers, head, upstream},
};

const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

fn speaking(protocol: UpstreamProtocol, addresses: &[SocketAddr]) -> Cluster {
    Cluster { protocol, ..cluster("a", addresses) }
}

async fn proxy_to(protocol: UpstreamProtocol, address: SocketAddr) -> Proxy {
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(speaking(protocol, &[address]), 100)])).await;
    proxy
}

/// An upstream that keeps the heads that it reads, and answers each with `answer`.
async fn recorder(answer: &'static [u8]) -> (SocketAddr, Arc<Mutex<Vec<String>>>) {
    let heads = Arc::<Mutex<Vec<String>>>::default();
    let kept = Arc::clone(&heads);
    let (address, _) = upstream(move |mut stream| {
        let kept = Arc::clone(&kept);
        async move {
            while let Some(head) = head(&mut stream).await {
                kept.lock().unwrap().push(head);
                stream.write_all(answer).await.unwrap();
            }
        }
    })
    .await;
    (address, heads)
}

fn to(method: Method, path: &str) -> http::request::Builder {
    Request::builder().method(method).uri(format!("http://cart.shop:8080{path}"))
}

fn frames(data: &[&'static str], trailers: &[(&'static str, &'static str)]) -> AnyBody {
    let mut all: Vec<_> = data.iter().map(|data| Ok(Frame::data(Bytes::from_static(data.as_bytes())))).collect();
    if !trailers.is_empty() {
        let fields = trailers
            .iter()
            .map(|(name, value)| (header::HeaderName::from_static(name), HeaderValue::from_static(value)));
        all.push(Ok(Frame::trailers(fields.collect())));
    }
    BodyExt::boxed(StreamBody::new(futures::stream::iter(all)))
}

/// What an application saw of a request: version, target, headers, body and trailers.
type Seen = Arc<Mutex<Vec<(Version, String, HeaderMap, Bytes, Option<HeaderMap>)>>>;

/// Answers with trailers.
async fn app() -> (App, Seen) {
    let seen = Seen::default();
    let written = Arc::clone(&seen);
    let app = App::start(own_ip(), 8080, move |request| {
        let written = Arc::clone(&written);
        async move {
            let (parts, body) = request.into_parts();
            let Ok(body) = body.collect().await else { return Response::new(full("")) };
            let trailers = body.trailers().cloned();
            let body = body.to_bytes();
            written.lock().unwrap().push((parts.version, parts.uri.to_string(), parts.headers, body, trailers));
            Response::builder().header("trailer", "x-sum").body(frames(&["ok"], &[("x-sum", "42")])).unwrap()
        }
    })
    .await;
    (app, seen)
}

#[tokio::test]
async fn an_http2_request_is_said_in_http1() {
    let (address, heads) = recorder(OK).await;
    let proxy = proxy_to(UpstreamProtocol::Http1, address).await;
    let mut client = Http2::connect(proxy.address).await;
    let request = to(Method::GET, "/cart?x=1")
        .header("host", "CART.shop:8080")
        .header("te", "trailers")
        .header("cookie", "a=1")
        .header("x-mine", "1")
        .header("cookie", "b=2");
    assert_eq!(client.send(request.body(full("")).unwrap()).await.unwrap().body, "ok");
    for (method, body) in [(Method::POST, ""), (Method::DELETE, ""), (Method::PUT, "hello")] {
        let answer = client.send(to(method, "/").body(full(body)).unwrap()).await.unwrap();
        assert_eq!(answer.status, StatusCode::OK);
    }
    let heads = heads.lock().unwrap();
    let mut lines: Vec<_> = heads[0].trim_end().split("\r\n").collect();
    assert_eq!(lines.drain(..2).collect::<Vec<_>>(), ["GET /cart?x=1 HTTP/1.1", "host: cart.shop:8080"]);
    lines.sort_unstable();
    assert_eq!(
        lines,
        [
            "connection: te",
            "cookie: a=1; b=2",
            "te: trailers",
            "x-forwarded-for: 127.0.0.1",
            "x-forwarded-proto: http",
            "x-mine: 1",
        ]
    );
    let lengths = ["content-length: 0", "", "content-length: 5"];
    for (head, length) in heads[1..].iter().zip(lengths) {
        let said = head.split("\r\n").find(|line| line.starts_with("content-length")).unwrap_or_default();
        assert_eq!(said, length, "{head}");
        assert!(!head.contains("transfer-encoding"), "{head}");
    }
}

#[tokio::test]
async fn content_of_unknown_length_is_chunked_with_the_trailers_that_were_announced() {
    let (app, seen) = app().await;
    let proxy = proxy_to(UpstreamProtocol::Http1, app.address).await;
    let mut client = Http2::connect(proxy.address).await;
    let body = frames(&["he", "llo"], &[("x-sum", "1"), ("x-other", "2")]);
    let request = to(Method::POST, "/").header("trailer", "x-sum").header("te", "trailers");
    let answer = client.send(request.body(body).unwrap()).await.unwrap();
    assert_eq!((answer.body.as_str(), &answer.trailers.unwrap()["x-sum"]), ("ok", &HeaderValue::from_static("42")));
    let (version, target, headers, body, trailers) = seen.lock().unwrap().pop().unwrap();
    assert_eq!((version, target.as_str(), &body[..]), (Version::HTTP_11, "/", &b"hello"[..]));
    assert_eq!(headers["transfer-encoding"], "chunked");
    let trailers = trailers.unwrap();
    assert_eq!((trailers.len(), &trailers["x-sum"]), (1, &HeaderValue::from_static("1")));
}

#[tokio::test]
async fn http1_answers_of_all_forms_reach_an_http2_client() {
    const HOP: &[u8] = b"HTTP/1.1 200 OK\r\nconnection: x-hop\r\nx-hop: 1\r\nkeep-alive: timeout=5\r\nproxy-connection: close\r\n\
        upgrade: h2c\r\nx-mine: 1\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx-sum: 1\r\nconnection: close\r\n\r\n";
    // Status and content, and whether the connection is kept.
    type Form = (&'static [u8], Method, u16, &'static str, bool);
    let table: [Form; 8] = [
        (HOP, Method::GET, 200, "ok", true),
        (
            b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
            Method::GET,
            200,
            "ok",
            true,
        ),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n", Method::HEAD, 200, "", true),
        (b"HTTP/1.1 204 No Content\r\n\r\n", Method::GET, 204, "", true),
        (b"HTTP/1.1 204 No Content\r\ncontent-length: 7\r\n\r\n", Method::GET, 204, "", true),
        (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 7\r\n\r\n", Method::GET, 304, "", true),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil the end", Method::GET, 200, "until the end", false),
        (b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nuntil the end", Method::GET, 200, "until the end", false),
    ];
    for (answer, method, status, body, kept) in table {
        let text = String::from_utf8_lossy(answer);
        let (address, connections) = answers(answer, !kept).await;
        let proxy = proxy_to(UpstreamProtocol::Http1, address).await;
        let mut client = Http2::connect(proxy.address).await;
        for _ in 0..2 {
            let got = client.send(to(method.clone(), "/").body(full("")).unwrap()).await.unwrap();
            assert_eq!((got.status.as_u16(), got.body.as_str()), (status, body), "{text}");
            for name in
                ["connection", "x-hop", "keep-alive", "proxy-connection", "upgrade", "transfer-encoding", "link"]
            {
                assert!(!got.headers.contains_key(name), "{name} after {text}");
            }
            assert!(status != 204 || !got.headers.contains_key("content-length"), "{text}");
            if answer == HOP {
                let trailers = got.trailers.unwrap();
                assert_eq!((trailers.len(), &trailers["x-sum"]), (1, &HeaderValue::from_static("1")));
                assert_eq!(got.headers["x-mine"], "1");
            }
        }
        let opened = connections.load(std::sync::atomic::Ordering::SeqCst);
        assert_eq!(opened, if kept { 1 } else { 2 }, "{text}");
    }
}

#[tokio::test]
async fn a_broken_http1_answer_resets_the_stream_alone() {
    let broken: [&[u8]; 3] = [
        b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\npart",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\npart\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nnonsense\r\n",
    ];
    for answer in broken {
        let (address, _) = answers(answer, true).await;
        let proxy = proxy_to(UpstreamProtocol::Http1, address).await;
        let mut client = Http2::connect(proxy.address).await;
        for _ in 0..2 {
            // The reset may overtake the head.
            let error = client.send(to(Method::GET, "/").body(full("")).unwrap()).await.unwrap_err();
            assert!(format!("{error:?}").contains("Reset"), "{error:?}");
        }
    }
    let (address, _) =
        answers(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n", false).await;
    let proxy = proxy_to(UpstreamProtocol::Http1, address).await;
    let mut client = Http2::connect(proxy.address).await;
    let answer = client.send(to(Method::GET, "/").body(full("")).unwrap()).await.unwrap();
    assert_eq!((answer.status, answer.header("x-sluice-response-flag")), (StatusCode::BAD_GATEWAY, "UPE"));
}

#[tokio::test]
async fn a_reset_of_the_clients_gives_the_http1_connection_up() {
    for answered in [false, true] {
        let (reached, mut reaches) = mpsc::channel(1);
        let (ended, mut ends) = mpsc::channel(1);
        let (address, _) = upstream(move |mut stream| {
            let (reached, ended) = (reached.clone(), ended.clone());
            async move {
                head(&mut stream).await.unwrap();
                if answered {
                    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\npart").await.unwrap();
                }
                reached.send(()).await.unwrap();
                // An end, or a reset where bytes were left.
                let _ = stream.read(&mut [0]).await;
                ended.send(()).await.unwrap();
            }
        })
        .await;
        let proxy = proxy_to(UpstreamProtocol::Http1, address).await;
        let mut client = Http2::connect(proxy.address).await;
        let mut other = client.clone();
        let (give_up, given_up) = oneshot::channel::<()>();
        let request = tokio::spawn(async move {
            let response = other.0.send_request(to(Method::GET, "/").body(full("")).unwrap());
            if answered {
                let _response = response.await.unwrap();
                given_up.await.unwrap();
            } else {
                tokio::select! {
                    _ = response => panic!("there is no answer"),
                    gone = given_up => gone.unwrap(),
                }
            }
        });
        soon("the request", reaches.recv()).await.unwrap();
        give_up.send(()).unwrap();
        request.await.unwrap();
        soon("the end of its connection", ends.recv()).await.unwrap();
        soon("the connection of the client", client.0.ready()).await.unwrap();
    }
}

#[tokio::test]
async fn much_content_passes_both_ways_between_the_protocols() {
    let echo = App::start(own_ip(), 8080, |request| async {
        let body = request.into_body().map_err(|error| panic!("{error}"));
        Response::new(BodyExt::boxed(body))
    })
    .await;
    // Many windows long.
    let content = Bytes::from(vec![b'x'; 8 << 20]);
    let http1 = proxy_to(UpstreamProtocol::Http1, echo.address).await;
    let http2 = proxy_to(UpstreamProtocol::Http2, echo.address).await;
    let mut client = Http2::connect(http1.address).await;
    let answer = client.send(to(Method::POST, "/").body(full(content.clone())).unwrap()).await.unwrap();
    assert!(answer.body.as_bytes() == content);
    let mut client = Http1::connect(http2.address).await;
    let answer = client.send(post("/", content.clone())).await.unwrap();
    assert!(answer.body.as_bytes() == content);
}

#[tokio::test]
async fn an_http1_request_is_said_in_http2() {
    let (app, seen) = app().await;
    let proxy = proxy_to(UpstreamProtocol::Http2, app.address).await;
    let chunked = "POST /cart?x=1 HTTP/1.1\r\nhost: cart.shop:8080\r\nconnection: close, te, x-hop\r\nx-hop: 1\r\nte: trailers\r\n\
        keep-alive: timeout=5\r\nproxy-connection: close\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\ncookie: a=1; b=2\r\n\r\n\
        5\r\nhello\r\n0\r\nx-sum: 1\r\nkeep-alive: 1\r\n\r\n";
    let answer = raw(proxy.address, chunked).await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.ends_with("2\r\nok\r\n0\r\nx-sum: 42\r\n\r\n"), "{answer}");
    let (version, target, headers, body, trailers) = seen.lock().unwrap().pop().unwrap();
    assert_eq!((version, target.as_str()), (Version::HTTP_2, "http://cart.shop:8080/cart?x=1"));
    assert_eq!(&body[..], b"hello");
    let mut names: Vec<_> = headers.keys().map(|name| name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["cookie", "te", "trailer", "x-forwarded-for", "x-forwarded-proto"]);
    assert_eq!(headers["cookie"], "a=1; b=2");
    let trailers = trailers.unwrap();
    assert_eq!((trailers.len(), &trailers["x-sum"]), (1, &HeaderValue::from_static("1")));

    let old = raw(proxy.address, "POST / HTTP/1.0\r\ncontent-length: 5\r\n\r\nhello").await;
    assert!(old.starts_with("HTTP/1.0 200 OK\r\n") && old.ends_with("\r\n\r\nok"), "{old}");
    let (version, target, headers, body, _) = seen.lock().unwrap().pop().unwrap();
    assert_eq!((version, target), (Version::HTTP_2, format!("http://{}/", proxy.address)));
    assert_eq!((&headers["content-length"], &body[..]), (&HeaderValue::from_static("5"), &b"hello"[..]));

    // Its stream is ended by a frame of its own.
    let head = raw(proxy.address, "HEAD / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.ends_with("\r\n\r\n"), "{head}");
    eventually("all requests' account", || proxy.counted("a", "2xx", "") == 3).await;
    assert_eq!(proxy.metric("sluice_client_aborts_total{listener=\"shop/cart:80\"}"), 0);
}

#[tokio::test]
async fn content_that_a_client_breaks_off_is_not_the_http2_upstreams_fault() {
    let (reached, mut reaches) = mpsc::channel(8);
    let app = App::start(own_ip(), 8080, move |request| {
        let reached = reached.clone();
        async move {
            reached.send(request.uri().path().to_owned()).await.unwrap();
            let _ = request.into_body().collect().await;
            Response::new(full("ok"))
        }
    })
    .await;
    let retry = RetryPolicy { on: vec![RetryOn::Reset], retries: 3, per_try_timeout: None };
    let policy = Arc::new(Policy { retry: Some(retry), ..Policy::default() });
    let split = split([(speaking(UpstreamProtocol::Http2, &[app.address]), 100)]);
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(Protocol::http(Action::Forward { split, policy })).await;
    let begun =
        |path: &str| format!("POST {path} HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n");

    let malformed = raw(proxy.address, format!("{}nonsense\r\n", begun("/malformed"))).await;
    assert!(malformed.starts_with("HTTP/1.1 400") && malformed.contains("x-sluice-response-flag: DPE"), "{malformed}");

    let mut gone = TcpStream::connect(proxy.address).await.unwrap();
    gone.write_all(begun("/gone").as_bytes()).await.unwrap();
    // Of the first one the application may have seen nothing.
    while soon("the request", reaches.recv()).await.unwrap() != "/gone" {}
    drop(gone);
    let aborts = || proxy.metric("sluice_client_aborts_total{listener=\"shop/cart:80\"}");
    eventually("its end", || aborts() == 1).await;
    assert_eq!((proxy.counted("a", "4xx", ""), proxy.counted("a", "5xx", "")), (1, 0));

    assert_eq!(Http1::connect(proxy.address).await.get("/next").await.body, "ok");
    assert_eq!(reaches.try_recv().unwrap(), "/next");
}

#[tokio::test]
async fn what_http2_cannot_say_is_refused() {
    let app = App::named("a").await;
    let proxy = proxy_to(UpstreamProtocol::Http2, app.address).await;
    let nobody = raw(proxy.address, "GET / HTTP/1.1\r\nhost:\r\n\r\n").await;
    assert!(nobody.starts_with("HTTP/1.1 400") && nobody.contains("x-sluice-response-flag: DPE"), "{nobody}");
    let outcomes = || proxy.outcomes("a", Duration::from_millis(1));
    let before = outcomes();
    let upgrade = "GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nGET / HTTP/1.1\r\nhost: a\r\n\r\n";
    let refused = raw(proxy.address, upgrade).await;
    assert!(refused.starts_with("HTTP/1.1 501") && refused.contains("x-sluice-response-flag: UPE"), "{refused}");
    assert_eq!(refused.matches("HTTP/1.1 ").count(), 1, "{refused}");
    assert_eq!(app.requests(), 0);
    assert_eq!(proxy.counted("a", "5xx", ""), 0, "no version has seen it");
    assert_eq!(outcomes(), before);
}

/// What has no content is over with its head, whatever comes behind.
#[tokio::test]
async fn an_answer_without_content_is_whole_though_its_end_comes_later() {
    for length in ["0", "7"] {
        let app = App::start(own_ip(), 8080, move |_| async move {
            let body = StreamBody::new(tokio_stream::empty::<Result<Frame<Bytes>, std::convert::Infallible>>());
            let body: AnyBody = BodyExt::boxed(body.map_err(|never| match never {}));
            Response::builder().header("content-length", length).body(body).unwrap()
        })
        .await;
        let proxy = proxy_to(UpstreamProtocol::Http2, app.address).await;
        let method = if length == "0" { "GET" } else { "HEAD" };
        let said = raw(proxy.address, &format!("{method} / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")).await;
        assert!(said.starts_with("HTTP/1.1 200") && said.contains(&format!("content-length: {length}\r\n")), "{said}");
        eventually("it is counted", || proxy.counted("a", "2xx", "") == 1).await;
        assert_eq!(proxy.metric("sluice_client_aborts_total{listener=\"shop/cart:80\"}"), 0);
    }
}

#[tokio::test]
async fn websocket_passes_where_the_cluster_names_http1() {
    let app = websocket_echo(own_ip()).await;
    let proxy = proxy_to(UpstreamProtocol::Http1, app.address).await;
    let mut stream = websocket(proxy.address).await;
    stream.write_all(b"hello").await.unwrap();
    let mut echoed = [0; 5];
    soon("an echo", stream.read_exact(&mut echoed)).await.unwrap();
    assert_eq!(&echoed, b"hello");
}

#[tokio::test]
async fn requests_are_sent_again_between_the_protocols() {
    for protocol in [UpstreamProtocol::Http1, UpstreamProtocol::Http2] {
        let failing = App::start(own_ip(), 8080, |request| async {
            let _ = request.into_body().collect().await;
            Response::builder().status(503).body(full("")).unwrap()
        })
        .await;
        let echo = App::start(own_ip(), 8080, |request| async {
            Response::new(full(request.into_body().collect().await.unwrap().to_bytes()))
        })
        .await;
        let dead = SocketAddr::new(own_ip(), 9);
        let retry = RetryPolicy { on: vec![RetryOn::GatewayError], retries: 3, per_try_timeout: None };
        let policy = Arc::new(Policy { retry: Some(retry), ..Policy::default() });
        let split = split([(speaking(protocol, &[failing.address, echo.address, dead]), 100)]);
        let proxy = Proxy::start(Role::Fleet);
        proxy.serve(Protocol::http(Action::Forward { split, policy })).await;
        for _ in 0..10 {
            let mut http2 = Http2::connect(proxy.address).await;
            let answer = http2.send(to(Method::POST, "/").body(frames(&["he", "llo"], &[])).unwrap()).await.unwrap();
            assert_eq!((answer.status, answer.body.as_str()), (StatusCode::OK, "hello"), "{protocol:?}");
            let mut http1 = Http1::connect(proxy.address).await;
            let answer = http1.send(post("/", "hello")).await.unwrap();
            assert_eq!((answer.status, answer.body.as_str()), (StatusCode::OK, "hello"), "{protocol:?}");
        }
        assert!(failing.requests() > 0, "{protocol:?}");
    }
}

#[tokio::test]
async fn a_sidecar_without_its_application_costs_no_request_on_either_wire() {
    let ca = Ca::new();
    let (dead, live) = (own_ip(), own_ip());
    let (first, second) = (sidecar(&ca, dead, false).await, sidecar(&ca, live, false).await);
    let app =
        App::start(live, 8080, |request| async move { Response::new(full(format!("{:?}", request.version()))) }).await;
    for (protocol, version) in [(UpstreamProtocol::Http1, "HTTP/1.1"), (UpstreamProtocol::Http2, "HTTP/2.0")] {
        let fleet = Proxy::with(Role::Fleet, ca.identity(FLEET), |_| {});
        let cluster = Cluster { protocol, ..mesh_cluster("abc", &[&first, &second]) };
        fleet.serve(http_to([(cluster, 100)])).await;
        let (mut http1, mut http2) = (Http1::connect(fleet.address).await, Http2::connect(fleet.address).await);
        for _ in 0..10 {
            assert_eq!(http1.send(post("/", "hello")).await.unwrap().body, version);
            let request = to(Method::POST, "/").body(full("hello")).unwrap();
            assert_eq!(http2.send(request).await.unwrap().body, version);
        }
    }
    assert_eq!(app.requests(), 40);
}

#[tokio::test]
async fn a_copy_is_said_in_the_protocol_of_its_own_cluster() {
    let ((own, own_seen), (mirror, mirror_seen)) = (app().await, app().await);
    for (protocol, version) in [(UpstreamProtocol::Http1, Version::HTTP_11), (UpstreamProtocol::Http2, Version::HTTP_2)]
    {
        let copies = Cluster { protocol, ..cluster("m", &[mirror.address]) };
        let mut split = split([(cluster("a", &[own.address]), 100)]);
        split.mirrors = vec![Mirror { cluster: Arc::new(copies), share: Share::ALL, marks_host: true }];
        let proxy = Proxy::start(Role::Fleet);
        proxy.serve(Protocol::http(Action::Forward { split, policy: Arc::default() })).await;
        let (mut http1, mut http2) = (Http1::connect(proxy.address).await, Http2::connect(proxy.address).await);
        http1.send(post("/", "hello")).await.unwrap();
        http2.send(to(Method::POST, "/").body(frames(&["hello"], &[])).unwrap()).await.unwrap();
        eventually("two copies", || mirror_seen.lock().unwrap().len() == 2).await;
        let versions: Vec<_> = own_seen.lock().unwrap().drain(..).map(|seen| seen.0).collect();
        assert_eq!(versions, [Version::HTTP_11, Version::HTTP_2]);
        let mut hosts = Vec::new();
        for (copied, target, headers, body, _) in mirror_seen.lock().unwrap().drain(..) {
            assert_eq!((copied, &body[..]), (version, &b"hello"[..]));
            let host = headers.get("host").map(|host| host.to_str().unwrap().to_owned());
            hosts.push(host.unwrap_or_else(|| target.parse::<http::Uri>().unwrap().authority().unwrap().to_string()));
        }
        hosts.sort();
        assert_eq!(hosts, ["cart.shop-shadow", "cart.shop-shadow:8080"]);
    }
}
