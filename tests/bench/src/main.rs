//! What a request costs in CPU: our data path beside stock Envoy, in the same run, on the same core.
//!
//! The proxy is pinned to core 0; load generator and upstreams share core 1. Both proxies are started once and measured
//! in turn, each round in the reverse order of the one before, so that a drift of the machine meets both. Within a round
//! Envoy's CPU time per request is divided by ours; the table gives median and range of these ratios. CPU time is what
//! the kernel says that the proxy's threads ran (`/proc/<pid>/task/*/schedstat`), so the ratio stays meaningful when
//! something else had the core for a while; steal and the run queue are printed beside it.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "the table is the product")]

mod contestants;
mod load;
mod measure;
mod report;
mod upstream;

use std::{net::SocketAddr, path::PathBuf};

use clap::{Parser, Subcommand};

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measure all scenarios and print the table.
    Run(measure::Plan),
    /// (Started by `run`.) Our data path with a static snapshot, on one thread, until standard input ends.
    Proxy(contestants::Proxy),
    /// (Started by `run`.) Answers every request with its name, until standard input ends.
    Upstream { listen: SocketAddr, name: String },
    /// (Started by `run`.) A closed loop over kept connections; prints one line of JSON.
    Load {
        target: SocketAddr,
        /// Folder with the certificates; plaintext without.
        #[arg(long)]
        tls: Option<PathBuf>,
        #[arg(long, default_value_t = 64)]
        connections: usize,
        #[arg(long)]
        pid: u32,
        #[arg(long)]
        warm_up_ms: u64,
        #[arg(long)]
        measure_ms: u64,
    },
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Run(plan) => plan.run(),
        Command::Proxy(proxy) => proxy.run(),
        Command::Upstream { listen, name } => upstream::run(listen, &name),
        Command::Load { target, tls, connections, pid, warm_up_ms, measure_ms } => {
            let load = load::Load { target, tls, connections, pid, warm_up_ms, measure_ms };
            println!("{}", serde_json::to_string(&load.run()?)?);
            Ok(())
        }
    }
}
