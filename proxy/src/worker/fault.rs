//! Faults on purpose. They come before a revision is drawn, so that none is blamed for them.

use tokio::time::sleep;

use super::tally::Tally;
use crate::{failure::Failure, snapshot::Fault};

/// Returns whether the request was held up, so that what was configured then may be old by now.
pub(super) async fn inject(fault: &Fault, tally: &mut Tally) -> Result<bool, Failure> {
    let delay = fault.delay.filter(|(_, share)| share.draw());
    if let Some((delay, _)) = delay {
        tally.delay_begins();
        // In a box: every request has space for what it may wait for.
        Box::pin(sleep(delay)).await;
        tally.delay_ends();
    }
    match fault.abort {
        Some((abort, share)) if share.draw() => Err(Failure::FaultInjected(abort)),
        Some(_) | None => Ok(delay.is_some()),
    }
}
