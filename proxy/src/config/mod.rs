//! From xDS resources to a [`Snapshot`](crate::snapshot::Snapshot).
//!
//! Each resource is parsed on its own when it arrives ([`Cluster`](cluster), [`endpoints`], [`listener`], [`route`]), so
//! that a bad one is rejected alone and its last good version serves on. [`Resources`] holds what was accepted and joins
//! it into a snapshot of everything that is complete.
//!
//! What a field that we know must not hold is rejected; fields that we do not know are ignored (gRFC A46).

mod affinity;
mod cluster;
mod cors;
mod dump;
mod endpoints;
mod error;
mod fault;
mod listener;
mod matching;
mod mirror;
mod resources;
mod rewrite;
mod route;
mod share;
mod tls;
mod traffic;

pub use dump::short_name;
pub use error::{ConfigError, Rejected};
pub use resources::{Change, Resources, Subscriptions};
