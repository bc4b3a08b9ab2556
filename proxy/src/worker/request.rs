//! A request's life, top to bottom: configuration, draw, endpoint, answer.

use std::{future::poll_fn, net::SocketAddr, pin::pin, rc::Rc, task::Poll};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version, header, request};
use http_body::Body;
use tokio::time::Instant;

use super::{
    Role,
    affinity::User,
    body::{self, Limit, RequestBody, RequestEnd, ResponseBody, UpstreamBody},
    cluster::Cluster,
    connection::{Connection, Current},
    cors::{self, Grant, Verdict},
    fault, headers, matching, mirror,
    outgoing::{MAX_TRIES, Outgoing, is_not_processed, repeatable},
    pool::{Lease, SendError, Wire},
    progress::Progress,
    retry::Retries,
    rewrite,
    serving::{Action, Chain, Route},
    stream::Stream,
    tally::Tally,
};
use crate::{
    failure::{Failure, NOT_PROCESSED, is_grpc},
    metrics::{GrpcStatus, Retry},
    overload,
    refused::Refused,
    snapshot::HeaderChanges,
};

/// Answers one request.
pub(super) async fn serve(
    connection: Rc<Connection>,
    progress: Rc<Progress>,
    request: Request<RequestBody>,
) -> Response<ResponseBody> {
    let (parts, mut unread) = request.into_parts();
    let version = parts.version;
    let waits_for_100 = parts.headers.contains_key(header::EXPECT);
    let mut tally = Tally::start(connection, progress, &parts, is_grpc(&parts.method, &parts.headers));
    let mut grant = None;
    let worker = &tally.connection().slot.worker;
    // Before anything is drawn or read for it. A fleet may find room with another sidecar.
    let overloaded = worker.overload.is_active(overload::Action::StopRequests).then(|| match worker.role {
        Role::Fleet => Refusal::Failure(Failure::Overloaded),
        Role::Sidecar => Refusal::NotProcessed(Failure::Overloaded),
    });
    let reads_on = !waits_for_100 && overloaded.is_none();
    let answer = match overloaded {
        None => forward(&mut tally, parts, &mut unread, &mut grant).await,
        Some(refusal) => Err(refusal),
    };
    if matches!(answer, Err(Refusal::Failure(_) | Refusal::NotProcessed(_) | Refusal::Preflight(_)))
        && version != Version::HTTP_2
        && reads_on
    {
        // A connection of whose request all has come can be kept. The others end, and take what still comes meanwhile (`http1::server`):
        // the answer waits for nobody's content.
        unread.discard_arrived();
    }
    let mut ends = false;
    let mut response = match answer {
        Ok(Answer { response, lease, limit }) => response.map(|body| ResponseBody::upstream(body, lease, limit, tally)),
        Err(Refusal::Failure(failure)) => {
            ends = failure.ends_connection();
            tally.fail(&failure, Instant::now());
            local(&failure, tally)
        }
        Err(Refusal::NotProcessed(failure)) => {
            tally.fail(&failure, Instant::now());
            // For the fleet, not for a client: its form does not depend on what was asked.
            let mut response = failure.response(false).map(|body| ResponseBody::local(body, tally));
            response.headers_mut().insert(NOT_PROCESSED, HeaderValue::from_static("1"));
            response
        }
        Err(Refusal::Preflight(headers)) => {
            let now = Instant::now();
            tally.answered(StatusCode::OK, now);
            tally.finish(now);
            let mut response = Response::new(ResponseBody::local(Bytes::new(), tally));
            *response.headers_mut() = headers;
            response
        }
        Err(Refusal::Switched { response, upstream, lease }) => {
            response.map(|()| ResponseBody::tunnel(upstream, lease, tally))
        }
    };
    if let Some(grant) = grant {
        grant.write(response.headers_mut());
    }
    // A tunnel is no longer a connection of HTTP/1.1, which could be kept for another request.
    let keeps = response.status() == StatusCode::SWITCHING_PROTOCOLS;
    ends |= !keeps && response.body().connection().ends_after_answer();
    if ends && version != Version::HTTP_2 {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// Answers what could not be read as a request.
pub(super) fn refuse(connection: &Rc<Connection>, failure: &Failure) -> Response<ResponseBody> {
    let mut tally = Tally::unread(Rc::clone(connection));
    tally.fail(failure, Instant::now());
    local(failure, tally)
}

fn local(failure: &Failure, tally: Tally) -> Response<ResponseBody> {
    failure.response(tally.is_grpc()).map(|body| ResponseBody::local(body, tally))
}

/// What an upstream answers.
struct Answer {
    response: Response<UpstreamBody>,
    lease: Lease,
    /// How long the rest of it may take.
    limit: Option<Limit>,
}

/// Why the answer is not simply an upstream's.
enum Refusal {
    Failure(Failure),
    /// The application has not seen the request; the fleet tries another endpoint.
    NotProcessed(Failure),
    /// What a browser asks before its request is answered here, with these headers.
    Preflight(HeaderMap),
    /// Both sides have switched: bytes are passed from now on.
    Switched {
        response: Response<()>,
        upstream: Stream,
        lease: Lease,
    },
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

/// `grant` is what any answer tells the browser's script that asked.
async fn forward(
    tally: &mut Tally,
    mut parts: request::Parts,
    unread: &mut RequestBody,
    grant: &mut Option<Box<Grant>>,
) -> Result<Answer, Refusal> {
    let connection = Rc::clone(tally.connection());
    let worker = &connection.slot.worker;
    let chain = current(&connection)?;
    if parts.method == Method::CONNECT {
        return Err(Failure::MethodRefused.into());
    }
    headers::check_request(&mut parts)?;
    let downstream = if parts.version == Version::HTTP_2 { Wire::Http2 } else { Wire::Http1 };
    let has_body = !unread.is_end_stream();
    let upgrade = headers::wants_websocket(&parts, has_body);
    headers::clean_request(&mut parts.headers, parts.version);
    match worker.role {
        Role::Fleet => {
            let (ip, value) = connection.peer_value();
            headers::add_forwarded(&mut parts.headers, ip, value, connection.is_tls());
        }
        Role::Sidecar => {}
    }
    tally.pass_trace_on(&mut parts.headers);
    if downstream == Wire::Http1 {
        if parts.version == Version::HTTP_10 && !parts.headers.contains_key(header::HOST) {
            // Whatever we speak onwards needs one.
            let host = HeaderValue::from_str(&connection.local.to_string());
            parts.headers.insert(header::HOST, host.map_err(|_| Failure::BadRequest(Refused::Host, "no Host"))?);
        }
        parts.version = Version::HTTP_11;
    }
    if upgrade {
        headers::keep_websocket(&mut parts.headers);
    }

    let mut action = Route::first(&chain, &parts)?;
    let after_delay;
    if let Action::Forward { split, policy } = action {
        if let Some(policy) = &policy.cors {
            match cors::judge(policy, &parts) {
                Verdict::Nothing => {}
                Verdict::Grant(of) => *grant = Some(of),
                Verdict::Preflight(headers) => return Err(Refusal::Preflight(headers)),
            }
        }
        if let Some(fault) = &policy.fault
            && matching::headers(&fault.headers, &parts, chain.tls.is_some())
            && fault::inject(fault, split, tally).await?
        {
            after_delay = current(&connection)?;
            action = Route::first(&after_delay, &parts)?;
        }
    }
    let (split, policy) = match action {
        Action::Forward { split, policy } => (split, policy),
        Action::Respond(status) => return Err(Failure::DirectResponse(*status).into()),
    };
    let user = User::of(&policy.affinity, &parts.headers);
    let cluster = user.hash.map_or_else(|| split.draw(), |hash| split.drawn_by(hash)).ok_or(Failure::NoRoute)?;
    headers::change(&mut parts.headers, &policy.request_headers);
    if let Some(rewrite) = &policy.rewrite {
        rewrite::apply(rewrite, &mut parts)?;
    }
    let wire = cluster.wire(downstream);
    if upgrade && wire != Wire::Http1 {
        return Err(Failure::UpgradeRefused.into());
    }
    tally.drawn(cluster);
    let admitted = cluster.admit()?;

    let mut body = std::mem::replace(unread, RequestBody::Empty);
    if !split.mirrors.is_empty() && !upgrade {
        let original = mirror::Original {
            wire: downstream,
            tls: connection.is_tls(),
            grpc: tally.is_grpc(),
            started: tally.started(),
            timeout: policy.timeout,
            local: connection.local,
        };
        body = mirror::copy(&split.mirrors, &parts, body, original);
    }
    if wire != downstream
        && let Err(failure) = headers::translate(&mut parts, wire, body.is_end_stream(), connection.is_tls())
    {
        *unread = body;
        return Err(failure.into());
    }
    // Both sides of a WebSocket talk for as long as they like.
    let retry = policy.retry.as_ref().filter(|_| !upgrade);
    let mut end = RequestEnd::Reached;
    if policy.timeout.is_some() || retry.is_some_and(|retry| retry.per_try_timeout.is_some()) {
        (body, end) = RequestEnd::of(body);
    }
    let mut limit = policy.timeout.map(|timeout| end.and(timeout));
    let mut outgoing = Outgoing::new(parts, body, retry.is_some() || repeatable(cluster, wire));
    let retries = Retries::new(retry, cluster);
    let progress = Rc::clone(tally.progress());
    progress.limit(policy.stream_idle.or(chain.idle).filter(|limit| !limit.is_zero()));
    let sent = {
        let mut sending = pin!(send(tally, cluster, retries, &end, wire, &mut outgoing, connection.local));
        poll_fn(|cx| {
            if let Poll::Ready(sent) = sending.as_mut().poll(cx) {
                return Poll::Ready(sent);
            }
            if limit.as_mut().is_some_and(|limit| limit.as_mut().poll(cx).is_ready()) {
                return Poll::Ready(Err(Failure::UpstreamTimeout.into()));
            }
            progress.take_idle().map_or(Poll::Pending, |by| Poll::Ready(Err(by.failure().into())))
        })
        .await
    };
    // Still awaited: the time of the route or of the stream is over.
    if let Some(endpoint) = outgoing.awaited.take()
        && !matches!(sent, Err(Refusal::Failure(Failure::RequestIdle)))
    {
        cluster.unanswered(&endpoint);
    }
    if let Some(request) = outgoing.next.take() {
        *unread = request.into_body();
    }
    let (mut response, lease) = sent?;
    let lease = lease.admitted(admitted);
    tally.answered(response.status(), Instant::now());
    if tally.is_grpc()
        && let Some(status) = response.headers().get("grpc-status")
    {
        tally.set_grpc_status(GrpcStatus::parse(status.as_bytes()));
    }
    user.give_cookies(response.headers_mut());
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        return Err(if upgrade {
            switched(tally, response, lease, &policy.response_headers)
        } else {
            Failure::UpstreamProtocol.into()
        });
    }
    headers::clean_response(response.headers_mut(), version_on(wire), cluster.config.tls.is_none());
    if wire != downstream && response.status() == StatusCode::NO_CONTENT {
        // Some HTTP/2 clients take one with it for malformed (RFC 9110, 8.6).
        response.headers_mut().remove(header::CONTENT_LENGTH);
    }
    headers::change(response.headers_mut(), &policy.response_headers);
    *response.version_mut() = version_on(downstream);
    Ok(Answer { response, lease, limit })
}

fn current(connection: &Connection) -> Result<Rc<Chain>, Failure> {
    match connection.current() {
        Current::Chain(chain) => Ok(chain),
        Current::Revoked => Err(Failure::Unauthorized),
    }
}

fn version_on(wire: Wire) -> Version {
    match wire {
        Wire::Http2 => Version::HTTP_2,
        Wire::Http1 | Wire::Tcp => Version::HTTP_11,
    }
}

/// Sends the request to endpoints of its cluster until one answers. It is tried again when it is certain that it was not processed, when
/// a kept connection of an application was closed instead of an answer and it is idempotent, and as far as `retries` allow.
async fn send(
    tally: &mut Tally,
    cluster: &Rc<Cluster>,
    mut retries: Retries<'_>,
    end: &RequestEnd,
    wire: Wire,
    outgoing: &mut Outgoing,
    local: SocketAddr,
) -> Result<(Response<UpstreamBody>, Lease), Refusal> {
    let connection = Rc::clone(tally.connection());
    let mut failed: Vec<SocketAddr> = Vec::new();
    // Those whose answer was not good enough: others are preferred.
    let mut avoided: Vec<SocketAddr> = Vec::new();
    let (mut fresh, mut tried, mut again) = (false, false, None);
    let mut certain = 0;
    while certain < MAX_TRIES {
        let others = if avoided.is_empty() { None } else { cluster.pick(&[&*failed, &*avoided].concat(), local) };
        let Some(endpoint) = others.or_else(|| cluster.pick(&failed, local)) else {
            break;
        };
        let Some(request) = outgoing.next.take() else {
            break;
        };
        if let Some(why) = again.take() {
            connection.slot.metrics.retried(why);
        }
        let now = if tried { Instant::now() } else { tally.started() };
        tried = true;
        tally.attempted(endpoint.address);
        certain += 1;
        outgoing.awaited = cluster.config.traffic.outliers.is_some().then(|| Rc::clone(&endpoint));
        let sending = endpoint.send(&cluster.connector, wire, request, fresh, now);
        let sent = match retries.per_try_timeout() {
            None => Some(sending.await),
            Some(allowed) => tokio::select! {
                biased;
                sent = sending => Some(sent),
                () = end.and(allowed) => None,
            },
        };
        outgoing.awaited = None;
        let Some(sent) = sent else {
            cluster.unanswered(&endpoint);
            if !(retries.want_after(&Failure::UpstreamTimeout) && retries.take() && outgoing.again()) {
                return Err(Failure::UpstreamTimeout.into());
            }
            avoided.push(endpoint.address);
            again = Some(Retry::Policy);
            certain -= 1;
            retries.back_off().await;
            continue;
        };
        again = match sent {
            Ok((response, lease)) => {
                cluster.answered(&endpoint, &response, tally.is_grpc());
                if !is_not_processed(cluster, &response) {
                    if retries.want_instead_of(&response) && retries.take() && outgoing.again() {
                        avoided.push(endpoint.address);
                        tokio::task::spawn_local(body::read_out(response.into_body(), lease));
                        again = Some(Retry::Policy);
                        certain -= 1;
                        retries.back_off().await;
                        continue;
                    }
                    outgoing.settle();
                    return Ok((response, lease));
                }
                failed.push(lease.address());
                tokio::task::spawn_local(body::read_out(response.into_body(), lease));
                outgoing.again().then_some(Retry::NotProcessed)
            }
            Err(SendError::Connect { request, error }) => {
                cluster.unreachable(&endpoint);
                tracing::debug!(cluster = cluster.config.name, %error, "endpoint not reached");
                failed.push(endpoint.address);
                outgoing.next = Some(*request);
                Some(Retry::Connect)
            }
            Err(SendError::Overflow { request }) => {
                outgoing.next = Some(*request);
                return Err(Failure::Overflow.into());
            }
            Err(SendError::Stale { request }) => {
                fresh = true;
                if wire == Wire::Http2 {
                    // It is known now that this connection takes no more requests. An endpoint may have several such.
                    certain -= 1;
                }
                outgoing.next = Some(*request);
                Some(Retry::Stale)
            }
            Err(SendError::Refused { error }) => {
                tracing::debug!(cluster = cluster.config.name, endpoint = %endpoint.address, %error, "refused");
                if cluster.has_alternatives() {
                    failed.push(endpoint.address);
                }
                outgoing.again().then_some(Retry::NotProcessed)
            }
            Err(SendError::Lost { error }) => {
                tracing::debug!(cluster = cluster.config.name, endpoint = %endpoint.address, %error, "no answer");
                let failure = error.failure();
                if !error.is_of_client() {
                    cluster.unanswered(&endpoint);
                }
                if !(retries.want_after(&failure) && retries.take() && outgoing.again()) {
                    return Err(Refusal::Failure(failure));
                }
                avoided.push(endpoint.address);
                certain -= 1;
                retries.back_off().await;
                Some(Retry::Policy)
            }
        };
    }
    // Whichever way it got here, no application has seen the last try.
    Err(match connection.slot.worker.role {
        Role::Sidecar => Refusal::NotProcessed(Failure::ConnectFailed),
        Role::Fleet if tried => Failure::ConnectFailed.into(),
        Role::Fleet => Failure::NoHealthyUpstream.into(),
    })
}

fn switched(tally: &mut Tally, response: Response<UpstreamBody>, lease: Lease, changes: &HeaderChanges) -> Refusal {
    let (mut parts, body) = response.into_parts();
    let Some(upstream) = body.into_stream() else {
        return Failure::UpstreamProtocol.into();
    };
    tally.upgraded();
    headers::clean_response(&mut parts.headers, Version::HTTP_11, true);
    headers::change(&mut parts.headers, changes);
    headers::keep_websocket(&mut parts.headers);
    Refusal::Switched { response: Response::from_parts(parts, ()), upstream, lease }
}
