//! Who is who: a root, and a certificate each for the client, the proxies and the upstream.

use std::{fs, path::Path, sync::Arc};

use anyhow::Context;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::Resumption,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{
        CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, pem::PemObject,
    },
    server::WebPkiClientVerifier,
};
use sluice_proxy::tls::IdentityHandle;
use tokio_rustls::{TlsAcceptor, TlsConnector};

pub(crate) const CLIENT: &str = "spiffe://bench/ns/bench/sa/client";
pub(crate) const PROXY: &str = "spiffe://bench/ns/bench/sa/proxy";
pub(crate) const UPSTREAM: &str = "spiffe://bench/ns/bench/sa/upstream";
/// What clients send as SNI, to the proxies and to the upstream.
pub(crate) const SERVER_NAME: &str = "proxy.bench";

/// What signs.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    root: Certificate,
}

impl Authority {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let mut root = CertificateParams::default();
        root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        root.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        root.distinguished_name.push(DnType::CommonName, "bench root");
        let key = KeyPair::generate()?;
        let certificate = root.self_signed(&key)?;
        Ok(Self { issuer: Issuer::new(root, key), root: certificate })
    }

    /// PEM.
    pub(crate) fn root(&self) -> String {
        self.root.pem()
    }

    /// A certificate for this SPIFFE id, with its key.
    pub(crate) fn issue(&self, id: &str) -> anyhow::Result<(Certificate, KeyPair)> {
        let mut params = CertificateParams::default();
        named(&mut params, id)?;
        let key = KeyPair::generate()?;
        Ok((params.signed_by(&key, &self.issuer)?, key))
    }

    /// A certificate for this SPIFFE id and the key of a signing request (DER), PEM. Names in the request do not count.
    pub(crate) fn sign(&self, request: &[u8], id: &str) -> anyhow::Result<String> {
        let mut request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(request))?;
        named(&mut request.params, id)?;
        Ok(request.signed_by(&self.issuer)?.pem())
    }

    /// One side of TLS, whose clients must have a certificate of ours, if they have to have one at all.
    pub(crate) fn acceptor(&self, id: &str, alpn: &str, clients: Clients) -> anyhow::Result<TlsAcceptor> {
        let (certificate, key) = self.issue(id)?;
        let key = PrivatePkcs8KeyDer::from(key.serialize_der());
        acceptor_of(vec![self.root.der().clone()], vec![certificate.der().clone()], key.into(), alpn, clients)
    }
}

fn named(params: &mut CertificateParams, id: &str) -> anyhow::Result<()> {
    params.subject_alt_names = vec![SanType::URI(id.try_into()?)];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    Ok(())
}

/// Whether clients have to have a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Clients {
    Known,
    KnownOrNew,
}

/// Writes `ca.crt`, and `NAME.crt`, `NAME.key` and both in `NAME.pem`.
pub(crate) fn write(folder: &Path) -> anyhow::Result<()> {
    let authority = Authority::new()?;
    fs::write(folder.join("ca.crt"), authority.root())?;
    for (name, id) in [("client", CLIENT), ("proxy", PROXY), ("upstream", UPSTREAM)] {
        let (certificate, key) = authority.issue(id)?;
        let certificate = certificate.pem();
        fs::write(folder.join(format!("{name}.pem")), format!("{certificate}{}", key.serialize_pem()))?;
        fs::write(folder.join(format!("{name}.crt")), certificate)?;
        fs::write(folder.join(format!("{name}.key")), key.serialize_pem())?;
    }
    Ok(())
}

/// One cipher suite and one key exchange, so that all proxies do the same work.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256],
        kx_groups: vec![aws_lc_rs::kx_group::X25519],
        ..aws_lc_rs::default_provider()
    })
}

/// An identity as our proxy has it.
pub(crate) fn identity(folder: &Path, name: &str) -> anyhow::Result<IdentityHandle> {
    let identity = IdentityHandle::default();
    identity.set(chain(folder, name)?, key(folder, name)?, chain(folder, "ca")?)?;
    Ok(identity)
}

/// The client's side, with a full handshake for each connection.
pub(crate) fn connector(folder: &Path, alpn: &str) -> anyhow::Result<(TlsConnector, ServerName<'static>)> {
    // The proxy's name is a SPIFFE id, which rustls's own check of DNS names does not know; ours does.
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(identity(folder, "client")?.server_verifier(PROXY))
        .with_client_auth_cert(chain(folder, "client")?, key(folder, "client")?)?;
    config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
    config.resumption = Resumption::disabled();
    Ok((TlsConnector::from(Arc::new(config)), ServerName::try_from(SERVER_NAME)?))
}

/// The upstream's side.
pub(crate) fn acceptor(folder: &Path, alpn: &str) -> anyhow::Result<TlsAcceptor> {
    acceptor_of(chain(folder, "ca")?, chain(folder, "upstream")?, key(folder, "upstream")?, alpn, Clients::Known)
}

fn acceptor_of(
    trusted: Vec<CertificateDer<'static>>,
    own: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    alpn: &str,
    clients: Clients,
) -> anyhow::Result<TlsAcceptor> {
    let mut roots = RootCertStore::empty();
    for root in trusted {
        roots.add(root)?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
    let verifier = match clients {
        Clients::Known => verifier.build()?,
        Clients::KnownOrNew => verifier.allow_unauthenticated().build()?,
    };
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(own, key)?;
    config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

fn key(folder: &Path, name: &str) -> anyhow::Result<PrivateKeyDer<'static>> {
    Ok(PrivateKeyDer::from_pem_file(folder.join(format!("{name}.key")))?)
}

fn chain(folder: &Path, name: &str) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let file = folder.join(format!("{name}.crt"));
    let read = CertificateDer::pem_file_iter(&file).with_context(|| format!("reading {}", file.display()))?;
    Ok(read.collect::<Result<_, _>>()?)
}
