//! HTTP/1.1: towards clients (`server`) and towards upstreams (`client`). Neither end has a task of its own; a client's
//! connection runs in the one task that also sends its requests on and reads their answers. So a request costs two
//! wake-ups and no channel, and what one side cannot take the other does not read.
//!
//! Framing is read strictly on both sides (RFC 9112, 11): what two implementations could understand differently is
//! refused, and every message is written anew from what was understood.

mod body;
pub(super) mod client;
#[cfg(any(test, sluice_fuzz))]
pub(crate) mod fuzz;
mod head;
#[cfg(test)]
mod properties;
pub(super) mod server;

use std::{
    future::Future,
    io,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes, BytesMut};
use http_body::{Body, Frame};
use tokio::io::{AsyncReadExt, AsyncWrite};

use self::body::Encoder;
pub(super) use self::head::Malformed;
use super::{body::BodyError, stream::Stream, thread};

/// Bytes that one read asks for, at least and at most: twice as many after each that got all it asked for.
pub(super) const READ: usize = 8 * 1024;
const MAX_READ: usize = 64 * 1024;
/// Read with less room than this would cost a system call for a few bytes.
const MIN_ROOM: usize = 4 * 1024;
/// Up to here a part of a body is copied behind what is to be written before it, in bytes.
pub(super) const COPY: usize = 4 * 1024;

#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("reading or writing failed: {0}")]
    Io(#[from] io::Error),
    #[error("it was closed before the message's end")]
    Closed,
    #[error("the message is not valid HTTP/1: {0}")]
    Malformed(#[from] Malformed),
    #[error("the request's body could not be read: {0}")]
    Client(#[source] Box<BodyError>),
    #[error("the body is not as long as its head says")]
    Length,
}

impl Error {
    /// The other side reset the connection, as it does with one of which it has not read all.
    pub(super) fn is_reset(&self) -> bool {
        matches!(self, Self::Io(error) if error.kind() == io::ErrorKind::ConnectionReset)
    }
}

/// What was read from a connection and is not yet part of a message. Holds no memory while nothing is there.
struct Input {
    bytes: BytesMut,
    /// How much the next read asks for.
    read: usize,
    /// Nothing came at the last attempt.
    blocked: bool,
}

impl Input {
    fn new() -> Self {
        Self { bytes: BytesMut::new(), read: READ, blocked: false }
    }

    fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Reads what there is, and returns how much; 0 is the end of the connection.
    fn poll_read(&mut self, cx: &mut Context<'_>, stream: &mut Stream) -> Poll<io::Result<usize>> {
        if self.bytes.capacity() == 0 {
            if self.blocked {
                ready!(stream.poll_readable(cx))?;
            }
            // Spare ones have the size of a head: where bodies pass, all that there is is taken in one go.
            self.bytes = if self.read > READ { BytesMut::with_capacity(self.read) } else { thread::take_input() };
        }
        if self.bytes.capacity() - self.bytes.len() < MIN_ROOM.max(self.read / 2) {
            self.bytes.reserve(self.read);
        }
        let room = self.bytes.capacity() - self.bytes.len();
        let Poll::Ready(read) = pin!(stream.read_buf(&mut self.bytes)).poll(cx) else {
            self.blocked = true;
            self.rest();
            return Poll::Pending;
        };
        self.blocked = false;
        let read = read?;
        if read == room && read >= self.read {
            self.read = (self.read * 2).min(MAX_READ);
        } else if read < self.read / 2 {
            self.read = (self.read / 2).max(READ);
        }
        Poll::Ready(Ok(read))
    }

    /// Gives the buffer to other connections while there is nothing in it.
    fn rest(&mut self) {
        if self.bytes.is_empty() && self.bytes.capacity() > 0 {
            let bytes = std::mem::take(&mut self.bytes);
            if self.read == READ {
                thread::give_input(bytes);
            }
        }
    }
}

/// What is to be written: `small[written..]`, then `large`, then `behind`. Holds no memory while nothing is there.
#[derive(Default)]
struct Output {
    small: Vec<u8>,
    written: usize,
    large: Bytes,
    behind: &'static [u8],
}

/// A message's body on its way out.
struct Outgoing<B> {
    body: B,
    encoder: Encoder,
    /// All of it is in the output.
    ended: bool,
}

/// Why a message did not get out.
enum Unsent<E> {
    Io(io::Error),
    Body(E),
    /// The body is not as long as the head says.
    Length,
}

impl Output {
    /// Where a head is to be written.
    fn small(&mut self) -> &mut Vec<u8> {
        if self.small.capacity() == 0 {
            self.small = thread::take_output();
        }
        &mut self.small
    }

    fn is_empty(&self) -> bool {
        self.small.is_empty() && self.large.is_empty() && self.behind.is_empty()
    }

    /// Writes a message to its end: what was put here, and then its body, as it comes.
    fn poll_send<B>(
        &mut self,
        cx: &mut Context<'_>,
        stream: &mut Stream,
        message: &mut Outgoing<B>,
    ) -> Poll<Result<(), Unsent<B::Error>>>
    where
        B: Body<Data = Bytes> + Unpin,
    {
        loop {
            let mut waits = false;
            while !message.ended && self.takes_more() {
                match Pin::new(&mut message.body).poll_frame(cx) {
                    Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(Unsent::Body(error))),
                    Poll::Ready(Some(Ok(frame))) => self.put(message, Some(frame))?,
                    Poll::Ready(None) => self.put(message, None)?,
                    Poll::Pending => {
                        waits = true;
                        break;
                    }
                }
            }
            ready!(self.poll_write(cx, stream)).map_err(Unsent::Io)?;
            if message.ended {
                return Poll::Ready(Ok(()));
            }
            if waits {
                return Poll::Pending;
            }
        }
    }

    /// Whether another part of a body may be put. Not before what is large has been written: who sent it waits, too.
    fn takes_more(&self) -> bool {
        self.large.is_empty() && self.small.len() < 2 * COPY
    }

    fn put<B>(&mut self, message: &mut Outgoing<B>, frame: Option<Frame<Bytes>>) -> Result<(), Unsent<B::Error>>
    where
        B: Body<Data = Bytes>,
    {
        self.small();
        let encoder = &mut message.encoder;
        let mut good = true;
        let mut trailers = None;
        match frame.map(Frame::into_data) {
            Some(Ok(data)) => {
                if !data.is_empty() {
                    good = encoder.begin_data(data.len(), &mut self.small);
                    if data.len() <= COPY {
                        self.small.extend_from_slice(&data);
                        self.small.extend_from_slice(encoder.behind_data());
                    } else {
                        self.large = data;
                        self.behind = encoder.behind_data();
                    }
                }
                // What ends a chunked body goes behind what is large. One of known length is not asked for its end.
                let may_end = self.large.is_empty() || self.behind.is_empty();
                message.ended = may_end && message.body.is_end_stream();
            }
            Some(Err(frame)) => {
                message.ended = true;
                trailers = frame.into_trailers().ok();
            }
            None => message.ended = true,
        }
        if message.ended {
            good &= encoder.end(trailers.as_ref(), &mut self.small);
        }
        if good { Ok(()) } else { Err(Unsent::Length) }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, stream: &mut Stream) -> Poll<io::Result<()>> {
        let mut stream = Pin::new(stream);
        loop {
            let small = &self.small[self.written..];
            let written = match (small.is_empty(), self.large.is_empty()) {
                (true, true) if self.behind.is_empty() => {
                    ready!(stream.poll_flush(cx))?;
                    self.rest();
                    return Poll::Ready(Ok(()));
                }
                (true, true) => {
                    self.small.clear();
                    self.written = 0;
                    self.small.extend_from_slice(std::mem::take(&mut self.behind));
                    continue;
                }
                (false, true) => ready!(stream.as_mut().poll_write(cx, small))?,
                (true, false) => ready!(stream.as_mut().poll_write(cx, &self.large))?,
                (false, false) => {
                    let both = [io::IoSlice::new(small), io::IoSlice::new(&self.large)];
                    ready!(stream.as_mut().poll_write_vectored(cx, &both))?
                }
            };
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            let of_small = written.min(small.len());
            self.written += of_small;
            self.large.advance(written - of_small);
        }
    }

    fn rest(&mut self) {
        self.written = 0;
        if self.small.capacity() > 0 {
            thread::give_output(std::mem::take(&mut self.small));
        }
    }
}
