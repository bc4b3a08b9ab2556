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

/// Why both sides have not ended in order.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error("the client's side failed: {0}")]
    Client(#[source] io::Error),
    #[error("the upstream's side failed: {0}")]
    Upstream(#[source] io::Error),
    #[error("nothing has passed for too long")]
    Idle,
}

/// Copies both ways until both have ended in order; the end of one is passed on while the other still flows.
///
/// # Errors
/// Of whichever side fails first, when the other was given all that came from it, and no end: TLS that ends without a word (`UnexpectedEof`)
/// and a vanished peer are failures as a reset is. Or when `progress` is idle.
pub(super) async fn both_ways<C, U>(client: &mut C, upstream: &mut U, progress: &Progress) -> Result<(), Broken>
where
    C: AsyncRead + AsyncWrite + Unpin,
    U: AsyncRead + AsyncWrite + Unpin,
{
    let (mut there, mut back) = (Flow::default(), Flow::default());
    let mut broken = None;
    poll_fn(|cx| {
        let mut buffer = BUFFER.take();
        buffer.resize(READ, 0);
        let mut over = false;
        if broken.is_none() {
            let first = there.poll(cx, &mut buffer, client, upstream, progress);
            // Behind a write that failed, what was a reset would be read as an end in order: the kernel says it once.
            let second = match first {
                Poll::Ready(Err(_)) => Poll::Pending,
                Poll::Ready(Ok(())) | Poll::Pending => back.poll(cx, &mut buffer, upstream, client, progress),
            };
            match (first, second) {
                (Poll::Ready(Err(Failed::Sender(error))), _) | (_, Poll::Ready(Err(Failed::Receiver(error)))) => {
                    broken = Some(Broken::Client(error));
                }
                (Poll::Ready(Err(Failed::Receiver(error))), _) | (_, Poll::Ready(Err(Failed::Sender(error)))) => {
                    broken = Some(Broken::Upstream(error));
                }
                (first, second) => over = first.is_ready() && second.is_ready(),
            }
        }
        match broken {
            Some(Broken::Client(_)) => over = there.poll_rest(cx, &mut buffer, client, upstream, progress).is_ready(),
            Some(Broken::Upstream(_)) => over = back.poll_rest(cx, &mut buffer, upstream, client, progress).is_ready(),
            Some(Broken::Idle) | None => {}
        }
        BUFFER.set(buffer);
        if over {
            return Poll::Ready(broken.take().map_or(Ok(()), Err));
        }
        if progress.is_idle() {
            return Poll::Ready(Err(Broken::Idle));
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
    /// No more comes from the sender.
    Ending,
    /// The receiver has been told so.
    Ended,
}

/// Which end of a direction has failed.
enum Failed {
    Sender(io::Error),
    Receiver(io::Error),
}

impl Flow {
    /// Copies until the sender has ended in order, and passes that on.
    fn poll<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
        from: &mut R,
        to: &mut W,
        progress: &Progress,
    ) -> Poll<Result<(), Failed>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        if self.state != State::Ended {
            ready!(self.poll_copy(cx, buffer, from, to, progress))?;
            ready!(Pin::new(to).poll_shutdown(cx)).map_err(Failed::Receiver)?;
            self.state = State::Ended;
        }
        Poll::Ready(Ok(()))
    }

    /// Copies what is still to be had of a sender that has failed. A write may have failed before all that it had sent was read.
    fn poll_rest<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
        from: &mut R,
        to: &mut W,
        progress: &Progress,
    ) -> Poll<()>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        if self.state != State::Ended {
            match ready!(self.poll_copy(cx, buffer, from, to, progress)) {
                Ok(()) | Err(Failed::Sender(_)) => {
                    let _ = ready!(Pin::new(to).poll_flush(cx));
                }
                Err(Failed::Receiver(_)) => {}
            }
        }
        Poll::Ready(())
    }

    /// Copies until no more comes from the sender, and the receiver has taken all.
    fn poll_copy<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
        from: &mut R,
        to: &mut W,
        progress: &Progress,
    ) -> Poll<Result<(), Failed>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        loop {
            while self.taken < self.kept.len() {
                let written = ready!(Pin::new(&mut *to).poll_write(cx, &self.kept[self.taken..]));
                self.taken += written.and_then(some).map_err(Failed::Receiver)?;
                progress.pass();
            }
            if !self.kept.is_empty() {
                (self.kept, self.taken) = (Vec::new(), 0);
            }
            if self.state != State::Open {
                return Poll::Ready(Ok(()));
            }
            let mut read = ReadBuf::new(buffer);
            match Pin::new(&mut *from).poll_read(cx, &mut read) {
                Poll::Ready(Ok(())) => progress.pass(),
                Poll::Ready(Err(error)) => {
                    self.state = State::Ending;
                    return Poll::Ready(Err(Failed::Sender(error)));
                }
                Poll::Pending => {
                    ready!(Pin::new(&mut *to).poll_flush(cx)).map_err(Failed::Receiver)?;
                    return Poll::Pending;
                }
            }
            let mut left = read.filled();
            if left.is_empty() {
                self.state = State::Ending;
            }
            while !left.is_empty() {
                match Pin::new(&mut *to).poll_write(cx, left) {
                    Poll::Ready(written) => left = &left[written.and_then(some).map_err(Failed::Receiver)?..],
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
    use futures::FutureExt;
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
    async fn what_came_from_a_side_before_it_failed_arrives_without_an_end() {
        let progress = Progress::default();
        let ((mut client, mut a), (mut b, mut server)) = (duplex(10), duplex(100));
        server.write_all(&[7; 100]).await.unwrap();
        drop(server);
        client.write_all(b"to nobody").await.unwrap();
        let mut came = [0; 100];
        let relay = both_ways(&mut a, &mut b, &progress);
        let (relayed, read) = tokio::join!(relay, client.read_exact(&mut came));
        assert!(matches!(relayed, Err(Broken::Upstream(error)) if error.kind() == io::ErrorKind::BrokenPipe));
        read.unwrap();
        assert_eq!(came, [7; 100]);
        assert!(client.read_u8().now_or_never().is_none(), "told of an end");
    }

    /// As TLS that ends without a word.
    struct CutShort;

    impl AsyncRead for CutShort {
        fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()))
        }
    }

    #[tokio::test]
    async fn what_is_cut_short_is_passed_on_without_an_end() {
        let progress = Progress::default();
        let (mut client, mut a) = duplex(64);
        let mut b = tokio::io::join((&b"half"[..]).chain(CutShort), tokio::io::sink());
        let relayed = both_ways(&mut a, &mut b, &progress).await;
        assert!(matches!(relayed, Err(Broken::Upstream(error)) if error.kind() == io::ErrorKind::UnexpectedEof));
        let mut came = [0; 4];
        client.read_exact(&mut came).await.unwrap();
        assert_eq!(&came, b"half");
        assert!(client.read_u8().now_or_never().is_none(), "told of an end");
    }
}
