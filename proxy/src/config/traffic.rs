//! How a cluster's endpoints are used: circuit breakers and the life of connections.
//!
//! What is not said is not limited, unlike in Envoy, where 1024 stands for it: our control plane says what it wants.

use std::time::Duration;

use sluice_xds::envoy::config::{
    cluster::v3::{CircuitBreakers, Cluster as Message},
    core::v3::{HttpProtocolOptions, RoutingPriority},
};

use super::ConfigError;
use crate::snapshot::{ConnectionPolicy, Limits, TrafficPolicy};

pub(super) fn parse(message: &Message) -> Result<TrafficPolicy, ConfigError> {
    Ok(TrafficPolicy {
        limits: message.circuit_breakers.as_ref().map(limits).transpose()?.unwrap_or_default(),
        connections: ConnectionPolicy::default(),
    })
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
    Duration::try_from(*said).map(Some).map_err(|_| {
        let said = format!("{} s {} ns", said.seconds, said.nanos);
        ConfigError::invalid(field(), said, "it must not be negative")
    })
}
