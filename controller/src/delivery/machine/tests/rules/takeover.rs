use super::*;

#[test]
fn nothing_is_taken_over_before_the_finalizer_is_on() {
    let mut world = World::stepped();
    world.reconcile();
    assert_eq!(world.waiting(), "Finalizer");
    assert_eq!(actions(&world), [Action::AddFinalizer, Action::SetReplicas { replicas: 3 }]);
    assert_eq!(world.status.traffic, None);
}

#[test]
fn the_fleet_stands_in_front_of_the_targets_own_pods_before_the_service_is_touched() {
    let mut world = World::stepped();
    world.members[1].silent = true;
    world.pass_time(30);
    assert_eq!((world.status.stage, world.waiting()), (Stage::AdoptFleet, "FleetAcknowledgement"));
    assert_eq!(world.status.traffic.as_ref().unwrap().primary, Backend::original());
    assert!(world.status.waiting.as_ref().unwrap().message.contains("fleet-1"));
    assert!(!world.key && world.status.service.is_none());
}

#[test]
fn without_a_fleet_nothing_is_taken_over() {
    let mut world = World::stepped();
    world.members.clear();
    world.pass_time(30);
    assert_eq!((world.status.stage, world.waiting()), (Stage::AdoptFleet, "NoFleet"));
}

#[test]
fn the_key_is_written_after_our_slices_and_after_the_status_names_the_service() {
    let mut world = World::stepped();
    world.until("the key is written", |world| world.key);
    assert!(world.slices);
    assert_eq!(world.status.service.as_deref(), Some("podinfo"));
}

#[test]
fn the_first_revision_is_created_only_after_kube_proxys_time() {
    let mut world = World::stepped();
    world.until("the floor of time begins", |world| world.status.stage == Stage::AdoptSettle);
    let since = world.now;
    world.until("a revision is there", |world| !world.revisions.is_empty());
    assert!(world.now.duration_since(since) >= SignedDuration::from_secs(10));
}

#[test]
fn a_key_that_is_taken_away_during_kube_proxys_time_starts_it_anew() {
    let mut world = World::stepped();
    world.until("the floor of time begins", |world| world.status.stage == Stage::AdoptSettle);
    world.pass_time(5);
    world.key = false;
    world.reconcile();
    assert_eq!((world.status.stage, actions(&world)), (Stage::AdoptService, vec![Action::SetKey(true)]));
    world.until("the floor of time begins again", |world| world.status.stage == Stage::AdoptSettle);
    assert_eq!(world.status.stage_since, Some(world.now));
}

#[test]
fn a_new_controller_switches_nothing_before_it_has_heard_from_every_member() {
    let mut world = World::stepped();
    world.until("a revision is created", |world| world.status.stage == Stage::AdoptRevision);
    world.joining = true;
    world.pass_time(20);
    assert_eq!((world.status.stage, world.waiting()), (Stage::AdoptRevision, "FleetJoining"));
    world.joining = false;
    world.settle();
    assert_eq!(world.status.phase, Phase::Initialized);
}

#[test]
fn the_target_goes_to_zero_only_after_every_member_has_left_its_pods() {
    let mut world = World::stepped();
    world.until("the switch is requested", |world| world.status.stage == Stage::AdoptSwitch);
    world.members[0].silent = true;
    world.pass_time(30);
    assert_eq!(world.target.as_ref().unwrap().replicas, 3);
    assert_eq!(world.status.primary_revision, None);
    world.members[0].silent = false;
    world.until("the target rests", |world| world.target.as_ref().unwrap().replicas == 0);
    assert_eq!(world.status.primary_revision.as_deref(), Some(FIRST));
    assert_eq!(world.status.template.as_ref().unwrap().name, "podinfo");
}

#[test]
fn the_target_s_pods_get_time_for_their_open_streams() {
    let mut world = World::stepped();
    world.until("the fleet has left the target's Pods", |world| world.status.stage == Stage::AdoptRest);
    world.pass_time(29);
    assert_eq!((world.waiting(), world.target.as_ref().unwrap().replicas), ("Drain", 3));
    world.pass_time(2);
    assert_eq!(world.target.as_ref().unwrap().replicas, 0);
}

#[test]
fn an_application_installed_together_with_its_canary_is_taken_over_without_ready_pods() {
    let mut world = World::stepped();
    world.target.as_mut().unwrap().ready = 0;
    world.native = 0;
    world.service_exists = false;
    world.settle();
    assert_eq!((world.status.phase, world.desired(FIRST)), (Phase::Initialized, 3));
}

#[test]
fn a_service_that_others_serve_is_not_taken_from_them() {
    let mut world = World::stepped();
    world.target.as_mut().unwrap().ready = 0;
    world.finalizer = true;
    world.companions = true;
    world.reconcile();
    assert_eq!(world.waiting(), "TargetNotReady");
    assert_eq!(world.status.traffic, None);
}

#[test]
fn the_wish_is_the_targets_replicas_then_what_was_kept_of_them_then_the_canarys_own() {
    for (replicas, kept, own, wish) in
        [(4, None, None, 4), (0, Some(5), None, 5), (0, None, Some(6), 6), (0, None, None, 1), (4, Some(5), Some(6), 4)]
    {
        let mut world = World::stepped();
        let target = world.target.as_mut().unwrap();
        (target.replicas, target.ready, target.wish) = (replicas, replicas, kept);
        world.native = replicas;
        world.spec.replicas = own;
        world.settle();
        assert_eq!((world.desired(FIRST), world.spec.replicas), (wish, Some(wish)), "{replicas} {kept:?} {own:?}");
    }
}

#[test]
fn a_first_revision_that_does_not_come_up_leaves_the_target_serving_and_says_why() {
    let mut world = World::stepped();
    world.until("a revision is created", |world| world.status.stage == Stage::AdoptRevision);
    world.quality.insert(FIRST.into(), Quality::NeverReady);
    world.pass_time(200);
    assert_eq!(world.condition("Stalled"), "True ProgressDeadlineExceeded");
    assert!(world.status.waiting.as_ref().unwrap().message.contains("ImagePullBackOff"));
    assert_eq!(world.status.traffic.as_ref().unwrap().primary, Backend::original());
    world.apply("v2");
    world.settle();
    assert_eq!((world.status.phase, world.status.primary_revision.as_deref()), (Phase::Initialized, Some("v2")));
    assert_eq!(world.desired(FIRST), 0);
}

#[test]
fn a_broken_first_revision_goes_as_soon_as_its_template_is_mended() {
    let mut world = World::stepped();
    world.quality.insert(FIRST.into(), Quality::NeverReady);
    world.until("a revision is created", |world| world.desired(FIRST) == 3);
    world.pass_time(5);
    assert_eq!((world.desired(FIRST), actions(&world)), (3, vec![]), "the one that is waited for stays");
    // A quota may have room for one of them.
    world.apply("v2");
    world.reconcile();
    let create = Action::CreateRevision { revision: "v2".into(), replicas: 3 };
    assert_eq!((world.status.stage, actions(&world)), (Stage::AdoptRevision, vec![create, scale(FIRST, 0)]));
    world.settle();
    assert_eq!((world.status.phase, world.status.primary_revision.as_deref()), (Phase::Initialized, Some("v2")));
}

#[test]
fn no_stray_goes_while_the_fleet_is_unknown() {
    let mut world = World::stepped();
    world.quality.insert(FIRST.into(), Quality::NeverReady);
    world.until("a revision is created", |world| world.desired(FIRST) == 3);
    world.joining = true;
    world.apply("v2");
    world.pass_time(1);
    assert_eq!(world.desired(FIRST), 3);
    world.joining = false;
    world.reconcile();
    assert_eq!((world.status.stage, world.desired(FIRST)), (Stage::AdoptRevision, 0));
}

#[test]
fn a_problem_stops_the_takeover_before_anything_is_written() {
    let mut world = World::stepped();
    world.problems.push(Problem { reason: "TargetConflict", message: "Canary test/older has this target".into() });
    world.pass_time(5);
    assert_eq!(
        (world.condition("Stalled"), world.condition("Ready")),
        ("True TargetConflict".into(), "False TargetConflict".into())
    );
    assert_eq!(actions(&world), []);
    assert_eq!(world.status.traffic, None);
}

#[test]
fn a_change_that_comes_during_the_switch_is_released_afterwards() {
    let mut world = World::stepped();
    world.until("the switch is requested", |world| world.status.stage == Stage::AdoptSwitch);
    world.apply("v2");
    world.settle();
    assert_eq!((world.status.phase, world.status.primary_revision.as_deref()), (Phase::Succeeded, Some("v2")));
    assert_eq!(world.told("StepPassed"), 3);
}
