//! Which requests are meant, in the words of Istio's `HTTPMatchRequest`, which Flagger's Canary uses.

use std::collections::BTreeMap;

use kube::KubeSchema;
use serde::{Deserialize, Serialize};

/// A request matches when all of these hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.uri) || has(self.method) || has(self.authority) || has(self.headers) || has(self.withoutHeaders) || has(self.queryParams)").message("match: say uri, method, authority, headers, withoutHeaders or queryParams; an empty one would match every request"),
    validation = Rule::new("(!has(self.uri) || has(self.uri.exact) || has(self.uri.prefix) || has(self.uri.regex)) && (!has(self.method) || has(self.method.exact) || has(self.method.prefix) || has(self.method.regex)) && (!has(self.authority) || has(self.authority.exact) || has(self.authority.prefix) || has(self.authority.regex))").message("match: uri, method and authority need exact, prefix or regex"),
    validation = Rule::new("((has(self.headers) ? self.headers.map(name, name) : []) + (has(self.withoutHeaders) ? self.withoutHeaders.map(name, name) : [])).all(name, name.matches('^[A-Za-z0-9!#$&*+.^_|~-]{1,128}$'))").message("match: headers and withoutHeaders take names of headers"),
    validation = Rule::new("!has(self.queryParams) || self.queryParams.all(name, size(name) > 0 && size(name) <= 256)").message("match: queryParams takes names of 1 to 256 characters"),
    validation = Rule::new("!has(self.sourceLabels) && !has(self.gateways) && !has(self.sourceNamespace) && !has(self.port) && !has(self.scheme)").message("match: sourceLabels, sourceNamespace, gateways, port and scheme are not supported in this version; more requests would match. Remove them")
)]
pub struct HttpMatch {
    /// For readers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub name: Option<String>,
    /// The path, without the query.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uri: Option<StringMatch>,
    /// Whether the case of `uri` does not matter (not of a regex).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ignore_uri_case: bool,
    /// The method, such as `exact: GET`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method: Option<StringMatch>,
    /// The host, with its port if the client says one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authority: Option<StringMatch>,
    /// Headers by name. `{}` is met by any value. A cookie is found by a regex: `cookie: {regex: "^(.*?;)?(canary=always)(;.*)?$"}`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 8))]
    pub headers: BTreeMap<String, StringMatch>,
    /// Headers by name that are not there, or have another value.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 8))]
    pub without_headers: BTreeMap<String, StringMatch>,
    /// Parameters of the query by name, as they are written there (not percent-decoded). `{}` is met by any value.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 8))]
    pub query_params: BTreeMap<String, StringMatch>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("maxProperties" = 64, "additionalProperties" = {"type": "string", "maxLength": 1024}))]
    pub source_labels: Option<BTreeMap<String, String>>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub source_namespace: Option<String>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64), inner(length(max = 1024)))]
    pub gateways: Option<Vec<String>>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<i32>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scheme: Option<StringMatch>,
}

/// What a text must be. At most one of these; a regex is in the syntax of RE2 and must match all of the text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("[has(self.exact), has(self.prefix), has(self.regex)].filter(said, said).size() <= 1").message("match: say one of exact, prefix and regex"),
    validation = Rule::new("!has(self.suffix)").message("match: suffix is not supported in this version; say regex, such as `.*[.]example[.]com`, in its place"),
    validation = Rule::new("!has(self.regex) || (''.matches(self.regex) ? true : true)").message("match: regex is no regular expression of RE2")
)]
pub struct StringMatch {
    /// Equal to this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub exact: Option<String>,
    /// Begins with this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    pub prefix: Option<String>,
    /// Matches this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub regex: Option<String>,
    /// Not supported in this version; refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub suffix: Option<String>,
}
