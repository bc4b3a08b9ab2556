//! `HTTPFault`: what goes wrong on purpose, said by each route for itself.

use std::time::Duration;

use http::StatusCode;
use prost_types::Any;
use sluice_xds::envoy::{
    extensions::filters::{
        common::fault::v3::{FaultDelay, fault_delay::FaultDelaySecifier},
        http::fault::v3::{FaultAbort, HttpFault, fault_abort::ErrorType},
    },
    r#type::v3::FractionalPercent,
};

use super::{ConfigError, matching, route, share, tls};
use crate::{
    metrics::GrpcStatus,
    snapshot::{Abort, Fault, Share},
};

/// The filter itself only has to be there, for Envoy's sake.
pub(super) fn of_listener(any: &Any, field: &str) -> Result<(), ConfigError> {
    let message: HttpFault = tls::read(any, field)?;
    if message.delay.is_some() || message.abort.is_some() {
        return Err(ConfigError::unsupported(field, "a fault", "faults of routes (typed_per_filter_config)"));
    }
    Ok(())
}

pub(super) fn parse(message: &HttpFault, field: &str) -> Result<Option<Fault>, ConfigError> {
    let headers = matching::headers(&message.headers, field)?;
    let delay = message.delay.as_ref().map(|it| delay(it, &format!("{field}.delay"))).transpose()?;
    let abort = message.abort.as_ref().map(|it| abort(it, &format!("{field}.abort"))).transpose()?;
    let (delay, abort) =
        (delay.filter(|(_, share)| *share > Share::NONE), abort.filter(|(_, share)| *share > Share::NONE));
    Ok((delay.is_some() || abort.is_some()).then_some(Fault { headers, delay, abort }))
}

fn delay(message: &FaultDelay, field: &str) -> Result<(Duration, Share), ConfigError> {
    let said = match &message.fault_delay_secifier {
        Some(FaultDelaySecifier::FixedDelay(said)) => said,
        // The oneof has more kinds, which we do not know.
        None => return Err(ConfigError::missing(format!("{field}.fixed_delay"))),
    };
    let delay = route::duration(Some(said), || format!("{field}.fixed_delay"))?;
    let delay =
        delay.ok_or_else(|| ConfigError::invalid(format!("{field}.fixed_delay"), "0 s", "it must be above 0"))?;
    Ok((delay, percentage(message.percentage.as_ref(), field)?))
}

fn abort(message: &FaultAbort, field: &str) -> Result<(Abort, Share), ConfigError> {
    let abort = match message.error_type {
        Some(ErrorType::HttpStatus(status)) => {
            let valid = u16::try_from(status).ok().filter(|status| (200..600).contains(status));
            let valid = valid.and_then(|status| StatusCode::from_u16(status).ok());
            Abort::Http(valid.ok_or_else(|| {
                ConfigError::invalid(format!("{field}.http_status"), status, "it must be from 200 to 599")
            })?)
        }
        Some(ErrorType::GrpcStatus(code)) => Abort::Grpc(
            GrpcStatus::of_code(code)
                .ok_or_else(|| ConfigError::invalid(format!("{field}.grpc_status"), code, "it must be from 0 to 16"))?,
        ),
        None => return Err(ConfigError::missing(format!("{field}.http_status or {field}.grpc_status"))),
    };
    Ok((abort, percentage(message.percentage.as_ref(), field)?))
}

/// Without a percentage, none (fault.proto, by protobuf's default).
fn percentage(message: Option<&FractionalPercent>, field: &str) -> Result<Share, ConfigError> {
    message.map_or(Ok(Share::NONE), |message| share::parse(message, &format!("{field}.percentage")))
}
