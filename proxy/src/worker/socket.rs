//! A TCP connection: how it is set up, how small writes leave it, and how it is found out that the other side has vanished.
//!
//! Where nothing is on its way, the kernel asks for a sign of life (keepalive), and where something is, keepalive is silent. `TCP_USER_TIMEOUT`
//! would be for that, but it also ends the connection of a peer that answers every probe and does not read for a while, and keepalive
//! goes by it instead of its own count (tcp(7)). How long a stream may rest is not for the kernel to say. So each thread looks at its
//! connections once in a while, and asks the kernel about those that were written to and have said nothing since the last look.

use std::{
    cell::{Cell, Ref, RefCell, RefMut},
    collections::VecDeque,
    io,
    net::Shutdown,
    pin::Pin,
    rc::{Rc, Weak},
    task::{Context, Poll, ready},
    time::Duration,
};

use sluice_tcp_info::{TcpInfo, tcp_info};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Instant, sleep},
};

use super::{progress::Progress, slot::Backoff};

/// After so long without a sign of life the other side of a connection is asked for one, and after 15 s more without an answer it has vanished. A
/// client may be on a phone; an upstream that vanished without a word is to be found, with the request that it has, within half a minute.
pub(super) const CLIENT_QUIET: Duration = Duration::from_secs(60);
pub(super) const UPSTREAM_QUIET: Duration = Duration::from_secs(15);

/// Looks within the time in which who has vanished is to be found. A silence is seen up to two looks late, and counts for so much less.
const LOOKS: u32 = 10;
const LATE: u32 = 2;

/// Up to here copying costs less than the vector, in bytes.
const COALESCE: usize = 2048;

thread_local! {
    /// The connections of this thread. Those that are closed go with the next look.
    static OPEN: RefCell<VecDeque<Weak<Watched>>> = const { RefCell::new(VecDeque::new()) };
}

/// For both ends of a proxied connection, and towards a collector: no delay of small writes, and an end for peers that vanished without a word
/// while nothing was on its way to them. PINGs of HTTP/2 would be punished by gRPC servers (gRFC A8).
pub(crate) fn prepare_socket(stream: &TcpStream, quiet: Duration) {
    let _ = stream.set_nodelay(true);
    let keepalive = TcpKeepalive::new().with_time(quiet).with_interval(Duration::from_secs(5)).with_retries(3);
    let _ = SockRef::from(stream).set_tcp_keepalive(&keepalive);
}

/// Looks at a part of this thread's connections, and ends those whose other side has been silent for `limit`, about. Called every so often.
pub(super) fn look_for_vanished(now: Instant, every: Duration, limit: Duration) {
    let calls = (limit / LOOKS).as_nanos() / every.as_nanos().max(1);
    let calls = usize::try_from(calls).unwrap_or(usize::MAX).max(1);
    OPEN.with_borrow_mut(|open| {
        for _ in 0..open.len().div_ceil(calls) {
            let Some(next) = open.pop_front() else { return };
            if let Some(connection) = next.upgrade() {
                connection.look(now, limit / LOOKS * (LOOKS - LATE));
                open.push_back(next);
            }
        }
    });
}

/// A TCP connection that is looked at. Small vectored writes are copied together and sent with send(2): cheaper than writev(2), which
/// takes the way through the file system's layer and imports the vector first.
pub(super) struct Socket(Rc<Watched>);

struct Watched {
    tcp: RefCell<TcpStream>,
    /// Bytes have come since the last look.
    heard: Cell<bool>,
    /// Something was written that may not have arrived.
    owed: Cell<bool>,
    /// The look since which it has not answered.
    silent_since: Cell<Option<Instant>>,
    vanished: Cell<bool>,
}

/// What the kernel knows of the other side.
#[derive(Debug, PartialEq, Eq)]
enum Peer {
    /// It has all that was written.
    HasAll,
    /// It answers, and does not take all.
    Answers,
    /// It has not answered yet what was sent last. Before the last look it did.
    IsAsked,
    /// It has not answered since.
    IsSilent,
    Vanished,
}

impl Peer {
    /// `silent_for` is for how long something has been unanswered, as far as looks have seen it.
    ///
    /// When it was last heard is not enough: of a closed window the kernel asks ever more rarely, every two minutes in the end.
    fn of(known: &TcpInfo, silent_for: Option<Duration>, limit: Duration) -> Self {
        if known.has_arrived() {
            return Self::HasAll;
        }
        let heard = known.last_ack_received.min(known.last_data_received);
        let is_asked = known.unanswered_probes > 0 || (known.unacknowledged > 0 && known.last_data_sent < heard);
        match silent_for {
            _ if !is_asked => Self::Answers,
            Some(silent_for) if silent_for <= heard && silent_for >= limit => Self::Vanished,
            Some(silent_for) if silent_for <= heard => Self::IsSilent,
            Some(_) | None => Self::IsAsked,
        }
    }
}

impl Watched {
    /// Ends it if the other side has been silent for `limit`.
    fn look(&self, now: Instant, limit: Duration) {
        if self.heard.take() || !self.owed.get() {
            return self.silent_since.set(None);
        }
        let tcp = self.tcp.borrow();
        let Ok(known) = tcp_info(&*tcp) else { return };
        let silent_for = self.silent_since.get().map(|since| now.duration_since(since));
        match Peer::of(&known, silent_for, limit) {
            Peer::HasAll => {
                self.owed.set(false);
                self.silent_since.set(None);
            }
            Peer::Answers => self.silent_since.set(None),
            Peer::IsAsked => self.silent_since.set(Some(now)),
            Peer::IsSilent => {}
            Peer::Vanished => {
                tracing::debug!(peer = ?tcp.peer_addr().ok(), ?known, "connection ended: the other side has vanished");
                self.owed.set(false);
                self.vanished.set(true);
                reset_when_closed(&tcp, true);
                // Wakes whoever waits for it.
                let _ = SockRef::from(&*tcp).shutdown(Shutdown::Both);
            }
        }
    }

    fn to_write(&self) -> RefMut<'_, TcpStream> {
        self.owed.set(true);
        self.tcp.borrow_mut()
    }
}

fn reset_when_closed(tcp: &TcpStream, reset: bool) {
    let _ = SockRef::from(tcp).set_linger(reset.then_some(Duration::ZERO));
}

impl Socket {
    pub(super) fn new(stream: TcpStream) -> Self {
        let watched = Rc::new(Watched {
            tcp: RefCell::new(stream),
            heard: Cell::new(false),
            owed: Cell::new(false),
            silent_since: Cell::new(None),
            vanished: Cell::new(false),
        });
        OPEN.with_borrow_mut(|open| open.push_back(Rc::downgrade(&watched)));
        Self(watched)
    }

    pub(super) fn tcp(&self) -> Ref<'_, TcpStream> {
        self.0.tcp.borrow()
    }

    /// Waits until the other side has all that was written, or cannot get it any more. `progress` is told of what arrives, and ends the wait.
    pub(super) async fn arrived(&self, progress: &Progress) {
        let (mut pause, mut before) = (Backoff::default(), None);
        loop {
            let Ok(known) = tcp_info(&*self.tcp()) else { return };
            if known.has_arrived() || known.is_closed || self.0.vanished.get() || progress.is_idle() {
                return;
            }
            let left = Some((known.unacknowledged, known.not_sent));
            if before != left {
                before = left;
                progress.pass();
            }
            sleep(pause.next()).await;
        }
    }

    /// Whether the other side sees a reset when it is closed, by whomever, or an end in order.
    pub(super) fn reset_when_closed(&self, reset: bool) {
        reset_when_closed(&self.tcp(), reset);
    }
}

impl AsyncRead for Socket {
    /// # Errors
    /// `TimedOut` behind what came before the other side vanished.
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut *self.0.tcp.borrow_mut()).poll_read(cx, buf))?;
        if buf.filled().len() > before {
            self.0.heard.set(true);
        } else if self.0.vanished.get() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0.to_write()).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let stream = &mut *self.0.to_write();
        let stream = Pin::new(stream);
        if let [only] = bufs {
            return stream.poll_write(cx, only);
        }
        let mut joined = [0; COALESCE];
        let mut length = 0;
        for buf in bufs {
            let end = length + buf.len();
            let Some(space) = joined.get_mut(length..end) else {
                return stream.poll_write_vectored(cx, bufs);
            };
            space.copy_from_slice(buf);
            length = end;
        }
        stream.poll_write(cx, &joined[..length])
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.tcp.borrow_mut()).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.to_write()).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const LIMIT: Duration = Duration::from_secs(24);

    /// What was unacknowledged, not sent, and unanswered of probes; how many seconds ago data was sent, data came, and an acknowledgement came.
    fn known(unacknowledged: u32, not_sent: u32, probes: u8, [sent, data, ack]: [u64; 3]) -> TcpInfo {
        TcpInfo {
            is_closed: false,
            unacknowledged,
            not_sent,
            unanswered_probes: probes,
            last_data_sent: Duration::from_secs(sent),
            last_data_received: Duration::from_secs(data),
            last_ack_received: Duration::from_secs(ack),
        }
    }

    #[test]
    fn only_who_leaves_something_unanswered_for_the_whole_time_has_vanished() {
        let silent_for = |seconds| Some(Duration::from_secs(seconds));
        let table = [
            ("idle", known(0, 0, 0, [90, 90, 90]), None, Peer::HasAll),
            ("idle, and asked by keepalive", known(0, 0, 2, [90, 90, 90]), silent_for(60), Peer::HasAll),
            ("acknowledged after a silence", known(0, 0, 0, [1, 90, 1]), silent_for(24), Peer::HasAll),
            ("written to after an hour at rest", known(1, 0, 0, [0, 3600, 3600]), None, Peer::IsAsked),
            ("vanished a while ago", known(3, 9000, 0, [1, 90, 20]), silent_for(18), Peer::IsSilent),
            ("vanished", known(3, 9000, 0, [1, 90, 30]), silent_for(24), Peer::Vanished),
            ("heard since, and again asked", known(3, 9000, 0, [1, 90, 5]), silent_for(24), Peer::IsAsked),
            ("sends data, and acknowledges nothing new", known(3, 0, 0, [1, 2, 30]), silent_for(24), Peer::IsAsked),
            ("its window is closed, and it answers", known(0, 9000, 0, [300, 300, 110]), None, Peer::Answers),
            ("the same after a silence", known(0, 9000, 0, [300, 300, 1]), silent_for(24), Peer::Answers),
            ("its window is closed, and it is asked", known(0, 9000, 1, [300, 300, 115]), None, Peer::IsAsked),
            ("vanished behind a closed window", known(0, 9000, 1, [300, 300, 140]), silent_for(24), Peer::Vanished),
            // A window that was taken back: what is in flight stays so, and is sent again ever more rarely.
            ("answers, and takes nothing", known(2, 9000, 0, [80, 300, 80]), silent_for(24), Peer::Answers),
        ];
        for (what, known, silent_for, peer) in table {
            assert_eq!(Peer::of(&known, silent_for, LIMIT), peer, "{what}");
        }
    }

    #[tokio::test]
    async fn a_peer_that_vanished_while_nothing_was_on_its_way_is_found_within_half_a_minute() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        prepare_socket(&stream, UPSTREAM_QUIET);
        let socket = SockRef::from(&stream);
        assert!(socket.keepalive().unwrap());
        let (quiet, interval) = (socket.tcp_keepalive_time().unwrap(), socket.tcp_keepalive_interval().unwrap());
        assert_eq!((quiet, interval), (Duration::from_secs(15), Duration::from_secs(5)));
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), 3);
        // It would take the place of that count.
        assert_eq!(socket.tcp_user_timeout().unwrap(), None);
    }
}
