//! What Sluice costs when nothing happens, and how soon it notices a change, with 1, 100 and 500 Canaries. Their
//! Deployments have no replicas, so that a small machine can hold them. On the cluster that `KUBECONFIG` names.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout)]

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use clap::Parser;
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{Namespace, Pod},
};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
    runtime::{WatchStreamExt, watcher},
};
use serde::Serialize;
use serde_json::{Value, json};
use sluice_crds::{Canary, Phase};
use sluice_e2e::{
    cluster::{Cluster, SYSTEM},
    watch::unix_ms,
};

#[derive(Parser)]
struct Options {
    /// Canaries at each measurement.
    #[arg(long, env = "COUNTS", value_delimiter = ',', default_value = "1,100,500")]
    counts: Vec<usize>,
    /// Length of the idle window, in seconds.
    #[arg(long, env = "WINDOW", default_value_t = 60)]
    window: u64,
    /// Writes the table here.
    #[arg(long, env = "JSON")]
    json: Option<PathBuf>,
}

/// One line of the table.
#[derive(Debug, Serialize)]
struct Row {
    canaries: usize,
    /// From the last Canary applied until all were taken over.
    adopted_s: f64,
    /// Each controller: the leader is the one that costs more.
    controllers: Vec<Idle>,
    /// From the API server's answer to the first status that speaks of the change, of up to 20 changed together.
    noticed_s: [f64; 3],
}

#[derive(Debug, Serialize)]
struct Idle {
    cpu_cores: f64,
    rss_mib: f64,
    requests_per_s: f64,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let cluster = Cluster::connect().await?;
    cluster.install(&["settleSeconds=10"]).await?;
    let namespace = format!("scale-{}", unix_ms() % 1_000_000);
    cluster.namespace(&namespace).await?;
    let mut table = Vec::new();
    let mut made = 0;
    for count in options.counts {
        ensure!(count > made, "counts must rise");
        let began = unix_ms();
        stream::iter(made..count)
            .map(|number| create(&cluster, &namespace, number))
            .buffered(8)
            .try_collect::<()>()
            .await?;
        made = count;
        adopted(&cluster, &namespace, count).await?;
        let adopted_s = seconds_since(began);
        println!("   {count} Canaries are taken over after {adopted_s:.1} s; {} s of idling", options.window);
        // What the takeover left to do in the background.
        tokio::time::sleep(Duration::from_secs(15)).await;
        let controllers = idle(&cluster, Duration::from_secs(options.window)).await?;
        let noticed_s = noticed(&cluster, &namespace, count).await?;
        table.push(Row { canaries: count, adopted_s, controllers, noticed_s });
    }
    println!(
        "\n   {:>8} {:>9} {:>26} {:>16} {:>20} {:>24}",
        "Canaries", "adopted s", "CPU cores", "RSS MiB", "API requests/s", "noticed s"
    );
    for row in &table {
        let each = |value: fn(&Idle) -> String| row.controllers.iter().map(value).collect::<Vec<_>>().join(" ");
        println!(
            "   {:>8} {:>9.1} {:>26} {:>16} {:>20} {:>24}",
            row.canaries,
            row.adopted_s,
            each(|idle| format!("{:.5}", idle.cpu_cores)),
            each(|idle| format!("{:.1}", idle.rss_mib)),
            each(|idle| format!("{:.2}", idle.requests_per_s)),
            row.noticed_s.map(|seconds| format!("{seconds:.2}")).join(" / "),
        );
    }
    if let Some(path) = &options.json {
        std::fs::write(path, serde_json::to_string_pretty(&table)?)?;
    }
    let namespaces: Api<Namespace> = Api::all(cluster.client.clone());
    namespaces.delete(&namespace, &DeleteParams::default()).await?;
    Ok(())
}

#[allow(clippy::cast_precision_loss)]
fn seconds_since(from_ms: u64) -> f64 {
    unix_ms().saturating_sub(from_ms) as f64 / 1000.0
}

async fn create(cluster: &Cluster, namespace: &str, number: usize) -> anyhow::Result<()> {
    let name = format!("app-{number}");
    let deployment: Deployment = serde_json::from_value(json!({
        "metadata": {"name": name},
        "spec": {
            "replicas": 0,
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}}, "spec": {
                "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
                "containers": [{
                    "name": "hello", "image": format!("localhost/sluice-hello:{}", cluster.tag),
                    "ports": [{"name": "http", "containerPort": 8080}],
                    "env": [{"name": "VERSION", "value": "v1"}],
                    "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
                }],
            }},
        },
    }))?;
    let canary: Canary = serde_json::from_value(json!({
        "apiVersion": "sluice.dev/v1beta1", "kind": "Canary",
        "metadata": {"name": name},
        "spec": {
            "targetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
            "service": {"port": 80, "targetPort": "http"},
            // One node does not hold so many Pods. A release starts one, for as long as it takes.
            "replicas": 0,
            "skipAnalysis": true,
        },
    }))?;
    let deployments: Api<Deployment> = Api::namespaced(cluster.client.clone(), namespace);
    deployments.create(&PostParams::default(), &deployment).await.with_context(|| format!("Deployment {name}"))?;
    let canaries: Api<Canary> = Api::namespaced(cluster.client.clone(), namespace);
    canaries.create(&PostParams::default(), &canary).await.with_context(|| format!("Canary {name}"))?;
    Ok(())
}

async fn adopted(cluster: &Cluster, namespace: &str, count: usize) -> anyhow::Result<()> {
    let canaries: Api<Canary> = Api::namespaced(cluster.client.clone(), namespace);
    let mut stream = std::pin::pin!(watcher(canaries, watcher::Config::default()).default_backoff().applied_objects());
    let mut waiting = BTreeMap::new();
    let all = async {
        let mut done = BTreeSet::new();
        while done.len() < count {
            let canary = stream.try_next().await?.context("the watch ended")?;
            let status = canary.status.clone().unwrap_or_default();
            if matches!(status.phase, Phase::Initialized | Phase::Succeeded | Phase::Failed) {
                waiting.remove(&canary.name_any());
                done.insert(canary.name_any());
            } else {
                waiting.insert(canary.name_any(), status.summary);
            }
        }
        anyhow::Ok(())
    };
    match tokio::time::timeout(Duration::from_secs(600), all).await {
        Ok(result) => result,
        Err(_) => bail!("not taken over within 10 minutes: {:?}", waiting.into_iter().next()),
    }
}

/// CPU and memory from the kubelets' summaries, requests from the controllers' own metrics.
#[allow(clippy::cast_precision_loss)]
async fn idle(cluster: &Cluster, window: Duration) -> anyhow::Result<Vec<Idle>> {
    let before = usage(cluster).await?;
    let began = std::time::Instant::now();
    tokio::time::sleep(window).await;
    let after = usage(cluster).await?;
    let seconds = began.elapsed().as_secs_f64();
    let rows = after.into_iter().filter_map(|(pod, after)| {
        let before = before.get(&pod)?;
        Some(Idle {
            cpu_cores: (after.cpu_ns - before.cpu_ns) / 1e9 / seconds,
            rss_mib: after.rss_bytes / 1024.0 / 1024.0,
            requests_per_s: (after.requests - before.requests) / seconds,
        })
    });
    Ok(rows.collect())
}

struct Usage {
    cpu_ns: f64,
    rss_bytes: f64,
    requests: f64,
}

async fn usage(cluster: &Cluster) -> anyhow::Result<BTreeMap<String, Usage>> {
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), SYSTEM);
    let controllers = pods.list(&ListParams::default().labels("app.kubernetes.io/component=controller")).await?;
    let mut usages = BTreeMap::new();
    for pod in controllers {
        let name = pod.name_any();
        let node = pod.spec.and_then(|spec| spec.node_name).context("a controller without a node")?;
        let summary: Value = serde_json::from_str(
            &cluster.kubectl(&["get", "--raw", &format!("/api/v1/nodes/{node}/proxy/stats/summary")], None).await?,
        )?;
        let pods = summary["pods"].as_array().context("no Pods in the kubelet's summary")?;
        let container = pods
            .iter()
            .find(|pod| pod["podRef"]["name"] == *name)
            .and_then(|pod| pod["containers"].as_array()?.first())
            .with_context(|| format!("{name} is not in the summary of {node}"))?;
        let number = |value: &Value| {
            value.as_f64().with_context(|| format!("the summary of {node} says nothing of {name}: {container}"))
        };
        let metrics = cluster
            .kubectl(&["get", "--raw", &format!("/api/v1/namespaces/{SYSTEM}/pods/{name}:18080/proxy/metrics")], None)
            .await?;
        let requests = metrics
            .lines()
            .filter(|line| line.starts_with("sluice_rest_client_requests_total"))
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum();
        let usage = Usage {
            cpu_ns: number(&container["cpu"]["usageCoreNanoSeconds"])?,
            rss_bytes: number(&container["memory"]["rssBytes"])?,
            requests,
        };
        usages.insert(name, usage);
    }
    Ok(usages)
}

/// Least, middle and most.
async fn noticed(cluster: &Cluster, namespace: &str, count: usize) -> anyhow::Result<[f64; 3]> {
    let canaries: Api<Canary> = Api::namespaced(cluster.client.clone(), namespace);
    let deployments: Api<Deployment> = Api::namespaced(cluster.client.clone(), namespace);
    let mut stream = std::pin::pin!(watcher(canaries, watcher::Config::default()).default_backoff().applied_objects());
    let mut known: BTreeMap<String, Option<String>> = BTreeMap::new();
    let revision =
        |canary: &Canary| canary.status.as_ref()?.template.as_ref().map(|template| template.revision.clone());
    while known.len() < count {
        let canary = stream.try_next().await?.context("the watch ended")?;
        known.insert(canary.name_any(), revision(&canary));
    }
    let version = format!("v-{}", unix_ms());
    let patch = Patch::Strategic(json!({"spec": {"template": {"spec": {"containers": [
        {"name": "hello", "env": [{"name": "VERSION", "value": version}]},
    ]}}}}));
    let changed: Vec<(String, u64)> = stream::iter(0..count.min(20))
        .map(|number| {
            let (deployments, patch) = (deployments.clone(), patch.clone());
            async move {
                let name = format!("app-{number}");
                deployments.patch(&name, &PatchParams::default(), &patch).await?;
                anyhow::Ok((name, unix_ms()))
            }
        })
        .buffer_unordered(20)
        .try_collect()
        .await?;
    let mut times = Vec::new();
    let all = async {
        let mut left: BTreeMap<String, u64> = changed.into_iter().collect();
        while !left.is_empty() {
            let canary = stream.try_next().await?.context("the watch ended")?;
            let name = canary.name_any();
            if known.get(&name).is_some_and(|known| *known != revision(&canary))
                && let Some(at) = left.remove(&name)
            {
                times.push(seconds_since(at));
            }
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(Duration::from_secs(120), all)
        .await
        .context("changes were not noticed within two minutes")??;
    times.sort_by(f64::total_cmp);
    Ok([times[0], times[times.len() / 2], times[times.len() - 1]])
}
