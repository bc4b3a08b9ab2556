use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use rustls::pki_types::{CertificateDer, pem::PemObject};
use sluice_proxy::{
    ads::{Apply, Client, Introduction, State, Timing},
    controller::{ClientCertificate, Controller},
    identity::Certificate,
    snapshot::{Action, Protocol, Snapshot, Upstream},
};
use sluice_xds::{TypeUrl, envoy::service::discovery::v3::DeltaDiscoveryRequest};
use tokio::{
    sync::{Semaphore, mpsc, watch},
    task::JoinHandle,
};
use tonic::Status;

use crate::{
    pki::{Ca, FLEET, Projected},
    resources::{cluster, endpoints, listener, resource, route, unavailable},
    server::{AdsStream, NOTHING, Server, soon},
};

const WEB: &str = "shop/web:80";
const PRIMARY: &str = "shop/web:80/aaaaaaaaaa";
const CANARY: &str = "shop/web:80/bbbbbbbbbb";

/// Workers that apply when the test lets them.
#[derive(Clone)]
struct Workers {
    started: mpsc::UnboundedSender<Arc<Snapshot>>,
    permits: Arc<Semaphore>,
    failing: Arc<Mutex<BTreeMap<String, String>>>,
}

impl Apply for Workers {
    async fn apply(&self, snapshot: Arc<Snapshot>) -> BTreeMap<String, String> {
        self.started.send(snapshot).unwrap();
        self.permits.acquire().await.unwrap().forget();
        self.failing.lock().unwrap().clone()
    }
}

/// The client against a scripted server.
struct Bench {
    server: Server,
    applied: mpsc::UnboundedReceiver<Arc<Snapshot>>,
    permits: Arc<Semaphore>,
    failing: Arc<Mutex<BTreeMap<String, String>>>,
    state: Arc<State>,
    client: JoinHandle<()>,
    ca: Ca,
    _projected: Projected,
    certificate: watch::Sender<Option<Arc<Certificate>>>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.client.abort();
    }
}

const TIMING: Timing = Timing {
    clusters: Duration::from_millis(600),
    apply_again: Duration::from_millis(50),
    quiet: Duration::from_millis(50),
    quiet_without_listeners: Duration::from_millis(50),
};

impl Bench {
    async fn start() -> Self {
        let ca = Ca::new();
        let projected = Projected::new(&ca);
        let server = Server::start(&ca).await;
        let controller = server.controller(&projected);
        Self::with(ca, projected, server, controller)
    }

    fn with(ca: Ca, projected: Projected, server: Server, controller: Controller) -> Self {
        let (chain, key) = ca.issue(FLEET);
        let certificate = Certificate {
            client: ClientCertificate { chain, key },
            roots: vec![CertificateDer::from_pem_slice(ca.pem.as_bytes()).unwrap()],
            received: SystemTime::now(),
            not_after: SystemTime::now() + Duration::from_secs(3600),
        };
        let certificate = watch::Sender::new(Some(Arc::new(certificate)));
        let (started, applied) = mpsc::unbounded_channel();
        let permits = Arc::new(Semaphore::new(1000));
        let failing = Arc::new(Mutex::default());
        let workers = Workers { started, permits: permits.clone(), failing: Arc::clone(&failing) };
        let state = Arc::new(State::in_zone("zone-a".to_owned()));
        let introduction = Introduction { id: "fleet-0".to_owned(), role: "fleet", least_listeners: 0 };
        let client =
            Client::new(controller, introduction, certificate.subscribe(), workers, state.clone()).with_timing(TIMING);
        let client = tokio::spawn(async move {
            client.run().await;
        });
        Self { server, applied, permits, failing, state, client, ca, _projected: projected, certificate }
    }

    async fn applied(&mut self) -> Arc<Snapshot> {
        soon("a snapshot", self.applied.recv()).await.unwrap()
    }

    /// A new stream, after its two first requests.
    async fn stream(&mut self) -> (AdsStream, DeltaDiscoveryRequest, DeltaDiscoveryRequest) {
        let mut stream = self.server.stream().await;
        let clusters = stream.request_of(TypeUrl::Cluster).await;
        let listeners = stream.request_of(TypeUrl::Listener).await;
        (stream, clusters, listeners)
    }

    /// A stream with the Service `shop/web`, all on its primary, applied and acknowledged.
    async fn serving(&mut self) -> AdsStream {
        let (mut stream, ..) = self.stream().await;
        let asked = stream.acked(TypeUrl::Cluster, clusters(), &[]).await;
        assert_eq!(names(&asked), [(TypeUrl::Endpoints, vec![PRIMARY, CANARY])]);
        stream.acked(TypeUrl::Endpoints, all_endpoints(), &[]).await;
        let asked = stream.acked(TypeUrl::Listener, vec![resource(WEB, "l1", &listener(WEB, 20001))], &[]).await;
        assert_eq!(names(&asked), [(TypeUrl::Route, vec![WEB])]);
        stream.acked(TypeUrl::Route, vec![weights("r1", 100)], &[]).await;
        while self.applied().await.listeners.is_empty() {}
        stream
    }
}

#[tokio::test]
async fn a_renewed_certificate_opens_the_stream_anew_at_once_with_what_is_held() {
    let mut bench = Bench::start().await;
    let stream = bench.serving().await;
    let (chain, key) = bench.ca.issue(FLEET);
    let held = bench.certificate.borrow().clone().unwrap();
    let renewed = Certificate {
        client: ClientCertificate { chain, key },
        roots: held.roots.clone(),
        received: held.received,
        not_after: held.not_after + Duration::from_secs(3600),
    };
    bench.certificate.send_replace(Some(Arc::new(renewed)));
    let (_again, clusters, listeners) = bench.stream().await;
    assert_eq!(clusters.initial_resource_versions.len(), 2, "nothing is sent again");
    assert_eq!(listeners.initial_resource_versions.len(), 1);
    drop(stream);
}

fn clusters() -> Vec<sluice_xds::envoy::service::discovery::v3::Resource> {
    [PRIMARY, CANARY].map(|name| resource(name, "c1", &cluster(name, "p8080.aaaaaaaaaa", FLEET))).into()
}

fn all_endpoints() -> Vec<sluice_xds::envoy::service::discovery::v3::Resource> {
    [PRIMARY, CANARY].map(|name| resource(name, "e1", &endpoints(name, &[("10.0.0.1", 20443)]))).into()
}

fn weights(version: &str, primary: u32) -> sluice_xds::envoy::service::discovery::v3::Resource {
    resource(WEB, version, &route(WEB, &[(PRIMARY, primary), (CANARY, 100 - primary)]))
}

fn names(requests: &[DeltaDiscoveryRequest]) -> Vec<(TypeUrl, Vec<&str>)> {
    requests
        .iter()
        .map(|request| {
            let names = request.resource_names_subscribe.iter().map(String::as_str).collect();
            (TypeUrl::parse(&request.type_url).unwrap(), names)
        })
        .collect()
}

/// The weights of the port, as the workers have them.
fn served(snapshot: &Snapshot) -> Vec<(&str, u32)> {
    let split = snapshot.listeners[WEB].chains[0].protocol.splits().next();
    split
        .unwrap_or_else(|| panic!("{snapshot:?}"))
        .targets
        .iter()
        .map(|(cluster, weight)| (cluster.name.as_str(), *weight))
        .collect()
}

#[tokio::test]
async fn the_first_configuration_is_served_and_then_acknowledged() {
    let mut bench = Bench::start().await;
    let (mut stream, clusters_request, listeners_request) = bench.stream().await;
    let node = clusters_request.node.as_ref().unwrap();
    assert_eq!((node.id.as_str(), node.locality.as_ref().unwrap().zone.as_str()), ("fleet-0", "zone-a"));
    for request in [&clusters_request, &listeners_request] {
        assert_eq!(request.resource_names_subscribe, ["*"]);
        assert!(request.initial_resource_versions.is_empty());
    }
    assert!(listeners_request.node.is_none(), "the node is sent once");

    stream.acked(TypeUrl::Cluster, clusters(), &[]).await;
    stream.acked(TypeUrl::Endpoints, all_endpoints(), &[]).await;
    stream.acked(TypeUrl::Listener, vec![resource(WEB, "l1", &listener(WEB, 20001))], &[]).await;
    assert!(!bench.state.configured(), "its route is missing");
    while let Ok(early) = bench.applied.try_recv() {
        assert!(early.listeners.is_empty(), "a listener without its route");
    }

    // The workers take their time: no ACK meanwhile.
    bench.permits.forget_permits(1000);
    let nonce = stream.send(TypeUrl::Route, vec![weights("r1", 100)], &[]).await;
    let snapshot = bench.applied().await;
    assert_eq!(served(&snapshot), [(PRIMARY, 100), (CANARY, 0)]);
    stream.assert_silent().await;
    bench.permits.add_permits(1000);
    assert_eq!(stream.answer(TypeUrl::Route, &nonce, &mut Vec::new()).await, []);
    soon("readiness", bench.state.wait_configured()).await;
}

#[tokio::test]
async fn a_bad_resource_is_rejected_alone_and_its_last_good_version_serves() {
    let mut bench = Bench::start().await;
    let mut stream = bench.serving().await;
    let moved = resource(PRIMARY, "e2", &endpoints(PRIMARY, &[("10.0.0.9", 20443)]));
    let bad = resource(CANARY, "e2", &endpoints(CANARY, &[("not-an-ip", 20443)]));
    let nonce = stream.send(TypeUrl::Endpoints, vec![bad, moved], &[]).await;
    let snapshot = bench.applied().await;
    let rejected = stream.answer(TypeUrl::Endpoints, &nonce, &mut Vec::new()).await;
    let [(name, reason)] = rejected.as_slice() else { panic!("{rejected:?}") };
    assert_eq!(name, CANARY);
    assert!(reason.contains("endpoints[0].lb_endpoints[0]") && reason.contains("not-an-ip"), "{reason}");

    let split = snapshot.listeners[WEB].chains[0].protocol.splits().next().unwrap();
    let upstream = |index: usize| &split.targets[index].0.upstream;
    assert_eq!(upstream(0), &Upstream::Endpoints(vec!["10.0.0.9:20443".parse().unwrap()]));
    assert_eq!(upstream(1), &Upstream::Endpoints(vec!["10.0.0.1:20443".parse().unwrap()]));

    let mut metrics = String::new();
    bench.state.render(&mut metrics);
    assert!(metrics.contains("sluice_xds_rejected_resources{type=\"endpoints\"} 1\n"), "{metrics}");
    let dump = bench.state.dump();
    assert!(dump["resources"]["endpoints"]["rejected"][CANARY].is_string(), "{dump}");
    stream.acked(TypeUrl::Endpoints, vec![resource(CANARY, "e3", &endpoints(CANARY, &[]))], &[]).await;
    metrics.clear();
    bench.state.render(&mut metrics);
    assert!(metrics.contains("sluice_xds_rejected_resources{type=\"endpoints\"} 0\n"), "{metrics}");
}

#[tokio::test]
async fn a_new_stream_says_what_serves_and_changes_nothing() {
    let mut bench = Bench::start().await;
    let mut stream = bench.serving().await;
    // A rejected version is not claimed, but the one that serves instead is.
    let bad = resource(WEB, "r2", &route(WEB, &[(PRIMARY, 0)]));
    let nonce = stream.send(TypeUrl::Route, vec![bad], &[]).await;
    assert_eq!(stream.answer(TypeUrl::Route, &nonce, &mut Vec::new()).await.len(), 1);
    stream.end(Status::unavailable("the lease is lost")).await;

    let (mut stream, clusters_request, listeners_request) = bench.stream().await;
    let held = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        pairs.iter().map(|(name, version)| ((*name).to_owned(), (*version).to_owned())).collect()
    };
    assert_eq!(clusters_request.initial_resource_versions, held(&[(PRIMARY, "c1"), (CANARY, "c1")]));
    assert_eq!(listeners_request.initial_resource_versions, held(&[(WEB, "l1")]));
    let request = stream.request_of(TypeUrl::Endpoints).await;
    assert_eq!(request.initial_resource_versions, held(&[(PRIMARY, "e1"), (CANARY, "e1")]));
    assert_eq!(request.resource_names_subscribe, [PRIMARY, CANARY]);
    let request = stream.request_of(TypeUrl::Route).await;
    assert_eq!(request.initial_resource_versions, held(&[(WEB, "r1")]));
    assert!(tokio::time::timeout(NOTHING, bench.applied.recv()).await.is_err(), "applied without a change");

    stream.acked(TypeUrl::Route, vec![weights("r3", 50)], &[]).await;
    assert_eq!(served(&*bench.applied().await), [(PRIMARY, 50), (CANARY, 50)]);
}

#[tokio::test]
async fn without_a_control_plane_the_last_good_configuration_serves() {
    let mut bench = Bench::start().await;
    let mut stream = bench.serving().await;
    stream.epoch = 4;
    stream.acked(TypeUrl::Route, vec![weights("r2", 90)], &[]).await;
    assert_eq!(served(&*bench.applied().await), [(PRIMARY, 90), (CANARY, 10)]);
    let stopped = Server::start(&bench.ca).await;
    let address = std::mem::replace(&mut bench.server, stopped).stop().await;
    drop(stream);
    soon("the loss to be seen", async {
        while bench.state.dump()["controlPlane"]["connectedTo"].is_string() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(bench.applied.try_recv().is_err(), "the loss changed what serves");

    bench.server = Server::start_as(&bench.ca, crate::pki::CONTROLLER, address).await;
    let (_stream, clusters_request, _) = bench.stream().await;
    let metadata = clusters_request.node.unwrap().metadata.unwrap();
    let epoch = metadata.fields["sluice.dev/epoch"].kind.clone();
    assert_eq!(epoch, Some(prost_types::value::Kind::StringValue("4".to_owned())));
}

#[tokio::test]
async fn an_older_epoch_is_left_and_changes_nothing() {
    let mut bench = Bench::start().await;
    let mut stream = bench.serving().await;
    stream.epoch = 7;
    stream.acked(TypeUrl::Route, vec![weights("r2", 90)], &[]).await;
    assert_eq!(served(&*bench.applied().await), [(PRIMARY, 90), (CANARY, 10)]);
    stream.epoch = 6;
    stream.send(TypeUrl::Route, vec![weights("r3", 0)], &[]).await;
    stream.assert_left().await;
    assert!(bench.applied.try_recv().is_err());

    let (mut stream, ..) = bench.stream().await;
    stream.epoch = 8;
    stream.request_of(TypeUrl::Endpoints).await;
    assert_eq!(stream.request_of(TypeUrl::Route).await.initial_resource_versions[WEB], "r2");
    stream.acked(TypeUrl::Route, vec![weights("r4", 80)], &[]).await;
    assert_eq!(served(&*bench.applied().await), [(PRIMARY, 80), (CANARY, 20)]);
}

#[tokio::test]
async fn removed_listeners_close_and_nothing_of_theirs_is_asked_for_any_more() {
    let mut bench = Bench::start().await;
    let mut stream = bench.serving().await;
    let asked = stream.acked(TypeUrl::Listener, Vec::new(), &[WEB]).await;
    assert!(bench.applied().await.listeners.is_empty());
    let [request] = asked.as_slice() else { panic!("{asked:?}") };
    assert_eq!(
        (request.type_url.as_str(), request.resource_names_unsubscribe.as_slice()),
        (TypeUrl::Route.as_str(), [WEB.to_owned()].as_slice())
    );
    let asked = stream.acked(TypeUrl::Cluster, Vec::new(), &[PRIMARY, CANARY]).await;
    assert_eq!(asked[0].resource_names_unsubscribe, [PRIMARY, CANARY]);
}

#[tokio::test]
async fn a_route_waits_for_its_clusters_and_is_acknowledged_with_them() {
    let mut bench = Bench::start().await;
    let mut stream = bench.serving().await;
    let new = "shop/web:80/cccccccccc";
    let first = stream.send(TypeUrl::Route, vec![resource(WEB, "r2", &route(WEB, &[(new, 100)]))], &[]).await;
    stream.assert_silent().await;
    assert!(bench.applied.try_recv().is_err(), "a route without its cluster");
    stream.acked(TypeUrl::Cluster, vec![resource(new, "c1", &cluster(new, "p8080.cccccccccc", FLEET))], &[]).await;
    let nonce = stream.send(TypeUrl::Endpoints, vec![resource(new, "e1", &endpoints(new, &[]))], &[]).await;
    assert_eq!(served(&*bench.applied().await), [(new, 100)]);
    let mut answered = [stream.request().await.response_nonce, stream.request().await.response_nonce];
    answered.sort();
    let mut expected = [first, nonce];
    expected.sort();
    assert_eq!(answered, expected);
}

#[tokio::test]
async fn a_route_whose_clusters_do_not_come_is_rejected_and_serves_when_they_do() {
    let mut bench = Bench::start().await;
    let mut stream = bench.serving().await;
    let new = "shop/web:80/cccccccccc";
    let nonce = stream.send(TypeUrl::Route, vec![resource(WEB, "r2", &route(WEB, &[(new, 100)]))], &[]).await;
    let rejected = stream.answer(TypeUrl::Route, &nonce, &mut Vec::new()).await;
    assert!(rejected.len() == 1 && rejected[0].0 == WEB && rejected[0].1.contains(new), "{rejected:?}");
    assert!(bench.applied.try_recv().is_err());

    stream.acked(TypeUrl::Cluster, vec![resource(new, "c1", &cluster(new, "p8080.cccccccccc", FLEET))], &[]).await;
    stream.acked(TypeUrl::Endpoints, vec![resource(new, "e1", &endpoints(new, &[]))], &[]).await;
    assert_eq!(served(&*bench.applied().await), [(new, 100)]);
    assert!(bench.state.dump()["resources"]["routes"].get("rejected").is_none());
}

#[tokio::test]
async fn clusters_that_are_removed_too_early_serve_on() {
    let mut bench = Bench::start().await;
    let mut stream = bench.serving().await;
    stream.acked(TypeUrl::Cluster, Vec::new(), &[CANARY]).await;
    assert!(bench.applied.try_recv().is_err(), "the route still names it");
    stream.acked(TypeUrl::Route, vec![resource(WEB, "r2", &unavailable(WEB))], &[]).await;
    let snapshot = bench.applied().await;
    let unavailable = Protocol::http(Action::Respond(http::StatusCode::SERVICE_UNAVAILABLE));
    assert_eq!(snapshot.listeners[WEB].chains[0].protocol, unavailable);
}

#[tokio::test]
async fn a_listener_that_cannot_be_opened_is_rejected_and_tried_again() {
    let mut bench = Bench::start().await;
    let mut stream = bench.serving().await;
    let api = "shop/api:80";
    bench.failing.lock().unwrap().insert(api.to_owned(), "the port is in use".to_owned());
    stream.acked(TypeUrl::Listener, vec![resource(api, "l1", &listener(api, 20002))], &[]).await;
    let nonce = stream.send(TypeUrl::Route, vec![resource(api, "r1", &route(api, &[(PRIMARY, 1)]))], &[]).await;
    let rejected = stream.answer(TypeUrl::Route, &nonce, &mut Vec::new()).await;
    assert!(rejected.len() == 1 && rejected[0].0 == api && rejected[0].1.contains("in use"), "{rejected:?}");
    for _ in 0..2 {
        assert!(bench.applied().await.listeners.contains_key(api), "it is tried again");
    }

    stream.end(Status::unavailable("over")).await;
    let (mut stream, _, listeners_request) = bench.stream().await;
    assert!(!listeners_request.initial_resource_versions.contains_key(api), "it does not serve");
    stream.request_of(TypeUrl::Endpoints).await;
    assert!(!stream.request_of(TypeUrl::Route).await.initial_resource_versions.contains_key(api));
    let nonce = stream.send(TypeUrl::Route, vec![resource(api, "r1", &route(api, &[(PRIMARY, 1)]))], &[]).await;
    assert_eq!(stream.answer(TypeUrl::Route, &nonce, &mut Vec::new()).await.len(), 1, "it cannot be opened still");

    // A server sends nothing again that was rejected: it is told on a new stream that the port is open.
    bench.failing.lock().unwrap().clear();
    let (mut stream, _, listeners_request) = bench.stream().await;
    assert!(listeners_request.initial_resource_versions.contains_key(api));
    stream.request_of(TypeUrl::Endpoints).await;
    assert_eq!(stream.request_of(TypeUrl::Route).await.initial_resource_versions.get(api).unwrap(), "r1");
}

#[tokio::test]
async fn a_fleet_without_services_is_configured_by_empty_responses() {
    let mut bench = Bench::start().await;
    let (mut stream, ..) = bench.stream().await;
    stream.acked(TypeUrl::Cluster, Vec::new(), &[]).await;
    assert!(tokio::time::timeout(NOTHING, bench.state.wait_configured()).await.is_err(), "listeners are unknown");
    stream.acked(TypeUrl::Listener, Vec::new(), &[]).await;
    soon("readiness", bench.state.wait_configured()).await;
}

#[tokio::test]
async fn a_standby_leads_to_the_leader() {
    let ca = Ca::new();
    let projected = Projected::new(&ca);
    let mut standby = Server::start(&ca).await;
    let leader = Server::start(&ca).await;
    let controller = standby.controller(&projected);
    let mut status = Status::unavailable("not the leader");
    status.metadata_mut().insert("sluice-leader", leader.address.to_string().parse().unwrap());
    let mut bench = Bench::with(ca, projected, leader, controller);
    standby.stream().await.end(status).await;
    bench.serving().await;
    assert!(standby.streams.try_recv().is_err());
}
