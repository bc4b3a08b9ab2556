//! Which window a built-in gate judges (C21), from the times at which each member of the fleet was scraped.
//!
//! A window ends at the newest instant for which *every* member has a sample, and begins at an instant before which every
//! member was scraped at least once since the acknowledgement: what is counted between the two happened after it, on
//! every member. All times are Prometheus's own, in milliseconds.

use std::collections::BTreeMap;

use super::prometheus::Times;

/// A stream that was silent for so many of its scrape intervals is not scraped any more.
const MISSED_SCRAPES: i64 = 3;
/// ... and at least so long: a scrape may be slow.
const LEAST_SILENCE: i64 = 15_000;
/// Scrape interval of a stream that has shown a single sample only, if no other stream tells one.
const UNKNOWN_INTERVAL: i64 = 60_000;

/// The part of time that is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    /// The query's time.
    pub(crate) end: i64,
    /// Length.
    pub(crate) length: i64,
    /// It has the gate's full length. Otherwise it is the part since the acknowledgement.
    pub(crate) whole: bool,
    /// Before the window's start, every member has a sample within this time.
    pub(crate) lead: i64,
}

/// Why there is no window yet.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoWindow {
    #[error("no member of the fleet is known")]
    NoMembers,
    #[error(
        "Prometheus has no sample of {}: check that it scrapes the fleet's Pods (port 20444, /metrics)",
        named(members)
    )]
    NotScraped { members: Vec<String> },
    #[error("the last sample of {member} is {seconds} s old: check that Prometheus can still scrape it")]
    Silent { member: String, seconds: i64 },
    #[error("waiting for two samples of {member} since the acknowledgement")]
    TooYoung { member: String },
}

/// At most three names.
fn named(members: &[String]) -> String {
    match members {
        [first, second, third, rest @ ..] if !rest.is_empty() => {
            format!("{first}, {second}, {third} and {} more members of the fleet", rest.len())
        }
        _ => {
            format!("{}, {} of the fleet", members.join(", "), if members.len() == 1 { "a member" } else { "members" })
        }
    }
}

/// The window of a gate whose full window has `length`. `now` and `acknowledged` are in Prometheus's clock.
pub(crate) fn window(
    streams: &[Times],
    members: &[String],
    now: i64,
    acknowledged: i64,
    length: i64,
) -> Result<Window, NoWindow> {
    if members.is_empty() {
        return Err(NoWindow::NoMembers);
    }
    let mut of_member: BTreeMap<&str, Vec<&[i64]>> =
        members.iter().map(|member| (member.as_str(), Vec::new())).collect();
    for stream in streams {
        let member = stream.labels.get("member").map(String::as_str).unwrap_or_default();
        if let (Some(list), false) = (of_member.get_mut(member), stream.times.is_empty()) {
            list.push(&stream.times);
        }
    }
    let missing: Vec<String> =
        of_member.iter().filter(|(_, list)| list.is_empty()).map(|(member, _)| (*member).to_owned()).collect();
    if !missing.is_empty() {
        return Err(NoWindow::NotScraped { members: missing });
    }

    let usual = of_member.values().flatten().filter_map(|times| interval(times)).max().unwrap_or(UNKNOWN_INTERVAL);
    // A member has several streams if two jobs scrape it, or if it came back under another address: all that are
    // still alive must have what the window needs, because the counters carry the same labels.
    let mut live: Vec<(&str, &[i64])> = Vec::new();
    for (member, list) in &of_member {
        let alive = |times: &&&[i64]| {
            let silence = (interval(times).unwrap_or(usual) * MISSED_SCRAPES).max(LEAST_SILENCE);
            now - last(times) <= silence
        };
        let before = live.len();
        live.extend(list.iter().filter(alive).map(|times| (*member, *times)));
        if live.len() == before {
            let newest = list.iter().map(|times| last(times)).max().unwrap_or(0);
            return Err(NoWindow::Silent { member: (*member).to_owned(), seconds: (now - newest) / 1000 });
        }
    }

    let mut end = i64::MAX;
    let mut start = i64::MIN;
    let mut youngest = "";
    for (member, times) in &live {
        end = end.min(last(times));
        let first = times.iter().copied().find(|time| *time >= acknowledged).unwrap_or(i64::MAX);
        if first > start {
            (start, youngest) = (first, member);
        }
    }
    if start >= end {
        let few = |times: &[i64]| times.iter().filter(|time| **time >= acknowledged).count() < 2;
        let member = live.iter().find(|(_, times)| few(times)).map_or(youngest, |(member, _)| member);
        return Err(NoWindow::TooYoung { member: member.to_owned() });
    }
    let whole = end - start >= length;
    let length = if whole { length } else { end - start };
    let begin = end - length;
    let base = |times: &[i64]| times.iter().copied().rev().find(|time| *time <= begin).unwrap_or(begin);
    let lead = live.iter().map(|(_, times)| begin - base(times)).max().unwrap_or(0) + 1;
    Ok(Window { end, length, whole, lead })
}

fn last(times: &[i64]) -> i64 {
    times.last().copied().unwrap_or(i64::MIN)
}

/// The usual time between two samples: the median, which a missed scrape does not move.
fn interval(times: &[i64]) -> Option<i64> {
    let mut gaps: Vec<i64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    gaps.sort_unstable();
    gaps.get(gaps.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// A stream of a member with samples at these seconds.
    fn stream(member: &str, seconds: impl IntoIterator<Item = i64>) -> Times {
        Times {
            labels: BTreeMap::from([("member".to_owned(), member.to_owned())]),
            times: seconds.into_iter().map(|second| second * 1000).collect(),
        }
    }

    fn every(step: i64, from: i64, to: i64) -> impl Iterator<Item = i64> {
        (from..=to).step_by(usize::try_from(step).unwrap())
    }

    fn members(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn a_window_ends_where_every_member_has_a_sample_and_is_whole_if_each_had_one_before_it() {
        let streams = [stream("a", every(15, 0, 120)), stream("b", every(15, 7, 127))];
        let names = members(&["a", "b"]);
        // Acknowledged at 20: the first samples since are at 30 (a) and 22 (b); the end is 120 (a).
        let judged = window(&streams, &names, 130_000, 20_000, 60_000).unwrap();
        assert_eq!(judged, Window { end: 120_000, length: 60_000, whole: true, lead: 8_001 });
        let judged = window(&streams, &names, 130_000, 20_000, 90_000).unwrap();
        assert!(judged.whole, "90 s from 30 to 120");
        let judged = window(&streams, &names, 130_000, 31_000, 90_000).unwrap();
        // a's first sample since 31 is at 45.
        assert_eq!(judged, Window { end: 120_000, length: 75_000, whole: false, lead: 8_001 });
    }

    #[test]
    fn nothing_is_judged_before_every_member_has_two_samples_since_the_acknowledgement() {
        let streams = [stream("a", every(15, 0, 120)), stream("b", every(15, 7, 127))];
        let names = members(&["a", "b"]);
        for acknowledged in [106_000, 113_000, 121_000, 500_000] {
            let error = window(&streams, &names, 130_000, acknowledged, 60_000).unwrap_err();
            assert!(matches!(error, NoWindow::TooYoung { .. }), "{acknowledged}: {error:?}");
        }
        assert_eq!(
            window(&streams, &names, 130_000, 100_000, 60_000).unwrap().length,
            8_000,
            "from 112 (b) to 120 (a)"
        );
    }

    #[test]
    fn members_that_are_not_scraped_are_named() {
        let streams = [stream("a", every(15, 0, 120)), stream("z", every(15, 0, 120)), stream("b", [])];
        let error = window(&streams, &members(&["a", "b"]), 130_000, 0, 60_000).unwrap_err();
        assert_eq!(error, NoWindow::NotScraped { members: members(&["b"]) });
        assert!(error.to_string().starts_with("Prometheus has no sample of b, a member of the fleet:"), "{error}");
        let error = window(&[], &members(&["a", "b", "c", "d", "e"]), 130_000, 0, 60_000).unwrap_err();
        assert!(error.to_string().contains("a, b, c and 2 more members"), "{error}");
        assert_eq!(window(&streams, &[], 130_000, 0, 60_000).unwrap_err(), NoWindow::NoMembers);
    }

    #[test]
    fn a_member_that_is_scraped_no_more_stops_the_judgement_and_is_named() {
        let streams = [stream("a", every(15, 0, 180)), stream("b", every(15, 0, 120))];
        let names = members(&["a", "b"]);
        // Three scrapes may be missed; then what serves there is not known.
        assert!(window(&streams, &names, 165_000, 0, 60_000).is_ok());
        let error = window(&streams, &names, 166_000, 0, 60_000).unwrap_err();
        assert_eq!(error, NoWindow::Silent { member: "b".to_owned(), seconds: 46 });
    }

    #[test]
    fn a_member_that_joined_in_mid_window_makes_the_window_shorter() {
        let streams = [stream("a", every(10, 0, 120)), stream("new", every(10, 85, 125))];
        let judged = window(&streams, &members(&["a", "new"]), 126_000, 0, 60_000).unwrap();
        assert_eq!(judged, Window { end: 120_000, length: 35_000, whole: false, lead: 5_001 });
    }

    #[test]
    fn of_two_jobs_that_scrape_one_member_both_count_and_a_dead_address_does_not() {
        let twice = [stream("a", every(10, 0, 120)), stream("a", every(10, 64, 124))];
        assert!(!window(&twice, &members(&["a"]), 126_000, 0, 60_000).unwrap().whole);
        let moved = [stream("a", every(10, 0, 50)), stream("a", every(10, 54, 124))];
        let judged = window(&moved, &members(&["a"]), 126_000, 0, 60_000).unwrap();
        assert_eq!((judged.end, judged.whole), (124_000, true));
    }

    #[test]
    fn a_single_sample_is_alive_for_as_long_as_the_other_members_intervals_say() {
        let streams = [stream("a", every(30, 0, 120)), stream("b", [60])];
        let error = window(&streams, &members(&["a", "b"]), 149_000, 50_000, 60_000).unwrap_err();
        assert_eq!(error, NoWindow::TooYoung { member: "b".to_owned() });
        assert!(matches!(
            window(&streams, &members(&["a", "b"]), 151_000, 50_000, 60_000).unwrap_err(),
            NoWindow::Silent { .. }
        ));
    }
}
