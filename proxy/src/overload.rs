//! What a proxy does before it runs out of memory or of file descriptors, after Envoy's overload manager
//! (<https://www.envoyproxy.io/docs/envoy/latest/configuration/operations/overload_manager/overload_manager>).
//!
//! Memory is looked at beside the data path, a few times a second. What a request or a connection looks at is one number
//! that hardly ever changes.

use std::{
    convert::Infallible,
    fmt::Write as _,
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::refused::Refused;

/// How often memory is looked at.
const LOOK: Duration = Duration::from_millis(200);
/// An action ends when the pressure is so much below where it began, in thousandths: what it freed must not begin it anew.
const RELIEF: u64 = 50;
/// File descriptors that are no connections: health and admin, the control plane, logs, the runtimes.
const OWN_FILES: u64 = 128;

/// What is done under pressure, with Envoy's names. Each goes on while the next does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Answers of HTTP/1.1 end their connection, and idle connections are asked to end, a few at a time.
    DisableKeepalive,
    /// Requests are answered with 503 and the flag `OM`.
    StopRequests,
    /// Connections are reset as they come.
    RejectConnections,
}

impl Action {
    pub const ALL: [Self; 3] = [Self::DisableKeepalive, Self::StopRequests, Self::RejectConnections];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::DisableKeepalive => "disable_http_keepalive",
            Self::StopRequests => "stop_accepting_requests",
            Self::RejectConnections => "reject_incoming_connections",
        }
    }

    /// From which pressure on, in thousandths of the limit.
    fn begins(self) -> u64 {
        match self {
            Self::DisableKeepalive => 850,
            Self::StopRequests => 920,
            Self::RejectConnections => 950,
        }
    }
}

/// Memory in use and its limit, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    pub used: u64,
    /// Not 0.
    pub limit: u64,
}

impl Reading {
    /// In thousandths.
    fn pressure(self) -> u64 {
        thousandths(self.used, self.limit)
    }
}

fn thousandths(part: u64, whole: u64) -> u64 {
    u64::try_from(u128::from(part) * 1000 / u128::from(whole.max(1))).unwrap_or(u64::MAX)
}

/// Where readings come from. `None`: there is no limit at the moment.
pub trait Source: Send + 'static {
    fn read(&mut self) -> Option<Reading>;
}

/// The state of one process, shared by all of its threads. By default nothing is limited.
#[derive(Debug, Clone, Default)]
pub struct Overload(Arc<State>);

#[derive(Debug)]
struct State {
    /// How many of [`Action::ALL`] are under way.
    level: AtomicU8,
    /// The highest level of this episode that was logged.
    logged: AtomicU8,
    used: AtomicU64,
    limit: AtomicU64,
    /// Connections from clients.
    connections: AtomicU64,
    most_connections: AtomicU64,
    files: u64,
    began: Instant,
    /// The second, counted from 1, in which the log was last told that connections cannot be accepted.
    told: AtomicU64,
}

impl Default for State {
    fn default() -> Self {
        Self {
            level: AtomicU8::new(0),
            logged: AtomicU8::new(0),
            used: AtomicU64::new(0),
            limit: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            most_connections: AtomicU64::new(u64::MAX),
            files: u64::MAX,
            began: Instant::now(),
            told: AtomicU64::new(0),
        }
    }
}

impl Overload {
    /// For a process that may have so many files open.
    #[must_use]
    pub fn with_files(files: u64) -> Self {
        let overload = Self(Arc::new(State { files, ..State::default() }));
        overload.listens_on(0);
        overload
    }

    /// So many sockets are listened on. What is left of the file descriptors is for connections from clients, each with one
    /// to an upstream: without a descriptor for that one its request would fail, and count against a revision.
    pub fn listens_on(&self, sockets: usize) {
        if self.0.files == u64::MAX {
            return;
        }
        let own = OWN_FILES.saturating_add(u64::try_from(sockets).unwrap_or(u64::MAX));
        self.0.most_connections.store((self.0.files.saturating_sub(own) / 2).max(1), Relaxed);
    }

    #[must_use]
    pub fn is_active(&self, action: Action) -> bool {
        usize::from(self.0.level.load(Relaxed)) > action as usize
    }

    /// Whether there is room for one more connection from a client.
    ///
    /// # Errors
    /// Why there is none.
    pub fn admit_connection(&self) -> Result<(), Refused> {
        if self.is_active(Action::RejectConnections) {
            return Err(Refused::OverloadConnection);
        }
        // Threads that ask at the same time may go over it by one each.
        if self.0.connections.load(Relaxed) >= self.0.most_connections.load(Relaxed) {
            return Err(Refused::FileDescriptors);
        }
        Ok(())
    }

    /// Whether the log is to be told that connections cannot be accepted: once a second, for all listeners and threads together,
    /// which meet a shortage at the same time.
    #[must_use]
    pub fn tells_of_accepting(&self, now: Instant) -> bool {
        let second = now.duration_since(self.0.began).as_secs() + 1;
        self.0.told.fetch_max(second, Relaxed) < second
    }

    pub fn opened(&self) {
        self.0.connections.fetch_add(1, Relaxed);
    }

    pub fn closed(&self) {
        self.0.connections.fetch_sub(1, Relaxed);
    }

    /// Begins and ends actions by what was read. Only one task calls it.
    pub fn observe(&self, reading: Option<Reading>) {
        let state = &*self.0;
        state.used.store(reading.map_or(0, |reading| reading.used), Relaxed);
        state.limit.store(reading.map_or(0, |reading| reading.limit), Relaxed);
        let pressure = reading.map_or(0, Reading::pressure);
        let before = state.level.load(Relaxed);
        let goes_on = |action: &Action| {
            let relief = if usize::from(before) > *action as usize { RELIEF } else { 0 };
            pressure >= action.begins() - relief
        };
        let level = Action::ALL.iter().take_while(|action| goes_on(action)).count();
        let level = u8::try_from(level).unwrap_or(u8::MAX);
        state.level.store(level, Relaxed);
        let logged = state.logged.load(Relaxed);
        if level > logged {
            state.logged.store(level, Relaxed);
            let actions: Vec<_> = Action::ALL.iter().take(level.into()).map(|action| action.name()).collect();
            let Reading { used, limit } = reading.unwrap_or(Reading { used: 0, limit: 0 });
            tracing::warn!(used, limit, ?actions, "short of memory; raise its limit, or the number of proxies");
        } else if level == 0 && logged > 0 {
            state.logged.store(0, Relaxed);
            tracing::info!("no longer short of memory");
        }
    }

    /// Looks at memory for ever.
    pub async fn watch(self, mut source: impl Source) -> Infallible {
        let mut ticks = interval(LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.observe(source.read());
        }
    }

    /// In the Prometheus text format.
    pub fn render(&self, out: &mut String) {
        let state = &*self.0;
        let (used, limit) = (state.used.load(Relaxed), state.limit.load(Relaxed));
        let (open, most) = (state.connections.load(Relaxed), state.most_connections.load(Relaxed));
        let memory = if limit == 0 { 0 } else { thousandths(used, limit) };
        let connections = if most == u64::MAX { 0 } else { thousandths(open, most) };
        // Writing to a String cannot fail.
        let _ = write!(
            out,
            "# HELP sluice_overload_memory_limit_bytes Memory that this proxy may use; 0 is no limit.\n\
             # TYPE sluice_overload_memory_limit_bytes gauge\n\
             sluice_overload_memory_limit_bytes {limit}\n\
             # HELP sluice_overload_pressure Use of a resource in parts of its limit; 0 without one.\n\
             # TYPE sluice_overload_pressure gauge\n\
             sluice_overload_pressure{{resource=\"memory\"}} {}.{:03}\n\
             sluice_overload_pressure{{resource=\"connections\"}} {}.{:03}\n\
             # HELP sluice_overload_action_active Whether this is done against a shortage of memory.\n\
             # TYPE sluice_overload_action_active gauge\n",
            memory / 1000,
            memory % 1000,
            connections / 1000,
            connections % 1000,
        );
        for action in Action::ALL {
            let (name, active) = (action.name(), u8::from(self.is_active(action)));
            let _ = writeln!(out, "sluice_overload_action_active{{action=\"{name}\"}} {active}");
        }
    }
}

/// The memory of this process's cgroup, or of the process itself.
#[derive(Debug)]
pub enum Memory {
    /// The process's resident memory, against a limit that was said.
    Resident { limit: u64, page: u64 },
    /// The cgroup's, version 2: `memory.current` against `memory.max`.
    V2(PathBuf),
    /// Version 1.
    V1(PathBuf),
}

/// Above it a limit of version 1 is none: it is the greatest number of whole pages then.
const V1_NONE: u64 = 1 << 60;

impl Memory {
    /// Of this process. `said` counts in place of the cgroup's limit. `None`: nothing limits it, or not so that it can be seen.
    #[must_use]
    pub fn find(said: Option<u64>) -> Option<Self> {
        if let Some(limit) = said.filter(|limit| *limit > 0) {
            return Some(Self::Resident { limit, page: u64::try_from(rustix::param::page_size()).unwrap_or(4096) });
        }
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        Self::in_cgroup(Path::new("/sys/fs/cgroup"), &own)
    }

    /// `own` is what `/proc/self/cgroup` says. In a container it is usually the root of what is mounted.
    fn in_cgroup(root: &Path, own: &str) -> Option<Self> {
        let path = |controller: &str| {
            let line = own.lines().find_map(|line| {
                let (_, rest) = line.split_once(':')?;
                let (controllers, path) = rest.split_once(':')?;
                controllers.split(',').any(|one| one == controller).then_some(path)
            });
            line.unwrap_or("/").trim_start_matches('/').to_owned()
        };
        let v2 = [root.join(path("")), root.to_owned()];
        if let Some(folder) = v2.into_iter().find(|folder| folder.join("memory.max").exists()) {
            return Some(Self::V2(folder));
        }
        let root = root.join("memory");
        let v1 = [root.join(path("memory")), root];
        v1.into_iter().find(|folder| folder.join("memory.limit_in_bytes").exists()).map(Self::V1)
    }
}

impl Source for Memory {
    /// What the kernel's OOM killer goes by: the memory that the cgroup is charged for, sockets' buffers in the kernel
    /// included (which resident memory is not), without what it would take back first, the inactive pages of files. The
    /// kubelet calls that the working set.
    fn read(&mut self) -> Option<Reading> {
        match self {
            Self::Resident { limit, page } => {
                let statm = fs::read_to_string("/proc/self/statm").ok()?;
                let resident: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
                Some(Reading { used: resident.saturating_mul(*page), limit: *limit })
            }
            Self::V2(folder) => charged(folder, "memory.max", "memory.current", "inactive_file"),
            Self::V1(folder) => {
                charged(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                    .filter(|reading| reading.limit < V1_NONE)
            }
        }
    }
}

/// The limit is read each time: it may be changed while the Pod runs. "max" is none.
fn charged(folder: &Path, limit: &str, usage: &str, inactive: &str) -> Option<Reading> {
    let number = |file: &str| fs::read_to_string(folder.join(file)).ok()?.trim().parse::<u64>().ok();
    let limit = number(limit).filter(|limit| *limit > 0)?;
    let charged = number(usage)?;
    let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let inactive = stat.lines().find_map(|line| line.strip_prefix(inactive)?.trim().parse::<u64>().ok());
    Some(Reading { used: charged.saturating_sub(inactive.unwrap_or(0)), limit })
}

/// Raises the limit of open files to what the process may have, as ztunnel and Envoy's images do, and returns it.
///
/// # Errors
/// When the kernel refuses. What was so is so then.
pub fn raise_open_files() -> io::Result<u64> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum {
        setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?;
    }
    Ok(maximum.unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn percent(used: u64) -> Option<Reading> {
        Some(Reading { used, limit: 100 })
    }

    #[test]
    fn actions_begin_one_after_the_other_and_end_only_well_below_where_they_began() {
        use Action::{DisableKeepalive, RejectConnections, StopRequests};
        let overload = Overload::default();
        let table: [(u64, &[Action]); 13] = [
            (84, &[]),
            (85, &[DisableKeepalive]),
            (91, &[DisableKeepalive]),
            (92, &[DisableKeepalive, StopRequests]),
            (95, &[DisableKeepalive, StopRequests, RejectConnections]),
            (91, &[DisableKeepalive, StopRequests, RejectConnections]),
            (89, &[DisableKeepalive, StopRequests]),
            (87, &[DisableKeepalive, StopRequests]),
            (86, &[DisableKeepalive]),
            (80, &[DisableKeepalive]),
            (79, &[]),
            (84, &[]),
            (100, &[DisableKeepalive, StopRequests, RejectConnections]),
        ];
        for (used, active) in table {
            overload.observe(percent(used));
            let found: Vec<_> = Action::ALL.into_iter().filter(|action| overload.is_active(*action)).collect();
            assert_eq!(found, active, "{used} %");
        }
        overload.observe(None);
        assert!(!overload.is_active(DisableKeepalive), "without a limit nothing is done");
    }

    #[test]
    fn connections_are_bounded_by_half_of_the_file_descriptors_that_are_left() {
        let overload = Overload::with_files(1024);
        overload.listens_on(96);
        for _ in 0..400 {
            assert_eq!(overload.admit_connection(), Ok(()));
            overload.opened();
        }
        assert_eq!(overload.admit_connection(), Err(Refused::FileDescriptors));
        let mut text = String::new();
        overload.render(&mut text);
        assert!(text.contains("sluice_overload_pressure{resource=\"connections\"} 1.000\n"), "{text}");
        overload.closed();
        assert_eq!(overload.admit_connection(), Ok(()));
        overload.observe(percent(95));
        assert_eq!(overload.admit_connection(), Err(Refused::OverloadConnection));
    }

    #[test]
    fn the_log_is_told_once_a_second_that_connections_cannot_be_accepted() {
        let overload = Overload::default();
        let at = |milliseconds| overload.0.began + Duration::from_millis(milliseconds);
        let told: Vec<_> = (0..3500).step_by(10).filter(|since| overload.tells_of_accepting(at(*since))).collect();
        assert_eq!(told, [0, 1000, 2000, 3000]);
        // Another thread's clock is read earlier, and heard later.
        assert!(!overload.clone().tells_of_accepting(at(2990)) && !overload.tells_of_accepting(at(3999)));
    }

    #[test]
    fn what_is_seen_is_the_working_set_of_the_cgroup_that_the_process_is_in() {
        let folder = std::env::temp_dir().join(format!("sluice-overload-{}", std::process::id()));
        let write = |path: &str, text: &str| {
            let path = folder.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let read = |own: &str| Memory::in_cgroup(&folder.join("sys"), own)?.read();
        assert_eq!(read("0::/\n"), None, "no cgroup can be seen");
        write("sys/memory.max", "1000\n");
        write("sys/memory.current", "700\n");
        write("sys/memory.stat", "anon 500\ninactive_file 100\nactive_file 50\n");
        assert_eq!(read("0::/\n"), Some(Reading { used: 600, limit: 1000 }));
        assert_eq!(read("0::/elsewhere\n"), Some(Reading { used: 600, limit: 1000 }), "of the container's namespace");
        write("sys/pod/memory.max", "max\n");
        write("sys/pod/memory.current", "700\n");
        assert_eq!(read("0::/pod\n"), None, "no limit");
        fs::remove_dir_all(&folder).unwrap();

        write("sys/memory/pod/memory.limit_in_bytes", "2000\n");
        write("sys/memory/pod/memory.usage_in_bytes", "900\n");
        write("sys/memory/pod/memory.stat", "inactive_file 1\ntotal_inactive_file 400\n");
        let own = "3:cpu,cpuacct:/x\n2:memory:/pod\n";
        assert_eq!(read(own), Some(Reading { used: 500, limit: 2000 }));
        write("sys/memory/pod/memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(read(own), None, "no limit");
        fs::remove_dir_all(&folder).unwrap();

        let said = Memory::find(Some(1 << 40)).unwrap().read().unwrap();
        assert!(said.limit == 1 << 40 && said.used > 1 << 20, "{said:?}");
    }

    #[test]
    fn the_limit_of_open_files_is_as_high_as_it_may_be() {
        assert!(raise_open_files().unwrap() >= 256);
    }
}
