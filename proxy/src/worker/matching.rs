//! Whether a request is for a route, as Envoy has it (`HeaderUtility::matchHeaders`, `ConfigUtility::matchQueryParams`).

use std::borrow::Cow;

use http::{HeaderMap, HeaderName, HeaderValue, Version, header, request, uri::PathAndQuery};
use memchr::memmem;

use crate::snapshot::{Field, HeaderMatch, HeaderRule, QueryMatch, QueryRule, RouteMatch, StringMatch, StringRule};

/// `tls` says how the client is connected. The target has been checked, so that it is in origin-form, or has an
/// authority in HTTP/2.
pub(super) fn takes(rule: &RouteMatch, request: &request::Parts, tls: bool) -> bool {
    matches(&rule.path, request.uri.path().as_bytes())
        && headers(&rule.headers, request, tls)
        && rule.query.iter().all(|rule| parameter(rule, request.uri.query().unwrap_or_default()))
}

/// Whether a request meets all of these.
pub(super) fn headers(rules: &[HeaderMatch], request: &request::Parts, tls: bool) -> bool {
    rules.iter().all(|rule| header(rule, request, tls))
}

pub(super) fn matches(rule: &StringMatch, value: &[u8]) -> bool {
    let equal = |part: Option<&[u8]>, text: &str| {
        part.is_some_and(|part| match rule.ignore_case {
            true => part.eq_ignore_ascii_case(text.as_bytes()),
            false => part == text.as_bytes(),
        })
    };
    match &rule.rule {
        StringRule::Exact(text) => equal(Some(value), text),
        StringRule::Prefix(text) => equal(value.get(..text.len()), text),
        StringRule::SeparatedPrefix(text) => {
            equal(value.get(..text.len()), text) && matches!(value.get(text.len()), None | Some(b'/'))
        }
        StringRule::Suffix(text) => {
            let at = value.len().checked_sub(text.len());
            equal(at.map(|at| &value[at..]), text)
        }
        StringRule::Contains(text) if rule.ignore_case => {
            let text = text.to_ascii_lowercase();
            memmem::find(&value.to_ascii_lowercase(), text.as_bytes()).is_some()
        }
        StringRule::Contains(text) => memmem::find(value, text.as_bytes()).is_some(),
        StringRule::Regex(pattern) => pattern.is_match(value),
    }
}

/// Of several values one must fit, or none if it is inverted (Envoy 1.39, `match_headers_individually`).
fn header(rule: &HeaderMatch, request: &request::Parts, tls: bool) -> bool {
    let crumbs;
    let (one, several) = match &rule.of {
        Field::Method => (Some(request.method.as_str().as_bytes()), None),
        Field::Path => (Some(request.uri.path_and_query().map_or("/", PathAndQuery::as_str).as_bytes()), None),
        // HTTP/1.1 does not say it in its requests.
        Field::Scheme => {
            let scheme = request.uri.scheme_str().unwrap_or(if tls { "https" } else { "http" });
            (Some(scheme.as_bytes()), None)
        }
        Field::Authority => match request.uri.authority() {
            Some(authority) => (Some(authority.as_str().as_bytes()), None),
            None => (None, Some(&header::HOST)),
        },
        // HTTP/2 may cut it into several, which are one (RFC 9113, 8.2.3).
        Field::Header(name) if *name == header::COOKIE && request.version == Version::HTTP_2 => {
            crumbs = joined(&request.headers, name, b"; ");
            (crumbs.as_deref(), None)
        }
        Field::Header(name) => (None, Some(name)),
    };
    let several = several.into_iter().flat_map(|name| request.headers.get_all(name)).map(HeaderValue::as_bytes);
    let mut values = one.into_iter().chain(several).peekable();
    let fits = match (values.peek(), &rule.rule) {
        (Some(_), _) => values.any(|value| holds(&rule.rule, value)),
        (None, _) if rule.missing_is_empty => holds(&rule.rule, b""),
        (None, HeaderRule::Present(present)) => return *present == rule.invert,
        // Inverted or not: there is nothing to compare.
        (None, HeaderRule::Range(_) | HeaderRule::Text(_)) => return false,
    };
    fits != rule.invert
}

fn holds(rule: &HeaderRule, value: &[u8]) -> bool {
    match rule {
        HeaderRule::Present(present) => *present,
        HeaderRule::Range(range) => {
            let number = str::from_utf8(value).ok().and_then(|value| value.trim_ascii().parse().ok());
            number.is_some_and(|number| range.contains(&number))
        }
        HeaderRule::Text(text) => matches(text, value),
    }
}

/// All values of a header as one.
pub(super) fn joined<'a>(headers: &'a HeaderMap, name: &HeaderName, separator: &[u8]) -> Option<Cow<'a, [u8]>> {
    let mut values = headers.get_all(name).iter();
    let first = values.next()?.as_bytes();
    Some(values.fold(first.into(), |mut all: Cow<'_, [u8]>, value| {
        let text = all.to_mut();
        text.extend_from_slice(separator);
        text.extend_from_slice(value.as_bytes());
        all
    }))
}

/// The first parameter of the name counts, as it is written: nothing is decoded.
fn parameter(rule: &QueryMatch, query: &str) -> bool {
    let mut all = query.split('&').map(|one| one.split_once('=').unwrap_or((one, "")));
    let value = all.find(|(name, _)| *name == rule.name).map(|(_, value)| value);
    match &rule.rule {
        QueryRule::Present(present) => value.is_some() == *present,
        QueryRule::Text(text) => value.is_some_and(|value| matches(text, value.as_bytes())),
    }
}
