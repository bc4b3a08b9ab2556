//! The table that is measured: a row is data.

use serde::{Deserialize, Serialize};

use crate::{
    job::{Protocol, Security},
    load::Load,
    message::Sizes,
    update::Updated,
};

/// One kind of traffic, and what is held against what.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) protocol: Protocol,
    pub(crate) to_http1: bool,
    pub(crate) downstream: Security,
    pub(crate) upstream: Security,
    pub(crate) sizes: Sizes,
    /// Of each revision.
    pub(crate) endpoints: usize,
    pub(crate) load: Load,
    /// All others are held against the first; for [`AHEAD`], ours against HAProxy.
    pub(crate) peers: &'static [Peer],
    pub(crate) figures: &'static [Figure],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) name: &'static str,
    pub(crate) proxy: Proxy,
    pub(crate) services: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Proxy {
    /// No proxy: what the machine alone takes.
    Direct,
    Envoy,
    Sluice,
    /// The whole way of a release: the fleet's proxy, mTLS, and the sidecar. CPU and memory are those of both.
    SluiceWithSidecar,
    Haproxy,
}

impl Proxy {
    pub(crate) fn is_ours(self) -> bool {
        matches!(self, Self::Sluice | Self::SluiceWithSidecar)
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Figure {
    pub(crate) what: &'static str,
    pub(crate) measure: Measure,
    pub(crate) compare: Compare,
    pub(crate) must: Option<f64>,
    pub(crate) aim: Option<f64>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Measure {
    /// Of a request, a message of a relay, or a handshake.
    Cpu,
    /// Median latency beyond that of `Direct`.
    AddedP50,
    RssIdle,
    RssLoaded,
    KibPerConnection,
    Update(fn(&Updated) -> f64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compare {
    /// The first peer's over this one's: at least so much is wanted.
    Gain,
    /// HAProxy's over ours: the same.
    GainOnHaproxy,
    /// This one's over the first peer's: at most so much.
    Share,
    /// This one's alone: at most so much.
    Itself,
}

const fn peer(name: &'static str, proxy: Proxy, services: usize) -> Peer {
    Peer { name, proxy, services }
}

pub(crate) const DIRECT: Peer = peer("direct", Proxy::Direct, 1);
const ENVOY: Peer = peer("envoy", Proxy::Envoy, 1);
const SLUICE: Peer = peer("sluice", Proxy::Sluice, 1);
const WITH_SIDECAR: Peer = peer("sluice+sidecar", Proxy::SluiceWithSidecar, 1);
const HAPROXY: Peer = peer("haproxy", Proxy::Haproxy, 1);

const fn cpu(what: &'static str, compare: Compare, must: f64, aim: Option<f64>) -> Figure {
    Figure { what, measure: Measure::Cpu, compare, must: Some(must), aim }
}

const fn at_most(what: &'static str, measure: Measure, compare: Compare, must: f64, aim: Option<f64>) -> Figure {
    Figure { what, measure, compare, must: Some(must), aim }
}

/// In rows that are about CPU, where HAProxy is a peer.
pub(crate) const AHEAD: Figure = Figure {
    what: "ahead of HAProxy: its CPU over ours",
    measure: Measure::Cpu,
    compare: Compare::GainOnHaproxy,
    must: None,
    aim: Some(1.0),
};

/// At most Envoy's.
const fn update(what: &'static str, of: fn(&Updated) -> f64) -> Figure {
    at_most(what, Measure::Update(of), Compare::Share, 1.0, None)
}

const PER_REQUEST: &str = "CPU per request";
const PER_BYTE: &str = "CPU per byte";

const SMALL: Row = Row {
    name: "",
    protocol: Protocol::Http1,
    to_http1: false,
    downstream: Security::Plaintext,
    upstream: Security::Plaintext,
    sizes: Sizes { request: 0, answer: 256 },
    endpoints: 1,
    load: Load::Saturated { connections: 64, at_once: 1 },
    peers: &[ENVOY, SLUICE, HAPROXY],
    figures: &[],
};

const SMALL_HTTP2: Row = Row {
    protocol: Protocol::Http2,
    downstream: Security::Mtls,
    load: Load::Saturated { connections: 4, at_once: 16 },
    ..SMALL
};

const BULK: Row = Row {
    sizes: Sizes { request: 1 << 20, answer: 1 << 20 },
    load: Load::Saturated { connections: 8, at_once: 1 },
    ..SMALL
};

const RELAY: Row = Row {
    sizes: Sizes { request: 64 << 10, answer: 64 << 10 },
    load: Load::Saturated { connections: 16, at_once: 1 },
    figures: &[cpu(PER_BYTE, Compare::Gain, 1.0, None), AHEAD],
    ..SMALL
};

pub(crate) const ROWS: &[Row] = &[
    Row { name: "HTTP/1.1, plaintext", figures: &[cpu(PER_REQUEST, Compare::Gain, 3.5, Some(4.5)), AHEAD], ..SMALL },
    Row {
        name: "HTTP/1.1, mTLS downstream",
        downstream: Security::Mtls,
        figures: &[
            cpu(PER_REQUEST, Compare::Gain, 3.5, Some(4.5)),
            AHEAD,
            at_most("memory, loaded", Measure::RssLoaded, Compare::Share, 0.2, Some(0.1)),
        ],
        ..SMALL
    },
    Row {
        name: "HTTP/1.1, mTLS upstream",
        upstream: Security::Mtls,
        figures: &[cpu(PER_REQUEST, Compare::Gain, 3.0, Some(4.0)), AHEAD],
        ..SMALL
    },
    Row {
        name: "HTTP/2, mTLS downstream",
        figures: &[cpu(PER_REQUEST, Compare::Gain, 2.7, Some(3.2)), AHEAD],
        ..SMALL_HTTP2
    },
    Row {
        name: "HTTP/2, mTLS downstream, to HTTP/1.1",
        to_http1: true,
        figures: &[cpu(PER_REQUEST, Compare::Gain, 2.3, None), AHEAD],
        ..SMALL_HTTP2
    },
    Row {
        name: "gRPC unary, mTLS downstream",
        protocol: Protocol::Grpc,
        sizes: Sizes { request: 100, answer: 256 },
        figures: &[cpu(PER_REQUEST, Compare::Gain, 2.7, Some(3.2)), AHEAD],
        ..SMALL_HTTP2
    },
    Row {
        name: "1 MiB both ways, HTTP/1.1, plaintext",
        figures: &[cpu(PER_BYTE, Compare::Gain, 1.0, None), AHEAD],
        ..BULK
    },
    Row {
        name: "1 MiB both ways, HTTP/2, mTLS downstream",
        protocol: Protocol::Http2,
        downstream: Security::Mtls,
        load: Load::Saturated { connections: 2, at_once: 4 },
        figures: &[cpu(PER_BYTE, Compare::Gain, 1.0, None), AHEAD],
        ..BULK
    },
    Row { name: "WebSocket, messages of 64 KiB", protocol: Protocol::WebSocket, ..RELAY },
    Row { name: "TCP, messages of 64 KiB", protocol: Protocol::Tcp, ..RELAY },
    Row {
        name: "a release's whole way, plaintext",
        peers: &[ENVOY, WITH_SIDECAR],
        figures: &[cpu("CPU of fleet and sidecar, share of one Envoy's", Compare::Share, 1.0, Some(0.5))],
        ..SMALL
    },
    Row {
        name: "a release's whole way, mTLS downstream",
        downstream: Security::Mtls,
        peers: &[ENVOY, WITH_SIDECAR],
        figures: &[cpu("CPU of fleet and sidecar, share of one Envoy's", Compare::Share, 1.0, Some(0.5))],
        ..SMALL
    },
    Row {
        name: "1,000 requests/s, HTTP/1.1, plaintext",
        load: Load::Open { rate: 1000 },
        peers: &[ENVOY, SLUICE, HAPROXY, DIRECT],
        figures: &[at_most(
            "added median latency, share of Envoy's",
            Measure::AddedP50,
            Compare::Share,
            0.7,
            Some(0.5),
        )],
        ..SMALL
    },
    Row {
        name: "idle connections, HTTP/1.1, mTLS",
        downstream: Security::Mtls,
        load: Load::Idle { connections: [250, 1250] },
        figures: &[
            at_most("memory, idle", Measure::RssIdle, Compare::Share, 0.2, Some(0.1)),
            at_most("KiB per connection", Measure::KibPerConnection, Compare::Itself, 26.0, Some(16.0)),
        ],
        ..SMALL
    },
    Row {
        name: "idle connections, HTTP/2, mTLS",
        load: Load::Idle { connections: [250, 1250] },
        figures: &[at_most("KiB per connection", Measure::KibPerConnection, Compare::Itself, 30.0, Some(24.0))],
        ..SMALL_HTTP2
    },
    Row {
        name: "full mTLS handshakes, one request each",
        downstream: Security::Mtls,
        load: Load::Handshakes { at_once: 16 },
        figures: &[cpu("CPU per connection", Compare::Gain, 1.2, Some(1.4)), AHEAD],
        ..SMALL
    },
    Row {
        name: "1,000 services of 10 endpoints, 10 routes each, against 1",
        endpoints: 10,
        peers: &[peer("sluice, 1", Proxy::Sluice, 1), peer("sluice, 1000", Proxy::Sluice, 1000)],
        figures: &[cpu("CPU per request, share of that with 1 service", Compare::Share, 1.1, None)],
        ..SMALL
    },
    Row {
        name: "1,000 services of 10 endpoints, 10 routes each, against 1: Envoy",
        endpoints: 10,
        peers: &[peer("envoy, 1", Proxy::Envoy, 1), peer("envoy, 1000", Proxy::Envoy, 1000)],
        figures: &[Figure {
            what: "CPU per request, share of that with 1 service",
            measure: Measure::Cpu,
            compare: Compare::Share,
            must: None,
            aim: None,
        }],
        ..SMALL
    },
    Row {
        name: "updates of 1,000 services of 10 endpoints, 10 routes each",
        upstream: Security::Mtls,
        endpoints: 10,
        load: Load::Updates { small: 100 },
        peers: &[peer("envoy", Proxy::Envoy, 1000), peer("sluice", Proxy::Sluice, 1000)],
        figures: &[
            update("full update: time, share of Envoy's", |it| it.full_seconds),
            update("full update: CPU", |it| it.full_cpu_seconds),
            update("full update: memory", |it| it.full_kib - it.empty_kib),
            update("full update: peak of memory", |it| it.peak_kib - it.empty_kib),
            update("change of one weight: time until acknowledged", |it| it.weights_acknowledged_seconds),
            update("change of one weight: time until a request shows it", |it| it.weights_effective_seconds),
            update("change of one endpoint: time until acknowledged", |it| it.endpoints_acknowledged_seconds),
            update("small change: CPU", |it| it.small_cpu_seconds),
            update("memory after the small changes", |it| it.small_kib - it.empty_kib),
        ],
        ..SMALL
    },
];
