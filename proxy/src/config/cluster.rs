//! `Cluster`: where requests go.

use std::time::Duration;

use prost_types::value::Kind;
use sluice_xds::envoy::{
    config::{
        cluster::v3::{
            Cluster as Message,
            cluster::{ClusterDiscoveryType, DiscoveryType, LbConfig, LbPolicy},
        },
        core::v3::{ConfigSource, Http2ProtocolOptions, config_source::ConfigSourceSpecifier},
    },
    extensions::upstreams::http::v3::{
        HttpProtocolOptions,
        http_protocol_options::{ExplicitHttpConfig, UpstreamProtocolOptions, explicit_http_config::ProtocolConfig},
    },
};

use super::{
    ConfigError,
    endpoints::{self, Endpoints},
    tls, traffic,
};
use crate::snapshot::{ClientTls, ConnectionPolicy, MetricLabels, TrafficPolicy, UpstreamProtocol};

const PROTOCOL_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

/// A checked cluster, before its endpoints are known.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Cluster {
    pub(super) discovery: Discovery,
    pub(super) labels: Option<MetricLabels>,
    pub(super) tls: Option<ClientTls>,
    pub(super) protocol: UpstreamProtocol,
    pub(super) connect_timeout: Duration,
    pub(super) traffic: TrafficPolicy,
    /// From how many endpoints on those in this proxy's zone are preferred; `None` is never.
    pub(super) zones: Option<u64>,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Discovery {
    /// The name of its `ClusterLoadAssignment`.
    Eds(String),
    Static(Endpoints),
    OriginalDst {
        port: u16,
    },
}

pub(super) fn parse(message: &Message) -> Result<Cluster, ConfigError> {
    let discovery = discovery(message)?;
    balancing(message, &discovery)?;
    if let Discovery::OriginalDst { .. } = discovery {
        let several = [
            ("outlier_detection", message.outlier_detection.is_some()),
            ("common_lb_config", message.common_lb_config.is_some()),
        ];
        for (field, said) in several {
            if said {
                return Err(ConfigError::invalid(
                    field,
                    "set",
                    "a cluster of type ORIGINAL_DST has no choice of endpoints",
                ));
            }
        }
    }
    let (mut connections, mut protocol) = (ConnectionPolicy::default(), UpstreamProtocol::default());
    if let Some(options) = message.typed_extension_protocol_options.get(PROTOCOL_OPTIONS) {
        let field = format!("typed_extension_protocol_options[{PROTOCOL_OPTIONS}]");
        let options: HttpProtocolOptions = tls::read(options, &field)?;
        match options.upstream_protocol_options {
            Some(UpstreamProtocolOptions::UseDownstreamProtocolConfig(_)) => {}
            Some(UpstreamProtocolOptions::ExplicitHttpConfig(config)) => {
                protocol = explicit(&config, &format!("{field}.explicit_http_config"))?;
            }
            None => {
                return Err(ConfigError::missing(format!(
                    "{field}.use_downstream_protocol_config or .explicit_http_config"
                )));
            }
        }
        if let Some(common) = &options.common_http_protocol_options {
            connections = traffic::connections(common, &format!("{field}.common_http_protocol_options"))?;
        }
    }
    Ok(Cluster {
        discovery,
        labels: labels(message)?,
        tls: message.transport_socket.as_ref().map(tls::client).transpose()?,
        protocol,
        connect_timeout: connect_timeout(message)?,
        traffic: TrafficPolicy { connections, ..traffic::parse(message)? },
        zones: traffic::zones(message)?,
    })
}

/// One protocol for every client. Windows and streams are this proxy's own, and whoever sets them here means it.
fn explicit(config: &ExplicitHttpConfig, field: &str) -> Result<UpstreamProtocol, ConfigError> {
    match &config.protocol_config {
        Some(ProtocolConfig::HttpProtocolOptions(_)) => Ok(UpstreamProtocol::Http1),
        Some(ProtocolConfig::Http2ProtocolOptions(options)) => {
            own_windows(options, field)?;
            Ok(UpstreamProtocol::Http2)
        }
        None => Err(ConfigError::missing(format!("{field}.http_protocol_options or .http2_protocol_options"))),
    }
}

/// Windows and streams of HTTP/2 are this proxy's own. `field` has the options.
pub(super) fn own_windows(options: &Http2ProtocolOptions, field: &str) -> Result<(), ConfigError> {
    let numbers = [
        ("max_concurrent_streams", options.max_concurrent_streams),
        ("initial_stream_window_size", options.initial_stream_window_size),
        ("initial_connection_window_size", options.initial_connection_window_size),
    ];
    match numbers.into_iter().find_map(|(name, number)| Some((name, number?))) {
        Some((name, number)) => {
            Err(ConfigError::unsupported(format!("{field}.http2_protocol_options.{name}"), number, "none"))
        }
        None => Ok(()),
    }
}

fn discovery(message: &Message) -> Result<Discovery, ConfigError> {
    const SUPPORTED: &str = "EDS, STATIC and ORIGINAL_DST";
    let Some(ClusterDiscoveryType::Type(kind)) = message.cluster_discovery_type else {
        return Err(ConfigError::missing("type"));
    };
    match DiscoveryType::try_from(kind) {
        Ok(DiscoveryType::Eds) => {
            let eds = message.eds_cluster_config.as_ref();
            let eds = eds.ok_or_else(|| ConfigError::missing("eds_cluster_config"))?;
            from_ads(eds.eds_config.as_ref(), "eds_cluster_config.eds_config")?;
            let name = if eds.service_name.is_empty() { &message.name } else { &eds.service_name };
            Ok(Discovery::Eds(name.clone()))
        }
        Ok(DiscoveryType::Static) => {
            let assignment = message.load_assignment.as_ref();
            let assignment = assignment.ok_or_else(|| ConfigError::missing("load_assignment"))?;
            Ok(Discovery::Static(endpoints::parse(assignment)?))
        }
        Ok(DiscoveryType::OriginalDst) => {
            let Some(LbConfig::OriginalDstLbConfig(config)) = &message.lb_config else {
                return Err(ConfigError::missing("original_dst_lb_config"));
            };
            if config.use_http_header {
                // A header of the client's would choose the address that is dialled.
                return Err(ConfigError::unsupported("original_dst_lb_config.use_http_header", true, "false"));
            }
            let field = "original_dst_lb_config.upstream_port_override";
            let port = config.upstream_port_override.ok_or_else(|| ConfigError::missing(field))?;
            Ok(Discovery::OriginalDst { port: endpoints::port(port, field)? })
        }
        Ok(kind @ (DiscoveryType::StrictDns | DiscoveryType::LogicalDns)) => {
            Err(ConfigError::unsupported("type", kind.as_str_name(), SUPPORTED))
        }
        Err(_) => Err(ConfigError::unsupported("type", kind, SUPPORTED)),
    }
}

/// With one address there is nothing to balance, so only clusters of several must ask for what we do.
fn balancing(message: &Message, discovery: &Discovery) -> Result<(), ConfigError> {
    let choice = match discovery {
        Discovery::Eds(_) => true,
        Discovery::Static(endpoints) => endpoints.len() > 1,
        Discovery::OriginalDst { .. } => false,
    };
    if choice && message.lb_policy != i32::from(LbPolicy::LeastRequest) {
        let found = LbPolicy::try_from(message.lb_policy)
            .map_or_else(|_| message.lb_policy.to_string(), |policy| policy.as_str_name().to_owned());
        return Err(ConfigError::unsupported("lb_policy", found, "LEAST_REQUEST"));
    }
    Ok(())
}

pub(super) fn from_ads(source: Option<&ConfigSource>, field: &str) -> Result<(), ConfigError> {
    match source.and_then(|source| source.config_source_specifier.as_ref()) {
        Some(ConfigSourceSpecifier::Ads(_)) => Ok(()),
        Some(ConfigSourceSpecifier::Self_(_)) => Err(ConfigError::unsupported(field, "self", "ads")),
        None => Err(ConfigError::missing(format!("{field}.ads"))),
    }
}

fn connect_timeout(message: &Message) -> Result<Duration, ConfigError> {
    // Envoy's default (cluster.proto, connect_timeout).
    const DEFAULT: Duration = Duration::from_secs(5);
    let Some(timeout) = message.connect_timeout else {
        return Ok(DEFAULT);
    };
    match duration(timeout) {
        Some(timeout) if timeout >= Duration::from_millis(1) && timeout <= Duration::from_secs(3600) => Ok(timeout),
        Some(_) | None => {
            Err(ConfigError::invalid("connect_timeout", in_words(timeout), "it must be from 1 ms to 1 h"))
        }
    }
}

/// `None` if it is negative, or not one by protobuf's rules (`google/protobuf/duration.proto`). `Duration::try_from` takes seconds
/// whose milliseconds fit nowhere, and negates what is negative, which overflows with the least number.
pub(super) fn duration(said: prost_types::Duration) -> Option<Duration> {
    const MOST_SECONDS: u64 = 315_576_000_000;
    let seconds = u64::try_from(said.seconds).ok().filter(|seconds| *seconds <= MOST_SECONDS)?;
    let nanos = u32::try_from(said.nanos).ok().filter(|nanos| *nanos < 1_000_000_000)?;
    Some(Duration::new(seconds, nanos))
}

/// A time as it was said, whatever that is.
pub(super) fn in_words(said: prost_types::Duration) -> String {
    format!("{} s {} ns", said.seconds, said.nanos)
}

fn labels(message: &Message) -> Result<Option<MetricLabels>, ConfigError> {
    const OURS: &str = "sluice.dev";
    let Some(ours) = message.metadata.as_ref().and_then(|metadata| metadata.filter_metadata.get(OURS)) else {
        return Ok(None);
    };
    let label = |name: &str| {
        let value = ours.fields.get(name).and_then(|value| value.kind.as_ref());
        if let Some(Kind::StringValue(text)) = value {
            Ok(text.clone())
        } else {
            Err(ConfigError::missing(format!("metadata.filter_metadata[{OURS}].{name} (a string)")))
        }
    };
    Ok(Some(MetricLabels {
        destination_namespace: label("destination_namespace")?,
        destination_service: label("destination_service")?,
        revision: label("revision")?,
    }))
}
