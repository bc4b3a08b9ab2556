//! Canaries that cannot be meant are refused at admission, with words that say what to do.

use kube::api::PostParams;
use serde_json::{Value, json};
use sluice_crds::Canary;

use crate::world::World;

#[tokio::test]
async fn invalid_canaries_are_refused_with_the_right_words() {
    let Some(world) = World::new("schema").await else { return };
    let cases: [(Value, &str); 14] = [
        (json!({"spec": {"analysis": null}}), "spec.analysis is required"),
        (
            json!({"spec": {"analysis": {"stepWeights": [1, 2]}}}),
            "say exactly one of stepWeight, stepWeights and iterations",
        ),
        (
            json!({"spec": {"analysis": {"stepWeight": null, "stepWeights": [20, 10], "maxWeight": null}}}),
            "must ascend",
        ),
        (json!({"spec": {"analysis": {"stepWeight": 60}}}), "larger than maxWeight"),
        (json!({"spec": {"analysis": {"interval": "soon"}}}), "spec.analysis.interval"),
        (
            json!({"spec": {"analysis": {"webhooks": [{"name": "load", "url": "http://x"}]}}}),
            "would run without this gate",
        ),
        (
            json!({"spec": {"analysis": {"metrics": [{"name": "mine", "thresholdRange": {"min": 1}}]}}}),
            "needs a templateRef or a query",
        ),
        (json!({"spec": {"analysis": {"metrics": [{"name": "request-duration"}]}}}), "thresholdRange is required"),
        (
            json!({"spec": {"analysis": {"metrics": [{"name": "request-duration", "thresholdRange": {"max": 70000}}]}}}),
            "could never fail",
        ),
        (json!({"spec": {"targetRef": {"kind": "DaemonSet"}}}), "Deployments only"),
        (json!({"spec": {"service": {"headless": true}}}), "go past the fleet"),
        (
            json!({"spec": {"autoscalerRef": {"kind": "ScaledObject", "name": "app"}}}),
            "let its spec.scaleTargetRef name this Canary",
        ),
        (json!({"spec": {"service": {"appProtocol": "tcp"}}}), "can never have samples"),
        (json!({"metadata": {"name": "x".repeat(53)}}), "at most 52 characters"),
    ];
    for (changes, words) in cases {
        let canary = world.canary_json("app", changes.clone());
        let canary: Canary = serde_json::from_value(canary).unwrap();
        let dry = PostParams { dry_run: true, ..PostParams::default() };
        let refused = world.api::<Canary>().create(&dry, &canary).await.expect_err(&changes.to_string()).to_string();
        assert!(refused.contains(words), "{changes}\nshould say {words:?}, and says\n{refused}");
    }
    let fine: Canary = serde_json::from_value(world.canary_json("app", json!({}))).unwrap();
    world.api::<Canary>().create(&PostParams { dry_run: true, ..PostParams::default() }, &fine).await.unwrap();
}

#[tokio::test]
async fn a_canarys_target_cannot_be_changed() {
    let Some(world) = World::new("immutable").await else { return };
    world.canary("app", json!({})).await;
    let patch = json!({"spec": {"targetRef": {"name": "other"}}});
    let params = kube::api::PatchParams::default();
    let refused = world.api::<Canary>().patch("app", &params, &kube::api::Patch::Merge(&patch)).await.unwrap_err();
    assert!(refused.to_string().contains("delete this Canary and create another one"), "{refused}");
}
