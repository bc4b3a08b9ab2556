//! What holds for all that a control plane may say: it is served, or refused by the name of the resource and of the field, and
//! what served before goes on. The input is a list of changes to good resources.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, LazyLock},
};

use prost::Message;
use prost_types::Any;
use sluice_xds::{
    TypeUrl,
    envoy::{
        config::{
            core::v3::{HeaderValue, HeaderValueOption},
            route::v3::{RetryPolicy, RouteConfiguration, route},
        },
        service::discovery::v3::Resource,
    },
};

use super::{
    assert_same,
    wire::{self, Change},
};
use crate::{
    config::{self, ConfigError, Rejected, Resources},
    snapshot::{Action, Listener, Protocol, Snapshot},
};

#[path = "../../tests/control/resources.rs"]
mod resources;
use resources::resource;

/// What is put in place of others, beside what is there.
const WORDS: [&str; 16] = [
    "",
    "*",
    "/",
    ".",
    "shop/web:80",
    "shop/web:80/bbb",
    "local/8080",
    "p8080.abc",
    "127.0.0.1",
    "::",
    "spiffe://cluster.local/ns/shop/sa/web",
    "spiffe://",
    "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
    "content-length",
    "5xx,reset,internal",
    "\u{e9}\u{0}",
];

const NUMBERS: [u64; 12] =
    [0, 1, 2, 80, 20443, 65535, 65536, i32::MAX as u64, u32::MAX as u64, i64::MAX as u64, i64::MIN as u64, u64::MAX];

static GOOD: LazyLock<Vec<(TypeUrl, Resource)>> = LazyLock::new(|| {
    let server = "spiffe://cluster.local/ns/shop/sa/web";
    let client = "spiffe://cluster.local/ns/sluice-system/sa/sluice-fleet";
    let web = ["shop/web:80/aaa", "shop/web:80/bbb"];
    let split = [(web[0], 70), (web[1], 30)];
    let clusters = [resources::cluster(web[0], "p8080.aaa", server), resources::plain_cluster(web[1])];
    let clusters = clusters.into_iter().chain([8080, 8081].map(resources::local_cluster));
    let clusters = clusters.map(|it| (TypeUrl::Cluster, resource(&it.name, "1", &it)));
    let endpoints = web.map(|name| resources::endpoints(name, &[("127.0.0.1", 20443), ("127.0.0.2", 20443)]));
    let endpoints = endpoints.map(|it| (TypeUrl::Endpoints, resource(&it.cluster_name, "1", &it)));
    let listeners = [
        resources::listener("shop/web:80", 20080),
        resources::listener("shop/web:82", 20082),
        resources::tcp_listener("shop/web:81", 20081, &split),
        resources::inbound(20099, &[(8080, "p8080.abc"), (8081, "p8081.abc")], client),
    ];
    let listeners = listeners.map(|it| (TypeUrl::Listener, resource(&it.name, "1", &it)));
    let routes = [with_policy(resources::route("shop/web:80", &split)), resources::unavailable("shop/web:82")];
    let routes = routes.map(|it| (TypeUrl::Route, resource(&it.name, "1", &it)));
    clusters.chain(endpoints).chain(listeners).chain(routes).collect()
});

fn with_policy(route: RouteConfiguration) -> RouteConfiguration {
    let mut configuration = resources::timed(route, 3, 5);
    let route = &mut configuration.virtual_hosts[0].routes[0];
    let header = HeaderValue { key: "x-a".to_owned(), value: "b".to_owned() };
    route.request_headers_to_add = vec![HeaderValueOption { header: Some(header), append_action: 2 }];
    route.response_headers_to_remove = vec!["server".to_owned()];
    if let Some(route::Action::Route(action)) = &mut route.action {
        action.retry_policy = Some(RetryPolicy {
            retry_on: "5xx,reset".to_owned(),
            num_retries: Some(2),
            per_try_timeout: Some(prost_types::Duration { seconds: 1, nanos: 0 }),
        });
    }
    configuration
}

struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> Option<u8> {
        self.0.split_off_first().copied()
    }

    fn number(&mut self) -> Option<usize> {
        Some(usize::from(self.byte()?) << 8 | usize::from(self.byte()?))
    }

    fn change(&mut self) -> Option<Change> {
        Some(match self.byte()? % 9 {
            0 => Change::Remove,
            1 => Change::Repeat,
            2 => Change::Number(self.byte()?.into()),
            3 => Change::Value(NUMBERS[usize::from(self.byte()?) % NUMBERS.len()]),
            4 => Change::Value(self.number()? as u64),
            5 => Change::Spoil(self.number()?),
            6 => Change::Shorten(self.byte()?.into()),
            _ => Change::Say(WORDS[usize::from(self.byte()?) % WORDS.len()]),
        })
    }

    /// Changes fields of a message.
    fn changed(&mut self, message: &[u8]) -> Option<Vec<u8>> {
        let mut fields = wire::parse(message)?;
        for _ in 0..self.byte()? % 4 {
            let which = self.number()? % wire::count(&fields).max(1);
            wire::change(&mut fields, which, self.change()?);
        }
        Some(wire::write(&fields))
    }
}

pub(super) fn run(bytes: &[u8]) {
    let mut held = Resources::default();
    let first = restore(&mut held, &BTreeSet::new());
    let mut named = BTreeSet::new();
    let mut input = Input(bytes);
    while step(&mut held, &mut named, &mut input).is_some() {}
    let last = restore(&mut held, &named);
    assert_same(&last.listeners, &first.listeners, "what is good again serves again");
}

/// Tells it all that is good, and nothing else.
fn restore(held: &mut Resources, named: &BTreeSet<(TypeUrl, String)>) -> Arc<Snapshot> {
    for (kind, name) in named {
        held.update(config::Change { kind: *kind, resources: &[], removed: std::slice::from_ref(name) });
    }
    for (kind, good) in GOOD.iter() {
        let resources = std::slice::from_ref(good);
        assert_eq!(held.update(config::Change { kind: *kind, resources, removed: &[] }), []);
    }
    let snapshot = held.build();
    assert_eq!(snapshot.listeners.len(), 4);
    assert!(held.complete());
    snapshot
}

/// `None` is the end of the input.
fn step(held: &mut Resources, named: &mut BTreeSet<(TypeUrl, String)>, input: &mut Input<'_>) -> Option<()> {
    let how = input.byte()?;
    let (kind, mut resource) = GOOD[usize::from(input.byte()?) % GOOD.len()].clone();
    let (mut resources, mut removed) = (Vec::new(), Vec::new());
    resource.version = how.to_string();
    match how % 8 {
        0 => removed.push(resource.name),
        1 => resources.push(resource),
        2 => {
            let length = usize::from(input.byte()?).min(input.0.len());
            let value = input.0.split_off(..length)?.to_vec();
            let type_url = resource.resource.take()?.type_url;
            resources.push(Resource { resource: Some(Any { type_url, value }), ..resource });
        }
        3 => {
            let whole = input.changed(&resource.encode_to_vec())?;
            resources.extend(Resource::decode(whole.as_slice()));
        }
        _ => {
            let Any { type_url, value } = resource.resource.take()?;
            let value = input.changed(&value)?;
            resources.push(Resource { resource: Some(Any { type_url, value }), ..resource });
        }
    }
    named.extend(resources.iter().map(|it| it.name.clone()).chain(removed.clone()).map(|name| (kind, name)));

    let before = Arc::clone(held.snapshot());
    let rejected = held.update(config::Change { kind, resources: &resources, removed: &removed });
    let now = held.build();
    for Rejected { name, error } in &rejected {
        assert_same(name, &resources[0].name, "what is refused");
        names_a_field(error);
        assert!(error.to_string().len() < 2000, "what is said of it is readable: {error}");
        let same =
            |(name, old): (&String, &Arc<Listener>)| now.listeners.get(name).is_some_and(|new| Arc::ptr_eq(new, old));
        assert!(before.listeners.iter().all(same), "what served goes on: {before:?} {now:?}");
    }
    assert!(Arc::ptr_eq(&held.build(), &now), "nothing changes by itself");
    held.look_at_all();
    assert!(Arc::ptr_eq(&held.build(), &now), "what a change was taken not to concern is as it should be: {now:?}");
    can_be_served(&now);
    // Whatever is held can be told.
    let _ = (held.dump(), held.subscriptions(), TypeUrl::ALL.map(|kind| (held.versions(kind), held.count(kind))));
    for (kind, name) in named.iter() {
        let _ = held.missing_cluster(*kind, name);
    }
    Some(())
}

fn names_a_field(error: &ConfigError) {
    match error {
        ConfigError::Missing { field }
        | ConfigError::Unsupported { field, .. }
        | ConfigError::Invalid { field, .. }
        | ConfigError::Pattern { field, .. }
        | ConfigError::Substitution { field, .. }
        | ConfigError::Encoding { field, .. } => assert!(!field.is_empty(), "{error:?}"),
        ConfigError::Incomplete { .. } | ConfigError::NotApplied { .. } => panic!("no such check: {error:?}"),
    }
}

/// What the workers rely on.
fn can_be_served(snapshot: &Snapshot) {
    let mut ports = BTreeMap::new();
    for (name, listener) in &snapshot.listeners {
        assert_eq!(*name, listener.name);
        assert!(!name.is_empty() && listener.address.port() != 0);
        assert_eq!(ports.insert(listener.address.port(), name), None, "two listeners on a port");
        assert!(!listener.chains.is_empty());
        let names: BTreeSet<_> = listener.chains.iter().map(|chain| &chain.server_name).collect();
        assert_eq!(names.len(), listener.chains.len(), "two chains for a server name");
        for chain in &listener.chains {
            if let Protocol::Http(routes) = &chain.protocol {
                assert!(!routes.is_empty(), "nothing would be answered");
                for route in routes {
                    assert!(!matches!(&route.action, Action::Respond(status) if status.is_informational()));
                }
            }
            for split in chain.protocol.splits() {
                let sum: u64 = split.targets.iter().map(|(_, weight)| u64::from(*weight)).sum();
                assert!(sum > 0 && u32::try_from(sum).is_ok(), "weights of {sum}");
            }
        }
    }
}
