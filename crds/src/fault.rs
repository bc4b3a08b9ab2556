//! `spec.service.fault`: what goes wrong on purpose, in the words of Istio's `HTTPFaultInjection`.

use std::collections::BTreeMap;

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{duration, matching::StringMatch};

/// Goes wrong on purpose, to rehearse it: first the delay, then the answer, each by its own chance, before a version is drawn. Counts
/// against no version.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.delay) || has(self.abort)").message("spec.service.fault: say delay or abort"),
    validation = Rule::new("!has(self.headers) || self.headers.all(name, name.matches('^[A-Za-z0-9!#$&*+.^_|~-]{1,128}$'))").message("spec.service.fault.headers takes names of headers")
)]
pub struct Fault {
    /// Only requests that have all of these headers. `{}` is met by any value. Without it, all requests.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 8))]
    pub headers: BTreeMap<String, StringMatch>,
    /// Holds requests up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delay: Option<FaultDelay>,
    /// Answers in place of the application.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub abort: Option<FaultAbort>,
}

/// Requests that are held up, and for how long.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.fixedDelay) && duration(self.fixedDelay) >= duration('1ms') && duration(self.fixedDelay) <= duration('1h')").message("spec.service.fault.delay.fixedDelay: from 1ms to 1h"),
    validation = Rule::new("has(self.percentage) && !has(self.percent) && !has(self.exponentialDelay)").message("spec.service.fault.delay: say percentage: {value: 10} and fixedDelay; percent and exponentialDelay are not supported")
)]
pub struct FaultDelay {
    /// How many of the requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub percentage: Option<Percentage>,
    /// For how long, from 1 ms to 1 h: `5s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), regex(pattern = duration::PATTERN))]
    pub fixed_delay: Option<String>,
    /// Deprecated in Istio; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub percent: Option<i32>,
    /// Not supported; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub exponential_delay: Option<String>,
}

/// Requests that are answered by the fleet, and with what.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.httpStatus) != has(self.grpcStatus) && !has(self.http2Error)").message("spec.service.fault.abort: say either httpStatus or grpcStatus; http2Error is not supported"),
    validation = Rule::new("has(self.percentage) && !has(self.percent)").message("spec.service.fault.abort: say percentage: {value: 10}; percent is not supported")
)]
pub struct FaultAbort {
    /// How many of the requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub percentage: Option<Percentage>,
    /// Status of HTTP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 200, max = 599))]
    pub http_status: Option<i32>,
    /// Status of gRPC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grpc_status: Option<GrpcStatus>,
    /// Not supported; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub http2_error: Option<String>,
    /// Deprecated in Istio; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub percent: Option<i32>,
}

/// A part of the requests.
// By a rule: the API server compares a whole number with the whole part of a minimum.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[x_kube(validation = Rule::new("self.value >= 0.0001 && self.value <= 100.0").message("spec.service.fault: percentage.value: from 0.0001 to 100"))]
pub struct Percentage {
    /// In percent, from 0.0001 to 100.
    pub value: f64,
}

/// Canonical codes of gRPC by name (<https://grpc.github.io/grpc/core/md_doc_statuscodes.html>), in the order of their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[repr(u8)]
pub enum GrpcStatus {
    Ok,
    Cancelled,
    Unknown,
    InvalidArgument,
    DeadlineExceeded,
    NotFound,
    AlreadyExists,
    PermissionDenied,
    ResourceExhausted,
    FailedPrecondition,
    Aborted,
    OutOfRange,
    Unimplemented,
    Internal,
    Unavailable,
    DataLoss,
    Unauthenticated,
}

impl GrpcStatus {
    #[must_use]
    pub fn code(self) -> u32 {
        u32::from(self as u8)
    }
}

impl Fault {
    /// In words, for people who wonder about answers that they see.
    #[must_use]
    pub fn in_words(&self) -> String {
        let percent = |of: Option<Percentage>| of.map_or(0.0, |percentage| percentage.value);
        let delay = self.delay.as_ref().map(|delay| {
            let by = delay.fixed_delay.as_deref().unwrap_or_default();
            format!("holds {} percent up for {by}", percent(delay.percentage))
        });
        let abort = self.abort.as_ref().map(|abort| {
            let with = match (abort.http_status, abort.grpc_status) {
                (Some(status), _) => status.to_string(),
                (None, Some(status)) => format!("gRPC status {}", status.code()),
                (None, None) => String::new(),
            };
            format!("answers {} percent with {with}", percent(abort.percentage))
        });
        let what: Vec<String> = delay.into_iter().chain(abort).collect();
        let headers: Vec<&str> = self.headers.keys().map(String::as_str).collect();
        let of = if headers.is_empty() {
            String::new()
        } else {
            format!(" of the requests that match {}", headers.join(", "))
        };
        format!("the fleet {}{of}", what.join(" and "))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;

    #[test]
    fn a_fault_says_what_it_does_to_whom() {
        for (said, words) in [
            (
                json!({"abort": {"percentage": {"value": 0.5}, "httpStatus": 503}}),
                "the fleet answers 0.5 percent with 503",
            ),
            (
                json!({
                    "headers": {"x-a": {}, "x-b": {"exact": "c"}},
                    "delay": {"percentage": {"value": 10}, "fixedDelay": "2s"},
                    "abort": {"percentage": {"value": 100}, "grpcStatus": "UNAVAILABLE"},
                }),
                "the fleet holds 10 percent up for 2s and answers 100 percent with gRPC status 14 of the requests that match x-a, x-b",
            ),
        ] {
            let fault: Fault = serde_json::from_value(said).unwrap();
            assert_eq!(fault.in_words(), words);
        }
    }

    #[test]
    fn codes_of_grpc_have_their_numbers() {
        for (name, code) in [("OK", 0), ("DEADLINE_EXCEEDED", 4), ("UNIMPLEMENTED", 12), ("UNAUTHENTICATED", 16)] {
            assert_eq!(serde_json::from_value::<GrpcStatus>(json!(name)).unwrap().code(), code);
        }
    }
}
