use sluice_crds::ActionOutcome;

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
fn a_hand_back_of_which_the_fleet_is_told_nothing_says_why() {
    let mut world = World::adopted();
    world.problems.push(Problem { reason: UNSENDABLE, message: "say less".into() });
    world.withheld = true;
    world.deleting = true;
    world.pass_time(60);
    assert_eq!((world.status.stage, world.waiting()), (Stage::ReturnSwitch, UNSENDABLE));
    world.problems.clear();
    world.withheld = false;
    world.settle();
    assert!(world.gone);
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

#[test]
fn without_its_service_nobody_is_waited_for_and_open_streams_have_their_time() {
    let mut world = judging("v2");
    (world.service_exists, world.key) = (false, false);
    world.deleting = true;
    world.until("the target's own Pods run", |world| world.status.stage == Stage::ReturnService);
    world.pass_time(29);
    assert_eq!((world.waiting(), world.desired(FIRST)), ("Drain", 3));
    world.settle();
    assert!(world.gone);
    assert_eq!(world.target.as_ref().map(|target| (target.replicas, target.ready)), Some((3, 3)));
}

#[test]
fn a_service_that_goes_while_the_fleet_is_waited_for_ends_the_waiting_unless_a_further_one_is_left() {
    let mut world = World::adopted();
    world.members[0].silent = true;
    world.deleting = true;
    world.pass_time(60);
    assert_eq!((world.status.stage, world.waiting()), (Stage::ReturnSwitch, "FleetAcknowledgement"));
    let mut further = world.observe();
    further.service.exists = false;
    let outcome = step(&world.spec, &world.status, &further, world.now);
    assert_eq!(outcome.status.stage, Stage::ReturnSwitch);
    (world.service_exists, world.key) = (false, false);
    world.settle();
    assert!(world.gone);
}

#[test]
fn while_a_target_cannot_run_a_canary_without_a_service_is_not_cut_again_and_again() {
    let mut world = judging("v2");
    world.quality.insert("v2".into(), Quality::NeverReady);
    (world.service_exists, world.key) = (false, false);
    world.deleting = true;
    world.settle();
    assert_eq!((world.status.stage, world.weight(), actions(&world)), (Stage::ReturnScale, 0, vec![]));
}

#[test]
fn a_key_that_git_puts_back_at_the_last_moment_goes_again_before_anything_of_ours_does() {
    let handed_back = || {
        let mut world = World::adopted();
        world.deleting = true;
        world.until("kube-proxy follows", |world| world.status.stage == Stage::ReturnSettle);
        world
    };
    let mut world = handed_back();
    world.key = true;
    world.pass_time(30);
    assert!(world.gone && !world.key);

    let mut world = handed_back();
    world.native = 0;
    world.now += SignedDuration::from_secs(30);
    world.reconcile();
    assert_eq!((world.gone, world.waiting()), (false, "NativeEndpoints"));
    world.settle();
    assert!(world.gone);
}

#[test]
fn replicas_that_the_targets_owner_wishes_for_at_the_last_moment_are_what_it_gets() {
    for wish in [2, 5] {
        let mut world = World::adopted();
        world.target.as_mut().unwrap().wish = Some(wish);
        world.deleting = true;
        world.settle();
        assert!(world.gone);
        assert_eq!(world.target.as_ref().map(|target| (target.replicas, target.ready)), Some((wish, wish)));
    }
    // One that was taken over before does not undo what the Canary was scaled to since.
    let mut world = World::adopted();
    world.spec.replicas = Some(4);
    world.deleting = true;
    world.settle();
    assert_eq!(world.target.as_ref().map(|target| target.replicas), Some(4));
}

#[test]
fn endpoints_that_a_service_cannot_have_are_not_waited_for_and_that_is_told() {
    let mut world = World::adopted();
    world.selects = false;
    world.deleting = true;
    world.settle();
    assert!(world.gone && !world.key);
    assert_eq!(world.told("ServiceNotHandedBack"), 1);
}

#[test]
fn uninstalling_hands_back_lets_go_and_says_so_and_a_later_installation_takes_over_again() {
    let mut world = World::adopted();
    world.uninstalling = true;
    world.until("it is handed back", |world| !world.finalizer);
    assert!(!world.key && world.status.service.is_none() && world.revisions.is_empty());
    assert_eq!(world.target.as_ref().map(|target| (target.replicas, target.wish)), Some((3, None)));
    assert_eq!(
        (world.status.phase, world.status.traffic.as_ref(), world.waiting()),
        (Phase::Terminated, None, "Uninstall")
    );
    assert_eq!(world.condition("Ready"), "False Terminated");
    assert_eq!(world.condition("Reconciling"), "False Terminated");
    // Nothing more happens to it, and nothing new is taken over.
    world.pass_time(3);
    let writes = world.writes;
    world.pass_time(60);
    assert_eq!((world.writes, world.finalizer, actions(&world)), (writes, false, vec![]));

    world.uninstalling = false;
    world.settle();
    assert_eq!((world.status.phase, world.status.primary_revision.as_deref()), (Phase::Initialized, Some(FIRST)));
    assert!(world.key && world.finalizer);
}

#[test]
fn a_hand_back_that_has_begun_is_carried_to_its_end_even_if_the_installation_stays() {
    let mut world = World::adopted();
    world.uninstalling = true;
    world.until("the target's own Pods serve", |world| world.status.stage == Stage::ReturnService);
    world.uninstalling = false;
    world.until("it is handed back", |world| !world.finalizer);
    assert!(!world.key);
    world.settle();
    assert_eq!(world.status.phase, Phase::Initialized);
}

#[test]
fn a_release_comes_to_its_end_before_sluice_is_uninstalled() {
    let mut world = judging("v2");
    world.uninstalling = true;
    world.until("it is promoted", |world| world.status.primary_revision.as_deref() == Some("v2"));
    world.until("it is handed back", |world| !world.finalizer);
    assert_eq!(world.told("HandBackStarted"), 1);
}

#[test]
fn a_hash_that_drifts_with_the_cluster_holds_up_no_hand_back() {
    let mut world = World::adopted();
    world.hash_drifts = true;
    world.target.as_mut().unwrap().revision = "drifted".into();
    world.pass_time(5);
    world.uninstalling = true;
    world.until("it is handed back", |world| !world.finalizer);
}

#[test]
fn a_rejected_version_is_never_handed_back_to_by_uninstalling() {
    let mut world = judging("v2");
    world.quality.insert("v2".into(), Quality::Failing);
    world.uninstalling = true;
    world.pass_time(600);
    assert_eq!((world.status.phase, world.key, world.finalizer), (Phase::Failed, true, true));
    world.apply(FIRST);
    world.until("it is handed back", |world| !world.finalizer);
}

#[test]
fn without_a_target_uninstalling_leaves_the_fleet_serving() {
    let mut world = World::adopted();
    world.target = None;
    world.uninstalling = true;
    world.pass_time(60);
    assert_eq!((world.key, world.finalizer, world.desired(FIRST)), (true, true, 3));
}

#[test]
fn a_target_that_cannot_run_goes_back_to_rest_when_the_installation_stays() {
    let mut world = World::adopted();
    world.quality.insert(FIRST.into(), Quality::NeverReady);
    world.uninstalling = true;
    world.pass_time(300);
    assert_eq!((world.status.stage, world.condition("Stalled").as_str()), (Stage::ReturnScale, "True TargetNotReady"));
    world.uninstalling = false;
    world.settle();
    assert_eq!((world.status.phase, world.status.primary_revision.as_deref()), (Phase::Initialized, Some(FIRST)));
    assert_eq!(world.target.as_ref().map(|target| target.replicas), Some(0));
    assert_eq!(world.desired(FIRST), 3);
}

#[test]
fn what_was_said_by_hand_before_a_hand_back_is_not_done_once_more() {
    let mut world = World::adopted();
    world.say("rollback:v0");
    world.reconcile();
    world.uninstalling = true;
    world.until("it is handed back", |world| !world.finalizer);
    world.action = None;
    world.uninstalling = false;
    world.settle();
    world.say("rollback:v0");
    world.reconcile();
    assert_eq!(world.status.action.as_ref().map(|action| action.outcome), Some(ActionOutcome::Repeated));
}

#[test]
fn nothing_is_taken_over_while_sluice_is_being_uninstalled() {
    let mut world = World::stepped();
    world.uninstalling = true;
    world.pass_time(30);
    assert_eq!((world.status.phase, world.finalizer, world.companions), (Phase::Terminated, false, false));
    world.uninstalling = false;
    world.settle();
    assert_eq!(world.status.phase, Phase::Initialized);
}
