//! `RouteAction.prefix_rewrite` and its like: what a request is made to ask for.

use http::{
    HeaderValue,
    uri::{Authority, PathAndQuery},
};
use sluice_xds::envoy::{
    config::route::v3::{RouteAction, route_action::HostRewriteSpecifier},
    r#type::matcher::v3::RegexMatchAndSubstitute,
};

use super::{ConfigError, matching};
use crate::{
    pattern::Pattern,
    snapshot::{HostRewrite, PathRewrite, Piece, Rewrite, StringMatch, StringRule},
};

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
    let authority = Authority::try_from(name).ok().filter(|authority| {
        let port = name.strip_prefix(authority.host());
        port.is_some_and(|port| port.is_empty() || authority.port_u16().is_some())
    });
    match (authority, HeaderValue::from_str(name)) {
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
        .map_err(|rule| ConfigError::invalid(format!("{field}.substitution"), &message.substitution, rule))?;
    Ok(PathRewrite::Regex { pattern, with })
}

/// A text with `\1` for what the first group has matched, `\0` for the whole, and `\\` (RE2's `Rewrite`).
fn pieces(substitution: &str, groups: usize) -> Result<Vec<Piece>, &'static str> {
    let mut pieces = Vec::new();
    let mut text = String::new();
    let mut rest = substitution.chars();
    while let Some(next) = rest.next() {
        if next != '\\' {
            text.push(next);
            continue;
        }
        match rest.next() {
            Some('\\') => text.push('\\'),
            Some(digit @ '0'..='9') => {
                let group = usize::from(digit as u8 - b'0');
                if group >= groups {
                    return Err("it must name groups that the pattern has");
                }
                pieces.push(Piece::Text(std::mem::take(&mut text)));
                pieces.push(Piece::Group(group));
            }
            Some(_) | None => return Err("a \\ must be followed by the number of a group or another \\"),
        }
    }
    pieces.push(Piece::Text(text));
    pieces.retain(|piece| !matches!(piece, Piece::Text(text) if text.is_empty()));
    let is_good = |piece: &Piece| match piece {
        Piece::Text(text) => is_part_of_target(text),
        Piece::Group(_) => true,
    };
    if pieces.iter().all(is_good) { Ok(pieces) } else { Err("it must be part of a path") }
}

/// A fragment is never sent (RFC 9112, 3.2).
fn is_part_of_target(text: &str) -> bool {
    !text.contains('#') && PathAndQuery::try_from(format!("/{text}")).is_ok()
}
