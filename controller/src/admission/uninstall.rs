//! `sluice-controller uninstall`: for the chart's pre-delete hook.
//!
//! Nothing may go while the fleet carries anybody's traffic, so it tells the controllers to hand all of it back, by a ConfigMap, and
//! waits until no Canary holds a Service or Deployment. Then the controllers stop, because they would repair what is removed,
//! and our admission configuration goes. The Canaries themselves are their owners', and stay.

use std::{collections::BTreeSet, future::Future, time::Duration};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{ConfigMap, Pod},
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, Preconditions},
};
use serde_json::json;
use sluice_crds::{Canary, Phase, labels};
use tokio::time::{Instant, sleep, timeout};

use super::{
    keeper::kinds,
    objects::{GROUP, MANAGED_BY, MUTATING_POLICY},
};
use crate::cache::CanaryKey;

const CALL: Duration = Duration::from_secs(10);
/// Between two looks. A hook that runs once in an installation's life needs no watch.
const LOOK: Duration = Duration::from_secs(1);

/// How much longer than it waits the hand-back stays announced.
const GRACE: Duration = Duration::from_secs(60);

/// Takes the installation's cluster-wide traces away.
pub struct Uninstall {
    pub client: Client,
    pub release_namespace: String,
    /// The controllers' Deployment.
    pub deployment: String,
    /// Only Canaries of this namespace; all where absent.
    pub namespace: Option<String>,
    /// For everything.
    pub deadline: Duration,
}

/// Why the installation must stay.
#[derive(Debug, thiserror::Error)]
pub enum UninstallError {
    #[error(
        "the traffic of Canaries {names} is not back with their Deployments within {seconds} s, and without Sluice their Services \
         would lead nowhere. kubectl describe canary says what each waits for; mend that, then uninstall \
         again. Nothing was removed, and what had been handed back is taken over again"
    )]
    Holding { names: String, seconds: u64 },
    #[error(
        "the Deployments of Canaries {names} ask for a version that was not promoted, and would serve it to everybody. Wait for the \
         end of the release, or put the Deployment back to the version that serves; then uninstall again. \
         Nothing was removed"
    )]
    Unpromoted { names: String },
    #[error("the Pods of Deployment {0} do not end; uninstall again")]
    Running(String),
    #[error("{doing}: {source}")]
    Api { doing: String, source: Box<kube::Error> },
    #[error("{doing}: no answer within {CALL:?}")]
    Deadline { doing: String },
}

impl Uninstall {
    /// # Errors
    /// If a Canary cannot be handed back, or is not in time, or the API server refuses something; then the installation works on,
    /// unless the controllers had been stopped already.
    pub async fn run(&self) -> Result<(), UninstallError> {
        let end = Instant::now() + self.deadline;
        self.all_promoted().await?;
        self.announce().await?;
        if let Err(error) = self.handed_back(end).await {
            self.withdraw().await?;
            return Err(error);
        }
        self.stop_controllers(end).await?;
        self.remove().await?;
        self.withdraw().await
    }

    /// What serves after the hand-back is the template of the Deployment.
    async fn all_promoted(&self) -> Result<(), UninstallError> {
        let unpromoted = |canary: &Canary| {
            let phase = canary.status.as_ref().map(|status| status.phase);
            holds(canary) && phase.is_some_and(asks_for_more)
        };
        let names = names(self.canaries().await?.iter().filter(|canary| unpromoted(canary)));
        if names.is_empty() { Ok(()) } else { Err(UninstallError::Unpromoted { names: listed(&names) }) }
    }

    /// Tells the controllers to hand everything back, and to take nothing over. It says so for a while only, so that an installation
    /// whose hook was killed works on.
    async fn announce(&self) -> Result<(), UninstallError> {
        let wait = SignedDuration::try_from(self.deadline + GRACE).unwrap_or(SignedDuration::MAX);
        let until = Timestamp::now().saturating_add(wait).unwrap_or(Timestamp::MAX);
        let map = json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": labels::UNINSTALL, "annotations": {labels::UNTIL: until}},
        });
        let params = PatchParams::apply(labels::FIELD_MANAGER).force();
        let doing = format!("writing ConfigMap {}/{}", self.release_namespace, labels::UNINSTALL);
        call(&doing, self.config_maps().patch(labels::UNINSTALL, &params, &Patch::Apply(&map))).await?;
        Ok(())
    }

    async fn withdraw(&self) -> Result<(), UninstallError> {
        let doing = format!("deleting ConfigMap {}/{}", self.release_namespace, labels::UNINSTALL);
        match call(&doing, self.config_maps().delete(labels::UNINSTALL, &DeleteParams::default())).await {
            Ok(_) => Ok(()),
            Err(UninstallError::Api { source, .. }) if is_not_found(&source) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Waits until no Canary has our finalizer: it is there from before anything is taken over until all is handed back.
    async fn handed_back(&self, end: Instant) -> Result<(), UninstallError> {
        let mut said = BTreeSet::new();
        loop {
            let holding = names(self.canaries().await?.iter().filter(|canary| holds(canary)));
            if holding.is_empty() {
                return Ok(());
            }
            if Instant::now() >= end {
                return Err(UninstallError::Holding { names: listed(&holding), seconds: self.deadline.as_secs() });
            }
            if holding != said {
                tracing::info!(
                    canaries = listed(&holding),
                    "waits until these Canaries have handed their traffic back"
                );
                said = holding;
            }
            sleep(LOOK).await;
        }
    }

    async fn canaries(&self) -> Result<Vec<Canary>, UninstallError> {
        let canaries: Api<Canary> = match &self.namespace {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        };
        match call("listing Canaries", canaries.list(&ListParams::default())).await {
            Ok(all) => Ok(all.items),
            // The CRD is gone, and with it every Canary.
            Err(UninstallError::Api { source, .. }) if is_not_found(&source) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    fn config_maps(&self) -> Api<ConfigMap> {
        Api::namespaced(self.client.clone(), &self.release_namespace)
    }

    async fn stop_controllers(&self, end: Instant) -> Result<(), UninstallError> {
        let name = &self.deployment;
        let deployments: Api<Deployment> = Api::namespaced(self.client.clone(), &self.release_namespace);
        let Some(deployment) = call("reading the controllers' Deployment", deployments.get_opt(name)).await? else {
            return Ok(());
        };
        let none = Patch::Merge(json!({"spec": {"replicas": 0}}));
        let params = PatchParams::default();
        call("stopping the controllers", deployments.patch_scale(name, &params, &none)).await?;
        tracing::info!("stops the controllers");
        let selector = deployment.spec.and_then(|spec| spec.selector.match_labels).unwrap_or_default();
        let selector: Vec<_> = selector.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let theirs = ListParams::default().labels(&selector.join(","));
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.release_namespace);
        while !call("listing the controllers' Pods", pods.list(&theirs)).await?.items.is_empty() {
            if Instant::now() >= end {
                return Err(UninstallError::Running(name.clone()));
            }
            sleep(LOOK).await;
        }
        Ok(())
    }

    async fn remove(&self) -> Result<(), UninstallError> {
        let groups = call("asking the API server what it serves", self.client.list_api_groups()).await?;
        let versions = groups.groups.iter().filter(|group| group.name == GROUP).flat_map(|group| &group.versions);
        let mut policies = None;
        for version in versions {
            let resources = self.client.list_api_group_resources(&version.group_version);
            let resources = call("asking the API server what it serves", resources).await?;
            if resources.resources.iter().any(|resource| resource.kind == MUTATING_POLICY.kind) {
                policies = Some(version.version.as_str());
                break;
            }
        }
        for (kind, resource) in kinds(policies) {
            let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource);
            for name in kind.names(self.namespace.as_deref()) {
                let what = format!("{} {name}", kind.kind);
                let Some(found) = call(&format!("reading {what}"), api.get_opt(&name)).await? else { continue };
                if found.labels().get(MANAGED_BY).is_none_or(|by| by != labels::FIELD_MANAGER) {
                    continue;
                }
                let params = DeleteParams {
                    preconditions: Some(Preconditions { uid: found.uid(), resource_version: None }),
                    ..DeleteParams::default()
                };
                match call(&format!("deleting {what}"), api.delete(&name, &params)).await {
                    Ok(_) => tracing::info!("removed {what}"),
                    Err(UninstallError::Api { source, .. }) if is_not_found(&source) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }
}

/// The target asks for another version than the one that serves.
fn asks_for_more(phase: Phase) -> bool {
    match phase {
        Phase::Waiting | Phase::Progressing | Phase::Promoting | Phase::Finalising | Phase::Failed => true,
        Phase::Initializing | Phase::Initialized | Phase::Succeeded | Phase::Terminating | Phase::Terminated => false,
    }
}

fn holds(canary: &Canary) -> bool {
    canary.finalizers().iter().any(|finalizer| finalizer == labels::FINALIZER)
}

fn names<'a>(canaries: impl Iterator<Item = &'a Canary>) -> BTreeSet<String> {
    canaries.map(|canary| CanaryKey::of(canary).to_string()).collect()
}

fn listed(names: &BTreeSet<String>) -> String {
    names.iter().map(String::as_str).collect::<Vec<_>>().join(", ")
}

fn is_not_found(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.is_not_found())
}

async fn call<T>(doing: &str, call: impl Future<Output = kube::Result<T>>) -> Result<T, UninstallError> {
    match timeout(CALL, call).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(source)) => Err(UninstallError::Api { doing: doing.to_owned(), source: Box::new(source) }),
        Err(_) => Err(UninstallError::Deadline { doing: doing.to_owned() }),
    }
}
