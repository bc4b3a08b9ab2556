//! Git tools at work all the time: a loop that applies as Flux does, and one as Argo CD does, twice a second, through
//! takeover, a good release, one that is rolled back, and hand-back. Nothing may drift, no Pod may start that nobody judges, no
//! request may fail.
//!
//! `POLICIES=1 tests/e2e/run` starts a cluster in which the API server's policies protect; without, it is the webhook.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::TryStreamExt;
use k8s_openapi::api::{
    apps::v1::{ControllerRevision, Deployment},
    core::v1::{Pod, Service},
};
use kube::{
    Api, ResourceExt,
    api::{ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams},
    core::GroupVersionKind,
    runtime::{WatchStreamExt, watcher},
};
use serde_json::{Value, json};
use sluice_crds::Phase;
use sluice_e2e::{
    adopted::{MINUTE, Use, cluster, ended, eventually, unique},
    app::App,
    cluster::Cluster,
    load::{EVERY_PROTOCOL, Load},
    watch::unix_ms,
};
use tokio::{sync::Mutex as AsyncMutex, task::JoinHandle};

const PERIOD: Duration = Duration::from_millis(500);
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tool {
    /// Server-side apply with force; drift is what a dry run would change.
    Flux,
    /// The difference between what was applied last, Git and the cluster, computed by the client, with
    /// `ignoreDifferences: /spec/replicas` and `RespectIgnoreDifferences=true`; applies only what is out of sync.
    Argo,
}

/// What is in Git: Deployment and Service `hello`.
#[derive(Clone)]
struct Git {
    objects: Arc<Mutex<Vec<Value>>>,
}

/// A difference that a tool saw, or a write that was refused.
#[derive(Clone, Debug)]
struct Trouble {
    at_ms: u64,
    #[allow(dead_code)] // for people
    what: String,
}

struct Tooling {
    git: Git,
    troubles: Arc<Mutex<Vec<Trouble>>>,
    rounds: Arc<Mutex<u64>>,
    task: JoinHandle<()>,
}

impl Drop for Tooling {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Git {
    /// Commits a version of the application.
    fn commit(&self, env: &[(&str, &str)]) {
        for object in self.objects.lock().unwrap().iter_mut().filter(|object| object["kind"] == "Deployment") {
            let list = object.pointer_mut("/spec/template/spec/containers/0/env").unwrap().as_array_mut().unwrap();
            for (name, value) in env {
                let entry = list.iter_mut().find(|entry| entry["name"] == *name).unwrap();
                entry["value"] = json!(value);
            }
        }
    }
}

impl Tooling {
    fn start(cluster: &Cluster, namespace: &str, tool: Tool, objects: Vec<Value>) -> Self {
        let git = Git { objects: Arc::new(Mutex::new(objects)) };
        let troubles = Arc::<Mutex<Vec<Trouble>>>::default();
        let rounds = Arc::<Mutex<u64>>::default();
        let (cluster, namespace) = (cluster.clone(), namespace.to_owned());
        let (reads, tells, counts) = (git.clone(), Arc::clone(&troubles), Arc::clone(&rounds));
        let task = tokio::spawn(async move {
            let mut applied: Vec<Value> = Vec::new();
            let mut ticks = tokio::time::interval(PERIOD);
            loop {
                ticks.tick().await;
                let wanted = reads.objects.lock().unwrap().clone();
                for object in &wanted {
                    // What was committed since the last round is no drift.
                    let settled = applied.contains(object);
                    let round = match tool {
                        Tool::Flux => flux(&cluster, &namespace, object).await,
                        Tool::Argo => argo(&cluster, &namespace, object).await,
                    };
                    let what = match round {
                        Ok(None) => continue,
                        Ok(Some(drift)) if settled => format!("drift of {}: {drift}", object["kind"]),
                        Ok(Some(_)) => continue,
                        Err(error) => format!("{}: {error:#}", object["kind"]),
                    };
                    println!("{tool:?}: {what}");
                    tells.lock().unwrap().push(Trouble { at_ms: unix_ms(), what });
                }
                applied = wanted;
                *counts.lock().unwrap() += 1;
            }
        });
        Self { git, troubles, rounds, task }
    }

    fn troubles(&self, from_ms: u64, to_ms: u64) -> Vec<Trouble> {
        let troubles = self.troubles.lock().unwrap();
        troubles.iter().filter(|trouble| (from_ms..to_ms).contains(&trouble.at_ms)).cloned().collect()
    }
}

fn api(cluster: &Cluster, namespace: &str, object: &Value) -> (Api<DynamicObject>, String) {
    let resource = match object["kind"].as_str().unwrap() {
        "Deployment" => {
            ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("apps", "v1", "Deployment"), "deployments")
        }
        kind => ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("", "v1", kind), "services"),
    };
    let name = object["metadata"]["name"].as_str().unwrap().to_owned();
    (Api::namespaced_with(cluster.client.clone(), namespace, &resource), name)
}

/// What tools compare.
fn compared(object: &DynamicObject) -> Value {
    json!({"labels": object.metadata.labels, "annotations": object.metadata.annotations, "spec": object.data["spec"]})
}

/// Detects drift by a dry run, then applies. The drift.
async fn flux(cluster: &Cluster, namespace: &str, object: &Value) -> anyhow::Result<Option<String>> {
    let (api, name) = api(cluster, namespace, object);
    let params = PatchParams::apply("kustomize-controller").force();
    let dry = PatchParams { dry_run: true, ..params.clone() };
    // The object may change in between, by whoever may change it: what the tool would change is seen twice then.
    let mut drift = None;
    for _ in 0..2 {
        let live = api.get(&name).await?;
        let would = api.patch(&name, &dry, &Patch::Apply(object)).await?;
        if would.data["spec"] == live.data["spec"] {
            drift = None;
            break;
        }
        drift = Some(format!("{} becomes {}", live.data["spec"], would.data["spec"]));
    }
    api.patch(&name, &params, &Patch::Apply(object)).await?;
    Ok(drift)
}

/// Computes the difference, and applies if there is one. The difference.
async fn argo(cluster: &Cluster, namespace: &str, object: &Value) -> anyhow::Result<Option<String>> {
    let (api, name) = api(cluster, namespace, object);
    let live = api.get(&name).await?;
    let last = live.annotations().get(LAST_APPLIED).map(|last| serde_json::from_str(last)).transpose()?;
    let mut wanted = object.clone();
    if let Some(replicas) = wanted.pointer_mut("/spec/replicas") {
        // Ignored, and respected as such: what is live is applied.
        *replicas = live.data["spec"]["replicas"].clone();
    }
    let before = compared(&live);
    let mut after =
        json!({"labels": live.metadata.labels, "annotations": live.metadata.annotations, "spec": live.data["spec"]});
    let of = |object: &Value| {
        let metadata = &object["metadata"];
        json!({"labels": metadata["labels"], "annotations": metadata.get("annotations").unwrap_or(&json!({})), "spec": object["spec"]})
    };
    three_way(last.as_ref().map(of).as_ref(), &of(&wanted), &mut after);
    // The tool's own annotation aside.
    for side in [&mut after] {
        if let Some(annotations) = side["annotations"].as_object_mut()
            && let Some(last) = live.annotations().get(LAST_APPLIED)
        {
            annotations.insert(LAST_APPLIED.to_owned(), json!(last));
        }
    }
    if last.is_some() && after == before {
        return Ok(None);
    }
    cluster.kubectl(&["-n", namespace, "apply", "-f", "-"], Some(&wanted.to_string())).await?;
    Ok(Some(format!("{before} becomes {after}")))
}

/// A three-way merge as of client-side apply: what Git says holds, what it no longer says goes, the rest stays. Lists are
/// merged by name.
fn three_way(last: Option<&Value>, wanted: &Value, live: &mut Value) {
    match (wanted, live) {
        (Value::Object(wanted), Value::Object(live)) => {
            for key in last.and_then(Value::as_object).into_iter().flat_map(|last| last.keys()) {
                if !wanted.contains_key(key) {
                    live.remove(key);
                }
            }
            for (key, value) in wanted.iter().filter(|(_, value)| !value.is_null()) {
                three_way(last.and_then(|last| last.get(key)), value, live.entry(key).or_insert(Value::Null));
            }
        }
        (Value::Array(wanted), Value::Array(live)) if wanted.iter().all(|item| item.get("name").is_some()) => {
            let named =
                |list: &Value, name: &Value| list.as_array()?.iter().find(|item| item["name"] == *name).cloned();
            for item in wanted {
                let name = &item["name"];
                let last = last.and_then(|last| named(last, name));
                match live.iter_mut().find(|live| live["name"] == *name) {
                    Some(live) => three_way(last.as_ref(), item, live),
                    None => live.push(item.clone()),
                }
            }
        }
        (wanted, live) => *live = wanted.clone(),
    }
}

/// Pods that the Deployment of Git has made, by name, and when they were seen first.
struct OwnPods {
    seen: Arc<Mutex<Vec<(u64, String)>>>,
    task: JoinHandle<()>,
}

impl OwnPods {
    fn watch(cluster: &Cluster, namespace: &str) -> Self {
        let seen = Arc::<Mutex<Vec<(u64, String)>>>::default();
        let log = Arc::clone(&seen);
        let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), namespace);
        let task = tokio::spawn(async move {
            let unjudged = watcher::Config::default().labels("app=hello,!sluice.dev/revision");
            let mut stream = std::pin::pin!(watcher(pods, unjudged).default_backoff().touched_objects());
            loop {
                match stream.try_next().await {
                    Ok(Some(pod)) => {
                        let mut log = log.lock().unwrap();
                        if log.iter().all(|(_, name)| *name != pod.name_any()) {
                            log.push((unix_ms(), pod.name_any()));
                        }
                    }
                    Ok(None) => return,
                    Err(error) => println!("watch: {error}"),
                }
            }
        });
        Self { seen, task }
    }

    fn between(&self, from_ms: u64, to_ms: u64) -> Vec<String> {
        let seen = self.seen.lock().unwrap();
        seen.iter().filter(|(at, _)| (from_ms..to_ms).contains(at)).map(|(_, name)| name.clone()).collect()
    }
}

impl Drop for OwnPods {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn revisions(app: &App) -> usize {
    let records: Api<ControllerRevision> = Api::namespaced(app.cluster.client.clone(), &app.namespace);
    records.list(&ListParams::default().labels("sluice.dev/canary=hello")).await.unwrap().items.len()
}

/// By the API server's policies where it serves them, by the webhook where it does not; never by both.
async fn protected_once(cluster: &Cluster) {
    let policies = cluster.serves_policies().await.unwrap();
    for (kind, here) in [("mutatingadmissionpolicies", policies), ("mutatingwebhookconfigurations", !policies)] {
        // Where the API server does not know the kind, there is none of ours.
        let ours = cluster.kubectl(&["get", kind, "-o", "name"], None).await.unwrap_or_default();
        assert_eq!(ours.contains("sluice.dev"), here, "{kind}: {ours}");
    }
}

async fn releases_under(tool: Tool) {
    // One after the other: both install, and each is a load of its own.
    static ONE: AsyncMutex<()> = AsyncMutex::const_new(());
    let _one = ONE.lock().await;
    let Some((cluster, _held)) = cluster(Use::Shared).await else { return };
    let name = unique(&format!("{tool:?}").to_lowercase());
    let app = App::deploy(&cluster, &name, 3).await.unwrap();
    let manifest = cluster.file("examples/hello/deployment.yaml").unwrap().replace("replicas: 4", "replicas: 3");
    let objects: Vec<Value> = serde_saphyr::from_multiple(&manifest).unwrap();
    let objects = objects.into_iter().filter(|object| object["kind"] != "ConfigMap").map(|mut object| {
        if let Some(image) = object.pointer_mut("/spec/template/spec/containers/0/image") {
            *image = json!(format!("localhost/sluice-hello:{}", cluster.tag));
        }
        object
    });
    let arguments = [&["--target", "hello:80", "--rate", "60"], EVERY_PROTOCOL].concat();
    let load = Load::start(&cluster, &name, "load", &arguments).await.unwrap();
    let from_ms = load.steady().await.unwrap();
    protected_once(&cluster).await;
    let tooling = Tooling::start(&cluster, &name, tool, objects.collect());
    let own_pods = OwnPods::watch(&cluster, &name);

    // Takeover.
    let started = unix_ms();
    let spec = json!({"drainSeconds": 2, "scaleDownDelaySeconds": 5, "progressDeadlineSeconds": 60, "analysis": {
        "interval": "4s", "stepWeights": [20, 60],
        "metrics": [{"name": "request-success-rate", "interval": "4s", "thresholdRange": {"min": 99}}],
    }});
    app.canary(spec).await.unwrap();
    let adopted = app.adopted().await.unwrap().at_ms;
    assert_eq!(revisions(&app).await, 1);
    app.own_pods_ended().await.unwrap();
    let through_fleet = unix_ms();

    // A good release, by Git.
    let committed = unix_ms();
    tooling.git.commit(&[("VERSION", "v2")]);
    let done = app.ends(committed, Phase::Succeeded, 2 * MINUTE).await.unwrap().status;
    let primary = done.primary_revision.clone().unwrap();
    assert_eq!(app.pods_of(&primary).await.unwrap().len(), 3, "as many as Git says");
    assert_eq!(revisions(&app).await, 2);

    // One that is rolled back, while Git goes on to say it.
    let committed = unix_ms();
    tooling.git.commit(&[("VERSION", "v3"), ("ERROR_RATE", "0.5")]);
    let done = app.ends(committed, Phase::Failed, 2 * MINUTE).await.unwrap().status;
    assert_eq!(done.primary_revision, Some(primary.clone()));
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(revisions(&app).await, 3, "what was rejected is not tried again");
    let last = app.history.last().unwrap().status;
    assert_eq!((last.phase, last.primary_revision), (Phase::Failed, Some(primary)));

    // Git goes back, so that what is handed back is good.
    tooling.git.commit(&[("VERSION", "v2"), ("ERROR_RATE", "0")]);
    let deployments: Api<Deployment> = Api::namespaced(cluster.client.clone(), &name);
    eventually("the revert", 2 * MINUTE, || async {
        let settled = app.history.last().unwrap().status;
        let template = settled.template.clone().unwrap_or_default();
        (Some(template.revision) == settled.primary_revision).then_some(())
    })
    .await;

    // Hand-back.
    let handing_back = unix_ms();
    app.canaries().delete("hello", &DeleteParams::default()).await.unwrap();
    eventually("the end of the Canary", 2 * MINUTE, || async {
        app.canaries().get_opt("hello").await.unwrap().is_none().then_some(())
    })
    .await;
    let handed_back = unix_ms();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let end = unix_ms();
    assert_eq!(deployments.get("hello").await.unwrap().spec.unwrap().replicas, Some(3));
    let services: Api<Service> = Api::namespaced(cluster.client.clone(), &name);
    let selector = services.get("hello").await.unwrap().spec.unwrap().selector.unwrap();
    assert_eq!(selector.len(), 1, "{selector:?}");

    // What the tool saw. While the takeover or the hand-back is written, one round may come between the status and the
    // moment when it is known where admission decides (some ten milliseconds).
    let rounds = *tooling.rounds.lock().unwrap();
    println!("{tool:?}: {rounds} rounds in {} s", (end - started) / 1000);
    assert_eq!(tooling.troubles(adopted, handing_back).len(), 0);
    assert_eq!(tooling.troubles(handed_back + 1000, end).len(), 0);
    assert!(tooling.troubles(started, adopted).len() <= 2);
    assert!(tooling.troubles(handing_back, handed_back + 1000).len() <= 2);
    assert_eq!(own_pods.between(adopted, handing_back), Vec::<String>::new(), "Pods that nobody judged");
    load.catch_up().await.unwrap();
    let lost = load.lost_but_for_the_takeover(from_ms, through_fleet);
    assert!(lost.is_empty(), "lost requests: {lost:#?}");
    ended(app).await;
}

#[tokio::test]
async fn flux_and_sluice_live_together() {
    Box::pin(releases_under(Tool::Flux)).await;
}

#[tokio::test]
async fn argo_cd_and_sluice_live_together() {
    Box::pin(releases_under(Tool::Argo)).await;
}
