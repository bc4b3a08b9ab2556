//! What is kept true in every stage, whoever changes it: the finalizer, our Services, the selector key, the target's rest,
//! capacity, the marks of promoted revisions; and what goes when its time has come.

use sluice_crds::Stage;

use super::{Action, Run, TARGET_PAUSED, run::mentions};
use crate::delivery::plan;

/// Adds what is to be done beside the stage.
pub(super) fn keep(run: &mut Run<'_>) {
    cut(run);
    if run.seen.namespace_terminating {
        return;
    }
    if run.leaving() {
        key(run);
        if run.seen.autoscaler.exists {
            run.act(Action::EndAutoscaling);
        }
        return;
    }
    if !forbidden(run) && !run.seen.finalizer {
        run.act(Action::AddFinalizer);
    }
    if adopting(run.status.stage) && forbidden(run) {
        // Nothing is ours yet.
        return;
    }
    services(run);
    key(run);
    rest(run);
    wish(run);
    autoscaler(run);
    capacity(run);
    promoted(run);
    retiring(run);
    let settled = run.status.stage == Stage::Settled;
    // Under a quota, the first revision of a template that was mended waits for what the broken one takes.
    if settled || run.status.stage == Stage::AdoptRevision {
        strays(run);
    }
    if settled {
        history(run);
    }
    owners(run);
}

/// Whether something forbids to make what is ours. An owner who holds changes of the target back means neither the finalizer nor our
/// Services, once there are any.
fn forbidden(run: &Run<'_>) -> bool {
    run.seen.problems.iter().any(|problem| adopting(run.status.stage) || problem.reason != TARGET_PAUSED)
}

/// A canary that is being taken back has no request more than can be helped, nor a copy of one.
fn cut(run: &mut Run<'_>) {
    let taken_back = matches!(run.status.stage, Stage::RollBack | Stage::ReturnScale)
        && run.status.traffic.as_ref().is_some_and(|traffic| traffic.canary.is_some())
        && run.weight() == 0
        && run.mirror() == 0;
    // Of a Service that is gone and is not made again nobody ever says so.
    let nobody_comes = run.leaving() && !run.seen.service.any_exists;
    if taken_back && !nobody_comes && !run.acknowledged() {
        run.act(Action::CutTraffic);
    }
}

fn adopting(stage: Stage) -> bool {
    match stage {
        Stage::AdoptFleet
        | Stage::AdoptService
        | Stage::AdoptSettle
        | Stage::AdoptRevision
        | Stage::AdoptSwitch
        | Stage::AdoptRest => true,
        Stage::Settled
        | Stage::Scale
        | Stage::Shift
        | Stage::Judge
        | Stage::PromoteScale
        | Stage::PromoteShift
        | Stage::Finalise
        | Stage::RollBack
        | Stage::Paused
        | Stage::ReturnScale
        | Stage::ReturnSwitch
        | Stage::ReturnService
        | Stage::ReturnSettle => false,
    }
}

/// Its labels and ports come from the target, so there must be one, and the finalizer must be there to remove them again.
fn services(run: &mut Run<'_>) {
    let service = run.seen.service;
    let complete = service.exists && service.companions;
    if !complete && run.seen.finalizer && run.seen.template.is_some() && !forbidden(run) {
        run.act(Action::EnsureServices);
    }
}

/// Somebody who owns the whole selector (server-side apply) takes our key away with every apply.
fn key(run: &mut Run<'_>) {
    let service = run.seen.service;
    if run.status.service.is_some() && service.exists && service.slices && !service.key {
        run.act(Action::SetKey(true));
    }
}

/// Git writes `replicas` again: the Pods that come of it were never judged.
fn rest(run: &mut Run<'_>) {
    let runs = run.seen.template.as_ref().is_some_and(|template| template.replicas > 0);
    if runs && run.target_rests() && !run.behind {
        // Where it says none of its own, the one that was taken over last stays.
        let wish = run.owners_wish().or(run.wish_taken()).unwrap_or_else(|| run.wish());
        run.act(Action::RestTemplate { wish });
    }
}

/// Another wish of the target's owner is taken over once; scaling the Canary afterwards holds. It counts as taken only when
/// `spec.replicas` says it.
fn wish(run: &mut Run<'_>) {
    match run.owners_wish().filter(|wish| Some(*wish) != run.wish_taken()) {
        Some(wish) if run.spec.replicas == Some(wish) => {
            if let Some(template) = &mut run.status.template {
                template.replicas = i32::try_from(wish).ok();
            }
        }
        Some(wish) => run.act(Action::SetReplicas { replicas: wish }),
        // A scale subresource without a value cannot be read by an autoscaler.
        None if run.spec.replicas.is_none() && run.seen.template.is_some() => {
            run.act(Action::SetReplicas { replicas: run.wish() });
        }
        None => {}
    }
}

/// An autoscaler of the Canary has nothing to read before a revision serves, and until then the target's own is active.
fn autoscaler(run: &mut Run<'_>) {
    if run.seen.autoscaler.stale && !adopting(run.status.stage) {
        run.act(Action::FollowAutoscaler);
    }
}

/// The primary has its full capacity until another one is promoted; during a release it only grows. The canary has what its
/// weight, or the copies that it gets, need.
fn capacity(run: &mut Run<'_>) {
    let Some(primary) = run.status.primary_revision.clone() else { return };
    let wish = run.wish();
    match run.desired(&primary) {
        None => {
            // From its record; a revision without one can only be made from the template.
            if run.revision(&primary).is_some() || run.template_revision() == Some(&primary) {
                run.act(Action::CreateRevision { revision: primary, replicas: wish });
            }
        }
        Some(has) if has < wish => run.act(Action::ScaleRevision { revision: primary, replicas: wish }),
        Some(has) if has > wish && run.status.stage == Stage::Settled && run.acknowledged() => {
            run.act(Action::ScaleRevision { revision: primary, replicas: wish });
        }
        Some(_) => {}
    }
    let Some(canary) = run.status.canary_revision.clone() else { return };
    let load = run.weight().max(run.mirror());
    let needs = plan::capacity(run.rising_wish(), load);
    if load > 0 && run.desired(&canary).is_some_and(|has| has < needs) {
        run.act(Action::ScaleRevision { revision: canary, replicas: needs });
    }
}

/// The mark makes the way back to a revision a fast one.
fn promoted(run: &mut Run<'_>) {
    let Some(primary) = run.status.primary_revision.clone() else { return };
    if run.revision(&primary).is_some_and(|revision| !revision.promoted) {
        run.act(Action::MarkPromoted { revision: primary });
    }
}

/// Whether a revision has a role, so that it is nobody's to scale down.
fn has_role(run: &Run<'_>, hash: &str) -> bool {
    run.status.primary_revision.as_deref() == Some(hash)
        || run.status.canary_revision.as_deref() == Some(hash)
        || run.status.pending_release.as_ref().is_some_and(|pending| pending.revision == hash)
        || run.status.traffic.as_ref().is_some_and(|traffic| mentions(traffic, hash))
}

/// Scales down what has lost its traffic, in its time, and never before every member of the fleet has said so.
fn retiring(run: &mut Run<'_>) {
    for retiring in std::mem::take(&mut run.status.retiring) {
        let hash = &retiring.revision;
        let Some(has) = run.desired(hash).filter(|_| !has_role(run, hash)) else { continue };
        if run.now < retiring.scale_down_at {
            run.look_at(retiring.scale_down_at);
        } else if has == 0 {
            continue;
        } else if run.unused(hash) {
            run.act(Action::ScaleRevision { revision: hash.clone(), replicas: 0 });
        }
        run.status.retiring.push(retiring);
    }
}

/// Revisions that run without a role: of a takeover that began with another template, or scaled up by hand.
fn strays(run: &mut Run<'_>) {
    if !run.acknowledged() {
        return;
    }
    let strays: Vec<String> = run
        .seen
        .revisions
        .iter()
        .filter(|(hash, revision)| {
            let to_be = adopting(run.status.stage) && run.template_revision() == Some(hash.as_str());
            revision.desired.is_some_and(|has| has > 0)
                && !has_role(run, hash)
                && !to_be
                && !run.status.retiring.iter().any(|retiring| retiring.revision == **hash)
                && run.unused(hash)
        })
        .map(|(hash, _)| hash.clone())
        .collect();
    for revision in strays {
        run.act(Action::ScaleRevision { revision, replicas: 0 });
    }
}

/// A revision whose owners somebody took off (a restored backup, an edit) would outlive the Canary: setting its replicas gives
/// them back.
fn owners(run: &mut Run<'_>) {
    for (hash, revision) in &run.seen.revisions {
        let (true, Some(replicas)) = (revision.disowned, revision.desired) else { continue };
        let touched = |action: &Action| {
            matches!(
                action,
                Action::CreateRevision { revision, .. }
                    | Action::ScaleRevision { revision, .. }
                    | Action::DeleteRevision { revision }
                    if revision == hash
            )
        };
        if !run.actions.iter().any(touched) {
            run.act(Action::ScaleRevision { revision: hash.clone(), replicas });
        }
    }
}

/// Keeps the last few unused revisions: those that were once promoted rather than those that never were, and of equals the
/// newer ones.
fn history(run: &mut Run<'_>) {
    let mut unused: Vec<(bool, i64, &String)> = run
        .seen
        .revisions
        .iter()
        .filter(|(hash, revision)| {
            revision.desired.unwrap_or_default() == 0
                && !has_role(run, hash)
                && run.status.rejected_revision.as_ref() != Some(hash)
                && run.template_revision() != Some(hash)
                && !run.status.retiring.iter().any(|retiring| retiring.revision == **hash)
                && run.unused(hash)
        })
        .map(|(hash, revision)| (revision.promoted, revision.number, hash))
        .collect();
    unused.sort_unstable();
    let surplus = unused.len().saturating_sub(run.spec.revision_history_limit);
    let surplus: Vec<String> = unused.into_iter().take(surplus).map(|(_, _, hash)| hash.clone()).collect();
    for revision in surplus {
        run.act(Action::DeleteRevision { revision });
    }
}
