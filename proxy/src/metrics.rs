//! What the data path counts, as Prometheus text. Handles are resolved when the configuration arrives; a request only
//! adds to cells that its own worker thread alone writes, and a scrape sums over the threads.

use std::{
    borrow::Borrow,
    collections::BTreeMap,
    fmt::Write,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use http::StatusCode;

use sluice_xds::sluice::guard::v1::Outcomes;

use crate::{failure::Flag, refused::Refused, snapshot::MetricLabels};

/// Upper bounds of the duration buckets in microseconds. Fixed for good: gates compare quantiles across versions.
const BOUNDS_US: [u64; 28] = [
    1_000, 2_000, 3_000, 5_000, 7_000, 10_000, 15_000, 20_000, 30_000, 50_000, 75_000, 100_000, 150_000, 200_000,
    300_000, 500_000, 750_000, 1_000_000, 1_500_000, 2_000_000, 3_000_000, 5_000_000, 7_500_000, 10_000_000,
    15_000_000, 20_000_000, 30_000_000, 60_000_000,
];

/// The `grpc_status` of a request that is not gRPC, then the codes by number
/// (<https://grpc.github.io/grpc/core/md_doc_statuscodes.html>).
const GRPC: [&str; 18] = [
    "",
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];
/// The codes that say that the server failed, whatever the HTTP status, as indices of [`GRPC`]: UNKNOWN, DEADLINE_EXCEEDED,
/// INTERNAL, UNAVAILABLE, DATA_LOSS.
const BAD_GRPC: [usize; 5] = [3, 5, 14, 15, 16];
const CLASSES: [&str; 4] = ["2xx", "3xx", "4xx", "5xx"];

/// A number that one thread writes and any thread reads.
#[derive(Debug, Default)]
pub struct Cell(AtomicU64);

impl Cell {
    /// Only for the thread that owns the cell: no read-modify-write, so no locked instruction on the hot path.
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    /// See [`Cell::add`].
    pub fn sub(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_sub(n), Relaxed);
    }

    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// How a gRPC call ended: a canonical code from 0 to 16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GrpcStatus(u8);

impl GrpcStatus {
    pub const UNKNOWN: Self = Self(2);
    pub const UNAVAILABLE: Self = Self(14);

    /// `None` if it is not a canonical code.
    #[must_use]
    pub fn of_code(code: u32) -> Option<Self> {
        u8::try_from(code).ok().filter(|code| *code <= 16).map(Self)
    }

    /// The value of `grpc-status`; what is no canonical code is UNKNOWN.
    #[must_use]
    pub fn parse(value: &[u8]) -> Self {
        match std::str::from_utf8(value).ok().and_then(|text| text.parse::<u8>().ok()) {
            Some(code) if code <= 16 => Self(code),
            Some(_) | None => Self::UNKNOWN,
        }
    }

    /// What a gRPC client makes of an answer without `grpc-status`
    /// (<https://github.com/grpc/grpc/blob/master/doc/http-grpc-status-mapping.md>).
    #[must_use]
    pub fn of_http(status: StatusCode) -> Self {
        Self(match status.as_u16() {
            400 => 13,
            401 => 16,
            403 => 7,
            404 => 12,
            429 | 502 | 503 | 504 => 14,
            _ => 2,
        })
    }

    /// The code with this name, such as `UNAVAILABLE`.
    #[must_use]
    pub fn of_name(name: &str) -> Option<Self> {
        let code = GRPC[1..].iter().position(|known| *known == name)?;
        u8::try_from(code).ok().map(Self)
    }

    /// Whether it says that the server failed.
    #[must_use]
    pub fn is_bad(self) -> bool {
        BAD_GRPC.contains(&(usize::from(self.0) + 1))
    }

    #[must_use]
    pub fn code(self) -> u8 {
        self.0
    }

    #[must_use]
    pub fn name(self) -> &'static str {
        GRPC[usize::from(self.0) + 1]
    }
}

#[derive(Debug, Default)]
struct Histogram {
    buckets: [Cell; BOUNDS_US.len() + 1],
    sum_ns: Cell,
}

impl Histogram {
    fn observe(&self, value: Duration) {
        let ns = u64::try_from(value.as_nanos()).unwrap_or(u64::MAX);
        // Compared in nanoseconds: 1.0004 ms is not within 1 ms.
        self.buckets[BOUNDS_US.partition_point(|bound| bound * 1000 < ns)].add(1);
        self.sum_ns.add(ns);
    }
}

/// Cells of one revision on one thread, on cache lines of their own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct RevisionShard {
    requests: [[Cell; GRPC.len()]; CLASSES.len()],
    under_way: Cell,
    duration: Histogram,
    first_byte: Histogram,
}

impl RevisionShard {
    fn outcomes(&self, slow_above: Duration) -> Outcomes {
        let limit = u64::try_from(slow_above.as_micros()).unwrap_or(u64::MAX);
        // The bucket of the next bound holds what is not slow, too.
        let slow = BOUNDS_US.partition_point(|bound| *bound < limit) + 1;
        let slow = self.duration.buckets.iter().skip(if limit == 0 { usize::MAX } else { slow });
        let [served @ .., failed] = &self.requests;
        let bad = served.iter().flat_map(|class| BAD_GRPC.iter().map(|grpc| class[*grpc].get()));
        Outcomes {
            // With those that were given up, which have a time and no class. Requests are drawn at random, and nobody gives up at random:
            // without them, one side would be judged by a choice of its requests.
            requests: self.duration.buckets.iter().map(Cell::get).sum(),
            bad: bad.chain(failed.iter().map(Cell::get)).sum(),
            slow: slow.map(Cell::get).sum(),
        }
    }
}

/// The cells of each thread.
#[derive(Debug)]
struct Series<S> {
    shards: Box<[S]>,
}

type RevisionSeries = Series<RevisionShard>;

/// One thread's way to the series of one revision.
#[derive(Debug, Clone)]
pub struct RevisionMetrics {
    series: Arc<RevisionSeries>,
    thread: usize,
}

impl RevisionMetrics {
    /// A request has been drawn for the revision.
    pub fn begun(&self) {
        self.series.shards[self.thread].under_way.add(1);
    }

    /// It is under way no more, whether it counts for the revision or not.
    pub fn over(&self) {
        self.series.shards[self.thread].under_way.sub(1);
    }

    /// One finished request. `first_byte` is `None` if no answer of the upstream arrived.
    pub fn record(
        &self,
        status: StatusCode,
        grpc: Option<GrpcStatus>,
        duration: Duration,
        first_byte: Option<Duration>,
    ) {
        let shard = &self.series.shards[self.thread];
        let class = class(status);
        let grpc = grpc.map_or(0, |status| usize::from(status.0) + 1);
        shard.requests[class][grpc].add(1);
        shard.duration.observe(duration);
        if let Some(first_byte) = first_byte {
            shard.first_byte.observe(first_byte);
        }
    }

    /// A request that its client gave up after so long, before an answer had begun. Nobody saw it end well or badly, so it has no class.
    pub fn given_up(&self, waited: Duration) {
        self.series.shards[self.thread].duration.observe(waited);
    }
}

/// The index in [`CLASSES`]. A final 1xx does not exist; one that is none of the four classes (999) is an error of the upstream.
fn class(status: StatusCode) -> usize {
    match status.as_u16() {
        ..300 => 0,
        300..400 => 1,
        400..500 => 2,
        500.. => 3,
    }
}

/// What became of a copy of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mirrored {
    /// Of a gRPC call with the status that it ended with.
    Answered(StatusCode, Option<GrpcStatus>),
    /// No endpoint was reached, or the answer broke off.
    Failed,
    /// The answer took longer than is allowed.
    TimedOut,
    /// More of the request would have waited to be sent than is kept. Such a copy is not begun, or broken off.
    TooLarge,
    /// Too many were under way already.
    Busy,
    /// The request itself ended early.
    Cancelled,
}

impl Mirrored {
    const OUTCOMES: [&'static str; CLASSES.len() + 6] =
        ["2xx", "3xx", "4xx", "5xx", "grpc_failed", "failed", "timeout", "too_large", "busy", "cancelled"];

    fn index(self) -> usize {
        match self {
            Self::Answered(status, Some(grpc)) if grpc.is_bad() && !status.is_server_error() => 4,
            Self::Answered(status, _) => class(status),
            Self::Failed => 5,
            Self::TimedOut => 6,
            Self::TooLarge => 7,
            Self::Busy => 8,
            Self::Cancelled => 9,
        }
    }

    /// Whether it says something about the version. Bounds of our own do not, nor does a client that goes away.
    fn is_verdict(self) -> bool {
        match self {
            Self::Answered(..) | Self::Failed | Self::TimedOut => true,
            Self::TooLarge | Self::Busy | Self::Cancelled => false,
        }
    }
}

/// Cells of the copies for one revision on one thread.
#[derive(Debug, Default)]
#[repr(align(128))]
struct MirrorShard {
    outcomes: [Cell; Mirrored::OUTCOMES.len()],
    duration: Histogram,
}

type MirrorSeries = Series<MirrorShard>;

/// One thread's way to the series of the copies for one revision. The guard sees none of it.
#[derive(Debug, Clone)]
pub struct MirrorMetrics {
    series: Arc<MirrorSeries>,
    thread: usize,
}

impl MirrorMetrics {
    /// One finished copy; `duration` is from its request's headers received to the last byte of the answer, or to when it was given up.
    pub fn record(&self, outcome: Mirrored, duration: Duration) {
        let shard = &self.series.shards[self.thread];
        shard.outcomes[outcome.index()].add(1);
        if outcome.is_verdict() {
            shard.duration.observe(duration);
        }
    }
}

/// Why a request was sent again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// The endpoint could not be connected to.
    Connect,
    /// A kept connection had been closed by the other side.
    Stale,
    /// The other side said that it did not process the request.
    NotProcessed,
    /// The route asks for it, although the request may have been processed.
    Policy,
}

impl Retry {
    const ALL: [(Self, &'static str); 4] = [
        (Self::Connect, "connect"),
        (Self::Stale, "stale"),
        (Self::NotProcessed, "not_processed"),
        (Self::Policy, "policy"),
    ];
}

/// Why a span never reached the collector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpanLost {
    /// As many waited as may.
    QueueFull,
    /// The collector did not take it.
    ExportFailed,
}

impl SpanLost {
    const ALL: [(Self, &'static str); 2] = [(Self::QueueFull, "queue_full"), (Self::ExportFailed, "export_failed")];
}

#[derive(Debug, Default)]
#[repr(align(128))]
struct ListenerShard {
    connections: Cell,
    open: Cell,
    active: Cell,
    tls_failures: Cell,
    aborts: Cell,
    upgrades: Cell,
    delays: Cell,
    local_errors: [Cell; Flag::ALL.len()],
    refused: RefusedCells,
    retries: [Cell; Retry::ALL.len()],
}

#[derive(Debug)]
struct RefusedCells([Cell; Refused::ALL.len()]);

impl Default for RefusedCells {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Cell::default()))
    }
}

type ListenerSeries = Series<ListenerShard>;

/// One thread's way to the series of one listener.
#[derive(Debug, Clone)]
pub struct ListenerMetrics {
    series: Arc<ListenerSeries>,
    thread: usize,
}

impl ListenerMetrics {
    fn shard(&self) -> &ListenerShard {
        &self.series.shards[self.thread]
    }

    pub fn opened(&self) {
        self.shard().connections.add(1);
        self.shard().open.add(1);
    }

    pub fn closed(&self) {
        self.shard().open.sub(1);
    }

    /// How many are open now, on all threads.
    #[must_use]
    pub fn open(&self) -> u64 {
        self.series.shards.iter().fold(0, |sum, shard| sum.wrapping_add(shard.open.get()))
    }

    pub fn request_started(&self) {
        self.shard().active.add(1);
    }

    pub fn request_ended(&self) {
        self.shard().active.sub(1);
    }

    pub fn tls_failed(&self) {
        self.shard().tls_failures.add(1);
    }

    pub fn client_aborted(&self) {
        self.shard().aborts.add(1);
    }

    pub fn upgraded(&self) {
        self.shard().upgrades.add(1);
    }

    pub fn delay_injected(&self) {
        self.shard().delays.add(1);
    }

    pub fn local_error(&self, flag: Flag) {
        self.shard().local_errors[flag as usize].add(1);
    }

    pub fn refused(&self, why: Refused) {
        self.shard().refused.0[why as usize].add(1);
    }

    pub fn retried(&self, why: Retry) {
        self.shard().retries[why as usize].add(1);
    }
}

/// All series of this process's data path.
#[derive(Debug)]
pub struct Metrics {
    member: String,
    threads: usize,
    families: Mutex<Families>,
    /// Written by any thread, but only when the log cannot keep up.
    access_log_dropped: AtomicU64,
    /// Written by the thread that sends spans.
    spans_exported: AtomicU64,
    /// Written by any thread, but only when the collector cannot keep up.
    spans_lost: [AtomicU64; SpanLost::ALL.len()],
}

/// So long the counts of a removed cluster or listener are remembered: one that comes back goes on counting. A server answers queries
/// with samples of up to 5 minutes before ([Prometheus, "Staleness"]); counts that had begun at 0 again meanwhile would seem to have
/// grown by less than they have.
///
/// [Prometheus, "Staleness"]: https://prometheus.io/docs/prometheus/latest/querying/basics/#staleness
const REMEMBERED: Duration = Duration::from_secs(10 * 60);
/// Time between two looks for what is to be forgotten while nobody scrapes.
const SWEEP: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
struct Families {
    revisions: Family<MetricLabels, RevisionShard>,
    mirrors: Family<MetricLabels, MirrorShard>,
    listeners: Family<String, ListenerShard>,
}

/// Series that only differ in their labels. They are shown as long as somebody may write them: a cluster or a listener, or after its
/// removal a draining connection.
#[derive(Debug)]
struct Family<K, S> {
    series: BTreeMap<K, Remembered<S>>,
    swept: Option<Instant>,
}

#[derive(Debug)]
struct Remembered<S> {
    series: Arc<Series<S>>,
    unused_since: Option<Instant>,
}

impl<K, S> Default for Family<K, S> {
    fn default() -> Self {
        Self { series: BTreeMap::new(), swept: None }
    }
}

impl<K: Ord, S: Default> Family<K, S> {
    fn used<Q>(&mut self, key: &Q, threads: usize, now: Instant) -> Arc<Series<S>>
    where
        K: Borrow<Q>,
        Q: Ord + ToOwned<Owned = K> + ?Sized,
    {
        if let Some(known) = self.series.get_mut(key) {
            known.unused_since = None;
            return known.series.clone();
        }
        if self.swept.is_none_or(|swept| now.duration_since(swept) >= SWEEP) {
            self.sweep(now);
        }
        let series = Arc::new(Series { shards: (0..threads).map(|_| S::default()).collect() });
        self.series.insert(key.to_owned(), Remembered { series: series.clone(), unused_since: None });
        series
    }

    fn sweep(&mut self, now: Instant) {
        self.swept = Some(now);
        self.series.retain(|_, known| {
            if known.is_used() {
                known.unused_since = None;
                return true;
            }
            now.duration_since(*known.unused_since.get_or_insert(now)) < REMEMBERED
        });
    }

    /// What is shown, under these labels.
    fn shown(&mut self, now: Instant, labels: impl Fn(&K) -> String) -> Vec<(String, Arc<Series<S>>)> {
        self.sweep(now);
        let used = self.series.iter().filter(|(_, known)| known.is_used());
        used.map(|(key, known)| (labels(key), known.series.clone())).collect()
    }
}

impl<S> Remembered<S> {
    /// By somebody else.
    fn is_used(&self) -> bool {
        Arc::strong_count(&self.series) > 1
    }
}

impl Metrics {
    /// `member` is the name of this proxy's Pod; `threads` how many workers will write.
    #[must_use]
    pub fn new(member: impl Into<String>, threads: usize) -> Arc<Self> {
        Arc::new(Self {
            member: member.into(),
            threads,
            families: Mutex::default(),
            access_log_dropped: AtomicU64::new(0),
            spans_exported: AtomicU64::new(0),
            spans_lost: Default::default(),
        })
    }

    #[must_use]
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// The series of a revision for the thread with this index; they exist, at 0, from now on.
    pub fn revision(&self, labels: &MetricLabels, thread: usize) -> RevisionMetrics {
        RevisionMetrics { series: self.families().revisions.used(labels, self.threads, Instant::now()), thread }
    }

    /// The series of the copies for a revision, for the thread with this index.
    pub fn mirror(&self, labels: &MetricLabels, thread: usize) -> MirrorMetrics {
        MirrorMetrics { series: self.families().mirrors.used(labels, self.threads, Instant::now()), thread }
    }

    /// How the requests of a revision have ended so far; 0 before it is configured. Those that were given up before an answer had
    /// begun are among them, and not bad. A request is slow that lasted longer than the first bound that is not below `slow_above`; none
    /// is if that is 0, or above the last bound.
    #[must_use]
    pub fn outcomes(&self, labels: &MetricLabels, slow_above: Duration) -> Outcomes {
        let series = self.known(labels);
        let mut sum = Outcomes::default();
        for shard in series.iter().flat_map(|series| series.shards.iter()) {
            let Outcomes { requests, bad, slow } = shard.outcomes(slow_above);
            sum.requests += requests;
            sum.bad += bad;
            sum.slow += slow;
        }
        sum
    }

    /// How many requests of a revision are under way; 0 before it is configured.
    #[must_use]
    pub fn under_way(&self, labels: &MetricLabels) -> u64 {
        let series = self.known(labels);
        series.iter().flat_map(|series| series.shards.iter()).map(|shard| shard.under_way.get()).sum()
    }

    fn known(&self, labels: &MetricLabels) -> Option<Arc<RevisionSeries>> {
        self.families().revisions.series.get(labels).map(|known| known.series.clone())
    }

    fn families(&self) -> MutexGuard<'_, Families> {
        self.families.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The series of a listener for the thread with this index.
    pub fn listener(&self, name: &str, thread: usize) -> ListenerMetrics {
        ListenerMetrics { series: self.families().listeners.used(name, self.threads, Instant::now()), thread }
    }

    pub fn access_log_dropped(&self) {
        self.access_log_dropped.fetch_add(1, Relaxed);
    }

    pub fn spans_exported(&self, count: usize) {
        self.spans_exported.fetch_add(count as u64, Relaxed);
    }

    pub fn spans_lost(&self, why: SpanLost, count: usize) {
        self.spans_lost[why as usize].fetch_add(count as u64, Relaxed);
    }

    /// The Prometheus text exposition format, version 0.0.4.
    #[must_use]
    pub fn render(&self) -> String {
        self.render_at(Instant::now())
    }

    fn render_at(&self, now: Instant) -> String {
        let (revisions, mirrors, listeners) = {
            let mut families = self.families();
            (
                families.revisions.shown(now, revision_labels),
                families.mirrors.shown(now, revision_labels),
                families.listeners.shown(now, |name| format!("listener=\"{}\"", escape(name))),
            )
        };
        let mut out = String::with_capacity(4096 + revisions.len() * 8192 + listeners.len() * 2048);

        head(&mut out, "sluice_member_info", "gauge", "This member of the fleet.");
        line(&mut out, "sluice_member_info", &format!("member=\"{}\"", escape(&self.member)), 1);

        head(&mut out, "sluice_requests_total", "counter", "Requests of users by how they ended, after retries.");
        for (labels, series) in &revisions {
            for (class, class_name) in CLASSES.iter().enumerate() {
                for (grpc, grpc_name) in GRPC.iter().enumerate() {
                    let count: u64 = series.shards.iter().map(|shard| shard.requests[class][grpc].get()).sum();
                    if count > 0 || grpc == 0 {
                        let labels = format!("{labels},code_class=\"{class_name}\",grpc_status=\"{grpc_name}\"");
                        line(&mut out, "sluice_requests_total", &labels, count);
                    }
                }
            }
        }
        histogram(
            &mut out,
            "sluice_request_duration_seconds",
            "From the request's headers received to the last byte from the upstream, or to when it was given up unanswered.",
            &revisions,
            |shard| &shard.duration,
        );
        histogram(
            &mut out,
            "sluice_request_first_byte_seconds",
            "From the request's headers received to the response's headers from the upstream.",
            &revisions,
            |shard| &shard.first_byte,
        );

        let mut family = |name: &str, kind: &str, help: &str, value: fn(&ListenerShard) -> &Cell| {
            head(&mut out, name, kind, help);
            for (labels, series) in &listeners {
                // Wrapping: a gauge that rose on one thread never falls on another, so each is right by itself.
                line(&mut out, name, labels, series.shards.iter().map(|shard| value(shard).get()).sum());
            }
        };
        family("sluice_connections_total", "counter", "Connections accepted.", |s| &s.connections);
        family("sluice_connections_open", "gauge", "Connections and tunnels open now.", |s| &s.open);
        family("sluice_requests_active", "gauge", "Requests being served now.", |s| &s.active);
        family("sluice_tls_failures_total", "counter", "Connections refused in the TLS handshake.", |s| {
            &s.tls_failures
        });
        family("sluice_client_aborts_total", "counter", "Requests that their client gave up.", |s| &s.aborts);
        family("sluice_upgrades_total", "counter", "Requests that became a tunnel.", |s| &s.upgrades);
        family("sluice_injected_delays_total", "counter", "Requests that a fault on purpose held up.", |s| &s.delays);

        // There may be ten thousand listeners, and most never have a client.
        let idle = |series: &Series<ListenerShard>| series.shards.iter().all(|shard| shard.connections.get() == 0);

        head(&mut out, "sluice_local_errors_total", "counter", "Requests that this proxy failed, by response flag.");
        for (labels, series) in &listeners {
            let idle = idle(series);
            for flag in Flag::ALL {
                let count = series.shards.iter().map(|shard| shard.local_errors[flag as usize].get()).sum();
                if count > 0 || !idle {
                    let labels = format!("{labels},flag=\"{}\"", flag.name());
                    line(&mut out, "sluice_local_errors_total", &labels, count);
                }
            }
        }
        let help = "Connections, requests and breaches of protocol that were refused, by reason.";
        head(&mut out, "sluice_refused_total", "counter", help);
        for (labels, series) in &listeners {
            for (why, name) in Refused::ALL {
                let count: u64 = series.shards.iter().map(|shard| shard.refused.0[why as usize].get()).sum();
                // Most reasons never occur.
                if count > 0 {
                    line(&mut out, "sluice_refused_total", &format!("{labels},reason=\"{name}\""), count);
                }
            }
        }
        head(&mut out, "sluice_retries_total", "counter", "Requests sent again, within their revision.");
        for (labels, series) in &listeners {
            let idle = idle(series);
            for (why, name) in Retry::ALL {
                let count = series.shards.iter().map(|shard| shard.retries[why as usize].get()).sum();
                if count > 0 || !idle {
                    line(&mut out, "sluice_retries_total", &format!("{labels},reason=\"{name}\""), count);
                }
            }
        }
        let help = "Copies of requests for a revision, by their answer or why there was none.";
        head(&mut out, "sluice_mirrored_requests_total", "counter", help);
        for (labels, series) in &mirrors {
            for (index, outcome) in Mirrored::OUTCOMES.iter().enumerate() {
                let count = series.shards.iter().map(|shard| shard.outcomes[index].get()).sum();
                line(&mut out, "sluice_mirrored_requests_total", &format!("{labels},outcome=\"{outcome}\""), count);
            }
        }
        histogram(
            &mut out,
            "sluice_mirrored_request_duration_seconds",
            "From the request's headers received to the last byte of its copy's answer, or to when that was given up.",
            &mirrors,
            |shard| &shard.duration,
        );
        head(&mut out, "sluice_access_log_dropped_total", "counter", "Lines that the access log could not take.");
        line(&mut out, "sluice_access_log_dropped_total", "", self.access_log_dropped.load(Relaxed));
        head(&mut out, "sluice_spans_exported_total", "counter", "Spans that the collector has taken.");
        line(&mut out, "sluice_spans_exported_total", "", self.spans_exported.load(Relaxed));
        head(&mut out, "sluice_spans_dropped_total", "counter", "Spans that never reached the collector.");
        for (why, name) in SpanLost::ALL {
            let labels = format!("reason=\"{name}\"");
            line(&mut out, "sluice_spans_dropped_total", &labels, self.spans_lost[why as usize].load(Relaxed));
        }
        out
    }
}

fn histogram<S>(
    out: &mut String,
    name: &str,
    help: &str,
    revisions: &[(String, Arc<Series<S>>)],
    pick: fn(&S) -> &Histogram,
) {
    head(out, name, "histogram", help);
    let (bucket, sum, count) = (format!("{name}_bucket"), format!("{name}_sum"), format!("{name}_count"));
    for (labels, series) in revisions {
        let mut total = 0;
        for (index, bound) in BOUNDS_US.iter().enumerate() {
            total += series.shards.iter().map(|shard| pick(shard).buckets[index].get()).sum::<u64>();
            // Microseconds are exact in an f64, and its Display is the shortest that reads back: "0.001", "1.5", "60".
            #[expect(clippy::cast_precision_loss, reason = "at most 60,000,000")]
            let le = *bound as f64 / 1e6;
            line(out, &bucket, &format!("{labels},le=\"{le}\""), total);
        }
        total += series.shards.iter().map(|shard| pick(shard).buckets[BOUNDS_US.len()].get()).sum::<u64>();
        line(out, &bucket, &format!("{labels},le=\"+Inf\""), total);
        let nanoseconds: u128 = series.shards.iter().map(|shard| u128::from(pick(shard).sum_ns.get())).sum();
        let _ = writeln!(out, "{sum}{{{labels}}} {}.{:09}", nanoseconds / 1_000_000_000, nanoseconds % 1_000_000_000);
        line(out, &count, labels, total);
    }
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn line(out: &mut String, name: &str, labels: &str, value: u64) {
    // Writing to a String cannot fail.
    let _ =
        if labels.is_empty() { writeln!(out, "{name} {value}") } else { writeln!(out, "{name}{{{labels}}} {value}") };
}

fn revision_labels(labels: &MetricLabels) -> String {
    format!(
        "destination_namespace=\"{}\",destination_service=\"{}\",revision=\"{}\"",
        escape(&labels.destination_namespace),
        escape(&labels.destination_service),
        escape(&labels.revision)
    )
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests;
