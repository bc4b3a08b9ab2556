use super::*;

#[test]
fn the_dry_run_comes_before_any_pod() {
    let mut world = World::adopted();
    world.dry_run = None;
    world.apply("v2");
    world.pass_time(5);
    assert_eq!((world.status.phase, world.waiting()), (Phase::Waiting, "DryRun"));
    assert!(!world.revisions.contains_key("v2"));
    world.dry_run = Some(DryRun::from([("request-success-rate".into(), "parse error".into())]));
    world.settle();
    assert_eq!(world.condition("Stalled"), "True InvalidMetric");
    assert!(!world.revisions.contains_key("v2"));
    world.dry_run = Some(DryRun::new());
    world.settle();
    assert_eq!(world.status.phase, Phase::Succeeded);
}

#[test]
fn no_weight_before_the_capacity_that_it_needs() {
    let mut world = World::new(json!({
        "interval": "10s", "stepWeights": [50],
        "metrics": [{"name": "request-success-rate", "interval": "5s", "thresholdRange": {"min": 99}}],
    }));
    world.target.as_mut().unwrap().replicas = 4;
    world.settle();
    world.apply("v2");
    world.reconcile();
    assert_eq!(actions(&world), [Action::CreateRevision { revision: "v2".into(), replicas: 2 }]);
    world.until("a Pod is ready", |world| world.revisions["v2"].ready == 1);
    world.reconcile();
    assert_eq!((world.weight(), world.waiting()), (0, "Capacity"));
    world.until("both are ready", |world| world.revisions["v2"].ready == 2);
    world.reconcile();
    assert_eq!(world.weight(), 50);
}

#[test]
fn a_revision_that_never_comes_up_is_rolled_back_with_its_trouble() {
    let mut world = World::adopted();
    world.apply_with("v2", Quality::NeverReady);
    world.settle();
    assert_eq!((world.status.phase, world.status.rejected_revision.as_deref()), (Phase::Failed, Some("v2")));
    let rollback = world.status.rollback.as_ref().unwrap();
    assert_eq!(rollback.reason, "ProgressDeadlineExceeded");
    assert!(rollback.message.contains("ImagePullBackOff"), "{}", rollback.message);
    assert_eq!(world.told("StepStarted"), 0);
}

#[test]
fn a_time_without_any_leader_does_not_count_against_a_version() {
    let mut world = World::adopted();
    world.pods_take = 30;
    world.apply("v2");
    world.until("the canary starts", |world| world.waiting() == "Capacity");
    // The API server is away for longer than the progress deadline; then somebody leads again.
    world.now += SignedDuration::from_mins(10);
    world.leading_since = Some(world.now);
    world.reconcile();
    assert_eq!((world.status.phase, world.waiting()), (Phase::Progressing, "Capacity"));
    world.settle();
    assert_eq!(world.status.phase, Phase::Succeeded);
}

#[test]
fn a_time_without_any_leader_is_no_silence_of_a_step() {
    for before in [VerdictStatus::Pass, VerdictStatus::Inconclusive, VerdictStatus::Error] {
        let mut world = judging("v2");
        world.reports = false;
        world.pass_time(6);
        world.hear(before);
        world.reconcile();
        // For longer than inconclusive.after and errorDeadline; then somebody leads who has heard nothing yet.
        world.now += SignedDuration::from_mins(30);
        world.leading_since = Some(world.now);
        world.report = None;
        world.reconcile();
        assert_eq!(world.status.stage, Stage::Judge, "{before:?}");
        world.hear(before);
        world.reconcile();
        assert!(world.status.rollback.is_none(), "{before:?}");
        world.reports = true;
        world.settle();
        assert_eq!(world.status.phase, Phase::Succeeded, "{before:?}");
    }
}

#[test]
fn times_of_a_leader_whose_clock_was_ahead_hold_nothing_up() {
    let ahead = SignedDuration::from_hours(1);
    let mut world = judging("v2");
    world.quality.insert("v2".into(), Quality::Failing);
    let status = &mut world.status;
    (status.acknowledged_at, status.stage_since) = (Some(world.now + ahead), Some(world.now + ahead));
    status.last_failure_at = Some(world.now + ahead);
    world.pass_time(30);
    assert_eq!((world.status.phase, world.weight()), (Phase::Failed, 0));
    let rolled_back = world.status.rollback.as_ref().unwrap();
    assert_eq!(rolled_back.reason, "ThresholdReached");

    let mut world = World::adopted();
    world.apply_with("v2", Quality::NeverReady);
    world.until("Pods are waited for", |world| world.waiting() == "Capacity");
    world.status.stage_since = Some(world.now + ahead);
    world.pass_time(121);
    assert_eq!(world.status.rollback.as_ref().unwrap().reason, "ProgressDeadlineExceeded");
    world.status.retiring[0].scale_down_at = world.now + ahead;
    world.pass_time(61);
    assert_eq!(world.desired("v2"), 0);

    for verdict in [VerdictStatus::Inconclusive, VerdictStatus::Error] {
        let mut world = judging("v2");
        world.pass_time(6);
        let quality = if verdict == VerdictStatus::Error { Quality::Unmeasurable } else { Quality::Silent };
        world.quality.insert("v2".into(), quality);
        world.pass_time(10);
        world.status.inconclusive_since = Some(world.now + ahead);
        world.status.error_since = Some(world.now + ahead);
        world.pass_time(75);
        assert!(world.status.rollback.is_some(), "{verdict:?}");
    }
}

#[test]
fn what_was_heard_before_is_no_silence_when_somebody_else_measures() {
    let mut world = judging("v2");
    world.reports = false;
    for _ in 0..120 {
        world.pass_time(10);
        world.hear(VerdictStatus::Pass);
        world.report.as_mut().unwrap().whole = false;
    }
    assert_eq!(world.status.stage, Stage::Judge, "passes so far, on windows that began anew all the time");
    world.report = None;
    world.pass_time(30);
    assert_eq!((world.status.stage, &world.status.rollback), (Stage::Judge, &None));
}

#[test]
fn a_step_lasts_its_interval_although_it_passes_from_the_start() {
    let mut world = judging("v2");
    let since = world.status.acknowledged_at.unwrap();
    world.until("the next step", |world| world.status.step == Some(1));
    assert!(world.now.duration_since(since) >= SignedDuration::from_secs(10));
}

#[test]
fn the_next_steps_pods_start_in_the_second_half_of_a_step_that_passes_so_far() {
    let judging = || {
        let mut world = World::new(json!({
            "interval": "10s", "threshold": 2, "stepWeights": [10, 50],
            "metrics": [{"name": "request-success-rate", "interval": "5s", "thresholdRange": {"min": 99}}],
        }));
        world.settle();
        world.apply("v2");
        world.until("the first step is judged", |world| world.status.stage == Stage::Judge);
        world
    };
    let mut world = judging();
    let since = world.status.acknowledged_at.unwrap();
    world.until("they start", |world| world.desired("v2") > 1);
    assert_eq!((world.desired("v2"), world.status.step, world.status.stage), (2, Some(0), Stage::Judge));
    assert!(world.now.duration_since(since) >= SignedDuration::from_secs(5));
    world.until("the next step", |world| world.status.step == Some(1));
    world.reconcile();
    assert_eq!(world.weight(), 50, "nothing to wait for");

    for verdict in [VerdictStatus::Fail, VerdictStatus::Inconclusive] {
        let mut world = judging();
        world.reports = false;
        world.pass_time(6);
        world.hear(verdict);
        world.pass_time(3);
        assert_eq!((world.desired("v2"), world.status.step), (1, Some(0)), "{verdict:?}");
    }
}

#[test]
fn a_pass_from_before_the_end_of_the_interval_does_not_end_the_step() {
    let mut world = judging("v2");
    world.pass_time(6);
    assert_eq!(world.status.summary, "request-success-rate 99.98 >= 99 pass");
    world.reports = false;
    world.pass_time(10);
    assert_eq!(world.status.step, Some(0));
    world.hear(VerdictStatus::Pass);
    world.reconcile();
    assert_eq!(world.status.step, Some(1));
}

#[test]
fn a_pass_of_another_step_or_release_counts_for_nothing() {
    let mut world = judging("v2");
    world.pass_time(5);
    world.reports = false;
    for change in [0, 1] {
        world.hear(VerdictStatus::Pass);
        let report = world.report.as_mut().unwrap();
        if change == 0 {
            report.step.index = 1;
        } else {
            report.step.started_at -= SignedDuration::from_secs(60);
        }
        report.at += SignedDuration::from_secs(10);
        world.pass_time(10);
        assert_eq!(world.status.step, Some(0));
    }
}

#[test]
fn a_pass_that_is_not_on_whole_windows_is_no_pass() {
    let mut world = judging("v2");
    world.reports = false;
    world.pass_time(12);
    world.hear(VerdictStatus::Pass);
    world.report.as_mut().unwrap().whole = false;
    world.reconcile();
    assert_eq!(world.status.step, Some(0));
    world.hear(VerdictStatus::Pass);
    world.reconcile();
    assert_eq!(world.status.step, Some(1));
}

#[test]
fn the_first_failure_counts_at_once_and_further_ones_once_in_an_interval() {
    let mut world = judging("v2");
    world.spec.analysis.as_mut().unwrap().threshold = 1;
    world.reports = false;
    world.tick();
    world.hear(VerdictStatus::Fail);
    world.reconcile();
    assert_eq!(world.status.failed_checks, 1, "the plan is frozen: its threshold is still 2");
    for _ in 0..9 {
        world.tick();
        world.hear(VerdictStatus::Fail);
        world.reconcile();
        assert_eq!((world.status.failed_checks, world.status.stage), (1, Stage::Judge));
    }
    world.tick();
    world.hear(VerdictStatus::Fail);
    world.reconcile();
    assert_eq!((world.status.failed_checks, world.status.stage), (2, Stage::RollBack));
    assert_eq!((world.weight(), actions(&world).first()), (0, Some(&Action::CutTraffic)));
}

#[test]
fn a_failure_below_the_threshold_holds_the_step_until_it_passes() {
    let mut world = judging("v2");
    world.reports = false;
    world.pass_time(10);
    world.hear(VerdictStatus::Fail);
    world.pass_time(3);
    assert_eq!((world.waiting(), world.status.step), ("GateFails", Some(0)));
    world.reports = true;
    world.until("the next step", |world| world.status.step == Some(1));
    assert_eq!(world.status.failed_checks, 1);
}

/// The first step, of 10 percent, has passed; the second one waits for its Pods.
fn waiting_for_capacity(threshold: u32) -> World {
    let mut world = World::new(json!({
        "interval": "10s", "threshold": threshold, "stepWeights": [10, 90],
        "metrics": [{"name": "request-success-rate", "interval": "5s", "thresholdRange": {"min": 99}}],
    }));
    world.settle();
    world.pods_take = 20;
    world.apply("v2");
    world.until("the second step is prepared", |world| {
        world.status.stage == Stage::Scale && world.status.step == Some(1)
    });
    world
}

#[test]
fn failures_count_while_the_next_step_waits_for_capacity() {
    let mut world = waiting_for_capacity(1);
    assert_eq!(world.weight(), 10);
    world.tick();
    world.hear(VerdictStatus::Fail);
    world.reconcile();
    assert_eq!((world.status.stage, world.weight()), (Stage::RollBack, 0));
}

#[test]
fn no_weight_rises_while_a_gate_fails_although_the_step_before_has_passed() {
    let mut world = waiting_for_capacity(3);
    world.reports = false;
    world.tick();
    world.hear(VerdictStatus::Fail);
    world.reconcile();
    // The Pods come.
    world.pods_take = 1;
    world.pass_time(8);
    assert_eq!((world.status.stage, world.weight(), world.waiting()), (Stage::Scale, 10, "GateFails"));
    world.reports = true;
    world.settle();
    assert_eq!((world.status.phase, world.status.failed_checks), (Phase::Succeeded, 1));
}

#[test]
fn a_rollback_is_claimed_only_when_every_member_has_acknowledged_it() {
    let mut world = judging("v2");
    world.quality.insert("v2".into(), Quality::Failing);
    world.until("weight 0 is requested", |world| world.status.stage == Stage::RollBack);
    world.members[1].silent = true;
    world.pass_time(90);
    assert_eq!((world.status.phase, world.status.stage), (Phase::Progressing, Stage::RollBack));
    assert_eq!(
        (world.status.weight.as_str(), world.status.lagging_members.as_slice()),
        ("Unknown", &["fleet-1".to_owned()][..])
    );
    assert_eq!((world.desired("v2"), actions(&world)), (1, vec![Action::CutTraffic]));
    world.members[1].silent = false;
    world.until("it is claimed", |world| world.status.phase == Phase::Failed);
    let claimed = world.now;
    world.until("it is scaled down", |world| world.desired("v2") == 0);
    assert!(world.now.duration_since(claimed) >= SignedDuration::from_secs(30), "streams are given time to end");
    assert_eq!(
        (world.condition("Stalled"), world.condition("Promoted")),
        ("True RolledBack".into(), "False ThresholdReached".into())
    );
}

#[test]
fn a_rejected_revision_is_not_tried_again_although_its_template_went_and_came_back() {
    let mut world = World::adopted();
    world.apply_with("v2", Quality::Failing);
    world.settle();
    world.target.as_mut().unwrap().generation += 1;
    world.settle();
    assert_eq!((world.status.phase, world.told("ReleaseStarted")), (Phase::Failed, 1));
    world.apply(FIRST);
    world.settle();
    assert_eq!((world.status.phase, world.condition("Ready")), (Phase::Initialized, "True Initialized".into()));
    world.apply_with("v2", Quality::Good);
    world.settle();
    assert_eq!(
        (world.status.phase, world.told("ReleaseStarted"), world.told("RevisionRejected")),
        (Phase::Failed, 1, 1)
    );
    assert_eq!(
        (world.condition("Stalled"), world.condition("Promoted")),
        ("True RolledBack".into(), "False ThresholdReached".into())
    );
    world.apply("v3");
    world.settle();
    assert_eq!((world.status.phase, world.told("StepPassed")), (Phase::Succeeded, 3));
    world.apply("v2");
    world.settle();
    assert_eq!((world.status.phase, world.status.primary_revision.as_deref()), (Phase::Failed, Some("v3")));
}

#[test]
fn too_few_samples_for_too_long_roll_back() {
    let mut world = World::adopted();
    world.apply_with("v2", Quality::Silent);
    world.settle();
    assert_eq!(world.status.rollback.as_ref().unwrap().reason, "Inconclusive");
}

#[test]
fn an_analysis_that_says_nothing_at_all_rolls_back_too() {
    let mut world = World::adopted();
    world.reports = false;
    world.apply("v2");
    world.settle();
    assert_eq!(world.status.rollback.as_ref().unwrap().reason, "Inconclusive");
}

#[test]
fn too_few_samples_pause_where_the_analysis_says_so_and_failures_still_count() {
    let mut world = World::adopted();
    world.spec.analysis.as_mut().unwrap().inconclusive.then = InconclusiveAction::Pause;
    world.apply_with("v2", Quality::Silent);
    world.until("it pauses", |world| world.status.stage == Stage::Paused);
    world.pass_time(100);
    assert_eq!(
        (world.status.stage, world.weight(), world.condition("Stalled")),
        (Stage::Paused, 10, "True Paused".into())
    );
    let mut failing = world.clone();
    failing.quality.insert("v2".into(), Quality::Failing);
    failing.settle();
    assert_eq!(failing.status.phase, Phase::Failed);
    // A person decides: the step is judged anew.
    world.quality.insert("v2".into(), Quality::Good);
    world.pass_time(100);
    assert_eq!(world.status.stage, Stage::Paused);
    world.spec.suspend = true;
    world.pass_time(5);
    world.spec.suspend = false;
    world.settle();
    assert_eq!(world.status.phase, Phase::Succeeded);
}

#[test]
fn a_metrics_server_out_of_reach_holds_and_rolls_back_only_after_its_deadline() {
    let mut world = World::adopted();
    world.apply_with("v2", Quality::Unmeasurable);
    world.until("it cannot be asked", |world| world.waiting() == "MetricsUnavailable");
    let mut back = world.clone();
    back.pass_time(40);
    back.quality.insert("v2".into(), Quality::Good);
    back.settle();
    assert_eq!(back.status.phase, Phase::Succeeded);
    world.settle();
    assert_eq!(world.status.rollback.as_ref().unwrap().reason, "MetricsUnavailable");
    assert_eq!(world.status.failed_checks, 0);
}

#[test]
fn without_gates_steps_pass_by_time_and_one_warning_says_so() {
    let mut world = World::new(json!({"interval": "10s", "stepWeight": 50}));
    world.settle();
    world.apply("v2");
    world.settle();
    assert_eq!((world.status.phase, world.told("NoGates"), world.told("StepPassed")), (Phase::Succeeded, 1, 2));
}

#[test]
fn iterations_are_judged_at_weight_zero_and_then_all_traffic_moves() {
    let mut world = World::new(json!({
        "interval": "10s", "iterations": 3,
        "metrics": [{"name": "request-success-rate", "interval": "5s", "thresholdRange": {"min": 99}}],
    }));
    world.settle();
    world.pods_take = 20;
    world.apply("v2");
    world.until("every iteration passed", |world| world.status.phase == Phase::Promoting);
    assert_eq!((world.weight(), world.told("StepPassed")), (0, 3));
    world.settle();
    assert_eq!(world.status.primary_revision.as_deref(), Some("v2"));
}

#[test]
fn what_matches_is_judged_alone_and_all_requests_come_only_with_the_promotion() {
    let mut world = World::new(json!({
        "interval": "10s", "iterations": 3, "match": [{"headers": {"x-user": {"exact": "insider"}}}],
        "metrics": [{"name": "request-success-rate", "interval": "5s", "thresholdRange": {"min": 99}}],
    }));
    world.settle();
    world.pods_take = 20;
    world.apply("v2");
    let matched = |world: &World| world.status.traffic.as_ref().unwrap().matches.is_some();
    world.until("all that matches goes to the canary", |world| world.status.stage == Stage::Judge);
    assert!((world.weight(), matched(&world)) == (100, true));
    world.until("the last iteration", |world| world.told("StepPassed") == 2 && world.status.stage == Stage::Judge);
    assert!((world.weight(), matched(&world)) == (100, true));
    world.until("everything goes to the canary", |world| world.status.stage == Stage::PromoteShift);
    assert!((world.weight(), matched(&world), world.told("StepPassed")) == (100, false, 3));
    world.settle();
    assert_eq!((world.status.primary_revision.as_deref(), matched(&world)), (Some("v2"), false));
}

#[test]
fn what_matches_goes_back_when_the_canary_is_bad() {
    let mut world = World::new(json!({
        "interval": "10s", "stepWeights": [50, 100], "match": [{"headers": {"x-user": {}}}],
        "metrics": [{"name": "request-success-rate", "interval": "5s", "thresholdRange": {"min": 99}}],
    }));
    world.settle();
    world.apply_with("v2", Quality::Failing);
    world.settle();
    assert_eq!((world.status.phase, world.weight()), (Phase::Failed, 0));
    assert_eq!(world.status.traffic.as_ref().unwrap().matches, None);
}

#[test]
fn skip_analysis_is_one_unjudged_move_at_full_capacity() {
    let mut world = World::adopted();
    world.spec.skip_analysis = true;
    world.dry_run = None;
    world.apply_with("v2", Quality::Failing);
    world.reconcile();
    assert_eq!(actions(&world), [Action::CreateRevision { revision: "v2".into(), replicas: 3 }]);
    world.settle();
    assert_eq!((world.status.primary_revision.as_deref(), world.told("StepPassed")), (Some("v2"), 0));
    assert_eq!(world.status.plan.as_ref().unwrap().unjudged.as_deref(), Some("SkipAnalysis"));
}

#[test]
fn the_way_back_to_a_promoted_revision_is_unjudged_and_fast() {
    let mut world = World::adopted();
    world.apply("v2");
    world.until("it is promoted", |world| world.status.phase == Phase::Succeeded);
    world.reconcile();
    world.apply(FIRST);
    world.reconcile();
    assert_eq!(actions(&world), [], "the old revision is still warm");
    let changed = world.now;
    world.until("it is back", |world| world.status.primary_revision.as_deref() == Some(FIRST));
    assert!(world.now.duration_since(changed) <= SignedDuration::from_secs(4));
    assert_eq!(world.status.plan.as_ref().unwrap().unjudged.as_deref(), Some("Rollback"));
    world.settle();
    assert_eq!((world.desired(FIRST), world.desired("v2")), (3, 0));
}

#[test]
fn roles_are_swapped_at_full_capacity_and_the_old_revision_stays_warm_for_a_while() {
    let mut world = World::adopted();
    world.apply("v2");
    world.until("all traffic is requested", |world| world.weight() == 100);
    assert_eq!(world.revisions["v2"].ready, 3);
    world.until("it is promoted", |world| world.status.phase == Phase::Succeeded);
    let promoted = world.now;
    assert_eq!(world.desired(FIRST), 3);
    world.until("the old one is scaled down", |world| world.desired(FIRST) == 0);
    assert!(world.now.duration_since(promoted) >= SignedDuration::from_secs(60));
    assert!(world.revisions["v2"].promoted);
}

#[test]
fn an_old_revision_that_a_member_may_still_use_is_not_scaled_down_in_its_time() {
    let mut world = World::adopted();
    world.apply("v2");
    world.until("it is promoted", |world| world.status.phase == Phase::Succeeded);
    world.members[0].silent = true;
    world.pass_time(300);
    assert_eq!(world.desired(FIRST), 3);
    world.members[0].silent = false;
    world.settle();
    assert_eq!(world.desired(FIRST), 0);
}

#[test]
fn a_new_change_in_mid_release_starts_at_step_one_after_the_unfinished_one_is_at_zero() {
    let mut world = judging("v2");
    world
        .until("the second step is judged", |world| world.status.step == Some(1) && world.status.stage == Stage::Judge);
    world.apply("v3");
    world.reconcile();
    assert_eq!((world.status.stage, world.weight()), (Stage::RollBack, 0));
    assert!(!world.revisions.contains_key("v3"));
    world.until("the newer one starts", |world| world.status.canary_revision.as_deref() == Some("v3"));
    assert_eq!((world.status.step, world.status.rejected_revision.as_deref()), (Some(0), None));
    world.settle();
    assert_eq!(world.status.primary_revision.as_deref(), Some("v3"));
    assert_eq!(world.desired("v2"), 0);
}

#[test]
fn a_revert_ends_the_release_at_once_and_rejects_nothing() {
    let mut world = judging("v2");
    world.apply(FIRST);
    world.reconcile();
    assert_eq!((world.status.stage, world.weight()), (Stage::RollBack, 0));
    world.settle();
    assert_eq!((world.status.phase, world.status.rejected_revision.as_deref()), (Phase::Initialized, None));
    assert_eq!(world.status.rollback.as_ref().unwrap().reason, "Reverted");
    assert_eq!(
        (world.condition("Ready"), world.condition("Promoted")),
        ("True Initialized".into(), "True Initialized".into())
    );
    world.apply("v2");
    world.settle();
    assert_eq!(world.status.phase, Phase::Succeeded);
}

#[test]
fn a_canary_without_endpoints_loses_its_traffic_at_once_although_suspended() {
    for suspend in [false, true] {
        let mut world = judging("v2");
        world.spec.suspend = suspend;
        world.revisions.get_mut("v2").unwrap().ready = 0;
        world.reconcile();
        assert_eq!((world.status.stage, world.weight(), world.status.failed_checks), (Stage::RollBack, 0, 1));
        assert_eq!(actions(&world).first(), Some(&Action::CutTraffic));
        world.until("it is claimed", |world| world.status.phase == Phase::Failed);
    }
}

#[test]
fn suspend_freezes_raises_and_new_releases_and_lets_go_on_afterwards() {
    let mut world = judging("v2");
    world.spec.suspend = true;
    world.pass_time(600);
    assert_eq!((world.weight(), world.status.step, world.waiting()), (10, Some(0), "Suspended"));
    let mut failing = world.clone();
    failing.quality.insert("v2".into(), Quality::Failing);
    failing.settle();
    assert_eq!((failing.weight(), failing.status.phase), (0, Phase::Failed));
    world.now += SignedDuration::from_hours(2);
    world.spec.suspend = false;
    world.settle();
    assert_eq!(world.status.phase, Phase::Succeeded);
    world.spec.suspend = true;
    world.apply("v3");
    world.settle();
    assert_eq!((world.status.phase, world.waiting()), (Phase::Waiting, "Suspended"));
    assert!(!world.revisions.contains_key("v3"));
}

#[test]
fn suspend_holds_every_kind_of_raise() {
    let without_gates = || World::new(json!({"interval": "10s", "stepWeights": [50]}));
    for stage in [Stage::Scale, Stage::Judge, Stage::PromoteScale] {
        let mut world = without_gates();
        world.settle();
        world.pods_take = 20;
        world.apply("v2");
        world.until("the stage is reached", |world| world.status.stage == stage);
        let weight = world.weight();
        world.spec.suspend = true;
        world.pass_time(60);
        assert_eq!((world.weight(), world.waiting()), (weight, "Suspended"), "{stage:?}");
        world.spec.suspend = false;
        world.settle();
        assert_eq!(world.status.phase, Phase::Succeeded, "{stage:?}");
    }
}

#[test]
fn a_long_suspension_is_no_silence_of_the_analysis() {
    let mut world = judging("v2");
    world.spec.suspend = true;
    world.reports = false;
    world.report = None;
    world.settle();
    world.now += SignedDuration::from_hours(2);
    world.spec.suspend = false;
    world.pass_time(5);
    assert_eq!((world.status.stage, world.weight()), (Stage::Judge, 10));
    world.reports = true;
    world.settle();
    assert_eq!(world.status.phase, Phase::Succeeded);
}

#[test]
fn a_release_holds_while_the_primary_is_short_of_pods_but_not_for_ever() {
    let mut world = World::adopted();
    world.apply("v2");
    world.reconcile();
    world.revisions.get_mut(FIRST).unwrap().dead = true;
    let hold = |world: &mut World| {
        world.revisions.get_mut(FIRST).unwrap().ready = 2;
        world.reconcile();
        world.tick();
    };
    for _ in 0..20 {
        hold(&mut world);
    }
    assert_eq!((world.weight(), world.waiting()), (0, "PrimaryNotReady"));
    for _ in 0..120 {
        hold(&mut world);
    }
    assert!(world.weight() > 0);
}

#[test]
fn the_plan_is_frozen_when_the_release_starts() {
    let mut world = judging("v2");
    world.spec.analysis.as_mut().unwrap().step_weight = Some(1);
    world.spec.analysis.as_mut().unwrap().metrics.clear();
    world.settle();
    assert_eq!(world.told("StepPassed"), 3);
    assert_eq!(world.told("NoGates"), 0);
}

#[test]
fn the_wish_only_rises_during_a_release() {
    let mut world = judging("v2");
    world.spec.replicas = Some(1);
    world.pass_time(2);
    assert_eq!(world.desired(FIRST), 3);
    world.spec.replicas = Some(30);
    world.reconcile();
    assert_eq!(actions(&world), [scale(FIRST, 30), scale("v2", 3)]);
    world.spec.replicas = Some(1);
    world.settle();
    assert_eq!((world.status.primary_revision.as_deref(), world.desired("v2")), (Some("v2"), 1));
}

#[test]
fn a_configuration_that_a_member_rejects_ends_the_release_after_its_deadline() {
    let mut world = World::adopted();
    world.apply("v2");
    world.until("a weight is requested", |world| world.weight() == 10);
    world.rejects = Some("fleet-0: route test/podinfo:80: no cluster".into());
    world.pass_time(5);
    assert_eq!((world.status.stage, world.waiting()), (Stage::Shift, "ConfigurationRejected"));
    world.pass_time(130);
    assert_eq!(world.status.rollback.as_ref().unwrap().reason, "ConfigurationRejected");
}

#[test]
fn a_problem_in_mid_release_holds_it_and_a_failure_still_rolls_back() {
    let mut world = judging("v2");
    world.problems.push(Problem { reason: "InvalidSpec", message: "mend it".into() });
    world.pass_time(30);
    assert_eq!((world.weight(), world.condition("Stalled")), (10, "True InvalidSpec".into()));
    world.quality.insert("v2".into(), Quality::Failing);
    world.settle();
    assert_eq!(world.weight(), 0);
}

#[test]
fn what_is_measured_is_the_step_that_was_acknowledged() {
    let world = judging("v2");
    let task = world.outcome.as_ref().unwrap().task.clone().unwrap();
    assert_eq!((task.step.index, task.weight, task.canary_revision.as_str()), (0, 10, "v2"));
    assert_eq!((task.primary_revision.as_str(), task.canary.name.as_str()), (FIRST, "podinfo"));
    assert_eq!(Some(task.acknowledged_at), world.status.acknowledged_at);
    assert_eq!(task.members, ["fleet-0", "fleet-1"]);
}

#[test]
fn the_gates_are_said_in_one_line() {
    let mut world = judging("v2");
    world.pass_time(6);
    assert_eq!(world.status.summary, "request-success-rate 99.98 >= 99 pass");
    world.hear(VerdictStatus::Inconclusive);
    world.reconcile();
    assert_eq!(world.status.summary, "request-success-rate no value >= 99 inconclusive");
}
