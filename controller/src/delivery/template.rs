//! A revision's pod template: its hash, and what becomes of it before Pods run it. Untyped JSON from end to end: typed
//! structs would drop fields that a newer API server has.

use std::{collections::BTreeMap, fmt::Write as _};

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use sluice_crds::labels;

use super::config::{self, Pins};

/// Name of the sidecar container.
pub const SIDECAR: &str = "sluice-proxy";
/// Name of the volume with the sidecar's token and trust bundle.
const VOLUME: &str = "sluice-identity";
/// Where that volume is mounted.
const IDENTITY: &str = "/var/run/secrets/sluice.dev";
/// Inbound mTLS, health and metrics, admin: docs/xds.md "Ports".
const PORTS: [i64; 3] = [20443, HEALTH_PORT, 20445];
const HEALTH_PORT: i64 = 20444;
/// What Kubernetes grants a Pod that does not say (core/v1 `terminationGracePeriodSeconds`).
const DEFAULT_GRACE_SECONDS: i64 = 30;
/// For how long the application goes on when its Pod ends. The fleet leaves the Pod within milliseconds; the rest is for the
/// requests that it has begun.
const PRE_STOP_SECONDS: i64 = 5;

/// How sidecars are made; a setting of the controller. A change concerns later revisions only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sidecar {
    pub image: String,
    /// `Always`, `IfNotPresent` or `Never`; Kubernetes' default where absent.
    pub image_pull_policy: Option<String>,
    /// `host:port` of the controllers.
    pub controller: String,
    /// SPIFFE id of the controllers.
    pub controller_id: String,
    /// Always set: quotas and autoscalers need them.
    pub cpu_request: String,
    pub memory_request: String,
    pub cpu_limit: Option<String>,
    pub memory_limit: Option<String>,
    /// `SLUICE_LOG`, as the controllers and the fleet have it.
    pub log: String,
    /// `SLUICE_LOG_FORMAT`.
    pub log_format: String,
}

/// A template that cannot be run behind the fleet.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error(
        "its Pods use the network of their node (hostNetwork), where the sidecar's port can exist only once; remove hostNetwork from the pod template"
    )]
    HostNetwork,
    #[error("its Pods run on Windows (spec.os.name), for which there is no sidecar")]
    Windows,
    #[error(
        "container {container:?} declares port {port}, which the sidecar needs (20443, 20444 and 20445 are its own); let the application listen on another one"
    )]
    PortTaken { container: String, port: i64 },
    #[error(
        "it has a container named {SIDECAR:?} already; rename that container, or remove it if it was copied from a revision of Sluice's"
    )]
    ContainerTaken,
    #[error(
        "it has a volume named {VOLUME:?} already; rename that volume, or remove it if it was copied from a revision of Sluice's"
    )]
    VolumeTaken,
    #[error(
        "its annotation {} says {value:?}; give a number of seconds from 0 to {grace}, the Pod's terminationGracePeriodSeconds",
        labels::PRE_STOP_SECONDS
    )]
    PreStop { value: String, grace: i64 },
    #[error("spec.template has no spec with containers")]
    Empty,
}

/// JSON with sorted keys, without nulls: equal for equal meaning, whatever wrote it.
///
/// Nulls go because some API servers write `creationTimestamp: null` where others write nothing.
#[must_use]
pub fn canonical(value: &Value) -> String {
    let mut text = String::new();
    write_canonical(value, &mut text);
    text
}

fn write_canonical(value: &Value, text: &mut String) {
    match value {
        Value::Object(object) => {
            // Sorted here: whether serde_json's map is sorted depends on a feature that any dependency may switch on.
            let sorted: BTreeMap<_, _> = object.iter().filter(|(_, value)| !value.is_null()).collect();
            text.push('{');
            for (index, (key, value)) in sorted.into_iter().enumerate() {
                if index > 0 {
                    text.push(',');
                }
                let _ = write!(text, "{}:", Value::from(key.as_str()));
                write_canonical(value, text);
            }
            text.push('}');
        }
        Value::Array(items) => {
            text.push('[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    text.push(',');
                }
                write_canonical(item, text);
            }
            text.push(']');
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            let _ = write!(text, "{value}");
        }
    }
}

/// 10 characters (47 bits) of the SHA-256, in the alphabet that Kubernetes uses for names (no vowels, nothing that looks alike).
#[must_use]
pub fn digest(content: &str) -> String {
    // k8s.io/apimachinery/pkg/util/rand: alphanums.
    const ALPHABET: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
    let hash = Sha256::digest(content.as_bytes());
    let mut number = hash.iter().take(16).fold(0_u128, |number, byte| (number << 8) | u128::from(*byte));
    let mut text = String::with_capacity(10);
    for _ in 0..10 {
        text.push(char::from(ALPHABET[(number % 27) as usize]));
        number /= 27;
    }
    text
}

/// Hash of a revision: the user's pod template, and the content of the configuration that it uses (digest by `configmap/NAME`
/// or `secret/NAME`). What Sluice adds is no part of it, so that an upgrade of Sluice starts no release.
#[must_use]
pub fn revision_hash(template: &Value, tracked: &BTreeMap<String, String>) -> String {
    host_label(digest(&canonical(&json!({"sluice.dev/revision": "v1", "template": template, "configs": tracked}))))
}

/// A revision is the last label of the SNI by which its Pods are reached, and a host's name does not end in digits alone (RFC 3696,
/// section 2).
fn host_label(mut hash: String) -> String {
    while hash.bytes().all(|byte| byte.is_ascii_digit()) {
        hash = digest(&hash);
    }
    hash
}

/// Whether Pods of this template can have our sidecar.
///
/// # Errors
/// With the reason, and what to change.
pub fn check(template: &Value) -> Result<(), Refused> {
    let spec = template.get("spec").ok_or(Refused::Empty)?;
    if spec.get("containers").and_then(Value::as_array).is_none_or(Vec::is_empty) {
        return Err(Refused::Empty);
    }
    if spec.get("hostNetwork") == Some(&Value::Bool(true)) {
        return Err(Refused::HostNetwork);
    }
    if spec.pointer("/os/name").and_then(Value::as_str) == Some("windows") {
        return Err(Refused::Windows);
    }
    for container in containers(spec) {
        let name = container.get("name").and_then(Value::as_str).unwrap_or_default();
        if name == SIDECAR {
            return Err(Refused::ContainerTaken);
        }
        for port in ports(container) {
            if let Some(port) = port.get("containerPort").and_then(Value::as_i64).filter(|port| PORTS.contains(port)) {
                return Err(Refused::PortTaken { container: name.to_owned(), port });
            }
        }
    }
    let mut volumes = spec.get("volumes").and_then(Value::as_array).into_iter().flatten();
    if volumes.any(|volume| volume.get("name").and_then(Value::as_str) == Some(VOLUME)) {
        return Err(Refused::VolumeTaken);
    }
    pre_stop_seconds(template).map(drop)
}

/// For how many seconds containers go on when their Pod ends.
fn pre_stop_seconds(template: &Value) -> Result<i64, Refused> {
    let grace = template.get("spec").map_or(DEFAULT_GRACE_SECONDS, grace_seconds);
    let Some(value) = template
        .get("metadata")
        .and_then(|metadata| metadata.get("annotations")?.get(labels::PRE_STOP_SECONDS)?.as_str())
    else {
        // Half of what there is, so that the application has the other half for its own end.
        return Ok(PRE_STOP_SECONDS.min(grace / 2));
    };
    value
        .parse()
        .ok()
        .filter(|seconds| (0..=grace).contains(seconds))
        .ok_or_else(|| Refused::PreStop { value: value.to_owned(), grace })
}

fn grace_seconds(pod: &Value) -> i64 {
    pod.get("terminationGracePeriodSeconds").and_then(Value::as_i64).unwrap_or(DEFAULT_GRACE_SECONDS)
}

/// The template as the Pods of a revision run it: the user's, with our two labels, our sidecar, and its references to
/// configuration changed to the pinned copies.
///
/// # Errors
/// As [`check`].
pub fn render(
    template: &Value,
    canary: &str,
    revision: &str,
    pins: &Pins,
    sidecar: &Sidecar,
) -> Result<Value, Refused> {
    check(template)?;
    let pre_stop = pre_stop_seconds(template)?;
    let mut template = template.clone();
    config::pin(&mut template, pins);
    let root = template.as_object_mut().ok_or(Refused::Empty)?;

    let metadata = object(root, "metadata");
    metadata.retain(|_, value| !value.is_null());
    let labels = object(metadata, "labels");
    labels.insert(labels::CANARY.into(), canary.into());
    labels.insert(labels::REVISION.into(), revision.into());

    let grace = root.get("spec").map_or(DEFAULT_GRACE_SECONDS, grace_seconds);
    let spec = object(root, "spec");
    if pre_stop > 0 {
        for container in array(spec, "containers").iter_mut().filter_map(Value::as_object_mut) {
            let lifecycle = object(container, "lifecycle");
            if lifecycle.get("preStop").is_none_or(Value::is_null) {
                // KEP-3960. Its SIGTERM comes afterwards, so that an application that ends at once has nothing left to lose.
                lifecycle.insert("preStop".into(), json!({"sleep": {"seconds": pre_stop}}));
            }
        }
    }
    let container = sidecar_container(spec, grace - pre_stop, sidecar);
    // Last of the init containers: those of the user start as they did without it, and the kubelet stops it before
    // native sidecars of the user's, on which the application may depend to the end.
    array(spec, "initContainers").push(container);
    array(spec, "volumes").push(json!({
        "name": VOLUME,
        "projected": {"sources": [
            {"serviceAccountToken": {"audience": "sluice.dev", "expirationSeconds": 3600, "path": "token"}},
            {"configMap": {"name": labels::TRUST_BUNDLE, "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        ]},
    }));
    Ok(template)
}

/// `left`: seconds of the Pod's grace when its application is told to end.
fn sidecar_container(pod: &Map<String, Value>, left: i64, sidecar: &Sidecar) -> Value {
    // It is told to end after the application. Done before the kubelet loses its patience with the whole Pod.
    let drain = (left - 5).max(1);
    let field = |path: &str| json!({"fieldRef": {"apiVersion": "v1", "fieldPath": path}});
    let probe = |path: &str, period: i64, timeout: i64, failures: i64| {
        json!({
            "httpGet": {"path": format!("/healthz/{path}"), "port": HEALTH_PORT, "scheme": "HTTP"},
            "periodSeconds": period, "timeoutSeconds": timeout, "failureThreshold": failures, "successThreshold": 1,
        })
    };
    // `restricted` Pod Security, without a user id of ours: some clusters assign ranges.
    let mut security = json!({
        "runAsNonRoot": true,
        "allowPrivilegeEscalation": false,
        "readOnlyRootFilesystem": true,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    });
    if pod.get("securityContext").and_then(|context| context.get("runAsUser")) == Some(&json!(0)) {
        // The Pod makes every container root unless it says otherwise, and the kubelet would refuse ours.
        security["runAsUser"] = json!(65532);
    }
    let mut resources = json!({"requests": {"cpu": sidecar.cpu_request, "memory": sidecar.memory_request}});
    for (name, limit) in [("cpu", &sidecar.cpu_limit), ("memory", &sidecar.memory_limit)] {
        if let Some(limit) = limit {
            resources["limits"][name] = json!(limit);
        }
    }
    let mut container = json!({
        "name": SIDECAR,
        "image": sidecar.image,
        "command": ["/sluice-proxy", "sidecar"],
        // A native sidecar (KEP-753): started before the application, stopped after it.
        "restartPolicy": "Always",
        "env": [
            {"name": "POD_NAME", "valueFrom": field("metadata.name")},
            {"name": "POD_NAMESPACE", "valueFrom": field("metadata.namespace")},
            {"name": "POD_IP", "valueFrom": field("status.podIP")},
            {"name": "SLUICE_CONTROLLER", "value": sidecar.controller},
            {"name": "SLUICE_CONTROLLER_ID", "value": sidecar.controller_id},
            {"name": "SLUICE_TOKEN", "value": format!("{IDENTITY}/token")},
            {"name": "SLUICE_TRUST_BUNDLE", "value": format!("{IDENTITY}/ca.crt")},
            {"name": "SLUICE_WORKERS", "value": "1"},
            {"name": "SLUICE_DRAIN_SECONDS", "value": drain.to_string()},
            {"name": "SLUICE_LOG", "value": sidecar.log},
            {"name": "SLUICE_LOG_FORMAT", "value": sidecar.log_format},
        ],
        // Not named: names of ports are unique in a Pod, and the user's come first.
        "ports": [{"containerPort": PORTS[0], "protocol": "TCP"}, {"containerPort": HEALTH_PORT, "protocol": "TCP"}],
        "readinessProbe": probe("ready", 2, 1, 3),
        "livenessProbe": probe("live", 10, 5, 6),
        // The kubelet signals a native sidecar only after the application is gone, but runs this beside its SIGTERM.
        "lifecycle": {"preStop": {"exec": {"command": ["/sluice-proxy", "drain"]}}},
        "resources": resources,
        "securityContext": security,
        "volumeMounts": [{"name": VOLUME, "mountPath": IDENTITY, "readOnly": true}],
    });
    if let Some(policy) = &sidecar.image_pull_policy {
        container["imagePullPolicy"] = json!(policy);
    }
    container
}

/// Number of each named TCP port of the template's containers: what a named `targetPort` means for this revision.
#[must_use]
pub fn named_ports(template: &Value) -> BTreeMap<String, u16> {
    let mut named = BTreeMap::new();
    let spec = template.get("spec");
    let runs = |container: &&Value| container.get("restartPolicy").and_then(Value::as_str) == Some("Always");
    // Init containers that end have no ports by the time that anybody calls (FindPort in pkg/api/v1/pod).
    let main = spec.into_iter().flat_map(|spec| list(spec, "containers"));
    let sidecars = spec.into_iter().flat_map(|spec| list(spec, "initContainers")).filter(runs);
    for port in main.chain(sidecars).flat_map(ports) {
        let tcp = port.get("protocol").and_then(Value::as_str).unwrap_or("TCP") == "TCP";
        let name = port.get("name").and_then(Value::as_str);
        let number = port.get("containerPort").and_then(Value::as_u64).and_then(|port| u16::try_from(port).ok());
        if let (true, Some(name), Some(number)) = (tcp, name, number) {
            // The first one counts, as for Kubernetes.
            named.entry(name.to_owned()).or_insert(number);
        }
    }
    named
}

/// All containers, init containers included.
fn containers(spec: &Value) -> impl Iterator<Item = &Value> {
    list(spec, "containers").chain(list(spec, "initContainers"))
}

fn ports(container: &Value) -> impl Iterator<Item = &Value> {
    list(container, "ports")
}

fn list<'a>(parent: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    parent.get(key).and_then(Value::as_array).into_iter().flatten()
}

fn object<'a>(parent: &'a mut Map<String, Value>, key: &str) -> &'a mut Map<String, Value> {
    let child = parent.entry(key).or_insert_with(|| json!({}));
    if !child.is_object() {
        *child = json!({});
    }
    match child {
        Value::Object(map) => map,
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
            unreachable!("made an object just above")
        }
    }
}

fn array<'a>(parent: &'a mut Map<String, Value>, key: &str) -> &'a mut Vec<Value> {
    let child = parent.entry(key).or_insert_with(|| json!([]));
    if !child.is_array() {
        *child = json!([]);
    }
    match child {
        Value::Array(items) => items,
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Object(_) => {
            unreachable!("made an array just above")
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::delivery::config::ConfigRef;

    pub(crate) fn pod_template() -> Value {
        json!({
            "metadata": {"creationTimestamp": null, "labels": {"app": "podinfo"}, "annotations": {"team": "web"}},
            "spec": {
                "containers": [{
                    "name": "podinfo",
                    "image": "podinfo:6.0.0",
                    "ports": [{"name": "http", "containerPort": 9898, "protocol": "TCP"}],
                    "env": [{"name": "COLOR", "valueFrom": {"configMapKeyRef": {"name": "podinfo", "key": "color"}}}],
                    "aFieldOfTomorrow": {"kept": true},
                }],
                "serviceAccountName": "podinfo",
                "volumes": [{"name": "tls", "secret": {"secretName": "podinfo-tls"}}],
            },
        })
    }

    fn sidecar() -> Sidecar {
        Sidecar {
            image: "registry.example/sluice-proxy:1".into(),
            image_pull_policy: None,
            controller: "sluice-controller.sluice-system.svc:18000".into(),
            controller_id: "spiffe://cluster.local/ns/sluice-system/sa/sluice-controller".into(),
            cpu_request: "10m".into(),
            memory_request: "24Mi".into(),
            cpu_limit: None,
            memory_limit: Some("64Mi".into()),
            log: "info".into(),
            log_format: "json".into(),
        }
    }

    #[test]
    fn the_hash_stays_the_same_in_every_version_of_sluice() {
        let tracked = BTreeMap::from([("configmap/podinfo".to_owned(), "bcdfghjklm".to_owned())]);
        // Changing these would release every application in the cluster anew.
        assert_eq!(revision_hash(&pod_template(), &BTreeMap::new()), "vmwglwxn9v");
        assert_eq!(revision_hash(&pod_template(), &tracked), "l92d7sv2mp");
    }

    #[test]
    fn the_hash_does_not_depend_on_order_or_nulls() {
        let one: Value =
            serde_json::from_str(r#"{"metadata":{"creationTimestamp":null,"labels":{"a":"1","b":"2"}},"spec":{}}"#)
                .unwrap();
        let other: Value = serde_json::from_str(r#"{"spec":{},"metadata":{"labels":{"b":"2","a":"1"}}}"#).unwrap();
        assert_eq!(revision_hash(&one, &BTreeMap::new()), revision_hash(&other, &BTreeMap::new()));
    }

    #[test]
    fn whatever_changes_in_the_template_or_its_configuration_changes_the_hash() {
        let none = BTreeMap::new();
        let before = revision_hash(&pod_template(), &none);
        let changes: [(&str, Value); 4] = [
            ("/spec/containers/0/image", json!("podinfo:6.0.1")),
            ("/spec/containers/0/aFieldOfTomorrow/kept", json!(false)),
            ("/metadata/labels/app", json!("other")),
            ("/spec/volumes", json!([])),
        ];
        for (path, value) in changes {
            let mut template = pod_template();
            *template.pointer_mut(path).unwrap() = value;
            assert_ne!(revision_hash(&template, &none), before, "{path}");
        }
        let mut restarted = pod_template();
        restarted["metadata"]["annotations"]["kubectl.kubernetes.io/restartedAt"] = json!("2026-01-01T00:00:00Z");
        assert_ne!(revision_hash(&restarted, &none), before, "a rollout restart is a release");
        let tracked = |digest: &str| BTreeMap::from([("configmap/podinfo".to_owned(), digest.to_owned())]);
        assert_ne!(revision_hash(&pod_template(), &tracked("a")), revision_hash(&pod_template(), &tracked("b")));
        assert_ne!(revision_hash(&pod_template(), &tracked("a")), before);
    }

    #[test]
    fn lists_keep_their_order_in_the_hash() {
        assert_ne!(canonical(&json!([1, 2])), canonical(&json!([2, 1])));
        assert_eq!(
            canonical(&json!({"b": [null, {"d": null, "c": "\"\n"}], "a": 1.5})),
            r#"{"a":1.5,"b":[null,{"c":"\"\n"}]}"#
        );
    }

    #[test]
    fn a_digest_is_ten_characters_that_fit_in_a_name() {
        for content in ["", "a", "b", "some more"] {
            let digest = digest(content);
            assert_eq!(digest.len(), 10);
            assert!(digest.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit()), "{digest}");
        }
    }

    #[test]
    fn a_revision_has_a_letter_in_its_name() {
        assert_eq!(host_label("24567b9245".to_owned()), "24567b9245");
        let other = host_label("2456789245".to_owned());
        assert_eq!((other.len(), other.bytes().any(|byte| byte.is_ascii_lowercase())), (10, true), "{other}");
    }

    #[test]
    fn a_rendered_template_is_the_users_with_sidecar_labels_and_pinned_configuration() {
        let pins = Pins::from([(ConfigRef::config_map("podinfo"), "podinfo-bcdfghjklm".to_owned())]);
        let rendered = render(&pod_template(), "podinfo", "bcdfghjklm", &pins, &sidecar()).unwrap();
        insta::assert_yaml_snapshot!(rendered);
    }

    #[test]
    fn the_sidecar_is_done_draining_before_the_pods_grace_ends() {
        for (grace, drain) in [(None, "20"), (Some(300), "290"), (Some(3), "1")] {
            let mut template = pod_template();
            if let Some(grace) = grace {
                template["spec"]["terminationGracePeriodSeconds"] = json!(grace);
            }
            let rendered = render(&template, "c", "r", &Pins::new(), &sidecar()).unwrap();
            let env = rendered["spec"]["initContainers"][0]["env"].as_array().unwrap().clone();
            let value = env.into_iter().find(|variable| variable["name"] == "SLUICE_DRAIN_SECONDS").unwrap();
            assert_eq!(value["value"], drain);
        }
    }

    #[test]
    fn a_container_without_a_pre_stop_hook_goes_on_for_some_seconds() {
        let hook = |grace: Option<i64>, seconds: Option<&str>, lifecycle: Value| {
            let mut template = pod_template();
            if let Some(grace) = grace {
                template["spec"]["terminationGracePeriodSeconds"] = json!(grace);
            }
            if let Some(seconds) = seconds {
                template["metadata"]["annotations"][labels::PRE_STOP_SECONDS] = json!(seconds);
            }
            template["spec"]["containers"][0]["lifecycle"] = lifecycle;
            let rendered = render(&template, "c", "r", &Pins::new(), &sidecar())?;
            Ok(rendered["spec"]["containers"][0]["lifecycle"].clone())
        };
        let sleep = |seconds: i64| json!({"sleep": {"seconds": seconds}});
        assert_eq!(hook(None, None, Value::Null), Ok(json!({"preStop": sleep(5)})));
        let started = json!({"postStart": {"exec": {"command": ["/warm"]}}});
        let both = json!({"postStart": {"exec": {"command": ["/warm"]}}, "preStop": sleep(5)});
        assert_eq!(hook(None, None, started), Ok(both));
        let own = json!({"preStop": {"exec": {"command": ["/quit"]}}});
        assert_eq!(hook(None, Some("20"), own.clone()), Ok(own), "the user's own stays");
        assert_eq!(hook(Some(6), None, Value::Null), Ok(json!({"preStop": sleep(3)})), "half of the Pod's grace");
        assert_eq!(hook(Some(1), None, Value::Null), Ok(Value::Null), "Kubernetes wants at least a second");
        assert_eq!(hook(None, Some("0"), Value::Null), Ok(Value::Null));
        assert_eq!(hook(None, Some("30"), Value::Null), Ok(json!({"preStop": sleep(30)})));
        for (grace, wrong) in [(30, "31"), (30, "-1"), (30, "5s"), (30, "")] {
            let refused = Refused::PreStop { value: wrong.to_owned(), grace };
            assert_eq!(hook(None, Some(wrong), Value::Null), Err(refused.clone()), "{wrong}");
            let said = refused.to_string();
            assert!(said.contains(labels::PRE_STOP_SECONDS) && said.contains("from 0 to 30"), "{said}");
        }
    }

    #[test]
    fn the_sidecar_has_a_user_of_its_own_only_where_the_pod_would_make_it_root() {
        let user = |context: Value| {
            let mut template = pod_template();
            template["spec"]["securityContext"] = context;
            let rendered = render(&template, "c", "r", &Pins::new(), &sidecar()).unwrap();
            rendered["spec"]["initContainers"][0]["securityContext"]["runAsUser"].clone()
        };
        assert_eq!(user(json!({})), Value::Null);
        assert_eq!(user(json!({"runAsUser": 1000})), Value::Null);
        assert_eq!(user(json!({"runAsUser": 0})), json!(65532));
    }

    #[test]
    fn templates_that_cannot_run_behind_the_fleet_are_refused() {
        let cases: [(&str, Value, Refused); 8] = [
            ("/spec/hostNetwork", json!(true), Refused::HostNetwork),
            ("/spec/os", json!({"name": "windows"}), Refused::Windows),
            (
                "/spec/containers/0/ports/0/containerPort",
                json!(20443),
                Refused::PortTaken { container: "podinfo".into(), port: 20443 },
            ),
            (
                "/spec/containers/0/ports/0/containerPort",
                json!(20445),
                Refused::PortTaken { container: "podinfo".into(), port: 20445 },
            ),
            ("/spec/initContainers", json!([{"name": "sluice-proxy"}]), Refused::ContainerTaken),
            ("/spec/volumes/0/name", json!("sluice-identity"), Refused::VolumeTaken),
            ("/spec/containers", json!([]), Refused::Empty),
            ("/spec", Value::Null, Refused::Empty),
        ];
        for (path, value, refused) in cases {
            let mut template = pod_template();
            match template.pointer_mut(path) {
                Some(at) => *at = value,
                None => {
                    template["spec"][path.trim_start_matches("/spec/")] = value;
                }
            }
            assert_eq!(check(&template), Err(refused.clone()), "{path}");
            assert_eq!(render(&template, "c", "r", &Pins::new(), &sidecar()), Err(refused), "{path}");
        }
        assert_eq!(check(&pod_template()), Ok(()));
    }

    #[test]
    fn a_named_port_is_that_of_a_container_that_stays() {
        let template = json!({"spec": {
            "initContainers": [
                {"name": "once", "ports": [{"name": "never", "containerPort": 1}]},
                {"name": "side", "restartPolicy": "Always", "ports": [{"name": "side", "containerPort": 9000}]},
            ],
            "containers": [{"name": "app", "ports": [
                {"name": "http", "containerPort": 8080}, {"name": "dns", "containerPort": 53, "protocol": "UDP"}, {"containerPort": 7},
            ]}],
        }});
        assert_eq!(named_ports(&template), BTreeMap::from([("http".to_owned(), 8080), ("side".to_owned(), 9000)]));
    }
}
