//! The whole binary in both roles: client, fleet proxy, sidecar, application.

use std::{
    future::poll_fn,
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use http::{Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use sluice_xds::{
    TypeUrl,
    envoy::{
        config::{
            cluster::v3::{CircuitBreakers, circuit_breakers::Thresholds},
            listener::v3::{Filter, filter::ConfigType},
        },
        extensions::filters::network::connection_limit::v3::ConnectionLimit,
    },
    pack,
    sluice::identity::v1::SignResponse,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
};
use tokio_rustls::TlsConnector;

use crate::{
    collector::{Collector, attribute},
    pki::{CONTROLLER, Ca, FLEET, Projected},
    resources::{
        cluster, endpoints, inbound, listener, local_cluster, plain_cluster, resource, route, tcp_listener, unavailable,
    },
    server::{AdsStream, Server, soon},
};

const APPLICATION: &str = "spiffe://cluster.local/ns/shop/sa/web";
const WEB: &str = "shop/web:80";
const REVISION: &str = "shop/web:80/aaaaaaaaaa";
const SERVER_NAME: &str = "p8080.aaaaaaaaaa";

/// A port that nothing listens on at this moment.
pub(crate) fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

pub(crate) struct Proxy {
    child: Child,
    health: SocketAddr,
    admin: SocketAddr,
    _projected: Projected,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Proxy {
    pub(crate) fn start(role: &str, ca: &Ca, controller: SocketAddr) -> Self {
        Self::launch(Command::new(env!("CARGO_BIN_EXE_sluice-proxy")), &[], role, ca, controller)
    }

    /// One of the fleet that sends a span of each request there.
    fn traced(ca: &Ca, controller: SocketAddr, collector: SocketAddr) -> Self {
        let tracing = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &*format!("http://{collector}")),
            // Longer than the test: they are sent when the process ends.
            ("OTEL_BSP_SCHEDULE_DELAY", "600000"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "x-token=secret"),
        ];
        Self::launch(Command::new(env!("CARGO_BIN_EXE_sluice-proxy")), &tracing, "fleet", ca, controller)
    }

    /// One of the fleet that may have so many files open.
    fn with_files(files: u32, ca: &Ca, controller: SocketAddr) -> Self {
        let mut command = Command::new("/bin/sh");
        let script = "ulimit -n \"$0\" && exec \"$@\"";
        command.args(["-c", script, &files.to_string(), env!("CARGO_BIN_EXE_sluice-proxy")]);
        Self::launch(command, &[], "fleet", ca, controller)
    }

    fn launch(mut command: Command, more: &[(&str, &str)], role: &str, ca: &Ca, controller: SocketAddr) -> Self {
        let projected = Projected::new(ca);
        projected.write_token(role);
        let health = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let admin = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let child = command
            .args([role, "--health-address", &health.to_string(), "--admin-address", &admin.to_string()])
            .env("POD_NAMESPACE", "sluice-system")
            .env("POD_NAME", format!("{role}-0"))
            .env("SLUICE_CONTROLLER", controller.to_string())
            .env("SLUICE_CONTROLLER_ID", CONTROLLER)
            .env("SLUICE_TOKEN", projected.token())
            .env("SLUICE_TRUST_BUNDLE", projected.bundle())
            .env("SLUICE_WORKERS", "2")
            .env("SLUICE_DRAIN_SECONDS", "15")
            .envs(more.iter().copied())
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        Self { child, health, admin, _projected: projected }
    }

    async fn get(&self, path: &str) -> (StatusCode, String) {
        get(self.health, path, Version::HTTP_11).await.unwrap_or_default()
    }

    pub(crate) async fn wait_for(&self, path: &str, status: StatusCode) -> String {
        soon(path, async {
            loop {
                let (found, body) = self.get(path).await;
                if found == status && !body.is_empty() {
                    return body;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await
    }

    fn terminate(&self) {
        let status = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    async fn ended(&mut self) -> Option<i32> {
        soon("the end of the process", async {
            loop {
                if let Some(status) = self.child.try_wait().unwrap() {
                    return status.code();
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await
    }
}

pub(crate) async fn get(to: SocketAddr, path: &str, version: Version) -> Option<(StatusCode, String)> {
    let io = TokioIo::new(TcpStream::connect(to).await.ok()?);
    let request = Request::get(format!("http://web.shop{path}")).header("host", "web.shop");
    let request = request.body(Full::<Bytes>::default()).unwrap();
    let response = if version == Version::HTTP_2 {
        let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.ok()?;
        tokio::spawn(connection);
        sender.send_request(request).await.ok()?
    } else {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.ok()?;
        tokio::spawn(connection);
        sender.send_request(request).await.ok()?
    };
    let status = response.status();
    let body = response.into_body().collect().await.ok()?.to_bytes();
    Some((status, String::from_utf8_lossy(&body).into_owned()))
}

/// A connection to the sidecar, as the fleet has one.
struct Kept(hyper::client::conn::http1::SendRequest<Full<Bytes>>);

impl Kept {
    async fn open(ca: &Ca, port: u16) -> Self {
        let identity = sluice_proxy::tls::IdentityHandle::default();
        let (chain, key) = ca.issue(FLEET);
        let root = CertificateDer::from_pem_slice(ca.pem.as_bytes()).unwrap();
        identity.set(chain, key, vec![root]).unwrap();
        let tls = TlsConnector::from(identity.client_config(APPLICATION, &[b"http/1.1"]));
        let tcp = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let stream = tls.connect(SERVER_NAME.try_into().unwrap(), tcp).await.unwrap();
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        Self(sender)
    }

    async fn ask(&mut self) -> Response<()> {
        let request = Request::get("/cart").header("host", "web.shop").body(Full::default()).unwrap();
        let (head, body) = self.0.send_request(request).await.unwrap().into_parts();
        body.collect().await.unwrap();
        Response::from_parts(head, ())
    }
}

/// An application that says how it was asked, in HTTP/1.1 and HTTP/2.
async fn application() -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let task = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let answer = service_fn(|request: Request<Incoming>| async move {
                let text = format!("{:?} {}", request.version(), request.uri().path());
                Ok::<_, std::convert::Infallible>(Response::new(Full::new(Bytes::from(text))))
            });
            tokio::spawn(async move {
                let http = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                let _ = http.serve_connection(TokioIo::new(stream), answer).await;
            });
        }
    });
    (address, task)
}

/// Signs what the proxies ask for, each according to its token.
pub(crate) async fn sign(server: &mut Server, ca: &Ca, count: usize) {
    for _ in 0..count {
        let (request, answer) = soon("a request to sign", server.signs.recv()).await.unwrap();
        let life = Duration::from_secs(3600);
        let id = if request.token == "fleet" { FLEET } else { APPLICATION };
        let _ = answer.send(Ok(SignResponse {
            certificate_chain_pem: ca.sign(&request.csr_der, id, life),
            trust_bundle_pem: ca.pem.clone(),
            not_before: Some(SystemTime::now().into()),
            not_after: Some((SystemTime::now() + life).into()),
        }));
    }
}

/// The streams of the fleet proxy and of the sidecar, whoever comes first.
async fn streams(server: &mut Server) -> (AdsStream, AdsStream) {
    let (mut fleet, mut sidecar) = (None, None);
    while fleet.is_none() || sidecar.is_none() {
        let mut stream = server.stream().await;
        let role = stream.request_of(TypeUrl::Cluster).await.node.unwrap().cluster;
        stream.request_of(TypeUrl::Listener).await;
        match role.as_str() {
            "fleet" => fleet = Some(stream),
            "sidecar" => sidecar = Some(stream),
            other => panic!("{other}"),
        }
    }
    (fleet.unwrap(), sidecar.unwrap())
}

#[tokio::test]
async fn a_request_goes_through_fleet_and_sidecar_to_the_application_until_both_have_drained() {
    let ca = Ca::new();
    let mut server = Server::start(&ca).await;
    let (application, _application_task) = application().await;
    let collector = Collector::start(SocketAddr::from(([127, 0, 0, 1], 0)), None).await;
    let mut fleet = Proxy::traced(&ca, server.address, collector.address);
    let mut sidecar = Proxy::start("sidecar", &ca, server.address);
    fleet.wait_for("/healthz/startup", StatusCode::OK).await;
    let reason = fleet.wait_for("/healthz/ready", StatusCode::SERVICE_UNAVAILABLE).await;
    assert!(reason.contains("certificate"), "{reason}");
    sign(&mut server, &ca, 2).await;
    let (mut to_fleet, mut to_sidecar) = streams(&mut server).await;
    let reason = fleet.wait_for("/healthz/ready", StatusCode::SERVICE_UNAVAILABLE).await;
    assert!(reason.contains("configuration"), "{reason}");

    // The sidecar view.
    let local = local_cluster(application.port());
    let (inbound_port, fleet_port) = (free_port(), free_port());
    to_sidecar.acked(TypeUrl::Cluster, vec![resource(&local.name, "1", &local)], &[]).await;
    let chains = inbound(inbound_port, &[(application.port(), SERVER_NAME)], FLEET);
    to_sidecar.acked(TypeUrl::Listener, vec![resource("inbound", "1", &chains)], &[]).await;
    sidecar.wait_for("/healthz/ready", StatusCode::OK).await;

    // The fleet view.
    let revision = cluster(REVISION, SERVER_NAME, APPLICATION);
    to_fleet.acked(TypeUrl::Cluster, vec![resource(REVISION, "1", &revision)], &[]).await;
    let pods = endpoints(REVISION, &[("127.0.0.1", inbound_port)]);
    to_fleet.acked(TypeUrl::Endpoints, vec![resource(REVISION, "1", &pods)], &[]).await;
    to_fleet.acked(TypeUrl::Listener, vec![resource(WEB, "1", &listener(WEB, fleet_port))], &[]).await;
    to_fleet.acked(TypeUrl::Route, vec![resource(WEB, "1", &route(WEB, &[(REVISION, 100)]))], &[]).await;
    fleet.wait_for("/healthz/ready", StatusCode::OK).await;
    fleet.wait_for("/healthz/live", StatusCode::OK).await;

    let service = SocketAddr::from(([127, 0, 0, 1], fleet_port));
    let ask = |version| get(service, "/cart", version);
    assert_eq!(ask(Version::HTTP_11).await, Some((StatusCode::OK, "HTTP/1.1 /cart".to_owned())));
    assert_eq!(ask(Version::HTTP_2).await, Some((StatusCode::OK, "HTTP/2.0 /cart".to_owned())));
    // The sidecar admits nobody without the fleet's certificate.
    assert_eq!(get(SocketAddr::from(([127, 0, 0, 1], inbound_port)), "/cart", Version::HTTP_11).await, None);

    let metrics = fleet.wait_for("/metrics", StatusCode::OK).await;
    for series in [
        "sluice_xds_connected 1\n",
        "sluice_certificate_expires_timestamp_seconds ",
        "sluice_certificate_lifetime_seconds ",
        "sluice_requests_total{",
    ] {
        assert!(metrics.contains(series), "{series} is not in {metrics}");
    }
    let (_, dump) = get(fleet.admin, "/config_dump", Version::HTTP_11).await.unwrap();
    let dump: serde_json::Value = serde_json::from_str(&dump).unwrap();
    assert_eq!(dump["serving"][WEB]["chains"][0]["protocol"]["http"][0]["split"][0]["weight"], 100, "{dump}");
    assert!(get(fleet.health, "/config_dump", Version::HTTP_11).await.unwrap().0 == StatusCode::NOT_FOUND);

    let mut open = Kept::open(&ca, inbound_port).await;
    assert_eq!(open.ask().await.headers().get("connection"), None);

    // preStop: not ready, but serving on, until it is told to end.
    let drain = Command::new(env!("CARGO_BIN_EXE_sluice-proxy"))
        .args(["drain", "--admin-address", &sidecar.admin.to_string()])
        .status()
        .unwrap();
    assert!(drain.success());
    assert_eq!(sidecar.get("/healthz/ready").await.0, StatusCode::SERVICE_UNAVAILABLE);
    for version in [Version::HTTP_11, Version::HTTP_2] {
        assert_eq!(ask(version).await.unwrap().0, StatusCode::OK);
    }
    let last = open.ask().await;
    assert_eq!((last.status(), last.headers()["connection"].as_bytes()), (StatusCode::OK, b"close".as_slice()));
    sidecar.terminate();
    // Its endpoint goes, so the fleet lets go of its connections, and it need not wait for the deadline.
    to_fleet.acked(TypeUrl::Endpoints, vec![resource(REVISION, "2", &endpoints(REVISION, &[]))], &[]).await;
    let begun = Instant::now();
    assert_eq!(sidecar.ended().await, Some(0));
    assert!(begun.elapsed() < Duration::from_secs(14), "it waited for the deadline");

    // Without a back end the fleet answers for itself, and ends when it is told to.
    assert_eq!(ask(Version::HTTP_11).await.unwrap().0, StatusCode::SERVICE_UNAVAILABLE);
    fleet.terminate();
    fleet.wait_for("/healthz/ready", StatusCode::SERVICE_UNAVAILABLE).await;
    assert_eq!(ask(Version::HTTP_11).await.unwrap().0, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(fleet.ended().await, Some(0));

    // Two before the drain, two during it, and two refusals.
    let spans = collector.wait_for(6).await;
    assert_eq!(attribute(&collector.resource(), "service.name"), "sluice-fleet");
    assert_eq!(attribute(&collector.resource(), "k8s.pod.name"), "fleet-0");
    assert_eq!(attribute(&collector.resource(), "k8s.namespace.name"), "sluice-system");
    assert_eq!(collector.metadata("x-token"), "secret");
    assert!(spans.iter().all(|span| attribute(&span.attributes, "url.path") == "/cart"), "{spans:?}");
}

#[tokio::test]
async fn what_drains_a_proxy_and_tells_all_of_it_is_asked_for_on_localhost_only() {
    assert!(sluice_proxy::process::admin_address().ip().is_loopback());
    let ca = Ca::new();
    let server = Server::start(&ca).await;
    let fleet = Proxy::start("fleet", &ca, server.address);
    fleet.wait_for("/healthz/startup", StatusCode::OK).await;
    let (status, dump) = get(fleet.admin, "/config_dump", Version::HTTP_11).await.unwrap();
    assert_eq!(status, StatusCode::OK);
    assert!(!dump.contains("PRIVATE"), "{dump}");
    // Reading does not change anything.
    assert_eq!(get(fleet.admin, "/drain", Version::HTTP_11).await.unwrap().0, StatusCode::METHOD_NOT_ALLOWED);
    for path in ["/config_dump", "/drain", "/ready"] {
        assert_eq!(fleet.get(path).await.0, StatusCode::NOT_FOUND, "{path} for the whole cluster");
    }
    // It listens on the one address that it was told, not on all.
    let other = SocketAddr::from(([127, 0, 0, 2], fleet.admin.port()));
    assert!(TcpStream::connect(other).await.is_err());
}

/// What it does follows from what it is asked first.
async fn half_closing(mut stream: TcpStream) {
    let mut asked = vec![0; 4096];
    let Ok(length @ 1..) = stream.read(&mut asked).await else { return };
    let answer: &[u8] = match &asked[..length] {
        [b'G', ..] => b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n",
        [b'P', ..] => b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nx",
        _ => b"x",
    };
    if !asked.starts_with(b"PUT") {
        stream.write_all(answer).await.unwrap();
    }
    if asked.starts_with(b"POST") || asked.starts_with(b"end") {
        stream.shutdown().await.unwrap();
    }
    std::future::pending::<()>().await;
}

async fn half_closing_application() -> (SocketAddr, JoinHandle<()>) {
    let application = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = application.local_addr().unwrap();
    let accepting = tokio::spawn(async move {
        while let Ok((stream, _)) = application.accept().await {
            tokio::spawn(half_closing(stream));
        }
    });
    (address, accepting)
}

/// hyperium/hyper#4085: one that is readable for ever, because its other side has ended, is not looked at for ever.
#[tokio::test]
async fn a_hundred_half_closed_connections_leave_the_workers_at_rest() {
    const OPAQUE: &str = "shop/web:81";
    let ca = Ca::new();
    let mut server = Server::start(&ca).await;
    let (address, accepting) = half_closing_application().await;
    let fleet = Proxy::start("fleet", &ca, server.address);
    sign(&mut server, &ca, 1).await;
    let mut stream = server.stream().await;
    stream.request_of(TypeUrl::Cluster).await;
    stream.request_of(TypeUrl::Listener).await;
    let (http, opaque) = (free_port(), free_port());
    stream.acked(TypeUrl::Cluster, vec![resource(REVISION, "1", &plain_cluster(REVISION))], &[]).await;
    let pods = endpoints(REVISION, &[("127.0.0.1", address.port())]);
    stream.acked(TypeUrl::Endpoints, vec![resource(REVISION, "1", &pods)], &[]).await;
    let listeners = [listener(WEB, http), tcp_listener(OPAQUE, opaque, &[(REVISION, 100)])];
    let listeners = listeners.map(|it| resource(&it.name, "1", &it)).to_vec();
    stream.acked(TypeUrl::Listener, listeners, &[]).await;
    stream.acked(TypeUrl::Route, vec![resource(WEB, "1", &route(WEB, &[(REVISION, 100)]))], &[]).await;
    fleet.wait_for("/healthz/ready", StatusCode::OK).await;

    let unfinished = |method: &str| format!("{method} / HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nx");
    // The client's side ends while the answer, the body or the tunnel is open; or the application's does.
    let kinds = [
        (http, "GET / HTTP/1.1\r\nhost: a\r\n\r\n".to_owned(), true),
        (http, unfinished("PUT"), true),
        (http, unfinished("POST"), false),
        (opaque, "hold".to_owned(), true),
        (opaque, "end".to_owned(), false),
    ];
    let mut open = Vec::new();
    for (port, bytes, ends) in kinds.iter().cycle().take(100) {
        let mut client = TcpStream::connect(("127.0.0.1", *port)).await.unwrap();
        client.write_all(bytes.as_bytes()).await.unwrap();
        if !bytes.starts_with("PUT") {
            soon("a byte of the answer", client.read_u8()).await.unwrap();
        }
        if *ends {
            client.shutdown().await.unwrap();
        }
        open.push(client);
    }
    soon("rest", async {
        let mut asleep = 0;
        while asleep < 40 {
            asleep = if is_asleep(fleet.child.id()) { asleep + 1 } else { 0 };
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    accepting.abort();
}

/// Whether no thread of a process wants the processor. One in a busy loop always does, however little it gets.
fn is_asleep(process: u32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let mut states = threads.map(|thread| {
        let stat = std::fs::read_to_string(thread.unwrap().path().join("stat")).unwrap_or_default();
        // proc_pid_stat(5): the name in parentheses may hold any of these, too.
        stat.rsplit(") ").next().and_then(|rest| rest.chars().next())
    });
    states.all(|state| state != Some('R'))
}

#[tokio::test]
async fn a_proxy_refuses_connections_before_it_is_out_of_files_and_answers_the_kubelet() {
    let ca = Ca::new();
    let mut server = Server::start(&ca).await;
    // 128 are its own, 2 are for the listener, and each connection counts twice.
    let fleet = Proxy::with_files(192, &ca, server.address);
    sign(&mut server, &ca, 1).await;
    let mut stream = server.stream().await;
    stream.request_of(TypeUrl::Cluster).await;
    stream.request_of(TypeUrl::Listener).await;
    let port = free_port();
    stream.acked(TypeUrl::Cluster, Vec::new(), &[]).await;
    stream.acked(TypeUrl::Listener, vec![resource(WEB, "1", &listener(WEB, port))], &[]).await;
    stream.acked(TypeUrl::Route, vec![resource(WEB, "1", &unavailable(WEB))], &[]).await;
    fleet.wait_for("/healthz/ready", StatusCode::OK).await;

    let service = SocketAddr::from(([127, 0, 0, 1], port));
    let mut open = Vec::new();
    for _ in 0..128 {
        // One that is refused may be reset at once.
        open.extend(TcpStream::connect(service).await);
    }
    let series = format!("sluice_refused_total{{listener=\"{WEB}\",reason=\"file_descriptors\"}} ");
    soon("the rest is refused", async {
        loop {
            let metrics = fleet.wait_for("/metrics", StatusCode::OK).await;
            let refused = metrics.lines().find_map(|line| line.strip_prefix(&series)?.parse::<u64>().ok());
            // Two threads may each take one too many.
            if refused.is_some_and(|refused| refused >= 128 - 31 - 1) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    fleet.wait_for("/healthz/live", StatusCode::OK).await;
    drop(open);
    let answer = soon("an answer", async {
        loop {
            if let Some(answer) = get(service, "/", Version::HTTP_11).await {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    assert_eq!(answer.await.0, StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn a_proxy_that_is_out_of_files_says_so_once_a_second_for_all_listeners_and_threads() {
    const OTHER: &str = "shop/web:81";
    let ca = Ca::new();
    let mut server = Server::start(&ca).await;
    let log = std::env::temp_dir().join(format!("sluice-out-of-files-{}", std::process::id()));
    let mut command = Command::new("/bin/sh");
    let script = "ulimit -n 96 && exec \"$@\" 2>\"$TO\"";
    command.args(["-c", script, "sh", env!("CARGO_BIN_EXE_sluice-proxy")]);
    let fleet = Proxy::launch(command, &[("TO", log.to_str().unwrap())], "fleet", &ca, server.address);
    sign(&mut server, &ca, 1).await;
    let mut stream = server.stream().await;
    stream.request_of(TypeUrl::Cluster).await;
    stream.request_of(TypeUrl::Listener).await;
    let ports = [(WEB, free_port()), (OTHER, free_port())];
    stream.acked(TypeUrl::Cluster, Vec::new(), &[]).await;
    let listeners = ports.map(|(name, port)| resource(name, "1", &listener(name, port)));
    stream.acked(TypeUrl::Listener, listeners.to_vec(), &[]).await;
    let routes = ports.map(|(name, _)| resource(name, "1", &unavailable(name)));
    stream.acked(TypeUrl::Route, routes.to_vec(), &[]).await;
    fleet.wait_for("/healthz/ready", StatusCode::OK).await;

    let lines = |text: &str| std::fs::read_to_string(&log).unwrap().lines().filter(|line| line.contains(text)).count();
    let said = async |text: &str| {
        soon(text, async {
            while lines(text) == 0 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    };
    // Of these there may be 128, more than there may be files.
    let mut idle = Vec::new();
    for to in [fleet.health, fleet.admin].repeat(64) {
        idle.push(TcpStream::connect(to).await.unwrap());
    }
    said("cannot accept a connection").await;
    let begun = Instant::now();
    let mut waiting = Vec::new();
    for (_, port) in ports.repeat(16) {
        waiting.push(TcpStream::connect(("127.0.0.1", port)).await.unwrap());
    }
    said("cannot accept connections").await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let found = lines("cannot accept connections");
    // As many seconds as may have begun. A single socket tries eight times in that time.
    assert!(u64::try_from(found).unwrap() <= begun.elapsed().as_secs() + 2, "{found} lines");
    drop((idle, waiting));
    std::fs::remove_file(&log).unwrap();
}

#[tokio::test]
async fn whoever_holds_connections_to_the_health_port_keeps_the_kubelet_from_nothing() {
    let ca = Ca::new();
    let server = Server::start(&ca).await;
    let fleet = Proxy::start("fleet", &ca, server.address);
    fleet.wait_for("/healthz/startup", StatusCode::OK).await;
    // Silent ones, and some that ask for more than they will ever read.
    let metrics = "GET /metrics HTTP/1.1\r\nhost: a\r\n\r\n".repeat(1000);
    let mut held = Vec::new();
    for asked in ["", &metrics].repeat(100) {
        let mut connection = TcpStream::connect(fleet.health).await.unwrap();
        // It may be closed at once.
        let _ = connection.write_all(asked.as_bytes()).await;
        held.push(connection);
    }
    let (ready, reason) = soon("an answer", fleet.get("/healthz/ready")).await;
    assert_eq!((ready, reason.contains("certificate")), (StatusCode::SERVICE_UNAVAILABLE, true), "{reason}");
    assert_eq!(soon("an answer", fleet.get("/healthz/live")).await.0, StatusCode::OK);
    assert!(soon("an answer", fleet.get("/metrics")).await.1.contains("sluice_"));
    // The first, which is silent, has given way.
    assert_eq!(soon("the end", held[0].read(&mut [0])).await.unwrap(), 0);
}

#[tokio::test]
async fn a_second_signal_ends_the_drain_at_once() {
    let ca = Ca::new();
    let mut server = Server::start(&ca).await;
    let (address, accepting) = half_closing_application().await;
    let command = Command::new(env!("CARGO_BIN_EXE_sluice-proxy"));
    let mut fleet = Proxy::launch(command, &[("SLUICE_DRAIN_SECONDS", "600")], "fleet", &ca, server.address);
    sign(&mut server, &ca, 1).await;
    let mut stream = server.stream().await;
    stream.request_of(TypeUrl::Cluster).await;
    stream.request_of(TypeUrl::Listener).await;
    let port = free_port();
    stream.acked(TypeUrl::Cluster, vec![resource(REVISION, "1", &plain_cluster(REVISION))], &[]).await;
    let pods = endpoints(REVISION, &[("127.0.0.1", address.port())]);
    stream.acked(TypeUrl::Endpoints, vec![resource(REVISION, "1", &pods)], &[]).await;
    let opaque = tcp_listener(WEB, port, &[(REVISION, 100)]);
    stream.acked(TypeUrl::Listener, vec![resource(WEB, "1", &opaque)], &[]).await;
    fleet.wait_for("/healthz/ready", StatusCode::OK).await;
    let mut client = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    client.write_all(b"hold").await.unwrap();
    assert_eq!(soon("a byte of the answer", client.read_u8()).await.unwrap(), b'x');

    fleet.terminate();
    fleet.wait_for("/healthz/ready", StatusCode::SERVICE_UNAVAILABLE).await;
    fleet.terminate();
    assert_eq!(fleet.ended().await, Some(0));
    assert!(client.read_u8().await.is_err(), "it is closed");
    accepting.abort();
}

#[tokio::test]
async fn a_proxy_that_is_short_of_memory_says_so_and_stays_alive() {
    let ca = Ca::new();
    let server = Server::start(&ca).await;
    let command = Command::new(env!("CARGO_BIN_EXE_sluice-proxy"));
    let fleet = Proxy::launch(command, &[("SLUICE_MEMORY_LIMIT_BYTES", "1")], "fleet", &ca, server.address);
    soon("the actions", async {
        while !fleet
            .wait_for("/metrics", StatusCode::OK)
            .await
            .contains("sluice_overload_action_active{action=\"reject_incoming_connections\"} 1\n")
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    fleet.wait_for("/healthz/live", StatusCode::OK).await;
    fleet.wait_for("/healthz/startup", StatusCode::OK).await;
}

/// Sends as much as it is let, and counts it.
async fn pump(mut stream: h2::SendStream<Bytes>, sent: Arc<AtomicUsize>) {
    const CHUNK: usize = 16 << 10;
    loop {
        stream.reserve_capacity(CHUNK);
        let mut room = stream.capacity();
        if room == 0 {
            let Some(Ok(more)) = poll_fn(|cx| stream.poll_capacity(cx)).await else { return };
            room = more;
        }
        let data = Bytes::from_static(&[b'x'; CHUNK]).slice(..room.min(CHUNK));
        sent.fetch_add(data.len(), SeqCst);
        if stream.send_data(data, false).is_err() {
            return;
        }
    }
}

async fn told(answering: &mut watch::Receiver<bool>) {
    let _ = answering.wait_for(|answering| *answering).await;
}

/// Takes requests, reads nothing of them, and answers them without an end as soon as it is told to.
async fn stuck_application(answering: watch::Receiver<bool>, sent: Arc<AtomicUsize>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (answering, sent) = (answering.clone(), sent.clone());
            tokio::spawn(async move {
                let mut connection = h2::server::handshake(stream).await.unwrap();
                while let Some(Ok((request, mut respond))) = connection.accept().await {
                    let (mut answering, sent) = (answering.clone(), sent.clone());
                    tokio::spawn(async move {
                        told(&mut answering).await;
                        if let Ok(content) = respond.send_response(Response::new(()), false) {
                            pump(content, sent).await;
                        }
                        drop(request);
                    });
                }
            });
        }
    });
    port
}

/// Sends requests without an end on one connection, grants any window, and reads nothing as soon as it is answered.
async fn stuck_client(to: u16, requests: usize, mut answering: watch::Receiver<bool>, sent: Arc<AtomicUsize>) {
    const LARGEST: u32 = 0x7fff_ffff;
    let Ok(stream) = TcpStream::connect(("127.0.0.1", to)).await else { return };
    let mut builder = h2::client::Builder::new();
    builder.initial_window_size(LARGEST).initial_connection_window_size(LARGEST);
    let Ok((mut sender, mut connection)) = builder.handshake::<_, Bytes>(stream).await else { return };
    let asking = async {
        let mut open = Vec::new();
        for _ in 0..requests {
            sender = sender.ready().await.ok()?;
            let request = Request::post("http://web.shop/").body(()).unwrap();
            let (answer, content) = sender.send_request(request, false).ok()?;
            open.push((answer, tokio::spawn(pump(content, sent.clone()))));
        }
        std::future::pending::<Option<()>>().await
    };
    tokio::select! {
        _ = asking => {}
        _ = &mut connection => {}
        () = told(&mut answering) => std::future::pending().await,
    }
}

/// The memory of a process without what it maps of files, in KiB (proc_pid_status(5)).
fn memory_of(process: u32) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// What is said of one Service in docs/limits.md ("The arithmetic") holds for a part of its connections and requests.
#[tokio::test]
async fn a_service_that_has_all_that_it_may_stays_within_the_memory_that_is_stated() {
    const CONNECTIONS: u32 = 16;
    const REQUESTS: u32 = 64;
    /// In KiB, of a connection, and of a request whose content, or whose content and answer, nobody takes.
    const CONNECTION: usize = 35;
    const ONE_WAY: usize = 384;
    const BOTH_WAYS: usize = 768;
    /// In KiB, for what is neither: buffers of the kernel's side of things and of the allocator.
    const MARGIN: usize = 8 << 10;
    const WINDOW: usize = 256;
    let ca = Ca::new();
    let mut server = Server::start(&ca).await;
    let command = Command::new(env!("CARGO_BIN_EXE_sluice-proxy"));
    // One thread has all of the limits.
    let fleet = Proxy::launch(command, &[("SLUICE_WORKERS", "1")], "fleet", &ca, server.address);
    sign(&mut server, &ca, 1).await;
    let mut stream = server.stream().await;
    stream.request_of(TypeUrl::Cluster).await;
    stream.request_of(TypeUrl::Listener).await;
    let (answer, answering) = watch::channel(false);
    let (sent, answered) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let mut applications = Vec::new();
    for _ in 0..8 {
        // So many that no connection's window is what stops them.
        applications.push(("127.0.0.1", stuck_application(answering.clone(), answered.clone()).await));
    }
    let mut cluster = plain_cluster(REVISION);
    let threshold = Thresholds { max_requests: Some(REQUESTS), ..Thresholds::default() };
    cluster.circuit_breakers = Some(CircuitBreakers { thresholds: vec![threshold] });
    stream.acked(TypeUrl::Cluster, vec![resource(REVISION, "1", &cluster)], &[]).await;
    let pods = endpoints(REVISION, &applications);
    stream.acked(TypeUrl::Endpoints, vec![resource(REVISION, "1", &pods)], &[]).await;
    let port = free_port();
    let mut web = listener(WEB, port);
    let limit = ConnectionLimit {
        stat_prefix: WEB.to_owned(),
        max_connections: Some(CONNECTIONS.into()),
        ..ConnectionLimit::default()
    };
    let limit = Filter { name: "limit".to_owned(), config_type: Some(ConfigType::TypedConfig(pack(&limit))) };
    web.filter_chains[0].filters.insert(0, limit);
    stream.acked(TypeUrl::Listener, vec![resource(WEB, "1", &web)], &[]).await;
    stream.acked(TypeUrl::Route, vec![resource(WEB, "1", &route(WEB, &[(REVISION, 100)]))], &[]).await;
    fleet.wait_for("/healthz/ready", StatusCode::OK).await;
    let before = memory_of(fleet.child.id());

    // More of both than there may be.
    let clients: Vec<_> = (0..CONNECTIONS + 4)
        .map(|_| tokio::spawn(stuck_client(port, REQUESTS as usize / 8, answering.clone(), sent.clone())))
        .collect();
    let all = REQUESTS as usize * WINDOW * 1024;
    let stands_still = async |count: &AtomicUsize| {
        let mut last = 0;
        loop {
            tokio::time::sleep(Duration::from_millis(500)).await;
            let now = count.load(SeqCst);
            if now == last && now >= all {
                return;
            }
            last = now;
        }
    };
    // It does hold what it may, and what has passed meanwhile the allocator gives back soon.
    let holds = async |ways: usize, of_each: usize| {
        let stated = CONNECTIONS as usize * CONNECTION + REQUESTS as usize * of_each + MARGIN;
        let grown = || memory_of(fleet.child.id()) - before;
        assert!(grown() >= REQUESTS as usize * WINDOW * ways, "{} KiB, {ways}", grown());
        soon("no more memory than is stated", async {
            while grown() > stated {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        })
        .await;
    };
    soon("what the clients send", stands_still(&sent)).await;
    holds(1, ONE_WAY).await;
    answer.send(true).unwrap();
    soon("what the applications answer", stands_still(&answered)).await;
    holds(2, BOTH_WAYS).await;

    let metrics = fleet.wait_for("/metrics", StatusCode::OK).await;
    for (series, value) in [("connections_open", CONNECTIONS), ("requests_active", REQUESTS)] {
        let line = format!("sluice_{series}{{listener=\"{WEB}\"}} {value}\n");
        assert!(metrics.contains(&line), "{line} is not in\n{metrics}");
    }
    clients.iter().for_each(|client| client.abort());
}

#[tokio::test]
async fn drain_says_so_when_there_is_no_proxy() {
    let nobody = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let output = Command::new(env!("CARGO_BIN_EXE_sluice-proxy"))
        .args(["drain", "--admin-address", &nobody.to_string()])
        .output()
        .unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("does not answer") && text.contains(&nobody.to_string()), "{text}");
}
