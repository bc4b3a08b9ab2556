//! HTTP/1.1 towards an upstream: whoever sends a request drives its connection, reads the answer's head, and then its
//! body. Its framing is read as strictly as a client's, as its next answer goes to another client.

use std::{
    cell::RefCell,
    future::{Future, poll_fn},
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker, ready},
};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, request};
use http_body::{Body, Frame, SizeHint};
use tokio::io::AsyncWrite;
use tokio_util::task::AbortOnDropHandle;

use super::{
    super::{body::RequestBody, headers::Peer, pool::Life, stream::Stream},
    Error, Input, Malformed, Outgoing, Output, Unsent,
    body::{Decoder, Encoder, Step},
    head::{self, AnswerHead},
};

/// Why a request has no answer.
pub(in super::super) enum NoAnswer {
    /// Not a byte of it was taken by the system.
    Unsent { request: Box<Request<RequestBody>>, error: Error },
    /// Sent, and the connection ended without a byte of an answer. It may be sent again as it is (RFC 9110, 9.2.2).
    Silent { request: Box<Request<RequestBody>>, error: Error },
    /// Sent, wholly or in part.
    Sent(Error),
}

/// A connection between two requests, or in the hands of one.
pub(in super::super) struct Connection(Rc<RefCell<Io>>);

struct Io {
    stream: Stream,
    input: Input,
    output: Output,
    request: Sent,
    life: Life,
    upstream: Peer,
    /// Who reads the answer, to be told when the request turns out broken.
    reader: Option<Waker>,
}

/// How much of a request was sent when the head of its answer had come, and afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sent {
    Whole,
    Partly,
    /// The client broke it off: what the upstream makes of it is no answer to be passed on.
    Broken,
}

/// A request on its way out.
struct Sending {
    message: Outgoing<RequestBody>,
    /// All of it is written, or no more of it can be.
    over: bool,
    /// Why no more of it can be written. An answer may have come nevertheless.
    failed: Option<io::Error>,
}

/// What is known of an exchange until the head of the answer is there.
struct Exchange {
    /// Whether the request's method is HEAD.
    to_head: bool,
    /// Until it is sent.
    request: Option<request::Parts>,
    looked_at: usize,
    /// Some byte of an answer has come.
    heard: bool,
    /// An empty map for the answer's headers.
    headers: HeaderMap,
}

impl Exchange {
    /// Lets go of a request that has been sent: its headers' space serves those of the answer, and the buffer that it was
    /// read into is free for others.
    fn recycle(&mut self) {
        if let Some(request) = self.request.take() {
            self.headers = request.headers;
            self.headers.clear();
        }
    }

    fn read(&mut self, input: &mut Input, upstream: Peer) -> Result<Option<AnswerHead>, Malformed> {
        head::read_answer(&mut input.bytes, &mut self.looked_at, self.to_head, &mut self.headers, upstream)
    }
}

impl Connection {
    pub(in super::super) fn new(stream: Stream, upstream: Peer) -> Self {
        Self(Rc::new(RefCell::new(Io {
            stream,
            input: Input::new(),
            output: Output::default(),
            request: Sent::Whole,
            life: Life::begin(),
            upstream,
            reader: None,
        })))
    }

    pub(in super::super) fn life(&self) -> Life {
        self.0.borrow().life
    }

    /// Whether an unused connection is still open and silent. The event that it is not is noted by the runtime, so
    /// this costs no system call unless there was one.
    pub(in super::super) fn is_usable(&self) -> bool {
        let io = &mut *self.0.borrow_mut();
        let cx = &mut Context::from_waker(Waker::noop());
        io.input.is_empty() && io.input.poll_read(cx, &mut io.stream).is_pending()
    }

    /// Closes an unused connection, with a word of it to the other side where TLS has one.
    pub(in super::super) fn close(self) {
        let stream = &mut self.0.borrow_mut().stream;
        let _ = Pin::new(stream).poll_shutdown(&mut Context::from_waker(Waker::noop()));
    }

    /// Sends a request and waits for the head of its answer. Dropped before, the connection is closed. With `again`, a
    /// request that may be sent again is kept for that.
    pub(in super::super) async fn send(
        self,
        request: Request<RequestBody>,
        again: bool,
    ) -> Result<Response<AnswerBody>, NoAnswer> {
        let (parts, body) = request.into_parts();
        let length = if body.is_end_stream() { Some(0) } else { body.size_hint().exact() };
        let encoder = length.map_or_else(|| Encoder::chunked(Some(&parts.headers)), Encoder::Length);
        let copy = {
            let io = &mut *self.0.borrow_mut();
            io.life.request();
            let head = io.output.small();
            head::write_request(head, &parts, &encoder);
            // Of what is sent, as that is one piece.
            (again && length == Some(0) && parts.method.is_idempotent()).then(|| Bytes::copy_from_slice(head))
        };
        let message = Outgoing { body, encoder, ended: length == Some(0) };
        let mut sending = Sending { message, over: false, failed: None };
        let mut exchange = Exchange {
            to_head: parts.method == Method::HEAD,
            request: Some(parts),
            looked_at: 0,
            heard: false,
            headers: HeaderMap::default(),
        };
        let head = poll_fn(|cx| self.0.borrow_mut().poll_answer(cx, &mut sending, &mut exchange)).await;
        let AnswerHead { response, body, keep_alive } = match head {
            Ok(head) => head,
            Err(error) => {
                let unsent = self.0.borrow().is_unsent(&sending);
                let is_silent = matches!(error, Error::Closed | Error::Io(_)) && !exchange.heard;
                let copy = copy.filter(|_| is_silent).and_then(head::reread_request);
                return Err(match (exchange.request, copy) {
                    (Some(parts), _) if unsent => {
                        NoAnswer::Unsent { request: Box::new(Request::from_parts(parts, sending.message.body)), error }
                    }
                    (_, Some(parts)) => {
                        NoAnswer::Silent { request: Box::new(Request::from_parts(parts, RequestBody::Empty)), error }
                    }
                    (Some(_) | None, None) => NoAnswer::Sent(error),
                });
            }
        };
        let rest = if sending.failed.is_some() {
            self.0.borrow_mut().request = Sent::Partly;
            None
        } else if sending.over {
            None
        } else {
            Some(self.send_rest(sending))
        };
        Ok(response.map(|()| AnswerBody { connection: self, decoder: body, keep_alive, rest }))
    }

    /// The answer came before the end of the request, which is sent on by a task of its own: an upstream may read on
    /// while nobody reads its answer. The task ends with the answer's body at the latest.
    fn send_rest(&self, mut sending: Sending) -> AbortOnDropHandle<()> {
        self.0.borrow_mut().request = Sent::Partly;
        let io = Rc::clone(&self.0);
        AbortOnDropHandle::new(tokio::task::spawn_local(async move {
            let result = poll_fn(|cx| io.borrow_mut().poll_send(cx, &mut sending)).await;
            let mut io = io.borrow_mut();
            match result {
                Ok(()) if sending.failed.is_none() => io.request = Sent::Whole,
                Ok(()) => {}
                Err(_) => {
                    io.request = Sent::Broken;
                    if let Some(reader) = io.reader.take() {
                        reader.wake();
                    }
                }
            }
        }))
    }
}

/// The body of an answer, which holds the connection. Dropped, the connection is closed, whatever is left of the answer or of its
/// request.
pub(in super::super) struct AnswerBody {
    connection: Connection,
    decoder: Decoder,
    /// Whether the answer's head allows another request.
    keep_alive: bool,
    /// Sends what is left of the request.
    rest: Option<AbortOnDropHandle<()>>,
}

impl AnswerBody {
    /// Whether all of it has been read from the connection already.
    pub(in super::super) fn has_arrived(&self) -> bool {
        self.decoder.left().is_some_and(|left| left <= self.connection.0.borrow().input.bytes.len() as u64)
    }

    /// Whether the request was sent to its end.
    pub(in super::super) fn is_request_sent(&self) -> bool {
        self.connection.0.borrow().request == Sent::Whole
    }

    /// Whether the request is still being sent.
    pub(in super::super) fn is_request_under_way(&self) -> bool {
        self.rest.as_ref().is_some_and(|rest| !rest.is_finished())
    }

    /// Waits until no more of the request is to be sent, behind the end of the answer: what the upstream does now is that it reads on,
    /// or that it goes.
    pub(in super::super) fn poll_request_over(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.rest.as_mut().is_none_or(|rest| Pin::new(rest).poll(cx).is_ready()) {
            return Poll::Ready(());
        }
        let io = &mut *self.connection.0.borrow_mut();
        while let Ok(1..) = ready!(io.input.poll_read(cx, &mut io.stream)) {
            io.input.bytes.clear(); // Nobody has asked for it.
        }
        Poll::Ready(())
    }

    /// The connection for another request, if there may be one.
    pub(in super::super) fn release(self) -> Option<Connection> {
        let usable = {
            let mut io = self.connection.0.borrow_mut();
            io.input.rest();
            // Bytes behind the answer are none that was asked for.
            self.keep_alive && self.decoder.is_ended() && io.request == Sent::Whole && io.input.is_empty()
        };
        if usable {
            return Some(self.connection);
        }
        self.connection.close();
        None
    }

    /// The connection as what it was switched to by a 101.
    pub(in super::super) fn into_stream(self) -> Option<Stream> {
        let io = Rc::into_inner(self.connection.0)?.into_inner();
        let mut stream = io.stream;
        stream.unread(io.input.bytes.freeze());
        Some(stream)
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let this = &mut *self;
        let io = &mut *this.connection.0.borrow_mut();
        loop {
            if io.request == Sent::Broken {
                return Poll::Ready(Some(Err(Error::Closed)));
            }
            match this.decoder.decode(&mut io.input.bytes) {
                Ok(Step::Data(data)) => return Poll::Ready(Some(Ok(Frame::data(data)))),
                Ok(Step::Trailers(trailers)) => return Poll::Ready(Some(Ok(Frame::trailers(trailers)))),
                Ok(Step::End) => return Poll::Ready(None),
                Ok(Step::Read) => {}
                Err(error) => return Poll::Ready(Some(Err(error.into()))),
            }
            match io.input.poll_read(cx, &mut io.stream) {
                Poll::Ready(Ok(0)) if this.decoder == Decoder::UntilClose => {
                    this.decoder = Decoder::length(0);
                    return Poll::Ready(None);
                }
                Poll::Ready(Ok(0)) => return Poll::Ready(Some(Err(Error::Closed))),
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                Poll::Pending => {
                    if this.rest.is_some() {
                        io.reader = Some(cx.waker().clone());
                    }
                    return Poll::Pending;
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.decoder.is_ended()
    }

    fn size_hint(&self) -> SizeHint {
        self.decoder.left().map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

impl Io {
    /// Sends what can be sent of a request, and reads the head of its answer, which may come before its end.
    fn poll_answer(
        &mut self,
        cx: &mut Context<'_>,
        sending: &mut Sending,
        exchange: &mut Exchange,
    ) -> Poll<Result<AnswerHead, Error>> {
        if !sending.over {
            match self.poll_send(cx, sending) {
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Ready(Ok(())) | Poll::Pending => {}
            }
            if self.is_unsent(sending) {
                let error = sending.failed.take().map_or(Error::Closed, Error::Io);
                return Poll::Ready(Err(error));
            }
            if sending.over {
                exchange.recycle();
            }
        }
        loop {
            match ready!(self.input.poll_read(cx, &mut self.stream)) {
                Ok(0) => return Poll::Ready(Err(sending.failed.take().map_or(Error::Closed, Error::Io))),
                Ok(_) => exchange.heard = true,
                Err(error) => return Poll::Ready(Err(Error::Io(error))),
            }
            if let Some(head) = exchange.read(&mut self.input, self.upstream)? {
                return Poll::Ready(Ok(head));
            }
        }
    }

    /// Whether writing has failed with the first byte. TLS does not tell how much of what it was given has left.
    fn is_unsent(&self, sending: &Sending) -> bool {
        sending.over
            && self.output.written == 0
            && !self.output.small.is_empty()
            && matches!(sending.message.body, RequestBody::Empty)
            && !self.stream.is_tls()
    }

    /// Writes a request to its end. An error is one of the request's body; if the connection fails, sending is over.
    fn poll_send(&mut self, cx: &mut Context<'_>, sending: &mut Sending) -> Poll<Result<(), Error>> {
        match ready!(self.output.poll_send(cx, &mut self.stream, &mut sending.message)) {
            Ok(()) => sending.over = true,
            Err(Unsent::Io(error)) => {
                sending.over = true;
                sending.failed = Some(error);
            }
            Err(Unsent::Body(error)) => return Poll::Ready(Err(Error::Client(Box::new(error)))),
            Err(Unsent::Length) => return Poll::Ready(Err(Error::Length)),
        }
        Poll::Ready(Ok(()))
    }
}
