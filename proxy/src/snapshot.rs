//! What the data path serves: plain values, resolved when the configuration arrives, so that a request looks nothing
//! up by name. `config` makes a [`Snapshot`] from xDS resources; `workers` serve it.
//!
//! A snapshot is immutable. Parts that did not change between two snapshots are the *same* `Arc`s, so that the workers
//! keep the pools, load counters and metric series that hang on them.

use std::{collections::BTreeMap, net::SocketAddr, ops::Range, sync::Arc, time::Duration};

use http::{HeaderName, HeaderValue, StatusCode, uri::Authority};
use sluice_pattern::{Pattern, Piece};

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
    /// Most connections from clients at once, in this process. One more is closed as it comes.
    pub max_connections: Option<u64>,
}

#[derive(Debug, PartialEq)]
pub struct FilterChain {
    /// Exact SNI that selects this chain; `None` takes every connection.
    pub server_name: Option<String>,
    /// TLS of ours that the client must speak; `None` is plaintext.
    pub tls: Option<ServerTls>,
    pub protocol: Protocol,
    /// Streams of HTTP and tunnels (`HttpConnectionManager.stream_idle_timeout`), or connections of TCP (`TcpProxy.idle_timeout`), on
    /// which nothing has passed for so long are ended. Not 0.
    pub idle: Option<Duration>,
}

/// TLS 1.3 with a required client certificate of our own CA.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ServerTls {
    /// The exact SPIFFE id that a client must have.
    pub client_id: String,
}

#[derive(Debug, PartialEq)]
pub enum Protocol {
    /// HTTP/1.1 or HTTP/2, by ALPN or by the connection preface (RFC 9113, 3.4). A request takes the first route that
    /// matches.
    Http(Vec<Route>),
    /// Bytes; the split is drawn once per connection.
    Tcp(Split),
}

impl Protocol {
    /// The same for all requests.
    #[must_use]
    pub fn http(action: Action) -> Self {
        Self::Http(vec![Route { matches: RouteMatch::default(), action }])
    }

    /// Every split in it.
    pub fn splits(&self) -> impl Iterator<Item = &Split> {
        let (routes, split) = match self {
            Self::Http(routes) => (routes.as_slice(), None),
            Self::Tcp(split) => (&[][..], Some(split)),
        };
        let of_routes = routes.iter().filter_map(|route| match &route.action {
            Action::Forward { split, .. } => Some(split),
            Action::Respond(_) => None,
        });
        of_routes.chain(split)
    }
}

/// What is done with some requests.
#[derive(Debug, PartialEq)]
pub struct Route {
    pub matches: RouteMatch,
    pub action: Action,
}

/// Which requests a route is for: those of which all of this is so.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RouteMatch {
    /// Of the target, without its query.
    pub path: StringMatch,
    pub headers: Vec<HeaderMatch>,
    pub query: Vec<QueryMatch>,
}

impl RouteMatch {
    /// Whether it is for every request. `*`, the target of an OPTIONS for the server as a whole, is one of them.
    #[must_use]
    pub fn is_all(&self) -> bool {
        let any_path = matches!(&self.path.rule, StringRule::Prefix(prefix) if prefix.is_empty() || prefix == "/");
        any_path && self.headers.is_empty() && self.query.is_empty()
    }
}

#[derive(Debug, Clone, Default, PartialEq)]
pub struct StringMatch {
    pub rule: StringRule,
    /// Of ASCII. A regular expression says itself what it thinks of case.
    pub ignore_case: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub enum StringRule {
    Exact(String),
    Prefix(String),
    /// A path, or what is below it (`RouteMatch.path_separated_prefix`).
    SeparatedPrefix(String),
    Suffix(String),
    Contains(String),
    /// Of the whole text.
    Regex(Pattern),
}

impl Default for StringRule {
    fn default() -> Self {
        Self::Prefix("/".to_owned())
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct HeaderMatch {
    pub of: Field,
    pub rule: HeaderRule,
    /// Then no value may fit, else one must.
    pub invert: bool,
    /// Else nothing but [`HeaderRule::Present`] can hold without the header, inverted or not.
    pub missing_is_empty: bool,
}

/// What a [`HeaderMatch`] looks at.
#[derive(Debug, Clone, PartialEq)]
pub enum Field {
    Method,
    Authority,
    /// The target with its query.
    Path,
    Scheme,
    Header(HeaderName),
}

#[derive(Debug, Clone, PartialEq)]
pub enum HeaderRule {
    Present(bool),
    /// A decimal number.
    Range(Range<i64>),
    Text(StringMatch),
}

/// The first parameter of the name, as it is written.
#[derive(Debug, Clone, PartialEq)]
pub struct QueryMatch {
    pub name: String,
    pub rule: QueryRule,
}

#[derive(Debug, Clone, PartialEq)]
pub enum QueryRule {
    Present(bool),
    Text(StringMatch),
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
    /// In place of [`FilterChain::idle`] (`RouteAction.idle_timeout`); 0 is no limit.
    pub stream_idle: Option<Duration>,
    pub retry: Option<RetryPolicy>,
    pub request_headers: HeaderChanges,
    /// Of answers of an upstream, not of our own.
    pub response_headers: HeaderChanges,
    /// Takes place after the changes of headers.
    pub rewrite: Option<Rewrite>,
    pub cors: Option<CorsPolicy>,
    /// Who asks draws the cluster, in place of chance, as far as the request says who it is. Empty is chance.
    pub affinity: Vec<HashPolicy>,
    pub fault: Option<Fault>,
}

/// What goes wrong on purpose, to rehearse it (`HTTPFault`), each with its share of the requests: first the delay, then the answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Fault {
    /// Only of requests that meet all of these.
    pub headers: Vec<HeaderMatch>,
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

/// What a request is made to ask for.
#[derive(Debug, Clone, PartialEq)]
pub struct Rewrite {
    pub host: Option<HostRewrite>,
    pub path: Option<PathRewrite>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct HostRewrite {
    pub authority: Authority,
    /// The same, for HTTP/1.1.
    pub value: HeaderValue,
    /// Whether the host that the client asked for goes into `x-forwarded-host`.
    pub note_original: bool,
}

/// A new path; the query stays.
#[derive(Debug, Clone, PartialEq)]
pub enum PathRewrite {
    /// In place of the first so many bytes, which the route has matched.
    Prefix { matched: usize, with: String },
    /// In place of all of it.
    Whole(String),
    /// In place of each match, one after another.
    Regex { pattern: Pattern, with: Vec<Piece> },
}

/// Which other origins' scripts may read the answers of a route, and what they are told.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CorsPolicy {
    pub origins: Vec<StringMatch>,
    pub methods: Option<Asked>,
    pub headers: Option<Asked>,
    pub expose: Option<HeaderValue>,
    pub max_age: Option<HeaderValue>,
    pub credentials: bool,
    /// Whether the application answers preflights of other origins. Else they are answered here, without a permission.
    pub forward_others: bool,
}

/// What a preflight asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum Asked {
    /// All that it asks for.
    All,
    These(HeaderValue),
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
    /// Those of its endpoints that are preferred, because they are in this proxy's zone, sorted. Empty: all are alike.
    pub near: Vec<SocketAddr>,
    /// `None` is plaintext.
    pub tls: Option<ClientTls>,
    pub protocol: UpstreamProtocol,
    pub connect_timeout: Duration,
    pub traffic: TrafficPolicy,
}

/// The HTTP that a cluster's endpoints are spoken to with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum UpstreamProtocol {
    /// What the client speaks.
    #[default]
    Downstream,
    Http1,
    Http2,
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
