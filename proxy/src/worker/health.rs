//! Which endpoints of a cluster are left alone for a while (outlier ejection), as one thread sees them.
//!
//! One that no connection can be made to is left alone always: what is dead or cut off costs each request that tries it the time
//! of a connection. One that answers badly is, where the cluster's message says so ([`Outliers`]).

use std::{cell::Cell, time::Duration};

use http::{Response, StatusCode};
use tokio::time::Instant;

use crate::{metrics::GrpcStatus, snapshot::Outliers};

/// An endpoint is left alone for so long after a failed connection, then twice as long, and so on.
const LEAST_EJECTION: Duration = Duration::from_secs(1);
const MOST_EJECTION: Duration = Duration::from_secs(30);

/// What a request says about the endpoint that it was sent to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seen {
    Good,
    ServerError,
    /// 502, 503 or 504.
    GatewayError,
    /// It could not be reached, or did not answer.
    NoAnswer,
}

impl Seen {
    /// Only what is said before any message of a gRPC call counts: the call may be open for hours.
    pub(super) fn of<B>(answer: &Response<B>, grpc: bool) -> Self {
        if let Some(said) = answer.headers().get("grpc-status").filter(|_| grpc) {
            // Bad is what is bad for a gate, too: unlike for Envoy, UNIMPLEMENTED is not.
            return match GrpcStatus::parse(said.as_bytes()).name() {
                "UNAVAILABLE" | "DEADLINE_EXCEEDED" => Self::GatewayError,
                "UNKNOWN" | "INTERNAL" | "DATA_LOSS" => Self::ServerError,
                _ => Self::Good,
            };
        }
        match answer.status() {
            StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT => {
                Self::GatewayError
            }
            status if status.is_server_error() => Self::ServerError,
            _ => Self::Good,
        }
    }
}

#[derive(Default)]
pub(super) struct Health {
    ejected: Cell<Option<Ejected>>,
    record: Cell<Record>,
}

#[derive(Clone, Copy)]
enum Ejected {
    Unreachable { failures: u32, until: Instant, probing: bool },
    Outlier { until: Instant },
}

impl Ejected {
    fn until(self) -> Instant {
        match self {
            Self::Unreachable { until, .. } | Self::Outlier { until } => until,
        }
    }
}

/// What it did last, for [`Outliers`].
#[derive(Clone, Copy, Default)]
struct Record {
    server_errors: u32,
    gateway_errors: u32,
    no_answers: u32,
    /// How often it was ejected, less what it has made good since.
    ejections: u32,
    returned: Option<Instant>,
}

impl Health {
    /// Whether it was ejected and has not proved itself since, however long ago.
    pub(super) fn is_doubtful(&self) -> bool {
        self.ejected.get().is_some()
    }

    /// Whether it is not to be chosen while there are others.
    pub(super) fn is_ejected(&self, now: Instant) -> bool {
        self.ejected.get().is_some_and(|ejected| now < ejected.until())
    }

    /// It was chosen nevertheless. After its time one request finds out whether it can be reached, and others wait for what
    /// comes of it; one that answered badly begins anew.
    pub(super) fn chosen(&self, now: Instant) {
        match self.ejected.get() {
            Some(Ejected::Unreachable { failures, .. }) => {
                let until = now + LEAST_EJECTION;
                self.ejected.set(Some(Ejected::Unreachable { failures, until, probing: true }));
            }
            Some(Ejected::Outlier { until }) if now >= until => self.ejected.set(None),
            Some(Ejected::Outlier { .. }) | None => {}
        }
    }

    /// No connection could be made, and it may be left alone.
    pub(super) fn unreachable(&self, now: Instant) {
        let failures = match self.ejected.get() {
            // Of several that failed together, the first counts.
            Some(Ejected::Unreachable { until, probing: false, .. } | Ejected::Outlier { until }) if now < until => {
                return;
            }
            Some(Ejected::Unreachable { failures, .. }) => failures,
            Some(Ejected::Outlier { .. }) | None => 0,
        };
        let time = LEAST_EJECTION.saturating_mul(1 << failures.min(10)).min(MOST_EJECTION);
        let ejected = Ejected::Unreachable { failures: failures + 1, until: now + time, probing: false };
        self.ejected.set(Some(ejected));
    }

    /// A connection to it could be made.
    pub(super) fn reached(&self) {
        if let Some(Ejected::Unreachable { .. }) = self.ejected.get() {
            self.ejected.set(None);
        }
    }

    /// Whether it has done so often enough what it is ejected for. Then it is counted anew.
    pub(super) fn record(&self, seen: Seen, policy: &Outliers) -> bool {
        let mut record = self.record.get();
        match seen {
            Seen::Good => (record.server_errors, record.gateway_errors, record.no_answers) = (0, 0, 0),
            Seen::ServerError => {
                record.server_errors += 1;
                (record.gateway_errors, record.no_answers) = (0, 0);
            }
            Seen::GatewayError => {
                record.server_errors += 1;
                record.gateway_errors += 1;
                record.no_answers = 0;
            }
            Seen::NoAnswer if policy.no_answers_apart => record.no_answers += 1,
            Seen::NoAnswer => {
                record.server_errors += 1;
                record.gateway_errors += 1;
            }
        }
        let mut due = false;
        for (count, limit) in [
            (&mut record.server_errors, policy.server_errors),
            (&mut record.gateway_errors, policy.gateway_errors),
            (&mut record.no_answers, policy.no_answers),
        ] {
            if limit.is_some_and(|limit| *count >= limit) {
                *count = 0;
                due = true;
            }
        }
        self.record.set(record);
        due
    }

    /// Leaves it alone, the longer the more often that was so (`outlier_detection.proto`, `base_ejection_time`).
    pub(super) fn eject(&self, policy: &Outliers, now: Instant) -> Duration {
        let mut record = self.record.get();
        let quiet = record.returned.map_or(Duration::ZERO, |returned| now.saturating_duration_since(returned));
        let made_good = u32::try_from(quiet.as_nanos() / policy.interval.as_nanos().max(1)).unwrap_or(u32::MAX);
        record.ejections = record.ejections.saturating_sub(made_good).saturating_add(1);
        let time = policy.least.saturating_mul(record.ejections).min(policy.most.max(policy.least));
        let until = now + time;
        record.returned = Some(until);
        self.record.set(record);
        self.ejected.set(Some(Ejected::Outlier { until }));
        time
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: Outliers = Outliers {
        server_errors: Some(3),
        gateway_errors: Some(2),
        no_answers: None,
        no_answers_apart: false,
        interval: Duration::from_secs(10),
        least: Duration::from_secs(30),
        most: Duration::from_secs(70),
        most_ejected: 50,
        panic: 50.0,
    };

    fn due(health: &Health, policy: &Outliers, seen: &[Seen]) -> Vec<bool> {
        seen.iter().map(|seen| health.record(*seen, policy)).collect()
    }

    #[test]
    fn only_errors_in_a_row_make_an_outlier() {
        use Seen::{GatewayError, Good, NoAnswer, ServerError};
        let apart = Outliers { no_answers: Some(2), no_answers_apart: true, ..POLICY };
        let table: [(&Outliers, &[Seen], &[bool]); 6] = [
            (&POLICY, &[ServerError, ServerError, ServerError, ServerError], &[false, false, true, false]),
            (&POLICY, &[ServerError, ServerError, Good, ServerError], &[false; 4]),
            (&POLICY, &[GatewayError, ServerError, GatewayError, GatewayError], &[false, false, true, true]),
            (&POLICY, &[NoAnswer, GatewayError], &[false, true]),
            (&apart, &[NoAnswer, GatewayError, NoAnswer, NoAnswer], &[false, false, false, true]),
            (&apart, &[GatewayError, NoAnswer, GatewayError], &[false, false, true]),
        ];
        for (policy, seen, expected) in table {
            assert_eq!(due(&Health::default(), policy, seen), expected, "{seen:?}");
        }
    }

    #[test]
    fn each_ejection_is_longer_up_to_a_bound_and_quiet_intervals_make_good() {
        let (health, mut now) = (Health::default(), Instant::now());
        for expected in [30, 60, 70, 70] {
            let time = health.eject(&POLICY, now);
            assert_eq!(time, Duration::from_secs(expected));
            assert!(health.is_ejected(now) && !health.is_ejected(now + time));
            now += time;
        }
        now += POLICY.interval * 3;
        assert_eq!(health.eject(&POLICY, now), Duration::from_secs(60));
    }

    #[test]
    fn an_outlier_begins_anew_after_its_time_and_not_before() {
        let (health, now) = (Health::default(), Instant::now());
        let time = health.eject(&POLICY, now);
        health.chosen(now);
        health.reached();
        assert!(health.is_ejected(now), "an answer to an older request proves nothing");
        health.chosen(now + time);
        assert!(!health.is_doubtful());
    }

    #[test]
    fn what_cannot_be_reached_is_left_alone_twice_as_long_each_time_and_probed_by_one_request() {
        let (health, mut now) = (Health::default(), Instant::now());
        for seconds in [1, 2, 4, 8, 16, 30, 30] {
            health.unreachable(now);
            health.unreachable(now);
            let time = Duration::from_secs(seconds);
            assert!(health.is_ejected(now + time - Duration::from_nanos(1)) && !health.is_ejected(now + time));
            now += time;
            health.chosen(now);
            assert!(health.is_ejected(now), "others wait for what comes of the probe");
        }
        health.reached();
        assert!(!health.is_doubtful());
    }

    #[test]
    fn what_a_grpc_call_says_counts_as_the_status_that_it_stands_for() {
        let table = [
            (200, None, true, Seen::Good),
            (200, Some("0"), true, Seen::Good),
            (200, Some("5"), true, Seen::Good),
            (200, Some("14"), true, Seen::GatewayError),
            (200, Some("14"), false, Seen::Good),
            (200, Some("13"), true, Seen::ServerError),
            (200, Some("12"), true, Seen::Good),
            (500, None, false, Seen::ServerError),
            (502, None, false, Seen::GatewayError),
            (404, None, false, Seen::Good),
        ];
        for (status, grpc_status, grpc, expected) in table {
            let mut answer = Response::builder().status(status);
            if let Some(value) = grpc_status {
                answer = answer.header("grpc-status", value);
            }
            assert_eq!(
                answer.body(()).map(|answer| Seen::of(&answer, grpc)).ok(),
                Some(expected),
                "{status} {grpc_status:?}"
            );
        }
    }
}
