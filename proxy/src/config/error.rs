use sluice_pattern::{PatternError, SubstitutionError};
use sluice_xds::UnpackError;

/// Why a resource is rejected. The text goes to the controller, which shows it in the status of the release.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("{field} is missing")]
    Missing { field: String },
    #[error("{field} is '{value}', which this proxy does not support; it supports {supported}")]
    Unsupported { field: String, value: String, supported: &'static str },
    #[error("{field} is '{value}', but {rule}")]
    Invalid { field: String, value: String, rule: &'static str },
    #[error("{field} is '{value}', but {reason}")]
    Pattern { field: String, value: String, reason: PatternError },
    #[error("{field} is '{value}', but {reason}")]
    Substitution { field: String, value: String, reason: SubstitutionError },
    #[error("{field} cannot be read: {source}")]
    Encoding { field: String, source: UnpackError },
    #[error("it waits for {missing}, which this proxy does not have")]
    Incomplete { missing: String },
    #[error("it cannot be applied: {reason}")]
    NotApplied { reason: String },
}

impl ConfigError {
    pub(super) fn missing(field: impl Into<String>) -> Self {
        Self::Missing { field: field.into() }
    }

    pub(super) fn unsupported(field: impl Into<String>, value: impl ToString, supported: &'static str) -> Self {
        Self::Unsupported { field: field.into(), value: shorten(value.to_string()), supported }
    }

    pub(super) fn invalid(field: impl Into<String>, value: impl ToString, rule: &'static str) -> Self {
        Self::Invalid { field: field.into(), value: shorten(value.to_string()), rule }
    }

    pub(super) fn pattern(field: String, value: &str, reason: PatternError) -> Self {
        Self::Pattern { field, value: shorten(value.to_owned()), reason }
    }

    pub(super) fn substitution(field: String, value: &str, reason: SubstitutionError) -> Self {
        Self::Substitution { field, value: shorten(value.to_owned()), reason }
    }
}

/// A resource that keeps its last good version, with the reason.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name}: {error}")]
pub struct Rejected {
    /// The name of the resource, as in `Resource.name`.
    pub name: String,
    pub error: ConfigError,
}

/// Values come from outside: a message stays readable and bounded, whatever they hold.
fn shorten(value: String) -> String {
    const LONGEST: usize = 120;
    let mut text: String = value.escape_debug().take(LONGEST).collect();
    if value.chars().nth(LONGEST).is_some() {
        text.push('…');
    }
    text
}
