//! What a Canary's status said, and when: a history from one watch.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, bail};
use futures::TryStreamExt;
use kube::{
    Api, Client,
    runtime::{WatchStreamExt, watcher},
};
use sluice_crds::{Canary, CanaryStatus};
use tokio::{sync::watch, task::JoinHandle};

/// Unix time in milliseconds.
#[must_use]
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// A status, and when this process saw it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub at_ms: u64,
    pub status: CanaryStatus,
}

/// The statuses of one Canary since the watch began.
pub struct History {
    name: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    changed: watch::Receiver<usize>,
    task: JoinHandle<()>,
}

impl History {
    /// Starts to watch.
    #[must_use]
    pub fn start(client: &Client, namespace: &str, name: &str) -> Self {
        let api: Api<Canary> = Api::namespaced(client.clone(), namespace);
        let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
        let seen = Arc::<Mutex<Vec<Seen>>>::default();
        let (sender, changed) = watch::channel(0);
        let log = seen.clone();
        let task = tokio::spawn(async move {
            let mut stream = std::pin::pin!(watcher(api, config).default_backoff().applied_objects());
            loop {
                match stream.try_next().await {
                    Ok(Some(canary)) => {
                        let Some(status) = canary.status else { continue };
                        let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
                        if log.last().is_none_or(|last| last.status != status) {
                            log.push(Seen { at_ms: unix_ms(), status });
                            sender.send_replace(log.len());
                        }
                    }
                    Ok(None) => return,
                    Err(error) => eprintln!("watch: {error}"),
                }
            }
        });
        Self { name: format!("{namespace}/{name}"), seen, changed, task }
    }

    /// Everything that was seen since `from_ms`.
    #[must_use]
    pub fn since(&self, from_ms: u64) -> Vec<Seen> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.iter().filter(|seen| seen.at_ms >= from_ms).cloned().collect()
    }

    /// The newest status.
    #[must_use]
    pub fn last(&self) -> Option<Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).last().cloned()
    }

    /// Waits for the first status since `from_ms` for which `wanted` holds.
    ///
    /// # Errors
    /// At the deadline: what was seen instead.
    pub async fn wait(
        &self,
        what: &str,
        from_ms: u64,
        deadline: Duration,
        wanted: impl Fn(&CanaryStatus) -> bool,
    ) -> anyhow::Result<Seen> {
        let mut changed = self.changed.clone();
        let search = async {
            loop {
                changed.mark_unchanged();
                if let Some(seen) = self.since(from_ms).into_iter().find(|seen| wanted(&seen.status)) {
                    return Ok(seen);
                }
                if changed.changed().await.is_err() {
                    bail!("the watch of {} ended", self.name);
                }
            }
        };
        match tokio::time::timeout(deadline, search).await {
            Ok(found) => found,
            Err(_) => {
                let last = self.last().context("there is no status at all")?;
                bail!(
                    "{}: {what} did not come within {deadline:?}; last seen: {}",
                    self.name,
                    serde_json::to_string(&last.status)?
                )
            }
        }
    }
}

impl Drop for History {
    fn drop(&mut self) {
        self.task.abort();
    }
}
