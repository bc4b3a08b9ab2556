//! ConfigMap `sluice-trust-bundle`, which Pods mount beside their token: it is how a proxy knows the controller at its first
//! connection. Kept in the release namespace and in every namespace with a Canary, by the leader.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use futures::{StreamExt as _, stream};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, ObjectMeta, Patch, PatchParams, Preconditions},
    runtime::{WatchStreamExt as _, watcher},
};
use sluice_crds::{Canary, Phase, labels};
use tokio::time::{Instant, sleep_until, timeout};

use crate::{cache::Cache, lease::LeaseHandle};

const KEY: &str = "ca.crt";
/// Mark of those that we may delete.
const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
const CALL: Duration = Duration::from_secs(10);
/// Calls at the same time, so that a slow namespace holds up no other one.
const CONCURRENCY: usize = 8;
const FIRST_RETRY: Duration = Duration::from_secs(2);
const LAST_RETRY: Duration = Duration::from_secs(60);

/// Keeps the ConfigMaps.
#[derive(Clone)]
pub struct TrustBundle {
    pub client: Client,
    /// [`super::Authority::bundle_pem`].
    pub pem: String,
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
    right: bool,
}

/// What has to be written in one namespace.
enum Change {
    Apply { namespace: String, resource_version: Option<String> },
    Delete { namespace: String, conditions: Preconditions },
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
        let (mut changes, mut terms) = (cache.changes(), lease.watch());
        let mut found = BTreeMap::new();
        let mut listed = Some(BTreeMap::new());
        let mut retry = FIRST_RETRY;
        let mut retry_at = None;
        loop {
            let due = async {
                match retry_at {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                event = events.next() => match event {
                    Some(Ok(watcher::Event::Init)) => listed = Some(BTreeMap::new()),
                    Some(Ok(watcher::Event::InitApply(map))) => self.note(listed.get_or_insert_default(), map),
                    Some(Ok(watcher::Event::InitDone)) => found = listed.take().unwrap_or_default(),
                    Some(Ok(watcher::Event::Apply(map))) => self.note(&mut found, map),
                    Some(Ok(watcher::Event::Delete(map))) => {
                        found.remove(&map.namespace().unwrap_or_default());
                    }
                    Some(Err(error)) => {
                        tracing::warn!(%error, "watching the copies of the trust bundle failed; started again");
                        continue;
                    }
                    None => return,
                },
                // The senders live as long as the cache and the lease.
                changed = changes.changed() => if changed.is_err() { return },
                changed = terms.changed() => if changed.is_err() { return },
                () = due => {}
            }
            // A list in progress says nothing yet about what is missing.
            if listed.is_some() || !lease.may_write() {
                continue;
            }
            let failed = self.settle(&mut found, self.wanted(&cache), &lease).await;
            (retry_at, retry) =
                if failed { (Some(Instant::now() + retry), (retry * 2).min(LAST_RETRY)) } else { (None, FIRST_RETRY) };
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
    async fn settle(&self, found: &mut BTreeMap<String, Found>, wanted: BTreeSet<String>, lease: &LeaseHandle) -> bool {
        let surplus = found.iter().filter(|(namespace, map)| map.ours && !wanted.contains(*namespace));
        let mut todo: Vec<Change> = surplus
            .map(|(namespace, map)| Change::Delete {
                namespace: namespace.clone(),
                conditions: Preconditions { uid: map.uid.clone(), resource_version: map.resource_version.clone() },
            })
            .collect();
        todo.extend(wanted.into_iter().filter_map(|namespace| {
            let map = found.get(&namespace);
            let resource_version = map.and_then(|map| map.resource_version.clone());
            (!map.is_some_and(|map| map.right)).then_some(Change::Apply { namespace, resource_version })
        }));
        let done = stream::iter(todo).map(|change| self.carry_out(change, lease)).buffer_unordered(CONCURRENCY);
        let done: Vec<_> = done.collect().await;
        let mut failed = false;
        for result in done {
            match result {
                Ok(Some(map)) => self.note(found, map),
                Ok(None) => {}
                Err(why) => {
                    failed = true;
                    tracing::warn!("{why}; tried again");
                }
            }
        }
        failed
    }

    /// The ConfigMap as written, or `None` if it was deleted.
    async fn carry_out(&self, change: Change, lease: &LeaseHandle) -> Result<Option<ConfigMap>, String> {
        if !lease.may_write() {
            return Err("this replica no longer leads".to_owned());
        }
        let name = labels::TRUST_BUNDLE;
        let api = |namespace: &str| Api::<ConfigMap>::namespaced(self.client.clone(), namespace);
        let (doing, answer) = match change {
            Change::Apply { namespace, resource_version } => {
                let wanted = ConfigMap {
                    metadata: ObjectMeta {
                        name: Some(name.to_owned()),
                        resource_version,
                        labels: Some(BTreeMap::from([(MANAGED_BY.to_owned(), labels::FIELD_MANAGER.to_owned())])),
                        ..ObjectMeta::default()
                    },
                    data: Some(BTreeMap::from([(KEY.to_owned(), self.pem.clone())])),
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

    fn note(&self, found: &mut BTreeMap<String, Found>, map: ConfigMap) {
        let right = map.data.as_ref().and_then(|data| data.get(KEY)) == Some(&self.pem);
        let ours = map.labels().get(MANAGED_BY).is_some_and(|by| by == labels::FIELD_MANAGER);
        let namespace = map.namespace().unwrap_or_default();
        let (uid, resource_version) = (map.metadata.uid, map.metadata.resource_version);
        found.insert(namespace, Found { uid, resource_version, ours, right });
    }
}
