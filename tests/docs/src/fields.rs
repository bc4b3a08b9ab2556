//! Tables of fields, from a CRD's schema.

use std::fmt::Write as _;

use serde_json::Value;

/// A field of a kind.
#[derive(Debug)]
pub struct Field {
    /// Such as `spec.analysis.metrics[].name`.
    pub path: String,
    required: bool,
    schema: Value,
}

/// All fields of a CRD's only version, parents before children.
#[must_use]
pub fn fields(crd: &Value) -> Vec<Field> {
    let mut found = Vec::new();
    let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    for part in ["spec", "status"] {
        children(&schema["properties"][part], part, &mut found);
    }
    found
}

fn children(schema: &Value, path: &str, found: &mut Vec<Field>) {
    let required =
        |name: &str| schema["required"].as_array().is_some_and(|names| names.iter().any(|known| known == name));
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{path}.{name}");
        found.push(Field { path: path.clone(), required: required(name), schema: field.clone() });
        children(field, &path, found);
        children(&field["items"], &format!("{path}[]"), found);
        children(&field["additionalProperties"], &format!("{path}.KEY"), found);
    }
}

impl Field {
    fn description(&self) -> String {
        cell(self.schema["description"].as_str().unwrap_or_default())
    }

    /// Declared so that it is not pruned, and refused by a rule.
    fn refused(&self) -> bool {
        let description = self.description();
        description.ends_with("refused.") || description == "Refused." || description.ends_with("in this version.")
    }

    fn kind(&self) -> String {
        let schema = &self.schema;
        if schema["x-kubernetes-int-or-string"] == true {
            return "integer or string".into();
        }
        if schema["pattern"].as_str().is_some_and(|pattern| pattern.contains("(ms|s|m|h)")) {
            return "duration".into();
        }
        if schema["format"] == "date-time" {
            return "time".into();
        }
        let kind = |schema: &Value| schema["type"].as_str().unwrap_or("any").to_owned();
        match kind(schema).as_str() {
            "array" => format!("list of {}s", kind(&schema["items"])),
            "object" if schema["additionalProperties"].is_object() => {
                format!("map to {}s", kind(&schema["additionalProperties"]))
            }
            other => other.to_owned(),
        }
    }

    /// The default, and what is allowed.
    fn limits(&self) -> String {
        let schema = &self.schema;
        let mut words = Vec::new();
        if self.required {
            words.push("required".to_owned());
        }
        let default = &schema["default"];
        if !default.is_null() && !default.is_object() {
            words.push(format!("default `{}`", plain(default)));
        }
        if let Some(values) = schema["enum"].as_array() {
            let values: Vec<_> =
                values.iter().filter(|value| !value.is_null()).map(|value| format!("`{}`", plain(value))).collect();
            words.push(values.join(", "));
        }
        match (&schema["minimum"], &schema["maximum"]) {
            (Value::Number(least), Value::Number(most)) => words.push(format!("{} to {}", whole(least), whole(most))),
            (Value::Number(least), _) => words.push(format!("at least {}", whole(least))),
            (_, Value::Number(most)) => words.push(format!("at most {}", whole(most))),
            (_, _) => {}
        }
        words.join("; ")
    }
}

/// Numbers of a schema are floats.
fn whole(number: &serde_json::Number) -> String {
    number.as_f64().map_or_else(|| number.to_string(), |number| number.to_string())
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned)
}

/// One line, and no end of a cell.
fn cell(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

/// A kind's section.
pub fn section(crd: &Value) -> String {
    let names = &crd["spec"]["names"];
    let kind = names["kind"].as_str().unwrap_or_default();
    let version = crd["spec"]["versions"][0]["name"].as_str().unwrap_or_default();
    let group = crd["spec"]["group"].as_str().unwrap_or_default();
    let all = fields(crd);
    let mut out = format!("\n## {kind}\n\n`apiVersion: {group}/{version}`, `kind: {kind}`, namespaced.");
    if let Some(short) = names["shortNames"].as_array() {
        let short: Vec<_> = short.iter().map(plain).collect();
        let _ = write!(out, " Short name: `{}`.", short.join("`, `"));
    }
    out.push('\n');
    for part in ["spec", "status"] {
        let within: Vec<_> = all.iter().filter(|field| field.path.starts_with(&format!("{part}."))).collect();
        let (refused, known): (Vec<_>, Vec<_>) = within.into_iter().partition(|field| field.refused());
        if known.is_empty() {
            continue;
        }
        let _ = write!(out, "\n### {kind}: {part}\n\n| Field | Type | | |\n|---|---|---|---|\n");
        for field in known {
            let Field { path, .. } = field;
            let _ = writeln!(out, "| `{path}` | {} | {} | {} |", field.kind(), field.limits(), field.description());
        }
        if !refused.is_empty() {
            let paths: Vec<_> = refused.iter().map(|field| format!("`{}`", field.path)).collect();
            let _ =
                write!(out, "\nDeclared and refused, so that they are not dropped silently: {}.\n", paths.join(", "));
        }
    }
    let mut rules = Vec::new();
    messages(&crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"], &mut rules);
    if !rules.is_empty() {
        let _ = write!(out, "\n### {kind}: what the API server refuses, in its words\n\n");
        for rule in rules {
            let _ = writeln!(out, "- {rule}");
        }
    }
    out
}

/// What the schema's rules say, outer ones first.
fn messages(schema: &Value, found: &mut Vec<String>) {
    for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
        found.extend(rule["message"].as_str().map(cell));
    }
    for field in schema["properties"].as_object().into_iter().flatten().map(|(_, field)| field) {
        messages(field, found);
    }
    for inner in [&schema["items"], &schema["additionalProperties"]] {
        if inner.is_object() {
            messages(inner, found);
        }
    }
}
