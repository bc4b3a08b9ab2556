//! Open-loop load on a Service from inside the cluster: half of the requests on kept connections, half on a new connection
//! each, half of either a GET and half a POST; beside them, if asked, gRPC calls, a gRPC stream and a WebSocket. Prints
//! [`Bucket`]s as JSON lines.
//!
//! It sends again what HTTP clients do, and nothing else: what has not left it because its kept connection was closed by then, and a
//! GET whose kept connection ended instead of an answer (RFC 9110, 9.2.2). A gRPC call that has not left the client is sent
//! again, as gRPC clients do.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeMap,
    error::Error,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::Context;
use clap::Parser;
use futures::{SinkExt, StreamExt};
use http_body_util::{BodyExt, Full};
use hyper::{
    Method, Request,
    client::conn::http1,
    header::{HeaderName, HeaderValue},
};
use hyper_util::rt::TokioIo;
use sluice_hello::v1::{GreetRequest, WatchRequest, hello_client::HelloClient};
use sluice_load::{BUCKET_MS, Bucket, CUT, RESENT, STREAM, WEBSOCKET};
use tokio::{
    net::TcpStream,
    time::{Interval, MissedTickBehavior},
};
use tonic::transport::{Channel, Endpoint};

#[derive(Clone, Parser)]
struct Options {
    /// `host:port` of the Service.
    #[arg(long)]
    target: String,
    /// HTTP requests per second.
    #[arg(long, default_value_t = 300)]
    rate: u32,
    /// `name: value` of a header of HTTP requests; may be said several times.
    #[arg(long = "header", value_parser = header)]
    headers: Vec<(HeaderName, HeaderValue)>,
    /// Kept connections.
    #[arg(long, default_value_t = 16)]
    connections: usize,
    /// gRPC calls per second on one connection, beside a stream; 0 for none.
    #[arg(long, default_value_t = 0)]
    grpc_rate: u32,
    /// WebSocket messages per second; 0 for none.
    #[arg(long, default_value_t = 0)]
    ws_rate: u32,
    /// Messages of a gRPC stream, ten a second, and of a WebSocket; another one begins when it has ended.
    #[arg(long, default_value_t = 50)]
    messages: u32,
    /// Longer is slow.
    #[arg(long, default_value_t = 500)]
    slow_ms: u64,
    /// Longest wait for an answer.
    #[arg(long, default_value_t = 10)]
    timeout_s: u64,
    /// End after so many seconds.
    #[arg(long, default_value_t = 1800)]
    seconds: u64,
}

fn header(text: &str) -> anyhow::Result<(HeaderName, HeaderValue)> {
    let (name, value) = text.split_once(':').context("say NAME: VALUE")?;
    Ok((name.trim().parse()?, value.trim().parse()?))
}

#[derive(Clone, Default)]
struct Outcome {
    version: String,
    status: u16,
    error: String,
}

#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<BTreeMap<Key, Bucket>>>);

/// Time, kind, version, status, error.
type Key = (u64, &'static str, String, u16, String);

impl Recorder {
    fn record(&self, kind: &'static str, started: Instant, slow_ms: u64, outcome: Outcome) {
        let now = unix_ms();
        let took = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let Outcome { version, status, error } = outcome;
        let key = (now / BUCKET_MS, kind, version.clone(), status, error.clone());
        let mut buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bucket = buckets.entry(key).or_insert_with(|| Bucket {
            first_ms: now,
            last_ms: now,
            kind: kind.to_owned(),
            version,
            status,
            error,
            count: 0,
            slow: 0,
            max_ms: 0,
        });
        bucket.last_ms = now;
        bucket.count += 1;
        bucket.slow += u64::from(took > slow_ms);
        bucket.max_ms = bucket.max_ms.max(took);
    }

    /// Prints what ended before the present bucket.
    #[allow(clippy::print_stdout)]
    fn flush(&self, all: bool) {
        let mut buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let present = (unix_ms() / BUCKET_MS, "", String::new(), 0, String::new());
        let open = if all { BTreeMap::new() } else { buckets.split_off(&present) };
        for bucket in std::mem::replace(&mut *buckets, open).into_values() {
            println!("{}", serde_json::to_string(&bucket).unwrap_or_default());
        }
    }
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[tokio::main(flavor = "multi_thread", worker_threads = 1)]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let recorder = Recorder::default();
    let mut tasks = tokio::task::JoinSet::new();
    let end = Instant::now() + Duration::from_secs(options.seconds);
    if options.rate > 0 {
        tasks.spawn(http(options.clone(), recorder.clone()));
    }
    if options.grpc_rate > 0 {
        tasks.spawn(grpc_calls(options.clone(), recorder.clone()));
        tasks.spawn(grpc_stream(options.clone(), recorder.clone()));
    }
    if options.ws_rate > 0 {
        tasks.spawn(websocket(options.clone(), recorder.clone()));
    }
    let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let mut tick = tokio::time::interval(Duration::from_millis(BUCKET_MS));
    while Instant::now() < end {
        tokio::select! {
            _ = tick.tick() => recorder.flush(false),
            _ = term.recv() => break,
        }
    }
    tasks.shutdown().await;
    recorder.flush(true);
    Ok(())
}

/// The times of requests. A machine that stood still does not make up for it: a burst would be counted as what a release did.
fn ticks(per_second: u32) -> Interval {
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / per_second);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    ticks
}

type Sender = http1::SendRequest<Full<bytes::Bytes>>;

/// For gRPC, whose calls wait for their one connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// What a POST sends, and the application sends back.
const POSTED: &[u8] = &[b'x'; 256];

/// Sends each request at its time, whether or not earlier ones were answered.
async fn http(options: Options, recorder: Recorder) {
    let pool: Arc<Mutex<Vec<Sender>>> = Arc::default();
    let mut tick = ticks(options.rate);
    let mut flights = tokio::task::JoinSet::new();
    for count in 0_u64.. {
        tick.tick().await;
        while flights.try_join_next().is_some() {}
        let (options, recorder, pool) = (options.clone(), recorder.clone(), pool.clone());
        let kept = count % 2 == 0;
        let method = if count % 4 < 2 { Method::GET } else { Method::POST };
        flights.spawn(async move {
            let started = Instant::now();
            let pool = kept.then_some(pool);
            let exchange = exchange(&options, &recorder, pool, &method);
            let mut kind = if kept { "kept" } else { "new" };
            let outcome = match tokio::time::timeout(Duration::from_secs(options.timeout_s), exchange).await {
                Ok(Ok(outcome)) => outcome,
                Ok(Err(error)) if error.is::<Cut>() => {
                    kind = CUT;
                    Outcome::default()
                }
                Ok(Err(error)) => Outcome { error: format!("{method}: {error:#}"), ..Outcome::default() },
                Err(_) => Outcome { error: format!("{method}: timed out"), ..Outcome::default() },
            };
            recorder.record(kind, started, options.slow_ms, outcome);
        });
    }
}

/// See [`CUT`].
#[derive(Debug)]
struct Cut;

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the kept connection was closed instead of an answer")
    }
}

async fn exchange(
    options: &Options,
    recorder: &Recorder,
    pool: Option<Arc<Mutex<Vec<Sender>>>>,
    method: &Method,
) -> anyhow::Result<Outcome> {
    let started = Instant::now();
    let take = |pool: &Arc<Mutex<Vec<Sender>>>| pool.lock().unwrap_or_else(PoisonError::into_inner).pop();
    loop {
        let reused = loop {
            match pool.as_ref().and_then(take) {
                Some(sender) if sender.is_closed() => {}
                other => break other,
            }
        };
        let was_reused = reused.is_some();
        let mut sender = match reused {
            Some(sender) => sender,
            None => connect(&options.target).await?,
        };
        let body = if *method == Method::POST { POSTED } else { &[] };
        let mut request = Request::builder()
            .method(method)
            .uri("/")
            .header("host", &options.target)
            .header("user-agent", "sluice-load");
        if pool.is_none() {
            request = request.header("connection", "close");
        }
        for (name, value) in &options.headers {
            request = request.header(name, value);
        }
        let sent = async {
            sender.ready().await?;
            sender.send_request(request.body(Full::from(body)).unwrap_or_default()).await
        };
        let response = match sent.await {
            Ok(response) => response,
            // The server closed an idle connection. What was not sent is sent now; what was, and may have been processed, only where
            // that does no harm.
            Err(error)
                if was_reused
                    && (error.is_canceled()
                        || error.is_closed()
                        || (error.is_incomplete_message() && *method == Method::GET)) =>
            {
                recorder.record(RESENT, started, options.slow_ms, Outcome::default());
                continue;
            }
            Err(error) if was_reused && error.is_incomplete_message() => return Err(error).context(Cut),
            Err(error) => return Err(error).context("no answer"),
        };
        let header = |name: &str| {
            response.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
        };
        let outcome = Outcome {
            version: header("x-version"),
            status: response.status().as_u16(),
            error: header("x-sluice-response-flag"),
        };
        let answer = response.into_body().collect().await.context("answer broken off")?.to_bytes();
        anyhow::ensure!(
            *method == Method::GET || outcome.version.is_empty() || answer == POSTED,
            "sent {} bytes and got {} others back",
            POSTED.len(),
            answer.len()
        );
        if let Some(pool) = pool {
            let mut pool = pool.lock().unwrap_or_else(PoisonError::into_inner);
            if pool.len() < options.connections {
                pool.push(sender);
            }
        }
        return Ok(outcome);
    }
}

async fn connect(target: &str) -> anyhow::Result<Sender> {
    let stream = TcpStream::connect(target).await.context("cannot connect")?;
    stream.set_nodelay(true)?;
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

/// Whether a call failed without having been looked at: its connection ended gracefully while the call waited for it, or was sent and
/// the server said that it had not come to it (RFC 9113, 8.7). gRPC clients repeat such calls by themselves (gRPC proposal A6,
/// "transparent retries"); tonic leaves that to its caller.
fn never_processed(status: &tonic::Status) -> bool {
    std::iter::successors(status.source(), |error| (*error).source()).any(|error| {
        // h2 gives a stream the GOAWAY as its error only if it is above the last one that was processed.
        error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_canceled)
            || error.downcast_ref::<h2::Error>().is_some_and(|error| {
                error.is_remote() && error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR)
            })
    })
}

/// A client whose connection is made when it is needed. One that cannot be made does not hold up the next for long.
fn grpc_client(options: &Options) -> Option<HelloClient<Channel>> {
    let endpoint = Endpoint::new(format!("http://{}", options.target)).ok()?;
    Some(HelloClient::new(endpoint.connect_timeout(CONNECT_TIMEOUT).connect_lazy()))
}

/// Unary calls on one HTTP/2 connection.
async fn grpc_calls(options: Options, recorder: Recorder) {
    let Some(client) = grpc_client(&options) else { return };
    let mut tick = ticks(options.grpc_rate);
    let mut flights = tokio::task::JoinSet::new();
    loop {
        tick.tick().await;
        while flights.try_join_next().is_some() {}
        let (mut client, recorder, options) = (client.clone(), recorder.clone(), options.clone());
        flights.spawn(async move {
            let started = Instant::now();
            let reply = loop {
                match in_time(&options, client.greet(GreetRequest { name: "load".to_owned() })).await {
                    Err(status) if never_processed(&status) && started.elapsed().as_secs() < options.timeout_s => {}
                    reply => break reply,
                }
            };
            let outcome = match reply {
                Ok(reply) => Outcome { version: reply.into_inner().version, status: 200, error: String::new() },
                Err(status) => {
                    let version = status.metadata().get("x-version").and_then(|value| value.to_str().ok());
                    Outcome {
                        version: version.unwrap_or_default().to_owned(),
                        status: 500,
                        error: format!("{:?}: {}", status.code(), status.message()),
                    }
                }
            };
            recorder.record("grpc", started, options.slow_ms, outcome);
        });
    }
}

/// One server stream after another; each message counts. A stream that ends before its time is a failure.
async fn grpc_stream(options: Options, recorder: Recorder) {
    let Some(mut client) = grpc_client(&options) else { return };
    let mut tick = tokio::time::interval(Duration::from_millis(200));
    loop {
        tick.tick().await;
        let result: Result<(), tonic::Status> = async {
            let request = WatchRequest { count: options.messages, interval_ms: 100 };
            let mut stream = in_time(&options, client.watch(request)).await?.into_inner();
            while let Some(reply) = in_time(&options, stream.message()).await? {
                let outcome = Outcome { version: reply.version, status: 200, error: String::new() };
                recorder.record(STREAM, Instant::now(), options.slow_ms, outcome);
            }
            Ok(())
        }
        .await;
        if let Err(status) = result
            && !never_processed(&status)
        {
            let error = format!("{:?}: {}", status.code(), status.message());
            recorder.record(STREAM, Instant::now(), options.slow_ms, Outcome { error, ..Outcome::default() });
        }
    }
}

/// An answer, or the next message of a stream.
async fn in_time<T>(
    options: &Options,
    answer: impl Future<Output = Result<T, tonic::Status>>,
) -> Result<T, tonic::Status> {
    let answer = tokio::time::timeout(Duration::from_secs(options.timeout_s), answer).await;
    answer.unwrap_or_else(|_| Err(tonic::Status::deadline_exceeded("timed out")))
}

/// One WebSocket after another.
async fn websocket(options: Options, recorder: Recorder) {
    let url = format!("ws://{}/ws", options.target);
    let timeout = Duration::from_secs(options.timeout_s);
    let mut tick = ticks(options.ws_rate);
    loop {
        tick.tick().await;
        let result: anyhow::Result<()> = async {
            let upgrade = tokio::time::timeout(timeout, tokio_tungstenite::connect_async(&url));
            let (mut socket, _) = upgrade.await.context("no upgrade in time")?.context("no upgrade")?;
            for number in 0..options.messages {
                tick.tick().await;
                let started = Instant::now();
                socket.send(number.to_string().into()).await?;
                let echo = tokio::time::timeout(timeout, socket.next()).await.context("no echo in time")?;
                let reply = echo.context("closed")??.into_text()?;
                let (version, echo) = reply.split_once(' ').context("unexpected reply")?;
                anyhow::ensure!(echo == number.to_string(), "echoed {echo}, sent {number}");
                let outcome = Outcome { version: version.to_owned(), status: 200, error: String::new() };
                recorder.record(WEBSOCKET, started, options.slow_ms, outcome);
            }
            socket.close(None).await?;
            Ok(())
        }
        .await;
        if let Err(error) = result {
            let outcome = Outcome { error: format!("{error:#}"), ..Outcome::default() };
            recorder.record(WEBSOCKET, Instant::now(), options.slow_ms, outcome);
        }
    }
}
