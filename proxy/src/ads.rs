//! The client of the control plane: one delta ADS stream, kept open for ever (docs/xds.md).
//!
//! What was received outlives the stream: without a control plane the last good configuration serves, and on the next
//! stream only what differs is sent.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    convert::Infallible,
    future::Future,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use prost_types::{Struct, Value, value::Kind};
use sluice_xds::{
    TypeUrl,
    envoy::{
        config::core::v3::{Locality, Node, node::UserAgentVersionType},
        service::discovery::v3::{
            DeltaDiscoveryRequest, DeltaDiscoveryResponse,
            aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
        },
    },
    google::rpc::Status as RpcStatus,
    pack,
    sluice::xds::v1::{RejectedResource, RejectedResources},
};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use crate::{
    config::{Change, ConfigError, Rejected, Resources, Subscriptions, short_name},
    controller::{Backoff, ConnectError, Controller, leader},
    identity::Certificate,
    metrics::Metrics,
    outcomes,
    snapshot::Snapshot,
};

const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);
/// For the server's first sign of life on a new stream, and for our requests to leave.
const STREAM_TIMEOUT: Duration = Duration::from_secs(10);
/// Far above what the controller puts into one response, but for the endpoints of one cluster, which cannot be cut: tonic's default of
/// 4 MiB would cap their number.
const LARGEST_RESPONSE: usize = 64 << 20;
/// Requests that wait to be sent: a few for each response. When it is full we wait, and then leave the stream.
const REQUESTS: usize = 64;

/// The epoch of the leader, in `node.metadata`.
const EPOCH: &str = "sluice.dev/epoch";

/// How long the client waits for what.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// How long a route or a listener may wait for its clusters before the server is told. The server sends clusters
    /// first, so this is for a server that does not, or for a cluster that was rejected.
    pub clusters: Duration,
    /// A listener that could not be opened is tried again this often.
    pub apply_again: Duration,
    /// The first configuration is whole when nothing more comes for this long.
    pub quiet: Duration,
    /// The same while there is no listener at all.
    pub quiet_without_listeners: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            clusters: Duration::from_secs(15),
            apply_again: Duration::from_secs(5),
            quiet: Duration::from_millis(200),
            quiet_without_listeners: Duration::from_secs(1),
        }
    }
}

/// Puts snapshots into effect.
pub trait Apply {
    /// Resolves when every worker thread has switched: no request that starts later uses an older snapshot. Returns
    /// the listeners that could not be opened, with the reason.
    fn apply(&self, snapshot: Arc<Snapshot>) -> impl Future<Output = BTreeMap<String, String>>;
}

/// What the client knows, shared with the admin server.
#[derive(Debug)]
pub struct State {
    inner: Mutex<Inner>,
    configured: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct Inner {
    resources: Resources,
    failed: BTreeMap<String, String>,
    connected_to: Option<SocketAddr>,
    control_plane: String,
    epoch: Option<u64>,
    last_error: Option<String>,
    updates: u64,
}

impl Default for State {
    fn default() -> Self {
        Self { inner: Mutex::default(), configured: watch::Sender::new(false) }
    }
}

impl State {
    /// Of a proxy in this zone; an empty one is not known.
    #[must_use]
    pub fn in_zone(zone: String) -> Self {
        let inner = Inner { resources: Resources::in_zone(zone), ..Inner::default() };
        Self { inner: Mutex::new(inner), ..Self::default() }
    }

    /// Never held across an await, and for no longer than one response takes to be parsed.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Whoever panicked with the lock aborted the process (release) or fails its test.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the first configuration is complete and acknowledged.
    #[must_use]
    pub fn configured(&self) -> bool {
        *self.configured.borrow()
    }

    /// Whether a stream to the control plane is open.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.lock().connected_to.is_some()
    }

    /// Resolves once [`configured`](Self::configured).
    pub async fn wait_configured(&self) {
        // The sender lives in `self`, so this cannot fail.
        let _ = self.configured.subscribe().wait_for(|configured| *configured).await;
    }

    /// Everything that is held, as JSON.
    #[must_use]
    pub fn dump(&self) -> serde_json::Value {
        let inner = self.lock();
        let mut dump = inner.resources.dump();
        dump["controlPlane"] = serde_json::json!({
            "connectedTo": inner.connected_to.map(|address| address.to_string()),
            "identifier": inner.control_plane,
            "highestEpoch": inner.epoch,
            "lastError": inner.last_error,
        });
        dump["failedListeners"] = serde_json::json!(inner.failed);
        dump["configured"] = self.configured().into();
        dump
    }

    /// Appends our series in the Prometheus text format.
    pub fn render(&self, text: &mut String) {
        use std::fmt::Write as _;
        let inner = self.lock();
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "# HELP sluice_xds_connected Whether a stream to the control plane is open.\n\
             # TYPE sluice_xds_connected gauge\n\
             sluice_xds_connected {}\n\
             # HELP sluice_xds_epoch The highest epoch of a leader that was seen.\n\
             # TYPE sluice_xds_epoch gauge\n\
             sluice_xds_epoch {}\n\
             # HELP sluice_xds_updates_total Responses of the control plane that were taken in.\n\
             # TYPE sluice_xds_updates_total counter\n\
             sluice_xds_updates_total {}\n\
             # HELP sluice_xds_failed_listeners Listeners that could not be opened.\n\
             # TYPE sluice_xds_failed_listeners gauge\n\
             sluice_xds_failed_listeners {}\n\
             # HELP sluice_xds_resources Resources held, by type.\n\
             # TYPE sluice_xds_resources gauge\n",
            u8::from(inner.connected_to.is_some()),
            inner.epoch.unwrap_or_default(),
            inner.updates,
            inner.failed.len(),
        );
        for kind in TypeUrl::ALL {
            let _ = writeln!(
                text,
                "sluice_xds_resources{{type=\"{}\"}} {}",
                short_name(kind),
                inner.resources.count(kind).0
            );
        }
        text.push_str(
            "# HELP sluice_xds_rejected_resources Resources whose newest version does not serve, by type.\n\
             # TYPE sluice_xds_rejected_resources gauge\n",
        );
        for kind in TypeUrl::ALL {
            let _ = writeln!(
                text,
                "sluice_xds_rejected_resources{{type=\"{}\"}} {}",
                short_name(kind),
                inner.resources.count(kind).1
            );
        }
    }
}

/// How the proxy introduces itself. For people: what it may see follows from its certificate.
#[derive(Debug, Clone)]
pub struct Introduction {
    /// The Pod's name.
    pub id: String,
    /// `fleet` or `sidecar`.
    pub role: &'static str,
    /// How many listeners there must be before the configuration can be complete: a sidecar without one serves
    /// nothing, a fleet without Services is in order.
    pub least_listeners: usize,
}

#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("the controller at {address} ended the stream: {}: {}", .status.code(), .status.message())]
    Ended { address: SocketAddr, status: Box<tonic::Status> },
    #[error("the controller at {address} closed the stream")]
    Closed { address: SocketAddr },
    #[error("the controller at {address} answered nothing within {} s", STREAM_TIMEOUT.as_secs())]
    Silent { address: SocketAddr },
    /// The controller would end the stream with the certificate that it was opened with.
    #[error("there is a renewed certificate")]
    Renewed,
    /// The server was told that it is not open, and sends nothing again that was rejected: a new stream says what is held.
    #[error("a listener could be opened after all")]
    Opened,
    #[error("the controller at {address} is of epoch {found:?}, older than {highest}; it has been replaced")]
    Epoch { address: SocketAddr, found: Option<u64>, highest: u64 },
}

impl StreamError {
    fn leader(&self) -> Option<SocketAddr> {
        match self {
            Self::Ended { status, .. } => leader(status),
            Self::Connect(_)
            | Self::Closed { .. }
            | Self::Silent { .. }
            | Self::Renewed
            | Self::Opened
            | Self::Epoch { .. } => None,
        }
    }
}

/// What came of a round through the addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Round {
    Nothing,
    Progress,
    /// The next one is to follow at once.
    Again,
}

/// Follows the control plane for the life of the process.
#[derive(Debug)]
pub struct Client<A> {
    controller: Controller,
    introduction: Introduction,
    certificate: watch::Receiver<Option<Arc<Certificate>>>,
    workers: A,
    state: Arc<State>,
    timing: Timing,
    /// What is reported to the guard, of a member of the fleet.
    outcomes: Option<Arc<Metrics>>,
    applied: Option<Arc<Snapshot>>,
    /// Types of which a response was seen, ever.
    seen: BTreeSet<TypeUrl>,
}

/// A response that is not answered yet.
struct Outstanding {
    kind: TypeUrl,
    nonce: String,
    names: Vec<String>,
    rejected: Vec<Rejected>,
    deadline: Instant,
}

/// One open stream.
struct Stream {
    address: SocketAddr,
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    node: Option<Node>,
    asked: Arc<Subscriptions>,
    outstanding: Vec<Outstanding>,
}

impl<A: Apply> Client<A> {
    #[must_use]
    pub fn new(
        controller: Controller,
        introduction: Introduction,
        certificate: watch::Receiver<Option<Arc<Certificate>>>,
        workers: A,
        state: Arc<State>,
    ) -> Self {
        let timing = Timing::default();
        Self {
            controller,
            introduction,
            certificate,
            workers,
            state,
            timing,
            outcomes: None,
            applied: None,
            seen: BTreeSet::new(),
        }
    }

    /// Reports to the guard how requests end, beside each stream.
    #[must_use]
    pub fn reporting(self, metrics: Arc<Metrics>) -> Self {
        Self { outcomes: Some(metrics), ..self }
    }

    /// With other waits than the default ones.
    #[must_use]
    pub fn with_timing(self, timing: Timing) -> Self {
        Self { timing, ..self }
    }

    /// Runs for ever. Dropping it closes the stream, and leaves the workers with what they serve.
    pub async fn run(mut self) -> Infallible {
        let mut backoff = Backoff::new(FIRST_BACKOFF, LONGEST_BACKOFF);
        loop {
            let certificate = self.certificate.wait_for(Option::is_some).await.ok().and_then(|held| held.clone());
            let Some(certificate) = certificate else {
                // Whoever renews our certificate is gone, which only the end of the process explains.
                return std::future::pending().await;
            };
            match self.round(&certificate, backoff.is_fresh()).await {
                Round::Again => {
                    backoff.reset();
                    continue;
                }
                Round::Progress => backoff.reset(),
                Round::Nothing => {}
            }
            tokio::time::sleep(backoff.draw()).await;
        }
    }

    /// Tries all addresses until one gave us something. It lasts as long as that stream. `first`: the round before gave us something.
    async fn round(&mut self, certificate: &Arc<Certificate>, first: bool) -> Round {
        let mut addresses = match self.controller.addresses().await {
            Ok(addresses) => VecDeque::from(addresses),
            Err(error) => {
                self.failed(&error.into(), first);
                return Round::Nothing;
            }
        };
        let mut tried = BTreeSet::new();
        while let Some(address) = addresses.pop_front() {
            if !tried.insert(address) {
                continue;
            }
            let before = self.state.lock().updates;
            let error = self.follow(address, certificate).await;
            let progress = {
                let mut inner = self.state.lock();
                inner.connected_to = None;
                inner.resources.forget_pending();
                inner.updates != before
            };
            self.failed(&error, first);
            if matches!(error, StreamError::Renewed | StreamError::Opened) {
                return Round::Again;
            }
            if progress {
                return Round::Progress;
            }
            if let Some(leader) = error.leader() {
                addresses.push_front(leader);
            }
        }
        Round::Nothing
    }

    fn failed(&self, error: &StreamError, first: bool) {
        if error.leader().is_some() {
            tracing::debug!(%error, "a standby named the leader");
        } else if first && matches!(error, StreamError::Connect(ConnectError::Resolve { .. })) {
            // One answer of the DNS that is late is no news for people yet.
            tracing::info!(%error, "the controllers were not found; tried again");
        } else if matches!(error, StreamError::Renewed | StreamError::Opened) {
            tracing::info!(%error, "the stream to the control plane is opened anew");
            return;
        } else {
            tracing::warn!(%error, "no stream to the control plane; the last good configuration serves");
        }
        self.state.lock().last_error = Some(error.to_string());
    }

    /// Follows one address until the stream ends.
    async fn follow(&mut self, address: SocketAddr, certificate: &Arc<Certificate>) -> StreamError {
        match self.stream(address, certificate).await {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    async fn stream(&mut self, address: SocketAddr, certificate: &Arc<Certificate>) -> Result<Infallible, StreamError> {
        let channel = self.controller.connect(address, Some(&certificate.client)).await?;
        let metrics = self.outcomes.clone();
        let reports = channel.clone();
        let reporting = async {
            match metrics {
                Some(metrics) => outcomes::report(reports, metrics).await,
                None => std::future::pending().await,
            }
        };
        let mut renewals = self.certificate.clone();
        let other = |held: &Option<Arc<Certificate>>| held.as_ref().is_some_and(|held| !Arc::ptr_eq(held, certificate));
        tokio::select! {
            end = self.subscribed(address, channel) => end,
            never = reporting => match never {},
            Ok(_) = renewals.wait_for(other) => Err(StreamError::Renewed),
        }
    }

    async fn subscribed(&mut self, address: SocketAddr, channel: Channel) -> Result<Infallible, StreamError> {
        let (requests, receiver) = mpsc::channel(REQUESTS);
        let mut stream =
            Stream { address, requests, node: Some(self.node()), asked: Arc::default(), outstanding: Vec::new() };
        self.introduce(&mut stream).await?;

        let ended = |status| StreamError::Ended { address, status: Box::new(status) };
        let mut client = AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(LARGEST_RESPONSE);
        let opening = client.delta_aggregated_resources(ReceiverStream::new(receiver));
        let mut responses = tokio::time::timeout(STREAM_TIMEOUT, opening)
            .await
            .map_err(|_| StreamError::Silent { address })?
            .map_err(ended)?
            .into_inner();
        self.state.lock().connected_to = Some(address);
        tracing::info!(%address, "a stream to the control plane is open");

        let mut last_response = Instant::now();
        loop {
            let wake = self.wake(&stream, last_response);
            tokio::select! {
                response = responses.message() => {
                    let response = response.map_err(ended)?.ok_or(StreamError::Closed { address })?;
                    self.take_in(&mut stream, response).await?;
                    last_response = Instant::now();
                }
                () = tokio::time::sleep_until(wake) => {
                    let opened = self.apply().await;
                    self.settle(&mut stream).await?;
                    if opened {
                        return Err(StreamError::Opened);
                    }
                }
            }
            self.note_configured(&stream, last_response);
        }
    }

    /// When to look again without a response.
    fn wake(&self, stream: &Stream, last_response: Instant) -> Instant {
        let never = Instant::now() + Duration::from_secs(3600);
        let deadline = stream.outstanding.iter().map(|waiting| waiting.deadline).min().unwrap_or(never);
        let inner = self.state.lock();
        let again = if inner.failed.is_empty() { never } else { Instant::now() + self.timing.apply_again };
        let quiet = if self.state.configured() {
            never
        } else {
            let at = last_response + self.quiet(&inner);
            // After that, what it waits for comes with a response or with a deadline.
            if at > Instant::now() { at } else { last_response + self.timing.clusters }
        };
        let quiet = if quiet > Instant::now() { quiet } else { never };
        deadline.min(again).min(quiet)
    }

    fn quiet(&self, inner: &Inner) -> Duration {
        if inner.resources.count(TypeUrl::Listener).0 == 0 {
            self.timing.quiet_without_listeners
        } else {
            self.timing.quiet
        }
    }

    fn node(&self) -> Node {
        let (epoch, zone) = {
            let inner = self.state.lock();
            (inner.epoch, inner.resources.zone().to_owned())
        };
        let fields = epoch.map(|epoch| (EPOCH.to_owned(), Value { kind: Some(Kind::StringValue(epoch.to_string())) }));
        Node {
            id: self.introduction.id.clone(),
            cluster: self.introduction.role.to_owned(),
            metadata: Some(Struct { fields: fields.into_iter().collect() }),
            locality: (!zone.is_empty()).then(|| Locality { zone, ..Locality::default() }),
            user_agent_name: "sluice-proxy".to_owned(),
            user_agent_version_type: Some(UserAgentVersionType::UserAgentVersion(env!("CARGO_PKG_VERSION").to_owned())),
            ..Node::default()
        }
    }

    /// The first requests: all clusters and listeners, and the endpoints and routes for those that we hold.
    async fn introduce(&self, stream: &mut Stream) -> Result<(), StreamError> {
        for kind in [TypeUrl::Cluster, TypeUrl::Listener] {
            let request = DeltaDiscoveryRequest {
                resource_names_subscribe: vec!["*".to_owned()],
                initial_resource_versions: self.versions(kind),
                ..DeltaDiscoveryRequest::default()
            };
            stream.send(kind, request).await?;
        }
        self.subscribe(stream).await
    }

    /// What serves, by name and version. A listener that could not be opened does not, nor do its routes.
    fn versions(&self, kind: TypeUrl) -> BTreeMap<String, String> {
        let inner = self.state.lock();
        let mut versions = inner.resources.versions(kind);
        let failed = not_applied(&inner, kind);
        versions.retain(|name, _| !failed.contains_key(name.as_str()));
        versions
    }

    /// Asks for the endpoints and routes that are needed now, and no longer for the others.
    async fn subscribe(&self, stream: &mut Stream) -> Result<(), StreamError> {
        let wanted = self.state.lock().resources.subscriptions();
        if Arc::ptr_eq(&stream.asked, &wanted) {
            return Ok(());
        }
        let asked = std::mem::replace(&mut stream.asked, Arc::clone(&wanted));
        for (kind, asked, wanted) in
            [(TypeUrl::Endpoints, &asked.endpoints, &wanted.endpoints), (TypeUrl::Route, &asked.routes, &wanted.routes)]
        {
            if asked == wanted {
                continue;
            }
            // Only the first request of a type on a stream says what is held (xDS protocol, "Delta").
            let held = if asked.is_empty() { self.versions(kind) } else { BTreeMap::new() };
            let request = DeltaDiscoveryRequest {
                resource_names_subscribe: wanted.difference(asked).cloned().collect(),
                resource_names_unsubscribe: asked.difference(wanted).cloned().collect(),
                initial_resource_versions: held,
                ..DeltaDiscoveryRequest::default()
            };
            stream.send(kind, request).await?;
        }
        Ok(())
    }

    async fn take_in(&mut self, stream: &mut Stream, response: DeltaDiscoveryResponse) -> Result<(), StreamError> {
        self.check_epoch(stream.address, &response)?;
        let Some(kind) = TypeUrl::parse(&response.type_url) else {
            tracing::warn!(type_url = response.type_url, "a response of a type that was not asked for is ignored");
            return Ok(());
        };
        let rejected = {
            let mut inner = self.state.lock();
            inner.updates += 1;
            let change = Change { kind, resources: &response.resources, removed: &response.removed_resources };
            inner.resources.update(change)
        };
        for rejected in &rejected {
            tracing::warn!(%kind, name = rejected.name, error = %rejected.error, "a resource is rejected");
        }
        self.seen.insert(kind);
        stream.outstanding.push(Outstanding {
            kind,
            nonce: response.nonce,
            names: response.resources.into_iter().map(|resource| resource.name).collect(),
            rejected,
            deadline: Instant::now() + self.timing.clusters,
        });
        self.apply().await;
        self.subscribe(stream).await?;
        self.settle(stream).await
    }

    fn check_epoch(&self, address: SocketAddr, response: &DeltaDiscoveryResponse) -> Result<(), StreamError> {
        let identifier = response.control_plane.as_ref().map_or("", |it| it.identifier.as_str());
        let found = identifier.split_once('/').and_then(|(epoch, _)| epoch.parse::<u64>().ok());
        let mut inner = self.state.lock();
        if let Some(highest) = inner.epoch.filter(|highest| found.is_none_or(|found| found < *highest)) {
            return Err(StreamError::Epoch { address, found, highest });
        }
        inner.epoch = found;
        identifier.clone_into(&mut inner.control_plane);
        Ok(())
    }

    /// Brings the workers to what is complete now, if that changed or did not fully succeed the last time. Returns whether a listener
    /// is open now that could not be opened before.
    async fn apply(&mut self) -> bool {
        let snapshot = {
            let mut inner = self.state.lock();
            let snapshot = inner.resources.build();
            let same = self.applied.as_ref().is_some_and(|applied| Arc::ptr_eq(applied, &snapshot));
            if same && inner.failed.is_empty() {
                return false;
            }
            snapshot
        };
        let failed = self.workers.apply(snapshot.clone()).await;
        for (listener, reason) in &failed {
            tracing::error!(listener, reason, "a listener cannot be opened; it is tried again");
        }
        let mut inner = self.state.lock();
        let before = std::mem::replace(&mut inner.failed, failed);
        let opened = before
            .keys()
            .any(|name| !inner.failed.contains_key(name) && snapshot.listeners.contains_key(name.as_str()));
        self.applied = Some(snapshot);
        opened
    }

    /// Answers the responses whose resources are all in effect or rejected, or that have waited long enough.
    async fn settle(&self, stream: &mut Stream) -> Result<(), StreamError> {
        let mut answers = Vec::new();
        {
            let mut inner = self.state.lock();
            let now = Instant::now();
            stream.outstanding.retain_mut(|response| {
                let failed = not_applied(&inner, response.kind);
                let mut waiting = Vec::new();
                for name in &response.names {
                    if response.rejected.iter().any(|rejected| rejected.name == *name) {
                        continue;
                    }
                    let error = if let Some(missing) = inner.resources.missing_cluster(response.kind, name) {
                        ConfigError::Incomplete { missing: format!("the cluster '{missing}' or its endpoints") }
                    } else if let Some(reason) = failed.get(name.as_str()) {
                        ConfigError::NotApplied { reason: (*reason).to_owned() }
                    } else {
                        continue;
                    };
                    waiting.push(Rejected { name: name.clone(), error });
                }
                let incomplete = waiting.iter().any(|it| matches!(it.error, ConfigError::Incomplete { .. }));
                if incomplete && now < response.deadline {
                    return true;
                }
                for rejected in &waiting {
                    inner.resources.note_rejected(response.kind, rejected);
                }
                response.rejected.append(&mut waiting);
                answers.push((response.kind, answer(response)));
                false
            });
        }
        for (kind, request) in answers {
            stream.send(kind, request).await?;
        }
        Ok(())
    }

    fn note_configured(&self, stream: &Stream, last_response: Instant) {
        let whole = {
            let inner = self.state.lock();
            let listeners = inner.resources.count(TypeUrl::Listener).0;
            let silent = last_response.elapsed();
            self.seen.contains(&TypeUrl::Listener)
                && self.seen.contains(&TypeUrl::Cluster)
                && listeners >= self.introduction.least_listeners
                && stream.outstanding.is_empty()
                && silent >= self.quiet(&inner)
                // One Service that never becomes whole must not keep a proxy from serving all others.
                && (inner.resources.complete() || silent >= self.timing.clusters)
        };
        if whole && !self.state.configured.send_replace(true) {
            tracing::info!("the first configuration is complete and acknowledged");
        }
    }
}

/// The listeners that are not open, or the routes that such a listener serves, and why.
fn not_applied(inner: &Inner, kind: TypeUrl) -> BTreeMap<&str, &str> {
    let failed = || inner.failed.iter().map(|(listener, reason)| (listener.as_str(), reason.as_str()));
    match kind {
        TypeUrl::Cluster | TypeUrl::Endpoints => BTreeMap::new(),
        TypeUrl::Listener => failed().collect(),
        TypeUrl::Route => failed()
            .flat_map(|(listener, reason)| inner.resources.routes_of(listener).map(move |route| (route, reason)))
            .collect(),
    }
}

/// The ACK or the NACK of a response.
fn answer(response: &mut Outstanding) -> DeltaDiscoveryRequest {
    let rejected = std::mem::take(&mut response.rejected);
    let error_detail = rejected.first().map(|first| {
        let message = match rejected.len() {
            1 => first.to_string(),
            several => format!("{first} (and {} more)", several - 1),
        };
        let resources = rejected
            .iter()
            .map(|rejected| RejectedResource { name: rejected.name.clone(), reason: rejected.error.to_string() });
        RpcStatus {
            code: tonic::Code::InvalidArgument.into(),
            message,
            details: vec![pack(&RejectedResources { resources: resources.collect() })],
        }
    });
    DeltaDiscoveryRequest {
        response_nonce: std::mem::take(&mut response.nonce),
        error_detail,
        ..DeltaDiscoveryRequest::default()
    }
}

impl Stream {
    async fn send(&mut self, kind: TypeUrl, request: DeltaDiscoveryRequest) -> Result<(), StreamError> {
        let request = DeltaDiscoveryRequest { type_url: kind.as_str().to_owned(), node: self.node.take(), ..request };
        let sent = self.requests.send_timeout(request, STREAM_TIMEOUT).await;
        sent.map_err(|error| match error {
            mpsc::error::SendTimeoutError::Timeout(_) => StreamError::Silent { address: self.address },
            mpsc::error::SendTimeoutError::Closed(_) => StreamError::Closed { address: self.address },
        })
    }
}
