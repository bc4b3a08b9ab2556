//! The load generator as a Pod, and what it has seen so far.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api,
    api::{DeleteParams, PostParams},
    runtime::wait::{await_condition, conditions::is_pod_running},
};
use sluice_load::{Bucket, CUT};
use tokio::task::JoinHandle;

use crate::{cluster::Cluster, logs, watch::unix_ms};

/// Load on a Service. Ends when it is stopped or dropped.
pub struct Load {
    name: String,
    pods: Api<Pod>,
    buckets: Arc<Mutex<Vec<Bucket>>>,
    reader: JoinHandle<()>,
}

/// Connections that it keeps (`--connections`).
pub const KEPT: u64 = 16;
/// Streams and WebSockets that are open at a time, if asked for ([`EVERY_PROTOCOL`]).
const OPEN: u64 = 2;
/// Beside HTTP/1.1, gRPC calls, a gRPC stream and a WebSocket: either half a second, which is shorter than the tests' `drainSeconds`, and
/// than what their p99 may be: a stream lasts until its end.
pub const EVERY_PROTOCOL: &[&str] = &["--grpc-rate", "20", "--ws-rate", "10", "--messages", "5"];
/// The longest that its requests wait for an answer.
pub const TIMEOUT: Duration = Duration::from_secs(10);

impl Load {
    /// Starts a load Pod with these arguments of `sluice-load`.
    ///
    /// # Errors
    /// If it does not run within a minute.
    pub async fn start(cluster: &Cluster, namespace: &str, name: &str, arguments: &[&str]) -> anyhow::Result<Self> {
        let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), namespace);
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"name": name, "labels": {"app": "load"}},
            "spec": {
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 2,
                "automountServiceAccountToken": false,
                "containers": [{
                    "name": "load",
                    "image": format!("localhost/sluice-load:{}", cluster.tag),
                    "imagePullPolicy": "IfNotPresent",
                    "args": arguments,
                    "securityContext": {
                        "allowPrivilegeEscalation": false, "runAsNonRoot": true,
                        "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"},
                    },
                }],
            },
        }))?;
        pods.create(&PostParams::default(), &pod).await.with_context(|| format!("cannot start load pod {name}"))?;
        let running = await_condition(pods.clone(), name, is_pod_running());
        tokio::time::timeout(Duration::from_secs(60), running)
            .await
            .with_context(|| format!("load pod {namespace}/{name} does not run"))??;
        let buckets = Arc::<Mutex<Vec<Bucket>>>::default();
        let seen = buckets.clone();
        let reader = tokio::spawn(logs::follow(pods.clone(), name.to_owned(), "load".to_owned(), move |_, line| {
            match serde_json::from_str(line) {
                Ok(bucket) => seen.lock().unwrap_or_else(PoisonError::into_inner).push(bucket),
                Err(_) => eprintln!("load: {line}"),
            }
        }));
        Ok(Self { name: name.to_owned(), pods, buckets, reader })
    }

    /// What ended since `from_ms` (Unix milliseconds).
    #[must_use]
    pub fn since(&self, from_ms: u64) -> Vec<Bucket> {
        let buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        buckets.iter().filter(|bucket| bucket.first_ms >= from_ms).cloned().collect()
    }

    /// What began and ended between these times: drawn by what was in force all the while, however long an answer took.
    #[must_use]
    pub fn within(&self, from_ms: u64, to_ms: u64) -> Vec<Bucket> {
        let mut within = self.since(from_ms);
        within.retain(|bucket| bucket.first_ms.saturating_sub(bucket.max_ms) > from_ms && bucket.last_ms < to_ms);
        within
    }

    /// Requests that no version of the application answered, since `from_ms`.
    #[must_use]
    pub fn failures_since(&self, from_ms: u64) -> Vec<Bucket> {
        self.since(from_ms).into_iter().filter(Bucket::failed).collect()
    }

    /// [`Self::failures_since`], and the POSTs that were [`CUT`]: where clients have been behind the fleet all the time, there are none.
    #[must_use]
    pub fn lost_since(&self, from_ms: u64) -> Vec<Bucket> {
        self.since(from_ms).into_iter().filter(|bucket| bucket.failed() || bucket.kind == CUT).collect()
    }

    /// [`Self::lost_since`] by clients that were there before the takeover: until `through_fleet_ms` they have connections to Pods of
    /// the Deployment itself, and what they find open there ends with these, as in any rollout. That is counted and printed.
    ///
    /// # Panics
    /// If more ended so than can have been open.
    #[must_use]
    #[allow(clippy::print_stdout)]
    pub fn lost_but_for_the_takeover(&self, from_ms: u64, through_fleet_ms: u64) -> Vec<Bucket> {
        let (own, lost): (Vec<_>, Vec<_>) = self
            .lost_since(from_ms)
            .into_iter()
            .partition(|bucket| bucket.first_ms < through_fleet_ms && bucket.ended_with_its_connection());
        let ended: u64 = own.iter().map(|bucket| bucket.count).sum();
        assert!(ended <= KEPT + OPEN, "{ended} ended with the Pods of the Deployment itself: {own:#?}");
        if ended > 0 {
            println!("{}: {ended} requests ended with the Pods of the Deployment itself", self.name);
        }
        lost
    }

    /// Waits until everything that ended before now has been reported.
    ///
    /// # Errors
    /// If the load has stopped to report.
    pub async fn catch_up(&self) -> anyhow::Result<()> {
        let now = unix_ms();
        let later = async {
            while !self.buckets.lock().unwrap_or_else(PoisonError::into_inner).iter().any(|b| b.first_ms > now) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(15), later)
            .await
            .with_context(|| format!("load pod {} reports nothing any more", self.name))
    }

    /// Waits until the application has answered everything for four seconds: a Service that was made just now is refused
    /// until kube-proxy has its rules, and a Pod that was started just now may not be found for three (ARP). Returns from
    /// when on every failure counts (Unix milliseconds).
    ///
    /// # Errors
    /// If that does not come within a minute.
    pub async fn steady(&self) -> anyhow::Result<u64> {
        let steady = async {
            loop {
                let from = unix_ms();
                tokio::time::sleep(Duration::from_secs(4)).await;
                self.catch_up().await?;
                if self.failures_since(from).is_empty() {
                    return anyhow::Ok(unix_ms());
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(60), steady)
            .await
            .with_context(|| format!("load pod {} is not answered steadily", self.name))?
    }

    /// Stops the load and returns everything that it saw.
    ///
    /// # Errors
    /// If the Pod cannot be deleted.
    pub async fn stop(mut self) -> anyhow::Result<Vec<Bucket>> {
        self.pods.delete(&self.name, &DeleteParams::default()).await?;
        let _ = tokio::time::timeout(Duration::from_secs(10), &mut self.reader).await;
        Ok(std::mem::take(&mut *self.buckets.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.reader.abort();
    }
}
