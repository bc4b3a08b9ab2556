//! Manifests in the pages, as a real API server sees them.

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader, Write as _},
    path::PathBuf,
    process::{Child, ChildStdin, Command, Stdio},
};

use serde_json::Value;

use super::pages::{pages, root};

/// Groups of others, whose kinds a bare API server does not know.
const OTHERS: &[&str] = &["argoproj.io/", "flagger.app/", "kustomize.toolkit.fluxcd.io/", "monitoring.coreos.com/"];

/// An API server without nodes; it ends when its standard input is closed, with this process.
struct Server {
    kubeconfig: PathBuf,
    kubectl: PathBuf,
    _process: (Child, ChildStdin),
}

impl Server {
    /// `None`, said loudly, where none can run.
    fn start() -> Option<Self> {
        let cluster = root().join("tests/cluster");
        let mut process = Command::new(cluster.join("apiserver"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the fixture is there");
        let stdin = process.stdin.take().unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let Some(kubeconfig) = lines.find_map(|line| line.ok()?.strip_prefix("KUBECONFIG=").map(PathBuf::from)) else {
            let status = process.wait();
            assert!(std::env::var_os("SLUICE_REQUIRE_APISERVER").is_none(), "no API server: {status:?}");
            // Past the test harness, which captures eprintln: a skipped test must be seen.
            std::io::stderr()
                .write_all(format!("SKIPPED: no API server can run here ({status:?})\n").as_bytes())
                .unwrap();
            return None;
        };
        let built = Command::new(cluster.join("build")).stderr(Stdio::null()).output().unwrap();
        let kubectl = PathBuf::from(String::from_utf8(built.stdout).unwrap().trim()).with_file_name("kubectl");
        Some(Self { kubeconfig, kubectl, _process: (process, stdin) })
    }

    /// What kubectl printed; its words where it fails.
    fn kubectl(&self, arguments: &[&str], input: &str) -> Result<String, String> {
        let mut process = Command::new(&self.kubectl)
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        process.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let output = process.wait_with_output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
    }
}

/// Whole manifests, and where each stands.
fn manifests() -> Vec<(String, Value)> {
    let mut found = Vec::new();
    for page in pages() {
        for block in page.blocks().into_iter().filter(|block| block.language == "yaml") {
            let place = format!("{}:{}", page.path.display(), block.line);
            let documents: Vec<Value> =
                serde_saphyr::from_multiple(&block.text).unwrap_or_else(|error| panic!("{place} is no YAML: {error}"));
            let whole = |document: &Value| document["apiVersion"].is_string() && document["kind"].is_string();
            found.extend(documents.into_iter().filter(whole).map(|document| (place.clone(), document)));
        }
    }
    found
}

#[test]
fn every_manifest_in_a_page_is_accepted_by_a_real_api_server() {
    let manifests = manifests();
    let kinds: BTreeSet<_> = manifests.iter().filter_map(|(_, manifest)| manifest["kind"].as_str()).collect();
    for kind in ["Canary", "MetricTemplate", "NetworkPolicy"] {
        assert!(kinds.contains(kind), "no page shows a {kind}; are the blocks fenced as yaml?");
    }
    let Some(server) = Server::start() else { return };
    let crds = root().join("charts/sluice/files/crds");
    server.kubectl(&["create", "-f", crds.to_str().unwrap()], "").unwrap();
    server.kubectl(&["wait", "--for=condition=Established", "crd", "--all", "--timeout=30s"], "").unwrap();
    let namespaces: BTreeSet<_> =
        manifests.iter().filter_map(|(_, manifest)| manifest["metadata"]["namespace"].as_str()).collect();
    for namespace in namespaces.into_iter().filter(|namespace| *namespace != "default") {
        server.kubectl(&["create", "namespace", namespace], "").unwrap();
    }
    let mut refused = Vec::new();
    for (place, manifest) in &manifests {
        let version = manifest["apiVersion"].as_str().unwrap();
        if OTHERS.iter().any(|group| version.starts_with(group)) {
            continue;
        }
        // A field that does not exist is an error, not dropped.
        let arguments = ["create", "--dry-run=server", "--validate=strict", "-f", "-"];
        if let Err(words) = server.kubectl(&arguments, &manifest.to_string()) {
            refused.push(format!("{place}: {} {}: {words}", manifest["kind"], manifest["metadata"]["name"]));
        }
    }
    assert!(refused.is_empty(), "refused:\n{}", refused.join("\n"));
}

/// What is indented only is not tried by the test above.
#[test]
fn manifests_stand_in_fenced_blocks() {
    for page in pages() {
        let mut fenced = false;
        for (index, line) in page.text.lines().enumerate() {
            fenced ^= line.trim_start().starts_with("```");
            let indented = line.starts_with("    ") && line.trim_start().starts_with("apiVersion:");
            assert!(fenced || !indented, "{}:{}: fence this block as yaml", page.path.display(), index + 1);
        }
    }
}
