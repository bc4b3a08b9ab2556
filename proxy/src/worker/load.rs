//! How much a cluster has open on this thread, and how much of it may be (circuit breakers).
//!
//! Threads share nothing, so each has its part of a limit of the process, rounded up: no lock and no shared counter stands
//! between a request and its endpoint. Where the threads do not have the same number of clients, one of them refuses before
//! the process as a whole is at its limit.

use std::{cell::Cell, rc::Rc};

use tokio::sync::Notify;

use crate::{failure::Failure, snapshot::Limits};

/// What the cluster of one name has open, whatever becomes of its configuration meanwhile.
#[derive(Default)]
pub(super) struct Load {
    /// This thread's part.
    limits: Cell<Limits>,
    requests: Cell<u32>,
    pending: Cell<u32>,
    connections: Cell<u32>,
    /// For the budget of retries; counted where a route has a policy for them.
    pub(super) active: Cell<u32>,
    pub(super) retrying: Cell<u32>,
}

impl Load {
    pub(super) fn limit(&self, limits: Limits, threads: usize) {
        let threads = u32::try_from(threads).unwrap_or(u32::MAX).max(1);
        let part = |limit: Option<u32>| limit.map(|limit| limit.div_ceil(threads));
        self.limits.set(Limits {
            connections: part(limits.connections),
            pending: part(limits.pending),
            requests: part(limits.requests),
            retries: part(limits.retries),
        });
    }

    /// A request begins; it is over when what is returned is dropped. Counted only where there is a limit.
    pub(super) fn request(self: &Rc<Self>) -> Result<Option<Admitted>, Failure> {
        let Some(limit) = self.limits.get().requests else { return Ok(None) };
        if self.requests.get() >= limit {
            return Err(Failure::Overflow);
        }
        self.requests.set(self.requests.get() + 1);
        Ok(Some(Admitted(Rc::clone(self))))
    }

    /// A request begins to wait for a connection; `None` if too many do.
    pub(super) fn wait(&self) -> Option<Counted<'_>> {
        let free = self.limits.get().pending.is_none_or(|limit| self.pending.get() < limit);
        free.then(|| Counted::on(&self.pending))
    }

    /// How many requests may be tried again at once, where that is said.
    pub(super) fn retries(&self) -> Option<u32> {
        self.limits.get().retries
    }
}

/// A request that is within the limit, until dropped.
pub(super) struct Admitted(Rc<Load>);

impl Drop for Admitted {
    fn drop(&mut self) {
        self.0.requests.set(self.0.requests.get() - 1);
    }
}

/// One more, as long as this lives.
pub(super) struct Counted<'a>(&'a Cell<u32>);

impl<'a> Counted<'a> {
    pub(super) fn on(count: &'a Cell<u32>) -> Self {
        count.set(count.get() + 1);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// Those who wait for something that others have, in their order.
pub(super) struct Queue {
    waiting: Cell<u32>,
    freed: Notify,
}

impl Queue {
    fn new() -> Self {
        Self { waiting: Cell::new(0), freed: Notify::new() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.get() == 0
    }

    /// Waits until one is free. There must be one. Whoever goes away when it was told so already leaves it to the next (`Notify`).
    pub(super) async fn freed(&self) {
        let _waiting = Counted::on(&self.waiting);
        self.freed.notified().await;
    }

    /// One is free.
    pub(super) fn free(&self) {
        if !self.is_empty() {
            self.freed.notify_one();
        }
    }

    /// There may be some for all who wait.
    pub(super) fn free_all(&self) {
        self.freed.notify_waiters();
    }
}

/// The connections of one endpoint, and who waits for them.
pub(super) struct Connections {
    load: Rc<Load>,
    /// Those that serve one request at a time: of HTTP/1.1.
    exclusive: Cell<u32>,
    /// For one of these, free or closed.
    pub(super) queue: Queue,
    /// For a stream of the others, which are of HTTP/2.
    pub(super) streams: Queue,
}

impl Connections {
    pub(super) fn of(load: &Rc<Load>) -> Rc<Self> {
        Rc::new(Self { load: Rc::clone(load), exclusive: Cell::new(0), queue: Queue::new(), streams: Queue::new() })
    }

    pub(super) fn load(&self) -> &Load {
        &self.load
    }

    /// Room for one more of HTTP/1.1. The first of an endpoint always has it: whoever waited for it would wait for what is not
    /// given back to this endpoint (as in Envoy, `ConnPoolImplBase::tryCreateNewConnection`).
    pub(super) fn another(self: &Rc<Self>) -> Option<Opened> {
        (self.exclusive.get() == 0 || !self.are_full()).then(|| {
            self.exclusive.set(self.exclusive.get() + 1);
            self.count(true)
        })
    }

    /// Whether the cluster has as many as it may have.
    pub(super) fn are_full(&self) -> bool {
        self.load.limits.get().connections.is_some_and(|limit| self.load.connections.get() >= limit)
    }

    /// One more of HTTP/2 or TCP, room or not.
    pub(super) fn one_more(self: &Rc<Self>) -> Opened {
        self.count(false)
    }

    fn count(self: &Rc<Self>, exclusive: bool) -> Opened {
        self.load.connections.set(self.load.connections.get() + 1);
        Opened { of: Rc::clone(self), exclusive }
    }
}

/// A connection, from when it is begun until it is closed.
pub(super) struct Opened {
    of: Rc<Connections>,
    exclusive: bool,
}

impl Drop for Opened {
    fn drop(&mut self) {
        let Self { of, exclusive } = self;
        if *exclusive {
            of.exclusive.set(of.exclusive.get() - 1);
        }
        of.load.connections.set(of.load.connections.get() - 1);
        of.queue.free();
        of.streams.free();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn each_thread_has_its_part_of_a_limit_rounded_up() {
        for (limit, threads, part) in
            [(Some(5), 2, Some(3)), (Some(1), 4, Some(1)), (Some(0), 4, Some(0)), (None, 4, None)]
        {
            let load = Load::default();
            load.limit(Limits { retries: limit, ..Limits::default() }, threads);
            assert_eq!(load.retries(), part);
        }
    }

    #[test]
    fn what_is_open_counts_on_when_the_limit_changes() {
        let load = Rc::new(Load::default());
        assert!(load.request().unwrap().is_none(), "without a limit nothing is counted");
        load.limit(Limits { requests: Some(2), ..Limits::default() }, 1);
        let open = [load.request().unwrap(), load.request().unwrap()];
        load.limit(Limits { requests: Some(3), ..Limits::default() }, 1);
        let third = load.request().unwrap();
        assert_eq!(load.request().err(), Some(Failure::Overflow));
        drop(open);
        drop(third);
        assert_eq!(load.requests.get(), 0);
    }

    #[test]
    fn the_first_connection_of_an_endpoint_is_always_allowed() {
        let load = Rc::new(Load::default());
        load.limit(Limits { connections: Some(1), ..Limits::default() }, 1);
        let (one, other) = (Connections::of(&load), Connections::of(&load));
        let (first, second) = (one.another(), other.another());
        assert!(first.is_some() && second.is_some());
        assert!(one.another().is_none() && other.another().is_none());
        drop(second);
        assert!(one.another().is_none(), "the cluster still has one");
        drop(first);
        assert!(one.another().is_some());
    }
}
