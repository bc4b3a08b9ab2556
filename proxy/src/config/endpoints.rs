//! `ClusterLoadAssignment`: the addresses that take requests.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use sluice_xds::envoy::config::{
    core::v3::{Address, HealthStatus, address, socket_address},
    endpoint::v3::{ClusterLoadAssignment, lb_endpoint::HostIdentifier},
};

use super::ConfigError;

/// Healthy addresses, each with its zone, which may be empty.
pub(super) type Endpoints = BTreeMap<SocketAddr, String>;

/// A locality's weight says nothing without `locality_weighted_lb_config`, as in Envoy.
pub(super) fn parse(assignment: &ClusterLoadAssignment) -> Result<Endpoints, ConfigError> {
    let mut addresses = Endpoints::new();
    for (at, locality) in assignment.endpoints.iter().enumerate() {
        let field = format!("endpoints[{at}]");
        if locality.priority != 0 {
            return Err(ConfigError::unsupported(format!("{field}.priority"), locality.priority, "0"));
        }
        let zone = locality.locality.as_ref().map_or("", |locality| &locality.zone);
        for (at, endpoint) in locality.lb_endpoints.iter().enumerate() {
            let field = format!("{field}.lb_endpoints[{at}]");
            let Some(HostIdentifier::Endpoint(host)) = &endpoint.host_identifier else {
                return Err(ConfigError::missing(format!("{field}.endpoint")));
            };
            if let Some(weight) = endpoint.load_balancing_weight.filter(|weight| *weight != 1) {
                return Err(ConfigError::unsupported(format!("{field}.load_balancing_weight"), weight, "1"));
            }
            let address = address(host.address.as_ref(), &format!("{field}.endpoint.address"))?;
            match HealthStatus::try_from(endpoint.health_status) {
                Ok(HealthStatus::Unknown | HealthStatus::Healthy) => {
                    addresses.entry(address).or_insert_with(|| zone.to_owned());
                }
                // Not to be used, whatever the reason; an unknown status is no promise that it serves.
                Ok(
                    HealthStatus::Unhealthy | HealthStatus::Draining | HealthStatus::Timeout | HealthStatus::Degraded,
                )
                | Err(_) => {}
            }
        }
    }
    Ok(addresses)
}

/// Those in this proxy's zone, if it is to stay there: only while they are at least an equal share of all, so that no zone has
/// to bear the requests of more proxies than its endpoints are for, and from `least` endpoints on
/// (`ZoneAwareLbConfig.min_cluster_size`).
pub(super) fn near(endpoints: &Endpoints, zone: &str, least: u64) -> Vec<SocketAddr> {
    let zones = endpoints.values().collect::<BTreeSet<_>>().len();
    let near: Vec<_> = endpoints.iter().filter(|(_, of)| of.as_str() == zone).map(|(address, _)| *address).collect();
    let enough = endpoints.len() as u64 >= least && near.len() * zones >= endpoints.len();
    if enough && near.len() < endpoints.len() { near } else { Vec::new() }
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
