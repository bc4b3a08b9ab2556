//! Random worlds and every crash point. The world checks each call; here is what must hold in the end.

use proptest::prelude::*;
use sluice_crds::{Backend, HttpMatch, InconclusiveAction, Phase, Stage, Traffic, Verb};

use super::{
    super::{Action, Problem},
    world::{Crash, FIRST, Member, Quality, Target, World},
};
use crate::{analysis::DryRun, delivery::verb::word};

const REVISIONS: [(&str, Quality); 6] = [
    (FIRST, Quality::Good),
    ("v2", Quality::Good),
    ("v3", Quality::Failing),
    ("v4", Quality::NeverReady),
    ("v5", Quality::Silent),
    ("v6", Quality::Unmeasurable),
];

/// What people, clusters and failures do.
#[derive(Clone, Debug)]
enum Happening {
    Time(u8),
    Template(usize),
    Config(usize),
    Suspend(bool),
    PauseWithoutSamples(bool),
    SkipAnalysis(bool),
    Match(bool),
    /// Copies of so many percent of the requests; none at 0.
    Mirror(u8),
    Scale(u8),
    GitReplicas(u8),
    KeyDropped,
    ServiceDeleted,
    FinalizerDropped,
    Silent(usize, bool),
    MemberJoins,
    MemberLeaves,
    Joining(bool),
    /// A verb about this revision, with a note or without.
    Say(Verb, usize, u8),
    /// A verb about what is under way or would be next.
    SayOfPresent(Verb, u8),
    Unsay,
    Reports(bool),
    Breach,
    PodsDie(usize),
    TargetDeleted,
    DryRun(Option<bool>),
    Problem(bool),
    Crash(Crash),
    Deleted,
    Uninstalling(bool),
}

fn happening() -> impl Strategy<Value = Happening> {
    let index = 0..REVISIONS.len();
    prop_oneof![
        12 => (1_u8..30).prop_map(Happening::Time),
        4 => index.clone().prop_map(Happening::Template),
        1 => index.clone().prop_map(Happening::Config),
        2 => any::<bool>().prop_map(Happening::Suspend),
        1 => any::<bool>().prop_map(Happening::PauseWithoutSamples),
        1 => any::<bool>().prop_map(Happening::SkipAnalysis),
        2 => any::<bool>().prop_map(Happening::Match),
        3 => prop_oneof![Just(0), Just(100), 1_u8..100].prop_map(Happening::Mirror),
        2 => (0_u8..6).prop_map(Happening::Scale),
        2 => (0_u8..6).prop_map(Happening::GitReplicas),
        1 => Just(Happening::KeyDropped),
        1 => Just(Happening::ServiceDeleted),
        1 => Just(Happening::FinalizerDropped),
        2 => (0_usize..3, any::<bool>()).prop_map(|(member, silent)| Happening::Silent(member, silent)),
        1 => Just(Happening::MemberJoins),
        1 => Just(Happening::MemberLeaves),
        1 => any::<bool>().prop_map(Happening::Joining),
        3 => (verb(), index.clone(), 0_u8..4).prop_map(|(verb, index, note)| Happening::Say(verb, index, note)),
        5 => (verb(), 0_u8..4).prop_map(|(verb, note)| Happening::SayOfPresent(verb, note)),
        1 => Just(Happening::Unsay),
        1 => any::<bool>().prop_map(Happening::Reports),
        1 => Just(Happening::Breach),
        2 => index.prop_map(Happening::PodsDie),
        1 => Just(Happening::TargetDeleted),
        1 => proptest::option::of(any::<bool>()).prop_map(Happening::DryRun),
        1 => any::<bool>().prop_map(Happening::Problem),
        3 => prop_oneof![Just(Crash::BeforeStatus), (0_usize..4).prop_map(Crash::After)].prop_map(Happening::Crash),
        1 => Just(Happening::Deleted),
        1 => any::<bool>().prop_map(Happening::Uninstalling),
    ]
}

fn verb() -> impl Strategy<Value = Verb> {
    prop_oneof![
        Just(Verb::Promote),
        Just(Verb::Abort),
        Just(Verb::Retry),
        Just(Verb::Pause),
        Just(Verb::Resume),
        Just(Verb::Rollback),
    ]
}

fn said(verb: Verb, revision: &str, note: u8) -> String {
    let plain = format!("{}:{revision}", word(verb));
    if note == 0 { plain } else { format!("{plain}:{note}") }
}

fn target(revision: &str) -> Target {
    Target { uid: 2, generation: 1, revision: revision.into(), configs: [].into(), replicas: 2, wish: None, ready: 0 }
}

fn happen(world: &mut World, happening: &Happening) {
    match happening {
        Happening::Time(seconds) => return world.pass_time(usize::from(*seconds)),
        Happening::Template(index) => world.apply(REVISIONS[*index].0),
        Happening::Config(index) => {
            if let Some(target) = &mut world.target {
                target.revision = REVISIONS[*index].0.into();
                target.configs = [("configmap/settings".to_owned(), format!("{index} at {}", world.now))].into();
            }
        }
        Happening::Suspend(suspend) => world.spec.suspend = *suspend,
        Happening::PauseWithoutSamples(pause) => {
            world.spec.analysis.as_mut().unwrap().inconclusive.then =
                if *pause { InconclusiveAction::Pause } else { InconclusiveAction::Rollback };
        }
        Happening::Match(matching) => {
            world.spec.analysis.as_mut().unwrap().matches = matching.then(|| vec![HttpMatch::default()]);
        }
        Happening::Mirror(percent) => {
            let analysis = world.spec.analysis.as_mut().unwrap();
            analysis.mirror = (*percent > 0).then_some(true);
            analysis.mirror_weight = (*percent > 0).then(|| i32::from(*percent));
        }
        Happening::SkipAnalysis(skip) => world.spec.skip_analysis = *skip,
        Happening::Scale(replicas) => world.spec.replicas = Some(u32::from(*replicas)),
        Happening::GitReplicas(replicas) => {
            if let Some(target) = &mut world.target {
                target.generation += 1;
                target.replicas = u32::from(*replicas);
            }
        }
        Happening::KeyDropped => world.key = false,
        Happening::ServiceDeleted => {
            world.service_exists = false;
            world.key = false;
        }
        Happening::FinalizerDropped => world.finalizer = world.finalizer && world.deleting,
        Happening::Silent(member, silent) => {
            if let Some(member) = world.members.get_mut(*member) {
                member.silent = *silent;
            }
        }
        Happening::MemberJoins => {
            let name = format!("fleet-{}", world.members.len());
            world.members.push(Member { name, acknowledged: None, silent: false });
        }
        Happening::MemberLeaves => {
            world.members.pop();
        }
        Happening::Joining(joining) => world.joining = *joining,
        Happening::Say(verb, index, note) => world.say(&said(*verb, REVISIONS[*index].0, *note)),
        Happening::SayOfPresent(verb, note) => world.say(&said(*verb, &world.present(), *note)),
        Happening::Unsay => world.action = None,
        Happening::Reports(reports) => world.reports = *reports,
        Happening::Breach => {
            if world.watch.is_some() {
                world.breach();
            }
        }
        Happening::PodsDie(index) => {
            if let Some(running) = world.revisions.get_mut(REVISIONS[*index].0) {
                running.dead = true;
                running.ready = 0;
            }
        }
        Happening::TargetDeleted => world.target = None,
        Happening::DryRun(result) => {
            world.dry_run = result.map(|good| {
                if good { DryRun::new() } else { DryRun::from([("request-success-rate".into(), "bad query".into())]) }
            });
        }
        Happening::Problem(there) => {
            world.problems.clear();
            if *there {
                let message = "Canary test/other has the same target: delete one of them".into();
                world.problems.push(Problem { reason: "TargetConflict", message });
            }
        }
        Happening::Crash(crash) => world.crash = Some(*crash),
        Happening::Deleted => world.deleting = true,
        Happening::Uninstalling(uninstalling) => world.uninstalling = *uninstalling,
    }
    world.reconcile();
    world.tick();
}

/// Faults stop.
fn heal(world: &mut World) {
    for member in &mut world.members {
        member.silent = false;
    }
    if world.members.is_empty() {
        world.members.push(Member { name: "fleet-0".into(), acknowledged: None, silent: false });
    }
    for running in world.revisions.values_mut() {
        running.dead = false;
    }
    world.joining = false;
    world.uninstalling = false;
    world.reports = true;
    // There are samples, and where a release has paused somebody lets it go on.
    world.quality.insert("v5".into(), Quality::Good);
    world.crash = None;
    world.spec.suspend = true;
    world.reconcile();
    world.tick();
    world.spec.suspend = false;
    if let Some(paused) = &world.status.paused {
        world.say(&format!("resume:{}:goes on", paused.revision));
    }
    world.dry_run = Some(DryRun::new());
    world.problems.clear();
    if world.target.is_none() && !world.gone {
        world.target = Some(target(FIRST));
    }
}

/// Every release ends, everything is at rest, and what is at rest is right.
fn at_the_end(world: &World) -> Result<(), TestCaseError> {
    let template = world.target.as_ref().map_or("", |target| target.revision.as_str());
    let never_ready = world.quality(template) == Quality::NeverReady;
    if world.deleting {
        // A target that cannot run cannot take the traffic back: the fleet serves on, and says so.
        let waits = never_ready && world.status.stage == Stage::ReturnScale && world.waiting() == "TargetNotReady";
        prop_assert!(world.gone || waits, "{}", world.summary());
        if world.gone {
            prop_assert!(!world.key && !world.finalizer);
        }
        return Ok(());
    }
    let adopting = world.status.phase == Phase::Initializing;
    if adopting {
        prop_assert!(never_ready, "{}", world.summary());
        return Ok(());
    }
    prop_assert_eq!(world.status.stage, Stage::Settled);
    prop_assert!(world.status.pending_release.is_none() && world.status.paused.is_none(), "{}", world.summary());
    let primary = world.status.primary_revision.clone().unwrap_or_default();
    match world.status.phase {
        Phase::Initialized | Phase::Succeeded => prop_assert_eq!(template, &primary),
        Phase::Failed => {
            prop_assert_eq!(Some(template), world.status.rejected_revision.as_deref());
            prop_assert_ne!(template, &primary);
        }
        Phase::Initializing
        | Phase::Waiting
        | Phase::Progressing
        | Phase::Promoting
        | Phase::Finalising
        | Phase::Terminating
        | Phase::Terminated => prop_assert!(false, "{}", world.summary()),
    }
    let rest = Traffic { primary: Backend::revision(&primary), canary: None, weight: 0, mirror: 0, matches: None };
    prop_assert_eq!(world.status.traffic.as_ref(), Some(&rest));
    prop_assert_eq!(world.effective(), Some(rest));
    prop_assert!(world.key && world.finalizer && world.service_exists);
    prop_assert_eq!(world.target.as_ref().map(|target| target.replicas), Some(0));
    for (hash, running) in &world.revisions {
        let expected = if *hash == primary { world.spec.replicas } else { Some(0) };
        prop_assert_eq!(running.desired, expected, "{}: {}", hash, world.summary());
    }
    prop_assert!(world.revisions.len() <= 2 + world.spec.revision_history_limit, "{}", world.summary());
    Ok(())
}

fn world_with(revisions: &[(&str, Quality)]) -> World {
    let mut world = World::stepped();
    world.quality = revisions.iter().map(|(hash, quality)| ((*hash).to_owned(), *quality)).collect();
    world
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 4_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_each_call_keeps_the_rules_and_all_comes_to_rest(happenings in proptest::collection::vec(happening(), 1..60), adopted in any::<bool>()) {
        let mut world = world_with(&REVISIONS);
        if adopted {
            world.settle();
        }
        for happening in &happenings {
            happen(&mut world, happening);
        }
        heal(&mut world);
        world.settle();
        at_the_end(&world)?;

        // At rest: no reads, no writes.
        let writes = world.writes;
        world.pass_time(30);
        prop_assert_eq!(world.writes, writes);
        if !world.gone {
            let outcome = world.outcome.clone().unwrap();
            prop_assert_eq!(outcome.actions, vec![]);
            prop_assert_eq!(outcome.task, None);
            prop_assert_eq!(outcome.again_at, None);
        }
    }

    #[test]
    fn from_every_state_a_lost_canary_is_at_weight_zero_in_one_call(happenings in proptest::collection::vec(happening(), 1..60)) {
        let mut world = world_with(&REVISIONS);
        world.settle();
        for happening in &happenings {
            happen(&mut world, happening);
            let mirror = |world: &World| world.status.traffic.as_ref().map_or(0, |traffic| traffic.mirror);
            if (world.weight() > 0 || mirror(&world) > 0) && !world.gone {
                // The worst hour: no endpoint, no fleet, no analysis, no target.
                let mut lost = world.clone();
                lost.joining = true;
                lost.report = None;
                lost.target = None;
                lost.service_exists = false;
                lost.crash = None;
                for running in lost.revisions.values_mut() {
                    running.ready = 0;
                }
                lost.reconcile();
                prop_assert_eq!((lost.weight(), mirror(&lost)), (0, 0), "{}", lost.summary());
                let actions = lost.outcome.as_ref().map(|outcome| outcome.actions.clone()).unwrap_or_default();
                prop_assert_eq!(actions.first(), Some(&Action::CutTraffic));
            }
            if world.weight() > 0 && !world.gone && world.watch.is_some() {
                let mut breached = world.clone();
                breached.crash = None;
                breached.breach();
                breached.reconcile();
                prop_assert_eq!(breached.weight(), 0, "{}", breached.summary());
            }
        }
    }
}

type Script = &'static [(usize, fn(&mut World))];

/// A world in which things happen at fixed seconds, and the controller crashes once.
fn play(script: Script, crash: Option<(usize, Crash)>) -> (World, Vec<usize>) {
    let mut world = world_with(&REVISIONS);
    let mut worth_a_crash = Vec::new();
    let end = script.last().map_or(0, |(second, _)| *second);
    for second in 0..=end {
        for (_, happens) in script.iter().filter(|(at, _)| *at == second) {
            happens(&mut world);
        }
        if let Some((_, how)) = crash.filter(|(at, _)| *at == second) {
            world.crash = Some(how);
        }
        let writes = world.writes;
        world.reconcile();
        if world.writes > writes || world.outcome.as_ref().is_some_and(|outcome| !outcome.actions.is_empty()) {
            worth_a_crash.push(second);
        }
        world.tick();
    }
    world.settle();
    (world, worth_a_crash)
}

fn crash_everywhere(script: Script) {
    let (calm, seconds) = play(script, None);
    assert!(seconds.len() > 10, "the script does something");
    for second in seconds {
        for how in [Crash::BeforeStatus, Crash::After(0), Crash::After(1), Crash::After(2)] {
            let (crashed, _) = play(script, Some((second, how)));
            assert_eq!(crashed.summary(), calm.summary(), "crash {how:?} at {second} s\n{}", crashed.trace.join("\n"));
        }
    }
}

#[test]
fn a_crash_at_any_action_of_takeover_and_a_good_release_ends_in_the_same_state() {
    crash_everywhere(&[(60, |world| world.apply("v2")), (250, |_| ())]);
}

fn mirror(world: &mut World) {
    world.spec.analysis.as_mut().unwrap().mirror = Some(true);
}

#[test]
fn a_crash_at_any_action_of_a_mirrored_release_ends_in_the_same_state() {
    crash_everywhere(&[(0, mirror), (60, |world| world.apply("v2")), (250, |_| ())]);
}

#[test]
fn a_crash_at_any_action_of_a_rollback_from_a_mirrored_step_ends_in_the_same_state() {
    crash_everywhere(&[(0, mirror), (60, |world| world.apply("v3")), (250, |_| ())]);
}

#[test]
fn a_crash_at_any_action_of_a_rollback_ends_in_the_same_state() {
    crash_everywhere(&[(60, |world| world.apply("v3")), (250, |_| ())]);
}

#[test]
fn a_crash_at_any_action_of_a_superseded_release_ends_in_the_same_state() {
    crash_everywhere(&[(60, |world| world.apply("v3")), (68, |world| world.apply("v2")), (250, |_| ())]);
}

#[test]
fn a_crash_at_any_action_of_a_hand_back_in_mid_release_ends_in_the_same_state() {
    crash_everywhere(&[(60, |world| world.apply("v2")), (80, |world| world.deleting = true), (200, |_| ())]);
}

#[test]
fn a_crash_at_any_action_of_uninstalling_in_mid_release_ends_in_the_same_state() {
    crash_everywhere(&[
        (60, |world| world.apply("v2")),
        (80, |world| world.uninstalling = true),
        (200, |world| world.uninstalling = false),
    ]);
}

#[test]
fn a_crash_while_another_wish_is_taken_over_ends_in_the_same_state() {
    crash_everywhere(&[
        (60, |world| {
            let target = world.target.as_mut().unwrap();
            target.replicas = 5;
            target.generation += 1;
        }),
        (90, |_| ()),
    ]);
}

#[test]
fn a_crash_at_any_action_of_a_promotion_by_hand_ends_in_the_same_state() {
    crash_everywhere(&[(60, |world| world.apply("v2")), (72, |world| world.say("promote:v2")), (250, |_| ())]);
}

#[test]
fn a_crash_at_any_action_of_an_abort_and_a_retry_ends_in_the_same_state() {
    crash_everywhere(&[
        (60, |world| world.apply("v2")),
        (72, |world| world.say("abort:v2")),
        (100, |world| world.say("retry:v2")),
        (300, |_| ()),
    ]);
}

#[test]
fn a_crash_at_any_action_of_a_pause_ends_in_the_same_state() {
    crash_everywhere(&[
        (60, |world| world.apply("v2")),
        (72, |world| world.say("pause:v2")),
        (150, |world| world.say("resume:v2")),
        (300, |_| ()),
    ]);
}

#[test]
fn a_crash_at_any_action_of_a_rollback_by_hand_in_mid_release_ends_in_the_same_state() {
    crash_everywhere(&[
        (60, |world| world.apply("v2")),
        (140, |world| world.apply("v3")),
        (148, |world| world.say("rollback:v1")),
        (300, |_| ()),
    ]);
}
