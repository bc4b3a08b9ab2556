//! The process: what is started, in which order, and how it ends.

use std::{collections::BTreeMap, io, net::SocketAddr, num::NonZeroUsize, path::PathBuf, sync::Arc, time::Duration};

use sluice_xds::SpiffeId;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
    task::JoinSet,
};

use crate::{
    access_log::{AccessLog, Filter},
    admin::{self, Admin, Port},
    ads::{Apply, Client, Introduction, State},
    controller::Controller,
    cut_off::renew_connections,
    identity::Renewer,
    metrics::Metrics,
    overload::{self, Memory, Overload},
    snapshot::Snapshot,
    tls::IdentityHandle,
    trace::{self, TraceError, Tracer},
    workers::{Options, Role, Timing, Workers, WorkersError},
};

/// The port of `/healthz/*` and `/metrics`.
pub const HEALTH_PORT: u16 = 20444;
/// For the spans that wait when the process ends.
const LAST_SPANS: Duration = Duration::from_secs(2);
/// The port of the admin server, on localhost.
pub const ADMIN_PORT: u16 = 20445;

/// What a proxy is told by its environment (docs/xds.md, "A proxy's environment").
#[derive(Debug, Clone, clap::Args)]
pub struct Settings {
    /// Name of this Pod; it stands in the metrics and in the controller's log.
    #[arg(long, env = "POD_NAME")]
    pub pod_name: String,

    /// The controllers, as host:port.
    #[arg(long, env = "SLUICE_CONTROLLER", value_parser = host_and_port)]
    pub controller: (String, u16),

    /// SPIFFE id of the controller.
    #[arg(long, env = "SLUICE_CONTROLLER_ID")]
    pub controller_id: SpiffeId,

    /// File of the projected service-account token.
    #[arg(long, env = "SLUICE_TOKEN", default_value = "/var/run/secrets/sluice.dev/token")]
    pub token: PathBuf,

    /// File of the trust bundle, PEM.
    #[arg(long, env = "SLUICE_TRUST_BUNDLE", default_value = "/var/run/secrets/sluice.dev/ca.crt")]
    pub trust_bundle: PathBuf,

    /// Worker threads. Default: the CPU quota of the cgroup, rounded down, at least 1; 1 for a sidecar.
    #[arg(long, env = "SLUICE_WORKERS")]
    pub workers: Option<NonZeroUsize>,

    /// Longest drain in seconds, counted from SIGTERM. Default: 60 for the fleet, 25 for a sidecar.
    #[arg(long, env = "SLUICE_DRAIN_SECONDS")]
    pub drain_seconds: Option<u64>,

    /// `json` writes a line for each request to standard output.
    #[arg(long, env = "SLUICE_ACCESS_LOG", default_value = "off", value_parser = access_log)]
    pub access_log: bool,

    /// Which requests have a line there: a JSON list of rules, of which one must match. Default: all.
    #[arg(long, env = "SLUICE_ACCESS_LOG_FILTER", default_value = "")]
    pub access_log_filter: Filter,

    /// Namespace of this Pod, for its spans.
    #[arg(long, env = "POD_NAMESPACE", default_value = "")]
    pub pod_namespace: String,

    /// Of the fleet alone.
    #[command(flatten)]
    pub tracing: trace::Settings,

    /// The zone of this Pod's node: endpoints of it are preferred where their Service asks for that. Default: not known.
    #[arg(long, env = "SLUICE_ZONE", default_value = "")]
    pub zone: String,

    /// Memory in bytes, of which the overload manager takes care in place of the cgroup's limit. Default: the cgroup's; without
    /// one nothing is done.
    #[arg(long, env = "SLUICE_MEMORY_LIMIT_BYTES")]
    pub memory_limit_bytes: Option<u64>,

    /// Address of `/healthz/*` and `/metrics`. Default: port 20444 of every address.
    #[arg(long, hide = true)]
    pub health_address: Option<SocketAddr>,

    /// Address of the admin server. Default: port 20445 on localhost.
    #[arg(long, hide = true)]
    pub admin_address: Option<SocketAddr>,
}

fn host_and_port(text: &str) -> Result<(String, u16), String> {
    let parsed = text.rsplit_once(':').and_then(|(host, port)| {
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let port = port.parse::<u16>().ok().filter(|port| *port != 0)?;
        (!host.is_empty()).then(|| (host.to_owned(), port))
    });
    parsed.ok_or_else(|| "it must be host:port, for example sluice-controller.sluice-system.svc:18000".to_owned())
}

fn access_log(text: &str) -> Result<bool, String> {
    match text {
        "json" => Ok(true),
        "" | "off" => Ok(false),
        _ => Err("it must be json or off".to_owned()),
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    #[error(transparent)]
    Workers(#[from] WorkersError),
    #[error("cannot start the access log: {0}")]
    AccessLog(#[source] io::Error),
    #[error(transparent)]
    Trace(#[from] TraceError),
    #[error("cannot listen on {address} for {what}: {source}; is another proxy running in this Pod?")]
    Listen { address: String, what: &'static str, source: io::Error },
    #[error("cannot watch signals: {0}")]
    Signals(#[source] io::Error),
    #[error("a task of the control thread has ended: {0}")]
    Task(String),
}

/// What asks the process to end.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn watch() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Waits for the next one. Cancellation-safe, as [`Signal::recv`] is.
    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Runs a proxy until SIGTERM or SIGINT, drains it until it is done or is asked again, and returns.
///
/// # Errors
/// When it cannot start, or a part that must run for ever has ended.
pub async fn run(role: Role, settings: Settings) -> Result<(), ProcessError> {
    let mut signals = Signals::watch().map_err(ProcessError::Signals)?;

    let threads = worker_count(role, settings.workers);
    let metrics = Metrics::new(settings.pod_name.clone(), threads.get());
    let identity = IdentityHandle::default();
    let access_log = if settings.access_log {
        let log = AccessLog::stdout(Arc::clone(&metrics)).map_err(ProcessError::AccessLog)?;
        Some(log.filtered(settings.access_log_filter.clone()))
    } else {
        None
    };
    let tracer = tracer(role, &settings, &metrics)?;
    let mut timing = Timing::of(role);
    if role == Role::Sidecar {
        // Its SIGTERM comes after the application has ended (KEP-753): nobody is to be waited for.
        timing.settle = Duration::ZERO;
    }
    let overload = match overload::raise_open_files() {
        Ok(files) => Overload::with_files(files),
        Err(error) => {
            tracing::warn!(%error, "the limit of open files cannot be raised, and connections are not bounded by it");
            Overload::default()
        }
    };
    let options = Options {
        role,
        timing,
        metrics: Arc::clone(&metrics),
        identity: identity.clone(),
        access_log,
        tracer: tracer.clone(),
        overload: overload.clone(),
    };
    let workers = Arc::new(Workers::start(&options)?);
    drop(options);

    let controller = Controller {
        host: settings.controller.0.clone(),
        port: settings.controller.1,
        id: settings.controller_id.clone(),
        trust_bundle: settings.trust_bundle.clone(),
    };
    let renewer = Renewer::new(controller.clone(), settings.token.clone(), identity);
    let state = Arc::new(State::in_zone(settings.zone.clone()));
    let admin = Arc::new(Admin {
        role,
        workers: Arc::clone(&workers),
        metrics: Arc::clone(&metrics),
        overload: overload.clone(),
        ads: Arc::clone(&state),
        certificate: renewer.current(),
        draining: watch::Sender::new(false),
    });
    let (health, local) = listen(&settings)?;
    let introduction = Introduction {
        id: settings.pod_name.clone(),
        role: match role {
            Role::Fleet => "fleet",
            Role::Sidecar => "sidecar",
        },
        least_listeners: match role {
            Role::Fleet => 0,
            Role::Sidecar => 1,
        },
    };
    let mut client =
        Client::new(controller, introduction, renewer.current(), Switch(Arc::clone(&workers)), Arc::clone(&state));
    let mut tasks = JoinSet::new();
    if role == Role::Fleet {
        client = client.reporting(metrics);
        let workers = Arc::clone(&workers);
        tasks.spawn(renew_connections(
            move || state.is_connected(),
            async move || {
                if let Err(error) = workers.announce_drain().await {
                    tracing::error!(%error, "connections cannot be asked to end");
                }
            },
        ));
    }
    tasks.spawn(Arc::clone(&admin).serve(health, Port::Health));
    tasks.spawn(Arc::clone(&admin).serve(local, Port::Admin));
    tasks.spawn(renewer.run());
    tasks.spawn(client.run());
    if let Some(memory) = Memory::find(settings.memory_limit_bytes) {
        tasks.spawn(overload.watch(memory));
    }
    tracing::info!(?role, workers = threads, pod = settings.pod_name, "started");

    tokio::select! {
        () = signals.next() => {}
        Some(ended) = tasks.join_next() => {
            // They never return, so this is a panic.
            let error = ended.err().map_or_else(String::new, |error| error.to_string());
            return Err(ProcessError::Task(error));
        }
    }
    let longest = Duration::from_secs(settings.drain_seconds.unwrap_or(match role {
        Role::Fleet => 60,
        Role::Sidecar => 25,
    }));
    tracing::info!(?longest, "asked to end: not ready any more, draining");
    admin.draining.send_replace(true);
    tokio::select! {
        drained = workers.drain(longest) => {
            let drained = drained?;
            tracing::info!(cut = drained.cut, "drained");
        }
        () = signals.next() => tracing::warn!("asked again: the drain ends now, and what is still open is cut"),
    }

    // Joins the threads, which then close what they have. A stuck one must not hold the process.
    tasks.shutdown().await;
    drop(admin);
    let ending = tokio::task::spawn_blocking(move || drop(workers));
    let _ = tokio::time::timeout(Duration::from_secs(1), ending).await;
    if let Some(tracer) = tracer {
        // On a thread of its own: the connection to the collector needs this one.
        let _ = tokio::task::spawn_blocking(move || tracer.shutdown(LAST_SPANS)).await;
    }
    Ok(())
}

fn tracer(role: Role, settings: &Settings, metrics: &Arc<Metrics>) -> Result<Option<Tracer>, TraceError> {
    let trace::Settings { otlp_endpoint, otlp_certificate, traces_sampler_arg, service_name, spans_queue } =
        settings.tracing.clone();
    let Some(endpoint) = otlp_endpoint else { return Ok(None) };
    if role == Role::Sidecar {
        tracing::warn!("OTEL_EXPORTER_OTLP_ENDPOINT is ignored: spans are made by the fleet alone");
        return Ok(None);
    }
    tracing::info!(collector = %endpoint, ratio = traces_sampler_arg, "tracing");
    let options = trace::Options {
        endpoint,
        certificate: otlp_certificate,
        ratio: traces_sampler_arg,
        queue: spans_queue,
        delay: None,
        service_name,
        pod: settings.pod_name.clone(),
        namespace: settings.pod_namespace.clone(),
    };
    Tracer::start(&options, Arc::clone(metrics)).map(Some)
}

fn listen(settings: &Settings) -> Result<(tokio::net::TcpListener, tokio::net::TcpListener), ProcessError> {
    let health = settings.health_address.unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], HEALTH_PORT)));
    let health = admin::listen(health).map_err(|source| ProcessError::Listen {
        address: health.to_string(),
        what: "health and metrics",
        source,
    })?;
    let local = settings.admin_address.unwrap_or_else(admin_address);
    let local = admin::listen(local).map_err(|source| ProcessError::Listen {
        address: local.to_string(),
        what: "the admin server",
        source,
    })?;
    Ok((health, local))
}

/// Where the admin server of a Pod is.
#[must_use]
pub fn admin_address() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], ADMIN_PORT))
}

/// The standard library takes the quota of cgroup v1 and v2 and the CPU affinity into account, rounded down
/// (`std::thread::available_parallelism`).
fn worker_count(role: Role, asked: Option<NonZeroUsize>) -> NonZeroUsize {
    asked.unwrap_or_else(|| match role {
        Role::Sidecar => NonZeroUsize::MIN,
        Role::Fleet => std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
    })
}

/// The workers, as the ADS client sees them.
struct Switch(Arc<Workers>);

impl Apply for Switch {
    async fn apply(&self, snapshot: Arc<Snapshot>) -> BTreeMap<String, String> {
        match self.0.apply(&snapshot).await {
            Ok(report) => report.rejected.into_iter().map(|it| (it.listener, it.reason)).collect(),
            // Then no listener is known to serve it, and liveness fails.
            Err(error) => snapshot.listeners.keys().map(|name| (name.clone(), error.to_string())).collect(),
        }
    }
}

/// Asks the proxy at `admin` to begin to drain, and returns when it has begun.
///
/// # Errors
/// When it does not answer within 5 s, or not as expected.
pub async fn ask_to_drain(admin: SocketAddr) -> Result<(), DrainError> {
    let asking = async {
        let stream = tokio::net::TcpStream::connect(admin).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(hyper_util::rt::TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        let request = http::Request::post("/drain")
            .header(http::header::HOST, "localhost")
            .body(http_body_util::Empty::<bytes::Bytes>::new())
            .map_err(io::Error::other)?;
        let answer = async {
            let answer = sender.send_request(request).await.map_err(io::Error::other);
            drop(sender);
            answer
        };
        let (answer, _) = tokio::join!(answer, connection);
        answer.map(|answer| answer.status())
    };
    let status = tokio::time::timeout(Duration::from_secs(5), asking)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        .map_err(|source| DrainError::Unreachable { admin, source })?;
    if status == http::StatusCode::OK { Ok(()) } else { Err(DrainError::Refused { admin, status }) }
}

#[derive(Debug, thiserror::Error)]
pub enum DrainError {
    #[error("the proxy's admin server at {admin} does not answer: {source}; is the proxy running in this Pod?")]
    Unreachable { admin: SocketAddr, source: io::Error },
    #[error("the proxy's admin server at {admin} answered {status}; is this another program's port?")]
    Refused { admin: SocketAddr, status: http::StatusCode },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_controllers_address_may_be_a_name_or_an_ip_of_either_family() {
        let ok = |host: &str, port| Ok((host.to_owned(), port));
        assert_eq!(
            host_and_port("sluice-controller.sluice-system.svc:18000"),
            ok("sluice-controller.sluice-system.svc", 18000)
        );
        assert_eq!(host_and_port("10.0.0.1:1"), ok("10.0.0.1", 1));
        assert_eq!(host_and_port("[fd00::1]:18000"), ok("fd00::1", 18000));
        for text in ["", "host", "host:", ":18000", "host:0", "host:70000", "host:http"] {
            assert!(host_and_port(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_sidecar_has_one_worker_unless_told_otherwise() {
        assert_eq!(worker_count(Role::Sidecar, None).get(), 1);
        assert_eq!(worker_count(Role::Sidecar, NonZeroUsize::new(3)).get(), 3);
        assert!(worker_count(Role::Fleet, None).get() >= 1);
    }
    fn told(arguments: &[&str]) -> Result<Settings, String> {
        #[derive(Debug, clap::Parser)]
        struct Cli {
            #[command(flatten)]
            settings: Settings,
        }
        let least = ["proxy", "--pod-name=p", "--controller=c:1", "--controller-id=spiffe://test/ns/a/sa/b"];
        let parsed = <Cli as clap::Parser>::try_parse_from(least.iter().chain(arguments));
        parsed.map(|cli| cli.settings).map_err(|error| error.to_string())
    }

    #[test]
    fn nothing_is_traced_or_logged_unless_it_is_asked_for() {
        let settings = told(&[]).unwrap();
        assert!(settings.tracing.otlp_endpoint.is_none() && !settings.access_log);
        assert_eq!(settings.access_log_filter, Filter::default());
        assert!(tracer(Role::Fleet, &settings, &Metrics::new("p", 1)).unwrap().is_none());
        // As a chart may set it.
        assert!(told(&["--otlp-endpoint="]).unwrap().tracing.otlp_endpoint.is_none());
    }

    #[tokio::test]
    async fn the_fleet_alone_makes_spans() {
        let settings = told(&["--otlp-endpoint=http://127.0.0.1:1", "--traces-sampler-arg=0.01"]).unwrap();
        let metrics = Metrics::new("p", 1);
        assert!(tracer(Role::Sidecar, &settings, &metrics).unwrap().is_none());
        assert!(tracer(Role::Fleet, &settings, &metrics).unwrap().is_some());
    }

    #[test]
    fn a_setting_that_cannot_be_is_refused_with_what_to_write() {
        let table = [
            ("--otlp-endpoint=otel:4317", "http://otel-collector.observability:4317"),
            ("--traces-sampler-arg=1.5", "a number from 0 to 1"),
            ("--spans-queue=0", "--spans-queue"),
            ("--access-log-filter=errors", "JSON list of rules"),
        ];
        for (argument, expected) in table {
            let error = told(&[argument]).unwrap_err();
            assert!(error.contains(expected), "{argument}: {error}");
        }
    }
}
