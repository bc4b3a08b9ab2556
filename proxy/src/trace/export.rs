//! The way to the collector: OTLP over gRPC, in plain or in TLS.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use http::uri::{Authority, PathAndQuery, Scheme};
use hyper_util::rt::TokioIo;
use opentelemetry::KeyValue;
use opentelemetry_otlp::{SpanExporter as Otlp, WithTonicConfig};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{SpanData, SpanExporter},
};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Uri};

use super::{MaybeEndpoint, Options};
use crate::{
    metrics::{Metrics, SpanLost},
    tls, worker,
};

/// Where the image has the certificate authorities of the public web.
pub(super) const SYSTEM_ROOTS: &str = "/etc/ssl/certs/ca-certificates.crt";
/// For the way to the collector: name, TCP and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// For one export: the default of `OTEL_EXPORTER_OTLP_TIMEOUT`.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);
/// After so long without a sign of life the collector is asked for one.
const QUIET: Duration = Duration::from_secs(15);
/// After so long without an answer to what was sent it has vanished.
const VANISHED: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error(
        "the certificates in {path} cannot be used for the collector: {reason}; check OTEL_EXPORTER_OTLP_CERTIFICATE"
    )]
    Certificates { path: PathBuf, reason: String },
    #[error("spans cannot be exported: {0}; check the variables OTEL_EXPORTER_OTLP_*")]
    Exporter(String),
}

/// Where a collector is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    https: bool,
    authority: Authority,
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", if self.https { "https" } else { "http" }, self.authority)
    }
}

impl std::str::FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.parse::<Uri>().ok().map(Uri::into_parts).and_then(|parts| {
            let https = match &parts.scheme {
                Some(scheme) if *scheme == Scheme::HTTPS => true,
                Some(scheme) if *scheme == Scheme::HTTP => false,
                Some(_) | None => return None,
            };
            let authority = parts.authority.filter(|authority| !authority.as_str().contains('@'))?;
            let bare = parts.path_and_query.is_none_or(|path| path == "/");
            (bare && !authority.host().is_empty()).then_some(Self { https, authority })
        });
        parsed.ok_or_else(|| {
            "it must be http or https and a host, without a path, for example http://otel-collector.observability:4317; \
             spans are sent by OTLP over gRPC"
                .to_owned()
        })
    }
}

pub(super) fn endpoint(text: &str) -> Result<MaybeEndpoint, String> {
    if text.is_empty() { Ok(None) } else { text.parse().map(Some) }
}

impl Endpoint {
    fn uri(&self, scheme: Scheme) -> Result<Uri, TraceError> {
        let uri = Uri::builder().scheme(scheme).authority(self.authority.clone());
        uri.path_and_query(PathAndQuery::from_static("/"))
            .build()
            .map_err(|error| TraceError::Exporter(error.to_string()))
    }

    /// A channel that connects when there is something to send, and again when it must.
    fn channel(&self, certificate: &Path) -> Result<Channel, TraceError> {
        let scheme = if self.https { Scheme::HTTPS } else { Scheme::HTTP };
        if self.https {
            roots(certificate)?; // Said at once, not with the first span.
        }
        let (endpoint, certificate) = (self.clone(), certificate.to_owned());
        let connector = tower::service_fn(move |_: Uri| {
            let (endpoint, certificate) = (endpoint.clone(), certificate.clone());
            async move {
                let connecting = tokio::time::timeout(CONNECT_TIMEOUT, endpoint.connect(&certificate));
                connecting.await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).map(TokioIo::new)
            }
        });
        // TLS is the connector's affair, so tonic hears of it only as the origin of its requests.
        let channel = tonic::transport::Endpoint::from(self.uri(Scheme::HTTP)?).origin(self.uri(scheme)?);
        Ok(channel.timeout(EXPORT_TIMEOUT).connect_with_connector_lazy(connector))
    }

    async fn connect(&self, certificate: &Path) -> io::Result<Box<dyn Connection>> {
        let host = self.authority.host();
        let port = self.authority.port_u16().unwrap_or(if self.https { 443 } else { 4317 });
        let stream = TcpStream::connect((bare(host), port)).await?;
        worker::prepare_socket(&stream, QUIET);
        // Also for one that does not read. Spans wait for nobody.
        let _ = socket2::SockRef::from(&stream).set_tcp_user_timeout(Some(VANISHED));
        if !self.https {
            return Ok(Box::new(stream));
        }
        // Read anew for each connection, since they may be renewed.
        let roots = roots(certificate).map_err(io::Error::other)?;
        let name = ServerName::try_from(bare(host).to_owned()).map_err(io::Error::other)?;
        let builder = ClientConfig::builder_with_provider(tls::provider()).with_safe_default_protocol_versions();
        let mut config = builder.map_err(io::Error::other)?.with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = vec![tls::ALPN_H2.to_vec()];
        Ok(Box::new(TlsConnector::from(Arc::new(config)).connect(name, stream).await?))
    }
}

trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

/// An address of IPv6 has brackets only within a URL.
fn bare(host: &str) -> &str {
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}

fn roots(path: &Path) -> Result<RootCertStore, TraceError> {
    let failed = |reason: String| TraceError::Certificates { path: path.to_owned(), reason };
    let certificates = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| failed(error.to_string()))?;
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(certificates);
    if added == 0 {
        return Err(failed("it holds no certificate".to_owned()));
    }
    Ok(roots)
}

/// What is said once for all spans (<https://opentelemetry.io/docs/specs/semconv/resource/k8s/>).
pub(super) fn resource(options: &Options) -> Resource {
    let mut said = vec![
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        KeyValue::new("service.instance.id", options.pod.clone()),
        KeyValue::new("k8s.pod.name", options.pod.clone()),
    ];
    if !options.namespace.is_empty() {
        said.push(KeyValue::new("k8s.namespace.name", options.namespace.clone()));
    }
    Resource::builder().with_service_name(options.service_name.clone()).with_attributes(said).build()
}

/// Sends batches, and says what became of them.
#[derive(Debug)]
pub(super) struct Exporter {
    otlp: Otlp,
    endpoint: Endpoint,
    waiting: Arc<AtomicUsize>,
    metrics: Arc<Metrics>,
    failing: AtomicBool,
}

impl Exporter {
    pub(super) fn new(options: &Options, waiting: Arc<AtomicUsize>, metrics: Arc<Metrics>) -> Result<Self, TraceError> {
        let channel = options.endpoint.channel(&options.certificate)?;
        let otlp = Otlp::builder().with_tonic().with_channel(channel).build();
        let otlp = otlp.map_err(|error| TraceError::Exporter(error.to_string()))?;
        Ok(Self { otlp, endpoint: options.endpoint.clone(), waiting, metrics, failing: AtomicBool::new(false) })
    }
}

impl SpanExporter for Exporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let count = batch.len();
        // They have left the queue.
        self.waiting.fetch_sub(count, Relaxed);
        let sent = self.otlp.export(batch).await;
        match &sent {
            Ok(()) => {
                self.metrics.spans_exported(count);
                if self.failing.swap(false, Relaxed) {
                    tracing::info!(collector = %self.endpoint, "spans are taken again");
                }
            }
            Err(error) => {
                self.metrics.spans_lost(SpanLost::ExportFailed, count);
                // Once: requests are served all the same, and the metric goes on saying it.
                if self.failing.swap(true, Relaxed) {
                    tracing::debug!(collector = %self.endpoint, %error, "spans not taken");
                } else {
                    tracing::warn!(
                        collector = %self.endpoint, %error,
                        "the collector does not take spans; they are dropped until it does (sluice_spans_dropped_total)"
                    );
                }
            }
        }
        sent
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.otlp.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.otlp.set_resource(resource);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_endpoint_is_a_url_without_a_path() {
        for good in ["http://otel-collector.observability:4317", "https://otlp.example", "http://[::1]:4317/"] {
            let endpoint = endpoint(good).unwrap().unwrap();
            assert_eq!(endpoint.to_string(), good.trim_end_matches('/'));
        }
        assert_eq!(endpoint(""), Ok(None));
        let bad =
            ["collector", "collector:4317", "grpc://a:4317", "http://", "http://a:4318/v1/traces", "http://u:p@a:1"];
        for bad in bad {
            assert!(endpoint(bad).unwrap_err().contains("http://otel-collector"), "{bad}");
        }
    }

    #[tokio::test]
    async fn certificates_that_cannot_be_used_are_named_at_the_start() {
        let secure = "https://otlp.example".parse::<Endpoint>().unwrap();
        let error = secure.channel(Path::new("/nowhere/ca.crt")).unwrap_err().to_string();
        assert!(error.contains("/nowhere/ca.crt") && error.contains("OTEL_EXPORTER_OTLP_CERTIFICATE"), "{error}");
        assert!("http://otlp.example".parse::<Endpoint>().unwrap().channel(Path::new("/nowhere/ca.crt")).is_ok());
    }
}
