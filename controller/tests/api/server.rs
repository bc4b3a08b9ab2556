//! One API server for all tests of this binary; each test has a namespace of its own. Tests of what concerns a whole API
//! server start others.

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Arc, Mutex, OnceLock},
};

use http::{Method, Request};
use k8s_openapi::{
    api::core::v1::Namespace, apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client, Config, ResourceExt,
    api::{ObjectMeta, PostParams},
    client::{Body, ClientBuilder},
    config::{KubeConfigOptions, Kubeconfig},
    runtime::wait::{await_condition, conditions},
};
use sluice_controller::cache::Scope;
use tower::util::MapRequestLayer;

pub struct Server {
    kubeconfig: PathBuf,
    /// The server ends when these are closed, with this process.
    _process: (Child, ChildStdin),
}

/// The one that tests share.
static SERVER: OnceLock<Result<Server, String>> = OnceLock::new();

/// Paths of what a client asked for, and whether each was a watch.
#[derive(Clone, Debug, Default)]
pub struct Requests(Arc<Mutex<Vec<(String, bool)>>>);

impl Requests {
    /// Of those that are no watches.
    pub fn count(&self) -> usize {
        self.0.lock().unwrap().iter().filter(|(_, watch)| !watch).count()
    }

    /// Paths, watches too, that contain this.
    pub fn about(&self, part: &str) -> Vec<String> {
        self.0.lock().unwrap().iter().filter(|(path, _)| path.contains(part)).map(|(path, _)| path.clone()).collect()
    }
}

/// A client; `None`, said loudly, where the server cannot run on this machine.
pub async fn client() -> Option<(Client, Requests)> {
    // A thread may wait for it: it takes seconds, once.
    let server = tokio::task::spawn_blocking(|| SERVER.get_or_init(|| start(&[]))).await.unwrap();
    let (client, requests) = or_skip(server.as_ref())?.client(None).await;
    install(&client).await;
    Some((client, requests))
}

/// Runs a script in which `kubectl` speaks to the server about this namespace. What it printed, and whether it ended well.
pub async fn shell(namespace: &str, script: &str) -> (bool, String) {
    let server = SERVER.get().and_then(|server| server.as_ref().ok());
    let kubeconfig = server.expect("a client was made before").kubeconfig.clone();
    let (namespace, script) = (namespace.to_owned(), script.to_owned());
    let run = move || {
        let build = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("tests/cluster/build");
        let built = Command::new(build).stderr(Stdio::null()).output().unwrap();
        let bin = PathBuf::from(String::from_utf8(built.stdout).unwrap().trim()).parent().unwrap().to_owned();
        let own = kubeconfig.with_file_name(format!("kubeconfig-{namespace}"));
        std::fs::copy(&kubeconfig, &own).unwrap();
        let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap_or_default());
        let script = format!("kubectl config set-context --current --namespace={namespace} >/dev/null\n{script}");
        let done = Command::new("sh").args(["-c", &script]).env("KUBECONFIG", own).env("PATH", path).output().unwrap();
        let printed = [done.stdout, done.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        (done.status.success(), printed.concat())
    };
    tokio::task::spawn_blocking(run).await.unwrap()
}

/// What was started; `None`, said loudly, where it cannot run on this machine.
pub fn or_skip<T>(server: Result<T, &String>) -> Option<T> {
    server
        .inspect_err(|reason| {
            assert!(std::env::var_os("SLUICE_REQUIRE_APISERVER").is_none(), "no API server: {reason}");
            eprintln!("SKIPPED: no API server can run here: {reason}");
        })
        .ok()
}

impl Server {
    /// A client, of the administrator or of somebody else with the same rights; and what it sends.
    pub async fn client(&self, user: Option<&str>) -> (Client, Requests) {
        let kubeconfig = Kubeconfig::read_from(&self.kubeconfig).unwrap();
        let mut config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
        config.default_retry = false;
        if let Some(user) = user {
            config.auth_info.impersonate = Some(user.to_owned());
            config.auth_info.impersonate_groups = Some(vec!["system:masters".to_owned()]);
        }
        let requests = Requests::default();
        let counter = requests.clone();
        let count = MapRequestLayer::new(move |request: Request<Body>| {
            let watch =
                request.method() == Method::GET && request.uri().query().is_some_and(|query| query.contains("watch="));
            counter.0.lock().unwrap().push((request.uri().path().to_owned(), watch));
            request
        });
        (ClientBuilder::try_from(config).unwrap().with_layer(&count).build(), requests)
    }
}

/// Starts an API server with these flags. Takes seconds, and blocks the thread.
pub fn start(flags: &[&str]) -> Result<Server, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let script = root.join("tests/cluster/apiserver");
    let mut process = Command::new(&script)
        .arg("--")
        .args(flags)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{}: {error}", script.display()))?;
    let stdin = process.stdin.take().unwrap();
    let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
    let found = lines.find_map(|line| line.ok()?.strip_prefix("KUBECONFIG=").map(PathBuf::from));
    match found {
        Some(kubeconfig) => Ok(Server { kubeconfig, _process: (process, stdin) }),
        None => Err(format!("{} ended with {:?}; its words are above", script.display(), process.wait())),
    }
}

/// Our CRDs.
pub async fn install(client: &Client) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("charts/sluice/files/crds/sluice.dev.yaml");
    let text = std::fs::read_to_string(path).unwrap();
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    let crds: Vec<CustomResourceDefinition> = serde_saphyr::from_multiple(&text).unwrap();
    assert_eq!(crds.len(), 2);
    for crd in crds {
        match api.create(&PostParams::default(), &crd).await {
            Ok(_) => {}
            // Another test was first.
            Err(kube::Error::Api(status)) if status.is_already_exists() => {}
            Err(error) => panic!("{error}"),
        }
        await_condition(api.clone(), &crd.name_any(), conditions::is_crd_established()).await.unwrap();
    }
}

/// Makes a namespace for one test.
/// Everything, of an installation in this namespace.
pub fn scope(release_namespace: &str) -> Scope {
    Scope { namespace: None, release_namespace: release_namespace.to_owned(), namespaces: true, secrets: true }
}

pub async fn namespace(client: &Client, name: &str) -> String {
    let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
    let namespace = Namespace { metadata, ..Namespace::default() };
    Api::all(client.clone()).create(&PostParams::default(), &namespace).await.unwrap();
    name.to_owned()
}
