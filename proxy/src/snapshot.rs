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
    /// Who asks draws the cluster, in place of chance, as far as the request says who it is. Empty is chance.
    pub affinity: Vec<HashPolicy>,
    pub fault: Option<Fault>,
}

/// What goes wrong on purpose, to rehearse it (`HTTPFault`), each with its share of the requests: first the delay, then the answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Fault {
    pub delay: Option<(Duration, Share)>,
    pub abort: Option<(Abort, Share)>,
}

/// An answer in place of an upstream's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Abort {
    Http(StatusCode),
    /// A client that does not speak gRPC sees 200, as from Envoy.
    Grpc(GrpcStatus),
}

/// What says whose request it is (`RouteAction.HashPolicy`).
#[derive(Debug, Clone, PartialEq)]
pub struct HashPolicy {
    pub by: HashedBy,
    /// If the user is known by now, what follows is not looked at.
    pub terminal: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub enum HashedBy {
    Header(HeaderName),
    Cookie {
        name: String,
        /// A client without the cookie is given one. This is what follows its value in `Set-Cookie`.
        given: Option<String>,
    },
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
    /// Who gets copies of requests besides. Nobody does of the bytes of TCP.
    pub mirrors: Vec<Mirror<Arc<Cluster>>>,
}

impl Split {
    /// All that it names.
    pub fn clusters(&self) -> impl Iterator<Item = &Arc<Cluster>> {
        let targets = self.targets.iter().map(|(cluster, _)| cluster);
        targets.chain(self.mirrors.iter().map(|mirror| &mirror.cluster))
    }
}

/// Copies of requests, whose answers nobody sees (`RouteAction.RequestMirrorPolicy`).
#[derive(Debug, Clone, PartialEq)]
pub struct Mirror<C> {
    pub cluster: C,
    pub share: Share,
    /// Whether the host that a copy is for ends in `-shadow`, as Envoy has it.
    pub marks_host: bool,
}

/// A part of all requests, in millionths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Share(pub u32);

impl Share {
    pub const ALL: Self = Self(1_000_000);
    pub const NONE: Self = Self(0);

    /// Whether one request is of this part, by chance.
    #[must_use]
    pub fn draw(self) -> bool {
        self.0 > 0 && fastrand::u32(..Self::ALL.0) < self.0
    }
}

#[derive(Debug, PartialEq)]
pub struct Cluster {
    pub name: String,
    /// Labels of its metric series; `None` is not counted (a sidecar's local application).
    pub labels: Option<MetricLabels>,
    pub upstream: Upstream,
    /// `None` is plaintext.
    pub tls: Option<ClientTls>,
    pub connect_timeout: Duration,
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
