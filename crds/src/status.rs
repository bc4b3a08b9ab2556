//! What the controller says about a Canary: facts only. It is also the rollout machine's memory: a controller that starts
//! anew goes on from here, so everything that a decision needs is in it.

use std::collections::BTreeMap;

use k8s_openapi::jiff::Timestamp;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use crate::{canary::Analysis, matching::HttpMatch};

/// Observed state of a Canary.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CanaryStatus {
    /// Generation of the Canary that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Phase of the release, in Flagger's words.
    #[serde(default)]
    pub phase: Phase,
    /// Where the machine is; finer than `phase`.
    #[serde(default)]
    pub stage: Stage,
    /// When the stage began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "micro_time")]
    pub stage_since: Option<Timestamp>,
    /// The target Deployment, and what was seen of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<TemplateStatus>,
    /// The apex Service that has been taken over: its selector key is kept while this is set. Set once our EndpointSlices
    /// are there, and cleared before the key is removed; the slices follow [`Stage::keeps_slices`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub service: Option<String>,
    /// The further Services (`spec.service.additional`) that have been taken over with it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), inner(length(max = 63)))]
    pub additional_services: Vec<String>,
    /// Revision that serves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub primary_revision: Option<String>,
    /// Revision under judgement.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub canary_revision: Option<String>,
    /// The revision that the target asks for, where that is one of `rejectedRevisions`: nothing is released until the template
    /// changes, or `retry`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub rejected_revision: Option<String>,
    /// Revisions that are not released by themselves: rolled back, aborted, or left by a manual rollback. Each waits for
    /// `retry`, whatever the template was in between. The last 16, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub rejected_revisions: Vec<RejectedRevision>,
    /// What became of the present value of the annotation `sluice.dev/action`; absent while there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub action: Option<ActionStatus>,
    /// Values of the annotation that were handled and count once (`promote`, `abort`, `retry`, `rollback`), accepted or
    /// not. The last 32, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), inner(length(max = 253)))]
    pub handled_actions: Vec<String>,
    /// A release that was asked for by `promote` or `rollback` and has not begun.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending_release: Option<PendingRelease>,
    /// The release that `pause` holds where it is, until `resume` or a new template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused: Option<PausedRelease>,
    /// Where the fleet should send requests. The fleet is configured from this field.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traffic: Option<Traffic>,
    /// Percent of requests that the canary should have.
    #[serde(default)]
    pub requested_weight: i32,
    /// Percent of requests that every member of the fleet has acknowledged for the canary; absent while unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effective_weight: Option<i32>,
    /// Percent of the primary's requests of which, as every member of the fleet has acknowledged, copies go to the canary; absent
    /// while none do, or that is unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effective_mirror: Option<i32>,
    /// `effectiveWeight` for people: a number or `Unknown`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 16))]
    pub weight: String,
    /// Members of the fleet that have not acknowledged, by Pod name (the first 16).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(max = 253)))]
    pub lagging_members: Vec<String>,
    /// Index of the present step in the plan, from 0; absent outside of steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<i32>,
    /// `step` for people, such as `2/5`, or `1/6 (mirror)` where copies of requests are judged.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 32))]
    pub progress: String,
    /// When the traffic of the step that is judged was acknowledged by every member. It stays while the next step is
    /// prepared, because failures still count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "micro_time")]
    pub acknowledged_at: Option<Timestamp>,
    /// The plan of this release, fixed at its start; edits of `spec.analysis` count from the next release.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<FrozenPlan>,
    /// Failed checks of this release.
    #[serde(default)]
    pub failed_checks: i32,
    /// When a failure was counted last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "micro_time")]
    pub last_failure_at: Option<Timestamp>,
    /// Since when the present step has had no conclusive verdict.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "micro_time")]
    pub inconclusive_since: Option<Timestamp>,
    /// Since when the metrics server could not be asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "micro_time")]
    pub error_since: Option<Timestamp>,
    /// Last measurement of each gate.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub gates: Vec<GateStatus>,
    /// The gates in one line.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 2048))]
    pub summary: String,
    /// What the guard saw when it took the last release back; absent if it did not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guard: Option<GuardStatus>,
    /// Why the last release was taken back, from the moment that weight 0 is requested; absent after a promotion and while
    /// a newer release is under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback: Option<Rollback>,
    /// When a release was promoted last; absent while the revision that was taken over serves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "micro_time")]
    pub last_promotion_time: Option<Timestamp>,
    /// What the machine waits for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting: Option<Waiting>,
    /// Revisions that have lost their traffic and will be scaled down.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub retiring: Vec<Retiring>,
    /// Ready replicas of the primary.
    #[serde(default)]
    pub replicas: i32,
    /// Selector of the Pods that serve users, of primary and canary, for autoscalers. Of the primary's alone while the canary gets copies
    /// of requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub selector: Option<String>,
    /// When the phase changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "micro_time")]
    pub last_transition_time: Option<Timestamp>,
    /// `Ready`, `Reconciling`, `Stalled` (kstatus) and `Promoted`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// Phases of a release, in Flagger's words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// The running application is being taken over.
    #[default]
    Initializing,
    /// Taken over; no release yet.
    Initialized,
    /// A change was seen and waits for something.
    Waiting,
    /// A release is under way.
    Progressing,
    /// Every step passed; the canary is brought to full capacity and takes all traffic.
    Promoting,
    /// All traffic is on the new revision; roles are being swapped.
    Finalising,
    /// The last release was promoted.
    Succeeded,
    /// The last release was rolled back.
    Failed,
    /// Being deleted, or Sluice is being uninstalled: traffic is handed back to the target.
    Terminating,
    /// Handed back, because Sluice is being uninstalled. A later installation takes the application over again.
    Terminated,
}

/// Where the machine is. Each stage waits for exactly one thing, and says which in `status.waiting`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Stage {
    /// Takeover 1: the fleet acknowledges a configuration whose only back ends are the target's own Pods.
    #[default]
    AdoptFleet,
    /// Takeover 2-4: our EndpointSlice is written, then the selector key; the native slices become empty.
    AdoptService,
    /// Takeover 5: a floor of time for kube-proxy, which has no acknowledgement.
    AdoptSettle,
    /// Takeover 6: the first revision is created and becomes available.
    AdoptRevision,
    /// Takeover 7: the fleet acknowledges the revision in place of the target's own Pods.
    AdoptSwitch,
    /// Takeover 8: after `drainSeconds` the target is scaled to 0.
    AdoptRest,
    /// Nothing under way.
    Settled,
    /// The canary is created and scaled to what the next step's weight needs.
    Scale,
    /// The step's weight is requested; the fleet acknowledges it.
    Shift,
    /// The step is judged.
    Judge,
    /// Every step passed: full capacity.
    PromoteScale,
    /// 100 percent is requested; the fleet acknowledges it. Then roles are swapped.
    PromoteShift,
    /// Roles are swapped: the fleet acknowledges the new primary as the only revision. Then the old one retires.
    Finalise,
    /// Weight 0 is requested; the fleet acknowledges it.
    RollBack,
    /// Stopped with a named reason until somebody decides.
    Paused,
    /// Hand-back 1: the target is scaled to the wish and available.
    ReturnScale,
    /// Hand-back 2: the fleet acknowledges the target's own Pods.
    ReturnSwitch,
    /// Hand-back 3: after `drainSeconds` the revisions' Pods go; then the key is removed, native slices are filled, and our slice goes.
    ReturnService,
    /// Hand-back 4: a floor of time for kube-proxy, then everything else goes.
    ReturnSettle,
}

impl Stage {
    /// Whether our EndpointSlices of the apex Service are kept: from before its selector key is written until after the key
    /// has gone and the native slices are filled. In [`Stage::AdoptService`] they come before the key, and
    /// `status.service` is set only once they are there.
    #[must_use]
    pub fn keeps_slices(self) -> bool {
        !matches!(self, Self::AdoptFleet | Self::ReturnSettle)
    }
}

/// What was seen of the target.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TemplateStatus {
    /// Name of the Deployment that rests at 0 replicas; empty while it need not (before takeover ends, and at hand-back).
    #[schemars(length(max = 253))]
    pub name: String,
    /// UID of the Deployment that this status speaks of: another one counts its generations from 1 again.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 63))]
    pub uid: String,
    /// Generation of the Deployment that this status speaks of.
    pub observed_generation: i64,
    /// Revision of its pod template and configuration.
    #[schemars(length(max = 63))]
    pub revision: String,
    /// Replicas that its owner wished for last, and that `spec.replicas` was set to. Another wish is taken over once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<i32>,
    /// Hash of each tracked ConfigMap and Secret, by `configmap/NAME` or `secret/NAME`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 128, "additionalProperties" = {"type": "string", "maxLength": 64}))]
    pub tracked_configs: BTreeMap<String, String>,
}

/// Who serves: Pods of the target itself, or a revision.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Backend(#[schemars(length(max = 63))] pub String);

impl Backend {
    /// The target's own Pods, in plaintext: during takeover and hand-back only.
    #[must_use]
    pub fn original() -> Self {
        Self(crate::labels::ORIGINAL.to_owned())
    }

    #[must_use]
    pub fn revision(hash: &str) -> Self {
        Self(hash.to_owned())
    }

    #[must_use]
    pub fn is_original(&self) -> bool {
        self.0 == crate::labels::ORIGINAL
    }
}

/// Where the fleet sends requests for the Service.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Traffic {
    /// Takes the rest.
    pub primary: Backend,
    /// Takes `weight` percent. Present at weight 0 too, for `NAME-canary` and for a fast start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub canary: Option<Backend>,
    /// Percent of requests for the canary.
    #[serde(default)]
    #[schemars(range(min = 0, max = 100))]
    pub weight: i32,
    /// Percent of the primary's requests of which a copy goes to the canary; 0 at any weight above 0. With `match`, of those that match.
    #[serde(default, skip_serializing_if = "is_zero")]
    #[schemars(range(min = 0, max = 100))]
    pub mirror: i32,
    /// Only requests that match one of these are split; all others go to the primary. Absent where all requests are split.
    #[serde(default, rename = "match", skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "frozen_matches")]
    pub matches: Option<Vec<HttpMatch>>,
}

/// A compiled plan: what the machine carries out, step by step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FrozenPlan {
    /// Revision that this plan releases.
    #[schemars(length(max = 63))]
    pub revision: String,
    /// Revision that it replaces.
    #[schemars(length(max = 63))]
    pub primary: String,
    /// When the release began.
    #[schemars(schema_with = "micro_time")]
    pub started_at: Timestamp,
    /// Why it is not judged, or not to the end (`SkipAnalysis`, `Rollback`, `ManualPromotion`); absent for a judged one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub unjudged: Option<String>,
    /// Value of `sluice.dev/action` by which somebody promoted it or went back to it; absent where nobody did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub action: Option<String>,
    /// Judged steps, in order. After the last one comes promotion.
    #[schemars(length(max = 1000))]
    pub steps: Vec<FrozenStep>,
    /// The analysis as it was at the start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "frozen_analysis")]
    pub analysis: Option<Analysis>,
}

/// One judged step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FrozenStep {
    /// Percent of requests for the canary.
    #[schemars(range(min = 0, max = 100))]
    pub weight: i32,
    /// Percent of the primary's requests of which the canary gets copies; then the gates judge these.
    #[serde(default, skip_serializing_if = "is_zero")]
    #[schemars(range(min = 0, max = 100))]
    pub mirror: i32,
}

/// Last measurement of a gate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GateStatus {
    /// Name of the metric.
    #[schemars(length(max = 63))]
    pub name: String,
    /// Outcome.
    pub verdict: VerdictStatus,
    /// Canary's value; absent when there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<f64>,
    /// Primary's value in the same window, for comparison.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub primary_value: Option<f64>,
    /// The range in words, such as `>= 99`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 64))]
    pub limit: String,
    /// Requests in the window; absent where unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples: Option<f64>,
    /// Query time, in the metrics server's clock.
    #[schemars(schema_with = "micro_time")]
    pub time: Timestamp,
    /// Length of the window that was judged, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window_seconds: Option<f64>,
    /// Why, where that is not plain.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 1024))]
    pub message: String,
    /// The query as it was sent.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 8192))]
    pub query: String,
}

/// Outcome of a gate. Missing data is never a pass, and an unreachable metrics server is not a bad canary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum VerdictStatus {
    Pass,
    Fail,
    /// No or too few samples.
    Inconclusive,
    /// The provider could not be asked.
    Error,
}

/// Why the guard took a canary back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GuardStatus {
    /// What it compared.
    pub signal: GuardSignal,
    /// Percent of requests that were requested for the canary.
    pub weight: i32,
    /// The canary's requests, from when the evidence began to gather.
    pub canary: GuardSide,
    /// The primary's, over the same seconds.
    pub primary: GuardSide,
    /// How many percentage points the canary's share may lie above the primary's.
    pub margin: f64,
    /// Requests that lasted longer are slow, in milliseconds; only where `signal` is `Latency`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slow_above_milliseconds: Option<f64>,
    /// How strong the evidence was: a release whose canary stays within the margin comes to so much in at most one of so many. A
    /// canary is taken back at 10000.
    pub evidence: f64,
    /// When the evidence began to gather.
    #[schemars(schema_with = "micro_time")]
    pub since: Timestamp,
    /// When it was enough.
    #[schemars(schema_with = "micro_time")]
    pub at: Timestamp,
}

/// What the guard compares between canary and primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum GuardSignal {
    /// The share of failed requests, counted as for `request-success-rate`.
    Errors,
    /// The share of slow requests.
    Latency,
}

/// One side of the guard's comparison.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct GuardSide {
    /// Requests: those that ended and, of the canary where errors are compared, those by which more are under way than ever were.
    pub requests: i64,
    /// Those of them that failed, or were slow.
    pub bad: i64,
    /// `bad` in percent of `requests`.
    pub percent: f64,
}

/// What the machine waits for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Waiting {
    /// CamelCase word.
    #[schemars(length(max = 64))]
    pub reason: String,
    /// A sentence.
    #[schemars(length(max = 1024))]
    pub message: String,
    /// When it stops waiting; absent where it waits for a person.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "micro_time")]
    pub until: Option<Timestamp>,
}

/// Why a release was taken back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Rollback {
    /// CamelCase word: `ThresholdReached`, `GuardBreached`, `ProgressDeadlineExceeded`, `NoEndpoints`, `Inconclusive`, `MetricsUnavailable`,
    /// `ConfigurationRejected`, `Aborted`, `Rollback`, `Reverted` or `Superseded`.
    #[schemars(length(max = 64))]
    pub reason: String,
    /// A sentence.
    #[schemars(length(max = 2048))]
    pub message: String,
    /// The revision was found bad, and is not tried again without `retry`. False where its owner withdrew it.
    pub rejected: bool,
}

/// A revision that is not released by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RejectedRevision {
    /// Revision that was rejected.
    #[schemars(length(max = 63))]
    pub revision: String,
    /// CamelCase word, as in `rollback.reason`. `Rollback` where somebody went back to an older revision by hand.
    #[schemars(length(max = 64))]
    pub reason: String,
    /// A sentence.
    #[schemars(length(max = 512))]
    pub message: String,
    /// When it was rejected.
    #[schemars(schema_with = "micro_time")]
    pub rejected_at: Timestamp,
    /// When `retry` let it be analysed once more. Counts until the template changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "micro_time")]
    pub retried_at: Option<Timestamp>,
}

/// What somebody asks for by the annotation `sluice.dev/action`, as `VERB:REVISION` or `VERB:REVISION:NOTE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Verb {
    /// Skips what is left of the analysis of this canary.
    Promote,
    /// Takes this canary back and rejects it.
    Abort,
    /// Analyses this rejected revision in full once more.
    Retry,
    /// Holds this release where it is.
    Pause,
    /// Lets it go on.
    Resume,
    /// Goes back to this revision, which was promoted before, at once.
    Rollback,
}

/// The annotation `sluice.dev/action`, as it was handled. Written before anything follows from it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ActionStatus {
    /// Value of the annotation.
    #[schemars(length(max = 253))]
    pub value: String,
    /// Absent where the value is not understood.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verb: Option<Verb>,
    /// Revision that the value names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub revision: Option<String>,
    /// What became of it.
    pub outcome: ActionOutcome,
    /// What follows from it, or why it was refused and what to do.
    #[schemars(length(max = 1024))]
    pub message: String,
    /// When it was handled.
    #[schemars(schema_with = "micro_time")]
    pub handled_at: Timestamp,
    /// Generation of the Canary at that time.
    pub observed_generation: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ActionOutcome {
    Accepted,
    /// It made no sense then. The same value is not looked at again.
    Refused,
    /// The same value was handled before, and counts once.
    Repeated,
}

/// An unjudged release that was asked for and has not begun.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PendingRelease {
    /// Revision that is to be released.
    #[schemars(length(max = 63))]
    pub revision: String,
    /// `ManualPromotion` or `Rollback`.
    #[schemars(length(max = 32))]
    pub unjudged: String,
    /// Value of `sluice.dev/action` that asked for it.
    #[schemars(length(max = 253))]
    pub action: String,
}

/// A release that is held by hand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PausedRelease {
    /// Revision that is held.
    #[schemars(length(max = 63))]
    pub revision: String,
    /// When it was paused.
    #[schemars(schema_with = "micro_time")]
    pub since: Timestamp,
}

/// A revision without traffic.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Retiring {
    /// Revision that is scaled down.
    #[schemars(length(max = 63))]
    pub revision: String,
    /// When it is scaled to 0.
    #[schemars(schema_with = "micro_time")]
    pub scale_down_at: Timestamp,
}

/// A condition, as in `metav1.Condition`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// `Ready`, `Reconciling`, `Stalled` or `Promoted`.
    #[serde(rename = "type")]
    #[schemars(length(max = 63))]
    pub kind: String,
    /// True, False or Unknown.
    pub status: ConditionStatus,
    /// CamelCase word that says why.
    #[schemars(length(max = 1024))]
    pub reason: String,
    /// A sentence that says why, and what to do.
    #[schemars(length(max = 32768))]
    pub message: String,
    /// Generation of the Canary that this condition speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// When `status` changed last.
    #[schemars(schema_with = "micro_time")]
    pub last_transition_time: Timestamp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ConditionStatus {
    True,
    False,
    Unknown,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_zero(number: &i32) -> bool {
    *number == 0
}

fn micro_time(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "format": "date-time"})
}

/// The copy of `spec.analysis` was validated when it was written there: no rule runs on it again.
fn frozen_analysis(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "object", "x-kubernetes-preserve-unknown-fields": true})
}

/// As `frozen_analysis`.
fn frozen_matches(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "array", "maxItems": 8, "items": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}})
}
