//! A Canary as large as the schema lets one be.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::api::core::v1::Service;
use kube::api::{Patch, PatchParams};
use serde_json::{Map, Value, json};
use sluice_controller::{
    cache::CanaryKey,
    mesh::{Inputs, Limits, Settings, build, wanted_ports},
};
use sluice_crds::{Canary, Phase, labels};
use sluice_xds::TypeUrl;

use crate::{release::image, world::World};

/// So many names of so many characters, each with this.
fn map(number: usize, length: usize, value: &Value) -> Value {
    Value::Object(
        (0..number)
            .map(|index| (format!("x-{index:0>width$}", width = length - 2), value.clone()))
            .collect::<Map<_, _>>(),
    )
}

/// So many texts of so many characters.
fn list(number: usize, length: usize) -> Value {
    (0..number)
        .map(|index| format!("{}{}", "x".repeat(length - 1), char::from(b'a' + u8::try_from(index % 26).unwrap())))
        .collect()
}

/// What `spec` may say at most of what is done with requests, in 16 entries and 8.
fn largest() -> Value {
    let text = json!({"exact": "v".repeat(1024)});
    let entry = json!({
        "method": text, "authority": text, "headers": map(8, 128, &text), "withoutHeaders": map(8, 128, &text),
        "queryParams": map(8, 256, &text),
    });
    let value = json!("v".repeat(1024));
    let headers = json!({"set": map(16, 128, &value), "add": map(16, 128, &value), "remove": list(16, 128)});
    json!({"spec": {
        "service": {
            "match": vec![entry.clone(); 16],
            "headers": {"request": headers, "response": headers},
            "corsPolicy": {
                "allowOrigins": vec![text.clone(); 16], "allowOrigin": list(16, 255), "allowMethods": list(16, 32),
                "allowHeaders": list(32, 128), "exposeHeaders": list(32, 128), "maxAge": "24h",
            },
            "fault": {"headers": map(8, 128, &text), "abort": {"percentage": {"value": 1}, "httpStatus": 503}},
        },
        "analysis": {"match": vec![entry; 8]},
    }})
}

#[tokio::test]
async fn a_canary_as_large_as_it_may_be_takes_nothing_over_until_it_is_smaller() {
    let Some(world) = World::new("large").await else { return };
    world.running_application("web").await;
    world.canary("web", largest()).await;
    let message = world.until_stalled("web", "RoutesUnsupported").await;
    assert!(message.starts_with("Canary large/web: spec.service: its routes take "), "{message}");
    let selector = || async { world.api::<Service>().get("web").await.unwrap().spec.unwrap().selector.unwrap() };
    assert!(!selector().await.contains_key(labels::FLEET));

    // Whatever its status says, the fleet hears nothing of it.
    let mut canary = world.get("web").await;
    let traffic = json!({"primary": "aaa", "canary": "bbb", "weight": 10, "match": canary.spec.analysis.as_ref().unwrap().matches});
    canary.status.as_mut().unwrap().traffic = serde_json::from_value(traffic).unwrap();
    let snapshot = build(&inputs(canary, world.api::<Service>().get("web").await.unwrap()));
    assert_eq!(snapshot.unsendable, [CanaryKey::new("large", "web")].into());
    assert_eq!(snapshot.fleet.of(TypeUrl::Route).count(), 0);

    let smaller = json!({"spec": {
        "service": {"match": null, "headers": null, "corsPolicy": null, "fault": null}, "analysis": {"match": null},
    }});
    world.api::<Canary>().patch("web", &PatchParams::default(), &Patch::Merge(&smaller)).await.unwrap();
    assert_eq!(world.until_settled("web").await.phase, Phase::Initialized);
    assert!(selector().await.contains_key(labels::FLEET));
}

/// The API server takes objects of 1.5 MiB; a controller keeps no template of more than one.
#[tokio::test]
async fn a_version_that_is_too_large_is_no_release_until_it_is_smaller() {
    let Some(world) = World::new("large-version").await else { return };
    world.running_application("web").await;
    world.canary("web", json!({"spec": {"skipAnalysis": true}})).await;
    let serving = world.until_settled("web").await.primary_revision;
    let version = |padding: usize| {
        let mut patch = image("app:2");
        patch["spec"]["template"]["spec"]["containers"][0]["args"] = json!(["x".repeat(padding)]);
        patch
    };
    world.patch_deployment("web", version(1200 << 10)).await;
    let message = world.until_stalled("web", "TemplateUnsupported").await;
    assert!(message.starts_with("the pod template of Deployment web is too large"), "{message}");
    let status = world.status("web").await;
    assert_eq!((status.primary_revision, status.canary_revision), (serving.clone(), None));

    world.patch_deployment("web", version(10)).await;
    let settled = world.until_status("web", "the smaller version serves", |status| {
        status.phase == Phase::Succeeded && status.primary_revision != serving
    });
    settled.await;
}

/// One Canary and its apex, with a port of the fleet.
fn inputs(canary: Canary, apex: Service) -> Inputs {
    let mut inputs = Inputs::empty(Arc::new(Settings {
        fleet_id: "spiffe://cluster.local/ns/sluice-system/sa/sluice-fleet".parse().unwrap(),
        fleet: "default".to_owned(),
        release_namespace: "sluice-system".to_owned(),
        watched_namespace: None,
        limits: Limits::default(),
    }));
    inputs.canaries = vec![Arc::new(canary)];
    inputs.services = vec![Arc::new(apex)];
    inputs.ports = wanted_ports(&inputs).into_keys().zip(20_000..).collect::<BTreeMap<_, _>>();
    assert_eq!(inputs.ports.len(), 1);
    inputs
}
