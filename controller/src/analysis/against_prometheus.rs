//! The engine against a real Prometheus that scrapes a fleet played by these tests, every second.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fmt::Write,
    net::SocketAddr,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use axum::{Router, extract::State, routing::get};
use futures::future::BoxFuture;
use jiff::Timestamp;
use sluice_crds::{GateStatus, Metric, MetricTemplate, VerdictStatus};
use tokio::{net::TcpListener, task::JoinHandle, time::timeout};

use super::{DryRunRequest, Engine, Report, SecretData, Settings, Sources, StepId, Task};
use crate::cache::{CanaryKey, Touches};

const PATIENCE: Duration = Duration::from_secs(30);
/// Upper bounds of the buckets: enough of them for the tests.
const BOUNDS: [(f64, &str); 4] = [(0.1, "0.1"), (0.5, "0.5"), (1.0, "1"), (60.0, "60")];

/// What one member has counted for one revision.
#[derive(Clone, Default)]
struct Counts {
    ok: u64,
    failed: u64,
    /// As in the real proxy, this series is left out while it is 0.
    grpc_unavailable: u64,
    /// For each bound, how many lie in that bucket (not cumulative).
    durations: [u64; 4],
    /// Of a revision that gets copies.
    copies: Option<Copies>,
}

/// What became of copies.
#[derive(Clone, Default)]
struct Copies {
    ok: u64,
    failed: u64,
    busy: u64,
    durations: [u64; 4],
}

/// One member of the fleet: its revisions, as configured.
type Member = Arc<Mutex<Vec<(&'static str, Counts)>>>;

fn exposition(name: &str, revisions: &[(&'static str, Counts)]) -> String {
    let mut out = format!("# TYPE sluice_member_info gauge\nsluice_member_info{{member=\"{name}\"}} 1\n");
    for (revision, counts) in revisions {
        let labels = format!("destination_namespace=\"shop\",destination_service=\"cart\",revision=\"{revision}\"");
        for (class, count) in [("2xx", counts.ok), ("3xx", 0), ("4xx", 0), ("5xx", counts.failed)] {
            writeln!(out, "sluice_requests_total{{{labels},code_class=\"{class}\",grpc_status=\"\"}} {count}").unwrap();
        }
        if counts.grpc_unavailable > 0 {
            let more = "code_class=\"2xx\",grpc_status=\"UNAVAILABLE\"";
            writeln!(out, "sluice_requests_total{{{labels},{more}}} {}", counts.grpc_unavailable).unwrap();
        }
        histogram(&mut out, "sluice_request_duration_seconds", &labels, counts.durations);
        if let Some(copies) = &counts.copies {
            for (outcome, count) in [("2xx", copies.ok), ("5xx", copies.failed), ("busy", copies.busy)] {
                writeln!(out, "sluice_mirrored_requests_total{{{labels},outcome=\"{outcome}\"}} {count}").unwrap();
            }
            histogram(&mut out, "sluice_mirrored_request_duration_seconds", &labels, copies.durations);
        }
    }
    out
}

fn histogram(out: &mut String, name: &str, labels: &str, durations: [u64; 4]) {
    let mut total = 0;
    for ((_, bound), count) in BOUNDS.iter().zip(durations) {
        total += count;
        writeln!(out, "{name}_bucket{{{labels},le=\"{bound}\"}} {total}").unwrap();
    }
    writeln!(out, "{name}_bucket{{{labels},le=\"+Inf\"}} {total}\n{name}_count{{{labels}}} {total}").unwrap();
}

/// A fleet and its Prometheus. Both end with it.
struct World {
    fleet: Vec<Member>,
    prometheus: Child,
    directory: PathBuf,
    address: String,
    servers: Vec<JoinHandle<()>>,
    engine: Engine,
    touches: Touches,
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.prometheus.kill();
        let _ = self.prometheus.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
        self.servers.iter().for_each(JoinHandle::abort);
    }
}

struct Templates;

impl Sources for Templates {
    fn metric_template(&self, _: &str, _: &str) -> Option<Arc<MetricTemplate>> {
        None
    }
    fn secret(&self, _: String, _: String) -> BoxFuture<'static, Result<Option<SecretData>, String>> {
        Box::pin(async { Ok(None) })
    }
}

async fn member(name: &'static str) -> (Member, SocketAddr, JoinHandle<()>) {
    let member = Member::default();
    let scrape = async move |State(member): State<Member>| exposition(name, &member.lock().unwrap());
    let app = Router::new().route("/metrics", get(scrape)).with_state(member.clone());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (member, address, tokio::spawn(async move { axum::serve(listener, app).await.unwrap() }))
}

impl World {
    /// Two members, `fleet-0` and `fleet-1`, with the revisions `aaaa` (primary) and `bbbb` (canary) at 0. `None` where no Prometheus is
    /// installed: the test is skipped, and says so.
    async fn start() -> Option<Self> {
        if Command::new("prometheus").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
            let words = "SKIPPED: no `prometheus` in PATH (Debian: apt-get install prometheus)\n";
            // Not captured by the test harness, unlike eprintln: a skipped test must be seen.
            std::io::Write::write_all(&mut std::io::stderr(), words.as_bytes()).unwrap();
            return None;
        }
        let (first, first_address, first_server) = member("fleet-0").await;
        let (second, second_address, second_server) = member("fleet-1").await;
        for member in [&first, &second] {
            *member.lock().unwrap() = vec![("aaaa", Counts::default()), ("bbbb", Counts::default())];
        }
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = free.local_addr().unwrap();
        let directory = std::env::temp_dir().join(format!("sluice-prometheus-{}", address.port()));
        std::fs::create_dir_all(&directory).unwrap();
        let config = format!(
            "global: {{scrape_interval: 1s, scrape_timeout: 1s}}\nscrape_configs:\n- job_name: fleet\n  static_configs:\n  \
             - targets: ['{first_address}', '{second_address}']\n"
        );
        std::fs::write(directory.join("prometheus.yml"), config).unwrap();
        drop(free);
        let prometheus = Command::new("prometheus")
            .arg(format!("--config.file={}", directory.join("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", directory.join("data").display()))
            .arg(format!("--web.listen-address={address}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(directory.join("log")).unwrap())
            .spawn()
            .unwrap();
        let touches = Touches::default();
        let address = format!("http://{address}");
        let settings = Settings { metrics_server: Some(address.clone()), ..Settings::default() };
        let (engine, task) = Engine::start(settings, Arc::new(Templates), touches.clone());
        let servers = vec![first_server, second_server, task];
        let world = Self { fleet: vec![first, second], prometheus, directory, address, servers, engine, touches };
        // Both members were scraped: the first window can open.
        world.engine.set(&key(), Some(world.task(&[gate("request-success-rate", "1s", 0.0)])));
        world.until("both members are scraped", |report| report.gates[0].window_seconds.is_some()).await;
        world.engine.set(&key(), None);
        Some(world)
    }

    /// A task whose step was acknowledged just now.
    fn task(&self, gates: &[Metric]) -> Task {
        let now = Timestamp::now();
        Task {
            canary: key(),
            step: StepId { started_at: now, revision: "bbbb".to_owned(), index: 0 },
            service: "cart".to_owned(),
            target: "cart".to_owned(),
            primary_revision: "aaaa".to_owned(),
            canary_revision: "bbbb".to_owned(),
            gates: gates.to_vec(),
            metrics_server: None,
            acknowledged_at: now,
            interval: Duration::from_secs(1),
            weight: 10,
            mirrored: false,
            members: vec!["fleet-0".to_owned(), "fleet-1".to_owned()],
        }
    }

    fn count(&self, add: impl Fn(&mut Counts, &mut Counts)) {
        for member in &self.fleet {
            let mut revisions = member.lock().unwrap();
            if let [primary, canary] = revisions.as_mut_slice() {
                add(&mut primary.1, &mut canary.1);
            }
        }
    }

    /// The first report of which the condition holds. Meanwhile `traffic` is counted ten times a second.
    async fn with_traffic(
        &self,
        what: &str,
        traffic: impl Fn(&mut Counts, &mut Counts),
        condition: impl Fn(&Report) -> bool,
    ) -> Report {
        let mut ticks = tokio::time::interval(Duration::from_millis(100));
        let mut last = None;
        let waited = timeout(PATIENCE, async {
            loop {
                tokio::select! {
                    _ = ticks.tick() => self.count(&traffic),
                    _ = self.touches.take() => {}
                }
                let report = self.engine.report(&key());
                if let Some(report) = &report
                    && condition(report)
                {
                    return report.clone();
                }
                last = report.or(last.take());
            }
        })
        .await;
        waited.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}; the last report is {last:#?}"))
    }

    async fn until(&self, what: &str, condition: impl Fn(&Report) -> bool) -> Report {
        self.with_traffic(what, |_, _| {}, condition).await
    }
}

fn key() -> CanaryKey {
    CanaryKey::new("shop", "cart")
}

/// A gate with a least value.
fn gate(name: &str, interval: &str, min: f64) -> Metric {
    serde_json::from_value(
        serde_json::json!({"name": name, "interval": interval, "thresholdRange": {"min": min}, "minSamples": 10}),
    )
    .unwrap()
}

fn p99(interval: &str, max: f64) -> Metric {
    serde_json::from_value(serde_json::json!({
        "name": "request-duration", "interval": interval, "thresholdRange": {"max": max}, "minSamples": 10
    }))
    .unwrap()
}

fn inline(query: &str) -> Metric {
    serde_json::from_value(
        serde_json::json!({"name": "mine", "interval": "2s", "thresholdRange": {"max": 100}, "query": query}),
    )
    .unwrap()
}

fn good(primary: &mut Counts, canary: &mut Counts) {
    primary.ok += 9;
    primary.durations[1] += 9;
    canary.ok += 1;
    canary.durations[0] += 1;
}

#[tokio::test]
async fn a_good_canary_passes_on_a_whole_window_that_began_after_the_acknowledgement() {
    let Some(world) = World::start().await else { return };
    // What was counted before must not count: the step before went badly.
    world.count(|_, canary| {
        canary.failed += 1000;
        canary.durations[3] += 1000;
    });
    // Scraped by both before the acknowledgement.
    world.engine.set(
        &key(),
        Some(world.task(&[inline("min(sluice_requests_total{code_class=\"5xx\",revision=\"bbbb\"}) / 10")])),
    );
    world.until("the bad past is scraped", |report| report.gates[0].value == Some(100.0)).await;

    let task = world.task(&[gate("request-success-rate", "4s", 99.0), p99("4s", 300.0)]);
    let acknowledged = task.acknowledged_at;
    world.engine.set(&key(), Some(task));
    let report = world
        .with_traffic("a pass", good, |report| {
            assert_ne!(report.verdict(), VerdictStatus::Fail, "{report:#?}");
            report.verdict() == VerdictStatus::Pass
        })
        .await;
    assert!(report.whole);
    let [rate, duration] = report.gates.as_slice() else { panic!("{report:#?}") };
    assert_eq!((rate.value, rate.primary_value, rate.window_seconds), (Some(100.0), Some(100.0), Some(4.0)));
    // 4 s of 10 a second on 2 members, within what a scrape may shift.
    assert!((40.0..=120.0).contains(&rate.samples.unwrap()), "{rate:#?}");
    assert_eq!(rate.samples.unwrap().fract(), 0.0, "whole requests");
    assert!(rate.time.duration_since(acknowledged) >= jiff::SignedDuration::from_secs(4), "{rate:#?} {acknowledged}");
    // All of the canary's requests are in the first bucket, all of the primary's in the second.
    assert!((90.0..=100.0).contains(&duration.value.unwrap()), "{duration:#?}");
    assert!((400.0..=500.0).contains(&duration.primary_value.unwrap()), "{duration:#?}");
    assert_eq!((rate.limit.as_str(), duration.limit.as_str()), (">= 99", "<= 300"));
}

#[tokio::test]
async fn a_bad_canary_fails_on_the_part_of_the_window_since_the_acknowledgement() {
    let Some(world) = World::start().await else { return };
    world.engine.set(&key(), Some(world.task(&[gate("request-success-rate", "1m", 99.0), p99("1m", 300.0)])));
    let bad = |primary: &mut Counts, canary: &mut Counts| {
        good(primary, canary);
        canary.failed += 1;
        canary.durations[2] += 1;
    };
    let report = world
        .with_traffic("both fail", bad, |report| report.gates.iter().all(|gate| gate.verdict == VerdictStatus::Fail))
        .await;
    assert!(!report.whole);
    let [rate, duration] = report.gates.as_slice() else { panic!("{report:#?}") };
    assert_eq!((rate.value, rate.primary_value), (Some(50.0), Some(100.0)));
    assert!(rate.samples.unwrap() >= 10.0 && rate.window_seconds.unwrap() < 60.0, "{rate:#?}");
    assert!((900.0..=1000.0).contains(&duration.value.unwrap()), "{duration:#?}");
}

/// One of ten says nothing about a whole window, in which one of a hundred may be so.
#[tokio::test]
async fn a_part_of_a_window_on_which_a_few_were_bad_is_no_failure() {
    let Some(world) = World::start().await else { return };
    world.engine.set(&key(), Some(world.task(&[gate("request-success-rate", "10m", 99.0), p99("10m", 300.0)])));
    let ticks = AtomicU32::new(0);
    let traffic = |primary: &mut Counts, canary: &mut Counts| {
        good(primary, canary);
        // In the window, which begins with the next scrape.
        if ticks.fetch_add(1, Ordering::Relaxed) == 30 {
            canary.failed += 1;
            canary.durations[2] += 1;
        }
    };
    let out_of_range = |gate: &GateStatus| gate.message.starts_with("out of range, but only ");
    let report =
        world.with_traffic("both are out of range", traffic, |report| report.gates.iter().all(out_of_range)).await;
    assert_eq!(report.verdict(), VerdictStatus::Inconclusive, "{report:#?}");
}

/// What the canary is asked under its own name is nothing to a step that is judged by copies, nor are copies that were not sent.
#[tokio::test]
async fn where_copies_are_judged_nothing_else_of_the_canary_is() {
    let Some(world) = World::start().await else { return };
    world.count(|_, canary| canary.copies = Some(Copies::default()));
    let gates = [gate("request-success-rate", "20s", 99.0), p99("20s", 300.0)];
    world.engine.set(&key(), Some(Task { mirrored: true, weight: 0, ..world.task(&gates) }));
    let traffic = |primary: &mut Counts, canary: &mut Counts| {
        good(primary, canary);
        if let Some(copies) = &mut canary.copies {
            copies.ok += 9;
            copies.failed += 1;
            copies.busy += 100;
            copies.durations[2] += 10;
        }
    };
    let report = world
        .with_traffic("both fail", traffic, |report| {
            report.gates.iter().all(|gate| gate.verdict == VerdictStatus::Fail)
        })
        .await;
    let [rate, duration] = report.gates.as_slice() else { panic!("{report:#?}") };
    assert_eq!((rate.value, rate.primary_value), (Some(90.0), Some(100.0)), "{rate:#?}");
    assert_eq!(rate.samples.unwrap() % 10.0, 0.0, "ten copies at a time: {rate:#?}");
    assert!((900.0..=1000.0).contains(&duration.value.unwrap()), "{duration:#?}");
    assert!((400.0..=500.0).contains(&duration.primary_value.unwrap()), "{duration:#?}");
}

#[tokio::test]
async fn a_grpc_status_that_never_occurred_before_counts_from_its_first_sample() {
    let Some(world) = World::start().await else { return };
    world.engine.set(&key(), Some(world.task(&[gate("request-success-rate", "20s", 99.0)])));
    world.until("a window is open", |report| report.gates[0].samples == Some(0.0)).await;
    // One burst: the series appears at its final value. increase() would not see it at all.
    world.count(|_, canary| {
        canary.ok += 50;
        canary.grpc_unavailable += 50;
    });
    let report = world.until("a verdict", |report| report.gates[0].samples.is_some_and(|samples| samples > 0.0)).await;
    // The scrapes of the two members may see the burst one after the other; each sees it whole.
    assert_eq!((report.gates[0].value, report.gates[0].verdict), (Some(50.0), VerdictStatus::Fail), "{report:#?}");
}

#[tokio::test]
async fn no_requests_no_series_and_nan_are_inconclusive() {
    let Some(world) = World::start().await else { return };
    world.engine.set(&key(), Some(world.task(&[gate("request-success-rate", "1s", 99.0), p99("1s", 300.0)])));
    let report = world.until("whole windows", |report| report.whole).await;
    for gate in &report.gates {
        assert_eq!((gate.verdict, gate.samples, gate.value), (VerdictStatus::Inconclusive, Some(0.0), None));
        assert_eq!(gate.message, "no request yet");
    }
    assert_eq!(report.verdict(), VerdictStatus::Inconclusive);

    world.engine.set(&key(), Some(world.task(&[gate("request-success-rate", "1m", 99.0)])));
    world.until("a window is open", |report| report.gates[0].samples == Some(0.0)).await;
    world.count(|_, canary| canary.failed += 4);
    let report = world.until("8 failures", |report| report.gates[0].samples == Some(8.0)).await;
    assert_eq!((report.gates[0].verdict, report.gates[0].value), (VerdictStatus::Inconclusive, Some(0.0)));
    assert_eq!(report.gates[0].message, "8 of at least 10 requests");

    let mut unknown = world.task(&[gate("request-success-rate", "1s", 99.0)]);
    unknown.canary_revision = "cccc".to_owned();
    world.engine.set(&key(), Some(unknown));
    let report = world.until("a whole window", |report| report.whole).await;
    assert_eq!(report.verdict(), VerdictStatus::Inconclusive);
    assert!(report.gates[0].message.contains("not counted anything for this revision"), "{report:#?}");

    for query in ["0/0", "sum(nosuch{})", "vector(0) / 0"] {
        world.engine.set(&key(), Some(world.task(&[inline(query)])));
        let report = world.until("an own query's whole window", |report| report.whole).await;
        assert_eq!(report.verdict(), VerdictStatus::Inconclusive, "{query}: {report:#?}");
    }
}

#[tokio::test]
async fn a_member_that_is_not_scraped_holds_the_verdict_and_is_named() {
    let Some(world) = World::start().await else { return };
    let mut task = world.task(&[gate("request-success-rate", "1s", 99.0)]);
    task.members.push("fleet-2".to_owned());
    world.engine.set(&key(), Some(task));
    let bad = |_: &mut Counts, canary: &mut Counts| canary.failed += 10;
    let report = world.with_traffic("a report", bad, |report| !report.gates[0].message.contains("not measured")).await;
    assert_eq!(report.verdict(), VerdictStatus::Inconclusive);
    assert!(report.gates[0].message.contains("no sample of fleet-2, a member of the fleet"), "{report:#?}");
}

#[tokio::test]
async fn a_restarted_member_counts_from_zero_and_nothing_twice() {
    let Some(world) = World::start().await else { return };
    world.count(|_, canary| {
        canary.failed = 500;
        canary.ok = 500;
    });
    world.engine.set(
        &key(),
        Some(world.task(&[inline("min(sluice_requests_total{code_class=\"5xx\",revision=\"bbbb\"}) / 5")])),
    );
    world.until("the past is scraped", |report| report.gates[0].value == Some(100.0)).await;
    world.engine.set(&key(), Some(world.task(&[gate("request-success-rate", "6s", 99.0)])));
    world.with_traffic("a window is open", good, |report| report.gates[0].samples.is_some_and(|n| n > 0.0)).await;
    // fleet-0 starts anew: all of its counters, the bad past included, are 0.
    for (_, counts) in world.fleet[0].lock().unwrap().iter_mut() {
        *counts = Counts::default();
    }
    let report = world
        .with_traffic("a pass", good, |report| {
            let gate = &report.gates[0];
            assert_ne!(gate.verdict, VerdictStatus::Fail, "{report:#?}");
            assert!(gate.samples.is_none_or(|samples| (0.0..=160.0).contains(&samples)), "{report:#?}");
            report.verdict() == VerdictStatus::Pass
        })
        .await;
    assert_eq!(report.gates[0].value, Some(100.0));
}

#[tokio::test]
async fn a_metrics_server_that_is_down_is_an_error_and_no_verdict_on_the_canary() {
    let Some(mut world) = World::start().await else { return };
    world.engine.set(&key(), Some(world.task(&[gate("request-success-rate", "1s", 99.0), inline("1")])));
    world.with_traffic("a pass", good, |report| report.verdict() == VerdictStatus::Pass).await;
    world.prometheus.kill().unwrap();
    let report =
        world.until("errors", |report| report.gates.iter().all(|gate| gate.verdict == VerdictStatus::Error)).await;
    assert_eq!((report.verdict(), report.whole), (VerdictStatus::Error, false));
    for gate in &report.gates {
        assert!(gate.message.starts_with(&format!("{} could not be asked: ", world.address)), "{gate:#?}");
    }
}

#[tokio::test]
async fn an_own_query_is_judged_once_its_interval_has_passed() {
    let Some(world) = World::start().await else { return };
    let query = "sum(sluice_member_info) * {{ variables.factor }}";
    let mut gate = inline(query);
    gate.template_variables.insert("factor".to_owned(), "60".to_owned());
    world.engine.set(&key(), Some(world.task(&[gate.clone()])));
    let early = world.until("a report", |report| report.gates[0].value.is_some()).await;
    if !early.whole {
        assert_eq!(early.gates[0].verdict, VerdictStatus::Inconclusive, "{early:#?}");
    }
    let report = world.until("a whole window", |report| report.whole).await;
    assert_eq!((report.verdict(), report.gates[0].value), (VerdictStatus::Fail, Some(120.0)), "{report:#?}");
    assert_eq!(report.gates[0].query, "sum(sluice_member_info) * 60");
}

#[tokio::test]
async fn what_a_server_refuses_is_an_error_and_found_by_the_dry_run() {
    let Some(mut world) = World::start().await else { return };
    let table = [
        ("sluice_member_info", "the query yields 2 series"),
        ("sum(", "answered 400: "),
        ("sluice_member_info[1m]", "range of samples"),
        ("{{ nosuch }}", "a variable that does not exist"),
        ("sluice_member_info * on() sluice_requests_total", "answered 422: "),
    ];
    for (query, words) in table {
        world.engine.set(&key(), Some(world.task(&[inline(query)])));
        let report = world.until("an error", |report| report.verdict() == VerdictStatus::Error).await;
        assert!(report.gates[0].message.contains(words), "{query}: {report:#?}");
    }
    world.engine.set(&key(), None);

    let dry = |gates: Vec<Metric>| DryRunRequest {
        canary: key(),
        service: "cart".to_owned(),
        target: "cart".to_owned(),
        primary_revision: "aaaa".to_owned(),
        canary_revision: "bbbb".to_owned(),
        mirrored: false,
        gates,
        metrics_server: None,
    };
    let mut gates: Vec<Metric> =
        table.iter().map(|(query, words)| Metric { name: (*words).to_owned(), ..inline(query) }).collect();
    gates.extend([inline("sum(sluice_member_info)"), gate("request-success-rate", "1m", 99.0), p99("90s", 300.0)]);
    let request = dry(gates);
    let outcome = timeout(PATIENCE, async {
        loop {
            if let Some(outcome) = world.engine.dry_run(&request) {
                return outcome;
            }
            world.touches.take().await;
        }
    });
    let outcome = outcome.await.expect("an outcome in time");
    assert_eq!(outcome.len(), table.len(), "the good ones are not in it: {outcome:#?}");
    for (_, words) in table {
        assert!(outcome[words].contains(words), "{outcome:#?}");
    }

    // A server that is away is not a bad query.
    world.prometheus.kill().unwrap();
    world.prometheus.wait().unwrap();
    let request = dry(vec![gate("request-success-rate", "2m", 99.0)]);
    assert_eq!(world.engine.dry_run(&request), None);
    let waits = timeout(PATIENCE, async {
        loop {
            if let Some(reason) = world.engine.dry_run_waits_for(&key()) {
                return reason;
            }
            world.touches.take().await;
        }
    });
    let waits = waits.await.expect("a reason in time");
    assert!(waits.starts_with("request-success-rate: ") && waits.contains("could not be asked"), "{waits}");
    assert_eq!(world.engine.dry_run(&request), None);
}
