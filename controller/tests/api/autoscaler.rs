//! `spec.autoscalerRef`: the copy of the user's HorizontalPodAutoscaler, and the scale subresource that it scales.

use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use kube::{
    ResourceExt,
    api::{DeleteParams, Patch, PatchParams},
};
use serde_json::{Value, json};
use sluice_crds::{Canary, Stage, labels};

use crate::world::World;

const MANAGER: PatchParams = PatchParams { dry_run: false, force: false, field_manager: None, field_validation: None };

fn autoscaler(most: i32) -> Value {
    json!({
        "metadata": {"name": "web", "labels": {"app": "web", "argocd.argoproj.io/instance": "shop"}},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web"},
            "minReplicas": 2, "maxReplicas": most,
            "metrics": [{"type": "ContainerResource", "containerResource": {
                "name": "cpu", "container": "app", "target": {"type": "Utilization", "averageUtilization": 60},
            }}],
        },
    })
}

fn reference() -> Value {
    json!({"spec": {"autoscalerRef": {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "name": "web"}}})
}

async fn until_copy(
    world: &World,
    what: &str,
    is: impl Fn(&HorizontalPodAutoscaler) -> bool,
) -> HorizontalPodAutoscaler {
    let is = &is;
    world
        .until(what, || async move {
            world.api::<HorizontalPodAutoscaler>().get_opt("web-primary").await.unwrap().filter(is)
        })
        .await
}

async fn until_warned(world: &World, reason: &str) -> String {
    world
        .until(&format!("a warning {reason}"), || async move {
            let status = world.status("web").await;
            let warning = status.conditions.into_iter().find(|condition| condition.kind == "Warning")?;
            (warning.reason == reason).then_some(warning.message)
        })
        .await
}

#[tokio::test]
async fn the_copy_of_an_autoscaler_scales_the_canary_follows_and_goes_with_it() {
    let Some(world) = World::new("autoscaler").await else { return };
    world.running_application("web").await;
    let own: HorizontalPodAutoscaler = world.create(autoscaler(5)).await;
    let canary = world.canary("web", reference()).await;
    world.until_settled("web").await;

    let copy = until_copy(&world, "the copy is made", |_| true).await;
    let spec = copy.spec.clone().unwrap();
    let target = &spec.scale_target_ref;
    assert_eq!(
        (target.api_version.as_deref(), target.kind.as_str(), target.name.as_str()),
        (Some("sluice.dev/v1beta1"), "Canary", "web")
    );
    assert_eq!((spec.min_replicas, spec.max_replicas), (Some(2), 5));
    assert_eq!(spec.metrics, own.spec.clone().unwrap().metrics);
    assert_eq!(copy.owner_references()[0].uid, canary.uid().unwrap());
    assert!(!copy.labels().contains_key("argocd.argoproj.io/instance"));

    // What an autoscaler reads and writes: `scale`, with the revisions' Pods.
    let scale = world.api::<Canary>().get_scale("web").await.unwrap();
    let selector = scale.status.clone().unwrap().selector.unwrap();
    assert_eq!(selector, format!("{}=web,{}", labels::CANARY, labels::REVISION));
    assert_eq!((scale.spec.unwrap().replicas, scale.status.unwrap().replicas), (Some(2), 2));
    assert_eq!(world.pods(&selector).await.len(), 2);
    let more = Patch::Merge(json!({"spec": {"replicas": 4}}));
    world.api::<Canary>().patch_scale("web", &MANAGER, &more).await.unwrap();
    world
        .until("the revision has four Pods", || async { (world.pods(&selector).await.len() == 4).then_some(()) })
        .await;

    // Every change is followed, at any time, and what goes from the original goes from the copy.
    let api = world.api::<HorizontalPodAutoscaler>();
    let less = json!({"spec": {"maxReplicas": 9, "minReplicas": null, "metrics": null}});
    api.patch("web", &MANAGER, &Patch::Merge(less)).await.unwrap();
    let followed = until_copy(&world, "the copy follows", |copy| copy.spec.as_ref().unwrap().max_replicas == 9).await;
    let now = api.get("web").await.unwrap().spec.unwrap();
    let spec = followed.spec.unwrap();
    assert_eq!((spec.min_replicas, spec.metrics), (now.min_replicas, now.metrics));
    // So is what somebody writes into the copy.
    api.patch("web-primary", &MANAGER, &Patch::Merge(json!({"spec": {"maxReplicas": 50}}))).await.unwrap();
    until_copy(&world, "the copy is mended", |copy| copy.spec.as_ref().unwrap().max_replicas == 9).await;

    // Bounds of its own.
    let bounds = json!({"spec": {"autoscalerRef": {"primaryScalerReplicas": {"minReplicas": 3}}}});
    world.api::<Canary>().patch("web", &MANAGER, &Patch::Merge(bounds)).await.unwrap();
    until_copy(&world, "the copy has its own minimum", |copy| copy.spec.as_ref().unwrap().min_replicas == Some(3))
        .await;

    // Without its original it goes on: nobody meant to stop scaling by a mistake in Git.
    api.delete("web", &DeleteParams::default()).await.unwrap();
    let message = until_warned(&world, "AutoscalerNotFound").await;
    assert!(message.contains("HorizontalPodAutoscaler web") && message.contains("stays as it was"), "{message}");
    world.until_told("Warning").await;
    assert_eq!(world.status("web").await.stage, Stage::Settled);
    until_copy(&world, "the copy stays", |_| true).await;

    // It ends when the Canary says so, and when the Canary goes.
    let gone = || async { api.get_opt("web-primary").await.unwrap().is_none().then_some(()) };
    let none = json!({"spec": {"autoscalerRef": null}});
    world.api::<Canary>().patch("web", &MANAGER, &Patch::Merge(none)).await.unwrap();
    world.until("the copy goes", gone).await;
    world.create::<HorizontalPodAutoscaler>(autoscaler(5)).await;
    world.api::<Canary>().patch("web", &MANAGER, &Patch::Merge(reference())).await.unwrap();
    until_copy(&world, "the copy is there again", |_| true).await;
    world.api::<Canary>().delete("web", &DeleteParams::default()).await.unwrap();
    world.until("the copy goes with the Canary", gone).await;
    assert_eq!(
        api.get("web").await.unwrap().spec.unwrap().scale_target_ref.kind,
        "Deployment",
        "the user's own is as it was"
    );
}

#[tokio::test]
async fn an_autoscaler_that_is_not_there_holds_up_nothing_and_a_name_that_is_taken_is_said() {
    let Some(world) = World::new("autoscaler-missing").await else { return };
    world.running_application("web").await;
    world.canary("web", reference()).await;
    world.until_settled("web").await;
    let message = until_warned(&world, "AutoscalerNotFound").await;
    assert!(message.contains("nothing scales this Canary"), "{message}");

    // One that scales the Canary itself needs no copy: two would stop each other.
    let mut direct = autoscaler(5);
    direct["spec"]["scaleTargetRef"] = json!({"apiVersion": "sluice.dev/v1beta1", "kind": "Canary", "name": "web"});
    world.create::<HorizontalPodAutoscaler>(direct).await;
    let api = world.api::<HorizontalPodAutoscaler>();
    world
        .until("nothing to warn of", || async {
            let conditions = world.status("web").await.conditions;
            conditions.iter().all(|condition| condition.kind != "Warning").then_some(())
        })
        .await;
    assert!(api.get_opt("web-primary").await.unwrap().is_none());

    // Somebody else's object has the copy's name.
    let mut foreign = autoscaler(7);
    foreign["metadata"]["name"] = json!("web-primary");
    world.create::<HorizontalPodAutoscaler>(foreign).await;
    let message = world.until_stalled("web", "NameTaken").await;
    assert!(message.contains("HorizontalPodAutoscaler web-primary exists"), "{message}");
    assert_eq!(api.get("web-primary").await.unwrap().spec.unwrap().max_replicas, 7);
    api.delete("web-primary", &DeleteParams::default()).await.unwrap();
    world
        .until("it goes on", || async {
            let conditions = world.status("web").await.conditions;
            conditions
                .iter()
                .any(|condition| condition.kind == "Ready" && condition.reason == "Initialized")
                .then_some(())
        })
        .await;
}

#[tokio::test]
async fn that_kube_controller_manager_counts_another_one_on_the_same_pods_is_said_with_the_way_out() {
    let Some(world) = World::new("autoscaler-ambiguous").await else { return };
    world.running_application("web").await;
    world.create::<HorizontalPodAutoscaler>(autoscaler(5)).await;
    world.canary("web", reference()).await;
    world.until_settled("web").await;
    until_copy(&world, "the copy is made", |_| true).await;
    let status = json!({"status": {"currentReplicas": 2, "desiredReplicas": 2, "conditions": [{
        "type": "ScalingActive", "status": "False", "reason": "AmbiguousSelector",
        "message": "pods by selector x are controlled by multiple HPAs: [test/web test/web-primary]",
    }]}});
    let api = world.api::<HorizontalPodAutoscaler>();
    api.patch_status("web-primary", &MANAGER, &Patch::Merge(status)).await.unwrap();
    let message = until_warned(&world, "AutoscalerAmbiguous").await;
    assert!(message.contains("multiple HPAs") && message.contains("kubectl replace --force"), "{message}");
}
