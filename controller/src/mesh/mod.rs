//! From Services, Pods and Canary statuses to one immutable [`Snapshot`] of xDS resources, and to the EndpointSlices of
//! taken-over Services. A pure function of the cache: two replicas with the same cache make the same snapshot, but for a Canary whose routes
//! can no longer be sent, which each has as it was when it last saw them otherwise.
//! Shapes and names: docs/xds.md.

mod build;
mod encode;
mod inputs;
mod pod;
mod policy;
pub mod ports;
mod publisher;
mod route;
mod sendable;
mod service;
mod size;
pub mod slices;
#[cfg(test)]
pub(crate) mod testing;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use prost_types::Any;
use sluice_crds::Traffic;
use sluice_xds::TypeUrl;

use crate::cache::CanaryKey;

pub use build::{build, wanted_ports};
pub use inputs::{Inputs, Limits, RevisionFacts, Settings, target_port};
pub(crate) use pod::ips;
pub use pod::serves;
pub use publisher::{CatchUp, CatchUpError, Publisher, PublisherHandle};
pub use sendable::{LARGEST_ROUTES, Unsendable, unsendable};
pub use service::{Protocol, protocol};
pub use size::Services;

/// Everything that any proxy may be told, at one instant, and whom it is told.
#[derive(Debug, Default, PartialEq)]
pub struct Snapshot {
    /// What members of the fleet see.
    pub fleet: View,
    /// What sidecars see, by the revision they belong to.
    pub sidecars: BTreeMap<RevisionKey, View>,
    /// What the fleet view says about each Canary's traffic.
    pub canaries: BTreeMap<CanaryKey, Routed>,
    /// Whose traffic a listener or a route of the fleet view carries: the inverse of [`Routed::resources`].
    pub carriers: BTreeMap<(TypeUrl, String), CanaryKey>,
    /// The fleet's Pods that are not gone, by uid.
    pub members: BTreeMap<String, Member>,
    /// The revision that a Pod belongs to, by the Pod's uid.
    pub pods: BTreeMap<String, RevisionKey>,
    /// Canaries whose routes are [`Unsendable`]. They have those of an earlier `spec.service` of theirs, or none that is sent.
    pub unsendable: BTreeSet<CanaryKey>,
}

impl Snapshot {
    /// Whose traffic a resource of the fleet view carries: a cluster and its endpoints by the listener that their name begins with.
    #[must_use]
    pub fn carrier_of(&self, kind: TypeUrl, name: &str) -> Option<&CanaryKey> {
        let port = match kind {
            TypeUrl::Listener | TypeUrl::Route => name,
            TypeUrl::Cluster | TypeUrl::Endpoints => name.rsplit_once('/')?.0,
        };
        let key = |kind| self.carriers.get(&(kind, port.to_owned()));
        key(TypeUrl::Listener).or_else(|| key(TypeUrl::Route))
    }
}

/// A Pod of the fleet that is not gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    pub name: String,
    /// Its containers were started at least once: until then it can serve nothing and is waited for by nobody.
    pub started: bool,
    /// Marked by the leader as silent for too long ([`sluice_crds::labels::LAGGING`]).
    pub lagging: bool,
    /// One of its addresses is in an EndpointSlice of ours: new connections may reach it.
    pub in_slices: bool,
    pub addresses: Vec<IpAddr>,
}

/// Resources by type and name.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct View {
    pub resources: BTreeMap<TypeUrl, BTreeMap<String, Resource>>,
    /// Listeners and routes of which nothing can be said here, for they are [`Unsendable`]: whoever holds one keeps it.
    pub withheld: BTreeSet<(TypeUrl, String)>,
}

impl View {
    #[must_use]
    pub fn get(&self, kind: TypeUrl, name: &str) -> Option<&Resource> {
        self.resources.get(&kind)?.get(name)
    }

    /// Whether who holds this may go on doing so, in this version or another.
    pub(crate) fn keeps(&self, kind: TypeUrl, name: &str) -> bool {
        self.get(kind, name).is_some() || self.withheld.contains(&(kind, name.to_owned()))
    }

    /// All resources of a type, in the order of their names.
    pub fn of(&self, kind: TypeUrl) -> impl Iterator<Item = (&str, &Resource)> {
        self.resources.get(&kind).into_iter().flatten().map(|(name, resource)| (name.as_str(), resource))
    }

    pub(crate) fn insert(&mut self, kind: TypeUrl, name: &str, resource: Resource) {
        self.resources.entry(kind).or_default().insert(name.to_owned(), resource);
    }
}

/// One encoded resource. Equal versions are equal resources.
#[derive(Debug, Clone)]
pub struct Resource {
    /// Content hash, in hex.
    pub version: Arc<str>,
    pub body: Arc<Any>,
    /// What this resource names. The clusters and endpoints of a route or a listener must be acknowledged before it is
    /// sent. The route of a listener cannot be (a client asks for it once it has the listener), but it is not removed
    /// while a listener names it.
    pub needs: Arc<BTreeSet<(TypeUrl, String)>>,
    /// Endpoints without an address: whoever holds these must not be sent there before it has newer ones.
    pub empty: bool,
}

impl PartialEq for Resource {
    fn eq(&self, other: &Self) -> bool {
        self.version == other.version
    }
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RevisionKey {
    pub canary: CanaryKey,
    pub revision: String,
}

impl std::fmt::Display for RevisionKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} revision {}", self.canary, self.revision)
    }
}

/// A Canary's traffic as this snapshot carries it.
#[derive(Debug, Clone, PartialEq)]
pub struct Routed {
    /// The value of `status.traffic` that it was made from (or, once cut, with weight 0).
    pub traffic: Traffic,
    /// Listeners and routes that carry it: effective when each of them, at the version in this snapshot, is acknowledged.
    pub resources: BTreeSet<(TypeUrl, String)>,
}
