//! The incremental variant, for our own proxies (and Envoy with `DELTA_GRPC`).

use std::collections::BTreeMap;

use sluice_xds::{
    TypeUrl,
    envoy::{
        config::core::v3::{ControlPlane, Node},
        service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource},
    },
    google::rpc::Status,
    sluice::xds::v1::RejectedResources,
    unpack,
};

use super::{
    Variant,
    stream::{LARGEST_RESPONSE, State},
};
use crate::mesh::View;

pub(super) struct Delta;

impl Variant for Delta {
    type Request = DeltaDiscoveryRequest;
    type Response = DeltaDiscoveryResponse;

    fn take(&mut self, state: &mut State, request: &DeltaDiscoveryRequest) -> Option<TypeUrl> {
        take(state, request)
    }

    fn next(&mut self, state: &mut State, view: &View) -> Vec<DeltaDiscoveryResponse> {
        next(state, view)
    }

    fn node(request: &DeltaDiscoveryRequest) -> Option<&Node> {
        request.node.as_ref()
    }

    fn sign(response: &mut DeltaDiscoveryResponse, control_plane: Option<ControlPlane>) {
        response.control_plane = control_plane;
    }
}

fn take(state: &mut State, request: &DeltaDiscoveryRequest) -> Option<TypeUrl> {
    let kind = TypeUrl::parse(&request.type_url)?;
    let holdings = state.holdings(kind);
    if !holdings.begun {
        holdings.begun = true;
        // What it holds from an earlier stream counts as acknowledged.
        let held = request.initial_resource_versions.iter();
        holdings.held = held.map(|(name, version)| (name.clone(), version.as_str().into())).collect();
        let named = request.resource_names_subscribe.iter().any(|name| name != "*");
        holdings.wildcard = !named && matches!(kind, TypeUrl::Cluster | TypeUrl::Listener);
    }
    if !request.response_nonce.is_empty() {
        let rejected = request.error_detail.as_ref().map(rejected);
        match rejected {
            None => holdings.answered(&request.response_nonce, Some(&BTreeMap::new()), ""),
            Some(Rejected { resources, all }) => holdings.answered(&request.response_nonce, resources.as_ref(), &all),
        };
    }
    for name in &request.resource_names_subscribe {
        if name == "*" {
            holdings.wildcard = true;
        } else if !holdings.names.insert(name.clone()) {
            // Asked for again: it wants an answer, whether or not it holds the newest (xDS protocol, "Subscribing to Resources").
            holdings.held.remove(name);
            holdings.absent.remove(name);
        }
    }
    for name in &request.resource_names_unsubscribe {
        if name == "*" {
            holdings.wildcard = false;
        } else {
            holdings.unsubscribe(name);
        }
    }
    Some(kind)
}

/// What a NACK says.
struct Rejected {
    /// By name; `None` if it does not say which: then the whole response.
    resources: Option<BTreeMap<String, String>>,
    all: String,
}

fn rejected(status: &Status) -> Rejected {
    let named = status.details.iter().find_map(|detail| unpack::<RejectedResources>(detail).ok());
    let resources = named.map(|named| {
        named.resources.into_iter().map(|resource| (resource.name, resource.reason)).collect::<BTreeMap<_, _>>()
    });
    Rejected { resources, all: status.message.clone() }
}

fn next(state: &mut State, view: &View) -> Vec<DeltaDiscoveryResponse> {
    let mut responses = Vec::new();
    for kind in TypeUrl::ALL {
        let mut difference = state.difference(kind, view);
        if difference.is_empty() && !state.awaits_empty(kind, view) {
            continue;
        }
        let nonce = state.nonce();
        let holdings = state.holdings(kind);
        holdings.turn = difference.cut(LARGEST_RESPONSE, holdings.turn.take());
        holdings.sent(nonce.clone(), &difference);
        let resources = difference.updates.into_iter().map(|(name, resource)| Resource {
            name,
            version: resource.version.to_string(),
            resource: Some((*resource.body).clone()),
            ..Resource::default()
        });
        responses.push(DeltaDiscoveryResponse {
            type_url: kind.as_str().to_owned(),
            nonce,
            resources: resources.collect(),
            removed_resources: difference.removals,
            ..DeltaDiscoveryResponse::default()
        });
    }
    responses
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_of_everything_is_told_once_that_there_is_nothing() {
        let (mut state, view) = (State::default(), View::default());
        let request = |kind: TypeUrl, name: &str| DeltaDiscoveryRequest {
            type_url: kind.as_str().to_owned(),
            resource_names_subscribe: vec![name.to_owned()],
            ..DeltaDiscoveryRequest::default()
        };
        take(&mut state, &request(TypeUrl::Listener, "*"));
        let responses = next(&mut state, &view);
        let [response] = responses.as_slice() else { panic!("{responses:?}") };
        assert_eq!(TypeUrl::parse(&response.type_url), Some(TypeUrl::Listener));
        assert!(response.resources.is_empty() && response.removed_resources.is_empty());
        let ack = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            ..DeltaDiscoveryRequest::default()
        };
        take(&mut state, &ack);
        assert_eq!(next(&mut state, &view), []);
    }
}
