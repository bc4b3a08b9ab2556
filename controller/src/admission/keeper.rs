//! Writes the policies or the webhook's configuration, repairs them when somebody edits or removes them, and removes what is
//! not wanted any more. Where the webhook protects, it looks whether the API server reaches it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    future::Future,
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt as _, stream, stream::BoxStream};
use k8s_openapi::api::{
    authentication::v1::SelfSubjectReview,
    core::v1::{Service, ServiceSpec},
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{ApiResource, DeleteParams, DynamicObject, ObjectMeta, PostParams, Preconditions},
    core::GroupVersionKind,
    runtime::{WatchStreamExt as _, watcher},
};
use serde_json::Value;
use sluice_crds::labels;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout},
};

use super::{
    Effective, Pace, Protection,
    decision::{ANSWERED, CHECK},
    objects::{self, Address, GROUP, Kind, MANAGED_BY, STABLE, Scope},
    reach::Reach,
};
use crate::delivery::actions::LeaseGuard;

/// Longer than the 2 s that the API server waits for the webhook.
const CALL: Duration = Duration::from_secs(10);
const FIRST_RETRY: Duration = Duration::from_secs(2);
const LAST_RETRY: Duration = Duration::from_secs(60);
/// What the API server serves changes only when it is upgraded, and that it does not tell.
const DISCOVER_AGAIN: Duration = Duration::from_secs(3600);

const INCOMPLETE: &str =
    "the protection of Services and Deployments is not complete, and what is taken away is only repaired";

const UNCHECKED: &str =
    "Except it from the policy or the quota that refuses it; until then nothing tells whether the webhook is reached";

/// Where the keeper says how things are.
pub trait Report: Send + Sync {
    /// `incomplete`: what protects is less than was asked for, could not be written, or is not reached by the API server. `None`
    /// while somebody else leads.
    fn protection(&self, state: Option<(Effective, /* incomplete: */ bool)>);
}

/// Keeps the objects of [`super::objects`].
#[derive(Clone)]
pub struct Keeper {
    pub client: Client,
    pub protection: Protection,
    pub address: Address,
    /// Roots that the webhook's certificate may end in, PEM.
    pub ca: watch::Receiver<Arc<str>>,
    /// Only Canaries of this namespace; all where absent.
    pub namespace: Option<String>,
    /// In which it is checked whether the API server reaches the webhook: one that we watch, with the right to create Services.
    pub release_namespace: String,
    /// The webhook's on the controllers' Pods, to be told where it is not reached.
    pub webhook_port: u16,
    pub pace: Pace,
    pub lease: Arc<dyn LeaseGuard>,
    pub report: Arc<dyn Report>,
}

/// Something that was tried and did not come about.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("{doing}: {source}. {hint}")]
    Api { doing: String, source: Box<kube::Error>, hint: &'static str },
    #[error("watching {kind}: {source}. {hint}")]
    Watch { kind: &'static str, source: Box<watcher::Error>, hint: &'static str },
    #[error("{doing}: no answer within {CALL:?}")]
    Deadline { doing: String },
    #[error("{doing}: not tried, because this replica no longer leads")]
    NotLeading { doing: String },
    #[error(
        "the API server does not reach the webhook ({why}). Until it does, writes to taken-over Services and to Deployments at rest \
         are refused, or only repaired. Let it reach port {port} of the controllers' Pods (a firewall rule, a security group, a \
         NetworkPolicy), or set the protection to none; docs/troubleshooting.md"
    )]
    Unreached { why: String, port: u16 },
}

impl Error {
    fn watch(kind: Kind, source: watcher::Error) -> Self {
        let hint = hint(cause(&source));
        Self::Watch { kind: kind.plural, source: Box::new(source), hint }
    }

    fn is_forbidden(&self) -> bool {
        match self {
            Self::Api { source, .. } => is(source, kube::core::Status::is_forbidden),
            Self::Watch { source, .. } => {
                cause(source).is_some_and(|error| is(error, kube::core::Status::is_forbidden))
            }
            Self::Deadline { .. } | Self::NotLeading { .. } | Self::Unreached { .. } => false,
        }
    }

    /// The API server has answered, and refused.
    fn is_status(&self) -> bool {
        matches!(self, Self::Api { source, .. } if is(source, |_| true))
    }

    /// The words of an API server that should ask our webhook and cannot (`failurePolicy: Fail`). Another's may fail as well.
    fn failed_call(&self) -> Option<String> {
        let Self::Api { source, .. } = self else { return None };
        let kube::Error::Api(status) = &**source else { return None };
        let ours = format!("failed calling webhook \"{}\"", objects::webhook_name("services"));
        status.message.contains(&ours).then(|| status.message.clone())
    }
}

/// What an API server offers.
struct Served {
    /// Version of `MutatingAdmissionPolicy`, the newer one if there are two.
    policies: Option<&'static str>,
    own_user: String,
}

/// One of our objects, by kind and name.
type Id = (Kind, String);

/// What is stored, as the watches say, without other people's.
#[derive(Default)]
struct Found(BTreeMap<Id, DynamicObject>);

impl Keeper {
    /// While `terms` says that this replica leads. Ends when nobody will say so any more.
    pub async fn keep(self, mut terms: watch::Receiver<Option<u64>>) {
        loop {
            let Ok(term) = terms.wait_for(Option::is_some).await.map(|term| *term) else { return };
            let mut changed = terms.clone();
            tokio::select! {
                // An error is an end as well.
                _ = changed.wait_for(|now| *now != term) => {}
                () = self.term() => {}
            }
            self.report.protection(None);
        }
    }

    /// One term. Never ends by itself.
    async fn term(&self) {
        let mut retry = FIRST_RETRY;
        let mut said = None;
        let mut reach = Reach::default();
        loop {
            let Err(error) = self.begin(&mut said, &mut reach, &mut retry).await else { continue };
            if self.protection == Protection::None && error.is_forbidden() {
                // Nothing is wanted, and nothing of ours can be there that we had no right to write.
                self.report.protection(Some((Effective::Repair, false)));
                tokio::time::sleep(DISCOVER_AGAIN).await;
                continue;
            }
            tracing::error!("{INCOMPLETE}: {error}; tried again in {retry:?}");
            self.report.protection(Some((said.clone().unwrap_or(Effective::Repair), true)));
            tokio::time::sleep(retry).await;
            retry = (retry * 2).min(LAST_RETRY);
        }
    }

    /// Finds out what the API server serves, and holds what follows from it until that should be found out again.
    async fn begin(&self, said: &mut Option<Effective>, reach: &mut Reach, retry: &mut Duration) -> Result<(), Error> {
        let served = self.served().await?;
        let (effective, why) = choose(self.protection, served.policies);
        if said.as_ref() != Some(&effective) {
            tell(self.protection, &effective, &why);
            *said = Some(effective.clone());
            *reach = Reach::default();
        }
        self.hold(&served, &effective, Instant::now() + DISCOVER_AGAIN, reach, retry).await
    }

    async fn served(&self) -> Result<Served, Error> {
        let doing = "asking the API server what it serves".to_owned();
        let groups = call(&doing, self.client.list_api_groups()).await?;
        let group = groups.groups.iter().find(|group| group.name == GROUP);
        let mut policies = None;
        for version in ["v1", "v1beta1"] {
            if !group.is_some_and(|group| group.versions.iter().any(|served| served.version == version)) {
                continue;
            }
            let resources = call(&doing, self.client.list_api_group_resources(&format!("{GROUP}/{version}"))).await?;
            if resources.resources.iter().any(|resource| resource.kind == objects::MUTATING_POLICY.kind) {
                policies = Some(version);
                break;
            }
        }
        let reviews: Api<SelfSubjectReview> = Api::all(self.client.clone());
        let who = "asking the API server who we are";
        let review = call(who, reviews.create(&PostParams::default(), &SelfSubjectReview::default())).await?;
        let own_user = review.status.and_then(|status| status.user_info?.username).unwrap_or_default();
        Ok(Served { policies, own_user })
    }

    /// Holds this state until `again`. `retry` goes back to the shortest when all is as it should be.
    async fn hold(
        &self,
        served: &Served,
        effective: &Effective,
        again: Instant,
        reach: &mut Reach,
        retry: &mut Duration,
    ) -> Result<(), Error> {
        let scope = Scope { own_user: served.own_user.clone(), namespace: self.namespace.clone() };
        let refuse = self.protection != Protection::None;
        let mut roots = self.ca.clone();
        let ca = roots.borrow_and_update().clone();
        let wanted: BTreeMap<Id, Value> = objects::wanted(effective, refuse, &scope, &self.address, &ca)
            .into_iter()
            .map(|(kind, object)| ((kind, name_of(&object)), object))
            .collect();
        let kinds = kinds(served.policies);
        let mut events = self.watch(&kinds);
        let mut unlisted: BTreeSet<Kind> = kinds.iter().map(|(kind, _)| *kind).collect();
        let mut found = Found::default();
        // As the API server stored what we wrote: a newer one may add defaults, and platforms add selectors of their own.
        let mut stored: BTreeMap<Id, Value> = BTreeMap::new();
        let less_than_asked = self.protection == Protection::Policy && *effective == Effective::Repair;
        let say = |incomplete: bool| self.report.protection(Some((effective.clone(), less_than_asked || incomplete)));
        let mut due = again;
        // No check before all is written.
        let mut settled = false;
        let mut check = Instant::now();
        loop {
            tokio::select! {
                event = events.next() => match event {
                    Some((kind, Ok(event))) => {
                        found.note(kind, event, &kind.names(self.namespace.as_deref()), &mut unlisted);
                    }
                    // What is served may be something else now.
                    Some((kind, Err(source))) => return Err(Error::watch(kind, source)),
                    None => return Ok(()),
                },
                // Begun anew with the other roots. No branch when nobody can say so any more.
                Ok(()) = roots.changed() => return Ok(()),
                () = sleep_until(due) => if Instant::now() >= again { return Ok(()) },
                () = sleep_until(check), if settled && *effective == Effective::Webhook => {
                    let next = self.check(reach).await;
                    check = Instant::now() + next;
                    say(reach.lost());
                    continue;
                }
            }
            // A list in progress says nothing yet about what is missing.
            if !unlisted.is_empty() {
                continue;
            }
            let failed = self.settle(&kinds, &wanted, &mut found, &mut stored).await;
            settled = failed.is_none();
            say(!settled || reach.lost());
            match failed {
                None => (due, *retry) = (again, FIRST_RETRY),
                Some(error) => {
                    tracing::error!("{INCOMPLETE}: {error}; tried again in {retry:?}");
                    due = (Instant::now() + *retry).min(again);
                    *retry = (*retry * 2).min(LAST_RETRY);
                }
            }
        }
    }

    /// Looks whether the API server reaches the webhook, and tells when that has changed. In how long to look again.
    async fn check(&self, reach: &mut Reach) -> Duration {
        let asked = self.ask().await;
        let (answered, next) = match &asked {
            Ok(()) => (Some(true), self.pace.answered),
            Err(Error::Unreached { .. }) => (Some(false), self.pace.unanswered),
            Err(_) => (None, self.pace.unanswered),
        };
        let changed = reach.note(answered, Instant::now(), self.pace.patience);
        let refused = asked.as_ref().is_err_and(Error::is_status);
        let newly_refused = !std::mem::replace(&mut reach.refused, refused) && refused;
        match asked {
            Ok(()) if changed => tracing::info!("the API server reaches the webhook"),
            Err(error) if changed || newly_refused => tracing::error!("{error}; tried again in {next:?}"),
            Ok(()) | Err(_) => {}
        }
        next
    }

    /// Creates a Service that the webhook marks, in a dry run.
    async fn ask(&self) -> Result<(), Error> {
        let check = Service {
            metadata: ObjectMeta {
                name: Some(CHECK.to_owned()),
                // The webhook is asked about objects with this label only.
                labels: Some([(labels::CANARY.to_owned(), CHECK.to_owned())].into()),
                ..ObjectMeta::default()
            },
            spec: Some(ServiceSpec { cluster_ip: Some("None".to_owned()), ..ServiceSpec::default() }),
            ..Service::default()
        };
        let services: Api<Service> = Api::namespaced(self.client.clone(), &self.release_namespace);
        let params = PostParams { dry_run: true, field_manager: Some(labels::FIELD_MANAGER.to_owned()) };
        let doing = format!(
            "creating Service {}/{CHECK} in a dry run, to see whether the API server reaches the webhook",
            self.release_namespace
        );
        let unreached = |why: &str| Err(Error::Unreached { why: why.to_owned(), port: self.webhook_port });
        match self.leading(&doing, services.create(&params, &check)).await {
            Ok(made) if made.annotations().contains_key(ANSWERED) => Ok(()),
            Ok(_) => unreached("it does not ask it"),
            Err(error) => match (error.failed_call(), error) {
                (Some(why), _) => unreached(&why),
                (None, Error::Api { doing, source, .. }) => Err(Error::Api { doing, source, hint: UNCHECKED }),
                (None, error) => Err(error),
            },
        }
    }

    fn watch(
        &self,
        kinds: &[(Kind, ApiResource)],
    ) -> BoxStream<'static, (Kind, watcher::Result<watcher::Event<DynamicObject>>)> {
        let ours = watcher::Config::default().labels(&format!("{MANAGED_BY}={}", labels::FIELD_MANAGER));
        let watches = kinds.iter().map(|(kind, resource)| {
            let kind = *kind;
            let api = Api::all_with(self.client.clone(), resource);
            watcher(api, ours.clone()).default_backoff().map(move |event| (kind, event)).boxed()
        });
        stream::select_all(watches.collect::<Vec<_>>()).boxed()
    }

    /// Writes what is missing or different, then removes what is not wanted: never unprotected in between. The first error,
    /// after everything was tried.
    async fn settle(
        &self,
        kinds: &[(Kind, ApiResource)],
        wanted: &BTreeMap<Id, Value>,
        found: &mut Found,
        stored: &mut BTreeMap<Id, Value>,
    ) -> Option<Error> {
        let mut failed = None;
        let resource = |kind: &Kind| kinds.iter().find(|(known, _)| known == kind).map(|(_, resource)| resource);
        for (id, object) in wanted {
            let live = found.0.get(id);
            let same = |live: &DynamicObject| {
                let live = content(&live.data);
                live == content(object) || stored.get(id) == Some(&live)
            };
            if live.is_some_and(same) {
                continue;
            }
            let Some(resource) = resource(&id.0) else { continue };
            match self.write(resource, &id.1, object, live).await {
                Ok(written) => {
                    tracing::info!(kind = id.0.kind, name = id.1, "written");
                    stored.insert(id.clone(), content(&written.data));
                    found.0.insert(id.clone(), written);
                }
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        if failed.is_some() {
            return failed;
        }
        let surplus: Vec<Id> = found.0.keys().filter(|id| !wanted.contains_key(id)).cloned().collect();
        for id in surplus {
            let Some((resource, live)) = resource(&id.0).zip(found.0.get(&id)) else { continue };
            match self.delete(resource, live).await {
                Ok(()) => {
                    tracing::info!(kind = id.0.kind, name = id.1, "removed: it is not wanted any more");
                    found.0.remove(&id);
                    stored.remove(&id);
                }
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        failed
    }

    /// Replaces instead of applying: server-side apply would leave what somebody added, such as a condition that is never met.
    async fn write(
        &self,
        resource: &ApiResource,
        name: &str,
        wanted: &Value,
        live: Option<&DynamicObject>,
    ) -> Result<DynamicObject, Error> {
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), resource);
        let params = PostParams { field_manager: Some(labels::FIELD_MANAGER.to_owned()), ..PostParams::default() };
        let doing = format!("writing {} {name}", resource.kind);
        let read = |version: Option<String>| {
            let mut object: DynamicObject = serde_json::from_value(wanted.clone()).map_err(|source| Error::Api {
                doing: doing.clone(),
                source: Box::new(kube::Error::SerdeError(source)),
                hint: "A defect of Sluice",
            })?;
            object.metadata.resource_version = version;
            Ok::<_, Error>(object)
        };
        let found = match live {
            Some(live) => live.resource_version(),
            None => match self.leading(&doing, api.create(&params, &read(None)?)).await {
                // Without our label, or made since.
                Err(Error::Api { source, .. }) if is(&source, kube::core::Status::is_already_exists) => {
                    call(&doing, api.get(name)).await?.resource_version()
                }
                other => return other,
            },
        };
        self.leading(&doing, api.replace(name, &params, &read(found)?)).await
    }

    async fn delete(&self, resource: &ApiResource, live: &DynamicObject) -> Result<(), Error> {
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), resource);
        let name = live.name_any();
        let params = DeleteParams {
            preconditions: Some(Preconditions { uid: live.uid(), resource_version: None }),
            ..DeleteParams::default()
        };
        match self.leading(&format!("deleting {} {name}", resource.kind), api.delete(&name, &params)).await {
            Ok(_) => Ok(()),
            // Gone, or another one since, which the watch tells.
            Err(Error::Api { source, .. }) if matches!(&*source, kube::Error::Api(status) if status.is_not_found() || status.is_conflict()) => {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    async fn leading<T>(&self, doing: &str, write: impl Future<Output = kube::Result<T>>) -> Result<T, Error> {
        if !self.lease.may_write() {
            return Err(Error::NotLeading { doing: doing.to_owned() });
        }
        call(doing, write).await
    }
}

impl Found {
    fn note(
        &mut self,
        kind: Kind,
        event: watcher::Event<DynamicObject>,
        names: &[String],
        unlisted: &mut BTreeSet<Kind>,
    ) {
        match event {
            watcher::Event::Init => {
                unlisted.insert(kind);
                self.0.retain(|(known, _), _| *known != kind);
            }
            watcher::Event::InitDone => {
                unlisted.remove(&kind);
            }
            watcher::Event::InitApply(object) | watcher::Event::Apply(object) => {
                // Those of a name that is not ours are none of our business, whatever their label says.
                if names.contains(&object.name_any()) {
                    self.0.insert((kind, object.name_any()), object);
                }
            }
            watcher::Event::Delete(object) => {
                self.0.remove(&(kind, object.name_any()));
            }
        }
    }
}

/// What shall protect on an API server that serves policies in this version.
fn choose(protection: Protection, policies: Option<&str>) -> (Effective, String) {
    match (protection, policies) {
        (Protection::Auto | Protection::Policy, Some(version)) => {
            (Effective::Policy(version.to_owned()), format!("the API server serves MutatingAdmissionPolicy {version}"))
        }
        (Protection::Auto, None) => {
            (Effective::Webhook, "the API server serves no MutatingAdmissionPolicy (v1, or v1beta1)".to_owned())
        }
        (Protection::Webhook, _) => (Effective::Webhook, "it is asked for".to_owned()),
        (Protection::Policy, None) => (
            Effective::Repair,
            "the policies that are asked for need an API server that serves MutatingAdmissionPolicy (Kubernetes 1.36, or \
             the feature gate of this name and admissionregistration.k8s.io/v1beta1). Set the protection to auto or webhook"
                .to_owned(),
        ),
        (Protection::None, _) => (Effective::Repair, "it is asked for".to_owned()),
    }
}

fn tell(protection: Protection, effective: &Effective, why: &str) {
    let mut words = match effective {
        Effective::Policy(_) => "policies of the API server keep".to_owned(),
        Effective::Webhook => "our webhook keeps".to_owned(),
        Effective::Repair => "nothing but watch and repair keeps".to_owned(),
    };
    let _ = write!(words, " what Sluice adds to Services and Deployments: {why}");
    if protection == Protection::Policy && *effective == Effective::Repair {
        tracing::error!(protection = %effective, "{words}");
    } else {
        tracing::info!(protection = %effective, "{words}");
    }
}

/// The kinds that this API server knows.
pub(super) fn kinds(policies: Option<&str>) -> Vec<(Kind, ApiResource)> {
    let resource = |kind: Kind, version: &str| {
        let gvk = GroupVersionKind::gvk(GROUP, version, kind.kind);
        (kind, ApiResource::from_gvk_with_plural(&gvk, kind.plural))
    };
    let stable = [objects::VALIDATING_POLICY, objects::VALIDATING_BINDING, objects::WEBHOOK_CONFIGURATION];
    let mut kinds: Vec<_> = stable.into_iter().map(|kind| resource(kind, STABLE)).collect();
    if let Some(version) = policies {
        kinds.extend([objects::MUTATING_POLICY, objects::MUTATING_BINDING].map(|kind| resource(kind, version)));
    }
    kinds
}

/// What an object says, without what the API server says of it.
fn content(object: &Value) -> Value {
    let fields = ["spec", "webhooks"];
    fields
        .iter()
        .filter_map(|field| Some(((*field).to_owned(), object.get(*field)?.clone())))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

fn name_of(object: &Value) -> String {
    object["metadata"]["name"].as_str().unwrap_or_default().to_owned()
}

async fn call<T>(doing: &str, call: impl Future<Output = kube::Result<T>>) -> Result<T, Error> {
    match timeout(CALL, call).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(source)) => {
            let hint = hint(Some(&source));
            Err(Error::Api { doing: doing.to_owned(), source: Box::new(source), hint })
        }
        Err(_) => Err(Error::Deadline { doing: doing.to_owned() }),
    }
}

fn is(error: &kube::Error, what: impl Fn(&kube::core::Status) -> bool) -> bool {
    if let kube::Error::Api(status) = error { what(status) } else { false }
}

fn cause(error: &watcher::Error) -> Option<&kube::Error> {
    match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => Some(error),
        watcher::Error::WatchError(_) | watcher::Error::NoResourceVersion => None,
    }
}

fn hint(error: Option<&kube::Error>) -> &'static str {
    if error.is_some_and(|error| is(error, kube::core::Status::is_forbidden)) {
        "The chart's ClusterRole sluice-protection grants it to the controller's service account"
    } else {
        "Those are the API server's words"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_come_first_where_they_are_served() {
        let policy = |version: &str| Effective::Policy(version.into());
        let cases = [
            (Protection::Auto, Some("v1"), policy("v1")),
            (Protection::Auto, Some("v1beta1"), policy("v1beta1")),
            (Protection::Auto, None, Effective::Webhook),
            (Protection::Policy, Some("v1"), policy("v1")),
            (Protection::Policy, None, Effective::Repair),
            (Protection::Webhook, Some("v1"), Effective::Webhook),
            (Protection::Webhook, None, Effective::Webhook),
            (Protection::None, Some("v1"), Effective::Repair),
            (Protection::None, None, Effective::Repair),
        ];
        for (protection, served, wanted) in cases {
            assert_eq!(choose(protection, served).0, wanted, "{protection:?}, {served:?}");
        }
    }
}
