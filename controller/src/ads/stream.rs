//! What one stream holds and what it should be sent next: pure state, shared by both variants of the protocol.
//!
//! A stream has at most one unanswered response per type. What changes meanwhile is coalesced: the next response carries
//! the newest state. So a slow client costs a bounded amount of memory and delays nobody. Where a response can be cut (delta), what does
//! not fit into one follows its answer, by the same rules as if it had changed just then.
//!
//! Make before break (docs/xds.md, "Order"): clusters, endpoints, listeners, routes; a listener or a route goes out only when the
//! clusters and endpoints that it needs are acknowledged; removals go in reverse, each type when all later ones have nothing
//! left to say. A client that asks for its listeners by name (gRPC) asks for the rest from the listener down, by itself in
//! this order: nothing is held back from it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use sluice_xds::TypeUrl;

use crate::mesh::{LARGEST_ROUTES, Resource, View};

/// Content hash of a resource.
pub(super) type Version = Arc<str>;

/// Most bytes of names and resources in one response, but for a resource that is larger by itself. Below the 4 MiB that clients of gRPC
/// take by default, and beside the largest route that there may be is room for small ones.
pub(super) const LARGEST_RESPONSE: usize = 3 << 20;
const _: () = assert!(LARGEST_ROUTES < LARGEST_RESPONSE);
/// What a name takes beside its bytes, roughly: short ones are mostly that.
const NAME: usize = 64;
/// Most characters that are kept of why a client rejects a resource.
const LONGEST_REASON: usize = 1024;

/// What a client holds of one type, and asked for.
#[derive(Debug, Default)]
pub(super) struct Holdings {
    /// It asked for everything of this type.
    pub wildcard: bool,
    /// It asked for these by name.
    pub names: BTreeSet<String>,
    /// Acknowledged.
    pub held: BTreeMap<String, Version>,
    /// Those of the held that were not empty when they were sent. What an earlier stream left is not known to be among them.
    filled: BTreeSet<String>,
    /// Rejected in this version, and why: not sent again until it changes.
    pub rejected: BTreeMap<String, (Version, String)>,
    /// Names that it asked for, that do not exist, and of which it was told so.
    pub absent: BTreeSet<String>,
    /// Sent, and neither acknowledged nor rejected.
    pub in_flight: Option<InFlight>,
    /// Whose turn it was in the last response that was cut.
    pub turn: Option<String>,
    /// The first request of this type has come.
    pub begun: bool,
    /// A response of this type was sent on this stream.
    pub responded: bool,
}

/// A response on its way.
#[derive(Debug)]
pub(super) struct InFlight {
    pub nonce: String,
    /// `None` for a removal.
    pub resources: BTreeMap<String, Option<Sent>>,
}

#[derive(Debug)]
pub(super) struct Sent {
    version: Version,
    empty: bool,
}

/// What a response should say.
#[derive(Debug, Default)]
pub(super) struct Difference {
    pub updates: Vec<(String, Resource)>,
    pub removals: Vec<String>,
}

impl Difference {
    pub(super) fn is_empty(&self) -> bool {
        self.updates.is_empty() && self.removals.is_empty()
    }

    /// Leaves what one response may say; the client's answer brings the rest into the next difference. Removals come first: one may
    /// free the port that another listener gets. Of the resources, one that has its turn, the first behind `last`, so that each gets there
    /// however often others change; then the smallest, so that large ones hold up no small one. Returns whose turn it was.
    pub(super) fn cut(&mut self, most: usize, last: Option<String>) -> Option<String> {
        fn size((name, resource): &(String, Resource)) -> usize {
            name.len() + resource.body.value.len()
        }
        let sizes = self.removals.iter().map(String::len).chain(self.updates.iter().map(size));
        if sizes.sum::<usize>() <= most {
            return None;
        }
        let mut used = 0;
        let mut fits = |size: usize| {
            let fits = used == 0 || used + size <= most;
            used += size;
            fits
        };
        let removals = self.removals.iter().take_while(|name| fits(name.len())).count();
        if removals < self.removals.len() {
            self.removals.truncate(removals);
            self.updates.clear();
            return last;
        }
        let before = self.updates.partition_point(|(name, _)| last.as_ref().is_some_and(|last| name <= last));
        self.updates.rotate_left(before);
        let turn = self.updates.first().map(|(name, _)| name.clone());
        if let [_, others @ ..] = self.updates.as_mut_slice() {
            others.sort_by_key(size);
        }
        let updates = self.updates.iter().take_while(|update| fits(size(update))).count();
        self.updates.truncate(updates);
        if updates == 0 { last } else { turn }
    }
}

/// Everything about one stream.
#[derive(Debug, Default)]
pub(super) struct State {
    types: BTreeMap<TypeUrl, Holdings>,
    nonces: u64,
}

impl State {
    pub(super) fn holdings(&mut self, kind: TypeUrl) -> &mut Holdings {
        self.types.entry(kind).or_default()
    }

    pub(super) fn nonce(&mut self) -> String {
        self.nonces += 1;
        self.nonces.to_string()
    }

    /// Bytes of all names that the client asked for, or said to hold: what it makes us keep.
    pub(super) fn named(&self) -> usize {
        let names = |holdings: &Holdings| {
            let held = holdings.held.iter().map(|(name, version)| NAME + name.len() + version.len());
            holdings.names.iter().map(|name| NAME + name.len()).chain(held).sum::<usize>()
        };
        self.types.values().map(names).sum()
    }

    /// What this type should be sent now: nothing while a response is on its way.
    pub(super) fn difference(&self, kind: TypeUrl, view: &View) -> Difference {
        let Some(holdings) = self.types.get(&kind).filter(|holdings| holdings.begun && holdings.in_flight.is_none())
        else {
            return Difference::default();
        };
        let mut difference = Difference::default();
        for (name, resource) in view.of(kind) {
            if holdings.wants(name, resource) && self.ready(resource, view) {
                difference.updates.push((name.to_owned(), resource.clone()));
            }
        }
        if self.later_are_settled(kind, view) {
            difference.removals.extend(holdings.held.keys().filter(|name| !view.keeps(kind, name)).cloned());
        }
        // A name that was asked for and does not exist is answered, once: the client waits for it.
        let unknown = |name: &&String| {
            view.get(kind, name).is_none() && !holdings.held.contains_key(*name) && !holdings.absent.contains(*name)
        };
        difference.removals.extend(holdings.names.iter().filter(unknown).cloned());
        difference
    }

    /// It asked for everything of a type of which there is nothing, and has not been told so: it cannot tell that from a
    /// response that is still to come, and a proxy without any Service would never be ready.
    pub(super) fn awaits_empty(&self, kind: TypeUrl, view: &View) -> bool {
        self.types.get(&kind).is_some_and(|holdings| holdings.wildcard && !holdings.responded)
            && view.of(kind).next().is_none()
    }

    /// It follows the whole view, and so relies on our order.
    fn follows_all(&self) -> bool {
        [TypeUrl::Listener, TypeUrl::Cluster].iter().any(|kind| self.types.get(kind).is_some_and(|held| held.wildcard))
    }

    /// Nothing of this type is on its way, waits to be sent, or serves on in an older version because the newer was rejected.
    fn settled(&self, kind: TypeUrl, view: &View) -> bool {
        let Some(holdings) = self.types.get(&kind).filter(|holdings| holdings.begun) else {
            return !self.follows_all() || !self.may_hold_unsaid(kind, view);
        };
        holdings.in_flight.is_none()
            && view.of(kind).all(|(name, resource)| !holdings.lacks(name, resource))
            && holdings.held.keys().all(|name| view.keeps(kind, name))
    }

    /// It may hold some of a type of which it has not said yet what it holds: it has come back with one type after the other.
    fn may_hold_unsaid(&self, kind: TypeUrl, view: &View) -> bool {
        let Some(listeners) = self.types.get(&TypeUrl::Listener).filter(|holdings| holdings.begun) else { return true };
        // It asks for the routes of its listeners, if any of these has one.
        kind == TypeUrl::Route
            && listeners.held.keys().any(|name| {
                let listener = view.get(TypeUrl::Listener, name);
                listener.is_none_or(|listener| listener.needs.iter().any(|(kind, _)| *kind == TypeUrl::Route))
            })
    }

    fn later_are_settled(&self, kind: TypeUrl, view: &View) -> bool {
        match kind {
            TypeUrl::Listener => true,
            TypeUrl::Route => self.settled(TypeUrl::Listener, view),
            TypeUrl::Cluster | TypeUrl::Endpoints => {
                self.settled(TypeUrl::Listener, view) && self.settled(TypeUrl::Route, view)
            }
        }
    }

    /// The clusters that it names are acknowledged in their present version, or were rejected and serve on in an older one; of the
    /// endpoints any version is, unless it was empty and the present one is not: endpoints that come and go must not
    /// keep a weight of 0 from going out.
    fn ready(&self, resource: &Resource, view: &View) -> bool {
        if !self.follows_all() {
            return true;
        }
        resource.needs.iter().all(|(kind, name)| {
            if *kind == TypeUrl::Route {
                // Asked for by the client once it has the listener.
                return true;
            }
            let Some(holdings) = self.types.get(kind) else { return false };
            let Some(held) = holdings.held.get(name) else { return false };
            let Some(present) = view.get(*kind, name) else { return false };
            present.version == *held
                || (*kind == TypeUrl::Endpoints && (present.empty || holdings.filled.contains(name)))
                || holdings.rejected.get(name).is_some_and(|(at, _)| *at == present.version)
        })
    }
}

impl Holdings {
    /// It asked for this resource and does not hold its present version.
    fn lacks(&self, name: &str, resource: &Resource) -> bool {
        (self.wildcard || self.names.contains(name)) && self.held.get(name) != Some(&resource.version)
    }

    fn wants(&self, name: &str, resource: &Resource) -> bool {
        self.lacks(name, resource) && self.rejected.get(name).is_none_or(|(version, _)| *version != resource.version)
    }

    /// Puts a response on its way.
    pub(super) fn sent(&mut self, nonce: String, difference: &Difference) {
        let sent = |resource: &Resource| Some(Sent { version: resource.version.clone(), empty: resource.empty });
        let updates = difference.updates.iter().map(|(name, resource)| (name.clone(), sent(resource)));
        let removals = difference.removals.iter().map(|name| (name.clone(), None));
        self.in_flight = Some(InFlight { nonce, resources: updates.chain(removals).collect() });
        self.responded = true;
    }

    /// The client answered the response with this nonce: all is acknowledged but for what it rejects. `None` rejects
    /// everything. Returns false for a nonce that is not on its way.
    pub(super) fn answered(&mut self, nonce: &str, rejected: Option<&BTreeMap<String, String>>, all: &str) -> bool {
        let Some(in_flight) = self.in_flight.take_if(|in_flight| in_flight.nonce == nonce) else { return false };
        for (name, sent) in in_flight.resources {
            let reason = match rejected {
                Some(rejected) => rejected.get(&name).map(String::as_str),
                None => Some(all),
            };
            match (sent, reason) {
                (Some(Sent { version, empty }), None) => {
                    self.rejected.remove(&name);
                    self.absent.remove(&name);
                    if empty {
                        self.filled.remove(&name);
                    } else {
                        self.filled.insert(name.clone());
                    }
                    self.held.insert(name, version);
                }
                (Some(Sent { version, .. }), Some(reason)) => {
                    self.rejected.insert(name, (version, reason.chars().take(LONGEST_REASON).collect()));
                }
                // A removal cannot be rejected: there is nothing to keep.
                (None, _) => {
                    self.held.remove(&name);
                    self.filled.remove(&name);
                    self.rejected.remove(&name);
                    if self.names.contains(&name) {
                        self.absent.insert(name);
                    }
                }
            }
        }
        true
    }

    pub(super) fn unsubscribe(&mut self, name: &str) {
        self.names.remove(name);
        self.absent.remove(name);
        if !self.wildcard {
            self.held.remove(name);
            self.filled.remove(name);
            self.rejected.remove(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use prost_types::Any;

    use super::*;

    const PORT: &str = "shop/web:80";
    const OLD: &str = "shop/web:80/old";
    const NEW: &str = "shop/web:80/new";

    fn resource(version: &str, needs: &[(TypeUrl, &str)]) -> Resource {
        let needs = needs.iter().map(|(kind, name)| (*kind, (*name).to_owned())).collect();
        Resource { version: version.into(), body: Arc::default(), needs: Arc::new(needs), empty: version == "empty" }
    }

    /// A port whose route sends to these revisions, each with its endpoints.
    fn view(route: &str, revisions: &[(&str, &str)]) -> View {
        let mut view = View::default();
        let mut needs = Vec::new();
        for (name, endpoints) in revisions {
            view.insert(TypeUrl::Cluster, name, resource("c", &[]));
            view.insert(TypeUrl::Endpoints, name, resource(endpoints, &[]));
            needs.extend([(TypeUrl::Cluster, *name), (TypeUrl::Endpoints, *name)]);
        }
        view.insert(TypeUrl::Listener, PORT, resource("l", &[(TypeUrl::Route, PORT)]));
        view.insert(TypeUrl::Route, PORT, resource(route, &needs));
        view
    }

    /// A client that comes (back) and asks for this type.
    fn asks(state: &mut State, kind: TypeUrl, names: &[&str], held: &[(&str, &str)]) {
        let holdings = state.holdings(kind);
        holdings.begun = true;
        holdings.wildcard = names.is_empty();
        holdings.names = names.iter().map(|name| (*name).to_owned()).collect();
        holdings.held = held.iter().map(|(name, version)| ((*name).to_owned(), Version::from(*version))).collect();
    }

    fn everything(names: &[&str]) -> State {
        let mut state = State::default();
        asks(&mut state, TypeUrl::Cluster, &[], &[]);
        asks(&mut state, TypeUrl::Listener, &[], &[]);
        asks(&mut state, TypeUrl::Endpoints, names, &[]);
        asks(&mut state, TypeUrl::Route, &[PORT], &[]);
        state
    }

    /// The client answers all that it can be sent, until nothing is left to say.
    fn settle(state: &mut State, view: &View) {
        while TypeUrl::ALL.into_iter().any(|kind| answer(state, kind, view, None)) {}
    }

    /// Sends one type and takes the client's answer to it. Returns whether there was something to send.
    fn answer(state: &mut State, kind: TypeUrl, view: &View, refusal: Option<&str>) -> bool {
        let difference = state.difference(kind, view);
        let nonce = state.nonce();
        let accepted = BTreeMap::new();
        state.holdings(kind).sent(nonce.clone(), &difference);
        let known =
            state.holdings(kind).answered(&nonce, refusal.is_none().then_some(&accepted), refusal.unwrap_or_default());
        assert!(known);
        !difference.is_empty()
    }

    fn updates(state: &State, kind: TypeUrl, view: &View) -> Vec<String> {
        state.difference(kind, view).updates.into_iter().map(|(name, _)| name).collect()
    }

    fn removals(state: &State, kind: TypeUrl, view: &View) -> Vec<String> {
        state.difference(kind, view).removals
    }

    #[test]
    fn endpoints_that_come_and_go_do_not_keep_a_route_from_going_out() {
        let mut state = everything(&[OLD, NEW]);
        settle(&mut state, &view("80/20", &[(OLD, "e1"), (NEW, "e1")]));
        // Its endpoints change faster than the client acknowledges them, while the weight goes to 0.
        let flaps = view("100/0", &[(OLD, "e1"), (NEW, "e2")]);
        assert_eq!(updates(&state, TypeUrl::Endpoints, &flaps), [NEW]);
        assert_eq!(updates(&state, TypeUrl::Route, &flaps), [PORT]);
        let gone = view("100/0", &[(OLD, "e1"), (NEW, "empty")]);
        assert_eq!(updates(&state, TypeUrl::Route, &gone), [PORT]);
    }

    #[test]
    fn a_route_waits_for_endpoints_where_the_client_has_none() {
        let mut state = everything(&[OLD, NEW]);
        settle(&mut state, &view("100/0", &[(OLD, "e1"), (NEW, "empty")]));
        let raised = view("80/20", &[(OLD, "e1"), (NEW, "e1")]);
        assert_eq!(updates(&state, TypeUrl::Route, &raised), Vec::<String>::new());
        assert!(answer(&mut state, TypeUrl::Endpoints, &raised, None));
        assert_eq!(updates(&state, TypeUrl::Route, &raised), [PORT]);

        // One that comes back holds endpoints of which nobody knows whether they are any.
        let mut back = everything(&[OLD, NEW]);
        asks(&mut back, TypeUrl::Cluster, &[], &[(OLD, "c"), (NEW, "c")]);
        asks(&mut back, TypeUrl::Endpoints, &[OLD, NEW], &[(OLD, "e1"), (NEW, "e0")]);
        assert_eq!(updates(&back, TypeUrl::Route, &raised), Vec::<String>::new());
        assert!(answer(&mut back, TypeUrl::Endpoints, &raised, None));
        assert_eq!(updates(&back, TypeUrl::Route, &raised), [PORT]);
    }

    #[test]
    fn a_client_that_asks_by_name_gets_listener_and_route_before_the_clusters() {
        let view = view("100/0", &[(OLD, "e1")]);
        let mut state = State::default();
        asks(&mut state, TypeUrl::Listener, &[PORT], &[]);
        assert!(answer(&mut state, TypeUrl::Listener, &view, None));
        asks(&mut state, TypeUrl::Route, &[PORT], &[]);
        assert!(answer(&mut state, TypeUrl::Route, &view, None));
        asks(&mut state, TypeUrl::Cluster, &[OLD], &[]);
        assert!(answer(&mut state, TypeUrl::Cluster, &view, None));
        asks(&mut state, TypeUrl::Endpoints, &[OLD], &[]);
        assert!(answer(&mut state, TypeUrl::Endpoints, &view, None));
    }

    #[test]
    fn a_client_that_comes_back_keeps_its_clusters_until_its_routes_are_known_to_do_without() {
        let now = view("100/0", &[(NEW, "e1")]);
        let mut state = State::default();
        asks(&mut state, TypeUrl::Cluster, &[], &[(OLD, "c"), (NEW, "c")]);
        assert!(removals(&state, TypeUrl::Cluster, &now).is_empty(), "its listeners are not known yet");
        asks(&mut state, TypeUrl::Listener, &[], &[(PORT, "l")]);
        assert!(removals(&state, TypeUrl::Cluster, &now).is_empty(), "its routes are not known yet");
        asks(&mut state, TypeUrl::Endpoints, &[OLD, NEW], &[(OLD, "e1"), (NEW, "e1")]);
        asks(&mut state, TypeUrl::Route, &[PORT], &[(PORT, "80/20")]);
        assert!(removals(&state, TypeUrl::Cluster, &now).is_empty(), "its route still names it");
        assert!(answer(&mut state, TypeUrl::Route, &now, None));
        assert_eq!(removals(&state, TypeUrl::Cluster, &now), [OLD]);
        assert_eq!(removals(&state, TypeUrl::Endpoints, &now), [OLD]);
    }

    #[test]
    fn a_route_that_serves_on_because_a_newer_one_was_refused_keeps_its_clusters() {
        let mut state = everything(&[OLD, NEW]);
        settle(&mut state, &view("80/20", &[(OLD, "e1"), (NEW, "e1")]));
        let now = view("0/100", &[(NEW, "e1")]);
        assert!(answer(&mut state, TypeUrl::Route, &now, Some("no")));
        assert!(updates(&state, TypeUrl::Route, &now).is_empty(), "refused in this version");
        assert!(removals(&state, TypeUrl::Cluster, &now).is_empty());
        let mended = view("0/100 mended", &[(NEW, "e1")]);
        assert!(answer(&mut state, TypeUrl::Route, &mended, None));
        assert_eq!(removals(&state, TypeUrl::Cluster, &mended), [OLD]);
    }

    #[test]
    fn nothing_is_sent_while_a_response_of_its_type_is_unanswered() {
        let mut state = everything(&[OLD]);
        let first = view("100/0", &[(OLD, "e1")]);
        let difference = state.difference(TypeUrl::Cluster, &first);
        state.holdings(TypeUrl::Cluster).sent("1".to_owned(), &difference);
        let more = view("100/0", &[(OLD, "e1"), (NEW, "e1")]);
        assert!(state.difference(TypeUrl::Cluster, &more).is_empty());
        assert!(!state.holdings(TypeUrl::Cluster).answered("0", Some(&BTreeMap::new()), ""), "a nonce of another");
        assert!(state.holdings(TypeUrl::Cluster).answered("1", Some(&BTreeMap::new()), ""));
        assert_eq!(updates(&state, TypeUrl::Cluster, &more), [NEW]);
    }

    /// Resources by name and size, the name not counted.
    fn difference(updates: &[(&str, usize)], removals: &[&str]) -> Difference {
        let sized = |(name, size): &(&str, usize)| {
            let body = Any { type_url: String::new(), value: vec![0; *size] };
            ((*name).to_owned(), Resource { body: Arc::new(body), ..resource("1", &[]) })
        };
        let removals = removals.iter().map(|name| (*name).to_owned()).collect();
        Difference { updates: updates.iter().map(sized).collect(), removals }
    }

    fn names(difference: &Difference) -> Vec<&str> {
        difference.updates.iter().map(|(name, _)| name.as_str()).collect()
    }

    #[test]
    fn what_does_not_fit_goes_by_turns_and_the_small_never_wait_for_the_large() {
        let mut turn = None;
        // All of it changes again before each response.
        for expected in [["a", "z"], ["b", "z"], ["c", "z"], ["z", "a"], ["a", "z"]] {
            let mut all = difference(&[("a", 59), ("b", 59), ("c", 59), ("z", 9)], &[]);
            turn = all.cut(100, turn);
            assert_eq!(names(&all), expected);
        }
    }

    #[test]
    fn a_response_has_no_more_than_it_may_but_for_one_resource_that_is_larger() {
        let mut fits = difference(&[("b", 49), ("a", 49)], &[]);
        assert_eq!((fits.cut(100, Some("b".to_owned())), names(&fits)), (None, vec!["b", "a"]), "as it was");
        let mut larger = difference(&[("a", 500), ("b", 9)], &[]);
        assert_eq!((larger.cut(100, None).as_deref(), names(&larger)), (Some("a"), vec!["a"]));
    }

    #[test]
    fn what_is_removed_goes_before_what_is_new() {
        let gone = ["gone-aa", "gone-ab", "gone-ac"];
        let mut first = difference(&[("a", 9), ("b", 29)], &gone);
        assert_eq!(first.cut(40, None).as_deref(), Some("a"));
        assert_eq!((first.removals.len(), names(&first)), (3, vec!["a"]));
        let mut more = difference(&[("a", 9)], &gone);
        assert_eq!(more.cut(20, Some("z".to_owned())).as_deref(), Some("z"), "nobody had a turn");
        assert_eq!((more.removals, more.updates.len()), (vec!["gone-aa".to_owned(), "gone-ab".to_owned()], 0));
        let mut large = difference(&[("a", 99)], &gone);
        assert_eq!((large.cut(100, None), large.removals.len(), large.updates.len()), (None, 3, 0), "it comes next");
    }

    #[test]
    fn what_is_withheld_is_neither_sent_nor_removed_and_holds_up_no_removal() {
        let mut state = everything(&[OLD, NEW]);
        settle(&mut state, &view("80/20", &[(OLD, "e1"), (NEW, "e1")]));
        let mut now = view("100/0", &[(OLD, "e1")]);
        for kind in [TypeUrl::Listener, TypeUrl::Route] {
            now.resources.remove(&kind);
            now.withheld.insert((kind, PORT.to_owned()));
        }
        for kind in [TypeUrl::Listener, TypeUrl::Route] {
            assert!(state.difference(kind, &now).is_empty(), "it keeps what it holds");
        }
        assert_eq!(removals(&state, TypeUrl::Cluster, &now), [NEW]);
        assert!(everything(&[OLD]).difference(TypeUrl::Listener, &now).is_empty(), "nor is it given to others");
    }
}
