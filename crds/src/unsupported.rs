//! Fields of Flagger's Canary that Sluice does not have yet: in the schema, so that they are not pruned, and refused by a rule.

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// An object that is declared and refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UnsupportedObject(serde_json::Map<String, serde_json::Value>);

/// A list of objects that is declared and refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UnsupportedList(Vec<serde_json::Value>);

/// A list of texts that is declared and refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UnsupportedNames(Vec<String>);

impl JsonSchema for UnsupportedObject {
    fn schema_name() -> Cow<'static, str> {
        "UnsupportedObject".into()
    }
    fn inline_schema() -> bool {
        true
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "object", "x-kubernetes-preserve-unknown-fields": true})
    }
}

impl JsonSchema for UnsupportedList {
    fn schema_name() -> Cow<'static, str> {
        "UnsupportedList".into()
    }
    fn inline_schema() -> bool {
        true
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        // A rule cannot see a list whose items have no type, not even by has().
        json_schema!({
            "type": "array", "maxItems": 64, "items": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}
        })
    }
}

impl JsonSchema for UnsupportedNames {
    fn schema_name() -> Cow<'static, str> {
        "UnsupportedNames".into()
    }
    fn inline_schema() -> bool {
        true
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "array", "maxItems": 64, "items": {"type": "string", "maxLength": 1024}})
    }
}
