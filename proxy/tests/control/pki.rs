//! A certificate authority like the controller's.

use std::{
    path::PathBuf,
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, IsCa, Issuer, KeyPair, SanType,
};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer};

pub(crate) const CONTROLLER: &str = "spiffe://cluster.local/ns/sluice-system/sa/sluice-controller";
pub(crate) const FLEET: &str = "spiffe://cluster.local/ns/sluice-system/sa/sluice-fleet";

pub(crate) struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) pem: String,
}

impl Ca {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "test root");
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// A certificate and key with this SPIFFE id.
    pub(crate) fn issue(&self, id: &str) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names.push(SanType::URI(id.try_into().unwrap()));
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (vec![certificate.der().clone()], PrivatePkcs8KeyDer::from(key.serialize_der()).into())
    }

    /// Signs a CSR for this SPIFFE id and life, as PEM.
    pub(crate) fn sign(&self, csr: &[u8], id: &str, life: Duration) -> String {
        let csr = CertificateSigningRequestDer::from(csr);
        let mut request = CertificateSigningRequestParams::from_der(&csr).unwrap();
        request.params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
        request.params.not_before = SystemTime::now().into();
        request.params.not_after = (SystemTime::now() + life).into();
        request.signed_by(&self.issuer).unwrap().pem()
    }
}

/// A folder of this test alone, with the files that a Pod has projected. Removed when dropped.
pub(crate) struct Projected(PathBuf);

impl Projected {
    pub(crate) fn new(ca: &Ca) -> Self {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("sluice-control-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let projected = Self(folder);
        projected.write_bundle(&ca.pem);
        projected.write_token("token-1");
        projected
    }

    pub(crate) fn write_bundle(&self, pem: &str) {
        std::fs::write(self.bundle(), pem).unwrap();
    }

    pub(crate) fn write_token(&self, token: &str) {
        std::fs::write(self.token(), format!("{token}\n")).unwrap();
    }

    pub(crate) fn bundle(&self) -> PathBuf {
        self.0.join("ca.crt")
    }

    pub(crate) fn token(&self) -> PathBuf {
        self.0.join("token")
    }
}

impl Drop for Projected {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
