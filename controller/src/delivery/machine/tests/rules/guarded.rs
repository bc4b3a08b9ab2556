use super::*;

#[test]
fn a_breach_takes_the_canary_back_in_one_call_and_counts_no_failed_check() {
    let mut world = judging("v2");
    world.breach();
    world.reconcile();
    assert_eq!((world.status.stage, world.weight(), world.status.failed_checks), (Stage::RollBack, 0, 0));
    assert_eq!(actions(&world).first(), Some(&Action::CutTraffic));
    assert_eq!(world.watch, None);
    let found = world.status.guard.clone().unwrap();
    assert_eq!((found.canary.bad, found.primary.requests, found.weight), (9, 66, 10));
    world.settle();
    assert_eq!((world.status.phase, world.status.rejected_revision.as_deref()), (Phase::Failed, Some("v2")));
    let rollback = world.status.rollback.as_ref().unwrap();
    assert_eq!(rollback.reason, "GuardBreached");
    assert_eq!(
        rollback.message,
        "at 10 percent, 9 of 17 (52.94 %) of the canary's requests failed within 0.3 s, and 0 of 66 (0 %) of the primary's; \
         5 points more than the primary's are allowed. A canary within that looks so bad in at most one of 12345 releases"
    );
    assert_eq!(world.told("GuardBreached"), 1);
    assert_eq!(world.condition("Promoted"), "False GuardBreached");

    // The next release begins without it.
    world.apply("v3");
    world.until("the first step is judged", |world| world.status.stage == Stage::Judge);
    assert_eq!(world.status.guard, None);
}

#[test]
fn a_breach_takes_back_what_is_suspended_or_paused() {
    for by_hand in [false, true] {
        let mut world = judging("v2");
        if by_hand {
            world.say("pause:v2");
        } else {
            world.spec.suspend = true;
        }
        world.pass_time(3);
        world.breach();
        world.reconcile();
        assert_eq!((world.status.stage, world.weight()), (Stage::RollBack, 0));
    }
}

#[test]
fn a_breach_counts_while_the_next_step_is_prepared_and_in_promotion() {
    for stage in [Stage::Scale, Stage::PromoteScale] {
        let mut world = World::new(json!({
            "interval": "10s", "stepWeights": [10, 60],
            "metrics": [{"name": "request-success-rate", "interval": "5s", "thresholdRange": {"min": 99}}],
        }));
        world.settle();
        world.pods_take = 20;
        world.apply("v2");
        world.until("it waits for more Pods", |world| world.status.stage == stage && world.weight() > 0);
        world.breach();
        world.reconcile();
        assert_eq!((world.status.stage, world.weight()), (Stage::RollBack, 0), "{stage:?}");
    }
}

#[test]
fn a_breach_of_another_release_counts_for_nothing() {
    let mut world = judging("v2");
    world.breach();
    world.breach.as_mut().unwrap().release.started_at -= SignedDuration::from_secs(60);
    world.pass_time(3);
    assert_eq!(world.status.stage, Stage::Judge);
    world.breach();
    world.breach.as_mut().unwrap().release.revision = "v0".into();
    world.pass_time(3);
    assert_eq!(world.status.stage, Stage::Judge);
}

#[test]
fn what_is_not_judged_is_not_watched() {
    let mut world = World::adopted();
    assert_eq!(world.watch, None);
    world.spec.skip_analysis = true;
    world.pods_take = 5;
    world.apply("v2");
    world.until("it is under way", |world| world.status.stage == Stage::PromoteScale);
    assert_eq!(world.watch, None);
    world.settle();

    let mut world = judging("v2");
    assert!(world.watch.is_some());
    world.pods_take = 5;
    world.say("promote:v2");
    world.until("it is promoted by hand", |world| world.status.stage == Stage::PromoteScale);
    assert_eq!(world.watch, None);
    world.settle();
    assert_eq!((world.status.phase, world.watch.clone()), (Phase::Succeeded, None));
}

#[test]
fn the_guard_is_watching_before_the_first_weight_and_knows_what_the_gates_allow() {
    let guarded = |guard: serde_json::Value, min: f64| {
        let mut world = World::new(json!({
            "interval": "10s", "stepWeights": [10, 50], "guard": guard,
            "metrics": [
                {"name": "request-success-rate", "interval": "5s", "thresholdRange": {"min": min}},
                {"name": "request-duration", "interval": "5s", "thresholdRange": {"max": 500}},
            ],
        }));
        world.settle();
        world.apply("v2");
        world.reconcile();
        assert_eq!(world.status.stage, Stage::Scale);
        world.watch
    };
    let watch = guarded(json!({}), 99.0).unwrap();
    assert_eq!((watch.weight, watch.weights, watch.error_margin), (0, 3, 5.0));
    assert_eq!((watch.primary.as_str(), watch.release.revision.as_str()), (FIRST, "v2"));
    let latency = watch.latency.unwrap();
    assert_eq!((latency.slow_above, latency.margin), (500.0, 10.0));

    let watch = guarded(json!({"errorMargin": 3, "latencyMargin": 40}), 90.0).unwrap();
    assert_eq!((watch.error_margin, watch.latency.unwrap().margin), (10.0, 40.0), "no stricter than the gate");
    assert_eq!(guarded(json!({"enabled": false}), 99.0), None);
}

#[test]
fn without_a_gate_for_it_no_request_is_slow() {
    assert_eq!(judging("v2").watch.unwrap().latency, None);
}
