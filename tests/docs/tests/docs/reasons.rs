//! docs/troubleshooting.md explains every reason that a status, an event or an answer of a proxy can have.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use sluice_proxy::failure::Flag;

use super::{alerts::alerts, pages::root};

/// CamelCase words in `delivery` that are no reasons of ours: kinds and words of Kubernetes.
const OTHERS: &[&str] = &[
    "Always",
    "AmbiguousSelector",
    "ClientIP",
    "ConfigMap",
    "ContainerCreating",
    "ControllerRevision",
    "CrashLoopBackOff",
    "Deployment",
    "ExternalName",
    "False",
    "HorizontalPodAutoscaler",
    "IPv4",
    "IPv6",
    "Local",
    "None",
    "Opaque",
    "PodInitializing",
    "PodScheduled",
    "Ports",
    "Recreate",
    "ReplicaFailure",
    "RuntimeDefault",
    "ScalingActive",
    "Secret",
    "Service",
    "True",
    "Unknown",
    "Unschedulable",
];

/// Each source file below a folder, without its tests.
pub fn sources(folder: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let tests = path.file_stem().is_some_and(|name| name == "tests" || name == "testing");
            if path.is_dir() && !tests {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") && !tests {
                let text = std::fs::read_to_string(&path).unwrap();
                // Tests are at a file's end.
                let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap().to_owned();
                found.push((path, code));
            }
        }
    }
    assert!(!found.is_empty(), "no sources in {}", folder.display());
    found
}

/// `Reverted`, `NoEndpoints`.
fn camel(word: &str) -> bool {
    word.len() > 2
        && word.starts_with(|c: char| c.is_ascii_uppercase())
        && word.chars().all(|c| c.is_ascii_alphanumeric())
        && word.contains(|c: char| c.is_ascii_lowercase())
}

/// Whole string literals that look like a reason. Every reason is written as one, and nearly nothing else is.
fn literals() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (_, text) in sources(Path::new("controller/src/delivery")) {
        found.extend(text.split('"').filter(|word| camel(word)).map(ToOwned::to_owned));
    }
    // Who else makes one says so.
    for (_, text) in sources(Path::new("controller/src")) {
        let said = text.split("reason: \"").skip(1).filter_map(|rest| rest.split('"').next());
        found.extend(said.map(ToOwned::to_owned));
    }
    found
}

/// Words in code quotes in the first cells of the page's tables.
pub fn explained() -> BTreeSet<String> {
    let page = std::fs::read_to_string(root().join("docs/troubleshooting.md")).unwrap();
    let cells = page.lines().filter(|line| line.starts_with("| `")).filter_map(|line| line.split('|').nth(1));
    let words = cells.flat_map(|cell| cell.split('`').skip(1).step_by(2));
    words.filter(|word| camel(word) || word.chars().all(|c| c.is_ascii_uppercase())).map(ToOwned::to_owned).collect()
}

#[test]
fn every_reason_in_the_code_is_explained() {
    let (literals, explained) = (literals(), explained());
    let missing: Vec<_> =
        literals.iter().filter(|word| !explained.contains(*word) && !OTHERS.contains(&word.as_str())).collect();
    assert!(
        missing.is_empty(),
        "explain these in a table of docs/troubleshooting.md (or, where one is no reason, add it to OTHERS here): {missing:?}"
    );
    let gone: Vec<_> = OTHERS.iter().filter(|word| !literals.contains(**word)).collect();
    assert!(gone.is_empty(), "no longer in the code; remove from OTHERS: {gone:?}");
}

#[test]
fn every_reason_that_is_explained_exists() {
    let known = literals();
    let flags: BTreeSet<&str> = Flag::ALL.iter().map(|flag| flag.name()).collect();
    let alerts = alerts();
    let gone: Vec<_> = explained()
        .into_iter()
        .filter(|word| !known.contains(word) && !flags.contains(word.as_str()) && !alerts.contains(word))
        .collect();
    assert!(gone.is_empty(), "docs/troubleshooting.md explains what the code does not say: {gone:?}");
}

#[test]
fn every_response_flag_is_explained() {
    let explained = explained();
    for flag in Flag::ALL {
        assert!(
            explained.contains(flag.name()),
            "docs/troubleshooting.md does not explain the response flag {}",
            flag.name()
        );
    }
}
