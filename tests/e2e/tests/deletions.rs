//! What somebody deletes: the Canary at nine moments of its life and in each way, its Deployment and its Service, at rest and in
//! mid-release, its namespace. As in `releases.rs`, no request may fail, and nothing of ours is left.
//!
//! `cargo test` runs the core; the rest is ignored as "full" (README.md).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use std::time::{Duration, Instant};

use futures::future::join_all;
use k8s_openapi::api::{apps::v1::Deployment, core::v1::Service};
use kube::{
    ResourceExt,
    api::{DeleteParams, PostParams},
};
use serde_json::{Value, json};
use sluice_crds::{CanaryStatus, Phase, Stage};
use sluice_e2e::{
    adopted::{
        Adopted, MINUTE, Use, adopted, at_weight_20, cluster, condition, eventually, expect, gone, nothing_went_wrong,
        quick, slow, under_load,
    },
    load::{EVERY_PROTOCOL, TIMEOUT},
    watch::unix_ms,
};
use tokio::sync::Semaphore;

#[tokio::test]
#[ignore = "full"]
async fn without_its_deployment_a_canary_serves_on_and_goes_on_when_it_is_back() {
    let Some(stage) = adopted("notarget", Use::Shared, &[], quick()).await else { return };
    deployment_made_again(&stage, Duration::from_secs(5)).await;
    let applied = stage.app.release(&[("VERSION", "v2")]).await.unwrap();
    stage.app.ends(applied, Phase::Succeeded, 2 * MINUTE).await.unwrap();
    stage.end().await;
}

#[tokio::test]
#[ignore = "full"]
async fn a_service_that_is_deleted_and_made_again_is_taken_over_again() {
    let Some(mut stage) = adopted("noservice", Use::Shared, &[], quick()).await else { return };
    service_made_again(&mut stage).await;
    let applied = stage.app.release(&[("VERSION", "v2")]).await.unwrap();
    stage.app.ends(applied, Phase::Succeeded, 2 * MINUTE).await.unwrap();
    stage.end().await;
}

#[tokio::test]
#[ignore = "full"]
async fn a_release_goes_on_when_its_deployment_and_its_service_were_deleted_and_made_again() {
    let Some(mut stage) = adopted("madeagain", Use::Shared, EVERY_PROTOCOL, slow(8)).await else { return };
    let canary = stage.in_mid_release().await.canary_revision;
    // Longer than the step.
    let held = deployment_made_again(&stage, Duration::from_secs(10)).await;
    assert_eq!((held.requested_weight, &held.canary_revision), (20, &canary), "it went on without its Deployment");
    service_made_again(&mut stage).await;
    let done = stage.wait("phase Succeeded", 0, |status| status.phase == Phase::Succeeded).await;
    assert_eq!((done.primary_revision, done.failed_checks), (canary, 0));
    stage.end().await;
}

/// Deletes the Deployment and creates it again after so long, as Git does. The status from before it was back.
async fn deployment_made_again(stage: &Adopted, away: Duration) -> CanaryStatus {
    let before = stage.api::<Deployment>().get("hello").await.unwrap();
    let at = unix_ms();
    stage.api::<Deployment>().delete("hello", &DeleteParams::default()).await.unwrap();
    stage.wait("TargetNotFound", at, |status| condition(status, "Stalled").1 == "TargetNotFound").await;
    tokio::time::sleep(away).await;
    stage.nothing_failed().await;
    let without = stage.app.history.last().unwrap().status;
    // Without anything of ours.
    let back = unix_ms();
    let mut again = Deployment { spec: before.spec, ..Deployment::default() };
    again.metadata.name = Some("hello".to_owned());
    again.spec.as_mut().unwrap().replicas = Some(2);
    stage.api::<Deployment>().create(&PostParams::default(), &again).await.unwrap();
    stage.wait("no longer Stalled", back, |status| condition(status, "Stalled").0 != "True").await;
    without
}

/// Deletes the Service and applies it again, and waits until it is taken over and found by clients.
async fn service_made_again(stage: &mut Adopted) {
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
    let back = unix_ms();
    // Clients look the name up again, and kube-proxy takes a second or two. CoreDNS keeps names for 30 s, but on clusters of ours.
    let found = Duration::from_secs(if std::env::var_os("SLUICE_CLUSTER").is_some() { 10 } else { 40 });
    stage.load.steady().await.unwrap();
    let apart = stage.counted_apart("its Service deleted and made again", at).await;
    let after = (at + apart.window_ms).saturating_sub(back);
    println!("the last of them {after} ms after the new Service was taken over");
    // A connection that was opened before, to an address that nobody had, still waits for its answer.
    assert!(u128::from(after) <= (found + TIMEOUT).as_millis(), "{apart:?}");
}

/// A moment of a Canary's life.
#[derive(Clone, Copy)]
struct Moment {
    /// Names the namespaces.
    name: &'static str,
    spec: fn() -> Value,
    /// What is released once the application is taken over; the moment comes without a release where there is none.
    release: &'static [(&'static str, &'static str)],
    come: fn(&CanaryStatus) -> bool,
}

const V2: &[(&str, &str)] = &[("VERSION", "v2")];

/// Deletes Canaries at this moment in the background, in the foreground, and with their dependents orphaned, beside each other.
/// Afterwards their Deployments serve alone, no request has failed, and nothing of ours is left.
async fn deleted_in_every_way(moment: Moment) {
    let ways = [
        ("back", DeleteParams::background()),
        ("fore", DeleteParams::foreground()),
        ("orphan", DeleteParams::orphan()),
    ];
    join_all(ways.map(|(way, propagation)| Box::pin(deleted(moment, way, propagation)))).await;
}

async fn deleted(moment: Moment, way: &str, propagation: DeleteParams) {
    // Of all that this file deletes so. More of them at once would take the cores from those that are judged.
    static ROOM: Semaphore = Semaphore::const_new(3);
    let _room = ROOM.acquire().await.unwrap();
    let Some((cluster, held)) = cluster(Use::Shared).await else { return };
    let mut stage = under_load(cluster, held, &format!("{way}-{}", moment.name), &[]).await;
    stage.app.canary((moment.spec)()).await.unwrap();
    let mut from = 0;
    if !moment.release.is_empty() {
        stage.taken_over().await;
        from = stage.app.release(moment.release).await.unwrap();
    }
    let come = stage.wait(moment.name, from, moment.come).await;
    if from == 0 && come.phase == Phase::Initialized {
        stage.taken_over().await;
    }
    stage.app.canaries().delete("hello", &propagation).await.unwrap();
    stage.handed_back().await;
    stage.end().await;
}

#[tokio::test]
#[ignore = "full"]
async fn a_canary_is_deleted_in_every_way_while_its_takeover_waits_for_kube_proxy() {
    let come = |status: &CanaryStatus| status.stage == Stage::AdoptSettle;
    deleted_in_every_way(Moment { name: "adopt-settle", spec: quick, release: &[], come }).await;
}

#[tokio::test]
#[ignore = "full"]
async fn a_canary_is_deleted_in_every_way_while_its_first_revision_starts() {
    let come = |status: &CanaryStatus| status.stage == Stage::AdoptRevision;
    deleted_in_every_way(Moment { name: "adopt-revision", spec: quick, release: &[], come }).await;
}

#[tokio::test]
#[ignore = "full"]
async fn a_canary_that_is_settled_is_deleted_in_every_way() {
    let come = |status: &CanaryStatus| status.phase == Phase::Initialized;
    deleted_in_every_way(Moment { name: "settled", spec: quick, release: &[], come }).await;
}

#[tokio::test]
#[ignore = "full"]
async fn a_canary_is_deleted_in_every_way_while_it_is_suspended() {
    let spec = || {
        let mut spec = quick();
        spec["suspend"] = json!(true);
        spec
    };
    let come = |status: &CanaryStatus| status.waiting.as_ref().is_some_and(|waiting| waiting.reason == "Suspended");
    deleted_in_every_way(Moment { name: "suspended", spec, release: V2, come }).await;
}

#[tokio::test]
#[ignore = "full"]
async fn a_canary_is_deleted_in_every_way_while_its_canary_starts() {
    let come = |status: &CanaryStatus| status.stage == Stage::Scale;
    deleted_in_every_way(Moment { name: "scale", spec: quick, release: V2, come }).await;
}

#[tokio::test]
#[ignore = "full"]
async fn a_canary_is_deleted_in_every_way_in_mid_release() {
    deleted_in_every_way(Moment { name: "judge", spec: quick, release: V2, come: at_weight_20 }).await;
}

#[tokio::test]
#[ignore = "full"]
async fn a_canary_is_deleted_in_every_way_while_its_release_is_paused() {
    let spec = || {
        let mut spec = quick();
        spec["analysis"]["metrics"] = json!([
            {"name": "nan", "interval": "4s", "thresholdRange": {"min": 1}, "query": "vector(0) / vector(0)"},
        ]);
        spec["analysis"]["inconclusive"] = json!({"after": "2s", "then": "Pause"});
        spec
    };
    let come = |status: &CanaryStatus| status.stage == Stage::Paused;
    deleted_in_every_way(Moment { name: "paused", spec, release: V2, come }).await;
}

#[tokio::test]
#[ignore = "full"]
async fn a_canary_is_deleted_in_every_way_while_it_is_promoted() {
    let spec = || {
        let mut spec = quick();
        // Steps pass by time: what is tried here comes after them.
        spec["analysis"]["metrics"] = json!([]);
        spec
    };
    let come =
        |status: &CanaryStatus| matches!(status.stage, Stage::PromoteScale | Stage::PromoteShift | Stage::Finalise);
    deleted_in_every_way(Moment { name: "promote", spec, release: V2, come }).await;
}

#[tokio::test]
#[ignore = "full"]
async fn a_canary_is_deleted_in_every_way_after_a_rollback() {
    let release = &[("VERSION", "v2"), ("ERROR_RATE", "0.5")];
    let come = |status: &CanaryStatus| status.phase == Phase::Failed && status.stage == Stage::Settled;
    deleted_in_every_way(Moment { name: "failed", spec: quick, release, come }).await;
}

#[tokio::test]
#[ignore = "full"]
async fn a_canary_that_is_deleted_and_applied_all_the_time_takes_over_again() {
    let Some(mut stage) = adopted("reapplied", Use::Shared, &[], quick()).await else { return };
    stage.nothing_failed().await;
    stage.serves_itself();
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
    stage.taken_over().await;
    let applied = stage.app.release(&[("VERSION", "v2")]).await.unwrap();
    stage.app.ends(applied, Phase::Succeeded, 2 * MINUTE).await.unwrap();
    stage.end().await;
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
