//! What the keeper writes cluster-wide: policies or a webhook, repaired, replaced and removed; and what they mean while no controller
//! answers.

use std::{sync::Arc, time::Duration};

use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{ConfigMap, Pod, Service},
};
use kube::{
    Api, Client, ResourceExt,
    api::{ApiResource, DeleteParams, DynamicObject, Patch, PatchParams, PostParams},
    core::GroupVersionKind,
};
use serde_json::json;
use sluice_controller::admission::{
    Effective, Keeper, Pace, Protection, Uninstall,
    decision::CHECK,
    objects::{self, Address},
};
use sluice_crds::{Canary, labels};
use tokio::{sync::Mutex as AsyncMutex, task::JoinSet};

use crate::{
    admission::{
        FLUX, POLICIES, Said, Scene, authority, deployment, keeper, leading, plain, rest, service, until, webhook,
    },
    server::{self, Requests, Server},
};

/// Each of our cluster-wide objects that is there, with its version.
async fn written(client: &Client, policies: bool) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let kinds = [
        (objects::MUTATING_POLICY, "v1beta1"),
        (objects::MUTATING_BINDING, "v1beta1"),
        (objects::VALIDATING_POLICY, "v1"),
        (objects::VALIDATING_BINDING, "v1"),
        (objects::WEBHOOK_CONFIGURATION, "v1"),
    ];
    for (kind, version) in kinds {
        if version == "v1beta1" && !policies {
            continue;
        }
        for name in kind.names(None) {
            if let Some(object) = dynamic(client, kind, version).get_opt(&name).await.unwrap() {
                found.push((format!("{} {name}", kind.kind), object.resource_version().unwrap()));
            }
        }
    }
    found
}

fn dynamic(client: &Client, kind: objects::Kind, version: &str) -> Api<DynamicObject> {
    let resource =
        ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(objects::GROUP, version, kind.kind), kind.plural);
    Api::all_with(client.clone(), &resource)
}

fn names(written: &[(String, String)]) -> Vec<&str> {
    written.iter().map(|(name, _)| name.as_str()).collect()
}

/// An API server for one test, with the keeper of a controller on it.
struct Kept {
    server: Server,
    client: Client,
    requests: Requests,
    said: Arc<Said>,
    tasks: JoinSet<()>,
}

impl Kept {
    async fn new(flags: &'static [&'static str]) -> Option<Self> {
        // These tests take an API server each: one after the other, for the sake of the machine.
        static ONE: AsyncMutex<()> = AsyncMutex::const_new(());
        let _one = ONE.lock().await;
        let started = tokio::task::spawn_blocking(|| server::start(flags)).await.unwrap();
        let server = server::or_skip(started.as_ref().map(|_| ())).and(started.ok())?;
        let (client, requests) = server.client(None).await;
        Some(Self { server, client, requests, said: Arc::default(), tasks: JoinSet::new() })
    }

    /// Starts a controller with this mode, in place of the one before; waits until it has nothing more to do.
    async fn start(&mut self, protection: Protection) -> (Effective, bool) {
        self.tasks.shutdown().await;
        *self.said.0.lock().unwrap() = None;
        let nowhere = Address::Url("https://127.0.0.1:1".into());
        let ca = authority(&self.client).await.bundle().borrow().to_string();
        self.tasks.spawn(keeper(&self.client, protection, nowhere, ca, &self.said).keep(leading()));
        until("it protects", || async { self.said.0.lock().unwrap().clone() }).await
    }

    async fn quiet(&self) -> bool {
        let before = self.requests.count();
        tokio::time::sleep(Duration::from_millis(500)).await;
        self.requests.count() == before
    }
}

#[tokio::test]
async fn policies_are_written_once_repaired_and_removed_when_another_way_is_chosen() {
    let Some(mut kept) = Kept::new(&POLICIES).await else { return };
    assert_eq!(kept.start(Protection::Auto).await, (Effective::Policy("v1beta1".into()), false));
    let first = written(&kept.client, true).await;
    let policies = [
        "MutatingAdmissionPolicy services.sluice.dev",
        "MutatingAdmissionPolicy deployments.sluice.dev",
        "MutatingAdmissionPolicyBinding services.sluice.dev",
        "MutatingAdmissionPolicyBinding deployments.sluice.dev",
        "ValidatingAdmissionPolicy scale.sluice.dev",
        "ValidatingAdmissionPolicy revisions.sluice.dev",
        "ValidatingAdmissionPolicyBinding scale.sluice.dev",
        "ValidatingAdmissionPolicyBinding revisions.sluice.dev",
    ];
    assert_eq!(names(&first), policies);

    // A controller that starts anew finds them as they should be.
    kept.start(Protection::Auto).await;
    until("it is quiet", || async { kept.quiet().await.then_some(()) }).await;
    assert_eq!(written(&kept.client, true).await, first);

    // Removed, weakened by a changed field, and weakened by one that is added.
    let mutating = dynamic(&kept.client, objects::MUTATING_POLICY, "v1beta1");
    let bindings = dynamic(&kept.client, objects::MUTATING_BINDING, "v1beta1");
    bindings.delete("services.sluice.dev", &DeleteParams::default()).await.unwrap();
    let weaker = json!({"spec": {"reinvocationPolicy": "Never"}});
    mutating.patch("services.sluice.dev", &PatchParams::default(), &Patch::Merge(&weaker)).await.unwrap();
    let weaker = json!({"spec": {"matchConstraints": {"namespaceSelector": {"matchLabels": {"never": "there"}}}}});
    mutating.patch("deployments.sluice.dev", &PatchParams::default(), &Patch::Merge(&weaker)).await.unwrap();
    until("all is mended", || async {
        let all = names(&written(&kept.client, true).await) == policies;
        let services = mutating.get("services.sluice.dev").await.unwrap();
        let deployments = mutating.get("deployments.sluice.dev").await.unwrap();
        let mended = services.data["spec"]["reinvocationPolicy"] == "IfNeeded"
            && deployments.data["spec"]["matchConstraints"]["namespaceSelector"] == json!({});
        (all && mended).then_some(())
    })
    .await;

    assert_eq!(kept.start(Protection::Webhook).await, (Effective::Webhook, false));
    let webhook = [
        "ValidatingAdmissionPolicy scale.sluice.dev",
        "ValidatingAdmissionPolicy revisions.sluice.dev",
        "ValidatingAdmissionPolicyBinding scale.sluice.dev",
        "ValidatingAdmissionPolicyBinding revisions.sluice.dev",
        "MutatingWebhookConfiguration protection.sluice.dev",
    ];
    assert_eq!(names(&written(&kept.client, true).await), webhook);
    assert_eq!(kept.start(Protection::None).await, (Effective::Repair, false));
    assert_eq!(written(&kept.client, true).await, []);
}

#[tokio::test]
async fn policies_that_are_not_served_are_said_and_scaling_is_refused_all_the_same() {
    let Some(mut kept) = Kept::new(&[]).await else { return };
    assert_eq!(kept.start(Protection::Policy).await, (Effective::Repair, /* incomplete: */ true));
    let refusals = [
        "ValidatingAdmissionPolicy scale.sluice.dev",
        "ValidatingAdmissionPolicy revisions.sluice.dev",
        "ValidatingAdmissionPolicyBinding scale.sluice.dev",
        "ValidatingAdmissionPolicyBinding revisions.sluice.dev",
    ];
    assert_eq!(names(&written(&kept.client, false).await), refusals);
    assert_eq!(kept.start(Protection::Auto).await, (Effective::Webhook, false));
    let first = written(&kept.client, false).await;
    assert_eq!(first.len(), 5);
    // The same CA and the same mode: nothing to write.
    kept.start(Protection::Auto).await;
    until("it is quiet", || async { kept.quiet().await.then_some(()) }).await;
    assert_eq!(written(&kept.client, false).await, first);
}

#[tokio::test]
async fn with_all_controllers_down_only_what_is_taken_over_waits() {
    let Some(mut kept) = Kept::new(&[]).await else { return };
    // Nobody listens where this one leads.
    kept.start(Protection::Webhook).await;
    let (git, _) = kept.server.client(Some("git")).await;
    server::namespace(&git, "down").await;
    let scene = Scene { git, own: kept.client.clone(), namespace: "down".into(), by: Protection::Webhook };
    // Objects of other people, also of the same names.
    scene.applied_service().await;
    scene.applied_deployment(Some(3), "app:1").await;
    let label = json!({"metadata": {"labels": {labels::CANARY: "shop"}, "finalizers": ["example.com/hold"]}});
    scene.merge::<Service>(&scene.own, "web", label.clone()).await;
    scene.merge::<Deployment>(&scene.own, "web", label).await;

    // Git tools wait, and lose nothing.
    let refused = |result: kube::Result<()>| {
        let error = result.expect_err("it would have been applied without us").to_string();
        assert!(error.contains("failed calling webhook"), "{error}");
    };
    let params = PatchParams::apply(FLUX).force();
    let service = service(&plain());
    until("the configuration is known", || async {
        scene.git::<Service>().patch("web", &params, &Patch::Apply(&service)).await.is_err().then_some(())
    })
    .await;
    refused(scene.git::<Service>().patch("web", &params, &Patch::Apply(&service)).await.map(drop));
    let replicas = deployment(Some(3), "app:2");
    refused(scene.git::<Deployment>().patch("web", &params, &Patch::Apply(&replicas)).await.map(drop));
    // The controller itself does not wait for its own webhook, and status is nobody's business.
    scene.merge::<Service>(&scene.own, "web", json!({"metadata": {"labels": {"own": "write"}}})).await;
    let status = Patch::Merge(json!({"status": {"observedGeneration": 1}}));
    scene.git::<Deployment>().patch_status("web", &PatchParams::default(), &status).await.unwrap();
    // Nor does deletion, to its end.
    scene.git::<Service>().delete("web", &DeleteParams::default()).await.unwrap();
    scene.git::<Deployment>().delete("web", &DeleteParams::background()).await.unwrap();
    let let_go = json!({"metadata": {"finalizers": null}});
    scene.merge::<Service>(&scene.git, "web", let_go.clone()).await;
    scene.merge::<Deployment>(&scene.git, "web", let_go).await;
    assert!(scene.git::<Service>().get_opt("web").await.unwrap().is_none());
    assert!(scene.git::<Deployment>().get_opt("web").await.unwrap().is_none());
    scene.applied_service().await;
}

#[tokio::test]
async fn it_is_told_while_the_api_server_does_not_reach_the_webhook() {
    let Some(mut kept) = Kept::new(&[]).await else { return };
    server::install(&kept.client).await;
    let mut answering = JoinSet::new();
    let (address, ca) = webhook(&kept.client, &mut answering).await;
    let often = Duration::from_millis(50);
    let pace = Pace { answered: often, unanswered: often, patience: Duration::from_secs(1) };
    let keeper = Keeper { pace, ..keeper(&kept.client, Protection::Webhook, address, ca, &kept.said) };
    kept.tasks.spawn(keeper.keep(leading()));
    let checks = || kept.requests.about("/api/v1/namespaces/default/services").len();
    let incomplete = |wanted: bool| {
        let said = kept.said.0.lock().unwrap().clone();
        async move { (said == Some((Effective::Webhook, wanted))).then_some(()) }
    };
    until("it checks for longer than its patience", || async { (checks() > 60).then_some(()) }).await;
    until("the webhook answers", || incomplete(false)).await;
    let services: Api<Service> = Api::namespaced(kept.client.clone(), "default");
    assert!(services.get_opt(CHECK).await.unwrap().is_none(), "a check leaves something behind");
    answering.shutdown().await;
    until("the webhook does not answer", || incomplete(true)).await;
}

#[tokio::test]
async fn without_our_crds_the_policies_hold_up_nobody() {
    let Some(mut kept) = Kept::new(&POLICIES).await else { return };
    kept.start(Protection::Policy).await;
    let (git, _) = kept.server.client(Some("git")).await;
    server::namespace(&git, "no-crd").await;
    let scene = Scene { git, own: kept.client.clone(), namespace: "no-crd".into(), by: Protection::Policy };
    // Long enough for the policies to be in force.
    for replicas in 1..=12 {
        assert_eq!(
            rest(&scene.applied_deployment(Some(replicas), "app:1").await),
            (i32::try_from(replicas).unwrap(), None)
        );
        scene.applied_service().await;
        let more = Patch::Merge(json!({"spec": {"replicas": replicas + 1}}));
        scene.git::<Deployment>().patch_scale("web", &PatchParams::default(), &more).await.unwrap();
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}

#[tokio::test]
async fn uninstalling_waits_for_the_hand_back_and_leaves_nothing() {
    let Some(mut kept) = Kept::new(&POLICIES).await else { return };
    server::install(&kept.client).await;
    kept.start(Protection::Auto).await;
    let (git, _) = kept.server.client(Some("git")).await;
    server::namespace(&git, "shop").await;
    let scene = Scene { git, own: kept.client.clone(), namespace: "shop".into(), by: Protection::Policy };
    scene.taken_over().await;
    let held = json!({"metadata": {"finalizers": [labels::FINALIZER]}});
    scene.merge::<Canary>(&scene.own, "shop", held).await;
    let controllers: Api<Deployment> = Api::namespaced(kept.client.clone(), "default");
    let mut controller = deployment(Some(2), "sluice-controller");
    controller["metadata"]["name"] = json!("sluice-controller");
    controllers.create(&PostParams::default(), &serde_json::from_value(controller).unwrap()).await.unwrap();
    let pod = json!({"metadata": {"name": "sluice-controller-0", "labels": plain()}, "spec": {"containers": [{"name": "app", "image": "app"}]}});
    let pods: Api<Pod> = Api::namespaced(kept.client.clone(), "default");
    pods.create(&PostParams::default(), &serde_json::from_value(pod).unwrap()).await.unwrap();

    let uninstall = |seconds: u64| Uninstall {
        client: kept.client.clone(),
        release_namespace: "default".into(),
        deployment: "sluice-controller".into(),
        namespace: None,
        deadline: Duration::from_secs(seconds),
    };
    let announced = || async {
        let maps: Api<ConfigMap> = Api::namespaced(kept.client.clone(), "default");
        let map = maps.get_opt(labels::UNINSTALL).await.unwrap()?;
        map.annotations()[labels::UNTIL].parse::<jiff::Timestamp>().ok()
    };
    // The Deployment would serve what was not promoted.
    scene.status(json!({"phase": "Failed"})).await;
    let refused = uninstall(1).run().await.unwrap_err().to_string();
    assert!(refused.contains("Canaries shop/shop ask for a version that was not promoted"), "{refused}");
    scene.status(json!({"phase": "Succeeded"})).await;
    let refused = uninstall(1).run().await.unwrap_err().to_string();
    assert!(refused.contains("Canaries shop/shop is not back"), "{refused}");
    assert_eq!(announced().await, None, "what had been handed back is taken over again");
    assert_eq!(written(&kept.client, true).await.len(), 8, "nothing was removed");
    assert_eq!(controllers.get("sluice-controller").await.unwrap().spec.unwrap().replicas, Some(2));

    // The controller hands back while it waits.
    let uninstalling = uninstall(60);
    let (done, ()) = tokio::join!(uninstalling.run(), async {
        let end = until("the controllers are told to hand back", announced).await;
        assert!(end > jiff::Timestamp::now());
        scene.merge::<Canary>(&scene.own, "shop", json!({"metadata": {"finalizers": null}})).await;
        // It ends, as it is told; until then it would repair what is removed.
        until("the controllers are stopped", || async {
            let stopped = controllers.get("sluice-controller").await.unwrap().spec.unwrap().replicas == Some(0);
            stopped.then_some(())
        })
        .await;
        kept.tasks.shutdown().await;
        pods.delete("sluice-controller-0", &DeleteParams::default().grace_period(0)).await.unwrap();
    });
    done.unwrap();
    assert_eq!(written(&kept.client, true).await, []);
    assert_eq!(announced().await, None);
    assert!(scene.git::<Canary>().get_opt("shop").await.unwrap().is_some(), "Canaries are their owners'");
    // Again, on what is left.
    uninstall(1).run().await.unwrap();
}
