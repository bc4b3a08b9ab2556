use std::{sync::Arc, time::Duration};

use proptest::prelude::*;
use prost::Message;
use sluice_proxy::{
    config::{Change, Resources},
    metrics::GrpcStatus,
    snapshot::{Action, ClientTls, MetricLabels, Policy, Protocol, RetryOn, ServerTls, Snapshot, Upstream},
};
use sluice_xds::{
    TypeUrl,
    envoy::{
        config::{
            cluster::v3::Cluster,
            core::v3::{HeaderValue, HeaderValueOption},
            listener::v3::Listener,
            route::v3::{RetryPolicy, Route, RouteConfiguration, route::Action as RouteAction},
        },
        service::discovery::v3::Resource,
    },
    pack,
};

use crate::{
    pki::FLEET,
    resources::{
        address, cluster, endpoints, inbound, listener, local_cluster, plain_cluster, resource, route, tcp_listener,
        timed, unavailable,
    },
};

pub(crate) const A: &str = "shop/web:80/aaaaaaaaaa";
pub(crate) const B: &str = "shop/web:80/bbbbbbbbbb";
pub(crate) const WEB: &str = "shop/web:80";

/// Takes resources that must all be good.
pub(crate) fn accept(resources: &mut Resources, kind: TypeUrl, these: &[Resource]) -> Arc<Snapshot> {
    let rejected = resources.update(Change { kind, resources: these, removed: &[] });
    assert!(rejected.is_empty(), "{rejected:?}");
    resources.build()
}

/// Why this resource is rejected.
pub(crate) fn reason(kind: TypeUrl, resource: Resource) -> String {
    let mut resources = Resources::default();
    let rejected = resources.update(Change { kind, resources: &[resource], removed: &[] });
    let [rejected] = rejected.as_slice() else { panic!("it was accepted") };
    assert!(resources.build().listeners.is_empty());
    rejected.error.to_string()
}

/// How the first route of the port forwards.
pub(crate) fn policy(snapshot: &Snapshot) -> &Policy {
    let Protocol::Http(routes) = &snapshot.listeners[WEB].chains[0].protocol else { panic!("{snapshot:?}") };
    let Action::Forward { policy, .. } = &routes[0].action else { panic!("{snapshot:?}") };
    policy
}

pub(crate) fn fleet() -> Resources {
    let mut resources = Resources::default();
    accept(
        &mut resources,
        TypeUrl::Cluster,
        &[resource(A, "1", &cluster(A, "p8080.aaaaaaaaaa", FLEET)), resource(B, "1", &plain_cluster(B))],
    );
    accept(
        &mut resources,
        TypeUrl::Endpoints,
        &[
            resource(A, "1", &endpoints(A, &[("10.0.0.2", 20443), ("10.0.0.1", 20443), ("10.0.0.2", 20443)])),
            resource(B, "1", &endpoints(B, &[])),
        ],
    );
    accept(&mut resources, TypeUrl::Listener, &[resource(WEB, "1", &listener(WEB, 20001))]);
    accept(&mut resources, TypeUrl::Route, &[resource(WEB, "1", &route(WEB, &[(A, 95), (B, 5)]))]);
    resources
}

#[test]
fn the_fleet_view_becomes_a_weighted_split_over_revisions() {
    let resources = fleet();
    let listener = &resources.snapshot().listeners[WEB];
    assert_eq!(listener.address, "127.0.0.1:20001".parse().unwrap());
    let [chain] = listener.chains.as_slice() else { panic!() };
    assert_eq!((&chain.server_name, &chain.tls), (&None, &None));
    let split = chain.protocol.splits().next().unwrap();
    let [(a, 95), (b, 5)] = split.targets.as_slice() else { panic!("{split:?}") };
    assert_eq!(
        a.upstream,
        Upstream::Endpoints(vec!["10.0.0.1:20443".parse().unwrap(), "10.0.0.2:20443".parse().unwrap()])
    );
    assert_eq!(a.tls, Some(ClientTls { sni: "p8080.aaaaaaaaaa".to_owned(), server_id: FLEET.to_owned() }));
    assert_eq!(
        a.labels,
        Some(MetricLabels {
            destination_namespace: "shop".to_owned(),
            destination_service: "web".to_owned(),
            revision: "aaaaaaaaaa".to_owned(),
        })
    );
    assert_eq!((&b.tls, &b.upstream), (&None, &Upstream::Endpoints(Vec::new())));
}

#[test]
fn the_sidecar_view_becomes_a_chain_for_each_application_port() {
    let mut resources = Resources::default();
    let names = [(8080, "p8080.aaaaaaaaaa"), (9090, "p9090.aaaaaaaaaa")];
    let clusters = [8080, 9090].map(|port| resource(&format!("local/{port}"), "1", &local_cluster(port)));
    accept(&mut resources, TypeUrl::Cluster, &clusters);
    let snapshot =
        accept(&mut resources, TypeUrl::Listener, &[resource("inbound", "1", &inbound(20443, &names, FLEET))]);
    let chains = &snapshot.listeners["inbound"].chains;
    assert_eq!(chains.len(), 2);
    for (chain, (port, name)) in chains.iter().zip(names) {
        assert_eq!(chain.server_name.as_deref(), Some(name));
        assert_eq!(chain.tls, Some(ServerTls { client_id: FLEET.to_owned() }));
        let split = chain.protocol.splits().next().unwrap();
        assert_eq!(split.targets[0].0.upstream, Upstream::OriginalDst { port });
        assert_eq!(split.targets[0].0.labels, None);
    }
}

#[test]
fn an_opaque_port_and_a_port_without_back_ends_are_served_too() {
    let mut resources = fleet();
    let snapshot = accept(
        &mut resources,
        TypeUrl::Listener,
        &[resource("shop/db:5432", "1", &tcp_listener("shop/db:5432", 20002, &[(A, 1)]))],
    );
    assert!(
        matches!(&snapshot.listeners["shop/db:5432"].chains[0].protocol, Protocol::Tcp(split) if split.targets.len() == 1)
    );
    let snapshot = accept(&mut resources, TypeUrl::Route, &[resource(WEB, "2", &unavailable(WEB))]);
    let protocol = &snapshot.listeners[WEB].chains[0].protocol;
    assert_eq!(protocol, &Protocol::http(Action::Respond(http::StatusCode::SERVICE_UNAVAILABLE)));
}

#[test]
fn a_routes_timeout_is_served_and_zero_is_none() {
    let mut resources = fleet();
    for (version, seconds, nanos, expected) in
        [("2", 1, 500_000_000, Some(Duration::from_millis(1500))), ("3", 0, 0, None)]
    {
        let timed = timed(route(WEB, &[(A, 100)]), seconds, nanos);
        let snapshot = accept(&mut resources, TypeUrl::Route, &[resource(WEB, version, &timed)]);
        assert_eq!(policy(&snapshot).timeout, expected);
    }
    // The least number has no negative, and the milliseconds of the greatest fit nowhere.
    let bad = [(-1, 0), (0, -1), (i64::MIN, 0), (i64::MIN, 1), (0, i32::MIN), (1, i32::MAX), (i64::MAX, 0)];
    for (seconds, nanos) in bad {
        let bad = resource(WEB, "4", &timed(route(WEB, &[(A, 100)]), seconds, nanos));
        let reason = reason(TypeUrl::Route, bad);
        assert!(reason.contains("virtual_hosts[0].routes[0].route.timeout"), "{reason}");
    }
}

#[test]
fn retries_and_changes_of_headers_are_served_or_refused_by_field() {
    let with = |change: &dyn Fn(&mut Route)| {
        let mut configuration = route(WEB, &[(A, 100)]);
        change(&mut configuration.virtual_hosts[0].routes[0]);
        configuration
    };
    let retrying = |on: &str| {
        let policy = RetryPolicy { retry_on: on.to_owned(), num_retries: Some(2), per_try_timeout: None };
        move |route: &mut Route| {
            if let Some(RouteAction::Route(action)) = &mut route.action {
                action.retry_policy = Some(policy.clone());
            }
        }
    };
    let add = |key: &str, value: &str, append_action: i32| HeaderValueOption {
        header: Some(HeaderValue { key: key.to_owned(), value: value.to_owned() }),
        append_action,
    };
    let mut resources = fleet();
    let good = with(&|route| {
        retrying("connect-failure,gateway-error,unavailable")(route);
        route.request_headers_to_add = vec![add("X-Team", "shop", 2), add("x-hop", "fleet", 0)];
        route.response_headers_to_remove = vec!["Server".to_owned()];
    });
    let snapshot = accept(&mut resources, TypeUrl::Route, &[resource(WEB, "2", &good)]);
    let policy = policy(&snapshot);
    let retry = policy.retry.as_ref().unwrap();
    assert_eq!(retry.on, [RetryOn::GatewayError, RetryOn::Grpc(GrpcStatus::parse(b"14"))]);
    assert_eq!(retry.retries, 2);
    let written: Vec<_> =
        policy.request_headers.write.iter().map(|(name, _, append)| (name.as_str(), *append)).collect();
    assert_eq!(written, [("x-team", false), ("x-hop", true)]);
    assert_eq!(policy.response_headers.remove, ["server"]);

    type Change<'a> = &'a dyn Fn(&mut Route);
    let bad: [(Change<'_>, &str); 6] = [
        (&retrying("5xx,sometimes"), "routes[0].route.retry_policy.retry_on"),
        (&|route| route.request_headers_to_remove = vec!["Host".to_owned()], "routes[0].request_headers_to_remove[0]"),
        (&|route| route.response_headers_to_remove = vec!["a b".to_owned()], "routes[0].response_headers_to_remove[0]"),
        (
            &|route| route.response_headers_to_add = vec![add("x-sluice-response-flag", "UH", 2)],
            "routes[0].response_headers_to_add[0].header.key",
        ),
        (
            &|route| route.request_headers_to_add = vec![add("x-user", "%DOWNSTREAM_PEER_URI_SAN%", 2)],
            "routes[0].request_headers_to_add[0].header.value",
        ),
        (
            &|route| route.request_headers_to_add = vec![add("x-user", "a", 1)],
            "routes[0].request_headers_to_add[0].append_action",
        ),
    ];
    for (change, field) in bad {
        let reason = reason(TypeUrl::Route, resource(WEB, "3", &with(change)));
        assert!(reason.contains(field), "{reason}");
    }
}

#[test]
fn what_did_not_change_is_the_same_arc() {
    let mut resources = fleet();
    let before = accept(
        &mut resources,
        TypeUrl::Listener,
        &[resource("shop/db:5432", "1", &tcp_listener("shop/db:5432", 20002, &[(A, 1)]))],
    );
    assert!(Arc::ptr_eq(&before, &resources.build()));
    let after = accept(&mut resources, TypeUrl::Route, &[resource(WEB, "2", &route(WEB, &[(A, 90), (B, 10)]))]);
    assert!(Arc::ptr_eq(&before.listeners["shop/db:5432"], &after.listeners["shop/db:5432"]));
    assert!(!Arc::ptr_eq(&before.listeners[WEB], &after.listeners[WEB]));
    let cluster = |snapshot: &Snapshot, index: usize| {
        snapshot.listeners[WEB].chains[0].protocol.splits().next().unwrap().targets[index].0.clone()
    };
    assert!(Arc::ptr_eq(&cluster(&before, 0), &cluster(&after, 0)));
    // The same content in a new version changes nothing either.
    let again = accept(&mut resources, TypeUrl::Endpoints, &[resource(B, "9", &endpoints(B, &[]))]);
    assert!(Arc::ptr_eq(&after, &again));
}

#[test]
fn a_new_version_of_a_listener_waits_for_its_clusters_while_the_old_one_serves() {
    let mut resources = fleet();
    let db = "shop/db:5432";
    let before = accept(&mut resources, TypeUrl::Listener, &[resource(db, "1", &tcp_listener(db, 20002, &[(A, 1)]))]);
    let new = "shop/db:5432/cccccccccc";
    let waiting =
        accept(&mut resources, TypeUrl::Listener, &[resource(db, "2", &tcp_listener(db, 20002, &[(new, 1)]))]);
    assert!(Arc::ptr_eq(&before, &waiting));
    assert_eq!(resources.missing_cluster(TypeUrl::Listener, db), Some(new));
    assert_eq!(resources.versions(TypeUrl::Listener)[db], "1");
    accept(&mut resources, TypeUrl::Cluster, &[resource(new, "1", &plain_cluster(new))]);
    assert!(resources.subscriptions().endpoints.contains(new));
    let after = accept(&mut resources, TypeUrl::Endpoints, &[resource(new, "1", &endpoints(new, &[]))]);
    assert!(matches!(&after.listeners[db].chains[0].protocol, Protocol::Tcp(split) if split.targets[0].0.name == new));
    assert_eq!(resources.missing_cluster(TypeUrl::Listener, db), None);
    assert_eq!(resources.versions(TypeUrl::Listener)[db], "2");
}

#[test]
fn unknown_fields_are_ignored() {
    let mut any = pack(&plain_cluster(A));
    // Field 9999, a string: some later version of the API.
    let mut extra = vec![0xfa, 0xf0, 0x04, 0x03];
    extra.extend_from_slice(b"new");
    any.value.extend_from_slice(&extra);
    assert_eq!(Cluster::decode(any.value.as_slice()).unwrap().name, A);
    let resource = Resource { name: A.to_owned(), version: "1".to_owned(), resource: Some(any), ..Resource::default() };
    accept(&mut Resources::default(), TypeUrl::Cluster, &[resource]);
}

#[test]
fn what_a_proxy_cannot_do_is_rejected_with_the_field_and_the_reason() {
    use sluice_xds::envoy::config::cluster::v3::cluster::{ClusterDiscoveryType, DiscoveryType, LbPolicy};
    let of_cluster = |change: fn(&mut Cluster)| {
        let mut message = cluster(A, "p8080.aaaaaaaaaa", FLEET);
        change(&mut message);
        reason(TypeUrl::Cluster, resource(A, "1", &message))
    };
    let of_listener = |change: fn(&mut Listener)| {
        let mut message = listener(WEB, 20001);
        change(&mut message);
        reason(TypeUrl::Listener, resource(WEB, "1", &message))
    };
    let of_inbound = |change: fn(&mut Listener)| {
        let mut message = inbound(20443, &[(8080, "p8080.a"), (9090, "p9090.a")], FLEET);
        change(&mut message);
        reason(TypeUrl::Listener, resource("inbound", "1", &message))
    };
    // Built in full only to be a route of `listener`, which asks for it by name.
    let of_route = |message: RouteConfiguration| reason(TypeUrl::Route, resource(WEB, "1", &message));
    let of_endpoints = |ip: &str, port: u16| reason(TypeUrl::Endpoints, resource(A, "1", &endpoints(A, &[(ip, port)])));

    let table = [
        (of_cluster(|it| it.lb_policy = LbPolicy::RingHash.into()), "lb_policy is 'RING_HASH'"),
        (
            of_cluster(|it| {
                it.cluster_discovery_type = Some(ClusterDiscoveryType::Type(DiscoveryType::StrictDns.into()));
            }),
            "type is 'STRICT_DNS'",
        ),
        (of_cluster(|it| it.cluster_discovery_type = None), "type is missing"),
        (of_cluster(|it| it.eds_cluster_config = None), "eds_cluster_config is missing"),
        (
            of_cluster(|it| it.connect_timeout = Some(prost_types::Duration { seconds: -1, nanos: 0 })),
            "connect_timeout is '-1 s 0 ns'",
        ),
        (of_cluster(|it| "other".clone_into(&mut it.name)), "name is 'other'"),
        (of_cluster(|it| it.transport_socket = cluster(A, "", FLEET).transport_socket), "sni is missing"),
        (
            of_cluster(|it| it.transport_socket = cluster(A, "p8080.a", "spiffe://x").transport_socket),
            "exact is 'spiffe://x'",
        ),
        (
            of_cluster(|it| {
                let socket = inbound(20443, &[(8080, "p8080.a")], FLEET).filter_chains.remove(0).transport_socket;
                it.transport_socket = socket;
            }),
            "transport_socket.typed_config cannot be read: expected a envoy",
        ),
        (of_listener(|it| it.address = address("0.0.0.0", 20445)), "the proxy needs this port itself"),
        (of_listener(|it| it.address = None), "address.socket_address is missing"),
        (of_listener(|it| it.filter_chains.clear()), "filter_chains is missing"),
        (of_listener(|it| it.filter_chains[0].filters.clear()), "filter_chains[0].filters is '0 filters'"),
        (of_listener(|it| it.filter_chains.extend_from_within(..)), "an earlier chain takes the same"),
        (
            of_inbound(|it| it.filter_chains[1].filter_chain_match = it.filter_chains[0].filter_chain_match.clone()),
            "server_names is 'p8080.a', but an earlier chain takes the same",
        ),
        (of_inbound(|it| it.filter_chains[1].transport_socket = None), "it must fit the transport_socket of the chain"),
        (
            of_inbound(|it| {
                let rule = it.filter_chains[0].filter_chain_match.as_mut().unwrap();
                rule.server_names = vec!["*.a".to_owned()];
            }),
            "it must be a full DNS name",
        ),
        (of_route(route(WEB, &[])), "the sum of the weights must be above 0"),
        (of_route(route(WEB, &[(A, 0), (B, 0)])), "the sum of the weights must be above 0"),
        (of_route(route(WEB, &[(A, u32::MAX), (B, 1)])), "the sum must be below 2^32"),
        (of_route(route(WEB, &[(A, 1), (A, 1)])), "each cluster may be named once"),
        (of_route(RouteConfiguration { virtual_hosts: Vec::new(), ..route(WEB, &[(A, 1)]) }), "'0 hosts'"),
        (of_endpoints("10.0.0.256", 80), "it must be an IP address"),
        (of_endpoints("web.shop", 80), "it must be an IP address"),
        (of_endpoints("10.0.0.1", 0), "a port is a number from 1 to 65535"),
        (reason(TypeUrl::Cluster, Resource { name: A.to_owned(), ..Resource::default() }), "resource is missing"),
        (reason(TypeUrl::Cluster, resource(A, "1", &listener(A, 1))), "expected a envoy.config.cluster.v3.Cluster"),
    ];
    for (reason, expected) in table {
        assert!(reason.contains(expected), "'{reason}' does not contain '{expected}'");
    }
}

#[test]
fn two_listeners_on_one_port_are_refused_unless_the_first_goes() {
    let mut resources = fleet();
    let other = [resource("shop/api:80", "1", &listener("shop/api:80", 20001))];
    let change = Change { kind: TypeUrl::Listener, resources: &other, removed: &[] };
    let rejected = resources.update(change);
    assert!(rejected[0].to_string().contains("another listener has this port"), "{rejected:?}");
    let gone = [WEB.to_owned()];
    assert!(resources.update(Change { removed: &gone, ..change }).is_empty());
    // The one that had the port first comes back, and finds it taken.
    let back = [resource(WEB, "2", &listener(WEB, 20001))];
    assert_eq!(resources.update(Change { resources: &back, ..change }).len(), 1);
    // It is free when its holder has moved, and that has taken effect.
    let unasked = route("shop/api:80", &[(A, 1)]);
    accept(&mut resources, TypeUrl::Route, &[resource("shop/api:80", "1", &unasked)]);
    let moved = [resource("shop/api:80", "2", &listener("shop/api:80", 20009))];
    assert!(resources.update(Change { resources: &moved, ..change }).is_empty());
    assert_eq!(resources.update(Change { resources: &back, ..change }).len(), 1, "connections may come there still");
    resources.build();
    assert!(resources.update(Change { resources: &back, ..change }).is_empty());
}

/// What a confused or hostile control plane could send: good resources, with some of their bytes changed.
fn damaged() -> impl Strategy<Value = (TypeUrl, Resource)> {
    let good = vec![
        (TypeUrl::Cluster, resource(A, "1", &cluster(A, "p8080.aaaaaaaaaa", FLEET))),
        (TypeUrl::Cluster, resource(B, "1", &plain_cluster(B))),
        (TypeUrl::Cluster, resource("local/8080", "1", &local_cluster(8080))),
        (TypeUrl::Endpoints, resource(A, "1", &endpoints(A, &[("10.0.0.1", 20443)]))),
        (TypeUrl::Endpoints, resource(B, "1", &endpoints(B, &[]))),
        (TypeUrl::Listener, resource(WEB, "1", &listener(WEB, 20001))),
        (TypeUrl::Listener, resource("db", "1", &tcp_listener("db", 20002, &[(A, 1), (B, 2)]))),
        (TypeUrl::Listener, resource("inbound", "1", &inbound(20443, &[(8080, "p8080.a")], FLEET))),
        (TypeUrl::Route, resource(WEB, "1", &route(WEB, &[(A, 95), (B, 5)]))),
        (TypeUrl::Route, resource(WEB, "1", &unavailable(WEB))),
    ];
    let damage = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3);
    (prop::sample::select(good), damage).prop_map(|((kind, mut resource), damage)| {
        let value = &mut resource.resource.as_mut().unwrap().value;
        for (at, byte) in damage {
            let at = at.index(value.len());
            value[at] = byte;
        }
        (kind, resource)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn whatever_comes_never_panics_and_every_split_can_be_drawn(
        steps in prop::collection::vec((damaged(), any::<bool>()), 1..40)
    ) {
        let mut resources = Resources::default();
        let mut reference = Resources::default();
        for ((kind, resource), remove) in steps {
            let removed: &[String] = if remove { std::slice::from_ref(&resource.name) } else { &[] };
            let added = if remove { &[][..] } else { std::slice::from_ref(&resource) };
            let change = Change { kind, resources: added, removed };
            let rejected = resources.update(change);
            prop_assert!(rejected.len() <= added.len());
            let snapshot = resources.build();
            for listener in snapshot.listeners.values() {
                prop_assert!(!listener.chains.is_empty() && listener.address.port() != 0);
                for chain in &listener.chains {
                    for split in chain.protocol.splits() {
                        let sum: u64 = split.targets.iter().map(|(_, weight)| u64::from(*weight)).sum();
                        prop_assert!(sum > 0 && sum <= u64::from(u32::MAX));
                    }
                }
            }
            // What is reported is what serves: the same calls on a second holder give the same.
            reference.update(change);
            prop_assert_eq!(format!("{:?}", reference.build()), format!("{snapshot:?}"));
            prop_assert!(!resources.dump().to_string().is_empty());
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), kind in 0..4_usize) {
        let kind = TypeUrl::ALL[kind];
        let any = prost_types::Any { type_url: kind.as_str().to_owned(), value: bytes };
        let resource = Resource { name: "x".to_owned(), version: "1".to_owned(), resource: Some(any), ..Resource::default() };
        let mut resources = Resources::default();
        resources.update(Change { kind, resources: &[resource], removed: &[] });
        resources.build();
    }
}

/// What this thread has had of the processor, in nanoseconds.
fn spent() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    text.split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn one_endpoint_more_costs_in_proportion_to_those_of_its_cluster() {
    let cost = |count: u16| {
        let mut all = fleet();
        let versions: Vec<_> = (0..10)
            .map(|more| {
                let ip = |index: u16| format!("10.0.{}.{}", index / 250, index % 250);
                let ips: Vec<_> = (0..count + more).map(ip).collect();
                let addresses: Vec<_> = ips.iter().map(|ip| (ip.as_str(), 20443)).collect();
                resource(A, &more.to_string(), &endpoints(A, &addresses))
            })
            .collect();
        accept(&mut all, TypeUrl::Endpoints, &versions[..1]);
        let before = spent();
        for version in &versions[1..] {
            accept(&mut all, TypeUrl::Endpoints, std::slice::from_ref(version));
        }
        spent() - before
    };
    // The least of three, as others may have been in the caches' way. Its square would be 100 times as much.
    let least = |count| (0..3).map(|_| cost(count)).min().unwrap();
    let (few, many) = (least(1000), least(10_000));
    assert!(many < few * 40, "{few} ns for 1000, {many} ns for 10000");
}
