use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Body, Frame};
use sluice_proxy::{
    snapshot::{Action, Protocol},
    workers::Role,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::support::*;

/// Sends bytes on a new connection and reads all that comes until the other side closes.
async fn raw(address: std::net::SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    soon("the close", stream.read_to_end(&mut answer)).await.unwrap();
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn the_fleet_says_who_the_client_is_and_changes_nothing_else() {
    let seen = Seen::default();
    let record = seen.clone();
    let app = App::start(own_ip(), 8080, move |request| {
        record.lock().unwrap().push(request.headers().clone());
        async { Response::builder().header("x-app", "1").body(full("hello")).unwrap() }
    })
    .await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(cluster("a", &[app.address]), 100)])).await;
    let mut client = Http1::connect(proxy.address).await;
    let mut request = get("/x?y=1");
    request.headers_mut().insert("x-sluice-not-processed", HeaderValue::from_static("1"));
    request
        .headers_mut()
        .insert("x-forwarded-client-cert", HeaderValue::from_static("URI=spiffe://test/ns/shop/sa/admin"));
    request.headers_mut().insert("x-mine", HeaderValue::from_static("2"));
    let answer = client.send(request).await.unwrap();
    assert_eq!((answer.status, answer.body.as_str()), (StatusCode::OK, "hello"));
    assert_eq!(answer.header("x-app"), "1");
    assert!(!answer.headers.contains_key("server") && !answer.headers.contains_key("x-sluice-response-flag"));
    let headers = seen.lock().unwrap().remove(0);
    let mut names: Vec<_> = headers.iter().map(|(n, v)| format!("{n}: {}", v.to_str().unwrap())).collect();
    names.sort();
    let local = "x-forwarded-for: 127.0.0.1";
    assert_eq!(names, ["host: cart.shop", local, "x-forwarded-proto: http", "x-mine: 2"]);
}

#[tokio::test]
async fn head_and_trailers_and_large_bodies_pass() {
    let app = App::start(own_ip(), 8080, |request| async move {
        if request.method() == Method::HEAD {
            return Response::builder().header("content-length", "7").body(full("")).unwrap();
        }
        let body = request.into_body().collect().await.unwrap();
        let trailer = body.trailers().map_or("none".to_owned(), |t| t["x-sum"].to_str().unwrap().to_owned());
        let size = body.to_bytes().len();
        let mut trailers = HeaderMap::new();
        trailers.insert("x-sum", HeaderValue::from_str(&format!("{size}/{trailer}")).unwrap());
        let data =
            futures::stream::iter([Ok(Frame::data(Bytes::from(vec![b'x'; size]))), Ok(Frame::trailers(trailers))]);
        Response::builder().header("trailer", "x-sum").body(StreamBody::new(data).boxed()).unwrap()
    })
    .await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(cluster("a", &[app.address]), 100)])).await;
    let mut client = Http1::connect(proxy.address).await;

    let mut head = get("/");
    *head.method_mut() = Method::HEAD;
    let answer = client.send(head).await.unwrap();
    assert_eq!((answer.header("content-length"), answer.body.as_str()), ("7", ""));

    let mut trailers = HeaderMap::new();
    trailers.insert("x-sum", HeaderValue::from_static("mine"));
    let frames =
        futures::stream::iter([Ok(Frame::data(Bytes::from(vec![b'x'; 1_000_000]))), Ok(Frame::trailers(trailers))]);
    let request = Request::post("/")
        .header("host", "a")
        .header("te", "trailers")
        .header("trailer", "x-sum")
        .body(StreamBody::new(frames).boxed())
        .unwrap();
    let answer = client.send(request).await.unwrap();
    assert_eq!(answer.body.len(), 1_000_000);
    assert_eq!(answer.trailers.unwrap()["x-sum"], "1000000/mine");
    assert_eq!(app.connections(), 1);
}

#[tokio::test]
async fn grpc_trailers_pass_both_roles_and_are_counted() {
    let ip = own_ip();
    let _app = App::start(ip, 8080, |request| async move {
        assert_eq!(request.version(), Version::HTTP_2);
        assert_eq!(request.headers()["te"], "trailers");
        let code = if request.uri().path() == "/fail" { "13" } else { "0" };
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static(code));
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let frames = futures::stream::iter([Ok(Frame::data(body)), Ok(Frame::trailers(trailers))]);
        Response::builder().header("content-type", "application/grpc").body(StreamBody::new(frames).boxed()).unwrap()
    })
    .await;
    let ca = Ca::new();
    let sidecar = sidecar(&ca, ip, false).await;
    let fleet = Proxy::with(Role::Fleet, ca.identity(FLEET), |_| {});
    fleet.serve(http_to([(mesh_cluster("abc", &[&sidecar]), 100)])).await;
    let mut client = Http2::connect(fleet.address).await;
    for (path, code) in [("/ok", "0"), ("/fail", "13"), ("/ok", "0")] {
        let answer = client.send(call(path)).await.unwrap();
        assert_eq!((answer.status, answer.body.as_str()), (StatusCode::OK, "message"));
        assert_eq!(answer.trailers.unwrap()["grpc-status"], code);
    }
    assert_eq!((fleet.counted("abc", "2xx", "OK"), fleet.counted("abc", "2xx", "INTERNAL")), (2, 1));
    assert_eq!(fleet.counted("abc", "2xx", ""), 0);
}

#[tokio::test]
async fn local_errors_have_status_flag_and_grpc_form() {
    let gone = std::net::SocketAddr::new(own_ip(), 9);
    let proxy = Proxy::start(Role::Fleet);
    let table = [
        (http_to([(cluster("a", &[]), 100)]), 503, "UH", "14"),
        (http_to([(cluster("a", &[gone]), 100)]), 503, "UF", "14"),
        (http_to([]), 404, "NR", "12"),
        (Protocol::http(Action::Respond(StatusCode::SERVICE_UNAVAILABLE)), 503, "DR", "14"),
    ];
    for (protocol, status, flag, grpc) in table {
        proxy.serve(protocol).await;
        let answer = Http1::connect(proxy.address).await.get("/").await;
        assert_eq!((answer.status.as_u16(), answer.header("x-sluice-response-flag")), (status, flag));
        let answer = Http2::connect(proxy.address).await.send(call("/")).await.unwrap();
        assert_eq!((answer.status, answer.header("grpc-status")), (StatusCode::OK, grpc));
        assert_eq!(answer.header("x-sluice-response-flag"), flag);
        let series = format!("sluice_local_errors_total{{listener=\"shop/cart:80\",flag=\"{flag}\"}}");
        assert_eq!(proxy.metric(&series), 2);
    }
    // A revision was drawn in the first two, and goes on counting.
    proxy.serve(http_to([(cluster("a", &[gone]), 100)])).await;
    Http1::connect(proxy.address).await.get("/").await;
    Http2::connect(proxy.address).await.send(call("/")).await.unwrap();
    assert_eq!((proxy.counted("a", "5xx", ""), proxy.counted("a", "2xx", "UNAVAILABLE")), (3, 3));
}

#[tokio::test]
async fn connect_and_ambiguous_requests_are_refused() {
    let app = App::named("a").await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(cluster("a", &[app.address]), 100)])).await;
    let table = [
        ("CONNECT a:80 HTTP/1.1\r\nhost: a:80\r\nconnection: close\r\n\r\n", "405"),
        ("GET / HTTP/1.1\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", "400"),
        ("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nhost : a\r\n\r\n", "400"),
    ];
    for (request, status) in table {
        let answer = raw(proxy.address, request).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{request:?} got {answer:?}");
    }
    for host in ["b", "a:80:90", "u@a"] {
        let request = Request::get("http://a/").header("host", host).body(full("")).unwrap();
        let answer = Http2::connect(proxy.address).await.send(request).await.unwrap();
        assert_eq!(
            (answer.status, answer.header("x-sluice-response-flag")),
            (StatusCode::BAD_REQUEST, "DPE"),
            "{host}"
        );
    }
    assert_eq!((proxy.refused("connect"), proxy.refused("host")), (1, 5));
    assert_eq!(app.requests(), 0);
    // RFC 9112, 6.3 would let the length be dropped; refused is what nobody can understand otherwise.
    let smuggling = "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n\
                     0\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n";
    let answer = raw(proxy.address, smuggling).await;
    assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("connection: close"), "{answer}");
    assert_eq!(app.requests(), 0);
    let answer = raw(proxy.address, "GET / HTTP/1.0\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.0 200") && answer.ends_with("\r\n\r\na"), "{answer}");
}

#[tokio::test]
async fn a_client_that_waits_for_100_continue_gets_it_when_an_upstream_takes_the_body() {
    let app = App::start(own_ip(), 8080, |request| async move {
        let body = request.into_body().collect().await.unwrap().to_bytes();
        Response::new(full(body))
    })
    .await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(cluster("a", &[app.address]), 100)])).await;
    let mut stream = TcpStream::connect(proxy.address).await.unwrap();
    let head = "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\nexpect: 100-continue\r\nconnection: close\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut interim = [0; 25];
    soon("100 Continue", stream.read_exact(&mut interim)).await.unwrap();
    assert_eq!(&interim, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"body").await.unwrap();
    let mut answer = String::new();
    soon("the answer", stream.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("body"), "{answer}");
}

#[tokio::test]
async fn websockets_pass_both_roles_with_half_close_and_are_not_counted() {
    let (ip, ca) = (own_ip(), Ca::new());
    let _app = websocket_echo(ip).await;
    let sidecar = sidecar(&ca, ip, false).await;
    let fleet = Proxy::with(Role::Fleet, ca.identity(FLEET), |_| {});
    fleet.serve(http_to([(mesh_cluster("abc", &[&sidecar]), 100)])).await;
    let mut stream = websocket(fleet.address).await;
    for _ in 0..3 {
        echoes(&mut stream).await;
    }
    assert_eq!(fleet.under_way("abc"), 0, "a tunnel is no request");
    // Our half is closed; the rest of theirs still comes.
    stream.shutdown().await.unwrap();
    let mut rest = String::new();
    soon("the end", stream.read_to_string(&mut rest)).await.unwrap();
    assert_eq!(rest, "bye");
    assert_eq!(fleet.counted("abc", "2xx", ""), 0);
    assert_eq!(fleet.metric("sluice_upgrades_total{listener=\"shop/cart:80\"}"), 1);
}

#[tokio::test]
async fn an_upgrade_that_the_application_declines_is_an_ordinary_answer() {
    let app = App::named("declined").await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(cluster("a", &[app.address]), 100)])).await;
    let mut client = Http1::connect(proxy.address).await;
    for _ in 0..2 {
        let mut request = get("/");
        request.headers_mut().insert("connection", HeaderValue::from_static("upgrade"));
        request.headers_mut().insert("upgrade", HeaderValue::from_static("websocket"));
        let answer = client.send(request).await.unwrap();
        assert_eq!((answer.status, answer.body.as_str()), (StatusCode::OK, "declined"));
    }
    assert_eq!(proxy.counted("a", "2xx", ""), 2);
}

#[tokio::test]
async fn a_client_that_gives_up_in_the_middle_of_an_answer_is_not_counted_against_the_revision() {
    let app = App::start(own_ip(), 8080, |_| async {
        let data = futures::stream::iter([Ok(Frame::data(Bytes::from("begin")))]);
        Response::new(StreamBody::new(futures::StreamExt::chain(data, futures::stream::pending())).boxed())
    })
    .await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(cluster("a", &[app.address]), 100)])).await;
    let mut client = Http1::connect(proxy.address).await;
    let mut response = client.start(get("/")).await.unwrap();
    soon("a first chunk", response.body_mut().frame()).await.unwrap().unwrap();
    assert_eq!(proxy.metric("sluice_requests_active{listener=\"shop/cart:80\"}"), 1);
    drop((response, client));
    eventually("the abort", || proxy.metric("sluice_client_aborts_total{listener=\"shop/cart:80\"}") == 1).await;
    eventually("the release", || proxy.metric("sluice_requests_active{listener=\"shop/cart:80\"}") == 0).await;
    for class in ["2xx", "3xx", "4xx", "5xx"] {
        assert_eq!(proxy.counted("a", class, ""), 0);
    }
    assert_eq!((proxy.measured("a"), proxy.outcomes("a", Duration::from_millis(1)).requests), (0, 0));
}

#[tokio::test]
async fn a_body_that_the_application_breaks_off_is_an_error_for_the_client_and_counts() {
    // Promises 10 bytes and closes after 5.
    let listener = tokio::net::TcpListener::bind((own_ip(), 8080)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.read_u8().await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello").await.unwrap();
        }
    });
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(cluster("a", &[address]), 100)])).await;
    assert!(Http1::connect(proxy.address).await.send(get("/")).await.is_err());
    eventually("the count", || proxy.counted("a", "5xx", "") == 1).await;
}

#[tokio::test]
async fn a_stream_that_nobody_reads_does_not_stall_its_neighbours() {
    let big = Arc::new(Mutex::new(Bytes::from(vec![b'x'; 8 * 1024 * 1024])));
    let app = App::start(own_ip(), 8080, move |request| {
        let big = big.lock().unwrap().clone();
        async move { Response::new(full(if request.uri().path() == "/big" { big } else { Bytes::from("small") })) }
    })
    .await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(cluster("a", &[app.address]), 100)])).await;
    let mut client = Http2::connect(proxy.address).await;
    let ask = |path: &str| Request::get(format!("http://cart.shop{path}")).body(full("")).unwrap();
    let mut stalled = client.start(ask("/big")).await.unwrap();
    // It has begun, and its window fills.
    soon("a first chunk", stalled.body_mut().frame()).await.unwrap().unwrap();
    for _ in 0..7 {
        let answer = client.send(ask("/small")).await.unwrap();
        assert_eq!(answer.body, "small");
    }
    assert!(!stalled.body().is_end_stream());
    let rest = soon("the rest", stalled.into_body().collect()).await.unwrap().to_bytes();
    assert!(rest.len() > 7 * 1024 * 1024);
    assert_eq!(app.connections(), 1);
}

#[tokio::test]
async fn a_half_sent_head_ends_its_connection_and_an_idle_one_stays() {
    let app = App::named("a").await;
    let proxy = Proxy::with(Role::Sidecar, Default::default(), |options| {
        options.timing.header = Duration::from_millis(100);
        options.timing.first_byte = Duration::from_millis(100);
    });
    proxy.serve(http_to([(cluster("a", &[app.address]), 100)])).await;
    let mut kept = Http1::connect(proxy.address).await;
    assert_eq!(kept.get("/").await.body, "a");
    let started = std::time::Instant::now();
    assert_eq!(raw(proxy.address, "GET / HTTP/1.1\r\nhost:").await, "");
    assert_eq!(raw(proxy.address, "").await, "");
    assert!(started.elapsed() >= Duration::from_millis(200));
    // Idle for longer than any of these times.
    assert_eq!(kept.get("/").await.body, "a");
}

#[tokio::test]
async fn the_access_log_says_what_was_served_and_why_not() {
    let (app, lines) = (App::named("a").await, Lines::default());
    let output = lines.clone();
    let proxy = Proxy::with(Role::Fleet, Default::default(), |options| {
        let log = sluice_proxy::access_log::AccessLog::start(options.metrics.clone(), output).unwrap();
        options.access_log = Some(log);
    });
    proxy.serve(http_to([(cluster("a", &[app.address]), 100)])).await;
    Http1::connect(proxy.address).await.get("/x?y=z").await;
    proxy.serve(http_to([(cluster("a", &[]), 100)])).await;
    Http1::connect(proxy.address).await.get("/").await;
    let entries = lines.wait_for(2).await;
    assert_eq!(entries[0]["path"], "/x?y=z");
    assert_eq!(
        (&entries[0]["status"], &entries[0]["attempts"], &entries[0]["response_bytes"]),
        (&200.into(), &1.into(), &1.into())
    );
    assert_eq!(entries[0]["upstream"], app.address.to_string());
    assert_eq!((&entries[1]["status"], &entries[1]["flag"]), (&503.into(), &"UH".into()));
    assert_eq!(entries[1]["cluster"], "shop/cart:80/a");
}

#[tokio::test]
async fn thousands_of_abandoned_streams_leave_nothing_behind() {
    let app = App::start(own_ip(), 8080, |request| async move {
        if request.uri().path() == "/held" {
            let data = futures::stream::iter([Ok(Frame::data(Bytes::from(vec![b'x'; 20_000])))]);
            let held = futures::StreamExt::chain(data, futures::stream::pending());
            return Response::new(StreamBody::new(held).boxed());
        }
        Response::new(full(vec![b'x'; 2_000_000]))
    })
    .await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(cluster("a", &[app.address]), 100)])).await;
    let ask = |path: &str| Request::get(format!("http://cart.shop{path}")).body(full("")).unwrap();
    let mut client = Http2::connect(proxy.address).await;
    for _ in 0..2000 {
        // Its data is on the way, unread, when it is given up.
        drop(client.start(ask("/held")).await.unwrap());
    }
    // Neither hop has lost any of its connection's window: more than that passes.
    let answer = client.send(ask("/")).await.unwrap();
    assert_eq!(answer.body.len(), 2_000_000);
    eventually("the release", || proxy.metric("sluice_requests_active{listener=\"shop/cart:80\"}") == 0).await;
    assert_eq!(proxy.metric("sluice_client_aborts_total{listener=\"shop/cart:80\"}"), 2000);
    assert_eq!(proxy.counted("a", "2xx", ""), 1);
}

#[tokio::test]
async fn a_burst_of_first_calls_opens_one_connection() {
    let app = App::start(own_ip(), 8080, |_| async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        Response::new(full("a"))
    })
    .await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(cluster("a", &[app.address]), 100)])).await;
    let client = Http2::connect(proxy.address).await;
    let calls = (0..50).map(|_| {
        let mut client = client.clone();
        async move { client.send(get("/")).await.unwrap().body }
    });
    assert!(futures::future::join_all(calls).await.iter().all(|body| body == "a"));
    assert_eq!((app.requests(), app.connections()), (50, 1));
}

#[tokio::test]
async fn a_client_that_gives_up_most_of_its_requests_at_once_is_cut_off() {
    let app = App::start(own_ip(), 8080, |request| async move {
        if request.uri().path() == "/never" {
            std::future::pending::<()>().await;
        }
        Response::new(full("a"))
    })
    .await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(cluster("a", &[app.address]), 100)])).await;
    let (mut bad, mut good) = (Http2::connect(proxy.address).await, Http2::connect(proxy.address).await);
    let cut_off = async {
        // Sent, and reset a moment later.
        while !matches!(tokio::time::timeout(Duration::from_millis(1), bad.start(get("/never"))).await, Ok(Err(_))) {
            assert_eq!(good.send(get("/")).await.unwrap().body, "a");
        }
    };
    soon("its end", cut_off).await;
    assert!(proxy.metric("sluice_client_aborts_total{listener=\"shop/cart:80\"}") >= 250);
    assert_eq!(soon("an answer", good.send(get("/"))).await.unwrap().body, "a");

    assert_eq!(proxy.refused("rapid_reset"), 1);

    // One that gives up fewer is served on.
    let mut patient = Http2::connect(proxy.address).await;
    for _ in 0..400 {
        let _ = tokio::time::timeout(Duration::from_millis(1), patient.start(get("/never"))).await;
        assert_eq!(patient.send(get("/")).await.unwrap().body, "a");
        assert_eq!(patient.send(get("/")).await.unwrap().body, "a");
    }
}
