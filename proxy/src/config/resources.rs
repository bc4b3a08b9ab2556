//! What was accepted, and the snapshot that follows from it.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    net::SocketAddr,
    sync::Arc,
};

use sluice_xds::{
    TypeUrl, UnpackError,
    envoy::{
        config::{
            cluster::v3::Cluster as ClusterMessage, endpoint::v3::ClusterLoadAssignment,
            listener::v3::Listener as ListenerMessage, route::v3::RouteConfiguration,
        },
        service::discovery::v3::Resource,
    },
};

use super::{
    ConfigError, Rejected,
    cluster::{self, Discovery},
    endpoints::{self, Endpoints},
    listener::{self, Protocol as ListenerProtocol},
    route::{self, Action as RouteAction, Routes, Targets},
};
use crate::snapshot::{Action, Cluster, FilterChain, Listener, Mirror, Protocol, Route, Snapshot, Split, Upstream};

/// A resource in the version that the server gave it.
#[derive(Debug, Clone)]
pub(super) struct Held<T> {
    pub(super) version: String,
    pub(super) value: T,
}

/// A resource that names others, so that a new version may have to wait for them while the old one serves.
#[derive(Debug)]
pub(super) struct Staged<T> {
    pub(super) effective: Option<Held<T>>,
    pub(super) pending: Option<Held<T>>,
}

impl<T> Default for Staged<T> {
    fn default() -> Self {
        Self { effective: None, pending: None }
    }
}

impl<T> Staged<T> {
    fn values(&self) -> impl Iterator<Item = &T> {
        [&self.effective, &self.pending].into_iter().flatten().map(|held| &held.value)
    }

    fn newest(&self) -> Option<&Held<T>> {
        self.pending.as_ref().or(self.effective.as_ref())
    }

    fn promote(&mut self) {
        if let Some(held) = self.pending.take() {
            self.effective = Some(held);
        }
    }
}

/// Everything that the control plane told this proxy, as far as it was good.
///
/// A new version of a route or a listener takes effect when all that it names is there; until then the last complete
/// one stays, with the clusters that it needs, even if the control plane has removed them.
///
/// A change of one Service among many costs what it concerns: no route, cluster or assignment that it leaves alone is built or
/// compared anew.
#[derive(Debug, Default)]
pub struct Resources {
    pub(super) clusters: BTreeMap<String, Held<cluster::Cluster>>,
    pub(super) endpoints: BTreeMap<String, Held<Endpoints>>,
    pub(super) listeners: BTreeMap<String, Staged<listener::Listener>>,
    pub(super) routes: BTreeMap<String, Staged<Routes>>,
    /// Why the newest version of a resource does not serve, until a good version comes.
    pub(super) rejected: BTreeMap<TypeUrl, BTreeMap<String, ConfigError>>,
    /// Clusters that are here with their endpoints.
    built: BTreeMap<String, Arc<Cluster>>,
    /// Clusters that are gone or incomplete, in their last good version, because something that serves names them.
    retained: BTreeMap<String, Arc<Cluster>>,
    snapshot: Arc<Snapshot>,
    /// Where this proxy runs; empty if that is not known.
    zone: String,
    changed: Changed,
    /// The listener that was the last to have a port. It may have left it since.
    ports: BTreeMap<u16, String>,
    subscriptions: Arc<Subscriptions>,
}

/// What came, changed or went since the snapshot was built.
#[derive(Debug, Default)]
struct Changed {
    clusters: BTreeSet<String>,
    endpoints: BTreeSet<String>,
    /// Those that went; others are seen when they take effect.
    listeners: BTreeSet<String>,
    /// The subscriptions may be others.
    names: bool,
    /// There may be something that nobody asks for.
    unasked: bool,
}

/// One response of the server.
#[derive(Debug, Clone, Copy)]
pub struct Change<'a> {
    pub kind: TypeUrl,
    pub resources: &'a [Resource],
    pub removed: &'a [String],
}

/// The names to ask for, beside all listeners and clusters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Subscriptions {
    pub endpoints: BTreeSet<String>,
    pub routes: BTreeSet<String>,
}

impl Resources {
    /// Of a proxy in this zone (`Locality.zone`); an empty one is not known.
    #[must_use]
    pub fn in_zone(zone: String) -> Self {
        Self { zone, ..Self::default() }
    }

    #[must_use]
    pub fn zone(&self) -> &str {
        &self.zone
    }

    /// Takes in a response. The returned resources are not in it: they keep their last good version. Call
    /// [`build`](Self::build) to see the effect.
    pub fn update(&mut self, change: Change<'_>) -> Vec<Rejected> {
        for name in change.removed {
            self.remove(change.kind, name);
        }
        let mut rejected = Vec::new();
        for resource in change.resources {
            self.clear_rejected(change.kind, &resource.name);
            if let Err(error) = self.accept(change.kind, resource) {
                self.drop_pending(change.kind, &resource.name);
                let entry = Rejected { name: resource.name.clone(), error };
                self.note_rejected(change.kind, &entry);
                rejected.push(entry);
            }
        }
        rejected
    }

    /// Remembers that the server was told that this resource does not serve. A version that waits goes on waiting.
    pub fn note_rejected(&mut self, kind: TypeUrl, rejected: &Rejected) {
        let refused = self.rejected.entry(kind).or_default();
        refused.insert(rejected.name.clone(), rejected.error.clone());
        self.changed.unasked = true;
    }

    fn clear_rejected(&mut self, kind: TypeUrl, name: &str) {
        if let Some(refused) = self.rejected.get_mut(&kind) {
            refused.remove(name);
        }
    }

    /// A newer version was refused, so the one that waits is no longer wanted either.
    fn drop_pending(&mut self, kind: TypeUrl, name: &str) {
        match kind {
            TypeUrl::Cluster | TypeUrl::Endpoints => {}
            TypeUrl::Listener => {
                if let Some(staged) = self.listeners.get_mut(name) {
                    staged.pending = None;
                    if staged.effective.is_none() {
                        self.listeners.remove(name);
                    }
                    self.changed.names = true;
                }
            }
            TypeUrl::Route => {
                if let Some(staged) = self.routes.get_mut(name) {
                    staged.pending = None;
                }
            }
        }
    }

    fn remove(&mut self, kind: TypeUrl, name: &str) {
        self.clear_rejected(kind, name);
        match kind {
            TypeUrl::Cluster => {
                self.clusters.remove(name);
                self.changed.clusters.insert(name.to_owned());
                self.changed.names = true;
            }
            TypeUrl::Listener => {
                self.listeners.remove(name);
                self.changed.listeners.insert(name.to_owned());
                self.changed.names = true;
            }
            // Both belong to a cluster or a listener that asked for them, and go with it (`build`). The server names
            // them here when it does not have them: until it does, the last good version serves.
            TypeUrl::Endpoints | TypeUrl::Route => {}
        }
    }

    fn accept(&mut self, kind: TypeUrl, resource: &Resource) -> Result<(), ConfigError> {
        let name = resource.name.clone();
        let version = resource.version.clone();
        match kind {
            TypeUrl::Cluster => {
                let message: ClusterMessage = open(resource)?;
                same_name(&name, &message.name, "name")?;
                let value = cluster::parse(&message)?;
                self.changed.clusters.insert(name.clone());
                self.changed.names = true;
                self.clusters.insert(name, Held { version, value });
            }
            TypeUrl::Endpoints => {
                let message: ClusterLoadAssignment = open(resource)?;
                same_name(&name, &message.cluster_name, "cluster_name")?;
                let value = endpoints::parse(&message)?;
                self.changed.endpoints.insert(name.clone());
                self.changed.unasked |= self.endpoints.insert(name, Held { version, value }).is_none();
            }
            TypeUrl::Listener => {
                let message: ListenerMessage = open(resource)?;
                same_name(&name, &message.name, "name")?;
                let value = listener::parse(&message)?;
                self.free_port(&name, value.address)?;
                self.listeners.entry(name).or_default().pending = Some(Held { version, value });
                self.changed.names = true;
            }
            TypeUrl::Route => {
                let message: RouteConfiguration = open(resource)?;
                same_name(&name, &message.name, "name")?;
                let value = route::parse(&message, "")?;
                let staged = self.routes.entry(name).or_default();
                self.changed.unasked |= staged.newest().is_none();
                staged.pending = Some(Held { version, value });
            }
        }
        Ok(())
    }

    /// Two listeners on one port would share its connections by chance.
    fn free_port(&mut self, name: &str, address: SocketAddr) -> Result<(), ConfigError> {
        let port = address.port();
        let last = self.ports.get(&port).filter(|last| *last != name).and_then(|last| self.listeners.get(last));
        if last.is_some_and(|last| last.values().any(|listener| listener.address.port() == port)) {
            return Err(ConfigError::invalid("address", address, "another listener has this port"));
        }
        self.ports.insert(port, name.to_owned());
        Ok(())
    }

    /// The names that are needed now: the same `Arc` as before unless they are others.
    pub fn subscriptions(&mut self) -> Arc<Subscriptions> {
        if mem::take(&mut self.changed.names) {
            self.changed.unasked = true;
            let wanted = self.wanted();
            if wanted != *self.subscriptions {
                self.subscriptions = Arc::new(wanted);
            }
        }
        Arc::clone(&self.subscriptions)
    }

    fn wanted(&self) -> Subscriptions {
        let endpoints = self.clusters.values().filter_map(|held| match &held.value.discovery {
            Discovery::Eds(name) => Some(name.clone()),
            Discovery::Static(_) | Discovery::OriginalDst { .. } => None,
        });
        let listeners = self.listeners.values().flat_map(Staged::values);
        Subscriptions {
            endpoints: endpoints.collect(),
            routes: listeners.flat_map(listener::Listener::routes).map(str::to_owned).collect(),
        }
    }

    /// Name and version of what serves, for `initial_resource_versions`. Versions that wait or were rejected are not
    /// in it, so that the server sends them again.
    #[must_use]
    pub fn versions(&self, kind: TypeUrl) -> BTreeMap<String, String> {
        fn held<T>(of: &BTreeMap<String, Held<T>>) -> BTreeMap<String, String> {
            of.iter().map(|(name, held)| (name.clone(), held.version.clone())).collect()
        }
        fn staged<T>(of: &BTreeMap<String, Staged<T>>) -> BTreeMap<String, String> {
            let effective = of.iter().filter_map(|(name, staged)| Some((name, staged.effective.as_ref()?)));
            effective.map(|(name, held)| (name.clone(), held.version.clone())).collect()
        }
        match kind {
            TypeUrl::Cluster => held(&self.clusters),
            TypeUrl::Endpoints => held(&self.endpoints),
            TypeUrl::Listener => staged(&self.listeners),
            TypeUrl::Route => staged(&self.routes),
        }
    }

    /// How many resources of a type are held, and how many are refused.
    #[must_use]
    pub fn count(&self, kind: TypeUrl) -> (usize, usize) {
        let held = match kind {
            TypeUrl::Cluster => self.clusters.len(),
            TypeUrl::Endpoints => self.endpoints.len(),
            TypeUrl::Listener => self.listeners.len(),
            TypeUrl::Route => self.routes.len(),
        };
        (held, self.rejected.get(&kind).map_or(0, BTreeMap::len))
    }

    /// A stream ended: what waits on it is dropped, because the next stream brings it again.
    pub fn forget_pending(&mut self) {
        for staged in self.listeners.values_mut() {
            staged.pending = None;
        }
        for staged in self.routes.values_mut() {
            staged.pending = None;
        }
        self.listeners.retain(|_, staged| staged.newest().is_some());
        self.rejected.clear();
        self.changed.names = true;
    }

    /// A cluster that the newest version of this resource names and that is not there. Then that version does not
    /// serve.
    #[must_use]
    pub fn missing_cluster(&self, kind: TypeUrl, name: &str) -> Option<&str> {
        let gone = |cluster: &&str| !self.built.contains_key(*cluster);
        match kind {
            TypeUrl::Cluster | TypeUrl::Endpoints => None,
            TypeUrl::Listener => self.listeners.get(name)?.pending.as_ref()?.value.clusters().find(gone),
            TypeUrl::Route => self.routes.get(name)?.pending.as_ref()?.value.clusters().find(gone),
        }
    }

    /// Whether every listener that is known takes connections in its newest version.
    #[must_use]
    pub fn complete(&self) -> bool {
        let refused = self.rejected.get(&TypeUrl::Listener);
        let waiting = |(name, staged): (&String, &Staged<listener::Listener>)| {
            staged.pending.is_some() && refused.is_none_or(|refused| !refused.contains_key(name))
        };
        !self.listeners.iter().any(waiting)
    }

    /// The routes that this listener serves.
    pub fn routes_of(&self, listener: &str) -> impl Iterator<Item = &str> {
        let serves = self.listeners.get(listener).and_then(|staged| staged.effective.as_ref());
        serves.into_iter().flat_map(|held| held.value.routes())
    }

    /// The snapshot of all that is complete. The same `Arc` as before if nothing changed in it, and in a new one the
    /// same `Arc`s for the parts that did not change.
    pub fn build(&mut self) -> Arc<Snapshot> {
        let (clusters, lost) = self.build_clusters();
        let (routes, mut listeners) = self.promote();
        self.prune();
        self.keep_clusters_in_use(lost);
        listeners.append(&mut self.changed.listeners);
        self.note_users(clusters, routes, &mut listeners);

        let mut news = Vec::new();
        for name in listeners {
            let effective = self.listeners.get(&name).and_then(|staged| staged.effective.as_ref());
            let listener = effective.and_then(|held| self.resolve(&name, &held.value));
            let old = self.snapshot.listeners.get(&name);
            if listener.as_ref() != old.map(Arc::as_ref) {
                news.push((name, listener.map(Arc::new)));
            }
        }
        if !news.is_empty() {
            let mut listeners = self.snapshot.listeners.clone();
            for (name, listener) in news {
                match listener {
                    Some(listener) => drop(listeners.insert(name, listener)),
                    None => drop(listeners.remove(&name)),
                }
            }
            self.snapshot = Arc::new(Snapshot { listeners });
        }
        self.snapshot.clone()
    }

    /// As if everything had changed. What [`build`](Self::build) gives must be the same then.
    #[cfg(any(test, sluice_fuzz))]
    pub(crate) fn look_at_all(&mut self) {
        self.changed = Changed {
            clusters: self.clusters.keys().chain(self.built.keys()).cloned().collect(),
            endpoints: self.endpoints.keys().cloned().collect(),
            listeners: self.listeners.keys().chain(self.snapshot.listeners.keys()).cloned().collect(),
            names: true,
            unasked: true,
        };
    }

    /// What [`build`](Self::build) gave last.
    #[must_use]
    pub fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }

    /// Brings `built` to the clusters that are complete. Returns the names of those that are others than before, and those that were
    /// there before.
    fn build_clusters(&mut self) -> (BTreeSet<String>, BTreeMap<String, Arc<Cluster>>) {
        let mut look = mem::take(&mut self.changed.clusters);
        let endpoints = mem::take(&mut self.changed.endpoints);
        if !endpoints.is_empty() {
            let concerned = self.clusters.iter().filter(|(_, held)| match &held.value.discovery {
                Discovery::Eds(service) => endpoints.contains(service),
                Discovery::Static(_) | Discovery::OriginalDst { .. } => false,
            });
            look.extend(concerned.map(|(name, _)| name.clone()));
        }
        let (mut others, mut lost) = (BTreeSet::new(), BTreeMap::new());
        for name in look {
            let new = self.clusters.get(&name).and_then(|held| self.complete_cluster(&name, &held.value));
            let Some(new) = new else {
                if let Some(old) = self.built.remove(&name) {
                    lost.insert(name, old);
                }
                continue;
            };
            match self.retained.remove(&name).or_else(|| self.built.remove(&name)) {
                Some(old) if *old == new => drop(self.built.insert(name, old)),
                Some(_) | None => {
                    others.insert(name.clone());
                    self.built.insert(name, Arc::new(new));
                }
            }
        }
        (others, lost)
    }

    /// `None` without its endpoints.
    fn complete_cluster(&self, name: &str, cluster: &cluster::Cluster) -> Option<Cluster> {
        let zones = cluster.zones.filter(|_| !self.zone.is_empty());
        let fixed = |endpoints: &Endpoints| {
            let near = zones.map_or_else(Vec::new, |least| endpoints::near(endpoints, &self.zone, least));
            (Upstream::Endpoints(endpoints.keys().copied().collect()), near)
        };
        let (upstream, near) = match &cluster.discovery {
            Discovery::Eds(service) => fixed(&self.endpoints.get(service)?.value),
            Discovery::Static(endpoints) => fixed(endpoints),
            Discovery::OriginalDst { port } => (Upstream::OriginalDst { port: *port }, Vec::new()),
        };
        Some(Cluster {
            name: name.to_owned(),
            labels: cluster.labels.clone(),
            upstream,
            near,
            tls: cluster.tls.clone(),
            protocol: cluster.protocol,
            connect_timeout: cluster.connect_timeout,
            traffic: cluster.traffic.clone(),
        })
    }

    /// Puts new versions into effect whose parts are all there: routes first, since listeners need them. Returns the names of both.
    fn promote(&mut self) -> (BTreeSet<String>, BTreeSet<String>) {
        let built = &self.built;
        let ready = |name: &str| built.contains_key(name);
        let mut new_routes = BTreeSet::new();
        for (name, staged) in &mut self.routes {
            if staged.pending.as_ref().is_some_and(|held| held.value.clusters().all(ready)) {
                staged.promote();
                new_routes.insert(name.clone());
            }
        }
        let routes = &self.routes;
        let served = |name: &str| routes.get(name).is_some_and(|staged| staged.effective.is_some());
        let mut new_listeners = BTreeSet::new();
        for (name, staged) in &mut self.listeners {
            let complete =
                |held: &Held<listener::Listener>| held.value.clusters().all(ready) && held.value.routes().all(served);
            if staged.pending.as_ref().is_some_and(complete) {
                staged.promote();
                new_listeners.insert(name.clone());
                // The former version may have had other routes.
                self.changed.names = true;
            }
        }
        for (kind, names) in [(TypeUrl::Route, &new_routes), (TypeUrl::Listener, &new_listeners)] {
            for name in names {
                self.clear_rejected(kind, name);
            }
        }
        (new_routes, new_listeners)
    }

    /// Drops routes and endpoints that nobody asks for any more.
    fn prune(&mut self) {
        let wanted = self.subscriptions();
        if !mem::take(&mut self.changed.unasked) {
            return;
        }
        self.routes.retain(|name, _| wanted.routes.contains(name));
        self.endpoints.retain(|name, _| wanted.endpoints.contains(name));
        for (kind, wanted) in [(TypeUrl::Route, &wanted.routes), (TypeUrl::Endpoints, &wanted.endpoints)] {
            if let Some(refused) = self.rejected.get_mut(&kind) {
                refused.retain(|name, _| wanted.contains(name));
            }
        }
    }

    /// What serves keeps its clusters, whatever was removed or became incomplete meanwhile.
    fn keep_clusters_in_use(&mut self, lost: BTreeMap<String, Arc<Cluster>>) {
        self.retained.extend(lost);
        if self.retained.is_empty() {
            return;
        }
        let listeners = self.listeners.values().filter_map(|staged| staged.effective.as_ref());
        let routes = self.routes.values().filter_map(|staged| staged.effective.as_ref());
        let names =
            listeners.flat_map(|held| held.value.clusters()).chain(routes.flat_map(|held| held.value.clusters()));
        let used: BTreeSet<&str> = names.filter(|name| self.retained.contains_key(*name)).collect();
        self.retained.retain(|name, _| used.contains(name.as_str()));
    }

    /// Adds the listeners that use one of these clusters or routes.
    fn note_users(&self, clusters: BTreeSet<String>, mut routes: BTreeSet<String>, listeners: &mut BTreeSet<String>) {
        let effective = |staged: &Staged<Routes>| {
            staged.effective.as_ref().is_some_and(|held| held.value.clusters().any(|name| clusters.contains(name)))
        };
        if !clusters.is_empty() {
            routes.extend(self.routes.iter().filter(|(_, staged)| effective(staged)).map(|(name, _)| name.clone()));
        }
        if clusters.is_empty() && routes.is_empty() {
            return;
        }
        for (name, staged) in &self.listeners {
            let uses = |held: &Held<listener::Listener>| {
                held.value.routes().any(|name| routes.contains(name))
                    || held.value.clusters().any(|name| clusters.contains(name))
            };
            if staged.effective.as_ref().is_some_and(uses) {
                listeners.insert(name.clone());
            }
        }
    }

    /// `None` if a part is not there, which `promote` and `keep_clusters_in_use` rule out for what is effective.
    fn resolve(&self, name: &str, listener: &listener::Listener) -> Option<Listener> {
        let mut chains = Vec::with_capacity(listener.chains.len());
        for chain in &listener.chains {
            let protocol = match &chain.protocol {
                ListenerProtocol::Rds(route) => {
                    Protocol::Http(self.resolve_routes(&self.routes.get(route)?.effective.as_ref()?.value)?)
                }
                ListenerProtocol::Http(routes) => Protocol::Http(self.resolve_routes(routes)?),
                ListenerProtocol::Tcp(targets) => Protocol::Tcp(self.resolve_split(targets)?),
            };
            let (server_name, tls) = (chain.server_name.clone(), chain.tls.clone());
            chains.push(FilterChain { server_name, tls, protocol, idle: chain.idle });
        }
        let max_connections = listener.max_connections;
        Some(Listener { name: name.to_owned(), address: listener.address, chains, max_connections })
    }

    fn cluster(&self, name: &str) -> Option<&Arc<Cluster>> {
        self.built.get(name).or_else(|| self.retained.get(name))
    }

    fn resolve_routes(&self, routes: &Routes) -> Option<Vec<Route>> {
        let resolved = routes.all.iter().map(|route| {
            let action = self.resolve_action(&route.action)?;
            Some(Route { matches: route.matches.clone(), action })
        });
        resolved.collect()
    }

    fn resolve_action(&self, action: &RouteAction) -> Option<Action> {
        match action {
            RouteAction::Forward { targets, mirrors, policy } => {
                let mirrors = mirrors.iter().map(|mirror| {
                    let cluster = Arc::clone(self.cluster(&mirror.cluster)?);
                    Some(Mirror { cluster, share: mirror.share, marks_host: mirror.marks_host })
                });
                let split = Split { mirrors: mirrors.collect::<Option<_>>()?, ..self.resolve_split(targets)? };
                Some(Action::Forward { split, policy: Arc::clone(policy) })
            }
            RouteAction::Respond(status) => Some(Action::Respond(*status)),
        }
    }

    fn resolve_split(&self, targets: &Targets) -> Option<Split> {
        let targets = targets.iter().map(|(name, weight)| Some((self.cluster(name)?.clone(), *weight)));
        Some(Split { targets: targets.collect::<Option<_>>()?, mirrors: Vec::new() })
    }
}

fn open<M: prost::Message + prost::Name + Default>(resource: &Resource) -> Result<M, ConfigError> {
    let any = resource.resource.as_ref().ok_or_else(|| ConfigError::missing("resource"))?;
    sluice_xds::unpack(any)
        .map_err(|source: UnpackError| ConfigError::Encoding { field: "resource".to_owned(), source })
}

fn same_name(outer: &str, inner: &str, field: &str) -> Result<(), ConfigError> {
    if outer == inner && !outer.is_empty() {
        Ok(())
    } else {
        Err(ConfigError::invalid(field, inner, "it must be the name of the resource"))
    }
}
