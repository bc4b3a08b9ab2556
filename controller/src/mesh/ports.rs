//! Which port of the fleet stands for which port of a Service.
//!
//! The truth is one ConfigMap: every replica reads it, only the leader writes it, and a port is used only once it is
//! written there. Two Services never share a port, and a port that became free rests, because clients and kube-proxy may
//! still send the former Service's connections to it.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};
use sha2::{Digest, Sha256};
use sluice_crds::labels;

/// The ConfigMap, in the release namespace.
pub const CONFIG_MAP: &str = "sluice-ports";
/// First port that may be given out.
pub const FIRST: u16 = 20_000;
/// Last port that may be given out.
pub const LAST: u16 = 29_999;
/// Ports in between that the proxies use themselves (docs/xds.md, "Ports").
pub const RESERVED: [u16; 3] = [20_443, 20_444, 20_445];
/// How long a freed port is given to nobody else.
pub const REST: SignedDuration = SignedDuration::from_mins(15);

/// A port of a Service on a fleet.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortKey {
    pub fleet: String,
    pub namespace: String,
    pub service: String,
    pub port: u16,
}

impl PortKey {
    /// As a key of the ConfigMap. The dot separates: none of the parts can contain one (RFC 1123 labels).
    fn text(&self) -> String {
        format!("{}.{}.{}.{}", self.fleet, self.namespace, self.service, self.port)
    }

    fn parse(text: &str) -> Option<Self> {
        match text.split('.').collect::<Vec<_>>().as_slice() {
            [fleet, namespace, service, port] => Some(Self {
                fleet: (*fleet).to_owned(),
                namespace: (*namespace).to_owned(),
                service: (*service).to_owned(),
                port: port.parse().ok()?,
            }),
            _ => None,
        }
    }

    /// Where the search begins, so that a Service mostly gets the same port again and clusters resemble each other.
    fn candidate(&self) -> u16 {
        let mut hash = Sha256::new();
        for part in [self.fleet.as_str(), &self.namespace, &self.service] {
            hash.update(part.as_bytes());
            hash.update([0]);
        }
        hash.update(self.port.to_be_bytes());
        let digest = hash.finalize();
        let number = u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]);
        let offset = number % u32::from(LAST - FIRST + 1);
        FIRST + u16::try_from(offset).unwrap_or(0)
    }
}

impl std::fmt::Display for PortKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "port {} of Service {}/{}", self.port, self.namespace, self.service)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    port: u16,
    /// Nobody wants it any more since then.
    freed: Option<Timestamp>,
}

/// What the ConfigMap says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Allocation {
    entries: BTreeMap<PortKey, Entry>,
}

/// The next content of the ConfigMap.
#[derive(Debug, PartialEq, Eq)]
pub struct Settled {
    pub allocation: Allocation,
    /// Ports for which there was no room.
    pub without: Vec<PortKey>,
    /// When a resting port may be forgotten: look again then.
    pub again_at: Option<Timestamp>,
}

impl Allocation {
    /// Reads the ConfigMap. Entries that cannot be read, and the later one of two for one port, are left out: the next
    /// [`settle`](Self::settle) gives such a Service a port anew.
    #[must_use]
    pub fn read(map: &ConfigMap) -> Self {
        let mut entries = BTreeMap::new();
        let mut taken = BTreeSet::new();
        for (key, value) in map.data.iter().flatten() {
            let entry = PortKey::parse(key).zip(parse_entry(value)).filter(|(_, entry)| taken.insert(entry.port));
            if let Some((key, entry)) = entry {
                entries.insert(key, entry);
            } else {
                tracing::warn!(key, value, "ConfigMap {CONFIG_MAP}: this entry cannot be used and is left out");
            }
        }
        Self { entries }
    }

    /// Of ports that are in use already, as the ConfigMap would say them.
    #[must_use]
    pub fn of(ports: &BTreeMap<PortKey, u16>) -> Self {
        let data = ports.iter().map(|(key, port)| (key.text(), port.to_string())).collect();
        Self::read(&ConfigMap { data: Some(data), ..ConfigMap::default() })
    }

    /// Nobody has one, and none rests.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Data of the ConfigMap.
    #[must_use]
    pub fn data(&self) -> BTreeMap<String, String> {
        let value = |entry: &Entry| match entry.freed {
            Some(at) => format!("{} free since {at}", entry.port),
            None => entry.port.to_string(),
        };
        self.entries.iter().map(|(key, entry)| (key.text(), value(entry))).collect()
    }

    /// The ports that are in use.
    #[must_use]
    pub fn ports(&self) -> BTreeMap<PortKey, u16> {
        let used = self.entries.iter().filter(|(_, entry)| entry.freed.is_none());
        used.map(|(key, entry)| (key.clone(), entry.port)).collect()
    }

    /// Gives a port to everybody who is wanted, and takes it from those who are not. Who has one keeps it. A namespace that has as
    /// many as are left, those that rest among them, gets no more: each leaves to the next as much as it takes.
    #[must_use]
    pub fn settle(&self, wanted: &BTreeSet<PortKey>, now: Timestamp) -> Settled {
        let mut entries = self.entries.clone();
        for (key, entry) in &mut entries {
            if wanted.contains(key) {
                entry.freed = None;
            } else {
                entry.freed = entry.freed.or(Some(now));
            }
        }
        entries.retain(|_, entry| entry.freed.is_none_or(|at| now.duration_since(at) < REST));
        let mut taken: BTreeSet<u16> = entries.values().map(|entry| entry.port).collect();
        taken.extend(RESERVED);
        let mut of_namespaces: BTreeMap<String, usize> = BTreeMap::new();
        for key in entries.keys() {
            *of_namespaces.entry(key.namespace.clone()).or_default() += 1;
        }
        let mut without = Vec::new();
        for key in wanted {
            if entries.contains_key(key) {
                continue;
            }
            let candidate = key.candidate();
            let mut probes = (candidate..=LAST).chain(FIRST..candidate);
            let of_namespace = of_namespaces.entry(key.namespace.clone()).or_default();
            let left = usize::from(LAST - FIRST) + 1 - taken.len();
            if *of_namespace < left
                && let Some(port) = probes.find(|port| !taken.contains(port))
            {
                *of_namespace += 1;
                taken.insert(port);
                entries.insert(key.clone(), Entry { port, freed: None });
            } else {
                without.push(key.clone());
            }
        }
        let again_at =
            entries.values().filter_map(|entry| entry.freed).min().map(|at| at.saturating_add(REST).unwrap_or(at));
        Settled { allocation: Self { entries }, without, again_at }
    }
}

fn parse_entry(value: &str) -> Option<Entry> {
    let (port, freed) = match value.split_once(" free since ") {
        Some((port, at)) => (port, Some(at.parse().ok()?)),
        None => (value, None),
    };
    let port = port.parse().ok().filter(|port| (FIRST..=LAST).contains(port) && !RESERVED.contains(port))?;
    Some(Entry { port, freed })
}

/// Why an allocation was not written.
#[derive(Debug, thiserror::Error)]
#[error("writing the fleet's ports to ConfigMap {namespace}/{CONFIG_MAP} failed; it is tried again: {source}")]
pub struct WriteError {
    namespace: String,
    #[source]
    source: Box<kube::Error>,
}

impl WriteError {
    /// Somebody else wrote in between: read again, then settle again.
    #[must_use]
    pub fn is_conflict(&self) -> bool {
        matches!(&*self.source, kube::Error::Api(status) if status.code == 409)
    }
}

/// Writes an allocation in place of `seen`, the ConfigMap that it was settled from (`None` where there was none). Only
/// the leader calls this.
///
/// # Errors
/// If the API server refuses, which it does when the ConfigMap is no longer the one that was `seen`.
pub async fn write(
    client: &Client,
    namespace: &str,
    seen: Option<&ConfigMap>,
    allocation: &Allocation,
) -> Result<ConfigMap, WriteError> {
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let params = PostParams { field_manager: Some(labels::FIELD_MANAGER.to_owned()), ..PostParams::default() };
    let result = match seen {
        Some(seen) => {
            let map = ConfigMap { data: Some(allocation.data()), ..seen.clone() };
            api.replace(CONFIG_MAP, &params, &map).await
        }
        None => {
            let map = ConfigMap {
                metadata: ObjectMeta {
                    name: Some(CONFIG_MAP.to_owned()),
                    namespace: Some(namespace.to_owned()),
                    labels: Some(BTreeMap::from([(
                        "app.kubernetes.io/managed-by".to_owned(),
                        labels::MANAGED_BY.to_owned(),
                    )])),
                    ..ObjectMeta::default()
                },
                data: Some(allocation.data()),
                ..ConfigMap::default()
            };
            api.create(&params, &map).await
        }
    };
    result.map_err(|source| WriteError { namespace: namespace.to_owned(), source: Box::new(source) })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    fn key(service: &str, port: u16) -> PortKey {
        PortKey { fleet: "default".into(), namespace: "shop".into(), service: service.into(), port }
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn written(allocation: &Allocation) -> Allocation {
        Allocation::read(&ConfigMap { data: Some(allocation.data()), ..ConfigMap::default() })
    }

    #[test]
    fn a_port_is_kept_while_it_is_wanted_and_rests_afterwards() {
        let noon = at("2026-01-01T12:00:00Z");
        let both = BTreeSet::from([key("web", 80), key("api", 80)]);
        let first = Allocation::default().settle(&both, noon).allocation;
        let web = first.ports()[&key("web", 80)];

        let api = BTreeSet::from([key("api", 80)]);
        let freed = written(&first).settle(&api, noon);
        assert_eq!(freed.again_at, Some(at("2026-01-01T12:15:00Z")));
        assert!(!freed.allocation.ports().contains_key(&key("web", 80)));

        let back = written(&freed.allocation).settle(&both, at("2026-01-01T12:14:59Z")).allocation;
        assert_eq!(back.ports()[&key("web", 80)], web, "who comes back has the former port");

        let rested = written(&freed.allocation).settle(&api, at("2026-01-01T12:15:00Z"));
        assert_eq!((rested.allocation.data().len(), rested.again_at), (1, None));
    }

    #[test]
    fn what_somebody_broke_by_hand_is_given_out_anew() {
        let good = Allocation::default().settle(&BTreeSet::from([key("web", 80)]), Timestamp::UNIX_EPOCH).allocation;
        let port = good.ports()[&key("web", 80)];
        let mut data = good.data();
        data.insert("default.shop.zzz.80".into(), port.to_string());
        data.insert("default.shop.api.80".into(), "20443".into());
        data.insert("default.shop.low.80".into(), "80".into());
        data.insert("nonsense".into(), "20001".into());
        let read = Allocation::read(&ConfigMap { data: Some(data), ..ConfigMap::default() });
        assert_eq!(read, good);
    }

    #[test]
    fn those_who_take_all_they_can_leave_some_to_the_next() {
        let of = |namespace: u32, port| PortKey { namespace: format!("n{namespace}"), ..key("web", port) };
        let mut allocation = Allocation::default();
        let mut had = Vec::new();
        for namespace in 0..6 {
            let before = allocation.ports();
            let wanted = before.keys().cloned().chain((1..=6_000).map(|port| of(namespace, port))).collect();
            allocation = allocation.settle(&wanted, Timestamp::UNIX_EPOCH).allocation;
            had.push(allocation.ports().len() - before.len());
        }
        assert_eq!(had, [4_999, 2_499, 1_250, 625, 312, 156]);
        // As many as there are, for as many as there can be.
        let wanted = (0..10_000).map(|namespace| of(namespace, 80)).collect();
        let settled = Allocation::default().settle(&wanted, Timestamp::UNIX_EPOCH);
        assert_eq!((settled.allocation.ports().len(), settled.without.len()), (9_997, 3));
    }

    #[test]
    fn one_namespace_leaves_ports_to_the_others_whatever_comes_and_goes_in_it() {
        let greedy = |service: &str| (1..=6_000).map(|port| key(service, port)).collect::<BTreeSet<_>>();
        let first = Allocation::default().settle(&greedy("web"), Timestamp::UNIX_EPOCH);
        assert_eq!((first.allocation.ports().len(), first.without.len()), (4_999, 1_001));
        // Those that rest are its own as well.
        let mut wanted = greedy("api");
        let modest = PortKey { namespace: "stock".into(), ..key("web", 80) };
        wanted.insert(modest.clone());
        let second = first.allocation.settle(&wanted, Timestamp::UNIX_EPOCH + SignedDuration::from_mins(1));
        assert!(second.allocation.ports().keys().eq([&modest]));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn nobody_shares_a_port_whoever_comes_and_goes(rounds in prop::collection::vec(
            prop::collection::btree_set((0_u8..20, 1_u16..4), 0..30), 1..8,
        )) {
            let mut allocation = Allocation::default();
            let mut now = Timestamp::UNIX_EPOCH;
            for round in rounds {
                let wanted: BTreeSet<PortKey> = round.iter().map(|(s, p)| key(&format!("s{s}"), *p)).collect();
                let before = allocation.ports();
                let settled = allocation.settle(&wanted, now);
                prop_assert!(settled.without.is_empty());
                let ports = settled.allocation.ports();
                prop_assert_eq!(&ports.keys().cloned().collect::<BTreeSet<_>>(), &wanted);
                for (key, port) in &ports {
                    prop_assert!((FIRST..=LAST).contains(port) && !RESERVED.contains(port));
                    prop_assert!(before.get(key).is_none_or(|old| old == port));
                }
                let all: BTreeSet<u16> = settled.allocation.entries.values().map(|entry| entry.port).collect();
                prop_assert_eq!(all.len(), settled.allocation.entries.len());
                prop_assert_eq!(&written(&settled.allocation), &settled.allocation);
                prop_assert_eq!(&settled.allocation.settle(&wanted, now).allocation, &settled.allocation);
                allocation = settled.allocation;
                now += SignedDuration::from_mins(4);
            }
        }
    }
}
