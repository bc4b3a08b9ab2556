//! What people do by hand: the annotation `sluice.dev/action`, `kubectl rollout undo|restart`, `kubectl wait`, `kubectl scale`.

use futures::StreamExt;
use k8s_openapi::api::apps::v1::ReplicaSet;
use kube::{
    ResourceExt,
    api::{DynamicObject, Patch, PatchParams, WatchEvent, WatchParams},
};
use serde_json::json;
use sluice_crds::{ActionOutcome, Canary, CanaryStatus, ConditionStatus, Phase, Stage, VerdictStatus, labels};

use crate::{release::image, server, world::World};

/// `kubectl annotate --overwrite`.
async fn say(world: &World, value: &str) {
    let patch = json!({"metadata": {"annotations": {labels::ACTION: value}}});
    world.api::<Canary>().patch("web", &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
}

async fn until_answered(world: &World, value: &str) -> (ActionOutcome, String) {
    let handled = |status: &CanaryStatus| status.action.as_ref().is_some_and(|handled| handled.value == value);
    let action = world.until_status("web", &format!("{value} is handled"), handled).await.action.unwrap();
    (action.outcome, action.message)
}

fn condition(status: &CanaryStatus, kind: &str) -> (ConditionStatus, String) {
    let found = status.conditions.iter().find(|condition| condition.kind == kind).unwrap();
    (found.status, found.reason.clone())
}

/// A release that no verdict ends: it stays in its first step.
async fn until_judged(world: &World, template: &str) -> String {
    *world.judge.verdict.lock().unwrap() = Some(VerdictStatus::Inconclusive);
    world.patch_deployment("web", image(template)).await;
    let judged = |status: &CanaryStatus| status.stage == Stage::Judge && status.canary_revision.is_some();
    world.until_status("web", "a step is judged", judged).await.canary_revision.unwrap()
}

#[tokio::test]
async fn promote_abort_retry_and_rollback_do_what_they_say_and_each_value_counts_once() {
    let Some(world) = World::new("verbs").await else { return };
    world.running_application("web").await;
    world.canary("web", json!({})).await;
    let first = world.until_settled("web").await.primary_revision.unwrap();

    let second = until_judged(&world, "app:2").await;
    say(&world, "promote").await;
    let (outcome, message) = until_answered(&world, "promote").await;
    assert_eq!(outcome, ActionOutcome::Refused, "{message}");
    world.until_told("ActionRefused").await;
    say(&world, &format!("abort:{second}")).await;
    let status = world.until_status("web", "taken back", |status| status.phase == Phase::Failed).await;
    assert_eq!(condition(&status, "Stalled"), (ConditionStatus::True, "Aborted".to_owned()));
    assert_eq!(condition(&status, "Promoted"), (ConditionStatus::False, "Aborted".to_owned()));
    assert_eq!(status.primary_revision.as_ref(), Some(&first));
    assert!(!world.fleet.cuts.lock().unwrap().is_empty(), "the fleet was told at once");

    // Away and back: it waits for somebody.
    *world.judge.verdict.lock().unwrap() = None;
    world.patch_deployment("web", image("app:3")).await;
    let third = world.until_settled("web").await.primary_revision.unwrap();
    world.patch_deployment("web", image("app:2")).await;
    let status = world.until_status("web", "rejected", |status| status.phase == Phase::Failed).await;
    assert_eq!((&status.rejected_revision, &status.primary_revision), (&Some(second.clone()), &Some(third.clone())));
    say(&world, &format!("retry:{second}")).await;
    let status = world.until_status("web", "promoted", |status| status.phase == Phase::Succeeded).await;
    assert_eq!(status.plan.unwrap().unjudged, None);

    // Git brings an old value back; then somebody goes back by hand.
    say(&world, &format!("abort:{second}")).await;
    assert_eq!(until_answered(&world, &format!("abort:{second}")).await.0, ActionOutcome::Repeated);
    say(&world, &format!("rollback:{third}")).await;
    let back =
        |status: &CanaryStatus| status.stage == Stage::Settled && status.primary_revision.as_ref() == Some(&third);
    let status = world.until_status("web", "gone back", back).await;
    assert_eq!(condition(&status, "Stalled"), (ConditionStatus::True, "Rollback".to_owned()));
    assert_eq!(status.rejected_revision, Some(second));
    say(&world, "rollback:nothing").await;
    let (outcome, message) = until_answered(&world, "rollback:nothing").await;
    assert_eq!(outcome, ActionOutcome::Refused);
    assert!(message.contains(&first) && !message.contains(&third), "the kept ones are listed: {message}");

    // Promoted in the middle of its first step.
    let fourth = until_judged(&world, "app:4").await;
    say(&world, &format!("promote:{fourth}:jane")).await;
    let promoted = |status: &CanaryStatus| status.phase == Phase::Succeeded;
    let status = world.until_status("web", "promoted by hand", promoted).await;
    assert_eq!(status.primary_revision, Some(fourth));
    assert_eq!(condition(&status, "Promoted"), (ConditionStatus::True, "ManualPromotion".to_owned()));
}

#[tokio::test]
async fn a_paused_release_stays_where_it_is_until_it_is_resumed() {
    let Some(world) = World::new("pause").await else { return };
    world.running_application("web").await;
    world.canary("web", json!({})).await;
    world.until_settled("web").await;
    let second = until_judged(&world, "app:2").await;
    say(&world, &format!("pause:{second}")).await;
    assert_eq!(until_answered(&world, &format!("pause:{second}")).await.0, ActionOutcome::Accepted);
    *world.judge.verdict.lock().unwrap() = None;
    world.judge.measure_anew(&world.key("web"));
    world.touch("web");
    let paused = |status: &CanaryStatus| status.waiting.as_ref().is_some_and(|waiting| waiting.reason == "Paused");
    let status = world.until_status("web", "it waits for somebody", paused).await;
    assert_eq!(status.requested_weight, 50);
    say(&world, &format!("resume:{second}")).await;
    let status = world.until_status("web", "promoted", |status| status.phase == Phase::Succeeded).await;
    assert_eq!((status.primary_revision, status.paused), (Some(second), None));
}

/// The ReplicaSet that the Deployment controller would have made of a template, as `kubectl rollout` finds it: with the
/// Deployment's annotations of that time.
async fn history(world: &World, target: &DynamicObject, number: usize) {
    let mut template = target.data["spec"]["template"].clone();
    template["metadata"]["labels"]["pod-template-hash"] = json!(number.to_string());
    let mut annotations = json!(target.annotations());
    annotations["deployment.kubernetes.io/revision"] = json!(number.to_string());
    let owner =
        json!({"apiVersion": "apps/v1", "kind": "Deployment", "name": "web", "uid": target.uid(), "controller": true});
    world
        .create::<ReplicaSet>(json!({
            "metadata": {
                "name": format!("web-{number}"), "annotations": annotations, "ownerReferences": [owner],
                "labels": template["metadata"]["labels"],
            },
            "spec": {"replicas": 0, "selector": {"matchLabels": template["metadata"]["labels"]}, "template": template},
        }))
        .await;
}

async fn kubectl(world: &World, command: &str) {
    let (well, printed) = server::shell(&world.namespace, &format!("kubectl {command}")).await;
    assert!(well, "{command}: {printed}");
}

#[tokio::test]
async fn rollout_undo_goes_straight_back_and_scales_nothing_down_and_rollout_restart_is_a_judged_release() {
    let Some(world) = World::new("undo").await else { return };
    world.running_application("web").await;
    world.canary("web", json!({})).await;
    let first = world.until_settled("web").await.primary_revision.unwrap();
    let older = world
        .until("the wish is kept", || async {
            let target = world.deployments().get("web").await.unwrap();
            (target.annotations().get(labels::REPLICAS).map(String::as_str) == Some("2")).then_some(target)
        })
        .await;
    history(&world, &older, 1).await;

    let mut newer = image("app:2");
    newer["spec"]["replicas"] = json!(3);
    world.patch_deployment("web", newer).await;
    let promoted = |status: &CanaryStatus| status.phase == Phase::Succeeded;
    let second = world.until_status("web", "promoted", promoted).await.primary_revision.unwrap();
    world
        .until("the wish is taken over", || async { (world.get("web").await.spec.replicas == Some(3)).then_some(()) })
        .await;

    history(&world, &world.deployments().get("web").await.unwrap(), 2).await;
    *world.judge.verdict.lock().unwrap() = Some(VerdictStatus::Fail);
    kubectl(&world, "rollout undo deployment/web").await;
    let back = |status: &CanaryStatus| status.primary_revision.as_ref() == Some(&first) && promoted(status);
    let status = world.until_status("web", "back", back).await;
    assert_eq!(status.plan.as_ref().unwrap().unjudged.as_deref(), Some("Rollback"));
    assert_eq!(condition(&status, "Promoted"), (ConditionStatus::True, "Rollback".to_owned()));
    assert_eq!(world.get("web").await.spec.replicas, Some(3), "nobody meant to scale");
    world.until_told("ReplicasKept").await;

    *world.judge.verdict.lock().unwrap() = None;
    kubectl(&world, "rollout restart deployment/web").await;
    let generation = world.deployments().get("web").await.unwrap().metadata.generation.unwrap();
    let restarted = |status: &CanaryStatus| {
        promoted(status) && status.template.as_ref().is_some_and(|template| template.observed_generation >= generation)
    };
    let status = world.until_status("web", "restarted", restarted).await;
    assert!(![Some(first), Some(second)].contains(&status.primary_revision));
    let plan = status.plan.unwrap();
    assert_eq!((plan.unjudged, plan.steps.len()), (None, 1));
}

#[tokio::test]
async fn no_status_that_has_observed_a_template_calls_an_older_one_promoted() {
    let Some(world) = World::new("wait").await else { return };
    world.running_application("web").await;
    world.canary("web", json!({})).await;
    world.until_settled("web").await;
    let now = world.get("web").await.resource_version().unwrap();
    let api = world.api::<Canary>();
    let mut statuses = api.watch(&WatchParams::default(), &now).await.unwrap().boxed();

    // The documented recipe: the generation that CI has applied, then Reconciling=False, then Promoted.
    let generation = world.patch_deployment("web", image("app:2")).await.metadata.generation.unwrap();
    let mut observed = Vec::new();
    let status = loop {
        let Some(Ok(WatchEvent::Modified(canary))) = statuses.next().await else { continue };
        let status = canary.status.unwrap();
        let template = status.template.clone().unwrap();
        if template.observed_generation < generation {
            continue;
        }
        let (promoted, reconciling) = (condition(&status, "Promoted"), condition(&status, "Reconciling"));
        observed.push((promoted.clone(), reconciling.clone()));
        let serves = status.primary_revision.as_ref() == Some(&template.revision);
        assert!(promoted.0 != ConditionStatus::True || serves, "{observed:?}");
        if reconciling.0 == ConditionStatus::False {
            break status;
        }
    };
    assert!(observed.len() > 3, "the release was seen under way: {observed:?}");
    assert_eq!(condition(&status, "Promoted").0, ConditionStatus::True, "{observed:?}");
}

#[tokio::test]
async fn the_documented_recipe_tells_ci_how_a_release_ended() {
    let Some(world) = World::new("recipe").await else { return };
    world.running_application("web").await;
    world.canary("web", json!({})).await;
    world.until_settled("web").await;
    let docs = include_str!("../../../docs/canary.md");
    let section = docs.split("\n## ").find(|section| section.starts_with("Wait for it in CI")).unwrap();
    let recipe: String = section.lines().filter_map(|line| line.strip_prefix("    ")).collect::<Vec<_>>().join("\n");
    let recipe = |image: &str| {
        recipe
            .replace("kubectl apply -f cart.yaml", &format!("kubectl set image deployment/web app={image}"))
            .replace("cart", "web")
            .replace("1h", "60s")
    };
    assert!(recipe("app:2").contains("observedGeneration"), "{}", recipe("app:2"));
    let (well, printed) = server::shell(&world.namespace, &recipe("app:2")).await;
    assert!(well, "{printed}");
    assert!(printed.contains("condition met"), "{printed}");
    *world.judge.verdict.lock().unwrap() = Some(VerdictStatus::Fail);
    let (well, printed) = server::shell(&world.namespace, &recipe("app:3")).await;
    assert!(!well && printed.contains("1 of at most 1 failed checks"), "{printed}");
}

#[tokio::test]
async fn a_canary_is_scaled_by_its_scale_subresource() {
    let Some(world) = World::new("scale").await else { return };
    world.running_application("web").await;
    world.canary("web", json!({})).await;
    world.until_settled("web").await;
    let api = world.api::<Canary>();
    let scale = world
        .until("its Pods are counted", || async {
            let scale = api.get_scale("web").await.unwrap();
            (scale.status.as_ref().unwrap().replicas == 2).then_some(scale)
        })
        .await;
    assert_eq!(scale.spec.unwrap().replicas, Some(2));
    // What an autoscaler measures: the revisions' Pods.
    let selector = scale.status.unwrap().selector.unwrap();
    assert_eq!(selector, format!("{}=web,{}", labels::CANARY, labels::REVISION));
    assert_eq!(world.pods(&selector).await.len(), 2);

    kubectl(&world, "scale canary/web --replicas=4").await;
    world.until("four Pods serve", || async { (world.pods(&selector).await.len() == 4).then_some(()) }).await;
    world.until("and are counted", || async { (world.status("web").await.replicas == 4).then_some(()) }).await;
    let target = world.deployments().get("web").await.unwrap();
    assert_eq!(target.data["spec"]["replicas"], 0, "the target rests");
}
