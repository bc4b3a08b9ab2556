//! The rules, one by one.

mod at_rest;
mod deletion;
mod guarded;
mod mirrored;
mod paused_target;
mod release;
mod takeover;

use std::time::Duration;

use jiff::SignedDuration;
use serde_json::json;
use sluice_crds::{Backend, InconclusiveAction, Phase, Retiring, Stage, VerdictStatus};

use super::{
    super::{Action, Autoscaler, Problem, TARGET_PAUSED, UNSENDABLE, step},
    world::{FIRST, Quality, Running, Target, World},
};
use crate::analysis::DryRun;

fn actions(world: &World) -> Vec<Action> {
    world.outcome.as_ref().map(|outcome| outcome.actions.clone()).unwrap_or_default()
}

fn judging(revision: &str) -> World {
    let mut world = World::adopted();
    world.apply(revision);
    world.until("the first step is judged", |world| world.status.stage == Stage::Judge);
    world
}

fn scale(revision: &str, replicas: u32) -> Action {
    Action::ScaleRevision { revision: revision.into(), replicas }
}
