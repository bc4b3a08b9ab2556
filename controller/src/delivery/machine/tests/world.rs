//! A small world for the machine: a Deployment with Pods, a Service, revisions, a fleet that acknowledges in its own time, and
//! an analysis. It carries out actions, may crash between any two of them, and checks each call.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use serde_json::json;
use sluice_crds::{
    ActionOutcome, CanaryStatus, ConditionStatus, GateStatus, GuardSide, GuardSignal, GuardStatus, Phase, Stage,
    Traffic, VerdictStatus,
};

use super::super::{
    Action, Autoscaler, Event, Fleet, Observation, Outcome, Problem, Revision, Service, Spec, Template, invariants,
    run::mentions, step,
};
use crate::{
    analysis::{DryRun, Report, StepId, Task},
    delivery::{plan, spec},
    guard::{Breach, Watch},
};
use std::time::Duration;

/// How a revision behaves once its Pods are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Quality {
    Good,
    Failing,
    NeverReady,
    Silent,
    Unmeasurable,
}

/// The user's Deployment.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Target {
    pub(super) uid: u32,
    pub(super) generation: i64,
    pub(super) revision: String,
    pub(super) configs: BTreeMap<String, String>,
    pub(super) replicas: u32,
    pub(super) wish: Option<u32>,
    pub(super) ready: u32,
}

/// A revision's Deployment.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Running {
    /// Seconds since the last Pod came up.
    pub(super) starting: u32,
    pub(super) number: i64,
    pub(super) promoted: bool,
    pub(super) desired: Option<u32>,
    pub(super) ready: u32,
    /// Somebody took its owners off.
    pub(super) disowned: bool,
    /// Its Pods have died and do not come back.
    pub(super) dead: bool,
}

/// A member of the fleet.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Member {
    pub(super) name: String,
    pub(super) acknowledged: Option<Traffic>,
    /// Cut off from the controller.
    pub(super) silent: bool,
}

/// Where the next reconcile stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Crash {
    /// Before the status is written. What was cut is cut.
    BeforeStatus,
    /// After the status and so many actions.
    After(usize),
}

#[derive(Clone, Debug)]
pub(super) struct World {
    pub(super) now: Timestamp,
    pub(super) start: Timestamp,
    pub(super) spec: Spec,
    pub(super) status: CanaryStatus,
    pub(super) deleting: bool,
    /// Sluice is being uninstalled.
    pub(super) uninstalling: bool,
    pub(super) finalizer: bool,
    pub(super) gone: bool,
    pub(super) namespace_terminating: bool,
    pub(super) leading_since: Option<Timestamp>,
    pub(super) target: Option<Target>,
    pub(super) service_exists: bool,
    pub(super) companions: bool,
    pub(super) key: bool,
    pub(super) slices: bool,
    pub(super) native: u32,
    /// The Service's selector, without the key, finds the target's Pods.
    pub(super) selects: bool,
    pub(super) revisions: BTreeMap<String, Running>,
    pub(super) quality: BTreeMap<String, Quality>,
    pub(super) members: Vec<Member>,
    pub(super) joining: bool,
    pub(super) rejects: Option<String>,
    /// The members are told nothing of this Canary.
    pub(super) withheld: bool,
    pub(super) reports: bool,
    /// Seconds until one more Pod is ready.
    pub(super) pods_take: u32,
    pub(super) report: Option<Report>,
    pub(super) breach: Option<Breach>,
    pub(super) dry_run: Option<DryRun>,
    pub(super) problems: Vec<Problem>,
    pub(super) warnings: Vec<Problem>,
    pub(super) autoscaler: Autoscaler,
    /// The annotation `sluice.dev/action`.
    pub(super) action: Option<String>,
    /// Configuration that the target uses cannot be read.
    pub(super) unread: bool,
    /// The target's hash has changed without anybody's doing.
    pub(super) hash_drifts: bool,
    /// Every verb with its revision that was ever said.
    said: BTreeSet<String>,
    /// Weight 0 beside the status.
    pub(super) cut: bool,
    task: Option<Task>,
    pub(super) watch: Option<Watch>,
    pub(super) crash: Option<Crash>,
    pub(super) outcome: Option<Outcome>,
    pub(super) events: Vec<Event>,
    pub(super) trace: Vec<String>,
    passed: BTreeSet<(Timestamp, i32)>,
    pub(super) writes: usize,
    /// What the last call was given, with the status that came of it.
    looked: Option<(Spec, CanaryStatus, Observation)>,
}

pub(super) const FIRST: &str = "v1";

impl World {
    /// An application that runs at three replicas and a Canary that was just applied.
    pub(super) fn new(analysis: serde_json::Value) -> Self {
        let canary = serde_json::from_value(json!({
            "apiVersion": "sluice.dev/v1beta1",
            "kind": "Canary",
            "metadata": {"name": "podinfo", "namespace": "test", "generation": 1},
            "spec": {
                "targetRef": {"kind": "Deployment", "name": "podinfo"},
                "service": {"port": 80},
                "analysis": analysis,
                "progressDeadlineSeconds": 120,
                "scaleDownDelaySeconds": 60,
                "drainSeconds": 30,
                "revisionHistoryLimit": 2,
            },
        }))
        .unwrap();
        let spec = spec::parse(&canary, Duration::from_secs(10)).unwrap();
        let start = Timestamp::from_second(1_750_000_000).unwrap();
        Self {
            now: start,
            start,
            spec,
            status: CanaryStatus::default(),
            deleting: false,
            uninstalling: false,
            finalizer: false,
            gone: false,
            namespace_terminating: false,
            leading_since: None,
            target: Some(Target {
                uid: 1,
                generation: 1,
                revision: FIRST.into(),
                configs: BTreeMap::new(),
                replicas: 3,
                wish: None,
                ready: 3,
            }),
            service_exists: true,
            companions: false,
            key: false,
            slices: false,
            native: 3,
            selects: true,
            revisions: BTreeMap::new(),
            quality: BTreeMap::new(),
            members: (0..2)
                .map(|index| Member { name: format!("fleet-{index}"), acknowledged: None, silent: false })
                .collect(),
            joining: false,
            rejects: None,
            withheld: false,
            reports: true,
            pods_take: 1,
            report: None,
            breach: None,
            dry_run: Some(DryRun::new()),
            problems: Vec::new(),
            warnings: Vec::new(),
            autoscaler: Autoscaler::default(),
            action: None,
            unread: false,
            hash_drifts: false,
            said: BTreeSet::new(),
            cut: false,
            task: None,
            watch: None,
            crash: None,
            outcome: None,
            events: Vec::new(),
            trace: Vec::new(),
            passed: BTreeSet::new(),
            writes: 0,
            looked: None,
        }
    }

    /// 10, 20, 30 percent; one gate; two failed checks roll back.
    pub(super) fn stepped() -> Self {
        Self::new(json!({
            "interval": "10s", "threshold": 2, "stepWeight": 10, "maxWeight": 30, "errorDeadline": "1m",
            "inconclusive": {"after": "1m"},
            "metrics": [{"name": "request-success-rate", "interval": "5s", "thresholdRange": {"min": 99}}],
        }))
    }

    /// The same, taken over and at rest.
    pub(super) fn adopted() -> Self {
        let mut world = Self::stepped();
        world.settle();
        assert_eq!((world.status.stage, world.status.phase), (Stage::Settled, Phase::Initialized));
        world.events.clear();
        world.trace.clear();
        world
    }

    pub(super) fn quality(&self, revision: &str) -> Quality {
        self.quality.get(revision).copied().unwrap_or(Quality::Good)
    }

    /// Somebody applies another template.
    pub(super) fn apply(&mut self, revision: &str) {
        if let Some(target) = &mut self.target
            && target.revision != revision
        {
            target.generation += 1;
            target.revision = revision.into();
        }
    }

    pub(super) fn apply_with(&mut self, revision: &str, quality: Quality) {
        self.quality.insert(revision.into(), quality);
        self.apply(revision);
    }

    /// Somebody annotates the Canary.
    pub(super) fn say(&mut self, value: &str) {
        self.said.insert(value.split(':').take(2).collect::<Vec<_>>().join(":"));
        self.action = Some(value.into());
    }

    /// The revision that is under way or would be next.
    pub(super) fn present(&self) -> String {
        let template = self.status.template.as_ref().map(|template| template.revision.clone());
        self.status.canary_revision.clone().or(template).unwrap_or_default()
    }

    /// What became of the annotation, and in which words.
    pub(super) fn answer(&self) -> (ActionOutcome, String) {
        let handled = self.status.action.as_ref().expect("something was said and seen");
        (handled.outcome, handled.message.clone())
    }

    pub(super) fn weight(&self) -> i32 {
        self.status.requested_weight
    }

    pub(super) fn desired(&self, revision: &str) -> u32 {
        self.revisions.get(revision).and_then(|running| running.desired).unwrap_or_default()
    }

    pub(super) fn told(&self, reason: &str) -> usize {
        self.events.iter().filter(|event| event.reason == reason).count()
    }

    pub(super) fn condition(&self, kind: &str) -> String {
        let found = self.status.conditions.iter().find(|condition| condition.kind == kind);
        found.map_or_else(|| "absent".into(), |condition| format!("{:?} {}", condition.status, condition.reason))
    }

    pub(super) fn waiting(&self) -> &str {
        self.status.waiting.as_ref().map_or("", |waiting| waiting.reason.as_str())
    }

    /// What the fleet is configured with: nothing without a Service.
    fn configured(&self) -> Option<Traffic> {
        let mut traffic = self.status.traffic.clone().filter(|_| self.service_exists)?;
        if self.cut {
            traffic.weight = 0;
            traffic.mirror = 0;
        }
        Some(traffic)
    }

    pub(super) fn effective(&self) -> Option<Traffic> {
        let first = self.members.first()?.acknowledged.clone()?;
        let configured = self.configured();
        let same = |member: &Member| member.acknowledged.as_ref() == Some(&first) && !member.silent;
        // A member that has not acknowledged what is configured now is somewhere between: unknown.
        (self.members.iter().all(same) && Some(&first) == configured.as_ref()).then_some(first)
    }

    pub(super) fn observe(&self) -> Observation {
        let configured = self.configured();
        let revisions = self
            .revisions
            .iter()
            .map(|(hash, running)| {
                let revision = Revision {
                    promoted: running.promoted,
                    number: running.number,
                    desired: running.desired,
                    ready: running.ready,
                    available: running.ready,
                    disowned: running.disowned,
                    trouble: (self.quality(hash) == Quality::NeverReady).then(|| "ImagePullBackOff".to_owned()),
                };
                (hash.clone(), revision)
            })
            .collect();
        Observation {
            deleting: self.deleting,
            uninstalling_until: self.uninstalling.then_some(Timestamp::MAX),
            finalizer: self.finalizer,
            namespace_terminating: self.namespace_terminating,
            template: self.target.as_ref().map(|target| Template {
                uid: target.uid.to_string(),
                generation: target.generation,
                revision: target.revision.clone(),
                unread: self.unread,
                tracked_configs: target.configs.clone(),
                replicas: target.replicas,
                wish: target.wish,
                marked: target.wish.is_some(),
                ready: target.ready,
                pods: target.ready,
            }),
            service: Service {
                exists: self.service_exists,
                any_exists: self.service_exists,
                companions: self.companions,
                key: self.key,
                any_key: self.service_exists && self.key,
                slices: self.slices,
                native_endpoints: self.native,
                no_native_endpoint: self.service_exists && self.selects && self.native == 0,
                unmatched: self.service_exists && !self.selects,
            },
            revisions,
            fleet: Fleet {
                members: u32::try_from(self.members.len()).unwrap(),
                lagging: self
                    .members
                    .iter()
                    .filter(|_| self.service_exists)
                    .filter(|member| member.silent || (!self.withheld && member.acknowledged != configured))
                    .map(|member| member.name.clone())
                    .collect(),
                effective: self.effective().filter(|_| !self.withheld),
                rejected: self.rejects.clone(),
                joining: self.joining,
                names: self.members.iter().map(|member| member.name.clone()).collect(),
                without_port: Vec::new(),
            },
            report: self.report.clone(),
            breach: self.breach.clone(),
            dry_run: self.dry_run.clone(),
            dry_run_waits_for: None,
            leading_since: self.leading_since,
            problems: self.problems.clone(),
            warnings: self.warnings.clone(),
            autoscaler: self.autoscaler,
            action: self.action.clone(),
        }
    }

    /// One second passes: Pods come up, members acknowledge, controllers of Kubernetes follow, gates are measured.
    pub(super) fn tick(&mut self) {
        self.now += SignedDuration::from_secs(1);
        if let Some(target) = &mut self.target {
            let quality = self.quality.get(&target.revision).copied().unwrap_or(Quality::Good);
            target.ready = if quality == Quality::NeverReady { 0 } else { target.replicas };
        }
        for (hash, running) in &mut self.revisions {
            let quality = self.quality.get(hash).copied().unwrap_or(Quality::Good);
            let desired = running.desired.unwrap_or_default();
            let comes_up = quality != Quality::NeverReady && !running.dead;
            running.starting = if running.ready < desired { running.starting + 1 } else { 0 };
            let up = u32::from(running.starting >= self.pods_take);
            running.starting *= 1 - up;
            running.ready = if comes_up { desired.min(running.ready + up) } else { 0 };
        }
        self.slices = self.status.stage.keeps_slices();
        let own = self.target.as_ref().map_or(0, |target| target.ready);
        self.native = if self.key || !self.service_exists || !self.selects { 0 } else { own };
        let configured = self.configured();
        if self.rejects.is_none() {
            for member in self.members.iter_mut().filter(|member| !member.silent) {
                member.acknowledged.clone_from(&configured);
            }
        }
        self.measure();
    }

    fn measure(&mut self) {
        let Some(task) = self.task.as_ref().filter(|_| self.reports) else { return };
        let verdict = match self.quality(&task.canary_revision) {
            Quality::Good | Quality::NeverReady => VerdictStatus::Pass,
            Quality::Failing => VerdictStatus::Fail,
            Quality::Silent => VerdictStatus::Inconclusive,
            Quality::Unmeasurable => VerdictStatus::Error,
        };
        self.report = Some(self.report_of(task, verdict));
    }

    pub(super) fn report_of(&self, task: &Task, verdict: VerdictStatus) -> Report {
        let gates = task
            .gates
            .iter()
            .map(|gate| GateStatus {
                name: gate.name.clone(),
                verdict,
                value: match verdict {
                    VerdictStatus::Pass => Some(99.98),
                    VerdictStatus::Fail => Some(42.5),
                    VerdictStatus::Inconclusive | VerdictStatus::Error => None,
                },
                primary_value: None,
                limit: ">= 99".into(),
                samples: None,
                time: self.now,
                window_seconds: None,
                message: String::new(),
                query: String::new(),
            })
            .collect();
        let whole = self.now >= task.acknowledged_at + SignedDuration::from_secs(5);
        Report { step: task.step.clone(), at: self.now, gates, whole }
    }

    /// A report of this verdict on the step that is measured, now.
    pub(super) fn hear(&mut self, verdict: VerdictStatus) {
        let task = self.task.clone().expect("something is measured");
        self.report = Some(self.report_of(&task, verdict));
    }

    /// The guard finds a breach of what it watches, now.
    pub(super) fn breach(&mut self) {
        let watch = self.watch.clone().expect("something is watched");
        let side = |requests, bad, percent| GuardSide { requests, bad, percent };
        self.breach = Some(Breach {
            release: watch.release,
            status: GuardStatus {
                signal: GuardSignal::Errors,
                weight: watch.weight,
                canary: side(17, 9, 52.94),
                primary: side(66, 0, 0.0),
                margin: watch.error_margin,
                slow_above_milliseconds: None,
                evidence: 12_345.0,
                since: self.now - SignedDuration::from_millis(300),
                at: self.now,
            },
        });
    }

    /// One call of the machine, and what a shell does with the outcome. Driven by watches: without a change, and before the
    /// machine wants to look again, there is no call.
    pub(super) fn reconcile(&mut self) {
        if self.gone {
            return;
        }
        let seen = self.observe();
        let asleep = self
            .outcome
            .as_ref()
            .is_some_and(|outcome| outcome.actions.is_empty() && outcome.again_at.is_none_or(|at| self.now < at));
        let looked = (self.spec.clone(), self.status.clone(), seen.clone());
        if asleep && self.crash.is_none() && self.looked.as_ref() == Some(&looked) {
            return;
        }
        let before = self.status.clone();
        let outcome = step(&self.spec, &before, &seen, self.now);
        self.check(&before, &seen, &outcome);
        self.note(&before, &outcome);
        let crash = self.crash.take();
        if outcome.actions.contains(&Action::CutTraffic) {
            self.cut = true;
        }
        if crash == Some(Crash::BeforeStatus) {
            self.forget_measurements();
            self.looked = None;
            return;
        }
        if outcome.status != before {
            self.writes += 1;
        }
        // As the API server returns it.
        self.status = serde_json::from_value(serde_json::to_value(&outcome.status).unwrap()).unwrap();
        assert_eq!(self.status, outcome.status, "a status survives being written and read");
        if self.status.traffic.as_ref().is_none_or(|traffic| traffic.weight == 0 && traffic.mirror == 0) {
            self.cut = false;
        }
        self.task = outcome.task.clone();
        if self.task.is_none() {
            self.report = None;
        }
        self.watch = outcome.watch.clone();
        if self.watch.is_none() {
            self.breach = None;
        }
        self.events.extend(outcome.events.clone());
        let carried_out = match crash {
            Some(Crash::After(actions)) => actions,
            Some(Crash::BeforeStatus) | None => usize::MAX,
        };
        for action in outcome.actions.iter().take(carried_out) {
            self.carry_out(action);
        }
        if crash.is_some() {
            // A new controller knows nothing of the old one's measurements.
            self.forget_measurements();
        }
        self.looked = crash.is_none().then_some((looked.0, self.status.clone(), looked.2));
        self.outcome = Some(outcome);
    }

    fn forget_measurements(&mut self) {
        self.task = None;
        self.report = None;
        self.watch = None;
        self.breach = None;
    }

    fn carry_out(&mut self, action: &Action) {
        match action {
            Action::CutTraffic => {}
            Action::AddFinalizer => self.finalizer = true,
            Action::EnsureServices => {
                self.service_exists = true;
                self.companions = true;
            }
            Action::SetKey(key) => self.key = *key,
            Action::CreateRevision { revision, replicas } => {
                let number = self.revisions.values().map(|running| running.number).max().unwrap_or_default() + 1;
                let recorded = self.revisions.contains_key(revision);
                let present = self.target.as_ref().is_some_and(|target| target.revision == *revision);
                if recorded || present {
                    let running = self
                        .revisions
                        .entry(revision.clone())
                        .or_insert_with(|| Running { number, ..Running::default() });
                    running.desired = Some(*replicas);
                }
            }
            Action::ScaleRevision { revision, replicas } => {
                if let Some(running) = self.revisions.get_mut(revision) {
                    running.desired = Some(*replicas);
                    running.ready = running.ready.min(*replicas);
                    running.disowned = false;
                }
            }
            Action::MarkPromoted { revision } => {
                if let Some(running) = self.revisions.get_mut(revision) {
                    running.promoted = true;
                }
            }
            Action::DeleteRevision { revision } => {
                self.revisions.remove(revision);
            }
            Action::RestTemplate { wish } => {
                if let Some(target) = &mut self.target {
                    target.generation += 1;
                    target.replicas = 0;
                    target.wish = Some(*wish);
                }
            }
            Action::WakeTemplate { replicas } => {
                if let Some(target) = &mut self.target {
                    target.generation += 1;
                    target.replicas = *replicas;
                    target.wish = None;
                }
            }
            Action::FollowAutoscaler => self.autoscaler = Autoscaler { exists: true, stale: false },
            Action::EndAutoscaling => self.autoscaler = Autoscaler::default(),
            Action::SetReplicas { replicas } => {
                self.spec.replicas = Some(*replicas);
                self.spec.generation += 1;
            }
            Action::Release => {
                self.revisions.clear();
                self.companions = false;
                self.slices = false;
                self.finalizer = false;
                self.gone = self.deleting;
            }
        }
    }

    /// What must hold of each call, beside what the machine asserts itself.
    fn check(&mut self, before: &CanaryStatus, seen: &Observation, outcome: &Outcome) {
        invariants::holds(before, outcome, seen).unwrap();
        let after = &outcome.status;

        // The same arguments give the same outcome, and the outcome is where the machine stays until something changes.
        let again = step(&self.spec, after, seen, self.now);
        assert_eq!(again.status, *after, "a second look at the same things changes nothing");
        assert_eq!(again.actions, outcome.actions, "actions that were lost are found again");
        assert_eq!(again.events, [], "nothing is told twice");

        let canary = after.canary_revision.as_ref();
        let paused = after.paused.as_ref().is_some_and(|paused| Some(&paused.revision) == canary);
        let frozen = self.spec.suspend || paused;
        // At most one step for each passing verdict.
        let left = before.step.filter(|_| before.stage == Stage::Judge && after.step != before.step);
        let same_release =
            after.plan.as_ref().map(|plan| plan.started_at) == before.plan.as_ref().map(|plan| plan.started_at);
        let plan = after.plan.as_ref();
        let by_hand = plan.is_some_and(|plan| plan.unjudged.as_deref() == Some(plan::MANUAL_PROMOTION));
        let goes_on = same_release
            && !by_hand
            && !matches!(after.stage, Stage::RollBack | Stage::Settled)
            && (after.step > before.step || after.phase == Phase::Promoting || after.phase == Phase::Finalising);
        if let (Some(index), true) = (left, goes_on) {
            let plan = before.plan.as_ref().unwrap();
            // A decision that was never written was none.
            if self.crash != Some(Crash::BeforeStatus) {
                assert!(self.passed.insert((plan.started_at, index)), "a verdict counts once");
            }
            if plan.analysis.as_ref().is_some_and(|analysis| !analysis.metrics.is_empty()) {
                let report = seen.report.as_ref().expect("a step ends by a report");
                let step = StepId { started_at: plan.started_at, revision: plan.revision.clone(), index };
                assert_eq!((&report.step, report.verdict()), (&step, VerdictStatus::Pass));
            }
            assert!(!frozen, "nothing goes on while suspended or paused");
        }
        let weight = |status: &CanaryStatus| status.traffic.as_ref().map_or(0, |traffic| traffic.weight);
        let mirror = |status: &CanaryStatus| status.traffic.as_ref().map_or(0, |traffic| traffic.mirror);
        assert!(mirror(after) <= mirror(before) || !frozen, "no copies begin while suspended or paused");
        if weight(after) > weight(before) {
            assert!(!frozen, "nothing is raised while suspended or paused");
            let plan = plan.unwrap();
            let judged = i32::try_from(plan.steps.len()).unwrap();
            let written = self.crash != Some(Crash::BeforeStatus);
            let past = if !written || by_hand { 0 } else { after.step.unwrap_or(judged) };
            for index in 0..past {
                assert!(self.passed.contains(&(plan.started_at, index)), "no raise past step {index} without a pass");
            }
            // Above step one without a pass: only what somebody said, what was promoted before, or what the spec lets through.
            let first = plan.steps.first().map_or(0, |step| step.weight);
            let passes = self.passed.iter().filter(|(release, _)| *release == plan.started_at).count();
            if weight(after) > first && passes == 0 && written {
                match plan.unjudged.as_deref() {
                    Some(plan::MANUAL_PROMOTION) => assert!(self.said.contains(&format!("promote:{}", plan.revision))),
                    Some(plan::ROLLBACK) => assert!(self.revisions[&plan.revision].promoted),
                    Some(plan::SKIP_ANALYSIS) => {}
                    other => panic!("{} percent without a pass: {other:?}", weight(after)),
                }
            }
        }

        // A value of the annotation is handled in the call that sees it, and what is recorded of it is what was said.
        match self.action.as_deref().map(str::trim).filter(|value| !value.is_empty()) {
            Some(value) if !self.namespace_terminating || self.deleting => {
                let handled = after.action.as_ref().expect("never ignored");
                assert_eq!(handled.value, crate::delivery::status::cut(value.to_owned(), 253));
                assert!(!handled.message.is_empty(), "it is said what became of {value}");
                let told = outcome.events.iter().filter(|event| event.reason.starts_with("Action")).count();
                let new = before.action.as_ref().is_none_or(|before| before.value != handled.value);
                assert_eq!(told, usize::from(new), "each value is told of once");
            }
            Some(_) => {}
            None => assert!(after.action.is_none() || self.namespace_terminating),
        }

        // For those who wait for a condition: it speaks of the template that the status has observed.
        let promoted = after.conditions.iter().find(|condition| condition.kind == "Promoted").unwrap();
        if promoted.status == ConditionStatus::True && !self.hash_drifts {
            let template = after.template.as_ref().map(|template| template.revision.as_str());
            assert_eq!(template, after.primary_revision.as_deref(), "Promoted is about the present template");
        }

        // What serves has Pods, if it ever had.
        for action in &outcome.actions {
            if let Action::ScaleRevision { revision, replicas: 0 } = action {
                let used = seen.service.any_exists
                    && self.members.iter().any(|member| {
                        member.acknowledged.as_ref().is_some_and(|traffic| {
                            let used = traffic.weight > 0 || traffic.mirror > 0;
                            mentions(traffic, revision) && (traffic.primary.0 == *revision || used)
                        })
                    });
                let primary = after.primary_revision.as_ref() == Some(revision);
                assert!(!used || (primary && self.spec.replicas == Some(0)), "revision {revision} still serves");
            }
        }
    }

    fn note(&mut self, before: &CanaryStatus, outcome: &Outcome) {
        let after = &outcome.status;
        if before.stage == after.stage
            && before.phase == after.phase
            && outcome.actions.is_empty()
            && outcome.events.is_empty()
        {
            return;
        }
        let seconds = self.now.duration_since(self.start).as_secs();
        self.trace.push(format!(
            "+{seconds:<4} {:?}/{:?} requested {} effective {} step {:?} waits for {:?}",
            after.phase,
            after.stage,
            after.requested_weight,
            after.weight,
            after.progress,
            after.waiting.as_ref().map_or("", |waiting| waiting.reason.as_str()),
        ));
        self.trace.extend(outcome.actions.iter().map(|action| format!("        do {action:?}")));
        self.trace.extend(outcome.events.iter().map(|event| {
            format!("        {} {}: {}", if event.warning { "warn" } else { "tell" }, event.reason, event.message)
        }));
    }

    /// Time passes until the condition holds.
    pub(super) fn until(&mut self, what: &str, condition: impl Fn(&Self) -> bool) {
        for _ in 0..2_000 {
            if condition(self) {
                return;
            }
            self.reconcile();
            if condition(self) {
                return;
            }
            self.tick();
        }
        panic!("never: {what}\n{}\n{:#?}", self.trace.join("\n"), self.status);
    }

    /// So many seconds pass.
    pub(super) fn pass_time(&mut self, seconds: usize) {
        for _ in 0..seconds {
            self.reconcile();
            self.tick();
        }
        self.reconcile();
    }

    /// Time passes until nothing changes any more. Then a look changes nothing, and nothing is to be done.
    pub(super) fn settle(&mut self) {
        let mut quiet = 0;
        for _ in 0..5_000 {
            let before = (self.status.clone(), self.observe());
            self.reconcile();
            self.tick();
            let busy =
                self.outcome.as_ref().is_some_and(|outcome| outcome.again_at.is_some() || !outcome.actions.is_empty());
            let same = before == (self.status.clone(), self.observe());
            quiet = if same && !busy { quiet + 1 } else { 0 };
            if self.gone || quiet > 3 {
                return;
            }
        }
        panic!("never settles\n{}\n{:#?}", self.trace.join("\n"), self.status);
    }

    /// What is left at the end, without times.
    pub(super) fn summary(&self) -> String {
        let revisions: Vec<String> = self
            .revisions
            .iter()
            .map(|(hash, running)| format!("{hash}: {:?} promoted {}", running.desired, running.promoted))
            .collect();
        format!(
            "gone {} {:?}/{:?} {:?} pending {:?} paused {} unjudged {:?} rejected {:?} primary {:?} canary {:?} rejected {:?} traffic {:?} service {:?} key {} target {:?} wish {:?} replicas {:?} revisions [{}] ready {}",
            self.gone,
            self.status.phase,
            self.status.stage,
            self.status.action.as_ref().map(|handled| (&handled.value, handled.outcome)),
            self.status.pending_release.as_ref().map(|pending| &pending.revision),
            self.status.paused.is_some(),
            self.status.plan.as_ref().map(|plan| (&plan.revision, &plan.unjudged, &plan.action)),
            self.status
                .rejected_revisions
                .iter()
                .map(|rejected| (&rejected.revision, &rejected.reason, rejected.retried_at.is_some()))
                .collect::<Vec<_>>(),
            self.status.primary_revision,
            self.status.canary_revision,
            self.status.rejected_revision,
            self.status.traffic,
            self.status.service,
            self.key,
            self.target.as_ref().map(|target| target.replicas),
            self.target.as_ref().map(|target| target.wish),
            self.spec.replicas,
            revisions.join(", "),
            self.condition("Ready"),
        )
    }
}
