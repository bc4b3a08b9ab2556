//! What an upstream may say in HTTP/1.1, byte for byte, and what it may not.

use std::{
    future::Future,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use sluice_proxy::workers::Role;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::sleep,
};

use crate::support::*;

/// A server that does as told with each connection, and counts them.
pub(crate) async fn upstream<F, Fut>(handle: F) -> (SocketAddr, Arc<AtomicUsize>)
where
    F: Fn(TcpStream) -> Fut + Send + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind((own_ip(), 8080)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let connections = Arc::new(AtomicUsize::new(0));
    let count = connections.clone();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            count.fetch_add(1, SeqCst);
            tokio::spawn(handle(stream));
        }
    });
    (address, connections)
}

/// Reads a head. `None` at the end of the connection.
pub(crate) async fn head(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    Some(String::from_utf8(head).unwrap())
}

/// Answers each request with these bytes, and closes with the last one if `close`.
pub(crate) async fn answers(bytes: &'static [u8], close: bool) -> (SocketAddr, Arc<AtomicUsize>) {
    upstream(move |mut stream| async move {
        while head(&mut stream).await.is_some() {
            stream.write_all(bytes).await.unwrap();
            if close {
                return;
            }
        }
    })
    .await
}

async fn proxy_to(address: SocketAddr) -> Proxy {
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(cluster("a", &[address]), 100)])).await;
    proxy
}

#[tokio::test]
async fn answers_of_all_forms_pass_and_their_connections_are_kept_where_they_may_be() {
    let table: [(&[u8], bool, &str, bool); 9] = [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", false, "ok", true),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 2\r\n\r\nok", false, "ok", true),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok", false, "ok", false),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\no\r\n1;x=y\r\nk\r\n0\r\n\r\n", false, "ok", true),
        (b"HTTP/1.1 200 OK\r\n\r\nok", true, "ok", false),
        (b"HTTP/1.0 200 OK\r\n\r\nok", true, "ok", false),
        (b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\nok", false, "ok", true),
        (
            b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
            false,
            "",
            true,
        ),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", false, "ok", true),
    ];
    for (bytes, close, body, kept) in table {
        let (address, connections) = answers(bytes, close).await;
        let proxy = proxy_to(address).await;
        let mut client = Http1::connect(proxy.address).await;
        for _ in 0..3 {
            let answer = client.get("/").await;
            let what = String::from_utf8_lossy(bytes);
            assert_eq!((answer.status, answer.body.as_str()), (StatusCode::OK, body), "{what}");
            assert!(answer.headers.get_all("content-length").iter().count() < 2);
            assert!(!answer.headers.contains_key("link"));
        }
        assert_eq!(connections.load(SeqCst), if kept { 1 } else { 3 }, "{:?}", String::from_utf8_lossy(bytes));
    }
}

#[tokio::test]
async fn answers_without_a_body_have_none_whatever_their_length_says() {
    let (address, connections) = upstream(|mut stream| async move {
        while let Some(head) = head(&mut stream).await {
            let status = if head.starts_with("HEAD") { "200 OK" } else { "304 Not Modified" };
            let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 7\r\n\r\n");
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    })
    .await;
    let proxy = proxy_to(address).await;
    let mut client = Http1::connect(proxy.address).await;
    for method in [Method::HEAD, Method::GET, Method::HEAD] {
        let mut request = get("/");
        *request.method_mut() = method.clone();
        let answer = client.send(request).await.unwrap();
        assert_eq!((answer.status.is_success(), answer.body.as_str()), (method == Method::HEAD, ""));
        if method == Method::HEAD {
            assert_eq!(answer.header("content-length"), "7");
        }
    }
    assert_eq!(connections.load(SeqCst), 1);
}

#[tokio::test]
async fn answers_that_could_be_read_in_two_ways_are_refused_and_their_connections_closed() {
    let table: [&[u8]; 9] = [
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ncontent-length: +2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: y\r\n content-length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ncontent-length : 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nx: y\0\r\ncontent-length: 2\r\n\r\nok",
        b"220 mail.example.org ESMTP\r\n\r\n",
    ];
    for bytes in table {
        let (address, connections) = answers(bytes, false).await;
        let proxy = proxy_to(address).await;
        let mut client = Http1::connect(proxy.address).await;
        for round in 1..=2 {
            let answer = client.get("/").await;
            let seen = (answer.status.as_u16(), answer.header("x-sluice-response-flag"));
            assert_eq!(seen, (502, "UPE"), "{}", String::from_utf8_lossy(bytes));
            assert_eq!(connections.load(SeqCst), round);
        }
        assert_eq!(proxy.counted("a", "5xx", ""), 2);
    }
}

#[tokio::test]
async fn a_body_that_breaks_the_rules_or_off_is_never_passed_on_as_whole() {
    let table: [&[u8]; 4] = [
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\nx\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nokay\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nok",
    ];
    for bytes in table {
        let (address, _) = answers(bytes, true).await;
        let proxy = proxy_to(address).await;
        let result = Http1::connect(proxy.address).await.send(get("/")).await;
        assert!(result.is_err(), "{}", String::from_utf8_lossy(bytes));
        eventually("the count", || proxy.counted("a", "5xx", "") == 1).await;
    }
}

#[tokio::test]
async fn bytes_that_nobody_asked_for_do_not_answer_the_next_request() {
    // With the answer, and later on the idle connection.
    for late in [false, true] {
        let (address, connections) = upstream(move |mut stream| async move {
            while head(&mut stream).await.is_some() {
                let mine = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nmine".as_slice();
                let evil = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil".as_slice();
                if late {
                    stream.write_all(mine).await.unwrap();
                    sleep(Duration::from_millis(20)).await;
                    let _ = stream.write_all(evil).await;
                } else {
                    stream.write_all(&[mine, evil].concat()).await.unwrap();
                }
            }
        })
        .await;
        let proxy = proxy_to(address).await;
        let mut client = Http1::connect(proxy.address).await;
        for round in 1..=3 {
            assert_eq!(client.get("/").await.body, "mine");
            assert_eq!(connections.load(SeqCst), round);
            if late {
                sleep(Duration::from_millis(60)).await;
            }
        }
        assert_eq!(proxy.counted("a", "2xx", ""), 3);
    }
}

#[tokio::test]
async fn an_answer_before_the_end_of_its_request_is_passed_on_and_the_rest_is_still_sent() {
    let (sent, received) = tokio::sync::mpsc::channel(4);
    let (address, connections) = upstream(move |mut stream| {
        let sent = sent.clone();
        async move {
            while let Some(head) = head(&mut stream).await {
                assert!(head.contains("transfer-encoding: chunked"), "{head}");
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nearly").await.unwrap();
                let mut body = Vec::new();
                while !body.ends_with(b"0\r\n\r\n") {
                    let Ok(byte) = stream.read_u8().await else { return };
                    body.push(byte);
                }
                sent.send(String::from_utf8(body).unwrap()).await.unwrap();
            }
        }
    })
    .await;
    let mut received = received;
    let proxy = proxy_to(address).await;
    for round in 1..=2 {
        // By hand: a client of hyper ends its request with the answer.
        let mut stream = TcpStream::connect(proxy.address).await.unwrap();
        let head = "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"early") {
            answer.push(soon("the answer", stream.read_u8()).await.unwrap());
        }
        stream.write_all(b"6\r\nsecond\r\n0\r\n\r\n").await.unwrap();
        let body = soon("the rest of the request", received.recv()).await.unwrap();
        assert!(body.contains("first") && body.contains("second"), "{body}");
        assert_eq!(connections.load(SeqCst), round, "a connection was used again whose request had not ended");
    }
    assert_eq!(proxy.counted("a", "2xx", ""), 2);
}

#[tokio::test]
async fn a_client_that_reads_only_when_it_has_sent_all_is_no_deadlock() {
    const SIZE: usize = 8 * 1024 * 1024;
    // The answer, which fills all buffers, does not wait for the request; nor the other way round.
    let (address, _) = upstream(|mut stream| async move {
        head(&mut stream).await.unwrap();
        let (mut read, mut write) = stream.into_split();
        let answer = tokio::spawn(async move {
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {SIZE}\r\n\r\n");
            write.write_all(head.as_bytes()).await.unwrap();
            write.write_all(&vec![b'x'; SIZE]).await.unwrap();
            write
        });
        let mut request = vec![0; SIZE];
        read.read_exact(&mut request).await.unwrap();
        assert!(request.iter().all(|byte| *byte == b'y'));
        let _write = answer.await.unwrap();
    })
    .await;
    let proxy = proxy_to(address).await;
    let mut stream = TcpStream::connect(proxy.address).await.unwrap();
    let head = format!("POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {SIZE}\r\n\r\n");
    soon("the request", async {
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(&vec![b'y'; SIZE]).await.unwrap();
    })
    .await;
    let mut answer = Vec::new();
    soon("the answer", stream.read_to_end(&mut answer)).await.unwrap();
    assert!(answer.len() > SIZE && answer.ends_with(b"xxxx"));
}

#[tokio::test]
async fn a_refusal_of_a_large_request_is_passed_on_though_the_upstream_reads_no_further() {
    let (address, _) = upstream(|mut stream| async move {
        head(&mut stream).await.unwrap();
        let answer = b"HTTP/1.1 413 Content Too Large\r\nconnection: close\r\ncontent-length: 5\r\n\r\nlarge";
        stream.write_all(answer).await.unwrap();
        // Closing with unread bytes resets the connection.
        sleep(Duration::from_millis(50)).await;
    })
    .await;
    let proxy = proxy_to(address).await;
    for _ in 0..5 {
        let mut stream = TcpStream::connect(proxy.address).await.unwrap();
        stream.write_all(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 50000000\r\n\r\n").await.unwrap();
        let (mut read, mut write) = stream.into_split();
        let sending = tokio::spawn(async move { while write.write_all(&[b'x'; 64 * 1024]).await.is_ok() {} });
        let mut answer = Vec::new();
        while !answer.ends_with(b"large") {
            answer.push(soon("the refusal", read.read_u8()).await.unwrap());
        }
        assert!(answer.starts_with(b"HTTP/1.1 413"), "{}", String::from_utf8_lossy(&answer));
        sending.abort();
    }
}

#[tokio::test]
async fn a_request_that_its_client_breaks_off_never_ends_well_upstream() {
    let (seen, mut ends) = tokio::sync::mpsc::channel(4);
    let (address, _) = upstream(move |mut stream| {
        let seen = seen.clone();
        async move {
            let mut all = Vec::new();
            let _ = stream.read_to_end(&mut all).await;
            seen.send(String::from_utf8(all).unwrap()).await.unwrap();
        }
    })
    .await;
    let proxy = proxy_to(address).await;
    for framing in ["content-length: 10\r\n\r\nhello", "transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n"] {
        let mut stream = TcpStream::connect(proxy.address).await.unwrap();
        stream.write_all(format!("POST / HTTP/1.1\r\nhost: a\r\n{framing}").as_bytes()).await.unwrap();
        sleep(Duration::from_millis(30)).await;
        drop(stream);
        let all = soon("the end", ends.recv()).await.unwrap();
        assert!(all.contains("hello") && !all.ends_with("0\r\n\r\n"), "{all}");
    }
    eventually("the aborts", || proxy.metric("sluice_client_aborts_total{listener=\"shop/cart:80\"}") == 2).await;
    assert_eq!(proxy.counted("a", "5xx", ""), 0);
}

#[tokio::test]
async fn a_request_of_unknown_length_keeps_its_body_and_announced_trailers_whatever_its_method() {
    let (address, _) = upstream(|mut stream| async move {
        while let Some(head) = head(&mut stream).await {
            assert!(head.contains("transfer-encoding: chunked\r\n") && !head.contains("\r\ncontent-length"), "{head}");
            let mut body = Vec::new();
            while !body.ends_with(b"\r\n\r\n") {
                body.push(stream.read_u8().await.unwrap());
            }
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
            stream.write_all(&[answer.as_bytes(), &body].concat()).await.unwrap();
        }
    })
    .await;
    let proxy = proxy_to(address).await;
    let mut client = Http1::connect(proxy.address).await;
    for method in [Method::POST, Method::GET] {
        let mut trailers = HeaderMap::new();
        trailers.insert("x-sum", HeaderValue::from_static("1"));
        trailers.insert("x-other", HeaderValue::from_static("2"));
        let frames = futures::stream::iter([Ok(Frame::data(Bytes::from("hello"))), Ok(Frame::trailers(trailers))]);
        let request = Request::builder()
            .method(method)
            .uri("/")
            .header("host", "a")
            .header("transfer-encoding", "chunked")
            .header("trailer", "x-sum, x-other, content-length")
            .body(StreamBody::new(frames).boxed())
            .unwrap();
        let answer = client.send(request).await.unwrap();
        assert!(answer.body.starts_with("5\r\nhello\r\n0\r\nx-"), "{}", answer.body);
        assert!(answer.body.contains("x-sum: 1\r\n") && answer.body.contains("x-other: 2\r\n"), "{}", answer.body);
    }
}

#[tokio::test]
async fn what_a_switched_connection_says_with_the_switch_is_not_lost() {
    let (address, _) = upstream(|mut stream| async move {
        head(&mut stream).await.unwrap();
        let switch = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nhello";
        stream.write_all(switch).await.unwrap();
    })
    .await;
    let proxy = proxy_to(address).await;
    let mut stream = TcpStream::connect(proxy.address).await.unwrap();
    let head = "GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\nhello") {
        answer.push(soon("the first words", stream.read_u8()).await.unwrap());
    }
}
