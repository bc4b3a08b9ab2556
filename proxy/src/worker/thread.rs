//! What the connections of one worker thread share: buffers that none of them needs now, so that idle connections hold
//! none and busy ones use few that stay in the CPU's caches; and the time of day, which is written once a second.

use std::cell::RefCell;

use bytes::BytesMut;
use http::HeaderValue;
use jiff::{Timestamp, fmt::rfc2822::DateTimePrinter};
use tokio::time::{Duration, Instant};

use super::http1::{COPY, READ};

/// Buffers of either kind that are kept.
const MAX_SPARE: usize = 64;

thread_local! {
    static INPUTS: RefCell<Vec<BytesMut>> = const { RefCell::new(Vec::new()) };
    static OUTPUTS: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
    static DATE: RefCell<Date> = const { RefCell::new(Date { until: None, line: Vec::new(), value: None }) };
}

/// An empty buffer with room for [`READ`] bytes.
pub(super) fn take_input() -> BytesMut {
    if let Some(mut spare) = INPUTS.with_borrow_mut(Vec::pop)
        && spare.try_reclaim(READ)
    {
        return spare;
    }
    // A part of that one is still in use, as a header's value or a part of a body; or there is none.
    BytesMut::with_capacity(READ)
}

/// Parts of it may still be in use.
pub(super) fn give_input(bytes: BytesMut) {
    INPUTS.with_borrow_mut(|spare| {
        if spare.len() < MAX_SPARE {
            spare.push(bytes);
        }
    });
}

pub(super) fn take_output() -> Vec<u8> {
    OUTPUTS.with_borrow_mut(Vec::pop).unwrap_or_else(|| Vec::with_capacity(COPY))
}

pub(super) fn give_output(mut bytes: Vec<u8>) {
    OUTPUTS.with_borrow_mut(|spare| {
        // A large head or many small parts of a body may have made it larger.
        if spare.len() < MAX_SPARE && bytes.capacity() <= 4 * COPY {
            bytes.clear();
            spare.push(bytes);
        }
    });
}

struct Date {
    until: Option<Instant>,
    /// `date: Sun, 06 Nov 1994 08:49:37 GMT`, with its line's end.
    line: Vec<u8>,
    value: Option<HeaderValue>,
}

impl Date {
    fn at(&mut self, now: Instant) -> &Self {
        if self.until.is_none_or(|until| until <= now) {
            self.until = Some(now + Duration::from_secs(1));
            self.line.clear();
            // Fails for years before 0 only; an answer without a date is valid, too.
            let text = DateTimePrinter::new().timestamp_to_rfc9110_string(&Timestamp::now());
            self.value = text.ok().and_then(|text| HeaderValue::from_str(&text).ok());
            if let Some(value) = &self.value {
                self.line.extend_from_slice(b"date: ");
                self.line.extend_from_slice(value.as_bytes());
                self.line.extend_from_slice(b"\r\n");
            }
        }
        self
    }
}

/// Writes the header Date (RFC 9110, 6.6.1) for an answer of this moment, which spares a look at the clock.
pub(super) fn write_date(now: Instant, output: &mut Vec<u8>) {
    DATE.with_borrow_mut(|date| output.extend_from_slice(&date.at(now).line));
}

/// The same as a value.
pub(super) fn date(now: Instant) -> Option<HeaderValue> {
    DATE.with_borrow_mut(|date| date.at(now).value.clone())
}
