//! Keeps the snapshot, the fleet's ports and the EndpointSlices as the cache says.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Debug,
    hash::Hash,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{ApiResource, DynamicObject, ListParams},
    core::NamespaceResourceScope,
    runtime::reflector::{ObjectRef, Store},
};
use serde::de::DeserializeOwned;
use sluice_crds::{Backend, Canary, labels};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Inputs, RevisionFacts, RevisionKey, Settings, Snapshot, build,
    ports::{self, Allocation, PortKey},
    slices, wanted_ports,
};
use crate::{
    cache::{Cache, CanaryKey, Progress, Touches, autoscaler_resource, deployment_resource, version_number},
    lease::LeaseHandle,
};

/// Least time between two snapshots. The first change after a quiet time is taken in at once.
const COALESCE: Duration = Duration::from_millis(10);
/// Share of a core that building snapshots may take: one part work, so many parts rest.
const REST: u32 = 4;
/// Longest that one call to the API server may take.
const CALL: Duration = Duration::from_secs(10);
/// Objects in one answer of a list.
const PAGE: u32 = 500;
/// Wait after a call that failed.
const RETRY: Duration = Duration::from_secs(1);
/// How often a new leader looks whether its cache has caught up.
const CATCH_UP: Duration = Duration::from_millis(20);
/// After so long without having caught up it lists again: what a watch makes up for by a list of its own it never shows as a change.
const CATCH_UP_ANEW: Duration = Duration::from_secs(2);
/// After so long it says what it waits for.
const CATCH_UP_LATE: Duration = Duration::from_secs(10);

/// Where the facts come from: everything but the ports and the cuts.
type Gather = Arc<dyn Fn() -> Inputs + Send + Sync>;

/// The present snapshot, and the emergency brake. Cheap to clone.
#[derive(Clone)]
pub struct PublisherHandle(Arc<Shared>);

struct Shared {
    gather: Gather,
    ports: Mutex<Ports>,
    cuts: Mutex<BTreeMap<CanaryKey, Cut>>,
    /// Ports of Services for which the fleet has none left.
    without: Mutex<BTreeMap<CanaryKey, Vec<PortKey>>>,
    /// [`Inputs::kept`], of the snapshot before. What is here when a Canary becomes too large is lost with the process: then the fleet
    /// keeps what it holds.
    kept: Mutex<Arc<BTreeMap<CanaryKey, Arc<Canary>>>>,
    snapshot: watch::Sender<Arc<Snapshot>>,
    /// How many snapshots were asked for.
    asked: AtomicU64,
    /// How many of these the newest one was built after.
    building: Mutex<u64>,
    /// Canaries whose traffic a new snapshot carries otherwise than the one before.
    touches: Touches,
}

/// The fleet's ports, as the newest ConfigMap that was read says them.
#[derive(Default)]
struct Ports {
    version: Option<u64>,
    ports: BTreeMap<PortKey, u16>,
}

/// A canary side that was taken off the traffic before the status says so.
#[derive(Debug, Clone, PartialEq)]
struct Cut {
    canary: Option<Backend>,
    /// The Canary's resourceVersion at that moment: it can only be old news.
    seen: Option<String>,
}

impl PublisherHandle {
    /// With nothing published yet.
    #[must_use]
    pub fn new(gather: impl Fn() -> Inputs + Send + Sync + 'static, touches: Touches) -> Self {
        Self(Arc::new(Shared {
            gather: Arc::new(gather),
            ports: Mutex::default(),
            cuts: Mutex::default(),
            without: Mutex::default(),
            kept: Mutex::default(),
            snapshot: watch::Sender::new(Arc::default()),
            asked: AtomicU64::new(0),
            building: Mutex::default(),
            touches,
        }))
    }

    /// The snapshot, now and whenever it changes.
    #[must_use]
    pub fn snapshots(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.0.snapshot.subscribe()
    }

    /// Takes the canary side off the traffic now, without waiting for anybody. It stays off until a status says weight 0 and no mirror
    /// or names another canary.
    pub fn cut(&self, key: &CanaryKey) {
        let inputs = (self.0.gather)();
        let canary = inputs.canaries.iter().find(|canary| CanaryKey::of(canary) == *key);
        let cut = Cut {
            canary: canary.and_then(|canary| canary.status.as_ref()?.traffic.as_ref()?.canary.clone()),
            seen: canary.and_then(|canary| canary.resource_version()),
        };
        {
            let mut cuts = lock(&self.0.cuts);
            if cuts.get(key).is_some_and(|before| before.canary == cut.canary) {
                return;
            }
            cuts.insert(key.clone(), cut);
        }
        self.rebuild();
    }

    /// Ports of this Canary's Services for which the fleet has none left.
    #[must_use]
    pub fn without_port(&self, key: &CanaryKey) -> Vec<PortKey> {
        lock(&self.0.without).get(key).cloned().unwrap_or_default()
    }

    fn set_without_port(&self, without: BTreeMap<CanaryKey, Vec<PortKey>>) {
        let before = std::mem::replace(&mut *lock(&self.0.without), without.clone());
        for key in before.keys().chain(without.keys()).filter(|key| before.get(*key) != without.get(*key)) {
            self.0.touches.touch(key.clone());
        }
    }

    /// The canary side is wanted again, by whoever decides: what the cut was for has passed before a status said it.
    pub fn restore(&self, key: &CanaryKey) {
        if lock(&self.0.cuts).remove(key).is_some() {
            self.rebuild();
        }
    }

    /// A term begins: it decides anew, by what the statuses say.
    pub fn begin_term(&self) {
        lock(&self.0.cuts).clear();
        self.rebuild();
    }

    /// The facts as they are now, with ports and cuts.
    #[must_use]
    pub fn inputs(&self) -> Inputs {
        let mut cuts = lock(&self.0.cuts);
        let mut inputs = (self.0.gather)();
        cuts.retain(|key, cut| still_cut(&inputs, key, cut));
        inputs.cuts = cuts.keys().cloned().collect();
        inputs.ports = lock(&self.0.ports).ports.clone();
        inputs.kept = lock(&self.0.kept).clone();
        inputs
    }

    /// Builds and publishes, if that changes anything. Many who ask at once wait for one build.
    pub fn rebuild(&self) {
        let asked = 1 + self.0.asked.fetch_add(1, Ordering::SeqCst);
        // An older snapshot must never follow a newer one, so the facts are gathered within.
        let mut building = lock(&self.0.building);
        if *building >= asked {
            return;
        }
        *building = self.0.asked.load(Ordering::SeqCst);
        let inputs = self.inputs();
        let next = build(&inputs);
        self.keep(&inputs, &next);
        let published = self.0.snapshot.borrow().clone();
        if next == *published {
            return;
        }
        for canary in next.unsendable.difference(&published.unsendable) {
            tracing::warn!(%canary, "its routes cannot be sent, as its status says; the fleet serves on with those before");
        }
        let keys: BTreeSet<&CanaryKey> = published.canaries.keys().chain(next.canaries.keys()).collect();
        // No report will come of a member that is gone, and each may have waited for it.
        let gone = published.members.keys().any(|uid| !next.members.contains_key(uid));
        let changed = |key: &&CanaryKey| gone || published.canaries.get(*key) != next.canaries.get(*key);
        let changed: Vec<CanaryKey> = keys.into_iter().filter(changed).cloned().collect();
        self.0.snapshot.send_replace(Arc::new(next));
        for key in changed {
            self.0.touches.touch(key);
        }
        tracing::debug!("a new snapshot is published");
    }

    /// Remembers each Canary of which the snapshot has what it says.
    fn keep(&self, inputs: &Inputs, snapshot: &Snapshot) {
        let kept = inputs.canaries.iter().filter_map(|canary| {
            let key = CanaryKey::of(canary);
            let kept = if snapshot.unsendable.contains(&key) { inputs.kept.get(&key)? } else { canary };
            Some((key, kept.clone()))
        });
        *lock(&self.0.kept) = Arc::new(kept.collect());
    }

    /// Takes the ports that the ConfigMap says, and tells whether that changes anything. An older one than is known says nothing.
    fn read_ports(&self, map: &ConfigMap) -> bool {
        let version = version_number(map.metadata.resource_version.as_deref());
        let ports = Allocation::read(map).ports();
        let mut known = lock(&self.0.ports);
        if version < known.version {
            return false;
        }
        known.version = version;
        std::mem::replace(&mut known.ports, ports) != known.ports
    }
}

/// The fleet's ports in the ConfigMap, for whoever writes it.
#[derive(Default)]
struct Written {
    map: Option<ConfigMap>,
    /// What it says or, where somebody has deleted it, what it said last: kube-proxy on every node sends clients to these ports, and
    /// anew they might be given to other Services.
    allocation: Allocation,
}

impl Written {
    /// Whether the cache shows another one, or none any more. What we wrote ourselves is newer than the cache for a moment.
    fn is_old(&self, cached: Option<&str>) -> bool {
        let known = self.map.as_ref().and_then(|map| map.metadata.resource_version.as_deref());
        known != cached && !is_newer(known, cached)
    }

    fn take(&mut self, found: Option<ConfigMap>) {
        match &found {
            Some(map) => self.allocation = Allocation::read(map),
            None if self.map.is_some() => {
                tracing::warn!("ConfigMap {} is gone; the leader writes it again as it was", ports::CONFIG_MAP);
            }
            None => {}
        }
        self.map = found;
    }

    /// Where it was gone before this replica could read it, the EndpointSlices say what it said.
    fn find(&mut self, inputs: &Inputs) {
        if self.map.is_none() && self.allocation.is_empty() {
            self.allocation = Allocation::of(&slices::carried(inputs));
        }
    }

    fn says(&self, allocation: &Allocation) -> bool {
        match &self.map {
            Some(_) => self.allocation == *allocation,
            None => allocation.is_empty(),
        }
    }
}

fn still_cut(inputs: &Inputs, key: &CanaryKey, cut: &Cut) -> bool {
    let Some(canary) = inputs.canaries.iter().find(|canary| CanaryKey::of(canary) == *key) else {
        return false;
    };
    let Some(traffic) = canary.status.as_ref().and_then(|status| status.traffic.as_ref()) else {
        return false;
    };
    // Whoever cuts may know of a status that our cache does not have yet: that nothing reaches it counts only if it is news.
    let nothing = traffic.weight == 0 && traffic.mirror == 0;
    let caught_up = nothing && canary.resource_version() != cut.seen;
    !caught_up && (traffic.canary == cut.canary || cut.canary.is_none())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Does the work. Every replica runs one.
pub struct Publisher {
    handle: PublisherHandle,
    cache: Cache,
    client: Client,
    lease: LeaseHandle,
    settings: Arc<Settings>,
}

impl Publisher {
    /// `client` should not retry by itself.
    #[must_use]
    pub fn new(client: Client, cache: Cache, lease: LeaseHandle, settings: Settings) -> (Self, PublisherHandle) {
        let settings = Arc::new(settings);
        let (of, with) = (cache.clone(), settings.clone());
        let handle = PublisherHandle::new(move || gather(&of, with.clone()), cache.touches.clone());
        (Self { handle: handle.clone(), cache, client, lease, settings }, handle)
    }

    /// Until `stop`. The cache should be warm. `term` is `Some` while this replica leads and has caught up.
    pub async fn run(self, term: watch::Receiver<Option<u64>>, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.publish() => {}
            () = self.keep_ports(term.clone()) => {}
            () = self.keep_slices(term) => {}
        }
    }

    /// Whether this replica leads, with a cache that is recent enough to decide by.
    fn leads(&self, term: &watch::Receiver<Option<u64>>) -> bool {
        term.borrow().is_some() && self.lease.may_write()
    }

    async fn publish(&self) {
        let mut changes = self.cache.changes();
        loop {
            changes.mark_unchanged();
            let before = Instant::now();
            self.handle.rebuild();
            let rest = COALESCE.max(before.elapsed() * REST);
            sleep_until(before + rest).await;
            if changes.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// Reads the ConfigMap whenever it changed; the leader writes it when a Service comes or goes.
    async fn keep_ports(&self, mut terms: watch::Receiver<Option<u64>>) {
        let namespace = &self.settings.release_namespace;
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), namespace);
        let reference = ObjectRef::new(ports::CONFIG_MAP).within(namespace);
        let mut changes = self.cache.changes();
        let mut known = Written::default();
        let mut read = false;
        let mut told = false;
        loop {
            changes.mark_unchanged();
            terms.mark_unchanged();
            let mut again: Option<Instant> = None;
            let cached = self.cache.config_maps.get(&reference).and_then(|meta| meta.resource_version());
            if !read || known.is_old(cached.as_deref()) {
                match within(api.get_opt(ports::CONFIG_MAP)).await {
                    Ok(found) => {
                        known.take(found);
                        read = true;
                        told = false;
                    }
                    Err(error) => {
                        // Once for each time that it cannot be reached, not once a second.
                        if !std::mem::replace(&mut told, true) {
                            tracing::warn!(%error, "ConfigMap {namespace}/{} could not be read; it is tried again", ports::CONFIG_MAP);
                        }
                        again = Some(Instant::now() + RETRY);
                    }
                }
            }
            if read && again.is_none() && self.leads(&terms) {
                let now = Timestamp::now();
                let inputs = self.handle.inputs();
                known.find(&inputs);
                let wanted = wanted_ports(&inputs);
                let settled = known.allocation.settle(&wanted.keys().cloned().collect(), now);
                let mut without: BTreeMap<CanaryKey, Vec<PortKey>> = BTreeMap::new();
                for port in &settled.without {
                    if let Some(canary) = wanted.get(port) {
                        without.entry(canary.clone()).or_default().push(port.clone());
                    }
                }
                self.handle.set_without_port(without);
                if !known.says(&settled.allocation) {
                    match within(ports::write(&self.client, namespace, known.map.as_ref(), &settled.allocation)).await {
                        Ok(written) => known.take(Some(written)),
                        Err(error) => {
                            tracing::warn!(%error, "the fleet's ports could not be written");
                            // It is no longer what we saw, or we do not know whether we wrote it.
                            read = false;
                            again = Some(Instant::now() + RETRY);
                        }
                    }
                } else if let Some(at) = settled.again_at {
                    let wait = Duration::try_from(at.duration_since(now)).unwrap_or_default() + RETRY;
                    again = Some(Instant::now() + wait);
                }
            }
            if known.map.as_ref().is_some_and(|map| self.handle.read_ports(map)) {
                self.handle.rebuild();
            }
            tokio::select! {
                result = changes.changed() => if result.is_err() { return std::future::pending().await },
                Ok(()) = terms.changed() => {}
                () = maybe(again) => {}
            }
            // Others change the cache all the time; a new Service may wait this long.
            tokio::time::sleep(COALESCE).await;
        }
    }

    async fn keep_slices(&self, mut terms: watch::Receiver<Option<u64>>) {
        let mut changes = self.cache.changes();
        let mut snapshots = self.handle.snapshots();
        let mut writer = slices::Writer::new(self.client.clone());
        let mut awake = Instant::now();
        let mut again: Option<Instant> = None;
        loop {
            // Wakes up often enough to notice that it did not run: then the cache may be as old as that.
            let nap = Instant::now() + slices::STALL / 5;
            tokio::select! {
                result = changes.changed() => if result.is_err() { return std::future::pending().await },
                // A port that was written down lets slices be written.
                Ok(()) = snapshots.changed() => {}
                Ok(()) = terms.changed() => {}
                () = maybe(again) => {}
                () = sleep_until(nap) => {
                    if awake.elapsed() < slices::STALL && again.is_none_or(|at| at > Instant::now()) {
                        awake = Instant::now();
                        continue;
                    }
                }
            }
            let stalled = awake.elapsed() >= slices::STALL;
            if stalled {
                tracing::warn!(stalled = ?awake.elapsed(), "this replica stood still: it catches up before it writes slices");
            }
            // One that does not lead may see what is wrong by a watch, and not yet by another one why it is right.
            let doubts = stalled || (!self.leads(&terms) && writer.is_due(&self.handle.inputs()));
            if doubts && let Err(error) = self.catch_up().for_slices().await {
                tracing::warn!(%error, "catching up failed; it is tried again");
                tokio::time::sleep(RETRY).await;
                continue;
            }
            changes.mark_unchanged();
            snapshots.mark_unchanged();
            terms.mark_unchanged();
            again = writer.round(&self.handle.inputs(), self.leads(&terms)).await;
            awake = Instant::now();
            tokio::time::sleep(COALESCE).await;
        }
    }

    /// For a new leader: see [`CatchUp::run`].
    #[must_use]
    pub fn catch_up(&self) -> CatchUp {
        CatchUp {
            client: self.client.clone(),
            cache: self.cache.clone(),
            settings: self.settings.clone(),
            handle: self.handle.clone(),
        }
    }
}

/// Brings the snapshot up to date with the quorum.
#[derive(Clone)]
pub struct CatchUp {
    client: Client,
    cache: Cache,
    settings: Arc<Settings>,
    handle: PublisherHandle,
}

impl CatchUp {
    /// Waits until all of the cache is at least as new as this call: lists from the quorum what a look at a Canary decides by, and
    /// compares; then rebuilds. A new leader does this before it serves: by an older template than the last leader's it would take
    /// a release back.
    ///
    /// # Errors
    /// If the API server cannot be asked.
    pub async fn run(&self) -> Result<(), CatchUpError> {
        tokio::try_join!(self.traffic(), Box::pin(self.objects()))?;
        self.handle.rebuild();
        Ok(())
    }

    /// The same of what a snapshot and EndpointSlices are made of alone. A replica that does not lead may do this often.
    ///
    /// # Errors
    /// If the API server cannot be asked.
    pub async fn for_slices(&self) -> Result<(), CatchUpError> {
        self.traffic().await?;
        self.handle.rebuild();
        Ok(())
    }

    async fn traffic(&self) -> Result<(), CatchUpError> {
        let cache = &self.cache;
        tokio::try_join!(
            self.caught_up(&cache.canaries, &cache.canaries_progress),
            self.caught_up(&cache.services, &cache.services_progress),
            self.caught_up(&cache.pods, &cache.pods_progress),
            self.read_ports(),
        )?;
        Ok(())
    }

    /// One kind after the other: a page of each at once would take much memory.
    async fn objects(&self) -> Result<(), CatchUpError> {
        let (cache, all) = (&self.cache, ListParams::default());
        let resource = deployment_resource();
        let deployments = self.untyped(&resource);
        caught_up(&deployments, &resource, &all, &cache.deployments, &cache.deployments_progress).await?;
        self.caught_up(&cache.replica_sets, &cache.replica_sets_progress).await?;
        let ours = ListParams::default().labels(labels::CANARY);
        caught_up(&self.api(), &(), &ours, &cache.revisions, &cache.revisions_progress).await?;
        self.caught_up(&cache.slices, &cache.slices_progress).await?;
        let resource = autoscaler_resource();
        let autoscalers = self.untyped(&resource);
        caught_up(&autoscalers, &resource, &all, &cache.autoscalers, &cache.autoscalers_progress).await?;
        self.caught_up(&cache.metric_templates, &cache.metric_templates_progress).await?;
        self.caught_up(&cache.config_maps, &cache.config_maps_progress).await?;
        if let Some(secrets) = &cache.secrets {
            self.caught_up(secrets, &cache.secrets_progress).await?;
        }
        if let Some(namespaces) = &cache.namespaces {
            let api = Api::all(self.client.clone());
            caught_up(&api, &(), &all, namespaces, &cache.namespaces_progress).await?;
        }
        Ok(())
    }

    async fn caught_up<K>(&self, store: &Store<K>, progress: &Progress) -> Result<(), CatchUpError>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned + 'static,
    {
        caught_up(&self.api(), &(), &ListParams::default(), store, progress).await
    }

    fn api<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        match &self.settings.watched_namespace {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        }
    }

    fn untyped(&self, resource: &ApiResource) -> Api<DynamicObject> {
        match &self.settings.watched_namespace {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, resource),
            None => Api::all_with(self.client.clone(), resource),
        }
    }

    /// A snapshot without them would close the ports of all Services.
    async fn read_ports(&self) -> Result<(), CatchUpError> {
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), &self.settings.release_namespace);
        let read = within(api.get_opt(ports::CONFIG_MAP)).await;
        if let Some(map) = read.map_err(|source| CatchUpError { kind: "the fleet's ports".to_owned(), source })? {
            self.handle.read_ports(&map);
        }
        Ok(())
    }

    /// Lets a term begin.
    pub fn begin_term(&self) {
        self.handle.begin_term();
    }
}

/// Waits until a store shows what the API server lists of its kind now.
async fn caught_up<K>(
    api: &Api<K>,
    resource: &K::DynamicType,
    which: &ListParams,
    store: &Store<K>,
    progress: &Progress,
) -> Result<(), CatchUpError>
where
    K: Resource + Clone + Debug + DeserializeOwned + 'static,
    K::DynamicType: Eq + Hash + Clone,
{
    let kind = K::plural(resource);
    let began = Instant::now();
    let mut told = false;
    loop {
        let listed = Instant::now();
        let list = Listed::read(api, which).await.map_err(|source| CatchUpError { kind: kind.to_string(), source })?;
        while listed.elapsed() < CATCH_UP_ANEW {
            if progress.is_past(list.version.as_deref()) || list.is_shown_by(store, resource) {
                return Ok(());
            }
            tokio::time::sleep(CATCH_UP).await;
        }
        if began.elapsed() >= CATCH_UP_LATE && !std::mem::replace(&mut told, true) {
            tracing::warn!(%kind, "the watch is behind what the API server lists: this replica waits for it");
        }
    }
}

/// What of all objects of a kind tells whether a store shows them.
#[derive(Default)]
struct Listed {
    version: Option<String>,
    /// By namespace and name, its resourceVersion.
    items: BTreeMap<(Option<String>, String), Option<String>>,
}

impl Listed {
    /// By pages: the metadata of ten thousand Pods, with who manages which field, takes hundreds of megabytes.
    async fn read<K>(api: &Api<K>, which: &ListParams) -> Result<Self, CallError>
    where
        K: Resource + Clone + Debug + DeserializeOwned,
    {
        let mut listed = Self::default();
        // No resourceVersion: a read from the quorum. Further pages are of the same moment.
        let mut params = which.clone().limit(PAGE);
        loop {
            let page = within(api.list_metadata(&params)).await?;
            let items = page.items.into_iter();
            listed.items.extend(items.map(|item| ((item.namespace(), item.name_any()), item.resource_version())));
            listed.version = page.metadata.resource_version;
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params = params.continue_token(&token),
                None => return Ok(listed),
            }
        }
    }

    /// It never may, if something of it was deleted before the store had the rest of it.
    fn is_shown_by<K>(&self, store: &Store<K>, resource: &K::DynamicType) -> bool
    where
        K: Resource + Clone + 'static,
        K::DynamicType: Eq + Hash + Clone,
    {
        let behind = self.items.iter().any(|((namespace, name), wanted)| {
            let reference =
                ObjectRef::new_with(name, resource.clone()).within(namespace.as_deref().unwrap_or_default());
            store.get(&reference).is_none_or(|cached| {
                let cached = cached.resource_version();
                cached != *wanted && !is_newer(cached.as_deref(), wanted.as_deref())
            })
        });
        // What the store has, the list does not, and is no newer than the list, was deleted before it.
        let gone = |cached: &Arc<K>| {
            !self.items.contains_key(&(cached.namespace(), cached.name_any()))
                && !is_newer(cached.resource_version().as_deref(), self.version.as_deref())
        };
        !behind && !store.state().iter().any(gone)
    }
}

/// Why a replica cannot know that its cache is recent.
#[derive(Debug, thiserror::Error)]
#[error("reading {kind} from the API server failed: {source}")]
pub struct CatchUpError {
    kind: String,
    #[source]
    source: CallError,
}

#[derive(Debug, thiserror::Error)]
enum CallError {
    #[error("no answer in {CALL:?}")]
    Timeout,
    #[error(transparent)]
    Api(#[from] kube::Error),
    #[error(transparent)]
    Ports(#[from] ports::WriteError),
}

async fn within<T, E>(call: impl Future<Output = Result<T, E>>) -> Result<T, CallError>
where
    CallError: From<E>,
{
    Ok(timeout(CALL, call).await.map_err(|_| CallError::Timeout)??)
}

async fn maybe(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

fn is_newer(one: Option<&str>, than: Option<&str>) -> bool {
    version_number(one).zip(version_number(than)).is_some_and(|(one, than)| one > than)
}

/// The facts as the cache has them.
fn gather(cache: &Cache, settings: Arc<Settings>) -> Inputs {
    let mut inputs = Inputs::empty(settings);
    inputs.canaries = cache.canaries.state();
    inputs.services = cache.services.state();
    inputs.pods = cache.pods.state_filter(|pod| {
        let labels = pod.labels();
        labels.contains_key(labels::REVISION) || labels.contains_key(labels::FLEET)
    });
    inputs.slices = cache.slices.state_filter(slices::is_of_sluice);
    for record in cache.revisions.state() {
        let (Some(namespace), Some(canary), Some(revision)) =
            (record.namespace(), record.labels().get(labels::CANARY), record.labels().get(labels::REVISION))
        else {
            continue;
        };
        let Some(template) = record.data.as_ref().and_then(|data| data.0.get("template")) else {
            continue;
        };
        let key = RevisionKey { canary: CanaryKey::new(namespace, canary), revision: revision.clone() };
        inputs.revisions.insert(key, RevisionFacts::of_template(template));
    }
    for canary in &inputs.canaries {
        let traffic = canary.status.as_ref().and_then(|status| status.traffic.as_ref());
        let original = traffic.is_some_and(|traffic| {
            traffic.primary.is_original() || traffic.canary.as_ref().is_some_and(Backend::is_original)
        });
        if original {
            let key = CanaryKey::of(canary);
            let target = &canary.spec.target_ref.name;
            // By owner: the selectors of Services and of the target match Pods of revisions too.
            let pods = cache.pods.state_filter(|pod| {
                pod.metadata.namespace.as_deref() == Some(key.namespace.as_str())
                    && !pod.labels().contains_key(labels::REVISION)
                    && cache.deployment_of(pod).as_ref() == Some(target)
            });
            inputs.originals.insert(key, pods);
        }
    }
    inputs
}

#[cfg(test)]
mod tests;
