//! What a route says beside its split: whose requests are drawn together, who gets copies, and what goes wrong on purpose.

use std::{sync::Arc, time::Duration};

use http::StatusCode;
use prost_types::Any;
use sluice_proxy::{
    config::Resources,
    metrics::GrpcStatus,
    snapshot::{Abort, Action, Fault, HashPolicy, HashedBy, HeaderRule, Policy, Protocol, Share, Snapshot, Split},
};
use sluice_xds::{
    TypeUrl,
    envoy::{
        config::{
            core::v3::RuntimeFractionalPercent,
            route::v3::{
                HeaderMatcher, RouteAction, RouteConfiguration,
                header_matcher::HeaderMatchSpecifier,
                route::Action as MessageAction,
                route_action::{
                    ClusterSpecifier, HashPolicy as HashMessage, RequestMirrorPolicy,
                    hash_policy::{Cookie, CookieAttribute, Header, PolicySpecifier},
                },
                weighted_cluster::RandomValueSpecifier,
            },
        },
        extensions::filters::{
            common::fault::v3::{FaultDelay, fault_delay::FaultDelaySecifier},
            http::fault::v3::{FaultAbort, HttpFault, fault_abort::ErrorType},
            network::http_connection_manager::v3::{
                HttpConnectionManager, HttpFilter, http_filter::ConfigType as HttpFilterConfig,
            },
        },
        r#type::v3::FractionalPercent,
    },
    pack,
};

use crate::{
    resources::{endpoints, inbound, listener, plain_cluster, resource, route},
    snapshots::{A, B, WEB, accept, fleet, reason},
};

/// A route to A and B, changed.
fn with(change: impl FnOnce(&mut RouteAction)) -> RouteConfiguration {
    let mut configuration = route(WEB, &[(A, 95), (B, 5)]);
    if let Some(MessageAction::Route(action)) = &mut configuration.virtual_hosts[0].routes[0].action {
        change(action);
    }
    configuration
}

fn faulty(fault: &HttpFault) -> RouteConfiguration {
    let mut configuration = route(WEB, &[(A, 100)]);
    let configs = &mut configuration.virtual_hosts[0].routes[0].typed_per_filter_config;
    configs.insert("envoy.filters.http.fault".to_owned(), pack(fault));
    configuration
}

fn served(snapshot: &Snapshot) -> (&Split, &Policy) {
    let Protocol::Http(routes) = &snapshot.listeners[WEB].chains[0].protocol else { panic!("{snapshot:?}") };
    let Action::Forward { split, policy } = &routes[0].action else { panic!("{snapshot:?}") };
    (split, policy)
}

fn serve(configuration: &RouteConfiguration) -> Arc<Snapshot> {
    accept(&mut fleet(), TypeUrl::Route, &[resource(WEB, "2", configuration)])
}

fn refused(configuration: &RouteConfiguration) -> String {
    reason(TypeUrl::Route, resource(WEB, "2", configuration))
}

fn percent(numerator: u32) -> FractionalPercent {
    FractionalPercent { numerator, denominator: 0 }
}

fn hashing(used: bool, policies: Vec<PolicySpecifier>) -> RouteConfiguration {
    with(|action| {
        action.hash_policy = policies
            .into_iter()
            .map(|specifier| HashMessage { policy_specifier: Some(specifier), terminal: true })
            .collect();
        if let Some(ClusterSpecifier::WeightedClusters(weighted)) = &mut action.cluster_specifier {
            weighted.random_value_specifier = Some(RandomValueSpecifier::UseHashPolicy(used));
        }
    })
}

fn cookie(change: impl FnOnce(&mut Cookie)) -> PolicySpecifier {
    let mut cookie = Cookie {
        name: "user".to_owned(),
        ttl: Some(prost_types::Duration { seconds: 3600, nanos: 5 }),
        path: "/".to_owned(),
        attributes: Vec::new(),
    };
    change(&mut cookie);
    PolicySpecifier::Cookie(cookie)
}

fn header(name: &str) -> PolicySpecifier {
    PolicySpecifier::Header(Header { header_name: name.to_owned() })
}

#[test]
fn users_are_split_by_a_header_or_a_cookie() {
    let attribute = |name: &str, value: &str| CookieAttribute { name: name.to_owned(), value: value.to_owned() };
    let snapshot = serve(&hashing(
        true,
        vec![
            header("X-User"),
            cookie(|it| it.attributes = vec![attribute("SameSite", "Lax"), attribute("Secure", "")]),
            cookie(|it| (it.ttl, it.path) = (Some(prost_types::Duration::default()), String::new())),
            cookie(|it| it.ttl = None),
        ],
    ));
    let by_cookie = |given: Option<&str>| HashPolicy {
        by: HashedBy::Cookie { name: "user".to_owned(), given: given.map(str::to_owned) },
        terminal: true,
    };
    assert_eq!(
        served(&snapshot).1.affinity,
        [
            HashPolicy { by: HashedBy::Header(http::HeaderName::from_static("x-user")), terminal: true },
            by_cookie(Some("; Max-Age=3600; Path=/; SameSite=Lax; Secure; HttpOnly")),
            by_cookie(Some("; HttpOnly")),
            by_cookie(None),
        ]
    );
    assert_eq!(served(&serve(&hashing(false, vec![header("x-user")]))).1.affinity, []);

    let bad = [
        (header("a b"), "hash_policy[0].header.header_name is 'a b'"),
        (header("Host"), "hash_policy[0].header.header_name is 'Host'"),
        (cookie(|it| it.name.clear()), "hash_policy[0].cookie.name is ''"),
        (cookie(|it| it.name = "a=b".to_owned()), "hash_policy[0].cookie.name is 'a=b'"),
        (cookie(|it| it.path = "/; Domain=x".to_owned()), "hash_policy[0].cookie.path is '/; Domain=x'"),
        (cookie(|it| it.attributes = vec![attribute("a", "b\r\nc")]), "hash_policy[0].cookie.attributes[0].value"),
        (cookie(|it| it.ttl = Some(prost_types::Duration { seconds: -1, nanos: 0 })), "hash_policy[0].cookie.ttl"),
    ];
    for (policy, expected) in bad {
        let reason = refused(&hashing(true, vec![policy]));
        assert!(reason.contains(expected), "{reason}");
    }
    // Of a kind that we do not know.
    let mut unknown = hashing(true, vec![header("x-user")]);
    if let Some(MessageAction::Route(action)) = &mut unknown.virtual_hosts[0].routes[0].action {
        action.hash_policy[0].policy_specifier = None;
    }
    assert!(refused(&unknown).contains("hash_policy[0].header or "));
}

#[test]
fn copies_go_to_a_cluster_that_is_waited_for_and_kept_like_those_that_are_drawn() {
    let mirror = "shop/web:80/cccccccccc";
    let mirroring = |fraction: Option<RuntimeFractionalPercent>, plain: bool| {
        with(|action| {
            action.request_mirror_policies = vec![RequestMirrorPolicy {
                cluster: mirror.to_owned(),
                runtime_fraction: fraction,
                disable_shadow_host_suffix_append: plain,
            }];
        })
    };
    let mut resources: Resources = fleet();
    let before = resources.build();
    let waiting = accept(&mut resources, TypeUrl::Route, &[resource(WEB, "2", &mirroring(None, false))]);
    assert!(Arc::ptr_eq(&before, &waiting));
    assert_eq!(resources.missing_cluster(TypeUrl::Route, WEB), Some(mirror));
    accept(&mut resources, TypeUrl::Cluster, &[resource(mirror, "1", &plain_cluster(mirror))]);
    let there = resource(mirror, "1", &endpoints(mirror, &[("10.0.0.3", 80)]));
    let snapshot = accept(&mut resources, TypeUrl::Endpoints, &[there]);
    let [it] = served(&snapshot).0.mirrors.as_slice() else { panic!() };
    assert_eq!((it.cluster.name.as_str(), it.share, it.marks_host), (mirror, Share::ALL, true));
    // Removed while it serves, it serves on.
    let removed = [mirror.to_owned()];
    resources.update(sluice_proxy::config::Change { kind: TypeUrl::Cluster, resources: &[], removed: &removed });
    let rebuilt = resources.build();
    let [kept] = served(&rebuilt).0.mirrors.as_slice() else { panic!() };
    assert!(Arc::ptr_eq(&kept.cluster, &it.cluster));
    assert!(resources.dump().to_string().contains("\"mirrors\":[{"));

    let fraction = |value| Some(RuntimeFractionalPercent { default_value: value });
    accept(&mut resources, TypeUrl::Cluster, &[resource(mirror, "1", &plain_cluster(mirror))]);
    accept(&mut resources, TypeUrl::Endpoints, &[resource(mirror, "1", &endpoints(mirror, &[("10.0.0.3", 80)]))]);
    let third = mirroring(fraction(Some(percent(25))), true);
    let snapshot = accept(&mut resources, TypeUrl::Route, &[resource(WEB, "3", &third)]);
    let it = &served(&snapshot).0.mirrors[0];
    assert_eq!((it.share, it.marks_host), (Share(250_000), false));
    let bad = [
        (mirroring(fraction(None), false), "request_mirror_policies[0].runtime_fraction.default_value is missing"),
        (
            mirroring(fraction(Some(FractionalPercent { numerator: 1, denominator: 7 })), false),
            "request_mirror_policies[0].runtime_fraction.default_value.denominator is '7'",
        ),
        (
            with(|action| action.request_mirror_policies = vec![RequestMirrorPolicy::default()]),
            "request_mirror_policies[0].cluster is missing",
        ),
    ];
    for (configuration, expected) in bad {
        let reason = refused(&configuration);
        assert!(reason.contains(expected), "{reason}");
    }
}

fn delay(seconds: i64, percentage: Option<FractionalPercent>) -> FaultDelay {
    let delay = FaultDelaySecifier::FixedDelay(prost_types::Duration { seconds, nanos: 0 });
    FaultDelay { fault_delay_secifier: Some(delay), percentage }
}

fn abort(error: ErrorType, numerator: u32) -> FaultAbort {
    FaultAbort { error_type: Some(error), percentage: Some(percent(numerator)) }
}

#[test]
fn faults_of_a_route_are_served_or_refused_by_field() {
    let fault = |delay, abort| HttpFault { delay, abort, headers: Vec::new() };
    let good = [
        (
            fault(Some(delay(2, Some(percent(50)))), Some(abort(ErrorType::HttpStatus(503), 100))),
            Some(Fault {
                headers: Vec::new(),
                delay: Some((Duration::from_secs(2), Share(500_000))),
                abort: Some((Abort::Http(StatusCode::SERVICE_UNAVAILABLE), Share::ALL)),
            }),
        ),
        (
            fault(None, Some(abort(ErrorType::GrpcStatus(14), 1))),
            Some(Fault {
                headers: Vec::new(),
                delay: None,
                abort: Some((Abort::Grpc(GrpcStatus::UNAVAILABLE), Share(10_000))),
            }),
        ),
        // Without a percentage, none.
        (fault(Some(delay(2, None)), None), None),
        (fault(None, None), None),
    ];
    for (message, expected) in good {
        assert_eq!(served(&serve(&faulty(&message))).1.fault, expected);
    }
    let by_header =
        |matcher| HttpFault { headers: vec![matcher], ..fault(None, Some(abort(ErrorType::HttpStatus(503), 100))) };
    let rehearsed = HeaderMatcher {
        name: "x-rehearse".to_owned(),
        header_match_specifier: Some(HeaderMatchSpecifier::PresentMatch(true)),
        ..HeaderMatcher::default()
    };
    let snapshot = serve(&faulty(&by_header(rehearsed.clone())));
    let [rule] = served(&snapshot).1.fault.as_ref().unwrap().headers.as_slice() else { panic!() };
    assert_eq!((&rule.rule, rule.invert), (&HeaderRule::Present(true), false));
    let bad = [
        (by_header(HeaderMatcher::default()), "headers[0].string_match is missing"),
        (by_header(HeaderMatcher { name: "a b".to_owned(), ..rehearsed }), "headers[0].name is 'a b'"),
        (fault(Some(delay(0, None)), None), "delay.fixed_delay is '0 s'"),
        (fault(Some(delay(-1, None)), None), "delay.fixed_delay is '-1 s"),
        (fault(Some(FaultDelay::default()), None), "delay.fixed_delay is missing"),
        (fault(None, Some(abort(ErrorType::HttpStatus(199), 1))), "abort.http_status is '199'"),
        (fault(None, Some(abort(ErrorType::HttpStatus(600), 1))), "abort.http_status is '600'"),
        (fault(None, Some(abort(ErrorType::GrpcStatus(17), 1))), "abort.grpc_status is '17'"),
        (fault(None, Some(FaultAbort::default())), "is missing"),
    ];
    for (message, expected) in bad {
        let reason = refused(&faulty(&message));
        assert!(reason.contains(expected), "{reason}");
    }
    let mut other = faulty(&fault(None, None));
    let configs = &mut other.virtual_hosts[0].routes[0].typed_per_filter_config;
    configs.insert("envoy.filters.http.fault".to_owned(), Any::default());
    assert!(refused(&other).contains("expected a envoy.extensions.filters.http.fault.v3.HTTPFault"));
}

#[test]
fn the_filter_for_faults_stands_before_the_router_and_says_nothing_itself() {
    let filtered = |fault: &HttpFault, first: bool| {
        let mut message = listener(WEB, 20001);
        let filter = &mut message.filter_chains[0].filters[0];
        use sluice_xds::envoy::config::listener::v3::filter::ConfigType;
        let Some(ConfigType::TypedConfig(any)) = &mut filter.config_type else { panic!() };
        let mut manager: HttpConnectionManager = sluice_xds::unpack(any).unwrap();
        let fault = HttpFilter {
            name: "envoy.filters.http.fault".to_owned(),
            config_type: Some(HttpFilterConfig::TypedConfig(pack(fault))),
            ..HttpFilter::default()
        };
        manager.http_filters.insert(if first { 0 } else { 1 }, fault);
        *any = pack(&manager);
        message
    };
    let good = filtered(&HttpFault::default(), true);
    accept(&mut fleet(), TypeUrl::Listener, &[resource(WEB, "2", &good)]);
    let last = filtered(&HttpFault::default(), false);
    assert!(reason(TypeUrl::Listener, resource(WEB, "2", &last)).contains("(Router, at the end)"));
    let own = HttpFault { abort: Some(abort(ErrorType::HttpStatus(503), 100)), ..HttpFault::default() };
    let reason = reason(TypeUrl::Listener, resource(WEB, "2", &filtered(&own, true)));
    assert!(reason.contains("http_filters[0].typed_config is 'a fault'"), "{reason}");
}

#[test]
fn a_listener_may_bound_its_connections_before_its_last_filter_and_in_no_other_way() {
    use sluice_xds::envoy::{
        config::{
            core::v3::RuntimeFeatureFlag,
            listener::v3::{Filter, Listener, filter::ConfigType},
        },
        extensions::filters::network::connection_limit::v3::ConnectionLimit,
    };
    let most = |max_connections| ConnectionLimit {
        stat_prefix: WEB.to_owned(),
        max_connections: Some(max_connections),
        ..ConnectionLimit::default()
    };
    let filter = |limit: &ConnectionLimit| Filter {
        name: "envoy.filters.network.connection_limit".to_owned(),
        config_type: Some(ConfigType::TypedConfig(pack(limit))),
    };
    let with = |limit: &ConnectionLimit| {
        let mut message = listener(WEB, 20001);
        message.filter_chains[0].filters.insert(0, filter(limit));
        message
    };
    let served = |message: &Listener| {
        accept(&mut fleet(), TypeUrl::Listener, &[resource(WEB, "2", message)]).listeners[WEB].max_connections
    };
    assert_eq!(served(&listener(WEB, 20001)), None);
    assert_eq!(served(&with(&most(4096))), Some(4096));
    let off = RuntimeFeatureFlag { default_value: Some(false) };
    assert_eq!(served(&with(&ConnectionLimit { runtime_enabled: Some(off), ..most(1) })), None);

    let delay = Some(prost_types::Duration { seconds: 1, nanos: 0 });
    let mut twice = with(&most(1));
    twice.filter_chains[0].filters.insert(0, filter(&most(1)));
    let mut last = with(&most(1));
    last.filter_chains[0].filters.swap(0, 1);
    let table = [
        (with(&ConnectionLimit { delay, ..most(1) }), "filters[0].typed_config.delay is '1 s 0 ns'"),
        (
            with(&ConnectionLimit { max_connections: None, ..most(1) }),
            "filters[0].typed_config.max_connections is missing",
        ),
        (with(&most(0)), "filters[0].typed_config.max_connections is '0'"),
        (twice, "filters is '3 filters'"),
        (
            last,
            "filters[0].typed_config is 'type.googleapis.com/envoy.extensions.filters.network.http_connection_manager",
        ),
    ];
    for (message, expected) in table {
        let reason = reason(TypeUrl::Listener, resource(WEB, "2", &message));
        assert!(reason.contains(expected), "'{reason}' does not contain '{expected}'");
    }
    let mut sidecar = inbound(20443, &[(8080, "p8080.abc"), (9090, "p9090.abc")], "spiffe://test/ns/a/sa/b");
    sidecar.filter_chains[1].filters.insert(0, filter(&most(1)));
    let reason = reason(TypeUrl::Listener, resource("inbound", "1", &sidecar));
    assert!(reason.contains("filter_chains with a ConnectionLimit is '2 filter chains'"), "{reason}");
}
