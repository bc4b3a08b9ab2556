//! Follows Secret `sluice-ca`, on every replica: another root in it takes over in two phases ([`super::trust`]) without a
//! restart. The leader makes a new one before the end of a root of ours, and where somebody deleted it.

use std::{sync::Arc, time::Duration};

use futures::StreamExt as _;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;
use kube::{
    Api, Client,
    api::PostParams,
    runtime::{WatchStreamExt as _, watcher},
};
use tokio::time::{sleep, timeout};

use super::{
    Authority,
    root::{self, CA_SECRET, Wanted},
};
use crate::lease::LeaseHandle;

const CALL: Duration = Duration::from_secs(10);
/// Between two looks at the root's age, and two tries to make one. The clock may jump while we sleep.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// Keeps an [`Authority`] at what the Secret says.
pub struct Rotation {
    pub client: Client,
    pub authority: Arc<Authority>,
    /// Where the Secret is.
    pub namespace: String,
}

impl std::fmt::Debug for Rotation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rotation").field("namespace", &self.namespace).finish_non_exhaustive()
    }
}

impl Rotation {
    /// Never ends by itself; whoever owns the task drops it.
    pub async fn follow(self, lease: LeaseHandle) {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        let by_name = watcher::Config::default().fields(&format!("metadata.name={CA_SECRET}"));
        let mut events = watcher(secrets.clone(), by_name).default_backoff().boxed();
        let mut found: Option<Secret> = None;
        let mut listed = false;
        loop {
            let mut listing = None;
            tokio::select! {
                event = events.next() => match event {
                    Some(Ok(watcher::Event::Init)) => { found = None; listed = false; }
                    Some(Ok(watcher::Event::InitApply(secret) | watcher::Event::Apply(secret))) => listing = Some(secret),
                    Some(Ok(watcher::Event::InitDone)) => listed = true,
                    Some(Ok(watcher::Event::Delete(_))) => {
                        found = None;
                        tracing::warn!("Secret {}/{CA_SECRET} was deleted; its root stays in use until there is another", self.namespace);
                    }
                    Some(Err(error)) => {
                        tracing::warn!(%error, "watching Secret {CA_SECRET} failed; started again");
                        continue;
                    }
                    None => return,
                },
                () = sleep(LOOK_AGAIN) => {}
            }
            let now = Timestamp::now();
            if let Some(secret) = listing {
                match Wanted::read(&secret, now) {
                    Ok(wanted) => self.authority.want(wanted, now),
                    Err(why) => tracing::error!(
                        "the root in Secret {}/{CA_SECRET} cannot be used: {why}. The former one stays in use",
                        self.namespace
                    ),
                }
                found = Some(secret);
            }
            if listed && self.authority.needs_root(found.is_none(), now) && lease.may_write() {
                self.renew(&secrets, found.as_ref(), now).await;
            }
        }
    }

    /// Makes another root. The watch tells of it.
    async fn renew(&self, secrets: &Api<Secret>, before: Option<&Secret>, now: Timestamp) {
        let mut root = match root::new(self.authority.trust_domain(), now) {
            Ok(root) => root,
            Err(error) => return tracing::error!(%error, "cannot make a root certificate; tried again"),
        };
        let params = PostParams::default();
        let call = async {
            match before {
                None => secrets.create(&params, &root).await,
                Some(before) => {
                    root.metadata.resource_version = before.metadata.resource_version.clone();
                    secrets.replace(CA_SECRET, &params, &root).await
                }
            }
        };
        match timeout(CALL, call).await {
            Ok(Ok(_)) => tracing::info!("made another root certificate in Secret {}/{CA_SECRET}", self.namespace),
            // Somebody else was faster, which the watch tells.
            Ok(Err(kube::Error::Api(status))) if status.is_conflict() || status.is_already_exists() => {}
            Ok(Err(error)) => {
                tracing::error!(%error, "cannot write Secret {}/{CA_SECRET}; tried again", self.namespace)
            }
            Err(_) => tracing::error!(
                "cannot write Secret {}/{CA_SECRET}: no answer within {CALL:?}; tried again",
                self.namespace
            ),
        }
    }
}
