//! Whose request it is, where a route splits users instead of requests. Every proxy must come to the same, and after a restart,
//! too: hashes are those of Envoy (`source/common/http/hash_policy.cc`).

use http::{HeaderMap, HeaderName, HeaderValue, header};
use twox_hash::XxHash64;

use crate::snapshot::{HashPolicy, HashedBy};

/// Envoy's seed.
const SEED: u64 = 0;

/// What is known of the user.
pub(super) struct User {
    /// `None` if the request does not say who it is.
    pub(super) hash: Option<u64>,
    /// `Set-Cookie` for the answer, by which the user is known from now on.
    cookies: Vec<HeaderValue>,
}

impl User {
    pub(super) fn of(policies: &[HashPolicy], headers: &HeaderMap) -> Self {
        let mut user = Self { hash: None, cookies: Vec::new() };
        for policy in policies {
            let new = match &policy.by {
                HashedBy::Header(name) => of_header(name, headers),
                HashedBy::Cookie { name, given } => {
                    let sent = cookie(name, headers).map(|value| XxHash64::oneshot(SEED, value));
                    sent.or_else(|| given.as_ref().map(|attributes| user.new_cookie(name, attributes)))
                }
            };
            if let Some(new) = new {
                // Rotated, so that two equal ones do not cancel each other out.
                user.hash = Some(user.hash.map_or(0, |before| before.rotate_left(1)) ^ new);
            }
            if policy.terminal && user.hash.is_some() {
                break;
            }
        }
        user
    }

    /// Its value is of this request alone: a connection may be that of a proxy which many users share. (Envoy's is of the
    /// connection.)
    fn new_cookie(&mut self, name: &str, attributes: &str) -> u64 {
        let value = format!("{:016x}", fastrand::u64(..));
        self.cookies.extend(HeaderValue::try_from(format!("{name}=\"{value}\"{attributes}")));
        XxHash64::oneshot(SEED, value.as_bytes())
    }

    pub(super) fn give_cookies(self, answer: &mut HeaderMap) {
        for cookie in self.cookies {
            answer.append(header::SET_COOKIE, cookie);
        }
    }
}

/// Of all values, in whichever order they come: the hash of one is the seed of the next.
fn of_header(name: &HeaderName, headers: &HeaderMap) -> Option<u64> {
    let mut values = headers.get_all(name).iter();
    let first = values.next()?.as_bytes();
    let mut others: Vec<_> = values.map(HeaderValue::as_bytes).collect();
    if others.is_empty() {
        return Some(XxHash64::oneshot(SEED, first));
    }
    others.push(first);
    others.sort_unstable();
    Some(others.iter().fold(SEED, |seed, value| XxHash64::oneshot(seed, value)))
}

/// The value of the first cookie of this name, without quotes. `None` is one without a value, too.
fn cookie<'a>(name: &str, headers: &'a HeaderMap) -> Option<&'a [u8]> {
    let lines = headers.get_all(header::COOKIE).iter();
    let mut pairs = lines.flat_map(|line| line.as_bytes().split(|byte| *byte == b';'));
    let value = pairs.find_map(|pair| {
        let pair = pair.trim_ascii_start();
        let at = memchr::memchr(b'=', pair)?;
        (&pair[..at] == name.as_bytes()).then_some(&pair[at + 1..])
    })?;
    let value = value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value);
    (!value.is_empty()).then_some(value)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn headers(lines: &[(&'static str, &str)]) -> HeaderMap {
        lines.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap())).collect()
    }

    fn by_header(name: &'static str, terminal: bool) -> HashPolicy {
        HashPolicy { by: HashedBy::Header(HeaderName::from_static(name)), terminal }
    }

    fn by_cookie(name: &str, given: Option<&str>) -> HashPolicy {
        HashPolicy { by: HashedBy::Cookie { name: name.into(), given: given.map(Into::into) }, terminal: false }
    }

    #[test]
    fn hashes_are_those_of_xxhash64() {
        // From the reference implementation: XXH64(value, 0).
        let table = [("a", 0xd24e_c4f1_a98c_6e5b), ("abc", 0x44bc_2cf5_ad77_0999)];
        for (value, expected) in table {
            let found = User::of(&[by_header("x-user", false)], &headers(&[("x-user", value)]));
            assert_eq!(found.hash, Some(expected));
        }
        assert_eq!(User::of(&[by_header("x-user", false)], &headers(&[])).hash, None);
    }

    #[test]
    fn the_order_of_a_header_s_values_does_not_matter() {
        let of = |lines: &[(&'static str, &str)]| User::of(&[by_header("x-user", false)], &headers(lines)).hash;
        let both = of(&[("x-user", "a"), ("x-user", "b")]);
        assert_eq!(both, of(&[("x-user", "b"), ("x-user", "a")]));
        assert_ne!(both, of(&[("x-user", "a")]));
    }

    #[test]
    fn several_say_together_who_it_is_and_a_terminal_one_is_enough() {
        let lines = headers(&[("x-user", "a"), ("x-team", "a")]);
        let one = User::of(&[by_header("x-user", false)], &lines).hash;
        let both = User::of(&[by_header("x-user", false), by_header("x-team", false)], &lines).hash;
        assert!(both.is_some() && both != one && both != Some(0));
        let terminal = [by_header("x-none", true), by_header("x-user", true), by_header("x-team", false)];
        assert_eq!(User::of(&terminal, &lines).hash, one);
    }

    #[test]
    fn a_cookie_is_found_among_others_with_or_without_quotes() {
        let table = [
            ("user=a", Some("a")),
            ("x=1; user=a; user=b", Some("a")),
            ("x=1;user=\"a\"", Some("a")),
            ("user=\"", Some("\"")),
            ("users=a; xuser=b; user; USER=c", None),
            ("user=; x=1", None),
            ("user=\"\"", None),
            ("user=a=b", Some("a=b")),
        ];
        for (line, expected) in table {
            assert_eq!(cookie("user", &headers(&[("cookie", line)])), expected.map(str::as_bytes), "{line}");
        }
        let lines = headers(&[("cookie", "x=1"), ("cookie", "user=a")]);
        assert_eq!(cookie("user", &lines), Some(&b"a"[..]));
    }

    #[test]
    fn who_has_no_cookie_gets_one_that_is_drawn_alike_when_it_comes_back() {
        let given = by_cookie("user", Some("; Max-Age=60; HttpOnly"));
        let first = User::of(std::slice::from_ref(&given), &headers(&[("cookie", "user=")]));
        let mut answer = headers(&[("set-cookie", "x=1")]);
        let hash = first.hash;
        first.give_cookies(&mut answer);
        let [_, set] = answer.get_all("set-cookie").iter().collect::<Vec<_>>()[..] else { panic!("{answer:?}") };
        let (pair, attributes) = set.to_str().unwrap().split_once(';').unwrap();
        assert_eq!(attributes, " Max-Age=60; HttpOnly");
        let again = User::of(&[given], &headers(&[("cookie", pair)]));
        assert!(again.cookies.is_empty() && again.hash == hash && hash.is_some());
        // Without a lifetime nothing is given, and chance decides.
        let user = User::of(&[by_cookie("user", None)], &headers(&[]));
        assert!(user.hash.is_none() && user.cookies.is_empty());
    }
}
