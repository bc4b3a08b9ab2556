//! What a real API server accepts and refuses by the CRDs alone, and the words that people read then.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod refused;
mod server;

use kube::api::{Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use self::server::{Cluster, canary, check, refusal, with};

#[tokio::test]
async fn canaries_as_people_write_them_are_accepted_with_defaults() {
    let Some(cluster) = Cluster::start("accepted").await else { return };
    let api = cluster.canaries();
    let accepted = refusal(&api, &canary()).await.unwrap();
    assert_eq!(
        accepted.data["spec"],
        json!({
            "targetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "cart"},
            "service": {"port": 80, "portName": "http", "portDiscovery": false},
            "analysis": {
                "interval": "30s", "stepWeight": 10, "maxWeight": 50, "threshold": 1, "errorDeadline": "10m",
                "inconclusive": {"after": "10m", "then": "Rollback"},
                "guard": {"enabled": true, "errorMargin": 5, "latencyMargin": 10},
                "metrics": [{
                    "name": "request-success-rate", "interval": "1m", "minSamples": 10, "thresholdRange": {"min": 99}
                }]
            },
            "progressDeadlineSeconds": 600, "revisionHistoryLimit": 3, "scaleDownDelaySeconds": 300, "drainSeconds": 30,
            "skipAnalysis": false, "suspend": false
        }),
        "replicas has no default: it is taken over from the Deployment"
    );
    // What was accepted is what the types read.
    let typed: sluice_crds::Canary = serde_json::from_value(serde_json::to_value(&accepted).unwrap()).unwrap();
    assert_eq!(typed.spec.service_name(), "cart");

    let remove = Value::Null;
    for changes in [
        vec![("/metadata/name", json!("c".repeat(52)))],
        vec![("/spec/analysis", remove.clone()), ("/spec/skipAnalysis", json!(true))],
        vec![("/spec/revertOnDeletion", json!(true)), ("/spec/service/headless", json!(false))],
        vec![("/spec/targetRef/apiVersion", remove.clone())],
        vec![("/spec/service/targetPort", json!("web"))],
        vec![("/spec/service/targetPort", json!(8080))],
        vec![("/spec/service/appProtocol", json!("kubernetes.io/h2c"))],
        // A/B testing as in Flagger's docs, and Istio's words for everything else.
        vec![
            ("/spec/analysis/iterations", json!(10)),
            ("/spec/analysis/stepWeight", remove.clone()),
            ("/spec/analysis/maxWeight", remove.clone()),
            (
                "/spec/analysis/match",
                json!([
                    {"headers": {"user-agent": {"regex": ".*Firefox.*"}}},
                    {"headers": {"cookie": {"regex": "^(.*?;)?(canary=always)(;.*)?$"}}},
                ]),
            ),
        ],
        vec![
            ("/spec/analysis/sessionAffinity", json!({"cookieName": "flagger-cookie", "maxAge": 21600})),
            (
                "/spec/service/match",
                json!([{"uri": {"prefix": "/api"}, "method": {"exact": "GET"}, "withoutHeaders": {"x": {}}}]),
            ),
            ("/spec/service/rewrite", json!({"uri": "/", "authority": "cart.shop.svc:80"})),
            (
                "/spec/service/corsPolicy",
                json!({
                    "allowOrigins": [{"regex": "https://.*[.]example[.]com"}], "allowMethods": ["GET"], "maxAge": "24h",
                    "allowCredentials": true, "allowHeaders": ["x-some-header"], "exposeHeaders": ["x-more"],
                }),
            ),
            (
                "/spec/service/trafficPolicy",
                json!({
                    "connectionPool": {
                        "tcp": {"maxConnections": 100, "connectTimeout": "2s"},
                        "http": {"http1MaxPendingRequests": 10, "http2MaxRequests": 100, "maxRetries": 3, "idleTimeout": "1m"},
                    },
                    "outlierDetection": {"consecutive5xxErrors": 5},
                    "loadBalancer": {"simple": "LEAST_REQUEST", "warmupDurationSecs": "30s"},
                }),
            ),
        ],
        vec![("/spec/service/appProtocol", json!("GRPC"))],
        vec![
            ("/spec/service/appProtocol", json!("tcp")),
            (
                "/spec/analysis/metrics",
                json!([{"name": "e", "templateRef": {"name": "t"}, "thresholdRange": {"max": 1}}]),
            ),
        ],
        vec![("/spec/service/appProtocol", json!("tcp")), ("/spec/analysis/metrics", remove.clone())],
        vec![("/spec/analysis/stepWeight", json!(50))],
        vec![("/spec/analysis/stepWeightPromotion", json!(25))],
        vec![
            ("/spec/analysis/stepWeight", remove.clone()),
            ("/spec/analysis/maxWeight", remove.clone()),
            ("/spec/analysis/stepWeights", json!([1, 2, 5, 100])),
        ],
        vec![
            ("/spec/analysis/stepWeight", remove.clone()),
            ("/spec/analysis/maxWeight", remove.clone()),
            ("/spec/analysis/iterations", json!(10)),
        ],
        vec![
            (
                "/spec/service/fault",
                json!({
                    "headers": {"x-rehearse": {"exact": "yes"}},
                    "delay": {"percentage": {"value": 0.1}, "fixedDelay": "1h"},
                    "abort": {"percentage": {"value": 100}, "grpcStatus": "DEADLINE_EXCEEDED"},
                }),
            ),
            ("/spec/service/trafficPolicy", json!({"loadBalancer": {"localityLbSetting": {"enabled": true}}})),
        ],
        // As Flagger's docs have it; with blue/green; and among those who match.
        vec![("/spec/analysis/mirror", json!(true)), ("/spec/analysis/mirrorWeight", json!(100))],
        vec![
            ("/spec/analysis/stepWeight", remove.clone()),
            ("/spec/analysis/maxWeight", remove.clone()),
            ("/spec/analysis/iterations", json!(10)),
            ("/spec/analysis/mirror", json!(true)),
        ],
        vec![("/spec/analysis/mirror", json!(true)), ("/spec/analysis/match", json!([{"headers": {"x": {}}}]))],
        vec![("/spec/analysis/mirror", json!(false)), ("/spec/service/appProtocol", json!("GRPC"))],
        vec![("/spec/analysis/inconclusive", json!({"then": "Pause", "after": "1h30m"}))],
        vec![("/spec/analysis/guard", json!({"enabled": false}))],
        vec![("/spec/analysis/guard", json!({"errorMargin": 100, "latencyMargin": 1}))],
        vec![(
            "/spec/analysis/metrics",
            json!([
                {"name": "request-success-rate", "thresholdRange": {"min": 99.5}, "interval": "90s"},
                {"name": "request-duration", "thresholdRange": {"max": 60000}, "interval": "500ms"},
                {"name": "mine", "query": "sum(up)", "thresholdRange": {"min": 1, "max": 1}},
                {"name": "theirs", "templateRef": {"name": "t", "namespace": "n"}, "templateVariables": {"a": "b"}, "thresholdRange": {"max": 1}}
            ]),
        )],
    ] {
        refusal(&api, &with(canary(), &changes)).await.unwrap_or_else(|words| panic!("{changes:?}: {words}"));
    }
}

#[tokio::test]
async fn what_a_canary_is_bound_to_cannot_be_changed_and_its_scale_can() {
    let Some(cluster) = Cluster::start("changed").await else { return };
    let api = cluster.canaries();
    let named = with(canary(), &[("/spec/service/name", json!("cart"))]);
    api.create(&PostParams::default(), &serde_json::from_value(named).unwrap()).await.unwrap();
    for (patch, words) in [
        (
            json!({"spec": {"targetRef": {"name": "other"}}}),
            "spec.targetRef cannot be changed: delete this Canary and create another one",
        ),
        (
            json!({"spec": {"service": {"name": "other"}}}),
            "spec.service.name cannot be changed: delete this Canary and create another one",
        ),
        (
            json!({"spec": {"service": {"additional": [{"name": "cart-admin"}]}}}),
            "spec.service.additional cannot be changed: delete this Canary and create another one",
        ),
    ] {
        match api.patch("cart", &PatchParams::default(), &Patch::Merge(&patch)).await {
            Err(kube::Error::Api(status)) => assert!(status.message.ends_with(words), "{}", status.message),
            other => panic!("{patch}: {other:?}"),
        }
    }
    // Everything else can, and other tools scale it without knowing what it is.
    let patch = json!({"spec": {"analysis": {"threshold": 5}}});
    api.patch("cart", &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
    let scale = json!({"spec": {"replicas": 4}});
    api.patch_scale("cart", &PatchParams::default(), &Patch::Merge(&scale)).await.unwrap();
    assert_eq!(api.get("cart").await.unwrap().data["spec"]["replicas"], json!(4));
}

#[tokio::test]
async fn a_status_as_full_as_it_can_be_is_kept_whole() {
    let Some(cluster) = Cluster::start("status").await else { return };
    let api = cluster.canaries();
    api.create(&PostParams::default(), &serde_json::from_value(canary()).unwrap()).await.unwrap();
    let at = "2026-01-02T03:04:05.123456Z";
    let gate = json!({
        "name": "request-success-rate", "verdict": "Inconclusive", "value": 99.5, "primaryValue": 99.75, "limit": ">= 99",
        "samples": 7, "time": at, "windowSeconds": 12.5, "message": "7 of at least 10 requests", "query": "q".repeat(8192)
    });
    let status = json!({
        "observedGeneration": 1, "phase": "Progressing", "stage": "Judge", "stageSince": at,
        "effectiveMirror": 50,
        "traffic": {"primary": "aaaa", "canary": "bbbb", "weight": 10, "mirror": 50, "match": [{"headers": {"x": {"exact": "y"}}, "ignoreUriCase": true}]}, "requestedWeight": 10, "effectiveWeight": 10,
        "weight": "10", "step": 0, "progress": "1/5", "acknowledgedAt": at,
        "plan": {
            "revision": "bbbb", "primary": "aaaa", "startedAt": at, "steps": [{"weight": 0, "mirror": 50}, {"weight": 10}], "analysis": canary()["spec"]["analysis"]
        },
        "gates": [gate],
        "guard": {
            "signal": "Latency", "weight": 10, "canary": {"requests": 17, "bad": 9, "percent": 52.94},
            "primary": {"requests": 66, "bad": 0, "percent": 0.5}, "margin": 7.5, "slowAboveMilliseconds": 512.5,
            "evidence": 12345, "since": at, "at": at
        },
        "conditions": [{"type": "Ready", "status": "True", "reason": "R", "message": "m", "lastTransitionTime": at}]
    });
    // Nothing is pruned from the copy of the analysis, and times keep their microseconds.
    let written =
        api.patch_status("cart", &PatchParams::default(), &Patch::Merge(&json!({"status": status}))).await.unwrap();
    for (field, value) in status.as_object().unwrap() {
        assert_eq!(written.data["status"][field], *value, "{field}");
    }
    let typed: sluice_crds::Canary = serde_json::from_value(serde_json::to_value(&written).unwrap()).unwrap();
    assert_eq!(typed.status.unwrap().gates[0].samples, Some(7.0));
}

#[tokio::test]
async fn metric_templates_name_a_provider_that_exists() {
    let Some(cluster) = Cluster::start("templates").await else { return };
    let api = cluster.api("MetricTemplate", "metrictemplates");
    let base = json!({
        "apiVersion": "sluice.dev/v1beta1", "kind": "MetricTemplate", "metadata": {"name": "errors"},
        "spec": {"provider": {"type": "prometheus", "address": "http://prometheus.monitoring:9090"}, "query": "sum(errors)"}
    });
    let accepted = refusal(&api, &base).await.unwrap();
    assert_eq!(accepted.data["spec"]["provider"]["insecureSkipVerify"], json!(false));
    let full = [
        ("/spec/provider/secretRef", json!({"name": "access"})),
        ("/spec/provider/headers", json!({"X-Scope-OrgID": ["shop"]})),
        ("/spec/provider/insecureSkipVerify", json!(true)),
    ];
    refusal(&api, &with(base.clone(), &full)).await.unwrap();
    let cases: Vec<(Vec<(&str, Value)>, &str)> = vec![
        (
            vec![("/spec/provider/type", json!("datadog"))],
            "spec.provider.type: Unsupported value: \"datadog\": supported values: \"prometheus\"",
        ),
        (
            vec![("/spec/provider/address", json!("prometheus:9090"))],
            "spec.provider.address in body should match '^https?://'",
        ),
        (vec![("/spec/provider/address", Value::Null)], "spec.provider.address: Required value"),
        (
            vec![("/spec/provider/region", json!("eu-west-1"))],
            "provider.region belongs to a provider that is not supported in this version",
        ),
        (vec![("/spec/provider/headers", json!({"X Scope": ["shop"]}))], "provider.headers takes names of headers"),
        (vec![("/spec/query", json!(""))], "spec.query in body should be at least 1 chars long"),
        (vec![("/spec/query", json!("q".repeat(8193)))], "spec.query: Too long: may not be more than 8192 bytes"),
    ];
    let table: Vec<(&[(&str, Value)], &str)> =
        cases.iter().map(|(changes, words)| (changes.as_slice(), *words)).collect();
    check(&api, &base, &table).await;
}
