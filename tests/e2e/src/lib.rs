//! What the demo and the end-to-end tests share: a cluster with Sluice, an application under load, and what was seen.
#![forbid(unsafe_code)]

pub mod adopted;
pub mod app;
pub mod audit;
pub mod cluster;
pub mod installation;
pub mod load;
pub mod logs;
pub mod memory;
pub mod node;
pub mod problems;
pub mod rights;
pub mod watch;
