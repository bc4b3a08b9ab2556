//! The largest heads that a client may send, and an application, through both roles: what the fleet adds is no reason for its sidecar to
//! refuse them, nor the other way round.

use std::{net::SocketAddr, sync::Arc};

use http::{HeaderName, HeaderValue, Request, StatusCode};
use sluice_proxy::{
    snapshot::{
        Action, Cluster, FilterChain, HeaderChanges, Listener, PathRewrite, Policy, Protocol, Rewrite, ServerTls,
        Upstream, UpstreamProtocol,
    },
    workers::Role,
};
use tokio::io::AsyncWriteExt;

use crate::{
    downstream_http1::raw,
    support::*,
    upstream_http1::{head, upstream},
};

/// As many fields, and bytes of each, as the fleet may be told to add (`spec.service.headers`).
const ADDED: usize = 32;
const OF_EACH: usize = 1024;

/// Answers with how many fields, and bytes, a head had. Its own head has as many fields as it may, and no Date.
async fn app() -> SocketAddr {
    let (address, _) = upstream(|mut stream| async move {
        while let Some(head) = head(&mut stream).await {
            let body = format!("{} {}", head.lines().count() - 2, head.len());
            let fields = "x: y\r\n".repeat(99);
            let answer = format!("HTTP/1.1 200 OK\r\n{fields}content-length: {}\r\n\r\n{body}", body.len());
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    })
    .await;
    address
}

/// A sidecar that speaks HTTP/1.1 to its application, and a fleet that speaks `protocol` to its sidecar and adds all that it may.
async fn mesh(app: SocketAddr, protocol: UpstreamProtocol) -> (Proxy, Proxy) {
    let ca = Ca::new();
    let sidecar = sidecar(&ca, app.ip(), false).await;
    let local = Cluster {
        name: "local/8080".into(),
        upstream: Upstream::OriginalDst { port: 8080 },
        labels: None,
        protocol: UpstreamProtocol::Http1,
        ..cluster("local", &[])
    };
    let chain = FilterChain {
        server_name: Some("p8080.abc".into()),
        tls: Some(ServerTls { client_id: FLEET.into() }),
        protocol: http_to([(local, 1)]),
        idle: None,
    };
    let listener =
        Listener { name: "inbound".into(), address: sidecar.address, chains: vec![chain], max_connections: None };
    sidecar.apply([Arc::new(listener)]).await;

    let fleet = Proxy::with(Role::Fleet, ca.identity(FLEET), |_| {});
    let value = HeaderValue::from_str(&"v".repeat(OF_EACH)).unwrap();
    let write = (0..ADDED).map(|index| {
        let name = format!("{}{index:03}", "n".repeat(125));
        (HeaderName::from_bytes(name.as_bytes()).unwrap(), value.clone(), true)
    });
    let policy = Policy {
        request_headers: HeaderChanges { write: write.collect(), ..HeaderChanges::default() },
        rewrite: Some(Rewrite {
            path: Some(PathRewrite::Prefix { matched: 1, with: format!("/{}/", "p".repeat(OF_EACH)) }),
            host: None,
        }),
        ..Policy::default()
    };
    let to = Cluster { protocol, ..mesh_cluster("a", &[&sidecar]) };
    fleet.serve(Protocol::http(Action::Forward { split: split([(to, 100)]), policy: Arc::new(policy) })).await;
    (sidecar, fleet)
}

#[tokio::test]
async fn the_largest_heads_of_http1_reach_the_application() {
    for protocol in [UpstreamProtocol::Http1, UpstreamProtocol::Http2] {
        let (_sidecar, fleet) = mesh(app().await, protocol).await;
        // The fields, and the bytes of the target and of a field of each request. The head's are those below, 64 KiB at most.
        for (fields, target, value) in [(100, 1, 1), (100, 30_000, 30_000), (3, 30_000, 35_000)] {
            let others = "x: y\r\n".repeat(fields - 3);
            let request = format!(
                "GET /{} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{others}large: {}\r\n\r\n",
                "t".repeat(target),
                "l".repeat(value)
            );
            assert!(request.len() <= 64 * 1024);
            let answer = raw(fleet.address, &request).await;
            assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{}", answer.lines().next().unwrap_or_default());
            assert_eq!(answer.matches("x: y\r\n").count(), 99);
            // Without `connection`, and with those of the route and `x-forwarded-for` and `-proto`.
            let (_, body) = answer.split_once("\r\n\r\n").unwrap();
            let (got, bytes) = body.split_once(' ').unwrap();
            assert_eq!(got.parse::<usize>().unwrap(), fields - 1 + ADDED + 2);
            assert!(bytes.parse::<usize>().unwrap() > target + value + ADDED * OF_EACH + OF_EACH);
        }
    }
}

#[tokio::test]
async fn the_largest_header_lists_of_http2_reach_the_application() {
    for protocol in [UpstreamProtocol::Http1, UpstreamProtocol::Http2] {
        let (_sidecar, fleet) = mesh(app().await, protocol).await;
        let mut client = Http2::connect(fleet.address).await;
        // 34 bytes of the list each, and one that is large.
        for (small, large) in [(470, 1), (1, 16_000)] {
            let mut request = Request::get("http://a/").body(full("")).unwrap();
            for _ in 0..small {
                request.headers_mut().append("x", HeaderValue::from_static("y"));
            }
            request.headers_mut().insert("large", HeaderValue::from_str(&"l".repeat(large)).unwrap());
            let answer = client.send(request).await.unwrap();
            assert_eq!((answer.status, answer.headers.get_all("x").iter().count()), (StatusCode::OK, 99));
            // With Host, those of the route, and `x-forwarded-for` and `-proto`.
            let (got, _) = answer.body.split_once(' ').unwrap();
            assert_eq!(got.parse::<usize>().unwrap(), small + 1 + 1 + ADDED + 2);
        }
    }
}
