//! Who has vanished without a word, and who only does not read.

use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use http::StatusCode;
use sluice_proxy::{snapshot::Protocol, tls::IdentityHandle, workers::Role};
use sluice_tcp_info::tcp_info;
use socket2::{SockFilter, SockRef};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    time::sleep,
};

use crate::support::*;

/// Much longer than the kernel waits for the second probe of a closed window, as a receiver answers one in half a second only.
const VANISHED: Duration = Duration::from_millis(2500);
/// More than all buffers on the way hold.
const LONG: usize = 16 * 1024 * 1024;

fn proxy() -> Proxy {
    Proxy::with(Role::Fleet, IdentityHandle::default(), |options| options.timing.vanished = VANISHED)
}

/// Hears nothing from now on, and so acknowledges nothing: all that comes is dropped before TCP sees it. It has nothing to send again, which would be a
/// sign of life.
async fn vanish(stream: &TcpStream) {
    eventually("the arrival of all that it sent", || tcp_info(stream).unwrap().has_arrived()).await;
    // `ret #0`: no byte of a packet is kept.
    let nothing = SockFilter::new(0x06, 0, 0, 0);
    SockRef::from(stream).attach_filter(&[nothing]).unwrap();
}

fn small() -> TcpSocket {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    socket
}

/// A client with a small receive buffer.
async fn connect(address: SocketAddr) -> TcpStream {
    small().connect(address).await.unwrap()
}

/// A server whose connections have small receive buffers.
fn listen(ip: IpAddr) -> TcpListener {
    let socket = small();
    socket.bind(SocketAddr::new(ip, 8080)).unwrap();
    socket.listen(16).unwrap()
}

/// A proxy that passes bytes on to a server.
async fn opaque(listener: &TcpListener) -> Proxy {
    let proxy = proxy();
    proxy.serve(Protocol::Tcp(split([(cluster("a", &[listener.local_addr().unwrap()]), 100)]))).await;
    proxy
}

/// The proxy waits for this one to open its window.
async fn is_waited_for(address: SocketAddr) {
    eventually("a closed window", || kernel_timer(address).is_some_and(|(kind, _)| kind == CLOSED_WINDOW)).await;
}

#[tokio::test]
async fn who_does_not_read_for_longer_than_a_vanished_one_is_given_gets_everything() {
    let listener = listen(own_ip());
    let opaque = opaque(&listener).await;
    let app = App::start(own_ip(), 8080, |_| async { http::Response::new(full(vec![7; LONG])) }).await;
    let http = proxy();
    http.serve(http_to([(cluster("a", &[app.address]), 100)])).await;

    let mut client = connect(opaque.address).await;
    let (mut upstream, _) = soon("the connection", listener.accept()).await.unwrap();
    let mut download = connect(http.address).await;
    download.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
    // In both directions at once, and nobody reads.
    let addresses = [&client, &upstream, &download].map(|stream| stream.local_addr().unwrap());
    let (mut from_proxy, mut to_proxy) = client.split();
    let (mut from_other, mut to_other) = upstream.split();
    let ask = async {
        to_proxy.write_all(&vec![7; LONG]).await.unwrap();
        to_proxy.shutdown().await.unwrap();
    };
    let answer = async {
        to_other.write_all(&vec![7; LONG]).await.unwrap();
        to_other.shutdown().await.unwrap();
    };
    let read = async {
        for address in addresses {
            is_waited_for(address).await;
        }
        // What is tested is that this time does not count.
        sleep(2 * VANISHED).await;
        let (mut there, mut back, mut page) = (Vec::new(), Vec::new(), Vec::new());
        let read = tokio::join!(
            from_other.read_to_end(&mut there),
            from_proxy.read_to_end(&mut back),
            download.read_to_end(&mut page),
        );
        assert_eq!((read.0.unwrap(), read.1.unwrap()), (LONG, LONG));
        assert!(read.2.unwrap() > LONG);
    };
    soon("all of it", async { tokio::join!(ask, answer, read) }).await;
}

#[tokio::test]
async fn a_client_that_vanished_with_its_answer_is_found() {
    let (app, gate) = gated().await;
    let proxy = proxy();
    proxy.serve(http_to([(cluster("a", &[app.address]), 100)])).await;
    let mut client = connect(proxy.address).await;
    client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    eventually("the request", || app.requests() == 1).await;
    vanish(&client).await;
    gate.add_permits(1);
    eventually("the answer", || proxy.counted("a", "2xx", "") == 1).await;
    eventually("its end", || proxy.metric("sluice_connections_open{listener=\"shop/cart:80\"}") == 0).await;
}

#[tokio::test]
async fn a_client_that_vanished_behind_a_closed_window_is_found() {
    let listener = listen(own_ip());
    let proxy = opaque(&listener).await;
    let client = connect(proxy.address).await;
    let (mut upstream, _) = soon("the connection", listener.accept()).await.unwrap();
    upstream.write_all(&[7; 100_000]).await.unwrap();
    is_waited_for(client.local_addr().unwrap()).await;
    vanish(&client).await;
    let error = soon("the end", upstream.read_u8()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn an_upstream_that_vanished_is_found_and_its_client_is_told() {
    let listener = listen(own_ip());
    let proxy = opaque(&listener).await;
    let mut client = connect(proxy.address).await;
    let (mut upstream, _) = soon("the connection", listener.accept()).await.unwrap();
    client.write_all(b"here?").await.unwrap();
    let mut here = [0; 5];
    soon("the bytes", upstream.read_exact(&mut here)).await.unwrap();
    vanish(&upstream).await;
    client.write_all(b"here?").await.unwrap();
    // Whatever was to come has not come.
    let error = soon("the end", client.read_u8()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn an_upstream_that_vanished_with_a_request_is_answered_for() {
    let listener = TcpListener::bind((own_ip(), 8080)).await.unwrap();
    let proxy = Proxy::with(Role::Fleet, IdentityHandle::default(), |options| {
        options.timing.vanished = VANISHED;
        options.timing.application_idle = Duration::from_secs(3600);
    });
    proxy.serve(http_to([(cluster("a", &[listener.local_addr().unwrap()]), 100)])).await;
    let mut client = Http1::connect(proxy.address).await;
    let app = async {
        let (mut upstream, _) = soon("the connection", listener.accept()).await.unwrap();
        let mut head = [0; 1024];
        assert!(soon("a request", upstream.read(&mut head)).await.unwrap() > 0);
        upstream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
        upstream
    };
    let (answer, upstream) = tokio::join!(client.get("/"), app);
    assert_eq!(answer.status, StatusCode::OK);
    vanish(&upstream).await;
    // One that may not be sent twice.
    let answer = soon("an answer", client.send(post("/", "content"))).await.unwrap();
    assert_eq!((answer.status, answer.header("x-sluice-response-flag")), (StatusCode::SERVICE_UNAVAILABLE, "UC"));
}
