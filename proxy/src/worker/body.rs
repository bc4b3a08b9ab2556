//! Bodies on their way through: a request's, and a response's, which is measured.

use std::{
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures::{FutureExt, channel::oneshot, future::Shared};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use tokio::time::{Instant, sleep, timeout};

use super::{
    connection::Connection,
    http1::{self, server},
    http2, mirror,
    pool::{Lease, UpstreamError},
    progress::Progress,
    replay::Attempt,
    stream::Stream,
    tally::Tally,
};
use crate::{failure::Failure, metrics::GrpcStatus};

/// How much of a body that nobody wants is read, in bytes, and of an answer for how long.
const MAX_DISCARD: usize = 256 * 1024;
const MAX_DISCARD_TIME: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub(super) enum BodyError {
    #[error("reading the request's body from the client failed: {0}")]
    Client(#[source] ClientError),
    #[error("reading the response's body from the upstream failed: {0}")]
    Upstream(#[source] UpstreamError),
    #[error("the response took longer than is allowed")]
    TimedOut,
    #[error("the request is being sent again on another connection")]
    Superseded,
    #[error("this copy of a request was given up")]
    CopyGivenUp,
}

impl BodyError {
    /// What the client is told, and its request is counted as.
    pub(super) fn failure(&self) -> Failure {
        match self {
            Self::Client(ClientError::Http1(http1::Error::Malformed(malformed))) => malformed.failure(),
            Self::Client(ClientError::Http1(_) | ClientError::Http2(_))
            | Self::Upstream(_)
            | Self::TimedOut
            | Self::Superseded
            | Self::CopyGivenUp => Failure::ClientGone,
        }
    }
}

/// What went wrong on a connection from a client.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    #[error(transparent)]
    Http1(#[from] http1::Error),
    #[error(transparent)]
    Http2(#[from] h2::Error),
}

/// A request's body as it comes from a client.
pub(super) enum ClientBody {
    Http1(server::RequestBody),
    Http2(http2::Incoming, Rc<Progress>),
    /// What is read along for a copy of a request.
    Copied(mirror::CopiedBody),
    Watched(Box<Watched>),
    Mirrored(Box<Mirrored>),
}

/// A body that copies of a request read along.
pub(super) struct Mirrored {
    pub(super) body: ClientBody,
    pub(super) copies: Vec<mirror::Feed>,
}

/// A body whose end, or the end of whoever reads it, is told by dropping `read`.
pub(super) struct Watched {
    body: ClientBody,
    read: Option<oneshot::Sender<()>>,
}

/// Ends when a request has taken too long.
pub(super) type Limit = Pin<Box<dyn Future<Output = ()>>>;

/// The end of a request: how long a client needs to send it is its own affair, and no limit begins before.
#[derive(Clone)]
pub(super) enum RequestEnd {
    Reached,
    Awaited(Shared<oneshot::Receiver<()>>),
}

impl RequestEnd {
    /// Of a body that has not been read yet.
    pub(super) fn of(body: RequestBody) -> (RequestBody, Self) {
        match body {
            RequestBody::Once(body) if !body.is_end_stream() => {
                let (read, end) = oneshot::channel();
                let body = ClientBody::Watched(Box::new(Watched { body, read: Some(read) }));
                (RequestBody::Once(body), Self::Awaited(end.shared()))
            }
            body @ (RequestBody::Empty | RequestBody::Once(_) | RequestBody::Replayable(_)) => (body, Self::Reached),
        }
    }

    /// So long from now, or from the end if that is later.
    pub(super) fn and(&self, allowed: Duration) -> Limit {
        match self {
            Self::Reached => Box::pin(sleep(allowed)),
            Self::Awaited(end) => {
                let end = end.clone();
                Box::pin(async move {
                    let _ = end.await;
                    sleep(allowed).await;
                })
            }
        }
    }
}

impl Body for ClientBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = match &mut *self {
            Self::Http1(body) => Pin::new(body).poll_frame(cx).map_err(ClientError::Http1),
            Self::Http2(body, progress) => {
                let frame = Pin::new(body).poll_frame(cx);
                progress.asked_client(&frame);
                frame.map_err(ClientError::Http2)
            }
            Self::Copied(body) => return Pin::new(body).poll_frame(cx),
            Self::Watched(watched) => {
                let frame = ready!(Pin::new(&mut watched.body).poll_frame(cx));
                if matches!(frame, None | Some(Err(_))) || watched.body.is_end_stream() {
                    watched.read = None;
                }
                return Poll::Ready(frame);
            }
            Self::Mirrored(mirrored) => {
                let frame = ready!(Pin::new(&mut mirrored.body).poll_frame(cx));
                let ended = mirrored.body.is_end_stream();
                mirrored.copies.retain_mut(|copy| copy.pass_on(frame.as_ref(), ended));
                return Poll::Ready(frame);
            }
        };
        frame.map_err(BodyError::Client)
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Http1(body) => body.is_end_stream(),
            Self::Http2(body, _) => body.is_end_stream(),
            Self::Copied(body) => body.is_end_stream(),
            Self::Watched(watched) => watched.body.is_end_stream(),
            Self::Mirrored(mirrored) => mirrored.body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Http1(body) => body.size_hint(),
            Self::Http2(body, _) => body.size_hint(),
            Self::Copied(body) => body.size_hint(),
            Self::Watched(watched) => watched.body.size_hint(),
            Self::Mirrored(mirrored) => mirrored.body.size_hint(),
        }
    }
}

/// A request's body on its way to an upstream.
pub(super) enum RequestBody {
    Empty,
    /// Cannot be sent again once it was begun.
    Once(ClientBody),
    Replayable(Attempt),
}

impl RequestBody {
    /// Throws away what has come of it, up to a bound, and waits for no more.
    pub(super) fn discard_arrived(&mut self) {
        let _ = discard(self).now_or_never();
    }
}

/// Reads an answer that is for nobody, so that its connection can be used again.
pub(super) async fn read_out(mut body: UpstreamBody, lease: Lease) {
    let read = timeout(MAX_DISCARD_TIME, discard(&mut body)).await.unwrap_or(false);
    // What is left of the request is being sent elsewhere.
    if read && body.is_request_sent() {
        lease.release(body, Instant::now());
    }
}

/// Reads an answer that is for nobody, however long it is. Returns its trailers; `None` if it had no end.
pub(super) async fn read_whole(mut body: UpstreamBody, lease: Lease) -> Option<HeaderMap> {
    let mut trailers = HeaderMap::new();
    while let Some(frame) = body.frame().await {
        if let Ok(found) = frame.ok()?.into_trailers() {
            trailers = found;
        }
    }
    if body.is_request_sent() {
        lease.release(body, Instant::now());
    }
    Some(trailers)
}

/// A response's body as it comes from an upstream.
pub(super) enum UpstreamBody {
    Http1(http1::client::AnswerBody),
    Http2(http2::client::AnswerBody),
}

impl UpstreamBody {
    /// Whether there is nothing to be waited for.
    fn has_arrived(&self) -> bool {
        match self {
            Self::Http1(body) => body.has_arrived(),
            Self::Http2(body) => body.is_end_stream(),
        }
    }

    fn is_request_sent(&self) -> bool {
        match self {
            Self::Http1(body) => body.is_request_sent(),
            Self::Http2(_) => true, // A stream is given up alone.
        }
    }

    /// Whether its request is still being sent.
    fn is_request_under_way(&self) -> bool {
        match self {
            Self::Http1(body) => body.is_request_under_way(),
            Self::Http2(body) => body.is_request_under_way(),
        }
    }

    /// Waits until no more of its request is to be sent. The answer has been read to its end.
    fn poll_request_over(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Self::Http1(body) => body.poll_request_over(cx),
            Self::Http2(body) => body.poll_request_over(cx),
        }
    }

    /// The connection, where it was switched to another protocol.
    pub(super) fn into_stream(self) -> Option<Stream> {
        match self {
            Self::Http1(body) => body.into_stream(),
            Self::Http2(_) => None,
        }
    }
}

impl Body for UpstreamBody {
    type Data = Bytes;
    type Error = UpstreamError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, UpstreamError>>> {
        match &mut *self {
            Self::Http1(body) => Pin::new(body).poll_frame(cx).map_err(UpstreamError::Http1),
            Self::Http2(body) => Pin::new(body).poll_frame(cx).map_err(UpstreamError::Http2),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Http1(body) => body.is_end_stream(),
            Self::Http2(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Http1(body) => body.size_hint(),
            Self::Http2(body) => body.size_hint(),
        }
    }
}

/// Reads up to a bound. Returns whether the end was reached.
async fn discard<B: Body<Data = Bytes> + Unpin>(body: &mut B) -> bool {
    let mut left = MAX_DISCARD;
    while left > 0 {
        match body.frame().await {
            Some(Ok(frame)) => left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len)),
            Some(Err(_)) => return false,
            None => return true,
        }
    }
    false
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut *self {
            Self::Empty => Poll::Ready(None),
            Self::Once(body) => Pin::new(body).poll_frame(cx),
            Self::Replayable(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Once(body) => body.is_end_stream(),
            Self::Replayable(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Once(body) => body.size_hint(),
            Self::Replayable(body) => body.size_hint(),
        }
    }
}

/// A response's body on its way to the client. With its end the request is counted and the upstream's connection is
/// free again, unless it came before that of the request (see [`ResponseBody::poll_request_over`]); dropped before, both sides are
/// released and the request counts as given up by the client.
pub(super) struct ResponseBody {
    content: Content,
    tally: Tally,
}

enum Content {
    Local(Bytes),
    Upstream {
        body: UpstreamBody,
        lease: Lease,
        limit: Option<Limit>,
    },
    /// It has ended before its request, of which the rest is sent on.
    Early {
        body: UpstreamBody,
        _lease: Lease,
    },
    /// What a connection is from now on whose both sides have switched.
    Tunnel(Box<(Stream, Lease)>),
    Ended,
}

impl ResponseBody {
    pub(super) fn local(content: Bytes, tally: Tally) -> Self {
        Self { content: if content.is_empty() { Content::Ended } else { Content::Local(content) }, tally }
    }

    pub(super) fn upstream(body: UpstreamBody, lease: Lease, limit: Option<Limit>, tally: Tally) -> Self {
        let (ended, arrived) = (body.is_end_stream(), body.has_arrived());
        let limit = limit.filter(|_| !arrived);
        let mut this = Self { content: Content::Upstream { body, lease, limit }, tally };
        if arrived {
            this.tally.arrived();
        }
        if ended {
            this.end(); // A body that says that it is empty is not polled.
        }
        this
    }

    /// The upstream's connection, to be passed on when the answer that says so has been sent.
    pub(super) fn tunnel(upstream: Stream, lease: Lease, tally: Tally) -> Self {
        Self { content: Content::Tunnel(Box::new((upstream, lease))), tally }
    }

    pub(super) fn into_tunnel(self) -> Option<(Stream, Lease)> {
        match self.content {
            Content::Tunnel(tunnel) => Some(*tunnel),
            Content::Local(_) | Content::Upstream { .. } | Content::Early { .. } | Content::Ended => None,
        }
    }

    pub(super) fn connection(&self) -> &Connection {
        self.tally.connection()
    }

    /// Whether the answer is to be broken off though its client takes nothing of it at present: nothing has passed for too long, or its time
    /// is over.
    pub(super) fn is_over_time(&mut self, cx: &mut Context<'_>) -> bool {
        if self.tally.progress().is_idle() {
            return true;
        }
        // While its upstream is waited for, `poll_frame` looks at it.
        let Content::Upstream { limit: Some(limit), .. } = &mut self.content else { return false };
        if self.tally.progress().awaits_upstream() || limit.as_mut().poll(cx).is_pending() {
            return false;
        }
        self.content = Content::Ended;
        self.tally.not_read_in_time();
        true
    }

    /// The last moment that is known of the request.
    pub(super) fn latest(&self) -> Instant {
        self.tally.latest()
    }

    /// The request turned out not to be valid while it was answered.
    pub(super) fn fail(mut self, failure: &Failure) {
        self.tally.fail(failure, Instant::now());
    }

    /// The answer has no content, whatever its upstream has yet to say.
    pub(super) fn end_unread(&mut self) {
        if let Content::Upstream { .. } = self.content {
            self.end();
        }
    }

    fn end(&mut self) {
        let now = self.tally.last_byte();
        if let Content::Upstream { body, lease, .. } = std::mem::replace(&mut self.content, Content::Ended) {
            if body.is_request_under_way() {
                self.content = Content::Early { body, _lease: lease };
            } else {
                lease.release(body, now);
            }
        }
        self.tally.finish(now);
    }

    /// Waits, behind the end of the answer, for that of its request: some servers read on when they have answered. As long as it is
    /// sent the request is one that is open, under the limit for streams on which nothing moves. Where the upstream reads no further, or
    /// the limit is over, nothing more of it is sent, and what came of it has no end.
    pub(super) fn poll_request_over(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Content::Early { body, .. } = &mut self.content else { return Poll::Ready(()) };
        if body.poll_request_over(cx).is_pending() && !self.tally.progress().is_idle() {
            return Poll::Pending;
        }
        self.content = Content::Ended;
        self.tally.request_over();
        Poll::Ready(())
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        let (frame, last, late) = match &mut this.content {
            Content::Upstream { body, limit, .. } => {
                let frame = Pin::new(&mut *body).poll_frame(cx);
                let last = match &frame {
                    Poll::Ready(Some(Ok(frame))) => frame.is_trailers() || body.is_end_stream(),
                    Poll::Ready(Some(Err(_)) | None) => true,
                    Poll::Pending => false,
                };
                // An answer that has come is not late, however long nobody looked.
                let late = !last && limit.as_mut().is_some_and(|limit| limit.as_mut().poll(cx).is_ready());
                (frame, last, late)
            }
            Content::Local(content) => {
                let content = std::mem::take(content);
                this.content = Content::Ended;
                return Poll::Ready(Some(Ok(Frame::data(content))));
            }
            Content::Early { .. } | Content::Tunnel(_) | Content::Ended => return Poll::Ready(None),
        };
        this.tally.progress().asked_upstream(&frame);
        if late {
            this.content = Content::Ended;
            this.tally.fail(&Failure::UpstreamTimeout, Instant::now());
            return Poll::Ready(Some(Err(BodyError::TimedOut)));
        }
        if !last && let Some(by) = this.tally.progress().take_idle() {
            this.content = Content::Ended;
            this.tally.broken_off(by);
            return Poll::Ready(Some(Err(BodyError::TimedOut)));
        }
        match ready!(frame) {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    this.tally.add_bytes(data.len());
                } else if let Some(status) = frame.trailers_ref().and_then(|trailers| trailers.get("grpc-status")) {
                    this.tally.set_grpc_status(GrpcStatus::parse(status.as_bytes()));
                }
                if last {
                    this.end();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                // The head is out, so the client can only be told by an end that is none (RFC 9112, 8).
                this.content = Content::Ended;
                this.tally.fail(&Failure::UpstreamReset, Instant::now());
                Poll::Ready(Some(Err(BodyError::Upstream(error))))
            }
            None => {
                this.end();
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.content, Content::Ended | Content::Early { .. } | Content::Tunnel(_))
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Local(content) => SizeHint::with_exact(u64::try_from(content.len()).unwrap_or(u64::MAX)),
            Content::Upstream { body, .. } => body.size_hint(),
            Content::Early { .. } | Content::Tunnel(_) | Content::Ended => SizeHint::with_exact(0),
        }
    }
}
