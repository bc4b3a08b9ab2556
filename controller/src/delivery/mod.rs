//! The rollout: spec -> plan -> steps. `machine` decides, `reconciler` observes and carries out.

pub mod actions;
pub mod autoscaler;
pub mod config;
pub mod machine;
pub mod observe;
pub mod plan;
pub mod reconciler;
pub mod revisions;
pub mod services;
pub mod spec;
pub mod status;
pub mod template;
pub mod verb;
