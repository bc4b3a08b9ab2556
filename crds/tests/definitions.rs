//! The CRDs that users install are those of the types.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use serde_json::Value;

#[test]
fn every_field_is_described_and_every_list_string_map_and_name_in_a_map_is_bounded() {
    let mut missing = Vec::new();
    for crd in sluice_crds::crds() {
        for version in &crd.spec.versions {
            let schema = version.schema.as_ref().unwrap().open_api_v3_schema.as_ref().unwrap();
            look(&serde_json::to_value(schema).unwrap(), &crd.spec.names.kind, &mut missing);
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}

fn look(schema: &Value, path: &str, missing: &mut Vec<String>) {
    let has = |keys: &[&str]| keys.iter().any(|key| schema.get(key).is_some());
    let bound: &[&str] = match schema["type"].as_str() {
        // A date-time has a length of its own.
        Some("string") => &["maxLength", "enum", "format"],
        Some("array") => &["maxItems"],
        Some("object") if has(&["additionalProperties"]) => &["maxProperties"],
        _ if has(&["x-kubernetes-int-or-string"]) => &["maxLength"],
        _ => &["type"],
    };
    if !has(bound) {
        missing.push(format!("{path}: one of {bound:?}"));
    }
    let rules = schema["x-kubernetes-validations"].as_array().into_iter().flatten();
    let rules: Vec<&str> = rules.filter_map(|rule| rule["rule"].as_str()).collect();
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        // A schema says nothing about the names in a map: a rule looks at each, or refuses the map. Those in a status are the controller's.
        let looks = [".all(", ".map("].map(|how| format!("self.{name}{how}"));
        let refuses = format!("!has(self.{name})");
        let bounds =
            |rule: &&str| looks.iter().any(|how| rule.contains(how)) || rule.split(" && ").any(|part| part == refuses);
        let bounded = rules.iter().any(bounds);
        if field["additionalProperties"].is_object() && !bounded && !path.contains(".status") {
            missing.push(format!("{path}.{name}: a rule for its names"));
        }
        let path = format!("{path}.{name}");
        if field.get("description").is_none() {
            missing.push(format!("{path}: a description"));
        }
        look(field, &path, missing);
    }
    for (key, suffix) in [("items", "[]"), ("additionalProperties", "{}")] {
        if let Some(inner) = schema.get(key).filter(|inner| inner.is_object()) {
            look(inner, &format!("{path}{suffix}"), missing);
        }
    }
}

#[test]
fn the_committed_crds_are_what_the_types_say() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("charts/sluice/files/crds/sluice.dev.yaml");
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    // As crdgen prints them.
    let mut generated = String::new();
    for crd in sluice_crds::crds() {
        generated.push_str("---\n");
        generated.push_str(&serde_saphyr::to_string(&crd).unwrap());
    }
    let differs = committed.lines().zip(generated.lines()).position(|(old, new)| old != new);
    assert!(
        committed == generated,
        "{} is stale: run `make crds` and commit it (first difference: line {})",
        path.display(),
        differs.unwrap_or_else(|| committed.lines().count().min(generated.lines().count())) + 1
    );
}
