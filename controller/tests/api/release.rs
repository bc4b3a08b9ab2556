//! A change is released, or taken back.

use k8s_openapi::api::{apps::v1::ControllerRevision, core::v1::ConfigMap};
use kube::{
    ResourceExt,
    api::{DeleteParams, Patch, PatchParams},
};
use serde_json::json;
use sluice_crds::{Canary, CanaryStatus, Phase, VerdictStatus, labels};
use std::sync::atomic::Ordering;

use crate::world::World;

pub fn image(image: &str) -> serde_json::Value {
    // A merge patch replaces the list: the whole container is said again.
    json!({"spec": {"template": {"spec": {"containers": [{
        "name": "app", "image": image, "ports": [{"name": "http", "containerPort": 8080}],
    }]}}}})
}

#[tokio::test]
async fn what_was_judged_is_what_serves() {
    let Some(world) = World::new("promotion").await else { return };
    world.running_application("web").await;
    world.canary("web", json!({})).await;
    let first = world.until_settled("web").await.primary_revision.unwrap();
    world.patch_deployment("web", image("app:2")).await;
    let status = world.until_status("web", "promoted", |status| status.phase == Phase::Succeeded).await;
    let second = status.primary_revision.unwrap();
    assert_ne!(first, second);
    assert!(world.judge.asked_dry.load(Ordering::SeqCst) > 0);
    let deployment = world.deployments().get(&format!("web-{second}")).await.unwrap();
    assert_eq!(
        deployment.metadata.generation,
        Some(deployment.data["spec"]["replicas"].as_i64().unwrap()),
        "only scaled since it was made"
    );
    let record = world.api::<ControllerRevision>().get(&format!("web-{second}")).await.unwrap();
    assert!(record.annotations().contains_key(labels::PROMOTED));
    assert_eq!(record.revision, 2);
    world
        .until("the former revision rests", || async {
            let old = world.deployments().get(&format!("web-{first}")).await.unwrap();
            (old.data["spec"]["replicas"] == 0).then_some(())
        })
        .await;
}

#[tokio::test]
async fn a_change_of_a_config_map_alone_is_a_release_with_new_copies() {
    let Some(world) = World::new("config").await else { return };
    world.running_application("web").await;
    world.canary("web", json!({})).await;
    let first = world.until_settled("web").await.primary_revision.unwrap();
    let green = json!({"data": {"color": "green"}});
    world.api::<ConfigMap>().patch("web", &PatchParams::default(), &Patch::Merge(&green)).await.unwrap();
    let status = world.until_status("web", "promoted", |status| status.phase == Phase::Succeeded).await;
    let second = status.primary_revision.unwrap();
    let color = |revision: String| {
        let api = world.api::<ConfigMap>();
        async move { api.get(&format!("web-{revision}")).await.unwrap().data.unwrap()["color"].clone() }
    };
    assert_eq!((color(first).await, color(second).await), ("blue".to_owned(), "green".to_owned()));
}

/// As `kubectl replace --force` does it.
#[tokio::test]
async fn a_config_map_that_is_deleted_and_made_again_as_it_was_changes_nothing() {
    let Some(world) = World::new("config-anew").await else { return };
    world.running_application("web").await;
    world.canary("web", json!({})).await;
    let before = world.until_settled("web").await.template.unwrap();
    world.api::<ConfigMap>().delete("web", &DeleteParams::default()).await.unwrap();
    world.until_stalled("web", "ConfigMissing").await;
    world.create::<ConfigMap>(json!({"metadata": {"name": "web"}, "data": {"color": "blue"}})).await;
    let goes_on = |status: &CanaryStatus| {
        status.conditions.iter().any(|condition| condition.kind == "Ready" && condition.reason == "Initialized")
    };
    let after = world.until_status("web", "it goes on", goes_on).await.template.unwrap();
    assert_eq!((after.revision, after.tracked_configs), (before.revision, before.tracked_configs));
    assert!(!world.told.reasons().contains(&"NewRevision"));
}

#[tokio::test]
async fn a_failed_gate_takes_the_traffic_back_and_the_revision_down() {
    let Some(world) = World::new("rollback").await else { return };
    world.running_application("web").await;
    world.canary("web", json!({})).await;
    let first = world.until_settled("web").await.primary_revision.unwrap();
    *world.judge.verdict.lock().unwrap() = Some(VerdictStatus::Fail);
    world.patch_deployment("web", image("app:bad")).await;
    let status = world.until_status("web", "rolled back", |status| status.phase == Phase::Failed).await;
    assert_eq!(status.primary_revision.as_deref(), Some(first.as_str()));
    let bad = status.rejected_revision.unwrap();
    assert!(!world.fleet.cuts.lock().unwrap().is_empty(), "the fleet was told at once");
    world
        .until("the rejected revision is down", || async {
            let down = world.deployments().get(&format!("web-{bad}")).await.unwrap();
            (down.data["spec"]["replicas"] == 0).then_some(())
        })
        .await;
    assert_eq!(world.status("web").await.requested_weight, 0);
}

#[tokio::test]
async fn why_a_new_revision_does_not_come_up_is_in_the_status() {
    let Some(world) = World::new("broken").await else { return };
    world.running_application("web").await;
    world.canary("web", json!({"spec": {"progressDeadlineSeconds": 2}})).await;
    let first = world.until_settled("web").await.primary_revision.unwrap();
    world.cluster.broken.lock().unwrap().insert("app:broken".into());
    world.patch_deployment("web", image("app:broken")).await;
    world
        .until_status("web", "it says why it waits", |status| {
            status.waiting.as_ref().is_some_and(|waiting| waiting.message.contains("ImagePullBackOff): no such image"))
        })
        .await;
    let status = world.until_status("web", "rolled back", |status| status.phase == Phase::Failed).await;
    assert_eq!(status.primary_revision, Some(first));
}

#[tokio::test]
async fn a_breach_of_the_guard_takes_the_traffic_back_whatever_the_gates_say() {
    let Some(world) = World::new("guard").await else { return };
    world.running_application("web").await;
    world.canary("web", json!({"spec": {"analysis": {"interval": "1h"}}})).await;
    world.until_settled("web").await;
    world.patch_deployment("web", image("app:bad")).await;
    world.until_status("web", "the first step is judged", |status| status.requested_weight == 50).await;
    let watched = || async { world.guard.watched(&world.key("web")).filter(|watch| watch.weight == 50) };
    world.until("the guard watches", watched).await;
    world.guard.breach(&world.key("web"));
    let status = world.until_status("web", "rolled back", |status| status.phase == Phase::Failed).await;
    assert_eq!((status.rollback.unwrap().reason.as_str(), status.failed_checks), ("GuardBreached", 0));
    assert_eq!(status.guard.unwrap().canary.bad, 9);
    assert!(!world.fleet.cuts.lock().unwrap().is_empty(), "the fleet was told at once");
    world.until_told("GuardBreached").await;
    assert_eq!(world.guard.watched(&world.key("web")), None);
}

#[tokio::test]
async fn a_weight_that_is_taken_back_while_the_fleet_has_an_older_one_is_cut() {
    let Some(world) = World::new("overtaken").await else { return };
    world.running_application("web").await;
    world.canary("web", json!({"spec": {"analysis": {"interval": "1h"}}})).await;
    world.until_settled("web").await;
    world.cluster.broken.lock().unwrap().insert("app:bad".into());
    world.patch_deployment("web", image("app:bad")).await;
    let prepared = || async {
        world.fleet.acknowledged(&world.key("web")).filter(|traffic| traffic.canary.is_some() && traffic.weight == 0)
    };
    world.until("the canary is acknowledged at weight 0", prepared).await;
    // As if the weight that comes next were still on its way to the fleet when it is withdrawn.
    world.fleet.holds_back.store(true, Ordering::SeqCst);
    world.cluster.broken.lock().unwrap().clear();
    world.until_status("web", "a weight is requested", |status| status.requested_weight == 50).await;
    let watched = || async { world.guard.watched(&world.key("web")).filter(|watch| watch.weight == 50) };
    world.until("the guard watches", watched).await;
    assert_eq!(*world.fleet.cuts.lock().unwrap(), []);
    world.guard.breach(&world.key("web"));
    world.until_status("web", "weight 0 is requested", |status| status.requested_weight == 0).await;
    assert_eq!(*world.fleet.cuts.lock().unwrap(), [world.key("web")]);
}

/// The step counts once every member of the fleet has the mirror, no weight is requested meanwhile, and the fleet is told at once
/// when copies fail.
#[tokio::test]
async fn copies_are_judged_before_any_weight_and_a_version_that_fails_them_gets_none() {
    let Some(world) = World::new("mirrored").await else { return };
    world.running_application("web").await;
    world.canary("web", json!({"spec": {"analysis": {"mirror": true, "mirrorWeight": 60}}})).await;
    let first = world.until_settled("web").await.primary_revision.unwrap();
    world.patch_deployment("web", image("app:2")).await;
    let requested = |status: &CanaryStatus| status.traffic.as_ref().is_some_and(|traffic| traffic.mirror == 60);
    let status = world.until_status("web", "the mirror is requested", requested).await;
    assert_eq!((status.requested_weight, status.progress.as_str()), (0, "1/2 (mirror)"));
    let status = world.until_status("web", "promoted", |status| status.phase == Phase::Succeeded).await;
    assert_eq!(status.traffic.as_ref().unwrap().mirror, 0);
    let second = status.primary_revision.unwrap();
    assert_ne!(first, second);
    assert_eq!(*world.fleet.cuts.lock().unwrap(), []);

    *world.judge.verdict.lock().unwrap() = Some(VerdictStatus::Fail);
    world.patch_deployment("web", image("app:bad")).await;
    let status = world.until_status("web", "rolled back", |status| status.phase == Phase::Failed).await;
    assert_eq!(status.primary_revision, Some(second));
    assert_eq!(status.plan.unwrap().steps.first().map(|step| (step.weight, step.mirror)), Some((0, 60)));
    assert!(!world.fleet.cuts.lock().unwrap().is_empty(), "the fleet was told at once");
    let told = world.told.reasons();
    let started = told.iter().rposition(|reason| *reason == "ReleaseStarted").unwrap();
    let steps = told[started..].iter().filter(|reason| **reason == "StepStarted").count();
    assert_eq!(steps, 1, "no weight was ever requested: {told:?}");
}

#[tokio::test]
async fn a_fault_on_purpose_is_told_of_and_shown_for_as_long_as_it_is_there() {
    let Some(world) = World::new("rehearsal").await else { return };
    world.running_application("web").await;
    let fault = json!({"abort": {"percentage": {"value": 5}, "httpStatus": 503}});
    world.canary("web", json!({"spec": {"service": {"fault": fault}}})).await;
    world.until_settled("web").await;
    let shown = |status: &CanaryStatus| {
        status.conditions.iter().any(|condition| {
            condition.reason == "FaultInjected" && condition.message.contains("answers 5 percent with 503")
        })
    };
    world.until_status("web", "the fault is shown", shown).await;
    world.until_told("Warning").await;
    let none = json!({"spec": {"service": {"fault": null}}});
    world.api::<Canary>().patch("web", &PatchParams::default(), &Patch::Merge(&none)).await.unwrap();
    world.until_status("web", "nothing is shown any more", |status| !shown(status)).await;
    assert_eq!(world.told.reasons().iter().filter(|reason| **reason == "Warning").count(), 1);
}
