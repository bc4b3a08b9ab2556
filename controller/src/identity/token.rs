//! What a service-account token says about its bearer, by the API server's word.

use std::{collections::BTreeMap, time::Duration};

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::{Api, Client, api::PostParams};
use sluice_xds::PodSubject;

/// Audience of the tokens that we take. A token for the API server is refused: whoever holds one must not become a proxy,
/// and a proxy's token is worth nothing to the API server.
pub const AUDIENCE: &str = "sluice.dev";

/// Extra fields in which the API server names the Pod that a token is bound to
/// (KEP-1205; `k8s.io/apiserver/pkg/authentication/serviceaccount`).
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
const USER_PREFIX: &str = "system:serviceaccount:";

/// Asks the API server about tokens.
pub trait TokenReviews: Send + Sync + 'static {
    /// Reviews `token` for [`AUDIENCE`].
    fn review(&self, token: &str) -> impl Future<Output = Result<TokenReviewStatus, kube::Error>> + Send;
}

/// The real one.
#[derive(Clone)]
pub struct KubeTokenReviews(Api<TokenReview>);

impl std::fmt::Debug for KubeTokenReviews {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KubeTokenReviews")
    }
}

impl KubeTokenReviews {
    #[must_use]
    pub fn new(client: Client) -> Self {
        Self(Api::all(client))
    }
}

impl TokenReviews for KubeTokenReviews {
    async fn review(&self, token: &str) -> Result<TokenReviewStatus, kube::Error> {
        let review = TokenReview {
            spec: TokenReviewSpec { audiences: Some(vec![AUDIENCE.to_owned()]), token: Some(token.to_owned()) },
            ..TokenReview::default()
        };
        let reviewed = self.0.create(&PostParams::default(), &review).await?;
        Ok(reviewed.status.unwrap_or_default())
    }
}

/// The Pod that holds a token, and its service account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    pub service_account: String,
    /// Its namespace is the service account's.
    pub pod: PodSubject,
}

/// Why a token identifies nobody.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TokenError {
    #[error("the API server does not accept the token: {0}")]
    Refused(String),
    #[error("the token is not for the audience {AUDIENCE}: project one with `audience: {AUDIENCE}`")]
    Audience,
    #[error("the token is that of '{0}', which is not a service account")]
    NoServiceAccount(String),
    #[error(
        "the token is not bound to a Pod: use a projected serviceAccountToken volume, not a token from a Secret or from \
         `kubectl create token`"
    )]
    NoPod,
}

/// Reads the bearer out of a review. (The API server itself has checked that the Pod still exists, with this uid.)
///
/// # Errors
/// If anything is missing; nothing is guessed.
pub(super) fn caller(review: TokenReviewStatus) -> Result<Caller, TokenError> {
    if review.authenticated != Some(true) {
        let why = review.error.filter(|why| !why.is_empty());
        return Err(TokenError::Refused(why.unwrap_or_else(|| "no reason given".to_owned())));
    }
    // An API server (or an authentication webhook) that knows nothing of audiences returns none.
    if !review.audiences.is_some_and(|audiences| audiences.iter().any(|audience| audience == AUDIENCE)) {
        return Err(TokenError::Audience);
    }
    let user = review.user.unwrap_or_default();
    let name = user.username.unwrap_or_default();
    let account = name
        .strip_prefix(USER_PREFIX)
        .and_then(|account| account.split_once(':'))
        .filter(|(namespace, account)| !namespace.is_empty() && !account.is_empty() && !account.contains(':'));
    let Some((namespace, service_account)) = account else {
        return Err(TokenError::NoServiceAccount(name.escape_debug().to_string()));
    };
    let extra = user.extra.unwrap_or_default();
    let pod = PodSubject {
        namespace: namespace.to_owned(),
        pod: only(&extra, POD_NAME).ok_or(TokenError::NoPod)?,
        uid: only(&extra, POD_UID).ok_or(TokenError::NoPod)?,
    };
    Ok(Caller { service_account: service_account.to_owned(), pod })
}

/// The one value of an extra field.
fn only(extra: &BTreeMap<String, Vec<String>>, key: &str) -> Option<String> {
    match extra.get(key).map(Vec::as_slice) {
        Some([value]) if !value.is_empty() => Some(value.clone()),
        Some(_) | None => None,
    }
}

/// Longest wait for a review, queueing included.
pub(super) const REVIEW_DEADLINE: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use k8s_openapi::api::authentication::v1::UserInfo;

    use super::*;

    fn good() -> TokenReviewStatus {
        TokenReviewStatus {
            audiences: Some(vec![AUDIENCE.to_owned()]),
            authenticated: Some(true),
            error: None,
            user: Some(UserInfo {
                username: Some("system:serviceaccount:shop:web".to_owned()),
                extra: Some(BTreeMap::from([
                    (POD_NAME.to_owned(), vec!["web-0".to_owned()]),
                    (POD_UID.to_owned(), vec!["5f0c".to_owned()]),
                ])),
                ..UserInfo::default()
            }),
        }
    }

    fn user(change: impl FnOnce(&mut UserInfo)) -> TokenReviewStatus {
        let mut review = good();
        change(review.user.as_mut().unwrap());
        review
    }

    #[test]
    fn a_token_bound_to_a_pod_names_its_bearer() {
        let caller = caller(good()).unwrap();
        assert_eq!(caller.service_account, "web");
        assert_eq!((caller.pod.common_name(), caller.pod.uid.as_str()), ("shop/web-0".to_owned(), "5f0c"));
    }

    #[test]
    fn anything_less_names_nobody() {
        let refused = TokenReviewStatus { authenticated: None, error: Some("expired".to_owned()), ..good() };
        assert_eq!(caller(refused), Err(TokenError::Refused("expired".to_owned())));
        for audiences in [None, Some(vec!["https://kubernetes.default.svc".to_owned()])] {
            let review = TokenReviewStatus { audiences, ..good() };
            assert_eq!(caller(review), Err(TokenError::Audience));
        }
        for name in
            ["admin", "system:serviceaccount:shop", "system:serviceaccount::web", "system:serviceaccount:shop:web:more"]
        {
            let review = user(|user| user.username = Some(name.to_owned()));
            assert_eq!(caller(review), Err(TokenError::NoServiceAccount(name.to_owned())));
        }
        for key in [POD_NAME, POD_UID] {
            let values = [None, Some(vec![]), Some(vec!["a".to_owned(), "b".to_owned()])];
            for value in values {
                let review = user(|user| {
                    let extra = user.extra.as_mut().unwrap();
                    extra.remove(key);
                    extra.extend(value.map(|value| (key.to_owned(), value)));
                });
                assert_eq!(caller(review), Err(TokenError::NoPod));
            }
        }
    }
}
