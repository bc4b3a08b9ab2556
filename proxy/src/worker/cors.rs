//! Cross-origin requests of browsers, as Envoy's filter answers them
//! (<https://www.envoyproxy.io/docs/envoy/latest/configuration/http/http_filters/cors_filter>;
//! <https://fetch.spec.whatwg.org/#http-cors-protocol>).

use std::borrow::Cow;

use http::{HeaderMap, HeaderValue, Method, header, request};

use super::matching::{joined, matches};
use crate::snapshot::{Asked, CorsPolicy};

/// What a policy makes of a request.
pub(super) enum Verdict {
    /// Passed on, and the answer is as it is.
    Nothing,
    /// Passed on, and the answer says that the origin may read it.
    Grant(Box<Grant>),
    /// A question about a later request, answered here, with these headers.
    Preflight(HeaderMap),
}

/// What an answer says to an origin that is allowed.
pub(super) struct Grant {
    origin: HeaderValue,
    credentials: bool,
    expose: Option<HeaderValue>,
}

impl Grant {
    /// In place of what the application says about it.
    pub(super) fn write(&self, headers: &mut HeaderMap) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, self.origin.clone());
        if self.credentials {
            headers.insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
        }
        if let Some(expose) = &self.expose {
            headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, expose.clone());
        }
    }
}

pub(super) fn judge(policy: &CorsPolicy, request: &request::Parts) -> Verdict {
    let Some(origin) = joined(&request.headers, &header::ORIGIN, b",").filter(|origin| !origin.is_empty()) else {
        return Verdict::Nothing;
    };
    // As in Envoy, a rule that * fits is one for all.
    let allowed = policy.origins.iter().any(|rule| matches(rule, b"*") || matches(rule, &origin));
    let origin = HeaderValue::from_bytes(&origin).ok().filter(|_| allowed);
    let grant = origin.map(|origin| Grant { origin, credentials: policy.credentials, expose: policy.expose.clone() });
    let method =
        joined(&request.headers, &header::ACCESS_CONTROL_REQUEST_METHOD, b",").filter(|method| !method.is_empty());
    match (method, grant) {
        (Some(method), grant) if request.method == Method::OPTIONS && (grant.is_some() || !policy.forward_others) => {
            Verdict::Preflight(preflight(policy, grant, method, request))
        }
        (_, Some(grant)) => Verdict::Grant(Box::new(grant)),
        (_, None) => Verdict::Nothing,
    }
}

fn preflight(policy: &CorsPolicy, grant: Option<Grant>, method: Cow<'_, [u8]>, request: &request::Parts) -> HeaderMap {
    let mut headers = HeaderMap::new();
    if policy.credentials {
        headers.insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
    }
    let of = |asked: &Asked, what: Option<Cow<'_, [u8]>>| match asked {
        Asked::All => HeaderValue::from_bytes(&what.unwrap_or_default()).ok(),
        Asked::These(value) => Some(value.clone()),
    };
    if let Some(value) = policy.methods.as_ref().and_then(|methods| of(methods, Some(method))) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, value);
    }
    let names = || joined(&request.headers, &header::ACCESS_CONTROL_REQUEST_HEADERS, b",");
    if let Some(value) = policy.headers.as_ref().and_then(|headers| of(headers, names())) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, value);
    }
    if let Some(age) = &policy.max_age {
        headers.insert(header::ACCESS_CONTROL_MAX_AGE, age.clone());
    }
    if let Some(grant) = grant {
        grant.write(&mut headers);
    }
    headers
}
