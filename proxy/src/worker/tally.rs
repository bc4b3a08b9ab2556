//! One request's account: what is counted, logged and traced of it, exactly once, whichever way it ends.

use std::{net::SocketAddr, rc::Rc, time::Duration};

use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, Version, header, request};
use jiff::Timestamp;
use tokio::time::Instant;

use super::{
    cluster::Cluster,
    connection::Connection,
    headers,
    progress::{Idle, Progress},
    trace::{End, Trace},
};
use crate::{
    access_log::{Entry, Outcome},
    excerpt::Excerpt,
    failure::{Failure, Flag},
    metrics::{GrpcStatus, RevisionMetrics},
    refused::Refused,
};

pub(super) struct Tally {
    connection: Rc<Connection>,
    progress: Rc<Progress>,
    started: Instant,
    first_byte: Option<Instant>,
    /// With the first byte of the answer the last one came, too.
    whole: bool,
    ended: Option<Instant>,
    cluster: Option<Rc<Cluster>>,
    grpc: bool,
    grpc_status: Option<GrpcStatus>,
    status: StatusCode,
    flag: Option<Flag>,
    attempts: u32,
    bytes: u64,
    finished: bool,
    trace: Option<Box<Trace>>,
    head: Option<Box<Head>>,
}

/// Of the request's head, as it was received. Kept only for the access log and for a span; nothing is copied for it.
pub(super) struct Head {
    pub(super) time: Timestamp,
    pub(super) version: Version,
    pub(super) method: Method,
    pub(super) uri: Uri,
    pub(super) scheme: &'static str,
    host: Option<HeaderValue>,
    user_agent: Option<HeaderValue>,
    pub(super) upstream: Option<SocketAddr>,
    /// For how long a fault held it up. What is counted is without it.
    delayed: Duration,
}

impl Tally {
    /// A request begins: its headers have been received.
    pub(super) fn start(
        connection: Rc<Connection>,
        progress: Rc<Progress>,
        parts: &request::Parts,
        grpc: bool,
    ) -> Self {
        let tracer = connection.slot.worker.tracer.as_ref();
        let trace = tracer.and_then(|tracer| Trace::begin(tracer, &parts.headers));
        Self::new(connection, progress, parts, grpc, trace)
    }

    fn new(
        connection: Rc<Connection>,
        progress: Rc<Progress>,
        parts: &request::Parts,
        grpc: bool,
        trace: Option<Box<Trace>>,
    ) -> Self {
        connection.request_started();
        progress.begin(connection.stream_idle());
        let kept = connection.slot.worker.access_log.is_some() || trace.as_ref().is_some_and(|it| it.is_sampled());
        let head = kept.then(|| Box::new(Head::new(parts, connection.is_tls())));
        Self {
            connection,
            progress,
            started: Instant::now(),
            first_byte: None,
            whole: false,
            ended: None,
            cluster: None,
            grpc,
            grpc_status: None,
            status: StatusCode::OK,
            flag: None,
            attempts: 0,
            bytes: 0,
            finished: false,
            trace,
            head,
        }
    }

    /// A request ends before it could be read. It belongs to no trace.
    pub(super) fn unread(connection: Rc<Connection>) -> Self {
        let (mut parts, ()) = Request::new(()).into_parts();
        // As access logs say it of what is not known.
        parts.method = Method::from_bytes(b"-").unwrap_or_default();
        parts.uri = Uri::default();
        let progress = Rc::clone(&connection.streams.only);
        Self::new(connection, progress, &parts, false, None)
    }

    /// Tells the upstream of the trace, where tracing is on.
    pub(super) fn pass_trace_on(&self, headers: &mut HeaderMap) {
        if let Some(trace) = &self.trace {
            trace.pass_on(headers);
        }
    }

    pub(super) fn connection(&self) -> &Rc<Connection> {
        &self.connection
    }

    pub(super) fn progress(&self) -> &Rc<Progress> {
        &self.progress
    }

    pub(super) fn started(&self) -> Instant {
        self.started
    }

    pub(super) fn is_grpc(&self) -> bool {
        self.grpc
    }

    /// A fault that is injected holds the request up.
    pub(super) fn delay_begins(&mut self) {
        self.connection.slot.metrics.delay_injected();
        // A limit holds again when the request is sent on.
        self.progress.limit(None);
        self.progress.hold_up(true);
        self.flag = Some(Flag::DelayInjected);
    }

    /// What is measured begins now.
    pub(super) fn delay_ends(&mut self) {
        self.progress.hold_up(false);
        let before = std::mem::replace(&mut self.started, Instant::now());
        if let Some(head) = &mut self.head {
            head.delayed = self.started.duration_since(before);
        }
    }

    /// A revision was drawn: from now on the request is its.
    pub(super) fn drawn(&mut self, cluster: &Rc<Cluster>) {
        self.cluster = Some(Rc::clone(cluster));
        if let Some(metrics) = self.revision() {
            metrics.begun();
        }
    }

    pub(super) fn attempted(&mut self, upstream: SocketAddr) {
        self.attempts += 1;
        if let Some(head) = &mut self.head {
            head.upstream = Some(upstream);
        }
    }

    pub(super) fn answered(&mut self, status: StatusCode, now: Instant) {
        self.status = status;
        self.first_byte = Some(now);
        self.progress.answer();
    }

    /// The answer's body has arrived together with its head. Saves a look at the clock at its end.
    pub(super) fn arrived(&mut self) {
        self.whole = true;
    }

    /// When the last byte of the answer came, at its end.
    pub(super) fn last_byte(&self) -> Instant {
        self.first_byte.filter(|_| self.whole).unwrap_or_else(Instant::now)
    }

    /// The last moment that is known of. Saves a look at the clock, too.
    pub(super) fn latest(&self) -> Instant {
        self.ended.or(self.first_byte).unwrap_or(self.started)
    }

    pub(super) fn set_grpc_status(&mut self, status: GrpcStatus) {
        if self.grpc {
            self.grpc_status = Some(status);
        }
    }

    pub(super) fn add_bytes(&mut self, count: usize) {
        self.bytes += u64::try_from(count).unwrap_or(u64::MAX);
    }

    /// The last byte of the upstream's answer has arrived.
    pub(super) fn finish(&mut self, now: Instant) {
        if !self.ends() {
            return;
        }
        self.ended = Some(now);
        if let Some(metrics) = self.revision() {
            // A 5xx is bad by its class already; with a bad grpc_status too, a sum over both would count it twice.
            let grpc = (self.grpc && self.status.as_u16() < 500)
                .then(|| self.grpc_status.unwrap_or_else(|| GrpcStatus::of_http(self.status)));
            let first_byte = self.first_byte.map(|at| at.duration_since(self.started));
            metrics.record(self.status, grpc, now.duration_since(self.started), first_byte);
        }
        self.tell(now);
    }

    /// Whether it had not ended before.
    fn ends(&mut self) -> bool {
        let first = !std::mem::replace(&mut self.finished, true);
        if first {
            self.over();
        }
        first
    }

    fn over(&self) {
        if let Some(metrics) = self.revision() {
            metrics.over();
        }
    }

    /// The series of the revision that was drawn.
    fn revision(&self) -> Option<&RevisionMetrics> {
        self.cluster.as_ref().and_then(|cluster| cluster.metrics.as_ref())
    }

    /// The request has ended after its answer. What is counted of it is without that.
    pub(super) fn request_over(&mut self) {
        self.ended = Some(Instant::now());
    }

    /// This proxy answers, or breaks off, by itself.
    pub(super) fn fail(&mut self, failure: &Failure, now: Instant) {
        let (status, flag, code) = failure.answer();
        self.flag = Some(flag);
        if *failure == Failure::ClientGone {
            self.status = status;
            return; // Counted when dropped.
        }
        self.progress.answer();
        self.connection.slot.metrics.local_error(flag);
        if let Some(why) = Refused::by(failure) {
            self.connection.slot.metrics.refused(why);
        }
        // What the client sees of a gRPC call is 200 and our code.
        self.status = if self.grpc { StatusCode::OK } else { status };
        self.set_grpc_status(code);
        if *failure == Failure::RequestIdle {
            self.finish_uncounted(now);
        } else {
            self.finish(now);
        }
    }

    /// It says nothing about the revision, which may have done its part.
    fn finish_uncounted(&mut self, now: Instant) {
        if self.ends() {
            self.ended = Some(now);
            self.tell(now);
        }
    }

    /// The answer has begun, and is broken off because nothing of it has passed for too long.
    pub(super) fn broken_off(&mut self, by: Idle) {
        let now = Instant::now();
        match by {
            Idle::Upstream if !self.finished => self.fail(&Failure::UpstreamIdle, now),
            Idle::Upstream | Idle::Client => self.given_up(Flag::StreamIdleTimeout, now),
        }
    }

    /// Its time is over, and it is the client that does not read the answer.
    pub(super) fn not_read_in_time(&mut self) {
        self.given_up(Flag::UpstreamRequestTimeout, Instant::now());
    }

    /// The answer, or what is left of the request behind it, is broken off because of the client.
    fn given_up(&mut self, flag: Flag, now: Instant) {
        self.connection.slot.metrics.local_error(flag);
        self.connection.slot.metrics.refused(Refused::AnswerTimeout);
        self.flag = Some(flag);
        self.finish_uncounted(now);
    }

    /// The client has gone. If it was waiting for the revision, of which no answer had begun, the time so far is measured: clients give up
    /// on the slowest answers first, and a revision that hangs would look as fast as what it does answer.
    ///
    /// However short the time is: it is less than the answer would have taken, so no quantile comes out above the true one. To measure
    /// the long ones alone would leave requests out for being fast, and make a revision look slower than it is.
    fn gone(&self, now: Instant) {
        // It broke its own request, or had not sent all that somebody waited for; or it was we who ended its connection.
        let waited_for_nobody =
            self.flag == Some(Flag::DownstreamTermination) || self.progress.awaits_client() || self.connection.is_cut();
        if self.first_byte.is_none()
            && !waited_for_nobody
            && let Some(metrics) = self.revision()
        {
            metrics.given_up(now.duration_since(self.started));
        }
    }

    /// The request became a tunnel: neither its outcome nor its duration says anything about the revision.
    pub(super) fn upgraded(&mut self) {
        self.connection.slot.metrics.upgraded();
        self.status = StatusCode::SWITCHING_PROTOCOLS;
        self.ends();
        self.tell(Instant::now());
    }

    /// Writes the line and hands over the span, where it has them.
    fn tell(&self, now: Instant) {
        let Some(head) = &self.head else { return };
        let worker = &self.connection.slot.worker;
        let since_head = |at: Instant| at.duration_since(self.started) + head.delayed;
        let outcome = Outcome {
            status: self.status.as_u16(),
            grpc_status: self.grpc_status,
            flag: self.flag,
            duration: since_head(now),
        };
        if let Some(log) = worker.access_log.as_ref().filter(|log| log.wants(&outcome)) {
            let milliseconds = |duration: Duration| duration.as_secs_f64() * 1e3;
            log.write(&Entry {
                time: head.time.to_string(),
                listener: &self.connection.slot.name,
                peer: self.connection.peer.to_string(),
                protocol: head.protocol(),
                method: Excerpt::of(head.method.as_str()),
                authority: Excerpt::of(head.authority()),
                path: Excerpt::of(head.uri.path_and_query().map_or("", |path| path.as_str())),
                user_agent: Excerpt::of(head.user_agent()),
                status: outcome.status,
                grpc_status: self.grpc_status.map(GrpcStatus::name),
                flag: self.flag.map(Flag::name),
                cluster: self.cluster.as_ref().map(|cluster| cluster.config.name.as_str()),
                upstream: head.upstream.map(|address| address.to_string()),
                attempts: self.attempts,
                duration_ms: milliseconds(outcome.duration),
                first_byte_ms: self.first_byte.map(|at| milliseconds(since_head(at))),
                response_bytes: self.bytes,
                trace_id: self.trace.as_ref().map(|trace| trace.id()),
            });
        }
        if let (Some(tracer), Some(trace)) = (&worker.tracer, self.trace.as_ref().filter(|it| it.is_sampled())) {
            let aborted = !self.finished;
            let end = End {
                outcome,
                status: (!aborted || self.first_byte.is_some()).then_some(self.status),
                grpc: self.grpc,
                aborted,
                attempts: self.attempts,
                cluster: self.cluster.as_ref().map(|cluster| &*cluster.config),
            };
            tracer.hand_over(trace.span(tracer, &self.connection, head, &end));
        }
    }
}

impl Drop for Tally {
    fn drop(&mut self) {
        if let Some(by) = self.progress.take_idle() {
            self.broken_off(by);
        }
        if !self.finished {
            self.over();
            let now = Instant::now();
            self.connection.slot.metrics.client_aborted();
            self.gone(now);
            // Patience with a fault of ours is not expected.
            let delayed = self.flag == Some(Flag::DelayInjected);
            self.flag = Some(Flag::DownstreamTermination);
            self.tell(now);
            if self.first_byte.is_none() && !delayed {
                self.connection.given_up_unanswered(self.started);
            }
        }
        self.progress.end();
        self.connection.request_ended(self.ended);
    }
}

impl Head {
    fn new(parts: &request::Parts, tls: bool) -> Self {
        Self {
            time: Timestamp::now(),
            version: parts.version,
            method: parts.method.clone(),
            uri: parts.uri.clone(),
            scheme: headers::scheme(&parts.headers, tls),
            host: parts.headers.get(header::HOST).cloned(),
            user_agent: parts.headers.get(header::USER_AGENT).cloned(),
            upstream: None,
            delayed: Duration::ZERO,
        }
    }

    pub(super) fn authority(&self) -> &str {
        self.uri.authority().map_or_else(|| text(self.host.as_ref()), |authority| authority.as_str())
    }

    pub(super) fn user_agent(&self) -> &str {
        text(self.user_agent.as_ref())
    }

    fn protocol(&self) -> &'static str {
        match self.version {
            Version::HTTP_10 => "HTTP/1.0",
            Version::HTTP_2 => "HTTP/2",
            _ => "HTTP/1.1",
        }
    }
}

fn text(value: Option<&HeaderValue>) -> &str {
    value.and_then(|value| value.to_str().ok()).unwrap_or_default()
}
