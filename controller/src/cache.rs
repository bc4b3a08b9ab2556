//! What the API server says, kept by watches. Every room reads from here; nothing polls.
//!
//! One watch a kind, each with a task that keeps the store, marks the Canaries that the change concerns ([`Touches`]), and
//! raises [`Cache::changes`]. Objects are pruned before they are kept: what no room reads is not held in memory.

use std::{
    collections::BTreeSet,
    fmt::Debug,
    hash::Hash,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::{
    api::{
        apps::v1::{ControllerRevision, ReplicaSet},
        core::v1::{ConfigMap, Namespace, Pod, Secret, Service},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{ApiResource, DynamicObject, PartialObjectMeta},
    core::{GroupVersionKind, NamespaceResourceScope},
    runtime::{
        WatchStreamExt,
        reflector::{ObjectRef, Store, store::Writer},
        watcher,
    },
};
use serde::de::DeserializeOwned;
use serde_json::Value;
use sluice_crds::{Canary, MetricTemplate, labels};
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
};

/// Namespace and name of a Canary.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CanaryKey {
    pub namespace: String,
    pub name: String,
}

impl CanaryKey {
    #[must_use]
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }

    /// Of a Canary as the API server returned it.
    #[must_use]
    pub fn of(canary: &Canary) -> Self {
        Self::new(canary.namespace().unwrap_or_default(), canary.name_any())
    }

    #[must_use]
    pub fn object_ref(&self) -> ObjectRef<Canary> {
        ObjectRef::new(&self.name).within(&self.namespace)
    }
}

impl std::fmt::Display for CanaryKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Canaries that should be looked at. A set, so that it is bounded by their number however fast things change: what is
/// touched again before it was taken is taken once.
#[derive(Clone, Debug, Default)]
pub struct Touches {
    inner: Arc<TouchesInner>,
}

#[derive(Debug, Default)]
struct TouchesInner {
    keys: Mutex<BTreeSet<CanaryKey>>,
    notify: Notify,
}

impl Touches {
    /// Asks for a look at this Canary.
    pub fn touch(&self, key: CanaryKey) {
        self.inner.keys.lock().unwrap_or_else(PoisonError::into_inner).insert(key);
        self.inner.notify.notify_one();
    }

    /// How many wait to be looked at.
    #[must_use]
    pub fn len(&self) -> usize {
        self.inner.keys.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Waits until something is touched, and takes all of it. For one consumer. Cancel-safe.
    pub async fn take(&self) -> BTreeSet<CanaryKey> {
        loop {
            let keys = std::mem::take(&mut *self.inner.keys.lock().unwrap_or_else(PoisonError::into_inner));
            if !keys.is_empty() {
                return keys;
            }
            self.inner.notify.notified().await;
        }
    }
}

/// What is watched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    /// Only what is in this namespace; in all where absent.
    pub namespace: Option<String>,
    /// Where Sluice is installed: that it is being uninstalled is said there.
    pub release_namespace: String,
    /// Namespaces themselves, which only a ClusterRole may watch.
    pub namespaces: bool,
    pub secrets: bool,
}

/// How far the watch of a kind has come.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<AtomicU64>);

impl Progress {
    /// Whether the store has everything of this kind up to this resourceVersion, because it has something later. No event may have come
    /// after it: then this is false, although the store may have it all.
    #[must_use]
    pub fn is_past(&self, version: Option<&str>) -> bool {
        version_number(version).is_some_and(|version| self.0.load(Ordering::Acquire) > version)
    }

    /// Events of a watch come in the order of their versions, that of a deletion too.
    pub(crate) fn came(&self, to: Option<&str>) {
        self.0.fetch_max(version_number(to).unwrap_or_default(), Ordering::Release);
    }

    /// A list replaces all that was.
    fn begin_at(&self, listed: &Self) {
        self.0.store(listed.0.load(Ordering::Acquire), Ordering::Release);
    }
}

/// Versions of one kind rise, and are numbers (KEP-5504); what is not a number is not compared.
#[must_use]
pub fn version_number(version: Option<&str>) -> Option<u64> {
    version?.parse().ok()
}

/// Bytes of memory, as `weight` counts them, that a Deployment may take here. Whoever may create Deployments could fill the controllers'
/// memory otherwise: one that fits into etcd's 1.5 MiB takes 25 MiB here if it is full of args, and 150 MiB if it is full of environment
/// variables. A thousand of those are within it.
pub const DEPLOYMENT_LIMIT: usize = 1024 * 1024;
/// What a field of a larger one may take to stay.
const FIELD_LIMIT: usize = 8 * 1024;
/// Deployments that are listed at once. All of a page are held whole before the first is pruned: ten that are full of args take 250 MiB.
/// Fewer would make the list of a large cluster slow.
const DEPLOYMENTS_PAGE: u32 = 10;

/// The stores.
#[derive(Clone)]
pub struct Cache {
    pub canaries: Store<Canary>,
    pub canaries_progress: Progress,
    pub metric_templates: Store<MetricTemplate>,
    pub metric_templates_progress: Progress,
    /// Untyped, so that no field of a newer API server is dropped. Of one that is larger than [`DEPLOYMENT_LIMIT`] there is no
    /// `spec.template`.
    pub deployments: Store<DynamicObject>,
    pub deployments_progress: Progress,
    /// Untyped, without the values that they measured last.
    pub autoscalers: Store<DynamicObject>,
    pub autoscalers_progress: Progress,
    /// Metadata only: who owns whom.
    pub replica_sets: Store<PartialObjectMeta<ReplicaSet>>,
    pub replica_sets_progress: Progress,
    /// Without volumes, environment and commands.
    pub pods: Store<Pod>,
    pub pods_progress: Progress,
    pub services: Store<Service>,
    pub services_progress: Progress,
    pub slices: Store<EndpointSlice>,
    pub slices_progress: Progress,
    /// Those with the label `sluice.dev/canary`.
    pub revisions: Store<ControllerRevision>,
    pub revisions_progress: Progress,
    /// Metadata only; none where we may not see them.
    pub namespaces: Option<Store<PartialObjectMeta<Namespace>>>,
    pub namespaces_progress: Progress,
    /// Metadata only: content is read by name when the resourceVersion changed.
    pub config_maps: Store<PartialObjectMeta<ConfigMap>>,
    pub config_maps_progress: Progress,
    /// As `config_maps`; none where Secrets are not tracked.
    pub secrets: Option<Store<PartialObjectMeta<Secret>>>,
    pub secrets_progress: Progress,
    /// Canaries that a change concerns.
    pub touches: Touches,
    release_namespace: Arc<str>,
    changes: watch::Sender<u64>,
}

/// `apps/v1` Deployment as an untyped resource.
#[must_use]
pub fn deployment_resource() -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("apps", "v1", "Deployment"), "deployments")
}

/// `autoscaling/v2` HorizontalPodAutoscaler as an untyped resource.
#[must_use]
pub fn autoscaler_resource() -> ApiResource {
    let kind = GroupVersionKind::gvk("autoscaling", "v2", "HorizontalPodAutoscaler");
    ApiResource::from_gvk_with_plural(&kind, "horizontalpodautoscalers")
}

impl Cache {
    /// Starts the watches. They end with the `JoinSet`.
    ///
    /// A watch that fails is tried again with backoff, and [`Cache::warm`] waits for it.
    #[must_use]
    pub fn start(client: &Client, scope: &Scope, tasks: &mut JoinSet<()>) -> Self {
        let namespace = scope.namespace.as_deref();
        let touches = Touches::default();
        let (changes, _) = watch::channel(0);
        let all = watcher::Config::default;

        let canaries = Pending::new(scoped(client, namespace), (), all(), prune_metadata::<Canary>);
        let metric_templates = Pending::new(scoped(client, namespace), (), all(), prune_metadata::<MetricTemplate>);
        let untyped = |resource: &ApiResource| match namespace {
            Some(namespace) => Api::namespaced_with(client.clone(), namespace, resource),
            None => Api::all_with(client.clone(), resource),
        };
        let resource = deployment_resource();
        let config = all().page_size(DEPLOYMENTS_PAGE);
        let deployments = Pending::new(untyped(&resource), resource, config, prune_deployment);
        let resource = autoscaler_resource();
        let autoscalers = Pending::new(untyped(&resource), resource, all(), prune_autoscaler);
        let replica_sets =
            Pending::new(scoped(client, namespace), (), all(), prune_metadata::<PartialObjectMeta<ReplicaSet>>);
        let pods = Pending::new(scoped(client, namespace), (), all(), prune_pod);
        let services = Pending::new(scoped(client, namespace), (), all(), prune_service);
        let slices = Pending::new(scoped(client, namespace), (), all(), prune_metadata::<EndpointSlice>);
        let revisions = Pending::new(
            scoped(client, namespace),
            (),
            all().labels(labels::CANARY),
            prune_metadata::<ControllerRevision>,
        );
        let namespaces = scope
            .namespaces
            .then(|| Pending::new(Api::all(client.clone()), (), all(), prune_metadata::<PartialObjectMeta<Namespace>>));
        let config_maps =
            Pending::new(scoped(client, namespace), (), all(), prune_metadata::<PartialObjectMeta<ConfigMap>>);
        let secrets = scope
            .secrets
            .then(|| Pending::new(scoped(client, namespace), (), all(), prune_metadata::<PartialObjectMeta<Secret>>));

        let cache = Self {
            canaries: canaries.store.clone(),
            canaries_progress: canaries.progress.clone(),
            metric_templates: metric_templates.store.clone(),
            metric_templates_progress: metric_templates.progress.clone(),
            deployments: deployments.store.clone(),
            deployments_progress: deployments.progress.clone(),
            autoscalers: autoscalers.store.clone(),
            autoscalers_progress: autoscalers.progress.clone(),
            replica_sets: replica_sets.store.clone(),
            replica_sets_progress: replica_sets.progress.clone(),
            pods: pods.store.clone(),
            pods_progress: pods.progress.clone(),
            services: services.store.clone(),
            services_progress: services.progress.clone(),
            slices: slices.store.clone(),
            slices_progress: slices.progress.clone(),
            revisions: revisions.store.clone(),
            revisions_progress: revisions.progress.clone(),
            namespaces: namespaces.as_ref().map(|pending| pending.store.clone()),
            namespaces_progress: namespaces.as_ref().map(|pending| pending.progress.clone()).unwrap_or_default(),
            config_maps: config_maps.store.clone(),
            config_maps_progress: config_maps.progress.clone(),
            secrets: secrets.as_ref().map(|pending| pending.store.clone()),
            secrets_progress: secrets.as_ref().map(|pending| pending.progress.clone()).unwrap_or_default(),
            touches,
            release_namespace: scope.release_namespace.as_str().into(),
            changes,
        };
        canaries.run(tasks, cache.clone(), |cache, canary, gone| {
            cache.touches.touch(CanaryKey::of(canary));
            if gone {
                // Another one may have waited for the target or Service that this one held.
                cache.touch_namespace(canary.metadata.namespace.as_deref());
            }
        });
        metric_templates.run(tasks, cache.clone(), |cache, template, _| cache.touch_users_of(template));
        deployments.run(tasks, cache.clone(), |cache, deployment, _| {
            // A target at rest has the label too, and another Canary may wait for it.
            if let Some(key) = label(deployment, labels::CANARY) {
                cache.touches.touch(key);
            }
            cache.touch_target(deployment.metadata.namespace.as_deref(), &deployment.name_any());
        });
        autoscalers.quiet().run(tasks, cache.clone(), |cache, autoscaler, _| {
            let name = autoscaler.name_any();
            for canary in cache.canaries_in(autoscaler.metadata.namespace.as_deref()) {
                let named = canary.spec.autoscaler_ref.as_ref().map(|reference| reference.name.as_str());
                // The one that is copied, and whatever has the name of the copy.
                if named.is_some_and(|named| name == named || name.strip_suffix("-primary") == Some(named)) {
                    cache.touches.touch(CanaryKey::of(&canary));
                }
            }
        });
        replica_sets.run(tasks, cache.clone(), |cache, set, _| {
            if let Some(owner) = owner(set, "Deployment") {
                cache.touch_target(set.metadata.namespace.as_deref(), owner);
            }
        });
        pods.run(tasks, cache.clone(), |cache, pod, _| match label(pod, labels::CANARY) {
            Some(key) => cache.touches.touch(key),
            None => {
                if let Some(deployment) = cache.deployment_of(pod) {
                    cache.touch_target(pod.metadata.namespace.as_deref(), &deployment);
                }
            }
        });
        services.run(tasks, cache.clone(), |cache, service, _| {
            cache.touch_namespace(service.metadata.namespace.as_deref());
        });
        slices.run(tasks, cache.clone(), |cache, slice, _| {
            let service = slice.labels().get("kubernetes.io/service-name");
            for canary in cache.canaries_in(slice.metadata.namespace.as_deref()) {
                if service.is_some_and(|service| canary.spec.service_names().any(|name| name == service)) {
                    cache.touches.touch(CanaryKey::of(&canary));
                }
            }
        });
        revisions.run(tasks, cache.clone(), |cache, revision, _| {
            if let Some(key) = label(revision, labels::CANARY) {
                cache.touches.touch(key);
            }
        });
        if let Some(namespaces) = namespaces {
            namespaces.run(tasks, cache.clone(), |cache, namespace, _| {
                if namespace.metadata.deletion_timestamp.is_some() {
                    cache.touch_namespace(namespace.metadata.name.as_deref());
                }
            });
        }
        config_maps.run(tasks, cache.clone(), |cache, config, _| {
            cache.touch_namespace(config.metadata.namespace.as_deref());
            if ObjectRef::from_obj(config) == cache.uninstall() {
                for canary in cache.canaries.state() {
                    cache.touches.touch(CanaryKey::of(&canary));
                }
            }
        });
        if let Some(secrets) = secrets {
            secrets.run(tasks, cache.clone(), |cache, secret, _| {
                cache.touch_namespace(secret.metadata.namespace.as_deref());
            });
        }
        cache
    }

    /// Waits until every store has its first complete list.
    ///
    /// # Errors
    /// If a watch task is gone.
    pub async fn warm(&self) -> Result<(), kube::runtime::reflector::store::WriterDropped> {
        self.canaries.wait_until_ready().await?;
        self.metric_templates.wait_until_ready().await?;
        self.deployments.wait_until_ready().await?;
        self.autoscalers.wait_until_ready().await?;
        self.replica_sets.wait_until_ready().await?;
        self.pods.wait_until_ready().await?;
        self.services.wait_until_ready().await?;
        self.slices.wait_until_ready().await?;
        self.revisions.wait_until_ready().await?;
        self.config_maps.wait_until_ready().await?;
        if let Some(namespaces) = &self.namespaces {
            namespaces.wait_until_ready().await?;
        }
        if let Some(secrets) = &self.secrets {
            secrets.wait_until_ready().await?;
        }
        Ok(())
    }

    /// A number that rises with every change of any store that says something about traffic.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Namespaces that are being deleted, as far as we may see them.
    #[must_use]
    pub fn is_terminating(&self, namespace: &str) -> bool {
        let found = self.namespaces.as_ref().and_then(|namespaces| namespaces.get(&ObjectRef::new(namespace)));
        found.is_some_and(|namespace| namespace.metadata.deletion_timestamp.is_some())
    }

    /// Until when every Canary hands its traffic back, because Sluice is being uninstalled.
    #[must_use]
    pub fn uninstalling_until(&self) -> Option<Timestamp> {
        self.config_maps.get(&self.uninstall())?.annotations().get(labels::UNTIL)?.parse().ok()
    }

    fn uninstall(&self) -> ObjectRef<PartialObjectMeta<ConfigMap>> {
        ObjectRef::new(labels::UNINSTALL).within(&self.release_namespace)
    }

    /// Canaries of a namespace.
    #[must_use]
    pub fn canaries_in(&self, namespace: Option<&str>) -> Vec<Arc<Canary>> {
        self.canaries.state_filter(|canary| canary.metadata.namespace.as_deref() == namespace)
    }

    /// Name of the Deployment that owns this Pod through a ReplicaSet.
    #[must_use]
    pub fn deployment_of(&self, pod: &Pod) -> Option<String> {
        let set = owner(pod, "ReplicaSet")?;
        let namespace = pod.metadata.namespace.as_deref()?;
        let set = self.replica_sets.get(&ObjectRef::new(set).within(namespace))?;
        owner(&*set, "Deployment").map(ToOwned::to_owned)
    }

    fn touch_namespace(&self, namespace: Option<&str>) {
        for canary in self.canaries_in(namespace) {
            self.touches.touch(CanaryKey::of(&canary));
        }
    }

    fn touch_target(&self, namespace: Option<&str>, deployment: &str) {
        for canary in self.canaries_in(namespace) {
            if canary.spec.target_ref.name == deployment {
                self.touches.touch(CanaryKey::of(&canary));
            }
        }
    }

    fn touch_users_of(&self, template: &MetricTemplate) {
        let (namespace, name) = (template.namespace(), template.name_any());
        let uses = |canary: &Canary| {
            canary.spec.analysis.iter().flat_map(|analysis| &analysis.metrics).any(|metric| {
                metric.template_ref.as_ref().is_some_and(|reference| {
                    reference.name == name
                        && reference.namespace.as_ref().or(canary.metadata.namespace.as_ref()) == namespace.as_ref()
                })
            })
        };
        for canary in self.canaries.state_filter(uses) {
            self.touches.touch(CanaryKey::of(&canary));
        }
    }
}

/// The Canary that a label names, in the object's own namespace.
fn label<K: Resource>(object: &K, label: &str) -> Option<CanaryKey> {
    let name = object.meta().labels.as_ref()?.get(label)?;
    Some(CanaryKey::new(object.meta().namespace.clone()?, name))
}

/// Name of the controlling owner, if it is of this kind.
fn owner<'a, K: Resource>(object: &'a K, kind: &str) -> Option<&'a str> {
    let owners = object.meta().owner_references.as_ref()?;
    owners.iter().find(|owner| owner.controller == Some(true) && owner.kind == kind).map(|owner| owner.name.as_str())
}

fn prune_metadata<K: Resource>(object: &mut K) {
    let meta = object.meta_mut();
    meta.managed_fields = None;
    if let Some(annotations) = &mut meta.annotations {
        annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
    }
}

/// Of one that is too large there stays what is read of any Deployment but the target of a Canary: who it is, whose, and how many
/// replicas it has. That `spec.template` is not there, which no API server leaves out, tells the target's Canary.
fn prune_deployment(deployment: &mut DynamicObject) {
    prune_metadata(deployment);
    if weight(&deployment.data) + metadata_weight(&deployment.metadata) <= DEPLOYMENT_LIMIT {
        return;
    }
    for part in ["spec", "status"] {
        if let Some(fields) = deployment.data.get_mut(part).and_then(Value::as_object_mut) {
            fields.retain(|field, value| field != "template" && weight(value) <= FIELD_LIMIT);
        }
    }
    let meta = &mut deployment.metadata;
    let ours = [labels::CANARY, labels::REVISION, labels::REPLICAS];
    for map in [&mut meta.labels, &mut meta.annotations].into_iter().flatten() {
        map.retain(|key, value| ours.contains(&key.as_str()) && value.len() <= FIELD_LIMIT);
    }
    meta.finalizers = None;
    // A Deployment of ours has two.
    if let Some(owners) = &mut meta.owner_references {
        owners.truncate(16);
    }
}

/// About how many bytes of memory a value takes: an entry and the smallest allocation of a string, or the smallest node of a map, which
/// has room for eleven entries.
fn weight(value: &Value) -> usize {
    const ENTRY: usize = 64;
    const MAP: usize = 640;
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => ENTRY,
        Value::String(text) => ENTRY + text.len(),
        Value::Array(items) => ENTRY + items.iter().map(weight).sum::<usize>(),
        Value::Object(fields) => MAP + fields.iter().map(|(key, value)| key.len() + weight(value)).sum::<usize>(),
    }
}

/// The same of metadata without `managedFields`.
fn metadata_weight(meta: &ObjectMeta) -> usize {
    const TEXT: usize = 64;
    let maps = [&meta.labels, &meta.annotations].into_iter().flatten().flatten();
    let maps = maps.map(|(key, value)| 2 * TEXT + key.len() + value.len());
    let finalizers = meta.finalizers.iter().flatten().map(|name| TEXT + name.len());
    let owners = meta.owner_references.iter().flatten();
    let owners =
        owners.map(|owner| 4 * TEXT + owner.api_version.len() + owner.kind.len() + owner.name.len() + owner.uid.len());
    maps.chain(finalizers).chain(owners).sum()
}

/// Of one that a Canary owns it has to be seen whether somebody else has written it since.
fn prune_service(service: &mut Service) {
    let owned = service.owner_references().iter().any(|owner| owner.kind == Canary::kind(&()));
    let mut managed = service.metadata.managed_fields.take().unwrap_or_default();
    managed.retain(|entry| {
        owned && entry.subresource.is_none() && entry.manager.as_deref() != Some(labels::FIELD_MANAGER)
    });
    prune_metadata(service);
    service.metadata.managed_fields = Some(managed).filter(|managed| !managed.is_empty());
}

/// What was measured changes all the time, and no room reads it.
fn prune_autoscaler(autoscaler: &mut DynamicObject) {
    prune_metadata(autoscaler);
    if let Some(status) = autoscaler.data.get_mut("status").and_then(Value::as_object_mut) {
        status.retain(|key, _| key == "conditions");
    }
}

fn prune_pod(pod: &mut Pod) {
    prune_metadata(pod);
    if let Some(spec) = &mut pod.spec {
        spec.volumes = None;
        for container in spec.containers.iter_mut().chain(spec.init_containers.iter_mut().flatten()) {
            container.env = None;
            container.env_from = None;
            container.command = None;
            container.args = None;
            container.volume_mounts = None;
        }
    }
}

/// `Api` of one namespace or of all.
fn scoped<K>(client: &Client, namespace: Option<&str>) -> Api<K>
where
    K: Resource<Scope = NamespaceResourceScope>,
    K::DynamicType: Default,
{
    match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

/// A store whose watch has not started yet.
struct Pending<K>
where
    K: Resource + Clone + 'static,
    K::DynamicType: Eq + Hash + Clone,
{
    store: Store<K>,
    progress: Progress,
    writer: Writer<K>,
    api: Api<K>,
    config: watcher::Config,
    prune: fn(&mut K),
    /// Whether its changes raise [`Cache::changes`].
    counts: bool,
}

impl<K> Pending<K>
where
    K: Resource + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
    K::DynamicType: Eq + Hash + Clone + Send + Sync,
{
    fn new(api: Api<K>, resource: K::DynamicType, config: watcher::Config, prune: fn(&mut K)) -> Self {
        let writer = Writer::new(resource);
        let (store, progress) = (writer.as_reader(), Progress::default());
        Self { store, progress, writer, api, config, prune, counts: true }
    }

    /// Its changes say nothing about traffic: the mesh is not built anew for them.
    fn quiet(self) -> Self {
        Self { counts: false, ..self }
    }

    /// Watches for ever: a broken watch is started again with backoff, and the store keeps what it has meanwhile.
    fn run(
        self,
        tasks: &mut JoinSet<()>,
        cache: Cache,
        touch: impl Fn(&Cache, &K, /* gone: */ bool) + Send + Sync + 'static,
    ) {
        let Self { store: _, progress, mut writer, api, config, prune, counts } = self;
        let kind = std::any::type_name::<K>();
        tasks.spawn(async move {
            let mut events = watcher(api, config).default_backoff().boxed();
            // Of the list that is being read.
            let mut listed = Progress::default();
            while let Some(event) = events.next().await {
                let mut event = match event {
                    Ok(event) => event,
                    Err(error) => {
                        tracing::warn!(kind, %error, "watch failed; it is started again");
                        continue;
                    }
                };
                match &mut event {
                    watcher::Event::Apply(object) | watcher::Event::InitApply(object) => prune(object),
                    watcher::Event::Delete(_) | watcher::Event::Init | watcher::Event::InitDone => {}
                }
                writer.apply_watcher_event(&event);
                match &event {
                    watcher::Event::Apply(object) | watcher::Event::Delete(object) => {
                        progress.came(object.meta().resource_version.as_deref());
                    }
                    watcher::Event::Init => listed = Progress::default(),
                    watcher::Event::InitApply(object) => listed.came(object.meta().resource_version.as_deref()),
                    watcher::Event::InitDone => progress.begin_at(&listed),
                }
                match &event {
                    watcher::Event::Apply(object) => touch(&cache, object, false),
                    watcher::Event::Delete(object) => touch(&cache, object, true),
                    // A list that replaces another one does not say what is gone: everybody looks.
                    watcher::Event::InitDone => {
                        for canary in cache.canaries.state() {
                            cache.touches.touch(CanaryKey::of(&canary));
                        }
                    }
                    watcher::Event::Init | watcher::Event::InitApply(_) => continue,
                }
                if counts {
                    cache.changes.send_modify(|count| *count += 1);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeMap;

    use super::*;
    use serde_json::json;

    fn deployment(container: Value) -> DynamicObject {
        serde_json::from_value(json!({
            "apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": {
                "name": "web", "namespace": "shop", "uid": "u", "generation": 3,
                "labels": {"app": "web", "sluice.dev/canary": "web", "sluice.dev/revision": "v1"},
                "annotations": {"sluice.dev/replicas": "4"},
                "ownerReferences": [{"apiVersion": "sluice.dev/v1beta1", "kind": "Canary", "name": "web", "uid": "c", "controller": true}],
            },
            "spec": {
                "replicas": 0, "paused": true, "strategy": {"type": "Recreate"},
                "selector": {"matchLabels": {"app": "web"}},
                "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [container]}},
            },
            "status": {"availableReplicas": 2, "conditions": [{"type": "ReplicaFailure", "status": "True"}]},
        }))
        .unwrap()
    }

    fn kept(deployment: &DynamicObject) -> usize {
        weight(&deployment.data) + metadata_weight(&deployment.metadata)
    }

    #[test]
    fn of_a_deployment_that_is_too_large_all_is_kept_but_its_template() {
        let small = deployment(json!({"name": "app"}));
        for (what, container) in [
            ("args", json!({"name": "app", "args": vec!["a"; 400_000]})),
            ("environment", json!({"name": "app", "env": vec![json!({"name": "a"}); 100_000]})),
            ("one long string", json!({"name": "app", "args": ["a".repeat(1_500_000)]})),
        ] {
            let mut large = deployment(container);
            prune_deployment(&mut large);
            assert!(kept(&large) < 64 * 1024, "{what}: {}", kept(&large));
            let mut wanted = small.clone();
            wanted.data["spec"].as_object_mut().unwrap().remove("template");
            wanted.labels_mut().remove("app");
            assert_eq!(large, wanted, "{what}");
        }
    }

    #[test]
    fn whatever_makes_a_deployment_large_goes() {
        let many = |prefix: &str| (0..200_000).map(|number| (format!("{prefix}{number}"), String::new())).collect();
        let mut labelled = deployment(json!({"name": "app"}));
        labelled.labels_mut().extend::<BTreeMap<_, _>>(many("sluice.dev/"));
        labelled.finalizers_mut().extend(vec!["a/b".to_owned(); 200_000]);
        let mut selecting = deployment(json!({"name": "app"}));
        selecting.data["spec"]["selector"]["matchExpressions"] =
            json!([{"key": "app", "operator": "In", "values": vec!["web"; 200_000]}]);
        let mut owned = deployment(json!({"name": "app"}));
        let owner = owned.owner_references()[0].clone();
        owned.owner_references_mut().extend(vec![owner; 20_000]);
        for mut large in [labelled, selecting, owned] {
            prune_deployment(&mut large);
            assert!(kept(&large) < 64 * 1024, "{}", kept(&large));
            assert_eq!(large.data["spec"]["template"], Value::Null);
            assert_eq!(label(&large, labels::CANARY), Some(CanaryKey::new("shop", "web")));
        }
    }

    #[test]
    fn an_ordinary_deployment_is_kept_as_it_is() {
        let reference =
            |name: String| json!({"name": name, "valueFrom": {"configMapKeyRef": {"name": "web", "key": "a"}}});
        let env: Vec<_> = (0..400).map(|number| reference(format!("VARIABLE_{number}"))).collect();
        let mut ordinary = deployment(json!({"name": "app", "env": env}));
        let before = ordinary.clone();
        prune_deployment(&mut ordinary);
        assert_eq!(ordinary, before);
    }
}
