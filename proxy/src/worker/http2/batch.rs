//! What an HTTP/2 connection writes, sent together when everybody has had a turn.
//!
//! `h2` flushes after every frame of data that it does not copy. In TLS each of these would be a record and a system call, and wake the
//! receiver: a burst of answers on one connection would cost as much as on many. So small writes are collected, and sent by a
//! task of their own, which is woken by the first of them, and comes when all who are ready by then had their turn and the sockets were
//! looked at once more: an upstream's answers to one client come in several pieces, between those to others.

use std::{
    cell::RefCell,
    future::poll_fn,
    io::{self, IoSlice},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    task::yield_now,
};

use super::{
    super::{http1::COPY, stream::Stream, thread},
    written::Written,
};

/// What is collected at most before it is sent in any case. A TLS record takes as much (RFC 8446, 5.1).
const MOST: usize = 16 * 1024;

/// The first GOAWAY of a graceful shutdown: without an error, and for the largest of all streams (RFC 9113, 6.8).
const FAREWELL: [u8; 17] = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0];

/// The stream of a connection. Must be used within a `LocalSet`.
pub(super) struct Batch<S: AsyncRead + AsyncWrite + Unpin + 'static = Stream>(Rc<RefCell<Inner<S>>>);

struct Inner<S> {
    stream: S,
    /// Collected, and sent up to `sent`. Holds no memory while there is nothing.
    output: Vec<u8>,
    sent: usize,
    /// Of the task that sends; taken while it is awake.
    sender: Option<Waker>,
    /// The connection itself waits for room, and sends what was collected when it comes. A socket wakes one task only.
    waiting: bool,
    /// What it failed with, for the next write.
    failed: Option<io::Error>,
    /// The connection is over.
    closed: bool,
    /// Towards a client.
    written: Option<Written>,
    /// The client is to be told that the connection will end, as soon as a frame may begin.
    farewell: bool,
}

/// Tells a client that its connection will end, while `h2` goes on as if nothing were.
///
/// `h2` would send a PING behind the GOAWAY, and drop the requests that come after its answer. But a client that is written with
/// `h2` and reads both at once answers the PING before it sends the requests that it had begun: they would be lost, and only some
/// clients repeat them.
pub(super) struct Farewell<S = Stream>(Rc<RefCell<Inner<S>>>);

impl<S: AsyncRead + AsyncWrite + Unpin> Farewell<S> {
    pub(super) fn send(&self) {
        let inner = &mut *self.0.borrow_mut();
        inner.farewell = true;
        inner.say_farewell();
        inner.wake_sender();
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + 'static> Batch<S> {
    /// `written` is for a connection of a client.
    pub(super) fn new(stream: S, written: Option<Written>) -> Self {
        let inner = Rc::new(RefCell::new(Inner {
            stream,
            output: Vec::new(),
            sent: 0,
            sender: None,
            waiting: false,
            failed: None,
            closed: false,
            written,
            farewell: false,
        }));
        let sending = Rc::clone(&inner);
        tokio::task::spawn_local(async move {
            let mut over = false;
            while !over {
                // What can be read by now is read first: what comes of it goes with the rest.
                yield_now().await;
                let mut woken = false;
                poll_fn(|cx| {
                    if std::mem::replace(&mut woken, true) {
                        return Poll::Ready(());
                    }
                    over = sending.borrow_mut().turn(cx);
                    if over { Poll::Ready(()) } else { Poll::Pending }
                })
                .await;
            }
        });
        Self(inner)
    }

    pub(super) fn farewell(&self) -> Farewell<S> {
        Farewell(Rc::clone(&self.0))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + 'static> Drop for Batch<S> {
    fn drop(&mut self) {
        let mut inner = self.0.borrow_mut();
        inner.closed = true;
        inner.wake_sender();
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Inner<S> {
    /// Sends what was collected.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.output.len() {
            let written = ready!(Pin::new(&mut self.stream).poll_write(cx, &self.output[self.sent..]))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += written;
        }
        self.rest();
        Poll::Ready(Ok(()))
    }

    /// A turn of the task that sends. Returns whether it was the last one; if not, the task is woken for the next.
    fn turn(&mut self, cx: &mut Context<'_>) -> bool {
        if !self.waiting
            && let Poll::Ready(Err(error)) = self.poll_send_all(cx)
        {
            self.failed = Some(error);
        }
        let over = self.closed || self.failed.is_some();
        if !over {
            self.sender = Some(cx.waker().clone());
        }
        over
    }

    fn rest(&mut self) {
        self.sent = 0;
        if self.output.capacity() > 0 {
            thread::give_output(std::mem::take(&mut self.output));
        }
    }

    fn poll_send_all(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx))?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn wake_sender(&mut self) {
        if let Some(sender) = self.sender.take() {
            sender.wake();
        }
    }

    /// After a write of the connection the sender is to look: a flush may be left, or it has to wait for room again.
    fn after<T>(&mut self, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        self.waiting = written.is_pending();
        if !self.waiting {
            self.wake_sender();
        }
        written
    }

    fn write(&mut self, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let written = self.poll_write(cx, bufs);
        if let (Some(frames), Poll::Ready(Ok(length))) = (&mut self.written, &written) {
            frames.pass(bufs, *length);
            self.say_farewell();
        }
        self.after(written)
    }

    fn say_farewell(&mut self) {
        if self.farewell && self.written.as_ref().is_some_and(Written::ends_a_frame) {
            self.farewell = false;
            self.collect(&[IoSlice::new(&FAREWELL)]);
        }
    }

    fn collect(&mut self, bufs: &[IoSlice<'_>]) {
        if self.output.capacity() == 0 {
            self.output = thread::take_output();
        }
        bufs.iter().for_each(|buf| self.output.extend_from_slice(buf));
    }

    /// Collects what is small, and sends what is large behind it.
    fn poll_write(&mut self, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        if let Some(error) = self.failed.take() {
            return Poll::Ready(Err(error));
        }
        let length = bufs.iter().map(|buf| buf.len()).sum::<usize>();
        if length <= COPY {
            if self.output.len() + length > MOST {
                ready!(self.poll_send(cx))?;
            }
            self.collect(bufs);
            return Poll::Ready(Ok(length));
        }
        loop {
            let before = self.output.len() - self.sent;
            let written = if before == 0 {
                ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, bufs))?
            } else {
                // What `h2` writes is the head of a frame and its content.
                let [first, second] = match bufs {
                    [first, second, ..] => [&**first, &**second],
                    [first] => [&**first, &[]],
                    [] => [&[] as &[u8], &[]],
                };
                let all = [&self.output[self.sent..], first, second].map(IoSlice::new);
                ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, &all))?
            };
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            if written >= before {
                self.rest();
                if written > before {
                    return Poll::Ready(Ok(written - before));
                }
            } else {
                self.sent += written;
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + 'static> AsyncRead for Batch<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0.borrow_mut().stream).poll_read(cx, buf)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + 'static> AsyncWrite for Batch<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().write(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().write(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.borrow().stream.is_write_vectored()
    }

    /// Left to the task that sends.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let inner = &mut *self.0.borrow_mut();
        let ended = match inner.poll_send(cx) {
            Poll::Ready(Ok(())) => Pin::new(&mut inner.stream).poll_shutdown(cx),
            sent @ (Poll::Ready(Err(_)) | Poll::Pending) => sent,
        };
        inner.after(ended)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
        task::LocalSet,
    };

    use super::*;

    /// Counts what is written to it.
    struct Counted(DuplexStream, Rc<RefCell<Vec<usize>>>);

    impl AsyncRead for Counted {
        fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_read(cx, buf)
        }
    }

    impl AsyncWrite for Counted {
        fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            let written = ready!(Pin::new(&mut self.0).poll_write(cx, buf))?;
            self.1.borrow_mut().push(written);
            Poll::Ready(Ok(written))
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_shutdown(cx)
        }
    }

    async fn with<T>(room: usize, test: impl AsyncFnOnce(Batch<Counted>, DuplexStream, Rc<RefCell<Vec<usize>>>) -> T) {
        LocalSet::new()
            .run_until(async {
                let (ours, theirs) = duplex(room);
                let writes = Rc::default();
                test(Batch::new(Counted(ours, Rc::clone(&writes)), None), theirs, writes).await;
            })
            .await;
    }

    #[tokio::test]
    async fn what_is_written_in_one_turn_is_sent_together_and_in_order() {
        with(1 << 20, async |mut batch, mut receiver, writes| {
            for part in 0..100_u8 {
                batch.write_all(&[part; 100]).await.unwrap();
                batch.flush().await.unwrap();
            }
            assert!(writes.borrow().is_empty(), "nothing before all had their turn");
            let mut seen = vec![0; 10_000];
            receiver.read_exact(&mut seen).await.unwrap();
            assert!(seen.chunks(100).zip(0..).all(|(part, number)| part == [number; 100]));
            assert_eq!(*writes.borrow(), [10_000]);
            assert_eq!(batch.0.borrow().output.capacity(), 0, "nothing is held for a quiet connection");
        })
        .await;
    }

    #[tokio::test]
    async fn what_others_write_who_can_go_on_by_then_is_sent_with_it() {
        with(1 << 20, async |mut batch, mut receiver, writes| {
            while batch.0.borrow().sender.is_none() {
                yield_now().await;
            }
            batch.write_all(b"first").await.unwrap();
            // As with an upstream's connection: what it has read lets several go on, one after the other.
            let (goes_on, other) = tokio::sync::oneshot::channel();
            tokio::task::spawn_local(async { goes_on.send(()) });
            other.await.unwrap();
            batch.write_all(b"second").await.unwrap();
            let mut seen = [0; 11];
            receiver.read_exact(&mut seen).await.unwrap();
            assert_eq!((&seen, &writes.borrow()[..]), (b"firstsecond", &[11][..]));
        })
        .await;
    }

    #[tokio::test]
    async fn small_and_large_keep_their_order_however_little_is_taken_at_once() {
        for room in [1, 100, 5000, 1 << 20] {
            with(room, async |mut batch, mut receiver, _| {
                let lengths = [10, 5000, 3, 4096, 4096, 4096, 4096, 4096, 20_000, 1, 0, 4097];
                let all: Vec<u8> = (0..lengths.iter().sum()).map(|at: usize| u8::try_from(at % 251).unwrap()).collect();
                let send = async {
                    let mut left = &all[..];
                    for length in lengths {
                        let (part, rest) = left.split_at(length);
                        batch.write_all(part).await.unwrap();
                        left = rest;
                    }
                    batch.shutdown().await.unwrap();
                };
                let mut seen = Vec::new();
                let ((), read) = tokio::join!(send, receiver.read_to_end(&mut seen));
                read.unwrap();
                assert!(seen == all, "with room for {room}");
            })
            .await;
        }
    }

    #[tokio::test]
    async fn no_more_is_collected_than_one_record_for_a_receiver_that_takes_nothing() {
        with(10, async |mut batch, _receiver, _| {
            let mut written = 0;
            poll_fn(|cx| {
                while let Poll::Ready(length) = Pin::new(&mut batch).poll_write(cx, &[0; 1000]) {
                    written += length.unwrap();
                }
                Poll::Ready(())
            })
            .await;
            assert_eq!(written, MOST / 1000 * 1000);
        })
        .await;
    }

    #[tokio::test]
    async fn a_receiver_that_is_gone_is_told_with_the_next_write_and_the_last_words_are_sent() {
        with(100, async |mut batch, receiver, _| {
            drop(receiver);
            batch.write_all(b"lost").await.unwrap();
            while batch.0.borrow().failed.is_none() {
                yield_now().await;
            }
            assert_eq!(batch.write_all(b"too late").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        })
        .await;
        with(100, async |mut batch, mut receiver, _| {
            batch.write_all(b"goodbye").await.unwrap();
            drop(batch);
            let mut seen = String::new();
            receiver.read_to_string(&mut seen).await.unwrap();
            assert_eq!(seen, "goodbye");
        })
        .await;
    }
}
