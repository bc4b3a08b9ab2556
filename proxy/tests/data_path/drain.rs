use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use sluice_proxy::{snapshot::Protocol, workers::Role};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};

use crate::support::*;

/// An application whose answers end when the test says so.
async fn held() -> (App, mpsc::Sender<Bytes>) {
    let (frames, source) = mpsc::channel::<Bytes>(16);
    let source = Arc::new(Mutex::new(Some(source)));
    let app = App::start(own_ip(), 8080, move |request| {
        let source = if request.uri().path() == "/held" { source.lock().unwrap().take() } else { None };
        async move {
            match source {
                Some(mut source) => {
                    let frames = futures::stream::poll_fn(move |cx| source.poll_recv(cx));
                    let frames = futures::StreamExt::map(frames, |data| Ok(Frame::data(data)));
                    Response::new(StreamBody::new(frames).boxed())
                }
                None => Response::new(full("quick")),
            }
        }
    })
    .await;
    (app, frames)
}

#[tokio::test]
async fn a_drain_ends_idle_and_busy_connections_and_loses_no_request() {
    let (app, frames) = held().await;
    let proxy = Proxy::with(Role::Fleet, Default::default(), |options| {
        options.timing.drain_idle = Some(Duration::from_millis(300));
    });
    proxy.serve(http_to([(cluster("a", &[app.address]), 100)])).await;
    let (mut busy, mut kept) = (Http1::connect(proxy.address).await, Http1::connect(proxy.address).await);
    let (mut idle, mut shared) = (Http1::connect(proxy.address).await, Http2::connect(proxy.address).await);
    for client in [&mut kept, &mut idle] {
        assert_eq!(client.get("/").await.header("connection"), "");
    }
    let ask = || Request::get("http://a/").body(full("")).unwrap();
    assert_eq!(shared.send(ask()).await.unwrap().body, "quick");
    frames.try_send("begin".into()).unwrap();
    let mut response = busy.start(get("/held")).await.unwrap();
    soon("a first chunk", response.body_mut().frame()).await.unwrap().unwrap();

    let client = async {
        // Draining has begun when the socket is closed.
        eventually("the close of the socket", || std::net::TcpStream::connect(proxy.address).is_err()).await;
        // A kept connection is served once more, and told.
        let answer = kept.get("/").await;
        assert_eq!((answer.body.as_str(), answer.header("connection")), ("quick", "close"));
        // The idle one and the shared one are closed without having asked again.
        eventually("the close of the others", || idle.0.is_closed() && shared.0.is_closed()).await;
        // The busy one ends in its own time.
        assert!(!busy.0.is_closed());
        frames.try_send("end".into()).unwrap();
        drop(frames);
        assert_eq!(soon("the rest", response.into_body().collect()).await.unwrap().to_bytes(), "end");
    };
    let (drained, ()) = tokio::join!(proxy.workers.drain(PATIENCE), client);
    assert_eq!(drained.unwrap().cut, 0);
    assert_eq!(proxy.metric("sluice_connections_open{listener=\"shop/cart:80\"}"), 0);
}

#[tokio::test]
async fn what_is_still_in_use_at_the_deadline_is_cut_and_counted() {
    let (app, frames) = held().await;
    let proxy = Proxy::start(Role::Sidecar);
    proxy.serve(http_to([(cluster("a", &[app.address]), 100)])).await;
    let (mut busy, mut idle) = (Http1::connect(proxy.address).await, Http1::connect(proxy.address).await);
    idle.get("/").await;
    frames.try_send("begin".into()).unwrap();
    let mut response = busy.start(get("/held")).await.unwrap();
    soon("a first chunk", response.body_mut().frame()).await.unwrap().unwrap();
    let drained = proxy.workers.drain(Duration::from_millis(200)).await.unwrap();
    assert_eq!(drained.cut, 1); // The idle one loses nothing.
    assert!(soon("the end", response.into_body().collect()).await.is_err());
    eventually("the close of the idle one", || idle.0.is_closed()).await;
}

#[tokio::test]
async fn an_answer_that_ends_with_its_connection_is_not_whole_at_the_deadline() {
    let (app, frames) = held().await;
    let proxy = Proxy::start(Role::Sidecar);
    proxy.serve(http_to([(cluster("a", &[app.address]), 100)])).await;
    let mut old = TcpStream::connect(proxy.address).await.unwrap();
    old.write_all(b"GET /held HTTP/1.0\r\n\r\n").await.unwrap();
    frames.try_send("begin".into()).unwrap();
    let mut came = Vec::new();
    while !came.ends_with(b"begin") {
        soon("the beginning", old.read_buf(&mut came)).await.unwrap();
    }
    assert_eq!(proxy.workers.drain(Duration::from_millis(200)).await.unwrap().cut, 1);
    let end = soon("the end", old.read_u8()).await.unwrap_err();
    assert_eq!(end.kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn new_connections_are_served_until_the_settle_time_is_over() {
    let app = App::named("a").await;
    let proxy = Proxy::with(Role::Fleet, Default::default(), |options| {
        options.timing.settle = Duration::from_millis(300);
    });
    proxy.serve(http_to([(cluster("a", &[app.address]), 100)])).await;
    let started = std::time::Instant::now();
    let clients = async {
        let mut served = 0;
        while let Ok(stream) = TcpStream::connect(proxy.address).await {
            drop(stream);
            assert_eq!(Http1::connect(proxy.address).await.get("/").await.body, "a");
            served += 1;
            if started.elapsed() > Duration::from_millis(250) {
                break;
            }
        }
        served
    };
    let (drained, served) = tokio::join!(proxy.workers.drain(PATIENCE), clients);
    assert_eq!(drained.unwrap().cut, 0);
    assert!(served > 3 && started.elapsed() >= Duration::from_millis(300));
}

fn quick_removal(options: &mut sluice_proxy::workers::Options) {
    options.timing.removed_accept = Duration::from_millis(300);
    options.timing.removed_serve = Duration::from_millis(600);
    options.timing.drain_idle = None;
}

#[tokio::test]
async fn a_removed_listener_accepts_a_little_longer_and_serves_what_is_open_from_its_last_configuration() {
    let app = App::named("a").await;
    let proxy = Proxy::with(Role::Fleet, Default::default(), quick_removal);
    proxy.serve(http_to([(cluster("a", &[app.address]), 100)])).await;
    let mut kept = Http1::connect(proxy.address).await;
    kept.get("/").await;
    proxy.apply([]).await;
    // New and kept connections alike.
    let mut late = Http1::connect(proxy.address).await;
    assert_eq!((late.get("/").await.body, kept.get("/").await.body), ("a".into(), "a".into()));
    soon("the close of the socket", async {
        while TcpStream::connect(proxy.address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    // Each thread closes its socket before it asks its connections to end.
    soon("the announced end", async {
        loop {
            let answer = kept.get("/").await;
            assert_eq!(answer.body, "a");
            if answer.header("connection") == "close" {
                break;
            }
        }
    })
    .await;
    // One that asks nothing is closed at the end, and then the listener and its revision are forgotten.
    eventually("the close of the idle one", || late.0.is_closed()).await;
    eventually("the end of its series", || !proxy.metrics.render().contains("shop")).await;
}

#[tokio::test]
async fn a_removed_listener_that_comes_back_serves_as_if_it_had_not_gone() {
    let (before, after) = (App::named("before").await, App::named("after").await);
    let proxy = Proxy::with(Role::Fleet, Default::default(), quick_removal);
    proxy.serve(http_to([(cluster("a", &[before.address]), 100)])).await;
    let mut kept = Http1::connect(proxy.address).await;
    kept.get("/").await;
    for _ in 0..5 {
        proxy.apply([]).await;
        proxy.serve(http_to([(cluster("b", &[after.address]), 100)])).await;
        // The newest configuration, on the old connection as well.
        assert_eq!(kept.get("/").await.body, "after");
        assert_eq!(Http1::connect(proxy.address).await.get("/").await.body, "after");
    }
    // Longer than the removal would have taken.
    let started = std::time::Instant::now();
    while started.elapsed() < Duration::from_millis(1200) {
        assert_eq!(kept.get("/").await.header("connection"), "");
        assert_eq!(Http1::connect(proxy.address).await.get("/").await.body, "after");
    }
}

#[tokio::test]
async fn a_tcp_connection_goes_on_while_its_listener_drains_until_the_deadline() {
    let listener = TcpListener::bind((own_ip(), 8080)).await.unwrap();
    let proxy = Proxy::start(Role::Fleet);
    let address = listener.local_addr().unwrap();
    proxy.serve(Protocol::Tcp(split([(cluster("a", &[address]), 100)]))).await;
    let mut client = TcpStream::connect(proxy.address).await.unwrap();
    let (mut upstream, _) = soon("the connection", listener.accept()).await.unwrap();
    // Those that the test makes to see whether the socket is still open; the application closes them.
    tokio::spawn(async move { while listener.accept().await.is_ok() {} });
    let talk = async {
        soon("the close of the socket", async {
            while TcpStream::connect(proxy.address).await.is_ok() {
                tokio::task::yield_now().await;
            }
        })
        .await;
        client.write_all(b"still here").await.unwrap();
        let mut data = [0; 10];
        soon("the bytes", upstream.read_exact(&mut data)).await.unwrap();
        assert_eq!(&data, b"still here");
        // Both sides see that it is no end in order.
        for side in [&mut client, &mut upstream] {
            let error = soon("the cut", side.read_u8()).await.unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
    };
    // Long enough for the socket to close on a busy machine.
    let (drained, ()) = tokio::join!(proxy.workers.drain(Duration::from_secs(4)), talk);
    // The last of those that were made to see the socket close may be among them.
    assert!(drained.unwrap().cut >= 1);
}
