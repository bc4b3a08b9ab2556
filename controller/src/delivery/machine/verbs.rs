//! What somebody asks for by the annotation `sluice.dev/action`. A value is handled once: its record, in the same status as
//! all that follows from it, is what makes the same value do nothing when Git applies it again. What makes no sense is
//! refused, and said so; it is not kept for later, when it could mean another release.

use sluice_crds::{ActionOutcome, ActionStatus, PausedRelease, PendingRelease, Phase, Stage, Verb};

use super::{
    Event, Run,
    release::{give_up, judge_anew, under_way},
};
use crate::delivery::{
    plan::{MANUAL_PROMOTION, ROLLBACK},
    status::{self, ABORTED},
    verb,
};

/// What follows, or why nothing does: both in words for the status and the event.
type Answer = Result<String, String>;

/// Handles the annotation, if its value is another one than at the last look. True if the stage is to be looked at anew.
pub(super) fn handle(run: &mut Run<'_>) -> bool {
    let value = run.seen.action.as_deref().map(str::trim).filter(|value| !value.is_empty());
    let Some(said) = value else {
        run.status.action = None;
        return false;
    };
    let value = status::cut(said.to_owned(), verb::MOST);
    if run.status.action.as_ref().is_some_and(|handled| handled.value == value) {
        return false;
    }
    let parsed = verb::parse(said);
    let (verb, revision) = parsed.as_ref().ok().copied().unzip();
    let repeated = run.status.handled_actions.contains(&value);
    if verb.is_some_and(verb::counts_once) && !repeated {
        run.status.handled_actions.push(value.clone());
        let surplus = run.status.handled_actions.len().saturating_sub(verb::REMEMBERED);
        run.status.handled_actions.drain(..surplus);
    }
    // Recorded first: what is suggested in an answer must be another value than this one.
    run.status.action = Some(ActionStatus {
        value: value.clone(),
        verb,
        revision: revision.map(ToOwned::to_owned),
        outcome: ActionOutcome::Refused,
        message: String::new(),
        handled_at: run.now,
        observed_generation: run.spec.generation,
    });
    let told = run.events.len();
    let (outcome, answer) = match parsed {
        Err(unclear) => (ActionOutcome::Refused, unclear.to_string()),
        Ok((verb, revision)) if repeated => {
            let again = command(run, verb, revision);
            (ActionOutcome::Repeated, format!("was handled before, and counts once. To say it again: {again}"))
        }
        Ok((verb, revision)) => match carry_out(run, verb, revision, &value) {
            Ok(follows) => (ActionOutcome::Accepted, follows),
            Err(why) => (ActionOutcome::Refused, why),
        },
    };
    let answer = status::cut(answer, 1024);
    let (warning, reason) = match outcome {
        ActionOutcome::Accepted => (false, "ActionAccepted"),
        ActionOutcome::Refused => (true, "ActionRefused"),
        ActionOutcome::Repeated => (false, "ActionRepeated"),
    };
    // Before what follows from it.
    run.events.insert(told, Event { warning, reason, message: format!("{value}: {answer}") });
    if let Some(handled) = &mut run.status.action {
        (handled.outcome, handled.message) = (outcome, answer);
    }
    outcome == ActionOutcome::Accepted
}

fn carry_out(run: &mut Run<'_>, verb: Verb, revision: &str, value: &str) -> Answer {
    if run.seen.deleting {
        return Err("this Canary is being deleted".into());
    }
    if run.leaving() {
        return Err("Sluice is being uninstalled".into());
    }
    if run.status.primary_revision.is_none() || run.status.phase == Phase::Initializing {
        return Err(format!(
            "Deployment {} is still being taken over: there is no release yet. Say it again when there is, with another note: {value}:2",
            run.spec.target
        ));
    }
    match verb {
        Verb::Promote => promote(run, revision, value),
        Verb::Abort => abort(run, revision),
        Verb::Retry => retry(run, revision),
        Verb::Pause => pause(run, revision),
        Verb::Resume => resume(run, revision),
        Verb::Rollback => rollback(run, revision, value),
    }
}

fn command(run: &Run<'_>, verb: Verb, revision: &str) -> String {
    verb::command(&run.spec.key, &run.status, verb, revision)
}

fn is_canary(run: &Run<'_>, revision: &str) -> bool {
    under_way(run.status.stage) && run.status.canary_revision.as_deref() == Some(revision)
}

/// Whether this revision would be released next, and is not yet.
fn waits(run: &Run<'_>, revision: &str) -> bool {
    let next = run.status.pending_release.as_ref().map(|pending| pending.revision.as_str());
    run.status.stage == Stage::Settled
        && run.status.phase == Phase::Waiting
        && next.or(run.template_revision()) == Some(revision)
}

/// Why a verb does not fit a revision that is not under way.
fn not_present(run: &Run<'_>, revision: &str) -> String {
    if let Some(rejected) = run.rejected(revision) {
        return format!(
            "revision {revision} was rejected ({}). To analyse it again: {}",
            rejected.reason,
            command(run, Verb::Retry, revision)
        );
    }
    let primary = run.status.primary_revision.as_deref().unwrap_or_default();
    if primary == revision {
        return format!("revision {revision} serves already");
    }
    match run.status.canary_revision.as_deref() {
        Some(canary) if canary == revision => format!("revision {revision} is being taken back"),
        Some(canary) => format!("revision {revision} is not under way: that is revision {canary}"),
        None => format!("revision {revision} is not under way; revision {primary} serves"),
    }
}

/// An approval of something unjudged must not lie about until somebody lifts the freeze.
fn not_suspended(run: &Run<'_>, verb: Verb, revision: &str) -> Result<(), String> {
    if !run.spec.suspend {
        return Ok(());
    }
    Err(format!(
        "spec.suspend is true, so that no weight rises. Set it to false, and then: {}",
        command(run, verb, revision)
    ))
}

fn promote(run: &mut Run<'_>, revision: &str, value: &str) -> Answer {
    not_suspended(run, Verb::Promote, revision)?;
    if waits(run, revision) && run.status.pending_release.is_none() {
        run.status.paused = None;
        run.status.pending_release = Some(PendingRelease {
            revision: revision.to_owned(),
            unjudged: MANUAL_PROMOTION.into(),
            action: value.to_owned(),
        });
        return Ok(format!("revision {revision} is released without analysis, at full capacity"));
    }
    if !is_canary(run, revision) {
        return Err(not_present(run, revision));
    }
    match run.status.stage {
        Stage::Scale | Stage::Shift | Stage::Judge | Stage::Paused => {
            if let Some(plan) = &mut run.status.plan {
                plan.unjudged = Some(MANUAL_PROMOTION.into());
                plan.action = Some(value.to_owned());
            }
            run.status.paused = None;
            run.status.step = None;
            run.status.inconclusive_since = None;
            run.status.error_since = None;
            run.set_phase(Phase::Promoting);
            run.enter(Stage::PromoteScale);
            Ok(format!(
                "what is left of the analysis of revision {revision} is skipped: full capacity, then all requests"
            ))
        }
        Stage::PromoteScale if run.status.paused.take().is_some() => {
            Ok(format!("revision {revision} goes on; nothing was left to be judged"))
        }
        Stage::PromoteScale
        | Stage::PromoteShift
        | Stage::AdoptFleet
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
        | Stage::ReturnSettle => Err(format!("revision {revision} is being promoted already")),
    }
}

fn abort(run: &mut Run<'_>, revision: &str) -> Answer {
    let by_hand = "somebody aborted it (sluice.dev/action)".to_owned();
    if run.status.pending_release.as_ref().is_some_and(|pending| pending.revision == revision) {
        let pending = run.status.pending_release.take();
        let manual = pending.is_some_and(|pending| pending.unjudged == MANUAL_PROMOTION);
        if manual {
            run.reject(revision, ABORTED, by_hand);
        }
        if run.status.stage == Stage::Settled {
            run.settle();
        }
        return Ok(format!("the release of revision {revision} is called off before it began"));
    }
    if waits(run, revision) {
        run.reject(revision, ABORTED, by_hand);
        run.settle();
        return Ok(format!("revision {revision} is not released"));
    }
    if is_canary(run, revision) {
        give_up(run, ABORTED, by_hand, true);
        return Ok(format!("revision {revision} goes to weight 0"));
    }
    let mut why = not_present(run, revision);
    if run.status.primary_revision.as_deref() == Some(revision) {
        let kept = kept(run);
        if let Some(newest) = kept.first() {
            why = format!("{why}. To go back: {}", command(run, Verb::Rollback, newest));
        }
    }
    Err(why)
}

fn retry(run: &mut Run<'_>, revision: &str) -> Answer {
    if run.rejected(revision).is_none() {
        let back = run.status.stage == Stage::RollBack && run.status.canary_revision.as_deref() == Some(revision);
        return Err(if back {
            format!(
                "revision {revision} is still being taken back. Once it is, say: {}",
                command(run, Verb::Retry, revision)
            )
        } else {
            format!("{}; only a rejected revision is retried", not_present(run, revision))
        });
    }
    if run.template_revision() != Some(revision) {
        let asks = run.template_revision().unwrap_or_default();
        return Err(format!(
            "Deployment {} asks for revision {asks}. Set its template to that of revision {revision} first, and then: {}",
            run.spec.target,
            command(run, Verb::Retry, revision)
        ));
    }
    if run.status.stage != Stage::Settled || run.status.pending_release.is_some() {
        let going = run.status.canary_revision.clone().or(run.status.primary_revision.clone()).unwrap_or_default();
        return Err(format!(
            "revision {going} is under way. Once it has ended, say: {}",
            command(run, Verb::Retry, revision)
        ));
    }
    let now = run.now;
    for rejected in run.status.rejected_revisions.iter_mut().filter(|rejected| rejected.revision == revision) {
        rejected.retried_at = Some(now);
    }
    run.settle();
    Ok(format!("revision {revision} is analysed again, from the first step"))
}

fn pause(run: &mut Run<'_>, revision: &str) -> Answer {
    if !waits(run, revision) && !is_canary(run, revision) {
        return Err(not_present(run, revision));
    }
    if run.paused() || run.status.stage == Stage::Paused {
        return Err(format!("revision {revision} is paused already"));
    }
    if run.status.stage == Stage::PromoteShift {
        return Err(format!(
            "all requests go to revision {revision} already. To take it back: {}",
            command(run, Verb::Abort, revision)
        ));
    }
    run.status.paused = Some(PausedRelease { revision: revision.to_owned(), since: run.now });
    Ok(format!("revision {revision} stays where it is; what fails is still taken back"))
}

fn resume(run: &mut Run<'_>, revision: &str) -> Answer {
    let mut paused = run.status.paused.take_if(|paused| paused.revision == revision).is_some();
    if run.status.stage == Stage::Paused && is_canary(run, revision) {
        judge_anew(run);
        paused = true;
    }
    if !paused {
        return Err(format!("revision {revision} is not paused"));
    }
    let suspended = if run.spec.suspend { ", once spec.suspend is false" } else { "" };
    Ok(format!("revision {revision} goes on{suspended}"))
}

/// Revisions that one can go back to, the newest first.
fn kept(run: &Run<'_>) -> Vec<String> {
    let primary = run.status.primary_revision.as_deref();
    let mut kept: Vec<_> = run
        .seen
        .revisions
        .iter()
        .filter(|(hash, revision)| revision.promoted && Some(hash.as_str()) != primary)
        .map(|(hash, revision)| (std::cmp::Reverse(revision.number), hash.clone()))
        .collect();
    kept.sort_unstable();
    kept.into_iter().map(|(_, hash)| hash).collect()
}

fn rollback(run: &mut Run<'_>, revision: &str, value: &str) -> Answer {
    not_suspended(run, Verb::Rollback, revision)?;
    if run.status.primary_revision.as_deref() == Some(revision) {
        let under_way = run.status.canary_revision.clone().filter(|canary| is_canary(run, canary));
        let end = under_way.map(|canary| format!(". To end the release: {}", command(run, Verb::Abort, &canary)));
        return Err(format!("revision {revision} serves already{}", end.unwrap_or_default()));
    }
    if !run.revision(revision).is_some_and(|revision| revision.promoted) {
        let kept = kept(run);
        let there = if kept.is_empty() {
            "none is kept".to_owned()
        } else {
            format!("these are kept: {}", status::listed(&kept, 20))
        };
        return Err(format!("revision {revision} is none that was promoted and is kept; {there}"));
    }
    if is_canary(run, revision) {
        let judged = run.status.plan.as_ref().is_some_and(|plan| plan.unjudged.is_none());
        return Err(if judged {
            format!(
                "revision {revision} is under analysis. To skip what is left of it: {}",
                command(run, Verb::Promote, revision)
            )
        } else {
            format!("revision {revision} is on its way already")
        });
    }
    // What the target asks for would be released as soon as the way back has ended. (The revision that serves is rejected only
    // when it no longer does.)
    if let Some(template) = run.template_revision().map(ToOwned::to_owned)
        && template != revision
        && run.status.primary_revision.as_deref() != Some(&template)
    {
        run.reject(&template, ROLLBACK, format!("somebody went back to revision {revision} (sluice.dev/action)"));
    }
    run.status.pending_release =
        Some(PendingRelease { revision: revision.to_owned(), unjudged: ROLLBACK.into(), action: value.to_owned() });
    if under_way(run.status.stage) {
        give_up(run, ROLLBACK, format!("somebody goes back to revision {revision} (sluice.dev/action)"), true);
    } else if run.status.stage == Stage::Settled {
        run.settle();
    }
    Ok(format!("goes back to revision {revision}: full capacity, then all requests"))
}
