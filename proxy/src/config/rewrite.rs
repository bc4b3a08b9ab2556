//! `RouteAction.prefix_rewrite` and its like: what a request is made to ask for.

use http::HeaderValue;
use sluice_pattern::{Pattern, authority, is_part_of_target, pieces};
use sluice_xds::envoy::{
    config::route::v3::{RouteAction, route_action::HostRewriteSpecifier},
    r#type::matcher::v3::RegexMatchAndSubstitute,
};

use super::{ConfigError, matching};
use crate::snapshot::{HostRewrite, PathRewrite, Rewrite, StringMatch, StringRule};

/// `path` is the rule that the request's path matched, `field` where the action stands.
pub(super) fn parse(action: &RouteAction, path: &StringMatch, field: &str) -> Result<Option<Rewrite>, ConfigError> {
    let host = match &action.host_rewrite_specifier {
        // As in Envoy, an empty one is none.
        Some(HostRewriteSpecifier::HostRewriteLiteral(name)) if !name.is_empty() => {
            Some(host(name, action.append_x_forwarded_host, field)?)
        }
        Some(HostRewriteSpecifier::HostRewriteLiteral(_)) | None => None,
    };
    let path = match (action.prefix_rewrite.as_str(), &action.regex_rewrite) {
        ("", None) => None,
        ("", Some(rewrite)) => Some(regex(rewrite, &format!("{field}.regex_rewrite"))?),
        (with, None) => Some(prefix(with, path, field)?),
        (_, Some(_)) => {
            let rule = "there may be either prefix_rewrite or regex_rewrite";
            return Err(ConfigError::invalid(format!("{field}.regex_rewrite"), "set", rule));
        }
    };
    Ok((host.is_some() || path.is_some()).then_some(Rewrite { host, path }))
}

fn host(name: &str, note_original: bool, field: &str) -> Result<HostRewrite, ConfigError> {
    match (authority(name), HeaderValue::from_str(name)) {
        (Some(authority), Ok(value)) => Ok(HostRewrite { authority, value, note_original }),
        (None, _) | (_, Err(_)) => {
            let rule = "it must be a host, or a host and a port";
            Err(ConfigError::invalid(format!("{field}.host_rewrite_literal"), name, rule))
        }
    }
}

fn prefix(with: &str, path: &StringMatch, field: &str) -> Result<PathRewrite, ConfigError> {
    if !with.starts_with('/') || with.contains('?') || !is_part_of_target(with) {
        let rule = "it must be a path that begins with /";
        return Err(ConfigError::invalid(format!("{field}.prefix_rewrite"), with, rule));
    }
    let with = with.to_owned();
    Ok(match &path.rule {
        StringRule::Prefix(prefix) | StringRule::SeparatedPrefix(prefix) => {
            PathRewrite::Prefix { matched: prefix.len(), with }
        }
        // All of it was matched.
        StringRule::Exact(_) | StringRule::Regex(_) | StringRule::Suffix(_) | StringRule::Contains(_) => {
            PathRewrite::Whole(with)
        }
    })
}

fn regex(message: &RegexMatchAndSubstitute, field: &str) -> Result<PathRewrite, ConfigError> {
    let Some(pattern) = &message.pattern else {
        return Err(ConfigError::missing(format!("{field}.pattern")));
    };
    let pattern = matching::compiled(pattern, Pattern::part, &format!("{field}.pattern"))?;
    let with = pieces(&message.substitution, pattern.groups())
        .map_err(|error| ConfigError::substitution(format!("{field}.substitution"), &message.substitution, error))?;
    Ok(PathRewrite::Regex { pattern, with })
}
