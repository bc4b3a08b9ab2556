//! Who has acknowledged what. Members of the fleet are its Pods, read from the API, never the open streams (contract: a member
//! that is gone from the network is still a member until its Pod is gone or it has been out of every slice for its drain time).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use sluice_xds::TypeUrl;
use tokio::{sync::watch, time::Instant};

use super::stream::Version;
use crate::{
    cache::{CanaryKey, Touches},
    delivery::machine::Fleet,
    mesh::{Resource, Snapshot, View},
};

/// A member that has had no stream for so long is marked, and leaves the slices unless most are marked.
pub const SILENCE: Duration = Duration::from_secs(30);
/// Where most members have been silent for so long, it is likely that we are cut off, and not they.
const UNHEARD: Duration = Duration::from_secs(60);

/// What the members hold, shared by the streams and the readers.
#[derive(Debug)]
pub struct Members {
    snapshot: watch::Receiver<Arc<Snapshot>>,
    touches: Touches,
    /// After it left every slice, a marked member serves its open connections for at most so long.
    drain: Duration,
    state: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    members: BTreeMap<String, Member>,
    streams: u64,
}

/// By Pod uid.
#[derive(Debug)]
struct Member {
    /// What it holds, by what it said last: while it is away, it serves on with that.
    held: BTreeMap<TypeUrl, BTreeMap<String, Version>>,
    rejected: BTreeMap<TypeUrl, BTreeMap<String, String>>,
    /// The newest of its streams, while that is open: it alone speaks for the member.
    stream: Option<u64>,
    /// Types of which it said on that stream what it holds.
    said: BTreeSet<TypeUrl>,
    /// Since when it has none.
    silent_since: Instant,
    /// Since when it is marked and in no slice.
    out_since: Option<Instant>,
}

impl Member {
    /// Silence is counted from here, in this term.
    fn new() -> Self {
        Self {
            held: BTreeMap::new(),
            rejected: BTreeMap::new(),
            stream: None,
            said: BTreeSet::new(),
            silent_since: Instant::now(),
            out_since: None,
        }
    }

    /// It has told what it holds, in this term.
    fn has_reported(&self) -> bool {
        self.held.contains_key(&TypeUrl::Listener)
    }

    fn is_silent(&self) -> bool {
        self.is_silent_for(SILENCE)
    }

    fn is_silent_for(&self, time: Duration) -> bool {
        self.stream.is_none() && self.silent_since.elapsed() >= time
    }

    fn holds(&self, kind: TypeUrl, name: &str, resource: &Resource) -> bool {
        self.held.get(&kind).and_then(|held| held.get(name)) == Some(&resource.version)
    }

    /// It has a stream, and serves what a new connection would need: each listener and route is acknowledged in its present
    /// version, or serves on in an older one.
    fn is_back(&self, fleet: &View) -> bool {
        let refuses = |kind, name| self.rejected.get(&kind).is_some_and(|rejected| rejected.contains_key(name));
        self.stream.is_some()
            && [TypeUrl::Listener, TypeUrl::Route].into_iter().all(|kind| {
                let mut resources = fleet.of(kind).peekable();
                (self.said.contains(&kind) || resources.peek().is_none())
                    && resources.all(|(name, resource)| self.holds(kind, name, resource) || refuses(kind, name))
            })
    }
}

impl Members {
    #[must_use]
    pub fn new(snapshot: watch::Receiver<Arc<Snapshot>>, touches: Touches, drain: Duration) -> Arc<Self> {
        Arc::new(Self { snapshot, touches, drain, state: Mutex::new(Known::default()) })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A term begins: nothing is known until the members report.
    pub fn begin_term(&self) {
        self.lock().members.clear();
    }

    /// A stream of this Pod begins. It speaks for the member until a newer one does.
    pub(super) fn connected(&self, uid: &str) -> u64 {
        let mut known = self.lock();
        known.streams += 1;
        let stream = known.streams;
        let member = known.member(uid);
        member.stream = Some(stream);
        member.said.clear();
        member.out_since = None;
        stream
    }

    pub(super) fn disconnected(&self, uid: &str, stream: u64) {
        let mut known = self.lock();
        if let Some(member) = known.members.get_mut(uid).filter(|member| member.stream == Some(stream)) {
            member.stream = None;
            member.silent_since = Instant::now();
        }
    }

    /// What a member holds of one type, after an answer of its. Touches the Canaries whose traffic that is.
    pub(super) fn holds(
        &self,
        uid: &str,
        stream: u64,
        kind: TypeUrl,
        held: &BTreeMap<String, Version>,
        rejected: BTreeMap<String, String>,
    ) {
        let first;
        let changed: BTreeSet<String>;
        let verdicts: BTreeSet<String>;
        {
            let mut known = self.lock();
            let Some(member) = known.members.get_mut(uid).filter(|member| member.stream == Some(stream)) else {
                return;
            };
            member.said.insert(kind);
            first = !member.held.contains_key(&kind);
            changed = replace(member.held.entry(kind).or_default(), held.clone());
            verdicts = replace(member.rejected.entry(kind).or_default(), rejected);
        }
        let snapshot = self.snapshot.borrow().clone();
        if first {
            self.touch_all(&snapshot);
        }
        let carried = changed.iter().filter_map(|name| snapshot.carriers.get(&(kind, name.clone())));
        // A cluster or endpoints that are refused hold up whatever names them.
        let held_up = verdicts.iter().filter_map(|name| snapshot.carrier_of(kind, name));
        for canary in carried.chain(held_up) {
            self.touches.touch(canary.clone());
        }
    }

    fn touch_all(&self, snapshot: &Snapshot) {
        for canary in snapshot.canaries.keys() {
            self.touches.touch(canary.clone());
        }
    }

    /// What the fleet has acknowledged for this Canary.
    #[must_use]
    pub fn fleet(&self, canary: &CanaryKey) -> Fleet {
        let snapshot = self.snapshot.borrow().clone();
        let known = self.lock();
        let mut fleet = Fleet::default();
        let routed = snapshot.canaries.get(canary);
        for (uid, pod) in &snapshot.members {
            let member = known.members.get(uid);
            if !pod.started {
                continue;
            }
            if member.and_then(|member| member.out_since).is_some_and(|since| since.elapsed() >= self.drain) {
                continue;
            }
            fleet.members += 1;
            fleet.names.push(pod.name.clone());
            let Some(member) = member.filter(|member| member.has_reported()) else {
                fleet.joining = true;
                fleet.lagging.push(pod.name.clone());
                continue;
            };
            let Some(routed) = routed else { continue };
            let holds = |(kind, name): &(TypeUrl, String)| {
                snapshot.fleet.get(*kind, name).is_some_and(|resource| member.holds(*kind, name, resource))
            };
            if member.is_silent() || !routed.resources.iter().all(holds) {
                fleet.lagging.push(pod.name.clone());
            }
            let refused = routed.resources.iter().chain(needs(&snapshot, routed)).find_map(|(kind, name)| {
                let reason = member.rejected.get(kind)?.get(name)?;
                Some(format!("{} rejects {name}: {reason}", pod.name))
            });
            fleet.rejected = fleet.rejected.or(refused);
        }
        if fleet.members > 0 && fleet.lagging.is_empty() {
            fleet.effective = routed.map(|routed| routed.traffic.clone());
        }
        fleet
    }

    /// Members whose mark should change: by Pod name, true to mark. Also keeps the time since when a marked one is out of every
    /// slice, and touches all Canaries when one stops to count.
    pub(super) fn marks(&self) -> Vec<(String, bool)> {
        let snapshot = self.snapshot.borrow().clone();
        let mut known = self.lock();
        known.members.retain(|uid, member| snapshot.members.contains_key(uid) || member.stream.is_some());
        let mut marks = Vec::new();
        let mut changes = false;
        for (uid, pod) in snapshot.members.iter().filter(|(_, pod)| pod.started) {
            let member = known.member(uid);
            let silent = member.is_silent();
            if silent && !pod.lagging {
                // From here on it does not count as having what it acknowledged.
                changes = true;
                marks.push((pod.name.clone(), true));
            } else if pod.lagging && member.is_back(&snapshot.fleet) {
                marks.push((pod.name.clone(), false));
            }
            if silent && pod.lagging && !pod.in_slices {
                let out = member.out_since.get_or_insert_with(Instant::now);
                changes |= (self.drain..self.drain + 2 * super::LOOK).contains(&out.elapsed());
            } else {
                member.out_since = None;
            }
        }
        drop(known);
        if changes {
            self.touch_all(&snapshot);
        }
        marks
    }

    /// Whether more than half have been silent for [`UNHEARD`] in this term.
    pub(super) fn most_are_silent(&self) -> bool {
        let snapshot = self.snapshot.borrow().clone();
        let known = self.lock();
        let members = || snapshot.members.iter().filter(|(_, pod)| pod.started);
        let silent =
            members().filter(|(uid, _)| known.members.get(*uid).is_some_and(|member| member.is_silent_for(UNHEARD)));
        2 * silent.count() > members().count()
    }
}

impl Known {
    fn member(&mut self, uid: &str) -> &mut Member {
        self.members.entry(uid.to_owned()).or_insert_with(Member::new)
    }
}

/// Puts `new` in the place of `old`. Returns the keys whose value changed.
fn replace<V: PartialEq>(old: &mut BTreeMap<String, V>, new: BTreeMap<String, V>) -> BTreeSet<String> {
    let keys = old.keys().chain(new.keys());
    let changed = keys.filter(|key| old.get(*key) != new.get(*key)).cloned().collect();
    *old = new;
    changed
}

/// Clusters and endpoints that a Canary's listeners and routes need: one that is rejected holds the rest up.
fn needs<'a>(snapshot: &'a Snapshot, routed: &'a crate::mesh::Routed) -> impl Iterator<Item = &'a (TypeUrl, String)> {
    let resources = routed.resources.iter().filter_map(|(kind, name)| snapshot.fleet.get(*kind, name));
    resources.flat_map(|resource| resource.needs.iter())
}

#[cfg(test)]
mod tests {
    use sluice_crds::{Backend, Traffic};

    use super::*;
    use crate::mesh::{self, Routed};

    const PORT: &str = "shop/web:80";
    const CLUSTER: &str = "shop/web:80/0123456789";

    struct Test {
        members: Arc<Members>,
        touches: Touches,
        snapshot: watch::Sender<Arc<Snapshot>>,
    }

    fn key() -> CanaryKey {
        CanaryKey { namespace: "shop".to_owned(), name: "web".to_owned() }
    }

    fn resource(version: &str) -> Resource {
        Resource { version: version.into(), body: Arc::default(), needs: Arc::default(), empty: false }
    }

    /// One Canary whose weight is in a route, and a fleet of one member.
    fn world(route: &str, lagging: bool) -> Snapshot {
        let mut snapshot = Snapshot::default();
        for (kind, name, version) in
            [(TypeUrl::Cluster, CLUSTER, "c1"), (TypeUrl::Listener, PORT, "l1"), (TypeUrl::Route, PORT, route)]
        {
            snapshot.fleet.insert(kind, name, resource(version));
        }
        let carriers = [(TypeUrl::Listener, PORT.to_owned()), (TypeUrl::Route, PORT.to_owned())];
        snapshot.carriers = carriers.iter().map(|carrier| (carrier.clone(), key())).collect();
        let traffic =
            Traffic { primary: Backend::revision("0123456789"), canary: None, weight: 0, mirror: 0, matches: None };
        snapshot.canaries = BTreeMap::from([(key(), Routed { traffic, resources: carriers.into() })]);
        let name = "fleet-1".to_owned();
        let member = mesh::Member { name, started: true, lagging, in_slices: !lagging, addresses: Vec::new() };
        snapshot.members = BTreeMap::from([("uid".to_owned(), member)]);
        snapshot
    }

    impl Test {
        fn new(world: Snapshot) -> Self {
            let (snapshot, seen) = watch::channel(Arc::new(world));
            let touches = Touches::default();
            Self { members: Members::new(seen, touches.clone(), Duration::from_secs(60)), touches, snapshot }
        }

        fn says(&self, stream: u64, kind: TypeUrl, held: &[(&str, &str)], rejected: &[(&str, &str)]) {
            let held = held.iter().map(|(name, version)| ((*name).to_owned(), Version::from(*version))).collect();
            let rejected = rejected.iter().map(|(name, why)| ((*name).to_owned(), (*why).to_owned())).collect();
            self.members.holds("uid", stream, kind, &held, rejected);
        }

        /// All of a [`world`] with this route.
        fn holds(&self, stream: u64, route: &str) {
            self.says(stream, TypeUrl::Cluster, &[(CLUSTER, "c1")], &[]);
            self.says(stream, TypeUrl::Listener, &[(PORT, "l1")], &[]);
            self.says(stream, TypeUrl::Route, &[(PORT, route)], &[]);
        }

        fn fleet(&self) -> Fleet {
            self.members.fleet(&key())
        }

        async fn touched(&self) -> bool {
            !self.touches.is_empty() && self.touches.take().await.contains(&key())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_member_that_is_away_counts_with_what_it_acknowledged_for_30_seconds() {
        let test = Test::new(world("r1", false));
        let stream = test.members.connected("uid");
        test.holds(stream, "r1");
        assert!(test.fleet().effective.is_some());
        test.members.disconnected("uid", stream);
        tokio::time::advance(SILENCE - Duration::from_secs(1)).await;
        assert!(test.fleet().effective.is_some() && test.members.marks().is_empty());

        // It cannot have acknowledged what came since.
        test.snapshot.send_replace(Arc::new(world("r2", false)));
        assert_eq!(test.fleet().lagging, ["fleet-1"]);
        test.snapshot.send_replace(Arc::new(world("r1", false)));

        assert!(test.touched().await && !test.touched().await);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(test.members.marks(), [("fleet-1".to_owned(), true)]);
        assert!(test.touched().await, "what its Canaries show has changed");
        assert_eq!(test.fleet().lagging, ["fleet-1"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_member_is_not_silent_before_it_could_speak() {
        let test = Test::new(world("r1", false));
        tokio::time::advance(10 * SILENCE).await;
        assert!(test.members.marks().is_empty());
        tokio::time::advance(SILENCE).await;
        assert_eq!(test.members.marks().len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_marked_member_is_unmarked_when_it_holds_the_present_configuration() {
        let test = Test::new(world("r2", true));
        let stream = test.members.connected("uid");
        assert!(test.members.marks().is_empty(), "it has said nothing yet");
        test.holds(stream, "r1");
        assert!(test.members.marks().is_empty(), "its route is old");
        test.says(stream, TypeUrl::Route, &[(PORT, "r2")], &[]);
        assert_eq!(test.members.marks(), [("fleet-1".to_owned(), false)]);
        // A configuration that it refuses must not keep it away from the others' traffic.
        test.says(stream, TypeUrl::Route, &[(PORT, "r1")], &[(PORT, "no")]);
        assert_eq!(test.members.marks(), [("fleet-1".to_owned(), false)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_is_unheard_when_more_than_half_have_been_silent_for_a_minute_of_its_term() {
        let mut two = world("r1", false);
        let second = two.members["uid"].clone();
        two.members.insert("second".to_owned(), second);
        let test = Test::new(two);
        let stream = test.members.connected("uid");
        test.members.marks();
        tokio::time::advance(UNHEARD).await;
        assert!(!test.members.most_are_silent(), "it is one of two");
        test.members.disconnected("uid", stream);
        tokio::time::advance(UNHEARD - Duration::from_secs(1)).await;
        assert!(!test.members.most_are_silent());
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(test.members.most_are_silent());

        test.members.begin_term();
        test.members.marks();
        assert!(!test.members.most_are_silent(), "they have had no time in this term");
        tokio::time::advance(UNHEARD).await;
        assert!(test.members.most_are_silent());
        test.members.connected("uid");
        assert!(!test.members.most_are_silent());
    }

    #[tokio::test]
    async fn the_newest_stream_of_a_pod_speaks_for_it() {
        let test = Test::new(world("r1", false));
        let old = test.members.connected("uid");
        test.holds(old, "r1");
        let new = test.members.connected("uid");
        test.holds(new, "r1");
        test.says(old, TypeUrl::Route, &[], &[]);
        test.members.disconnected("uid", old);
        assert!(test.fleet().effective.is_some());
        assert!(test.members.lock().members["uid"].stream.is_some());
    }

    #[tokio::test]
    async fn a_refused_cluster_touches_the_canary_that_it_holds_up() {
        let test = Test::new(world("r1", false));
        let stream = test.members.connected("uid");
        test.holds(stream, "r1");
        assert!(test.touched().await);
        test.says(stream, TypeUrl::Cluster, &[(CLUSTER, "c1")], &[(CLUSTER, "no such cipher")]);
        assert!(test.touched().await);
        let rejected = test.fleet().rejected;
        assert_eq!(rejected, None, "nothing that carries its traffic needs it");
    }

    #[tokio::test]
    async fn a_pod_counts_from_when_the_cache_shows_it() {
        let mut empty = world("r1", false);
        let members = std::mem::take(&mut empty.members);
        let test = Test::new(empty);
        let stream = test.members.connected("uid");
        test.holds(stream, "r1");
        assert!(test.members.marks().is_empty());
        let mut shown = world("r1", false);
        shown.members = members;
        test.snapshot.send_replace(Arc::new(shown));
        assert!(test.fleet().effective.is_some());
    }
}
