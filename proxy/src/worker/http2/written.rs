//! What `h2` writes to a client, frame by frame: which streams HTTP/2 makes us reset, and where a frame of ours has room. h2 resets
//! by itself, where a request is malformed, and tells nobody: what it writes is the one place where that can be seen.

use std::{cell::Cell, io::IoSlice, rc::Rc};

use h2::Reason;

use crate::{metrics::ListenerMetrics, refused::Refused};

/// Of a frame (RFC 9113, 4.1), and of a RST_STREAM with its error code (6.4).
const HEAD: usize = 9;
const RESET: usize = HEAD + 4;
const RST_STREAM: u8 = 3;
/// Those with a header block, and the flag of its last frame.
const HEADERS: u8 = 1;
const PUSH_PROMISE: u8 = 5;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;

/// Follows the frames of a connection as they are written, and counts the resets among them.
pub(super) struct Written {
    frames: Frames,
    metrics: ListenerMetrics,
    resets: Rc<Cell<usize>>,
}

impl Written {
    /// Those of this connection are counted in `resets` as well.
    pub(super) fn of(metrics: ListenerMetrics, resets: Rc<Cell<usize>>) -> Self {
        Self { frames: Frames::default(), metrics, resets }
    }

    /// So many bytes of these were written.
    pub(super) fn pass(&mut self, slices: &[IoSlice<'_>], mut length: usize) {
        for slice in slices {
            let of_it = length.min(slice.len());
            self.frames.read(&slice[..of_it], |code| {
                if let Some(why) = Refused::by_reset(Reason::from(code)) {
                    self.resets.set(self.resets.get() + 1);
                    self.metrics.refused(why);
                }
            });
            length -= of_it;
        }
    }

    /// Whether another frame may be written now.
    pub(super) fn ends_a_frame(&self) -> bool {
        self.frames.end()
    }
}

/// Where in the frames that are written we are.
#[derive(Default)]
struct Frames {
    head: [u8; RESET],
    known: usize,
    /// Of the payload of the present frame.
    rest: usize,
    /// Its header block goes on in the next frame, and nothing may come between (RFC 9113, 6.10).
    continued: bool,
}

impl Frames {
    /// Whether the last one is whole, and any may follow.
    fn end(&self) -> bool {
        self.known == 0 && self.rest == 0 && !self.continued
    }

    fn read(&mut self, mut bytes: &[u8], mut reset: impl FnMut(u32)) {
        loop {
            let passed = self.rest.min(bytes.len());
            self.rest -= passed;
            bytes = &bytes[passed..];
            if bytes.is_empty() {
                return;
            }
            let wanted = if self.known < HEAD { HEAD } else { RESET };
            let taken = (wanted - self.known).min(bytes.len());
            self.head[self.known..self.known + taken].copy_from_slice(&bytes[..taken]);
            self.known += taken;
            bytes = &bytes[taken..];
            let [high, middle, low, kind, flags, ..] = self.head;
            if self.known == HEAD && matches!(kind, HEADERS | PUSH_PROMISE | CONTINUATION) {
                self.continued = flags & END_HEADERS == 0;
            }
            let length = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
            match self.known {
                HEAD if kind == RST_STREAM && length == RESET - HEAD => {}
                HEAD => (self.known, self.rest) = (0, length),
                RESET => {
                    self.known = 0;
                    let [.., a, b, c, d] = self.head;
                    reset(u32::from_be_bytes([a, b, c, d]));
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resets_are_found_however_the_frames_are_cut() {
        let frame = |kind: u8, payload: &[u8]| {
            let length = u8::try_from(payload.len()).expect("it is short");
            [&[0, 0, length, kind, 0, 0, 0, 0, 1], payload].concat()
        };
        let reset = |code: u8| frame(RST_STREAM, &[0, 0, 0, code]);
        // A payload that looks like a reset is none.
        let frames = [frame(0, &reset(7)), reset(1), frame(4, &[]), reset(5), reset(300_u16.to_be_bytes()[1])].concat();
        for size in 1..=frames.len() {
            let (mut state, mut found) = (Frames::default(), Vec::new());
            for piece in frames.chunks(size) {
                state.read(piece, |code| found.push(code));
            }
            assert_eq!(found, [1, 5, 44], "in pieces of {size}");
        }
    }

    #[test]
    fn a_frame_of_ours_has_room_behind_a_whole_one_and_not_within_a_header_block() {
        let frame = |kind: u8, flags: u8| [0, 0, 2, kind, flags, 0, 0, 0, 1, 7, 7];
        for (frames, room) in [
            (vec![], true),
            (vec![frame(0, 0)], true),
            (vec![frame(HEADERS, END_HEADERS)], true),
            (vec![frame(HEADERS, 1)], false),
            (vec![frame(HEADERS, 0), frame(CONTINUATION, 0)], false),
            (vec![frame(HEADERS, 0), frame(CONTINUATION, END_HEADERS)], true),
        ] {
            let mut state = Frames::default();
            state.read(&frames.concat(), |_| {});
            assert_eq!(state.end(), room, "{frames:?}");
            for cut in 1..11 {
                let mut state = Frames::default();
                state.read(&[frames.concat(), frame(0, 0)[..cut].to_vec()].concat(), |_| {});
                assert!(!state.end(), "{cut} bytes of another one");
            }
        }
    }
}
