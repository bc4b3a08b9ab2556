//! `sluice.identity.v1.CertificateService`: a key and a token come in, a certificate goes out.

use std::{net::IpAddr, sync::Arc, time::Duration};

use jiff::Timestamp;
use rcgen::{PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, PublicKeyData, SubjectPublicKeyInfo};
use sluice_xds::{
    SpiffeId,
    sluice::identity::v1::{
        SignRequest, SignResponse,
        certificate_service_server::{CertificateService, CertificateServiceServer},
    },
};
use tokio::{sync::Semaphore, time::Instant};
use tonic::{Code, Request, Response, Status};
use x509_parser::prelude::{FromDer, X509CertificationRequest};

use super::{
    Authority, Caller, IdentityError, Peer, Subject,
    limit::RateLimit,
    token::{self, REVIEW_DEADLINE, TokenReviews},
};

/// A request is a CSR of some 300 bytes and a token of 1 to 2 KiB.
const MAX_REQUEST: usize = 32 * 1024;
const MAX_CSR: usize = 4 * 1024;
/// TokenReviews in flight: what an API server takes from us without noticing.
const MAX_REVIEWS: usize = 32;
/// Requests that wait for those. Far fewer than the connections of strangers, of which the oldest gives way: where more came than the API
/// server can answer, all would wait, and none live to see its answer.
const MAX_WAITING: usize = 128;

/// Signs certificates for whoever shows a token that the API server vouches for.
pub struct Certificates<R> {
    authority: Arc<Authority>,
    reviews: R,
    in_flight: Semaphore,
    /// Those in flight and those that wait.
    admitted: Semaphore,
    /// Before the token is looked at: an address is about one Pod.
    per_address: RateLimit<IpAddr>,
    /// After it: a Pod needs a certificate at each start and at two thirds of its life.
    per_pod: RateLimit<String>,
}

impl<R: TokenReviews> Certificates<R> {
    /// The service, ready to be mounted.
    pub fn server(authority: Arc<Authority>, reviews: R) -> CertificateServiceServer<Certificates<R>> {
        CertificateServiceServer::new(Self::new(authority, reviews)).max_decoding_message_size(MAX_REQUEST)
    }

    pub(super) fn new(authority: Arc<Authority>, reviews: R) -> Self {
        Self {
            authority,
            reviews,
            in_flight: Semaphore::new(MAX_REVIEWS),
            admitted: Semaphore::new(MAX_REVIEWS + MAX_WAITING),
            per_address: RateLimit::new(30, Duration::from_secs(1)),
            per_pod: RateLimit::new(10, Duration::from_secs(10)),
        }
    }

    #[allow(clippy::result_large_err)] // tonic's own error type
    async fn caller(&self, token: &str) -> Result<Caller, Status> {
        let Ok(_admitted) = self.admitted.try_acquire() else {
            return Err(Status::unavailable(
                "too many wait for the API server to answer about their tokens (TokenReview); try again, here or at another replica",
            ));
        };
        let review = async {
            // The semaphore is never closed; a closed one would refuse.
            let _permit = self.in_flight.acquire().await.ok()?;
            Some(self.reviews.review(token).await)
        };
        let review = match tokio::time::timeout(REVIEW_DEADLINE, review).await {
            Ok(Some(Ok(review))) => review,
            Ok(Some(Err(error))) => {
                tracing::warn!("cannot review a proxy's token: {error}");
                return Err(Status::unavailable(
                    "the API server could not be asked about the token (TokenReview); try again, here or at another replica",
                ));
            }
            Ok(None) | Err(_) => {
                return Err(Status::unavailable(
                    "the API server did not answer about the token (TokenReview) within 5 s; try again, here or at another \
                     replica",
                ));
            }
        };
        token::caller(review).map_err(|error| Status::unauthenticated(error.to_string()))
    }
}

#[tonic::async_trait]
impl<R: TokenReviews> CertificateService for Certificates<R> {
    async fn sign(&self, request: Request<SignRequest>) -> Result<Response<SignResponse>, Status> {
        let address = Peer::of(&request)?.address;
        if !self.per_address.allow(address.ip(), Instant::now()) {
            return Err(Status::resource_exhausted(
                "too many requests for certificates from this address; wait some seconds",
            ));
        }
        let SignRequest { csr_der, token } = request.into_inner();
        if token.is_empty() {
            return Err(Status::unauthenticated(
                "the request has no token: mount a projected serviceAccountToken with the audience sluice.dev",
            ));
        }
        let key = verified_key(&csr_der)?;
        let caller = self
            .caller(&token)
            .await
            .inspect_err(|status| tracing::info!(%address, "no certificate: {}", status.message()))?;
        if !self.per_pod.allow(caller.pod.uid.clone(), Instant::now()) {
            return Err(Status::resource_exhausted(format!(
                "too many requests for certificates from the Pod {}; wait some seconds",
                caller.pod.common_name()
            )));
        }
        let id = SpiffeId::new(self.authority.trust_domain(), &caller.pod.namespace, &caller.service_account)
            .map_err(|error| Status::unauthenticated(error.to_string()))?;
        let subject = Subject { id, pod: caller.pod, dns_names: Vec::new() };
        let issued = self.authority.issue(&key, &subject, Timestamp::now()).map_err(|error| {
            let passes = matches!(error, IdentityError::NotKnownYet { .. });
            let code = if passes { Code::Unavailable } else { Code::Internal };
            Status::new(code, error.to_string())
        })?;
        // The record of who was given which identity.
        tracing::info!(
            %address, id = %subject.id, pod = %subject.pod.common_name(), uid = %subject.pod.uid, serial = %issued.serial,
            not_after = %issued.not_after, "certificate issued"
        );
        Ok(Response::new(SignResponse {
            certificate_chain_pem: issued.chain_pem,
            trust_bundle_pem: self.authority.bundle().borrow().to_string(),
            not_before: Some(protobuf_time(issued.not_before)),
            not_after: Some(protobuf_time(issued.not_after)),
        }))
    }
}

/// The public key of a CSR whose sender holds the private one. Names and extensions in it are not even read.
#[allow(clippy::result_large_err)]
fn verified_key(csr: &[u8]) -> Result<SubjectPublicKeyInfo, Status> {
    let refused = |why: &str| {
        Status::invalid_argument(format!(
            "csr_der cannot be signed: {why}. Send a PKCS#10 request, DER, with an ECDSA P-256, ECDSA P-384 or Ed25519 key"
        ))
    };
    if csr.len() > MAX_CSR {
        return Err(refused("it is longer than 4 KiB"));
    }
    let (rest, csr) =
        X509CertificationRequest::from_der(csr).map_err(|_| refused("it is not a certificate signing request"))?;
    if !rest.is_empty() {
        return Err(refused("bytes follow its end"));
    }
    let key = SubjectPublicKeyInfo::from_der(csr.certification_request_info.subject_pki.raw)
        .map_err(|_| refused("its key is of an unknown kind"))?;
    let accepted = [&PKCS_ECDSA_P256_SHA256, &PKCS_ECDSA_P384_SHA384, &PKCS_ED25519];
    if !accepted.contains(&key.algorithm()) {
        return Err(refused("its key is of another kind"));
    }
    csr.verify_signature().map_err(|_| refused("its signature is not by its own key"))?;
    Ok(key)
}

fn protobuf_time(at: Timestamp) -> prost_types::Timestamp {
    prost_types::Timestamp { seconds: at.as_second(), nanos: 0 }
}
