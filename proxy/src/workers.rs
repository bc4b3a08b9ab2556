//! The data path: worker threads that serve snapshots.
//!
//! Each worker is one OS thread with a runtime of its own and a socket of its own per listener (`SO_REUSEPORT`), so that
//! a request never leaves its thread.

use std::{
    cmp::Ordering,
    collections::BTreeMap,
    io,
    net::{SocketAddr, TcpListener},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use rustls::pki_types::ServerName;
use tokio::{
    runtime::{Builder, LocalOptions},
    sync::{Mutex, mpsc, oneshot},
    time::Instant,
};

use crate::{
    access_log::AccessLog,
    metrics::Metrics,
    overload::Overload,
    snapshot::{self, FilterChain, Listener, Snapshot},
    tls::IdentityHandle,
    trace::Tracer,
    worker::{self, Changes, Command, Shared},
};

/// Which of the two proxies this process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Serves users: notes who the client is, tries another endpoint when a sidecar did not process a request.
    Fleet,
    /// Serves the fleet, beside the application: says when it did not process a request.
    Sidecar,
}

/// Waiting times of the data path. The defaults are those of the role.
#[derive(Debug, Clone)]
pub struct Timing {
    /// For a client's whole TLS handshake, and for ours with an upstream.
    pub tls_handshake: Duration,
    /// For the first byte on a plaintext connection.
    pub first_byte: Duration,
    /// After this long a head that is still incomplete ends its connection, at the latest after twice as long.
    pub header: Duration,
    /// An idle connection of a client is closed after it. A sidecar never closes one: the fleet would meet the close
    /// with a request.
    pub downstream_idle: Option<Duration>,
    /// Idle connections to proxies of ours, and idle HTTP/2 connections, are kept for it.
    pub own_hop_idle: Duration,
    /// Idle HTTP/1.1 connections to applications are kept for it; common servers close theirs after 2 to 5 s.
    pub application_idle: Duration,
    /// While draining, an idle HTTP/1.1 connection is closed after it, else at the deadline. The longer, the more clients are told with
    /// an answer, and the fewer requests meet the close: what is no longer used after it is hardly used at all.
    pub drain_idle: Option<Duration>,
    /// An HTTP/2 client that is told that its connection will end may begin requests on it for so long still.
    pub farewell: Duration,
    /// When the process drains, connections are accepted for so long still, until the cluster knows.
    pub settle: Duration,
    /// A removed listener accepts for so long still.
    pub removed_accept: Duration,
    /// And serves open connections for so long after that.
    pub removed_serve: Duration,
    /// About so long after something was sent that nobody acknowledged, the other side of a connection has vanished. Not one that answers and does
    /// not read.
    pub vanished: Duration,
}

impl Timing {
    #[must_use]
    pub fn of(role: Role) -> Self {
        let (downstream_idle, drain_idle) = match role {
            Role::Fleet => (Some(Duration::from_secs(3600)), Some(Duration::from_secs(20))),
            Role::Sidecar => (None, None),
        };
        Self {
            tls_handshake: Duration::from_secs(5),
            first_byte: Duration::from_secs(60),
            header: Duration::from_secs(10),
            downstream_idle,
            own_hop_idle: Duration::from_secs(60),
            application_idle: Duration::from_secs(1),
            drain_idle,
            farewell: Duration::from_secs(5),
            settle: Duration::from_secs(5),
            removed_accept: Duration::from_secs(10),
            removed_serve: Duration::from_secs(300),
            vanished: Duration::from_secs(30),
        }
    }
}

#[derive(Debug, Clone)]
pub struct Options {
    pub role: Role,
    pub timing: Timing,
    /// Its number of threads is the number of workers.
    pub metrics: Arc<Metrics>,
    pub identity: IdentityHandle,
    pub access_log: Option<AccessLog>,
    /// Without it requests have no spans, and their trace context passes as it came.
    pub tracer: Option<Tracer>,
    pub overload: Overload,
}

#[derive(Debug, thiserror::Error)]
pub enum WorkersError {
    #[error("the data path needs at least one worker thread; check SLUICE_WORKERS")]
    NoThreads,
    #[error("worker thread {0} cannot be started: {1}; check the limits of processes and open files")]
    Start(usize, #[source] io::Error),
    #[error("worker thread {0} has ended; this proxy must be restarted")]
    Gone(usize),
    #[error("worker thread {0} shows no sign of life; this proxy must be restarted")]
    Stuck(usize),
}

/// What became of a snapshot.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct ApplyReport {
    /// Listeners that stay as they were before (absent, if new), with the reason.
    pub rejected: Vec<Rejected>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    pub listener: String,
    pub reason: String,
}

/// What became of a drain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drained {
    /// Connections that were still in use at the deadline, and were closed.
    pub cut: usize,
}

/// The worker threads. Dropping it ends them and closes all connections.
#[derive(Debug)]
pub struct Workers {
    threads: Vec<Thread>,
    settle: Duration,
    overload: Overload,
    /// What the threads were told to serve. Held while a snapshot is being applied, so that they are applied in order.
    current: Mutex<BTreeMap<String, Arc<Listener>>>,
}

#[derive(Debug)]
struct Thread {
    commands: Option<mpsc::Sender<Command>>,
    handle: Option<JoinHandle<()>>,
}

impl Workers {
    /// Starts the threads. They serve nothing until a snapshot is applied.
    ///
    /// # Errors
    /// When a thread or its runtime cannot be started.
    pub fn start(options: &Options) -> Result<Self, WorkersError> {
        let count = options.metrics.threads();
        if count == 0 {
            return Err(WorkersError::NoThreads);
        }
        let threads = (0..count).map(|index| start(index, options)).collect::<Result<_, _>>()?;
        Ok(Self {
            threads,
            settle: options.timing.settle,
            overload: options.overload.clone(),
            current: Mutex::default(),
        })
    }

    /// Switches all threads to a snapshot. When it returns, no request that starts later uses an older one.
    ///
    /// A listener that cannot be served is reported and stays as it was; all others are switched.
    ///
    /// # Errors
    /// When a thread has ended.
    pub async fn apply(&self, snapshot: &Snapshot) -> Result<ApplyReport, WorkersError> {
        let mut current = self.current.lock().await;
        let mut report = ApplyReport::default();
        let mut changes = Changes::default();
        let mut sockets: Vec<Vec<(String, TcpListener)>> = self.threads.iter().map(|_| Vec::new()).collect();
        for (name, before, listener) in differences(&current, &snapshot.listeners) {
            let Some(listener) = listener else {
                changes.removed.push(name.clone());
                continue;
            };
            let opened = check(listener).and_then(|()| {
                if before.is_some_and(|before| before.address == listener.address) {
                    return Ok(Vec::new());
                }
                let bind = |_| bind(listener.address).map_err(|error| unbound(listener.address, &error));
                (0..self.threads.len()).map(bind).collect()
            });
            match opened {
                Ok(opened) => {
                    for (thread, socket) in sockets.iter_mut().zip(opened) {
                        thread.push((name.clone(), socket));
                    }
                    changes.served.push((name.clone(), Arc::clone(listener)));
                }
                Err(reason) => report.rejected.push(Rejected { listener: name.clone(), reason }),
            }
        }
        let new = changes.served.iter().filter(|(name, _)| !current.contains_key(name)).count();
        self.overload.listens_on((current.len() + new - changes.removed.len()) * self.threads.len());
        let changes = Arc::new(changes);
        let mut switched = Vec::with_capacity(self.threads.len());
        for (index, (thread, sockets)) in self.threads.iter().zip(sockets).enumerate() {
            let (done, wait) = oneshot::channel();
            thread.send(index, Command::Apply { changes: Arc::clone(&changes), sockets, done }).await?;
            switched.push(wait);
        }
        // Before the waits, in which this future may be dropped.
        for name in &changes.removed {
            current.remove(name);
        }
        current.extend(changes.served.iter().cloned());
        for (index, wait) in switched.into_iter().enumerate() {
            wait.await.map_err(|_| WorkersError::Gone(index))?;
        }
        Ok(report)
    }

    /// Asks all connections that are open now to end in their time (GOAWAY, `connection: close`), and goes on serving,
    /// also new connections.
    ///
    /// # Errors
    /// When a thread has ended.
    pub async fn announce_drain(&self) -> Result<(), WorkersError> {
        self.each(|done| Command::AnnounceDrain { done }).await
    }

    /// Asks each thread for a sign of life.
    ///
    /// # Errors
    /// When one has ended, or does not answer within `limit`.
    pub async fn ping(&self, limit: Duration) -> Result<(), WorkersError> {
        let deadline = Instant::now() + limit;
        for (index, thread) in self.threads.iter().enumerate() {
            let (done, wait) = oneshot::channel();
            let answer = async {
                thread.send(index, Command::Ping { done }).await?;
                wait.await.map_err(|_| WorkersError::Gone(index))
            };
            tokio::time::timeout_at(deadline, answer).await.unwrap_or(Err(WorkersError::Stuck(index)))?;
        }
        Ok(())
    }

    /// Gives each thread a command, and waits until all have carried it out.
    async fn each(&self, command: impl Fn(oneshot::Sender<()>) -> Command) -> Result<(), WorkersError> {
        let mut waits = Vec::with_capacity(self.threads.len());
        for (index, thread) in self.threads.iter().enumerate() {
            let (done, wait) = oneshot::channel();
            thread.send(index, command(done)).await?;
            waits.push(wait);
        }
        for (index, wait) in waits.into_iter().enumerate() {
            wait.await.map_err(|_| WorkersError::Gone(index))?;
        }
        Ok(())
    }

    /// Ends the service: accepts for the settle time still, then asks all connections to end, and returns when they
    /// have, or after `deadline`, counted from now.
    ///
    /// # Errors
    /// When a thread has ended.
    pub async fn drain(&self, deadline: Duration) -> Result<Drained, WorkersError> {
        let settle = self.settle.min(deadline);
        let deadline = Instant::now() + deadline;
        let mut waits = Vec::with_capacity(self.threads.len());
        for (index, thread) in self.threads.iter().enumerate() {
            let (done, wait) = oneshot::channel();
            thread.send(index, Command::Drain { settle, deadline, done }).await?;
            waits.push(wait);
        }
        let mut cut = 0;
        for (index, wait) in waits.into_iter().enumerate() {
            cut += wait.await.map_err(|_| WorkersError::Gone(index))?;
        }
        Ok(Drained { cut })
    }
}

impl Thread {
    async fn send(&self, index: usize, command: Command) -> Result<(), WorkersError> {
        let commands = self.commands.as_ref().ok_or(WorkersError::Gone(index))?;
        commands.send(command).await.map_err(|_| WorkersError::Gone(index))
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for thread in &mut self.threads {
            thread.commands = None;
        }
        for thread in &mut self.threads {
            if let Some(handle) = thread.handle.take() {
                let _ = handle.join();
            }
        }
    }
}

fn start(index: usize, options: &Options) -> Result<Thread, WorkersError> {
    let shared = Shared {
        thread: index,
        role: options.role,
        timing: options.timing.clone(),
        identity: options.identity.clone(),
        metrics: Arc::clone(&options.metrics),
        access_log: options.access_log.clone(),
        tracer: options.tracer.clone(),
        overload: options.overload.clone(),
    };
    // One snapshot and one drain at a time; a sender waits if there are more.
    let (commands, receiver) = mpsc::channel(4);
    let (started, has_started) = std::sync::mpsc::sync_channel(1);
    let body = move || {
        let runtime = match Builder::new_current_thread().enable_all().build_local(LocalOptions::default()) {
            Ok(runtime) => runtime,
            Err(error) => {
                let _ = started.send(Err(error));
                return;
            }
        };
        let _ = started.send(Ok(()));
        // A proxy with a part of its threads would accept connections and serve none of them: better a restart.
        if catch_unwind(AssertUnwindSafe(|| runtime.block_on(worker::run(shared, receiver)))).is_err() {
            tracing::error!(worker = index, "a worker thread panicked; the process ends");
            std::process::abort();
        }
    };
    let handle = thread::Builder::new()
        .name(format!("worker-{index}"))
        .spawn(body)
        .map_err(|error| WorkersError::Start(index, error))?;
    match has_started.recv() {
        Ok(Ok(())) => Ok(Thread { commands: Some(commands), handle: Some(handle) }),
        Ok(Err(error)) => Err(WorkersError::Start(index, error)),
        Err(_) => Err(WorkersError::Gone(index)),
    }
}

type Difference<'a> = (&'a String, Option<&'a Arc<Listener>>, Option<&'a Arc<Listener>>);

/// The listeners that are not the same `Arc` in both, with what they were and what they are to be.
fn differences<'a>(
    old: &'a BTreeMap<String, Arc<Listener>>,
    new: &'a BTreeMap<String, Arc<Listener>>,
) -> Vec<Difference<'a>> {
    let (mut old, mut new) = (old.iter().peekable(), new.iter().peekable());
    let mut found = Vec::new();
    loop {
        // Both are in the order of their names.
        let first = match (old.peek(), new.peek()) {
            (Some((old, _)), Some((new, _))) => old.cmp(new),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => return found,
        };
        let before = if first.is_le() { old.next() } else { None };
        let now = if first.is_ge() { new.next() } else { None };
        match (before, now) {
            (Some((_, before)), Some((_, now))) if Arc::ptr_eq(before, now) => {}
            (before, now) => {
                let name = before.or(now).map(|(name, _)| name);
                found.extend(name.map(|name| (name, before.map(|it| it.1), now.map(|it| it.1))));
            }
        }
    }
}

/// What the types allow but a worker cannot serve.
fn check(listener: &Listener) -> Result<(), String> {
    let mut names = Vec::new();
    for chain in &listener.chains {
        if names.contains(&chain.server_name.as_deref()) {
            return Err(format!("two filter chains for the server name {:?}", chain.server_name));
        }
        names.push(chain.server_name.as_deref());
        if chain.server_name.is_some() && chain.tls.is_none() {
            return Err("a filter chain with a server name but without TLS".to_owned());
        }
        if chain.tls.is_some() != listener.chains[0].tls.is_some() {
            return Err("filter chains with and without TLS".to_owned());
        }
        for tls in clusters(chain).filter_map(|cluster| cluster.tls.as_ref()) {
            if ServerName::try_from(tls.sni.as_str()).is_err() {
                return Err(format!("{:?} cannot be sent as SNI", tls.sni));
            }
        }
    }
    Ok(())
}

fn clusters(chain: &FilterChain) -> impl Iterator<Item = &snapshot::Cluster> {
    chain.protocol.splits().flat_map(snapshot::Split::clusters).map(|cluster| &**cluster)
}

/// Connections of a socket that wait to be accepted. The kernel takes `net.core.somaxconn` if that is less.
pub(crate) const BACKLOG: i32 = 4096;

/// A listening socket that shares its port with those of the other threads.
fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    sluice_health::listen_with(address, BACKLOG, |socket| socket.set_reuse_port(true))
}

fn unbound(address: SocketAddr, error: &io::Error) -> String {
    format!("{address} cannot be listened on: {error}")
}
