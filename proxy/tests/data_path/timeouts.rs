//! `RouteAction.timeout`: from the end of a request to the end of its answer.

use std::{future, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use sluice_proxy::{
    snapshot::{Action, Policy, Protocol},
    workers::Role,
};

use tokio::{io::AsyncWriteExt, net::TcpStream};

use crate::support::*;

const TIMEOUT: Duration = Duration::from_millis(150);

fn limited(app: SocketAddr) -> Protocol {
    let policy = Policy { timeout: Some(TIMEOUT), ..Policy::default() };
    Protocol::http(Action::Forward { split: split([(cluster("a", &[app]), 100)]), policy: Arc::new(policy) })
}

/// `/never` is not answered, `/stuck` has an answer without an end, `/endless` one that never stops, and anything else is echoed.
async fn app() -> App {
    App::start(own_ip(), 8080, |request| async move {
        match request.uri().path() {
            "/never" => future::pending().await,
            "/stuck" => {
                let begin = futures::stream::iter([Ok(Frame::data(Bytes::from_static(b"begin")))]);
                let stuck = futures::StreamExt::chain(begin, futures::stream::pending());
                Response::new(StreamBody::new(stuck).boxed())
            }
            "/endless" => {
                let part = || Ok(Frame::data(Bytes::from_static(&[7; 16 * 1024])));
                Response::new(StreamBody::new(futures::stream::repeat_with(part)).boxed())
            }
            _ => Response::new(full(request.into_body().collect().await.unwrap().to_bytes())),
        }
    })
    .await
}

#[tokio::test]
async fn a_request_that_takes_too_long_is_answered_with_504() {
    let app = app().await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(limited(app.address)).await;
    let mut client = Http1::connect(proxy.address).await;
    for _ in 0..2 {
        let answer = soon("an answer", client.get("/never")).await;
        assert_eq!((answer.status, answer.header("x-sluice-response-flag")), (StatusCode::GATEWAY_TIMEOUT, "UT"));
        // The client's connection lives on; the upstream's, on which an answer may still come, does not.
        assert_eq!(soon("an answer", client.get("/")).await.status, StatusCode::OK);
    }
    assert_eq!(app.connections(), 3);
    let mut client = Http2::connect(proxy.address).await;
    let answer = soon("an answer", client.send(call("/never"))).await.unwrap();
    assert_eq!((answer.header("grpc-status"), answer.header("x-sluice-response-flag")), ("14", "UT"));
    assert_eq!((proxy.counted("a", "5xx", ""), proxy.counted("a", "2xx", "UNAVAILABLE")), (2, 1));
    assert_eq!(proxy.metric("sluice_local_errors_total{listener=\"shop/cart:80\",flag=\"UT\"}"), 3);
}

#[tokio::test]
async fn an_answer_that_does_not_end_is_broken_off() {
    let app = app().await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(limited(app.address)).await;
    let mut http1 = Http1::connect(proxy.address).await;
    let answer = http1.start(get("/stuck")).await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    soon("the end", answer.into_body().collect()).await.unwrap_err();
    let mut http2 = Http2::connect(proxy.address).await;
    let answer = http2.start(get("/stuck")).await.unwrap();
    soon("the end", answer.into_body().collect()).await.unwrap_err();
    // The other streams of that connection are not concerned.
    assert_eq!(soon("an answer", http2.send(get("/"))).await.unwrap().status, StatusCode::OK);
    eventually("both are counted", || {
        proxy.metric("sluice_local_errors_total{listener=\"shop/cart:80\",flag=\"UT\"}") == 2
    })
    .await;
}

#[tokio::test]
async fn an_answer_that_its_client_does_not_read_is_broken_off_as_well_and_counts_for_no_version() {
    let app = app().await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(limited(app.address)).await;
    let metric = |name: &str| proxy.metric(&format!("{name}{{listener=\"shop/cart:80\"}}"));
    let mut http1 = TcpStream::connect(proxy.address).await.unwrap();
    http1.write_all(b"GET /endless HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    eventually("its end", || proxy.refused("answer_timeout") == 1).await;
    eventually("that of its connection", || metric("sluice_connections_open") == 0).await;
    let mut http2 = Http2::connect(proxy.address).await;
    let answer = http2.start(get("/endless")).await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    eventually("its end", || proxy.refused("answer_timeout") == 2).await;
    soon("the end", answer.into_body().collect()).await.unwrap_err();
    // The other streams of that connection are not concerned.
    assert_eq!(soon("an answer", http2.send(get("/"))).await.unwrap().status, StatusCode::OK);
    eventually("the end of the requests", || metric("sluice_requests_active") == 0).await;
    assert_eq!(proxy.metric("sluice_local_errors_total{listener=\"shop/cart:80\",flag=\"UT\"}"), 2);
    assert_eq!((proxy.counted("a", "2xx", ""), proxy.counted("a", "5xx", "")), (1, 0));
}

#[tokio::test]
async fn a_websocket_lives_on() {
    let app = websocket_echo(own_ip()).await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(limited(app.address)).await;
    let mut stream = websocket(proxy.address).await;
    // What is tested is that this time does not count.
    tokio::time::sleep(2 * TIMEOUT).await;
    echoes(&mut stream).await;
}

#[tokio::test]
async fn how_long_a_client_takes_to_send_its_request_is_its_own_affair() {
    let app = app().await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(limited(app.address)).await;
    let slowly = || {
        let frames = futures::stream::unfold(0, |sent| async move {
            if sent == 3 {
                return None;
            }
            // What is tested is that this time does not count.
            tokio::time::sleep(TIMEOUT).await;
            Some((Ok(Frame::data(Bytes::from_static(b"x"))), sent + 1))
        });
        Request::post("/").header("host", "a").body(BodyExt::boxed(StreamBody::new(frames))).unwrap()
    };
    let answer = soon("an answer", Http1::connect(proxy.address).await.send(slowly())).await.unwrap();
    assert_eq!((answer.status, answer.body.as_str()), (StatusCode::OK, "xxx"));
    let answer = soon("an answer", Http2::connect(proxy.address).await.send(slowly())).await.unwrap();
    assert_eq!((answer.status, answer.body.as_str()), (StatusCode::OK, "xxx"));
}
