//! One request's account: what is counted and logged of it, exactly once, whichever way it ends.

use std::{net::SocketAddr, rc::Rc, time::Duration};

use http::{StatusCode, Version, header, request};
use jiff::Timestamp;
use tokio::time::Instant;

use super::{cluster::Cluster, connection::Connection};
use crate::{
    access_log::Entry,
    failure::{Failure, Flag},
    metrics::GrpcStatus,
    refused::Refused,
};

pub(super) struct Tally {
    connection: Rc<Connection>,
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
    log: Option<Box<Logged>>,
}

/// Kept only when the access log is on.
struct Logged {
    time: Timestamp,
    protocol: &'static str,
    method: http::Method,
    authority: String,
    path: String,
    user_agent: String,
    upstream: Option<SocketAddr>,
    /// For how long a fault held it up. What is counted is without it.
    delayed: Duration,
}

impl Tally {
    /// A request begins: its headers have been received.
    pub(super) fn start(connection: Rc<Connection>, parts: &request::Parts, grpc: bool) -> Self {
        connection.request_started();
        let log = connection.slot.worker.access_log.as_ref().map(|_| Box::new(Logged::new(parts)));
        Self {
            connection,
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
            log,
        }
    }

    /// A request ends before it could be read.
    pub(super) fn unread(connection: Rc<Connection>) -> Self {
        let (mut parts, ()) = http::Request::new(()).into_parts();
        // As access logs say it of what is not known.
        parts.method = http::Method::from_bytes(b"-").unwrap_or_default();
        parts.uri = http::Uri::default();
        Self::start(connection, &parts, false)
    }

    pub(super) fn connection(&self) -> &Rc<Connection> {
        &self.connection
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
        self.flag = Some(Flag::DelayInjected);
    }

    /// What is measured begins now.
    pub(super) fn delay_ends(&mut self) {
        let before = std::mem::replace(&mut self.started, Instant::now());
        if let Some(log) = &mut self.log {
            log.delayed = self.started.duration_since(before);
        }
    }

    /// A revision was drawn: from now on the request is its.
    pub(super) fn drawn(&mut self, cluster: &Rc<Cluster>) {
        self.cluster = Some(Rc::clone(cluster));
    }

    pub(super) fn attempted(&mut self, upstream: SocketAddr) {
        self.attempts += 1;
        if let Some(log) = &mut self.log {
            log.upstream = Some(upstream);
        }
    }

    pub(super) fn answered(&mut self, status: StatusCode, now: Instant) {
        self.status = status;
        self.first_byte = Some(now);
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
        if std::mem::replace(&mut self.finished, true) {
            return;
        }
        self.ended = Some(now);
        if let Some(metrics) = self.cluster.as_ref().and_then(|cluster| cluster.metrics.as_ref()) {
            // A 5xx is bad by its class already; with a bad grpc_status too, a sum over both would count it twice.
            let grpc = (self.grpc && !self.status.is_server_error())
                .then(|| self.grpc_status.unwrap_or_else(|| GrpcStatus::of_http(self.status)));
            let first_byte = self.first_byte.map(|at| at.duration_since(self.started));
            metrics.record(self.status, grpc, now.duration_since(self.started), first_byte);
        }
        self.write_log(now);
    }

    /// This proxy answers, or breaks off, by itself.
    pub(super) fn fail(&mut self, failure: &Failure, now: Instant) {
        let (status, flag, code) = failure.answer();
        self.flag = Some(flag);
        if *failure == Failure::ClientGone {
            self.status = status;
            return; // Counted when dropped.
        }
        self.connection.slot.metrics.local_error(flag);
        if let Some(why) = Refused::by(failure) {
            self.connection.slot.metrics.refused(why);
        }
        // What the client sees of a gRPC call is 200 and our code.
        self.status = if self.grpc { StatusCode::OK } else { status };
        self.set_grpc_status(code);
        self.finish(now);
    }

    /// The request became a tunnel: neither its outcome nor its duration says anything about the revision.
    pub(super) fn upgraded(&mut self) {
        self.connection.slot.metrics.upgraded();
        self.status = StatusCode::SWITCHING_PROTOCOLS;
        self.finished = true;
        self.write_log(Instant::now());
    }

    fn write_log(&self, now: Instant) {
        let (Some(logged), Some(log)) = (&self.log, &self.connection.slot.worker.access_log) else {
            return;
        };
        let milliseconds = |at: Instant| (at.duration_since(self.started) + logged.delayed).as_secs_f64() * 1e3;
        log.write(&Entry {
            time: logged.time.to_string(),
            listener: &self.connection.slot.name,
            peer: self.connection.peer.to_string(),
            protocol: logged.protocol,
            method: logged.method.as_str(),
            authority: &logged.authority,
            path: &logged.path,
            user_agent: &logged.user_agent,
            status: self.status.as_u16(),
            grpc_status: self.grpc_status.map(GrpcStatus::name),
            flag: self.flag.map(Flag::name),
            cluster: self.cluster.as_ref().map(|cluster| cluster.config.name.as_str()),
            upstream: logged.upstream.map(|address| address.to_string()),
            attempts: self.attempts,
            duration_ms: milliseconds(now),
            first_byte_ms: self.first_byte.map(milliseconds),
            response_bytes: self.bytes,
        });
    }
}

impl Drop for Tally {
    fn drop(&mut self) {
        if !self.finished {
            self.connection.slot.metrics.client_aborted();
            // Patience with a fault of ours is not expected.
            let delayed = self.flag == Some(Flag::DelayInjected);
            self.flag = Some(Flag::DownstreamTermination);
            self.write_log(Instant::now());
            if self.first_byte.is_none() && !delayed {
                self.connection.given_up_unanswered(self.started);
            }
        }
        self.connection.request_ended(self.ended);
    }
}

impl Logged {
    fn new(parts: &request::Parts) -> Self {
        let text = |name| {
            let value = parts.headers.get(name).and_then(|value: &http::HeaderValue| value.to_str().ok());
            value.unwrap_or_default().to_owned()
        };
        let authority = parts.uri.authority().map_or_else(|| text(header::HOST), ToString::to_string);
        let protocol = match parts.version {
            Version::HTTP_10 => "HTTP/1.0",
            Version::HTTP_2 => "HTTP/2",
            _ => "HTTP/1.1",
        };
        Self {
            time: Timestamp::now(),
            protocol,
            method: parts.method.clone(),
            authority,
            path: parts.uri.path_and_query().map_or_else(String::new, ToString::to_string),
            user_agent: text(header::USER_AGENT),
            upstream: None,
            delayed: Duration::ZERO,
        }
    }
}
