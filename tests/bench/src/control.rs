//! The control plane of the row of updates: the smallest that both proxies take. It sends exactly what it is told to, by delta
//! ADS in the order of docs/xds.md, and tells when that was acknowledged. The controller's own server would be measured with
//! the proxies: with every change it looks through all that each client holds.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, bail};
use futures::Stream;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use sluice_controller::mesh::{Resource, View};
use sluice_xds::{
    TypeUrl,
    envoy::{
        config::core::v3::ControlPlane as Leader,
        service::discovery::v3::{
            DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource as Sent,
            aggregated_discovery_service_server::{AggregatedDiscoveryService, AggregatedDiscoveryServiceServer},
        },
    },
    sluice::identity::v1::{
        SignRequest, SignResponse,
        certificate_service_server::{CertificateService, CertificateServiceServer},
    },
};
use tokio::{net::TcpListener, sync::mpsc, task::JoinSet, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, service::Routes};

use crate::{
    certificates::{Authority, Clients},
    fleet,
};

pub(crate) const CONTROLLER: &str = "spiffe://cluster.local/ns/sluice-system/sa/sluice-controller";
/// For what takes seconds at most, where nothing else does.
const PATIENCE: Duration = Duration::from_secs(180);
/// What the leader says of itself (docs/xds.md, "Epoch").
const IDENTIFIER: &str = "1/bench";

/// Of one proxy. It ends when it is dropped.
pub(crate) struct ControlPlane {
    pub(crate) address: SocketAddr,
    updates: mpsc::Sender<View>,
    answers: mpsc::Receiver<Answer>,
    _tasks: JoinSet<()>,
}

/// What the proxy said to a response.
struct Answer {
    /// In the response.
    resources: usize,
    /// Why not.
    error: Option<String>,
    at: Instant,
}

impl ControlPlane {
    pub(crate) async fn start(authority: Arc<Authority>) -> anyhow::Result<Self> {
        let acceptor = authority.acceptor(CONTROLLER, "h2", Clients::KnownOrNew)?;
        let (updates, receiver) = mpsc::channel(1);
        let (sender, answers) = mpsc::channel(64);
        let ads = Ads(Mutex::new(Some((receiver, sender))));
        let routes = Routes::new(CertificateServiceServer::new(Signer(authority)))
            .add_service(AggregatedDiscoveryServiceServer::new(ads));
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((tcp, _)) = listener.accept().await {
                let (acceptor, routes) = (acceptor.clone(), routes.clone());
                connections.spawn(async move {
                    let _ = tcp.set_nodelay(true);
                    // An error here is one at the other end, too, where it is told.
                    if let Ok(tls) = acceptor.accept(tcp).await {
                        let http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                        let _ = http.serve_connection(TokioIo::new(tls), TowerToHyperService::new(routes)).await;
                    }
                });
            }
        });
        Ok(Self { address, updates, answers, _tasks: tasks })
    }

    /// Waits until the proxy has asked for everything and knows that there is nothing yet.
    pub(crate) async fn joined(&mut self) -> anyhow::Result<()> {
        // That there are no clusters, and no listeners.
        for _ in 0..2 {
            self.answer().await?;
        }
        Ok(())
    }

    /// Sends these resources, and waits until all of them are acknowledged. Returns when they were.
    pub(crate) async fn update(&mut self, view: View) -> anyhow::Result<Instant> {
        let mut missing: usize = view.resources.values().map(BTreeMap::len).sum();
        self.updates.send(view).await.ok().context("the proxy's stream has ended")?;
        loop {
            let answer = self.answer().await?;
            missing = missing.checked_sub(answer.resources).context("more was acknowledged than was sent")?;
            if missing == 0 {
                return Ok(answer.at);
            }
        }
    }

    async fn answer(&mut self) -> anyhow::Result<Answer> {
        let answer = timeout(PATIENCE, self.answers.recv()).await.context("the proxy does not answer")?;
        let answer = answer.context("the proxy's stream has ended")?;
        match answer.error {
            Some(error) => bail!("the proxy rejects its configuration: {error}"),
            None => Ok(answer),
        }
    }
}

/// Gives every member the same identity.
struct Signer(Arc<Authority>);

#[tonic::async_trait]
impl CertificateService for Signer {
    async fn sign(&self, request: Request<SignRequest>) -> Result<Response<SignResponse>, Status> {
        let chain = self.0.sign(&request.get_ref().csr_der, fleet::FLEET);
        let chain = chain.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let now = SystemTime::now();
        Ok(Response::new(SignResponse {
            certificate_chain_pem: chain,
            trust_bundle_pem: self.0.root(),
            not_before: Some((now - Duration::from_secs(300)).into()),
            not_after: Some((now + Duration::from_secs(24 * 3600)).into()),
        }))
    }
}

/// What the one stream is served from.
struct Ads(Mutex<Option<(mpsc::Receiver<View>, mpsc::Sender<Answer>)>>);

type Responses<A> = Pin<Box<dyn Stream<Item = Result<A, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Ads {
    type StreamAggregatedResourcesStream = Responses<DiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        _: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented("delta only"))
    }

    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let ends = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (updates, answers) = ends.ok_or_else(|| Status::failed_precondition("one stream only"))?;
        let (sender, receiver) = mpsc::channel(TypeUrl::ALL.len());
        tokio::spawn(serve(request.into_inner(), sender, updates, answers));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

/// Until the proxy leaves, or nobody waits for what it says.
async fn serve(
    mut requests: Streaming<DeltaDiscoveryRequest>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    mut updates: mpsc::Receiver<View>,
    answers: mpsc::Sender<Answer>,
) {
    let mut state = State::default();
    loop {
        tokio::select! {
            request = requests.message() => {
                let Ok(Some(request)) = request else { return };
                if let Some(answer) = state.take(&request)
                    && answers.send(answer).await.is_err()
                {
                    return;
                }
            }
            update = updates.recv() => match update {
                Some(view) => state.change(view),
                None => return,
            }
        }
        for response in state.next() {
            if responses.send(Ok(response)).await.is_err() {
                return;
            }
        }
    }
}

/// What a stream has, and what it lacks.
#[derive(Default)]
struct State {
    view: View,
    kinds: BTreeMap<TypeUrl, Kind>,
    nonces: u64,
}

#[derive(Default)]
struct Kind {
    begun: bool,
    /// It asked for all.
    wildcard: bool,
    names: BTreeSet<String>,
    unsent: BTreeSet<String>,
    /// It asked for all, and has had no answer.
    waits: bool,
    /// Nonce, and number of resources.
    in_flight: Option<(String, usize)>,
}

impl State {
    fn take(&mut self, request: &DeltaDiscoveryRequest) -> Option<Answer> {
        let url = TypeUrl::parse(&request.type_url)?;
        let kind = self.kinds.entry(url).or_default();
        if !std::mem::replace(&mut kind.begun, true) {
            kind.wildcard = matches!(url, TypeUrl::Cluster | TypeUrl::Listener);
            kind.waits = kind.wildcard;
        }
        for name in request.resource_names_subscribe.iter().filter(|name| *name != "*") {
            kind.names.insert(name.clone());
            if self.view.get(url, name).is_some() {
                kind.unsent.insert(name.clone());
            }
        }
        for name in &request.resource_names_unsubscribe {
            kind.names.remove(name);
            kind.unsent.remove(name);
        }
        let (_, resources) = kind.in_flight.take_if(|(nonce, _)| *nonce == request.response_nonce)?;
        let error = request.error_detail.as_ref().map(|status| status.message.clone());
        Some(Answer { resources, error, at: Instant::now() })
    }

    fn change(&mut self, change: View) {
        for (url, resources) in change.resources {
            let kind = self.kinds.entry(url).or_default();
            let wanted = resources.keys().filter(|name| kind.wildcard || kind.names.contains(*name));
            kind.unsent.extend(wanted.cloned().collect::<Vec<_>>());
            self.view.resources.entry(url).or_default().extend(resources);
        }
    }

    /// All that may be sent now, at most one response of each type. Routes wait until clusters and endpoints are acknowledged.
    fn next(&mut self) -> Vec<DeltaDiscoveryResponse> {
        let mut responses = Vec::new();
        for url in TypeUrl::ALL {
            let settled =
                |of: &TypeUrl| self.kinds.get(of).is_none_or(|kind| kind.in_flight.is_none() && kind.unsent.is_empty());
            if url == TypeUrl::Route && ![TypeUrl::Cluster, TypeUrl::Endpoints].iter().all(settled) {
                continue;
            }
            let Some(kind) = self.kinds.get_mut(&url) else { continue };
            if !kind.begun || kind.in_flight.is_some() || (kind.unsent.is_empty() && !kind.waits) {
                continue;
            }
            kind.waits = false;
            self.nonces += 1;
            let nonce = self.nonces.to_string();
            let names = std::mem::take(&mut kind.unsent);
            kind.in_flight = Some((nonce.clone(), names.len()));
            let resources = names.into_iter().filter_map(|name| {
                let Resource { version, body, .. } = self.view.get(url, &name)?;
                let (version, resource) = (version.to_string(), Some((**body).clone()));
                Some(Sent { name, version, resource, ..Sent::default() })
            });
            responses.push(DeltaDiscoveryResponse {
                type_url: url.as_str().to_owned(),
                nonce,
                resources: resources.collect(),
                control_plane: Some(Leader { identifier: IDENTIFIER.to_owned() }),
                ..DeltaDiscoveryResponse::default()
            });
        }
        responses
    }
}
