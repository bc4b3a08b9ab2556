//! The API server, and what is asked of it.
use std::{
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::OnceLock,
};

use k8s_openapi::{
    api::core::v1::Namespace, apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client, Config, ResourceExt,
    api::{DynamicObject, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
    core::{ApiResource, GroupVersionKind},
    runtime::wait::{await_condition, conditions},
};
use serde_json::{Value, json};

/// An API server without nodes; it ends when its standard input is closed, with this process.
struct Server {
    kubeconfig: PathBuf,
    _process: (Child, ChildStdin),
}

/// `None`, said loudly, where none can run.
fn start() -> Option<Server> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("tests/cluster/apiserver");
    let mut process =
        Command::new(&script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the fixture is there");
    let stdin = process.stdin.take().unwrap();
    let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
    match lines.find_map(|line| line.ok()?.strip_prefix("KUBECONFIG=").map(PathBuf::from)) {
        Some(kubeconfig) => Some(Server { kubeconfig, _process: (process, stdin) }),
        None => {
            let status = process.wait();
            assert!(std::env::var_os("SLUICE_REQUIRE_APISERVER").is_none(), "no API server: {status:?}");
            // Past the test harness, which captures eprintln: a skipped test must be seen.
            let words = format!("SKIPPED: no API server can run here ({status:?})\n");
            std::io::stderr().write_all(words.as_bytes()).unwrap();
            None
        }
    }
}

/// A namespace of its own on the one server of this process.
pub struct Cluster {
    client: Client,
    namespace: String,
}

impl Cluster {
    pub async fn start(namespace: &str) -> Option<Self> {
        static SERVER: OnceLock<Option<Server>> = OnceLock::new();
        // A thread may wait for it: it takes seconds, once.
        let server = tokio::task::spawn_blocking(|| SERVER.get_or_init(start)).await.unwrap().as_ref()?;
        let kubeconfig = Kubeconfig::read_from(&server.kubeconfig).unwrap();
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
        let client = Client::try_from(config).unwrap();
        let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
        for crd in sluice_crds::crds() {
            // A rule that does not compile, or costs too much, is refused here.
            match crds.create(&PostParams::default(), &crd).await {
                Ok(_) => {}
                // Another test was first.
                Err(kube::Error::Api(status)) if status.is_already_exists() => {}
                Err(kube::Error::Api(status)) => panic!("{}", status.message),
                Err(error) => panic!("{error}"),
            }
            await_condition(crds.clone(), &crd.name_any(), conditions::is_crd_established()).await.unwrap();
        }
        let namespaces: Api<Namespace> = Api::all(client.clone());
        let object: Namespace = serde_json::from_value(json!({"metadata": {"name": namespace}})).unwrap();
        namespaces.create(&PostParams::default(), &object).await.unwrap();
        Some(Self { client, namespace: namespace.to_owned() })
    }

    /// Untyped, so that what a user may write is sent as it is.
    pub fn api(&self, kind: &str, plural: &str) -> Api<DynamicObject> {
        let gvk = GroupVersionKind::gvk("sluice.dev", "v1beta1", kind);
        Api::namespaced_with(self.client.clone(), &self.namespace, &ApiResource::from_gvk_with_plural(&gvk, plural))
    }

    pub fn canaries(&self) -> Api<DynamicObject> {
        self.api("Canary", "canaries")
    }
}

/// As people write it: nothing but what is required.
pub fn canary() -> Value {
    json!({
        "apiVersion": "sluice.dev/v1beta1", "kind": "Canary", "metadata": {"name": "cart"},
        "spec": {
            "targetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "cart"},
            "service": {"port": 80},
            "analysis": {
                "interval": "30s", "stepWeight": 10, "maxWeight": 50,
                "metrics": [{"name": "request-success-rate", "thresholdRange": {"min": 99}}]
            }
        }
    })
}

/// The object with these fields set; `null` removes one. A last part of a path may be new.
pub fn with(mut object: Value, changes: &[(&str, Value)]) -> Value {
    for (path, value) in changes {
        let (parent, field) = path.rsplit_once('/').unwrap();
        let parent = object.pointer_mut(parent).unwrap_or_else(|| panic!("{path}")).as_object_mut().unwrap();
        if value.is_null() {
            parent.remove(field);
        } else {
            parent.insert(field.to_owned(), value.clone());
        }
    }
    object
}

/// Refused with exactly these words; or accepted.
pub async fn refusal(api: &Api<DynamicObject>, object: &Value) -> Result<DynamicObject, String> {
    let object: DynamicObject = serde_json::from_value(object.clone()).unwrap();
    match api.create(&PostParams { dry_run: true, ..PostParams::default() }, &object).await {
        Ok(object) => Ok(object),
        // Of an object that does not fit the schema, the server adds that it did not look at all rules.
        Err(kube::Error::Api(status)) => Err(status.message.replace(RULES_SKIPPED, "")),
        Err(error) => panic!("{error}"),
    }
}

const RULES_SKIPPED: &str = ", <nil>: Invalid value: null: some validation rules were not checked because the object was invalid; correct the existing errors to complete validation";

/// Every case that the table has wrong, at once.
pub async fn check(api: &Api<DynamicObject>, base: &Value, table: &[(&[(&str, Value)], &str)]) {
    let mut wrong = String::new();
    for (changes, words) in table {
        match refusal(api, &with(base.clone(), changes)).await {
            Ok(_) => wrong += &format!("\naccepted: {changes:?}\n  instead of: {words}\n"),
            // One reason: a second one would hide that the first is not the rule's.
            Err(said) if said.ends_with(words) || said.ends_with(&format!("{words}]")) => {}
            Err(said) => wrong += &format!("\n{changes:?}\n  said: {said}\n  instead of: {words}\n"),
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}
