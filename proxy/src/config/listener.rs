//! `Listener`: a port, and what its connections carry.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use prost::Name;
use sluice_xds::{
    TYPE_URL_PREFIX,
    envoy::{
        config::listener::v3::{
            Filter, FilterChain, Listener as Message, filter::ConfigType as FilterConfig,
            listener_filter::ConfigType as ListenerFilterConfig,
        },
        extensions::filters::{
            http::{cors::v3::Cors, fault::v3::HttpFault, router::v3::Router},
            listener::{http_inspector::v3::HttpInspector, tls_inspector::v3::TlsInspector},
            network::{
                connection_limit::v3::ConnectionLimit,
                http_connection_manager::v3::{
                    HttpConnectionManager,
                    http_connection_manager::{CodecType, RouteSpecifier, ServerHeaderTransformation},
                    http_filter::ConfigType as HttpFilterConfig,
                },
                tcp_proxy::v3::{TcpProxy, tcp_proxy::ClusterSpecifier},
            },
        },
    },
};

use super::{
    ConfigError, cluster, endpoints, fault,
    route::{self, Routes, Targets},
    tls,
};
use crate::{snapshot::ServerTls, worker::tcp::MAX_TRIES};

/// Ports of the proxy itself (docs/xds.md, "Ports").
const OWN_PORTS: [u16; 2] = [20444, 20445];

/// A checked listener, before its routes and clusters are known.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Listener {
    pub(super) address: SocketAddr,
    pub(super) chains: Vec<Chain>,
    pub(super) max_connections: Option<u64>,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Chain {
    pub(super) server_name: Option<String>,
    pub(super) tls: Option<ServerTls>,
    pub(super) protocol: Protocol,
    pub(super) idle: Option<Duration>,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Protocol {
    /// HTTP by the `RouteConfiguration` of this name.
    Rds(String),
    Http(Routes),
    Tcp(Targets),
}

impl Listener {
    /// The names of the `RouteConfiguration`s that it needs.
    pub(super) fn routes(&self) -> impl Iterator<Item = &str> {
        self.chains.iter().filter_map(|chain| match &chain.protocol {
            Protocol::Rds(name) => Some(name.as_str()),
            Protocol::Http(_) | Protocol::Tcp(_) => None,
        })
    }

    /// The clusters that it names itself, not by way of a route of its own version.
    pub(super) fn clusters(&self) -> impl Iterator<Item = &str> {
        self.chains.iter().flat_map(|chain| {
            let (routes, targets) = match &chain.protocol {
                Protocol::Rds(_) => (None, None),
                Protocol::Http(routes) => (Some(routes), None),
                Protocol::Tcp(targets) => (None, Some(targets)),
            };
            let inline = routes.into_iter().flat_map(Routes::clusters);
            inline.chain(targets.into_iter().flatten().map(|(name, _)| name.as_str()))
        })
    }
}

pub(super) fn parse(message: &Message) -> Result<Listener, ConfigError> {
    let address = endpoints::address(message.address.as_ref(), "address")?;
    if OWN_PORTS.contains(&address.port()) {
        return Err(ConfigError::invalid("address", address, "the proxy needs this port itself"));
    }
    for (at, filter) in message.listener_filters.iter().enumerate() {
        let found = match &filter.config_type {
            Some(ListenerFilterConfig::TypedConfig(any)) => any.type_url.as_str(),
            None => "",
        };
        // Both only look at the first bytes, which the data path does wherever it needs to.
        if ![TlsInspector::full_name(), HttpInspector::full_name()].iter().any(|name| is_type(found, name)) {
            let field = format!("listener_filters[{at}].typed_config");
            return Err(ConfigError::unsupported(field, found, "TlsInspector and HttpInspector"));
        }
    }

    let mut max_connections = None;
    let mut chains = Vec::with_capacity(message.filter_chains.len() + 1);
    for (at, chain) in message.filter_chains.iter().enumerate() {
        chains.push(parse_chain(chain, &format!("filter_chains[{at}]"), &mut max_connections)?);
    }
    if let Some(chain) = &message.default_filter_chain {
        let chain = parse_chain(chain, "default_filter_chain", &mut max_connections)?;
        if chain.server_name.is_some() {
            return Err(ConfigError::invalid(
                "default_filter_chain.filter_chain_match",
                "set",
                "the default takes what no other chain matches",
            ));
        }
        chains.push(chain);
    }
    distinct(&chains)?;
    if max_connections.is_some() && chains.len() > 1 {
        let found = format!("{} filter chains", chains.len());
        return Err(ConfigError::unsupported(
            "filter_chains with a ConnectionLimit",
            found,
            "it where there is one chain",
        ));
    }
    Ok(Listener { address, chains, max_connections })
}

/// Each connection has exactly one chain: by its SNI, or the one without a name.
fn distinct(chains: &[Chain]) -> Result<(), ConfigError> {
    let Some(first) = chains.first() else {
        return Err(ConfigError::missing("filter_chains"));
    };
    let mut names = BTreeSet::new();
    for (at, chain) in chains.iter().enumerate() {
        let name = chain.server_name.as_deref();
        if !names.insert(name) {
            let field = format!("filter_chains[{at}].filter_chain_match.server_names");
            return Err(ConfigError::invalid(field, name.unwrap_or("any"), "an earlier chain takes the same"));
        }
        if chain.tls.is_some() != first.tls.is_some() {
            let field = format!("filter_chains[{at}].transport_socket");
            return Err(ConfigError::unsupported(field, "mixed", "TLS for all chains of a listener or for none"));
        }
    }
    Ok(())
}

/// `limit` is where a limit of connections goes to: who it is for is not known before a connection is accepted.
fn parse_chain(chain: &FilterChain, field: &str, limit: &mut Option<u64>) -> Result<Chain, ConfigError> {
    let tls = chain.transport_socket.as_ref().map(tls::server).transpose()?;
    let server_name = server_name(chain, tls.is_some(), &format!("{field}.filter_chain_match"))?;
    let filter = match chain.filters.as_slice() {
        [filter] => filter,
        [first, filter] => {
            *limit = connection_limit(first, &format!("{field}.filters[0]"))?;
            filter
        }
        several => {
            let found = format!("{} filters", several.len());
            let supported = "HttpConnectionManager or TcpProxy, and at most a ConnectionLimit before it";
            return Err(ConfigError::unsupported(format!("{field}.filters"), found, supported));
        }
    };
    let (protocol, idle) = protocol(filter, &format!("{field}.filters[{}]", chain.filters.len() - 1))?;
    Ok(Chain { server_name, tls, protocol, idle })
}

fn server_name(chain: &FilterChain, tls: bool, field: &str) -> Result<Option<String>, ConfigError> {
    let Some(rule) = &chain.filter_chain_match else {
        return Ok(None);
    };
    if let Some(port) = rule.destination_port {
        return Err(ConfigError::unsupported(format!("{field}.destination_port"), port, "no such match"));
    }
    if !rule.application_protocols.is_empty() {
        let found = rule.application_protocols.join(", ");
        return Err(ConfigError::unsupported(format!("{field}.application_protocols"), found, "no such match"));
    }
    let transport = rule.transport_protocol.as_str();
    if !(transport.is_empty() || transport == if tls { "tls" } else { "raw_buffer" }) {
        let field = format!("{field}.transport_protocol");
        return Err(ConfigError::invalid(field, transport, "it must fit the transport_socket of the chain"));
    }
    match rule.server_names.as_slice() {
        [] => Ok(None),
        [_] if !tls => Err(ConfigError::invalid(format!("{field}.server_names"), "set", "only TLS has a server name")),
        // Matched against what rustls hands out, which is lower case without a final dot.
        [name] => match rustls::pki_types::DnsName::try_from(name.as_str()) {
            Ok(_) if !name.ends_with('.') && !name.starts_with('*') => Ok(Some(name.to_ascii_lowercase())),
            Ok(_) | Err(_) => {
                Err(ConfigError::invalid(format!("{field}.server_names[0]"), name, "it must be a full DNS name"))
            }
        },
        several => {
            let found = several.join(", ");
            Err(ConfigError::unsupported(format!("{field}.server_names"), found, "one name for each chain"))
        }
    }
}

/// How many connections there may be; `None` if it is switched off.
fn connection_limit(filter: &Filter, field: &str) -> Result<Option<u64>, ConfigError> {
    let Some(FilterConfig::TypedConfig(any)) = &filter.config_type else {
        return Err(ConfigError::missing(format!("{field}.typed_config")));
    };
    let field = format!("{field}.typed_config");
    if !is_type(&any.type_url, &ConnectionLimit::full_name()) {
        return Err(ConfigError::unsupported(field, &any.type_url, "ConnectionLimit before the last filter"));
    }
    let limit: ConnectionLimit = tls::read(any, &field)?;
    // Envoy would hold a connection that is refused for so long (connection_limit.proto).
    if let Some(delay) = limit.delay.filter(|delay| (delay.seconds, delay.nanos) != (0, 0)) {
        let found = format!("{} s {} ns", delay.seconds, delay.nanos);
        return Err(ConfigError::unsupported(format!("{field}.delay"), found, "no delay"));
    }
    let enabled = limit.runtime_enabled.and_then(|flag| flag.default_value).unwrap_or(true);
    match limit.max_connections {
        None => Err(ConfigError::missing(format!("{field}.max_connections"))),
        Some(0) => Err(ConfigError::invalid(format!("{field}.max_connections"), 0, "it must be above 0")),
        Some(most) => Ok(enabled.then_some(most)),
    }
}

/// Beside the protocol, for how long nothing may rest. Unlike in Envoy, what is not said is no limit: the controller always says it.
fn protocol(filter: &Filter, field: &str) -> Result<(Protocol, Option<Duration>), ConfigError> {
    let Some(FilterConfig::TypedConfig(any)) = &filter.config_type else {
        return Err(ConfigError::missing(format!("{field}.typed_config")));
    };
    let field = format!("{field}.typed_config");
    if is_type(&any.type_url, &HttpConnectionManager::full_name()) {
        let manager: HttpConnectionManager = tls::read(any, &field)?;
        let idle = route::duration(manager.stream_idle_timeout.as_ref(), || format!("{field}.stream_idle_timeout"))?;
        Ok((http(&manager, &field)?, idle))
    } else if is_type(&any.type_url, &TcpProxy::full_name()) {
        let proxy: TcpProxy = tls::read(any, &field)?;
        let idle = route::duration(proxy.idle_timeout.as_ref(), || format!("{field}.idle_timeout"))?;
        Ok((tcp(&proxy, &field)?, idle))
    } else {
        Err(ConfigError::unsupported(field, &any.type_url, "HttpConnectionManager and TcpProxy"))
    }
}

fn http(manager: &HttpConnectionManager, field: &str) -> Result<Protocol, ConfigError> {
    if manager.codec_type != i32::from(CodecType::Auto) {
        return Err(ConfigError::unsupported(format!("{field}.codec_type"), manager.codec_type, "AUTO"));
    }
    for (at, upgrade) in manager.upgrade_configs.iter().enumerate() {
        if !upgrade.upgrade_type.eq_ignore_ascii_case("websocket") {
            let field = format!("{field}.upgrade_configs[{at}].upgrade_type");
            return Err(ConfigError::unsupported(field, &upgrade.upgrade_type, "websocket"));
        }
        if upgrade.enabled == Some(false) {
            let field = format!("{field}.upgrade_configs[{at}].enabled");
            return Err(ConfigError::unsupported(field, false, "WebSocket for all"));
        }
    }
    not_done(manager, field)?;
    let mut router = false;
    for (at, filter) in manager.http_filters.iter().enumerate() {
        let found = match &filter.config_type {
            Some(HttpFilterConfig::TypedConfig(any)) => any.type_url.as_str(),
            None => "",
        };
        router = is_type(found, &Router::full_name());
        if let Some(HttpFilterConfig::TypedConfig(any)) = &filter.config_type
            && is_type(found, &HttpFault::full_name())
        {
            fault::of_listener(any, &format!("{field}.http_filters[{at}].typed_config"))?;
            continue;
        }
        // It does what a route says. By itself it says nothing.
        let by_route = is_type(found, &Cors::full_name());
        // gRFC A39: a filter may be left out only if it says so itself.
        if !router && !by_route && !filter.is_optional && !filter.disabled {
            let field = format!("{field}.http_filters[{at}].typed_config");
            return Err(ConfigError::unsupported(field, found, "Router, Cors and HTTPFault"));
        }
    }
    if !router {
        return Err(ConfigError::missing(format!("{field}.http_filters (Router, at the end)")));
    }
    match &manager.route_specifier {
        Some(RouteSpecifier::Rds(rds)) => {
            cluster::from_ads(rds.config_source.as_ref(), &format!("{field}.rds.config_source"))?;
            if rds.route_config_name.is_empty() {
                return Err(ConfigError::missing(format!("{field}.rds.route_config_name")));
            }
            Ok(Protocol::Rds(rds.route_config_name.clone()))
        }
        Some(RouteSpecifier::RouteConfig(config)) => {
            Ok(Protocol::Http(route::parse(config, &format!("{field}.route_config."))?))
        }
        None => Err(ConfigError::missing(format!("{field}.rds"))),
    }
}

/// What a connection manager may say that would be something else than what is done here. Times that are 0 are none.
fn not_done(manager: &HttpConnectionManager, field: &str) -> Result<(), ConfigError> {
    let refuse = |name: &str, found: String, supported| {
        Err(ConfigError::unsupported(format!("{field}.{name}"), found, supported))
    };
    route::no_time(manager.request_timeout, || format!("{field}.request_timeout"))?;
    route::no_time(manager.request_headers_timeout, || format!("{field}.request_headers_timeout"))?;
    if let Some(said) = manager.drain_timeout {
        return refuse("drain_timeout", cluster::in_words(said), "its own drain");
    }
    if let Some(common) = &manager.common_http_protocol_options {
        let field = format!("{field}.common_http_protocol_options");
        if let Some(said) = common.idle_timeout {
            let field = format!("{field}.idle_timeout");
            return Err(ConfigError::unsupported(field, cluster::in_words(said), "its own time of an hour"));
        }
        route::no_time(common.max_connection_duration, || format!("{field}.max_connection_duration"))?;
        route::no_time(common.max_stream_duration, || format!("{field}.max_stream_duration"))?;
        if let Some(most) = common.max_requests_per_connection.filter(|most| *most > 0) {
            return Err(ConfigError::unsupported(format!("{field}.max_requests_per_connection"), most, "0"));
        }
    }
    if let Some(options) = &manager.http2_protocol_options {
        cluster::own_windows(options, field)?;
    }
    if manager.server_header_transformation == i32::from(ServerHeaderTransformation::AppendIfAbsent) {
        return refuse("server_header_transformation", "APPEND_IF_ABSENT".to_owned(), "PASS_THROUGH");
    }
    if manager.use_remote_address == Some(false) {
        return refuse("use_remote_address", "false".to_owned(), "true");
    }
    if manager.generate_request_id == Some(true) {
        return refuse("generate_request_id", "true".to_owned(), "false");
    }
    Ok(())
}

fn tcp(proxy: &TcpProxy, field: &str) -> Result<Protocol, ConfigError> {
    route::no_time(proxy.max_downstream_connection_duration, || format!("{field}.max_downstream_connection_duration"))?;
    if let Some(tries) = proxy.max_connect_attempts.filter(|tries| *tries != MAX_TRIES) {
        return Err(ConfigError::unsupported(format!("{field}.max_connect_attempts"), tries, "3"));
    }

    let targets = match &proxy.cluster_specifier {
        Some(ClusterSpecifier::Cluster(name)) => route::targets([(name.as_str(), 1)], &format!("{field}.cluster")),
        Some(ClusterSpecifier::WeightedClusters(weighted)) => route::targets(
            weighted.clusters.iter().map(|cluster| (cluster.name.as_str(), cluster.weight)),
            &format!("{field}.weighted_clusters.clusters"),
        ),
        None => Err(ConfigError::missing(format!("{field}.weighted_clusters"))),
    }?;
    Ok(Protocol::Tcp(targets))
}

fn is_type(url: &str, name: &str) -> bool {
    url.strip_prefix(TYPE_URL_PREFIX).is_some_and(|found| found == name)
}
