//! The installation itself changes under load: upgraded, rolled back, uninstalled and installed again. No request fails, and no
//! Pod of a user is restarted.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::{Api, ResourceExt as _, api::ListParams};
use sluice_crds::{Phase, Stage, labels};
use sluice_e2e::{
    adopted::{Adopted, MINUTE, Use, adopted, expect, of_ours, quick, slow},
    cluster::SYSTEM,
    installation::{self, CONTROLLERS_AWAY},
    watch::unix_ms,
};

/// Names of all Pods of the application, and how often containers of them were restarted.
async fn application_pods(stage: &Adopted) -> Vec<(String, i32)> {
    let status = stage.app.history.last().unwrap().status;
    let pods = stage.api::<Pod>();
    let mut found = Vec::new();
    for revision in [status.primary_revision, status.canary_revision].into_iter().flatten() {
        let of_it = ListParams::default().labels(&format!("sluice.dev/canary=hello,sluice.dev/revision={revision}"));
        found.extend(pods.list(&of_it).await.unwrap().iter().map(|pod| (pod.name_any(), restarts(pod))));
    }
    found.sort();
    found
}

fn restarts(pod: &Pod) -> i32 {
    let Some(status) = &pod.status else { return 0 };
    // Sidecars are init containers.
    let all = status.init_container_statuses.iter().chain(&status.container_statuses).flatten();
    all.map(|container| container.restart_count).sum()
}

#[tokio::test]
#[ignore = "full"]
async fn helm_upgrade_and_helm_rollback_under_load_lose_no_request_and_restart_no_pod() {
    let Some(stage) = adopted("upgrade", Use::Alone, &[], slow(10)).await else { return };
    let cluster = stage.app.cluster.clone();
    let applied = stage.app.release(&[("VERSION", "v2")]).await.unwrap();
    stage.wait("weight 20", applied, |status| status.effective_weight == Some(20)).await;
    let before = application_pods(&stage).await;
    let _expected = expect(CONTROLLERS_AWAY);
    let at = unix_ms();
    installation::upgrade(
        &cluster,
        &["controller.podAnnotations.test=x", "fleet.podAnnotations.test=x", "sidecar.resources.requests.memory=32Mi"],
    )
    .await;
    println!("upgraded within {} ms", unix_ms() - at);
    let after = application_pods(&stage).await;
    assert!(before.iter().all(|pod| after.contains(pod)), "{before:?} became {after:?}");
    stage.wait("phase Succeeded", at, |status| status.phase == Phase::Succeeded).await;
    stage
        .wait("the old revision's end", at, |status| status.phase == Phase::Succeeded && status.retiring.is_empty())
        .await;
    let before = application_pods(&stage).await;
    let at = unix_ms();
    cluster.helm(&["rollback", "sluice", "-n", SYSTEM, "--wait", "--timeout", "280s"]).await.unwrap();
    // What the Pod of the test prints.
    let _says = expect(&["sluice-test/passed"]);
    cluster.helm(&["test", "sluice", "-n", SYSTEM, "--timeout", "120s"]).await.unwrap();
    println!("rolled back within {} ms", unix_ms() - at);
    assert_eq!(before, application_pods(&stage).await);
    installation::fleet_is_ready(&cluster, 2).await;
    assert_eq!(stage.app.history.last().unwrap().status.stage, Stage::Settled);
    stage.end().await;
}

#[tokio::test]
#[ignore = "full"]
async fn an_older_version_and_this_one_drive_each_others_proxies() {
    let Some(old) = std::env::var("SLUICE_OLD").ok().filter(|old| !old.is_empty()) else {
        println!("SKIPPED: SLUICE_OLD names no older version (tests/skew)");
        return;
    };
    let Some(stage) = adopted("skew", Use::Alone, &[], quick()).await else { return };
    let cluster = stage.app.cluster.clone();
    let release = |version: &'static str| {
        let stage = &stage;
        async move {
            let applied = stage.app.release(&[("VERSION", version)]).await.unwrap();
            stage.app.ends(applied, Phase::Succeeded, 2 * MINUTE).await.unwrap();
            stage.wait("its end", applied, |status| status.stage == Stage::Settled && status.retiring.is_empty()).await;
        }
    };
    let _expected = expect(CONTROLLERS_AWAY);
    let before = application_pods(&stage).await;
    let at = unix_ms();
    cluster.install_version(&format!("{old}/charts/sluice"), "old", &[]).await.unwrap();
    println!("brought to the older version within {} ms", unix_ms() - at);
    assert_eq!(before, application_pods(&stage).await, "an application's Pod was restarted");
    // Its controllers and fleet beside sidecars of today; then sidecars of its own.
    release("v2").await;

    let before = application_pods(&stage).await;
    let at = unix_ms();
    installation::upgrade(&cluster, &[]).await;
    println!("brought to this version within {} ms", unix_ms() - at);
    assert_eq!(before, application_pods(&stage).await, "an application's Pod was restarted");
    stage.nothing_failed().await;
    // Today's controllers and fleet beside older sidecars; then today's.
    release("v3").await;
    stage.end().await;
}

#[tokio::test]
#[ignore = "full"]
async fn helm_uninstall_hands_every_canary_back_and_a_later_installation_takes_it_over_again() {
    let Some(stage) = adopted("uninstall", Use::Alone, &[], slow(10)).await else { return };
    let cluster = stage.app.cluster.clone();
    let _expected = expect(&[SYSTEM]);
    let uninstall = ["uninstall", "sluice", "-n", SYSTEM, "--wait", "--timeout", "280s"];

    // The Deployment asks for a version that is not promoted yet: everybody would get it.
    let applied = stage.app.release(&[("VERSION", "v2")]).await.unwrap();
    stage.wait("weight 20", applied, |status| status.effective_weight == Some(20)).await;
    cluster.helm(&uninstall).await.unwrap_err();
    let said = cluster.kubectl(&["logs", "-n", SYSTEM, "job/sluice-uninstall"], None).await.unwrap();
    assert!(said.contains("/hello ask for a version that was not promoted"), "{said}");
    stage.wait("phase Succeeded", applied, |status| status.phase == Phase::Succeeded).await;

    let at = unix_ms();
    cluster.helm(&uninstall).await.unwrap();
    println!("uninstalled within {} ms", unix_ms() - at);
    stage.nothing_failed().await;
    for kinds in ["mutatingwebhookconfigurations", "validatingadmissionpolicies", "clusterroles"] {
        let found = cluster.kubectl(&["get", kinds, "-o", "name"], None).await.unwrap();
        assert!(!found.contains("sluice"), "{found}");
    }
    assert_eq!(of_ours(&cluster, &stage.app.namespace).await, Vec::<String>::new());
    let bundles: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), &stage.app.namespace);
    assert!(bundles.get_opt(labels::TRUST_BUNDLE).await.unwrap().is_none(), "the trust bundle went, too");
    let canary = stage.app.canaries().get("hello").await.unwrap();
    assert!(canary.finalizers().is_empty());
    assert_eq!(canary.status.unwrap().phase, Phase::Terminated);

    let at = unix_ms();
    installation::upgrade(&cluster, &[]).await;
    stage.wait("the second takeover", at, |status| status.phase == Phase::Initialized).await;
    stage.end().await;
}
