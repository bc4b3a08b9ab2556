//! Names in certificates: the SPIFFE id that says *which workload* a peer is, and the subject that says which Pod.

use std::{fmt, str::FromStr};

const SCHEME: &str = "spiffe://";

/// `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`, the one URI SAN of each certificate.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    trust_domain: String,
    namespace: String,
    service_account: String,
}

impl SpiffeId {
    /// # Errors
    /// If a part could not stand in such an id: the trust domain is lower-case letters, digits, `.`, `-` and `_`
    /// (SPIFFE-ID, 2.1), the others are Kubernetes names.
    pub fn new(
        trust_domain: impl Into<String>,
        namespace: impl Into<String>,
        service_account: impl Into<String>,
    ) -> Result<Self, SpiffeError> {
        let id = Self {
            trust_domain: trust_domain.into(),
            namespace: namespace.into(),
            service_account: service_account.into(),
        };
        let valid = |part: &str, extra: &[u8]| {
            !part.is_empty()
                && part.len() <= 253
                && part
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || extra.contains(&b))
                // A dot segment has no place in the path of an id (SPIFFE-ID, 2.2).
                && !part.bytes().all(|b| b == b'.')
        };
        if valid(&id.trust_domain, b".-_") && valid(&id.namespace, b"-") && valid(&id.service_account, b".-") {
            Ok(id)
        } else {
            Err(SpiffeError(id.to_string()))
        }
    }

    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    pub fn service_account(&self) -> &str {
        &self.service_account
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { trust_domain, namespace, service_account } = self;
        write!(f, "{SCHEME}{trust_domain}/ns/{namespace}/sa/{service_account}")
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeError;

    fn from_str(text: &str) -> Result<Self, SpiffeError> {
        let parts: Vec<&str> = text.strip_prefix(SCHEME).unwrap_or_default().split('/').collect();
        match parts.as_slice() {
            [trust_domain, "ns", namespace, "sa", service_account] => {
                Self::new(*trust_domain, *namespace, *service_account)
            }
            _ => Err(SpiffeError(text.to_owned())),
        }
    }
}

/// A text that is no SPIFFE id of the form that we give out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpiffeError(String);

impl fmt::Display for SpiffeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "'{}' is not spiffe://<trust domain>/ns/<namespace>/sa/<service account>", self.0.escape_debug())
    }
}

impl std::error::Error for SpiffeError {}

/// The subject of a proxy's certificate: commonName `<namespace>/<pod>`, serialNumber (OID 2.5.4.5) the Pod's uid. The
/// controller writes it from the TokenReview, so it can be believed; the CSR's own subject is ignored.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodSubject {
    pub namespace: String,
    pub pod: String,
    pub uid: String,
}

impl PodSubject {
    /// What stands in the commonName. It may be longer than the 64 characters of RFC 5280, ub-common-name: names of
    /// Pods go up to 253, and both ends are ours.
    pub fn common_name(&self) -> String {
        format!("{}/{}", self.namespace, self.pod)
    }

    /// Reads the two attributes; `None` if they are not of this form.
    pub fn parse(common_name: &str, serial_number: &str) -> Option<Self> {
        let (namespace, pod) = common_name.split_once('/')?;
        let complete = !namespace.is_empty() && !pod.is_empty() && !pod.contains('/') && !serial_number.is_empty();
        complete.then(|| Self { namespace: namespace.to_owned(), pod: pod.to_owned(), uid: serial_number.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn an_id_prints_as_it_was_read() {
        let text = "spiffe://cluster.local/ns/shop/sa/web.v2";
        let id: SpiffeId = text.parse().unwrap();
        assert_eq!(id.to_string(), text);
        assert_eq!((id.trust_domain(), id.namespace(), id.service_account()), ("cluster.local", "shop", "web.v2"));
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            "spiffe://",
            "https://cluster.local/ns/shop/sa/web",
            "spiffe:///ns/shop/sa/web",
            "spiffe://cluster.local/ns//sa/web",
            "spiffe://cluster.local/ns/shop/sa/web/more",
            "spiffe://cluster.local/ns/shop/sa/..",
            "spiffe://Cluster.local/ns/shop/sa/web",
            "spiffe://cluster.local/sa/shop/ns/web",
            "spiffe://cluster.local/ns/shop/sa/we b",
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_subject_is_read_back_from_its_attributes() {
        let subject = PodSubject { namespace: "shop".to_owned(), pod: "web-0".to_owned(), uid: "5f0c".to_owned() };
        assert_eq!(PodSubject::parse(&subject.common_name(), "5f0c"), Some(subject));
        for (name, serial) in [("web-0", "5f0c"), ("/web-0", "5f0c"), ("a/b/c", "5f0c"), ("a/b", "")] {
            assert_eq!(PodSubject::parse(name, serial), None);
        }
    }
}
