//! The server as a member of the fleet meets it: over gRPC, with a client that takes no message above gRPC's default of 4 MiB.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{collections::BTreeSet, sync::Mutex};

use jiff::Timestamp;
use prost::Message;
use prost_types::{Any, Struct, Value, value};
use sluice_crds::{Backend, Traffic};
use sluice_xds::{
    PodSubject, SpiffeId,
    envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Code, transport::Channel};

use super::*;
use crate::{
    cache::{CanaryKey, Touches},
    mesh::{LARGEST_ROUTES, Member, Resource, Routed, testing},
};

const UID: &str = "fleet-1-uid";
const SIDECAR_UID: &str = "web-1-uid";
/// For everything that should take milliseconds.
const PATIENCE: Duration = Duration::from_secs(30);
/// Services whose routes are as large as a Canary's may get.
const LARGE: usize = 12;
/// Of the clusters of all of them, several responses.
const CLUSTER: usize = 400 << 10;

/// The leader in its first term.
struct Leads {
    term: watch::Sender<Option<u64>>,
    raised: Mutex<Vec<u64>>,
    gave_up: Mutex<Vec<tokio::time::Instant>>,
}

impl Default for Leads {
    fn default() -> Self {
        Self { term: watch::Sender::new(Some(1)), raised: Mutex::default(), gave_up: Mutex::default() }
    }
}

impl Leadership for Leads {
    fn term(&self) -> watch::Receiver<Option<u64>> {
        self.term.subscribe()
    }
    fn may_write(&self) -> bool {
        true
    }
    fn raise(&self, epoch: u64) {
        self.raised.lock().unwrap().push(epoch);
    }
    fn leader(&self) -> Option<String> {
        None
    }
    fn give_up(&self) -> bool {
        self.gave_up.lock().unwrap().push(tokio::time::Instant::now());
        true
    }
}

/// The server, and its one client.
struct World {
    snapshots: watch::Sender<Arc<Snapshot>>,
    members: Arc<Members>,
    touches: Touches,
    leads: Arc<Leads>,
    channel: Channel,
    client: Client,
}

/// What our proxies do, but for serving.
struct Client {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
    acknowledged: BTreeSet<(TypeUrl, String)>,
}

/// A response that was not answered yet.
struct Unanswered {
    kind: TypeUrl,
    nonce: String,
    names: Vec<String>,
}

impl World {
    /// With the one member that is waited for.
    async fn start(snapshot: Snapshot) -> Self {
        Self::start_as(snapshot, member()).await
    }

    async fn start_as(snapshot: Snapshot, identity: PeerIdentity) -> Self {
        let (snapshots, receiver) = watch::channel(Arc::new(snapshot));
        let touches = Touches::default();
        let members = Members::new(receiver.clone(), touches.clone(), Duration::from_secs(60));
        let leads = Arc::new(Leads::default());
        let ads = Ads::new(testing::settings(), receiver, members.clone(), leads.clone(), "controller-1");
        let layer = tonic::service::InterceptorLayer::new(move |mut request: Request<()>| {
            let identity = Some(identity.clone());
            request.extensions_mut().insert(Peer { address: ([127, 0, 0, 1], 1).into(), identity });
            Ok(request)
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            tonic::transport::Server::builder()
                .layer(layer)
                .add_service(ads.server())
                .serve_with_incoming(TcpListenerStream::new(listener))
                .await
        });
        let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
        let client = Client::start(channel.clone()).await;
        Self { snapshots, members, touches, leads, channel, client }
    }

    /// Waits until the fleet has acknowledged this weight of these Services.
    async fn effective(&self, services: &[String], weight: i32) {
        while !services.iter().all(|service| {
            let fleet = self.members.fleet(&key(service));
            assert_eq!(fleet.rejected, None);
            fleet.effective == Some(traffic(weight))
        }) {
            tokio::time::timeout(PATIENCE, self.touches.take()).await.expect("nothing more is acknowledged");
        }
    }

    /// Takes and answers so many resources of a type, and what comes meanwhile. Returns how many responses that took.
    async fn take(&mut self, kind: TypeUrl, mut most: usize) -> usize {
        let mut responses = 0;
        while most > 0 {
            let response = self.client.receive().await;
            if response.kind == kind {
                responses += 1;
                most -= response.names.len();
            }
            self.client.acknowledge(response).await;
        }
        responses
    }
}

impl Client {
    async fn start(channel: Channel) -> Self {
        let (requests, receiver) = mpsc::channel(64);
        let mut ads = AggregatedDiscoveryServiceClient::new(channel);
        let responses = ads.delta_aggregated_resources(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        let mut client = Self { requests, responses, acknowledged: BTreeSet::new() };
        for kind in [TypeUrl::Cluster, TypeUrl::Listener] {
            client.subscribe(kind, vec!["*".to_owned()]).await;
        }
        client
    }

    async fn subscribe(&mut self, kind: TypeUrl, names: Vec<String>) {
        let type_url = kind.as_str().to_owned();
        let request = DeltaDiscoveryRequest { type_url, resource_names_subscribe: names, ..Default::default() };
        self.requests.send(request).await.unwrap();
    }

    async fn receive(&mut self) -> Unanswered {
        let response = tokio::time::timeout(PATIENCE, self.responses.message()).await.expect("a response is missing");
        let response = response.unwrap().expect("the stream has ended");
        let length = response.encoded_len();
        let names: Vec<String> = response.resources.into_iter().map(|resource| resource.name).collect();
        // Beside the bodies it has little: names, versions, types.
        assert!(length < stream::LARGEST_RESPONSE + 200 * (names.len() + 1), "{length} bytes for {names:?}");
        let kind = TypeUrl::parse(&response.type_url).unwrap();
        match kind {
            TypeUrl::Cluster => self.subscribe(TypeUrl::Endpoints, names.clone()).await,
            TypeUrl::Listener => self.subscribe(TypeUrl::Route, names.clone()).await,
            TypeUrl::Endpoints => {}
            TypeUrl::Route => {
                let mut needs = names.iter().map(|name| (TypeUrl::Cluster, format!("{name}/aaa")));
                assert!(needs.all(|need| self.acknowledged.contains(&need)), "before its cluster: {names:?}");
            }
        }
        Unanswered { kind, nonce: response.nonce, names }
    }

    /// Waits for a response about the endpoints that were asked for.
    async fn hears_of_endpoints(&mut self) {
        loop {
            let message = tokio::time::timeout(PATIENCE, self.responses.message()).await;
            let response = message.expect("a response is missing").unwrap().expect("the stream has ended");
            if TypeUrl::parse(&response.type_url) == Some(TypeUrl::Endpoints) {
                return;
            }
        }
    }

    async fn acknowledge(&mut self, response: Unanswered) {
        self.acknowledged.extend(response.names.into_iter().map(|name| (response.kind, name)));
        let type_url = response.kind.as_str().to_owned();
        let request = DeltaDiscoveryRequest { type_url, response_nonce: response.nonce, ..Default::default() };
        self.requests.send(request).await.unwrap();
    }
}

/// Why the server ends a stream; what it says before does not matter.
async fn end<T>(responses: &mut Streaming<T>) -> Status {
    loop {
        match tokio::time::timeout(PATIENCE, responses.message()).await.expect("the stream goes on") {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the stream ends without a reason"),
            Err(status) => return status,
        }
    }
}

fn identity(id: SpiffeId, namespace: &str, pod: &str, uid: &str) -> PeerIdentity {
    let pod = PodSubject { namespace: namespace.into(), pod: pod.into(), uid: uid.into() };
    PeerIdentity { id, pod, expires: Timestamp::now() + jiff::SignedDuration::from_hours(1) }
}

fn member() -> PeerIdentity {
    identity(testing::settings().fleet_id.clone(), "sluice-system", "fleet-1", UID)
}

fn sidecar() -> PeerIdentity {
    identity("spiffe://cluster.local/ns/shop/sa/web".parse().unwrap(), "shop", "web-1", SIDECAR_UID)
}

fn key(service: &str) -> CanaryKey {
    CanaryKey::new("shop", service)
}

fn traffic(weight: i32) -> Traffic {
    let canary = Some(Backend::revision("bbb"));
    Traffic { primary: Backend::revision("aaa"), canary, weight, mirror: 0, matches: None }
}

fn resource(kind: TypeUrl, version: &str, size: usize, needs: &[(TypeUrl, String)]) -> Resource {
    let body = Any { type_url: kind.as_str().to_owned(), value: vec![0; size] };
    let needs = needs.iter().cloned().collect();
    Resource { version: version.into(), body: Arc::new(body), needs: Arc::new(needs), empty: false }
}

/// Services with routes of these sizes, all at this weight.
fn snapshot(services: &[(String, usize)], weight: i32) -> Snapshot {
    let mut snapshot = Snapshot::default();
    for (service, size) in services {
        let (port, cluster) = (format!("shop/{service}:80"), format!("shop/{service}:80/aaa"));
        let parts = [(TypeUrl::Cluster, cluster.clone()), (TypeUrl::Endpoints, cluster.clone())];
        snapshot.fleet.insert(TypeUrl::Cluster, &cluster, resource(TypeUrl::Cluster, "1", CLUSTER, &[]));
        snapshot.fleet.insert(TypeUrl::Endpoints, &cluster, resource(TypeUrl::Endpoints, "1", 100, &[]));
        let needs = [(TypeUrl::Route, port.clone())];
        snapshot.fleet.insert(TypeUrl::Listener, &port, resource(TypeUrl::Listener, "1", 100, &needs));
        let route = resource(TypeUrl::Route, &weight.to_string(), *size, &parts);
        snapshot.fleet.insert(TypeUrl::Route, &port, route);
        let carriers = BTreeSet::from([(TypeUrl::Listener, port.clone()), (TypeUrl::Route, port)]);
        snapshot.carriers.extend(carriers.iter().map(|carrier| (carrier.clone(), key(service))));
        snapshot.canaries.insert(key(service), Routed { traffic: traffic(weight), resources: carriers });
    }
    let member =
        Member { name: "fleet-1".into(), started: true, lagging: false, in_slices: true, addresses: Vec::new() };
    snapshot.members.insert(UID.to_owned(), member);
    let revision = RevisionKey { canary: key("web"), revision: "aaa".into() };
    snapshot.pods.insert(SIDECAR_UID.to_owned(), revision);
    snapshot
}

#[tokio::test]
async fn large_routes_come_in_several_responses_and_a_small_one_beside_them_does_not_wait() {
    // The last by its name.
    let small = ["web".to_owned()];
    let large: Vec<String> = (0..LARGE).map(|index| format!("large-{index:02}")).collect();
    let services: Vec<(String, usize)> =
        large.iter().map(|name| (name.clone(), LARGEST_ROUTES)).chain([(small[0].clone(), 500)]).collect();
    let mut world = World::start(snapshot(&services, 0)).await;
    // A new member gets all of it, and in the end says so.
    assert!(world.take(TypeUrl::Route, services.len()).await >= LARGE);
    world.effective(&large, 0).await;
    world.effective(&small, 0).await;

    world.snapshots.send_replace(Arc::new(snapshot(&services, 50)));
    let first = world.client.receive().await;
    assert!(first.names.len() < services.len() && first.names.contains(&"shop/web:80".to_owned()), "{:?}", first.names);
    let more = services.len() - first.names.len();
    world.client.acknowledge(first).await;
    let second = world.client.receive().await;
    world.effective(&small, 50).await;
    assert_eq!(world.members.fleet(&key(&large[LARGE - 1])).lagging, ["fleet-1"], "it serves on as it was");

    let more = more - second.names.len();
    world.client.acknowledge(second).await;
    world.take(TypeUrl::Route, more).await;
    world.effective(&large, 50).await;
}

#[tokio::test]
async fn a_member_of_the_fleet_raises_the_epoch_and_a_sidecar_is_only_told_to_come_back() {
    for (identity, raised) in [(member(), vec![2]), (sidecar(), vec![])] {
        let mut world = World::start_as(snapshot(&[], 0), identity).await;
        let seen = Value { kind: Some(value::Kind::StringValue("2".into())) };
        let metadata = Some(Struct { fields: [(EPOCH.to_owned(), seen)].into() });
        let node = Some(Node { metadata, ..Default::default() });
        world.client.requests.send(DeltaDiscoveryRequest { node, ..Default::default() }).await.unwrap();
        assert_eq!(end(&mut world.client.responses).await.code(), Code::Unavailable);
        assert_eq!(*world.leads.raised.lock().unwrap(), raised);
    }
}

#[tokio::test]
async fn a_stream_that_names_more_than_its_client_can_need_is_ended() {
    // Short ones, of which all are small enough for one message.
    const HALF: usize = 2000;
    let names = |from: usize| (from..from + HALF).map(|name| format!("{name:0>20}")).collect::<Vec<_>>();
    let all = || names(0).into_iter().chain(names(HALF));
    let ended = |status: Status| assert_eq!(status.code(), Code::ResourceExhausted, "{status}");

    let mut world = World::start_as(snapshot(&[], 0), sidecar()).await;
    world.client.subscribe(TypeUrl::Endpoints, names(0)).await;
    world.client.hears_of_endpoints().await;
    world.client.subscribe(TypeUrl::Endpoints, names(HALF)).await;
    ended(end(&mut world.client.responses).await);

    let mut client = Client::start(world.channel.clone()).await;
    let held = DeltaDiscoveryRequest {
        type_url: TypeUrl::Route.as_str().to_owned(),
        initial_resource_versions: all().map(|name| (name, "1".to_owned())).collect(),
        ..Default::default()
    };
    client.requests.send(held).await.unwrap();
    ended(end(&mut client.responses).await);

    let request = DiscoveryRequest {
        type_url: TypeUrl::Endpoints.as_str().to_owned(),
        resource_names: all().collect(),
        ..Default::default()
    };
    let mut ads = AggregatedDiscoveryServiceClient::new(world.channel);
    // Its requests go on: the server ends the stream.
    let requests = futures::stream::iter([request]).chain(futures::stream::pending());
    let mut responses = ads.stream_aggregated_resources(requests).await.unwrap().into_inner();
    ended(end(&mut responses).await);

    let mut fleet = World::start(snapshot(&[], 0)).await;
    fleet.client.subscribe(TypeUrl::Endpoints, all().collect()).await;
    fleet.client.hears_of_endpoints().await;
}

/// A message above gRPC's default of 4 MiB: a member that comes back says at once what it holds. A sidecar's is refused by its first five
/// bytes, before there is room made for it.
#[tokio::test]
async fn a_member_of_the_fleet_says_in_one_message_what_it_holds_and_a_sidecar_sends_small_ones() {
    let holds = |bytes: usize| DeltaDiscoveryRequest {
        type_url: TypeUrl::Route.as_str().to_owned(),
        initial_resource_versions: (0..bytes / 100).map(|name| (format!("{name:0>100}"), "1".to_owned())).collect(),
        ..Default::default()
    };
    let mut world = World::start(snapshot(&[], 0)).await;
    world.client.requests.send(holds(5 << 20)).await.unwrap();
    world.client.subscribe(TypeUrl::Endpoints, vec!["shop".to_owned()]).await;
    world.client.hears_of_endpoints().await;

    let mut world = World::start_as(snapshot(&[], 0), sidecar()).await;
    world.client.requests.send(holds(300 << 10)).await.unwrap();
    assert_eq!(end(&mut world.client.responses).await.code(), Code::OutOfRange);
}

/// It leads again at once, as where the other replica is not heard either.
#[tokio::test(start_paused = true)]
async fn a_leader_that_the_fleet_does_not_reach_gives_up_its_term_once_in_ten_minutes() {
    let (_snapshots, receiver) = watch::channel(Arc::new(snapshot(&[], 0)));
    let members = Members::new(receiver.clone(), Touches::default(), Duration::from_secs(60));
    let leads = Arc::new(Leads::default());
    let ads = Ads::new(testing::settings(), receiver, members, leads.clone(), "controller-1");
    let refuses = tower::service_fn(async |_: http::Request<kube::client::Body>| {
        Err::<http::Response<kube::client::Body>, _>(std::io::Error::other("no mark is to be written"))
    });
    let looking = tokio::spawn(ads.mark_silent(kube::Client::new(refuses, "sluice-system")));
    tokio::time::sleep(3 * GIVE_UP_AGAIN).await;
    looking.abort();
    let times = leads.gave_up.lock().unwrap().clone();
    let apart: Vec<_> = times.windows(2).map(|two| two[1] - two[0]).collect();
    assert!(times.len() == 3 && apart.iter().all(|time| *time >= GIVE_UP_AGAIN), "{apart:?}");
}
