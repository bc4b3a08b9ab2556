//! A small application to release: HTTP, gRPC and WebSocket on one port. Nothing in it knows of Sluice. How it behaves is
//! said by its environment, so that a good, an erroneous and a slow version differ in their Deployment alone.
#![forbid(unsafe_code)]

use std::{
    collections::hash_map::RandomState,
    hash::{BuildHasher, Hasher},
    net::SocketAddr,
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    body::Bytes,
    extract::{
        State, WebSocketUpgrade,
        ws::{Message, WebSocket},
    },
    http::{Method, StatusCode},
    response::{IntoResponse, Response},
    routing::{any, get},
};
use clap::Parser;
use futures::{Stream, StreamExt};
use sluice_hello::v1::{GreetReply, GreetRequest, WatchRequest, hello_server};
use tokio::signal::unix::{SignalKind, signal};

/// How long the process stays after its last connection was closed.
const LINGER: Duration = Duration::from_secs(1);

#[derive(Clone, Debug, Parser)]
struct Behaviour {
    /// Said in every answer, in the header `x-version` too.
    #[arg(long, env = "VERSION", default_value = "v1")]
    version: String,
    /// Share of requests that are answered with 500 (gRPC: INTERNAL), 0 to 1.
    #[arg(long, env = "ERROR_RATE", default_value_t = 0.0)]
    error_rate: f64,
    /// Milliseconds that each answer takes longer.
    #[arg(long, env = "LATENCY_MS", default_value_t = 0)]
    latency_ms: u64,
    /// Never becomes ready.
    #[arg(long, env = "NEVER_READY", default_value_t = false, action = clap::ArgAction::Set)]
    never_ready: bool,
    /// Exits with an error so many milliseconds after the start.
    #[arg(long, env = "CRASH_AFTER_MS")]
    crash_after_ms: Option<u64>,
    /// Exits on SIGTERM without finishing its requests, as many applications do.
    #[arg(long, env = "EXIT_AT_ONCE", default_value_t = false, action = clap::ArgAction::Set)]
    exit_at_once: bool,
    /// File whose content is part of each answer: a mounted ConfigMap.
    #[arg(long, env = "GREETING_FILE")]
    greeting_file: Option<PathBuf>,
    #[arg(long, env = "LISTEN", default_value = "0.0.0.0:8080")]
    listen: SocketAddr,
}

impl Behaviour {
    fn fails(&self) -> bool {
        // A fresh RandomState is seeded at random; no more is needed here than a coin.
        let coin = RandomState::new().build_hasher().finish();
        #[allow(clippy::cast_precision_loss)]
        let coin = coin as f64 / u64::MAX as f64;
        coin < self.error_rate
    }

    async fn delay(&self) {
        if self.latency_ms > 0 {
            tokio::time::sleep(Duration::from_millis(self.latency_ms)).await;
        }
    }

    fn greeting(&self) -> String {
        let text = self.greeting_file.as_ref().and_then(|file| std::fs::read_to_string(file).ok());
        text.map_or_else(|| "hello".to_owned(), |text| text.trim().to_owned())
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let behaviour = Arc::new(Behaviour::parse());
    if let Some(millis) = behaviour.crash_after_ms {
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(millis)).await;
            eprintln!("crashing, as CRASH_AFTER_MS says");
            std::process::exit(1);
        });
    }
    let grpc = tonic::service::Routes::new(hello_server::HelloServer::new(Grpc(behaviour.clone()))).into_axum_router();
    let app = Router::new()
        .route("/healthz", get(health))
        .route("/ws", any(websocket))
        .fallback(answer)
        .with_state(behaviour.clone());
    let app = app.merge(grpc.reset_fallback());
    let listener = tokio::net::TcpListener::bind(behaviour.listen).await?;
    let mut term = signal(SignalKind::terminate())?;
    let exit_at_once = behaviour.exit_at_once;
    axum::serve(listener, app)
        .with_graceful_shutdown(async move {
            term.recv().await;
            if exit_at_once {
                std::process::exit(0);
            }
        })
        .await?;
    // Clients answer our last FINs. An address that is gone by then leaves entries in the node's connection tracking, and
    // a later connection with the same source port would be sent there.
    tokio::time::sleep(LINGER).await;
    Ok(())
}

async fn health(State(behaviour): State<Arc<Behaviour>>) -> StatusCode {
    if behaviour.never_ready { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK }
}

async fn answer(State(behaviour): State<Arc<Behaviour>>, method: Method, body: Bytes) -> Response {
    behaviour.delay().await;
    let status = if behaviour.fails() { StatusCode::INTERNAL_SERVER_ERROR } else { StatusCode::OK };
    let headers = [("x-version", behaviour.version.clone())];
    if method == Method::POST {
        return (status, headers, body).into_response();
    }
    let text = serde_json::json!({"greeting": behaviour.greeting(), "version": behaviour.version});
    (status, headers, format!("{text}\n")).into_response()
}

async fn websocket(State(behaviour): State<Arc<Behaviour>>, upgrade: WebSocketUpgrade) -> Response {
    upgrade.on_upgrade(|socket| echo(socket, behaviour))
}

/// Sends every text back with the version before it.
async fn echo(mut socket: WebSocket, behaviour: Arc<Behaviour>) {
    while let Some(Ok(message)) = socket.recv().await {
        let Message::Text(text) = message else { continue };
        let reply = format!("{} {text}", behaviour.version);
        if socket.send(Message::Text(reply.into())).await.is_err() {
            return;
        }
    }
}

struct Grpc(Arc<Behaviour>);

impl Grpc {
    fn reply(&self, name: &str) -> GreetReply {
        GreetReply { greeting: format!("{} {name}", self.0.greeting()), version: self.0.version.clone() }
    }
}

#[tonic::async_trait]
impl hello_server::Hello for Grpc {
    async fn greet(&self, request: tonic::Request<GreetRequest>) -> Result<tonic::Response<GreetReply>, tonic::Status> {
        self.0.delay().await;
        if self.0.fails() {
            let mut status = tonic::Status::internal("failing, as ERROR_RATE says");
            if let Ok(version) = self.0.version.parse() {
                status.metadata_mut().insert("x-version", version);
            }
            return Err(status);
        }
        Ok(tonic::Response::new(self.reply(&request.into_inner().name)))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<GreetReply, tonic::Status>> + Send>>;

    async fn watch(
        &self,
        request: tonic::Request<WatchRequest>,
    ) -> Result<tonic::Response<Self::WatchStream>, tonic::Status> {
        let WatchRequest { count, interval_ms } = request.into_inner();
        let reply = self.reply("");
        let interval = tokio::time::interval(Duration::from_millis(u64::from(interval_ms.max(1))));
        let replies = tokio_stream::wrappers::IntervalStream::new(interval).map(move |_| Ok(reply.clone()));
        let count = if count == 0 { usize::MAX } else { count as usize };
        Ok(tonic::Response::new(Box::pin(replies.take(count))))
    }
}
