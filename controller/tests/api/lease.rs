//! Elections on a real Lease.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use http::{Request, Response};
use k8s_openapi::api::coordination::v1::Lease;
use kube::{
    Api, Client,
    api::{DeleteParams, Patch, PatchParams},
    client::Body,
};
use sluice_controller::lease::{Election, LeaseHandle, LeaseSettings, TakenBack};
use tokio::time::timeout;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tower::{ServiceExt as _, service_fn};

use crate::server;

const NAME: &str = "election";
/// Long enough for a machine that is busy with other tests.
const DURATION: Duration = Duration::from_secs(4);
/// For everything that should happen; far above what it takes.
const SOON: Duration = Duration::from_secs(60);

/// A replica. Dropped, it is gone without a word, as after a `kill -9`.
struct Replica {
    handle: LeaseHandle,
    /// While true, its requests get no answer.
    cut_off: Arc<AtomicBool>,
    stop: CancellationToken,
    task: AbortOnDropHandle<Result<(), TakenBack>>,
}

impl Replica {
    fn start(client: &Client, namespace: &str, holder: &str) -> Self {
        let cut_off = Arc::new(AtomicBool::new(false));
        let through = {
            let (client, cut_off) = (client.clone(), Arc::clone(&cut_off));
            service_fn(move |request: Request<Body>| {
                let (client, cut_off) = (client.clone(), Arc::clone(&cut_off));
                async move {
                    if cut_off.load(Ordering::SeqCst) {
                        std::future::pending::<()>().await;
                    }
                    let answer: Result<Response<Body>, kube::Error> = client.send(request).await;
                    answer
                }
            })
        };
        let settings = LeaseSettings {
            namespace: namespace.to_owned(),
            name: NAME.to_owned(),
            holder: holder.to_owned(),
            duration: DURATION,
            renew_deadline: DURATION * 3 / 4,
            retry: DURATION / 20,
        };
        let (election, handle) = Election::new(Client::new(through.boxed_clone(), namespace), settings).unwrap();
        let stop = CancellationToken::new();
        let task = AbortOnDropHandle::new(tokio::spawn(election.run(stop.clone())));
        Self { handle, cut_off, stop, task }
    }

    /// It knows who leads, and waits.
    async fn sees(&self, leader: &str) {
        let seen = async {
            while self.handle.holder().as_deref() != Some(leader) {
                tokio::task::yield_now().await;
            }
        };
        timeout(SOON, seen).await.expect("the standby sees no leader");
    }

    /// Its epoch, once it leads one that `wanted` accepts.
    async fn leads(&self, wanted: impl Fn(u64) -> bool) -> u64 {
        let mut epochs = self.handle.watch();
        let leads = epochs.wait_for(|epoch| epoch.is_some_and(&wanted));
        timeout(SOON, leads).await.expect("it does not lead").unwrap().unwrap()
    }
}

async fn lease(client: &Client, namespace: &str) -> Lease {
    Api::namespaced(client.clone(), namespace).get(NAME).await.unwrap()
}

fn holder(lease: &Lease) -> &str {
    lease.spec.as_ref().unwrap().holder_identity.as_deref().unwrap()
}

#[tokio::test]
async fn one_of_two_leads_and_the_other_takes_over_when_it_is_gone() {
    let Some((client, _)) = server::client().await else { return };
    let namespace = server::namespace(&client, "lease-takeover").await;
    let first = Replica::start(&client, &namespace, "first");
    assert_eq!(first.leads(|_| true).await, 1);
    let second = Replica::start(&client, &namespace, "second");
    second.sees("first").await;
    assert!(first.handle.may_write() && !second.handle.may_write());

    let alone = first.handle.clone();
    drop(first);
    assert_eq!(second.leads(|_| true).await, 2);
    // What is left of the first one may not write: its time was over before the second one's began.
    assert!(!alone.may_write() && second.handle.may_write());
    assert_eq!(holder(&lease(&client, &namespace).await), "second");
}

#[tokio::test]
async fn a_leader_that_is_cut_off_may_not_write_when_the_next_one_begins() {
    let Some((client, _)) = server::client().await else { return };
    let namespace = server::namespace(&client, "lease-cut-off").await;
    let first = Replica::start(&client, &namespace, "first");
    first.leads(|_| true).await;
    let second = Replica::start(&client, &namespace, "second");
    first.cut_off.store(true, Ordering::SeqCst);
    second.leads(|_| true).await;
    assert!(!first.handle.may_write());
    assert_eq!(first.handle.epoch(), None);

    // Back again, it learns that it lost, and waits for its turn.
    first.cut_off.store(false, Ordering::SeqCst);
    drop(second);
    assert_eq!(first.leads(|epoch| epoch > 1).await, 3);
}

#[tokio::test]
async fn a_restarted_container_takes_its_own_lease_back_at_once_as_a_new_epoch() {
    let Some((client, _)) = server::client().await else { return };
    let namespace = server::namespace(&client, "lease-restart").await;
    let before = Replica::start(&client, &namespace, "same-pod");
    assert_eq!(before.leads(|_| true).await, 1);
    drop(before);
    // Held by itself for an hour more, as far as anybody can tell.
    let longer = serde_json::json!({"spec": {"leaseDurationSeconds": 3600}});
    let api: Api<Lease> = Api::namespaced(client.clone(), &namespace);
    api.patch(NAME, &PatchParams::default(), &Patch::Merge(&longer)).await.unwrap();
    let after = Replica::start(&client, &namespace, "same-pod");
    assert_eq!(after.leads(|_| true).await, 2);
}

#[tokio::test]
async fn a_leader_that_gives_up_is_followed_by_another_or_leads_again_where_there_is_none() {
    let Some((client, _)) = server::client().await else { return };
    let namespace = server::namespace(&client, "lease-given-up").await;
    let first = Replica::start(&client, &namespace, "first");
    first.leads(|_| true).await;
    first.handle.give_up();
    assert_eq!(first.leads(|epoch| epoch > 1).await, 2);

    let second = Replica::start(&client, &namespace, "second");
    second.sees("first").await;
    first.handle.give_up();
    assert_eq!(second.leads(|_| true).await, 3);
    assert!(!first.handle.may_write() && second.handle.may_write());
    // It is a standby as any other: it sees who leads, and follows it.
    first.sees("second").await;
    drop(second);
    assert_eq!(first.leads(|_| true).await, 4);
}

#[tokio::test]
async fn a_leader_that_is_told_to_stop_gives_the_lease_back() {
    let Some((client, _)) = server::client().await else { return };
    let namespace = server::namespace(&client, "lease-release").await;
    let first = Replica::start(&client, &namespace, "first");
    first.leads(|_| true).await;
    // So that the next one could not take it by waiting.
    let longer = serde_json::json!({"spec": {"leaseDurationSeconds": 3600}});
    let api: Api<Lease> = Api::namespaced(client.clone(), &namespace);
    api.patch(NAME, &PatchParams::default(), &Patch::Merge(&longer)).await.unwrap();
    let second = Replica::start(&client, &namespace, "second");
    first.stop.cancel();
    timeout(SOON, first.task).await.expect("it does not end").unwrap().unwrap();
    assert!(!first.handle.may_write());
    assert_eq!(second.leads(|_| true).await, 2);
}

#[tokio::test]
async fn a_later_epoch_that_a_proxy_has_seen_begins_a_new_term_above_it() {
    let Some((client, _)) = server::client().await else { return };
    let namespace = server::namespace(&client, "lease-epoch").await;
    let replica = Replica::start(&client, &namespace, "first");
    assert_eq!(replica.leads(|_| true).await, 1);
    replica.handle.raise_epoch(41);
    assert_eq!(replica.leads(|epoch| epoch > 1).await, 42);
    assert_eq!(lease(&client, &namespace).await.spec.unwrap().lease_transitions, Some(42));
    // What is below its own changes nothing: the next change is the one after.
    replica.handle.raise_epoch(40);
    replica.handle.raise_epoch(99);
    assert_eq!(replica.leads(|epoch| epoch > 42).await, 100);
}

#[tokio::test]
async fn a_lease_that_was_deleted_is_made_again_with_a_higher_epoch() {
    let Some((client, _)) = server::client().await else { return };
    let namespace = server::namespace(&client, "lease-deleted").await;
    let replica = Replica::start(&client, &namespace, "first");
    assert_eq!(replica.leads(|_| true).await, 1);
    // It sees that the Lease is gone before the leader does, which still may write.
    let standby = Replica::start(&client, &namespace, "standby");
    standby.sees("first").await;
    let api: Api<Lease> = Api::namespaced(client.clone(), &namespace);
    api.delete(NAME, &DeleteParams::default()).await.unwrap();
    assert_eq!(replica.leads(|epoch| epoch > 1).await, 2);
    assert!(!standby.handle.may_write());
    assert_eq!(lease(&client, &namespace).await.spec.unwrap().lease_transitions, Some(2));
}

#[tokio::test]
async fn a_standby_counts_on_from_a_lease_that_was_deleted() {
    let Some((client, _)) = server::client().await else { return };
    let namespace = server::namespace(&client, "lease-deleted-standby").await;
    let first = Replica::start(&client, &namespace, "first");
    assert_eq!(first.leads(|_| true).await, 1);
    let second = Replica::start(&client, &namespace, "second");
    second.sees("first").await;
    drop(first);
    let api: Api<Lease> = Api::namespaced(client.clone(), &namespace);
    api.delete(NAME, &DeleteParams::default()).await.unwrap();
    assert_eq!(second.leads(|_| true).await, 2);
}

/// What a restore of etcd leaves: the object of before, whoever has written since.
#[tokio::test]
async fn replicas_end_when_the_lease_says_what_it_said_long_before() {
    let Some((client, _)) = server::client().await else { return };
    for (namespace, renewed_before) in [("lease-epoch-restored", false), ("lease-time-restored", true)] {
        let namespace = server::namespace(&client, namespace).await;
        let api: Api<Lease> = Api::namespaced(client.clone(), &namespace);
        let leader = Replica::start(&client, &namespace, "leader");
        leader.leads(|_| true).await;
        let snapshot = lease(&client, &namespace).await.spec.unwrap();
        if !renewed_before {
            leader.handle.raise_epoch(7);
            leader.leads(|epoch| epoch > 7).await;
        }
        let standby = Replica::start(&client, &namespace, "standby");
        let mut restored = serde_json::to_value(&snapshot).unwrap();
        if renewed_before {
            restored["renewTime"] = "2026-01-01T00:00:00.000000Z".into();
        }
        standby.sees("leader").await;
        api.patch(NAME, &PatchParams::default(), &Patch::Merge(&serde_json::json!({ "spec": restored })))
            .await
            .unwrap();
        let ended = timeout(SOON, leader.task).await.expect("the leader goes on").unwrap().unwrap_err();
        assert!(ended.to_string().contains("taken back in time"), "{ended}");
        assert!(!leader.handle.may_write());
        timeout(SOON, standby.task).await.expect("the standby goes on").unwrap().unwrap_err();
        // A fresh one remembers nothing, and leads.
        Replica::start(&client, &namespace, "fresh").leads(|_| true).await;
    }
}
