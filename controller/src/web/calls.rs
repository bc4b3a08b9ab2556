//! Requests to the API server, counted where they are sent, as client-go does.

use std::task::{Context, Poll};

use futures::{FutureExt, future::BoxFuture};
use http::{Request, Response};
use kube::{
    Client, Config,
    client::{Body, ClientBuilder},
};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use tower::Service;

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
        let layer = tower::layer::layer_fn(|service| Counted { service, calls: self.clone() });
        Ok(ClientBuilder::try_from(config)?.with_layer(&layer).build())
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "rest_client_requests",
            "Requests to the API server, by method and the answer's code; a watch is one",
            self.0.clone(),
        );
    }
}

#[derive(Clone)]
struct Counted<S> {
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
