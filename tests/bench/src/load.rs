//! Asks a proxy, checks every answer, and reads at both ends of the window what it cost the proxy.

use std::{
    cell::Cell,
    io::{Read, Write},
    net::SocketAddr,
    path::PathBuf,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use memchr::memmem;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::sleep,
};
use tokio_rustls::TlsConnector;

use crate::{
    certificates, http2,
    job::{Protocol, Security},
    message::{self, Answers, BoxStream, Check, OWNERS, Sizes},
    update::Updated,
};

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) enum Load {
    /// As fast as the proxy answers: on each of the connections, `at_once` requests are under way (HTTP/1.1: one).
    Saturated { connections: usize, at_once: usize },
    /// The same until so many requests are answered.
    Counted { connections: usize, at_once: usize, requests: u64 },
    /// Requests per second at random times (a Poisson process), whether or not others were answered. HTTP/1.1 in plaintext.
    Open { rate: u32 },
    /// A connection for each request, so many at once.
    Handshakes { at_once: usize },
    /// Connections that had a request each are kept, first so many, then so many.
    Idle { connections: [usize; 2] },
    /// No requests, but a new configuration, and so many small changes of it.
    Updates { small: usize },
}

/// The load of one window.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Task {
    pub(crate) load: Load,
    pub(crate) target: SocketAddr,
    pub(crate) host: String,
    pub(crate) protocol: Protocol,
    pub(crate) security: Security,
    pub(crate) sizes: Sizes,
    /// With the certificates.
    pub(crate) folder: PathBuf,
    /// What is measured; several are added up.
    pub(crate) pids: Vec<u32>,
    pub(crate) warm_up: Duration,
    pub(crate) measure: Duration,
}

/// What was seen in the window.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Window {
    pub(crate) requests: u64,
    /// Of these, answered by the upstream with the small weight.
    pub(crate) small_share: f64,
    pub(crate) seconds: f64,
    pub(crate) proxy_cpu_seconds: f64,
    /// Share of all cores' time that the hypervisor took.
    pub(crate) steal: f64,
    /// At the end.
    pub(crate) rss_kib: f64,
    /// From the time at which a request should have been sent.
    pub(crate) p50_us: Option<f64>,
    pub(crate) kib_per_connection: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) update: Option<Updated>,
}

/// Answers by owner.
type Counts = [Cell<u64>; OWNERS.len()];

/// What is read at both ends of the window.
struct Reading {
    counts: [u64; OWNERS.len()],
    cpu: f64,
    steal: (f64, f64),
    at: Instant,
}

/// What a connection needs to know.
struct Client {
    target: SocketAddr,
    tls: Option<(TlsConnector, rustls::pki_types::ServerName<'static>)>,
    protocol: Protocol,
    http1: Vec<u8>,
    http2: http2::Message,
    answers: Answers,
    counts: Counts,
}

impl Task {
    pub(crate) fn run(&self) -> anyhow::Result<Window> {
        if let Load::Open { rate } = self.load {
            return self.open_loop(rate);
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default())?;
        runtime.block_on(self.closed_loop())
    }

    async fn closed_loop(&self) -> anyhow::Result<Window> {
        let tls = match self.security {
            Security::Plaintext => None,
            Security::Mtls => Some(certificates::connector(&self.folder, self.protocol.alpn())?),
        };
        let client = Rc::new(Client {
            target: self.target,
            tls,
            protocol: self.protocol,
            http1: http1_request(self.protocol, &self.host, self.sizes),
            http2: http2::Message::request(self.protocol, &self.host, self.sizes),
            answers: Answers::new(self.protocol, self.sizes.answer),
            counts: Counts::default(),
        });
        let mut tasks = JoinSet::new();
        match self.load {
            Load::Saturated { connections, at_once } => {
                for _ in 0..connections {
                    let (client, stream) = (Rc::clone(&client), client.connect().await?);
                    tasks.spawn_local(async move { client.ask(stream, at_once, u64::MAX).await.map(drop) });
                }
            }
            Load::Counted { connections, at_once, requests } => {
                let start = self.read([0; OWNERS.len()])?;
                for _ in 0..connections {
                    let (client, stream) = (Rc::clone(&client), client.connect().await?);
                    let limit = requests / connections as u64;
                    tasks.spawn_local(async move { client.ask(stream, at_once, limit).await.map(drop) });
                }
                while let Some(ended) = tasks.join_next().await {
                    ended??;
                }
                return self.window(&start, &self.read(client.counts.each_ref().map(Cell::get))?);
            }
            Load::Handshakes { at_once } => {
                for _ in 0..at_once {
                    let client = Rc::clone(&client);
                    tasks.spawn_local(async move {
                        loop {
                            let mut stream = client.ask(client.connect().await?, 1, 1).await?;
                            stream.shutdown().await?;
                        }
                    });
                }
            }
            Load::Idle { connections } => return self.idle(&client, connections).await,
            Load::Open { .. } => bail!("an open loop needs threads"),
            Load::Updates { .. } => bail!("updates are no requests"),
        }
        let read = || self.read(client.counts.each_ref().map(Cell::get));
        let window = async {
            sleep(self.warm_up).await;
            let start = read()?;
            sleep(self.measure).await;
            self.window(&start, &read()?)
        };
        tokio::select! {
            window = window => window,
            Some(ended) = tasks.join_next() => match ended? {
                Err(error) => Err(error),
                Ok(()) => bail!("a connection ended"),
            },
        }
    }

    async fn idle(&self, client: &Client, connections: [usize; 2]) -> anyhow::Result<Window> {
        let mut kept = Vec::new();
        let mut rss = [0.0; 2];
        let start = self.read([0; OWNERS.len()])?;
        for (rss, connections) in rss.iter_mut().zip(connections) {
            while kept.len() < connections {
                kept.push(client.ask(client.connect().await?, 1, 1).await?);
            }
            sleep(self.warm_up).await;
            *rss = rss_kib(&self.pids)?;
        }
        let mut window = self.window(&start, &self.read(client.counts.each_ref().map(Cell::get))?)?;
        window.kib_per_connection = Some((rss[1] - rss[0]) / (connections[1] - connections[0]) as f64);
        Ok(window)
    }

    /// With blocking threads, because a runtime's timers know milliseconds only.
    #[allow(clippy::disallowed_methods, reason = "no runtime here that a sleep could block")]
    fn open_loop(&self, rate: u32) -> anyhow::Result<Window> {
        const THREADS: u32 = 16;
        ensure!(self.protocol == Protocol::Http1 && self.security == Security::Plaintext, "HTTP/1.1 in plaintext only");
        let request = Arc::new(http1_request(self.protocol, &self.host, self.sizes));
        let answers = Arc::new(Answers::new(self.protocol, self.sizes.answer));
        let (from, until) = (Instant::now() + self.warm_up, Instant::now() + self.warm_up + self.measure);
        let ask = |_| {
            let (request, answers) = (Arc::clone(&request), Arc::clone(&answers));
            let mut stream = std::net::TcpStream::connect(self.target).context("connecting to the proxy")?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            Ok(std::thread::spawn(move || {
                let mut latencies = Vec::new();
                let mut counts = [0; OWNERS.len()];
                let mut buffer = vec![0; 8192];
                let mut at = Instant::now();
                loop {
                    let pause = -(1.0 - fastrand::f64()).ln() * f64::from(THREADS) / f64::from(rate);
                    at += Duration::from_secs_f64(pause);
                    if at > until {
                        return anyhow::Ok((latencies, counts));
                    }
                    std::thread::sleep(at.saturating_duration_since(Instant::now()));
                    stream.write_all(&request)?;
                    let mut length = 0;
                    let owner = loop {
                        let read = stream.read(&mut buffer[length..])?;
                        ensure!(read > 0, "the proxy closed a connection");
                        length += read;
                        if let Some(head) = head(&buffer[..length])?
                            && length >= head + answers.length()
                        {
                            let mut check = Check::default();
                            check.take(&answers, &buffer[head..length])?;
                            break check.owner(&answers)?;
                        }
                    };
                    if at >= from {
                        latencies.push(at.elapsed().as_secs_f64() * 1e6);
                        counts[owner] += 1;
                    }
                }
            }))
        };
        let threads = (0..THREADS).map(ask).collect::<anyhow::Result<Vec<_>>>()?;
        std::thread::sleep(from.saturating_duration_since(Instant::now()));
        let start = self.read([0; OWNERS.len()])?;
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
        let mut end = self.read([0; OWNERS.len()])?;
        let mut latencies = Vec::new();
        for thread in threads {
            let Ok(seen) = thread.join() else { bail!("a thread of the load generator panicked") };
            let (seen, counts) = seen?;
            latencies.extend(seen);
            end.counts.iter_mut().zip(counts).for_each(|(all, of_thread)| *all += of_thread);
        }
        let mut window = self.window(&start, &end)?;
        latencies.sort_by(f64::total_cmp);
        window.p50_us = latencies.get(latencies.len() / 2).copied();
        Ok(window)
    }

    fn read(&self, counts: [u64; OWNERS.len()]) -> anyhow::Result<Reading> {
        Ok(Reading { counts, cpu: cpu_seconds(&self.pids)?, steal: steal()?, at: Instant::now() })
    }

    fn window(&self, start: &Reading, end: &Reading) -> anyhow::Result<Window> {
        let requests = end.counts.iter().sum::<u64>() - start.counts.iter().sum::<u64>();
        ensure!(requests > 0, "no answer within the window");
        Ok(Window {
            requests,
            small_share: (end.counts[1] - start.counts[1]) as f64 / requests as f64,
            seconds: end.at.duration_since(start.at).as_secs_f64(),
            proxy_cpu_seconds: end.cpu - start.cpu,
            steal: (end.steal.0 - start.steal.0) / (end.steal.1 - start.steal.1).max(1.0),
            rss_kib: rss_kib(&self.pids)?,
            ..Window::default()
        })
    }
}

impl Client {
    async fn connect(&self) -> anyhow::Result<BoxStream> {
        let stream = TcpStream::connect(self.target).await.context("connecting to the proxy")?;
        stream.set_nodelay(true)?;
        Ok(match &self.tls {
            None => Box::new(stream),
            Some((tls, name)) => Box::new(tls.connect(name.clone(), stream).await.context("TLS with the proxy")?),
        })
    }

    /// Asks until `limit` requests are answered. The connection comes back.
    async fn ask(&self, mut stream: BoxStream, at_once: usize, limit: u64) -> anyhow::Result<BoxStream> {
        let answered = |owner: usize| self.counts[owner].set(self.counts[owner].get() + 1);
        match self.protocol {
            Protocol::Http2 | Protocol::Grpc => {
                return http2::ask(stream, &self.http2, &self.answers, at_once, limit, answered).await;
            }
            Protocol::Http1 => {
                let mut buffer = vec![0; if limit == 1 { 4096 } else { 64 << 10 }];
                for _ in 0..limit {
                    stream.write_all(&self.http1).await?;
                    stream.flush().await?;
                    answered(http1_answer(&mut stream, &mut buffer, &self.answers).await?);
                }
            }
            Protocol::WebSocket | Protocol::Tcp => {
                let mut buffer = vec![0; self.answers.length().max(4096)];
                if self.protocol == Protocol::WebSocket {
                    stream.write_all(&self.http1).await?;
                    let mut length = 0;
                    while !buffer[..length].ends_with(b"\r\n\r\n") {
                        let read = stream.read(&mut buffer[length..]).await?;
                        ensure!(read > 0, "the proxy closed a connection");
                        length += read;
                    }
                    ensure!(buffer.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&buffer[..length]));
                }
                let message = message::body(self.protocol, OWNERS[0], self.answers.length());
                for _ in 0..limit {
                    stream.write_all(&message).await?;
                    stream.read_exact(&mut buffer[..message.len()]).await?;
                    ensure!(buffer[..message.len()] == message, "not what was sent");
                    answered(0);
                }
            }
        }
        Ok(stream)
    }
}

fn http1_request(protocol: Protocol, host: &str, sizes: Sizes) -> Vec<u8> {
    let method = if sizes.request > 0 && protocol == Protocol::Http1 { "POST" } else { "GET" };
    let mut head = format!(
        "{method} /cart/items?id=1 HTTP/1.1\r\nhost: {host}\r\nuser-agent: sluice-bench\r\n\
         accept: */*\r\naccept-language: en\r\nx-request-id: 6f1c4a6e-0f3b-4a56-9d3b-2f9f6b1f7a10\r\n"
    );
    if protocol == Protocol::WebSocket {
        head.push_str("connection: upgrade\r\nupgrade: websocket\r\n");
        head.push_str("sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n");
        return head.into_bytes();
    }
    if sizes.request > 0 {
        head.push_str(&format!("content-length: {}\r\n", sizes.request));
    }
    head.push_str("\r\n");
    [head.into_bytes(), message::body(protocol, "", sizes.request)].concat()
}

async fn http1_answer(stream: &mut BoxStream, buffer: &mut [u8], answers: &Answers) -> anyhow::Result<usize> {
    let mut length = 0;
    let mut check = Check::default();
    let mut left = answers.length();
    loop {
        let read = stream.read(&mut buffer[length..]).await?;
        ensure!(read > 0, "the proxy closed a connection");
        length += read;
        if let Some(head) = head(&buffer[..length])? {
            check.take(answers, &buffer[head..length])?;
            left -= length - head;
            break;
        }
    }
    while left > 0 {
        let read = stream.read(buffer).await?;
        ensure!(read > 0, "the proxy closed a connection");
        check.take(answers, &buffer[..read])?;
        left -= read;
    }
    check.owner(answers)
}

/// The length of the head, if it is there as a whole.
fn head(bytes: &[u8]) -> anyhow::Result<Option<usize>> {
    let Some(end) = memmem::find(bytes, b"\r\n\r\n") else { return Ok(None) };
    ensure!(bytes.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&bytes[..end]));
    Ok(Some(end + 4))
}

/// What all threads of the processes ran so far (first field of `schedstat`, in nanoseconds).
pub(crate) fn cpu_seconds(pids: &[u32]) -> anyhow::Result<f64> {
    let mut nanoseconds = 0;
    for pid in pids {
        for task in std::fs::read_dir(format!("/proc/{pid}/task")).context("reading the proxy's threads")? {
            let Ok(text) = std::fs::read_to_string(task?.path().join("schedstat")) else {
                continue;
            };
            let first = text.split_whitespace().next().context("an empty schedstat")?;
            nanoseconds += first.parse::<u64>()?;
        }
    }
    Ok(nanoseconds as f64 / 1e9)
}

/// Memory of the processes.
pub(crate) fn rss_kib(pids: &[u32]) -> anyhow::Result<f64> {
    pids.iter().map(|pid| status_kib(*pid, "VmRSS:")).sum()
}

/// A field of memory in `/proc/<pid>/status` (proc_pid_status(5)).
pub(crate) fn status_kib(pid: u32, field: &str) -> anyhow::Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)).with_context(|| format!("no {field}"))?;
    Ok(line.split_whitespace().next().with_context(|| format!("an empty {field}"))?.parse()?)
}

/// Stolen ticks and all ticks of all cores (proc(5), `/proc/stat`).
fn steal() -> anyhow::Result<(f64, f64)> {
    let text = std::fs::read_to_string("/proc/stat")?;
    let line = text.lines().next().context("an empty /proc/stat")?;
    let ticks = line.split_whitespace().skip(1).take(8).map(str::parse).collect::<Result<Vec<f64>, _>>()?;
    Ok((ticks.get(7).copied().unwrap_or_default(), ticks.iter().sum()))
}
