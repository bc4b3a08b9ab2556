//! [`build`]: the snapshot that follows from the facts.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use k8s_openapi::{
    api::core::v1::{Pod, Service},
    apimachinery::pkg::util::intstr::IntOrString,
};
use kube::ResourceExt;
use sluice_crds::{Backend, Canary, ServiceSpec, Traffic, labels};
use sluice_xds::{SpiffeId, TypeUrl};

use super::{
    Inputs, Member, Resource, RevisionFacts, RevisionKey, Routed, Settings, Snapshot, View,
    encode::{self, Addresses, FleetCluster, InboundPort, SIDECAR_PORT, Split},
    pod, policy,
    ports::PortKey,
    route::{self, Destinations},
    sendable,
    service::{self, Port, Protocol},
    size::Services,
    slices, target_port,
};
use crate::cache::CanaryKey;

/// Backend of an opaque port where nothing serves: a listener cannot answer 503 there, so it has an empty cluster.
const NONE: &str = "none";

/// Builds the snapshot. Equal inputs, in whatever order, make equal resources.
#[must_use]
pub fn build(inputs: &Inputs) -> Snapshot {
    let index = Index::new(inputs);
    let mut snapshot = Snapshot { members: members(inputs), pods: index.by_uid.clone(), ..Snapshot::default() };
    for canary in index.canaries.values() {
        canary_resources(inputs, &index, canary, &mut snapshot);
    }
    snapshot
}

/// The facts, by the keys that they are looked up by.
struct Index<'a> {
    canaries: BTreeMap<CanaryKey, &'a Canary>,
    services: BTreeMap<(String, String), &'a Service>,
    /// Pods of each revision, of whatever state.
    pods: BTreeMap<RevisionKey, Vec<&'a Pod>>,
    by_uid: BTreeMap<String, RevisionKey>,
    facts: BTreeMap<RevisionKey, RevisionFacts>,
}

impl<'a> Index<'a> {
    fn new(inputs: &'a Inputs) -> Self {
        let mut pods: BTreeMap<RevisionKey, Vec<&Pod>> = BTreeMap::new();
        let mut by_uid = BTreeMap::new();
        for pod in &inputs.pods {
            if let Some(key) = pod::revision_of(pod) {
                if let Some(uid) = &pod.metadata.uid {
                    by_uid.insert(uid.clone(), key.clone());
                }
                pods.entry(key).or_default().push(pod);
            }
        }
        let mut facts = inputs.revisions.clone();
        for (key, pods) in &mut pods {
            pods.sort_by_key(|pod| pod.name_any());
            if let Some(pod) = pods.first() {
                facts.entry(key.clone()).or_insert_with(|| RevisionFacts::of_pod(pod));
            }
        }
        let name = |object: &Service| (object.namespace().unwrap_or_default(), object.name_any());
        Self {
            canaries: inputs.canaries.iter().map(|canary| (CanaryKey::of(canary), &**canary)).collect(),
            services: inputs.services.iter().map(|service| (name(service), &**service)).collect(),
            pods,
            by_uid,
            facts,
        }
    }
}

/// What a Service of a Canary is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Apex,
    Primary,
    Canary,
}

fn canary_resources(inputs: &Inputs, index: &Index<'_>, canary: &Canary, snapshot: &mut Snapshot) {
    let key = CanaryKey::of(canary);
    let status = canary.status.as_ref();
    let apex = status.and_then(|status| status.service.as_deref()).unwrap_or_else(|| canary.spec.service_name());
    let found = |name: String| index.services.get(&(key.namespace.clone(), name)).copied();
    let apex_service = found(apex.to_owned());
    let additional: Vec<&Service> =
        canary.spec.additional_services().filter_map(|name| found(name.to_owned())).collect();

    let traffic = status.and_then(|status| status.traffic.clone());
    let matches = traffic.as_ref().and_then(|traffic| traffic.matches.as_deref());
    let how = sendable::how(inputs, canary, matches, Services { apex: apex_service, additional: &additional });
    if !how.is_some_and(|how| std::ptr::eq(how, &canary.spec.service)) {
        snapshot.unsendable.insert(key.clone());
    }
    // Where nothing that can be sent is known, routes are not made, and all else is.
    let (spec, withholds) = (how.unwrap_or(&canary.spec.service), how.is_none());
    let mut ports = apex_service.map_or_else(|| service::ports_of_spec(spec), |apex| service::ports(apex, spec));
    ports.extend(additional.iter().flat_map(|service| service::ports(service, spec)));
    sidecars(inputs, index, &key, &ports, snapshot);

    let Some(mut traffic) = traffic else { return };
    if apex_service.is_none() && additional.is_empty() {
        // Nobody comes to the fleet, and nobody may think that it carries the traffic.
        return;
    }
    if inputs.cuts.contains(&key) {
        traffic.weight = 0;
        traffic.mirror = 0;
    }
    let mut parts = Parts::default();
    let companion = |suffix| found(format!("{apex}-{suffix}")).filter(|service| slices::is_companion(service, &key));
    let own = [(Role::Apex, apex_service), (Role::Primary, companion("primary")), (Role::Canary, companion("canary"))];
    // Without the apex it is not known what is behind the ports of its companions. Further Services know it of themselves.
    let own = own.into_iter().filter_map(|(role, service)| Some((role, apex_service?, service?)));
    let additional = additional.into_iter().map(|service| (Role::Apex, service, service));
    for (role, like, service) in own.chain(additional) {
        let one = OneService {
            inputs,
            index,
            key: &key,
            apex,
            like,
            canary,
            spec,
            withholds,
            traffic: &traffic,
            role,
            service,
        };
        one.resources(&mut parts);
    }
    for (kind, name, resource) in parts.resources {
        snapshot.fleet.insert(kind, &name, resource);
    }
    snapshot.fleet.withheld.extend(parts.withheld);
    if parts.complete {
        for carrier in &parts.carriers {
            snapshot.carriers.insert(carrier.clone(), key.clone());
        }
        snapshot.canaries.insert(key, Routed { traffic, resources: parts.carriers });
    }
}

/// What a Canary adds to the fleet view.
struct Parts {
    resources: Vec<(TypeUrl, String, Resource)>,
    withheld: Vec<(TypeUrl, String)>,
    carriers: BTreeSet<(TypeUrl, String)>,
    /// Every port has a port of the fleet, and its route is sent: else the traffic is not carried and nobody may think that it is.
    complete: bool,
}

impl Default for Parts {
    fn default() -> Self {
        Self { resources: Vec::new(), withheld: Vec::new(), carriers: BTreeSet::new(), complete: true }
    }
}

struct OneService<'a> {
    inputs: &'a Inputs,
    index: &'a Index<'a>,
    key: &'a CanaryKey,
    /// Name of the apex: what its requests and those of the others are counted under.
    apex: &'a str,
    /// The Service that says what is behind a port: the apex for its companions, which have no Pods of their own.
    like: &'a Service,
    canary: &'a Canary,
    /// What is done with its requests.
    spec: &'a ServiceSpec,
    /// What is done with its requests is not known.
    withholds: bool,
    traffic: &'a Traffic,
    role: Role,
    service: &'a Service,
}

impl OneService<'_> {
    fn resources(&self, parts: &mut Parts) {
        let service_name = self.service.name_any();
        let namespace = &self.key.namespace;
        let spec = self.spec;
        let own: BTreeSet<u16> = service::ports(self.service, spec).into_iter().map(|port| port.number).collect();
        for port in service::ports(self.like, spec).into_iter().filter(|port| own.contains(&port.number)) {
            let allocation = PortKey {
                fleet: self.inputs.settings.fleet.clone(),
                namespace: namespace.clone(),
                service: service_name.clone(),
                port: port.number,
            };
            let Some(&fleet_port) = self.inputs.ports.get(&allocation) else {
                parts.complete = false;
                continue;
            };
            let name = format!("{namespace}/{service_name}:{}", port.number);
            for backend in self.backends() {
                self.cluster(&name, &port, backend, parts);
            }
            let destinations = self.destinations(&name);
            let mut carry = |kind: TypeUrl, resource: Resource| {
                // What `-canary` does with a canary is a matter of tests, and its cluster may be the very thing that
                // the fleet rejects: that must not hold up the way back to the primary.
                if self.role != Role::Canary || self.traffic.canary.is_none() {
                    parts.carriers.insert((kind, name.clone()));
                }
                parts.resources.push((kind, name.clone(), resource));
            };
            let limits = self.inputs.settings.limits;
            match port.protocol {
                Protocol::Http if self.withholds => {
                    parts.complete = false;
                    parts.withheld.extend([TypeUrl::Listener, TypeUrl::Route].map(|kind| (kind, name.clone())));
                }
                Protocol::Http => {
                    carry(TypeUrl::Listener, encode::http_listener(&name, fleet_port, route::filters(spec), limits));
                    carry(TypeUrl::Route, route::route(&name, destinations.as_ref(), spec));
                }
                Protocol::Tcp => {
                    // Bytes match nothing.
                    let split = destinations.map(|to| to.all).unwrap_or_else(|| vec![(format!("{name}/{NONE}"), 100)]);
                    carry(TypeUrl::Listener, encode::tcp_listener(&name, fleet_port, &split, limits));
                    if self.backends().next().is_none() {
                        self.empty_cluster(&name, parts);
                    }
                }
            }
        }
    }

    /// Back ends that have a cluster, whether they have a weight or not: they are warm when they get one.
    fn backends(&self) -> impl Iterator<Item = &Backend> {
        let primary = Some(&self.traffic.primary).filter(|_| self.role != Role::Canary);
        let canary = self.traffic.canary.as_ref().filter(|_| self.role != Role::Primary);
        primary.into_iter().chain(canary.filter(move |canary| Some(*canary) != primary))
    }

    /// Who gets the requests of a port; `None` where nothing serves.
    fn destinations(&self, name: &str) -> Option<Destinations<'_>> {
        let cluster = |backend: &Backend| format!("{name}/{}", backend.0);
        let Traffic { primary, canary, weight, mirror, matches } = self.traffic;
        let only = |backend: &Backend| vec![(cluster(backend), 100)];
        let plan = self.canary.status.as_ref().and_then(|status| status.plan.as_ref());
        let analysis = plan.and_then(|plan| plan.analysis.as_ref());
        let affinity = analysis.and_then(|analysis| analysis.session_affinity.as_ref());
        let to = |all| Some(Destinations { matched: None, all, mirror: None, affinity });
        match (self.role, canary) {
            (Role::Canary, None) => None,
            (Role::Canary, Some(canary)) => to(only(canary)),
            (Role::Primary, _) | (Role::Apex, None) => to(only(primary)),
            (Role::Apex, Some(canary)) if canary == primary => to(only(primary)),
            (Role::Apex, Some(canary)) => {
                let share = u32::try_from((*weight).clamp(0, 100)).unwrap_or(0);
                // A side at weight 0 is left out: then a cluster that the fleet rejects cannot hold up the route that leads
                // away from it.
                let both = [(cluster(primary), 100 - share), (cluster(canary), share)];
                let split: Split = both.into_iter().filter(|(_, weight)| *weight > 0).collect();
                let copied = u32::try_from((*mirror).clamp(0, 100)).unwrap_or(0);
                let mirror = (copied > 0).then(|| (cluster(canary), copied));
                match matches {
                    Some(matches) if share > 0 || copied > 0 => {
                        let matched = Some((matches.as_slice(), split));
                        Some(Destinations { matched, all: only(primary), mirror, affinity })
                    }
                    Some(_) | None => Some(Destinations { matched: None, all: split, mirror, affinity }),
                }
            }
        }
    }

    fn cluster(&self, name: &str, port: &Port, backend: &Backend, parts: &mut Parts) {
        let cluster = format!("{name}/{}", backend.0);
        let policy = self.spec.traffic_policy.as_ref();
        let zones = policy::prefers_own_zone(policy, self.like);
        let (tls, mut addresses) = if backend.is_original() {
            (None, self.original(&port.target))
        } else {
            let (tls, addresses) = self.revision(&port.target, &backend.0);
            (Some(tls), addresses)
        };
        if !zones {
            addresses.values_mut().for_each(|zone| *zone = None);
        }
        let message = FleetCluster {
            name: &cluster,
            namespace: &self.key.namespace,
            service: self.apex,
            revision: &backend.0,
            protocol: port.protocol,
            tls,
            policy,
            limits: self.inputs.settings.limits,
            zones,
        };
        parts.resources.push((TypeUrl::Cluster, cluster.clone(), message.encode()));
        let endpoints = encode::endpoints(&cluster, &addresses);
        parts.resources.push((TypeUrl::Endpoints, cluster, endpoints));
    }

    fn empty_cluster(&self, name: &str, parts: &mut Parts) {
        let cluster = format!("{name}/{NONE}");
        let message = FleetCluster {
            name: &cluster,
            namespace: &self.key.namespace,
            service: self.apex,
            revision: NONE,
            protocol: Protocol::Tcp,
            tls: None,
            policy: None,
            limits: self.inputs.settings.limits,
            zones: false,
        };
        parts.resources.push((TypeUrl::Cluster, cluster.clone(), message.encode()));
        let endpoints = encode::endpoints(&cluster, &Addresses::new());
        parts.resources.push((TypeUrl::Endpoints, cluster, endpoints));
    }

    /// The target's own Pods: no sidecar, so the application's port in plaintext. Each may have the named port elsewhere.
    fn original(&self, target: &IntOrString) -> Addresses {
        let pods = self.inputs.originals.get(self.key).into_iter().flatten();
        pod::serving(pods)
            .filter_map(|pod| Some((SocketAddr::new(pod::ip(pod)?, target_port(pod, target)?), pod::zone(pod))))
            .collect()
    }

    fn revision(&self, target: &IntOrString, revision: &str) -> ((String, SpiffeId), Addresses) {
        let key = RevisionKey { canary: self.key.clone(), revision: revision.to_owned() };
        // A revision of which neither a record nor a Pod is left has no endpoints, so nobody is ever asked who he is.
        let facts = self.index.facts.get(&key).cloned().unwrap_or_default();
        let port = facts.port(target);
        let pods = self.index.pods.get(&key).into_iter().flatten();
        let ready = pod::serving(pods).filter_map(|pod| Some((pod::ip(pod)?, pod::zone(pod))));
        // As with any Service, a name that no container has leads nowhere.
        let addresses =
            ready.filter(|_| port.is_some()).map(|(ip, zone)| (SocketAddr::new(ip, SIDECAR_PORT), zone)).collect();
        let id = revision_id(&self.inputs.settings, &self.key.namespace, &facts);
        ((encode::sni(port.unwrap_or_default(), revision), id), addresses)
    }
}

fn revision_id(settings: &Settings, namespace: &str, facts: &RevisionFacts) -> SpiffeId {
    let domain = settings.fleet_id.trust_domain();
    SpiffeId::new(domain, namespace, &facts.service_account).unwrap_or_else(|error| {
        // Names of the API server's are always valid; with anything else no handshake may succeed, and the fleet's
        // own id is one that no application has.
        tracing::error!(namespace, service_account = facts.service_account, %error, "a revision has no valid SPIFFE id");
        settings.fleet_id.clone()
    })
}

/// Sidecar views of all revisions that are known, whether they have traffic or not: a Pod needs its own to become ready.
fn sidecars(inputs: &Inputs, index: &Index<'_>, key: &CanaryKey, ports: &[Port], snapshot: &mut Snapshot) {
    let first = RevisionKey { canary: key.clone(), revision: String::new() };
    let revisions = index.facts.range(first..).take_while(|(revision, _)| revision.canary == *key);
    for (revision, facts) in revisions {
        let mut inbound: BTreeMap<u16, InboundPort> = BTreeMap::new();
        for port in ports {
            let Some(number) = facts.port(&port.target) else { continue };
            let http = port.protocol == Protocol::Http;
            let one =
                inbound.entry(number).or_insert(InboundPort { port: number, protocol: port.protocol, alpn: http });
            // Two ports of the Service lead to one of the container: bytes pass whatever the other speaks.
            if one.protocol != port.protocol {
                one.protocol = Protocol::Tcp;
                one.alpn = true;
            }
        }
        let mut view = View::default();
        for port in inbound.keys() {
            view.insert(TypeUrl::Cluster, &encode::local(*port), encode::local_cluster(*port, facts.loopback));
        }
        let inbound: Vec<InboundPort> = inbound.into_values().collect();
        if !inbound.is_empty() {
            let listener = encode::inbound(&revision.revision, &inbound, &inputs.settings.fleet_id);
            view.insert(TypeUrl::Listener, encode::INBOUND, listener);
        }
        snapshot.sidecars.insert(revision.clone(), view);
    }
}

fn members(inputs: &Inputs) -> BTreeMap<String, Member> {
    let listed: BTreeSet<IpAddr> = inputs
        .slices
        .iter()
        .flat_map(|slice| &slice.endpoints)
        .flat_map(|endpoint| &endpoint.addresses)
        .filter_map(|address| address.parse().ok())
        .collect();
    let pods = inputs.pods.iter().filter(|pod| pod::is_member(pod, &inputs.settings));
    pods.filter_map(|pod| {
        let addresses = pod::ips(pod);
        let member = Member {
            name: pod.name_any(),
            started: pod.status.as_ref().and_then(|status| status.phase.as_deref()) != Some("Pending"),
            lagging: pod.annotations().contains_key(labels::LAGGING),
            in_slices: addresses.iter().any(|address| listed.contains(address)),
            addresses,
        };
        Some((pod.metadata.uid.clone()?, member))
    })
    .collect()
}

/// Every port that the fleet should have, and for which Canary: those of all Services that it serves or is about to.
#[must_use]
pub fn wanted_ports(inputs: &Inputs) -> BTreeMap<PortKey, CanaryKey> {
    let index = Index::new(inputs);
    let mut wanted = BTreeMap::new();
    for (key, canary) in &index.canaries {
        let Some(status) = canary.status.as_ref().filter(|status| status.traffic.is_some() || status.service.is_some())
        else {
            continue;
        };
        let apex = status.service.as_deref().unwrap_or_else(|| canary.spec.service_name());
        let own = ["", "-primary", "-canary"].map(|suffix| (format!("{apex}{suffix}"), !suffix.is_empty()));
        let additional = canary.spec.additional_services().map(|name| (name.to_owned(), false));
        for (name, own) in own.into_iter().chain(additional) {
            let Some(service) = index.services.get(&(key.namespace.clone(), name)) else {
                continue;
            };
            if own && !slices::is_companion(service, key) {
                continue;
            }
            for port in service::ports(service, &canary.spec.service) {
                let port = PortKey {
                    fleet: inputs.settings.fleet.clone(),
                    namespace: key.namespace.clone(),
                    service: service.name_any(),
                    port: port.number,
                };
                wanted.insert(port, key.clone());
            }
        }
    }
    wanted
}

#[cfg(test)]
mod tests;
