//! Whole releases, call by call.

use super::world::{Quality, World};

#[test]
fn a_good_release_from_change_to_scale_down() {
    let mut world = World::adopted();
    world.start = world.now;
    world.apply("v2");
    world.settle();
    insta::assert_snapshot!(world.trace.join("\n"));
}

#[test]
fn a_failing_release_from_change_to_scale_down() {
    let mut world = World::adopted();
    world.start = world.now;
    world.apply_with("v2", Quality::Failing);
    world.settle();
    insta::assert_snapshot!(world.trace.join("\n"));
}

#[test]
fn a_takeover_and_its_hand_back() {
    let mut world = World::stepped();
    world.settle();
    world.deleting = true;
    world.settle();
    assert!(world.gone);
    insta::assert_snapshot!(world.trace.join("\n"));
}
