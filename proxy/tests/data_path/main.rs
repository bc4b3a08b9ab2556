//! The data path with real sockets, servers and certificates.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod configuration;
mod downstream_http1;
mod drain;
mod http;
mod limits;
mod outliers;
mod policies;
mod retries;
mod support;
mod tcp;
mod timeouts;
mod tls;
mod upstream_http1;
