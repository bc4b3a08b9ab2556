use std::time::Duration;

use proptest::prelude::*;

use super::*;

/// A release as two members of the fleet report it, ten times a second each. Shares of bad requests over time, in seconds.
struct Release<'a> {
    /// Requests in a second.
    primary_rate: f64,
    canary_rate: f64,
    primary: &'a dyn Fn(f64) -> f64,
    canary: &'a dyn Fn(f64) -> f64,
    seconds: f64,
}

/// How it ended.
struct Outcome {
    /// When it was taken back, if it was.
    at: Option<f64>,
    /// Bad requests of the canary until then.
    bad: u64,
    certainty: Option<Certainty>,
}

const MEMBERS: u32 = 2;

impl Release<'_> {
    fn run(&self, random: &mut fastrand::Rng, mut evidence: Evidence) -> Outcome {
        let step = 0.1 / f64::from(MEMBERS);
        let (mut at, mut bad) = (0.0, 0);
        while at < self.seconds {
            at += step;
            let mut side = |rate: f64, share: f64| {
                let requests = poisson(random, rate * step);
                Counts { requests, bad: (0..requests).filter(|_| random.f64() < share).count() as u64 }
            };
            let sides = Sides {
                primary: side(self.primary_rate, (self.primary)(at)),
                canary: side(self.canary_rate, (self.canary)(at)),
            };
            bad += sides.canary.bad;
            if let Some(certainty) = evidence.add(Duration::from_secs_f64(at), sides) {
                return Outcome { at: Some(at), bad, certainty: Some(certainty) };
            }
        }
        Outcome { at: None, bad, certainty: None }
    }

    /// How many of these releases are taken back.
    fn alarms(&self, releases: u32, evidence: &Evidence) -> u32 {
        let mut random = fastrand::Rng::with_seed(7);
        (0..releases).filter(|_| self.run(&mut random, evidence.clone()).at.is_some()).count() as u32
    }
}

/// Knuth's.
fn poisson(random: &mut fastrand::Rng, mean: f64) -> u64 {
    let end = (-mean).exp();
    let (mut product, mut count) = (random.f64(), 0);
    while product > end {
        product *= random.f64();
        count += 1;
    }
    count
}

/// A share of bad answers, at a time in seconds.
type Share = fn(f64) -> f64;

/// Both sides alike, and what lies just within a margin of 5 points: the hypothesis holds in each.
const WITHIN: [(&str, f64, f64, Share, Share); 9] = [
    ("a good version", 240.0, 60.0, |_| 0.001, |_| 0.001),
    ("at the margin", 240.0, 60.0, |_| 0.0, |_| 0.05),
    ("both mediocre", 240.0, 60.0, |_| 0.2, |_| 0.2),
    ("both mediocre, at the margin", 240.0, 60.0, |_| 0.2, |_| 0.25),
    ("few requests", 5.0, 0.5, |_| 0.3, |_| 0.35),
    ("few of the primary", 1.0, 20.0, |_| 0.02, |_| 0.07),
    ("half each", 50.0, 50.0, |_| 0.02, |_| 0.07),
    ("a dependency of both is down for a while", 240.0, 60.0, outage, outage),
    ("both come and go in bursts", 100.0, 25.0, bursts, bursts),
];

fn outage(at: f64) -> f64 {
    if (8.0..13.0).contains(&at) { 0.9 } else { 0.01 }
}

fn bursts(at: f64) -> f64 {
    if (at * 3.0).sin() > 0.9 { 0.6 } else { 0.0 }
}

#[test]
fn a_release_within_the_margin_is_taken_back_no_more_often_than_is_stated() {
    // One in 10,000 cannot be counted in a test; the same capital comes to 20 in at most one of 20.
    for (name, primary_rate, canary_rate, primary, canary) in WITHIN {
        let release = Release { primary_rate, canary_rate, primary: &primary, canary: &canary, seconds: 30.0 };
        let alarms = release.alarms(400, &Evidence::with_alarm(0.05, 20.0));
        assert!(alarms <= 20, "{name}: {alarms} of 400");
    }
}

#[test]
fn at_the_stated_rate_no_release_within_the_margin_is_seen_to_be_taken_back() {
    for (name, primary_rate, canary_rate, primary, canary) in WITHIN {
        let release = Release { primary_rate, canary_rate, primary: &primary, canary: &canary, seconds: 60.0 };
        let alarms = release.alarms(100, &Evidence::new(0.05, 1));
        assert_eq!(alarms, 0, "{name}");
    }
}

#[test]
fn half_of_all_answers_bad_at_300_requests_a_second_and_weight_20_are_found_before_20_of_them() {
    let release =
        Release { primary_rate: 240.0, canary_rate: 60.0, primary: &|_| 0.0, canary: &|_| 0.5, seconds: 10.0 };
    let mut random = fastrand::Rng::with_seed(11);
    // Two signals, at three weights and the promotion.
    let outcomes: Vec<_> = (0..500).map(|_| release.run(&mut random, Evidence::new(0.05, 8))).collect();
    let late = outcomes.iter().filter(|outcome| outcome.bad >= 18 || outcome.at.is_none_or(|at| at > 0.75)).count();
    assert!(late <= 10, "{late} of 500");
    let mean = outcomes.iter().map(|outcome| outcome.bad).sum::<u64>() as f64 / 500.0;
    assert!(mean < 13.0, "{mean} on average");
}

#[test]
fn every_answer_bad_is_found_at_once_and_a_small_share_in_its_time() {
    for (share, most) in [(1.0, 0.5), (0.3, 3.0), (0.15, 20.0)] {
        let canary = |_| share;
        let release =
            Release { primary_rate: 240.0, canary_rate: 60.0, primary: &|_| 0.001, canary: &canary, seconds: 60.0 };
        let mut random = fastrand::Rng::with_seed(3);
        for _ in 0..50 {
            let found = release.run(&mut random, Evidence::new(0.05, 8)).at;
            assert!(found.is_some_and(|at| at < most), "{share}: {found:?}");
        }
    }
}

/// Requests a second to a canary that begins to get some, of which a share fails at once and the others are answered after two seconds, as
/// the primary's are. Whether it is taken back when those under way are `counted`, or not.
fn begins(counted: bool, share: f64, random: &mut fastrand::Rng) -> bool {
    const ANSWERED_AFTER: usize = 20;
    let mut evidence = Evidence::new(0.05, 8);
    let (mut answers, mut most) = (vec![0; ANSWERED_AFTER], 0);
    (0..100).any(|tick| {
        let mut draw = |mean: f64| {
            let requests = poisson(random, mean);
            let bad = (0..requests).filter(|_| random.f64() < share).count() as u64;
            (requests, bad)
        };
        let ((primary, primary_bad), (drawn, bad)) = (draw(24.0), draw(6.0));
        let answered = answers[tick % ANSWERED_AFTER];
        answers[tick % ANSWERED_AFTER] = drawn - bad;
        let under_way = answers.iter().sum();
        let more = if counted { u64::saturating_sub(under_way, most) } else { 0 };
        most = most.max(under_way);
        let sides = Sides {
            primary: Counts { requests: primary, bad: primary_bad },
            canary: Counts { requests: answered + bad + more, bad },
        };
        evidence.add(Duration::from_millis(100 * (tick as u64 + 1)), sides).is_some()
    })
}

#[test]
fn a_canary_whose_bad_answers_come_before_the_good_ones_is_not_taken_back_for_that() {
    let mut random = fastrand::Rng::with_seed(13);
    let mut of_100 = |counted, share| (0..100).filter(|_| begins(counted, share, &mut random)).count();
    assert_eq!([0.02, 0.05, 0.2].map(|share| of_100(true, share)), [0, 0, 0]);
    assert!(of_100(false, 0.2) > 90, "if only what has ended counted");
}

#[test]
fn a_canary_that_turns_bad_late_is_found_and_what_was_good_before_is_not_counted() {
    let turns = 300.0;
    let release = Release {
        primary_rate: 240.0,
        canary_rate: 60.0,
        primary: &|_| 0.0,
        canary: &|at| if at < turns { 0.0 } else { 0.5 },
        seconds: 320.0,
    };
    let mut random = fastrand::Rng::with_seed(5);
    for _ in 0..10 {
        let outcome = release.run(&mut random, Evidence::new(0.05, 8));
        let certainty = outcome.certainty.unwrap();
        assert!(outcome.at.unwrap() < turns + 2.0 && outcome.bad < 50, "{:?} {}", outcome.at, outcome.bad);
        assert!(certainty.since.as_secs_f64() > turns - 0.5, "{certainty:?}");
        assert!(certainty.sides.canary.percent() > 25.0 && certainty.evidence >= CERTAIN, "{certainty:?}");
    }
}

#[test]
fn a_canary_is_not_compared_with_nothing() {
    for rate in [0.0, 0.02] {
        // A request of the primary now and then, while the canary's wait for no more than two seconds.
        let release =
            Release { primary_rate: rate, canary_rate: 50.0, primary: &|_| 0.0, canary: &|_| 0.8, seconds: 20.0 };
        let alarms = release.alarms(50, &Evidence::new(0.05, 1));
        assert_eq!(alarms, 0, "at {rate} requests a second");
    }
}

#[test]
fn a_margin_of_everything_never_alarms() {
    let release =
        Release { primary_rate: 240.0, canary_rate: 60.0, primary: &|_| 0.0, canary: &|_| 1.0, seconds: 20.0 };
    assert_eq!(release.alarms(5, &Evidence::new(1.0, 1)), 0);
}

#[test]
fn a_single_tenth_of_a_second_does_not_decide() {
    let mut evidence = Evidence::new(0.05, 2);
    let good = Sides { primary: Counts { requests: 1000, bad: 0 }, canary: Counts { requests: 100, bad: 0 } };
    let bad = Sides { canary: Counts { requests: 100, bad: 100 }, ..good };
    assert_eq!(evidence.add(Duration::from_millis(0), good), None);
    for at in 100..199 {
        assert_eq!(evidence.add(Duration::from_millis(at), bad), None, "at {at} ms");
    }
    assert_eq!(evidence.add(Duration::from_millis(200), good), None);
}

fn sides() -> impl Strategy<Value = (u64, Sides)> {
    let counts = || (0_u64..500, 0_u64..600).prop_map(|(requests, bad)| Counts { requests, bad });
    (0_u64..3000, counts(), counts()).prop_map(|(wait, primary, canary)| (wait, Sides { primary, canary }))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_reported_the_capital_is_a_number(reports in proptest::collection::vec(sides(), 1..100), margin in 0.01_f64..=1.0) {
        let mut evidence = Evidence::new(margin, 2);
        let mut at = 0;
        for (wait, sides) in reports {
            at += wait;
            let certainty = evidence.add(Duration::from_millis(at), sides);
            let capital = evidence.capital();
            prop_assert!(capital.is_finite() && capital >= 0.0, "{}", capital);
            prop_assert_eq!(certainty.is_some(), capital >= evidence.alarm);
        }
    }

    /// The bet cannot be expected to win: summed over everything that could have come, weighted by how likely that is.
    #[test]
    fn a_bet_is_worth_no_more_than_its_stake_within_the_margin(
        requests in (1_u64..12, 1_u64..12), guess in 0.001_f64..0.9, part in 0.01_f64..0.99, share in 0.0_f64..=1.0,
        below in 0.0_f64..=1.0, margin in 0.01_f64..0.5,
    ) {
        prop_assume!(guess + margin < 0.99);
        let least = guess + margin;
        let canary = least + (1.0 - least) * part;
        let block = |bad: (u64, u64)| Sides {
            primary: Counts { requests: requests.0, bad: bad.0 },
            canary: Counts { requests: requests.1, bad: bad.1 },
        };
        let closest = closest(guess, canary, margin, block((0, 0)));
        let canary_share = (share + margin).min(1.0) * below;
        let mut expected = 0.0;
        for bad in (0..=requests.0).flat_map(|first| (0..=requests.1).map(move |second| (first, second))) {
            let seen = block(bad);
            let value = (seen.primary.ratio(guess, closest) + seen.canary.ratio(canary, closest + margin)).exp();
            expected += value * likelihood(seen.primary, share) * likelihood(seen.canary, canary_share);
        }
        prop_assert!(expected <= 1.0 + 1e-6, "{}", expected);
    }
}

fn likelihood(counts: Counts, share: f64) -> f64 {
    let choose = (0..counts.bad).fold(1.0, |product, i| product * (counts.requests - i) as f64 / (i + 1) as f64);
    let (bad, good) = (counts.bad as i32, (counts.requests - counts.bad) as i32);
    choose * share.powi(bad) * (1.0 - share).powi(good)
}
