//! The reference: fields from the CRDs that the types make, series from what the processes export. Nothing in it is written
//! by hand but the words around the tables.
#![forbid(unsafe_code)]

mod fields;
mod metrics;

pub use fields::{Field, fields};

/// The page, as Markdown.
///
/// # Errors
/// If a CRD is no JSON, which would be a defect of its type.
pub fn reference() -> serde_json::Result<String> {
    let mut page = String::from(
        "# Reference\n\n<!-- Made from the types and the metrics in the code: make reference -->\n\n\
         Every field of `Canary` and `MetricTemplate`, and every series that is exported. `kubectl explain canary.spec` says the same. \
         What to write for what: [canary.md](canary.md), [metrics.md](metrics.md). What a reason means: [troubleshooting.md](troubleshooting.md).\n",
    );
    for crd in sluice_crds::crds() {
        page.push_str(&fields::section(&serde_json::to_value(&crd)?));
    }
    page.push_str(&metrics::section());
    Ok(page)
}
