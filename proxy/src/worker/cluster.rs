//! One revision's endpoints as a worker thread sees them, and the choice among them.

use std::{
    cell::RefCell,
    collections::HashMap,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
};

use tokio::time::Instant;

use super::{
    Shared,
    load::{Admitted, Load},
    pool::{Connector, Endpoint},
};
use crate::{failure::Failure, metrics::RevisionMetrics, snapshot};

pub(super) struct Cluster {
    pub(super) config: Arc<snapshot::Cluster>,
    pub(super) metrics: Option<RevisionMetrics>,
    pub(super) connector: Rc<Connector>,
    pub(super) load: Rc<Load>,
    endpoints: Endpoints,
}

enum Endpoints {
    Fixed(Vec<Rc<Endpoint>>),
    /// Made when first dialled; there are no more than this Pod has addresses.
    OriginalDst {
        port: u16,
        known: RefCell<HashMap<SocketAddr, Rc<Endpoint>>>,
    },
}

impl Cluster {
    /// Takes over from `previous`, the cluster of the same name, all that did not change: pools, load counters, series.
    pub(super) fn new(config: Arc<snapshot::Cluster>, previous: Option<&Self>, worker: &Shared) -> Self {
        let metrics = config.labels.as_ref().map(|labels| worker.metrics.revision(labels, worker.thread));
        let connector = Rc::new(Connector::new(&config, worker));
        let load = previous.map_or_else(Rc::default, |previous| Rc::clone(&previous.load));
        load.limit(config.traffic.limits, worker.metrics.threads());
        // Connections made under another TLS identity are not those that were asked for.
        let previous = previous.filter(|previous| previous.config.tls == config.tls);
        let endpoints = match &config.upstream {
            snapshot::Upstream::Endpoints(addresses) => {
                let known: HashMap<SocketAddr, &Rc<Endpoint>> = match previous.map(|previous| &previous.endpoints) {
                    Some(Endpoints::Fixed(list)) => list.iter().map(|endpoint| (endpoint.address, endpoint)).collect(),
                    Some(Endpoints::OriginalDst { .. }) | None => HashMap::new(),
                };
                let endpoint = |address| known.get(address).map_or_else(|| Endpoint::new(*address, &load), |e| Rc::clone(e));
                Endpoints::Fixed(addresses.iter().map(endpoint).collect())
            }
            snapshot::Upstream::OriginalDst { port } => {
                let known = match previous.map(|previous| &previous.endpoints) {
                    Some(Endpoints::OriginalDst { port: before, known }) if before == port => known.clone(),
                    Some(Endpoints::OriginalDst { .. } | Endpoints::Fixed(_)) | None => RefCell::default(),
                };
                Endpoints::OriginalDst { port: *port, known }
            }
        };
        let cluster = Self { config, metrics, connector, load, endpoints };
        cluster.each_endpoint(|endpoint| endpoint.limit(cluster.config.traffic.connections));
        cluster
    }

    /// A request was drawn for this cluster, which it may be one too many for.
    pub(super) fn admit(&self) -> Result<Option<Admitted>, Failure> {
        self.load.request()
    }

    /// Whether another endpoint could be tried after one has failed.
    pub(super) fn has_alternatives(&self) -> bool {
        match &self.endpoints {
            Endpoints::Fixed(endpoints) => endpoints.len() > 1,
            Endpoints::OriginalDst { .. } => false,
        }
    }

    /// An endpoint that is not in `excluded`: the less busy of two drawn at random (power of two choices). `local` is
    /// the address that the downstream connection was made to.
    pub(super) fn pick(&self, excluded: &[SocketAddr], local: SocketAddr) -> Option<Rc<Endpoint>> {
        let endpoints = match &self.endpoints {
            Endpoints::Fixed(endpoints) => endpoints,
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
            && let chosen = less_busy(endpoints.len(), |index| &endpoints[index])
            && chosen.as_ref().is_none_or(|chosen| !chosen.is_doubtful())
        {
            return chosen;
        }
        let left: Vec<_> = endpoints.iter().filter(|endpoint| !excluded.contains(&endpoint.address)).collect();
        let now = Instant::now();
        let good: Vec<_> = left.iter().copied().filter(|endpoint| !endpoint.is_ejected(now)).collect();
        // Where most cannot be reached it is rather this proxy that is cut off, and none of them is worse than another.
        let all = endpoints.iter().filter(|endpoint| endpoint.is_ejected(now)).count() * 2 > endpoints.len();
        let left = if good.is_empty() || all { left } else { good };
        let chosen = less_busy(left.len(), |index| left[index])?;
        chosen.probe(now);
        Some(chosen)
    }

    pub(super) fn each_endpoint(&self, mut visit: impl FnMut(&Rc<Endpoint>)) {
        match &self.endpoints {
            Endpoints::Fixed(endpoints) => endpoints.iter().for_each(visit),
            Endpoints::OriginalDst { known, .. } => known.borrow().values().for_each(&mut visit),
        }
    }
}

fn less_busy<'a>(count: usize, at: impl Fn(usize) -> &'a Rc<Endpoint>) -> Option<Rc<Endpoint>> {
    if count < 2 {
        return (count == 1).then(|| Rc::clone(at(0)));
    }
    let first = fastrand::usize(..count);
    // The second of the remaining ones, so that the two differ.
    let second = (first + fastrand::usize(1..count)) % count;
    let (first, second) = (at(first), at(second));
    Some(Rc::clone(if second.outstanding() < first.outstanding() { second } else { first }))
}
