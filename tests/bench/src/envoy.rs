//! Envoy's configuration for a job: the metrics, timeouts and retries of ours; what a mesh does not use is off (request
//! ids, extra headers), and circuit breakers are out of the way.

use std::net::SocketAddr;

use serde_json::{Value, json};

use crate::{
    certificates::{CLIENT, SERVER_NAME, UPSTREAM},
    job::{self, Job, Protocol, Security, Service, WEIGHTS},
};

pub(crate) fn config(job: &Job) -> Value {
    let clusters: Vec<Value> = job
        .services
        .iter()
        .flat_map(|service| {
            service.revisions.iter().enumerate().map(|(revision, endpoints)| cluster(job, service, revision, endpoints))
        })
        .collect();
    let mut chain = json!({"filters": [if job.protocol == Protocol::Tcp { tcp(job) } else { http(job) }]});
    if job.downstream == Security::Mtls {
        chain["transport_socket"] = json!({"name": "envoy.transport_sockets.tls", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            "require_client_certificate": true,
            "common_tls_context": tls(job, CLIENT, &["h2", "http/1.1"]),
        }});
    }
    json!({"static_resources": {
        "listeners": [{"name": "bench", "address": address(job.services[0].listen), "filter_chains": [chain]}],
        "clusters": clusters,
    }})
}

fn http(job: &Job) -> Value {
    let host = |service: &Service| {
        let route = |prefix: String| {
            json!({
                "match": {"prefix": prefix},
                "route": {
                    "timeout": seconds(job::REQUEST_TIMEOUT.as_secs()),
                    "retry_policy": {"retry_on": "gateway-error", "num_retries": job::RETRIES},
                    "weighted_clusters": weighted(service),
                },
            })
        };
        let routes: Vec<Value> = job.prefixes().map(route).collect();
        let domain = if job.services.len() > 1 { &service.host } else { "*" };
        json!({"name": service.host, "domains": [domain], "routes": routes})
    };
    json!({"name": "envoy.filters.network.http_connection_manager", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "bench", "codec_type": "AUTO", "generate_request_id": false,
        "server_header_transformation": "PASS_THROUGH", "use_remote_address": true,
        "upgrade_configs": [{"upgrade_type": "websocket"}],
        "route_config": {"virtual_hosts": job.services.iter().map(host).collect::<Vec<_>>()},
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router",
            "suppress_envoy_headers": true}}],
    }})
}

fn tcp(job: &Job) -> Value {
    json!({"name": "envoy.filters.network.tcp_proxy", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": "bench", "weighted_clusters": weighted(&job.services[0]),
    }})
}

fn weighted(service: &Service) -> Value {
    let target = |revision| json!({"name": name(service, revision), "weight": WEIGHTS[revision]});
    json!({"clusters": (0..service.revisions.len()).map(target).collect::<Vec<_>>()})
}

fn cluster(job: &Job, service: &Service, revision: usize, endpoints: &[SocketAddr]) -> Value {
    let name = name(service, revision);
    let endpoint = |endpoint: &SocketAddr| json!({"endpoint": {"address": address(*endpoint)}});
    let mut cluster = json!({
        "name": name, "type": "STATIC", "lb_policy": "LEAST_REQUEST",
        "connect_timeout": seconds(job::CONNECT_TIMEOUT.as_secs()),
        "circuit_breakers": {"thresholds": [{"max_connections": 100_000, "max_pending_requests": 100_000,
            "max_requests": 100_000, "max_retries": 100_000}]},
        "load_assignment": {"cluster_name": name,
            "endpoints": [{"lb_endpoints": endpoints.iter().map(endpoint).collect::<Vec<_>>()}]},
    });
    if job.protocol.is_http2() {
        let http = if job.to_http1 { "http_protocol_options" } else { "http2_protocol_options" };
        cluster["typed_extension_protocol_options"] = json!({
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {http: {}},
            },
        });
    }
    if job.upstream == Security::Mtls {
        cluster["transport_socket"] = json!({"name": "envoy.transport_sockets.tls", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            "sni": SERVER_NAME,
            "common_tls_context": tls(job, UPSTREAM, &[job.to_upstream().alpn()]),
        }});
    }
    cluster
}

fn tls(job: &Job, peer: &str, alpn: &[&str]) -> Value {
    let file = |name: &str| json!({"filename": job.folder.join(name)});
    json!({
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "alpn_protocols": alpn,
        "tls_certificates": [{"certificate_chain": file("proxy.crt"), "private_key": file("proxy.key")}],
        "validation_context": {"trusted_ca": file("ca.crt"), "match_typed_subject_alt_names": [
            {"san_type": "URI", "matcher": {"exact": peer}}]},
    })
}

fn name(service: &Service, revision: usize) -> String {
    format!("{}/{revision}", service.host)
}

fn seconds(seconds: u64) -> String {
    format!("{seconds}s")
}

fn address(address: SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}})
}
