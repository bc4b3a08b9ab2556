//! Tables of series, from what a controller and a proxy with one of everything export.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    time::{Duration, UNIX_EPOCH},
};

use serde_json::json;
use sluice_controller::{
    admission::{Effective, Report as _},
    cache::{CanaryKey, Touches},
    delivery::reconciler::Gauges as _,
    web,
};
use sluice_crds::CanaryStatus;
use sluice_proxy::{admin, ads, metrics::Metrics, overload::Overload, refused::Refused, snapshot::MetricLabels};
use tokio::sync::watch;

/// A family of series.
struct Series {
    name: String,
    kind: String,
    help: String,
    labels: BTreeSet<String>,
}

pub fn section() -> String {
    let mut out = String::from("\n## Series\n");
    for (title, text) in
        [("a proxy: port 20444, path `/metrics`", proxy()), ("a controller: port 18080, path `/metrics`", controller())]
    {
        let _ = write!(out, "\n### Series of {title}\n\n| Series | Type | Labels | |\n|---|---|---|---|\n");
        for Series { name, kind, help, labels } in families(&text) {
            let labels: Vec<_> = labels.iter().map(|label| format!("`{label}`")).collect();
            let _ = writeln!(out, "| `{name}` | {kind} | {} | {help} |", labels.join(", "));
        }
    }
    out.push_str(
        "\nSeries of Canaries come from the leading controller alone, those that are labelled by revision from the fleet alone. Series of \
         revisions and listeners go with their last user.\n",
    );
    out
}

/// Reads the text format. prometheus-client ends a help text with a dot of its own.
fn families(text: &str) -> Vec<Series> {
    let mut found: Vec<Series> = Vec::new();
    for line in text.lines() {
        if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) {
            let help = help.trim_end_matches('.').replace('|', "\\|") + ".";
            found.push(Series { name: name.to_owned(), kind: String::new(), help, labels: BTreeSet::new() });
        } else if let Some(series) = found.last_mut() {
            if let Some((_, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
                kind.clone_into(&mut series.kind);
                // OpenMetrics keeps the suffix to the samples.
                if kind == "counter" && !series.name.ends_with("_total") {
                    series.name.push_str("_total");
                }
            } else if let Some((_, rest)) = line.split_once('{') {
                let labels = rest.rsplit_once('}').map_or("", |(labels, _)| labels);
                let names =
                    labels.split("\",").filter_map(|label| label.split_once('=')).map(|(name, _)| name.to_owned());
                series.labels.extend(names.filter(|name| name != "le"));
            }
        }
    }
    found
}

fn proxy() -> String {
    let metrics = Metrics::new("member", 1);
    let labels = MetricLabels {
        destination_namespace: "shop".into(),
        destination_service: "cart".into(),
        revision: "revision".into(),
    };
    let _revision = metrics.revision(&labels, 0);
    let _mirror = metrics.mirror(&labels, 0);
    let listener = metrics.listener("shop/cart:80", 0);
    // Without a connection it has no series of what has not occurred.
    listener.opened();
    listener.refused(Refused::ConnectionLimit);
    let mut text = metrics.render();
    Overload::default().render(&mut text);
    ads::State::default().render(&mut text);
    text.push_str(&admin::certificate_series(UNIX_EPOCH, UNIX_EPOCH));
    text
}

/// A status with everything that is exported.
fn status() -> CanaryStatus {
    let now = "2026-01-01T00:00:00Z";
    let status = json!({
        "phase": "Progressing", "service": "cart", "requestedWeight": 10, "effectiveWeight": 10,
        "traffic": {"primary": "one", "canary": "two", "weight": 10},
        "waiting": {"reason": "Reason", "message": ""},
        "gates": [{"name": "gate", "verdict": "Pass", "value": 1.0, "time": now}],
        "plan": {
            "revision": "two", "primary": "one", "startedAt": now, "steps": [{"weight": 10}],
            "analysis": {"interval": "1m", "metrics": [{"name": "gate", "thresholdRange": {"min": 1.0, "max": 2.0}}]},
        },
        "conditions": [{
            "type": "Stalled", "status": "True", "reason": "Reason", "message": "", "lastTransitionTime": now,
        }],
    });
    serde_json::from_value(status).unwrap_or_default()
}

/// A request to the API server that nobody takes.
fn refused(calls: &web::Calls) {
    let mut config = kube::Config::new(http::Uri::from_static("http://127.0.0.1:1"));
    config.default_retry = false;
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
    let _ = runtime.block_on(async { calls.client(config)?.apiserver_version().await });
}

fn controller() -> String {
    let calls = web::Calls::default();
    refused(&calls);
    let metrics = web::Metrics::new(Touches::default(), watch::channel(Some(1)).1, &calls);
    metrics.set(&CanaryKey::new("shop", "cart"), &status());
    metrics.reconciled(Duration::ZERO, true);
    metrics.protection(Some((Effective::Repair, false)));
    metrics.render()
}
