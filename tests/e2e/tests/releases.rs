//! End to end on the real cluster that `KUBECONFIG` names, with Sluice installed from the chart. Every test releases an
//! application of its own, under load by name with new and kept connections, and counts the requests that no version of the
//! application answered: none, unless the test says which are counted apart.
//!
//! `make test` starts the cluster. Without `KUBECONFIG` every test says that it was skipped.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use std::time::Duration;

use futures::{StreamExt, stream};
use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{ConfigMap, Pod},
};
use kube::{
    Api,
    api::{DeleteParams, ListParams, Patch, PatchParams},
};
use serde_json::json;
use sluice_crds::{ActionOutcome, CanaryStatus, GuardSignal, Phase, Stage, VerdictStatus};
use sluice_e2e::{
    adopted::{Adopted, MINUTE, Use, adopted, cluster, condition, ended, eventually, of_ours, quick, unique},
    app::App,
    load::{EVERY_PROTOCOL, KEPT, Load},
    watch::unix_ms,
};
use sluice_load::Bucket;

/// With the gates alone.
fn unguarded() -> serde_json::Value {
    let mut spec = quick();
    spec["analysis"]["guard"] = json!({"enabled": false});
    spec
}

#[tokio::test]
async fn a_good_version_is_promoted_and_its_judged_pods_serve() {
    let Some(stage) = adopted("good", Use::Shared, &[], quick()).await else { return };
    let applied = stage.app.release(&[("VERSION", "v2")]).await.unwrap();
    let judged = stage.wait("judged pods", applied, |status| status.stage == Stage::Judge).await;
    let revision = judged.canary_revision.clone().unwrap();
    let before = stage.app.pods_of(&revision).await.unwrap();
    let done = stage.app.ends(applied, Phase::Succeeded, 2 * MINUTE).await.unwrap();
    assert_eq!(done.status.primary_revision.as_deref(), Some(&*revision));
    assert_eq!(condition(&done.status, "Promoted").0, "True");
    assert_eq!(done.status.guard, None, "a good version is not disturbed");
    let after = stage.app.pods_of(&revision).await.unwrap();
    assert!(before.iter().all(|pod| after.contains(pod)), "{before:?} were judged, {after:?} serve");
    assert_eq!(after.len(), 2);
    let from = unix_ms();
    stage.load.catch_up().await.unwrap();
    assert_eq!(stage.answers_of("v1", from).await, 0);

    // The Deployment is a template now; the Canary is what is scaled.
    let scale = |what: &'static str| {
        let arguments = ["-n", &stage.app.namespace, "scale", what, "--replicas=3"].map(str::to_owned);
        let cluster = stage.app.cluster.clone();
        async move { cluster.kubectl(&arguments.each_ref().map(String::as_str), None).await }
    };
    let refusal = scale("deployment/hello").await.unwrap_err().to_string();
    assert!(refusal.contains("use: kubectl scale canary/hello"), "{refusal}");
    scale("canary/hello").await.unwrap();
    let scaled = unix_ms();
    stage.wait("three Pods", scaled, |status| status.replicas == 3).await;
    stage.end().await;
}

#[tokio::test]
async fn an_erroneous_version_is_rolled_back_by_its_success_rate() {
    let Some(stage) = adopted("errors", Use::Shared, &[], unguarded()).await else { return };
    let applied = stage.app.release(&[("VERSION", "v2"), ("ERROR_RATE", "0.5")]).await.unwrap();
    let done = stage.app.ends(applied, Phase::Failed, 2 * MINUTE).await.unwrap().status;
    let gate = done.gates.iter().find(|gate| gate.name == "request-success-rate").unwrap();
    assert_eq!(gate.verdict, VerdictStatus::Fail);
    assert!(gate.value.unwrap() < 99.0);
    assert_eq!(done.effective_weight, Some(0));
    let (promoted, reason, _) = condition(&done, "Stalled");
    assert_eq!((promoted.as_str(), reason.as_str()), ("True", "RolledBack"));
    let from = unix_ms() + 500;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(stage.answers_of("v2", from).await, 0, "a rejected version has no traffic");
    stage.end().await;
}

#[tokio::test]
async fn a_slow_version_is_rolled_back_by_its_p99() {
    let Some(stage) = adopted("slow", Use::Shared, &[], unguarded()).await else { return };
    let applied = stage.app.release(&[("VERSION", "v2"), ("LATENCY_MS", "1500")]).await.unwrap();
    let done = stage.app.ends(applied, Phase::Failed, 2 * MINUTE).await.unwrap().status;
    let gate = done.gates.iter().find(|gate| gate.name == "request-duration").unwrap();
    assert_eq!(gate.verdict, VerdictStatus::Fail);
    assert!(gate.value.unwrap() > 1000.0);
    stage.end().await;
}

/// What a client saw of a bad version.
struct Bad {
    answers: u64,
    first_ms: u64,
    last_ms: u64,
}

async fn bad_answers(stage: &Adopted, from_ms: u64, bad: impl Fn(&Bucket) -> u64) -> Bad {
    stage.load.catch_up().await.unwrap();
    let seen = stage.load.since(from_ms);
    let seen: Vec<_> = seen.iter().filter(|bucket| bucket.version == "v2" && bad(bucket) > 0).collect();
    Bad {
        answers: seen.iter().map(|bucket| bad(bucket)).sum(),
        first_ms: seen.iter().map(|bucket| bucket.first_ms).min().unwrap_or_default(),
        last_ms: seen.iter().map(|bucket| bucket.last_ms).max().unwrap_or_default(),
    }
}

#[tokio::test]
async fn an_erroneous_version_is_taken_back_by_the_guard_before_anybody_scrapes() {
    let Some(stage) = adopted("guard", Use::Shared, &["--rate", "300"], quick()).await else { return };
    let applied = stage.app.release(&[("VERSION", "v2"), ("ERROR_RATE", "0.5")]).await.unwrap();
    let done = stage.app.ends(applied, Phase::Failed, 2 * MINUTE).await.unwrap().status;
    let rollback = done.rollback.clone().unwrap();
    assert_eq!((rollback.reason.as_str(), done.failed_checks), ("GuardBreached", 0), "{rollback:?}");
    let found = done.guard.clone().unwrap();
    assert_eq!((found.signal, found.weight), (GuardSignal::Errors, 20));
    assert!(found.canary.percent > 25.0 && found.primary.bad == 0 && found.evidence >= 10_000.0, "{found:?}");
    assert_eq!(condition(&done, "Promoted").1, "GuardBreached");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let bad = bad_answers(&stage, applied, |bucket| if bucket.status >= 500 { bucket.count } else { 0 }).await;
    println!("{} bad answers in {} ms: {}", bad.answers, bad.last_ms - bad.first_ms, rollback.message);
    assert!(bad.answers < 40, "{} bad answers", bad.answers);
    stage.end().await;
}

#[tokio::test]
async fn a_slow_version_is_taken_back_by_the_guard_soon_after_its_first_answers() {
    let Some(stage) = adopted("guardslow", Use::Shared, &["--rate", "300"], quick()).await else { return };
    let applied = stage.app.release(&[("VERSION", "v2"), ("LATENCY_MS", "1500")]).await.unwrap();
    let done = stage.app.ends(applied, Phase::Failed, 2 * MINUTE).await.unwrap().status;
    assert_eq!(done.rollback.clone().unwrap().reason, "GuardBreached");
    let found = done.guard.clone().unwrap();
    assert_eq!((found.signal, found.slow_above_milliseconds), (GuardSignal::Latency, Some(1000.0)));
    tokio::time::sleep(Duration::from_secs(2)).await;
    let bad = bad_answers(&stage, applied, |bucket| bucket.slow).await;
    println!("{} slow answers in {} ms: {}", bad.answers, bad.last_ms - bad.first_ms, done.rollback.unwrap().message);
    // Those that were sent in the second and a half before the first one ended come, too.
    assert!(bad.answers < 200, "{} slow answers", bad.answers);
    stage.end().await;
}

#[tokio::test]
#[ignore = "full"]
async fn a_version_that_never_answers_is_taken_back_although_its_clients_give_up() {
    let Some(mut stage) = adopted("hangs", Use::Shared, &["--timeout-s", "3"], quick()).await else { return };
    let applied = stage.app.release(&[("VERSION", "v2"), ("LATENCY_MS", "600000")]).await.unwrap();
    let done = stage.app.ends(applied, Phase::Failed, 2 * MINUTE).await.unwrap();
    println!("{}", done.status.rollback.unwrap().message);
    let seen = stage.app.history.since(applied);
    assert!(seen.iter().all(|seen| seen.status.requested_weight <= 20), "it came past the first step");
    let apart = stage.counted_apart("a version that never answers", applied).await;
    assert!(apart.kept + apart.new > 0, "{apart:?}");
    // Clients give up after the rollback what they asked before.
    let later = stage.load.within(done.at_ms + 500, u64::MAX);
    assert!(!later.iter().any(Bucket::failed), "{later:#?}");
    stage.end().await;
}

#[tokio::test]
async fn a_version_that_crashes_is_rolled_back_by_the_progress_deadline_and_gets_no_traffic() {
    let Some(stage) = adopted("crash", Use::Shared, &[], quick()).await else { return };
    let applied = stage.app.release(&[("VERSION", "v2"), ("CRASH_AFTER_MS", "1")]).await.unwrap();
    let done = stage.app.ends(applied, Phase::Failed, 2 * MINUTE).await.unwrap().status;
    let (_, _, message) = condition(&done, "Stalled");
    assert!(message.contains("ProgressDeadlineExceeded") && message.contains("container hello crashes"), "{message}");
    assert_eq!(stage.answers_of("v2", applied).await, 0);
    stage.end().await;
}

#[tokio::test]
async fn a_version_that_never_becomes_ready_is_rolled_back_and_gets_no_traffic() {
    let Some(stage) = adopted("unready", Use::Shared, &[], quick()).await else { return };
    let applied = stage.app.release(&[("VERSION", "v2"), ("NEVER_READY", "true")]).await.unwrap();
    stage.app.ends(applied, Phase::Failed, 2 * MINUTE).await.unwrap();
    assert_eq!(stage.answers_of("v2", applied).await, 0);
    stage.end().await;
}

#[tokio::test]
async fn a_new_change_in_mid_release_starts_over_with_the_newer_version() {
    let Some(stage) = adopted("change", Use::Shared, &[], quick()).await else { return };
    let applied = stage.app.release(&[("VERSION", "v2")]).await.unwrap();
    let older = stage.wait("weight 20", applied, |status| status.effective_weight == Some(20)).await;
    let again = stage.app.release(&[("VERSION", "v3")]).await.unwrap();
    let newer = stage
        .wait("the newer revision", again, |status| {
            status.canary_revision.is_some()
                && status.canary_revision != older.canary_revision
                && status.template.as_ref().map(|template| &template.revision) == status.canary_revision.as_ref()
        })
        .await;
    assert_eq!(newer.step.unwrap_or(0), 0);
    let done = stage
        .app
        .history
        .wait("phase Succeeded", again, 2 * MINUTE, |status| status.phase == Phase::Succeeded)
        .await
        .unwrap();
    assert_eq!(done.status.primary_revision, newer.canary_revision);
    stage.load.catch_up().await.unwrap();
    assert_eq!(stage.answers_of("v2", done.at_ms + 500).await, 0);
    stage.end().await;
}

#[tokio::test]
async fn a_revert_in_mid_release_ends_it_at_once() {
    let Some(stage) = adopted("revert", Use::Shared, &[], quick()).await else { return };
    let applied = stage.app.release(&[("VERSION", "v2")]).await.unwrap();
    stage.wait("weight 20", applied, |status| status.effective_weight == Some(20)).await;
    let reverted = stage.app.release(&[("VERSION", "v1")]).await.unwrap();
    let done = stage
        .wait("settled on v1", reverted, |status| {
            status.stage == Stage::Settled && status.effective_weight == Some(0) && status.canary_revision.is_none()
        })
        .await;
    assert!(done.rejected_revision.is_none(), "a reverted version was not judged bad");
    stage.end().await;
}

#[tokio::test]
async fn a_change_of_a_config_map_alone_is_a_release() {
    let Some(stage) = adopted("config", Use::Shared, &[], quick()).await else { return };
    let maps: Api<ConfigMap> = stage.api();
    let applied = unix_ms();
    maps.patch("hello", &PatchParams::default(), &Patch::Merge(json!({"data": {"greeting": "good day"}})))
        .await
        .unwrap();
    let done = stage.app.ends(applied, Phase::Succeeded, 2 * MINUTE).await.unwrap().status;
    // The serving pods have a pinned copy of it.
    let pods: Api<Pod> = stage.api();
    let pod = stage.app.pods_of(done.primary_revision.as_ref().unwrap()).await.unwrap().remove(0);
    let pod = pods.get(&pod).await.unwrap();
    let volume = pod.spec.unwrap().volumes.unwrap().into_iter().find(|volume| volume.name == "greeting").unwrap();
    let pinned = maps.get(&volume.config_map.unwrap().name).await.unwrap();
    assert_eq!(pinned.data.as_ref().unwrap()["greeting"], "good day");
    assert_eq!(pinned.immutable, Some(true));
    stage.end().await;
}

#[tokio::test]
async fn suspend_freezes_a_release_and_resume_goes_on() {
    let Some(stage) = adopted("suspend", Use::Shared, &[], quick()).await else { return };
    let applied = stage.app.release(&[("VERSION", "v2")]).await.unwrap();
    stage.wait("weight 20", applied, |status| status.effective_weight == Some(20)).await;
    let suspended = stage.app.patch_canary(json!({"suspend": true})).await.unwrap();
    // Longer than the step would last.
    tokio::time::sleep(Duration::from_secs(8)).await;
    let last = stage.app.history.last().unwrap().status;
    assert!(last.requested_weight <= 20, "{last:?}");
    assert!(stage.app.history.since(suspended).iter().all(|seen| seen.status.requested_weight <= 20));
    let resumed = stage.app.patch_canary(json!({"suspend": false})).await.unwrap();
    stage.wait("phase Succeeded", resumed, |status| status.phase == Phase::Succeeded).await;
    stage.end().await;
}

#[tokio::test]
async fn a_canary_deleted_in_mid_release_hands_the_traffic_back_to_the_deployment() {
    let Some(stage) = adopted("delete", Use::Shared, &[], quick()).await else { return };
    let applied = stage.app.release(&[("VERSION", "v2")]).await.unwrap();
    stage.wait("weight 20", applied, |status| status.effective_weight == Some(20)).await;
    stage.app.canaries().delete("hello", &DeleteParams::default()).await.unwrap();
    let canaries = stage.app.canaries();
    eventually("the end of the Canary", MINUTE, || async {
        canaries.get_opt("hello").await.unwrap().is_none().then_some(())
    })
    .await;
    let deployments: Api<Deployment> = stage.api();
    let target = deployments.get("hello").await.unwrap();
    assert_eq!(target.spec.as_ref().unwrap().replicas, Some(2));
    eventually("the end of the revisions", MINUTE, || async {
        let ours = deployments.list(&ListParams::default().labels("sluice.dev/canary=hello")).await.unwrap();
        ours.items.is_empty().then_some(())
    })
    .await;
    let services: Api<k8s_openapi::api::core::v1::Service> = stage.api();
    let selector = services.get("hello").await.unwrap().spec.unwrap().selector.unwrap();
    assert!(!selector.contains_key("sluice.dev/fleet"), "{selector:?}");
    stage.end().await;
}

#[tokio::test]
async fn grpc_calls_a_stream_and_websockets_go_through_a_release() {
    let Some(stage) = adopted("protocols", Use::Shared, EVERY_PROTOCOL, quick()).await else { return };
    goes_through_a_release(stage, &["grpc", "stream", "ws"]).await;
}

#[tokio::test]
#[ignore = "full"]
async fn a_service_that_says_grpc_is_spoken_to_in_http_2_whatever_its_clients_speak() {
    let mut spec = quick();
    spec["service"] = json!({"appProtocol": "grpc"});
    let arguments = ["--grpc-rate", "20", "--messages", "5"];
    let Some(stage) = adopted("grpc", Use::Shared, &arguments, spec).await else { return };
    goes_through_a_release(stage, &["grpc", "stream", "new"]).await;
}

/// Requests of each kind meet the new version, and none fails.
async fn goes_through_a_release(stage: Adopted, kinds: &[&str]) {
    let applied = stage.app.release(&[("VERSION", "v2")]).await.unwrap();
    stage.app.ends(applied, Phase::Succeeded, 2 * MINUTE).await.unwrap();
    stage.load.catch_up().await.unwrap();
    for kind in kinds {
        // A stream or socket that is open lives on with its revision; the next one is on the new revision.
        eventually(&format!("a {kind} answer of v2"), MINUTE, || async {
            let buckets = stage.load.since(applied);
            buckets.iter().any(|bucket| bucket.kind == *kind && bucket.version == "v2").then_some(())
        })
        .await;
    }
    stage.end().await;
}

#[tokio::test]
async fn a_metric_that_is_nan_holds_the_release_and_then_does_what_the_canary_says() {
    let mut spec = quick();
    spec["analysis"]["inconclusive"] = json!({"after": "10s", "then": "Rollback"});
    let nan = json!({"name": "nan", "interval": "4s", "thresholdRange": {"min": 1}, "query": "vector(0) / vector(0)"});
    spec["analysis"]["metrics"].as_array_mut().unwrap().push(nan);
    let Some(stage) = adopted("nan", Use::Shared, &[], spec).await else { return };
    let applied = stage.app.release(&[("VERSION", "v2")]).await.unwrap();
    let done = stage.app.ends(applied, Phase::Failed, 2 * MINUTE).await.unwrap().status;
    let gate = done.gates.iter().find(|gate| gate.name == "nan").unwrap();
    assert_eq!(gate.verdict, VerdictStatus::Inconclusive);
    assert_eq!(done.failed_checks, 0, "not knowing is not a failed check");
    let (_, _, message) = condition(&done, "Stalled");
    assert!(message.contains("nan"), "{message}");
    let seen = stage.app.history.since(applied);
    assert!(seen.iter().all(|seen| seen.status.requested_weight <= 20), "held at the first step");
    stage.end().await;
}

#[tokio::test]
async fn an_application_that_exits_at_once_loses_no_new_connection_at_takeover() {
    let Some((cluster, _held)) = cluster(Use::Shared).await else { return };
    let app = App::deploy(&cluster, &unique("abrupt"), 2).await.unwrap();
    app.release(&[("EXIT_AT_ONCE", "true")]).await.unwrap();
    let status = ["-n", &app.namespace, "rollout", "status", "deployment/hello", "--timeout=120s"];
    cluster.kubectl(&status, None).await.unwrap();
    let load = Load::start(&cluster, &app.namespace, "load", &["--target", "hello:80", "--rate", "60"]).await.unwrap();
    let from_ms = load.steady().await.unwrap();
    app.canary(quick()).await.unwrap();
    app.adopted().await.unwrap();
    load.catch_up().await.unwrap();
    // Connections from before the takeover end with the Pods that they are on, as in any rollout: counted apart.
    let (kept, new): (Vec<_>, Vec<_>) =
        load.failures_since(from_ms).into_iter().partition(|bucket| bucket.kind == "kept");
    println!("resets of connections from before the takeover: {}", kept.iter().map(|bucket| bucket.count).sum::<u64>());
    assert!(new.is_empty(), "{new:#?}");
    assert!(
        kept.iter().map(|bucket| bucket.count).sum::<u64>() <= KEPT,
        "at most one for each kept connection: {kept:#?}"
    );
    ended(app).await;
}

#[tokio::test]
async fn an_application_that_exits_at_once_is_scaled_down_without_a_failed_request() {
    let Some(stage) = adopted("shrinks", Use::Shared, &["--rate", "120"], quick()).await else { return };
    // So slow that each of its Pods has requests open whenever it is told to end.
    let abrupt = [("VERSION", "v2"), ("EXIT_AT_ONCE", "true"), ("LATENCY_MS", "100")];
    let applied = stage.app.release(&abrupt).await.unwrap();
    let revision =
        stage.app.ends(applied, Phase::Succeeded, 2 * MINUTE).await.unwrap().status.primary_revision.unwrap();
    for replicas in [5, 1] {
        let count = format!("--replicas={replicas}");
        let scale = ["-n", &stage.app.namespace, "scale", "canary/hello", &count];
        stage.app.cluster.kubectl(&scale, None).await.unwrap();
        let ready = ListParams::default().labels(&format!("sluice.dev/revision={revision}"));
        eventually(&format!("{replicas} Pods, all ready"), MINUTE, || async {
            let pods = stage.api::<Pod>().list(&ready).await.unwrap();
            (pods.items.len() == replicas && pods.iter().all(is_ready)).then_some(())
        })
        .await;
    }
    stage.end().await;
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

#[tokio::test]
async fn plaintext_to_the_sidecars_port_is_refused() {
    let Some(stage) = adopted("plain", Use::Shared, &[], quick()).await else { return };
    let pods: Api<Pod> = stage.api();
    let list = ListParams::default().labels("sluice.dev/canary=hello");
    let pod = pods.list(&list).await.unwrap().items.remove(0);
    let address = format!("{}:20443", pod.status.unwrap().pod_ip.unwrap());
    let arguments = ["--target", &address, "--rate", "20", "--seconds", "2"];
    let direct = Load::start(&stage.app.cluster, &stage.app.namespace, "direct", &arguments).await.unwrap();
    let seen = eventually("answers", MINUTE, || async {
        let seen = direct.since(0);
        (seen.iter().map(|bucket| bucket.count).sum::<u64>() >= 20).then_some(seen)
    })
    .await;
    assert!(seen.iter().all(|bucket| !bucket.answered_by_application()), "{seen:#?}");
    stage.end().await;
}

/// Says something by the annotation, and waits until it was accepted.
async fn say(stage: &Adopted, value: &str) {
    let at = unix_ms();
    let patch = json!({"metadata": {"annotations": {"sluice.dev/action": value}}});
    stage.app.canaries().patch("hello", &PatchParams::default(), &Patch::Merge(patch)).await.unwrap();
    let status =
        stage.wait(value, at, |status| status.action.as_ref().is_some_and(|action| action.value == value)).await;
    let action = status.action.unwrap();
    assert_eq!(action.outcome, ActionOutcome::Accepted, "{value}: {}", action.message);
}

#[tokio::test]
async fn what_is_said_by_hand_is_done_in_a_real_release() {
    let Some(stage) = adopted("verbs", Use::Shared, &[], quick()).await else { return };
    let applied = stage.app.release(&[("VERSION", "v2")]).await.unwrap();
    let canary = stage.wait("weight 20", applied, |status| status.effective_weight == Some(20)).await;
    let v2 = canary.canary_revision.unwrap();
    let v1 = canary.primary_revision.unwrap();
    say(&stage, &format!("pause:{v2}")).await;
    let paused = unix_ms();
    // Longer than the step would last.
    tokio::time::sleep(Duration::from_secs(8)).await;
    assert!(stage.app.history.since(paused).iter().all(|seen| seen.status.requested_weight <= 20));
    say(&stage, &format!("resume:{v2}")).await;
    say(&stage, &format!("promote:{v2}")).await;
    let done = stage.wait("phase Succeeded", paused, |status| status.phase == Phase::Succeeded).await;
    assert_eq!(condition(&done, "Promoted").1, "ManualPromotion");

    let applied = stage.app.release(&[("VERSION", "v3")]).await.unwrap();
    let canary = stage.wait("weight 20", applied, |status| status.effective_weight == Some(20)).await;
    let v3 = canary.canary_revision.unwrap();
    say(&stage, &format!("abort:{v3}")).await;
    let done = stage.wait("phase Failed", applied, |status| status.phase == Phase::Failed).await;
    assert_eq!(condition(&done, "Stalled").1, "Aborted");
    let again = unix_ms();
    say(&stage, &format!("retry:{v3}")).await;
    let done = stage.wait("phase Succeeded", again, |status| status.phase == Phase::Succeeded).await;
    assert_eq!(done.primary_revision.as_deref(), Some(&*v3));

    let back = unix_ms();
    say(&stage, &format!("rollback:{v1}")).await;
    let done = stage
        .wait("the way back", back, |status| {
            status.primary_revision.as_deref() == Some(&*v1) && status.stage == Stage::Settled
        })
        .await;
    assert_eq!(condition(&done, "Promoted").1, "Rollback", "{done:?}");
    let from = unix_ms() + 500;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(stage.answers_of("v3", from).await, 0);
    stage.end().await;
}

#[tokio::test]
async fn an_application_that_comes_together_with_its_canary_is_taken_over() {
    let Some((cluster, _held)) = cluster(Use::Shared).await else { return };
    let app = App::at_once(&cluster, &unique("together"), 2, quick()).await.unwrap();
    app.adopted().await.unwrap();
    let load = Load::start(&cluster, &app.namespace, "load", &["--target", "hello:80", "--rate", "60"]).await.unwrap();
    let from_ms = load.steady().await.unwrap();
    let applied = app.release(&[("VERSION", "v2")]).await.unwrap();
    app.ends(applied, Phase::Succeeded, 2 * MINUTE).await.unwrap();
    load.catch_up().await.unwrap();
    let lost = load.lost_since(from_ms);
    assert!(lost.is_empty(), "{lost:#?}");
    ended(app).await;
}

#[tokio::test]
#[ignore = "full"]
async fn a_tcp_service_is_split_by_connection() {
    let mut spec = quick();
    spec["service"] = json!({"appProtocol": "tcp"});
    spec["analysis"]["metrics"] = json!([]);
    let Some(mut stage) = adopted("tcp", Use::Shared, &[], spec).await else { return };
    let applied = stage.app.release(&[("VERSION", "v2")]).await.unwrap();
    stage.wait("weight 60", applied, |status| status.effective_weight == Some(60)).await;
    assert!(stage.answers_of("v2", applied).await > 0);
    // Nothing of TCP can be sent again: what was open on the Deployment's own Pods ends with them, as in any rollout.
    let apart = stage.counted_apart("a TCP Service taken over", stage.from_ms).await;
    assert!(apart.kept + apart.new <= 16, "at most one for each connection: {apart:?}");
    let done = stage.app.ends(applied, Phase::Succeeded, 2 * MINUTE).await.unwrap();
    // Connections that are kept live on with their revision until it ends.
    stage.wait("the old revision's end", done.at_ms, |status| status.retiring.is_empty()).await;
    stage.end().await;
}

#[tokio::test]
#[ignore = "full"]
async fn a_change_of_a_secret_alone_is_a_release() {
    let Some((cluster, _held)) = cluster(Use::Shared).await else { return };
    let app = App::deploy(&cluster, &unique("secret"), 2).await.unwrap();
    let secret = |value: &str| {
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "key"}, "stringData": {"KEY": value}})
            .to_string()
    };
    cluster.apply(&app.namespace, &secret("one")).await.unwrap();
    let from = json!([{"name": "hello", "envFrom": [{"secretRef": {"name": "key"}}]}]);
    let deployments: Api<Deployment> = Api::namespaced(cluster.client.clone(), &app.namespace);
    let patch = Patch::Strategic(json!({"spec": {"template": {"spec": {"containers": from}}}}));
    deployments.patch("hello", &PatchParams::default(), &patch).await.unwrap();
    let load = Load::start(&cluster, &app.namespace, "load", &["--target", "hello:80", "--rate", "60"]).await.unwrap();
    let from_ms = load.steady().await.unwrap();
    app.canary(quick()).await.unwrap();
    let before = app.adopted().await.unwrap().status;
    app.own_pods_ended().await.unwrap();
    let applied = unix_ms();
    cluster.apply(&app.namespace, &secret("two")).await.unwrap();
    let done = app.ends(applied, Phase::Succeeded, 2 * MINUTE).await.unwrap().status;
    assert_ne!(done.primary_revision, before.primary_revision);
    // The copies of the Secret go with the Canary.
    app.canaries().delete("hello", &DeleteParams::default()).await.unwrap();
    eventually("the end of what is ours", 2 * MINUTE, || async {
        of_ours(&cluster, &app.namespace).await.is_empty().then_some(())
    })
    .await;
    load.catch_up().await.unwrap();
    let lost = load.lost_but_for_the_takeover(from_ms, applied);
    assert!(lost.is_empty(), "{lost:#?}");
    ended(app).await;
}

#[tokio::test]
#[ignore = "full"]
async fn canaries_of_one_name_in_two_namespaces_have_nothing_to_do_with_each_other() {
    let (good, bad) = tokio::join!(
        Box::pin(adopted("twin-good", Use::Shared, &[], quick())),
        Box::pin(adopted("twin-bad", Use::Shared, &[], quick())),
    );
    let (Some(good), Some(bad)) = (good, bad) else { return };
    let applied = good.app.release(&[("VERSION", "v2")]).await.unwrap();
    let applied_bad = bad.app.release(&[("VERSION", "v2"), ("ERROR_RATE", "0.5")]).await.unwrap();
    let (promoted, failed) = tokio::join!(
        good.app.ends(applied, Phase::Succeeded, 2 * MINUTE),
        bad.app.ends(applied_bad, Phase::Failed, 2 * MINUTE),
    );
    promoted.unwrap();
    failed.unwrap();
    good.end().await;
    bad.end().await;
}

/// Alone, because twenty applications that start take the cores from those that others judge.
#[tokio::test]
#[ignore = "full"]
async fn twenty_canaries_are_released_at_once() {
    let Some((cluster, _held)) = cluster(Use::Alone).await else { return };
    let mut spec = quick();
    // A window has some three requests of the canary. How long they take is the machine's affair while twenty applications start.
    let successes =
        json!({"name": "request-success-rate", "interval": "4s", "minSamples": 1, "thresholdRange": {"min": 99}});
    spec["analysis"]["metrics"] = json!([successes]);
    spec["progressDeadlineSeconds"] = json!(300);
    let apps: Vec<(App, Load, u64)> = stream::iter(0..20)
        .map(|number| {
            let (cluster, spec) = (cluster.clone(), spec.clone());
            async move {
                let app = App::deploy(&cluster, &unique(&format!("many-{number}")), 1).await.unwrap();
                let arguments = ["--target", "hello:80", "--rate", "4"];
                let load = Load::start(&cluster, &app.namespace, "load", &arguments).await.unwrap();
                let from_ms = load.steady().await.unwrap();
                app.canary(spec).await.unwrap();
                app.adopted().await.unwrap();
                app.own_pods_ended().await.unwrap();
                (app, load, from_ms)
            }
        })
        .buffer_unordered(4)
        .collect()
        .await;
    let began = unix_ms();
    let released = apps.iter().map(|(app, ..)| async {
        let applied = app.release(&[("VERSION", "v2")]).await.unwrap();
        app.ends(applied, Phase::Succeeded, 5 * MINUTE).await.unwrap();
    });
    futures::future::join_all(released).await;
    println!("twenty releases at once took {} ms", unix_ms() - began);
    let ends = apps.into_iter().map(|(app, load, from_ms)| async move {
        load.catch_up().await.unwrap();
        let lost = load.lost_but_for_the_takeover(from_ms, began);
        assert!(lost.is_empty(), "{}: {lost:#?}", app.namespace);
        ended(app).await;
    });
    futures::future::join_all(ends).await;
}

#[tokio::test]
#[ignore = "full"]
async fn another_service_on_the_same_pods_is_reported() {
    let Some(stage) = adopted("second", Use::Shared, &[], quick()).await else { return };
    let at = unix_ms();
    stage.app.cluster.apply(&stage.app.namespace, &other_service()).await.unwrap();
    let names = |status: &CanaryStatus| condition(status, "Warning").2.contains("other");
    stage.wait("a warning that names it", at, names).await;
    let at = unix_ms();
    stage.app.cluster.kubectl(&["-n", &stage.app.namespace, "delete", "service", "other"], None).await.unwrap();
    stage.wait("no warning", at, |status| !names(status)).await;
    stage.end().await;
}

/// A further Service of the application's Pods.
fn other_service() -> String {
    let other = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "other"},
        "spec": {"selector": {"app": "hello"}, "ports": [{"name": "http", "port": 8080, "targetPort": "http"}]},
    });
    other.to_string()
}

#[tokio::test]
#[ignore = "full"]
async fn a_further_service_that_is_named_is_split_like_the_first() {
    let Some((cluster, _held)) = cluster(Use::Shared).await else { return };
    let app = App::deploy(&cluster, &unique("further"), 2).await.unwrap();
    cluster.apply(&app.namespace, &other_service()).await.unwrap();
    let load = |name: &'static str, target: &'static str| {
        let (cluster, namespace) = (cluster.clone(), app.namespace.clone());
        async move {
            let load = Load::start(&cluster, &namespace, name, &["--target", target, "--rate", "60"]).await.unwrap();
            let from = load.steady().await.unwrap();
            (load, from)
        }
    };
    let loads = [load("load", "hello:80").await, load("load-other", "other:8080").await];
    let mut spec = quick();
    spec["service"] = json!({"additional": [{"name": "other"}]});
    app.canary(spec).await.unwrap();
    let adopted = app.adopted().await.unwrap().status;
    assert_eq!(adopted.additional_services, ["other"]);
    app.own_pods_ended().await.unwrap();
    let through_fleet = unix_ms();
    let nothing_failed = || async {
        for (load, from) in &loads {
            load.catch_up().await.unwrap();
            let lost = load.lost_but_for_the_takeover(*from, through_fleet);
            assert!(lost.is_empty(), "lost requests: {lost:#?}");
        }
    };
    let applied = app.release(&[("VERSION", "v2")]).await.unwrap();
    let at_20 = |status: &CanaryStatus| status.effective_weight == Some(20);
    app.history.wait("weight 20", applied, MINUTE, at_20).await.unwrap();
    let from = unix_ms();
    let at_60 = |status: &CanaryStatus| status.requested_weight == 60;
    let to = app.history.wait("weight 60", from, MINUTE, at_60).await.unwrap().at_ms;
    for (load, _) in &loads {
        load.catch_up().await.unwrap();
        let seen = load.since(from);
        let count = |version: &str| -> u64 {
            seen.iter().filter(|b| b.version == version && b.last_ms < to).map(|bucket| bucket.count).sum()
        };
        let (old, new) = (count("v1"), count("v2"));
        // Without the fleet, one new Pod of three would take a third.
        assert!(new > 0 && new * 100 < (old + new) * 30, "{new} of {} at weight 20", old + new);
    }
    app.ends(applied, Phase::Succeeded, 2 * MINUTE).await.unwrap();
    nothing_failed().await;
    app.canaries().delete("hello", &DeleteParams::default()).await.unwrap();
    eventually("the hand-back", 2 * MINUTE, || async {
        app.canaries().get_opt("hello").await.unwrap().is_none().then_some(())
    })
    .await;
    nothing_failed().await;
    drop(loads);
    ended(app).await;
}

#[tokio::test]
#[ignore = "full"]
async fn rollout_restart_is_a_release_and_rollout_undo_a_way_back() {
    let Some(stage) = adopted("rollout", Use::Shared, &[], quick()).await else { return };
    let rollout = |verb: &'static str| {
        let (cluster, namespace) = (stage.app.cluster.clone(), stage.app.namespace.clone());
        async move {
            let at = unix_ms();
            cluster.kubectl(&["-n", &namespace, "rollout", verb, "deployment/hello"], None).await.unwrap();
            at
        }
    };
    let restarted = rollout("restart").await;
    let done = stage.app.ends(restarted, Phase::Succeeded, 2 * MINUTE).await.unwrap().status;
    let applied = stage.app.release(&[("VERSION", "v2")]).await.unwrap();
    stage.app.ends(applied, Phase::Succeeded, 2 * MINUTE).await.unwrap();
    let undone = rollout("undo").await;
    let back = stage
        .wait("the way back", undone, |status| {
            status.primary_revision == done.primary_revision && status.stage == Stage::Settled
        })
        .await;
    println!("undone within {} ms", unix_ms() - undone);
    assert_eq!(condition(&back, "Promoted").1, "Rollback");
    stage.end().await;
}
