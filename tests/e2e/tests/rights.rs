//! Every right of Sluice's service accounts is used by some test of the suite, or named here with its reason. The others are too
//! many. Asks the audit log, so it comes after nearly all others (cargo runs the files by name; what `routing.rs` asks for,
//! others ask for, too), and after the whole suite only.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use sluice_e2e::{
    adopted::{Use, cluster},
    audit,
    cluster::SYSTEM,
    rights::{Roles, Spared, judge},
};

const CONTROLLER: Spared = Spared {
    account: "sluice-controller",
    namespace: None,
    group: "",
    resources: &[],
    names: &[],
    verbs: &[],
    why: "only for what exists already although the cache does not show it: after a crash between a creation and the next look, \
          or where somebody else has the name",
};
const HOOK: Spared = Spared { account: "sluice-uninstall", ..CONTROLLER };

const MUTATING: Spared = Spared {
    group: "admissionregistration.k8s.io",
    resources: &["mutatingadmissionpolicies", "mutatingadmissionpolicybindings"],
    names: &["services.sluice.dev", "deployments.sluice.dev"],
    ..CONTROLLER
};
const VALIDATING: Spared = Spared {
    resources: &["validatingadmissionpolicies", "validatingadmissionpolicybindings"],
    names: &["scale.sluice.dev", "revisions.sluice.dev"],
    ..MUTATING
};
const WEBHOOK: Spared =
    Spared { resources: &["mutatingwebhookconfigurations"], names: &["protection.sluice.dev"], ..MUTATING };

/// For faults that the suite does not cause.
const FAULTS: &[Spared] = &[
    Spared { group: "apps", resources: &["deployments", "controllerrevisions"], verbs: &["get"], ..CONTROLLER },
    Spared { resources: &["services"], verbs: &["get"], ..CONTROLLER },
    Spared { group: "autoscaling", resources: &["horizontalpodautoscalers"], verbs: &["get"], ..CONTROLLER },
    Spared { verbs: &["get"], ..VALIDATING },
    Spared { verbs: &["get"], ..WEBHOOK },
    Spared {
        resources: &["secrets"],
        verbs: &["patch"],
        why: "gives a copy its owners that was left without them by a crash",
        ..CONTROLLER
    },
    Spared {
        namespace: Some(SYSTEM),
        resources: &["secrets"],
        names: &["sluice-ca"],
        verbs: &["update"],
        why: "replaces a root of the controllers' own, a year before its end",
        ..CONTROLLER
    },
    Spared { verbs: &["update"], why: "repairs what somebody has edited", ..VALIDATING },
    Spared {
        verbs: &["delete"],
        why: "with another value of `protection`, which the suite does not set",
        ..VALIDATING
    },
    Spared { verbs: &["delete"], why: "with another value of `protection`, which the suite does not set", ..WEBHOOK },
];

/// For what the API server asks about by itself: no request of ours is in the log.
const IMPLIED: &[Spared] = &[
    Spared {
        group: "sluice.dev",
        resources: &["canaries"],
        verbs: &["get"],
        why: "asked of whoever writes a policy with Canaries as parameters",
        ..CONTROLLER
    },
    Spared {
        namespace: Some(SYSTEM),
        resources: &["configmaps"],
        verbs: &["create"],
        why: "asked of whoever applies what is not there yet",
        ..HOOK
    },
    Spared {
        group: "discovery.k8s.io",
        resources: &["endpointslices/restricted"],
        verbs: &["create"],
        why: "OpenShift asks for it of whoever names addresses of Pods",
        ..CONTROLLER
    },
];

/// What comes with the policies of newer API servers, where they are not served.
const NO_POLICIES: &[Spared] = &[
    Spared { names: &[], verbs: &["list", "watch", "create"], why: WITHOUT, ..MUTATING },
    Spared { verbs: &["get", "update", "delete"], why: WITHOUT, ..MUTATING },
    Spared { account: HOOK.account, verbs: &["get", "delete"], why: WITHOUT, ..MUTATING },
];
const WITHOUT: &str = "this API server serves no MutatingAdmissionPolicy";

/// What the webhook needs, where policies protect in its place.
const POLICIES: &[Spared] = &[
    Spared { verbs: &["get"], ..MUTATING },
    Spared { verbs: &["update"], why: "repairs what somebody has edited", ..MUTATING },
    Spared { verbs: &["delete"], why: "with another value of `protection`, which the suite does not set", ..MUTATING },
    Spared { names: &[], verbs: &["create"], why: INSTEAD, ..WEBHOOK },
    Spared { verbs: &["update"], why: INSTEAD, ..WEBHOOK },
    Spared { account: HOOK.account, verbs: &["delete"], why: INSTEAD, ..WEBHOOK },
];
const INSTEAD: &str = "policies protect in the webhook's place";

/// The copy of an autoscaler.
const NO_AUTOSCALING: &[Spared] = &[Spared {
    group: "autoscaling",
    resources: &["horizontalpodautoscalers"],
    verbs: &["create", "update", "delete"],
    why: "autoscaling was skipped: there is no metrics-server",
    ..CONTROLLER
}];

#[test]
fn what_is_named_as_unused_is_granted_by_the_chart() {
    let chart = Roles::of(include_str!("../../chart/golden/default.yaml")).unwrap().rights().unwrap();
    for list in [FAULTS, IMPLIED, NO_POLICIES, POLICIES, NO_AUTOSCALING] {
        assert_eq!(judge(&chart, &[], list).stale, Vec::<String>::new());
    }
}

#[tokio::test]
#[ignore = "full"]
async fn every_right_is_used_by_the_suite_or_named_with_its_reason() {
    // Without the others' requests it would find nearly all of them unused.
    if std::env::var("SLUICE_SUITE").unwrap_or_default() != "full" {
        println!(
            "SKIPPED: THE RIGHTS WERE NOT COMPARED with what is used; that takes the whole suite in one run (make test-cluster)"
        );
        return;
    }
    if !audit::is_kept() {
        println!(
            "SKIPPED: THE RIGHTS WERE NOT COMPARED with what is used: this cluster keeps no audit log (SLUICE_AUDIT_LOG)"
        );
        return;
    }
    let Some((cluster, _held)) = cluster(Use::Shared).await else { return };
    let mut rights = Roles::installed(&cluster.client).await.unwrap().rights().unwrap();
    assert!(!rights.is_empty(), "no service account of Sluice has any right");
    // The uninstall hook has rights only while it runs.
    let hooks = Roles::of(&cluster.helm(&["get", "hooks", "sluice", "-n", SYSTEM]).await.unwrap()).unwrap();
    let hooks = hooks.rights().unwrap();
    assert!(!hooks.is_empty(), "the uninstall hook has no right");
    rights.extend(hooks);

    let mut spared = [FAULTS, IMPLIED].concat();
    spared.extend_from_slice(if cluster.serves_policies().await.unwrap() { POLICIES } else { NO_POLICIES });
    if std::env::var("METRICS_SERVER").unwrap_or_default().is_empty() {
        spared.extend_from_slice(NO_AUTOSCALING);
    }

    // Another installation has other roles.
    let requests: Vec<_> = audit::requests(0).into_iter().filter(|request| request.home == SYSTEM).collect();
    let verdict = judge(&rights, &requests, &spared);
    println!("{} rights, {} requests of Sluice's service accounts", rights.len(), requests.len());
    println!("not used by any test, and named for it:\n  {}", verdict.spared.join("\n  "));
    if !verdict.used.is_empty() {
        println!("named as unused, and used; they can leave the list:\n  {}", verdict.used.join("\n  "));
    }
    assert!(
        verdict.stale.is_empty(),
        "on the list of unused rights, and granted by no rule:\n  {}",
        verdict.stale.join("\n  ")
    );
    assert!(
        verdict.unused.is_empty(),
        "no test uses these rights. Drop them from the chart, use them in a test, or name them here with the reason:\n  {}",
        verdict.unused.join("\n  ")
    );
}
