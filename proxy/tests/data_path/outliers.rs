//! Endpoints that answer badly are left alone, within their revision; slow start and zones, which choose among them, too.

use std::{
    future,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use sluice_proxy::{
    metrics::Metrics,
    snapshot::{Action, Cluster, Outliers, Policy, Protocol, SlowStart, TrafficPolicy, UpstreamProtocol},
    tls::IdentityHandle,
    workers::Role,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
};

use crate::support::*;

const OUTLIERS: Outliers = Outliers {
    server_errors: Some(3),
    gateway_errors: None,
    no_answers: None,
    no_answers_apart: false,
    interval: Duration::from_secs(10),
    least: Duration::from_secs(3600),
    most: Duration::from_secs(3600),
    most_ejected: 50,
    panic: 50.0,
};

fn watched(addresses: &[SocketAddr], outliers: Outliers) -> Cluster {
    let traffic = TrafficPolicy { outliers: Some(outliers), ..TrafficPolicy::default() };
    Cluster { traffic, ..cluster("a", addresses) }
}

/// A proxy with one thread, which sees all answers.
fn one_thread() -> Proxy {
    Proxy::with(Role::Fleet, IdentityHandle::default(), |options| options.metrics = Metrics::new("test", 1))
}

/// An application that fails while it is told to.
async fn moody(bad: bool) -> (App, Arc<AtomicBool>) {
    let bad = Arc::new(AtomicBool::new(bad));
    let mood = bad.clone();
    let app = App::start(own_ip(), 8080, move |request: Request<Incoming>| {
        let bad = mood.load(SeqCst);
        let grpc = request.headers().contains_key("te");
        async move {
            let answer = Response::builder();
            let answer = match (bad, grpc) {
                (true, true) => answer.header("grpc-status", "13"),
                (true, false) => answer.status(StatusCode::INTERNAL_SERVER_ERROR),
                (false, _) => answer,
            };
            answer.body(full("")).unwrap()
        }
    })
    .await;
    (app, bad)
}

#[tokio::test]
async fn an_endpoint_that_fails_again_and_again_is_left_alone_and_its_revision_keeps_its_traffic() {
    let ((bad, _), (good, _), other) = (moody(true).await, moody(false).await, App::named("b").await);
    let proxy = one_thread();
    let a = watched(&[bad.address, good.address], OUTLIERS);
    proxy.serve(http_to([(a, 100), (cluster("b", &[other.address]), 0)])).await;
    let (mut http1, mut http2) = (Http1::connect(proxy.address).await, Http2::connect(proxy.address).await);
    for _ in 0..50 {
        http1.get("/").await;
        http2.send(call("/")).await.unwrap();
    }
    assert_eq!((bad.requests(), good.requests(), other.requests()), (3, 97, 0));
}

/// What a gate is to see: a revision with ejected endpoints still has its own share of the requests, and of the failures.
#[tokio::test]
async fn ejection_moves_no_request_to_another_revision() {
    let [(one, _), (another, _), (good, _)] = [moody(true).await, moody(true).await, moody(false).await];
    // The endpoints of the revision that fails, and whether all of its share does.
    for (endpoints, all) in [(vec![&one, &another], true), (vec![&one, &good], false)] {
        let other = App::named("b").await;
        let proxy = one_thread();
        let addresses: Vec<_> = endpoints.iter().map(|app| app.address).collect();
        let a = watched(&addresses, Outliers { most_ejected: 100, panic: 0.0, ..OUTLIERS });
        proxy.serve(http_to([(a, 50), (cluster("b", &[other.address]), 50)])).await;
        let (mut http1, mut http2) = (Http1::connect(proxy.address).await, Http2::connect(proxy.address).await);
        for _ in 0..200 {
            http1.get("/").await;
            http2.send(get("/")).await.unwrap();
        }
        let (failed, served) = (proxy.counted("a", "5xx", ""), proxy.counted("a", "2xx", ""));
        // 5 standard deviations of a fair coin.
        assert!((150..=250).contains(&(failed + served)), "{failed} + {served} of 400");
        assert_eq!(failed + served + other.requests() as u64, 400);
        if all {
            assert_eq!(served, 0);
        } else {
            assert_eq!(failed, 3, "{served} were served");
        }
    }
}

#[tokio::test]
async fn an_outlier_is_asked_again_after_its_time() {
    let ((app, mood), (good, _)) = (moody(true).await, moody(false).await);
    let proxy = one_thread();
    let brief = Duration::from_millis(50);
    let outliers = Outliers { server_errors: Some(1), least: brief, most: brief, ..OUTLIERS };
    proxy.serve(http_to([(watched(&[app.address, good.address], outliers), 100)])).await;
    let mut client = Http1::connect(proxy.address).await;
    while client.get("/").await.status == StatusCode::OK {}
    mood.store(false, SeqCst);
    let back = async {
        while app.requests() < 3 {
            assert_eq!(client.get("/").await.status, StatusCode::OK);
        }
    };
    soon("requests for the outlier", back).await;
}

#[tokio::test]
async fn no_more_endpoints_are_left_alone_than_may_be() {
    let ((one, _), (other, _), (third, _)) = (moody(true).await, moody(true).await, moody(true).await);
    let table: [(&[&App], u32, usize); 4] = [
        (&[&one], 50, 0),
        (&[&one, &other], 40, 0),
        (&[&one, &other, &third], 34, 1),
        (&[&one, &other, &third], 67, 2),
    ];
    for (apps, most_ejected, expected) in table {
        let proxy = one_thread();
        let addresses: Vec<_> = apps.iter().map(|app| app.address).collect();
        let outliers = Outliers { most_ejected, panic: 0.0, ..OUTLIERS };
        proxy.serve(http_to([(watched(&addresses, outliers), 100)])).await;
        let mut client = Http1::connect(proxy.address).await;
        for _ in 0..50 {
            client.get("/").await;
        }
        let before: Vec<_> = apps.iter().map(|app| app.requests()).collect();
        for _ in 0..50 {
            assert_eq!(client.get("/").await.status, StatusCode::INTERNAL_SERVER_ERROR);
        }
        let alone = apps.iter().zip(before).filter(|(app, before)| app.requests() == *before).count();
        assert_eq!(alone, expected, "{} endpoints, {most_ejected} %", apps.len());
    }
}

#[tokio::test]
async fn where_too_few_endpoints_are_left_all_are_used() {
    let ((one, _), (other, _), (third, _)) = (moody(true).await, moody(true).await, moody(false).await);
    let proxy = one_thread();
    let outliers = Outliers { server_errors: Some(1), most_ejected: 100, ..OUTLIERS };
    let addresses = [one.address, other.address, third.address];
    proxy.serve(http_to([(watched(&addresses, outliers), 100)])).await;
    let mut client = Http1::connect(proxy.address).await;
    let all = async {
        while one.requests() < 10 || other.requests() < 10 {
            client.get("/").await;
        }
    };
    soon("requests for ejected endpoints", all).await;
}

#[tokio::test]
async fn an_endpoint_that_does_not_answer_in_the_route_s_time_is_one_that_fails() {
    let silent = App::start(own_ip(), 8080, |_| future::pending()).await;
    let good = App::named("good").await;
    let proxy = one_thread();
    let policy = Policy { timeout: Some(Duration::from_millis(500)), ..Policy::default() };
    let outliers = Outliers { gateway_errors: Some(2), server_errors: None, ..OUTLIERS };
    let split = split([(watched(&[silent.address, good.address], outliers), 1)]);
    proxy.serve(Protocol::http(Action::Forward { split, policy: Arc::new(policy) })).await;
    let mut client = Http1::connect(proxy.address).await;
    while good.requests() < 50 {
        client.get("/").await;
    }
    assert_eq!(silent.requests(), 2);
}

/// Whoever sends content that is not valid must not be able to take Pods away from everybody.
#[tokio::test]
async fn content_that_a_client_breaks_is_held_against_no_endpoint() {
    for protocol in [UpstreamProtocol::Http1, UpstreamProtocol::Http2] {
        let (begun, mut begins) = mpsc::channel(64);
        let reader = || {
            let begun = begun.clone();
            App::start(own_ip(), 8080, move |request: Request<Incoming>| {
                let begun = begun.clone();
                async move {
                    begun.send(()).await.unwrap();
                    let _ = request.into_body().collect().await;
                    Response::new(full("ok"))
                }
            })
        };
        let apps = [reader().await, reader().await];
        let proxy = one_thread();
        let outliers = Outliers { server_errors: Some(1), gateway_errors: Some(1), ..OUTLIERS };
        let watched = watched(&apps.each_ref().map(|app| app.address), outliers);
        proxy.serve(http_to([(Cluster { protocol, ..watched }, 100)])).await;
        for broken in ["zz\r\n", "0\r\nno trailer\r\n\r\n"] {
            let mut client = TcpStream::connect(proxy.address).await.unwrap();
            let head = "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n";
            client.write_all(head.as_bytes()).await.unwrap();
            soon("the request", begins.recv()).await.unwrap();
            client.write_all(broken.as_bytes()).await.unwrap();
            let mut said = String::new();
            soon("the answer", client.read_to_string(&mut said)).await.unwrap();
            assert!(said.starts_with("HTTP/1.1 400"), "{said}");
        }
        let before = apps.each_ref().map(App::requests);
        let mut client = Http1::connect(proxy.address).await;
        for _ in 0..40 {
            assert_eq!(client.get("/").await.status, StatusCode::OK);
        }
        assert!(apps.iter().zip(before).all(|(app, before)| app.requests() > before), "{before:?}");
    }
}

#[tokio::test]
async fn an_endpoint_that_joins_others_gets_less_at_first_and_the_first_ones_get_all() {
    let (old, new) = (App::named("old").await, App::named("new").await);
    let slow = |addresses: &[SocketAddr]| {
        let slow_start = Some(SlowStart { window: Duration::from_secs(3600), least: 0.1 });
        Cluster { traffic: TrafficPolicy { slow_start, ..TrafficPolicy::default() }, ..cluster("a", addresses) }
    };
    let both = [old.address, new.address];
    let proxy = one_thread();
    proxy.serve(http_to([(slow(&both[..1]), 100)])).await;
    proxy.serve(http_to([(slow(&both), 100)])).await;
    let mut client = Http1::connect(proxy.address).await;
    for _ in 0..1000 {
        client.get("/").await;
    }
    // A tenth of half of them; 5 standard deviations.
    assert!((15..=85).contains(&new.requests()), "{}", new.requests());

    let before = new.requests();
    let proxy = one_thread();
    proxy.serve(http_to([(slow(&both), 100)])).await;
    let mut client = Http1::connect(proxy.address).await;
    for _ in 0..400 {
        client.get("/").await;
    }
    let share = new.requests() - before;
    assert!((150..=250).contains(&share), "{share}");
}

#[tokio::test]
async fn endpoints_of_the_own_zone_are_preferred_until_they_fail() {
    let (near, far) = (App::named("near").await, App::named("far").await);
    let prefer = |near: SocketAddr, all: &[SocketAddr]| Cluster { near: vec![near], ..cluster("a", all) };
    let proxy = one_thread();
    proxy.serve(http_to([(prefer(near.address, &[near.address, far.address]), 100)])).await;
    let (mut http1, mut http2) = (Http1::connect(proxy.address).await, Http2::connect(proxy.address).await);
    for _ in 0..20 {
        assert_eq!(http1.get("/").await.body, "near");
        assert_eq!(http2.send(call("/")).await.unwrap().body, "near");
    }
    assert_eq!(far.requests(), 0);

    let dead = SocketAddr::new(own_ip(), 9);
    let proxy = one_thread();
    proxy.serve(http_to([(prefer(dead, &[dead, far.address]), 100)])).await;
    let mut client = Http1::connect(proxy.address).await;
    for _ in 0..20 {
        assert_eq!(client.get("/").await.body, "far");
    }
}
