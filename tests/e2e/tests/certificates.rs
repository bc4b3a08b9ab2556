//! Certificates come to their end, tokens do, and the root does: nobody's request notices.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use kube::{Api, ResourceExt, api::DeleteParams};
use sluice_crds::{Phase, labels};
use sluice_e2e::{
    adopted::{MINUTE, Use, adopted, eventually, expect, quick},
    cluster::{Cluster, SYSTEM},
    installation::{self, CONTROLLERS_AWAY},
};

/// The shortest life of a projected token that the API server takes, in seconds; the kubelet gets another after four fifths of it.
const SHORT_TOKEN: u32 = 600;

#[tokio::test]
#[ignore = "full"]
async fn certificates_that_live_for_a_minute_are_renewed_under_load() {
    let Some(stage) = adopted("certificates", Use::Alone, &[], quick()).await else { return };
    let cluster = stage.app.cluster.clone();
    let _expected = expect(CONTROLLERS_AWAY);
    installation::upgrade(&cluster, &["certificateSeconds=60"]).await;
    // Running proxies renew when two thirds of what they have are over; new ones have short ones from the start.
    cluster.kubectl(&["-n", SYSTEM, "rollout", "restart", "deployment/sluice-fleet"], None).await.unwrap();
    installation::complete(&cluster, "sluice-fleet").await;
    let applied = stage.app.release(&[("VERSION", "v2")]).await.unwrap();
    stage.app.ends(applied, Phase::Succeeded, 2 * MINUTE).await.unwrap();
    // Two renewals of everybody.
    tokio::time::sleep(Duration::from_secs(100)).await;
    stage.nothing_failed().await;
    installation::upgrade(&cluster, &["certificateSeconds=86400"]).await;
    cluster.kubectl(&["-n", SYSTEM, "rollout", "restart", "deployment/sluice-fleet"], None).await.unwrap();
    // While a member that ended still drains, it is in slices.
    installation::complete(&cluster, "sluice-fleet").await;
    installation::fleet_is_ready(&cluster, 2).await;
    stage.end().await;
}

#[tokio::test]
#[ignore = "full"]
async fn another_root_takes_over_under_load_and_tokens_are_rotated() {
    let Some(stage) = adopted("root", Use::Alone, &[], quick()).await else { return };
    let cluster = stage.app.cluster.clone();
    let _expected = expect(CONTROLLERS_AWAY);
    installation::upgrade(&cluster, &["certificateSeconds=60", "ca.spreadSeconds=150"]).await;
    // Which restarts it, so that every member has a short certificate from the start.
    tokens_of_the_fleet(&cluster, SHORT_TOKEN).await;
    let members = members(&cluster).await;
    let applied = stage.app.release(&[("VERSION", "v2")]).await.unwrap();
    stage.app.ends(applied, Phase::Succeeded, 2 * MINUTE).await.unwrap();

    let bundles = stage.api::<ConfigMap>();
    let memory: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), SYSTEM);
    let roots = || async {
        let bundle = bundles.get(labels::TRUST_BUNDLE).await.unwrap();
        let pem = bundle.data.unwrap_or_default().remove("ca.crt").unwrap_or_default();
        pem.split_inclusive("-----END CERTIFICATE-----\n").map(str::to_owned).collect::<Vec<_>>()
    };
    let [old] = roots().await.try_into().expect("one root");
    let _expected = expect(&["Secret sluice-system/sluice-ca was deleted"]);
    let secrets: Api<Secret> = Api::namespaced(cluster.client.clone(), SYSTEM);
    secrets.delete("sluice-ca", &DeleteParams::default()).await.unwrap();
    eventually("both roots to be trusted", MINUTE, || async {
        let roots = roots().await;
        (roots.len() == 2 && roots.contains(&old)).then_some(())
    })
    .await;
    let spans = || async {
        let memory = memory.get(labels::TRUST_BUNDLE).await.unwrap();
        memory.annotations().get(labels::ROOTS).cloned().unwrap_or_default()
    };
    assert!(spans().await.contains("since"), "the new root signs before everybody knows it");
    eventually("the new root to sign", 4 * MINUTE, || async { (!spans().await.contains("since")).then_some(()) }).await;
    // New Pods in the middle of it.
    let applied = stage.app.release(&[("VERSION", "v3")]).await.unwrap();
    stage.app.ends(applied, Phase::Succeeded, 2 * MINUTE).await.unwrap();
    let [new] = eventually("the old root to leave", 4 * MINUTE, || async { roots().await.try_into().ok() }).await;
    assert_ne!(new, old);
    // As long as it takes until everybody has read of it, and has renewed once more.
    tokio::time::sleep(Duration::from_secs(150)).await;
    stage.nothing_failed().await;

    // Whoever is trusted now has shown a token that came after the first.
    let youngest = members.iter().map(|(_, created)| created.as_second()).max().unwrap();
    let void = youngest + i64::from(SHORT_TOKEN) + 60;
    eventually("the first tokens, and the certificates that they gave, to be void", 15 * MINUTE, || async {
        (Timestamp::now().as_second() > void).then_some(())
    })
    .await;
    assert_eq!(self::members(&cluster).await, members, "a member was restarted");
    let applied = stage.app.release(&[("VERSION", "v4")]).await.unwrap();
    stage.app.ends(applied, Phase::Succeeded, 2 * MINUTE).await.unwrap();
    // The chart's own, so that Helm finds nothing that is another's.
    tokens_of_the_fleet(&cluster, 3600).await;
    installation::upgrade(&cluster, &["certificateSeconds=86400", "ca.spreadSeconds=300"]).await;
    cluster.kubectl(&["-n", SYSTEM, "rollout", "restart", "deployment/sluice-fleet"], None).await.unwrap();
    // While a member that ended still drains, it is in slices.
    installation::complete(&cluster, "sluice-fleet").await;
    installation::fleet_is_ready(&cluster, 2).await;
    stage.end().await;
}

/// Gives the fleet's tokens so many seconds of life, and waits until it has such ones.
async fn tokens_of_the_fleet(cluster: &Cluster, seconds: u32) {
    let token = "/spec/template/spec/volumes/0/projected/sources/0/serviceAccountToken";
    let patch = serde_json::json!([
        {"op": "test", "path": format!("{token}/audience"), "value": "sluice.dev"},
        {"op": "replace", "path": format!("{token}/expirationSeconds"), "value": seconds},
    ]);
    let arguments = ["-n", SYSTEM, "patch", "deployment/sluice-fleet", "--type=json", "-p", &patch.to_string()];
    cluster.kubectl(&arguments, None).await.unwrap();
    installation::complete(cluster, "sluice-fleet").await;
    installation::fleet_is_ready(cluster, 2).await;
}

/// The fleet's Pods with the times at which they were created, by name.
async fn members(cluster: &Cluster) -> Vec<(String, Timestamp)> {
    let created = |pod: &Pod| pod.creation_timestamp().unwrap().0;
    let mut members: Vec<_> =
        installation::fleet(cluster).await.iter().map(|pod| (pod.name_any(), created(pod))).collect();
    members.sort();
    members
}
