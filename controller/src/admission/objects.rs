//! What the API server is told, as objects of `admissionregistration.k8s.io`. The CEL says what [`super::decision`] says.
//!
//! Every expression is total: each field is asked for by `has()` before it is read. Defaults are written out, so that what is
//! stored can be compared with what is wanted.

use k8s_openapi::ByteString;
use serde_json::{Value, json};
use sluice_crds::labels;

use super::Effective;

/// Group of all of them.
pub const GROUP: &str = "admissionregistration.k8s.io";
/// Version of those that every supported API server has.
pub const STABLE: &str = "v1";
/// Label of ours, by which the keeper finds what there is.
pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";

/// Policy and binding that keep the key in a Service's selector.
const SERVICES: &str = "services";
/// Policy and binding that keep the target at 0 replicas.
const DEPLOYMENTS: &str = "deployments";
/// Policy and binding that refuse `kubectl scale` of the target.
const SCALE: &str = "scale";
/// Policy and binding that refuse another template for a revision's Deployment.
const REVISIONS: &str = "revisions";
/// The webhook's configuration.
const WEBHOOK: &str = "protection";

/// A kind that we write, and what those of ours are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kind {
    pub kind: &'static str,
    pub plural: &'static str,
    purposes: &'static [&'static str],
}

pub const MUTATING_POLICY: Kind =
    Kind { kind: "MutatingAdmissionPolicy", plural: "mutatingadmissionpolicies", purposes: &[SERVICES, DEPLOYMENTS] };
pub const MUTATING_BINDING: Kind = Kind {
    kind: "MutatingAdmissionPolicyBinding",
    plural: "mutatingadmissionpolicybindings",
    purposes: &[SERVICES, DEPLOYMENTS],
};
pub const VALIDATING_POLICY: Kind =
    Kind { kind: "ValidatingAdmissionPolicy", plural: "validatingadmissionpolicies", purposes: &[SCALE, REVISIONS] };
pub const VALIDATING_BINDING: Kind = Kind {
    kind: "ValidatingAdmissionPolicyBinding",
    plural: "validatingadmissionpolicybindings",
    purposes: &[SCALE, REVISIONS],
};
pub const WEBHOOK_CONFIGURATION: Kind =
    Kind { kind: "MutatingWebhookConfiguration", plural: "mutatingwebhookconfigurations", purposes: &[WEBHOOK] };

impl Kind {
    /// Names of ours, in an installation that watches this namespace only, or all of them.
    #[must_use]
    pub fn names(self, namespace: Option<&str>) -> Vec<String> {
        self.purposes.iter().map(|purpose| name(purpose, namespace)).collect()
    }
}

/// Several installations share a cluster if each watches a namespace of its own.
fn name(purpose: &str, namespace: Option<&str>) -> String {
    match namespace {
        Some(namespace) => format!("{purpose}.{namespace}.sluice.dev"),
        None => format!("{purpose}.sluice.dev"),
    }
}

/// For whom the protection is.
#[derive(Clone, Debug)]
pub struct Scope {
    /// User name of the controllers. Their own writes are what `delivery` decided, with the status that it had written
    /// before; a decision on a status that is some milliseconds older would undo the hand-back. And they must never wait for
    /// their own webhook, but in the dry run that checks whether it is reached.
    pub own_user: String,
    /// Only this namespace; all of them where absent.
    pub namespace: Option<String>,
}

/// How the API server reaches the webhook.
#[derive(Clone, Debug)]
pub enum Address {
    /// Through this Service, which must have a cluster IP: the API server does not route to a headless one.
    Service { namespace: String, name: String, port: u16 },
    /// Directly; for tests, where the API server is on no Pod network.
    Url(String),
}

/// Path that takes `AdmissionReview`.
pub const PATH: &str = "/protect";

impl Scope {
    fn namespaces(&self) -> Value {
        match &self.namespace {
            Some(namespace) => json!({"matchLabels": {"kubernetes.io/metadata.name": namespace}}),
            None => json!({}),
        }
    }

    fn somebody_else(&self) -> String {
        // A string of CEL is quoted as one of JSON is.
        format!("request.userInfo.username != {}", Value::from(self.own_user.as_str()))
    }

    fn conditions(&self) -> Vec<Value> {
        conditions(&self.somebody_else())
    }

    /// Each Canary in the namespace of the object is a parameter, one after the other.
    fn binding(&self, purpose: &str) -> Value {
        let mut parameters = json!({"selector": {}, "parameterNotFoundAction": "Allow"});
        if let Some(namespace) = &self.namespace {
            // Whoever writes the binding must be allowed to list them, which we are in this namespace only.
            parameters["namespace"] = json!(namespace);
        }
        json!({"policyName": name(purpose, self.namespace.as_deref()), "paramRef": parameters})
    }

    fn object(&self, kind: Kind, version: &str, purpose: &str, field: &str, content: Value) -> (Kind, Value) {
        let mut object = json!({
            "apiVersion": format!("{GROUP}/{version}"),
            "kind": kind.kind,
            "metadata": {
                "name": name(purpose, self.namespace.as_deref()),
                "labels": {MANAGED_BY: labels::FIELD_MANAGER},
            },
            field: content,
        });
        if kind == WEBHOOK_CONFIGURATION {
            // AKS edits the namespaces of webhooks otherwise, after each write, for which the keeper would write again, and so on
            // (<https://learn.microsoft.com/azure/aks/faq>, "Admissions Enforcer").
            object["metadata"]["labels"]["admissions.enforcer/disabled"] = json!("true");
        }
        (kind, object)
    }
}

/// Who goes away is never held up, and neither are we.
fn conditions(somebody_else: &str) -> Vec<Value> {
    vec![
        json!({"name": "somebody-else", "expression": somebody_else}),
        json!({"name": "stays", "expression": "!has(object.metadata.deletionTimestamp)"}),
    ]
}

/// Name of the webhook for a resource, as the API server says it in its errors.
pub(super) fn webhook_name(resource: &str) -> String {
    format!("{resource}.{WEBHOOK}.sluice.dev")
}

/// All that there should be.
#[must_use]
pub fn wanted(effective: &Effective, refuse: bool, scope: &Scope, address: &Address, ca: &str) -> Vec<(Kind, Value)> {
    let mut wanted = Vec::new();
    match effective {
        Effective::Policy(version) => {
            for (purpose, policy) in [(SERVICES, services(scope)), (DEPLOYMENTS, deployments(scope))] {
                wanted.push(scope.object(MUTATING_POLICY, version, purpose, "spec", policy));
                wanted.push(scope.object(MUTATING_BINDING, version, purpose, "spec", scope.binding(purpose)));
            }
        }
        Effective::Webhook => {
            let webhooks = webhooks(scope, address, ca);
            wanted.push(scope.object(WEBHOOK_CONFIGURATION, STABLE, WEBHOOK, "webhooks", webhooks));
        }
        Effective::Repair => {}
    }
    if refuse {
        wanted.push(scope.object(VALIDATING_POLICY, STABLE, SCALE, "spec", scale(scope)));
        let mut binding = scope.binding(SCALE);
        binding["validationActions"] = json!(["Deny"]);
        wanted.push(scope.object(VALIDATING_BINDING, STABLE, SCALE, "spec", binding));
        wanted.push(scope.object(VALIDATING_POLICY, STABLE, REVISIONS, "spec", revisions(scope)));
        let policy = name(REVISIONS, scope.namespace.as_deref());
        let binding = json!({"policyName": policy, "validationActions": ["Deny"]});
        wanted.push(scope.object(VALIDATING_BINDING, STABLE, REVISIONS, "spec", binding));
    }
    wanted
}

fn policy(scope: &Scope, group: &str, resource: &str, operations: &[&str]) -> Value {
    let mut policy = without_parameter(scope, group, resource, operations);
    policy["paramKind"] = json!({"apiVersion": "sluice.dev/v1beta1", "kind": "Canary"});
    policy
}

fn without_parameter(scope: &Scope, group: &str, resource: &str, operations: &[&str]) -> Value {
    json!({
        // Expressions that are total do not fail. What can fail is to find the parameters: while an API server has no Canary
        // CRD, or has not listed them yet, `Fail` would refuse every write to any Service or Deployment in the cluster. Then
        // rather `delivery` repairs.
        "failurePolicy": "Ignore",
        "matchConstraints": {
            "matchPolicy": "Equivalent",
            "namespaceSelector": scope.namespaces(),
            "objectSelector": {},
            "resourceRules": [{
                "apiGroups": [group], "apiVersions": ["v1"], "resources": [resource], "operations": operations, "scope": "*",
            }],
        },
    })
}

fn mutating(scope: &Scope, group: &str, resource: &str, conditions: &[(&str, String)]) -> Value {
    let mut all = scope.conditions();
    all.extend(conditions.iter().map(|(name, expression)| json!({"name": name, "expression": expression})));
    let mut policy = policy(scope, group, resource, &["CREATE", "UPDATE"]);
    policy["matchConditions"] = all.into();
    // Another policy or webhook may write the field after us.
    policy["reinvocationPolicy"] = json!("IfNeeded");
    policy
}

fn services(scope: &Scope) -> Value {
    let key = labels::FLEET;
    let taken_over = "has(params.status) && has(params.status.service) && has(object.metadata.name) \
                      && (params.status.service == object.metadata.name || (has(params.status.additionalServices) \
                      && object.metadata.name in params.status.additionalServices))";
    let missing = format!("has(object.spec.selector) && !('{key}' in object.spec.selector)");
    let mut policy = mutating(scope, "", "services", &[("taken-over", taken_over.into()), ("key-missing", missing)]);
    // Not as an apply configuration: a selector is atomic there.
    let patch = format!(
        "[JSONPatch{{op: 'add', path: '/spec/selector/' + jsonpatch.escapeKey('{key}'), value: params.metadata.name}}]"
    );
    policy["mutations"] = json!([{"patchType": "JSONPatch", "jsonPatch": {"expression": patch}}]);
    policy
}

fn deployments(scope: &Scope) -> Value {
    let rests = "has(params.status) && has(params.status.template) && has(params.status.template.name) \
                 && has(object.metadata.name) && params.status.template.name == object.metadata.name";
    let wakes = "has(object.spec.replicas) && object.spec.replicas != 0";
    let mut policy = mutating(scope, "apps", "deployments", &[("rests", rests.into()), ("wakes", wakes.into())]);
    // See `decision::is_a_wish`.
    let applied = |object: &str| {
        let key = "kubectl.kubernetes.io/last-applied-configuration";
        format!(
            "{object} != null && has({object}.metadata.annotations) && '{key}' in {object}.metadata.annotations \
             ? {object}.metadata.annotations['{key}'] : ''"
        )
    };
    let owned = "has(object.metadata.managedFields) && object.metadata.managedFields.exists(entry, has(entry.fieldsV1) \
                 && 'f:spec' in entry.fieldsV1 && 'f:replicas' in entry.fieldsV1['f:spec'])";
    let dropped = "variables.applied != '' && !variables.applied.contains('\"replicas\":') \
                   && (oldObject == null || variables.appliedBefore.contains('\"replicas\":'))";
    let variables = [
        ("applied", applied("object")),
        ("appliedBefore", applied("oldObject")),
        ("owned", owned.into()),
        ("dropped", dropped.into()),
        ("wish", "object.spec.replicas != 1 || (variables.owned && !variables.dropped)".into()),
    ];
    policy["variables"] =
        variables.iter().map(|(name, expression)| json!({"name": name, "expression": expression})).collect();
    let rest = format!(
        "variables.wish ? Object{{metadata: Object.metadata{{annotations: \
         {{'{}': string(object.spec.replicas)}}}}, spec: Object.spec{{replicas: 0}}}} \
         : Object{{spec: Object.spec{{replicas: 0}}}}",
        labels::REPLICAS
    );
    policy["mutations"] = json!([{"patchType": "ApplyConfiguration", "applyConfiguration": {"expression": rest}}]);
    policy
}

/// A Scale has no labels and no template, so neither of the others sees it; and what it says would be lost.
fn scale(scope: &Scope) -> Value {
    let mut policy = policy(scope, "apps", "deployments/scale", &["UPDATE"]);
    policy["validations"] = json!([{
        "expression": "!(has(params.status) && has(params.status.template) && has(params.status.template.name) \
                       && params.status.template.name == request.name)",
        "message": "this Deployment is the template of a Canary; use: kubectl scale canary/NAME",
        "messageExpression": "'Deployment ' + request.name + ' rests at 0 replicas, because it is the template of Canary ' \
                              + params.metadata.name + '; use: kubectl scale canary/' + params.metadata.name",
        "reason": "Forbidden",
    }]);
    policy
}

/// A revision runs as it was judged: another template would be Pods that nobody judged, behind traffic that they did not earn.
/// Kubernetes' own controllers are let through: they write back the template that they read.
fn revisions(scope: &Scope) -> Value {
    let revision = labels::REVISION;
    let mut policy = without_parameter(scope, "apps", "deployments", &["UPDATE"]);
    policy["matchConstraints"]["objectSelector"] =
        json!({"matchExpressions": [{"key": revision, "operator": "Exists"}]});
    // Left over from a Canary that was deleted with its dependents orphaned, it is a Deployment like any other.
    let owned = "has(oldObject.metadata.ownerReferences) && oldObject.metadata.ownerReferences.exists(owner, \
                 owner.kind == 'Canary' && owner.apiVersion.startsWith('sluice.dev/'))";
    let by_hand = "!request.userInfo.username.startsWith('system:serviceaccount:kube-system:')";
    let mut conditions = scope.conditions();
    conditions.push(json!({"name": "not-kubernetes-itself", "expression": by_hand}));
    conditions.push(json!({"name": "of-a-canary", "expression": owned}));
    policy["matchConditions"] = conditions.into();
    policy["validations"] = json!([{
        "expression": "object.spec.template == oldObject.spec.template",
        "message": "this Deployment runs a revision of a Canary; change the Deployment that the Canary names",
        "messageExpression": "'Deployment ' + request.name + ' runs a revision as it was judged, and is not changed; \
                              change the Deployment that its Canary names, and the change is released'",
        "reason": "Forbidden",
    }]);
    policy
}

/// Only objects with our label, so nothing of anybody else's ever waits for us. While no controller answers, writes to a
/// taken-over Service and to a target at rest are refused (`Fail`), and whoever made them tries again: applied without us,
/// they would send clients around the fleet, or start Pods that nobody judged, just when nobody repairs it. Traffic flows on
/// meanwhile; deletion, status and every other object are not concerned. An object that is made anew has no label yet: it is
/// repaired.
fn webhooks(scope: &Scope, address: &Address, ca: &str) -> Value {
    let mut client = json!({"caBundle": ByteString(ca.as_bytes().to_vec())});
    match address {
        Address::Service { namespace, name, port } => {
            client["service"] = json!({"namespace": namespace, "name": name, "port": port, "path": PATH});
        }
        Address::Url(url) => client["url"] = json!(format!("{url}{PATH}")),
    }
    // The keeper's check; no other dry run is ours.
    let asked_of_us = format!("{} || (has(request.dryRun) && request.dryRun)", scope.somebody_else());
    let webhook = |group: &str, resource: &str| {
        json!({
            "name": webhook_name(resource),
            "clientConfig": client,
            "rules": [{
                "apiGroups": [group], "apiVersions": ["v1"], "resources": [resource],
                "operations": ["CREATE", "UPDATE"], "scope": "*",
            }],
            "namespaceSelector": scope.namespaces(),
            // It matches if the old object or the new one does: a write that drops the label is seen.
            "objectSelector": {"matchExpressions": [
                {"key": labels::CANARY, "operator": "Exists"},
                {"key": labels::REVISION, "operator": "DoesNotExist"},
            ]},
            "matchConditions": conditions(&asked_of_us),
            "matchPolicy": "Equivalent",
            "sideEffects": "None",
            "failurePolicy": "Fail",
            "timeoutSeconds": 2,
            "reinvocationPolicy": "IfNeeded",
            "admissionReviewVersions": ["v1"],
        })
    };
    json!([webhook("", "services"), webhook("apps", "deployments")])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(effective: &Effective) -> Vec<Value> {
        let scope = Scope { own_user: "system:serviceaccount:sluice-system:sluice-controller".into(), namespace: None };
        let address = Address::Service { namespace: "sluice-system".into(), name: "sluice-webhook".into(), port: 443 };
        wanted(effective, true, &scope, &address, "CA").into_iter().map(|(_, object)| object).collect()
    }

    #[test]
    fn policies_for_an_api_server_that_serves_them() {
        insta::assert_yaml_snapshot!(of(&Effective::Policy("v1beta1".into())));
    }

    #[test]
    fn the_webhook_for_one_that_does_not() {
        insta::assert_yaml_snapshot!(of(&Effective::Webhook));
    }

    #[test]
    fn an_installation_for_one_namespace_concerns_no_other_and_has_names_of_its_own() {
        let scope = Scope { own_user: "me".into(), namespace: Some("shop".into()) };
        let address = Address::Url("https://127.0.0.1:1".into());
        let only = json!({"matchLabels": {"kubernetes.io/metadata.name": "shop"}});
        for effective in [Effective::Policy("v1".into()), Effective::Webhook] {
            for (kind, object) in wanted(&effective, true, &scope, &address, "") {
                let name = object["metadata"]["name"].as_str().unwrap().to_owned();
                assert!(kind.names(Some("shop")).contains(&name), "{} {name} would never be deleted", kind.kind);
                assert!(!kind.names(None).contains(&name), "{name}");
                let places: Vec<_> = [
                    "/spec/matchConstraints/namespaceSelector",
                    "/webhooks/0/namespaceSelector",
                    "/webhooks/1/namespaceSelector",
                ]
                .iter()
                .filter_map(|path| object.pointer(path))
                .collect();
                assert!(places.iter().all(|place| **place == only), "{object}");
                assert_eq!(places.is_empty(), kind.kind.ends_with("Binding"), "{object}");
                let parameters = object.pointer("/spec/paramRef");
                assert!(parameters.is_none_or(|parameters| parameters["namespace"] == "shop"), "{object}");
            }
        }
    }

    #[test]
    fn every_object_has_one_of_the_known_names() {
        for effective in [Effective::Policy("v1".into()), Effective::Webhook, Effective::Repair] {
            let scope = Scope { own_user: "me".into(), namespace: None };
            for (kind, object) in wanted(&effective, true, &scope, &Address::Url(String::new()), "") {
                let name = object["metadata"]["name"].as_str().unwrap().to_owned();
                assert!(kind.names(None).contains(&name), "{} {name} would never be deleted", kind.kind);
            }
        }
    }
}
