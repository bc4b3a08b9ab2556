//! Connections to the control plane: which address, over which TLS.

use std::{fmt, io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use hyper_util::rt::TokioIo;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::CryptoProvider,
    pki_types::{CertificateDer, DnsName, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::ParsedCertificate,
    version::TLS13,
};
use sluice_xds::SpiffeId;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::{
    Status,
    transport::{Channel, Endpoint, Uri},
};

use crate::tls::spiffe_id;

/// For the way to one address: TCP and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// The metadata in which a standby names the leader (docs/xds.md, "The connection").
const LEADER: &str = "sluice-leader";

/// Where the control plane is and how it is recognised.
#[derive(Debug, Clone)]
pub struct Controller {
    /// Resolved anew for each connection.
    pub host: String,
    pub port: u16,
    /// The SPIFFE id that its certificate must have.
    pub id: SpiffeId,
    /// The trust bundle, PEM. It is read anew for each connection, since it may rotate.
    pub trust_bundle: PathBuf,
}

/// The client certificate of a connection.
pub struct ClientCertificate {
    /// Leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
}

#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("cannot resolve the controller '{host}': {source}; check SLUICE_CONTROLLER and the cluster's DNS")]
    Resolve { host: String, source: io::Error },
    #[error("the trust bundle {path} cannot be used: {reason}; check the ConfigMap sluice-trust-bundle")]
    TrustBundle { path: PathBuf, reason: String },
    #[error("our own certificate cannot be used towards the controller: {0}")]
    Certificate(#[source] rustls::Error),
    #[error("cannot connect to the controller at {address}: {source}")]
    Connect { address: SocketAddr, source: io::Error },
    #[error("no connection to the controller at {address} within {} s", CONNECT_TIMEOUT.as_secs())]
    Timeout { address: SocketAddr },
    #[error("cannot speak HTTP/2 with the controller at {address}: {source}")]
    Http { address: SocketAddr, source: tonic::transport::Error },
}

impl Controller {
    /// All addresses of the control plane, in random order, so that proxies spread over its replicas.
    ///
    /// # Errors
    /// [`ConnectError::Resolve`].
    pub async fn addresses(&self) -> Result<Vec<SocketAddr>, ConnectError> {
        let failed = |source| ConnectError::Resolve { host: self.host.clone(), source };
        let found = tokio::time::timeout(CONNECT_TIMEOUT, tokio::net::lookup_host((self.host.as_str(), self.port)));
        let found = found.await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).map_err(failed)?;
        let mut addresses: Vec<SocketAddr> = found.collect();
        addresses.sort_unstable();
        addresses.dedup();
        if addresses.is_empty() {
            return Err(failed(io::Error::new(io::ErrorKind::NotFound, "it has no address")));
        }
        fastrand::shuffle(&mut addresses);
        Ok(addresses)
    }

    /// Connects to one address of the control plane. The channel does not connect again by itself: whoever loses it
    /// chooses an address anew.
    ///
    /// # Errors
    /// What failed, and where.
    pub async fn connect(
        &self,
        address: SocketAddr,
        certificate: Option<&ClientCertificate>,
    ) -> Result<Channel, ConnectError> {
        let tls = TlsConnector::from(Arc::new(self.tls(certificate)?));
        // The name decides nothing: the verifier looks at the SPIFFE id alone.
        let name = DnsName::try_from(self.host.clone())
            .map_or_else(|_| ServerName::IpAddress(address.ip().into()), ServerName::DnsName);
        let handshake = async {
            let tcp = TcpStream::connect(address).await?;
            tcp.set_nodelay(true)?;
            tls.connect(name, tcp).await
        };
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, handshake)
            .await
            .map_err(|_| ConnectError::Timeout { address })?
            .map_err(|source| ConnectError::Connect { address, source })?;

        let mut stream = Some(TokioIo::new(stream));
        let connector = tower::service_fn(move |_: Uri| {
            let stream = stream.take().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected));
            async { stream }
        });
        Endpoint::from_static("http://controller.sluice.dev")
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .connect_timeout(CONNECT_TIMEOUT)
            .connect_with_connector(connector)
            .await
            .map_err(|source| ConnectError::Http { address, source })
    }

    fn tls(&self, certificate: Option<&ClientCertificate>) -> Result<ClientConfig, ConnectError> {
        let mut roots = RootCertStore::empty();
        for root in self.read_trust_bundle()? {
            roots.add(root).map_err(|error| self.bad_bundle(&error))?;
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier = Arc::new(ControllerVerifier { roots, id: self.id.to_string(), provider: provider.clone() });
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(ConnectError::Certificate)?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut config = match certificate {
            Some(own) => builder
                .with_client_auth_cert(own.chain.clone(), own.key.clone_key())
                .map_err(ConnectError::Certificate)?,
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.resumption = Resumption::disabled();
        Ok(config)
    }

    /// The certificates in the file of the trust bundle; at least one.
    ///
    /// # Errors
    /// [`ConnectError::TrustBundle`] if it cannot be read or holds none.
    pub fn read_trust_bundle(&self) -> Result<Vec<CertificateDer<'static>>, ConnectError> {
        let certificates = CertificateDer::pem_file_iter(&self.trust_bundle)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .map_err(|error| self.bad_bundle(&error))?;
        if certificates.is_empty() {
            return Err(self.bad_bundle(&"it holds no certificate"));
        }
        Ok(certificates)
    }

    fn bad_bundle(&self, reason: &dyn fmt::Display) -> ConnectError {
        ConnectError::TrustBundle { path: self.trust_bundle.clone(), reason: reason.to_string() }
    }
}

/// The address of the leader, if this is the answer of a standby that knows it.
#[must_use]
pub fn leader(status: &Status) -> Option<SocketAddr> {
    if status.code() != tonic::Code::Unavailable {
        return None;
    }
    status.metadata().get(LEADER)?.to_str().ok()?.parse().ok()
}

/// Believes a server whose certificate chains to the trust bundle and has exactly the controller's SPIFFE id.
struct ControllerVerifier {
    roots: RootCertStore,
    id: String,
    provider: Arc<CryptoProvider>,
}

impl fmt::Debug for ControllerVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ControllerVerifier").field("id", &self.id).finish_non_exhaustive()
    }
}

impl ServerCertVerifier for ControllerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(end_entity)?,
            &self.roots,
            intermediates,
            now,
            self.provider.signature_verification_algorithms.all,
        )?;
        match spiffe_id(end_entity) {
            Some(id) if id == self.id => Ok(ServerCertVerified::assertion()),
            Some(_) | None => Err(CertificateError::ApplicationVerificationFailure.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken here".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Waits between attempts: doubling from `first` to `longest`, each drawn from its upper half, so that proxies that
/// lost the same controller do not come back at the same moment.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Backoff {
    #[must_use]
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, next: first }
    }

    /// How long to wait now.
    pub fn draw(&mut self) -> Duration {
        let wait = self.next.mul_f64(0.5 + fastrand::f64() / 2.0);
        self.next = (self.next * 2).min(self.longest);
        wait
    }

    pub fn reset(&mut self) {
        self.next = self.first;
    }

    /// Nothing has failed since the last success: one failure is no news for people yet.
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        self.next == self.first
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn waits_double_up_to_the_longest_and_start_over_after_a_success() {
        let ms = Duration::from_millis;
        let mut backoff = Backoff::new(ms(50), ms(5000));
        for limit in [50, 100, 200, 400, 800, 1600, 3200, 5000, 5000] {
            let wait = backoff.draw();
            assert!(wait >= ms(limit / 2) && wait <= ms(limit), "{wait:?} for {limit} ms");
        }
        assert!(!backoff.is_fresh());
        backoff.reset();
        assert!(backoff.is_fresh() && backoff.draw() <= ms(50));
    }

    #[test]
    fn a_standby_names_the_leader_only_with_unavailable() {
        let mut status = Status::unavailable("standby");
        assert_eq!(leader(&status), None);
        status.metadata_mut().insert(LEADER, "10.0.0.7:18000".parse().unwrap());
        assert_eq!(leader(&status), Some("10.0.0.7:18000".parse().unwrap()));
        let mut denied = Status::permission_denied("no");
        denied.metadata_mut().insert(LEADER, "10.0.0.7:18000".parse().unwrap());
        assert_eq!(leader(&denied), None);
    }
}
