//! What the data path serves: plain values, resolved when the configuration arrives, so that a request looks nothing
//! up by name. `config` makes a [`Snapshot`] from xDS resources; `workers` serve it.
//!
//! A snapshot is immutable. Parts that did not change between two snapshots are the *same* `Arc`s, so that the workers
//! keep the pools, load counters and metric series that hang on them.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use http::{HeaderName, HeaderValue, StatusCode};

use crate::metrics::GrpcStatus;

/// All listeners that should be open, by name.
#[derive(Debug, Default)]
pub struct Snapshot {
    pub listeners: BTreeMap<String, Arc<Listener>>,
}

/// One listening port. Its connections are told apart by SNI where it has more than one chain.
#[derive(Debug, PartialEq)]
pub struct Listener {
    pub name: String,
    pub address: SocketAddr,
    pub chains: Vec<FilterChain>,
}

#[derive(Debug, PartialEq)]
pub struct FilterChain {
    /// Exact SNI that selects this chain; `None` takes every connection.
    pub server_name: Option<String>,
    /// TLS of ours that the client must speak; `None` is plaintext.
    pub tls: Option<ServerTls>,
    pub protocol: Protocol,
}

/// TLS 1.3 with a required client certificate of our own CA.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ServerTls {
    /// The exact SPIFFE id that a client must have.
    pub client_id: String,
}

#[derive(Debug, PartialEq)]
pub enum Protocol {
    /// HTTP/1.1 or HTTP/2, by ALPN or by the connection preface (RFC 9113, 3.4).
    Http(Action),
    /// Bytes; the split is drawn once per connection.
    Tcp(Split),
}

#[derive(Debug, PartialEq)]
pub enum Action {
    Forward {
        split: Split,
        policy: Arc<Policy>,
    },
    /// Answer without an upstream, e.g. 503 where nothing serves.
    Respond(StatusCode),
}

/// How requests of a route are forwarded.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Policy {
    /// From the last byte of a request to the last byte of its answer, all tries included.
    pub timeout: Option<Duration>,
    pub retry: Option<RetryPolicy>,
    pub request_headers: HeaderChanges,
    /// Of answers of an upstream, not of our own.
    pub response_headers: HeaderChanges,
}

/// Which requests are sent again, although they may have been processed.
#[derive(Debug, Clone, PartialEq)]
pub struct RetryPolicy {
    /// Not empty.
    pub on: Vec<RetryOn>,
    /// After the first try.
    pub retries: u32,
    /// Of one try, from the last byte of the request to the first of the answer.
    pub per_try_timeout: Option<Duration>,
}

/// What is followed by another try (`RetryPolicy.retry_on`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RetryOn {
    /// `5xx`: any of these, or no answer.
    ServerError,
    /// `gateway-error`: 502, 503 or 504, or no answer.
    GatewayError,
    /// `reset`: no answer.
    Reset,
    /// `retriable-4xx`: 409.
    Conflict,
    /// A gRPC status in the head of the answer.
    Grpc(GrpcStatus),
}

/// Changes of a message's headers, in this order: what is removed, then what is set or added.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HeaderChanges {
    pub remove: Vec<HeaderName>,
    /// With `true`, beside what is there; else in its place.
    pub write: Vec<(HeaderName, HeaderValue, bool)>,
}

/// Clusters with their weights, out of the sum of all weights. A weight of 0 means never.
#[derive(Debug, PartialEq)]
pub struct Split {
    pub targets: Vec<(Arc<Cluster>, u32)>,
}

#[derive(Debug, PartialEq)]
pub struct Cluster {
    pub name: String,
    /// Labels of its metric series; `None` is not counted (a sidecar's local application).
    pub labels: Option<MetricLabels>,
    pub upstream: Upstream,
    /// Those of its endpoints that are preferred, because they are in this proxy's zone, sorted. Empty: all are alike.
    pub near: Vec<SocketAddr>,
    /// `None` is plaintext.
    pub tls: Option<ClientTls>,
    pub connect_timeout: Duration,
    pub traffic: TrafficPolicy,
}

/// What a cluster's endpoints are asked to bear. By default there are no limits.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TrafficPolicy {
    pub limits: Limits,
    pub connections: ConnectionPolicy,
    /// Which endpoints are left alone for what they answer. Those that cannot be reached are, whatever is said here.
    pub outliers: Option<Outliers>,
    pub slow_start: Option<SlowStart>,
}

/// How many of each a cluster may have at once in this process; `None` is any number (`CircuitBreakers.Thresholds`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    pub connections: Option<u32>,
    /// Requests that wait for an HTTP/1.1 connection, also for one that is being made.
    pub pending: Option<u32>,
    /// From the draw to the last byte of the answer.
    pub requests: Option<u32>,
    /// Requests that are being tried again because their route says so. `None` is the budget of `worker::retry`.
    pub retries: Option<u32>,
}

/// How long a connection to an upstream is used (`HttpProtocolOptions.common_http_protocol_options`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ConnectionPolicy {
    /// Kept for so long without a request. `None` is what suits the other side (`workers::Timing`).
    pub idle: Option<Duration>,
    /// No request begins on a connection that is older.
    pub age: Option<Duration>,
    /// Not 0.
    pub requests: Option<u32>,
}

/// When an endpoint is ejected for its answers, and for how long (`OutlierDetection`). Errors are counted in a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outliers {
    /// Of any 5xx.
    pub server_errors: Option<u32>,
    /// Of 502, 503 and 504.
    pub gateway_errors: Option<u32>,
    /// Of requests without an answer, if these are counted apart. If not they are gateway errors.
    pub no_answers: Option<u32>,
    pub no_answers_apart: bool,
    /// After each such time without an ejection the next one is shorter by `least`.
    pub interval: Duration,
    /// The first ejection. The next is twice as long, and so on.
    pub least: Duration,
    pub most: Duration,
    /// Per cent of the cluster's endpoints that may be ejected at once.
    pub most_ejected: u32,
    /// Per cent of endpoints that must be left; where fewer are, all are used.
    pub panic: f64,
}

/// What an endpoint gets that joins others: of what would be its share so much more the longer it is there
/// (`LeastRequestLbConfig.slow_start_config`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SlowStart {
    /// After which it is like the others. Not 0.
    pub window: Duration,
    /// What it begins with, from 0 to 1.
    pub least: f64,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MetricLabels {
    pub destination_namespace: String,
    pub destination_service: String,
    pub revision: String,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Upstream {
    /// Ready endpoints, sorted; possibly none.
    Endpoints(Vec<SocketAddr>),
    /// The address that the downstream connection was made to, at this port
    /// (`Cluster.OriginalDstLbConfig.upstream_port_override`).
    OriginalDst { port: u16 },
}

/// TLS 1.3 with our own certificate towards a proxy of ours.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ClientTls {
    pub sni: String,
    /// The exact SPIFFE id that the server must have.
    pub server_id: String,
}
