//! A closed loop of GET requests over kept connections; every answer is checked.

use std::{
    cell::Cell,
    net::SocketAddr,
    path::PathBuf,
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    time::sleep,
};

use crate::{contestants, upstream};

pub(crate) struct Load {
    pub(crate) target: SocketAddr,
    pub(crate) tls: Option<PathBuf>,
    pub(crate) connections: usize,
    /// The proxy, whose CPU time is read at both ends of the window.
    pub(crate) pid: u32,
    pub(crate) warm_up_ms: u64,
    pub(crate) measure_ms: u64,
}

/// What was seen in the window.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Window {
    pub(crate) requests: u64,
    /// Of these, answered by the upstream with the small weight.
    pub(crate) small_share: f64,
    pub(crate) seconds: f64,
    pub(crate) proxy_cpu_seconds: f64,
    /// Share of all cores' time that the hypervisor took.
    pub(crate) steal: f64,
}

const REQUEST: &[u8] = b"GET /cart/items?id=1 HTTP/1.1\r\nhost: cart.shop\r\nuser-agent: sluice-bench\r\n\
    accept: */*\r\naccept-language: en\r\nx-request-id: 6f1c4a6e-0f3b-4a56-9d3b-2f9f6b1f7a10\r\n\r\n";

#[derive(Default)]
struct Counts {
    big: Cell<u64>,
    small: Cell<u64>,
}

impl Load {
    pub(crate) fn run(&self) -> anyhow::Result<Window> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default())?;
        runtime.block_on(self.measure())
    }

    async fn measure(&self) -> anyhow::Result<Window> {
        let tls = self.tls.as_deref().map(contestants::client_tls).transpose()?;
        let counts = Rc::new(Counts::default());
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..self.connections {
            let stream = TcpStream::connect(self.target).await.context("connecting to the proxy")?;
            stream.set_nodelay(true)?;
            let counts = Rc::clone(&counts);
            match &tls {
                None => tasks.spawn_local(ask(stream, counts)),
                Some((connector, name)) => {
                    let stream = connector.connect(name.clone(), stream).await.context("TLS with the proxy")?;
                    tasks.spawn_local(ask(stream, counts))
                }
            };
        }
        let window = async {
            sleep(Duration::from_millis(self.warm_up_ms)).await;
            let read = || anyhow::Ok((cpu_seconds(self.pid)?, steal()?));
            let (big, small, (cpu, stolen), started) = (counts.big.get(), counts.small.get(), read()?, Instant::now());
            sleep(Duration::from_millis(self.measure_ms)).await;
            let ((cpu_end, stolen_end), seconds) = (read()?, started.elapsed().as_secs_f64());
            let (big, small) = (counts.big.get() - big, counts.small.get() - small);
            ensure!(big + small > 0, "no answer within the window");
            anyhow::Ok(Window {
                requests: big + small,
                small_share: small as f64 / (big + small) as f64,
                seconds,
                proxy_cpu_seconds: cpu_end - cpu,
                steal: (stolen_end.0 - stolen.0) / (stolen_end.1 - stolen.1).max(1.0),
            })
        };
        tokio::select! {
            window = window => window,
            // They only end by an error.
            Some(ended) = tasks.join_next() => match ended? {
                Err(error) => Err(error),
                Ok(never) => match never {},
            },
        }
    }
}

async fn ask<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    counts: Rc<Counts>,
) -> anyhow::Result<std::convert::Infallible> {
    let (big, small) = (upstream::body("a"), upstream::body("b"));
    let mut buffer = vec![0; 8192];
    loop {
        stream.write_all(REQUEST).await?;
        let mut length = 0;
        let head = loop {
            let read = stream.read(&mut buffer[length..]).await?;
            ensure!(read > 0, "the proxy closed a connection");
            length += read;
            if let Some(end) = buffer[..length].windows(4).position(|bytes| bytes == b"\r\n\r\n")
                && length >= end + 4 + upstream::BODY
            {
                break end + 4;
            }
        };
        ensure!(buffer.starts_with(b"HTTP/1.1 200 OK\r\n"), "{}", String::from_utf8_lossy(&buffer[..head]));
        let counter = match &buffer[head..length] {
            body if body == big.as_bytes() => &counts.big,
            body if body == small.as_bytes() => &counts.small,
            other => bail!("an answer of neither upstream: {}", String::from_utf8_lossy(other)),
        };
        counter.set(counter.get() + 1);
    }
}

/// What all threads of a process ran so far (first field of `schedstat`, in nanoseconds).
fn cpu_seconds(pid: u32) -> anyhow::Result<f64> {
    let mut nanoseconds = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).context("reading the proxy's threads")? {
        let Ok(text) = std::fs::read_to_string(task?.path().join("schedstat")) else {
            continue;
        };
        let first = text.split_whitespace().next().context("an empty schedstat")?;
        nanoseconds += first.parse::<u64>()?;
    }
    Ok(nanoseconds as f64 / 1e9)
}

/// Stolen ticks and all ticks of all cores (proc(5), `/proc/stat`).
fn steal() -> anyhow::Result<(f64, f64)> {
    let text = std::fs::read_to_string("/proc/stat")?;
    let line = text.lines().next().context("an empty /proc/stat")?;
    let ticks = line.split_whitespace().skip(1).take(8).map(str::parse).collect::<Result<Vec<f64>, _>>()?;
    Ok((ticks.get(7).copied().unwrap_or_default(), ticks.iter().sum()))
}
