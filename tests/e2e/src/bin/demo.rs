//! The main job, live: a running application is taken over, a good version is promoted, one with errors and a slow one are
//! rolled back by the guard, under load from inside the cluster. Prints an account while it happens and a table at the end; exits
//! with 1 if an expectation does not hold.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout)]

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use clap::Parser;
use serde::Serialize;
use sluice_crds::{CanaryStatus, Phase};
use sluice_e2e::{
    app::App,
    cluster::Cluster,
    load::Load,
    watch::{Seen, unix_ms},
};
use sluice_load::{Bucket, CUT, RESENT};

#[derive(Parser)]
struct Options {
    /// Shorter steps and a shorter floor for kube-proxy.
    #[arg(long, env = "FAST", default_value_t = 0)]
    fast: u8,
    /// Writes the table here.
    #[arg(long, env = "JSON")]
    json: Option<PathBuf>,
    /// Requests per second.
    #[arg(long, env = "RATE", default_value_t = 300)]
    rate: u32,
}

/// One line of the table.
#[derive(Debug, Serialize)]
struct Figures {
    release: String,
    outcome: String,
    /// Requests that no version answered.
    failed_requests: u64,
    /// From the API server's answer to the first status that speaks of the change.
    noticed_s: Option<f64>,
    /// ... to the first answer of the new version.
    first_answer_s: Option<f64>,
    /// ... to the end of the release.
    total_s: f64,
    /// First to last bad answer.
    bad_s: Option<f64>,
    bad_answers: u64,
    /// From a requested weight to its acknowledgement by every member: the longest.
    acknowledged_ms: Option<u64>,
    pods_started: usize,
    requests: u64,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let cluster = Cluster::connect().await?;
    let began = std::time::Instant::now();

    println!("\n== Sluice: helm install, with a Prometheus beside it that scrapes every second");
    let settle = if options.fast > 0 { "settleSeconds=5" } else { "settleSeconds=10" };
    cluster.install(&[settle]).await?;
    println!("   ready after {:.1} s", began.elapsed().as_secs_f64());

    let namespace = format!("demo-{}", unix_ms() % 1_000_000);
    println!("\n== An application (4 replicas) in namespace {namespace}, without Sluice, under {} req/s", options.rate);
    let app = App::deploy(&cluster, &namespace, 4).await?;
    let rate = options.rate.to_string();
    let load = Load::start(&cluster, &namespace, "load", &["--target", "hello:80", "--rate", &rate]).await?;
    let steady_ms = load.steady().await?;
    println!("   look at it meanwhile:  kubectl -n {namespace} get canaries -w");
    println!("                          kubectl -n {namespace} describe canary hello");

    let mut table = Vec::new();
    println!("\n== The Canary is applied: the running application is taken over");
    let began_ms = unix_ms();
    let analysis = if options.fast > 0 {
        serde_json::json!({"drainSeconds": 5, "analysis": {"interval": "6s", "stepWeights": [20, 60], "metrics": [
            {"name": "request-success-rate", "interval": "5s", "thresholdRange": {"min": 99}},
            {"name": "request-duration", "interval": "5s", "thresholdRange": {"max": 500}},
        ]}})
    } else {
        serde_json::json!({})
    };
    let applied = app.canary(analysis).await?;
    let mut account = Account::new(&app, &load, began_ms);
    account.follow(|status| status.phase == Phase::Initialized, Duration::from_secs(120)).await?;
    app.own_pods_ended().await?;
    load.catch_up().await?;
    let behind_ms = unix_ms();
    table.push(figures("adoption", "taken over", &app, &load, applied, None).await?);

    for (name, env, bad, wanted) in [
        ("good (v2)", vec![("VERSION", "v2")], "", Phase::Succeeded),
        ("50 % errors (v3)", vec![("VERSION", "v3"), ("ERROR_RATE", "0.5")], "v3", Phase::Failed),
        ("1 s slower (v4)", vec![("VERSION", "v4"), ("ERROR_RATE", "0"), ("LATENCY_MS", "1000")], "v4", Phase::Failed),
    ] {
        println!("\n== Release: {name}");
        let applied = app.release(&env).await?;
        let mut account = Account::new(&app, &load, applied);
        account.follow(|status| status.phase == Phase::Progressing, Duration::from_secs(30)).await?;
        account
            .follow(|status| matches!(status.phase, Phase::Succeeded | Phase::Failed), Duration::from_secs(240))
            .await?;
        // The last answers of the old weight are still on their way.
        tokio::time::sleep(Duration::from_secs(2)).await;
        load.catch_up().await?;
        let figures = figures(name, "", &app, &load, applied, Some((env[0].1, bad))).await?;
        let phase = app.history.last().map(|seen| seen.status.phase);
        let outcome = match phase {
            Some(Phase::Succeeded) => "promoted",
            Some(Phase::Failed) => "rolled back",
            _ => "?",
        };
        let figures = Figures { outcome: outcome.to_owned(), ..figures };
        if phase != Some(wanted) {
            println!("   !! expected {wanted:?}, got {phase:?}");
        }
        table.push(Figures {
            outcome: if phase == Some(wanted) { figures.outcome } else { format!("{} (!)", figures.outcome) },
            ..figures
        });
    }

    print_table(&table);
    if let Some(path) = &options.json {
        std::fs::write(path, serde_json::to_string_pretty(&table)?)?;
    }
    let failed: u64 = table.iter().map(|row| row.failed_requests).sum();
    for bucket in load.lost_but_for_the_takeover(steady_ms, behind_ms) {
        println!("   failed: {}", serde_json::to_string(&bucket)?);
    }
    let unexpected = table.iter().any(|row| row.outcome.contains('!'));
    load.stop().await?;
    println!(
        "\n   {failed} failed requests that no version of the application caused; {:.0} s in all",
        began.elapsed().as_secs_f64()
    );
    if failed > 0 || unexpected {
        println!("   An expectation does not hold.");
        std::process::exit(1);
    }
    Ok(())
}

/// Prints what happens, line by line.
struct Account<'a> {
    app: &'a App,
    load: &'a Load,
    began_ms: u64,
    from_ms: u64,
    printed: String,
}

impl<'a> Account<'a> {
    fn new(app: &'a App, load: &'a Load, began_ms: u64) -> Self {
        Self { app, load, began_ms, from_ms: began_ms, printed: String::new() }
    }

    async fn follow(&mut self, end: impl Fn(&CanaryStatus) -> bool, deadline: Duration) -> anyhow::Result<()> {
        let until = std::time::Instant::now() + deadline;
        loop {
            for Seen { at_ms, status } in self.app.history.since(self.from_ms) {
                self.from_ms = at_ms + 1;
                self.print(at_ms, &status);
                if end(&status) {
                    return Ok(());
                }
            }
            anyhow::ensure!(
                std::time::Instant::now() < until,
                "the release did not get there within {deadline:?}; last: {}",
                serde_json::to_string(&self.app.history.last().map(|seen| seen.status))?
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn print(&mut self, at_ms: u64, status: &CanaryStatus) {
        let waiting = status.waiting.as_ref().map(|waiting| waiting.message.as_str()).unwrap_or_default();
        let said = match &status.rollback {
            // In its own words: the gates say nothing of it.
            Some(rollback) if rollback.reason == "GuardBreached" => rollback.message.as_str(),
            Some(_) | None if status.summary.is_empty() => waiting,
            Some(_) | None => &status.summary,
        };
        let line = format!(
            "{:<12} weight {:>3} requested, {:>7} effective  {:<5} {said}",
            format!("{:?}", status.phase),
            status.requested_weight,
            if status.weight.is_empty() { "Unknown" } else { &status.weight },
            status.progress,
        );
        if line == self.printed {
            return;
        }
        #[allow(clippy::cast_precision_loss)]
        let seconds = at_ms.saturating_sub(self.began_ms) as f64 / 1000.0;
        println!("   {seconds:>6.2} s  {line}  [clients saw {}]", shares(&self.load.since(at_ms.saturating_sub(1000))));
        self.printed = line;
    }
}

/// What clients saw, by version.
fn shares(buckets: &[Bucket]) -> String {
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for bucket in buckets {
        *counts.entry(bucket.version.as_str()).or_default() += bucket.count;
    }
    let total: u64 = counts.values().sum();
    let share = |(version, count): (&&str, &u64)| {
        let version = if version.is_empty() { "no answer" } else { version };
        format!("{version} {}%", count * 100 / total.max(1))
    };
    counts.iter().map(share).collect::<Vec<_>>().join(", ")
}

#[allow(clippy::cast_precision_loss)]
async fn figures(
    release: &str,
    outcome: &str,
    app: &App,
    load: &Load,
    applied: u64,
    version: Option<(&str, &str)>,
) -> anyhow::Result<Figures> {
    let seconds = |ms: u64| ms.saturating_sub(applied) as f64 / 1000.0;
    let buckets = load.since(applied);
    let history = app.history.since(applied);
    let last = history.last().map(|seen| seen.status.clone()).unwrap_or_default();
    let ended = history
        .iter()
        .find(|seen| {
            matches!(seen.status.phase, Phase::Initialized | Phase::Succeeded | Phase::Failed) && {
                version.is_none()
                    || seen.status.stage == sluice_crds::Stage::Settled && seen.status.plan.is_none()
                    || seen.status == last
            }
        })
        .map_or(applied, |seen| seen.at_ms);
    let (new, bad) = version.unwrap_or(("-", ""));
    let is_bad = |bucket: &&Bucket| bucket.version == bad && (bucket.status >= 500 || bucket.slow > 0);
    let bad_first = buckets.iter().filter(is_bad).map(|bucket| bucket.first_ms).min();
    let bad_last = buckets.iter().filter(is_bad).map(|bucket| bucket.last_ms).max();
    let count_bad = |bucket: &Bucket| if bucket.status >= 500 { bucket.count } else { bucket.slow };
    let mut acknowledged = None;
    let mut requested: Option<(i32, u64)> = None;
    for seen in &history {
        if requested.is_none_or(|(weight, _)| weight != seen.status.requested_weight) {
            requested = Some((seen.status.requested_weight, seen.at_ms));
        }
        if let Some((weight, at)) = requested
            && at != u64::MAX
            && seen.status.effective_weight == Some(weight)
        {
            acknowledged = acknowledged.max(Some(seen.at_ms - at));
            // Answered: what comes later with the same weight is no new request.
            requested = Some((weight, u64::MAX));
        }
    }
    let revision = last.template.as_ref().map(|template| template.revision.clone()).unwrap_or_default();
    let noticed = history.iter().find(|seen| {
        version.is_none() || seen.status.template.as_ref().is_some_and(|template| template.revision == revision)
    });
    Ok(Figures {
        release: release.to_owned(),
        outcome: outcome.to_owned(),
        // Before the takeover is over, a connection may be to a Pod that ends.
        failed_requests: buckets
            .iter()
            .filter(|bucket| bucket.failed() || (version.is_some() && bucket.kind == CUT))
            .map(|bucket| bucket.count)
            .sum(),
        noticed_s: noticed.map(|seen| seconds(seen.at_ms)),
        first_answer_s: buckets
            .iter()
            .filter(|bucket| bucket.version == new)
            .map(|bucket| seconds(bucket.first_ms))
            .reduce(f64::min),
        total_s: seconds(ended),
        bad_s: bad_first.zip(bad_last).map(|(first, last)| (last - first) as f64 / 1000.0),
        bad_answers: buckets.iter().filter(is_bad).map(count_bad).sum(),
        acknowledged_ms: acknowledged,
        pods_started: app.pods_of(&revision).await?.len(),
        requests: buckets.iter().filter(|bucket| bucket.kind != RESENT).map(|bucket| bucket.count).sum(),
    })
}

fn print_table(table: &[Figures]) {
    let seconds = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"));
    println!();
    println!(
        "   {:<18} {:<12} {:>8} {:>7} {:>9} {:>9} {:>8} {:>7} {:>7} {:>7} {:>5}",
        "release",
        "outcome",
        "requests",
        "failed",
        "noticed s",
        "1st ans s",
        "total s",
        "bad s",
        "bad ans",
        "ack ms",
        "pods"
    );
    for row in table {
        println!(
            "   {:<18} {:<12} {:>8} {:>7} {:>9} {:>9} {:>8.2} {:>7} {:>7} {:>7} {:>5}",
            row.release,
            row.outcome,
            row.requests,
            row.failed_requests,
            seconds(row.noticed_s),
            seconds(row.first_answer_s),
            row.total_s,
            seconds(row.bad_s),
            row.bad_answers,
            row.acknowledged_ms.map_or_else(|| "-".to_owned(), |ms| ms.to_string()),
            row.pods_started
        );
    }
}
