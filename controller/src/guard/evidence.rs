//! The sequential test of the guard: how strongly what has been seen speaks against "the canary's share of bad requests is at
//! most the primary's plus the margin". No `async`, no clock: numbers in, certainty out.
//!
//! It is a test by betting (Ramdas et al., "Game-theoretic statistics and safe anytime-valid inference", 2023). A capital
//! of 1 is bet against that hypothesis, in a way that cannot be expected to win while the hypothesis holds. So the capital comes
//! to 10,000 in at most one of 10,000 releases (Ville's inequality), however often it is looked at, and that is the alarm.
//!
//! **One bet.** A block is what both sides answered over the same time: `n` requests of the primary and `m` of the canary. The bet is
//! the likelihood ratio of two guesses (p, q) at the shares, made before the block is seen, against the closest (r, r + margin)
//! that the hypothesis allows (Turner, Ly and Grünwald, "Generic E-variables for exact sequential k-sample tests", 2021):
//! each request of the primary multiplies the capital by p/r if it is bad and (1-p)/(1-r) if it is good, each of the canary by
//! q/(r + margin) and so on. In expectation these are the straight lines f(x) = 1 + c (x - r) and g(y) = 1 + d (y - r - margin) of
//! the true shares x and y, with c = (p-r) / (r(1-r)) and d = (q-r-margin) / ((r+margin)(1-r-margin)). By the
//! inequality of arithmetic and geometric mean, f^n g^m <= (1 + (n c (x-r) + m d (y-r-margin)) / (n+m))^(n+m), and r is
//! chosen such that n c + m d = 0: where y <= x + margin, that is at most 1. It stays so when the shares change within the
//! block, since only their means over the block appear. A dependency that fails for both sides is no evidence, and a primary
//! without requests makes every bet worth 1.
//!
//! **Under way.** Requests of the canary count when they are drawn: those that have ended, and those by which more are under way than
//! there ever were. Of a canary that has just begun to get some the quick ones end first, and where both sides fail at once what they serve
//! in seconds these are the bad ones. Each that is added is a good one, so a bet is worth less for it. Later as many are drawn as end.
//!
//! **Many beginnings.** A bet that began while the canary was good would have lost everything when it turns bad. So the capital is
//! divided: half is put in at once, a sixth after a tenth of a second, 1/(k (k+1)) in the k-th slot.
//! What is put in later is not yet lost, and in all it is 1.

use std::time::Duration;

/// A canary is taken back when a release within the margin comes to this evidence in at most one of so many.
pub const CERTAIN: f64 = 10_000.0;

/// Time between two beginnings.
const SLOT: Duration = Duration::from_millis(100);
/// The most that one slot may multiply the capital by: whatever happens within a tenth of a second, it is not enough.
const MOST_OF_A_SLOT: f64 = 1_000.0;
/// How long requests of one side wait for some of the other: "over the same seconds".
const TOGETHER: Duration = Duration::from_secs(2);
/// Guesses at the canary's share, as parts of the way from the primary's plus the margin to 1, and what is bet on each.
const BETS: [Bet; 3] = [Bet { stake: 0.5, part: 0.4 }, Bet { stake: 0.3, part: 0.85 }, Bet { stake: 0.2, part: 0.1 }];
/// Before anything is known of the primary, its share is guessed as if so many requests had been seen,
const PRIOR_REQUESTS: f64 = 20.0;
/// so many of them bad.
const PRIOR_BAD: f64 = 0.2;
/// What is known of the primary counts half after so many newer requests.
const HALF_LIFE: f64 = 500.0;
/// Halvings of an interval of at most 1: far below any share that matters.
const BISECTIONS: usize = 30;

struct Bet {
    stake: f64,
    part: f64,
}

/// Requests, and those of them that ended badly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub requests: u64,
    pub bad: u64,
}

impl Counts {
    /// Percent of the requests.
    #[must_use]
    pub fn percent(self) -> f64 {
        if self.requests == 0 { 0.0 } else { 100.0 * self.bad as f64 / self.requests as f64 }
    }

    fn add(&mut self, more: Self) {
        self.requests += more.requests;
        // A member reads its counters while they run, and may see a request's badness before the request.
        self.bad = (self.bad + more.bad).min(self.requests);
    }

    /// The logarithm of the likelihood of these under `share` as a multiple of that under `instead`.
    fn ratio(self, share: f64, instead: f64) -> f64 {
        let good = (self.requests - self.bad) as f64;
        self.bad as f64 * (share / instead).ln() + good * ((1.0 - share) / (1.0 - instead)).ln()
    }
}

/// Both sides over the same time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sides {
    pub primary: Counts,
    pub canary: Counts,
}

impl Sides {
    fn add(&mut self, more: Self) {
        self.primary.add(more.primary);
        self.canary.add(more.canary);
    }
}

/// What it was that is certain.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Certainty {
    /// What was seen since the evidence began to gather.
    pub sides: Sides,
    /// When that was, on the clock of [`Evidence::add`].
    pub since: Duration,
    /// At least [`CERTAIN`].
    pub evidence: f64,
}

/// The evidence against one canary at one weight.
#[derive(Clone, Debug)]
pub struct Evidence {
    /// From 0 to 1.
    margin: f64,
    /// Capital that makes an alarm.
    alarm: f64,
    /// The primary's requests as they count for the guess at its share.
    primary: (f64, f64),
    /// The block that is being gathered, and since when.
    block: Sides,
    block_since: Duration,
    /// When the canary's first request came.
    first: Option<Duration>,
    /// The slot of the last bet, from 1; 0 before the first.
    slot: u64,
    /// Capital at the beginning of this slot, and what it was multiplied by since, of each bet.
    capital: [(f64, f64); BETS.len()],
    /// What was seen since what is put in last is not the greater part any more.
    seen: Sides,
    since: Duration,
}

impl Evidence {
    /// `margin`: what the canary's share may lie above the primary's, from 0 to 1. `tests`: how many of these a release has; the
    /// false alarms of all of them together are one in [`CERTAIN`] releases.
    #[must_use]
    pub fn new(margin: f64, tests: u32) -> Self {
        Self::with_alarm(margin, CERTAIN * f64::from(tests.max(1)))
    }

    fn with_alarm(margin: f64, alarm: f64) -> Self {
        Self {
            margin,
            alarm,
            primary: (PRIOR_REQUESTS, PRIOR_BAD),
            block: Sides::default(),
            block_since: Duration::ZERO,
            first: None,
            slot: 0,
            capital: [(0.0, 1.0); BETS.len()],
            seen: Sides::default(),
            since: Duration::ZERO,
        }
    }

    /// Takes in what has come since the last call; `at` is now, on any clock that does not go back. Whether and when this is called must
    /// not depend on how requests ended.
    pub fn add(&mut self, at: Duration, ended: Sides) -> Option<Certainty> {
        if self.first.is_none() && ended.canary.requests == 0 {
            self.learn(ended.primary);
            return None;
        }
        let first = *self.first.get_or_insert(at);
        self.begin_slots_until(at, at.saturating_sub(first));
        if self.block == Sides::default() {
            self.block_since = at;
        }
        self.block.add(ended);
        if self.block.primary.requests > 0 && self.block.canary.requests > 0 {
            let block = std::mem::take(&mut self.block);
            self.bet(block);
            self.seen.add(block);
            self.learn(block.primary);
        } else if at.saturating_sub(self.block_since) >= TOGETHER {
            let block = std::mem::take(&mut self.block);
            self.learn(block.primary);
        }
        let capital = self.capital();
        (capital >= self.alarm).then(|| Certainty {
            sides: self.seen,
            since: self.since,
            evidence: CERTAIN * (capital / self.alarm),
        })
    }

    fn capital(&self) -> f64 {
        BETS.iter().zip(self.capital).map(|(bet, (begun, grown))| bet.stake * begun * grown).sum()
    }

    /// Puts in what belongs to the slots that have begun.
    fn begin_slots_until(&mut self, at: Duration, passed: Duration) {
        let slot = u64::try_from(passed.as_millis() / SLOT.as_millis()).unwrap_or(u64::MAX - 1) + 1;
        if slot <= self.slot {
            return;
        }
        // The sum of 1/(k (k+1)) from the slot after the last one to this one.
        let put_in = 1.0 / (self.slot as f64 + 1.0) - 1.0 / (slot as f64 + 1.0);
        if self.capital() <= put_in {
            // What was seen until now has lost more than it won: the evidence, if any, begins here.
            self.seen = Sides::default();
            self.since = at;
        }
        for (begun, grown) in &mut self.capital {
            *begun = *begun * *grown + put_in;
            *grown = 1.0;
        }
        self.slot = slot;
    }

    fn bet(&mut self, block: Sides) {
        let primary = self.primary.1 / self.primary.0;
        let least = primary + self.margin;
        if least >= 1.0 {
            return;
        }
        for (bet, (_, grown)) in BETS.iter().zip(&mut self.capital) {
            let canary = least + (1.0 - least) * bet.part;
            let closest = closest(primary, canary, self.margin, block);
            let ratio = block.primary.ratio(primary, closest) + block.canary.ratio(canary, closest + self.margin);
            *grown = (*grown * ratio.exp()).min(MOST_OF_A_SLOT);
        }
    }

    fn learn(&mut self, primary: Counts) {
        let keeps = 0.5_f64.powf(primary.requests as f64 / HALF_LIFE);
        let (requests, bad) = &mut self.primary;
        *requests = PRIOR_REQUESTS + (*requests - PRIOR_REQUESTS) * keeps + primary.requests as f64;
        *bad = PRIOR_BAD + (*bad - PRIOR_BAD) * keeps + primary.bad.min(primary.requests) as f64;
    }
}

/// The primary's share r at which n c + m d = 0; see the head of this file. Between `primary` and `canary - margin`: there the sum goes
/// from positive to negative.
fn closest(primary: f64, canary: f64, margin: f64, block: Sides) -> f64 {
    let (n, m) = (block.primary.requests as f64, block.canary.requests as f64);
    let (mut low, mut high) = (primary, canary - margin);
    for _ in 0..BISECTIONS {
        let middle = f64::midpoint(low, high);
        let beside = middle + margin;
        let slope =
            n * (primary - middle) / (middle * (1.0 - middle)) + m * (canary - beside) / (beside * (1.0 - beside));
        if slope > 0.0 {
            low = middle;
        } else {
            high = middle;
        }
    }
    f64::midpoint(low, high)
}

#[cfg(test)]
mod tests;
