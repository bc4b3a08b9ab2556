//! docs/troubleshooting.md says of every alert what to look at.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{pages::root, reasons::explained};

/// Names of the chart's alerts.
pub fn alerts() -> BTreeSet<String> {
    let text = std::fs::read_to_string(root().join("charts/sluice/files/alerts.yaml")).unwrap();
    let file: Value = serde_saphyr::from_str(&text).unwrap();
    let groups = file["groups"].as_array().unwrap();
    let rules = groups.iter().flat_map(|group| group["rules"].as_array().unwrap());
    let alerts: BTreeSet<_> = rules.filter_map(|rule| rule["alert"].as_str()).map(ToOwned::to_owned).collect();
    assert!(!alerts.is_empty(), "no alerts in charts/sluice/files/alerts.yaml");
    alerts
}

#[test]
fn every_alert_has_a_row_that_says_what_to_look_at() {
    let explained = explained();
    let missing: Vec<_> = alerts().into_iter().filter(|alert| !explained.contains(alert)).collect();
    assert!(missing.is_empty(), "explain these alerts in docs/troubleshooting.md: {missing:?}");
}
