#![allow(clippy::unwrap_used)]
use super::*;
use serde_json::json;

fn canary(service: Value) -> Canary {
    serde_json::from_value(json!({
        "apiVersion": "sluice.dev/v1beta1", "kind": "Canary",
        "metadata": {"name": "podinfo", "namespace": "test", "uid": "uid"},
        "spec": {"targetRef": {"kind": "Deployment", "name": "podinfo"}, "service": service, "skipAnalysis": true},
    }))
    .unwrap()
}

fn pods() -> Value {
    json!({
        "metadata": {"labels": {"app": "podinfo", "tier": "web"}},
        "spec": {"containers": [{"name": "app", "ports": [{"name": "http", "containerPort": 9898}, {"name": "admin", "containerPort": 9899}]}]},
    })
}

fn service(changes: Value) -> Service {
    let mut service = json!({
        "metadata": {"name": "podinfo", "namespace": "test", "labels": {"app": "podinfo", "app.kubernetes.io/instance": "argo"}},
        "spec": {
            "clusterIP": "10.0.0.1", "type": "ClusterIP", "sessionAffinity": "None",
            "selector": {"app": "podinfo"},
            "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": "http", "nodePort": 30080}],
        },
    });
    for (key, value) in changes.as_object().unwrap() {
        service["spec"][key] = value.clone();
    }
    serde_json::from_value(service).unwrap()
}

#[test]
fn services_that_the_fleet_cannot_stand_for_are_refused_with_the_reason() {
    let canary = canary(json!({"port": 80}));
    let cases = [
        (json!({"clusterIP": "None"}), "headless"),
        (json!({"type": "ExternalName", "externalName": "example.com"}), "ExternalName"),
        (json!({"ports": [{"port": 53, "protocol": "UDP"}]}), "port 53 is UDP"),
        (json!({"ports": [{"port": 53, "protocol": "SCTP"}]}), "port 53 is SCTP"),
        (json!({"sessionAffinity": "ClientIP"}), "sessionAffinity"),
        (json!({"internalTrafficPolicy": "Local"}), "internalTrafficPolicy"),
        (json!({"selector": {}}), "no selector"),
        (json!({"selector": {"app": "other"}}), "app: other"),
        (json!({"selector": {"app": "podinfo", "sluice.dev/fleet": "api"}}), "Canary api has it"),
        (json!({"ports": [{"port": 80, "targetPort": "web"}]}), "\"web\""),
    ];
    for (changes, words) in cases {
        let found = refusals(&service(changes.clone()), &canary, Some(&pods()));
        assert_eq!(found.len(), 1, "{changes}: {found:?}");
        assert!(found[0].message.contains(words), "{changes}: {}", found[0].message);
    }
    assert_eq!(refusals(&service(json!({})), &canary, Some(&pods())), []);
    let taken_over = json!({"selector": {"app": "podinfo", "sluice.dev/fleet": "podinfo"}});
    assert_eq!(refusals(&service(taken_over), &canary, Some(&pods())), []);
}

#[test]
fn a_service_leads_to_the_pods_that_have_every_label_of_its_selector_but_for_our_key() {
    let canary = canary(json!({"port": 80}));
    for (changes, expected) in [
        (json!({}), true),
        (json!({"selector": {"app": "podinfo", "sluice.dev/fleet": "podinfo"}}), true),
        (json!({"clusterIP": "None"}), true),
        (json!({"selector": {"app": "podinfo", "sluice.dev/fleet": "api"}}), false),
        (json!({"selector": {"sluice.dev/fleet": "podinfo"}}), false),
        (json!({"selector": {"app": "podinfo", "track": "blue"}}), false),
        (json!({"selector": {}}), false),
        (json!({"selector": null}), false),
        (json!({"type": "ExternalName", "externalName": "example.com"}), false),
    ] {
        assert_eq!(selects(&service(changes.clone()), &canary, &pods()), expected, "{changes}");
    }
}

#[test]
fn a_revision_is_not_reached_by_a_port_name_that_it_has_not() {
    let canary = canary(json!({"port": 80}));
    let facts = RevisionFacts::of_template(&pods());
    let port = |number: u16, target: Value| json!({"port": number, "protocol": "TCP", "targetPort": target});
    let udp = json!({"port": 53, "protocol": "UDP", "targetPort": "dns"});
    let web = || port(80, json!("web"));
    for (ports, expected) in [
        (vec![port(80, json!("http"))], None),
        (vec![port(80, json!(1234)), port(81, json!("admin"))], None),
        (vec![json!({"port": 80})], None),
        (vec![port(80, json!("http")), udp], None),
        (vec![web()], Some((80, true))),
        (vec![web(), port(81, json!("admin"))], Some((80, true))),
        (vec![port(80, json!("http")), port(81, json!("metrics"))], Some((81, false))),
        (vec![port(8080, json!("web")), port(81, json!("admin"))], Some((8080, false))),
        (vec![port(8080, json!("web")), port(81, json!("metrics"))], Some((8080, true))),
    ] {
        let found = unreached(&service(json!({"ports": ports})), &canary, "v1", &facts);
        let Some((port, entirely)) = expected else {
            assert_eq!(found, None, "{ports:?}");
            continue;
        };
        let found = found.unwrap();
        assert_eq!(found.entirely, entirely, "{ports:?}");
        let words = format!("Service podinfo leads port {port} to ");
        assert!(found.why.starts_with(&words) && found.why.contains("revision v1"), "{}", found.why);
    }
}

#[test]
fn an_ip_family_that_the_fleet_lacks_is_refused() {
    let member = |ips: &[&str]| -> Pod {
        let all: Vec<_> = ips.iter().map(|ip| json!({"ip": ip})).collect();
        serde_json::from_value(json!({"status": {"podIP": ips.first(), "podIPs": all}})).unwrap()
    };
    let refusal = |families: Value, members: &[&Pod]| {
        without_fleet(&service(json!({"ipFamilies": families})), members.iter().copied()).map(|problem| problem.message)
    };
    let (v4, both) = (member(&["192.0.2.1"]), member(&["192.0.2.2", "2001:db8::2"]));
    assert_eq!(refusal(json!(["IPv4"]), &[&v4]), None);
    assert_eq!(refusal(json!(null), &[&v4]), None, "what is not said is taken for IPv4");
    assert_eq!(refusal(json!(["IPv4", "IPv6"]), &[&v4, &both]), None, "somebody is there");
    assert_eq!(refusal(json!(["IPv4", "IPv6"]), &[]), None, "nobody is there yet");
    let found = refusal(json!(["IPv4", "IPv6"]), &[&v4]).unwrap();
    assert!(found.contains("Service podinfo") && found.contains("it has an IPv6 address"), "{found}");
}

#[test]
fn what_changes_quietly_is_warned_about() {
    let reasons = |changes: Value, port: i32| -> Vec<_> {
        let canary = canary(json!({"port": port}));
        warnings(&service(changes), &canary).into_iter().map(|warning| warning.reason).collect()
    };
    assert_eq!(reasons(json!({}), 80), Vec::<&str>::new());
    assert_eq!(reasons(json!({"externalTrafficPolicy": "Local"}), 80), ["ExternalTrafficPolicyLocal"]);
    assert_eq!(reasons(json!({"publishNotReadyAddresses": true}), 80), ["PublishNotReadyAddresses"]);
    assert_eq!(reasons(json!({}), 9898), ["PortMismatch"]);
}

/// A Service that Sluice made, with these managers beside its own.
fn made(canary: &Canary, managers: Value) -> Service {
    let mut service = service(json!({}));
    service.metadata.owner_references = Some(vec![revisions::canary_owner(canary)]);
    let mut managed: Vec<Value> = vec![json!({"manager": "sluice", "fieldsV1": {"f:spec": {"f:ports": {}}}})];
    managed.extend(managers.as_array().unwrap().clone());
    service.metadata.managed_fields = serde_json::from_value(json!(managed)).unwrap();
    service
}

#[test]
fn a_service_that_sluice_made_is_its_owners_as_soon_as_they_apply_it() {
    let canary = canary(json!({"port": 80}));
    let spec = json!({"f:spec": {"f:selector": {}}});
    let applied = json!({"f:metadata": {"f:annotations": {"f:kubectl.kubernetes.io/last-applied-configuration": {}}}});
    let cases = [
        ("nobody", json!([]), false),
        ("server-side apply", json!([{"manager": "flux", "operation": "Apply", "fieldsV1": spec}]), true),
        ("an apply without a difference", json!([{"manager": "kubectl", "fieldsV1": applied}]), true),
        ("a status", json!([{"manager": "lb", "subresource": "status", "fieldsV1": spec}]), false),
        (
            "a label by hand",
            json!([{"manager": "kubectl-label", "fieldsV1": {"f:metadata": {"f:labels": {"f:team": {}}}}}]),
            false,
        ),
    ];
    for (what, managers, theirs) in cases {
        let mut service = made(&canary, managers);
        assert_eq!(owners_without_us(&service, &canary), theirs.then(Vec::new), "{what}");
        let other = OwnerReference { uid: "another".into(), ..OwnerReference::default() };
        service.owner_references_mut().push(other.clone());
        assert_eq!(owners_without_us(&service, &canary), theirs.then(|| vec![other]), "{what}");
        service.owner_references_mut().clear();
        assert_eq!(owners_without_us(&service, &canary), None, "{what}: not ours");
    }
}

#[test]
fn a_port_that_is_not_carried_over_is_told() {
    let told = |service: &Service, wish: Value| {
        let canary = canary(wish);
        warnings(service, &canary).into_iter().map(|warning| warning.message).collect::<Vec<_>>()
    };
    let as_made = made(&canary(json!({"port": 80})), json!([]));
    assert_eq!(told(&as_made, json!({"port": 80, "targetPort": "http"})), [""; 0]);
    for wish in [
        json!({"port": 80, "targetPort": 9090}),
        json!({"port": 80, "targetPort": "http", "appProtocol": "grpc"}),
        json!({"port": 80, "targetPort": "http", "portName": "web"}),
    ] {
        let found = told(&as_made, wish.clone());
        assert!(found.len() == 1 && found[0].contains("kubectl edit service podinfo -n test"), "{wish}: {found:?}");
        assert_eq!(told(&service(json!({})), wish), [""; 0], "somebody else's says for itself where it leads");
    }
}

#[test]
fn what_a_canary_asks_for_beyond_its_share_is_named_with_what_holds() {
    let limits = Limits { requests: Some(2048), ..Limits::default() };
    let canary = |http: Value| canary(json!({"port": 80, "trafficPolicy": {"connectionPool": {"http": http}}}));
    let asks = canary(json!({"http1MaxPendingRequests": 10, "http2MaxRequests": 5000}));
    let [problem] = &capped(&asks, limits)[..] else { panic!() };
    assert_eq!(problem.reason, "LimitCapped");
    assert!(problem.message.contains("http2MaxRequests is 5000, but 2048 holds"), "{}", problem.message);
    assert_eq!(capped(&asks, Limits::default()), [], "nothing is limited");
    assert_eq!(capped(&canary(json!({"http2MaxRequests": 2048})), limits), []);
}

#[test]
fn routes_that_a_release_would_make_too_large_are_refused_before_it_begins() {
    let large = |length: usize, matches: Value| {
        let values: BTreeMap<String, String> =
            (0..16).map(|index| (format!("x-{index}"), "v".repeat(length))).collect();
        let mut canary = canary(json!({
            "port": 80, "match": vec![json!({"uri": {"prefix": "/"}}); 16], "headers": {"request": {"set": values}},
        }));
        canary.spec.analysis =
            serde_json::from_value(json!({"interval": "1m", "stepWeight": 10, "match": matches})).unwrap();
        canary
    };
    let apex = service(json!({}));
    let refused = |canary: &Canary, additional: &[Arc<Service>]| unsendable(canary, Some(&apex), additional);
    let eight = json!(vec![json!({"headers": {"x-user": {"exact": "insider"}}}); 8]);
    assert_eq!(refused(&large(1024, json!(null)), &[]), None, "without one it fits");
    let problem = refused(&large(1024, eight.clone()), &[]).unwrap();
    assert_eq!(problem.reason, "RoutesUnsupported");
    for words in [
        "Canary test/podinfo: spec.service: its routes take ",
        " and at most 2048 KiB are sent",
        "Say fewer or shorter",
    ] {
        assert!(problem.message.contains(words), "{}", problem.message);
    }
    let mut further = apex.clone();
    further.metadata.name = Some("further".into());
    let further = [(); 3].map(|()| Arc::new(further.clone()));
    assert_eq!(refused(&large(512, eight.clone()), &[]), None);
    assert!(refused(&large(512, eight.clone()), &further).is_some(), "each Service has them");
    // One that is under way has the matches that it began with.
    let mut under_way = large(1024, json!(null));
    let traffic = json!({"primary": "a", "canary": "b", "weight": 10, "match": eight});
    under_way.status =
        Some(sluice_crds::CanaryStatus { traffic: serde_json::from_value(traffic).unwrap(), ..Default::default() });
    assert!(refused(&under_way, &[]).is_some());
}

#[test]
fn other_services_on_the_same_pods_are_named() {
    let canary = canary(json!({"port": 80}));
    let named = |name: &str, selector: Value| {
        let mut service = service(json!({"selector": selector}));
        service.metadata.name = Some(name.into());
        service
    };
    let mut companion = named("podinfo-pods", json!({"tier": "web"}));
    companion.metadata.owner_references = Some(vec![revisions::canary_owner(&canary)]);
    let services = [
        named("podinfo", json!({"app": "podinfo"})),
        named("metrics", json!({"tier": "web"})),
        named("stranger", json!({"app": "other"})),
        named("selectorless", json!({})),
        named("narrower", json!({"app": "podinfo", "track": "blue"})),
        companion,
    ];
    let found = bypasses(&services, &canary, &pods());
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].message.contains("Service metrics"), "{}", found[0].message);
}

#[test]
fn companions_have_the_ports_of_the_apex() {
    let canary = canary(json!({"port": 80}));
    let apex = service(json!({"appProtocol": null}));
    let all: Vec<_> = Role::ALL.iter().map(|role| companion(&canary, &apex, *role)).collect();
    insta::assert_yaml_snapshot!(all);
}

#[test]
fn a_companion_that_follows_is_not_written_again() {
    let canary = canary(json!({"port": 80}));
    let apex = service(json!({}));
    for role in Role::ALL {
        let wanted = companion(&canary, &apex, role);
        let mut live = wanted.clone();
        live.spec.as_mut().unwrap().cluster_ip = Some("10.0.0.9".into());
        live.labels_mut().insert("added-by".into(), "somebody".into());
        assert!(is_current(&live, &wanted), "{role:?}");
        let more = service(
            json!({"ports": [{"name": "http", "port": 80, "targetPort": "http"}, {"name": "admin", "port": 81, "targetPort": 9899}]}),
        );
        assert!(!is_current(&live, &companion(&canary, &more, role)), "{role:?}");
        // An orphaned one of an earlier Canary of that name.
        live.metadata.owner_references = None;
        assert!(!is_current(&live, &wanted), "{role:?}");
    }
}

#[test]
fn an_apex_is_made_as_the_canary_says() {
    let canary = canary(
        json!({"name": "web", "port": 80, "targetPort": "http", "portName": "grpc", "appProtocol": "grpc", "portDiscovery": true}),
    );
    let target: DynamicObject = serde_json::from_value(json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": "podinfo", "namespace": "test", "labels": {"app": "podinfo", "argocd.argoproj.io/instance": "x"}},
        "spec": {"selector": {"matchLabels": {"app": "podinfo"}}, "template": pods()},
    }))
    .unwrap();
    insta::assert_yaml_snapshot!(apex(&canary, &target));
}
