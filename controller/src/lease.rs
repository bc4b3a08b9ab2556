//! Leader election over a `coordination.k8s.io/v1` Lease: who decides and serves xDS. kube has none
//! (kube-rs/kube#485), and this one differs from client-go's in three ways: the holder is the Pod's uid, so that a restarted
//! container takes its own lease back at once; every acquisition is a new epoch; and a leader knows by the monotonic clock,
//! before each write, whether it still is one.
//!
//! Why two leaders never write at once: a leader may write for `renew_deadline` after it *sent* its last successful
//! renewal; another candidate takes the lease no sooner than `duration` after it *saw* that renewal, by its own monotonic
//! clock. Clocks are never compared between machines, only their speed.
//!
//! A standby watches, and asks again before it takes: it costs no request while the leader lives.

use std::{
    collections::BTreeMap,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::StreamExt as _;
use jiff::Timestamp;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
    runtime::{WatchStreamExt as _, watcher},
};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

/// What an election goes by.
#[derive(Debug, Clone)]
pub struct LeaseSettings {
    /// Namespace of the Lease.
    pub namespace: String,
    /// Name of the Lease.
    pub name: String,
    /// Uid of our own Pod.
    pub holder: String,
    /// After so long without a renewal others take the lease. Whole seconds, because the API has no smaller ones.
    pub duration: Duration,
    /// After so long without a renewal the leader stops writing; less than `duration`.
    pub renew_deadline: Duration,
    /// Between two renewals, or two tries; less than `renew_deadline`.
    pub retry: Duration,
}

/// Settings that could make two leaders.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LeaseError {
    #[error(
        "the lease times must be retry < renew deadline < duration, and the duration whole seconds; they are {retry:?} < \
         {renew_deadline:?} < {duration:?}"
    )]
    Times { duration: Duration, renew_deadline: Duration, retry: Duration },
    #[error("the lease needs a holder: set POD_UID to the uid of the controller's own Pod")]
    Holder,
}

/// What became of a call about the Lease.
#[derive(Debug, thiserror::Error)]
enum CallError {
    #[error(transparent)]
    Api(#[from] kube::Error),
    #[error("no answer in time")]
    Late,
}

impl CallError {
    /// The object is not the one that we saw: changed, gone, or there after all.
    fn is_outdated(&self) -> bool {
        match self {
            Self::Api(kube::Error::Api(status)) => {
                status.is_conflict() || status.is_not_found() || status.is_already_exists()
            }
            Self::Api(_) | Self::Late => false,
        }
    }
}

/// The cluster is in an earlier state than one that this replica has seen, as after a restore of etcd.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "the Lease {name} says less than before (epoch {found}, {seen} was seen): the cluster was taken back in time, as by a restore \
     of etcd, and what this replica remembers may not be so any more. It ends, to start anew from what the API server says"
)]
pub struct TakenBack {
    name: String,
    found: String,
    seen: String,
}

/// Epochs that are reported from here on are not believed: `leaseTransitions` is an `int32`, and a liar must not use it up.
const IMPLAUSIBLE: u64 = 1 << 30;

/// A time as leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Term {
    epoch: u64,
    /// From here on we may not write, unless we renew before.
    until: Instant,
}

#[derive(Debug, Default)]
struct Shared {
    term: watch::Sender<Option<Term>>,
    epoch: watch::Sender<Option<u64>>,
    /// The highest epoch that anybody has seen: the next one is above it.
    highest: AtomicU64,
    raised: Notify,
    given_up: Notify,
    /// Who holds the Lease, as last seen.
    holder: watch::Sender<Option<String>>,
}

impl Shared {
    fn publish(&self, term: Option<Term>) {
        if let Some(term) = term {
            self.highest.fetch_max(term.epoch, Ordering::Relaxed);
        }
        self.term.send_replace(term);
        let epoch = term.map(|term| term.epoch);
        self.epoch.send_if_modified(|known| {
            let changed = *known != epoch;
            *known = epoch;
            changed
        });
    }
}

/// What the rest of the controller knows of the election. Cheap to clone.
#[derive(Debug, Clone)]
pub struct LeaseHandle(Arc<Shared>);

impl LeaseHandle {
    /// Uid of the Pod that holds the Lease, as last seen; for telling others where the leader is.
    #[must_use]
    pub fn holder(&self) -> Option<String> {
        self.0.holder.borrow().clone()
    }

    /// Whether we lead, and renewed so recently that nobody else can. To be asked before each write; false in a process that
    /// was frozen for too long, before it learns anything from the API server.
    #[must_use]
    pub fn may_write(&self) -> bool {
        self.epoch().is_some()
    }

    /// The epoch of the present term, while [`Self::may_write`].
    #[must_use]
    pub fn epoch(&self) -> Option<u64> {
        let term = *self.0.term.borrow();
        term.filter(|term| Instant::now() < term.until).map(|term| term.epoch)
    }

    /// Tells of each beginning (`Some`, the epoch) and end (`None`) of a term. An end comes late if the whole process stalls,
    /// so this is for starting and stopping work; [`Self::may_write`] decides about each write.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Option<u64>> {
        self.0.epoch.subscribe()
    }

    /// A proxy has seen the epoch `seen`. If it is above ours, the Lease was made anew or restored from a backup: a leader
    /// then starts a new term above it. Returns at once.
    pub fn raise_epoch(&self, seen: u64) {
        if seen >= IMPLAUSIBLE {
            tracing::warn!("a proxy claims to have seen the epoch {seen}, which no election can have reached: ignored");
        } else if self.0.highest.fetch_max(seen, Ordering::Relaxed) < seen {
            self.0.raised.notify_one();
        }
    }

    /// Ends our term, if we lead: another replica may take the Lease when it has run out, or we do, where nobody has within twice that
    /// time. Returns at once.
    pub fn give_up(&self) {
        self.0.given_up.notify_waiters();
    }
}

/// Takes part in the election.
pub struct Election {
    api: Api<Lease>,
    settings: LeaseSettings,
    shared: Arc<Shared>,
    latest: Option<Mark>,
}

impl std::fmt::Debug for Election {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Election").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// How far an election had come.
#[derive(Debug, Clone)]
struct Mark {
    epoch: u64,
    renewed: Option<Timestamp>,
    holder: Option<String>,
}

impl Mark {
    fn of(lease: &Lease) -> Self {
        let spec = lease.spec.as_ref();
        Self {
            epoch: epoch_of(lease),
            renewed: spec.and_then(|spec| spec.renew_time.as_ref()).map(|time| time.0),
            holder: spec.and_then(|spec| spec.holder_identity.clone()).filter(|holder| !holder.is_empty()),
        }
    }

    /// By more than a clock is set back by, since renewals carry their holder's time.
    fn is_before(&self, other: &Self, tolerance: Duration) -> bool {
        let earlier = || {
            self.renewed
                .zip(other.renewed)
                .is_some_and(|(this, that)| that.duration_since(this).as_secs() > tolerance.as_secs().cast_signed())
        };
        self.epoch < other.epoch || (self.epoch == other.epoch && earlier())
    }
}

impl std::fmt::Display for Mark {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.epoch)?;
        if let Some(renewed) = self.renewed {
            write!(f, " renewed at {renewed:.0}")?;
        }
        Ok(())
    }
}

/// A Lease as it was seen, and when.
#[derive(Debug)]
struct Sighting {
    lease: Option<Lease>,
    at: Instant,
}

impl Election {
    /// `client` should neither retry by itself nor wait long: every call has its own deadline here.
    ///
    /// # Errors
    /// If the settings do not keep two leaders apart.
    pub fn new(client: Client, settings: LeaseSettings) -> Result<(Self, LeaseHandle), LeaseError> {
        let LeaseSettings { duration, renew_deadline, retry, .. } = settings;
        let ordered = Duration::ZERO < retry && retry < renew_deadline && renew_deadline < duration;
        if !ordered || duration.subsec_nanos() != 0 {
            return Err(LeaseError::Times { duration, renew_deadline, retry });
        }
        if settings.holder.is_empty() {
            return Err(LeaseError::Holder);
        }
        let shared = Arc::new(Shared::default());
        let election = Self {
            api: Api::namespaced(client, &settings.namespace),
            settings,
            shared: Arc::clone(&shared),
            latest: None,
        };
        Ok((election, LeaseHandle(shared)))
    }

    /// Waits, leads, loses, waits again, until `stop`; then gives the Lease back, so that the next one need not wait for its
    /// end. Everything that writes must have ended before `stop`.
    ///
    /// # Errors
    /// If the Lease goes back to what it said long before; nothing that was learned from the API server since is to be relied on.
    pub async fn run(mut self, stop: CancellationToken) -> Result<(), TakenBack> {
        loop {
            let (lease, term) = tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                won = self.stand_by() => won?,
            };
            tracing::info!(epoch = term.epoch, "this replica leads");
            let shared = Arc::clone(&self.shared);
            let led = tokio::select! {
                led = self.lead(lease, term, &stop) => Some(led),
                () = shared.given_up.notified() => None,
            };
            self.shared.publish(None);
            let last = led.transpose()?;
            let gave_up = last.is_none();
            if let Some(last) = last.filter(|_| stop.is_cancelled()) {
                self.release(last).await;
                return Ok(());
            }
            tracing::warn!(epoch = term.epoch, "this replica no longer leads");
            if gave_up {
                // What it was writing may still arrive, so the Lease is not given back: it runs out.
                self.shared.holder.send_replace(None);
                tokio::select! {
                    () = stop.cancelled() => return Ok(()),
                    () = sleep(2 * self.settings.duration) => {}
                }
            }
        }
    }

    /// Until the Lease is ours.
    async fn stand_by(&mut self) -> Result<(Lease, Term), TakenBack> {
        let this_one = watcher::Config::default().fields(&format!("metadata.name={}", self.settings.name));
        let mut changes = pin!(watcher(self.api.clone(), this_one).default_backoff());
        let mut known = self.look().await?;
        loop {
            let free_at = self.free_at(&known);
            let holder = known.lease.as_ref().and_then(|lease| lease.spec.as_ref()?.holder_identity.clone());
            self.shared.holder.send_replace(holder.filter(|holder| !holder.is_empty()));
            tokio::select! {
                biased;
                change = changes.next() => {
                    let lease = match change {
                        Some(Ok(watcher::Event::Apply(lease) | watcher::Event::InitApply(lease))) => Some(lease),
                        Some(Ok(watcher::Event::Delete(_))) => None,
                        Some(Ok(watcher::Event::Init | watcher::Event::InitDone)) => continue,
                        // It backs off and tries again by itself; meanwhile the clock decides.
                        Some(Err(error)) => {
                            tracing::debug!("watching the lease: {error}");
                            continue;
                        }
                        // A watcher never ends.
                        None => return std::future::pending().await,
                    };
                    match &lease {
                        // A watch may lag; a read does not.
                        Some(lease) if self.is_behind(lease) => known.update(self.look().await?.lease),
                        _ => known.update(lease),
                    }
                    self.remember(known.lease.as_ref());
                }
                () = sleep_until(free_at) => {
                    let sent = Instant::now();
                    let next = self.taken(known.lease.as_ref());
                    match self.write(known.lease.is_some(), &next).await {
                        Ok(lease) => {
                            let term = Term {
                                epoch: epoch_of(&lease),
                                until: sent + self.settings.renew_deadline,
                            };
                            self.shared.holder.send_replace(Some(self.settings.holder.clone()));
                            self.shared.publish(Some(term));
                            self.remember(Some(&lease));
                            return Ok((lease, term));
                        }
                        Err(error) => {
                            if !error.is_outdated() {
                                tracing::warn!("cannot take the lease: {error}");
                            }
                            sleep(self.settings.retry).await;
                            let seen = self.look().await?;
                            known.update(seen.lease);
                        }
                    }
                }
            }
        }
    }

    /// Until the term ends; the Lease as we last wrote it.
    async fn lead(&mut self, mut lease: Lease, mut term: Term, stop: &CancellationToken) -> Result<Lease, TakenBack> {
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(lease),
                () = self.shared.raised.notified() => {}
                () = sleep(self.settings.retry) => {}
            }
            let sent = Instant::now();
            if sent >= term.until {
                return Ok(lease);
            }
            // The write is conditional on the resource version: it succeeds only if the Lease is still ours, so a higher epoch
            // needs no read before.
            let highest = self.shared.highest.load(Ordering::Relaxed);
            let epoch = if highest > term.epoch { highest + 1 } else { term.epoch };
            match self.write(true, &self.renewed(&lease, epoch)).await {
                Ok(written) => {
                    lease = written;
                    self.remember(Some(&lease));
                    if epoch != term.epoch {
                        tracing::warn!(epoch, "a proxy has seen a later epoch: this replica starts a new term");
                    }
                    term = Term { epoch, until: sent + self.settings.renew_deadline };
                    self.shared.publish(Some(term));
                }
                Err(error) if error.is_outdated() => {
                    // Our own write whose answer was lost, a stranger's annotation, or another holder.
                    let found = self.read().await;
                    if let Ok(Some(found)) = &found {
                        self.check(found)?;
                    }
                    match found {
                        Ok(Some(found)) if self.is_ours(&found) && epoch_of(&found) >= term.epoch => {
                            lease = found;
                            term.epoch = epoch_of(&lease);
                            self.shared.publish(Some(term));
                        }
                        Ok(_) => return Ok(lease),
                        Err(error) => tracing::warn!("cannot read the lease: {error}"),
                    }
                }
                Err(error) => tracing::warn!("cannot renew the lease: {error}"),
            }
        }
    }

    async fn release(&self, lease: Lease) {
        let mut lease = Some(lease);
        // A second try, if the last renewal's answer was lost.
        for _ in 0..2 {
            let Some(mut freed) = lease.take() else {
                return;
            };
            if let Some(spec) = &mut freed.spec {
                spec.holder_identity = Some(String::new());
            }
            match self.write(true, &freed).await {
                Ok(_) => {
                    tracing::info!("gave the lease back");
                    return;
                }
                Err(error) if error.is_outdated() => {
                    lease = self.read().await.ok().flatten().filter(|found| self.is_ours(found));
                }
                Err(error) => {
                    tracing::warn!("cannot give the lease back, so the next leader waits for its end: {error}");
                    return;
                }
            }
        }
    }

    /// Reads the Lease, however long that takes.
    async fn look(&mut self) -> Result<Sighting, TakenBack> {
        loop {
            match self.read().await {
                Ok(lease) => {
                    if let Some(lease) = &lease {
                        self.check(lease)?;
                    }
                    return Ok(Sighting { lease, at: Instant::now() });
                }
                Err(error) => tracing::warn!("cannot read the lease: {error}"),
            }
            sleep(self.settings.retry).await;
        }
    }

    /// That a Lease read from the quorum is not older than what was seen before.
    fn check(&mut self, lease: &Lease) -> Result<(), TakenBack> {
        if let Some(latest) = self.latest.as_ref().filter(|_| self.is_behind(lease)) {
            let name = self.settings.name.clone();
            return Err(TakenBack { name, found: Mark::of(lease).to_string(), seen: latest.to_string() });
        }
        self.remember(Some(lease));
        Ok(())
    }

    fn is_behind(&self, lease: &Lease) -> bool {
        self.latest.as_ref().is_some_and(|latest| Mark::of(lease).is_before(latest, self.settings.duration))
    }

    fn remember(&mut self, lease: Option<&Lease>) {
        if let Some(lease) = lease {
            self.latest = Some(Mark::of(lease));
        }
    }

    /// When the Lease may be taken.
    fn free_at(&self, known: &Sighting) -> Instant {
        let Some(spec) = known.lease.as_ref().map(|lease| lease.spec.as_ref()) else {
            // Whoever held it before it was deleted may write until a renewal fails.
            let holder = self.latest.as_ref().and_then(|latest| latest.holder.as_ref());
            let another = holder.is_some_and(|holder| *holder != self.settings.holder);
            return if another { known.at + self.settings.duration } else { known.at };
        };
        let holder = spec.and_then(|spec| spec.holder_identity.as_deref()).unwrap_or_default();
        if holder.is_empty() || holder == self.settings.holder {
            return known.at;
        }
        // The holder may go by a longer duration than we do, in the middle of an upgrade.
        let theirs = spec
            .and_then(|spec| spec.lease_duration_seconds)
            .and_then(|seconds| u64::try_from(seconds).ok())
            .unwrap_or_default();
        known.at + self.settings.duration.max(Duration::from_secs(theirs))
    }

    fn is_ours(&self, lease: &Lease) -> bool {
        let holder = lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref());
        holder == Some(self.settings.holder.as_str())
    }

    /// The Lease with us as its new holder. Every acquisition counts as a transition, our own former lease's too: it is the
    /// epoch.
    fn taken(&self, lease: Option<&Lease>) -> Lease {
        // A Lease that is gone was ours or not: what it said counts on.
        let seen = [lease.map(epoch_of), self.latest.as_ref().map(|latest| latest.epoch)];
        let highest = self.shared.highest.load(Ordering::Relaxed);
        let epoch = seen.into_iter().flatten().fold(highest, u64::max) + 1;
        let now = MicroTime(Timestamp::now());
        Lease {
            metadata: lease.map_or_else(
                || ObjectMeta {
                    name: Some(self.settings.name.clone()),
                    labels: Some(BTreeMap::from([(
                        "app.kubernetes.io/managed-by".to_owned(),
                        sluice_crds::labels::FIELD_MANAGER.to_owned(),
                    )])),
                    ..ObjectMeta::default()
                },
                |lease| lease.metadata.clone(),
            ),
            spec: Some(LeaseSpec {
                holder_identity: Some(self.settings.holder.clone()),
                acquire_time: Some(now.clone()),
                renew_time: Some(now),
                lease_duration_seconds: i32::try_from(self.settings.duration.as_secs()).ok(),
                lease_transitions: Some(transitions(epoch)),
                ..LeaseSpec::default()
            }),
        }
    }

    fn renewed(&self, lease: &Lease, epoch: u64) -> Lease {
        let mut lease = lease.clone();
        let spec = lease.spec.get_or_insert_default();
        spec.renew_time = Some(MicroTime(Timestamp::now()));
        spec.lease_transitions = Some(transitions(epoch));
        lease
    }

    /// Creates the Lease, or replaces it if it is still at the resource version that it carries.
    async fn write(&self, exists: bool, lease: &Lease) -> Result<Lease, CallError> {
        let params =
            PostParams { field_manager: Some(sluice_crds::labels::FIELD_MANAGER.to_owned()), ..PostParams::default() };
        if exists {
            self.call(self.api.replace(&self.settings.name, &params, lease)).await
        } else {
            self.call(self.api.create(&params, lease)).await
        }
    }

    /// A read from the quorum: no resource version is given.
    async fn read(&self) -> Result<Option<Lease>, CallError> {
        self.call(self.api.get_opt(&self.settings.name)).await
    }

    /// Half the renew deadline, so that a connection that hangs leaves time for another try.
    async fn call<T>(&self, call: impl Future<Output = kube::Result<T>>) -> Result<T, CallError> {
        match timeout(self.settings.renew_deadline / 2, call).await {
            Ok(answer) => Ok(answer?),
            Err(_) => Err(CallError::Late),
        }
    }
}

impl Sighting {
    /// Time starts anew only with a Lease that somebody wrote since: the same one seen twice is not a sign of life.
    fn update(&mut self, lease: Option<Lease>) {
        let version = |lease: &Option<Lease>| lease.as_ref().and_then(|lease| lease.metadata.resource_version.clone());
        if version(&self.lease) != version(&lease) {
            *self = Self { lease, at: Instant::now() };
        }
    }
}

fn epoch_of(lease: &Lease) -> u64 {
    let transitions = lease.spec.as_ref().and_then(|spec| spec.lease_transitions);
    transitions.and_then(|n| u64::try_from(n).ok()).unwrap_or_default()
}

fn transitions(epoch: u64) -> i32 {
    i32::try_from(epoch).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_frozen_leader_may_not_write_once_its_renewal_is_too_old() {
        let handle = LeaseHandle(Arc::default());
        let epochs = handle.watch();
        assert!(!handle.may_write());
        let renew_deadline = Duration::from_secs(10);
        handle.0.publish(Some(Term { epoch: 7, until: Instant::now() + renew_deadline }));
        tokio::time::advance(Duration::from_millis(9_999)).await;
        assert_eq!((handle.may_write(), handle.epoch()), (true, Some(7)));
        // Nothing of ours runs; only time passes.
        tokio::time::advance(Duration::from_millis(1)).await;
        assert_eq!((handle.may_write(), handle.epoch()), (false, None));
        assert_eq!(*epochs.borrow(), Some(7));
    }

    #[tokio::test]
    async fn renewals_do_not_wake_those_who_wait_for_a_change_of_term() {
        let handle = LeaseHandle(Arc::default());
        let mut epochs = handle.watch();
        let term = |epoch| Term { epoch, until: Instant::now() };
        handle.0.publish(Some(term(1)));
        assert_eq!(epochs.has_changed().ok(), Some(true));
        assert_eq!(*epochs.borrow_and_update(), Some(1));
        handle.0.publish(Some(term(1)));
        assert_eq!(epochs.has_changed().ok(), Some(false));
        handle.0.publish(Some(term(2)));
        assert_eq!(epochs.has_changed().ok(), Some(true));
    }

    #[test]
    fn an_epoch_that_no_election_can_have_reached_is_not_believed() {
        let handle = LeaseHandle(Arc::default());
        handle.raise_epoch(u64::MAX);
        assert_eq!(handle.0.highest.load(Ordering::Relaxed), 0);
        handle.raise_epoch(41);
        assert_eq!(handle.0.highest.load(Ordering::Relaxed), 41);
    }
}
