//! Resources as the control plane makes them (docs/xds.md).

use std::collections::BTreeMap;

use prost_types::{Any, Struct, Value, value::Kind};
use sluice_xds::{
    envoy::{
        config::{
            cluster::v3::{
                Cluster,
                cluster::{
                    ClusterDiscoveryType, DiscoveryType, EdsClusterConfig, LbConfig, LbPolicy, OriginalDstLbConfig,
                },
            },
            core::v3::{
                Address, AggregatedConfigSource, ConfigSource, Metadata, SocketAddress, TransportSocket, address,
                config_source::ConfigSourceSpecifier, socket_address::PortSpecifier, transport_socket,
            },
            endpoint::v3::{
                ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints, lb_endpoint::HostIdentifier,
            },
            listener::v3::{Filter, FilterChain, FilterChainMatch, Listener, filter},
            route::v3::{
                DirectResponseAction, Route, RouteAction, RouteConfiguration, RouteMatch, VirtualHost, WeightedCluster,
                route, route_action::ClusterSpecifier, route_match::PathSpecifier, weighted_cluster,
            },
        },
        extensions::{
            filters::{
                http::router::v3::Router,
                network::{
                    http_connection_manager::v3::{
                        HttpConnectionManager, HttpFilter, Rds,
                        http_connection_manager::{RouteSpecifier, UpgradeConfig},
                        http_filter,
                    },
                    tcp_proxy::v3::{TcpProxy, tcp_proxy},
                },
            },
            transport_sockets::tls::v3::{
                CertificateValidationContext, CommonTlsContext, DownstreamTlsContext, SdsSecretConfig,
                SubjectAltNameMatcher, UpstreamTlsContext,
                common_tls_context::{CombinedCertificateValidationContext, ValidationContextType},
                subject_alt_name_matcher::SanType,
            },
            upstreams::http::v3::{
                HttpProtocolOptions,
                http_protocol_options::{UpstreamProtocolOptions, UseDownstreamHttpConfig},
            },
        },
        service::discovery::v3::Resource,
        r#type::matcher::v3::{StringMatcher, string_matcher::MatchPattern},
    },
    pack,
};

pub(crate) fn resource<M: prost::Message + prost::Name>(name: &str, version: &str, message: &M) -> Resource {
    Resource {
        name: name.to_owned(),
        version: version.to_owned(),
        resource: Some(pack(message)),
        ..Resource::default()
    }
}

fn ads() -> Option<ConfigSource> {
    Some(ConfigSource {
        config_source_specifier: Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource {})),
        ..ConfigSource::default()
    })
}

pub(crate) fn address(ip: &str, port: u16) -> Option<Address> {
    Some(Address {
        address: Some(address::Address::SocketAddress(SocketAddress {
            address: ip.to_owned(),
            port_specifier: Some(PortSpecifier::PortValue(port.into())),
            ..SocketAddress::default()
        })),
    })
}

fn downstream_protocol() -> BTreeMap<String, Any> {
    let options = HttpProtocolOptions {
        upstream_protocol_options: Some(UpstreamProtocolOptions::UseDownstreamProtocolConfig(
            UseDownstreamHttpConfig::default(),
        )),
        ..HttpProtocolOptions::default()
    };
    [("envoy.extensions.upstreams.http.v3.HttpProtocolOptions".to_owned(), pack(&options))].into()
}

/// TLS with our own certificate and exactly this peer.
fn common_tls(peer: &str) -> CommonTlsContext {
    let secret = |name: &str| SdsSecretConfig { name: name.to_owned(), sds_config: ads() };
    let matcher = SubjectAltNameMatcher {
        san_type: SanType::Uri.into(),
        matcher: Some(StringMatcher { match_pattern: Some(MatchPattern::Exact(peer.to_owned())), ignore_case: false }),
    };
    CommonTlsContext {
        alpn_protocols: vec!["h2".to_owned(), "http/1.1".to_owned()],
        tls_certificate_sds_secret_configs: vec![secret("default")],
        validation_context_type: Some(ValidationContextType::CombinedValidationContext(
            CombinedCertificateValidationContext {
                default_validation_context: Some(CertificateValidationContext {
                    match_typed_subject_alt_names: vec![matcher],
                    ..CertificateValidationContext::default()
                }),
                validation_context_sds_secret_config: Some(secret("ROOTCA")),
            },
        )),
        ..CommonTlsContext::default()
    }
}

fn tls_socket<M: prost::Message + prost::Name>(context: &M) -> Option<TransportSocket> {
    Some(TransportSocket {
        name: "envoy.transport_sockets.tls".to_owned(),
        config_type: Some(transport_socket::ConfigType::TypedConfig(pack(context))),
    })
}

/// A cluster of the fleet view, plaintext.
pub(crate) fn plain_cluster(name: &str) -> Cluster {
    let label = |value: &str| Value { kind: Some(Kind::StringValue(value.to_owned())) };
    let labels = [
        ("destination_namespace".to_owned(), label("shop")),
        ("destination_service".to_owned(), label("web")),
        ("revision".to_owned(), label(name.rsplit('/').next().unwrap())),
    ];
    Cluster {
        name: name.to_owned(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Eds.into())),
        eds_cluster_config: Some(EdsClusterConfig { eds_config: ads(), service_name: name.to_owned() }),
        lb_policy: LbPolicy::LeastRequest.into(),
        connect_timeout: Some(prost_types::Duration { seconds: 1, nanos: 0 }),
        typed_extension_protocol_options: downstream_protocol(),
        metadata: Some(Metadata {
            filter_metadata: [("sluice.dev".to_owned(), Struct { fields: labels.into() })].into(),
            ..Metadata::default()
        }),
        ..Cluster::default()
    }
}

/// A cluster of the fleet view behind sidecars.
pub(crate) fn cluster(name: &str, sni: &str, server_id: &str) -> Cluster {
    let context = UpstreamTlsContext { common_tls_context: Some(common_tls(server_id)), sni: sni.to_owned() };
    Cluster { transport_socket: tls_socket(&context), ..plain_cluster(name) }
}

/// A cluster of the sidecar view.
pub(crate) fn local_cluster(port: u16) -> Cluster {
    Cluster {
        name: format!("local/{port}"),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::OriginalDst.into())),
        lb_policy: LbPolicy::ClusterProvided.into(),
        lb_config: Some(LbConfig::OriginalDstLbConfig(OriginalDstLbConfig {
            use_http_header: false,
            upstream_port_override: Some(port.into()),
        })),
        typed_extension_protocol_options: downstream_protocol(),
        ..Cluster::default()
    }
}

pub(crate) fn endpoints(name: &str, addresses: &[(&str, u16)]) -> ClusterLoadAssignment {
    let endpoint = |&(ip, port): &(&str, u16)| LbEndpoint {
        host_identifier: Some(HostIdentifier::Endpoint(Endpoint { address: address(ip, port), ..Endpoint::default() })),
        ..LbEndpoint::default()
    };
    ClusterLoadAssignment {
        cluster_name: name.to_owned(),
        endpoints: vec![LocalityLbEndpoints {
            lb_endpoints: addresses.iter().map(endpoint).collect(),
            ..LocalityLbEndpoints::default()
        }],
    }
}

fn one_route(name: &str, action: route::Action) -> RouteConfiguration {
    RouteConfiguration {
        name: name.to_owned(),
        virtual_hosts: vec![VirtualHost {
            name: name.to_owned(),
            domains: vec!["*".to_owned()],
            routes: vec![Route {
                r#match: Some(RouteMatch {
                    path_specifier: Some(PathSpecifier::Prefix("/".to_owned())),
                    ..RouteMatch::default()
                }),
                action: Some(action),
                ..Route::default()
            }],
        }],
        ..RouteConfiguration::default()
    }
}

pub(crate) fn route(name: &str, weights: &[(&str, u32)]) -> RouteConfiguration {
    let clusters = weights.iter().map(|(cluster, weight)| weighted_cluster::ClusterWeight {
        name: (*cluster).to_owned(),
        weight: Some(*weight),
    });
    let weighted = WeightedCluster { clusters: clusters.collect(), ..WeightedCluster::default() };
    let action =
        RouteAction { cluster_specifier: Some(ClusterSpecifier::WeightedClusters(weighted)), ..RouteAction::default() };
    one_route(name, route::Action::Route(action))
}

pub(crate) fn timed(mut config: RouteConfiguration, seconds: i64, nanos: i32) -> RouteConfiguration {
    if let Some(route::Action::Route(action)) = &mut config.virtual_hosts[0].routes[0].action {
        action.timeout = Some(prost_types::Duration { seconds, nanos });
    }
    config
}

pub(crate) fn unavailable(name: &str) -> RouteConfiguration {
    one_route(name, route::Action::DirectResponse(DirectResponseAction { status: 503, body: None }))
}

fn http_filter(specifier: RouteSpecifier) -> Filter {
    let manager = HttpConnectionManager {
        stat_prefix: "http".to_owned(),
        route_specifier: Some(specifier),
        http_filters: vec![HttpFilter {
            name: "envoy.filters.http.router".to_owned(),
            config_type: Some(http_filter::ConfigType::TypedConfig(pack(&Router::default()))),
            ..HttpFilter::default()
        }],
        upgrade_configs: vec![UpgradeConfig { upgrade_type: "websocket".to_owned(), enabled: None }],
        ..HttpConnectionManager::default()
    };
    Filter { name: "http".to_owned(), config_type: Some(filter::ConfigType::TypedConfig(pack(&manager))) }
}

fn plain_listener(name: &str, port: u16, filter: Filter) -> Listener {
    Listener {
        name: name.to_owned(),
        address: address("127.0.0.1", port),
        filter_chains: vec![FilterChain { filters: vec![filter], ..FilterChain::default() }],
        ..Listener::default()
    }
}

/// A listener of the fleet view, with the route of the same name.
pub(crate) fn listener(name: &str, port: u16) -> Listener {
    let rds = Rds { config_source: ads(), route_config_name: name.to_owned() };
    plain_listener(name, port, http_filter(RouteSpecifier::Rds(rds)))
}

/// A listener of the fleet view for an opaque port.
pub(crate) fn tcp_listener(name: &str, port: u16, weights: &[(&str, u32)]) -> Listener {
    let clusters = weights.iter().map(|(cluster, weight)| tcp_proxy::weighted_cluster::ClusterWeight {
        name: (*cluster).to_owned(),
        weight: *weight,
    });
    let proxy = TcpProxy {
        stat_prefix: name.to_owned(),
        cluster_specifier: Some(tcp_proxy::ClusterSpecifier::WeightedClusters(tcp_proxy::WeightedCluster {
            clusters: clusters.collect(),
        })),
        ..TcpProxy::default()
    };
    let filter = Filter { name: "tcp".to_owned(), config_type: Some(filter::ConfigType::TypedConfig(pack(&proxy))) };
    plain_listener(name, port, filter)
}

/// The listener of the sidecar view, for application ports and the server names that select them.
pub(crate) fn inbound(port: u16, applications: &[(u16, &str)], client_id: &str) -> Listener {
    let chain = |&(port, server_name): &(u16, &str)| {
        let cluster = format!("local/{port}");
        let context = DownstreamTlsContext {
            common_tls_context: Some(common_tls(client_id)),
            require_client_certificate: Some(true),
        };
        FilterChain {
            filter_chain_match: Some(FilterChainMatch {
                server_names: vec![server_name.to_owned()],
                transport_protocol: "tls".to_owned(),
                ..FilterChainMatch::default()
            }),
            filters: vec![http_filter(RouteSpecifier::RouteConfig(route("inline", &[(&cluster, 1)])))],
            transport_socket: tls_socket(&context),
            ..FilterChain::default()
        }
    };
    Listener {
        name: "inbound".to_owned(),
        address: address("127.0.0.1", port),
        filter_chains: applications.iter().map(chain).collect(),
        ..Listener::default()
    }
}
