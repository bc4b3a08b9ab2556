//! Deletion hands everything back.

use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Secret, Service};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams},
};
use serde_json::json;
use sluice_crds::{Canary, Phase, labels};

use crate::world::World;

pub(crate) async fn until_gone(world: &World) {
    world
        .until("the Canary is gone", || async {
            world.api::<Canary>().get_opt("web").await.unwrap().is_none().then_some(())
        })
        .await;
}

#[tokio::test]
async fn a_deleted_canary_hands_the_traffic_back_and_leaves_nothing() {
    let Some(world) = World::new("hand-back").await else { return };
    world.running_application("web").await;
    world.canary("web", json!({})).await;
    world.until_settled("web").await;
    world.api::<Canary>().delete("web", &DeleteParams::default()).await.unwrap();
    until_gone(&world).await;

    let target = world.deployments().get("web").await.unwrap();
    assert_eq!(target.data["spec"]["replicas"], 2);
    assert!(!target.annotations().contains_key(labels::REPLICAS));
    assert!(!target.labels().contains_key(labels::CANARY));
    let apex = world.api::<Service>().get("web").await.unwrap();
    assert!(!apex.labels().contains_key(labels::CANARY));
    assert_eq!(apex.spec.unwrap().selector.unwrap(), [("app".to_owned(), "web".to_owned())].into());
    assert!(world.records().await.is_empty());
    world
        .until("everything of ours is collected", || async {
            let services = world.api::<Service>().list(&ListParams::default()).await.unwrap().items.len();
            let deployments = world.deployments().list(&ListParams::default()).await.unwrap().items.len();
            let configs = world.api::<ConfigMap>().list(&ListParams::default()).await.unwrap();
            let pinned = configs.iter().filter(|config| config.name_any().starts_with("web-")).count();
            (services == 1 && deployments == 1 && pinned == 0).then_some(())
        })
        .await;
    assert!(world.told.gauges.lock().unwrap().is_empty(), "its metrics went with it");
}

#[tokio::test]
async fn services_that_lost_their_owner_on_the_way_go_too() {
    let Some(world) = World::new("orphans").await else { return };
    world.running_application("web").await;
    world.canary("web", json!({})).await;
    world.until_settled("web").await;
    // As with `--cascade=orphan`, where the garbage collector takes the owner off and then its own finalizer.
    world.api::<Canary>().delete("web", &DeleteParams::default()).await.unwrap();
    let services = world.api::<Service>();
    for name in ["web-primary", "web-canary", "web-pods"] {
        let orphan = Patch::Merge(json!({"metadata": {"ownerReferences": null}}));
        services.patch(name, &PatchParams::default(), &orphan).await.unwrap();
    }
    until_gone(&world).await;
    let left: Vec<_> = services.list(&ListParams::default()).await.unwrap().iter().map(ResourceExt::name_any).collect();
    assert_eq!(left, ["web"]);
}

#[tokio::test]
async fn a_revision_that_lost_its_owners_gets_them_back_and_copies_that_lost_theirs_go_too() {
    let Some(world) = World::new("disowned").await else { return };
    world.running_application("web").await;
    world.canary("web", json!({})).await;
    let name = format!("web-{}", world.until_settled("web").await.primary_revision.unwrap());
    let orphan = Patch::Merge(json!({"metadata": {"ownerReferences": null}}));
    world.api::<ConfigMap>().patch(&name, &PatchParams::default(), &orphan).await.unwrap();
    world.api::<Secret>().patch(&name, &PatchParams::default(), &orphan).await.unwrap();
    // What somebody has saved of a copy is theirs.
    let mut saved = world.api::<ConfigMap>().get(&name).await.unwrap();
    saved.metadata = ObjectMeta { name: Some("saved".into()), labels: saved.metadata.labels, ..ObjectMeta::default() };
    world.api::<ConfigMap>().create(&PostParams::default(), &saved).await.unwrap();
    let before = world.deployments().get(&name).await.unwrap();
    world.deployments().patch(&name, &PatchParams::default(), &orphan).await.unwrap();
    let owned = || async {
        let now = world.deployments().get(&name).await.unwrap();
        (now.owner_references() == before.owner_references()).then_some(now)
    };
    let now = world.until("its owners are back", owned).await;
    assert_eq!(now.data["spec"], before.data["spec"], "and nothing else was changed");
    world.api::<Canary>().delete("web", &DeleteParams::default()).await.unwrap();
    until_gone(&world).await;
    world
        .until("nothing of the revision is left", || async {
            let config = world.api::<ConfigMap>().get_opt(&name).await.unwrap().is_some();
            let secret = world.api::<Secret>().get_opt(&name).await.unwrap().is_some();
            let runs = world.deployments().get_opt(&name).await.unwrap().is_some();
            (!config && !secret && !runs).then_some(())
        })
        .await;
    assert!(world.api::<ConfigMap>().get_opt("saved").await.unwrap().is_some());
}

#[tokio::test]
async fn in_a_namespace_that_is_being_deleted_the_finalizer_lets_go() {
    let Some(world) = World::new("terminating").await else { return };
    world.running_application("web").await;
    world.canary("web", json!({})).await;
    world.until_settled("web").await;
    let namespaces: Api<Namespace> = Api::all(world.client.clone());
    namespaces.delete("terminating", &DeleteParams::default()).await.unwrap();
    // The namespace controller would delete what is in it.
    world.api::<Canary>().delete("web", &DeleteParams::default()).await.unwrap();
    until_gone(&world).await;
    assert_eq!(world.deployments().get("web").await.unwrap().data["spec"]["replicas"], 0, "no hand-back was tried");
}

#[tokio::test]
async fn uninstalling_hands_back_and_leaves_the_canary_to_a_later_installation() {
    let Some(world) = World::new("uninstalling").await else { return };
    world.running_application("web").await;
    world.canary("web", json!({})).await;
    let first = world.until_settled("web").await.primary_revision;
    let maps = world.api::<ConfigMap>();
    let said = json!({
        "metadata": {"name": labels::UNINSTALL, "annotations": {labels::UNTIL: "2099-01-01T00:00:00Z"}},
    });
    maps.create(&PostParams::default(), &serde_json::from_value(said).unwrap()).await.unwrap();
    world
        .until("the Canary is let go", || async {
            world.api::<Canary>().get("web").await.unwrap().finalizers().is_empty().then_some(())
        })
        .await;
    let status = world.status("web").await;
    assert_eq!((status.phase, status.primary_revision), (Phase::Terminated, None));
    assert_eq!(world.deployments().get("web").await.unwrap().data["spec"]["replicas"], 2);
    let apex = world.api::<Service>().get("web").await.unwrap();
    assert_eq!(apex.spec.unwrap().selector.unwrap(), [("app".to_owned(), "web".to_owned())].into());
    world
        .until("nothing of ours is left", || async {
            let services = world.api::<Service>().list(&ListParams::default()).await.unwrap().items.len();
            let deployments = world.deployments().list(&ListParams::default()).await.unwrap().items.len();
            (services == 1 && deployments == 1 && world.records().await.is_empty()).then_some(())
        })
        .await;

    maps.delete(labels::UNINSTALL, &DeleteParams::default()).await.unwrap();
    let again = world.until_status("web", "it is taken over again", |status| status.phase == Phase::Initialized).await;
    assert_eq!(again.primary_revision, first);
}
