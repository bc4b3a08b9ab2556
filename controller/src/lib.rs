//! The control plane of Sluice. Rooms that meet only through the types in their doorways; ARCHITECTURE.md is the map.
#![forbid(unsafe_code)]

pub mod admission;
pub mod ads;
pub mod analysis;
pub mod cache;
pub mod delivery;
pub mod guard;
pub mod identity;
pub mod lease;
pub mod mesh;
pub mod notify;
pub mod settings;
pub mod web;
