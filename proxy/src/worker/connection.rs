//! One connection from a client: which configuration it is served by, how it is driven, and how it ends.

use std::{
    cell::{Cell, OnceCell, RefCell},
    future::{Future, poll_fn},
    io,
    net::{IpAddr, SocketAddr},
    pin::{Pin, pin},
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
    time::{Duration, SystemTime},
};

use http::HeaderValue;
use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::{Instant, Sleep, sleep, timeout},
};
use tokio_rustls::{LazyConfigAcceptor, StartHandshake};

use super::{
    headers::Peer,
    http1::server::{self, Sent},
    http2,
    progress::Streams,
    relay::{self, Broken},
    request,
    serving::{Chain, Protocol},
    slot::Slot,
    socket::{CLIENT_QUIET, Socket, prepare_socket},
    stream::Stream,
    tcp,
};
use crate::{
    failure::Flag,
    overload::Action,
    refused::Refused,
    tls::{ALPN_H2, ALPN_HTTP1},
    workers::Role,
};

/// After so many requests on a connection, a client that gave most of them up within a second, unanswered, is cut off: it costs more
/// than it asks for ("Rapid Reset", CVE-2023-44487). The figures are Envoy's (`overload.premature_reset_total_stream_count`).
const LOOK_AT_RESETS: u32 = 500;
const PREMATURE: Duration = Duration::from_secs(1);
/// For so long an idle HTTP/1.1 connection that was asked to end stays open where memory is short.
const IDLE_WHERE_SHORT: Duration = Duration::from_secs(5);

pub(super) struct Connection {
    pub(super) slot: Rc<Slot>,
    pub(super) peer: SocketAddr,
    pub(super) local: SocketAddr,
    id: u64,
    chain: RefCell<Option<Rc<Chain>>>,
    /// The slot's version that `chain` is of.
    seen: Cell<u64>,
    draining: Cell<bool>,
    cut: Cell<bool>,
    /// Requests that have begun and not ended.
    active: Cell<u32>,
    /// Requests that have begun, and those of them that the client gave up soon after, before they were answered.
    begun: Cell<u32>,
    given_up: Cell<u32>,
    /// Whether it is more than requests: TCP, or a tunnel.
    tunnel: Cell<bool>,
    quiet_since: Cell<Instant>,
    pub(super) streams: Streams,
    /// When the client's certificate ends: then it has to come back with another one.
    ends: Cell<Option<Instant>>,
    waker: RefCell<Option<Waker>>,
    peer_value: OnceCell<HeaderValue>,
}

/// What a request finds when it asks for its configuration.
pub(super) enum Current {
    Chain(Rc<Chain>),
    /// Another client is admitted here now; this connection was made under the old rule.
    Revoked,
}

impl Connection {
    /// `None` if the client has gone already.
    pub(super) fn accepted(slot: &Rc<Slot>, stream: &TcpStream, peer: SocketAddr) -> Option<Rc<Self>> {
        let local = stream.local_addr().ok()?;
        // An IPv4 client of a dual-stack socket is an IPv4 client.
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        let local = SocketAddr::new(local.ip().to_canonical(), local.port());
        let connection = slot.opened(|id| {
            Rc::new(Self {
                slot: Rc::clone(slot),
                peer,
                local,
                id,
                chain: RefCell::new(None),
                seen: Cell::new(0),
                draining: Cell::new(slot.is_draining()),
                cut: Cell::new(false),
                active: Cell::new(0),
                begun: Cell::new(0),
                given_up: Cell::new(0),
                tunnel: Cell::new(false),
                quiet_since: Cell::new(Instant::now()),
                streams: Streams::default(),
                ends: Cell::new(None),
                waker: RefCell::new(None),
                peer_value: OnceCell::new(),
            })
        });
        Some(connection)
    }

    /// The newest configuration for this connection, loaded once by each request at its start.
    pub(super) fn current(&self) -> Current {
        let mut chain = self.chain.borrow_mut();
        let serving = (self.seen.get() != self.slot.version()).then(|| self.slot.serving());
        if let (Some(serving), Some(mine)) = (serving, chain.as_mut()) {
            match serving.successor(mine) {
                Some(newer) => {
                    let admitted = |chain: &Chain| chain.tls.as_ref().map(|(tls, _)| tls.clone());
                    if admitted(newer) != admitted(mine) {
                        self.drain();
                        return Current::Revoked;
                    }
                    *mine = Rc::clone(newer);
                }
                // Nothing replaces it; what was begun is served to its end as it was.
                None => self.drain(),
            }
            self.seen.set(self.slot.version());
        }
        chain.as_ref().map_or(Current::Revoked, |chain| Current::Chain(Rc::clone(chain)))
    }

    pub(super) fn is_tls(&self) -> bool {
        self.chain.borrow().as_ref().is_some_and(|chain| chain.tls.is_some())
    }

    /// For how long nothing may rest on a stream, unless its route says otherwise.
    pub(super) fn stream_idle(&self) -> Option<Duration> {
        self.chain.borrow().as_ref().and_then(|chain| chain.idle)
    }

    /// Ends the streams on which nothing has passed for too long. After a look that came late, what has come meanwhile has not been read.
    pub(super) fn look_at_streams(&self, now: Instant, late: bool) {
        if late {
            self.streams.look_anew();
        } else if self.streams.look(now) {
            self.wake();
        }
    }

    /// The client's address as a header value.
    pub(super) fn peer_value(&self) -> (IpAddr, &HeaderValue) {
        let ip = self.peer.ip();
        let value = self.peer_value.get_or_init(|| {
            HeaderValue::from_str(&ip.to_string()).unwrap_or_else(|_| HeaderValue::from_static("unknown"))
        });
        (ip, value)
    }

    pub(super) fn request_started(&self) {
        self.active.set(self.active.get() + 1);
        self.begun.set(self.begun.get().wrapping_add(1));
        self.slot.metrics.request_started();
    }

    /// The client gave up a request that began then, and nothing had been answered.
    pub(super) fn given_up_unanswered(&self, began: Instant) {
        // A sidecar's client is the fleet, which passes on what many clients do on one connection.
        if self.slot.worker.role != Role::Fleet || began.elapsed() > PREMATURE {
            return;
        }
        self.given_up.set(self.given_up.get() + 1);
        if !self.cut.get() && self.begun.get() >= LOOK_AT_RESETS && self.given_up.get() > self.begun.get() / 2 {
            self.slot.metrics.refused(Refused::RapidReset);
            tracing::debug!(listener = self.slot.name, peer = %self.peer, "cut off: most of its requests were given up");
            self.cut();
        }
    }

    /// `at` spares a look at the clock.
    pub(super) fn request_ended(&self, at: Option<Instant>) {
        self.active.set(self.active.get() - 1);
        if self.active.get() == 0 {
            self.quiet_since.set(at.unwrap_or_else(Instant::now));
        }
        self.slot.metrics.request_ended();
    }

    /// How long it may be open without a request.
    fn idle_limit(&self) -> Option<Duration> {
        let worker = &self.slot.worker;
        if !self.is_draining() {
            return worker.timing.downstream_idle;
        }
        // Where memory is short, what is freed soon counts for more than a request that meets the close.
        let short = worker.overload.is_active(Action::DisableKeepalive);
        worker.timing.drain_idle.map(|idle| if short { idle.min(IDLE_WHERE_SHORT) } else { idle })
    }

    /// Without a request.
    fn idle_for_too_long(&self, now: Instant) -> bool {
        let quiet = now.duration_since(self.quiet_since.get());
        self.active.get() == 0 && self.idle_limit().is_some_and(|limit| quiet >= limit)
    }

    /// How often it is looked whether it has been open for too long.
    fn look_every(&self) -> Duration {
        let header = self.slot.worker.timing.header;
        let every = self.idle_limit().map_or(header, |limit| limit.min(header));
        let ends = self.ends.get().filter(|_| !self.is_draining());
        ends.map_or(every, |ends| every.min(ends.saturating_duration_since(Instant::now())))
    }

    /// Lets it end when the client's certificate has ended.
    fn look_at_certificate(&self, now: Instant) {
        if self.ends.get().is_some_and(|ends| ends <= now) {
            self.draining.set(true);
        }
    }

    /// Asks the connection to end when its requests have.
    pub(super) fn drain(&self) {
        self.draining.set(true);
        self.wake();
    }

    pub(super) fn is_draining(&self) -> bool {
        self.draining.get()
    }

    /// Whether an answer of HTTP/1.1 is its last.
    pub(super) fn ends_after_answer(&self) -> bool {
        self.is_draining() || self.slot.worker.overload.is_active(Action::DisableKeepalive)
    }

    /// Whether it has had no request for so long, and has not been asked to end yet.
    pub(super) fn is_idle(&self, least: Duration) -> bool {
        !self.is_draining() && !self.is_in_use() && self.quiet_since.get().elapsed() >= least
    }

    /// Ends the connection at once.
    pub(super) fn cut(&self) {
        self.cut.set(true);
        self.wake();
    }

    /// Whether it was ended at once, with all that was open on it.
    pub(super) fn is_cut(&self) -> bool {
        self.cut.get()
    }

    /// Whether cutting it would lose something.
    pub(super) fn is_in_use(&self) -> bool {
        self.active.get() > 0 || self.tunnel.get()
    }

    fn wake(&self) {
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }

    /// Runs `work` until it ends or the connection is cut; then the connection is closed.
    async fn until_cut(&self, mut work: Pin<&mut impl Future<Output = ()>>) {
        let _closed = Closed(self);
        poll_fn(|cx| {
            if self.cut.get() {
                return Poll::Ready(());
            }
            {
                let mut waker = self.waker.borrow_mut();
                if waker.as_ref().is_none_or(|waker| !waker.will_wake(cx.waker())) {
                    *waker = Some(cx.waker().clone());
                }
            }
            work.as_mut().poll(cx)
        })
        .await;
    }
}

struct Closed<'a>(&'a Connection);

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.0.slot.closed(self.0.id);
    }
}

/// Serves a connection to its end.
pub(super) async fn run(connection: Rc<Connection>, stream: TcpStream) {
    prepare_socket(&stream, CLIENT_QUIET);
    // Pinned here: a future that is passed on by value takes its space twice.
    let work = pin!(serve(&connection, stream));
    connection.until_cut(work).await;
}

async fn serve(connection: &Rc<Connection>, stream: TcpStream) {
    let serving = connection.slot.serving();
    connection.seen.set(connection.slot.version());
    let accepted = if serving.speaks_tls() {
        let limit = connection.slot.worker.timing.tls_handshake;
        let handshake = Box::pin(handshake(&serving, Socket::new(stream)));
        match timeout(limit, handshake).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(accepted) => Some(accepted),
            Err(error) => {
                connection.slot.metrics.tls_failed();
                connection.slot.metrics.refused(Refused::in_handshake(&error));
                tracing::debug!(listener = connection.slot.name, peer = %connection.peer, %error, "TLS refused");
                None
            }
        }
    } else {
        serving.chains.first().map(|chain| (Rc::clone(chain), Stream::plain(stream)))
    };
    let Some((chain, stream)) = accepted else {
        return;
    };
    let left = stream.peer_ends().map(|ends| ends.duration_since(SystemTime::now()).unwrap_or_default());
    connection.ends.set(left.map(|left| Instant::now() + left));
    *connection.chain.borrow_mut() = Some(chain);
    // A snapshot may have been applied during the handshake.
    let Current::Chain(chain) = connection.current() else { return };
    match &chain.protocol {
        Protocol::Http(_) => http(connection, stream).await,
        Protocol::Tcp(split) => {
            connection.tunnel.set(true);
            Box::pin(tcp::proxy(connection, split, chain.idle, stream)).await;
        }
    }
}

/// The chain that the client asked for, and the stream when both certificates have been checked.
async fn handshake(serving: &super::serving::Serving, socket: Socket) -> io::Result<(Rc<Chain>, Stream)> {
    let (chain, config, hello) = hello(serving, socket).await?;
    let stream = hello.into_stream(config).await?;
    Ok((chain, Stream::server(stream)))
}

/// Reads what a client begins TLS with, and finds the chain that it asks for by SNI.
pub(super) async fn hello<S: AsyncRead + AsyncWrite + Unpin>(
    serving: &super::serving::Serving,
    socket: S,
) -> io::Result<(Rc<Chain>, Arc<ServerConfig>, StartHandshake<S>)> {
    let hello = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), socket).await?;
    let server_name = hello.client_hello().server_name().map(str::to_owned);
    let chain = serving.chain_for(server_name.as_deref());
    let Some((chain, (_, config))) = chain.and_then(|chain| Some((chain, chain.tls.as_ref()?))) else {
        let words = format!("no filter chain for the server name {server_name:?}");
        return Err(io::Error::new(io::ErrorKind::NotFound, words));
    };
    Ok((Rc::clone(chain), Arc::clone(config), hello))
}

async fn http(connection: &Rc<Connection>, mut stream: Stream) {
    let timing = &connection.slot.worker.timing;
    let http2 = match stream.alpn() {
        Some(ALPN_H2) => true,
        Some(ALPN_HTTP1) => false,
        Some(_) | None => match timeout(timing.first_byte, stream.starts_http2()).await {
            Ok(Ok(http2)) => http2,
            Ok(Err(_)) | Err(_) => return, // Nothing was asked.
        },
    };
    if http2 {
        Box::pin(serve_http2(connection, stream)).await;
    } else {
        // Several times what the rest of this task takes, which a connection of HTTP/2 would hold for nothing.
        Box::pin(serve_http1(connection, stream)).await;
    }
}

async fn serve_http1(connection: &Rc<Connection>, stream: Stream) {
    let peer = Peer::of_clients(connection.slot.worker.role);
    let mut client = server::Connection::new(stream, Rc::clone(&connection.streams.only), peer);
    let mut patience = pin!(Patience::new(connection));
    loop {
        let request = client.request(|cx, begun| patience.as_mut().poll(cx, connection, begun)).await;
        // What may have come of the next one begins to be waited for when it is its turn.
        patience.begun = None;
        let request = match request {
            Ok(Some(request)) => request,
            Ok(None) => break,
            Err(malformed) => {
                tracing::debug!(listener = connection.slot.name, peer = %connection.peer, %malformed, "request refused");
                match client.send(request::refuse(connection, &malformed.failure())).await {
                    Sent::Whole => break,
                    Sent::Switched(_) | Sent::Broken => return,
                }
            }
        };
        let answer = pin!(request::serve(Rc::clone(connection), Rc::clone(&connection.streams.only), request));
        let Some(response) = client.unless_gone(answer).await else {
            return;
        };
        match client.send(response).await {
            Sent::Whole => {}
            Sent::Switched(body) => {
                connection.tunnel.set(true);
                let limit = connection.streams.only.limited_to();
                if let (Some(stream), Some((upstream, _lease))) = (client.into_stream(), body.into_tunnel()) {
                    // The lease counts as load while the tunnel is open.
                    Box::pin(tunnel(connection, limit, stream, upstream)).await;
                }
                return;
            }
            Sent::Broken => return,
        }
    }
    client.close().await;
}

/// Passes bytes both ways until both sides have ended, or nothing has passed for as long as `limit`.
///
/// Both have ended in order, or both see a reset, also when this is dropped or the process killed: an end in order would make half of
/// something look whole.
pub(super) async fn tunnel(connection: &Connection, limit: Option<Duration>, mut client: Stream, mut upstream: Stream) {
    client.reset_when_closed(true);
    upstream.reset_when_closed(true);
    let progress = &connection.streams.only;
    progress.begin(limit);
    match relay::both_ways(&mut client, &mut upstream, progress).await {
        Ok(()) => {
            client.reset_when_closed(false);
            upstream.reset_when_closed(false);
        }
        Err(broken) => {
            tracing::debug!(listener = connection.slot.name, peer = %connection.peer, %broken, "tunnel broken off");
            // The reset would throw away what is on its way.
            match broken {
                Broken::Client(_) => {
                    drop(client);
                    upstream.arrived(progress).await;
                }
                Broken::Upstream(_) => {
                    drop(upstream);
                    client.arrived(progress).await;
                }
                Broken::Idle => {}
            }
        }
    }
    if progress.take_idle().is_some() {
        connection.slot.metrics.local_error(Flag::StreamIdleTimeout);
    }
    progress.end();
}

/// How long an HTTP/1.1 client may say nothing, or half a head. One timer for the life of the connection: it is set anew
/// when it fires, not with each request.
///
/// An idle connection cannot be closed without a chance that a request is on its way. So while draining it gets
/// `connection: close` with its next answer (`request.rs`), and is closed only after a while without one, or at the
/// deadline.
struct Patience {
    timer: Pin<Box<Sleep>>,
    /// When the first part of a head came that is not whole yet.
    begun: Option<Instant>,
    /// Since when it has been asked to end.
    drained: Option<Instant>,
}

impl Patience {
    fn new(connection: &Connection) -> Self {
        let timer = Box::pin(sleep(connection.look_every()));
        Self { timer, begun: None, drained: None }
    }

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>, connection: &Connection, begun: bool) -> Poll<()> {
        let timing = &connection.slot.worker.timing;
        if begun != self.begun.is_some() {
            self.begun = begun.then(Instant::now);
        }
        if connection.is_draining() && self.drained.is_none() {
            let now = Instant::now();
            self.drained = Some(now);
            if let Some(idle) = connection.idle_limit() {
                // A head that was begun has less time.
                self.timer.as_mut().reset(now + idle.min(timing.header));
            }
        }
        loop {
            ready!(self.timer.as_mut().poll(cx));
            let now = Instant::now();
            connection.look_at_certificate(now);
            let quiet_since =
                self.drained.map_or(connection.quiet_since.get(), |drained| drained.max(connection.quiet_since.get()));
            let quiet_until = connection.idle_limit().map(|limit| quiet_since + limit);
            let until = self.begun.map(|begun| begun + timing.header).or(quiet_until);
            let look_again = now + connection.look_every();
            if until.is_some_and(|until| until <= now) {
                if self.begun.is_some() {
                    connection.slot.metrics.refused(Refused::HeadTimeout);
                }
                return Poll::Ready(());
            }
            self.timer.as_mut().reset(until.map_or(look_again, |until| until.min(look_again)));
        }
    }
}

async fn serve_http2(connection: &Rc<Connection>, stream: Stream) {
    let metrics = &connection.slot.metrics;
    // In a box, as it is large, and soon over.
    let preface = Box::pin(http2::server::Connection::new(stream, metrics.clone(), connection.slot.worker.role));
    let mut client = match timeout(connection.slot.worker.timing.header, preface).await {
        Ok(Ok(client)) => client,
        Ok(Err(error)) => return http2_failed(connection, &error),
        Err(_) => return metrics.refused(Refused::HeadTimeout),
    };
    let mut timer = pin!(sleep(connection.look_every()));
    let (mut told, mut unread) = (None, None);
    // Ends it when it is drained or idle for too long: GOAWAY loses nothing.
    let result = poll_fn(|cx| {
        loop {
            while let Poll::Ready(request) = client.poll_request(cx) {
                match request {
                    Some(Ok(exchange)) => {
                        tokio::task::spawn_local(exchange.serve(Rc::clone(connection)));
                    }
                    Some(Err(error)) => return Poll::Ready(Err(error)),
                    None => return Poll::Ready(Ok(())),
                }
            }
            if told.is_none() && client.is_worn_out() {
                connection.draining.set(true);
            }
            let look = timer.as_mut().poll(cx).is_ready();
            let telling = told.is_none() && connection.is_draining();
            if !look && !telling {
                return Poll::Pending;
            }
            let now = Instant::now();
            connection.look_at_certificate(now);
            let idle = connection.idle_for_too_long(now);
            if told.is_none() && (idle || connection.is_draining()) {
                client.announce_end();
                told = Some(now);
            }
            let ends = told.map(|told| told + connection.slot.worker.timing.farewell);
            let over = ends.is_some_and(|ends| ends <= now);
            if over {
                client.end();
            }
            if !(over && idle) {
                unread = None;
            } else if let Some(limit) = connection.stream_idle()
                && now.duration_since(*unread.get_or_insert(now)) >= limit
            {
                // What keeps it open is no request: the rest of an answer that the client does not read, or half a head.
                connection.slot.metrics.refused(Refused::AnswerTimeout);
                return Poll::Ready(Ok(()));
            }
            let look_again = now + connection.look_every();
            timer.as_mut().reset(ends.filter(|_| !over).map_or(look_again, |ends| ends.min(look_again)));
        }
    });
    if let Err(error) = result.await {
        http2_failed(connection, &error);
    }
}

fn http2_failed(connection: &Connection, error: &h2::Error) {
    if let Some(why) = error.reason().filter(|_| error.is_library()).and_then(Refused::by_reset) {
        connection.slot.metrics.refused(why);
    }
    tracing::debug!(listener = connection.slot.name, peer = %connection.peer, %error, "connection ended");
}
