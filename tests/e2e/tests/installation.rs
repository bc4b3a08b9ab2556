//! The installation itself changes under load: upgraded, rolled back, uninstalled and installed again. No request fails, and no
//! Pod of a user is restarted.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::{Api, ResourceExt as _, api::ListParams};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, KeyUsagePurpose};
use serde_json::{Value, json};
use sluice_crds::{Canary, CanaryStatus, Phase, Stage, labels};
use sluice_e2e::{
    adopted::{
        Adopted, MINUTE, Use, adopted, at_weight_20, cluster, ended, eventually, expect, of_ours, quick, quiet, slow,
        under_load_in, uninstalled, unique,
    },
    cluster::{Cluster, SYSTEM},
    installation::{self, CONTROLLERS_AWAY},
    watch::unix_ms,
};
use tokio::task::JoinHandle;

/// Names of all Pods of the application, and how often containers of them were restarted.
async fn application_pods(stage: &Adopted) -> Vec<(String, i32)> {
    let status = stage.app.history.last().unwrap().status;
    let pods = stage.api::<Pod>();
    let mut found = Vec::new();
    for revision in [status.primary_revision, status.canary_revision].into_iter().flatten() {
        let of_it = ListParams::default().labels(&format!("sluice.dev/canary=hello,sluice.dev/revision={revision}"));
        found.extend(pods.list(&of_it).await.unwrap().iter().map(|pod| (pod.name_any(), restarts(pod))));
    }
    found.sort();
    found
}

fn restarts(pod: &Pod) -> i32 {
    let Some(status) = &pod.status else { return 0 };
    // Sidecars are init containers.
    let all = status.init_container_statuses.iter().chain(&status.container_statuses).flatten();
    all.map(|container| container.restart_count).sum()
}

/// Releases this version, changes the installation while the canary has a fifth of the traffic, and waits for the promotion. No request
/// fails, and no Pod of the application is restarted.
async fn in_mid_release(stage: &Adopted, version: &str, what: &str, change: impl Future<Output = ()>) {
    let applied = stage.app.release(&[("VERSION", version)]).await.unwrap();
    stage.wait("weight 20", applied, at_weight_20).await;
    // However long the change takes, it ends in mid-release, too.
    stage.app.patch_canary(json!({"suspend": true})).await.unwrap();
    let before = application_pods(stage).await;
    let at = unix_ms();
    change.await;
    println!("{what} within {} ms", unix_ms() - at);
    assert_eq!(before, application_pods(stage).await, "{what}: a Pod of the application was restarted");
    stage.nothing_failed().await;
    let resumed = stage.app.patch_canary(json!({"suspend": false})).await.unwrap();
    let ended = |status: &CanaryStatus| {
        status.phase == Phase::Succeeded && status.stage == Stage::Settled && status.retiring.is_empty()
    };
    stage.wait("the promotion and the old revision's end", resumed, ended).await;
}

#[tokio::test]
#[ignore = "full"]
async fn helm_upgrade_and_helm_rollback_under_load_lose_no_request_and_restart_no_pod() {
    let Some(stage) = adopted("upgrade", Use::Alone, &[], slow(10)).await else { return };
    let cluster = stage.app.cluster.clone();
    let _expected = expect(CONTROLLERS_AWAY);
    let values =
        ["controller.podAnnotations.test=x", "fleet.podAnnotations.test=x", "sidecar.resources.requests.memory=32Mi"];
    in_mid_release(&stage, "v2", "upgraded", installation::upgrade(&cluster, &values)).await;
    let rollback = async || {
        cluster.helm(&["rollback", "sluice", "-n", SYSTEM, "--wait", "--timeout", "280s"]).await.unwrap();
        // What the Pod of the test prints.
        let _says = expect(&["sluice-test/passed"]);
        cluster.helm(&["test", "sluice", "-n", SYSTEM, "--timeout", "120s"]).await.unwrap();
    };
    in_mid_release(&stage, "v3", "rolled back", rollback()).await;
    installation::fleet_is_ready(&cluster, 2).await;
    assert_eq!(stage.app.history.last().unwrap().status.stage, Stage::Settled);
    stage.end().await;
}

#[tokio::test]
#[ignore = "full"]
async fn an_older_version_and_this_one_drive_each_others_proxies() {
    let Some(old) = std::env::var("SLUICE_OLD").ok().filter(|old| !old.is_empty()) else {
        println!("SKIPPED: SLUICE_OLD names no older version (tests/skew)");
        return;
    };
    let Some(stage) = adopted("skew", Use::Alone, &[], quick()).await else { return };
    let cluster = stage.app.cluster.clone();
    let _expected = expect(CONTROLLERS_AWAY);
    // Its controllers and fleet take over a release of today, with sidecars of today.
    let to_old = async || cluster.install_version(&format!("{old}/charts/sluice"), "old", &[]).await.unwrap();
    in_mid_release(&stage, "v2", "brought to the older version", to_old()).await;

    // Today's controllers end what the older ones have begun, with a fleet and sidecars that are older.
    let controllers = installation::upgrade(&cluster, &["image.proxy.repository=sluice-old-proxy"]);
    in_mid_release(&stage, "v3", "controllers brought to this version", controllers).await;

    // Today's controllers make a revision with older sidecars, and today's fleet ends its release.
    let fleet = installation::upgrade(&cluster, &[]);
    in_mid_release(&stage, "v4", "the fleet brought to this version", fleet).await;

    // Today's throughout, beside older sidecars.
    let applied = stage.app.release(&[("VERSION", "v5")]).await.unwrap();
    stage.app.ends(applied, Phase::Succeeded, 2 * MINUTE).await.unwrap();
    stage.end().await;
}

#[tokio::test]
#[ignore = "full"]
async fn helm_uninstall_hands_every_canary_back_and_a_later_installation_takes_it_over_again() {
    let Some(mut stage) = adopted("uninstall", Use::Alone, &[], slow(10)).await else { return };
    let cluster = stage.app.cluster.clone();
    let _expected = expect(&[SYSTEM]);
    let uninstall = |timeout| ["uninstall", "sluice", "-n", SYSTEM, "--wait", "--timeout", timeout];

    // The Deployment asks for a version that is not promoted yet: everybody would get it.
    let applied = stage.app.release(&[("VERSION", "v2")]).await.unwrap();
    stage.wait("weight 20", applied, at_weight_20).await;
    // Helm 4 waits for it, however early the hook says no.
    cluster.helm(&uninstall("60s")).await.unwrap_err();
    let said = cluster.kubectl(&["logs", "-n", SYSTEM, "job/sluice-uninstall"], None).await.unwrap();
    assert!(said.contains("/hello ask for a version that was not promoted"), "{said}");
    stage.wait("phase Succeeded", applied, |status| status.phase == Phase::Succeeded).await;

    let at = unix_ms();
    cluster.helm(&uninstall("280s")).await.unwrap();
    println!("uninstalled within {} ms", unix_ms() - at);
    stage.nothing_failed().await;
    for kinds in ["mutatingwebhookconfigurations", "validatingadmissionpolicies", "clusterroles"] {
        let found = cluster.kubectl(&["get", kinds, "-o", "name"], None).await.unwrap();
        assert!(!found.contains("sluice"), "{found}");
    }
    assert_eq!(of_ours(&cluster, &stage.app.namespace).await, Vec::<String>::new());
    let bundles: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), &stage.app.namespace);
    assert!(bundles.get_opt(labels::TRUST_BUNDLE).await.unwrap().is_none(), "the trust bundle went, too");
    let canary = stage.app.canaries().get("hello").await.unwrap();
    assert!(canary.finalizers().is_empty());
    assert_eq!(canary.status.unwrap().phase, Phase::Terminated);

    stage.serves_itself();
    let at = unix_ms();
    installation::upgrade(&cluster, &[]).await;
    stage.wait("the second takeover", at, |status| status.phase == Phase::Initialized).await;
    stage.taken_over().await;
    stage.end().await;
}

/// A root certificate that is made outside of the cluster, as the Secret that `ca.source: secret` waits for.
fn own_root() -> (String, String) {
    let key = KeyPair::generate().unwrap();
    let mut root = CertificateParams::default();
    root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    root.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate = root.self_signed(&key).unwrap().pem();
    let data = json!({"tls.crt": certificate, "tls.key": key.serialize_pem()});
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls", "metadata": {"name": "sluice-ca"}, "stringData": data,
    });
    (secret.to_string(), certificate)
}

/// Applies all the time what docs/gitops.md calls strict Git: what Sluice adds is in it, and no replicas.
struct StrictGit {
    objects: Arc<Mutex<Vec<Value>>>,
    task: JoinHandle<()>,
}

impl StrictGit {
    fn start(cluster: &Cluster, namespace: &str) -> Self {
        let manifest = cluster.tagged("examples/hello/deployment.yaml").unwrap();
        let mut objects: Vec<Value> = serde_saphyr::from_multiple(&manifest).unwrap();
        for object in &mut objects {
            let Some(spec) = object.get_mut("spec") else { continue };
            match spec.get("template") {
                Some(_) => drop(spec.as_object_mut().unwrap().remove("replicas")),
                None if spec.get("selector").is_some() => spec["selector"][labels::FLEET] = json!("hello"),
                None => {}
            }
        }
        let objects = Arc::new(Mutex::new(objects));
        let (cluster, namespace, git) = (cluster.clone(), namespace.to_owned(), Arc::clone(&objects));
        let task = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_millis(500));
            loop {
                ticks.tick().await;
                let objects: Vec<_> = git.lock().unwrap().iter().map(Value::to_string).collect();
                cluster.apply(&namespace, &objects.join("\n---\n")).await.unwrap();
            }
        });
        Self { objects, task }
    }

    fn commit(&self, version: &str, error_rate: &str) -> u64 {
        for object in self.objects.lock().unwrap().iter_mut() {
            let Some(list) = object.pointer_mut("/spec/template/spec/containers/0/env") else { continue };
            for entry in list.as_array_mut().unwrap() {
                match entry["name"].as_str() {
                    Some("VERSION") => entry["value"] = json!(version),
                    Some("ERROR_RATE") => entry["value"] = json!(error_rate),
                    _ => {}
                }
            }
        }
        unix_ms()
    }
}

impl Drop for StrictGit {
    fn drop(&mut self) {
        assert!(std::thread::panicking() || !self.task.is_finished(), "Git was refused");
        self.task.abort();
    }
}

/// Everything that the defaults are not: one namespace with Roles, a member of the fleet on every node, a root certificate of the
/// user's own, and nobody but Git itself who keeps what Sluice adds.
#[tokio::test]
#[ignore = "full"]
async fn an_installation_for_one_namespace_with_a_daemon_set_and_a_root_of_ones_own_does_the_same() {
    let Some((cluster, held)) = cluster(Use::Alone).await else { return };
    let _expected = expect(&[SYSTEM]);
    cluster.helm(&["uninstall", "sluice", "-n", SYSTEM, "--wait", "--timeout", "280s"]).await.unwrap();
    uninstalled().await;

    let namespace = unique("own");
    cluster.namespace(&namespace).await.unwrap();
    let (secret, root) = own_root();
    cluster.apply(&namespace, &secret).await.unwrap();
    // Proxies and controllers start at once, and some are there before those that they need.
    let starting = expect(&[&namespace]);
    // The CRDs are the first installation's, which left them.
    let values = ["namespaced=true", "fleet.kind=DaemonSet", "ca.source=secret", "crds.install=false"];
    cluster.install_in(&namespace, "charts/sluice", &cluster.tag, &values).await.unwrap();
    drop(starting);

    let mut stage = under_load_in(cluster.clone(), held, &namespace, &[]).await;
    // One that is elsewhere is nobody's: it is not even looked at.
    let elsewhere = unique("elsewhere");
    cluster.namespace(&elsewhere).await.unwrap();
    let canary = cluster.file("examples/hello/canary.yaml").unwrap();
    cluster.apply(&elsewhere, &canary).await.unwrap();
    stage.app.canary(quick()).await.unwrap();
    stage.taken_over().await;
    let bundle = stage.api::<ConfigMap>().get(labels::TRUST_BUNDLE).await.unwrap().data.unwrap_or_default();
    assert_eq!(bundle["ca.crt"].trim(), root.trim(), "another root than ours is trusted");

    let protection = || async {
        let kinds = "mutatingwebhookconfigurations,validatingadmissionpolicies,validatingadmissionpolicybindings";
        let found = cluster.kubectl(&["get", kinds, "-o", "name"], None).await.unwrap();
        found.lines().filter(|name| name.ends_with(&format!(".{namespace}.sluice.dev"))).count()
    };
    assert_ne!(protection().await, 0, "nothing protects what is added");
    let scale = ["-n", &namespace, "scale", "deployment/hello", "--replicas=3"];
    let refused = cluster.kubectl(&scale, None).await.unwrap_err().to_string();
    assert!(refused.contains("scale canary"), "{refused}");
    {
        let _restarts = expect(&[&namespace]);
        let values = [&values[..], &["protection=none"]].concat();
        cluster.install_in(&namespace, "charts/sluice", &cluster.tag, &values).await.unwrap();
        eventually("the protection to go", MINUTE, || async { (protection().await == 0).then_some(()) }).await;
    }
    let git = StrictGit::start(&cluster, &namespace);
    let committed = git.commit("v2", "0");
    stage.app.ends(committed, Phase::Succeeded, 2 * MINUTE).await.unwrap();
    let committed = git.commit("v3", "0.5");
    stage.app.ends(committed, Phase::Failed, 2 * MINUTE).await.unwrap();
    let committed = git.commit("v2", "0");
    let reverted = |status: &CanaryStatus| {
        let template = status.template.as_ref().map(|template| &template.revision);
        status.stage == Stage::Settled && status.retiring.is_empty() && template == status.primary_revision.as_ref()
    };
    stage.wait("the revert", committed, reverted).await;
    // Settled, with a tool that goes on: nobody has anything to change.
    stage.comes_to_rest().await;
    quiet(&cluster, &namespace).await;
    drop(git);
    let nodes = cluster.kubectl(&["get", "nodes", "-o", "name"], None).await.unwrap().lines().count();
    let on = [
        "-n",
        &namespace,
        "get",
        "pods",
        "-l",
        "app.kubernetes.io/component=fleet",
        "-o",
        "jsonpath={.items[*].spec.nodeName}",
    ];
    let on = cluster.kubectl(&on, None).await.unwrap();
    assert_eq!(on.split_whitespace().collect::<std::collections::BTreeSet<_>>().len(), nodes, "members are on {on}");
    stage.nothing_failed().await;

    let _ends = expect(&[&namespace]);
    cluster.helm(&["uninstall", "sluice", "-n", &namespace, "--wait", "--timeout", "280s"]).await.unwrap();
    assert_eq!(of_ours(&cluster, &namespace).await, Vec::<String>::new());
    stage.nothing_failed().await;
    let there: Api<Canary> = Api::namespaced(cluster.client.clone(), &elsewhere);
    assert_eq!(there.get("hello").await.unwrap().status, None, "a Canary of another namespace was looked at");
    cluster.kubectl(&["delete", "namespace", &elsewhere], None).await.unwrap();

    let Adopted { app, load, .. } = stage;
    drop(load);
    app.canaries().delete("hello", &kube::api::DeleteParams::default()).await.unwrap();
    installation::upgrade(&cluster, &[]).await;
    ended(app).await;
}
