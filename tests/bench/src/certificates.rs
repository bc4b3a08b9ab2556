//! Who is who: a root, and a certificate each for the client, the proxies and the upstream.

use std::{fs, path::Path, sync::Arc};

use anyhow::Context;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::Resumption,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    server::WebPkiClientVerifier,
};
use sluice_proxy::tls::IdentityHandle;
use tokio_rustls::{TlsAcceptor, TlsConnector};

pub(crate) const CLIENT: &str = "spiffe://bench/ns/bench/sa/client";
pub(crate) const PROXY: &str = "spiffe://bench/ns/bench/sa/proxy";
pub(crate) const UPSTREAM: &str = "spiffe://bench/ns/bench/sa/upstream";
/// What clients send as SNI, to the proxies and to the upstream.
pub(crate) const SERVER_NAME: &str = "proxy.bench";

/// Writes `ca.crt`, and `NAME.crt`, `NAME.key` and both in `NAME.pem`.
pub(crate) fn write(folder: &Path) -> anyhow::Result<()> {
    let mut root = CertificateParams::default();
    root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    root.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    root.distinguished_name.push(DnType::CommonName, "bench root");
    let key = KeyPair::generate()?;
    fs::write(folder.join("ca.crt"), root.self_signed(&key)?.pem())?;
    let issuer = Issuer::new(root, key);
    for (name, id) in [("client", CLIENT), ("proxy", PROXY), ("upstream", UPSTREAM)] {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(id.try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &issuer)?.pem();
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
    let mut roots = RootCertStore::empty();
    for root in chain(folder, "ca")? {
        roots.add(root)?;
    }
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider()).build()?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(clients)
        .with_single_cert(chain(folder, "upstream")?, key(folder, "upstream")?)?;
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
