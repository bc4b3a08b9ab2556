//! What is somebody else's is left alone, and said by name.

use k8s_openapi::api::{
    apps::v1::ControllerRevision,
    core::v1::{ConfigMap, Service},
};
use kube::{
    ResourceExt,
    api::{DeleteParams, PostParams},
};
use serde_json::json;
use sluice_controller::delivery::template;
use sluice_crds::{Canary, Stage};

use crate::world::{World, deployment};

/// The name that the first revision's objects will have.
async fn name_of_first_revision(world: &World) -> String {
    // Found by letting it be made once, in a status that nothing was done for yet.
    let status = world.until_status("web", "the template was seen", |status| status.template.is_some()).await;
    format!("web-{}", status.template.unwrap().revision)
}

#[tokio::test]
async fn of_two_canaries_on_one_target_the_younger_waits_until_the_older_is_gone() {
    let Some(world) = World::new("two-canaries").await else { return };
    world.running_application("web").await;
    world.canary("web", json!({})).await;
    world.until_settled("web").await;
    world.canary("young", json!({"spec": {"targetRef": {"name": "web"}, "service": {"name": "other"}}})).await;
    let message = world.until_stalled("young", "TargetConflict").await;
    assert!(message.contains("Deployment web belongs to Canary web, which was first"), "{message}");
    assert!(world.get("young").await.finalizers().is_empty(), "it holds nothing, so it can go at any time");
    assert!(world.api::<Service>().get_opt("other").await.unwrap().is_none());

    world.canary("rival", json!({"spec": {"targetRef": {"name": "api"}, "service": {"name": "web"}}})).await;
    let message = world.until_stalled("rival", "TargetConflict").await;
    assert!(message.contains("Service web"), "{message}");

    world.api::<Canary>().delete("rival", &DeleteParams::default()).await.unwrap();
    world.api::<Canary>().delete("web", &DeleteParams::default()).await.unwrap();
    world.until_settled("young").await;
}

#[tokio::test]
async fn names_that_exist_and_are_not_ours_are_left_alone() {
    let Some(world) = World::new("names").await else { return };
    world.running_application("web").await;
    world.create::<Service>(json!({"metadata": {"name": "web-primary"}, "spec": {"ports": [{"port": 1}]}})).await;
    world.canary("web", json!({})).await;
    let message = world.until_stalled("web", "NameTaken").await;
    assert!(message.contains("Service web-primary exists"), "{message}");
    let name = name_of_first_revision(&world).await;

    // The next names, one by one, before the first is freed.
    let mut foreign = deployment(&name);
    foreign["metadata"]["name"] = json!(name);
    world.deployments().create(&PostParams::default(), &serde_json::from_value(foreign).unwrap()).await.unwrap();
    world.create::<ConfigMap>(json!({"metadata": {"name": name}, "data": {"not": "ours"}})).await;

    world.api::<Service>().delete("web-primary", &DeleteParams::default()).await.unwrap();
    let says = |words: &'static str| {
        let world = &world;
        world.until(words, move || async move {
            let status = world.status("web").await;
            let stalled = status.conditions.into_iter().find(|condition| condition.kind == "Stalled")?;
            (stalled.reason == "NameTaken" && stalled.message.contains(words)).then_some(())
        })
    };
    says("Deployment web-").await;
    world.deployments().delete(&name, &DeleteParams::default()).await.unwrap();
    says("ConfigMap web-").await;
    assert_eq!(world.api::<ConfigMap>().get(&name).await.unwrap().data.unwrap()["not"], "ours");
    world.api::<ConfigMap>().delete(&name, &DeleteParams::default()).await.unwrap();
    world.until_settled("web").await;
}

#[tokio::test]
async fn a_record_of_somebody_elses_is_found_when_it_is_in_the_way() {
    let Some(world) = World::new("record").await else { return };
    world.running_application("web").await;
    let target = world.deployments().get("web").await.unwrap();
    let tracked = [
        ("configmap/web", json!({"data": {"color": "blue"}, "binaryData": null})),
        ("secret/web", json!({"type": "Opaque", "data": {"password": "aHVudGVyMg=="}})),
    ];
    let tracked =
        tracked.map(|(key, content)| (key.to_owned(), template::digest(&template::canonical(&content)))).into();
    let name = format!("web-{}", template::revision_hash(&target.data["spec"]["template"], &tracked));
    world.create::<ControllerRevision>(json!({"metadata": {"name": name}, "revision": 1, "data": {"spec": {}}})).await;
    world.canary("web", json!({})).await;
    let message = world.until_stalled("web", "NameTaken").await;
    assert!(message.contains(&format!("ControllerRevision {name}")), "{message}");
    let status = world.status("web").await;
    assert_eq!(status.stage, Stage::AdoptRevision);
    assert_eq!(world.records().await[0].data.as_ref().unwrap().0, json!({"spec": {}}), "it is as it was");
}

#[tokio::test]
async fn a_service_that_cannot_be_taken_over_is_refused_before_anything_changes() {
    let Some(world) = World::new("affinity").await else { return };
    world.running_application("web").await;
    let patch = json!({"spec": {"sessionAffinity": "ClientIP"}});
    let params = kube::api::PatchParams::default();
    world.api::<Service>().patch("web", &params, &kube::api::Patch::Merge(&patch)).await.unwrap();
    world.canary("web", json!({})).await;
    let message = world.until_stalled("web", "ServiceUnsupported").await;
    assert!(message.contains("sessionAffinity"), "{message}");
    assert!(world.get("web").await.finalizers().is_empty());
    assert!(world.records().await.is_empty());
}
