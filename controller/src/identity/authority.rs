//! The root certificate and what it signs.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::{
    Api,
    api::{ObjectMeta, PostParams},
};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DistinguishedName, DnType, DnValue, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber,
    date_time_ymd,
};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use sluice_xds::{PodSubject, SpiffeId};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::IdentityError;

/// Secret in the release namespace with the root: `tls.crt`, `tls.key`, and in `ca.crt` everything that a peer's chain may
/// end in (the root itself, and others while one root replaces another).
pub const CA_SECRET: &str = "sluice-ca";

const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";
const BUNDLE: &str = "ca.crt";

/// Certificates are valid from a little before they are made: clocks of nodes differ.
const BACKDATE: Duration = Duration::from_secs(5 * 60);
const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Deadline of a call to the API server.
const CALL: Duration = Duration::from_secs(10);

/// Whom a certificate names.
#[derive(Debug, Clone)]
pub struct Subject {
    pub id: SpiffeId,
    pub pod: PodSubject,
    /// For clients that check a name instead of the SPIFFE id; only the controller's own certificate has some.
    pub dns_names: Vec<String>,
}

/// A new certificate.
#[derive(Debug, Clone)]
pub struct Issued {
    pub certificate: CertificateDer<'static>,
    /// The chain, leaf first, without the root.
    pub chain_pem: String,
    pub not_before: Timestamp,
    pub not_after: Timestamp,
    /// In hex, for the log.
    pub serial: String,
}

/// The certificate authority. Cheap to use from any number of tasks: nothing in it changes.
pub struct Authority {
    trust_domain: String,
    life: Duration,
    issuer: Issuer<'static, KeyPair>,
    roots: Vec<CertificateDer<'static>>,
    bundle_pem: String,
    not_after: Timestamp,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority")
            .field("trust_domain", &self.trust_domain)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

impl Authority {
    /// Reads the root from its Secret; makes one if there is none. Any number of replicas may do so at once: all but one
    /// find that the Secret exists, and read it.
    ///
    /// `life` is that of the certificates that it will sign.
    ///
    /// # Errors
    /// If the Secret can neither be read nor created, or what it holds is no usable root.
    pub async fn open(
        secrets: &Api<Secret>,
        namespace: &str,
        trust_domain: &str,
        life: Duration,
    ) -> Result<Self, IdentityError> {
        let failed = |action| {
            let namespace = namespace.to_owned();
            move |source| IdentityError::Secret { action, namespace, source: Box::new(source) }
        };
        let unusable = |why: String| IdentityError::Root { namespace: namespace.to_owned(), why };
        let found = match deadline(secrets.get_opt(CA_SECRET)).await.map_err(failed("read"))? {
            Some(found) => found,
            None => {
                let root = new_root(trust_domain, Timestamp::now()).map_err(|why| unusable(why.to_string()))?;
                match deadline(secrets.create(&PostParams::default(), &root)).await {
                    Ok(created) => {
                        tracing::info!("made a root certificate in Secret {namespace}/{CA_SECRET}");
                        created
                    }
                    Err(kube::Error::Api(status)) if status.is_already_exists() => {
                        deadline(secrets.get(CA_SECRET)).await.map_err(failed("read"))?
                    }
                    Err(source) => return Err(failed("create")(source)),
                }
            }
        };
        let data = found.data.unwrap_or_default();
        let text = |key: &str| {
            let bytes = &data.get(key).ok_or_else(|| format!("it has no {key}"))?.0;
            std::str::from_utf8(bytes).map_err(|_| format!("its {key} is not PEM"))
        };
        let bundle = data.contains_key(BUNDLE).then(|| text(BUNDLE)).transpose();
        let parts = text(CERTIFICATE).and_then(|c| Ok((c, text(KEY)?, bundle?.unwrap_or_default())));
        let (certificate, key, bundle) = parts.map_err(unusable)?;
        Self::new(certificate, key, bundle, trust_domain, life, Timestamp::now()).map_err(unusable)
    }

    /// `bundle`: further roots, PEM, may be empty.
    fn new(
        certificate: &str,
        key: &str,
        bundle: &str,
        trust_domain: &str,
        life: Duration,
        now: Timestamp,
    ) -> Result<Self, String> {
        let key = KeyPair::from_pem(key).map_err(|e| format!("{KEY} is not a private key in PKCS#8: {e}"))?;
        let root = CertificateDer::from_pem_slice(certificate.as_bytes())
            .map_err(|e| format!("{CERTIFICATE} is not a PEM certificate: {e}"))?;
        let not_after = check_root(&root, &key, now)?;
        let issuer = Issuer::from_ca_cert_der(&root, key).map_err(|e| format!("{CERTIFICATE} cannot be read: {e}"))?;
        let mut roots: Vec<_> = CertificateDer::pem_slice_iter(bundle.as_bytes())
            .collect::<Result<_, _>>()
            .map_err(|e| format!("{BUNDLE} is not a list of PEM certificates: {e}"))?;
        let mut bundle_pem = bundle.to_owned();
        if !roots.contains(&root) {
            bundle_pem = format!("{}\n{bundle}", certificate.trim_end());
            roots.push(root);
        }
        Ok(Self { trust_domain: trust_domain.to_owned(), life, issuer, roots, bundle_pem, not_after })
    }

    #[cfg(test)]
    pub(super) fn for_tests(trust_domain: &str, life: Duration) -> Self {
        #![allow(clippy::unwrap_used)]
        let now = Timestamp::now();
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let root = root_certificate(&key, trust_domain, now).unwrap();
        Self::new(&root.pem(), &key.serialize_pem(), "", trust_domain, life, now).unwrap()
    }

    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// Everything that a peer's chain may end in, PEM.
    pub fn bundle_pem(&self) -> &str {
        &self.bundle_pem
    }

    /// The same, DER.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// Signs `key` for `subject`, from five minutes before `now` for the set life, but never longer than the root lives.
    ///
    /// # Errors
    /// If `subject` cannot be written into a certificate.
    pub fn issue(&self, key: &impl PublicKeyData, subject: &Subject, now: Timestamp) -> Result<Issued, IdentityError> {
        let failed = |source| IdentityError::Issue { subject: subject.pod.common_name(), source };
        let not_before = now - BACKDATE;
        let not_after = (now + self.life).min(self.not_after);
        let serial = random_serial().map_err(failed)?;
        let mut params = CertificateParams::default();
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        params.distinguished_name = subject_name(&subject.pod).map_err(failed)?;
        params.subject_alt_names = vec![SanType::URI(subject.id.to_string().try_into().map_err(failed)?)];
        for name in &subject.dns_names {
            let name = name.as_str().try_into().map_err(failed)?;
            params.subject_alt_names.push(SanType::DnsName(name));
        }
        params.not_before = date_time_ymd(1970, 1, 1) + since_1970(not_before);
        params.not_after = date_time_ymd(1970, 1, 1) + since_1970(not_after);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(key, &self.issuer).map_err(failed)?;
        Ok(Issued {
            certificate: certificate.der().clone(),
            chain_pem: certificate.pem(),
            not_before,
            not_after,
            serial: serial.iter().map(|byte| format!("{byte:02x}")).collect(),
        })
    }
}

/// Both ends of a proxy's identity go into its subject; see [`PodSubject`].
fn subject_name(pod: &PodSubject) -> Result<DistinguishedName, rcgen::Error> {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, pod.common_name());
    // serialNumber is a PrintableString (RFC 5280, appendix A.1).
    let uid = DnValue::PrintableString(pod.uid.as_str().try_into()?);
    name.push(DnType::CustomDnType(vec![2, 5, 4, 5]), uid);
    Ok(name)
}

/// 127 random bits: at most 20 octets, positive, not zero (RFC 5280, 4.1.2.2).
fn random_serial() -> Result<[u8; 16], rcgen::Error> {
    let mut serial = [0; 16];
    rustls::crypto::aws_lc_rs::default_provider()
        .secure_random
        .fill(&mut serial)
        .map_err(|_| rcgen::Error::RingUnspecified)?;
    serial[0] = serial[0] & 0x7f | 0x40;
    Ok(serial)
}

fn new_root(trust_domain: &str, now: Timestamp) -> Result<Secret, rcgen::Error> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let certificate = root_certificate(&key, trust_domain, now)?.pem();
    let data = [(CERTIFICATE, certificate.clone()), (BUNDLE, certificate), (KEY, key.serialize_pem())];
    Ok(Secret {
        metadata: ObjectMeta {
            name: Some(CA_SECRET.to_owned()),
            labels: Some(BTreeMap::from([(
                "app.kubernetes.io/managed-by".to_owned(),
                sluice_crds::labels::FIELD_MANAGER.to_owned(),
            )])),
            ..ObjectMeta::default()
        },
        type_: Some("kubernetes.io/tls".to_owned()),
        data: Some(data.into_iter().map(|(key, value)| (key.to_owned(), ByteString(value.into_bytes()))).collect()),
        ..Secret::default()
    })
}

fn root_certificate(key: &KeyPair, trust_domain: &str, now: Timestamp) -> Result<Certificate, rcgen::Error> {
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
fn check_root(root: &[u8], key: &KeyPair, now: Timestamp) -> Result<Timestamp, String> {
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

fn since_1970(at: Timestamp) -> Duration {
    Duration::from_secs(u64::try_from(at.as_second()).unwrap_or_default())
}

async fn deadline<T>(call: impl Future<Output = kube::Result<T>>) -> kube::Result<T> {
    tokio::time::timeout(CALL, call).await.unwrap_or_else(|_| Err(kube::Error::Service("no answer within 10 s".into())))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn root(now: Timestamp) -> (String, String) {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let root = root_certificate(&key, "cluster.local", now).unwrap();
        (root.pem(), key.serialize_pem())
    }

    fn open(certificate: &str, key: &str, bundle: &str) -> Result<Authority, String> {
        let day = Duration::from_secs(24 * 3600);
        Authority::new(certificate, key, bundle, "cluster.local", day, Timestamp::now())
    }

    #[test]
    fn a_root_that_cannot_sign_is_refused_with_the_reason() {
        let now = Timestamp::now();
        let (certificate, key) = root(now);
        assert!(open(&certificate, &key, "").is_ok());
        let (other, other_key) = root(now - 11 * ROOT_LIFE / 10);
        for (certificate, key, bundle, words) in [
            (certificate.as_str(), other_key.as_str(), "", "is not the key of"),
            (&other, &other_key, "", "is valid from"),
            ("", &key, "", "is not a PEM certificate"),
            (&certificate, "", "", "is not a private key"),
            (&certificate, &key, "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n", "is not a list of PEM"),
        ] {
            let why = open(certificate, key, bundle).map(|_| ()).unwrap_err();
            assert!(why.contains(words), "{words}: {why}");
        }
    }

    #[test]
    fn the_bundle_has_every_root_once_and_the_signing_one_always() {
        let now = Timestamp::now();
        let ((certificate, key), (next, _)) = (root(now), root(now));
        let cases =
            [(String::new(), 1), (certificate.clone(), 1), (next.clone(), 2), (format!("{certificate}{next}"), 2)];
        for (bundle, roots) in cases {
            let authority = open(&certificate, &key, &bundle).unwrap();
            let pem = authority.bundle_pem().as_bytes();
            let parsed: Vec<_> = CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().unwrap();
            assert_eq!((parsed.len(), authority.roots().len()), (roots, roots));
            let own = CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap();
            assert!(parsed.contains(&own) && authority.roots().contains(&own));
        }
    }

    #[test]
    fn no_certificate_outlives_the_root() {
        let now = Timestamp::now();
        let (certificate, key) = root(now - (ROOT_LIFE - Duration::from_secs(60)));
        let authority = open(&certificate, &key, "").unwrap();
        let subject = Subject {
            id: SpiffeId::new("cluster.local", "shop", "web").unwrap(),
            pod: PodSubject { namespace: "shop".to_owned(), pod: "web-0".to_owned(), uid: "5f0c".to_owned() },
            dns_names: Vec::new(),
        };
        let leaf = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let issued = authority.issue(&leaf, &subject, now).unwrap();
        assert!(issued.not_after <= now + Duration::from_secs(60));
    }
}
