//! What a release survives: processes of Sluice killed and frozen, the API server and Prometheus gone, Pods that cannot start,
//! hands that change what is ours. As in `releases.rs`, no request may fail that the version
//! under test did not cause. Counted apart, and printed: what was in flight on a killed process, and new connections until
//! kube-proxy has dropped its address.
//!
//! `cargo test` runs the core; the rest is ignored as "full" (README.md).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use std::time::Duration;

use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{Pod, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams},
};
use serde_json::json;
use sluice_crds::{CanaryStatus, Phase, Stage, VerdictStatus};
use sluice_e2e::{
    adopted::{Adopted, MINUTE, Use, adopted, cluster, condition, eventually, expect, quick, slow, under_load},
    audit,
    cluster::SYSTEM,
    installation::{self, API_SERVER_AWAY, CONTROLLERS_AWAY, controllers, fleet, leader, try_leader},
    load::EVERY_PROTOCOL,
    node::Node,
    problems::roles_are_unread,
    watch::unix_ms,
};

/// The most requests that are in flight on one process at the tests' rate, with room to spare.
const IN_FLIGHT: u64 = 40;
/// By then kube-proxy has dropped a dead address on a slow machine: the kubelet's notice, our slice, its own second.
const DROPPED: u64 = 20_000;
/// The slices that we write for the Service.
const OUR_SLICES: &str = "kubernetes.io/service-name=hello,endpointslice.kubernetes.io/managed-by=sluice.dev";

fn succeeded(status: &CanaryStatus) -> bool {
    status.phase == Phase::Succeeded
}

#[tokio::test]
async fn a_leader_that_is_killed_in_mid_release_leads_again_and_goes_on() {
    let Some(node) = Node::of_ours("to kill a process") else { return };
    let Some(stage) = adopted("kill9", Use::Alone, &[], quick()).await else { return };
    let cluster = stage.app.cluster.clone();
    stage.in_mid_release().await;
    let _expected = expect(CONTROLLERS_AWAY);
    let (killed, epoch) = leader(&cluster).await;
    let at = unix_ms();
    node.signal(&killed, "controller", "KILL").await.unwrap();
    let again = eventually("another term", MINUTE, || async {
        try_leader(&cluster).await.filter(|(_, now)| *now > epoch).map(|(pod, _)| pod)
    })
    .await;
    println!("leads again {} ms after it was killed", unix_ms() - at);
    assert_eq!(again.uid(), killed.uid(), "its own lease is taken back, not waited for");
    let done = stage.wait("phase Succeeded", at, succeeded).await;
    assert_eq!(done.failed_checks, 0);
    stage.end().await;
}

#[tokio::test]
async fn all_controllers_killed_in_mid_release_lose_nothing() {
    let Some(stage) = adopted("kill", Use::Alone, &[], quick()).await else { return };
    stage.in_mid_release().await;
    let pods: Api<Pod> = Api::namespaced(stage.app.cluster.client.clone(), SYSTEM);
    // The token of a Pod that is deleted without grace counts no more when it is told to end.
    let _expected = expect(&[CONTROLLERS_AWAY, &["cannot give the lease back"]].concat());
    let killed = unix_ms();
    for pod in controllers(&stage.app.cluster).await {
        let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
        pods.delete(&pod.name_any(), &now).await.unwrap();
    }
    let done = stage.wait("phase Succeeded", killed, succeeded).await;
    assert_eq!(done.failed_checks, 0);
    stage.end().await;
}

/// What is said of a member that is cut off, by itself and by the leader.
const MEMBER_AWAY: &[&str] = &["no stream to the control plane", "silent for too long"];

/// Begins (`-I`) or ends (`-D`) to drop what the member sends to the controllers' gRPC port.
async fn between_member_and_controllers(node: &Node, action: &str, ip: &str) {
    let rule = ["iptables", action, "FORWARD", "-s", ip, "-p", "tcp", "--dport", "18000", "-j", "DROP"];
    node.exec(&rule).await.unwrap();
}

/// In mid-release. The member's name and address.
async fn cut_off_a_member(stage: &Adopted, node: &Node) -> (String, String) {
    let mut members = fleet(&stage.app.cluster).await;
    // Of one on another node not all that it sends comes by this one.
    members.sort_by_key(|pod| pod.spec.as_ref().and_then(|spec| spec.node_name.clone()));
    let member = members.remove(0);
    let (name, ip) = (member.name_any(), member.status.unwrap().pod_ip.unwrap());
    stage.in_mid_release().await;
    between_member_and_controllers(node, "-I", &ip).await;
    (name, ip)
}

#[tokio::test]
async fn a_fleet_member_cut_off_from_the_controller_serves_on_and_holds_the_release() {
    let Some(node) = Node::of_ours("to cut a connection on its node") else { return };
    let Some(stage) = adopted("cutoff", Use::Alone, &[], quick()).await else { return };
    let _expected = expect(MEMBER_AWAY);
    let (name, ip) = cut_off_a_member(&stage, &node).await;
    let cut = unix_ms();
    let held = stage
        .wait("the member named in the status", cut, |status| {
            status.lagging_members.contains(&name) && status.requested_weight > 20 && status.effective_weight.is_none()
        })
        .await;
    assert_eq!(held.weight, "Unknown");
    // It serves on (the end counts every request), and nothing goes: both revisions keep their Pods.
    for revision in [held.primary_revision.unwrap(), held.canary_revision.unwrap()] {
        assert!(!stage.app.pods_of(&revision).await.unwrap().is_empty());
    }
    between_member_and_controllers(&node, "-D", &ip).await;
    stage.wait("phase Succeeded", cut, succeeded).await;
    stage.end().await;
}

#[tokio::test]
#[ignore = "full"]
async fn a_fleet_member_that_stays_cut_off_gets_no_new_connections_and_holds_nothing_up_for_ever() {
    let Some(node) = Node::of_ours("to cut a connection on its node") else { return };
    let mut spec = quick();
    spec["progressDeadlineSeconds"] = json!(300);
    let Some(stage) = adopted("silent", Use::Alone, &[], spec).await else { return };
    let cluster = stage.app.cluster.clone();
    let _expected = expect(MEMBER_AWAY);
    let (name, ip) = cut_off_a_member(&stage, &node).await;
    let cut = unix_ms();
    let is_marked = async || {
        let pod = installation::pods(&cluster).get(&name).await.unwrap();
        pod.annotations().contains_key("sluice.dev/lagging-since")
    };
    let is_in_slices = async || {
        let of_service = ListParams::default().labels(OUR_SLICES);
        let slices = stage.api::<EndpointSlice>().list(&of_service).await.unwrap();
        slices.iter().flat_map(|slice| &slice.endpoints).any(|endpoint| endpoint.addresses.contains(&ip))
    };
    assert!(is_in_slices().await && !is_marked().await);
    eventually("the mark", 2 * MINUTE, || async { is_marked().await.then_some(()) }).await;
    println!("marked {} ms after it was cut off", unix_ms() - cut);
    eventually("slices without it", MINUTE, || async { (!is_in_slices().await).then_some(()) }).await;
    // It counts until its open connections have had their time; then the others are enough.
    let done = stage.app.history.wait("phase Succeeded", cut, 4 * MINUTE, succeeded).await.unwrap().status;
    println!("promoted {} ms after it was cut off", unix_ms() - cut);
    assert_eq!(done.failed_checks, 0);
    assert!(is_marked().await && !is_in_slices().await);
    // It knows nothing of that, and goes on leading what clients have open to it to a revision that ends now.
    let former = done.retiring.first().map(|retiring| retiring.revision.clone()).unwrap();
    eventually("the end of the former revision's Pods", MINUTE, || async {
        stage.app.pods_of(&former).await.unwrap().is_empty().then_some(())
    })
    .await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    stage.nothing_failed().await;
    between_member_and_controllers(&node, "-D", &ip).await;
    eventually("its return", 2 * MINUTE, || async { (!is_marked().await && is_in_slices().await).then_some(()) }).await;
    stage.end().await;
}

type Reached = fn(&CanaryStatus) -> bool;

/// Kills the leader when the Canary has come so far, and returns when that was.
async fn kill_leader_in(stage: &Adopted, node: Option<&Node>, phase: &str, from_ms: u64, reached: Reached) -> u64 {
    // Asked for before, because some phases are short.
    let (leads, _) = leader(&stage.app.cluster).await;
    stage.wait(phase, from_ms, reached).await;
    let at = unix_ms();
    if let Some(node) = node {
        node.signal(&leads, "controller", "KILL").await.unwrap();
    } else {
        // A new Pod is another holder: the lease has to run out.
        let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
        installation::pods(&stage.app.cluster).delete(&leads.name_any(), &now).await.unwrap();
    }
    at
}

/// A process that is killed is started again at once, and later each further time: sometimes the leader is back before its lease
/// has run out, and sometimes the other controller takes over.
#[tokio::test]
#[ignore = "full"]
async fn a_controller_that_is_killed_in_any_phase_loses_nothing() {
    let node = Node::of_ours("to kill a process; its Pod is deleted instead");
    let node = node.as_ref();
    let Some((cluster, held)) = cluster(Use::Alone).await else { return };
    let phases: [(&str, Reached); 6] = [
        ("Scale", |status| status.stage == Stage::Scale),
        ("Shift", |status| status.stage == Stage::Shift),
        ("Judge", |status| status.stage == Stage::Judge && status.step == Some(1)),
        ("PromoteScale", |status| matches!(status.stage, Stage::PromoteScale | Stage::PromoteShift)),
        ("Finalise", |status| status.stage == Stage::Finalise || status.phase == Phase::Succeeded),
        ("retiring", |status| status.phase == Phase::Succeeded && !status.retiring.is_empty()),
    ];
    let mut stage = under_load(cluster.clone(), held, "anyphase", &[]).await;
    // The token of a Pod that is gone counts no more, while its container may still be stopping.
    let _expected = expect(&[CONTROLLERS_AWAY, &["Unauthorized"]].concat());

    stage.app.canary(quick()).await.unwrap();
    let taking_over: Reached = |status| status.stage == Stage::AdoptRevision;
    let at = kill_leader_in(&stage, node, "AdoptRevision", 0, taking_over).await;
    let taken_over = stage.wait("the takeover", at, |status| status.phase == Phase::Initialized).await;
    println!("killed in AdoptRevision: taken over {} ms later", unix_ms() - at);
    stage.taken_over().await;
    installation::complete(&cluster, "sluice-controller").await;

    // A bad version.
    let applied = stage.app.release(&[("VERSION", "v2"), ("ERROR_RATE", "0.5")]).await.unwrap();
    let taken_back: Reached = |status| status.stage == Stage::RollBack;
    let at = kill_leader_in(&stage, node, "RollBack", applied, taken_back).await;
    let failed = stage
        .wait("the end of the bad version", at, |status| status.phase == Phase::Failed && status.retiring.is_empty())
        .await;
    println!("killed in RollBack: taken back {} ms later", unix_ms() - at);
    assert_eq!(failed.primary_revision, taken_over.primary_revision);
    installation::complete(&cluster, "sluice-controller").await;

    for (count, (phase, reached)) in phases.into_iter().enumerate() {
        let version = format!("v{}", count + 3);
        let applied = stage.app.release(&[("VERSION", &version), ("ERROR_RATE", "0")]).await.unwrap();
        let revision = stage
            .wait("the release", applied, |status| {
                status.phase == Phase::Progressing && status.canary_revision.is_some()
            })
            .await
            .canary_revision;
        let at = kill_leader_in(&stage, node, phase, applied, reached).await;
        let done = stage
            .wait("the promotion", at, |status| {
                status.phase == Phase::Succeeded && status.primary_revision == revision && status.retiring.is_empty()
            })
            .await;
        println!("killed in {phase}: promoted {} ms later", unix_ms() - at);
        assert_eq!(done.failed_checks, 0, "{phase}");
        installation::complete(&cluster, "sluice-controller").await;
    }

    let deleted = unix_ms();
    stage.app.canaries().delete("hello", &DeleteParams::default()).await.unwrap();
    let going_back: Reached = |status| status.stage == Stage::ReturnSwitch;
    let at = kill_leader_in(&stage, node, "ReturnSwitch", deleted, going_back).await;
    stage.handed_back().await;
    println!("killed in ReturnSwitch: handed back {} ms later", unix_ms() - at);
    // New Pods are started again at once, which others rely on.
    cluster.kubectl(&["-n", SYSTEM, "rollout", "restart", "deployment/sluice-controller"], None).await.unwrap();
    installation::complete(&cluster, "sluice-controller").await;
    stage.end().await;
}

#[tokio::test]
#[ignore = "full"]
async fn without_any_controller_for_a_minute_a_release_only_waits() {
    let Some(stage) = adopted("nocontroller", Use::Alone, &[], quick()).await else { return };
    let cluster = stage.app.cluster.clone();
    stage.in_mid_release().await;
    let _expected = expect(CONTROLLERS_AWAY);
    let scale = |replicas: &'static str| {
        let cluster = cluster.clone();
        async move {
            let arguments = ["-n", SYSTEM, "scale", "deployment/sluice-controller", replicas];
            cluster.kubectl(&arguments, None).await.unwrap();
        }
    };
    scale("--replicas=0").await;
    eventually("the end of the controllers", MINUTE, || async { controllers(&cluster).await.is_empty().then_some(()) })
        .await;
    tokio::time::sleep(MINUTE).await;
    stage.nothing_failed().await;
    let back = unix_ms();
    scale("--replicas=2").await;
    installation::complete(&cluster, "sluice-controller").await;
    let done = stage.wait("phase Succeeded", back, succeeded).await;
    assert_eq!(done.failed_checks, 0);
    stage.end().await;
}

#[tokio::test]
#[ignore = "full"]
async fn a_leader_that_is_frozen_beyond_its_lease_writes_nothing_when_it_thaws() {
    let Some(node) = Node::of_ours("to freeze a process") else { return };
    let Some(stage) = adopted("frozen", Use::Alone, &[], slow(8)).await else { return };
    let cluster = stage.app.cluster.clone();
    stage.in_mid_release().await;
    let _expected = expect(CONTROLLERS_AWAY);
    let (frozen, _) = leader(&cluster).await;
    node.signal(&frozen, "controller", "STOP").await.unwrap();
    let at = unix_ms();
    eventually("another leader", MINUTE, || async {
        try_leader(&cluster).await.filter(|(pod, _)| pod.uid() != frozen.uid())
    })
    .await;
    println!("another leads {} ms after the leader was frozen", unix_ms() - at);
    let thawed = unix_ms();
    node.signal(&frozen, "controller", "CONT").await.unwrap();
    let done = stage.wait("phase Succeeded", thawed, succeeded).await;
    assert_eq!(done.failed_checks, 0);
    let (leads, _) = leader(&cluster).await;
    assert_ne!(leads.uid(), frozen.uid());
    // EndpointSlices are every replica's, a pure function of what it sees.
    // What was on its way when it was frozen has ended long before.
    let written: Vec<_> = audit::requests(thawed)
        .into_iter()
        .filter(|request| {
            request.pod == frozen.name_any()
                && request.writes()
                && request.resource != "endpointslices"
                && request.code < 400
        })
        .collect();
    assert!(written.is_empty(), "written by the replica that was frozen: {written:#?}");
    stage.end().await;
}

/// As where the network of Pods is broken on a node, and the node's own is not.
#[tokio::test]
#[ignore = "full"]
async fn a_leader_that_the_fleet_does_not_reach_gives_up_and_the_release_goes_on() {
    let Some(node) = Node::of_ours("to cut the connections of a Pod") else { return };
    // New Pods, too, hear nothing from it until another one leads.
    let mut spec = quick();
    spec["progressDeadlineSeconds"] = json!(300);
    let Some(stage) = adopted("unheard", Use::Alone, &[], spec).await else { return };
    let cluster = stage.app.cluster.clone();
    stage.in_mid_release().await;
    let _expected = expect(&[MEMBER_AWAY, CONTROLLERS_AWAY, &["it gives up its term"]].concat());
    let (unheard, epoch) = leader(&cluster).await;
    let cut_off = async |action| {
        let rule = ["iptables", action, "INPUT", "-p", "tcp", "--dport", "18000", "-j", "DROP"];
        node.exec_beside(&unheard, "controller", &rule).await.unwrap();
    };
    cut_off("-I").await;
    let at = unix_ms();
    let (next, _) = eventually("another leader", 3 * MINUTE, || async {
        try_leader(&cluster).await.filter(|(_, now)| *now > epoch)
    })
    .await;
    println!("another leads {} ms after the fleet was cut off from the leader", unix_ms() - at);
    assert_ne!(next.uid(), unheard.uid());
    let done = stage.wait("phase Succeeded", unix_ms(), succeeded).await;
    assert_eq!(done.failed_checks, 0);
    // It lives on, as a standby.
    let (leads, _) = leader(&cluster).await;
    assert_eq!(leads.uid(), next.uid());
    cut_off("-D").await;
    stage.end().await;
}

#[tokio::test]
async fn a_fleet_proxy_that_is_killed_takes_only_what_it_had_in_flight() {
    let Some(node) = Node::of_ours("to kill a process") else { return };
    let Some(mut stage) = adopted("fleetkill", Use::Alone, &[], quick()).await else { return };
    let cluster = stage.app.cluster.clone();
    stage.in_mid_release().await;
    let _expected = expect(&["the container was restarted", "silent for too long"]);
    let member = fleet(&cluster).await.remove(0);
    let at = unix_ms();
    node.signal(&member, "proxy", "KILL").await.unwrap();
    let done = stage.wait("phase Succeeded", at, succeeded).await;
    assert_eq!(done.failed_checks, 0);
    installation::fleet_is_ready(&cluster, 2).await;
    let apart = stage.counted_apart("a fleet proxy killed", at).await;
    assert!(apart.kept <= IN_FLIGHT && apart.window_ms <= DROPPED, "{apart:?}");
    stage.end().await;
}

#[tokio::test]
#[ignore = "full"]
async fn a_fleet_pod_that_is_deleted_without_grace_takes_only_what_it_had_in_flight() {
    let Some(mut stage) = adopted("fleetgone", Use::Alone, &[], quick()).await else { return };
    let cluster = stage.app.cluster.clone();
    stage.in_mid_release().await;
    let _expected = expect(&["silent for too long"]);
    let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
    let member = fleet(&cluster).await.remove(0).name_any();
    let at = unix_ms();
    installation::pods(&cluster).delete(&member, &now).await.unwrap();
    let done = stage.wait("phase Succeeded", at, succeeded).await;
    assert_eq!(done.failed_checks, 0);
    installation::fleet_is_ready(&cluster, 2).await;
    let apart = stage.counted_apart("a fleet Pod deleted without grace", at).await;
    assert!(apart.kept <= IN_FLIGHT && apart.window_ms <= DROPPED, "{apart:?}");
    stage.end().await;
}

#[tokio::test]
#[ignore = "full"]
async fn the_fleet_is_restarted_in_mid_release_without_a_failed_request() {
    let Some(stage) = adopted("fleetroll", Use::Alone, &[], slow(8)).await else { return };
    let cluster = stage.app.cluster.clone();
    stage.in_mid_release().await;
    let at = unix_ms();
    cluster.kubectl(&["-n", SYSTEM, "rollout", "restart", "deployment/sluice-fleet"], None).await.unwrap();
    installation::complete(&cluster, "sluice-fleet").await;
    println!("the fleet was replaced within {} ms", unix_ms() - at);
    let done = stage.wait("phase Succeeded", at, succeeded).await;
    assert_eq!(done.failed_checks, 0);
    installation::fleet_is_ready(&cluster, 2).await;
    stage.end().await;
}

#[tokio::test]
#[ignore = "full"]
async fn a_sidecar_that_is_killed_takes_only_what_it_had_in_flight() {
    let Some(node) = Node::of_ours("to kill a process") else { return };
    let Some(mut stage) = adopted("sidecar", Use::Shared, EVERY_PROTOCOL, quick()).await else { return };
    let judged = stage.in_mid_release().await;
    let _expected = expect(&[&stage.app.namespace]);
    let name = stage.app.pods_of(&judged.primary_revision.unwrap()).await.unwrap().remove(0);
    let pod = stage.api::<Pod>().get(&name).await.unwrap();
    let statuses = pod.status.as_ref().unwrap().init_container_statuses.clone().unwrap();
    let sidecar = statuses.into_iter().find(|status| status.image.contains("sluice-proxy")).unwrap().name;
    let at = unix_ms();
    node.signal(&pod, &sidecar, "KILL").await.unwrap();
    let done = stage.wait("phase Succeeded", at, succeeded).await;
    assert_eq!(done.failed_checks, 0);
    let apart = stage.counted_apart("a sidecar killed", at).await;
    assert!(apart.kept + apart.new + apart.calls <= IN_FLIGHT, "{apart:?}");
    stage.end().await;
}

#[tokio::test]
#[ignore = "full"]
async fn without_api_server_for_a_minute_a_release_only_waits() {
    let Some(node) = Node::of_ours("to stop the API server") else { return };
    // Kubernetes' own controllers and scheduler try again only after up to half a minute: until then no Pod starts.
    let mut spec = quick();
    spec["progressDeadlineSeconds"] = json!(120);
    let Some(stage) = adopted("noapi", Use::Alone, &[], spec).await else { return };
    let cluster = stage.app.cluster.clone();
    stage.in_mid_release().await;
    let _expected = expect(&[CONTROLLERS_AWAY, API_SERVER_AWAY].concat());
    let at = unix_ms();
    installation::without_api_server(&cluster, &node, MINUTE).await;
    println!("the API server answers again {} ms after it was stopped", unix_ms() - at);
    let back = unix_ms();
    let done = stage.app.history.wait("phase Succeeded", back, 4 * MINUTE, succeeded).await.unwrap().status;
    println!("promoted {} ms after the API server was back", unix_ms() - back);
    assert_eq!(done.failed_checks, 0);
    stage.end().await;
}

#[tokio::test]
#[ignore = "full"]
async fn after_a_restore_of_etcd_what_the_snapshot_says_is_so_and_releases_go_on() {
    let Some(node) = Node::of_ours("to restore etcd") else { return };
    let mut spec = quick();
    spec["progressDeadlineSeconds"] = json!(120);
    let Some(mut stage) = adopted("restore", Use::Alone, &[], spec).await else { return };
    let cluster = stage.app.cluster.clone();
    let _expected = expect(&[CONTROLLERS_AWAY, API_SERVER_AWAY, &["taken back in time"]].concat());
    let first = stage.app.history.last().unwrap().status.primary_revision;
    node.etcd("save").await.unwrap();

    // What is forgotten: a promotion, and the end of the Pods from before.
    let applied = stage.app.release(&[("VERSION", "v2")]).await.unwrap();
    stage.app.ends(applied, Phase::Succeeded, 2 * MINUTE).await.unwrap();
    stage.wait("the first revision's end", applied, |status| succeeded(status) && status.retiring.is_empty()).await;
    let at = unix_ms();
    let _unread = roles_are_unread();
    node.etcd("restore").await.unwrap();
    println!("restored within {} ms", unix_ms() - at);
    let serves = |status: &CanaryStatus| {
        status.primary_revision == first && status.stage == Stage::Settled && condition(status, "Ready").0 == "True"
    };
    stage.app.history.wait("the first revision", at, 4 * MINUTE, serves).await.unwrap();
    eventually("answers of the first version alone", 4 * MINUTE, || async {
        let from = unix_ms();
        tokio::time::sleep(Duration::from_secs(4)).await;
        let (first, second) = (stage.answers_of("v1", from).await, stage.answers_of("v2", from).await);
        (first > 0 && second == 0 && stage.load.failures_since(from).is_empty()).then_some(())
    })
    .await;
    println!("the first version serves {} ms after it began", unix_ms() - at);
    // Kubernetes itself has to start the Pods of then once more.
    let apart = stage.counted_apart("the restore of etcd", at).await;
    assert!(apart.window_ms <= 180_000, "{apart:?}");

    // Whatever came back is owned as it was.
    let canary = stage.app.canaries().get("hello").await.unwrap();
    let deployment = stage.api::<Deployment>().get(&format!("hello-{}", first.unwrap())).await.unwrap();
    let owners = deployment.metadata.owner_references.unwrap();
    assert!(owners.iter().any(|owner| Some(&owner.uid) == canary.metadata.uid.as_ref()), "{owners:?}");
    installation::fleet_is_ready(&cluster, 2).await;
    let applied = stage.app.release(&[("VERSION", "v3")]).await.unwrap();
    stage.app.ends(applied, Phase::Succeeded, 2 * MINUTE).await.unwrap();
    stage.end().await;
}

#[tokio::test]
async fn prometheus_down_or_empty_holds_the_release_and_is_not_a_failed_check() {
    let Some(stage) = adopted("noprom", Use::Alone, &[], quick()).await else { return };
    let cluster = stage.app.cluster.clone();
    let scale = |replicas: &'static str| {
        let cluster = cluster.clone();
        async move {
            let replicas = format!("--replicas={replicas}");
            cluster.kubectl(&["-n", SYSTEM, "scale", "deployment/prometheus", &replicas], None).await.unwrap();
        }
    };
    stage.in_mid_release().await;
    let gone = unix_ms();
    scale("0").await;
    let held = stage
        .wait("an error verdict", gone, |status| status.gates.iter().any(|gate| gate.verdict == VerdictStatus::Error))
        .await;
    assert_eq!((held.failed_checks, held.requested_weight), (0, 20));
    // A new, empty Prometheus: too few samples first, then it goes on.
    let restarted = unix_ms();
    scale("1").await;
    let done = stage.wait("phase Succeeded", restarted, succeeded).await;
    assert_eq!(done.failed_checks, 0);
    stage.end().await;
}

#[tokio::test]
#[ignore = "full"]
async fn prometheus_frozen_or_blind_for_one_member_holds_the_release_and_says_so() {
    let Some(node) = Node::of_ours("to freeze a process and cut a connection") else { return };
    let Some(stage) = adopted("blind", Use::Alone, &[], quick()).await else { return };
    let cluster = stage.app.cluster.clone();
    let all = installation::pods(&cluster).list(&ListParams::default().labels("app=prometheus")).await.unwrap();
    let prometheus = all.items.into_iter().next().unwrap();
    let judged = stage.in_mid_release().await;

    // Frozen: it accepts connections and never answers.
    let at = unix_ms();
    node.signal(&prometheus, "prometheus", "STOP").await.unwrap();
    let held = stage
        .wait("an error verdict", at, |status| status.gates.iter().any(|gate| gate.verdict == VerdictStatus::Error))
        .await;
    assert_eq!((held.failed_checks, held.requested_weight), (0, judged.requested_weight));
    node.signal(&prometheus, "prometheus", "CONT").await.unwrap();

    // One member is not scraped.
    let member = fleet(&cluster).await.remove(0);
    let from = prometheus.status.as_ref().unwrap().pod_ip.clone().unwrap();
    let to = member.status.as_ref().unwrap().pod_ip.clone().unwrap();
    let rule = ["FORWARD", "-s", &from, "-d", &to, "-p", "tcp", "--dport", "20444", "-j", "DROP"];
    node.exec(&[&["iptables", "-I"], &rule[..]].concat()).await.unwrap();
    let at = unix_ms();
    let held = stage
        .wait("an inconclusive verdict that names the member", at, |status| {
            status
                .gates
                .iter()
                .any(|gate| gate.verdict == VerdictStatus::Inconclusive && gate.message.contains(&member.name_any()))
        })
        .await;
    assert_eq!(held.failed_checks, 0);
    node.exec(&[&["iptables", "-D"], &rule[..]].concat()).await.unwrap();
    let done = stage.wait("phase Succeeded", at, succeeded).await;
    assert_eq!(done.failed_checks, 0);
    stage.end().await;
}

#[tokio::test]
#[ignore = "full"]
async fn a_version_that_cannot_start_ends_by_the_progress_deadline_and_says_why() {
    let Some(stage) = adopted("nostart", Use::Shared, &[], quick()).await else { return };
    let deployments = stage.api::<Deployment>();
    let template = |spec: serde_json::Value| Patch::Strategic(json!({"spec": {"template": {"spec": spec}}}));
    let container = |more: serde_json::Value| {
        let mut container = json!({"name": "hello"});
        container.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({"containers": [container]})
    };
    let image = format!("localhost/sluice-hello:{}", stage.app.cluster.tag);
    let cases = [
        ("image", container(json!({"image": "localhost/none:1"})), container(json!({"image": image})), "Image"),
        (
            "unschedulable",
            json!({"nodeSelector": {"nowhere": "at-all"}}),
            json!({"nodeSelector": null}),
            "nodes are available",
        ),
        (
            "quota",
            container(json!({"resources": {"requests": {"memory": "64Gi"}}})),
            container(json!({"resources": {"requests": {"memory": "16Mi"}}})),
            "exceeded quota",
        ),
    ];
    let quota = json!({
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "quota"},
        "spec": {"hard": {"requests.memory": "60Gi"}},
    });
    for (name, bad, good, says) in cases {
        if name == "quota" {
            stage.app.cluster.apply(&stage.app.namespace, &quota.to_string()).await.unwrap();
        }
        let applied = unix_ms();
        deployments.patch("hello", &PatchParams::default(), &template(bad)).await.unwrap();
        let done = stage.app.ends(applied, Phase::Failed, 2 * MINUTE).await.unwrap().status;
        let (_, _, message) = condition(&done, "Stalled");
        println!("{name}: {message}");
        assert!(message.contains("ProgressDeadlineExceeded") && message.contains(says), "{name}: {message}");
        let reverted = unix_ms();
        deployments.patch("hello", &PatchParams::default(), &template(good)).await.unwrap();
        stage
            .wait("the revert", reverted, |status| {
                let template = status.template.as_ref().map(|template| &template.revision);
                status.stage == Stage::Settled && template == status.primary_revision.as_ref()
            })
            .await;
    }
    stage.end().await;
}

#[tokio::test]
#[ignore = "full"]
async fn what_hands_change_of_ours_is_repaired() {
    let Some(mut stage) = adopted("hands", Use::Shared, &[], quick()).await else { return };
    let namespace = stage.app.namespace.clone();
    let cluster = stage.app.cluster.clone();
    let kubectl = |arguments: Vec<String>| {
        let (cluster, namespace) = (cluster.clone(), namespace.clone());
        async move {
            let all: Vec<_> = ["-n", &namespace].into_iter().chain(arguments.iter().map(String::as_str)).collect();
            cluster.kubectl(&all, None).await
        }
    };
    let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let primary = stage.app.history.last().unwrap().status.primary_revision.unwrap();
    let revision = format!("hello-{primary}");

    // The selector key and the label of the Service.
    let at = unix_ms();
    let patch = r#"{"metadata":{"labels":{"sluice.dev/canary":null}},"spec":{"selector":{"sluice.dev/fleet":null}}}"#;
    kubectl([words("patch service hello --type=merge -p"), vec![patch.to_owned()]].concat()).await.unwrap();
    eventually("the key", MINUTE, || async {
        let service = stage.api::<Service>().get("hello").await.unwrap();
        service.spec.unwrap().selector.unwrap().contains_key("sluice.dev/fleet").then_some(())
    })
    .await;
    println!("the selector key was away for at most {} ms", unix_ms() - at);
    stage.nothing_failed().await;

    // A companion's selector and ports.
    let patch = r#"{"spec":{"ports":[{"name":"http","port":81,"targetPort":81}]}}"#;
    kubectl([words("patch service hello-primary --type=merge -p"), vec![patch.to_owned()]].concat()).await.unwrap();
    eventually("the companion's port", MINUTE, || async {
        let service = stage.api::<Service>().get("hello-primary").await.unwrap();
        service.spec.unwrap().ports.unwrap().iter().any(|port| port.port == 80).then_some(())
    })
    .await;
    kubectl(words("delete service hello-canary")).await.unwrap();
    eventually("the companion", MINUTE, || async { stage.api::<Service>().get_opt("hello-canary").await.unwrap() })
        .await;

    // The target at rest is scaled by a write of its spec.
    kubectl([words("patch deployment hello --type=merge -p"), vec![r#"{"spec":{"replicas":2}}"#.to_owned()]].concat())
        .await
        .unwrap();
    eventually("the target's rest", MINUTE, || async {
        (stage.api::<Deployment>().get("hello").await.unwrap().spec.unwrap().replicas == Some(0)).then_some(())
    })
    .await;
    stage.nothing_failed().await;

    // Another template for a revision.
    let refused =
        kubectl(vec!["rollout".into(), "restart".into(), format!("deployment/{revision}")]).await.unwrap_err();
    assert!(format!("{refused:#}").contains("change the Deployment that its Canary names"), "{refused:#}");

    // The owners of a revision's Deployment.
    let patch = r#"{"metadata":{"ownerReferences":null}}"#;
    kubectl(vec![
        "patch".into(),
        "deployment".into(),
        revision.clone(),
        "--type=merge".into(),
        "-p".into(),
        patch.into(),
    ])
    .await
    .unwrap();
    eventually("the revision's owners", MINUTE, || async {
        (!stage.api::<Deployment>().get(&revision).await.unwrap().owner_references().is_empty()).then_some(())
    })
    .await;

    // The slice of the fleet: new connections are refused until it is there again.
    let slices: Api<EndpointSlice> = Api::namespaced(stage.app.cluster.client.clone(), &namespace);
    let of_service = ListParams::default().labels(OUR_SLICES);
    let at = unix_ms();
    for slice in slices.list(&of_service).await.unwrap() {
        slices.delete(&slice.name_any(), &DeleteParams::default()).await.unwrap();
    }
    eventually("the slice", MINUTE, || async {
        (!slices.list(&of_service).await.unwrap().items.is_empty()).then_some(())
    })
    .await;
    println!("the slice was away for {} ms", unix_ms() - at);
    let name = slices.list(&of_service).await.unwrap().items.remove(0).name_any();
    let emptied = Patch::Merge(json!({"endpoints": []}));
    slices.patch(&name, &PatchParams::default(), &emptied).await.unwrap();
    eventually("the endpoints", MINUTE, || async {
        let slice = slices.get_opt(&name).await.unwrap()?;
        (slice.endpoints.len() == 2).then_some(())
    })
    .await;
    // kube-proxy takes a moment for either.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let apart = stage.counted_apart("our slice deleted and emptied", at).await;
    assert!(apart.window_ms <= DROPPED, "{apart:?}");

    // A revision scaled down by hand: one Pod goes as in any scale-down, and comes back.
    kubectl(vec!["scale".into(), "deployment".into(), revision.clone(), "--replicas=1".into()]).await.unwrap();
    eventually("the capacity", MINUTE, || async {
        let deployment = stage.api::<Deployment>().get(&revision).await.unwrap();
        (deployment.spec.unwrap().replicas == Some(2)).then_some(())
    })
    .await;
    eventually("two ready Pods", 2 * MINUTE, || async {
        let deployment = stage.api::<Deployment>().get(&revision).await.unwrap();
        (deployment.status.unwrap().ready_replicas == Some(2)).then_some(())
    })
    .await;
    let applied = stage.app.release(&[("VERSION", "v2")]).await.unwrap();
    stage.app.ends(applied, Phase::Succeeded, 2 * MINUTE).await.unwrap();
    stage.end().await;
}
