//! What holds for all that a client may send: however it is cut it is read the same, nothing of it panics, and what is
//! accepted hyper accepts too and reads the same. We are stricter than hyper in this: lines that end in LF alone,
//! Content-Length beside Transfer-Encoding, more than one transfer coding, a target that is an authority (but for CONNECT) or
//! an asterisk (but for OPTIONS), has a fragment or another scheme than HTTP's, and request lines above 32 KiB.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::fuzz::{self, ours};

/// Something like a request: each part is usual, or one that implementations have disagreed about.
fn request() -> impl Strategy<Value = Vec<u8>> {
    let one = |choices: &'static [&'static str]| prop::sample::select(choices);
    let line = (
        one(&["", "", "", "\r\n", "\n", " "]),
        one(&["GET", "POST", "OPTIONS", "CONNECT", "get", "M-X", "G(T", ""]),
        one(&[" ", " ", " ", " ", "  ", "\t"]),
        one(&["/", "/a?b=c", "/a#b", "*", "a:80", "http://a/b", "http://a", "//a/b", "/a b", "/\u{fc}", "?", ""]),
        one(&[" HTTP/1.1", " HTTP/1.1", " HTTP/1.1", " HTTP/1.0", " HTTP/2.0", " HTTP/1.1 ", " http/1.1", ""]),
    );
    let header = (
        one(&[
            "content-length: 5",
            "Content-Length:5",
            "content-length: 05",
            "content-length: 0",
            "content-length: 5, 5",
            "content-length: 6",
            "content-length: +5",
            "content-length: ",
            "content-length : 5",
            "transfer-encoding: chunked",
            "Transfer-Encoding: Chunked ",
            "transfer-encoding: gzip, chunked",
            "transfer-encoding: chunked, identity",
            "transfer-encoding:\u{b}chunked",
            "connection: close",
            "connection: keep-alive, te",
            "expect: 100-continue",
            "host: a",
            "host: b",
            "x: \u{e4}",
            "x:",
            "x",
            ":x",
            " x: y",
            "x\t: y",
            "x: a\rb",
            "x: a\0b",
            "upgrade: websocket",
        ]),
        line_end(&["\n", "\r", "\r\n "]),
    );
    let body = one(&[
        "",
        "hello",
        "5\r\nhello\r\n0\r\n\r\n",
        "5;x=y\r\nhello\r\n0\r\n\r\n",
        "5 \r\nhello\r\n00\r\nx: y\r\n\r\n",
        "2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
        "5\nhello\r\n0\r\n\r\n",
        "0x5\r\nhello\r\n0\r\n\r\n",
        "5\r\nhello0\r\n\r\n",
        "0\r\n\r\n",
        "0\r\nx y\r\n\r\n",
        "0\r\n\n",
    ]);
    let behind = one(&["", "GET /next HTTP/1.1\r\nhost: a\r\n\r\n"]);
    let ends = line_end(&["\n"]);
    let noise = prop::option::weighted(0.3, (any::<prop::sample::Index>(), any::<u8>()));
    (line, ends, prop::collection::vec(header, 0..5), line_end(&["\n", "\r", ""]), body, behind, noise).prop_map(
        |(line, ends, headers, empty, body, behind, noise)| {
            let mut text = [line.0, line.1, line.2, line.3, line.4, ends].concat();
            headers.into_iter().for_each(|(header, end)| text.extend([header, end]));
            text.extend([empty, body, behind]);
            let mut bytes = text.into_bytes();
            if let Some((index, byte)) = noise {
                let index = index.index(bytes.len());
                bytes[index] = byte;
            }
            bytes
        },
    )
}

/// Mostly the only right one.
fn line_end(others: &'static [&'static str]) -> impl Strategy<Value = &'static str> {
    prop_oneof![4 => Just("\r\n"), 1 => prop::sample::select(others)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn what_is_accepted_hyper_accepts_and_reads_the_same(bytes in request()) {
        fuzz::request(&bytes);
    }

    #[test]
    fn a_request_is_read_the_same_however_it_is_cut(
        bytes in request(),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
    ) {
        let whole = ours([bytes.as_slice()]);
        let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        let pieces = cuts.windows(2).map(|cut| &bytes[cut[0]..cut[1]]);
        prop_assert_eq!(&ours(pieces), &whole);
        prop_assert_eq!(&ours(bytes.chunks(1)), &whole);
    }

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = ours([bytes.as_slice()]);
        let _ = ours([b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n", bytes.as_slice()]);
        let head = [b"GET / HTTP/1.1\r\n", bytes.as_slice(), b"\r\n\r\n"].concat();
        let _ = ours([head.as_slice()]);
    }
}

#[test]
fn the_generator_makes_requests_that_are_accepted_and_ones_that_are_not() {
    use proptest::{strategy::ValueTree, test_runner::TestRunner};
    let mut runner = TestRunner::deterministic();
    let mut seen = [0; 3];
    for _ in 0..4000 {
        let bytes = request().new_tree(&mut runner).unwrap().current();
        seen[match ours([bytes.as_slice()]) {
            (requests, _) if !requests.is_empty() => 0,
            (_, None) => 1,
            (_, Some(_)) => 2,
        }] += 1;
    }
    assert!(seen.iter().all(|count| *count > 20), "{seen:?}");
}
