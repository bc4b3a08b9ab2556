//! Faults on purpose: they are seen as such, and no revision is blamed.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use http::{Request, StatusCode};
use hyper::body::Body;
use sluice_proxy::{
    metrics::{GrpcStatus, Metrics},
    snapshot::{
        Abort, Action, Cluster, Fault, Field, HeaderMatch, HeaderRule, Limits, Policy, Protocol, Share, Split,
        StringMatch, StringRule, TrafficPolicy,
    },
    workers::Role,
};
use sluice_xds::sluice::guard::v1::Outcomes;
use tokio::{io::AsyncWriteExt, net::TcpStream};

use crate::support::*;

const INJECTED: &str = "sluice_local_errors_total{listener=\"shop/cart:80\",flag=\"FI\"}";
const DELAYED: &str = "sluice_injected_delays_total{listener=\"shop/cart:80\"}";
const ACTIVE: &str = "sluice_requests_active{listener=\"shop/cart:80\"}";
const ABORTS: &str = "sluice_client_aborts_total{listener=\"shop/cart:80\"}";

fn with(fault: Fault, app: &App) -> Protocol {
    before(split([(cluster("a", &[app.address]), 100)]), fault)
}

fn before(split: Split, fault: Fault) -> Protocol {
    let policy = Policy { fault: Some(fault), ..Policy::default() };
    Protocol::http(Action::Forward { split, policy: Arc::new(policy) })
}

fn abort(abort: Abort, share: Share) -> Fault {
    Fault { headers: Vec::new(), delay: None, abort: Some((abort, share)) }
}

fn delay(by: Duration) -> Fault {
    Fault { headers: Vec::new(), delay: Some((by, Share::ALL)), abort: None }
}

fn outcomes(proxy: &Proxy) -> Outcomes {
    proxy.outcomes("a", Duration::from_millis(1))
}

#[tokio::test]
async fn an_injected_answer_says_that_it_is_one_and_counts_against_nobody() {
    let app = App::named("a").await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(with(abort(Abort::Http(StatusCode::BAD_GATEWAY), Share::ALL), &app)).await;
    let (mut http1, mut http2) = (Http1::connect(proxy.address).await, Http2::connect(proxy.address).await);
    for answer in [
        http1.send(post("/", "body")).await.unwrap(),
        http1.get("/").await,
        http2.send(Request::get("http://cart.shop/").body(full("")).unwrap()).await.unwrap(),
    ] {
        assert_eq!((answer.status, answer.header("x-sluice-response-flag")), (StatusCode::BAD_GATEWAY, "FI"));
    }
    let called = http2.send(call("/cart.Cart/Get")).await.unwrap();
    assert_eq!((called.status, called.header("grpc-status")), (StatusCode::OK, "14"));

    proxy.serve(with(abort(Abort::Grpc(GrpcStatus::parse(b"8")), Share::ALL), &app)).await;
    let called = http2.send(call("/cart.Cart/Get")).await.unwrap();
    assert_eq!((called.header("grpc-status"), called.header("x-sluice-response-flag")), ("8", "FI"));
    assert_eq!(http1.get("/").await.status, StatusCode::OK);

    assert_eq!((app.requests(), proxy.metric(INJECTED)), (0, 6));
    assert_eq!(outcomes(&proxy), Outcomes::default());
    assert_eq!(proxy.counted("a", "5xx", ""), 0);
}

/// RFC 9110, 15.3.5 and 15.4.5: clients of HTTP/2 take content behind these for an error of the protocol.
#[tokio::test]
async fn an_injected_answer_that_has_no_content_has_none() {
    let app = App::named("a").await;
    let proxy = Proxy::start(Role::Fleet);
    for status in [StatusCode::NO_CONTENT, StatusCode::RESET_CONTENT, StatusCode::NOT_MODIFIED] {
        proxy.serve(with(abort(Abort::Http(status), Share::ALL), &app)).await;
        let mut http2 = Http2::connect(proxy.address).await;
        let answer = http2.start(Request::get("http://cart.shop/").body(full("")).unwrap()).await.unwrap();
        assert_eq!(answer.status(), status);
        let length = answer.headers().get("content-length");
        assert!(Body::is_end_stream(answer.body()) && length.is_none_or(|length| length == "0"), "{answer:?}");
        let answer = Http1::connect(proxy.address).await.get("/").await;
        assert_eq!((answer.status, answer.body.as_ref()), (status, ""));
    }
}

#[tokio::test]
async fn only_requests_with_its_headers_meet_a_fault() {
    let app = App::named("a").await;
    let proxy = Proxy::start(Role::Fleet);
    let rule = |name: &'static str, rule| HeaderMatch {
        of: Field::Header(http::HeaderName::from_static(name)),
        rule,
        invert: false,
        missing_is_empty: false,
    };
    let exact = StringMatch { rule: StringRule::Exact("yes".to_owned()), ignore_case: false };
    let headers = vec![rule("x-rehearse", HeaderRule::Text(exact)), rule("x-user", HeaderRule::Present(true))];
    proxy.serve(with(Fault { headers, ..abort(Abort::Http(StatusCode::BAD_GATEWAY), Share::ALL) }, &app)).await;
    let (mut http1, mut http2) = (Http1::connect(proxy.address).await, Http2::connect(proxy.address).await);
    for (said, hit) in [
        (vec![], false),
        (vec![("x-rehearse", "yes")], false),
        (vec![("x-rehearse", "no"), ("x-user", "jane")], false),
        (vec![("x-rehearse", "yes"), ("x-user", "jane")], true),
    ] {
        let request = || {
            let mut request = Request::get("http://cart.shop/").body(full("")).unwrap();
            for (name, value) in &said {
                request.headers_mut().insert(*name, http::HeaderValue::from_static(value));
            }
            request
        };
        let mut over_http1 = request();
        *over_http1.uri_mut() = http::Uri::from_static("/");
        over_http1.headers_mut().insert("host", http::HeaderValue::from_static("cart.shop"));
        for answer in [http1.send(over_http1).await.unwrap(), http2.send(request()).await.unwrap()] {
            let expected = if hit { StatusCode::BAD_GATEWAY } else { StatusCode::OK };
            assert_eq!(answer.status, expected, "{said:?}");
        }
    }
    assert_eq!((app.requests(), proxy.metric(INJECTED)), (6, 2));
}

#[tokio::test]
async fn a_fault_hits_its_share_and_the_rest_is_served_and_counted() {
    let app = App::named("a").await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(with(abort(Abort::Http(StatusCode::SERVICE_UNAVAILABLE), Share(250_000)), &app)).await;
    let mut client = Http1::connect(proxy.address).await;
    let mut hit = 0;
    for _ in 0..800 {
        hit += u64::from(client.get("/").await.status == StatusCode::SERVICE_UNAVAILABLE);
    }
    // n = 800, p = 0.25: standard deviation 12.2; 5 of them.
    assert!((139..=261).contains(&hit), "{hit} of 800");
    assert_eq!((proxy.metric(INJECTED), proxy.counted("a", "2xx", "")), (hit, 800 - hit));
    assert_eq!((outcomes(&proxy).requests, outcomes(&proxy).bad), (800 - hit, 0));
}

#[tokio::test]
async fn an_injected_delay_is_felt_by_the_client_and_not_measured() {
    let app = App::named("a").await;
    let proxy = Proxy::start(Role::Fleet);
    let by = Duration::from_secs(2);
    proxy.serve(with(delay(by), &app)).await;
    let (mut http1, mut http2) = (Http1::connect(proxy.address).await, Http2::connect(proxy.address).await);
    let begun = Instant::now();
    let request = Request::get("http://cart.shop/").body(full("")).unwrap();
    let (one, other) = tokio::join!(http1.get("/"), http2.send(request));
    assert!(begun.elapsed() >= by);
    assert_eq!((one.body.as_str(), other.unwrap().body.as_str()), ("a", "a"));
    let within = |name: &str| {
        let labels = "destination_namespace=\"shop\",destination_service=\"cart\",revision=\"a\",le=\"1.5\"";
        proxy.metric(&format!("sluice_request_{name}_seconds_bucket{{{labels}}}"))
    };
    assert_eq!((within("duration"), within("first_byte"), proxy.metric(DELAYED)), (2, 2, 2));
}

#[tokio::test]
async fn what_was_held_up_goes_where_the_newest_configuration_says() {
    let (old, new) = (App::named("old").await, App::named("new").await);
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(with(delay(Duration::from_secs(1)), &old)).await;
    let mut client = Http1::connect(proxy.address).await;
    let held = tokio::spawn(async move { client.get("/").await });
    eventually("the delay", || proxy.metric(DELAYED) == 1).await;
    proxy.serve(http_to([(cluster("b", &[new.address]), 100)])).await;
    assert_eq!(soon("the answer", held).await.unwrap().body, "new");
    assert_eq!((old.requests(), proxy.counted("b", "2xx", "")), (0, 1));
}

#[tokio::test]
async fn a_client_that_does_not_wait_for_a_delay_is_held_against_nobody() {
    let app = App::named("a").await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(with(delay(Duration::from_secs(600)), &app)).await;
    // With content as well, and with another request behind it, which nobody reads meanwhile.
    let asked = [
        "GET / HTTP/1.1\r\nhost: a\r\n\r\n",
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nbody",
        "PUT / HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nhalf",
        "GET / HTTP/1.1\r\nhost: a\r\n\r\nGET / HTTP/1.1\r\nhost: a\r\n\r\n",
    ];
    for (before, asked) in (0..).zip(asked) {
        let mut client = TcpStream::connect(proxy.address).await.unwrap();
        client.write_all(asked.as_bytes()).await.unwrap();
        eventually("the delay", || proxy.metric(DELAYED) == before + 1).await;
        drop(client);
        eventually(asked, || proxy.metric(ABORTS) == before + 1).await;
    }
    let mut client = Http2::connect(proxy.address).await;
    let waiting = tokio::spawn(async move { client.start(call("/")).await.map(drop) });
    eventually("the delay", || proxy.metric(DELAYED) == 5).await;
    waiting.abort();
    eventually("the reset", || proxy.metric(ABORTS) == 5).await;
    assert_eq!((app.requests(), outcomes(&proxy)), (0, Outcomes::default()));
}

#[tokio::test]
async fn requests_that_are_held_up_are_among_those_that_a_service_may_have_open() {
    let app = App::named("a").await;
    let proxy = Proxy::with(Role::Fleet, Default::default(), |options| options.metrics = Metrics::new("test", 1));
    // One that is held up may go to either, as long as that one has room.
    let version = |revision: &str, most: u32| {
        let limits = Limits { requests: Some(most), ..Limits::default() };
        let traffic = TrafficPolicy { limits, ..TrafficPolicy::default() };
        (Cluster { traffic, ..cluster(revision, &[app.address]) }, 50)
    };
    let rehearsed = HeaderMatch {
        of: Field::Header(http::HeaderName::from_static("x-rehearse")),
        rule: HeaderRule::Present(true),
        invert: false,
        missing_is_empty: false,
    };
    let fault = Fault { headers: vec![rehearsed], ..delay(Duration::from_secs(600)) };
    proxy.serve(before(split([version("a", 1), version("b", 2)]), fault)).await;
    let rehearse = || {
        let mut request = get("/");
        request.headers_mut().insert("x-rehearse", http::HeaderValue::from_static("yes"));
        request
    };
    let mut held = Vec::new();
    for number in 1..=2 {
        let mut client = Http1::connect(proxy.address).await;
        held.push(tokio::spawn(async move { client.start(rehearse()).await.map(drop) }));
        eventually("the delay", || proxy.metric(DELAYED) == number).await;
    }
    let mut client = Http1::connect(proxy.address).await;
    let refused = |answer: &Answer| (answer.status.as_u16(), answer.header("x-sluice-response-flag").to_owned());
    let overflow = (503, "UO".to_owned());
    // One more is refused, and no version is blamed, for none was drawn.
    assert_eq!(refused(&client.send(rehearse()).await.unwrap()), overflow);
    eventually("its end", || proxy.metric(ACTIVE) == 2).await;
    assert_eq!(proxy.metric(DELAYED), 2);
    assert_eq!((proxy.counted("a", "5xx", ""), proxy.counted("b", "5xx", "")), (0, 0));
    // The others have what is left, which is nothing.
    assert_eq!(refused(&client.get("/").await), overflow);
    assert_eq!((proxy.counted("a", "5xx", "") + proxy.counted("b", "5xx", ""), app.requests()), (1, 0));
    for held in held {
        held.abort();
    }
    eventually("they are gone", || proxy.metric(ABORTS) == 2).await;
    assert_eq!(client.get("/").await.body, "a");
}

#[tokio::test]
async fn what_was_held_up_finds_the_room_that_it_had() {
    let app = App::named("a").await;
    let proxy = Proxy::with(Role::Fleet, Default::default(), |options| options.metrics = Metrics::new("test", 1));
    let limits = Limits { requests: Some(1), ..Limits::default() };
    let traffic = TrafficPolicy { limits, ..TrafficPolicy::default() };
    let version = |revision: &str| Cluster { traffic: traffic.clone(), ..cluster(revision, &[app.address]) };
    let by = Duration::from_millis(10);
    proxy.serve(before(split([(version("a"), 50), (version("b"), 50)]), delay(by))).await;
    let mut client = Http1::connect(proxy.address).await;
    for _ in 0..20 {
        assert_eq!(client.get("/").await.body, "a");
    }
}

#[tokio::test]
async fn a_proxy_that_drains_serves_what_is_held_up() {
    let app = App::named("a").await;
    let proxy = Proxy::with(Role::Fleet, Default::default(), |options| {
        options.timing.farewell = Duration::from_millis(50);
    });
    proxy.serve(with(delay(Duration::from_secs(600)), &app)).await;
    let (mut http1, mut http2) = (Http1::connect(proxy.address).await, Http2::connect(proxy.address).await);
    let request = Request::get("http://cart.shop/").body(full("")).unwrap();
    let drain = async {
        eventually("the delays", || proxy.metric(DELAYED) == 2).await;
        proxy.workers.drain(PATIENCE).await.unwrap()
    };
    let (one, other, drained) = tokio::join!(http1.get("/"), http2.send(request), drain);
    assert_eq!((one.body.as_str(), other.unwrap().body.as_str(), drained.cut), ("a", "a", 0));
}
