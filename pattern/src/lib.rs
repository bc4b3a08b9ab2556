//! Texts of routes that proxies take or refuse, and that the controller refuses beforehand: regular expressions, what is put in place of
//! their matches, and hosts.
//!
//! Expressions are matched in linear time, as Envoy's (<https://github.com/google/re2/wiki/Syntax>).
//! Linear in the length of the text, times the size of the expression: there are some whose automaton does not fit into any cache, and
//! then each byte is a step for each of their states. Both come from outside, so both are bounded
//! (<https://docs.rs/regex/latest/regex/#untrusted-input>).

#![forbid(unsafe_code)]

mod host;
mod substitution;

pub use host::authority;

pub use regex::bytes::Captures;
use regex::bytes::{Regex, RegexBuilder};
pub use substitution::{Piece, SubstitutionError, is_part_of_target, pieces};

/// Of a compiled expression, in bytes. A state takes 32 of them at least, so it has a few hundred. The 256 characters that a Canary may
/// say hardly take as much, unless they repeat by a number: `.` takes 80 bytes, and `[^/]{1,64}` 8 KiB.
const LARGEST: usize = 24 << 10;
/// Of a text that is looked at, in bytes. It is what common servers take of a first line, or of a header.
const LONGEST: usize = 8 << 10;
/// By all searches for the places in one text, in bytes. Each may read to the end before it knows that a place was right at its beginning
/// (`.*[^A-Z]|[A-Z]`), and all together the square of the text's length.
const MOST_SEARCHED: usize = 4 * LONGEST;
/// Of what a thread remembers while it searches, in bytes. With less it is slower, and never wrong.
const CACHE: usize = 256 << 10;

/// An expression over bytes, which headers are. Its classes (`\d`, `\w`) know ASCII only, as those of RE2; so do `.` and `(?i)`.
///
/// Each clone has a memory of its own for searches. A thread has a clone of its own, so that no two meet at a lock.
#[derive(Debug, Clone)]
pub struct Pattern(Regex);

/// Why an expression is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    #[error("it is not a regular expression: {0}")]
    Syntax(String),
    #[error("it is larger than {LARGEST} bytes when compiled, where x{{64}} takes as much as 64 times x")]
    TooLarge,
}

impl Pattern {
    /// One that is looked for anywhere in a text.
    ///
    /// # Errors
    /// When it is no expression, or too large a one.
    pub fn part(text: &str) -> Result<Self, PatternError> {
        let built = RegexBuilder::new(text).unicode(false).size_limit(LARGEST).dfa_size_limit(CACHE).build();
        built.map(Self).map_err(|error| {
            if matches!(error, regex::Error::CompiledTooBig(_)) {
                return PatternError::TooLarge;
            }
            // The last line says it; those before show where.
            let text = error.to_string();
            let reason = text.lines().last().unwrap_or_default();
            PatternError::Syntax(reason.strip_prefix("error: ").unwrap_or(reason).to_owned())
        })
    }

    /// One that a whole text must match.
    ///
    /// # Errors
    /// When it is no expression, or too large a one.
    pub fn whole(text: &str) -> Result<Self, PatternError> {
        // By itself first: "a)|(b" is one only between other parentheses.
        Self::part(text)?;
        Self::part(&format!(r"\A(?:{text})\z"))
    }

    /// How many groups it has, the whole match among them.
    #[must_use]
    pub fn groups(&self) -> usize {
        self.0.captures_len()
    }

    /// A text of more than 8 KiB matches nothing.
    #[must_use]
    pub fn is_match(&self, text: &[u8]) -> bool {
        text.len() <= LONGEST && self.0.is_match(text)
    }

    /// Shows each place in a text, from left to right. `None`: not all, because the text is too long, or has too many of them for its
    /// length.
    pub fn each<'t>(&self, text: &'t [u8], mut show: impl FnMut(&Captures<'t>)) -> Option<()> {
        if text.len() > LONGEST {
            return None;
        }
        let mut left = MOST_SEARCHED;
        for found in self.0.captures_iter(text) {
            show(&found);
            left = left.checked_sub(text.len() - found.get_match().end())?;
        }
        Some(())
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_whole_text_matches_or_nothing_does() {
        let table = [
            ("/cart|/shop", "/cart", true),
            ("/cart|/shop", "/cart/1", false),
            ("/cart|/shop", "/a/shop", false),
            (r"/item/\d+", "/item/12", true),
            (r"/item/\d+", "/item/12\n", false),
            (r"/item/\d+", "/item/\u{663}", false),
            ("(?m)^a$", "a\nb", false),
            ("(?i)CART", "cart", true),
            (".*", "caf\u{e9}", true),
            ("", "", true),
        ];
        for (pattern, text, expected) in table {
            assert_eq!(Pattern::whole(pattern).unwrap().is_match(text.as_bytes()), expected, "{pattern} {text}");
        }
    }

    const TOO_LARGE: &str = "it is larger than 24576 bytes when compiled, where x{64} takes as much as 64 times x";

    #[test]
    fn what_a_canary_may_say_is_taken_unless_it_repeats_much() {
        let names: Vec<_> = (10..52).map(|number| format!("{number}abc")).collect();
        let table: [&str; 8] = [
            "^/api/v[0-9]+/(users|carts)/[^/]{1,64}$",
            "^(.*?;)?(canary=always)(;.*)?$",
            "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
            "[A-Za-z0-9_.-]{1,128}",
            r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)*",
            &format!("(?i){}", "a".repeat(252)),
            &format!("({})", names.join("|")),
            &".".repeat(256),
        ];
        for pattern in table {
            assert!(pattern.len() <= 256);
            assert_eq!(Pattern::whole(pattern).err(), None, "{pattern}");
        }
    }

    #[test]
    fn a_text_of_more_than_8_kib_matches_nothing() {
        let any = Pattern::whole(".*").unwrap();
        assert!(any.is_match(&[b'a'; 8192]));
        assert!(!any.is_match(&[b'a'; 8193]));
    }

    #[test]
    fn all_places_in_a_text_are_found_or_it_is_said_that_there_are_too_many() {
        let pattern = Pattern::part("a+").unwrap();
        let found = |text: &[u8]| {
            let mut count = 0;
            pattern.each(text, |_| count += 1).map(|()| count)
        };
        assert_eq!((found(b"-aa--a"), found(b"---")), (Some(2), Some(0)));
        // Behind the places of so many pairs, all together, are as many bytes as the square of their number.
        assert_eq!((found(&b"a-".repeat(181)), found(&b"a-".repeat(182))), (Some(181), None));
        assert_eq!((found(&[b'a'; 8192]), found(&[b'a'; 8193])), (Some(1), None));
    }

    #[test]
    fn what_is_none_or_too_large_is_refused_with_the_reason() {
        let table = [
            ("a(", "it is not a regular expression: unclosed group"),
            ("a)|(b", "it is not a regular expression: unopened group"),
            (r"(a)\1", "it is not a regular expression: backreferences are not supported"),
            (r"\p{Greek}", "it is not a regular expression: Unicode not allowed here"),
            ("(a{1000}){1000}", TOO_LARGE),
            ("[^/]{1,256}", TOO_LARGE),
            // Of a text of a and b, each set of these states may be the next one.
            ("[ab]*a[ab]{400}", TOO_LARGE),
        ];
        for (pattern, reason) in table {
            assert_eq!(Pattern::whole(pattern).unwrap_err().to_string(), reason, "{pattern}");
        }
    }
}
