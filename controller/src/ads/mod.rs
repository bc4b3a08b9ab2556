//! The xDS server: delta and state-of-the-world ADS from one snapshot, and the acknowledgements that come back. Only the leader
//! serves; docs/xds.md is the contract.

mod delta;
mod members;
mod server;
mod sotw;
mod stream;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, pin::Pin, sync::Arc, time::Duration};

use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use sluice_crds::labels;
use sluice_xds::{
    TypeUrl,
    envoy::{
        config::core::v3::{ControlPlane, Node},
        service::discovery::v3::{
            DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
            aggregated_discovery_service_server::AggregatedDiscoveryService,
        },
    },
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

pub use members::{Members, SILENCE};
pub use server::AdsServer;
use stream::State;

use crate::{
    identity::{Peer, PeerIdentity},
    mesh::{RevisionKey, Settings, Snapshot, View, slices::STALL},
};

/// How often silent members are looked for.
const LOOK: Duration = Duration::from_secs(1);
/// A leader that most of the fleet does not hear gives up once in so long: where no other replica is heard either, it only passes on.
const GIVE_UP_AGAIN: Duration = Duration::from_secs(600);
/// Key of the highest epoch that a client has seen, in `node.metadata`.
const EPOCH: &str = "sluice.dev/epoch";
/// Most bytes of names that a sidecar may have told on a stream ([`State::named`]), and of one message of it: it asks for a handful.
const SIDECAR_NAMES: usize = 256 << 10;
/// The same of a member of the fleet, which says in one message what it holds: the names of a listener for each port of the fleet,
/// with their routes, clusters and endpoints, are less than half of it.
const FLEET_NAMES: usize = 64 << 20;

/// Whether this replica serves, and where the one is that does.
pub trait Leadership: Send + Sync + 'static {
    /// The epoch of our term, while it lasts.
    fn term(&self) -> watch::Receiver<Option<u64>>;
    /// Whether our term lasts at this moment; its end comes late to [`term`](Self::term) when the process stands still.
    fn may_write(&self) -> bool;
    /// A client has seen an epoch at least as high.
    fn raise(&self, epoch: u64);
    /// `ip:port` of the leader's gRPC port, if it is known.
    fn leader(&self) -> Option<String>;
    /// Most of the fleet does not hear us: ends our term, unless there is no other replica that could lead. Whether it did.
    fn give_up(&self) -> bool;
}

/// The service. Cheap to clone.
#[derive(Clone)]
pub struct Ads {
    settings: Arc<Settings>,
    snapshot: watch::Receiver<Arc<Snapshot>>,
    members: Arc<Members>,
    leadership: Arc<dyn Leadership>,
    /// Our Pod's name.
    name: Arc<str>,
}

/// Whose view a client sees.
#[derive(Debug, Clone, PartialEq)]
enum Sees {
    /// The fleet's view. While the Pod with this uid is a member of the fleet, its acknowledgement is waited for; that of
    /// any other with its identity (stock Envoy, gRPC) is not.
    Fleet {
        uid: String,
    },
    Sidecar(RevisionKey),
}

impl Ads {
    #[must_use]
    pub fn new(
        settings: Arc<Settings>,
        snapshot: watch::Receiver<Arc<Snapshot>>,
        members: Arc<Members>,
        leadership: Arc<dyn Leadership>,
        name: &str,
    ) -> Self {
        Self { settings, snapshot, members, leadership, name: name.into() }
    }

    /// The tonic service.
    #[must_use]
    pub fn server(self) -> AdsServer {
        AdsServer::new(self)
    }

    fn is_fleet(&self, who: &PeerIdentity) -> bool {
        who.id == self.settings.fleet_id
    }

    /// Who asks, and what it may see. A Pod that the cache does not show yet is told to come back.
    #[allow(clippy::result_large_err)]
    fn sees(&self, who: &PeerIdentity) -> Result<Sees, Status> {
        let snapshot = self.snapshot.borrow();
        let uid = &who.pod.uid;
        if self.is_fleet(who) {
            return Ok(Sees::Fleet { uid: uid.clone() });
        }
        match snapshot.pods.get(uid) {
            Some(revision) => Ok(Sees::Sidecar(revision.clone())),
            None => Err(Status::permission_denied(format!(
                "Pod {} (uid {uid}) is neither of the fleet nor of a revision that this controller knows (yet)",
                who.pod.common_name()
            ))),
        }
    }

    #[allow(clippy::result_large_err)]
    fn begin<T>(&self, request: &Request<T>) -> Result<Attendant, Status> {
        let session = Session::begin(&*self.leadership, request)?;
        let sees = self.sees(&session.who)?;
        Ok(Attendant { ads: self.clone(), sees, name: session.who.pod.common_name(), session })
    }

    /// Marks silent members and unmarks those that are back, while this replica leads, and ends its term where most are silent: a
    /// replica on another node may be heard. Ends when leadership is gone for good.
    pub async fn mark_silent(self, client: Client) {
        let pods: Api<Pod> = Api::namespaced(client, &self.settings.release_namespace);
        let mut tick = tokio::time::interval(LOOK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let term = self.leadership.term();
        let mut looked = tokio::time::Instant::now();
        let mut gave_up: Option<tokio::time::Instant> = None;
        loop {
            tick.tick().await;
            if term.has_changed().is_err() {
                return;
            }
            // Who stood still heard nobody: what came meanwhile is heard first.
            let stalled = std::mem::replace(&mut looked, tokio::time::Instant::now()).elapsed() > STALL;
            if term.borrow().is_none() || stalled {
                continue;
            }
            for (name, mark) in self.members.marks() {
                if !self.leadership.may_write() {
                    break;
                }
                let value = mark.then(|| jiff::Timestamp::now().to_string());
                let patch = serde_json::json!({"metadata": {"annotations": {labels::LAGGING: value}}});
                let parameters =
                    PatchParams { field_manager: Some(labels::FIELD_MANAGER.to_owned()), ..Default::default() };
                let patch = Patch::Merge(&patch);
                let written = pods.patch_metadata(&name, &parameters, &patch);
                match tokio::time::timeout(Duration::from_secs(5), written).await {
                    Ok(Ok(_)) if mark => {
                        tracing::warn!(member = name, "silent for too long: it leaves the slices, unless most are")
                    }
                    Ok(Ok(_)) => tracing::info!(member = name, "is back"),
                    Ok(Err(error)) => tracing::warn!(member = name, %error, "cannot mark"),
                    Err(_) => tracing::warn!(member = name, "cannot mark: the API server does not answer"),
                }
            }
            let again = gave_up.is_none_or(|at| at.elapsed() >= GIVE_UP_AGAIN);
            if again && self.members.most_are_silent() && self.leadership.give_up() {
                gave_up = Some(tokio::time::Instant::now());
                tracing::warn!(
                    "most of the fleet is silent to this replica, though it reaches the API server: it gives up its term, so that \
                     another one leads, which may be heard"
                );
            }
        }
    }
}

/// For how long a client may be served: while our term lasts, and its certificate.
pub(crate) struct Session {
    pub(crate) who: PeerIdentity,
    term: watch::Receiver<Option<u64>>,
    epoch: u64,
    /// End of its certificate.
    ends: tokio::time::Instant,
}

impl Session {
    /// UNAVAILABLE, with the leader's address, where another replica leads; UNAUTHENTICATED without a client certificate.
    #[allow(clippy::result_large_err)]
    pub(crate) fn begin<T>(leadership: &dyn Leadership, request: &Request<T>) -> Result<Self, Status> {
        let term = leadership.term();
        let epoch = *term.borrow();
        let Some(epoch) = epoch else {
            let mut status = Status::unavailable("this replica does not lead; the leader serves xDS");
            if let Some(Ok(leader)) = leadership.leader().map(|leader| leader.parse()) {
                status.metadata_mut().insert("sluice-leader", leader);
            }
            return Err(status);
        };
        let who = Peer::of(request)?.identity()?.clone();
        let lives = u64::try_from(who.expires.as_second() - jiff::Timestamp::now().as_second()).unwrap_or(0);
        let ends = tokio::time::Instant::now() + Duration::from_secs(lives);
        Ok(Self { who, term, epoch, ends })
    }

    /// Waits for the end, and says why. Cancel-safe.
    pub(crate) async fn end(&mut self) -> Status {
        tokio::select! {
            // An error means that nobody will say any more whether we lead.
            _ = self.term.wait_for(|now| *now != Some(self.epoch)) => {
                Status::unavailable("the term of this leader has ended")
            }
            () = tokio::time::sleep_until(self.ends) => {
                Status::unauthenticated("your certificate has expired: come back with a new one")
            }
        }
    }
}

/// One client's stream.
struct Attendant {
    ads: Ads,
    sees: Sees,
    name: String,
    session: Session,
}

impl Attendant {
    fn control_plane(&self) -> Option<ControlPlane> {
        Some(ControlPlane { identifier: format!("{}/{}", self.session.epoch, self.ads.name) })
    }

    /// A client that has seen a higher epoch than ours: the lease must catch up before we may speak. Only the fleet is believed, for
    /// each time our term ends: anybody's Pod may have a sidecar. If there was such an epoch, a member of the fleet tells us.
    #[allow(clippy::result_large_err)]
    fn check_epoch(&self, node: Option<&Node>) -> Result<(), Status> {
        let seen = node.and_then(|node| node.metadata.as_ref()?.fields.get(EPOCH)?.kind.clone());
        let Some(prost_types::value::Kind::StringValue(seen)) = seen else { return Ok(()) };
        let seen: u64 = seen
            .parse()
            .map_err(|_| Status::invalid_argument(format!("node.metadata[{EPOCH}] {seen:?} is not a number")))?;
        if seen > self.session.epoch {
            match self.sees {
                Sees::Fleet { .. } => self.ads.leadership.raise(seen),
                Sees::Sidecar(_) => {}
            }
            return Err(Status::unavailable(format!(
                "you have seen epoch {seen}, ours is {}: come back",
                self.session.epoch
            )));
        }
        Ok(())
    }

    /// What a client names is kept as long as its stream, whether it exists or not.
    #[allow(clippy::result_large_err)]
    fn check_names(&self, state: &State) -> Result<(), Status> {
        let most = match self.sees {
            Sees::Fleet { .. } => FLEET_NAMES,
            Sees::Sidecar(_) => SIDECAR_NAMES,
        };
        let named = state.named();
        if named > most {
            return Err(Status::resource_exhausted(format!(
                "the names of resources on this stream take {named} bytes; {most} are allowed"
            )));
        }
        Ok(())
    }

    fn view<'a>(&self, snapshot: &'a Snapshot, empty: &'a View) -> &'a View {
        match &self.sees {
            Sees::Fleet { .. } => &snapshot.fleet,
            Sees::Sidecar(revision) => snapshot.sidecars.get(revision).unwrap_or(empty),
        }
    }

    fn report(&self, stream: u64, state: &mut State, kind: TypeUrl) {
        let Sees::Fleet { uid } = &self.sees else { return };
        let holdings = state.holdings(kind);
        let rejected: BTreeMap<_, _> =
            holdings.rejected.iter().map(|(name, (_, reason))| (name.clone(), reason.clone())).collect();
        for (name, reason) in &rejected {
            tracing::warn!(member = self.name, resource = name, reason, "a member rejects its configuration");
        }
        self.ads.members.holds(uid, stream, kind, &holdings.held, rejected);
    }

    /// Serves until the client leaves, the term ends, or the client's certificate does.
    async fn serve<V: Variant>(
        mut self,
        mut requests: impl Stream<Item = Result<V::Request, Status>> + Unpin,
        sender: mpsc::Sender<Result<V::Response, Status>>,
        mut variant: V,
    ) {
        let mut state = State::default();
        let mut snapshots = self.ads.snapshot.clone();
        let empty = View::default();
        let stream = match &self.sees {
            Sees::Fleet { uid } => self.ads.members.connected(uid),
            Sees::Sidecar(_) => 0,
        };
        tracing::debug!(client = self.name, sees = ?self.sees, "xDS stream begins");
        let end = loop {
            tokio::select! {
                request = requests.next() => {
                    let Some(request) = request else { break None };
                    // One that cannot be read, or is too large, ends the stream as well.
                    let taken = request.and_then(|request| {
                        self.check_epoch(V::node(&request))?;
                        let kind = variant.take(&mut state, &request);
                        self.check_names(&state).map(|()| kind)
                    });
                    match taken {
                        Ok(Some(kind)) => self.report(stream, &mut state, kind),
                        Ok(None) => {}
                        Err(status) => {
                            // Without waiting: who does not read would keep what it sent.
                            let _ = sender.try_send(Err(status.clone()));
                            break Some(status);
                        }
                    }
                },
                changed = snapshots.changed() => if changed.is_err() { break None },
                end = self.session.end() => {
                    let _ = sender.try_send(Err(end));
                    break None;
                }
            }
            let snapshot = snapshots.borrow_and_update().clone();
            for mut response in variant.next(&mut state, self.view(&snapshot, &empty)) {
                V::sign(&mut response, self.control_plane());
                // At most one unanswered response for each type is under way, so this waits for nobody but a dead peer.
                if sender.send(Ok(response)).await.is_err() {
                    break;
                }
            }
            if sender.is_closed() {
                break None;
            }
        };
        if let Sees::Fleet { uid } = &self.sees {
            self.ads.members.disconnected(uid, stream);
        }
        tracing::debug!(client = self.name, error = end.map(|status| status.to_string()), "xDS stream ends");
    }
}

/// A variant of the protocol: what of a stream is particular to it.
trait Variant: Send + 'static {
    type Request: Send;
    type Response: Send;
    /// Takes a request in. Returns the type whose holdings may have changed.
    fn take(&mut self, state: &mut State, request: &Self::Request) -> Option<TypeUrl>;
    /// The responses that should go out now, at most one for each type.
    fn next(&mut self, state: &mut State, view: &View) -> Vec<Self::Response>;
    fn node(request: &Self::Request) -> Option<&Node>;
    fn sign(response: &mut Self::Response, control_plane: Option<ControlPlane>);
}

type Responses<A> = Pin<Box<dyn Stream<Item = Result<A, Status>> + Send>>;

impl Ads {
    /// The task lives as long as the stream: it ends when the client, the term or the client's certificate does.
    #[allow(clippy::result_large_err)]
    fn spawn<V: Variant>(
        &self,
        request: Request<Streaming<V::Request>>,
        variant: V,
    ) -> Result<Response<Responses<V::Response>>, Status> {
        let client = self.begin(&request)?;
        let (sender, receiver) = mpsc::channel(TypeUrl::ALL.len());
        tokio::spawn(client.serve(request.into_inner(), sender, variant));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Ads {
    type StreamAggregatedResourcesStream = Responses<DiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        self.spawn(request, sotw::Sotw::default())
    }

    type DeltaAggregatedResourcesStream = Responses<DeltaDiscoveryResponse>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        self.spawn(request, delta::Delta)
    }
}
