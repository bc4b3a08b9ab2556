//! The state-of-the-world variant, for stock Envoy and proxyless gRPC, from the same snapshot: each response lists everything
//! of its type that the client asked for. What is not listed is gone, so no response can be cut: a client that takes no message of that size
//! (gRPC's default is 4 MiB) loses its stream, which nobody waits for, and has to ask for less or use the other variant.

use std::{
    collections::{BTreeMap, BTreeSet, hash_map::DefaultHasher},
    hash::{Hash, Hasher},
};

use sluice_xds::{
    TypeUrl,
    envoy::{
        config::core::v3::{ControlPlane, Node},
        service::discovery::v3::{DiscoveryRequest, DiscoveryResponse},
    },
};

use super::{
    Variant,
    stream::{Difference, State, Version},
};
use crate::mesh::{Resource, View};

/// What the state-of-the-world client has been sent, beside what [`State`] knows.
#[derive(Debug, Default)]
pub(super) struct Sotw {
    resources: BTreeMap<TypeUrl, BTreeMap<String, Resource>>,
    /// Types to send again although nothing of them changed.
    again: BTreeSet<TypeUrl>,
}

impl Variant for Sotw {
    type Request = DiscoveryRequest;
    type Response = DiscoveryResponse;

    fn take(&mut self, state: &mut State, request: &DiscoveryRequest) -> Option<TypeUrl> {
        take(state, self, request)
    }

    fn next(&mut self, state: &mut State, view: &View) -> Vec<DiscoveryResponse> {
        next(state, self, view)
    }

    fn node(request: &DiscoveryRequest) -> Option<&Node> {
        request.node.as_ref()
    }

    fn sign(response: &mut DiscoveryResponse, control_plane: Option<ControlPlane>) {
        response.control_plane = control_plane;
    }
}

fn take(state: &mut State, sent: &mut Sotw, request: &DiscoveryRequest) -> Option<TypeUrl> {
    let kind = TypeUrl::parse(&request.type_url)?;
    let holdings = state.holdings(kind);
    let first = !holdings.begun;
    holdings.begun = true;
    if first {
        holdings.wildcard = request.resource_names.is_empty() && matches!(kind, TypeUrl::Cluster | TypeUrl::Listener);
    }
    let mut clusters_changed = false;
    if !request.response_nonce.is_empty() {
        let changed = holdings.in_flight.as_ref().is_some_and(|in_flight| !in_flight.resources.is_empty());
        let known = match &request.error_detail {
            None => holdings.answered(&request.response_nonce, Some(&BTreeMap::new()), ""),
            Some(status) => holdings.answered(&request.response_nonce, None, &status.message),
        };
        if !known && !first {
            // Stale: the client had not seen our newest response. Names may still have been added.
            subscribe(holdings, request);
            return Some(kind);
        }
        clusters_changed = kind == TypeUrl::Cluster && changed && request.error_detail.is_none();
    }
    if subscribe(holdings, request) {
        sent.again.insert(kind);
    }
    if clusters_changed && state.holdings(TypeUrl::Endpoints).begun {
        // A changed cluster waits for its endpoints again (envoyproxy/envoy#13009).
        sent.again.insert(TypeUrl::Endpoints);
    }
    Some(kind)
}

/// Whether the names changed.
fn subscribe(holdings: &mut super::stream::Holdings, request: &DiscoveryRequest) -> bool {
    if request.resource_names.iter().any(|name| name == "*") {
        holdings.wildcard = true;
    }
    let names: BTreeSet<String> = request.resource_names.iter().filter(|name| *name != "*").cloned().collect();
    if names == holdings.names {
        return false;
    }
    for gone in holdings.names.difference(&names).cloned().collect::<Vec<_>>() {
        holdings.unsubscribe(&gone);
    }
    holdings.names = names;
    true
}

fn next(state: &mut State, sent: &mut Sotw, view: &View) -> Vec<DiscoveryResponse> {
    let mut responses = Vec::new();
    for kind in TypeUrl::ALL {
        let difference = state.difference(kind, view);
        let again = state.holdings(kind).in_flight.is_none() && sent.again.remove(&kind);
        if difference.is_empty() && !again && !state.awaits_empty(kind, view) {
            continue;
        }
        let all = sent.resources.entry(kind).or_default();
        let holdings = state.holdings(kind);
        // What is not in the difference stays as it was sent: an update that must wait, a removal that must wait.
        for name in &difference.removals {
            all.remove(name);
        }
        all.retain(|name, _| holdings.wildcard || holdings.names.contains(name));
        for (name, resource) in &difference.updates {
            all.insert(name.clone(), resource.clone());
        }
        // On its way is what is listed: an acknowledgement speaks of all of it.
        let listed = Difference {
            updates: all.iter().map(|(name, resource)| (name.clone(), resource.clone())).collect(),
            removals: difference.removals,
        };
        let nonce = state.nonce();
        state.holdings(kind).sent(nonce.clone(), &listed);
        responses.push(DiscoveryResponse {
            version_info: version(listed.updates.iter().map(|(name, resource)| (name, &resource.version))),
            resources: listed.updates.iter().map(|(_, resource)| (*resource.body).clone()).collect(),
            type_url: kind.as_str().to_owned(),
            nonce,
            ..DiscoveryResponse::default()
        });
    }
    responses
}

/// A version of a whole list: equal lists have equal versions, in one process.
fn version<'a>(resources: impl Iterator<Item = (&'a String, &'a Version)>) -> String {
    let mut hasher = DefaultHasher::new();
    for entry in resources {
        entry.hash(&mut hasher);
    }
    format!("{:016x}", hasher.finish())
}
