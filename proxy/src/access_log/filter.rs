//! Which requests the access log has a line for.
//!
//! Rules are given as a JSON list. A request is written if any rule matches it, and a rule matches if all that it says is so.
//! The conditions are those of Envoy's access log filters
//! (<https://www.envoyproxy.io/docs/envoy/latest/api-v3/config/accesslog/v3/accesslog.proto>).

use std::{str::FromStr, time::Duration};

use serde::Deserialize;

use crate::{failure::Flag, metrics::GrpcStatus};

/// Rules of which one must match. Without a rule every request is written.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Filter(Vec<Rule>);

/// What decides: how a request ended.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    pub status: u16,
    pub grpc_status: Option<GrpcStatus>,
    pub flag: Option<Flag>,
    pub duration: Duration,
}

#[derive(Debug, Clone, Default, PartialEq)]
struct Rule {
    min_status: Option<u16>,
    min_duration: Option<Duration>,
    /// Bits by position in [`Flag::ALL`].
    flags: Option<u32>,
    /// Bits by code.
    grpc_statuses: Option<u32>,
    percentage: Option<f64>,
}

/// A rule as it is written.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Written {
    /// `status_code_filter` with GE.
    min_status: Option<u16>,
    /// `duration_filter` with GE.
    min_duration_milliseconds: Option<u64>,
    /// `response_flag_filter`: one of these, or any if there is none.
    response_flags: Option<Vec<String>>,
    /// `grpc_status_filter`.
    grpc_statuses: Option<Vec<String>>,
    /// `runtime_filter`.
    percentage: Option<f64>,
}

impl Filter {
    /// Whether a request that ended so is written.
    #[must_use]
    pub fn wants(&self, outcome: &Outcome) -> bool {
        self.0.is_empty() || self.0.iter().any(|rule| rule.matches(outcome))
    }
}

impl Rule {
    fn matches(&self, outcome: &Outcome) -> bool {
        self.min_status.is_none_or(|least| outcome.status >= least)
            && self.min_duration.is_none_or(|least| outcome.duration >= least)
            && self.flags.is_none_or(|wanted| outcome.flag.is_some_and(|flag| wanted >> (flag as u32) & 1 == 1))
            && self.grpc_statuses.is_none_or(|wanted| {
                outcome.grpc_status.is_some_and(|status| wanted >> u32::from(status.code()) & 1 == 1)
            })
            // Drawn last: of those that match, not of all.
            && self.percentage.is_none_or(|percentage| fastrand::f64() * 100.0 < percentage)
    }
}

impl FromStr for Filter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Ok(Self::default());
        }
        let rules: Vec<Written> = serde_json::from_str(text)
            .map_err(|error| format!("it must be a JSON list of rules such as [{{\"minStatus\":500}}]: {error}"))?;
        let rules = rules.into_iter().enumerate();
        let rules = rules.map(|(index, rule)| rule.read().map_err(|error| format!("rule {}: {error}", index + 1)));
        Ok(Self(rules.collect::<Result<_, _>>()?))
    }
}

impl Written {
    fn read(self) -> Result<Rule, String> {
        let rule = Rule {
            min_status: within(self.min_status, "minStatus", 100..=599)?,
            min_duration: self.min_duration_milliseconds.map(Duration::from_millis),
            flags: self.response_flags.map(|names| flags(&names)).transpose()?,
            grpc_statuses: self.grpc_statuses.map(|names| grpc_statuses(&names)).transpose()?,
            percentage: within(self.percentage, "percentage", 0.0..=100.0)?,
        };
        if rule == Rule::default() {
            return Err("it says nothing; give it at least one of minStatus, minDurationMilliseconds, responseFlags, \
                        grpcStatuses and percentage"
                .to_owned());
        }
        Ok(rule)
    }
}

fn within<T: PartialOrd + std::fmt::Display + Copy>(
    value: Option<T>,
    name: &str,
    range: std::ops::RangeInclusive<T>,
) -> Result<Option<T>, String> {
    match value {
        Some(value) if !range.contains(&value) => {
            Err(format!("{name} is {value}; it must be from {} to {}", range.start(), range.end()))
        }
        value => Ok(value),
    }
}

fn flags(names: &[String]) -> Result<u32, String> {
    if names.is_empty() {
        return Ok(u32::MAX);
    }
    names.iter().try_fold(0, |bits, name| match Flag::ALL.into_iter().find(|flag| flag.name() == name) {
        Some(flag) => Ok(bits | 1 << (flag as u32)),
        None => {
            let known = Flag::ALL.map(Flag::name).join(", ");
            Err(format!("responseFlags has '{name}'; the flags are {known}, and an empty list is any of them"))
        }
    })
}

fn grpc_statuses(names: &[String]) -> Result<u32, String> {
    if names.is_empty() {
        return Err("grpcStatuses is empty; name at least one status, for example UNAVAILABLE".to_owned());
    }
    names.iter().try_fold(0, |bits, name| match GrpcStatus::of_name(name) {
        Some(status) => Ok(bits | 1 << u32::from(status.code())),
        None => Err(format!("grpcStatuses has '{name}'; it must be a name such as UNAVAILABLE or DEADLINE_EXCEEDED")),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const FINE: Outcome = Outcome { status: 200, grpc_status: None, flag: None, duration: Duration::from_millis(5) };

    fn wants(rules: &str, outcome: Outcome) -> bool {
        rules.parse::<Filter>().unwrap().wants(&outcome)
    }

    #[test]
    fn without_a_rule_every_request_is_written() {
        assert!(wants("", FINE) && wants("[]", FINE));
    }

    #[test]
    fn one_rule_must_match_with_all_that_it_says() {
        let rules = r#"[{"minStatus": 500}, {"minStatus": 400, "minDurationMilliseconds": 100}, {"responseFlags": []},
            {"grpcStatuses": ["UNAVAILABLE", "INTERNAL"]}]"#;
        let slow = Duration::from_millis(100);
        let table = [
            (FINE, false),
            (Outcome { status: 499, ..FINE }, false),
            (Outcome { status: 500, ..FINE }, true),
            (Outcome { status: 404, duration: slow, ..FINE }, true),
            (Outcome { duration: slow, ..FINE }, false),
            (Outcome { flag: Some(Flag::DelayInjected), ..FINE }, true),
            (Outcome { grpc_status: Some(GrpcStatus::UNAVAILABLE), ..FINE }, true),
            (Outcome { grpc_status: Some(GrpcStatus::UNKNOWN), ..FINE }, false),
        ];
        for (outcome, expected) in table {
            assert_eq!(wants(rules, outcome), expected, "{outcome:?}");
        }
        let named = r#"[{"responseFlags": ["UF", "DI"]}]"#;
        assert!(wants(named, Outcome { flag: Some(Flag::UpstreamConnectionFailure), ..FINE }));
        assert!(!wants(named, Outcome { flag: Some(Flag::NoRoute), ..FINE }));
    }

    #[test]
    fn a_percentage_is_drawn_for_each_request() {
        let filter = r#"[{"percentage": 25}]"#.parse::<Filter>().unwrap();
        fastrand::seed(1);
        let written = (0..10_000).filter(|_| filter.wants(&FINE)).count();
        assert!((2300..2700).contains(&written), "{written}");
        assert!(!wants(r#"[{"percentage": 0}]"#, FINE) && wants(r#"[{"percentage": 100}]"#, FINE));
        assert!(!wants(r#"[{"percentage": 100, "minStatus": 500}]"#, FINE));
    }

    #[test]
    fn the_chart_knows_the_same_names() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/sluice/values.schema.json");
        let schema: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let rule = &schema["properties"]["fleet"]["properties"]["accessLogFilter"]["items"]["properties"];
        let names = |of: &str| -> Vec<String> { serde_json::from_value(rule[of]["items"]["enum"].clone()).unwrap() };
        assert_eq!(names("responseFlags"), Flag::ALL.map(Flag::name));
        let codes = (0..=16).map(|code| GrpcStatus::of_code(code).unwrap().name());
        assert_eq!(names("grpcStatuses"), codes.collect::<Vec<_>>());
        assert_eq!(rule.as_object().unwrap().len(), 5);
    }

    #[test]
    fn a_mistake_is_named() {
        let table = [
            ("errors", "JSON list of rules"),
            (r#"{"minStatus": 500}"#, "JSON list of rules"),
            (r#"[{"minstatus": 500}]"#, "unknown field `minstatus`"),
            (r#"[{"minStatus": 500}, {}]"#, "rule 2: it says nothing"),
            (r#"[{"minStatus": 5}]"#, "minStatus is 5; it must be from 100 to 599"),
            (r#"[{"minDurationMilliseconds": -1}]"#, "-1"),
            (r#"[{"percentage": 101}]"#, "percentage is 101; it must be from 0 to 100"),
            (r#"[{"responseFlags": ["uf"]}]"#, "responseFlags has 'uf'; the flags are UH, UF"),
            (r#"[{"grpcStatuses": []}]"#, "name at least one"),
            (r#"[{"grpcStatuses": ["14"]}]"#, "grpcStatuses has '14'"),
        ];
        for (rules, expected) in table {
            let error = rules.parse::<Filter>().unwrap_err();
            assert!(error.contains(expected), "{rules}: {error}");
        }
    }
}
