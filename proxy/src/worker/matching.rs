//! Whether a request is for a route, as Envoy has it.

use http::request;

use crate::snapshot::{PathMatch, RouteMatch};

/// `request` has been checked, so that its target is in origin-form, or has an authority in HTTP/2.
pub(super) fn takes(rule: &RouteMatch, request: &request::Parts) -> bool {
    let path = request.uri.path();
    match &rule.path {
        PathMatch::Prefix(prefix) => path.starts_with(prefix.as_str()),
    }
}
