//! Health and metrics over HTTP (port 18080).

mod calls;

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use hyper_util::service::TowerToHyperService;
use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};
use sluice_crds::{Backend, CanaryStatus, ConditionStatus, GuardSignal};
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;

pub use self::calls::Calls;
use crate::{
    admission::{Effective, Report},
    cache::{CanaryKey, Touches},
    delivery::reconciler::Gauges,
    guard,
};

const STALLED: &str = "Stalled";
/// Of a connection: twice what Prometheus waits by default.
const LIFE: Duration = Duration::from_secs(20);

type Float = Gauge<f64, std::sync::atomic::AtomicU64>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Of {
    canary_namespace: String,
    canary_name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PhaseOf {
    canary_namespace: String,
    canary_name: String,
    phase: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonOf {
    canary_namespace: String,
    canary_name: String,
    reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct GateOf {
    canary_namespace: String,
    canary_name: String,
    gate: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LimitOf {
    canary_namespace: String,
    canary_name: String,
    gate: String,
    bound: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ProtectionOf {
    by: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SignalOf {
    signal: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    result: &'static str,
}

/// From a look at memory to a call that met its deadline, in seconds.
fn durations() -> Histogram {
    Histogram::new([0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0])
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RoleOf {
    destination_namespace: String,
    destination_service: String,
    revision: String,
    role: &'static str,
}

/// What is exported. Series of Canaries are made at each scrape from their last status, so they go with the Canary, and with
/// leadership: only the leader reconciles.
#[derive(Clone)]
pub struct Metrics(Arc<Inner>);

struct Inner {
    registry: Registry,
    canaries: Mutex<BTreeMap<CanaryKey, CanaryStatus>>,
    phase: Family<PhaseOf, Gauge>,
    stalled: Family<ReasonOf, Gauge>,
    waiting: Family<ReasonOf, Gauge>,
    requested: Family<Of, Gauge>,
    effective: Family<Of, Gauge>,
    failed: Family<Of, Gauge>,
    value: Family<GateOf, Float>,
    limit: Family<LimitOf, Float>,
    info: Family<RoleOf, Gauge>,
    reconciles: Family<Outcome, Histogram, fn() -> Histogram>,
    queue: Gauge,
    leading: Gauge,
    protection: Family<ProtectionOf, Gauge>,
    unprotected: Gauge,
    root: Gauge,
    breaches: Family<SignalOf, Counter>,
    reporting: Gauge,
    ready: AtomicBool,
    touches: Touches,
    term: watch::Receiver<Option<u64>>,
}

impl Metrics {
    #[must_use]
    pub fn new(touches: Touches, term: watch::Receiver<Option<u64>>, calls: &Calls) -> Self {
        let mut registry = Registry::with_prefix("sluice");
        calls.register(&mut registry);
        let mut inner = Inner {
            registry: Registry::default(),
            canaries: Mutex::default(),
            phase: Family::default(),
            stalled: Family::default(),
            waiting: Family::default(),
            requested: Family::default(),
            effective: Family::default(),
            failed: Family::default(),
            value: Family::default(),
            limit: Family::default(),
            info: Family::default(),
            reconciles: Family::new_with_constructor(durations),
            queue: Gauge::default(),
            leading: Gauge::default(),
            protection: Family::default(),
            unprotected: Gauge::default(),
            root: Gauge::default(),
            breaches: Family::default(),
            reporting: Gauge::default(),
            ready: AtomicBool::new(false),
            touches,
            term,
        };
        registry.register("canary_phase", "1 for the phase that the Canary is in", inner.phase.clone());
        registry.register(
            "canary_stalled",
            "1 while the condition Stalled is True, by its reason",
            inner.stalled.clone(),
        );
        registry.register(
            "canary_waiting",
            "1 while the Canary waits for something, by the reason in status.waiting",
            inner.waiting.clone(),
        );
        registry.register(
            "canary_requested_weight",
            "Percent of requests that the canary should have; absent before the Service is taken over",
            inner.requested.clone(),
        );
        registry.register(
            "canary_effective_weight",
            "Percent of requests that every member of the fleet has acknowledged; absent while unknown",
            inner.effective.clone(),
        );
        registry.register("canary_failed_checks", "Failed checks of the present release", inner.failed.clone());
        registry.register("gate_value", "Last value of a gate for the canary", inner.value.clone());
        registry.register("gate_limit", "Bound of a gate: min or max", inner.limit.clone());
        registry.register(
            "revision_info",
            "1 for each revision that has a role; joins the fleet's series by revision",
            inner.info.clone(),
        );
        registry.register(
            "reconcile_duration_seconds",
            "Looks at Canaries, by result: ok, or an error that is tried again",
            inner.reconciles.clone(),
        );
        registry.register("reconcile_queue_depth", "Canaries that wait to be looked at", inner.queue.clone());
        registry.register("leader", "1 while this replica leads", inner.leading.clone());
        registry.register(
            "protection_info",
            "1 for what keeps our additions to Services and Deployments: policy, webhook or repair; from the leader",
            inner.protection.clone(),
        );
        registry.register(
            "protection_incomplete",
            "1 while the protection that was asked for is not served or not reached by the API server, or could not be written",
            inner.unprotected.clone(),
        );
        registry.register(
            "root_expires_timestamp_seconds",
            "When the root certificate ends that signs at this replica",
            inner.root.clone(),
        );
        registry.register(
            "guard_breaches",
            "Canaries that the guard found far worse than their primary, by what it compared",
            inner.breaches.clone(),
        );
        registry.register(
            "guard_reporting_members",
            "Members of the fleet that report to the guard of this replica",
            inner.reporting.clone(),
        );
        // There at 0, so that the first one is an increase.
        for signal in [GuardSignal::Errors, GuardSignal::Latency] {
            let _ = inner.breaches.get_or_create(&signal_of(signal));
        }
        inner.registry = registry;
        Self(Arc::new(inner))
    }

    /// The caches are warm.
    pub fn set_ready(&self) {
        self.0.ready.store(true, Ordering::Relaxed);
    }

    /// When the root certificate ends.
    pub fn set_root_expires(&self, at: jiff::Timestamp) {
        self.0.root.set(at.as_second());
    }

    /// Everything in the Prometheus text format.
    #[must_use]
    pub fn render(&self) -> String {
        let inner = &self.0;
        // Held until all is encoded: another scrape must not clear what this one has filled.
        let canaries = inner.canaries.lock().unwrap_or_else(PoisonError::into_inner);
        inner.phase.clear();
        inner.stalled.clear();
        inner.waiting.clear();
        inner.requested.clear();
        inner.effective.clear();
        inner.failed.clear();
        inner.value.clear();
        inner.limit.clear();
        inner.info.clear();
        // What a former leader knows is old.
        let leads = inner.term.borrow().is_some();
        for (key, status) in canaries.iter().filter(|_| leads) {
            inner.fill(key, status);
        }
        inner.queue.set(i64::try_from(inner.touches.len()).unwrap_or(i64::MAX));
        inner.leading.set(i64::from(leads));
        let mut out = String::new();
        if let Err(error) = text::encode(&mut out, &inner.registry) {
            out.clear();
            let _ = write!(out, "# cannot encode: {error}");
        }
        out
    }
}

impl Inner {
    fn fill(&self, key: &CanaryKey, status: &CanaryStatus) {
        let (namespace, name) = (&key.namespace, &key.name);
        let of = Of { canary_namespace: namespace.clone(), canary_name: name.clone() };
        let phase = format!("{:?}", status.phase);
        self.phase
            .get_or_create(&PhaseOf { canary_namespace: namespace.clone(), canary_name: name.clone(), phase })
            .set(1);
        let stalled = status
            .conditions
            .iter()
            .find(|condition| condition.kind == STALLED && condition.status == ConditionStatus::True);
        let because = |reason: &str| ReasonOf {
            canary_namespace: namespace.clone(),
            canary_name: name.clone(),
            reason: reason.to_owned(),
        };
        if let Some(stalled) = stalled {
            self.stalled.get_or_create(&because(&stalled.reason)).set(1);
        }
        if let Some(waiting) = &status.waiting {
            self.waiting.get_or_create(&because(&waiting.reason)).set(1);
        }
        if status.traffic.is_some() {
            self.requested.get_or_create(&of).set(status.requested_weight.into());
        }
        if let Some(weight) = status.effective_weight {
            self.effective.get_or_create(&of).set(weight.into());
        }
        self.failed.get_or_create(&of).set(status.failed_checks.into());
        for gate in &status.gates {
            let Some(value) = gate.value else { continue };
            let of = GateOf { canary_namespace: namespace.clone(), canary_name: name.clone(), gate: gate.name.clone() };
            self.value.get_or_create(&of).set(value);
        }
        for metric in
            status.plan.iter().filter_map(|plan| plan.analysis.as_ref()).flat_map(|analysis| &analysis.metrics)
        {
            let Some(range) = metric.threshold_range else { continue };
            for (bound, limit) in [("min", range.min), ("max", range.max)] {
                let of = LimitOf {
                    canary_namespace: namespace.clone(),
                    canary_name: name.clone(),
                    gate: metric.name.clone(),
                    bound,
                };
                if let Some(limit) = limit {
                    self.limit.get_or_create(&of).set(limit);
                }
            }
        }
        let Some(service) = &status.service else { return };
        let backends = status
            .traffic
            .iter()
            .flat_map(|traffic| [("primary", Some(&traffic.primary)), ("canary", traffic.canary.as_ref())]);
        for (role, backend) in backends {
            let Some(Backend(revision)) = backend else { continue };
            let of = RoleOf {
                destination_namespace: namespace.clone(),
                destination_service: service.clone(),
                revision: revision.clone(),
                role,
            };
            self.info.get_or_create(&of).set(1);
        }
    }
}

impl Gauges for Metrics {
    fn set(&self, canary: &CanaryKey, status: &CanaryStatus) {
        let mut canaries = self.0.canaries.lock().unwrap_or_else(PoisonError::into_inner);
        canaries.insert(canary.clone(), status.clone());
    }

    fn remove(&self, canary: &CanaryKey) {
        self.0.canaries.lock().unwrap_or_else(PoisonError::into_inner).remove(canary);
    }

    fn reconciled(&self, took: Duration, ok: bool) {
        let result = if ok { "ok" } else { "error" };
        self.0.reconciles.get_or_create(&Outcome { result }).observe(took.as_secs_f64());
    }
}

impl Report for Metrics {
    fn protection(&self, state: Option<(Effective, bool)>) {
        self.0.protection.clear();
        self.0.unprotected.set(i64::from(state.as_ref().is_some_and(|(_, incomplete)| *incomplete)));
        if let Some((effective, _)) = state {
            self.0.protection.get_or_create(&ProtectionOf { by: effective.to_string() }).set(1);
        }
    }
}

impl guard::Report for Metrics {
    fn breached(&self, signal: GuardSignal) {
        self.0.breaches.get_or_create(&signal_of(signal)).inc();
    }

    fn reporting(&self, members: usize) {
        self.0.reporting.set(i64::try_from(members).unwrap_or(i64::MAX));
    }
}

fn signal_of(signal: GuardSignal) -> SignalOf {
    let signal = match signal {
        GuardSignal::Errors => "errors",
        GuardSignal::Latency => "latency",
    };
    SignalOf { signal }
}

/// Serves until `stop`, which cuts what is open.
pub async fn serve(listener: TcpListener, metrics: Metrics, stop: CancellationToken) {
    let app = Router::new()
        .route("/healthz/live", get(|| async { "ok\n" }))
        .route("/healthz/ready", get(ready))
        .route("/metrics", get(scrape))
        .with_state(metrics);
    let serving = sluice_health::serve(listener, LIFE, TowerToHyperService::new(app));
    stop.run_until_cancelled(serving).await;
}

/// Ready = caches warm; whether it leads does not matter.
async fn ready(State(metrics): State<Metrics>) -> impl IntoResponse {
    if metrics.0.ready.load(Ordering::Relaxed) {
        (StatusCode::OK, "ok\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the caches are not warm yet\n")
    }
}

async fn scrape(State(metrics): State<Metrics>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], metrics.render())
}

#[cfg(test)]
mod tests {
    use sluice_crds::{Phase, Traffic};
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
        time::timeout,
    };

    use super::*;

    #[tokio::test]
    async fn whoever_holds_connections_keeps_nobody_from_an_answer_and_does_not_hold_them_for_long() {
        const PATIENCE: Duration = Duration::from_secs(20);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let metrics = Metrics::new(Touches::default(), watch::channel(None).1, &Calls::default());
        metrics.set_ready();
        let stop = CancellationToken::new();
        let serving = tokio::spawn(serve(listener, metrics, stop.clone()));
        let mut held = Vec::new();
        for _ in 0..200 {
            held.push(TcpStream::connect(address).await.unwrap());
        }
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(b"GET /healthz/ready HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        timeout(PATIENCE, client.read_to_string(&mut answer)).await.unwrap().unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("\r\n\r\nok\n"), "{answer}");

        tokio::time::pause();
        tokio::time::advance(LIFE).await;
        tokio::time::resume();
        for mut connection in held {
            assert_eq!(timeout(PATIENCE, connection.read(&mut [0])).await.unwrap().unwrap(), 0, "it is closed");
        }
        let _silent = TcpStream::connect(address).await.unwrap();
        stop.cancel();
        timeout(PATIENCE, serving).await.unwrap().unwrap();
    }

    #[test]
    fn a_canarys_series_say_its_status_and_go_with_it() {
        let (term, leads) = watch::channel(Some(3));
        let metrics = Metrics::new(Touches::default(), leads, &Calls::default());
        let key = CanaryKey::new("shop", "cart");
        let status = CanaryStatus {
            phase: Phase::Progressing,
            requested_weight: 20,
            effective_weight: Some(10),
            service: Some("cart".to_owned()),
            traffic: Some(Traffic {
                primary: Backend::revision("aaa"),
                canary: Some(Backend::revision("bbb")),
                weight: 20,
                mirror: 0,
                matches: None,
            }),
            ..CanaryStatus::default()
        };
        metrics.set(&key, &status);
        let text = metrics.render();
        for line in [
            "sluice_canary_phase{canary_namespace=\"shop\",canary_name=\"cart\",phase=\"Progressing\"} 1",
            "sluice_canary_requested_weight{canary_namespace=\"shop\",canary_name=\"cart\"} 20",
            "sluice_canary_effective_weight{canary_namespace=\"shop\",canary_name=\"cart\"} 10",
            "sluice_revision_info{destination_namespace=\"shop\",destination_service=\"cart\",revision=\"bbb\",role=\"canary\"} 1",
            "sluice_leader 1",
        ] {
            assert!(text.contains(line), "{line} is missing in:\n{text}");
        }
        metrics.set(&key, &CanaryStatus { effective_weight: None, ..status.clone() });
        assert!(!metrics.render().contains("effective_weight{"), "what is unknown has no series");
        assert!(!metrics.render().contains("canary_stalled{"));
        let stalled = |is| sluice_crds::Condition {
            kind: STALLED.to_owned(),
            status: is,
            reason: "RolledBack".to_owned(),
            message: String::new(),
            observed_generation: None,
            last_transition_time: jiff::Timestamp::UNIX_EPOCH,
        };
        for (is, seen) in [(ConditionStatus::True, true), (ConditionStatus::False, false)] {
            metrics.set(&key, &CanaryStatus { conditions: vec![stalled(is)], ..status.clone() });
            let line = "sluice_canary_stalled{canary_namespace=\"shop\",canary_name=\"cart\",reason=\"RolledBack\"} 1";
            assert_eq!(metrics.render().contains(line), seen);
        }
        let waiting = sluice_crds::Waiting { reason: "Paused".to_owned(), message: String::new(), until: None };
        metrics.set(&key, &CanaryStatus { waiting: Some(waiting), traffic: None, ..status.clone() });
        let text = metrics.render();
        let line = "sluice_canary_waiting{canary_namespace=\"shop\",canary_name=\"cart\",reason=\"Paused\"} 1";
        assert!(text.contains(line), "{text}");
        assert!(!text.contains("requested_weight{"), "nobody is asked for a weight before the takeover");
        metrics.set(&key, &status);
        assert!(!metrics.render().contains("canary_waiting{"));
        term.send_replace(None);
        assert!(!metrics.render().contains("cart"), "another replica speaks for it now");
        term.send_replace(Some(4));
        assert!(metrics.render().contains("cart"));
        metrics.remove(&key);
        assert!(!metrics.render().contains("cart"));
        metrics.reconciled(Duration::from_millis(2), false);
        assert!(metrics.render().contains("sluice_reconcile_duration_seconds_count{result=\"error\"} 1"));
    }
}
