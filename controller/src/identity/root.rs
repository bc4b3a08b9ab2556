//! Root certificates with their keys, as Secret `sluice-ca` holds them.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::{ResourceExt as _, api::ObjectMeta};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SerialNumber, date_time_ymd,
};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::authority::{BACKDATE, random_serial, since_1970};

/// Secret in the release namespace with the root: `tls.crt`, `tls.key`, and in `ca.crt` everything that a peer's chain may
/// end in beside it.
pub const CA_SECRET: &str = "sluice-ca";

const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";
const BUNDLE: &str = "ca.crt";
const MANAGED_BY: &str = "app.kubernetes.io/managed-by";

const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// A root of our own is replaced so long before its end.
const ROOT_RENEWAL: Duration = Duration::from_secs(365 * 24 * 3600);

/// A root that signs.
pub(super) struct Root {
    pub(super) certificate: CertificateDer<'static>,
    pub(super) issuer: Issuer<'static, KeyPair>,
    pub(super) not_after: Timestamp,
}

/// What the Secret asks for.
#[derive(Clone)]
pub(super) struct Wanted {
    /// The root that should sign.
    pub(super) signer: Arc<Root>,
    /// Further roots to be trusted.
    pub(super) beside: Vec<CertificateDer<'static>>,
    /// Whether we made it, and may replace it.
    pub(super) ours: bool,
}

impl Wanted {
    /// # Errors
    /// What is wrong with the Secret, by key.
    pub(super) fn read(secret: &Secret, now: Timestamp) -> Result<Self, String> {
        let text = |key: &str| {
            let data = secret.data.as_ref().and_then(|data| data.get(key));
            let bytes = &data.ok_or_else(|| format!("it has no {key}"))?.0;
            std::str::from_utf8(bytes).map_err(|_| format!("its {key} is not PEM"))
        };
        let has_bundle = secret.data.as_ref().is_some_and(|data| data.contains_key(BUNDLE));
        let bundle = has_bundle.then(|| text(BUNDLE)).transpose()?;
        let ours = secret.labels().get(MANAGED_BY).is_some_and(|by| by == sluice_crds::labels::FIELD_MANAGER);
        Ok(Self { ours, ..Self::parse(text(CERTIFICATE)?, text(KEY)?, bundle.unwrap_or_default(), now)? })
    }

    /// `bundle`: further roots, PEM, may be empty.
    pub(super) fn parse(certificate: &str, key: &str, bundle: &str, now: Timestamp) -> Result<Self, String> {
        let key = KeyPair::from_pem(key).map_err(|e| format!("{KEY} is not a private key in PKCS#8: {e}"))?;
        let certificate = CertificateDer::from_pem_slice(certificate.as_bytes())
            .map_err(|e| format!("{CERTIFICATE} is not a PEM certificate: {e}"))?;
        let not_after = check(&certificate, &key, now)?;
        let issuer =
            Issuer::from_ca_cert_der(&certificate, key).map_err(|e| format!("{CERTIFICATE} cannot be read: {e}"))?;
        let mut beside: Vec<_> = CertificateDer::pem_slice_iter(bundle.as_bytes())
            .collect::<Result<_, _>>()
            .map_err(|e| format!("{BUNDLE} is not a list of PEM certificates: {e}"))?;
        // What no verifier could use must not come to the proxies.
        if let Some(at) = beside.iter().position(|root| X509Certificate::from_der(root).is_err()) {
            return Err(format!("certificate {} of {BUNDLE} cannot be read", at + 1));
        }
        beside.retain(|root| *root != certificate);
        Ok(Self { signer: Arc::new(Root { certificate, issuer, not_after }), beside, ours: false })
    }

    /// Whether it is for us to replace it because of its age.
    pub(super) fn is_old(&self, now: Timestamp) -> bool {
        self.ours && now >= self.signer.not_after - ROOT_RENEWAL
    }

    /// All that should be trusted, the signing one first.
    pub(super) fn roots(&self) -> impl Iterator<Item = &CertificateDer<'static>> {
        std::iter::once(&self.signer.certificate).chain(&self.beside)
    }
}

/// A new root, made now.
pub(super) fn new(trust_domain: &str, now: Timestamp) -> Result<Secret, rcgen::Error> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let certificate = certificate(&key, trust_domain, now)?.pem();
    let data = [(CERTIFICATE, certificate.clone()), (BUNDLE, certificate), (KEY, key.serialize_pem())];
    let labels = BTreeMap::from([(MANAGED_BY.to_owned(), sluice_crds::labels::FIELD_MANAGER.to_owned())]);
    Ok(Secret {
        metadata: ObjectMeta { name: Some(CA_SECRET.to_owned()), labels: Some(labels), ..ObjectMeta::default() },
        type_: Some("kubernetes.io/tls".to_owned()),
        data: Some(data.into_iter().map(|(key, value)| (key.to_owned(), ByteString(value.into_bytes()))).collect()),
        ..Secret::default()
    })
}

pub(super) fn certificate(key: &KeyPair, trust_domain: &str, now: Timestamp) -> Result<Certificate, rcgen::Error> {
    let mut params = CertificateParams::default();
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, "Sluice root");
    name.push(DnType::OrganizationName, trust_domain);
    params.distinguished_name = name;
    params.not_before = date_time_ymd(1970, 1, 1) + since_1970(now - BACKDATE);
    params.not_after = date_time_ymd(1970, 1, 1) + since_1970(now + ROOT_LIFE);
    params.serial_number = Some(SerialNumber::from_slice(&random_serial()?));
    // It signs leaves only. No name constraint: verifiers differ on URI constraints (webpki refuses such chains).
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.self_signed(key)
}

/// The end of the root's life, if it can sign for us now.
fn check(root: &[u8], key: &KeyPair, now: Timestamp) -> Result<Timestamp, String> {
    let (_, root) = X509Certificate::from_der(root).map_err(|e| format!("{CERTIFICATE} cannot be read: {e}"))?;
    if root.public_key().raw != key.subject_public_key_info() {
        return Err(format!("{KEY} is not the key of {CERTIFICATE}"));
    }
    if !root.is_ca() {
        return Err(format!("{CERTIFICATE} is not a certificate authority"));
    }
    let time = |at: x509_parser::time::ASN1Time| {
        Timestamp::from_second(at.timestamp()).map_err(|e| format!("{CERTIFICATE} has an unusable validity: {e}"))
    };
    let (from, to) = (time(root.validity().not_before)?, time(root.validity().not_after)?);
    if now < from || now >= to {
        return Err(format!("{CERTIFICATE} is valid from {from} to {to}, and it is {now}"));
    }
    Ok(to)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn root(now: Timestamp) -> (String, String) {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let root = certificate(&key, "cluster.local", now).unwrap();
        (root.pem(), key.serialize_pem())
    }

    #[test]
    fn a_root_that_cannot_sign_is_refused_with_the_reason() {
        let now = Timestamp::now();
        let (certificate, key) = root(now);
        assert!(Wanted::parse(&certificate, &key, "", now).is_ok());
        let (other, other_key) = root(now - 11 * ROOT_LIFE / 10);
        for (certificate, key, bundle, words) in [
            (certificate.as_str(), other_key.as_str(), "", "is not the key of"),
            (&other, &other_key, "", "is valid from"),
            ("", &key, "", "is not a PEM certificate"),
            (&certificate, "", "", "is not a private key"),
            (&certificate, &key, "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n", "is not a list of PEM"),
            (
                &certificate,
                &key,
                "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
                "certificate 1 of ca.crt",
            ),
        ] {
            let why = Wanted::parse(certificate, key, bundle, now).map(|_| ()).unwrap_err();
            assert!(why.contains(words), "{words}: {why}");
        }
    }

    #[test]
    fn what_is_trusted_beside_the_signing_root_is_named_once() {
        let now = Timestamp::now();
        let ((certificate, key), (next, _)) = (root(now), root(now));
        let cases =
            [(String::new(), 1), (certificate.clone(), 1), (next.clone(), 2), (format!("{certificate}{next}"), 2)];
        for (bundle, roots) in cases {
            assert_eq!(Wanted::parse(&certificate, &key, &bundle, now).unwrap().roots().count(), roots);
        }
    }
}
