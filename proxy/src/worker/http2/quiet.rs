//! What an upstream writes, without its empty DATA frames. `h2` ends a connection, and all that share it, at the 101st of its life, read
//! or not; servers may send one before trailers, or for an empty part of a body (RFC 9113, 6.1).

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Of a frame (RFC 9113, 4.1).
const HEAD: usize = 9;
const DATA: u8 = 0;
const END_STREAM: u8 = 1;
const PADDED: u8 = 8;

/// A connection to an upstream. A client's is none: many of them from there are an attack (CVE-2019-9518).
pub(super) struct Quiet<S> {
    io: S,
    frames: Frames,
}

impl<S> Quiet<S> {
    pub(super) fn new(io: S) -> Self {
        Self { io, frames: Frames::default() }
    }
}

/// Where in the frames that are read we are.
#[derive(Default)]
struct Frames {
    head: [u8; HEAD],
    /// Bytes of the present head that came by themselves.
    known: usize,
    /// Of the payload of the present frame.
    rest: usize,
}

impl Frames {
    /// Takes the empty ones out, but for one whose head came in two pieces. Returns how many bytes are left.
    fn pass(&mut self, bytes: &mut [u8]) -> usize {
        let (mut from, mut to) = (0, 0);
        while from < bytes.len() {
            let come = bytes.len() - from;
            let passed = if self.rest > 0 {
                let passed = self.rest.min(come);
                self.rest -= passed;
                passed
            } else {
                let passed = (HEAD - self.known).min(come);
                self.head[self.known..self.known + passed].copy_from_slice(&bytes[from..from + passed]);
                self.known += passed;
                if self.known == HEAD {
                    self.known = 0;
                    let [high, middle, low, kind, flags, ..] = self.head;
                    self.rest = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
                    let empty = self.rest == 0 && kind == DATA && flags & (END_STREAM | PADDED) == 0;
                    if empty && passed == HEAD {
                        from += HEAD;
                        continue;
                    }
                }
                passed
            };
            if from != to {
                bytes.copy_within(from..from + passed, to);
            }
            (from, to) = (from + passed, to + passed);
        }
        to
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Quiet<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        loop {
            ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
            let read = &mut buf.filled_mut()[before..];
            if read.is_empty() {
                return Poll::Ready(Ok(()));
            }
            let left = self.frames.pass(read);
            buf.set_filled(before + left);
            // Nothing would mean the end.
            if left > 0 {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Quiet<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u8::try_from(payload.len()).expect("it is short");
        [&[0, 0, length, kind, flags, 0, 0, 0, 1], payload].concat()
    }

    /// What is left of frames that come in pieces of this size.
    fn left(frames: &[u8], size: usize) -> Vec<u8> {
        let (mut state, mut left) = (Frames::default(), Vec::new());
        for piece in frames.chunks(size) {
            let mut piece = piece.to_vec();
            let kept = state.pass(&mut piece);
            left.extend_from_slice(&piece[..kept]);
        }
        left
    }

    #[test]
    fn only_empty_data_frames_that_end_nothing_are_left_out() {
        let empty = frame(DATA, 0, &[]);
        // One that is padded has a length of padding, or is an error.
        let others = [
            frame(4, 0, &[]),
            frame(1, 4, b"head"),
            // A payload that looks like one.
            frame(DATA, 0, &empty),
            frame(DATA, PADDED, &[]),
            frame(DATA, END_STREAM, &[]),
        ];
        let with: Vec<u8> = others.iter().flat_map(|it| [&empty[..], it].concat()).collect();
        let without = others.concat();
        assert_eq!(left(&with, with.len()), without);
        assert_eq!(left(&empty, empty.len()), b"");
        // However it is cut, all else is whole, and in order.
        for size in 1..with.len() {
            let kept = left(&with, size);
            assert_eq!(left(&kept, kept.len()), without, "in pieces of {size}");
        }
    }
}
