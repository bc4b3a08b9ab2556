//! What it takes a proxy to come to a large configuration, and to follow small changes of it.
//!
//! One process for one measurement: it is control plane, sidecars and client, and starts the proxy on the other core. So no message
//! waits for another process of ours, and times begin and end on one clock.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::PathBuf,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use memchr::memmem;
use rcgen::{Certificate, KeyPair};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sluice_controller::mesh::{Resource, View};
use sluice_xds::TypeUrl;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;

use crate::{
    certificates::{Authority, Clients},
    control::{CONTROLLER, ControlPlane},
    fleet::{self, FLEET, Fleet, Release},
    job::{PROXY_CORE, Running, counted_program, pinned},
    load::{cpu_seconds, status_kib},
    rows::Proxy,
};

/// After which a proxy that was given something to do has done all of it, also what nobody waits for.
const SETTLE: Duration = Duration::from_millis(500);
/// For an answer that should come at once.
const PATIENCE: Duration = Duration::from_secs(20);
const BEFORE: Release = Release { weight: 5, moved: false };

/// One measurement of one proxy.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Task {
    pub(crate) proxy: Proxy,
    pub(crate) envoy: PathBuf,
    pub(crate) services: usize,
    /// How many small updates are made: half of them of weights, half of endpoints.
    pub(crate) small: usize,
    /// Counts the proxy's instructions into this file.
    pub(crate) counts: Option<PathBuf>,
    pub(crate) folder: PathBuf,
}

/// What was seen.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Updated {
    /// From the moment at which the control plane has the resources until all are acknowledged and requests to the first, the middle
    /// and the last Service arrive.
    pub(crate) full_seconds: f64,
    pub(crate) full_cpu_seconds: f64,
    /// Of the proxy before it has any resource.
    pub(crate) empty_kib: f64,
    pub(crate) full_kib: f64,
    /// The most that it ever had until then.
    pub(crate) peak_kib: f64,
    /// Medians of the small updates, from the moment at which the control plane has one.
    pub(crate) weights_acknowledged_seconds: f64,
    pub(crate) endpoints_acknowledged_seconds: f64,
    /// Until a request shows it.
    pub(crate) weights_effective_seconds: f64,
    /// Of a small update, in the mean.
    pub(crate) small_cpu_seconds: f64,
    pub(crate) small_kib: f64,
}

impl Task {
    pub(crate) fn run(&self) -> anyhow::Result<Updated> {
        // Envoy, which is started by this process, does not do so itself.
        sluice_proxy::overload::raise_open_files().context("raising the limit of open files")?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(self.measure())
    }

    async fn measure(&self) -> anyhow::Result<Updated> {
        let fleet = Fleet::new(self.services)?;
        let all = fleet.view(0..self.services, BEFORE)?;
        let authority = Arc::new(Authority::new()?);
        // Those that are asked, and among them the one that is released.
        let asked = [0, self.services / 2, self.services - 1];
        let [_, released, _] = asked;
        let _sidecars = sidecars(&authority, &asked).await?;
        let mut control = ControlPlane::start(Arc::clone(&authority)).await?;
        let proxy = self.start(&authority, control.address)?;
        let pid = proxy.0.id();
        control.joined().await?;
        sleep(SETTLE).await;

        let empty_kib = status_kib(pid, "VmRSS:")?;
        let cpu = cpu_seconds(&[pid])?;
        let begin = Instant::now();
        control.update(all).await?;
        for service in asked {
            Client::new(fleet.address(service)).until(&fleet::revisions(service)).await?;
        }
        let full_seconds = begin.elapsed().as_secs_f64();
        sleep(SETTLE).await;
        let full_cpu_seconds = cpu_seconds(&[pid])? - cpu;
        let (full_kib, peak_kib) = (status_kib(pid, "VmRSS:")?, status_kib(pid, "VmHWM:")?);

        let steps = Steps::new(&fleet, released)?;
        let cpu = cpu_seconds(&[pid])?;
        let (mut weights, mut endpoints) = (Vec::new(), Vec::new());
        for step in 0..self.small / 2 {
            for (view, times) in [(steps.weight(step), &mut weights), (steps.endpoint(step), &mut endpoints)] {
                let begin = Instant::now();
                times.push(control.update(view).await?.duration_since(begin).as_secs_f64());
            }
        }
        // Not longer: what a proxy does once in a while anyway is no part of an update.
        sleep(SETTLE / 5).await;
        let small_cpu_seconds = (cpu_seconds(&[pid])? - cpu) / (self.small.max(1) as f64);
        let effective = match self.counts {
            Some(_) => Vec::new(),
            None => steps.effective(&mut control, Client::new(fleet.address(released))).await?,
        };
        sleep(SETTLE).await;
        let small_kib = status_kib(pid, "VmRSS:")?;
        self.end(proxy)?;
        Ok(Updated {
            full_seconds,
            full_cpu_seconds,
            empty_kib,
            full_kib,
            peak_kib,
            weights_acknowledged_seconds: median(weights),
            endpoints_acknowledged_seconds: median(endpoints),
            weights_effective_seconds: median(effective),
            small_cpu_seconds,
            small_kib,
        })
    }

    fn start(&self, authority: &Authority, control: SocketAddr) -> anyhow::Result<Running> {
        let mut command = match self.proxy {
            Proxy::Envoy => self.envoy(authority, control)?,
            Proxy::Sluice => self.sluice(authority, control)?,
            Proxy::Direct | Proxy::SluiceWithSidecar | Proxy::Haproxy => bail!("{:?} has no control plane", self.proxy),
        };
        Ok(Running(command.spawn().with_context(|| format!("starting {command:?}"))?))
    }

    /// As a Pod of the fleet runs it, on one thread.
    fn sluice(&self, authority: &Authority, control: SocketAddr) -> anyhow::Result<Command> {
        let (token, bundle) = (self.folder.join("token"), self.folder.join("bundle.crt"));
        fs::write(&token, "token")?;
        fs::write(&bundle, authority.root())?;
        let mut command = match &self.counts {
            Some(counts) => counted_program(PROXY_CORE, counts)?,
            None => pinned(PROXY_CORE, &std::env::current_exe()?),
        };
        command.args(["fleet", "--pod-name=fleet-1", "--workers=1"]);
        command.args(["--health-address=127.0.0.1:0", "--admin-address=127.0.0.1:0"]);
        command.arg(format!("--controller={control}")).arg(format!("--controller-id={CONTROLLER}"));
        command.arg(format!("--token={}", token.display())).arg(format!("--trust-bundle={}", bundle.display()));
        Ok(command)
    }

    fn envoy(&self, authority: &Authority, control: SocketAddr) -> anyhow::Result<Command> {
        let bootstrap = bootstrap(authority.root(), &authority.issue(FLEET)?, control);
        let config = self.folder.join("bootstrap.json");
        fs::write(&config, bootstrap.to_string())?;
        let mut command = pinned(PROXY_CORE, &self.envoy);
        command.args(["--concurrency", "1", "--disable-hot-restart", "-l", "error", "-c"]).arg(&config);
        Ok(command)
    }

    /// Whoever counts instructions writes them at the end.
    fn end(&self, mut proxy: Running) -> anyhow::Result<()> {
        if self.counts.is_some() {
            drop(proxy.0.stdin.take());
            proxy.0.wait()?;
        }
        Ok(())
    }
}

/// Our controller's resources need nothing beside: the way to it, and the proxy's certificate.
fn bootstrap(root: String, (certificate, key): &(Certificate, KeyPair), control: SocketAddr) -> Value {
    let any = |name: &str| format!("type.googleapis.com/envoy.extensions.{name}");
    let own = json!({
        "certificate_chain": {"inline_string": certificate.pem()},
        "private_key": {"inline_string": key.serialize_pem()},
    });
    let controller = json!([{"san_type": "URI", "matcher": {"exact": CONTROLLER}}]);
    json!({
        "node": {"id": "fleet-1", "cluster": "fleet"},
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC", "transport_api_version": "V3",
                "grpc_services": [{"envoy_grpc": {"cluster_name": "sluice"}}],
            },
            "cds_config": {"ads": {}, "resource_api_version": "V3"},
            "lds_config": {"ads": {}, "resource_api_version": "V3"},
        },
        "static_resources": {
            "clusters": [{
                "name": "sluice", "type": "STATIC", "connect_timeout": "10s",
                "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@type": any("upstreams.http.v3.HttpProtocolOptions"),
                    "explicit_http_config": {"http2_protocol_options": {}},
                }},
                "load_assignment": {"cluster_name": "sluice", "endpoints": [{"lb_endpoints": [{"endpoint": {
                    "address": {"socket_address": {"address": control.ip(), "port_value": control.port()}},
                }}]}]},
                "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": {
                    "@type": any("transport_sockets.tls.v3.UpstreamTlsContext"),
                    "common_tls_context": {
                        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
                        "alpn_protocols": ["h2"],
                        "tls_certificates": [own],
                        "validation_context": {
                            "trusted_ca": {"inline_string": root}, "match_typed_subject_alt_names": controller,
                        },
                    },
                }},
            }],
            "secrets": [
                {"name": "default", "tls_certificate": own},
                {"name": "ROOTCA", "validation_context": {"trusted_ca": {"inline_string": root}}},
            ],
        },
    })
}

/// The small updates of one Service: a step of its release, or one of its Pods that is replaced.
struct Steps {
    /// Its route, with what a canary gets at each step.
    routes: Vec<View>,
    /// The endpoints of its primary, after the replacement and before.
    endpoints: [View; 2],
    /// Its route where as good as all requests go to the canary, and where as good as none does. (Not all: a side without a weight is
    /// not in the route.)
    ends: [View; 2],
    revisions: [String; 2],
}

/// Of a canary, one after the other.
const WEIGHTS: [u8; 4] = [10, 20, 50, 5];
/// How often a change of weights is looked for in the answers.
const LOOKS: usize = 20;
/// By so many requests each endpoint of a revision has a connection, as good as certainly.
const WARM_UP: usize = 100;

impl Steps {
    fn new(fleet: &Fleet, service: usize) -> anyhow::Result<Self> {
        let view = |release| fleet.view(service..service + 1, release);
        let route = |weight| {
            let mut view = view(Release { weight, ..BEFORE })?;
            view.resources.retain(|kind, _| *kind == TypeUrl::Route);
            anyhow::Ok(view)
        };
        let revisions = fleet::revisions(service);
        let cluster = format!("{}/{}:80/{}", fleet::NAMESPACE, fleet::name(service), revisions[0]);
        let endpoints = |moved| {
            let view = view(Release { moved, ..BEFORE })?;
            let endpoints = view.get(TypeUrl::Endpoints, &cluster).context("the primary has no endpoints")?;
            anyhow::Ok(only(TypeUrl::Endpoints, &cluster, endpoints))
        };
        let endpoints = [endpoints(true)?, endpoints(false)?];
        let routes = WEIGHTS.into_iter().map(route).collect::<anyhow::Result<_>>()?;
        Ok(Self { routes, endpoints, ends: [route(99)?, route(1)?], revisions })
    }

    fn weight(&self, step: usize) -> View {
        self.routes[step % self.routes.len()].clone()
    }

    fn endpoint(&self, step: usize) -> View {
        self.endpoints[step % self.endpoints.len()].clone()
    }

    /// How long each of some changes of weights takes until an answer shows it. Connections to the endpoints are there before: to make
    /// them is no part of an update.
    async fn effective(&self, control: &mut ControlPlane, mut client: Client) -> anyhow::Result<Vec<f64>> {
        let [primary, canary] = self.revisions.each_ref();
        let mut times = Vec::new();
        for round in 0..1 + LOOKS / 2 {
            for (view, to) in self.ends.iter().zip([canary, primary]) {
                let begin = Instant::now();
                control.update(view.clone()).await?;
                client.until(std::slice::from_ref(to)).await?;
                if round > 0 {
                    times.push(begin.elapsed().as_secs_f64());
                    continue;
                }
                for _ in 0..WARM_UP {
                    client.until(std::slice::from_ref(to)).await?;
                }
            }
        }
        Ok(times)
    }
}

fn only(kind: TypeUrl, name: &str, resource: &Resource) -> View {
    let resources = BTreeMap::from([(kind, BTreeMap::from([(name.to_owned(), resource.clone())]))]);
    View { resources, ..View::default() }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// One kept connection to a port of the fleet.
struct Client {
    to: SocketAddr,
    stream: Option<TcpStream>,
}

impl Client {
    fn new(to: SocketAddr) -> Self {
        Self { to, stream: None }
    }

    /// Asks until one of these revisions answers.
    async fn until(&mut self, revisions: &[String]) -> anyhow::Result<()> {
        let asking = async {
            loop {
                match self.ask().await {
                    Ok(revision) if revisions.contains(&revision) => return,
                    Ok(_) => {}
                    Err(_) => {
                        self.stream = None;
                        sleep(Duration::from_millis(1)).await;
                    }
                }
            }
        };
        let asked = timeout(PATIENCE, asking).await;
        asked.with_context(|| format!("{} is not answered by {}", self.to, revisions.join(" or ")))
    }

    /// The revision that answers.
    async fn ask(&mut self) -> anyhow::Result<String> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            None => {
                let stream = TcpStream::connect(self.to).await?;
                stream.set_nodelay(true)?;
                self.stream.insert(stream)
            }
        };
        stream.write_all(b"GET /cart/items?id=1 HTTP/1.1\r\nhost: service.bench\r\n\r\n").await?;
        let mut answer = Vec::new();
        loop {
            ensure!(stream.read_buf(&mut answer).await? > 0, "the proxy closed the connection");
            let Some(end) = memmem::find(&answer, b"\r\n\r\n") else { continue };
            ensure!(answer.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&answer[..end]));
            let body = &answer[end + 4..];
            if body.len() == REVISION {
                return Ok(String::from_utf8(body.to_vec())?);
            }
            ensure!(body.len() < REVISION, "more than a revision: {}", String::from_utf8_lossy(body));
        }
    }
}

/// Length of a revision's name.
const REVISION: usize = 10;

/// Stands for all Pods of some Services, each on its own address: answers with the name of its revision.
async fn sidecars(authority: &Authority, services: &[usize]) -> anyhow::Result<JoinSet<()>> {
    let mut serving = JoinSet::new();
    for service in services {
        let acceptor = authority.acceptor(&fleet::identity(*service), "http/1.1", Clients::Known)?;
        for (index, revision) in fleet::revisions(*service).into_iter().enumerate() {
            for address in fleet::sidecars(*service, index) {
                let listener = TcpListener::bind(address).await.with_context(|| format!("listening on {address}"))?;
                serving.spawn(sidecar(listener, acceptor.clone(), revision.clone()));
            }
        }
    }
    Ok(serving)
}

async fn sidecar(listener: TcpListener, acceptor: TlsAcceptor, revision: String) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let (acceptor, revision) = (acceptor.clone(), revision.clone());
        connections.spawn(async move {
            // An error here is one at the other end, too, where it is told.
            let _ = serve(stream, &acceptor, &revision).await;
        });
    }
}

async fn serve(stream: TcpStream, acceptor: &TlsAcceptor, revision: &str) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = acceptor.accept(stream).await?;
    let asked = stream.get_ref().1.server_name().map(str::to_owned);
    ensure!(asked == Some(fleet::server_name(revision)), "asked for {asked:?}");
    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{revision}", revision.len());
    let mut request = Vec::new();
    loop {
        if stream.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
        if request.ends_with(b"\r\n\r\n") {
            request.clear();
            stream.write_all(answer.as_bytes()).await?;
            stream.flush().await?;
        }
    }
}
