//! The controller: starts every room, and stops them in order.
#![forbid(unsafe_code)]

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use kube::{Client, Config, ResourceExt as _};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use sluice_controller::{
    admission::{Keeper, Pace, Uninstall, Webhook},
    ads::{Ads, Leadership, Members},
    analysis::{ClusterSources, DryRun, DryRunRequest, Engine, Report, Task},
    cache::{Cache, CanaryKey},
    delivery::{
        actions::{Effects, LeaseGuard},
        config::Reader,
        machine::Fleet,
        reconciler::{self, Context, Guarding, Judge, Memories, Mesh},
    },
    guard::{self, Breach, Outcomes, Watch},
    identity::{
        Authority, Certificates, GrpcPort, KubeTokenReviews, OwnCertificate, Rotation, Subject, Times, TrustBundle,
    },
    lease::{Election, LeaseHandle},
    mesh::{CatchUp, Publisher, PublisherHandle, serves},
    notify,
    settings::{CommandLine, LogFormat, LogSettings, Settings, UninstallSettings},
    web::{self, Calls, Metrics},
};
use sluice_xds::PodSubject;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// For one call to the API server.
const DEADLINE: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let line = CommandLine::read(std::env::args_os()).unwrap_or_else(|error| error.exit());
    aws_lc_rs::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("a TLS provider was installed before ours"))?;
    let provider = Arc::new(aws_lc_rs::default_provider());
    match line {
        CommandLine::Uninstall(settings) => {
            log(&settings.log)?;
            uninstall(settings).await
        }
        CommandLine::Run(settings) => {
            log(&settings.log)?;
            run(*settings, provider).await
        }
    }
}

async fn uninstall(settings: UninstallSettings) -> anyhow::Result<()> {
    let client = Client::try_default().await.context("no API server: neither in a cluster nor a kubeconfig")?;
    let uninstall = Uninstall {
        client,
        namespace: settings.namespaced.then(|| settings.pod_namespace.clone()),
        release_namespace: settings.pod_namespace,
        deployment: settings.deployment,
        deadline: Duration::from_secs(settings.timeout_seconds),
    };
    Ok(uninstall.run().await?)
}

fn log(settings: &LogSettings) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&settings.filter).with_context(|| format!("SLUICE_LOG {:?}", settings.filter))?;
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_target(true);
    match settings.format {
        LogFormat::Json => subscriber.json().flatten_event(true).init(),
        LogFormat::Text => subscriber.init(),
    }
    Ok(())
}

async fn run(settings: Settings, provider: Arc<CryptoProvider>) -> anyhow::Result<()> {
    let stop = CancellationToken::new();
    let mut tasks = JoinSet::new();

    // Watches live long; everything else is done by a client without retries of its own: a replayed write may have taken
    // effect already, and each call here has a deadline and a caller that tries again.
    let config = Config::infer().await.context("no API server: neither in a cluster nor a kubeconfig")?;
    let calls = Calls::default();
    let watches = calls.client(config.clone())?;
    let mut once = config;
    once.default_retry = false;
    let client = calls.client(once)?;

    let (election, lease) = Election::new(client.clone(), settings.lease())?;
    let cache = Cache::start(&watches, &settings.scope(), &mut tasks);
    let metrics = Metrics::new(cache.touches.clone(), lease.watch(), &calls);
    let listener = sluice_health::listen(settings.http_address, 128)
        .and_then(tokio::net::TcpListener::from_std)
        .with_context(|| format!("cannot listen on {}", settings.http_address))?;
    let http = tokio::spawn(web::serve(listener, metrics.clone(), stop.clone()));

    let controller_id = settings.controller_id()?;
    let life = Duration::from_secs(settings.certificate_seconds);
    let times = Times { life, spread: Duration::from_secs(settings.root_spread_seconds) };
    let authority = Arc::new(Authority::open(&client, &settings.pod_namespace, &settings.trust_domain, times).await?);
    let pod = PodSubject {
        namespace: settings.pod_namespace.clone(),
        pod: settings.pod_name.clone(),
        uid: settings.pod_uid.clone(),
    };
    let subject = Subject { id: controller_id.clone(), pod, dns_names: settings.dns_names() };
    let own = OwnCertificate::new(authority.clone(), provider.clone(), subject)?;
    let keeper = own.clone();
    tasks.spawn(async move { keeper.keep().await });

    let mut term_signal = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        warm = cache.warm() => warm.context("a watch ended")?,
        _ = term_signal.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    }

    let mesh_settings = settings.mesh()?;
    let limits = mesh_settings.limits;
    let (publisher, handle) = Publisher::new(client.clone(), cache.clone(), lease.clone(), mesh_settings.clone());
    let catch_up = publisher.catch_up();
    let publishing = stop.clone();
    let (term, leading) = watch::channel(None);
    tasks.spawn(Box::pin(publisher.run(leading.clone(), publishing)));
    let members =
        Members::new(handle.snapshots(), cache.touches.clone(), Duration::from_secs(settings.fleet_drain_seconds));
    let leadership: Arc<dyn Leadership> = Arc::new(Leads {
        lease: lease.clone(),
        leading: leading.clone(),
        cache: cache.clone(),
        settings: settings.clone(),
        found: Mutex::default(),
    });
    let mesh_settings = Arc::new(mesh_settings);
    let ads =
        Ads::new(mesh_settings.clone(), handle.snapshots(), members.clone(), leadership.clone(), &settings.pod_name);
    tasks.spawn(ads.clone().mark_silent(client.clone()));
    let bundle = TrustBundle {
        client: client.clone(),
        authority: authority.clone(),
        release_namespace: settings.pod_namespace.clone(),
        watched: settings.watched_namespace(),
    };
    tasks.spawn(bundle.keep(cache.clone(), lease.clone()));
    let (gauges, signs) = (metrics.clone(), authority.clone());
    tasks.spawn(async move {
        let mut changes = signs.changes();
        loop {
            gauges.set_root_expires(signs.root_expires());
            // Its sender is in the authority that we hold.
            let _ = changes.changed().await;
        }
    });
    let rotation =
        Rotation { client: client.clone(), authority: authority.clone(), namespace: settings.pod_namespace.clone() };
    tasks.spawn(rotation.follow(lease.clone()));

    let webhook = if settings.protection.may_be_webhook() {
        Some(Webhook::bind(settings.webhook_address, own.clone(), provider.clone(), cache.clone()).await?)
    } else {
        None
    };
    let stopping = stop.clone();
    let mut answering = tokio::spawn(async move {
        match webhook {
            Some(webhook) => webhook.serve(stopping).await,
            None => stopping.cancelled().await,
        }
    });
    let keeper = Keeper {
        client: client.clone(),
        protection: settings.protection,
        address: settings.webhook(),
        ca: authority.bundle(),
        namespace: settings.watched_namespace(),
        release_namespace: settings.pod_namespace.clone(),
        webhook_port: settings.webhook_address.port(),
        pace: Pace::default(),
        lease: Arc::new(Guard(lease.clone())),
        report: Arc::new(metrics.clone()),
    };
    let mut protecting = tokio::spawn(keeper.keep(leading.clone()));

    let port = GrpcPort::bind(settings.grpc_address, authority.clone(), own, provider).await?;
    let certificates = Certificates::server(authority, KubeTokenReviews::new(client.clone()));
    let guard = guard::Guard::new(cache.touches.clone(), Arc::new(metrics.clone()));
    let outcomes = Outcomes::server(guard.clone(), mesh_settings, handle.snapshots(), leadership);
    let routes = tonic::service::Routes::new(certificates).add_service(ads.server()).add_service(outcomes);
    let mut grpc = tokio::spawn(port.serve(routes, stop.clone()));

    let sources = Arc::new(ClusterSources { cache: cache.clone(), client: client.clone() });
    let (engine, measuring) = Engine::start(settings.analysis(), sources, cache.touches.clone());
    let (notifier, notifying) = notify::start(client.clone(), &settings.pod_name);
    tasks.spawn(notifying);
    let context = Arc::new(Context {
        effects: Effects {
            client: client.clone(),
            cache: cache.clone(),
            configs: Arc::new(Reader::new(client.clone(), DEADLINE)),
            lease: Arc::new(Guard(lease.clone())),
            sidecar: settings.sidecar(&controller_id),
            deadline: DEADLINE,
        },
        settle: Duration::from_secs(settings.settle_seconds),
        limits,
        mesh: Arc::new(Fleets { members: members.clone(), handle }),
        judge: Arc::new(Gates(engine)),
        guard: Arc::new(Guarded(guard)),
        announce: Arc::new(notifier),
        gauges: Arc::new(metrics.clone()),
        memory: Memories::default(),
    });
    // The Lease goes back last: everything that writes has ended before.
    let reconciling = tokio::spawn(reconciler::run(context, leading));
    let electing = CancellationToken::new();
    let mut election = tokio::spawn(election.run(electing.clone()));
    tasks.spawn(terms(lease.watch(), term, catch_up, members.clone(), stop.clone()));
    metrics.set_ready();
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "ready");

    let ended = tokio::select! {
        _ = term_signal.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        elected = &mut election => match elected {
            Ok(Err(taken_back)) => Err(taken_back.into()),
            ended => Err(anyhow::anyhow!("the election ended: {ended:?}")),
        },
        served = &mut grpc => Err(anyhow::anyhow!("the gRPC port ended: {served:?}")),
        served = &mut answering => Err(anyhow::anyhow!("the webhook ended: {served:?}")),
        kept = &mut protecting => Err(anyhow::anyhow!("the keeper of the protection ended: {kept:?}")),
        // A task of ours that ends has panicked, or its watch did: a fresh process is better than half of one.
        Some(task) = tasks.join_next() => Err(anyhow::anyhow!("a task ended: {task:?}")),
    };
    tracing::info!("stopping");
    stop.cancel();
    let orderly = async {
        let _ = reconciling.await;
        if !protecting.is_finished() {
            let _ = protecting.await;
        }
        if !grpc.is_finished() {
            let _ = grpc.await;
        }
        electing.cancel();
        if !election.is_finished() {
            let _ = election.await;
        }
        let _ = http.await;
        if !answering.is_finished() {
            let _ = answering.await;
        }
    };
    if tokio::time::timeout(Duration::from_secs(15), orderly).await.is_err() {
        tracing::warn!("not everything ended in time");
    }
    measuring.abort();
    tasks.shutdown().await;
    ended
}

/// The term in which we decide and serve xDS: that of the Lease, from when the cache has caught up with the quorum, until
/// we stop.
async fn terms(
    mut lease: watch::Receiver<Option<u64>>,
    term: watch::Sender<Option<u64>>,
    catch_up: CatchUp,
    members: Arc<Members>,
    stop: CancellationToken,
) {
    loop {
        let now = *lease.borrow_and_update();
        term.send_replace(None);
        let begin = async {
            while let Err(error) = catch_up.run().await {
                tracing::warn!(%error, "cannot bring the cache up to date; tried again before this replica leads");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            catch_up.begin_term();
            members.begin_term();
            term.send_replace(now);
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = stop.cancelled() => {
                term.send_replace(None);
                // The reconciler ends when nobody will say any more that it leads.
                drop(term);
                // Not an end that nobody expects.
                return std::future::pending().await;
            }
            changed = lease.changed() => if changed.is_err() { return },
            () = begin, if now.is_some() => {}
        }
    }
}

struct Guard(LeaseHandle);

impl LeaseGuard for Guard {
    fn may_write(&self) -> bool {
        self.0.may_write()
    }
}

/// Who leads, for the xDS server.
struct Leads {
    lease: LeaseHandle,
    leading: watch::Receiver<Option<u64>>,
    cache: Cache,
    settings: Settings,
    found: Mutex<Option<Found>>,
}

/// Where a holder is. When a leader ends all clients ask at once, and there are many Pods to look through.
struct Found {
    holder: String,
    address: Option<String>,
    at: Instant,
}

impl Found {
    /// Until then nobody looks again.
    const HOLDS: Duration = Duration::from_secs(1);
}

impl Leadership for Leads {
    fn term(&self) -> watch::Receiver<Option<u64>> {
        self.leading.clone()
    }

    fn may_write(&self) -> bool {
        self.lease.may_write()
    }

    fn raise(&self, epoch: u64) {
        self.lease.raise_epoch(epoch);
    }

    fn leader(&self) -> Option<String> {
        let holder = self.lease.holder()?;
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = found.as_ref().filter(|it| it.holder == holder && it.at.elapsed() < Found::HOLDS) {
            return found.address.clone();
        }
        let pod = self.cache.pods.find(|pod| pod.metadata.uid.as_ref() == Some(&holder));
        let ip = pod.and_then(|pod| pod.status.as_ref()?.pod_ip.as_ref()?.parse().ok());
        let address = ip.map(|ip| SocketAddr::new(ip, self.settings.grpc_address.port()).to_string());
        found.insert(Found { holder, address, at: Instant::now() }).address.clone()
    }

    fn give_up(&self) -> bool {
        let Settings { pod_namespace, pod_uid, .. } = &self.settings;
        let ours = [("app.kubernetes.io/name", "sluice"), ("app.kubernetes.io/component", "controller")];
        let another = self.cache.pods.find(|pod| {
            pod.namespace().as_ref() == Some(pod_namespace)
                && ours.iter().all(|(key, value)| pod.labels().get(*key).is_some_and(|it| it == value))
                && pod.metadata.uid.as_ref() != Some(pod_uid)
                && serves(pod)
        });
        if another.is_some() {
            self.lease.give_up();
        }
        another.is_some()
    }
}

/// The fleet, for the reconciler.
struct Fleets {
    members: Arc<Members>,
    handle: PublisherHandle,
}

impl Mesh for Fleets {
    fn fleet(&self, canary: &CanaryKey) -> Fleet {
        Fleet { without_port: self.handle.without_port(canary), ..self.members.fleet(canary) }
    }

    fn cut(&self, canary: &CanaryKey) {
        self.handle.cut(canary);
    }

    fn restore(&self, canary: &CanaryKey) {
        self.handle.restore(canary);
    }
}

/// The analysis, for the reconciler.
struct Gates(Engine);

impl Judge for Gates {
    fn set(&self, canary: &CanaryKey, task: Option<Task>) {
        self.0.set(canary, task);
    }

    fn report(&self, canary: &CanaryKey) -> Option<Report> {
        self.0.report(canary)
    }

    fn dry_run(&self, request: &DryRunRequest) -> Option<DryRun> {
        self.0.dry_run(request)
    }

    fn dry_run_waits_for(&self, canary: &CanaryKey) -> Option<String> {
        self.0.dry_run_waits_for(canary)
    }

    fn forget(&self, canary: &CanaryKey) {
        self.0.forget(canary);
    }
}

/// The guard, for the reconciler.
struct Guarded(guard::Guard);

impl Guarding for Guarded {
    fn watch(&self, canary: &CanaryKey, watch: Option<Watch>) {
        self.0.watch(canary, watch);
    }

    fn breach(&self, canary: &CanaryKey) -> Option<Breach> {
        self.0.breach(canary)
    }
}
