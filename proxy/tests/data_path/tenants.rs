//! Two Services on one proxy: whatever the clients or the application of one do, the other is served.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use sluice_proxy::{
    snapshot::{Cluster, FilterChain, Limits, Listener, TrafficPolicy},
    workers::Role,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::support::*;

/// What the Service `shop/loud` may have.
const CONNECTIONS: u64 = 8;
const REQUESTS: u32 = 4;
const HEADER: Duration = Duration::from_millis(100);

const OPEN: &str = "sluice_connections_open{listener=\"shop/loud:80\"}";
const ACTIVE: &str = "sluice_requests_active{listener=\"shop/loud:80\"}";
const UO: &str = "sluice_local_errors_total{listener=\"shop/loud:80\",flag=\"UO\"}";

/// Answers `/endless` without an end, `/never` not at all, and all else with its name.
async fn application(name: &'static str) -> App {
    App::start(own_ip(), 8080, move |request| async move {
        match request.uri().path() {
            "/endless" => {
                let frames = futures::stream::repeat_with(|| Ok(Frame::data(Bytes::from_static(&[b'x'; 16384]))));
                Response::new(StreamBody::new(frames).boxed())
            }
            "/never" => std::future::pending().await,
            _ => Response::new(full(name)),
        }
    })
    .await
}

struct Shared {
    proxy: Proxy,
    loud: SocketAddr,
    quiet: SocketAddr,
    _apps: [App; 2],
}

impl Shared {
    async fn start() -> Self {
        let apps = [application("loud").await, application("quiet").await];
        let proxy = Proxy::with(Role::Fleet, Default::default(), |options| options.timing.header = HEADER);
        let limits = Limits { requests: Some(REQUESTS), ..Limits::default() };
        let addresses = [proxy.address, SocketAddr::new(own_ip(), 20001)];
        let listener = |index: usize, name: &str, limits, max_connections| {
            let traffic = TrafficPolicy { limits, ..TrafficPolicy::default() };
            let cluster =
                Cluster { name: format!("shop/{name}:80/a"), traffic, ..cluster("a", &[apps[index].address]) };
            let chains =
                vec![FilterChain { server_name: None, tls: None, protocol: http_to([(cluster, 100)]), idle: None }];
            let (name, address) = (format!("shop/{name}:80"), addresses[index]);
            Arc::new(Listener { name, address, chains, max_connections })
        };
        let loud = listener(0, "loud", limits, Some(CONNECTIONS));
        proxy.apply([loud, listener(1, "quiet", Limits::default(), None)]).await;
        Self { proxy, loud: addresses[0], quiet: addresses[1], _apps: apps }
    }

    async fn the_other_is_served(&self) {
        let mut kept = Http1::connect(self.quiet).await;
        let mut http2 = Http2::connect(self.quiet).await;
        for _ in 0..20 {
            assert_eq!(Http1::connect(self.quiet).await.get("/").await.body, "quiet");
            assert_eq!(kept.get("/").await.body, "quiet");
            assert_eq!(http2.send(get("/")).await.unwrap().body, "quiet");
        }
    }

    /// So many connections of the loud Service that are open and served by the proxy.
    async fn connections(&self, count: u64) -> Vec<TcpStream> {
        let mut open = Vec::new();
        for number in 1..=count {
            open.push(TcpStream::connect(self.loud).await.unwrap());
            eventually("it is open", || self.proxy.metric(OPEN) == number).await;
        }
        open
    }
}

#[tokio::test]
async fn a_service_has_as_many_connections_as_it_may_on_all_threads_together_and_one_more_is_closed() {
    let shared = Shared::start().await;
    let mut open = shared.connections(CONNECTIONS).await;
    for _ in 0..100 {
        // It may be reset before the client knows that it is connected.
        if let Ok(mut more) = TcpStream::connect(shared.loud).await {
            assert!(matches!(soon("the reset", more.read(&mut [0; 8])).await, Ok(0) | Err(_)));
        }
    }
    eventually("they are counted", || shared.proxy.refused_at("shop/loud:80", "connection_limit") == 100).await;
    shared.the_other_is_served().await;
    // Who is connected is served, and so is the next one when there is room.
    open.pop();
    eventually("there is room", || shared.proxy.metric(OPEN) == CONNECTIONS - 1).await;
    assert_eq!(Http1::connect(shared.loud).await.get("/").await.body, "loud");
}

#[tokio::test]
async fn thousands_of_requests_that_are_never_answered_are_refused_beyond_a_bound() {
    let shared = Shared::start().await;
    let mut clients = Vec::new();
    for _ in 0..CONNECTIONS {
        clients.push(Http2::connect(shared.loud).await);
    }
    let asking: Vec<_> = (0..2000)
        .map(|index| {
            let mut client = clients[index % clients.len()].clone();
            tokio::spawn(async move { client.send(get("/never")).await })
        })
        .collect();
    // Each of the two threads has its part, if it has connections at all.
    eventually("all but a few are refused", || shared.proxy.metric(UO) >= 2000 - u64::from(REQUESTS)).await;
    assert!(shared.proxy.metric(ACTIVE) <= u64::from(REQUESTS));
    shared.the_other_is_served().await;
    for asking in asking {
        asking.abort();
    }
    eventually("they are over", || shared.proxy.metric(ACTIVE) == 0).await;
    assert_eq!(clients[0].send(get("/")).await.unwrap().status, StatusCode::OK);
}

#[tokio::test]
async fn heads_that_come_byte_by_byte_end_with_their_connections() {
    let shared = Shared::start().await;
    let mut open = shared.connections(CONNECTIONS).await;
    for stream in &mut open {
        stream.write_all(b"GET / HTTP/1.1\r\nhost: ").await.unwrap();
    }
    shared.the_other_is_served().await;
    eventually("they are counted", || shared.proxy.refused_at("shop/loud:80", "head_timeout") == CONNECTIONS).await;
    eventually("they are closed", || shared.proxy.metric(OPEN) == 0).await;
}

#[tokio::test]
async fn clients_that_never_read_their_answers_hold_up_nobody_else() {
    let shared = Shared::start().await;
    let mut open = shared.connections(CONNECTIONS - 1).await;
    for stream in &mut open {
        stream.write_all(b"GET /endless HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    }
    let mut http2 = Http2::connect(shared.loud).await;
    let endless = http2.start(get("/endless")).await.unwrap();
    shared.the_other_is_served().await;
    drop((endless, open));
    eventually("they are over", || shared.proxy.metric(ACTIVE) == 0).await;
}
