//! What a proxy does when it runs short of memory, with readings that the tests make up.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
};

use bytes::Bytes;
use http::StatusCode;
use sluice_proxy::{
    admin::{self, Admin, Port},
    ads::State,
    overload::{Action, Overload, Reading, Source},
    workers::{Options, Role, Timing, Workers},
};
use tokio::{io::AsyncReadExt, net::TcpStream, sync::watch};

use crate::support::*;

const SHED: &str = "sluice_local_errors_total{listener=\"shop/cart:80\",flag=\"OM\"}";
const OPEN: &str = "sluice_connections_open{listener=\"shop/cart:80\"}";

/// Per cent of the memory that are in use.
struct Made(Arc<AtomicU64>);

impl Source for Made {
    fn read(&mut self) -> Option<Reading> {
        Some(Reading { used: self.0.load(SeqCst), limit: 100 })
    }
}

/// The health port of a proxy.
async fn health(proxy: &Proxy, overload: &Overload) -> SocketAddr {
    let options = Options {
        role: Role::Fleet,
        timing: Timing::of(Role::Fleet),
        metrics: proxy.metrics.clone(),
        identity: Default::default(),
        access_log: None,
        tracer: None,
        overload: overload.clone(),
    };
    let admin = Admin {
        role: Role::Fleet,
        // Those that liveness asks; they serve nothing.
        workers: Arc::new(Workers::start(&options).unwrap()),
        metrics: proxy.metrics.clone(),
        overload: overload.clone(),
        ads: Arc::new(State::default()),
        certificate: watch::channel(None).1,
        draining: watch::Sender::new(false),
    };
    let listener = admin::listen((own_ip(), 20444).into()).unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(Arc::new(admin).serve(listener, Port::Health));
    address
}

/// What the kubelet and Prometheus see: the answers, and which actions are under way.
async fn asked(health: SocketAddr) -> (StatusCode, String, [bool; 3]) {
    let get = async |path: &str| Http1::connect(health).await.get(path).await;
    let (live, ready) = (get("/healthz/live").await.status, get("/healthz/ready").await.body);
    let metrics = get("/metrics").await.body;
    let active = Action::ALL
        .map(|action| metrics.contains(&format!("sluice_overload_action_active{{action=\"{}\"}} 1\n", action.name())));
    (live, ready, active)
}

#[tokio::test]
async fn pressure_walks_through_all_actions_and_back_while_health_and_metrics_answer() {
    let app = App::named("a").await;
    let proxy = Proxy::start(Role::Fleet);
    let (used, overload) = (Arc::new(AtomicU64::new(10)), proxy.overload.clone());
    tokio::spawn(overload.clone().watch(Made(used.clone())));
    proxy.serve(http_to([(cluster("a", &[app.address]), 100)])).await;
    let health = health(&proxy, &overload).await;
    let (live, ready, active) = asked(health).await;
    assert_eq!((live, active), (StatusCode::OK, [false; 3]));
    let is_asked = async |active: [bool; 3]| assert_eq!(asked(health).await, (live, ready.clone(), active));

    let mut kept = Http1::connect(proxy.address).await;
    let mut http2 = Http2::connect(proxy.address).await;
    assert_eq!(kept.get("/").await.header("connection"), "");
    assert_eq!(http2.send(get("/")).await.unwrap().body, "a");

    used.store(86, SeqCst);
    eventually("the first action", || overload.is_active(Action::DisableKeepalive)).await;
    is_asked([true, false, false]).await;
    let answer = kept.get("/").await;
    assert_eq!((answer.body.as_str(), answer.header("connection")), ("a", "close"));
    eventually("the idle connection of HTTP/2 is over, too", || proxy.metric(OPEN) == 0).await;
    assert!(http2.send(get("/")).await.is_err());

    used.store(93, SeqCst);
    eventually("the second action", || overload.is_active(Action::StopRequests)).await;
    is_asked([true, true, false]).await;
    let before = app.requests();
    // Its body is not waited for.
    let request = http::Request::post("/").header("host", "a").header("content-length", "100000");
    let never = http_body_util::BodyExt::boxed(http_body_util::StreamBody::new(futures::stream::pending::<
        Result<hyper::body::Frame<Bytes>, std::convert::Infallible>,
    >()));
    let answer = Http1::connect(proxy.address).await.send(request.body(never).unwrap()).await.unwrap();
    let said = (answer.status, answer.header("x-sluice-response-flag"), answer.header("connection"));
    assert_eq!(said, (StatusCode::SERVICE_UNAVAILABLE, "OM", "close"));
    let mut http2 = Http2::connect(proxy.address).await;
    let answer = http2.send(call("/")).await.unwrap();
    let said = (answer.status, answer.header("grpc-status"), answer.header("x-sluice-response-flag"));
    assert_eq!(said, (StatusCode::OK, "14", "OM"));
    assert_eq!((app.requests(), proxy.metric(SHED), proxy.refused("overload_request")), (before, 2, 2));
    // Neither revision has anything to do with it.
    assert_eq!((proxy.counted("a", "5xx", ""), proxy.counted("a", "2xx", "")), (0, 3));

    used.store(96, SeqCst);
    eventually("the third action", || overload.is_active(Action::RejectConnections)).await;
    is_asked([true, true, true]).await;
    // It may be reset before the client knows that it is connected.
    if let Ok(mut refused) = TcpStream::connect(proxy.address).await {
        assert!(matches!(soon("the reset", refused.read(&mut [0; 8])).await, Ok(0) | Err(_)));
    }
    eventually("it is counted", || proxy.refused("overload_connection") == 1).await;

    used.store(60, SeqCst);
    eventually("the end", || !overload.is_active(Action::DisableKeepalive)).await;
    is_asked([false; 3]).await;
    let mut client = Http1::connect(proxy.address).await;
    let answer = client.get("/").await;
    assert_eq!((answer.body.as_str(), answer.header("connection")), ("a", ""));
    assert_eq!(client.get("/").await.body, "a");
}

#[tokio::test]
async fn a_sidecar_that_is_short_of_memory_leaves_its_requests_to_another() {
    let ca = Ca::new();
    let (mut apps, mut sidecars) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        let ip = own_ip();
        apps.push(App::start(ip, 8080, |_| async { http::Response::new(full("hello")) }).await);
        sidecars.push(sidecar(&ca, ip, false).await);
    }
    sidecars[0].overload.observe(Some(Reading { used: 93, limit: 100 }));
    let fleet = Proxy::with(Role::Fleet, ca.identity(FLEET), |_| {});
    fleet.serve(http_to([(mesh_cluster("abc", &[&sidecars[0], &sidecars[1]]), 100)])).await;
    const SHED: &str = "sluice_local_errors_total{listener=\"inbound\",flag=\"OM\"}";
    let mut client = Http1::connect(fleet.address).await;
    soon("one is tried that has no room", async {
        // It has a series from its first connection on.
        let sheds = || sidecars[0].metrics.render().lines().any(|line| line.starts_with(SHED) && !line.ends_with(" 0"));
        while !sheds() {
            let answer = client.get("/").await;
            assert_eq!((answer.body.as_str(), answer.header("x-sluice-response-flag")), ("hello", ""));
        }
    })
    .await;
    assert_eq!(apps[0].requests(), 0);
    assert_eq!(fleet.counted("abc", "5xx", ""), 0);
}
