//! Deletion of a Canary, and of Sluice: the mirror image of the takeover. The target's own Pods serve again, seen by every member of the
//! fleet, before the Service's key and our EndpointSlices go; everything else goes last. Needs no verdict and no new revision.

use sluice_crds::{Backend, CanaryStatus, Phase, Stage};

use super::{Action, Next, Problem, Run};

pub(super) fn advance(run: &mut Run<'_>) -> Next {
    if run.status.stage == Stage::AdoptFleet {
        // Nothing was taken over yet, or nothing is any more.
        return release(run);
    }
    if run.status.phase != Phase::Terminating {
        run.set_phase(Phase::Terminating);
        let why = if run.seen.deleting { "" } else { ": Sluice is being uninstalled" };
        run.tell(false, "HandBackStarted", format!("the traffic goes back to Deployment {}{why}", run.spec.target));
    }
    if run.seen.namespace_terminating {
        // Every object goes anyway, and none can be made: waiting for the target to be available would never end.
        run.act(Action::Release);
        return run.wait(
            "NamespaceTerminating",
            "lets go without handing back: the namespace is being deleted".into(),
            None,
        );
    }
    match run.status.stage {
        Stage::AdoptFleet => release(run),
        Stage::ReturnScale => scale(run),
        Stage::ReturnSwitch => switch(run),
        Stage::ReturnService => service(run),
        Stage::ReturnSettle => settle(run),
        Stage::AdoptService
        | Stage::AdoptSettle
        | Stage::AdoptRevision
        | Stage::AdoptSwitch
        | Stage::AdoptRest
        | Stage::Settled
        | Stage::Scale
        | Stage::Shift
        | Stage::Judge
        | Stage::PromoteScale
        | Stage::PromoteShift
        | Stage::Finalise
        | Stage::RollBack
        | Stage::Paused => begin(run),
    }
}

/// Ends what is under way. The primary has its full capacity in every stage, so it can take all requests meanwhile.
fn begin(run: &mut Run<'_>) -> Next {
    run.status.step = None;
    run.status.canary_revision = None;
    run.status.pending_release = None;
    run.status.paused = None;
    if let Some(template) = &mut run.status.template {
        template.name.clear();
    }
    run.take_back();
    if run.status.traffic.as_ref().is_none_or(|traffic| traffic.primary.is_original()) {
        run.enter(Stage::ReturnSwitch)
    } else {
        run.enter(Stage::ReturnScale)
    }
}

fn scale(run: &mut Run<'_>) -> Next {
    let Some(template) = &run.seen.template else { return nothing_to_hand_back_to(run) };
    let fresh = template.wish.filter(|wish| Some(*wish) != run.wish_taken());
    let wish = fresh.or(run.spec.replicas).or(run.wish_taken()).unwrap_or(1);
    let replicas = wish.max(template.replicas);
    if template.replicas != replicas || template.wish.is_some() {
        if let Some(replicas) = fresh.filter(|wish| run.spec.replicas != Some(*wish)) {
            // Whatever wakes the target takes the words away.
            run.act(Action::SetReplicas { replicas });
        }
        run.act(Action::WakeTemplate { replicas });
        let message = format!("Deployment {} goes to {replicas} replicas", run.spec.target);
        return run.wait("TargetWakes", message, None);
    }
    if template.ready < wish {
        let deadline = run.progress_end();
        let message = format!(
            "{} of {wish} Pods of Deployment {} are ready; the fleet serves on until they are",
            template.ready, run.spec.target
        );
        if run.now < deadline {
            return run.wait("TargetNotReady", message, Some(deadline));
        }
        let message = format!("{message}. Mend the Deployment, or set spec.replicas of this Canary to what it can run");
        return run.stall(Problem { reason: "TargetNotReady", message });
    }
    run.set_traffic(Backend::original(), None, 0);
    run.enter(Stage::ReturnSwitch)
}

/// Sluice is not uninstalled after all, and the primary serves still: the target goes back to rest.
pub(super) fn stay(run: &mut Run<'_>) -> Next {
    if let Some(traffic) = run.status.traffic.clone() {
        if let Some(canary) = &traffic.canary {
            run.retire(&canary.0, run.spec.drain);
        }
        run.set_traffic(traffic.primary, None, 0);
    }
    run.enter(Stage::AdoptRest)
}

fn switch(run: &mut Run<'_>) -> Next {
    if run.seen.template.is_none() {
        return nothing_to_hand_back_to(run);
    }
    if !run.acknowledged() && !nobody_comes(run) {
        return run.wait_for_fleet(None);
    }
    run.enter(Stage::ReturnService)
}

/// With no member left, or no Service, nobody goes through the fleet, and nobody will ever acknowledge. The Services are not made
/// again at hand-back.
fn nobody_comes(run: &Run<'_>) -> bool {
    run.seen.fleet.is_gone() || !run.seen.service.any_exists
}

fn nothing_to_hand_back_to(run: &mut Run<'_>) -> Next {
    let message = format!("Deployment {} is gone: there is nothing to hand the traffic back to", run.spec.target);
    run.tell(true, "NothingToHandBackTo", message);
    run.enter(Stage::ReturnService)
}

fn service(run: &mut Run<'_>) -> Next {
    // Pods of revisions have the labels that the Service selects: without the key they would be behind it by themselves,
    // and take connections with them when they go.
    let stops: Vec<(String, bool)> = run
        .seen
        .revisions
        .iter()
        .map(|(hash, revision)| (hash.clone(), revision.desired.unwrap_or_default() > 0, revision.ready > 0))
        .filter_map(|(hash, desired, ready)| (desired || ready).then_some((hash, desired)))
        .collect();
    if run.seen.template.is_some() && !stops.is_empty() {
        if !run.acknowledged() && !nobody_comes(run) {
            return run.wait_for_fleet(None);
        }
        let end = run.stage_end(run.spec.drain);
        // Streams outlive the Service that they came by.
        if !run.seen.fleet.is_gone() && run.now < end {
            return run.wait("Drain", "the streams that Pods of revisions still have may end".into(), Some(end));
        }
        for (revision, _) in stops.iter().filter(|(_, desired)| *desired) {
            run.act(Action::ScaleRevision { revision: revision.clone(), replicas: 0 });
        }
        let names: Vec<&str> = stops.iter().map(|(revision, _)| revision.as_str()).collect();
        return run.wait("RevisionsStop", format!("the Pods of revisions {} go", names.join(", ")), None);
    }
    // Cleared first: admission would put the key back.
    run.status.service = None;
    run.status.additional_services.clear();
    let service = run.seen.service;
    if service.any_key {
        run.act(Action::SetKey(false));
        let message = format!("the fleet's key goes from the selector of Service {}", run.spec.service);
        return run.wait("SelectorKey", message, None);
    }
    let Some(template) = &run.seen.template else { return release(run) };
    if template.ready > 0 && service.no_native_endpoint {
        let message =
            format!("Service {} finds the Pods of Deployment {} by its selector", run.spec.service, run.spec.target);
        return run.wait("NativeEndpoints", message, None);
    }
    if service.unmatched {
        tell_unmatched(run);
    }
    run.enter(Stage::ReturnSettle)
}

/// Its owner changed it since the takeover. No waiting of ours brings the target's Pods behind it.
fn tell_unmatched(run: &mut Run<'_>) {
    let which = match run.spec.additional.as_slice() {
        [] => format!("Service {}", run.spec.service),
        further => format!("one of Services {}, {}", run.spec.service, further.join(", ")),
    };
    let target = &run.spec.target;
    let message = format!(
        "{which} does not select the Pods of Deployment {target}, so it does not lead to them; if it should, give it their labels as its selector"
    );
    run.tell(true, "ServiceNotHandedBack", message);
}

fn settle(run: &mut Run<'_>) -> Next {
    let service = run.seen.service;
    let ready = run.seen.template.as_ref().is_some_and(|template| template.ready > 0);
    if service.any_key || (ready && service.no_native_endpoint) {
        // Somebody put the key back, or its endpoints went: without our slices it would lead to nobody.
        return run.enter(Stage::ReturnService);
    }
    let end = run.stage_end(run.spec.settle);
    if run.now < end {
        let message = "kube-proxy on every node follows; it has no acknowledgement, so there is a floor of time".into();
        return run.wait("KubeProxy", message, Some(end));
    }
    release(run)
}

/// Everything of ours goes, the finalizer last. The fleet drains its listener by itself.
fn release(run: &mut Run<'_>) -> Next {
    if run.seen.deleting {
        run.set_phase(Phase::Terminating);
        run.act(Action::Release);
        return run.wait("Release", "what Sluice made is removed".into(), None);
    }
    // The Canary stays. Its status says so before the finalizer goes, because whoever uninstalls waits for the finalizer only.
    if run.status.stage != Stage::AdoptFleet {
        forget(run);
    }
    run.set_phase(Phase::Terminated);
    if !run.leaving() {
        // The finalizer is gone already, and the installation stays: it is taken over again.
        return Next::Again;
    }
    if run.seen.finalizer {
        run.act(Action::Release);
    }
    let message =
        format!("Sluice is being uninstalled: the traffic is with the Pods of Deployment {}", run.spec.target);
    run.wait("Uninstall", message, run.seen.uninstalling_until)
}

/// A later takeover begins as if it were the first. Only what was said by hand stays said: Git may bring the words back.
fn forget(run: &mut Run<'_>) {
    let known = std::mem::take(&mut run.status);
    run.status = CanaryStatus {
        observed_generation: known.observed_generation,
        phase: known.phase,
        stage_since: Some(run.now),
        action: known.action,
        handled_actions: known.handled_actions,
        last_transition_time: known.last_transition_time,
        ..CanaryStatus::default()
    };
}
