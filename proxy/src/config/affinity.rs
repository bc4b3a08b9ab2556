//! `RouteAction.hash_policy`: what says whose request it is, where users rather than requests are split.

use std::fmt::Write;

use http::{HeaderName, HeaderValue, header};
use sluice_xds::envoy::config::route::v3::{
    RouteAction,
    route_action::{
        ClusterSpecifier,
        hash_policy::{Cookie, PolicySpecifier},
    },
    weighted_cluster::RandomValueSpecifier,
};

use super::ConfigError;
use crate::snapshot::{HashPolicy, HashedBy};

/// Without `use_hash_policy` they would choose an endpoint for Envoy's ring hash, which no cluster here has.
pub(super) fn parse(action: &RouteAction, field: &str) -> Result<Vec<HashPolicy>, ConfigError> {
    let used = match &action.cluster_specifier {
        Some(ClusterSpecifier::WeightedClusters(weighted)) => {
            matches!(weighted.random_value_specifier, Some(RandomValueSpecifier::UseHashPolicy(true)))
        }
        Some(ClusterSpecifier::Cluster(_)) | None => false,
    };
    let policies = action.hash_policy.iter().filter(|_| used).enumerate().map(|(at, policy)| {
        let field = format!("{field}.hash_policy[{at}]");
        let by = match &policy.policy_specifier {
            Some(PolicySpecifier::Header(by)) => header(&by.header_name, format!("{field}.header.header_name"))?,
            Some(PolicySpecifier::Cookie(by)) => cookie(by, &format!("{field}.cookie"))?,
            // The oneof has more kinds, which we do not know.
            None => return Err(ConfigError::missing(format!("{field}.header or {field}.cookie"))),
        };
        Ok(HashPolicy { by, terminal: policy.terminal })
    });
    policies.collect()
}

fn header(name: &str, field: String) -> Result<HashedBy, ConfigError> {
    match HeaderName::from_bytes(name.as_bytes()) {
        // Of HTTP/2 it would be :authority.
        Ok(header::HOST) => Err(ConfigError::unsupported(field, name, "headers other than Host")),
        Ok(name) => Ok(HashedBy::Header(name)),
        Err(_) => Err(ConfigError::invalid(field, name, "it must be the name of a header")),
    }
}

/// A cookie with a lifetime is given to whoever comes without it, for the session if that is 0.
fn cookie(message: &Cookie, field: &str) -> Result<HashedBy, ConfigError> {
    // RFC 6265, 4.1.1: a token, as is the name of a header.
    if HeaderName::from_bytes(message.name.as_bytes()).is_err() {
        return Err(ConfigError::invalid(format!("{field}.name"), &message.name, "it must be the name of a cookie"));
    }
    let given = message.ttl.as_ref().map(|ttl| {
        if ttl.seconds < 0 || ttl.nanos < 0 {
            let said = format!("{} s {} ns", ttl.seconds, ttl.nanos);
            return Err(ConfigError::invalid(format!("{field}.ttl"), said, "it must not be negative"));
        }
        attributes(message, ttl.seconds, field)
    });
    Ok(HashedBy::Cookie { name: message.name.clone(), given: given.transpose()? })
}

/// As Envoy writes them (`source/common/http/utility.cc`, `makeSetCookieValue`).
fn attributes(message: &Cookie, seconds: i64, field: &str) -> Result<String, ConfigError> {
    let mut text = String::new();
    // Writing to a String cannot fail.
    if seconds > 0 {
        let _ = write!(text, "; Max-Age={seconds}");
    }
    if !message.path.is_empty() {
        let _ = write!(text, "; Path={}", part(&message.path, || format!("{field}.path"))?);
    }
    for (at, attribute) in message.attributes.iter().enumerate() {
        let name = part(&attribute.name, || format!("{field}.attributes[{at}].name"))?;
        let value = part(&attribute.value, || format!("{field}.attributes[{at}].value"))?;
        let _ = if value.is_empty() { write!(text, "; {name}") } else { write!(text, "; {name}={value}") };
    }
    text.push_str("; HttpOnly");
    Ok(text)
}

fn part(text: &str, field: impl FnOnce() -> String) -> Result<&str, ConfigError> {
    if text.contains(';') || HeaderValue::from_str(text).is_err() {
        return Err(ConfigError::invalid(field(), text, "it must be visible ASCII and have no semicolon"));
    }
    Ok(text)
}
