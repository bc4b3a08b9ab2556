//! Reports to the leader how the requests of releases under way end, beside the xDS stream and on its connection
//! (`sluice.guard.v1`). Only a member of the fleet does. It reads, on the control thread, the counters that the workers
//! write anyway, and only of the revisions that the leader asks about: while no release is under way it does nothing.

use std::{collections::BTreeMap, convert::Infallible, sync::Arc, time::Duration};

use sluice_xds::sluice::guard::v1::{
    OutcomeReport, OutcomeWatch, Outcomes, Release, ReleaseOutcomes, outcome_service_client::OutcomeServiceClient,
};
use tokio::{sync::mpsc, time::MissedTickBehavior};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, transport::Channel};

use crate::{controller::Backoff, metrics::Metrics, snapshot::MetricLabels};

/// Time between two reports. It must not depend on how requests end: the leader's test relies on that.
const TICK: Duration = Duration::from_millis(100);
/// Reports that the connection has not taken yet. While it is full nothing is lost: the next report says it all.
const UNSENT: usize = 2;
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const LONGEST_BACKOFF: Duration = Duration::from_secs(10);
/// For the leader's first sign of life on a new stream.
const STREAM_TIMEOUT: Duration = Duration::from_secs(10);
/// As for xDS: a watch names every release under way.
const LARGEST_WATCH: usize = 64 << 20;

/// Reports for the life of this connection. Never an error: what is lost with a stream is nothing but the guard's speed.
pub async fn report(channel: Channel, metrics: Arc<Metrics>) -> Infallible {
    let mut backoff = Backoff::new(FIRST_BACKOFF, LONGEST_BACKOFF);
    loop {
        let mut heard = false;
        let end = stream(channel.clone(), &metrics, &mut heard).await;
        if end.code() == Code::Unimplemented {
            tracing::debug!("this controller has no guard");
            return std::future::pending().await;
        }
        tracing::debug!(%end, "the stream to the guard has ended");
        if heard {
            backoff.reset();
        }
        tokio::time::sleep(backoff.draw()).await;
    }
}

async fn stream(channel: Channel, metrics: &Metrics, heard: &mut bool) -> Status {
    let mut client = OutcomeServiceClient::new(channel).max_decoding_message_size(LARGEST_WATCH);
    let (reports, receiver) = mpsc::channel(UNSENT);
    let opening = tokio::time::timeout(STREAM_TIMEOUT, client.report(ReceiverStream::new(receiver)));
    let mut watches = match opening.await {
        Ok(Ok(answer)) => answer.into_inner(),
        Ok(Err(status)) => return status,
        Err(_) => return Status::deadline_exceeded("no answer within 10 s"),
    };
    let mut counted = Vec::new();
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            watch = watches.message() => match watch {
                Ok(Some(watch)) => {
                    *heard = true;
                    counted = take_over(counted, watch, metrics);
                }
                Ok(None) => return Status::unavailable("the controller closed the stream"),
                Err(status) => return status,
            },
            _ = tick.tick(), if !counted.is_empty() => {
                // A full queue is looked at before anything is counted off.
                let Ok(room) = reports.try_reserve() else { continue };
                let releases: Vec<_> = counted.iter_mut().filter_map(|one| one.since_last(metrics)).collect();
                if !releases.is_empty() {
                    room.send(OutcomeReport { releases });
                }
            }
        }
    }
}

/// A release that is counted.
struct Counted {
    id: u64,
    slow_above: Duration,
    primary: Side,
    canary: Side,
    /// The most requests of the canary that were under way at a report.
    most_under_way: u64,
}

struct Side {
    labels: MetricLabels,
    /// What was counted at the last report.
    last: Outcomes,
}

/// What is asked for from now on. What was asked for before goes on from its last report.
fn take_over(counted: Vec<Counted>, watch: OutcomeWatch, metrics: &Metrics) -> Vec<Counted> {
    let mut known: BTreeMap<u64, Counted> = counted.into_iter().map(|one| (one.id, one)).collect();
    watch
        .releases
        .into_iter()
        .map(|release| known.remove(&release.id).unwrap_or_else(|| Counted::new(release, metrics)))
        .collect()
}

impl Counted {
    fn new(release: Release, metrics: &Metrics) -> Self {
        let slow_above = Duration::from_micros(release.slow_above_microseconds);
        let side = |revision: String| {
            let labels = MetricLabels {
                destination_namespace: release.destination_namespace.clone(),
                destination_service: release.destination_service.clone(),
                revision,
            };
            Side { last: metrics.outcomes(&labels, slow_above), labels }
        };
        let (primary, canary) = (side(release.primary.clone()), side(release.canary.clone()));
        let most_under_way = metrics.under_way(&canary.labels);
        Self { id: release.id, slow_above, primary, canary, most_under_way }
    }

    fn since_last(&mut self, metrics: &Metrics) -> Option<ReleaseOutcomes> {
        let primary = self.primary.since_last(metrics, self.slow_above);
        let canary = self.canary.since_last(metrics, self.slow_above);
        let under_way = metrics.under_way(&self.canary.labels);
        let canary_more_under_way = under_way.saturating_sub(self.most_under_way);
        self.most_under_way += canary_more_under_way;
        (primary.requests + canary.requests + canary_more_under_way > 0).then_some(ReleaseOutcomes {
            id: self.id,
            primary: Some(primary),
            canary: Some(canary),
            canary_more_under_way,
        })
    }
}

impl Side {
    fn since_last(&mut self, metrics: &Metrics, slow_above: Duration) -> Outcomes {
        let now = metrics.outcomes(&self.labels, slow_above);
        let last = std::mem::replace(&mut self.last, now);
        // Less would be that of a revision that was forgotten in the middle of its release, and has counted from 0 since.
        Outcomes {
            requests: now.requests.saturating_sub(last.requests),
            bad: now.bad.saturating_sub(last.bad),
            slow: now.slow.saturating_sub(last.slow),
        }
    }
}
