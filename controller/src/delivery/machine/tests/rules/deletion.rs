use super::*;

#[test]
fn before_anything_was_taken_over_it_lets_go_at_once() {
    let mut world = World::stepped();
    world.reconcile();
    world.deleting = true;
    world.reconcile();
    assert!(world.gone);
}

#[test]
fn the_target_serves_again_before_the_key_goes() {
    let mut world = World::adopted();
    world.deleting = true;
    world.until("the key goes", |world| !world.key);
    assert_eq!(world.target.as_ref().unwrap().ready, 3);
    // Its Pods have the labels that the Service selects.
    assert_eq!(world.desired(FIRST), 0);
    assert_eq!(world.effective().unwrap().primary, Backend::original());
    assert!(world.slices && world.status.service.is_none());
    assert_eq!(world.status.phase, Phase::Terminating);
}

#[test]
fn in_mid_release_the_canary_loses_its_traffic_and_the_target_takes_over() {
    let mut world = judging("v2");
    world.deleting = true;
    world.reconcile();
    assert_eq!((world.status.stage, world.weight()), (Stage::ReturnScale, 0));
    assert_eq!(actions(&world), [Action::CutTraffic, Action::WakeTemplate { replicas: 3 }]);
    world.settle();
    assert!(world.gone);
}

#[test]
fn a_target_that_cannot_run_leaves_the_fleet_serving_and_is_named() {
    let mut world = World::adopted();
    world.quality.insert(FIRST.into(), Quality::NeverReady);
    world.deleting = true;
    world.settle();
    assert!(!world.gone && world.key);
    assert_eq!(world.condition("Stalled"), "True TargetNotReady");
    assert_eq!(world.desired(FIRST), 3);
}

#[test]
fn in_a_terminating_namespace_it_lets_go_without_handing_back() {
    let mut world = World::adopted();
    world.namespace_terminating = true;
    world.pass_time(3);
    assert_eq!((world.gone, actions(&world)), (false, vec![]));
    world.deleting = true;
    world.reconcile();
    assert!(world.gone);
}

#[test]
fn without_a_target_it_removes_the_key_and_lets_go_and_says_so() {
    let mut world = World::adopted();
    world.target = None;
    world.deleting = true;
    world.settle();
    assert!(world.gone && !world.key);
    assert_eq!(world.told("NothingToHandBackTo"), 1);
}

#[test]
fn without_any_fleet_nobody_is_waited_for() {
    let mut world = World::adopted();
    world.members.clear();
    world.deleting = true;
    world.settle();
    assert!(world.gone);
}
