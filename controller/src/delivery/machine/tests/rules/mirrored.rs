//! Steps in which the canary gets copies of requests.

use super::*;

fn analysis(changes: serde_json::Value) -> serde_json::Value {
    let mut analysis = json!({
        "interval": "10s", "threshold": 2, "mirror": true, "errorDeadline": "1m", "inconclusive": {"after": "1m"},
        "metrics": [{"name": "request-success-rate", "interval": "5s", "thresholdRange": {"min": 99}}],
    });
    analysis.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    analysis
}

fn world(changes: serde_json::Value) -> World {
    let mut world = World::new(analysis(changes));
    world.settle();
    world.events.clear();
    world
}

fn mirrored(changes: serde_json::Value) -> World {
    let mut world = world(changes);
    world.apply("v2");
    world.until("copies are judged", |world| world.status.stage == Stage::Judge);
    world
}

fn mirror(world: &World) -> i32 {
    world.status.traffic.as_ref().unwrap().mirror
}

#[test]
fn copies_come_first_and_nobody_is_served_by_the_canary_meanwhile() {
    let mut world = world(json!({"stepWeights": [20, 50]}));
    world.apply("v2");
    world.until("the mirror is requested", |world| world.status.stage == Stage::Shift);
    world.members[1].silent = true;
    world.pass_time(5);
    // It counts once every member has it.
    assert_eq!((world.status.stage, mirror(&world), world.status.effective_mirror), (Stage::Shift, 100, None));
    assert_eq!(world.waiting(), "FleetAcknowledgement");
    world.members[1].silent = false;
    world.until("copies are judged", |world| world.status.stage == Stage::Judge);
    assert_eq!((world.weight(), world.status.weight.as_str(), world.status.effective_mirror), (0, "0", Some(100)));
    assert_eq!(world.status.progress, "1/3 (mirror)");
    // An autoscaler does not take copies for what users need.
    let primary = format!("sluice.dev/canary={},sluice.dev/revision={FIRST}", world.spec.key.name);
    assert_eq!(world.status.selector, Some(primary));
    assert!(world.outcome.as_ref().unwrap().task.as_ref().unwrap().mirrored);
    assert!(world.events.iter().any(|event| event.reason == "WeightAcknowledged"
        && event.message == "every member of the fleet has acknowledged copies of 100 percent of the requests"));

    world.until("the first weight is judged", |world| world.status.stage == Stage::Judge && world.weight() == 20);
    assert_eq!((mirror(&world), world.status.effective_mirror, world.status.progress.as_str()), (0, None, "2/3"));
    assert!(!world.outcome.as_ref().unwrap().task.as_ref().unwrap().mirrored);
    world.settle();
    assert_eq!((world.status.phase, world.status.primary_revision.as_deref()), (Phase::Succeeded, Some("v2")));
}

#[test]
fn all_iterations_are_judged_by_copies_and_the_promotion_ends_them() {
    let mut world = world(json!({"iterations": 2, "mirrorWeight": 40}));
    world.target.as_mut().unwrap().replicas = 5;
    world.settle();
    world.apply("v2");
    // Not all of them are up when the last step passes.
    world.pods_take = 12;
    world.until("the promotion", |world| world.status.phase == Phase::Promoting);
    let steps = &world.status.plan.as_ref().unwrap().steps;
    let steps: Vec<_> = steps.iter().map(|step| (step.weight, step.mirror)).collect();
    assert_eq!(steps, [(0, 40), (0, 40)]);
    // While it comes up to full capacity, failures of copies still count.
    assert_eq!((world.weight(), mirror(&world), world.status.stage), (0, 40, Stage::PromoteScale));
    world.until("all requests", |world| world.weight() == 100);
    assert_eq!(mirror(&world), 0);
    world.settle();
    assert_eq!(world.status.phase, Phase::Succeeded);
}

#[test]
fn copies_have_the_pods_that_they_need() {
    let mut world = world(json!({"stepWeights": [5], "mirrorWeight": 50}));
    world.target.as_mut().unwrap().replicas = 6;
    world.settle();
    world.apply("v2");
    world.reconcile();
    assert!(actions(&world).contains(&Action::CreateRevision { revision: "v2".into(), replicas: 3 }));
    world.until("copies are judged", |world| world.status.stage == Stage::Judge);
    assert_eq!(world.desired("v2"), 3);
    // Somebody scales it down.
    world.revisions.get_mut("v2").unwrap().desired = Some(1);
    world.reconcile();
    assert!(actions(&world).contains(&scale("v2", 3)));
}

#[test]
fn a_mirror_is_taken_away_at_once_however_the_canary_is_taken_back() {
    type Happens = fn(&mut World);
    let table: [(Happens, &str); 5] = [
        (|world| world.revisions.get_mut("v2").unwrap().ready = 0, "NoEndpoints"),
        (|world| world.apply("v3"), "Superseded"),
        (|world| world.apply(FIRST), "Reverted"),
        (|world| world.say("abort:v2"), "Aborted"),
        (
            |world| {
                world.spec.analysis.as_mut().unwrap().threshold = 1;
                world.status.plan.as_mut().unwrap().analysis.as_mut().unwrap().threshold = 1;
                world.hear(VerdictStatus::Fail);
            },
            "ThresholdReached",
        ),
    ];
    for (happens, reason) in table {
        let mut world = mirrored(json!({"stepWeights": [20]}));
        happens(&mut world);
        world.reconcile();
        assert_eq!((world.status.stage, mirror(&world)), (Stage::RollBack, 0), "{reason}");
        assert_eq!(world.status.rollback.as_ref().unwrap().reason, reason);
        assert_eq!(actions(&world).first(), Some(&Action::CutTraffic), "{reason}");
        assert_eq!(world.status.failed_checks, i32::from(matches!(reason, "NoEndpoints" | "ThresholdReached")));
    }
    let mut world = mirrored(json!({"stepWeights": [20]}));
    world.deleting = true;
    world.reconcile();
    assert_eq!((world.status.stage, mirror(&world)), (Stage::ReturnScale, 0), "hand-back");
    assert_eq!(actions(&world).first(), Some(&Action::CutTraffic));
}

#[test]
fn a_freeze_keeps_the_mirror_and_its_end_goes_on() {
    for by_hand in [false, true] {
        let mut world = mirrored(json!({"stepWeights": [20]}));
        if by_hand {
            world.say("pause:v2");
        } else {
            world.spec.suspend = true;
        }
        world.pass_time(60);
        assert_eq!((world.status.stage, mirror(&world), world.weight()), (Stage::Judge, 100, 0));
        if by_hand {
            world.say("resume:v2");
        } else {
            world.spec.suspend = false;
        }
        world.settle();
        assert_eq!(world.status.phase, Phase::Succeeded);
    }
}

#[test]
fn without_copies_a_step_is_inconclusive_and_can_pause() {
    let mut world = world(json!({"stepWeights": [20], "inconclusive": {"after": "1m", "then": "Pause"}}));
    world.apply_with("v2", Quality::Silent);
    world.until("it pauses", |world| world.status.stage == Stage::Paused);
    world.reconcile();
    assert_eq!(mirror(&world), 100);
    let message = &world.status.waiting.as_ref().unwrap().message;
    assert!(message.contains("says Pause at copies of 100 percent of the requests"), "{message}");
}

#[test]
fn the_guard_watches_nothing_of_copies() {
    let mut world = mirrored(json!({"stepWeights": [20]}));
    let watch = world.watch.clone().expect("the release is watched from its start");
    assert_eq!((watch.weight, watch.weights), (0, 2), "20 and 100 percent are compared, copies are not");
    world.breach();
    world.pass_time(2);
    assert_eq!(world.status.stage, Stage::Judge);
}

#[test]
fn with_a_match_only_what_matches_is_copied() {
    let mut world = mirrored(json!({"stepWeights": [20], "match": [{"headers": {"x-user": {"exact": "insider"}}}]}));
    assert!(world.status.traffic.as_ref().unwrap().matches.is_some());
    assert!(
        world.events.iter().any(|event| event.message.contains("copies of 100 percent of the requests that match"))
    );
    world.settle();
    assert_eq!(world.status.phase, Phase::Succeeded);
}

#[test]
fn what_is_promoted_by_hand_in_a_mirrored_step_gets_no_copies_beside_all_requests() {
    let mut world = mirrored(json!({"stepWeights": [20]}));
    world.say("promote:v2");
    world.until("all requests", |world| world.weight() == 100);
    assert_eq!(mirror(&world), 0);
    world.settle();
    assert_eq!(world.status.phase, Phase::Succeeded);
}
