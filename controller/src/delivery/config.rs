//! Configuration that a pod template uses. Its content is part of the revision, and each revision has pinned, immutable
//! copies: a change is released like any other, and a rollback brings the old content back.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use k8s_openapi::{
    api::core::v1::{ConfigMap, Secret},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};
use kube::{
    Api, Client, Resource,
    api::PartialObjectMeta,
    core::NamespaceResourceScope,
    runtime::reflector::{ObjectRef, Store},
};
use serde_json::{Value, json};
use sluice_crds::labels;

use super::{revisions, template};
use crate::cache::{Cache, CanaryKey};

/// Kept by the cluster or by Sluice in each namespace, and changed when a certificate authority turns over: a frozen copy would break
/// TLS one day, and a new one is no change of the application.
const NEVER_PINNED: [&str; 3] = ["kube-root-ca.crt", "openshift-service-ca.crt", labels::TRUST_BUNDLE];

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    ConfigMap,
    Secret,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ConfigMap => "ConfigMap",
            Self::Secret => "Secret",
        })
    }
}

/// A ConfigMap or Secret in the Canary's namespace.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConfigRef {
    pub kind: Kind,
    pub name: String,
}

impl ConfigRef {
    #[must_use]
    pub fn config_map(name: impl Into<String>) -> Self {
        Self { kind: Kind::ConfigMap, name: name.into() }
    }

    #[must_use]
    pub fn secret(name: impl Into<String>) -> Self {
        Self { kind: Kind::Secret, name: name.into() }
    }

    /// As in `status.template.trackedConfigs`.
    #[must_use]
    pub fn status_key(&self) -> String {
        match self.kind {
            Kind::ConfigMap => format!("configmap/{}", self.name),
            Kind::Secret => format!("secret/{}", self.name),
        }
    }

    /// Name of the pinned copy for a revision.
    #[must_use]
    pub fn pinned_name(&self, revision: &str) -> String {
        revisions::shortened(&self.name, &format!("-{revision}"))
    }
}

impl fmt::Display for ConfigRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

/// Name of the pinned copy for each reference that has one.
pub type Pins = BTreeMap<ConfigRef, String>;

/// What a template refers to, and whether its Pods cannot start without it.
#[must_use]
pub fn references(template: &Value) -> BTreeMap<ConfigRef, bool> {
    let mut found = BTreeMap::new();
    // A visitor for both uses, so that whatever is found is also what is pinned.
    visit(&mut template.clone(), &mut |kind, name, required| {
        *found.entry(ConfigRef { kind, name: name.clone() }).or_insert(false) |= required;
    });
    found
}

/// Changes every reference that has a pin.
pub fn pin(template: &mut Value, pins: &Pins) {
    visit(template, &mut |kind, name, _| {
        if let Some(pinned) = pins.get(&ConfigRef { kind, name: name.clone() }) {
            name.clone_from(pinned);
        }
    });
}

/// Calls `f` with the kind, the name and "required" of each reference.
fn visit(template: &mut Value, f: &mut impl FnMut(Kind, &mut String, bool)) {
    let mut at = |source: Option<&mut Value>, kind: Kind, key: &str| {
        let Some(source) = source else { return };
        let required = source.get("optional") != Some(&Value::Bool(true));
        if let Some(Value::String(name)) = source.get_mut(key) {
            f(kind, name, required);
        }
    };
    let Some(spec) = template.get_mut("spec") else { return };
    for volume in items(spec, "volumes") {
        at(volume.get_mut("configMap"), Kind::ConfigMap, "name");
        at(volume.get_mut("secret"), Kind::Secret, "secretName");
        if let Some(projected) = volume.get_mut("projected") {
            for source in items(projected, "sources") {
                at(source.get_mut("configMap"), Kind::ConfigMap, "name");
                at(source.get_mut("secret"), Kind::Secret, "name");
            }
        }
    }
    for containers in ["containers", "initContainers"] {
        for container in items(spec, containers) {
            for variable in items(container, "env") {
                if let Some(from) = variable.get_mut("valueFrom") {
                    at(from.get_mut("configMapKeyRef"), Kind::ConfigMap, "name");
                    at(from.get_mut("secretKeyRef"), Kind::Secret, "name");
                }
            }
            for from in items(container, "envFrom") {
                at(from.get_mut("configMapRef"), Kind::ConfigMap, "name");
                at(from.get_mut("secretRef"), Kind::Secret, "name");
            }
        }
    }
}

fn items<'a>(parent: &'a mut Value, key: &str) -> impl Iterator<Item = &'a mut Value> {
    parent.get_mut(key).and_then(Value::as_array_mut).into_iter().flatten()
}

/// Whether a reference is followed, as far as metadata tells. For a Secret, its type has a say too ([`tracks_secret`]).
///
/// Secrets with an owner are kept by a controller (certificates, external stores): rotating credentials must not freeze.
#[must_use]
pub fn tracks(reference: &ConfigRef, metadata: &ObjectMeta) -> bool {
    match annotation(metadata) {
        Some("enabled") => true,
        Some("disabled") => false,
        Some(_) | None => match reference.kind {
            Kind::ConfigMap => !NEVER_PINNED.contains(&reference.name.as_str()),
            Kind::Secret => metadata.owner_references.as_ref().is_none_or(Vec::is_empty),
        },
    }
}

/// Whether a Secret of this type is followed: `Opaque` ones, or those that an annotation names.
#[must_use]
pub fn tracks_secret(secret: &Secret) -> bool {
    annotation(&secret.metadata) == Some("enabled") || secret.type_.as_deref().is_none_or(|type_| type_ == "Opaque")
}

fn annotation(metadata: &ObjectMeta) -> Option<&str> {
    metadata.annotations.as_ref()?.get(labels::CONFIG_TRACKING).map(String::as_str)
}

/// Content of a ConfigMap or Secret that is followed.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    ConfigMap(ConfigMap),
    Secret(Secret),
}

impl Content {
    /// Hash of the content alone.
    #[must_use]
    pub fn digest(&self) -> String {
        let content = match self {
            Self::ConfigMap(config) => json!({"data": config.data, "binaryData": config.binary_data}),
            Self::Secret(secret) => json!({"type": secret.type_, "data": secret.data}),
        };
        template::digest(&template::canonical(&content))
    }

    /// The immutable copy for a revision.
    #[must_use]
    pub fn pinned(
        &self,
        name: String,
        namespace: &str,
        labels: BTreeMap<String, String>,
        owners: Vec<OwnerReference>,
    ) -> Self {
        let metadata = ObjectMeta {
            name: Some(name),
            namespace: Some(namespace.to_owned()),
            labels: Some(labels),
            owner_references: Some(owners),
            ..ObjectMeta::default()
        };
        match self {
            Self::ConfigMap(config) => Self::ConfigMap(ConfigMap {
                metadata,
                data: config.data.clone(),
                binary_data: config.binary_data.clone(),
                immutable: Some(true),
            }),
            Self::Secret(secret) => Self::Secret(Secret {
                metadata,
                data: secret.data.clone(),
                type_: secret.type_.clone(),
                immutable: Some(true),
                string_data: None,
            }),
        }
    }
}

/// What a template's configuration was found to be.
#[derive(Debug, Default)]
pub struct Tracked {
    /// Digest of each ConfigMap and Secret that is there and part of the revision.
    pub digests: BTreeMap<ConfigRef, String>,
    /// Those that are not there and without which no Pod starts, with the digest that each had last, if that is known. It stays part
    /// of the revision: whoever deletes and makes one again as it was (`kubectl replace --force`) changes nothing.
    pub missing: BTreeMap<ConfigRef, Option<String>>,
    /// Why one could not be read of which nothing is known: the revision is not known either.
    pub unread: Option<ReadError>,
}

impl Tracked {
    /// As in `status.template.trackedConfigs`.
    #[must_use]
    pub fn status(&self) -> BTreeMap<String, String> {
        let gone = self.missing.iter().filter_map(|(reference, digest)| Some((reference, digest.as_ref()?)));
        self.digests.iter().chain(gone).map(|(reference, digest)| (reference.status_key(), digest.clone())).collect()
    }

    /// Name of the pinned copy of each.
    #[must_use]
    pub fn pins(&self, revision: &str) -> Pins {
        let gone = self.missing.iter().filter_map(|(reference, digest)| digest.as_ref().map(|_| reference));
        let all = self.digests.keys().chain(gone);
        all.map(|reference| (reference.clone(), reference.pinned_name(revision))).collect()
    }

    /// Notes one that is not there. `before` is what the status says.
    fn lacks(&mut self, reference: ConfigRef, before: &BTreeMap<String, String>) {
        let digest = before.get(&reference.status_key()).cloned();
        self.missing.insert(reference, digest);
    }
}

/// Reads the content of ConfigMaps and Secrets by name, once for each resourceVersion: the cache holds their metadata only.
pub struct Reader {
    client: Client,
    deadline: Duration,
    known: Mutex<HashMap<CanaryKey, BTreeMap<ConfigRef, Known>>>,
}

/// What was read, and of what.
#[derive(Clone)]
struct Known {
    uid: Option<String>,
    resource_version: Option<String>,
    /// `None`: read, and not followed because of its type.
    digest: Option<String>,
}

/// Content that could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("reading {reference} in namespace {namespace}: {source}")]
    Api { reference: ConfigRef, namespace: String, source: Box<kube::Error> },
    #[error("reading {reference} in namespace {namespace}: no answer within {deadline:?}")]
    Deadline { reference: ConfigRef, namespace: String, deadline: Duration },
}

impl Reader {
    /// `deadline` is for each read.
    #[must_use]
    pub fn new(client: Client, deadline: Duration) -> Self {
        Self { client, deadline, known: Mutex::default() }
    }

    /// Digests of what `template` refers to. Reads only what changed since the last call.
    ///
    /// An API server that does not answer must not stand in the way of a rollback: then what was known last counts, and
    /// where nothing is known, what the status says (`before`). The same is said of what is not there.
    pub async fn track(
        &self,
        cache: &Cache,
        canary: &CanaryKey,
        template: &Value,
        before: &BTreeMap<String, String>,
    ) -> Tracked {
        let mut tracked = Tracked::default();
        let known = self.known().get(canary).cloned().unwrap_or_default();
        let mut now = BTreeMap::new();
        for (reference, required) in references(template) {
            let metadata = match reference.kind {
                Kind::ConfigMap => metadata(&cache.config_maps, canary, &reference.name),
                Kind::Secret => match &cache.secrets {
                    Some(secrets) => metadata(secrets, canary, &reference.name),
                    // Not tracked: it stays by reference, and the kubelet tells whether it is there.
                    None => continue,
                },
            };
            let Some(metadata) = metadata else {
                if required {
                    tracked.lacks(reference, before);
                }
                continue;
            };
            if !tracks(&reference, &metadata) {
                continue;
            }
            let fresh = known
                .get(&reference)
                .filter(|known| known.uid == metadata.uid && known.resource_version == metadata.resource_version);
            let entry = match fresh {
                Some(known) => known.clone(),
                None => match self.read(&canary.namespace, &reference).await {
                    Ok(Some(content)) => Known::of(&content),
                    // Gone since the cache saw it; a touch follows.
                    Ok(None) if required => {
                        tracked.lacks(reference, before);
                        continue;
                    }
                    Ok(None) => continue,
                    Err(error) => {
                        let last = known.get(&reference).cloned().or_else(|| {
                            let digest = before.get(&reference.status_key())?.clone();
                            Some(Known { uid: None, resource_version: None, digest: Some(digest) })
                        });
                        let Some(last) = last else {
                            tracked.unread.get_or_insert(error);
                            continue;
                        };
                        tracing::warn!(%error, "the last known content counts");
                        last
                    }
                },
            };
            if let Some(digest) = &entry.digest {
                tracked.digests.insert(reference.clone(), digest.clone());
            }
            now.insert(reference, entry);
        }
        self.known().insert(canary.clone(), now);
        tracked
    }

    /// Drops what was remembered for a Canary that is gone.
    pub fn forget(&self, canary: &CanaryKey) {
        self.known().remove(canary);
    }

    /// Content by name; `None` where there is none.
    ///
    /// # Errors
    /// If the API server does not answer, or not with that.
    pub async fn read(&self, namespace: &str, reference: &ConfigRef) -> Result<Option<Content>, ReadError> {
        let name = reference.name.as_str();
        let read = async {
            match reference.kind {
                Kind::ConfigMap => {
                    let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), namespace);
                    api.get_opt(name).await.map(|found| found.map(Content::ConfigMap))
                }
                Kind::Secret => {
                    let api: Api<Secret> = Api::namespaced(self.client.clone(), namespace);
                    api.get_opt(name).await.map(|found| found.map(Content::Secret))
                }
            }
        };
        let namespace = namespace.to_owned();
        match tokio::time::timeout(self.deadline, read).await {
            Ok(Ok(content)) => Ok(content),
            Ok(Err(source)) => {
                Err(ReadError::Api { reference: reference.clone(), namespace, source: Box::new(source) })
            }
            Err(_) => Err(ReadError::Deadline { reference: reference.clone(), namespace, deadline: self.deadline }),
        }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<CanaryKey, BTreeMap<ConfigRef, Known>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn of(content: &Content) -> Self {
        let (metadata, follows) = match content {
            Content::ConfigMap(config) => (&config.metadata, true),
            Content::Secret(secret) => (&secret.metadata, tracks_secret(secret)),
        };
        Self {
            uid: metadata.uid.clone(),
            resource_version: metadata.resource_version.clone(),
            digest: follows.then(|| content.digest()),
        }
    }
}

fn metadata<K>(store: &Store<PartialObjectMeta<K>>, canary: &CanaryKey, name: &str) -> Option<ObjectMeta>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + 'static,
{
    let found = store.get(&ObjectRef::new(name).within(&canary.namespace))?;
    // One that is being deleted is as good as gone: its copy is made by then, or never.
    found.metadata.deletion_timestamp.is_none().then(|| found.metadata.clone())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Every place in which a Pod can refer to one, and how it looks with the name `old`.
    fn places() -> Vec<(&'static str, Value, Kind)> {
        let volume = |volume: Value| json!({"spec": {"volumes": [volume]}});
        let env =
            |kind: &str, env: Value| json!({"spec": {kind: [{"name": "c", "env": [{"name": "E", "valueFrom": env}]}]}});
        let env_from = |kind: &str, from: Value| json!({"spec": {kind: [{"name": "c", "envFrom": [from]}]}});
        vec![
            ("volume", volume(json!({"configMap": {"name": "old"}})), Kind::ConfigMap),
            ("secret volume", volume(json!({"secret": {"secretName": "old"}})), Kind::Secret),
            ("projected", volume(json!({"projected": {"sources": [{"configMap": {"name": "old"}}]}})), Kind::ConfigMap),
            (
                "projected secret",
                volume(json!({"projected": {"sources": [{"secret": {"name": "old"}}]}})),
                Kind::Secret,
            ),
            ("env", env("containers", json!({"configMapKeyRef": {"name": "old", "key": "k"}})), Kind::ConfigMap),
            ("secret env", env("containers", json!({"secretKeyRef": {"name": "old", "key": "k"}})), Kind::Secret),
            (
                "init env",
                env("initContainers", json!({"configMapKeyRef": {"name": "old", "key": "k"}})),
                Kind::ConfigMap,
            ),
            ("envFrom", env_from("containers", json!({"configMapRef": {"name": "old"}})), Kind::ConfigMap),
            ("secret envFrom", env_from("initContainers", json!({"secretRef": {"name": "old"}})), Kind::Secret),
        ]
    }

    #[test]
    fn a_reference_is_found_and_pinned_wherever_it_stands() {
        for (place, template, kind) in places() {
            let reference = ConfigRef { kind, name: "old".into() };
            assert_eq!(references(&template), BTreeMap::from([(reference.clone(), true)]), "{place}");
            let mut pinned = template.clone();
            pin(&mut pinned, &Pins::from([(reference, "new".to_owned())]));
            let expected: Value = serde_json::from_str(&template.to_string().replace("old", "new")).unwrap();
            assert_eq!(pinned, expected, "{place}");
        }
    }

    #[test]
    fn one_required_reference_makes_the_object_required() {
        let optional = json!({"configMapRef": {"name": "c", "optional": true}});
        let required = json!({"configMapRef": {"name": "c"}});
        let of = |from: &[&Value]| references(&json!({"spec": {"containers": [{"envFrom": from}]}}));
        assert_eq!(of(&[&optional]), BTreeMap::from([(ConfigRef::config_map("c"), false)]));
        assert_eq!(of(&[&optional, &required, &optional]), BTreeMap::from([(ConfigRef::config_map("c"), true)]));
    }

    #[test]
    fn a_pin_of_a_config_map_leaves_a_secret_of_the_same_name_alone() {
        let mut template =
            json!({"spec": {"volumes": [{"secret": {"secretName": "same"}}, {"configMap": {"name": "same"}}]}});
        pin(&mut template, &Pins::from([(ConfigRef::config_map("same"), "copy".to_owned())]));
        assert_eq!(
            template["spec"]["volumes"],
            json!([{"secret": {"secretName": "same"}}, {"configMap": {"name": "copy"}}])
        );
    }

    #[test]
    fn credentials_that_somebody_rotates_are_not_frozen() {
        let metadata = |annotation: Option<&str>, owned: bool| ObjectMeta {
            annotations: annotation
                .map(|value| BTreeMap::from([(labels::CONFIG_TRACKING.to_owned(), value.to_owned())])),
            owner_references: owned.then(|| vec![OwnerReference::default()]),
            ..ObjectMeta::default()
        };
        let cases = [
            (ConfigRef::config_map("app"), None, false, true),
            (ConfigRef::config_map("app"), None, true, true),
            (ConfigRef::config_map("app"), Some("disabled"), false, false),
            (ConfigRef::config_map("kube-root-ca.crt"), None, false, false),
            (ConfigRef::config_map("kube-root-ca.crt"), Some("enabled"), false, true),
            (ConfigRef::secret("app"), None, false, true),
            (ConfigRef::secret("app"), None, true, false),
            (ConfigRef::secret("app"), Some("enabled"), true, true),
            (ConfigRef::secret("app"), Some("disabled"), false, false),
            (ConfigRef::secret("app"), Some("nonsense"), false, true),
        ];
        for (reference, annotation, owned, followed) in cases {
            assert_eq!(
                tracks(&reference, &metadata(annotation, owned)),
                followed,
                "{reference} {annotation:?} {owned}"
            );
        }
        let secret = |type_: &str, annotation| Secret {
            type_: Some(type_.into()),
            metadata: metadata(annotation, false),
            ..Secret::default()
        };
        assert!(tracks_secret(&secret("Opaque", None)));
        assert!(!tracks_secret(&secret("kubernetes.io/tls", None)));
        assert!(tracks_secret(&secret("kubernetes.io/tls", Some("enabled"))));
    }

    #[test]
    fn what_is_deleted_and_made_again_as_it_was_is_part_of_the_revision_meanwhile() {
        let (settings, new) = (ConfigRef::config_map("settings"), ConfigRef::secret("new"));
        let mut gone = Tracked::default();
        gone.digests.insert(ConfigRef::config_map("other"), "def".into());
        let mut before = Tracked { digests: gone.digests.clone(), ..Tracked::default() };
        before.digests.insert(settings.clone(), "abc".into());
        gone.lacks(settings, &before.status());
        assert_eq!((gone.status(), gone.pins("r")), (before.status(), before.pins("r")), "the same revision");
        gone.lacks(new.clone(), &before.status());
        assert_eq!(gone.status(), before.status(), "nobody knows what is in it");
        assert!(gone.missing.contains_key(&new) && gone.missing.len() == 2, "and both are said to be missing");
    }

    #[test]
    fn only_content_counts_for_the_digest() {
        let config = |data: &[(&str, &str)], name: &str| {
            Content::ConfigMap(ConfigMap {
                metadata: ObjectMeta {
                    name: Some(name.into()),
                    resource_version: Some(name.into()),
                    ..ObjectMeta::default()
                },
                data: Some(data.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()),
                ..ConfigMap::default()
            })
        };
        assert_eq!(config(&[("a", "1"), ("b", "2")], "x").digest(), config(&[("b", "2"), ("a", "1")], "y").digest());
        assert_ne!(config(&[("a", "1")], "x").digest(), config(&[("a", "2")], "x").digest());
        let original = config(&[("a", "1")], "x");
        let copy = original.pinned("x-rev".into(), "ns", BTreeMap::new(), Vec::new());
        assert_eq!(original.digest(), copy.digest());
        let Content::ConfigMap(copy) = copy else { panic!("a copy has the kind of the original") };
        assert_eq!((copy.immutable, copy.metadata.name.as_deref()), (Some(true), Some("x-rev")));
    }
}
