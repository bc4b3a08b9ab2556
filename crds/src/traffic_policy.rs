//! `spec.service.trafficPolicy`, in the words of Istio's `TrafficPolicy`, which Flagger's Canary uses.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    duration,
    unsupported::{UnsupportedList, UnsupportedNames, UnsupportedObject},
};

/// How the fleet treats the Pods of a revision. Nothing of it ever moves requests between primary and canary.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.tls) && !has(self.portLevelSettings) && !has(self.tunnel) && !has(self.proxyProtocol)").message("spec.service.trafficPolicy.tls, portLevelSettings, tunnel and proxyProtocol are not needed or not supported: between proxies of Sluice it is always mTLS. Remove them"))]
pub struct TrafficPolicy {
    /// Limits of one proxy of the fleet towards one revision.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connection_pool: Option<ConnectionPool>,
    /// Which Pods get no requests for a while.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outlier_detection: Option<OutlierDetection>,
    /// How a Pod is chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_balancer: Option<LoadBalancer>,
    /// Not needed; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<UnsupportedObject>,
    /// Refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port_level_settings: Option<UnsupportedList>,
    /// Refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tunnel: Option<UnsupportedObject>,
    /// Refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_protocol: Option<UnsupportedObject>,
}

/// Limits. What exceeds one is answered with 503 (flag UO), and counts as an error of the revision.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ConnectionPool {
    /// Of connections.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp: Option<TcpSettings>,
    /// Of requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpSettings>,
}

/// Limits of connections.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.connectTimeout) || (duration(self.connectTimeout) >= duration('1ms') && duration(self.connectTimeout) <= duration('1h'))").message("spec.service.trafficPolicy.connectionPool.tcp.connectTimeout: from 1ms to 1h"),
    validation = Rule::new("!has(self.tcpKeepalive) && !has(self.maxConnectionDuration)").message("spec.service.trafficPolicy.connectionPool.tcp.tcpKeepalive and maxConnectionDuration are not supported in this version; remove them")
)]
pub struct TcpSettings {
    /// Most connections to the Pods of a revision, of each proxy of the fleet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_connections: Option<i32>,
    /// How long connecting may take; 1 s by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), regex(pattern = duration::PATTERN))]
    pub connect_timeout: Option<String>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp_keepalive: Option<UnsupportedObject>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub max_connection_duration: Option<String>,
}

/// Limits of requests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.h2UpgradePolicy) && !has(self.useClientProtocol) && !has(self.maxConcurrentStreams)").message("spec.service.trafficPolicy.connectionPool.http.h2UpgradePolicy, useClientProtocol and maxConcurrentStreams are not supported in this version: the application is spoken to as the client speaks. Remove them"))]
pub struct HttpSettings {
    /// Most requests of HTTP/1.1 that wait for a connection, of each proxy of the fleet. Never more than the installation's
    /// `fleet.limits.requestsPerService`, which holds in place of a greater number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub http1_max_pending_requests: Option<i32>,
    /// Most requests that are open at once, of each proxy of the fleet; of HTTP/1.1 and of HTTP/2. Never more than the
    /// installation's `fleet.limits.requestsPerService`, which holds in place of a greater number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub http2_max_requests: Option<i32>,
    /// A connection is closed after so many requests; 0 is no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub max_requests_per_connection: Option<i32>,
    /// Most retries that are under way at once, of each proxy of the fleet; in place of the budget of `retries`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_retries: Option<i32>,
    /// How long a connection may be without requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), regex(pattern = duration::PATTERN))]
    pub idle_timeout: Option<String>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub h2_upgrade_policy: Option<String>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub use_client_protocol: Option<bool>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_concurrent_streams: Option<i32>,
}

/// A Pod that fails so often in a row gets no requests for a while. Pods that cannot be connected to are left alone without it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.consecutive5xxErrors) || has(self.consecutiveGatewayErrors)").message("spec.service.trafficPolicy.outlierDetection: say consecutive5xxErrors or consecutiveGatewayErrors"),
    validation = Rule::new("!has(self.baseEjectionTime) || duration(self.baseEjectionTime) > duration('0s')").message("spec.service.trafficPolicy.outlierDetection.baseEjectionTime must be above 0"),
    validation = Rule::new("!has(self.consecutiveErrors) && !has(self.splitExternalLocalOriginErrors) && !has(self.consecutiveLocalOriginFailures) && !has(self.minHealthPercent) && !has(self.interval)").message("spec.service.trafficPolicy.outlierDetection.consecutiveErrors, splitExternalLocalOriginErrors, consecutiveLocalOriginFailures, minHealthPercent and interval are not supported: failures are counted as they come (consecutive5xxErrors, consecutiveGatewayErrors). Remove them")
)]
pub struct OutlierDetection {
    /// So many answers of 500 to 599 in a row.
    #[serde(default, rename = "consecutive5xxErrors", skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000))]
    pub consecutive_5xx_errors: Option<i32>,
    /// So many answers of 502, 503 or 504, or none, in a row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000))]
    pub consecutive_gateway_errors: Option<i32>,
    /// How long the first time, and how much longer each further time, up to five minutes.
    #[serde(default = "default_ejection", skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), regex(pattern = duration::PATTERN))]
    pub base_ejection_time: Option<String>,
    /// Most Pods of a revision at once, in percent.
    #[serde(default = "default_ejection_percent")]
    #[schemars(range(min = 0, max = 100))]
    pub max_ejection_percent: i32,
    /// Not supported; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consecutive_errors: Option<i32>,
    /// Not supported; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split_external_local_origin_errors: Option<bool>,
    /// Not supported; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consecutive_local_origin_failures: Option<i32>,
    /// Not supported; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_health_percent: Option<i32>,
    /// Not supported; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub interval: Option<String>,
}

// Both as in Istio and Envoy.
fn default_ejection() -> Option<String> {
    Some("30s".to_owned())
}
fn default_ejection_percent() -> i32 {
    10
}

/// The less loaded one of two Pods.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.simple) || self.simple in ['LEAST_REQUEST', 'LEAST_CONN', 'UNSPECIFIED']").message("spec.service.trafficPolicy.loadBalancer.simple: Sluice chooses by LEAST_REQUEST only; remove it"),
    validation = Rule::new("!has(self.warmupDurationSecs) || duration(self.warmupDurationSecs) > duration('0s')").message("spec.service.trafficPolicy.loadBalancer.warmupDurationSecs must be above 0"),
    validation = Rule::new("!has(self.consistentHash) && !has(self.warmup)").message("spec.service.trafficPolicy.loadBalancer.consistentHash and warmup are not supported in this version (warmupDurationSecs is). Remove them")
)]
pub struct LoadBalancer {
    /// `LEAST_REQUEST`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub simple: Option<String>,
    /// A Pod that is new beside others gets a growing share of the requests for so long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), regex(pattern = duration::PATTERN))]
    pub warmup_duration_secs: Option<String>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consistent_hash: Option<UnsupportedObject>,
    /// Whether Pods in the zone of the proxy are preferred.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub locality_lb_setting: Option<LocalityLbSetting>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warmup: Option<UnsupportedObject>,
}

/// Which zones a proxy of the fleet prefers. By default as `spec.trafficDistribution` of the Service says (`PreferClose`, `PreferSameZone`).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.enabled) && !has(self.distribute) && !has(self.failover) && !has(self.failoverPriority)").message("spec.service.trafficPolicy.loadBalancer.localityLbSetting: say enabled, and nothing else: distribute, failover and failoverPriority are not supported in this version"))]
pub struct LocalityLbSetting {
    /// True: each proxy chooses among the Pods in its own zone while these are at least an equal share of the revision's Pods, and all
    /// of them otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enabled: Option<bool>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distribute: Option<UnsupportedList>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failover: Option<UnsupportedList>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failover_priority: Option<UnsupportedNames>,
}
