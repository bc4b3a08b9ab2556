//! Starts everything, runs the rounds, and gathers what was seen.

use std::{
    fs,
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Stdio,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use clap::Args;

use crate::{
    contestants::{self, Running, pinned},
    load::Window,
    report::{Report, Row},
};

#[derive(Args)]
pub(crate) struct Plan {
    /// Envoy's binary.
    #[arg(long, env = "ENVOY")]
    envoy: PathBuf,
    /// At least 3, so that a median says something.
    #[arg(long, env = "ROUNDS", default_value_t = 7)]
    rounds: usize,
    #[arg(long, default_value_t = 400)]
    warm_up_ms: u64,
    #[arg(long, default_value_t = 1600)]
    measure_ms: u64,
    #[arg(long, default_value_t = 64)]
    connections: usize,
    /// Write all rounds to this file.
    #[arg(long, env = "JSON")]
    json: Option<PathBuf>,
    /// Fail if the median ratio of a scenario is below this.
    #[arg(long, default_value_t = 3.0)]
    at_least: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scenario {
    Plaintext,
    Mtls,
}

impl Plan {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let cores = std::thread::available_parallelism()?.get();
        ensure!(cores >= 2, "the benchmark needs two cores: one for the proxy, one for load and upstreams");
        ensure!(self.rounds >= 3, "at least 3 rounds, so that a median says something");
        let folder = std::env::temp_dir().join(format!("sluice-bench-{}", std::process::id()));
        fs::create_dir_all(&folder)?;
        let result = self.all(&folder);
        let _ = fs::remove_dir_all(&folder);
        let report = result?;
        println!("{report}");
        if let Some(file) = &self.json {
            fs::write(file, serde_json::to_vec_pretty(&report)?)
                .with_context(|| format!("writing {}", file.display()))?;
        }
        for (scenario, ratio) in report.ratios() {
            ensure!(ratio >= self.at_least, "{scenario}: {ratio:.2} is below {}", self.at_least);
        }
        Ok(())
    }

    fn all(&self, folder: &Path) -> anyhow::Result<Report> {
        contestants::write_certificates(folder)?;
        let own = std::env::current_exe()?;
        let [a, b] = [free()?, free()?];
        let _upstreams = [
            start(pinned(1, &own).arg("upstream").args([&a.to_string(), "a"]), a)?,
            start(pinned(1, &own).arg("upstream").args([&b.to_string(), "b"]), b)?,
        ];
        let mut report = Report::default();
        for (scenario, name) in [(Scenario::Plaintext, "H1 plaintext"), (Scenario::Mtls, "H1 mTLS downstream")] {
            let tls = (scenario == Scenario::Mtls).then_some(folder);
            let (listen_own, listen_envoy) = (free()?, free()?);

            let mut command = pinned(0, &own);
            command.arg("proxy").args([listen_own, a, b].map(|address| address.to_string()));
            if let Some(folder) = tls {
                command.arg("--tls").arg(folder);
            }
            let sluice = start(&mut command, listen_own)?;

            let config = folder.join("envoy.json");
            fs::write(&config, contestants::envoy_config(listen_envoy, [a, b], tls).to_string())?;
            let mut command = pinned(0, &self.envoy);
            command.args(["--concurrency", "1", "--disable-hot-restart", "-l", "error", "-c"]).arg(&config);
            let envoy = start(&mut command, listen_envoy)?;

            for round in 0..self.rounds {
                let mut order = [("envoy", &envoy, listen_envoy), ("sluice", &sluice, listen_own)];
                if round % 2 == 1 {
                    order.reverse();
                }
                for (contestant, running, address) in order {
                    let window = self.load(&own, address, running.0.id(), tls)?;
                    let rss_mib = rss_mib(running.0.id())?;
                    report.rows.push(Row {
                        scenario: name.to_owned(),
                        round,
                        contestant: contestant.to_owned(),
                        window,
                        rss_mib,
                    });
                }
            }
        }
        Ok(report)
    }

    fn load(&self, own: &Path, target: SocketAddr, pid: u32, tls: Option<&Path>) -> anyhow::Result<Window> {
        let mut command = pinned(1, own);
        command.arg("load").arg(target.to_string());
        command.args(["--pid", &pid.to_string(), "--connections", &self.connections.to_string()]);
        command.args(["--warm-up-ms", &self.warm_up_ms.to_string(), "--measure-ms", &self.measure_ms.to_string()]);
        if let Some(folder) = tls {
            command.arg("--tls").arg(folder);
        }
        let output = command.stdout(Stdio::piped()).output().context("starting the load generator")?;
        ensure!(output.status.success(), "the load generator failed against {target}");
        let window: Window = serde_json::from_slice(&output.stdout).context("reading the load generator's result")?;
        // 5 % within 5 standard deviations: both did the same job.
        let deviation = (0.05 * 0.95 / window.requests as f64).sqrt();
        ensure!(
            (window.small_share - 0.05).abs() < 5.0 * deviation,
            "{target} sent {:.2} % instead of 5 % to the second upstream",
            window.small_share * 100.0
        );
        Ok(window)
    }
}

/// A free port. A stale process on a fixed one would share it unseen (`SO_REUSEPORT`) and spoil every figure.
fn free() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

/// Starts a server and waits until it listens. `nice` and `taskset` replace themselves by it, so the id is its own.
#[allow(clippy::disallowed_methods, reason = "no runtime here that a sleep could block")]
fn start(command: &mut std::process::Command, listens: SocketAddr) -> anyhow::Result<Running> {
    let mut running = Running(command.spawn().with_context(|| format!("starting {command:?}"))?);
    let deadline = Instant::now() + Duration::from_secs(20);
    while TcpStream::connect(listens).is_err() {
        if let Some(status) = running.0.try_wait()? {
            bail!("{command:?} ended with {status}");
        }
        ensure!(Instant::now() < deadline, "{command:?} does not listen on {listens}");
        sleep(Duration::from_millis(20));
    }
    Ok(running)
}

fn rss_mib(pid: u32) -> anyhow::Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib = line.split_whitespace().next().context("an empty VmRSS")?;
    Ok(kib.parse::<f64>()? / 1024.0)
}
