//! The Services of a Canary: what forbids to take the apex Service over, and its companions `-primary`, `-canary` and
//! `-pods`.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use k8s_openapi::{
    api::core::v1::{Pod, Service, ServicePort, ServiceSpec},
    apimachinery::pkg::{
        apis::meta::v1::{ObjectMeta, OwnerReference},
        util::intstr::IntOrString,
    },
};
use kube::{ResourceExt, api::DynamicObject};
use serde_json::Value;
use sluice_crds::{Canary, PortRef, labels};

use super::{
    machine::{Problem, UNSENDABLE},
    revisions, template,
};
use crate::{
    cache::CanaryKey,
    mesh::{self, Limits, RevisionFacts, ports::PortKey},
};

/// Longest name of an apex Service: `-primary` has to fit in 63.
const MAX_APEX_NAME: usize = 55;

/// Labels that a companion must not copy: by them, tools know what they manage and prune what is not in Git.
const TRACKING_LABELS: [&str; 4] =
    ["app.kubernetes.io/instance", "app.kubernetes.io/managed-by", "helm.sh/chart", "heritage"];
const TRACKING_PREFIXES: [&str; 5] =
    ["argocd.argoproj.io/", "helm.toolkit.fluxcd.io/", "kustomize.toolkit.fluxcd.io/", "meta.helm.sh/", "sluice.dev/"];

/// What a companion Service is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The serving revision, through the fleet.
    Primary,
    /// The revision under judgement, through the fleet.
    Canary,
    /// All Pods, directly: for scraping and port-forward, because the apex has no Pod endpoints any more.
    Pods,
}

impl Role {
    pub const ALL: [Self; 3] = [Self::Primary, Self::Canary, Self::Pods];

    /// Name of this companion of an apex Service.
    #[must_use]
    pub fn name(self, apex: &str) -> String {
        match self {
            Self::Primary => format!("{apex}-primary"),
            Self::Canary => format!("{apex}-canary"),
            Self::Pods => format!("{apex}-pods"),
        }
    }
}

/// Whether the apex's selector has this Canary's key.
#[must_use]
pub fn has_key(apex: &Service, canary: &Canary) -> bool {
    selector(apex).and_then(|selector| selector.get(labels::FLEET)) == Some(&canary.name_any())
}

/// The refusal of a Service that has addresses of an IP family that no member of the fleet has: its clients there would meet nobody.
/// Without a member that has an address it is not known.
#[must_use]
pub fn without_fleet<'a>(apex: &Service, members: impl Iterator<Item = &'a Pod>) -> Option<Problem> {
    let has: BTreeSet<&str> =
        members.flat_map(mesh::ips).map(|ip| if ip.is_ipv6() { "IPv6" } else { "IPv4" }).collect();
    let families = apex.spec.as_ref()?.ip_families.iter().flatten();
    let lacks = families.map(String::as_str).find(|family| !has.contains(family)).filter(|_| !has.is_empty())?;
    Some(Problem {
        reason: "ServiceUnsupported",
        message: format!(
            "Service {} cannot be taken over: it has an {lacks} address, and no member of the fleet has one; take {lacks} out of \
             spec.ipFamilies (ipFamilyPolicy: SingleStack; where it is the first one, in a new Service), or restart the fleet where Pods \
             have both",
            apex.name_any(),
        ),
    })
}

/// Ports that the fleet cannot serve, for it has none of its own left.
#[must_use]
pub fn without_port(ports: &[PortKey]) -> Option<Problem> {
    let (first, more) = ports.split_first()?;
    let more = if more.is_empty() { String::new() } else { format!(" and {} more", more.len()) };
    Some(Problem {
        reason: "NoFleetPort",
        message: format!(
            "the fleet has no port left for {first}{more}, or namespace {} has as many as are left: delete Canaries that are not needed, \
             or give the namespace an installation of its own (docs/limits.md, the fleet's own ports)",
            first.namespace,
        ),
    })
}

/// `spec.service.name` cannot be changed.
const ANOTHER: &str = "delete this Canary, and create it with the application's own Service in spec.service";

/// The owners that are left to a Service that Sluice made, where somebody else has written it since, such as Git, which applied it
/// later: it is theirs, and must not go with the Canary.
#[must_use]
pub fn owners_without_us(service: &Service, canary: &Canary) -> Option<Vec<OwnerReference>> {
    let uid = canary.metadata.uid.as_deref();
    (revisions::owned(service, canary) && is_written_by_others(service)).then(|| {
        let owners = service.owner_references().iter();
        owners.filter(|owner| Some(owner.uid.as_str()) != uid).cloned().collect()
    })
}

/// Whether anybody but Sluice has a part in its spec, or has applied it without a difference.
fn is_written_by_others(service: &Service) -> bool {
    service.managed_fields().iter().any(|entry| {
        let has = |path| entry.fields_v1.as_ref().is_some_and(|fields| fields.0.pointer(path).is_some());
        entry.subresource.is_none()
            && entry.manager.as_deref() != Some(labels::FIELD_MANAGER)
            && (has("/f:spec") || has("/f:metadata/f:annotations/f:kubectl.kubernetes.io~1last-applied-configuration"))
    })
}

/// What forbids to take a Service over.
#[must_use]
pub fn refusals(apex: &Service, canary: &Canary, pod_template: Option<&Value>) -> Vec<Problem> {
    let name = apex.name_any();
    let refuse = |why: String| Problem {
        reason: "ServiceUnsupported",
        message: format!("Service {name} cannot be taken over: {why}"),
    };
    let mut problems = Vec::new();
    if name.len() > MAX_APEX_NAME {
        problems.push(refuse(format!(
            "its name has more than {MAX_APEX_NAME} characters, and {name}-primary would not fit in 63"
        )));
    }
    if let Some(owner) = apex.owner_references().iter().find(|owner| owner.controller == Some(true))
        && Some(owner.uid.as_str()) != canary.metadata.uid.as_deref()
    {
        problems.push(refuse(format!("it belongs to {} {}; {ANOTHER}", owner.kind, owner.name)));
    }
    let Some(spec) = &apex.spec else { return problems };
    match spec.type_.as_deref() {
        Some("ExternalName") => problems.push(refuse("an ExternalName Service is only a DNS name; its clients never meet the fleet".into())),
        Some(_) | None if spec.cluster_ip.as_deref() == Some("None") => problems.push(refuse(
            "it is headless (clusterIP: None): its clients dial the Pods and go past the fleet; give the application a Service with a cluster IP"
                .into(),
        )),
        Some(_) | None => {}
    }
    for port in spec.ports.iter().flatten() {
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        if protocol != "TCP" {
            problems.push(refuse(format!(
                "port {} is {protocol}, and the fleet carries TCP only; move it to a Service of its own",
                port.port
            )));
        }
    }
    if spec.session_affinity.as_deref() == Some("ClientIP") {
        problems.push(refuse(
            "sessionAffinity: ClientIP would bind a client to a member of the fleet, not to a Pod of the application; remove it".into(),
        ));
    }
    if spec.internal_traffic_policy.as_deref() == Some("Local") {
        problems.push(refuse(
            "internalTrafficPolicy: Local drops packets on nodes without a member of the fleet; remove it".into(),
        ));
    }
    if let Some(key) =
        selector(apex).and_then(|selector| selector.get(labels::FLEET)).filter(|key| **key != canary.name_any())
    {
        problems.push(refuse(format!("its selector says {}: {key}, so Canary {key} has it; {ANOTHER}", labels::FLEET)));
    }
    let Some(pod_template) = pod_template else { return problems };
    let wanted: Vec<_> =
        selector(apex).into_iter().flatten().filter(|(key, _)| key.as_str() != labels::FLEET).collect();
    let pod_labels = pod_labels(pod_template);
    if wanted.is_empty() {
        problems.push(refuse(
            "it has no selector, so its endpoints are somebody else's; give it the selector of the application's Pods"
                .into(),
        ));
    } else if let Some((key, value)) = wanted
        .iter()
        .find(|(key, value)| pod_labels.get(key.as_str()).and_then(|label| label.as_str()) != Some(value.as_str()))
    {
        problems.push(refuse(format!(
            "it selects Pods with {key}: {value}, which Deployment {} does not make; {ANOTHER}",
            canary.spec.target_ref.name
        )));
    }
    let named = template::named_ports(pod_template);
    for port in spec.ports.iter().flatten() {
        if let Some(IntOrString::String(target)) = &port.target_port
            && !named.contains_key(target)
        {
            problems.push(Problem {
                reason: "PortNotFound",
                message: format!(
                    "Service {name} leads port {} to the container port named {target:?}, and no container of Deployment {} has one; name the port there, or give the Service a number",
                    port.port, canary.spec.target_ref.name
                ),
            });
        }
    }
    problems
}

/// Whether Kubernetes finds the Pods of a template by this Service's selector, once our key is out of it.
#[must_use]
pub fn selects(service: &Service, canary: &Canary, pod_template: &Value) -> bool {
    let external = service.spec.as_ref().and_then(|spec| spec.type_.as_deref()) == Some("ExternalName");
    // The key of another Canary stays.
    let is_ours = |key: &str| key == labels::FLEET && has_key(service, canary);
    let mut wanted = selector(service).into_iter().flatten().filter(|(key, _)| !is_ours(key)).peekable();
    let pod_labels = pod_labels(pod_template);
    let has = |key: &str, value: &str| pod_labels.get(key).and_then(Value::as_str) == Some(value);
    !external && wanted.peek().is_some() && wanted.all(|(key, value)| has(key, value))
}

/// Ports of a Service lead to a container port by a name that a revision has not. As with any Service, they lead nowhere then: the
/// fleet has no endpoint of that revision there.
#[derive(Debug, PartialEq, Eq)]
pub struct Unreached {
    /// Names the first of them.
    pub why: String,
    /// The one that the Canary names is among them, or, where the Service has no such port, all of them are.
    pub entirely: bool,
}

/// What a Service does not reach of a revision, if there is something.
#[must_use]
pub fn unreached(service: &Service, canary: &Canary, revision: &str, facts: &RevisionFacts) -> Option<Unreached> {
    let lost = |port: &ServicePort| port.target_port.as_ref().is_some_and(|target| facts.port(target).is_none());
    let tcp = |port: &&ServicePort| port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP");
    let ports: Vec<&ServicePort> =
        service.spec.iter().flat_map(|spec| spec.ports.iter().flatten()).filter(tcp).collect();
    let first = ports.iter().find(|port| lost(port))?;
    let Some(IntOrString::String(target)) = &first.target_port else { return None };
    let mut named = ports.iter().filter(|port| port.port == canary.spec.service.port).peekable();
    let entirely =
        if named.peek().is_some() { named.all(|port| lost(port)) } else { ports.iter().all(|port| lost(port)) };
    let why = format!(
        "Service {} leads port {} to the container port named {target:?}, which revision {revision} has not; lead it to a name or a number that it has",
        service.name_any(),
        first.port,
    );
    Some(Unreached { why, entirely })
}

/// A Service of `spec.service.additional` that is not there.
#[must_use]
pub fn missing(name: &str) -> Problem {
    Problem {
        reason: "ServiceMissing",
        message: format!("Service {name} (spec.service.additional) is not there; create it"),
    }
}

/// What goes wrong on purpose at present, so that nobody forgets it.
#[must_use]
pub fn injected(canary: &Canary) -> Option<Problem> {
    let fault = canary.spec.service.fault.as_ref()?;
    let message = format!("a fault is injected on purpose: {}. To end it, remove spec.service.fault", fault.in_words());
    Some(Problem { reason: "FaultInjected", message })
}

/// What the Canary asks for beyond what the installation gives to each Service.
#[must_use]
pub fn capped(canary: &Canary, limits: Limits) -> Vec<Problem> {
    let policy = canary.spec.service.traffic_policy.as_ref();
    let http = policy.and_then(|policy| policy.connection_pool.as_ref()?.http.as_ref());
    let (Some(http), Some(most)) = (http, limits.requests) else { return Vec::new() };
    let fields =
        [("http1MaxPendingRequests", http.http1_max_pending_requests), ("http2MaxRequests", http.http2_max_requests)];
    let beyond = |(field, said): (&str, Option<i32>)| {
        let said = said.and_then(|said| u32::try_from(said).ok()).filter(|said| *said > most)?;
        let message = format!(
            "spec.service.trafficPolicy.connectionPool.http.{field} is {said}, but {most} holds, which each Service may have (fleet.limits.requestsPerService of the chart). Say at most {most}, or have that raised"
        );
        Some(Problem { reason: "LimitCapped", message })
    };
    fields.into_iter().filter_map(beyond).collect()
}

/// That the fleet is not told of this Canary's routes, because a proxy would not take them, or they would take too much of all who
/// share it.
#[must_use]
pub fn unsendable(canary: &Canary, apex: Option<&Service>, additional: &[Arc<Service>]) -> Option<Problem> {
    let additional: Vec<&Service> = additional.iter().map(AsRef::as_ref).collect();
    let services = mesh::Services { apex, additional: &additional };
    // In the next release, and in the one under way, which has the matches that it began with.
    let next = canary.spec.analysis.as_ref().and_then(|analysis| analysis.matches.as_deref());
    let present = canary.status.as_ref().and_then(|status| status.traffic.as_ref()?.matches.as_deref());
    let found = |matches| mesh::unsendable(canary, &canary.spec.service, matches, services);
    let why = found(next).or_else(|| found(present))?;
    let key = CanaryKey::of(canary);
    let message = format!("Canary {key}: {why}. Meanwhile the fleet serves on with those before");
    Some(Problem { reason: UNSENDABLE, message })
}

/// What a person should know about a Service that is taken over.
#[must_use]
pub fn warnings(apex: &Service, canary: &Canary) -> Vec<Problem> {
    let name = apex.name_any();
    let mut warnings = Vec::new();
    let Some(spec) = &apex.spec else { return warnings };
    if spec.external_traffic_policy.as_deref() == Some("Local") {
        warnings.push(Problem {
            reason: "ExternalTrafficPolicyLocal",
            message: format!(
                "Service {name} has externalTrafficPolicy: Local: traffic from outside is dropped on nodes without a member of the fleet, and the client's address reaches the application in X-Forwarded-For only"
            ),
        });
    }
    if spec.publish_not_ready_addresses == Some(true) {
        warnings.push(Problem {
            reason: "PublishNotReadyAddresses",
            message: format!(
                "Service {name} has publishNotReadyAddresses: the fleet sends requests to ready Pods only"
            ),
        });
    }
    if name == canary.spec.service_name() {
        warnings.extend(mismatch(apex, canary));
    }
    warnings
}

/// What `spec.service` says of the port and the Service does not do. A Service that is there is never changed: that would hold at once, and
/// for the revision that serves as well.
fn mismatch(apex: &Service, canary: &Canary) -> Option<Problem> {
    let name = apex.name_any();
    let ports = || apex.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
    let wished = wished_port(canary);
    let why = match ports().find(|port| port.port == wished.port) {
        None => {
            let has: Vec<_> = ports().map(|port| port.port.to_string()).collect();
            format!(
                "Service {name} has no port {} (spec.service.port); it is there already, so it stays as it is, and all its ports are served: {}",
                wished.port,
                has.join(", ")
            )
        }
        // What was made as the Canary said then. One of somebody else's says for itself where it leads.
        Some(port) if revisions::owned(apex, canary) && as_written(port) != wished => format!(
            "port {} of Service {name}, which Sluice made, is not as spec.service says now (targetPort, portName or appProtocol); a change there is \
             not carried over, because it would hold at once for the revision that serves as well. Where that is right: kubectl edit service \
             {name} -n {}",
            wished.port,
            apex.namespace().unwrap_or_default()
        ),
        Some(_) => return None,
    };
    Some(Problem { reason: "PortMismatch", message: why })
}

/// Without what the API server has chosen.
fn as_written(port: &ServicePort) -> ServicePort {
    ServicePort { node_port: None, ..port.clone() }
}

/// Other Services whose selector matches the Pods of every revision: through them, clients reach the canary unsplit.
#[must_use]
pub fn bypasses<'a>(
    services: impl IntoIterator<Item = &'a Service>,
    canary: &Canary,
    pod_template: &Value,
) -> Vec<Problem> {
    let pod_labels = pod_labels(pod_template);
    services
        .into_iter()
        .filter(|service| {
            let name = service.name_any();
            canary.spec.service_names().all(|own| own != name) && !revisions::owned(*service, canary)
        })
        .filter(|service| {
            selector(service).is_some_and(|selector| {
                !selector.is_empty()
                    && selector.iter().all(|(key, value)| pod_labels.get(key).and_then(Value::as_str) == Some(value))
            })
        })
        .map(|service| Problem {
            reason: "OtherServices",
            message: format!(
                "Service {} selects Pods of the canary too: its clients get the new version by the number of Pods, not by the weight. \
                 Narrow its selector, have its clients use the Canary's Service, or delete this Canary and create it with that Service in \
                 spec.service.additional",
                service.name_any()
            ),
        })
        .collect()
}

/// The apex Service, where none exists.
#[must_use]
pub fn apex(canary: &Canary, target: &DynamicObject) -> Service {
    let pod_template = &target.data["spec"]["template"];
    let mut ports = vec![wished_port(canary)];
    if canary.spec.service.port_discovery {
        for (name, number) in template::named_ports(pod_template) {
            let port = i32::from(number);
            let reached = ports.iter().any(|known| {
                known.port == port
                    || known.name.as_ref() == Some(&name)
                    || known.target_port == Some(IntOrString::Int(port))
                    || known.target_port == Some(IntOrString::String(name.clone()))
            });
            if !reached {
                ports.push(ServicePort {
                    name: Some(name.clone()),
                    port,
                    target_port: Some(IntOrString::String(name)),
                    protocol: Some("TCP".into()),
                    ..ServicePort::default()
                });
            }
        }
    }
    let mut selector: BTreeMap<String, String> =
        serde_json::from_value(target.data["spec"]["selector"]["matchLabels"].clone()).unwrap_or_default();
    selector.insert(labels::FLEET.into(), canary.name_any());
    let mut labels = revisions::kept_labels(target.labels());
    labels.insert(labels::CANARY.into(), canary.name_any());
    Service {
        metadata: metadata(canary, canary.spec.service_name().to_owned(), labels),
        spec: Some(ServiceSpec { ports: Some(ports), selector: Some(selector), ..ServiceSpec::default() }),
        status: None,
    }
}

/// The port of the apex that the Canary describes.
fn wished_port(canary: &Canary) -> ServicePort {
    let wish = &canary.spec.service;
    ServicePort {
        name: Some(wish.port_name.clone()),
        port: wish.port,
        target_port: Some(match &wish.target_port {
            Some(PortRef::Number(number)) => IntOrString::Int(*number),
            Some(PortRef::Name(name)) => IntOrString::String(name.clone()),
            None => IntOrString::Int(wish.port),
        }),
        app_protocol: wish.app_protocol.clone(),
        protocol: Some("TCP".into()),
        node_port: None,
    }
}

/// A companion of the apex as it is now.
#[must_use]
pub fn companion(canary: &Canary, apex: &Service, role: Role) -> Service {
    let spec = apex.spec.clone().unwrap_or_default();
    let ours = (labels::CANARY.to_owned(), canary.name_any());
    let fleet = matches!(role, Role::Primary | Role::Canary);
    let ports = spec.ports.into_iter().flatten().map(|port| ServicePort {
        // Without Pods behind it, a target port means nothing: the slices name the fleet's.
        target_port: if fleet { Some(IntOrString::Int(port.port)) } else { port.target_port },
        protocol: Some("TCP".into()),
        node_port: None,
        ..port
    });
    let labels = if fleet {
        // Not the application's labels: monitors would scrape the fleet as if it were the application.
        BTreeMap::from([ours.clone()])
    } else {
        let kept = apex.labels().iter().filter(|(key, _)| {
            !TRACKING_LABELS.contains(&key.as_str()) && !TRACKING_PREFIXES.iter().any(|prefix| key.starts_with(prefix))
        });
        kept.map(|(key, value)| (key.clone(), value.clone())).chain([ours.clone()]).collect()
    };
    Service {
        metadata: metadata(canary, role.name(&apex.name_any()), labels),
        spec: Some(ServiceSpec {
            cluster_ip: (!fleet).then(|| "None".to_owned()),
            ip_families: spec.ip_families,
            ip_family_policy: spec.ip_family_policy,
            ports: Some(ports.collect()),
            selector: (!fleet).then(|| BTreeMap::from([ours])),
            ..ServiceSpec::default()
        }),
        status: None,
    }
}

/// Whether a companion is as it should be, so that nothing is written.
#[must_use]
pub fn is_current(live: &Service, wanted: &Service) -> bool {
    let (Some(live_spec), Some(wanted_spec)) = (&live.spec, &wanted.spec) else { return false };
    let ports = |spec: &ServiceSpec| -> Vec<ServicePort> { spec.ports.iter().flatten().map(as_written).collect() };
    let selector = |spec: &ServiceSpec| spec.selector.clone().unwrap_or_default();
    let owned = |owner: &OwnerReference| live.owner_references().iter().any(|live| live.uid == owner.uid);
    wanted.labels().iter().all(|(key, value)| live.labels().get(key) == Some(value))
        && wanted.owner_references().iter().all(owned)
        && ports(live_spec) == ports(wanted_spec)
        && selector(live_spec) == selector(wanted_spec)
}

fn metadata(canary: &Canary, name: String, labels: BTreeMap<String, String>) -> ObjectMeta {
    ObjectMeta {
        name: Some(name),
        namespace: canary.namespace(),
        labels: Some(labels),
        owner_references: Some(vec![revisions::canary_owner(canary)]),
        ..ObjectMeta::default()
    }
}

fn selector(service: &Service) -> Option<&BTreeMap<String, String>> {
    service.spec.as_ref()?.selector.as_ref()
}

fn pod_labels(pod_template: &Value) -> &serde_json::Map<String, Value> {
    static NONE: std::sync::LazyLock<serde_json::Map<String, Value>> = std::sync::LazyLock::new(serde_json::Map::new);
    pod_template.pointer("/metadata/labels").and_then(Value::as_object).unwrap_or(&NONE)
}

#[cfg(test)]
mod tests;
