//! What Sluice adds to Services and Deployments stays, whatever Git tools apply: by policies on an API server that serves
//! them, by the webhook on one that does not. Each test runs on both, with Git as somebody else than the controller.

use std::{
    net::Ipv4Addr,
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};

use k8s_openapi::api::{apps::v1::Deployment, autoscaling::v1::Scale, core::v1::Service};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, PostParams},
    core::NamespaceResourceScope,
};
use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use sluice_controller::{
    admission::{
        Effective, Keeper, Pace, Protection, Report, Webhook,
        objects::{Address, PATH},
    },
    cache::Cache,
    delivery::actions::LeaseGuard,
    identity::{Authority, OwnCertificate, Subject, Times},
};
use sluice_crds::{Canary, labels};
use sluice_xds::{PodSubject, SpiffeId};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::watch,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use crate::server::{self, Server};

/// Switches `MutatingAdmissionPolicy` on: Kubernetes 1.34 serves it so, 1.36 by itself.
pub const POLICIES: [&str; 2] =
    ["--feature-gates=MutatingAdmissionPolicy=true", "--runtime-config=admissionregistration.k8s.io/v1beta1=true"];
pub const PATIENCE: Duration = Duration::from_secs(60);
pub const FLUX: &str = "kustomize-controller";

/// Always leads.
struct Leads;

impl LeaseGuard for Leads {
    fn may_write(&self) -> bool {
        true
    }
}

/// What the keeper said last.
#[derive(Default)]
pub struct Said(pub Mutex<Option<(Effective, bool)>>);

impl Report for Said {
    fn protection(&self, state: Option<(Effective, bool)>) {
        *self.0.lock().unwrap() = state;
    }
}

/// An API server that protects, for all tests of one way.
struct Guard {
    server: Server,
}

/// One test's namespace on one of them.
pub struct Scene {
    /// Who applies what is in Git.
    pub git: Client,
    /// The user that the controller is.
    pub own: Client,
    pub namespace: String,
    pub by: Protection,
}

async fn guard(by: Protection) -> Option<&'static Guard> {
    static POLICY: OnceLock<Result<Guard, String>> = OnceLock::new();
    static WEBHOOK: OnceLock<Result<Guard, String>> = OnceLock::new();
    let (place, flags): (_, &[&str]) = match by {
        Protection::Policy => (&POLICY, &POLICIES),
        Protection::Webhook | Protection::Auto | Protection::None => (&WEBHOOK, &[]),
    };
    let start = move || place.get_or_init(|| server::start(flags).map(|server| protect(server, by)));
    server::or_skip(tokio::task::spawn_blocking(start).await.unwrap().as_ref())
}

/// Protects in a runtime of its own, because each test ends with its own.
fn protect(server: Server, by: Protection) -> Guard {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (client, said) = runtime.block_on(async {
        let (client, _) = server.client(None).await;
        server::install(&client).await;
        let said = Arc::<Said>::default();
        (client, said)
    });
    let (ready, wait) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        runtime.block_on(async move {
            let mut tasks = JoinSet::new();
            let (address, ca) = webhook(&client, &mut tasks).await;
            let keeper = keeper(&client, by, address, ca, &said);
            tasks.spawn(keeper.keep(leading()));
            until("it protects", || async { said.0.lock().unwrap().clone() }).await;
            ready.send(()).unwrap();
            std::future::pending::<()>().await;
        });
    });
    wait.blocking_recv().unwrap();
    Guard { server }
}

pub fn leading() -> watch::Receiver<Option<u64>> {
    let (term, leading) = watch::channel(Some(1));
    // As long as the test.
    std::mem::forget(term);
    leading
}

pub fn keeper(client: &Client, protection: Protection, address: Address, ca: String, said: &Arc<Said>) -> Keeper {
    Keeper {
        client: client.clone(),
        protection,
        address,
        ca: watch::channel(ca.into()).1,
        namespace: None,
        release_namespace: "default".into(),
        webhook_port: 18443,
        pace: Pace::default(),
        lease: Arc::new(Leads),
        report: Arc::clone(said) as Arc<dyn Report>,
    }
}

pub async fn authority(client: &Client) -> Arc<Authority> {
    let times = Times { life: Duration::from_secs(86_400), spread: Duration::from_secs(300) };
    Arc::new(Authority::open(client, "default", "cluster.local", times).await.unwrap())
}

/// A webhook with a certificate of our own authority, and its roots.
pub async fn webhook(client: &Client, tasks: &mut JoinSet<()>) -> (Address, String) {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let authority = authority(client).await;
    let subject = Subject {
        id: SpiffeId::new("cluster.local", "default", "sluice-controller").unwrap(),
        pod: PodSubject { namespace: "default".into(), pod: "controller-0".into(), uid: "c0".into() },
        dns_names: vec!["localhost".into()],
    };
    let own = OwnCertificate::new(Arc::clone(&authority), Arc::clone(&provider), subject).unwrap();
    let cache = Cache::start(client, &server::scope("default"), tasks);
    cache.warm().await.unwrap();
    let webhook = Webhook::bind((Ipv4Addr::LOCALHOST, 0).into(), own, provider, cache).await.unwrap();
    let address = Address::Url(format!("https://localhost:{}", webhook.address().unwrap().port()));
    tasks.spawn(webhook.serve(CancellationToken::new()));
    (address, authority.bundle().borrow().to_string())
}

pub async fn until<T, F: Future<Output = Option<T>>>(what: &str, seen: impl Fn() -> F) -> T {
    let wait = async {
        loop {
            if let Some(found) = seen().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}"))
}

/// Runs a test under policies, then under the webhook.
async fn both_ways<F: Future<Output = ()>>(name: &str, test: impl Fn(Scene) -> F) {
    for by in [Protection::Policy, Protection::Webhook] {
        let Some(guard) = guard(by).await else { return };
        let (git, _) = guard.server.client(Some("git")).await;
        let (own, _) = guard.server.client(None).await;
        server::namespace(&git, name).await;
        eprintln!("{name}: by {by:?}");
        test(Scene { git, own, namespace: name.to_owned(), by }).await;
    }
}

pub fn service(selector: &Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "labels": {"app": "web"}},
        "spec": {"selector": selector, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]},
    })
}

/// As in Git; `replicas: None` leaves it out.
pub fn deployment(replicas: Option<u32>, image: &str) -> Value {
    let mut deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
        "spec": {
            "selector": {"matchLabels": {"app": "web"}},
            "template": {
                "metadata": {"labels": {"app": "web"}},
                "spec": {"containers": [{"name": "app", "image": image}]},
            },
        },
    });
    if let Some(replicas) = replicas {
        deployment["spec"]["replicas"] = json!(replicas);
    }
    deployment
}

pub fn plain() -> Value {
    json!({"app": "web"})
}

impl Scene {
    pub fn git<K: Resource<DynamicType = (), Scope = NamespaceResourceScope>>(&self) -> Api<K> {
        Api::namespaced(self.git.clone(), &self.namespace)
    }

    pub fn own<K: Resource<DynamicType = (), Scope = NamespaceResourceScope>>(&self) -> Api<K> {
        Api::namespaced(self.own.clone(), &self.namespace)
    }

    /// As Flux does; the result is what is stored, or would be.
    async fn apply<K>(&self, object: &Value, dry_run: bool) -> K
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + std::fmt::Debug,
    {
        let params = PatchParams { dry_run, ..PatchParams::apply(FLUX).force() };
        let name = object["metadata"]["name"].as_str().unwrap();
        self.git::<K>().patch(name, &params, &Patch::Apply(object)).await.unwrap()
    }

    pub async fn applied_service(&self) -> Service {
        self.apply(&service(&plain()), false).await
    }

    pub async fn applied_deployment(&self, replicas: Option<u32>, image: &str) -> Deployment {
        self.apply(&deployment(replicas, image), false).await
    }

    /// Deployment and Service `web` of Git, and a Canary `shop` that has taken both over, as the controller does it: the
    /// status first. Waits until the status is known where admission decides.
    pub async fn taken_over(&self) {
        self.applied_service().await;
        self.applied_deployment(Some(3), "app:1").await;
        let canary: Canary = serde_json::from_value(json!({
            "apiVersion": "sluice.dev/v1beta1", "kind": "Canary", "metadata": {"name": "shop"},
            "spec": {"targetRef": {"kind": "Deployment", "name": "web"}, "service": {"name": "web", "port": 80}, "skipAnalysis": true},
        }))
        .unwrap();
        self.own::<Canary>().create(&PostParams::default(), &canary).await.unwrap();
        let template = json!({"name": "web", "observedGeneration": 1, "revision": "r1"});
        self.status(json!({"service": "web", "template": template})).await;
        self.merge::<Service>(
            &self.own,
            "web",
            json!({"metadata": {"labels": {labels::CANARY: "shop"}}, "spec": {"selector": {labels::FLEET: "shop"}}}),
        )
        .await;
        self.merge::<Deployment>(
            &self.own,
            "web",
            json!({
                "metadata": {"labels": {labels::CANARY: "shop"}, "annotations": {labels::REPLICAS: "3"}},
                "spec": {"replicas": 0},
            }),
        )
        .await;
        until("the status is known where admission decides", || async {
            let kept = selector(&self.apply(&service(&plain()), true).await) == with_key();
            let rests = rest(&self.apply(&deployment(Some(4), "app:1"), true).await) == (0, Some("4".into()));
            (kept && rests).then_some(())
        })
        .await;
    }

    pub async fn status(&self, status: Value) {
        let patch = Patch::Merge(json!({"status": status}));
        self.own::<Canary>().patch_status("shop", &PatchParams::default(), &patch).await.unwrap();
    }

    pub async fn merge<K>(&self, client: &Client, name: &str, patch: Value) -> K
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + std::fmt::Debug,
    {
        let api: Api<K> = Api::namespaced(client.clone(), &self.namespace);
        api.patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap()
    }

    pub async fn create<K>(&self, object: &Value) -> K
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + DeserializeOwned
            + Serialize
            + std::fmt::Debug,
    {
        let object: K = serde_json::from_value(object.clone()).unwrap();
        self.git::<K>().create(&PostParams::default(), &object).await.unwrap()
    }
}

fn with_key() -> Value {
    json!({"app": "web", labels::FLEET: "shop"})
}

fn selector(service: &Service) -> Value {
    json!(service.spec.as_ref().unwrap().selector)
}

/// Replicas, and the wish that is kept.
pub fn rest(deployment: &Deployment) -> (i32, Option<String>) {
    let replicas = deployment.spec.as_ref().unwrap().replicas.unwrap();
    (replicas, deployment.annotations().get(labels::REPLICAS).cloned())
}

/// What Flux compares: all but what the API server says of an object.
fn compared<K: Resource + Clone + Serialize>(object: &K) -> Value {
    let mut object = object.clone();
    object.meta_mut().managed_fields = None;
    serde_json::to_value(object).unwrap()
}

/// As an API server: a connection, and what is asked on it.
struct Asking(tokio_rustls::client::TlsStream<TcpStream>);

impl Asking {
    async fn connect(address: &str, ca: &str) -> Self {
        let mut roots = rustls::RootCertStore::empty();
        for root in CertificateDer::pem_slice_iter(ca.as_bytes()) {
            roots.add(root.unwrap()).unwrap();
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let config = config.unwrap().with_root_certificates(roots).with_no_client_auth();
        let tcp = TcpStream::connect(address).await.unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        Self(tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, tcp).await.unwrap())
    }

    async fn is_answered(&mut self) -> bool {
        let request = format!("POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\n{{}}");
        self.0.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        while !String::from_utf8_lossy(&answer).contains("not an AdmissionReview") {
            if self.0.read_buf(&mut answer).await.unwrap() == 0 {
                return false;
            }
        }
        true
    }
}

/// Whoever reaches the webhook's port may hold connections to it.
#[tokio::test]
async fn silent_connections_keep_no_api_server_waiting() {
    let Some(guard) = guard(Protection::Webhook).await else { return };
    let (own, _) = guard.server.client(None).await;
    let mut tasks = JoinSet::new();
    let (Address::Url(url), ca) = webhook(&own, &mut tasks).await else { panic!("it is no Service") };
    let address = url.trim_start_matches("https://");
    let within = async {
        let mut kept = Asking::connect(address, &ca).await;
        let mut silent = Vec::new();
        for _ in 0..2 {
            for _ in 0..200 {
                silent.push(TcpStream::connect(address).await.unwrap());
            }
            // Who asks stays.
            assert!(kept.is_answered().await);
        }
        assert!(Asking::connect(address, &ca).await.is_answered().await);
        // The oldest of those that do not has given way, and nobody has waited for the time of the others.
        silent[0].read_u8().await.unwrap_err();
        assert_eq!(silent[200].try_read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    };
    tokio::time::timeout(PATIENCE, within).await.unwrap();
}

#[tokio::test]
async fn forced_server_side_apply_keeps_the_key_and_writes_nothing() {
    both_ways("keeps-key", |scene| async move {
        scene.taken_over().await;
        let first = scene.applied_service().await;
        assert_eq!(selector(&first), with_key());
        let again = scene.applied_service().await;
        assert_eq!(again.resource_version(), first.resource_version(), "no write in steady state");
        // What Git does change goes through.
        let changed: Service = scene.apply(&service(&json!({"app": "web", "tier": "front"})), false).await;
        assert_eq!(selector(&changed), json!({"app": "web", "tier": "front", labels::FLEET: "shop"}));
    })
    .await;
}

#[tokio::test]
async fn a_dry_run_sees_no_drift() {
    both_ways("no-drift", |scene| async move {
        scene.taken_over().await;
        let live = scene.applied_service().await;
        let dry: Service = scene.apply(&service(&plain()), true).await;
        assert_eq!(compared(&dry), compared(&live));
        let live = scene.applied_deployment(Some(3), "app:1").await;
        let dry: Deployment = scene.apply(&deployment(Some(3), "app:1"), true).await;
        assert_eq!(compared(&dry), compared(&live));
    })
    .await;
}

#[tokio::test]
async fn replicas_in_git_are_a_wish_and_start_nothing() {
    both_ways("replicas", |scene| async move {
        scene.taken_over().await;
        let first = scene.applied_deployment(Some(3), "app:1").await;
        assert_eq!(rest(&first), (0, Some("3".into())));
        let again = scene.applied_deployment(Some(3), "app:1").await;
        assert_eq!(again.resource_version(), first.resource_version(), "no write in steady state");
        assert_eq!(rest(&scene.applied_deployment(Some(5), "app:1").await), (0, Some("5".into())));
        let released = scene.applied_deployment(Some(5), "app:2").await;
        assert_eq!(rest(&released), (0, Some("5".into())), "a new version starts no Pod by itself");
        assert!(released.metadata.generation > again.metadata.generation, "and it is seen");
        assert_eq!(rest(&scene.applied_deployment(Some(1), "app:2").await), (0, Some("1".into())), "one is a wish too");
        assert_eq!(rest(&scene.applied_deployment(Some(3), "app:2").await), (0, Some("3".into())));
        let left_out = scene.applied_deployment(None, "app:2").await;
        assert_eq!(
            rest(&left_out),
            (0, Some("3".into())),
            "what Git does not say is no wish for Kubernetes' default of 1"
        );
    })
    .await;
}

#[tokio::test]
async fn client_side_apply_changes_the_wish_only() {
    both_ways("client-side", |scene| async move {
        scene.taken_over().await;
        // kubectl and Argo CD send the difference between what was applied last and Git, beside what is applied now.
        let applied = |replicas: Option<u32>| {
            let annotation = deployment(replicas, "app:1").to_string();
            json!({"kubectl.kubernetes.io/last-applied-configuration": annotation})
        };
        let patch = |replicas: Option<u32>| json!({"metadata": {"annotations": applied(replicas)}, "spec": {"replicas": replicas}});
        let written: Deployment = scene.merge(&scene.git, "web", patch(Some(4))).await;
        assert_eq!(rest(&written), (0, Some("4".into())));
        let removed: Deployment = scene.merge(&scene.git, "web", patch(None)).await;
        assert_eq!(rest(&removed), (0, Some("4".into())));
        let by_hand: Deployment = scene.merge(&scene.git, "web", json!({"spec": {"replicas": 1}})).await;
        assert_eq!(rest(&by_hand), (0, Some("1".into())));
    })
    .await;
}

#[tokio::test]
async fn a_replacement_without_our_marks_keeps_them() {
    both_ways("replaced", |scene| async move {
        scene.taken_over().await;
        let replaced: Service = serde_json::from_value(service(&plain())).unwrap();
        let replaced = scene.git::<Service>().replace("web", &PostParams::default(), &replaced).await.unwrap();
        assert_eq!(selector(&replaced), with_key());
        let wanted: Deployment = serde_json::from_value(deployment(Some(2), "app:2")).unwrap();
        let replaced = scene.git::<Deployment>().replace("web", &PostParams::default(), &wanted).await.unwrap();
        assert_eq!(rest(&replaced), (0, Some("2".into())));
        // Once more, because the first one took the label away.
        assert_eq!(selector(&scene.applied_service().await), with_key());
        assert_eq!(rest(&scene.applied_deployment(Some(2), "app:2").await), (0, Some("2".into())));
    })
    .await;
}

#[tokio::test]
async fn what_is_created_anew_is_protected_by_policies_at_once() {
    both_ways("anew", |scene| async move {
        scene.taken_over().await;
        scene.git::<Service>().delete("web", &DeleteParams::default()).await.unwrap();
        scene.git::<Deployment>().delete("web", &DeleteParams::background()).await.unwrap();
        let service = scene.applied_service().await;
        let deployment = scene.applied_deployment(Some(3), "app:1").await;
        match scene.by {
            Protection::Policy => {
                assert_eq!(selector(&service), with_key());
                assert_eq!(rest(&deployment), (0, Some("3".into())));
                scene.git::<Deployment>().delete("web", &DeleteParams::background()).await.unwrap();
                assert_eq!(rest(&scene.applied_deployment(None, "app:1").await), (0, None), "nobody wished for one");
            }
            // A new object has no label yet, so the webhook does not see it: delivery repairs it.
            Protection::Webhook | Protection::Auto | Protection::None => assert_eq!(selector(&service), plain()),
        }
    })
    .await;
}

#[tokio::test]
async fn the_target_cannot_be_scaled_and_revisions_can() {
    both_ways("scale", |scene| async move {
        scene.taken_over().await;
        let mut revision = deployment(Some(1), "app:1");
        revision["metadata"]["name"] = json!("web-5d8f9c7b6a");
        scene.create::<Deployment>(&revision).await;
        let scale = |name: &'static str, replicas: u32| {
            let api = scene.git::<Deployment>();
            let patch = json!({"spec": {"replicas": replicas}});
            async move { api.patch_scale(name, &PatchParams::default(), &Patch::Merge(&patch)).await }
        };
        let refused = |error: kube::Error| {
            let kube::Error::Api(status) = error else { panic!("{error}") };
            assert_eq!((status.code, status.reason.as_str()), (403, "Forbidden"));
            assert!(status.message.ends_with("use: kubectl scale canary/shop"), "{}", status.message);
        };
        // A policy takes a moment to be known.
        until("scaling is refused", || async { scale("web", 0).await.is_err().then_some(()) }).await;
        refused(scale("web", 2).await.unwrap_err());
        // An autoscaler replaces the Scale.
        let mut whole: Scale = scene.git::<Deployment>().get_scale("web").await.unwrap();
        whole.spec.as_mut().unwrap().replicas = Some(4);
        refused(scene.git::<Deployment>().replace_scale("web", &PostParams::default(), &whole).await.unwrap_err());
        let scaled = scale("web-5d8f9c7b6a", 4).await.unwrap();
        assert_eq!(scaled.spec.unwrap().replicas, Some(4));
        // After the hand-back it is a Deployment like any other.
        scene.status(json!({"template": {"name": ""}})).await;
        until("it can be scaled", || async { scale("web", 2).await.ok() }).await;
    })
    .await;
}

#[tokio::test]
async fn a_revision_runs_as_it_was_judged() {
    both_ways("revision", |scene| async move {
        scene.taken_over().await;
        let canary = scene.own::<Canary>().get("shop").await.unwrap();
        let owner = json!({
            "apiVersion": "sluice.dev/v1beta1", "kind": "Canary", "name": canary.name_any(), "uid": canary.uid(),
            "controller": true,
        });
        let mut revision = deployment(Some(1), "app:1");
        revision["metadata"]["name"] = json!("web-5d8f9c7b6a");
        revision["metadata"]["labels"] = json!({labels::CANARY: "shop", labels::REVISION: "5d8f9c7b6a"});
        revision["metadata"]["ownerReferences"] = json!([owner]);
        scene.create::<Deployment>(&revision).await;
        let restart = |n: u32| {
            let api = scene.git::<Deployment>();
            let template = json!({"metadata": {"annotations": {"kubectl.kubernetes.io/restartedAt": n.to_string()}}});
            let patch = json!({"spec": {"template": template}});
            async move { api.patch("web-5d8f9c7b6a", &PatchParams::default(), &Patch::Merge(&patch)).await }
        };
        // A policy takes a moment to be known.
        let mut tries = 0;
        let error = loop {
            tries += 1;
            match restart(tries).await {
                Err(error) => break error,
                Ok(_) => assert!(tries < 500, "never refused"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let kube::Error::Api(status) = error else { panic!("{error}") };
        assert_eq!((status.code, status.reason.as_str()), (403, "Forbidden"));
        assert!(status.message.contains("change the Deployment that its Canary names"), "{}", status.message);
        // What does not concern the Pods goes through, and so do we.
        let more: Deployment = scene.merge(&scene.git, "web-5d8f9c7b6a", json!({"spec": {"replicas": 2}})).await;
        assert_eq!(more.spec.unwrap().replicas, Some(2));
        let mended = json!({"spec": {"template": {"metadata": {"annotations": null}}}});
        scene.merge::<Deployment>(&scene.own, "web-5d8f9c7b6a", mended).await;
        // Without its Canary it is a Deployment like any other.
        let orphan = json!({"metadata": {"ownerReferences": null}});
        scene.merge::<Deployment>(&scene.own, "web-5d8f9c7b6a", orphan).await;
        until("it can be restarted", || async { restart(0).await.ok() }).await;
    })
    .await;
}

#[tokio::test]
async fn the_hand_back_takes_effect_with_its_first_write() {
    both_ways("hand-back-writes", |scene| async move {
        scene.taken_over().await;
        // Both at once after the status, before it is known where admission decides.
        scene.status(json!({"service": null, "template": {"name": ""}})).await;
        let no_key =
            json!({"metadata": {"labels": {labels::CANARY: null}}, "spec": {"selector": {labels::FLEET: null}}});
        let service: Service = scene.merge(&scene.own, "web", no_key).await;
        assert_eq!(selector(&service), plain());
        let awake = json!({
            "metadata": {"labels": {labels::CANARY: null}, "annotations": {labels::REPLICAS: null}},
            "spec": {"replicas": 3},
        });
        let deployment: Deployment = scene.merge(&scene.own, "web", awake).await;
        assert_eq!(rest(&deployment), (3, None));
    })
    .await;
}

#[tokio::test]
async fn deletion_and_finalization_are_never_held_up() {
    both_ways("finalize", |scene| async move {
        scene.taken_over().await;
        let hold = json!({"metadata": {"finalizers": ["example.com/hold"]}});
        let let_go = json!({"metadata": {"finalizers": null}});
        scene.merge::<Service>(&scene.git, "web", hold.clone()).await;
        scene.merge::<Deployment>(&scene.git, "web", hold).await;
        scene.git::<Service>().delete("web", &DeleteParams::default()).await.unwrap();
        scene.git::<Deployment>().delete("web", &DeleteParams::foreground()).await.unwrap();
        // A write to what goes away is let through as it is.
        let without_key = json!({"spec": {"selector": {labels::FLEET: null}}});
        let dying: Service = scene.merge(&scene.git, "web", without_key).await;
        assert_eq!(selector(&dying), plain());
        scene.merge::<Service>(&scene.git, "web", let_go).await;
        let let_go = json!({"metadata": {"finalizers": ["foregroundDeletion"]}, "spec": {"replicas": 3}});
        let dying: Deployment = scene.merge(&scene.git, "web", let_go).await;
        assert_eq!(dying.spec.unwrap().replicas, Some(3));
        assert!(scene.git::<Service>().get_opt("web").await.unwrap().is_none());
    })
    .await;
}

#[tokio::test]
async fn a_namespace_without_canaries_is_not_concerned() {
    both_ways("stranger", |scene| async move {
        scene.taken_over().await;
        let elsewhere = format!("{}-elsewhere", scene.namespace);
        server::namespace(&scene.git, &elsewhere).await;
        let there = Scene { namespace: elsewhere, git: scene.git.clone(), own: scene.own.clone(), by: scene.by };
        assert_eq!(selector(&there.applied_service().await), plain());
        assert_eq!(rest(&there.applied_deployment(Some(3), "app:1").await), (3, None));
        let more = Patch::Merge(json!({"spec": {"replicas": 4}}));
        there.git::<Deployment>().patch_scale("web", &PatchParams::default(), &more).await.unwrap();
        // And in the same namespace, what no Canary names.
        let mut other = service(&plain());
        other["metadata"]["name"] = json!("shop");
        assert_eq!(selector(&scene.apply(&other, false).await), plain());
    })
    .await;
}
