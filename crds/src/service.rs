//! `spec.service`: the Service whose traffic is split, and what the fleet does with its requests.

use std::{borrow::Cow, collections::BTreeMap};

use kube::KubeSchema;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use crate::{
    duration,
    fault::Fault,
    matching::{HttpMatch, StringMatch},
    traffic_policy::TrafficPolicy,
    unsupported::{UnsupportedList, UnsupportedNames, UnsupportedObject},
};

/// The Service whose traffic is split, and how its generated companions look.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.headless) || !self.headless").message("spec.service.headless is refused: clients of a headless Service dial the Pods and go past the fleet"),
    validation = Rule::new("!has(self.backendTimeout)").message("spec.service.backendTimeout is not supported in this version; remove it"),
    validation = Rule::new("(!has(self.timeout) && !has(self.retries) && !has(self.headers) && !has(self.match) && !has(self.rewrite) && !has(self.corsPolicy) && !has(self.fault)) || !has(self.appProtocol) || self.appProtocol.lowerAscii().replace('kubernetes.io/', '') in ['http', 'http2', 'h2c', 'grpc', 'grpc-web', 'ws', 'web']").message("spec.service.timeout, retries, headers, match, rewrite, corsPolicy and fault are for HTTP: on a port whose appProtocol is not, such as tcp or https, there are no requests. Remove them"),
    validation = Rule::new("!has(self.gateways) && !has(self.gatewayRefs) && !has(self.hosts) && !has(self.delegation) && !has(self.meshName) && !has(self.backends)").message("spec.service.gateways, gatewayRefs, hosts, delegation, meshName and backends belong to another mesh: the fleet splits the traffic of the Service itself. Remove them, and lead what comes from outside to the Service by a route of your own"),
    validation = Rule::new("!has(self.mirror)").message("spec.service.mirror is not supported in this version; remove it"),
    validation = Rule::new("!has(self.apex) && !has(self.primary) && !has(self.canary) && !has(self.unmanagedMetadata) && !has(self.trafficDistribution)").message("spec.service.apex, primary, canary, unmanagedMetadata and trafficDistribution are not supported in this version; remove them"),
    validation = Rule::new("has(self.additional) == has(oldSelf.additional) && (!has(self.additional) || self.additional == oldSelf.additional)").message("spec.service.additional cannot be changed: delete this Canary and create another one")
)]
pub struct ServiceSpec {
    /// Name of the Service; that of the target by default. Taken over if it exists, made otherwise. Cannot be changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 55))]
    pub name: Option<String>,
    /// Port of the Service.
    #[schemars(range(min = 1, max = 65535))]
    pub port: i32,
    /// Name of that port, for a Service that Sluice makes. `grpc` for gRPC.
    #[serde(default = "default_port_name")]
    #[schemars(length(min = 1, max = 15))]
    pub port_name: String,
    /// Port of the container, by number or by name; `port` by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_port: Option<PortRef>,
    /// For a Service that Sluice makes: also offers every other container port.
    #[serde(default)]
    pub port_discovery: bool,
    /// Protocol of the port: `http` (the default), `grpc`, `kubernetes.io/h2c`, `kubernetes.io/ws`, or `tcp` for bytes that are split by connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub app_protocol: Option<String>,
    /// Refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub headless: Option<bool>,
    /// How long a request may take, from its last byte to the last byte of its answer, all tries included: `15s`, `500ms`. What takes
    /// longer is answered with 504, or broken off where the answer has begun. Without one there is no limit. Not for WebSockets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), regex(pattern = duration::PATTERN))]
    pub timeout: Option<String>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub backend_timeout: Option<String>,
    /// Not needed; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateways: Option<UnsupportedNames>,
    /// Not needed; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway_refs: Option<UnsupportedList>,
    /// Not needed; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hosts: Option<UnsupportedNames>,
    /// Not needed; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delegation: Option<bool>,
    /// Limits towards the application, and which of its Pods are left alone for a while. Counts at once, not from the next release.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traffic_policy: Option<TrafficPolicy>,
    /// Only requests that match one of these are forwarded; others are answered with 404. Counts at once, not from the next release.
    #[serde(default, rename = "match", skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16))]
    pub matches: Option<Vec<HttpMatch>>,
    /// Changes the path or the host of requests. Counts at once, not from the next release.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rewrite: Option<Rewrite>,
    /// Sends requests again that may have been processed, to another Pod of the same revision where there is one. What is certain not to
    /// have been processed is sent again without it. Counts at once, not from the next release.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retries: Option<Retries>,
    /// Changes headers on their way through the fleet. Counts at once, not from the next release.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub headers: Option<Headers>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror: Option<UnsupportedList>,
    /// Which origins' scripts may read the answers. Preflights are answered by the fleet. Counts at once, not from the next release.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cors_policy: Option<CorsPolicy>,
    /// Goes wrong on purpose, to rehearse it. Counts at once, not from the next release, and against no version; while it is there the
    /// Canary has a warning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<Fault>,
    /// Not needed; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub mesh_name: Option<String>,
    /// Not needed; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backends: Option<UnsupportedNames>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub apex: Option<UnsupportedObject>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub primary: Option<UnsupportedObject>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub canary: Option<UnsupportedObject>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unmanaged_metadata: Option<UnsupportedObject>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub traffic_distribution: Option<String>,
    /// Further Services of the same Pods, which are there already: their traffic is split and counted like that of the first. They get no
    /// `-primary` and `-canary`. Cannot be changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 8), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub additional: Option<Vec<AdditionalService>>,
}

/// When and how often a request is sent again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Retries {
    /// Most tries after the first. A fifth of the requests that are open at once may be tried again, or three on each thread of the fleet.
    #[schemars(range(min = 1, max = 10))]
    pub attempts: i32,
    /// How long one try may take, from the last byte of the request to the first of the answer: `2s`. By default as long as
    /// `timeout` allows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), regex(pattern = duration::PATTERN))]
    pub per_try_timeout: Option<String>,
    /// What is followed by another try, in Envoy's words, with commas between: `5xx`, `gateway-error` (502, 503, 504), `reset` (no
    /// answer, which the first two include), `retriable-4xx` (409), and of gRPC `cancelled`, `deadline-exceeded`, `internal`, `resource-exhausted`,
    /// `unavailable`. `connect-failure` and `refused-stream` always are.
    #[serde(default = "default_retry_on")]
    #[schemars(length(max = 256), regex(pattern = RETRY_ON))]
    pub retry_on: String,
}

const RETRY_ON: &str = "^(5xx|gateway-error|reset|retriable-4xx|cancelled|deadline-exceeded|internal|resource-exhausted|unavailable|connect-failure|refused-stream)(, ?(5xx|gateway-error|reset|retriable-4xx|cancelled|deadline-exceeded|internal|resource-exhausted|unavailable|connect-failure|refused-stream))*$";

fn default_retry_on() -> String {
    // Istio's default, which manifests of Flagger rely on.
    "connect-failure,refused-stream,unavailable,cancelled".to_owned()
}

/// What happens to headers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Headers {
    /// Of requests, before they reach the application.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<HeaderOperations>,
    /// Of the application's answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub response: Option<HeaderOperations>,
}

/// Changes of headers: what is removed first, then what is set and added.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(validation = Rule::new("((has(self.set) ? self.set.map(name, name) : []) + (has(self.add) ? self.add.map(name, name) : []) + (has(self.remove) ? self.remove : [])).all(name, name.matches('^[A-Za-z0-9!#$&*+.^_|~-]{1,128}$') && !(name.lowerAscii() in ['host', 'content-length', 'transfer-encoding', 'connection', 'upgrade', 'te', 'trailer', 'keep-alive', 'proxy-connection']) && !name.lowerAscii().startsWith('x-sluice-'))").message("spec.service.headers: set, add and remove take names of headers, but of none that frames or addresses the message (Host, Content-Length, Connection and the like), and of none of Sluice's own (x-sluice-...). Remove it"))]
pub struct HeaderOperations {
    /// Put in the place of those of the same name. Values are visible ASCII and spaces, without `%`, which Envoy would replace.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16, "additionalProperties" = {"type": "string", "maxLength": 1024, "pattern": HEADER_VALUE}))]
    pub set: BTreeMap<String, String>,
    /// Put beside those of the same name. Values as in `set`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16, "additionalProperties" = {"type": "string", "maxLength": 1024, "pattern": HEADER_VALUE}))]
    pub add: BTreeMap<String, String>,
    /// Taken away.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(min = 1, max = 128)))]
    pub remove: Vec<String>,
}

const HEADER_VALUE: &str = "^[ -$&-~]*$";

/// What is put in place of a request's path or host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.uri) || has(self.uriRegexRewrite) || has(self.authority)").message("spec.service.rewrite: say uri, uriRegexRewrite or authority"),
    validation = Rule::new("!(has(self.uri) && has(self.uriRegexRewrite))").message("spec.service.rewrite: say either uri or uriRegexRewrite"),
    validation = Rule::new("!has(self.type)").message("spec.service.rewrite.type belongs to the Gateway API: remove it; uri replaces what a prefix of spec.service.match matched")
)]
pub struct Rewrite {
    /// In place of the prefix that `match` names; of the whole path where it names an exact path or a regex. Without `match`, in place of the leading `/`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024), regex(pattern = "^/[A-Za-z0-9._~!$&'()*+,;=:@%/-]*$"))]
    pub uri: Option<String>,
    /// By a regular expression.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uri_regex_rewrite: Option<RegexRewrite>,
    /// In place of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 1, max = 255),
        regex(
            pattern = "^([A-Za-z0-9._-]+|\\[[0-9A-Fa-f:.]+\\])(:([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]))?$"
        )
    )]
    pub authority: Option<String>,
    /// Refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub r#type: Option<String>,
}

/// A regular expression, and what is put in place of each of its matches in the path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
pub struct RegexRewrite {
    /// In the syntax of RE2.
    #[schemars(length(min = 1, max = 256))]
    #[x_kube(validation = Rule::new("''.matches(self) ? true : true").message("spec.service.rewrite.uriRegexRewrite.match is no regular expression of RE2"))]
    pub r#match: String,
    /// With `\\1` for the first group, up to `\\9`; `\\0` is all of the match.
    #[schemars(length(max = 1024), regex(pattern = "^([!\"$-;=?-\\[\\]-_a-z{|}~]|\\\\[0-9\\\\])*$"))]
    pub rewrite: String,
}

/// Cross-origin resource sharing (<https://fetch.spec.whatwg.org/#http-cors-protocol>).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.allowOrigin) || has(self.allowOrigins)").message("spec.service.corsPolicy: say allowOrigins"),
    validation = Rule::new("!has(self.allowOrigins) || self.allowOrigins.all(o, has(o.exact) || has(o.prefix) || has(o.regex))").message("spec.service.corsPolicy.allowOrigins: say exact, prefix or regex")
)]
pub struct CorsPolicy {
    /// Origins; `*` is any. The older way to write `allowOrigins`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(min = 1, max = 255)))]
    pub allow_origin: Vec<String>,
    /// Origins, such as `exact: https://shop.example.com`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub allow_origins: Vec<StringMatch>,
    /// Methods of `Access-Control-Allow-Methods`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(min = 1, max = 32), regex(pattern = "^([A-Za-z-]+|[*])$")))]
    pub allow_methods: Vec<String>,
    /// Headers of `Access-Control-Allow-Headers`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), inner(length(min = 1, max = 128), regex(pattern = "^([A-Za-z0-9_-]+|[*])$")))]
    pub allow_headers: Vec<String>,
    /// Headers of `Access-Control-Expose-Headers`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), inner(length(min = 1, max = 128), regex(pattern = "^([A-Za-z0-9_-]+|[*])$")))]
    pub expose_headers: Vec<String>,
    /// How long a browser remembers the answer to a preflight: `24h`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), regex(pattern = duration::PATTERN))]
    pub max_age: Option<String>,
    /// Whether scripts may send cookies and read the answers.
    #[serde(default)]
    pub allow_credentials: bool,
}

/// A further Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AdditionalService {
    /// Name of the Service in the Canary's namespace.
    #[schemars(length(min = 1, max = 55))]
    pub name: String,
}

fn default_port_name() -> String {
    "http".to_owned()
}

/// A port by number or by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PortRef {
    Number(i32),
    Name(String),
}

impl JsonSchema for PortRef {
    fn schema_name() -> Cow<'static, str> {
        "PortRef".into()
    }
    fn inline_schema() -> bool {
        true
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        // As long as the name of a container's port may be.
        json_schema!({"x-kubernetes-int-or-string": true, "anyOf": [{"type": "integer"}, {"type": "string"}], "maxLength": 15})
    }
}
