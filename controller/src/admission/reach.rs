//! Whether the API server reaches the webhook, by what the keeper's checks find. Pure.

use std::time::Duration;

use tokio::time::Instant;

/// When the keeper checks, and when it tells.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Between two checks while they are answered.
    pub answered: Duration,
    /// Between two checks while they are not.
    pub unanswered: Duration,
    /// For how long none was answered when it is told.
    pub patience: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            // What keeps the API server away is a change of the network, which is rare: a minute later is soon enough, and one
            // request a minute is nothing to it.
            answered: Duration::from_secs(60),
            unanswered: Duration::from_secs(10),
            // An API server takes a moment to know the configuration, and controllers may just be replaced.
            patience: Duration::from_secs(60),
        }
    }
}

/// What the checks of a term have found.
#[derive(Debug, Default)]
pub(super) struct Reach {
    /// For how long no check was answered, without the time of those that found nothing out.
    unanswered: Duration,
    /// When the last check was not answered. Absent where it was, or found nothing out.
    last: Option<Instant>,
    lost: bool,
    /// The API server refused the last check, so that nothing is known.
    pub refused: bool,
}

impl Reach {
    /// Takes note of a check; `None` where it found nothing out. Whether [`Self::lost`] has changed.
    pub fn note(&mut self, answered: Option<bool>, now: Instant, patience: Duration) -> bool {
        let before = self.lost;
        match answered {
            Some(true) => *self = Self::default(),
            Some(false) => {
                self.unanswered += self.last.map_or(Duration::ZERO, |last| now - last);
                self.last = Some(now);
                self.lost |= self.unanswered >= patience;
            }
            None => self.last = None,
        }
        self.lost != before
    }

    /// None was answered for longer than there is patience.
    pub fn lost(&self) -> bool {
        self.lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const YES: Option<bool> = Some(true);
    const NO: Option<bool> = Some(false);
    const UNKNOWN: Option<bool> = None;

    /// At a second, what was found.
    type Check = (u64, Option<bool>);

    /// After checks at these seconds.
    fn after(checks: &[Check]) -> (Reach, Vec<bool>) {
        let (begin, patience) = (Instant::now(), Pace::default().patience);
        let mut reach = Reach::default();
        let at = |second: u64| begin + Duration::from_secs(second);
        let changed = checks.iter().map(|(second, found)| reach.note(*found, at(*second), patience)).collect();
        (reach, changed)
    }

    #[test]
    fn the_webhook_is_lost_after_a_minute_without_any_answer() {
        let cases: [(&str, &[Check], bool); 9] = [
            ("answered", &[(0, YES), (60, YES)], false),
            ("not answered once", &[(0, YES), (60, NO)], false),
            ("for less than a minute", &[(0, NO), (30, NO), (59, NO)], false),
            ("for a minute", &[(0, NO), (30, NO), (60, NO)], true),
            ("with an answer in between", &[(0, NO), (50, YES), (60, NO), (110, NO)], false),
            ("answered again", &[(0, NO), (60, NO), (70, YES)], false),
            ("while the API server is away", &[(0, NO), (10, UNKNOWN), (70, UNKNOWN), (80, NO), (90, NO)], false),
            ("before and after it was away", &[(0, NO), (30, NO), (40, UNKNOWN), (100, NO), (130, NO)], true),
            ("lost, and then away", &[(0, NO), (60, NO), (70, UNKNOWN)], true),
        ];
        for (what, checks, lost) in cases {
            assert_eq!(after(checks).0.lost(), lost, "{what}");
        }
    }

    #[test]
    fn each_change_is_told_once() {
        let checks =
            [(0, NO), (60, NO), (70, NO), (80, UNKNOWN), (90, NO), (100, YES), (160, YES), (220, NO), (280, NO)];
        let told = [false, true, false, false, false, true, false, false, true];
        assert_eq!(after(&checks).1, told);
    }
}
