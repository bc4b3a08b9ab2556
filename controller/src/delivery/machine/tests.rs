//! Behaviour of the machine: sentences, golden traces, and random worlds.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod golden;
mod properties;
mod rules;
mod verbs;
mod world;
