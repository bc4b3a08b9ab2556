//! What becomes of a write to a Service or Deployment that Sluice has added something to. Pure: the same is said in CEL by
//! [`super::objects`], for API servers that decide by themselves.

use kube::{
    ResourceExt,
    api::DynamicObject,
    core::admission::{AdmissionRequest, Operation},
};
use serde_json::{Value, json};
use sluice_crds::{Canary, labels};

/// What kubectl and Argo CD applied last, as they wrote it.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Service that the keeper creates in dry runs, to see whether the API server reaches the webhook. Policies do not know it: they
/// have nobody to reach.
pub const CHECK: &str = "sluice-webhook-check";
/// Annotation that says it does.
pub const ANSWERED: &str = "sluice.dev/webhook-answered";

/// Operations of a JSON patch (RFC 6902) that put back what the write takes away; empty for a write that is fine, and for one
/// that is none of ours. `canaries`: those of the object's namespace.
#[must_use]
pub fn changes<'a>(
    request: &AdmissionRequest<DynamicObject>,
    canaries: impl IntoIterator<Item = &'a Canary>,
) -> Vec<Value> {
    match request.operation {
        Operation::Create | Operation::Update => {}
        Operation::Delete | Operation::Connect => return Vec::new(),
    }
    // Without a name in it, the API server makes one: it is nobody's.
    let Some(object) = request.object.as_ref().filter(|object| object.metadata.name.is_some()) else {
        return Vec::new();
    };
    if object.metadata.deletion_timestamp.is_some() || request.sub_resource.is_some() {
        return Vec::new();
    }
    let name = object.name_any();
    match (request.resource.group.as_str(), request.resource.resource.as_str()) {
        ("", "services") if name == CHECK && request.dry_run && request.operation == Operation::Create => {
            annotation(object, ANSWERED, "true")
        }
        ("", "services") => canaries
            .into_iter()
            .find(|canary| {
                canary.status.as_ref().is_some_and(|status| {
                    status.service.as_ref() == Some(&name) || status.additional_services.contains(&name)
                })
            })
            .map_or_else(Vec::new, |canary| service(object, &canary.name_any())),
        ("apps", "deployments") => canaries
            .into_iter()
            .find(|canary| {
                let template = canary.status.as_ref().and_then(|status| status.template.as_ref());
                template.is_some_and(|template| template.name == name)
            })
            .map_or_else(Vec::new, |canary| deployment(object, request.old_object.as_ref(), &canary.name_any())),
        _ => Vec::new(),
    }
}

/// The fleet's key stays in the selector: whoever applies the Service server-side owns the selector as a whole, so a Git tool
/// that does not know the key removes it with every apply.
fn service(object: &DynamicObject, canary: &str) -> Vec<Value> {
    let mut patch = label(object, canary);
    // A Service without a selector has no endpoints of its own that could bypass the fleet.
    if let Some(selector) = object.data.pointer("/spec/selector").and_then(Value::as_object)
        && !selector.contains_key(labels::FLEET)
    {
        patch.push(add(&["spec", "selector", labels::FLEET], canary));
    }
    patch
}

/// The target stays at 0 replicas; how many its owner wishes for is kept beside.
fn deployment(object: &DynamicObject, old: Option<&DynamicObject>, canary: &str) -> Vec<Value> {
    let mut patch = label(object, canary);
    // The API server has put its default in before anybody is asked.
    let replicas = object.data.pointer("/spec/replicas").and_then(Value::as_u64).unwrap_or(1);
    if replicas == 0 {
        return patch;
    }
    if is_a_wish(object, old, replicas) {
        patch.extend(annotation(object, labels::REPLICAS, &replicas.to_string()));
    }
    patch.push(json!({"op": "add", "path": "/spec/replicas", "value": 0}));
    patch
}

/// Whether somebody wrote this number. Where Git says no `replicas`, or no longer, Kubernetes' default of 1 is nobody's wish:
/// taken for one, it would scale what serves down to one Pod.
fn is_a_wish(object: &DynamicObject, old: Option<&DynamicObject>, replicas: u64) -> bool {
    if replicas != 1 {
        return true;
    }
    // Server-side apply: a default is owned by no manager.
    let owned = object
        .managed_fields()
        .iter()
        .filter_map(|entry| entry.fields_v1.as_ref())
        .any(|fields| fields.0.pointer("/f:spec/f:replicas").is_some());
    // Client-side apply owns what was defaulted, but says beside what it applied.
    let says = |object: &DynamicObject| {
        object.annotations().get(LAST_APPLIED).map(|applied| applied.contains("\"replicas\":"))
    };
    let dropped = says(object) == Some(false) && old.is_none_or(|old| says(old) == Some(true));
    owned && !dropped
}

/// The webhook is asked about objects with this label only, so the label is kept as well.
fn label(object: &DynamicObject, canary: &str) -> Vec<Value> {
    let mut patch = Vec::new();
    match &object.metadata.labels {
        Some(labels) if labels.get(labels::CANARY).is_some_and(|value| value == canary) => return patch,
        Some(_) => {}
        None => patch.push(json!({"op": "add", "path": "/metadata/labels", "value": {}})),
    }
    patch.push(add(&["metadata", "labels", labels::CANARY], canary));
    patch
}

fn annotation(object: &DynamicObject, key: &str, value: &str) -> Vec<Value> {
    let mut patch = Vec::new();
    if object.metadata.annotations.is_none() {
        patch.push(json!({"op": "add", "path": "/metadata/annotations", "value": {}}));
    }
    patch.push(add(&["metadata", "annotations", key], value));
    patch
}

fn add(path: &[&str], value: &str) -> Value {
    // RFC 6901, section 3.
    let path: String = path.iter().map(|key| format!("/{}", key.replace('~', "~0").replace('/', "~1"))).collect();
    json!({"op": "add", "path": path, "value": value})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn canary(name: &str, status: Value) -> Canary {
        serde_json::from_value(json!({
            "apiVersion": "sluice.dev/v1beta1", "kind": "Canary", "metadata": {"name": name, "namespace": "shop"},
            "spec": {"targetRef": {"kind": "Deployment", "name": "x"}, "service": {"port": 80}, "skipAnalysis": true},
            "status": status,
        }))
        .unwrap()
    }

    fn taken_over() -> Vec<Canary> {
        let template = |name: &str| json!({"name": name, "observedGeneration": 1, "revision": "r"});
        vec![
            canary("idle", json!({"phase": "Initializing", "template": template("")})),
            canary("web", json!({"service": "front", "additionalServices": ["back"], "template": template("web-app")})),
            canary("api", json!({"service": "api", "template": template("api")})),
        ]
    }

    fn request(operation: &str, resource: &str, object: Value, old: Value) -> AdmissionRequest<DynamicObject> {
        let group = if resource == "services" { "" } else { "apps" };
        let kind = json!({"group": group, "version": "v1", "kind": "Any"});
        let typed = |mut object: Value| {
            if object.is_object() {
                object["apiVersion"] = json!("v1");
                object["kind"] = json!("Any");
            }
            object
        };
        serde_json::from_value(json!({
            "uid": "1", "kind": kind, "resource": {"group": group, "version": "v1", "resource": resource},
            "name": "n", "namespace": "shop", "operation": operation, "userInfo": {},
            "object": typed(object), "oldObject": typed(old),
        }))
        .unwrap()
    }

    /// The object after the changes; `None` if there are none.
    fn after(operation: &str, resource: &str, object: Value, old: Value) -> Option<Value> {
        let request = request(operation, resource, object.clone(), old);
        applied(&request, object)
    }

    fn applied(request: &AdmissionRequest<DynamicObject>, object: Value) -> Option<Value> {
        let canaries = taken_over();
        let patch = changes(request, &canaries);
        if patch.is_empty() {
            return None;
        }
        // Applied by hand: only `add` occurs.
        let mut object = object;
        for operation in patch {
            assert_eq!(operation["op"], "add");
            let path = operation["path"].as_str().unwrap();
            let (parent, key) = path.rsplit_once('/').unwrap();
            let key = key.replace("~1", "/").replace("~0", "~");
            object.pointer_mut(parent).unwrap_or_else(|| panic!("no {parent}"))[key] = operation["value"].clone();
        }
        Some(object)
    }

    fn front(labels: Value, spec: Value) -> Value {
        json!({"metadata": {"name": "front", "namespace": "shop", "labels": labels}, "spec": spec})
    }

    #[test]
    fn the_key_comes_back_to_a_service_that_is_taken_over_and_to_no_other() {
        let ours = json!({"sluice.dev/canary": "web"});
        let with_key = json!({"selector": {"app": "x", "sluice.dev/fleet": "web"}});
        let without = json!({"selector": {"app": "x"}});
        let named = |name: &str| json!({"metadata": {"name": name}, "spec": without});
        let dying =
            json!({"metadata": {"name": "front", "deletionTimestamp": "2026-01-01T00:00:00Z"}, "spec": without});
        let cases = [
            ("as it should be", "UPDATE", front(ours.clone(), with_key.clone()), None),
            (
                "server-side apply",
                "UPDATE",
                front(ours.clone(), without.clone()),
                Some(front(ours.clone(), with_key.clone())),
            ),
            (
                "replaced, with the label gone",
                "UPDATE",
                front(json!({"app": "x"}), without.clone()),
                Some(front(json!({"app": "x", "sluice.dev/canary": "web"}), with_key.clone())),
            ),
            (
                "created anew",
                "CREATE",
                front(Value::Null, without.clone()),
                Some(front(ours.clone(), with_key.clone())),
            ),
            (
                "a changed selector",
                "UPDATE",
                front(ours.clone(), json!({"selector": {"tier": "web"}})),
                Some(front(ours.clone(), json!({"selector": {"tier": "web", "sluice.dev/fleet": "web"}}))),
            ),
            ("no selector", "UPDATE", front(ours.clone(), json!({})), None),
            (
                "a further one",
                "UPDATE",
                json!({"metadata": {"name": "back", "labels": ours}, "spec": without}),
                Some(json!({"metadata": {"name": "back", "labels": ours}, "spec": with_key})),
            ),
            ("another Service", "UPDATE", named("other"), None),
            ("named like a Canary, not like its Service", "UPDATE", named("web"), None),
            ("not taken over", "UPDATE", named("idle"), None),
            ("going away", "UPDATE", dying, None),
            ("deleted", "DELETE", Value::Null, None),
        ];
        for (what, operation, object, wanted) in cases {
            assert_eq!(after(operation, "services", object, Value::Null), wanted, "{what}");
        }
        assert_eq!(after("UPDATE", "endpoints", front(ours, without), Value::Null), None, "of another kind");
    }

    /// The target with these replicas, this annotation, and these words of a client-side apply.
    fn target(replicas: u64, wish: Option<&str>, applied: Option<&str>, manager: Option<&str>) -> Value {
        let mut object = json!({
            "metadata": {"name": "web-app", "labels": {"sluice.dev/canary": "web"}, "annotations": {}, "managedFields": []},
            "spec": {"replicas": replicas},
        });
        for (key, value) in [(labels::REPLICAS, wish), (LAST_APPLIED, applied)] {
            if let Some(value) = value {
                object["metadata"]["annotations"][key] = json!(value);
            }
        }
        if let Some(manager) = manager {
            let fields = json!({"f:spec": {"f:replicas": {}}});
            object["metadata"]["managedFields"] =
                json!([{"manager": manager, "fieldsType": "FieldsV1", "fieldsV1": fields}]);
        }
        object
    }

    #[test]
    fn the_target_rests_and_its_owners_wish_is_kept() {
        let (said, unsaid) = (Some(r#"{"spec":{"replicas":1}}"#), Some(r#"{"spec":{"template":{}}}"#));
        let git = Some("git");
        let cases = [
            ("at rest", target(0, Some("3"), None, git), Value::Null, None),
            ("Git's replicas", target(3, None, None, git), Value::Null, Some((0, Some("3")))),
            ("another number", target(5, Some("3"), None, git), Value::Null, Some((0, Some("5")))),
            ("one, and it is meant", target(1, Some("3"), None, git), Value::Null, Some((0, Some("1")))),
            ("a default after server-side apply", target(1, Some("3"), None, None), Value::Null, Some((0, Some("3")))),
            ("created without replicas", target(1, None, unsaid, git), Value::Null, Some((0, None))),
            ("created with one replica", target(1, None, said, git), Value::Null, Some((0, Some("1")))),
            (
                "replicas removed from Git",
                target(1, Some("3"), unsaid, git),
                target(0, Some("3"), said, git),
                Some((0, Some("3"))),
            ),
            (
                "one by hand, while Git says nothing",
                target(1, Some("3"), unsaid, git),
                target(0, Some("3"), unsaid, git),
                Some((0, Some("1"))),
            ),
        ];
        for (what, object, old, wanted) in cases {
            let operation = if old.is_null() { "CREATE" } else { "UPDATE" };
            let found = after(operation, "deployments", object, old).map(|object| {
                let wish = object["metadata"]["annotations"][labels::REPLICAS].as_str().map(ToOwned::to_owned);
                (object["spec"]["replicas"].as_u64().unwrap(), wish)
            });
            let wanted = wanted.map(|(replicas, wish): (u64, Option<&str>)| (replicas, wish.map(ToOwned::to_owned)));
            assert_eq!(found, wanted, "{what}");
        }
    }

    #[test]
    fn other_deployments_and_those_that_go_away_are_left_alone() {
        let mut revision = target(3, None, None, Some("sluice"));
        revision["metadata"]["name"] = json!("web-app-5d8f9c7b6a");
        assert_eq!(after("UPDATE", "deployments", revision, Value::Null), None);
        let mut dying = target(3, None, None, Some("git"));
        dying["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        assert_eq!(after("UPDATE", "deployments", dying, Value::Null), None);
        let mut unnamed = target(3, None, None, Some("git"));
        unnamed["metadata"].as_object_mut().unwrap().remove("name");
        assert_eq!(after("CREATE", "deployments", unnamed, Value::Null), None);
        assert!(changes(&request("UPDATE", "deployments", target(3, None, None, None), Value::Null), []).is_empty());
    }

    #[test]
    fn the_keepers_dry_run_is_answered_and_nothing_else_of_that_name() {
        let named = |name: &str| json!({"metadata": {"name": name}});
        let marked = json!({"metadata": {"name": CHECK, "annotations": {ANSWERED: "true"}}});
        let cases = [
            ("the dry run", true, "CREATE", "services", CHECK, Some(marked)),
            ("a Service of that name", false, "CREATE", "services", CHECK, None),
            ("one that is there", true, "UPDATE", "services", CHECK, None),
            ("another kind", true, "CREATE", "deployments", CHECK, None),
            ("another dry run", true, "CREATE", "services", "other", None),
        ];
        for (what, dry_run, operation, resource, name, wanted) in cases {
            let request = AdmissionRequest { dry_run, ..request(operation, resource, named(name), Value::Null) };
            assert_eq!(applied(&request, named(name)), wanted, "{what}");
        }
    }

    #[test]
    fn a_bare_target_gets_what_the_patch_needs() {
        let bare = json!({"metadata": {"name": "web-app"}, "spec": {"replicas": 4}});
        let wanted = json!({
            "metadata": {
                "name": "web-app",
                "labels": {"sluice.dev/canary": "web"}, "annotations": {"sluice.dev/replicas": "4"},
            },
            "spec": {"replicas": 0},
        });
        assert_eq!(after("CREATE", "deployments", bare, Value::Null), Some(wanted));
    }
}
