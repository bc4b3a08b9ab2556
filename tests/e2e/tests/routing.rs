//! What decides who reaches the canary beside weights, on the real cluster.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use std::time::Duration;

use kube::ResourceExt;
use serde_json::json;
use sluice_crds::{Phase, Stage, VerdictStatus};
use sluice_e2e::{
    adopted::{Adopted, MINUTE, Use, adopted, quick},
    cluster::SYSTEM,
    installation,
    load::Load,
    watch::unix_ms,
};

/// Within this time the status says that a weight has been left.
const SEEN_MS: u64 = 1_000;

/// A/B testing, with a header of insiders, behind a `match` that admits nothing but the root.
#[tokio::test]
async fn insiders_test_a_version_that_nobody_else_reaches_before_it_is_promoted() {
    let mut spec = quick();
    let analysis = spec["analysis"].as_object_mut().unwrap();
    for field in ["stepWeight", "stepWeights", "maxWeight"] {
        // Merged over the example's: null takes it away.
        analysis.insert(field.to_owned(), json!(null));
    }
    analysis.insert("iterations".to_owned(), json!(2));
    analysis.insert("match".to_owned(), json!([{"headers": {"x-user": {"exact": "insider"}}}]));
    // All that may be said of a Service is taken in by every proxy: else nothing would be taken over. Limits that what comes
    // together while a small machine stands still does not reach.
    spec["service"] = json!({
        "match": [{"uri": {"exact": "/"}, "method": {"regex": "GET|POST"}}],
        "rewrite": {"authority": "hello.internal:8080"},
        "corsPolicy": {"allowOrigins": [{"regex": "https://.*[.]example[.]com"}], "allowMethods": ["GET"], "maxAge": "1h"},
        "trafficPolicy": {
            "connectionPool": {
                "tcp": {"maxConnections": 1000, "connectTimeout": "2s"},
                "http": {"http1MaxPendingRequests": 1000, "http2MaxRequests": 1000, "maxRetries": 3,
                    "maxRequestsPerConnection": 1000, "idleTimeout": "1m"},
            },
            "outlierDetection": {"consecutive5xxErrors": 5, "consecutiveGatewayErrors": 5},
            "loadBalancer": {"warmupDurationSecs": "1s"},
        },
    });
    let Some(stage) = adopted("insiders", Use::Shared, &[], spec).await else { return };
    let arguments = ["--target", "hello:80", "--rate", "60", "--header", "x-user: insider"];
    let insiders = Load::start(&stage.app.cluster, &stage.app.namespace, "insiders", &arguments).await.unwrap();
    insiders.steady().await.unwrap();

    let applied = stage.app.release(&[("VERSION", "v2")]).await.unwrap();
    stage
        .wait("judgement", applied, |status| status.stage == Stage::Judge && status.effective_weight == Some(100))
        .await;
    let from = unix_ms();
    let promoting = stage.wait("the promotion", applied, |status| status.phase == Phase::Promoting).await;
    let until = unix_ms() - SEEN_MS;
    assert_eq!(promoting.failed_checks, 0);
    stage.load.catch_up().await.unwrap();
    insiders.catch_up().await.unwrap();
    let versions = |load: &Load| -> Vec<String> {
        let mut seen: Vec<_> = load.within(from, until).into_iter().map(|bucket| bucket.version).collect();
        seen.sort();
        seen.dedup();
        seen
    };
    assert_eq!(versions(&insiders), ["v2"], "those who match");
    assert_eq!(versions(&stage.load), ["v1"], "all others");

    stage.app.ends(applied, Phase::Succeeded, 2 * MINUTE).await.unwrap();
    let promoted = unix_ms();
    insiders.catch_up().await.unwrap();
    assert!(insiders.lost_since(from).is_empty(), "{:?}", insiders.lost_since(from));
    assert_eq!(stage.answers_of("v1", promoted).await, 0, "everybody has it");
    stage.end().await;
}

/// Each member of the fleet, and each connection, decides by the cookie alone.
#[tokio::test]
async fn a_user_with_a_cookie_stays_on_one_version_while_weights_stay() {
    let mut spec = quick();
    spec["analysis"]["sessionAffinity"] = json!({"cookieName": "side"});
    let Some(stage) = adopted("sticky", Use::Shared, &[], spec).await else { return };
    let mut users = Vec::new();
    for user in 0..8 {
        let cookie = format!("cookie: side=user-{user}");
        let arguments = ["--target", "hello:80", "--rate", "10", "--header", &cookie];
        let name = format!("user-{user}");
        users.push(Load::start(&stage.app.cluster, &stage.app.namespace, &name, &arguments).await.unwrap());
    }
    let applied = stage.app.release(&[("VERSION", "v2")]).await.unwrap();
    let mut before: Vec<bool> = vec![false; users.len()];
    let mut weight = 0;
    // Every step: who is on the canary stays there when more come.
    loop {
        let step = stage
            .wait("the next step", applied, |status| {
                status.phase == Phase::Promoting
                    || (status.stage == Stage::Judge && status.effective_weight.is_some_and(|now| now > weight))
            })
            .await;
        if step.phase == Phase::Promoting {
            break;
        }
        weight = step.effective_weight.unwrap();
        let from = unix_ms();
        let next = stage.wait("the end of the step", from, move |status| {
            status.phase == Phase::Promoting || status.requested_weight > weight
        });
        next.await;
        let until = unix_ms() - SEEN_MS;
        for (user, load) in users.iter().enumerate() {
            load.catch_up().await.unwrap();
            let seen = load.within(from, until);
            let on = |version: &str| seen.iter().any(|bucket| bucket.version == version);
            assert!(on("v1") != on("v2"), "user {user} at {weight} percent: {seen:?}");
            assert!(!before[user] || on("v2"), "user {user} was taken off the canary at {weight} percent");
            before[user] = on("v2");
        }
        println!("at {weight} percent {} of 8 users are on the canary", before.iter().filter(|on| **on).count());
    }
    stage.app.ends(applied, Phase::Succeeded, 2 * MINUTE).await.unwrap();
    for load in &users {
        assert!(load.lost_since(applied).is_empty(), "{:?}", load.lost_since(applied));
    }
    stage.end().await;
}

/// Copies for a revision by their outcome, as the fleet has counted them so far, over all of its members.
async fn copies(stage: &Adopted, revision: &str, outcome: &str) -> u64 {
    let cluster = &stage.app.cluster;
    let labels = format!(
        "sluice_mirrored_requests_total{{destination_namespace=\"{}\",destination_service=\"hello\",revision=\"{revision}\",outcome=\"{outcome}\"}} ",
        stage.app.namespace
    );
    let mut sum = 0;
    for pod in installation::fleet(cluster).await {
        let path = format!("/api/v1/namespaces/{SYSTEM}/pods/{}:20444/proxy/metrics", pod.name_any());
        let text = cluster.kubectl(&["get", "--raw", &path], None).await.unwrap();
        let counted = text.lines().find_map(|line| line.strip_prefix(&labels));
        sum += counted.map_or(0, |count| count.parse::<u64>().unwrap());
    }
    sum
}

/// Copies of users' requests come before any weight. Users see nothing of them, and a version that fails them is never seen at all.
#[tokio::test]
async fn copies_of_requests_judge_a_version_before_any_user_sees_it() {
    let mut spec = quick();
    spec["analysis"]["mirror"] = json!(true);
    // The gates alone decide here.
    spec["analysis"]["guard"] = json!({"enabled": false});
    let Some(stage) = adopted("mirrored", Use::Shared, &[], spec).await else { return };

    // One that answers every copy with 500.
    let applied = stage.app.release(&[("VERSION", "v2"), ("ERROR_RATE", "1")]).await.unwrap();
    let judging = stage
        .wait("judgement of copies", applied, |status| {
            status.stage == Stage::Judge && status.effective_mirror == Some(100)
        })
        .await;
    assert_eq!((judging.effective_weight, judging.progress.as_str()), (Some(0), "1/3 (mirror)"));
    let bad = judging.canary_revision.clone().unwrap();
    let failed = stage.app.ends(applied, Phase::Failed, 2 * MINUTE).await.unwrap().status;
    assert_eq!(failed.rollback.as_ref().unwrap().reason, "ThresholdReached");
    let gate = failed.gates.iter().find(|gate| gate.name == "request-success-rate").unwrap();
    assert_eq!((gate.verdict, gate.value, gate.primary_value), (VerdictStatus::Fail, Some(0.0), Some(100.0)));
    assert!(gate.query.contains("sluice_mirrored_requests_total"), "{}", gate.query);
    println!("{bad}: {} copies judged", gate.samples.unwrap());
    assert_eq!(stage.answers_of("v2", applied).await, 0, "no user saw it");

    // A good one: it has copies in the first step, and users from the second on.
    let applied = stage.app.release(&[("VERSION", "v3"), ("ERROR_RATE", "0")]).await.unwrap();
    let judging = stage
        .wait("judgement of copies", applied, |status| {
            status.stage == Stage::Judge && status.effective_mirror == Some(100)
        })
        .await;
    let good = judging.canary_revision.clone().unwrap();
    // While the mirror is configured: its series goes with it.
    let mut sent = 0;
    while sent == 0 {
        sent = copies(&stage, &good, "2xx").await;
        assert!(unix_ms() < applied + 120_000, "no copy arrives");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    println!("{good}: {sent} copies answered so far");
    assert_eq!(copies(&stage, &good, "5xx").await, 0);
    let weighted = stage.wait("the first weight", applied, |status| status.requested_weight == 20).await;
    let until = unix_ms();
    assert_eq!((weighted.progress.as_str(), weighted.failed_checks), ("2/3", 0));
    stage.load.catch_up().await.unwrap();
    // The status is seen a moment after the fleet has it.
    let early: Vec<_> = stage
        .load
        .since(applied)
        .into_iter()
        .filter(|bucket| bucket.version == "v3" && bucket.last_ms + 2_000 < until)
        .collect();
    assert!(early.is_empty(), "users had it while it was judged by copies: {early:?}");
    stage.app.ends(applied, Phase::Succeeded, 2 * MINUTE).await.unwrap();
    assert!(stage.answers_of("v3", applied).await > 0);
    stage.end().await;
}
