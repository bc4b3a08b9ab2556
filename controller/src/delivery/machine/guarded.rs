//! The guard's part in a release: what it should watch, and what follows from what it found.

use std::collections::BTreeSet;

use sluice_crds::{FrozenPlan, GuardSide, GuardSignal, GuardStatus};

use super::{
    Next, Run,
    release::{give_up, under_way},
    run::micros,
};
use crate::{
    analysis::Builtin,
    guard::{Latency, ReleaseId, Watch},
};

/// What the guard should watch: a release that is judged, from its start to its promotion, so that members of the fleet count before the
/// first request arrives.
pub(super) fn watch(run: &Run<'_>) -> Option<Watch> {
    if !under_way(run.status.stage) {
        return None;
    }
    // What was promoted by hand is not judged to its end.
    let plan = run.status.plan.as_ref().filter(|plan| plan.unjudged.is_none())?;
    let analysis = plan.analysis.as_ref().filter(|analysis| analysis.guard.enabled)?;
    let gate = |builtin| analysis.metrics.iter().find(|gate| Builtin::of(gate) == Some(builtin));
    let range = |builtin| gate(builtin).and_then(|gate| gate.threshold_range);
    // The guard is for what is flagrant: it never allows less than the gate.
    let allowed = range(Builtin::SuccessRate).and_then(|range| range.min).map_or(0.0, |min| 100.0 - min);
    Some(Watch {
        release: ReleaseId { started_at: plan.started_at, revision: plan.revision.clone() },
        service: run.spec.service.clone(),
        primary: plan.primary.clone(),
        weight: run.weight(),
        weights: weights(plan),
        error_margin: f64::from(analysis.guard.error_margin).max(allowed),
        latency: range(Builtin::Duration)
            .and_then(|range| range.max)
            .map(|max| Latency { slow_above: max, margin: f64::from(analysis.guard.latency_margin) }),
    })
}

/// The weights above 0 that the plan goes through, the promotion included.
fn weights(plan: &FrozenPlan) -> u32 {
    let weights: BTreeSet<i32> =
        plan.steps.iter().map(|step| step.weight).chain([100]).filter(|weight| *weight > 0).collect();
    u32::try_from(weights.len()).unwrap_or(u32::MAX)
}

/// The canary is far worse than the primary, for certain: it is taken back without a failed check being counted, suspended or not.
pub(super) fn breached(run: &mut Run<'_>) -> Option<Next> {
    let watch = watch(run)?;
    let breach = run.seen.breach.clone().filter(|breach| breach.release == watch.release && run.weight() > 0)?;
    let message = in_words(&breach.status);
    run.status.guard =
        Some(GuardStatus { since: micros(breach.status.since), at: micros(breach.status.at), ..breach.status });
    Some(give_up(run, "GuardBreached", message, true))
}

fn in_words(found: &GuardStatus) -> String {
    let seconds = found.at.duration_since(found.since).as_secs_f64();
    let what = match (found.signal, found.slow_above_milliseconds) {
        (GuardSignal::Latency, Some(limit)) => format!("lasted longer than {limit} ms"),
        (GuardSignal::Latency, None) => "were slow".to_owned(),
        (GuardSignal::Errors, _) => "failed".to_owned(),
    };
    let side = |side: &GuardSide| format!("{} of {} ({} %)", side.bad, side.requests, side.percent);
    format!(
        "at {} percent, {} of the canary's requests {what} within {seconds:.1} s, and {} of the primary's; {} points more than the primary's are allowed. A canary within that looks so bad in at most one of {} releases",
        found.weight,
        side(&found.canary),
        side(&found.primary),
        found.margin,
        found.evidence,
    )
}
