//! What the load generator says, a line of JSON each: read by the demo and the end-to-end tests.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

/// Requests of the same kind and outcome that ended within [`BUCKET_MS`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bucket {
    /// When the first and the last of them ended, Unix milliseconds.
    pub first_ms: u64,
    pub last_ms: u64,
    /// `new` connection for each request, `kept` connection, `grpc`; [`STREAM`], [`WEBSOCKET`], [`RESENT`], [`CUT`].
    pub kind: String,
    /// What the header `x-version` (or the reply) said; empty where nothing answered.
    pub version: String,
    /// HTTP status, or for gRPC 200 and the failure; 0 where nothing answered.
    pub status: u16,
    /// Why a request failed without an answer, or the flag of a proxy's own answer.
    pub error: String,
    pub count: u64,
    /// Of these, those that took longer than the limit (`--slow-ms`).
    pub slow: u64,
    pub max_ms: u64,
}

/// Kind of a message of a gRPC stream, and of the stream where it broke off.
pub const STREAM: &str = "stream";

/// Kind of an echo on a WebSocket, and of the WebSocket where it broke off.
pub const WEBSOCKET: &str = "ws";

/// Kind of a request that was sent again on another connection, because a kept one was closed before it left, or, for a GET, instead
/// of an answer. It counts once more by what became of it.
pub const RESENT: &str = "resent";

/// Kind of a POST whose kept connection was closed instead of an answer. Whoever closes an idle connection may meet a request that is
/// on its way, and no client can know whether that may be sent again (RFC 9110, 9.2.2).
pub const CUT: &str = "cut";

/// Granularity of [`Bucket`]s.
pub const BUCKET_MS: u64 = 50;

impl Bucket {
    /// The application itself answered, well or badly.
    #[must_use]
    pub fn answered_by_application(&self) -> bool {
        !self.version.is_empty()
    }

    /// Neither answered well nor by a version of the application. [`CUT`] is counted apart: it depends on whose connection it was.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.kind != RESENT
            && self.kind != CUT
            && (!self.answered_by_application() || (self.status >= 400 && self.status < 500))
    }

    /// Lost with the connection that it was on: no client can know whether it may begin again.
    #[must_use]
    pub fn ended_with_its_connection(&self) -> bool {
        self.kind == CUT || (self.failed() && (self.kind == STREAM || self.kind == WEBSOCKET))
    }
}
