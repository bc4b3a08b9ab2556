//! `RouteConfiguration`: one answer for all requests of a port, which is a split over clusters or a status.

use std::{collections::BTreeSet, time::Duration};

use http::StatusCode;
use sluice_xds::envoy::config::route::v3::{
    RouteAction, RouteConfiguration, WeightedCluster, route::Action as MessageAction, route_action::ClusterSpecifier,
    route_match::PathSpecifier,
};

use super::ConfigError;

/// What to do with a request, by the names of clusters.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Action {
    Forward { targets: Targets, timeout: Option<Duration> },
    Respond(StatusCode),
}

/// Names of clusters and their weights. The sum is from 1 to `u32::MAX`; each name occurs once.
pub(super) type Targets = Vec<(String, u32)>;

impl Action {
    pub(super) fn clusters(&self) -> impl Iterator<Item = &str> {
        let targets = match self {
            Self::Forward { targets, .. } => targets.as_slice(),
            Self::Respond(_) => &[],
        };
        targets.iter().map(|(name, _)| name.as_str())
    }
}

/// `field` is where the message stands: empty, or with a dot at its end.
pub(super) fn parse(message: &RouteConfiguration, field: &str) -> Result<Action, ConfigError> {
    let [host] = message.virtual_hosts.as_slice() else {
        let found = format!("{} hosts", message.virtual_hosts.len());
        return Err(ConfigError::unsupported(format!("{field}virtual_hosts"), found, "exactly one"));
    };
    if host.domains != ["*"] {
        let found = host.domains.join(", ");
        return Err(ConfigError::unsupported(format!("{field}virtual_hosts[0].domains"), found, "*"));
    }
    let field = format!("{field}virtual_hosts[0].routes");
    let [route] = host.routes.as_slice() else {
        return Err(ConfigError::unsupported(field, format!("{} routes", host.routes.len()), "exactly one"));
    };
    match route.r#match.as_ref().and_then(|rule| rule.path_specifier.as_ref()) {
        Some(PathSpecifier::Prefix(prefix)) if prefix.is_empty() || prefix == "/" => {}
        other => {
            return Err(ConfigError::unsupported(format!("{field}[0].match"), format!("{other:?}"), "the prefix /"));
        }
    }
    match &route.action {
        Some(MessageAction::Route(action)) => {
            let field = format!("{field}[0].route");
            Ok(Action::Forward { targets: forward(action, &field)?, timeout: timeout(action, &field)? })
        }
        Some(MessageAction::DirectResponse(response)) => {
            let status = u16::try_from(response.status).ok().filter(|status| (200..600).contains(status));
            let status = status.and_then(|status| StatusCode::from_u16(status).ok());
            status.map(Action::Respond).ok_or_else(|| {
                let field = format!("{field}[0].direct_response.status");
                ConfigError::invalid(field, response.status, "it must be from 200 to 599")
            })
        }
        None => Err(ConfigError::missing(format!("{field}[0].route"))),
    }
}

fn forward(action: &RouteAction, field: &str) -> Result<Targets, ConfigError> {
    match &action.cluster_specifier {
        Some(ClusterSpecifier::Cluster(name)) => targets([(name.as_str(), 1)], &format!("{field}.cluster")),
        Some(ClusterSpecifier::WeightedClusters(weighted)) => {
            let field = format!("{field}.weighted_clusters");
            let targets = weighted_targets(weighted, &field)?;
            declared_total(weighted, &targets, &field)?;
            Ok(targets)
        }
        None => Err(ConfigError::missing(format!("{field}.weighted_clusters"))),
    }
}

/// `RouteAction.timeout`: 0 is none. Unlike Envoy's, one that is not said is none, too: the controller always says it.
fn timeout(action: &RouteAction, field: &str) -> Result<Option<Duration>, ConfigError> {
    let Some(said) = &action.timeout else { return Ok(None) };
    let timeout = Duration::try_from(*said).map_err(|_| {
        let said = format!("{} s {} ns", said.seconds, said.nanos);
        ConfigError::invalid(format!("{field}.timeout"), said, "it must not be negative")
    })?;
    Ok((!timeout.is_zero()).then_some(timeout))
}

fn weighted_targets(weighted: &WeightedCluster, field: &str) -> Result<Targets, ConfigError> {
    let named = weighted.clusters.iter().map(|cluster| (cluster.name.as_str(), cluster.weight.unwrap_or_default()));
    targets(named, &format!("{field}.clusters"))
}

fn declared_total(weighted: &WeightedCluster, targets: &Targets, field: &str) -> Result<(), ConfigError> {
    let sum: u32 = targets.iter().map(|(_, weight)| weight).sum();
    match weighted.total_weight {
        Some(total) if total != sum => {
            Err(ConfigError::invalid(format!("{field}.total_weight"), total, "it must be the sum of the weights"))
        }
        Some(_) | None => Ok(()),
    }
}

/// Checks the rules of [`Targets`].
pub(super) fn targets<'a>(
    named: impl IntoIterator<Item = (&'a str, u32)>,
    field: &str,
) -> Result<Targets, ConfigError> {
    let mut sum = 0_u32;
    let mut seen = BTreeSet::new();
    let mut targets = Targets::new();
    for (at, (name, weight)) in named.into_iter().enumerate() {
        if name.is_empty() {
            return Err(ConfigError::missing(format!("{field}[{at}].name")));
        }
        if !seen.insert(name) {
            return Err(ConfigError::invalid(format!("{field}[{at}].name"), name, "each cluster may be named once"));
        }
        sum = sum.checked_add(weight).ok_or_else(|| {
            ConfigError::invalid(format!("{field}[{at}].weight"), weight, "the sum must be below 2^32")
        })?;
        targets.push((name.to_owned(), weight));
    }
    if sum == 0 {
        return Err(ConfigError::invalid(field, "all weights 0", "the sum of the weights must be above 0"));
    }
    Ok(targets)
}
