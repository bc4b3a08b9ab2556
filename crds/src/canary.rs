//! `Canary`: one beside a Deployment; every change of the Deployment is then released in steps.

use std::collections::BTreeMap;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    duration,
    matching::HttpMatch,
    service::ServiceSpec,
    status::CanaryStatus,
    unsupported::{UnsupportedList, UnsupportedObject},
};

/// Releases every change of a Deployment in steps, judged by metrics.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "sluice.dev",
    version = "v1beta1",
    kind = "Canary",
    plural = "canaries",
    shortname = "can",
    category = "all",
    category = "sluice",
    namespaced,
    status = "CanaryStatus",
    derive = "PartialEq",
    doc = "Releases every change of a Deployment in steps: traffic moves to the new version a few percent at a time, each step must pass its gates, and the release is promoted or rolled back by itself.",
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    validation = Rule::new("size(self.metadata.name) <= 52").message("metadata.name: a Canary's name has at most 52 characters, so that the names made from it fit in 63"),
    printcolumn(name = "Status", type_ = "string", json_path = ".status.phase", description = "Phase of the release"),
    printcolumn(name = "Weight", type_ = "string", json_path = ".status.weight", description = "Percent of requests on the canary, acknowledged by every member of the fleet"),
    printcolumn(name = "Requested", type_ = "integer", json_path = ".status.requestedWeight", description = "Percent of requests that the canary should have"),
    printcolumn(name = "Step", type_ = "string", json_path = ".status.progress", description = "Step of the plan; (mirror) where copies of requests are judged"),
    printcolumn(name = "Revision", type_ = "string", json_path = ".status.template.revision", description = "Revision of the target's present template"),
    printcolumn(name = "FailedChecks", type_ = "integer", json_path = ".status.failedChecks", description = "Failed checks of this release"),
    printcolumn(name = "LastTransition", type_ = "date", json_path = ".status.lastTransitionTime", description = "Time since the phase changed"),
    printcolumn(name = "Primary", type_ = "string", json_path = ".status.primaryRevision", description = "Revision that serves", priority = 1),
    printcolumn(name = "Canary", type_ = "string", json_path = ".status.canaryRevision", description = "Revision under judgement", priority = 1),
    printcolumn(name = "Replicas", type_ = "integer", json_path = ".status.replicas", description = "Replicas of the primary", priority = 1),
    printcolumn(name = "Suspended", type_ = "boolean", json_path = ".spec.suspend", priority = 1),
    printcolumn(name = "Gates", type_ = "string", json_path = ".status.summary", description = "Last verdict of each gate", priority = 1),
    printcolumn(name = "WaitingFor", type_ = "string", json_path = ".status.waiting.message", priority = 1)
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.analysis) || (has(self.skipAnalysis) && self.skipAnalysis)").message("spec.analysis is required: without it nothing would judge a release (or say skipAnalysis: true)"),
    validation = Rule::new("!has(self.provider)").message("spec.provider is not needed: Sluice brings its own proxies. Remove it"),
    validation = Rule::new("!has(self.ingressRef) && !has(self.routeRef) && !has(self.upstreamRef)").message("spec.ingressRef, spec.routeRef and spec.upstreamRef are not needed: the fleet splits the traffic of the Service itself. Remove them"),
    validation = Rule::new("!has(self.service.additional) || !self.service.additional.exists(s, s.name == (has(self.service.name) ? self.service.name : self.targetRef.name))").message("spec.service.additional names the Service itself: name others only"),
    validation = Rule::new("(has(self.service.name) ? self.service.name : self.targetRef.name) == (has(oldSelf.service.name) ? oldSelf.service.name : oldSelf.targetRef.name)").message("spec.service.name cannot be changed: delete this Canary and create another one"),
    validation = Rule::new("!has(self.canaryAnalysis)").message("spec.canaryAnalysis is the old name of spec.analysis: rename it"),
    validation = Rule::new("!has(self.revertOnDeletion) || self.revertOnDeletion").message("spec.revertOnDeletion: Sluice always hands the traffic back when a Canary is deleted; remove the field or set it to true"),
    validation = Rule::new("!(has(self.service.appProtocol) && !(self.service.appProtocol.lowerAscii().replace('kubernetes.io/', '') in ['http', 'http2', 'h2c', 'grpc', 'grpc-web', 'ws', 'web']) && has(self.analysis) && (has(self.analysis.match) || has(self.analysis.sessionAffinity) || (has(self.analysis.mirror) && self.analysis.mirror)))").message("spec.analysis.match, sessionAffinity and mirror are for HTTP: on a port whose appProtocol is not, such as tcp or https, there are no requests. Remove them"),
    validation = Rule::new("!(has(self.analysis) && has(self.analysis.match) && self.analysis.match.exists(m, has(m.uri)) && ((has(self.service.match) && self.service.match.exists(m, has(m.uri))) || (has(self.service.rewrite) && has(self.service.rewrite.uri))))").message("spec.analysis.match: say no uri beside one in spec.service.match, or beside spec.service.rewrite.uri: a request has one path"),
    validation = Rule::new("!(has(self.service.appProtocol) && !(self.service.appProtocol.lowerAscii().replace('kubernetes.io/', '') in ['http', 'http2', 'h2c', 'grpc', 'grpc-web', 'ws', 'web']) && has(self.analysis) && has(self.analysis.metrics) && self.analysis.metrics.exists(m, !has(m.query) && !has(m.templateRef)))").message("spec.analysis.metrics: a built-in metric counts HTTP requests and can never have samples on a port whose appProtocol is not HTTP, such as tcp or https; use a templateRef or a query")
)]
pub struct CanarySpec {
    /// The Deployment whose changes are released. Cannot be changed: delete the Canary and make another one.
    #[x_kube(validation = Rule::new("self == oldSelf").message("spec.targetRef cannot be changed: delete this Canary and create another one"))]
    pub target_ref: TargetRef,
    /// The Service whose traffic is split.
    pub service: ServiceSpec,
    /// How a release proceeds and what it is judged by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub analysis: Option<Analysis>,
    /// Seconds that a revision may take to become available before the release is rolled back.
    #[serde(default = "default_progress_deadline")]
    #[schemars(range(min = 1, max = 86400))]
    pub progress_deadline_seconds: i32,
    /// URL of the Prometheus for the built-in metrics and inline queries; the controller's own setting by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 2048), regex(pattern = "^https?://"))]
    pub metrics_server: Option<String>,
    /// Promotes each change without judging it: one step from 0 to 100 once the new revision is available.
    #[serde(default)]
    pub skip_analysis: bool,
    /// Freezes the release where it is: no weight is raised and no release starts. The weight still falls to 0 when the canary loses all its endpoints.
    #[serde(default)]
    pub suspend: bool,
    /// Replicas of the serving revision. Set from the target when the Canary takes over; scale here afterwards (`kubectl scale canary/NAME`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100_000))]
    pub replicas: Option<i32>,
    /// Old revisions that are kept for going back.
    #[serde(default = "default_history")]
    #[schemars(range(min = 0, max = 20))]
    pub revision_history_limit: i32,
    /// Seconds that the former revision stays at full capacity after a promotion.
    #[serde(default = "default_scale_down_delay")]
    #[schemars(range(min = 0, max = 86400))]
    pub scale_down_delay_seconds: i32,
    /// Seconds between the fleet's acknowledgement of weight 0 and the scale-down of that revision, for its open
    /// streams; at takeover and hand-back, too.
    #[serde(default = "default_drain")]
    #[schemars(range(min = 0, max = 3600))]
    pub drain_seconds: i32,
    /// Always so: traffic is handed back to the Deployment when a Canary is deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revert_on_deletion: Option<bool>,
    /// Not needed; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub provider: Option<String>,
    /// A HorizontalPodAutoscaler of the target. A copy of it, `NAME-primary`, scales this Canary; it follows every change, and goes with the Canary.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscaler_ref: Option<AutoscalerRef>,
    /// Not needed; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingress_ref: Option<UnsupportedObject>,
    /// Not needed; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route_ref: Option<UnsupportedObject>,
    /// Not needed; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upstream_ref: Option<UnsupportedObject>,
    /// Old name of `analysis`; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub canary_analysis: Option<UnsupportedObject>,
}

fn default_progress_deadline() -> i32 {
    600
}
fn default_history() -> i32 {
    3
}
fn default_scale_down_delay() -> i32 {
    300
}
fn default_drain() -> i32 {
    30
}

/// The Deployment to release.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.kind == 'Deployment' && (!has(self.apiVersion) || self.apiVersion == 'apps/v1')").message("spec.targetRef: this version releases apps/v1 Deployments only"))]
pub struct TargetRef {
    /// `apps/v1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub api_version: Option<String>,
    /// `Deployment`.
    #[schemars(length(max = 63))]
    pub kind: String,
    /// Name of the Deployment in the Canary's namespace.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// The autoscaler whose copy scales this Canary.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.kind != 'ScaledObject'").message("spec.autoscalerRef: a ScaledObject is not supported in this version; let its spec.scaleTargetRef name this Canary (apiVersion sluice.dev/v1beta1, kind Canary), and remove autoscalerRef"),
    validation = Rule::new("self.kind == 'ScaledObject' || (self.kind == 'HorizontalPodAutoscaler' && (!has(self.apiVersion) || self.apiVersion.startsWith('autoscaling/')))").message("spec.autoscalerRef: name a HorizontalPodAutoscaler of autoscaling/v2"),
    validation = Rule::new("!has(self.primaryScalerQueries)").message("spec.autoscalerRef.primaryScalerQueries belongs to a ScaledObject, which is not supported in this version; remove it")
)]
pub struct AutoscalerRef {
    /// `autoscaling/v2`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub api_version: Option<String>,
    /// `HorizontalPodAutoscaler`.
    #[schemars(length(max = 63))]
    pub kind: String,
    /// Name of the HorizontalPodAutoscaler in the Canary's namespace.
    #[schemars(length(min = 1, max = 245))]
    pub name: String,
    /// What the copy says in place of the named one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub primary_scaler_replicas: Option<ScalerReplicas>,
    /// Of a ScaledObject; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub primary_scaler_queries: Option<UnsupportedObject>,
}

/// Bounds of an autoscaler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.minReplicas) || !has(self.maxReplicas) || self.minReplicas <= self.maxReplicas").message("spec.autoscalerRef.primaryScalerReplicas: minReplicas is larger than maxReplicas"))]
pub struct ScalerReplicas {
    /// Least replicas; as in the named autoscaler by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000))]
    pub min_replicas: Option<i32>,
    /// Most replicas; as in the named autoscaler by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000))]
    pub max_replicas: Option<i32>,
}

/// How a release proceeds. Exactly one of `stepWeight`, `stepWeights` and `iterations`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("[has(self.stepWeight), has(self.stepWeights), has(self.iterations)].filter(x, x).size() == 1").message("spec.analysis: say exactly one of stepWeight, stepWeights and iterations"),
    validation = Rule::new("!has(self.stepWeight) || !has(self.maxWeight) || self.stepWeight <= self.maxWeight").message("spec.analysis.stepWeight is larger than maxWeight: the first step would overshoot"),
    validation = Rule::new("!has(self.stepWeights) || self.stepWeights.isSorted()").message("spec.analysis.stepWeights must ascend"),
    validation = Rule::new("!has(self.stepWeights) || !has(self.maxWeight)").message("spec.analysis.maxWeight has no meaning beside stepWeights: their last entry is the maximum. Remove it"),
    validation = Rule::new("!has(self.iterations) || (!has(self.maxWeight) && !has(self.stepWeightPromotion))").message("spec.analysis.maxWeight and stepWeightPromotion have no meaning beside iterations: blue/green moves all traffic at once. Remove them"),
    validation = Rule::new("!has(self.webhooks)").message("spec.analysis.webhooks is not supported in this version; the release would run without this gate. Remove it"),
    validation = Rule::new("!has(self.alerts)").message("spec.analysis.alerts is not supported in this version; nobody would be alerted. Remove it"),
    validation = Rule::new("!has(self.mirrorWeight) || (has(self.mirror) && self.mirror)").message("spec.analysis.mirrorWeight has no meaning without mirror: true. Say so, or remove it"),
    validation = Rule::new("!(has(self.mirror) && self.mirror && has(self.match) && has(self.iterations))").message("spec.analysis.mirror has no meaning beside match and iterations: in A/B testing all requests that match go to the canary itself. Remove mirror, or say stepWeight or stepWeights in place of iterations"),
    validation = Rule::new("!has(self.primaryReadyThreshold) && !has(self.canaryReadyThreshold)").message("spec.analysis.primaryReadyThreshold and canaryReadyThreshold are not supported in this version; remove them")
)]
pub struct Analysis {
    /// Least time that a step lasts, and the time between two counted failures. `30s`, `1m`, `1m30s`.
    #[schemars(length(max = 32), regex(pattern = duration::PATTERN))]
    pub interval: String,
    /// Failed checks at which the release is rolled back. Cumulative over the release.
    #[serde(default = "default_threshold")]
    #[schemars(range(min = 1, max = 1000))]
    pub threshold: i32,
    /// Weight of the last step before promotion, in percent; 100 by default. Never overshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub max_weight: Option<i32>,
    /// Raises the weight by this much at each step, in percent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub step_weight: Option<i32>,
    /// Weight of each step, ascending, in percent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 100), inner(range(min = 1, max = 100)), extend("x-kubernetes-list-type" = "set"))]
    pub step_weights: Option<Vec<i32>>,
    /// Goes from the last step to 100 by judged steps of this size, in percent; at once by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub step_weight_promotion: Option<i32>,
    /// Blue/green: so many judged intervals at weight 0 (send test traffic to `NAME-canary`), then all traffic at once. With `match`,
    /// A/B testing: so many judged intervals in which all that matches goes to the canary.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub iterations: Option<i32>,
    /// What each step must pass. An empty list promotes by time and readiness alone, with a warning.
    #[serde(default)]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub metrics: Vec<Metric>,
    /// What happens when there are too few samples for too long.
    #[serde(default)]
    pub inconclusive: Inconclusive,
    /// Rolls back when the metrics server could not be asked for so long.
    #[serde(default = "default_ten_minutes")]
    #[schemars(length(max = 32), regex(pattern = duration::PATTERN))]
    pub error_deadline: String,
    /// Takes a canary back within a second that answers far worse than the primary, beside the gates.
    #[serde(default)]
    pub guard: Guard,
    /// Only requests that match one of these can reach the canary before the promotion; all others go to the primary. Weights are
    /// percentages of them, and with `iterations` all of them go to the canary (A/B testing).
    #[serde(default, rename = "match", skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 8))]
    pub matches: Option<Vec<HttpMatch>>,
    /// Before any user reaches the canary it gets copies of the primary's requests, whose answers nobody sees but the gates: in one
    /// judged step before the weights, or with `iterations` in all of them. Copies are processed: only for what may be asked twice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror: Option<bool>,
    /// Percent of the requests that are copied; 100 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub mirror_weight: Option<i32>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub primary_ready_threshold: Option<i32>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub canary_ready_threshold: Option<i32>,
    /// Keeps each user on one version while weights stay: a raised weight only ever moves users to the canary, a lowered one only back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_affinity: Option<SessionAffinity>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alerts: Option<UnsupportedList>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub webhooks: Option<UnsupportedList>,
}

fn default_threshold() -> i32 {
    1
}
fn default_ten_minutes() -> String {
    "10m".to_owned()
}

/// Users are told apart by a cookie, which the fleet sets where it is missing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.primaryCookieName)").message("spec.analysis.sessionAffinity.primaryCookieName is not needed: one cookie keeps users on either version. Remove it"),
    validation = Rule::new("!has(self.domain) && !has(self.httpOnly) && !has(self.partitioned) && !has(self.path) && !has(self.sameSite) && !has(self.secure)").message("spec.analysis.sessionAffinity.domain, httpOnly, partitioned, path, sameSite and secure are not supported in this version: the cookie is always `Path=/; HttpOnly`. Remove them")
)]
pub struct SessionAffinity {
    /// Name of the cookie.
    #[schemars(length(min = 1, max = 128), regex(pattern = "^[A-Za-z0-9!#$%&'*+.^_`|~-]+$"))]
    pub cookie_name: String,
    /// Seconds that a browser keeps the cookie.
    #[serde(default = "default_max_age")]
    #[schemars(range(min = 1, max = 31_536_000))]
    pub max_age: i32,
    /// Not needed; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub primary_cookie_name: Option<String>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub domain: Option<String>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http_only: Option<bool>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partitioned: Option<bool>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub path: Option<String>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub same_site: Option<String>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secure: Option<bool>,
}

fn default_max_age() -> i32 {
    // Flagger's.
    86_400
}

/// Policy for too little data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Inconclusive {
    /// How long a step may be without a conclusive verdict.
    #[serde(default = "default_ten_minutes")]
    #[schemars(length(max = 32), regex(pattern = duration::PATTERN))]
    pub after: String,
    /// What happens then.
    #[serde(default)]
    pub then: InconclusiveAction,
}

impl Default for Inconclusive {
    fn default() -> Self {
        Self { after: default_ten_minutes(), then: InconclusiveAction::default() }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum InconclusiveAction {
    /// Back to the primary.
    #[default]
    Rollback,
    /// Stay at the present weight until somebody decides.
    Pause,
}

/// The guard compares what the fleet answers for canary and primary over the same seconds, several times a second, at every weight
/// above 0. It takes a canary back at once when it is certain, and never lets one pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Guard {
    /// False leaves the judgement to the gates alone.
    #[serde(default = "default_true")]
    pub enabled: bool,
    /// Percentage points by which the canary's share of failed requests may lie above the primary's. At least what the gate
    /// `request-success-rate` allows. 100 switches this comparison off.
    #[serde(default = "default_error_margin")]
    #[schemars(range(min = 1, max = 100))]
    pub error_margin: i32,
    /// The same for the share of requests that last longer than the `max` of the gate `request-duration`, rounded up to the next
    /// bucket of the fleet's histogram. Without that gate no request is slow. 100 switches this comparison off.
    #[serde(default = "default_latency_margin")]
    #[schemars(range(min = 1, max = 100))]
    pub latency_margin: i32,
}

impl Default for Guard {
    fn default() -> Self {
        Self { enabled: default_true(), error_margin: default_error_margin(), latency_margin: default_latency_margin() }
    }
}

fn default_true() -> bool {
    true
}
fn default_error_margin() -> i32 {
    5
}
fn default_latency_margin() -> i32 {
    10
}

/// One gate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.templateRef) || has(self.query) || self.name in ['request-success-rate', 'request-duration']").message("spec.analysis.metrics: a metric that is not request-success-rate or request-duration needs a templateRef or a query"),
    validation = Rule::new("!(has(self.templateRef) && has(self.query))").message("spec.analysis.metrics: say either templateRef or query"),
    validation = Rule::new("!has(self.threshold)").message("spec.analysis.metrics[].threshold is deprecated and not supported: use thresholdRange.min or thresholdRange.max"),
    validation = Rule::new("has(self.thresholdRange)").message("spec.analysis.metrics[].thresholdRange is required: say min, max or both"),
    validation = Rule::new("!has(self.templateVariables) || self.templateVariables.all(name, size(name) <= 128)").message("spec.analysis.metrics[].templateVariables takes names of at most 128 characters"),
    validation = Rule::new("!(self.name == 'request-duration' && !has(self.query) && !has(self.templateRef) && has(self.thresholdRange) && has(self.thresholdRange.max) && self.thresholdRange.max > 60000.0)").message("spec.analysis.metrics: request-duration is measured up to 60000 ms; a larger limit could never fail")
)]
pub struct Metric {
    /// `request-success-rate` (percent), `request-duration` (p99 in milliseconds), or a name of your own beside `templateRef` or `query`.
    #[schemars(length(min = 1, max = 63))]
    pub name: String,
    /// The window that is judged.
    #[serde(default = "default_window")]
    #[schemars(length(max = 32), regex(pattern = duration::PATTERN))]
    pub interval: String,
    /// Range in which the value passes, ends included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold_range: Option<ThresholdRange>,
    /// A MetricTemplate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template_ref: Option<ObjectReference>,
    /// Values for `{{ variables.KEY }}` in the template.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32, "additionalProperties" = {"type": "string", "maxLength": 1024}))]
    pub template_variables: BTreeMap<String, String>,
    /// PromQL of your own; the same variables as in a MetricTemplate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 8192))]
    pub query: Option<String>,
    /// Least number of requests in the window for a verdict of a built-in metric.
    #[serde(default = "default_min_samples")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub min_samples: i32,
    /// Deprecated in Flagger; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f64>,
}

fn default_window() -> String {
    "1m".to_owned()
}
fn default_min_samples() -> i32 {
    10
}

/// A range with one or two ends.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("has(self.min) || has(self.max)").message("thresholdRange: say min, max or both"),
    validation = Rule::new("!has(self.min) || !has(self.max) || self.min <= self.max").message("thresholdRange: min is larger than max, so nothing could pass")
)]
pub struct ThresholdRange {
    /// Smallest value that passes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<f64>,
    /// Largest value that passes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,
}

/// An object by name, in the Canary's namespace by default.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ObjectReference {
    /// Name of the object.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Namespace of the object; that of the Canary by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub namespace: Option<String>,
}

impl CanarySpec {
    /// Name of the apex Service.
    #[must_use]
    pub fn service_name(&self) -> &str {
        self.service.name.as_deref().unwrap_or(&self.target_ref.name)
    }

    /// Names of the further Services that are split like it.
    pub fn additional_services(&self) -> impl Iterator<Item = &str> {
        self.service.additional.iter().flatten().map(|service| service.name.as_str())
    }

    /// Names of all Services that are taken over, the apex first.
    pub fn service_names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.service_name()).chain(self.additional_services())
    }
}

/// What the derive cannot say.
pub(crate) fn definition(mut crd: CustomResourceDefinition) -> CustomResourceDefinition {
    // Applied by charts and tools that prune: say who keeps it.
    crd.metadata.annotations.get_or_insert_with(BTreeMap::new).insert("helm.sh/resource-policy".into(), "keep".into());
    crd
}
