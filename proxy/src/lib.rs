//! The data plane: one binary in two roles, configured by delta ADS.
#![forbid(unsafe_code)]

pub mod access_log;
pub mod admin;
pub mod ads;
pub mod config;
pub mod controller;
pub mod cut_off;
pub mod excerpt;
pub mod failure;
#[cfg(any(test, sluice_fuzz))]
pub mod fuzz;
pub mod identity;
pub mod metrics;
pub mod outcomes;
pub mod overload;
pub mod process;
pub mod refused;
pub mod snapshot;
pub mod tls;
pub mod trace;
mod worker;
pub mod workers;
