//! Bodies in HTTP/2: as they come, and on their way out. Either side sends only what the other takes (RFC 9113, 5.2).

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, header};
use http_body::{Body, Frame, SizeHint};

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
pub(super) struct Outgoing<B> {
    stream: SendStream<Bytes>,
    pub(super) body: B,
    /// A part of it that waits for room, and whether it is the last.
    waits: Option<(Bytes, bool)>,
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
    pub(super) fn new(stream: SendStream<Bytes>, body: B) -> Self {
        Self { stream, body, waits: None }
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
                self.stream.send_data(data, last)?;
                if last {
                    return Poll::Ready(Ok(()));
                }
            }
            match Pin::new(&mut self.body).poll_frame(cx) {
                // Nobody may be left who wants the rest.
                Poll::Pending => return self.stream.poll_reset(cx).map(|_| Err(Unsent::Stream)),
                Poll::Ready(None) => return Poll::Ready(Ok(self.stream.send_data(Bytes::new(), true)?)),
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(Unsent::Body(error))),
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) if data.is_empty() && !self.body.is_end_stream() => {}
                    Ok(data) => {
                        // h2 asks for as much as it is given; before that, more than a sign of room would be kept from other streams.
                        self.stream.reserve_capacity(data.len().min(1));
                        let last = self.body.is_end_stream();
                        if data.is_empty() {
                            return Poll::Ready(Ok(self.stream.send_data(data, last)?));
                        }
                        self.waits = Some((data, last));
                    }
                    Err(frame) => {
                        self.stream.reserve_capacity(0);
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
