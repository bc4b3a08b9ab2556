//! What somebody deletes: the Canary in each of its phases and in each way, its Deployment, its Service, its namespace. As in
//! `releases.rs`, no request may fail, and nothing of ours is left.
//!
//! `cargo test` runs the core; the rest is ignored as "full" (README.md).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use std::time::{Duration, Instant};

use k8s_openapi::api::{apps::v1::Deployment, core::v1::Service};
use kube::{
    ResourceExt,
    api::{DeleteParams, PostParams},
};
use serde_json::json;
use sluice_crds::{CanaryStatus, Phase, Stage};
use sluice_e2e::{
    adopted::{
        Adopted, MINUTE, Use, adopted, at_weight_20, cluster, condition, ended, eventually, expect, gone,
        nothing_went_wrong, of_ours, quick, unique,
    },
    app::App,
    load::Load,
    watch::unix_ms,
};

#[tokio::test]
#[ignore = "full"]
async fn without_its_deployment_a_canary_serves_on_and_goes_on_when_it_is_back() {
    let Some(stage) = adopted("notarget", Use::Shared, &[], quick()).await else { return };
    let before = stage.api::<Deployment>().get("hello").await.unwrap();
    let at = unix_ms();
    stage.api::<Deployment>().delete("hello", &DeleteParams::default()).await.unwrap();
    stage.wait("TargetNotFound", at, |status| condition(status, "Stalled").1 == "TargetNotFound").await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    stage.nothing_failed().await;
    // As Git applies it: without anything of ours.
    let back = unix_ms();
    let mut again = Deployment { spec: before.spec, ..Deployment::default() };
    again.metadata.name = Some("hello".to_owned());
    again.spec.as_mut().unwrap().replicas = Some(2);
    stage.api::<Deployment>().create(&PostParams::default(), &again).await.unwrap();
    stage.wait("no longer Stalled", back, |status| condition(status, "Stalled").0 != "True").await;
    let applied = stage.app.release(&[("VERSION", "v2")]).await.unwrap();
    stage.app.ends(applied, Phase::Succeeded, 2 * MINUTE).await.unwrap();
    stage.end().await;
}

#[tokio::test]
#[ignore = "full"]
async fn a_service_that_is_deleted_and_made_again_is_taken_over_again() {
    let Some(mut stage) = adopted("noservice", Use::Shared, &[], quick()).await else { return };
    let before = stage.api::<Service>().get("hello").await.unwrap();
    let at = unix_ms();
    stage.api::<Service>().delete("hello", &DeleteParams::default()).await.unwrap();
    // Either its owner makes it again, or Sluice does, which needs it: whoever comes first.
    let manifest = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "hello", "labels": {"app": "hello"}},
        "spec": {"selector": {"app": "hello"}, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
    });
    stage.app.cluster.apply(&stage.app.namespace, &manifest.to_string()).await.unwrap();
    eventually("the takeover of the new Service", 2 * MINUTE, || async {
        let service = stage.api::<Service>().get_opt("hello").await.unwrap()?;
        let taken_over = service.spec.clone()?.selector?.contains_key("sluice.dev/fleet");
        (taken_over && service.uid() != before.uid()).then_some(())
    })
    .await;
    // Clients look the name up again: CoreDNS's and their own answers live for some seconds.
    stage.load.steady().await.unwrap();
    stage.counted_apart("its Service deleted and made again", at).await;
    let applied = stage.app.release(&[("VERSION", "v2")]).await.unwrap();
    stage.app.ends(applied, Phase::Succeeded, 2 * MINUTE).await.unwrap();
    stage.end().await;
}

/// Deletes the Canary when it has come so far. Afterwards the Deployment serves alone, and nothing of ours is left.
async fn deleted(name: &str, propagation: &DeleteParams, wanted: impl Fn(&CanaryStatus) -> bool, env: &[(&str, &str)]) {
    let Some(stage) = adopted(name, Use::Shared, &[], quick()).await else { return };
    if !env.is_empty() {
        let applied = stage.app.release(env).await.unwrap();
        stage.wait("the moment", applied, wanted).await;
    }
    stage.app.canaries().delete("hello", propagation).await.unwrap();
    handed_back(&stage).await;
    stage.end().await;
}

async fn nothing_is_left(app: &App) {
    eventually("the end of the Canary", 2 * MINUTE, || async {
        app.canaries().get_opt("hello").await.unwrap().is_none().then_some(())
    })
    .await;
    eventually("the end of all that is ours", 2 * MINUTE, || async {
        let left = of_ours(&app.cluster, &app.namespace).await;
        left.is_empty().then_some(()).or_else(|| {
            println!("left: {left:?}");
            None
        })
    })
    .await;
}

async fn handed_back(stage: &Adopted) {
    nothing_is_left(&stage.app).await;
    let target = stage.api::<Deployment>().get("hello").await.unwrap();
    assert_eq!(target.spec.unwrap().replicas, Some(2));
    let selector = stage.api::<Service>().get("hello").await.unwrap().spec.unwrap().selector.unwrap();
    assert!(!selector.contains_key("sluice.dev/fleet"), "{selector:?}");
}

#[tokio::test]
#[ignore = "full"]
async fn a_settled_canary_is_deleted_in_the_background() {
    deleted("back-settled", &DeleteParams::background(), |_| true, &[]).await;
}

#[tokio::test]
#[ignore = "full"]
async fn a_settled_canary_is_deleted_in_the_foreground() {
    deleted("fore-settled", &DeleteParams::foreground(), |_| true, &[]).await;
}

#[tokio::test]
#[ignore = "full"]
async fn a_settled_canary_is_deleted_and_its_dependents_orphaned() {
    deleted("orphan-settled", &DeleteParams::orphan(), |_| true, &[]).await;
}

#[tokio::test]
#[ignore = "full"]
async fn a_canary_is_deleted_in_the_foreground_in_mid_release() {
    deleted("fore-judge", &DeleteParams::foreground(), at_weight_20, &[("VERSION", "v2")]).await;
}

#[tokio::test]
#[ignore = "full"]
async fn a_canary_is_deleted_and_its_dependents_orphaned_in_mid_release() {
    deleted("orphan-judge", &DeleteParams::orphan(), at_weight_20, &[("VERSION", "v2")]).await;
}

#[tokio::test]
#[ignore = "full"]
async fn a_canary_is_deleted_in_the_foreground_while_it_is_promoted() {
    let promoting =
        |status: &CanaryStatus| matches!(status.stage, Stage::PromoteScale | Stage::PromoteShift | Stage::Finalise);
    deleted("fore-promote", &DeleteParams::foreground(), promoting, &[("VERSION", "v2")]).await;
}

#[tokio::test]
#[ignore = "full"]
async fn a_canary_is_deleted_while_it_starts_its_canary() {
    let scaling = |status: &CanaryStatus| status.stage == Stage::Scale;
    deleted("back-scale", &DeleteParams::background(), scaling, &[("VERSION", "v2")]).await;
}

#[tokio::test]
#[ignore = "full"]
async fn a_canary_that_is_deleted_and_applied_all_the_time_takes_over_again() {
    let Some(stage) = adopted("reapplied", Use::Shared, &[], quick()).await else { return };
    let before = stage.app.canaries().get("hello").await.unwrap().uid();
    stage.app.canaries().delete("hello", &DeleteParams::background()).await.unwrap();
    // As Git tools do. One that is ending takes it, and ends nevertheless.
    eventually("another Canary", 2 * MINUTE, || async {
        stage.app.canary(quick()).await.unwrap();
        let canary = stage.app.canaries().get_opt("hello").await.unwrap()?;
        (canary.uid() != before).then_some(())
    })
    .await;
    let again = unix_ms();
    stage.wait("phase Initialized", again, |status| status.phase == Phase::Initialized).await;
    let applied = stage.app.release(&[("VERSION", "v2")]).await.unwrap();
    stage.app.ends(applied, Phase::Succeeded, 2 * MINUTE).await.unwrap();
    stage.end().await;
}

#[tokio::test]
#[ignore = "full"]
async fn a_canary_is_deleted_while_it_takes_over() {
    let Some((cluster, _held)) = cluster(Use::Shared).await else { return };
    for (propagation, stage_wanted) in [
        (DeleteParams::background(), Stage::AdoptSettle),
        (DeleteParams::foreground(), Stage::AdoptRevision),
        (DeleteParams::orphan(), Stage::AdoptRevision),
    ] {
        let app = App::deploy(&cluster, &unique("adopting"), 2).await.unwrap();
        let arguments = ["--target", "hello:80", "--rate", "60"];
        let load = Load::start(&cluster, &app.namespace, "load", &arguments).await.unwrap();
        let from_ms = load.steady().await.unwrap();
        app.canary(quick()).await.unwrap();
        app.history.wait("the moment", 0, 2 * MINUTE, |status| status.stage == stage_wanted).await.unwrap();
        app.canaries().delete("hello", &propagation).await.unwrap();
        nothing_is_left(&app).await;
        load.catch_up().await.unwrap();
        let failed = load.failures_since(from_ms);
        assert!(failed.is_empty(), "{stage_wanted:?}: {failed:#?}");
        ended(app).await;
    }
}

#[tokio::test]
async fn a_namespace_that_is_deleted_in_mid_release_ends() {
    let Some(stage) = adopted("nonamespace", Use::Shared, &[], quick()).await else { return };
    stage.in_mid_release().await;
    let Adopted { app, load, .. } = stage;
    drop(load);
    let (cluster, namespace) = (app.cluster.clone(), app.namespace.clone());
    let _expected = expect(&[&namespace, "because it is being terminated"]);
    let at = Instant::now();
    app.delete().await.unwrap();
    gone(&cluster, &namespace).await;
    println!("the namespace was gone after {} ms", at.elapsed().as_millis());
    nothing_went_wrong(&cluster).await;
}
