//! The CRDs that users install are those of the types.
#![allow(clippy::unwrap_used)]

use std::path::Path;

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
