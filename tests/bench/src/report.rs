//! The table: what was seen, and what follows from it.

use std::{fmt, time::Duration};

use serde::Serialize;

use crate::{
    load::{Load, Window},
    rows::{Compare, DIRECT, Figure, Measure, Peer, Proxy, ROWS, Row},
    update::Updated,
};

/// A proxy that uses less of its core was not what held the requests up.
const SATURATED_PERCENT: f64 = 90.0;

#[derive(Debug, Serialize)]
pub(crate) struct Report {
    figures: Vec<Outcome>,
    load_average: String,
    /// Of the whole run, without the build.
    seconds: f64,
    observations: Vec<Observation>,
}

/// One window of one peer.
#[derive(Debug, Serialize)]
pub(crate) struct Observation {
    pub(crate) row: &'static str,
    pub(crate) round: u32,
    pub(crate) peer: &'static str,
    #[serde(flatten)]
    pub(crate) window: Window,
    pub(crate) rss_idle_kib: f64,
}

/// A figure of one peer.
#[derive(Debug, Serialize)]
struct Outcome {
    row: &'static str,
    what: &'static str,
    peer: &'static str,
    /// Of each round.
    values: Vec<f64>,
    median: f64,
    must: Option<(f64, Verdict)>,
    aim: Option<(f64, Verdict)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// Wherever in its interval the median is.
    Met,
    /// The same.
    Missed,
    /// The limit is in the interval: this run cannot tell.
    Unresolved,
}

impl Observation {
    fn cpu_us(&self) -> f64 {
        self.window.proxy_cpu_seconds * 1e6 / self.window.requests as f64
    }

    fn rate(&self) -> f64 {
        self.window.requests as f64 / self.window.seconds
    }

    fn cpu_percent(&self) -> f64 {
        self.window.proxy_cpu_seconds * 100.0 / self.window.seconds
    }
}

impl Report {
    pub(crate) fn new(observations: Vec<Observation>, took: Duration) -> Self {
        let load_average = std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim().to_owned();
        let mut report = Self { figures: Vec::new(), load_average, seconds: took.as_secs_f64(), observations };
        for row in ROWS {
            for figure in row.figures {
                for peer in row.peers {
                    report.figures.extend(report.outcome(row, figure, peer));
                }
            }
        }
        report
    }

    /// What must be and is not.
    pub(crate) fn missed(&self) -> Vec<String> {
        let missed = |figure: &&Outcome| figure.must.is_some_and(|(_, verdict)| verdict == Verdict::Missed);
        self.figures.iter().filter(missed).map(|figure| format!("{}, {}", figure.row, figure.what)).collect()
    }

    fn of<'a>(&'a self, row: &'a Row, peer: &'a Peer) -> impl Iterator<Item = &'a Observation> {
        self.observations.iter().filter(|seen| seen.row == row.name && seen.peer == peer.name)
    }

    fn outcome(&self, row: &Row, figure: &Figure, peer: &Peer) -> Option<Outcome> {
        let (other, applies) = match figure.compare {
            Compare::Gain | Compare::Share => (&row.peers[0], *peer != row.peers[0]),
            Compare::GainOnHaproxy => {
                (row.peers.iter().find(|other| other.proxy == Proxy::Haproxy)?, peer.proxy.is_ours())
            }
            Compare::Itself => (peer, true),
        };
        if peer.proxy == Proxy::Direct || !applies {
            return None;
        }
        let value = |seen: &Observation| {
            let own = self.value(row, figure, peer, seen.round)?;
            let others = self.value(row, figure, other, seen.round)?;
            Some(match figure.compare {
                Compare::Gain | Compare::GainOnHaproxy => others / own,
                Compare::Share => own / others,
                Compare::Itself => own,
            })
        };
        let values: Vec<f64> = self.of(row, peer).filter_map(value).collect();
        if values.is_empty() {
            return None;
        }
        let judge = |limit: Option<f64>| {
            let good = |value: &f64| match (figure.compare, limit) {
                (Compare::Gain | Compare::GainOnHaproxy, Some(limit)) => *value >= limit,
                (Compare::Share | Compare::Itself, Some(limit)) => *value <= limit,
                (Compare::Gain | Compare::GainOnHaproxy | Compare::Share | Compare::Itself, None) => true,
            };
            let likely = interval(&values);
            let verdict = match (likely.iter().all(good), likely.iter().any(good)) {
                (true, _) => Verdict::Met,
                (false, false) => Verdict::Missed,
                (false, true) => Verdict::Unresolved,
            };
            limit.filter(|_| peer.proxy.is_ours()).map(|limit| (limit, verdict))
        };
        let (must, aim) = (judge(figure.must), judge(figure.aim));
        let median = median(&values);
        Some(Outcome { row: row.name, what: figure.what, peer: peer.name, values, median, must, aim })
    }

    fn value(&self, row: &Row, figure: &Figure, peer: &Peer, round: u32) -> Option<f64> {
        let seen = |peer| self.of(row, peer).find(|seen| seen.round == round);
        let of_peer = seen(peer)?;
        match figure.measure {
            Measure::Cpu => Some(of_peer.cpu_us()),
            Measure::AddedP50 => Some(of_peer.window.p50_us? - seen(&DIRECT)?.window.p50_us?),
            Measure::RssIdle => Some(of_peer.rss_idle_kib),
            Measure::RssLoaded => Some(of_peer.window.rss_kib),
            Measure::KibPerConnection => of_peer.window.kib_per_connection,
            Measure::Update(of) => of_peer.window.update.as_ref().map(of),
        }
    }

    fn updates(&self, f: &mut fmt::Formatter<'_>, row: &Row) -> fmt::Result {
        writeln!(f, "{}; median (min-max)", row.name)?;
        writeln!(
            f,
            "{:<8} {:>20} {:>17} {:>34} {:>22} {:>22} {:>22} {:>20}",
            "",
            "full s",
            "full CPU s",
            "MiB: empty, full, peak, at the end",
            "weight acked ms",
            "weight seen ms",
            "endpoint acked ms",
            "small CPU ms"
        )?;
        for peer in row.peers {
            let of = |value: fn(&Updated) -> f64| {
                self.of(row, peer).filter_map(|seen| seen.window.update.as_ref()).map(value).collect::<Vec<_>>()
            };
            let mib = |value| format!("{:.1}", median(&of(value)) / 1024.0);
            let memory = [mib(|it| it.empty_kib), mib(|it| it.full_kib), mib(|it| it.peak_kib), mib(|it| it.small_kib)];
            writeln!(
                f,
                "{:<8} {:>20} {:>17} {:>34} {:>22} {:>22} {:>22} {:>20}",
                peer.name,
                spread(&of(|it| it.full_seconds), 2),
                spread(&of(|it| it.full_cpu_seconds), 2),
                memory.join(", "),
                spread(&of(|it| it.weights_acknowledged_seconds * 1e3), 2),
                spread(&of(|it| it.weights_effective_seconds * 1e3), 2),
                spread(&of(|it| it.endpoints_acknowledged_seconds * 1e3), 2),
                spread(&of(|it| it.small_cpu_seconds * 1e3), 3),
            )?;
        }
        writeln!(f)
    }

    fn row(&self, f: &mut fmt::Formatter<'_>, row: &Row) -> fmt::Result {
        if let Load::Updates { .. } = row.load {
            return self.updates(f, row);
        }
        writeln!(f, "{}; median (min-max)", row.name)?;
        writeln!(
            f,
            "{:<14} {:>24} {:>22} {:>16} {:>15} {:>7} {:>18}",
            "", "CPU us/request", "requests/s", "CPU %", "RSS MiB", "steal %", "p50 us"
        )?;
        for peer in row.peers {
            let of = |value: fn(&Observation) -> f64| self.of(row, peer).map(value).collect::<Vec<_>>();
            let rss =
                (median(&of(|seen| seen.rss_idle_kib)) / 1024.0, median(&of(|seen| seen.window.rss_kib)) / 1024.0);
            let latencies: Vec<f64> = self.of(row, peer).filter_map(|seen| seen.window.p50_us).collect();
            let percent = of(Observation::cpu_percent);
            writeln!(
                f,
                "{:<14} {:>24} {:>22} {:>16} {:>15} {:>7.1} {:>18}{}",
                peer.name,
                spread(&of(Observation::cpu_us), 1),
                spread(&of(Observation::rate), 0),
                spread(&percent, 0),
                format!("{:.1} -> {:.1}", rss.0, rss.1),
                median(&of(|seen| seen.window.steal * 100.0)),
                if latencies.is_empty() { "-".to_owned() } else { spread(&latencies, 0) },
                if matches!(row.load, Load::Saturated { .. } | Load::Handshakes { .. })
                    && median(&percent) < SATURATED_PERCENT
                {
                    "  (its core was not saturated)"
                } else {
                    ""
                },
            )?;
        }
        writeln!(f)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for row in ROWS {
            if self.observations.iter().any(|seen| seen.row == row.name) {
                self.row(f, row)?;
            }
        }
        writeln!(f, "| row | figure | of | median (interval) | must | aim |\n|---|---|---|---|---|---|")?;
        for figure in &self.figures {
            let judged = |limit: Option<(f64, Verdict)>| match limit {
                Some((limit, Verdict::Met)) => format!("{limit}: met"),
                Some((limit, Verdict::Missed)) => format!("{limit}: missed"),
                Some((limit, Verdict::Unresolved)) => format!("{limit}: unresolved"),
                None => String::new(),
            };
            writeln!(
                f,
                "| {} | {} | {} | {} | {} | {} |",
                figure.row,
                figure.what,
                figure.peer,
                spread(&interval(&figure.values), 2),
                judged(figure.must),
                judged(figure.aim)
            )?;
        }
        write!(f, "\nload average {}; the run took {:.1} minutes", self.load_average, self.seconds / 60.0)
    }
}

/// The values among which the median of all that could be measured lies, in 63 of 64 runs: all of them up to 7, the inner ones of more,
/// so that more rounds tell more. (Each value is as likely above that median as below it: the sign test.)
fn interval(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    // That so many are below the median by chance, as a share of all cases; and that so many or fewer are.
    let (mut exactly, mut at_most) = (0.5_f64.powi(i32::try_from(sorted.len()).unwrap_or(i32::MAX)), 0.0);
    let mut outside = 0;
    for below in 0..sorted.len() / 2 {
        at_most += exactly;
        if 2.0 * at_most > 1.0 / 64.0 {
            break;
        }
        outside = below;
        exactly *= (sorted.len() - below) as f64 / (below + 1) as f64;
    }
    sorted.drain(..outside);
    sorted.truncate(sorted.len() - outside);
    sorted
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => sorted[odd / 2],
        even => f64::midpoint(sorted[even / 2 - 1], sorted[even / 2]),
    }
}

fn spread(values: &[f64], digits: usize) -> String {
    let (least, most) = values.iter().fold((f64::MAX, f64::MIN), |(least, most), v| (least.min(*v), most.max(*v)));
    format!("{:.digits$} ({least:.digits$}-{most:.digits$})", median(values))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::AHEAD;

    #[test]
    fn ours_is_held_against_haproxy_of_the_same_round_and_need_not_be_ahead() {
        let ahead = |costs: [(f64, f64); 3]| {
            let mut observations = Vec::new();
            for (round, (haproxy, ours)) in (0..).zip(costs) {
                for (peer, cost) in [("envoy", 200.0), ("haproxy", haproxy), ("sluice", ours)] {
                    let window = Window { requests: 1000, proxy_cpu_seconds: cost, seconds: 1.0, ..Window::default() };
                    observations.push(Observation { row: ROWS[0].name, round, peer, window, rss_idle_kib: 0.0 });
                }
            }
            let report = Report::new(observations, Duration::ZERO);
            assert!(report.missed().is_empty(), "{:?}", report.missed());
            let of = |figure: &Outcome| (figure.peer, figure.values.clone(), figure.aim);
            report.figures.iter().filter(|figure| figure.what == AHEAD.what).map(of).collect::<Vec<_>>()
        };
        for (costs, values, verdict) in [
            ([(10.0, 8.0), (20.0, 16.0), (30.0, 24.0)], [1.25, 1.25, 1.25], Verdict::Met),
            ([(10.0, 8.0), (20.0, 16.0), (20.0, 25.0)], [1.25, 1.25, 0.8], Verdict::Unresolved),
            ([(10.0, 12.5), (20.0, 25.0), (20.0, 25.0)], [0.8, 0.8, 0.8], Verdict::Missed),
        ] {
            assert_eq!(ahead(costs), [("sluice", values.to_vec(), Some((1.0, verdict)))]);
        }
    }

    #[test]
    fn of_more_rounds_the_outermost_say_nothing_of_the_median() {
        // The ranks of the sign test's interval at 98.4 %, from its tables.
        for (rounds, outside) in [(1, 0), (3, 0), (7, 0), (9, 0), (10, 0), (11, 1), (15, 2), (20, 4), (31, 8)] {
            let mut values: Vec<f64> = (0..rounds).map(f64::from).collect();
            values.reverse();
            let (first, last) = (f64::from(outside), f64::from(rounds - 1 - outside));
            let likely = interval(&values);
            assert_eq!((likely.first(), likely.last()), (Some(&first), Some(&last)), "of {rounds}");
            assert_eq!(median(&likely), median(&values), "of {rounds}");
        }
        assert!(interval(&[]).is_empty());
    }
}
