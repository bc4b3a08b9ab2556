//! What must hold for all bytes that come from outside, as functions that panic where it does not. `tests/fuzz` searches for such
//! bytes, guided by what they reach; the tests here try what was kept of that, and some thousand changes of it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod trace;
mod wire;
mod xds;

use std::fmt::Debug;

use crate::worker::fuzz::{answer, hello, request};

/// Panics where what must hold of these bytes does not.
pub type Target = fn(&[u8]);

/// What can be fuzzed. The names are those of the folders in `tests/fuzz/corpus`.
pub const TARGETS: [(&str, Target); 5] =
    [("request", request), ("answer", answer), ("hello", hello), ("trace", trace::run), ("xds", xds::run)];

/// # Panics
/// With both, where they differ.
pub(crate) fn assert_same<T: Debug + PartialEq + ?Sized>(found: &T, wanted: &T, what: &str) {
    assert!(found == wanted, "{what}:\n found {found:?}\nwanted {wanted:?}");
}

/// The same bytes one by one, and in pieces that follow from them.
pub(crate) fn cuts(bytes: &[u8]) -> [Vec<&[u8]>; 3] {
    let mut random = random(bytes);
    let mut pieces = |longest: usize| {
        let (mut rest, mut pieces) = (bytes, Vec::new());
        while !rest.is_empty() {
            let (piece, behind) = rest.split_at(random.usize(1..=longest.min(rest.len())));
            pieces.push(piece);
            rest = behind;
        }
        pieces
    };
    [pieces(1), pieces(16), pieces(bytes.len().max(1))]
}

fn random(bytes: &[u8]) -> fastrand::Rng {
    // FNV-1a: the same on every run.
    let hash = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    fastrand::Rng::with_seed(hash)
}

#[cfg(test)]
mod tests {
    use std::{fs, panic, path::Path};

    use super::*;

    /// Changes that are tried for each target.
    const CHANGES: usize = 4000;

    /// What has been kept of a target's inputs, in the order of their names.
    fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus").join(target);
        let mut inputs: Vec<_> = fs::read_dir(&folder)
            .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
            .map(|entry| {
                let entry = entry.unwrap();
                (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())
            })
            .collect();
        inputs.sort();
        assert!(inputs.len() > 5, "{target} has inputs to begin with");
        inputs
    }

    fn all(name: &str, run: Target) {
        let inputs = corpus(name);
        let hold = |what: &str, bytes: &[u8]| {
            let held = panic::catch_unwind(|| run(bytes));
            assert!(held.is_ok(), "{name}: {what} does not hold: {}", bytes.escape_ascii());
        };
        for (file, bytes) in &inputs {
            hold(file, bytes);
        }
        let mut random = fastrand::Rng::with_seed(1);
        for _ in 0..CHANGES {
            let (file, bytes) = random.choice(&inputs).unwrap();
            let mut bytes = bytes.clone();
            for _ in 0..random.usize(1..5) {
                change(&mut bytes, &random.choice(&inputs).unwrap().1, &mut random);
            }
            hold(&format!("{file}, changed,"), &bytes);
        }
    }

    fn change(bytes: &mut Vec<u8>, other: &[u8], random: &mut fastrand::Rng) {
        let at = random.usize(..=bytes.len());
        let end = random.usize(at..=bytes.len().min(at + 20));
        match random.u8(..5) {
            0 if at < bytes.len() => bytes[at] = random.u8(..),
            1 if at < bytes.len() => bytes[at] ^= 1 << random.u8(..8),
            2 => drop(bytes.drain(at..end)),
            3 => bytes.insert(at, random.u8(..)),
            _ => {
                let from = random.usize(..=other.len());
                let to = random.usize(from..=other.len().min(from + 60));
                bytes.splice(at..end, other[from..to].iter().copied());
            }
        }
    }

    #[test]
    fn whatever_a_client_sends_is_read_in_one_way_only() {
        all("request", request);
    }

    #[test]
    fn whatever_an_upstream_answers_is_read_in_one_way_only() {
        all("answer", answer);
    }

    #[test]
    fn whatever_a_connection_begins_with_is_told_apart_in_one_way_only() {
        all("hello", hello);
    }

    #[test]
    fn whatever_a_caller_says_of_its_trace_goes_on_as_one_context() {
        all("trace", trace::run);
    }

    #[test]
    fn whatever_a_control_plane_says_is_served_or_refused_by_name() {
        all("xds", xds::run);
    }
}
