//! This proxy's certificate: a key that never leaves the process, a CSR, and renewal long before the end.

use std::{
    fmt,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};
use sluice_xds::sluice::identity::v1::{
    SignRequest, SignResponse, certificate_service_client::CertificateServiceClient,
};
use tokio::sync::watch;

use crate::{
    controller::{Backoff, ClientCertificate, ConnectError, Controller},
    tls::{IdentityError, IdentityHandle},
};

const SIGN_TIMEOUT: Duration = Duration::from_secs(10);
const FIRST_BACKOFF: Duration = Duration::from_millis(500);
const LONGEST_BACKOFF: Duration = Duration::from_secs(30);
/// How often the file of the trust bundle is looked at. The kubelet renews projected files about once a minute.
const BUNDLE_INTERVAL: Duration = Duration::from_secs(30);

/// A certificate that was signed for us, with its key and the bundle that came with it.
pub struct Certificate {
    pub client: ClientCertificate,
    pub roots: Vec<CertificateDer<'static>>,
    /// When it came. `notBefore` is dated back.
    pub received: SystemTime,
    pub not_after: SystemTime,
}

impl Certificate {
    #[must_use]
    pub fn valid_at(&self, now: SystemTime) -> bool {
        now < self.not_after
    }
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificate").field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

#[derive(Debug, thiserror::Error)]
pub enum SignError {
    #[error("cannot make a key or a signing request: {0}")]
    Key(#[from] rcgen::Error),
    #[error("cannot read the service-account token {path}: {source}; check the projected volume")]
    Token { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("the controller refused to sign: {}: {}", .0.code(), .0.message())]
    Refused(#[from] Box<tonic::Status>),
    #[error("the controller's answer cannot be used: {0}")]
    Answer(&'static str),
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// Keeps [`IdentityHandle`] supplied.
#[derive(Debug)]
pub struct Renewer {
    controller: Controller,
    token: PathBuf,
    handle: IdentityHandle,
    current: watch::Sender<Option<Arc<Certificate>>>,
    bundle_interval: Duration,
}

impl Renewer {
    /// `token` is the path of the projected service-account token.
    #[must_use]
    pub fn new(controller: Controller, token: PathBuf, handle: IdentityHandle) -> Self {
        Self { controller, token, handle, current: watch::Sender::new(None), bundle_interval: BUNDLE_INTERVAL }
    }

    /// Looks at the trust bundle so often; every 30 s by default.
    #[must_use]
    pub fn bundle_interval(mut self, interval: Duration) -> Self {
        self.bundle_interval = interval;
        self
    }

    /// The certificate in use; `None` until the first is signed.
    #[must_use]
    pub fn current(&self) -> watch::Receiver<Option<Arc<Certificate>>> {
        self.current.subscribe()
    }

    /// Asks for certificates for ever. A failure leaves the current one in use, and is tried again.
    pub async fn run(self) -> std::convert::Infallible {
        let mut backoff = Backoff::new(FIRST_BACKOFF, LONGEST_BACKOFF);
        loop {
            let bundle = self.bundle();
            match self.renew().await {
                Ok(certificate) => {
                    backoff.reset();
                    let until = renew_at(&certificate, fastrand::f64());
                    tracing::info!(
                        not_after = %jiff_time(certificate.not_after),
                        renewal = %jiff_time(until),
                        "a certificate was signed for this proxy"
                    );
                    self.keep(certificate, bundle, until).await;
                }
                Err(error) => {
                    let first = backoff.is_fresh();
                    let wait = backoff.draw();
                    if first {
                        tracing::info!(%error, ?wait, "no certificate was signed yet; tried again");
                    } else {
                        tracing::warn!(%error, ?wait, "no certificate was signed; the current one, if any, stays in use");
                    }
                    tokio::time::sleep(wait).await;
                }
            }
        }
    }

    /// Asks once, and takes the new certificate into use.
    ///
    /// # Errors
    /// What failed at the replica that was tried last. The current certificate stays in use then.
    pub async fn renew(&self) -> Result<Arc<Certificate>, SignError> {
        let certificate = Arc::new(self.sign().await?);
        self.install(&certificate, certificate.roots.clone())?;
        self.current.send_replace(Some(certificate.clone()));
        Ok(certificate)
    }

    fn install(&self, certificate: &Certificate, roots: Vec<CertificateDer<'static>>) -> Result<(), IdentityError> {
        let client = &certificate.client;
        self.handle.set(client.chain.clone(), client.key.clone_key(), roots)
    }

    /// Waits for the time of renewal. A *changed* trust bundle is taken into use at once: a root that is added or
    /// withdrawn cannot wait for a renewal. If it is the one that our own certificate ends in, that is renewed at once, too.
    async fn keep(
        &self,
        certificate: Arc<Certificate>,
        mut bundle: Option<Vec<CertificateDer<'static>>>,
        until: SystemTime,
    ) {
        // Slept in slices: the clock of the wall goes on while a suspended machine's timers do not.
        while let Ok(left) = until.duration_since(SystemTime::now()) {
            tokio::time::sleep(left.min(self.bundle_interval)).await;
            let now = self.bundle();
            let Some(roots) = now.clone().filter(|_| now != bundle) else {
                continue;
            };
            match self.install(&certificate, roots) {
                Ok(()) if self.handle.trusts_itself() => tracing::info!("the trust bundle has changed and is in use"),
                Ok(()) => {
                    tracing::info!(
                        "the trust bundle has changed and does not know our own certificate, which is renewed"
                    );
                    return;
                }
                Err(error) => {
                    tracing::warn!(%error, "the trust bundle has changed; the old one stays in use")
                }
            }
            bundle = now;
        }
    }

    fn bundle(&self) -> Option<Vec<CertificateDer<'static>>> {
        self.controller.read_trust_bundle().ok()
    }

    /// Tries the replicas one after the other: every one of them signs.
    async fn sign(&self) -> Result<Certificate, SignError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        // Names in a CSR are ignored by the controller, so there are none.
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let csr = params.serialize_request(&key)?;
        // Read each time: the kubelet rotates it.
        let token = tokio::fs::read_to_string(&self.token)
            .await
            .map_err(|source| SignError::Token { path: self.token.clone(), source })?;
        let request = SignRequest { csr_der: csr.der().to_vec(), token: token.trim().to_owned() };

        let mut last = SignError::Answer("no address was tried");
        for address in self.controller.addresses().await? {
            match self.sign_at(address, &request).await {
                Ok(answer) => return certificate(&key, answer),
                Err(error) => {
                    tracing::debug!(%address, %error, "this replica did not sign");
                    last = error;
                }
            }
        }
        Err(last)
    }

    async fn sign_at(&self, address: std::net::SocketAddr, request: &SignRequest) -> Result<SignResponse, SignError> {
        let channel = self.controller.connect(address, None).await?;
        let mut client = CertificateServiceClient::new(channel);
        let answer = tokio::time::timeout(SIGN_TIMEOUT, client.sign(request.clone()))
            .await
            .unwrap_or_else(|_| Err(tonic::Status::deadline_exceeded("no answer within 10 s")));
        Ok(answer.map_err(Box::new)?.into_inner())
    }
}

fn certificate(key: &KeyPair, answer: SignResponse) -> Result<Certificate, SignError> {
    let read = |pem: &str| CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<Vec<_>, _>>();
    let chain = read(&answer.certificate_chain_pem).map_err(|_| SignError::Answer("the chain is not PEM"))?;
    let roots = read(&answer.trust_bundle_pem).map_err(|_| SignError::Answer("the trust bundle is not PEM"))?;
    if chain.is_empty() || roots.is_empty() {
        return Err(SignError::Answer("the chain or the trust bundle is empty"));
    }
    let time = |stamp: Option<prost_types::Timestamp>| stamp.and_then(|stamp| SystemTime::try_from(stamp).ok());
    let (Some(not_before), Some(not_after)) = (time(answer.not_before), time(answer.not_after)) else {
        return Err(SignError::Answer("not_before or not_after is missing"));
    };
    if not_after <= not_before || not_after <= SystemTime::now() {
        return Err(SignError::Answer("the certificate is over; compare the clocks of this node and the controller's"));
    }
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    Ok(Certificate { client: ClientCertificate { chain, key }, roots, received: SystemTime::now(), not_after })
}

/// At two thirds of the life that a certificate has now, when it was signed (it is dated back), give or take 5 % of it by `draw`
/// (0 to 1), so that proxies that started together do not renew together. At least a second from now.
fn renew_at(certificate: &Certificate, draw: f64) -> SystemTime {
    let now = SystemTime::now();
    let life = certificate.not_after.duration_since(now).unwrap_or_default();
    now + life.mul_f64(2.0 / 3.0 + (draw - 0.5) / 10.0).max(Duration::from_secs(1))
}

fn jiff_time(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time).map_or_else(|_| "?".to_owned(), |time| time.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewal_is_at_two_thirds_of_the_life_with_jitter() {
        let now = SystemTime::now();
        let hour = Duration::from_secs(3600);
        let certificate = Certificate {
            client: ClientCertificate { chain: Vec::new(), key: PrivatePkcs8KeyDer::from(Vec::new()).into() },
            roots: Vec::new(),
            received: now,
            not_after: now + 24 * hour,
        };
        let at = |draw| renew_at(&certificate, draw).duration_since(now).unwrap_or_default();
        assert_eq!(at(0.5).as_secs().div_ceil(60), 16 * 60);
        assert!(at(0.0) >= 14 * hour && at(0.0) < 15 * hour);
        assert!(at(1.0) > 17 * hour && at(1.0) <= 18 * hour);

        let short = Certificate { not_after: now + hour / 60, ..certificate };
        let wait = renew_at(&short, 0.5).duration_since(now).unwrap_or_default();
        assert!(wait.as_secs() >= 39 && wait.as_secs() <= 41, "{wait:?}");
    }
}
