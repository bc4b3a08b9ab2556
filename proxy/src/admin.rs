//! What the kubelet, Prometheus and people ask this proxy: `/healthz/*` and `/metrics` on a port of the Pod, the rest on
//! localhost.
//!
//! It runs on the control thread, so it answers when the workers do not; liveness asks each of them for a sign of life.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::Full;
use hyper::{body::Incoming, service::service_fn};
use tokio::{net::TcpListener, sync::watch};

use crate::{
    ads::State,
    identity::Certificate,
    metrics::Metrics,
    overload::Overload,
    workers::{Role, Workers},
};

/// How long a worker may take to answer before it counts as stuck.
const PING: Duration = Duration::from_secs(3);

/// What the admin server reports on and acts on.
#[derive(Debug)]
pub struct Admin {
    pub role: Role,
    pub workers: Arc<Workers>,
    pub metrics: Arc<Metrics>,
    pub overload: Overload,
    pub ads: Arc<State>,
    pub certificate: watch::Receiver<Option<Arc<Certificate>>>,
    /// True once this proxy is on its way out.
    pub draining: watch::Sender<bool>,
}

/// Which questions a port answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Port {
    /// `/healthz/startup`, `/healthz/ready`, `/healthz/live`, `/metrics`: for the cluster.
    Health,
    /// `/config_dump`, `/ready`, `POST /drain`: for who is in the Pod.
    Admin,
}

impl Port {
    /// Of a connection.
    fn life(self) -> Duration {
        match self {
            // Twice what Prometheus waits by default.
            Self::Health => Duration::from_secs(20),
            // `/config_dump` of a large fleet on its way to a person.
            Self::Admin => Duration::from_secs(120),
        }
    }
}

impl Admin {
    /// Serves one port for ever.
    pub async fn serve(self: Arc<Self>, listener: TcpListener, port: Port) -> Infallible {
        let service = service_fn(move |request: Request<Incoming>| {
            let admin = Arc::clone(&self);
            async move { Ok::<_, Infallible>(admin.answer(port, request.method(), request.uri().path()).await) }
        });
        sluice_health::serve(listener, port.life(), service).await
    }

    async fn answer(&self, port: Port, method: &Method, path: &str) -> Response<Full<Bytes>> {
        match (port, method, path) {
            // The workers are started before this server is.
            (Port::Health, &Method::GET, "/healthz/startup") => text(StatusCode::OK, "up"),
            (Port::Health, &Method::GET, "/healthz/ready") | (Port::Admin, &Method::GET, "/ready") => {
                match self.not_ready() {
                    None => text(StatusCode::OK, "ready"),
                    Some(reason) => text(StatusCode::SERVICE_UNAVAILABLE, reason),
                }
            }
            (Port::Health, &Method::GET, "/healthz/live") => match self.workers.ping(PING).await {
                Ok(()) => text(StatusCode::OK, "alive"),
                Err(error) => {
                    tracing::error!(%error, "not alive");
                    text(StatusCode::SERVICE_UNAVAILABLE, error.to_string())
                }
            },
            (Port::Health, &Method::GET, "/metrics") => {
                response(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", self.metrics())
            }
            (Port::Admin, &Method::GET, "/config_dump") => {
                response(StatusCode::OK, "application/json", format!("{:#}\n", self.ads.dump()))
            }
            (Port::Admin, &Method::POST, "/drain") => {
                self.drain().await;
                text(StatusCode::OK, "draining")
            }
            (Port::Health, _, "/healthz/startup" | "/healthz/ready" | "/healthz/live" | "/metrics")
            | (Port::Admin, _, "/ready" | "/config_dump" | "/drain") => {
                text(StatusCode::METHOD_NOT_ALLOWED, "GET for all but POST /drain")
            }
            (Port::Health | Port::Admin, _, _) => text(StatusCode::NOT_FOUND, "no such page"),
        }
    }

    /// Why no traffic should come here; `None` if it should.
    #[must_use]
    pub fn not_ready(&self) -> Option<&'static str> {
        let valid = |held: &Arc<Certificate>| held.valid_at(SystemTime::now());
        if *self.draining.borrow() {
            Some("draining")
        } else if !self.certificate.borrow().as_ref().is_some_and(valid) {
            Some("no valid certificate; see the log for what the controller answered")
        } else if !self.ads.configured() {
            Some("the first configuration is not complete; see /config_dump on the admin port")
        } else {
            None
        }
    }

    /// Begins to drain: not ready from now on. A sidecar asks its connections to go elsewhere at once, and serves
    /// whatever comes until it is told to end, which is when its application has ended (KEP-753). A fleet proxy goes on
    /// as it is until it is told to end, since the cluster does not know yet.
    pub async fn drain(&self) {
        if self.draining.send_replace(true) {
            return;
        }
        tracing::info!("draining: not ready any more");
        match self.role {
            Role::Fleet => {}
            Role::Sidecar => {
                if let Err(error) = self.workers.announce_drain().await {
                    tracing::error!(%error, "connections cannot be asked to end");
                }
            }
        }
    }

    fn metrics(&self) -> String {
        let mut text = self.metrics.render();
        self.overload.render(&mut text);
        self.ads.render(&mut text);
        if let Some(certificate) = self.certificate.borrow().as_ref() {
            text.push_str(&certificate_series(certificate.received, certificate.not_after));
        }
        text
    }
}

/// The series about a certificate, in the Prometheus text format.
#[must_use]
pub fn certificate_series(received: SystemTime, not_after: SystemTime) -> String {
    let expires = not_after.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let lifetime = not_after.duration_since(received).unwrap_or_default().as_secs();
    format!(
        "# HELP sluice_certificate_expires_timestamp_seconds When this proxy's certificate ends.\n\
         # TYPE sluice_certificate_expires_timestamp_seconds gauge\n\
         sluice_certificate_expires_timestamp_seconds {expires}\n\
         # HELP sluice_certificate_lifetime_seconds How long this proxy's certificate was still valid when it came.\n\
         # TYPE sluice_certificate_lifetime_seconds gauge\n\
         sluice_certificate_lifetime_seconds {lifetime}\n"
    )
}

/// A listening socket for these ports.
///
/// # Errors
/// When the address is taken or not ours.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::from_std(sluice_health::listen(address, 128)?)
}

fn text(status: StatusCode, text: impl Into<String>) -> Response<Full<Bytes>> {
    response(status, "text/plain; charset=utf-8", text.into() + "\n")
}

fn response(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static(kind));
    response
}
