//! Takeover of a running application, in the order in which no request is lost: the fleet in front of the target's own Pods
//! first, then the Service, then a floor of time for kube-proxy, and only then the first revision. A revision in front of the
//! Service's switch would be found by clients that then go past the fleet for ever.

use sluice_crds::{Backend, Phase, Stage};

use super::{Action, Next, Problem, Run, Spec};

/// Carries a stage of the takeover on. A change of the target's template is no release here: what is created is what the
/// template says then.
pub(super) fn advance(run: &mut Run<'_>) -> Next {
    run.set_phase(Phase::Initializing);
    if let Some(problem) = run.seen.problems.first() {
        return run.stall(problem.clone());
    }
    match run.status.stage {
        Stage::AdoptFleet => fleet(run),
        Stage::AdoptService => service(run),
        Stage::AdoptSettle => settle(run),
        Stage::AdoptRevision => revision(run),
        Stage::AdoptSwitch => switch(run),
        Stage::AdoptRest => rest(run),
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
        | Stage::ReturnSettle => Next::Wait,
    }
}

/// The target is not there: said by name.
pub(super) fn target_not_found(spec: &Spec) -> Problem {
    let message =
        format!("Deployment {}/{} does not exist: create it, or delete this Canary", spec.key.namespace, spec.target);
    Problem { reason: "TargetNotFound", message }
}

fn fleet(run: &mut Run<'_>) -> Next {
    let Some(template) = &run.seen.template else { return run.stall(target_not_found(run.spec)) };
    if !run.seen.finalizer {
        return run.wait("Finalizer", "the finalizer goes on this Canary before anything is taken over".into(), None);
    }
    if !run.seen.service.exists || !run.seen.service.companions {
        let message = format!("Services {0}, {0}-primary and {0}-canary are made", run.spec.service);
        return run.wait("Services", message, None);
    }
    if template.ready == 0 && run.seen.service.native_endpoints > 0 {
        // Whoever serves it now would be cut off.
        let message = format!(
            "Service {} has ready endpoints, but none of them is a Pod of Deployment {}: taking it over would cut them off",
            run.spec.service, run.spec.target
        );
        return run.wait("TargetNotReady", message, None);
    }
    if run.status.traffic.is_none() {
        run.set_traffic(Backend::original(), None, 0);
        let message = format!("takes over Deployment {} and Service {}", run.spec.target, run.spec.service);
        run.tell(false, "TakeoverStarted", message);
    }
    if !run.acknowledged() {
        return run.wait_for_fleet(None);
    }
    run.enter(Stage::AdoptService)
}

fn service(run: &mut Run<'_>) -> Next {
    if run.seen.template.is_none() {
        return run.stall(target_not_found(run.spec));
    }
    if !run.seen.service.exists || !run.seen.service.slices {
        let message = format!("the fleet's EndpointSlices for Service {} are written", run.spec.service);
        return run.wait("EndpointSlices", message, None);
    }
    // From here on admission and `upkeep` keep the key.
    run.status.service = Some(run.spec.service.clone());
    run.status.additional_services.clone_from(&run.spec.additional);
    if !run.seen.service.key {
        run.act(Action::SetKey(true));
        let message = format!("the selector of Service {} gets the fleet's key", run.spec.service);
        return run.wait("SelectorKey", message, None);
    }
    if run.seen.service.native_endpoints > 0 {
        let message = format!("the endpoints that Service {} had by its selector go", run.spec.service);
        return run.wait("NativeEndpoints", message, None);
    }
    run.enter(Stage::AdoptSettle)
}

fn settle(run: &mut Run<'_>) -> Next {
    let service = run.seen.service;
    if !service.key || !service.slices || service.native_endpoints > 0 {
        // Somebody took the key away: clients may have reached Pods directly since.
        return run.enter(Stage::AdoptService);
    }
    let end = run.stage_end(run.spec.settle);
    if run.now < end {
        let message = "kube-proxy on every node follows; it has no acknowledgement, so there is a floor of time".into();
        return run.wait("KubeProxy", message, Some(end));
    }
    run.enter(Stage::AdoptRevision)
}

fn revision(run: &mut Run<'_>) -> Next {
    if run.seen.template.is_none() {
        return run.stall(target_not_found(run.spec));
    }
    // As the status knows it, which may be more than is seen just now.
    let Some(hash) = run.template_revision().map(ToOwned::to_owned) else {
        let message = format!("the configuration that Deployment {} uses is read", run.spec.target);
        return run.wait("Configuration", message, None);
    };
    let hash = hash.as_str();
    let wish = run.wish();
    run.at_least(hash, wish);
    if !run.has_capacity(hash, wish) {
        let deadline = run.progress_end();
        let message = run.progress_of(hash, wish);
        if run.now < deadline {
            return run.wait("FirstRevision", message, Some(deadline));
        }
        let message = format!("{message}; Deployment {} serves on", run.spec.target);
        return run.stall(Problem { reason: "ProgressDeadlineExceeded", message });
    }
    if !run.acknowledged() {
        return run.wait_for_fleet(None);
    }
    run.set_traffic(Backend::revision(hash), None, 0);
    run.enter(Stage::AdoptSwitch)
}

fn switch(run: &mut Run<'_>) -> Next {
    let Some(hash) = run.status.traffic.as_ref().map(|traffic| traffic.primary.0.clone()) else {
        return run.enter(Stage::AdoptRevision);
    };
    if run.acknowledged() {
        run.status.primary_revision = Some(hash);
        return run.enter(Stage::AdoptRest);
    }
    let wanted = run.wish();
    if wanted > 0 && run.ready(&hash) == 0 && run.seen.template.as_ref().is_some_and(|template| template.ready > 0) {
        run.set_traffic(Backend::original(), None, 0);
        run.tell(
            true,
            "TakeoverHeld",
            format!("revision {hash} lost all of its Pods; Deployment {} serves on", run.spec.target),
        );
        return run.enter(Stage::AdoptRevision);
    }
    run.at_least(&hash, wanted);
    run.wait_for_fleet(None)
}

fn rest(run: &mut Run<'_>) -> Next {
    let resting = run.target_rests();
    let has_pods = run.seen.template.as_ref().is_some_and(|template| template.replicas > 0);
    let end = run.stage_end(run.spec.drain);
    if has_pods && !resting && run.now < end {
        let message = format!("the streams that Pods of Deployment {} still have may end", run.spec.target);
        return run.wait("Drain", message, Some(end));
    }
    if let Some(known) = &mut run.status.template {
        // From here on admission and `upkeep` keep it at 0.
        known.name.clone_from(&run.spec.target);
    }
    if has_pods {
        let message = format!("Deployment {} goes to 0 replicas: it is the template from now on", run.spec.target);
        return run.wait("TargetRests", message, None);
    }
    let primary = run.status.primary_revision.clone().unwrap_or_default();
    run.tell(false, "TakenOver", format!("revision {primary} serves; Deployment {} is its template", run.spec.target));
    run.settle()
}
