//! Copies of requests for other clusters, sent beside and forgotten. Whatever becomes of a copy, its request neither waits for it
//! nor fails by it, and the connections, load counters and ejections of the clusters that requests are drawn to see none of it.

use std::{
    cell::{Cell, RefCell},
    net::SocketAddr,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use futures::channel::oneshot;
use http::{
    HeaderMap, HeaderValue, Request, Response, Uri, header, request,
    uri::{Authority, Parts},
};
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Instant, sleep};

use super::{
    Shared,
    body::{self, BodyError, ClientBody, RequestBody, UpstreamBody},
    cluster::Cluster,
    headers,
    outgoing::{MAX_TRIES, Outgoing, is_not_processed, repeatable},
    pool::{Lease, SendError, Wire},
    replay::{MAX_REPLAY, keep},
};
use crate::{
    metrics::{GrpcStatus, MirrorMetrics, Mirrored},
    snapshot::{self, Share},
};

/// Copies that may be under way to a cluster on each thread. Of requests that come meanwhile there are none.
const MOST_COPIES: u32 = 128;
const GRPC_STATUS: &str = "grpc-status";
/// From the end of a copy to that of its answer, where the route has no time-out: Envoy's default of `RouteAction.timeout`.
const TIMEOUT: Duration = Duration::from_secs(15);

/// Where copies go.
pub(super) struct Mirror {
    /// Of the mirrors alone.
    cluster: Rc<Cluster>,
    share: Share,
    marks_host: bool,
    metrics: Option<MirrorMetrics>,
}

/// What a copy has to know of its request beside what is sent.
#[derive(Clone, Copy)]
pub(super) struct Original {
    pub(super) wire: Wire,
    /// It came in TLS.
    pub(super) tls: bool,
    pub(super) grpc: bool,
    /// When its headers were received.
    pub(super) started: Instant,
    /// Of its route.
    pub(super) timeout: Option<Duration>,
    /// The address that its connection was made to.
    pub(super) local: SocketAddr,
}

/// Begins the copies of a request. Returns its body, which they read along.
pub(super) fn copy(
    mirrors: &[Rc<Mirror>],
    parts: &request::Parts,
    body: RequestBody,
    original: Original,
) -> RequestBody {
    let mut copies = Vec::new();
    for mirror in mirrors.iter().filter(|mirror| mirror.share.draw()) {
        let length = body.size_hint().exact();
        // It may be no further behind its request than this, and of a body that is known to be longer there is none.
        if length.is_some_and(|length| length > MAX_REPLAY as u64) {
            mirror.count(Mirrored::TooLarge, original);
            continue;
        }
        let Some(under_way) = UnderWay::begin(&mirror.cluster.copies) else {
            mirror.count(Mirrored::Busy, original);
            continue;
        };
        let wire = mirror.cluster.wire(original.wire);
        let mut head = mirror.head(parts);
        if wire != original.wire && headers::translate(&mut head, wire, body.is_end_stream(), original.tls).is_err() {
            mirror.count(Mirrored::Cancelled, original);
            continue;
        }
        let original = Original { wire, ..original };
        let (copied, ended) = if body.is_end_stream() {
            (RequestBody::Empty, None)
        } else {
            let (feed, copied, ended) = Feed::new(length);
            copies.push(feed);
            (RequestBody::Once(ClientBody::Copied(copied)), Some(ended))
        };
        let outgoing = Outgoing::new(head, copied, repeatable(&mirror.cluster, wire));
        let mirror = Rc::clone(mirror);
        // Not joined: it ends at the latest with its time-out after the end of the request.
        tokio::task::spawn_local(async move {
            let outcome = tokio::select! {
                // A copy that was given up fails, too, and that is not the reason.
                biased;
                outcome = over(ended, original.timeout.unwrap_or(TIMEOUT)) => outcome,
                outcome = mirror.exchange(outgoing, original) => outcome,
            };
            mirror.count(outcome, original);
            drop(under_way);
        });
    }
    match body {
        RequestBody::Once(body) if !copies.is_empty() => {
            RequestBody::Once(ClientBody::Mirrored(Box::new(body::Mirrored { body, copies })))
        }
        body @ (RequestBody::Empty | RequestBody::Once(_) | RequestBody::Replayable(_)) => body,
    }
}

/// When a copy ends that has no answer by then, and why.
async fn over(ended: Option<oneshot::Receiver<Mirrored>>, allowed: Duration) -> Mirrored {
    if let Some(ended) = ended
        && let Ok(given_up) = ended.await
    {
        return given_up;
    }
    sleep(allowed).await;
    Mirrored::TimedOut
}

impl Mirror {
    /// `cluster` is one of the mirrors' own.
    pub(super) fn new(
        config: &snapshot::Mirror<Arc<snapshot::Cluster>>,
        cluster: Rc<Cluster>,
        worker: &Shared,
    ) -> Self {
        let labels = config.cluster.labels.as_ref();
        let metrics = labels.map(|labels| worker.metrics.mirror(labels, worker.thread));
        Self { cluster, share: config.share, marks_host: config.marks_host, metrics }
    }

    /// What a copy says.
    fn head(&self, parts: &request::Parts) -> request::Parts {
        let (mut head, ()) = Request::new(()).into_parts();
        head.method = parts.method.clone();
        head.uri = parts.uri.clone();
        head.version = parts.version;
        head.headers = parts.headers.clone();
        if self.marks_host {
            mark_host(&mut head);
        }
        head
    }

    fn count(&self, outcome: Mirrored, original: Original) {
        if let Some(metrics) = &self.metrics {
            metrics.record(outcome, original.started.elapsed());
        }
    }

    /// One try, but for what was certainly not processed: that is tried at other endpoints, as a user's request is.
    async fn exchange(&self, mut outgoing: Outgoing, original: Original) -> Mirrored {
        let mut failed: Vec<SocketAddr> = Vec::new();
        let mut fresh = false;
        for _ in 0..MAX_TRIES {
            let Some(endpoint) = self.cluster.pick(&failed, original.local) else { break };
            let Some(request) = outgoing.next.take() else { break };
            let sent = endpoint.send(&self.cluster.connector, original.wire, request, fresh, Instant::now()).await;
            let cluster = self.cluster.config.name.as_str();
            match sent {
                Ok((response, lease)) => {
                    self.cluster.reached(&endpoint);
                    if !is_not_processed(&self.cluster, &response) {
                        outgoing.settle();
                        return answered(response, lease, original.grpc).await;
                    }
                    tracing::debug!(cluster, endpoint = %endpoint.address, "a copy was not processed");
                    failed.push(endpoint.address);
                    tokio::task::spawn_local(body::read_out(response.into_body(), lease));
                    outgoing.again();
                }
                Err(SendError::Stale { request }) => {
                    outgoing.next = Some(*request);
                    fresh = true;
                }
                Err(SendError::Connect { request, error }) => {
                    self.cluster.unreachable(&endpoint);
                    tracing::debug!(cluster, %error, "a copy is tried elsewhere");
                    failed.push(endpoint.address);
                    outgoing.next = Some(*request);
                }
                Err(SendError::Overflow { .. }) => return Mirrored::Busy,
                Err(SendError::Refused { error }) => {
                    tracing::debug!(cluster, endpoint = %endpoint.address, %error, "a copy was refused");
                    if self.cluster.has_alternatives() {
                        failed.push(endpoint.address);
                    }
                    outgoing.again();
                }
                Err(SendError::Lost { error }) => {
                    tracing::debug!(cluster, endpoint = %endpoint.address, %error, "copy not answered");
                    break;
                }
            }
        }
        Mirrored::Failed
    }
}

/// Reads an answer to its end.
async fn answered(response: Response<UpstreamBody>, lease: Lease, grpc: bool) -> Mirrored {
    let status = response.status();
    let said = response.headers().get(GRPC_STATUS).cloned();
    let Some(trailers) = body::read_whole(response.into_body(), lease).await else {
        return Mirrored::Failed;
    };
    let said = said.or_else(|| trailers.get(GRPC_STATUS).cloned());
    let grpc = grpc.then(|| {
        let parse = |said: HeaderValue| GrpcStatus::parse(said.as_bytes());
        said.map_or_else(|| GrpcStatus::of_http(status), parse)
    });
    Mirrored::Answered(status, grpc)
}

/// One of the copies under way, as long as this lives.
struct UnderWay(Rc<Cell<u32>>);

impl UnderWay {
    fn begin(count: &Rc<Cell<u32>>) -> Option<Self> {
        if count.get() >= MOST_COPIES {
            return None;
        }
        count.set(count.get() + 1);
        Some(Self(Rc::clone(count)))
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// As Envoy (`source/common/router/shadow_writer_impl.cc`).
fn mark_host(request: &mut request::Parts) {
    let host = request.headers.get(header::HOST).and_then(|host| marked(host.to_str().ok()?));
    if let Some(host) = host.and_then(|host| HeaderValue::try_from(host).ok()) {
        request.headers.insert(header::HOST, host);
    }
    let authority = request.uri.authority().and_then(|authority| marked(authority.as_str()));
    if let Some(authority) = authority.and_then(|authority| Authority::try_from(authority).ok()) {
        let mut parts: Parts = request.uri.clone().into_parts();
        parts.authority = Some(authority);
        if let Ok(uri) = Uri::from_parts(parts) {
            request.uri = uri;
        }
    }
}

/// `None` where nothing can follow the name: there is none, or it is an address in brackets.
fn marked(host: &str) -> Option<String> {
    if host.is_empty() || host.starts_with([':', '[']) {
        return None;
    }
    Some(match host.split_once(':') {
        Some((name, port)) => format!("{name}-shadow:{port}"),
        None => format!("{host}-shadow"),
    })
}

/// What a copy has not taken yet of its request's body.
struct Queue {
    content: Vec<u8>,
    trailers: Option<HeaderMap>,
    state: State,
    reader: Option<Waker>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    /// Nothing follows.
    Whole,
    GivenUp,
}

/// The end of a [`Queue`] that a request's body is passed on to. Dropped before its end, the copy is given up.
pub(super) struct Feed {
    queue: Rc<RefCell<Queue>>,
    /// Told why the copy is given up; dropped when its body is whole.
    ended: Option<oneshot::Sender<Mirrored>>,
}

impl Feed {
    fn new(length: Option<u64>) -> (Self, CopiedBody, oneshot::Receiver<Mirrored>) {
        let queue =
            Rc::new(RefCell::new(Queue { content: Vec::new(), trailers: None, state: State::Open, reader: None }));
        let (ended, end) = oneshot::channel();
        (Self { queue: Rc::clone(&queue), ended: Some(ended) }, CopiedBody { queue, left: length }, end)
    }

    /// Takes what was read of the body, which has `ended` with it. Returns whether the copy wants more.
    pub(super) fn pass_on(&mut self, read: Option<&Result<Frame<Bytes>, BodyError>>, mut ended: bool) -> bool {
        if self.ended.as_ref().is_none_or(oneshot::Sender::is_canceled) {
            return false;
        }
        let mut queue = self.queue.borrow_mut();
        match read {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    if !keep(&mut queue.content, data) {
                        drop(queue);
                        self.give_up(Mirrored::TooLarge);
                        return false;
                    }
                } else if let Some(trailers) = frame.trailers_ref() {
                    queue.trailers = Some(trailers.clone());
                    ended = true;
                }
            }
            Some(Err(_)) => return false,
            None => ended = true,
        }
        if ended {
            queue.state = State::Whole;
            self.ended = None;
        }
        if let Some(reader) = queue.reader.take() {
            reader.wake();
        }
        !ended
    }

    fn give_up(&mut self, why: Mirrored) {
        let Some(ended) = self.ended.take() else { return };
        let mut queue = self.queue.borrow_mut();
        queue.content = Vec::new();
        queue.state = State::GivenUp;
        if let Some(reader) = queue.reader.take() {
            reader.wake();
        }
        // Nobody hears it if the copy is over already.
        let _ = ended.send(why);
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.give_up(Mirrored::Cancelled);
    }
}

/// The body of a copy.
pub(super) struct CopiedBody {
    queue: Rc<RefCell<Queue>>,
    /// What is left of a body of known length.
    left: Option<u64>,
}

impl Body for CopiedBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        let mut queue = this.queue.borrow_mut();
        if !queue.content.is_empty() {
            let data = Bytes::from(std::mem::take(&mut queue.content));
            this.left = this.left.map(|left| left.saturating_sub(data.len() as u64));
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        match queue.state {
            State::Open => {
                queue.reader = Some(cx.waker().clone());
                Poll::Pending
            }
            State::Whole => Poll::Ready(queue.trailers.take().map(|trailers| Ok(Frame::trailers(trailers)))),
            State::GivenUp => Poll::Ready(Some(Err(BodyError::CopyGivenUp))),
        }
    }

    fn is_end_stream(&self) -> bool {
        let queue = self.queue.borrow();
        queue.state == State::Whole && queue.content.is_empty() && queue.trailers.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        self.left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use futures::FutureExt;
    use http_body_util::BodyExt;

    use super::*;

    #[test]
    fn a_host_is_marked_before_its_port() {
        let table = [
            ("shop.example", Some("shop.example-shadow")),
            ("shop:8080", Some("shop-shadow:8080")),
            ("10.0.0.1:80", Some("10.0.0.1-shadow:80")),
            ("[::1]:80", None),
            ("", None),
            (":80", None),
        ];
        for (host, expected) in table {
            assert_eq!(marked(host).as_deref(), expected, "{host}");
        }
    }

    #[test]
    fn what_a_copy_has_not_taken_holds_none_of_the_buffers_that_it_was_read_into() {
        let (mut feed, copied, _ended) = Feed::new(None);
        for _ in 0..1000 {
            let buffer: Arc<[u8]> = Arc::from([b'x'; 8 * 1024]);
            let part = Frame::data(Bytes::from_owner(Arc::clone(&buffer)).slice(..1));
            assert!(feed.pass_on(Some(&Ok(part)), false));
            assert_eq!(Arc::strong_count(&buffer), 1);
        }
        feed.pass_on(None, true);
        let all = copied.collect().now_or_never().unwrap().unwrap().to_bytes();
        assert_eq!(all, [b'x'; 1000][..]);
    }
}
