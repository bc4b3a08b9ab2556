//! Requests that their clients give up before they are answered: whoever let them wait looks no faster for it.

use std::{future, time::Duration};

use http::{Request, Response};
use sluice_proxy::workers::Role;
use sluice_xds::sluice::guard::v1::Outcomes;
use tokio::{io::AsyncWriteExt, net::TcpStream, time::sleep};

use crate::{
    frames::{self, DATA, END_HEADERS, HEADERS, POST, RST_STREAM, frame},
    support::*,
};

const ABORTS: &str = "sluice_client_aborts_total{listener=\"shop/cart:80\"}";
const ACTIVE: &str = "sluice_requests_active{listener=\"shop/cart:80\"}";
/// So long clients wait, and what is slow: a bound of the histogram below it.
const WAIT: Duration = Duration::from_millis(80);
const SLOW: Duration = Duration::from_millis(50);

/// Hangs, but for `/answered`.
async fn hanging() -> (App, Proxy) {
    let app = App::start(own_ip(), 8080, |request| async move {
        if request.uri().path() != "/answered" {
            future::pending::<()>().await;
        }
        Response::new(full("answered"))
    })
    .await;
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(cluster("a", &[app.address]), 100)])).await;
    (app, proxy)
}

/// The application has so many requests, and their clients have waited.
async fn waited_for(app: &App, requests: usize) {
    eventually("the request", || app.requests() == requests).await;
    // What is tested is that this time counts.
    sleep(WAIT).await;
}

async fn given_up(proxy: &Proxy, requests: u64) {
    let now = || (proxy.metric(ABORTS), proxy.metric(ACTIVE), proxy.under_way("a"));
    eventually("the abort", || now() == (requests, 0, 0)).await;
}

/// Requests that ended well or badly.
fn with_a_class(proxy: &Proxy) -> u64 {
    let text = proxy.metrics.render();
    let series = text.lines().filter(|line| line.starts_with("sluice_requests_total{"));
    series.map(|line| line.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap()).sum()
}

#[tokio::test]
async fn a_request_that_is_given_up_unanswered_is_measured_and_has_ended_neither_well_nor_badly() {
    let (app, proxy) = hanging().await;
    let asked = ["GET / HTTP/1.1\r\nhost: a\r\n\r\n", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nwhole"];
    for (before, asked) in asked.into_iter().enumerate() {
        let mut client = TcpStream::connect(proxy.address).await.unwrap();
        client.write_all(asked.as_bytes()).await.unwrap();
        waited_for(&app, before + 1).await;
        assert_eq!(proxy.under_way("a"), 1);
        drop(client);
        given_up(&proxy, before as u64 + 1).await;
    }
    let mut client = Http2::connect(proxy.address).await;
    let plain = Request::get("http://cart.shop/").body(full("")).unwrap();
    for (before, asked) in (2..).zip([plain, call("/")]) {
        let mut client = client.clone();
        let waiting = tokio::spawn(async move { client.start(asked).await.map(drop) });
        waited_for(&app, before + 1).await;
        // As at its deadline: the stream alone is reset.
        waiting.abort();
        given_up(&proxy, before as u64 + 1).await;
    }
    assert_eq!((proxy.measured("a"), with_a_class(&proxy)), (4, 0));
    assert_eq!(proxy.outcomes("a", SLOW), Outcomes { requests: 4, bad: 0, slow: 4 });
    assert_eq!(proxy.outcomes("a", Duration::from_secs(60)).slow, 0);

    // What is answered is counted once, as ever.
    let answer = client.send(Request::get("http://cart.shop/answered").body(full("")).unwrap()).await.unwrap();
    assert_eq!(answer.body, "answered");
    assert_eq!((proxy.measured("a"), with_a_class(&proxy), proxy.counted("a", "2xx", "")), (5, 1, 1));
    assert_eq!((proxy.outcomes("a", SLOW).requests, proxy.under_way("a")), (5, 0));
}

#[tokio::test]
async fn a_request_that_its_client_has_not_sent_to_its_end_is_measured_for_nobody() {
    let (app, proxy) = hanging().await;
    let framings = ["content-length: 10\r\n\r\nhalf", "transfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n"];
    for (before, framing) in framings.into_iter().enumerate() {
        let mut client = TcpStream::connect(proxy.address).await.unwrap();
        client.write_all(format!("POST / HTTP/1.1\r\nhost: a\r\n{framing}").as_bytes()).await.unwrap();
        waited_for(&app, before + 1).await;
        drop(client);
        given_up(&proxy, before as u64 + 1).await;
    }
    let (_read, mut write) = frames::connect(&proxy).await;
    write.write_all(&frame(HEADERS, END_HEADERS, 1, POST)).await.unwrap();
    write.write_all(&frame(DATA, 0, 1, b"half")).await.unwrap();
    waited_for(&app, 3).await;
    // CANCEL.
    write.write_all(&frame(RST_STREAM, 0, 1, &8_u32.to_be_bytes())).await.unwrap();
    given_up(&proxy, 3).await;
    assert_eq!((proxy.measured("a"), with_a_class(&proxy)), (0, 0));
    assert_eq!(proxy.outcomes("a", SLOW), Outcomes::default());
}

#[tokio::test]
async fn what_is_cut_when_a_drain_is_over_was_not_given_up_by_its_client() {
    let (app, proxy) = hanging().await;
    let mut http1 = TcpStream::connect(proxy.address).await.unwrap();
    http1.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let mut http2 = Http2::connect(proxy.address).await;
    let waiting = tokio::spawn(async move { http2.start(call("/")).await.map(drop) });
    waited_for(&app, 2).await;
    assert_eq!(soon("the end of the drain", proxy.workers.drain(WAIT)).await.unwrap().cut, 2);
    assert!(soon("the end of the stream", waiting).await.unwrap().is_err());
    eventually("the end of the requests", || proxy.metric(ACTIVE) == 0).await;
    assert_eq!((proxy.measured("a"), proxy.outcomes("a", SLOW)), (0, Outcomes::default()));
}
