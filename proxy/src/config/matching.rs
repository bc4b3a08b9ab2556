//! `RouteMatch`: which requests a route is for.

use http::HeaderName;
use sluice_pattern::{Pattern, PatternError};
use sluice_xds::envoy::{
    config::route::v3::{
        HeaderMatcher, QueryParameterMatcher, RouteMatch as Message, header_matcher::HeaderMatchSpecifier,
        query_parameter_matcher::QueryParameterMatchSpecifier, route_match::PathSpecifier,
    },
    r#type::matcher::v3::{RegexMatcher, StringMatcher, string_matcher::MatchPattern},
};

use super::ConfigError;
use crate::snapshot::{Field, HeaderMatch, HeaderRule, QueryMatch, QueryRule, RouteMatch, StringMatch, StringRule};

/// `field` is where the message stands.
pub(super) fn parse(message: Option<&Message>, field: &str) -> Result<RouteMatch, ConfigError> {
    let message = message.ok_or_else(|| ConfigError::missing(field))?;
    let query = message.query_parameters.iter().enumerate();
    Ok(RouteMatch {
        path: path(message, field)?,
        headers: headers(&message.headers, field)?,
        query: query
            .map(|(at, one)| parameter(one, &format!("{field}.query_parameters[{at}]")))
            .collect::<Result<_, _>>()?,
    })
}

/// What `headers` of the message at `field` say.
pub(super) fn headers(messages: &[HeaderMatcher], field: &str) -> Result<Vec<HeaderMatch>, ConfigError> {
    messages.iter().enumerate().map(|(at, one)| header(one, &format!("{field}.headers[{at}]"))).collect()
}

fn path(message: &Message, field: &str) -> Result<StringMatch, ConfigError> {
    let rule = match &message.path_specifier {
        Some(PathSpecifier::Prefix(prefix)) => StringRule::Prefix(prefix.clone()),
        Some(PathSpecifier::Path(path)) => StringRule::Exact(path.clone()),
        Some(PathSpecifier::SafeRegex(regex)) => StringRule::Regex(whole(regex, &format!("{field}.safe_regex"))?),
        Some(PathSpecifier::PathSeparatedPrefix(prefix)) => {
            // As Envoy validates it (route_components.proto).
            if prefix.len() < 2 || prefix.ends_with('/') || prefix.contains(['?', '#']) {
                let rule = "it must be a path that does not end with /";
                return Err(ConfigError::invalid(format!("{field}.path_separated_prefix"), prefix, rule));
            }
            StringRule::SeparatedPrefix(prefix.clone())
        }
        None => return Err(ConfigError::missing(format!("{field}.prefix"))),
    };
    // An expression says itself what it thinks of case.
    Ok(StringMatch { rule, ignore_case: !message.case_sensitive.unwrap_or(true) })
}

fn header(message: &HeaderMatcher, field: &str) -> Result<HeaderMatch, ConfigError> {
    let rule = match &message.header_match_specifier {
        Some(HeaderMatchSpecifier::RangeMatch(range)) => HeaderRule::Range(range.start..range.end),
        Some(HeaderMatchSpecifier::PresentMatch(present)) => HeaderRule::Present(*present),
        Some(HeaderMatchSpecifier::StringMatch(text)) => {
            HeaderRule::Text(string(text, &format!("{field}.string_match"))?)
        }
        // Envoy takes it for a present_match. It may be one of the older matchers, too, that we do not know.
        None => return Err(ConfigError::missing(format!("{field}.string_match"))),
    };
    Ok(HeaderMatch {
        of: name(&message.name, || format!("{field}.name"))?,
        rule,
        invert: message.invert_match,
        missing_is_empty: message.treat_missing_header_as_empty,
    })
}

fn name(name: &str, field: impl FnOnce() -> String) -> Result<Field, ConfigError> {
    if name.starts_with(':') {
        return match name {
            ":method" => Ok(Field::Method),
            ":authority" => Ok(Field::Authority),
            ":path" => Ok(Field::Path),
            ":scheme" => Ok(Field::Scheme),
            other => Err(ConfigError::unsupported(field(), other, ":method, :authority, :path and :scheme")),
        };
    }
    match HeaderName::from_bytes(name.as_bytes()) {
        Ok(http::header::HOST) => Ok(Field::Authority),
        Ok(name) => Ok(Field::Header(name)),
        Err(_) => Err(ConfigError::invalid(field(), name, "it must be the name of a header")),
    }
}

fn parameter(message: &QueryParameterMatcher, field: &str) -> Result<QueryMatch, ConfigError> {
    if message.name.is_empty() {
        return Err(ConfigError::missing(format!("{field}.name")));
    }
    let rule = match &message.query_parameter_match_specifier {
        Some(QueryParameterMatchSpecifier::StringMatch(text)) => {
            QueryRule::Text(string(text, &format!("{field}.string_match"))?)
        }
        Some(QueryParameterMatchSpecifier::PresentMatch(present)) => QueryRule::Present(*present),
        None => return Err(ConfigError::missing(format!("{field}.string_match"))),
    };
    Ok(QueryMatch { name: message.name.clone(), rule })
}

pub(super) fn string(message: &StringMatcher, field: &str) -> Result<StringMatch, ConfigError> {
    // What is empty would match everything, and Envoy refuses it.
    let some = |text: &String, name: &str| match text.as_str() {
        "" => Err(ConfigError::missing(format!("{field}.{name}"))),
        _ => Ok(text.clone()),
    };
    let rule = match &message.match_pattern {
        Some(MatchPattern::Exact(text)) => StringRule::Exact(text.clone()),
        Some(MatchPattern::Prefix(text)) => StringRule::Prefix(some(text, "prefix")?),
        Some(MatchPattern::Suffix(text)) => StringRule::Suffix(some(text, "suffix")?),
        Some(MatchPattern::Contains(text)) => StringRule::Contains(some(text, "contains")?),
        Some(MatchPattern::SafeRegex(regex)) => StringRule::Regex(whole(regex, &format!("{field}.safe_regex"))?),
        None => return Err(ConfigError::missing(format!("{field}.exact"))),
    };
    Ok(StringMatch { rule, ignore_case: message.ignore_case })
}

fn whole(message: &RegexMatcher, field: &str) -> Result<Pattern, ConfigError> {
    compiled(message, Pattern::whole, field)
}

/// `field` is where the matcher stands.
pub(super) fn compiled(
    message: &RegexMatcher,
    how: impl FnOnce(&str) -> Result<Pattern, PatternError>,
    field: &str,
) -> Result<Pattern, ConfigError> {
    let field = format!("{field}.regex");
    if message.regex.is_empty() {
        return Err(ConfigError::missing(field));
    }
    how(&message.regex).map_err(|reason| ConfigError::pattern(field, &message.regex, reason))
}
