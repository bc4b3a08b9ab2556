//! What this proxy holds, for people. There is nothing secret in it: keys never come over xDS.

use std::sync::Arc;

use serde_json::{Value, json};
use sluice_xds::TypeUrl;

use super::{Resources, resources::Staged};
use crate::snapshot::{
    Action, Cluster, HashedBy, HeaderChanges, Listener, Mirror, Policy, Protocol, Route, Split, TrafficPolicy,
    Upstream, UpstreamProtocol,
};

impl Resources {
    /// The versions of all resources, what was refused and why, and the snapshot that serves.
    #[must_use]
    pub fn dump(&self) -> Value {
        let types = TypeUrl::ALL.map(|kind| {
            let mut of_kind = json!({ "versions": self.versions(kind) });
            let waiting = match kind {
                TypeUrl::Cluster | TypeUrl::Endpoints => Value::Null,
                TypeUrl::Listener => pending(self.listeners.iter()),
                TypeUrl::Route => pending(self.routes.iter()),
            };
            if !waiting.is_null() {
                of_kind["waiting"] = waiting;
            }
            if let Some(refused) = self.rejected.get(&kind).filter(|refused| !refused.is_empty()) {
                of_kind["rejected"] =
                    refused.iter().map(|(name, why)| (name.clone(), Value::String(why.to_string()))).collect();
            }
            (short_name(kind).to_owned(), of_kind)
        });
        let listeners = self.snapshot().listeners.iter().map(|(name, it)| (name.clone(), listener(it)));
        json!({
            "resources": Value::Object(types.into_iter().collect()),
            "serving": Value::Object(listeners.collect()),
        })
    }
}

/// The name of a type in our dump and metrics.
#[must_use]
pub fn short_name(kind: TypeUrl) -> &'static str {
    match kind {
        TypeUrl::Cluster => "clusters",
        TypeUrl::Endpoints => "endpoints",
        TypeUrl::Listener => "listeners",
        TypeUrl::Route => "routes",
    }
}

fn pending<'a, T: 'a>(of: impl Iterator<Item = (&'a String, &'a Staged<T>)>) -> Value {
    let versions: serde_json::Map<String, Value> =
        of.filter_map(|(name, staged)| Some((name.clone(), staged.pending.as_ref()?.version.clone().into()))).collect();
    if versions.is_empty() { Value::Null } else { Value::Object(versions) }
}

fn listener(it: &Listener) -> Value {
    let chains = it.chains.iter().map(|chain| {
        json!({
            "serverName": chain.server_name,
            "clientId": chain.tls.as_ref().map(|tls| &tls.client_id),
            "idleMs": chain.idle.map(|idle| idle.as_millis()),
            "protocol": match &chain.protocol {
                Protocol::Http(routes) => json!({ "http": routes.iter().map(route).collect::<Value>() }),
                Protocol::Tcp(of) => json!({ "tcp": split(of) }),
            },
        })
    });
    json!({ "address": it.address.to_string(), "chains": chains.collect::<Vec<_>>() })
}

fn route(it: &Route) -> Value {
    let matches = (!it.matches.is_all()).then(|| format!("{:?}", it.matches));
    match &it.action {
        Action::Forward { split: of, policy: how } => {
            json!({ "match": matches, "split": split(of), "mirrors": mirrors(of), "policy": policy(how) })
        }
        Action::Respond(status) => json!({ "match": matches, "status": status.as_u16() }),
    }
}

fn policy(it: &Policy) -> Value {
    let changes = |it: &HeaderChanges| {
        let write = it.write.iter().map(|(name, value, append)| {
            json!({ "name": name.as_str(), "value": String::from_utf8_lossy(value.as_bytes()), "append": append })
        });
        let remove = it.remove.iter().map(|name| name.as_str());
        json!({ "remove": remove.collect::<Vec<_>>(), "write": write.collect::<Vec<_>>() })
    };
    json!({
        "timeoutMs": it.timeout.map(|timeout| timeout.as_millis()),
        "streamIdleMs": it.stream_idle.map(|idle| idle.as_millis()),
        "retry": it.retry.as_ref().map(|retry| json!({
            "on": retry.on.iter().map(|on| format!("{on:?}")).collect::<Vec<_>>(),
            "retries": retry.retries,
            "perTryTimeoutMs": retry.per_try_timeout.map(|timeout| timeout.as_millis()),
        })),
        "fault": it.fault.as_ref().map(|fault| json!({
            "headers": (!fault.headers.is_empty()).then(|| format!("{:?}", fault.headers)),
            "delay": fault.delay.map(|(delay, share)| json!({ "ms": delay.as_millis(), "millionths": share.0 })),
            "abort": fault.abort.map(|(abort, share)| json!({ "with": format!("{abort:?}"), "millionths": share.0 })),
        })),
        "affinity": it.affinity.iter().map(|policy| match &policy.by {
            HashedBy::Header(name) => json!({ "header": name.as_str(), "terminal": policy.terminal }),
            HashedBy::Cookie { name, given } => json!({ "cookie": name, "given": given, "terminal": policy.terminal }),
        }).collect::<Vec<_>>(),
        "requestHeaders": changes(&it.request_headers),
        "responseHeaders": changes(&it.response_headers),
        "rewrite": it.rewrite.as_ref().map(|rewrite| format!("{rewrite:?}")),
        "cors": it.cors.as_ref().map(|cors| format!("{cors:?}")),
    })
}

fn split(it: &Split) -> Value {
    it.targets.iter().map(|(of, weight)| json!({ "weight": weight, "cluster": cluster(of) })).collect()
}

fn mirrors(it: &Split) -> Value {
    let one = |it: &Mirror<Arc<Cluster>>| json!({ "millionths": it.share.0, "cluster": cluster(&it.cluster) });
    it.mirrors.iter().map(one).collect()
}

fn cluster(it: &Cluster) -> Value {
    json!({
        "name": it.name,
        "upstream": match &it.upstream {
            Upstream::Endpoints(addresses) => addresses.iter().map(ToString::to_string).collect::<Value>(),
            Upstream::OriginalDst { port } => json!({ "originalDst": { "port": port } }),
        },
        "near": it.near.iter().map(ToString::to_string).collect::<Value>(),
        "protocol": match it.protocol {
            UpstreamProtocol::Downstream => "downstream",
            UpstreamProtocol::Http1 => "HTTP/1.1",
            UpstreamProtocol::Http2 => "HTTP/2",
        },
        "traffic": traffic(&it.traffic),
        "tls": it.tls.as_ref().map(|tls| json!({ "sni": tls.sni, "serverId": tls.server_id })),
    })
}

fn traffic(it: &TrafficPolicy) -> Value {
    let TrafficPolicy { limits, connections, outliers, slow_start } = it;
    json!({
        "maxConnections": limits.connections,
        "maxPendingRequests": limits.pending,
        "maxRequests": limits.requests,
        "maxRetries": limits.retries,
        "idleMs": connections.idle.map(|idle| idle.as_millis()),
        "maxConnectionMs": connections.age.map(|age| age.as_millis()),
        "maxRequestsPerConnection": connections.requests,
        "slowStart": slow_start.map(|policy| json!({ "windowMs": policy.window.as_millis(), "least": policy.least })),
        "outliers": outliers.map(|outliers| json!({
            "consecutive5xx": outliers.server_errors,
            "consecutiveGatewayFailure": outliers.gateway_errors,
            "consecutiveLocalOriginFailure": outliers.no_answers,
            "baseEjectionMs": outliers.least.as_millis(),
            "maxEjectionMs": outliers.most.as_millis(),
            "maxEjectionPercent": outliers.most_ejected,
        })),
    })
}
