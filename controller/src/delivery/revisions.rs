//! A revision's objects: the record (`ControllerRevision`), written once and never changed, and the Deployment that runs it.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::apps::v1::ControllerRevision,
    apimachinery::pkg::{
        apis::meta::v1::{ObjectMeta, OwnerReference},
        runtime::RawExtension,
    },
};
use kube::{
    Resource, ResourceExt,
    api::{DynamicObject, TypeMeta},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sluice_crds::{Canary, labels};

use super::template;

/// Longest name of an object of ours: that of a Service and of a label value.
const MAX_NAME: usize = 63;

/// Labels that objects of ours take from the target. Not those by which tools know what they manage
/// (`app.kubernetes.io/instance`, `argocd.argoproj.io/*`, ...): they would prune what is not in Git.
const DEPLOYMENT_LABELS: [&str; 6] = [
    "app",
    "app.kubernetes.io/component",
    "app.kubernetes.io/name",
    "app.kubernetes.io/part-of",
    "app.kubernetes.io/version",
    "version",
];

/// `base` and `suffix` in at most 63 characters: where it is too long, `base` is cut and a hash of it put in.
#[must_use]
pub fn shortened(base: &str, suffix: &str) -> String {
    if base.len() + suffix.len() <= MAX_NAME {
        return format!("{base}{suffix}");
    }
    let hash = template::digest(base);
    let room = MAX_NAME.saturating_sub(suffix.len() + hash.len() + 1);
    // Names are ASCII; `.` and `-` must not stand before our hyphen.
    let cut = base.get(..room).unwrap_or_default().trim_end_matches(['-', '.']);
    format!("{cut}-{hash}{suffix}")
}

/// Name of a revision's record and of its Deployment.
#[must_use]
pub fn name(target: &str, revision: &str) -> String {
    shortened(target, &format!("-{revision}"))
}

/// Labels of every object of a revision.
#[must_use]
pub fn labels_of(canary: &str, revision: &str) -> BTreeMap<String, String> {
    BTreeMap::from([(labels::CANARY.to_owned(), canary.to_owned()), (labels::REVISION.to_owned(), revision.to_owned())])
}

/// The user's labels that an object of ours may have.
#[must_use]
pub fn kept_labels(labels: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let kept = labels.iter().filter(|(key, _)| DEPLOYMENT_LABELS.contains(&key.as_str()));
    kept.map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// What is in the record. Never the content of a Secret.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// The pod template as its Pods run it, sidecar included. Named target ports and the service account of this revision
    /// are read from here.
    pub template: Value,
    /// The rest of the Deployment's spec (strategy, minReadySeconds, ...), as the target had it.
    pub deployment: Map<String, Value>,
    /// Labels of the Deployment beside our own.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// A record that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error(
    "ControllerRevision {name} is not a record of Sluice's ({source}); delete it, and the revision is recorded anew at the next release"
)]
pub struct RecordError {
    name: String,
    source: serde_json::Error,
}

impl Record {
    /// Of the target as it is now. `rendered` is its pod template after [`template::render`].
    #[must_use]
    pub fn of(target: &DynamicObject, rendered: Value) -> Self {
        let mut deployment = target.data.get("spec").and_then(Value::as_object).cloned().unwrap_or_default();
        for ours in ["template", "selector", "replicas", "paused"] {
            deployment.remove(ours);
        }
        let labels = kept_labels(target.labels());
        Self { template: rendered, deployment, labels }
    }

    /// Reads a record back.
    ///
    /// # Errors
    /// If somebody wrote something else there.
    pub fn read(object: &ControllerRevision) -> Result<Self, RecordError> {
        let data = object.data.as_ref().map_or(Value::Null, |data| data.0.clone());
        serde_json::from_value(data).map_err(|source| RecordError { name: object.name_any(), source })
    }

    /// The object to create. Without an owner, and with our labels only: StatefulSet and DaemonSet controllers adopt and prune
    /// ownerless ControllerRevisions that match their selectors.
    #[must_use]
    pub fn object(&self, canary: &Canary, revision: &str, number: i64) -> ControllerRevision {
        ControllerRevision {
            metadata: ObjectMeta {
                name: Some(name(&canary.spec.target_ref.name, revision)),
                namespace: canary.namespace(),
                labels: Some(labels_of(&canary.name_any(), revision)),
                ..ObjectMeta::default()
            },
            // Cannot fail: maps with string keys and plain values.
            data: Some(RawExtension(serde_json::to_value(self).unwrap_or_default())),
            revision: number,
        }
    }

    /// The Deployment to create.
    #[must_use]
    pub fn deployment(
        &self,
        canary: &Canary,
        record: &ControllerRevision,
        revision: &str,
        replicas: u32,
    ) -> DynamicObject {
        let ours = labels_of(&canary.name_any(), revision);
        let mut spec = self.deployment.clone();
        spec.insert("replicas".into(), replicas.into());
        spec.insert("selector".into(), json!({"matchLabels": ours}));
        spec.insert("template".into(), self.template.clone());
        DynamicObject {
            types: Some(TypeMeta { api_version: "apps/v1".into(), kind: "Deployment".into() }),
            metadata: ObjectMeta {
                name: Some(name(&canary.spec.target_ref.name, revision)),
                namespace: canary.namespace(),
                labels: Some(self.labels.clone().into_iter().chain(ours).collect()),
                owner_references: Some(owners(canary, record)),
                ..ObjectMeta::default()
            },
            data: json!({"spec": spec}),
        }
    }
}

/// Owners of everything that serves: the Canary controls, and the record is there so that a foreground deletion of the
/// Canary does not kill serving Pods before traffic is handed back. `blockOwnerDeletion` stays unset: it would need a right
/// on `canaries/finalizers`, and delays only the deletion of the Canary, which our finalizer does.
#[must_use]
pub fn owners(canary: &Canary, record: &ControllerRevision) -> Vec<OwnerReference> {
    vec![canary_owner(canary), record_owner(record)]
}

/// The Canary as controlling owner.
#[must_use]
pub fn canary_owner(canary: &Canary) -> OwnerReference {
    OwnerReference {
        api_version: Canary::api_version(&()).into_owned(),
        kind: Canary::kind(&()).into_owned(),
        name: canary.name_any(),
        uid: canary.uid().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: None,
    }
}

fn record_owner(record: &ControllerRevision) -> OwnerReference {
    OwnerReference {
        api_version: ControllerRevision::api_version(&()).into_owned(),
        kind: ControllerRevision::kind(&()).into_owned(),
        name: record.name_any(),
        uid: record.uid().unwrap_or_default(),
        controller: None,
        block_owner_deletion: None,
    }
}

/// Whether an object has all of these owners.
#[must_use]
pub fn has_owners<K: Resource>(object: &K, owners: &[OwnerReference]) -> bool {
    let has = object.owner_references();
    owners.iter().all(|owner| has.iter().any(|present| present.uid == owner.uid))
}

/// Whether an object is this Canary's own.
#[must_use]
pub fn owned<K: Resource>(object: &K, canary: &Canary) -> bool {
    let uid = canary.metadata.uid.as_deref();
    object.meta().owner_references.iter().flatten().any(|owner| Some(owner.uid.as_str()) == uid)
}

/// Whether an object of a revision is ours: of this Canary, or left over from a Canary of the same name that went without
/// hand-back (its finalizer removed by hand): then our labels are there and nobody else controls it.
#[must_use]
pub fn ours<K: Resource>(object: &K, canary: &Canary, revision: &str) -> bool {
    object.labels().get(labels::REVISION).is_some_and(|value| value == revision) && ours_by_label(object, canary)
}

/// Whether an object is a copy of configuration that was made for this revision: ours, and named as we name them. Not what
/// somebody has saved of one under another name.
#[must_use]
pub fn is_copy<K: Resource>(object: &K, canary: &Canary, revision: &str) -> bool {
    let named = object.meta().name.as_ref().is_some_and(|name| name.ends_with(&format!("-{revision}")));
    named && ours(object, canary, revision)
}

/// As [`ours`], for an object of no revision.
#[must_use]
pub fn ours_by_label<K: Resource>(object: &K, canary: &Canary) -> bool {
    let controller = object.owner_references().iter().find(|owner| owner.controller == Some(true));
    object.labels().get(labels::CANARY).is_some_and(|value| *value == canary.name_any())
        && controller.is_none_or(|owner| {
            Some(owner.uid.as_str()) == canary.metadata.uid.as_deref()
                || (owner.kind == Canary::kind(&()) && owner.name == canary.name_any())
        })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn canary(name: &str, uid: &str) -> Canary {
        serde_json::from_value(json!({
            "apiVersion": "sluice.dev/v1beta1", "kind": "Canary",
            "metadata": {"name": name, "namespace": "test", "uid": uid},
            "spec": {"targetRef": {"kind": "Deployment", "name": "podinfo"}, "service": {"port": 80}, "skipAnalysis": true},
        }))
        .unwrap()
    }

    fn target() -> DynamicObject {
        serde_json::from_value(json!({
            "apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": {
                "name": "podinfo", "namespace": "test",
                "labels": {"app": "podinfo", "app.kubernetes.io/instance": "argo-app", "argocd.argoproj.io/instance": "argo-app"},
                "annotations": {"deployment.kubernetes.io/revision": "7"},
            },
            "spec": {
                "replicas": 3, "paused": true, "minReadySeconds": 5, "aFieldOfTomorrow": 1,
                "selector": {"matchLabels": {"app": "podinfo"}},
                "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "50%", "maxUnavailable": 0}},
                "template": {"metadata": {"labels": {"app": "podinfo"}}, "spec": {"containers": [{"name": "app"}]}},
            },
        }))
        .unwrap()
    }

    #[test]
    fn names_fit_in_63_characters_and_stay_distinct() {
        assert_eq!(name("podinfo", "bcdfghjklm"), "podinfo-bcdfghjklm");
        let exact = "x".repeat(52);
        assert_eq!(name(&exact, "bcdfghjklm"), format!("{exact}-bcdfghjklm"));
        let long = |last: &str| name(&format!("{}{last}", "x".repeat(100)), "bcdfghjklm");
        assert_eq!(long("a").len(), 63);
        assert!(long("a").ends_with("-bcdfghjklm"));
        assert_ne!(long("a"), long("b"));
        // A cut beside a hyphen or a dot makes no name with two of them.
        let dotted = shortened(&format!("{}.-.-.-.-.-.-.-.-.-.-.-.-", "x".repeat(40)), "-bcdfghjklm");
        assert!(dotted.len() <= 63 && !dotted.contains(".-") && !dotted.contains("--"), "{dotted}");
    }

    #[test]
    fn a_revisions_deployment_is_made_from_the_record_alone() {
        let canary = canary("web", "uid-canary");
        let rendered = json!({"metadata": {"labels": {"app": "podinfo"}}, "spec": {"containers": [{"name": "app"}]}});
        let mut record = Record::of(&target(), rendered).object(&canary, "bcdfghjklm", 4);
        assert_eq!(record.owner_references(), &[], "the record is the owner that stays");
        assert!(record.labels().keys().all(|key| key.starts_with("sluice.dev/")), "{:?}", record.labels());
        record.metadata.uid = Some("uid-record".into());
        let deployment = Record::read(&record).unwrap().deployment(&canary, &record, "bcdfghjklm", 2);
        insta::assert_yaml_snapshot!(deployment);
    }

    #[test]
    fn what_is_not_a_record_says_so() {
        let foreign =
            ControllerRevision { data: Some(RawExtension(json!({"spec": {}}))), ..ControllerRevision::default() };
        assert!(Record::read(&foreign).unwrap_err().to_string().contains("delete it"));
    }

    #[test]
    fn an_object_is_ours_by_label_and_controller() {
        let mine = canary("web", "uid");
        let object = |labels: BTreeMap<String, String>, owners: Vec<OwnerReference>| ControllerRevision {
            metadata: ObjectMeta { labels: Some(labels), owner_references: Some(owners), ..ObjectMeta::default() },
            ..ControllerRevision::default()
        };
        let labelled = labels_of("web", "r1");
        let foreign = OwnerReference {
            controller: Some(true),
            kind: "StatefulSet".into(),
            name: "db".into(),
            uid: "x".into(),
            ..OwnerReference::default()
        };
        let cases = [
            ("without an owner", object(labelled.clone(), vec![]), true),
            ("ours", object(labelled.clone(), vec![canary_owner(&mine)]), true),
            (
                "of a Canary of that name that went without hand-back",
                object(labelled.clone(), vec![canary_owner(&canary("web", "old"))]),
                true,
            ),
            ("of another Canary", object(labelled.clone(), vec![canary_owner(&canary("api", "other"))]), false),
            ("of something else", object(labelled, vec![foreign]), false),
            ("another revision", object(labels_of("web", "r2"), vec![]), false),
            ("without our labels", object(BTreeMap::new(), vec![]), false),
        ];
        for (what, object, expected) in cases {
            assert_eq!(ours(&object, &mine, "r1"), expected, "{what}");
        }
    }
}
