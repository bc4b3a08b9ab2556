//! What a client may say in HTTP/1.1, byte for byte, what it may not, and what it gets.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::atomic::Ordering::SeqCst,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use sluice_proxy::{
    snapshot::{Action, Protocol},
    workers::{Options, Role},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::support::*;

const ABORTS: &str = "sluice_client_aborts_total{listener=\"shop/cart:80\"}";
const MALFORMED: &str = "sluice_local_errors_total{listener=\"shop/cart:80\",flag=\"DPE\"}";
const OPEN: &str = "sluice_connections_open{listener=\"shop/cart:80\"}";

/// Answers with what it got: method, target and content.
async fn mirror() -> App {
    App::start(own_ip(), 8080, |request| async move {
        let (method, uri) = (request.method().clone(), request.uri().clone());
        let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        Response::new(full(format!("{method} {uri} {}", String::from_utf8_lossy(&body))))
    })
    .await
}

async fn proxy_to(app: &App, change: impl FnOnce(&mut Options)) -> Proxy {
    let proxy = Proxy::with(Role::Fleet, Default::default(), change);
    proxy.serve(http_to([(cluster("a", &[app.address]), 100)])).await;
    proxy
}

async fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// Sends bytes on a new connection and reads all that comes until the other side closes, in order.
pub(crate) async fn raw(address: SocketAddr, request: impl AsRef<[u8]>) -> String {
    let mut stream = connect(address).await;
    stream.write_all(request.as_ref()).await.unwrap();
    let mut answer = Vec::new();
    soon("the close", stream.read_to_end(&mut answer)).await.unwrap();
    String::from_utf8(answer).unwrap()
}

/// Reads one answer with a Content-Length.
async fn answer(stream: &mut TcpStream) -> (String, String) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(soon("an answer", stream.read_u8()).await.unwrap());
    }
    let head = String::from_utf8(head).unwrap();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap_or("0");
    let mut body = vec![0; length.parse().unwrap()];
    soon("the body", stream.read_exact(&mut body)).await.unwrap();
    (head, String::from_utf8(body).unwrap())
}

#[tokio::test]
async fn what_is_no_request_is_refused_counted_and_never_seen_by_the_application() {
    let app = mirror().await;
    let proxy = proxy_to(&app, |_| {}).await;
    let post = |lines: &str| format!("POST / HTTP/1.1\r\nhost: a\r\n{lines}\r\n\r\n");
    let table = [
        ("GARBAGE\r\n\r\n".into(), 400, "first_line"),
        ("GET / HTTP/1.1\r\n\r\n".into(), 400, "host"),
        ("GET  / HTTP/1.1\r\nhost: a\r\n\r\n".into(), 400, "first_line"),
        ("GET /a b HTTP/1.1\r\nhost: a\r\n\r\n".into(), 400, "version"),
        ("GET / HTTP/3.0\r\nhost: a\r\n\r\n".into(), 400, "version"),
        ("GET a:80 HTTP/1.1\r\nhost: a\r\n\r\n".into(), 400, "target"),
        ("GET * HTTP/1.1\r\nhost: a\r\n\r\n".into(), 400, "target"),
        ("GET / HTTP/1.1\rhost: a\r\n\r\n".into(), 400, "line_ending"),
        ("GET / HTTP/1.1\nhost: a\n\n".into(), 400, "line_ending"),
        ("GET / HTTP/1.1\r\nhost: a\r\n\n".into(), 400, "line_ending"),
        ("GET / HTTP/1.1\r\nhost: a\r\nx: y\nz: z\r\n\r\n".into(), 400, "line_ending"),
        ("GET / HTTP/1.1\r\nhost: a\r\nx: a\rb\r\n\r\n".into(), 400, "header_value"),
        ("GET / HTTP/1.1\r\nhost: a\r\nx: a\0b\r\n\r\n".into(), 400, "header_value"),
        ("GET / HTTP/1.1\r\nhost: a\r\nx: y\r\n folded\r\n\r\n".into(), 400, "header_name"),
        ("GET / HTTP/1.1\r\n host: a\r\n\r\n".into(), 400, "header_name"),
        ("GET / HTTP/1.1\r\nhost : a\r\n\r\n".into(), 400, "header_name"),
        ("GET / HTTP/1.1\r\nhost: a\r\nx(y: z\r\n\r\n".into(), 400, "header_name"),
        ("GET / HTTP/1.1\r\nhost: a\r\n: z\r\n\r\n".into(), 400, "header_name"),
        (post("content-length: 5\r\ncontent-length: 6"), 400, "content_length"),
        (post("content-length: 5, 5"), 400, "content_length"),
        (post("content-length: +5"), 400, "content_length"),
        (post("content-length: 5x"), 400, "content_length"),
        (post("content-length: 18446744073709551616"), 400, "content_length"),
        (post("content-length:"), 400, "content_length"),
        (post("content-length: 5\r\ntransfer-encoding: chunked"), 400, "two_lengths"),
        (post("transfer-encoding: chunked\r\ncontent-length: 0"), 400, "two_lengths"),
        (post("transfer-encoding: chunked, gzip"), 400, "transfer_encoding"),
        (post("transfer-encoding: xchunked"), 400, "transfer_encoding"),
        (post("transfer-encoding:"), 400, "transfer_encoding"),
        (post("transfer-encoding: gzip, chunked"), 501, "transfer_coding"),
        (post("transfer-encoding: chunked\r\ntransfer-encoding: chunked"), 501, "transfer_coding"),
        ("POST / HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n".into(), 400, "transfer_encoding"),
        (post(&"x: y\r\n".repeat(101)), 431, "head_too_large"),
        (post(&format!("x: {}", "y".repeat(70_000))), 431, "head_too_large"),
        (format!("GET /{} HTTP/1.1\r\nhost: a\r\n\r\n", "x".repeat(40_000)), 414, "target_too_long"),
        (format!("GET /{}", "x".repeat(70_000)), 414, "target_too_long"),
    ];
    let (mut reasons, mut elsewhere) = (BTreeMap::new(), Vec::new());
    for (index, (request, status, reason)) in table.iter().enumerate() {
        let what = &request[..request.len().min(80)];
        // What is behind it is not looked at.
        let answer = raw(proxy.address, format!("{request}GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n")).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{what:?} got {answer:?}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{what:?} got {answer:?}");
        let said = ["x-sluice-response-flag: DPE\r\n", "connection: close\r\n", "\r\ndate: ", "\r\n\r\nthe request"];
        assert!(said.iter().all(|line| answer.contains(line)), "{what:?} got {answer:?}");
        assert_eq!(proxy.metric(MALFORMED), u64::try_from(index).unwrap() + 1, "{what:?}");
        let before = reasons.insert(*reason, proxy.refused(reason)).unwrap_or_default();
        if proxy.refused(reason) != before + 1 {
            elsewhere.push((what, reason));
        }
    }
    assert!(elsewhere.is_empty(), "counted for another reason: {elsewhere:?}");
    assert_eq!(app.requests(), 0);
}

#[tokio::test]
async fn a_body_that_breaks_the_rules_is_refused_and_never_ends_well_upstream() {
    let app = mirror().await;
    let proxy = proxy_to(&app, |_| {}).await;
    let trailer = "x: y\r\n".repeat(4000);
    let extensions = format!("1;{}\r\nx\r\n", "y".repeat(1000)).repeat(20);
    let table: [&str; 9] = [
        "x\r\n",
        "-1\r\n",
        "5\nhello\r\n0\r\n\r\n",
        "5\r\nhello!\r\n0\r\n\r\n",
        "5\r\nhello\n0\r\n\r\n",
        "ffffffffffffffffff\r\n",
        "0\r\nno colon\r\n\r\n",
        &format!("0\r\n{trailer}\r\n"),
        &extensions,
    ];
    for (index, body) in table.iter().enumerate() {
        let head = "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n";
        let answer = raw(proxy.address, format!("{head}{body}GET / HTTP/1.1\r\nhost: a\r\n\r\n")).await;
        let what = &body[..body.len().min(40)];
        assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("connection: close"), "{what:?} got {answer:?}");
        assert_eq!(proxy.metric(MALFORMED), u64::try_from(index).unwrap() + 1, "{what:?}");
    }
    assert_eq!((proxy.refused("chunk"), proxy.refused("trailers")), (7, 2));
}

#[tokio::test]
async fn a_refusal_waits_for_no_more_of_its_request_and_keeps_the_connection_where_all_of_it_has_come() {
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(Protocol::http(Action::Respond(StatusCode::SERVICE_UNAVAILABLE))).await;
    let begin = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n4\r\nbody\r\n";
    let mut kept = connect(proxy.address).await;
    for _ in 0..3 {
        kept.write_all(&[&begin[..], b"0\r\n\r\n"].concat()).await.unwrap();
        let (head, _) = answer(&mut kept).await;
        assert!(head.starts_with("HTTP/1.1 503 ") && !head.contains("connection: close"), "{head}");
    }
    // Each that waited would take a second; one that does not may do so on a machine that is busy.
    let mut took = Vec::new();
    while took.iter().all(|took| *took >= Duration::from_millis(900)) {
        assert!(took.len() < 5, "{took:?}");
        let mut stream = connect(proxy.address).await;
        let begun = Instant::now();
        stream.write_all(begin).await.unwrap();
        let (head, _) = answer(&mut stream).await;
        took.push(begun.elapsed());
        assert!(head.starts_with("HTTP/1.1 503 ") && head.contains("connection: close"), "{head}");
        // What comes now is thrown away, and resets nothing.
        stream.write_all(b"4\r\nmore\r\n0\r\n\r\nGET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        assert_eq!(soon("the close", stream.read(&mut [0])).await.unwrap(), 0);
    }
}

#[tokio::test]
async fn requests_of_all_forms_pass_and_their_connections_are_kept_where_they_may_be() {
    let app = mirror().await;
    let proxy = proxy_to(&app, |_| {}).await;
    let table = [
        ("GET /x?y=1 HTTP/1.1\r\nhost: a\r\n\r\n", "GET /x?y=1 ", true),
        ("\r\n\r\nGET / HTTP/1.1\r\nhost: a\r\n\r\n", "GET / ", true),
        ("GET http://b/x HTTP/1.1\r\nhost: a\r\n\r\n", "GET /x ", true),
        ("OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n", "OPTIONS * ", true),
        ("PATCH / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhello", "PATCH / hello", true),
        ("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ncontent-length: 5\r\n\r\nhello", "POST / hello", true),
        (
            "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: Chunked\r\n\r\n3;x=y\r\nhel\r\n2\r\nlo\r\n0\r\nx: y\r\n\r\n",
            "POST / hello",
            true,
        ),
        ("GET / HTTP/1.1\r\nhost: a\r\nconnection: x, Close\r\n\r\n", "GET / ", false),
        ("GET / HTTP/1.0\r\n\r\n", "GET / ", false),
        ("GET / HTTP/1.0\r\nconnection: Keep-Alive\r\n\r\n", "GET / ", true),
        ("POST / HTTP/1.0\r\ncontent-length: 5\r\n\r\nhello", "POST / hello", false),
    ];
    for (request, body, kept) in table {
        // Whole and byte by byte.
        for pause in [false, true] {
            let mut stream = connect(proxy.address).await;
            if pause {
                for byte in request.bytes() {
                    stream.write_all(&[byte]).await.unwrap();
                    tokio::task::yield_now().await;
                }
            } else {
                stream.write_all(request.as_bytes()).await.unwrap();
            }
            let (head, got) = answer(&mut stream).await;
            assert!(head.contains(" 200 OK\r\n") && head.contains("\r\ndate: "), "{request:?} got {head:?}");
            assert_eq!(got, body, "{request:?}");
            let old = request.contains("HTTP/1.0");
            assert_eq!(head.starts_with("HTTP/1.0"), old, "{head}");
            assert_eq!(head.contains("connection: close"), !kept && !old, "{request:?} got {head:?}");
            assert_eq!(head.contains("connection: keep-alive"), kept && old, "{request:?} got {head:?}");
            if kept {
                stream.write_all(b"GET /next HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
                assert_eq!(answer(&mut stream).await.1, "GET /next ");
            } else {
                assert_eq!(soon("the close", stream.read(&mut [0])).await.unwrap(), 0);
            }
        }
    }
    assert_eq!(proxy.metric(MALFORMED), 0);
}

#[tokio::test]
async fn requests_sent_ahead_are_answered_in_their_order() {
    let app = mirror().await;
    let proxy = proxy_to(&app, |_| {}).await;
    let mut stream = connect(proxy.address).await;
    let mut requests = String::new();
    for number in 0..200 {
        requests.push_str(&match number % 3 {
            0 => format!("GET /{number} HTTP/1.1\r\nhost: a\r\n\r\n"),
            1 => format!("POST /{number} HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nbody"),
            _ => format!(
                "POST /{number} HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n"
            ),
        });
    }
    stream.write_all(requests.as_bytes()).await.unwrap();
    for number in 0..200 {
        let (_, body) = answer(&mut stream).await;
        let expected = if number % 3 == 0 { format!("GET /{number} ") } else { format!("POST /{number} body") };
        assert_eq!(body, expected);
    }
    assert_eq!(app.requests(), 200);
}

#[tokio::test]
async fn answers_without_a_body_have_none_and_keep_what_they_say_of_one() {
    let app = App::start(own_ip(), 8080, |request| async move {
        let status = request.uri().path()[1..].parse().unwrap_or(200);
        Response::builder().status(status).header("x-app", "1").body(full("")).unwrap()
    })
    .await;
    let proxy = proxy_to(&app, |_| {}).await;
    let mut stream = connect(proxy.address).await;
    for (request, status, length) in [("GET /204", 204, false), ("GET /304", 304, false), ("GET /200", 200, true)] {
        stream.write_all(format!("{request} HTTP/1.1\r\nhost: a\r\n\r\n").as_bytes()).await.unwrap();
        let (head, _) = answer(&mut stream).await;
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{head}");
        assert_eq!(head.contains("content-length: 0\r\n"), length, "{head}");
        assert!(!head.contains("transfer-encoding"), "{head}");
    }
    // An error of ours to a HEAD.
    proxy.serve(http_to([(cluster("a", &[]), 100)])).await;
    stream.write_all(b"HEAD / HTTP/1.1\r\nhost: a\r\n\r\nHEAD /2 HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    for _ in 0..2 {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(soon("an answer", stream.read_u8()).await.unwrap());
        }
        assert!(head.starts_with(b"HTTP/1.1 503 "), "{}", String::from_utf8_lossy(&head));
    }
}

#[tokio::test]
async fn an_answer_of_unknown_length_ends_with_the_connection_of_an_old_client() {
    let app = App::start(own_ip(), 8080, |_| async {
        let frames = futures::stream::iter(["hel", "lo"].map(|part| Ok(Frame::data(Bytes::from(part)))));
        Response::new(StreamBody::new(frames).boxed())
    })
    .await;
    let proxy = proxy_to(&app, |_| {}).await;
    let answer = raw(proxy.address, "GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.0 200 OK\r\n") && answer.ends_with("\r\n\r\nhello"), "{answer}");
    assert!(!answer.contains("keep-alive") && !answer.contains("chunked"), "{answer}");
    let answer = raw(proxy.address, "GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
    assert!(answer.contains("transfer-encoding: chunked\r\n") && answer.ends_with("\r\n0\r\n\r\n"), "{answer}");
}

#[tokio::test]
async fn a_client_that_waits_for_100_in_vain_is_told_once_and_its_connection_ends() {
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(cluster("a", &[]), 100)])).await;
    let head = "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\nexpect: 100-continue\r\n\r\n";
    let answer = raw(proxy.address, head).await;
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("connection: close\r\n"), "{answer}");
}

#[tokio::test]
async fn an_error_is_not_lost_to_a_client_that_goes_on_sending() {
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(cluster("a", &[]), 100)])).await;
    for head in ["POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4000000\r\n\r\n", "GARBAGE\r\n\r\n"] {
        for _ in 0..5 {
            let mut stream = connect(proxy.address).await;
            stream.write_all(head.as_bytes()).await.unwrap();
            // All of it, before it reads.
            soon("the request", stream.write_all(&vec![b'x'; 4_000_000])).await.unwrap();
            let mut answer = Vec::new();
            soon("the close", stream.read_to_end(&mut answer)).await.unwrap();
            let answer = String::from_utf8(answer).unwrap();
            assert!(answer.starts_with("HTTP/1.1 ") && answer.contains("connection: close\r\n"), "{answer}");
        }
    }
    eventually("the end of all", || proxy.metric(OPEN) == 0).await;
}

#[tokio::test]
async fn a_client_that_goes_while_its_answer_is_awaited_ends_the_request_upstream() {
    let listener = TcpListener::bind((own_ip(), 8080)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(cluster("a", &[address]), 100)])).await;
    for (round, request) in
        ["GET / HTTP/1.1\r\nhost: a\r\n\r\n", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nbody"]
            .into_iter()
            .enumerate()
    {
        let mut client = connect(proxy.address).await;
        client.write_all(request.as_bytes()).await.unwrap();
        let (mut upstream, _) = soon("the connection", listener.accept()).await.unwrap();
        soon("the request", upstream.read_u8()).await.unwrap();
        drop(client);
        soon("the close", upstream.read_to_end(&mut Vec::new())).await.unwrap();
        eventually("the abort", || proxy.metric(ABORTS) == u64::try_from(round).unwrap() + 1).await;
    }
    eventually("the end of all", || proxy.metric(OPEN) == 0).await;
    assert_eq!(proxy.counted("a", "5xx", ""), 0);
}

#[tokio::test]
async fn what_one_side_does_not_take_the_other_does_not_send() {
    const LOTS: usize = 256 * 1024 * 1024;
    // Neither reads the other's body.
    let listener = TcpListener::bind((own_ip(), 8080)).await.unwrap();
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(cluster("a", &[listener.local_addr().unwrap()]), 100)])).await;
    let flood = |mut stream: tokio::net::tcp::OwnedWriteHalf| async move {
        let (sent, chunk) = (std::sync::atomic::AtomicUsize::new(0), vec![b'x'; 64 * 1024]);
        // Until no more is taken for a while.
        while let Ok(Ok(written)) = tokio::time::timeout(Duration::from_millis(500), stream.write(&chunk)).await {
            assert!(sent.fetch_add(written, SeqCst) < LOTS / 2, "all of it is taken");
        }
        (stream, sent.load(SeqCst))
    };
    let mut client = connect(proxy.address).await;
    client.write_all(format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {LOTS}\r\n\r\n").as_bytes()).await.unwrap();
    let (mut upstream, _) = soon("the connection", listener.accept()).await.unwrap();
    soon("the request", upstream.read_u8()).await.unwrap();
    let (client_read, client_write) = client.into_split();
    let (client_write, sent) = soon("the stop", flood(client_write)).await;
    assert!(sent > 0);
    // The other way round, while the request is stuck.
    upstream.write_all(format!("HTTP/1.1 200 OK\r\ncontent-length: {LOTS}\r\n\r\n").as_bytes()).await.unwrap();
    let (upstream_read, upstream_write) = upstream.into_split();
    let (upstream_write, sent) = soon("the stop", flood(upstream_write)).await;
    assert!(sent > 0);
    drop((client_read, client_write, upstream_read, upstream_write));
}

#[tokio::test]
async fn bytes_behind_a_request_to_switch_are_the_tunnel_s() {
    let listener = TcpListener::bind((own_ip(), 8080)).await.unwrap();
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(cluster("a", &[listener.local_addr().unwrap()]), 100)])).await;
    let mut client = connect(proxy.address).await;
    let request = "GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nearly";
    client.write_all(request.as_bytes()).await.unwrap();
    let (mut upstream, _) = soon("the connection", listener.accept()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(soon("the request", upstream.read_u8()).await.unwrap());
    }
    let switch = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
    upstream.write_all(switch).await.unwrap();
    let mut early = [0; 5];
    soon("what was sent early", upstream.read_exact(&mut early)).await.unwrap();
    assert_eq!(&early, b"early");
    assert_eq!(proxy.metric(OPEN), 1);
    drop((client, upstream));
    eventually("the end of the tunnel", || proxy.metric(OPEN) == 0).await;
}

/// The time of a head begins when it is awaited, not with the one before it.
#[tokio::test]
async fn a_head_that_begins_while_another_request_is_served_has_its_own_time() {
    const HEADER: Duration = Duration::from_secs(1);
    let (app, go) = gated().await;
    let proxy = proxy_to(&app, |options: &mut Options| options.timing.header = HEADER).await;
    let mut stream = connect(proxy.address).await;
    let (first, rest) = ("GET / HT", "TP/1.1\r\nhost: a\r\n\r\n");
    stream.write_all(first.as_bytes()).await.unwrap();
    // So that it is seen in two parts.
    eventually("the first part", || proxy.metric(OPEN) == 1).await;
    let begun = Instant::now();
    stream.write_all(rest.as_bytes()).await.unwrap();
    eventually("the request", || app.requests() == 1).await;
    stream.write_all(first.as_bytes()).await.unwrap();
    eventually("more than a head may take", || begun.elapsed() > HEADER + HEADER / 4).await;
    go.add_permits(2);
    answer(&mut stream).await;
    stream.write_all(rest.as_bytes()).await.unwrap();
    answer(&mut stream).await;
    assert_eq!(proxy.refused("head_timeout"), 0);
}

#[tokio::test]
async fn an_idle_connection_is_closed_in_its_time_and_a_half_sent_head_in_its() {
    let app = mirror().await;
    let quick = |idle: u64, header: u64| {
        move |options: &mut Options| {
            options.timing.downstream_idle = Some(Duration::from_millis(idle));
            options.timing.header = Duration::from_millis(header);
        }
    };
    let next = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";
    // (idle time, header time, what is sent after an answer, how long that lasts at least)
    for (idle, header, sent, least) in
        [(150, 10_000, "", 150), (10_000, 150, "GET / HT", 150), (150, 10_000, "\r\n", 150)]
    {
        let proxy = proxy_to(&app, quick(idle, header)).await;
        let mut stream = connect(proxy.address).await;
        // Before the proxy's clock begins, which is before the client has its answer.
        let started = Instant::now();
        stream.write_all(next).await.unwrap();
        answer(&mut stream).await;
        stream.write_all(sent.as_bytes()).await.unwrap();
        assert_eq!(soon("the close", stream.read(&mut [0])).await.unwrap(), 0);
        assert!(started.elapsed() >= Duration::from_millis(least), "{sent:?} after {:?}", started.elapsed());
        assert!(started.elapsed() < Duration::from_secs(8), "{sent:?} after {:?}", started.elapsed());
    }
}
