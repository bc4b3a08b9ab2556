//! The example application in a namespace of its own, and its releases.

use std::time::Duration;

use anyhow::Context;
use k8s_openapi::api::{apps::v1::Deployment, core::v1::Pod};
use kube::{
    Api, ResourceExt,
    api::{ListParams, Patch, PatchParams},
};
use serde_json::json;
use sluice_crds::{Canary, Phase};

use crate::{
    cluster::Cluster,
    watch::{History, Seen, unix_ms},
};

/// `examples/hello` in a namespace.
pub struct App {
    pub cluster: Cluster,
    pub namespace: String,
    pub history: History,
}

impl App {
    /// Deploys the application without a Canary, and waits until it runs.
    ///
    /// # Errors
    /// If it does not run within two minutes.
    pub async fn deploy(cluster: &Cluster, namespace: &str, replicas: u32) -> anyhow::Result<Self> {
        cluster.namespace(namespace).await?;
        cluster.apply(namespace, &manifest(cluster, replicas)?).await?;
        cluster.kubectl(&["-n", namespace, "rollout", "status", "deployment/hello", "--timeout=120s"], None).await?;
        let history = History::start(&cluster.client, namespace, "hello");
        Ok(Self { cluster: cluster.clone(), namespace: namespace.to_owned(), history })
    }

    /// Applies the application and its Canary together, as a first installation from Git does, without waiting.
    ///
    /// # Errors
    /// If they are refused.
    pub async fn at_once(
        cluster: &Cluster,
        namespace: &str,
        replicas: u32,
        changes: serde_json::Value,
    ) -> anyhow::Result<Self> {
        cluster.namespace(namespace).await?;
        let together = format!("{}\n---\n{}\n", canary_manifest(cluster, &changes)?, manifest(cluster, replicas)?);
        cluster.apply(namespace, &together).await?;
        let history = History::start(&cluster.client, namespace, "hello");
        Ok(Self { cluster: cluster.clone(), namespace: namespace.to_owned(), history })
    }

    /// Applies the Canary with these changes of its spec (a merge patch), without waiting.
    ///
    /// # Errors
    /// If it is refused.
    pub async fn canary(&self, changes: serde_json::Value) -> anyhow::Result<u64> {
        self.cluster.apply(&self.namespace, &canary_manifest(&self.cluster, &changes)?).await?;
        Ok(unix_ms())
    }

    /// Waits until the application is taken over.
    ///
    /// # Errors
    /// At the deadline.
    pub async fn adopted(&self) -> anyhow::Result<Seen> {
        self.history
            .wait("phase Initialized", 0, Duration::from_secs(120), |status| status.phase == Phase::Initialized)
            .await
    }

    /// Waits until the Deployment's own Pods have ended, as they do in the takeover.
    ///
    /// # Errors
    /// At the deadline.
    pub async fn own_pods_ended(&self) -> anyhow::Result<()> {
        let pods: Api<Pod> = Api::namespaced(self.cluster.client.clone(), &self.namespace);
        let own = ListParams::default().labels("app=hello,!sluice.dev/revision");
        let ended = async {
            while !pods.list(&own).await?.items.is_empty() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(Duration::from_secs(60), ended)
            .await
            .context("the Deployment's own Pods did not end within a minute")?
    }

    /// Releases: sets environment variables of the container. Returns when the API server had answered.
    ///
    /// # Errors
    /// If the patch is refused.
    pub async fn release(&self, env: &[(&str, &str)]) -> anyhow::Result<u64> {
        let env: Vec<_> = env.iter().map(|(name, value)| json!({"name": name, "value": value})).collect();
        let patch = json!({"spec": {"template": {"spec": {"containers": [{"name": "hello", "env": env}]}}}});
        let deployments: Api<Deployment> = Api::namespaced(self.cluster.client.clone(), &self.namespace);
        deployments.patch("hello", &PatchParams::default(), &Patch::Strategic(patch)).await?;
        Ok(unix_ms())
    }

    /// Merge-patches the Canary's spec.
    ///
    /// # Errors
    /// If it is refused.
    pub async fn patch_canary(&self, spec: serde_json::Value) -> anyhow::Result<u64> {
        self.canaries().patch("hello", &PatchParams::default(), &Patch::Merge(json!({"spec": spec}))).await?;
        Ok(unix_ms())
    }

    /// Waits until the release that was applied at `from_ms` ends in this phase.
    ///
    /// # Errors
    /// At the deadline.
    pub async fn ends(&self, from_ms: u64, phase: Phase, deadline: Duration) -> anyhow::Result<Seen> {
        let started = self
            .history
            .wait("phase Progressing", from_ms, deadline, |status| status.phase == Phase::Progressing)
            .await?;
        self.history.wait(&format!("phase {phase:?}"), started.at_ms, deadline, |status| status.phase == phase).await
    }

    /// Pods of a revision that were ever seen now, by name.
    ///
    /// # Errors
    /// If the API server does not answer.
    pub async fn pods_of(&self, revision: &str) -> anyhow::Result<Vec<String>> {
        let pods: Api<Pod> = Api::namespaced(self.cluster.client.clone(), &self.namespace);
        let list = ListParams::default().labels(&format!("sluice.dev/canary=hello,sluice.dev/revision={revision}"));
        Ok(pods.list(&list).await?.items.iter().map(ResourceExt::name_any).collect())
    }

    #[must_use]
    pub fn canaries(&self) -> Api<Canary> {
        Api::namespaced(self.cluster.client.clone(), &self.namespace)
    }

    /// Deletes the namespace, without waiting.
    ///
    /// # Errors
    /// If the API server does not answer.
    pub async fn delete(self) -> anyhow::Result<()> {
        let namespaces: Api<k8s_openapi::api::core::v1::Namespace> = Api::all(self.cluster.client.clone());
        namespaces.delete(&self.namespace, &kube::api::DeleteParams::default()).await.context("namespace")?;
        Ok(())
    }
}

/// Of a test that failed: what it leaves would fail others, such as the one that uninstalls Sluice.
impl Drop for App {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let mut kubectl = self.cluster.command("kubectl");
            let deleted = kubectl.args(["delete", "namespace", &self.namespace, "--wait=false"]).status();
            if !deleted.is_ok_and(|status| status.success()) {
                eprintln!("namespace {} is left", self.namespace);
            }
        }
    }
}

/// Deployment, ConfigMap and Service.
fn manifest(cluster: &Cluster, replicas: u32) -> anyhow::Result<String> {
    Ok(cluster
        .file("examples/hello/deployment.yaml")?
        .replace("replicas: 4", &format!("replicas: {replicas}"))
        .replace("localhost/sluice-hello:dev", &format!("localhost/sluice-hello:{}", cluster.tag)))
}

fn canary_manifest(cluster: &Cluster, changes: &serde_json::Value) -> anyhow::Result<String> {
    let mut canary: serde_json::Value = serde_saphyr::from_str(&cluster.file("examples/hello/canary.yaml")?)?;
    merge(&mut canary["spec"], changes);
    Ok(canary.to_string())
}

/// RFC 7396.
fn merge(target: &mut serde_json::Value, patch: &serde_json::Value) {
    let serde_json::Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (key, value) in patch {
        if value.is_null() {
            if let Some(object) = target.as_object_mut() {
                object.remove(key);
            }
        } else {
            merge(&mut target[key], value);
        }
    }
}
