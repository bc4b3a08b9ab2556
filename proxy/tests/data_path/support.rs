//! Real servers, clients and certificates on loopback addresses that no other test uses.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    future::Future,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use sluice_proxy::{
    metrics::Metrics,
    overload::Overload,
    snapshot::{
        Action, ClientTls, Cluster, FilterChain, Listener, MetricLabels, Protocol, ServerTls, Snapshot, Split,
        TrafficPolicy, Upstream, UpstreamProtocol,
    },
    tls::IdentityHandle,
    workers::{Options, Role, Timing, Workers},
};
use sluice_xds::sluice::guard::v1::Outcomes;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};

pub(crate) const FLEET: &str = "spiffe://test/ns/sluice-system/sa/fleet";
pub(crate) const APP: &str = "spiffe://test/ns/shop/sa/cart";
/// Longer than anything takes here; a test that waits for it has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) type AnyBody = BoxBody<Bytes, Infallible>;

pub(crate) fn full(content: impl Into<Bytes>) -> AnyBody {
    Full::new(content.into()).boxed()
}

/// An address of 127.0.0.0/8 of this test's own, so that fixed ports cannot meet.
pub(crate) fn own_ip() -> IpAddr {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let (next, process) = (NEXT.fetch_add(1, SeqCst), std::process::id());
    let octet = |value: u32| u8::try_from(value % 250 + 1).unwrap();
    Ipv4Addr::new(127, octet(process), octet(process / 250 + next / 250 * 7), octet(next)).into()
}

pub(crate) async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    timeout(PATIENCE, work).await.unwrap_or_else(|_| panic!("{what} did not happen in {PATIENCE:?}"))
}

/// Waits until something is so.
pub(crate) async fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    soon(what, async {
        while !is_so() {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// A server with HTTP/1.1 and HTTP/2 on plain TCP.
pub(crate) struct App {
    pub(crate) address: SocketAddr,
    pub(crate) connections: Arc<AtomicUsize>,
    pub(crate) requests: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl App {
    pub(crate) async fn start<F, Fut>(ip: IpAddr, port: u16, handler: F) -> Self
    where
        F: Fn(Request<Incoming>) -> Fut + Clone + Send + Sync + 'static,
        Fut: Future<Output = Response<AnyBody>> + Send + 'static,
    {
        let listener = TcpListener::bind((ip, port)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (connections, requests) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (opened, served) = (connections.clone(), requests.clone());
        let task = tokio::spawn(async move {
            let mut open = tokio::task::JoinSet::new();
            loop {
                let Ok((stream, _)) = listener.accept().await else {
                    return;
                };
                stream.set_nodelay(true).unwrap();
                opened.fetch_add(1, SeqCst);
                let (handler, served) = (handler.clone(), served.clone());
                open.spawn(async move {
                    let service = service_fn(move |request| {
                        served.fetch_add(1, SeqCst);
                        let answer = handler(request);
                        async move { Ok::<_, Infallible>(answer.await) }
                    });
                    let builder = auto::Builder::new(TokioExecutor::new());
                    let _ = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).await;
                });
            }
        });
        Self { address, connections, requests, task }
    }

    /// Answers every request with its name.
    pub(crate) async fn named(name: &'static str) -> Self {
        Self::start(own_ip(), 8080, move |_| async move { Response::new(full(name)) }).await
    }

    pub(crate) fn connections(&self) -> usize {
        self.connections.load(SeqCst)
    }

    pub(crate) fn requests(&self) -> usize {
        self.requests.load(SeqCst)
    }
}

impl Drop for App {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// An application that answers a request for each permit, with its path.
pub(crate) async fn gated() -> (App, Arc<Semaphore>) {
    let gate = Arc::new(Semaphore::new(0));
    let open = gate.clone();
    let app = App::start(own_ip(), 8080, move |request: Request<Incoming>| {
        let gate = open.clone();
        async move {
            gate.acquire().await.unwrap().forget();
            Response::new(full(request.uri().path().to_owned()))
        }
    })
    .await;
    (app, gate)
}

/// Our proxy with one listener, or several.
pub(crate) struct Proxy {
    pub(crate) workers: Workers,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) overload: Overload,
    pub(crate) address: SocketAddr,
}

fn labels_of(revision: &str) -> MetricLabels {
    MetricLabels { destination_namespace: "shop".into(), destination_service: "cart".into(), revision: revision.into() }
}

impl Proxy {
    pub(crate) fn start(role: Role) -> Self {
        Self::with(role, IdentityHandle::default(), |_| {})
    }

    pub(crate) fn with(role: Role, identity: IdentityHandle, change: impl FnOnce(&mut Options)) -> Self {
        let metrics = Metrics::new("test", 2);
        let mut options = Options {
            role,
            timing: Timing::of(role),
            metrics: metrics.clone(),
            identity,
            access_log: None,
            tracer: None,
            overload: Overload::default(),
        };
        options.timing.settle = Duration::ZERO;
        change(&mut options);
        let workers = Workers::start(&options).unwrap();
        Self {
            workers,
            metrics: options.metrics,
            overload: options.overload,
            address: SocketAddr::new(own_ip(), 20000),
        }
    }

    pub(crate) fn listener(&self, protocol: Protocol) -> Arc<Listener> {
        let chains = vec![FilterChain { server_name: None, tls: None, protocol, idle: None }];
        Arc::new(Listener { name: "shop/cart:80".into(), address: self.address, chains, max_connections: None })
    }

    pub(crate) async fn serve(&self, protocol: Protocol) {
        self.apply([self.listener(protocol)]).await;
    }

    pub(crate) async fn apply(&self, listeners: impl IntoIterator<Item = Arc<Listener>>) {
        let report = self.workers.apply(&snapshot(listeners)).await.unwrap();
        assert_eq!(report.rejected, []);
    }

    /// The value of the series whose line starts so.
    pub(crate) fn metric(&self, series: &str) -> u64 {
        let text = self.metrics.render();
        let line = text.lines().find_map(|line| line.strip_prefix(series));
        line.unwrap_or_else(|| panic!("{series} is missing in\n{text}")).trim().parse().unwrap()
    }

    /// What was refused for this reason at `shop/cart:80`.
    pub(crate) fn refused(&self, reason: &str) -> u64 {
        self.refused_at("shop/cart:80", reason)
    }

    /// What was refused for this reason at a listener. What has not occurred has no series.
    pub(crate) fn refused_at(&self, listener: &str, reason: &str) -> u64 {
        let series = format!("sluice_refused_total{{listener=\"{listener}\",reason=\"{reason}\"}} ");
        let text = self.metrics.render();
        text.lines().find_map(|line| line.strip_prefix(&series)).map_or(0, |value| value.parse().unwrap())
    }

    /// Requests of a revision of `shop/cart` whose duration was measured.
    pub(crate) fn measured(&self, revision: &str) -> u64 {
        self.metric(&format!(
            "sluice_request_duration_seconds_count{{destination_namespace=\"shop\",destination_service=\"cart\",\
             revision=\"{revision}\"}}"
        ))
    }

    /// What the guard hears of a revision of `shop/cart`.
    pub(crate) fn outcomes(&self, revision: &str, slow_above: Duration) -> Outcomes {
        self.metrics.outcomes(&labels_of(revision), slow_above)
    }

    /// Requests of a revision of `shop/cart` that are under way.
    pub(crate) fn under_way(&self, revision: &str) -> u64 {
        self.metrics.under_way(&labels_of(revision))
    }

    /// Requests of a revision of `shop/cart`.
    pub(crate) fn counted(&self, revision: &str, class: &str, grpc: &str) -> u64 {
        self.metric(&format!(
            "sluice_requests_total{{destination_namespace=\"shop\",destination_service=\"cart\",\
             revision=\"{revision}\",code_class=\"{class}\",grpc_status=\"{grpc}\"}}"
        ))
    }
}

pub(crate) fn snapshot(listeners: impl IntoIterator<Item = Arc<Listener>>) -> Snapshot {
    let listeners: BTreeMap<_, _> = listeners.into_iter().map(|l| (l.name.clone(), l)).collect();
    Snapshot { listeners }
}

pub(crate) fn cluster(revision: &str, endpoints: &[SocketAddr]) -> Cluster {
    let mut endpoints = endpoints.to_vec();
    endpoints.sort();
    Cluster {
        name: format!("shop/cart:80/{revision}"),
        labels: Some(MetricLabels {
            destination_namespace: "shop".into(),
            destination_service: "cart".into(),
            revision: revision.into(),
        }),
        upstream: Upstream::Endpoints(endpoints),
        near: Vec::new(),
        tls: None,
        protocol: UpstreamProtocol::Downstream,
        connect_timeout: Duration::from_secs(1),
        traffic: TrafficPolicy::default(),
    }
}

pub(crate) fn split(targets: impl IntoIterator<Item = (Cluster, u32)>) -> Split {
    let targets = targets.into_iter().map(|(cluster, weight)| (Arc::new(cluster), weight));
    Split { targets: targets.collect(), mirrors: Vec::new() }
}

pub(crate) fn http_to(targets: impl IntoIterator<Item = (Cluster, u32)>) -> Protocol {
    Protocol::http(Action::Forward { split: split(targets), policy: Arc::default() })
}

/// A sidecar beside an application at `ip`:8080, and the cluster by which a fleet reaches it.
pub(crate) async fn sidecar(ca: &Ca, ip: IpAddr, tcp: bool) -> Proxy {
    sidecar_of(ca.identity(APP), ip, tcp).await
}

pub(crate) async fn sidecar_of(identity: IdentityHandle, ip: IpAddr, tcp: bool) -> Proxy {
    sidecar_with(identity, ip, tcp, |_| {}).await
}

pub(crate) async fn sidecar_with(
    identity: IdentityHandle,
    ip: IpAddr,
    tcp: bool,
    change: impl FnOnce(&mut Options),
) -> Proxy {
    let mut proxy = Proxy::with(Role::Sidecar, identity, change);
    proxy.address = SocketAddr::new(ip, 20443);
    let local = split([(
        Cluster {
            name: "local/8080".into(),
            labels: None,
            upstream: Upstream::OriginalDst { port: 8080 },
            near: Vec::new(),
            tls: None,
            protocol: UpstreamProtocol::Downstream,
            connect_timeout: Duration::from_secs(1),
            traffic: TrafficPolicy::default(),
        },
        1,
    )]);
    let protocol = if tcp {
        Protocol::Tcp(local)
    } else {
        Protocol::http(Action::Forward { split: local, policy: Arc::default() })
    };
    let chains = vec![FilterChain {
        server_name: Some("p8080.abc".into()),
        tls: Some(ServerTls { client_id: FLEET.into() }),
        protocol,
        idle: None,
    }];
    let listener = Listener { name: "inbound".into(), address: proxy.address, chains, max_connections: None };
    proxy.apply([Arc::new(listener)]).await;
    proxy
}

pub(crate) fn mesh_cluster(revision: &str, sidecars: &[&Proxy]) -> Cluster {
    let endpoints: Vec<_> = sidecars.iter().map(|sidecar| sidecar.address).collect();
    Cluster { tls: Some(ClientTls { sni: "p8080.abc".into(), server_id: APP.into() }), ..cluster(revision, &endpoints) }
}

/// A certificate authority.
pub(crate) struct Ca {
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
    root_pem: String,
}

impl Ca {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.distinguished_name.push(DnType::CommonName, "test root");
        let key = KeyPair::generate().unwrap();
        let root = params.self_signed(&key).unwrap();
        let (root, root_pem) = (root.der().clone(), root.pem());
        Self { issuer: Issuer::new(params, key), root, root_pem }
    }

    pub(crate) fn issue(
        &self,
        id: &str,
        change: impl FnOnce(&mut CertificateParams),
    ) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        (vec![certificate.der().clone()], key)
    }

    pub(crate) fn roots(&self) -> Vec<CertificateDer<'static>> {
        vec![self.root.clone()]
    }

    pub(crate) fn root_pem(&self) -> &str {
        &self.root_pem
    }

    pub(crate) fn identity(&self, id: &str) -> IdentityHandle {
        let handle = IdentityHandle::default();
        self.renew(&handle, id);
        handle
    }

    pub(crate) fn renew(&self, handle: &IdentityHandle, id: &str) {
        let (chain, key) = self.issue(id, |_| {});
        handle.set(chain, key, self.roots()).unwrap();
    }
}

/// An answer, read whole.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
    pub(crate) trailers: Option<HeaderMap>,
}

impl Answer {
    async fn read(response: Response<Incoming>) -> Result<Self, hyper::Error> {
        let (parts, body) = response.into_parts();
        let body = soon("the end of the body", body.collect()).await?;
        let trailers = body.trailers().cloned();
        let body = String::from_utf8(body.to_bytes().to_vec()).unwrap();
        Ok(Self { status: parts.status, headers: parts.headers, body, trailers })
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

/// One kept HTTP/1.1 connection.
pub(crate) struct Http1(pub(crate) http1::SendRequest<AnyBody>);

impl Http1 {
    pub(crate) async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection.with_upgrades());
        Self(sender)
    }

    pub(crate) async fn start(&mut self, request: Request<AnyBody>) -> Result<Response<Incoming>, hyper::Error> {
        soon("a free connection", self.0.ready()).await?;
        soon("an answer", self.0.send_request(request)).await
    }

    pub(crate) async fn send(&mut self, request: Request<AnyBody>) -> Result<Answer, hyper::Error> {
        Answer::read(self.start(request).await?).await
    }

    pub(crate) async fn get(&mut self, path: &str) -> Answer {
        self.send(get(path)).await.unwrap()
    }
}

/// One HTTP/2 connection with prior knowledge.
#[derive(Clone)]
pub(crate) struct Http2(pub(crate) http2::SendRequest<AnyBody>);

impl Http2 {
    pub(crate) async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let (sender, connection) =
            http2::Builder::new(TokioExecutor::new()).handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        Self(sender)
    }

    pub(crate) async fn start(&mut self, request: Request<AnyBody>) -> Result<Response<Incoming>, hyper::Error> {
        soon("an answer", self.0.send_request(request)).await
    }

    pub(crate) async fn send(&mut self, request: Request<AnyBody>) -> Result<Answer, hyper::Error> {
        Answer::read(self.start(request).await?).await
    }
}

pub(crate) fn get(path: &str) -> Request<AnyBody> {
    Request::builder().uri(path).header("host", "cart.shop").body(full("")).unwrap()
}

pub(crate) fn post(path: &str, body: impl Into<Bytes>) -> Request<AnyBody> {
    Request::builder().method(Method::POST).uri(path).header("host", "cart.shop").body(full(body)).unwrap()
}

/// A gRPC call, as far as a proxy sees it.
pub(crate) fn call(path: &str) -> Request<AnyBody> {
    Request::builder()
        .method(Method::POST)
        .uri(format!("http://cart.shop{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(full("message"))
        .unwrap()
}

/// What the access log writes.
#[derive(Clone, Default)]
pub(crate) struct Lines(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        std::io::Write::write(&mut *self.0.lock().unwrap(), data)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Lines {
    /// Waits until so many lines are written.
    pub(crate) async fn wait_for(&self, count: usize) -> Vec<serde_json::Value> {
        let read = || String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        eventually("the lines", || read().lines().count() >= count).await;
        read().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

/// Which requests an application got, for looking at afterwards.
pub(crate) type Seen = Arc<Mutex<Vec<HeaderMap>>>;

/// Echoes bytes after a switch to WebSocket.
pub(crate) async fn websocket_echo(ip: IpAddr) -> App {
    App::start(ip, 8080, |mut request| async move {
        if !request.headers().contains_key("upgrade") {
            return Response::new(full("plain"));
        }
        tokio::spawn(async move {
            let mut stream = TokioIo::new(hyper::upgrade::on(&mut request).await.unwrap());
            let mut buffer = [0; 1024];
            while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                stream.write_all(&buffer[..read]).await.unwrap();
            }
            stream.write_all(b"bye").await.unwrap();
            stream.shutdown().await.unwrap();
        });
        Response::builder()
            .status(101)
            .header("connection", "upgrade")
            .header("upgrade", "websocket")
            .body(full(""))
            .unwrap()
    })
    .await
}

/// A connection that was switched to WebSocket.
pub(crate) async fn websocket(address: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = "GET / HTTP/1.1\r\nhost: a\r\nconnection: keep-alive, Upgrade\r\nupgrade: WebSocket\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(soon("the switch", stream.read_u8()).await.unwrap());
    }
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 101") && answer.contains("upgrade: websocket"), "{answer}");
    stream
}

/// What is sent on a tunnel comes back on it.
pub(crate) async fn echoes(tunnel: &mut (impl AsyncRead + AsyncWrite + Unpin)) {
    tunnel.write_all(b"ping").await.unwrap();
    let mut back = [0; 4];
    soon("the echo", tunnel.read_exact(&mut back)).await.unwrap();
    assert_eq!(&back, b"ping");
}

/// Kinds of the kernel's timers.
pub(crate) const KEEPALIVE: &str = "02";
pub(crate) const CLOSED_WINDOW: &str = "04";

/// The kernel's timer of a connection to this address: its kind, and in how many seconds it is due (proc_net_tcp).
pub(crate) fn kernel_timer(to: SocketAddr) -> Option<(String, u64)> {
    let IpAddr::V4(ip) = to.ip() else { panic!("{to}") };
    let remote = format!("{:08X}:{:04X}", u32::from_ne_bytes(ip.octets()), to.port());
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    table.lines().find_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let (kind, ticks) = fields.get(5)?.split_once(':')?;
        let due = u64::from_str_radix(ticks, 16).unwrap() / 100;
        (fields[2] == remote && fields[3] == "01").then(|| (kind.to_owned(), due))
    })
}
