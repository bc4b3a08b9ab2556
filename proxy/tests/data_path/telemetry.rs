//! What a client sends makes neither lines that nobody wants, nor series.

use std::collections::BTreeSet;

use http::{HeaderValue, Method, Response};
use sluice_proxy::{access_log::AccessLog, workers::Role};

use crate::support::{App, Http1, Http2, Lines, Proxy, call, cluster, eventually, full, get, http_to, own_ip};

#[tokio::test]
async fn the_access_log_has_lines_for_what_its_filter_wants() {
    let app = App::start(own_ip(), 8080, |request| async move {
        let mut answer = Response::new(full("a"));
        let status = request.uri().path().trim_start_matches('/').parse::<u16>();
        *answer.status_mut() = status.unwrap_or(200).try_into().unwrap();
        answer
    })
    .await;
    let lines = Lines::default();
    let output = lines.clone();
    let proxy = Proxy::with(Role::Fleet, Default::default(), |options| {
        let log = AccessLog::start(options.metrics.clone(), output).unwrap();
        let filter = r#"[{"minStatus": 500}, {"responseFlags": ["NR", "UH"]}]"#.parse().unwrap();
        options.access_log = Some(log.filtered(filter));
    });
    proxy.serve(http_to([(cluster("a", &[app.address]), 100)])).await;
    let mut client = Http1::connect(proxy.address).await;
    for path in ["/200", "/404", "/500", "/302", "/503"] {
        client.get(path).await;
    }
    proxy.serve(http_to([(cluster("a", &[]), 100)])).await;
    // 200 to the client: the flag says that it failed.
    Http2::connect(proxy.address).await.send(call("/a.B/C")).await.unwrap();
    // Lines come in order, from one thread each.
    let entries = lines.wait_for(3).await;
    let mut seen: Vec<_> = entries.iter().map(|entry| (entry["path"].clone(), entry["status"].clone())).collect();
    seen.sort_by_key(|(path, _)| path.to_string());
    let expected = [("/500", 500), ("/503", 503), ("/a.B/C", 200)];
    assert_eq!(seen, expected.map(|(path, status)| (path.into(), status.into())));
}

/// Names and labels of all series.
fn series(proxy: &Proxy) -> BTreeSet<String> {
    let text = proxy.metrics.render();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.map(|line| line.rsplit_once(' ').unwrap().0.to_owned()).collect()
}

#[tokio::test]
async fn nothing_that_a_client_or_an_application_says_becomes_a_series_without_a_bound() {
    let app = App::start(own_ip(), 8080, |request| async move {
        let mut answer = Response::new(full("a"));
        for (from, to) in [("x-status", "grpc-status"), ("x-flag", "x-sluice-response-flag")] {
            if let Some(value) = request.headers().get(from) {
                answer.headers_mut().insert(to, value.clone());
            }
        }
        let code = request.headers().get("x-code").and_then(|code| code.to_str().ok()?.parse::<u16>().ok());
        *answer.status_mut() = code.unwrap_or(200).try_into().unwrap();
        answer
    })
    .await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(cluster("a", &[app.address]), 100)])).await;
    let mut calls = Http2::connect(proxy.address).await;
    eventually("its connection", || proxy.metric("sluice_connections_total{listener=\"shop/cart:80\"}") == 1).await;
    let before = series(&proxy);

    let mut all = BTreeSet::new();
    for round in 0..3 {
        let mut client = Http1::connect(proxy.address).await;
        for number in 0..40 {
            let unique = format!("{round}-{number}");
            let mut request = get(&format!("/{unique}?{unique}=%22"));
            *request.method_mut() = Method::from_bytes(format!("M{unique}").as_bytes()).unwrap();
            let headers = request.headers_mut();
            let value = |text: &str| HeaderValue::from_str(text).unwrap();
            headers.insert("host", value(&format!("h{unique}.example")));
            headers.insert("user-agent", value(&format!("\"}} 1\\n{unique}")));
            headers.insert("x-forwarded-for", value(&unique));
            headers.insert("x-flag", value(&format!("F{unique}")));
            headers.insert("x-code", value(&(200 + round * 100 + number).to_string()));
            headers.insert("traceparent", value(&unique));
            client.send(request).await.unwrap();

            let mut request = call(&format!("/s{unique}.S/M{unique}"));
            request.headers_mut().insert("x-status", value(&(number * (round * 10_000 + 1)).to_string()));
            calls.send(request).await.unwrap();
        }
        let now = series(&proxy);
        // From the second round on there is nothing new to be seen.
        assert!(round == 0 || now == all, "{:?}", now.difference(&all).collect::<Vec<_>>());
        all = now;
    }
    let new: Vec<_> = all.difference(&before).collect();
    // The other gRPC codes of answers with 200, each once.
    assert_eq!(new.len(), 17, "{new:?}");
    assert!(new.iter().all(|series| series.starts_with("sluice_requests_total{") && series.contains("grpc_status=\"")));
}
