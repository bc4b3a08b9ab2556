//! HTTP/2 between a client, a proxy and an upstream: what one side does not take the other does not send, what is given up is given
//! up behind the proxy as well, and connections end without losing a request.

use std::{
    future::poll_fn,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use h2::{
    Reason, RecvStream, SendStream,
    client::SendRequest,
    server::{self, SendResponse},
};
use http::{Method, Request, Response};
use http_body_util::BodyExt;
use sluice_proxy::{
    metrics::Metrics,
    snapshot::{Cluster, UpstreamProtocol},
    tls::IdentityHandle,
    workers::Role,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpSocket, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::mpsc,
    time::sleep,
};

use crate::{
    frames::{
        DATA, END_HEADERS, END_STREAM, Frame, GET, GOAWAY, HEADERS, LARGEST, PING, POST, RST_STREAM, SETTINGS,
        WINDOW_UPDATE, connect, frame,
    },
    support::*,
};

const ACTIVE: &str = "sluice_requests_active{listener=\"shop/cart:80\"}";
/// What a side sends at once: the largest frame that everybody takes (RFC 9113, 4.2).
const CHUNK: usize = 16 << 10;
/// The window of a stream of ours, of a connection, and how much of a stream waits to be written (docs/limits.md).
const WINDOW: usize = 256 << 10;
const CONNECTION: usize = 4 << 20;
const UNSENT: usize = 64 << 10;
/// The windows of those who say nothing of them (RFC 9113, 6.9.2).
const USUAL: usize = 65_535;
/// What is on its way from one side to the other: a frame that waits for its window, and one that is being read.
const IN_HAND: usize = 2 * CHUNK;

type Taken = (Request<RecvStream>, SendResponse<Bytes>);

/// An upstream that hands its requests to the test, and reads of their content what the test reads.
async fn upstream() -> (Cluster, mpsc::Receiver<Taken>) {
    let listener = TcpListener::bind((own_ip(), 8080)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (taken, requests) = mpsc::channel(64);
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let taken = taken.clone();
            tokio::spawn(async move {
                let mut connection = server::handshake(stream).await.unwrap();
                while let Some(Ok(request)) = connection.accept().await {
                    let _ = taken.send(request).await;
                }
            });
        }
    });
    (Cluster { protocol: UpstreamProtocol::Http2, ..cluster("a", &[address]) }, requests)
}

/// With one thread, which shares its connection to the upstream among all requests.
async fn proxy_to(cluster: Cluster) -> Proxy {
    let proxy =
        Proxy::with(Role::Fleet, IdentityHandle::default(), |options| options.metrics = Metrics::new("test", 1));
    proxy.serve(http_to([(cluster, 100)])).await;
    proxy
}

/// A client that reads of its answers what the test reads.
pub(crate) async fn client(proxy: &Proxy) -> SendRequest<Bytes> {
    let stream = TcpStream::connect(proxy.address).await.unwrap();
    // What it does not read is no attack on it.
    let mut builder = h2::client::Builder::new();
    let (sender, connection) = builder.data_frame_budget(1 << 30).handshake(stream).await.unwrap();
    tokio::spawn(async move {
        let _ = connection.await;
    });
    sender.ready().await.unwrap()
}

fn to(method: Method) -> Request<()> {
    Request::builder().method(method).uri("http://cart.shop/").body(()).unwrap()
}

/// Sends so much as it is let, and counts it. Returns the reason when the stream is reset.
async fn pump(mut stream: SendStream<Bytes>, most: usize, sent: Arc<AtomicUsize>) -> Option<Reason> {
    let mut left = most;
    while left > 0 {
        stream.reserve_capacity(CHUNK.min(left));
        let mut room = stream.capacity();
        if room == 0 {
            match poll_fn(|cx| stream.poll_capacity(cx)).await {
                Some(Ok(more)) => room = more,
                Some(Err(error)) => return error.reason(),
                None => return poll_fn(|cx| stream.poll_reset(cx)).await.ok(),
            }
        }
        let length = room.min(CHUNK).min(left);
        left -= length;
        if let Err(error) = stream.send_data(Bytes::from_static(&[b'x'; CHUNK]).slice(..length), left == 0) {
            return error.reason();
        }
        sent.fetch_add(length, SeqCst);
    }
    None
}

/// Reads the content to its end.
async fn read_all(mut content: RecvStream) -> BytesMut {
    let mut all = BytesMut::new();
    while let Some(data) = soon("content", content.data()).await {
        let data = data.unwrap();
        content.flow_control().release_capacity(data.len()).unwrap();
        all.extend_from_slice(&data);
    }
    all
}

/// What was sent when no more of it is taken for a while: `least` at least, or it is waited for.
async fn standstill(sent: &AtomicUsize, least: usize) -> usize {
    soon("the standstill", async {
        let mut last = 0;
        loop {
            sleep(Duration::from_millis(500)).await;
            let now = sent.load(SeqCst);
            if now == last && now >= least {
                return now;
            }
            last = now;
        }
    })
    .await
}

/// What fits into the windows of both hops, and passes on none of them.
const STUCK: usize = WINDOW + USUAL + IN_HAND;

#[tokio::test]
async fn content_that_an_upstream_does_not_read_waits_with_its_client_and_a_reset_frees_both() {
    let (cluster, mut requests) = upstream().await;
    let proxy = proxy_to(cluster).await;
    let mut client = client(&proxy).await;
    let (unanswered, content) = client.send_request(to(Method::POST), false).unwrap();
    let sent = Arc::new(AtomicUsize::new(0));
    let sending = tokio::spawn(pump(content, usize::MAX, sent.clone()));
    let (request, mut respond) = soon("the request", requests.recv()).await.unwrap();
    let passed = standstill(&sent, WINDOW).await;
    assert!(passed <= STUCK, "{passed} of at most {STUCK}");

    // Its client gives it up while the proxy waits for room.
    drop(unanswered);
    sending.abort();
    let reset = soon("the reset", poll_fn(|cx| respond.poll_reset(cx))).await;
    assert_eq!(reset.unwrap(), Reason::CANCEL);
    eventually("the release", || proxy.metric(ACTIVE) == 0).await;
    // Its request was not whole, but it was the upstream that was waited for.
    assert_eq!(proxy.measured("a"), 1);
    drop((request, respond));
    // What it occupied of both connections' windows is free again: twice as much passes.
    let (answer, content) = client.send_request(to(Method::POST), false).unwrap();
    tokio::spawn(pump(content, 2 * CONNECTION, Arc::default()));
    let (request, mut respond) = soon("another request", requests.recv()).await.unwrap();
    assert_eq!(read_all(request.into_body()).await.len(), 2 * CONNECTION);
    respond.send_response(Response::new(()), true).unwrap();
    assert_eq!(soon("the answer", answer).await.unwrap().status(), 200);
}

#[tokio::test]
async fn an_answer_that_its_client_does_not_read_waits_upstream_and_a_reset_frees_both() {
    let (cluster, mut requests) = upstream().await;
    let proxy = proxy_to(cluster).await;
    let mut client = client(&proxy).await;
    let (answer, _) = client.send_request(to(Method::GET), true).unwrap();
    let (_request, mut respond) = soon("the request", requests.recv()).await.unwrap();
    let content = respond.send_response(Response::new(()), false).unwrap();
    let sent = Arc::new(AtomicUsize::new(0));
    let sending = tokio::spawn(pump(content, usize::MAX, sent.clone()));
    let answer = soon("the head", answer).await.unwrap();
    let passed = standstill(&sent, WINDOW).await;
    assert!(passed <= STUCK, "{passed} of at most {STUCK}");

    drop(answer);
    assert_eq!(soon("the reset", sending).await.unwrap(), Some(Reason::CANCEL));
    eventually("the release", || proxy.metric(ACTIVE) == 0).await;
    let (answer, _) = client.send_request(to(Method::GET), true).unwrap();
    let (_request, mut respond) = soon("another request", requests.recv()).await.unwrap();
    let content = respond.send_response(Response::new(()), false).unwrap();
    tokio::spawn(pump(content, 2 * CONNECTION, Arc::default()));
    let answer = soon("the head", answer).await.unwrap();
    assert_eq!(read_all(answer.into_body()).await.len(), 2 * CONNECTION);
}

/// A client that reads nothing of its answer.
type Stalled = (SendRequest<Bytes>, Response<RecvStream>, Request<RecvStream>);

async fn stalled(
    proxy: &Proxy,
    requests: &mut mpsc::Receiver<Taken>,
    send: impl AsyncFnOnce(SendStream<Bytes>),
) -> Stalled {
    let mut client = client(proxy).await;
    let (answer, _) = client.send_request(to(Method::GET), true).unwrap();
    let (request, mut respond) = soon("the request", requests.recv()).await.unwrap();
    let content = respond.send_response(Response::new(()), false).unwrap();
    let answer = soon("the head", answer).await.unwrap();
    send(content).await;
    (client, answer, request)
}

/// RFC 9113, 5.2: the windows of a connection are shared, and here by the requests of many clients.
#[tokio::test]
async fn clients_that_read_nothing_hold_up_no_other_on_the_connection_to_the_upstream_that_they_share() {
    let (cluster, mut requests) = upstream().await;
    let proxy = proxy_to(cluster).await;
    let mut held = Vec::new();
    for _ in 0..24 {
        let sent = Arc::new(AtomicUsize::new(0));
        let sending = async |content| {
            tokio::spawn(pump(content, usize::MAX, sent.clone()));
        };
        held.push(stalled(&proxy, &mut requests, sending).await);
        standstill(&sent, WINDOW).await;
    }
    let mut reads = client(&proxy).await;
    let (answer, _) = reads.send_request(to(Method::GET), true).unwrap();
    let (_request, mut respond) = soon("the request", requests.recv()).await.unwrap();
    tokio::spawn(pump(respond.send_response(Response::new(()), false).unwrap(), CONNECTION, Arc::default()));
    let answer = soon("the head", answer).await.unwrap();
    assert_eq!(read_all(answer.into_body()).await.len(), CONNECTION);
    drop(held);
}

/// h2 counts what small frames take, and takes too much of it for an attack.
#[tokio::test]
async fn clients_that_read_no_small_messages_end_no_other_on_the_connection_to_the_upstream_that_they_share() {
    const MESSAGE: &[u8] = b"a message of 25 bytes ...";
    let (cluster, mut requests) = upstream().await;
    let proxy = proxy_to(cluster).await;
    let mut first = client(&proxy).await;
    let (unanswered, _) = first.send_request(to(Method::GET), true).unwrap();
    let (_request, mut waits) = soon("the request", requests.recv()).await.unwrap();
    let sending = async |mut content: SendStream<Bytes>| {
        // A window full of them, each in a frame of its own.
        for _ in 0..WINDOW / MESSAGE.len() {
            content.reserve_capacity(MESSAGE.len());
            while content.capacity() < MESSAGE.len() {
                soon("room", poll_fn(|cx| content.poll_capacity(cx))).await.unwrap().unwrap();
            }
            content.send_data(Bytes::from_static(MESSAGE), false).unwrap();
        }
        tokio::spawn(async move { poll_fn(|cx| content.poll_reset(cx)).await });
    };
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(stalled(&proxy, &mut requests, sending).await);
    }
    let mut content = waits.send_response(Response::new(()), false).unwrap();
    content.send_data("whole".into(), true).unwrap();
    let answer = soon("the other's answer", unanswered).await.unwrap();
    assert_eq!(read_all(answer.into_body()).await, "whole");
    drop(held);
}

/// An endpoint may have several connections that have been told to end, and still serve what they had.
#[tokio::test]
async fn connections_that_end_cost_a_request_none_of_its_tries() {
    const CONNECTIONS: usize = 4;
    let listener = TcpListener::bind((own_ip(), 8080)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (taken, mut requests) = mpsc::channel::<(usize, Taken)>(64);
    let (ends, _) = tokio::sync::watch::channel(false);
    let end = ends.clone();
    tokio::spawn(async move {
        for number in 0.. {
            let (stream, _) = listener.accept().await.unwrap();
            let (taken, mut end) = (taken.clone(), end.subscribe());
            tokio::spawn(async move {
                let mut connection = server::Builder::new().max_concurrent_streams(2).handshake(stream).await.unwrap();
                let mut told = number >= CONNECTIONS;
                loop {
                    tokio::select! {
                        request = connection.accept() => match request {
                            Some(Ok(request)) => taken.send((number, request)).await.unwrap(),
                            _ => return,
                        },
                        () = async { let _ = end.wait_for(|end| *end).await; }, if !told => {
                            told = true;
                            connection.graceful_shutdown();
                        }
                    }
                }
            });
        }
    });
    let proxy = proxy_to(Cluster { protocol: UpstreamProtocol::Http2, ..cluster("a", &[address]) }).await;
    let mut client = client(&proxy).await;
    let (mut answers, mut open) = (Vec::new(), Vec::new());
    for _ in 0..2 * CONNECTIONS {
        client = client.ready().await.unwrap();
        answers.push(client.send_request(to(Method::GET), true).unwrap().0);
        open.push(soon("the request", requests.recv()).await.unwrap());
    }
    assert!(open.iter().all(|(number, _)| *number < CONNECTIONS));
    // One of the two of each connection is answered, so that it seems to have room.
    let mut seen = [false; CONNECTIONS];
    let mut rest = Vec::new();
    for (number, (request, mut respond)) in open {
        if std::mem::replace(&mut seen[number], true) {
            rest.push((request, respond));
        } else {
            respond.send_response(Response::new(()), true).unwrap();
        }
    }
    eventually("the answers", || proxy.metric(ACTIVE) == CONNECTIONS as u64).await;
    ends.send_replace(true);
    // Those that come before the proxy has heard of it are served on the old ones.
    loop {
        client = client.ready().await.unwrap();
        let (answer, _) = client.send_request(to(Method::GET), true).unwrap();
        let mut answer = pin!(answer);
        let (number, (_request, mut respond)) = tokio::select! {
            request = soon("the request", requests.recv()) => request.unwrap(),
            answer = &mut answer => panic!("it reached nobody: {answer:?}"),
        };
        respond.send_response(Response::new(()), true).unwrap();
        assert_eq!(soon("the answer", answer).await.unwrap().status(), 200);
        if number >= CONNECTIONS {
            return drop(rest);
        }
    }
}

#[tokio::test]
async fn content_that_waits_behind_the_begin_of_its_answer_is_freed_by_a_reset_as_well() {
    let (cluster, mut requests) = upstream().await;
    let proxy = proxy_to(cluster).await;
    let mut client = client(&proxy).await;
    let (answer, content) = client.send_request(to(Method::POST), false).unwrap();
    let sent = Arc::new(AtomicUsize::new(0));
    let sending = tokio::spawn(pump(content, usize::MAX, sent.clone()));
    let (_request, mut respond) = soon("the request", requests.recv()).await.unwrap();
    let mut begun = respond.send_response(Response::new(()), false).unwrap();
    let answer = soon("the head", answer).await.unwrap();
    standstill(&sent, WINDOW).await;
    drop(answer);
    sending.abort();
    assert_eq!(soon("the reset", poll_fn(|cx| begun.poll_reset(cx))).await.unwrap(), Reason::CANCEL);
    eventually("the release", || proxy.metric(ACTIVE) == 0).await;
}

#[tokio::test]
async fn an_answer_that_its_upstream_gives_up_has_no_end_that_looks_like_one() {
    let (cluster, mut requests) = upstream().await;
    let proxy = proxy_to(cluster).await;
    let mut client = client(&proxy).await;
    // The first two are taken for an end by clients that are built on hyper, and the third for a request that was not processed.
    for given_up in [Reason::CANCEL, Reason::NO_ERROR, Reason::REFUSED_STREAM, Reason::INTERNAL_ERROR] {
        let (answer, _) = client.send_request(to(Method::GET), true).unwrap();
        let (_request, mut respond) = soon("the request", requests.recv()).await.unwrap();
        let mut content = respond.send_response(Response::new(()), false).unwrap();
        content.send_data("begun".into(), false).unwrap();
        let mut answer = soon("the head", answer).await.unwrap().into_body();
        assert_eq!(soon("its begin", answer.data()).await.unwrap().unwrap(), "begun");
        content.send_reset(given_up);
        let end = soon("its end", answer.data()).await.expect("the answer has ended in order");
        assert_eq!(end.unwrap_err().reason(), Some(Reason::INTERNAL_ERROR), "{given_up:?}");
    }
    assert_eq!(proxy.counted("a", "2xx", ""), 0);
}

#[tokio::test]
async fn a_client_that_waits_for_100_is_told_when_its_content_is_wanted() {
    let (cluster, mut requests) = upstream().await;
    let proxy = proxy_to(cluster).await;
    let mut client = client(&proxy).await;
    let mut request = to(Method::POST);
    request.headers_mut().insert("expect", "100-continue".parse().unwrap());
    let (mut answer, mut content) = client.send_request(request, false).unwrap();
    let told = soon("the word", poll_fn(|cx| answer.poll_informational(cx))).await.unwrap().unwrap();
    assert_eq!(told.status(), 100);
    content.send_data("content".into(), true).unwrap();
    let (request, mut respond) = soon("the request", requests.recv()).await.unwrap();
    assert_eq!(request.headers().get("expect"), None);
    assert_eq!(read_all(request.into_body()).await, "content");
    respond.send_response(Response::new(()), true).unwrap();
    assert_eq!(soon("the answer", answer).await.unwrap().status(), 200);
    // Nobody else is told.
    let (mut answer, _) = client.send_request(to(Method::POST), false).unwrap();
    let (_request, mut respond) = soon("the request", requests.recv()).await.unwrap();
    respond.send_response(Response::new(()), true).unwrap();
    assert!(soon("the answer", poll_fn(|cx| answer.poll_informational(cx))).await.is_none());
}

#[tokio::test]
async fn an_upstream_that_breaks_the_protocol_is_told_apart_from_one_that_gives_up() {
    // Content without a head, which ends the connection (RFC 9113, 8.1), and a stream given up.
    for (breaks, (status, flag)) in
        [(frame(DATA, 0, 1, b"content"), (502, "UPE")), (frame(RST_STREAM, 0, 1, &[0, 0, 0, 2]), (503, "UC"))]
    {
        let listener = TcpListener::bind((own_ip(), 8080)).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut from, mut to) = listener.accept().await.unwrap().0.into_split();
            from.read_exact(&mut [0; 24]).await.unwrap();
            to.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
            while next(&mut from).await.expect("no request").kind != HEADERS {}
            to.write_all(&breaks).await.unwrap();
            while next(&mut from).await.is_some() {}
        });
        let proxy = proxy_to(Cluster { protocol: UpstreamProtocol::Http2, ..cluster("a", &[address]) }).await;
        let (answer, _) = client(&proxy).await.send_request(to(Method::GET), true).unwrap();
        let answer = soon("the answer", answer).await.unwrap();
        assert_eq!(
            (answer.status().as_u16(), &answer.headers()["x-sluice-response-flag"]),
            (status, &flag.parse().unwrap())
        );
    }
}

#[tokio::test]
async fn our_own_answer_to_head_says_its_length_and_has_no_content() {
    let proxy = proxy_to(Cluster { protocol: UpstreamProtocol::Http2, ..cluster("a", &[]) }).await;
    let mut client = client(&proxy).await;
    let mut ask = async |method: Method| {
        let (answer, _) = client.send_request(to(method), true).unwrap();
        soon("the answer", answer).await.unwrap()
    };
    let to_get = ask(Method::GET).await;
    let to_head = ask(Method::HEAD).await;
    assert_eq!(
        (to_head.status(), &to_head.headers()["content-length"]),
        (to_get.status(), &to_get.headers()["content-length"])
    );
    assert_eq!(to_head.status(), 503);
    assert!(to_head.body().is_end_stream());
    assert!(!read_all(to_get.into_body()).await.is_empty());
}

const STREAMS: usize = 32;

/// What the kernel may hold of a connection between two sockets of which one has this buffer for what it has not read.
fn in_the_kernel(unread: u32) -> usize {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_wmem").unwrap();
    let unsent: usize = text.split_whitespace().last().unwrap().parse().unwrap();
    // It doubles what it is asked for (socket(7), SO_RCVBUF).
    unsent + 2 * unread as usize
}

const UNREAD: u32 = 64 << 10;

/// All that may be on its way on one connection whose reader grants any window and reads nothing: what the windows before it hold as well.
fn unread_on_one_connection(windows: usize) -> usize {
    windows + STREAMS * (UNSENT + IN_HAND) + in_the_kernel(UNREAD)
}

#[tokio::test]
async fn an_upstream_that_grants_any_window_and_reads_nothing_gets_no_more_than_the_buffers_of_its_streams() {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(UNREAD).unwrap();
    socket.bind((own_ip(), 8080).into()).unwrap();
    let listener = socket.listen(8).unwrap();
    let address = listener.local_addr().unwrap();
    let proxy = proxy_to(Cluster { protocol: UpstreamProtocol::Http2, ..cluster("a", &[address]) }).await;
    let mut client = client(&proxy).await;
    let sent = Arc::new(AtomicUsize::new(0));
    let mut open = Vec::new();
    for _ in 0..STREAMS {
        client = soon("room for a stream", client.ready()).await.unwrap();
        let (answer, content) = client.send_request(to(Method::POST), false).unwrap();
        open.push((answer, tokio::spawn(pump(content, usize::MAX, sent.clone()))));
    }
    let (mut unread, _) = soon("the connection", listener.accept()).await.unwrap();
    unread.write_all(&any_window()).await.unwrap();
    let passed = standstill(&sent, CONNECTION).await;
    let most = unread_on_one_connection(CONNECTION);
    assert!(passed <= most, "{passed} of at most {most}");
}

#[tokio::test]
async fn a_client_that_grants_any_window_and_reads_nothing_gets_no_more_than_the_buffers_of_its_streams() {
    let (cluster, mut requests) = upstream().await;
    let proxy = proxy_to(cluster).await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(UNREAD).unwrap();
    let mut unread = socket.connect(proxy.address).await.unwrap();
    unread.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    unread.write_all(&any_window()).await.unwrap();
    for stream in 0..u32::try_from(STREAMS).unwrap() {
        unread.write_all(&frame(HEADERS, END_HEADERS | END_STREAM, 2 * stream + 1, GET)).await.unwrap();
    }
    let sent = Arc::new(AtomicUsize::new(0));
    for _ in 0..STREAMS {
        let (_, mut respond) = soon("a request", requests.recv()).await.unwrap();
        let content = respond.send_response(Response::new(()), false).unwrap();
        tokio::spawn(pump(content, usize::MAX, sent.clone()));
    }
    let passed = standstill(&sent, CONNECTION).await;
    // A connection to an upstream has a window for each of the streams that share it.
    let most = unread_on_one_connection(STREAMS * WINDOW);
    assert!(passed <= most, "{passed} of at most {most}");
}

/// SETTINGS_INITIAL_WINDOW_SIZE, and the connection's window, as large as they may be.
fn any_window() -> Vec<u8> {
    let streams = [&[0, 4][..], &LARGEST.to_be_bytes()].concat();
    let more = LARGEST - u32::try_from(USUAL).unwrap();
    [frame(SETTINGS, 0, 0, &streams), frame(WINDOW_UPDATE, 0, 0, &more.to_be_bytes())].concat()
}

#[tokio::test]
async fn a_client_that_goes_before_or_in_its_answer_cancels_the_stream_upstream_and_no_other() {
    let (cluster, mut requests) = upstream().await;
    let proxy = proxy_to(cluster).await;
    let mut client = client(&proxy).await;
    let (neighbour, _) = client.send_request(to(Method::GET), true).unwrap();
    let (_request, mut neighbours) = soon("the neighbour's request", requests.recv()).await.unwrap();
    for (http2, answered) in [(true, false), (true, true), (false, false), (false, true)] {
        let what = format!("HTTP/2 {http2}, answered {answered}");
        let (mut multiplexed, mut own) = (None, None);
        if http2 {
            multiplexed = Some(client.send_request(to(Method::GET), true).unwrap().0);
        } else {
            let mut stream = TcpStream::connect(proxy.address).await.unwrap();
            stream.write_all(b"GET / HTTP/1.1\r\nhost: cart.shop\r\n\r\n").await.unwrap();
            own = Some(stream);
        }
        let (_request, mut respond) = soon(&what, requests.recv()).await.unwrap();
        let reset = if answered {
            let mut content = respond.send_response(Response::new(()), false).unwrap();
            content.send_data("begun".into(), false).unwrap();
            if let Some(answer) = multiplexed.take() {
                let mut answer = soon(&what, answer).await.unwrap();
                assert_eq!(soon(&what, answer.body_mut().data()).await.unwrap().unwrap(), "begun");
            }
            if let Some(stream) = &mut own {
                let mut seen = Vec::new();
                while !seen.ends_with(b"begun\r\n") {
                    seen.push(soon(&what, stream.read_u8()).await.unwrap());
                }
            }
            drop((multiplexed, own));
            soon(&what, poll_fn(|cx| content.poll_reset(cx))).await
        } else {
            drop((multiplexed, own));
            soon(&what, poll_fn(|cx| respond.poll_reset(cx))).await
        };
        assert_eq!(reset.unwrap(), Reason::CANCEL, "{what}");
    }
    eventually("the release", || proxy.metric(ACTIVE) == 1).await;
    let mut content = neighbours.send_response(Response::new(()), false).unwrap();
    content.send_data("whole".into(), true).unwrap();
    let answer = soon("the neighbour's answer", neighbour).await.unwrap();
    assert_eq!(read_all(answer.into_body()).await, "whole");
    assert_eq!(proxy.metric("sluice_client_aborts_total{listener=\"shop/cart:80\"}"), 4);
    assert_eq!(proxy.counted("a", "5xx", ""), 0);
}

/// `None` at the end of the connection.
async fn next(from: &mut OwnedReadHalf) -> Option<Frame> {
    soon("a frame", Frame::read(from)).await
}

/// The last stream that the next GOAWAY says it has seen, and its error.
async fn go_away(from: &mut OwnedReadHalf) -> (u32, Reason) {
    loop {
        let frame = next(from).await.expect("the connection ended without a word");
        if let Some(error) = frame.go_away() {
            return (frame.code(0), error.into());
        }
    }
}

/// The payload of the next PING that wants an answer.
async fn ping(from: &mut OwnedReadHalf) -> Vec<u8> {
    loop {
        let frame = next(from).await.expect("the connection ended without a word");
        if frame.kind == PING && frame.flags == 0 {
            return frame.payload;
        }
    }
}

/// The content of the answer to this stream. No GOAWAY comes before its end.
async fn answer(from: &mut OwnedReadHalf, stream: u32) -> String {
    let mut content = Vec::new();
    loop {
        let Frame { kind, flags, stream: of, payload } =
            next(from).await.expect("the connection ended without an answer");
        assert_ne!(kind, GOAWAY, "in the middle of an answer");
        if of == stream && kind == DATA {
            content.extend(payload);
        }
        if of == stream && flags & END_STREAM != 0 && matches!(kind, DATA | HEADERS) {
            return String::from_utf8(content).unwrap();
        }
    }
}

async fn echo() -> App {
    App::start(own_ip(), 8080, |request| async move {
        let content = request.into_body().collect().await.unwrap().to_bytes();
        Response::new(full(content))
    })
    .await
}

/// A proxy that says after `farewell` which requests it has seen.
fn with_farewell(farewell: Duration, idle: Option<Duration>) -> Proxy {
    Proxy::with(Role::Fleet, IdentityHandle::default(), |options| {
        options.timing.farewell = farewell;
        options.timing.downstream_idle = idle;
    })
}

/// Waits for the two words after the first: that a connection ends, and with which request, as soon as a PING is answered.
async fn last_words(read: &mut OwnedReadHalf, write: &mut OwnedWriteHalf, last: u32) {
    assert_eq!(go_away(read).await, (LARGEST, Reason::NO_ERROR));
    let asked = ping(read).await;
    write.write_all(&frame(PING, 1, 0, &asked)).await.unwrap();
    assert_eq!(go_away(read).await, (last, Reason::NO_ERROR));
}

/// RFC 9113, 6.8: what a client has sent before it knows is served.
#[tokio::test]
async fn a_request_that_is_sent_between_the_words_of_a_drain_is_served_whole() {
    let app = echo().await;
    let proxy = with_farewell(Duration::from_millis(100), None);
    proxy.serve(http_to([(cluster("a", &[app.address]), 100)])).await;
    let (mut read, mut write) = connect(&proxy).await;
    write.write_all(&frame(HEADERS, END_HEADERS | END_STREAM, 1, POST)).await.unwrap();
    assert_eq!(answer(&mut read, 1).await, "");

    let client = async {
        // It does not say yet which requests it has seen: it has not seen what is on its way.
        assert_eq!(go_away(&mut read).await, (LARGEST, Reason::NO_ERROR));
        write.write_all(&frame(HEADERS, END_HEADERS, 3, POST)).await.unwrap();
        last_words(&mut read, &mut write, 3).await;
        write.write_all(&frame(DATA, END_STREAM, 3, b"late, and not too late")).await.unwrap();
        assert_eq!(answer(&mut read, 3).await, "late, and not too late");
        assert_eq!(next(&mut read).await, None);
    };
    let (drained, ()) = tokio::join!(proxy.workers.drain(PATIENCE), client);
    assert_eq!((drained.unwrap().cut, app.requests()), (0, 2));
}

/// A client that answers a PING before it sends what it has begun, as those do that are made with h2, would lose that if it
/// met a PING beside the first word.
#[tokio::test]
async fn the_first_word_of_a_drain_comes_without_a_ping_and_in_the_middle_of_an_answer_between_two_frames() {
    const LARGE: usize = 16 << 20;
    let app = App::start(own_ip(), 8080, |_| async { Response::new(full(Bytes::from(vec![b'x'; LARGE]))) }).await;
    let proxy = with_farewell(10 * PATIENCE, None);
    proxy.serve(http_to([(cluster("a", &[app.address]), 100)])).await;
    let (mut read, mut write) = connect(&proxy).await;
    let grant = |stream| frame(WINDOW_UPDATE, 0, stream, &(1_u32 << 30).to_be_bytes());
    write.write_all(&[frame(HEADERS, END_HEADERS | END_STREAM, 1, GET), grant(0), grant(1)].concat()).await.unwrap();
    eventually("the request", || app.requests() == 1).await;

    let client = async {
        let (mut told, mut seen) = (false, [0; 2]);
        // The second request is sent when the client has heard.
        while seen != [LARGE; 2] {
            let Frame { kind, stream, payload, .. } = next(&mut read).await.expect("the connection ended too early");
            assert_ne!(kind, PING, "a client would answer it first, and be taken at its word");
            if kind == DATA {
                seen[stream as usize / 2] += payload.len();
            }
            if kind == GOAWAY {
                assert!(!std::mem::replace(&mut told, true), "it is said once");
                let second = [frame(HEADERS, END_HEADERS | END_STREAM, 3, GET), grant(3)].concat();
                write.write_all(&second).await.unwrap();
            }
        }
        assert!(told);
        drop((read, write));
    };
    let (drained, ()) = tokio::join!(proxy.workers.drain(PATIENCE), client);
    assert_eq!((drained.unwrap().cut, app.requests()), (0, 2));
}

#[tokio::test]
async fn an_idle_http2_connection_is_ended_in_its_time_with_goaway_and_a_busy_one_is_not() {
    const IDLE: Duration = Duration::from_millis(400);
    let app = echo().await;
    let proxy = with_farewell(Duration::from_millis(100), Some(IDLE));
    proxy.serve(http_to([(cluster("a", &[app.address]), 100)])).await;
    let (mut busy_read, mut busy) = connect(&proxy).await;
    busy.write_all(&frame(HEADERS, END_HEADERS, 1, POST)).await.unwrap();
    eventually("its request", || app.requests() == 1).await;

    let started = std::time::Instant::now();
    let (mut read, mut write) = connect(&proxy).await;
    for stream in [1, 3] {
        write.write_all(&frame(HEADERS, END_HEADERS | END_STREAM, stream, GET)).await.unwrap();
        assert_eq!(answer(&mut read, stream).await, "");
    }
    assert_eq!(go_away(&mut read).await, (LARGEST, Reason::NO_ERROR));
    assert!(started.elapsed() >= IDLE, "after {:?}", started.elapsed());
    last_words(&mut read, &mut write, 3).await;
    assert_eq!(next(&mut read).await, None);

    // It has been open for longer, and its request is not over.
    busy.write_all(&frame(DATA, END_STREAM, 1, b"at last")).await.unwrap();
    assert_eq!(answer(&mut busy_read, 1).await, "at last");
    assert_eq!(go_away(&mut busy_read).await, (LARGEST, Reason::NO_ERROR));
}

/// RFC 9113, 8.2.1 has an error of the stream for most of these; h2 cannot say which stream it was.
/// An application would reset the stream, and its version answer for that.
#[tokio::test]
async fn a_target_that_is_none_is_refused_and_reaches_no_application() {
    let app = echo().await;
    let proxy = proxy_to(Cluster { protocol: UpstreamProtocol::Http2, ..cluster("a", &[app.address]) }).await;
    let (mut read, mut write) = connect(&proxy).await;
    // `:method: GET`, `:scheme: http` and `:authority: a`, with the path or the scheme as a literal (RFC 7541, 6.2.2).
    let targets: [&[u8]; 3] =
        [b"\x82\x86\x41\x01a\x04\x02?x", b"\x82\x86\x41\x01a\x04\x01*", b"\x82\x84\x41\x01a\x06\x03ftp"];
    for (target, stream) in targets.into_iter().zip((1..).step_by(2)) {
        write.write_all(&frame(HEADERS, END_HEADERS | END_STREAM, stream, target)).await.unwrap();
        let said = answer(&mut read, stream).await;
        assert!(said.contains("its target is not one for its method"), "{stream}: {said}");
    }
    write.write_all(&frame(HEADERS, END_HEADERS | END_STREAM, 7, GET)).await.unwrap();
    answer(&mut read, 7).await;
    assert_eq!((app.requests(), proxy.refused("target")), (1, 3));
    assert_eq!(proxy.counted("a", "5xx", ""), 0);
}

#[tokio::test]
async fn a_field_that_is_none_ends_its_connection_is_counted_and_reaches_no_application() {
    let app = echo().await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(cluster("a", &[app.address]), 100)])).await;
    let with = |name: &str, value: &str| {
        let length = |text: &str| u8::try_from(text.len()).unwrap();
        [GET, &[0, length(name)], name.as_bytes(), &[length(value)], value.as_bytes()].concat()
    };
    let table = [
        ("CR LF in a value", with("x", "y\r\ntransfer-encoding: chunked")),
        ("LF in a value", with("x", "y\nz: z")),
        ("NUL in a value", with("x", "y\0z")),
        ("a colon in a name", with("transfer-encoding: chunked", "x")),
        ("CR LF in a name", with("x\r\ny", "z")),
        ("a space in a name", with("transfer-encoding ", "chunked")),
        ("a name in capitals", with("X-A", "y")),
        ("no name", with("", "y")),
        ("a pseudo-field that nobody knows", with(":x", "y")),
        ("a method that is none", [&with(":method", "GET / HTTP/1.1\r\nx: y")[GET.len()..], &GET[1..]].concat()),
        ("an index that HPACK's tables do not have", [GET, b"\xff\x7f"].concat()),
    ];
    for (index, (what, block)) in table.iter().enumerate() {
        let (mut read, mut write) = connect(&proxy).await;
        write.write_all(&frame(HEADERS, END_HEADERS | END_STREAM, 1, block)).await.unwrap();
        let (_, error) = go_away(&mut read).await;
        assert_eq!(error, Reason::PROTOCOL_ERROR, "{what}");
        assert_eq!(next(&mut read).await, None, "{what}");
        // Counted behind the answer.
        eventually(what, || proxy.refused("http2_protocol_error") == index as u64 + 1).await;
    }
    assert_eq!(app.requests(), 0);
    assert_eq!(Http2::connect(proxy.address).await.send(get("/")).await.unwrap().status, 200);
}
