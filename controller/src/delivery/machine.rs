//! The rollout machine: a pure function of (spec, status, observation, time). No `async`, no clock, no client: every
//! crash point can be enumerated. The plan is part of the status.
//!
//! The shell writes the returned status first and carries out the actions afterwards, but for [`Action::CutTraffic`], which goes
//! to the fleet at once. Every action is idempotent and follows from (status, observation) alone: a controller
//! that crashed after the status was written finds the same actions again.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use sluice_crds::{Analysis, CanaryStatus, Traffic};

use crate::{
    analysis::{DryRun, Report, Task},
    cache::CanaryKey,
    guard::{Breach, Watch},
    mesh::ports::PortKey,
};

mod adopt;
mod guarded;
mod handback;
mod invariants;
mod release;
mod run;
mod upkeep;
mod verbs;

#[cfg(test)]
mod tests;

use run::Run;
pub(super) use run::mentions;

/// The spec, parsed: what the machine reads of it. Made by `spec::parse`, which refuses what it cannot mean.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    pub key: CanaryKey,
    pub generation: i64,
    pub target: String,
    pub service: String,
    /// Further Services.
    pub additional: Vec<String>,
    pub analysis: Option<Analysis>,
    pub skip_analysis: bool,
    pub suspend: bool,
    /// `spec.replicas`; the machine asks for it to be set when it adopts.
    pub replicas: Option<u32>,
    pub progress_deadline: Duration,
    pub scale_down_delay: Duration,
    pub drain: Duration,
    pub revision_history_limit: usize,
    pub metrics_server: Option<String>,
    /// Floor of time for kube-proxy at takeover and hand-back (a setting of the controller, 10 s by default).
    pub settle: Duration,
}

/// What was seen just now. Facts only; what is not known is `None`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observation {
    pub deleting: bool,
    /// Sluice is being uninstalled: until then, every Canary hands back and none is taken over.
    pub uninstalling_until: Option<Timestamp>,
    /// Our finalizer is on the Canary. Nothing is taken over before it is.
    pub finalizer: bool,
    /// The namespace is being deleted: let go without hand-back.
    pub namespace_terminating: bool,
    /// The target Deployment; `None` when there is none.
    pub template: Option<Template>,
    pub service: Service,
    /// Recorded revisions by hash.
    pub revisions: BTreeMap<String, Revision>,
    pub fleet: Fleet,
    /// Since when this replica leads: for all it knows, nobody did anything about the Canary before. `None` if that is not known.
    pub leading_since: Option<Timestamp>,
    /// Newest report of the analysis, of whatever step.
    pub report: Option<Report>,
    /// What the guard found for the release that it was told to watch.
    pub breach: Option<Breach>,
    /// Result of the dry run for the plan that would start now or has started; `None` while it runs.
    pub dry_run: Option<DryRun>,
    /// Why the dry run has no result yet, where that is known: a metrics server that cannot be asked.
    pub dry_run_waits_for: Option<String>,
    /// What forbids to go on at all: another Canary on the same target or Service, a Service that cannot be taken over, a
    /// name that is taken. The first one is shown.
    pub problems: Vec<Problem>,
    /// Things worth a condition that forbid nothing (other Services on the same Pods, ...).
    pub warnings: Vec<Problem>,
    pub autoscaler: Autoscaler,
    /// The annotation `sluice.dev/action` of the Canary, as it is written.
    pub action: Option<String>,
}

/// Reason of the [`Problem`] that the Canary's routes are not sent to the fleet.
pub const UNSENDABLE: &str = "RoutesUnsupported";
/// Reason of the [`Problem`] that the target's owner holds its changes back (`spec.paused`).
pub const TARGET_PAUSED: &str = "TargetPaused";

#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// CamelCase word for the condition and the event.
    pub reason: &'static str,
    /// Names the object and the field, and says what to do.
    pub message: String,
}

/// The target Deployment.
#[derive(Clone, Debug, PartialEq)]
pub struct Template {
    pub uid: String,
    pub generation: i64,
    /// Hash of pod template and tracked configuration.
    pub revision: String,
    /// Some of that configuration could not be read: the revision is not known, and is said to be the one that the status knows.
    pub unread: bool,
    pub tracked_configs: BTreeMap<String, String>,
    /// `spec.replicas`.
    pub replicas: u32,
    /// The wish that `sluice.dev/replicas` says, if it is there.
    pub wish: Option<u32>,
    /// It has a label or an annotation of ours: it was not made anew since it rests.
    pub marked: bool,
    /// Ready Pods that the target owns.
    pub ready: u32,
    /// All Pods that the target owns and that are not gone, terminating ones included.
    pub pods: u32,
}

/// The apex Service, and the further ones that are taken over with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// The apex is there.
    pub exists: bool,
    /// It is, or a further one.
    pub any_exists: bool,
    /// `-primary`, `-canary` and `-pods` are there and as they should be.
    pub companions: bool,
    /// The selector of each that is there has our key.
    pub key: bool,
    /// That of one has it.
    pub any_key: bool,
    /// Our EndpointSlices of each are there and right.
    pub slices: bool,
    /// Ready endpoints in slices that are not ours, of all together.
    pub native_endpoints: u32,
    /// One whose selector, without our key, finds the target's Pods has no such endpoint.
    pub no_native_endpoint: bool,
    /// The selector of one does not find them, or it has none.
    pub unmatched: bool,
}

/// Our copy of the autoscaler that `spec.autoscalerRef` names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Autoscaler {
    /// There is one.
    pub exists: bool,
    /// It is not as the named one is now, or there is one that is not asked for.
    pub stale: bool,
}

/// A recorded revision and its Deployment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Revision {
    /// Once promoted: the way back to it is fast.
    pub promoted: bool,
    /// Order of creation (`ControllerRevision.revision`).
    pub number: i64,
    /// `spec.replicas` of its Deployment; `None` when there is none.
    pub desired: Option<u32>,
    /// Pods that are ready, sidecar included, and in the fleet's endpoints: none where the port of a Service that the Canary names
    /// leads to a name that no container of this revision has.
    pub ready: u32,
    /// Available by the Deployment's own status (minReadySeconds), at its observed generation.
    pub available: u32,
    /// Its Deployment lacks an owner that it was made with, and so would outlive the Canary.
    pub disowned: bool,
    /// Why its Pods do not come up, for people: image pull, crash loop, unschedulable, quota, a named port that it has not.
    pub trouble: Option<String>,
}

/// What the fleet has acknowledged.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fleet {
    /// Members: fleet Pods that are not gone.
    pub members: u32,
    /// Those of them that have not acknowledged what the snapshot says for this Canary, by Pod name.
    pub lagging: Vec<String>,
    /// The traffic that *every* member has acknowledged; `None` while unknown.
    pub effective: Option<Traffic>,
    /// A member that rejects the configuration, and why.
    pub rejected: Option<String>,
    /// The epoch's first reports are not all in: take no step.
    pub joining: bool,
    /// Names of the members, for the analysis.
    pub names: Vec<String>,
    /// Ports of the Canary's Services for which the fleet has none left.
    pub without_port: Vec<PortKey>,
}

impl Fleet {
    /// There is no member, and none that may yet report.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.members == 0 && !self.joining
    }
}

/// What the machine wants.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    pub status: CanaryStatus,
    pub actions: Vec<Action>,
    /// What the analysis should measure now; `None` stops it.
    pub task: Option<Task>,
    /// What the guard should watch now; `None` stops it.
    pub watch: Option<Watch>,
    /// When to look again if nothing happens before.
    pub again_at: Option<Timestamp>,
    pub events: Vec<Event>,
}

/// An effect. Idempotent.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Weight 0 goes to the fleet at once, beside the status write.
    CutTraffic,
    /// Adds the finalizer.
    AddFinalizer,
    /// Makes the Service from `spec.service` where none exists, and `-primary`, `-canary`, `-pods`.
    EnsureServices,
    /// Adds (true) or removes (false) the selector key of the apex Service.
    SetKey(bool),
    /// Makes a revision's Deployment at this many replicas: from its record, or, where there is none yet, from the present
    /// template (whose revision it then is), which is recorded with pinned configuration first.
    CreateRevision { revision: String, replicas: u32 },
    /// Sets `spec.replicas` of a revision's Deployment.
    ScaleRevision { revision: String, replicas: u32 },
    /// Marks a revision as promoted.
    MarkPromoted { revision: String },
    /// Deletes a revision's record, with everything that it owns.
    DeleteRevision { revision: String },
    /// Sets the target to 0 and keeps the wish in its annotation.
    RestTemplate { wish: u32 },
    /// Hand-back: sets the target to this many replicas and removes the annotation.
    WakeTemplate { replicas: u32 },
    /// Makes our copy of the autoscaler what the named one is now, and deletes those that are not asked for.
    FollowAutoscaler,
    /// Deletes our copies of autoscalers: the target's own is active again when it has replicas.
    EndAutoscaling,
    /// Sets `spec.replicas` of the Canary (at adoption, or when the target's wish changed).
    SetReplicas { replicas: u32 },
    /// Deletes Services of ours, slices of ours, the remaining revisions, and last the finalizer.
    Release,
}

/// An event for people.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    pub warning: bool,
    /// CamelCase word.
    pub reason: &'static str,
    pub message: String,
}

/// Stages that one call may pass through. A step passes at most: end of a rollback, start of a release, scale, shift, judge.
const MOST_STAGES: usize = 16;

/// Decides what is so, and what to do, now. Pure: the same arguments give the same outcome.
///
/// The stage is carried on as long as the observation allows, so one call may pass several stages. What it returns is
/// complete: `actions` holds everything that is still to do in the stage that was reached, done before or not seen done
/// yet, so that a lost action is found again by the next call.
#[must_use]
pub fn step(spec: &Spec, status: &CanaryStatus, seen: &Observation, now: Timestamp) -> Outcome {
    let mut run = Run::new(spec, status, seen, now);
    let mut at_rest = false;
    for _ in 0..MOST_STAGES {
        if run.advance() == Next::Wait {
            at_rest = true;
            break;
        }
    }
    debug_assert!(at_rest, "stages go round in a circle: {:?}", run.status.stage);
    upkeep::keep(&mut run);
    let outcome = run.finish(status);
    invariants::check(status, &outcome, seen);
    outcome
}

/// Whether a stage goes on at once or waits for something to be seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Again,
    Wait,
}
