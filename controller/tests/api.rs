//! The controller's rooms against a real API server (tests/cluster/apiserver) without nodes and controllers. For delivery,
//! [`world`] plays the kubelet, the Deployment, endpoint and garbage collection controllers, and the fleet.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

#[path = "api/admission.rs"]
mod admission;
#[path = "api/adoption.rs"]
mod adoption;
#[path = "api/autoscaler.rs"]
mod autoscaler;
#[path = "api/command_line.rs"]
mod command_line;
#[path = "api/conflicts.rs"]
mod conflicts;
#[path = "api/hand_back.rs"]
mod hand_back;
#[path = "api/identity.rs"]
mod identity;
#[path = "api/keeper.rs"]
mod keeper;
#[path = "api/large.rs"]
mod large;
#[path = "api/lease.rs"]
mod lease;
#[path = "api/release.rs"]
mod release;
#[path = "api/schema.rs"]
mod schema;
#[path = "api/server.rs"]
mod server;
#[path = "api/verbs.rs"]
mod verbs;
#[path = "api/world.rs"]
mod world;
