//! The shapes of docs/xds.md as protobuf messages: nothing here decides anything.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use prost::{Message, Name};
use prost_types::{Any, Duration, Struct, Value, value::Kind};
use sha2::{Digest, Sha256};
use sluice_crds::TrafficPolicy;
use sluice_xds::{
    SpiffeId, TypeUrl,
    envoy::{
        config::{
            cluster::v3::{
                Cluster,
                cluster::{
                    ClusterDiscoveryType, DiscoveryType, EdsClusterConfig, LbConfig, LbPolicy, OriginalDstLbConfig,
                },
            },
            core::v3::{
                Address, AggregatedConfigSource, ApiVersion, ConfigSource, HttpProtocolOptions as CommonOptions,
                Locality, Metadata, SocketAddress, TransportSocket, address, config_source::ConfigSourceSpecifier,
                socket_address::PortSpecifier, transport_socket,
            },
            endpoint::v3::{
                ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints, lb_endpoint::HostIdentifier,
            },
            listener::v3::{Filter, FilterChain, FilterChainMatch, Listener, ListenerFilter, filter, listener_filter},
            route::v3::{
                Route, RouteAction, RouteConfiguration, RouteMatch, VirtualHost, route, route_action::ClusterSpecifier,
                route_match::PathSpecifier,
            },
        },
        extensions::{
            filters::{
                http::router::v3::Router,
                listener::tls_inspector::v3::TlsInspector,
                network::{
                    connection_limit::v3::ConnectionLimit,
                    http_connection_manager::v3::{
                        HttpConnectionManager, HttpFilter, Rds,
                        http_connection_manager::{CodecType, RouteSpecifier, UpgradeConfig},
                        http_filter,
                    },
                    tcp_proxy::v3::{TcpProxy, tcp_proxy},
                },
            },
            transport_sockets::tls::v3::{
                CertificateValidationContext, CommonTlsContext, DownstreamTlsContext, SdsSecretConfig,
                SubjectAltNameMatcher, TlsParameters, UpstreamTlsContext,
                common_tls_context::{CombinedCertificateValidationContext, ValidationContextType},
                subject_alt_name_matcher::SanType,
                tls_parameters::TlsProtocol,
            },
            upstreams::http::v3::{
                HttpProtocolOptions,
                http_protocol_options::{UpstreamProtocolOptions, UseDownstreamHttpConfig},
            },
        },
        r#type::matcher::v3::{StringMatcher, string_matcher::MatchPattern},
    },
    pack,
};

use super::{Limits, Resource, policy, service::Protocol};

/// Where sidecars listen.
pub(super) const SIDECAR_PORT: u16 = 20443;
/// The listener of a sidecar.
pub(super) const INBOUND: &str = "inbound";

/// Clusters and their share of 100, those without one left out.
pub(super) type Split = Vec<(String, u32)>;

/// Encodes a message and names its version by its content.
pub(super) fn resource<M: Message + Name>(message: &M, needs: BTreeSet<(TypeUrl, String)>) -> Resource {
    let body = pack(message);
    let mut hash = Sha256::new();
    hash.update(body.type_url.as_bytes());
    hash.update([0]);
    hash.update(&body.value);
    Resource { version: hex(&hash.finalize()[..10]).into(), body: Arc::new(body), needs: Arc::new(needs), empty: false }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A cluster of the fleet.
pub(super) struct FleetCluster<'a> {
    pub(super) name: &'a str,
    pub(super) namespace: &'a str,
    /// The apex Service, also for a cluster of `-primary` or `-canary`: requests sent there count in the same series.
    pub(super) service: &'a str,
    pub(super) revision: &'a str,
    pub(super) protocol: Protocol,
    /// SNI and identity of the revision's sidecars; plaintext without.
    pub(super) tls: Option<(String, SpiffeId)>,
    pub(super) policy: Option<&'a TrafficPolicy>,
    pub(super) limits: Limits,
    /// Endpoints in the zone of whoever asks are preferred.
    pub(super) zones: bool,
}

impl FleetCluster<'_> {
    pub(super) fn encode(&self) -> Resource {
        let cluster = Cluster {
            name: self.name.to_owned(),
            cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Eds.into())),
            eds_cluster_config: Some(EdsClusterConfig {
                eds_config: Some(from_ads()),
                service_name: self.name.to_owned(),
            }),
            lb_policy: LbPolicy::LeastRequest.into(),
            lb_config: policy::slow_start(self.policy),
            common_lb_config: self.zones.then(policy::own_zone),
            connect_timeout: Some(policy::connect_timeout(self.policy).unwrap_or(seconds(1))),
            circuit_breakers: policy::circuit_breakers(self.policy, self.limits),
            outlier_detection: policy::outlier_detection(self.policy),
            typed_extension_protocol_options: as_downstream(policy::connections(self.policy)),
            transport_socket: self.tls.as_ref().map(|(sni, id)| upstream_tls(sni, id, self.protocol)),
            metadata: Some(labels(&[
                ("destination_namespace", self.namespace),
                ("destination_service", self.service),
                ("revision", self.revision),
            ])),
            ..Cluster::default()
        };
        resource(&cluster, BTreeSet::new())
    }
}

/// Ready endpoints, each with its zone where that counts and is known.
pub(super) type Addresses = BTreeMap<SocketAddr, Option<String>>;

/// One locality for each zone.
pub(super) fn endpoints(name: &str, addresses: &Addresses) -> Resource {
    let endpoint = |to: &SocketAddr| LbEndpoint {
        host_identifier: Some(HostIdentifier::Endpoint(Endpoint {
            address: Some(address(to.ip(), to.port())),
            ..Endpoint::default()
        })),
        ..LbEndpoint::default()
    };
    let mut zones: BTreeMap<Option<&str>, Vec<LbEndpoint>> = BTreeMap::new();
    for (to, zone) in addresses {
        zones.entry(zone.as_deref()).or_default().push(endpoint(to));
    }
    if addresses.is_empty() {
        zones.insert(None, Vec::new());
    }
    let locality = |(zone, lb_endpoints): (Option<&str>, _)| LocalityLbEndpoints {
        locality: zone.map(|zone| Locality { zone: zone.to_owned(), ..Locality::default() }),
        lb_endpoints,
        ..LocalityLbEndpoints::default()
    };
    let endpoints = zones.into_iter().map(locality).collect();
    let assignment = ClusterLoadAssignment { cluster_name: name.to_owned(), endpoints };
    Resource { empty: addresses.is_empty(), ..resource(&assignment, BTreeSet::new()) }
}

/// A port of a Service, split by request. Its route has the same name.
/// `filters`: those before the router.
pub(super) fn http_listener(name: &str, port: u16, filters: Vec<HttpFilter>, limits: Limits) -> Resource {
    let routes = RouteSpecifier::Rds(Rds { config_source: Some(from_ads()), route_config_name: name.to_owned() });
    let filter = http_filter_chain(name, routes, filters, limits.stream_idle);
    let needs = BTreeSet::from([(TypeUrl::Route, name.to_owned())]);
    resource(&fleet_listener(name, port, filter, limits), needs)
}

/// A port of a Service, split by connection. The split must not be empty.
pub(super) fn tcp_listener(name: &str, port: u16, split: &Split, limits: Limits) -> Resource {
    let clusters = split
        .iter()
        .map(|(name, weight)| tcp_proxy::weighted_cluster::ClusterWeight { name: name.clone(), weight: *weight });
    let weighted = tcp_proxy::WeightedCluster { clusters: clusters.collect() };
    let filter = tcp_filter(name, tcp_proxy::ClusterSpecifier::WeightedClusters(weighted), limits.stream_idle);
    resource(&fleet_listener(name, port, filter, limits), needs_of(split))
}

pub(super) fn needs_of(split: &Split) -> BTreeSet<(TypeUrl, String)> {
    let both = |name: &String| [(TypeUrl::Cluster, name.clone()), (TypeUrl::Endpoints, name.clone())];
    split.iter().flat_map(|(name, _)| both(name)).collect()
}

fn fleet_listener(name: &str, port: u16, filter: Filter, limits: Limits) -> Listener {
    let mut filters: Vec<_> = limits.connections.map(|most| connection_limit(name, most)).into_iter().collect();
    filters.push(filter);
    Listener {
        name: name.to_owned(),
        address: Some(address(IpAddr::from([0, 0, 0, 0]), port)),
        filter_chains: vec![FilterChain { filters, ..FilterChain::default() }],
        ..Listener::default()
    }
}

fn connection_limit(stat_prefix: &str, most: u32) -> Filter {
    let limit = ConnectionLimit {
        stat_prefix: stat_prefix.to_owned(),
        max_connections: Some(most.into()),
        ..ConnectionLimit::default()
    };
    Filter {
        name: "envoy.filters.network.connection_limit".to_owned(),
        config_type: Some(filter::ConfigType::TypedConfig(pack(&limit))),
    }
}

/// A port of an application behind its sidecar.
pub(super) struct InboundPort {
    pub(super) port: u16,
    pub(super) protocol: Protocol,
    /// Some Service speaks HTTP on it, so that the fleet offers ALPN.
    pub(super) alpn: bool,
}

/// The one listener of a revision's sidecars. The ports must not be empty.
pub(super) fn inbound(revision: &str, ports: &[InboundPort], admits: &SpiffeId) -> Resource {
    let chain = |port: &InboundPort| {
        let cluster = local(port.port);
        let filter = match port.protocol {
            Protocol::Http => {
                let action = route::Action::Route(RouteAction {
                    cluster_specifier: Some(ClusterSpecifier::Cluster(cluster.clone())),
                    ..forward()
                });
                let whole = Route { r#match: Some(every_request()), action: Some(action), ..Route::default() };
                http_filter_chain(
                    &cluster,
                    RouteSpecifier::RouteConfig(route_configuration(&cluster, vec![whole])),
                    Vec::new(),
                    None,
                )
            }
            Protocol::Tcp => tcp_filter(&cluster, tcp_proxy::ClusterSpecifier::Cluster(cluster.clone()), None),
        };
        FilterChain {
            name: cluster,
            filter_chain_match: Some(FilterChainMatch {
                server_names: vec![sni(port.port, revision)],
                transport_protocol: "tls".to_owned(),
                ..FilterChainMatch::default()
            }),
            filters: vec![filter],
            transport_socket: Some(downstream_tls(admits, port.alpn)),
        }
    };
    let listener = Listener {
        name: INBOUND.to_owned(),
        address: Some(address(IpAddr::from([0, 0, 0, 0]), SIDECAR_PORT)),
        filter_chains: ports.iter().map(chain).collect(),
        // Stock Envoy matches the SNI only behind this one.
        listener_filters: vec![ListenerFilter {
            name: "envoy.filters.listener.tls_inspector".to_owned(),
            config_type: Some(listener_filter::ConfigType::TypedConfig(pack(&TlsInspector {}))),
        }],
        ..Listener::default()
    };
    let needs = ports.iter().map(|port| (TypeUrl::Cluster, local(port.port)));
    resource(&listener, needs.collect())
}

/// Name of the cluster that leads from a sidecar to its application.
pub(super) fn local(port: u16) -> String {
    format!("local/{port}")
}

/// What the fleet calls a port of a revision in the TLS handshake.
pub(super) fn sni(port: u16, revision: &str) -> String {
    format!("p{port}.{revision}")
}

pub(super) fn local_cluster(port: u16, loopback: bool) -> Resource {
    let name = local(port);
    let base = Cluster {
        name: name.clone(),
        connect_timeout: Some(seconds(1)),
        typed_extension_protocol_options: as_downstream(None),
        ..Cluster::default()
    };
    let cluster = if loopback {
        let endpoint = LbEndpoint {
            host_identifier: Some(HostIdentifier::Endpoint(Endpoint {
                address: Some(address(IpAddr::from([127, 0, 0, 1]), port)),
                ..Endpoint::default()
            })),
            ..LbEndpoint::default()
        };
        Cluster {
            cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Static.into())),
            load_assignment: Some(ClusterLoadAssignment {
                cluster_name: name,
                endpoints: vec![LocalityLbEndpoints { lb_endpoints: vec![endpoint], ..Default::default() }],
            }),
            ..base
        }
    } else {
        Cluster {
            cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::OriginalDst.into())),
            // The only policy that Envoy takes with ORIGINAL_DST (cluster.proto).
            lb_policy: LbPolicy::ClusterProvided.into(),
            lb_config: Some(LbConfig::OriginalDstLbConfig(OriginalDstLbConfig {
                use_http_header: false,
                upstream_port_override: Some(port.into()),
            })),
            ..base
        }
    };
    resource(&cluster, BTreeSet::new())
}

/// `idle`: seconds for which nothing may pass on a stream. A sidecar leaves that to the fleet.
fn http_filter_chain(
    stat_prefix: &str,
    routes: RouteSpecifier,
    mut filters: Vec<HttpFilter>,
    idle: Option<u32>,
) -> Filter {
    filters.push(http_filter("envoy.filters.http.router", &Router::default()));
    let manager = HttpConnectionManager {
        codec_type: CodecType::Auto.into(),
        stat_prefix: stat_prefix.to_owned(),
        route_specifier: Some(routes),
        http_filters: filters,
        upgrade_configs: vec![UpgradeConfig { upgrade_type: "websocket".to_owned(), enabled: None }],
        // Envoy's default of 5 minutes would end quiet watches and WebSockets (http_connection_manager.proto); 0 is off.
        stream_idle_timeout: Some(seconds(idle.unwrap_or_default().into())),
        ..HttpConnectionManager::default()
    };
    Filter {
        name: "envoy.filters.network.http_connection_manager".to_owned(),
        config_type: Some(filter::ConfigType::TypedConfig(pack(&manager))),
    }
}

pub(super) fn http_filter<M: Message + Name>(name: &str, config: &M) -> HttpFilter {
    HttpFilter {
        name: name.to_owned(),
        config_type: Some(http_filter::ConfigType::TypedConfig(pack(config))),
        ..HttpFilter::default()
    }
}

fn tcp_filter(stat_prefix: &str, clusters: tcp_proxy::ClusterSpecifier, idle: Option<u32>) -> Filter {
    let proxy = TcpProxy {
        stat_prefix: stat_prefix.to_owned(),
        cluster_specifier: Some(clusters),
        // Not said, it would be Envoy's default of 1 hour (tcp_proxy.proto); 0 is off.
        idle_timeout: Some(seconds(idle.unwrap_or_default().into())),
        ..TcpProxy::default()
    };
    Filter {
        name: "envoy.filters.network.tcp_proxy".to_owned(),
        config_type: Some(filter::ConfigType::TypedConfig(pack(&proxy))),
    }
}

/// Envoy's default of 15 s for a whole response would be a limit that no user asked for (route_components.proto); 0 is off.
fn forward() -> RouteAction {
    RouteAction { timeout: Some(seconds(0)), ..RouteAction::default() }
}

pub(super) fn route_configuration(name: &str, routes: Vec<Route>) -> RouteConfiguration {
    RouteConfiguration {
        name: name.to_owned(),
        virtual_hosts: vec![VirtualHost { name: name.to_owned(), domains: vec!["*".to_owned()], routes }],
        ..RouteConfiguration::default()
    }
}

pub(super) fn every_request() -> RouteMatch {
    RouteMatch { path_specifier: Some(PathSpecifier::Prefix("/".to_owned())), ..RouteMatch::default() }
}

fn upstream_tls(sni: &str, server: &SpiffeId, protocol: Protocol) -> TransportSocket {
    let alpn = match protocol {
        // An HTTP/2 client stays HTTP/2: the proxy offers the one that the client spoke.
        Protocol::Http => &["h2", "http/1.1"][..],
        Protocol::Tcp => &[],
    };
    tls_socket(&UpstreamTlsContext { common_tls_context: Some(tls_context(server, alpn)), sni: sni.to_owned() })
}

fn downstream_tls(client: &SpiffeId, alpn: bool) -> TransportSocket {
    let alpn = if alpn { &["h2", "http/1.1"][..] } else { &[] };
    tls_socket(&DownstreamTlsContext {
        common_tls_context: Some(tls_context(client, alpn)),
        require_client_certificate: Some(true),
    })
}

fn tls_socket<M: Message + Name>(context: &M) -> TransportSocket {
    TransportSocket {
        name: "envoy.transport_sockets.tls".to_owned(),
        config_type: Some(transport_socket::ConfigType::TypedConfig(pack(context))),
    }
}

/// Our own certificate, and exactly this peer. The Secrets have no `sds_config`: they come with the proxy (ours has
/// them from the certificate service, a stock Envoy from `static_resources.secrets` of its bootstrap).
fn tls_context(peer: &SpiffeId, alpn: &[&str]) -> CommonTlsContext {
    let secret = |name: &str| SdsSecretConfig { name: name.to_owned(), sds_config: None };
    CommonTlsContext {
        tls_params: Some(TlsParameters {
            tls_minimum_protocol_version: TlsProtocol::TlSv13.into(),
            tls_maximum_protocol_version: TlsProtocol::TlSv13.into(),
        }),
        tls_certificate_sds_secret_configs: vec![secret("default")],
        validation_context_type: Some(ValidationContextType::CombinedValidationContext(
            CombinedCertificateValidationContext {
                default_validation_context: Some(CertificateValidationContext {
                    match_typed_subject_alt_names: vec![SubjectAltNameMatcher {
                        san_type: SanType::Uri.into(),
                        matcher: Some(StringMatcher {
                            match_pattern: Some(MatchPattern::Exact(peer.to_string())),
                            ignore_case: false,
                        }),
                    }],
                    ..CertificateValidationContext::default()
                }),
                validation_context_sds_secret_config: Some(secret("ROOTCA")),
            },
        )),
        alpn_protocols: alpn.iter().map(|&protocol| protocol.to_owned()).collect(),
        ..CommonTlsContext::default()
    }
}

fn as_downstream(connections: Option<CommonOptions>) -> BTreeMap<String, Any> {
    let options = HttpProtocolOptions {
        common_http_protocol_options: connections,
        upstream_protocol_options: Some(UpstreamProtocolOptions::UseDownstreamProtocolConfig(
            UseDownstreamHttpConfig {
                http_protocol_options: Some(Default::default()),
                // Without it Envoy speaks HTTP/1.1 to an HTTP/2 client's upstream (http_protocol_options.proto).
                http2_protocol_options: Some(Default::default()),
            },
        )),
    };
    BTreeMap::from([("envoy.extensions.upstreams.http.v3.HttpProtocolOptions".to_owned(), pack(&options))])
}

fn labels(pairs: &[(&str, &str)]) -> Metadata {
    let field =
        |(key, value): &(&str, &str)| ((*key).to_owned(), Value { kind: Some(Kind::StringValue((*value).to_owned())) });
    let fields = Struct { fields: pairs.iter().map(field).collect() };
    Metadata { filter_metadata: BTreeMap::from([("sluice.dev".to_owned(), fields)]), ..Metadata::default() }
}

fn from_ads() -> ConfigSource {
    ConfigSource {
        config_source_specifier: Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource {})),
        resource_api_version: ApiVersion::V3.into(),
        ..ConfigSource::default()
    }
}

fn address(ip: IpAddr, port: u16) -> Address {
    Address {
        address: Some(address::Address::SocketAddress(SocketAddress {
            address: ip.to_string(),
            port_specifier: Some(PortSpecifier::PortValue(port.into())),
            ..SocketAddress::default()
        })),
    }
}

pub(super) fn seconds(seconds: i64) -> Duration {
    Duration { seconds, nanos: 0 }
}
