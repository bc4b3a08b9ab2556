//! What people say by hand, and the ways back.

use jiff::SignedDuration;
use sluice_crds::{ActionOutcome, InconclusiveAction, Phase, Stage};

use super::{
    super::{Action, Problem, UNSENDABLE},
    world::{FIRST, Quality, World},
};

fn actions(world: &World) -> Vec<Action> {
    world.outcome.as_ref().map(|outcome| outcome.actions.clone()).unwrap_or_default()
}

/// v2 is judged at 10 percent.
fn judging() -> World {
    let mut world = World::adopted();
    world.apply("v2");
    world.until("the first step is judged", |world| world.status.stage == Stage::Judge);
    world
}

/// v1, then v2, were promoted.
fn twice_promoted() -> World {
    let mut world = World::adopted();
    world.apply("v2");
    world.settle();
    assert_eq!(world.status.primary_revision.as_deref(), Some("v2"));
    world.events.clear();
    world
}

/// v2 was rolled back.
fn failed() -> World {
    let mut world = World::adopted();
    world.apply_with("v2", Quality::Failing);
    world.settle();
    assert_eq!(world.status.phase, Phase::Failed);
    world.events.clear();
    world
}

fn accepted(world: &mut World, value: &str) {
    world.say(value);
    world.reconcile();
    assert_eq!(world.answer().0, ActionOutcome::Accepted, "{}", world.answer().1);
}

fn refused(world: &mut World, value: &str, words: &str) {
    let before = world.status.clone();
    world.say(value);
    world.reconcile();
    let (outcome, message) = world.answer();
    assert_eq!(outcome, ActionOutcome::Refused, "{value}: {message}");
    assert!(message.contains(words), "{value} should say {words:?}, and says {message:?}");
    assert_eq!(world.status.stage, before.stage, "{value} changes nothing");
    assert_eq!(world.status.traffic, before.traffic, "{value} changes nothing");
    assert_eq!(world.status.rejected_revisions, before.rejected_revisions, "{value} changes nothing");
}

mod annotation {
    use super::*;

    #[test]
    fn what_makes_no_sense_is_refused_with_a_reason_and_changes_nothing() {
        type Case = (fn() -> World, &'static str, &'static str);
        let cases: [Case; 25] = [
            (judging, "promote", "promote:REVISION"),
            (judging, "hurry:v2", "write promote, abort, retry, pause, resume or rollback"),
            (judging, "promote:v9", "is not under way: that is revision v2"),
            (judging, "promote:v1", "serves already"),
            (judging, "abort:v1", "serves already"),
            (judging, "pause:v1", "serves already"),
            (judging, "resume:v2", "is not paused"),
            (judging, "retry:v2", "only a rejected revision is retried"),
            (
                judging,
                "rollback:v1",
                "serves already. To end the release: kubectl annotate --overwrite -n test canary/podinfo sluice.dev/action=abort:v2",
            ),
            (judging, "rollback:v2", "none that was promoted and is kept; none is kept"),
            (World::adopted, "promote:v2", "is not under way; revision v1 serves"),
            (World::adopted, "abort:v1", "serves already"),
            (World::adopted, "retry:v1", "only a rejected revision is retried"),
            (World::adopted, "pause:v1", "serves already"),
            (World::adopted, "resume:v1", "is not paused"),
            (World::adopted, "rollback:v1", "serves already"),
            (
                twice_promoted,
                "abort:v2",
                "To go back: kubectl annotate --overwrite -n test canary/podinfo sluice.dev/action=rollback:v1",
            ),
            (twice_promoted, "rollback:v7", "none that was promoted and is kept; these are kept: v1"),
            (twice_promoted, "promote:v1", "is not under way; revision v2 serves"),
            (
                failed,
                "promote:v2",
                "was rejected (ThresholdReached). To analyse it again: kubectl annotate --overwrite -n test canary/podinfo sluice.dev/action=retry:v2",
            ),
            (failed, "abort:v2", "was rejected"),
            (failed, "pause:v2", "was rejected"),
            (failed, "retry:v1", "serves already"),
            (failed, "rollback:v2", "none that was promoted"),
            (World::stepped, "promote:v1", "still being taken over"),
        ];
        for (world, value, words) in cases {
            let mut world = world();
            world.reconcile();
            refused(&mut world, value, words);
            assert_eq!(world.told("ActionRefused"), 1, "{value}");
        }
    }

    #[test]
    fn a_value_that_stays_is_handled_once() {
        let mut world = judging();
        refused(&mut world, "promote:v3", "not under way");
        let writes = world.status.action.clone();
        world.apply("v3");
        world.until("v3 is judged", |world| {
            world.status.stage == Stage::Judge && world.status.canary_revision.as_deref() == Some("v3")
        });
        world.pass_time(3);
        assert_eq!((&world.status.action, world.weight()), (&writes, 10), "it was said of another release");
        world.action = None;
        world.reconcile();
        assert_eq!(world.status.action, None);
    }

    #[test]
    fn a_promotion_kept_in_git_does_not_promote_a_later_release_of_the_same_revision() {
        let mut world = judging();
        world.say("promote:v2");
        // It comes to nothing: no Pod stays.
        world.reconcile();
        world.revisions.get_mut("v2").unwrap().dead = true;
        world.tick();
        world.until("it is taken back", |world| world.status.phase == Phase::Failed);
        world.revisions.get_mut("v2").unwrap().dead = false;
        accepted(&mut world, "retry:v2");
        world.tick();
        // Git is applied again.
        world.say("promote:v2");
        world.reconcile();
        let (outcome, message) = world.answer();
        assert_eq!(outcome, ActionOutcome::Repeated);
        assert!(message.ends_with("sluice.dev/action=promote:v2:2"), "{message}");
        world.until("it is judged", |world| world.status.stage == Stage::Judge);
        world.pass_time(5);
        assert_eq!((world.weight(), world.status.plan.as_ref().unwrap().unjudged.as_deref()), (10, None));
        accepted(&mut world, "promote:v2:2");
        assert_eq!(world.status.phase, Phase::Promoting);
    }

    #[test]
    fn a_value_counts_once_also_when_the_annotation_was_removed_in_between() {
        let mut world = failed();
        accepted(&mut world, "retry:v2");
        world.settle();
        assert_eq!(world.status.phase, Phase::Failed);
        world.action = None;
        world.reconcile();
        world.say("retry:v2");
        world.settle();
        assert_eq!((world.answer().0, world.told("ReleaseStarted")), (ActionOutcome::Repeated, 1));
        accepted(&mut world, "retry:v2:after the database was mended");
        world.settle();
        assert_eq!(world.told("ReleaseStarted"), 2);
    }

    #[test]
    fn what_was_said_is_recorded_with_the_time_and_the_generation() {
        let mut world = judging();
        accepted(&mut world, " abort : v2 : jane ");
        let handled = world.status.action.clone().unwrap();
        assert_eq!((handled.value.as_str(), handled.revision.as_deref()), ("abort : v2 : jane", Some("v2")));
        assert_eq!((handled.handled_at, handled.observed_generation), (world.now, world.spec.generation));
        assert_eq!(world.status.handled_actions, ["abort : v2 : jane"]);
    }

    #[test]
    fn an_empty_annotation_is_none() {
        let mut world = judging();
        world.say("  ");
        world.reconcile();
        assert_eq!((world.status.action.as_ref(), world.told("ActionRefused")), (None, 0));
    }

    #[test]
    fn a_canary_that_is_deleted_takes_no_orders() {
        let mut world = judging();
        world.deleting = true;
        world.say("promote:v2");
        world.reconcile();
        assert_eq!((world.answer().0, world.weight()), (ActionOutcome::Refused, 0));
        world.settle();
        assert!(world.gone);
    }

    #[test]
    fn only_so_many_values_are_remembered() {
        let mut world = judging();
        for note in 0..100 {
            world.say(&format!("retry:v2:{note}"));
            world.reconcile();
        }
        assert_eq!(world.status.handled_actions.len(), 32);
        assert_eq!(world.status.handled_actions.last().map(String::as_str), Some("retry:v2:99"));
        let long = "x".repeat(4000);
        refused(&mut world, &format!("promote:v2:{long}"), "more than 253 bytes");
    }
}

mod promote {
    use super::*;

    #[test]
    fn the_rest_of_the_analysis_is_skipped_but_not_the_capacity() {
        let mut world = judging();
        accepted(&mut world, "promote:v2");
        assert_eq!(
            (world.status.stage, world.status.phase, world.weight()),
            (Stage::PromoteScale, Phase::Promoting, 10)
        );
        assert_eq!(actions(&world), [Action::ScaleRevision { revision: "v2".into(), replicas: 3 }]);
        assert_eq!(world.outcome.as_ref().unwrap().task, None, "nothing is measured any more");
        world.until("all requests go there", |world| world.weight() == 100);
        assert_eq!(world.revisions["v2"].ready, 3);
        world.settle();
        assert_eq!((world.status.primary_revision.as_deref(), world.told("StepPassed")), (Some("v2"), 0));
        let plan = world.status.plan.as_ref().unwrap();
        assert_eq!((plan.unjudged.as_deref(), plan.action.as_deref()), (Some("ManualPromotion"), Some("promote:v2")));
        assert_eq!(
            (world.condition("Promoted"), world.condition("Ready")),
            ("True ManualPromotion".into(), "True Succeeded".into())
        );
        assert!(world.revisions["v2"].promoted);
    }

    #[test]
    fn a_promoted_canary_that_fails_its_gates_goes_on_and_one_that_loses_its_endpoints_does_not() {
        let mut world = judging();
        world.quality.insert("v2".into(), Quality::Failing);
        let mut lost = world.clone();
        accepted(&mut world, "promote:v2");
        world.settle();
        assert_eq!(world.status.phase, Phase::Succeeded);
        accepted(&mut lost, "promote:v2");
        lost.revisions.get_mut("v2").unwrap().ready = 0;
        lost.reconcile();
        assert_eq!((lost.status.stage, lost.weight()), (Stage::RollBack, 0));
    }

    #[test]
    fn a_failure_that_is_seen_first_counts_more_than_a_promotion() {
        let mut world = judging();
        world.quality.insert("v2".into(), Quality::Failing);
        world.until("one more failure is enough", |world| world.status.failed_checks == 1);
        world.until("it is measured again", |world| {
            world.report.as_ref().is_some_and(|report| {
                report.at >= world.status.last_failure_at.unwrap() + SignedDuration::from_secs(10)
            })
        });
        world.say("promote:v2");
        world.reconcile();
        assert_eq!((world.status.stage, world.answer().0), (Stage::RollBack, ActionOutcome::Refused));
        assert!(world.answer().1.contains("being taken back"), "{}", world.answer().1);
    }

    #[test]
    fn a_release_that_has_not_begun_is_started_without_analysis() {
        let mut world = World::adopted();
        world.dry_run = None;
        world.apply("v2");
        world.pass_time(5);
        assert_eq!(world.waiting(), "DryRun");
        accepted(&mut world, "promote:v2");
        assert_eq!(world.status.stage, Stage::PromoteScale);
        world.settle();
        assert_eq!(world.condition("Promoted"), "True ManualPromotion");
    }

    #[test]
    fn it_works_while_paused_and_ends_the_pause() {
        for paused_by_hand in [true, false] {
            let mut world = World::adopted();
            if paused_by_hand {
                world.apply("v2");
                world.until("it is judged", |world| world.status.stage == Stage::Judge);
                accepted(&mut world, "pause:v2");
                world.pass_time(100);
            } else {
                world.spec.analysis.as_mut().unwrap().inconclusive.then = InconclusiveAction::Pause;
                world.apply_with("v2", Quality::Silent);
                world.until("it pauses", |world| world.status.stage == Stage::Paused);
            }
            accepted(&mut world, "promote:v2");
            world.settle();
            assert_eq!((world.status.phase, world.status.paused.as_ref()), (Phase::Succeeded, None));
        }
    }

    #[test]
    fn no_approval_lies_about_until_a_suspension_ends() {
        let mut world = judging();
        world.spec.suspend = true;
        refused(&mut world, "promote:v2", "spec.suspend is true");
        let mut back = twice_promoted();
        back.spec.suspend = true;
        refused(&mut back, "rollback:v1", "spec.suspend is true");
        world.spec.suspend = false;
        world.pass_time(3);
        assert_eq!(world.weight(), 10);
    }

    #[test]
    fn a_new_template_before_it_has_begun_is_not_what_was_approved() {
        let mut world = World::adopted();
        world.dry_run = None;
        world.apply("v2");
        world.reconcile();
        // The fleet is not at rest, so that the release waits.
        world.joining = true;
        accepted(&mut world, "promote:v2");
        assert!(world.status.pending_release.is_some());
        world.apply("v3");
        world.joining = false;
        world.reconcile();
        assert_eq!((world.status.pending_release.as_ref(), world.waiting()), (None, "DryRun"));
    }
}

mod abort {
    use super::*;

    #[test]
    fn the_weight_is_zero_at_once_and_the_revision_is_not_started_again() {
        let mut world = judging();
        accepted(&mut world, "abort:v2");
        assert_eq!(
            (world.status.stage, world.weight(), actions(&world).first()),
            (Stage::RollBack, 0, Some(&Action::CutTraffic))
        );
        assert_eq!((world.told("Aborted"), world.condition("Promoted")), (1, "False Aborted".into()));
        world.settle();
        assert_eq!((world.status.phase, world.desired("v2")), (Phase::Failed, 0));
        assert_eq!(
            (world.condition("Stalled"), world.condition("Promoted"), world.condition("Ready")),
            ("True Aborted".into(), "False Aborted".into(), "False Aborted".into())
        );
        world.target.as_mut().unwrap().generation += 1;
        world.settle();
        assert_eq!(world.told("ReleaseStarted"), 1);
    }

    #[test]
    fn it_works_while_suspended_paused_or_short_of_everything() {
        let mut world = judging();
        accepted(&mut world, "pause:v2");
        world.spec.suspend = true;
        world.problems.push(Problem { reason: "TargetConflict", message: "mend it".into() });
        world.joining = true;
        world.target = None;
        accepted(&mut world, "abort:v2");
        assert_eq!((world.weight(), actions(&world).first()), (0, Some(&Action::CutTraffic)));
        assert_eq!(world.status.paused, None);
    }

    #[test]
    fn a_release_that_has_not_begun_does_not_begin() {
        let mut world = World::adopted();
        world.dry_run = None;
        world.apply("v2");
        world.reconcile();
        accepted(&mut world, "abort:v2");
        world.dry_run = Some([].into());
        world.settle();
        assert_eq!((world.condition("Stalled"), world.revisions.contains_key("v2")), ("True Aborted".into(), false));
    }

    #[test]
    fn even_at_a_hundred_percent_it_goes_back() {
        let mut world = judging();
        world.until("all traffic is requested", |world| world.status.stage == Stage::PromoteShift);
        accepted(&mut world, "abort:v2");
        world.settle();
        assert_eq!(
            (world.status.primary_revision.as_deref(), world.condition("Promoted")),
            (Some(FIRST), "False Aborted".into())
        );
    }
}

mod retry {
    use super::*;

    #[test]
    fn the_rejected_revision_is_analysed_in_full() {
        let mut world = failed();
        let stalled = world.status.conditions.iter().find(|condition| condition.kind == "Stalled").unwrap();
        assert!(
            stalled.message.ends_with(
                "or you say: kubectl annotate --overwrite -n test canary/podinfo sluice.dev/action=retry:v2"
            ),
            "{}",
            stalled.message
        );
        world.quality.insert("v2".into(), Quality::Good);
        accepted(&mut world, "retry:v2");
        world.settle();
        assert_eq!((world.status.phase, world.told("StepPassed")), (Phase::Succeeded, 3));
        assert_eq!(world.status.rejected_revisions, []);
    }

    #[test]
    fn a_second_failure_asks_for_another_retry_that_was_not_said_yet() {
        let mut world = failed();
        accepted(&mut world, "retry:v2");
        world.settle();
        assert_eq!((world.status.phase, world.told("ReleaseStarted")), (Phase::Failed, 1));
        let stalled = world.status.conditions.iter().find(|condition| condition.kind == "Stalled").unwrap();
        assert!(stalled.message.ends_with("retry:v2:2"), "{}", stalled.message);
        assert_eq!(world.status.rejected_revisions.len(), 1);
    }

    #[test]
    fn a_retry_is_for_one_release_and_ends_with_the_template() {
        let mut world = failed();
        accepted(&mut world, "retry:v2");
        world.apply("v3");
        world.settle();
        assert_eq!(world.status.primary_revision.as_deref(), Some("v3"));
        world.apply("v2");
        world.settle();
        assert_eq!((world.status.phase, world.told("RevisionRejected")), (Phase::Failed, 1));
    }

    #[test]
    fn a_rejected_revision_that_was_promoted_earlier_is_analysed_too() {
        let mut world = twice_promoted();
        world.quality.insert(FIRST.into(), Quality::NeverReady);
        world.apply(FIRST);
        world.settle();
        assert_eq!((world.status.phase, world.status.rejected_revision.as_deref()), (Phase::Failed, Some(FIRST)));
        world.quality.insert(FIRST.into(), Quality::Good);
        world.events.clear();
        accepted(&mut world, "retry:v1");
        world.settle();
        assert_eq!((world.status.primary_revision.as_deref(), world.told("StepPassed")), (Some(FIRST), 3));
    }

    #[test]
    fn what_the_deployment_does_not_ask_for_is_not_retried() {
        let mut world = failed();
        world.apply(FIRST);
        world.settle();
        refused(
            &mut world,
            "retry:v2",
            "Deployment podinfo asks for revision v1. Set its template to that of revision v2 first",
        );
    }

    #[test]
    fn while_it_is_being_taken_back_it_is_too_early() {
        let mut world = judging();
        accepted(&mut world, "abort:v2");
        world.members[0].silent = true;
        world.pass_time(3);
        refused(
            &mut world,
            "retry:v2",
            "is still being taken back. Once it is, say: kubectl annotate --overwrite -n test canary/podinfo sluice.dev/action=retry:v2:2",
        );
    }

    #[test]
    fn only_the_last_rejected_revisions_are_remembered() {
        let mut world = World::adopted();
        for number in 0..20 {
            world.apply_with(&format!("bad-{number}"), Quality::Failing);
            world.settle();
        }
        assert_eq!(world.status.rejected_revisions.len(), 16);
        assert_eq!(world.status.rejected_revisions[15].revision, "bad-19");
    }
}

mod pause {
    use super::*;

    #[test]
    fn no_weight_rises_until_it_is_resumed() {
        let mut world = judging();
        accepted(&mut world, "pause:v2");
        world.pass_time(600);
        assert_eq!((world.weight(), world.status.step, world.waiting()), (10, Some(0), "Paused"));
        let message = &world.status.waiting.as_ref().unwrap().message;
        assert!(message.ends_with("sluice.dev/action=resume:v2"), "{message}");
        refused(&mut world, "pause:v2:2", "paused already");
        accepted(&mut world, "resume:v2");
        // They take turns.
        accepted(&mut world, "pause:v2");
        let weight = world.weight();
        world.pass_time(100);
        assert_eq!((world.weight(), world.waiting()), (weight, "Paused"));
        accepted(&mut world, "resume:v2");
        world.settle();
        assert_eq!((world.status.phase, world.told("StepPassed")), (Phase::Succeeded, 3));
    }

    #[test]
    fn a_long_pause_is_no_silence_of_the_analysis_and_no_missed_deadline() {
        for stage in [Stage::Scale, Stage::Judge, Stage::PromoteScale] {
            let mut world = World::adopted();
            world.pods_take = 20;
            world.apply("v2");
            world.until("the stage is reached", |world| world.status.stage == stage);
            accepted(&mut world, "pause:v2");
            world.reports = false;
            world.report = None;
            world.settle();
            world.now += SignedDuration::from_hours(2);
            accepted(&mut world, "resume:v2");
            world.pass_time(5);
            assert!(world.status.stage != Stage::RollBack, "{stage:?}");
            world.reports = true;
            world.settle();
            assert_eq!(world.status.phase, Phase::Succeeded, "{stage:?}");
        }
    }

    #[test]
    fn failures_and_lost_endpoints_still_take_it_back() {
        let mut world = judging();
        accepted(&mut world, "pause:v2");
        let mut lost = world.clone();
        lost.revisions.get_mut("v2").unwrap().ready = 0;
        lost.reconcile();
        assert_eq!((lost.status.stage, lost.weight()), (Stage::RollBack, 0));
        world.quality.insert("v2".into(), Quality::Failing);
        world.settle();
        assert_eq!((world.status.phase, world.status.paused.as_ref()), (Phase::Failed, None));
    }

    #[test]
    fn a_new_template_ends_it() {
        let mut world = judging();
        accepted(&mut world, "pause:v2");
        world.apply("v3");
        world.settle();
        assert_eq!((world.status.primary_revision.as_deref(), world.status.paused.as_ref()), (Some("v3"), None));
    }

    #[test]
    fn a_release_that_has_not_begun_waits_too() {
        let mut world = World::adopted();
        world.dry_run = None;
        world.apply("v2");
        world.reconcile();
        accepted(&mut world, "pause:v2");
        world.dry_run = Some([].into());
        world.settle();
        assert_eq!(
            (world.status.phase, world.waiting(), world.revisions.contains_key("v2")),
            (Phase::Waiting, "Paused", false)
        );
        accepted(&mut world, "resume:v2");
        world.settle();
        assert_eq!(world.status.phase, Phase::Succeeded);
    }

    #[test]
    fn a_step_without_a_verdict_is_judged_anew() {
        let mut world = World::adopted();
        world.spec.analysis.as_mut().unwrap().inconclusive.then = InconclusiveAction::Pause;
        world.apply_with("v2", Quality::Silent);
        world.until("it pauses", |world| world.status.stage == Stage::Paused);
        world.reconcile();
        let message = &world.status.waiting.as_ref().unwrap().message;
        assert!(message.contains("resume:v2") && message.contains("abort:v2"), "{message}");
        world.quality.insert("v2".into(), Quality::Good);
        accepted(&mut world, "resume:v2");
        assert_eq!(world.status.stage, Stage::Judge);
        world.settle();
        assert_eq!(world.status.phase, Phase::Succeeded);
    }
}

mod rollback {
    use super::*;

    #[test]
    fn an_older_revision_takes_over_at_full_capacity_and_the_newer_one_waits_for_somebody() {
        let mut world = twice_promoted();
        let said = world.now;
        accepted(&mut world, "rollback:v1");
        world.until("it is back", |world| world.status.primary_revision.as_deref() == Some(FIRST));
        assert!(world.now.duration_since(said) <= SignedDuration::from_secs(8));
        world.settle();
        assert_eq!((world.status.phase, world.status.rejected_revision.as_deref()), (Phase::Failed, Some("v2")));
        assert_eq!((world.desired(FIRST), world.desired("v2"), world.told("StepStarted")), (3, 0, 0));
        assert_eq!(
            (world.condition("Stalled"), world.condition("Promoted")),
            ("True Rollback".into(), "False Rollback".into())
        );
        let plan = world.status.plan.as_ref().unwrap();
        assert_eq!((plan.unjudged.as_deref(), plan.action.as_deref()), (Some("Rollback"), Some("rollback:v1")));
        let stalled = world.status.conditions.iter().find(|condition| condition.kind == "Stalled").unwrap();
        assert!(stalled.message.contains("retry:v2"), "{}", stalled.message);

        // Not by itself, and not by a look at the same template.
        world.target.as_mut().unwrap().generation += 1;
        world.settle();
        assert_eq!(world.status.primary_revision.as_deref(), Some(FIRST));
        let mut other = world.clone();
        other.apply("v3");
        other.settle();
        assert_eq!((other.status.primary_revision.as_deref(), other.told("StepPassed")), (Some("v3"), 3));
        // v2 was promoted once, and left: judged in full.
        accepted(&mut world, "retry:v2");
        world.settle();
        assert_eq!((world.status.primary_revision.as_deref(), world.told("StepPassed")), (Some("v2"), 3));
    }

    #[test]
    fn in_mid_release_the_canary_goes_to_zero_first_and_neither_it_nor_what_served_comes_back() {
        let mut world = twice_promoted();
        world.apply("v3");
        world.until("it is judged", |world| world.status.stage == Stage::Judge);
        accepted(&mut world, "rollback:v1");
        assert_eq!(
            (world.status.stage, world.weight(), actions(&world).first()),
            (Stage::RollBack, 0, Some(&Action::CutTraffic))
        );
        world.settle();
        assert_eq!(world.status.primary_revision.as_deref(), Some(FIRST));
        assert_eq!((world.status.phase, world.status.rejected_revision.as_deref()), (Phase::Failed, Some("v3")));
        world.apply("v2");
        world.settle();
        assert_eq!((world.status.phase, world.status.primary_revision.as_deref()), (Phase::Failed, Some(FIRST)));
        accepted(&mut world, "rollback:v2");
        world.settle();
        assert_eq!(
            (world.status.primary_revision.as_deref(), world.condition("Promoted")),
            (Some("v2"), "True Rollback".into())
        );
    }

    #[test]
    fn a_new_template_waits_until_the_way_back_has_ended() {
        let mut world = twice_promoted();
        accepted(&mut world, "rollback:v1");
        world.apply("v3");
        world.until("it is back", |world| world.status.primary_revision.as_deref() == Some(FIRST));
        world.settle();
        assert_eq!((world.status.primary_revision.as_deref(), world.told("StepPassed")), (Some("v3"), 3));
    }

    #[test]
    fn a_broken_template_or_none_at_all_does_not_stand_in_its_way() {
        for reason in ["ConfigMissing", "TemplateUnsupported", "InvalidSpec", UNSENDABLE] {
            let mut world = twice_promoted();
            world.problems.push(Problem { reason, message: "mend it".into() });
            accepted(&mut world, "rollback:v1");
            world.settle();
            assert_eq!(world.status.primary_revision.as_deref(), Some(FIRST), "{reason}");
        }
        let mut world = twice_promoted();
        world.target = None;
        accepted(&mut world, "rollback:v1");
        world.settle();
        assert_eq!(world.status.primary_revision.as_deref(), Some(FIRST));
        let mut world = twice_promoted();
        world.problems.push(Problem { reason: "TargetConflict", message: "mend it".into() });
        accepted(&mut world, "rollback:v1");
        world.settle();
        assert_eq!(world.condition("Stalled"), "True TargetConflict");
    }

    #[test]
    fn one_that_does_not_come_up_leaves_what_serves() {
        let mut world = twice_promoted();
        world.quality.insert(FIRST.into(), Quality::NeverReady);
        accepted(&mut world, "rollback:v1");
        world.settle();
        assert_eq!((world.status.primary_revision.as_deref(), world.told("ProgressDeadlineExceeded")), (Some("v2"), 1));
        assert_eq!(
            (world.condition("Ready"), world.condition("Promoted")),
            ("True Succeeded".into(), "True Succeeded".into())
        );
    }

    #[test]
    fn it_can_be_called_off_before_it_has_begun() {
        let mut world = twice_promoted();
        world.joining = true;
        accepted(&mut world, "rollback:v1");
        assert_eq!(world.waiting(), "FleetJoining");
        accepted(&mut world, "abort:v1");
        world.joining = false;
        world.settle();
        assert_eq!(
            (world.status.primary_revision.as_deref(), world.status.pending_release.as_ref()),
            (Some("v2"), None)
        );
    }

    #[test]
    fn a_revision_that_waits_to_be_gone_back_to_is_kept() {
        let mut world = twice_promoted();
        world.joining = true;
        accepted(&mut world, "rollback:v1");
        world.spec.revision_history_limit = 0;
        world.pass_time(5);
        world.joining = false;
        world.settle();
        assert_eq!(world.status.primary_revision.as_deref(), Some(FIRST));
    }

    #[test]
    fn one_that_was_deleted_meanwhile_is_said_to_be_gone() {
        let mut world = twice_promoted();
        world.joining = true;
        accepted(&mut world, "rollback:v1");
        world.revisions.remove(FIRST);
        world.joining = false;
        world.settle();
        assert_eq!((world.status.primary_revision.as_deref(), world.told("RevisionGone")), (Some("v2"), 1));
        assert_eq!(world.condition("Ready"), "True Succeeded");
    }

    #[test]
    fn the_template_of_an_older_revision_is_the_same_way_back() {
        let mut world = twice_promoted();
        world.apply(FIRST);
        world.settle();
        assert_eq!((world.status.primary_revision.as_deref(), world.told("StepStarted")), (Some(FIRST), 0));
        assert_eq!((world.status.phase, world.condition("Promoted")), (Phase::Succeeded, "True Rollback".into()));
        // And forth: v2 was promoted and nobody rejected it.
        world.apply("v2");
        world.settle();
        assert_eq!((world.status.primary_revision.as_deref(), world.told("StepStarted")), (Some("v2"), 0));
    }

    #[test]
    fn in_mid_release_the_template_of_an_older_revision_goes_there_too() {
        let mut world = twice_promoted();
        world.apply("v3");
        world.until("it is judged", |world| world.status.stage == Stage::Judge);
        world.apply(FIRST);
        world.reconcile();
        assert_eq!((world.status.stage, world.weight()), (Stage::RollBack, 0));
        world.settle();
        assert_eq!(
            (world.status.primary_revision.as_deref(), world.condition("Promoted")),
            (Some(FIRST), "True Rollback".into())
        );
        assert_eq!(world.status.rejected_revisions, [], "its owner withdrew v3");
    }

    #[test]
    fn a_smaller_wish_that_rollout_undo_brings_back_scales_nothing_down() {
        let mut world = twice_promoted();
        world.target.as_mut().unwrap().wish = Some(5);
        world.settle();
        assert_eq!(world.desired("v2"), 5);
        // The annotations of the older ReplicaSet come back with its template.
        world.apply(FIRST);
        world.target.as_mut().unwrap().wish = Some(3);
        world.settle();
        assert_eq!((world.desired(FIRST), world.spec.replicas, world.told("ReplicasKept")), (5, Some(5), 1));
        // Another wish is one.
        world.target.as_mut().unwrap().wish = Some(4);
        world.settle();
        assert_eq!(world.desired(FIRST), 4);
        // And so is one with a template that was never released.
        world.apply("v3");
        world.target.as_mut().unwrap().wish = Some(2);
        world.settle();
        assert_eq!((world.desired("v3"), world.spec.replicas), (2, Some(2)));
    }
}
