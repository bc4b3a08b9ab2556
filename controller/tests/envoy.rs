//! A stock Envoy as a client of our xDS server: it takes what our own proxies take, and follows a change of weights. The
//! binary comes from `tests/envoy`; where it cannot be had, the tests say so and pass. So does gRPC's own client (`grpc`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "envoy/grpc.rs"]
mod grpc;

use std::{
    collections::BTreeMap,
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use axum::{Router, routing::get};
use jiff::Timestamp;
use prost::Message;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType};
use rustls::{RootCertStore, ServerConfig, server::WebPkiClientVerifier};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sluice_controller::{
    ads::{Ads, Leadership, Members},
    cache::{CanaryKey, Touches},
    identity::{Peer, PeerIdentity},
    mesh::{Inputs, Limits, RevisionFacts, RevisionKey, Settings, Snapshot, build, ports::PortKey, wanted_ports},
};
use sluice_crds::{Backend, Traffic};
use sluice_xds::{
    PodSubject, TypeUrl,
    envoy::{
        config::{cluster::v3::Cluster, core::v3::Node, listener::v3::Listener},
        extensions::transport_sockets::tls::v3::Secret,
    },
    unpack,
};
use tokio::{
    net::{TcpListener, TcpStream},
    process::{Child, Command},
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::TcpListenerStream;

/// For everything that should take milliseconds.
const PATIENCE: Duration = Duration::from_secs(30);
const FLEET_UID: &str = "fleet-1-uid";
/// Where sidecars listen, on an address that nobody else on this machine uses.
const SIDECAR: &str = "127.83.19.7:20443";

/// The Envoy to test with; `None`, loudly, if there is none.
async fn envoy() -> Option<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/envoy");
    let output = Command::new(script).output().await.expect("tests/envoy is there");
    if output.status.success() {
        return Some(String::from_utf8(output.stdout).unwrap().trim().into());
    }
    eprintln!("SKIPPED: no stock Envoy could be installed: {}", String::from_utf8_lossy(&output.stderr));
    None
}

#[tokio::test]
async fn a_stock_envoy_follows_the_weights() {
    let Some(binary) = envoy().await else { return };
    let pki = Pki::new();
    serve_sidecar(&pki).await;
    for variant in ["GRPC", "DELTA_GRPC"] {
        let shop = Shop::new().await;
        let server = Server::start(shop.snapshot("original", None, 0)).await;
        let mut running = Running::start(&binary, &server, &pki, variant).await;

        server.acknowledged(&mut running, "original", None, 0).await;
        assert_eq!(shop.split(&shop.http, 50).await, split(&[("original", 50)]), "{variant}");
        assert_eq!(status(&shop.canary).await, 503, "{variant}: nothing is behind -canary");
        assert_eq!(shop.split(&shop.opaque, 5).await, split(&[("original", 5)]), "{variant}: bytes pass");

        server.publish(shop.snapshot("original", Some("bbb"), 30));
        server.acknowledged(&mut running, "original", Some("bbb"), 30).await;
        let found = shop.split(&shop.http, 1000).await;
        // Four standard deviations of 1000 draws at 30 percent.
        assert!((242..=358).contains(&found["bbb"]), "{variant}: {found:?}");
        assert_eq!(shop.split(&shop.canary, 5).await, split(&[("bbb", 5)]), "{variant}");

        server.publish(shop.snapshot("original", Some("bbb"), 100));
        server.acknowledged(&mut running, "original", Some("bbb"), 100).await;
        assert_eq!(shop.split(&shop.http, 50).await, split(&[("bbb", 50)]), "{variant}");

        server.publish(shop.snapshot("original", Some("bbb"), 0));
        server.acknowledged(&mut running, "original", Some("bbb"), 0).await;
        assert_eq!(shop.split(&shop.http, 50).await, split(&[("original", 50)]), "{variant}");

        // Nobody names the revision any more: its clusters go, and what serves is not disturbed.
        server.publish(shop.snapshot("original", None, 0));
        server.acknowledged(&mut running, "original", None, 0).await;
        assert_eq!(shop.split(&shop.http, 50).await, split(&[("original", 50)]), "{variant}");
        assert_eq!(status(&shop.canary).await, 503, "{variant}");
        running.stop().await;
    }
}

/// The sidecar view cannot be lived in by a stock Envoy without a redirected connection (ORIGINAL_DST), but it can be
/// judged: Envoy checks every field and every reference.
#[tokio::test]
async fn a_stock_envoy_finds_nothing_wrong_with_what_sidecars_are_told() {
    let Some(binary) = envoy().await else { return };
    let pki = Pki::new();
    let mut shop = Shop::new().await;
    shop.opaque_target = 3306;
    for loopback in [false, true] {
        shop.facts.loopback = loopback;
        let snapshot = shop.snapshot("bbb", None, 0);
        let view = snapshot.sidecars.values().next().expect("the revision has a view");
        let bootstrap = Bootstrap {
            node: Some(Node { id: "web".into(), cluster: "shop".into(), ..Node::default() }),
            static_resources: Some(StaticResources {
                listeners: view.of(TypeUrl::Listener).map(|(_, one)| unpack::<Listener>(&one.body).unwrap()).collect(),
                clusters: view.of(TypeUrl::Cluster).map(|(_, one)| unpack::<Cluster>(&one.body).unwrap()).collect(),
                secrets: pki.secrets(),
            }),
        };
        assert_eq!(bootstrap.static_resources.as_ref().unwrap().listeners[0].filter_chains.len(), 2);
        let folder = Folder::new();
        let path = folder.0.join("sidecar.pb");
        fs::write(&path, bootstrap.encode_to_vec()).unwrap();
        let output = Command::new(&binary).args(["--mode", "validate", "-c"]).arg(&path).output().await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

/// `envoy.config.bootstrap.v3.Bootstrap`, as far as we need it.
#[derive(Clone, PartialEq, Message)]
struct Bootstrap {
    #[prost(message, optional, tag = "1")]
    node: Option<Node>,
    #[prost(message, optional, tag = "2")]
    static_resources: Option<StaticResources>,
}

#[derive(Clone, PartialEq, Message)]
struct StaticResources {
    #[prost(message, repeated, tag = "1")]
    listeners: Vec<Listener>,
    #[prost(message, repeated, tag = "2")]
    clusters: Vec<Cluster>,
    #[prost(message, repeated, tag = "3")]
    secrets: Vec<Secret>,
}

fn split(pairs: &[(&str, usize)]) -> BTreeMap<String, usize> {
    pairs.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
}

async fn status(address: &SocketAddr) -> u16 {
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    client.get(format!("http://{address}/")).send().await.unwrap().status().as_u16()
}

/// One Canary with two ports, whose original Pod really listens.
struct Shop {
    original: SocketAddr,
    opaque_target: u16,
    http: SocketAddr,
    opaque: SocketAddr,
    canary: SocketAddr,
    ports: Vec<u16>,
    facts: RevisionFacts,
    /// The address of the Pod of revision `bbb`.
    sidecar: &'static str,
}

impl Shop {
    async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let original = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, answers("original")).await });
        Self::at(original).await
    }

    /// With an original Pod of the caller's own.
    async fn at(original: SocketAddr) -> Self {
        let mut ports = Vec::new();
        let mut held = Vec::new();
        for _ in 0..6 {
            let free = TcpListener::bind("0.0.0.0:0").await.unwrap();
            ports.push(free.local_addr().unwrap().port());
            held.push(free);
        }
        let at = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
        let facts = RevisionFacts { service_account: "web".to_owned(), ..RevisionFacts::default() };
        // In the order of `wanted_ports`: web, web-canary, web-primary, each with 80 and 81.
        let opaque_target = original.port();
        let (sidecar, _) = SIDECAR.split_once(':').unwrap();
        let (http, opaque, canary) = (at(ports[0]), at(ports[1]), at(ports[2]));
        Self { original, opaque_target, http, opaque, canary, ports, facts, sidecar }
    }

    fn snapshot(&self, primary: &str, canary: Option<&str>, weight: i32) -> Snapshot {
        let mut inputs = Inputs::empty(settings());
        inputs.canaries = vec![read(json!({
            "apiVersion": "sluice.dev/v1beta1", "kind": "Canary", "metadata": {"namespace": "shop", "name": "web"},
            "spec": {
                "targetRef": {"kind": "Deployment", "name": "web"}, "skipAnalysis": true,
                "service": {"port": 80, "targetPort": self.original.port()},
            },
            "status": {"traffic": {"primary": primary, "canary": canary, "weight": weight}},
        }))];
        inputs.services = ["web", "web-primary", "web-canary"]
            .into_iter()
            .map(|name| {
                let labels = if name == "web" { json!({}) } else { json!({"sluice.dev/canary": "web"}) };
                read(json!({
                    "metadata": {"namespace": "shop", "name": name, "labels": labels},
                    "spec": {"ports": [
                        {"port": 80, "name": "http", "targetPort": self.original.port()},
                        {"port": 81, "name": "mysql", "targetPort": self.opaque_target},
                        {"port": 82, "name": "unused", "protocol": "UDP"},
                    ]},
                }))
            })
            .collect();
        let pod = |name: &str, ip: &str, labels: Value, namespace: &str| {
            read(json!({
                "metadata": {"namespace": namespace, "name": name, "uid": format!("{name}-uid"), "labels": labels},
                "status": {"phase": "Running", "podIP": ip, "conditions": [{"type": "Ready", "status": "True"}]},
            }))
        };
        inputs.pods = vec![
            pod("web-bbb", self.sidecar, json!({"sluice.dev/canary": "web", "sluice.dev/revision": "bbb"}), "shop"),
            pod("fleet-1", "127.0.0.1", json!({"sluice.dev/fleet": "default"}), "sluice-system"),
        ];
        let key = CanaryKey::new("shop", "web");
        inputs.originals.insert(key.clone(), vec![pod("web", "127.0.0.1", json!({}), "shop")]);
        inputs.revisions.insert(RevisionKey { canary: key, revision: "bbb".to_owned() }, self.facts.clone());
        let wanted: Vec<PortKey> = wanted_ports(&inputs).into_keys().collect();
        assert_eq!(wanted.len(), self.ports.len());
        inputs.ports = wanted.into_iter().zip(self.ports.iter().copied()).collect();
        build(&inputs)
    }

    /// Who answers so many requests, each on a connection of its own.
    async fn split(&self, address: &SocketAddr, requests: usize) -> BTreeMap<String, usize> {
        let client = reqwest::Client::builder().no_proxy().pool_max_idle_per_host(0).build().unwrap();
        let mut answers = BTreeMap::new();
        for _ in 0..requests {
            let answer = client.get(format!("http://{address}/")).send().await.unwrap();
            let (status, text) = (answer.status(), answer.text().await.unwrap());
            assert_eq!(status, 200, "{text}");
            *answers.entry(text).or_insert(0) += 1;
        }
        answers
    }
}

fn read<T: DeserializeOwned>(value: Value) -> Arc<T> {
    Arc::new(serde_json::from_value(value).unwrap())
}

fn answers(who: &'static str) -> Router {
    Router::new().route("/", get(move || async move { who }))
}

fn settings() -> Arc<Settings> {
    Arc::new(Settings {
        fleet_id: "spiffe://cluster.local/ns/sluice-system/sa/sluice-fleet".parse().unwrap(),
        fleet: "default".to_owned(),
        release_namespace: "sluice-system".to_owned(),
        watched_namespace: None,
        limits: Limits { connections: Some(4096), requests: Some(2048), stream_idle: Some(3600) },
    })
}

/// Our xDS server, without TLS: whoever comes is the member of the fleet.
struct Server {
    address: SocketAddr,
    snapshots: watch::Sender<Arc<Snapshot>>,
    members: Arc<Members>,
}

struct Leads(watch::Receiver<Option<u64>>);

impl Leadership for Leads {
    fn term(&self) -> watch::Receiver<Option<u64>> {
        self.0.clone()
    }
    fn may_write(&self) -> bool {
        self.0.borrow().is_some()
    }
    fn raise(&self, _: u64) {}
    fn leader(&self) -> Option<String> {
        None
    }
    fn give_up(&self) -> bool {
        false
    }
}

impl Server {
    async fn start(snapshot: Snapshot) -> Self {
        let (snapshots, receiver) = watch::channel(Arc::new(snapshot));
        let members = Members::new(receiver.clone(), Touches::default(), Duration::from_secs(60));
        let (term, leads) = watch::channel(Some(1));
        let ads = Ads::new(settings(), receiver, members.clone(), Arc::new(Leads(leads)), "controller-1");
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let pod = PodSubject { namespace: "sluice-system".into(), pod: "fleet-1".into(), uid: FLEET_UID.into() };
        let identity = PeerIdentity {
            id: settings().fleet_id.clone(),
            pod,
            expires: Timestamp::now() + jiff::SignedDuration::from_hours(1),
        };
        let layer = tonic::service::InterceptorLayer::new(move |mut request: tonic::Request<()>| {
            let identity = Some(identity.clone());
            request.extensions_mut().insert(Peer { address: ([127, 0, 0, 1], 1).into(), identity });
            Ok(request)
        });
        tokio::spawn(async move {
            let _term = term;
            tonic::transport::Server::builder()
                .layer(layer)
                .add_service(ads.server())
                .serve_with_incoming(TcpListenerStream::new(listener))
                .await
        });
        Self { address, snapshots, members }
    }

    fn publish(&self, snapshot: Snapshot) {
        self.snapshots.send_replace(Arc::new(snapshot));
    }

    /// Waits until the Envoy has acknowledged this traffic.
    async fn acknowledged(&self, envoy: &mut Running, primary: &str, canary: Option<&str>, weight: i32) {
        let traffic = Traffic {
            primary: Backend(primary.to_owned()),
            canary: canary.map(|name| Backend(name.to_owned())),
            weight,
            mirror: 0,
            matches: None,
        };
        let deadline = Instant::now() + PATIENCE;
        loop {
            let fleet = self.members.fleet(&CanaryKey::new("shop", "web"));
            assert_eq!(fleet.rejected, None);
            if fleet.effective.as_ref() == Some(&traffic) {
                return;
            }
            assert!(Instant::now() < deadline, "{traffic:?} was not acknowledged: {fleet:?}\n{}", envoy.log());
            sleep(Duration::from_millis(10)).await;
        }
    }
}

/// A folder that goes with its owner.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("sluice-envoy-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

struct Running {
    child: Child,
    folder: Folder,
}

impl Running {
    async fn start(binary: &Path, server: &Server, pki: &Pki, variant: &str) -> Self {
        let folder = Folder::new();
        let bootstrap = json!({
            "node": {"id": "fleet-1", "cluster": "default"},
            "dynamic_resources": {
                "ads_config": {
                    "api_type": variant, "transport_api_version": "V3",
                    "grpc_services": [{"envoy_grpc": {"cluster_name": "sluice"}}],
                },
                "cds_config": {"ads": {}, "resource_api_version": "V3"},
                "lds_config": {"ads": {}, "resource_api_version": "V3"},
            },
            "static_resources": {
                "clusters": [{
                    "name": "sluice", "type": "STATIC", "connect_timeout": "1s",
                    "typed_extension_protocol_options": {
                        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                            "explicit_http_config": {"http2_protocol_options": {}},
                        },
                    },
                    "load_assignment": {"cluster_name": "sluice", "endpoints": [{"lb_endpoints": [{"endpoint": {
                        "address": {"socket_address": {
                            "address": server.address.ip().to_string(), "port_value": server.address.port(),
                        }},
                    }}]}]},
                }],
                "secrets": [
                    {"name": "default", "tls_certificate": {
                        "certificate_chain": {"inline_string": pki.client.0},
                        "private_key": {"inline_string": pki.client.1},
                    }},
                    {"name": "ROOTCA", "validation_context": {"trusted_ca": {"inline_string": pki.root}}},
                ],
            },
        });
        let path = folder.0.join("bootstrap.json");
        fs::write(&path, bootstrap.to_string()).unwrap();
        let log = fs::File::create(folder.0.join("log")).unwrap();
        let child = Command::new(binary)
            .args(["--concurrency", "1", "--disable-hot-restart", "--log-level", "info", "-c"])
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        Self { child, folder }
    }

    /// The end of what it said.
    fn log(&mut self) -> String {
        let text = fs::read_to_string(self.folder.0.join("log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let exit = self.child.try_wait();
        format!("exit {exit:?}\n{}", lines[lines.len().saturating_sub(30)..].join("\n"))
    }

    async fn stop(mut self) {
        self.child.kill().await.unwrap();
    }
}

/// A CA, the certificate of the revision's sidecars, and that of the fleet, PEM.
struct Pki {
    root: String,
    root_der: CertificateDer<'static>,
    server: (CertificateDer<'static>, PrivateKeyDer<'static>),
    client: (String, String),
}

impl Pki {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // With equal subjects, BoringSSL takes a leaf for self-signed.
        params.distinguished_name.push(DnType::CommonName, "root");
        let root = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let leaf = |id: &str| {
            let mut params = CertificateParams::default();
            params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
            let key = KeyPair::generate().unwrap();
            (params.signed_by(&key, &root).unwrap(), key)
        };
        let (server, server_key) = leaf("spiffe://cluster.local/ns/shop/sa/web");
        let (client, client_key) = leaf("spiffe://cluster.local/ns/sluice-system/sa/sluice-fleet");
        Self {
            root: root.pem(),
            root_der: root.der().clone(),
            server: (server.der().clone(), PrivateKeyDer::Pkcs8(server_key.serialize_der().into())),
            client: (client.pem(), client_key.serialize_pem()),
        }
    }

    fn secrets(&self) -> Vec<Secret> {
        use sluice_xds::envoy::{
            config::core::v3::{DataSource, data_source::Specifier},
            extensions::transport_sockets::tls::v3::{CertificateValidationContext, TlsCertificate, secret::Type},
        };
        let text = |text: &str| Some(DataSource { specifier: Some(Specifier::InlineString(text.to_owned())) });
        let own = TlsCertificate { certificate_chain: text(&self.client.0), private_key: text(&self.client.1) };
        let roots = CertificateValidationContext { trusted_ca: text(&self.root), ..Default::default() };
        vec![
            Secret { name: "default".into(), r#type: Some(Type::TlsCertificate(own)) },
            Secret { name: "ROOTCA".into(), r#type: Some(Type::ValidationContext(roots)) },
        ]
    }
}

/// Stands for the sidecar and application of revision `bbb`: mTLS, and only with the SNI of its port.
async fn serve_sidecar(pki: &Pki) {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(pki.root_der.clone()).unwrap();
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build().unwrap();
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![pki.server.0.clone()], pki.server.1.clone_key())
        .unwrap();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let listener = TcpListener::bind(SIDECAR).await.unwrap();
    let listener = Sidecar { listener, acceptor: TlsAcceptor::from(Arc::new(config)) };
    tokio::spawn(async move { axum::serve(listener, answers("bbb")).await });
}

struct Sidecar {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl axum::serve::Listener for Sidecar {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let (stream, address) = self.listener.accept().await.unwrap();
            let handshake = timeout(PATIENCE, self.acceptor.accept(stream)).await;
            if let Ok(Ok(stream)) = handshake {
                let name = stream.get_ref().1.server_name().unwrap_or_default();
                assert!(name.starts_with('p') && name.ends_with(".bbb"), "SNI {name}");
                return (stream, address);
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}
