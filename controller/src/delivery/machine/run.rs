//! One call of the machine: what it was given, what it has decided so far, and the words for reading the one and writing the other.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use sluice_crds::{
    Backend, CanaryStatus, Condition, ConditionStatus, Phase, RejectedRevision, Retiring, Stage, TemplateStatus,
    Traffic, Waiting,
};

use super::{
    Action, Event, Next, Observation, Outcome, Problem, Revision, Spec, TARGET_PAUSED, Template, UNSENDABLE, adopt,
    guarded, handback, release, verbs,
};
use crate::delivery::{plan, status};

/// `waiting.reason` while `spec.suspend` forbids to go on.
pub(super) const SUSPENDED: &str = "Suspended";
/// `waiting.reason` while a release is paused, by hand or for want of a verdict.
pub(super) const PAUSED: &str = "Paused";
/// Most revisions that are remembered as rejected.
const MOST_REJECTED: usize = 16;
/// Most revisions that are kept for a while after they have lost their traffic.
const MOST_RETIRING: usize = 32;
/// Problems of the target's present template, or of what the Canary says: no reason not to go back to an older revision.
const TEMPLATE_PROBLEMS: [&str; 5] = ["TemplateUnsupported", "ConfigMissing", "InvalidSpec", UNSENDABLE, TARGET_PAUSED];

/// The state of one call.
pub(super) struct Run<'a> {
    pub(super) spec: &'a Spec,
    pub(super) seen: &'a Observation,
    pub(super) now: Timestamp,
    pub(super) status: CanaryStatus,
    pub(super) actions: Vec<Action>,
    pub(super) events: Vec<Event>,
    /// What only a person can mend.
    pub(super) stalled: Option<Problem>,
    /// The cache shows the target as it was before the status saw it last: a leader whose watch is behind. Nothing is decided by it.
    pub(super) behind: bool,
    /// The last call waited for the end of `spec.suspend`, of a pause by hand, or of what only a person can mend.
    pub(super) was_held: bool,
    again_at: Option<Timestamp>,
}

/// Somebody has changed the target's template, or a configuration that it tracks, since the status observed it.
///
/// A hash that changes while neither the target's generation nor a tracked configuration does is no change of anybody's:
/// new API defaults after an upgrade of the cluster look like that.
fn changed(known: &TemplateStatus, seen: &Template) -> bool {
    // A status of before knows no uid.
    let made_anew = !known.uid.is_empty() && known.uid != seen.uid;
    let touched =
        made_anew || known.observed_generation != seen.generation || known.tracked_configs != seen.tracked_configs;
    touched && known.revision != seen.revision
}

/// The clock of the last leader may have been ahead of ours: no report would be new enough until then, and no stage end.
fn not_ahead(status: &mut CanaryStatus, spec: &Spec, now: Timestamp) {
    let times = [
        &mut status.stage_since,
        &mut status.acknowledged_at,
        &mut status.last_failure_at,
        &mut status.inconclusive_since,
        &mut status.error_since,
        &mut status.last_promotion_time,
        &mut status.last_transition_time,
    ];
    for time in times.into_iter().flatten() {
        *time = now.min(*time);
    }
    let latest = after(now, spec.scale_down_delay.max(spec.drain));
    for retiring in &mut status.retiring {
        retiring.scale_down_at = latest.min(retiring.scale_down_at);
    }
}

impl<'a> Run<'a> {
    pub(super) fn new(spec: &'a Spec, status: &CanaryStatus, seen: &'a Observation, now: Timestamp) -> Self {
        let now = micros(now);
        let mut status = status.clone();
        status.observed_generation = Some(spec.generation);
        let by_hand = status.paused.is_some();
        let stalled = |reason: &str| {
            let said = |condition: &&Condition| condition.kind == status::STALLED && condition.reason == reason;
            status.conditions.iter().find(said).is_some_and(|condition| condition.status == ConditionStatus::True)
        };
        let was_held = status.waiting.as_ref().is_some_and(|waiting| {
            let reason = waiting.reason.as_str();
            if reason == PAUSED { by_hand } else { reason == SUSPENDED || stalled(reason) }
        });
        status.waiting = None;
        not_ahead(&mut status, spec, now);
        status.stage_since.get_or_insert(now);
        status.last_transition_time.get_or_insert(now);
        let behind = status
            .template
            .as_ref()
            .zip(seen.template.as_ref())
            .is_some_and(|(known, seen)| known.uid == seen.uid && seen.generation < known.observed_generation);
        Self {
            spec,
            seen,
            now,
            status,
            actions: Vec::new(),
            events: Vec::new(),
            stalled: None,
            behind,
            was_held,
            again_at: None,
        }
    }

    /// Carries the present stage on.
    pub(super) fn advance(&mut self) -> Next {
        if self.seen.namespace_terminating && !self.seen.deleting {
            // The Canary goes with it: nothing can be made here any more, and nothing needs to.
            return self.wait("NamespaceTerminating", "the namespace is being deleted".into(), None);
        }
        if self.leaving() {
            verbs::handle(self);
            return handback::advance(self);
        }
        let changed = self.note_template();
        match self.status.stage {
            Stage::AdoptFleet
            | Stage::AdoptService
            | Stage::AdoptSettle
            | Stage::AdoptRevision
            | Stage::AdoptSwitch
            | Stage::AdoptRest => {
                verbs::handle(self);
                adopt::advance(self)
            }
            Stage::Settled
            | Stage::Scale
            | Stage::Shift
            | Stage::Judge
            | Stage::PromoteScale
            | Stage::PromoteShift
            | Stage::Finalise
            | Stage::RollBack
            | Stage::Paused => {
                let next = release::advance(self, changed);
                if !self.leaving() {
                    return next;
                }
                // The release that an uninstallation waited for has just ended; what holds up the next one is nothing to it.
                self.stalled = None;
                self.again_at = None;
                Next::Again
            }
            Stage::ReturnScale => handback::stay(self),
            Stage::ReturnSwitch | Stage::ReturnService | Stage::ReturnSettle => Next::Wait,
        }
    }

    pub(super) fn finish(mut self, before: &CanaryStatus) -> Outcome {
        let (task, watch) = if self.leaving() { (None, None) } else { (release::task(&self), guarded::watch(&self)) };
        status::present(&mut self.status, before, self.spec, self.seen, self.stalled.as_ref(), self.now);
        self.events.extend(status::warnings_event(before, &self.status));
        // What protects users goes first.
        self.actions.sort_by_key(|action| *action != Action::CutTraffic);
        Outcome {
            status: self.status,
            actions: self.actions,
            task,
            watch,
            again_at: self.again_at,
            events: self.events,
        }
    }

    /// Records what is seen of the target, and says whether its revision is another one than the status speaks of.
    fn note_template(&mut self) -> bool {
        let Some(seen) = self.seen.template.as_ref().filter(|seen| !self.behind && !seen.unread) else {
            return false;
        };
        let known = self
            .status
            .template
            .get_or_insert_with(|| TemplateStatus { revision: seen.revision.clone(), ..TemplateStatus::default() });
        let changed = changed(known, seen);
        known.uid.clone_from(&seen.uid);
        known.observed_generation = seen.generation;
        known.tracked_configs.clone_from(&seen.tracked_configs);
        known.revision.clone_from(&seen.revision);
        if changed {
            self.keep_replicas(seen);
            self.forget_what_was_said(&seen.revision);
        }
        changed
    }

    /// What was said by hand about the release of the former template ends with it, but for a way back.
    fn forget_what_was_said(&mut self, revision: &str) {
        self.status.rejected_revision = None;
        self.status.paused = None;
        self.status.pending_release.take_if(|pending| pending.unjudged == plan::MANUAL_PROMOTION);
        for rejected in self.status.rejected_revisions.iter_mut().filter(|rejected| rejected.revision != revision) {
            rejected.retried_at = None;
        }
    }

    /// `kubectl rollout undo` brings back the annotations of the Deployment as they were when the older template was current, and
    /// with them an older wish. Nobody means to scale down by that: it counts as taken. A wish that rises is taken over.
    fn keep_replicas(&mut self, seen: &Template) {
        let (Some(wish), Some(taken)) = (seen.wish, self.wish_taken()) else { return };
        if seen.replicas > 0 || wish >= taken || !self.seen.revisions.contains_key(&seen.revision) {
            return;
        }
        if let Some(known) = &mut self.status.template {
            known.replicas = i32::try_from(wish).ok();
        }
        let message = format!(
            "Deployment {0} is back at revision {1} and its wish of {wish} replicas, as kubectl rollout undo leaves it; the replicas stay as they are. To scale: kubectl scale -n {2} canary/{3} --replicas={wish}",
            self.spec.target, seen.revision, self.spec.key.namespace, self.spec.key.name
        );
        self.tell(false, "ReplicasKept", message);
    }

    // What is so.

    /// The traffic is handed back: the Canary is being deleted, or Sluice is being uninstalled. Once the traffic moves it is carried
    /// to its end, even if the installation stays after all: only then it is taken over again. A release comes to its end first.
    pub(super) fn leaving(&self) -> bool {
        let begun = matches!(self.status.stage, Stage::ReturnSwitch | Stage::ReturnService | Stage::ReturnSettle);
        let ends = self.status.phase == Phase::Terminated && self.seen.finalizer;
        let uninstalling = self.seen.uninstalling_until.is_some_and(|until| self.now < until);
        self.seen.deleting || begun || ends || (uninstalling && self.can_go_back())
    }

    /// The target's own Pods would serve what serves now, and nothing that nobody has judged.
    fn can_go_back(&self) -> bool {
        if self.status.primary_revision.is_none() {
            return true;
        }
        let (Some(seen), Some(known)) = (&self.seen.template, &self.status.template) else { return false };
        // Once the target wakes, its generation says nothing any more about its template.
        self.status.stage == Stage::ReturnScale
            || (matches!(self.status.phase, Phase::Initialized | Phase::Succeeded)
                && !seen.unread
                && !changed(known, seen))
    }

    /// Replicas that the target's owner says now, by its own field or by what was kept of it.
    pub(super) fn owners_wish(&self) -> Option<u32> {
        let template = self.seen.template.as_ref().filter(|_| !self.behind)?;
        let says = template.replicas > 0 && !self.nobodys(template);
        if says { Some(template.replicas) } else { template.wish }
    }

    /// Kubernetes puts 1 where a Deployment says no `replicas`. Of one that was made anew while it should rest, nobody was asked who
    /// would know whether it does, and taken for a wish it would scale what serves down to one Pod.
    fn nobodys(&self, template: &Template) -> bool {
        template.replicas == 1 && !template.marked && self.target_rests()
    }

    /// The target is only the template: it was taken over, and is to be at 0 replicas.
    pub(super) fn target_rests(&self) -> bool {
        self.status.template.as_ref().is_some_and(|template| !template.name.is_empty())
    }

    /// The wish that was taken over into `spec.replicas` last.
    pub(super) fn wish_taken(&self) -> Option<u32> {
        self.status.template.as_ref().and_then(|template| template.replicas).and_then(|wish| u32::try_from(wish).ok())
    }

    /// Replicas of the serving revision that are wished for.
    pub(super) fn wish(&self) -> u32 {
        let fresh = self.owners_wish().filter(|wish| Some(*wish) != self.wish_taken());
        fresh
            .or(self.spec.replicas)
            .or_else(|| self.status.primary_revision.as_deref().and_then(|primary| self.desired(primary)))
            .or(self.wish_taken())
            .unwrap_or(1)
    }

    /// The same during a release, when it only rises: pods that serve stay until the release has ended.
    pub(super) fn rising_wish(&self) -> u32 {
        let has = self.status.primary_revision.as_deref().and_then(|primary| self.desired(primary));
        self.wish().max(has.unwrap_or_default())
    }

    pub(super) fn revision(&self, hash: &str) -> Option<&Revision> {
        self.seen.revisions.get(hash)
    }

    /// Replicas of its Deployment; `None` when there is none.
    pub(super) fn desired(&self, hash: &str) -> Option<u32> {
        self.revision(hash).and_then(|revision| revision.desired)
    }

    pub(super) fn ready(&self, hash: &str) -> u32 {
        self.revision(hash).map_or(0, |revision| revision.ready)
    }

    /// The revision of the present template, as the status knows it.
    pub(super) fn template_revision(&self) -> Option<&str> {
        self.status.template.as_ref().map(|template| template.revision.as_str())
    }

    /// What every member of the fleet has acknowledged, if that is known.
    pub(super) fn effective(&self) -> Option<&Traffic> {
        let fleet = &self.seen.fleet;
        if fleet.joining || fleet.members == 0 { None } else { fleet.effective.as_ref() }
    }

    /// Every member has acknowledged exactly the traffic that is requested.
    pub(super) fn acknowledged(&self) -> bool {
        self.effective().is_some() && self.effective() == self.status.traffic.as_ref()
    }

    /// No member sends requests to a revision, as far as every member has said so, and none is asked to.
    pub(super) fn unused(&self, hash: &str) -> bool {
        let requested = self.status.traffic.as_ref().is_some_and(|traffic| mentions(traffic, hash));
        !requested && self.effective().is_some_and(|effective| !mentions(effective, hash))
    }

    pub(super) fn weight(&self) -> i32 {
        self.status.traffic.as_ref().map_or(0, |traffic| traffic.weight)
    }

    /// Percent of the primary's requests of which the canary is to get copies.
    pub(super) fn mirror(&self) -> i32 {
        self.status.traffic.as_ref().map_or(0, |traffic| traffic.mirror)
    }

    /// Nobody and no copy is to reach the canary any more; `NAME-canary` still leads to it.
    pub(super) fn take_back(&mut self) {
        if let Some(traffic) = &mut self.status.traffic {
            traffic.weight = 0;
            traffic.mirror = 0;
        }
    }

    /// Percent of all requests that the primary may have to serve.
    pub(super) fn primary_share(&self) -> i32 {
        match &self.status.traffic {
            // How many match, nobody knows.
            Some(traffic) if traffic.matches.is_none() => 100 - traffic.weight,
            Some(_) | None => 100,
        }
    }

    /// When the stage ends that lasts so long.
    pub(super) fn stage_end(&self, length: Duration) -> Timestamp {
        after(self.status.stage_since.unwrap_or(self.now), length)
    }

    /// When the time is over that something may take to come about.
    pub(super) fn progress_end(&self) -> Timestamp {
        after(self.seen_since(self.status.stage_since.unwrap_or(self.now)), self.spec.progress_deadline)
    }

    /// Since when this replica could have seen what is missing since then: from the beginning of its term at the earliest. While no
    /// controller reached the API server, nothing could come about, and that is no fault of the version.
    pub(super) fn seen_since(&self, since: Timestamp) -> Timestamp {
        self.seen.leading_since.map_or(since, |leading| leading.max(since))
    }

    /// Raises wait: for `spec.suspend` to end, or for somebody to resume this release.
    pub(super) fn frozen(&self) -> bool {
        self.spec.suspend || self.paused()
    }

    /// This release is paused by hand.
    pub(super) fn paused(&self) -> bool {
        let pending = self.status.pending_release.as_ref().map(|pending| pending.revision.as_str());
        let release = self.status.canary_revision.as_deref().or(pending).or(self.template_revision());
        self.status.paused.as_ref().is_some_and(|paused| Some(paused.revision.as_str()) == release)
    }

    /// Why a revision is not released by itself, if that is so.
    pub(super) fn rejected(&self, hash: &str) -> Option<&RejectedRevision> {
        self.status
            .rejected_revisions
            .iter()
            .find(|rejected| rejected.revision == hash && rejected.retried_at.is_none())
    }

    /// Whether a revision has proven itself: the way back to it is fast. One that was rejected since is analysed in full.
    pub(super) fn proven(&self, hash: &str) -> bool {
        self.revision(hash).is_some_and(|revision| revision.promoted)
            && !self.status.rejected_revisions.iter().any(|rejected| rejected.revision == hash)
    }

    /// What forbids the release to go on.
    pub(super) fn problem(&self) -> Option<&'a Problem> {
        let back = self.goes_back();
        // What is asked for serves, or was refused: there is no change that its owner could hold back.
        let unchanged = self.status.stage == Stage::Settled && self.status.phase != Phase::Waiting;
        self.seen.problems.iter().find(|problem| {
            let passed =
                (back && TEMPLATE_PROBLEMS.contains(&problem.reason)) || (unchanged && problem.reason == TARGET_PAUSED);
            !passed
        })
    }

    /// [`Self::problem`], or that the target is not there, which only a way back can do without.
    pub(super) fn hindered(&self) -> Option<Problem> {
        let gone = || (self.seen.template.is_none() && !self.goes_back()).then(|| adopt::target_not_found(self.spec));
        self.problem().cloned().or_else(gone)
    }

    /// A way back by hand is under way, or is what comes next.
    fn goes_back(&self) -> bool {
        self.status.pending_release.as_ref().map_or_else(
            || {
                let plan = self.status.plan.as_ref().filter(|_| self.status.canary_revision.is_some());
                plan.is_some_and(plan::is_manual_rollback)
            },
            |pending| pending.unjudged == plan::ROLLBACK,
        )
    }

    // What is decided.

    /// From now on a revision is not released by itself.
    pub(super) fn reject(&mut self, hash: &str, reason: &str, message: String) {
        self.pardon(hash);
        self.status.rejected_revisions.push(RejectedRevision {
            revision: hash.to_owned(),
            reason: reason.to_owned(),
            message: status::cut(message, 512),
            rejected_at: self.now,
            retried_at: None,
        });
        let surplus = self.status.rejected_revisions.len().saturating_sub(MOST_REJECTED);
        self.status.rejected_revisions.drain(..surplus);
    }

    /// A revision is one like any other again.
    pub(super) fn pardon(&mut self, hash: &str) {
        self.status.rejected_revisions.retain(|rejected| rejected.revision != hash);
    }

    pub(super) fn act(&mut self, action: Action) {
        if !self.actions.contains(&action) {
            self.actions.push(action);
        }
    }

    pub(super) fn tell(&mut self, warning: bool, reason: &'static str, message: String) {
        self.events.push(Event { warning, reason, message });
    }

    pub(super) fn enter(&mut self, stage: Stage) -> Next {
        self.status.stage = stage;
        self.status.stage_since = Some(self.now);
        Next::Again
    }

    pub(super) fn set_phase(&mut self, phase: Phase) {
        if self.status.phase != phase {
            self.status.phase = phase;
            self.status.last_transition_time = Some(self.now);
        }
    }

    /// Says what is waited for, and until when.
    pub(super) fn wait(&mut self, reason: &str, message: String, until: Option<Timestamp>) -> Next {
        if let Some(until) = until {
            self.look_at(until);
        }
        self.status.waiting = Some(Waiting { reason: reason.to_owned(), message: status::cut(message, 1024), until });
        Next::Wait
    }

    /// Waits for a person: the same words go to the conditions.
    pub(super) fn stall(&mut self, problem: Problem) -> Next {
        self.stalled = Some(problem.clone());
        self.wait(problem.reason, problem.message, None)
    }

    /// Waits for the fleet, and says which members lag.
    pub(super) fn wait_for_fleet(&mut self, until: Option<Timestamp>) -> Next {
        let fleet = &self.seen.fleet;
        if fleet.joining {
            return self.wait(
                "FleetJoining",
                "not every member of the fleet has reported to this controller yet".into(),
                until,
            );
        }
        if fleet.members == 0 {
            return self.wait(
                "NoFleet",
                "the fleet has no members: look at its Pods in Sluice's namespace".into(),
                until,
            );
        }
        if let Some(rejected) = &fleet.rejected {
            return self.wait(
                "ConfigurationRejected",
                format!("a member of the fleet rejects the configuration: {rejected}"),
                until,
            );
        }
        let unsendable = self.seen.problems.iter().find(|problem| problem.reason == UNSENDABLE);
        if let Some(problem) = unsendable.filter(|_| fleet.lagging.is_empty()) {
            // Nothing was sent that could be acknowledged.
            return self.wait(problem.reason, problem.message.clone(), until);
        }
        let message = match fleet.lagging.as_slice() {
            [] => "every member of the fleet must acknowledge the traffic that is requested".to_owned(),
            names => format!("these members of the fleet have not acknowledged yet: {}", status::listed(names, 16)),
        };
        self.wait("FleetAcknowledgement", message, until)
    }

    /// Looks again at this time.
    pub(super) fn look_at(&mut self, at: Timestamp) {
        if at > self.now {
            self.again_at = Some(self.again_at.map_or(at, |earlier| earlier.min(at)));
        }
    }

    pub(super) fn set_traffic(&mut self, primary: Backend, canary: Option<&str>, weight: i32) {
        let canary = canary.map(Backend::revision);
        self.status.traffic = Some(Traffic { primary, canary, weight, mirror: 0, matches: None });
    }

    /// Sees to it that a revision has at least so many replicas.
    pub(super) fn at_least(&mut self, hash: &str, replicas: u32) {
        match self.desired(hash) {
            None => self.act(Action::CreateRevision { revision: hash.to_owned(), replicas }),
            Some(has) if has < replicas => self.act(Action::ScaleRevision { revision: hash.to_owned(), replicas }),
            Some(_) => {}
        }
    }

    /// Whether so many Pods of a revision are ready, and available by the Deployment's own measure (minReadySeconds).
    pub(super) fn has_capacity(&self, hash: &str, replicas: u32) -> bool {
        self.revision(hash).is_some_and(|revision| revision.ready >= replicas && revision.available >= replicas)
    }

    /// Why a revision does not come up, in words that can follow "x of y Pods are ready".
    pub(super) fn progress_of(&self, hash: &str, replicas: u32) -> String {
        let revision = self.revision(hash);
        let ready = revision.map_or(0, |revision| revision.ready.min(revision.available));
        let trouble = revision.and_then(|revision| revision.trouble.as_deref());
        let why = trouble.map(|trouble| format!(": {trouble}")).unwrap_or_default();
        format!("{ready} of {replicas} Pods of revision {hash} are available{why}")
    }

    /// Puts a revision among those that will be scaled to 0.
    pub(super) fn retire(&mut self, hash: &str, after_this: Duration) {
        let scale_down_at = after(self.now, after_this);
        self.status.retiring.retain(|retiring| retiring.revision != hash);
        self.status.retiring.push(Retiring { revision: hash.to_owned(), scale_down_at });
        if self.status.retiring.len() > MOST_RETIRING {
            // Without an entry it is scaled down once nobody uses it, as any revision without a role.
            self.status.retiring.sort_by_key(|retiring| retiring.scale_down_at);
            self.status.retiring.remove(0);
        }
    }

    /// Ends whatever was under way. The phase follows from what is asked for: it serves, it was rejected, or it waits.
    pub(super) fn settle(&mut self) -> Next {
        self.status.step = None;
        self.status.canary_revision = None;
        self.status.rejected_revision = None;
        self.status.paused = None;
        let template = self.template_revision().map(ToOwned::to_owned);
        let phase = if self.status.pending_release.is_some() {
            Phase::Waiting
        } else if template.is_none() || template == self.status.primary_revision {
            self.calm_phase()
        } else if template.as_deref().is_some_and(|template| self.rejected(template).is_some()) {
            self.status.rejected_revision = template;
            Phase::Failed
        } else {
            Phase::Waiting
        };
        self.set_phase(phase);
        self.enter(Stage::Settled)
    }

    /// The phase while nothing is under way and nothing was refused.
    pub(super) fn calm_phase(&self) -> Phase {
        if self.status.last_promotion_time.is_some() { Phase::Succeeded } else { Phase::Initialized }
    }
}

/// Whether requests go to a revision, or may by `NAME-canary`.
pub(in crate::delivery) fn mentions(traffic: &Traffic, hash: &str) -> bool {
    traffic.primary.0 == hash || traffic.canary.as_ref().is_some_and(|canary| canary.0 == hash)
}

/// Times in the status are MicroTime: what is compared with them must not be finer.
pub(super) fn micros(time: Timestamp) -> Timestamp {
    Timestamp::from_microsecond(time.as_microsecond()).unwrap_or(time)
}

/// So much later.
pub(super) fn after(time: Timestamp, length: Duration) -> Timestamp {
    SignedDuration::try_from(length).ok().and_then(|length| time.checked_add(length).ok()).unwrap_or(Timestamp::MAX)
}
