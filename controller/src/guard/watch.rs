//! What is watched just now, and what has been found.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use sluice_crds::{GuardSide, GuardSignal, GuardStatus};
use sluice_xds::sluice::guard::v1::{self as wire, OutcomeReport, OutcomeWatch};
use tokio::{sync::watch, time::Instant};

use super::{
    Breach, Report, Watch,
    evidence::{Certainty, Counts, Evidence, Sides},
};
use crate::cache::{CanaryKey, Touches};

/// Signals that are tested for each weight.
const SIGNALS: u32 = 2;

/// Compares what it is told to, and keeps what it found. Cheap to clone.
#[derive(Clone)]
pub struct Guard(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// What members of the fleet should report.
    wanted: watch::Sender<Arc<OutcomeWatch>>,
    touches: Touches,
    report: Arc<dyn Report>,
}

#[derive(Default)]
struct State {
    watched: BTreeMap<CanaryKey, Watched>,
    /// By the id on the wire.
    ids: BTreeMap<u64, CanaryKey>,
    last_id: u64,
    members: usize,
}

struct Watched {
    id: u64,
    watch: Watch,
    /// When the present weight was requested.
    since: (Instant, Timestamp),
    errors: Evidence,
    latency: Option<Evidence>,
    breach: Option<Breach>,
}

impl Guard {
    /// `touches` is told each Canary with a breach.
    #[must_use]
    pub fn new(touches: Touches, report: Arc<dyn Report>) -> Self {
        Self(Arc::new(Shared { state: Mutex::default(), wanted: watch::Sender::default(), touches, report }))
    }

    /// What should be watched for a Canary from now on; `None` stops it and forgets what was found. Another weight begins the
    /// comparison anew, and what was found at an older one stays found.
    pub fn watch(&self, key: &CanaryKey, watch: Option<Watch>) {
        let mut state = self.0.lock();
        let Some(watch) = watch else {
            if let Some(gone) = state.watched.remove(key) {
                state.ids.remove(&gone.id);
                self.0.want(&state);
            }
            return;
        };
        match state.watched.get_mut(key) {
            Some(known) if known.watch == watch => {}
            Some(known) if (Watch { weight: watch.weight, ..known.watch.clone() }) == watch => known.begin(watch),
            Some(_) | None => {
                state.last_id += 1;
                let id = state.last_id;
                let former = state.watched.insert(key.clone(), Watched::new(id, watch));
                if let Some(former) = former {
                    state.ids.remove(&former.id);
                }
                state.ids.insert(id, key.clone());
                self.0.want(&state);
            }
        }
    }

    /// What was found for the release that is watched.
    #[must_use]
    pub fn breach(&self, key: &CanaryKey) -> Option<Breach> {
        self.0.lock().watched.get(key)?.breach.clone()
    }

    /// What members should report, now and whenever that changes.
    pub(super) fn wanted(&self) -> watch::Receiver<Arc<OutcomeWatch>> {
        self.0.wanted.subscribe()
    }

    /// A member's report.
    pub(super) fn take(&self, report: &OutcomeReport) {
        let mut found = Vec::new();
        {
            let mut state = self.0.lock();
            for outcomes in &report.releases {
                // A release that has ended meanwhile is known no more.
                let Some(key) = state.ids.get(&outcomes.id).cloned() else { continue };
                let Some(watched) = state.watched.get_mut(&key) else { continue };
                if let Some(breach) = watched.take(outcomes) {
                    found.push((key, breach.status.signal));
                }
            }
        }
        for (key, signal) in found {
            tracing::info!(canary = %key, ?signal, "the guard is breached");
            self.0.report.breached(signal);
            self.0.touches.touch(key);
        }
    }

    /// A member begins to report; it has ended when the returned value is dropped.
    pub(super) fn member(&self) -> Member {
        self.0.count(|members| members + 1);
        Member(self.clone())
    }
}

/// A member that reports.
pub(super) struct Member(Guard);

impl Drop for Member {
    fn drop(&mut self) {
        self.0.0.count(|members| members.saturating_sub(1));
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, change: impl FnOnce(usize) -> usize) {
        let mut state = self.lock();
        state.members = change(state.members);
        // Within the lock: an older number must not follow a newer one.
        self.report.reporting(state.members);
    }

    fn want(&self, state: &State) {
        let releases = state.watched.iter().map(|(key, watched)| wire::Release {
            id: watched.id,
            destination_namespace: key.namespace.clone(),
            destination_service: watched.watch.service.clone(),
            primary: watched.watch.primary.clone(),
            canary: watched.watch.release.revision.clone(),
            slow_above_microseconds: watched
                .watch
                .latency
                .map_or(0, |latency| (latency.slow_above * 1e3).ceil() as u64),
        });
        self.wanted.send_replace(Arc::new(OutcomeWatch { releases: releases.collect() }));
    }
}

impl Watched {
    fn new(id: u64, watch: Watch) -> Self {
        let (errors, latency) = evidence(&watch);
        Self { id, watch, since: (Instant::now(), Timestamp::now()), errors, latency, breach: None }
    }

    /// Another weight.
    fn begin(&mut self, watch: Watch) {
        let breach = self.breach.take();
        *self = Self { breach, ..Self::new(self.id, watch) };
    }

    /// Returns a breach that was not known before.
    fn take(&mut self, outcomes: &wire::ReleaseOutcomes) -> Option<&Breach> {
        if self.watch.weight == 0 || self.breach.is_some() {
            return None;
        }
        let at = self.since.0.elapsed();
        let (primary, canary) = (outcomes.primary.unwrap_or_default(), outcomes.canary.unwrap_or_default());
        let sides = |bad: fn(wire::Outcomes) -> u64| {
            let counts = |outcomes: wire::Outcomes| Counts { requests: outcomes.requests, bad: bad(outcomes) };
            Sides { primary: counts(primary), canary: counts(canary) }
        };
        // Both look at each report. To slow ones nothing is added: the quick ones end first, so a canary that has just begun looks the better.
        let mut ended = sides(|outcomes| outcomes.bad);
        ended.canary.requests += outcomes.canary_more_under_way;
        let errors = self.errors.add(at, ended);
        let latency = self.latency.as_mut().and_then(|latency| latency.add(at, sides(|outcomes| outcomes.slow)));
        let status = match (errors, latency) {
            (Some(certainty), _) => self.status(GuardSignal::Errors, certainty, at),
            (None, Some(certainty)) => self.status(GuardSignal::Latency, certainty, at),
            (None, None) => return None,
        };
        Some(self.breach.insert(Breach { release: self.watch.release.clone(), status }))
    }

    fn status(&self, signal: GuardSignal, certainty: Certainty, at: Duration) -> GuardStatus {
        let latency = self.watch.latency.filter(|_| signal == GuardSignal::Latency);
        let side = |counts: Counts| GuardSide {
            requests: i64::try_from(counts.requests).unwrap_or(i64::MAX),
            bad: i64::try_from(counts.bad).unwrap_or(i64::MAX),
            percent: hundredths(counts.percent()),
        };
        let time = |after: Duration| {
            let after = SignedDuration::try_from(after).unwrap_or_default();
            self.since.1.checked_add(after).unwrap_or(Timestamp::MAX)
        };
        GuardStatus {
            signal,
            weight: self.watch.weight,
            canary: side(certainty.sides.canary),
            primary: side(certainty.sides.primary),
            margin: latency.map_or(self.watch.error_margin, |latency| latency.margin),
            slow_above_milliseconds: latency.map(|latency| latency.slow_above),
            evidence: certainty.evidence.round(),
            since: time(certainty.since),
            at: time(at),
        }
    }
}

fn evidence(watch: &Watch) -> (Evidence, Option<Evidence>) {
    let tests = watch.weights.saturating_mul(SIGNALS);
    let of = |margin: f64| Evidence::new((margin / 100.0).clamp(0.0, 1.0), tests);
    (of(watch.error_margin), watch.latency.map(|latency| of(latency.margin)))
}

fn hundredths(percent: f64) -> f64 {
    (percent * 100.0).round() / 100.0
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::{
        super::{Latency, ReleaseId},
        *,
    };

    #[derive(Default)]
    struct Told {
        breaches: AtomicUsize,
        members: AtomicUsize,
    }

    impl Report for Told {
        fn breached(&self, _: GuardSignal) {
            self.breaches.fetch_add(1, Ordering::SeqCst);
        }

        fn reporting(&self, members: usize) {
            self.members.store(members, Ordering::SeqCst);
        }
    }

    struct Test {
        guard: Guard,
        touches: Touches,
        told: Arc<Told>,
    }

    fn key() -> CanaryKey {
        CanaryKey::new("shop", "web")
    }

    fn watch(revision: &str, weight: i32) -> Watch {
        Watch {
            release: ReleaseId { started_at: Timestamp::UNIX_EPOCH, revision: revision.to_owned() },
            service: "web".to_owned(),
            primary: "aaa".to_owned(),
            weight,
            weights: 3,
            error_margin: 5.0,
            latency: Some(Latency { slow_above: 500.0, margin: 10.0 }),
        }
    }

    impl Test {
        fn new() -> Self {
            let (touches, told) = (Touches::default(), Arc::<Told>::default());
            Self { guard: Guard::new(touches.clone(), told.clone()), touches, told }
        }

        fn id(&self) -> u64 {
            let wanted = self.guard.wanted().borrow().clone();
            let [release] = wanted.releases.as_slice() else { panic!("{wanted:?}") };
            release.id
        }

        /// A second of reports: so many of each ten requests of the canary are bad, so many slow, and none of the primary's.
        async fn hears(&self, id: u64, bad: u64, slow: u64) {
            for _ in 0..10 {
                tokio::time::advance(Duration::from_millis(100)).await;
                let outcomes = |requests, bad, slow| Some(wire::Outcomes { requests, bad, slow });
                let release = wire::ReleaseOutcomes {
                    id,
                    primary: outcomes(40, 0, 0),
                    canary: outcomes(10, bad, slow),
                    canary_more_under_way: 0,
                };
                self.guard.take(&OutcomeReport { releases: vec![release] });
            }
        }

        fn found(&self) -> Option<GuardStatus> {
            self.guard.breach(&key()).map(|breach| breach.status)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_breach_is_told_once_with_its_numbers() {
        let test = Test::new();
        test.guard.watch(&key(), Some(watch("bbb", 20)));
        test.hears(test.id(), 0, 0).await;
        assert_eq!(test.found(), None);
        assert!(test.touches.is_empty());
        test.hears(test.id(), 5, 0).await;
        let found = test.found().unwrap();
        assert_eq!((found.signal, found.weight, found.margin), (GuardSignal::Errors, 20, 5.0));
        assert!(found.canary.percent > 40.0 && found.primary.percent == 0.0, "{found:?}");
        assert_eq!(found.primary.requests, 4 * found.canary.requests);
        assert!(found.evidence >= 10_000.0 && found.at > found.since);
        assert_eq!(test.touches.take().await.into_iter().collect::<Vec<_>>(), [key()]);
        test.hears(test.id(), 5, 0).await;
        assert!(test.touches.is_empty(), "told already");
        assert_eq!((test.found(), test.told.breaches.load(Ordering::SeqCst)), (Some(found), 1));
        test.guard.watch(&key(), None);
        assert_eq!(test.found(), None);
        assert!(test.guard.wanted().borrow().releases.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn slow_requests_are_a_breach_where_a_gate_says_what_is_slow() {
        let test = Test::new();
        test.guard.watch(&key(), Some(watch("bbb", 20)));
        assert_eq!(test.guard.wanted().borrow().releases[0].slow_above_microseconds, 500_000);
        test.hears(test.id(), 0, 9).await;
        let found = test.found().unwrap();
        assert_eq!((found.signal, found.margin), (GuardSignal::Latency, 10.0));
        assert_eq!(found.slow_above_milliseconds, Some(500.0));

        test.guard.watch(&key(), Some(Watch { latency: None, ..watch("bbb", 20) }));
        assert_eq!(test.guard.wanted().borrow().releases[0].slow_above_microseconds, 0);
        test.hears(test.id(), 0, 9).await;
        assert_eq!(test.found(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_compared_at_weight_0_and_a_new_weight_begins_anew() {
        let test = Test::new();
        test.guard.watch(&key(), Some(watch("bbb", 0)));
        let id = test.id();
        test.hears(id, 10, 0).await;
        assert_eq!(test.found(), None);
        for weight in [20, 60] {
            test.guard.watch(&key(), Some(watch("bbb", weight)));
            assert_eq!(test.id(), id, "members count on");
            assert_eq!(test.found(), None);
        }
        test.hears(id, 10, 0).await;
        assert_eq!(test.found().unwrap().weight, 60);
        // Found is found, although the weight was raised in the same moment.
        test.guard.watch(&key(), Some(watch("bbb", 100)));
        assert_eq!(test.found().unwrap().weight, 60);
    }

    #[tokio::test(start_paused = true)]
    async fn reports_about_a_release_that_has_ended_count_for_nothing() {
        let test = Test::new();
        test.guard.watch(&key(), Some(watch("bbb", 20)));
        let old = test.id();
        test.guard.watch(&key(), Some(watch("ccc", 20)));
        assert_ne!(test.id(), old);
        test.hears(old, 10, 0).await;
        assert_eq!(test.found(), None);
    }

    #[tokio::test]
    async fn members_are_counted_while_they_report() {
        let test = Test::new();
        let members = [test.guard.member(), test.guard.member()];
        assert_eq!(test.told.members.load(Ordering::SeqCst), 2);
        drop(members);
        assert_eq!(test.told.members.load(Ordering::SeqCst), 0);
    }
}
