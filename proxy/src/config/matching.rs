//! `RouteMatch`: which requests a route is for.

use sluice_xds::envoy::config::route::v3::{RouteMatch as Message, route_match::PathSpecifier};

use super::ConfigError;
use crate::snapshot::{PathMatch, RouteMatch};

/// `field` is where the message stands.
pub(super) fn parse(message: Option<&Message>, field: &str) -> Result<RouteMatch, ConfigError> {
    let message = message.ok_or_else(|| ConfigError::missing(field))?;
    let path = match &message.path_specifier {
        Some(PathSpecifier::Prefix(prefix)) => PathMatch::Prefix(prefix.clone()),
        other => return Err(ConfigError::unsupported(field, format!("{other:?}"), "a prefix")),
    };
    Ok(RouteMatch { path })
}
