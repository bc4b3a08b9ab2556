//! How often somebody may ask.

use std::{collections::HashMap, hash::Hash, sync::Mutex, time::Duration};

use tokio::time::Instant;

/// At most this many askers are remembered.
const REMEMBERED: usize = 16 * 1024;

/// `burst` requests at once for each asker, and one more each `period` (the generic cell rate algorithm).
///
/// When more than [`REMEMBERED`] askers are active at once, new ones pass unlimited: refusing them would let the many
/// shut out the others, and the number of calls in flight is bounded elsewhere.
#[derive(Debug)]
pub(super) struct RateLimit<K> {
    burst: u32,
    period: Duration,
    /// When each asker will have its whole burst again.
    whole_at: Mutex<HashMap<K, Instant>>,
}

impl<K: Hash + Eq> RateLimit<K> {
    pub(super) fn new(burst: u32, period: Duration) -> Self {
        Self { burst, period, whole_at: Mutex::new(HashMap::new()) }
    }

    /// Counts a request; `false` if it is one too many.
    pub(super) fn allow(&self, asker: K, now: Instant) -> bool {
        let mut whole_at = self.whole_at.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if whole_at.len() >= REMEMBERED && !whole_at.contains_key(&asker) {
            whole_at.retain(|_, at| *at > now);
            if whole_at.len() >= REMEMBERED {
                return true;
            }
        }
        let at = whole_at.entry(asker).or_insert(now);
        let next = (*at).max(now) + self.period;
        let allowed = next.duration_since(now) <= self.period * self.burst;
        if allowed {
            *at = next;
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_then_one_request_each_period() {
        let limit = RateLimit::new(3, Duration::from_secs(10));
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!((0..3).all(|_| limit.allow("a", start)));
        assert!(!limit.allow("a", start));
        assert!(limit.allow("b", start));
        assert!(!limit.allow("a", at(9)));
        assert!(limit.allow("a", at(10)));
        assert!(!limit.allow("a", at(11)));
        assert!((0..3).all(|_| limit.allow("a", at(100))));
        assert!(!limit.allow("a", at(100)));
    }

    #[test]
    fn askers_who_rest_are_forgotten() {
        let limit = RateLimit::new(1, Duration::from_secs(1));
        let start = Instant::now();
        for asker in 0..REMEMBERED {
            assert!(limit.allow(asker, start));
        }
        assert!(limit.allow(REMEMBERED, start + Duration::from_secs(5)));
        assert_eq!(limit.whole_at.lock().map(|map| map.len()).ok(), Some(1));
    }
}
