//! HTTP/2 towards an upstream: requests share a connection, each on a stream of its own.

use std::{
    cell::Cell,
    future::{Future, poll_fn},
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use h2::{
    Reason,
    client::{Builder, SendRequest},
};
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use tokio_util::task::AbortOnDropHandle;

use super::{
    super::{body::RequestBody, headers::Peer, stream::Stream},
    Error, Incoming, REMEMBERED, REMEMBERED_FOR, SEND_BUFFER, SHARED_FRAMES, SHARED_WINDOW, STREAM_WINDOW,
    batch::Batch,
    body::{Outgoing, Part, Unsent},
    max_headers,
    quiet::Quiet,
};

/// Why a request has no answer.
pub(in super::super) enum NoAnswer {
    /// The connection takes no more requests.
    Unsent { request: Box<Request<RequestBody>>, error: Error },
    /// Sent, wholly or in part, or not to be said in HTTP/2.
    Sent(Error),
}

/// A connection that its streams share. It ends behind the last of them when it is dropped.
pub(in super::super) struct Connection {
    sender: SendRequest<Part>,
    over: Rc<Cell<bool>>,
}

impl Connection {
    /// `more` is told when the server takes more streams at once than before.
    pub(in super::super) async fn new(
        stream: Stream,
        upstream: Peer,
        more: impl Fn() + 'static,
    ) -> Result<Self, Error> {
        let mut builder = Builder::new();
        builder
            .enable_push(false)
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(SHARED_WINDOW)
            .data_frame_budget(SHARED_FRAMES)
            .max_concurrent_reset_streams(REMEMBERED)
            .reset_stream_duration(REMEMBERED_FOR)
            .max_local_error_reset_streams(None)
            .max_header_list_size(max_headers(upstream))
            .max_send_buffer_size(SEND_BUFFER)
            // Until the server has said how many it takes.
            .initial_max_send_streams(100);
        let (sender, mut connection) = builder.handshake(Quiet::new(Batch::new(stream, None))).await?;
        let over = Rc::new(Cell::new(false));
        let ended = Rc::clone(&over);
        tokio::task::spawn_local(async move {
            let mut most = connection.max_concurrent_send_streams();
            let result = poll_fn(|cx| {
                let result = Pin::new(&mut connection).poll(cx);
                let before = std::mem::replace(&mut most, connection.max_concurrent_send_streams());
                if most > before {
                    more();
                }
                result
            });
            if let Err(error) = result.await {
                tracing::debug!(%error, "connection to an upstream ended");
            }
            ended.set(true);
        });
        Ok(Self { sender, over })
    }

    /// Whether it takes no more requests, as far as is known.
    pub(in super::super) fn is_over(&self) -> bool {
        self.over.get()
    }

    /// How many streams the server takes at once (RFC 9113, 5.1.2).
    pub(in super::super) fn most_streams(&self) -> usize {
        self.sender.current_max_send_streams()
    }

    /// Sends a request and waits for the head of its answer. Dropped before, the stream is reset.
    pub(in super::super) async fn send(&self, request: Request<RequestBody>) -> Result<Response<AnswerBody>, NoAnswer> {
        let mut sender = self.sender.clone();
        // A handle that has no stream yet is ready, or never will be.
        if let Poll::Ready(Err(error)) = sender.poll_ready(&mut Context::from_waker(Waker::noop())) {
            self.over.set(true);
            return Err(NoAnswer::Unsent { request: Box::new(request), error: error.into() });
        }
        let (parts, body) = request.into_parts();
        let ended = body.is_end_stream();
        let request = Request::from_parts(parts, ());
        let (answer, stream) = sender.send_request(request, ended).map_err(|error| NoAnswer::Sent(error.into()))?;
        drop(sender);
        let mut answer = pin!(answer);
        let mut sending = (!ended).then(|| Outgoing::new(stream, body));
        let response = poll_fn(|cx| {
            if let Some(outgoing) = &mut sending {
                match outgoing.poll(cx) {
                    Poll::Pending => {}
                    Poll::Ready(Ok(()) | Err(Unsent::Stream)) => sending = None,
                    Poll::Ready(Err(Unsent::Body(error))) => {
                        return Poll::Ready(Err(Error::Client(Box::new(error))));
                    }
                }
            }
            answer.as_mut().poll(cx).map_err(Error::Stream)
        });
        let (parts, stream) = response.await.map_err(NoAnswer::Sent)?.into_parts();
        let incoming = Incoming::new(stream, &parts.headers);
        Ok(Response::from_parts(parts, AnswerBody { incoming, rest: sending.map(send_rest) }))
    }
}

/// The answer came before the end of the request, which is sent on by a task of its own: an upstream may read on while nobody
/// reads its answer. The task ends with the answer's body at the latest.
fn send_rest(mut outgoing: Outgoing<RequestBody>) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::task::spawn_local(async move {
        if let Err(Unsent::Body(_)) = poll_fn(|cx| outgoing.poll(cx)).await {
            outgoing.break_off(Reason::CANCEL);
        }
    }))
}

/// The body of an answer. Dropped before its end, or that of its request, the stream is reset.
pub(in super::super) struct AnswerBody {
    incoming: Incoming,
    /// Sends what is left of the request.
    rest: Option<AbortOnDropHandle<()>>,
}

impl AnswerBody {
    /// Whether the request is still being sent.
    pub(in super::super) fn is_request_under_way(&self) -> bool {
        self.rest.as_ref().is_some_and(|rest| !rest.is_finished())
    }

    /// Waits until no more of the request is to be sent. h2 says when the upstream takes no more of it.
    pub(in super::super) fn poll_request_over(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.rest.as_mut().map_or(Poll::Ready(()), |rest| Pin::new(rest).poll(cx).map(drop))
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        Pin::new(&mut self.incoming).poll_frame(cx).map_err(Error::Stream)
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}
