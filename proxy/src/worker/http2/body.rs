//! Bodies in HTTP/2: as they come, and on their way out. Either side sends only what the other takes (RFC 9113, 5.2).

use std::{
    cell::Cell,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker, ready},
};

use bytes::{Buf, Bytes};
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, header};
use http_body::{Body, Frame, SizeHint};

use super::super::http1::COPY;

/// Most of what is joined: the largest frame that everybody takes (RFC 9113, 4.2).
const JOINED: usize = 16 * 1024;

/// The body of a message as it comes. h2 holds it against its content-length (RFC 9113, 8.1.1).
pub(in super::super) struct Incoming {
    stream: RecvStream,
    /// What is left of it, where its head said how long it is.
    left: Option<u64>,
    in_trailers: bool,
}

impl Incoming {
    pub(super) fn new(stream: RecvStream, headers: &HeaderMap) -> Self {
        let left = if stream.is_end_stream() { Some(0) } else { length(headers) };
        Self { stream, left, in_trailers: false }
    }
}

fn length(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = h2::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        if !self.in_trailers {
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(data)) => {
                    // Whoever asks for more can pass it on: no more is asked for than is taken.
                    self.stream.flow_control().release_capacity(data.len())?;
                    self.left = self.left.map(|left| left.saturating_sub(data.len() as u64));
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => self.in_trailers = true,
            }
        }
        let trailers = ready!(self.stream.poll_trailers(cx))?;
        Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.stream.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

/// A body on its way out. Dropped before its end, the stream is reset.
///
/// Each part that waits in h2 takes some 320 bytes, and all of the buffer that it was read into, while h2's bound is on what is in them.
/// So behind one that is not written yet, small ones are joined.
pub(super) struct Outgoing<B> {
    stream: SendStream<Part>,
    pub(super) body: B,
    /// A part of it that waits for room, and whether it is the last.
    waits: Option<(Bytes, bool)>,
    joined: Vec<u8>,
    unwritten: Option<Rc<Unwritten>>,
}

/// Of a body, shared with its parts that h2 has not written yet. The task that is to be told when there are none.
type Unwritten = Cell<Option<Waker>>;

/// A part of a body in the hands of h2, which drops it when it is written.
pub(super) struct Part {
    data: Bytes,
    /// Not of the last one: nothing follows.
    of: Option<Rc<Unwritten>>,
}

impl Buf for Part {
    fn remaining(&self) -> usize {
        self.data.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.data.chunk()
    }

    fn advance(&mut self, count: usize) {
        self.data.advance(count);
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // This one's, and the body's.
        if let Some(of) = self.of.take().filter(|of| Rc::strong_count(of) == 2)
            && let Some(task) = of.take()
        {
            task.wake();
        }
    }
}

/// Why a body did not get out.
pub(super) enum Unsent<E> {
    /// The other side takes no more of it. Why, says what it sends.
    Stream,
    Body(E),
}

impl<E> From<h2::Error> for Unsent<E> {
    fn from(error: h2::Error) -> Self {
        tracing::trace!(%error, "a body is not sent to its end");
        Self::Stream
    }
}

impl<B: Body<Data = Bytes> + Unpin> Outgoing<B> {
    pub(super) fn new(stream: SendStream<Part>, body: B) -> Self {
        Self { stream, body, waits: None, joined: Vec::new(), unwritten: None }
    }

    fn is_unwritten(&self) -> bool {
        self.unwritten.as_ref().is_some_and(|unwritten| Rc::strong_count(unwritten) > 1)
    }

    fn send(&mut self, data: Bytes, last: bool) -> Result<(), h2::Error> {
        let of = (!last).then(|| Rc::clone(self.unwritten.get_or_insert_default()));
        self.stream.send_data(Part { data, of }, last)
    }

    /// Before what cannot be joined. It waits for no room, as it is little.
    fn send_joined(&mut self, last: bool) -> Result<(), h2::Error> {
        if self.joined.is_empty() && !last {
            return Ok(());
        }
        let joined = std::mem::take(&mut self.joined);
        self.send(joined.into(), last)
    }

    /// Sends it to its end.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Unsent<B::Error>>> {
        loop {
            if let Some((data, last)) = self.waits.take() {
                if self.stream.capacity() == 0 {
                    let room = self.stream.poll_capacity(cx);
                    self.waits = Some((data, last));
                    match ready!(room) {
                        Some(room) => drop(room?),
                        None => return Poll::Ready(Err(Unsent::Stream)),
                    }
                    continue;
                }
                self.send(data, last)?;
                if last {
                    return Poll::Ready(Ok(()));
                }
            }
            if !self.joined.is_empty() && (self.joined.len() >= JOINED || !self.is_unwritten()) {
                self.stream.reserve_capacity(1);
                self.waits = Some((std::mem::take(&mut self.joined).into(), false));
                continue;
            }
            // Before the body is asked: where the other side has given up, what the body comes from may have been given up for it, and
            // has not failed.
            if self.stream.poll_reset(cx).is_ready() {
                return Poll::Ready(Err(Unsent::Stream));
            }
            match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Pending => {
                    if let Some(unwritten) = self.unwritten.as_ref().filter(|_| !self.joined.is_empty()) {
                        unwritten.set(Some(cx.waker().clone()));
                    }
                    return Poll::Pending;
                }
                Poll::Ready(None) => return Poll::Ready(Ok(self.send_joined(true)?)),
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(Unsent::Body(error))),
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => {
                        let last = self.body.is_end_stream();
                        if data.len() <= COPY && (self.is_unwritten() || !self.joined.is_empty()) {
                            self.joined.extend_from_slice(&data);
                            if last {
                                return Poll::Ready(Ok(self.send_joined(true)?));
                            }
                            continue;
                        }
                        self.send_joined(false)?;
                        if data.len() > COPY {
                            // h2 asks for as much as it is given; before that, more than a sign of room would be kept from other streams.
                            self.stream.reserve_capacity(1);
                            self.waits = Some((data, last));
                        } else if !data.is_empty() || last {
                            // Nothing waits to be written: as little as what is joined.
                            self.send(data, last)?;
                            if last {
                                return Poll::Ready(Ok(()));
                            }
                        }
                    }
                    Err(frame) => {
                        self.send_joined(false)?;
                        let trailers = frame.into_trailers().unwrap_or_default();
                        return Poll::Ready(Ok(self.stream.send_trailers(trailers)?));
                    }
                },
            }
        }
    }

    /// Ends it in a way that is no end of the message.
    pub(super) fn break_off(mut self, reason: Reason) {
        self.stream.send_reset(reason);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::{convert::Infallible, future::poll_fn, iter};

    use futures::{StreamExt, stream};
    use h2::server;
    use http::{HeaderValue, Response};
    use http_body_util::StreamBody;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, duplex},
        task::yield_now,
    };

    use super::{super::SEND_BUFFER, *};

    /// What is on its way to a client that does not read.
    const PIPE: usize = 1024;
    /// A request of a client that grants 2 GiB for the connection and for each stream.
    const ASKED: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\
        \0\0\x06\x04\0\0\0\0\0\0\x04\x7f\xff\xff\xff\
        \0\0\x04\x08\0\0\0\0\0\x7f\xff\0\0\
        \0\0\x06\x01\x05\0\0\0\x01\x82\x86\x84\x41\x01a";

    /// Sends parts to a client that reads nothing before so many were taken. Returns how many frames it got, and what was in them.
    async fn through(
        parts: impl Iterator<Item = Bytes>,
        trailers: Option<HeaderMap>,
        unread: usize,
        rests: impl Fn(usize) -> bool,
    ) -> (usize, Vec<u8>) {
        let (ours, mut client) = duplex(PIPE);
        client.write_all(ASKED).await.unwrap();
        let mut connection = server::Builder::new().max_send_buffer_size(SEND_BUFFER).handshake(ours).await.unwrap();
        let (_, mut respond) = connection.accept().await.unwrap().unwrap();
        let stream = respond.send_response(Response::new(()), false).unwrap();

        let taken = Cell::new(0);
        let parts = stream::iter(parts.map(Frame::data).chain(trailers.map(Frame::trailers))).then(async |part| {
            taken.update(|taken| taken + 1);
            if rests(taken.get()) {
                yield_now().await;
            }
            Ok::<_, Infallible>(part)
        });
        let mut outgoing = Outgoing::new(stream, StreamBody::new(Box::pin(parts)));
        let sending = async { assert!(poll_fn(|cx| outgoing.poll(cx)).await.is_ok()) };
        let reading = async {
            while taken.get() < unread {
                yield_now().await;
            }
            let (mut frames, mut content) = (0, Vec::new());
            loop {
                let mut head = [0; 9];
                client.read_exact(&mut head).await.unwrap();
                let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
                let mut payload = vec![0; length];
                client.read_exact(&mut payload).await.unwrap();
                let [.., kind, flags, _, _, _, _] = head;
                if kind == 0 {
                    frames += 1;
                    content.extend(payload);
                }
                // The end of DATA or HEADERS (RFC 9113, 6).
                if kind <= 1 && flags & 1 != 0 {
                    return (frames, content);
                }
            }
        };
        tokio::select! {
            read = async { tokio::join!(sending, reading).1 } => read,
            ended = connection.accept() => panic!("it has ended: {:?}", ended.map(|it| it.map(drop))),
        }
    }

    #[tokio::test]
    async fn tiny_parts_that_wait_to_be_written_are_few_frames() {
        const PARTS: usize = 60_000;
        let parts = iter::repeat_n(Bytes::from_static(b"x"), PARTS);
        let (frames, content) = through(parts, None, PARTS, |_| true).await;
        assert_eq!(content.len(), PARTS);
        // Of the least of frames, 10 bytes, what fits into the pipe and into what h2 has encoded, which takes no more than it is.
        let written = (PIPE + 16 * 1024) / 10;
        assert!(frames < written + 20, "{frames} frames");
    }

    #[tokio::test]
    async fn parts_of_all_sizes_keep_their_order_however_they_come() {
        let mut all = (0..400_000).map(|at: usize| u8::try_from(at % 251).unwrap()).collect::<Bytes>();
        let whole = all.clone();
        let sizes = [1, 10, 5000, 3, 0, 20_000, COPY, COPY + 1, 1, 1, 70_000, 2, JOINED];
        let mut parts = Vec::new();
        for size in sizes.iter().cycle() {
            parts.push(all.split_to(all.len().min(*size)));
            if all.is_empty() {
                break;
            }
        }
        for every in [1, 2, 3, 7, 1000] {
            for trailers in [None, Some(HeaderMap::from_iter([(header::ETAG, HeaderValue::from_static("x"))]))] {
                let sent = parts.iter().cloned();
                let (_, content) = through(sent, trailers, 0, |taken| taken % every == 0).await;
                assert!(content == whole, "with a rest at each {every}th");
            }
        }
    }
}
