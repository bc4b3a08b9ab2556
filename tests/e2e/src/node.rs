//! What happens below Kubernetes: processes and connections of a cluster of ours. On other clusters tests that need it are
//! skipped, and say so.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;

/// The first node of a cluster of `tests/cluster`, and the machine that it is on.
#[derive(Clone, Debug)]
pub struct Node {
    cluster: String,
    scripts: PathBuf,
}

impl Node {
    /// `None`, after saying why, where the cluster is not one of ours.
    #[must_use]
    #[allow(clippy::print_stdout)] // Seen by who runs the tests.
    pub fn of_ours(what_for: &str) -> Option<Self> {
        let Ok(cluster) = std::env::var("SLUICE_CLUSTER") else {
            println!("SKIPPED: needs a cluster of tests/cluster, {what_for}");
            return None;
        };
        Some(Self { cluster, scripts: Path::new(env!("CARGO_MANIFEST_DIR")).join("../cluster") })
    }

    /// Runs a command in the node's network.
    ///
    /// # Errors
    /// What it says when it fails.
    pub async fn exec(&self, arguments: &[&str]) -> anyhow::Result<String> {
        run(self.scripts.join("exec"), &[&[&*self.cluster], arguments].concat()).await
    }

    /// Runs a command of this machine in a Pod's network.
    ///
    /// # Errors
    /// If the container runs no process here, or what the command says when it fails.
    pub async fn exec_beside(&self, pod: &Pod, container: &str, arguments: &[&str]) -> anyhow::Result<String> {
        let process = processes(pod, container)?.into_iter().next();
        let process = process.with_context(|| format!("Pod {} has no process on this machine", pod.name_any()))?;
        run(PathBuf::from("nsenter"), &[&[&*format!("--net=/proc/{process}/ns/net")], arguments].concat()).await
    }

    /// Cuts a node off the network until what is returned is dropped.
    ///
    /// # Errors
    /// If it has no such interface.
    pub async fn cut_off(&self, node: &str) -> anyhow::Result<CutOff> {
        self.exec(&["ip", "link", "set", node, "down"]).await?;
        Ok(CutOff { node: self.clone(), name: node.to_owned() })
    }

    /// `stop` or `start` of a component of the control plane, such as `kube-apiserver`.
    ///
    /// # Errors
    /// What the script says when it fails.
    pub async fn component(&self, verb: &str, component: &str) -> anyhow::Result<()> {
        run(self.scripts.join("component"), &[&self.cluster, verb, component]).await.map(drop)
    }

    /// Forgets the history of all objects: who resumes a watch from before it is told to list again (410).
    ///
    /// # Errors
    /// If etcd refuses.
    pub async fn compact(&self) -> anyhow::Result<()> {
        let etcd = |path: &str, body: String| {
            let url = format!("http://127.0.0.1:2379/v3/{path}");
            async move { self.exec(&["curl", "-sf", "-X", "POST", &url, "-d", &body]).await }
        };
        // Of any key: the answer's header has the store's revision.
        let answer: serde_json::Value = serde_json::from_str(&etcd("kv/range", r#"{"key":"AA=="}"#.to_owned()).await?)?;
        let revision = answer["header"]["revision"].as_str().context("etcd says no revision")?.to_owned();
        etcd("kv/compaction", format!(r#"{{"revision":"{revision}","physical":true}}"#)).await.map(drop)
    }

    /// `save`s etcd's data, or `restore`s what was saved last, as from a snapshot.
    ///
    /// # Errors
    /// What the script says when it fails.
    pub async fn etcd(&self, verb: &str) -> anyhow::Result<()> {
        run(self.scripts.join("etcd"), &[&self.cluster, verb]).await.map(drop)
    }

    /// Signals (`KILL`, `STOP`, `CONT`) every process of a container.
    ///
    /// # Errors
    /// If it runs no process here.
    pub async fn signal(&self, pod: &Pod, container: &str, signal: &str) -> anyhow::Result<()> {
        let processes = processes(pod, container)?;
        ensure!(
            !processes.is_empty(),
            "container {container} of Pod {} has no process on this machine",
            pod.name_any()
        );
        let signal = format!("-{signal}");
        let arguments = [vec![&*signal], processes.iter().map(String::as_str).collect()].concat();
        run(PathBuf::from("kill"), &arguments).await.map(drop)
    }
}

/// A node that is cut off: it comes back however the test ends, for those that follow.
#[derive(Debug)]
pub struct CutOff {
    node: Node,
    name: String,
}

impl Drop for CutOff {
    fn drop(&mut self) {
        let command = ["ip", "link", "set", &self.name, "up"];
        let done =
            std::process::Command::new(self.node.scripts.join("exec")).arg(&self.node.cluster).args(command).status();
        if !done.is_ok_and(|status| status.success()) {
            eprintln!("node {} stays cut off", self.name);
        }
    }
}

/// Resident memory of a container's processes, in KiB; `None` where they have ended, or are on another machine.
#[must_use]
pub fn resident_kib(pod: &Pod, container: &str) -> Option<u64> {
    let of_process = |process: &String| {
        let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?.trim();
        line.strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    let processes = processes(pod, container).ok()?;
    processes.iter().map(of_process).sum::<Option<u64>>().filter(|kib| *kib > 0)
}

/// Names a container as it was started last: after a restart it has another one. `None` before it has started.
#[must_use]
pub fn container_id(pod: &Pod, container: &str) -> Option<String> {
    let status = pod.status.clone()?;
    let mut all = status.init_container_statuses.into_iter().chain(status.container_statuses).flatten();
    let id = all.find(|status| status.name == container)?.container_id?;
    // After the runtime's name, as in `containerd://`.
    id.rsplit('/').next().filter(|id| !id.is_empty()).map(str::to_owned)
}

/// The processes whose cgroup is the container's.
fn processes(pod: &Pod, container: &str) -> anyhow::Result<Vec<String>> {
    let id = container_id(pod, container)
        .with_context(|| format!("container {container} of Pod {} has not started", pod.name_any()))?;
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let Ok(process) = entry?.file_name().into_string() else { continue };
        let cgroup = std::fs::read_to_string(format!("/proc/{process}/cgroup")).unwrap_or_default();
        if process.bytes().all(|byte| byte.is_ascii_digit()) && cgroup.contains(&id) {
            found.push(process);
        }
    }
    Ok(found)
}

async fn run(program: PathBuf, arguments: &[&str]) -> anyhow::Result<String> {
    let child = tokio::process::Command::new(&program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot run {}", program.display()))?;
    let output = tokio::time::timeout(Duration::from_secs(120), child.wait_with_output())
        .await
        .with_context(|| format!("{} {arguments:?} did not end within two minutes", program.display()))??;
    if !output.status.success() {
        bail!("{} {arguments:?} failed: {}", program.display(), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
