//! What a snapshot is made of.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use k8s_openapi::{
    api::{
        core::v1::{Container, Pod, Service},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::util::intstr::IntOrString,
};
use serde_json::Value;
use sluice_crds::{Canary, labels};
use sluice_xds::SpiffeId;

use super::{RevisionKey, ports::PortKey};
use crate::cache::CanaryKey;

/// What stays the same for the life of the process.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The service account of the fleet: whom sidecars admit. Its trust domain is that of all certificates.
    pub fleet_id: SpiffeId,
    /// Name of the fleet: value of the label [`labels::FLEET`] on its Pods.
    pub fleet: String,
    /// Namespace of the fleet and of the controller.
    pub release_namespace: String,
    /// The one namespace that the cache watches, if it does not watch all.
    pub watched_namespace: Option<String>,
    pub limits: Limits,
}

/// What one Service may take of each member of the fleet, so that it leaves something to the others. `None` is any number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Connections from clients, for each port.
    pub connections: Option<u32>,
    /// Open requests, for each revision behind a port.
    pub requests: Option<u32>,
    /// Seconds for which nothing may pass on a stream of HTTP, a tunnel, or a connection of TCP.
    pub stream_idle: Option<u32>,
}

/// Facts, all from one instant of the cache.
#[derive(Debug, Clone)]
pub struct Inputs {
    pub settings: Arc<Settings>,
    pub canaries: Vec<Arc<Canary>>,
    pub services: Vec<Arc<Service>>,
    /// Pods of revisions and of the fleet; others are ignored.
    pub pods: Vec<Arc<Pod>>,
    /// The Pods that each Canary's target owns, through its ReplicaSets.
    pub originals: BTreeMap<CanaryKey, Vec<Arc<Pod>>>,
    /// What is recorded about each revision. A revision that is not here is known by its Pods.
    pub revisions: BTreeMap<RevisionKey, RevisionFacts>,
    /// Ports of the fleet that are written down.
    pub ports: BTreeMap<PortKey, u16>,
    /// Canaries whose canary side has no weight and gets no copies, whatever their status says.
    pub cuts: BTreeSet<CanaryKey>,
    /// EndpointSlices that are ours.
    pub slices: Vec<Arc<EndpointSlice>>,
    /// Each Canary as it was when its routes were last not too large: what is done with requests as long as they are.
    pub kept: Arc<BTreeMap<CanaryKey, Arc<Canary>>>,
}

impl Inputs {
    #[must_use]
    pub fn empty(settings: Arc<Settings>) -> Self {
        Self {
            settings,
            canaries: Vec::new(),
            services: Vec::new(),
            pods: Vec::new(),
            originals: BTreeMap::new(),
            revisions: BTreeMap::new(),
            ports: BTreeMap::new(),
            cuts: BTreeSet::new(),
            slices: Vec::new(),
            kept: Arc::default(),
        }
    }
}

/// What the mesh must know about a revision: the same for all of its Pods, for as long as it lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RevisionFacts {
    pub service_account: String,
    /// TCP ports of its containers that have a name.
    pub named_ports: BTreeMap<String, u16>,
    /// The sidecar dials 127.0.0.1 in place of the Pod's own address ([`labels::LOCAL_ADDRESS`]).
    pub loopback: bool,
}

impl Default for RevisionFacts {
    /// What the API server makes of a template that says nothing.
    fn default() -> Self {
        Self { service_account: "default".to_owned(), named_ports: BTreeMap::new(), loopback: false }
    }
}

impl RevisionFacts {
    /// Reads a pod template (`metadata` and `spec`), as a revision's record holds it. What is absent or has another
    /// type counts as absent: the API server has accepted this template.
    #[must_use]
    pub fn of_template(template: &Value) -> Self {
        let spec = &template["spec"];
        let account = spec["serviceAccountName"].as_str().or_else(|| spec["serviceAccount"].as_str());
        let service_account = account.filter(|name| !name.is_empty()).unwrap_or("default").to_owned();
        // Kubernetes resolves names on ordinary and on restartable init containers, and the first one counts
        // (pkg/api/v1/pod/util.go, FindPort).
        let containers = ["containers", "initContainers"].into_iter().flat_map(|list| {
            let all = spec[list].as_array().into_iter().flatten();
            all.filter(move |one| list == "containers" || one["restartPolicy"] == "Always")
        });
        let mut named_ports = BTreeMap::new();
        for port in containers.flat_map(|container| container["ports"].as_array().into_iter().flatten()) {
            let number = port["containerPort"].as_u64().and_then(|number| u16::try_from(number).ok());
            if let (Some(name), Some(number), "TCP") =
                (port["name"].as_str(), number, port["protocol"].as_str().unwrap_or("TCP"))
            {
                named_ports.entry(name.to_owned()).or_insert(number);
            }
        }
        let loopback = template["metadata"]["annotations"][labels::LOCAL_ADDRESS] == "127.0.0.1";
        Self { service_account, named_ports, loopback }
    }

    /// The same from a Pod.
    #[must_use]
    pub fn of_pod(pod: &Pod) -> Self {
        let account = pod.spec.as_ref().and_then(|spec| spec.service_account_name.clone());
        let annotations = pod.metadata.annotations.as_ref();
        Self {
            service_account: account.filter(|name| !name.is_empty()).unwrap_or_else(|| "default".to_owned()),
            named_ports: named_ports(pod),
            loopback: annotations.and_then(|all| all.get(labels::LOCAL_ADDRESS)).is_some_and(|to| to == "127.0.0.1"),
        }
    }

    /// The container port that a Service's `targetPort` means; `None` if no container has a port of that name.
    #[must_use]
    pub fn port(&self, target: &IntOrString) -> Option<u16> {
        resolve(target, &self.named_ports)
    }
}

/// The same for one Pod.
#[must_use]
pub fn target_port(pod: &Pod, target: &IntOrString) -> Option<u16> {
    match target {
        IntOrString::Int(number) => u16::try_from(*number).ok().filter(|number| *number != 0),
        IntOrString::String(_) => resolve(target, &named_ports(pod)),
    }
}

fn resolve(target: &IntOrString, named: &BTreeMap<String, u16>) -> Option<u16> {
    match target {
        IntOrString::Int(number) => u16::try_from(*number).ok().filter(|number| *number != 0),
        IntOrString::String(name) => named.get(name).copied(),
    }
}

fn named_ports(pod: &Pod) -> BTreeMap<String, u16> {
    let mut named = BTreeMap::new();
    let Some(spec) = &pod.spec else {
        return named;
    };
    let restartable = |container: &&Container| container.restart_policy.as_deref() == Some("Always");
    let sidecars = spec.init_containers.iter().flatten().filter(restartable);
    for port in spec.containers.iter().chain(sidecars).flat_map(|container| container.ports.iter().flatten()) {
        let number = u16::try_from(port.container_port);
        if let (Some(name), Ok(number), "TCP") = (&port.name, number, port.protocol.as_deref().unwrap_or("TCP")) {
            named.entry(name.clone()).or_insert(number);
        }
    }
    named
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;

    #[test]
    fn a_template_and_a_pod_made_from_it_say_the_same() {
        let template = json!({
            "metadata": {"annotations": {"sluice.dev/local-address": "127.0.0.1"}},
            "spec": {
                "serviceAccountName": "web",
                "initContainers": [
                    {"name": "once", "ports": [{"name": "never", "containerPort": 1}]},
                    {"name": "side", "restartPolicy": "Always", "ports": [{"name": "side", "containerPort": 9000}]},
                ],
                "containers": [
                    {"name": "app", "ports": [
                        {"name": "http", "containerPort": 8080},
                        {"name": "dns", "containerPort": 53, "protocol": "UDP"},
                        {"containerPort": 7},
                    ]},
                    {"name": "two", "ports": [{"name": "http", "containerPort": 8081}]},
                ],
            },
        });
        let facts = RevisionFacts::of_template(&template);
        let named = BTreeMap::from([("http".to_owned(), 8080), ("side".to_owned(), 9000)]);
        assert_eq!(facts, RevisionFacts { service_account: "web".into(), named_ports: named, loopback: true });
        let pod: Pod = serde_json::from_value(template).unwrap();
        assert_eq!(RevisionFacts::of_pod(&pod), facts);
        assert_eq!(facts.port(&IntOrString::String("http".into())), Some(8080));
        assert_eq!(facts.port(&IntOrString::String("dns".into())), None);
        assert_eq!(facts.port(&IntOrString::Int(99)), Some(99));
        assert_eq!(facts.port(&IntOrString::Int(0)), None);
    }

    #[test]
    fn a_template_that_says_nothing_runs_as_default() {
        assert_eq!(RevisionFacts::of_template(&json!({})), RevisionFacts::default());
    }
}
