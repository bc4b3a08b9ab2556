//! How large the routes of a Canary get. Each entry of `spec.service.match`, also together with each of `spec.analysis.match`, repeats
//! headers, CORS and faults, on every port of HTTP of every Service: some KiB that a person wrote may be many MiB for every proxy.

use k8s_openapi::api::core::v1::Service;
use kube::ResourceExt;
use prost::Message;
use sluice_crds::{Canary, HttpMatch, ServiceSpec, StringMatch};
use sluice_xds::envoy::config::route::v3::RouteMatch;

use super::{
    route, sendable,
    service::{self, Port, Protocol},
};

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

/// How many bytes all routes of a Canary take at most, if `how` says what is done with requests and `matches` which of them are
/// released. Makes none of them.
pub(super) fn routes_size(
    canary: &Canary,
    how: &ServiceSpec,
    matches: Option<&[HttpMatch]>,
    services: Services<'_>,
) -> usize {
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
        + PATTERN * (patterns(sendable::of_every_route(how)) + usize::from(rewrites));

    let length = |one: &HttpMatch| route::matcher(&[one]).encoded_len() + PATTERN * patterns(sendable::of_match(one));
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

fn patterns<'a>(texts: impl Iterator<Item = (sendable::Place<'a>, &'a StringMatch)>) -> usize {
    texts.filter(|(_, text)| text.regex.is_some()).count()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::{Value, json};
    use sluice_xds::{TypeUrl, envoy::config::route::v3::RouteConfiguration, unpack};

    use super::*;
    use crate::mesh::{build, sendable::LARGEST_ROUTES, testing::Shop};

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
