//! Who is who: the certificate authority, for whom it signs, and the port to which proxies connect (docs/xds.md, "The
//! connection" and "Certificates").
//!
//! Every replica signs: signing needs nothing but the root's key and a TokenReview. Only the leader publishes the trust
//! bundle, and makes roots. A root that is replaced in its Secret (`rotation`) is made known first and signs later (`trust`).

mod authority;
mod bundle;
mod limit;
mod own;
mod root;
mod rotation;
mod server;
mod service;
mod token;
mod trust;

use std::net::SocketAddr;

use jiff::Timestamp;
use sluice_xds::{PodSubject, SpiffeId};
use tonic::Status;
use x509_parser::{
    oid_registry::OID_X509_SERIALNUMBER,
    prelude::{FromDer, GeneralName, X509Certificate},
};

pub use authority::{Authority, Issued, Subject};
pub use bundle::TrustBundle;
pub use own::OwnCertificate;
pub use root::CA_SECRET;
pub use rotation::Rotation;
pub use server::{GrpcPort, ServeError};
pub use service::Certificates;
pub use token::{AUDIENCE, Caller, KubeTokenReviews, TokenError, TokenReviews};
pub use trust::Times;

/// What may go wrong with the authority and with our own certificate.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error(
        "cannot {action} Secret {namespace}/{CA_SECRET} with the root certificate: {source}. Check that the controller's \
         service account may get, and create, Secrets in this namespace"
    )]
    Secret { action: &'static str, namespace: String, source: Box<kube::Error> },
    #[error(
        "the root in Secret {namespace}/{CA_SECRET} cannot be used: {why}. Mend it, or delete the Secret: the controllers make a \
         new root"
    )]
    Root { namespace: String, why: String },
    #[error(
        "cannot read ConfigMap {namespace}/{} with what proxies trust: {source}",
        sluice_crds::labels::TRUST_BUNDLE
    )]
    Trust { namespace: String, source: Box<kube::Error> },
    #[error(
        "the proxies do not know the root certificate yet that this replica has; try another replica, or again within {spread:?}"
    )]
    NotKnownYet { spread: std::time::Duration },
    #[error("cannot make a certificate for {subject}: {source}")]
    Issue { subject: String, source: rcgen::Error },
    #[error("cannot set up TLS with the certificates from Secret {CA_SECRET}: {0}")]
    Tls(String),
}

/// The other end of a connection, as its client certificate says. Only chains that end in the trust bundle come this far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerIdentity {
    /// Namespace and service account.
    pub id: SpiffeId,
    /// The Pod; its namespace is that of `id`.
    pub pod: PodSubject,
    /// End of the certificate's life. A stream that outlives it should be closed: the client comes back with a newer one.
    pub expires: Timestamp,
}

/// A connection to the gRPC port; an extension of each request on it.
#[derive(Debug, Clone)]
pub struct Peer {
    pub address: SocketAddr,
    /// `None` for a client that showed no certificate: it may ask for one, and for nothing else.
    pub identity: Option<PeerIdentity>,
}

impl Peer {
    /// The connection that `request` came over.
    ///
    /// # Errors
    /// INTERNAL if the request did not come through [`GrpcPort`].
    #[allow(clippy::result_large_err)] // tonic's own error type
    pub fn of<T>(request: &tonic::Request<T>) -> Result<&Self, Status> {
        request
            .extensions()
            .get()
            .ok_or_else(|| Status::internal("the request carries no connection: a defect of Sluice"))
    }

    /// Who asks.
    ///
    /// # Errors
    /// UNAUTHENTICATED if the client showed no certificate.
    #[allow(clippy::result_large_err)]
    pub fn identity(&self) -> Result<&PeerIdentity, Status> {
        self.identity.as_ref().ok_or_else(|| {
            Status::unauthenticated(
                "this service needs a client certificate: ask \
                 sluice.identity.v1.CertificateService/Sign for one, on this port",
            )
        })
    }
}

/// A client certificate that chains to the trust bundle, but names nobody whom we could serve.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PeerError {
    #[error("the certificate cannot be read")]
    Unreadable,
    #[error("the certificate has {0} URI names instead of one")]
    Uris(usize),
    #[error(transparent)]
    Spiffe(#[from] sluice_xds::SpiffeError),
    #[error("'{found}' is not of the trust domain '{wanted}'")]
    TrustDomain { found: String, wanted: String },
    #[error("the subject is not CN=<namespace>/<pod>, serialNumber=<uid>")]
    Subject,
    #[error("the Pod '{pod}' is not in the namespace of '{id}'")]
    Namespace { pod: String, id: String },
}

impl PeerIdentity {
    /// Reads the identity out of `certificate` (DER), whose chain has been verified.
    ///
    /// # Errors
    /// If it is not exactly of the form that [`Authority`] gives out, or of another trust domain: names are compared as
    /// whole segments after a strict parse, never by pattern.
    pub fn read(certificate: &[u8], trust_domain: &str) -> Result<Self, PeerError> {
        let (rest, certificate) = X509Certificate::from_der(certificate).map_err(|_| PeerError::Unreadable)?;
        if !rest.is_empty() {
            return Err(PeerError::Unreadable);
        }
        let names = certificate.subject_alternative_name().map_err(|_| PeerError::Unreadable)?;
        let uris: Vec<&str> = names
            .iter()
            .flat_map(|names| &names.value.general_names)
            // DNS names and the like do not count.
            .filter_map(|name| if let GeneralName::URI(uri) = name { Some(*uri) } else { None })
            .collect();
        let [uri] = uris.as_slice() else {
            return Err(PeerError::Uris(uris.len()));
        };
        let id: SpiffeId = uri.parse()?;
        if id.trust_domain() != trust_domain {
            return Err(PeerError::TrustDomain { found: id.to_string(), wanted: trust_domain.to_owned() });
        }
        let subject = certificate.subject();
        let mut common_names = subject.iter_common_name();
        let mut serial_numbers = subject.iter_by_oid(&OID_X509_SERIALNUMBER);
        let (Some(name), None, Some(serial), None) =
            (common_names.next(), common_names.next(), serial_numbers.next(), serial_numbers.next())
        else {
            return Err(PeerError::Subject);
        };
        let pod = name
            .as_str()
            .ok()
            .zip(serial.as_str().ok())
            .and_then(|(name, serial)| PodSubject::parse(name, serial))
            .ok_or(PeerError::Subject)?;
        if pod.namespace != id.namespace() {
            return Err(PeerError::Namespace { pod: pod.common_name(), id: id.to_string() });
        }
        let expires =
            Timestamp::from_second(certificate.validity().not_after.timestamp()).map_err(|_| PeerError::Unreadable)?;
        Ok(Self { id, pod, expires })
    }
}

#[cfg(test)]
mod tests;
