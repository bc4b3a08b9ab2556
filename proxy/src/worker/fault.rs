//! Faults on purpose. They come before a revision is drawn, so that none is blamed for them.

use tokio::time::{Duration, Instant, sleep};

use super::{connection::Connection, load::Admitted, serving::Split, tally::Tally};
use crate::{failure::Failure, snapshot::Fault};

/// How often a request that is held up looks whether it still is to be. Nothing else wakes it when its connection is to end,
/// nor when an HTTP/1.1 client goes of which not all has been read.
const LOOK: Duration = Duration::from_secs(1);

/// Returns whether the request was held up, so that what was configured then may be old by now. `split` is where it may go.
///
/// # Errors
/// The answer that is injected; or that the request is to be held up where no more may be open.
pub(super) async fn inject(fault: &Fault, split: &Split, tally: &mut Tally) -> Result<bool, Failure> {
    let draining = tally.connection().is_draining();
    let delay = fault.delay.filter(|(_, share)| !draining && share.draw());
    if let Some((delay, _)) = delay {
        let places = split.places()?;
        tally.delay_begins();
        // In a box: every request has space for what it may wait for.
        Box::pin(hold_up(tally.connection(), places, delay)).await;
        tally.delay_ends();
    }
    match fault.abort {
        Some((abort, share)) if share.draw() => Err(Failure::FaultInjected(abort)),
        Some(_) | None => Ok(delay.is_some()),
    }
}

/// Waits until the delay is over, or the connection is to end: what would be cut then is served instead.
async fn hold_up(connection: &Connection, places: Vec<Option<Admitted>>, delay: Duration) {
    let over = Instant::now() + delay;
    while !connection.is_draining() {
        let left = over.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        sleep(left.min(LOOK)).await;
    }
    // Nothing is awaited before the request is drawn, so that it finds the place that is given back here.
    drop(places);
}
