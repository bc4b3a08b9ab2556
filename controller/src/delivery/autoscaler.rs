//! `spec.autoscalerRef`: a copy of the user's HorizontalPodAutoscaler whose target is the Canary's scale subresource. The user's
//! own, which names the target Deployment, sees 0 replicas there and is disabled (`ScalingDisabled`).
//!
//! Untyped, as templates are: metrics of whatever kind pass through as they are written.

use std::sync::Arc;

use kube::{Resource, ResourceExt, api::DynamicObject, runtime::reflector::ObjectRef};
use serde_json::{Map, Value, json};
use sluice_crds::{AutoscalerRef, Canary, labels};

use super::{machine, machine::Problem, observe, revisions};
use crate::cache::{Cache, autoscaler_resource};

/// What there is, and what there should be.
#[derive(Debug, Default)]
pub struct Scaling {
    /// Our copies, of whatever was named.
    pub copies: Vec<Arc<DynamicObject>>,
    /// The copy as it should be; `None` where none is named, or the named one is not there.
    pub wanted: Option<DynamicObject>,
    /// Name of the copy that may stay.
    keep: Option<String>,
    pub problems: Vec<Problem>,
    pub warnings: Vec<Problem>,
}

impl Scaling {
    /// Copies that nobody asks for any more.
    pub fn surplus(&self) -> impl Iterator<Item = &Arc<DynamicObject>> {
        self.copies.iter().filter(|copy| Some(copy.name_any()) != self.keep)
    }

    /// The copy that should be as `wanted`, if it is there.
    #[must_use]
    pub fn live(&self) -> Option<&Arc<DynamicObject>> {
        let name = self.wanted.as_ref()?.name_any();
        self.copies.iter().find(|copy| copy.name_any() == name)
    }

    /// For the machine.
    #[must_use]
    pub fn seen(&self) -> machine::Autoscaler {
        let differs =
            self.wanted.as_ref().is_some_and(|wanted| self.live().is_none_or(|live| !is_current(live, wanted)));
        machine::Autoscaler {
            exists: !self.copies.is_empty(),
            stale: self.problems.is_empty() && (differs || self.surplus().next().is_some()),
        }
    }
}

/// Reads the cache.
#[must_use]
pub fn scaling(cache: &Cache, canary: &Canary) -> Scaling {
    let namespace = canary.namespace().unwrap_or_default();
    let get = |name: &str| cache.autoscalers.get(&ObjectRef::new_with(name, autoscaler_resource()).within(&namespace));
    let copies = cache.autoscalers.state_filter(|object| {
        object.metadata.namespace.as_deref() == Some(namespace.as_str())
            && object.metadata.deletion_timestamp.is_none()
            && revisions::owned(object, canary)
    });
    let mut scaling = Scaling { copies, ..Scaling::default() };
    let Some(reference) = &canary.spec.autoscaler_ref else { return scaling };
    let name = copy_name(reference);
    if get(&name).is_some_and(|found| !revisions::owned(&*found, canary)) {
        scaling.problems.push(observe::taken(KIND, &name));
    }
    match get(&reference.name) {
        // A second one on the same Pods would stop both (AmbiguousSelector).
        Some(source) if scales(&source, canary) => {}
        Some(source) => {
            scaling.keep = Some(name);
            scaling.wanted = Some(copy(canary, reference, &source));
        }
        None => {
            scaling.keep = Some(name);
            scaling.warnings.push(Problem {
                reason: "AutoscalerNotFound",
                message: format!(
                    "{KIND} {0}, which spec.autoscalerRef names, does not exist: {1}. Create it, or remove spec.autoscalerRef",
                    reference.name,
                    if scaling.copies.is_empty() { "nothing scales this Canary" } else { "its copy stays as it was" },
                ),
            });
        }
    }
    if let Some(said) = scaling.live().and_then(|live| ambiguous(live)) {
        scaling.warnings.push(Problem {
            reason: "AutoscalerAmbiguous",
            message: format!(
                "{KIND} {0}-primary does not scale: {said}. If one of them is {0}: it is disabled, but kube-controller-manager \
                 still counts the Pods that it had; make it anew once: kubectl get hpa {0} -n {namespace} -o yaml | kubectl \
                 replace --force -f -",
                reference.name
            ),
        });
    }
    scaling
}

const KIND: &str = "HorizontalPodAutoscaler";

fn copy_name(reference: &AutoscalerRef) -> String {
    format!("{}-primary", reference.name)
}

/// Whether an autoscaler names this Canary itself.
fn scales(autoscaler: &DynamicObject, canary: &Canary) -> bool {
    let target = &autoscaler.data["spec"]["scaleTargetRef"];
    target["kind"] == *Canary::kind(&())
        && target["name"] == *canary.name_any()
        && target["apiVersion"].as_str().is_some_and(|version| version.starts_with("sluice.dev/"))
}

fn copy(canary: &Canary, reference: &AutoscalerRef, source: &DynamicObject) -> DynamicObject {
    let mut spec = source.data["spec"].as_object().cloned().unwrap_or_else(Map::new);
    spec.insert(
        "scaleTargetRef".into(),
        json!({"apiVersion": Canary::api_version(&()), "kind": Canary::kind(&()), "name": canary.name_any()}),
    );
    let bounds = reference.primary_scaler_replicas;
    for (field, value) in [
        ("minReplicas", bounds.and_then(|bounds| bounds.min_replicas)),
        ("maxReplicas", bounds.and_then(|bounds| bounds.max_replicas)),
    ] {
        if let Some(value) = value {
            spec.insert(field.into(), json!(value));
        }
    }
    let mut labels = revisions::kept_labels(source.labels());
    labels.insert(labels::CANARY.into(), canary.name_any());
    let mut copy = DynamicObject::new(&copy_name(reference), &autoscaler_resource()).data(json!({"spec": spec}));
    copy.metadata.namespace = canary.namespace();
    copy.metadata.labels = Some(labels);
    copy.metadata.owner_references = Some(vec![revisions::canary_owner(canary)]);
    copy
}

/// The API server's defaults are in the source already, so that equal means equal.
fn is_current(live: &DynamicObject, wanted: &DynamicObject) -> bool {
    live.data["spec"] == wanted.data["spec"]
        && wanted.labels().iter().all(|(key, value)| live.labels().get(key) == Some(value))
}

/// That several autoscalers select the same Pods, in the words of kube-controller-manager. It remembers the selector of one
/// whose target has no replicas any more, until that object goes or it restarts itself
/// (pkg/controller/podautoscaler/horizontal.go: hpaSelectors).
fn ambiguous(autoscaler: &DynamicObject) -> Option<String> {
    let conditions = autoscaler.data.pointer("/status/conditions").and_then(Value::as_array)?;
    let found = conditions
        .iter()
        .find(|condition| condition["type"] == "ScalingActive" && condition["reason"] == "AmbiguousSelector")?;
    Some(found["message"].as_str().unwrap_or("several autoscalers select its Pods").to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn canary(reference: Value) -> Canary {
        serde_json::from_value(json!({
            "apiVersion": "sluice.dev/v1beta1", "kind": "Canary",
            "metadata": {"name": "web", "namespace": "test", "uid": "uid"},
            "spec": {
                "targetRef": {"kind": "Deployment", "name": "x"}, "service": {"port": 80}, "skipAnalysis": true,
                "autoscalerRef": reference,
            },
        }))
        .unwrap()
    }

    fn source() -> DynamicObject {
        serde_json::from_value(json!({
            "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler",
            "metadata": {
                "name": "x", "namespace": "test", "resourceVersion": "7",
                "labels": {"app": "x", "argocd.argoproj.io/instance": "shop"},
            },
            "spec": {
                "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "x"},
                "minReplicas": 2, "maxReplicas": 9,
                "metrics": [{"type": "ContainerResource", "containerResource": {"container": "app", "name": "cpu", "newField": [1]}}],
                "behavior": {"scaleDown": {"stabilizationWindowSeconds": 60}},
            },
            "status": {"currentReplicas": 3},
        }))
        .unwrap()
    }

    #[test]
    fn a_copy_says_what_the_named_one_says_but_for_its_target_and_bounds() {
        let canary = canary(
            json!({"kind": "HorizontalPodAutoscaler", "name": "x", "primaryScalerReplicas": {"minReplicas": 4}}),
        );
        let reference = canary.spec.autoscaler_ref.clone().unwrap();
        let made = copy(&canary, &reference, &source());
        let mut spec = source().data["spec"].clone();
        spec["scaleTargetRef"] = json!({"apiVersion": "sluice.dev/v1beta1", "kind": "Canary", "name": "web"});
        spec["minReplicas"] = json!(4);
        assert_eq!(made.data, json!({"spec": spec}), "fields that nobody knows yet included");
        assert_eq!(made.name_any(), "x-primary");
        assert!(!made.labels().contains_key("argocd.argoproj.io/instance"), "a Git tool would prune it");
        assert!(revisions::owned(&made, &canary) && scales(&made, &canary) && !scales(&source(), &canary));

        let mut live = made.clone();
        live.labels_mut().insert("added-by".into(), "somebody".into());
        live.data["status"] = json!({"currentReplicas": 1});
        assert!(is_current(&live, &made));
        live.data["spec"]["maxReplicas"] = json!(3);
        assert!(!is_current(&live, &made));
    }

    #[test]
    fn that_others_select_the_same_pods_is_read_off_its_conditions() {
        let mut live = source();
        assert_eq!(ambiguous(&live), None);
        live.data["status"]["conditions"] = json!([
            {"type": "AbleToScale", "status": "True", "reason": "SucceededGetScale"},
            {"type": "ScalingActive", "status": "False", "reason": "AmbiguousSelector", "message": "pods by selector"},
        ]);
        assert_eq!(ambiguous(&live).unwrap(), "pods by selector");
        live.data["status"]["conditions"][1]["reason"] = json!("ScalingDisabled");
        assert_eq!(ambiguous(&live), None);
    }
}
