//! Carries out what the machine wants. Every action is idempotent: what is so already is not written, creates have
//! deterministic names, and every other write carries the resourceVersion that it was computed from.

use std::{collections::BTreeMap, fmt::Debug, future::Future, sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{
    api::{
        apps::v1::ControllerRevision,
        core::v1::{ConfigMap, Secret, Service},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::apis::meta::v1::OwnerReference,
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams, Preconditions, PropagationPolicy},
    core::NamespaceResourceScope,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use sluice_crds::{Canary, CanaryStatus, labels};

use super::{
    config::{Content, ReadError, Reader},
    machine::Action,
    observe::Observed,
    revisions::{self, Record, RecordError},
    services::{self, Role},
    template::{self, Refused, Sidecar},
};
use crate::cache::{Cache, autoscaler_resource, deployment_resource};

/// Kind of the record of a revision. Of those only ours are watched.
pub(super) const RECORD: &str = "ControllerRevision";

/// Whether this replica may write: asked before each write, on the monotonic clock, so that a thawed leader writes nothing.
pub trait LeaseGuard: Send + Sync {
    fn may_write(&self) -> bool;
}

/// An action that could not be carried out. The next reconcile finds it again.
#[derive(Debug, thiserror::Error)]
pub enum ActionError {
    #[error("{doing}: not tried, because this replica no longer holds the lease")]
    NotLeading { doing: String },
    /// Decided on a view that is no longer current: look again.
    #[error("{doing}: it was changed by somebody else meanwhile; decided anew")]
    Conflict { doing: String },
    #[error("{kind} {name} exists and is not this Canary's; rename or delete it")]
    Taken { kind: &'static str, name: String },
    #[error("{doing}: {source}")]
    Api { doing: String, source: Box<kube::Error> },
    #[error("{doing}: no answer within {deadline:?}")]
    Deadline { doing: String, deadline: Duration },
    #[error("making the Pods of revision {revision}: not all of its configuration could be read")]
    Unread { revision: String },
    #[error("making the Pods of revision {revision}: {refused}")]
    Refused { revision: String, refused: Refused },
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error(transparent)]
    Config(#[from] ReadError),
}

/// What was written, so that nothing is decided on a cache that does not show it yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Written {
    Deployment { name: String, resource_version: String },
    Service { name: String, resource_version: String },
    Autoscaler { name: String, resource_version: String },
    Record { name: String, resource_version: String },
    RecordGone { name: String, uid: String },
}

/// Does what the machine wants.
pub struct Effects {
    /// Without retries of its own: a replayed write may have taken effect already.
    pub client: Client,
    pub cache: Cache,
    pub configs: Arc<Reader>,
    pub lease: Arc<dyn LeaseGuard>,
    pub sidecar: Sidecar,
    /// For each call.
    pub deadline: Duration,
}

/// One Canary's turn: the Canary as it was written last, what was observed, and what has been written since.
pub struct Turn<'a> {
    pub canary: Canary,
    pub observed: &'a Observed,
    pub written: Vec<Written>,
}

impl Effects {
    /// Writes the status, if nobody wrote the Canary since `canary` was read. Returns what is stored now.
    ///
    /// # Errors
    /// On a conflict, an API error, or without the lease.
    pub async fn write_status(&self, canary: &Canary, status: CanaryStatus) -> Result<Canary, ActionError> {
        let name = canary.name_any();
        let mut wanted = canary.clone();
        wanted.status = Some(status);
        let api = self.api::<Canary>(canary);
        let doing = || format!("writing the status of Canary {name}");
        self.call(doing, api.replace_status(&name, &create_params(), &wanted)).await
    }

    /// Carries out one action.
    ///
    /// # Errors
    /// If it is not done; what was done of it stays and is found by the next try.
    pub async fn perform(&self, action: &Action, turn: &mut Turn<'_>) -> Result<(), ActionError> {
        match action {
            // Done beside the status write, by the reconciler.
            Action::CutTraffic => Ok(()),
            Action::AddFinalizer => self.add_finalizer(turn).await,
            Action::EnsureServices => self.ensure_services(turn).await,
            Action::SetKey(wanted) => self.set_key(turn, *wanted).await,
            Action::CreateRevision { revision, replicas } | Action::ScaleRevision { revision, replicas } => {
                Box::pin(self.run_revision(turn, revision, *replicas)).await
            }
            Action::MarkPromoted { revision } => self.mark_promoted(turn, revision).await,
            Action::DeleteRevision { revision } => Box::pin(self.delete_revision(turn, revision)).await,
            Action::RestTemplate { wish } => self.scale_target(turn, 0, Some(*wish)).await,
            Action::WakeTemplate { replicas } => self.scale_target(turn, *replicas, None).await,
            Action::FollowAutoscaler => Box::pin(self.follow_autoscaler(turn)).await,
            Action::EndAutoscaling => self.end_autoscaling(turn).await,
            Action::SetReplicas { replicas } => self.set_replicas(turn, *replicas).await,
            Action::Release => Box::pin(self.release(turn)).await,
        }
    }

    async fn add_finalizer(&self, turn: &mut Turn<'_>) -> Result<(), ActionError> {
        let mut finalizers = turn.canary.finalizers().to_vec();
        if finalizers.iter().any(|finalizer| finalizer == labels::FINALIZER) {
            return Ok(());
        }
        finalizers.push(labels::FINALIZER.to_owned());
        self.patch_canary(turn, "adding the finalizer to", json!({"metadata": {"finalizers": finalizers}})).await
    }

    async fn set_replicas(&self, turn: &mut Turn<'_>, replicas: u32) -> Result<(), ActionError> {
        if turn.canary.spec.replicas.and_then(|has| u32::try_from(has).ok()) == Some(replicas) {
            return Ok(());
        }
        self.patch_canary(turn, "setting the replicas of", json!({"spec": {"replicas": replicas}})).await
    }

    async fn patch_canary(&self, turn: &mut Turn<'_>, doing: &str, patch: Value) -> Result<(), ActionError> {
        turn.canary = self.patch(&self.api::<Canary>(&turn.canary), &turn.canary, doing, patch).await?;
        Ok(())
    }

    /// Companions follow the apex: its ports may change at any time. An apex of ours that somebody else has applied since is theirs.
    ///
    /// # Errors
    /// As [`Effects::perform`].
    pub async fn ensure_services(&self, turn: &mut Turn<'_>) -> Result<(), ActionError> {
        let api = self.api::<Service>(&turn.canary);
        let apex = match (&turn.observed.apex, &turn.observed.target) {
            (Some(apex), _) => match services::owners_without_us(apex, &turn.canary) {
                None => Arc::clone(apex),
                Some(owners) => {
                    let patch = json!({"metadata": {"ownerReferences": owners}});
                    let written = self.patch(&api, &**apex, "leaving to whoever wrote it", patch).await?;
                    turn.wrote_service(&written);
                    Arc::new(written)
                }
            },
            (None, Some(target)) => {
                let wanted = services::apex(&turn.canary, target);
                let made = self.create(&api, "Service", &wanted, |found| revisions::owned(found, &turn.canary)).await?;
                turn.wrote_service(&made);
                Arc::new(made)
            }
            // Nothing to make it from; the machine says that the target is missing.
            (None, None) => return Ok(()),
        };
        for role in Role::ALL {
            let wanted = services::companion(&turn.canary, &apex, role);
            let name = wanted.name_any();
            let written = match turn.observed.companions.get(&name) {
                Some(live) if services::is_current(live, &wanted) => continue,
                Some(live) => {
                    // The address and its family stay as they were given; the lists of a merge patch replace.
                    let spec = wanted.spec.as_ref();
                    let patch = json!({
                        "metadata": {
                            "labels": wanted.metadata.labels, "ownerReferences": wanted.metadata.owner_references,
                        },
                        "spec": {"ports": spec.and_then(|spec| spec.ports.as_ref()), "selector": spec.and_then(|spec| spec.selector.as_ref())},
                    });
                    self.patch(&api, &**live, "following the apex with", patch).await?
                }
                None => self.create(&api, "Service", &wanted, |found| revisions::owned(found, &turn.canary)).await?,
            };
            turn.wrote_service(&written);
        }
        Ok(())
    }

    async fn set_key(&self, turn: &mut Turn<'_>, wanted: bool) -> Result<(), ActionError> {
        let name = turn.canary.name_any();
        // A merge patch, because server-side apply owns a selector as one atomic field.
        let patch = if wanted {
            json!({"metadata": {"labels": {labels::CANARY: name}}, "spec": {"selector": {labels::FLEET: name}}})
        } else {
            json!({"metadata": {"labels": {labels::CANARY: null}}, "spec": {"selector": {labels::FLEET: null}}})
        };
        let doing =
            if wanted { "adding the fleet's selector key to" } else { "removing the fleet's selector key from" };
        // Without a Service there is no key; the apex is made with one.
        let all = turn.observed.apex.iter().chain(&turn.observed.additional);
        let differs = |service: &&Arc<Service>| services::has_key(service, &turn.canary) != wanted;
        let todo: Vec<_> = all.filter(differs).cloned().collect();
        for service in &todo {
            let mut patch = patch.clone();
            if let Some(owners) = services::owners_without_us(service, &turn.canary) {
                patch["metadata"]["ownerReferences"] = json!(owners);
            }
            let written = self.patch(&self.api::<Service>(&turn.canary), &**service, doing, patch).await?;
            turn.wrote_service(&written);
        }
        Ok(())
    }

    async fn scale_target(&self, turn: &mut Turn<'_>, replicas: u32, wish: Option<u32>) -> Result<(), ActionError> {
        let Some(target) = &turn.observed.target else { return Ok(()) };
        // Our admission webhook is asked about labelled objects only.
        let label = wish.map(|_| turn.canary.name_any());
        let wish = wish.map(|wish| wish.to_string());
        if target.data.pointer("/spec/replicas").and_then(Value::as_u64) == Some(u64::from(replicas))
            && target.annotations().get(labels::REPLICAS) == wish.as_ref()
            && target.labels().get(labels::CANARY) == label.as_ref()
        {
            return Ok(());
        }
        let metadata = json!({"labels": {labels::CANARY: label}, "annotations": {labels::REPLICAS: wish}});
        let patch = json!({"metadata": metadata, "spec": {"replicas": replicas}});
        let written = self.patch(&self.deployments(&turn.canary), &**target, "setting the replicas of", patch).await?;
        turn.wrote_deployment(&written);
        Ok(())
    }

    async fn follow_autoscaler(&self, turn: &mut Turn<'_>) -> Result<(), ActionError> {
        let scaling = &turn.observed.scaling;
        let api = self.autoscalers(&turn.canary);
        // First, because two on the same Pods stop each other.
        for surplus in scaling.surplus() {
            self.delete(&api, &**surplus).await?;
        }
        let Some(wanted) = &scaling.wanted else { return Ok(()) };
        let name = wanted.name_any();
        let written = match scaling.live() {
            Some(live) => {
                // A patch would keep what the named one does not say any more.
                let mut next = (**live).clone();
                next.data["spec"] = wanted.data["spec"].clone();
                next.labels_mut().extend(wanted.labels().clone());
                let doing = || format!("writing HorizontalPodAutoscaler {name}");
                self.call(doing, api.replace(&name, &create_params(), &next)).await?
            }
            None => {
                let mine = |found: &DynamicObject| revisions::owned(found, &turn.canary);
                self.create(&api, "HorizontalPodAutoscaler", wanted, mine).await?
            }
        };
        turn.written
            .push(Written::Autoscaler { name, resource_version: written.resource_version().unwrap_or_default() });
        Ok(())
    }

    async fn end_autoscaling(&self, turn: &Turn<'_>) -> Result<(), ActionError> {
        for copy in &turn.observed.scaling.copies {
            self.delete(&self.autoscalers(&turn.canary), &**copy).await?;
        }
        Ok(())
    }

    /// Makes a revision's Deployment, or sets its replicas.
    async fn run_revision(&self, turn: &mut Turn<'_>, revision: &str, replicas: u32) -> Result<(), ActionError> {
        let record = match turn.observed.records.get(revision) {
            Some(record) => Arc::clone(record),
            None => Arc::new(self.record(turn, revision).await?),
        };
        let owners = revisions::owners(&turn.canary, &record);
        let api = self.deployments(&turn.canary);
        let deployment = match turn.observed.deployments.get(revision) {
            Some(deployment) => Arc::clone(deployment),
            None => {
                self.pin_configuration(turn, revision, &owners).await?;
                let wanted = Record::read(&record)?.deployment(&turn.canary, &record, revision, replicas);
                let made = self
                    .create(&api, "Deployment", &wanted, |found| revisions::ours(found, &turn.canary, revision))
                    .await?;
                turn.wrote_deployment(&made);
                Arc::new(made)
            }
        };
        let same = deployment.data.pointer("/spec/replicas").and_then(Value::as_u64) == Some(u64::from(replicas));
        let mut patch = json!({"spec": {"replicas": replicas}});
        let adopted = revisions::has_owners(&*deployment, &owners);
        if !adopted {
            patch["metadata"] = json!({"ownerReferences": owners});
        }
        if !same || !adopted {
            let written = self.patch(&api, &*deployment, &format!("setting {replicas} replicas of"), patch).await?;
            turn.wrote_deployment(&written);
        }
        Ok(())
    }

    /// Records the revision of the present template.
    async fn record(&self, turn: &mut Turn<'_>, revision: &str) -> Result<ControllerRevision, ActionError> {
        let (Some(target), true) = (&turn.observed.target, turn.is_of_template(revision)?) else {
            // The template moved on since the machine decided.
            return Err(ActionError::Conflict { doing: format!("recording revision {revision}") });
        };
        let pins = turn.observed.tracked.pins(revision);
        let canary = turn.canary.name_any();
        let rendered = template::render(&target.data["spec"]["template"], &canary, revision, &pins, &self.sidecar)
            .map_err(|refused| ActionError::Refused { revision: revision.to_owned(), refused })?;
        let number = turn.observed.records.values().map(|record| record.revision).max().unwrap_or(0) + 1;
        let wanted = Record::of(target, rendered).object(&turn.canary, revision, number);
        let api = self.api::<ControllerRevision>(&turn.canary);
        let made = self.create(&api, RECORD, &wanted, |found| revisions::ours(found, &turn.canary, revision)).await?;
        turn.written.push(Written::Record {
            name: made.name_any(),
            resource_version: made.resource_version().unwrap_or_default(),
        });
        Ok(made)
    }

    /// Copies of the configuration as it was when the revision was seen. Of an older revision only those that are left.
    async fn pin_configuration(
        &self,
        turn: &Turn<'_>,
        revision: &str,
        owners: &[OwnerReference],
    ) -> Result<(), ActionError> {
        if !turn.is_of_template(revision)? {
            return Ok(());
        }
        let namespace = turn.canary.namespace().unwrap_or_default();
        let labels = revisions::labels_of(&turn.canary.name_any(), revision);
        for (reference, digest) in &turn.observed.tracked.digests {
            let content = self.configs.read(&namespace, reference).await?;
            let Some(content) = content.filter(|content| content.digest() == *digest) else {
                return Err(ActionError::Conflict { doing: format!("copying {reference} for revision {revision}") });
            };
            let mine = |labels: &BTreeMap<String, String>, digest_found: String| {
                revisions::labels_of(&turn.canary.name_any(), revision)
                    .iter()
                    .all(|(key, value)| labels.get(key) == Some(value))
                    && digest_found == *digest
            };
            match content.pinned(reference.pinned_name(revision), &namespace, labels.clone(), owners.to_vec()) {
                Content::ConfigMap(wanted) => {
                    let api = self.api::<ConfigMap>(&turn.canary);
                    let same = |found: &ConfigMap| mine(found.labels(), Content::ConfigMap(found.clone()).digest());
                    let made = self.create(&api, "ConfigMap", &wanted, same).await?;
                    self.adopt(&api, &made, owners).await?;
                }
                Content::Secret(wanted) => {
                    let api = self.api::<Secret>(&turn.canary);
                    let same = |found: &Secret| mine(found.labels(), Content::Secret(found.clone()).digest());
                    let made = self.create(&api, "Secret", &wanted, same).await?;
                    self.adopt(&api, &made, owners).await?;
                }
            }
        }
        Ok(())
    }

    async fn adopt<K>(&self, api: &Api<K>, object: &K, owners: &[OwnerReference]) -> Result<(), ActionError>
    where
        K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug,
    {
        if !revisions::has_owners(object, owners) {
            self.patch(api, object, "taking over", json!({"metadata": {"ownerReferences": owners}})).await?;
        }
        Ok(())
    }

    async fn mark_promoted(&self, turn: &mut Turn<'_>, revision: &str) -> Result<(), ActionError> {
        let Some(record) = turn.observed.records.get(revision) else { return Ok(()) };
        if record.annotations().contains_key(labels::PROMOTED) {
            return Ok(());
        }
        let patch = json!({"metadata": {"annotations": {labels::PROMOTED: Timestamp::now().to_string()}}});
        let api = self.api::<ControllerRevision>(&turn.canary);
        let written = self.patch(&api, &**record, "marking as promoted", patch).await?;
        turn.written.push(Written::Record {
            name: written.name_any(),
            resource_version: written.resource_version().unwrap_or_default(),
        });
        Ok(())
    }

    /// The Canary owns these objects too, so they do not go by themselves when the record goes. The record goes last: while
    /// it is there, a controller that crashed in between finds what is left.
    async fn delete_revision(&self, turn: &mut Turn<'_>, revision: &str) -> Result<(), ActionError> {
        let canary = &turn.canary;
        if let Some(deployment) = turn.observed.deployments.get(revision) {
            self.delete(&self.deployments(canary), &**deployment).await?;
        }
        let namespace = canary.namespace();
        for copy in self
            .cache
            .config_maps
            .state_filter(|copy| copy.namespace() == namespace && revisions::is_copy(copy, canary, revision))
        {
            self.delete(&self.api::<ConfigMap>(canary), &*copy).await?;
        }
        let secrets = self.cache.secrets.as_ref().map(|secrets| {
            secrets.state_filter(|copy| copy.namespace() == namespace && revisions::is_copy(copy, canary, revision))
        });
        for copy in secrets.into_iter().flatten() {
            self.delete(&self.api::<Secret>(canary), &*copy).await?;
        }
        if let Some(record) = turn.observed.records.get(revision) {
            self.delete(&self.api::<ControllerRevision>(canary), &**record).await?;
            turn.written.push(Written::RecordGone { name: record.name_any(), uid: record.uid().unwrap_or_default() });
        }
        Ok(())
    }

    /// The last action: what is left goes, then the finalizer.
    async fn release(&self, turn: &mut Turn<'_>) -> Result<(), ActionError> {
        let canary = &turn.canary;
        for companion in turn.observed.companions.values() {
            self.delete(&self.api::<Service>(canary), &**companion).await?;
        }
        for slice in &turn.observed.slices {
            self.delete(&self.api::<EndpointSlice>(canary), &**slice).await?;
        }
        for revision in turn.observed.records.keys() {
            self.delete_revision(turn, revision).await?;
        }
        let canary = &turn.canary;
        let finalizers: Vec<_> =
            canary.finalizers().iter().filter(|finalizer| *finalizer != labels::FINALIZER).cloned().collect();
        if finalizers.len() == canary.finalizers().len() {
            return Ok(());
        }
        self.patch_canary(turn, "removing the finalizer of", json!({"metadata": {"finalizers": finalizers}})).await
    }

    /// Whether the name of a record is still somebody else's.
    pub async fn is_taken(&self, canary: &Canary, name: &str) -> bool {
        let api = self.api::<ControllerRevision>(canary);
        let found = self.call(|| format!("reading ControllerRevision {name}"), api.get_opt(name)).await;
        let ours = |found: &ControllerRevision| {
            let revision = found.labels().get(labels::REVISION).cloned().unwrap_or_default();
            revisions::ours(found, canary, &revision)
        };
        match found {
            Ok(found) => found.is_some_and(|found| !ours(&found)),
            // Not known to be free.
            Err(_) => true,
        }
    }

    fn api<K>(&self, canary: &Canary) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), canary.metadata.namespace.as_deref().unwrap_or_default())
    }

    fn deployments(&self, canary: &Canary) -> Api<DynamicObject> {
        let namespace = canary.metadata.namespace.as_deref().unwrap_or_default();
        Api::namespaced_with(self.client.clone(), namespace, &deployment_resource())
    }

    fn autoscalers(&self, canary: &Canary) -> Api<DynamicObject> {
        let namespace = canary.metadata.namespace.as_deref().unwrap_or_default();
        Api::namespaced_with(self.client.clone(), namespace, &autoscaler_resource())
    }

    /// Creates an object. Where there is one of this name, `mine` says whether it is ours, from an earlier try.
    async fn create<K>(
        &self,
        api: &Api<K>,
        kind: &'static str,
        object: &K,
        mine: impl Fn(&K) -> bool,
    ) -> Result<K, ActionError>
    where
        K: Resource + Clone + Serialize + DeserializeOwned + Debug,
    {
        let name = object.name_any();
        let doing = || format!("creating {kind} {name}");
        match self.call(doing, api.create(&create_params(), object)).await {
            Err(ActionError::Api { source, .. }) if is(&source, |status| status.is_already_exists()) => {
                let found = self.call(|| format!("reading {kind} {name}, which exists"), api.get(&name)).await?;
                if mine(&found) { Ok(found) } else { Err(ActionError::Taken { kind, name }) }
            }
            other => other,
        }
    }

    /// A merge patch on exactly the version that `object` is.
    async fn patch<K>(&self, api: &Api<K>, object: &K, doing: &str, mut patch: Value) -> Result<K, ActionError>
    where
        K: Resource + Clone + DeserializeOwned + Debug,
    {
        let name = object.name_any();
        patch["metadata"]["resourceVersion"] = json!(object.resource_version());
        let params = PatchParams { field_manager: Some(labels::FIELD_MANAGER.to_owned()), ..PatchParams::default() };
        self.call(|| format!("{doing} {name}"), api.patch(&name, &params, &Patch::Merge(&patch))).await
    }

    /// Deletes exactly this object; never orphans what it owns, because the target would adopt the ReplicaSet of a revision
    /// and scale it to 0.
    async fn delete<K, L>(&self, api: &Api<K>, object: &L) -> Result<(), ActionError>
    where
        K: Resource + Clone + DeserializeOwned + Debug,
        L: Resource,
    {
        let name = object.name_any();
        let params = DeleteParams {
            propagation_policy: Some(PropagationPolicy::Background),
            preconditions: Some(Preconditions { uid: object.uid(), resource_version: None }),
            ..DeleteParams::default()
        };
        match self.call(|| format!("deleting {name}"), api.delete(&name, &params)).await {
            // Gone, or another one of that name since.
            Ok(_) | Err(ActionError::Conflict { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// One call, with the lease checked before it and a deadline on it.
    async fn call<T>(
        &self,
        doing: impl Fn() -> String,
        call: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, ActionError> {
        if !self.lease.may_write() {
            return Err(ActionError::NotLeading { doing: doing() });
        }
        match tokio::time::timeout(self.deadline, call).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error))
                if is(&error, |status| {
                    !status.is_already_exists() && (status.is_conflict() || status.is_not_found())
                }) =>
            {
                Err(ActionError::Conflict { doing: doing() })
            }
            Ok(Err(source)) => Err(ActionError::Api { doing: doing(), source: Box::new(source) }),
            Err(_) => Err(ActionError::Deadline { doing: doing(), deadline: self.deadline }),
        }
    }
}

impl Turn<'_> {
    /// Whether a revision is that of the target's present template.
    fn is_of_template(&self, revision: &str) -> Result<bool, ActionError> {
        let template = self.observed.observation.template.as_ref();
        let Some(template) = template.filter(|template| template.revision == revision) else { return Ok(false) };
        if template.unread {
            return Err(ActionError::Unread { revision: revision.to_owned() });
        }
        Ok(true)
    }

    fn wrote_deployment(&mut self, object: &DynamicObject) {
        self.written.push(Written::Deployment {
            name: object.name_any(),
            resource_version: object.resource_version().unwrap_or_default(),
        });
    }

    fn wrote_service(&mut self, object: &Service) {
        self.written.push(Written::Service {
            name: object.name_any(),
            resource_version: object.resource_version().unwrap_or_default(),
        });
    }
}

fn create_params() -> PostParams {
    PostParams { field_manager: Some(labels::FIELD_MANAGER.to_owned()), ..PostParams::default() }
}

fn is(error: &kube::Error, what: impl Fn(&kube::core::Status) -> bool) -> bool {
    if let kube::Error::Api(status) = error { what(status) } else { false }
}
