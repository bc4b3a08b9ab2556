//! Measures for all Canaries at once: one task that starts due measurements, a bounded number of them at a time, and
//! few at a time on one server, so that a slow server delays nobody who does not depend on it.

use std::{
    collections::{BTreeMap, HashMap, VecDeque, hash_map::Entry as Slot},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::future::BoxFuture;
use jiff::Timestamp;
use sluice_crds::{GateStatus, MetricTemplate, VerdictStatus, parse_duration};
use tokio::{
    sync::Notify,
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep_until},
};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    DryRun, DryRunRequest, Report, Settings, Task,
    gate::Builtin,
    measure::{Measurer, blank},
    sources::Sources,
};
use crate::cache::{CanaryKey, Touches};

/// Measurements under way, in all. Each is a few HTTP requests and a few KiB.
const AT_ONCE: usize = 64;
/// Measurements under way on one server.
const AT_ONCE_PER_SERVER: usize = 4;
const LEAST_CADENCE: Duration = Duration::from_secs(1);
const MOST_CADENCE: Duration = Duration::from_secs(10);
/// A query that is wrong is tried again, in case that what it asks was mended elsewhere.
const MISTAKE_AGAIN: Duration = Duration::from_secs(30);
/// A server that could not be asked in a dry run is asked again.
const UNREACHABLE_AGAIN: Duration = Duration::from_secs(5);

/// A share of a task that is measured on its own: a slow server of one gate does not hold up the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// All built-in gates.
    Fleet,
    /// The gate with this index.
    Query(usize),
}

#[derive(Clone, Debug)]
pub(crate) enum Work {
    Measure { task: Arc<Task>, part: Part },
    Dry { request: Arc<DryRunRequest>, gate: usize },
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Measured {
    pub(crate) status: GateStatus,
    pub(crate) whole: bool,
}

/// Outcome of one gate's dry run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Dry {
    Fine,
    Mistake(String),
    Unreachable(String),
}

pub(crate) enum Outcome {
    /// By index of the gate.
    Measured(Vec<(usize, Measured)>),
    Dry(Dry),
}

/// How work is done; another one in tests of the schedule.
pub(crate) trait Measure: Send + Sync + 'static {
    /// The server that the work will ask. Must be quick.
    fn server(&self, work: &Work) -> String;
    fn run(self: Arc<Self>, work: Work) -> BoxFuture<'static, Outcome>;
    /// The templates that a dry run depends on: another one is another dry run.
    fn templates(&self, request: &DryRunRequest) -> Vec<Option<Arc<MetricTemplate>>>;
}

/// Measures what it is told to, and keeps the newest results. Cheap to clone; it stops when the last clone is dropped.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
    _stop: Arc<DropGuard>,
}

struct Shared {
    measure: Arc<dyn Measure>,
    touches: Touches,
    state: Mutex<State>,
    /// There may be something due earlier than before.
    changed: Notify,
}

#[derive(Default)]
struct State {
    canaries: HashMap<CanaryKey, Canary>,
    /// By due time. An entry whose generation is no more the current one is dropped when its time comes.
    queue: BTreeMap<(Instant, u64), Job>,
    /// Due, but its server has enough to do.
    waiting: HashMap<String, VecDeque<Job>>,
    running: HashMap<String, usize>,
    numbers: u64,
}

#[derive(Default)]
struct Canary {
    measuring: Option<Measuring>,
    dry: Option<DryRunning>,
}

struct Measuring {
    generation: u64,
    task: Arc<Task>,
    gates: Vec<Option<Measured>>,
    report: Option<Report>,
}

struct DryRunning {
    generation: u64,
    request: Arc<DryRunRequest>,
    templates: Vec<Option<Arc<MetricTemplate>>>,
    gates: Vec<Option<Dry>>,
}

#[derive(Clone, Debug)]
struct Job {
    canary: CanaryKey,
    generation: u64,
    work: Work,
}

impl Engine {
    /// Starts the task that measures; it ends when the last clone of the engine is dropped, and its handle should be
    /// joined then. `touches` is told each Canary with a new report or dry run.
    #[must_use]
    pub fn start(settings: Settings, sources: Arc<dyn Sources>, touches: Touches) -> (Self, JoinHandle<()>) {
        Self::start_with(Arc::new(Measurer::new(settings, sources)), touches)
    }

    fn start_with(measure: Arc<dyn Measure>, touches: Touches) -> (Self, JoinHandle<()>) {
        let stop = CancellationToken::new();
        let shared = Arc::new(Shared { measure, touches, state: Mutex::default(), changed: Notify::new() });
        let task = tokio::spawn(drive(shared.clone(), stop.clone()));
        (Self { shared, _stop: Arc::new(stop.drop_guard()) }, task)
    }

    /// What should be measured for a Canary from now on; `None` stops it and drops its report. An equal task changes nothing. A task
    /// that differs in nothing but the fleet's members goes on with the reports that it has.
    pub fn set(&self, key: &CanaryKey, task: Option<Task>) {
        let mut state = self.shared.lock();
        let Some(task) = task else {
            if let Some(canary) = state.canaries.get_mut(key) {
                canary.measuring = None;
                if canary.dry.is_none() {
                    state.canaries.remove(key);
                }
            }
            return;
        };
        let generation = state.number();
        let canary = state.canaries.entry(key.clone()).or_default();
        let (gates, report) = match canary.measuring.take() {
            Some(old) if *old.task == task => {
                canary.measuring = Some(old);
                return;
            }
            Some(old) if (Task { members: task.members.clone(), ..(*old.task).clone() }) == task => {
                (old.gates, old.report)
            }
            Some(_) | None => (vec![None; task.gates.len()], None),
        };
        let task = Arc::new(task);
        let mut measuring = Measuring { generation, task: task.clone(), gates, report };
        if task.gates.is_empty() {
            // Nothing to measure: promoted by time and readiness alone.
            measuring.report = Some(measuring.assemble());
            self.shared.touches.touch(key.clone());
        }
        canary.measuring = Some(measuring);
        let now = Instant::now();
        for part in parts(&task) {
            state.push(now, Job { canary: key.clone(), generation, work: Work::Measure { task: task.clone(), part } });
        }
        drop(state);
        self.shared.changed.notify_one();
    }

    /// The newest measurements of the task that was set, if there are any yet.
    #[must_use]
    pub fn report(&self, key: &CanaryKey) -> Option<Report> {
        self.shared.lock().canaries.get(key)?.measuring.as_ref()?.report.clone()
    }

    /// Runs every query of a release once, without judging. `None` until each was answered or refused; the Canary is touched then, and again
    /// when the outcome changes. The answer is kept until it is asked with another request (or a MetricTemplate has
    /// changed); queries that were refused are tried again meanwhile.
    #[must_use]
    pub fn dry_run(&self, request: &DryRunRequest) -> Option<DryRun> {
        let templates = self.shared.measure.templates(request);
        let mut state = self.shared.lock();
        let generation = state.number();
        let canary = state.canaries.entry(request.canary.clone()).or_default();
        if let Some(dry) = &canary.dry
            && *dry.request == *request
            && dry.templates == templates
        {
            return dry.outcome();
        }
        let request = Arc::new(request.clone());
        let gates = vec![None; request.gates.len()];
        let dry = DryRunning { generation, request: request.clone(), templates, gates };
        let outcome = dry.outcome();
        canary.dry = Some(dry);
        let now = Instant::now();
        for gate in 0..request.gates.len() {
            let work = Work::Dry { request: request.clone(), gate };
            state.push(now, Job { canary: request.canary.clone(), generation, work });
        }
        drop(state);
        self.shared.changed.notify_one();
        outcome
    }

    /// Why a dry run has no outcome yet, for people: a server that could not be asked.
    #[must_use]
    pub fn dry_run_waits_for(&self, key: &CanaryKey) -> Option<String> {
        self.shared.lock().canaries.get(key)?.dry.as_ref()?.waits_for()
    }

    /// Forgets a Canary that is gone.
    pub fn forget(&self, key: &CanaryKey) {
        self.shared.lock().canaries.remove(key);
    }
}

fn parts(task: &Task) -> impl Iterator<Item = Part> {
    let fleet = task.gates.iter().any(|gate| Builtin::of(gate).is_some());
    let queries = task.gates.iter().enumerate().filter(|(_, gate)| Builtin::of(gate).is_none());
    fleet.then_some(Part::Fleet).into_iter().chain(queries.map(|(index, _)| Part::Query(index)))
}

/// Time between two measurements of a part.
fn cadence(task: &Task, part: Part) -> Duration {
    let windows = task.gates.iter().enumerate().filter(|(index, gate)| match part {
        Part::Fleet => Builtin::of(gate).is_some(),
        Part::Query(wanted) => *index == wanted,
    });
    let shortest = windows.filter_map(|(_, gate)| parse_duration(&gate.interval).ok()).min();
    (shortest.unwrap_or(task.interval).min(task.interval) / 4).clamp(LEAST_CADENCE, MOST_CADENCE)
}

impl Measuring {
    fn assemble(&self) -> Report {
        let gates: Vec<GateStatus> = self
            .task
            .gates
            .iter()
            .zip(&self.gates)
            .map(|(gate, measured)| match measured {
                Some(measured) => measured.status.clone(),
                None => GateStatus {
                    message: "not measured yet".to_owned(),
                    ..blank(gate, VerdictStatus::Inconclusive, self.task.acknowledged_at.as_millisecond())
                },
            })
            .collect();
        let whole = self.gates.iter().all(|measured| measured.as_ref().is_some_and(|measured| measured.whole));
        Report { step: self.task.step.clone(), at: Timestamp::now(), gates, whole }
    }
}

impl DryRunning {
    fn outcome(&self) -> Option<DryRun> {
        let mut mistakes = DryRun::new();
        for (gate, outcome) in self.request.gates.iter().zip(&self.gates) {
            match outcome {
                Some(Dry::Fine) => {}
                Some(Dry::Mistake(message)) => {
                    mistakes.insert(gate.name.clone(), message.clone());
                }
                Some(Dry::Unreachable(_)) | None => return None,
            }
        }
        Some(mistakes)
    }

    fn waits_for(&self) -> Option<String> {
        self.request.gates.iter().zip(&self.gates).find_map(|(gate, outcome)| match outcome {
            Some(Dry::Unreachable(message)) => Some(format!("{}: {message}", gate.name)),
            Some(Dry::Fine | Dry::Mistake(_)) | None => None,
        })
    }
}

impl State {
    fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    fn push(&mut self, due: Instant, job: Job) {
        let number = self.number();
        self.queue.insert((due, number), job);
    }

    /// Whether the result of this job is still wanted.
    fn wanted(&self, job: &Job) -> bool {
        self.canaries.get(&job.canary).is_some_and(|canary| match &job.work {
            Work::Measure { .. } => canary.measuring.as_ref().is_some_and(|now| now.generation == job.generation),
            Work::Dry { .. } => canary.dry.as_ref().is_some_and(|now| now.generation == job.generation),
        })
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next job that may start now; else the time of the next that will be due.
    fn next(&self, under_way: usize) -> Result<(Job, String), Option<Instant>> {
        if under_way >= AT_ONCE {
            // The end of any of them is what is waited for.
            return Err(None);
        }
        let mut state = self.lock();
        let now = Instant::now();
        while let Some(first) = state.queue.first_entry() {
            if first.key().0 > now {
                return Err(Some(first.key().0));
            }
            let job = first.remove();
            if !state.wanted(&job) {
                continue;
            }
            let server = self.measure.server(&job.work);
            let running = state.running.entry(server.clone()).or_default();
            if *running < AT_ONCE_PER_SERVER {
                *running += 1;
                return Ok((job, server));
            }
            state.waiting.entry(server).or_default().push_back(job);
        }
        Err(None)
    }

    /// Gives a job's place on its server to the one that has waited longest.
    fn release(&self, server: String) {
        let mut state = self.lock();
        let next = loop {
            let job = state.waiting.get_mut(&server).and_then(VecDeque::pop_front);
            match job {
                Some(job) if !state.wanted(&job) => {}
                other => break other,
            }
        };
        if state.waiting.get(&server).is_some_and(VecDeque::is_empty) {
            state.waiting.remove(&server);
        }
        if let Slot::Occupied(mut running) = state.running.entry(server) {
            *running.get_mut() -= 1;
            if *running.get() == 0 {
                running.remove();
            }
        }
        if let Some(job) = next {
            // Before everything else that is due: it was due earlier.
            let now = Instant::now();
            let first = state.queue.first_key_value().map_or(now, |((due, _), _)| (*due).min(now));
            state.push(first.checked_sub(Duration::from_millis(1)).unwrap_or(first), job);
        }
    }

    fn finish(&self, job: Job, started: Instant, outcome: Outcome) {
        let mut state = self.lock();
        if !state.wanted(&job) {
            return;
        }
        let Some(canary) = state.canaries.get_mut(&job.canary) else { return };
        let (again, touched) = match (&job.work, outcome) {
            (Work::Measure { task, part }, Outcome::Measured(measured)) => {
                let Some(measuring) = &mut canary.measuring else { return };
                for (index, measured) in measured {
                    if let Some(slot) = measuring.gates.get_mut(index) {
                        *slot = Some(measured);
                    }
                }
                measuring.report = Some(measuring.assemble());
                (Some(cadence(task, *part)), true)
            }
            (Work::Dry { gate, .. }, Outcome::Dry(outcome)) => {
                let Some(dry) = &mut canary.dry else { return };
                let again = match &outcome {
                    Dry::Fine => None,
                    Dry::Mistake(_) => Some(MISTAKE_AGAIN),
                    Dry::Unreachable(_) => Some(UNREACHABLE_AGAIN),
                };
                let before = (dry.outcome(), dry.waits_for());
                if let Some(slot) = dry.gates.get_mut(*gate) {
                    // A server that is away for a moment does not unsay what it said.
                    if !matches!((&slot, &outcome), (Some(Dry::Mistake(_)), Dry::Unreachable(_))) {
                        *slot = Some(outcome);
                    }
                }
                (again, before != (dry.outcome(), dry.waits_for()))
            }
            (Work::Measure { .. }, Outcome::Dry(_)) | (Work::Dry { .. }, Outcome::Measured(_)) => (None, false),
        };
        let key = job.canary.clone();
        if let Some(again) = again {
            state.push((started + again).max(Instant::now()), job);
        }
        drop(state);
        if touched {
            self.touches.touch(key);
        }
    }
}

/// The task that measures. It owns every measurement under way; they are dropped with it.
async fn drive(shared: Arc<Shared>, stop: CancellationToken) {
    let mut under_way: JoinSet<Outcome> = JoinSet::new();
    let mut jobs: HashMap<tokio::task::Id, (Job, String, Instant)> = HashMap::new();
    loop {
        let next = loop {
            match shared.next(under_way.len()) {
                Ok((job, server)) => {
                    let id = under_way.spawn(shared.measure.clone().run(job.work.clone())).id();
                    jobs.insert(id, (job, server, Instant::now()));
                }
                Err(next) => break next,
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = shared.changed.notified() => {}
            () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
            Some(ended) = under_way.join_next_with_id(), if !under_way.is_empty() => {
                let (id, outcome) = match ended {
                    Ok((id, outcome)) => (id, Some(outcome)),
                    Err(error) => {
                        tracing::error!(%error, "a measurement ended by itself");
                        (error.id(), None)
                    }
                };
                if let Some((job, server, started)) = jobs.remove(&id) {
                    shared.release(server);
                    match outcome {
                        Some(outcome) => shared.finish(job, started, outcome),
                        // Only a defect of ours gets here: the others must not suffer from it, and this one tries again.
                        None => shared.lock().push(started + MOST_CADENCE, job),
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use sluice_crds::Metric;

    use super::*;
    use crate::analysis::StepId;

    /// Takes as long as a gate's name says (`slow` never ends), on the server that its query names, and counts.
    #[derive(Default)]
    struct Script {
        starts: Mutex<Vec<(CanaryKey, Instant)>>,
        /// What a dry run says, by gate.
        dry: Mutex<HashMap<String, Dry>>,
    }

    impl Script {
        fn starts_of(&self, key: &CanaryKey) -> Vec<Instant> {
            self.starts.lock().unwrap().iter().filter(|(of, _)| of == key).map(|(_, at)| *at).collect()
        }
    }

    impl Measure for Script {
        fn server(&self, work: &Work) -> String {
            match work {
                Work::Measure { task, part: Part::Query(index) } => {
                    task.gates[*index].query.clone().unwrap_or_default()
                }
                Work::Measure { part: Part::Fleet, .. } | Work::Dry { .. } => "fleet".to_owned(),
            }
        }

        fn run(self: Arc<Self>, work: Work) -> BoxFuture<'static, Outcome> {
            Box::pin(async move {
                match work {
                    Work::Measure { task, part } => {
                        self.starts.lock().unwrap().push((task.canary.clone(), Instant::now()));
                        let indices: Vec<usize> = match part {
                            Part::Query(index) => vec![index],
                            Part::Fleet => {
                                (0..task.gates.len()).filter(|i| Builtin::of(&task.gates[*i]).is_some()).collect()
                            }
                        };
                        if indices.iter().any(|index| task.gates[*index].name == "slow") {
                            std::future::pending::<()>().await;
                        }
                        let measured = |index: usize| Measured {
                            status: blank(&task.gates[index], VerdictStatus::Pass, 0),
                            whole: true,
                        };
                        Outcome::Measured(indices.into_iter().map(|index| (index, measured(index))).collect())
                    }
                    Work::Dry { request, gate } => {
                        let dry = self.dry.lock().unwrap();
                        Outcome::Dry(dry.get(&request.gates[gate].name).cloned().unwrap_or(Dry::Fine))
                    }
                }
            })
        }

        fn templates(&self, request: &DryRunRequest) -> Vec<Option<Arc<MetricTemplate>>> {
            vec![None; request.gates.len()]
        }
    }

    fn gate(name: &str, interval: &str, query: Option<&str>) -> Metric {
        serde_json::from_value(serde_json::json!({
            "name": name, "interval": interval, "query": query, "thresholdRange": {"min": 99}
        }))
        .unwrap()
    }

    fn key(name: &str) -> CanaryKey {
        CanaryKey::new("shop", name)
    }

    fn task(name: &str, interval: u64, gates: Vec<Metric>) -> Task {
        let at = Timestamp::from_second(1_700_000_000).unwrap();
        Task {
            canary: key(name),
            step: StepId { started_at: at, revision: "bbbb".to_owned(), index: 0 },
            service: name.to_owned(),
            target: name.to_owned(),
            primary_revision: "aaaa".to_owned(),
            canary_revision: "bbbb".to_owned(),
            gates,
            metrics_server: None,
            acknowledged_at: at,
            interval: Duration::from_secs(interval),
            weight: 10,
            mirrored: false,
            members: vec!["fleet-0".to_owned()],
        }
    }

    fn request(name: &str, gates: Vec<Metric>) -> DryRunRequest {
        DryRunRequest {
            canary: key(name),
            service: name.to_owned(),
            target: name.to_owned(),
            primary_revision: "aaaa".to_owned(),
            canary_revision: "bbbb".to_owned(),
            mirrored: false,
            gates,
            metrics_server: None,
        }
    }

    fn start() -> (Engine, Arc<Script>, Touches, JoinHandle<()>) {
        let script = Arc::new(Script::default());
        let touches = Touches::default();
        let (engine, task) = Engine::start_with(script.clone(), touches.clone());
        (engine, script, touches, task)
    }

    #[tokio::test(start_paused = true)]
    async fn a_part_is_measured_at_a_quarter_of_its_window_within_bounds() {
        for (interval, windows, expected) in [
            (60, &["60s"][..], 10.0),
            (20, &["1m"][..], 5.0),
            (60, &["8s", "1m"][..], 2.0),
            (2, &["1m"][..], 1.0),
            (3600, &["1h"][..], 10.0),
        ] {
            let (engine, script, _touches, _task) = start();
            let gates: Vec<Metric> = ["request-success-rate", "request-duration"]
                .iter()
                .zip(windows)
                .map(|(name, window)| gate(name, window, None))
                .collect();
            engine.set(&key("cart"), Some(task("cart", interval, gates)));
            tokio::time::sleep(Duration::from_secs(100)).await;
            let starts = script.starts_of(&key("cart"));
            let gaps: Vec<f64> = starts.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
            assert!(gaps.len() > 8, "both built-in gates are one measurement: {gaps:?}");
            assert!(gaps.iter().all(|gap| (gap - expected).abs() < 0.1), "{interval} {windows:?}: {gaps:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_equal_task_changes_nothing_and_another_step_drops_the_report() {
        let (engine, script, touches, _task) = start();
        let first = task("cart", 60, vec![gate("request-success-rate", "1m", None)]);
        engine.set(&key("cart"), Some(first.clone()));
        assert_eq!(engine.report(&key("cart")), None);
        assert!(touches.take().await.contains(&key("cart")));
        let report = engine.report(&key("cart")).unwrap();
        assert_eq!((report.step.index, report.verdict()), (0, VerdictStatus::Pass));
        engine.set(&key("cart"), Some(first.clone()));
        assert_eq!(engine.report(&key("cart")), Some(report.clone()));

        let mut moved = first.clone();
        moved.members.push("fleet-1".to_owned());
        engine.set(&key("cart"), Some(moved.clone()));
        assert_eq!(engine.report(&key("cart")), Some(report), "other members: goes on");
        assert_eq!(script.starts_of(&key("cart")).len(), 1);

        moved.step.index = 1;
        engine.set(&key("cart"), Some(moved.clone()));
        assert_eq!(engine.report(&key("cart")), None);
        touches.take().await;
        assert_eq!(engine.report(&key("cart")).unwrap().step.index, 1);

        moved.acknowledged_at += Duration::from_secs(9);
        engine.set(&key("cart"), Some(moved));
        assert_eq!(engine.report(&key("cart")), None, "windows before a new acknowledgement do not count");
        engine.set(&key("cart"), None);
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(engine.report(&key("cart")), None);
        assert!(engine.shared.lock().queue.is_empty(), "nothing is left of a task that was stopped");
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_never_answers_delays_nobody_else() {
        let (engine, script, touches, _task) = start();
        for index in 0..200 {
            let name = format!("stuck-{index}");
            engine.set(&key(&name), Some(task(&name, 60, vec![gate("slow", "1m", Some("http://slow"))])));
        }
        let both = vec![gate("slow", "1m", Some("http://slow")), gate("request-success-rate", "1m", None)];
        engine.set(&key("both"), Some(task("both", 60, both)));
        engine.set(&key("cart"), Some(task("cart", 60, vec![gate("request-success-rate", "1m", None)])));
        while engine.report(&key("cart")).is_none() || engine.report(&key("both")).is_none() {
            tokio::time::timeout(Duration::from_secs(2), touches.take()).await.expect("a report in time");
        }
        assert_eq!(engine.report(&key("cart")).unwrap().verdict(), VerdictStatus::Pass);
        let both = engine.report(&key("both")).unwrap();
        assert_eq!(both.gates[1].verdict, VerdictStatus::Pass);
        assert_eq!((both.gates[0].message.as_str(), both.verdict()), ("not measured yet", VerdictStatus::Inconclusive));
        let stuck = script.starts.lock().unwrap().iter().filter(|(key, _)| key.name.starts_with("stuck")).count();
        assert_eq!(stuck, AT_ONCE_PER_SERVER);
    }

    #[tokio::test(start_paused = true)]
    async fn everybody_on_a_busy_server_gets_a_turn() {
        let (engine, script, _touches, _task) = start();
        for index in 0..100 {
            let name = format!("c{index}");
            engine.set(&key(&name), Some(task(&name, 60, vec![gate("quick", "1m", Some("http://one"))])));
        }
        tokio::time::sleep(Duration::from_secs(25)).await;
        for index in 0..100 {
            assert_eq!(script.starts_of(&key(&format!("c{index}"))).len(), 3, "at 0, 10 and 20 s");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_release_without_gates_has_a_report_at_once() {
        let (engine, _script, touches, _task) = start();
        engine.set(&key("cart"), Some(task("cart", 60, Vec::new())));
        assert!(touches.take().await.contains(&key("cart")));
        assert_eq!(engine.report(&key("cart")).unwrap().verdict(), VerdictStatus::Pass);
    }

    #[tokio::test(start_paused = true)]
    async fn a_dry_run_says_what_is_wrong_waits_for_servers_that_are_away_and_is_kept() {
        let (engine, script, touches, _task) = start();
        let ask = request("cart", vec![gate("a", "1m", Some("x")), gate("b", "1m", Some("y"))]);
        script.dry.lock().unwrap().insert("b".to_owned(), Dry::Unreachable("nobody there".to_owned()));
        assert_eq!(engine.dry_run(&ask), None);
        touches.take().await;
        assert_eq!(engine.dry_run(&ask), None);
        assert_eq!(engine.dry_run_waits_for(&key("cart")).unwrap(), "b: nobody there");

        script.dry.lock().unwrap().insert("b".to_owned(), Dry::Mistake("1:2: parse error".to_owned()));
        touches.take().await;
        let wrong = DryRun::from([("b".to_owned(), "1:2: parse error".to_owned())]);
        assert_eq!(engine.dry_run(&ask), Some(wrong.clone()));
        assert_eq!(engine.dry_run_waits_for(&key("cart")), None);

        script.dry.lock().unwrap().insert("b".to_owned(), Dry::Unreachable("nobody there".to_owned()));
        tokio::time::sleep(Duration::from_secs(40)).await;
        assert_eq!(engine.dry_run(&ask), Some(wrong), "a server that is away does not unsay what it said");

        script.dry.lock().unwrap().remove("b");
        touches.take().await;
        assert_eq!(engine.dry_run(&ask), Some(DryRun::new()));
        assert!(engine.shared.lock().queue.is_empty(), "what was fine is not asked again");

        let other = request("cart", vec![gate("a", "1m", Some("other"))]);
        assert_eq!(engine.dry_run(&other), None);
        touches.take().await;
        assert_eq!(engine.dry_run(&other), Some(DryRun::new()));
        assert_eq!(engine.dry_run(&request("bare", Vec::new())), Some(DryRun::new()));
    }

    #[tokio::test(start_paused = true)]
    async fn the_engine_ends_with_its_last_handle() {
        let (engine, _script, _touches, task) = start();
        let second = engine.clone();
        drop(engine);
        assert!(!task.is_finished());
        drop(second);
        task.await.unwrap();
    }
}
