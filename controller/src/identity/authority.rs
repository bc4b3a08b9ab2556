//! What signs certificates, and what they may end in.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::{Api, Client, api::PostParams};
use rcgen::{
    CertificateParams, DistinguishedName, DnType, DnValue, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose,
    PublicKeyData, SanType, SerialNumber, date_time_ymd,
};
use rustls_pki_types::CertificateDer;
use sluice_crds::labels;
use sluice_xds::{PodSubject, SpiffeId};
use tokio::sync::watch;

use super::{
    IdentityError,
    root::{self, CA_SECRET, Root, Wanted},
    trust::{self, Times, Trust},
};

/// Certificates are valid from a little before they are made: clocks of nodes differ.
pub(super) const BACKDATE: Duration = Duration::from_secs(5 * 60);
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

/// The certificate authority. Its root may be replaced while it works: see [`trust`].
pub struct Authority {
    trust_domain: String,
    times: Times,
    state: watch::Sender<State>,
    /// Of `state`: what a peer's chain may end in, PEM.
    bundle: watch::Sender<Arc<str>>,
}

#[derive(Clone)]
struct State {
    wanted: Wanted,
    /// What signs; `None` in a replica that knows only a root that the proxies do not know yet.
    signs: Option<Arc<Root>>,
    /// As published.
    trust: Trust,
}

impl State {
    /// Everything that a peer's chain may end in: what signs, what is published, and what will be.
    fn roots(&self) -> Vec<CertificateDer<'static>> {
        let mut roots: Vec<CertificateDer<'static>> = Vec::new();
        let signs = self.signs.iter().map(|root| &root.certificate);
        for root in signs.chain(self.wanted.roots()).chain(self.trust.roots()) {
            if !roots.contains(root) {
                roots.push(root.clone());
            }
        }
        roots
    }
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("trust_domain", &self.trust_domain).finish_non_exhaustive()
    }
}

impl Authority {
    /// Reads the root from its Secret; makes one if there is none. Any number of replicas may do so at once: all but one
    /// find that the Secret exists, and read it.
    ///
    /// # Errors
    /// If the Secret can neither be read nor created, or what it holds is no usable root; or if what proxies trust cannot be
    /// read.
    pub async fn open(
        client: &Client,
        namespace: &str,
        trust_domain: &str,
        times: Times,
    ) -> Result<Self, IdentityError> {
        let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
        let failed = |action| {
            let namespace = namespace.to_owned();
            move |source| IdentityError::Secret { action, namespace, source: Box::new(source) }
        };
        let unusable = |why: String| IdentityError::Root { namespace: namespace.to_owned(), why };
        let found = match deadline(secrets.get_opt(CA_SECRET)).await.map_err(failed("read"))? {
            Some(found) => found,
            None => {
                let root = root::new(trust_domain, Timestamp::now()).map_err(|why| unusable(why.to_string()))?;
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
        let now = Timestamp::now();
        let wanted = Wanted::read(&found, now).map_err(unusable)?;
        let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
        let published = deadline(maps.get_opt(labels::TRUST_BUNDLE)).await;
        let published = published
            .map_err(|source| IdentityError::Trust { namespace: namespace.to_owned(), source: Box::new(source) })?;
        let trust = published.as_ref().map(Trust::read).unwrap_or_default();
        if published.is_some() && trust.is_empty() {
            tracing::warn!(
                "ConfigMap {namespace}/{} holds no certificates: it is written anew, and a root that is being replaced is forgotten",
                labels::TRUST_BUNDLE
            );
        }
        Ok(Self::new(wanted, trust, trust_domain, times, now))
    }

    fn new(wanted: Wanted, trust: Trust, trust_domain: &str, times: Times, now: Timestamp) -> Self {
        let signs = trust.may_sign(&wanted.signer.certificate, now, times).then(|| Arc::clone(&wanted.signer));
        if signs.is_none() {
            tracing::warn!(
                "the root in Secret {CA_SECRET} is new to the proxies, and the one before it is not here any more: no certificate is \
                 signed by this replica until they know it, in {:?} at most",
                times.spread
            );
        }
        let state = State { wanted, signs, trust };
        let bundle = watch::Sender::new(trust::pem(state.roots().iter()).into());
        Self { trust_domain: trust_domain.to_owned(), times, state: watch::Sender::new(state), bundle }
    }

    #[cfg(test)]
    pub(super) fn for_tests(trust_domain: &str, life: Duration) -> Self {
        #![allow(clippy::unwrap_used)]
        let now = Timestamp::now();
        let wanted = Wanted::read(&root::new(trust_domain, now).unwrap(), now).unwrap();
        Self::new(wanted, Trust::default(), trust_domain, Times { life, spread: Duration::from_secs(300) }, now)
    }

    #[cfg(test)]
    pub(super) fn wanted(&self) -> Wanted {
        self.state.borrow().wanted.clone()
    }

    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// Everything that a peer's chain may end in, PEM.
    pub fn bundle(&self) -> watch::Receiver<Arc<str>> {
        self.bundle.subscribe()
    }

    /// The same, DER.
    pub fn roots(&self) -> Vec<CertificateDer<'static>> {
        self.state.borrow().roots()
    }

    /// When the root ends that signs here.
    #[must_use]
    pub fn root_expires(&self) -> Timestamp {
        self.own_signer().not_after
    }

    /// Tells when a root is asked for, published, or signs that was not before. Nothing is to be read in it.
    pub fn changes(&self) -> watch::Receiver<impl Sized + use<>> {
        self.state.subscribe()
    }

    /// Whether it is for us to make another root: the one that Secret `sluice-ca` had is ours, and old, or the Secret is gone.
    pub(super) fn needs_root(&self, gone: bool, now: Timestamp) -> bool {
        let state = self.state.borrow();
        (gone && state.wanted.ours) || state.wanted.is_old(now)
    }

    /// The Secret has another content.
    pub(super) fn want(&self, wanted: Wanted, now: Timestamp) {
        let same = self.state.borrow().wanted.roots().eq(wanted.roots());
        if same {
            self.state.send_if_modified(|state| {
                state.wanted.ours = wanted.ours;
                false
            });
        } else {
            tracing::info!(
                fingerprint = trust::fingerprint(&wanted.signer.certificate),
                "Secret {CA_SECRET} has another root; it is made known to the proxies before it signs"
            );
            self.change(now, |state| state.wanted = wanted);
        }
    }

    /// From the publication of a root to its first signature.
    pub(super) fn spread(&self) -> Duration {
        self.times.spread
    }

    /// What should be published. A new root waits for the namespaces in `behind`, whose copy could not be written: proxies there would
    /// refuse what it signs. Not where nothing else could sign: then nobody would get a certificate.
    pub(super) fn next_trust(&self, behind: &BTreeSet<String>, now: Timestamp) -> Trust {
        let state = self.state.borrow();
        let next = state.trust.advance(state.wanted.roots(), now, self.times);
        if behind.is_empty() || state.signs.is_none() {
            return next;
        }
        let waiting = next.clone().wait_on(now, self.times);
        if waiting != next {
            tracing::warn!(
                namespaces = ?behind,
                "a new root waits, for a day at most, before it signs: ConfigMap {} does not get there, and proxies there would refuse it",
                labels::TRUST_BUNDLE
            );
        }
        waiting
    }

    /// When that is next something else than at `looked`, or another root may sign: then [`Self::look`] is to be called.
    pub(super) fn due(&self, looked: Timestamp) -> Option<Timestamp> {
        self.state.borrow().trust.due(looked, self.times)
    }

    /// What is published now.
    pub(super) fn published(&self, trust: Trust, now: Timestamp) {
        self.change(now, |state| state.trust = trust);
    }

    /// Time has gone on.
    pub(super) fn look(&self, now: Timestamp) {
        self.change(now, |_| ());
    }

    fn change(&self, now: Timestamp, change: impl FnOnce(&mut State)) {
        self.state.send_if_modified(|state| {
            let before = state.clone();
            change(state);
            if state.trust.may_sign(&state.wanted.signer.certificate, now, self.times) {
                state.signs = Some(Arc::clone(&state.wanted.signer));
            }
            let certificate = |state: &State| state.signs.as_ref().map(|root| root.certificate.clone());
            let signs = certificate(state);
            if signs != certificate(&before)
                && let Some(root) = &signs
            {
                tracing::info!(fingerprint = trust::fingerprint(root), "the root that signs from now on");
            }
            signs != certificate(&before)
                || state.trust != before.trust
                || !state.wanted.roots().eq(before.wanted.roots())
        });
        let bundle: Arc<str> = trust::pem(self.roots().iter()).into();
        self.bundle.send_if_modified(|before| {
            let differs = *before != bundle;
            *before = bundle;
            differs
        });
    }

    /// Signs `key` for `subject`, from five minutes before `now` for the set life, but never longer than the root lives.
    ///
    /// # Errors
    /// If `subject` cannot be written into a certificate, or the proxies do not know the only root that is here.
    pub fn issue(&self, key: &impl PublicKeyData, subject: &Subject, now: Timestamp) -> Result<Issued, IdentityError> {
        let signs = self.state.borrow().signs.clone();
        let root = signs.ok_or(IdentityError::NotKnownYet { spread: self.times.spread })?;
        self.issue_by(&root, key, subject, now)
    }

    /// The same for this controller itself, which has to show something: a proxy that does not know the root yet goes to another
    /// replica, or waits. Also the root that signed.
    pub(super) fn issue_own(
        &self,
        key: &impl PublicKeyData,
        subject: &Subject,
        now: Timestamp,
    ) -> Result<(Issued, CertificateDer<'static>), IdentityError> {
        let root = self.own_signer();
        Ok((self.issue_by(&root, key, subject, now)?, root.certificate.clone()))
    }

    /// The root that signs for this controller itself.
    pub(super) fn own_signer(&self) -> Arc<Root> {
        let state = self.state.borrow();
        Arc::clone(state.signs.as_ref().unwrap_or(&state.wanted.signer))
    }

    fn issue_by(
        &self,
        root: &Root,
        key: &impl PublicKeyData,
        subject: &Subject,
        now: Timestamp,
    ) -> Result<Issued, IdentityError> {
        let failed = |source| IdentityError::Issue { subject: subject.pod.common_name(), source };
        let not_before = now - BACKDATE;
        let not_after = (now + self.times.life).min(root.not_after);
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
        let certificate = params.signed_by(key, &root.issuer).map_err(failed)?;
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
pub(super) fn random_serial() -> Result<[u8; 16], rcgen::Error> {
    let mut serial = [0; 16];
    rustls::crypto::aws_lc_rs::default_provider()
        .secure_random
        .fill(&mut serial)
        .map_err(|_| rcgen::Error::RingUnspecified)?;
    serial[0] = serial[0] & 0x7f | 0x40;
    Ok(serial)
}

pub(super) fn since_1970(at: Timestamp) -> Duration {
    Duration::from_secs(u64::try_from(at.as_second()).unwrap_or_default())
}

async fn deadline<T>(call: impl Future<Output = kube::Result<T>>) -> kube::Result<T> {
    tokio::time::timeout(CALL, call).await.unwrap_or_else(|_| Err(kube::Error::Service("no answer within 10 s".into())))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
    use rustls_pki_types::pem::PemObject;

    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 3600);
    const TIMES: Times = Times { life: DAY, spread: Duration::from_secs(300) };

    fn wanted(now: Timestamp) -> Wanted {
        Wanted::read(&root::new("cluster.local", now).unwrap(), now).unwrap()
    }

    fn issue(authority: &Authority, now: Timestamp) -> Result<Issued, IdentityError> {
        let subject = Subject {
            id: SpiffeId::new("cluster.local", "shop", "web").unwrap(),
            pod: PodSubject { namespace: "shop".to_owned(), pod: "web-0".to_owned(), uid: "5f0c".to_owned() },
            dns_names: Vec::new(),
        };
        authority.issue(&KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap(), &subject, now)
    }

    /// Every namespace has its copy.
    fn told() -> BTreeSet<String> {
        BTreeSet::new()
    }

    fn signed_by(issued: &Issued, root: &Root) -> bool {
        use x509_parser::prelude::{FromDer, X509Certificate};
        let (_, leaf) = X509Certificate::from_der(&issued.certificate).unwrap();
        let (_, root) = X509Certificate::from_der(&root.certificate).unwrap();
        leaf.verify_signature(Some(root.public_key())).is_ok()
    }

    #[test]
    fn the_bundle_has_every_root_once_and_the_signing_one_always() {
        let now = Timestamp::now();
        let (one, next) = (wanted(now), wanted(now));
        let next_pem = trust::pem(next.roots());
        let both = Wanted { beside: vec![next.signer.certificate.clone()], ..one.clone() };
        for (wanted, count) in [(one.clone(), 1), (both, 2)] {
            let authority = Authority::new(wanted, Trust::default(), "cluster.local", TIMES, now);
            let pem = authority.bundle().borrow().clone();
            let parsed: Vec<_> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>().unwrap();
            assert_eq!((parsed.len(), authority.roots().len()), (count, count));
            assert!(parsed.contains(&one.signer.certificate));
            assert_eq!(pem.contains(next_pem.trim()), count == 2);
        }
    }

    #[test]
    fn no_certificate_outlives_the_root() {
        let now = Timestamp::now();
        let authority = Authority::for_tests("cluster.local", 20 * 365 * DAY);
        assert!(issue(&authority, now).unwrap().not_after <= now + 11 * 365 * DAY);
    }

    #[test]
    fn another_root_is_published_first_and_signs_when_it_is_known() {
        let now = Timestamp::from_second(Timestamp::now().as_second()).unwrap();
        let (old, new) = (wanted(now), wanted(now));
        let authority = Authority::new(old.clone(), Trust::default(), "cluster.local", TIMES, now);
        authority.published(authority.next_trust(&told(), now), now);
        assert!(signed_by(&issue(&authority, now).unwrap(), &old.signer));

        let bundle = authority.bundle();
        authority.want(new.clone(), now);
        assert!(signed_by(&issue(&authority, now).unwrap(), &old.signer), "it is not even published");
        authority.published(authority.next_trust(&told(), now), now);
        assert!(signed_by(&issue(&authority, now).unwrap(), &old.signer), "it is not known yet");
        assert!(bundle.has_changed().unwrap() && authority.roots().len() == 2);
        assert_eq!(authority.due(now), Some(now + TIMES.spread));

        // A replica that starts now has the new root only.
        let late = Authority::new(new.clone(), authority.next_trust(&told(), now), "cluster.local", TIMES, now);
        let refused = issue(&late, now).unwrap_err();
        assert!(matches!(refused, IdentityError::NotKnownYet { .. }), "{refused}");

        for authority in [&authority, &late] {
            let known = now + TIMES.spread;
            authority.published(authority.next_trust(&told(), known), known);
            assert!(signed_by(&issue(authority, known).unwrap(), &new.signer));
            assert_eq!(authority.roots().len(), 2, "what the old one signed is trusted on");
            let over = authority.due(known).unwrap();
            assert!(over >= known + DAY);
            authority.published(authority.next_trust(&told(), over), over);
            assert_eq!((authority.roots(), authority.due(over)), (vec![new.signer.certificate.clone()], None));
        }
    }

    #[test]
    fn a_new_root_waits_for_namespaces_that_do_not_get_it_while_the_former_one_can_sign() {
        let now = Timestamp::from_second(Timestamp::now().as_second()).unwrap();
        let (old, new) = (wanted(now), wanted(now));
        let authority = Authority::new(old.clone(), Trust::default(), "cluster.local", TIMES, now);
        authority.published(authority.next_trust(&told(), now), now);
        authority.want(new.clone(), now);
        authority.published(authority.next_trust(&told(), now), now);
        let late = Authority::new(new.clone(), authority.next_trust(&told(), now), "cluster.local", TIMES, now);

        let behind = BTreeSet::from(["shop".to_owned()]);
        let (retried, known) = (now + TIMES.spread / 2, now + TIMES.spread);
        for authority in [&authority, &late] {
            authority.published(authority.next_trust(&behind, retried), retried);
            authority.look(known);
        }
        assert!(signed_by(&issue(&authority, known).unwrap(), &old.signer));
        assert!(signed_by(&issue(&late, known).unwrap(), &new.signer), "it has no other");

        authority.look(retried + TIMES.spread);
        assert!(signed_by(&issue(&authority, known).unwrap(), &new.signer), "they have got it");
    }

    #[test]
    fn only_a_root_of_our_own_is_replaced_by_ourselves() {
        let now = Timestamp::now();
        let nine_years = 9 * 365 * DAY + DAY;
        for (ours, gone, at, expected) in [
            (true, false, now, false),
            (true, true, now, true),
            (true, false, now + nine_years, true),
            (false, true, now, false),
            (false, false, now + nine_years, false),
        ] {
            let wanted = Wanted { ours, ..wanted(now) };
            let authority = Authority::new(wanted, Trust::default(), "cluster.local", TIMES, now);
            assert_eq!(authority.needs_root(gone, at), expected, "ours {ours}, gone {gone}");
        }
    }
}
