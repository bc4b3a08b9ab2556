#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use proptest::prelude::*;
use serde_json::json;
use sluice_xds::{
    envoy::{
        config::{
            cluster::v3::Cluster,
            endpoint::v3::{ClusterLoadAssignment, lb_endpoint::HostIdentifier},
            listener::v3::{Listener, filter},
            route::v3::{RouteConfiguration, route, route_action::ClusterSpecifier},
        },
        extensions::filters::network::tcp_proxy::v3::{TcpProxy, tcp_proxy},
    },
    unpack,
};

use super::*;
use crate::mesh::testing::{self, Shop};

/// Clusters and weights that a route or an opaque listener of the fleet names; `None` for a direct response.
fn split(view: &View, name: &str) -> Option<Vec<(String, u32)>> {
    if let Some(resource) = view.get(TypeUrl::Route, name) {
        let config: RouteConfiguration = unpack(&resource.body).unwrap();
        return match config.virtual_hosts[0].routes[0].action.as_ref().unwrap() {
            route::Action::Route(action) => match action.cluster_specifier.as_ref().unwrap() {
                ClusterSpecifier::WeightedClusters(all) => {
                    Some(all.clusters.iter().map(|one| (one.name.clone(), one.weight.unwrap())).collect())
                }
                ClusterSpecifier::Cluster(_) => panic!("the fleet's routes are weighted"),
            },
            route::Action::DirectResponse(response) => {
                assert_eq!(response.status, 503);
                None
            }
        };
    }
    let listener: Listener = unpack(&view.get(TypeUrl::Listener, name).unwrap().body).unwrap();
    let filter::ConfigType::TypedConfig(any) =
        listener.filter_chains[0].filters.last().unwrap().config_type.as_ref().unwrap();
    let proxy: TcpProxy = unpack(any).unwrap();
    match proxy.cluster_specifier.unwrap() {
        tcp_proxy::ClusterSpecifier::WeightedClusters(all) => {
            Some(all.clusters.into_iter().map(|one| (one.name, one.weight)).collect())
        }
        tcp_proxy::ClusterSpecifier::Cluster(_) => panic!("the fleet's opaque ports are weighted"),
    }
}

fn addresses(view: &View, name: &str) -> Vec<String> {
    let assignment: ClusterLoadAssignment = unpack(&view.get(TypeUrl::Endpoints, name).unwrap().body).unwrap();
    let endpoints = assignment.endpoints.into_iter().flat_map(|locality| locality.lb_endpoints);
    let address = |endpoint: sluice_xds::envoy::config::endpoint::v3::LbEndpoint| {
        let HostIdentifier::Endpoint(endpoint) = endpoint.host_identifier.unwrap();
        let sluice_xds::envoy::config::core::v3::address::Address::SocketAddress(socket) =
            endpoint.address.unwrap().address.unwrap();
        let Some(encode_port) = socket.port_specifier else { panic!("no port") };
        match encode_port {
            sluice_xds::envoy::config::core::v3::socket_address::PortSpecifier::PortValue(port) => {
                format!("{}:{port}", socket.address)
            }
            sluice_xds::envoy::config::core::v3::socket_address::PortSpecifier::NamedPort(name) => name,
        }
    };
    endpoints.map(address).collect()
}

fn list(pairs: &[(&str, u32)]) -> Option<Vec<(String, u32)>> {
    Some(pairs.iter().map(|(name, weight)| ((*name).to_owned(), *weight)).collect())
}

#[test]
fn a_small_shop_in_full() {
    let mut shop = Shop::new();
    shop.traffic("aaa", Some("bbb"), 10);
    shop.revision_pod("web-aaa-1", "aaa", "10.0.0.1");
    shop.revision_pod("web-bbb-1", "bbb", "10.0.0.2");
    shop.fleet_pod("fleet-1", "10.0.1.1");
    insta::assert_yaml_snapshot!(testing::describe(&build(&shop.inputs())));
}

#[test]
fn each_side_has_its_share_and_a_side_without_one_is_not_named() {
    let mut shop = Shop::new();
    for (weight, expected) in [
        (0, list(&[("shop/web:80/aaa", 100)])),
        (5, list(&[("shop/web:80/aaa", 95), ("shop/web:80/bbb", 5)])),
        (100, list(&[("shop/web:80/bbb", 100)])),
    ] {
        shop.traffic("aaa", Some("bbb"), weight);
        let snapshot = build(&shop.inputs());
        assert_eq!(split(&snapshot.fleet, "shop/web:80"), expected);
        assert!(snapshot.fleet.get(TypeUrl::Cluster, "shop/web:80/aaa").is_some(), "warm at any weight");
        assert!(snapshot.fleet.get(TypeUrl::Cluster, "shop/web:80/bbb").is_some(), "warm at any weight");
        assert_eq!(split(&snapshot.fleet, "shop/web-primary:80"), list(&[("shop/web-primary:80/aaa", 100)]));
        assert_eq!(split(&snapshot.fleet, "shop/web-canary:80"), list(&[("shop/web-canary:80/bbb", 100)]));
    }
}

#[test]
fn without_a_canary_its_service_answers_503() {
    let mut shop = Shop::new();
    shop.traffic("aaa", None, 0);
    let snapshot = build(&shop.inputs());
    assert_eq!(split(&snapshot.fleet, "shop/web-canary:80"), None);
    let carried = &snapshot.canaries[&shop.key()].resources;
    assert!(carried.contains(&(TypeUrl::Route, "shop/web-canary:80".into())), "its end is acknowledged too");
}

#[test]
fn a_cut_canary_has_no_weight_and_says_so() {
    let mut shop = Shop::new();
    shop.traffic("aaa", Some("bbb"), 50);
    let mut inputs = shop.inputs();
    inputs.cuts.insert(shop.key());
    let cut = build(&inputs);
    assert_eq!(split(&cut.fleet, "shop/web:80"), list(&[("shop/web:80/aaa", 100)]));
    assert_eq!(cut.canaries[&shop.key()].traffic.weight, 0);
    shop.traffic("aaa", Some("bbb"), 0);
    let written = build(&shop.inputs());
    assert_eq!(
        written.fleet.get(TypeUrl::Route, "shop/web:80").unwrap().version,
        cut.fleet.get(TypeUrl::Route, "shop/web:80").unwrap().version,
        "what was acknowledged for the cut counts when the status has caught up"
    );
}

#[test]
fn a_further_service_is_split_like_the_first_and_counted_under_its_name() {
    let mut shop = Shop::new();
    shop.canary["spec"]["service"]["additional"] = json!([{"name": "web-internal"}]);
    shop.traffic("aaa", Some("bbb"), 30);
    shop.revision_pod("a", "aaa", "10.1.0.1");
    let mut inputs = shop.inputs();
    let further = json!({
        "metadata": {"namespace": "shop", "name": "web-internal", "uid": "more"},
        "spec": {"ports": [{"port": 8080, "name": "http", "protocol": "TCP", "targetPort": 9090}], "type": "ClusterIP"},
    });
    inputs.services.push(std::sync::Arc::new(serde_json::from_value(further).unwrap()));
    let wanted = wanted_ports(&inputs);
    assert!(wanted.keys().any(|key| (key.service.as_str(), key.port) == ("web-internal", 8080)));
    inputs.ports = wanted.into_keys().zip(20_001..).collect();
    let snapshot = build(&inputs);
    let name = "shop/web-internal:8080";
    let both = [(format!("{name}/aaa"), 70), (format!("{name}/bbb"), 30)];
    assert_eq!(split(&snapshot.fleet, name), Some(both.to_vec()));
    let carriers = &snapshot.canaries[&shop.key()].resources;
    assert!(carriers.contains(&(TypeUrl::Route, name.into())), "its weight counts when this is acknowledged, too");
    let cluster: Cluster = unpack(&snapshot.fleet.get(TypeUrl::Cluster, &format!("{name}/aaa")).unwrap().body).unwrap();
    assert!(format!("{:?}", cluster.metadata).contains("StringValue(\"web\")"), "{:?}", cluster.metadata);
    let sidecar = &snapshot.sidecars[&RevisionKey { canary: shop.key(), revision: "aaa".into() }];
    assert!(sidecar.get(TypeUrl::Cluster, "local/9090").is_some(), "the sidecar leads to its port");
}

#[test]
fn while_the_apex_is_missing_a_further_service_is_served_as_before_and_without_any_no_traffic_is_claimed() {
    let mut shop = Shop::new();
    shop.canary["spec"]["service"]["additional"] = json!([{"name": "web-internal"}]);
    shop.traffic("aaa", Some("bbb"), 30);
    let mut inputs = shop.inputs();
    let further = json!({
        "metadata": {"namespace": "shop", "name": "web-internal", "uid": "more"},
        "spec": {"ports": [{"port": 80, "name": "http", "protocol": "TCP", "targetPort": 8080}], "type": "ClusterIP"},
    });
    inputs.services.push(std::sync::Arc::new(serde_json::from_value(further).unwrap()));
    inputs.ports = wanted_ports(&inputs).into_keys().zip(20_001..).collect();
    let whole = build(&inputs);

    inputs.services.retain(|service| service.name_any() != "web");
    let without = build(&inputs);
    let name = "shop/web-internal:80";
    let carriers = [TypeUrl::Listener, TypeUrl::Route].map(|kind| (kind, name.to_owned()));
    for (kind, name) in &carriers {
        assert_eq!(
            without.fleet.of(*kind).collect::<Vec<_>>(),
            [(name.as_str(), whole.fleet.get(*kind, name).unwrap())]
        );
    }
    assert_eq!(without.canaries[&shop.key()].resources, BTreeSet::from(carriers), "its acknowledgement is enough");

    inputs.services.retain(|service| service.name_any() != "web-internal");
    let none = build(&inputs);
    assert!(none.fleet.resources.is_empty() && none.canaries.is_empty());
}

#[test]
fn an_opaque_port_is_split_in_its_listener() {
    let mut shop = Shop::new();
    shop.canary["spec"]["service"]["appProtocol"] = json!("TCP");
    shop.traffic("aaa", Some("bbb"), 30);
    let snapshot = build(&shop.inputs());
    assert_eq!(split(&snapshot.fleet, "shop/web:80"), list(&[("shop/web:80/aaa", 70), ("shop/web:80/bbb", 30)]));
    let routed = &snapshot.canaries[&shop.key()];
    assert!(routed.resources.contains(&(TypeUrl::Listener, "shop/web:80".into())));
    assert!(snapshot.fleet.get(TypeUrl::Route, "shop/web:80").is_none());

    shop.traffic("aaa", None, 0);
    let snapshot = build(&shop.inputs());
    assert_eq!(split(&snapshot.fleet, "shop/web-canary:80"), list(&[("shop/web-canary:80/none", 100)]));
    assert!(addresses(&snapshot.fleet, "shop/web-canary:80/none").is_empty());
}

#[test]
fn only_ready_pods_that_are_not_going_away_get_requests() {
    let mut shop = Shop::new();
    shop.traffic("aaa", None, 0);
    shop.revision_pod("one", "aaa", "10.0.0.2");
    shop.revision_pod("two", "aaa", "10.0.0.1");
    shop.revision_pod("other", "bbb", "10.0.0.9");
    shop.pods.push(testing::pod(
        "shop",
        "late",
        "10.0.0.3",
        false,
        &[("sluice.dev/canary", "web"), ("sluice.dev/revision", "aaa")],
    ));
    let mut going = testing::pod(
        "shop",
        "going",
        "10.0.0.4",
        true,
        &[("sluice.dev/canary", "web"), ("sluice.dev/revision", "aaa")],
    );
    going["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    shop.pods.push(going);
    let view = build(&shop.inputs()).fleet;
    assert_eq!(addresses(&view, "shop/web:80/aaa"), ["10.0.0.1:20443", "10.0.0.2:20443"]);
}

#[test]
fn where_all_pods_of_a_version_are_going_away_those_that_are_ready_get_its_requests() {
    let mut shop = Shop::new();
    shop.traffic("aaa", None, 0);
    for (name, ip, ready) in [("going", "10.0.0.4", true), ("gone", "10.0.0.5", false)] {
        let labels = [("sluice.dev/canary", "web"), ("sluice.dev/revision", "aaa")];
        let mut pod = testing::pod("shop", name, ip, ready, &labels);
        pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        shop.pods.push(pod);
    }
    let view = build(&shop.inputs()).fleet;
    assert_eq!(addresses(&view, "shop/web:80/aaa"), ["10.0.0.4:20443"]);
}

#[test]
fn the_targets_own_pods_are_dialled_in_plaintext_where_each_has_the_named_port() {
    let mut shop = Shop::new();
    shop.traffic("original", None, 0);
    shop.service_port["targetPort"] = json!("http");
    for (name, ip, port) in [("a", "10.0.0.1", 8080), ("b", "10.0.0.2", 9090)] {
        let mut pod = testing::pod("shop", name, ip, true, &[("app", "web")]);
        pod["spec"]["containers"][0]["ports"] = json!([{"name": "http", "containerPort": port}]);
        shop.originals.push(pod);
    }
    let mut without = testing::pod("shop", "c", "10.0.0.3", true, &[("app", "web")]);
    without["spec"]["containers"][0]["ports"] = json!([]);
    shop.originals.push(without);
    let view = build(&shop.inputs()).fleet;
    assert_eq!(addresses(&view, "shop/web:80/original"), ["10.0.0.1:8080", "10.0.0.2:9090"]);
    let cluster: Cluster = unpack(&view.get(TypeUrl::Cluster, "shop/web:80/original").unwrap().body).unwrap();
    assert!(cluster.transport_socket.is_none());
}

#[test]
fn a_port_that_is_not_written_down_is_not_used_and_the_traffic_is_not_claimed() {
    let mut shop = Shop::new();
    shop.traffic("aaa", None, 0);
    let mut inputs = shop.inputs();
    inputs.ports.clear();
    let snapshot = build(&inputs);
    assert!(snapshot.fleet.resources.is_empty());
    assert!(snapshot.canaries.is_empty());
    assert_eq!(wanted_ports(&inputs).len(), 3);
}

#[test]
fn a_service_of_that_name_that_is_not_ours_is_left_alone() {
    let mut shop = Shop::new();
    shop.traffic("aaa", Some("bbb"), 0);
    shop.foreign_companions = true;
    let inputs = shop.inputs();
    let snapshot = build(&inputs);
    let listeners: Vec<&str> = snapshot.fleet.of(TypeUrl::Listener).map(|(name, _)| name).collect();
    assert_eq!(listeners, ["shop/web:80"]);
    assert_eq!(wanted_ports(&inputs).len(), 1);
}

#[test]
fn sidecars_hold_their_view_before_they_have_traffic_or_even_a_service() {
    let mut shop = Shop::new();
    shop.revision_pod("one", "ccc", "10.0.0.1");
    let with_service = build(&shop.inputs());
    let revision = RevisionKey { canary: shop.key(), revision: "ccc".into() };
    assert!(with_service.sidecars[&revision].get(TypeUrl::Cluster, "local/8080").is_some());
    let mut inputs = shop.inputs();
    inputs.services.clear();
    let without = build(&inputs);
    assert_eq!(
        without.sidecars[&revision].get(TypeUrl::Listener, "inbound"),
        with_service.sidecars[&revision].get(TypeUrl::Listener, "inbound")
    );
    assert_eq!(without.pods["one-uid"], revision);
}

#[test]
fn members_are_the_fleets_pods_that_are_not_gone() {
    let mut shop = Shop::new();
    shop.fleet_pod("serving", "10.0.1.1");
    shop.fleet_pod("over", "10.0.1.2");
    shop.pods.last_mut().unwrap()["status"]["phase"] = json!("Failed");
    shop.fleet_pod("new", "10.0.1.3");
    shop.pods.last_mut().unwrap()["status"]["phase"] = json!("Pending");
    let mut other = testing::pod("shop", "elsewhere", "10.0.1.4", true, &[("sluice.dev/fleet", "default")]);
    other["metadata"]["namespace"] = json!("shop");
    shop.pods.push(other);
    let members = build(&shop.inputs()).members;
    let seen: Vec<(&str, bool)> = members.values().map(|one| (one.name.as_str(), one.started)).collect();
    assert_eq!(seen, [("new", false), ("serving", true)]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn whatever_the_shop_looks_like_weights_sum_to_100_and_every_name_exists(
        primary in prop::sample::select(vec!["original", "aaa", "bbb"]),
        canary in prop::option::of(prop::sample::select(vec!["original", "aaa", "bbb"])),
        weight in 0..=100_i32,
        opaque in any::<bool>(),
        more_ports in prop::collection::vec((81_u16..86, prop::sample::select(vec!["http-x", "mysql", ""])), 0..3),
        pods in prop::collection::vec((0_u8..9, prop::sample::select(vec!["aaa", "bbb"])), 0..6),
        cut in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let mut shop = Shop::new();
        shop.traffic(primary, canary, weight);
        if opaque {
            shop.canary["spec"]["service"]["appProtocol"] = json!("tcp");
        }
        for (number, name) in more_ports {
            shop.more_ports.push(json!({"port": number, "name": name, "protocol": "TCP", "targetPort": number + 1}));
        }
        for (number, revision) in pods {
            shop.revision_pod(&format!("p{number}-{revision}"), revision, &format!("10.0.0.{number}"));
        }
        let mut inputs = shop.inputs();
        if cut {
            inputs.cuts.insert(shop.key());
        }
        let snapshot = build(&inputs);
        let view = &snapshot.fleet;
        for (name, listener) in view.of(TypeUrl::Listener) {
            prop_assert_eq!(listener.body.type_url.as_str(), TypeUrl::Listener.as_str());
            if let Some(split) = split(view, name) {
                prop_assert_eq!(split.iter().map(|(_, weight)| weight).sum::<u32>(), 100);
                prop_assert!(split.iter().all(|(_, weight)| *weight > 0));
            }
        }
        for kind in [TypeUrl::Listener, TypeUrl::Route] {
            for (_, resource) in view.of(kind).chain(snapshot.sidecars.values().flat_map(|view| view.of(kind))) {
                for (kind, name) in resource.needs.iter() {
                    let there = view.get(*kind, name).is_some()
                        || snapshot.sidecars.values().any(|view| view.get(*kind, name).is_some());
                    prop_assert!(there, "{kind} {name} is named and missing");
                }
            }
        }
        for (name, _) in view.of(TypeUrl::Cluster) {
            prop_assert!(view.get(TypeUrl::Endpoints, name).is_some(), "{name} has no endpoints, not even none");
        }
        let routed = &snapshot.canaries[&shop.key()];
        for (kind, name) in &routed.resources {
            prop_assert!(view.get(*kind, name).is_some());
            prop_assert_eq!(&snapshot.carriers[&(*kind, name.clone())], &shop.key());
        }
        prop_assert_eq!(routed.traffic.weight, if cut { 0 } else { weight });

        // The order of the facts means nothing.
        testing::shuffle(&mut inputs, seed);
        let again = build(&inputs);
        for kind in TypeUrl::ALL {
            prop_assert_eq!(view.of(kind).collect::<Vec<_>>(), again.fleet.of(kind).collect::<Vec<_>>());
        }
    }
}
