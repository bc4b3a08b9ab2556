//! `sluice-proxy`: the proxy of the fleet, the sidecar, and the command that makes one drain.

use std::net::SocketAddr;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use sluice_proxy::{
    process::{self, Settings},
    workers::Role,
};
use tracing_subscriber::EnvFilter;

#[derive(Debug, Parser)]
#[command(version, about = "Sluice's data plane")]
struct Cli {
    #[command(subcommand)]
    command: Command,

    /// What is logged, e.g. `info` or `sluice_proxy=debug`.
    #[arg(long, env = "SLUICE_LOG", default_value = "info", global = true)]
    log: String,

    /// How it is logged: text or json. It goes to standard error.
    #[arg(long, env = "SLUICE_LOG_FORMAT", default_value = "text", global = true)]
    log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve Services for their users.
    Fleet(Settings),
    /// Serve the application in the same Pod for the fleet.
    Sidecar(Settings),
    /// Ask the proxy in the same Pod to begin to drain, and return when it has begun. For `preStop`.
    Drain {
        #[arg(long, hide = true)]
        admin_address: Option<SocketAddr>,
    },
}

/// Gives the memory that was freed back to the system. glibc does so by itself only from the end of its heaps, so that one
/// connection that is left would hold what a thousand before it have freed.
#[allow(unsafe_code)]
fn release_memory() {
    // SAFETY: malloc_trim(3) may be called by any thread at any time, and concerns no memory that is in use.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    unsafe {
        libc::malloc_trim(0);
    }
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let filter = EnvFilter::try_new(&cli.log).with_context(|| format!("SLUICE_LOG is '{}'", cli.log))?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match cli.log_format {
        LogFormat::Text => log.with_ansi(false).init(),
        LogFormat::Json => log.json().init(),
    }
    // The control thread; the data path has threads of its own.
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start a runtime")?;
    let result = match cli.command {
        Command::Fleet(settings) => {
            runtime.block_on(process::run(Role::Fleet, settings, release_memory)).map_err(anyhow::Error::from)
        }
        Command::Sidecar(settings) => {
            runtime.block_on(process::run(Role::Sidecar, settings, release_memory)).map_err(anyhow::Error::from)
        }
        Command::Drain { admin_address } => {
            let admin = admin_address.unwrap_or_else(process::admin_address);
            runtime.block_on(process::ask_to_drain(admin)).map_err(anyhow::Error::from)
        }
    };
    // A thread that is stuck must not hold the end of the process.
    runtime.shutdown_background();
    result
}
