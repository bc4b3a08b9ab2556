//! A HorizontalPodAutoscaler scales a Canary by what its Pods use, as metrics-server tells it, in mid-release too.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use k8s_openapi::api::{
    apps::v1::Deployment,
    autoscaling::v2::{HorizontalPodAutoscaler, HorizontalPodAutoscalerCondition},
};
use serde_json::{Value, json};
use sluice_crds::Phase;
use sluice_e2e::{
    adopted::{Adopted, MINUTE, Use, adopted, at_weight_20, eventually, expect, quick},
    cluster::{Cluster, SYSTEM},
    installation::{self, CONTROLLERS_AWAY},
};

/// By the CPU of the application's container, without the sidecar's.
fn autoscaler(name: &str, target: &Value, least: u32, most: u32, average: &Value) -> String {
    json!({
        "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": {"name": name},
        "spec": {
            "scaleTargetRef": target, "minReplicas": least, "maxReplicas": most,
            "metrics": [{"type": "ContainerResource", "containerResource": {
                "name": "cpu", "container": "hello", "target": average,
            }}],
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": 0}},
        },
    })
    .to_string()
}

/// Nanocores that the application's containers use together, once that has become steady.
async fn use_of_all(cluster: &Cluster, path: &str) -> u64 {
    let read = async || {
        let uses: Value = serde_json::from_str(&cluster.kubectl(&["get", "--raw", path], None).await.ok()?).ok()?;
        let pods = uses["items"].as_array()?;
        let containers = pods.iter().flat_map(|pod| pod["containers"].as_array().into_iter().flatten());
        let used = containers.filter(|container| container["name"] == "hello");
        let used = used.map(|container| container["usage"]["cpu"].as_str()?.strip_suffix('n')?.parse::<u64>().ok());
        Some((pods.first()?["timestamp"].clone(), used.sum::<Option<u64>>()?))
    };
    let (mut at, mut used) = eventually("the use of CPU", MINUTE, &read).await;
    for _ in 0..15 {
        let later = async || read().await.filter(|(stamp, _)| *stamp != at);
        let (stamp, now) = eventually("a later use of CPU", MINUTE, later).await;
        if now.abs_diff(used) < used / 10 {
            return now;
        }
        (at, used) = (stamp, now);
    }
    panic!("the use of CPU does not become steady; {used} nanocores at last");
}

/// Waits until the Canary wants so many replicas, and its primary has them.
async fn scaled(stage: &Adopted, replicas: i32) {
    eventually(&format!("{replicas} replicas"), 4 * MINUTE, || async {
        let canary = stage.app.canaries().get("hello").await.unwrap();
        let primary = canary.status?.primary_revision?;
        let deployment = stage.api::<Deployment>().get(&format!("hello-{primary}")).await.unwrap();
        let ready = deployment.status?.ready_replicas;
        (canary.spec.replicas == Some(replicas) && ready == Some(replicas)).then_some(())
    })
    .await;
}

#[tokio::test]
#[ignore = "full"]
async fn an_autoscaler_scales_the_canary_by_the_use_of_its_containers() {
    if std::env::var("METRICS_SERVER").unwrap_or_default().is_empty() {
        println!("SKIPPED: needs metrics-server, which is in clusters of tests/cluster only");
        return;
    }
    let Some(stage) = adopted("autoscaling", Use::Alone, &["--rate", "200"], quick()).await else { return };
    let (cluster, namespace) = (stage.app.cluster.clone(), stage.app.namespace.clone());
    let file = |name: &str| cluster.file(&format!("tests/e2e/manifests/{name}")).unwrap();
    cluster.apply("kube-system", &file("metrics-server.yaml")).await.unwrap();
    let ready = ["-n", "kube-system", "rollout", "status", "deployment/metrics-server", "--timeout=120s"];
    cluster.kubectl(&ready, None).await.unwrap();
    cluster.apply("kube-system", &file("metrics-api.yaml")).await.unwrap();
    let uses = format!("/apis/metrics.k8s.io/v1beta1/namespaces/{namespace}/pods");
    eventually("metrics of Pods", 3 * MINUTE, || async {
        let uses: Value = serde_json::from_str(&cluster.kubectl(&["get", "--raw", &uses], None).await.ok()?).ok()?;
        (!uses["items"].as_array()?.is_empty()).then_some(())
    })
    .await;

    // Less than the load takes, so that it goes up to the maximum.
    let low = json!({"type": "Utilization", "averageUtilization": 10});
    // The one of the Deployment, by name.
    let deployment = json!({"apiVersion": "apps/v1", "kind": "Deployment", "name": "hello"});
    cluster.apply(&namespace, &autoscaler("hello", &deployment, 2, 4, &low)).await.unwrap();
    let by_name =
        json!({"autoscalerRef": {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "name": "hello"}});
    stage.app.patch_canary(by_name).await.unwrap();
    scaled(&stage, 4).await;
    let applied = stage.app.release(&[("VERSION", "v2")]).await.unwrap();
    let done = stage.app.ends(applied, Phase::Succeeded, 3 * MINUTE).await.unwrap().status;
    let serving = stage.app.pods_of(&done.primary_revision.unwrap()).await.unwrap();
    assert_eq!(serving.len(), 4, "the release went on with what the autoscaler asks for");
    // Its copy follows it.
    cluster.apply(&namespace, &autoscaler("hello", &deployment, 2, 3, &low)).await.unwrap();
    scaled(&stage, 3).await;

    // And one that names the Canary itself.
    stage.app.patch_canary(json!({"autoscalerRef": null})).await.unwrap();
    let autoscalers = stage.api::<HorizontalPodAutoscaler>();
    eventually("the end of the copy", MINUTE, || async {
        autoscalers.get_opt("hello-primary").await.unwrap().is_none().then_some(())
    })
    .await;
    let canary = json!({"apiVersion": "sluice.dev/v1beta1", "kind": "Canary", "name": "hello"});
    cluster.apply(&namespace, &autoscaler("direct", &canary, 1, 3, &low)).await.unwrap();
    scaled(&stage, 3).await;

    // It sees the Pods of both versions: what they use together stays the same in a release, and so does the number.
    stage.app.patch_canary(json!({"analysis": {"interval": "40s"}})).await.unwrap();
    let used = use_of_all(&cluster, &uses).await;
    let average = json!({"type": "AverageValue", "averageValue": format!("{}n", used * 2 / 5)});
    cluster.apply(&namespace, &autoscaler("direct", &canary, 1, 3, &average)).await.unwrap();
    let scaled_at = async || {
        let status = autoscalers.get("direct").await.unwrap().status?;
        let metric = status.current_metrics?.pop()?.container_resource?.current;
        // Two and a half are three: by what it has measured, not by its bounds.
        let by_use = |it: &HorizontalPodAutoscalerCondition| it.type_ == "ScalingLimited" && it.status == "False";
        let settled = status.conditions?.iter().any(by_use) && status.desired_replicas == 3;
        (metric.average_value.is_some() && settled).then_some(status.last_scale_time)
    };
    let before = eventually(&format!("3 replicas for a use of {used} nanocores"), 2 * MINUTE, &scaled_at).await;
    // It looks every 15 s; each of two steps is 40 s.
    let applied = stage.app.release(&[("VERSION", "v3")]).await.unwrap();
    stage.app.ends(applied, Phase::Succeeded, 4 * MINUTE).await.unwrap();
    let after = eventually("3 replicas", MINUTE, &scaled_at).await;
    assert_eq!(after, before, "an autoscaler changed the number in a release, for a use of {used} nanocores");
    stage.app.patch_canary(json!({"analysis": {"interval": "4s"}})).await.unwrap();

    cluster.kubectl(&["-n", &namespace, "delete", "hpa", "direct", "hello"], None).await.unwrap();
    cluster.kubectl(&["-n", &namespace, "scale", "canary/hello", "--replicas=2"], None).await.unwrap();
    scaled(&stage, 2).await;

    // The fleet has one of its own. Members that join in a release, and leave after it, cost nobody a request.
    let _expected = expect(CONTROLLERS_AWAY);
    let applied = stage.app.release(&[("VERSION", "v4")]).await.unwrap();
    stage.wait("weight 20", applied, at_weight_20).await;
    let low = ["enabled=true", "maxReplicas=3", "targetCPUUtilizationPercentage=1"];
    let low = low.map(|value| format!("fleet.autoscaling.{value}"));
    installation::upgrade(&cluster, &low.each_ref().map(String::as_str)).await;
    installation::fleet_is_ready(&cluster, 3).await;
    stage
        .app
        .history
        .wait("phase Succeeded", applied, 3 * MINUTE, |status| status.phase == Phase::Succeeded)
        .await
        .unwrap();
    // The number is the autoscaler's, so that Helm, which applies server-side, asks whether to take it.
    let by_hand = ["fleet.autoscaling.enabled=false", "--force-conflicts", "--wait", "--timeout", "180s"];
    let by_hand =
        [["upgrade", "sluice", "charts/sluice", "-n", SYSTEM, "--reuse-values", "--set"].as_slice(), &by_hand];
    cluster.helm(&by_hand.concat()).await.unwrap();
    installation::fleet_is_ready(&cluster, 2).await;
    cluster.kubectl(&["delete", "apiservice", "v1beta1.metrics.k8s.io"], None).await.unwrap();
    cluster.kubectl(&["-n", "kube-system", "delete", "deployment", "metrics-server"], None).await.unwrap();
    stage.end().await;
}
