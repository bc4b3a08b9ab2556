//! Who we are and whom we believe: the certificate and trust bundle of this proxy, and rustls configurations that look
//! both up at each handshake, so that a renewal touches no open connection.
//!
//! TLS 1.3 only. Peers are known by the one SPIFFE id in their certificate, never by a DNS name
//! (<https://github.com/spiffe/spiffe/blob/main/standards/X509-SVID.md>).

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwapOption;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, ServerConfig,
    SignatureScheme,
    client::{
        ResolvesClientCert, Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime},
    server::{
        ClientHello, NoServerSessionStorage, ParsedCertificate, ResolvesServerCert, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
    version::TLS13,
};
use x509_parser::{extensions::GeneralName, prelude::FromDer};

/// Application protocols of the hop between our proxies.
pub const ALPN_H2: &[u8] = b"h2";
pub const ALPN_HTTP1: &[u8] = b"http/1.1";

#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("the certificate chain is empty; ask for a new certificate")]
    EmptyChain,
    #[error("the private key cannot be used for the certificate: {0}; ask for a new certificate")]
    Key(#[source] Error),
    #[error("the trust bundle cannot be used: {0}; check the ConfigMap sluice-trust-bundle")]
    Roots(String),
}

/// The current certificate and trust bundle, shared by the control side, which sets it, and by every handshake.
/// Without an identity each handshake of ours fails.
#[derive(Clone, Default)]
pub struct IdentityHandle(Arc<ArcSwapOption<Identity>>);

struct Identity {
    key: Arc<CertifiedKey>,
    roots: Arc<RootCertStore>,
    clients: Arc<dyn ClientCertVerifier>,
}

impl IdentityHandle {
    /// Takes a new certificate into use for handshakes that start from now on. `chain` is leaf first.
    ///
    /// # Errors
    /// When the chain is empty, the key does not fit, or no root can be used. The old identity stays then.
    pub fn set(
        &self,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        roots: Vec<CertificateDer<'static>>,
    ) -> Result<(), IdentityError> {
        if chain.is_empty() {
            return Err(IdentityError::EmptyChain);
        }
        let key = CertifiedKey::from_der(chain, key, &provider()).map_err(IdentityError::Key)?;
        let mut store = RootCertStore::empty();
        for root in roots {
            store.add(root).map_err(|error| IdentityError::Roots(error.to_string()))?;
        }
        let roots = Arc::new(store);
        let clients = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider())
            .build()
            .map_err(|error| IdentityError::Roots(error.to_string()))?;
        self.0.store(Some(Arc::new(Identity { key: Arc::new(key), roots, clients })));
        Ok(())
    }

    #[must_use]
    pub fn is_set(&self) -> bool {
        self.0.load().is_some()
    }

    /// Whether others that have the same trust bundle believe our own certificate: it ends in a root of the bundle, and is valid.
    #[must_use]
    pub fn trusts_itself(&self) -> bool {
        let Some(identity) = self.0.load_full() else { return false };
        let [leaf, intermediates @ ..] = identity.key.cert.as_slice() else { return false };
        let algorithms = provider().signature_verification_algorithms.all;
        ParsedCertificate::try_from(leaf).is_ok_and(|leaf| {
            let (roots, now) = (&identity.roots, UnixTime::now());
            verify_server_cert_signed_by_trust_anchor(&leaf, roots, intermediates, now, algorithms).is_ok()
        })
    }

    /// TLS that admits exactly the client `client_id`, for a listener of ours.
    #[must_use]
    pub fn server_config(&self, client_id: &str, alpn: &[&[u8]]) -> Arc<ServerConfig> {
        let peer = Arc::new(Peer { identity: self.clone(), id: client_id.to_owned(), provider: provider() });
        let mut config = builder(ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13]))
            .with_client_cert_verifier(peer)
            .with_cert_resolver(Arc::new(Own(self.clone())));
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        // No resumption: a resumed session would skip the check against the trust bundle of today (rustls,
        // `ProducesTickets`), and hops between proxies keep their connections for long, so there is little to gain.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Arc::new(config)
    }

    /// Checks that a server is exactly `server_id`, for TLS that is configured elsewhere.
    #[must_use]
    pub fn server_verifier(&self, server_id: &str) -> Arc<dyn ServerCertVerifier> {
        Arc::new(Peer { identity: self.clone(), id: server_id.to_owned(), provider: provider() })
    }

    /// TLS towards exactly the server `server_id`, with our own certificate.
    #[must_use]
    pub fn client_config(&self, server_id: &str, alpn: &[&[u8]]) -> Arc<ClientConfig> {
        let peer = Arc::new(Peer { identity: self.clone(), id: server_id.to_owned(), provider: provider() });
        let mut config = builder(ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13]))
            .dangerous()
            .with_custom_certificate_verifier(peer)
            .with_client_cert_resolver(Arc::new(Own(self.clone())));
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        config.resumption = Resumption::disabled();
        Arc::new(config)
    }
}

impl fmt::Debug for IdentityHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IdentityHandle").field("is_set", &self.is_set()).finish()
    }
}

/// The one provider of cryptography of this process, always named, so that no process-wide default is needed.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: std::sync::LazyLock<Arc<CryptoProvider>> =
        std::sync::LazyLock::new(|| Arc::new(rustls::crypto::aws_lc_rs::default_provider()));
    PROVIDER.clone()
}

/// aws-lc-rs has all that TLS 1.3 needs, so a builder for it cannot fail.
#[expect(clippy::expect_used, reason = "fixed provider and version")]
fn builder<T>(result: Result<T, Error>) -> T {
    result.expect("aws-lc-rs serves TLS 1.3")
}

/// Our own certificate, as both ends of a connection present it.
#[derive(Debug)]
struct Own(IdentityHandle);

impl ResolvesServerCert for Own {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.0.load().as_ref().map(|identity| identity.key.clone())
    }
}

impl ResolvesClientCert for Own {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.0.load().as_ref().map(|identity| identity.key.clone())
    }

    fn has_certs(&self) -> bool {
        self.0.is_set()
    }
}

/// Believes a certificate that chains to the trust bundle, is valid now, and names exactly `id`.
struct Peer {
    identity: IdentityHandle,
    id: String,
    provider: Arc<CryptoProvider>,
}

impl Peer {
    fn current(&self) -> Result<Arc<Identity>, Error> {
        self.identity
            .0
            .load_full()
            .ok_or_else(|| Error::General("this proxy has no certificate and trust bundle yet".to_owned()))
    }

    fn check_name(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        match spiffe_id(certificate) {
            Some(id) if id == self.id => Ok(()),
            Some(_) | None => Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)),
        }
    }

    fn signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, dss, algorithms)
    }
}

/// The SPIFFE id of a certificate: its only URI SAN. `None` if it has none or several, which X509-SVID (2) forbids.
#[must_use]
pub fn spiffe_id(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, certificate) = x509_parser::certificate::X509Certificate::from_der(certificate).ok()?;
    let names = certificate.subject_alternative_name().ok()??;
    let mut uris = names
        .value
        .general_names
        .iter()
        .filter_map(|name| if let GeneralName::URI(uri) = name { Some(*uri) } else { None });
    let id = uris.next()?;
    uris.next().is_none().then(|| id.to_owned())
}

/// When a certificate ends.
#[must_use]
pub fn not_after(certificate: &CertificateDer<'_>) -> Option<SystemTime> {
    let (_, certificate) = x509_parser::certificate::X509Certificate::from_der(certificate).ok()?;
    let seconds = u64::try_from(certificate.validity().not_after.timestamp()).ok()?;
    Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Peer").field("id", &self.id).finish_non_exhaustive()
    }
}

impl ClientCertVerifier for Peer {
    /// Empty: the names would have to live as long as this verifier, but the bundle changes. Our clients have one
    /// certificate and send it regardless.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.current()?.clients.verify_client_cert(end_entity, intermediates, now)?;
        self.check_name(end_entity)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken here".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signature(message, certificate, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl ServerCertVerifier for Peer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(end_entity)?,
            &self.current()?.roots,
            intermediates,
            now,
            self.provider.signature_verification_algorithms.all,
        )?;
        self.check_name(end_entity)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken here".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signature(message, certificate, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
