//! The shell around the machine: observe, decide, write the status, act. Nothing here decides anything.
//!
//! One [`reconcile`] of a Canary reads memory only, unless something has to be written (or configuration changed, which is read by
//! name). It runs for the leader alone, when something that concerns the Canary was touched ([`crate::cache::Touches`]).

use std::{
    collections::HashMap,
    hash::{BuildHasher, Hasher},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures::{StreamExt, stream};
use jiff::Timestamp;
use kube::{
    Resource, ResourceExt,
    runtime::{
        controller::{self, Action, Controller},
        reflector::{ObjectRef, Store},
    },
};
use sluice_crds::{Canary, CanaryStatus, Stage, labels};
use tokio::sync::watch;
use tracing::Instrument;

use super::{
    actions::{ActionError, Effects, RECORD, Turn, Written},
    config::{ReadError, Tracked},
    machine::{self, Event, Fleet, Observation, Problem},
    observe::{self, Reports},
    spec,
};
use crate::{
    analysis::{DryRun, DryRunRequest, Report, Task},
    cache::{CanaryKey, autoscaler_resource, deployment_resource, version_number},
    guard::{Breach, Watch},
    mesh::Limits,
};

/// Reconciles at the same time.
const CONCURRENCY: u16 = 16;
/// A look at every Canary when nothing else happens: costs memory reads only.
const RESYNC: Duration = Duration::from_secs(300);
/// How long a reconcile is put off for the cache to show what was written. After that, resourceVersions alone protect.
const CACHE_LAG: Duration = Duration::from_secs(1);
/// A look at a Canary that something forbids to go on: what stands in its way (a foreign Deployment, say) may go without
/// touching it. Costs memory reads only.
const HELD_RESYNC: Duration = Duration::from_secs(5);
/// How often a taken name that no watch shows is asked for again.
const TAKEN_RECHECK: Duration = Duration::from_secs(30);
/// A look after one that found this replica not to lead.
const LATE_RENEWAL: Duration = Duration::from_secs(1);
const BACKOFF_BASE: Duration = Duration::from_millis(100);
const BACKOFF_CAP: Duration = Duration::from_secs(30);
/// From so many failures in a row on, an event tells of them: less may be a passing conflict.
const FAILURES_TO_TELL: u32 = 4;

/// What delivery needs from the fleet's control plane.
pub trait Mesh: Send + Sync {
    /// What the fleet has acknowledged for this Canary.
    fn fleet(&self, canary: &CanaryKey) -> Fleet;
    /// Sends weight 0 for the canary now, whatever the status says, until a status with weight 0 is there.
    fn cut(&self, canary: &CanaryKey);
    /// Takes a cut back that no status came to say.
    fn restore(&self, canary: &CanaryKey);
}

/// What delivery needs from the analysis. None of these waits.
pub trait Judge: Send + Sync {
    /// What to measure from now on; `None` stops.
    fn set(&self, canary: &CanaryKey, task: Option<Task>);
    /// The newest report.
    fn report(&self, canary: &CanaryKey) -> Option<Report>;
    /// Outcome of running every query of a release dry; starts it if it was not, and touches the Canary when it is done.
    fn dry_run(&self, request: &DryRunRequest) -> Option<DryRun>;
    /// Why a dry run has no outcome yet, where that is known.
    fn dry_run_waits_for(&self, canary: &CanaryKey) -> Option<String>;
    /// Drops everything about a Canary that is gone.
    fn forget(&self, canary: &CanaryKey);
}

/// What delivery needs from the guard. None of these waits.
pub trait Guarding: Send + Sync {
    /// What to watch from now on; `None` stops.
    fn watch(&self, canary: &CanaryKey, watch: Option<Watch>);
    /// What was found.
    fn breach(&self, canary: &CanaryKey) -> Option<Breach>;
}

/// Tells people. Does not wait.
pub trait Announce: Send + Sync {
    fn announce(&self, canary: &Canary, event: &Event);
}

/// Metrics about each Canary, exported by the leader only.
pub trait Gauges: Send + Sync {
    fn set(&self, canary: &CanaryKey, status: &CanaryStatus);
    fn remove(&self, canary: &CanaryKey);
    /// A look at a Canary has ended.
    fn reconciled(&self, took: Duration, ok: bool);
}

/// Everything that a reconcile needs.
pub struct Context {
    pub effects: Effects,
    /// Floor of time for kube-proxy at takeover and hand-back.
    pub settle: Duration,
    /// What the fleet gives to each Service.
    pub limits: Limits,
    pub mesh: Arc<dyn Mesh>,
    pub judge: Arc<dyn Judge>,
    pub guard: Arc<dyn Guarding>,
    pub announce: Arc<dyn Announce>,
    pub gauges: Arc<dyn Gauges>,
    pub memory: Memories,
}

/// What is remembered of each Canary between reconciles. Nothing that a decision needs: all of that is in the status.
#[derive(Default)]
pub struct Memories {
    canaries: Mutex<HashMap<CanaryKey, Memory>>,
    /// Since when this replica leads.
    leading_since: Mutex<Option<Timestamp>>,
}

#[derive(Default)]
struct Memory {
    /// Errors in a row.
    failures: u32,
    /// The Canary as we wrote it last.
    written: Option<Arc<Canary>>,
    /// What else we wrote, and until when to wait for the cache to show it.
    unseen: Vec<(Written, Instant)>,
    taken: Option<Taken>,
}

/// The name of a record that turned out to be taken. Whatever else is in the way is in the cache a moment later, and may be what was
/// waited for: the next look sees it.
#[derive(Clone)]
struct Taken {
    name: String,
    checked: Instant,
}

/// A reconcile that did not finish. It is tried again, later and later.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Action(#[from] ActionError),
    #[error(transparent)]
    Config(#[from] ReadError),
}

/// Looks at one Canary and brings it one step on.
///
/// # Errors
/// If something could not be read or written; what was done stays.
pub async fn reconcile(canary: Arc<Canary>, ctx: Arc<Context>) -> Result<Action, Error> {
    let span = tracing::info_span!("canary", canary = %CanaryKey::of(&canary));
    let began = Instant::now();
    let done = Box::pin(look(canary, Arc::clone(&ctx))).instrument(span).await;
    ctx.gauges.reconciled(began.elapsed(), done.is_ok());
    done
}

async fn look(canary: Arc<Canary>, ctx: Arc<Context>) -> Result<Action, Error> {
    let key = CanaryKey::of(&canary);
    let canary = ctx.memory.newest(&key, canary);
    if canary.metadata.deletion_timestamp.is_some() && !canary.finalizers().iter().any(|name| name == labels::FINALIZER)
    {
        ctx.forget(&key);
        return Ok(Action::await_change());
    }
    if let Some(wait) = ctx.unseen(&key) {
        return Ok(Action::requeue(wait));
    }

    // Observe.
    let (spec, refused) = match spec::parse(&canary, ctx.settle) {
        Ok(spec) => (spec, None),
        Err(refused) => {
            let problem = refused.problem();
            (*refused.spec, Some(problem))
        }
    };
    let tracked = ctx.tracked(&key, &canary).await;
    let mut taken: Vec<Problem> = refused.into_iter().collect();
    taken.extend(ctx.still_taken(&key, &canary).await);
    let before = canary.status.clone().unwrap_or_default();
    let mut fleet = ctx.mesh.fleet(&key);
    // What is requested may still be on its way, so what was acknowledged before says nothing: a weight that is withdrawn in that
    // moment would seem to have never been given.
    fleet.effective.take_if(|effective| before.traffic.as_ref() != Some(&*effective));
    let reports = Reports {
        fleet,
        report: ctx.judge.report(&key),
        breach: ctx.guard.breach(&key),
        problems: taken,
        limits: ctx.limits,
    };
    let mut observed = observe::observe(&ctx.effects.cache, &canary, tracked, reports);
    observed.observation.leading_since = ctx.memory.leading_since();
    observed.observation.dry_run =
        next_release(&spec, &before, &observed.observation).and_then(|request| ctx.judge.dry_run(&request));
    if observed.observation.dry_run.is_none() {
        observed.observation.dry_run_waits_for = ctx.judge.dry_run_waits_for(&key);
    }

    // Decide.
    let outcome = machine::step(&spec, &before, &observed.observation, Timestamp::now());

    // Weight 0 waits for nothing, not even for its own record.
    if outcome.actions.contains(&machine::Action::CutTraffic) {
        ctx.mesh.cut(&key);
    } else if outcome.status.traffic.as_ref().is_some_and(|traffic| traffic.weight > 0 || traffic.mirror > 0) {
        ctx.mesh.restore(&key);
    }
    let mut turn = Turn { canary: (*canary).clone(), observed: &observed, written: Vec::new() };
    if canary.status.as_ref() != Some(&outcome.status) {
        turn.canary = ctx.effects.write_status(&canary, outcome.status.clone()).await?;
        ctx.memory.wrote(&key, &turn.canary);
    }
    for event in &outcome.events {
        tracing::info!(reason = event.reason, warning = event.warning, "{}", event.message);
        ctx.announce.announce(&turn.canary, event);
    }
    ctx.judge.set(&key, outcome.task);
    ctx.guard.watch(&key, outcome.watch);
    ctx.gauges.set(&key, &outcome.status);

    // Act. One that fails does not hold up the others: the one that frees a quota may come after the one that needs it.
    let mut failed = None;
    for action in &outcome.actions {
        match ctx.effects.perform(action, &mut turn).await {
            Ok(()) => {}
            Err(error @ ActionError::NotLeading { .. }) => return Err(error.into()),
            Err(error) => {
                ctx.memory.found_taken(&key, &error);
                failed = failed.or(Some(error));
            }
        }
    }
    ctx.memory.wrote(&key, &turn.canary);
    ctx.memory.wait_for(&key, turn.written);
    // What could not be read is why anything failed that needs it.
    if let Some(error) = observed.tracked.unread.map(Error::from).or(failed.map(Error::from)) {
        return Err(error);
    }
    if outcome.actions.contains(&machine::Action::Release) && observed.observation.deleting {
        // The finalizer is off: a later look at an older copy of it finds nothing left to do.
        ctx.forget(&key);
        return Ok(Action::await_change());
    }
    ctx.memory.with(&key, |memory| memory.failures = 0);
    let again = outcome.again_at.map_or(RESYNC, |at| {
        // A little late rather than early: an early look would find nothing due and ask again.
        Duration::try_from(at.duration_since(Timestamp::now())).unwrap_or_default() + Duration::from_millis(1)
    });
    let resync = if observed.observation.problems.is_empty() { RESYNC } else { HELD_RESYNC };
    Ok(Action::requeue(again.min(resync)))
}

/// The release that waits for its dry run, if one does: nothing is asked for a Canary that is settled.
fn next_release(spec: &machine::Spec, status: &CanaryStatus, seen: &Observation) -> Option<DryRunRequest> {
    let primary = status.primary_revision.as_ref()?;
    let revision = &seen.template.as_ref()?.revision;
    let pending = status.stage == Stage::Settled
        && revision != primary
        && !status
            .rejected_revisions
            .iter()
            .any(|rejected| rejected.revision == *revision && rejected.retried_at.is_none())
        && status.pending_release.is_none()
        && !seen.deleting
        && !spec.skip_analysis;
    let analysis = spec.analysis.as_ref().filter(|_| pending)?;
    let gates = analysis.metrics.clone();
    (!gates.is_empty()).then(|| DryRunRequest {
        canary: spec.key.clone(),
        service: spec.service.clone(),
        target: spec.target.clone(),
        primary_revision: primary.clone(),
        canary_revision: revision.clone(),
        gates,
        mirrored: analysis.mirror == Some(true),
        metrics_server: spec.metrics_server.clone(),
    })
}

/// When to try again. Per object, with jitter, so that one that fails does not drag others along.
pub fn error_policy(canary: Arc<Canary>, error: &Error, ctx: Arc<Context>) -> Action {
    let key = CanaryKey::of(&canary);
    if let Error::Action(ActionError::NotLeading { .. }) = error {
        // The next term looks at everything; but the same one may go on, with a renewal that came late.
        return Action::requeue(LATE_RENEWAL);
    }
    let failures = ctx.memory.with(&key, |memory| {
        memory.failures = memory.failures.saturating_add(1);
        memory.failures
    });
    let wait = backoff(failures);
    match error {
        Error::Action(ActionError::Conflict { .. }) => tracing::debug!(canary = %key, %error, ?wait, "tried again"),
        // Such as a Service that somebody created at the same moment.
        Error::Action(_) | Error::Config(_) if failures == 1 => {
            tracing::info!(canary = %key, %error, ?wait, "tried again")
        }
        Error::Action(_) | Error::Config(_) => tracing::warn!(canary = %key, %error, ?wait, "tried again"),
    }
    if failures == FAILURES_TO_TELL {
        let event = Event { warning: true, reason: "ReconcileFailed", message: format!("{error}; it is tried again") };
        ctx.announce.announce(&canary, &event);
    }
    Action::requeue(wait)
}

/// 0.1 s, 0.2 s, ... 30 s, each with up to a half less.
fn backoff(failures: u32) -> Duration {
    let full = BACKOFF_BASE.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(BACKOFF_CAP);
    // A random number without a generator of its own: every `RandomState` has other keys.
    let random = std::hash::RandomState::new().build_hasher().finish();
    full - full.mul_f64((random % 1024) as f64 / 2048.0)
}

/// Reconciles while this replica leads: `leading` holds the epoch of its term. Ends when the sender of `leading` is gone.
///
/// Other rooms ask for a look through [`crate::cache::Touches`].
pub async fn run<E>(ctx: Arc<Context>, mut leading: watch::Receiver<Option<E>>)
where
    E: Clone + PartialEq + Send + Sync + 'static,
{
    loop {
        let Ok(term) = leading.wait_for(Option::is_some).await.map(|term| term.clone()) else { return };
        ctx.memory.begin_term();
        let mut changed = leading.clone();
        let end = async move {
            // An error means that nobody will say any more whether we lead: the term is over.
            let _ = changed.wait_for(|now| *now != term).await;
        };
        let cache = &ctx.effects.cache;
        for canary in cache.canaries.state() {
            cache.touches.touch(CanaryKey::of(&canary));
        }
        let touched = stream::unfold(cache.touches.clone(), |touches| async move {
            let keys = touches.take().await;
            Some((stream::iter(keys.into_iter().map(|key| key.object_ref())), touches))
        });
        Controller::for_stream(stream::pending(), cache.canaries.clone())
            .with_config(controller::Config::default().concurrency(CONCURRENCY))
            .reconcile_on(touched.flatten())
            .graceful_shutdown_on(end)
            .run(reconcile, error_policy, Arc::clone(&ctx))
            .for_each(|result| {
                match result {
                    Ok(_) => {}
                    Err(controller::Error::ObjectNotFound(gone)) => {
                        ctx.forget(&CanaryKey::new(gone.namespace.unwrap_or_default(), gone.name));
                    }
                    // Told by the error policy.
                    Err(controller::Error::ReconcilerFailed(..)) => {}
                    Err(error @ (controller::Error::QueueError(_) | controller::Error::RunnerError(_))) => {
                        tracing::error!(%error, "the reconciler's queue failed");
                    }
                }
                std::future::ready(())
            })
            .await;
        ctx.forget_all();
    }
}

impl Context {
    /// The configuration that the target uses now.
    async fn tracked(&self, key: &CanaryKey, canary: &Canary) -> Tracked {
        let Some(target) = observe::target(&self.effects.cache, canary) else { return Tracked::default() };
        let before = canary.status.as_ref().and_then(|status| status.template.as_ref());
        let before = before.map(|template| template.tracked_configs.clone()).unwrap_or_default();
        self.effects.configs.track(&self.effects.cache, key, &target.data["spec"]["template"], &before).await
    }

    /// A name that was taken, as long as it is.
    async fn still_taken(&self, key: &CanaryKey, canary: &Canary) -> Option<Problem> {
        let taken = self.memory.with(key, |memory| memory.taken.clone())?;
        let problem = observe::taken(RECORD, &taken.name);
        if taken.checked.elapsed() < TAKEN_RECHECK {
            return Some(problem);
        }
        let still = self.effects.is_taken(canary, &taken.name).await;
        self.memory.with(key, |memory| {
            memory.taken = still.then(|| Taken { checked: Instant::now(), ..taken });
        });
        still.then_some(problem)
    }

    /// How long to wait for the cache to show what we wrote; a touch comes before, when it does.
    fn unseen(&self, key: &CanaryKey) -> Option<Duration> {
        let now = Instant::now();
        self.memory.with(key, |memory| {
            memory.unseen.retain(|(written, until)| now < *until && !self.shows(key, written));
            memory.unseen.iter().map(|(_, until)| until.saturating_duration_since(now)).max()
        })
    }

    fn shows(&self, key: &CanaryKey, written: &Written) -> bool {
        let cache = &self.effects.cache;
        match written {
            Written::Deployment { name, resource_version } => {
                let reference = ObjectRef::new_with(name, deployment_resource()).within(&key.namespace);
                cache.deployments.get(&reference).is_some_and(|found| !older(&*found, resource_version))
            }
            Written::Autoscaler { name, resource_version } => {
                let reference = ObjectRef::new_with(name, autoscaler_resource()).within(&key.namespace);
                cache.autoscalers.get(&reference).is_some_and(|found| !older(&*found, resource_version))
            }
            Written::Service { name, resource_version } => shows(&cache.services, key, name, resource_version),
            Written::Record { name, resource_version } => shows(&cache.revisions, key, name, resource_version),
            Written::RecordGone { name, uid } => {
                let found = cache.revisions.get(&ObjectRef::new(name).within(&key.namespace));
                found.is_none_or(|found| {
                    found.uid().as_ref() != Some(uid) || found.metadata.deletion_timestamp.is_some()
                })
            }
        }
    }

    /// Drops everything about a Canary that is gone.
    fn forget(&self, key: &CanaryKey) {
        self.memory.lock().remove(key);
        self.effects.configs.forget(key);
        self.judge.forget(key);
        self.guard.watch(key, None);
        self.gauges.remove(key);
    }

    /// At the end of a term.
    fn forget_all(&self) {
        let keys: Vec<_> = self.memory.lock().keys().cloned().collect();
        for key in keys {
            self.forget(&key);
        }
    }
}

impl Memories {
    fn lock(&self) -> MutexGuard<'_, HashMap<CanaryKey, Memory>> {
        self.canaries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leading_since(&self) -> Option<Timestamp> {
        *self.leading_since.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin_term(&self) {
        *self.leading_since.lock().unwrap_or_else(PoisonError::into_inner) = Some(Timestamp::now());
    }

    fn with<T>(&self, key: &CanaryKey, f: impl FnOnce(&mut Memory) -> T) -> T {
        f(self.lock().entry(key.clone()).or_default())
    }

    /// What we wrote last, while the cache does not show it yet.
    fn newest(&self, key: &CanaryKey, cached: Arc<Canary>) -> Arc<Canary> {
        self.with(key, |memory| {
            let written = memory.written.take_if(|written| {
                written.metadata.uid != cached.metadata.uid
                    || !older(&*cached, &written.resource_version().unwrap_or_default())
            });
            drop(written);
            memory.written.clone().unwrap_or(cached)
        })
    }

    fn found_taken(&self, key: &CanaryKey, error: &ActionError) {
        if let ActionError::Taken { kind: RECORD, name } = error {
            let taken = Taken { name: name.clone(), checked: Instant::now() };
            self.with(key, |memory| memory.taken = Some(taken));
        }
    }

    fn wrote(&self, key: &CanaryKey, canary: &Canary) {
        self.with(key, |memory| memory.written = Some(Arc::new(canary.clone())));
    }

    fn wait_for(&self, key: &CanaryKey, written: Vec<Written>) {
        let until = Instant::now() + CACHE_LAG;
        self.with(key, |memory| memory.unseen.extend(written.into_iter().map(|written| (written, until))));
    }
}

fn shows<K>(store: &Store<K>, key: &CanaryKey, name: &str, resource_version: &str) -> bool
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    store.get(&ObjectRef::new(name).within(&key.namespace)).is_some_and(|found| !older(&*found, resource_version))
}

/// Whether an object is older than this version.
fn older<K: Resource>(object: &K, resource_version: &str) -> bool {
    let has = version_number(object.meta().resource_version.as_deref());
    has.zip(version_number(Some(resource_version))).is_some_and(|(has, wanted)| has < wanted)
}

#[cfg(test)]
mod tests;
