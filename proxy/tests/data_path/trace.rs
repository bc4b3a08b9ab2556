//! Spans, and what an application and a collector see of them.

use std::{net::SocketAddr, num::NonZeroUsize, path::PathBuf, sync::Arc, time::Duration};

use http::{HeaderValue, Response, StatusCode};
use opentelemetry_proto::tonic::trace::v1::{span::SpanKind, status::StatusCode as SpanStatus};
use rcgen::SanType;
use rustls::ServerConfig;
use sluice_proxy::{
    access_log::AccessLog,
    trace::{self, Tracer},
    workers::{Options, Role},
};
use tokio_rustls::TlsAcceptor;

use crate::{
    collector::{Collector, attribute, hex},
    support::{
        App, Ca, Http1, Http2, Lines, PATIENCE, Proxy, Seen, call, cluster, eventually, full, get, http_to, own_ip,
        soon,
    },
};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const SPAN: &str = "00f067aa0ba902b7";

fn tracing(endpoint: &str, ratio: f64) -> trace::Options {
    trace::Options {
        endpoint: endpoint.parse().unwrap(),
        certificate: PathBuf::new(),
        ratio,
        queue: NonZeroUsize::new(2048).unwrap(),
        delay: Some(Duration::from_millis(10)),
        service_name: "sluice-fleet".into(),
        pod: "sluice-fleet-0".into(),
        namespace: "sluice-system".into(),
    }
}

fn traced(options: &mut Options, collector: SocketAddr, ratio: f64) {
    let tracing = tracing(&format!("http://{collector}"), ratio);
    options.tracer = Some(Tracer::start(&tracing, options.metrics.clone()).unwrap());
}

/// A collector, a fleet that samples so, and an application that notes what it gets.
async fn scene(ratio: f64) -> (Collector, Proxy, Seen, App) {
    let collector = Collector::start(SocketAddr::new(own_ip(), 0), None).await;
    let proxy = Proxy::with(Role::Fleet, Default::default(), |options| traced(options, collector.address, ratio));
    let (seen, app) = noting().await;
    proxy.serve(http_to([(cluster("abc", &[app.address]), 100)])).await;
    (collector, proxy, seen, app)
}

async fn noting() -> (Seen, App) {
    let seen = Seen::default();
    let note = seen.clone();
    let app = App::start(own_ip(), 8080, move |request| {
        note.lock().unwrap().push(request.headers().clone());
        async { Response::new(full("a")) }
    })
    .await;
    (seen, app)
}

/// What the application got of the trace, of one request with these headers.
async fn passed(proxy: &Proxy, seen: &Seen, headers: &[(&'static str, &str)]) -> Vec<String> {
    let mut request = get("/");
    for (name, value) in headers {
        request.headers_mut().append(*name, HeaderValue::from_str(value).unwrap());
    }
    assert_eq!(Http1::connect(proxy.address).await.send(request).await.unwrap().status, StatusCode::OK);
    let headers = seen.lock().unwrap().pop().unwrap();
    let of_trace = |name: &str| name.starts_with("trace") || name == "b3" || name.starts_with("x-b3");
    let lines = headers.iter().filter(|(name, _)| of_trace(name.as_str()));
    let mut lines: Vec<_> = lines.map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
    lines.sort();
    lines
}

#[tokio::test]
async fn a_request_has_one_span_that_says_what_was_served() {
    let (collector, proxy, seen, app) = scene(1.0).await;
    let mut request = get("/cart?item=3&sig=secret");
    request.headers_mut().insert("user-agent", HeaderValue::from_static("curl/8"));
    request.headers_mut().insert("host", HeaderValue::from_static("cart.shop:8080"));
    Http1::connect(proxy.address).await.send(request).await.unwrap();
    let [span] = &collector.wait_for(1).await[..] else { panic!("more than one span") };

    assert_eq!((span.name.as_str(), span.kind), ("GET", SpanKind::Server as i32));
    assert!(span.parent_span_id.is_empty() && span.start_time_unix_nano <= span.end_time_unix_nano);
    assert_eq!(span.status.as_ref().map_or(0, |status| status.code), SpanStatus::Unset as i32);
    let upstream = seen.lock().unwrap()[0]["traceparent"].to_str().unwrap().to_owned();
    assert_eq!(upstream, format!("00-{}-{}-01", hex(&span.trace_id), hex(&span.span_id)));
    let table = [
        ("http.request.method", "GET"),
        ("url.scheme", "http"),
        ("url.path", "/cart"),
        ("url.query", "item=3&sig=REDACTED"),
        ("server.address", "cart.shop"),
        ("server.port", "8080"),
        ("network.protocol.version", "1.1"),
        ("client.address", "127.0.0.1"),
        ("user_agent.original", "curl/8"),
        ("http.response.status_code", "200"),
        ("error.type", ""),
        ("sluice.cluster", "shop/cart:80/abc"),
        ("sluice.destination.namespace", "shop"),
        ("sluice.destination.service", "cart"),
        ("sluice.destination.revision", "abc"),
        ("sluice.attempts", "1"),
        ("sluice.response_flag", ""),
    ];
    for (name, expected) in table {
        assert_eq!(attribute(&span.attributes, name), expected, "{name}");
    }
    assert_eq!(attribute(&span.attributes, "sluice.upstream.address"), app.address.to_string());
    let resource = collector.resource();
    for (name, expected) in [
        ("service.name", "sluice-fleet"),
        ("service.version", env!("CARGO_PKG_VERSION")),
        ("k8s.pod.name", "sluice-fleet-0"),
        ("k8s.namespace.name", "sluice-system"),
    ] {
        assert_eq!(attribute(&resource, name), expected, "{name}");
    }
    eventually("the count", || proxy.metric("sluice_spans_exported_total") == 1).await;
}

#[tokio::test]
async fn a_caller_that_samples_is_the_parent() {
    // Whatever the ratio.
    let (collector, proxy, seen, _app) = scene(0.0).await;
    let parent = format!("00-{TRACE}-{SPAN}-01");
    let lines = passed(&proxy, &seen, &[("traceparent", &parent), ("tracestate", "congo=t61rcWkgMzE")]).await;
    let [span] = &collector.wait_for(1).await[..] else { panic!("more than one span") };
    assert_eq!((hex(&span.trace_id), hex(&span.parent_span_id)), (TRACE.to_owned(), SPAN.to_owned()));
    assert_eq!(span.trace_state, "congo=t61rcWkgMzE");
    let ours = hex(&span.span_id);
    assert_eq!(lines, [format!("traceparent: 00-{TRACE}-{ours}-01"), "tracestate: congo=t61rcWkgMzE".to_owned()]);
}

#[tokio::test]
async fn what_the_caller_does_not_sample_passes_as_it_came() {
    let (collector, proxy, seen, _app) = scene(1.0).await;
    let parent = format!("00-{TRACE}-{SPAN}-00");
    let unsampled = [("traceparent", parent.as_str()), ("tracestate", "a=1"), ("b3", "0")];
    let expected = ["b3: 0".to_owned(), format!("traceparent: {parent}"), "tracestate: a=1".to_owned()];
    assert_eq!(passed(&proxy, &seen, &unsampled).await, expected);
    assert_eq!(passed(&proxy, &seen, &[("b3", "0")]).await, ["b3: 0"]);
    let several = [("x-b3-sampled", "0"), ("x-b3-spanid", SPAN), ("x-b3-traceid", TRACE)];
    let expected = several.map(|(name, value)| format!("{name}: {value}"));
    assert_eq!(passed(&proxy, &seen, &several).await, expected);
    // Spans come in order: one that comes later is the only one.
    passed(&proxy, &seen, &[]).await;
    let spans = collector.wait_for(1).await;
    assert!(spans.len() == 1 && spans[0].parent_span_id.is_empty());
}

#[tokio::test]
async fn an_application_that_speaks_b3_joins() {
    let (collector, proxy, seen, _app) = scene(1.0).await;
    let lines = passed(&proxy, &seen, &[("b3", &format!("{TRACE}-{SPAN}-1"))]).await;
    let span = collector.wait_for(1).await[0].clone();
    assert_eq!((hex(&span.trace_id), hex(&span.parent_span_id)), (TRACE.to_owned(), SPAN.to_owned()));
    let ours = hex(&span.span_id);
    assert_eq!(lines, [format!("b3: {TRACE}-{ours}-1-{SPAN}"), format!("traceparent: 00-{TRACE}-{ours}-01")]);

    // Nobody has decided on this one.
    let lines = passed(&proxy, &seen, &[("x-b3-traceid", &TRACE[16..]), ("x-b3-spanid", SPAN)]).await;
    let span = collector.wait_for(2).await[1].clone();
    assert_eq!(hex(&span.trace_id), format!("0000000000000000{}", &TRACE[16..]));
    let ours = hex(&span.span_id);
    assert!(lines.contains(&format!("x-b3-spanid: {ours}")), "{lines:?}");
    assert!(lines.contains(&format!("x-b3-parentspanid: {SPAN}")), "{lines:?}");
    assert!(lines.contains(&"x-b3-sampled: 1".to_owned()), "{lines:?}");
}

#[tokio::test]
async fn a_trace_that_is_not_drawn_is_begun_all_the_same() {
    let (collector, proxy, seen, _app) = scene(0.0).await;
    let first = passed(&proxy, &seen, &[]).await;
    let second = passed(&proxy, &seen, &[("traceparent", "00-nonsense-01"), ("tracestate", "a=1")]).await;
    for lines in [&first, &second] {
        assert!(lines.len() == 1 && lines[0].starts_with("traceparent: 00-") && lines[0].ends_with("-00"), "{lines:?}");
    }
    assert_ne!(first, second);
    // Decided by us, and said so in the caller's words.
    let deferred = passed(&proxy, &seen, &[("b3", &format!("{TRACE}-{SPAN}"))]).await;
    assert_eq!(deferred, [format!("b3: {TRACE}-{SPAN}-0"), format!("traceparent: 00-{TRACE}-{SPAN}-00")]);
    passed(&proxy, &seen, &[("b3", "1")]).await;
    assert_eq!(collector.wait_for(1).await.len(), 1);
}

#[tokio::test]
async fn a_fleet_without_tracing_leaves_the_context_alone() {
    let proxy = Proxy::start(Role::Fleet);
    let (seen, app) = noting().await;
    proxy.serve(http_to([(cluster("abc", &[app.address]), 100)])).await;
    assert_eq!(passed(&proxy, &seen, &[("traceparent", "x"), ("b3", "y")]).await, ["b3: y", "traceparent: x"]);
    assert!(passed(&proxy, &seen, &[]).await.is_empty());
}

#[tokio::test]
async fn what_went_wrong_is_on_the_span() {
    let (collector, proxy, _seen, _app) = scene(1.0).await;
    proxy.serve(http_to([(cluster("abc", &[]), 100)])).await;
    Http1::connect(proxy.address).await.get("/").await;
    let span = collector.wait_for(1).await[0].clone();
    assert_eq!(span.status.unwrap().code, SpanStatus::Error as i32);
    let said = |name: &str| attribute(&span.attributes, name);
    assert_eq!((said("error.type"), said("sluice.response_flag")), ("503".to_owned(), "UH".to_owned()));
    assert_eq!((said("http.response.status_code"), said("sluice.attempts")), ("503".to_owned(), "0".to_owned()));

    let failing = App::start(own_ip(), 8080, |_| async {
        let headers = [("content-type", "application/grpc"), ("grpc-status", "14")];
        let mut answer = Response::new(full(""));
        for (name, value) in headers {
            answer.headers_mut().insert(name, HeaderValue::from_static(value));
        }
        answer
    })
    .await;
    proxy.serve(http_to([(cluster("abc", &[failing.address]), 100)])).await;
    Http2::connect(proxy.address).await.send(call("/shop.Cart/Add")).await.unwrap();
    let span = collector.wait_for(2).await[1].clone();
    let said = |name: &str| attribute(&span.attributes, name);
    assert_eq!((span.name.as_str(), said("http.response.status_code").as_str()), ("POST", "200"));
    assert_eq!((said("rpc.system.name"), said("rpc.method")), ("grpc".to_owned(), "shop.Cart/Add".to_owned()));
    assert_eq!((said("error.type"), said("network.protocol.version")), ("UNAVAILABLE".to_owned(), "2".to_owned()));
    assert_eq!(span.status.unwrap().code, SpanStatus::Error as i32);

    let silent = App::start(own_ip(), 8080, |_| std::future::pending()).await;
    proxy.serve(http_to([(cluster("abc", &[silent.address]), 100)])).await;
    let mut client = Http1::connect(proxy.address).await;
    let asking = tokio::spawn(async move { client.send(get("/")).await.map(|answer| answer.status) });
    eventually("the request", || silent.requests() == 1).await;
    asking.abort();
    let span = collector.wait_for(3).await[2].clone();
    let said = |name: &str| attribute(&span.attributes, name);
    assert_eq!((said("error.type"), said("http.response.status_code")), ("DC".to_owned(), String::new()));
}

#[tokio::test]
async fn a_method_that_nobody_knows_becomes_no_name() {
    let (collector, proxy, _seen, _app) = scene(1.0).await;
    let mut request = get("/");
    *request.method_mut() = "BREW".parse().unwrap();
    Http1::connect(proxy.address).await.send(request).await.unwrap();
    let span = collector.wait_for(1).await[0].clone();
    assert_eq!((span.name.as_str(), attribute(&span.attributes, "http.request.method").as_str()), ("HTTP", "_OTHER"));
    assert_eq!(attribute(&span.attributes, "http.request.method_original"), "BREW");
}

#[tokio::test]
async fn requests_go_on_without_the_collector_and_what_is_too_much_is_dropped() {
    let address = SocketAddr::new(own_ip(), 4317);
    let queue = 4;
    let proxy = Proxy::with(Role::Fleet, Default::default(), |options| {
        let tracing =
            trace::Options { queue: NonZeroUsize::new(queue).unwrap(), ..tracing(&format!("http://{address}"), 1.0) };
        options.tracer = Some(Tracer::start(&tracing, options.metrics.clone()).unwrap());
    });
    let app = App::named("a").await;
    proxy.serve(http_to([(cluster("abc", &[app.address]), 100)])).await;
    let mut client = Http1::connect(proxy.address).await;
    let (full, failed) =
        ("sluice_spans_dropped_total{reason=\"queue_full\"}", "sluice_spans_dropped_total{reason=\"export_failed\"}");
    let mut sent = 0;
    soon("a full queue and a failed export", async {
        while proxy.metric(full) == 0 || proxy.metric(failed) == 0 {
            assert_eq!(client.get("/").await.body, "a");
            sent += 1;
        }
    })
    .await;
    // No more wait than may, beside one batch that is being sent.
    let waiting = sent - proxy.metric(full) - proxy.metric(failed);
    assert!(waiting <= 2 * queue as u64, "{waiting}");

    let collector = Collector::start(address, None).await;
    soon("spans are taken again", async {
        while proxy.metric("sluice_spans_exported_total") == 0 {
            client.get("/").await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert!(!collector.spans().is_empty());
}

#[tokio::test]
async fn spans_that_wait_are_sent_when_the_process_ends() {
    let collector = Collector::start(SocketAddr::new(own_ip(), 0), None).await;
    let mut tracer = None;
    let proxy = Proxy::with(Role::Fleet, Default::default(), |options| {
        let tracing =
            trace::Options { delay: Some(PATIENCE * 10), ..tracing(&format!("http://{}", collector.address), 1.0) };
        tracer = Some(Tracer::start(&tracing, options.metrics.clone()).unwrap());
        options.tracer.clone_from(&tracer);
    });
    let app = App::named("a").await;
    proxy.serve(http_to([(cluster("abc", &[app.address]), 100)])).await;
    Http1::connect(proxy.address).await.get("/").await;
    drop(proxy);
    let tracer = tracer.unwrap();
    soon("the end", tokio::task::spawn_blocking(move || tracer.shutdown(PATIENCE))).await.unwrap();
    assert_eq!(collector.spans().len(), 1);
}

#[tokio::test]
async fn a_collector_with_tls_is_believed_by_the_certificates_that_are_named() {
    let ip = own_ip();
    let ca = Ca::new();
    let (chain, key) =
        ca.issue("spiffe://test/collector", |params| params.subject_alt_names = vec![SanType::IpAddress(ip)]);
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let mut config = builder.with_no_client_auth().with_single_cert(chain, key).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let collector = Collector::start(SocketAddr::new(ip, 0), Some(TlsAcceptor::from(Arc::new(config)))).await;

    let app = App::named("a").await;
    let directory = std::env::temp_dir().join(format!("sluice-trace-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let fleet = |certificate: &str, roots: &Ca| {
        let certificate = directory.join(certificate);
        std::fs::write(&certificate, roots.root_pem()).unwrap();
        let tracing = trace::Options { certificate, ..tracing(&format!("https://{}", collector.address), 1.0) };
        Proxy::with(Role::Fleet, Default::default(), |options| {
            options.tracer = Some(Tracer::start(&tracing, options.metrics.clone()).unwrap());
        })
    };
    let believes = fleet("right.crt", &ca);
    believes.serve(http_to([(cluster("abc", &[app.address]), 100)])).await;
    Http1::connect(believes.address).await.get("/").await;
    assert_eq!(collector.wait_for(1).await.len(), 1);

    let doubts = fleet("wrong.crt", &Ca::new());
    doubts.serve(http_to([(cluster("abc", &[app.address]), 100)])).await;
    Http1::connect(doubts.address).await.get("/").await;
    let failed = "sluice_spans_dropped_total{reason=\"export_failed\"}";
    eventually("the refusal", || doubts.metric(failed) == 1).await;
    assert_eq!(collector.spans().len(), 1);
    std::fs::remove_dir_all(&directory).unwrap();
}

#[tokio::test]
async fn the_access_log_names_the_trace() {
    let collector = Collector::start(SocketAddr::new(own_ip(), 0), None).await;
    let lines = Lines::default();
    let output = lines.clone();
    let proxy = Proxy::with(Role::Fleet, Default::default(), |options| {
        traced(options, collector.address, 0.0);
        options.access_log = Some(AccessLog::start(options.metrics.clone(), output).unwrap());
    });
    let (seen, app) = noting().await;
    proxy.serve(http_to([(cluster("abc", &[app.address]), 100)])).await;
    // Recorded or not.
    passed(&proxy, &seen, &[("traceparent", &format!("00-{TRACE}-{SPAN}-01"))]).await;
    passed(&proxy, &seen, &[("traceparent", &format!("00-{TRACE}-{SPAN}-00"))]).await;
    passed(&proxy, &seen, &[("b3", "0")]).await;
    let entries = lines.wait_for(3).await;
    assert_eq!((&entries[0]["trace_id"], &entries[1]["trace_id"]), (&TRACE.into(), &TRACE.into()));
    assert!(entries[2].get("trace_id").is_none());
}

#[tokio::test]
async fn what_a_client_makes_long_is_cut_in_lines_and_spans_and_goes_on_whole() {
    let collector = Collector::start(SocketAddr::new(own_ip(), 0), None).await;
    let lines = Lines::default();
    let output = lines.clone();
    let proxy = Proxy::with(Role::Fleet, Default::default(), |options| {
        traced(options, collector.address, 1.0);
        options.access_log = Some(AccessLog::start(options.metrics.clone(), output).unwrap());
    });
    let (seen, app) = noting().await;
    proxy.serve(http_to([(cluster("abc", &[app.address]), 100)])).await;

    let long = "x".repeat(60 << 10);
    let with = |name: &'static str| {
        let mut request = get("/");
        request.headers_mut().insert(name, HeaderValue::from_str(&long).unwrap());
        request
    };
    let target = get(&format!("/{}?{}", &long[..15 << 10], &long[..15 << 10]));
    let mut method = get("/");
    *method.method_mut() = long[..30 << 10].parse().unwrap();
    // On one connection, so that lines and spans are in order.
    let mut client = Http1::connect(proxy.address).await;
    for request in [with("user-agent"), with("host"), target, method] {
        assert_eq!(client.send(request).await.unwrap().status, StatusCode::OK);
    }
    collector.wait_for(4).await;
    let path = format!("/{}", &long[..10 << 10]);
    assert_eq!(Http2::connect(proxy.address).await.send(call(&path)).await.unwrap().status, StatusCode::OK);
    assert_eq!(seen.lock().unwrap()[0]["user-agent"].len(), long.len());

    let (entries, spans) = (lines.wait_for(5).await, collector.wait_for(5).await);
    let is_cut = |text: &str| (1021..=1024).contains(&text.len()) && text.ends_with('…');
    let table: [(&str, &[&str]); 5] = [
        ("user_agent", &["user_agent.original"]),
        ("authority", &["server.address"]),
        ("path", &["url.path", "url.query"]),
        ("method", &["http.request.method_original"]),
        ("path", &["url.path", "rpc.method"]),
    ];
    for ((entry, span), (field, attributes)) in entries.iter().zip(&spans).zip(table) {
        let said = entry[field].as_str().unwrap();
        assert!(is_cut(said), "{field}: {} bytes", said.len());
        for name in attributes {
            let said = attribute(&span.attributes, name);
            assert!(is_cut(&said), "{name}: {} bytes", said.len());
        }
    }
}

#[tokio::test]
async fn a_tracestate_that_is_too_long_for_a_span_goes_on_as_it_came() {
    let (collector, proxy, seen, _app) = scene(1.0).await;
    let parent = format!("00-{TRACE}-{SPAN}-01");
    let member = |number: usize| format!("k{number}={}", "x".repeat(125));
    let state = |members: usize| (0..members).map(member).collect::<Vec<_>>().join(",");
    let (short, long) = (state(7), state(9));
    for state in [&short, &long] {
        let lines = passed(&proxy, &seen, &[("traceparent", &parent), ("tracestate", state)]).await;
        assert_eq!(lines[1], format!("tracestate: {state}"));
    }
    let spans = collector.wait_for(2).await;
    let mut states: Vec<_> = spans.iter().map(|span| span.trace_state.as_str()).collect();
    states.sort_unstable();
    assert_eq!(states, ["", &short]);
}
