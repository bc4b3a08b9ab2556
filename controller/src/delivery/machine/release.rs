//! A release: a changed template goes from weight 0 through judged steps to promotion, or back to weight 0. Capacity first,
//! then weight, then the fleet's acknowledgement, then judgement.

use jiff::Timestamp;
use sluice_crds::{Backend, FrozenPlan, FrozenStep, InconclusiveAction, Phase, Rollback, Stage, Verb, VerdictStatus};

use super::{
    Next, Problem, Run, guarded,
    run::{PAUSED, SUSPENDED, after, mentions, micros},
    verbs,
};
use crate::{
    analysis::{Report, StepId, Task},
    delivery::{
        plan::{self, Judgement},
        status, verb,
    },
};

/// Carries a stage on. `changed`: the target's template is another one than at the last look.
pub(super) fn advance(run: &mut Run<'_>, changed: bool) -> Next {
    if run.status.stage == Stage::Settled && changed {
        template_changed(run);
    }
    if under_way(run.status.stage) {
        resume(run);
        // What lowers the weight comes first, and waits for nothing: neither suspend nor a missing target or fleet.
        let taken_back = lost_endpoints(run)
            .or_else(|| withdrawn(run, changed))
            .or_else(|| guarded::breached(run))
            .or_else(|| failing(run));
        if let Some(next) = taken_back {
            return next;
        }
    }
    if verbs::handle(run) {
        return Next::Again;
    }
    match run.status.stage {
        Stage::Settled => settled(run),
        Stage::Scale => scale(run),
        Stage::Shift => shift(run),
        Stage::Judge => judge(run),
        Stage::PromoteScale => promote_scale(run),
        Stage::PromoteShift => promote_shift(run),
        Stage::Finalise => finalise(run),
        Stage::RollBack => roll_back(run),
        Stage::Paused => paused(run),
        Stage::AdoptFleet
        | Stage::AdoptService
        | Stage::AdoptSettle
        | Stage::AdoptRevision
        | Stage::AdoptSwitch
        | Stage::AdoptRest
        | Stage::ReturnScale
        | Stage::ReturnSwitch
        | Stage::ReturnService
        | Stage::ReturnSettle => Next::Wait,
    }
}

/// A suspension, a pause or what a person had to mend has ended: the stage's deadlines count from now.
fn resume(run: &mut Run<'_>) {
    if run.was_held && !run.frozen() && run.hindered().is_none() {
        run.was_held = false;
        run.status.stage_since = Some(run.now);
        if run.status.stage == Stage::Judge {
            run.status.inconclusive_since = Some(run.now);
        }
    }
}

/// The stages in which a canary can still be taken back.
pub(super) fn under_way(stage: Stage) -> bool {
    match stage {
        Stage::Scale | Stage::Shift | Stage::Judge | Stage::Paused | Stage::PromoteScale | Stage::PromoteShift => true,
        Stage::AdoptFleet
        | Stage::AdoptService
        | Stage::AdoptSettle
        | Stage::AdoptRevision
        | Stage::AdoptSwitch
        | Stage::AdoptRest
        | Stage::Settled
        | Stage::Finalise
        | Stage::RollBack
        | Stage::ReturnScale
        | Stage::ReturnSwitch
        | Stage::ReturnService
        | Stage::ReturnSettle => false,
    }
}

// Before a release.

/// The target's template is another one, while nothing is under way.
fn template_changed(run: &mut Run<'_>) {
    let template = run.template_revision().unwrap_or_default().to_owned();
    let failed = run.status.phase == Phase::Failed;
    run.settle();
    match run.status.phase {
        Phase::Waiting => {
            run.tell(false, "NewRevision", format!("Deployment {} has a new revision: {template}", run.spec.target));
        }
        Phase::Failed => tell_rejected(run),
        Phase::Initializing
        | Phase::Initialized
        | Phase::Progressing
        | Phase::Promoting
        | Phase::Finalising
        | Phase::Succeeded
        | Phase::Terminating
        | Phase::Terminated => {
            run.status.rollback = None;
            if failed {
                let message = format!("Deployment {} is back at revision {template}, which serves", run.spec.target);
                run.tell(false, "Reverted", message);
            }
        }
    }
}

/// The template has come back to a revision that was rejected before.
fn tell_rejected(run: &mut Run<'_>) {
    let Some(message) = status::rejection(&run.status, run.spec) else { return };
    run.tell(true, "RevisionRejected", message);
}

fn settled(run: &mut Run<'_>) -> Next {
    if let Some(problem) = run.hindered() {
        return run.stall(problem);
    }
    let pending = run.status.pending_release.clone();
    let back = pending.as_ref().is_some_and(|pending| pending.unjudged == plan::ROLLBACK);
    if run.status.phase != Phase::Waiting {
        return Next::Wait;
    }
    let asked = pending.as_ref().map(|pending| pending.revision.as_str()).or(run.template_revision());
    let hash = asked.unwrap_or_default().to_owned();
    let hash = hash.as_str();
    if back && run.revision(hash).is_none() {
        run.status.pending_release = None;
        run.tell(true, "RevisionGone", format!("revision {hash}, to go back to, is no longer kept"));
        return run.settle();
    }
    if run.frozen() {
        return frozen(run, format!("revision {hash} is not released"));
    }
    // At rest: all requests go to the primary, and every member says so.
    let at_rest = run.effective().is_some_and(|effective| {
        effective.weight == 0
            && effective.mirror == 0
            && run.status.traffic.as_ref().is_some_and(|traffic| traffic.primary == effective.primary)
    });
    if !at_rest {
        return run.wait_for_fleet(None);
    }
    let primary = run.status.primary_revision.clone().unwrap_or_default();
    if pending.is_none() && run.seen.template.as_ref().is_some_and(|template| template.unread) {
        // It could not be recorded.
        let message = format!("the configuration that Deployment {} uses is read", run.spec.target);
        return run.wait("Configuration", message, None);
    }
    if let Some(pending) = pending {
        return start(run, plan::by_hand(&pending, &primary, run.now));
    }
    let Some(plan) = plan::compile(run.spec, &primary, hash, run.proven(hash), run.now) else {
        let message = format!("Canary {}: spec.analysis: say how revision {hash} is judged", run.spec.key);
        return run.stall(Problem { reason: "InvalidSpec", message });
    };
    if plan.analysis.as_ref().is_some_and(|analysis| !analysis.metrics.is_empty()) {
        match &run.seen.dry_run {
            None => {
                let mut message = "every query is run dry before the first step".to_owned();
                if let Some(why) = &run.seen.dry_run_waits_for {
                    message = format!("{message}: {why}");
                }
                return run.wait("DryRun", message, None);
            }
            Some(bad) if !bad.is_empty() => {
                let metrics: Vec<String> = bad.iter().map(|(metric, why)| format!("{metric}: {why}")).collect();
                let message =
                    format!("revision {hash} is not released, because it could not be judged: {}", metrics.join("; "));
                return run.stall(Problem { reason: "InvalidMetric", message });
            }
            Some(_) => {}
        }
    }
    start(run, plan)
}

/// Waits for the end of a suspension or of a pause by hand, and says which.
fn frozen(run: &mut Run<'_>, what: String) -> Next {
    match run.status.paused.clone().filter(|_| !run.spec.suspend) {
        Some(paused) => {
            let go_on = verb::command(&run.spec.key, &run.status, Verb::Resume, &paused.revision);
            run.wait(PAUSED, format!("{what}: revision {} is paused. To go on: {go_on}", paused.revision), None)
        }
        None => run.wait(SUSPENDED, format!("{what} while spec.suspend is true"), None),
    }
}

fn start(run: &mut Run<'_>, plan: FrozenPlan) -> Next {
    let hash = plan.revision.clone();
    run.status.failed_checks = 0;
    run.status.last_failure_at = None;
    run.status.inconclusive_since = None;
    run.status.error_since = None;
    run.status.acknowledged_at = None;
    run.status.rollback = None;
    run.status.guard = None;
    run.status.rejected_revision = None;
    run.status.pending_release = None;
    run.status.gates.clear();
    run.status.canary_revision = Some(hash.clone());
    // Named at weight 0 already: `NAME-canary` leads to it, and the first step needs only a new weight.
    run.set_traffic(Backend::revision(&plan.primary), Some(&hash), 0);
    if let Some(traffic) = &mut run.status.traffic {
        traffic.matches = plan.analysis.as_ref().and_then(|analysis| analysis.matches.clone());
    }
    run.set_phase(Phase::Progressing);
    let message = match plan.unjudged.as_deref() {
        None => format!("releases revision {hash} in {} judged steps", plan.steps.len()),
        Some(plan::ROLLBACK) => format!("goes back to revision {hash}, which was promoted before, at once"),
        Some(plan::MANUAL_PROMOTION) => format!("releases revision {hash} without judging it: promoted by hand"),
        Some(_) => format!("releases revision {hash} without judging it (spec.skipAnalysis)"),
    };
    run.tell(false, "ReleaseStarted", message);
    if plan.analysis.as_ref().is_some_and(|analysis| analysis.metrics.is_empty()) {
        run.tell(true, "NoGates", "spec.analysis.metrics is empty: steps pass by time and readiness alone".into());
    }
    let judged = !plan.steps.is_empty();
    run.status.plan = Some(plan);
    if judged {
        run.status.step = Some(0);
        run.enter(Stage::Scale)
    } else {
        run.status.step = None;
        run.set_phase(Phase::Promoting);
        run.enter(Stage::PromoteScale)
    }
}

// What ends a release.

/// A canary that takes requests, or copies of them, has no endpoint left: weight 0 at once, whatever else is so.
fn lost_endpoints(run: &mut Run<'_>) -> Option<Next> {
    let hash = run.status.canary_revision.clone()?;
    if (run.weight() == 0 && run.mirror() == 0) || run.ready(&hash) > 0 {
        return None;
    }
    run.status.failed_checks = run.status.failed_checks.saturating_add(1);
    let trouble = run.revision(&hash).and_then(|revision| revision.trouble.as_deref());
    let why = trouble.map(|trouble| format!(": {trouble}")).unwrap_or_default();
    Some(give_up(run, "NoEndpoints", format!("revision {hash} has lost all of its endpoints{why}"), true))
}

/// The template has moved on, or back.
fn withdrawn(run: &mut Run<'_>, changed: bool) -> Option<Next> {
    let canary = run.status.canary_revision.clone()?;
    let template = run.template_revision()?.to_owned();
    if !changed || template == canary {
        return None;
    }
    // Somebody leaves what serves, whatever the target asks for: that comes to its end first, and the newer template is
    // released in place of what was gone back to.
    if run.status.plan.as_ref().is_some_and(plan::is_manual_rollback) {
        return None;
    }
    if run.status.primary_revision.as_deref() == Some(&template) {
        let message = format!("Deployment {} is back at revision {template}, which serves", run.spec.target);
        Some(give_up(run, "Reverted", message, false))
    } else {
        let message = format!("revision {template} came before revision {canary} was promoted");
        Some(give_up(run, "Superseded", message, false))
    }
}

/// Counts a failed check: the first at once, further ones at most once in an interval. Counts while the next step is
/// prepared, too.
fn failing(run: &mut Run<'_>) -> Option<Next> {
    let judgement = run.status.plan.as_ref().and_then(Judgement::of)?;
    let report = report(run)?;
    run.status.gates.clone_from(&report.gates);
    if report.verdict() != VerdictStatus::Fail {
        return None;
    }
    let counts =
        run.status.last_failure_at.is_none_or(|last| report.at > last && report.at >= after(last, judgement.interval));
    if !counts {
        return None;
    }
    run.status.last_failure_at = Some(report.at);
    run.status.failed_checks = run.status.failed_checks.saturating_add(1);
    let failed = run.status.failed_checks;
    let gates = status::summary_of(&report.gates, Some(VerdictStatus::Fail));
    if failed >= judgement.threshold {
        let message = format!("{failed} of at most {} failed checks: {gates}", judgement.threshold);
        return Some(give_up(run, "ThresholdReached", message, true));
    }
    run.tell(true, "GateFailed", format!("failed check {failed} of {}: {gates}", judgement.threshold));
    None
}

/// Requests weight 0; `upkeep` cuts the traffic beside the status until that is acknowledged. `rejected`: the revision was found bad; otherwise its owner has withdrawn it.
pub(super) fn give_up(run: &mut Run<'_>, reason: &'static str, message: String, rejected: bool) -> Next {
    let canary = run.status.canary_revision.clone().unwrap_or_default();
    run.take_back();
    let message = status::cut(message, 2048);
    let verb = if rejected { "rolls back" } else { "takes back" };
    run.tell(rejected, reason, format!("{verb} revision {canary}: {message}"));
    run.status.rollback = Some(Rollback { reason: reason.to_owned(), message, rejected });
    run.status.step = None;
    run.status.paused = None;
    run.status.inconclusive_since = None;
    run.status.error_since = None;
    run.set_phase(Phase::Progressing);
    run.enter(Stage::RollBack)
}

/// Only the claim waits for the fleet; the request is made already.
fn roll_back(run: &mut Run<'_>) -> Next {
    if !run.acknowledged() {
        return run.wait_for_fleet(None);
    }
    let rejected = run.status.rollback.clone().filter(|rollback| rollback.rejected);
    let primary = run.status.primary_revision.clone().unwrap_or_default();
    run.set_traffic(Backend::revision(&primary), None, 0);
    if let Some(canary) = run.status.canary_revision.clone() {
        run.retire(&canary, run.spec.drain);
        if let Some(rollback) = &rejected {
            run.tell(true, "RolledBack", format!("every request goes to revision {primary} again"));
            run.reject(&canary, &rollback.reason, rollback.message.clone());
        } else {
            run.tell(false, "Withdrawn", format!("revision {canary} takes no requests any more"));
        }
    }
    run.settle();
    if rejected.is_none() {
        // What the template has moved on to may have been rejected earlier.
        tell_rejected(run);
    }
    Next::Again
}

// Steps.

/// The plan's step that `status.step` names.
fn present_step(run: &Run<'_>) -> FrozenStep {
    status::step(&run.status).unwrap_or(FrozenStep { weight: 0, mirror: 0 })
}

/// Brings the canary to the capacity that so many percent of the requests need; they come only then.
fn bring_up(run: &mut Run<'_>, load: i32) -> Option<Next> {
    let canary = run.status.canary_revision.clone().unwrap_or_default();
    let pods = plan::capacity(run.rising_wish(), load);
    run.at_least(&canary, pods);
    if run.has_capacity(&canary, pods) {
        return None;
    }
    let message = run.progress_of(&canary, pods);
    if let Some(next) = on_hold(run, message.clone()) {
        return Some(next);
    }
    let deadline = run.progress_end();
    if run.now < deadline {
        return Some(run.wait("Capacity", message, Some(deadline)));
    }
    let seconds = run.spec.progress_deadline.as_secs();
    Some(give_up(run, "ProgressDeadlineExceeded", format!("after {seconds} s {message}"), true))
}

/// Somebody holds the release, or has to mend something first. No deadline ends it meanwhile.
fn on_hold(run: &mut Run<'_>, what: String) -> Option<Next> {
    if run.frozen() {
        return Some(frozen(run, what));
    }
    run.hindered().map(|problem| run.stall(problem))
}

/// What forbids to raise the weight now.
fn held(run: &mut Run<'_>) -> Option<Next> {
    if let Some(next) = on_hold(run, "the weight is not raised".into()) {
        return Some(next);
    }
    if report(run).is_some_and(|report| report.verdict() == VerdictStatus::Fail) {
        return Some(run.wait("GateFails", "the weight is not raised while a gate fails".into(), None));
    }
    (!run.acknowledged()).then(|| run.wait_for_fleet(None))
}

/// The release holds while the primary has too few ready Pods for what it serves now: a PodDisruptionBudget that counts the
/// canary's Pods can let the primary's be evicted. Not for ever: the release may be what mends the primary.
fn primary_is_short(run: &mut Run<'_>) -> Option<Next> {
    let primary = run.status.primary_revision.clone().unwrap_or_default();
    let needs = plan::capacity(run.wish(), run.primary_share());
    let ready = run.ready(&primary);
    let deadline = run.progress_end();
    // With none ready at all nothing is left to protect.
    if ready == 0 || ready >= needs || run.now >= deadline {
        return None;
    }
    Some(run.wait(
        "PrimaryNotReady",
        format!("{ready} of {needs} Pods of the primary, revision {primary}, are ready"),
        Some(deadline),
    ))
}

fn scale(run: &mut Run<'_>) -> Next {
    let FrozenStep { weight, mirror } = present_step(run);
    if let Some(next) =
        bring_up(run, plan::load(FrozenStep { weight, mirror })).or_else(|| held(run)).or_else(|| primary_is_short(run))
    {
        return next;
    }
    if let Some(traffic) = &mut run.status.traffic {
        traffic.weight = weight;
        traffic.mirror = mirror;
    }
    let canary = run.status.canary_revision.clone().unwrap_or_default();
    let progress = status::progress(&run.status);
    run.tell(false, "StepStarted", format!("step {progress}: {} for revision {canary}", share(run)));
    run.enter(Stage::Shift)
}

/// What the canary is to get, in words.
fn share(run: &Run<'_>) -> String {
    let matches = run.status.traffic.as_ref().is_some_and(|traffic| traffic.matches.is_some());
    match (run.weight(), run.mirror(), matches) {
        (_, 1.., true) => format!("copies of {} percent of the requests that match", run.mirror()),
        (_, 1.., false) => format!("copies of {} percent of the requests", run.mirror()),
        (1.., _, true) => format!("{} percent of the requests that match", run.weight()),
        (weight, _, _) => format!("{weight} percent"),
    }
}

/// The fleet's acknowledgement has no deadline of ours (a silent member leaves the fleet by itself), but a configuration that
/// is rejected stays so.
fn await_fleet(run: &mut Run<'_>) -> Option<Next> {
    if run.acknowledged() {
        return None;
    }
    let Some(rejected) = &run.seen.fleet.rejected else { return Some(run.wait_for_fleet(None)) };
    let deadline = run.progress_end();
    if run.now < deadline || run.frozen() {
        return Some(run.wait_for_fleet(Some(deadline)));
    }
    Some(give_up(
        run,
        "ConfigurationRejected",
        format!("a member of the fleet rejects the configuration: {rejected}"),
        true,
    ))
}

fn shift(run: &mut Run<'_>) -> Next {
    if let Some(next) = await_fleet(run) {
        return next;
    }
    run.status.acknowledged_at = Some(run.now);
    run.status.inconclusive_since = None;
    run.status.error_since = None;
    let message = format!("every member of the fleet has acknowledged {}", share(run));
    run.tell(false, "WeightAcknowledged", message);
    run.enter(Stage::Judge)
}

/// The step whose reports count now: the one that is judged, or the last one, while the next is prepared.
fn watched(run: &Run<'_>) -> Option<StepId> {
    // What was promoted by hand is no longer judged: its last steps never were.
    let plan = run.status.plan.as_ref().filter(|plan| plan.analysis.is_some() && plan.unjudged.is_none())?;
    run.status.acknowledged_at?;
    let index = match run.status.stage {
        Stage::Judge | Stage::Paused => run.status.step?,
        Stage::Scale | Stage::Shift => run.status.step?.checked_sub(1).filter(|index| *index >= 0)?,
        Stage::PromoteScale | Stage::PromoteShift => i32::try_from(plan.steps.len()).ok()?.checked_sub(1)?,
        Stage::AdoptFleet
        | Stage::AdoptService
        | Stage::AdoptSettle
        | Stage::AdoptRevision
        | Stage::AdoptSwitch
        | Stage::AdoptRest
        | Stage::Settled
        | Stage::Finalise
        | Stage::RollBack
        | Stage::ReturnScale
        | Stage::ReturnSwitch
        | Stage::ReturnService
        | Stage::ReturnSettle => return None,
    };
    Some(StepId { started_at: plan.started_at, revision: plan.revision.clone(), index })
}

/// The newest report on that step.
fn report(run: &Run<'_>) -> Option<Report> {
    let step = watched(run)?;
    let since = run.status.acknowledged_at?;
    let mut report = run.seen.report.clone()?;
    report.at = micros(report.at);
    (report.step == step && report.at >= since).then_some(report)
}

/// What the analysis should measure.
pub(super) fn task(run: &Run<'_>) -> Option<Task> {
    let step = watched(run)?;
    let plan = run.status.plan.as_ref()?;
    let judgement = Judgement::of(plan).filter(|judgement| !judgement.gates.is_empty())?;
    let FrozenStep { weight, mirror } = *usize::try_from(step.index).ok().and_then(|index| plan.steps.get(index))?;
    Some(Task {
        canary: run.spec.key.clone(),
        service: run.spec.service.clone(),
        target: run.spec.target.clone(),
        primary_revision: plan.primary.clone(),
        canary_revision: plan.revision.clone(),
        gates: judgement.gates,
        metrics_server: run.spec.metrics_server.clone(),
        acknowledged_at: run.status.acknowledged_at?,
        interval: judgement.interval,
        weight,
        mirrored: mirror > 0,
        members: run.seen.fleet.names.clone(),
        step,
    })
}

fn judge(run: &mut Run<'_>) -> Next {
    let Some(judgement) = run.status.plan.as_ref().and_then(Judgement::of) else {
        // Cannot be: an unjudged plan has no steps.
        return give_up(run, "PlanLost", "status.plan has no analysis".into(), true);
    };
    let acknowledged_at = run.status.acknowledged_at.unwrap_or(run.now);
    let end = after(acknowledged_at, judgement.interval);
    let progress = status::progress(&run.status);
    if judgement.gates.is_empty() {
        if run.now < end {
            prepare_next(run, acknowledged_at, end);
            return run.wait("Interval", format!("step {progress} lasts its interval; it has no gates"), Some(end));
        }
        return held(run).unwrap_or_else(|| pass(run));
    }

    // No earlier can there be a verdict on whole windows.
    let earliest = end.max(after(acknowledged_at, judgement.window));
    let report = report(run);
    let verdict = report.as_ref().map(Report::verdict);
    let passes_so_far = report.as_ref().is_some_and(Report::passes_so_far);
    // Since when nothing conclusive has been heard; a report that nothing follows grows stale, too.
    let silent_since = match (&report, verdict) {
        (Some(report), Some(VerdictStatus::Pass | VerdictStatus::Fail)) => {
            run.status.error_since = None;
            run.status.inconclusive_since = run.status.inconclusive_since.filter(|since| *since > report.at);
            earliest.max(run.status.inconclusive_since.unwrap_or(report.at))
        }
        (Some(report), Some(VerdictStatus::Inconclusive)) => {
            run.status.error_since = None;
            if passes_so_far {
                // Windows begin anew with each member of the fleet that joins, which may be after any of them could have been whole.
                run.status.inconclusive_since = None;
                earliest.max(report.at)
            } else if report.whole || report.at >= earliest {
                *run.status.inconclusive_since.get_or_insert(report.at)
            } else {
                run.status.inconclusive_since.unwrap_or(earliest)
            }
        }
        (Some(report), Some(VerdictStatus::Error)) => {
            let since = *run.status.error_since.get_or_insert(report.at);
            return out_of_reach(run, &judgement, run.seen_since(since));
        }
        (None, _) | (_, None) => {
            // Not since it was due: who leads now may have forgotten what was heard meanwhile.
            if run.now >= earliest {
                *run.status.inconclusive_since.get_or_insert(run.now)
            } else {
                run.look_at(earliest);
                earliest
            }
        }
    };
    if run.frozen() {
        // Its clocks start anew when it goes on.
        run.status.inconclusive_since = None;
        return frozen(run, format!("step {progress} does not end"));
    }
    if verdict == Some(VerdictStatus::Pass) && run.now >= end && report.is_some_and(|report| report.at >= end) {
        return held(run).unwrap_or_else(|| pass(run));
    }
    if passes_so_far {
        prepare_next(run, acknowledged_at, earliest);
    }
    let deadline = after(run.seen_since(silent_since), judgement.inconclusive_after);
    if run.now >= deadline {
        return inconclusive(run, &judgement);
    }
    let (reason, message) = match verdict {
        Some(VerdictStatus::Fail) => {
            let (failed, threshold) = (run.status.failed_checks, judgement.threshold);
            (
                "GateFails",
                format!("step {progress} fails ({failed} of {threshold} failed checks); it goes on once it passes"),
            )
        }
        Some(VerdictStatus::Inconclusive) if run.status.inconclusive_since.is_some() => {
            ("Samples", format!("step {progress} has too few samples for a verdict"))
        }
        Some(VerdictStatus::Pass | VerdictStatus::Inconclusive | VerdictStatus::Error) | None => {
            run.look_at(end);
            ("Verdict", format!("step {progress} is judged over its interval"))
        }
    };
    run.wait(reason, message, Some(deadline))
}

/// Starts the Pods of the next step in the second half of one that passes so far: they come up while it is judged, and a
/// version that is found bad in the first half costs none of them.
fn prepare_next(run: &mut Run<'_>, begun: Timestamp, end: Timestamp) {
    let half = after(begun, end.duration_since(begun).unsigned_abs() / 2);
    if run.now < half {
        return run.look_at(half);
    }
    if run.frozen() || run.problem().is_some() {
        return;
    }
    let steps = run.status.plan.as_ref().map(|plan| plan.steps.as_slice()).unwrap_or_default();
    let next = run.status.step.and_then(|index| usize::try_from(index).ok()).and_then(|index| steps.get(index + 1));
    let pods = plan::capacity(run.rising_wish(), next.map_or(100, |step| plan::load(*step)));
    let canary = run.status.canary_revision.clone().unwrap_or_default();
    run.at_least(&canary, pods);
}

/// The metrics server cannot be asked: that is no bad canary, but it is no good one either.
fn out_of_reach(run: &mut Run<'_>, judgement: &Judgement, since: Timestamp) -> Next {
    let gates = status::summary_of(&run.status.gates, Some(VerdictStatus::Error));
    if run.frozen() {
        run.status.error_since = None;
        return frozen(run, format!("the metrics server cannot be asked ({gates})"));
    }
    let deadline = after(since, judgement.error_deadline);
    if run.now < deadline {
        return run.wait("MetricsUnavailable", format!("the metrics server cannot be asked: {gates}"), Some(deadline));
    }
    let seconds = judgement.error_deadline.as_secs();
    give_up(run, "MetricsUnavailable", format!("the metrics server could not be asked for {seconds} s: {gates}"), true)
}

fn inconclusive(run: &mut Run<'_>, judgement: &Judgement) -> Next {
    let seconds = judgement.inconclusive_after.as_secs();
    let gates = status::summary_of(&run.status.gates, Some(VerdictStatus::Inconclusive));
    let gates = if gates.is_empty() { "no measurement came".to_owned() } else { gates };
    let message = format!("no conclusive verdict for {seconds} s: {gates}");
    match judgement.then {
        InconclusiveAction::Rollback => give_up(run, "Inconclusive", message, true),
        InconclusiveAction::Pause => {
            run.tell(true, PAUSED, message);
            run.enter(Stage::Paused)
        }
    }
}

/// Stays at its weight until somebody decides. Failures still count, by `failing`.
fn paused(run: &mut Run<'_>) -> Next {
    if run.spec.suspend {
        // Somebody is here. The step is judged anew when the suspension ends.
        return judge_anew(run);
    }
    let canary = run.status.canary_revision.clone().unwrap_or_default();
    let command = |verb| verb::command(&run.spec.key, &run.status, verb, &canary);
    let message = format!(
        "there was no conclusive verdict for too long, and spec.analysis.inconclusive says Pause at {}. To judge the step anew: {}. To go back: {}",
        share(run),
        command(Verb::Resume),
        command(Verb::Abort),
    );
    run.stall(Problem { reason: PAUSED, message })
}

/// The step is judged as if its weight had been acknowledged just now.
pub(super) fn judge_anew(run: &mut Run<'_>) -> Next {
    run.status.inconclusive_since = None;
    run.status.acknowledged_at = Some(run.now);
    run.enter(Stage::Judge)
}

/// One verdict, one step.
fn pass(run: &mut Run<'_>) -> Next {
    let progress = status::progress(&run.status);
    let gates = status::summary_of(&run.status.gates, None);
    let by = if gates.is_empty() { "by time".to_owned() } else { gates };
    run.tell(false, "StepPassed", format!("step {progress} passed: {by}"));
    let steps = run.status.plan.as_ref().map_or(0, |plan| plan.steps.len());
    let next = run.status.step.and_then(|index| index.checked_add(1)).unwrap_or(i32::MAX);
    run.status.inconclusive_since = None;
    run.status.error_since = None;
    if usize::try_from(next).is_ok_and(|next| next < steps) {
        run.status.step = Some(next);
        run.enter(Stage::Scale)
    } else {
        run.status.step = None;
        run.set_phase(Phase::Promoting);
        run.enter(Stage::PromoteScale)
    }
}

// Promotion.

fn promote_scale(run: &mut Run<'_>) -> Next {
    if let Some(next) = bring_up(run, 100).or_else(|| held(run)) {
        return next;
    }
    if let Some(traffic) = &mut run.status.traffic {
        traffic.weight = 100;
        traffic.mirror = 0;
        traffic.matches = None;
    }
    run.enter(Stage::PromoteShift)
}

fn promote_shift(run: &mut Run<'_>) -> Next {
    if let Some(next) = await_fleet(run) {
        return next;
    }
    // The same Pods, and no request goes elsewhere: only the names of the roles change.
    let Some(canary) = run.status.canary_revision.take() else {
        return give_up(run, "PlanLost", "status.canaryRevision is missing".into(), true);
    };
    run.set_traffic(Backend::revision(&canary), None, 0);
    run.pardon(&canary);
    if let Some(plan) = run.status.plan.clone().filter(plan::is_manual_rollback) {
        // What somebody left by hand does not come back by itself, be it what the target asks for.
        run.reject(
            &plan.primary,
            plan::ROLLBACK,
            format!("somebody went back to revision {canary} (sluice.dev/action)"),
        );
    }
    run.status.primary_revision = Some(canary);
    run.set_phase(Phase::Finalising);
    run.enter(Stage::Finalise)
}

fn finalise(run: &mut Run<'_>) -> Next {
    if !run.acknowledged() {
        return run.wait_for_fleet(None);
    }
    let primary = run.status.primary_revision.clone().unwrap_or_default();
    let old = run.status.plan.as_ref().map(|plan| plan.primary.clone());
    if let Some(old) = old.filter(|old| !run.status.traffic.as_ref().is_some_and(|traffic| mentions(traffic, old))) {
        run.retire(&old, run.spec.scale_down_delay);
    }
    run.status.last_promotion_time = Some(run.now);
    let unjudged = run.status.plan.as_ref().and_then(|plan| plan.unjudged.as_deref());
    let unjudged = unjudged.map(|reason| format!(", unjudged ({reason})")).unwrap_or_default();
    run.tell(false, "Promoted", format!("revision {primary} serves{unjudged}"));
    run.settle();
    // Gone back by hand: what the target asks for waits for somebody.
    tell_rejected(run);
    Next::Again
}
