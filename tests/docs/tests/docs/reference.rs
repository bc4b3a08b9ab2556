//! docs/reference.md is what the code says.

use std::{collections::BTreeSet, path::Path};

use super::{pages::root, reasons::sources};

#[test]
fn the_committed_reference_is_what_the_code_says() {
    let path = root().join("docs/reference.md");
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    let generated = sluice_docs::reference().unwrap();
    let differs = committed.lines().zip(generated.lines()).position(|(old, new)| old != new);
    assert!(
        committed == generated,
        "docs/reference.md is stale: run `make reference` and commit it (first difference: line {})",
        differs.unwrap_or_else(|| committed.lines().count().min(generated.lines().count())) + 1
    );
}

/// The reference is made from a controller and a proxy with one of everything: whatever they did not have is missing in it.
#[test]
fn every_series_that_the_code_names_is_in_the_reference() {
    let reference = sluice_docs::reference().unwrap();
    let mut named = BTreeSet::new();
    for (_, text) in sources(Path::new("controller/src")) {
        // With the registry's prefix.
        let registered = text.split(".register(").skip(1).filter_map(|rest| rest.split('"').nth(1));
        named.extend(registered.map(|name| format!("sluice_{name}")));
    }
    for (_, text) in sources(Path::new("proxy/src")) {
        let texts =
            text.split('"').skip(1).flat_map(|text| text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_'));
        named.extend(texts.filter(|word| word.starts_with("sluice_")).map(ToOwned::to_owned));
    }
    // Crates, and a condition of compilation.
    let others = ["sluice_proxy", "sluice_xds", "sluice_health", "sluice_pattern", "sluice_tcp_info", "sluice_fuzz"];
    named.retain(|name| !others.contains(&name.as_str()));
    assert!(named.len() > 25, "the code names some thirty series, and this finds {named:?}");
    // Counters are registered without their suffix.
    let there = |name: &str| ["", "_total"].iter().any(|suffix| reference.contains(&format!("| `{name}{suffix}` |")));
    let missing: Vec<_> = named.iter().filter(|name| !there(name)).collect();
    assert!(missing.is_empty(), "give tests/docs/src/metrics.rs what makes these series: {missing:?}");
}
