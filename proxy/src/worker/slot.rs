//! One listener on one worker thread: its sockets, its connections, its configuration of the moment, and its end.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    net::SocketAddr,
    rc::Rc,
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{
    Shared,
    connection::{self, Connection},
    serving::Serving,
};
use crate::{metrics::ListenerMetrics, refused::Refused, workers::BACKLOG};

/// Under pressure, a connection without a request for so long is idle, and so many of a listener are asked to end at once,
/// by each thread with each sweep.
const IDLE: Duration = Duration::from_secs(1);
const IDLE_AT_ONCE: usize = 64;

pub(super) struct Slot {
    pub(super) worker: Rc<Shared>,
    pub(super) name: String,
    pub(super) address: SocketAddr,
    pub(super) metrics: ListenerMetrics,
    serving: RefCell<Rc<Serving>>,
    version: Cell<u64>,
    connections: RefCell<HashMap<u64, Rc<Connection>>>,
    next_id: Cell<u64>,
    open: watch::Sender<usize>,
    accepting: RefCell<Vec<(CancellationToken, JoinHandle<()>)>>,
    /// New connections are drained, too.
    draining: Cell<bool>,
    removal: RefCell<Option<JoinHandle<()>>>,
    /// What looks at the streams of all connections, and how often.
    looking: RefCell<Option<(Duration, AbortOnDropHandle<()>)>>,
}

impl Slot {
    pub(super) fn new(worker: &Rc<Shared>, serving: Rc<Serving>) -> Rc<Self> {
        let name = serving.listener.name.clone();
        let slot = Rc::new(Self {
            metrics: worker.metrics.listener(&name, worker.thread),
            worker: Rc::clone(worker),
            name,
            address: serving.listener.address,
            serving: RefCell::new(serving),
            version: Cell::new(0),
            connections: RefCell::default(),
            next_id: Cell::new(0),
            open: watch::Sender::new(0),
            accepting: RefCell::default(),
            draining: Cell::new(false),
            removal: RefCell::default(),
            looking: RefCell::default(),
        });
        slot.look_as_configured();
        slot
    }

    /// One timer for all streams of this listener, if they have limits at all.
    fn look_as_configured(self: &Rc<Self>) {
        let every = self.serving.borrow().look_every();
        let mut looking = self.looking.borrow_mut();
        if looking.as_ref().map(|(every, _)| *every) == every {
            return;
        }
        *looking = every.map(|every| {
            let slot = Rc::downgrade(self);
            let looks = async move {
                let mut looked = Instant::now();
                loop {
                    sleep(every).await;
                    let Some(slot) = slot.upgrade() else { return };
                    let now = Instant::now();
                    let late = now.duration_since(std::mem::replace(&mut looked, now)) > 2 * every;
                    for connection in slot.connections.borrow().values() {
                        connection.look_at_streams(now, late);
                    }
                }
            };
            (every, AbortOnDropHandle::new(tokio::task::spawn_local(looks)))
        });
    }

    pub(super) fn serving(&self) -> Rc<Serving> {
        Rc::clone(&self.serving.borrow())
    }

    /// Changes with each new configuration.
    pub(super) fn version(&self) -> u64 {
        self.version.get()
    }

    pub(super) fn is_draining(&self) -> bool {
        self.draining.get()
    }

    pub(super) fn serve(self: &Rc<Self>, serving: Rc<Serving>) {
        *self.serving.borrow_mut() = serving;
        self.version.set(self.version.get() + 1);
        self.look_as_configured();
    }

    pub(super) fn accept_on(self: &Rc<Self>, socket: TcpListener) {
        let stop = CancellationToken::new();
        let task = tokio::task::spawn_local(accept(Rc::clone(self), socket, stop.clone()));
        self.accepting.borrow_mut().push((stop, task));
    }

    /// Registers a connection; it is open until its id is given to [`Slot::closed`].
    pub(super) fn opened(&self, make: impl FnOnce(u64) -> Rc<Connection>) -> Rc<Connection> {
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        let connection = make(id);
        self.connections.borrow_mut().insert(id, Rc::clone(&connection));
        self.open.send_modify(|open| *open += 1);
        self.worker.overload.opened();
        self.metrics.opened();
        connection
    }

    pub(super) fn closed(&self, id: u64) {
        if self.connections.borrow_mut().remove(&id).is_some() {
            self.open.send_modify(|open| *open -= 1);
            self.worker.overload.closed();
            self.metrics.closed();
        }
    }

    /// Whether there is room for one more connection: in the process, and of this listener, on all of its threads.
    fn admit(&self) -> Result<(), Refused> {
        self.worker.overload.admit_connection()?;
        let most = self.serving.borrow().listener.max_connections;
        if most.is_some_and(|most| self.metrics.open() >= most) {
            return Err(Refused::ConnectionLimit);
        }
        Ok(())
    }

    /// Asks some of the connections that are idle to end. Not all: they would all be made anew at once.
    pub(super) fn drain_idle(&self) {
        let idle: Vec<_> = {
            let open = self.connections.borrow();
            open.values().filter(|connection| connection.is_idle(IDLE)).take(IDLE_AT_ONCE).cloned().collect()
        };
        for connection in idle {
            connection.drain();
        }
    }

    /// The listener is no longer configured: clients that have not heard of it yet are served a little longer, then
    /// open connections from this last configuration, all within bounds and without a controller.
    pub(super) fn remove(self: &Rc<Self>) {
        let (slot, timing) = (Rc::clone(self), &self.worker.timing);
        let (accept_for, at_most) = (timing.removed_accept, timing.removed_serve);
        let task = tokio::task::spawn_local(async move {
            sleep(accept_for).await;
            let cut = slot.drain(Instant::now() + at_most).await;
            if cut > 0 {
                tracing::warn!(listener = slot.name, cut, "closed connections that outlived a removed listener");
            }
        });
        if let Some(before) = self.removal.borrow_mut().replace(task) {
            before.abort();
        }
    }

    /// The listener is configured again. Connections that are being drained stay so; they serve the newest
    /// configuration meanwhile.
    pub(super) fn revive(&self) {
        if let Some(removal) = self.removal.borrow_mut().take() {
            removal.abort();
        }
        self.draining.set(false);
    }

    /// Whether nothing is left of a removed listener.
    pub(super) fn is_over(&self) -> bool {
        self.removal.borrow().as_ref().is_none_or(JoinHandle::is_finished)
            && self.accepting.borrow().is_empty()
            && self.connections.borrow().is_empty()
    }

    /// Asks the connections that are open now to end, and goes on as before: whoever does not know of another endpoint
    /// yet is still served.
    pub(super) fn announce_drain(&self) {
        let open: Vec<_> = self.connections.borrow().values().cloned().collect();
        for connection in open {
            connection.drain();
        }
    }

    /// Accepts no more, asks all connections to end, and waits until they have, at most until the deadline.
    ///
    /// Returns how many were in use then and were cut.
    pub(super) async fn drain(self: &Rc<Self>, deadline: Instant) -> usize {
        self.draining.set(true);
        let accepting = std::mem::take(&mut *self.accepting.borrow_mut());
        for (stop, task) in accepting {
            stop.cancel();
            let _ = task.await;
        }
        let open: Vec<_> = self.connections.borrow().values().cloned().collect();
        for connection in open {
            connection.drain();
        }
        let mut changes = self.open.subscribe();
        if tokio::time::timeout_at(deadline, changes.wait_for(|open| *open == 0)).await.is_ok() {
            return 0;
        }
        let left: Vec<_> = self.connections.borrow().values().cloned().collect();
        let in_use = left.iter().filter(|connection| connection.is_in_use()).count();
        for connection in left {
            connection.cut();
        }
        // Each task ends when it is next polled.
        let _ = timeout(Duration::from_secs(1), changes.wait_for(|open| *open == 0)).await;
        in_use
    }
}

async fn accept(slot: Rc<Slot>, socket: TcpListener, stop: CancellationToken) {
    let mut pause = Backoff::default();
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            accepted = socket.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                pause = Backoff::default();
                start(&slot, stream, peer);
            }
            // The client has gone already; the next one may be fine.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                // Out of file descriptors or memory: more attempts at once would only burn the CPU that must free some.
                let pause = pause.next();
                if slot.worker.overload.tells_of_accepting(Instant::now()) {
                    tracing::error!(
                        listener = slot.name, %error, ?pause,
                        "cannot accept connections; this is said once a second, whichever listeners it is"
                    );
                } else {
                    tracing::debug!(listener = slot.name, %error, ?pause, "cannot accept connections");
                }
                tokio::select! {
                    () = stop.cancelled() => break,
                    () = sleep(pause) => {}
                }
            }
        }
    }
    // Connections that the kernel has completed are ours: closing the socket would reset them. The kernel itself is asked; what tokio
    // knows may be old. There are no more than wait at once: who comes meanwhile may come to another socket.
    let Ok(socket) = socket.into_std() else { return };
    for _ in 0..BACKLOG {
        let Ok((stream, peer)) = socket.accept() else { break };
        if let Ok(stream) = stream.set_nonblocking(true).and_then(|()| TcpStream::from_std(stream)) {
            start(&slot, stream, peer);
        }
    }
}

fn start(slot: &Rc<Slot>, stream: TcpStream, peer: SocketAddr) {
    if let Err(why) = slot.admit() {
        slot.metrics.refused(why);
        // A reset leaves nothing behind; an end in order would leave TIME_WAIT, for each of a flood.
        let _ = stream.set_zero_linger();
        return;
    }
    if let Some(connection) = Connection::accepted(slot, &stream, peer) {
        tokio::task::spawn_local(connection::run(connection, stream));
    }
}

/// 10 ms, doubled up to 1 s.
#[derive(Default)]
pub(super) struct Backoff(u32);

impl Backoff {
    pub(super) fn next(&mut self) -> Duration {
        let pause = Duration::from_millis(10) * 2_u32.pow(self.0.min(7));
        self.0 += 1;
        pause.min(Duration::from_secs(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_file_descriptors_the_pauses_grow_up_to_a_second() {
        let mut pause = Backoff::default();
        let pauses: Vec<_> = (0..9).map(|_| pause.next().as_millis()).collect();
        assert_eq!(pauses, [10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
    }
}
