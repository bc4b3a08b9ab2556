//! One worker thread of the data path: it owns its sockets, pools and counters and shares nothing on the way of a
//! request. A new snapshot is applied between two polls, so that each request sees one configuration, whole.

mod affinity;
mod body;
mod cluster;
mod connection;
mod cors;
mod fault;
#[cfg(any(test, sluice_fuzz))]
pub(crate) mod fuzz;
mod headers;
mod health;
mod http1;
mod http2;
mod load;
mod matching;
mod mirror;
mod outgoing;
mod pool;
mod progress;
mod relay;
mod replay;
mod request;
mod retry;
mod rewrite;
mod serving;
mod slot;
mod socket;
mod stream;
mod tally;
pub(crate) mod tcp;
mod thread;
mod trace;

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    net::TcpListener,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, MissedTickBehavior, interval, sleep},
};

pub(crate) use self::socket::prepare_socket;
use self::{
    serving::{Clusters, Serving},
    slot::Slot,
};
use crate::{
    access_log::AccessLog,
    metrics::Metrics,
    overload::{Action, Overload},
    snapshot::Listener,
    tls::IdentityHandle,
    trace::Tracer,
    workers::{Role, Timing},
};

/// How often idle connections to upstreams are looked through, well below the shortest idle time, and some of all connections for those whose other
/// side has vanished.
const SWEEP: Duration = Duration::from_millis(250);

/// What every part of a worker may use.
pub(crate) struct Shared {
    pub(crate) thread: usize,
    pub(crate) role: Role,
    pub(crate) timing: Timing,
    pub(crate) identity: IdentityHandle,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) access_log: Option<AccessLog>,
    pub(crate) tracer: Option<Tracer>,
    pub(crate) overload: Overload,
}

pub(crate) enum Command {
    /// Serve so from now on, with sockets for the listeners that are new. Answered when it is so.
    Apply { changes: Arc<Changes>, sockets: Vec<(String, TcpListener)>, done: oneshot::Sender<()> },
    /// End all connections. Answered with how many were cut.
    Drain { settle: Duration, deadline: Instant, done: oneshot::Sender<usize> },
    /// Ask the connections that are open now to end in their time. New ones are served as ever.
    AnnounceDrain { done: oneshot::Sender<()> },
    /// Show a sign of life.
    Ping { done: oneshot::Sender<()> },
}

/// From one snapshot to the next.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    /// New, or in a new version, with their names.
    pub(crate) served: Vec<(String, Arc<Listener>)>,
    pub(crate) removed: Vec<String>,
}

struct Worker {
    shared: Rc<Shared>,
    slots: RefCell<BTreeMap<String, Rc<Slot>>>,
    /// Removed listeners that are not over yet.
    removed: RefCell<Vec<Rc<Slot>>>,
    clusters: RefCell<Clusters>,
}

/// Runs a worker until its commands end.
pub(crate) async fn run(shared: Shared, mut commands: mpsc::Receiver<Command>) {
    let worker = Rc::new(Worker {
        shared: Rc::new(shared),
        slots: RefCell::default(),
        removed: RefCell::default(),
        clusters: RefCell::default(),
    });
    let sweeper = tokio::task::spawn_local(sweep(Rc::clone(&worker)));
    while let Some(command) = commands.recv().await {
        match command {
            Command::Apply { changes, sockets, done } => {
                worker.apply(&changes, sockets);
                let _ = done.send(());
            }
            Command::Drain { settle, deadline, done } => {
                let worker = Rc::clone(&worker);
                tokio::task::spawn_local(async move {
                    sleep(settle).await;
                    let _ = done.send(worker.drain(deadline).await);
                });
            }
            Command::AnnounceDrain { done } => {
                worker.announce_drain();
                let _ = done.send(());
            }
            Command::Ping { done } => {
                let _ = done.send(());
            }
        }
    }
    sweeper.abort();
}

impl Worker {
    /// Switches to the next snapshot. There is no await in it: no request runs meanwhile.
    fn apply(&self, changes: &Changes, sockets: Vec<(String, TcpListener)>) {
        let mut slots = self.slots.borrow_mut();
        let mut clusters = self.clusters.borrow_mut();
        let mut sockets: HashMap<String, TcpListener> = sockets.into_iter().collect();
        // What is not served any more, in the version that was.
        let mut former = Vec::new();

        let is_elsewhere = |name, new: &Listener| slots.get(name).is_some_and(|slot| slot.address != new.address);
        let moved = changes.served.iter().filter(|(name, new)| is_elsewhere(name, new)).map(|(name, _)| name);
        let gone: Vec<&String> = changes.removed.iter().chain(moved).collect();
        for name in gone {
            if let Some(slot) = slots.remove(name) {
                slot.remove();
                former.push(Arc::clone(&slot.serving().listener));
                self.removed.borrow_mut().push(slot);
            }
        }
        for (name, listener) in &changes.served {
            if let Some(slot) = slots.get(name) {
                let before = Arc::clone(&slot.serving().listener);
                if !Arc::ptr_eq(&before, listener) {
                    clusters.take_up(listener, &self.shared);
                    slot.serve(Rc::new(Serving::new(listener, &clusters, &self.shared)));
                    former.push(before);
                }
                continue;
            }
            let Some(socket) = sockets.remove(name) else {
                continue;
            };
            clusters.take_up(listener, &self.shared);
            let serving = Rc::new(Serving::new(listener, &clusters, &self.shared));
            let slot = if let Some(slot) = self.take_removed(name, listener.address) {
                slot.revive();
                slot.serve(serving);
                slot
            } else {
                Slot::new(&self.shared, serving)
            };
            match tokio::net::TcpListener::from_std(socket) {
                Ok(socket) => slot.accept_on(socket),
                Err(error) => {
                    tracing::error!(listener = name, %error, "the listener's socket cannot be watched")
                }
            }
            slots.insert(name.clone(), slot);
        }
        // After all were taken up: what one listener lets go may be another's now.
        for listener in &former {
            clusters.let_go(listener);
        }
        drop((slots, clusters));
        self.removed.borrow_mut().retain(|slot| !slot.is_over());
    }

    fn take_removed(&self, name: &str, address: std::net::SocketAddr) -> Option<Rc<Slot>> {
        let mut removed = self.removed.borrow_mut();
        let index = removed.iter().position(|slot| slot.name == name && slot.address == address)?;
        Some(removed.swap_remove(index))
    }

    fn announce_drain(&self) {
        for slot in self.slots.borrow().values() {
            slot.announce_drain();
        }
    }

    async fn drain(&self, deadline: Instant) -> usize {
        let mut slots: Vec<_> = self.slots.borrow().values().cloned().collect();
        slots.extend(self.removed.borrow().iter().cloned());
        let cut = futures::future::join_all(slots.iter().map(|slot| slot.drain(deadline))).await;
        cut.into_iter().sum()
    }
}

async fn sweep(worker: Rc<Worker>) {
    let mut ticks = interval(SWEEP);
    // After a standstill they would come all at once.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let now = Instant::now();
        for cluster in worker.clusters.borrow().all() {
            cluster.each_endpoint(|endpoint| endpoint.sweep(&cluster.connector, now));
        }
        socket::look_for_vanished(now, SWEEP, worker.shared.timing.vanished);
        worker.removed.borrow_mut().retain(|slot| !slot.is_over());
        if worker.shared.overload.is_active(Action::DisableKeepalive) {
            for slot in worker.slots.borrow().values() {
                slot.drain_idle();
            }
        }
    }
}
