//! `RouteAction.request_mirror_policies`: which clusters get copies of requests.

use sluice_xds::envoy::config::route::v3::RouteAction;

use super::{ConfigError, share};
use crate::snapshot::{Mirror, Share};

pub(super) fn parse(action: &RouteAction, field: &str) -> Result<Vec<Mirror<String>>, ConfigError> {
    let policies = action.request_mirror_policies.iter().enumerate().map(|(at, policy)| {
        let field = format!("{field}.request_mirror_policies[{at}]");
        if policy.cluster.is_empty() {
            return Err(ConfigError::missing(format!("{field}.cluster")));
        }
        // Without a fraction, all (route_components.proto).
        let fraction = policy.runtime_fraction.as_ref().map(|fraction| {
            let field = format!("{field}.runtime_fraction.default_value");
            let value = fraction.default_value.as_ref().ok_or_else(|| ConfigError::missing(&*field))?;
            share::parse(value, &field)
        });
        Ok(Mirror {
            cluster: policy.cluster.clone(),
            share: fraction.transpose()?.unwrap_or(Share::ALL),
            marks_host: !policy.disable_shadow_host_suffix_append,
        })
    });
    policies.collect()
}
