//! Retries that a route asks for: requests are sent again although they may have been processed. (What is certain not to have
//! been processed is sent again without a policy, see `request`.)

use std::{rc::Rc, time::Duration};

use http::{Response, StatusCode};
use tokio::time::sleep;

use super::{
    cluster::Cluster,
    load::{Counted, Load},
};
use crate::{
    failure::Failure,
    metrics::GrpcStatus,
    snapshot::{RetryOn, RetryPolicy},
};

/// So many requests of a cluster may be tried again at once on each thread, or a fifth of those that are open, unless its message
/// says how many: retries must not multiply the load of an application that fails under it. The figures are those of Envoy's `RetryBudget`.
const LEAST_BUDGET: u32 = 3;
const BUDGET_DIVISOR: u32 = 5;
/// The longest wait before retry n is a random part of (2^n - 1) times this, at most ten times it (Envoy's `RetryBackOff`).
const BACKOFF: Duration = Duration::from_millis(25);

/// The retries of one request.
pub(super) struct Retries<'a> {
    policy: Option<&'a RetryPolicy>,
    load: &'a Load,
    done: u32,
    _active: Option<Counted<'a>>,
    retrying: Option<Counted<'a>>,
}

impl<'a> Retries<'a> {
    pub(super) fn new(policy: Option<&'a RetryPolicy>, cluster: &'a Rc<Cluster>) -> Self {
        let load = &*cluster.load;
        let active = policy.map(|_| Counted::on(&load.active));
        Self { policy, load, done: 0, _active: active, retrying: None }
    }

    pub(super) fn per_try_timeout(&self) -> Option<Duration> {
        self.policy.and_then(|policy| policy.per_try_timeout)
    }

    /// Whether this answer is to be thrown away for another try.
    pub(super) fn want_instead_of<B>(&self, answer: &Response<B>) -> bool {
        let Some(policy) = self.policy else { return false };
        let status = answer.status();
        policy.on.iter().any(|on| match on {
            RetryOn::ServerError => status.is_server_error(),
            RetryOn::GatewayError => matches!(
                status,
                StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT
            ),
            RetryOn::Conflict => status == StatusCode::CONFLICT,
            RetryOn::Grpc(wanted) => {
                let said = answer.headers().get("grpc-status");
                said.is_some_and(|said| GrpcStatus::parse(said.as_bytes()) == *wanted)
            }
            RetryOn::Reset => false,
        })
    }

    /// Whether a request without an answer is to be tried again.
    pub(super) fn want_after(&self, failure: &Failure) -> bool {
        let upstream = matches!(failure, Failure::UpstreamReset | Failure::UpstreamProtocol | Failure::UpstreamTimeout);
        let without_answer = |on: &RetryOn| matches!(on, RetryOn::ServerError | RetryOn::GatewayError | RetryOn::Reset);
        upstream && self.policy.is_some_and(|policy| policy.on.iter().any(without_answer))
    }

    /// Takes one retry out of the budget, if there is any left.
    pub(super) fn take(&mut self) -> bool {
        if self.policy.is_none_or(|policy| self.done >= policy.retries) {
            return false;
        }
        if self.retrying.is_none() {
            let load = self.load;
            let budget = load.retries().unwrap_or_else(|| (load.active.get() / BUDGET_DIVISOR).max(LEAST_BUDGET));
            if load.retrying.get() >= budget {
                return false;
            }
            self.retrying = Some(Counted::on(&load.retrying));
        }
        self.done += 1;
        true
    }

    /// The wait before the retry that was taken.
    pub(super) async fn back_off(&self) {
        let most = BACKOFF * ((1 << self.done.min(4)) - 1).min(10);
        sleep(most.mul_f64(fastrand::f64())).await;
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_wait_before_a_retry_is_drawn_from_a_range_that_grows_up_to_ten_times_the_first() {
        let load = Load::default();
        for (done, most) in [(1, 25), (2, 75), (3, 175), (4, 250), (5, 250), (100, 250)] {
            let retries = Retries { policy: None, load: &load, done, _active: None, retrying: None };
            let mut waits = Vec::new();
            for _ in 0..300 {
                let begun = Instant::now();
                retries.back_off().await;
                waits.push(begun.elapsed().as_millis());
            }
            waits.sort_unstable();
            // The clock ticks in milliseconds, and never early. That no draw of 300 is in a given quarter has a chance of 1e-37.
            assert!(waits[299] <= most + 1, "retry {done}: up to {} ms", waits[299]);
            assert!(waits[299] > most * 3 / 4, "retry {done}: no more than {} ms", waits[299]);
            assert!(waits[0] < most / 4, "retry {done}: no less than {} ms", waits[0]);
            // All who were refused at one moment do not come back at one moment.
            waits.dedup();
            assert!(waits.len() > 15, "retry {done}: {} different waits", waits.len());
        }
    }
}
