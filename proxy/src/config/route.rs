//! `RouteConfiguration`: the routes of a port. Each is a split over clusters or a status, for the requests that it matches.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use http::{HeaderName, HeaderValue, StatusCode, header};
use sluice_xds::envoy::config::{
    core::v3::{HeaderValueOption, header_value_option::HeaderAppendAction},
    route::v3::{
        RetryPolicy as RetryMessage, Route as RouteMessage, RouteAction, RouteConfiguration, WeightedCluster,
        route::Action as MessageAction, route_action::ClusterSpecifier,
    },
};

use super::{ConfigError, affinity, cluster, cors, fault, matching, mirror, rewrite, tls};
use crate::{
    metrics::GrpcStatus,
    snapshot::{CorsPolicy, Fault, HeaderChanges, Mirror, Policy, RetryOn, RetryPolicy, RouteMatch},
};

/// What frames or addresses a message, or concerns one connection of its way, is not for a route to change.
const NOT_OURS: [HeaderName; 9] = [
    header::HOST,
    header::CONTENT_LENGTH,
    header::TRANSFER_ENCODING,
    header::CONNECTION,
    header::UPGRADE,
    header::TE,
    header::TRAILER,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
];
/// Prefix of the headers that proxies of ours say something with.
const OURS: &str = "x-sluice-";

/// The routes of a port in their order. Not empty.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Routes {
    pub(super) all: Vec<Route>,
    /// What they name, each once: of many routes most name the same.
    clusters: BTreeSet<String>,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Route {
    pub(super) matches: RouteMatch,
    pub(super) action: Action,
}

/// What to do with a request, by the names of clusters.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Action {
    Forward { targets: Targets, mirrors: Vec<Mirror<String>>, policy: Arc<Policy> },
    Respond(StatusCode),
}

/// Names of clusters and their weights. The sum is from 1 to `u32::MAX`; each name occurs once.
pub(super) type Targets = Vec<(String, u32)>;

impl Routes {
    pub(super) fn clusters(&self) -> impl Iterator<Item = &str> {
        self.clusters.iter().map(String::as_str)
    }
}

impl Action {
    fn clusters(&self) -> impl Iterator<Item = &str> {
        let (targets, mirrors) = match self {
            Self::Forward { targets, mirrors, policy: _ } => (targets.as_slice(), mirrors.as_slice()),
            Self::Respond(_) => Default::default(),
        };
        let targets = targets.iter().map(|(name, _)| name.as_str());
        targets.chain(mirrors.iter().map(|mirror| mirror.cluster.as_str()))
    }
}

/// `field` is where the message stands: empty, or with a dot at its end.
pub(super) fn parse(message: &RouteConfiguration, field: &str) -> Result<Routes, ConfigError> {
    let [host] = message.virtual_hosts.as_slice() else {
        let found = format!("{} hosts", message.virtual_hosts.len());
        return Err(ConfigError::unsupported(format!("{field}virtual_hosts"), found, "exactly one"));
    };
    if host.domains != ["*"] {
        let found = host.domains.join(", ");
        return Err(ConfigError::unsupported(format!("{field}virtual_hosts[0].domains"), found, "*"));
    }
    let field = format!("{field}virtual_hosts[0].routes");
    if host.routes.is_empty() {
        return Err(ConfigError::missing(field));
    }
    let routes = host.routes.iter().enumerate().map(|(at, route)| {
        let field = format!("{field}[{at}]");
        let matches = matching::parse(route.r#match.as_ref(), &format!("{field}.match"))?;
        let action = action(route, &matches, &field)?;
        Ok(Route { matches, action })
    });
    let all = routes.collect::<Result<Vec<_>, _>>()?;
    let clusters = all.iter().flat_map(|route| route.action.clusters()).map(str::to_owned).collect();
    Ok(Routes { all, clusters })
}

fn action(route: &RouteMessage, matches: &RouteMatch, at: &str) -> Result<Action, ConfigError> {
    let (cors, fault) = filters(route, at)?;
    match &route.action {
        Some(MessageAction::Route(action)) => {
            let field = format!("{at}.route");
            let targets = forward(action, &field)?;
            let policy = Policy {
                timeout: duration(action.timeout.as_ref(), || format!("{field}.timeout"))?,
                stream_idle: stream_idle(action, &field)?,
                retry: action.retry_policy.as_ref().map(|retry| retries(retry, &field)).transpose()?.flatten(),
                affinity: affinity::parse(action, &field)?,
                fault,
                rewrite: rewrite::parse(action, &matches.path, &field)?,
                cors,
                ..headers(route, at)?
            };
            Ok(Action::Forward { targets, mirrors: mirror::parse(action, &field)?, policy: Arc::new(policy) })
        }
        Some(MessageAction::DirectResponse(response)) => {
            if response.body.is_some() {
                return Err(ConfigError::unsupported(format!("{at}.direct_response.body"), "set", "its own words"));
            }
            let status = u16::try_from(response.status).ok().filter(|status| (200..600).contains(status));
            let status = status.and_then(|status| StatusCode::from_u16(status).ok());
            status.map(Action::Respond).ok_or_else(|| {
                let field = format!("{at}.direct_response.status");
                ConfigError::invalid(field, response.status, "it must be from 200 to 599")
            })
        }
        None => Err(ConfigError::missing(format!("{at}.route"))),
    }
}

/// What filters do on this route. The listener names the filters for Envoy's sake; here they are what the route says.
fn filters(route: &RouteMessage, at: &str) -> Result<(Option<CorsPolicy>, Option<Fault>), ConfigError> {
    let (mut cors, mut fault) = (None, None);
    for (name, config) in &route.typed_per_filter_config {
        let field = format!("{at}.typed_per_filter_config[{name}]");
        match name.as_str() {
            "envoy.filters.http.cors" => cors = cors::parse(&tls::read(config, &field)?, &field)?,
            "envoy.filters.http.fault" => fault = fault::parse(&tls::read(config, &field)?, &field)?,
            _ => {
                let field = format!("{at}.typed_per_filter_config");
                return Err(ConfigError::unsupported(
                    field,
                    name,
                    "envoy.filters.http.cors and envoy.filters.http.fault",
                ));
            }
        }
    }
    Ok((cors, fault))
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

/// 0 is none. Unlike Envoy's route timeout, one that is not said is none, too: the controller always says it.
pub(super) fn duration(
    said: Option<&prost_types::Duration>,
    field: impl FnOnce() -> String,
) -> Result<Option<Duration>, ConfigError> {
    let Some(said) = said else { return Ok(None) };
    let read = cluster::duration(*said).ok_or_else(|| {
        ConfigError::invalid(
            field(),
            cluster::in_words(*said),
            "it must be from 0 to 10,000 years, with less than 10^9 ns beside its seconds",
        )
    })?;
    Ok((!read.is_zero()).then_some(read))
}

/// A time that is not kept here, and may not be said, unless it is 0.
pub(super) fn no_time(said: Option<prost_types::Duration>, field: impl FnOnce() -> String) -> Result<(), ConfigError> {
    match said.filter(|said| (said.seconds, said.nanos) != (0, 0)) {
        Some(said) => Err(ConfigError::unsupported(field(), cluster::in_words(said), "0")),
        None => Ok(()),
    }
}

/// In place of the connection manager's. Here 0 says that there is none.
fn stream_idle(action: &RouteAction, field: &str) -> Result<Option<Duration>, ConfigError> {
    if let Some(most) = &action.max_stream_duration {
        no_time(most.max_stream_duration, || format!("{field}.max_stream_duration.max_stream_duration"))?;
        let of_grpc = [
            ("grpc_timeout_header_max", most.grpc_timeout_header_max),
            ("grpc_timeout_header_offset", most.grpc_timeout_header_offset),
        ];
        for (name, said) in of_grpc {
            if let Some(said) = said {
                let field = format!("{field}.max_stream_duration.{name}");
                return Err(ConfigError::unsupported(field, cluster::in_words(said), "none"));
            }
        }
    }
    let said = action.idle_timeout.as_ref();
    let read = duration(said, || format!("{field}.idle_timeout"))?;
    Ok(said.map(|_| read.unwrap_or_default()))
}

/// `retry_on` by the words of Envoy's router
/// (<https://www.envoyproxy.io/docs/envoy/latest/configuration/http/http_filters/router_filter#x-envoy-retry-on>). What is certain not
/// to have been processed is sent again anyway, so that `connect-failure` and `refused-stream` add nothing.
fn retries(message: &RetryMessage, field: &str) -> Result<Option<RetryPolicy>, ConfigError> {
    let grpc = |code: &[u8]| Some(RetryOn::Grpc(GrpcStatus::parse(code)));
    let mut on = Vec::new();
    for word in message.retry_on.split(',').map(str::trim).filter(|word| !word.is_empty()) {
        let one = match word {
            "connect-failure" | "refused-stream" => None,
            "5xx" => Some(RetryOn::ServerError),
            "gateway-error" => Some(RetryOn::GatewayError),
            "reset" => Some(RetryOn::Reset),
            "retriable-4xx" => Some(RetryOn::Conflict),
            "cancelled" => grpc(b"1"),
            "deadline-exceeded" => grpc(b"4"),
            "resource-exhausted" => grpc(b"8"),
            "internal" => grpc(b"13"),
            "unavailable" => grpc(b"14"),
            other => {
                let known =
                    "5xx, gateway-error, reset, connect-failure, refused-stream, retriable-4xx and gRPC's words";
                return Err(ConfigError::unsupported(format!("{field}.retry_policy.retry_on"), other, known));
            }
        };
        on.extend(one);
    }
    let per_try_timeout =
        duration(message.per_try_timeout.as_ref(), || format!("{field}.retry_policy.per_try_timeout"))?;
    // Envoy's default (route_components.proto, num_retries).
    let retries = message.num_retries.unwrap_or(1);
    Ok((!on.is_empty() && retries > 0).then_some(RetryPolicy { on, retries, per_try_timeout }))
}

fn headers(route: &RouteMessage, field: &str) -> Result<Policy, ConfigError> {
    let request = (&route.request_headers_to_remove, &route.request_headers_to_add);
    let response = (&route.response_headers_to_remove, &route.response_headers_to_add);
    Ok(Policy {
        request_headers: changes(request.0, request.1, &format!("{field}.request_headers"))?,
        response_headers: changes(response.0, response.1, &format!("{field}.response_headers"))?,
        ..Policy::default()
    })
}

fn changes(remove: &[String], add: &[HeaderValueOption], field: &str) -> Result<HeaderChanges, ConfigError> {
    let mut changes = HeaderChanges::default();
    for (at, name) in remove.iter().enumerate() {
        changes.remove.push(header_name(name, || format!("{field}_to_remove[{at}]"))?);
    }
    for (at, option) in add.iter().enumerate() {
        let field = format!("{field}_to_add[{at}]");
        let Some(header) = &option.header else {
            return Err(ConfigError::missing(format!("{field}.header")));
        };
        let append = match HeaderAppendAction::try_from(option.append_action) {
            Ok(HeaderAppendAction::AppendIfExistsOrAdd) => true,
            Ok(HeaderAppendAction::OverwriteIfExistsOrAdd) => false,
            Ok(HeaderAppendAction::AddIfAbsent | HeaderAppendAction::OverwriteIfExists) | Err(_) => {
                let supported = "APPEND_IF_EXISTS_OR_ADD and OVERWRITE_IF_EXISTS_OR_ADD";
                let field = format!("{field}.append_action");
                return Err(ConfigError::unsupported(field, option.append_action, supported));
            }
        };
        let name = header_name(&header.key, || format!("{field}.header.key"))?;
        // Envoy puts something else in place of %...% (access log operators), and we do not.
        let value = Some(&header.value).filter(|value| !value.contains('%'));
        let value = value.and_then(|value| HeaderValue::from_str(value).ok()).ok_or_else(|| {
            let rule = "it must be visible ASCII and have no %";
            ConfigError::invalid(format!("{field}.header.value"), &header.value, rule)
        })?;
        changes.write.push((name, value, append));
    }
    Ok(changes)
}

fn header_name(name: &str, field: impl FnOnce() -> String) -> Result<HeaderName, ConfigError> {
    match HeaderName::from_bytes(name.as_bytes()) {
        Ok(name) if !NOT_OURS.contains(&name) && !name.as_str().starts_with(OURS) => Ok(name),
        Ok(_) => Err(ConfigError::unsupported(field(), name, "headers that do not frame or address a message")),
        Err(_) => Err(ConfigError::invalid(field(), name, "it must be the name of a header")),
    }
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
