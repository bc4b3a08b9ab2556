//! What a Pod says of itself: whose it is, whether it serves, and where it is reached.

use std::{borrow::Borrow, net::IpAddr};

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use sluice_crds::labels;

use super::{RevisionKey, Settings};
use crate::cache::CanaryKey;

/// The revision that a Pod's labels name.
pub(super) fn revision_of(pod: &Pod) -> Option<RevisionKey> {
    let labels = pod.metadata.labels.as_ref()?;
    let canary = CanaryKey::new(pod.metadata.namespace.clone()?, labels.get(labels::CANARY)?);
    Some(RevisionKey { canary, revision: labels.get(labels::REVISION)?.clone() })
}

/// A Pod of the fleet whose containers may still run.
pub(super) fn is_member(pod: &Pod, settings: &Settings) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    pod.metadata.namespace.as_deref() == Some(&settings.release_namespace)
        && pod.labels().get(labels::FLEET) == Some(&settings.fleet)
        && !matches!(phase, Some("Succeeded" | "Failed"))
}

/// Ready, and not about to go.
#[must_use]
pub fn serves(pod: &Pod) -> bool {
    is_ready(pod) && pod.metadata.deletion_timestamp.is_none()
}

fn is_ready(pod: &Pod) -> bool {
    let mut conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// Those of a version's Pods that get requests: where all are about to go, those that are ready still, as with any Service
/// (KEP-1669).
pub(super) fn serving<'a, P: Borrow<Pod> + 'a>(
    pods: impl Iterator<Item = &'a P> + Clone,
) -> impl Iterator<Item = &'a Pod> {
    let pods = pods.map(Borrow::borrow);
    let all_go = !pods.clone().any(serves);
    pods.filter(move |pod| if all_go { is_ready(pod) } else { serves(pod) })
}

/// Put on Pods by the API server from 1.35 on; before, it is not known unless somebody else does.
const ZONE: &str = "topology.kubernetes.io/zone";

/// The zone of a Pod's node.
pub(super) fn zone(pod: &Pod) -> Option<String> {
    pod.labels().get(ZONE).filter(|zone| !zone.is_empty()).cloned()
}

/// Its primary address.
pub(super) fn ip(pod: &Pod) -> Option<IpAddr> {
    pod.status.as_ref()?.pod_ip.as_ref()?.parse().ok()
}

/// All addresses of a Pod, the primary one first.
pub(crate) fn ips(pod: &Pod) -> Vec<IpAddr> {
    let Some(status) = &pod.status else {
        return Vec::new();
    };
    let all = status.pod_ips.iter().flatten().map(|ip| &ip.ip);
    let mut addresses: Vec<IpAddr> = Vec::new();
    for ip in status.pod_ip.iter().chain(all).filter_map(|ip| ip.parse().ok()) {
        if !addresses.contains(&ip) {
            addresses.push(ip);
        }
    }
    addresses
}
