//! The controller's own certificate: made by itself, renewed at two thirds of its life.

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use jiff::Timestamp;
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::{
    crypto::CryptoProvider,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};

use super::{Authority, IdentityError, Subject};

/// The clock may jump while we sleep, so no sleep is longer.
const LOOK_AGAIN: Duration = Duration::from_secs(600);
const AT_LEAST: Duration = Duration::from_secs(1);
/// Between two tries of a renewal that fails.
const RETRY: Duration = Duration::from_secs(30);

/// Certificate and key that every handshake takes.
#[derive(Debug)]
pub struct OwnCertificate {
    authority: Arc<Authority>,
    provider: Arc<CryptoProvider>,
    subject: Subject,
    current: ArcSwap<Current>,
}

#[derive(Debug)]
struct Current {
    key: Arc<CertifiedKey>,
    renew_at: Timestamp,
    /// The root that signed it.
    root: CertificateDer<'static>,
}

impl OwnCertificate {
    /// Makes the first one.
    ///
    /// # Errors
    /// If `subject` cannot be written into a certificate.
    pub fn new(
        authority: Arc<Authority>,
        provider: Arc<CryptoProvider>,
        subject: Subject,
    ) -> Result<Arc<Self>, IdentityError> {
        let current = issue(&authority, &provider, &subject, Timestamp::now())?;
        Ok(Arc::new(Self { current: ArcSwap::from_pointee(current), authority, provider, subject }))
    }

    /// Replaces it when its time has come, or when another root signs. Never ends; whoever owns the task drops it.
    pub async fn keep(&self) {
        let mut changes = self.authority.changes();
        loop {
            let left = (self.current.load().renew_at).duration_since(Timestamp::now());
            // A negative duration has none: it is due.
            let left = Duration::try_from(left).unwrap_or_default();
            tokio::select! {
                () = tokio::time::sleep(left.clamp(AT_LEAST, LOOK_AGAIN)) => {}
                // Its sender is in the authority that we hold.
                _ = changes.changed() => {}
            }
            let now = Timestamp::now();
            let current = self.current.load();
            if now < current.renew_at && current.root == self.authority.own_signer().certificate {
                continue;
            }
            match issue(&self.authority, &self.provider, &self.subject, now) {
                Ok(next) => {
                    tracing::info!("renewed the controller's own certificate");
                    self.current.store(Arc::new(next));
                }
                Err(error) => {
                    tracing::error!("{error}");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    #[cfg(test)]
    pub(super) fn chain(&self) -> Vec<CertificateDer<'static>> {
        self.current.load().key.cert.clone()
    }
}

impl ResolvesServerCert for OwnCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.current.load().key))
    }
}

fn issue(
    authority: &Authority,
    provider: &CryptoProvider,
    subject: &Subject,
    now: Timestamp,
) -> Result<Current, IdentityError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)
        .map_err(|source| IdentityError::Issue { subject: subject.pod.common_name(), source })?;
    let (issued, root) = authority.issue_own(&key, subject, now)?;
    let key = PrivatePkcs8KeyDer::from(key.serialize_der());
    let certified = CertifiedKey::from_der(vec![issued.certificate], key.into(), provider)
        .map_err(|error| IdentityError::Tls(error.to_string()))?;
    let life = issued.not_after.duration_since(now);
    Ok(Current { key: Arc::new(certified), renew_at: now + life / 3 * 2, root })
}
