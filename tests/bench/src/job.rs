//! What a proxy does in a row, whoever it is, and how a child of ours is started.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::Context;
use serde::{Deserialize, Serialize};

pub(crate) const PROXY_CORE: usize = 0;
pub(crate) const LOAD_CORE: usize = 1;
/// Of a service with two revisions: stable and canary.
pub(crate) const WEIGHTS: [u32; 2] = [95, 5];
/// The settings that all proxies share, besides no access log and the metrics that each has by default.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);
pub(crate) const RETRIES: u32 = 2;
/// As the chart has it. Envoy has its default of five minutes.
pub(crate) const STREAM_IDLE_SECONDS: u32 = 3600;
/// As the chart has it (`fleet.limits`): of clients, for each port of a Service. All loads stay below.
pub(crate) const CONNECTIONS: u32 = 4096;
/// The same: open ones, for each revision behind a port.
pub(crate) const REQUESTS: u32 = 2048;
/// Routes of a service where a row asks for many: all but the last match other paths.
const ROUTES: usize = 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Protocol {
    Http1,
    Http2,
    Grpc,
    WebSocket,
    Tcp,
}

impl Protocol {
    pub(crate) fn is_http2(self) -> bool {
        matches!(self, Self::Http2 | Self::Grpc)
    }

    pub(crate) fn alpn(self) -> &'static str {
        if self.is_http2() { "h2" } else { "http/1.1" }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Security {
    Plaintext,
    Mtls,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Role {
    Fleet,
    /// The proxy beside the application: for the proxy before it, it is the upstream.
    Sidecar,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) role: Role,
    /// Of the client.
    pub(crate) protocol: Protocol,
    /// Towards the upstream, where it is HTTP/1.1 whatever the client speaks.
    pub(crate) to_http1: bool,
    pub(crate) downstream: Security,
    pub(crate) upstream: Security,
    pub(crate) services: Vec<Service>,
    /// With the certificates.
    pub(crate) folder: PathBuf,
}

impl Job {
    /// What the upstream is spoken to with.
    pub(crate) fn to_upstream(&self) -> Protocol {
        if self.to_http1 { Protocol::Http1 } else { self.protocol }
    }

    /// Of the routes of a service, in order: the last one takes every request, and those before it none.
    pub(crate) fn prefixes(&self) -> impl Iterator<Item = String> {
        let skipped = if self.services.len() > 1 { 0 } else { ROUTES - 1 };
        many_prefixes().skip(skipped)
    }
}

/// The same where there are many.
pub(crate) fn many_prefixes() -> impl Iterator<Item = String> {
    (0..ROUTES - 1).map(|n| format!("/other/{n}/")).chain(["/".to_owned()])
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Service {
    pub(crate) host: String,
    pub(crate) listen: SocketAddr,
    /// The endpoints of each revision.
    pub(crate) revisions: Vec<Vec<SocketAddr>>,
}

/// A child that is ended with its parent.
pub(crate) struct Running(pub(crate) Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts `program` on one core, with a high priority where that is allowed: others may use the machine.
pub(crate) fn pinned(core: usize, program: &Path) -> Command {
    let mut command = Command::new("nice");
    command.args(["-n", "-10", "taskset", "-c", &core.to_string()]).arg(program);
    command.stdin(Stdio::piped()).stderr(Stdio::inherit());
    command
}

/// This program as `role`, told by a file what to do.
pub(crate) fn child(core: usize, role: &str, folder: &Path, what: &impl Serialize) -> anyhow::Result<Command> {
    let own = std::env::current_exe()?;
    let mut command = pinned(core, &own);
    command.arg(role).arg(told(role, folder, what)?);
    Ok(command)
}

/// The same under callgrind, which counts the instructions that it runs in user space.
pub(crate) fn counted(
    core: usize,
    role: &str,
    folder: &Path,
    what: &impl Serialize,
    counts: &Path,
) -> anyhow::Result<Command> {
    let mut command = counted_program(core, counts)?;
    command.arg(role).arg(told(role, folder, what)?);
    Ok(command)
}

/// This program under callgrind.
pub(crate) fn counted_program(core: usize, counts: &Path) -> anyhow::Result<Command> {
    let mut command = pinned(core, Path::new("valgrind"));
    command.args(["--quiet", "--tool=callgrind"]).arg(format!("--callgrind-out-file={}", counts.display()));
    command.arg(std::env::current_exe()?);
    Ok(command)
}

/// All that callgrind has counted.
pub(crate) fn instructions(counts: &Path) -> anyhow::Result<f64> {
    let text = fs::read_to_string(counts).context("reading callgrind's counts")?;
    let line = text.lines().find_map(|line| line.strip_prefix("totals: ")).context("no totals")?;
    Ok(line.trim().parse()?)
}

fn told(role: &str, folder: &Path, what: &impl Serialize) -> anyhow::Result<PathBuf> {
    let file = folder.join(format!("{role}.json"));
    fs::write(&file, serde_json::to_vec(what)?)?;
    Ok(file)
}

/// Returns when the parent has gone, or wants us to.
pub(crate) async fn until_stdin_ends() {
    let wait = || std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
    let _ = tokio::task::spawn_blocking(wait).await;
}
