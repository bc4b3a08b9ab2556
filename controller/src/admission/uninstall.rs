//! `sluice-controller uninstall`: for the chart's pre-delete hook.
//!
//! Nothing may go while the fleet carries anybody's traffic, so it waits until no Canary holds a Service or Deployment. Then
//! the controllers stop, because they would repair what is removed, and our admission configuration goes. The Canaries
//! themselves are their owners', and stay.

use std::{collections::BTreeSet, future::Future, time::Duration};

use k8s_openapi::api::{apps::v1::Deployment, core::v1::Pod};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, Preconditions},
};
use serde_json::json;
use sluice_crds::{Canary, labels};
use tokio::time::{Instant, sleep, timeout};

use super::{
    keeper::kinds,
    objects::{GROUP, MANAGED_BY, MUTATING_POLICY},
};
use crate::cache::CanaryKey;

const CALL: Duration = Duration::from_secs(10);
/// Between two looks. A hook that runs once in an installation's life needs no watch.
const LOOK: Duration = Duration::from_secs(1);

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
        "Sluice still carries the traffic of Canaries {names}, and without it their Services would lead nowhere. Hand the \
         traffic back first: delete them (kubectl delete canary --wait; suspend what applies them from Git), then uninstall \
         again. Nothing was removed"
    )]
    Holding { names: String },
    #[error("the Pods of Deployment {0} do not end; uninstall again")]
    Running(String),
    #[error("{doing}: {source}")]
    Api { doing: String, source: Box<kube::Error> },
    #[error("{doing}: no answer within {CALL:?}")]
    Deadline { doing: String },
}

impl Uninstall {
    /// # Errors
    /// If a Canary is not handed back in time, or the API server refuses something; then the installation works on, unless
    /// the controllers had been stopped already.
    pub async fn run(&self) -> Result<(), UninstallError> {
        let end = Instant::now() + self.deadline;
        self.handed_back(end).await?;
        self.stop_controllers(end).await?;
        self.remove().await
    }

    /// Waits until no Canary has our finalizer: it is there from before anything is taken over until all is handed back.
    async fn handed_back(&self, end: Instant) -> Result<(), UninstallError> {
        let canaries: Api<Canary> = match &self.namespace {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        };
        let mut said = BTreeSet::new();
        loop {
            let all = match call("listing Canaries", canaries.list(&ListParams::default())).await {
                Ok(all) => all.items,
                // The CRD is gone, and with it every Canary.
                Err(UninstallError::Api { source, .. }) if is_not_found(&source) => return Ok(()),
                Err(error) => return Err(error),
            };
            let holding: BTreeSet<String> = all
                .iter()
                .filter(|canary| canary.finalizers().iter().any(|finalizer| finalizer == labels::FINALIZER))
                .map(|canary| CanaryKey::of(canary).to_string())
                .collect();
            if holding.is_empty() {
                return Ok(());
            }
            let names = holding.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
            if Instant::now() >= end {
                return Err(UninstallError::Holding { names });
            }
            if holding != said {
                tracing::info!(canaries = names, "waits until these Canaries have handed their traffic back");
                said = holding;
            }
            sleep(LOOK).await;
        }
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
