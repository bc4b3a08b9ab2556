//! `MetricTemplate`: a query that several Canaries share.

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A metric query that Canaries refer to by `metrics[].templateRef`.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[expect(clippy::duplicated_attributes, reason = "two columns of one type are no duplicate")]
#[kube(
    group = "sluice.dev",
    version = "v1beta1",
    kind = "MetricTemplate",
    plural = "metrictemplates",
    shortname = "mt",
    category = "sluice",
    namespaced,
    derive = "PartialEq",
    doc = "A metric query that Canaries refer to by `metrics[].templateRef`.",
    printcolumn(name = "Provider", type_ = "string", json_path = ".spec.provider.type"),
    printcolumn(name = "Address", type_ = "string", json_path = ".spec.provider.address", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct MetricTemplateSpec {
    /// Where the query goes.
    pub provider: Provider,
    /// PromQL that yields exactly one number. Flagger's template variables are replaced first: `{{ name }}`,
    /// `{{ namespace }}`, `{{ target }}`, `{{ service }}`, `{{ ingress }}`, `{{ route }}`, `{{ interval }}`, `{{ variables.KEY }}`; also
    /// `{{ primary }}` and `{{ canary }}` (the revisions) and `{{ revision }}` (the one under judgement).
    #[schemars(length(min = 1, max = 8192))]
    pub query: String,
}

/// Where a query goes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.region)").message("provider.region belongs to a provider that is not supported in this version"),
    validation = Rule::new("!has(self.headers) || self.headers.all(name, name.matches('^[A-Za-z0-9!#$&*+.^_|~-]{1,128}$'))").message("provider.headers takes names of headers")
)]
pub struct Provider {
    /// Kind of provider. This version knows `prometheus`.
    #[serde(rename = "type")]
    pub kind: ProviderType,
    /// Base URL of the HTTP API, such as `http://prometheus.monitoring:9090`.
    #[schemars(length(min = 1, max = 2048), regex(pattern = "^https?://"))]
    pub address: String,
    /// Secret in the MetricTemplate's namespace: `username` and `password` for basic auth, or `token` for a bearer token;
    /// `ca.crt` (PEM) for a CA of your own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretReference>,
    /// HTTP headers of every query.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub headers: BTreeMap<String, HeaderValues>,
    /// Does not check the server's certificate. For tests only.
    #[serde(default)]
    pub insecure_skip_verify: bool,
    /// Not supported in this version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub region: Option<String>,
}

/// All values of an HTTP header.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct HeaderValues(#[schemars(length(max = 16))] pub Vec<HeaderValue>);

/// One value of an HTTP header.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct HeaderValue(#[schemars(length(max = 1024))] pub String);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ProviderType {
    Prometheus,
}

/// A Secret in the same namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SecretReference {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}
