//! The cluster that `KUBECONFIG` names: manifests, the chart, kubectl.

use std::{path::PathBuf, process::Stdio, time::Duration};

use anyhow::{Context, bail};
use k8s_openapi::api::core::v1::Namespace;
use kube::{Api, Client, api::PostParams};

/// A cluster, and the programs that drive it.
#[derive(Clone)]
pub struct Cluster {
    pub client: Client,
    /// Tag of the images that were loaded.
    pub tag: String,
    bin: Option<PathBuf>,
    root: PathBuf,
}

/// Where Sluice is installed.
pub const SYSTEM: &str = "sluice-system";

impl Cluster {
    /// From `KUBECONFIG`; `SLUICE_K8S_BIN` is the folder of kubectl and helm where they are not in `PATH`, and
    /// `SLUICE_IMAGE_TAG` the images' tag (`dev`).
    ///
    /// # Errors
    /// If the API server cannot be asked.
    pub async fn connect() -> anyhow::Result<Self> {
        let client = Client::try_default().await.context("no cluster: KUBECONFIG names none that can be used")?;
        client.apiserver_version().await.context("the API server that KUBECONFIG names does not answer")?;
        Ok(Self {
            client,
            tag: std::env::var("SLUICE_IMAGE_TAG").unwrap_or_else(|_| "dev".to_owned()),
            bin: std::env::var_os("SLUICE_K8S_BIN").map(PathBuf::from),
            root: PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../.."),
        })
    }

    /// Runs kubectl and returns what it printed.
    ///
    /// # Errors
    /// If it exits with an error: its words.
    pub async fn kubectl(&self, arguments: &[&str], input: Option<&str>) -> anyhow::Result<String> {
        self.run("kubectl", arguments, input).await
    }

    /// Runs helm and returns what it printed.
    ///
    /// # Errors
    /// If it exits with an error: its words.
    pub async fn helm(&self, arguments: &[&str]) -> anyhow::Result<String> {
        self.run("helm", arguments, None).await
    }

    /// Applies manifests, server-side, as Git would.
    ///
    /// # Errors
    /// As kubectl says.
    pub async fn apply(&self, namespace: &str, manifest: &str) -> anyhow::Result<String> {
        let arguments = ["-n", namespace, "apply", "--server-side", "--force-conflicts", "-f", "-"];
        self.kubectl(&arguments, Some(manifest)).await
    }

    /// A file of the repository.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn file(&self, path: &str) -> anyhow::Result<String> {
        let path = self.root.join(path);
        std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    }

    /// The same of one that names images of the tag `dev`: it names those of this cluster.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn tagged(&self, path: &str) -> anyhow::Result<String> {
        let tag = &self.tag;
        Ok(self.file(path)?.replace(":dev", &format!(":{tag}")).replace("tag: dev", &format!("tag: {tag}")))
    }

    /// Whether the API server's own policies can protect what Sluice adds. Where they cannot, the webhook does.
    ///
    /// # Errors
    /// If it cannot be asked.
    pub async fn serves_policies(&self) -> anyhow::Result<bool> {
        let group = ["api-resources", "--api-group=admissionregistration.k8s.io", "-o", "name"];
        Ok(self.kubectl(&group, None).await?.contains("mutatingadmissionpolicies"))
    }

    /// kubectl or helm, to be run in the repository.
    #[must_use]
    pub fn command(&self, program: &str) -> std::process::Command {
        let path = self.bin.as_ref().map_or_else(|| PathBuf::from(program), |bin| bin.join(program));
        let mut command = std::process::Command::new(path);
        command.current_dir(&self.root);
        command
    }

    async fn run(&self, program: &str, arguments: &[&str], input: Option<&str>) -> anyhow::Result<String> {
        use tokio::io::AsyncWriteExt;
        let mut child = tokio::process::Command::from(self.command(program))
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot run {program}"))?;
        if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
            stdin.write_all(input.as_bytes()).await?;
        }
        let output = tokio::time::timeout(Duration::from_secs(300), child.wait_with_output())
            .await
            .with_context(|| format!("{program} {} did not end within 300 s", arguments.join(" ")))??;
        if !output.status.success() {
            bail!("{program} {} failed: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Installs or upgrades the chart with test settings, and Prometheus beside it; waits until both are ready.
    ///
    /// # Errors
    /// If anything is not ready in time.
    pub async fn install(&self, values: &[&str]) -> anyhow::Result<()> {
        self.install_version("charts/sluice", &self.tag, values).await
    }

    /// The same with the chart in this folder, and images of this tag.
    ///
    /// # Errors
    /// If anything is not ready in time.
    pub async fn install_version(&self, chart: &str, tag: &str, values: &[&str]) -> anyhow::Result<()> {
        self.install_in(SYSTEM, chart, tag, values).await
    }

    /// The same in another namespace.
    ///
    /// # Errors
    /// If anything is not ready in time.
    pub async fn install_in(&self, namespace: &str, chart: &str, tag: &str, values: &[&str]) -> anyhow::Result<()> {
        self.namespace(namespace).await?;
        let prometheus = self.tagged("tests/e2e/manifests/prometheus.yaml")?.replace(SYSTEM, namespace);
        self.apply(namespace, &prometheus).await?;
        let tag = format!("image.tag={tag}");
        let metrics = format!("metricsServer=http://prometheus.{namespace}:9090");
        let mut arguments = vec!["upgrade", "--install", "sluice", chart, "-n", namespace];
        for value in ["image.registry=localhost", "image.pullPolicy=IfNotPresent", &tag, &metrics]
            .into_iter()
            .chain(values.iter().copied())
        {
            arguments.extend(["--set", value]);
        }
        arguments.extend(["--wait", "--timeout", "180s"]);
        self.run("helm", &arguments, None).await?;
        let prometheus = ["-n", namespace, "rollout", "status", "deployment/prometheus", "--timeout=120s"];
        self.kubectl(&prometheus, None).await?;
        Ok(())
    }

    /// Makes a namespace that enforces the restricted Pod Security standard.
    ///
    /// # Errors
    /// If the API server refuses.
    pub async fn namespace(&self, name: &str) -> anyhow::Result<()> {
        let namespace: Namespace = serde_json::from_value(serde_json::json!({
            "metadata": {"name": name, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}
        }))?;
        match Api::all(self.client.clone()).create(&PostParams::default(), &namespace).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            Err(error) => Err(error).with_context(|| format!("cannot create namespace {name}")),
        }
    }
}
