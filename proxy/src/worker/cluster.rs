//! One revision's endpoints as a worker thread sees them, and the choice among them.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
};

use http::Response;
use tokio::time::Instant;

use super::{
    Shared,
    health::Seen,
    load::{Admitted, Load},
    pool::{Connector, Endpoint, Wire},
};
use crate::{
    failure::Failure,
    metrics::RevisionMetrics,
    snapshot::{self, Outliers, SlowStart, UpstreamProtocol},
};

pub(super) struct Cluster {
    pub(super) config: Arc<snapshot::Cluster>,
    pub(super) metrics: Option<RevisionMetrics>,
    pub(super) connector: Rc<Connector>,
    pub(super) load: Rc<Load>,
    /// Copies of requests that are under way to a mirror.
    pub(super) copies: Rc<Cell<u32>>,
    endpoints: Endpoints,
}

enum Endpoints {
    Fixed {
        all: Vec<Rc<Endpoint>>,
        /// Those that are preferred; empty if all are alike.
        near: Vec<Rc<Endpoint>>,
    },
    /// Made when first dialled; there are no more than this Pod has addresses.
    OriginalDst { port: u16, known: RefCell<HashMap<SocketAddr, Rc<Endpoint>>> },
}

impl Cluster {
    /// Takes over from `previous`, the cluster of the same name, all that did not change: pools, load counters, series.
    pub(super) fn new(config: Arc<snapshot::Cluster>, previous: Option<&Self>, worker: &Shared) -> Self {
        let metrics = config.labels.as_ref().map(|labels| worker.metrics.revision(labels, worker.thread));
        let connector = Rc::new(Connector::new(&config, worker));
        let copies = previous.map(|previous| Rc::clone(&previous.copies)).unwrap_or_default();
        let load = previous.map_or_else(Rc::default, |previous| Rc::clone(&previous.load));
        load.limit(config.traffic.limits, worker.metrics.threads());
        // Connections made under another TLS identity are not those that were asked for.
        let previous = previous.filter(|previous| previous.config.tls == config.tls);
        let endpoints = match &config.upstream {
            snapshot::Upstream::Endpoints(addresses) => {
                let known: HashMap<SocketAddr, &Rc<Endpoint>> = match previous.map(|previous| &previous.endpoints) {
                    Some(Endpoints::Fixed { all, .. }) => {
                        all.iter().map(|endpoint| (endpoint.address, endpoint)).collect()
                    }
                    Some(Endpoints::OriginalDst { .. }) | None => HashMap::new(),
                };
                // The first endpoints of a cluster have no others to be spared by.
                let joined = config.traffic.slow_start.filter(|_| !known.is_empty()).map(|_| Instant::now());
                let endpoint = |address: &SocketAddr| {
                    known.get(address).map_or_else(
                        || {
                            let endpoint = Endpoint::new(*address, &load);
                            endpoint.joined.set(joined);
                            endpoint
                        },
                        |endpoint| Rc::clone(endpoint),
                    )
                };
                let all: Vec<_> = addresses.iter().map(endpoint).collect();
                let is_near = |endpoint: &&Rc<Endpoint>| config.near.binary_search(&endpoint.address).is_ok();
                let near = all.iter().filter(is_near).cloned().collect();
                Endpoints::Fixed { all, near }
            }
            snapshot::Upstream::OriginalDst { port } => {
                let known = match previous.map(|previous| &previous.endpoints) {
                    Some(Endpoints::OriginalDst { port: before, known }) if before == port => known.clone(),
                    Some(Endpoints::OriginalDst { .. } | Endpoints::Fixed { .. }) | None => RefCell::default(),
                };
                Endpoints::OriginalDst { port: *port, known }
            }
        };
        let cluster = Self { config, metrics, connector, load, copies, endpoints };
        cluster.each_endpoint(|endpoint| endpoint.limit(cluster.config.traffic.connections));
        cluster
    }

    /// What its endpoints are spoken to with, for a client that speaks `downstream`.
    pub(super) fn wire(&self, downstream: Wire) -> Wire {
        match self.config.protocol {
            UpstreamProtocol::Downstream => downstream,
            UpstreamProtocol::Http1 => Wire::Http1,
            UpstreamProtocol::Http2 => Wire::Http2,
        }
    }

    /// A request was drawn for this cluster, or may be yet. It may be one too many.
    pub(super) fn admit(&self) -> Result<Option<Admitted>, Failure> {
        self.load.request()
    }

    /// Whether another endpoint could be tried after one has failed.
    pub(super) fn has_alternatives(&self) -> bool {
        match &self.endpoints {
            Endpoints::Fixed { all, .. } => all.len() > 1,
            Endpoints::OriginalDst { .. } => false,
        }
    }

    /// An endpoint that is not in `excluded`: the less busy of two drawn at random (power of two choices), of those in this
    /// zone where they are preferred. `local` is the address that the downstream connection was made to.
    pub(super) fn pick(&self, excluded: &[SocketAddr], local: SocketAddr) -> Option<Rc<Endpoint>> {
        let (endpoints, near) = match &self.endpoints {
            Endpoints::Fixed { all, near } => (all, near),
            Endpoints::OriginalDst { port, known } => {
                let address = SocketAddr::new(local.ip(), *port);
                if excluded.contains(&address) {
                    return None;
                }
                let mut known = known.borrow_mut();
                return Some(Rc::clone(known.entry(address).or_insert_with(|| {
                    let endpoint = Endpoint::new(address, &self.load);
                    endpoint.limit(self.config.traffic.connections);
                    endpoint
                })));
            }
        };
        if excluded.is_empty()
            && let preferred = if near.is_empty() { endpoints } else { near }
            && let chosen = self.less_busy(preferred.len(), |index| &preferred[index])
            && chosen.as_ref().is_none_or(|chosen| !chosen.health.is_doubtful())
        {
            return chosen;
        }
        let left: Vec<_> = endpoints.iter().filter(|endpoint| !excluded.contains(&endpoint.address)).collect();
        let now = Instant::now();
        let is_good = |endpoint: &&Rc<Endpoint>| !endpoint.health.is_ejected(now);
        let good: Vec<_> = left.iter().copied().filter(is_good).collect();
        let good_near: Vec<_> =
            near.iter().filter(|endpoint| !excluded.contains(&endpoint.address)).filter(is_good).collect();
        let left = if !good_near.is_empty() && good_near.len() * 2 >= near.len() {
            // With fewer of them left, those would have to bear too much of this zone.
            good_near
        } else if good.is_empty() || self.panics(endpoints, now) {
            left
        } else {
            good
        };
        let chosen = self.less_busy(left.len(), |index| left[index])?;
        chosen.health.chosen(now);
        Some(chosen)
    }

    fn less_busy<'a>(&self, count: usize, at: impl Fn(usize) -> &'a Rc<Endpoint>) -> Option<Rc<Endpoint>> {
        if count < 2 {
            return (count == 1).then(|| Rc::clone(at(0)));
        }
        let first = fastrand::usize(..count);
        // The second of the remaining ones, so that the two differ.
        let second = (first + fastrand::usize(1..count)) % count;
        let (first, second) = (at(first), at(second));
        let (chosen, other) =
            if second.outstanding() < first.outstanding() { (second, first) } else { (first, second) };
        let takes = self.config.traffic.slow_start.is_none_or(|policy| takes(chosen, policy));
        Some(Rc::clone(if takes { chosen } else { other }))
    }

    /// Whether so few endpoints are left that all are used (`healthy_panic_threshold`).
    fn panics(&self, endpoints: &[Rc<Endpoint>], now: Instant) -> bool {
        let Some(outliers) = &self.config.traffic.outliers else { return false };
        let left = endpoints.iter().filter(|endpoint| !endpoint.health.is_ejected(now)).count();
        share(left, endpoints.len()) < outliers.panic
    }

    /// An endpoint has answered.
    pub(super) fn answered<B>(&self, endpoint: &Endpoint, answer: &Response<B>, grpc: bool) {
        endpoint.health.reached();
        if let Some(outliers) = &self.config.traffic.outliers {
            self.judge(endpoint, Seen::of(answer, grpc), outliers);
        }
    }

    /// An endpoint could be connected to, and nothing else is known of it.
    pub(super) fn reached(&self, endpoint: &Endpoint) {
        endpoint.health.reached();
        if let Some(outliers) = &self.config.traffic.outliers {
            self.judge(endpoint, Seen::Good, outliers);
        }
    }

    /// An endpoint was reached and did not answer.
    pub(super) fn unanswered(&self, endpoint: &Endpoint) {
        if let Some(outliers) = &self.config.traffic.outliers {
            self.judge(endpoint, Seen::NoAnswer, outliers);
        }
    }

    /// No connection could be made to an endpoint. Where most cannot be reached it is rather this proxy that is cut off: never
    /// more than half are left alone for it.
    pub(super) fn unreachable(&self, endpoint: &Endpoint) {
        let now = Instant::now();
        if self.may_eject(endpoint, 50, now) {
            endpoint.health.unreachable(now);
        }
        self.unanswered(endpoint);
    }

    fn judge(&self, endpoint: &Endpoint, seen: Seen, outliers: &Outliers) {
        if !endpoint.health.record(seen, outliers) {
            return;
        }
        let now = Instant::now();
        if self.may_eject(endpoint, outliers.most_ejected, now) {
            let time = endpoint.health.eject(outliers, now);
            tracing::info!(cluster = self.config.name, endpoint = %endpoint.address, ?time, ?seen, "endpoint ejected");
        }
    }

    /// Whether no more than so many per cent are ejected with this one.
    fn may_eject(&self, endpoint: &Endpoint, most: u32, now: Instant) -> bool {
        let Endpoints::Fixed { all: endpoints, .. } = &self.endpoints else { return false };
        let others =
            endpoints.iter().filter(|other| other.address != endpoint.address && other.health.is_ejected(now)).count();
        share(others + 1, endpoints.len()) <= f64::from(most)
    }

    pub(super) fn each_endpoint(&self, mut visit: impl FnMut(&Rc<Endpoint>)) {
        match &self.endpoints {
            Endpoints::Fixed { all, .. } => all.iter().for_each(visit),
            Endpoints::OriginalDst { known, .. } => known.borrow().values().for_each(&mut visit),
        }
    }
}

/// Per cent.
#[expect(clippy::cast_precision_loss, reason = "numbers of endpoints")]
fn share(some: usize, all: usize) -> f64 {
    some as f64 * 100.0 / all as f64
}

/// Whether an endpoint that may be new among others takes this request: the more often the longer it is there.
fn takes(endpoint: &Endpoint, policy: SlowStart) -> bool {
    let Some(joined) = endpoint.joined.get() else { return true };
    let share = joined.elapsed().div_duration_f64(policy.window);
    if share >= 1.0 {
        endpoint.joined.set(None);
    }
    fastrand::f64() < share.max(policy.least)
}
