//! What is there just now: from the cache to the machine's [`Observation`]. Reads memory only.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::api::{
    apps::v1::ControllerRevision,
    core::v1::{ContainerState, ContainerStatus, Pod, Service},
    discovery::v1::EndpointSlice,
};
use kube::{Resource, ResourceExt, api::DynamicObject, runtime::reflector::ObjectRef};
use serde_json::Value;
use sluice_crds::{Canary, TemplateStatus, labels};

use super::{
    autoscaler::{self, Scaling},
    config::{ConfigRef, Kind, Tracked},
    machine::{self, Observation, Problem, TARGET_PAUSED},
    revisions,
    services::{self, Role, Unreached},
    template,
};
use crate::{
    analysis::Report,
    cache::{Cache, CanaryKey, DEPLOYMENT_LIMIT, deployment_resource},
    guard::Breach,
    mesh::{Limits, RevisionFacts},
};

/// Stands for the revision of a template that is too large to be kept. No hash has vowels, so it is that of no revision: nothing can be
/// made or released of it, and what serves is another one.
const TOO_LARGE: &str = "too-large";

/// The observation, and the objects that it was made from: actions are carried out on exactly these.
#[derive(Debug, Default)]
pub struct Observed {
    pub observation: Observation,
    /// The target Deployment.
    pub target: Option<Arc<DynamicObject>>,
    pub apex: Option<Arc<Service>>,
    /// The further Services that are there.
    pub additional: Vec<Arc<Service>>,
    /// Our companions that are there, by name.
    pub companions: BTreeMap<String, Arc<Service>>,
    /// Our EndpointSlices, of these Services and the companions.
    pub slices: Vec<Arc<EndpointSlice>>,
    pub records: BTreeMap<String, Arc<ControllerRevision>>,
    pub deployments: BTreeMap<String, Arc<DynamicObject>>,
    pub tracked: Tracked,
    pub scaling: Scaling,
}

/// What other rooms know.
#[derive(Debug, Default)]
pub struct Reports {
    pub fleet: machine::Fleet,
    pub report: Option<Report>,
    pub breach: Option<Breach>,
    /// What is known to forbid going on and is not in the cache.
    pub problems: Vec<Problem>,
    /// What the installation gives to each Service.
    pub limits: Limits,
}

/// The target Deployment of a Canary.
#[must_use]
pub fn target(cache: &Cache, canary: &Canary) -> Option<Arc<DynamicObject>> {
    deployment(cache, canary, &canary.spec.target_ref.name)
}

/// Everything that the machine should know.
#[must_use]
pub fn observe(cache: &Cache, canary: &Canary, tracked: Tracked, reports: Reports) -> Observed {
    let key = CanaryKey::of(canary);
    let target = target(cache, canary);
    let pod_template = target.as_deref().and_then(pod_template);
    let apex_name = canary.spec.service_name();
    let service = |name: &str| cache.services.get(&ObjectRef::new(name).within(&key.namespace));
    let apex = service(apex_name);
    let additional: Vec<Arc<Service>> = canary.spec.additional_services().filter_map(service).collect();
    let pods = cache
        .pods
        .state_filter(|pod| pod.metadata.namespace.as_deref() == Some(key.namespace.as_str()) && !is_gone(pod));
    let members = &reports.fleet.names;
    let fleet =
        cache.pods.state_filter(|pod| pod.labels().contains_key(labels::FLEET) && members.contains(&pod.name_any()));
    let slices = cache.slices.state_filter(|slice| slice.metadata.namespace.as_deref() == Some(key.namespace.as_str()));

    let mut problems = reports.problems;
    problems.extend(services::without_port(&reports.fleet.without_port));
    // First, so that the condition has its reason.
    let mut warnings: Vec<Problem> = services::injected(canary).into_iter().collect();
    warnings.extend(services::capped(canary, reports.limits));
    problems.extend(conflict(canary, &cache.canaries_in(Some(&key.namespace))));

    let template = target.as_ref().map(|target| {
        let known = canary.status.as_ref().and_then(|status| status.template.as_ref());
        let template = template_of(cache, target, pod_template, &tracked, known, &pods);
        problems.extend(template_problems(target, pod_template, &tracked));
        let Some(pod_template) = pod_template else { return template };
        problems.extend(taken_names(cache, canary, &template.revision, &tracked));
        let all = cache
            .services
            .state_filter(|service| service.metadata.namespace.as_deref() == Some(key.namespace.as_str()));
        warnings.extend(services::bypasses(all.iter().map(AsRef::as_ref), canary, pod_template));
        template
    });

    problems.extend(services::unsendable(canary, apex.as_deref(), &additional));
    for service in apex.iter().chain(&additional) {
        problems.extend(services::refusals(service, canary, pod_template));
        warnings.extend(services::warnings(service, canary));
        problems.extend(services::without_fleet(service, fleet.iter().map(AsRef::as_ref)));
    }
    let there = |name: &&str| additional.iter().any(|service| service.name_any() == **name);
    let missing = canary.spec.additional_services().filter(|name| !there(name)).map(services::missing);
    // Before the takeover it is waited for. Later it is its owner's affair.
    match canary.status.as_ref().is_some_and(|status| status.service.is_some()) {
        false => problems.extend(missing),
        true => warnings.extend(missing),
    }
    let mut companions = BTreeMap::new();
    for name in Role::ALL.map(|role| role.name(apex_name)) {
        match service(&name) {
            Some(companion) if revisions::ours_by_label(&*companion, canary) => {
                companions.insert(name, companion);
            }
            Some(_) => problems.push(taken("Service", &name)),
            None => {}
        }
    }

    let records: BTreeMap<String, Arc<ControllerRevision>> = cache
        .revisions
        .state_filter(|record| {
            record.metadata.namespace.as_deref() == Some(key.namespace.as_str())
                && record.metadata.deletion_timestamp.is_none()
                && record.labels().get(labels::CANARY) == Some(&key.name)
        })
        .into_iter()
        .filter_map(|record| Some((record.labels().get(labels::REVISION)?.clone(), record)))
        .collect();
    let traffic = canary.status.as_ref().and_then(|status| status.traffic.as_ref());
    let mut deployments = BTreeMap::new();
    let mut revisions = BTreeMap::new();
    for (revision, record) in &records {
        let own = apex.iter().chain(&additional).map(AsRef::as_ref);
        let unreached = unreached(own, canary, revision, record);
        let has_traffic = traffic.is_some_and(|traffic| machine::mentions(traffic, revision));
        if has_traffic {
            let warn = |unreached: &Unreached| Problem { reason: "PortNotFound", message: unreached.why.clone() };
            warnings.extend(unreached.iter().map(warn));
        }
        let found = deployment(cache, canary, &record.name_any());
        let ours = |found: &Arc<DynamicObject>| revisions::ours(&**found, canary, revision);
        if found.as_ref().is_some_and(|found| !ours(found)) && has_traffic {
            let problem = taken("Deployment", &record.name_any());
            if !problems.contains(&problem) {
                problems.push(problem);
            }
        }
        let deployment = found.filter(|found| ours(found) && found.metadata.deletion_timestamp.is_none());
        let seen = revision_of(canary, revision, record, deployment.as_deref(), &unreached, &pods);
        revisions.insert(revision.clone(), seen);
        if let Some(deployment) = deployment {
            deployments.insert(revision.clone(), deployment);
        }
    }

    let mut scaling = autoscaler::scaling(cache, canary);
    problems.append(&mut scaling.problems.clone());
    warnings.append(&mut scaling.warnings);

    let current = apex.as_ref().is_some_and(|apex| {
        services::owners_without_us(apex, canary).is_none()
            && Role::ALL
                .map(|role| services::companion(canary, apex, role))
                .iter()
                .all(|wanted| companions.get(&wanted.name_any()).is_some_and(|live| services::is_current(live, wanted)))
    });
    let observation = Observation {
        deleting: canary.metadata.deletion_timestamp.is_some(),
        uninstalling_until: cache.uninstalling_until(),
        finalizer: canary.finalizers().iter().any(|finalizer| finalizer == labels::FINALIZER),
        namespace_terminating: cache.is_terminating(&key.namespace),
        template,
        service: service_of(canary, apex.as_deref(), &additional, current, pod_template, &slices),
        revisions,
        fleet: reports.fleet,
        report: reports.report,
        breach: reports.breach,
        // Asked for once it is known which release would start.
        dry_run: None,
        dry_run_waits_for: None,
        leading_since: None,
        problems,
        warnings,
        autoscaler: scaling.seen(),
        action: canary.annotations().get(labels::ACTION).cloned(),
    };
    let own = |slice: &EndpointSlice| {
        is_ours(slice)
            && service_name(slice).is_some_and(|name| {
                canary.spec.service_names().any(|own| own == name)
                    || Role::ALL.iter().any(|role| role.name(apex_name) == name)
            })
    };
    let slices = slices.into_iter().filter(|slice| own(slice)).collect();
    Observed { observation, target, apex, additional, companions, slices, records, deployments, tracked, scaling }
}

fn deployment(cache: &Cache, canary: &Canary, name: &str) -> Option<Arc<DynamicObject>> {
    cache
        .deployments
        .get(&ObjectRef::new_with(name, deployment_resource()).within(canary.metadata.namespace.as_deref()?))
}

/// `None` where the Deployment is too large for the cache: nothing may be read out of what is not kept.
fn pod_template(target: &DynamicObject) -> Option<&Value> {
    target.data.pointer("/spec/template")
}

fn revision(pod_template: Option<&Value>, configs: &BTreeMap<String, String>) -> String {
    pod_template.map_or_else(|| TOO_LARGE.to_owned(), |template| template::revision_hash(template, configs))
}

fn template_of(
    cache: &Cache,
    target: &DynamicObject,
    pod_template: Option<&Value>,
    tracked: &Tracked,
    known: Option<&TemplateStatus>,
    pods: &[Arc<Pod>],
) -> machine::Template {
    let name = target.name_any();
    let own = pods.iter().filter(|pod| {
        // The target's selector matches the Pods of revisions too: only ownership tells them apart.
        !pod.labels().contains_key(labels::REVISION) && cache.deployment_of(pod).as_ref() == Some(&name)
    });
    let unread = tracked.unread.is_some();
    let (revision, configs) = if unread {
        known.map(|known| (known.revision.clone(), known.tracked_configs.clone())).unwrap_or_default()
    } else {
        let configs = tracked.status();
        (revision(pod_template, &configs), configs)
    };
    machine::Template {
        uid: target.uid().unwrap_or_default(),
        generation: target.metadata.generation.unwrap_or_default(),
        revision,
        unread,
        tracked_configs: configs,
        replicas: desired_replicas(target),
        wish: target.annotations().get(labels::REPLICAS).and_then(|wish| wish.parse().ok()),
        marked: target.labels().contains_key(labels::CANARY) || target.annotations().contains_key(labels::REPLICAS),
        ready: count(own.clone().filter(|pod| is_ready(pod))),
        pods: count(own),
    }
}

fn template_problems(target: &DynamicObject, pod_template: Option<&Value>, tracked: &Tracked) -> Vec<Problem> {
    let name = target.name_any();
    let mut problems = Vec::new();
    let refused = match pod_template.map(template::check) {
        Some(Ok(())) => None,
        Some(Err(refused)) => Some(format!("Deployment {name} cannot run behind the fleet: {refused}")),
        None => Some(format!(
            "the pod template of Deployment {name} is too large to be released: the Deployment takes more than {} KiB of the controllers' memory; move long args and many environment variables into a ConfigMap or the image",
            DEPLOYMENT_LIMIT / 1024
        )),
    };
    problems.extend(refused.map(|message| Problem { reason: "TemplateUnsupported", message }));
    if target.data.pointer("/spec/strategy/type").and_then(Value::as_str) == Some("Recreate") {
        problems.push(Problem {
            reason: "TemplateUnsupported",
            message: format!(
                "Deployment {name} has the strategy Recreate: no two versions of it may run at once, which they do in the takeover and in every release. If they may after all, set spec.strategy.type to RollingUpdate"
            ),
        });
    }
    for missing in tracked.missing.keys() {
        problems.push(Problem {
            reason: "ConfigMissing",
            message: format!(
                "{missing}, which the pod template of Deployment {name} uses, is not there; create it, or mark the reference as optional"
            ),
        });
    }
    if target.data.pointer("/spec/paused") == Some(&Value::Bool(true)) {
        let namespace = target.namespace().unwrap_or_default();
        problems.push(Problem {
            reason: TARGET_PAUSED,
            message: format!(
                "Deployment {name} is paused (spec.paused), so its changes are not released; to go on: kubectl rollout resume deployment/{name} -n {namespace}"
            ),
        });
    }
    problems
}

/// Names of a revision's objects that somebody else has. (A record that is not labelled as ours is not in the cache: creating
/// it tells.)
fn taken_names(cache: &Cache, canary: &Canary, revision: &str, tracked: &Tracked) -> Vec<Problem> {
    let namespace = canary.metadata.namespace.as_deref().unwrap_or_default();
    let mut problems = Vec::new();
    let name = revisions::name(&canary.spec.target_ref.name, revision);
    if deployment(cache, canary, &name).is_some_and(|found| !revisions::ours(&*found, canary, revision)) {
        problems.push(taken("Deployment", &name));
    }
    for (ConfigRef { kind, .. }, name) in tracked.pins(revision) {
        let foreign = match kind {
            Kind::ConfigMap => cache
                .config_maps
                .get(&ObjectRef::new(&name).within(namespace))
                .is_some_and(|found| !revisions::ours(&*found, canary, revision)),
            Kind::Secret => cache
                .secrets
                .as_ref()
                .and_then(|secrets| secrets.get(&ObjectRef::new(&name).within(namespace)))
                .is_some_and(|found| !revisions::ours(&*found, canary, revision)),
        };
        if foreign {
            problems.push(taken(&kind.to_string(), &name));
        }
    }
    problems
}

/// A name that something else has.
#[must_use]
pub fn taken(kind: &str, name: &str) -> Problem {
    Problem {
        reason: "NameTaken",
        message: format!("{kind} {name} exists and is not this Canary's; it is left alone. Rename or delete it"),
    }
}

/// Two Canaries on one target or Service would undo each other's work: the one that has taken it over keeps it; of two that
/// have not, the younger one waits.
fn conflict(canary: &Canary, all: &[Arc<Canary>]) -> Option<Problem> {
    let rank = |canary: &Canary| {
        let begun = canary.status.as_ref().is_some_and(|status| status.service.is_some());
        (!begun, canary.metadata.creation_timestamp.clone(), canary.name_any())
    };
    let first = |other: &&Arc<Canary>| other.metadata.uid != canary.metadata.uid && rank(other) < rank(canary);
    all.iter().filter(first).find_map(|other| {
        let what = if other.spec.target_ref.name == canary.spec.target_ref.name {
            format!("Deployment {}", canary.spec.target_ref.name)
        } else {
            let shared = |name: &&str| other.spec.service_names().any(|service| service == *name);
            format!("Service {}", canary.spec.service_names().find(shared)?)
        };
        Some(Problem {
            reason: "TargetConflict",
            message: format!("{what} belongs to Canary {}, which was first; delete one of the two", other.name_any()),
        })
    })
}

fn service_of(
    canary: &Canary,
    apex: Option<&Service>,
    additional: &[Arc<Service>],
    companions: bool,
    pod_template: Option<&Value>,
    slices: &[Arc<EndpointSlice>],
) -> machine::Service {
    let mut seen = machine::Service {
        exists: apex.is_some(),
        any_exists: apex.is_some() || !additional.is_empty(),
        companions,
        key: true,
        slices: true,
        ..machine::Service::default()
    };
    for service in apex.into_iter().chain(additional.iter().map(AsRef::as_ref)) {
        let name = service.name_any();
        let of_it = slices.iter().map(AsRef::as_ref).filter(|slice| service_name(slice) == Some(name.as_str()));
        let (ours, native): (Vec<_>, Vec<_>) = of_it.partition(|slice| is_ours(slice));
        let native = native.iter().flat_map(|slice| &slice.endpoints);
        let native =
            count(native.filter(|endpoint| {
                endpoint.conditions.as_ref().and_then(|conditions| conditions.ready) != Some(false)
            }));
        let key = services::has_key(service, canary);
        let matched = pod_template.is_none_or(|template| services::selects(service, canary, template));
        seen.key &= key;
        seen.any_key |= key;
        seen.slices &= carries_every_port(service, &ours);
        seen.native_endpoints += native;
        seen.no_native_endpoint |= matched && native == 0;
        seen.unmatched |= !matched;
    }
    seen.key &= seen.exists;
    seen.slices &= seen.exists;
    seen
}

/// A port of the Service that is missing in the slices is rejected by kube-proxy: all or nothing.
fn carries_every_port(apex: &Service, slices: &[&EndpointSlice]) -> bool {
    let uid = apex.metadata.uid.as_deref();
    let mut ports = apex.spec.iter().flat_map(|spec| spec.ports.iter().flatten()).peekable();
    ports.peek().is_some()
        && ports.all(|port| {
            let name = port.name.as_deref().unwrap_or_default();
            slices.iter().any(|slice| {
                // Of this very Service, not of one of the same name that was there before.
                slice.owner_references().iter().all(|owner| Some(owner.uid.as_str()) == uid)
                    && slice.ports.iter().flatten().any(|port| port.name.as_deref().unwrap_or_default() == name)
                    && slice.endpoints.iter().any(|endpoint| {
                        endpoint.conditions.as_ref().and_then(|conditions| conditions.ready) != Some(false)
                    })
            })
        })
}

fn is_ours(slice: &EndpointSlice) -> bool {
    slice.labels().get("endpointslice.kubernetes.io/managed-by").is_some_and(|by| by == labels::MANAGED_BY)
}

fn service_name(slice: &EndpointSlice) -> Option<&str> {
    slice.labels().get("kubernetes.io/service-name").map(String::as_str)
}

/// What Services of the Canary do not reach of a revision.
fn unreached<'a>(
    services: impl Iterator<Item = &'a Service>,
    canary: &Canary,
    revision: &str,
    record: &ControllerRevision,
) -> Vec<Unreached> {
    // As the fleet is told.
    let Some(template) = record.data.as_ref().and_then(|data| data.0.get("template")) else { return Vec::new() };
    let facts = RevisionFacts::of_template(template);
    services.filter_map(|service| services::unreached(service, canary, revision, &facts)).collect()
}

fn revision_of(
    canary: &Canary,
    revision: &str,
    record: &ControllerRevision,
    deployment: Option<&DynamicObject>,
    unreached: &[Unreached],
    pods: &[Arc<Pod>],
) -> machine::Revision {
    let unreached = unreached.iter().find(|unreached| unreached.entirely);
    let name = canary.name_any();
    let own = pods.iter().filter(|pod| {
        pod.labels().get(labels::CANARY) == Some(&name)
            && pod.labels().get(labels::REVISION).map(String::as_str) == Some(revision)
    });
    let desired = deployment.map(desired_replicas);
    let reported = deployment
        .and_then(|deployment| deployment.data.pointer("/status/availableReplicas")?.as_u64())
        .map_or(0, |replicas| u32::try_from(replicas).unwrap_or(u32::MAX));
    machine::Revision {
        promoted: record.annotations().contains_key(labels::PROMOTED),
        number: record.revision,
        desired,
        ready: if unreached.is_some() { 0 } else { count(own.clone().filter(|pod| is_ready(pod))) },
        // Only replicas ever change, so an older status is right as far as it goes, but for what was scaled away since.
        available: reported.min(desired.unwrap_or(0)),
        disowned: deployment
            .is_some_and(|deployment| !revisions::has_owners(deployment, &revisions::owners(canary, record))),
        trouble: unreached
            .map(|unreached| unreached.why.clone())
            .or_else(|| own.filter(|pod| !is_ready(pod)).find_map(|pod| pod_trouble(pod)))
            .or_else(|| deployment.and_then(quota_trouble)),
    }
}

fn desired_replicas(deployment: &DynamicObject) -> u32 {
    // The API server sets it; absent means 1.
    let replicas = deployment.data.pointer("/spec/replicas").and_then(Value::as_u64).unwrap_or(1);
    u32::try_from(replicas).unwrap_or(u32::MAX)
}

fn count<T>(items: impl Iterator<Item = T>) -> u32 {
    u32::try_from(items.count()).unwrap_or(u32::MAX)
}

fn is_gone(pod: &Pod) -> bool {
    pod.status
        .as_ref()
        .and_then(|status| status.phase.as_deref())
        .is_some_and(|phase| phase == "Succeeded" || phase == "Failed")
}

/// Ready, not on its way out, and with an address.
fn is_ready(pod: &Pod) -> bool {
    pod.meta().deletion_timestamp.is_none()
        && pod.status.as_ref().is_some_and(|status| {
            status.pod_ip.is_some()
                && status
                    .conditions
                    .iter()
                    .flatten()
                    .any(|condition| condition.type_ == "Ready" && condition.status == "True")
        })
}

/// Why a Pod does not come up, in the kubelet's and the scheduler's own words.
fn pod_trouble(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref()?;
    let name = pod.name_any();
    let unschedulable = status.conditions.iter().flatten().find(|condition| {
        condition.type_ == "PodScheduled"
            && condition.status == "False"
            && condition.reason.as_deref() == Some("Unschedulable")
    });
    if let Some(condition) = unschedulable {
        return Some(format!(
            "Pod {name} cannot be scheduled: {}",
            condition.message.as_deref().unwrap_or("no reason given")
        ));
    }
    let containers = status.init_container_statuses.iter().flatten().chain(status.container_statuses.iter().flatten());
    containers.into_iter().find_map(container_trouble).map(|trouble| format!("Pod {name}: {trouble}"))
}

fn container_trouble(container: &ContainerStatus) -> Option<String> {
    let name = &container.name;
    let waiting = container.state.as_ref().and_then(|state| state.waiting.as_ref());
    match waiting.and_then(|waiting| waiting.reason.as_deref()) {
        // The ordinary way up, and the pauses between two attempts.
        None | Some("ContainerCreating" | "PodInitializing" | "CrashLoopBackOff") => crashes(container),
        Some(reason) => {
            let message = waiting.and_then(|waiting| waiting.message.as_deref()).unwrap_or("no message");
            Some(format!("container {name} does not start ({reason}): {message}"))
        }
    }
}

/// That a container ended and is to be started again, whether it waits for that, runs for a moment or has just ended.
fn crashes(container: &ContainerStatus) -> Option<String> {
    let ended = |state: &Option<ContainerState>| state.as_ref().and_then(|state| state.terminated.clone());
    let last = ended(&container.state).or_else(|| ended(&container.last_state))?;
    // An init container that did its work is ready.
    if container.ready {
        return None;
    }
    let waiting = container.state.as_ref().and_then(|state| state.waiting.as_ref());
    let back_off = waiting.and_then(|waiting| waiting.reason.as_deref()).map(|reason| format!("{reason}, "));
    let said = last.message.as_deref().map(str::trim).filter(|said| !said.is_empty());
    Some(format!(
        "container {} crashes ({}restarts: {}); it ended with exit code {} ({}){}",
        container.name,
        back_off.unwrap_or_default(),
        container.restart_count,
        last.exit_code,
        last.reason.as_deref().unwrap_or("no reason"),
        said.map_or_else(String::new, |said| format!(", saying {said:?}")),
    ))
}

/// The API server refuses Pods of the Deployment: quota, admission, a missing service account.
fn quota_trouble(deployment: &DynamicObject) -> Option<String> {
    let conditions = deployment.data.pointer("/status/conditions")?.as_array()?;
    let failure =
        conditions.iter().find(|condition| condition["type"] == "ReplicaFailure" && condition["status"] == "True")?;
    let message = failure["message"].as_str().unwrap_or("no message");
    Some(format!("Deployment {} cannot create Pods: {message}", deployment.name_any()))
}

#[cfg(test)]
mod tests;
