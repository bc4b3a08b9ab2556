//! The data path with real sockets, servers and certificates.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod affinity;
mod collector;
mod configuration;
mod downstream_http1;
mod drain;
mod fault;
mod floods;
mod http;
mod limits;
mod mirror;
mod outliers;
mod overload;
mod policies;
mod protocols;
mod retries;
mod routing;
mod streams;
mod support;
mod tcp;
mod telemetry;
mod tenants;
mod timeouts;
mod tls;
mod trace;
mod upstream_http1;
