//! From a Canary as the API server returns it to the [`Spec`] that the machine reads. The schema's rules refuse most of this
//! already; here are the ones that hold whatever schema the object came through, and those that a schema cannot say.

use std::time::Duration;

use sluice_crds::{Analysis, Canary, CanarySpec, parse_duration};

use super::machine::{Problem, Spec};
use crate::cache::CanaryKey;

/// Why a Canary cannot be meant as it is written. Names the object and the field, and says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    #[error(
        "Canary {canary}: {field}: {text:?} is not a duration: write a number and a unit, such as 30s, 1m30s or 2h"
    )]
    Duration { canary: CanaryKey, field: String, text: String },
    #[error("Canary {canary}: {field} is {value}: say a value from {least} to {most}")]
    Range { canary: CanaryKey, field: String, value: i64, least: i64, most: i64 },
    #[error("Canary {canary}: {field}: {advice}")]
    Meaning { canary: CanaryKey, field: String, advice: &'static str },
}

/// A Canary that cannot be meant as it is written. No release starts and nothing is taken over; going back and handing back still work.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{error}")]
pub struct Refused {
    pub error: SpecError,
    /// What could be read: enough to roll back and to hand back. Without an analysis.
    pub spec: Box<Spec>,
}

impl Refused {
    /// For `Observation::problems`, beside the spec that could be read.
    #[must_use]
    pub fn problem(&self) -> Problem {
        Problem { reason: "InvalidSpec", message: self.error.to_string() }
    }
}

/// Reads a Canary. `settle` is the controller's floor of time for kube-proxy.
///
/// # Errors
/// On the first field that cannot be meant as it is written.
pub fn parse(canary: &Canary, settle: Duration) -> Result<Spec, Refused> {
    let key = CanaryKey::of(canary);
    let written = &canary.spec;
    let mut spec = Spec {
        generation: canary.metadata.generation.unwrap_or_default(),
        target: written.target_ref.name.clone(),
        service: written.service_name().to_owned(),
        additional: written.additional_services().map(str::to_owned).collect(),
        analysis: None,
        skip_analysis: written.skip_analysis,
        suspend: written.suspend,
        replicas: written.replicas.and_then(|replicas| u32::try_from(replicas).ok()),
        progress_deadline: seconds(written.progress_deadline_seconds),
        scale_down_delay: seconds(written.scale_down_delay_seconds),
        drain: seconds(written.drain_seconds),
        revision_history_limit: usize::try_from(written.revision_history_limit).unwrap_or_default(),
        metrics_server: written.metrics_server.clone(),
        settle,
        key,
    };
    let found = check(&spec.key, written);
    match found {
        Ok(()) => {
            spec.analysis = written.analysis.clone();
            Ok(spec)
        }
        Err(error) => Err(Refused { error, spec: Box::new(spec) }),
    }
}

/// Negative ones are refused by `check`.
fn seconds(value: i32) -> Duration {
    Duration::from_secs(u64::try_from(value).unwrap_or_default())
}

/// Checks with the Canary's name for the message.
struct Check<'a> {
    canary: &'a CanaryKey,
}

impl Check<'_> {
    fn range(&self, field: &str, value: impl Into<i64>, least: i64, most: i64) -> Result<(), SpecError> {
        let value = value.into();
        if (least..=most).contains(&value) {
            return Ok(());
        }
        Err(SpecError::Range { canary: self.canary.clone(), field: field.to_owned(), value, least, most })
    }

    fn duration(&self, field: &str, text: &str) -> Result<Duration, SpecError> {
        parse_duration(text).map_err(|_| SpecError::Duration {
            canary: self.canary.clone(),
            field: field.to_owned(),
            text: text.to_owned(),
        })
    }

    /// A duration of which there must be some.
    fn positive(&self, field: &str, text: &str) -> Result<(), SpecError> {
        let duration = self.duration(field, text)?;
        self.require(!duration.is_zero(), field, "must be longer than 0s")
    }

    fn require(&self, holds: bool, field: &str, advice: &'static str) -> Result<(), SpecError> {
        if holds {
            return Ok(());
        }
        Err(SpecError::Meaning { canary: self.canary.clone(), field: field.to_owned(), advice })
    }
}

fn check(canary: &CanaryKey, spec: &CanarySpec) -> Result<(), SpecError> {
    let check = Check { canary };
    check.require(
        canary.name.len() <= 52,
        "metadata.name",
        "use at most 52 characters, so that the names made from it fit in 63",
    )?;
    let target = &spec.target_ref;
    check.require(
        target.kind == "Deployment" && target.api_version.as_deref().is_none_or(|version| version == "apps/v1"),
        "spec.targetRef",
        "name a Deployment of apps/v1: this version releases nothing else",
    )?;
    check.require(!target.name.is_empty(), "spec.targetRef.name", "name the Deployment")?;
    check.range("spec.service.port", spec.service.port, 1, 65_535)?;
    if let Some(timeout) = &spec.service.timeout {
        check.positive("spec.service.timeout", timeout)?;
    }
    if let Some(timeout) = spec.service.retries.as_ref().and_then(|retries| retries.per_try_timeout.as_ref()) {
        check.positive("spec.service.retries.perTryTimeout", timeout)?;
    }
    let delay = spec.service.fault.as_ref().and_then(|fault| fault.delay.as_ref());
    if let Some(delay) = delay.and_then(|delay| delay.fixed_delay.as_ref()) {
        check.positive("spec.service.fault.delay.fixedDelay", delay)?;
    }
    if let Some(replicas) = spec.replicas {
        check.range("spec.replicas", replicas, 0, 100_000)?;
    }
    check.range("spec.progressDeadlineSeconds", spec.progress_deadline_seconds, 1, 86_400)?;
    check.range("spec.scaleDownDelaySeconds", spec.scale_down_delay_seconds, 0, 86_400)?;
    check.range("spec.drainSeconds", spec.drain_seconds, 0, 3_600)?;
    check.range("spec.revisionHistoryLimit", spec.revision_history_limit, 0, 20)?;
    check.require(
        spec.analysis.is_some() || spec.skip_analysis,
        "spec.analysis",
        "say how a release is judged, or spec.skipAnalysis: true",
    )?;
    spec.analysis.as_ref().map_or(Ok(()), |analysis| check_analysis(&check, analysis))
}

fn check_analysis(check: &Check<'_>, analysis: &Analysis) -> Result<(), SpecError> {
    check.positive("spec.analysis.interval", &analysis.interval)?;
    check.range("spec.analysis.threshold", analysis.threshold, 1, 1_000)?;
    check.positive("spec.analysis.inconclusive.after", &analysis.inconclusive.after)?;
    check.positive("spec.analysis.errorDeadline", &analysis.error_deadline)?;

    let strategies = [analysis.step_weight.is_some(), analysis.step_weights.is_some(), analysis.iterations.is_some()];
    check.require(
        strategies.iter().filter(|said| **said).count() == 1,
        "spec.analysis",
        "say exactly one of stepWeight, stepWeights and iterations",
    )?;
    for (field, value, most) in [
        ("spec.analysis.stepWeight", analysis.step_weight, 100),
        ("spec.analysis.maxWeight", analysis.max_weight, 100),
        ("spec.analysis.stepWeightPromotion", analysis.step_weight_promotion, 100),
        ("spec.analysis.iterations", analysis.iterations, 1_000),
        ("spec.analysis.mirrorWeight", analysis.mirror_weight, 100),
    ] {
        if let Some(value) = value {
            check.range(field, value, 1, most)?;
        }
    }
    if let Some(weights) = &analysis.step_weights {
        check.require(!weights.is_empty(), "spec.analysis.stepWeights", "say at least one weight")?;
        for weight in weights {
            check.range("spec.analysis.stepWeights", *weight, 1, 100)?;
        }
        check.require(weights.is_sorted_by(|low, high| low < high), "spec.analysis.stepWeights", "must ascend")?;
        check.require(
            analysis.max_weight.is_none(),
            "spec.analysis.maxWeight",
            "remove it: the last of stepWeights is the maximum",
        )?;
    }
    if let (Some(step), Some(max)) = (analysis.step_weight, analysis.max_weight) {
        check.require(
            step <= max,
            "spec.analysis.stepWeight",
            "is larger than maxWeight, so the first step would overshoot: make it smaller",
        )?;
    }
    check.require(
        analysis.iterations.is_none() || (analysis.max_weight.is_none() && analysis.step_weight_promotion.is_none()),
        "spec.analysis.iterations",
        "blue/green moves all traffic at once: remove maxWeight and stepWeightPromotion",
    )?;
    check.require(
        analysis.mirror != Some(true) || analysis.matches.is_none() || analysis.iterations.is_none(),
        "spec.analysis.mirror",
        "remove it: in A/B testing all requests that match go to the canary itself",
    )?;
    for metric in &analysis.metrics {
        check.positive(&format!("spec.analysis.metrics[{}].interval", metric.name), &metric.interval)?;
        check.require(
            metric.threshold_range.is_some_and(|range| range.min.is_some() || range.max.is_some()),
            &format!("spec.analysis.metrics[{}].thresholdRange", metric.name),
            "say min, max or both: without a range nothing could fail",
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::{Value, json};

    fn canary(patch: impl FnOnce(&mut Value)) -> Canary {
        let mut object = json!({
            "apiVersion": "sluice.dev/v1beta1",
            "kind": "Canary",
            "metadata": {"name": "podinfo", "namespace": "test", "generation": 3},
            "spec": {
                "targetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "podinfo"},
                "service": {"port": 9898},
                "analysis": {
                    "interval": "30s", "threshold": 2, "stepWeight": 10, "maxWeight": 50,
                    "metrics": [{"name": "request-success-rate", "thresholdRange": {"min": 99}}],
                },
            },
        });
        patch(&mut object);
        serde_json::from_value(object).unwrap()
    }

    fn refusal(patch: impl FnOnce(&mut Value)) -> String {
        parse(&canary(patch), Duration::ZERO).unwrap_err().to_string()
    }

    #[test]
    fn a_canary_as_flaggers_docs_write_it_is_understood() {
        let spec = parse(&canary(|_| ()), Duration::from_secs(10)).unwrap();
        assert_eq!(spec.key, CanaryKey::new("test", "podinfo"));
        assert_eq!((spec.target.as_str(), spec.service.as_str(), spec.generation), ("podinfo", "podinfo", 3));
        assert_eq!(spec.progress_deadline, Duration::from_secs(600));
        assert_eq!(spec.scale_down_delay, Duration::from_secs(300));
        assert_eq!(spec.drain, Duration::from_secs(30));
        assert_eq!(spec.replicas, None);
        assert!(spec.analysis.is_some());
    }

    #[test]
    fn each_refusal_names_the_canary_the_field_and_what_to_do() {
        type Patch = fn(&mut Value);
        let table: &[(Patch, &str, &str)] = &[
            (|o| o["spec"]["analysis"]["interval"] = json!("often"), "spec.analysis.interval", "30s"),
            (|o| o["spec"]["analysis"]["interval"] = json!("0s"), "spec.analysis.interval", "longer than 0s"),
            (|o| o["spec"]["analysis"]["errorDeadline"] = json!("1d"), "spec.analysis.errorDeadline", "30s"),
            (|o| o["spec"]["analysis"]["iterations"] = json!(3), "spec.analysis", "exactly one of"),
            (|o| o["spec"]["analysis"]["stepWeight"] = Value::Null, "spec.analysis", "exactly one of"),
            (|o| o["spec"]["analysis"]["stepWeight"] = json!(60), "spec.analysis.stepWeight", "smaller"),
            (|o| o["spec"]["analysis"]["stepWeight"] = json!(0), "spec.analysis.stepWeight", "from 1 to 100"),
            (|o| o["spec"]["analysis"]["threshold"] = json!(0), "spec.analysis.threshold", "from 1 to 1000"),
            (
                |o| o["spec"]["analysis"] = json!({"interval": "1s", "stepWeights": [5, 5]}),
                "spec.analysis.stepWeights",
                "must ascend",
            ),
            (
                |o| o["spec"]["analysis"] = json!({"interval": "1s", "stepWeights": [5, 101]}),
                "spec.analysis.stepWeights",
                "from 1 to 100",
            ),
            (
                |o| o["spec"]["analysis"] = json!({"interval": "1s", "iterations": 2, "maxWeight": 5}),
                "spec.analysis.iterations",
                "remove maxWeight",
            ),
            (
                |o| o["spec"]["analysis"]["metrics"][0]["interval"] = json!("0s"),
                "spec.analysis.metrics[request-success-rate].interval",
                "longer than 0s",
            ),
            (
                |o| o["spec"]["analysis"]["metrics"][0]["thresholdRange"] = Value::Null,
                "spec.analysis.metrics[request-success-rate].thresholdRange",
                "say min, max or both",
            ),
            (|o| o["spec"]["analysis"] = Value::Null, "spec.analysis", "skipAnalysis: true"),
            (|o| o["spec"]["targetRef"]["kind"] = json!("DaemonSet"), "spec.targetRef", "Deployment"),
            (|o| o["spec"]["replicas"] = json!(-1), "spec.replicas", "from 0"),
            (|o| o["spec"]["drainSeconds"] = json!(-1), "spec.drainSeconds", "from 0"),
            (|o| o["metadata"]["name"] = json!("x".repeat(53)), "metadata.name", "52"),
        ];
        for (patch, field, advice) in table {
            let message = refusal(patch);
            assert!(message.starts_with("Canary test/"), "{message}");
            assert!(message.contains(field) && message.contains(advice), "{message}");
        }
    }

    #[test]
    fn a_refused_canary_can_still_be_handed_back() {
        let refused =
            parse(&canary(|o| o["spec"]["analysis"]["interval"] = json!("often")), Duration::from_secs(7)).unwrap_err();
        assert_eq!(refused.problem().reason, "InvalidSpec");
        assert_eq!((refused.spec.service.as_str(), refused.spec.settle), ("podinfo", Duration::from_secs(7)));
        assert_eq!(refused.spec.analysis, None);
    }
}
