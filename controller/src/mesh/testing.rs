//! A small shop for tests: one Canary `shop/web` with its three Services, a fleet in `sluice-system`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{collections::BTreeMap, sync::Arc};

use jiff::Timestamp;
use prost::{Message, Name};
use prost_types::Any;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sluice_xds::{
    TypeUrl,
    envoy::{
        config::{
            cluster::v3::Cluster,
            core::v3::{TransportSocket, transport_socket},
            endpoint::v3::ClusterLoadAssignment,
            listener::v3::{Listener, filter},
            route::v3::RouteConfiguration,
        },
        extensions::{
            filters::network::{
                connection_limit::v3::ConnectionLimit, http_connection_manager::v3::HttpConnectionManager,
                tcp_proxy::v3::TcpProxy,
            },
            transport_sockets::tls::v3::{DownstreamTlsContext, UpstreamTlsContext},
            upstreams::http::v3::HttpProtocolOptions,
        },
    },
    unpack,
};

use super::{Inputs, Limits, Settings, Snapshot, View, ports::Allocation, wanted_ports};
use crate::cache::CanaryKey;

pub(crate) struct Shop {
    pub(crate) canary: Value,
    pub(crate) service_port: Value,
    pub(crate) more_ports: Vec<Value>,
    pub(crate) families: Vec<&'static str>,
    pub(crate) service_uid: &'static str,
    /// `spec.trafficDistribution` of the Services.
    pub(crate) traffic_distribution: Option<&'static str>,
    /// `-primary` and `-canary` are somebody else's.
    pub(crate) foreign_companions: bool,
    pub(crate) pods: Vec<Value>,
    pub(crate) originals: Vec<Value>,
    pub(crate) limits: Limits,
}

fn read<T: DeserializeOwned>(value: &Value) -> Arc<T> {
    Arc::new(serde_json::from_value(value.clone()).unwrap())
}

pub(crate) fn pod(namespace: &str, name: &str, ip: &str, ready: bool, labels: &[(&str, &str)]) -> Value {
    let labels: BTreeMap<&str, &str> = labels.iter().copied().collect();
    json!({
        "metadata": {"namespace": namespace, "name": name, "uid": format!("{name}-uid"), "labels": labels},
        "spec": {
            "nodeName": "node-1",
            "serviceAccountName": "web",
            "containers": [{"name": "app", "ports": [{"name": "http", "containerPort": 8080}]}],
        },
        "status": {
            "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
            "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}],
        },
    })
}

impl Shop {
    pub(crate) fn new() -> Self {
        Self {
            canary: json!({
                "apiVersion": "sluice.dev/v1beta1", "kind": "Canary",
                "metadata": {"namespace": "shop", "name": "web", "uid": "canary-uid", "resourceVersion": "1"},
                "spec": {
                    "targetRef": {"kind": "Deployment", "name": "web"},
                    "service": {"port": 80, "targetPort": 8080},
                    "skipAnalysis": true,
                },
            }),
            service_port: json!({"port": 80, "name": "http", "protocol": "TCP", "targetPort": 8080}),
            more_ports: Vec::new(),
            families: vec!["IPv4"],
            service_uid: "service-uid",
            traffic_distribution: None,
            foreign_companions: false,
            pods: Vec::new(),
            originals: Vec::new(),
            limits: settings().limits,
        }
    }

    pub(crate) fn key(&self) -> CanaryKey {
        CanaryKey::new("shop", "web")
    }

    pub(crate) fn traffic(&mut self, primary: &str, canary: Option<&str>, weight: i32) {
        self.canary["status"]["traffic"] = json!({"primary": primary, "canary": canary, "weight": weight});
    }

    pub(crate) fn revision_pod(&mut self, name: &str, revision: &str, ip: &str) {
        let labels = [("sluice.dev/canary", "web"), ("sluice.dev/revision", revision)];
        self.pods.push(pod("shop", name, ip, true, &labels));
    }

    pub(crate) fn fleet_pod(&mut self, name: &str, ip: &str) {
        self.pods.push(pod("sluice-system", name, ip, true, &[("sluice.dev/fleet", "default")]));
    }

    /// The facts, with a port of the fleet for everything that wants one.
    pub(crate) fn inputs(&self) -> Inputs {
        let mut ports = vec![self.service_port.clone()];
        ports.extend(self.more_ports.iter().cloned());
        let service = |name: &str, labels: Value| {
            let mut ports = ports.clone();
            if name != "web" {
                // As delivery makes them: without Pods of their own, a target port means nothing.
                for port in &mut ports {
                    port["targetPort"] = port["port"].clone();
                }
            }
            read(&json!({
                "metadata": {"namespace": "shop", "name": name, "uid": self.service_uid, "labels": labels},
                "spec": {
                    "ports": ports, "ipFamilies": self.families, "type": "ClusterIP",
                    "trafficDistribution": self.traffic_distribution,
                },
            }))
        };
        let ours = if self.foreign_companions { json!({}) } else { json!({"sluice.dev/canary": "web"}) };
        let mut inputs = Inputs::empty(Arc::new(Settings { limits: self.limits, ..Settings::clone(&settings()) }));
        inputs.canaries = vec![read(&self.canary)];
        inputs.services =
            vec![service("web", json!({})), service("web-primary", ours.clone()), service("web-canary", ours)];
        inputs.pods = self.pods.iter().map(read).collect();
        inputs.originals.insert(self.key(), self.originals.iter().map(read).collect());
        let settled = Allocation::default().settle(&wanted_ports(&inputs).into_keys().collect(), Timestamp::UNIX_EPOCH);
        inputs.ports = settled.allocation.ports();
        inputs
    }
}

pub(crate) fn settings() -> Arc<Settings> {
    Arc::new(Settings {
        fleet_id: "spiffe://cluster.local/ns/sluice-system/sa/sluice-fleet".parse().unwrap(),
        fleet: "default".to_owned(),
        release_namespace: "sluice-system".to_owned(),
        watched_namespace: None,
        limits: Limits { connections: Some(4096), requests: Some(2048), stream_idle: Some(3600) },
    })
}

/// A `spec.service` of which the routes are too large.
pub(crate) fn too_large() -> Value {
    let values: BTreeMap<String, String> = (0..16).map(|index| (format!("x-{index}"), "v".repeat(1024))).collect();
    let all = json!({"set": values, "add": values});
    let entries = vec![json!({"uri": {"prefix": "/"}}); 16];
    json!({"port": 80, "targetPort": 8080, "match": entries, "headers": {"request": all, "response": all}})
}

/// Another order of the same facts.
pub(crate) fn shuffle(inputs: &mut Inputs, seed: u64) {
    fn rotate<T>(list: &mut [T], seed: u64) {
        if !list.is_empty() {
            let by = usize::try_from(seed % list.len() as u64).unwrap();
            list.rotate_left(by);
            if seed % 2 == 1 {
                list.reverse();
            }
        }
    }
    rotate(&mut inputs.pods, seed);
    rotate(&mut inputs.services, seed);
    rotate(&mut inputs.slices, seed);
    for pods in inputs.originals.values_mut() {
        rotate(pods, seed);
    }
}

/// For golden files: every resource in protobuf's debug form, by its name.
pub(crate) fn describe(snapshot: &Snapshot) -> BTreeMap<String, BTreeMap<String, Vec<String>>> {
    let mut views = vec![("fleet".to_owned(), &snapshot.fleet)];
    views.extend(snapshot.sidecars.iter().map(|(revision, view)| (revision.to_string(), view)));
    views.into_iter().map(|(name, view)| (name, describe_view(view))).collect()
}

fn describe_view(view: &View) -> BTreeMap<String, Vec<String>> {
    let mut described = BTreeMap::new();
    for kind in TypeUrl::ALL {
        for (name, resource) in view.of(kind) {
            let mut lines = Vec::new();
            describe_any(&resource.body, &mut lines);
            let short = kind.as_str().rsplit('.').next().unwrap_or_default();
            described.insert(format!("{short} {name}"), lines);
        }
    }
    described
}

/// The message, then the messages that it wraps.
fn describe_any(any: &Any, lines: &mut Vec<String>) {
    fn text<M: Message + Name + Default + std::fmt::Debug>(any: &Any, lines: &mut Vec<String>) -> M {
        let message: M = unpack(any).unwrap();
        let text = format!("{message:#?}");
        lines.extend(text.lines().filter(|line| said(line)).map(str::to_owned));
        message
    }
    let socket = |socket: &Option<TransportSocket>| {
        socket
            .iter()
            .flat_map(|socket| &socket.config_type)
            .map(|transport_socket::ConfigType::TypedConfig(any)| any.clone())
            .collect::<Vec<_>>()
    };
    let mut inner: Vec<Any> = Vec::new();
    match any.type_url.rsplit('.').next().unwrap_or_default() {
        "Cluster" => {
            let cluster: Cluster = text(any, lines);
            inner.extend(socket(&cluster.transport_socket));
            inner.extend(cluster.typed_extension_protocol_options.into_values());
        }
        "ClusterLoadAssignment" => drop(text::<ClusterLoadAssignment>(any, lines)),
        "RouteConfiguration" => drop(text::<RouteConfiguration>(any, lines)),
        "Listener" => {
            let listener: Listener = text(any, lines);
            for chain in listener.filter_chains {
                let filters = chain.filters.iter().flat_map(|filter| &filter.config_type);
                inner.extend(filters.map(|filter::ConfigType::TypedConfig(any)| any.clone()));
                inner.extend(socket(&chain.transport_socket));
            }
        }
        "HttpConnectionManager" => drop(text::<HttpConnectionManager>(any, lines)),
        "ConnectionLimit" => drop(text::<ConnectionLimit>(any, lines)),
        "TcpProxy" => drop(text::<TcpProxy>(any, lines)),
        "UpstreamTlsContext" => drop(text::<UpstreamTlsContext>(any, lines)),
        "DownstreamTlsContext" => drop(text::<DownstreamTlsContext>(any, lines)),
        "HttpProtocolOptions" => drop(text::<HttpProtocolOptions>(any, lines)),
        other => lines.push(format!("an unknown {other}")),
    }
    for any in inner {
        describe_any(&any, lines);
    }
}

/// Fields that are left at their defaults would drown the others; wrapped messages follow in readable form.
fn said(line: &str) -> bool {
    let line = line.trim();
    let default = [": None,", ": \"\",", ": [],", ": {},", ": false,"].iter().any(|end| line.ends_with(end));
    let byte = line.strip_suffix(',').is_some_and(|number| number.parse::<u8>().is_ok());
    !default && !byte
}
