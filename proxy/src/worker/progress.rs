//! Streams on which nothing moves (`stream_idle_timeout`). Each counts what passes, which costs an addition; once in a while one timer
//! of the listener looks which counters still stand where they stood. So a stream ends between 1 and 1.25 times its limit after
//! the last that passed, and no request has a timer or looks at the clock for it.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use tokio::time::Instant;

use super::connection::Connection;
use crate::failure::Failure;

/// Looks within the shortest limit of a listener: a stream is seen to rest up to one look late, and ended up to one look late.
const LOOKS: u32 = 8;
/// Looks are no closer than this, whatever the limits are.
const CLOSEST: Duration = Duration::from_millis(5);
/// Of streams that have ended, kept by each thread for those to come.
const MAX_SPARE: usize = 256;

thread_local! {
    static SPARE: RefCell<Vec<Rc<Progress>>> = const { RefCell::new(Vec::new()) };
}

/// How often streams are looked at where this is the shortest limit.
pub(super) fn look_every(shortest: Duration) -> Duration {
    (shortest / LOOKS).max(CLOSEST)
}

/// Of one stream: a request and its answer, a tunnel, or a TCP connection. HTTP/1.1 has one after the other.
#[derive(Default)]
pub(super) struct Progress {
    /// Heads, parts of bodies and bytes of tunnels so far, both ways. It may wrap.
    passed: Cell<u32>,
    /// Nothing was there when the client's body was last asked for.
    awaits_client: Cell<bool>,
    /// The same of the upstream's.
    awaits_upstream: Cell<bool>,
    /// The answer has begun.
    answered: Cell<bool>,
    /// A fault holds the request up, and nobody reads it meanwhile.
    held_up: Cell<bool>,
    /// Nothing may rest for so long. `None` is for ever.
    limit: Cell<Option<Duration>>,
    /// What the last look saw, and since when it has been so.
    seen: Cell<Option<(u32, Instant)>>,
    idle: Cell<Option<Idle>>,
    /// Of the stream's own task, in HTTP/2.
    task: RefCell<Option<Waker>>,
    /// Its place in the list of its connection.
    place: Cell<usize>,
}

/// Who has let a stream rest for longer than its limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Idle {
    /// It has not sent its request to the end, or does not read the answer.
    Client,
    /// It does not take the request, or has not answered to the end.
    Upstream,
}

impl Idle {
    /// What a request without an answer is told.
    pub(super) fn failure(self) -> Failure {
        match self {
            Self::Client => Failure::RequestIdle,
            Self::Upstream => Failure::UpstreamIdle,
        }
    }
}

impl Progress {
    /// A stream begins.
    pub(super) fn begin(&self, limit: Option<Duration>) {
        self.pass();
        self.awaits_client.set(false);
        self.awaits_upstream.set(false);
        self.answered.set(false);
        self.held_up.set(false);
        self.idle.set(None);
        self.limit.set(limit);
    }

    /// From now on nothing may rest for so long.
    pub(super) fn limit(&self, limit: Option<Duration>) {
        self.limit.set(limit);
    }

    /// What holds now.
    pub(super) fn limited_to(&self) -> Option<Duration> {
        self.limit.get()
    }

    pub(super) fn end(&self) {
        self.limit.set(None);
    }

    /// The task that is to be told when its time is over.
    pub(super) fn runs_in(&self, cx: &Context<'_>) {
        let mut task = self.task.borrow_mut();
        if task.is_none() {
            *task = Some(cx.waker().clone());
        }
    }

    /// Something has passed.
    pub(super) fn pass(&self) {
        self.passed.set(self.passed.get().wrapping_add(1));
    }

    /// The client was asked for more of its request.
    pub(super) fn asked_client<T>(&self, more: &Poll<T>) {
        self.awaits_client.set(more.is_pending());
        if more.is_ready() {
            self.pass();
        }
    }

    /// Whether there is somebody who waits for more of the request.
    pub(super) fn awaits_client(&self) -> bool {
        self.awaits_client.get()
    }

    /// A fault holds the request up, or does so no more.
    pub(super) fn hold_up(&self, held: bool) {
        self.held_up.set(held);
    }

    /// Whether nobody reads the request because a fault holds it up.
    pub(super) fn is_held_up(&self) -> bool {
        self.held_up.get()
    }

    /// The upstream was asked for more of its answer.
    pub(super) fn asked_upstream<T>(&self, more: &Poll<T>) {
        self.awaits_upstream.set(more.is_pending());
        if more.is_ready() {
            self.pass();
        }
    }

    /// Whether there was nothing of its answer when the upstream was last asked.
    pub(super) fn awaits_upstream(&self) -> bool {
        self.awaits_upstream.get()
    }

    /// An answer begins, the upstream's or one of ours.
    pub(super) fn answer(&self) {
        self.answered.set(true);
        self.idle.set(None);
        self.pass();
    }

    /// Whether its time is over, and nobody has ended it.
    pub(super) fn is_idle(&self) -> bool {
        self.idle.get().is_some()
    }

    /// Whether its time is over, for whoever ends it.
    pub(super) fn take_idle(&self) -> Option<Idle> {
        self.idle.take()
    }

    /// Returns whether its time has just run out.
    fn look(&self, now: Instant) -> bool {
        let Some(limit) = self.limit.get() else {
            self.seen.set(None);
            return false;
        };
        match self.seen.get() {
            Some((passed, since)) if passed == self.passed.get() => {
                if self.is_idle() || now.duration_since(since) < limit {
                    return false;
                }
            }
            Some(_) | None => {
                self.seen.set(Some((self.passed.get(), now)));
                return false;
            }
        }
        let by_client = self.awaits_client.get() || (self.answered.get() && !self.awaits_upstream.get());
        self.idle.set(Some(if by_client { Idle::Client } else { Idle::Upstream }));
        if let Some(task) = &*self.task.borrow() {
            task.wake_by_ref();
        }
        true
    }
}

/// The streams of one connection.
#[derive(Default)]
pub(super) struct Streams {
    /// Of HTTP/1.1, of a tunnel, and of TCP: the connection is one stream at a time.
    pub(super) only: Rc<Progress>,
    /// Those of HTTP/2 that are open. There are no more than a client may have at once.
    open: RefCell<Vec<Rc<Progress>>>,
}

impl Streams {
    /// All have their time from the next look on.
    pub(super) fn look_anew(&self) {
        for stream in self.open.borrow().iter().chain([&self.only]) {
            stream.seen.set(None);
        }
    }

    /// Returns whether the connection's own task has to be told.
    pub(super) fn look(&self, now: Instant) -> bool {
        for stream in &*self.open.borrow() {
            stream.look(now);
        }
        self.only.look(now)
    }
}

/// A stream of HTTP/2 in the list of its connection, which it leaves with its end.
pub(super) struct Open {
    on: Rc<Connection>,
    progress: Rc<Progress>,
}

impl Open {
    pub(super) fn begin(on: Rc<Connection>) -> Self {
        let progress = SPARE.with_borrow_mut(Vec::pop).unwrap_or_default();
        {
            let mut open = on.streams.open.borrow_mut();
            progress.place.set(open.len());
            open.push(Rc::clone(&progress));
        }
        Self { on, progress }
    }

    pub(super) fn progress(&self) -> &Rc<Progress> {
        &self.progress
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.progress.end();
        self.progress.task.take();
        let mut open = self.on.streams.open.borrow_mut();
        let place = self.progress.place.get();
        if place < open.len() {
            let listed = open.swap_remove(place);
            if let Some(moved) = open.get(place) {
                moved.place.set(place);
            }
            // These two are all that there are, unless a body outlives its stream.
            if Rc::strong_count(&listed) == 2 {
                SPARE.with_borrow_mut(|spare| {
                    if spare.len() < MAX_SPARE {
                        spare.push(listed);
                    }
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const LIMIT: Duration = Duration::from_secs(8);

    /// What the looks of so many seconds find, one a second as [`look_every`] has it.
    fn looks(progress: &Progress, from: Instant, seconds: std::ops::Range<u64>) -> Vec<u64> {
        seconds.filter(|second| progress.look(from + Duration::from_secs(*second))).collect()
    }

    #[test]
    fn a_stream_ends_once_between_1_and_1_25_times_its_limit() {
        assert_eq!(look_every(LIMIT), Duration::from_secs(1));
        let (progress, now) = (Progress::default(), Instant::now());
        assert_eq!(looks(&progress, now, 0..100), [0; 0], "without a limit");
        progress.begin(Some(LIMIT));
        assert_eq!(looks(&progress, now, 100..150), [108]);
        assert_eq!(progress.take_idle(), Some(Idle::Upstream));
    }

    #[test]
    fn what_passes_puts_the_end_off() {
        let (progress, now) = (Progress::default(), Instant::now());
        progress.begin(Some(LIMIT));
        for second in 0..50 {
            assert!(!progress.look(now + Duration::from_secs(second)));
            if second % 6 == 0 {
                progress.pass();
            }
        }
        // The last has passed behind the look at 48.
        assert_eq!(looks(&progress, now, 50..100), [57]);
    }

    #[test]
    fn whoever_was_waited_for_is_named() {
        let waits = |client: bool, upstream: bool, answered: bool| {
            let (progress, now) = (Progress::default(), Instant::now());
            progress.begin(Some(LIMIT));
            if answered {
                progress.answer();
            }
            let asked = |waits: bool| if waits { Poll::Pending } else { Poll::Ready(()) };
            progress.asked_client(&asked(client));
            progress.asked_upstream(&asked(upstream));
            assert_eq!(looks(&progress, now, 0..20), [8]);
            progress.take_idle().unwrap()
        };
        assert_eq!(waits(true, false, false), Idle::Client, "a request without an end");
        assert_eq!(waits(false, false, false), Idle::Upstream, "a request that is not taken, or not answered");
        assert_eq!(waits(false, true, true), Idle::Upstream, "an answer without an end");
        assert_eq!(waits(false, false, true), Idle::Client, "an answer that is not read");
        assert_eq!(waits(true, true, true), Idle::Client, "a stream that both let rest");
    }
}
