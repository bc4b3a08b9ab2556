//! A listener's configuration made ready for one worker thread: handles instead of names.

use std::{
    collections::{HashMap, HashSet},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use http::{StatusCode, request};
use rustls::ServerConfig;

use super::{Shared, cluster::Cluster, load::Admitted, matching, mirror::Mirror, progress::look_every};
use crate::{
    failure::Failure,
    snapshot::{self, FilterChain, Listener, Policy, RouteMatch, ServerTls},
    tls::{ALPN_H2, ALPN_HTTP1},
};

/// The clusters of all listeners: those that are drawn, and those that copies are sent to, which share nothing with them.
#[derive(Default)]
pub(super) struct Clusters {
    drawn: Named,
    mirrors: Named,
}

impl Clusters {
    pub(super) fn all(&self) -> impl Iterator<Item = &Rc<Cluster>> {
        self.drawn.0.values().chain(self.mirrors.0.values()).map(|used| &used.cluster)
    }

    /// Has the clusters of this version of a listener, until it is let go.
    pub(super) fn take_up(&mut self, listener: &Listener, worker: &Shared) {
        for config in drawn(listener).into_values() {
            self.drawn.take_up(config, worker);
        }
        for config in mirrored(listener).into_values() {
            self.mirrors.take_up(config, worker);
        }
    }

    pub(super) fn let_go(&mut self, listener: &Listener) {
        for name in drawn(listener).into_keys() {
            self.drawn.let_go(name);
        }
        for name in mirrored(listener).into_keys() {
            self.mirrors.let_go(name);
        }
    }
}

type Configs<'a> = HashMap<&'a str, &'a Arc<snapshot::Cluster>>;

fn drawn(listener: &Listener) -> Configs<'_> {
    let targets = splits(listener).flat_map(|split| &split.targets);
    targets.map(|(cluster, _)| (cluster.name.as_str(), cluster)).collect()
}

fn mirrored(listener: &Listener) -> Configs<'_> {
    let mirrors = splits(listener).flat_map(|split| &split.mirrors);
    mirrors.map(|mirror| (mirror.cluster.name.as_str(), &mirror.cluster)).collect()
}

fn splits(listener: &Listener) -> impl Iterator<Item = &snapshot::Split> {
    listener.chains.iter().flat_map(|chain| chain.protocol.splits())
}

/// By name.
#[derive(Default)]
struct Named(HashMap<String, Used>);

struct Used {
    cluster: Rc<Cluster>,
    /// How many versions of listeners name it.
    by: usize,
}

impl Named {
    /// In its newest version, with the connections of the one before, as far as they lead to the same endpoints.
    fn take_up(&mut self, config: &Arc<snapshot::Cluster>, worker: &Shared) {
        let Some(used) = self.0.get_mut(&config.name) else {
            let cluster = Rc::new(Cluster::new(Arc::clone(config), None, worker));
            self.0.insert(config.name.clone(), Used { cluster, by: 1 });
            return;
        };
        used.by += 1;
        let same = Arc::ptr_eq(&used.cluster.config, config) || used.cluster.config == *config;
        if !same {
            let new = Cluster::new(Arc::clone(config), Some(&used.cluster), worker);
            let former = std::mem::replace(&mut used.cluster, Rc::new(new));
            retire(&former, Some(&used.cluster));
        }
    }

    fn let_go(&mut self, name: &str) {
        let Some(used) = self.0.get_mut(name) else { return };
        used.by -= 1;
        if used.by == 0
            && let Some(used) = self.0.remove(name)
        {
            retire(&used.cluster, None);
        }
    }
}

/// Lets go of connections to endpoints that are configured no more.
fn retire(former: &Cluster, now: Option<&Rc<Cluster>>) {
    let mut kept = HashSet::new();
    if let Some(now) = now {
        now.each_endpoint(|endpoint| {
            kept.insert(Rc::as_ptr(endpoint));
        });
    }
    former.each_endpoint(|endpoint| {
        if !kept.contains(&Rc::as_ptr(endpoint)) {
            endpoint.retire();
        }
    });
}

pub(super) struct Serving {
    pub(super) listener: Arc<Listener>,
    pub(super) chains: Vec<Rc<Chain>>,
}

pub(super) struct Chain {
    pub(super) server_name: Option<String>,
    pub(super) tls: Option<(ServerTls, Arc<ServerConfig>)>,
    pub(super) protocol: Protocol,
    /// For how long nothing may rest, where its route says nothing else.
    pub(super) idle: Option<Duration>,
}

pub(super) enum Protocol {
    Http(Vec<Route>),
    Tcp(Split),
}

pub(super) struct Route {
    /// `None` is for every request: most ports have one such route, which then costs nothing.
    matches: Option<Box<RouteMatch>>,
    action: Action,
}

pub(super) enum Action {
    /// The policy is this thread's own, with its expressions (`Pattern`).
    Forward {
        split: Split,
        policy: Box<Policy>,
    },
    Respond(StatusCode),
}

/// Clusters that may be drawn, each with the sum of the weights up to and including its own. One with weight 0 is not
/// among them.
pub(super) struct Split {
    targets: Vec<(u32, Rc<Cluster>)>,
    total: u32,
    /// Who gets copies of requests.
    pub(super) mirrors: Vec<Rc<Mirror>>,
    /// Drawn or not, a configured cluster is kept: its series exist, and its connections wait for its weight to rise.
    _configured: Vec<Rc<Cluster>>,
}

impl Serving {
    /// `clusters` holds those of the listener already.
    pub(super) fn new(listener: &Arc<Listener>, clusters: &Clusters, worker: &Shared) -> Self {
        let chains = listener.chains.iter().map(|chain| Rc::new(Chain::new(chain, clusters, worker))).collect();
        Self { listener: Arc::clone(listener), chains }
    }

    /// How often its streams are looked at, if any of them has a limit.
    pub(super) fn look_every(&self) -> Option<Duration> {
        let of_routes = self.chains.iter().flat_map(|chain| match &chain.protocol {
            Protocol::Http(routes) => routes.as_slice(),
            Protocol::Tcp(_) => &[],
        });
        let of_routes = of_routes.filter_map(|route| match &route.action {
            Action::Forward { policy, .. } => policy.stream_idle,
            Action::Respond(_) => None,
        });
        let limits = self.chains.iter().filter_map(|chain| chain.idle).chain(of_routes);
        limits.filter(|limit| !limit.is_zero()).min().map(look_every)
    }

    pub(super) fn speaks_tls(&self) -> bool {
        self.chains.iter().any(|chain| chain.tls.is_some())
    }

    /// The chain for a client that asked for this name: the exact one, else the one for all.
    pub(super) fn chain_for(&self, server_name: Option<&str>) -> Option<&Rc<Chain>> {
        let exact =
            self.chains.iter().find(|chain| chain.server_name.is_some() && chain.server_name.as_deref() == server_name);
        exact.or_else(|| self.chains.iter().find(|chain| chain.server_name.is_none()))
    }

    /// The chain in this configuration that corresponds to one of an earlier configuration.
    pub(super) fn successor(&self, of: &Chain) -> Option<&Rc<Chain>> {
        self.chains.iter().find(|chain| {
            chain.server_name == of.server_name
                && chain.tls.is_some() == of.tls.is_some()
                && matches!(
                    (&chain.protocol, &of.protocol),
                    (Protocol::Http(_), Protocol::Http(_)) | (Protocol::Tcp(_), Protocol::Tcp(_))
                )
        })
    }
}

impl Chain {
    fn new(config: &FilterChain, clusters: &Clusters, worker: &Shared) -> Self {
        let (protocol, alpn): (_, &[&[u8]]) = match &config.protocol {
            snapshot::Protocol::Http(routes) => {
                let routes = routes.iter().map(|route| Route::new(route, clusters, worker)).collect();
                (Protocol::Http(routes), &[ALPN_H2, ALPN_HTTP1])
            }
            snapshot::Protocol::Tcp(split) => (Protocol::Tcp(Split::new(split, clusters, worker)), &[]),
        };
        let tls = config.tls.as_ref().map(|tls| (tls.clone(), worker.identity.server_config(&tls.client_id, alpn)));
        Self { server_name: config.server_name.clone(), tls, protocol, idle: config.idle }
    }
}

impl Route {
    fn new(config: &snapshot::Route, clusters: &Clusters, worker: &Shared) -> Self {
        let action = match &config.action {
            snapshot::Action::Forward { split, policy } => {
                Action::Forward { split: Split::new(split, clusters, worker), policy: Box::new(Policy::clone(policy)) }
            }
            snapshot::Action::Respond(status) => Action::Respond(*status),
        };
        let matches = (!config.matches.is_all()).then(|| Box::new(config.matches.clone()));
        Self { matches, action }
    }

    /// What the first route that matches does.
    pub(super) fn first<'a>(chain: &'a Chain, request: &request::Parts) -> Result<&'a Action, Failure> {
        let Protocol::Http(routes) = &chain.protocol else { return Err(Failure::NoRoute) };
        let tls = chain.tls.is_some();
        let matches = |route: &&Self| route.matches.as_ref().is_none_or(|rule| matching::takes(rule, request, tls));
        routes.iter().find(matches).map(|route| &route.action).ok_or(Failure::NoRoute)
    }
}

impl Split {
    fn new(config: &snapshot::Split, clusters: &Clusters, worker: &Shared) -> Self {
        let mut total: u32 = 0;
        let mut targets = Vec::with_capacity(config.targets.len());
        let mut configured = Vec::with_capacity(config.targets.len());
        for (cluster, weight) in &config.targets {
            let Some(Used { cluster, .. }) = clusters.drawn.0.get(&cluster.name) else {
                continue;
            };
            configured.push(Rc::clone(cluster));
            // Weights of one split sum to 100; saturation keeps a nonsensical one from wrapping to a wrong share.
            let upto = total.saturating_add(*weight);
            if upto > total {
                targets.push((upto, Rc::clone(cluster)));
            }
            total = upto;
        }
        let mirrors = config.mirrors.iter().filter_map(|mirror| {
            let cluster = Rc::clone(&clusters.mirrors.0.get(&mirror.cluster.name)?.cluster);
            Some(Rc::new(Mirror::new(mirror, cluster, worker)))
        });
        Self { targets, total, mirrors: mirrors.collect(), _configured: configured }
    }

    /// One random draw, to be held for the life of the request or connection. A side without endpoints keeps its
    /// share: what it cannot serve fails, and is seen.
    pub(super) fn draw(&self) -> Option<&Rc<Cluster>> {
        match self.targets.as_slice() {
            [] => None,
            [(_, only)] => Some(only),
            [_, _, ..] => self.at(fastrand::u32(..self.total)),
        }
    }

    /// The cluster of whoever has this hash. While the weights stay it stays, and where their sum does and only the last weight
    /// rises, users come to that cluster and none leaves it.
    pub(super) fn drawn_by(&self, hash: u64) -> Option<&Rc<Cluster>> {
        let point = hash.checked_rem(self.total.into())?;
        self.at(u32::try_from(point).ok()?)
    }

    /// For a request that waits before it is drawn: a place at each cluster that has one, since it may be any of theirs.
    ///
    /// # Errors
    /// When none has one.
    pub(super) fn places(&self) -> Result<Vec<Option<Admitted>>, Failure> {
        let places: Vec<_> = self.targets.iter().filter_map(|(_, cluster)| cluster.admit().ok()).collect();
        if places.is_empty() { Err(Failure::Overflow) } else { Ok(places) }
    }

    fn at(&self, point: u32) -> Option<&Rc<Cluster>> {
        self.targets.iter().find(|(upto, _)| point < *upto).map(|(_, cluster)| cluster)
    }
}
