#![allow(clippy::unwrap_used, clippy::expect_used)]
use http::{Request, Response};
use kube::client::Body;
use serde_json::{Value, json};
use sluice_xds::TypeUrl;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::{sync::Notify, task::JoinSet};

use super::*;
use crate::{
    cache::Scope,
    mesh::testing::{Shop, too_large},
};

/// A shop whose facts can be changed, and its publisher.
fn published(shop: Shop) -> (Arc<Mutex<Shop>>, PublisherHandle, Touches) {
    let shop = Arc::new(Mutex::new(shop));
    let touches = Touches::default();
    let of = shop.clone();
    let handle = PublisherHandle::new(move || lock(&of).inputs(), touches.clone());
    lock(&handle.0.ports).ports = lock(&shop).inputs().ports;
    handle.rebuild();
    (shop, handle, touches)
}

fn weight(handle: &PublisherHandle) -> i32 {
    handle.snapshots().borrow().canaries[&CanaryKey::new("shop", "web")].traffic.weight
}

fn version(shop: &Mutex<Shop>, version: &str) {
    lock(shop).canary["metadata"]["resourceVersion"] = json!(version);
}

#[test]
fn a_cut_holds_until_a_status_says_weight_0_and_then_lets_go() {
    let mut shop = Shop::new();
    shop.traffic("aaa", Some("bbb"), 50);
    let (shop, handle, _) = published(shop);
    let key = CanaryKey::new("shop", "web");
    handle.cut(&key);
    assert_eq!(weight(&handle), 0, "at once");
    version(&shop, "2");
    handle.rebuild();
    assert_eq!(weight(&handle), 0, "something else in the Canary changed");
    lock(&shop).traffic("aaa", Some("bbb"), 0);
    version(&shop, "3");
    handle.rebuild();
    lock(&shop).traffic("aaa", Some("bbb"), 10);
    version(&shop, "4");
    handle.rebuild();
    assert_eq!(weight(&handle), 10, "a later step counts again");
}

#[test]
fn a_cut_of_a_mirror_holds_until_a_status_says_that_there_is_none() {
    let mut shop = Shop::new();
    shop.traffic("aaa", Some("bbb"), 0);
    shop.canary["status"]["traffic"]["mirror"] = json!(60);
    let (shop, handle, _) = published(shop);
    let key = CanaryKey::new("shop", "web");
    let mirror = || handle.snapshots().borrow().canaries[&key].traffic.mirror;
    assert_eq!(mirror(), 60);
    handle.cut(&key);
    assert_eq!(mirror(), 0, "at once");
    version(&shop, "2");
    handle.rebuild();
    assert_eq!(mirror(), 0, "weight 0 alone is no news");
    lock(&shop).traffic("aaa", Some("bbb"), 0);
    version(&shop, "3");
    handle.rebuild();
    lock(&shop).canary["status"]["traffic"]["mirror"] = json!(60);
    version(&shop, "4");
    handle.rebuild();
    assert_eq!(mirror(), 60, "a later step counts again");
}

#[test]
fn a_cut_by_somebody_who_knows_more_than_the_cache_is_not_undone_by_old_news() {
    let mut shop = Shop::new();
    shop.traffic("aaa", Some("bbb"), 0);
    let (shop, handle, _) = published(shop);
    // The status with weight 5 was written, and something went wrong, before the watch brought it.
    handle.cut(&CanaryKey::new("shop", "web"));
    lock(&shop).traffic("aaa", Some("bbb"), 5);
    version(&shop, "2");
    handle.rebuild();
    assert_eq!(weight(&handle), 0);
}

#[test]
fn a_cut_says_nothing_about_another_canary() {
    let mut shop = Shop::new();
    shop.traffic("aaa", Some("bbb"), 50);
    let (shop, handle, _) = published(shop);
    handle.cut(&CanaryKey::new("shop", "web"));
    lock(&shop).traffic("aaa", Some("ccc"), 5);
    version(&shop, "2");
    handle.rebuild();
    assert_eq!(weight(&handle), 5);
}

#[test]
fn an_edit_that_makes_routes_too_large_changes_none_and_the_canary_is_taken_back_all_the_same() {
    let route = |handle: &PublisherHandle| {
        handle.snapshots().borrow().fleet.get(TypeUrl::Route, "shop/web:80").map(|route| route.version.clone())
    };
    let mut shop = Shop::new();
    let service = shop.canary["spec"]["service"].clone();
    shop.traffic("aaa", Some("bbb"), 50);
    let (shop, handle, _) = published(shop);
    let before = route(&handle);
    lock(&shop).canary["spec"]["service"] = too_large();
    version(&shop, "2");
    handle.rebuild();
    handle.rebuild();
    assert_eq!((route(&handle), weight(&handle)), (before.clone(), 50));
    handle.cut(&CanaryKey::new("shop", "web"));
    assert_eq!(weight(&handle), 0, "at once");
    assert_ne!(route(&handle), before);

    // A controller that starts anew knows of no other routes.
    let mut again = Shop::new();
    again.canary = lock(&shop).canary.clone();
    let (again, started, _) = published(again);
    assert!(route(&started).is_none() && started.snapshots().borrow().fleet.keeps(TypeUrl::Route, "shop/web:80"));
    lock(&again).canary["spec"]["service"] = service;
    started.rebuild();
    assert_eq!(route(&started), before, "it is mended");
}

#[tokio::test]
async fn a_member_that_is_gone_holds_up_nobody_any_more_and_all_are_told() {
    let mut shop = Shop::new();
    shop.traffic("aaa", None, 0);
    shop.fleet_pod("stays", "10.0.1.1");
    shop.fleet_pod("goes", "10.0.1.2");
    let (shop, handle, touches) = published(shop);
    touches.take().await;
    lock(&shop).pods.pop();
    handle.rebuild();
    assert!(!touches.is_empty());
    assert_eq!(touches.take().await, BTreeSet::from([CanaryKey::new("shop", "web")]));
}

#[tokio::test]
async fn who_gets_no_port_is_told_once_and_again_when_there_is_one() {
    let mut shop = Shop::new();
    shop.traffic("aaa", None, 0);
    let (_, handle, touches) = published(shop);
    touches.take().await;
    let web = CanaryKey::new("shop", "web");
    let port =
        PortKey { fleet: "sluice".to_owned(), namespace: "shop".to_owned(), service: "web".to_owned(), port: 80 };
    let without = BTreeMap::from([(web.clone(), vec![port.clone()])]);
    handle.set_without_port(without.clone());
    assert_eq!(handle.without_port(&web), [port]);
    assert_eq!(touches.take().await, BTreeSet::from([web.clone()]));
    handle.set_without_port(without);
    assert!(touches.is_empty());
    handle.set_without_port(BTreeMap::new());
    assert_eq!(handle.without_port(&web), []);
    assert_eq!(touches.take().await, BTreeSet::from([web]));
}

#[tokio::test]
async fn whose_traffic_changed_is_touched_and_nothing_is_published_without_a_change() {
    let mut shop = Shop::new();
    shop.traffic("aaa", None, 0);
    let (shop, handle, touches) = published(shop);
    assert_eq!(touches.take().await.len(), 1);
    let mut snapshots = handle.snapshots();
    snapshots.mark_unchanged();
    handle.rebuild();
    assert!(!snapshots.has_changed().unwrap());
    lock(&shop).revision_pod("one", "aaa", "10.0.0.1");
    handle.rebuild();
    assert!(snapshots.has_changed().unwrap());
    // The route of the apex is the same with an idle canary: no acknowledgement will come that could wake anybody.
    lock(&shop).traffic("aaa", Some("bbb"), 0);
    handle.rebuild();
    assert_eq!(touches.take().await, BTreeSet::from([CanaryKey::new("shop", "web")]));
}

/// As where a dependency fails, and all releases with it.
#[test]
fn many_who_cut_at_once_wait_for_one_snapshot_and_not_each_for_its_own() {
    const ASK: u64 = 16;
    let (gathered, shop) = (Arc::new(Mutex::new(0_u64)), Shop::new());
    let handle = PublisherHandle::new(
        {
            let (gathered, inputs) = (gathered.clone(), shop.inputs());
            move || {
                *lock(&gathered) += 1;
                inputs.clone()
            }
        },
        Touches::default(),
    );
    let first = lock(&handle.0.building);
    std::thread::scope(|scope| {
        for _ in 0..ASK {
            scope.spawn(|| handle.rebuild());
        }
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        while handle.0.asked.load(Ordering::SeqCst) < ASK {
            assert!(std::time::Instant::now() < deadline);
            std::thread::yield_now();
        }
        drop(first);
    });
    assert_eq!(*lock(&gathered), 1, "all had asked before it began");
    handle.rebuild();
    assert_eq!(*lock(&gathered), 2);
}

#[test]
fn a_canary_that_is_cut_already_is_not_built_again_at_each_look() {
    let mut shop = Shop::new();
    shop.traffic("aaa", Some("bbb"), 50);
    let (shop, handle, _) = published(shop);
    let key = CanaryKey::new("shop", "web");
    handle.cut(&key);
    let asked = || handle.0.asked.load(Ordering::SeqCst);
    let before = asked();
    handle.cut(&key);
    assert_eq!(asked(), before);
    lock(&shop).traffic("aaa", Some("ccc"), 50);
    handle.cut(&key);
    assert_eq!((asked(), weight(&handle)), (before + 1, 0), "another one of which nothing was published yet");
}

/// How a watch says that the Pod is gone.
#[derive(Clone, Copy, Debug)]
enum Told {
    Deleted,
    /// By a list in which it is not, as when the watch was away for too long (410).
    Relisted,
}

/// An API server with one Pod, of which the watch is a version behind; the Pod is deleted when it has been listed again.
fn with_a_pod_that_goes(told: Told) -> Client {
    let pod = |version: &str| json!({"metadata": {"namespace": "shop", "name": "a", "resourceVersion": version}});
    let list = |items: &[Value], version: &str| json!({"metadata": {"resourceVersion": version}, "items": items});
    let (listed, gone) = (Arc::new(Notify::new()), Arc::new(AtomicBool::new(false)));
    let server = tower::service_fn(move |request: Request<Body>| {
        let (listed, gone) = (listed.clone(), gone.clone());
        async move {
            let pods = request.uri().path().ends_with("/pods");
            let accept = request.headers().get("accept").map(|accept| accept.to_str().unwrap());
            let metadata = accept.is_some_and(|accept| accept.contains("PartialObjectMetadata"));
            let is_gone = gone.load(Ordering::SeqCst);
            let query = request.uri().query().unwrap_or_default().to_owned();
            let asked = |what: &str| query.contains(what);
            let answer = match (pods, asked("watch=true"), metadata) {
                (true, true, _) if !is_gone => {
                    listed.notified().await;
                    gone.store(true, Ordering::SeqCst);
                    match told {
                        Told::Deleted => json!({"type": "DELETED", "object": pod("11")}),
                        Told::Relisted => {
                            json!({"type": "ERROR", "object": {"code": 410, "reason": "Expired", "status": "Failure", "message": "too old"}})
                        }
                    }
                }
                // By pages, of which the second has it.
                (true, false, true) if !is_gone && asked("continue=more") => {
                    listed.notify_one();
                    list(&[pod("10")], "10")
                }
                (true, false, true) if !is_gone => {
                    assert!(asked("limit=500"), "{query}");
                    json!({"metadata": {"resourceVersion": "10", "continue": "more"}, "items": []})
                }
                (true, false, false) if !is_gone => list(&[pod("5")], "5"),
                (true, false, _) => list(&[], "12"),
                (_, true, _) => std::future::pending().await,
                (false, false, _) if request.uri().path().ends_with(ports::CONFIG_MAP) => {
                    json!({"metadata": {"name": ports::CONFIG_MAP, "resourceVersion": "7"}, "data": {"fleet.shop.web.80": "20001"}})
                }
                (false, false, _) => list(&[], "10"),
            };
            Ok::<_, std::convert::Infallible>(Response::new(Body::from(format!("{answer}\n").into_bytes())))
        }
    });
    Client::new(server, "default")
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_catches_up_does_not_wait_for_what_was_deleted_meanwhile_and_knows_the_ports() {
    for told in [Told::Deleted, Told::Relisted] {
        let client = with_a_pod_that_goes(told);
        let (shop, mut tasks) = (Shop::new(), JoinSet::new());
        let scope =
            Scope { namespace: None, release_namespace: "sluice-system".into(), namespaces: true, secrets: true };
        let cache = Cache::start(&client, &scope, &mut tasks);
        cache.warm().await.unwrap();
        let settings = shop.inputs().settings;
        let with = settings.clone();
        let handle = PublisherHandle::new(move || Inputs::empty(with.clone()), cache.touches.clone());
        let catch_up = CatchUp { client, cache: cache.clone(), settings, handle: handle.clone() };
        let caught_up = timeout(Duration::from_secs(60), catch_up.run()).await;
        caught_up.unwrap_or_else(|_| panic!("it never ends: {told:?}")).unwrap();
        assert!(cache.pods.state().is_empty(), "it is as new as the list: {told:?}");
        assert_eq!(handle.inputs().ports.into_values().collect::<Vec<_>>(), [20_001]);
    }
}

#[test]
fn an_older_config_map_says_nothing_of_the_ports_any_more() {
    let (_, handle, _) = published(Shop::new());
    let map = |version: &str, port: &str| -> ConfigMap {
        let value = json!({"metadata": {"resourceVersion": version}, "data": {"fleet.shop.web.80": port}});
        serde_json::from_value(value).unwrap()
    };
    assert!(handle.read_ports(&map("9", "20009")));
    assert!(!handle.read_ports(&map("9", "20009")), "nothing new");
    assert!(!handle.read_ports(&map("8", "20008")));
    assert!(handle.inputs().ports.values().eq([&20_009]));
    assert!(handle.read_ports(&map("10", "20010")));
}

#[test]
fn a_cut_ends_with_its_term_and_when_its_reason_has_passed_before_it_was_written_down() {
    let mut shop = Shop::new();
    shop.traffic("aaa", Some("bbb"), 50);
    let (_, handle, _) = published(shop);
    let key = CanaryKey::new("shop", "web");
    for ends in [PublisherHandle::begin_term, |handle: &PublisherHandle| handle.restore(&CanaryKey::new("shop", "web"))]
    {
        handle.cut(&key);
        assert_eq!(weight(&handle), 0);
        ends(&handle);
        assert_eq!(weight(&handle), 50, "as the status says");
    }
}
