use super::*;

#[test]
fn a_settled_canary_returns_the_same_status_and_no_actions() {
    let mut world = World::adopted();
    world.reconcile();
    let status = world.status.clone();
    world.now += SignedDuration::from_hours(1);
    let outcome = step(&world.spec, &status, &world.observe(), world.now);
    assert_eq!(outcome.status, status);
    assert_eq!((outcome.actions, outcome.again_at, outcome.task), (vec![], None, None));
    assert_eq!(outcome.events, []);
}

#[test]
fn a_key_that_git_drops_is_put_back() {
    let mut world = World::adopted();
    world.key = false;
    world.reconcile();
    assert_eq!(actions(&world), [Action::SetKey(true)]);
}

#[test]
fn replicas_that_git_restores_rest_again_and_are_no_new_wish() {
    let mut world = World::adopted();
    world.spec.replicas = Some(5);
    world.target.as_mut().unwrap().replicas = 3;
    world.target.as_mut().unwrap().generation += 1;
    world.reconcile();
    assert!(actions(&world).contains(&Action::RestTemplate { wish: 3 }));
    world.settle();
    assert_eq!((world.spec.replicas, world.desired(FIRST)), (Some(5), 5));
}

#[test]
fn another_wish_is_taken_over_once_and_scaling_the_canary_holds_afterwards() {
    let mut world = World::adopted();
    world.target.as_mut().unwrap().wish = Some(4);
    world.settle();
    assert_eq!((world.spec.replicas, world.desired(FIRST)), (Some(4), 4));
    world.spec.replicas = Some(2);
    world.settle();
    assert_eq!((world.spec.replicas, world.desired(FIRST)), (Some(2), 2));
}

#[test]
fn a_changed_generation_with_the_same_template_starts_nothing_but_is_spoken_of() {
    let mut world = World::adopted();
    world.target.as_mut().unwrap().generation += 1;
    world.settle();
    assert_eq!(world.status.template.as_ref().unwrap().observed_generation, world.target.as_ref().unwrap().generation);
    assert_eq!((world.status.phase, world.told("NewRevision")), (Phase::Initialized, 0));
}

/// As who leads next may see it, whose watch is behind the one of who led before.
#[test]
fn an_older_template_than_the_one_that_was_seen_decides_nothing() {
    let mut world = World::adopted();
    let older = world.target.clone();
    world.target.as_mut().unwrap().wish = Some(4);
    world.apply("v2");
    world.until("the first step is judged", |world| world.status.stage == Stage::Judge);
    let newer = world.target.clone();
    let known = world.status.template.clone();
    for replicas in [0, 3] {
        world.target.clone_from(&older);
        world.target.as_mut().unwrap().replicas = replicas;
        world.reconcile();
        assert_eq!((world.status.template.as_ref(), world.status.stage), (known.as_ref(), Stage::Judge));
        assert_eq!((actions(&world), world.spec.replicas), (vec![], Some(4)), "nor does what it wished for then");
    }
    world.target = newer;
    world.settle();
    assert_eq!((world.status.phase, world.status.primary_revision.as_deref()), (Phase::Succeeded, Some("v2")));
    // Whoever goes back makes a newer one.
    world.apply(FIRST);
    world.settle();
    assert_eq!(world.status.primary_revision.as_deref(), Some(FIRST));
}

#[test]
fn a_target_whose_configuration_cannot_be_read_starts_nothing_and_holds_up_no_rollback() {
    let mut world = World::adopted();
    world.unread = true;
    // As the shell says it then.
    world.target.as_mut().unwrap().generation += 1;
    world.settle();
    assert_eq!((world.status.phase, world.told("NewRevision")), (Phase::Initialized, 0));
    world.uninstalling = true;
    world.pass_time(5);
    assert!(world.key, "nobody knows what the target would serve");
    world.uninstalling = false;
    world.unread = false;
    world.target.as_mut().unwrap().revision = "v2".into();
    world.settle();
    assert_eq!(world.status.primary_revision.as_deref(), Some("v2"), "what was not known then is released after all");

    let mut world = judging("v2");
    world.unread = true;
    world.quality.insert("v2".into(), Quality::Failing);
    world.settle();
    assert_eq!((world.status.phase, world.weight()), (Phase::Failed, 0));

    let mut world = World::adopted();
    world.dry_run = None;
    world.apply("v2");
    world.reconcile();
    (world.unread, world.dry_run) = (true, Some(DryRun::new()));
    world.pass_time(5);
    assert_eq!((world.waiting(), world.revisions.contains_key("v2")), ("Configuration", false));
    world.deleting = true;
    world.settle();
    assert!(world.gone && !world.key);
}

#[test]
fn another_hash_of_an_unchanged_target_starts_nothing() {
    let mut world = World::adopted();
    world.target.as_mut().unwrap().revision = "v1-with-new-api-defaults".into();
    world.hash_drifts = true;
    world.settle();
    world.target.as_mut().unwrap().generation += 1;
    world.settle();
    assert_eq!((world.status.phase, world.told("NewRevision")), (Phase::Initialized, 0));
    assert_eq!(world.condition("Ready"), "True Initialized");
}

/// Deleted and created between two looks, where admission lets it rest from its first moment.
#[test]
fn another_hash_of_a_target_that_was_made_anew_unseen_is_released() {
    let mut world = World::adopted();
    let target = world.target.as_mut().unwrap();
    (target.uid, target.revision) = (2, "v2".into());
    world.settle();
    assert_eq!((world.status.phase, world.status.primary_revision.as_deref()), (Phase::Succeeded, Some("v2")));
}

#[test]
fn a_changed_configuration_is_released_like_a_changed_template() {
    let mut world = World::adopted();
    let target = world.target.as_mut().unwrap();
    target.configs = [("configmap/settings".to_owned(), "abc".to_owned())].into();
    target.revision = "v2".into();
    world.settle();
    assert_eq!(world.status.primary_revision.as_deref(), Some("v2"));
}

#[test]
fn a_deleted_target_leaves_the_primary_serving_and_is_named() {
    let mut world = World::adopted();
    world.target = None;
    world.settle();
    assert_eq!(
        (world.condition("Stalled"), world.condition("Ready")),
        ("True TargetNotFound".into(), "False TargetNotFound".into())
    );
    assert_eq!(world.desired(FIRST), 3);
    // Another Deployment of that name, whose generation happens to be one that was seen.
    let generation = world.status.template.as_ref().unwrap().observed_generation.max(2);
    world.target = Some(Target {
        uid: 2,
        generation,
        revision: "v2".into(),
        configs: [].into(),
        replicas: 3,
        wish: None,
        ready: 0,
    });
    world.settle();
    assert_eq!((world.status.primary_revision.as_deref(), world.target.as_ref().unwrap().replicas), (Some("v2"), 0));
}

/// The target is deleted and created again. Where it says no replicas, Kubernetes says 1.
fn made_anew(world: &mut World, replicas: u32) {
    world.target = None;
    world.settle();
    let anew =
        Target { uid: 2, generation: 1, revision: FIRST.into(), configs: [].into(), replicas, wish: None, ready: 0 };
    world.target = Some(anew);
}

#[test]
fn a_target_that_is_made_anew_without_replicas_scales_nothing_down() {
    let mut world = World::adopted();
    // Scaled since: that holds, too.
    world.spec.replicas = Some(5);
    made_anew(&mut world, 1);
    world.reconcile();
    assert_eq!(actions(&world), [Action::RestTemplate { wish: 3 }]);
    world.settle();
    assert_eq!((world.spec.replicas, world.desired(FIRST)), (Some(5), 5));
    // Whoever means it says it again, to what is known to rest.
    world.target.as_mut().unwrap().replicas = 1;
    world.settle();
    assert_eq!((world.spec.replicas, world.desired(FIRST)), (Some(1), 1));
}

#[test]
fn a_target_that_is_made_anew_with_other_replicas_wishes_for_them() {
    let mut world = World::adopted();
    made_anew(&mut world, 2);
    world.settle();
    assert_eq!((world.spec.replicas, world.desired(FIRST)), (Some(2), 2));
    assert_eq!(world.target.as_ref().unwrap().replicas, 0);
}

#[test]
fn a_primary_whose_deployment_was_deleted_is_made_again_from_its_record() {
    let mut world = World::adopted();
    world.revisions.get_mut(FIRST).unwrap().desired = None;
    world.revisions.get_mut(FIRST).unwrap().ready = 0;
    world.reconcile();
    assert_eq!(actions(&world), [Action::CreateRevision { revision: FIRST.into(), replicas: 3 }]);
    assert_eq!(world.condition("Ready"), "False PrimaryNotReady");
}

#[test]
fn owners_that_somebody_took_off_come_back_and_nothing_else_changes() {
    let mut world = World::adopted();
    let rests = Running { number: -1, promoted: true, desired: Some(0), disowned: true, ..Running::default() };
    world.revisions.insert("rests".into(), rests);
    world.revisions.get_mut(FIRST).unwrap().disowned = true;
    world.reconcile();
    assert_eq!(actions(&world), [scale("rests", 0), scale(FIRST, 3)]);
    world.settle();
    assert_eq!(actions(&world), []);
    // What is scaled anyway is not written twice.
    world.revisions.get_mut(FIRST).unwrap().disowned = true;
    world.spec.replicas = Some(4);
    world.reconcile();
    assert_eq!(actions(&world), [scale(FIRST, 4)]);
}

#[test]
fn only_the_last_few_unused_revisions_are_kept_and_those_once_promoted_rather_than_others() {
    let mut world = World::adopted();
    for (number, hash, promoted) in
        [(1, "old", true), (2, "older-bad", false), (3, "newer", true), (4, "newest-bad", false)]
    {
        world
            .revisions
            .insert(hash.into(), Running { number: number - 10, promoted, desired: Some(0), ..Running::default() });
    }
    world.settle();
    let kept: Vec<&str> = world.revisions.keys().map(String::as_str).collect();
    assert_eq!(kept, ["newer", "old", FIRST]);
}

#[test]
fn the_earliest_of_several_times_is_when_it_looks_again() {
    let mut world = World::adopted();
    let soon = world.now + SignedDuration::from_secs(20);
    for (hash, seconds) in [("a", 20), ("b", 40)] {
        let running = Running { number: -1, promoted: true, desired: Some(1), ready: 1, ..Running::default() };
        world.revisions.insert(hash.into(), running);
        let scale_down_at = world.now + SignedDuration::from_secs(seconds);
        world.status.retiring.push(Retiring { revision: hash.into(), scale_down_at });
    }
    world.reconcile();
    assert_eq!(world.outcome.as_ref().unwrap().again_at, Some(soon));
    world.settle();
    assert_eq!((world.desired("a"), world.desired("b"), world.status.retiring.len()), (0, 0, 0));
}

#[test]
fn nothing_is_scaled_down_while_the_fleet_is_unknown() {
    let mut world = World::adopted();
    world.joining = true;
    world.spec.replicas = Some(1);
    world.pass_time(20);
    assert_eq!(world.desired(FIRST), 3);
    world.joining = false;
    world.settle();
    assert_eq!(world.desired(FIRST), 1);
}

#[test]
fn warnings_are_a_condition_and_one_event() {
    let mut world = World::adopted();
    let message = "Service test/podinfo-metrics selects the same Pods".to_owned();
    world.warnings.push(Problem { reason: "OtherServices", message });
    world.pass_time(5);
    assert_eq!((world.condition("Warning"), world.told("Warning")), ("True OtherServices".into(), 1));
    assert_eq!(world.condition("Ready"), "True Initialized");
    world.warnings.clear();
    world.reconcile();
    assert_eq!(world.condition("Warning"), "absent");
}

#[test]
fn a_canary_scaled_to_zero_is_ready() {
    let mut world = World::adopted();
    world.spec.replicas = Some(0);
    world.settle();
    assert_eq!((world.desired(FIRST), world.condition("Ready")), (0, "True Initialized".into()));
}

#[test]
fn the_autoscaler_is_copied_once_a_revision_serves_and_not_while_the_targets_own_is_active() {
    let mut world = World::stepped();
    world.autoscaler.stale = true;
    world.until("the target rests", |world| {
        let rests = world.status.stage == Stage::Settled;
        assert!(rests || !world.autoscaler.exists, "in {:?}", world.status.stage);
        rests
    });
    world.settle();
    assert_eq!(world.autoscaler, Autoscaler { exists: true, stale: false });
    world.autoscaler.stale = true;
    world.reconcile();
    assert_eq!(actions(&world), [Action::FollowAutoscaler]);
    world.deleting = true;
    world.reconcile();
    assert!(!world.autoscaler.exists, "before the target has Pods again");
    assert_eq!(world.status.stage, Stage::ReturnScale);
}

#[test]
fn an_autoscaler_sees_what_all_users_need_and_not_the_share_of_the_primary() {
    let mut world = judging("v2");
    let all = format!("sluice.dev/canary={},sluice.dev/revision", world.spec.key.name);
    assert_eq!((world.weight() > 0, world.status.selector.as_deref()), (true, Some(&*all)));
    world.until("the release ends", |world| world.status.phase == Phase::Succeeded);
    assert!(!world.status.retiring.is_empty());
    assert_eq!(world.status.selector.as_deref(), Some(&*all));
}

#[test]
fn more_former_revisions_than_the_status_holds_are_not_kept_running() {
    let mut world = World::adopted();
    world.spec.scale_down_delay = Duration::from_secs(86_400);
    for number in 0..40 {
        let revision = format!("r{number}");
        world.apply(&revision);
        world.until("the promotion", |world| world.status.primary_revision.as_deref() == Some(&*revision));
        world.pass_time(10);
        // The schema of the status takes no more.
        assert!(world.status.retiring.len() <= 32, "{}", world.status.retiring.len());
    }
    let running = world.revisions.values().filter(|running| running.desired.unwrap_or(0) > 0).count();
    assert_eq!((world.status.retiring.len(), running), (32, 33));
}

#[test]
fn during_a_release_the_wish_of_an_autoscaler_only_rises() {
    let mut world = judging("v2");
    world.spec.replicas = Some(2);
    world.reconcile();
    assert_eq!(world.desired(FIRST), 3, "fewer wait for the end of the release");
    world.spec.replicas = Some(5);
    world.reconcile();
    assert_eq!(world.desired(FIRST), 5);
    world.spec.replicas = Some(2);
    world.until("the release ends", |world| world.status.phase == Phase::Succeeded);
    world.settle();
    assert_eq!(world.desired("v2"), 2);
}
