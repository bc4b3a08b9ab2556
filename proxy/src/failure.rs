//! Answers that this proxy gives itself, and why: typed causes, and one function that maps a cause to status and flag.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, header};

use crate::{metrics::GrpcStatus, refused::Refused, snapshot::Abort};

/// On every answer of our own but to CORS preflights, so that users can tell it from one of the application.
pub const FLAG_HEADER: HeaderName = HeaderName::from_static("x-sluice-response-flag");
/// On a sidecar's 503, for the fleet alone: the application has not seen the request (docs/xds.md).
pub const NOT_PROCESSED: HeaderName = HeaderName::from_static("x-sluice-not-processed");

/// What kept a request from being answered by an upstream.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    #[error("no endpoint of the chosen revision is ready")]
    NoHealthyUpstream,
    #[error("no endpoint of the chosen revision could be reached")]
    ConnectFailed,
    #[error("the chosen revision has as many requests or connections as it may have at once")]
    Overflow,
    #[error("the upstream closed the connection before it answered; the request may have been processed")]
    UpstreamReset,
    #[error("the upstream did not answer in time; the request may have been processed")]
    UpstreamTimeout,
    #[error("nothing came from the upstream for too long; the request may have been processed")]
    UpstreamIdle,
    #[error("nothing came of the rest of the request for too long")]
    RequestIdle,
    #[error("the upstream did not answer in HTTP as asked")]
    UpstreamProtocol,
    /// No revision was drawn yet.
    #[error("this proxy is short of memory; the request was not processed")]
    Overloaded,
    #[error("nothing is configured to serve this")]
    NoRoute,
    #[error("the request is not valid: {1}")]
    BadRequest(Refused, &'static str),
    #[error("the request's headers are too many or too large")]
    HeadTooLarge,
    #[error("the request's target is too long")]
    UriTooLong,
    #[error("the request has a transfer coding that is not served here")]
    UnknownCoding,
    #[error("CONNECT is not served here")]
    MethodRefused,
    #[error("the upstream is spoken to in HTTP/2, which WebSocket is not passed over here")]
    UpgradeRefused,
    #[error("this connection was made under another identity than is admitted now")]
    Unauthorized,
    /// Configured so, e.g. 503 where no revision serves yet.
    #[error("nothing serves here at the moment")]
    DirectResponse(StatusCode),
    /// Configured so, to rehearse it.
    #[error("this fault was injected on purpose")]
    FaultInjected(Abort),
    /// The client went away or broke its own request; nobody reads the answer.
    #[error("the client ended its request early")]
    ClientGone,
}

/// Response flags with the names that Envoy gives them
/// (<https://www.envoyproxy.io/docs/envoy/latest/configuration/observability/access_log/usage>, `RESPONSE_FLAGS`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flag {
    NoHealthyUpstream,
    UpstreamConnectionFailure,
    UpstreamOverflow,
    UpstreamConnectionTermination,
    UpstreamRequestTimeout,
    StreamIdleTimeout,
    UpstreamProtocolError,
    NoRoute,
    DownstreamProtocolError,
    Unauthorized,
    DirectResponse,
    DownstreamTermination,
    FaultInjected,
    DelayInjected,
    OverloadManager,
}

impl Flag {
    pub const ALL: [Self; 15] = [
        Self::NoHealthyUpstream,
        Self::UpstreamConnectionFailure,
        Self::UpstreamOverflow,
        Self::UpstreamConnectionTermination,
        Self::UpstreamRequestTimeout,
        Self::StreamIdleTimeout,
        Self::UpstreamProtocolError,
        Self::NoRoute,
        Self::DownstreamProtocolError,
        Self::Unauthorized,
        Self::DirectResponse,
        Self::DownstreamTermination,
        Self::FaultInjected,
        Self::DelayInjected,
        Self::OverloadManager,
    ];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::NoHealthyUpstream => "UH",
            Self::UpstreamConnectionFailure => "UF",
            Self::UpstreamOverflow => "UO",
            Self::UpstreamConnectionTermination => "UC",
            Self::UpstreamRequestTimeout => "UT",
            Self::StreamIdleTimeout => "SI",
            Self::UpstreamProtocolError => "UPE",
            Self::NoRoute => "NR",
            Self::DownstreamProtocolError => "DPE",
            Self::Unauthorized => "UAEX",
            // Not one of Envoy's: there a direct response has only details.
            Self::DirectResponse => "DR",
            Self::DownstreamTermination => "DC",
            Self::FaultInjected => "FI",
            Self::DelayInjected => "DI",
            Self::OverloadManager => "OM",
        }
    }
}

impl Failure {
    /// The status, the flag, and what a gRPC client sees instead of the status.
    #[must_use]
    pub fn answer(&self) -> (StatusCode, Flag, GrpcStatus) {
        let (status, flag) = match self {
            Self::NoHealthyUpstream => (StatusCode::SERVICE_UNAVAILABLE, Flag::NoHealthyUpstream),
            Self::ConnectFailed => (StatusCode::SERVICE_UNAVAILABLE, Flag::UpstreamConnectionFailure),
            Self::Overflow => (StatusCode::SERVICE_UNAVAILABLE, Flag::UpstreamOverflow),
            Self::UpstreamReset => (StatusCode::SERVICE_UNAVAILABLE, Flag::UpstreamConnectionTermination),
            Self::UpstreamTimeout => (StatusCode::GATEWAY_TIMEOUT, Flag::UpstreamRequestTimeout),
            Self::UpstreamIdle => (StatusCode::GATEWAY_TIMEOUT, Flag::StreamIdleTimeout),
            Self::RequestIdle => (StatusCode::REQUEST_TIMEOUT, Flag::StreamIdleTimeout),
            Self::UpstreamProtocol => (StatusCode::BAD_GATEWAY, Flag::UpstreamProtocolError),
            Self::Overloaded => (StatusCode::SERVICE_UNAVAILABLE, Flag::OverloadManager),
            Self::NoRoute => (StatusCode::NOT_FOUND, Flag::NoRoute),
            Self::BadRequest(..) => (StatusCode::BAD_REQUEST, Flag::DownstreamProtocolError),
            Self::HeadTooLarge => (StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, Flag::DownstreamProtocolError),
            Self::UriTooLong => (StatusCode::URI_TOO_LONG, Flag::DownstreamProtocolError),
            Self::UnknownCoding => (StatusCode::NOT_IMPLEMENTED, Flag::DownstreamProtocolError),
            Self::UpgradeRefused => (StatusCode::NOT_IMPLEMENTED, Flag::UpstreamProtocolError),
            Self::MethodRefused => (StatusCode::METHOD_NOT_ALLOWED, Flag::DownstreamProtocolError),
            Self::Unauthorized => (StatusCode::FORBIDDEN, Flag::Unauthorized),
            Self::DirectResponse(status) => (*status, Flag::DirectResponse),
            Self::FaultInjected(Abort::Http(status)) => (*status, Flag::FaultInjected),
            Self::FaultInjected(Abort::Grpc(code)) => return (StatusCode::OK, Flag::FaultInjected, *code),
            // 499 is nginx's for this; it is only ever logged.
            Self::ClientGone => {
                (StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST), Flag::DownstreamTermination)
            }
        };
        (status, flag, GrpcStatus::of_http(status))
    }

    /// Whether it is not certain where the next request on an HTTP/1 connection starts, which is closed then.
    #[must_use]
    pub fn ends_connection(&self) -> bool {
        match self {
            // What follows a CONNECT or an upgrade may be meant for the tunnel (draft-ietf-httpbis-optimistic-upgrade, 5.2).
            Self::MethodRefused
            | Self::UpgradeRefused
            | Self::RequestIdle
            | Self::BadRequest(..)
            | Self::HeadTooLarge
            | Self::UriTooLong
            | Self::UnknownCoding => true,
            Self::NoHealthyUpstream
            | Self::ConnectFailed
            | Self::Overflow
            | Self::UpstreamReset
            | Self::UpstreamTimeout
            | Self::UpstreamIdle
            | Self::UpstreamProtocol
            | Self::Overloaded
            | Self::NoRoute
            | Self::Unauthorized
            | Self::DirectResponse(_)
            | Self::FaultInjected(_)
            | Self::ClientGone => false,
        }
    }

    /// The whole answer. To gRPC it is trailers-only with status 200, so that the client sees our code and words
    /// (<https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>, Trailers-Only).
    #[must_use]
    pub fn response(&self, grpc: bool) -> Response<Bytes> {
        let (status, flag, code) = self.answer();
        let text = self.to_string();
        // What has no content is nobody's error page (RFC 9110, 15.3.5, 15.3.6 and 15.4.5).
        let empty =
            grpc || matches!(status, StatusCode::NO_CONTENT | StatusCode::RESET_CONTENT | StatusCode::NOT_MODIFIED);
        let body = if empty { Bytes::new() } else { Bytes::from(format!("{text}\n")) };
        let mut response = Response::new(body);
        let headers = response.headers_mut();
        headers.insert(FLAG_HEADER, HeaderValue::from_static(flag.name()));
        if grpc {
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            headers.insert("grpc-status", HeaderValue::from(u16::from(code.code())));
            // Our words are ASCII without '%', so they need none of gRPC's percent-encoding.
            if let Ok(message) = HeaderValue::from_str(&text) {
                headers.insert("grpc-message", message);
            }
        } else {
            if !empty {
                headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
            }
            if *self == Self::MethodRefused {
                // RFC 9110, 15.5.6: a 405 names what is allowed.
                let allowed = HeaderValue::from_static("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS");
                headers.insert(header::ALLOW, allowed);
            }
            *response.status_mut() = status;
        }
        response
    }
}

/// Whether a request is gRPC, by its content type. It is always a POST
/// (<https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>, Requests): of a GET with such a header no version is to answer for
/// that it has no `grpc-status`.
#[must_use]
pub fn is_grpc(method: &Method, headers: &HeaderMap) -> bool {
    *method == Method::POST
        && headers.get(header::CONTENT_TYPE).is_some_and(|value| {
            value
                .as_bytes()
                .strip_prefix(b"application/grpc")
                .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';' | b' ')))
        })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn each_cause_has_its_status_and_flag() {
        let table = [
            (Failure::NoHealthyUpstream, 503, "UH", "14"),
            (Failure::ConnectFailed, 503, "UF", "14"),
            (Failure::Overflow, 503, "UO", "14"),
            (Failure::UpstreamReset, 503, "UC", "14"),
            (Failure::UpstreamTimeout, 504, "UT", "14"),
            (Failure::UpstreamIdle, 504, "SI", "14"),
            (Failure::RequestIdle, 408, "SI", "2"),
            (Failure::UpstreamProtocol, 502, "UPE", "14"),
            (Failure::Overloaded, 503, "OM", "14"),
            (Failure::NoRoute, 404, "NR", "12"),
            (Failure::BadRequest(Refused::Host, "no host"), 400, "DPE", "13"),
            (Failure::HeadTooLarge, 431, "DPE", "2"),
            (Failure::UriTooLong, 414, "DPE", "2"),
            (Failure::UnknownCoding, 501, "DPE", "2"),
            (Failure::MethodRefused, 405, "DPE", "2"),
            (Failure::Unauthorized, 403, "UAEX", "7"),
            (Failure::DirectResponse(StatusCode::SERVICE_UNAVAILABLE), 503, "DR", "14"),
            (Failure::FaultInjected(Abort::Http(StatusCode::BAD_GATEWAY)), 502, "FI", "14"),
            (Failure::FaultInjected(Abort::Grpc(GrpcStatus::parse(b"8"))), 200, "FI", "8"),
        ];
        for (failure, status, flag, grpc) in table {
            let plain = failure.response(false);
            assert_eq!((plain.status().as_u16(), plain.headers()[FLAG_HEADER].to_str().unwrap()), (status, flag));
            let call = failure.response(true);
            assert_eq!((call.status(), call.headers()["grpc-status"].to_str().unwrap()), (StatusCode::OK, grpc));
            assert!(call.body().is_empty() && call.headers().contains_key("grpc-message"));
        }
    }

    #[test]
    fn grpc_is_told_by_its_content_type_but_grpc_web_is_not_grpc() {
        let table = [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("application/grpc;x=y", true),
            ("application/grpc-web", false),
            ("application/json", false),
        ];
        for (value, expected) in table {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(value));
            assert_eq!(is_grpc(&Method::POST, &headers), expected, "{value}");
            assert!(!is_grpc(&Method::GET, &headers), "{value}");
        }
    }
}
