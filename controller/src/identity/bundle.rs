//! ConfigMap `sluice-trust-bundle`, which Pods mount beside their token: it is how a proxy knows the controller at its first
//! connection. Kept in the release namespace and in every namespace with a Canary, by the leader. The one in the release
//! namespace is also the memory of which root is new and which one leaves (`trust`); every replica reads it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt as _, stream};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, ObjectMeta, Patch, PatchParams, Preconditions},
    runtime::{WatchStreamExt as _, watcher},
};
use sluice_crds::{Canary, Phase, labels};
use tokio::time::{Instant, sleep_until, timeout};

use super::{
    Authority,
    trust::{BUNDLE, Trust},
};
use crate::{cache::Cache, lease::LeaseHandle};

/// Mark of those that we may delete.
const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
const CALL: Duration = Duration::from_secs(10);
/// Calls at the same time, so that a slow namespace holds up no other one.
const CONCURRENCY: usize = 8;
const FIRST_RETRY: Duration = Duration::from_secs(2);
const LAST_RETRY: Duration = Duration::from_secs(60);
/// The clock may jump while we sleep.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// Keeps the ConfigMaps.
#[derive(Clone)]
pub struct TrustBundle {
    pub client: Client,
    pub authority: Arc<Authority>,
    pub release_namespace: String,
    /// Only this namespace is watched; all if `None`.
    pub watched: Option<String>,
}

impl std::fmt::Debug for TrustBundle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TrustBundle").field("release_namespace", &self.release_namespace).finish_non_exhaustive()
    }
}

/// A ConfigMap that is there, as the watch says.
struct Found {
    uid: Option<String>,
    resource_version: Option<String>,
    ours: bool,
    pem: Option<String>,
    spans: Option<String>,
}

impl Found {
    /// Whether these roots are in it, and, for the one in the release namespace, what is said of them.
    fn says(&self, pem: &str, spans: Option<&str>) -> bool {
        self.pem.as_deref() == Some(pem) && (spans.is_none() || self.spans.as_deref() == spans)
    }
}

/// What has to be written in one namespace.
enum Change {
    Apply { namespace: String, resource_version: Option<String>, spans: Option<String> },
    Delete { namespace: String, conditions: Preconditions },
}

impl Change {
    fn namespace(&self) -> &str {
        match self {
            Self::Apply { namespace, .. } | Self::Delete { namespace, .. } => namespace,
        }
    }
}

impl TrustBundle {
    /// Never ends by itself; whoever owns the task drops it. `cache` must be warm: a namespace without a Canary in it loses its copy.
    pub async fn keep(self, cache: Cache, lease: LeaseHandle) {
        let api: Api<ConfigMap> = match &self.watched {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        };
        let by_name = watcher::Config::default().fields(&format!("metadata.name={}", labels::TRUST_BUNDLE));
        let mut events = watcher(api, by_name).default_backoff().boxed();
        let (mut changes, mut terms, mut roots) = (cache.changes(), lease.watch(), self.authority.changes());
        let mut found = BTreeMap::new();
        let mut listed = Some(BTreeMap::new());
        let mut retry = FIRST_RETRY;
        let mut retry_at = None;
        let mut looked = Timestamp::now();
        let mut behind = BTreeSet::new();
        loop {
            let due = async {
                let roots = self.authority.due(looked).map(|at| Instant::now() + until(at).min(LOOK_AGAIN));
                match [retry_at, roots].into_iter().flatten().min() {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                event = events.next() => match event {
                    Some(Ok(watcher::Event::Init)) => listed = Some(BTreeMap::new()),
                    Some(Ok(watcher::Event::InitApply(map))) => {
                        self.follow(&map, &lease);
                        note(listed.get_or_insert_default(), map);
                    }
                    Some(Ok(watcher::Event::InitDone)) => found = listed.take().unwrap_or_default(),
                    Some(Ok(watcher::Event::Apply(map))) => {
                        self.follow(&map, &lease);
                        note(&mut found, map);
                    }
                    Some(Ok(watcher::Event::Delete(map))) => {
                        found.remove(&map.namespace().unwrap_or_default());
                    }
                    Some(Err(error)) => {
                        tracing::warn!(%error, "watching the copies of the trust bundle failed; started again");
                        continue;
                    }
                    None => return,
                },
                // The senders live as long as the cache, the lease and the authority.
                changed = changes.changed() => if changed.is_err() { return },
                changed = terms.changed() => if changed.is_err() { return },
                changed = roots.changed() => if changed.is_err() { return },
                () = due => {}
            }
            looked = Timestamp::now();
            self.authority.look(looked);
            // A list in progress says nothing yet about what is missing.
            if listed.is_some() || !lease.may_write() {
                // What is due goes on being due: not at once again.
                retry_at = retry_at.map(|at: Instant| at.max(Instant::now() + FIRST_RETRY));
                continue;
            }
            let (wanted, trust) = (self.wanted(&cache), self.authority.next_trust(&behind, looked));
            let failed = self.settle(&mut found, &wanted, &trust, &lease).await;
            behind = lacking(&found, wanted, &trust.pem());
            // Several times while a new root waits, which it does on if one fails.
            let last = LAST_RETRY.min(self.authority.spread() / 4);
            (retry_at, retry) = if failed {
                (Some(Instant::now() + retry.min(last)), (retry * 2).min(last))
            } else {
                (None, FIRST_RETRY)
            };
        }
    }

    fn wanted(&self, cache: &Cache) -> BTreeSet<String> {
        let handed_back = |canary: &Canary| {
            let ends = canary.finalizers().iter().any(|finalizer| finalizer == labels::FINALIZER);
            !ends && canary.status.as_ref().is_some_and(|status| status.phase == Phase::Terminated)
        };
        let canaries = cache.canaries.state_filter(|canary| !handed_back(canary));
        let mut wanted: BTreeSet<String> = canaries.iter().filter_map(|canary| canary.namespace()).collect();
        wanted.insert(self.release_namespace.clone());
        wanted.retain(|namespace| !cache.is_terminating(namespace));
        wanted
    }

    /// Writes what differs; `true` if something is left to be tried again.
    async fn settle(
        &self,
        found: &mut BTreeMap<String, Found>,
        wanted: &BTreeSet<String>,
        trust: &Trust,
        lease: &LeaseHandle,
    ) -> bool {
        let (pem, spans) = (trust.pem(), trust.spans());
        let spans_in = |namespace: &str| (namespace == self.release_namespace).then(|| spans.clone());
        let surplus = found.iter().filter(|(namespace, map)| map.ours && !wanted.contains(*namespace));
        let mut todo: Vec<Change> = surplus
            .map(|(namespace, map)| Change::Delete {
                namespace: namespace.clone(),
                conditions: Preconditions { uid: map.uid.clone(), resource_version: map.resource_version.clone() },
            })
            .collect();
        todo.extend(wanted.iter().filter_map(|namespace| {
            let map = found.get(namespace);
            let resource_version = map.and_then(|map| map.resource_version.clone());
            let spans = spans_in(namespace);
            let right = map.is_some_and(|map| map.says(&pem, spans.as_deref()));
            (!right).then(|| Change::Apply { namespace: namespace.clone(), resource_version, spans })
        }));
        // What is remembered comes before what is told, and a slow namespace does not hold it up.
        let (memory, copies) = todo.into_iter().partition(|change| change.namespace() == self.release_namespace);
        let mut failed = false;
        for todo in [memory, copies] {
            let todo = stream::iter::<Vec<Change>>(todo);
            let done = todo.map(|change| self.carry_out(change, &pem, lease)).buffer_unordered(CONCURRENCY);
            for result in done.collect::<Vec<_>>().await {
                match result {
                    Ok(Some(map)) => note(found, map),
                    Ok(None) => {}
                    Err(why) => {
                        failed = true;
                        tracing::warn!("{why}; tried again");
                    }
                }
            }
            // Also where it was right before: the answer to the write that made it so may never have come.
            if found.get(&self.release_namespace).is_some_and(|map| map.says(&pem, Some(&spans))) {
                self.authority.published(trust.clone(), Timestamp::now());
            }
        }
        failed
    }

    /// The ConfigMap as written, or `None` if it was deleted.
    async fn carry_out(&self, change: Change, pem: &str, lease: &LeaseHandle) -> Result<Option<ConfigMap>, String> {
        if !lease.may_write() {
            return Err("this replica no longer leads".to_owned());
        }
        let name = labels::TRUST_BUNDLE;
        let api = |namespace: &str| Api::<ConfigMap>::namespaced(self.client.clone(), namespace);
        let (doing, answer) = match change {
            Change::Apply { namespace, resource_version, spans } => {
                let wanted = ConfigMap {
                    metadata: ObjectMeta {
                        name: Some(name.to_owned()),
                        resource_version,
                        labels: Some(BTreeMap::from([(MANAGED_BY.to_owned(), labels::FIELD_MANAGER.to_owned())])),
                        annotations: spans.map(|spans| BTreeMap::from([(labels::ROOTS.to_owned(), spans)])),
                        ..ObjectMeta::default()
                    },
                    data: Some(BTreeMap::from([(BUNDLE.to_owned(), pem.to_owned())])),
                    ..ConfigMap::default()
                };
                let params = PatchParams::apply(labels::FIELD_MANAGER).force();
                let api = api(&namespace);
                let call = async { api.patch(name, &params, &Patch::Apply(&wanted)).await.map(Some) };
                (format!("writing ConfigMap {namespace}/{name}"), timeout(CALL, call).await)
            }
            Change::Delete { namespace, conditions } => {
                let params = DeleteParams { preconditions: Some(conditions), ..DeleteParams::default() };
                let api = api(&namespace);
                let call = async { api.delete(name, &params).await.map(|_| None) };
                (format!("deleting ConfigMap {namespace}/{name}"), timeout(CALL, call).await)
            }
        };
        match answer {
            Ok(Ok(map)) => Ok(map),
            // It was changed or deleted meanwhile, which the watch tells.
            Ok(Err(kube::Error::Api(status))) if status.is_conflict() || status.is_not_found() => Ok(None),
            Ok(Err(error)) => Err(format!("{doing}: {error}")),
            Err(_) => Err(format!("{doing}: no answer within {CALL:?}")),
        }
    }

    /// What the leader has published. The leader itself knows it, whatever somebody else may have written there.
    fn follow(&self, map: &ConfigMap, lease: &LeaseHandle) {
        let trust = Trust::read(map);
        if map.namespace().as_ref() == Some(&self.release_namespace) && !lease.may_write() && !trust.is_empty() {
            self.authority.published(trust, Timestamp::now());
        }
    }
}

fn note(found: &mut BTreeMap<String, Found>, map: ConfigMap) {
    let pem = map.data.as_ref().and_then(|data| data.get(BUNDLE)).cloned();
    let spans = map.annotations().get(labels::ROOTS).cloned();
    let ours = map.labels().get(MANAGED_BY).is_some_and(|by| by == labels::FIELD_MANAGER);
    let namespace = map.namespace().unwrap_or_default();
    let (uid, resource_version) = (map.metadata.uid, map.metadata.resource_version);
    found.insert(namespace, Found { uid, resource_version, ours, pem, spans });
}

/// Those of the namespaces whose copy is another one, or missing.
fn lacking(found: &BTreeMap<String, Found>, mut namespaces: BTreeSet<String>, pem: &str) -> BTreeSet<String> {
    namespaces.retain(|namespace| !found.get(namespace).is_some_and(|map| map.says(pem, None)));
    namespaces
}

fn until(at: Timestamp) -> Duration {
    // A negative duration is none: it is due.
    Duration::try_from(at.duration_since(Timestamp::now())).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use kube::client::Body;

    use super::*;
    use crate::lease::{Election, LeaseSettings};

    /// The leader's first write was carried out, but its answer did not come: it must not take every root for known ever after.
    #[tokio::test]
    async fn what_was_written_without_an_answer_is_known_to_be_published() {
        let client = Client::new(
            tower::service_fn(async |_: http::Request<Body>| {
                Err::<http::Response<Body>, _>(std::io::Error::other("nothing is to be asked"))
            }),
            "sluice-system",
        );
        let settings = LeaseSettings {
            namespace: "sluice-system".to_owned(),
            name: "sluice".to_owned(),
            holder: "me".to_owned(),
            duration: Duration::from_secs(15),
            renew_deadline: Duration::from_secs(10),
            retry: Duration::from_secs(2),
        };
        let (_election, lease) = Election::new(client.clone(), settings).unwrap();
        let authority = Arc::new(Authority::for_tests("cluster.local", Duration::from_secs(3600)));
        let bundle = TrustBundle {
            client,
            authority: Arc::clone(&authority),
            release_namespace: "sluice-system".to_owned(),
            watched: None,
        };
        let trust = authority.next_trust(&BTreeSet::new(), Timestamp::now());
        let map =
            Found { uid: None, resource_version: None, ours: true, pem: Some(trust.pem()), spans: Some(trust.spans()) };
        let mut found = BTreeMap::from([("sluice-system".to_owned(), map)]);
        let wanted = BTreeSet::from(["sluice-system".to_owned()]);
        assert!(!bundle.settle(&mut found, &wanted, &trust, &lease).await);

        let now = Timestamp::now();
        let other = Authority::for_tests("cluster.local", Duration::from_secs(3600));
        authority.want(other.wanted(), now);
        let next = authority.next_trust(&BTreeSet::new(), now);
        assert_eq!(
            (next.roots().count(), authority.own_signer().certificate == other.own_signer().certificate),
            (2, false)
        );
    }
}
