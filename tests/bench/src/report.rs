//! The table.

use std::fmt;

use serde::Serialize;

use crate::load::Window;

#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    pub(crate) rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) scenario: String,
    pub(crate) round: usize,
    pub(crate) contestant: String,
    #[serde(flatten)]
    pub(crate) window: Window,
    pub(crate) rss_mib: f64,
}

impl Row {
    fn cpu_us(&self) -> f64 {
        self.window.proxy_cpu_seconds * 1e6 / self.window.requests as f64
    }

    fn rps(&self) -> f64 {
        self.window.requests as f64 / self.window.seconds
    }

    fn cpu_percent(&self) -> f64 {
        self.window.proxy_cpu_seconds * 100.0 / self.window.seconds
    }
}

impl Report {
    fn scenarios(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.rows.iter().map(|row| row.scenario.as_str()).collect();
        names.dedup();
        names
    }

    fn rows(&self, scenario: &str, contestant: &str) -> Vec<&Row> {
        let wanted = |row: &&Row| row.scenario == scenario && row.contestant == contestant;
        self.rows.iter().filter(wanted).collect()
    }

    /// Envoy's CPU per request over ours, round by round.
    fn round_ratios(&self, scenario: &str) -> Vec<f64> {
        let (envoy, sluice) = (self.rows(scenario, "envoy"), self.rows(scenario, "sluice"));
        let ratio = |envoy: &&Row| {
            let ours = sluice.iter().find(|row| row.round == envoy.round)?;
            Some(envoy.cpu_us() / ours.cpu_us())
        };
        envoy.iter().filter_map(ratio).collect()
    }

    /// The median ratio of each scenario.
    pub(crate) fn ratios(&self) -> Vec<(String, f64)> {
        self.scenarios().into_iter().map(|name| (name.to_owned(), median(&self.round_ratios(name)))).collect()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for scenario in self.scenarios() {
            writeln!(f, "{scenario}, saturated; median (min-max)")?;
            writeln!(
                f,
                "{:<8} {:>24} {:>22} {:>16} {:>9} {:>7}",
                "", "CPU us/request", "requests/s", "CPU %", "RSS MiB", "steal %"
            )?;
            for contestant in ["envoy", "sluice"] {
                let rows = self.rows(scenario, contestant);
                let of = |value: fn(&Row) -> f64| rows.iter().map(|row| value(row)).collect::<Vec<_>>();
                writeln!(
                    f,
                    "{contestant:<8} {:>24} {:>22} {:>16} {:>9.1} {:>7.1}",
                    spread(&of(Row::cpu_us), 1),
                    spread(&of(Row::rps), 0),
                    spread(&of(Row::cpu_percent), 0),
                    median(&of(|row| row.rss_mib)),
                    median(&of(|row| row.window.steal * 100.0)),
                )?;
            }
            let ratios = self.round_ratios(scenario);
            writeln!(f, "Envoy / sluice, CPU per request, {} rounds: {}\n", ratios.len(), spread(&ratios, 2))?;
        }
        write!(f, "load average {}", std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim())
    }
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
