//! `CorsPolicy`: which other origins' scripts may read the answers of a route.

use http::HeaderValue;
use sluice_xds::envoy::{
    config::core::v3::RuntimeFractionalPercent, extensions::filters::http::cors::v3::CorsPolicy as Message,
    r#type::v3::fractional_percent::DenominatorType,
};

use super::{ConfigError, matching};
use crate::snapshot::{Asked, CorsPolicy};

/// `None` if it is switched off.
pub(super) fn parse(message: &Message, field: &str) -> Result<Option<CorsPolicy>, ConfigError> {
    let origins = message
        .allow_origin_string_match
        .iter()
        .enumerate()
        .map(|(at, origin)| matching::string(origin, &format!("{field}.allow_origin_string_match[{at}]")));
    let asked = |text: &str, name: &str| match text {
        "*" => Ok(Some(Asked::All)),
        text => Ok(value(text, || format!("{field}.{name}"))?.map(Asked::These)),
    };
    let policy = CorsPolicy {
        origins: origins.collect::<Result<_, _>>()?,
        methods: asked(&message.allow_methods, "allow_methods")?,
        headers: asked(&message.allow_headers, "allow_headers")?,
        expose: value(&message.expose_headers, || format!("{field}.expose_headers"))?,
        max_age: value(&message.max_age, || format!("{field}.max_age"))?,
        credentials: message.allow_credentials.unwrap_or_default(),
        // Envoy's default (cors.proto, forward_not_matching_preflights).
        forward_others: message.forward_not_matching_preflights.unwrap_or(true),
    };
    let enabled = match &message.filter_enabled {
        None => true,
        Some(share) => enabled(share, &format!("{field}.filter_enabled"))?,
    };
    Ok(enabled.then_some(policy))
}

/// A part of the requests would see answers of one page come and go.
fn enabled(share: &RuntimeFractionalPercent, field: &str) -> Result<bool, ConfigError> {
    let Some(share) = &share.default_value else {
        return Err(ConfigError::missing(format!("{field}.default_value")));
    };
    let whole = match DenominatorType::try_from(share.denominator) {
        Ok(DenominatorType::Hundred) => Some(100),
        Ok(DenominatorType::TenThousand) => Some(10_000),
        Ok(DenominatorType::Million) => Some(1_000_000),
        Err(_) => None,
    };
    match whole {
        Some(whole) if share.numerator >= whole => Ok(true),
        Some(_) if share.numerator == 0 => Ok(false),
        Some(_) | None => {
            let found = format!("{} ({})", share.numerator, share.denominator().as_str_name());
            Err(ConfigError::unsupported(format!("{field}.default_value"), found, "0 % and 100 %"))
        }
    }
}

/// Nothing is said with an empty one.
fn value(text: &str, field: impl FnOnce() -> String) -> Result<Option<HeaderValue>, ConfigError> {
    if text.is_empty() {
        return Ok(None);
    }
    let value = HeaderValue::from_str(text);
    value.map(Some).map_err(|_| ConfigError::invalid(field(), text, "it must be the value of a header"))
}
