//! Bytes of a tunnel on their way, both ways at once.
//!
//! A buffer for each direction of each tunnel would be small or dear: one that is open and quiet is the common case. So all tunnels of a
//! thread read into one large buffer, and what is written on at once, as is usual, never rests anywhere. Only what a receiver
//! does not take is kept for it, and nothing more is read meanwhile.

use std::{
    cell::Cell,
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::progress::Progress;

/// The most that is read at once, and kept for a slow receiver, in bytes.
const READ: usize = 64 * 1024;

thread_local! {
    static BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Copies both ways until both have ended; the end of one is passed on while the other still flows.
///
/// # Errors
/// Of whichever side fails first; `TimedOut` when `progress` is idle, or `ConnectionReset` if bytes are lost by that. Nothing is
/// copied any more then.
pub(super) async fn both_ways<A, B>(a: &mut A, b: &mut B, progress: &Progress) -> io::Result<()>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let (mut there, mut back) = (Flow::default(), Flow::default());
    poll_fn(|cx| {
        let mut buffer = BUFFER.take();
        buffer.resize(READ, 0);
        let flowed = (there.poll(cx, &mut buffer, a, b, progress), back.poll(cx, &mut buffer, b, a, progress));
        BUFFER.set(buffer);
        if flowed.0?.is_ready() & flowed.1?.is_ready() {
            return Poll::Ready(Ok(()));
        }
        if progress.is_idle() {
            let whole = there.kept.is_empty() && back.kept.is_empty();
            let kind = if whole { io::ErrorKind::TimedOut } else { io::ErrorKind::ConnectionReset };
            return Poll::Ready(Err(kind.into()));
        }
        Poll::Pending
    })
    .await
}

/// One direction.
#[derive(Default)]
struct Flow {
    /// What the receiver has not taken yet, from `taken` on.
    kept: Vec<u8>,
    taken: usize,
    state: State,
}

#[derive(Default, Clone, Copy, PartialEq, Eq)]
enum State {
    #[default]
    Open,
    /// The sender has ended, and the receiver is to be told.
    Ending,
    Ended,
}

impl Flow {
    fn poll<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
        from: &mut R,
        to: &mut W,
        progress: &Progress,
    ) -> Poll<io::Result<()>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        loop {
            while self.taken < self.kept.len() {
                self.taken += some(ready!(Pin::new(&mut *to).poll_write(cx, &self.kept[self.taken..]))?)?;
                progress.pass();
            }
            if !self.kept.is_empty() {
                (self.kept, self.taken) = (Vec::new(), 0);
            }
            match self.state {
                State::Open => {}
                State::Ending => {
                    ready!(Pin::new(&mut *to).poll_shutdown(cx))?;
                    self.state = State::Ended;
                    return Poll::Ready(Ok(()));
                }
                State::Ended => return Poll::Ready(Ok(())),
            }
            let mut read = ReadBuf::new(buffer);
            if Pin::new(&mut *from).poll_read(cx, &mut read)?.is_pending() {
                ready!(Pin::new(&mut *to).poll_flush(cx))?;
                return Poll::Pending;
            }
            progress.pass();
            let mut left = read.filled();
            if left.is_empty() {
                self.state = State::Ending;
            }
            while !left.is_empty() {
                match Pin::new(&mut *to).poll_write(cx, left)? {
                    Poll::Ready(written) => left = &left[some(written)?..],
                    Poll::Pending => {
                        self.kept.extend_from_slice(left);
                        break;
                    }
                }
            }
        }
    }
}

/// A receiver that takes nothing never will.
fn some(written: usize) -> io::Result<usize> {
    if written == 0 { Err(io::ErrorKind::WriteZero.into()) } else { Ok(written) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    /// Much more than either side takes at once.
    const LONG: usize = 1_000_003;

    fn bytes(seed: usize) -> Vec<u8> {
        (0..LONG).map(|at| u8::try_from((at * 31 + at / 256 + seed) % 251).unwrap()).collect()
    }

    #[tokio::test]
    async fn all_bytes_of_both_arrive_in_their_order_however_little_is_taken_at_once() {
        let progress = Progress::default();
        for room in [1, 7, 4096, 100_000, 2 * LONG] {
            let ((mut client, mut a), (mut b, mut server)) = (duplex(64), duplex(room));
            let relay = both_ways(&mut a, &mut b, &progress);
            let ends = async {
                let (mut from_client, mut to_client) = tokio::io::split(&mut client);
                let (mut from_server, mut to_server) = tokio::io::split(&mut server);
                let (request, answer) = (bytes(1), bytes(2));
                let send = async {
                    to_client.write_all(&request).await.unwrap();
                    to_client.shutdown().await.unwrap();
                };
                let reply = async {
                    to_server.write_all(&answer).await.unwrap();
                    to_server.shutdown().await.unwrap();
                };
                let (mut seen, mut back) = (Vec::new(), Vec::new());
                let (_, _, seen_is, back_is) =
                    tokio::join!(send, reply, from_server.read_to_end(&mut seen), from_client.read_to_end(&mut back));
                seen_is.unwrap();
                back_is.unwrap();
                assert!(seen == request && back == answer, "with room for {room}");
            };
            let (relayed, ()) = tokio::join!(relay, ends);
            relayed.unwrap();
        }
    }

    #[tokio::test]
    async fn one_side_may_end_and_still_hear_the_other() {
        let progress = Progress::default();
        let ((mut client, mut a), (mut b, mut server)) = (duplex(64), duplex(64));
        let relay = both_ways(&mut a, &mut b, &progress);
        let ends = async {
            client.write_all(b"question").await.unwrap();
            client.shutdown().await.unwrap();
            let mut question = String::new();
            server.read_to_string(&mut question).await.unwrap();
            server.write_all(b"answer").await.unwrap();
            server.shutdown().await.unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
            assert_eq!((question.as_str(), answer.as_str()), ("question", "answer"));
        };
        let (relayed, ()) = tokio::join!(relay, ends);
        relayed.unwrap();
    }

    #[tokio::test]
    async fn a_side_that_has_ended_is_not_asked_again() {
        let progress = Progress::default();
        let ((client, mut a), (mut b, _server)) = (duplex(64), duplex(64));
        drop(client);
        let mut flow = Flow::default();
        poll_fn(|cx| {
            for _ in 0..2 {
                assert!(matches!(flow.poll(cx, &mut [0; 16], &mut a, &mut b, &progress), Poll::Ready(Ok(()))));
            }
            Poll::Ready(())
        })
        .await;
    }

    #[tokio::test]
    async fn nothing_is_read_for_a_receiver_that_takes_nothing() {
        let progress = Progress::default();
        let ((mut client, mut a), (mut b, _server)) = (duplex(2 * LONG), duplex(10));
        client.write_all(&bytes(1)).await.unwrap();
        let mut flow = Flow::default();
        let mut buffer = vec![0; READ];
        poll_fn(|cx| {
            for _ in 0..3 {
                assert!(flow.poll(cx, &mut buffer, &mut a, &mut b, &progress).is_pending());
            }
            Poll::Ready(())
        })
        .await;
        assert_eq!(flow.kept.len(), READ - 10);
    }

    #[tokio::test]
    async fn one_that_is_gone_ends_the_tunnel() {
        let progress = Progress::default();
        let ((mut client, mut a), (mut b, server)) = (duplex(64), duplex(64));
        drop(server);
        client.write_all(b"to nobody").await.unwrap();
        let error = both_ways(&mut a, &mut b, &progress).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
