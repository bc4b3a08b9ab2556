use std::{
    io::{self, ErrorKind},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use rustls::pki_types::ServerName;
use sluice_proxy::{
    snapshot::{Action, ClientTls, Cluster, Protocol},
    workers::Role,
};
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use crate::support::*;

/// Reads to the end of the client's bytes, and only then answers with its name and their number.
async fn counts(name: &'static str, ip: IpAddr) -> SocketAddr {
    let listener = TcpListener::bind((ip, 8080)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut data = Vec::new();
                stream.read_to_end(&mut data).await.unwrap();
                stream.write_all(format!("{name} {}", data.len()).as_bytes()).await.unwrap();
            });
        }
    });
    address
}

async fn ask(address: SocketAddr, data: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(data).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    soon("the answer", stream.read_to_string(&mut answer)).await.unwrap();
    answer
}

#[tokio::test]
async fn each_half_of_a_connection_closes_by_itself_through_both_roles() {
    let (ip, ca) = (own_ip(), Ca::new());
    counts("app", ip).await;
    let sidecar = sidecar(&ca, ip, true).await;
    let fleet = Proxy::with(Role::Fleet, ca.identity(FLEET), |_| {});
    fleet.serve(Protocol::Tcp(split([(mesh_cluster("abc", &[&sidecar]), 100)]))).await;
    assert_eq!(ask(fleet.address, b"").await, "app 0");
    assert_eq!(ask(fleet.address, &vec![7; 3_000_000]).await, "app 3000000");
    // Bytes are not counted as requests.
    assert_eq!(fleet.counted("abc", "2xx", ""), 0);
    eventually("the end of both", || fleet.metric("sluice_connections_open{listener=\"shop/cart:80\"}") == 0).await;
}

#[tokio::test]
async fn a_connection_is_drawn_once_and_finds_a_living_endpoint_of_its_revision() {
    let (a, b) = (counts("a", own_ip()).await, counts("b", own_ip()).await);
    let dead = SocketAddr::new(own_ip(), 9);
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(Protocol::Tcp(split([(cluster("a", &[a, dead]), 50), (cluster("b", &[b]), 50)]))).await;
    let mut to_a = 0;
    for _ in 0..200 {
        let answer = ask(proxy.address, b"xyz").await;
        assert!(answer == "a 3" || answer == "b 3", "{answer:?}");
        to_a += usize::from(answer == "a 3");
    }
    assert!((60..=140).contains(&to_a), "{to_a} of 200");
}

#[tokio::test]
async fn without_an_endpoint_a_connection_is_reset() {
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(Protocol::Tcp(split([(cluster("a", &[]), 100)]))).await;
    // The reset may be there before we look at the new connection.
    let error = match TcpStream::connect(proxy.address).await {
        Ok(mut stream) => soon("the reset", stream.read_u8()).await.unwrap_err(),
        Err(error) => error,
    };
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert_eq!(proxy.metric("sluice_local_errors_total{listener=\"shop/cart:80\",flag=\"UH\"}"), 1);
}

/// How a side leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leaves {
    InOrder,
    /// As when its process is killed: the kernel ends TCP in order.
    WithoutCloseNotify,
    ByReset,
}

/// Half of something comes from a connection, and then what it is that the other side did.
async fn sees(stream: &mut (impl AsyncRead + Unpin), end: Leaves) {
    let mut half = [0; 4];
    soon("the half", stream.read_exact(&mut half)).await.unwrap();
    assert_eq!(&half, b"half");
    let seen = soon("the end", stream.read(&mut half)).await.map_err(|error| error.kind());
    let due = if end == Leaves::InOrder { Ok(0) } else { Err(ErrorKind::ConnectionReset) };
    assert_eq!(seen, due, "{end:?}");
}

/// Waits until something has come, and leaves it there.
async fn arrives(stream: &TcpStream) {
    assert_eq!(soon("a byte", stream.peek(&mut [0; 1])).await.unwrap(), 1);
}

/// A client of a fleet that passes bytes on to an upstream in TLS, and this upstream.
async fn through_a_fleet(ca: &Ca) -> (Proxy, TcpStream, server::TlsStream<TcpStream>) {
    let listener = TcpListener::bind((own_ip(), 20443)).await.unwrap();
    let fleet = Proxy::with(Role::Fleet, ca.identity(FLEET), |_| {});
    let cluster = Cluster {
        tls: Some(ClientTls { sni: "p8080.abc".into(), server_id: APP.into() }),
        ..cluster("abc", &[listener.local_addr().unwrap()])
    };
    fleet.serve(Protocol::Tcp(split([(cluster, 100)]))).await;
    let client = TcpStream::connect(fleet.address).await.unwrap();
    let (upstream, _) = soon("the connection", listener.accept()).await.unwrap();
    let acceptor = TlsAcceptor::from(ca.identity(APP).server_config(FLEET, &[]));
    let upstream = soon("the handshake", acceptor.accept(upstream)).await.unwrap();
    (fleet, client, upstream)
}

/// A client of a sidecar, as a fleet is, and its application.
async fn through_a_sidecar(ca: &Ca) -> (Proxy, client::TlsStream<TcpStream>, TcpStream) {
    let ip = own_ip();
    let listener = TcpListener::bind((ip, 8080)).await.unwrap();
    let sidecar = sidecar(ca, ip, true).await;
    let connector = TlsConnector::from(ca.identity(FLEET).client_config(APP, &[]));
    let client = TcpStream::connect(sidecar.address).await.unwrap();
    let name = ServerName::try_from("p8080.abc").unwrap();
    let client = soon("the handshake", connector.connect(name, client)).await.unwrap();
    let (app, _) = soon("the connection", listener.accept()).await.unwrap();
    (sidecar, client, app)
}

#[tokio::test]
async fn what_is_no_end_in_order_is_a_reset_to_the_client_of_a_fleet() {
    let ca = Ca::new();
    for leaves in [Leaves::InOrder, Leaves::WithoutCloseNotify, Leaves::ByReset] {
        let (_fleet, mut client, mut upstream) = through_a_fleet(&ca).await;
        upstream.write_all(b"half").await.unwrap();
        upstream.flush().await.unwrap();
        match leaves {
            Leaves::InOrder => upstream.shutdown().await.unwrap(),
            Leaves::WithoutCloseNotify => upstream.get_mut().0.shutdown().await.unwrap(),
            Leaves::ByReset => {
                // Or the reset would overtake it.
                arrives(&client).await;
                upstream.get_ref().0.set_zero_linger().unwrap();
                drop(upstream);
            }
        }
        sees(&mut client, leaves).await;
    }
}

#[tokio::test]
async fn what_is_no_end_in_order_is_a_reset_to_the_application_of_a_sidecar() {
    let ca = Ca::new();
    for leaves in [Leaves::InOrder, Leaves::WithoutCloseNotify, Leaves::ByReset] {
        let (_sidecar, mut client, mut app) = through_a_sidecar(&ca).await;
        client.write_all(b"half").await.unwrap();
        client.flush().await.unwrap();
        match leaves {
            Leaves::InOrder => client.shutdown().await.unwrap(),
            Leaves::WithoutCloseNotify => client.get_mut().0.shutdown().await.unwrap(),
            Leaves::ByReset => {
                arrives(&app).await;
                client.get_ref().0.set_zero_linger().unwrap();
                drop(client);
                sees(&mut app, leaves).await;
                continue;
            }
        }
        sees(&mut app, leaves).await;
        if leaves == Leaves::InOrder {
            app.write_all(b"half").await.unwrap();
            drop(app);
            // With close_notify, or it would be an error.
            sees(&mut client, leaves).await;
        }
    }
}

#[tokio::test]
async fn what_is_on_its_way_arrives_before_the_reset_however_late_it_is_read() {
    let ca = Ca::new();
    let (fleet, mut client, mut upstream) = through_a_fleet(&ca).await;
    SockRef::from(&client).set_recv_buffer_size(4096).unwrap();
    // More than the client's buffer holds, and less than the proxy's.
    let content = vec![7; 400_000];
    upstream.write_all(&content).await.unwrap();
    upstream.flush().await.unwrap();
    upstream.get_mut().0.shutdown().await.unwrap();
    // By then the proxy has read it all, and seen that this is no end in order.
    let error = soon("the reset", upstream.read_u8()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let mut came = Vec::new();
    let error = soon("the reset", client.read_to_end(&mut came)).await.unwrap_err();
    assert_eq!((error.kind(), came.len()), (ErrorKind::ConnectionReset, content.len()));
    eventually("the end", || fleet.metric("sluice_connections_open{listener=\"shop/cart:80\"}") == 0).await;
}

#[tokio::test]
async fn a_proxy_that_goes_down_resets_both_sides() {
    let ca = Ca::new();
    let (fleet, mut client, mut upstream) = through_a_fleet(&ca).await;
    client.write_all(b"half").await.unwrap();
    upstream.write_all(b"half").await.unwrap();
    upstream.flush().await.unwrap();
    arrives(&client).await;
    let mut half = [0; 4];
    soon("the half", upstream.read_exact(&mut half)).await.unwrap();
    drop(fleet);
    sees(&mut client, Leaves::ByReset).await;
    let end: io::Result<usize> = soon("the end", upstream.read(&mut half)).await;
    assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_reset_is_passed_on_as_a_reset() {
    let listener = TcpListener::bind((own_ip(), 8080)).await.unwrap();
    let proxy = Proxy::start(Role::Fleet);
    let cluster = || split([(cluster("a", &[listener.local_addr().unwrap()]), 100)]);
    proxy.serve(Protocol::Tcp(cluster())).await;
    let mut client = TcpStream::connect(proxy.address).await.unwrap();
    client.write_all(b"x").await.unwrap();
    let (mut upstream, _) = soon("the connection", listener.accept()).await.unwrap();
    upstream.read_u8().await.unwrap();
    upstream.set_zero_linger().unwrap();
    drop(upstream);
    let error = soon("the reset", client.read_u8()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    // What a WebSocket is asked for on is no different.
    proxy.serve(Protocol::http(Action::Forward { split: cluster(), policy: Arc::default() })).await;
    let application = async {
        let (mut upstream, _) = soon("the connection", listener.accept()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(upstream.read_u8().await.unwrap());
        }
        upstream
            .write_all(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n")
            .await
            .unwrap();
        upstream
    };
    let (mut client, upstream) = tokio::join!(websocket(proxy.address), application);
    upstream.set_zero_linger().unwrap();
    drop(upstream);
    let error = soon("the reset", client.read_u8()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}
