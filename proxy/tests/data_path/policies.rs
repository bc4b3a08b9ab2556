//! What a route asks for beside its split: retries of requests that may have been processed, and changes of headers.

use std::{
    future,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use sluice_proxy::{
    metrics::{GrpcStatus, Metrics},
    snapshot::{Action, HeaderChanges, Policy, Protocol, RetryOn, RetryPolicy},
    tls::IdentityHandle,
    workers::Role,
};
use tokio::sync::Barrier;

use crate::support::*;

const RETRIED: &str = "sluice_retries_total{listener=\"shop/cart:80\",reason=\"policy\"}";

fn with(policy: Policy, endpoints: &[SocketAddr]) -> Protocol {
    Protocol::http(Action::Forward { split: split([(cluster("a", endpoints), 100)]), policy: Arc::new(policy) })
}

fn retrying(on: &[RetryOn], retries: u32) -> Policy {
    let retry = RetryPolicy { on: on.to_vec(), retries, per_try_timeout: None };
    Policy { retry: Some(retry), ..Policy::default() }
}

/// Answers the first `bad` requests with `status`, and echoes the others.
async fn recovering(bad: usize, status: StatusCode) -> (App, Arc<AtomicUsize>) {
    let seen = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&seen);
    let app = App::start(own_ip(), 8080, move |request| {
        let number = count.fetch_add(1, SeqCst);
        async move {
            let body = request.into_body().collect().await.unwrap().to_bytes();
            if number < bad {
                return Response::builder().status(status).body(full("bad")).unwrap();
            }
            Response::new(full(body))
        }
    })
    .await;
    (app, seen)
}

#[tokio::test]
async fn a_failed_request_is_sent_again_whole_and_counted_once() {
    for status in [StatusCode::INTERNAL_SERVER_ERROR, StatusCode::SERVICE_UNAVAILABLE] {
        let (app, seen) = recovering(2, status).await;
        let proxy = Proxy::start(Role::Fleet);
        proxy.serve(with(retrying(&[RetryOn::ServerError], 3), &[app.address])).await;
        let mut client = Http1::connect(proxy.address).await;
        let answer = soon("an answer", client.send(post("/", "body"))).await.unwrap();
        assert_eq!((answer.status, &*answer.body), (StatusCode::OK, "body"));
        assert_eq!((seen.load(SeqCst), proxy.metric(RETRIED)), (3, 2));
        assert_eq!((proxy.counted("a", "2xx", ""), proxy.counted("a", "5xx", "")), (1, 0));
    }
}

#[tokio::test]
async fn the_last_answer_is_passed_on_when_the_tries_are_used_up_or_nothing_asks_for_another() {
    let (app, seen) = recovering(usize::MAX, StatusCode::SERVICE_UNAVAILABLE).await;
    let proxy = Proxy::start(Role::Fleet);
    let cases = [
        (retrying(&[RetryOn::GatewayError], 2), 3),
        (retrying(&[RetryOn::Conflict, RetryOn::Reset], 2), 1),
        (Policy::default(), 1),
    ];
    for (policy, tries) in cases {
        let before = seen.load(SeqCst);
        proxy.serve(with(policy, &[app.address])).await;
        let mut client = Http2::connect(proxy.address).await;
        let answer = soon("an answer", client.send(get("/"))).await.unwrap();
        assert_eq!((answer.status, &*answer.body), (StatusCode::SERVICE_UNAVAILABLE, "bad"));
        assert!(!answer.headers.contains_key("x-sluice-response-flag"), "it is the application's");
        assert_eq!(seen.load(SeqCst) - before, tries);
    }
}

#[tokio::test]
async fn what_is_too_large_to_be_kept_is_sent_once() {
    let (app, seen) = recovering(1, StatusCode::SERVICE_UNAVAILABLE).await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(with(retrying(&[RetryOn::ServerError], 3), &[app.address])).await;
    let mut client = Http1::connect(proxy.address).await;
    let large = "x".repeat(200 * 1024);
    let answer = soon("an answer", client.send(post("/", large.clone()))).await.unwrap();
    assert_eq!((answer.status, &*answer.body), (StatusCode::SERVICE_UNAVAILABLE, "bad"));
    let answer = soon("an answer", client.send(post("/", large.clone()))).await.unwrap();
    assert_eq!((answer.status, answer.body.len()), (StatusCode::OK, large.len()));
    assert_eq!((seen.load(SeqCst), proxy.metric(RETRIED)), (2, 0));
}

#[tokio::test]
async fn another_endpoint_is_preferred_and_a_single_one_is_tried_again() {
    let (bad, good) = (recovering(usize::MAX, StatusCode::BAD_GATEWAY).await, App::named("good").await);
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(with(retrying(&[RetryOn::GatewayError], 1), &[bad.0.address, good.address])).await;
    let mut client = Http1::connect(proxy.address).await;
    for _ in 0..40 {
        assert_eq!(soon("an answer", client.get("/")).await.body, "good");
    }
    assert!(bad.1.load(SeqCst) > 5);
}

#[tokio::test]
async fn a_try_that_takes_too_long_or_has_no_answer_is_followed_by_another() {
    let tries = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&tries);
    let app = App::start(own_ip(), 8080, move |_| {
        let number = count.fetch_add(1, SeqCst);
        async move {
            if number == 0 {
                future::pending::<()>().await;
            }
            Response::new(full("late"))
        }
    })
    .await;
    let proxy = Proxy::start(Role::Fleet);
    let mut policy = retrying(&[RetryOn::Reset], 1);
    policy.retry.as_mut().unwrap().per_try_timeout = Some(Duration::from_millis(100));
    proxy.serve(with(policy, &[app.address])).await;
    let mut client = Http1::connect(proxy.address).await;
    assert_eq!(soon("an answer", client.send(post("/", "body"))).await.unwrap().body, "late");
    assert_eq!((tries.load(SeqCst), proxy.metric(RETRIED)), (2, 1));

    // Nothing asks for another try after a time-out.
    tries.store(0, SeqCst);
    let mut policy = retrying(&[RetryOn::Conflict], 1);
    policy.retry.as_mut().unwrap().per_try_timeout = Some(Duration::from_millis(100));
    proxy.serve(with(policy, &[app.address])).await;
    let answer = soon("an answer", client.get("/")).await;
    assert_eq!((answer.status, answer.header("x-sluice-response-flag")), (StatusCode::GATEWAY_TIMEOUT, "UT"));
}

#[tokio::test]
async fn a_grpc_call_is_tried_again_by_its_status() {
    let tries = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&tries);
    let app = App::start(own_ip(), 8080, move |_| {
        let status = if count.fetch_add(1, SeqCst) == 0 { "14" } else { "0" };
        async move {
            let answer = Response::builder().header("content-type", "application/grpc").header("grpc-status", status);
            answer.body(full("")).unwrap()
        }
    })
    .await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(with(retrying(&[RetryOn::Grpc(GrpcStatus::parse(b"14"))], 1), &[app.address])).await;
    let mut client = Http2::connect(proxy.address).await;
    let answer = soon("an answer", client.send(call("/shop.Cart/Get"))).await.unwrap();
    assert_eq!((answer.header("grpc-status"), tries.load(SeqCst)), ("0", 2));
    assert_eq!(proxy.counted("a", "2xx", "OK"), 1);
}

#[tokio::test]
async fn an_application_that_fails_under_load_does_not_get_a_multiple_of_it() {
    // All are open before the first is answered.
    let (open, begun) = (Arc::new(Barrier::new(100)), Arc::new(AtomicUsize::new(0)));
    let app = App::start(own_ip(), 8080, move |_| {
        let first = (begun.fetch_add(1, SeqCst) < 100).then(|| Arc::clone(&open));
        async move {
            if let Some(open) = first {
                open.wait().await;
            }
            Response::builder().status(StatusCode::SERVICE_UNAVAILABLE).body(full("")).unwrap()
        }
    })
    .await;
    // With one thread, which has all of the budget.
    let proxy =
        Proxy::with(Role::Fleet, IdentityHandle::default(), |options| options.metrics = Metrics::new("test", 1));
    proxy.serve(with(retrying(&[RetryOn::ServerError], 10), &[app.address])).await;
    let mut clients = Vec::new();
    for _ in 0..100 {
        clients.push(Http1::connect(proxy.address).await);
    }
    for answer in futures::future::join_all(clients.iter_mut().map(|client| client.get("/"))).await {
        assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    }
    // A fifth of them has ten more tries each. Without a budget it would be 1,100.
    assert_eq!(app.requests(), 300);
}

#[tokio::test]
async fn headers_are_changed_both_ways() {
    let app = App::start(own_ip(), 8080, |request| async move {
        let seen = |name: &str| {
            let values = request.headers().get_all(name).iter();
            values.map(|value| value.to_str().unwrap()).collect::<Vec<_>>().join("+")
        };
        let seen = format!("{} {} {}", seen("x-team"), seen("x-hop"), seen("x-secret"));
        Response::builder().header("server", "hello").header("x-kept", "1").body(full(seen)).unwrap()
    })
    .await;
    let name = |name: &'static str| http::HeaderName::from_static(name);
    let value = |value: &'static str| http::HeaderValue::from_static(value);
    let policy = Policy {
        request_headers: HeaderChanges {
            remove: vec![name("x-secret")],
            write: vec![(name("x-team"), value("shop"), false), (name("x-hop"), value("fleet"), true)],
        },
        response_headers: HeaderChanges {
            remove: vec![name("server")],
            write: vec![(name("x-served-by"), value("sluice"), false)],
        },
        ..Policy::default()
    };
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(with(policy, &[app.address])).await;
    let request = |target: &str| {
        let request = Request::get(target).header("host", "cart.shop");
        let request = request.header("x-team", "other").header("x-hop", "client").header("x-secret", "s");
        request.body(full("")).unwrap()
    };
    let mut http1 = Http1::connect(proxy.address).await;
    let mut http2 = Http2::connect(proxy.address).await;
    for answer in [
        soon("an answer", http1.send(request("/"))).await.unwrap(),
        soon("an answer", http2.send(request("http://cart.shop/"))).await.unwrap(),
    ] {
        assert_eq!(answer.body, "shop client+fleet ");
        assert_eq!((answer.header("x-served-by"), answer.header("x-kept")), ("sluice", "1"));
        assert!(!answer.headers.contains_key("server"));
    }
}
