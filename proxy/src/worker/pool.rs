//! Connections to one endpoint, kept and shared by one worker thread: HTTP/1 one request at a time, HTTP/2 many.
//!
//! Requests in, answers out: how it is done (`http1::client`, `http2::client`) is not seen outside, so that it can be exchanged.

use std::{
    cell::{Cell, RefCell},
    io,
    net::SocketAddr,
    rc::Rc,
    time::Duration,
};

use futures::{FutureExt, channel::oneshot, future::Shared as SharedFuture};
use http::{Request, Response};
use rustls::pki_types::ServerName;
use tokio::{
    net::TcpStream,
    time::{Instant, timeout},
};
use tokio_rustls::TlsConnector;

use super::{
    Shared,
    body::{RequestBody, UpstreamBody},
    headers::Peer,
    health::Health,
    http1::{
        self,
        client::{self, NoAnswer},
    },
    http2,
    load::{Admitted, Connections, Load, Opened},
    socket::{Socket, UPSTREAM_QUIET, prepare_socket},
    stream::Stream,
};
use crate::{
    failure::Failure,
    snapshot::{self, ConnectionPolicy},
    tls::{ALPN_H2, ALPN_HTTP1},
};

/// Idle HTTP/1 connections kept per endpoint and thread; more are closed.
const MAX_IDLE: usize = 1024;
/// Requests on one HTTP/2 connection before another is opened, if the server takes as many (RFC 9113, 6.5.2).
pub(super) const MAX_STREAMS: u32 = 100;

#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    #[error("connecting to {0} failed: {1}")]
    Tcp(SocketAddr, #[source] io::Error),
    #[error("connecting to {0} took longer than {1:?}")]
    TcpTimeout(SocketAddr, Duration),
    #[error("the TLS handshake with {0} failed: {1}")]
    Tls(SocketAddr, #[source] io::Error),
    #[error("the TLS handshake with {0} took longer than {1:?}")]
    TlsTimeout(SocketAddr, Duration),
    #[error("{0} does not speak {1} (ALPN)")]
    Protocol(SocketAddr, &'static str),
    #[error("{1:?} cannot be sent as SNI to {0}; a name must not end in digits only")]
    ServerName(SocketAddr, String),
    #[error("{0} closed the new connection before a request: {1}")]
    Http(SocketAddr, #[source] UpstreamError),
    #[error("{0}")]
    Together(Rc<ConnectError>),
    #[error("connecting to {0} was given up")]
    GivenUp(SocketAddr),
}

/// What is spoken on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wire {
    Http1,
    Http2,
    Tcp,
}

/// How the endpoints of a cluster are connected to.
pub(super) struct Connector {
    tls: Option<(Result<ServerName<'static>, String>, TlsConnector)>,
    connect_timeout: Duration,
    handshake_timeout: Duration,
    http1_idle: Duration,
    http2_idle: Duration,
}

impl Connector {
    pub(super) fn new(config: &snapshot::Cluster, worker: &Shared) -> Self {
        let tls = config.tls.as_ref().map(|tls| {
            let name = ServerName::try_from(tls.sni.clone()).map_err(|_| tls.sni.clone());
            (name, TlsConnector::from(worker.identity.client_config(&tls.server_id, &[])))
        });
        let timing = &worker.timing;
        let idle = config.traffic.connections.idle;
        // Our own servers never close an idle connection; those of applications do, commonly after 2 to 5 s, and a
        // request that meets the close is lost.
        let http1_idle = if tls.is_some() { timing.own_hop_idle } else { timing.application_idle };
        Self {
            tls,
            connect_timeout: config.connect_timeout,
            handshake_timeout: timing.tls_handshake,
            http1_idle: idle.unwrap_or(http1_idle),
            // An HTTP/2 server says which requests it no longer takes (GOAWAY), so that these can be sent again.
            http2_idle: idle.unwrap_or(timing.own_hop_idle),
        }
    }

    /// A new connection, TLS included.
    pub(super) async fn connect(
        &self,
        address: SocketAddr,
        wire: Wire,
        opened: Opened,
    ) -> Result<Stream, ConnectError> {
        let tcp = match timeout(self.connect_timeout, TcpStream::connect(address)).await {
            Ok(Ok(tcp)) => tcp,
            Ok(Err(error)) => return Err(ConnectError::Tcp(address, error)),
            Err(_) => return Err(ConnectError::TcpTimeout(address, self.connect_timeout)),
        };
        prepare_socket(&tcp, UPSTREAM_QUIET);
        let Some((name, connector)) = &self.tls else {
            return Ok(Stream::plain_client(tcp, opened));
        };
        let name = name.clone().map_err(|name| ConnectError::ServerName(address, name))?;
        let alpn = match wire {
            Wire::Http1 => Some((ALPN_HTTP1, "HTTP/1.1")),
            Wire::Http2 => Some((ALPN_H2, "HTTP/2")),
            Wire::Tcp => None,
        };
        let offered = alpn.iter().map(|(protocol, _)| protocol.to_vec()).collect();
        let handshake = connector.with_alpn(offered).connect(name, Socket::new(tcp));
        let stream = match timeout(self.handshake_timeout, handshake).await {
            Ok(Ok(stream)) => Stream::client(stream, opened),
            Ok(Err(error)) => return Err(ConnectError::Tls(address, error)),
            Err(_) => return Err(ConnectError::TlsTimeout(address, self.handshake_timeout)),
        };
        match alpn {
            Some((protocol, name)) if stream.alpn() != Some(protocol) => Err(ConnectError::Protocol(address, name)),
            Some(_) | None => Ok(stream),
        }
    }

    async fn http1(&self, address: SocketAddr, opened: Opened) -> Result<client::Connection, ConnectError> {
        Ok(client::Connection::new(self.connect(address, Wire::Http1, opened).await?, self.upstream()))
    }

    async fn http2(
        &self,
        address: SocketAddr,
        opened: Opened,
        more: impl Fn() + 'static,
    ) -> Result<http2::client::Connection, ConnectError> {
        let stream = self.connect(address, Wire::Http2, opened).await?;
        let connection = http2::client::Connection::new(stream, self.upstream(), more).await;
        connection.map_err(|error| ConnectError::Http(address, error.into()))
    }

    /// Only proxies of ours are spoken to in TLS.
    fn upstream(&self) -> Peer {
        if self.tls.is_some() { Peer::Ours } else { Peer::Anybody }
    }
}

/// One address of a cluster, with its load and its connections.
pub(super) struct Endpoint {
    pub(super) address: SocketAddr,
    /// Since when it is there, while it gets less than others for it.
    pub(super) joined: Cell<Option<Instant>>,
    outstanding: Cell<u32>,
    pub(super) health: Health,
    /// No longer configured: nothing is kept for it.
    retired: Cell<bool>,
    pub(super) connections: Rc<Connections>,
    policy: Cell<ConnectionPolicy>,
    idle: RefCell<Vec<Idle>>,
    shared: RefCell<Vec<Rc<Multiplexed>>>,
    /// The HTTP/2 connection being made, for all who wait for it: a burst of first requests opens one, not hundreds.
    opening: RefCell<Option<Opening>>,
}

type Opening = SharedFuture<oneshot::Receiver<Result<Rc<Multiplexed>, Rc<ConnectError>>>>;

struct Idle {
    connection: client::Connection,
    since: Instant,
}

impl Idle {
    fn is_usable(&self, connector: &Connector, policy: ConnectionPolicy, now: Instant) -> bool {
        now.duration_since(self.since) < connector.http1_idle
            && !self.connection.life().is_over(policy, now)
            && self.connection.is_usable()
    }
}

struct Multiplexed {
    /// Who waits for a stream of it.
    of: Rc<Connections>,
    connection: http2::client::Connection,
    streams: Cell<u32>,
    since: Cell<Instant>,
    life: Cell<Life>,
}

impl Multiplexed {
    /// Whether it takes another request.
    fn is_usable(&self, policy: ConnectionPolicy, now: Instant) -> bool {
        !self.connection.is_over() && !self.life.get().is_over(policy, now)
    }

    /// How many requests the server takes at once; where it takes none yet, it is asked with one.
    fn most_streams(&self) -> u32 {
        u32::try_from(self.connection.most_streams()).unwrap_or(u32::MAX).max(1)
    }
}

/// A connection for another request of HTTP/2.
enum Share {
    Free(Rc<Multiplexed>),
    /// There may be no more of them, and those that are there have as many requests as their servers take.
    Full,
    None,
}

/// What a connection has behind it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Life {
    begun: Instant,
    requests: u32,
}

impl Life {
    pub(super) fn begin() -> Self {
        Self { begun: Instant::now(), requests: 0 }
    }

    pub(super) fn request(&mut self) {
        self.requests = self.requests.saturating_add(1);
    }

    fn is_over(self, policy: ConnectionPolicy, now: Instant) -> bool {
        policy.requests.is_some_and(|most| self.requests >= most)
            || policy.age.is_some_and(|age| now.duration_since(self.begun) >= age)
    }
}

/// Why a request got no answer from this endpoint.
pub(super) enum SendError {
    /// Not sent: no connection could be made.
    Connect { request: Box<Request<RequestBody>>, error: ConnectError },
    /// Not sent: too many wait for a connection.
    Overflow { request: Box<Request<RequestBody>> },
    /// The connection turned out to be closed. Not sent, or without a byte of an answer and may be sent twice.
    Stale { request: Box<Request<RequestBody>> },
    /// Sent, and certainly not processed: refused by the other side.
    Refused { error: UpstreamError },
    /// Sent, and possibly processed.
    Lost { error: UpstreamError },
}

/// What went wrong on a connection to an upstream.
#[derive(Debug, thiserror::Error)]
pub(super) enum UpstreamError {
    #[error(transparent)]
    Http1(#[from] http1::Error),
    #[error(transparent)]
    Http2(#[from] http2::Error),
}

impl UpstreamError {
    /// Whether the body that we pass on is at fault.
    pub(super) fn is_of_client(&self) -> bool {
        matches!(
            self,
            Self::Http1(http1::Error::Client(_) | http1::Error::Length) | Self::Http2(http2::Error::Client(_))
        )
    }

    /// What a request without an answer is to be told, and counted as.
    pub(super) fn failure(&self) -> Failure {
        match self {
            Self::Http1(http1::Error::Client(error)) => error.failure(),
            Self::Http1(http1::Error::Length) => Failure::ClientGone,
            Self::Http1(http1::Error::Malformed(_)) => Failure::UpstreamProtocol,
            Self::Http1(http1::Error::Io(_) | http1::Error::Closed) => Failure::UpstreamReset,
            Self::Http2(http2::Error::Client(error)) => error.failure(),
            Self::Http2(http2::Error::Stream(error)) if error.is_library() => Failure::UpstreamProtocol,
            Self::Http2(http2::Error::Stream(_)) => Failure::UpstreamReset,
        }
    }
}

/// Counts a request (or a TCP connection) as outstanding until dropped.
pub(super) struct Outstanding(Rc<Endpoint>);

impl Outstanding {
    pub(super) fn on(endpoint: &Rc<Endpoint>) -> Self {
        endpoint.outstanding.set(endpoint.outstanding.get() + 1);
        Self(Rc::clone(endpoint))
    }
}

impl Drop for Outstanding {
    fn drop(&mut self) {
        self.0.outstanding.set(self.0.outstanding.get() - 1);
    }
}

/// What an answer occupies while it is read. Dropped early, the request is given up: HTTP/1 closes the connection,
/// HTTP/2 resets the stream.
pub(super) struct Lease {
    outstanding: Outstanding,
    _connection: Leased,
    _admitted: Option<Admitted>,
}

enum Leased {
    /// The answer's body has it.
    Http1,
    Http2 {
        _stream: StreamCount,
    },
}

/// A stream on a shared connection, until dropped.
struct StreamCount(Rc<Multiplexed>);

impl StreamCount {
    fn on(connection: &Rc<Multiplexed>) -> Self {
        connection.streams.set(connection.streams.get() + 1);
        let mut life = connection.life.get();
        life.request();
        connection.life.set(life);
        Self(Rc::clone(connection))
    }
}

impl Drop for StreamCount {
    fn drop(&mut self) {
        self.0.streams.set(self.0.streams.get() - 1);
        if self.0.streams.get() == 0 {
            self.0.since.set(Instant::now());
        }
        self.0.of.streams.free();
    }
}

impl Lease {
    fn new(outstanding: Outstanding, connection: Leased) -> Self {
        Self { outstanding, _connection: connection, _admitted: None }
    }

    /// Also counts among the requests of its cluster.
    pub(super) fn admitted(self, admitted: Option<Admitted>) -> Self {
        Self { _admitted: admitted, ..self }
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.outstanding.0.address
    }

    /// The answer was read to its end: the connection may serve another request.
    pub(super) fn release(self, body: UpstreamBody, now: Instant) {
        match body {
            UpstreamBody::Http1(body) => {
                if let Some(connection) = body.release() {
                    self.outstanding.0.keep(connection, now);
                }
            }
            UpstreamBody::Http2(_) => {} // Of the connection it has a stream only.
        }
    }
}

impl Endpoint {
    pub(super) fn new(address: SocketAddr, load: &Rc<Load>) -> Rc<Self> {
        Rc::new(Self {
            address,
            joined: Cell::default(),
            outstanding: Cell::new(0),
            health: Health::default(),
            retired: Cell::new(false),
            connections: Connections::of(load),
            policy: Cell::default(),
            idle: RefCell::default(),
            shared: RefCell::default(),
            opening: RefCell::default(),
        })
    }

    /// How its connections are used from now on.
    pub(super) fn limit(&self, policy: ConnectionPolicy) {
        self.policy.set(policy);
    }

    pub(super) fn outstanding(&self) -> u32 {
        self.outstanding.get()
    }

    /// Closes what is idle; requests in flight end as usual, on connections that are not kept afterwards.
    pub(super) fn retire(&self) {
        self.retired.set(true);
        for idle in self.idle.take() {
            idle.connection.close();
        }
        self.shared.borrow_mut().clear();
    }

    /// Closes connections that have been idle for too long, and forgets closed ones.
    pub(super) fn sweep(&self, connector: &Connector, now: Instant) {
        let policy = self.policy.get();
        for old in self.idle.borrow_mut().extract_if(.., |idle| !idle.is_usable(connector, policy, now)) {
            old.connection.close();
        }
        self.shared.borrow_mut().retain(|connection| {
            let in_use = connection.streams.get() > 0;
            connection.is_usable(policy, now)
                && (in_use || now.duration_since(connection.since.get()) < connector.http2_idle)
        });
        // What another endpoint of the cluster has given back nobody here was told of, and who was told may have gone away.
        if !self.connections.are_full() {
            self.connections.queue.free();
        }
        self.free_streams(now);
    }

    /// Tells the first who waits for a stream, if there is one, or a connection more for it.
    fn free_streams(&self, now: Instant) {
        if !self.connections.streams.is_empty() && !matches!(self.share(now), Share::Full) {
            self.connections.streams.free();
        }
    }

    fn keep(&self, connection: client::Connection, now: Instant) {
        let mut idle = self.idle.borrow_mut();
        let is_over = connection.life().is_over(self.policy.get(), now);
        if !self.retired.get() && idle.len() < MAX_IDLE && !is_over {
            idle.push(Idle { connection, since: now });
            self.connections.queue.free();
        } else {
            connection.close();
        }
    }

    /// The connection used last, as the others may then grow old and be closed.
    fn take(&self, connector: &Connector, now: Instant) -> Option<client::Connection> {
        let policy = self.policy.get();
        let mut idle = self.idle.borrow_mut();
        while let Some(candidate) = idle.pop() {
            if candidate.is_usable(connector, policy, now) {
                return Some(candidate.connection);
            }
            candidate.connection.close();
        }
        None
    }

    /// Sends a request and waits for the head of its answer. With `fresh`, not on a kept HTTP/1 connection.
    pub(super) async fn send(
        self: &Rc<Self>,
        connector: &Rc<Connector>,
        wire: Wire,
        request: Request<RequestBody>,
        fresh: bool,
        now: Instant,
    ) -> Result<(Response<UpstreamBody>, Lease), SendError> {
        let outstanding = Outstanding::on(self);
        if wire == Wire::Http2 {
            return self.send_http2(connector, request, outstanding, now).await;
        }
        // Whoever waits for one comes first.
        let kept = if fresh || !self.connections.queue.is_empty() { None } else { self.take(connector, now) };
        let (connection, reused) = match kept {
            Some(connection) => (connection, true),
            None => {
                let Some(_pending) = self.connections.load().wait() else {
                    return Err(SendError::Overflow { request: Box::new(request) });
                };
                // In a box, as it is rare and large: every connection has space for what its requests may wait for.
                match Box::pin(self.http1(connector)).await {
                    Ok(connection) => connection,
                    Err(error) => {
                        return Err(SendError::Connect { request: Box::new(request), error });
                    }
                }
            }
        };
        // A proxy of ours says before it closes a connection; an application that stops or was idle may not. Once is enough.
        let again = !fresh && connector.tls.is_none();
        match connection.send(request, again).await {
            Ok(response) => Ok((response.map(UpstreamBody::Http1), Lease::new(outstanding, Leased::Http1))),
            Err(NoAnswer::Unsent { request, .. }) if reused => Err(SendError::Stale { request }),
            // On a new one, only a reset says that it was hardly read: what ends in order may have ended by this request.
            Err(NoAnswer::Silent { request, error }) if reused || error.is_reset() => Err(SendError::Stale { request }),
            Err(NoAnswer::Unsent { request, error }) => {
                Err(SendError::Connect { request, error: ConnectError::Http(self.address, error.into()) })
            }
            Err(NoAnswer::Silent { error, .. } | NoAnswer::Sent(error)) => Err(unanswered(error.into())),
        }
    }

    /// A connection that was not at hand, and whether it was used before: a new one, or where there may be no more of them the
    /// next that is free. How long that takes is a matter of the requests that have them, and of the route's timeout.
    async fn http1(&self, connector: &Connector) -> Result<(client::Connection, bool), ConnectError> {
        loop {
            if let Some(opened) = self.connections.another() {
                return Ok((connector.http1(self.address, opened).await?, false));
            }
            if self.connections.queue.is_empty()
                && let Some(kept) = self.take(connector, Instant::now())
            {
                return Ok((kept, true));
            }
            self.connections.queue.freed().await;
            if let Some(kept) = self.take(connector, Instant::now()) {
                return Ok((kept, true));
            }
        }
    }

    async fn send_http2(
        self: &Rc<Self>,
        connector: &Rc<Connector>,
        request: Request<RequestBody>,
        outstanding: Outstanding,
        mut now: Instant,
    ) -> Result<(Response<UpstreamBody>, Lease), SendError> {
        let (mut opened, mut waited) = (None, false);
        let connection = loop {
            match self.share(now) {
                // Whoever waits for one comes first.
                Share::Free(connection) if opened.is_some() || waited || self.connections.streams.is_empty() => {
                    break connection;
                }
                Share::None => match self.open(connector).await {
                    Ok(new) => opened = Some(new),
                    Err(error) => return Err(SendError::Connect { request: Box::new(request), error }),
                },
                Share::Free(_) | Share::Full => {
                    let Some(_pending) = self.connections.load().wait() else {
                        return Err(SendError::Overflow { request: Box::new(request) });
                    };
                    self.connections.streams.freed().await;
                    waited = true;
                    now = Instant::now();
                }
            }
        };
        // While it was made, an older one may have got room, and an end that is only seen now.
        let new = opened.is_some_and(|opened| Rc::ptr_eq(&opened, &connection));
        let stream = StreamCount::on(&connection);
        // Who came between the end of its wait and now waits behind it, and may have room as well.
        if waited {
            self.free_streams(now);
        }
        match connection.connection.send(request).await {
            Ok(response) => {
                let connection = Leased::Http2 { _stream: stream };
                Ok((response.map(UpstreamBody::Http2), Lease::new(outstanding, connection)))
            }
            Err(error) => {
                if connection.connection.is_over() {
                    self.shared.borrow_mut().retain(|other| !Rc::ptr_eq(other, &connection));
                }
                Err(match error {
                    http2::client::NoAnswer::Unsent { request, .. } if !new => SendError::Stale { request },
                    http2::client::NoAnswer::Unsent { request, error } => {
                        SendError::Connect { request, error: ConnectError::Http(self.address, error.into()) }
                    }
                    http2::client::NoAnswer::Sent(error) => unanswered(error.into()),
                })
            }
        }
    }

    fn share(&self, now: Instant) -> Share {
        let policy = self.policy.get();
        let shared = self.shared.borrow();
        let usable = |c: &&Rc<Multiplexed>| c.is_usable(policy, now);
        let free = |c: &&Rc<Multiplexed>| c.streams.get() < c.most_streams();
        if let Some(free) = shared.iter().find(|c| c.streams.get() < MAX_STREAMS && usable(c) && free(c)) {
            return Share::Free(Rc::clone(free));
        }
        if self.connections.are_full() && shared.iter().any(|c| usable(&c)) {
            let free = shared.iter().filter(|c| usable(c) && free(c)).min_by_key(|c| c.streams.get());
            return free.map_or(Share::Full, |free| Share::Free(Rc::clone(free)));
        }
        Share::None
    }

    /// Waits until some new HTTP/2 connection has been made.
    async fn open(self: &Rc<Self>, connector: &Rc<Connector>) -> Result<Rc<Multiplexed>, ConnectError> {
        let opening = self.opening.borrow().clone();
        let opening = opening.unwrap_or_else(|| {
            let (done, opening) = oneshot::channel();
            let opening = opening.shared();
            *self.opening.borrow_mut() = Some(opening.clone());
            let (endpoint, connector) = (Rc::clone(self), Rc::clone(connector));
            // A task of its own, bounded by the time-outs: whoever asked first may go away, others still wait.
            let opened = self.connections.one_more();
            tokio::task::spawn_local(async move {
                let connections = Rc::clone(&endpoint.connections);
                let result = connector.http2(endpoint.address, opened, move || connections.streams.free_all()).await;
                let result = result.map_err(Rc::new).map(|connection| {
                    let since = Cell::new(Instant::now());
                    let life = Cell::new(Life::begin());
                    let of = Rc::clone(&endpoint.connections);
                    let connection = Rc::new(Multiplexed { of, connection, streams: Cell::new(0), since, life });
                    endpoint.shared.borrow_mut().push(Rc::clone(&connection));
                    endpoint.connections.streams.free_all();
                    connection
                });
                endpoint.opening.borrow_mut().take();
                let _ = done.send(result);
            });
            opening
        });
        match opening.await {
            Ok(result) => result.map_err(ConnectError::Together),
            Err(oneshot::Canceled) => Err(ConnectError::GivenUp(self.address)),
        }
    }
}

fn unanswered(error: UpstreamError) -> SendError {
    if refused(&error) { SendError::Refused { error } } else { SendError::Lost { error } }
}

/// Whether an error proves that the other side has not looked at the request.
fn refused(error: &UpstreamError) -> bool {
    let io = match error {
        UpstreamError::Http2(http2::Error::Stream(error)) => {
            // RFC 9113, 8.7: refused, or above the last stream of a GOAWAY. h2 gives a stream the GOAWAY as its error
            // only in that case; one that was below ends with an I/O error when the connection does.
            let refused = (error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM))
                || (error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR));
            if error.is_remote() && refused {
                return true;
            }
            error.get_io()
        }
        UpstreamError::Http1(http1::Error::Io(error)) => Some(error),
        UpstreamError::Http1(_) | UpstreamError::Http2(http2::Error::Client(_)) => None,
    };
    // In TLS 1.3 a server refuses our certificate only after our handshake is over; an alert instead of an
    // answer on a new connection means that it never read further.
    match io.and_then(io::Error::get_ref).and_then(|error| error.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::AlertReceived(alert)) => is_certificate_alert(*alert),
        Some(_) | None => false,
    }
}

fn is_certificate_alert(alert: rustls::AlertDescription) -> bool {
    use rustls::AlertDescription as Alert;
    [
        Alert::HandshakeFailure,
        Alert::BadCertificate,
        Alert::UnsupportedCertificate,
        Alert::CertificateRevoked,
        Alert::CertificateExpired,
        Alert::CertificateUnknown,
        Alert::UnknownCA,
        Alert::AccessDenied,
        Alert::DecryptError,
        Alert::CertificateRequired,
    ]
    .contains(&alert)
}
