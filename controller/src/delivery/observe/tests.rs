#![allow(clippy::unwrap_used)]
use sluice_crds::CanaryStatus;

use super::*;
use serde_json::json;

fn with_more(canary: &Canary, additional: &str) -> Arc<Canary> {
    let mut canary = canary.clone();
    canary.spec.service.additional = Some(vec![sluice_crds::AdditionalService { name: additional.to_owned() }]);
    Arc::new(canary)
}

fn canary(name: &str, target: &str, service: Option<&str>, created: &str) -> Arc<Canary> {
    let canary = json!({
        "apiVersion": "sluice.dev/v1beta1", "kind": "Canary",
        "metadata": {"name": name, "namespace": "test", "uid": name, "creationTimestamp": created},
        "spec": {"targetRef": {"kind": "Deployment", "name": target}, "service": {"name": service, "port": 80}, "skipAnalysis": true},
    });
    Arc::new(serde_json::from_value(canary).unwrap())
}

fn taken_over(canary: &Canary) -> Arc<Canary> {
    let status = CanaryStatus { service: Some("web".to_owned()), ..CanaryStatus::default() };
    Arc::new(Canary { status: Some(status), ..canary.clone() })
}

#[test]
fn of_two_canaries_on_one_target_or_service_the_younger_one_waits() {
    let (early, late) = ("2026-01-01T00:00:00Z", "2026-01-01T00:00:01Z");
    let cases = [
        ("same target", canary("a", "x", None, early), canary("b", "x", Some("other"), late), Some("Deployment x")),
        (
            "same Service",
            canary("a", "x", Some("web"), early),
            canary("b", "y", Some("web"), late),
            Some("Service web"),
        ),
        ("same second: by name", canary("a", "x", None, early), canary("b", "x", None, early), Some("Deployment x")),
        (
            "the one that has taken it over, whatever the names and times",
            taken_over(&canary("a", "x", None, late)),
            canary("0", "x", None, early),
            Some("Deployment x"),
        ),
        (
            "a further Service",
            canary("a", "x", Some("web"), early),
            with_more(&canary("b", "y", None, late), "web"),
            Some("Service web"),
        ),
        ("nothing in common", canary("a", "x", None, early), canary("b", "y", None, late), None),
    ];
    for (what, older, younger, words) in cases {
        let all = [Arc::clone(&younger), Arc::clone(&older)];
        assert_eq!(conflict(&older, &all), None, "{what}: the older one goes on");
        let found = conflict(&younger, &all);
        assert_eq!(found.is_some(), words.is_some(), "{what}");
        if let (Some(found), Some(words)) = (found, words) {
            assert_eq!(found.reason, "TargetConflict");
            assert!(found.message.contains(words) && found.message.contains("Canary a"), "{}", found.message);
        }
    }
}

fn slice(managed_by: &str, owner: &str, ports: &[&str], ready: Option<bool>) -> EndpointSlice {
    serde_json::from_value(json!({
        "addressType": "IPv4",
        "metadata": {
            "labels": {"kubernetes.io/service-name": "web", "endpointslice.kubernetes.io/managed-by": managed_by},
            "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": "web", "uid": owner}],
        },
        "endpoints": [{"addresses": ["10.1.0.1"], "conditions": {"ready": ready}}],
        "ports": ports.iter().map(|name| json!({"name": name, "port": 20001})).collect::<Vec<_>>(),
    }))
    .unwrap()
}

#[test]
fn our_slices_are_right_when_every_port_of_this_service_has_a_ready_endpoint() {
    let apex: Service = serde_json::from_value(json!({
        "metadata": {"name": "web", "uid": "now"},
        "spec": {"selector": {"app": "web", "sluice.dev/fleet": "a"}, "ports": [{"name": "http", "port": 80}, {"name": "grpc", "port": 81}]},
    }))
    .unwrap();
    let canary = canary("a", "x", Some("web"), "2026-01-01T00:00:00Z");
    let see = |slices: &[EndpointSlice]| {
        let slices: Vec<_> = slices.iter().cloned().map(Arc::new).collect();
        service_of(&canary, Some(&apex), &[], true, None, &slices)
    };
    let both = ["http", "grpc"];
    assert!(see(&[slice("sluice.dev", "now", &both, Some(true))]).slices);
    assert!(see(&[slice("sluice.dev", "now", &["http"], None), slice("sluice.dev", "now", &["grpc"], None)]).slices);
    assert!(!see(&[slice("sluice.dev", "now", &["http"], None)]).slices, "a port is missing");
    assert!(!see(&[slice("sluice.dev", "now", &both, Some(false))]).slices, "nobody is ready");
    assert!(!see(&[slice("sluice.dev", "before", &both, None)]).slices, "of a Service of that name that is gone");
    let native = slice("endpointslice-controller.k8s.io", "now", &both, None);
    let seen = see(std::slice::from_ref(&native));
    assert!(!seen.slices && seen.key);
    assert_eq!(seen.native_endpoints, 1);
    assert_eq!(see(&[slice("endpointslice-controller.k8s.io", "now", &both, Some(false))]).native_endpoints, 0);
}

#[test]
fn several_services_are_as_far_as_the_one_that_is_behind() {
    let service = |name: &str, key: bool| -> Arc<Service> {
        let selector = if key { json!({"app": "web", "sluice.dev/fleet": "a"}) } else { json!({"app": "web"}) };
        let service = json!({"metadata": {"name": name, "uid": "now"}, "spec": {"selector": selector, "ports": [{"name": "http", "port": 80}]}});
        Arc::new(serde_json::from_value(service).unwrap())
    };
    let of = |name: &str, managed_by: &str| {
        let mut slice = slice(managed_by, "now", &["http"], Some(true));
        slice.labels_mut().insert("kubernetes.io/service-name".to_owned(), name.to_owned());
        Arc::new(slice)
    };
    let canary = canary("a", "x", Some("web"), "2026-01-01T00:00:00Z");
    let see = |second: bool, slices: &[Arc<EndpointSlice>]| {
        service_of(&canary, Some(&service("web", true)), &[service("more", second)], true, None, slices)
    };
    let ours = [of("web", "sluice.dev"), of("more", "sluice.dev")];
    let both = see(true, &ours);
    assert!(both.key && both.slices && both.no_native_endpoint && both.native_endpoints == 0);
    let one = see(false, &ours[..1]);
    assert!(!one.key && one.any_key && !one.slices);
    let native = see(true, &[of("more", "endpointslice-controller.k8s.io")]);
    assert!(native.native_endpoints == 1 && native.no_native_endpoint, "the first has none yet");
}

#[test]
fn endpoints_are_missed_of_those_services_only_that_find_the_targets_pods() {
    let service = |name: &str, app: &str| -> Arc<Service> {
        let service = json!({"metadata": {"name": name}, "spec": {"selector": {"app": app}}});
        Arc::new(serde_json::from_value(service).unwrap())
    };
    let canary = canary("a", "x", Some("web"), "2026-01-01T00:00:00Z");
    let template = json!({"metadata": {"labels": {"app": "web"}}});
    let see = |apex: Option<&str>, more: &[Arc<Service>]| {
        let apex = apex.map(|app| service("web", app));
        let seen = service_of(&canary, apex.as_deref(), more, true, Some(&template), &[]);
        (seen.any_exists, seen.no_native_endpoint, seen.unmatched)
    };
    assert_eq!(see(Some("web"), &[]), (true, true, false));
    assert_eq!(see(Some("other"), &[]), (true, false, true));
    assert_eq!(see(Some("other"), &[service("more", "web")]), (true, true, true));
    assert_eq!(see(None, &[service("more", "web")]), (true, true, false));
    assert_eq!(see(None, &[]), (false, false, false));
}

#[test]
fn a_revision_that_a_service_does_not_reach_has_no_ready_pods_however_many_there_are() {
    let canary = canary("a", "x", Some("web"), "2026-01-01T00:00:00Z");
    let service = |target: Value, more: Value| -> Service {
        let ports = json!([
            {"name": "http", "port": 80, "targetPort": target}, {"name": "more", "port": 81, "targetPort": more},
        ]);
        serde_json::from_value(json!({"metadata": {"name": "web"}, "spec": {"ports": ports}})).unwrap()
    };
    let template =
        json!({"spec": {"containers": [{"name": "app", "ports": [{"name": "http", "containerPort": 8080}]}]}});
    let record: ControllerRevision = serde_json::from_value(json!({
        "metadata": {"name": "x-v1"}, "revision": 1, "data": {"template": template, "deployment": {}},
    }))
    .unwrap();
    let pod = json!({
        "metadata": {"name": "x-v1-1", "labels": revisions::labels_of("a", "v1")},
        "status": {"podIP": "10.1.0.1", "conditions": [{"type": "Ready", "status": "True"}]},
    });
    let pods = [Arc::new(serde_json::from_value(pod).unwrap())];
    let see = |service: &Service| {
        let unreached = unreached(std::iter::once(service), &canary, "v1", &record);
        let seen = revision_of(&canary, "v1", &record, None, &unreached, &pods);
        (seen.ready, seen.trouble, unreached.len())
    };
    assert_eq!(see(&service(json!("http"), json!(9090))), (1, None, 0));
    let (ready, trouble, _) = see(&service(json!("web"), json!(9090)));
    assert_eq!(ready, 0);
    assert!(trouble.unwrap().starts_with("Service web leads port 80 to the container port named \"web\""));
    // Another port than the Canary's: it serves, and that is worth a warning.
    assert_eq!(see(&service(json!("http"), json!("metrics"))), (1, None, 1));
}

#[test]
fn a_target_of_which_no_two_versions_may_run_is_refused() {
    let problems = |kind: &str| {
        let target: DynamicObject = serde_json::from_value(json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
            "spec": {"strategy": {"type": kind}},
        }))
        .unwrap();
        template_problems(&target, Some(&json!({"spec": {"containers": [{"name": "app"}]}})), &Tracked::default())
    };
    assert_eq!(problems("RollingUpdate"), []);
    let [problem] = &problems("Recreate")[..] else { panic!() };
    assert_eq!(problem.reason, "TemplateUnsupported");
    assert!(
        problem.message.contains("Deployment web") && problem.message.contains("spec.strategy.type"),
        "{problem:?}"
    );
}

#[test]
fn a_target_that_is_too_large_to_be_kept_says_so_and_has_no_revision() {
    let target: DynamicObject = serde_json::from_value(json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": "web", "namespace": "shop"}, "spec": {"replicas": 2},
    }))
    .unwrap();
    let [problem] = &template_problems(&target, pod_template(&target), &Tracked::default())[..] else { panic!() };
    assert_eq!(problem.reason, "TemplateUnsupported");
    let says =
        "the pod template of Deployment web is too large to be released: the Deployment takes more than 1024 KiB";
    assert!(problem.message.starts_with(says), "{}", problem.message);
    let revision = revision(pod_template(&target), &BTreeMap::new());
    assert_eq!(revision, TOO_LARGE);
    assert_ne!(revision, template::revision_hash(&Value::Null, &BTreeMap::new()));
}

#[test]
fn a_target_whose_owner_has_paused_it_says_how_to_go_on() {
    let target = |paused: Value| -> DynamicObject {
        serde_json::from_value(json!({
            "apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": {"name": "web", "namespace": "shop"}, "spec": {"replicas": 0, "paused": paused},
        }))
        .unwrap()
    };
    let template = json!({"spec": {"containers": [{"name": "app"}]}});
    let found = |paused: Value| template_problems(&target(paused), Some(&template), &Tracked::default());
    assert_eq!(found(json!(null)), []);
    assert_eq!(found(json!(false)), []);
    let [problem] = &found(json!(true))[..] else { panic!() };
    assert_eq!(problem.reason, TARGET_PAUSED);
    assert!(problem.message.ends_with("kubectl rollout resume deployment/web -n shop"), "{}", problem.message);
}

#[test]
fn why_a_pod_does_not_come_up_is_told_in_the_clusters_own_words() {
    let trouble = |status: Value| {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p"}, "status": status})).unwrap();
        pod_trouble(&pod)
    };
    let container = |state: Value, last: Value| {
        json!({"containerStatuses": [{
            "name": "app", "ready": false, "restartCount": 4, "image": "i", "imageID": "", "state": state, "lastState": last,
        }]})
    };
    assert_eq!(trouble(container(json!({"waiting": {"reason": "ContainerCreating"}}), json!({}))), None);
    assert_eq!(trouble(container(json!({"running": {}}), json!({}))), None);
    let pull =
        trouble(container(json!({"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}), json!({})))
            .unwrap();
    assert_eq!(pull, "Pod p: container app does not start (ImagePullBackOff): not found");
    // A container that ends again and again is found waiting, for a moment running, or just ended.
    let ended = json!({"terminated": {"exitCode": 3, "reason": "Error", "message": "no such table\n"}});
    let waits = json!({"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s"}});
    for (state, how) in [
        (waits, "CrashLoopBackOff, restarts: 4"),
        (json!({"running": {}}), "restarts: 4"),
        (ended.clone(), "restarts: 4"),
    ] {
        let crash = trouble(container(state, ended.clone())).unwrap();
        let says = format!(
            "Pod p: container app crashes ({how}); it ended with exit code 3 (Error), saying \"no such table\""
        );
        assert_eq!(crash, says);
    }
    assert!(trouble(container(ended, json!({}))).is_some(), "its first end");
    let done = json!({"initContainerStatuses": [{
        "name": "init", "ready": true, "restartCount": 1, "image": "i", "imageID": "",
        "state": {"terminated": {"exitCode": 0, "reason": "Completed"}},
        "lastState": {"terminated": {"exitCode": 1, "reason": "Error"}},
    }]});
    assert_eq!(trouble(done), None, "an init container that did its work");
    let condition = json!({"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available"});
    let place = trouble(json!({"conditions": [condition]})).unwrap();
    assert_eq!(place, "Pod p cannot be scheduled: 0/3 nodes are available");
}
