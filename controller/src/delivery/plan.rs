//! From the analysis of a Canary to a plan: the list of judged steps that one release carries out. A plan is fixed when the
//! release starts and kept in the status.

use std::time::Duration;

use jiff::Timestamp;
use sluice_crds::{Analysis, FrozenPlan, FrozenStep, InconclusiveAction, Metric, PendingRelease, parse_duration};

use super::machine::Spec;

/// `FrozenPlan::unjudged` of a release that `spec.skipAnalysis` lets through.
pub const SKIP_ANALYSIS: &str = "SkipAnalysis";
/// `FrozenPlan::unjudged` of the way back to a revision that was promoted once.
pub const ROLLBACK: &str = "Rollback";

/// `FrozenPlan::unjudged` of a release that somebody promoted before its analysis was at its end.
pub const MANUAL_PROMOTION: &str = "ManualPromotion";

/// The plan of a release of `revision` in place of `primary` that begins now. `proven`: the revision was promoted before, and not
/// rejected since, so the way back to it is one unjudged move at full capacity. `None` where nothing says how to judge it.
#[must_use]
pub fn compile(spec: &Spec, primary: &str, revision: &str, proven: bool, now: Timestamp) -> Option<FrozenPlan> {
    let unjudged = if proven {
        Some(ROLLBACK)
    } else if spec.skip_analysis {
        Some(SKIP_ANALYSIS)
    } else {
        None
    };
    let steps = match (unjudged, &spec.analysis) {
        (Some(_), _) => Vec::new(),
        (None, Some(analysis)) => steps(analysis),
        (None, None) => return None,
    };
    Some(FrozenPlan {
        revision: revision.to_owned(),
        primary: primary.to_owned(),
        started_at: now,
        unjudged: unjudged.map(ToOwned::to_owned),
        action: None,
        steps,
        analysis: spec.analysis.clone().filter(|_| unjudged.is_none()),
    })
}

/// The plan of a release that somebody asked for by hand: one unjudged move at full capacity.
#[must_use]
pub fn by_hand(pending: &PendingRelease, primary: &str, now: Timestamp) -> FrozenPlan {
    FrozenPlan {
        revision: pending.revision.clone(),
        primary: primary.to_owned(),
        started_at: now,
        unjudged: Some(pending.unjudged.clone()),
        action: Some(pending.action.clone()),
        steps: Vec::new(),
        analysis: None,
    }
}

/// Somebody goes back to an older revision by hand, whatever the target asks for.
#[must_use]
pub fn is_manual_rollback(plan: &FrozenPlan) -> bool {
    plan.action.is_some() && plan.unjudged.as_deref() == Some(ROLLBACK)
}

/// The judged steps of an analysis: `iterations` at weight 0, or with all that matches (A/B testing), or `stepWeights`, or multiples of `stepWeight` with the last one
/// capped at `maxWeight` (100 where it says none), and then, by `stepWeightPromotion`, on to 100. With `mirror` the canary gets copies
/// in all iterations, or in one step at weight 0 before the weights.
#[must_use]
pub fn steps(analysis: &Analysis) -> Vec<FrozenStep> {
    let mirror = if analysis.mirror == Some(true) { analysis.mirror_weight.unwrap_or(100) } else { 0 };
    if let Some(iterations) = analysis.iterations {
        let step = match analysis.matches {
            Some(_) => FrozenStep { weight: 100, mirror: 0 },
            None => FrozenStep { weight: 0, mirror },
        };
        return vec![step; usize::try_from(iterations).unwrap_or_default()];
    }
    let mut weights = match (&analysis.step_weights, analysis.step_weight) {
        (Some(weights), _) => weights.clone(),
        (None, Some(step)) => climb(0, step, analysis.max_weight.unwrap_or(100)),
        (None, None) => Vec::new(),
    };
    if let (Some(promotion), Some(&last)) = (analysis.step_weight_promotion, weights.last()) {
        weights.extend(climb(last, promotion, 100));
    }
    let mirrored = (mirror > 0).then_some(FrozenStep { weight: 0, mirror });
    mirrored.into_iter().chain(weights.into_iter().map(|weight| FrozenStep { weight, mirror: 0 })).collect()
}

/// Percent of all requests that the canary must be able to serve in a step, copies included.
#[must_use]
pub fn load(step: FrozenStep) -> i32 {
    step.weight.max(step.mirror)
}

/// Weights above `from` in steps of `by`, the last one exactly `to`.
fn climb(from: i32, by: i32, to: i32) -> Vec<i32> {
    let mut weights = Vec::new();
    let mut weight = from;
    while weight < to {
        weight = weight.saturating_add(by.max(1)).min(to);
        weights.push(weight);
    }
    weights
}

/// Pods that `weight` percent of the requests need, where all of them need `wish`: rounded up, and at least 1.
#[must_use]
pub fn capacity(wish: u32, weight: i32) -> u32 {
    let weight = u64::from(weight.clamp(0, 100).unsigned_abs());
    let pods = (u64::from(wish) * weight).div_ceil(100).max(1);
    u32::try_from(pods).unwrap_or(u32::MAX)
}

/// The numbers of an analysis, parsed.
#[derive(Clone, Debug, PartialEq)]
pub struct Judgement {
    /// A step lasts at least so long, and failures count at most once in it.
    pub interval: Duration,
    /// Failures at which the release is rolled back.
    pub threshold: i32,
    /// How long a step may be without a conclusive verdict,
    pub inconclusive_after: Duration,
    /// and what happens then.
    pub then: InconclusiveAction,
    /// How long the metrics server may be out of reach.
    pub error_deadline: Duration,
    /// The longest window of a gate: no earlier than this after the acknowledgement can all windows be whole.
    pub window: Duration,
    /// The gates. Without any, a step passes by time.
    pub gates: Vec<Metric>,
}

impl Judgement {
    /// Of a plan that is judged.
    #[must_use]
    pub fn of(plan: &FrozenPlan) -> Option<Self> {
        let analysis = plan.analysis.as_ref()?;
        // Checked by `spec::parse` when the plan was frozen. A status that was edited by hand since is read as carefully as can be.
        let duration = |text: &str| parse_duration(text).unwrap_or(Duration::from_secs(600));
        Some(Self {
            interval: duration(&analysis.interval),
            threshold: analysis.threshold.max(1),
            inconclusive_after: duration(&analysis.inconclusive.after),
            then: analysis.inconclusive.then,
            error_deadline: duration(&analysis.error_deadline),
            window: analysis.metrics.iter().map(|metric| duration(&metric.interval)).max().unwrap_or_default(),
            gates: analysis.metrics.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_crds::Inconclusive;

    fn analysis() -> Analysis {
        Analysis {
            interval: "10s".into(),
            threshold: 1,
            max_weight: None,
            step_weight: None,
            step_weights: None,
            step_weight_promotion: None,
            iterations: None,
            metrics: Vec::new(),
            inconclusive: Inconclusive::default(),
            error_deadline: "10m".into(),
            guard: sluice_crds::Guard::default(),
            matches: None,
            mirror: None,
            mirror_weight: None,
            primary_ready_threshold: None,
            canary_ready_threshold: None,
            session_affinity: None,
            alerts: None,
            webhooks: None,
        }
    }

    fn weights(analysis: &Analysis) -> Vec<i32> {
        steps(analysis).into_iter().map(|step| step.weight).collect()
    }

    #[test]
    fn step_weight_climbs_to_max_weight_and_never_overshoots_it() {
        for (step, max, expected) in [
            (10, Some(50), vec![10, 20, 30, 40, 50]),
            (20, Some(50), vec![20, 40, 50]),
            (50, Some(50), vec![50]),
            (30, None, vec![30, 60, 90, 100]),
            (100, None, vec![100]),
        ] {
            let analysis = Analysis { step_weight: Some(step), max_weight: max, ..analysis() };
            assert_eq!(weights(&analysis), expected, "stepWeight {step}, maxWeight {max:?}");
        }
    }

    #[test]
    fn step_weights_are_taken_as_they_are() {
        let analysis = Analysis { step_weights: Some(vec![1, 5, 40]), ..analysis() };
        assert_eq!(weights(&analysis), [1, 5, 40]);
    }

    #[test]
    fn step_weight_promotion_adds_judged_steps_up_to_one_hundred() {
        let analysis =
            Analysis { step_weight: Some(25), max_weight: Some(50), step_weight_promotion: Some(20), ..analysis() };
        assert_eq!(weights(&analysis), [25, 50, 70, 90, 100]);
    }

    #[test]
    fn step_weight_promotion_adds_nothing_to_a_plan_that_ends_at_one_hundred() {
        let analysis = Analysis { step_weights: Some(vec![50, 100]), step_weight_promotion: Some(10), ..analysis() };
        assert_eq!(weights(&analysis), [50, 100]);
    }

    #[test]
    fn iterations_are_judged_steps_at_weight_zero() {
        let analysis = Analysis { iterations: Some(3), ..analysis() };
        assert_eq!(weights(&analysis), [0, 0, 0]);
    }

    #[test]
    fn a_mirror_comes_before_the_weights_or_in_every_iteration() {
        let mirror = |weight| Analysis { mirror: Some(true), mirror_weight: weight, ..analysis() };
        let pairs = |analysis: &Analysis| -> Vec<(i32, i32)> {
            steps(analysis).into_iter().map(|step| (step.weight, step.mirror)).collect()
        };
        let weighted = Analysis { step_weights: Some(vec![5, 50]), ..mirror(None) };
        assert_eq!(pairs(&weighted), [(0, 100), (5, 0), (50, 0)]);
        assert_eq!(pairs(&Analysis { iterations: Some(2), ..mirror(Some(30)) }), [(0, 30), (0, 30)]);
        assert_eq!(pairs(&Analysis { mirror: Some(false), ..weighted }), [(5, 0), (50, 0)]);
        assert_eq!(load(FrozenStep { weight: 0, mirror: 30 }), 30, "copies need Pods, too");
    }

    #[test]
    fn iterations_with_a_match_are_judged_on_all_that_matches() {
        let matches = Some(vec![sluice_crds::HttpMatch::default()]);
        let analysis = Analysis { iterations: Some(2), matches, ..analysis() };
        assert_eq!(weights(&analysis), [100, 100]);
    }

    #[test]
    fn a_weight_needs_its_share_of_the_pods_rounded_up_and_at_least_one() {
        for (wish, weight, pods) in
            [(10, 5, 1), (10, 11, 2), (10, 100, 10), (3, 0, 1), (3, 34, 2), (0, 100, 1), (100_000, 1, 1000)]
        {
            assert_eq!(capacity(wish, weight), pods, "{weight} % of {wish}");
        }
    }
}
