//! What spans are sent to: OTLP over gRPC, as a collector takes them.
// Two programs have it, and each needs a part.
#![allow(dead_code)]

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use hyper::server::conn::http2;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{KeyValue, any_value::Value},
    trace::v1::{ResourceSpans, Span},
};
use tokio::{io, net::TcpListener};
use tokio_rustls::TlsAcceptor;
use tonic::metadata::MetadataMap;

/// Longer than anything takes here.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Collector {
    pub(crate) address: SocketAddr,
    taken: Taken,
    task: tokio::task::JoinHandle<()>,
}

#[derive(Clone, Default)]
struct Taken(Arc<Mutex<Vec<(MetadataMap, ResourceSpans)>>>);

#[tonic::async_trait]
impl TraceService for Taken {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        let metadata = request.metadata().clone();
        let spans = request.into_inner().resource_spans.into_iter();
        self.0.lock().unwrap().extend(spans.map(|spans| (metadata.clone(), spans)));
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    pub(crate) async fn start(address: SocketAddr, tls: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let taken = Taken::default();
        let service = TowerToHyperService::new(TraceServiceServer::new(taken.clone()));
        let task = tokio::spawn(async move {
            let mut open = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (service, tls) = (service.clone(), tls.clone());
                open.spawn(async move {
                    let server = http2::Builder::new(TokioExecutor::new());
                    let _ = match tls {
                        None => server.serve_connection(TokioIo::new(stream), service).await,
                        Some(tls) => {
                            let Ok(stream) = tls.accept(stream).await else { return io::Result::Ok(()) };
                            server.serve_connection(TokioIo::new(stream), service).await
                        }
                    };
                    Ok(())
                });
            }
        });
        Self { address, taken, task }
    }

    pub(crate) fn spans(&self) -> Vec<Span> {
        let taken = self.taken.0.lock().unwrap();
        taken.iter().flat_map(|(_, it)| &it.scope_spans).flat_map(|scope| scope.spans.clone()).collect()
    }

    /// Waits until so many spans have come.
    pub(crate) async fn wait_for(&self, count: usize) -> Vec<Span> {
        let waiting = async {
            while self.spans().len() < count {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, waiting).await.expect("the spans did not come");
        self.spans()
    }

    /// Attributes of who sent the first span.
    pub(crate) fn resource(&self) -> Vec<KeyValue> {
        self.taken.0.lock().unwrap()[0].1.resource.clone().unwrap().attributes
    }

    /// What the first export said beside its spans.
    pub(crate) fn metadata(&self, name: &str) -> String {
        let taken = self.taken.0.lock().unwrap();
        taken[0].0.get(name).map_or_else(String::new, |value| value.to_str().unwrap().to_owned())
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// An attribute as text; empty if it is not there.
pub(crate) fn attribute(attributes: &[KeyValue], name: &str) -> String {
    let found = attributes.iter().find(|it| it.key == name).and_then(|it| it.value.clone()?.value);
    match found {
        None => String::new(),
        Some(Value::StringValue(text)) => text,
        Some(Value::IntValue(number)) => number.to_string(),
        Some(other) => panic!("{name} is {other:?}"),
    }
}

pub(crate) fn hex(id: &[u8]) -> String {
    use std::fmt::Write;
    id.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}
