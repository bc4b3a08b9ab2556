//! Which routes are sent: those that every proxy takes, and that leave the other Canaries' room for theirs. Of others none is, and
//! what was sent before holds.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Mutex, PoisonError},
};

use sluice_crds::{Canary, HttpMatch, ServiceSpec, StringMatch};
use sluice_pattern::{Pattern, PatternError, SubstitutionError, authority, pieces};

use super::{
    Inputs,
    size::{Services, routes_size},
};
use crate::cache::CanaryKey;

/// Most bytes that all routes of a Canary may take: far more than one needs that somebody wrote, and less than one response of xDS may
/// have.
pub const LARGEST_ROUTES: usize = 2 << 20;
/// Expressions of which is remembered what they are.
const KNOWN: usize = 4096;

/// Why no routes of a Canary are sent, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unsendable {
    #[error(
        "spec.service: its routes take {} KiB of each member of the fleet, and at most {} KiB are sent: every entry of match, together \
         with every one of spec.analysis.match, has headers, corsPolicy and fault once more, on each HTTP port of each Service. Say \
         fewer or shorter ones",
        .bytes.div_ceil(1024),
        LARGEST_ROUTES / 1024
    )]
    Size { bytes: usize },
    #[error("{field} is {text:?}, but {reason}. Say another one")]
    Regex { field: String, text: String, reason: PatternError },
    #[error("spec.service.rewrite.uriRegexRewrite.rewrite is {text:?}, but {reason}. Say another one")]
    Rewrite { text: String, reason: SubstitutionError },
    #[error(
        "spec.service.rewrite.authority is {text:?}, which is no host, with a port from 1 to 65535 or without. Say another one"
    )]
    Host { text: String },
    #[error(
        "{field} names a path, and so does the spec.analysis.match with which the release began. A request has one path: say it when the \
         release is over"
    )]
    Paths { field: &'static str },
}

/// What is done with requests: as the Canary says, or where that cannot be sent, as it said before. `None` if it did not.
pub(super) fn how<'a>(
    inputs: &'a Inputs,
    canary: &'a Canary,
    matches: Option<&[HttpMatch]>,
    services: Services<'_>,
) -> Option<&'a ServiceSpec> {
    let can_be = |how: &&ServiceSpec| unsendable(canary, how, matches, services).is_none();
    Some(&canary.spec.service).filter(can_be).or_else(|| {
        let kept = inputs.kept.get(&CanaryKey::of(canary)).filter(|kept| kept.metadata.uid == canary.metadata.uid);
        kept.map(|kept| &kept.spec.service).filter(can_be)
    })
}

/// Why the routes of a Canary cannot be sent, if `how` says what is done with requests and `matches` which of them are released.
#[must_use]
pub fn unsendable(
    canary: &Canary,
    how: &ServiceSpec,
    matches: Option<&[HttpMatch]>,
    services: Services<'_>,
) -> Option<Unsendable> {
    let bytes = routes_size(canary, how, matches, services);
    if bytes > LARGEST_ROUTES {
        return Some(Unsendable::Size { bytes });
    }
    two_paths(how, matches).or_else(|| regexes(how, matches)).or_else(|| rewrites(how))
}

/// The schema forbids them in what is written at one time. A release keeps the matches with which it began.
fn two_paths(how: &ServiceSpec, matches: Option<&[HttpMatch]>) -> Option<Unsendable> {
    let names_path = |matches: Option<&[HttpMatch]>| matches.is_some_and(|all| all.iter().any(|one| one.uri.is_some()));
    if !names_path(matches) {
        return None;
    }
    let rewrites = how.rewrite.as_ref().is_some_and(|rewrite| rewrite.uri.is_some());
    let rewrites = rewrites.then_some("spec.service.rewrite.uri");
    let field = names_path(how.matches.as_deref()).then_some("spec.service.match").or(rewrites)?;
    Some(Unsendable::Paths { field })
}

fn regexes(how: &ServiceSpec, matches: Option<&[HttpMatch]>) -> Option<Unsendable> {
    let texts = of_every_route(how).map(|(place, text)| (Within::Service, place, text));
    let mut texts = texts
        .chain(entries(Within::ServiceMatch, how.matches.as_deref()))
        .chain(entries(Within::AnalysisMatch, matches));
    texts.find_map(|(within, place, text)| {
        let text = text.regex.as_ref()?;
        let reason = groups(text).err()?;
        Some(Unsendable::Regex { field: format!("{within}.{place}.regex"), text: text.clone(), reason })
    })
}

fn rewrites(how: &ServiceSpec) -> Option<Unsendable> {
    let rewrite = how.rewrite.as_ref()?;
    if let Some(text) = rewrite.authority.as_ref().filter(|name| authority(name).is_none()) {
        return Some(Unsendable::Host { text: text.clone() });
    }
    let rewrite = rewrite.uri_regex_rewrite.as_ref()?;
    match groups(&rewrite.r#match) {
        Ok(groups) => {
            let reason = pieces(&rewrite.rewrite, groups).err()?;
            Some(Unsendable::Rewrite { text: rewrite.rewrite.clone(), reason })
        }
        Err(reason) => {
            let field = "spec.service.rewrite.uriRegexRewrite.match".to_owned();
            Some(Unsendable::Regex { field, text: rewrite.r#match.clone(), reason })
        }
    }
}

/// How many groups an expression has, the whole match among them. Remembered, because each is asked for with every snapshot.
fn groups(text: &str) -> Result<usize, PatternError> {
    static FOUND: Mutex<BTreeMap<String, Result<usize, PatternError>>> = Mutex::new(BTreeMap::new());
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(groups) = found.get(text) {
        return groups.clone();
    }
    if found.len() >= KNOWN {
        found.clear();
    }
    let groups = Pattern::whole(text).map(|pattern| pattern.groups());
    found.insert(text.to_owned(), groups.clone());
    groups
}

#[derive(Clone, Copy)]
enum Within {
    Service,
    ServiceMatch(usize),
    AnalysisMatch(usize),
}

impl fmt::Display for Within {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service => f.write_str("spec.service"),
            Self::ServiceMatch(index) => write!(f, "spec.service.match[{index}]"),
            Self::AnalysisMatch(index) => write!(f, "spec.analysis.match[{index}]"),
        }
    }
}

/// Where a text stands.
#[derive(Clone, Copy)]
pub(super) enum Place<'a> {
    Field(&'static str),
    Key(&'static str, &'a str),
    Index(&'static str, usize),
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Field(field) => f.write_str(field),
            Self::Key(field, key) => write!(f, "{field}.{key}"),
            Self::Index(field, index) => write!(f, "{field}[{index}]"),
        }
    }
}

fn entries(
    within: fn(usize) -> Within,
    all: Option<&[HttpMatch]>,
) -> impl Iterator<Item = (Within, Place<'_>, &StringMatch)> {
    let each = all.unwrap_or_default().iter().enumerate();
    each.flat_map(move |(index, one)| of_match(one).map(move |(place, text)| (within(index), place, text)))
}

/// What a request is compared with.
pub(super) fn of_match(one: &HttpMatch) -> impl Iterator<Item = (Place<'_>, &StringMatch)> {
    let HttpMatch { uri, method, authority, headers, without_headers, query_params, .. } = one;
    let fields = [("uri", uri), ("method", method), ("authority", authority)];
    let fields = fields.into_iter().filter_map(|(field, text)| Some((Place::Field(field), text.as_ref()?)));
    let maps = [("headers", headers), ("withoutHeaders", without_headers), ("queryParams", query_params)];
    fields.chain(
        maps.into_iter().flat_map(|(field, map)| map.iter().map(move |(key, text)| (Place::Key(field, key), text))),
    )
}

/// The same, in each route.
pub(super) fn of_every_route(how: &ServiceSpec) -> impl Iterator<Item = (Place<'_>, &StringMatch)> {
    let origins = how.cors_policy.iter().flat_map(|policy| policy.allow_origins.iter().enumerate());
    let origins = origins.map(|(index, text)| (Place::Index("corsPolicy.allowOrigins", index), text));
    let faults = how.fault.iter().flat_map(|fault| &fault.headers);
    origins.chain(faults.map(|(name, text)| (Place::Key("fault.headers", name), text)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeSet;

    use jiff::Timestamp;
    use k8s_openapi::api::core::v1::Service;
    use serde_json::{Value, json};
    use sluice_xds::TypeUrl;

    use super::*;
    use crate::mesh::{
        build,
        ports::Allocation,
        testing::{Shop, too_large},
        wanted_ports,
    };

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
        assert_eq!(snapshot.unsendable, BTreeSet::from([shop.key()]));
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
        assert_eq!(snapshot.unsendable, BTreeSet::from([shop.key()]));
        assert_eq!((&snapshot.fleet, &snapshot.canaries), (&expected.fleet, &expected.canaries));

        // Of another Canary that had this name.
        shop.canary["metadata"]["uid"] = json!("another");
        let snapshot = build(&Inputs { kept: inputs.kept, ..shop.inputs() });
        assert!(snapshot.canaries.is_empty() && !snapshot.fleet.withheld.is_empty());
    }

    #[test]
    fn what_proxies_would_refuse_is_named_with_its_field() {
        let said = |service: Value, matches: Value| {
            let mut shop = Shop::new();
            shop.traffic("aaa", Some("bbb"), 50);
            for (field, value) in service.as_object().unwrap() {
                shop.canary["spec"]["service"][field] = value.clone();
            }
            let inputs = shop.inputs();
            let canary = &inputs.canaries[0];
            let matches: Vec<HttpMatch> = serde_json::from_value(matches).unwrap();
            let services = Services { apex: None, additional: &[] };
            let found = unsendable(canary, &canary.spec.service, Some(&matches), services);
            found.map(|why| why.to_string()).unwrap_or_default()
        };
        let rewrite =
            |rewrite: &str| json!({"rewrite": {"uriRegexRewrite": {"match": "^/v1/([a-z]+)", "rewrite": rewrite}}});
        let abort = json!({"percentage": {"value": 1}, "httpStatus": 503});
        let table = [
            (json!({"match": [{"uri": {"regex": "/[a-z]+"}}]}), json!([{"method": {"regex": "GET|POST"}}]), ""),
            (rewrite(r"/v2/\1"), json!([]), ""),
            (
                json!({"match": [{"uri": {"prefix": "/"}}, {"uri": {"regex": r"/\p{Greek}+"}}]}),
                json!([]),
                r#"spec.service.match[1].uri.regex is "/\\p{Greek}+", but it is not a regular expression: Unicode not allowed here"#,
            ),
            (
                json!({}),
                json!([{"headers": {"x-user": {"regex": ".{1,300}.{1,300}"}}}]),
                r#"spec.analysis.match[0].headers.x-user.regex is ".{1,300}.{1,300}", but it is larger than 24576 bytes"#,
            ),
            (
                json!({"corsPolicy": {"allowOrigins": [{"exact": "https://a"}, {"regex": r"\C"}]}}),
                json!([]),
                "spec.service.corsPolicy.allowOrigins[1].regex is ",
            ),
            (
                json!({"fault": {"headers": {"x-a": {"regex": r"\C"}}, "abort": abort}}),
                json!([]),
                "spec.service.fault.headers.x-a.regex is ",
            ),
            (
                json!({"rewrite": {"uriRegexRewrite": {"match": r"\C", "rewrite": "/"}}}),
                json!([]),
                "spec.service.rewrite.uriRegexRewrite.match is ",
            ),
            (
                rewrite(r"/v2/\2"),
                json!([]),
                r#"spec.service.rewrite.uriRegexRewrite.rewrite is "/v2/\\2", but it must name groups that the pattern has. Say"#,
            ),
            (json!({"rewrite": {"authority": "[::1]:8080"}}), json!([]), ""),
            (
                json!({"rewrite": {"authority": "web.shop:80800"}}),
                json!([]),
                r#"spec.service.rewrite.authority is "web.shop:80800", which is no host"#,
            ),
            (
                json!({"match": [{"uri": {"prefix": "/"}}]}),
                json!([{"uri": {"prefix": "/beta"}}]),
                "spec.service.match names a path, and so does the spec.analysis.match with which the release began",
            ),
            (
                json!({"rewrite": {"uri": "/"}}),
                json!([{"uri": {"prefix": "/beta"}}]),
                "spec.service.rewrite.uri names a path, and so does",
            ),
        ];
        for (service, matches, expected) in table {
            let said = said(service, matches);
            assert!(said.starts_with(expected) && said.is_empty() == expected.is_empty(), "{said} / {expected}");
        }
    }
}
