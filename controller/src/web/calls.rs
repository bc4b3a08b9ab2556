//! Requests to the API server: counted where they are sent, as client-go does, on connections that notice when nobody is there
//! any more.

use std::{
    task::{Context, Poll},
    time::Duration,
};

use futures::{FutureExt, future::BoxFuture};
use http::{Request, Response};
use hyper_timeout::TimeoutConnector;
use hyper_util::{
    client::legacy::{Client as Http, connect::HttpConnector},
    rt::TokioExecutor,
};
use kube::{
    Client, Config,
    client::{Body, ClientBuilder, ConfigExt, retry::RetryPolicy},
};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use tower::{BoxError, Layer, Service, ServiceBuilder, retry::RetryLayer};

/// A connection that is silent for so long is asked whether anybody is there. A load balancer in front of the API server, or a
/// node that is gone, ends no connection, and a watch waits for the next event as long as it likes (kube's own limit is five
/// minutes). 30 s in all, as client-go has it for HTTP/2 (`HTTP2_READ_IDLE_TIMEOUT_SECONDS`).
const KEEPALIVE: Duration = Duration::from_secs(15);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_RETRIES: u32 = 3;

/// How many requests were sent. A watch is one, however long it lives.
#[derive(Clone, Default)]
pub struct Calls(Family<Call, Counter>);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Call {
    method: String,
    /// HTTP status, or `<error>` where there was no answer.
    code: String,
}

impl Calls {
    /// A client whose requests are counted here.
    ///
    /// # Errors
    /// If the configuration cannot be used, such as a certificate that is none.
    pub fn client(&self, config: Config) -> kube::Result<Client> {
        if config.proxy_url.is_some() {
            // Whether and how proxies are supported is kube's to say.
            return Ok(ClientBuilder::try_from(config)?.with_layer(self).build());
        }
        // As kube makes it, but for the keepalive, and without its log of each call: whoever calls says what failed.
        let mut connector = HttpConnector::new();
        connector.enforce_http(false);
        connector.set_keepalive(Some(KEEPALIVE));
        connector.set_keepalive_interval(Some(KEEPALIVE_INTERVAL));
        connector.set_keepalive_retries(Some(KEEPALIVE_RETRIES));
        #[cfg(target_os = "linux")]
        // While something is on its way nobody is asked; elsewhere that may last as long as the system lets it.
        connector.set_tcp_user_timeout(Some(KEEPALIVE + KEEPALIVE_INTERVAL * KEEPALIVE_RETRIES));
        let mut connector = TimeoutConnector::new(config.rustls_https_connector_with_connector(connector)?);
        connector.set_connect_timeout(config.connect_timeout);
        connector.set_read_timeout(config.read_timeout);
        connector.set_write_timeout(config.write_timeout);
        connector.set_reset_reader_on_write(config.reset_reader_on_write);
        let service = ServiceBuilder::new()
            .layer(config.base_uri_layer())
            .option_layer(config.default_retry.then(|| RetryLayer::new(RetryPolicy::server_retry())))
            .option_layer(config.auth_layer()?)
            .layer(config.extra_headers_layer()?)
            .map_err(BoxError::from)
            .layer(self)
            .service(Http::builder(TokioExecutor::new()).build(connector));
        Ok(Client::new(service, config.default_namespace))
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "rest_client_requests",
            "Requests to the API server, by method and the answer's code; a watch is one",
            self.0.clone(),
        );
    }
}

impl<S> Layer<S> for Calls {
    type Service = Counted<S>;

    fn layer(&self, service: S) -> Counted<S> {
        Counted { service, calls: self.clone() }
    }
}

/// A client whose requests are counted.
#[derive(Clone)]
pub struct Counted<S> {
    service: S,
    calls: Calls,
}

impl<S, B> Service<Request<Body>> for Counted<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<S::Response, S::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.service.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let method = request.method().to_string();
        let calls = self.calls.clone();
        let counted = move |result: &Result<S::Response, S::Error>| {
            let code =
                result.as_ref().map_or_else(|_| "<error>".to_owned(), |answer| answer.status().as_u16().to_string());
            calls.0.get_or_create(&Call { method, code }).inc();
        };
        self.service.call(request).inspect(counted).boxed()
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Pod;
    use kube::Api;
    use prometheus_client::encoding::text;

    use super::*;

    /// What the kernel says of the connection from this port: `proc_net_tcp.txt`, "tr" 2 is "another timer (e.g. delayed ack or
    /// keepalive)".
    #[cfg(target_os = "linux")]
    fn has_keepalive(port: u16, to: u16) -> bool {
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        let ends = |address: Option<&str>, port: u16| {
            address.is_some_and(|address| address.ends_with(&format!(":{port:04X}")))
        };
        let of_it = |line: &&str| {
            let mut words = line.split_whitespace().skip(1);
            ends(words.next(), port) && ends(words.next(), to)
        };
        let line = table.lines().find(of_it).expect("the connection is there");
        line.split_whitespace().nth(5).is_some_and(|timer| timer.starts_with("02:"))
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn a_server_that_says_nothing_is_asked_whether_it_is_there() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let client = Calls::default().client(Config::new(format!("http://{address}").parse().unwrap())).unwrap();
        let asks = tokio::spawn(async move { Api::<Pod>::namespaced(client, "shop").get("cart").await });
        let (connection, peer) = listener.accept().await.unwrap();
        connection.readable().await.unwrap();
        // Once the request is acknowledged nothing else is left to wait for.
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        while !has_keepalive(peer.port(), address.port()) {
            assert!(tokio::time::Instant::now() < deadline, "the kernel asks nobody whether they are there");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        asks.abort();
    }

    #[tokio::test]
    async fn requests_are_counted_by_what_was_answered() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let forbids = axum::Router::new().fallback(|| async { http::StatusCode::FORBIDDEN });
        let server = tokio::spawn(async move { axum::serve(listener, forbids).await });
        let calls = Calls::default();
        let client = calls.client(Config::new(format!("http://{address}").parse().unwrap())).unwrap();
        let pods: Api<Pod> = Api::namespaced(client, "shop");
        assert!(pods.get("cart").await.is_err());
        assert!(pods.delete("cart", &Default::default()).await.is_err());
        server.abort();
        let _ = server.await;

        let mut registry = Registry::with_prefix("sluice");
        calls.register(&mut registry);
        let mut text = String::new();
        text::encode(&mut text, &registry).unwrap();
        for method in ["GET", "DELETE"] {
            let line = format!("sluice_rest_client_requests_total{{method=\"{method}\",code=\"403\"}} 1");
            assert!(text.contains(&line), "{line} is missing in:\n{text}");
        }
    }
}
