//! What a cluster's message may say of the use of its endpoints, field by field.

use sluice_proxy::{
    config::{Change, Resources},
    snapshot::{Action, Cluster as Served, ConnectionPolicy, Limits, Outliers, Protocol, SlowStart, UpstreamProtocol},
};
use sluice_xds::{
    TypeUrl,
    envoy::{
        config::{
            cluster::v3::{
                CircuitBreakers, Cluster, OutlierDetection,
                circuit_breakers::Thresholds,
                cluster::{
                    CommonLbConfig, LbConfig, LeastRequestLbConfig, SlowStartConfig,
                    common_lb_config::{LocalityConfigSpecifier, ZoneAwareLbConfig},
                },
            },
            core::v3::{
                Http1ProtocolOptions, Http2ProtocolOptions, HttpProtocolOptions as CommonOptions, Locality,
                RoutingPriority,
            },
            endpoint::v3::ClusterLoadAssignment,
        },
        extensions::upstreams::http::v3::{
            HttpProtocolOptions,
            http_protocol_options::{
                ExplicitHttpConfig, UpstreamProtocolOptions, explicit_http_config::ProtocolConfig,
            },
        },
        r#type::v3::Percent,
    },
    pack, unpack,
};
use std::{sync::Arc, time::Duration};

use crate::resources::{endpoints, listener, local_cluster, plain_cluster, resource, route};

const A: &str = "shop/web:80/aaaaaaaaaa";
const WEB: &str = "shop/web:80";
const OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

fn with(change: impl FnOnce(&mut Cluster)) -> Cluster {
    let mut cluster = plain_cluster(A);
    change(&mut cluster);
    cluster
}

fn common(cluster: &mut Cluster, common: CommonOptions) {
    let any = cluster.typed_extension_protocol_options.get_mut(OPTIONS).unwrap();
    let mut options: HttpProtocolOptions = unpack(any).unwrap();
    options.common_http_protocol_options = Some(common);
    *any = pack(&options);
}

fn explicit(protocol_config: Option<ProtocolConfig>) -> Cluster {
    with(|cluster| {
        let any = cluster.typed_extension_protocol_options.get_mut(OPTIONS).unwrap();
        let config = ExplicitHttpConfig { protocol_config };
        *any = pack(&HttpProtocolOptions {
            upstream_protocol_options: Some(UpstreamProtocolOptions::ExplicitHttpConfig(config)),
            ..HttpProtocolOptions::default()
        });
    })
}

fn http2(options: Http2ProtocolOptions) -> Cluster {
    explicit(Some(ProtocolConfig::Http2ProtocolOptions(options)))
}

/// The cluster as it is served by a proxy in `zone`.
fn served(zone: &str, cluster: &Cluster, assignment: &ClusterLoadAssignment) -> Result<Arc<Served>, String> {
    let mut resources = Resources::in_zone(zone.to_owned());
    for (kind, one) in [
        (TypeUrl::Cluster, resource(A, "1", cluster)),
        (TypeUrl::Endpoints, resource(A, "1", assignment)),
        (TypeUrl::Listener, resource(WEB, "1", &listener(WEB, 20001))),
        (TypeUrl::Route, resource(WEB, "1", &route(WEB, &[(A, 100)]))),
    ] {
        let rejected = resources.update(Change { kind, resources: &[one], removed: &[] });
        if let Some(rejected) = rejected.first() {
            return Err(rejected.error.to_string());
        }
        resources.build();
    }
    let snapshot = resources.build();
    let Protocol::Http(routes) = &snapshot.listeners[WEB].chains[0].protocol else { panic!() };
    let Action::Forward { split, .. } = &routes[0].action else { panic!() };
    Ok(split.targets[0].0.clone())
}

fn accepted(cluster: &Cluster) -> Arc<Served> {
    served("", cluster, &endpoints(A, &[("10.0.0.1", 80)])).unwrap()
}

fn outlier_detection(change: impl FnOnce(&mut OutlierDetection)) -> Cluster {
    let mut message = OutlierDetection { enforcing_success_rate: Some(0), ..OutlierDetection::default() };
    change(&mut message);
    with(|cluster| cluster.outlier_detection = Some(message))
}

fn zone_aware(config: ZoneAwareLbConfig) -> Cluster {
    with(|cluster| {
        let locality_config_specifier = Some(LocalityConfigSpecifier::ZoneAwareLbConfig(config));
        cluster.common_lb_config = Some(CommonLbConfig { locality_config_specifier, ..CommonLbConfig::default() });
    })
}

fn least_request(config: LeastRequestLbConfig) -> Cluster {
    with(|cluster| cluster.lb_config = Some(LbConfig::LeastRequestLbConfig(config)))
}

fn slow_start(slow_start_window: Option<prost_types::Duration>, least: Option<f64>) -> Cluster {
    let min_weight_percent = least.map(|value| Percent { value });
    let slow_start_config = Some(SlowStartConfig { slow_start_window, min_weight_percent });
    least_request(LeastRequestLbConfig { choice_count: Some(2), slow_start_config })
}

#[test]
fn limits_and_the_life_of_connections_are_served_and_what_is_not_said_is_not_limited() {
    let plain = accepted(&plain_cluster(A));
    assert_eq!((plain.traffic.limits, plain.traffic.connections), (Limits::default(), ConnectionPolicy::default()));
    let served = accepted(&with(|cluster| {
        let threshold = Thresholds { max_connections: Some(1), max_requests: Some(3), ..Thresholds::default() };
        cluster.circuit_breakers = Some(CircuitBreakers { thresholds: vec![threshold] });
        let connections = CommonOptions {
            idle_timeout: seconds(0),
            max_connection_duration: seconds(60),
            max_requests_per_connection: Some(100),
            ..CommonOptions::default()
        };
        common(cluster, connections);
    }));
    let limits = Limits { connections: Some(1), requests: Some(3), ..Limits::default() };
    let connections =
        ConnectionPolicy { idle: Some(Duration::MAX), age: Some(Duration::from_secs(60)), requests: Some(100) };
    assert_eq!((served.traffic.limits, served.traffic.connections), (limits, connections));
}

#[test]
fn the_defaults_of_outlier_detection_are_envoy_s_and_without_the_message_there_is_none() {
    assert_eq!(accepted(&plain_cluster(A)).traffic.outliers, None);
    let defaults = Outliers {
        server_errors: Some(5),
        gateway_errors: None,
        no_answers: None,
        no_answers_apart: false,
        interval: Duration::from_secs(10),
        least: Duration::from_secs(30),
        most: Duration::from_secs(300),
        most_ejected: 10,
        panic: 50.0,
    };
    assert_eq!(accepted(&outlier_detection(|_| {})).traffic.outliers, Some(defaults));
    let mut said = outlier_detection(|message| {
        message.enforcing_consecutive_5xx = Some(0);
        message.consecutive_gateway_failure = Some(3);
        message.enforcing_consecutive_gateway_failure = Some(100);
        message.split_external_local_origin_errors = true;
        message.max_ejection_percent = Some(100);
    });
    let threshold = Some(Percent { value: 0.0 });
    said.common_lb_config = Some(CommonLbConfig { healthy_panic_threshold: threshold, ..CommonLbConfig::default() });
    let expected = Outliers {
        server_errors: None,
        gateway_errors: Some(3),
        no_answers: Some(5),
        no_answers_apart: true,
        most_ejected: 100,
        panic: 0.0,
        ..defaults
    };
    assert_eq!(accepted(&said).traffic.outliers, Some(expected));
}

#[test]
fn slow_start_begins_with_a_tenth_unless_it_is_said() {
    for (said, least) in [(None, 0.1), (Some(50.0), 0.5)] {
        let policy = SlowStart { window: Duration::from_secs(30), least };
        assert_eq!(accepted(&slow_start(seconds(30), said)).traffic.slow_start, Some(policy));
    }
}

#[test]
fn the_own_zone_is_preferred_while_it_has_its_share_of_enough_endpoints() {
    // How many endpoints there are in the zones a, b and c.
    let table = [
        ("a", [2, 2, 2], None, 2),
        ("a", [1, 2, 3], None, 0),
        ("a", [2, 2, 1], None, 0),
        ("a", [2, 2, 1], Some(5), 2),
        ("a", [6, 0, 0], None, 0),
        ("d", [2, 2, 2], None, 0),
        ("", [2, 2, 2], None, 0),
    ];
    for (own, counts, min_cluster_size, expected) in table {
        let mut assignment = endpoints(A, &[]);
        assignment.endpoints.clear();
        for (index, (zone, count)) in ["a", "b", "c"].into_iter().zip(counts).enumerate() {
            let addresses: Vec<_> = (0..count).map(|n| format!("10.0.{index}.{n}")).collect();
            let addresses: Vec<_> = addresses.iter().map(|address| (address.as_str(), 80)).collect();
            let mut locality = endpoints(A, &addresses).endpoints.remove(0);
            locality.locality = Some(Locality { zone: zone.to_owned(), ..Locality::default() });
            assignment.endpoints.push(locality);
        }
        let cluster = zone_aware(ZoneAwareLbConfig { min_cluster_size, ..ZoneAwareLbConfig::default() });
        assert_eq!(served(own, &cluster, &assignment).unwrap().near.len(), expected, "{own:?} {counts:?}");
        let off = zone_aware(ZoneAwareLbConfig { routing_enabled: Some(Percent { value: 0.0 }), min_cluster_size });
        for without in [plain_cluster(A), off] {
            assert_eq!(served(own, &without, &assignment).unwrap().near, []);
        }
    }
}

#[test]
fn a_cluster_is_spoken_to_in_the_protocol_that_it_names_or_in_the_clients() {
    let http1 = explicit(Some(ProtocolConfig::HttpProtocolOptions(Http1ProtocolOptions::default())));
    let mut bare = plain_cluster(A);
    bare.typed_extension_protocol_options.clear();
    let table = [
        (plain_cluster(A), UpstreamProtocol::Downstream),
        (bare, UpstreamProtocol::Downstream),
        (http1, UpstreamProtocol::Http1),
        (http2(Http2ProtocolOptions::default()), UpstreamProtocol::Http2),
    ];
    for (cluster, protocol) in table {
        assert_eq!(served("", &cluster, &endpoints(A, &[])).unwrap().protocol, protocol);
    }
}

#[test]
fn what_is_not_supported_is_refused_by_its_field() {
    let threshold = |priority: RoutingPriority| Thresholds { priority: priority.into(), ..Thresholds::default() };
    let breakers = |thresholds: Vec<Thresholds>| with(|it| it.circuit_breakers = Some(CircuitBreakers { thresholds }));
    let default = RoutingPriority::Default;
    let negative = Some(prost_types::Duration { seconds: -1, nanos: 0 });
    let panic = CommonLbConfig { healthy_panic_threshold: Some(Percent { value: 101.0 }), ..CommonLbConfig::default() };
    let table = [
        (breakers(vec![threshold(default), threshold(default)]), "circuit_breakers.thresholds[1].priority"),
        (breakers(vec![threshold(RoutingPriority::High)]), "circuit_breakers.thresholds[0].priority"),
        (
            with(|it| common(it, CommonOptions { idle_timeout: negative, ..CommonOptions::default() })),
            "common_http_protocol_options.idle_timeout",
        ),
        (
            with(|it| it.outlier_detection = Some(OutlierDetection::default())),
            "outlier_detection.enforcing_success_rate",
        ),
        (outlier_detection(|it| it.enforcing_success_rate = Some(1)), "outlier_detection.enforcing_success_rate"),
        (outlier_detection(|it| it.enforcing_consecutive_5xx = Some(50)), "enforcing_consecutive_5xx"),
        (outlier_detection(|it| it.consecutive_gateway_failure = Some(5)), "enforcing_consecutive_gateway_failure"),
        (
            outlier_detection(|it| it.consecutive_local_origin_failure = Some(5)),
            "outlier_detection.split_external_local_origin_errors",
        ),
        (outlier_detection(|it| it.consecutive_5xx = Some(0)), "outlier_detection.consecutive_5xx"),
        (outlier_detection(|it| it.max_ejection_percent = Some(101)), "outlier_detection.max_ejection_percent"),
        (outlier_detection(|it| it.interval = seconds(0)), "outlier_detection.interval"),
        (with(|it| it.common_lb_config = Some(panic)), "common_lb_config.healthy_panic_threshold"),
        (
            zone_aware(ZoneAwareLbConfig { routing_enabled: Some(Percent { value: 5.0 }), min_cluster_size: None }),
            "common_lb_config.zone_aware_lb_config.routing_enabled",
        ),
        (
            least_request(LeastRequestLbConfig { choice_count: Some(3), slow_start_config: None }),
            "least_request_lb_config.choice_count",
        ),
        (
            with(|it| common(it, CommonOptions { max_stream_duration: seconds(1), ..CommonOptions::default() })),
            "common_http_protocol_options.max_stream_duration",
        ),
        (explicit(None), "explicit_http_config.http_protocol_options or .http2_protocol_options"),
        (
            http2(Http2ProtocolOptions { max_concurrent_streams: Some(10), ..Http2ProtocolOptions::default() }),
            "explicit_http_config.http2_protocol_options.max_concurrent_streams",
        ),
        (
            http2(Http2ProtocolOptions { initial_stream_window_size: Some(65_535), ..Http2ProtocolOptions::default() }),
            "explicit_http_config.http2_protocol_options.initial_stream_window_size",
        ),
        (slow_start(None, None), "least_request_lb_config.slow_start_config.slow_start_window"),
        (slow_start(seconds(1), Some(-1.0)), "least_request_lb_config.slow_start_config.min_weight_percent"),
    ];
    for (cluster, field) in table {
        let reason = served("", &cluster, &endpoints(A, &[])).unwrap_err();
        assert!(reason.contains(field), "{reason}, not {field}");
    }

    let mut weighted = endpoints(A, &[("10.0.0.1", 80)]);
    weighted.endpoints[0].lb_endpoints[0].load_balancing_weight = Some(2);
    let reason = served("", &plain_cluster(A), &weighted).unwrap_err();
    assert!(reason.contains("endpoints[0].lb_endpoints[0].load_balancing_weight"), "{reason}");

    let mut local = local_cluster(8080);
    local.outlier_detection = Some(OutlierDetection { enforcing_success_rate: Some(0), ..OutlierDetection::default() });
    let one = resource("local/8080", "1", &local);
    let rejected = Resources::default().update(Change { kind: TypeUrl::Cluster, resources: &[one], removed: &[] });
    assert!(rejected[0].error.to_string().contains("outlier_detection"), "{rejected:?}");
}
