//! What the fleet does with requests of HTTP: [`route`], by `spec.service` and by the release that is under way.

use prost_types::{Any, Duration};
use sluice_crds::{
    CorsPolicy, Fault, HeaderOperations, HttpMatch, Percentage, Retries, Rewrite, ServiceSpec, SessionAffinity,
    StringMatch, parse_duration,
};
use sluice_xds::{
    envoy::{
        config::{
            core::v3::{
                HeaderValue, HeaderValueOption, RuntimeFractionalPercent, header_value_option::HeaderAppendAction,
            },
            route::v3::{
                DirectResponseAction, HeaderMatcher, QueryParameterMatcher, RetryPolicy, Route, RouteAction,
                RouteMatch, WeightedCluster,
                header_matcher::HeaderMatchSpecifier,
                query_parameter_matcher::QueryParameterMatchSpecifier,
                route,
                route_action::{
                    ClusterSpecifier, HashPolicy, HostRewriteSpecifier, RequestMirrorPolicy,
                    hash_policy::{Cookie, PolicySpecifier},
                },
                route_match::PathSpecifier,
                weighted_cluster::{ClusterWeight, RandomValueSpecifier},
            },
        },
        extensions::filters::{
            common::fault::v3::{FaultDelay, fault_delay::FaultDelaySecifier},
            http::{
                cors::v3::{Cors, CorsPolicy as CorsMessage},
                fault::v3::{FaultAbort, HttpFault, fault_abort::ErrorType},
            },
            network::http_connection_manager::v3::HttpFilter,
        },
        r#type::{
            matcher::v3::{RegexMatchAndSubstitute, RegexMatcher, StringMatcher, string_matcher::MatchPattern},
            v3::{FractionalPercent, fractional_percent::DenominatorType},
        },
    },
    pack,
};

use super::{
    Resource,
    encode::{self, Split, every_request, needs_of, resource, seconds},
};

const CORS: &str = "envoy.filters.http.cors";
const FAULT: &str = "envoy.filters.http.fault";

/// Who gets the requests of a port.
pub(super) struct Destinations<'a> {
    /// Of requests that match one of these, before all others.
    pub(super) matched: Option<(&'a [HttpMatch], Split)>,
    pub(super) all: Split,
    /// What gets copies of so many percent of the requests that may reach the canary.
    pub(super) mirror: Option<(String, u32)>,
    pub(super) affinity: Option<&'a SessionAffinity>,
}

/// `None`: nothing serves.
pub(super) fn route(name: &str, to: Option<&Destinations<'_>>, how: &ServiceSpec) -> Resource {
    let Some(to) = to else {
        let action = route::Action::DirectResponse(DirectResponseAction { status: 503, body: None });
        let nothing = Route { r#match: Some(every_request()), action: Some(action), ..Route::default() };
        return resource(&encode::route_configuration(name, vec![nothing]), Default::default());
    };
    let everything = [HttpMatch::default()];
    let admitted = how.matches.as_deref().unwrap_or(&everything);
    let mut routes = Vec::new();
    let mut needs = needs_of(&to.all);
    needs.extend(to.mirror.iter().flat_map(|mirror| needs_of(&vec![mirror.clone()])));
    if let Some((matches, split)) = &to.matched {
        let both = matches.iter().flat_map(|one| admitted.iter().map(move |other| matcher(&[one, other])));
        routes.extend(both.map(|matcher| forward(matcher, split, to.mirror.as_ref(), to.affinity, how)));
        needs.extend(needs_of(split));
    }
    // What does not match never reaches the canary, not even as a copy.
    let mirror = to.mirror.as_ref().filter(|_| to.matched.is_none());
    routes.extend(admitted.iter().map(|one| forward(matcher(&[one]), &to.all, mirror, to.affinity, how)));
    resource(&encode::route_configuration(name, routes), needs)
}

/// What the listener of such a port has before its router.
pub(super) fn filters(how: &ServiceSpec) -> Vec<HttpFilter> {
    let cors = how.cors_policy.iter().map(|_| encode::http_filter(CORS, &Cors {}));
    let fault = how.fault.iter().map(|_| encode::http_filter(FAULT, &HttpFault::default()));
    cors.chain(fault).collect()
}

pub(super) fn forward(
    matcher: RouteMatch,
    split: &Split,
    mirror: Option<&(String, u32)>,
    affinity: Option<&SessionAffinity>,
    how: &ServiceSpec,
) -> Route {
    // With one side only there is nothing to stick to.
    let affinity = affinity.filter(|_| split.len() > 1);
    let weight = |(name, weight): &(String, u32)| ClusterWeight { name: name.clone(), weight: Some(*weight) };
    let weighted = WeightedCluster {
        clusters: split.iter().map(weight).collect(),
        random_value_specifier: affinity.map(|_| RandomValueSpecifier::UseHashPolicy(true)),
        ..WeightedCluster::default()
    };
    let rewrite = how.rewrite.as_ref();
    let action = RouteAction {
        cluster_specifier: Some(ClusterSpecifier::WeightedClusters(weighted)),
        timeout: Some(how.timeout.as_deref().and_then(duration).unwrap_or(seconds(0))),
        retry_policy: how.retries.as_ref().map(retry_policy),
        hash_policy: affinity.map(cookie).into_iter().collect(),
        request_mirror_policies: mirror.map(copies).into_iter().collect(),
        prefix_rewrite: rewrite.and_then(|rewrite| rewrite.uri.clone()).unwrap_or_default(),
        regex_rewrite: rewrite.and_then(regex_rewrite),
        host_rewrite_specifier: rewrite
            .and_then(|rewrite| rewrite.authority.clone())
            .map(HostRewriteSpecifier::HostRewriteLiteral),
        ..RouteAction::default()
    };
    let headers = how.headers.as_ref();
    let (request_headers_to_remove, request_headers_to_add) =
        header_changes(headers.and_then(|headers| headers.request.as_ref()));
    let (response_headers_to_remove, response_headers_to_add) =
        header_changes(headers.and_then(|headers| headers.response.as_ref()));
    Route {
        r#match: Some(matcher),
        action: Some(route::Action::Route(action)),
        typed_per_filter_config: cors(how.cors_policy.as_ref()).chain(how.fault.as_ref().map(fault)).collect(),
        request_headers_to_remove,
        request_headers_to_add,
        response_headers_to_remove,
        response_headers_to_add,
        ..Route::default()
    }
}

/// The canary must take a copy for what it is a copy of, so the host stays as it is, unlike by Envoy's default.
fn copies((cluster, percent): &(String, u32)) -> RequestMirrorPolicy {
    let fraction = FractionalPercent { numerator: *percent, denominator: DenominatorType::Hundred.into() };
    RequestMirrorPolicy {
        cluster: cluster.clone(),
        runtime_fraction: Some(RuntimeFractionalPercent { default_value: Some(fraction) }),
        disable_shadow_host_suffix_append: true,
    }
}

/// All of these must hold. At most one of them names a path: others are not sent (`sendable`).
pub(super) fn matcher(all: &[&HttpMatch]) -> RouteMatch {
    let mut message = every_request();
    for one in all {
        if let Some(path) = one.uri.as_ref().and_then(path) {
            message.path_specifier = Some(path);
            message.case_sensitive = one.ignore_uri_case.then_some(false);
        }
        let pseudo = [(":method", &one.method), (":authority", &one.authority)];
        message.headers.extend(pseudo.into_iter().filter_map(|(name, said)| Some(header(name, said.as_ref()?))));
        message.headers.extend(one.headers.iter().map(|(name, said)| header(name, said)));
        message.headers.extend(one.without_headers.iter().map(|(name, said)| without(name, said)));
        message.query_parameters.extend(one.query_params.iter().map(|(name, said)| QueryParameterMatcher {
            name: name.clone(),
            query_parameter_match_specifier: Some(
                text(said).map_or(
                    QueryParameterMatchSpecifier::PresentMatch(true),
                    QueryParameterMatchSpecifier::StringMatch,
                ),
            ),
        }));
    }
    message
}

fn path(said: &StringMatch) -> Option<PathSpecifier> {
    let exact = said.exact.clone().map(PathSpecifier::Path);
    let prefix = || said.prefix.clone().map(PathSpecifier::Prefix);
    exact.or_else(prefix).or_else(|| said.regex.clone().map(|regex| PathSpecifier::SafeRegex(RegexMatcher { regex })))
}

fn header(name: &str, said: &StringMatch) -> HeaderMatcher {
    HeaderMatcher {
        name: name.to_owned(),
        header_match_specifier: Some(
            text(said).map_or(HeaderMatchSpecifier::PresentMatch(true), HeaderMatchSpecifier::StringMatch),
        ),
        ..HeaderMatcher::default()
    }
}

/// A header that is missing has not the value, so it matches, which Envoy must be told (route_components.proto).
fn without(name: &str, said: &StringMatch) -> HeaderMatcher {
    let matcher = header(name, said);
    let by_value = matches!(matcher.header_match_specifier, Some(HeaderMatchSpecifier::StringMatch(_)));
    HeaderMatcher { invert_match: true, treat_missing_header_as_empty: by_value, ..matcher }
}

/// `None`: any value.
fn text(said: &StringMatch) -> Option<StringMatcher> {
    let exact = said.exact.clone().map(MatchPattern::Exact);
    let prefix = || said.prefix.clone().map(MatchPattern::Prefix);
    let pattern = exact
        .or_else(prefix)
        .or_else(|| said.regex.clone().map(|regex| MatchPattern::SafeRegex(RegexMatcher { regex })));
    pattern.map(|pattern| StringMatcher { match_pattern: Some(pattern), ..StringMatcher::default() })
}

fn cookie(affinity: &SessionAffinity) -> HashPolicy {
    let cookie = Cookie {
        name: affinity.cookie_name.clone(),
        ttl: Some(seconds(affinity.max_age.into())),
        path: "/".to_owned(),
        ..Cookie::default()
    };
    HashPolicy { policy_specifier: Some(PolicySpecifier::Cookie(cookie)), ..HashPolicy::default() }
}

fn regex_rewrite(rewrite: &Rewrite) -> Option<RegexMatchAndSubstitute> {
    let said = rewrite.uri_regex_rewrite.as_ref()?;
    Some(RegexMatchAndSubstitute {
        pattern: Some(RegexMatcher { regex: said.r#match.clone() }),
        substitution: said.rewrite.clone(),
    })
}

fn fault(said: &Fault) -> (String, Any) {
    // Finer than the parts of a million that Envoy knows the API does not take.
    let part = |percentage: Option<Percentage>| {
        let millionths = (percentage.map_or(0.0, |of| of.value).clamp(0.0, 100.0) * 1e4).round();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to 1,000,000")]
        let numerator = millionths as u32;
        Some(FractionalPercent { numerator, denominator: DenominatorType::Million.into() })
    };
    let delay = said.delay.as_ref().map(|delay| FaultDelay {
        percentage: part(delay.percentage),
        fault_delay_secifier: delay.fixed_delay.as_deref().and_then(duration).map(FaultDelaySecifier::FixedDelay),
    });
    let abort = said.abort.as_ref().map(|abort| {
        let http = abort.http_status.and_then(|status| u32::try_from(status).ok()).map(ErrorType::HttpStatus);
        let error_type = http.or(abort.grpc_status.map(|status| ErrorType::GrpcStatus(status.code())));
        FaultAbort { percentage: part(abort.percentage), error_type }
    });
    let headers = said.headers.iter().map(|(name, said)| header(name, said)).collect();
    (FAULT.to_owned(), pack(&HttpFault { delay, abort, headers }))
}

fn cors(policy: Option<&CorsPolicy>) -> impl Iterator<Item = (String, Any)> {
    policy.map(cors_of).into_iter()
}

fn cors_of(policy: &CorsPolicy) -> (String, Any) {
    let exact = |origin: &String| StringMatch { exact: Some(origin.clone()), ..StringMatch::default() };
    let origins = policy.allow_origins.iter().cloned().chain(policy.allow_origin.iter().map(exact));
    let message = CorsMessage {
        allow_origin_string_match: origins.filter_map(|origin| text(&origin)).collect(),
        allow_methods: policy.allow_methods.join(","),
        allow_headers: policy.allow_headers.join(","),
        expose_headers: policy.expose_headers.join(","),
        max_age: policy.max_age.as_deref().and_then(duration).map(whole_seconds).unwrap_or_default(),
        allow_credentials: Some(policy.allow_credentials),
        ..CorsMessage::default()
    };
    (CORS.to_owned(), pack(&message))
}

/// `Access-Control-Max-Age` knows whole seconds (Fetch, "CORS protocol"). Half of one is not 0, which forbids to remember anything.
fn whole_seconds(age: Duration) -> String {
    (age.seconds + i64::from(age.nanos > 0)).to_string()
}

pub(super) fn duration(text: &str) -> Option<Duration> {
    Duration::try_from(parse_duration(text).ok()?).ok()
}

fn retry_policy(retries: &Retries) -> RetryPolicy {
    RetryPolicy {
        retry_on: retries.retry_on.replace(' ', ""),
        num_retries: u32::try_from(retries.attempts).ok(),
        per_try_timeout: retries.per_try_timeout.as_deref().and_then(duration),
    }
}

fn header_changes(operations: Option<&HeaderOperations>) -> (Vec<String>, Vec<HeaderValueOption>) {
    let Some(HeaderOperations { set, add, remove }) = operations else { return (Vec::new(), Vec::new()) };
    let write = |action: HeaderAppendAction| {
        move |(name, value): (&String, &String)| HeaderValueOption {
            header: Some(HeaderValue { key: name.clone(), value: value.clone() }),
            append_action: action.into(),
        }
    };
    let set = set.iter().map(write(HeaderAppendAction::OverwriteIfExistsOrAdd));
    let add = add.iter().map(write(HeaderAppendAction::AppendIfExistsOrAdd));
    (remove.clone(), set.chain(add).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use serde_json::json;
    use sluice_xds::{
        TypeUrl,
        envoy::config::{listener::v3::Listener, route::v3::RouteConfiguration},
        unpack,
    };

    use super::*;
    use crate::mesh::{build, testing::Shop};

    fn routes(shop: &Shop, port: &str) -> Vec<Route> {
        let snapshot = build(&shop.inputs());
        let config: RouteConfiguration = unpack(&snapshot.fleet.get(TypeUrl::Route, port).unwrap().body).unwrap();
        config.virtual_hosts[0].routes.clone()
    }

    fn action(route: &Route) -> &RouteAction {
        let Some(route::Action::Route(action)) = &route.action else { panic!("{route:?}") };
        action
    }

    fn split(route: &Route) -> Vec<(String, u32)> {
        let Some(ClusterSpecifier::WeightedClusters(all)) = &action(route).cluster_specifier else { panic!() };
        all.clusters.iter().map(|one| (one.name.clone(), one.weight.unwrap())).collect()
    }

    fn shop(weight: i32) -> Shop {
        let mut shop = Shop::new();
        shop.traffic("aaa", Some("bbb"), weight);
        shop
    }

    #[test]
    fn only_what_matches_is_split_and_all_else_goes_to_the_primary() {
        let mut shop = shop(100);
        shop.canary["status"]["traffic"]["match"] = json!([
            {"headers": {"x-user": {"exact": "insider"}}, "method": {"regex": "GET|HEAD"}},
            {"queryParams": {"canary": {}}, "withoutHeaders": {"x-user": {"exact": "guest"}, "x-bot": {}}},
        ]);
        let [first, second, others] = &routes(&shop, "shop/web:80")[..] else { panic!() };
        assert_eq!(split(first), [("shop/web:80/bbb".to_owned(), 100)]);
        assert_eq!(split(first), split(second));
        assert_eq!(split(others), [("shop/web:80/aaa".to_owned(), 100)]);
        assert_eq!(others.r#match.as_ref().unwrap(), &every_request());

        let headers = &first.r#match.as_ref().unwrap().headers;
        let names: Vec<_> = headers.iter().map(|header| header.name.as_str()).collect();
        assert_eq!(names, [":method", "x-user"]);
        let matcher = second.r#match.as_ref().unwrap();
        assert_eq!(
            matcher.query_parameters[0].query_parameter_match_specifier,
            Some(QueryParameterMatchSpecifier::PresentMatch(true))
        );
        let [bot, user] = &matcher.headers[..] else { panic!() };
        assert!(bot.invert_match && !bot.treat_missing_header_as_empty, "its presence alone counts");
        assert!(user.invert_match && user.treat_missing_header_as_empty, "one that is missing is no guest");

        // The companions are for everybody who asks for them by name.
        assert_eq!(routes(&shop, "shop/web-canary:80").len(), 1);
        assert_eq!(routes(&shop, "shop/web-primary:80").len(), 1);
        let carried = build(&shop.inputs());
        let needs = &carried.fleet.get(TypeUrl::Route, "shop/web:80").unwrap().needs;
        assert!(needs.contains(&(TypeUrl::Cluster, "shop/web:80/bbb".to_owned())), "the canary's cluster comes first");
    }

    #[test]
    fn nothing_is_matched_at_weight_0_nor_behind_a_port_of_bytes() {
        let matching = json!([{"headers": {"x-user": {}}}]);
        let mut back = shop(0);
        back.canary["status"]["traffic"]["match"] = matching.clone();
        let [all] = &routes(&back, "shop/web:80")[..] else { panic!() };
        assert_eq!(split(all), [("shop/web:80/aaa".to_owned(), 100)]);

        let mut bytes = shop(50);
        bytes.canary["status"]["traffic"]["match"] = matching;
        bytes.more_ports = vec![json!({"port": 5432, "name": "db", "protocol": "TCP", "targetPort": 5432})];
        let listener: Listener =
            unpack(&build(&bytes.inputs()).fleet.get(TypeUrl::Listener, "shop/web:5432").unwrap().body).unwrap();
        let said = format!("{listener:?}");
        assert!(!said.contains("bbb"), "{said}");
    }

    fn copies(route: &Route) -> Vec<(String, u32)> {
        let policies = &action(route).request_mirror_policies;
        let percent = |it: &RequestMirrorPolicy| {
            assert!(it.disable_shadow_host_suffix_append, "the canary is asked as the primary is");
            let fraction = it.runtime_fraction.unwrap().default_value.unwrap();
            assert_eq!(fraction.denominator, 0, "of a hundred");
            fraction.numerator
        };
        policies.iter().map(|policy| (policy.cluster.clone(), percent(policy))).collect()
    }

    #[test]
    fn a_canary_at_weight_0_gets_copies_of_what_the_apex_is_asked() {
        let mut shop = shop(0);
        shop.canary["status"]["traffic"]["mirror"] = json!(30);
        let [all] = &routes(&shop, "shop/web:80")[..] else { panic!() };
        assert_eq!(split(all), [("shop/web:80/aaa".to_owned(), 100)]);
        assert_eq!(copies(all), [("shop/web:80/bbb".to_owned(), 30)]);
        let needs = build(&shop.inputs()).fleet.get(TypeUrl::Route, "shop/web:80").unwrap().needs.clone();
        assert!(needs.contains(&(TypeUrl::Cluster, "shop/web:80/bbb".to_owned())), "it comes first");
        // Requests for a companion are for one side.
        for companion in ["shop/web-primary:80", "shop/web-canary:80"] {
            assert_eq!(copies(&routes(&shop, companion)[0]), []);
        }

        // Cut, nothing is left of it.
        let mut inputs = shop.inputs();
        inputs.cuts.insert(shop.key());
        let cut = build(&inputs);
        let traffic = &cut.canaries[&shop.key()].traffic;
        assert_eq!((traffic.weight, traffic.mirror), (0, 0));
        let config: RouteConfiguration = unpack(&cut.fleet.get(TypeUrl::Route, "shop/web:80").unwrap().body).unwrap();
        assert_eq!(copies(&config.virtual_hosts[0].routes[0]), []);
    }

    #[test]
    fn a_fault_is_said_of_every_route_by_envoys_fields() {
        let mut shop = shop(20);
        shop.canary["spec"]["service"]["fault"] = json!({
            "headers": {"x-rehearse": {"exact": "yes"}, "x-user": {}},
            "delay": {"percentage": {"value": 0.5}, "fixedDelay": "1m30s"},
            "abort": {"percentage": {"value": 100}, "grpcStatus": "UNAVAILABLE"},
        });
        let said = |shop: &Shop, port: &str| -> HttpFault {
            unpack(&routes(shop, port)[0].typed_per_filter_config[FAULT]).unwrap()
        };
        let fault = said(&shop, "shop/web:80");
        assert_eq!(said(&shop, "shop/web-canary:80"), fault);
        let delay = fault.delay.unwrap();
        let Some(FaultDelaySecifier::FixedDelay(by)) = delay.fault_delay_secifier else { panic!() };
        assert_eq!(
            (by.seconds, delay.percentage.unwrap().numerator, delay.percentage.unwrap().denominator),
            (90, 5_000, 2)
        );
        let abort = fault.abort.unwrap();
        assert_eq!(
            (abort.error_type, abort.percentage.unwrap().numerator),
            (Some(ErrorType::GrpcStatus(14)), 1_000_000)
        );
        let names: Vec<_> = fault.headers.iter().map(|header| header.name.as_str()).collect();
        assert_eq!(names, ["x-rehearse", "x-user"]);
        assert_eq!(fault.headers[1].header_match_specifier, Some(HeaderMatchSpecifier::PresentMatch(true)));
        let snapshot = build(&shop.inputs());
        let listener = snapshot.fleet.get(TypeUrl::Listener, "shop/web:80").unwrap();
        let has_filter = listener.body.value.windows(FAULT.len()).any(|part| part == FAULT.as_bytes());
        assert!(has_filter, "where stock Envoy needs it");

        shop.canary["spec"]["service"]["fault"] = json!({"abort": {"percentage": {"value": 1}, "httpStatus": 503}});
        let fault = said(&shop, "shop/web:80");
        assert_eq!((fault.delay, fault.abort.unwrap().error_type), (None, Some(ErrorType::HttpStatus(503))));
    }

    #[test]
    fn with_a_match_nothing_else_is_copied_and_bytes_never_are() {
        let mut shop = shop(0);
        shop.canary["status"]["traffic"]["mirror"] = json!(100);
        shop.canary["status"]["traffic"]["match"] = json!([{"headers": {"x-user": {"exact": "insider"}}}]);
        shop.more_ports = vec![json!({"port": 5432, "name": "db", "protocol": "TCP", "targetPort": 5432})];
        let [matched, others] = &routes(&shop, "shop/web:80")[..] else { panic!() };
        assert_eq!(split(matched), [("shop/web:80/aaa".to_owned(), 100)]);
        assert_eq!((copies(matched), copies(others)), (vec![("shop/web:80/bbb".to_owned(), 100)], Vec::new()));
        let listener: Listener =
            unpack(&build(&shop.inputs()).fleet.get(TypeUrl::Listener, "shop/web:5432").unwrap().body).unwrap();
        let said = format!("{listener:?}");
        assert!(!said.contains("bbb"), "{said}");
    }

    #[test]
    fn what_is_admitted_narrows_every_route() {
        let mut shop = shop(20);
        shop.canary["spec"]["service"]["match"] = json!([
            {"uri": {"prefix": "/Api"}, "ignoreUriCase": true}, {"uri": {"exact": "/health"}, "authority": {"prefix": "web"}},
        ]);
        shop.canary["spec"]["service"]["rewrite"] = json!({"uri": "/", "authority": "web.shop"});
        shop.canary["status"]["traffic"]["match"] = json!([{"headers": {"x-user": {"prefix": "in"}}}]);
        let found = routes(&shop, "shop/web:80");
        let paths: Vec<_> = found
            .iter()
            .map(|route| {
                let matcher = route.r#match.clone().unwrap();
                (matcher.path_specifier.unwrap(), matcher.case_sensitive, matcher.headers.len())
            })
            .collect();
        let api = || PathSpecifier::Prefix("/Api".to_owned());
        let health = || PathSpecifier::Path("/health".to_owned());
        assert_eq!(
            paths,
            [(api(), Some(false), 1), (health(), None, 2), (api(), Some(false), 0), (health(), None, 1)],
            "first those that may reach the canary"
        );
        for route in &found {
            assert_eq!(action(route).prefix_rewrite, "/");
            assert_eq!(
                action(route).host_rewrite_specifier,
                Some(HostRewriteSpecifier::HostRewriteLiteral("web.shop".to_owned()))
            );
        }
    }

    #[test]
    fn a_cookie_keeps_users_on_their_side_while_there_are_two() {
        let mut shop = shop(20);
        shop.canary["status"]["plan"] = json!({
            "revision": "bbb", "primary": "aaa", "startedAt": "2026-01-01T00:00:00Z", "steps": [],
            "analysis": {"interval": "10s", "stepWeight": 20, "sessionAffinity": {"cookieName": "side", "maxAge": 60}},
        });
        let [route] = &routes(&shop, "shop/web:80")[..] else { panic!() };
        let Some(PolicySpecifier::Cookie(cookie)) = &action(route).hash_policy[0].policy_specifier else { panic!() };
        assert_eq!((cookie.name.as_str(), cookie.ttl.unwrap().seconds, cookie.path.as_str()), ("side", 60, "/"));
        let Some(ClusterSpecifier::WeightedClusters(all)) = &action(route).cluster_specifier else { panic!() };
        assert_eq!(all.random_value_specifier, Some(RandomValueSpecifier::UseHashPolicy(true)));

        shop.traffic("aaa", Some("bbb"), 0);
        let [route] = &routes(&shop, "shop/web:80")[..] else { panic!() };
        assert!(action(route).hash_policy.is_empty());
    }

    #[test]
    fn origins_are_said_on_each_route_and_the_listener_has_the_filter() {
        let mut shop = shop(0);
        shop.canary["spec"]["service"]["corsPolicy"] = json!({
            "allowOrigins": [{"prefix": "https://shop."}], "allowOrigin": ["*"], "allowMethods": ["GET", "PUT"], "maxAge": "1h",
        });
        let [route] = &routes(&shop, "shop/web:80")[..] else { panic!() };
        let policy: CorsMessage = unpack(&route.typed_per_filter_config[CORS]).unwrap();
        assert_eq!((policy.allow_methods.as_str(), policy.max_age.as_str()), ("GET,PUT", "3600"));
        assert_eq!(
            ["0s", "500ms", "1s", "1500ms"].map(|age| whole_seconds(duration(age).unwrap())),
            ["0", "1", "1", "2"]
        );
        assert_eq!(policy.allow_origin_string_match.len(), 2);
        let snapshot = build(&shop.inputs());
        let listener = snapshot.fleet.get(TypeUrl::Listener, "shop/web:80").unwrap();
        assert!(listener.body.value.windows(CORS.len()).any(|part| part == CORS.as_bytes()));
    }

    #[test]
    fn retries_and_headers_are_said_where_something_is_forwarded() {
        let mut shop = shop(0);
        let [plain] = &routes(&shop, "shop/web:80")[..] else { panic!() };
        assert!(action(plain).retry_policy.is_none() && plain.request_headers_to_add.is_empty());

        shop.canary["spec"]["service"]["retries"] =
            json!({"attempts": 3, "perTryTimeout": "2s", "retryOn": "5xx, reset"});
        shop.canary["spec"]["service"]["headers"] = json!({
            "request": {"set": {"x-team": "shop"}, "add": {"x-hop": "fleet"}},
            "response": {"remove": ["server"]},
        });
        let [said] = &routes(&shop, "shop/web:80")[..] else { panic!() };
        let retry = action(said).retry_policy.as_ref().unwrap();
        assert_eq!((retry.retry_on.as_str(), retry.num_retries), ("5xx,reset", Some(3)));
        assert_eq!(retry.per_try_timeout.map(|timeout| timeout.seconds), Some(2));
        let added = said.request_headers_to_add.iter();
        let added: Vec<_> = added.map(|one| (one.header.as_ref().unwrap().key.as_str(), one.append_action)).collect();
        assert_eq!(added, [("x-team", 2), ("x-hop", 0)], "set, then added");
        assert_eq!(said.response_headers_to_remove, ["server"]);
        assert!(said.response_headers_to_add.is_empty());
    }

    #[test]
    fn a_timeout_is_said_and_so_is_that_there_is_none() {
        let mut shop = shop(0);
        let timeout = |shop: &Shop| action(&routes(shop, "shop/web:80")[0]).timeout.map(|it| (it.seconds, it.nanos));
        assert_eq!(timeout(&shop), Some((0, 0)), "Envoy would take 15 s otherwise");
        shop.canary["spec"]["service"]["timeout"] = json!("1m500ms");
        assert_eq!(timeout(&shop), Some((60, 500_000_000)));
    }
}
