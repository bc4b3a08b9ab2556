//! The API of Sluice: `Canary` and `MetricTemplate`, group `sluice.dev`, version `v1beta1`.
//!
//! Field names follow Flagger's `flagger.app/v1beta1` wherever the meaning is the same, so that a manifest moves over by
//! changing its `apiVersion`. Fields of Flagger's that Sluice does not have yet are declared and *refused*: pruning them
//! silently would run a release without its gate.
//!
//! This crate depends on nothing else of ours. `cargo run -p sluice-crds --bin crdgen` prints the CRDs.
#![forbid(unsafe_code)]

mod canary;
mod duration;
mod fault;
pub mod labels;
mod matching;
mod metric_template;
mod service;
mod status;
mod traffic_policy;
mod unsupported;

pub use canary::{
    Analysis, AutoscalerRef, Canary, CanarySpec, Guard, Inconclusive, InconclusiveAction, Metric, ObjectReference,
    ScalerReplicas, SessionAffinity, TargetRef, ThresholdRange,
};
pub use duration::{DurationError, parse_duration};
pub use fault::{Fault, FaultAbort, FaultDelay, GrpcStatus, Percentage};
pub use matching::{HttpMatch, StringMatch};
pub use metric_template::{
    HeaderValue, HeaderValues, MetricTemplate, MetricTemplateSpec, Provider, ProviderType, SecretReference,
};
pub use service::{
    AdditionalService, CorsPolicy, HeaderOperations, Headers, PortRef, RegexRewrite, Retries, Rewrite, ServiceSpec,
};
pub use status::{
    ActionOutcome, ActionStatus, Backend, CanaryStatus, Condition, ConditionStatus, FrozenPlan, FrozenStep, GateStatus,
    GuardSide, GuardSignal, GuardStatus, PausedRelease, PendingRelease, Phase, RejectedRevision, Retiring, Rollback,
    Stage, TemplateStatus, Traffic, Verb, VerdictStatus, Waiting,
};
pub use traffic_policy::{
    ConnectionPool, HttpSettings, LoadBalancer, LocalityLbSetting, OutlierDetection, TcpSettings, TrafficPolicy,
};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;

/// API group of everything in this crate.
pub const GROUP: &str = "sluice.dev";

/// All CustomResourceDefinitions, in the order in which they should be applied.
#[must_use]
pub fn crds() -> Vec<CustomResourceDefinition> {
    vec![canary::definition(Canary::crd()), MetricTemplate::crd()]
}
