//! Sluice's own Pods, for tests that break them.
#![allow(clippy::unwrap_used)] // Of a fixture: what does not work here fails the test.

use std::time::Duration;

use k8s_openapi::api::{coordination::v1::Lease, core::v1::Pod};
use kube::{Api, ResourceExt, api::ListParams};

use crate::{
    adopted::{MINUTE, eventually},
    cluster::{Cluster, SYSTEM},
    problems,
};

/// What proxies and controllers say while controllers, or the API server, are away.
pub const CONTROLLERS_AWAY: &[&str] = &[
    // Theirs: no proxy and no sidecar ends for that.
    "/controller: the container was restarted",
    "no stream to the control plane",
    "no certificate was signed",
    "watch failed; it is started again",
    "this replica no longer leads",
    "this replica stood still",
    "not everything ended in time",
];

/// What is said beside [`CONTROLLERS_AWAY`] while the API server is away.
pub const API_SERVER_AWAY: &[&str] = &[
    "cannot renew the lease",
    "cannot read the lease",
    "cannot take the lease",
    "cannot review a proxy's token",
    "cannot bring the cache up to date",
    "catching up failed",
    "watching the copies of the trust bundle failed",
    "watching Secret sluice-ca failed",
    "could not be written",
    "cannot write an event",
    "tried again",
    "cannot mark",
    "silent for too long",
    // The client's own words, for each watch.
    "kube_client::client",
];

#[must_use]
pub fn pods(cluster: &Cluster) -> Api<Pod> {
    Api::namespaced(cluster.client.clone(), SYSTEM)
}

pub async fn controllers(cluster: &Cluster) -> Vec<Pod> {
    pods(cluster).list(&ListParams::default().labels("app.kubernetes.io/component=controller")).await.unwrap().items
}

pub async fn fleet(cluster: &Cluster) -> Vec<Pod> {
    let members = ListParams::default().labels("sluice.dev/fleet,app.kubernetes.io/component=fleet");
    pods(cluster).list(&members).await.unwrap().items
}

/// The controller that holds the Lease, and its epoch.
pub async fn leader(cluster: &Cluster) -> (Pod, i32) {
    eventually("a leader", 2 * MINUTE, || async { try_leader(cluster).await }).await
}

/// [`leader`], if the API server answers and there is one.
pub async fn try_leader(cluster: &Cluster) -> Option<(Pod, i32)> {
    let leases: Api<Lease> = Api::namespaced(cluster.client.clone(), SYSTEM);
    let lease = leases.get("sluice-controller").await.ok()?.spec?;
    let holder = lease.holder_identity.filter(|holder| !holder.is_empty())?;
    let found = pods(cluster).list(&ListParams::default()).await.ok()?.items;
    let leader = found.into_iter().find(|pod| pod.uid().as_ref() == Some(&holder))?;
    Some((leader, lease.lease_transitions.unwrap_or_default()))
}

/// Waits until a Deployment of ours is complete: all replicas updated and ready, none left over.
pub async fn complete(cluster: &Cluster, deployment: &str) {
    let name = format!("deployment/{deployment}");
    let arguments = ["-n", SYSTEM, "rollout", "status", &name, "--timeout=280s"];
    cluster.kubectl(&arguments, None).await.unwrap();
}

/// Waits until the fleet's Pods are Ready, and no others are there.
pub async fn fleet_is_ready(cluster: &Cluster, members: usize) {
    eventually("the fleet to be Ready", 3 * MINUTE, || async {
        let pods = fleet(cluster).await;
        let ready = |pod: &Pod| {
            let conditions = pod.status.as_ref().and_then(|status| status.conditions.clone()).unwrap_or_default();
            conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
        };
        (pods.len() == members && pods.iter().all(ready)).then_some(())
    })
    .await;
}

/// `helm upgrade` of the installation with these values beside those of the tests.
pub async fn upgrade(cluster: &Cluster, values: &[&str]) {
    cluster.install(values).await.unwrap();
}

/// Stops the API server for so long, with its history compacted meanwhile, and waits until it answers again.
pub async fn without_api_server(cluster: &Cluster, node: &crate::node::Node, away: Duration) {
    node.component("stop", "kube-apiserver").await.unwrap();
    tokio::time::sleep(away).await;
    node.compact().await.unwrap();
    let _unread = problems::roles_are_unread();
    node.component("start", "kube-apiserver").await.unwrap();
    eventually("the API server", problems::PATIENCE, || async { cluster.client.apiserver_version().await.ok() }).await;
}
