//! The guard: a second, faster opinion beside the gates. Members of the fleet report how requests end, several times a second;
//! for each release under way that is compared with the primary by a sequential test ([`evidence`]). It is never a pass, and it never
//! touches a weight: the rollout machine reads a [`Breach`] and takes the canary back.
//!
//! What it knows is lost with the leader, and nothing depends on it: the next leader begins anew, and the gates judge anyway.

mod evidence;
mod server;
mod watch;

use jiff::Timestamp;
use sluice_crds::{GuardSignal, GuardStatus};

pub use server::Outcomes;
pub use watch::Guard;

/// What should be compared for one release at one weight. Equal watches are the same watch.
#[derive(Clone, Debug, PartialEq)]
pub struct Watch {
    pub release: ReleaseId,
    pub service: String,
    pub primary: String,
    /// Percent of requests that are requested for the canary. At 0 nothing is compared: nobody is hurt, there is nothing to take
    /// back, and what is sent to `NAME-canary` for a test is not what users send.
    pub weight: i32,
    /// How many weights the release goes through, 100 included: they share the false alarms.
    pub weights: u32,
    /// What the canary's share of failed requests may lie above the primary's, in percentage points.
    pub error_margin: f64,
    /// `None` where no gate says what is slow.
    pub latency: Option<Latency>,
}

/// When a request is slow, and how many may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Latency {
    /// Milliseconds.
    pub slow_above: f64,
    /// As [`Watch::error_margin`].
    pub margin: f64,
}

/// Names a release: a second try of the same revision is another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReleaseId {
    pub started_at: Timestamp,
    pub revision: String,
}

/// It is certain that a canary is far worse than its primary.
#[derive(Clone, Debug, PartialEq)]
pub struct Breach {
    pub release: ReleaseId,
    pub status: GuardStatus,
}

/// Whom the guard tells about itself.
pub trait Report: Send + Sync {
    /// A breach was found.
    fn breached(&self, signal: GuardSignal);
    /// So many members of the fleet report.
    fn reporting(&self, members: usize);
}
