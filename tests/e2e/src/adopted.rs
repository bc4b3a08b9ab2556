//! The fixture of the end-to-end tests: Sluice installed, an application of the test's own taken over and under load by name with
//! new and kept connections, and at the end a look at everything that must not have happened.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)] // What does not work here fails the test.

use std::{
    sync::LazyLock,
    time::{Duration, Instant},
};

use k8s_openapi::api::{
    apps::v1::{ControllerRevision, Deployment},
    core::v1::{Namespace, Service},
};
use kube::{
    Api, Resource, ResourceExt,
    api::{ApiResource, DeleteParams, DynamicObject, ListParams},
    core::{GroupVersionKind, NamespaceResourceScope},
};
use serde_json::json;
use sluice_crds::{Canary, CanaryStatus, Stage, labels};
use sluice_load::{CUT, RESENT, STREAM, WEBSOCKET};
use tokio::sync::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::{
    app::App,
    audit,
    cluster::{Cluster, SYSTEM},
    load::{EVERY_PROTOCOL, Load},
    memory,
    problems::{self, Expected},
    watch::unix_ms,
};

/// Tests that break something that all share take this for writing.
static SHARED: LazyLock<RwLock<()>> = LazyLock::new(RwLock::default);
static INSTALLED: LazyLock<Mutex<bool>> = LazyLock::new(Mutex::default);

pub const MINUTE: Duration = Duration::from_secs(60);
/// Nothing may be written for so long when all is settled.
const QUIET: Duration = Duration::from_secs(3);

/// How a test uses the installation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Beside other tests.
    Shared,
    /// Alone, because it breaks or changes what others rely on.
    Alone,
}

/// The installation, as long as a test uses it.
pub struct Held {
    _shared: Option<RwLockReadGuard<'static, ()>>,
    alone: Option<RwLockWriteGuard<'static, ()>>,
}

/// An application that is taken over and under load.
pub struct Adopted {
    pub app: App,
    pub load: Load,
    /// From when on no request may fail: before the Canary was applied.
    pub from_ms: u64,
    /// From when on nobody has a connection to a Pod of the Deployment itself; those end with the Pod, as in any rollout.
    pub through_fleet_ms: u64,
    held: Held,
}

/// The cluster that `KUBECONFIG` names, with Sluice in it; `None`, after saying so, where it names none.
pub async fn cluster(usage: Use) -> Option<(Cluster, Held)> {
    if std::env::var_os("KUBECONFIG").is_none() {
        println!("SKIPPED: KUBECONFIG is not set; `make test` starts a cluster, or set it to one of yours");
        return None;
    }
    let cluster = Cluster::connect().await.unwrap();
    let held = match usage {
        Use::Shared => Held { _shared: Some(SHARED.read().await), alone: None },
        Use::Alone => Held { _shared: None, alone: Some(SHARED.write().await) },
    };
    let mut installed = INSTALLED.lock().await;
    if !*installed {
        // Proxies and controllers start at once, and some are there before those that they need.
        let _starting = problems::expect(&[SYSTEM]);
        problems::watch().unwrap();
        cluster.install(&[]).await.unwrap();
        *installed = true;
    }
    drop(installed);
    Some((cluster, held))
}

/// Says that a test has uninstalled Sluice: whoever comes next installs it, if the test does not come to that.
pub async fn uninstalled() {
    *INSTALLED.lock().await = false;
}

/// A spec whose releases take some ten seconds. Its p99 may be a second, so that a small machine that stands still for half of one fails
/// no release.
#[must_use]
pub fn quick() -> serde_json::Value {
    json!({"drainSeconds": 2, "scaleDownDelaySeconds": 5, "progressDeadlineSeconds": 20, "analysis": {
    "interval": "4s", "stepWeights": [20, 60], "metrics": [
        {"name": "request-success-rate", "interval": "4s", "thresholdRange": {"min": 99}},
        {"name": "request-duration", "interval": "4s", "thresholdRange": {"max": 1000}},
    ]}})
}

/// [`quick`], but a step lasts so long that it is still the same one when a fault of some seconds is over.
#[must_use]
pub fn slow(seconds: u32) -> serde_json::Value {
    let mut spec = quick();
    spec["analysis"]["interval"] = json!(format!("{seconds}s"));
    spec
}

/// Installs Sluice if this has not been done, and makes an application that is taken over and under load, in a namespace
/// that is named for the test. `arguments` are further ones of `sluice-load`; a test that is alone has [`EVERY_PROTOCOL`].
pub async fn adopted(name: &str, usage: Use, arguments: &[&str], spec: serde_json::Value) -> Option<Adopted> {
    let (cluster, held) = cluster(usage).await?;
    Some(adopted_in(cluster, held, name, arguments, spec).await)
}

/// [`adopted`] by who holds the cluster already.
pub async fn adopted_in(
    cluster: Cluster,
    held: Held,
    name: &str,
    arguments: &[&str],
    spec: serde_json::Value,
) -> Adopted {
    let mut stage = under_load(cluster, held, name, arguments).await;
    stage.app.canary(spec).await.unwrap();
    stage.taken_over().await;
    stage
}

/// What [`adopted_in`] takes over: there is no Canary yet.
pub async fn under_load(cluster: Cluster, held: Held, name: &str, arguments: &[&str]) -> Adopted {
    under_load_in(cluster, held, &unique(name), arguments).await
}

/// [`under_load`] in this very namespace.
pub async fn under_load_in(cluster: Cluster, held: Held, namespace: &str, arguments: &[&str]) -> Adopted {
    let app = App::deploy(&cluster, namespace, 2).await.unwrap();
    let mut all = vec!["--target", "hello:80"];
    if !arguments.contains(&"--rate") {
        all.extend_from_slice(&["--rate", "60"]);
    }
    all.extend_from_slice(arguments);
    // What all share breaks under every protocol.
    if held.alone.is_some() {
        all.extend_from_slice(EVERY_PROTOCOL);
    }
    let load = Load::start(&cluster, &app.namespace, "load", &all).await.unwrap();
    let from_ms = load.steady().await.unwrap();
    Adopted { app, load, from_ms, through_fleet_ms: u64::MAX, held }
}

/// A name that no earlier run has used.
#[must_use]
pub fn unique(name: &str) -> String {
    format!("{name}-{}", unix_ms() % 100_000)
}

/// The canary has a fifth of the traffic.
#[must_use]
pub fn at_weight_20(status: &CanaryStatus) -> bool {
    status.effective_weight == Some(20)
}

impl Adopted {
    /// Objects of the application's namespace.
    #[must_use]
    pub fn api<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        Api::namespaced(self.app.cluster.client.clone(), &self.app.namespace)
    }

    /// Releases v2 and waits until it has a fifth of the traffic.
    pub async fn in_mid_release(&self) -> CanaryStatus {
        let applied = self.app.release(&[("VERSION", "v2")]).await.unwrap();
        self.wait("weight 20", applied, at_weight_20).await
    }

    /// Waits until the application is taken over, and the Deployment's own Pods have ended.
    pub async fn taken_over(&mut self) {
        self.app.adopted().await.unwrap();
        self.app.own_pods_ended().await.unwrap();
        self.through_fleet_ms = unix_ms();
    }

    /// From now on the Deployment's own Pods serve again, and will end when it is taken over once more.
    pub fn serves_itself(&mut self) {
        self.from_ms = unix_ms();
        self.through_fleet_ms = u64::MAX;
    }

    /// No request failed that a version of the application did not answer.
    pub async fn nothing_failed(&self) {
        self.load.catch_up().await.unwrap();
        let lost = self.load.lost_but_for_the_takeover(self.from_ms, self.through_fleet_ms);
        assert!(lost.is_empty(), "lost requests: {lost:#?}");
        let resent =
            self.load.since(self.from_ms).iter().filter(|bucket| bucket.kind == RESENT).map(|it| it.count).sum::<u64>();
        if resent > 0 {
            println!("{}: {resent} requests were sent again, on another connection", self.app.namespace);
        }
    }

    /// Failures since `from_ms`, which the test has counted apart. From now on no request may fail again.
    pub async fn counted_apart(&mut self, what: &str, from_ms: u64) -> Apart {
        // Those that still wait for something that is gone end by then: kube-proxy may have known of it for a second or two only.
        tokio::time::sleep(crate::load::TIMEOUT + Duration::from_secs(3)).await;
        self.load.catch_up().await.unwrap();
        let lost = self.load.lost_but_for_the_takeover(self.from_ms, self.through_fleet_ms.min(from_ms));
        let (before, lost): (Vec<_>, Vec<_>) = lost.into_iter().partition(|bucket| bucket.first_ms < from_ms);
        assert!(before.is_empty(), "lost before {what}: {before:#?}");
        let of = |kinds: &[&str]| {
            lost.iter().filter(|bucket| kinds.contains(&&*bucket.kind)).map(|bucket| bucket.count).sum::<u64>()
        };
        let last_ms = lost.iter().map(|bucket| bucket.last_ms).max().unwrap_or(from_ms);
        let apart = Apart {
            kept: of(&["kept", CUT]),
            new: of(&["new"]),
            calls: of(&["grpc", STREAM, WEBSOCKET]),
            window_ms: last_ms - from_ms,
        };
        println!(
            "{what}: {} requests on kept connections, {} on new ones and {} of gRPC and WebSockets failed, the last {} ms after it",
            apart.kept, apart.new, apart.calls, apart.window_ms
        );
        self.from_ms = unix_ms();
        apart
    }

    pub async fn wait(&self, what: &str, from_ms: u64, wanted: impl Fn(&CanaryStatus) -> bool) -> CanaryStatus {
        self.app.history.wait(what, from_ms, 2 * MINUTE, wanted).await.unwrap().status
    }

    /// Requests that a version answered since `from_ms`.
    pub async fn answers_of(&self, version: &str, from_ms: u64) -> u64 {
        self.load.catch_up().await.unwrap();
        self.load.since(from_ms).iter().filter(|bucket| bucket.version == version).map(|bucket| bucket.count).sum()
    }

    /// Nothing failed; nothing is written where the Canary is settled; nothing is left when the namespace is gone; nothing
    /// went wrong in Sluice. A test that is alone waits until the Canary is settled, and deletes it before the namespace: nothing of
    /// ours is left.
    pub async fn end(self) {
        self.nothing_failed().await;
        memory::of_sidecars_is_small(&self.app.cluster, &self.app.namespace).await;
        let canary = self.app.canaries().get_opt("hello").await.unwrap();
        if let Some(canary) = canary.filter(|canary| canary.metadata.deletion_timestamp.is_none()) {
            let alone = self.held.alone.is_some();
            if alone {
                Box::pin(self.comes_to_rest()).await;
            }
            if alone || is_settled(&canary) {
                quiet(&self.app.cluster, &self.app.namespace).await;
            }
            if alone {
                self.app.canaries().delete("hello", &DeleteParams::default()).await.unwrap();
                Box::pin(self.handed_back()).await;
                self.nothing_failed().await;
            }
        }
        let Self { app, load, held: _held, .. } = self;
        drop(load);
        ended(app).await;
    }

    /// Waits until nobody has anything to do: the Canary is settled, Kubernetes' own controllers have said of every
    /// Deployment that it is as it should be, and no more revisions are left than are kept.
    pub async fn comes_to_rest(&self) {
        let (deployments, records) = (self.api::<Deployment>(), self.api::<ControllerRevision>());
        eventually("a settled Canary and Deployments that are complete", MINUTE, || async {
            let canary = self.app.canaries().get("hello").await.ok()?;
            let all = deployments.list(&ListParams::default()).await.ok()?;
            let kept = records.list(&ListParams::default().labels(labels::CANARY)).await.ok()?.items.len();
            let rejected = canary.status.as_ref()?.rejected_revision.is_some();
            // Beside the primary, and the one that was rejected last.
            let most = usize::try_from(canary.spec.revision_history_limit).ok()? + 1 + usize::from(rejected);
            (is_settled(&canary) && all.iter().all(is_complete) && kept <= most).then_some(())
        })
        .await;
    }

    /// Waits until the Canary, which was deleted, is gone with all that is ours. The Deployment serves alone again.
    pub async fn handed_back(&self) {
        let App { cluster, namespace, .. } = &self.app;
        eventually("the end of the Canary", 2 * MINUTE, || async {
            self.app.canaries().get_opt("hello").await.unwrap().is_none().then_some(())
        })
        .await;
        eventually("the end of all that is ours", 2 * MINUTE, || async {
            let left = of_ours(cluster, namespace).await;
            left.is_empty().then_some(()).or_else(|| {
                println!("left: {left:?}");
                None
            })
        })
        .await;
        let target = self.api::<Deployment>().get("hello").await.unwrap();
        assert_eq!(target.spec.unwrap().replicas, Some(2));
        let selector = self.api::<Service>().get("hello").await.unwrap().spec.unwrap().selector.unwrap();
        assert!(!selector.contains_key("sluice.dev/fleet"), "{selector:?}");
    }
}

fn is_settled(canary: &Canary) -> bool {
    canary.status.as_ref().is_some_and(|status| status.stage == Stage::Settled && status.retiring.is_empty())
}

/// Its status will not change by itself any more.
fn is_complete(deployment: &Deployment) -> bool {
    let wanted = deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
    deployment.status.as_ref().is_some_and(|status| {
        status.observed_generation == deployment.metadata.generation
            && status.terminating_replicas.unwrap_or_default() == 0
            && [status.replicas, status.ready_replicas, status.available_replicas]
                .iter()
                .all(|replicas| replicas.unwrap_or_default() == wanted)
    })
}

/// Requests that failed because of a fault.
#[derive(Clone, Copy, Debug)]
pub struct Apart {
    pub kept: u64,
    pub new: u64,
    /// gRPC calls, streams and WebSockets. The calls have one connection: while it cannot be made, all of them fail.
    pub calls: u64,
    /// From the fault to the end of the last of them.
    pub window_ms: u64,
}

/// Deletes the application's namespace and waits for its end, so that no finalizer and no object of ours is left. Nothing may
/// have gone wrong in Sluice.
pub async fn ended(app: App) {
    let cluster = app.cluster.clone();
    let namespace = app.namespace.clone();
    app.delete().await.unwrap();
    gone(&cluster, &namespace).await;
    nothing_went_wrong(&cluster).await;
}

/// Waits until a namespace is gone.
pub async fn gone(cluster: &Cluster, namespace: &str) {
    let namespaces: Api<Namespace> = Api::all(cluster.client.clone());
    eventually(&format!("the end of namespace {namespace}"), 3 * MINUTE, || async {
        namespaces.get_opt(namespace).await.ok().filter(Option::is_none)
    })
    .await;
}

/// No warning, error, panic, restart or 403 of ours that no test declared; controllers and fleet do not grow.
pub async fn nothing_went_wrong(cluster: &Cluster) {
    let found = problems::unexpected();
    let lines: Vec<_> = found.iter().map(ToString::to_string).collect();
    assert!(found.is_empty(), "unexpected:\n{}", lines.join("\n"));
    memory::is_flat(cluster).await;
}

/// Nothing of a namespace is written for some seconds: every object that is ours, or that we write to, keeps its
/// resourceVersion, and the audit log, where there is one, has no write of ours.
pub async fn quiet(cluster: &Cluster, namespace: &str) {
    let began = unix_ms();
    let before = versions(cluster, namespace).await;
    tokio::time::sleep(QUIET).await;
    let after = versions(cluster, namespace).await;
    assert_eq!(before, after, "something is written although all is settled");
    let written: Vec<_> = audit::requests(began)
        .into_iter()
        .filter(|request| request.writes() && request.namespace == namespace && request.at_ms < unix_ms())
        .collect();
    assert!(written.is_empty(), "written although all is settled: {written:#?}");
}

/// `kind/name` and resourceVersion of everything that Sluice may write in a namespace.
async fn versions(cluster: &Cluster, namespace: &str) -> Vec<(String, Option<String>)> {
    let mut found = Vec::new();
    for (group, version, kind, plural) in [
        ("sluice.dev", "v1beta1", "Canary", "canaries"),
        ("apps", "v1", "Deployment", "deployments"),
        ("apps", "v1", "ControllerRevision", "controllerrevisions"),
        ("", "v1", "Service", "services"),
        ("", "v1", "ConfigMap", "configmaps"),
        ("", "v1", "Secret", "secrets"),
        ("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices"),
    ] {
        let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural);
        let api: Api<DynamicObject> = Api::namespaced_with(cluster.client.clone(), namespace, &resource);
        // Slices of Kubernetes' own follow Pods that are still going.
        let not_ours = "endpointslice.kubernetes.io/managed-by!=endpointslice-controller.k8s.io";
        let objects = api.list_metadata(&ListParams::default().labels(not_ours)).await.unwrap();
        found.extend(
            objects.into_iter().map(|object| (format!("{kind}/{}", object.name_any()), object.resource_version())),
        );
    }
    found
}

/// Everything in a namespace that carries our label, as `kind/name`.
pub async fn of_ours(cluster: &Cluster, namespace: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (group, version, kind, plural) in [
        ("apps", "v1", "Deployment", "deployments"),
        ("apps", "v1", "ControllerRevision", "controllerrevisions"),
        ("", "v1", "Service", "services"),
        ("", "v1", "ConfigMap", "configmaps"),
        ("", "v1", "Secret", "secrets"),
        ("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices"),
    ] {
        let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural);
        let api: Api<DynamicObject> = Api::namespaced_with(cluster.client.clone(), namespace, &resource);
        let objects = api.list_metadata(&ListParams::default().labels("sluice.dev/canary")).await.unwrap();
        found.extend(objects.into_iter().map(|object| format!("{kind}/{}", object.name_any())));
    }
    found
}

/// Status, reason and message of a condition; empty where there is none.
#[must_use]
pub fn condition(status: &CanaryStatus, kind: &str) -> (String, String, String) {
    let found = status.conditions.iter().find(|condition| condition.kind == kind);
    found.map_or_else(Default::default, |found| {
        (format!("{:?}", found.status), found.reason.clone(), found.message.clone())
    })
}

/// Asks again and again until there is an answer.
///
/// # Panics
/// At the deadline.
pub async fn eventually<T, F>(what: &str, deadline: Duration, mut probe: impl FnMut() -> F) -> T
where
    F: Future<Output = Option<T>>,
{
    let until = Instant::now() + deadline;
    loop {
        if let Some(found) = probe().await {
            return found;
        }
        assert!(Instant::now() < until, "{what} did not come within {deadline:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Declares what a test is about to cause; see [`problems::expect`].
pub fn expect(parts: &[&str]) -> Expected {
    problems::expect(parts)
}
