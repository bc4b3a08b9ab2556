//! How a cluster's endpoints are used: circuit breakers, the life of connections, ejection of outliers, slow start, zones.
//!
//! What is not said is not limited, unlike in Envoy, where 1024 stands for it: our control plane says what it wants.

use std::time::Duration;

use sluice_xds::envoy::{
    config::{
        cluster::v3::{
            CircuitBreakers, Cluster as Message, OutlierDetection,
            cluster::{LbConfig, LeastRequestLbConfig, common_lb_config::LocalityConfigSpecifier},
        },
        core::v3::{HttpProtocolOptions, RoutingPriority},
    },
    r#type::v3::Percent,
};

use super::{ConfigError, cluster, route};
use crate::snapshot::{ConnectionPolicy, Limits, Outliers, SlowStart, TrafficPolicy};

/// Envoy's default (`healthy_panic_threshold`).
const PANIC: f64 = 50.0;

pub(super) fn parse(message: &Message) -> Result<TrafficPolicy, ConfigError> {
    let common = message.common_lb_config.as_ref();
    let panic = percent(common.and_then(|common| common.healthy_panic_threshold), PANIC, || {
        "common_lb_config.healthy_panic_threshold".to_owned()
    })?;
    let outliers = message.outlier_detection.as_ref().map(outliers).transpose()?;
    Ok(TrafficPolicy {
        limits: message.circuit_breakers.as_ref().map(limits).transpose()?.unwrap_or_default(),
        connections: ConnectionPolicy::default(),
        slow_start: match &message.lb_config {
            Some(LbConfig::LeastRequestLbConfig(config)) => least_request(config)?,
            Some(LbConfig::OriginalDstLbConfig(_)) | None => None,
        },
        outliers: outliers.flatten().map(|outliers| Outliers { panic, ..outliers }),
    })
}

fn least_request(message: &LeastRequestLbConfig) -> Result<Option<SlowStart>, ConfigError> {
    const FIELD: &str = "least_request_lb_config";
    if let Some(choices) = message.choice_count.filter(|choices| *choices != 2) {
        return Err(ConfigError::unsupported(format!("{FIELD}.choice_count"), choices, "2"));
    }
    let Some(config) = &message.slow_start_config else { return Ok(None) };
    let field = format!("{FIELD}.slow_start_config.slow_start_window");
    let window = duration(config.slow_start_window.as_ref(), || field.clone())?;
    let Some(window) = window.filter(|window| !window.is_zero()) else {
        return Err(ConfigError::missing(format!("{field} (above 0)")));
    };
    // Envoy's default (cluster.proto, SlowStartConfig).
    let least = percent(config.min_weight_percent, 10.0, || format!("{FIELD}.slow_start_config.min_weight_percent"))?;
    Ok(Some(SlowStart { window, least: least / 100.0 }))
}

/// From how many endpoints on the own zone is preferred, if it is.
pub(super) fn zones(message: &Message) -> Result<Option<u64>, ConfigError> {
    let common = message.common_lb_config.as_ref();
    let Some(LocalityConfigSpecifier::ZoneAwareLbConfig(config)) =
        common.and_then(|common| common.locality_config_specifier.as_ref())
    else {
        return Ok(None);
    };
    let field = || "common_lb_config.zone_aware_lb_config.routing_enabled".to_owned();
    let enabled = percent(config.routing_enabled, 100.0, field)?;
    if enabled > 0.0 && enabled < 100.0 {
        return Err(ConfigError::unsupported(field(), enabled, "0 and 100"));
    }
    // Envoy's default (cluster.proto, ZoneAwareLbConfig).
    Ok((enabled > 0.0).then(|| config.min_cluster_size.unwrap_or(6)))
}

/// The defaults are Envoy's (outlier_detection.proto).
fn outliers(message: &OutlierDetection) -> Result<Option<Outliers>, ConfigError> {
    let field = |name: &str| format!("outlier_detection.{name}");
    let time =
        |name: &str, said: Option<prost_types::Duration>, default: Duration| match duration(said.as_ref(), || {
            field(name)
        })? {
            Some(time) if time.is_zero() => Err(ConfigError::invalid(field(name), "0", "it must be above 0")),
            said => Ok(said.unwrap_or(default)),
        };
    // By success rate is the one way to eject that Envoy takes unless it is told not to, and that is not built here.
    match message.enforcing_success_rate {
        Some(0) => {}
        Some(enforced) => return Err(ConfigError::unsupported(field("enforcing_success_rate"), enforced, "0")),
        None => return Err(ConfigError::missing(format!("{} (0)", field("enforcing_success_rate")))),
    }
    let enforced = |name: &str, said: Option<u32>, default: u32| match said.unwrap_or(default) {
        0 => Ok(false),
        100 => Ok(true),
        other => Err(ConfigError::unsupported(field(name), other, "0 and 100")),
    };
    let of_servers = enforced("enforcing_consecutive_5xx", message.enforcing_consecutive_5xx, 100)?;
    let name = "enforcing_consecutive_gateway_failure";
    if message.consecutive_gateway_failure.is_some() && message.enforcing_consecutive_gateway_failure.is_none() {
        // Envoy would count and do nothing.
        return Err(ConfigError::missing(field(name)));
    }
    let of_gateways = enforced(name, message.enforcing_consecutive_gateway_failure, 0)?;
    let apart = message.split_external_local_origin_errors;
    if message.consecutive_local_origin_failure.is_some() && !apart {
        return Err(ConfigError::missing(field("split_external_local_origin_errors")));
    }
    let consecutive = |name: &str, counts: bool, said: Option<u32>| match said.unwrap_or(5) {
        _ if !counts => Ok(None),
        0 => Err(ConfigError::invalid(field(name), 0, "it must be above 0")),
        limit => Ok(Some(limit)),
    };
    let most_ejected = message.max_ejection_percent.unwrap_or(10);
    if most_ejected > 100 {
        return Err(ConfigError::invalid(field("max_ejection_percent"), most_ejected, "it must be from 0 to 100"));
    }
    let outliers = Outliers {
        server_errors: consecutive("consecutive_5xx", of_servers, message.consecutive_5xx)?,
        gateway_errors: consecutive("consecutive_gateway_failure", of_gateways, message.consecutive_gateway_failure)?,
        no_answers: consecutive("consecutive_local_origin_failure", apart, message.consecutive_local_origin_failure)?,
        no_answers_apart: apart,
        interval: time("interval", message.interval, Duration::from_secs(10))?,
        least: time("base_ejection_time", message.base_ejection_time, Duration::from_secs(30))?,
        most: time("max_ejection_time", message.max_ejection_time, Duration::from_secs(300))?,
        most_ejected,
        panic: PANIC,
    };
    let any = outliers.server_errors.or(outliers.gateway_errors).or(outliers.no_answers).is_some();
    Ok(any.then_some(outliers))
}

fn percent(said: Option<Percent>, default: f64, field: impl FnOnce() -> String) -> Result<f64, ConfigError> {
    let value = said.map_or(default, |percent| percent.value);
    if (0.0..=100.0).contains(&value) {
        Ok(value)
    } else {
        Err(ConfigError::invalid(field(), value, "it must be from 0 to 100"))
    }
}

fn limits(message: &CircuitBreakers) -> Result<Limits, ConfigError> {
    let mut found = None;
    for (at, threshold) in message.thresholds.iter().enumerate() {
        let field = format!("circuit_breakers.thresholds[{at}].priority");
        match RoutingPriority::try_from(threshold.priority) {
            Ok(priority @ RoutingPriority::Default) if found.is_some() => {
                return Err(ConfigError::invalid(field, priority.as_str_name(), "each priority may be named once"));
            }
            Ok(RoutingPriority::Default) => {
                found = Some(Limits {
                    connections: threshold.max_connections,
                    pending: threshold.max_pending_requests,
                    requests: threshold.max_requests,
                    retries: threshold.max_retries,
                });
            }
            Ok(priority @ RoutingPriority::High) => {
                return Err(ConfigError::unsupported(field, priority.as_str_name(), "DEFAULT"));
            }
            Err(_) => return Err(ConfigError::unsupported(field, threshold.priority, "DEFAULT")),
        }
    }
    Ok(found.unwrap_or_default())
}

/// `field` is where the message stands.
pub(super) fn connections(message: &HttpProtocolOptions, field: &str) -> Result<ConnectionPolicy, ConfigError> {
    route::no_time(message.max_stream_duration, || format!("{field}.max_stream_duration"))?;
    Ok(ConnectionPolicy {
        // 0 is never (protocol.proto, idle_timeout).
        idle: duration(message.idle_timeout.as_ref(), || format!("{field}.idle_timeout"))?
            .map(|idle| if idle.is_zero() { Duration::MAX } else { idle }),
        age: duration(message.max_connection_duration.as_ref(), || format!("{field}.max_connection_duration"))?
            .filter(|age| !age.is_zero()),
        // 0 is any number (Envoy, `ClusterInfoImpl::maxRequestsPerConnection`).
        requests: message.max_requests_per_connection.filter(|most| *most > 0),
    })
}

fn duration(
    said: Option<&prost_types::Duration>,
    field: impl FnOnce() -> String,
) -> Result<Option<Duration>, ConfigError> {
    let Some(said) = said else { return Ok(None) };
    cluster::duration(*said)
        .map(Some)
        .ok_or_else(|| ConfigError::invalid(field(), cluster::in_words(*said), "it must not be negative"))
}
