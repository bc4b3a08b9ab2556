use std::{collections::BTreeMap, sync::Arc, time::Duration};

use http::StatusCode;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use sluice_proxy::{
    ads::{Apply, Client, Introduction, State},
    controller::ClientCertificate,
    identity::Certificate,
    metrics::{Metrics, RevisionMetrics},
    snapshot::{MetricLabels, Snapshot},
};
use sluice_xds::sluice::guard::v1::{
    OutcomeReport, OutcomeWatch, Outcomes, Release, ReleaseOutcomes, outcome_service_server::OutcomeServiceServer,
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep},
};
use tonic::{Status, Streaming, service::Routes, transport::Endpoint};

use crate::{
    pki::{Ca, FLEET, Projected},
    server::{Guards, NOTHING, Server, soon},
};

struct Nothing;

impl Apply for Nothing {
    async fn apply(&self, _: Arc<Snapshot>) -> BTreeMap<String, String> {
        BTreeMap::new()
    }
}

/// A member of the fleet whose workers the test plays.
struct Bench {
    server: Server,
    metrics: Arc<Metrics>,
    client: JoinHandle<()>,
    _projected: Projected,
    _certificate: watch::Sender<Option<Arc<Certificate>>>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.client.abort();
    }
}

impl Bench {
    async fn start() -> Self {
        let ca = Ca::new();
        let projected = Projected::new(&ca);
        let server = Server::start(&ca).await;
        let (chain, key) = ca.issue(FLEET);
        let now = std::time::SystemTime::now();
        let certificate = Certificate {
            client: ClientCertificate { chain, key },
            roots: Vec::new(),
            received: now,
            not_after: now + Duration::from_secs(3600),
        };
        let certificate = watch::Sender::new(Some(Arc::new(certificate)));
        let metrics = Metrics::new("fleet-0", 2);
        let introduction = Introduction { id: "fleet-0".to_owned(), role: "fleet", least_listeners: 0 };
        let controller = server.controller(&projected);
        let client =
            Client::new(controller, introduction, certificate.subscribe(), Nothing, Arc::new(State::default()))
                .reporting(metrics.clone());
        let client = tokio::spawn(async move {
            client.run().await;
        });
        Self { server, metrics, client, _projected: projected, _certificate: certificate }
    }

    fn revision(&self, revision: &str, thread: usize) -> RevisionMetrics {
        let labels = MetricLabels {
            destination_namespace: "shop".to_owned(),
            destination_service: "web".to_owned(),
            revision: revision.to_owned(),
        };
        self.metrics.revision(&labels, thread)
    }
}

fn release(id: u64) -> OutcomeWatch {
    OutcomeWatch {
        releases: vec![Release {
            id,
            destination_namespace: "shop".to_owned(),
            destination_service: "web".to_owned(),
            primary: "aaa".to_owned(),
            canary: "bbb".to_owned(),
            slow_above_microseconds: 500_000,
        }],
    }
}

fn answer(revision: &RevisionMetrics, status: StatusCode, milliseconds: u64) {
    revision.record(status, None, Duration::from_millis(milliseconds), None);
}

async fn next(reports: &mut Streaming<OutcomeReport>) -> Vec<ReleaseOutcomes> {
    soon("a report", reports.message()).await.unwrap().expect("the client ended the stream").releases
}

async fn assert_silent(reports: &mut Streaming<OutcomeReport>) {
    // Longer than from one report to the next.
    let report = tokio::time::timeout(3 * NOTHING, reports.message()).await;
    assert!(report.is_err(), "not expected: {report:?}");
}

fn outcomes(id: u64, primary: (u64, u64, u64), canary: (u64, u64, u64)) -> ReleaseOutcomes {
    let of = |(requests, bad, slow)| Some(Outcomes { requests, bad, slow });
    ReleaseOutcomes { id, primary: of(primary), canary: of(canary), canary_more_under_way: 0 }
}

#[tokio::test]
async fn requests_under_way_are_reported_once_and_again_only_when_they_become_more() {
    let mut bench = Bench::start().await;
    let (primary, canary) = (bench.revision("aaa", 0), [bench.revision("bbb", 0), bench.revision("bbb", 1)]);
    canary[0].begun();
    let (watches, mut reports) = soon("a stream", bench.server.guards.recv()).await.unwrap().accept();
    watches.send(Ok(release(7))).await.unwrap();
    assert_silent(&mut reports).await;
    let more = |canary_more_under_way, ended| ReleaseOutcomes {
        canary_more_under_way,
        ..outcomes(7, (0, 0, 0), (ended, 0, 0))
    };
    // One was there before, and nobody asks for those of the primary.
    primary.begun();
    canary[1].begun();
    assert_eq!(next(&mut reports).await, [more(1, 0)]);
    assert_silent(&mut reports).await;
    canary[0].over();
    answer(&canary[0], StatusCode::OK, 1);
    assert_eq!(next(&mut reports).await, [more(0, 1)]);
    canary[1].begun();
    assert_silent(&mut reports).await;
    canary[1].begun();
    assert_eq!(next(&mut reports).await, [more(1, 0)]);
}

#[tokio::test]
async fn what_is_asked_for_is_reported_from_then_on_as_it_changes() {
    let mut bench = Bench::start().await;
    let (primary, canary) = (bench.revision("aaa", 0), [bench.revision("bbb", 0), bench.revision("bbb", 1)]);
    let other = bench.revision("ccc", 0);
    answer(&canary[0], StatusCode::INTERNAL_SERVER_ERROR, 1);
    let (watches, mut reports) = soon("a stream", bench.server.guards.recv()).await.unwrap().accept();
    watches.send(Ok(release(7))).await.unwrap();
    assert_silent(&mut reports).await;

    for _ in 0..3 {
        answer(&primary, StatusCode::OK, 1);
    }
    answer(&canary[0], StatusCode::OK, 900);
    answer(&canary[1], StatusCode::BAD_GATEWAY, 1);
    answer(&other, StatusCode::BAD_GATEWAY, 1);
    // The tick may fall between two of them.
    let mut sum = (0, 0, 0, 0);
    while sum.1 < 2 {
        for one in next(&mut reports).await {
            let (primary, canary) = (one.primary.unwrap(), one.canary.unwrap());
            assert_eq!((one.id, primary.bad, primary.slow), (7, 0, 0));
            sum = (sum.0 + primary.requests, sum.1 + canary.requests, sum.2 + canary.bad, sum.3 + canary.slow);
        }
    }
    assert_eq!(sum, (3, 2, 1, 1), "what was before the question is not counted");
    assert_silent(&mut reports).await;

    // The same release goes on beside another one; at the end nothing is asked for any more.
    let mut two = release(7);
    two.releases.extend(release(8).releases);
    watches.send(Ok(two)).await.unwrap();
    assert_silent(&mut reports).await;
    answer(&canary[1], StatusCode::OK, 1);
    assert_eq!(next(&mut reports).await, [outcomes(7, (0, 0, 0), (1, 0, 0)), outcomes(8, (0, 0, 0), (1, 0, 0))]);
    watches.send(Ok(OutcomeWatch::default())).await.unwrap();
    assert_silent(&mut reports).await;
    answer(&canary[1], StatusCode::OK, 1);
    assert_silent(&mut reports).await;
}

/// The leader's test counts on it (docs/guard.md). Nothing here waits for anything but the clock, which the test has stopped: it goes
/// on when everybody waits for it.
#[tokio::test(start_paused = true)]
async fn while_requests_end_they_are_reported_at_least_four_times_a_second() {
    let (ours, theirs) = tokio::io::duplex(64 << 10);
    let (guards, mut streams) = mpsc::channel(1);
    let service = TowerToHyperService::new(Routes::new(OutcomeServiceServer::new(Guards(guards))));
    let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    let serving = tokio::spawn(server.serve_connection(TokioIo::new(theirs), service));
    let mut ours = Some(TokioIo::new(ours));
    let connector = tower::service_fn(move |_| {
        let connection = ours.take().ok_or_else(|| std::io::Error::other("one connection is enough"));
        async move { connection }
    });
    let channel = Endpoint::from_static("http://guard").connect_with_connector(connector).await.unwrap();
    let metrics = Metrics::new("fleet-0", 1);
    let reporting = tokio::spawn(sluice_proxy::outcomes::report(channel, metrics.clone()));
    let (watches, mut reports) = soon("a stream", streams.recv()).await.unwrap().accept();
    watches.send(Ok(release(1))).await.unwrap();
    let labels = MetricLabels {
        destination_namespace: "shop".to_owned(),
        destination_service: "web".to_owned(),
        revision: "bbb".to_owned(),
    };
    let canary = metrics.revision(&labels, 0);
    let ending = tokio::spawn(async move {
        loop {
            answer(&canary, StatusCode::OK, 1);
            sleep(Duration::from_millis(5)).await;
        }
    });
    next(&mut reports).await;
    for _ in 0..40 {
        let last = Instant::now();
        assert_ne!(next(&mut reports).await, []);
        assert!(last.elapsed() <= Duration::from_millis(250), "{:?} from one report to the next", last.elapsed());
    }
    for task in [ending.abort_handle(), reporting.abort_handle(), serving.abort_handle()] {
        task.abort();
    }
}

#[tokio::test]
async fn a_revision_that_comes_back_goes_on_from_its_last_report() {
    let mut bench = Bench::start().await;
    let canary = bench.revision("bbb", 0);
    for _ in 0..5 {
        answer(&canary, StatusCode::BAD_GATEWAY, 1);
    }
    let (watches, mut reports) = soon("a stream", bench.server.guards.recv()).await.unwrap().accept();
    watches.send(Ok(release(1))).await.unwrap();
    assert_silent(&mut reports).await;
    drop(canary);
    let again = bench.revision("bbb", 0);
    answer(&again, StatusCode::OK, 1);
    assert_eq!(next(&mut reports).await, [outcomes(1, (0, 0, 0), (1, 0, 0))]);
}

#[tokio::test]
async fn a_stream_that_ends_is_opened_again_and_the_xds_stream_does_not_mind() {
    let mut bench = Bench::start().await;
    let mut ads = bench.server.stream().await;
    soon("a stream", bench.server.guards.recv()).await.unwrap().refuse(Status::permission_denied("not known yet"));
    let (watches, _reports) = soon("another stream", bench.server.guards.recv()).await.unwrap().accept();
    watches.send(Err(Status::unavailable("over"))).await.unwrap();
    let stream = soon("a third stream", bench.server.guards.recv()).await.unwrap();
    // A controller of an older version is not asked again on this connection.
    stream.refuse(Status::unimplemented("no guard"));
    assert!(tokio::time::timeout(10 * NOTHING, bench.server.guards.recv()).await.is_err());
    ads.request().await;
    assert!(bench.server.streams.try_recv().is_err(), "it is still the first stream");
}
