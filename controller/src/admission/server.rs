//! The webhook: HTTPS with the controller's own certificate, `AdmissionReview` v1.

use std::{
    io,
    net::SocketAddr,
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, to_bytes},
    extract::{Request, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::post,
};
use hyper::{
    server::conn::http1,
    service::{Service as _, service_fn},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use kube::{
    api::DynamicObject,
    core::admission::{AdmissionRequest, AdmissionResponse, AdmissionReview},
};
use rustls::{ServerConfig, crypto::CryptoProvider, server::NoServerSessionStorage};
use sluice_health::Places;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Notify, Semaphore},
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use super::{decision, objects::PATH};
use crate::{cache::Cache, identity::OwnCertificate};

const HANDSHAKE: Duration = Duration::from_secs(5);
/// From the first byte of a request to its answer: no API server waits longer than the configured 2 s.
const REQUEST: Duration = Duration::from_secs(3);
/// Of a connection without a request. Longer than the 90 s for which an API server keeps one, so that it is the one to close.
const IDLE: Duration = Duration::from_secs(120);
/// Whoever reaches the port may open more, and no API server is to wait behind them: the one that began, or had its last request, the
/// longest ago gives way.
const MAX_CONNECTIONS: usize = 256;
/// That wait to be accepted.
const BACKLOG: i32 = 1024;
/// An object has at most 3 MiB in a request to the API server, and a review holds the old one too.
const MAX_BODY: usize = 8 * 1024 * 1024;
/// Bodies in memory at once; further ones wait.
const MAX_BODIES: usize = 16;
/// Asked to stop, it still answers for so long: kube-proxy does not know yet that this replica goes.
const LAME_DUCK: Duration = Duration::from_secs(5);

/// The listening port.
pub struct Webhook {
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    state: Answering,
}

/// Why the webhook is not there.
#[derive(Debug, thiserror::Error)]
pub enum WebhookError {
    #[error("cannot listen on {address} for the API server: {source}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("cannot set up TLS for the webhook: {0}")]
    Tls(#[from] rustls::Error),
}

#[derive(Clone)]
struct Answering {
    cache: Cache,
    bodies: Arc<Semaphore>,
}

impl Webhook {
    /// Listens. `cache` must be warm: a replica that knows no Canary yet would let everything pass.
    ///
    /// # Errors
    /// If the port is taken, or TLS cannot be set up.
    pub async fn bind(
        address: SocketAddr,
        own: Arc<OwnCertificate>,
        provider: Arc<CryptoProvider>,
        cache: Cache,
    ) -> Result<Self, WebhookError> {
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            // An API server shows no certificate, unless its administrator configures one for us.
            .with_no_client_auth()
            .with_cert_resolver(own);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        let listener = sluice_health::listen(address, BACKLOG).and_then(TcpListener::from_std);
        let listener = listener.map_err(|source| WebhookError::Listen { address, source })?;
        let state = Answering { cache, bodies: Arc::new(Semaphore::new(MAX_BODIES)) };
        Ok(Self { listener, tls: Arc::new(config), state })
    }

    /// # Errors
    /// If the socket cannot say.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until 5 s after `stop`.
    pub async fn serve(self, stop: CancellationToken) {
        let acceptor = TlsAcceptor::from(self.tls);
        let app = Router::new().route(PATH, post(review)).with_state(self.state);
        let places = Arc::new(Mutex::new(Places::new(MAX_CONNECTIONS)));
        let mut connections = JoinSet::new();
        let closing = CancellationToken::new();
        let mut end = pin!(async {
            stop.cancelled().await;
            tokio::time::sleep(LAME_DUCK).await;
        });
        loop {
            while connections.try_join_next().is_some() {}
            let accepted = tokio::select! {
                () = &mut end => break,
                accepted = self.listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, address)) => {
                    let place = Place { all: Arc::clone(&places), gives_way: Arc::default() };
                    place.take();
                    connections.spawn(connection(
                        acceptor.clone(),
                        stream,
                        address,
                        app.clone(),
                        place,
                        closing.clone(),
                    ));
                    // See `sluice_health::serve`.
                    tokio::task::yield_now().await;
                }
                Err(error) => {
                    // Most often a lack of file descriptors, which passes.
                    tracing::warn!("cannot accept a connection from the API server: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
        closing.cancel();
        let _ = timeout(REQUEST, async { while connections.join_next().await.is_some() {} }).await;
    }
}

/// What a connection has of [`MAX_CONNECTIONS`].
#[derive(Clone)]
struct Place {
    all: Arc<Mutex<Places>>,
    gives_way: Arc<Notify>,
}

impl Place {
    /// Begins, or has a request.
    fn take(&self) {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).give(&self.gives_way);
    }
}

async fn connection(
    acceptor: TlsAcceptor,
    stream: TcpStream,
    address: SocketAddr,
    app: Router,
    place: Place,
    closing: CancellationToken,
) {
    let gives_way = Arc::clone(&place.gives_way);
    tokio::select! {
        () = exchange(acceptor, stream, address, app, place, closing) => {}
        () = gives_way.notified() => tracing::info!(%address, "a connection to the webhook gave way to a newer one"),
    }
}

/// All of a connection.
async fn exchange(
    acceptor: TlsAcceptor,
    stream: TcpStream,
    address: SocketAddr,
    app: Router,
    place: Place,
    closing: CancellationToken,
) {
    let _ = stream.set_nodelay(true);
    let stream = match timeout(HANDSHAKE, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::info!(%address, "refused a connection to the webhook: TLS: {error}"),
        Err(_) => return tracing::info!(%address, "refused a connection to the webhook: no TLS handshake within 5 s"),
    };
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(IDLE);
    let app = TowerToHyperService::new(app);
    let reviewing = service_fn(move |request| {
        place.take();
        app.call(request)
    });
    let mut serving = pin!(builder.serve_connection(TokioIo::new(stream), reviewing));
    let served = tokio::select! {
        served = &mut serving => served,
        () = closing.cancelled() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(%address, "a connection to the webhook ended: {error}");
    }
}

async fn review(State(state): State<Answering>, request: Request) -> Response {
    let answer = async {
        // Fails only when the semaphore is closed, which nobody does.
        let _permit = state.bodies.acquire().await;
        let body = to_bytes(request.into_body(), MAX_BODY).await.map_err(|error| error.to_string())?;
        let review: AdmissionReview<DynamicObject> =
            serde_json::from_slice(&body).map_err(|error| error.to_string())?;
        let request: AdmissionRequest<DynamicObject> =
            review.try_into().map_err(|_| "it holds no request".to_owned())?;
        answer(&state.cache, &request)
    };
    match timeout(REQUEST, answer).await {
        Ok(Ok(body)) => ([(header::CONTENT_TYPE, "application/json")], Body::from(body)).into_response(),
        Ok(Err(why)) => {
            tracing::warn!("the webhook cannot read a review: {why}");
            (StatusCode::BAD_REQUEST, format!("not an AdmissionReview of admission.k8s.io/v1: {why}\n")).into_response()
        }
        Err(_) => (StatusCode::REQUEST_TIMEOUT, "the review did not come in time\n").into_response(),
    }
}

/// The review with our answer, as JSON.
fn answer(cache: &Cache, request: &AdmissionRequest<DynamicObject>) -> Result<Vec<u8>, String> {
    let canaries = cache.canaries_in(request.namespace.as_deref());
    let patch = decision::changes(request, canaries.iter().map(|canary| &**canary));
    let mut response = AdmissionResponse::from(request);
    if !patch.is_empty() {
        let patch = serde_json::from_value(patch.into()).map_err(|error| error.to_string())?;
        response = response.with_patch(patch).map_err(|error| error.to_string())?;
    }
    serde_json::to_vec(&response.into_review()).map_err(|error| error.to_string())
}
