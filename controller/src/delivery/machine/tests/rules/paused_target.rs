//! The target's owner holds its changes back: `kubectl rollout pause`.

use super::*;

fn paused() -> Problem {
    Problem { reason: TARGET_PAUSED, message: "Deployment podinfo is paused".into() }
}

#[test]
fn a_paused_target_holds_its_takeover() {
    let mut world = World::stepped();
    world.problems.push(paused());
    world.pass_time(5);
    assert_eq!((world.condition("Stalled"), actions(&world)), ("True TargetPaused".into(), vec![]));
    assert_eq!(world.status.traffic, None);
    world.problems.clear();
    world.settle();
    assert_eq!(world.status.phase, Phase::Initialized);
}

#[test]
fn a_target_that_is_paused_while_nothing_is_new_holds_nothing() {
    let mut world = World::adopted();
    world.problems.push(paused());
    world.settle();
    assert_eq!(world.condition("Ready"), "True Initialized");
    // What is ours is kept all the same.
    world.companions = false;
    world.finalizer = false;
    world.reconcile();
    assert_eq!(actions(&world), [Action::AddFinalizer]);
    world.settle();
    assert!(world.companions && world.finalizer);
}

#[test]
fn a_change_of_a_paused_target_waits_until_it_is_resumed() {
    let mut world = World::adopted();
    world.problems.push(paused());
    world.apply("v2");
    world.settle();
    assert_eq!((world.status.phase, world.condition("Stalled")), (Phase::Waiting, "True TargetPaused".into()));
    assert!(!world.revisions.contains_key("v2"));
    world.problems.clear();
    world.settle();
    assert_eq!((world.status.phase, world.status.primary_revision.as_deref()), (Phase::Succeeded, Some("v2")));
}

#[test]
fn a_release_whose_target_is_paused_stays_at_its_weight_and_is_judged() {
    for quality in [Quality::Good, Quality::Failing] {
        let mut world = judging("v2");
        world.problems.push(paused());
        world.pass_time(60);
        assert_eq!((world.weight(), world.status.step), (10, Some(0)), "it passes, and nothing rises");
        assert_eq!(world.condition("Stalled"), "True TargetPaused");
        world.quality.insert("v2".into(), quality);
        if quality == Quality::Good {
            world.problems.clear();
        }
        world.settle();
        let (phase, primary) = if quality == Quality::Good { (Phase::Succeeded, "v2") } else { (Phase::Failed, FIRST) };
        assert_eq!((world.status.phase, world.status.primary_revision.as_deref()), (phase, Some(primary)));
    }
}

/// While Pods come up: no deadline counts, and each has its whole time afterwards.
#[test]
fn a_release_that_is_held_while_its_pods_come_up_does_not_end_by_the_progress_deadline() {
    for hold in [Hold::TargetPaused, Hold::TargetGone] {
        let mut world = World::adopted();
        world.pods_take = 60;
        world.apply("v2");
        world.until("its Pods are awaited", |world| world.status.stage == Stage::Scale);
        let target = world.target.clone();
        match hold {
            Hold::TargetPaused => world.problems.push(paused()),
            Hold::TargetGone => world.target = None,
        }
        world.pass_time(usize::try_from(world.spec.progress_deadline.as_secs()).unwrap() + 60);
        // One of its Pods is lost, and comes again.
        world.revisions.get_mut("v2").unwrap().ready = 0;
        world.pass_time(5);
        assert_eq!((world.status.stage, world.status.rejected_revisions.len()), (Stage::Scale, 0), "{hold:?}");
        world.problems.clear();
        world.target = target;
        world.settle();
        assert_eq!(
            (world.status.phase, world.status.primary_revision.as_deref()),
            (Phase::Succeeded, Some("v2")),
            "{hold:?}"
        );
    }
}

#[derive(Clone, Copy, Debug)]
enum Hold {
    TargetPaused,
    TargetGone,
}

#[test]
fn a_paused_target_does_not_stand_in_the_way_back() {
    let mut world = World::adopted();
    world.apply("v2");
    world.settle();
    world.problems.push(paused());
    world.say("rollback:v1");
    world.settle();
    assert_eq!(world.status.primary_revision.as_deref(), Some(FIRST));
}
