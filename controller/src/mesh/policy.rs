//! What a cluster of the fleet says by `spec.service.trafficPolicy`.

use k8s_openapi::api::core::v1::Service;
use sluice_crds::{HttpSettings, TcpSettings, TrafficPolicy};
use sluice_xds::envoy::config::{
    cluster::v3::{
        CircuitBreakers, OutlierDetection,
        circuit_breakers::Thresholds,
        cluster::{
            CommonLbConfig, LbConfig, LeastRequestLbConfig, SlowStartConfig,
            common_lb_config::{LocalityConfigSpecifier, ZoneAwareLbConfig},
        },
    },
    core::v3::HttpProtocolOptions,
};

use super::{Limits, encode::seconds, route::duration};

/// The base time of an ejection grows with each one up to this (Envoy's default).
const LONGEST_EJECTION: i64 = 300;

fn tcp(policy: Option<&TrafficPolicy>) -> Option<&TcpSettings> {
    policy?.connection_pool.as_ref()?.tcp.as_ref()
}

fn http(policy: Option<&TrafficPolicy>) -> Option<&HttpSettings> {
    policy?.connection_pool.as_ref()?.http.as_ref()
}

fn count(said: Option<i32>) -> Option<u32> {
    said.and_then(|said| u32::try_from(said).ok())
}

pub(super) fn connect_timeout(policy: Option<&TrafficPolicy>) -> Option<prost_types::Duration> {
    tcp(policy)?.connect_timeout.as_deref().and_then(duration)
}

/// What neither the Canary nor the installation says has no limit: Envoy's default of 1024 would be one that nobody asked for
/// (circuit_breaker.proto). The installation's limit of requests holds whatever the Canary says; those that wait are among them.
pub(super) fn circuit_breakers(policy: Option<&TrafficPolicy>, limits: Limits) -> Option<CircuitBreakers> {
    let (tcp, http) = (tcp(policy), http(policy));
    if tcp.is_none() && http.is_none() && limits.requests.is_none() {
        return None;
    }
    let limit = |said: Option<i32>| Some(count(said).unwrap_or(u32::MAX));
    let of_requests = |said: Option<i32>| limit(said).map(|said| said.min(limits.requests.unwrap_or(u32::MAX)));
    Some(CircuitBreakers {
        thresholds: vec![Thresholds {
            max_connections: limit(tcp.and_then(|tcp| tcp.max_connections)),
            max_pending_requests: of_requests(http.and_then(|http| http.http1_max_pending_requests)),
            max_requests: of_requests(http.and_then(|http| http.http2_max_requests)),
            // Without one the budget of retries holds.
            max_retries: count(http.and_then(|http| http.max_retries)),
            ..Thresholds::default()
        }],
    })
}

pub(super) fn outlier_detection(policy: Option<&TrafficPolicy>) -> Option<OutlierDetection> {
    let said = policy?.outlier_detection.as_ref()?;
    // Nothing that is not asked for: Envoy acts on the first and on success rates by default (outlier_detection.proto).
    let enforced = |said: Option<i32>| Some(if said.is_some() { 100 } else { 0 });
    Some(OutlierDetection {
        consecutive_5xx: count(said.consecutive_5xx_errors),
        enforcing_consecutive_5xx: enforced(said.consecutive_5xx_errors),
        consecutive_gateway_failure: count(said.consecutive_gateway_errors),
        enforcing_consecutive_gateway_failure: enforced(said.consecutive_gateway_errors),
        base_ejection_time: said.base_ejection_time.as_deref().and_then(duration),
        max_ejection_time: Some(seconds(LONGEST_EJECTION)),
        max_ejection_percent: count(Some(said.max_ejection_percent)),
        enforcing_success_rate: Some(0),
        ..OutlierDetection::default()
    })
}

pub(super) fn slow_start(policy: Option<&TrafficPolicy>) -> Option<LbConfig> {
    let window = policy?.load_balancer.as_ref()?.warmup_duration_secs.as_deref().and_then(duration)?;
    Some(LbConfig::LeastRequestLbConfig(LeastRequestLbConfig {
        slow_start_config: Some(SlowStartConfig { slow_start_window: Some(window), ..SlowStartConfig::default() }),
        ..LeastRequestLbConfig::default()
    }))
}

/// Whether Pods in the zone of whoever asks are preferred: as the Canary says, or else as the Service asks of any proxy (KEP-4444).
pub(super) fn prefers_own_zone(policy: Option<&TrafficPolicy>, service: &Service) -> bool {
    let said = policy.and_then(|policy| policy.load_balancer.as_ref()?.locality_lb_setting.as_ref()?.enabled);
    said.unwrap_or_else(|| {
        let distribution = service.spec.as_ref().and_then(|spec| spec.traffic_distribution.as_deref());
        matches!(distribution, Some("PreferClose" | "PreferSameZone"))
    })
}

/// From the first Pod on: Envoy's default of 6 would leave most applications out.
pub(super) fn own_zone() -> CommonLbConfig {
    let zones = ZoneAwareLbConfig { routing_enabled: None, min_cluster_size: Some(1) };
    CommonLbConfig {
        locality_config_specifier: Some(LocalityConfigSpecifier::ZoneAwareLbConfig(zones)),
        ..CommonLbConfig::default()
    }
}

pub(super) fn connections(policy: Option<&TrafficPolicy>) -> Option<HttpProtocolOptions> {
    let http = http(policy)?;
    let idle_timeout = http.idle_timeout.as_deref().and_then(duration);
    let most = count(http.max_requests_per_connection).filter(|most| *most > 0);
    (idle_timeout.is_some() || most.is_some()).then(|| HttpProtocolOptions {
        idle_timeout,
        max_requests_per_connection: most,
        ..HttpProtocolOptions::default()
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;
    use sluice_xds::{
        TypeUrl,
        envoy::{
            config::{
                cluster::v3::Cluster,
                endpoint::v3::ClusterLoadAssignment,
                listener::v3::{Listener, filter::ConfigType},
            },
            extensions::filters::network::{
                connection_limit::v3::ConnectionLimit, http_connection_manager::v3::HttpConnectionManager,
                tcp_proxy::v3::TcpProxy,
            },
        },
        unpack,
    };

    use crate::mesh::{Limits, build, testing::Shop};

    #[test]
    fn each_port_of_the_fleet_has_its_limit_of_connections() {
        let mut shop = Shop::new();
        shop.traffic("aaa", None, 0);
        let filters = |shop: &Shop| {
            let snapshot = build(&shop.inputs());
            let listener: Listener =
                unpack(&snapshot.fleet.get(TypeUrl::Listener, "shop/web:80").unwrap().body).unwrap();
            listener.filter_chains[0].filters.clone()
        };
        let said = filters(&shop);
        let ConfigType::TypedConfig(first) = said[0].config_type.as_ref().unwrap();
        let limit: ConnectionLimit = unpack(first).unwrap();
        assert_eq!((said.len(), limit.stat_prefix.as_str(), limit.max_connections), (2, "shop/web:80", Some(4096)));
        shop.limits = Limits::default();
        assert_eq!(filters(&shop).len(), 1);
    }

    #[test]
    fn streams_of_the_fleet_may_rest_for_so_long_and_those_of_sidecars_for_ever() {
        let mut shop = Shop::new();
        shop.traffic("aaa", None, 0);
        shop.more_ports = vec![json!({"port": 9000, "name": "tcp", "protocol": "TCP", "targetPort": 9000})];
        shop.revision_pod("a", "aaa", "10.0.0.1");
        let said = |shop: &Shop| {
            let snapshot = build(&shop.inputs());
            let sidecar = snapshot.sidecars.values().next().unwrap();
            [
                snapshot.fleet.get(TypeUrl::Listener, "shop/web:80"),
                snapshot.fleet.get(TypeUrl::Listener, "shop/web:9000"),
                sidecar.get(TypeUrl::Listener, "inbound"),
            ]
            .map(|listener| {
                let listener: Listener = unpack(&listener.unwrap().body).unwrap();
                let last = listener.filter_chains[0].filters.last().unwrap().clone();
                let ConfigType::TypedConfig(last) = last.config_type.unwrap();
                let idle = unpack::<HttpConnectionManager>(&last)
                    .map(|manager| manager.stream_idle_timeout)
                    .or_else(|_| unpack::<TcpProxy>(&last).map(|proxy| proxy.idle_timeout));
                idle.unwrap().unwrap().seconds
            })
        };
        assert_eq!(said(&shop), [3600, 3600, 0]);
        shop.limits = Limits::default();
        // Envoy would take its own default for what is not said.
        assert_eq!(said(&shop), [0, 0, 0]);
    }

    #[test]
    fn zones_are_said_where_the_canary_or_the_service_asks_for_them() {
        let zones = |shop: &Shop| {
            let snapshot = build(&shop.inputs());
            let body = |kind| snapshot.fleet.get(kind, "shop/web:80/aaa").unwrap().body.clone();
            let cluster: Cluster = unpack(&body(TypeUrl::Cluster)).unwrap();
            let assignment: ClusterLoadAssignment = unpack(&body(TypeUrl::Endpoints)).unwrap();
            let localities: Vec<_> = assignment
                .endpoints
                .iter()
                .map(|one| (one.locality.clone().map(|locality| locality.zone), one.lb_endpoints.len()))
                .collect();
            (cluster.common_lb_config.is_some(), localities)
        };
        let mut shop = Shop::new();
        shop.traffic("aaa", None, 0);
        for (name, ip, zone) in [
            ("a", "10.0.0.1", Some("z-1")),
            ("b", "10.0.0.2", Some("z-2")),
            ("c", "10.0.0.3", Some("z-1")),
            ("d", "10.0.0.4", None),
        ] {
            shop.revision_pod(name, "aaa", ip);
            if let Some(zone) = zone {
                shop.pods.last_mut().unwrap()["metadata"]["labels"]["topology.kubernetes.io/zone"] = json!(zone);
            }
        }
        let plain = (false, vec![(None, 4)]);
        let zone = |name: &str| Some(name.to_owned());
        let preferred = (true, vec![(None, 1), (zone("z-1"), 2), (zone("z-2"), 1)]);
        assert_eq!(zones(&shop), plain);
        for (distribution, prefers) in
            [("PreferClose", true), ("PreferSameZone", true), ("PreferSameNode", false), ("Other", false)]
        {
            shop.traffic_distribution = Some(distribution);
            assert_eq!(zones(&shop) == preferred, prefers, "{distribution}");
            assert_eq!(zones(&shop) == plain, !prefers, "{distribution}");
        }
        // The Canary's word is the nearer one.
        for (enabled, distribution, expected) in [(true, None, &preferred), (false, Some("PreferClose"), &plain)] {
            shop.traffic_distribution = distribution;
            shop.canary["spec"]["service"]["trafficPolicy"] =
                json!({"loadBalancer": {"localityLbSetting": {"enabled": enabled}}});
            assert_eq!(zones(&shop), *expected);
        }
    }

    #[test]
    fn a_cluster_has_what_its_canary_says_within_what_the_installation_allows_to_each_service() {
        let mut shop = Shop::new();
        shop.traffic("aaa", Some("bbb"), 20);
        let cluster = |shop: &Shop| {
            let snapshot = build(&shop.inputs());
            unpack::<Cluster>(&snapshot.fleet.get(TypeUrl::Cluster, "shop/web:80/bbb").unwrap().body).unwrap()
        };
        let plain = cluster(&shop);
        assert_eq!((plain.outlier_detection, plain.lb_config), (None, None));
        let limits = &plain.circuit_breakers.unwrap().thresholds[0];
        let of_requests = (limits.max_requests, limits.max_pending_requests);
        assert_eq!((of_requests, limits.max_connections), ((Some(2048), Some(2048)), Some(u32::MAX)));
        shop.limits = Limits::default();
        assert_eq!(cluster(&shop).circuit_breakers, None, "nothing is limited");
        shop.limits = Limits { requests: Some(2048), ..Limits::default() };
        shop.canary["spec"]["service"]["trafficPolicy"] =
            json!({"connectionPool": {"http": {"http2MaxRequests": 5000, "http1MaxPendingRequests": 10}}});
        let limits = &cluster(&shop).circuit_breakers.unwrap().thresholds[0];
        assert_eq!((limits.max_requests, limits.max_pending_requests), (Some(2048), Some(10)), "less, never more");
        shop.canary["spec"]["service"]["trafficPolicy"] = json!({
            "connectionPool": {"tcp": {"connectTimeout": "3s"}, "http": {"http2MaxRequests": 50}},
            "outlierDetection": {"consecutiveGatewayErrors": 4, "maxEjectionPercent": 20},
            "loadBalancer": {"warmupDurationSecs": "1m"},
        });
        let said = cluster(&shop);
        let limits = &said.circuit_breakers.as_ref().unwrap().thresholds[0];
        assert_eq!((limits.max_requests, limits.max_connections, limits.max_retries), (Some(50), Some(u32::MAX), None));
        assert_eq!(said.connect_timeout.unwrap().seconds, 3);
        let outliers = said.outlier_detection.unwrap();
        assert_eq!(
            (
                outliers.enforcing_consecutive_5xx,
                outliers.consecutive_gateway_failure,
                outliers.base_ejection_time.unwrap().seconds
            ),
            (Some(0), Some(4), 30)
        );
        assert!(said.lb_config.is_some());
    }
}
