//! Regular expressions of routes, in linear time as Envoy's (<https://github.com/google/re2/wiki/Syntax>).

use regex::bytes::{Regex, RegexBuilder};

/// Of a compiled expression, in bytes. It comes from outside, and is there once for each thread.
const LARGEST: usize = 64 << 10;
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
    #[error("it is larger than {LARGEST} bytes when compiled")]
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

    pub(crate) fn regex(&self) -> &Regex {
        &self.0
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
            assert_eq!(
                Pattern::whole(pattern).unwrap().regex().is_match(text.as_bytes()),
                expected,
                "{pattern} {text}"
            );
        }
    }

    #[test]
    fn what_is_none_or_too_large_is_refused_with_the_reason() {
        let table = [
            ("a(", "it is not a regular expression: unclosed group"),
            ("a)|(b", "it is not a regular expression: unopened group"),
            (r"(a)\1", "it is not a regular expression: backreferences are not supported"),
            ("(a{1000}){1000}", "it is larger than 65536 bytes when compiled"),
        ];
        for (pattern, reason) in table {
            assert_eq!(Pattern::whole(pattern).unwrap_err().to_string(), reason, "{pattern}");
        }
    }
}
