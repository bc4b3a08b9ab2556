//! Starts everything, runs the rounds, and gathers what was seen.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use clap::{Args, builder::FalseyValueParser};

use crate::{
    envoy, haproxy,
    job::{
        Job, LOAD_CORE, PROXY_CORE, Protocol, Role, Running, Security, Service, WEIGHTS, child, counted, instructions,
        pinned,
    },
    load::{self, Load, Task, Window},
    message::OWNERS,
    report::{Observation, Report},
    rows::{Peer, Proxy, ROWS, Row},
    update::{self, Updated},
    upstream::Upstream,
};

#[derive(Args)]
pub(crate) struct Plan {
    #[arg(long, env = "ENVOY")]
    envoy: PathBuf,
    #[arg(long, env = "HAPROXY")]
    haproxy: PathBuf,
    /// Fewer and shorter rounds, in under 4 minutes.
    #[arg(long, env = "QUICK", value_parser = FalseyValueParser::new())]
    quick: bool,
    /// At least 3, so that a median says something. Default: 7, or 3 if quick.
    #[arg(long, env = "ROUNDS", value_parser = clap::value_parser!(u32).range(3..))]
    rounds: Option<u32>,
    /// Default: 1600, or 500 if quick.
    #[arg(long)]
    measure_ms: Option<u64>,
    /// Only the rows with this in their name.
    #[arg(long, env = "ONLY")]
    only: Option<String>,
    /// Instead, count the instructions that a request of the saturated rows, and an update, takes our proxy in user space. They do not
    /// depend on what else the machine does, but leave the kernel out.
    #[arg(long, env = "INSTRUCTIONS", value_parser = FalseyValueParser::new())]
    instructions: bool,
    /// Write all rounds and figures to this file.
    #[arg(long, env = "JSON")]
    json: Option<PathBuf>,
}

/// Of the upstreams, by owner.
type Addresses = [Vec<SocketAddr>; OWNERS.len()];

/// A peer that runs.
struct Started {
    peer: Peer,
    processes: Vec<Running>,
    target: SocketAddr,
    host: String,
    rss_idle_kib: f64,
}

impl Started {
    fn pids(&self) -> Vec<u32> {
        self.processes.iter().map(|process| process.0.id()).collect()
    }
}

impl Plan {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let cores = std::thread::available_parallelism()?.get();
        ensure!(cores >= 2, "the benchmark needs two cores: one for the proxy, one for load and upstreams");
        let folder = std::env::temp_dir().join(format!("sluice-bench-{}", std::process::id()));
        fs::create_dir_all(&folder)?;
        let result = self.all(&folder);
        let _ = fs::remove_dir_all(&folder);
        let Some(report) = result? else { return Ok(()) };
        println!("{report}");
        if let Some(file) = &self.json {
            fs::write(file, serde_json::to_vec_pretty(&report)?)
                .with_context(|| format!("writing {}", file.display()))?;
        }
        let missed = report.missed();
        ensure!(missed.is_empty(), "missed: {}", missed.join("; "));
        Ok(())
    }

    fn all(&self, folder: &Path) -> anyhow::Result<Option<Report>> {
        let begin = Instant::now();
        crate::certificates::write(folder)?;
        let mut observations = Vec::new();
        let wanted = |row: &&Row| self.only.as_deref().is_none_or(|part| row.name.contains(part));
        if self.instructions {
            for row in ROWS.iter().filter(wanted) {
                self.count(row, folder).with_context(|| row.name.to_owned())?;
            }
            return Ok(None);
        }
        for row in ROWS.iter().filter(wanted) {
            eprintln!("{}", row.name);
            self.row(row, folder, &mut observations).with_context(|| row.name.to_owned())?;
        }
        Ok(Some(Report::new(observations, begin.elapsed())))
    }

    fn upstream(&self, row: &Row, folder: &Path) -> anyhow::Result<(Running, Addresses)> {
        let ports = free(2)?;
        let listen = [ports[0], ports[1]].map(|first| {
            let address = |n| SocketAddr::new(Ipv4Addr::new(127, 0, 0, n).into(), first.port());
            (1..=row.endpoints as u8).map(address).collect::<Vec<_>>()
        });
        let upstream = Upstream {
            listen: listen.clone(),
            protocol: if row.to_http1 { Protocol::Http1 } else { row.protocol },
            security: row.upstream,
            sizes: row.sizes,
            folder: folder.to_owned(),
        };
        let running = start(&mut child(LOAD_CORE, "upstream", folder, &upstream)?, listen[1][0])?;
        Ok((running, listen))
    }

    fn row(&self, row: &Row, folder: &Path, observations: &mut Vec<Observation>) -> anyhow::Result<()> {
        if let Load::Updates { small } = row.load {
            return self.updates(row, small, folder, observations);
        }
        let (_upstream, listen) = self.upstream(row, folder)?;
        // What memory was given for is not given back: a process serves one round of it. It scatters little.
        let fresh = matches!(row.load, Load::Idle { .. });
        let rounds = self.rounds.unwrap_or(if self.quick || fresh { 3 } else { 7 });
        let mut running = Vec::new();
        if !fresh {
            for peer in row.peers {
                running.push(self.peer(*peer, row, &listen, folder)?);
            }
        }
        for round in 0..rounds {
            for index in order(row, round) {
                let own;
                let started = if fresh {
                    own = self.peer(row.peers[index], row, &listen, folder)?;
                    &own
                } else {
                    &running[index]
                };
                let name = started.peer.name;
                let window = self.window(row, started, folder).with_context(|| format!("{name}, round {round}"))?;
                observations.push(Observation {
                    row: row.name,
                    round,
                    peer: name,
                    window,
                    rss_idle_kib: started.rss_idle_kib,
                });
            }
        }
        Ok(())
    }

    /// Each round has proxies of its own, that begin without a configuration.
    fn updates(
        &self,
        row: &Row,
        small: usize,
        folder: &Path,
        observations: &mut Vec<Observation>,
    ) -> anyhow::Result<()> {
        for round in 0..self.rounds.unwrap_or(3) {
            for index in order(row, round) {
                let peer = row.peers[index];
                let seen = self.update(peer, peer.services, small, None, folder);
                let seen = seen.with_context(|| format!("{}, round {round}", peer.name))?;
                observations.push(Observation {
                    row: row.name,
                    round,
                    peer: peer.name,
                    window: Window { rss_kib: seen.small_kib, update: Some(seen), ..Window::default() },
                    rss_idle_kib: seen.empty_kib,
                });
            }
        }
        Ok(())
    }

    fn update(
        &self,
        peer: Peer,
        services: usize,
        small: usize,
        counts: Option<&Path>,
        folder: &Path,
    ) -> anyhow::Result<Updated> {
        let task = update::Task {
            proxy: peer.proxy,
            envoy: self.envoy.clone(),
            services,
            small,
            counts: counts.map(Path::to_owned),
            folder: folder.to_owned(),
        };
        let output = child(LOAD_CORE, "update", folder, &task)?.stdout(Stdio::piped()).output()?;
        ensure!(output.status.success(), "the measurement failed");
        serde_json::from_slice(&output.stdout).context("reading its result")
    }

    #[allow(clippy::disallowed_methods, reason = "no runtime here that a sleep could block")]
    fn peer(&self, peer: Peer, row: &Row, upstreams: &Addresses, folder: &Path) -> anyhow::Result<Started> {
        let ports = free(3)?;
        let service = |index: usize| Service {
            host: format!("cart{index}.shop"),
            listen: match peer.services {
                1 => ports[0],
                // One port of as many addresses, as Services have.
                _ => {
                    let ip = Ipv4Addr::new(127, 1, (index / 250) as u8, (index % 250 + 1) as u8);
                    SocketAddr::new(IpAddr::V4(ip), ports[0].port())
                }
            },
            revisions: upstreams.to_vec(),
        };
        let mut job = Job {
            role: Role::Fleet,
            protocol: row.protocol,
            to_http1: row.to_http1,
            downstream: row.downstream,
            upstream: row.upstream,
            services: (0..peer.services).map(service).collect(),
            folder: folder.to_owned(),
        };
        let asked = &job.services[peer.services / 2];
        let (host, mut target) = (asked.host.clone(), asked.listen);
        let mut processes = Vec::new();
        match peer.proxy {
            Proxy::Direct => target = upstreams[0][0],
            Proxy::Sluice if self.instructions => {
                let mut command = counted(PROXY_CORE, "proxy", folder, &job, &folder.join("callgrind"))?;
                processes.push(start(&mut command, target)?);
            }
            Proxy::Sluice => processes.push(start(&mut child(PROXY_CORE, "proxy", folder, &job)?, target)?),
            Proxy::SluiceWithSidecar => {
                let beside = |owner: usize| Service {
                    host: format!("{}.{host}", OWNERS[owner]),
                    listen: ports[1 + owner],
                    revisions: vec![upstreams[owner].clone()],
                };
                let sidecar = Job {
                    role: Role::Sidecar,
                    protocol: row.protocol,
                    to_http1: row.to_http1,
                    downstream: Security::Mtls,
                    upstream: row.upstream,
                    services: (0..OWNERS.len()).map(beside).collect(),
                    folder: folder.to_owned(),
                };
                processes.push(start(&mut child(PROXY_CORE, "proxy", folder, &sidecar)?, ports[2])?);
                job.upstream = Security::Mtls;
                job.services[0].revisions = ports[1..].iter().map(|sidecar| vec![*sidecar]).collect();
                processes.push(start(&mut child(PROXY_CORE, "proxy", folder, &job)?, target)?);
            }
            Proxy::Envoy => {
                target = job.services[0].listen;
                let config = folder.join("envoy.json");
                fs::write(&config, envoy::config(&job).to_string())?;
                let mut command = pinned(PROXY_CORE, &self.envoy);
                command.args(["--concurrency", "1", "--disable-hot-restart", "-l", "error", "-c"]).arg(&config);
                processes.push(start(&mut command, target)?);
            }
            Proxy::Haproxy => {
                let config = folder.join("haproxy.cfg");
                fs::write(&config, haproxy::config(&job))?;
                let mut command = pinned(PROXY_CORE, &self.haproxy);
                command.args(["-db", "-q", "-f"]).arg(&config);
                processes.push(start(&mut command, target)?);
            }
        }
        sleep(Duration::from_millis(200));
        let mut started = Started { peer, processes, target, host, rss_idle_kib: 0.0 };
        started.rss_idle_kib = load::rss_kib(&started.pids())?;
        Ok(started)
    }

    fn count(&self, row: &Row, folder: &Path) -> anyhow::Result<()> {
        let unit = if row.sizes.answer < 1 << 20 { 1 << 10 } else { 1 << 6 };
        let counts = [unit, 5 * unit];
        if let Load::Updates { small } = row.load {
            return self.count_updates(row, small, folder);
        }
        let Load::Saturated { connections, at_once } = row.load else { return Ok(()) };
        for peer in row.peers.iter().filter(|peer| peer.proxy == Proxy::Sluice) {
            let mut totals = [0.0; 2];
            // The difference leaves out what is done once.
            for (total, requests) in totals.iter_mut().zip(counts) {
                let (_upstream, listen) = self.upstream(row, folder)?;
                let mut started = self.peer(*peer, row, &listen, folder)?;
                let load = Load::Counted { connections, at_once, requests };
                self.window(&Row { load, ..*row }, &started, folder)?;
                for process in &mut started.processes {
                    drop(process.0.stdin.take());
                    process.0.wait()?;
                }
                *total = instructions(&folder.join("callgrind"))?;
            }
            let each = (totals[1] - totals[0]) / (counts[1] - counts[0]) as f64;
            println!("{:<50} {:<14} {each:>10.0} instructions", row.name, peer.name);
        }
        Ok(())
    }

    fn count_updates(&self, row: &Row, small: usize, folder: &Path) -> anyhow::Result<()> {
        for peer in row.peers.iter().filter(|peer| peer.proxy == Proxy::Sluice) {
            let count = |services, small| {
                let counts = folder.join("callgrind");
                self.update(*peer, services, small, Some(&counts), folder)?;
                instructions(&counts)
            };
            // The differences leave out what a process does without them.
            let full = count(peer.services, 0)?;
            let each = (count(peer.services, small)? - full) / small as f64;
            println!("{:<60} {:<14} {:>13.0} instructions, full", row.name, peer.name, full - count(3, 0)?);
            println!("{:<60} {:<14} {each:>13.0} instructions, small", row.name, peer.name);
        }
        Ok(())
    }

    fn window(&self, row: &Row, started: &Started, folder: &Path) -> anyhow::Result<Window> {
        let (warm_up, measure) = if self.quick { (200, 500) } else { (400, 1600) };
        let task = Task {
            load: row.load,
            target: started.target,
            host: started.host.clone(),
            protocol: row.protocol,
            security: row.downstream,
            sizes: row.sizes,
            folder: folder.to_owned(),
            pids: started.pids(),
            warm_up: Duration::from_millis(warm_up),
            measure: Duration::from_millis(self.measure_ms.unwrap_or(measure)),
        };
        let mut command = child(LOAD_CORE, "load", folder, &task)?;
        let output = command.stdout(Stdio::piped()).output().context("starting the load generator")?;
        ensure!(output.status.success(), "the load generator failed against {}", started.target);
        let window: Window = serde_json::from_slice(&output.stdout).context("reading the load generator's result")?;
        let split_by_request = matches!(row.protocol, Protocol::Http1 | Protocol::Http2 | Protocol::Grpc);
        if split_by_request && started.peer.proxy != Proxy::Direct {
            // Within 5 standard deviations of the weight: all did the same job.
            let wanted = f64::from(WEIGHTS[1]) / f64::from(WEIGHTS.iter().sum::<u32>());
            let deviation = (wanted * (1.0 - wanted) / window.requests as f64).sqrt();
            ensure!(
                (window.small_share - wanted).abs() < 5.0 * deviation,
                "{:.2} % instead of {:.0} % of {} requests went to the second upstream",
                window.small_share * 100.0,
                wanted * 100.0,
                window.requests
            );
        }
        Ok(window)
    }
}

/// In which the peers of a row take their turns.
fn order(row: &Row, round: u32) -> Vec<usize> {
    let mut order: Vec<usize> = (0..row.peers.len()).collect();
    if round % 2 == 1 {
        order.reverse();
    }
    order
}

/// Free ports. A stale process on a fixed one would share it unseen (`SO_REUSEPORT`) and spoil every figure.
fn free(count: usize) -> anyhow::Result<Vec<SocketAddr>> {
    let bound = (0..count).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<Result<Vec<_>, _>>()?;
    Ok(bound.iter().map(TcpListener::local_addr).collect::<Result<_, _>>()?)
}

/// Starts a server and waits until it listens. `nice` and `taskset` replace themselves by it, so the id is its own.
#[allow(clippy::disallowed_methods, reason = "no runtime here that a sleep could block")]
fn start(command: &mut Command, listens: SocketAddr) -> anyhow::Result<Running> {
    let mut running = Running(command.spawn().with_context(|| format!("starting {command:?}"))?);
    let deadline = Instant::now() + Duration::from_secs(60);
    while TcpStream::connect(listens).is_err() {
        if let Some(status) = running.0.try_wait()? {
            bail!("{command:?} ended with {status}");
        }
        ensure!(Instant::now() < deadline, "{command:?} does not listen on {listens}");
        sleep(Duration::from_millis(20));
    }
    Ok(running)
}
