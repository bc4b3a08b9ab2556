//! `ClusterLoadAssignment`: the addresses that take requests.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use sluice_xds::envoy::config::{
    core::v3::{Address, HealthStatus, address, socket_address},
    endpoint::v3::{ClusterLoadAssignment, lb_endpoint::HostIdentifier},
};

use super::ConfigError;

/// The healthy addresses, sorted, each once.
pub(super) fn parse(assignment: &ClusterLoadAssignment) -> Result<Vec<SocketAddr>, ConfigError> {
    let mut addresses = BTreeSet::new();
    for (at, locality) in assignment.endpoints.iter().enumerate() {
        let field = format!("endpoints[{at}]");
        if locality.priority != 0 {
            return Err(ConfigError::unsupported(format!("{field}.priority"), locality.priority, "0"));
        }
        for (at, endpoint) in locality.lb_endpoints.iter().enumerate() {
            let field = format!("{field}.lb_endpoints[{at}]");
            let Some(HostIdentifier::Endpoint(host)) = &endpoint.host_identifier else {
                return Err(ConfigError::missing(format!("{field}.endpoint")));
            };
            let address = address(host.address.as_ref(), &format!("{field}.endpoint.address"))?;
            match HealthStatus::try_from(endpoint.health_status) {
                Ok(HealthStatus::Unknown | HealthStatus::Healthy) => {
                    addresses.insert(address);
                }
                // Not to be used, whatever the reason; an unknown status is no promise that it serves.
                Ok(
                    HealthStatus::Unhealthy | HealthStatus::Draining | HealthStatus::Timeout | HealthStatus::Degraded,
                )
                | Err(_) => {}
            }
        }
    }
    Ok(addresses.into_iter().collect())
}

/// An IP address with a port other than 0.
pub(super) fn address(address: Option<&Address>, field: &str) -> Result<SocketAddr, ConfigError> {
    let Some(address::Address::SocketAddress(socket)) = address.and_then(|a| a.address.as_ref()) else {
        return Err(ConfigError::missing(format!("{field}.socket_address")));
    };
    if socket.protocol != i32::from(socket_address::Protocol::Tcp) {
        return Err(ConfigError::unsupported(format!("{field}.socket_address.protocol"), socket.protocol, "TCP"));
    }
    let ip: IpAddr = socket.address.parse().map_err(|_| {
        ConfigError::invalid(format!("{field}.socket_address.address"), &socket.address, "it must be an IP address")
    })?;
    let port = match &socket.port_specifier {
        Some(socket_address::PortSpecifier::PortValue(port)) => {
            self::port(*port, &format!("{field}.socket_address.port_value"))?
        }
        Some(socket_address::PortSpecifier::NamedPort(name)) => {
            return Err(ConfigError::unsupported(format!("{field}.socket_address.named_port"), name, "port_value"));
        }
        None => {
            return Err(ConfigError::missing(format!("{field}.socket_address.port_value")));
        }
    };
    Ok(SocketAddr::new(ip, port))
}

pub(super) fn port(value: u32, field: &str) -> Result<u16, ConfigError> {
    match u16::try_from(value) {
        Ok(port) if port != 0 => Ok(port),
        Ok(_) | Err(_) => Err(ConfigError::invalid(field, value, "a port is a number from 1 to 65535")),
    }
}
