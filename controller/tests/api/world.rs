//! A namespace with a running application, a delivery controller for it, and somebody who plays the rest of the cluster.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    future::Future,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::{FutureExt, StreamExt, stream};
use k8s_openapi::api::{
    apps::v1::{ControllerRevision, ReplicaSet},
    core::v1::{ConfigMap, Namespace, Pod, Secret, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DeleteParams, DynamicObject, ListParams, ObjectMeta, Patch, PatchParams, PostParams},
    core::NamespaceResourceScope,
    runtime::{WatchStreamExt, watcher},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use sluice_controller::{
    analysis::{DryRun, DryRunRequest, Report, Task},
    cache::{Cache, CanaryKey, Scope, deployment_resource},
    delivery::{
        actions::{Effects, LeaseGuard},
        config::Reader,
        machine::{Event, Fleet},
        reconciler::{self, Announce, Context, Gauges, Guarding, Judge, Memories, Mesh},
        template::Sidecar,
    },
    guard::{Breach, Watch},
};
use sluice_crds::{
    Canary, CanaryStatus, GateStatus, GuardSide, GuardSignal, GuardStatus, Stage, Traffic, VerdictStatus, labels,
};
use tokio::{sync::watch, task::JoinSet};

use crate::server::{self, Requests};

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct World {
    pub client: Client,
    pub namespace: String,
    pub fleet: Arc<PlayedFleet>,
    pub judge: Arc<PlayedJudge>,
    pub guard: Arc<PlayedGuard>,
    pub told: Arc<Told>,
    pub lease: Arc<PlayedLease>,
    pub cluster: Arc<PlayedCluster>,
    /// What the controller sent, watches not counted.
    pub requests: Requests,
    leading: watch::Sender<Option<u64>>,
    tasks: JoinSet<()>,
}

/// A fleet that acknowledges at once whatever the status requests, unless it is told to hold back.
#[derive(Default)]
pub struct PlayedFleet {
    cache: Mutex<Option<Cache>>,
    pub holds_back: AtomicBool,
    /// How often it was asked: once in each reconcile.
    pub asked: AtomicUsize,
    acknowledged: Mutex<HashMap<CanaryKey, Traffic>>,
    pub cuts: Mutex<Vec<CanaryKey>>,
}

impl PlayedFleet {
    pub fn acknowledged(&self, canary: &CanaryKey) -> Option<Traffic> {
        self.acknowledged.lock().unwrap().get(canary).cloned()
    }
}

impl Mesh for PlayedFleet {
    fn fleet(&self, canary: &CanaryKey) -> Fleet {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let cache = self.cache.lock().unwrap().clone().unwrap();
        let requested = cache.canaries.get(&canary.object_ref()).and_then(|canary| canary.status.clone()?.traffic);
        let mut acknowledged = self.acknowledged.lock().unwrap();
        if let Some(requested) = requested.filter(|_| !self.holds_back.load(Ordering::SeqCst)) {
            acknowledged.insert(canary.clone(), requested);
        }
        Fleet {
            members: 1,
            lagging: Vec::new(),
            effective: acknowledged.get(canary).cloned(),
            rejected: None,
            joining: false,
            names: vec!["fleet-1".into()],
            without_port: Vec::new(),
        }
    }

    fn cut(&self, canary: &CanaryKey) {
        self.cuts.lock().unwrap().push(canary.clone());
    }

    fn restore(&self, _: &CanaryKey) {}
}

/// Passes every step, unless it is told otherwise.
#[derive(Default)]
pub struct PlayedJudge {
    touches: Mutex<Option<sluice_controller::cache::Touches>>,
    pub verdict: Mutex<Option<VerdictStatus>>,
    reports: Mutex<HashMap<CanaryKey, Report>>,
    pub asked_dry: AtomicUsize,
    /// Every call, so that a test can see reconciles go by.
    pub looks: AtomicUsize,
}

impl PlayedJudge {
    /// The step under way is measured once more, with the verdict of now.
    pub fn measure_anew(&self, canary: &CanaryKey) {
        self.reports.lock().unwrap().remove(canary);
    }
}

impl Judge for PlayedJudge {
    fn set(&self, canary: &CanaryKey, task: Option<Task>) {
        self.looks.fetch_add(1, Ordering::SeqCst);
        let mut reports = self.reports.lock().unwrap();
        let Some(task) = task else {
            reports.remove(canary);
            return;
        };
        if reports.get(canary).is_some_and(|report| report.step == task.step) {
            return;
        }
        let verdict = self.verdict.lock().unwrap().unwrap_or(VerdictStatus::Pass);
        let now = jiff::Timestamp::now();
        let gates = task.gates.iter().map(|gate| GateStatus {
            name: gate.name.clone(),
            verdict,
            value: Some(1.0),
            primary_value: None,
            limit: ">= 0".into(),
            samples: Some(100.0),
            time: now,
            window_seconds: Some(1.0),
            message: String::new(),
            query: String::new(),
        });
        let report = Report { step: task.step, at: now, gates: gates.collect(), whole: true };
        reports.insert(canary.clone(), report);
        self.touches.lock().unwrap().as_ref().unwrap().touch(canary.clone());
    }

    fn report(&self, canary: &CanaryKey) -> Option<Report> {
        // Measured anew whenever it is looked at.
        self.reports.lock().unwrap().get(canary).map(|report| Report { at: jiff::Timestamp::now(), ..report.clone() })
    }

    fn dry_run(&self, _: &DryRunRequest) -> Option<DryRun> {
        self.asked_dry.fetch_add(1, Ordering::SeqCst);
        Some(DryRun::new())
    }

    fn dry_run_waits_for(&self, _: &CanaryKey) -> Option<String> {
        None
    }

    fn forget(&self, canary: &CanaryKey) {
        self.reports.lock().unwrap().remove(canary);
    }
}

/// Finds what it is told to.
#[derive(Default)]
pub struct PlayedGuard {
    touches: Mutex<Option<sluice_controller::cache::Touches>>,
    watched: Mutex<HashMap<CanaryKey, Watch>>,
    found: Mutex<HashMap<CanaryKey, Breach>>,
}

impl PlayedGuard {
    /// What is watched for this Canary.
    pub fn watched(&self, canary: &CanaryKey) -> Option<Watch> {
        self.watched.lock().unwrap().get(canary).cloned()
    }

    /// Half of the canary's requests fail.
    pub fn breach(&self, canary: &CanaryKey) {
        let watch = self.watched(canary).expect("the release is watched");
        let at = jiff::Timestamp::now();
        let status = GuardStatus {
            signal: GuardSignal::Errors,
            weight: watch.weight,
            canary: GuardSide { requests: 18, bad: 9, percent: 50.0 },
            primary: GuardSide { requests: 70, bad: 0, percent: 0.0 },
            margin: watch.error_margin,
            slow_above_milliseconds: None,
            evidence: 23_456.0,
            since: at,
            at,
        };
        self.found.lock().unwrap().insert(canary.clone(), Breach { release: watch.release, status });
        self.touches.lock().unwrap().as_ref().unwrap().touch(canary.clone());
    }
}

impl Guarding for PlayedGuard {
    fn watch(&self, canary: &CanaryKey, watch: Option<Watch>) {
        let mut watched = self.watched.lock().unwrap();
        match watch {
            Some(watch) => drop(watched.insert(canary.clone(), watch)),
            None => {
                watched.remove(canary);
                self.found.lock().unwrap().remove(canary);
            }
        }
    }

    fn breach(&self, canary: &CanaryKey) -> Option<Breach> {
        self.found.lock().unwrap().get(canary).cloned()
    }
}

/// Events and metrics.
#[derive(Default)]
pub struct Told {
    pub events: Mutex<Vec<Event>>,
    pub gauges: Mutex<BTreeSet<CanaryKey>>,
}

impl Told {
    pub fn reasons(&self) -> Vec<&'static str> {
        self.events.lock().unwrap().iter().map(|event| event.reason).collect()
    }
}

impl Announce for Told {
    fn announce(&self, _: &Canary, event: &Event) {
        self.events.lock().unwrap().push(event.clone());
    }
}

impl Gauges for Told {
    fn set(&self, canary: &CanaryKey, _: &CanaryStatus) {
        self.gauges.lock().unwrap().insert(canary.clone());
    }

    fn remove(&self, canary: &CanaryKey) {
        self.gauges.lock().unwrap().remove(canary);
    }

    fn reconciled(&self, _: Duration, _: bool) {}
}

/// A lease that can be lost.
pub struct PlayedLease(pub AtomicBool);

impl LeaseGuard for PlayedLease {
    fn may_write(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

impl World {
    /// A namespace with a controller for it; `None` where no API server can run.
    pub async fn new(namespace: &str) -> Option<Self> {
        Self::of(namespace, true).await
    }

    /// With a controller that does not look at Secrets.
    pub async fn without_secrets(namespace: &str) -> Option<Self> {
        Self::of(namespace, false).await
    }

    async fn of(namespace: &str, secrets: bool) -> Option<Self> {
        let (client, _) = server::client().await?;
        // The controller's own connection, so that its requests can be counted.
        let (own, requests) = server::client().await?;
        let metadata = ObjectMeta { name: Some(namespace.to_owned()), ..ObjectMeta::default() };
        let api: Api<Namespace> = Api::all(client.clone());
        api.create(&PostParams::default(), &Namespace { metadata, ..Namespace::default() }).await.unwrap();

        let mut tasks = JoinSet::new();
        let cluster = Arc::new(PlayedCluster {
            client: client.clone(),
            namespace: namespace.to_owned(),
            broken: Mutex::default(),
        });
        tasks.spawn(Arc::clone(&cluster).play());
        let mut world = Self {
            client,
            namespace: namespace.to_owned(),
            fleet: Arc::default(),
            judge: Arc::default(),
            guard: Arc::default(),
            told: Arc::default(),
            lease: Arc::new(PlayedLease(AtomicBool::new(true))),
            cluster,
            requests,
            leading: watch::channel(Some(1)).0,
            tasks,
        };
        world.start_controller(own, secrets).await;
        Some(world)
    }

    async fn start_controller(&mut self, client: Client, secrets: bool) {
        let namespace = self.namespace.clone();
        let scope =
            Scope { namespace: Some(namespace.clone()), release_namespace: namespace, namespaces: true, secrets };
        let cache = Cache::start(&client, &scope, &mut self.tasks);
        cache.warm().await.unwrap();
        *self.fleet.cache.lock().unwrap() = Some(cache.clone());
        *self.judge.touches.lock().unwrap() = Some(cache.touches.clone());
        *self.guard.touches.lock().unwrap() = Some(cache.touches.clone());
        let deadline = Duration::from_secs(5);
        let context = Arc::new(Context {
            effects: Effects {
                configs: Arc::new(Reader::new(client.clone(), deadline)),
                client,
                cache,
                lease: Arc::clone(&self.lease) as Arc<dyn LeaseGuard>,
                sidecar: sidecar(),
                deadline,
            },
            settle: Duration::from_millis(50),
            limits: sluice_controller::mesh::Limits::default(),
            mesh: Arc::clone(&self.fleet) as Arc<dyn Mesh>,
            judge: Arc::clone(&self.judge) as Arc<dyn Judge>,
            guard: Arc::clone(&self.guard) as Arc<dyn Guarding>,
            announce: Arc::clone(&self.told) as Arc<dyn Announce>,
            gauges: Arc::clone(&self.told) as Arc<dyn Gauges>,
            memory: Memories::default(),
        });
        let leading = self.leading.subscribe();
        self.tasks.spawn(async move { reconciler::run(context, leading).await });
    }

    /// Another replica takes over: the first one stops where it is.
    pub async fn change_leader(&mut self) {
        self.leading.send_replace(None);
        let (own, requests) = server::client().await.unwrap();
        self.requests = requests;
        self.leading = watch::channel(Some(2)).0;
        self.start_controller(own, true).await;
    }

    pub fn key(&self, canary: &str) -> CanaryKey {
        CanaryKey::new(&self.namespace, canary)
    }

    pub fn touch(&self, canary: &str) {
        self.judge.touches.lock().unwrap().as_ref().unwrap().touch(self.key(canary));
    }

    pub fn api<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    pub fn deployments(&self) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), &self.namespace, &deployment_resource())
    }

    pub async fn create<K>(&self, object: Value) -> K
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + Serialize
            + DeserializeOwned
            + std::fmt::Debug,
    {
        let object: K = serde_json::from_value(object).unwrap();
        self.api::<K>().create(&PostParams::default(), &object).await.unwrap()
    }

    /// A Deployment with Pods that serve, its Service, a ConfigMap and a Secret.
    pub async fn running_application(&self, name: &str) {
        self.create::<ConfigMap>(json!({"metadata": {"name": name}, "data": {"color": "blue"}})).await;
        self.create::<Secret>(json!({"metadata": {"name": name}, "stringData": {"password": "hunter2"}})).await;
        self.create::<Service>(json!({
            "metadata": {"name": name, "labels": {"app": name}},
            "spec": {"selector": {"app": name}, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
        }))
        .await;
        let deployment: DynamicObject = serde_json::from_value(deployment(name)).unwrap();
        self.deployments().create(&PostParams::default(), &deployment).await.unwrap();
        self.until("the application runs", || async {
            (self.pods(&format!("app={name}")).await.len() == 2).then_some(())
        })
        .await;
    }

    pub async fn canary(&self, name: &str, changes: Value) -> Canary {
        self.create(self.canary_json(name, changes)).await
    }

    pub fn canary_json(&self, name: &str, changes: Value) -> Value {
        let mut canary = json!({
            "apiVersion": "sluice.dev/v1beta1", "kind": "Canary", "metadata": {"name": name},
            "spec": {
                "targetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
                "service": {"port": 80},
                "progressDeadlineSeconds": 60, "scaleDownDelaySeconds": 0, "drainSeconds": 0,
                "analysis": {
                    "interval": "100ms", "threshold": 1, "stepWeight": 50, "maxWeight": 50,
                    "metrics": [{"name": "request-success-rate", "interval": "1s", "thresholdRange": {"min": 99}}],
                },
            },
        });
        merge(&mut canary, &changes);
        canary
    }

    pub async fn get(&self, canary: &str) -> Canary {
        self.api::<Canary>().get(canary).await.unwrap()
    }

    pub async fn status(&self, canary: &str) -> CanaryStatus {
        self.get(canary).await.status.unwrap_or_default()
    }

    pub async fn pods(&self, selector: &str) -> Vec<Pod> {
        self.api::<Pod>().list(&ListParams::default().labels(selector)).await.unwrap().items
    }

    pub async fn records(&self) -> Vec<ControllerRevision> {
        self.api::<ControllerRevision>().list(&ListParams::default()).await.unwrap().items
    }

    pub async fn patch_deployment(&self, name: &str, patch: Value) -> DynamicObject {
        self.deployments().patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap()
    }

    /// Waits for an event of this reason: it comes after the status that it is about.
    pub async fn until_told(&self, reason: &str) {
        let told = || async { self.told.reasons().contains(&reason).then_some(()) };
        self.until(&format!("event {reason}"), told).await;
    }

    /// Waits until `seen` yields something, and looks again whenever the world may have changed.
    pub async fn until<T, F: Future<Output = Option<T>>>(&self, what: &str, seen: impl Fn() -> F) -> T {
        let wait = async {
            loop {
                if let Some(found) = seen().await {
                    return found;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        match tokio::time::timeout(PATIENCE, wait).await {
            Ok(found) => found,
            Err(_) => {
                let canaries = self.api::<Canary>().list(&ListParams::default()).await.unwrap();
                let statuses: Vec<_> = canaries.iter().map(|canary| (canary.name_any(), &canary.status)).collect();
                panic!(
                    "not within {PATIENCE:?}: {what}\n{}\n{:?}",
                    serde_json::to_string_pretty(&statuses).unwrap(),
                    self.told.reasons()
                );
            }
        }
    }

    pub async fn until_status(&self, canary: &str, what: &str, is: impl Fn(&CanaryStatus) -> bool) -> CanaryStatus {
        let is = &is;
        self.until(what, || async move { Some(self.status(canary).await).filter(is) }).await
    }

    /// Taken over, and nothing under way.
    pub async fn until_settled(&self, canary: &str) -> CanaryStatus {
        self.until_status(canary, "settled", |status| {
            status.stage == Stage::Settled
                && status.primary_revision.is_some()
                && status.primary_revision == status.template.as_ref().map(|template| template.revision.clone())
        })
        .await
    }

    /// Waits until a condition says this.
    pub async fn until_stalled(&self, canary: &str, reason: &str) -> String {
        self.until(&format!("{canary} is Stalled, reason {reason}"), || async move {
            let status = self.status(canary).await;
            let condition = status.conditions.into_iter().find(|condition| condition.kind == "Stalled")?;
            (condition.reason == reason).then_some(condition.message)
        })
        .await
    }
}

pub fn sidecar() -> Sidecar {
    Sidecar {
        image: "sluice-proxy:test".into(),
        image_pull_policy: None,
        controller: "sluice-controller.sluice-system.svc:18000".into(),
        controller_id: "spiffe://cluster.local/ns/sluice-system/sa/sluice-controller".into(),
        cpu_request: "10m".into(),
        memory_request: "24Mi".into(),
        cpu_limit: None,
        memory_limit: None,
        log: "info".into(),
        log_format: "json".into(),
    }
}

pub fn deployment(name: &str) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "replicas": 2,
            "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {"containers": [{
                    "name": "app", "image": "app:1",
                    "ports": [{"name": "http", "containerPort": 8080}],
                    "env": [{"name": "COLOR", "valueFrom": {"configMapKeyRef": {"name": name, "key": "color"}}}],
                    "envFrom": [{"secretRef": {"name": name}}, {"secretRef": {"name": "maybe", "optional": true}}],
                }]},
            },
        },
    })
}

/// A JSON merge patch (RFC 7396).
fn merge(into: &mut Value, changes: &Value) {
    let Value::Object(changes) = changes else {
        *into = changes.clone();
        return;
    };
    for (key, value) in changes {
        if value.is_null() {
            into.as_object_mut().unwrap().remove(key);
        } else {
            merge(&mut into[key.as_str()], value);
        }
    }
}

/// The kubelet, and the controllers of Deployments, endpoints and garbage; and the part of the mesh that writes EndpointSlices.
pub struct PlayedCluster {
    client: Client,
    namespace: String,
    /// Images whose containers never come up.
    pub broken: Mutex<BTreeSet<String>>,
}

impl PlayedCluster {
    async fn play(self: Arc<Self>) {
        let config = watcher::Config::default();
        let mut changes = stream::select_all([
            changes::<DynamicObject>(
                Api::namespaced_with(self.client.clone(), &self.namespace, &deployment_resource()),
                config.clone(),
            ),
            changes(self.api::<Service>(), config.clone()),
            changes(self.api::<Canary>(), config.clone()),
            changes(self.api::<Pod>(), config.clone()),
            changes(self.api::<ControllerRevision>(), config),
        ]);
        while changes.next().await.is_some() {
            // All that is already there counts as one change.
            while changes.next().now_or_never().flatten().is_some() {}
            // Another writer was first: its write is the next change.
            let _ = self.sync().await;
        }
    }

    async fn sync(&self) -> kube::Result<()> {
        self.collect_garbage().await?;
        let all = ListParams::default();
        let deployments: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), &self.namespace, &deployment_resource());
        for deployment in deployments.list(&all).await? {
            self.run(&deployments, &deployment).await?;
        }
        let pods = self.api::<Pod>().list(&all).await?;
        for service in self.api::<Service>().list(&all).await? {
            self.native_endpoints(&service, &pods.items).await?;
        }
        for canary in self.api::<Canary>().list(&all).await? {
            self.fleet_endpoints(&canary).await?;
        }
        Ok(())
    }

    /// A Deployment's Pods, and its status.
    async fn run(&self, deployments: &Api<DynamicObject>, deployment: &DynamicObject) -> kube::Result<()> {
        let name = deployment.name_any();
        let set = format!("{name}-rs");
        let sets = self.api::<ReplicaSet>();
        let owner = |object: &str, kind: &str, uid: Option<String>| json!([{"apiVersion": "apps/v1", "kind": kind, "name": object, "uid": uid, "controller": true}]);
        let set = match sets.get_opt(&set).await? {
            Some(set) => set,
            None => {
                let wanted = json!({
                    "metadata": {"name": set, "ownerReferences": owner(&name, "Deployment", deployment.uid())},
                    "spec": {"replicas": 0, "selector": {"matchLabels": {"set": set}}, "template": {
                        "metadata": {"labels": {"set": set}}, "spec": {"containers": [{"name": "app", "image": "app"}]},
                    }},
                });
                sets.create(&PostParams::default(), &serde_json::from_value(wanted).unwrap()).await?
            }
        };
        let replicas = deployment.data["spec"]["replicas"].as_u64().unwrap_or(1);
        let template = &deployment.data["spec"]["template"];
        let image = template["spec"]["containers"][0]["image"].as_str().unwrap_or_default();
        let broken = self.broken.lock().unwrap().contains(image);
        let pods = self.api::<Pod>();
        for index in 0..100 {
            let pod = format!("{name}-{index}");
            let found = pods.get_opt(&pod).await?;
            if index >= replicas {
                if found.is_none() {
                    break;
                }
                pods.delete(&pod, &DeleteParams::default().grace_period(0)).await?;
                continue;
            }
            if found.is_some() {
                continue;
            }
            let wanted = json!({
                "metadata": {
                    "name": pod, "labels": template["metadata"]["labels"],
                    "ownerReferences": owner(&set.name_any(), "ReplicaSet", set.uid()),
                },
                "spec": {"containers": [{"name": "app", "image": image, "ports": template["spec"]["containers"][0]["ports"]}]},
            });
            pods.create(&PostParams::default(), &serde_json::from_value(wanted).unwrap()).await?;
            let ready = if broken { "False" } else { "True" };
            let state = if broken {
                json!({"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}})
            } else {
                json!({"running": {}})
            };
            let status = json!({"status": {
                "phase": "Running", "podIP": format!("10.9.0.{}", index + 1), "podIPs": [{"ip": format!("10.9.0.{}", index + 1)}],
                "conditions": [{"type": "Ready", "status": ready}],
                "containerStatuses": [{"name": "app", "ready": !broken, "restartCount": 0, "image": image, "imageID": "", "state": state}],
            }});
            pods.patch_status(&pod, &PatchParams::default(), &Patch::Merge(&status)).await?;
        }
        let ready = if broken { 0 } else { replicas };
        let status = json!({
            "observedGeneration": deployment.metadata.generation, "replicas": replicas,
            "readyReplicas": ready, "availableReplicas": ready,
        });
        let now = |field: &str| deployment.data["status"][field].clone();
        if now("observedGeneration") != status["observedGeneration"]
            || now("availableReplicas") != status["availableReplicas"]
        {
            deployments.patch_status(&name, &PatchParams::default(), &Patch::Merge(&json!({"status": status}))).await?;
        }
        Ok(())
    }

    async fn native_endpoints(&self, service: &Service, pods: &[Pod]) -> kube::Result<()> {
        let selector = service.spec.as_ref().and_then(|spec| spec.selector.clone()).unwrap_or_default();
        let addresses: Vec<_> = pods
            .iter()
            .filter(|pod| {
                !selector.is_empty() && selector.iter().all(|(key, value)| pod.labels().get(key) == Some(value))
            })
            .filter_map(|pod| pod.status.as_ref()?.pod_ip.clone())
            .collect();
        let addresses = (!addresses.is_empty()).then_some(addresses);
        self.slice(service, "native", "endpointslice-controller.k8s.io", addresses).await
    }

    async fn fleet_endpoints(&self, canary: &Canary) -> kube::Result<()> {
        let wanted =
            canary.status.as_ref().is_some_and(|status| status.traffic.is_some() && status.stage.keeps_slices());
        let addresses = wanted.then(|| vec!["10.8.0.1".to_owned()]);
        for name in canary.spec.service_names() {
            if let Some(service) = self.api::<Service>().get_opt(name).await? {
                self.slice(&service, "fleet", labels::MANAGED_BY, addresses.clone()).await?;
            }
        }
        Ok(())
    }

    async fn slice(
        &self,
        service: &Service,
        kind: &str,
        manager: &str,
        addresses: Option<Vec<String>>,
    ) -> kube::Result<()> {
        let api = self.api::<EndpointSlice>();
        let name = format!("{}-{kind}", service.name_any());
        let found = api.get_opt(&name).await?;
        let Some(addresses) = addresses else {
            if found.is_some() {
                api.delete(&name, &DeleteParams::default()).await?;
            }
            return Ok(());
        };
        let ports: Vec<_> = service.spec.iter().flat_map(|spec| spec.ports.iter().flatten()).collect();
        let wanted = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": name,
                "labels": {"kubernetes.io/service-name": service.name_any(), "endpointslice.kubernetes.io/managed-by": manager},
                "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": service.name_any(), "uid": service.uid()}],
            },
            "addressType": "IPv4",
            "endpoints": addresses.iter().map(|address| json!({"addresses": [address], "conditions": {"ready": true}})).collect::<Vec<_>>(),
            "ports": ports.iter().map(|port| json!({"name": port.name, "port": 20001, "protocol": "TCP"})).collect::<Vec<_>>(),
        });
        api.patch(&name, &PatchParams::apply("player").force(), &Patch::Apply(&wanted)).await?;
        Ok(())
    }

    /// What has owners, all of which are gone, goes.
    async fn collect_garbage(&self) -> kube::Result<()> {
        let mut alive = BTreeSet::new();
        let mut owned: BTreeMap<(&str, String), Vec<String>> = BTreeMap::new();
        let deployments: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), &self.namespace, &deployment_resource());
        let all = ListParams::default();
        let mut note = |kind: &'static str, meta: &ObjectMeta| {
            alive.extend(meta.uid.clone());
            let owners: Vec<_> = meta.owner_references.iter().flatten().map(|owner| owner.uid.clone()).collect();
            if !owners.is_empty() {
                owned.insert((kind, meta.name.clone().unwrap_or_default()), owners);
            }
        };
        deployments.list(&all).await?.iter().for_each(|object| note("Deployment", &object.metadata));
        self.api::<ReplicaSet>().list(&all).await?.iter().for_each(|object| note("ReplicaSet", &object.metadata));
        self.api::<Pod>().list(&all).await?.iter().for_each(|object| note("Pod", &object.metadata));
        self.api::<Service>().list(&all).await?.iter().for_each(|object| note("Service", &object.metadata));
        self.api::<ConfigMap>().list(&all).await?.iter().for_each(|object| note("ConfigMap", &object.metadata));
        self.api::<Secret>().list(&all).await?.iter().for_each(|object| note("Secret", &object.metadata));
        self.api::<EndpointSlice>().list(&all).await?.iter().for_each(|object| note("EndpointSlice", &object.metadata));
        self.api::<ControllerRevision>()
            .list(&all)
            .await?
            .iter()
            .for_each(|object| note("ControllerRevision", &object.metadata));
        self.api::<Canary>().list(&all).await?.iter().for_each(|object| note("Canary", &object.metadata));
        for ((kind, name), owners) in owned {
            if owners.iter().any(|owner| alive.contains(owner)) {
                continue;
            }
            let params = DeleteParams::default().grace_period(0);
            let gone = match kind {
                "Deployment" => deployments.delete(&name, &params).await.map(drop),
                "ReplicaSet" => self.api::<ReplicaSet>().delete(&name, &params).await.map(drop),
                "Pod" => self.api::<Pod>().delete(&name, &params).await.map(drop),
                "Service" => self.api::<Service>().delete(&name, &params).await.map(drop),
                "ConfigMap" => self.api::<ConfigMap>().delete(&name, &params).await.map(drop),
                "Secret" => self.api::<Secret>().delete(&name, &params).await.map(drop),
                "EndpointSlice" => self.api::<EndpointSlice>().delete(&name, &params).await.map(drop),
                _ => continue,
            };
            gone?;
        }
        Ok(())
    }

    fn api<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }
}

fn changes<K>(api: Api<K>, config: watcher::Config) -> stream::BoxStream<'static, ()>
where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    watcher(api, config).default_backoff().map(drop).boxed()
}
