//! Canaries that cannot mean anything, each with the words that its author reads.
use serde_json::{Value, json};

use super::server::{Cluster, canary, check};

#[tokio::test]
async fn canaries_that_cannot_mean_anything_are_refused_in_words_that_help() {
    let Some(cluster) = Cluster::start("refused").await else { return };
    let api = cluster.canaries();
    let metric = |metric: Value| json!([metric]);
    let not_mesh = "spec.service.gateways, gatewayRefs, hosts, delegation, meshName and backends belong to another mesh: the fleet splits the traffic of the Service itself. Remove them, and lead what comes from outside to the Service by a route of your own";
    let own_tls = "spec.service.trafficPolicy.tls, portLevelSettings, tunnel and proxyProtocol are not needed or not supported: between proxies of Sluice it is always mTLS. Remove them";
    let no_such_match = "match: sourceLabels, sourceNamespace, gateways, port and scheme are not supported in this version; more requests would match. Remove them";
    let one_path = "spec.analysis.match: say no uri beside one in spec.service.match, or beside spec.service.rewrite.uri: a request has one path";
    let requests_only = "spec.analysis.match, sessionAffinity and mirror are for HTTP: on a port whose appProtocol is not, such as tcp or https, there are no requests. Remove them";
    let own_cookie = "spec.analysis.sessionAffinity.domain, httpOnly, partitioned, path, sameSite and secure are not supported in this version: the cookie is always `Path=/; HttpOnly`. Remove them";
    let no_suffix =
        "match: suffix is not supported in this version; say regex, such as `.*[.]example[.]com`, in its place";
    let no_regex = "match: regex is no regular expression of RE2";
    let not_ours = "spec.service.headers: set, add and remove take names of headers, but of none that frames or addresses the message (Host, Content-Length, Connection and the like), and of none of Sluice's own (x-sluice-...). Remove it";
    let http_only = "spec.service.timeout, retries, headers, match, rewrite, corsPolicy and fault are for HTTP: on a port whose appProtocol is not, such as tcp or https, there are no requests. Remove them";
    let not_generated = "spec.service.apex, primary, canary, unmanagedMetadata and trafficDistribution are not supported in this version; remove them";
    let not_ready =
        "spec.analysis.primaryReadyThreshold and canaryReadyThreshold are not supported in this version; remove them";
    let no_mirror = "spec.analysis.mirrorWeight has no meaning without mirror: true. Say so, or remove it";
    let one_strategy = "spec.analysis: say exactly one of stepWeight, stepWeights and iterations";
    let not_blue_green = "spec.analysis.maxWeight and stepWeightPromotion have no meaning beside iterations: blue/green moves all traffic at once. Remove them";
    let not_refs = "spec.ingressRef, spec.routeRef and spec.upstreamRef are not needed: the fleet splits the traffic of the Service itself. Remove them";
    let not_http = "spec.analysis.metrics: a built-in metric counts HTTP requests and can never have samples on a port whose appProtocol is not HTTP, such as tcp or https; use a templateRef or a query";
    let deployments_only = "spec.targetRef: this version releases apps/v1 Deployments only";
    let cases: Vec<(Vec<(&str, Value)>, &str)> = vec![
        // The Canary itself.
        (
            vec![("/metadata/name", json!("c".repeat(53)))],
            "metadata.name: a Canary's name has at most 52 characters, so that the names made from it fit in 63",
        ),
        (
            vec![("/spec/analysis", Value::Null)],
            "spec.analysis is required: without it nothing would judge a release (or say skipAnalysis: true)",
        ),
        (
            vec![("/spec/provider", json!("istio"))],
            "spec.provider is not needed: Sluice brings its own proxies. Remove it",
        ),
        (
            vec![(
                "/spec/autoscalerRef",
                json!({"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "name": "cart"}),
            )],
            "spec.autoscalerRef: a ScaledObject is not supported in this version; let its spec.scaleTargetRef name this Canary (apiVersion sluice.dev/v1beta1, kind Canary), and remove autoscalerRef",
        ),
        (
            vec![("/spec/autoscalerRef", json!({"apiVersion": "apps/v1", "kind": "Deployment", "name": "cart"}))],
            "spec.autoscalerRef: name a HorizontalPodAutoscaler of autoscaling/v2",
        ),
        (
            vec![(
                "/spec/autoscalerRef",
                json!({"kind": "HorizontalPodAutoscaler", "name": "cart", "primaryScalerQueries": {"a": "b"}}),
            )],
            "spec.autoscalerRef.primaryScalerQueries belongs to a ScaledObject, which is not supported in this version; remove it",
        ),
        (
            vec![(
                "/spec/autoscalerRef",
                json!({"kind": "HorizontalPodAutoscaler", "name": "cart", "primaryScalerReplicas": {"minReplicas": 3, "maxReplicas": 2}}),
            )],
            "spec.autoscalerRef.primaryScalerReplicas: minReplicas is larger than maxReplicas",
        ),
        (vec![("/spec/ingressRef", json!({"name": "cart"}))], not_refs),
        (vec![("/spec/routeRef", json!({"name": "cart"}))], not_refs),
        (vec![("/spec/upstreamRef", json!({"name": "cart"}))], not_refs),
        (
            vec![("/spec/canaryAnalysis", json!({"interval": "1m"}))],
            "spec.canaryAnalysis is the old name of spec.analysis: rename it",
        ),
        (
            vec![("/spec/revertOnDeletion", json!(false))],
            "spec.revertOnDeletion: Sluice always hands the traffic back when a Canary is deleted; remove the field or set it to true",
        ),
        (
            vec![("/spec/progressDeadlineSeconds", json!(0))],
            "spec.progressDeadlineSeconds in body should be greater than or equal to 1",
        ),
        (
            vec![("/spec/revisionHistoryLimit", json!(21))],
            "spec.revisionHistoryLimit in body should be less than or equal to 20",
        ),
        (vec![("/spec/replicas", json!(-1))], ".spec.replicas: Invalid value: -1: should be a non-negative integer"),
        (
            vec![("/spec/metricsServer", json!("prometheus:9090"))],
            "spec.metricsServer in body should match '^https?://'",
        ),
        // The target.
        (vec![("/spec/targetRef/kind", json!("DaemonSet"))], deployments_only),
        (vec![("/spec/targetRef/apiVersion", json!("serving.knative.dev/v1"))], deployments_only),
        (vec![("/spec/targetRef/name", json!(""))], "spec.targetRef.name in body should be at least 1 chars long"),
        (vec![("/spec/targetRef", Value::Null)], "spec.targetRef: Required value"),
        // The Service.
        (vec![("/spec/service", Value::Null)], "spec.service: Required value"),
        (vec![("/spec/service/port", json!(0))], "spec.service.port in body should be greater than or equal to 1"),
        (vec![("/spec/service/port", json!(65536))], "spec.service.port in body should be less than or equal to 65535"),
        (
            vec![("/spec/service/name", json!("s".repeat(56)))],
            "spec.service.name: Too long: may not be more than 55 bytes",
        ),
        (
            vec![("/spec/service/portName", json!("a-name-too-long-for-a-port"))],
            "spec.service.portName: Too long: may not be more than 15 bytes",
        ),
        (
            vec![("/spec/service/targetPort", json!("a-name-too-long-for-a-port"))],
            "spec.service.targetPort: Too long: may not be more than 15 bytes",
        ),
        (
            vec![("/spec/service/headless", json!(true))],
            "spec.service.headless is refused: clients of a headless Service dial the Pods and go past the fleet",
        ),
        (vec![("/spec/service/timeout", json!("15s")), ("/spec/service/appProtocol", json!("HTTPS"))], http_only),
        (
            vec![("/spec/service/backendTimeout", json!("15s"))],
            "spec.service.backendTimeout is not supported in this version; remove it",
        ),
        (vec![("/spec/service/gateways", json!(["istio-system/public"]))], not_mesh),
        (vec![("/spec/service/gatewayRefs", json!([{"name": "public"}]))], not_mesh),
        (vec![("/spec/service/hosts", json!(["shop.example.com"]))], not_mesh),
        (vec![("/spec/service/delegation", json!(true))], not_mesh),
        (vec![("/spec/service/meshName", json!("m"))], not_mesh),
        (vec![("/spec/service/backends", json!(["b"]))], not_mesh),
        (vec![("/spec/service/trafficPolicy", json!({"tls": {"mode": "DISABLE"}}))], own_tls),
        (
            vec![("/spec/service/trafficPolicy", json!({"connectionPool": {"http": {"h2UpgradePolicy": "UPGRADE"}}}))],
            "spec.service.trafficPolicy.connectionPool.http.h2UpgradePolicy, useClientProtocol and maxConcurrentStreams are not supported in this version: the application is spoken to as the client speaks. Remove them",
        ),
        (
            vec![(
                "/spec/service/trafficPolicy",
                json!({"connectionPool": {"tcp": {"tcpKeepalive": {"time": "10s"}}}}),
            )],
            "spec.service.trafficPolicy.connectionPool.tcp.tcpKeepalive and maxConnectionDuration are not supported in this version; remove them",
        ),
        (
            vec![("/spec/service/trafficPolicy", json!({"outlierDetection": {"baseEjectionTime": "30s"}}))],
            "spec.service.trafficPolicy.outlierDetection: say consecutive5xxErrors or consecutiveGatewayErrors",
        ),
        (
            vec![(
                "/spec/service/trafficPolicy",
                json!({"outlierDetection": {"consecutive5xxErrors": 3, "consecutiveErrors": 3}}),
            )],
            "spec.service.trafficPolicy.outlierDetection.consecutiveErrors, splitExternalLocalOriginErrors, consecutiveLocalOriginFailures, minHealthPercent and interval are not supported: failures are counted as they come (consecutive5xxErrors, consecutiveGatewayErrors). Remove them",
        ),
        (
            vec![("/spec/service/trafficPolicy", json!({"connectionPool": {"tcp": {"connectTimeout": "0s"}}}))],
            "spec.service.trafficPolicy.connectionPool.tcp.connectTimeout: from 1ms to 1h",
        ),
        (
            vec![(
                "/spec/service/trafficPolicy",
                json!({"outlierDetection": {"consecutive5xxErrors": 3, "baseEjectionTime": "0s"}}),
            )],
            "spec.service.trafficPolicy.outlierDetection.baseEjectionTime must be above 0",
        ),
        (
            vec![("/spec/service/trafficPolicy", json!({"loadBalancer": {"warmupDurationSecs": "0ms"}}))],
            "spec.service.trafficPolicy.loadBalancer.warmupDurationSecs must be above 0",
        ),
        (
            vec![("/spec/service/rewrite", json!({"uri": "/a?b"}))],
            "spec.service.rewrite.uri in body should match '^/[A-Za-z0-9._~!$&\'()*+,;=:@%/-]*$'",
        ),
        (
            vec![("/spec/service/rewrite", json!({"authority": "web:65536"}))],
            "spec.service.rewrite.authority in body should match '^([A-Za-z0-9._-]+|\\[[0-9A-Fa-f:.]+\\])(:([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]))?$'",
        ),
        (
            vec![("/spec/service/rewrite", json!({"uriRegexRewrite": {"match": "a", "rewrite": "\\x"}}))],
            r#"spec.service.rewrite.uriRegexRewrite.rewrite in body should match '^([!"$-;=?-\[\]-_a-z{|}~]|\\[0-9\\])*$'"#,
        ),
        (
            vec![("/spec/service/trafficPolicy", json!({"loadBalancer": {"simple": "ROUND_ROBIN"}}))],
            "spec.service.trafficPolicy.loadBalancer.simple: Sluice chooses by LEAST_REQUEST only; remove it",
        ),
        (
            vec![("/spec/service/trafficPolicy", json!({"loadBalancer": {"consistentHash": {"useSourceIp": true}}}))],
            "spec.service.trafficPolicy.loadBalancer.consistentHash and warmup are not supported in this version (warmupDurationSecs is). Remove them",
        ),
        (
            vec![("/spec/service/match", json!([{"name": "all"}]))],
            "match: say uri, method, authority, headers, withoutHeaders or queryParams; an empty one would match every request",
        ),
        (
            vec![("/spec/service/match", json!([{"queryParams": {"q".repeat(257): {}}}]))],
            "match: queryParams takes names of 1 to 256 characters",
        ),
        (
            vec![("/spec/service/match", json!([{"queryParams": {"": {}}}]))],
            "match: queryParams takes names of 1 to 256 characters",
        ),
        (
            vec![("/spec/service/match", json!([{"uri": {}}]))],
            "match: uri, method and authority need exact, prefix or regex",
        ),
        (
            vec![("/spec/service/match", json!([{"uri": {"exact": "/", "prefix": "/"}}]))],
            "match: say one of exact, prefix and regex",
        ),
        (vec![("/spec/service/match", json!([{"uri": {"regex": "/(a"}}]))], no_regex),
        (vec![("/spec/service/match", json!([{"headers": {"x": {"suffix": "b"}}}]))], no_suffix),
        (vec![("/spec/analysis/match", json!([{"headers": {"x": {"suffix": "b"}}}]))], no_suffix),
        (
            vec![("/spec/service/match", json!([{"headers": {"a b": {"exact": "c"}}}]))],
            "match: headers and withoutHeaders take names of headers",
        ),
        (vec![("/spec/service/match", json!([{"uri": {"prefix": "/"}, "sourceLabels": {"app": "b"}}]))], no_such_match),
        (
            vec![
                ("/spec/service/match", json!([{"uri": {"prefix": "/"}}])),
                ("/spec/service/appProtocol", json!("tcp")),
            ],
            http_only,
        ),
        (vec![("/spec/service/rewrite", json!({}))], "spec.service.rewrite: say uri, uriRegexRewrite or authority"),
        (
            vec![("/spec/service/rewrite", json!({"uri": "/", "uriRegexRewrite": {"match": "a", "rewrite": "b"}}))],
            "spec.service.rewrite: say either uri or uriRegexRewrite",
        ),
        (
            vec![("/spec/service/rewrite", json!({"uriRegexRewrite": {"match": "(a", "rewrite": "b"}}))],
            "spec.service.rewrite.uriRegexRewrite.match is no regular expression of RE2",
        ),
        (
            vec![("/spec/service/rewrite", json!({"uri": "/", "type": "ReplaceFullPath"}))],
            "spec.service.rewrite.type belongs to the Gateway API: remove it; uri replaces what a prefix of spec.service.match matched",
        ),
        (
            vec![("/spec/service/retries", json!({"attempts": 11}))],
            "spec.service.retries.attempts in body should be less than or equal to 10",
        ),
        (
            vec![("/spec/service/retries", json!({"attempts": 3})), ("/spec/service/appProtocol", json!("tcp"))],
            http_only,
        ),
        (vec![("/spec/service/headers", json!({"request": {"set": {"Host": "b"}}}))], not_ours),
        (vec![("/spec/service/headers", json!({"response": {"add": {"a b": "c"}}}))], not_ours),
        (vec![("/spec/service/headers", json!({"response": {"remove": ["X-Sluice-Response-Flag"]}}))], not_ours),
        (
            vec![("/spec/service/mirror", json!([{"backendRef": {"name": "m"}}]))],
            "spec.service.mirror is not supported in this version; remove it",
        ),
        (
            vec![("/spec/service/corsPolicy", json!({"allowMethods": ["GET"]}))],
            "spec.service.corsPolicy: say allowOrigins",
        ),
        (
            vec![("/spec/service/corsPolicy", json!({"allowOrigins": [{}]}))],
            "spec.service.corsPolicy.allowOrigins: say exact, prefix or regex",
        ),
        (vec![("/spec/service/apex", json!({"labels": {"a": "b"}}))], not_generated),
        (vec![("/spec/service/primary", json!({"labels": {"a": "b"}}))], not_generated),
        (vec![("/spec/service/canary", json!({"labels": {"a": "b"}}))], not_generated),
        (vec![("/spec/service/unmanagedMetadata", json!({"labels": ["a"]}))], not_generated),
        (vec![("/spec/service/trafficDistribution", json!("PreferClose"))], not_generated),
        (
            vec![("/spec/service/additional", json!([{"name": "cart-admin"}, {"name": "cart"}]))],
            "spec.service.additional names the Service itself: name others only",
        ),
        // The strategy.
        (vec![("/spec/analysis/stepWeight", Value::Null)], one_strategy),
        (vec![("/spec/analysis/stepWeights", json!([5, 10])), ("/spec/analysis/maxWeight", Value::Null)], one_strategy),
        (
            vec![
                ("/spec/analysis/iterations", json!(5)),
                ("/spec/analysis/stepWeight", Value::Null),
                ("/spec/analysis/stepWeights", json!([5])),
                ("/spec/analysis/maxWeight", Value::Null),
            ],
            one_strategy,
        ),
        (
            vec![("/spec/analysis/stepWeight", json!(60))],
            "spec.analysis.stepWeight is larger than maxWeight: the first step would overshoot",
        ),
        (
            vec![("/spec/analysis/stepWeight", json!(0))],
            "spec.analysis.stepWeight in body should be greater than or equal to 1",
        ),
        (
            vec![("/spec/analysis/maxWeight", json!(101))],
            "spec.analysis.maxWeight in body should be less than or equal to 100",
        ),
        (
            vec![
                ("/spec/analysis/stepWeight", Value::Null),
                ("/spec/analysis/maxWeight", Value::Null),
                ("/spec/analysis/stepWeights", json!([10, 5])),
            ],
            "spec.analysis.stepWeights must ascend",
        ),
        (
            vec![
                ("/spec/analysis/stepWeight", Value::Null),
                ("/spec/analysis/maxWeight", Value::Null),
                ("/spec/analysis/stepWeights", json!([5, 101])),
            ],
            "spec.analysis.stepWeights[1] in body should be less than or equal to 100",
        ),
        (
            vec![
                ("/spec/analysis/stepWeight", Value::Null),
                ("/spec/analysis/maxWeight", Value::Null),
                ("/spec/analysis/stepWeights", json!([5, 5])),
            ],
            "spec.analysis.stepWeights[1]: Duplicate value: 5",
        ),
        (
            vec![
                ("/spec/analysis/stepWeight", Value::Null),
                ("/spec/analysis/maxWeight", Value::Null),
                ("/spec/analysis/stepWeights", json!([])),
            ],
            "spec.analysis.stepWeights in body should have at least 1 items",
        ),
        (
            vec![("/spec/analysis/stepWeight", Value::Null), ("/spec/analysis/stepWeights", json!([5, 10]))],
            "spec.analysis.maxWeight has no meaning beside stepWeights: their last entry is the maximum. Remove it",
        ),
        (vec![("/spec/analysis/stepWeight", Value::Null), ("/spec/analysis/iterations", json!(5))], not_blue_green),
        (
            vec![
                ("/spec/analysis/stepWeight", Value::Null),
                ("/spec/analysis/maxWeight", Value::Null),
                ("/spec/analysis/iterations", json!(5)),
                ("/spec/analysis/stepWeightPromotion", json!(5)),
            ],
            not_blue_green,
        ),
        // Budgets.
        (vec![("/spec/analysis/interval", Value::Null)], "spec.analysis.interval: Required value"),
        (
            vec![("/spec/analysis/interval", json!("1 minute"))],
            "spec.analysis.interval in body should match '^([0-9]{1,7}(ms|s|m|h))+$'",
        ),
        (
            vec![("/spec/analysis/interval", json!("60"))],
            "spec.analysis.interval in body should match '^([0-9]{1,7}(ms|s|m|h))+$'",
        ),
        (
            vec![("/spec/analysis/threshold", json!(0))],
            "spec.analysis.threshold in body should be greater than or equal to 1",
        ),
        (
            vec![("/spec/analysis/errorDeadline", json!("soon"))],
            "spec.analysis.errorDeadline in body should match '^([0-9]{1,7}(ms|s|m|h))+$'",
        ),
        (
            vec![("/spec/analysis/guard", json!({"errorMargin": 0}))],
            "spec.analysis.guard.errorMargin in body should be greater than or equal to 1",
        ),
        (
            vec![("/spec/analysis/guard", json!({"latencyMargin": 101}))],
            "spec.analysis.guard.latencyMargin in body should be less than or equal to 100",
        ),
        (
            vec![("/spec/analysis/inconclusive", json!({"then": "Promote"}))],
            "spec.analysis.inconclusive.then: Unsupported value: \"Promote\": supported values: \"Rollback\", \"Pause\"",
        ),
        // What would not be done.
        (
            vec![("/spec/analysis/webhooks", json!([{"name": "load", "url": "http://load"}]))],
            "spec.analysis.webhooks is not supported in this version; the release would run without this gate. Remove it",
        ),
        (
            vec![("/spec/analysis/alerts", json!([{"name": "chat"}]))],
            "spec.analysis.alerts is not supported in this version; nobody would be alerted. Remove it",
        ),
        (
            vec![
                ("/spec/analysis/match", json!([{"uri": {"prefix": "/a"}}])),
                ("/spec/service/match", json!([{"uri": {"prefix": "/b"}}])),
            ],
            one_path,
        ),
        (
            vec![
                ("/spec/analysis/match", json!([{"uri": {"prefix": "/a"}}])),
                ("/spec/service/rewrite", json!({"uri": "/b"})),
            ],
            one_path,
        ),
        (
            vec![
                ("/spec/analysis/match", json!([{"headers": {"x": {}}}])),
                ("/spec/analysis/metrics", json!([])),
                ("/spec/service/appProtocol", json!("tcp")),
            ],
            requests_only,
        ),
        (
            vec![("/spec/analysis/sessionAffinity", json!({"cookieName": "a=b"}))],
            "spec.analysis.sessionAffinity.cookieName in body should match '^[A-Za-z0-9!#$%&\'*+.^_`|~-]+$'",
        ),
        (
            vec![("/spec/analysis/sessionAffinity", json!({"cookieName": "c", "primaryCookieName": "p"}))],
            "spec.analysis.sessionAffinity.primaryCookieName is not needed: one cookie keeps users on either version. Remove it",
        ),
        (vec![("/spec/analysis/sessionAffinity", json!({"cookieName": "c", "domain": "example.com"}))], own_cookie),
        (vec![("/spec/analysis/sessionAffinity", json!({"cookieName": "c", "httpOnly": true}))], own_cookie),
        (vec![("/spec/analysis/sessionAffinity", json!({"cookieName": "c", "partitioned": true}))], own_cookie),
        (vec![("/spec/analysis/sessionAffinity", json!({"cookieName": "c", "path": "/cart"}))], own_cookie),
        (vec![("/spec/analysis/sessionAffinity", json!({"cookieName": "c", "sameSite": "Lax"}))], own_cookie),
        (vec![("/spec/analysis/sessionAffinity", json!({"cookieName": "c", "secure": true}))], own_cookie),
        // Faults on purpose.
        (vec![("/spec/service/fault", json!({}))], "spec.service.fault: say delay or abort"),
        (
            vec![(
                "/spec/service/fault",
                json!({"headers": {"a b": {}}, "abort": {"percentage": {"value": 1}, "httpStatus": 503}}),
            )],
            "spec.service.fault.headers takes names of headers",
        ),
        (
            vec![("/spec/service/fault", json!({"delay": {"percentage": {"value": 1}, "fixedDelay": "61m"}}))],
            "spec.service.fault.delay.fixedDelay: from 1ms to 1h",
        ),
        (
            vec![("/spec/service/fault", json!({"delay": {"percentage": {"value": 1}, "fixedDelay": "0s"}}))],
            "spec.service.fault.delay.fixedDelay: from 1ms to 1h",
        ),
        (
            vec![("/spec/service/fault", json!({"delay": {"percentage": {"value": 1}}}))],
            "spec.service.fault.delay.fixedDelay: from 1ms to 1h",
        ),
        (
            vec![("/spec/service/fault", json!({"delay": {"percent": 10, "fixedDelay": "1s"}}))],
            "spec.service.fault.delay: say percentage: {value: 10} and fixedDelay; percent and exponentialDelay are not supported",
        ),
        (
            vec![("/spec/service/fault", json!({"delay": {"percentage": {"value": 101}, "fixedDelay": "1s"}}))],
            "spec.service.fault: percentage.value: from 0.0001 to 100",
        ),
        (
            vec![("/spec/service/fault", json!({"abort": {"percentage": {"value": 0}, "httpStatus": 503}}))],
            "spec.service.fault: percentage.value: from 0.0001 to 100",
        ),
        (
            vec![("/spec/service/fault", json!({"abort": {"percentage": {"value": 1}, "httpStatus": 600}}))],
            "spec.service.fault.abort.httpStatus in body should be less than or equal to 599",
        ),
        (
            vec![(
                "/spec/service/fault",
                json!({"abort": {"percentage": {"value": 1}, "httpStatus": 503, "grpcStatus": "UNAVAILABLE"}}),
            )],
            "spec.service.fault.abort: say either httpStatus or grpcStatus; http2Error is not supported",
        ),
        (
            vec![("/spec/service/fault", json!({"abort": {"httpStatus": 503}}))],
            "spec.service.fault.abort: say percentage: {value: 10}; percent is not supported",
        ),
        (
            vec![
                ("/spec/service/fault", json!({"abort": {"percentage": {"value": 1}, "httpStatus": 503}})),
                ("/spec/analysis/metrics", json!([])),
                ("/spec/service/appProtocol", json!("tcp")),
            ],
            http_only,
        ),
        // Zones.
        (
            vec![(
                "/spec/service/trafficPolicy",
                json!({"loadBalancer": {"localityLbSetting": {"enabled": true, "failover": [{"from": "a", "to": "b"}]}}}),
            )],
            "spec.service.trafficPolicy.loadBalancer.localityLbSetting: say enabled, and nothing else: distribute, failover and failoverPriority are not supported in this version",
        ),
        (vec![("/spec/analysis/mirrorWeight", json!(50))], no_mirror),
        (vec![("/spec/analysis/mirror", json!(false)), ("/spec/analysis/mirrorWeight", json!(50))], no_mirror),
        (
            vec![("/spec/analysis/mirror", json!(true)), ("/spec/analysis/mirrorWeight", json!(0))],
            "spec.analysis.mirrorWeight in body should be greater than or equal to 1",
        ),
        (
            vec![("/spec/analysis/mirror", json!(true)), ("/spec/analysis/mirrorWeight", json!(101))],
            "spec.analysis.mirrorWeight in body should be less than or equal to 100",
        ),
        (
            vec![
                ("/spec/analysis/stepWeight", Value::Null),
                ("/spec/analysis/maxWeight", Value::Null),
                ("/spec/analysis/iterations", json!(3)),
                ("/spec/analysis/match", json!([{"headers": {"x": {}}}])),
                ("/spec/analysis/mirror", json!(true)),
            ],
            "spec.analysis.mirror has no meaning beside match and iterations: in A/B testing all requests that match go to the canary itself. Remove mirror, or say stepWeight or stepWeights in place of iterations",
        ),
        (
            vec![
                ("/spec/analysis/mirror", json!(true)),
                ("/spec/analysis/metrics", json!([])),
                ("/spec/service/appProtocol", json!("tcp")),
            ],
            requests_only,
        ),
        (vec![("/spec/analysis/primaryReadyThreshold", json!(50))], not_ready),
        (vec![("/spec/analysis/canaryReadyThreshold", json!(50))], not_ready),
        // Gates.
        (
            vec![("/spec/analysis/metrics", metric(json!({"name": "error-rate", "thresholdRange": {"max": 1}})))],
            "spec.analysis.metrics: a metric that is not request-success-rate or request-duration needs a templateRef or a query",
        ),
        (
            vec![(
                "/spec/analysis/metrics",
                metric(json!({"name": "e", "thresholdRange": {"max": 1}, "query": "up", "templateRef": {"name": "t"}})),
            )],
            "spec.analysis.metrics: say either templateRef or query",
        ),
        (
            vec![(
                "/spec/analysis/metrics",
                metric(
                    json!({"name": "e", "thresholdRange": {"max": 1}, "query": "up", "templateVariables": {"k".repeat(129): "v"}}),
                ),
            )],
            "spec.analysis.metrics[].templateVariables takes names of at most 128 characters",
        ),
        (
            vec![(
                "/spec/analysis/metrics",
                metric(json!({"name": "request-success-rate", "threshold": 99, "thresholdRange": {"min": 99}})),
            )],
            "spec.analysis.metrics[].threshold is deprecated and not supported: use thresholdRange.min or thresholdRange.max",
        ),
        (
            vec![("/spec/analysis/metrics", metric(json!({"name": "request-success-rate"})))],
            "spec.analysis.metrics[].thresholdRange is required: say min, max or both",
        ),
        (
            vec![("/spec/analysis/metrics", metric(json!({"name": "request-success-rate", "thresholdRange": {}})))],
            "thresholdRange: say min, max or both",
        ),
        (
            vec![(
                "/spec/analysis/metrics",
                metric(json!({"name": "e", "query": "up", "thresholdRange": {"min": 2, "max": 1}})),
            )],
            "thresholdRange: min is larger than max, so nothing could pass",
        ),
        (
            vec![(
                "/spec/analysis/metrics",
                metric(json!({"name": "request-duration", "thresholdRange": {"max": 60001}})),
            )],
            "spec.analysis.metrics: request-duration is measured up to 60000 ms; a larger limit could never fail",
        ),
        (
            vec![(
                "/spec/analysis/metrics",
                metric(json!({"name": "request-duration", "interval": "1d", "thresholdRange": {"max": 500}})),
            )],
            "spec.analysis.metrics[0].interval in body should match '^([0-9]{1,7}(ms|s|m|h))+$'",
        ),
        (
            vec![(
                "/spec/analysis/metrics",
                metric(json!({"name": "request-duration", "minSamples": 0, "thresholdRange": {"max": 500}})),
            )],
            "spec.analysis.metrics[0].minSamples in body should be greater than or equal to 1",
        ),
        (
            vec![(
                "/spec/analysis/metrics",
                json!([{"name": "e", "query": "up", "thresholdRange": {"max": 1}}, {"name": "e", "query": "up", "thresholdRange": {"max": 1}}]),
            )],
            "spec.analysis.metrics[1]: Duplicate value: {\"name\":\"e\"}",
        ),
        (vec![("/spec/service/appProtocol", json!("TCP"))], not_http),
        (vec![("/spec/service/appProtocol", json!("kubernetes.io/wss"))], not_http),
        (vec![("/spec/service/appProtocol", json!("mysql"))], not_http),
    ];
    let table: Vec<(&[(&str, Value)], &str)> =
        cases.iter().map(|(changes, words)| (changes.as_slice(), *words)).collect();
    check(&api, &canary(), &table).await;
}
