//! A member of the fleet that hears no controller for long. The leader takes its address from the Services then, and after another
//! minute waits for it no longer (docs/troubleshooting.md, `FleetAcknowledgement`). Connections that clients have to it would keep the weights of before for ever, also when
//! the Pods of a revision are gone. So it asks them to end, each after an answer (`connection: close`, GOAWAY), and clients come again:
//! to others, once its address is gone; to itself as long as nobody else hears a controller either.

use std::{convert::Infallible, time::Duration};

use tokio::time::{Instant, MissedTickBehavior};

/// Below the minute after which the leader takes the address away.
const CUT_OFF: Duration = Duration::from_secs(45);
/// Some clients come again before the address is gone, or where the leader takes it away later.
const AGAIN: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_secs(5);

/// `connected` says whether a stream to the control plane is open, `announce` asks what is open now to end. For the life of the process.
pub async fn renew_connections(connected: impl Fn() -> bool, announce: impl AsyncFn()) -> Infallible {
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut heard = Instant::now();
    let mut announced = heard;
    loop {
        let now = look.tick().await;
        if connected() {
            heard = now;
        } else if now - heard >= CUT_OFF && now - announced >= AGAIN {
            tracing::warn!(
                seconds = (now - heard).as_secs(),
                "no stream to the control plane; clients are asked to open their connections anew"
            );
            announced = now;
            announce().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        cell::{Cell, RefCell},
        rc::Rc,
    };

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn connections_are_renewed_while_no_controller_is_heard_and_at_no_other_time() {
        let (connected, announced) = (Rc::new(Cell::new(true)), Rc::new(RefCell::new(Vec::new())));
        let (is, told, began) = (connected.clone(), announced.clone(), Instant::now());
        let task = renew_connections(
            move || is.get(),
            async move || told.borrow_mut().push((Instant::now() - began).as_secs()),
        );
        let script = async {
            for (until, now) in [(100, false), (140, true), (200, false), (310, true), (600, true)] {
                tokio::time::sleep_until(began + Duration::from_secs(until) + Duration::from_millis(1)).await;
                connected.set(now);
            }
        };
        tokio::select! {
            () = script => {}
            never = task => match never {},
        }
        // It was heard last at 100 and at 200.
        assert_eq!(*announced.borrow(), [245, 275, 305]);
    }
}
