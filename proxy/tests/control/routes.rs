//! What a route may say: what is served of it, and what is refused, by its field.

use sluice_pattern::Piece;
use sluice_proxy::snapshot::{Field, PathRewrite, Protocol, StringRule};
use sluice_xds::{
    TypeUrl,
    envoy::{
        config::{
            core::v3::RuntimeFractionalPercent,
            listener::v3::{Listener, filter},
            route::v3::{
                HeaderMatcher, QueryParameterMatcher, Route, RouteAction, RouteMatch,
                header_matcher::HeaderMatchSpecifier, query_parameter_matcher::QueryParameterMatchSpecifier,
                route::Action as RouteActionMessage, route_action::HostRewriteSpecifier, route_match::PathSpecifier,
            },
        },
        extensions::filters::{
            http::cors::v3::{Cors, CorsPolicy},
            network::http_connection_manager::v3::{HttpConnectionManager, HttpFilter, http_filter},
        },
        r#type::{
            matcher::v3::{RegexMatchAndSubstitute, RegexMatcher, StringMatcher, string_matcher::MatchPattern},
            v3::{FractionalPercent, fractional_percent::DenominatorType},
        },
    },
    pack, unpack,
};

use crate::{
    resources::{listener, resource, route},
    snapshots::{A, WEB, accept, fleet, policy, reason},
};

fn regex(text: &str) -> RegexMatcher {
    RegexMatcher { regex: text.to_owned() }
}

fn path(route: &mut Route, specifier: PathSpecifier) {
    route.r#match = Some(RouteMatch { path_specifier: Some(specifier), ..RouteMatch::default() });
}

fn string(pattern: MatchPattern) -> StringMatcher {
    StringMatcher { match_pattern: Some(pattern), ignore_case: false }
}

fn header(route: &mut Route, name: &str, specifier: Option<HeaderMatchSpecifier>) {
    let header = HeaderMatcher { name: name.to_owned(), header_match_specifier: specifier, ..HeaderMatcher::default() };
    route.r#match.as_mut().unwrap().headers.push(header);
}

fn query(route: &mut Route, name: &str, specifier: Option<QueryParameterMatchSpecifier>) {
    let parameter = QueryParameterMatcher { name: name.to_owned(), query_parameter_match_specifier: specifier };
    route.r#match.as_mut().unwrap().query_parameters.push(parameter);
}

fn action(route: &mut Route) -> &mut RouteAction {
    let Some(RouteActionMessage::Route(action)) = &mut route.action else { panic!() };
    action
}

fn rewrite(route: &mut Route, pattern: &str, substitution: &str) {
    let substitution = substitution.to_owned();
    action(route).regex_rewrite = Some(RegexMatchAndSubstitute { pattern: Some(regex(pattern)), substitution });
}

fn host(route: &mut Route, name: &str) {
    action(route).host_rewrite_specifier = Some(HostRewriteSpecifier::HostRewriteLiteral(name.to_owned()));
}

fn cors(route: &mut Route, policy: &CorsPolicy) {
    route.typed_per_filter_config.insert("envoy.filters.http.cors".to_owned(), pack(policy));
}

fn share(numerator: u32, denominator: DenominatorType) -> CorsPolicy {
    let share = FractionalPercent { numerator, denominator: denominator.into() };
    let filter_enabled = Some(RuntimeFractionalPercent { default_value: Some(share) });
    CorsPolicy { filter_enabled, ..CorsPolicy::default() }
}

#[test]
fn the_routes_of_a_port_are_served_in_their_order() {
    let mut configuration = route(WEB, &[(A, 100)]);
    let routes = &mut configuration.virtual_hosts[0].routes;
    let mut cart = routes[0].clone();
    path(&mut cart, PathSpecifier::PathSeparatedPrefix("/cart".to_owned()));
    header(
        &mut cart,
        ":method",
        Some(HeaderMatchSpecifier::StringMatch(string(MatchPattern::Exact("GET".to_owned())))),
    );
    header(&mut cart, "Host", Some(HeaderMatchSpecifier::PresentMatch(true)));
    query(&mut cart, "beta", Some(QueryParameterMatchSpecifier::PresentMatch(true)));
    action(&mut cart).prefix_rewrite = "/shop".to_owned();
    cors(&mut cart, &CorsPolicy::default());
    routes.insert(0, cart);
    let snapshot = accept(&mut fleet(), TypeUrl::Route, &[resource(WEB, "2", &configuration)]);
    let Protocol::Http(routes) = &snapshot.listeners[WEB].chains[0].protocol else { panic!("{snapshot:?}") };
    let [cart, rest] = routes.as_slice() else { panic!("{routes:?}") };
    assert_eq!(cart.matches.path.rule, StringRule::SeparatedPrefix("/cart".to_owned()));
    let of: Vec<_> = cart.matches.headers.iter().map(|header| &header.of).collect();
    assert_eq!((of.as_slice(), cart.matches.query.len()), ([&Field::Method, &Field::Authority].as_slice(), 1));
    assert!(rest.matches.is_all() && !cart.matches.is_all());
    let path = policy(&snapshot).rewrite.as_ref().unwrap().path.as_ref();
    assert_eq!(path, Some(&PathRewrite::Prefix { matched: 5, with: "/shop".to_owned() }));
    assert!(policy(&snapshot).cors.is_some());
}

#[test]
fn a_substitution_is_read_as_re2_does() {
    let mut configuration = route(WEB, &[(A, 100)]);
    rewrite(&mut configuration.virtual_hosts[0].routes[0], "(a)(b)", r"/\2-\0?x\\");
    let snapshot = accept(&mut fleet(), TypeUrl::Route, &[resource(WEB, "2", &configuration)]);
    let Some(PathRewrite::Regex { with, .. }) = &policy(&snapshot).rewrite.as_ref().unwrap().path else { panic!() };
    let text = |text: &str| Piece::Text(text.to_owned());
    assert_eq!(with, &[text("/"), Piece::Group(2), text("-"), Piece::Group(0), text(r"?x\")]);
}

#[test]
fn cors_is_on_or_off_for_all_requests() {
    for (policy_message, on) in [
        (CorsPolicy::default(), true),
        (share(100, DenominatorType::Hundred), true),
        (share(0, DenominatorType::Million), false),
    ] {
        let mut configuration = route(WEB, &[(A, 100)]);
        cors(&mut configuration.virtual_hosts[0].routes[0], &policy_message);
        let snapshot = accept(&mut fleet(), TypeUrl::Route, &[resource(WEB, "2", &configuration)]);
        assert_eq!(policy(&snapshot).cors.is_some(), on);
    }
}

#[test]
fn what_a_route_cannot_mean_is_refused_with_the_field_and_the_reason() {
    let text = |pattern: MatchPattern| Some(HeaderMatchSpecifier::StringMatch(string(pattern)));
    let origin = |pattern: MatchPattern| CorsPolicy {
        allow_origin_string_match: vec![string(pattern)],
        ..CorsPolicy::default()
    };
    type Change<'a> = &'a dyn Fn(&mut Route);
    let table: [(Change<'_>, &str); 25] = [
        (&|it| it.r#match = None, "match is missing"),
        (&|it| it.r#match = Some(RouteMatch::default()), "match.prefix is missing"),
        (
            &|it| path(it, PathSpecifier::SafeRegex(regex("a("))),
            "match.safe_regex.regex is 'a(', but it is not a regular expression: unclosed group",
        ),
        (
            &|it| path(it, PathSpecifier::SafeRegex(regex("(a{1000}){1000}"))),
            "match.safe_regex.regex is '(a{1000}){1000}', but it is larger than 24576 bytes when compiled",
        ),
        (&|it| path(it, PathSpecifier::SafeRegex(regex(""))), "match.safe_regex.regex is missing"),
        (&|it| path(it, PathSpecifier::PathSeparatedPrefix("/a/".to_owned())), "match.path_separated_prefix is '/a/'"),
        (&|it| path(it, PathSpecifier::PathSeparatedPrefix("/".to_owned())), "match.path_separated_prefix is '/'"),
        (&|it| header(it, "x-a", None), "match.headers[0].string_match is missing"),
        (&|it| header(it, "a b", Some(HeaderMatchSpecifier::PresentMatch(true))), "match.headers[0].name is 'a b'"),
        (
            &|it| header(it, ":status", Some(HeaderMatchSpecifier::PresentMatch(true))),
            "match.headers[0].name is ':status', which this proxy does not support",
        ),
        (
            &|it| header(it, "x-a", text(MatchPattern::Prefix(String::new()))),
            "match.headers[0].string_match.prefix is missing",
        ),
        (
            &|it| header(it, "x-a", text(MatchPattern::SafeRegex(regex("[z-a]")))),
            "match.headers[0].string_match.safe_regex.regex is '[z-a]'",
        ),
        (&|it| query(it, "x", None), "match.query_parameters[0].string_match is missing"),
        (
            &|it| query(it, "", Some(QueryParameterMatchSpecifier::PresentMatch(true))),
            "match.query_parameters[0].name is missing",
        ),
        (&|it| action(it).prefix_rewrite = "shop".to_owned(), "route.prefix_rewrite is 'shop'"),
        (&|it| action(it).prefix_rewrite = "/shop?x".to_owned(), "route.prefix_rewrite is '/shop?x'"),
        (
            &|it| {
                action(it).prefix_rewrite = "/shop".to_owned();
                rewrite(it, "a", "b");
            },
            "route.regex_rewrite is 'set', but there may be either prefix_rewrite or regex_rewrite",
        ),
        (&|it| rewrite(it, "a(", ""), "route.regex_rewrite.pattern.regex is 'a('"),
        (&|it| rewrite(it, "(a)", r"\2"), r"route.regex_rewrite.substitution is '\\2', but it must name groups"),
        (&|it| rewrite(it, "(a)", "/a#b"), "route.regex_rewrite.substitution is '/a#b'"),
        (&|it| host(it, "user@shop"), "route.host_rewrite_literal is 'user@shop'"),
        (&|it| host(it, "shop:http"), "route.host_rewrite_literal is 'shop:http'"),
        (
            &|it| cors(it, &share(50, DenominatorType::Hundred)),
            "typed_per_filter_config[envoy.filters.http.cors].filter_enabled.default_value is '50 (HUNDRED)'",
        ),
        (
            &|it| cors(it, &origin(MatchPattern::SafeRegex(regex("(")))),
            "allow_origin_string_match[0].safe_regex.regex is '('",
        ),
        (
            &|it| {
                it.typed_per_filter_config.insert("envoy.filters.http.lua".to_owned(), pack(&Cors::default()));
            },
            "typed_per_filter_config is 'envoy.filters.http.lua', which this proxy does not support",
        ),
    ];
    for (change, expected) in table {
        let mut configuration = route(WEB, &[(A, 100)]);
        let routes = &mut configuration.virtual_hosts[0].routes;
        routes.extend_from_within(..);
        change(&mut routes[1]);
        let reason = reason(TypeUrl::Route, resource(WEB, "2", &configuration));
        assert!(reason.starts_with("virtual_hosts[0].routes[1]."), "{reason}");
        assert!(reason.contains(expected), "'{reason}' does not contain '{expected}'");
    }
    let mut configuration = route(WEB, &[(A, 100)]);
    configuration.virtual_hosts[0].routes.clear();
    let reason = reason(TypeUrl::Route, resource(WEB, "2", &configuration));
    assert_eq!(reason, "virtual_hosts[0].routes is missing");
}

#[test]
fn a_listener_may_name_the_filter_for_cors_before_the_router_and_no_other() {
    let with = |before: HttpFilter| -> Listener {
        let mut message = listener(WEB, 20001);
        let Some(filter::ConfigType::TypedConfig(any)) = &mut message.filter_chains[0].filters[0].config_type else {
            panic!()
        };
        let mut manager: HttpConnectionManager = unpack(any).unwrap();
        manager.http_filters.insert(0, before);
        *any = pack(&manager);
        message
    };
    let config_type = Some(http_filter::ConfigType::TypedConfig(pack(&Cors::default())));
    let good = HttpFilter { name: "cors".to_owned(), config_type, ..HttpFilter::default() };
    accept(&mut fleet(), TypeUrl::Listener, &[resource(WEB, "2", &with(good))]);
    let config_type = Some(http_filter::ConfigType::TypedConfig(pack(&CorsPolicy::default())));
    let bad = HttpFilter { name: "cors".to_owned(), config_type, ..HttpFilter::default() };
    let reason = reason(TypeUrl::Listener, resource(WEB, "2", &with(bad)));
    assert!(reason.contains("http_filters[0].typed_config"), "{reason}");
}
