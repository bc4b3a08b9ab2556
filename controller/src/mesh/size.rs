//! How large the routes of a Canary get. Each entry of `spec.service.match`, also together with each of `spec.analysis.match`, repeats
//! headers, CORS and faults, on every port of HTTP of every Service: some KiB that a person wrote may be many MiB for every proxy.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Service;
use kube::ResourceExt;
use prost::Message;
use sluice_crds::{Canary, HttpMatch, ServiceSpec, StringMatch};
use sluice_xds::envoy::config::route::v3::RouteMatch;

use super::{
    Inputs, route,
    service::{self, Port, Protocol},
};
use crate::cache::CanaryKey;

/// Most bytes that all routes of a Canary may take: far more than one needs that somebody wrote, and less than one response of xDS may
/// have. Larger ones are not sent.
pub const LARGEST_ROUTES: usize = 2 << 20;

/// What frames a route in its configuration, the cookie of `sessionAffinity` among it.
const FRAME: usize = 256;
/// What a regular expression counts beside its text: a proxy compiles each, up to 24 KiB, in every route that has it.
const PATTERN: usize = 2 << 10;
/// Characters of a revision's name.
const REVISION: usize = 10;

/// The Services of a Canary.
#[derive(Clone, Copy)]
pub struct Services<'a> {
    /// Its companions have the same ports. `None` before it was made.
    pub apex: Option<&'a Service>,
    pub additional: &'a [&'a Service],
}

/// What is done with requests: as the Canary says, or where its routes would be too large, as it said before. `None` if it did not.
pub(super) fn how<'a>(
    inputs: &'a Inputs,
    canary: &'a Canary,
    matches: Option<&[HttpMatch]>,
    services: Services<'_>,
) -> Option<&'a ServiceSpec> {
    let fits = |how: &&ServiceSpec| routes_size(canary, how, matches, services) <= LARGEST_ROUTES;
    Some(&canary.spec.service).filter(fits).or_else(|| {
        let kept = inputs.kept.get(&CanaryKey::of(canary)).filter(|kept| kept.metadata.uid == canary.metadata.uid);
        kept.map(|kept| &kept.spec.service).filter(fits)
    })
}

/// How many bytes all routes of a Canary take at most, if `how` says what is done with requests and `matches` which of them are
/// released. Makes none of them.
#[must_use]
pub fn routes_size(canary: &Canary, how: &ServiceSpec, matches: Option<&[HttpMatch]>, services: Services<'_>) -> usize {
    let namespace = canary.namespace().unwrap_or_default();
    let apex = canary.spec.service_name();
    let additional = || services.additional.iter().copied();
    let longest = additional().map(|service| service.name_any().len()).chain([apex.len() + "-primary".len()]).max();
    let longest = namespace.len() + "/:65535".len() + longest.unwrap_or_default();

    let cluster = |letter: &str| format!("{}/{}", letter.repeat(longest), letter.repeat(REVISION));
    let split = vec![(cluster("a"), 50), (cluster("b"), 50)];
    let mirror = (cluster("b"), 100);
    let rewrites = how.rewrite.as_ref().is_some_and(|rewrite| rewrite.uri_regex_rewrite.is_some());
    let one = FRAME
        + route::forward(RouteMatch::default(), &split, Some(&mirror), None, how).encoded_len()
        + PATTERN * (patterns(of_every_route(how)) + usize::from(rewrites));

    let length = |one: &HttpMatch| route::matcher(&[one]).encoded_len() + PATTERN * patterns(of_match(one));
    let length = |all: &[HttpMatch]| all.iter().map(length).sum::<usize>();
    let everything = [HttpMatch::default()];
    let admitted = how.matches.as_deref().unwrap_or(&everything);
    let matched = matches.unwrap_or_default();
    let (admitted, admitted_bytes) = (admitted.len(), length(admitted));
    let (matched, matched_bytes) = (matched.len(), length(matched));
    // Of a port without a release, and what one adds: each of its entries with each of the others.
    let plain = longest * 2 + FRAME + admitted * one + admitted_bytes;
    let release = matched * admitted * one + matched * admitted_bytes + admitted * matched_bytes;

    let http = |ports: Vec<Port>| ports.iter().filter(|port| port.protocol == Protocol::Http).count();
    let own = http(services.apex.map_or_else(|| service::ports_of_spec(how), |apex| service::ports(apex, how)));
    let others: usize = additional().map(|service| http(service::ports(service, how))).sum();
    // `-primary` and `-canary` have no part in a release.
    (own + others) * (plain + release) + 2 * own * plain
}

fn patterns<'a>(texts: impl Iterator<Item = &'a StringMatch>) -> usize {
    texts.filter(|text| text.regex.is_some()).count()
}

fn of_match(one: &HttpMatch) -> impl Iterator<Item = &StringMatch> {
    let HttpMatch { uri, method, authority, headers, without_headers, query_params, .. } = one;
    let maps = [headers, without_headers, query_params].into_iter().flat_map(BTreeMap::values);
    [uri, method, authority].into_iter().flatten().chain(maps)
}

fn of_every_route(how: &ServiceSpec) -> impl Iterator<Item = &StringMatch> {
    let origins = how.cors_policy.iter().flat_map(|policy| &policy.allow_origins);
    origins.chain(how.fault.iter().flat_map(|fault| fault.headers.values()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeSet;

    use jiff::Timestamp;
    use serde_json::{Value, json};
    use sluice_xds::{TypeUrl, envoy::config::route::v3::RouteConfiguration, unpack};

    use super::*;
    use crate::mesh::{
        build,
        ports::Allocation,
        testing::{Shop, too_large},
        wanted_ports,
    };

    fn counted(shop: &Shop) -> usize {
        let inputs = shop.inputs();
        let canary = &inputs.canaries[0];
        let apex = inputs.services.iter().find(|service| service.name_any() == "web").map(AsRef::as_ref);
        let matches = canary.status.as_ref().and_then(|status| status.traffic.as_ref()?.matches.as_deref());
        routes_size(canary, &canary.spec.service, matches, Services { apex, additional: &[] })
    }

    /// Bytes and number of all routes.
    fn made(shop: &Shop) -> (usize, usize) {
        let snapshot = build(&shop.inputs());
        let all = snapshot.fleet.of(TypeUrl::Route).map(|(_, route)| {
            let config: RouteConfiguration = unpack(&route.body).unwrap();
            (route.body.value.len(), config.virtual_hosts[0].routes.len())
        });
        all.fold((0, 0), |(bytes, routes), (more, one)| (bytes + more, routes + one))
    }

    /// Beside Canary `web` another one, `cart`, which has only its apex.
    fn with_another(shop: &Shop) -> Inputs {
        let mut inputs = shop.inputs();
        let mut small = Shop::new();
        small.traffic("ccc", None, 0);
        let mut canary = Canary::clone(&small.inputs().canaries[0]);
        canary.metadata.name = Some("cart".to_owned());
        canary.spec.target_ref.name = "cart".to_owned();
        let mut service = Service::clone(&small.inputs().services[0]);
        service.metadata.name = Some("cart".to_owned());
        inputs.canaries.push(canary.into());
        inputs.services.push(service.into());
        inputs.ports = Allocation::default()
            .settle(&wanted_ports(&inputs).into_keys().collect(), Timestamp::UNIX_EPOCH)
            .allocation
            .ports();
        inputs
    }

    #[test]
    fn routes_that_are_too_large_are_withheld_and_nothing_else_is() {
        let mut shop = Shop::new();
        shop.more_ports.push(json!({"port": 3306, "name": "mysql", "targetPort": 3306}));
        shop.traffic("aaa", Some("bbb"), 30);
        let usual = build(&with_another(&shop));
        shop.canary["spec"]["service"] = too_large();
        let snapshot = build(&with_another(&shop));
        assert_eq!(snapshot.too_large, BTreeSet::from([shop.key()]));
        assert!(!snapshot.canaries.contains_key(&shop.key()), "nobody may think that it has this traffic");
        let http = ["shop/web-canary:80", "shop/web-primary:80", "shop/web:80"];
        let both =
            http.into_iter().flat_map(|name| [TypeUrl::Listener, TypeUrl::Route].map(|kind| (kind, name.to_owned())));
        assert_eq!(snapshot.fleet.withheld, both.collect());

        let mut others = usual.fleet.clone();
        for (kind, name) in &snapshot.fleet.withheld {
            assert!(others.resources.get_mut(kind).unwrap().remove(name).is_some());
        }
        assert_eq!(snapshot.fleet.resources, others.resources, "TCP, clusters, endpoints, and all of the other Canary");
        let cart = CanaryKey::new("shop", "cart");
        assert_eq!(snapshot.canaries[&cart], usual.canaries[&cart]);
        assert_eq!(snapshot.sidecars, usual.sidecars);
    }

    #[test]
    fn in_place_of_routes_that_are_too_large_there_are_those_before_with_the_weights_of_now() {
        let mut shop = Shop::new();
        shop.canary["spec"]["service"]["timeout"] = json!("7s");
        shop.traffic("aaa", Some("bbb"), 30);
        let before = shop.inputs().canaries[0].clone();
        shop.traffic("aaa", Some("bbb"), 0);
        let expected = build(&shop.inputs());
        shop.canary["spec"]["service"] = too_large();
        let mut inputs = shop.inputs();
        inputs.kept = BTreeMap::from([(shop.key(), before)]).into();
        let snapshot = build(&inputs);
        assert_eq!(snapshot.too_large, BTreeSet::from([shop.key()]));
        assert_eq!((&snapshot.fleet, &snapshot.canaries), (&expected.fleet, &expected.canaries));

        // Of another Canary that had this name.
        shop.canary["metadata"]["uid"] = json!("another");
        let snapshot = build(&Inputs { kept: inputs.kept, ..shop.inputs() });
        assert!(snapshot.canaries.is_empty() && !snapshot.fleet.withheld.is_empty());
    }

    #[test]
    fn what_is_counted_is_what_is_made_and_a_little_more() {
        let entries = |number: usize| -> Value {
            let entry = |index: usize| {
                let (name, value) = (format!("x-{index}"), "v".repeat(30 * index));
                json!({"headers": {name.as_str(): {"exact": value}}, "queryParams": {name.as_str(): {}}, "method": {"exact": "GET"}})
            };
            (1..=number).map(entry).collect()
        };
        let policies = json!({
            "headers": {"request": {"set": {"a": "b"}, "remove": ["c"]}, "response": {"add": {"d": "e".repeat(1000)}}},
            "corsPolicy": {"allowOrigins": [{"regex": "https://.*"}], "allowMethods": ["GET"], "maxAge": "24h"},
            "retries": {"attempts": 3, "perTryTimeout": "1s"}, "timeout": "15s", "rewrite": {"authority": "web.shop"},
            "fault": {"headers": {"f": {"prefix": "g"}}, "abort": {"percentage": {"value": 1}, "httpStatus": 503}},
        });
        for (admitted, matched, policies) in [
            (0, 0, json!({})),
            (0, 0, policies.clone()),
            (16, 0, policies.clone()),
            (16, 8, policies),
            (3, 2, json!({})),
        ] {
            let mut shop = Shop::new();
            shop.more_ports.push(json!({"port": 81, "name": "grpc", "targetPort": 8081}));
            shop.more_ports.push(json!({"port": 82, "name": "mysql", "targetPort": 8082}));
            shop.traffic("0123456789", Some("9876543210"), 50);
            shop.canary["status"]["traffic"]["mirror"] = json!(1);
            for (field, policy) in policies.as_object().unwrap() {
                shop.canary["spec"]["service"][field] = policy.clone();
            }
            if admitted > 0 {
                shop.canary["spec"]["service"]["match"] = entries(admitted);
            }
            if matched > 0 {
                shop.canary["status"]["traffic"]["match"] = entries(matched);
            }
            let ((bytes, routes), counted) = (made(&shop), counted(&shop));
            let case = format!("{admitted} and {matched} entries: {routes} routes, {bytes} bytes, {counted} counted");
            assert!(bytes <= counted && counted <= bytes + (3 * FRAME + PATTERN) * routes, "{case}");
        }
    }

    #[test]
    fn an_expression_counts_wherever_a_proxy_compiles_it() {
        let size = |service: Value| {
            let mut shop = Shop::new();
            shop.traffic("aaa", Some("bbb"), 50);
            for (field, value) in service.as_object().unwrap() {
                shop.canary["spec"]["service"][field] = value.clone();
            }
            counted(&shop)
        };
        let abort = json!({"percentage": {"value": 1}, "httpStatus": 503});
        let with = |text: Value| {
            json!({
                "match": [{"uri": text, "method": text, "authority": text, "headers": {"a": text}, "withoutHeaders": {"a": text},
                           "queryParams": {"a": text}}],
                "corsPolicy": {"allowOrigins": [text]}, "fault": {"headers": {"a": text}, "abort": abort},
            })
        };
        // Of one route of each of the three Services.
        let difference = size(with(json!({"regex": "a+"}))) - size(with(json!({"exact": "aa"})));
        assert!((24 * PATTERN..25 * PATTERN).contains(&difference), "{difference}");
    }

    #[test]
    fn a_canary_as_people_write_it_is_far_below() {
        let mut shop = Shop::new();
        shop.traffic("0123456789", Some("9876543210"), 50);
        let entry = json!({"uri": {"prefix": "/api/v1/some/path"}, "headers": {"x-tenant": {"exact": "somebody"}}});
        shop.canary["spec"]["service"]["match"] = vec![entry; 16].into();
        shop.canary["spec"]["service"]["headers"] =
            json!({"response": {"set": {"content-security-policy": "x".repeat(1000)}}});
        assert!(counted(&shop) < LARGEST_ROUTES / 10, "{}", counted(&shop));
    }
}
