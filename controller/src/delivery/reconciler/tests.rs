#![allow(clippy::unwrap_used)]
use http::{Request, Response};
use kube::{Client, client::Body};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::*;
use crate::{
    cache::{Cache, Scope},
    delivery::{actions::LeaseGuard, config::Reader, template::Sidecar},
};

#[test]
fn the_wait_after_an_error_grows_to_a_cap_and_is_never_nothing() {
    for failures in 0..100_u32 {
        let full = BACKOFF_BASE.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(BACKOFF_CAP);
        let wait = backoff(failures);
        assert!(wait <= full && wait >= full / 2, "{failures}: {wait:?} of {full:?}");
    }
    assert!(backoff(100) >= BACKOFF_CAP / 2);
}

#[test]
fn only_numbers_are_compared_as_resource_versions() {
    let at = |version: &str| Canary {
        metadata: kube::core::ObjectMeta { resource_version: Some(version.into()), ..Default::default() },
        ..canary()
    };
    assert!(older(&at("9"), "10"), "as numbers, not as text");
    assert!(!older(&at("10"), "10"));
    assert!(!older(&at("11"), "10"));
    assert!(!older(&at("abc"), "10"));
}

fn canary() -> Canary {
    let spec = json!({"targetRef": {"kind": "Deployment", "name": "x"}, "service": {"port": 80}});
    Canary::new("x", serde_json::from_value(spec).unwrap())
}

#[test]
fn only_a_taken_name_that_no_watch_shows_is_remembered() {
    let (memories, key) = (Memories::default(), CanaryKey::new("shop", "web"));
    let found = |kind| {
        memories.found_taken(&key, &ActionError::Taken { kind, name: "web".into() });
        memories.with(&key, |memory| memory.taken.is_some())
    };
    // Its owner made it in the same moment: it is what was waited for.
    assert!(!found("Service") && !found("Deployment") && !found("ConfigMap"));
    assert!(found("ControllerRevision"));
}

/// The other rooms: a fleet without members, nothing measured, and what was asked of them.
#[derive(Default)]
struct Rooms {
    cut: Mutex<Vec<CanaryKey>>,
}

impl Mesh for Rooms {
    fn fleet(&self, _: &CanaryKey) -> Fleet {
        Fleet::default()
    }

    fn cut(&self, canary: &CanaryKey) {
        self.cut.lock().unwrap().push(canary.clone());
    }

    fn restore(&self, _: &CanaryKey) {}
}

impl Judge for Rooms {
    fn set(&self, _: &CanaryKey, _: Option<Task>) {}

    fn report(&self, _: &CanaryKey) -> Option<Report> {
        None
    }

    fn dry_run(&self, _: &DryRunRequest) -> Option<DryRun> {
        None
    }

    fn dry_run_waits_for(&self, _: &CanaryKey) -> Option<String> {
        None
    }

    fn forget(&self, _: &CanaryKey) {}
}

impl Guarding for Rooms {
    fn watch(&self, _: &CanaryKey, _: Option<Watch>) {}

    fn breach(&self, _: &CanaryKey) -> Option<Breach> {
        None
    }
}

impl Announce for Rooms {
    fn announce(&self, _: &Canary, _: &Event) {}
}

impl Gauges for Rooms {
    fn set(&self, _: &CanaryKey, _: &CanaryStatus) {}

    fn remove(&self, _: &CanaryKey) {}

    fn reconciled(&self, _: Duration, _: bool) {}
}

impl LeaseGuard for Rooms {
    fn may_write(&self) -> bool {
        true
    }
}

/// A Canary whose canary has lost its Pods, and whose target uses a Secret that the API server does not give out. Nobody has said yet
/// whether it is followed.
fn with_an_unreadable_secret(written: Arc<Mutex<Option<Value>>>) -> (Client, Value) {
    let canary = json!({
        "apiVersion": "sluice.dev/v1beta1", "kind": "Canary",
        "metadata": {"name": "web", "namespace": "shop", "uid": "c", "generation": 1, "resourceVersion": "5", "finalizers": [labels::FINALIZER]},
        "spec": {"targetRef": {"kind": "Deployment", "name": "web"}, "service": {"port": 80}, "skipAnalysis": true, "replicas": 1},
        "status": {
            "phase": "Progressing", "stage": "Judge", "step": 0, "service": "web", "primaryRevision": "v1", "canaryRevision": "v2",
            "template": {"name": "web", "uid": "t", "observedGeneration": 2, "revision": "v2", "replicas": 1},
            "traffic": {"primary": "v1", "canary": "v2", "weight": 10},
        },
    });
    let target = json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": "web", "namespace": "shop", "uid": "t", "generation": 3, "resourceVersion": "5"},
        "spec": {"replicas": 0, "template": {"spec": {"containers": [{"name": "app", "envFrom": [{"secretRef": {"name": "keys"}}]}]}}},
    });
    let secret = json!({"metadata": {"name": "keys", "namespace": "shop", "uid": "s", "resourceVersion": "5"}});
    let stored = canary.clone();
    let server = tower::service_fn(move |request: Request<Body>| {
        let (canary, target, secret, written) = (stored.clone(), target.clone(), secret.clone(), written.clone());
        async move {
            let path = request.uri().path().to_owned();
            let list = |items: &[Value]| json!({"metadata": {"resourceVersion": "5"}, "items": items});
            let (code, answer) = if request.uri().query().unwrap_or_default().contains("watch=true") {
                std::future::pending().await
            } else if path.ends_with("/secrets/keys") {
                (
                    500,
                    json!({"kind": "Status", "status": "Failure", "code": 500, "reason": "InternalError", "message": "no"}),
                )
            } else if path.ends_with("/canaries/web/status") {
                let sent: Value = serde_json::from_slice(&request.into_body().collect_bytes().await.unwrap()).unwrap();
                *written.lock().unwrap() = Some(sent["status"].clone());
                (200, sent)
            } else if path.ends_with("/canaries") {
                (200, list(&[canary]))
            } else if path.ends_with("/deployments") {
                (200, list(&[target]))
            } else if path.ends_with("/secrets") {
                (200, list(&[secret]))
            } else {
                (200, list(&[]))
            };
            let answer = Response::builder().status(code).body(Body::from(answer.to_string().into_bytes()));
            Ok::<_, std::convert::Infallible>(answer.unwrap())
        }
    });
    (Client::new(server, "shop"), canary)
}

fn sidecar() -> Sidecar {
    Sidecar {
        image: "sluice".into(),
        image_pull_policy: None,
        controller: "sluice:443".into(),
        controller_id: "spiffe://a/b".into(),
        cpu_request: "1m".into(),
        memory_request: "1Mi".into(),
        cpu_limit: None,
        memory_limit: None,
        log: "info".into(),
        log_format: "json".into(),
    }
}

#[tokio::test]
async fn configuration_that_cannot_be_read_does_not_stand_in_the_way_of_weight_0() {
    let written = Arc::new(Mutex::new(None));
    let (client, canary) = with_an_unreadable_secret(written.clone());
    let scope = Scope { namespace: None, release_namespace: "sluice".into(), namespaces: true, secrets: true };
    let mut tasks = JoinSet::new();
    let cache = Cache::start(&client, &scope, &mut tasks);
    cache.warm().await.unwrap();
    let rooms = Arc::new(Rooms::default());
    let ctx = Arc::new(Context {
        effects: Effects {
            client: client.clone(),
            cache,
            configs: Arc::new(Reader::new(client, Duration::from_secs(5))),
            lease: rooms.clone(),
            sidecar: sidecar(),
            deadline: Duration::from_secs(5),
        },
        settle: Duration::from_secs(1),
        limits: Limits::default(),
        mesh: rooms.clone(),
        judge: rooms.clone(),
        guard: rooms.clone(),
        announce: rooms.clone(),
        gauges: rooms.clone(),
        memory: Memories::default(),
    });
    let canary: Canary = serde_json::from_value(canary).unwrap();
    let looked = reconcile(Arc::new(canary.clone()), ctx.clone()).await;
    assert!(matches!(looked, Err(Error::Config(_))), "it is said, and tried again: {looked:?}");
    assert_eq!(*rooms.cut.lock().unwrap(), [CanaryKey::of(&canary)]);
    let status: CanaryStatus = serde_json::from_value(written.lock().unwrap().take().unwrap()).unwrap();
    assert_eq!((status.stage, status.requested_weight), (Stage::RollBack, 0));
    assert_eq!(status.template, canary.status.unwrap().template, "nothing is said of a template that is not known");
}
