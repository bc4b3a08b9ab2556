//! What must hold of every outcome, whatever was seen. Checked in debug builds after each call, and by the property tests.

use sluice_crds::{CanaryStatus, Phase, RejectedRevision, Stage, Traffic};

use super::{Action, Observation, Outcome, run::mentions};
use crate::delivery::plan::{MANUAL_PROMOTION, ROLLBACK, is_manual_rollback};

/// Panics, in debug builds, on an outcome that no rule allows.
pub(super) fn check(before: &CanaryStatus, outcome: &Outcome, seen: &Observation) {
    if cfg!(debug_assertions)
        && let Err(broken) = holds(before, outcome, seen)
    {
        debug_assert!(false, "{broken}; before: {before:#?}; seen: {seen:#?}; outcome: {outcome:#?}");
    }
}

fn require(holds: bool, rule: &'static str) -> Result<(), &'static str> {
    if holds { Ok(()) } else { Err(rule) }
}

/// # Errors
/// Names the first rule that is broken.
pub(super) fn holds(before: &CanaryStatus, outcome: &Outcome, seen: &Observation) -> Result<(), &'static str> {
    let after = &outcome.status;
    let weight = |status: &CanaryStatus| status.traffic.as_ref().map_or(0, |traffic| traffic.weight);
    let (from, to) = (weight(before), weight(after));
    let mirror = |status: &CanaryStatus| status.traffic.as_ref().map_or(0, |traffic| traffic.mirror);
    let copies = mirror(after);
    let effective = if seen.fleet.joining { None } else { seen.fleet.effective.as_ref() };

    require((0..=100).contains(&to), "a weight lies within 0 and 100")?;
    require(
        after.traffic.as_ref().is_none_or(|traffic| traffic.weight == 0 || traffic.canary.is_some()),
        "only a named revision has a weight",
    )?;
    require((0..=100).contains(&copies), "a mirror lies within 0 and 100")?;
    require(
        copies == 0 || (to == 0 && after.traffic.as_ref().is_some_and(|traffic| traffic.canary.is_some())),
        "copies go to a named revision that gets no requests",
    )?;
    let stays = after.stage == Stage::PromoteScale || crate::delivery::status::step(after).is_some();
    require(copies == 0 || stays, "copies end with the last step")?;
    let matching = |status: &CanaryStatus| status.traffic.as_ref().is_some_and(|traffic| traffic.matches.is_some());
    // Requests that did not match may reach it from now on.
    let widened = to.max(copies) > 0 && matching(before) && !matching(after);
    if to > from || copies > mirror(before) || widened {
        let canary = after.canary_revision.as_deref().unwrap_or_default();
        require(
            seen.revisions.get(canary).is_some_and(|revision| revision.ready > 0),
            "no weight without ready endpoints",
        )?;
        require(
            effective.is_some() && effective == before.traffic.as_ref(),
            "no raise before the last weight is acknowledged",
        )?;
        let plan = after.plan.as_ref().ok_or("no weight without a plan")?;
        require(plan.revision == canary, "the plan is for the revision that it raises")?;
        let next = match after.stage {
            Stage::Shift => {
                let index =
                    after.step.and_then(|index| usize::try_from(index).ok()).ok_or("a raise belongs to a step")?;
                require(
                    after.step.unwrap_or_default() <= before.step.unwrap_or_default() + 1,
                    "at most one step at a time",
                )?;
                plan.steps.get(index).map(|step| (step.weight, step.mirror))
            }
            // Only after the last step, or without any, or by hand.
            Stage::PromoteShift => {
                let last = i32::try_from(plan.steps.len()).unwrap_or(i32::MAX).saturating_sub(1);
                let passed =
                    before.phase == Phase::Promoting || (before.stage == Stage::Judge && before.step == Some(last));
                require(passed || plan.unjudged.is_some(), "all requests only after the last step")?;
                Some((100, 0))
            }
            Stage::AdoptFleet
            | Stage::AdoptService
            | Stage::AdoptSettle
            | Stage::AdoptRevision
            | Stage::AdoptSwitch
            | Stage::AdoptRest
            | Stage::Settled
            | Stage::Scale
            | Stage::Judge
            | Stage::PromoteScale
            | Stage::Finalise
            | Stage::RollBack
            | Stage::Paused
            | Stage::ReturnScale
            | Stage::ReturnSwitch
            | Stage::ReturnService
            | Stage::ReturnSettle => None,
        };
        require(next == Some((to, copies)), "weight and mirror are raised to what the plan says")?;
    }
    unjudged(before, after, seen)?;
    match (&before.primary_revision, &after.primary_revision) {
        (Some(_), None) => {
            let serves = before.traffic.as_ref().is_none_or(|traffic| traffic.primary.is_original());
            require(serves || seen.template.is_none(), "the target serves by itself before it is let go")?;
        }
        (Some(old), Some(new)) if old != new => {
            require(
                after.plan.as_ref().is_some_and(|plan| plan.revision == *new),
                "what is promoted is what was judged",
            )?;
            let everything = |traffic: &Traffic| traffic.weight == 100 && traffic.matches.is_none();
            require(effective.is_some_and(everything), "roles are swapped at 100 percent of all requests")?;
        }
        _ => {}
    }
    for action in &outcome.actions {
        allowed(action, outcome, seen)?;
    }
    Ok(())
}

/// What is not judged has a reason: it was promoted before, somebody said so, or the spec does. What was rejected waits for
/// somebody.
fn unjudged(before: &CanaryStatus, after: &CanaryStatus, seen: &Observation) -> Result<(), &'static str> {
    let Some(plan) = &after.plan else { return Ok(()) };
    let known =
        before.plan.as_ref().filter(|known| known.started_at == plan.started_at && known.revision == plan.revision);
    let by_hand = |verb: &str| {
        let action = plan.action.as_deref().unwrap_or_default();
        let named = action.split(':').map(str::trim).take(2).eq([verb, plan.revision.as_str()]);
        named && after.handled_actions.iter().any(|handled| handled == action)
    };
    match known {
        Some(known) => {
            require(known.steps == plan.steps, "a plan is fixed when its release starts")?;
            require(
                known.unjudged == plan.unjudged
                    || (plan.unjudged.as_deref() == Some(MANUAL_PROMOTION) && by_hand("promote")),
                "only by hand is the rest of an analysis skipped",
            )
        }
        None => {
            match plan.unjudged.as_deref() {
                None => require(!plan.steps.is_empty(), "a judged release has steps")?,
                Some(ROLLBACK) => {
                    let kept = seen.revisions.get(&plan.revision).is_some_and(|revision| revision.promoted);
                    require(kept, "the way back is to what was promoted before")?;
                    require(plan.action.is_none() || by_hand("rollback"), "a way back by hand was asked for")?;
                }
                Some(MANUAL_PROMOTION) => require(by_hand("promote"), "somebody promotes what is not judged")?,
                Some(_) => {}
            }
            let waits =
                |rejected: &RejectedRevision| rejected.revision == plan.revision && rejected.retried_at.is_none();
            let rejected = after.rejected_revisions.iter().any(waits);
            require(!rejected || is_manual_rollback(plan), "what was rejected is started by retry alone")
        }
    }
}

fn allowed(action: &Action, outcome: &Outcome, seen: &Observation) -> Result<(), &'static str> {
    let after = &outcome.status;
    let effective = if seen.fleet.joining { None } else { seen.fleet.effective.as_ref() };
    match action {
        Action::ScaleRevision { revision, replicas } => {
            let has = seen.revisions.get(revision).and_then(|revision| revision.desired).unwrap_or_default();
            // At hand-back the target's own Pods serve; without a member, or a Service, nobody goes through the fleet.
            let returned = after.stage == Stage::ReturnService;
            let nobody = returned && (seen.fleet.is_gone() || !seen.service.any_exists);
            if *replicas < has && !nobody {
                require(effective.is_some(), "nothing is scaled down while the fleet is unknown")?;
                if after.primary_revision.as_ref() == Some(revision) {
                    require(
                        after.stage == Stage::Settled || returned,
                        "the primary keeps its capacity during a release",
                    )?;
                    require(effective == after.traffic.as_ref(), "the primary shrinks only in acknowledged traffic")?;
                } else {
                    require(
                        effective.is_some_and(|effective| !mentions(effective, revision)),
                        "only what has no traffic is scaled down",
                    )?;
                    require(
                        after.traffic.as_ref().is_none_or(|traffic| !mentions(traffic, revision)),
                        "only what is asked to have no traffic is scaled down",
                    )?;
                }
            }
            Ok(())
        }
        Action::DeleteRevision { revision } => {
            require(
                effective.is_some_and(|effective| !mentions(effective, revision)),
                "only what has no traffic is deleted",
            )?;
            require(
                after.traffic.as_ref().is_none_or(|traffic| !mentions(traffic, revision)),
                "what has traffic is kept",
            )
        }
        Action::RestTemplate { .. } => require(
            after.traffic.as_ref().is_some_and(|traffic| !traffic.primary.is_original())
                && after.primary_revision.is_some(),
            "the target rests only once a revision serves",
        ),
        Action::SetKey(true) => {
            require(after.service.is_some(), "the status names the Service before the key is written")?;
            require(seen.service.slices, "the fleet's endpoints are there before the key")
        }
        Action::SetKey(false) => {
            require(after.service.is_none(), "the status lets the Service go before the key is removed")
        }
        Action::CutTraffic => {
            let nothing = |traffic: &Traffic| traffic.weight == 0 && traffic.mirror == 0;
            require(after.traffic.as_ref().is_none_or(nothing), "what is cut is written as 0")
        }
        Action::Release => require(
            seen.deleting || after.phase == Phase::Terminated,
            "only what is handed back or deleted is released",
        ),
        Action::WakeTemplate { .. } => require(
            after.template.as_ref().is_none_or(|template| template.name.is_empty()),
            "the status lets the target go before it is woken",
        ),
        Action::AddFinalizer
        | Action::EnsureServices
        | Action::CreateRevision { .. }
        | Action::MarkPromoted { .. }
        | Action::FollowAutoscaler
        | Action::EndAutoscaling
        | Action::SetReplicas { .. } => Ok(()),
    }
}
