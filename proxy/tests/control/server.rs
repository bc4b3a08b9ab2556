//! A control plane on loopback whose every answer the test decides.

use std::{net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use rustls::{
    RootCertStore, ServerConfig, pki_types::CertificateDer, pki_types::pem::PemObject, server::WebPkiClientVerifier,
};
use sluice_proxy::controller::Controller;
use sluice_xds::{
    TypeUrl,
    envoy::{
        config::core::v3::ControlPlane,
        service::discovery::v3::{
            DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource,
            aggregated_discovery_service_server::{AggregatedDiscoveryService, AggregatedDiscoveryServiceServer},
        },
    },
    sluice::{
        guard::v1::{
            OutcomeReport, OutcomeWatch,
            outcome_service_server::{OutcomeService, OutcomeServiceServer},
        },
        identity::v1::{
            SignRequest, SignResponse,
            certificate_service_server::{CertificateService, CertificateServiceServer},
        },
        xds::v1::RejectedResources,
    },
    unpack,
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, service::Routes};

use crate::pki::{CONTROLLER, Ca, Projected};

/// For everything that must happen.
const DEADLINE: Duration = Duration::from_secs(20);
/// For what must not happen.
pub(crate) const NOTHING: Duration = Duration::from_millis(100);

/// Waits for what must happen.
pub(crate) async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    tokio::time::timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("{what}: not within {DEADLINE:?}"))
}

pub(crate) type Answer<T> = oneshot::Sender<Result<T, Status>>;

/// A running server. Its connections end when it is dropped.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    /// Calls to `Sign`, to be answered by the test.
    pub(crate) signs: mpsc::Receiver<(SignRequest, Answer<SignResponse>)>,
    /// New ADS streams.
    pub(crate) streams: mpsc::Receiver<AdsStream>,
    /// New streams of outcomes, to be answered by the test.
    pub(crate) guards: mpsc::Receiver<GuardStream>,
    tasks: JoinSet<()>,
}

impl Server {
    /// With the controller's certificate, on a free port.
    pub(crate) async fn start(ca: &Ca) -> Self {
        Self::start_as(ca, CONTROLLER, "127.0.0.1:0".parse().unwrap()).await
    }

    pub(crate) async fn start_as(ca: &Ca, id: &str, address: SocketAddr) -> Self {
        let (chain, key) = ca.issue(id);
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(ca.pem.as_bytes()).unwrap()).unwrap();
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            .allow_unauthenticated()
            .build()
            .unwrap();
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(clients)
            .with_single_cert(chain, key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];

        let (signs_in, signs) = mpsc::channel(16);
        let (streams_in, streams) = mpsc::channel(16);
        let (guards_in, guards) = mpsc::channel(16);
        let routes = Routes::new(CertificateServiceServer::new(Signs(signs_in)))
            .add_service(AggregatedDiscoveryServiceServer::new(Ads(streams_in)))
            .add_service(OutcomeServiceServer::new(Guards(guards_in)));
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        // A server that comes back binds the port of the one before.
        socket.set_reuse_address(true).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket.bind(&address.into()).unwrap();
        socket.listen(64).unwrap();
        let listener = TcpListener::from_std(socket.into()).unwrap();
        let address = listener.local_addr().unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((tcp, _)) = listener.accept().await {
                let (acceptor, routes) = (acceptor.clone(), routes.clone());
                connections.spawn(async move {
                    if let Ok(tls) = acceptor.accept(tcp).await {
                        let service = TowerToHyperService::new(routes);
                        let http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                        let _ = http.serve_connection(TokioIo::new(tls), service).await;
                    }
                });
            }
        });
        Self { address, signs, streams, guards, tasks }
    }

    pub(crate) fn controller(&self, projected: &Projected) -> Controller {
        Controller {
            host: self.address.ip().to_string(),
            port: self.address.port(),
            id: CONTROLLER.parse().unwrap(),
            trust_bundle: projected.bundle(),
        }
    }

    pub(crate) async fn stream(&mut self) -> AdsStream {
        soon("a new ADS stream", self.streams.recv()).await.unwrap()
    }

    pub(crate) async fn stop(mut self) -> SocketAddr {
        self.tasks.shutdown().await;
        self.address
    }
}

pub(crate) struct Guards(pub(crate) mpsc::Sender<GuardStream>);

/// A new stream of outcomes that waits to be accepted.
pub(crate) struct GuardStream {
    pub(crate) reports: Streaming<OutcomeReport>,
    accept: oneshot::Sender<Result<mpsc::Receiver<Result<OutcomeWatch, Status>>, Status>>,
}

impl GuardStream {
    /// Accepts it, and returns where watches are sent and reports come from.
    pub(crate) fn accept(self) -> (mpsc::Sender<Result<OutcomeWatch, Status>>, Streaming<OutcomeReport>) {
        let (watches, receiver) = mpsc::channel(16);
        self.accept.send(Ok(receiver)).unwrap_or_else(|_| panic!("the client has left"));
        (watches, self.reports)
    }

    pub(crate) fn refuse(self, status: Status) {
        let _ = self.accept.send(Err(status));
    }
}

#[tonic::async_trait]
impl OutcomeService for Guards {
    type ReportStream = ReceiverStream<Result<OutcomeWatch, Status>>;

    async fn report(&self, request: Request<Streaming<OutcomeReport>>) -> Result<Response<Self::ReportStream>, Status> {
        let (accept, accepted) = oneshot::channel();
        let stream = GuardStream { reports: request.into_inner(), accept };
        self.0.send(stream).await.map_err(|_| Status::unavailable("over"))?;
        let receiver = accepted.await.map_err(|_| Status::unavailable("over"))??;
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

struct Signs(mpsc::Sender<(SignRequest, Answer<SignResponse>)>);

#[tonic::async_trait]
impl CertificateService for Signs {
    async fn sign(&self, request: Request<SignRequest>) -> Result<Response<SignResponse>, Status> {
        let (answer, answered) = oneshot::channel();
        self.0.send((request.into_inner(), answer)).await.map_err(|_| Status::unavailable("over"))?;
        answered.await.map_err(|_| Status::unavailable("over"))?.map(Response::new)
    }
}

struct Ads(mpsc::Sender<AdsStream>);

/// The server's end of one stream.
pub(crate) struct AdsStream {
    requests: Streaming<DeltaDiscoveryRequest>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    pub(crate) epoch: u64,
    nonces: u32,
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Ads {
    type StreamAggregatedResourcesStream =
        Pin<Box<dyn futures::Stream<Item = Result<DiscoveryResponse, Status>> + Send>>;
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn stream_aggregated_resources(
        &self,
        _: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented("delta only"))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let (responses, receiver) = mpsc::channel(16);
        let stream = AdsStream { requests: request.into_inner(), responses, epoch: 1, nonces: 0 };
        self.0.send(stream).await.map_err(|_| Status::unavailable("over"))?;
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

impl AdsStream {
    pub(crate) async fn request(&mut self) -> DeltaDiscoveryRequest {
        soon("a request", self.requests.message()).await.unwrap().expect("the client ended the stream")
    }

    /// Nothing comes for a while.
    pub(crate) async fn assert_silent(&mut self) {
        let request = tokio::time::timeout(NOTHING, self.requests.message()).await;
        assert!(request.is_err(), "not expected: {request:?}");
    }

    /// The client has left.
    pub(crate) async fn assert_left(&mut self) {
        let end = soon("the end of the stream", async {
            loop {
                match self.requests.message().await {
                    Ok(Some(_)) => {}
                    end @ (Ok(None) | Err(_)) => return end,
                }
            }
        });
        let _ = end.await;
    }

    /// The next request, which must be of this type.
    pub(crate) async fn request_of(&mut self, kind: TypeUrl) -> DeltaDiscoveryRequest {
        let request = self.request().await;
        assert_eq!(request.type_url, kind.as_str(), "{request:?}");
        request
    }

    /// Sends a response and returns its nonce.
    pub(crate) async fn send(&mut self, kind: TypeUrl, resources: Vec<Resource>, removed: &[&str]) -> String {
        self.nonces += 1;
        let nonce = format!("nonce-{}", self.nonces);
        let response = DeltaDiscoveryResponse {
            type_url: kind.as_str().to_owned(),
            resources,
            removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
            nonce: nonce.clone(),
            control_plane: Some(ControlPlane { identifier: format!("{}/controller-0", self.epoch) }),
            ..DeltaDiscoveryResponse::default()
        };
        soon("room for a response", self.responses.send(Ok(response))).await.expect("the client has left");
        nonce
    }

    /// Ends the stream with this status.
    pub(crate) async fn end(self, status: Status) {
        let _ = self.responses.send(Err(status)).await;
    }

    /// The answer to a response: what it rejects. Subscriptions that come meanwhile are put in `others`.
    pub(crate) async fn answer(
        &mut self,
        kind: TypeUrl,
        nonce: &str,
        others: &mut Vec<DeltaDiscoveryRequest>,
    ) -> Vec<(String, String)> {
        loop {
            let request = self.request().await;
            if request.response_nonce.is_empty() {
                others.push(request);
                continue;
            }
            assert_eq!((request.type_url.as_str(), request.response_nonce.as_str()), (kind.as_str(), nonce));
            let Some(error) = request.error_detail else {
                return Vec::new();
            };
            assert_eq!(error.code, i32::from(tonic::Code::InvalidArgument));
            let [detail] = error.details.as_slice() else { panic!("one detail: {error:?}") };
            let rejected: RejectedResources = unpack(detail).unwrap();
            return rejected.resources.into_iter().map(|it| (it.name, it.reason)).collect();
        }
    }

    /// Sends a response that must be acknowledged whole. Returns the subscriptions that came before the answer.
    pub(crate) async fn acked(
        &mut self,
        kind: TypeUrl,
        resources: Vec<Resource>,
        removed: &[&str],
    ) -> Vec<DeltaDiscoveryRequest> {
        let nonce = self.send(kind, resources, removed).await;
        let mut others = Vec::new();
        assert_eq!(self.answer(kind, &nonce, &mut others).await, []);
        others
    }
}
