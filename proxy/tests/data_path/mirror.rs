//! Copies of requests: they arrive whole, and whatever becomes of them is nothing to the request itself.

use std::{
    future,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use sluice_proxy::{
    metrics::Metrics,
    overload::Reading,
    snapshot::{Action, MetricLabels, Mirror, Policy, Protocol, RetryOn, RetryPolicy, Share},
    workers::Role,
};
use sluice_xds::sluice::guard::v1::Outcomes;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::mpsc,
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};

use crate::support::*;

/// Requests go to `app`, and copies to `mirror`, which is the revision `m`.
fn mirrored(app: &App, mirror: SocketAddr, share: Share, policy: Policy) -> Protocol {
    let mut split = split([(cluster("a", &[app.address]), 100)]);
    split.mirrors = vec![Mirror { cluster: Arc::new(cluster("m", &[mirror])), share, marks_host: true }];
    Protocol::http(Action::Forward { split, policy: Arc::new(policy) })
}

fn copies(metrics: &Metrics, outcome: &str) -> u64 {
    let series = format!(
        "sluice_mirrored_requests_total{{destination_namespace=\"shop\",destination_service=\"cart\",revision=\"m\",outcome=\"{outcome}\"}} "
    );
    let text = metrics.render();
    let value = text.lines().find_map(|line| line.strip_prefix(&series));
    value.unwrap_or_else(|| panic!("{series} is missing in\n{text}")).parse().unwrap()
}

/// Copies whose duration was measured.
fn measured(proxy: &Proxy) -> u64 {
    let labels = "destination_namespace=\"shop\",destination_service=\"cart\",revision=\"m\"";
    proxy.metric(&format!("sluice_mirrored_request_duration_seconds_count{{{labels}}}"))
}

async fn until(proxy: &Proxy, outcome: &str, count: u64) {
    eventually(&format!("{count} copies: {outcome}"), || copies(&proxy.metrics, outcome) == count).await;
}

/// What an application got: of each request the host, the path, the body and a trailer.
type Got = Arc<Mutex<Vec<(String, String, Bytes, Option<HeaderValue>)>>>;

/// Answers with the body that it got. `Got` is written when that is whole.
async fn echo(status: StatusCode) -> (App, Got) {
    let got = Got::default();
    let written = Arc::clone(&got);
    let app = App::start(own_ip(), 8080, move |request| {
        let written = Arc::clone(&written);
        async move {
            let (parts, body) = request.into_parts();
            let host = parts.headers.get(header::HOST).map(|host| host.to_str().unwrap().to_owned());
            let host = host.or_else(|| parts.uri.authority().map(ToString::to_string)).unwrap_or_default();
            let Ok(body) = body.collect().await else { return Response::new(full("")) };
            let sum = body.trailers().and_then(|trailers| trailers.get("x-sum").cloned());
            let body = body.to_bytes();
            written.lock().unwrap().push((host, parts.uri.path().to_owned(), body.clone(), sum));
            Response::builder().status(status).body(full(body)).unwrap()
        }
    })
    .await;
    (app, got)
}

/// In several frames, of unknown length, with a trailer.
fn in_frames(uri: &str, body: &str) -> Request<AnyBody> {
    let mut frames: Vec<_> =
        body.as_bytes().chunks(10_000).map(|data| Ok(Frame::data(Bytes::copy_from_slice(data)))).collect();
    frames.push(Ok(Frame::trailers(HeaderMap::from_iter([(
        header::HeaderName::from_static("x-sum"),
        HeaderValue::from_static("42"),
    )]))));
    let request = Request::post(uri).header("trailer", "x-sum");
    request.body(StreamBody::new(futures::stream::iter(frames)).boxed()).unwrap()
}

/// A body that is what is sent, as it is sent.
fn as_sent() -> (mpsc::Sender<Bytes>, AnyBody) {
    let (sender, receiver) = mpsc::channel(1);
    let frames = ReceiverStream::new(receiver).map(|data| Ok(Frame::data(data)));
    (sender, BodyExt::boxed(StreamBody::new(frames)))
}

#[tokio::test]
async fn copies_arrive_whole_and_nobody_sees_their_answers() {
    let ((app, own), (mirror, got)) = (echo(StatusCode::OK).await, echo(StatusCode::INTERNAL_SERVER_ERROR).await);
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(mirrored(&app, mirror.address, Share::ALL, Policy::default())).await;
    let (mut http1, mut http2) = (Http1::connect(proxy.address).await, Http2::connect(proxy.address).await);
    let body = format!("{:-<60000}", "body");
    let mut chunked = in_frames("/chunked", &body);
    chunked.headers_mut().insert("host", HeaderValue::from_static("cart.shop:8080"));
    let to_http2 = |path: &str, content: String| {
        Request::post(format!("http://cart.shop:8080{path}")).body(full(content)).unwrap()
    };
    let answers = [
        http1.get("/empty").await,
        http1.send(post("/known", body.clone())).await.unwrap(),
        http1.send(chunked).await.unwrap(),
        http2.send(to_http2("/http2/empty", String::new())).await.unwrap(),
        http2.send(to_http2("/http2/known", body.clone())).await.unwrap(),
        http2.send(in_frames("http://cart.shop:8080/http2/chunked", &body)).await.unwrap(),
    ];
    for answer in &answers {
        assert_eq!(answer.status, StatusCode::OK);
    }
    until(&proxy, "5xx", 6).await;
    let sorted = |got: &Got| {
        let mut got = got.lock().unwrap().clone();
        got.sort_by(|one, other| one.1.cmp(&other.1));
        got
    };
    for ((host, path, body, sum), own) in sorted(&got).into_iter().zip(sorted(&own)) {
        assert_eq!((&path, &body, &sum), (&own.1, &own.2, &own.3));
        let marked = match own.0.split_once(':') {
            Some((name, port)) => format!("{name}-shadow:{port}"),
            None => format!("{}-shadow", own.0),
        };
        assert_eq!(host, marked);
        assert_eq!(sum.is_some(), path.ends_with("chunked"), "{path}");
    }
    assert_eq!((mirror.requests(), app.requests(), measured(&proxy)), (6, 6, 6));

    // What the guard reads, and gates at a weight above 0, is of users alone.
    let labels =
        MetricLabels { destination_namespace: "shop".into(), destination_service: "cart".into(), revision: "m".into() };
    assert_eq!(proxy.metrics.outcomes(&labels, Duration::from_millis(1)), Outcomes::default());
    assert_eq!((proxy.counted("m", "5xx", ""), proxy.counted("a", "2xx", "")), (0, 6));
}

#[tokio::test]
async fn a_mirror_that_hangs_resets_or_refuses_costs_the_request_nothing() {
    let (app, _) = echo(StatusCode::OK).await;
    let hanging = App::start(own_ip(), 8080, |_| future::pending()).await;
    let resetting = TcpListener::bind((own_ip(), 8080)).await.unwrap();
    let resets = resetting.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = resetting.accept().await {
            let _ = stream.read(&mut [0; 64]).await;
            // Closed with something unread: the other side sees a reset.
        }
    });
    let refuses = SocketAddr::new(own_ip(), 9);
    for (mirror, outcome) in [(hanging.address, "timeout"), (resets, "failed"), (refuses, "failed")] {
        let proxy = Proxy::start(Role::Fleet);
        // The request itself has far less to wait for.
        let policy = Policy { timeout: Some(Duration::from_secs(2)), ..Policy::default() };
        proxy.serve(mirrored(&app, mirror, Share::ALL, policy)).await;
        let (mut http1, mut http2) = (Http1::connect(proxy.address).await, Http2::connect(proxy.address).await);
        for _ in 0..5 {
            let request = in_frames("http://cart.shop/", "body");
            for answer in
                [http1.send(post("/", "body")).await.unwrap(), http1.get("/").await, http2.send(request).await.unwrap()]
            {
                assert_eq!(answer.status, StatusCode::OK);
            }
        }
        assert_eq!(proxy.counted("a", "2xx", ""), 15);
        until(&proxy, outcome, 15).await;
        assert_eq!(measured(&proxy), 15, "{outcome}");
    }
}

/// As a user's request: it was certainly not processed.
#[tokio::test]
async fn a_copy_that_was_not_sent_is_tried_at_another_endpoint() {
    let ((app, _), (mirror, _)) = (echo(StatusCode::OK).await, echo(StatusCode::OK).await);
    let proxy = Proxy::start(Role::Fleet);
    let mut split = split([(cluster("a", &[app.address]), 100)]);
    let there = cluster("m", &[SocketAddr::new(own_ip(), 9), mirror.address]);
    split.mirrors = vec![Mirror { cluster: Arc::new(there), share: Share::ALL, marks_host: false }];
    proxy.serve(Protocol::http(Action::Forward { split, policy: Arc::default() })).await;
    let mut client = Http1::connect(proxy.address).await;
    for _ in 0..20 {
        assert_eq!(client.send(post("/", "body")).await.unwrap().status, StatusCode::OK);
    }
    until(&proxy, "2xx", 20).await;
    assert_eq!((copies(&proxy.metrics, "failed"), mirror.requests()), (0, 20));
}

/// As a user's request: the application has not seen it, and its version has not failed.
#[tokio::test]
async fn a_copy_that_a_sidecar_did_not_process_is_tried_at_another_endpoint() {
    let ca = Ca::new();
    let ((app, own), mut mirrors, mut sidecars) = (echo(StatusCode::OK).await, Vec::new(), Vec::new());
    for _ in 0..2 {
        let mirror = echo(StatusCode::OK).await;
        sidecars.push(sidecar(&ca, mirror.0.address.ip(), false).await);
        mirrors.push(mirror);
    }
    // As in overload.rs.
    sidecars[0].overload.observe(Some(Reading { used: 93, limit: 100 }));
    let fleet = Proxy::with(Role::Fleet, ca.identity(FLEET), |_| {});
    let mut split = split([(cluster("a", &[app.address]), 100)]);
    let there = mesh_cluster("m", &[&sidecars[0], &sidecars[1]]);
    split.mirrors = vec![Mirror { cluster: Arc::new(there), share: Share::ALL, marks_host: false }];
    fleet.serve(Protocol::http(Action::Forward { split, policy: Arc::default() })).await;
    let (mut http1, mut http2) = (Http1::connect(fleet.address).await, Http2::connect(fleet.address).await);
    let body = format!("{:-<50000}", "body");
    const SHED: &str = "sluice_local_errors_total{listener=\"inbound\",flag=\"OM\"}";
    let mut sent = 0;
    for _ in 0..20 {
        for answer in [
            http1.get("/").await,
            http1.send(post("/", body.clone())).await.unwrap(),
            http2.send(in_frames("http://cart.shop/", &body)).await.unwrap(),
        ] {
            assert_eq!(answer.status, StatusCode::OK);
            sent += 1;
        }
        let ended = || ["2xx", "failed", "cancelled"].map(|outcome| copies(&fleet.metrics, outcome));
        eventually("the copies", || ended().iter().sum::<u64>() == sent).await;
        assert_eq!(ended(), [sent, 0, 0]);
    }
    assert!(sidecars[0].metric(SHED) > 0, "one is tried that has no room");
    // Whole, as the requests were.
    let whole = |got: &Got| {
        let mut bodies: Vec<_> = got.lock().unwrap().iter().map(|it| (it.2.clone(), it.3.clone())).collect();
        bodies.sort();
        bodies
    };
    assert!(whole(&mirrors[1].1) == whole(&own));
    assert_eq!(mirrors[0].0.requests(), 0);

    // Where no other has room, it fails, as a user's request would.
    sidecars[1].overload.observe(Some(Reading { used: 93, limit: 100 }));
    assert_eq!(http1.send(post("/", body)).await.unwrap().status, StatusCode::OK);
    until(&fleet, "failed", 1).await;
    assert_eq!(copies(&fleet.metrics, "2xx"), sent);
}

/// The status of a gRPC call says whether its server failed, whatever HTTP says.
#[tokio::test]
async fn copies_of_grpc_calls_are_counted_by_their_status() {
    let (app, _) = echo(StatusCode::OK).await;
    let proxy = Proxy::start(Role::Fleet);
    let mut counted = [("2xx", 0), ("grpc_failed", 0), ("5xx", 0)];
    // Without a status it is that of HTTP: 200 is UNKNOWN.
    for (http, in_head, in_trailers, outcome) in [
        (200, Some("0"), None, "2xx"),
        (200, None, Some("0"), "2xx"),
        (200, None, Some("5"), "2xx"),
        (200, Some("13"), None, "grpc_failed"),
        (200, None, Some("14"), "grpc_failed"),
        (200, None, None, "grpc_failed"),
        (503, None, None, "5xx"),
    ] {
        let mirror = App::start(own_ip(), 8080, move |request| async move {
            // What HTTP/2 says of the request may be cut off by an early answer.
            let _ = request.into_body().collect().await;
            let mut answer = Response::builder().status(http).header("content-type", "application/grpc");
            if let Some(status) = in_head {
                answer = answer.header("grpc-status", status);
            }
            let trailers = in_trailers.map(|status| {
                let value = HeaderValue::from_static(status);
                Frame::trailers(HeaderMap::from_iter([(header::HeaderName::from_static("grpc-status"), value)]))
            });
            let frames = trailers.into_iter().map(Ok);
            answer.body(BodyExt::boxed(StreamBody::new(futures::stream::iter(frames)))).unwrap()
        })
        .await;
        proxy.serve(mirrored(&app, mirror.address, Share::ALL, Policy::default())).await;
        let mut client = Http2::connect(proxy.address).await;
        let before = copies(&proxy.metrics, outcome);
        client.send(call("/cart.Cart/Get")).await.unwrap();
        until(&proxy, outcome, before + 1).await;
        for (name, count) in &mut counted {
            *count += u64::from(*name == outcome);
            assert_eq!(copies(&proxy.metrics, name), *count, "{http} {in_head:?} {in_trailers:?}");
        }
    }
}

#[tokio::test]
async fn no_more_copies_are_under_way_than_a_bound() {
    let (app, _) = echo(StatusCode::OK).await;
    let hanging = App::start(own_ip(), 8080, |_| future::pending()).await;
    let proxy = Proxy::start(Role::Fleet);
    let policy = || Policy { timeout: Some(Duration::from_secs(600)), ..Policy::default() };
    proxy.serve(mirrored(&app, hanging.address, Share::ALL, policy())).await;
    // On one connection, and so on one thread.
    let mut client = Http1::connect(proxy.address).await;
    for round in 0..200 {
        assert_eq!(client.get("/").await.status, StatusCode::OK);
        if round == 150 {
            // Another configuration of the mirror does not forget them.
            let mut changed = mirrored(&app, hanging.address, Share::ALL, policy());
            if let Protocol::Http(routes) = &mut changed
                && let Action::Forward { split, .. } = &mut routes[0].action
            {
                let mut other = cluster("m", &[hanging.address]);
                other.connect_timeout = Duration::from_secs(2);
                split.mirrors[0].cluster = Arc::new(other);
            }
            proxy.serve(changed).await;
        }
    }
    assert_eq!((copies(&proxy.metrics, "busy"), proxy.counted("a", "2xx", "")), (200 - 128, 200));
    // Those are still under way, and what was not sent says nothing about the version.
    assert_eq!(measured(&proxy), 0);
}

#[tokio::test]
async fn a_long_body_is_passed_on_whole_and_its_copy_is_not_begun_or_given_up() {
    let (app, _) = echo(StatusCode::OK).await;
    // Accepts, and never reads.
    let deaf = TcpListener::bind((own_ip(), 8080)).await.unwrap();
    let address = deaf.local_addr().unwrap();
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(mirrored(&app, address, Share::ALL, Policy::default())).await;
    let (mut http1, mut http2) = (Http1::connect(proxy.address).await, Http2::connect(proxy.address).await);
    // More than the kernel would take for both ends.
    let long = "body".repeat(8 << 20);
    let known = Request::post("http://cart.shop/").body(full(long.clone())).unwrap();
    for answer in [http1.send(post("/", long.clone())).await.unwrap(), http2.send(known).await.unwrap()] {
        assert!(answer.body == long);
    }
    assert_eq!(copies(&proxy.metrics, "too_large"), 2);
    let mut unknown = in_frames("/", &long);
    unknown.headers_mut().insert("host", HeaderValue::from_static("cart.shop"));
    assert!(http1.send(unknown).await.unwrap().body == long);
    until(&proxy, "too_large", 3).await;
    assert!(http2.send(in_frames("http://cart.shop/", &long)).await.unwrap().body == long);
    until(&proxy, "too_large", 4).await;
    assert_eq!(proxy.counted("a", "2xx", ""), 4);
}

#[tokio::test]
async fn a_stream_is_copied_as_it_comes_however_long_it_is() {
    let (app, own) = echo(StatusCode::OK).await;
    let read = Arc::new(Mutex::new(0));
    let count = Arc::clone(&read);
    let mirror = App::start(own_ip(), 8080, move |mut request| {
        let count = Arc::clone(&count);
        async move {
            while let Some(Ok(frame)) = request.body_mut().frame().await {
                *count.lock().unwrap() += frame.data_ref().map_or(0, Bytes::len);
            }
            Response::new(full(""))
        }
    })
    .await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(mirrored(&app, mirror.address, Share::ALL, Policy::default())).await;
    let mut http2 = Http2::connect(proxy.address).await;
    let (sender, body) = as_sent();
    let request = Request::post("http://cart.shop/").body(body).unwrap();
    let answer = tokio::spawn(async move { http2.send(request).await });
    for part in 1..=20 {
        sender.send(Bytes::from(vec![b'-'; 16_000])).await.unwrap();
        eventually("the copy of a part", || *read.lock().unwrap() == part * 16_000).await;
    }
    drop(sender);
    assert_eq!(soon("the answer", answer).await.unwrap().unwrap().body.len(), 320_000);
    until(&proxy, "2xx", 1).await;
    assert_eq!(own.lock().unwrap()[0].2.len(), 320_000);
}

#[tokio::test]
async fn the_copy_of_a_request_that_ends_early_is_given_up() {
    let app = App::start(own_ip(), 8080, |_| future::pending()).await;
    let mirror = App::start(own_ip(), 8080, |_| future::pending()).await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(mirrored(&app, mirror.address, Share::ALL, Policy::default())).await;
    let mut client = Http1::connect(proxy.address).await;
    let (sender, body) = as_sent();
    let request = Request::post("/").header("host", "cart.shop").body(body).unwrap();
    let waiting = tokio::spawn(async move { client.start(request).await.map(drop) });
    sender.send(Bytes::from_static(b"begin")).await.unwrap();
    eventually("the request and its copy", || (app.requests(), mirror.requests()) == (1, 1)).await;
    waiting.abort();
    drop(sender);
    until(&proxy, "cancelled", 1).await;
}

#[tokio::test]
async fn a_request_that_is_tried_again_is_copied_once() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let bodies = Arc::clone(&seen);
    let app = App::start(own_ip(), 8080, move |request| {
        let bodies = Arc::clone(&bodies);
        async move {
            let body = request.into_body().collect().await.unwrap().to_bytes();
            bodies.lock().unwrap().push(body);
            let status = if bodies.lock().unwrap().len() % 2 == 1 { 500 } else { 200 };
            Response::builder().status(status).body(full("")).unwrap()
        }
    })
    .await;
    let (mirror, got) = echo(StatusCode::OK).await;
    let proxy = Proxy::start(Role::Fleet);
    let retry = RetryPolicy { on: vec![RetryOn::ServerError], retries: 1, per_try_timeout: None };
    let policy = Policy { retry: Some(retry), ..Policy::default() };
    proxy.serve(mirrored(&app, mirror.address, Share::ALL, policy)).await;
    let (mut http1, mut http2) = (Http1::connect(proxy.address).await, Http2::connect(proxy.address).await);
    let body = format!("{:-<50000}", "body");
    assert_eq!(http1.send(post("/", body.clone())).await.unwrap().status, StatusCode::OK);
    assert_eq!(http2.send(in_frames("http://cart.shop/", &body)).await.unwrap().status, StatusCode::OK);
    until(&proxy, "2xx", 2).await;
    assert!(seen.lock().unwrap().iter().all(|it| *it == body) && seen.lock().unwrap().len() == 4);
    assert!(got.lock().unwrap().iter().all(|it| it.2 == body) && mirror.requests() == 2);
}

#[tokio::test]
async fn websockets_are_not_copied() {
    let app = websocket_echo(own_ip()).await;
    let (mirror, _) = echo(StatusCode::OK).await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(mirrored(&app, mirror.address, Share::ALL, Policy::default())).await;
    let mut stream = websocket(proxy.address).await;
    stream.write_all(b"ping").await.unwrap();
    let mut back = [0; 4];
    soon("the echo", stream.read_exact(&mut back)).await.unwrap();
    // A request that is copied afterwards is the first that the mirror sees.
    Http1::connect(proxy.address).await.get("/").await;
    until(&proxy, "2xx", 1).await;
    assert_eq!((mirror.requests(), app.requests()), (1, 2));
}

#[tokio::test]
async fn a_share_of_the_requests_is_copied_and_none_where_that_is_nothing() {
    let (app, _) = echo(StatusCode::OK).await;
    let (mirror, _) = echo(StatusCode::OK).await;
    let proxy = Proxy::start(Role::Fleet);
    for (share, expected) in [(Share::NONE, 0..=0), (Share(500_000), 150..=250)] {
        proxy.serve(mirrored(&app, mirror.address, share, Policy::default())).await;
        let mut client = Http1::connect(proxy.address).await;
        for _ in 0..400 {
            client.get("/").await;
        }
        // n = 400: 5 standard deviations of a fair coin.
        let seen = || copies(&proxy.metrics, "2xx");
        eventually("the last copy", || seen() == mirror.requests() as u64 && expected.contains(&seen())).await;
    }
}
