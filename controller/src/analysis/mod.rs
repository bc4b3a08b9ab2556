//! Gates: what a step must pass. Given a [`Task`], the [`Engine`] measures again and again and keeps the newest
//! [`Report`]; it never decides about weights. The rollout machine reads reports and never waits for one.

#[cfg(test)]
mod against_prometheus;
mod engine;
mod gate;
mod measure;
mod prometheus;
mod sources;
mod template;
mod window;

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use jiff::Timestamp;
use sluice_crds::{GateStatus, Metric, VerdictStatus};

use crate::cache::CanaryKey;

pub use engine::Engine;
pub(crate) use gate::Builtin;
pub use sources::{ClusterSources, SecretData, Sources};

/// Settings of the analysis, the same for all Canaries.
#[derive(Clone, Debug)]
pub struct Settings {
    /// URL of the Prometheus that scrapes the fleet, for Canaries that do not say `metricsServer`.
    pub metrics_server: Option<String>,
    /// Folder with its credentials, by [`prometheus::Endpoint::credentials`]' keys. Read for each query, for they change.
    pub credentials: Option<PathBuf>,
    /// Label matchers for the fleet's series, such as `cluster="eu-1"`: for a Prometheus that holds several clusters.
    pub matchers: Option<String>,
    /// Deadline of one query, its answer included.
    pub query_deadline: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { metrics_server: None, credentials: None, matchers: None, query_deadline: Duration::from_secs(5) }
    }
}

/// What should be measured for one step of one release. Equal tasks are the same task.
#[derive(Clone, Debug, PartialEq)]
pub struct Task {
    pub canary: CanaryKey,
    /// Step under judgement: reports of another one are ignored.
    pub step: StepId,
    pub service: String,
    pub target: String,
    pub primary_revision: String,
    pub canary_revision: String,
    pub gates: Vec<Metric>,
    /// The Canary's own `metricsServer`, if it says one.
    pub metrics_server: Option<String>,
    /// When every member of the fleet acknowledged this step's traffic (controller's clock).
    pub acknowledged_at: Timestamp,
    /// `analysis.interval`: the step lasts at least so long.
    pub interval: Duration,
    /// At weight 0 (blue/green) a built-in gate counts what `NAME-canary` gets.
    pub weight: i32,
    /// The canary gets copies of requests in this step: the built-in gates judge these.
    pub mirrored: bool,
    /// Pod names of the fleet's members: a window is whole when each has a sample at its end.
    pub members: Vec<String>,
}

/// Names one step of one release.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct StepId {
    /// Start of the release, so that a second try of the same revision is another release.
    pub started_at: Timestamp,
    pub revision: String,
    pub index: i32,
}

/// One round of measurements.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    pub step: StepId,
    /// When the round ended (controller's clock).
    pub at: Timestamp,
    /// One for each gate of the task, in its order.
    pub gates: Vec<GateStatus>,
    /// Every window lies wholly after the acknowledgement: a pass counts only then. A failure counts before, where what is bad is too much for the whole window.
    pub whole: bool,
}

impl Report {
    /// Every gate passes on what there is of its window.
    #[must_use]
    pub fn passes_so_far(&self) -> bool {
        self.gates.iter().all(|gate| gate.verdict == VerdictStatus::Pass)
    }

    /// The worst counts: fail, then error, then inconclusive, then pass. A pass that is not yet on whole windows is inconclusive.
    #[must_use]
    pub fn verdict(&self) -> VerdictStatus {
        let any = |verdict| self.gates.iter().any(|gate| gate.verdict == verdict);
        if any(VerdictStatus::Fail) {
            VerdictStatus::Fail
        } else if any(VerdictStatus::Error) {
            VerdictStatus::Error
        } else if any(VerdictStatus::Inconclusive) || !self.whole {
            VerdictStatus::Inconclusive
        } else {
            VerdictStatus::Pass
        }
    }
}

/// A release whose queries should be run dry. Equal requests are the same dry run.
#[derive(Clone, Debug, PartialEq)]
pub struct DryRunRequest {
    pub canary: CanaryKey,
    pub service: String,
    pub target: String,
    pub primary_revision: String,
    pub canary_revision: String,
    pub gates: Vec<Metric>,
    /// Some step is judged by copies of requests.
    pub mirrored: bool,
    pub metrics_server: Option<String>,
}

/// Outcome of running every query dry before step one, by metric name: what a person must mend. Empty: all are well.
pub type DryRun = BTreeMap<String, String>;
