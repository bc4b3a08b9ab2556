//! Which roots proxies trust, and from when and until when: pure. It is the content of ConfigMap `sluice-trust-bundle`, so
//! that every replica, and the next leader, goes on where the last one was.
//!
//! A root is replaced in two phases. It signs only when every proxy has had the time to read of it; and the one before it is
//! trusted for as long as anything that it signed may live.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::ResourceExt as _;
use rustls_pki_types::{CertificateDer, pem::PemObject};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use sluice_crds::labels;

/// Key of the ConfigMap.
pub(super) const BUNDLE: &str = "ca.crt";
/// Clocks of nodes differ, and a replica may sign with the former root until its watch tells it of the new one.
const SLACK: Duration = Duration::from_secs(300);
/// For so long a new root waits for namespaces that do not take it: one of them must not keep all others from a new root for ever.
const LONGEST_WAIT: Duration = Duration::from_secs(24 * 3600);

/// How long what takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    /// Life of the certificates of proxies.
    pub life: Duration,
    /// From the publication of a root to its first signature.
    pub spread: Duration,
}

impl Times {
    /// From the publication of a root to the end of the last certificate that the one before it signed.
    fn until_unused(self) -> Duration {
        self.spread + self.life + SLACK.min(self.life)
    }
}

/// The roots that proxies trust.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Trust(Vec<Trusted>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Trusted {
    root: CertificateDer<'static>,
    span: Span,
}

/// What is said of a root while another replaces it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Span {
    /// Published then: not every proxy may know it yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    since: Option<Timestamp>,
    /// Where it waits on ([`Trust::wait_on`]): published first then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    first: Option<Timestamp>,
    /// It signs no more, and is forgotten then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    until: Option<Timestamp>,
}

impl Trust {
    /// Reads what is published. Something that is no bundle is none: it trusts nobody.
    pub(super) fn read(map: &ConfigMap) -> Self {
        let pem = map.data.as_ref().and_then(|data| data.get(BUNDLE)).map_or("", String::as_str);
        let roots: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
        let spans = map.annotations().get(labels::ROOTS).and_then(|json| serde_json::from_str(json).ok());
        let spans: BTreeMap<String, Span> = spans.unwrap_or_default();
        let trusted = |root| Trusted { span: spans.get(&fingerprint(&root)).copied().unwrap_or_default(), root };
        Self(roots.unwrap_or_default().into_iter().map(trusted).collect())
    }

    pub(super) fn roots(&self) -> impl Iterator<Item = &CertificateDer<'static>> {
        self.0.iter().map(|trusted| &trusted.root)
    }

    pub(super) fn pem(&self) -> String {
        pem(self.roots())
    }

    /// Whether nobody is trusted.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The annotation [`labels::ROOTS`].
    pub(super) fn spans(&self) -> String {
        let told = self.0.iter().filter(|trusted| trusted.span != Span::default());
        let spans: BTreeMap<String, Span> = told.map(|trusted| (fingerprint(&trusted.root), trusted.span)).collect();
        // Strings and times: it cannot fail.
        serde_json::to_string(&spans).unwrap_or_default()
    }

    /// What should be published, given the roots that are asked for now.
    pub(super) fn advance<'a>(
        &self,
        wanted: impl Iterator<Item = &'a CertificateDer<'static>>,
        now: Timestamp,
        times: Times,
    ) -> Self {
        // As it is written.
        let now = Timestamp::from_second(now.as_second()).unwrap_or(now);
        let mut next: Vec<Trusted> = Vec::new();
        for root in wanted {
            let span = match self.find(root) {
                Some(span) if span.since.is_some_and(|since| now < since + times.spread) => {
                    Span { until: None, ..span }
                }
                Some(_) => Span::default(),
                // Where nothing is trusted yet, nobody has to be waited for.
                None => Span { since: (!self.0.is_empty()).then_some(now), ..Span::default() },
            };
            next.push(Trusted { root: root.clone(), span });
        }
        for Trusted { root, span } in &self.0 {
            if next.iter().any(|trusted| trusted.root == *root) {
                continue;
            }
            let until = span.until.unwrap_or(now + times.until_unused());
            if now < until {
                next.push(Trusted { root: root.clone(), span: Span { until: Some(until), ..Span::default() } });
            }
        }
        Self(next)
    }

    /// The same where somebody could not be told of a new root: its wait begins anew, and what signs meanwhile is trusted for longer.
    /// Only in the second half of the wait, so that it is seldom written.
    pub(super) fn wait_on(mut self, now: Timestamp, times: Times) -> Self {
        let now = Timestamp::from_second(now.as_second()).unwrap_or(now);
        let mut waits = false;
        for Trusted { span, .. } in &mut self.0 {
            let Some(since) = span.since else { continue };
            let first = span.first.unwrap_or(since);
            if now >= since + times.spread / 2 && now < first + LONGEST_WAIT {
                (span.since, span.first) = (Some(now), Some(first));
                waits = true;
            }
        }
        for until in self.0.iter_mut().filter_map(|trusted| trusted.span.until.as_mut()).filter(|_| waits) {
            *until = (*until).max(now + times.until_unused());
        }
        self
    }

    /// Whether every proxy has had the time to read of this root.
    pub(super) fn may_sign(&self, root: &CertificateDer<'static>, now: Timestamp, times: Times) -> bool {
        match self.find(root) {
            Some(span) => span.since.is_none_or(|since| now >= since + times.spread),
            None => self.0.is_empty(),
        }
    }

    /// When [`Self::advance`] or [`Self::may_sign`] next says something else than at `looked`. What was due then already is not told
    /// again: a replica that does not lead, or whose write failed, would never sleep.
    pub(super) fn due(&self, looked: Timestamp, times: Times) -> Option<Timestamp> {
        self.0
            .iter()
            .flat_map(|trusted| [trusted.span.since.map(|at| at + times.spread), trusted.span.until])
            .flatten()
            .filter(|at| *at > looked)
            .min()
    }

    fn find(&self, root: &CertificateDer<'static>) -> Option<Span> {
        self.0.iter().find(|trusted| trusted.root == *root).map(|trusted| trusted.span)
    }
}

/// PEM of these certificates, one after the other.
pub(super) fn pem<'a>(roots: impl Iterator<Item = &'a CertificateDer<'static>>) -> String {
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    roots.map(|root| pem::encode_config(&pem::Pem::new("CERTIFICATE", root.as_ref()), config)).collect()
}

/// SHA-256 of a certificate, in hex, as `openssl x509 -fingerprint -sha256` shows it without its colons.
pub(super) fn fingerprint(root: &CertificateDer<'_>) -> String {
    Sha256::digest(root).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use jiff::SignedDuration;
    use kube::api::ObjectMeta;

    use super::*;

    const TIMES: Times = Times { life: Duration::from_secs(3600), spread: Duration::from_secs(300) };

    fn root(n: u8) -> CertificateDer<'static> {
        CertificateDer::from(vec![n; 40])
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::UNIX_EPOCH + SignedDuration::from_secs(1_000_000 + seconds)
    }

    /// As it is after having been written and read.
    fn stored(trust: &Trust) -> Trust {
        let annotations = Some(BTreeMap::from([(labels::ROOTS.to_owned(), trust.spans())]));
        Trust::read(&ConfigMap {
            metadata: ObjectMeta { annotations, ..ObjectMeta::default() },
            data: Some(BTreeMap::from([(BUNDLE.to_owned(), trust.pem())])),
            ..ConfigMap::default()
        })
    }

    #[test]
    fn a_root_signs_when_it_is_known_and_the_former_one_is_trusted_until_nothing_of_it_lives() {
        let (old, new) = (root(1), root(2));
        let first = stored(&Trust::default().advance([&old].into_iter(), at(0), TIMES));
        assert!(Trust::default().may_sign(&old, at(0), TIMES) && first.may_sign(&old, at(0), TIMES));
        assert_eq!((first.spans().as_str(), first.due(at(0), TIMES)), ("{}", None), "nobody is waited for");

        let both = stored(&first.advance([&new].into_iter(), at(10), TIMES));
        assert_eq!(both.roots().collect::<Vec<_>>(), [&new, &old]);
        assert!(!both.may_sign(&new, at(309), TIMES) && both.may_sign(&new, at(310), TIMES));
        assert_eq!(both.due(at(10), TIMES), Some(at(310)));
        assert_eq!(both.due(at(310), TIMES), Some(at(10 + 300 + 3600 + 300)), "not what is due already");
        assert_eq!(stored(&both.advance([&new].into_iter(), at(200), TIMES)), both, "nothing is written in between");

        let signing = stored(&both.advance([&new].into_iter(), at(310), TIMES));
        // Published at 10, signing from 310, the last certificate of the old one ends at 3910 at the latest.
        assert_eq!(signing.due(at(310), TIMES), Some(at(10 + 300 + 3600 + 300)));
        assert_eq!(signing.roots().count(), 2);
        let last = stored(&signing.advance([&new].into_iter(), at(10 + 300 + 3600 + 300), TIMES));
        assert_eq!((last.roots().collect::<Vec<_>>(), last.due(at(0), TIMES)), (vec![&new], None));
    }

    #[test]
    fn a_root_waits_on_for_whom_could_not_be_told_of_it_but_for_a_day_at_most() {
        let (old, new) = (root(1), root(2));
        let first = Trust::default().advance([&old].into_iter(), at(0), TIMES);
        let both = first.advance([&new].into_iter(), at(0), TIMES);
        assert_eq!(both.clone().wait_on(at(149), TIMES), both, "there is time yet");
        let later = stored(&both.wait_on(at(150), TIMES));
        assert!(!later.may_sign(&new, at(449), TIMES) && later.may_sign(&new, at(450), TIMES));
        assert_eq!(later.due(at(450), TIMES), Some(at(150 + 300 + 3600 + 300)), "the old one signs on until then");

        let (mut trust, mut now) = (later, 150);
        while !trust.may_sign(&new, at(now), TIMES) {
            now += 10;
            trust = stored(&trust.advance([&new].into_iter(), at(now), TIMES).wait_on(at(now), TIMES));
        }
        assert!((86_400..86_400 + 300).contains(&now), "{now}");
        assert!(trust.due(at(now), TIMES) >= Some(at(now + 3600)) && trust.roots().count() == 2);
    }

    #[test]
    fn a_root_that_comes_back_is_trusted_as_before() {
        let (old, new) = (root(1), root(2));
        let first = Trust::default().advance([&old].into_iter(), at(0), TIMES);
        let both = first.advance([&new].into_iter(), at(10), TIMES);
        let back = both.advance([&old].into_iter(), at(20), TIMES);
        assert!(back.may_sign(&old, at(20), TIMES));
        assert_eq!(back.roots().collect::<Vec<_>>(), [&old, &new]);
        assert!(back.advance([&old].into_iter(), at(20 + 4200), TIMES).roots().eq([&old]));
    }

    #[test]
    fn what_is_no_bundle_trusts_nobody() {
        let map = |text: &str| ConfigMap {
            data: Some(BTreeMap::from([(BUNDLE.to_owned(), text.to_owned())])),
            ..ConfigMap::default()
        };
        assert_eq!(Trust::read(&map("edited")), Trust::default());
        assert_eq!(Trust::read(&map("-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n")), Trust::default());
        assert_eq!(Trust::read(&ConfigMap::default()), Trust::default());
    }
}
