//! The control side of the proxy against real servers on loopback: an ADS server and a certificate service whose every
//! answer the test decides.

#![allow(clippy::unwrap_used, clippy::expect_used)]
// Tests join whole clients, and count what they are told without a bound.
#![allow(clippy::large_futures, clippy::disallowed_methods)]

mod ads;
mod binary;
mod clusters;
#[path = "../data_path/collector.rs"]
mod collector;
mod identity;
mod outcomes;
mod pki;
mod policies;
mod resources;
mod routes;
mod server;
mod snapshots;
mod streams;
mod tenants;
