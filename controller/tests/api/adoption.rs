//! A running application is taken over.

use k8s_openapi::api::{
    apps::v1::ControllerRevision,
    core::v1::{ConfigMap, Secret, Service},
};
use kube::{
    ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use serde_json::json;
use sluice_crds::{Canary, CanaryStatus, Phase, Stage, labels};
use std::sync::atomic::Ordering;

use crate::{
    hand_back::until_gone,
    world::{World, deployment},
};

#[tokio::test]
async fn a_running_application_is_taken_over_and_keeps_its_configuration() {
    let Some(world) = World::new("adoption").await else { return };
    world.running_application("web").await;
    let canary = world.canary("web", json!({})).await;
    let status = world.until_settled("web").await;
    assert_eq!(status.phase, Phase::Initialized);
    let revision = status.primary_revision.unwrap();

    // The user's Deployment rests, and says what its owner wished.
    let target = world.deployments().get("web").await.unwrap();
    assert_eq!(target.data["spec"]["replicas"], 0);
    assert_eq!(target.annotations()[labels::REPLICAS], "2");
    assert_eq!(target.labels()[labels::CANARY], "web", "so that the admission webhook is asked about it");
    let now = world.get("web").await;
    assert_eq!(now.spec.replicas, Some(2));
    assert_eq!(now.finalizers(), [labels::FINALIZER]);

    // The revision runs in its place, owned twice.
    let name = format!("web-{revision}");
    let serving = world.deployments().get(&name).await.unwrap();
    let record = world.api::<ControllerRevision>().get(&name).await.unwrap();
    let owners: Vec<_> = serving
        .owner_references()
        .iter()
        .map(|owner| (owner.kind.as_str(), owner.uid.clone(), owner.controller))
        .collect();
    assert_eq!(
        owners,
        [("Canary", canary.uid().unwrap(), Some(true)), ("ControllerRevision", record.uid().unwrap(), None)]
    );
    assert_eq!(serving.data["spec"]["replicas"], 2);
    assert_eq!(serving.data["spec"]["template"]["spec"]["initContainers"][0]["name"], "sluice-proxy");
    assert_eq!(record.owner_references(), &[]);
    assert!(!serde_json::to_string(&record).unwrap().contains("hunter2"), "no Secret data in a record");

    // With copies of its configuration that nobody can change.
    let env = &serving.data["spec"]["template"]["spec"]["containers"][0];
    assert_eq!(env["env"][0]["valueFrom"]["configMapKeyRef"]["name"], json!(name));
    assert_eq!(env["envFrom"][0]["secretRef"]["name"], json!(name));
    assert_eq!(env["envFrom"][1]["secretRef"]["name"], "maybe", "an optional one that is not there stays as it is");
    let config = world.api::<ConfigMap>().get(&name).await.unwrap();
    assert_eq!((config.immutable, config.data.clone().unwrap()["color"].as_str()), (Some(true), "blue"));
    let secret = world.api::<Secret>().get(&name).await.unwrap();
    assert_eq!(
        (secret.immutable, secret.data.clone().unwrap()["password"].0.as_slice()),
        (Some(true), b"hunter2".as_slice())
    );
    assert_eq!(config.owner_references().len(), 2);

    // The Service leads to the fleet, with its companions beside it.
    let apex = world.api::<Service>().get("web").await.unwrap();
    let selector = apex.spec.unwrap().selector.unwrap();
    assert_eq!(selector, [("app".to_owned(), "web".to_owned()), (labels::FLEET.to_owned(), "web".to_owned())].into());
    for name in ["web-primary", "web-canary", "web-pods"] {
        let companion = world.api::<Service>().get(name).await.unwrap();
        assert_eq!(companion.owner_references()[0].uid, canary.uid().unwrap());
        assert_eq!(companion.spec.unwrap().ports.unwrap()[0].name.as_deref(), Some("http"));
    }
    assert_eq!(world.judge.asked_dry.load(Ordering::SeqCst), 0, "nothing to judge, nothing asked");
    world.until_told("TakenOver").await;
}

#[tokio::test]
async fn a_settled_controller_sends_nothing() {
    let Some(world) = World::new("settled").await else { return };
    world.running_application("web").await;
    world.canary("web", json!({})).await;
    world.until_settled("web").await;
    // Whatever follows from the last write has been looked at once nothing is sent over many looks.
    let quiet = || async {
        let before = world.requests.count();
        for _ in 0..20 {
            let looks = world.judge.looks.load(Ordering::SeqCst);
            world.touch("web");
            world.until("a look", || async { (world.judge.looks.load(Ordering::SeqCst) > looks).then_some(()) }).await;
        }
        (world.requests.count() == before).then_some(())
    };
    world.until("twenty looks in a row send nothing", quiet).await;
    let version = world.get("web").await.resource_version();
    quiet().await.expect("once settled, it stays so");
    assert_eq!(world.get("web").await.resource_version(), version);
}

#[tokio::test]
async fn where_no_service_exists_the_canary_makes_one() {
    let Some(world) = World::new("no-service").await else { return };
    world.running_application("web").await;
    world.api::<Service>().delete("web", &DeleteParams::default()).await.unwrap();
    world
        .canary("web", json!({"spec": {"service": {"port": 8080, "targetPort": "http", "appProtocol": "http"}}}))
        .await;
    world.until_settled("web").await;
    let apex = world.api::<Service>().get("web").await.unwrap();
    assert_eq!(apex.owner_references()[0].kind, "Canary");
    assert_eq!(apex.spec.unwrap().ports.unwrap()[0].port, 8080);
}

#[tokio::test]
async fn a_service_that_its_owner_applies_later_does_not_go_with_the_canary() {
    let Some(world) = World::new("applied-later").await else { return };
    world.running_application("web").await;
    world.api::<Service>().delete("web", &DeleteParams::default()).await.unwrap();
    world.canary("web", json!({})).await;
    world.until_settled("web").await;
    let service = || async { world.api::<Service>().get("web").await.unwrap() };
    assert_eq!(service().await.owner_references().len(), 1);
    let theirs = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
    });
    let apply = PatchParams::apply("git").force();
    world.api::<Service>().patch("web", &apply, &Patch::Apply(theirs)).await.unwrap();
    world
        .until("it is nobody's but theirs, and the fleet's", || async {
            let service = service().await;
            let key = service.spec.clone().unwrap().selector.unwrap().contains_key(labels::FLEET);
            (service.owner_references().is_empty() && key).then_some(())
        })
        .await;
    let uid = service().await.uid();
    world.api::<Canary>().delete("web", &DeleteParams::default()).await.unwrap();
    until_gone(&world).await;
    let left = service().await;
    assert_eq!(
        (left.uid(), left.spec.unwrap().selector.unwrap()),
        (uid, [("app".to_owned(), "web".to_owned())].into())
    );
}

#[tokio::test]
async fn further_services_are_taken_over_and_handed_back_with_the_first() {
    let Some(world) = World::new("additional").await else { return };
    world.running_application("web").await;
    world.canary("web", json!({"spec": {"service": {"additional": [{"name": "web-internal"}]}}})).await;
    let message = world.until_stalled("web", "ServiceMissing").await;
    assert!(message.contains("web-internal"), "{message}");
    let selector = |name: &'static str| {
        let services = world.api::<Service>();
        async move { services.get(name).await.unwrap().spec.unwrap().selector.unwrap() }
    };
    assert!(!selector("web").await.contains_key(labels::FLEET), "both or none");

    let internal = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web-internal"},
        "spec": {"selector": {"app": "web"}, "ports": [{"name": "http", "port": 8080, "targetPort": "http"}]},
    });
    world.create::<Service>(internal.clone()).await;
    let status = world.until_settled("web").await;
    assert_eq!(status.additional_services, ["web-internal"]);
    for name in ["web", "web-internal"] {
        assert_eq!(selector(name).await[labels::FLEET], "web", "{name}");
    }
    let warns = |status: &CanaryStatus| {
        let mut conditions = status.conditions.iter();
        conditions.any(|condition| condition.kind == "Warning" && condition.reason == "ServiceMissing")
    };
    assert!(!warns(&status));

    // Made anew by Git, it is taken over anew.
    world.api::<Service>().delete("web-internal", &DeleteParams::default()).await.unwrap();
    world.until_status("web", "a warning", warns).await;
    world.create::<Service>(internal).await;
    world.until("the key", || async { selector("web-internal").await.contains_key(labels::FLEET).then_some(()) }).await;

    world.api::<Canary>().delete("web", &DeleteParams::default()).await.unwrap();
    world
        .until("the hand-back", || async {
            world.api::<Canary>().get_opt("web").await.unwrap().is_none().then_some(())
        })
        .await;
    for name in ["web", "web-internal"] {
        assert!(!selector(name).await.contains_key(labels::FLEET), "{name}");
    }
}

#[tokio::test]
async fn a_deployment_that_is_made_anew_without_replicas_scales_nothing_down() {
    let Some(world) = World::new("made-anew").await else { return };
    world.running_application("web").await;
    world.canary("web", json!({})).await;
    let revision = world.until_settled("web").await.primary_revision.unwrap();
    world.deployments().delete("web", &DeleteParams::background()).await.unwrap();
    let mut anew = deployment("web");
    anew["spec"].as_object_mut().unwrap().remove("replicas");
    let anew = serde_json::from_value(anew).unwrap();
    world.deployments().create(&PostParams::default(), &anew).await.unwrap();
    let rests = || async {
        let target = world.deployments().get("web").await.unwrap();
        (target.data["spec"]["replicas"] == 0).then(|| target.annotations()[labels::REPLICAS].clone())
    };
    assert_eq!(world.until("it rests again", rests).await, "2", "the wish of before");
    world.until_settled("web").await;
    assert_eq!(world.get("web").await.spec.replicas, Some(2));
    let serving = world.deployments().get(&format!("web-{revision}")).await.unwrap();
    assert_eq!(serving.data["spec"]["replicas"], 2);
}

#[tokio::test]
async fn a_deployment_at_0_gets_one_pod_unless_its_canary_wants_none() {
    let Some(world) = World::new("at-0").await else { return };
    for (name, canary, replicas) in [("silent", json!({}), 1), ("none", json!({"spec": {"replicas": 0}}), 0)] {
        world.running_application(name).await;
        world.patch_deployment(name, json!({"spec": {"replicas": 0}})).await;
        let pods = format!("app={name}");
        world.until("it has no Pods", || async { world.pods(&pods).await.is_empty().then_some(()) }).await;
        world.canary(name, canary).await;
        let revision = world.until_settled(name).await.primary_revision.unwrap();
        let serving = world.deployments().get(&format!("{name}-{revision}")).await.unwrap();
        assert_eq!(serving.data["spec"]["replicas"], replicas, "{name}");
    }
}

#[tokio::test]
async fn somebody_who_writes_all_the_time_delays_but_does_not_stop_a_takeover() {
    let Some(world) = World::new("conflict").await else { return };
    world.running_application("web").await;
    world.canary("web", json!({})).await;
    let noise = async {
        for count in 0.. {
            let patch = json!({"metadata": {"annotations": {"noise": count.to_string()}}});
            world.patch_deployment("web", patch.clone()).await;
            let (params, patch) = (PatchParams::default(), Patch::Merge(&patch));
            world.api::<Service>().patch("web", &params, &patch).await.unwrap();
            world.api::<Canary>().patch("web", &params, &patch).await.unwrap();
        }
    };
    tokio::select! {
        () = noise => unreachable!("it never ends"),
        _ = world.until_settled("web") => {}
    }
}

#[tokio::test]
async fn a_missing_config_map_holds_the_takeover_until_it_is_there() {
    let Some(world) = World::new("config-missing").await else { return };
    world.running_application("web").await;
    world.api::<ConfigMap>().delete("web", &DeleteParams::default()).await.unwrap();
    world.canary("web", json!({})).await;
    let message = world.until_stalled("web", "ConfigMissing").await;
    assert!(message.contains("ConfigMap web"), "{message}");
    assert_eq!(world.deployments().get("web").await.unwrap().data["spec"]["replicas"], 2, "nothing was touched");
    world.create::<ConfigMap>(json!({"metadata": {"name": "web"}, "data": {"color": "blue"}})).await;
    world.until_settled("web").await;
}

#[tokio::test]
async fn a_template_on_the_nodes_network_is_refused() {
    let Some(world) = World::new("host-network").await else { return };
    let mut wanted = deployment("web");
    wanted["spec"]["template"]["spec"]["hostNetwork"] = json!(true);
    wanted["spec"]["template"]["spec"]["containers"][0]["ports"][0]["hostPort"] = json!(8080);
    world.deployments().create(&PostParams::default(), &serde_json::from_value(wanted).unwrap()).await.unwrap();
    world.canary("web", json!({})).await;
    let message = world.until_stalled("web", "TemplateUnsupported").await;
    assert!(message.contains("hostNetwork"), "{message}");
    assert!(world.records().await.is_empty());
    assert_eq!(world.api::<Service>().list(&ListParams::default()).await.unwrap().items.len(), 0, "nothing was made");
}

#[tokio::test]
async fn without_the_lease_nothing_is_written() {
    let Some(world) = World::new("no-lease").await else { return };
    world.lease.0.store(false, Ordering::SeqCst);
    world.running_application("web").await;
    let canary = world.canary("web", json!({})).await;
    for _ in 0..5 {
        let asked = world.fleet.asked.load(Ordering::SeqCst);
        world.touch("web");
        world
            .until("it was looked at", || async { (world.fleet.asked.load(Ordering::SeqCst) > asked).then_some(()) })
            .await;
    }
    assert_eq!(world.get("web").await.resource_version(), canary.resource_version());
    // The renewal came late: the term goes on, and nobody says so.
    world.lease.0.store(true, Ordering::SeqCst);
    world.until_settled("web").await;
}

#[tokio::test]
async fn a_new_leader_goes_on_where_the_old_one_stopped() {
    let Some(mut world) = World::new("leader").await else { return };
    world.running_application("web").await;
    world.fleet.holds_back.store(true, Ordering::SeqCst);
    world.canary("web", json!({})).await;
    world.until_status("web", "it waits for the fleet", |status| status.traffic.is_some()).await;
    world.change_leader().await;
    world.fleet.holds_back.store(false, Ordering::SeqCst);
    world.touch("web");
    let status = world.until_settled("web").await;
    assert_eq!(status.stage, Stage::Settled);
    assert_eq!(world.records().await.len(), 1, "one revision, made once");
}

#[tokio::test]
async fn without_the_tracking_of_secrets_they_stay_by_reference_and_are_not_asked_for() {
    let Some(world) = World::without_secrets("no-secrets").await else { return };
    world.running_application("web").await;
    world.canary("web", json!({})).await;
    let revision = world.until_settled("web").await.primary_revision.unwrap();
    let name = format!("web-{revision}");
    let serving = world.deployments().get(&name).await.unwrap();
    let env = &serving.data["spec"]["template"]["spec"]["containers"][0];
    assert_eq!(env["env"][0]["valueFrom"]["configMapKeyRef"]["name"], json!(name));
    assert_eq!(env["envFrom"][0]["secretRef"]["name"], "web");
    assert!(world.api::<Secret>().get_opt(&name).await.unwrap().is_none());
    assert_eq!(world.requests.about("/secrets"), Vec::<String>::new());
}
