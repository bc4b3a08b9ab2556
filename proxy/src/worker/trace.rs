//! A request's trace, where tracing is on: whose child it is, what goes upstream of it, and its span, by OpenTelemetry's
//! conventions (<https://opentelemetry.io/docs/specs/semconv/http/http-spans/>).

use std::time::SystemTime;

use http::{HeaderMap, Method, StatusCode, Version, uri::Authority};
use opentelemetry::{
    KeyValue, Value,
    trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState},
};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};

use super::{connection::Connection, tally::Head};
use crate::{
    access_log::Outcome,
    excerpt::{Excerpt, LONGEST},
    snapshot::Cluster,
    trace::{Tracer, context::Received},
};

/// Values in a query that are secrets by their name (semantic conventions, `url.query`).
const SECRETS: [&str; 4] = ["AWSAccessKeyId", "Signature", "sig", "X-Goog-Signature"];

pub(super) struct Trace {
    received: Received,
    trace_id: TraceId,
    /// Of our own span; without one, the caller's.
    span_id: SpanId,
    sampled: bool,
    state: TraceState,
}

impl Trace {
    /// Reads the context of a request, or makes one. `None`: the caller wants no trace, and names none.
    pub(super) fn begin(tracer: &Tracer, headers: &HeaderMap) -> Option<Box<Self>> {
        let received = Received::read(headers);
        if received.parent.is_none() && received.sampled == Some(false) {
            return None;
        }
        let trace_id = received.parent.map_or_else(|| TraceId::from(fastrand::u128(1..)), |parent| parent.trace_id);
        let sampled = received.sampled.unwrap_or_else(|| tracer.draw(trace_id));
        let span_id = match received.parent {
            Some(parent) if !sampled => parent.span_id,
            Some(_) | None => SpanId::from(fastrand::u64(1..)),
        };
        let state = if sampled { state(&received, headers) } else { TraceState::default() };
        Some(Box::new(Self { received, trace_id, span_id, sampled, state }))
    }

    pub(super) fn id(&self) -> String {
        self.trace_id.to_string()
    }

    pub(super) fn is_sampled(&self) -> bool {
        self.sampled
    }

    /// Tells the upstream. What the caller does not want recorded passes as it came.
    pub(super) fn pass_on(&self, headers: &mut HeaderMap) {
        if self.sampled || self.received.sampled.is_none() {
            self.received.write(headers, self.trace_id, self.span_id, self.sampled);
        }
    }

    /// The span of a request that has ended.
    pub(super) fn span(&self, tracer: &Tracer, connection: &Connection, head: &Head, end: &End<'_>) -> SpanData {
        let context = SpanContext::new(self.trace_id, self.span_id, TraceFlags::SAMPLED, false, self.state.clone());
        let start_time = SystemTime::from(head.time);
        let error = end.error();
        SpanData {
            span_context: context,
            parent_span_id: self.received.parent.map_or(SpanId::INVALID, |parent| parent.span_id),
            parent_span_is_remote: self.received.parent.is_some(),
            span_kind: SpanKind::Server,
            // A path is no name: there are as many as clients think of.
            name: known(&head.method).unwrap_or("HTTP").into(),
            start_time,
            end_time: start_time + end.outcome.duration,
            status: if error.is_some() { Status::error("") } else { Status::Unset },
            attributes: attributes(connection, head, end, error),
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            instrumentation_scope: tracer.scope(),
        }
    }
}

/// What a span says of `tracestate`. One that is too long for it cannot be cut with a mark, and is left out; upstream gets it as it came.
fn state(received: &Received, headers: &HeaderMap) -> TraceState {
    let state = received.state(headers).join(",");
    if state.len() > LONGEST { TraceState::default() } else { state.parse().unwrap_or_default() }
}

/// How a request ended.
pub(super) struct End<'a> {
    pub(super) outcome: Outcome,
    /// `None`: the client went without one.
    pub(super) status: Option<StatusCode>,
    pub(super) grpc: bool,
    /// The client did not get all of it.
    pub(super) aborted: bool,
    pub(super) attempts: u32,
    pub(super) cluster: Option<&'a Cluster>,
}

impl End<'_> {
    /// `error.type`, if it was one.
    fn error(&self) -> Option<Value> {
        let grpc = self.outcome.grpc_status.filter(|_| self.grpc);
        if let Some(status) = self.status.filter(|status| status.as_u16() >= 500) {
            return Some(Value::from(status.as_str().to_owned()));
        }
        if let Some(status) = grpc.filter(|status| status.is_bad()) {
            return Some(Value::from(status.name()));
        }
        let flag = self.outcome.flag.filter(|_| self.aborted)?;
        Some(Value::from(flag.name()))
    }
}

fn attributes(connection: &Connection, head: &Head, end: &End<'_>, error: Option<Value>) -> Vec<KeyValue> {
    let mut attributes = Vec::with_capacity(24);
    let mut say = |name: &'static str, value: Value| attributes.push(KeyValue::new(name, value));
    match known(&head.method) {
        Some(name) => say("http.request.method", name.into()),
        None => {
            say("http.request.method", "_OTHER".into());
            say("http.request.method_original", Excerpt::of(head.method.as_str()).into());
        }
    }
    say("url.scheme", head.scheme.into());
    say("url.path", Excerpt::of(head.uri.path()).into());
    if let Some(query) = head.uri.query() {
        say("url.query", Excerpt::of(&redacted(query)).into());
    }
    if let Ok(authority) = head.authority().parse::<Authority>() {
        say("server.address", Excerpt::of(authority.host()).into());
        if let Some(port) = authority.port_u16() {
            say("server.port", i64::from(port).into());
        }
    }
    say("network.protocol.version", version(head.version).into());
    let peer = connection.peer;
    say("client.address", peer.ip().to_string().into());
    say("network.peer.address", peer.ip().to_string().into());
    say("network.peer.port", i64::from(peer.port()).into());
    let agent = head.user_agent();
    if !agent.is_empty() {
        say("user_agent.original", Excerpt::of(agent).into());
    }
    if let Some(status) = end.status {
        say("http.response.status_code", i64::from(status.as_u16()).into());
    }
    if end.grpc {
        say("rpc.system.name", "grpc".into());
        say("rpc.method", Excerpt::of(head.uri.path().trim_start_matches('/')).into());
        if let Some(status) = end.outcome.grpc_status {
            say("rpc.response.status_code", status.name().into());
        }
    }
    if let Some(error) = error {
        say("error.type", error);
    }
    if let Some(cluster) = end.cluster {
        say("sluice.cluster", cluster.name.clone().into());
        if let Some(labels) = &cluster.labels {
            say("sluice.destination.namespace", labels.destination_namespace.clone().into());
            say("sluice.destination.service", labels.destination_service.clone().into());
            say("sluice.destination.revision", labels.revision.clone().into());
        }
    }
    if let Some(flag) = end.outcome.flag {
        say("sluice.response_flag", flag.name().into());
    }
    say("sluice.attempts", i64::from(end.attempts).into());
    if let Some(upstream) = head.upstream {
        say("sluice.upstream.address", upstream.to_string().into());
    }
    attributes
}

/// The methods of RFC 9110 and PATCH. What else a client sends must not become a name.
fn known(method: &Method) -> Option<&'static str> {
    let known = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "CONNECT", "TRACE"];
    known.into_iter().find(|name| *name == method.as_str())
}

fn version(version: Version) -> &'static str {
    match version {
        Version::HTTP_10 => "1.0",
        Version::HTTP_2 => "2",
        _ => "1.1",
    }
}

/// Without secrets. What an excerpt would leave out is not looked at.
fn redacted(query: &str) -> String {
    let mut said = String::with_capacity(query.len().min(LONGEST));
    for (index, pair) in query.split('&').enumerate() {
        if said.len() > LONGEST {
            break;
        }
        if index > 0 {
            said.push('&');
        }
        match pair.split_once('=') {
            Some((name, _)) if SECRETS.contains(&name) => {
                said.push_str(name);
                said.push_str("=REDACTED");
            }
            Some(_) | None => said.push_str(pair),
        }
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_loses_its_secrets_and_what_no_excerpt_has() {
        assert_eq!(redacted("sig=a&b&&c=d=e&Signature=f"), "sig=REDACTED&b&&c=d=e&Signature=REDACTED");
        let long = redacted(&"sig=a&".repeat(10_000));
        assert!(long.len() <= LONGEST + "&sig=REDACTED".len() && !long.contains("=a"), "{} bytes", long.len());
    }
}
