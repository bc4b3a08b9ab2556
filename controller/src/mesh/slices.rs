//! The EndpointSlices of Services that were taken over: the fleet's Pods in place of the application's.
//!
//! [`desired`] says what there should be; [`changes`] what to do about it. Every replica of the controller runs the
//! [`Writer`], leader or not: a fleet Pod that died must leave the slices even when nobody leads. The contents follow from
//! the cache alone, so that two writers never disagree for long, and each write names the version that it replaces.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use futures::{StreamExt, stream};
use k8s_openapi::{
    api::{
        core::v1::{ObjectReference, Pod, Service},
        discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice},
    },
    apimachinery::pkg::apis::meta::v1::OwnerReference,
};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, ObjectMeta, PostParams, Preconditions},
};
use sluice_crds::labels;
use tokio::time::Instant;

use super::{Inputs, pod, ports::PortKey, service};
use crate::cache::CanaryKey;

const SERVICE_NAME: &str = "kubernetes.io/service-name";
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
/// How long a slice must be wrong before a replica that does not lead mends it.
pub const STANDBY_DELAY: Duration = Duration::from_secs(2);
/// A replica that did not run for so long knows nothing any more.
pub const STALL: Duration = Duration::from_secs(5);
/// Between two tries in a namespace that is being deleted.
const TERMINATING_RETRY: Duration = Duration::from_secs(5);
/// Longest that one write may take.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// Writes under way at once. A member that ends closes its ports some 5 s later, and thousands of slices may have it.
const WRITES: usize = 32;
/// Most endpoints that the API server takes in one slice (discovery/v1 EndpointSlice).
const MOST_ENDPOINTS: usize = 1000;

/// Namespace and name of a slice.
pub type SliceKey = (String, String);

/// What should be. One without `ports` is of a Service that has a port without a port of the fleet: a slice that is there keeps
/// the ports that it has, and none is made.
type Desired = BTreeMap<SliceKey, EndpointSlice>;

/// Whether this Service is the `-primary` or `-canary` of the Canary: an equally named one of somebody else's is not.
pub(super) fn is_companion(service: &Service, key: &CanaryKey) -> bool {
    service.labels().get(labels::CANARY) == Some(&key.name)
}

/// What there should be. The apex Service and the further ones have slices in every stage that keeps them (`Stage::keeps_slices`: from before its
/// selector key is written until after the native slices are filled again), `-primary` and `-canary` have them
/// as long as they exist.
#[must_use]
pub fn desired(inputs: &Inputs) -> Desired {
    let mut desired = Desired::new();
    let services: BTreeMap<(String, String), &Service> = inputs
        .services
        .iter()
        .map(|service| ((service.namespace().unwrap_or_default(), service.name_any()), &**service))
        .collect();
    let mut fleet: Vec<&Pod> = inputs
        .pods
        .iter()
        .map(|pod| &**pod)
        .filter(|pod| pod::is_member(pod, &inputs.settings) && pod::serves(pod))
        .collect();
    let lags = |pod: &Pod| pod.annotations().contains_key(labels::LAGGING);
    // Where most do not reach the leader, it is more likely cut off itself, beside the few that it hears and that nobody else
    // reaches: old news serve better than nobody does.
    let marked = fleet.iter().filter(|pod| lags(pod)).count();
    if marked <= fleet.len() / 2 {
        fleet.retain(|pod| !lags(pod));
    }
    fleet.sort_by_key(|pod| pod.name_any());
    for canary in &inputs.canaries {
        let key = CanaryKey::of(canary);
        let apex = canary.spec.service_name();
        let taken =
            canary.status.as_ref().is_some_and(|status| status.traffic.is_some() && status.stage.keeps_slices());
        let taken_over = canary.spec.service_names().filter(|_| taken).map(|name| (name.to_owned(), false));
        let own = ["-primary", "-canary"].map(|suffix| (format!("{apex}{suffix}"), true));
        for (name, companion) in taken_over.chain(own) {
            let at = (key.namespace.clone(), name);
            match services.get(&at) {
                Some(service) if !companion || is_companion(service, &key) => {
                    let slices = slices_of(inputs, &key, service, &fleet);
                    desired.extend(slices.into_iter().map(|slice| ((at.0.clone(), slice.name_any()), slice)));
                }
                Some(_) | None => {}
            }
        }
    }
    desired
}

/// Without `ports` while one has no port of the fleet: kube-proxy rejects a port that a Service's slices do not have, so there is
/// no half of a takeover.
fn slices_of(inputs: &Inputs, key: &CanaryKey, service: &Service, fleet: &[&Pod]) -> Vec<EndpointSlice> {
    let name = service.name_any();
    let spec = service.spec.as_ref();
    let ports = spec.into_iter().flat_map(|spec| spec.ports.iter().flatten()).filter(|port| service::is_tcp(port));
    let ports = ports.map(|port| {
        let allocation = PortKey {
            fleet: inputs.settings.fleet.clone(),
            namespace: key.namespace.clone(),
            service: name.clone(),
            port: u16::try_from(port.port).ok()?,
        };
        Some(EndpointPort {
            // kube-proxy matches by it, and an unnamed port's is the empty text.
            name: Some(port.name.clone().unwrap_or_default()),
            port: Some(i32::from(*inputs.ports.get(&allocation)?)),
            protocol: Some("TCP".to_owned()),
            app_protocol: port.app_protocol.clone(),
        })
    });
    let mut ports: Option<Vec<EndpointPort>> = ports.collect();
    ports.iter_mut().for_each(|ports| ports.sort_by(|a, b| a.name.cmp(&b.name)));
    let families: Vec<&str> = match spec.and_then(|spec| spec.ip_families.as_ref()) {
        Some(families) if !families.is_empty() => families.iter().map(String::as_str).collect(),
        // Every API server since 1.23 says it; be it as it was before.
        Some(_) | None => vec!["IPv4"],
    };
    let slice = |family: &str| EndpointSlice {
        metadata: ObjectMeta {
            name: Some(format!("{name}-sluice-{}-{}", inputs.settings.fleet, family.to_ascii_lowercase())),
            namespace: Some(key.namespace.clone()),
            labels: Some(BTreeMap::from([
                (SERVICE_NAME.to_owned(), name.clone()),
                (MANAGED_BY.to_owned(), labels::MANAGED_BY.to_owned()),
                (labels::CANARY.to_owned(), key.name.clone()),
                (labels::FLEET.to_owned(), inputs.settings.fleet.clone()),
            ])),
            // Without an owner it would outlive the Service and serve the next one of that name.
            owner_references: Some(vec![OwnerReference {
                api_version: "v1".to_owned(),
                kind: "Service".to_owned(),
                name: name.clone(),
                uid: service.uid().unwrap_or_default(),
                controller: Some(true),
                block_owner_deletion: None,
            }]),
            ..ObjectMeta::default()
        },
        address_type: family.to_owned(),
        // The first by name: every replica comes to the same.
        endpoints: fleet.iter().filter_map(|pod| endpoint(pod, family)).take(MOST_ENDPOINTS).collect(),
        ports: ports.clone(),
    };
    families.into_iter().map(slice).collect()
}

fn endpoint(pod: &Pod, family: &str) -> Option<Endpoint> {
    let address = pod::ips(pod).into_iter().find(|ip| ip.is_ipv6() == (family == "IPv6"))?;
    Some(Endpoint {
        addresses: vec![address.to_string()],
        conditions: Some(EndpointConditions { ready: Some(true), serving: Some(true), terminating: Some(false) }),
        node_name: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
        zone: pod::zone(pod),
        target_ref: Some(ObjectReference {
            kind: Some("Pod".to_owned()),
            namespace: pod.namespace(),
            name: Some(pod.name_any()),
            uid: pod.uid(),
            ..ObjectReference::default()
        }),
        ..Endpoint::default()
    })
}

/// A write that is due.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    Create(Box<EndpointSlice>),
    /// Carries uid and resourceVersion of the slice that it replaces.
    Replace(Box<EndpointSlice>),
    /// With uid and resourceVersion of the slice that was seen.
    Delete {
        uid: Option<String>,
        resource_version: Option<String>,
    },
}

impl Change {
    /// Whether there may be more endpoints than it writes.
    fn is_full(&self) -> bool {
        match self {
            Self::Create(slice) | Self::Replace(slice) => slice.endpoints.len() == MOST_ENDPOINTS,
            Self::Delete { .. } => false,
        }
    }
}

/// What is to be done to come from `inputs.slices` to `desired`.
#[must_use]
pub fn changes(inputs: &Inputs, desired: &Desired) -> BTreeMap<SliceKey, Change> {
    let mut changes = BTreeMap::new();
    let mut found = BTreeSet::new();
    for slice in inputs.slices.iter().filter(|slice| is_ours(slice, inputs)) {
        let key = (slice.namespace().unwrap_or_default(), slice.name_any());
        found.insert(key.clone());
        match desired.get(&key) {
            // The type of the addresses cannot be changed (discovery/v1 EndpointSlice).
            Some(wanted) if wanted.address_type == slice.address_type => {
                let mut wanted = wanted.clone();
                wanted.ports = wanted.ports.or_else(|| slice.ports.clone());
                if !same(slice, &wanted) {
                    wanted.metadata.resource_version = slice.metadata.resource_version.clone();
                    wanted.metadata.uid = slice.metadata.uid.clone();
                    changes.insert(key, Change::Replace(Box::new(wanted)));
                }
            }
            Some(_) | None => {
                let (uid, resource_version) = (slice.uid(), slice.resource_version());
                changes.insert(key, Change::Delete { uid, resource_version });
            }
        }
    }
    for (key, wanted) in desired {
        if !found.contains(key) && wanted.ports.is_some() {
            changes.insert(key.clone(), Change::Create(Box::new(wanted.clone())));
        }
    }
    changes
}

/// Whether Sluice wrote this slice.
pub(super) fn is_of_sluice(slice: &EndpointSlice) -> bool {
    slice.labels().get(MANAGED_BY).is_some_and(|by| by == labels::MANAGED_BY)
}

fn is_ours(slice: &EndpointSlice, inputs: &Inputs) -> bool {
    is_of_sluice(slice) && slice.labels().get(labels::FLEET) == Some(&inputs.settings.fleet)
}

/// The ports of the fleet that our slices carry: kube-proxy sends clients there, whatever is written down.
#[must_use]
pub(super) fn carried(inputs: &Inputs) -> BTreeMap<PortKey, u16> {
    let mut carried = BTreeMap::new();
    let ours = inputs.slices.iter().filter(|slice| is_ours(slice, inputs));
    let slices: BTreeMap<_, _> =
        ours.map(|slice| ((slice.namespace(), slice.labels().get(SERVICE_NAME).cloned()), slice)).collect();
    for service in &inputs.services {
        let Some(slice) = slices.get(&(service.namespace(), Some(service.name_any()))) else { continue };
        let ports = service.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
        for port in ports.filter(|port| service::is_tcp(port)) {
            let name = port.name.as_deref().unwrap_or_default();
            let mut of_slice = slice.ports.iter().flatten();
            let found = of_slice.find(|port| port.name.as_deref().unwrap_or_default() == name);
            let found = found.and_then(|port| u16::try_from(port.port?).ok());
            if let (Some(found), Ok(number)) = (found, u16::try_from(port.port)) {
                let key = PortKey {
                    fleet: inputs.settings.fleet.clone(),
                    namespace: service.namespace().unwrap_or_default(),
                    service: service.name_any(),
                    port: number,
                };
                carried.insert(key, found);
            }
        }
    }
    carried
}

/// Compares what we write; the order of endpoints and ports means nothing, and others may add labels of their own.
fn same(found: &EndpointSlice, wanted: &EndpointSlice) -> bool {
    let sorted = |slice: &EndpointSlice| {
        let mut endpoints = slice.endpoints.clone();
        endpoints.sort_by(|a, b| a.addresses.cmp(&b.addresses));
        let mut ports = slice.ports.clone().unwrap_or_default();
        ports.sort_by(|a, b| a.name.cmp(&b.name));
        (endpoints, ports)
    };
    let labelled = wanted.labels().iter().all(|(key, value)| found.labels().get(key) == Some(value));
    labelled && found.owner_references() == wanted.owner_references() && sorted(found) == sorted(wanted)
}

/// Whether the slices of this Service are there and right: what the takeover waits for.
#[must_use]
pub fn settled(inputs: &Inputs, namespace: &str, service: &str) -> bool {
    let desired = desired(inputs);
    let of_service = |slice: &EndpointSlice| slice.labels().get(SERVICE_NAME).is_some_and(|name| name == service);
    let mut wanted = desired.iter().filter(|(key, slice)| key.0 == namespace && of_service(slice)).peekable();
    let changes = changes(inputs, &desired);
    wanted.peek().is_some() && wanted.all(|(key, slice)| slice.ports.is_some() && !changes.contains_key(key))
}

/// Keeps the slices as they should be.
pub struct Writer {
    client: Client,
    /// Since when each slice has been wrong, and what was to be done about it.
    wrong: BTreeMap<SliceKey, Instant>,
    /// Not before then is this slice tried again, after an error.
    held: BTreeMap<SliceKey, (Instant, u32)>,
}

impl Writer {
    #[must_use]
    pub fn new(client: Client) -> Self {
        Self { client, wrong: BTreeMap::new(), held: BTreeMap::new() }
    }

    /// Whether a replica that does not lead would write.
    pub fn is_due(&mut self, inputs: &Inputs) -> bool {
        !self.due(inputs, false).0.is_empty()
    }

    /// What to write now, and when to look again for the rest.
    fn due(&mut self, inputs: &Inputs, leads: bool) -> (Vec<(SliceKey, Change)>, Option<Instant>) {
        let now = Instant::now();
        let changes = changes(inputs, &desired(inputs));
        self.wrong.retain(|key, _| changes.contains_key(key));
        self.held.retain(|key, _| changes.contains_key(key));
        let mut again: Option<Instant> = None;
        let mut due = Vec::new();
        for (key, change) in changes {
            let since = *self.wrong.entry(key.clone()).or_insert(now);
            let mut at = if leads { since } else { since + STANDBY_DELAY };
            if let Some((until, _)) = self.held.get(&key) {
                at = at.max(*until);
            }
            if at <= now {
                due.push((key, change));
            } else {
                again = Some(again.map_or(at, |other| other.min(at)));
            }
        }
        (due, again)
    }

    /// One round: writes what is due. Returns when to call again even if nothing changes before; `None` if all is well.
    ///
    /// A write that fails is tried again later; it never stops the others.
    pub async fn round(&mut self, inputs: &Inputs, leads: bool) -> Option<Instant> {
        let (due, mut again) = self.due(inputs, leads);
        if due.iter().any(|(_, change)| change.is_full()) {
            tracing::warn!(
                "an EndpointSlice takes {MOST_ENDPOINTS} endpoints: the fleet's Pods after these, by name, get no connections"
            );
        }
        let writes = due.into_iter().map(|(key, change)| {
            let client = self.client.clone();
            async move {
                let result = write(client, &key, change).await;
                (key, result)
            }
        });
        let results: Vec<_> = stream::iter(writes).buffer_unordered(WRITES).collect().await;
        for (key, result) in results {
            // The watch brings the written slice in a moment; until then it still looks wrong.
            let failures = self.held.get(&key).map_or(0, |(_, failures)| *failures);
            let (wait, failures) = match result {
                Ok(()) => (Duration::from_secs(1), 0),
                // With it goes the Canary that wants the slice.
                Err(error) if error.namespace_terminates() => {
                    tracing::debug!(
                        namespace = key.0,
                        slice = key.1,
                        "no EndpointSlice is written: the namespace is being deleted"
                    );
                    (TERMINATING_RETRY, failures + 1)
                }
                Err(error) => {
                    tracing::warn!(namespace = key.0, slice = key.1, %error, "an EndpointSlice could not be written");
                    (Duration::from_millis(200) * 2_u32.pow(failures.min(7)), failures + 1)
                }
            };
            let until = Instant::now() + wait;
            again = Some(again.map_or(until, |other| other.min(until)));
            self.held.insert(key, (until, failures));
        }
        again
    }
}

/// Why a slice was not written.
#[derive(Debug, thiserror::Error)]
enum WriteError {
    #[error("no answer of the API server in {WRITE_TIMEOUT:?}; it is tried again")]
    Timeout,
    #[error(transparent)]
    Api(#[from] kube::Error),
}

impl WriteError {
    /// The API server creates nothing in a namespace that is being deleted (the admission plug-in NamespaceLifecycle).
    fn namespace_terminates(&self) -> bool {
        let Self::Api(kube::Error::Api(status)) = self else { return false };
        let causes = status.details.as_ref().map(|details| &details.causes);
        causes.is_some_and(|causes| causes.iter().any(|cause| cause.reason == "NamespaceTerminating"))
    }
}

async fn write(client: Client, key: &SliceKey, change: Change) -> Result<(), WriteError> {
    let api: Api<EndpointSlice> = Api::namespaced(client, &key.0);
    let params = PostParams { field_manager: Some(labels::FIELD_MANAGER.to_owned()), ..PostParams::default() };
    let call = async {
        match change {
            Change::Create(slice) => api.create(&params, &slice).await.map(drop),
            Change::Replace(slice) => api.replace(&key.1, &params, &slice).await.map(drop),
            Change::Delete { uid, resource_version } => {
                let preconditions = Some(Preconditions { uid, resource_version });
                let params = DeleteParams { preconditions, ..DeleteParams::default() };
                api.delete(&key.1, &params).await.map(drop)
            }
        }
    };
    let result = tokio::time::timeout(WRITE_TIMEOUT, call).await.map_err(|_| WriteError::Timeout)?;
    match result {
        // Another replica was faster, or the object is newer than what we saw: the watch brings it, then we look again.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use std::sync::Arc;

    use serde_json::json;

    use super::*;
    use crate::mesh::testing::Shop;

    fn taken_over() -> Shop {
        let mut shop = Shop::new();
        shop.traffic("aaa", None, 0);
        shop.canary["status"]["stage"] = json!("Settled");
        shop.fleet_pod("fleet-1", "10.0.1.1");
        shop.fleet_pod("fleet-2", "10.0.1.2");
        shop
    }

    #[test]
    fn a_refusal_because_the_namespace_is_being_deleted_is_told_from_one_for_lack_of_rights() {
        let refused = |causes: serde_json::Value| {
            let status = json!({"code": 403, "reason": "Forbidden", "details": {"causes": causes}});
            WriteError::Api(kube::Error::Api(Box::new(serde_json::from_value(status).unwrap())))
        };
        assert!(refused(json!([{"reason": "NamespaceTerminating"}])).namespace_terminates());
        assert!(!refused(json!([])).namespace_terminates());
    }

    /// The API server, as far as slices go.
    fn apply(inputs: &mut Inputs, changes: BTreeMap<SliceKey, Change>) {
        for (key, change) in changes {
            inputs.slices.retain(|slice| slice.name_any() != key.1);
            match change {
                Change::Create(slice) | Change::Replace(slice) => inputs.slices.push(Arc::new(*slice)),
                Change::Delete { .. } => {}
            }
        }
    }

    #[test]
    fn a_taken_over_service_leads_to_the_fleet_on_every_port() {
        let mut shop = taken_over();
        shop.more_ports.push(json!({"port": 81, "name": "", "protocol": "TCP", "appProtocol": "example.com/x"}));
        let inputs = shop.inputs();
        insta::assert_yaml_snapshot!(desired(&inputs)[&("shop".into(), "web-sluice-default-ipv4".into())]);
        let names: Vec<String> = desired(&inputs).into_keys().map(|(_, name)| name).collect();
        assert_eq!(
            names,
            ["web-canary-sluice-default-ipv4", "web-primary-sluice-default-ipv4", "web-sluice-default-ipv4"]
        );
    }

    #[test]
    fn before_the_takeover_only_our_own_services_have_slices() {
        let mut shop = taken_over();
        shop.canary["status"]["stage"] = json!("AdoptFleet");
        let names: Vec<String> = desired(&shop.inputs()).into_keys().map(|(_, name)| name).collect();
        assert_eq!(names, ["web-canary-sluice-default-ipv4", "web-primary-sluice-default-ipv4"]);
    }

    #[test]
    fn slices_come_before_the_selector_key_and_go_after_the_native_ones_are_back() {
        let mut shop = taken_over();
        for (stage, kept) in [("AdoptService", true), ("Judge", true), ("ReturnService", true), ("ReturnSettle", false)]
        {
            // The status names the Service only while its key is kept.
            shop.canary["status"]["service"] = serde_json::Value::Null;
            shop.canary["status"]["stage"] = json!(stage);
            let desired = desired(&shop.inputs());
            assert_eq!(desired.contains_key(&("shop".into(), "web-sluice-default-ipv4".into())), kept, "{stage}");
        }
    }

    #[test]
    fn fleet_pods_that_are_marked_unready_or_going_away_are_left_out() {
        let mut shop = taken_over();
        shop.pods[0]["metadata"]["annotations"] = json!({"sluice.dev/lagging-since": "2026-01-01T00:00:00Z"});
        shop.fleet_pod("fleet-3", "10.0.1.3");
        shop.pods[2]["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        shop.fleet_pod("fleet-4", "10.0.1.4");
        shop.pods[3]["status"]["conditions"][0]["status"] = json!("False");
        for slice in desired(&shop.inputs()).values() {
            let addresses: Vec<&String> = slice.endpoints.iter().flat_map(|endpoint| &endpoint.addresses).collect();
            assert_eq!(addresses, ["10.0.1.2"]);
        }
    }

    #[test]
    fn marked_members_are_left_out_only_while_at_least_half_are_not_marked() {
        for (members, marked, left) in [(1, 1, 1), (2, 1, 1), (2, 2, 2), (3, 1, 2), (3, 2, 3), (4, 2, 2), (4, 3, 4)] {
            let mut shop = taken_over();
            shop.pods.clear();
            for member in 0..members {
                shop.fleet_pod(&format!("fleet-{member}"), &format!("10.0.1.{member}"));
            }
            for pod in &mut shop.pods[..marked] {
                pod["metadata"]["annotations"] = json!({"sluice.dev/lagging-since": "2026-01-01T00:00:00Z"});
            }
            for slice in desired(&shop.inputs()).values() {
                assert_eq!(slice.endpoints.len(), left, "{marked} of {members} are marked");
            }
        }
    }

    #[test]
    fn a_slice_has_no_more_endpoints_than_the_api_takes() {
        let mut shop = taken_over();
        for member in 2..1001 {
            shop.fleet_pod(&format!("more-{member:04}"), &format!("10.1.{}.{}", member / 250, member % 250));
        }
        for slice in desired(&shop.inputs()).values() {
            assert_eq!(slice.endpoints.len(), 1000);
            let last = slice.endpoints[999].target_ref.as_ref().unwrap();
            assert_eq!(last.name.as_deref(), Some("more-0999"), "the first by name, on every replica");
        }
    }

    #[test]
    fn each_ip_family_has_its_slice_with_the_pods_that_have_an_address_of_it() {
        let mut shop = taken_over();
        shop.families = vec!["IPv4", "IPv6"];
        shop.pods[0]["status"]["podIPs"] = json!([{"ip": "10.0.1.1"}, {"ip": "fd00::1"}]);
        let desired = desired(&shop.inputs());
        let v6 = &desired[&("shop".into(), "web-sluice-default-ipv6".into())];
        assert_eq!(v6.address_type, "IPv6");
        assert_eq!(v6.endpoints.len(), 1);
        assert_eq!(v6.endpoints[0].addresses, ["fd00::1"]);
    }

    #[test]
    fn a_port_without_a_port_of_the_fleet_changes_nothing_rather_than_half() {
        let mut shop = taken_over();
        let mut inputs = shop.inputs();
        let first = changes(&inputs, &desired(&inputs));
        apply(&mut inputs, first);
        let ports: Vec<_> = inputs.slices.iter().map(|slice| slice.ports.clone()).collect();
        inputs.ports.clear();
        assert!(changes(&inputs, &desired(&inputs)).is_empty());
        assert!(!settled(&inputs, "shop", "web"));

        // Its members change nevertheless: where nobody is left of the old ones, every port of the Service would be lost.
        shop.pods.remove(0);
        shop.fleet_pod("fleet-3", "10.0.1.3");
        let slices = std::mem::take(&mut inputs.slices);
        inputs = Inputs { slices, ports: BTreeMap::new(), ..shop.inputs() };
        let due = changes(&inputs, &desired(&inputs));
        assert_eq!(due.values().filter(|change| matches!(change, Change::Replace(_))).count(), 3);
        apply(&mut inputs, due);
        for (slice, ports) in inputs.slices.iter().zip(ports) {
            assert_eq!(slice.ports, ports);
            let addresses: Vec<&String> = slice.endpoints.iter().flat_map(|endpoint| &endpoint.addresses).collect();
            assert_eq!(addresses, ["10.0.1.2", "10.0.1.3"]);
        }
        assert!(!settled(&inputs, "shop", "web"));

        inputs.slices.clear();
        assert!(changes(&inputs, &desired(&inputs)).is_empty(), "nothing is made that would have no ports");
    }

    #[test]
    fn what_was_written_is_right_and_stays_so_until_something_changes() {
        let mut shop = taken_over();
        let mut inputs = shop.inputs();
        assert!(!settled(&inputs, "shop", "web"));
        let due = changes(&inputs, &desired(&inputs));
        assert_eq!(due.len(), 3);
        apply(&mut inputs, due);
        assert!(changes(&inputs, &desired(&inputs)).is_empty());
        assert!(settled(&inputs, "shop", "web"));
        // As the API server may answer it.
        let mut reversed = (*inputs.slices[0]).clone();
        reversed.endpoints.reverse();
        reversed.metadata.labels.as_mut().unwrap().insert("of".into(), "somebody".into());
        inputs.slices[0] = Arc::new(reversed);
        assert!(changes(&inputs, &desired(&inputs)).is_empty());

        shop.pods[0]["status"]["conditions"][0]["status"] = json!("False");
        let slices = inputs.slices;
        inputs = Inputs { slices, ..shop.inputs() };
        let due = changes(&inputs, &desired(&inputs));
        assert_eq!(due.values().filter(|change| matches!(change, Change::Replace(_))).count(), 3);
        assert!(!settled(&inputs, "shop", "web"));
    }

    #[test]
    fn a_slice_that_is_no_longer_wanted_goes_and_one_of_somebody_elses_stays() {
        let mut shop = taken_over();
        let mut inputs = shop.inputs();
        let due = changes(&inputs, &desired(&inputs));
        apply(&mut inputs, due);
        let mut foreign = (*inputs.slices[0]).clone();
        foreign.metadata.name = Some("web-x7k2p".into());
        foreign.metadata.labels.as_mut().unwrap().insert(MANAGED_BY.into(), "endpointslice-controller.k8s.io".into());
        inputs.slices.push(Arc::new(foreign));
        shop.canary["status"]["stage"] = json!("ReturnSettle");
        let slices = inputs.slices;
        let inputs = Inputs { slices, ..shop.inputs() };
        let due = changes(&inputs, &desired(&inputs));
        let names: Vec<&str> = due.keys().map(|(_, name)| name.as_str()).collect();
        assert_eq!(names, ["web-sluice-default-ipv4"]);
        assert!(matches!(due.values().next(), Some(Change::Delete { .. })));
    }

    #[test]
    fn a_service_that_was_made_anew_gets_its_slice_under_the_new_uid() {
        let mut shop = taken_over();
        let mut inputs = shop.inputs();
        let due = changes(&inputs, &desired(&inputs));
        apply(&mut inputs, due);
        shop.service_uid = "another";
        let slices = inputs.slices;
        let inputs = Inputs { slices, ..shop.inputs() };
        let due = changes(&inputs, &desired(&inputs));
        let Some(Change::Replace(slice)) = due.get(&("shop".into(), "web-sluice-default-ipv4".into())) else {
            panic!("{due:?}");
        };
        assert_eq!(slice.owner_references()[0].uid, "another");
    }
}
