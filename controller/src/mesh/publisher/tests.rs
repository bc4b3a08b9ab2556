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

/// How a watch makes up for being behind.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Told {
    Changed,
    Deleted,
    /// By a list in which it is not, as when the watch was away for too long (410).
    Relisted,
}

/// An API server with one object of a kind, of which the watch is a version behind; the watch goes on when it has been listed again.
fn with_a_watch_behind(kind: &'static str, told: Told) -> Client {
    let object = |version: &str| {
        let spec = json!({"provider": {"type": "prometheus", "address": "http://a"}, "query": "1"});
        json!({"metadata": {"namespace": "shop", "name": "a", "resourceVersion": version}, "spec": spec})
    };
    let list = |items: &[Value], version: &str| json!({"metadata": {"resourceVersion": version}, "items": items});
    let listed = Arc::new(Notify::new());
    let (begun, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let server = tower::service_fn(move |request: Request<Body>| {
        let (listed, begun, done) = (listed.clone(), begun.clone(), done.clone());
        async move {
            let of_kind = request.uri().path().ends_with(&format!("/{kind}"));
            let query = request.uri().query().unwrap_or_default().to_owned();
            let asked = |what: &str| query.contains(what);
            let is_done = done.load(Ordering::SeqCst);
            let answer = match (of_kind, asked("watch=true")) {
                (true, true) if !is_done => {
                    listed.notified().await;
                    done.store(true, Ordering::SeqCst);
                    match told {
                        Told::Changed => json!({"type": "MODIFIED", "object": object("10")}),
                        Told::Deleted => json!({"type": "DELETED", "object": object("11")}),
                        Told::Relisted => {
                            json!({"type": "ERROR", "object": {"code": 410, "reason": "Expired", "status": "Failure", "message": "too old"}})
                        }
                    }
                }
                (_, true) => std::future::pending().await,
                // The watch's own, before anything else is asked for.
                (true, false) if !begun.swap(true, Ordering::SeqCst) => list(&[object("5")], "5"),
                // By pages, of which the second has it.
                (true, false) if !is_done && asked("continue=more") => {
                    listed.notify_one();
                    list(&[object("10")], "10")
                }
                (true, false) if !is_done => {
                    assert!(asked("limit=500"), "{query}");
                    assert_eq!(asked("labelSelector"), kind == "controllerrevisions", "as it is watched: {query}");
                    json!({"metadata": {"resourceVersion": "10", "continue": "more"}, "items": []})
                }
                (true, false) if told == Told::Changed => list(&[object("10")], "12"),
                (true, false) => list(&[], "12"),
                (false, false) if request.uri().path().ends_with(ports::CONFIG_MAP) => {
                    json!({"metadata": {"name": ports::CONFIG_MAP, "resourceVersion": "7"}, "data": {"fleet.shop.web.80": "20001"}})
                }
                (false, false) => list(&[], "10"),
            };
            Ok::<_, std::convert::Infallible>(Response::new(Body::from(format!("{answer}\n").into_bytes())))
        }
    });
    Client::new(server, "default")
}

/// A warm cache of such an API server, and what catches up with it.
async fn behind(kind: &'static str, told: Told, tasks: &mut JoinSet<()>) -> CatchUp {
    let client = with_a_watch_behind(kind, told);
    let scope = Scope { namespace: None, release_namespace: "sluice-system".into(), namespaces: true, secrets: true };
    let cache = Cache::start(&client, &scope, tasks);
    timeout(Duration::from_secs(60), cache.warm()).await.unwrap().unwrap();
    let settings = Shop::new().inputs().settings;
    let with = settings.clone();
    let handle = PublisherHandle::new(move || Inputs::empty(with.clone()), cache.touches.clone());
    CatchUp { client, cache, settings, handle }
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_catches_up_does_not_wait_for_what_was_deleted_meanwhile_and_knows_the_ports() {
    for told in [Told::Deleted, Told::Relisted] {
        let mut tasks = JoinSet::new();
        let catch_up = behind("pods", told, &mut tasks).await;
        let caught_up = timeout(Duration::from_secs(60), catch_up.run()).await;
        caught_up.unwrap_or_else(|_| panic!("it never ends: {told:?}")).unwrap();
        assert!(catch_up.cache.pods.state().is_empty(), "it is as new as the list: {told:?}");
        assert_eq!(catch_up.handle.inputs().ports.into_values().collect::<Vec<_>>(), [20_001]);
    }
}

/// The versions that a store shows.
fn shown<K>(store: &Store<K>) -> Vec<String>
where
    K: Resource + Clone,
    K::DynamicType: Eq + Hash + Clone,
{
    store.state().iter().filter_map(|object| object.resource_version()).collect()
}

#[tokio::test(start_paused = true)]
async fn whoever_leads_next_waits_for_all_that_a_look_decides_by() {
    type Shows = fn(&Cache) -> Vec<String>;
    let kinds: [(&'static str, Shows); 11] = [
        ("pods", |cache| shown(&cache.pods)),
        ("services", |cache| shown(&cache.services)),
        ("deployments", |cache| shown(&cache.deployments)),
        ("replicasets", |cache| shown(&cache.replica_sets)),
        ("controllerrevisions", |cache| shown(&cache.revisions)),
        ("endpointslices", |cache| shown(&cache.slices)),
        ("horizontalpodautoscalers", |cache| shown(&cache.autoscalers)),
        ("metrictemplates", |cache| shown(&cache.metric_templates)),
        ("configmaps", |cache| shown(&cache.config_maps)),
        ("secrets", |cache| shown(cache.secrets.as_ref().unwrap())),
        ("namespaces", |cache| shown(cache.namespaces.as_ref().unwrap())),
    ];
    for (kind, shows) in kinds {
        let mut tasks = JoinSet::new();
        let catch_up = behind(kind, Told::Changed, &mut tasks).await;
        assert_eq!(shows(&catch_up.cache), ["5"], "{kind}");
        let caught_up = timeout(Duration::from_secs(60), catch_up.run()).await;
        caught_up.unwrap_or_else(|_| panic!("it never ends: {kind}")).unwrap();
        assert_eq!(shows(&catch_up.cache), ["10"], "{kind}");
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_only_writes_slices_asks_for_no_more_than_they_are_made_of() {
    let mut tasks = JoinSet::new();
    let catch_up = behind("deployments", Told::Changed, &mut tasks).await;
    catch_up.for_slices().await.unwrap();
    assert_eq!(shown(&catch_up.cache.deployments), ["5"]);
}

fn ports_map(version: &str, data: Value) -> ConfigMap {
    serde_json::from_value(json!({"metadata": {"resourceVersion": version}, "data": data})).unwrap()
}

#[test]
fn ports_whose_config_map_somebody_deletes_are_written_down_again_as_they_were() {
    let port = |service: &str| PortKey {
        fleet: "default".to_owned(),
        namespace: "shop".to_owned(),
        service: service.to_owned(),
        port: 80,
    };
    let mut known = Written::default();
    known.take(Some(ports_map("9", json!({"default.shop.web.80": "20009"}))));
    assert!(!known.is_old(Some("9")) && !known.is_old(Some("8")), "ours may be newer than the cache");
    assert!(known.is_old(Some("10")));
    assert!(known.is_old(None), "that it is gone is noticed");
    known.take(None);
    assert!(!known.is_old(None), "once");
    let settled = known.allocation.settle(&[port("api"), port("web")].into(), Timestamp::UNIX_EPOCH).allocation;
    assert_eq!(settled.ports()[&port("web")], 20_009);
    assert!(!known.says(&known.allocation) && !known.says(&settled), "it is to be written");
    known.take(Some(ports_map("12", json!(settled.data()))));
    assert!(known.says(&settled));
    // Nobody has a port: nothing needs to be there.
    assert!(Written::default().says(&Allocation::default()));
}

#[test]
fn a_replica_that_finds_no_config_map_takes_the_ports_from_the_slices() {
    let mut shop = Shop::new();
    shop.more_ports = vec![json!({"port": 81, "name": "grpc", "protocol": "TCP"})];
    shop.traffic("aaa", None, 0);
    shop.canary["status"]["stage"] = json!("Settled");
    shop.fleet_pod("one", "10.0.1.1");
    let mut inputs = shop.inputs();
    for (port, number) in inputs.ports.values_mut().zip(21_000..) {
        *port = number;
    }
    inputs.slices = slices::desired(&inputs).into_values().map(Arc::new).collect();
    let carried = std::mem::take(&mut inputs.ports);
    assert_eq!(carried.len(), 6);
    let mut known = Written::default();
    known.find(&inputs);
    assert_eq!(known.allocation.ports(), carried);
    let settled = known.allocation.settle(&wanted_ports(&inputs).into_keys().collect(), Timestamp::UNIX_EPOCH);
    assert_eq!(settled.allocation.ports(), carried);
    assert!(!known.says(&settled.allocation), "it is to be written");
    // What is written down counts.
    known.take(Some(ports_map("1", json!({}))));
    known.find(&inputs);
    assert!(known.allocation.is_empty());
}

#[test]
fn an_older_config_map_says_nothing_of_the_ports_any_more() {
    let (_, handle, _) = published(Shop::new());
    let map = |version: &str, port: &str| ports_map(version, json!({"fleet.shop.web.80": port}));
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
