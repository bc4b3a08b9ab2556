//! The service as tonic mounts it. How large a message may be depends on who sends it, which tonic fixes for a whole service: so there
//! are two of it.

use std::{
    convert::Infallible,
    sync::Arc,
    task::{Context, Poll},
};

use futures::future::BoxFuture;
use sluice_xds::envoy::service::discovery::v3::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer;
use tonic::{body::Body, server::NamedService};
use tower::Service;

use super::{Ads, FLEET_NAMES, SIDECAR_NAMES};
use crate::identity::Peer;

type Mounted = AggregatedDiscoveryServiceServer<Ads>;

/// ADS for the fleet and for everybody else.
#[derive(Clone)]
pub struct AdsServer {
    fleet: Mounted,
    others: Mounted,
    ads: Arc<Ads>,
}

impl AdsServer {
    pub(super) fn new(ads: Ads) -> Self {
        let ads = Arc::new(ads);
        let mounted = |most| Mounted::from_arc(Arc::clone(&ads)).max_decoding_message_size(most);
        Self { fleet: mounted(FLEET_NAMES), others: mounted(SIDECAR_NAMES), ads }
    }
}

impl NamedService for AdsServer {
    const NAME: &'static str = <Mounted as NamedService>::NAME;
}

impl Service<http::Request<Body>> for AdsServer {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // Both are always ready.
        Service::<http::Request<Body>>::poll_ready(&mut self.fleet, cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let peer = request.extensions().get::<Peer>().and_then(|peer| peer.identity.as_ref());
        let service = match peer {
            Some(peer) if self.ads.is_fleet(peer) => &mut self.fleet,
            _ => &mut self.others,
        };
        service.call(request)
    }
}
