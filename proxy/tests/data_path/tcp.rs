use std::net::SocketAddr;

use sluice_proxy::{snapshot::Protocol, workers::Role};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::support::*;

/// Reads to the end of the client's bytes, and only then answers with its name and their number.
async fn counts(name: &'static str, ip: std::net::IpAddr) -> SocketAddr {
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
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    assert_eq!(proxy.metric("sluice_local_errors_total{listener=\"shop/cart:80\",flag=\"UH\"}"), 1);
}

#[tokio::test]
async fn a_reset_is_passed_on_as_a_reset() {
    let listener = TcpListener::bind((own_ip(), 8080)).await.unwrap();
    let proxy = Proxy::start(Role::Fleet);
    let address = listener.local_addr().unwrap();
    proxy.serve(Protocol::Tcp(split([(cluster("a", &[address]), 100)]))).await;
    let mut client = TcpStream::connect(proxy.address).await.unwrap();
    client.write_all(b"x").await.unwrap();
    let (mut upstream, _) = soon("the connection", listener.accept()).await.unwrap();
    upstream.read_u8().await.unwrap();
    upstream.set_zero_linger().unwrap();
    drop(upstream);
    let error = soon("the reset", client.read_u8()).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}
