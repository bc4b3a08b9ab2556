//! What the fleet reads of a Service: its TCP ports, and what is spoken on each.

use k8s_openapi::{
    api::core::v1::{Service, ServicePort},
    apimachinery::pkg::util::intstr::IntOrString,
};
use sluice_crds::{PortRef, ServiceSpec};

/// What is spoken on a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.1, HTTP/2 or gRPC: split by request.
    Http,
    /// Bytes: split by connection.
    Tcp,
}

/// A TCP port of a Service.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Port {
    pub(super) number: u16,
    pub(super) protocol: Protocol,
    pub(super) target: IntOrString,
}

/// Decides what is spoken on a port. `spec` is that of the Canary.
///
/// The port that the Canary names: HTTP, unless `spec.service.appProtocol` or the Service's own `appProtocol` says
/// otherwise. Any other port: opaque, unless its `appProtocol` or the first word of its name says HTTP. Reading bytes as HTTP
/// that are not breaks them, and a port that nobody named is not measured anyway.
#[must_use]
pub fn protocol(port: &ServicePort, spec: &ServiceSpec) -> Protocol {
    let main = port.port == spec.port;
    let said = spec.app_protocol.as_deref().filter(|_| main).or(port.app_protocol.as_deref());
    let http = match said {
        Some(word) => says_http(word),
        None if main => true,
        None => port.name.as_deref().is_some_and(|name| says_http(name.split('-').next().unwrap_or(name))),
    };
    if http { Protocol::Http } else { Protocol::Tcp }
}

/// The words of KEP-3726 and of IANA's registry, and those that Istio reads. Everything else is opaque to us, HTTP inside
/// of TLS (`https`, `kubernetes.io/wss`) included.
fn says_http(word: &str) -> bool {
    let word = word.to_ascii_lowercase();
    let word = word.strip_prefix("kubernetes.io/").unwrap_or(&word);
    matches!(word, "http" | "http2" | "h2c" | "grpc" | "grpc-web" | "ws" | "web")
}

/// The TCP ports of a Service, in the order of their numbers, each number once.
pub(super) fn ports(service: &Service, spec: &ServiceSpec) -> Vec<Port> {
    let all = service.spec.iter().flat_map(|service| service.ports.iter().flatten());
    let mut ports: Vec<Port> = all
        .filter(|port| is_tcp(port))
        .filter_map(|port| {
            let number = u16::try_from(port.port).ok().filter(|number| *number != 0)?;
            // An absent targetPort is the same number (core/v1 ServicePort).
            let target = port.target_port.clone().unwrap_or(IntOrString::Int(port.port));
            Some(Port { number, protocol: protocol(port, spec), target })
        })
        .collect();
    ports.sort_by_key(|port| port.number);
    ports.dedup_by_key(|port| port.number);
    ports
}

pub(super) fn is_tcp(port: &ServicePort) -> bool {
    port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP")
}

/// What is known of the ports before there is a Service: the one that the Canary names.
pub(super) fn ports_of_spec(spec: &ServiceSpec) -> Vec<Port> {
    let Some(number) = u16::try_from(spec.port).ok().filter(|number| *number != 0) else {
        return Vec::new();
    };
    let target = match &spec.target_port {
        Some(PortRef::Number(number)) => IntOrString::Int(*number),
        Some(PortRef::Name(name)) => IntOrString::String(name.clone()),
        None => IntOrString::Int(spec.port),
    };
    let port = ServicePort { port: spec.port, ..ServicePort::default() };
    vec![Port { number, protocol: protocol(&port, spec), target }]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_spoken_on_a_port_follows_from_the_canary_then_from_the_service() {
        use Protocol::{Http, Tcp};
        // (number, name, appProtocol of the Service, appProtocol of the Canary, which names port 80)
        let cases = [
            (80, "", None, None, Http),
            (80, "tcp-db", None, None, Http),
            (80, "http", Some("TCP"), None, Tcp),
            (80, "http", None, Some("tcp"), Tcp),
            (80, "http", Some("tcp"), Some("http"), Http),
            (80, "x", Some("kubernetes.io/h2c"), None, Http),
            (80, "x", Some("kubernetes.io/wss"), None, Tcp),
            (80, "x", Some("example.com/own"), None, Tcp),
            (80, "x", None, Some("GRPC"), Http),
            (90, "", None, None, Tcp),
            (90, "http", None, None, Http),
            (90, "http-metrics", None, None, Http),
            (90, "grpc-web", None, None, Http),
            (90, "https", None, None, Tcp),
            (90, "https-web", None, None, Tcp),
            (90, "mysql", None, None, Tcp),
            (90, "http", Some("mysql"), None, Tcp),
            (90, "mysql", Some("http"), None, Http),
            (90, "x", None, Some("http"), Tcp),
        ];
        for (number, name, service, canary, expected) in cases {
            let port: ServicePort =
                serde_json::from_value(json!({"port": number, "name": name, "appProtocol": service})).unwrap();
            let spec: ServiceSpec = serde_json::from_value(json!({"port": 80, "appProtocol": canary})).unwrap();
            assert_eq!(protocol(&port, &spec), expected, "{number} {name:?} {service:?} {canary:?}");
        }
    }
}
