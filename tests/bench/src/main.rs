//! What our data path costs: beside stock Envoy and HAProxy, in the same run, on the same core.
//!
//! The proxy is pinned to core 0; load generator and upstreams share core 1. All proxies of a row are started once and
//! measured in turn, each round in the reverse order of the one before, so that a drift of the machine meets all. Within a
//! round Envoy's CPU time per request is divided by the other's, and HAProxy's by ours; the table gives the ratios' median and
//! the interval in which it is likely to be, and says `unresolved` where a limit lies within. CPU time is what the kernel says
//! that the proxy's threads ran (`/proc/<pid>/task/*/schedstat`), so the ratio stays meaningful when something else had the
//! core for a while; steal and the run queue are printed beside it.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "the table is the product")]

mod certificates;
mod control;
mod envoy;
mod fleet;
mod haproxy;
mod http2;
mod job;
mod load;
mod measure;
mod message;
mod report;
mod rows;
mod sluice;
mod update;
mod upstream;

use std::path::{Path, PathBuf};

use clap::{Parser, Subcommand};
use serde::de::DeserializeOwned;

/// That of the proxy.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measure all rows and print the table.
    Run(measure::Plan),
    /// (Started by `run`, with what is to be done as JSON.) Our data path, until standard input ends.
    Proxy { job: PathBuf },
    /// (Started by `run`.) Answers every request with its owner's name, until standard input ends.
    Upstream { what: PathBuf },
    /// (Started by `run`.) The load of one window; prints one line of JSON.
    Load { task: PathBuf },
    /// (Started by `run`.) One measurement of updates; prints one line of JSON.
    Update { task: PathBuf },
    /// (Started by `update`.) Our proxy, as `sluice-proxy fleet` runs it, until standard input ends.
    Fleet(Box<sluice_proxy::process::Settings>),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Run(plan) => plan.run(),
        Command::Proxy { job } => sluice::run(&read(&job)?),
        Command::Upstream { what } => read::<upstream::Upstream>(&what)?.run(),
        Command::Load { task } => {
            println!("{}", serde_json::to_string(&read::<load::Task>(&task)?.run()?)?);
            Ok(())
        }
        Command::Update { task } => {
            println!("{}", serde_json::to_string(&read::<update::Task>(&task)?.run()?)?);
            Ok(())
        }
        Command::Fleet(settings) => sluice::fleet(*settings),
    }
}

fn read<T: DeserializeOwned>(file: &Path) -> anyhow::Result<T> {
    Ok(serde_json::from_slice(&std::fs::read(file)?)?)
}
