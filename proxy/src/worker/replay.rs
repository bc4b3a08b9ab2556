//! The body of a request that may have to be sent again.

use std::{
    cell::RefCell,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};

use super::body::{BodyError, ClientBody};

/// How much of a request's body is kept to send it again, in bytes.
pub(super) const MAX_REPLAY: usize = 64 * 1024;

/// Adds to what is kept of a body. `false`: it would be more than [`MAX_REPLAY`].
///
/// It is copied, as a part of a body is one of the buffer that it was read into, and would hold all of that: 8 KiB for a single byte.
pub(super) fn keep(kept: &mut Vec<u8>, data: &[u8]) -> bool {
    let needed = kept.len() + data.len();
    if needed > MAX_REPLAY {
        return false;
    }
    if needed > kept.capacity() {
        // As a Vec grows by itself, but never beyond what is kept at most.
        kept.reserve_exact((2 * kept.capacity()).clamp(needed, MAX_REPLAY) - kept.len());
    }
    kept.extend_from_slice(data);
    true
}

/// The body of a request that may have to be sent again: what was sent is kept, until an answer arrives or it is more
/// than [`MAX_REPLAY`].
#[derive(Clone)]
pub(super) struct Replay(Rc<RefCell<Source>>);

struct Source {
    incoming: ClientBody,
    kept: Vec<u8>,
    /// How much of it the present attempt has given out.
    given: usize,
    keep: bool,
    trailers: Option<HeaderMap>,
    ended: bool,
    /// Attempt that may read.
    attempt: u32,
}

/// One sending of a [`Replay`].
pub(super) struct Attempt {
    source: Rc<RefCell<Source>>,
    number: u32,
    done: bool,
    /// What is left of a body of known length.
    left: Option<u64>,
}

impl Replay {
    pub(super) fn new(incoming: ClientBody) -> Self {
        Self(Rc::new(RefCell::new(Source {
            incoming,
            kept: Vec::new(),
            given: 0,
            keep: true,
            trailers: None,
            ended: false,
            attempt: 0,
        })))
    }

    /// The body from its start, if all that was sent of it is still there. An earlier attempt reads no further.
    pub(super) fn attempt(&self) -> Option<Attempt> {
        let mut source = self.0.borrow_mut();
        if !source.keep {
            return None;
        }
        source.attempt += 1;
        source.given = 0;
        let kept = source.kept.len() as u64;
        let left = match (&source.trailers, source.ended) {
            // Behind content of a length that is said first, HTTP/1.1 has no place for them.
            (Some(_), _) => None,
            (None, true) => Some(0),
            (None, false) => source.incoming.size_hint().exact(),
        };
        Some(Attempt {
            source: Rc::clone(&self.0),
            number: source.attempt,
            done: false,
            left: left.map(|left| left + kept),
        })
    }

    /// An answer has arrived: the request will not be sent again.
    pub(super) fn settle(&self) {
        self.0.borrow_mut().keep_no_more();
    }
}

impl Source {
    /// What was kept and is to be sent once more. Copied, as that is rare.
    fn again(&mut self) -> Option<Bytes> {
        if self.given == self.kept.len() {
            return None;
        }
        let data = Bytes::copy_from_slice(&self.kept[self.given..]);
        self.given = self.kept.len();
        if !self.keep {
            self.keep_no_more();
        }
        Some(data)
    }

    /// What comes from now on is not kept, and what was is gone as soon as the present attempt has given it out.
    fn keep_no_more(&mut self) {
        self.keep = false;
        if self.given == self.kept.len() {
            (self.kept, self.given) = (Vec::new(), 0);
        }
    }

    fn pass(&mut self, data: &[u8]) {
        if self.keep && keep(&mut self.kept, data) {
            self.given = self.kept.len();
        } else {
            self.keep_no_more();
        }
    }
}

impl Body for Attempt {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        let mut source = this.source.borrow_mut();
        let source = &mut *source;
        if source.attempt != this.number {
            return Poll::Ready(Some(Err(BodyError::Superseded)));
        }
        if this.done {
            return Poll::Ready(None);
        }
        if let Some(data) = source.again() {
            take(&mut this.left, &data);
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        if source.ended {
            this.done = true;
            return Poll::Ready(source.trailers.clone().map(|trailers| Ok(Frame::trailers(trailers))));
        }
        match ready!(Pin::new(&mut source.incoming).poll_frame(cx)) {
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => {
                    source.pass(&data);
                    take(&mut this.left, &data);
                    Poll::Ready(Some(Ok(Frame::data(data))))
                }
                Err(frame) => {
                    source.ended = true;
                    this.done = true;
                    source.trailers = frame.into_trailers().ok();
                    Poll::Ready(source.trailers.clone().map(|trailers| Ok(Frame::trailers(trailers))))
                }
            },
            Some(Err(error)) => {
                source.keep_no_more();
                Poll::Ready(Some(Err(error)))
            }
            None => {
                source.ended = true;
                this.done = true;
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        let source = self.source.borrow();
        self.done
            || (source.given == source.kept.len()
                && source.trailers.is_none()
                && (source.ended || source.incoming.is_end_stream()))
    }

    fn size_hint(&self) -> SizeHint {
        self.left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

fn take(left: &mut Option<u64>, data: &Bytes) {
    if let Some(left) = left {
        *left = left.saturating_sub(u64::try_from(data.len()).unwrap_or(u64::MAX));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::collections::BTreeSet;

    use futures::FutureExt;
    use http_body_util::BodyExt;
    use tokio::{
        io::AsyncWriteExt,
        net::{TcpListener, TcpStream},
    };

    use super::{
        super::{
            body::RequestBody,
            headers::Peer,
            http1::{READ, server::Connection},
            stream::Stream,
        },
        *,
    };

    #[test]
    fn what_is_kept_takes_no_more_room_than_it_may_however_it_comes() {
        for part in [1, 3, 1000, 40_000, MAX_REPLAY, MAX_REPLAY + 1] {
            let mut kept = Vec::new();
            while keep(&mut kept, &vec![0; part]) {
                assert!(kept.capacity() <= MAX_REPLAY, "{} in parts of {part}", kept.capacity());
            }
            assert_eq!(kept.len(), MAX_REPLAY / part * part);
        }
    }

    #[tokio::test]
    async fn what_is_kept_of_tiny_parts_holds_none_of_the_buffers_that_they_were_read_into() {
        const PARTS: usize = 1000;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        client.set_nodelay(true).unwrap();
        let mut connection =
            Connection::new(Stream::plain(listener.accept().await.unwrap().0), Rc::default(), Peer::Anybody);
        let head = format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {PARTS}\r\n\r\n");
        client.write_all(head.as_bytes()).await.unwrap();
        let request = connection.request(|_, _| Poll::Pending).await.unwrap().unwrap();
        let RequestBody::Once(body) = request.into_body() else { panic!("it has no body") };
        let replay = Replay::new(body);
        let mut attempt = replay.attempt().unwrap();
        let mut buffers = BTreeSet::new();
        for _ in 0..PARTS {
            assert!(attempt.frame().now_or_never().is_none(), "it waits, and gives its buffer to others");
            client.write_all(b"x").await.unwrap();
            let part = attempt.frame().await.unwrap().unwrap().into_data().unwrap();
            buffers.insert(part.as_ptr() as usize / READ);
        }
        assert!(buffers.len() < 10, "{} buffers for {PARTS} bytes", buffers.len());
        let again = replay.attempt().unwrap().collect().await.unwrap().to_bytes();
        assert_eq!(again, [b'x'; PARTS][..]);
    }
}
