//! Durations as users write them in Flagger's manifests: `30s`, `1m`, `1m30s`, `500ms`, `2h`.

use std::time::Duration;

/// A duration that could not be understood.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{text:?} is not a duration: write a number and a unit, such as 30s, 1m30s, 500ms or 2h")]
pub struct DurationError {
    text: String,
}

/// Pattern of [`parse_duration`] for the schema.
pub(crate) const PATTERN: &str = r"^([0-9]{1,7}(ms|s|m|h))+$";

/// Parses a sequence of numbers with the units `ms`, `s`, `m`, `h`.
///
/// # Errors
/// On anything else, an empty text included.
pub fn parse_duration(text: &str) -> Result<Duration, DurationError> {
    let bad = || DurationError { text: text.to_owned() };
    let mut rest = text;
    let mut total = Duration::ZERO;
    if rest.is_empty() {
        return Err(bad());
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
        let number: u64 = rest[..digits].parse().map_err(|_| bad())?;
        rest = &rest[digits..];
        let unit_end = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let millis = match &rest[..unit_end] {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return Err(bad()),
        };
        rest = &rest[unit_end..];
        let part = number.checked_mul(millis).ok_or_else(bad)?;
        total = total.checked_add(Duration::from_millis(part)).ok_or_else(bad)?;
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn durations_of_flaggers_manifests_are_understood() {
        for (text, millis) in
            [("30s", 30_000), ("1m", 60_000), ("1m30s", 90_000), ("500ms", 500), ("2h", 7_200_000), ("0s", 0)]
        {
            assert_eq!(parse_duration(text).unwrap(), Duration::from_millis(millis), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_duration_is_refused_with_an_example() {
        for text in ["", "10", "s", "1d", "-1s", "1.5s", "1m 30s", "99999999999999999999s"] {
            let error = parse_duration(text).unwrap_err().to_string();
            assert!(error.contains("30s"), "{error}");
        }
    }
}
