//! What a route says beside its split: whose requests are drawn together.

use std::sync::Arc;

use sluice_proxy::snapshot::{Action, HashPolicy, HashedBy, Policy, Protocol, Snapshot};
use sluice_xds::{
    TypeUrl,
    envoy::config::route::v3::{
        RouteAction, RouteConfiguration,
        route::Action as MessageAction,
        route_action::{
            ClusterSpecifier, HashPolicy as HashMessage,
            hash_policy::{Cookie, CookieAttribute, Header, PolicySpecifier},
        },
        weighted_cluster::RandomValueSpecifier,
    },
};

use crate::{
    resources::{resource, route},
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

fn served(snapshot: &Snapshot) -> &Policy {
    match &snapshot.listeners[WEB].chains[0].protocol {
        Protocol::Http(Action::Forward { policy, .. }) => policy,
        Protocol::Http(Action::Respond(_)) | Protocol::Tcp(_) => panic!(),
    }
}

fn serve(configuration: &RouteConfiguration) -> Arc<Snapshot> {
    accept(&mut fleet(), TypeUrl::Route, &[resource(WEB, "2", configuration)])
}

fn refused(configuration: &RouteConfiguration) -> String {
    reason(TypeUrl::Route, resource(WEB, "2", configuration))
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
        served(&snapshot).affinity,
        [
            HashPolicy { by: HashedBy::Header(http::HeaderName::from_static("x-user")), terminal: true },
            by_cookie(Some("; Max-Age=3600; Path=/; SameSite=Lax; Secure; HttpOnly")),
            by_cookie(Some("; HttpOnly")),
            by_cookie(None),
        ]
    );
    assert_eq!(served(&serve(&hashing(false, vec![header("x-user")]))).affinity, []);

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
