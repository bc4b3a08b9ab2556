//! What log lines and spans hold of a text that a client has chosen.
//!
//! They wait in queues that are bounded by their number. A head may have 64 KiB, so a client could make thousands of them long.

use std::fmt;

use opentelemetry::Value;
use serde::{Serialize, Serializer};

/// Bytes of the longest excerpt, its mark included.
pub const LONGEST: usize = 1024;
/// The end of what was cut.
const MARK: &str = "…";

/// A text as it is, or its begin with an ellipsis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Excerpt<'a> {
    begin: &'a str,
    mark: &'static str,
}

impl<'a> Excerpt<'a> {
    #[must_use]
    pub fn of(text: &'a str) -> Self {
        if text.len() <= LONGEST {
            Self { begin: text, mark: "" }
        } else {
            let (begin, _) = text.split_at(text.floor_char_boundary(LONGEST - MARK.len()));
            Self { begin, mark: MARK }
        }
    }
}

impl fmt::Display for Excerpt<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.begin)?;
        f.write_str(self.mark)
    }
}

impl Serialize for Excerpt<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.mark.is_empty() { serializer.serialize_str(self.begin) } else { serializer.collect_str(self) }
    }
}

impl From<Excerpt<'_>> for Value {
    fn from(excerpt: Excerpt<'_>) -> Self {
        [excerpt.begin, excerpt.mark].concat().into()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_text_is_cut_between_characters_and_says_so() {
        let whole = "x".repeat(LONGEST);
        assert_eq!(Excerpt::of(&whole).to_string(), whole);
        assert_eq!(Excerpt::of(&(whole + "x")).to_string(), "x".repeat(LONGEST - 3) + "…");
        // 1021 is within a character of two bytes.
        let cut = Excerpt::of(&"é".repeat(LONGEST)).to_string();
        assert_eq!(cut, "é".repeat(510) + "…");
        assert_eq!(Value::from(Excerpt::of(&"é".repeat(LONGEST))).as_str(), cut);
    }

    #[test]
    fn json_has_the_same_text() {
        for text in ["", "/cart?\"x\"", &"\"é".repeat(LONGEST)] {
            let excerpt = Excerpt::of(text);
            let json = serde_json::to_string(&excerpt).unwrap();
            assert_eq!(serde_json::from_str::<String>(&json).unwrap(), excerpt.to_string());
        }
    }
}
