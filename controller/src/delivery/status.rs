//! What a status says to people and tools beside the machine's memory: conditions, weights, progress and the gates in one line.

use jiff::Timestamp;
use sluice_crds::{
    CanaryStatus, Condition, ConditionStatus, FrozenStep, GateStatus, Phase, RejectedRevision, Stage, Verb,
    VerdictStatus, labels,
};

use super::{
    machine::{Event, Observation, Problem, Spec},
    plan, verb,
};

/// Condition types.
pub const READY: &str = "Ready";
pub const RECONCILING: &str = "Reconciling";
pub const STALLED: &str = "Stalled";
pub const PROMOTED: &str = "Promoted";
/// True while something is worth a look that forbids nothing; absent otherwise.
pub const WARNING: &str = "Warning";

/// Reason of a release that somebody aborted.
pub const ABORTED: &str = "Aborted";

/// Most names of lagging members in the status.
const MOST_LAGGING: usize = 16;

/// Fills in what follows from the machine's decision and the observation. `before` is the status of the last look: a time of
/// transition moves only when something has.
pub(super) fn present(
    status: &mut CanaryStatus,
    before: &CanaryStatus,
    spec: &Spec,
    seen: &Observation,
    stalled: Option<&Problem>,
    now: Timestamp,
) {
    status.requested_weight = status.traffic.as_ref().map_or(0, |traffic| traffic.weight);
    status.effective_weight = effective_weight(status, seen);
    status.effective_mirror = effective_mirror(status, seen);
    status.weight = status.effective_weight.map_or_else(|| "Unknown".to_owned(), |weight| weight.to_string());
    status.lagging_members = seen.fleet.lagging.iter().take(MOST_LAGGING).cloned().collect();
    status.progress = progress(status);
    status.summary = cut(summary_of(&status.gates, None), 2048);
    let primary = status.primary_revision.as_deref().and_then(|primary| seen.revisions.get(primary));
    status.replicas = primary.map_or(0, |revision| i32::try_from(revision.ready).unwrap_or(i32::MAX));
    status.selector = selector(status, spec);
    status.conditions = conditions(status, before, spec, seen, stalled, now);
}

/// Whose use tells an autoscaler how many Pods all requests need. The primary alone would seem to need the fewer the more of them the
/// canary takes, and it has all of them again in the moment of a promotion or a rollback. Copies of requests are needed by nobody.
fn selector(status: &CanaryStatus, spec: &Spec) -> Option<String> {
    let primary = status.primary_revision.as_ref()?;
    let all = format!("{}={},{}", labels::CANARY, spec.key.name, labels::REVISION);
    let copies = status.traffic.as_ref().is_some_and(|traffic| traffic.mirror > 0);
    Some(if copies { format!("{all}={primary}") } else { all })
}

/// Percent of the requests that every member of the fleet has acknowledged for the canary.
fn effective_weight(status: &CanaryStatus, seen: &Observation) -> Option<i32> {
    if seen.fleet.joining || seen.fleet.members == 0 {
        return None;
    }
    let effective = seen.fleet.effective.as_ref()?;
    let Some(canary) = &status.canary_revision else { return Some(0) };
    if effective.primary.0 == *canary {
        Some(100)
    } else if effective.canary.as_ref().is_some_and(|named| named.0 == *canary) {
        Some(effective.weight)
    } else {
        Some(0)
    }
}

/// Percent of the requests of which every member of the fleet has acknowledged that copies go to the canary.
fn effective_mirror(status: &CanaryStatus, seen: &Observation) -> Option<i32> {
    effective_weight(status, seen)?;
    let canary = status.canary_revision.as_ref()?;
    let effective = seen.fleet.effective.as_ref().filter(|effective| effective.mirror > 0)?;
    effective.canary.as_ref().filter(|named| named.0 == *canary).map(|_| effective.mirror)
}

/// The plan's step that `status.step` names.
#[must_use]
pub fn step(status: &CanaryStatus) -> Option<FrozenStep> {
    let index = status.step.and_then(|index| usize::try_from(index).ok())?;
    status.plan.as_ref()?.steps.get(index).copied()
}

/// `2/5` in the second of five steps, `1/5 (mirror)` where copies are judged; empty outside of steps.
#[must_use]
pub fn progress(status: &CanaryStatus) -> String {
    let steps = status.plan.as_ref().map_or(0, |plan| plan.steps.len());
    let mirror = if step(status).is_some_and(|step| step.mirror > 0) { " (mirror)" } else { "" };
    status.step.map_or_else(String::new, |index| format!("{}/{steps}{mirror}", index.saturating_add(1)))
}

/// Gates in one line, such as `request-success-rate 99.98 >= 99 pass, request-duration 12 <= 500 pass`; those of one verdict only
/// where one is given.
#[must_use]
pub fn summary_of(gates: &[GateStatus], only: Option<VerdictStatus>) -> String {
    let lines: Vec<String> = gates
        .iter()
        .filter(|gate| only.is_none_or(|only| gate.verdict == only))
        .map(|gate| {
            let value = gate.value.map_or_else(|| "no value".to_owned(), short);
            let limit = if gate.limit.is_empty() { String::new() } else { format!(" {}", gate.limit) };
            let verdict = match gate.verdict {
                VerdictStatus::Pass => "pass",
                VerdictStatus::Fail => "fail",
                VerdictStatus::Inconclusive => "inconclusive",
                VerdictStatus::Error => "error",
            };
            let why = if gate.message.is_empty() { String::new() } else { format!(" ({})", gate.message) };
            format!("{} {value}{limit} {verdict}{why}", gate.name)
        })
        .collect();
    lines.join(", ")
}

/// At most two decimals, and none that say nothing.
fn short(value: f64) -> String {
    let text = format!("{value:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// At most so many names, and how many more there are.
#[must_use]
pub fn listed(names: &[String], most: usize) -> String {
    let shown = names.iter().take(most).cloned().collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(most) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// At most so many bytes, whole characters: the schema bounds every text.
#[must_use]
pub fn cut(mut text: String, most: usize) -> String {
    if text.len() > most {
        let end = text.floor_char_boundary(most.saturating_sub("...".len()));
        text.truncate(end);
        text.push_str("...");
    }
    text
}

/// A new warning is an event, too.
pub(super) fn warnings_event(before: &CanaryStatus, after: &CanaryStatus) -> Option<Event> {
    let warning = find(&after.conditions, WARNING)?;
    let known = find(&before.conditions, WARNING).is_some_and(|known| known.message == warning.message);
    (!known).then(|| Event { warning: true, reason: "Warning", message: warning.message.clone() })
}

fn find<'a>(conditions: &'a [Condition], kind: &str) -> Option<&'a Condition> {
    conditions.iter().find(|condition| condition.kind == kind)
}

/// A condition without its times.
struct Said {
    kind: &'static str,
    status: ConditionStatus,
    reason: String,
    message: String,
}

fn said(kind: &'static str, status: ConditionStatus, reason: impl Into<String>, message: impl Into<String>) -> Said {
    Said { kind, status, reason: reason.into(), message: message.into() }
}

fn conditions(
    status: &CanaryStatus,
    before: &CanaryStatus,
    spec: &Spec,
    seen: &Observation,
    stalled: Option<&Problem>,
    now: Timestamp,
) -> Vec<Condition> {
    let mut all = kstatus(status, spec, seen, stalled);
    all.push(promoted(status));
    if let Some(first) = seen.warnings.first() {
        let messages: Vec<&str> = seen.warnings.iter().map(|warning| warning.message.as_str()).collect();
        all.push(said(WARNING, ConditionStatus::True, first.reason, messages.join("; ")));
    }
    all.into_iter()
        .map(|said| {
            let known = find(&before.conditions, said.kind).filter(|known| known.status == said.status);
            Condition {
                kind: said.kind.to_owned(),
                status: said.status,
                reason: said.reason,
                message: cut(said.message, 32768),
                observed_generation: Some(spec.generation),
                last_transition_time: known.map_or(now, |known| known.last_transition_time),
            }
        })
        .collect()
}

/// The rejected revision that the target asks for.
fn rejected(status: &CanaryStatus) -> Option<&RejectedRevision> {
    let asked = status.rejected_revision.as_ref().filter(|_| status.phase == Phase::Failed)?;
    status.rejected_revisions.iter().find(|rejected| rejected.revision == *asked)
}

/// Why nothing is released although the target asks for another revision than the one that serves, and what to type.
#[must_use]
pub fn rejection(status: &CanaryStatus, spec: &Spec) -> Option<String> {
    let RejectedRevision { revision, reason, message, .. } = rejected(status)?;
    let again = verb::command(&spec.key, status, Verb::Retry, revision);
    let what = match reason.as_str() {
        ABORTED => format!("revision {revision} was aborted"),
        plan::ROLLBACK => format!("revision {revision} was left: {message}"),
        _ => format!("revision {revision} was rolled back: {message} ({reason})"),
    };
    let target = &spec.target;
    Some(format!("{what}. It is not released again unless Deployment {target} changes, or you say: {again}"))
}

/// `Ready`, `Reconciling` and `Stalled` in the sense of kstatus: stalled = failed, reconciling = in progress, ready = current.
fn kstatus(status: &CanaryStatus, spec: &Spec, seen: &Observation, stalled: Option<&Problem>) -> Vec<Said> {
    use ConditionStatus::{False, True};

    let rejected = rejection(status, spec).map(|message| {
        let reason = match rejected(status).map(|rejected| rejected.reason.as_str()) {
            Some(ABORTED) => ABORTED,
            Some(plan::ROLLBACK) => plan::ROLLBACK,
            Some(_) | None => "RolledBack",
        };
        (reason, message)
    });
    let stalled = stalled.map(|problem| (problem.reason, problem.message.clone())).or(rejected);
    if let Some((reason, message)) = stalled {
        return vec![
            said(READY, False, reason, message.clone()),
            said(RECONCILING, False, reason, ""),
            said(STALLED, True, reason, message),
        ];
    }

    if status.phase == Phase::Terminated {
        let message = status.waiting.as_ref().map_or_else(String::new, |waiting| waiting.message.clone());
        let reason = phase_word(status.phase);
        return vec![
            said(READY, False, reason, message),
            said(RECONCILING, False, reason, ""),
            said(STALLED, False, reason, ""),
        ];
    }

    let under_way = status.stage != Stage::Settled || !matches!(status.phase, Phase::Initialized | Phase::Succeeded);
    if under_way {
        let reason = phase_word(status.phase);
        let message = status.waiting.as_ref().map_or_else(String::new, |waiting| waiting.message.clone());
        return vec![
            said(READY, False, reason, message.clone()),
            said(RECONCILING, True, reason, message),
            said(STALLED, False, reason, ""),
        ];
    }

    let primary = status.primary_revision.as_deref().unwrap_or_default();
    let reason = phase_word(status.phase);
    let ready = if status.replicas == 0 && spec.replicas != Some(0) {
        let trouble = seen.revisions.get(primary).and_then(|revision| revision.trouble.as_deref());
        let why = trouble.map(|trouble| format!(": {trouble}")).unwrap_or_default();
        said(READY, False, "PrimaryNotReady", format!("revision {primary} has no ready Pod{why}"))
    } else {
        said(READY, True, reason, format!("revision {primary} serves"))
    };
    vec![ready, said(RECONCILING, False, reason, ""), said(STALLED, False, reason, "")]
}

/// Whether what the target says now is what serves.
fn promoted(status: &CanaryStatus) -> Said {
    use ConditionStatus::{False, True, Unknown};

    let revision = status.template.as_ref().map_or("", |template| template.revision.as_str());
    let rollback = status.rollback.as_ref();
    let reason = phase_word(status.phase);
    match status.phase {
        Phase::Initialized | Phase::Succeeded => {
            let primary = status.primary_revision.as_deref().unwrap_or_default();
            let plan = status.plan.as_ref().filter(|plan| plan.revision == primary);
            match plan.and_then(|plan| plan.unjudged.as_deref()) {
                Some(unjudged) => said(PROMOTED, True, unjudged, format!("revision {primary} serves, unjudged")),
                None => said(PROMOTED, True, reason, format!("revision {primary} serves")),
            }
        }
        Phase::Failed => {
            let (reason, message) = rejected(status)
                .map_or(("RolledBack", ""), |rejected| (rejected.reason.as_str(), rejected.message.as_str()));
            said(PROMOTED, False, reason, message)
        }
        Phase::Progressing if status.stage == Stage::RollBack => {
            let (reason, message) =
                rollback.map_or(("RollBack", ""), |rollback| (rollback.reason.as_str(), rollback.message.as_str()));
            said(PROMOTED, False, reason, message)
        }
        Phase::Initializing
        | Phase::Waiting
        | Phase::Progressing
        | Phase::Promoting
        | Phase::Finalising
        | Phase::Terminating
        | Phase::Terminated => said(PROMOTED, Unknown, reason, format!("revision {revision} is not promoted yet")),
    }
}

fn phase_word(phase: Phase) -> &'static str {
    match phase {
        Phase::Initializing => "Initializing",
        Phase::Initialized => "Initialized",
        Phase::Waiting => "Waiting",
        Phase::Progressing => "Progressing",
        Phase::Promoting => "Promoting",
        Phase::Finalising => "Finalising",
        Phase::Succeeded => "Succeeded",
        Phase::Failed => "Failed",
        Phase::Terminating => "Terminating",
        Phase::Terminated => "Terminated",
    }
}
