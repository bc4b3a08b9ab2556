//! The built-in gates: their queries on the fleet's own series (C20), and the judgement of numbers against a range.
//!
//! How requests are counted between the two ends of a window. `increase()` is not used: it extrapolates to the edges of its range,
//! by another factor for a counter that began at 0 than for one that did not (so a canary's new errors weigh less than
//! its old successes), and it cannot see the first value of a series that appears in mid-window (the fleet leaves out
//! gRPC statuses that never occurred). Instead, for each series: the last value in the window less the last one before it,
//! and a series without one before it counts from 0, because its counter did. A counter that fell in between belongs to a member
//! that was restarted: it counts from 0 too, which loses what was counted between the window's start and the
//! restart and never counts anything twice. All are whole requests, so `minSamples` means what it says.

use std::fmt::Write;

use sluice_crds::{Metric, ThresholdRange, VerdictStatus};

use super::{Task, window::Window};

/// Prometheus's own limit for how old a sample may be at an instant; the start of a window needs one.
const LOOKBACK: &str = "5m";
/// gRPC statuses that say that the server failed, whatever the HTTP status (C20).
const BAD_GRPC: &str = "UNKNOWN|DEADLINE_EXCEEDED|INTERNAL|UNAVAILABLE|DATA_LOSS";
/// What became of a copy that says well of the version.
const GOOD_COPY: &str = "2xx|3xx|4xx";
/// What says nothing about it: bounds of the proxy's own, or the request itself ended early.
const NO_VERDICT: &str = "too_large|busy|cancelled";
/// Upper bound of the last bucket in milliseconds: a p99 that reaches it may be any number above.
const LAST_BOUND: f64 = 60_000.0;

/// The share of the requests that may take longer than a p99.
pub(crate) const MAY_BE_SLOWER: f64 = 0.01;

/// What a gate measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Builtin {
    /// Percent of requests that did not fail.
    SuccessRate,
    /// p99 in milliseconds.
    Duration,
}

impl Builtin {
    /// `None` for a gate with a query of its own.
    pub(crate) fn of(gate: &Metric) -> Option<Self> {
        if gate.query.is_some() || gate.template_ref.is_some() {
            return None;
        }
        match gate.name.as_str() {
            "request-success-rate" => Some(Self::SuccessRate),
            "request-duration" => Some(Self::Duration),
            _ => None,
        }
    }
}

/// Whose requests are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Of {
    Users,
    Copies,
}

/// The series of one release, under every Service name that leads to its revisions.
pub(crate) struct Series {
    /// Labels of users' requests: for both revisions, or for the primary alone where the canary gets copies.
    users: String,
    /// Labels of the copies that the canary gets, where they are judged.
    copies: Option<String>,
}

impl Series {
    /// `mirrored`: the canary is judged by the copies that it gets. `matchers`: more of them, such as `cluster="eu-1"`, from the
    /// controller's settings.
    pub(crate) fn new(
        namespace: &str,
        service: &str,
        primary: &str,
        canary: &str,
        mirrored: bool,
        matchers: Option<&str>,
    ) -> Self {
        let labels = |revisions: &str| {
            // The names and hashes are DNS labels: nothing in them means anything in a regular expression.
            let mut labels = format!(
                "destination_namespace={},destination_service=~{},revision=~{}",
                quoted(namespace),
                quoted(&format!("{service}(-canary|-primary)?")),
                quoted(revisions)
            );
            if let Some(matchers) = matchers {
                let _ = write!(labels, ",{matchers}");
            }
            labels
        };
        let users = labels(&if mirrored { primary.to_owned() } else { format!("{canary}|{primary}") });
        Self { users, copies: mirrored.then(|| labels(canary)) }
    }

    pub(crate) fn of(task: &Task, matchers: Option<&str>) -> Self {
        let Task { canary, service, primary_revision, canary_revision, mirrored, .. } = task;
        Self::new(&canary.namespace, service, primary_revision, canary_revision, *mirrored, matchers)
    }

    /// Number of requests by revision.
    pub(crate) fn samples(&self, gate: Builtin, window: Window) -> String {
        self.each(|of| self.samples_of(of, gate, window))
    }

    /// The gate's value by revision.
    pub(crate) fn value(&self, gate: Builtin, window: Window) -> String {
        match gate {
            Builtin::SuccessRate => self.each(|of| {
                let good = match of {
                    Of::Users => format!(",code_class!=\"5xx\",grpc_status!~\"{BAD_GRPC}\""),
                    Of::Copies => format!(",outcome=~\"{GOOD_COPY}\""),
                };
                format!(
                    "100 * sum by (revision) ({}) / {}",
                    self.growth(of, requests(of), &good, window),
                    self.samples_of(of, gate, window)
                )
            }),
            Builtin::Duration => self.duration(1.0 - MAY_BE_SLOWER, window),
        }
    }

    /// What so large a share of the requests does not exceed, by revision, in milliseconds.
    pub(crate) fn duration(&self, quantile: f64, window: Window) -> String {
        self.each(|of| {
            format!(
                "1000 * histogram_quantile({quantile}, sum by (revision, le) ({}))",
                self.growth(of, &format!("{}_bucket", durations(of)), "", window)
            )
        })
    }

    /// One vector with both revisions, of which each is in one part only.
    fn each(&self, part: impl Fn(Of) -> String) -> String {
        let users = part(Of::Users);
        if self.copies.is_some() { format!("{} or {users}", part(Of::Copies)) } else { users }
    }

    fn samples_of(&self, of: Of, gate: Builtin, window: Window) -> String {
        let growth = match (gate, of) {
            (Builtin::SuccessRate, Of::Users) => self.growth(of, requests(of), "", window),
            (Builtin::SuccessRate, Of::Copies) => {
                self.growth(of, requests(of), &format!(",outcome!~\"{NO_VERDICT}\""), window)
            }
            (Builtin::Duration, _) => self.growth(of, &format!("{}_count", durations(of)), "", window),
        };
        format!("sum by (revision) ({growth})")
    }

    /// By how much each counter grew in the window; see the head of this file.
    fn growth(&self, of: Of, name: &str, more: &str, window: Window) -> String {
        let labels = match of {
            Of::Users => self.users.as_str(),
            Of::Copies => self.copies.as_deref().unwrap_or_default(),
        };
        let series = format!("{name}{{{labels}{more}}}");
        let length = duration(window.length);
        let both = duration(window.length + window.lead);
        format!(
            "(last_over_time({series}[{length}]) - last_over_time({series}[{LOOKBACK}] offset {length}) \
             unless resets({series}[{both}]) > 0) or last_over_time({series}[{length}])"
        )
    }
}

fn requests(of: Of) -> &'static str {
    match of {
        Of::Users => "sluice_requests_total",
        Of::Copies => "sluice_mirrored_requests_total",
    }
}

fn durations(of: Of) -> &'static str {
    match of {
        Of::Users => "sluice_request_duration_seconds",
        Of::Copies => "sluice_mirrored_request_duration_seconds",
    }
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))
}

/// As PromQL writes it.
fn duration(milliseconds: i64) -> String {
    if milliseconds % 1000 == 0 { format!("{}s", milliseconds / 1000) } else { format!("{milliseconds}ms") }
}

/// A value against the range of its gate.
pub(crate) fn within(gate: &Metric, value: f64) -> bool {
    let Some(ThresholdRange { min, max }) = gate.threshold_range else {
        // The schema refuses it. A gate without a limit would pass everything.
        return false;
    };
    let beyond_measure = Builtin::of(gate) == Some(Builtin::Duration) && value >= LAST_BOUND;
    min.is_none_or(|min| value >= min) && max.is_none_or(|max| value <= max && !beyond_measure)
}

/// The range in words.
pub(crate) fn limit(gate: &Metric) -> String {
    match gate.threshold_range {
        Some(ThresholdRange { min: Some(min), max: Some(max) }) => format!("{min}..{max}"),
        Some(ThresholdRange { min: Some(min), max: None }) => format!(">= {min}"),
        Some(ThresholdRange { min: None, max: Some(max) }) => format!("<= {max}"),
        Some(ThresholdRange { min: None, max: None }) | None => String::new(),
    }
}

/// The verdict on a built-in gate, and why, where that is not plain. `samples` is `None` where the revision has no series.
pub(crate) fn judge(gate: &Metric, value: Option<f64>, samples: Option<f64>) -> (VerdictStatus, String) {
    let (Some(value), Some(samples)) = (value, samples) else {
        let message = match samples {
            None => "the fleet has not counted anything for this revision yet",
            Some(_) => "no request yet",
        };
        return (VerdictStatus::Inconclusive, message.to_owned());
    };
    if samples < f64::from(gate.min_samples) {
        return (VerdictStatus::Inconclusive, format!("{samples} of at least {} requests", gate.min_samples));
    }
    if within(gate, value) {
        (VerdictStatus::Pass, String::new())
    } else if value >= LAST_BOUND && Builtin::of(gate) == Some(Builtin::Duration) {
        (VerdictStatus::Fail, "60000 ms or more: the histogram ends there".to_owned())
    } else {
        (VerdictStatus::Fail, String::new())
    }
}

/// Whether a success rate that is out of range on so large a `share` of a window would be so on the whole of it, if requests went on
/// coming and none failed any more. One failure among the first ten requests says little, and half of them much.
pub(crate) fn fails_anyway(gate: &Metric, value: f64, share: f64) -> bool {
    gate.threshold_range.and_then(|range| range.min).is_some_and(|min| (100.0 - value) * share > 100.0 - min)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_part_of_a_window_fails_a_rate_only_if_the_whole_of_it_would() {
        let rate = gate("request-success-rate", Some(99.0), None);
        for (value, share, fails) in
            [(50.0, 0.021, true), (50.0, 0.019, false), (98.0, 0.51, true), (98.0, 0.49, false)]
        {
            assert_eq!(fails_anyway(&rate, value, share), fails, "{value} on {share}");
        }
    }

    fn gate(name: &str, min: Option<f64>, max: Option<f64>) -> Metric {
        let range = serde_json::json!({"name": name, "thresholdRange": {"min": min, "max": max}});
        serde_json::from_value(range).unwrap()
    }

    #[test]
    fn verdicts() {
        use VerdictStatus::{Fail, Inconclusive, Pass};
        let rate = gate("request-success-rate", Some(99.0), None);
        let p99 = gate("request-duration", None, Some(500.0));
        let both = gate("request-duration", Some(1.0), Some(60_000.0));
        for (gate, value, samples, expected) in [
            (&rate, Some(99.0), Some(10.0), Pass),
            (&rate, Some(98.999), Some(10.0), Fail),
            (&rate, Some(100.0), Some(9.0), Inconclusive),
            (&rate, Some(0.0), Some(9.0), Inconclusive),
            (&rate, None, Some(0.0), Inconclusive),
            (&rate, None, None, Inconclusive),
            (&p99, Some(500.0), Some(10.0), Pass),
            (&p99, Some(500.1), Some(10.0), Fail),
            (&both, Some(0.5), Some(10.0), Fail),
            (&both, Some(59_999.0), Some(10.0), Pass),
            // The last bucket ends at 60 s: this may be any time above.
            (&both, Some(60_000.0), Some(10.0), Fail),
        ] {
            assert_eq!(judge(gate, value, samples).0, expected, "{} {value:?} {samples:?}", gate.name);
        }
    }

    #[test]
    fn a_gate_without_a_range_passes_nothing() {
        let gate: Metric = serde_json::from_value(serde_json::json!({"name": "request-success-rate"})).unwrap();
        assert_eq!(judge(&gate, Some(100.0), Some(100.0)).0, VerdictStatus::Fail);
    }

    #[test]
    fn limits_read_as_people_say_them() {
        for (min, max, words) in [
            (Some(99.0), None, ">= 99"),
            (None, Some(500.0), "<= 500"),
            (Some(99.5), Some(100.0), "99.5..100"),
            (None, None, ""),
        ] {
            assert_eq!(limit(&gate("x", min, max)), words);
        }
    }

    #[test]
    fn queries_of_the_built_in_gates() {
        let series = Series::new("shop", "cart", "aaaa", "bbbb", false, Some("cluster=\"eu\""));
        insta::assert_snapshot!(queries(&series));
    }

    #[test]
    fn queries_of_the_built_in_gates_where_copies_are_judged() {
        insta::assert_snapshot!(queries(&Series::new("shop", "cart", "aaaa", "bbbb", true, None)));
    }

    fn queries(series: &Series) -> String {
        let window = Window { end: 0, length: 60_000, whole: true, lead: 8_001 };
        let queries = [Builtin::SuccessRate, Builtin::Duration]
            .map(|gate| format!("{}\n\n{}", series.value(gate, window), series.samples(gate, window)));
        queries.join("\n\n")
    }
}
