//! HTTP/1.1 towards a client: one request after the other is read, answered and, if both sides want it, followed by the
//! next. What the client sends meanwhile waits: at most one read of it here, the rest in the kernel.

use std::{
    cell::RefCell,
    future::{Future, poll_fn},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker, ready},
};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, Version, header};
use http_body::{Body, Frame, SizeHint};
use tokio::{
    io::AsyncWrite,
    time::{Duration, timeout},
};

use super::{
    super::{
        body::{self, ClientBody, ResponseBody},
        headers::Peer,
        progress::Progress,
        stream::Stream,
    },
    Error, Input, Malformed, Outgoing, Output,
    body::{Decoder, Encoder, Step},
    head::{self, Answer, RequestHead},
    thread,
};

/// How long a client may take to hear that its connection ends.
const LINGER: Duration = Duration::from_secs(1);

/// A connection from a client.
pub(in super::super) struct Connection {
    io: Rc<RefCell<Io>>,
    /// Empty, with the space of an earlier answer's.
    headers: HeaderMap,
    asked: Asked,
    client: Peer,
}

/// What is to be known of a request when it is answered.
struct Asked {
    version: Version,
    to_head: bool,
    takes_trailers: bool,
    keep_alive: bool,
}

struct Io {
    stream: Stream,
    progress: Rc<Progress>,
    input: Input,
    output: Output,
    /// What is left of the newest request's body.
    body: Decoder,
    /// Which request that is.
    number: u64,
    /// Somebody may still read it.
    held: bool,
    /// The client waits for a 100 before it sends it.
    expects: bool,
    broken: Option<Broken>,
    /// The connection's task, to be told when the body has been read or cannot be.
    task: Option<Waker>,
}

/// Why no more can be read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Broken {
    Gone,
    Malformed,
}

/// What became of an answer.
pub(in super::super) enum Sent {
    Whole,
    /// It was a 101: the connection is no longer one of HTTP.
    Switched(Box<ResponseBody>),
    /// The client has gone, or the answer broke off; neither can be told any more.
    Broken,
}

impl Connection {
    /// `progress` notes what comes of the bodies of requests.
    pub(in super::super) fn new(stream: Stream, progress: Rc<Progress>, client: Peer) -> Self {
        let io = Io {
            stream,
            progress,
            input: Input::new(),
            output: Output::default(),
            body: Decoder::length(0),
            number: 0,
            held: false,
            expects: false,
            broken: None,
            task: None,
        };
        let asked = Asked { version: Version::HTTP_11, to_head: false, takes_trailers: false, keep_alive: true };
        Self { io: Rc::new(RefCell::new(io)), headers: HeaderMap::new(), asked, client }
    }

    /// Waits for the next request. `None`: there will be none. After an error, the client is to be answered once more.
    ///
    /// `limit` is asked whenever there is nothing to be read, with whether a part of a head has come, and ends the wait.
    pub(in super::super) async fn request(
        &mut self,
        mut limit: impl FnMut(&mut Context<'_>, bool) -> Poll<()>,
    ) -> Result<Option<Request<body::RequestBody>>, Malformed> {
        let mut looked_at = 0;
        let head = poll_fn(|cx| {
            let io = &mut *self.io.borrow_mut();
            if ready!(io.poll_body_over(cx, &mut limit)).is_none() || !self.asked.keep_alive {
                return Poll::Ready(Ok(None));
            }
            loop {
                if !io.input.is_empty()
                    && let Some(head) =
                        head::read_request(&mut io.input.bytes, &mut looked_at, &mut self.headers, self.client)?
                {
                    return Poll::Ready(Ok(Some(head)));
                }
                match io.input.poll_read(cx, &mut io.stream) {
                    Poll::Ready(Ok(1..)) => {}
                    Poll::Ready(Ok(0) | Err(_)) => return Poll::Ready(Ok(None)),
                    Poll::Pending => {
                        ready!(limit(cx, !io.input.is_empty()));
                        return Poll::Ready(Ok(None));
                    }
                }
            }
        });
        match head.await {
            Ok(None) => Ok(None),
            Ok(Some(head)) => Ok(Some(self.take(head))),
            Err(malformed) => {
                self.asked =
                    Asked { version: Version::HTTP_11, to_head: false, takes_trailers: false, keep_alive: false };
                self.io.borrow_mut().broken = Some(Broken::Malformed);
                Err(malformed)
            }
        }
    }

    fn take(&mut self, head: RequestHead) -> Request<body::RequestBody> {
        let RequestHead { parts, body, keep_alive, expects, takes_trailers } = head;
        let to_head = parts.method == Method::HEAD;
        self.asked = Asked { version: parts.version, to_head, takes_trailers, keep_alive };
        if body.is_ended() {
            return Request::from_parts(parts, body::RequestBody::Empty);
        }
        let io = &mut *self.io.borrow_mut();
        (io.body, io.held, io.expects) = (body, true, expects);
        io.number += 1;
        let body = RequestBody { io: Rc::clone(&self.io), number: io.number };
        Request::from_parts(parts, body::RequestBody::Once(ClientBody::Http1(body)))
    }

    /// Waits for the answer to a request, or until the client has gone, which ends the work. That costs no system call:
    /// the runtime notes it. While a body is awaited, whoever reads it finds out.
    pub(in super::super) async fn unless_gone<T>(&self, mut work: Pin<&mut impl Future<Output = T>>) -> Option<T> {
        poll_fn(|cx| match work.as_mut().poll(cx) {
            Poll::Ready(result) => Poll::Ready(Some(result)),
            Poll::Pending => self.io.borrow_mut().poll_gone(cx).map(|()| None),
        })
        .await
    }

    /// Sends an answer to its end, and waits for that of its request where it comes later.
    pub(in super::super) async fn send(&mut self, response: Response<ResponseBody>) -> Sent {
        let (mut parts, mut body) = response.into_parts();
        let switches = parts.status == StatusCode::SWITCHING_PROTOCOLS;
        let mut message = {
            let io = &mut *self.io.borrow_mut();
            if io.broken == Some(Broken::Gone) {
                return Sent::Broken;
            }
            let length = if body.is_end_stream() { Some(0) } else { body.size_hint().exact() };
            let has_no_body = head::has_no_body(self.asked.to_head, parts.status);
            if (has_no_body || length == Some(0)) && !body.is_end_stream() {
                // An HTTP/2 server may say the end behind the head, and nobody reads so far.
                body.end_unread();
            }
            let encoder = match length {
                Some(length) => Encoder::Length(length),
                None if has_no_body => Encoder::Length(0),
                None if self.asked.version == Version::HTTP_10 => Encoder::UntilClose,
                None => Encoder::chunked(self.asked.takes_trailers.then_some(&parts.headers)),
            };
            if encoder == Encoder::UntilClose {
                // Where the end of the connection is that of the body, only a reset says that it is not whole, also when this is
                // dropped or the process killed.
                io.stream.reset_when_closed(true);
            }
            // A body that nobody has read to its end, or will, hides where the next request starts.
            self.asked.keep_alive &= encoder != Encoder::UntilClose
                && (io.body.is_ended() || io.held)
                && io.broken.is_none()
                && !(parts.headers.contains_key(header::CONNECTION) && head::says_close(&parts.headers));
            let answer = Answer {
                version: self.asked.version,
                to_head: self.asked.to_head,
                body: &encoder,
                keep_alive: self.asked.keep_alive || switches,
            };
            io.expects = false;
            let output = io.output.small();
            if !head::write_answer(output, &parts, &answer) {
                thread::write_date(body.latest(), output);
            }
            output.extend_from_slice(b"\r\n");
            Outgoing { body, encoder, ended: has_no_body || length == Some(0) }
        };
        parts.headers.clear();
        self.headers = parts.headers;

        let refused = self.io.borrow().broken.is_some();
        let sent = poll_fn(|cx| {
            let io = &mut *self.io.borrow_mut();
            if io.broken.is_some() && !refused {
                return Poll::Ready(None);
            }
            match io.output.poll_send(cx, &mut io.stream, &mut message) {
                Poll::Ready(Ok(())) => Poll::Ready(Some(true)),
                Poll::Ready(Err(_)) => Poll::Ready(Some(false)),
                Poll::Pending if message.body.is_over_time(cx) => Poll::Ready(Some(false)),
                Poll::Pending => {
                    ready!(io.poll_gone(cx));
                    Poll::Ready(None)
                }
            }
        });
        match sent.await {
            Some(true) if switches => Sent::Switched(Box::new(message.body)),
            Some(true) => {
                if message.encoder == Encoder::UntilClose {
                    self.io.borrow().stream.reset_when_closed(false);
                }
                poll_fn(|cx| message.body.poll_request_over(cx)).await;
                Sent::Whole
            }
            Some(false) => {
                self.break_off();
                Sent::Broken
            }
            None => {
                if self.io.borrow().broken == Some(Broken::Malformed) {
                    message.body.fail(&Malformed::ChunkSize.failure());
                }
                Sent::Broken
            }
        }
    }

    /// What has come of an answer before it broke off may tell the client why.
    fn break_off(&self) {
        let io = &mut *self.io.borrow_mut();
        let _ = io.output.poll_write(&mut Context::from_waker(Waker::noop()), &mut io.stream);
    }

    /// Ends the connection in order. Closing it with unread bytes would reset it, and the reset may overtake the answer
    /// (RFC 9112, 9.6): what the client still sends is read for a while then, and thrown away.
    pub(in super::super) async fn close(self) {
        let lingers = {
            let io = &mut *self.io.borrow_mut();
            // A body of which a part was thrown away must not come to its end.
            let broken = io.broken.replace(Broken::Gone);
            broken.is_some() || !io.body.is_ended() || !io.input.is_empty()
        };
        let shut_down = poll_fn(|cx| {
            let io = &mut *self.io.borrow_mut();
            ready!(Pin::new(&mut io.stream).poll_shutdown(cx))?;
            if !lingers {
                return Poll::Ready(Ok(()));
            }
            loop {
                io.input.bytes.clear();
                if ready!(io.input.poll_read(cx, &mut io.stream))? == 0 {
                    return Poll::Ready(Ok::<_, std::io::Error>(()));
                }
            }
        });
        let _ = timeout(LINGER, shut_down).await;
    }

    /// The connection's bytes, of which none that were read too far are lost.
    pub(in super::super) fn into_stream(self) -> Option<Stream> {
        let io = Rc::into_inner(self.io)?.into_inner();
        let mut stream = io.stream;
        if !io.input.is_empty() {
            stream.unread(io.input.bytes.freeze());
        }
        Some(stream)
    }
}

impl Io {
    /// Waits until the client has gone, where that can be seen: not behind what it has sent already, unless a fault keeps everybody
    /// from reading that.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.body.is_ended() && self.input.is_empty() {
            match ready!(self.input.poll_read(cx, &mut self.stream)) {
                Ok(1..) => {}
                Ok(0) | Err(_) => {
                    self.broken = Some(Broken::Gone);
                    return Poll::Ready(());
                }
            }
        }
        if self.progress.is_held_up() && self.stream.has_ended() {
            self.broken = Some(Broken::Gone);
            return Poll::Ready(());
        }
        self.wait_for_body(cx);
        Poll::Pending
    }

    /// Waits until the body of the last request is over, whoever reads it. `None`: it will not have been read to its end.
    fn poll_body_over(
        &mut self,
        cx: &mut Context<'_>,
        limit: &mut impl FnMut(&mut Context<'_>, bool) -> Poll<()>,
    ) -> Poll<Option<()>> {
        if self.body.is_ended() {
            return Poll::Ready(Some(()));
        }
        if !self.held || self.broken.is_some() {
            return Poll::Ready(None);
        }
        self.wait_for_body(cx);
        ready!(limit(cx, false));
        Poll::Ready(None)
    }

    fn wait_for_body(&mut self, cx: &Context<'_>) {
        if self.held && self.task.as_ref().is_none_or(|task| !task.will_wake(cx.waker())) {
            self.task = Some(cx.waker().clone());
        }
    }

    fn tell(&mut self) {
        if let Some(task) = self.task.take() {
            task.wake();
        }
    }

    fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        loop {
            if self.broken.is_some() {
                return Poll::Ready(Some(Err(Error::Closed)));
            }
            match self.body.decode(&mut self.input.bytes) {
                Ok(Step::Data(data)) => return Poll::Ready(Some(Ok(Frame::data(data)))),
                Ok(Step::Trailers(trailers)) => return Poll::Ready(Some(Ok(Frame::trailers(trailers)))),
                Ok(Step::End) => return Poll::Ready(None),
                Ok(Step::Read) => {}
                Err(malformed) => return self.break_body(Broken::Malformed, malformed.into()),
            }
            if self.expects {
                // Somebody wants the body: only now is the client asked for it (RFC 9110, 10.1.1).
                if self.output.is_empty() {
                    self.output.small().extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
                }
                if let Err(error) = ready!(self.output.poll_write(cx, &mut self.stream)) {
                    return self.break_body(Broken::Gone, error.into());
                }
                self.expects = false;
            }
            match ready!(self.input.poll_read(cx, &mut self.stream)) {
                Ok(1..) => {}
                Ok(0) => return self.break_body(Broken::Gone, Error::Closed),
                Err(error) => return self.break_body(Broken::Gone, error.into()),
            }
        }
    }

    fn break_body(&mut self, why: Broken, error: Error) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        self.broken = Some(why);
        self.tell();
        Poll::Ready(Some(Err(error)))
    }
}

/// The body of a request. It may be read by another task than the connection's.
pub(in super::super) struct RequestBody {
    io: Rc<RefCell<Io>>,
    number: u64,
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let mut io = self.io.borrow_mut();
        if io.number != self.number {
            return Poll::Ready(None); // Read to its end long ago.
        }
        let frame = io.poll_body(cx);
        io.progress.asked_client(&frame);
        frame
    }

    fn is_end_stream(&self) -> bool {
        let io = self.io.borrow();
        io.number != self.number || io.body.is_ended()
    }

    fn size_hint(&self) -> SizeHint {
        let io = self.io.borrow();
        if io.number != self.number {
            return SizeHint::with_exact(0);
        }
        io.body.left().map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        let mut io = self.io.borrow_mut();
        if io.number == self.number {
            io.held = false;
            io.tell();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use http_body_util::BodyExt;
    use tokio::{
        io::AsyncWriteExt,
        net::{TcpListener, TcpStream},
    };

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_body_of_which_the_end_of_its_connection_threw_a_part_away_has_no_end() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let mut connection = Connection::new(Stream::plain(stream), Rc::default(), Peer::Anybody);
        let begin = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n";
        client.write_all(begin).await.unwrap();
        let request = connection.request(|_, _| Poll::Pending).await.unwrap().unwrap();
        let mut body = request.into_body();
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "one");
        client.write_all(b"3\r\ntwo\r\n").await.unwrap();
        connection.close().await;
        client.write_all(b"0\r\n\r\n").await.unwrap();
        assert!(body.frame().await.unwrap().is_err());
    }

    #[tokio::test]
    async fn a_body_is_read_in_pieces_that_grow_where_it_is_large() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let mut connection = Connection::new(Stream::plain(stream), Rc::default(), Peer::Anybody);
        let client = std::thread::spawn(move || {
            use std::io::Write;
            let mut client = client.into_std().unwrap();
            client.set_nonblocking(false).unwrap();
            client.write_all(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4194304\r\n\r\n").unwrap();
            client.write_all(&vec![b'x'; 4 << 20]).unwrap();
            client
        });
        let request = connection.request(|_, _| Poll::Pending).await.unwrap().unwrap();
        let mut body = request.into_body();
        let mut largest = 0;
        while let Some(frame) = body.frame().await {
            largest = largest.max(frame.unwrap().into_data().unwrap().len());
        }
        client.join().unwrap();
        assert!(largest >= 32 << 10, "{largest}");
    }
}
