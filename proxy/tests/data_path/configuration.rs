use std::{net::SocketAddr, sync::Arc, time::Duration};

use futures::channel::mpsc;
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use sluice_proxy::{
    metrics::Metrics,
    snapshot::{Action, Cluster, FilterChain, Listener, Protocol, ServerTls},
    tls::IdentityHandle,
    workers::Role,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::Semaphore,
};

use crate::{streams, support::*};

#[tokio::test]
async fn the_split_follows_the_weights_and_a_weight_of_zero_means_never() {
    let apps = [App::named("a").await, App::named("b").await, App::named("c").await];
    let proxy = Proxy::start(Role::Fleet);
    let side = |name: &str, app: &App, weight| (cluster(name, &[app.address]), weight);
    proxy.serve(http_to([side("a", &apps[0], 90), side("b", &apps[1], 10), side("c", &apps[2], 0)])).await;
    let (mut kept, mut shared) = (Http1::connect(proxy.address).await, Http2::connect(proxy.address).await);
    for _ in 0..1000 {
        assert_eq!(kept.get("/").await.status, StatusCode::OK);
        let request = Request::get("http://a/").body(full("")).unwrap();
        assert_eq!(shared.send(request).await.unwrap().status, StatusCode::OK);
    }
    // n = 2000, p = 0.1: standard deviation 13.4; 5 of them.
    let share = apps[1].requests();
    assert!((133..=267).contains(&share), "{share} of 2000");
    assert_eq!(apps[2].requests(), 0);
    assert_eq!(apps[0].requests() + share, 2000);
    assert_eq!(proxy.counted("b", "2xx", ""), share as u64);
    // Configured, so its series exist.
    assert_eq!(proxy.counted("c", "2xx", ""), 0);
}

#[tokio::test]
async fn endpoints_of_a_revision_share_its_load() {
    let apps = [App::named("1").await, App::named("2").await, App::named("3").await];
    let proxy = Proxy::start(Role::Fleet);
    let endpoints: Vec<_> = apps.iter().map(|app| app.address).collect();
    proxy.serve(http_to([(cluster("a", &endpoints), 100)])).await;
    let mut client = Http1::connect(proxy.address).await;
    for _ in 0..300 {
        client.get("/").await;
    }
    for app in &apps {
        assert!((50..=150).contains(&app.requests()), "{}", app.requests());
    }
}

/// Both of two are looked at for each request, so nothing here is left to chance.
#[tokio::test]
async fn an_endpoint_that_is_busy_gets_no_request_while_another_is_free() {
    let gate = Arc::new(Semaphore::new(0));
    let start = async || {
        let gate = gate.clone();
        App::start(own_ip(), 8080, move |request| {
            let gate = gate.clone();
            async move {
                if request.uri().path() == "/held" {
                    gate.acquire().await.unwrap().forget();
                }
                Response::new(full("a"))
            }
        })
        .await
    };
    let apps = [start().await, start().await];
    let proxy =
        Proxy::with(Role::Fleet, IdentityHandle::default(), |options| options.metrics = Metrics::new("test", 1));
    proxy.serve(http_to([(cluster("a", &[apps[0].address, apps[1].address]), 100)])).await;
    let (mut http1, mut http2) = (Http1::connect(proxy.address).await, Http2::connect(proxy.address).await);
    let holding = http2.clone();
    let hold = || {
        let mut client = holding.clone();
        tokio::spawn(async move { client.send(get("/held")).await.unwrap() })
    };
    let served = || apps.each_ref().map(App::requests);

    let mut held = vec![hold()];
    eventually("one is busy", || served().iter().sum::<usize>() == 1).await;
    for _ in 0..20 {
        assert_eq!(http1.get("/").await.body, "a");
        assert_eq!(http2.send(get("/")).await.unwrap().body, "a");
    }
    assert!(served() == [1, 40] || served() == [40, 1], "{:?}", served());

    // What is held is shared evenly: ten each.
    for more in 1..=19 {
        held.push(hold());
        eventually("another one is held", || served().iter().sum::<usize>() == 41 + more).await;
    }
    let [one, other] = served();
    assert_eq!((one.min(other), one.max(other)), (10, 50));
    gate.add_permits(held.len());
    for held in held {
        assert_eq!(soon("an answer", held).await.unwrap().body, "a");
    }
}

#[tokio::test]
async fn after_apply_no_request_on_a_kept_connection_uses_the_older_snapshot() {
    let apps = [App::named("a").await, App::named("b").await];
    let proxy = Proxy::start(Role::Fleet);
    let to = |weight| {
        http_to([(cluster("a", &[apps[0].address]), weight), (cluster("b", &[apps[1].address]), 100 - weight)])
    };
    proxy.serve(to(100)).await;
    // On all threads, as the kernel spreads connections.
    let mut kept = Vec::new();
    for _ in 0..16 {
        kept.push(Http1::connect(proxy.address).await);
    }
    let mut shared = Http2::connect(proxy.address).await;
    for round in 0..40 {
        let (weight, expected) = if round % 2 == 0 { (100, "a") } else { (0, "b") };
        proxy.serve(to(weight)).await;
        for client in &mut kept {
            assert_eq!(client.get("/").await.body, expected);
        }
        let request = Request::get("http://a/").body(full("")).unwrap();
        assert_eq!(shared.send(request).await.unwrap().body, expected);
    }
    assert_eq!(proxy.metric("sluice_connections_total{listener=\"shop/cart:80\"}"), 17);
}

#[tokio::test]
async fn a_new_snapshot_keeps_pools_and_series_of_what_did_not_change() {
    let (app, canary) = (App::named("a").await, App::named("b").await);
    let proxy = Proxy::start(Role::Fleet);
    let to = || http_to([(cluster("a", &[app.address]), 100), (cluster("b", &[canary.address]), 0)]);
    proxy.serve(to()).await;
    let mut client = Http1::connect(proxy.address).await;
    for _ in 0..30 {
        assert_eq!(client.get("/").await.body, "a");
        // New values each time, as a control plane sends them; only what they say is the same.
        proxy.serve(to()).await;
    }
    // Another revision comes; this one's endpoints stay.
    proxy.serve(http_to([(cluster("a", &[app.address]), 100)])).await;
    assert_eq!(client.get("/").await.body, "a");
    assert_eq!(app.connections(), 1);
    assert_eq!(proxy.counted("a", "2xx", ""), 31);
}

#[tokio::test]
async fn connections_to_an_endpoint_that_is_removed_are_closed_and_its_revision_s_series_go() {
    let ((gone, mut closed), kept) = (watched().await, App::named("kept").await);
    let proxy = Proxy::start(Role::Fleet);
    proxy.serve(http_to([(cluster("a", &[gone]), 100)])).await;
    assert_eq!(Http1::connect(proxy.address).await.get("/").await.body, "ok");
    assert_eq!(proxy.counted("a", "2xx", ""), 1);
    proxy.serve(http_to([(cluster("b", &[kept.address]), 100)])).await;
    soon("the close of the pooled connection", closed.recv()).await.unwrap();
    // Held by nothing but the client's connection, which is closed, too.
    eventually("the end of its series", || !proxy.metrics.render().contains("revision=\"a\"")).await;
    assert_eq!(proxy.counted("b", "2xx", ""), 0);
}

#[tokio::test]
async fn a_revision_behind_two_ports_keeps_its_connections_until_both_have_left_it() {
    // It takes one connection only.
    let ((shared, mut closed), other) = (watched().await, App::named("other").await);
    let proxy = Proxy::with(Role::Fleet, IdentityHandle::default(), |options| {
        options.metrics = Metrics::new("test", 1);
        options.timing.application_idle = Duration::from_secs(600);
    });
    let ports = [(); 3].map(|()| SocketAddr::new(own_ip(), 20000));
    let port = |index: usize, cluster: Cluster| {
        let chains =
            vec![FilterChain { server_name: None, tls: None, protocol: http_to([(cluster, 100)]), idle: None }];
        let name = format!("shop/cart:{index}");
        Arc::new(Listener { name, address: ports[index], chains, max_connections: None })
    };
    let (to_shared, to_other) = (|| cluster("a", &[shared]), || cluster("b", &[other.address]));
    let second = port(1, to_shared());
    proxy.apply([port(0, to_shared()), second.clone()]).await;
    assert_eq!(Http1::connect(ports[0]).await.get("/").await.body, "ok");
    proxy.apply([second]).await;
    let mut client = Http1::connect(ports[1]).await;
    assert_eq!(client.get("/").await.body, "ok");
    // One leaves it as another comes to it.
    proxy.apply([port(1, to_other()), port(2, to_shared())]).await;
    assert_eq!(client.get("/").await.body, "other");
    assert_eq!(Http1::connect(ports[2]).await.get("/").await.body, "ok");
    assert!(closed.try_recv().is_err());
    proxy.apply([port(1, to_other())]).await;
    soon("the close of the pooled connection", closed.recv()).await.unwrap();
}

#[tokio::test]
async fn a_service_that_changes_goes_and_comes_back_disturbs_no_connection_of_another() {
    let (one, two) = (App::named("one").await, App::named("two").await);
    let (parts, sockets) = (streams::app().await, websocket_echo(own_ip()).await);
    let proxy = Proxy::with(Role::Fleet, IdentityHandle::default(), |options| {
        options.timing.removed_accept = Duration::ZERO;
    });
    let others = [
        ("shop/other:80", http_to([(cluster("parts", &[parts.address]), 100)])),
        ("shop/other:81", http_to([(cluster("sockets", &[sockets.address]), 100)])),
        ("shop/other:82", Protocol::Tcp(split([(cluster("bytes", &[sockets.address]), 100)]))),
    ]
    .map(|(name, protocol)| {
        let chains = vec![FilterChain { server_name: None, tls: None, protocol, idle: None }];
        let address = SocketAddr::new(own_ip(), 20000);
        Arc::new(Listener { name: name.into(), address, chains, max_connections: None })
    });
    let apply = async |changed: Option<Protocol>| {
        proxy.apply(changed.map(|protocol| proxy.listener(protocol)).into_iter().chain(others.clone())).await;
    };
    let to = |app: &App| http_to([(cluster("a", &[app.address]), 100)]);
    apply(Some(to(&one))).await;

    let [http, websockets, tcp] = others.each_ref().map(|listener| listener.address);
    let (mut http1, mut http2) = (Http1::connect(http).await, Http2::connect(http).await);
    let begin = || {
        let (send, content) = mpsc::channel(1);
        (send, Request::post("/back").header("host", "a").body(streams::frames(content)).unwrap())
    };
    let ((first, request), (second, other)) = (begin(), begin());
    let (answer, another) = (http1.start(request).await.unwrap(), http2.start(other).await.unwrap());
    let mut open = [(first, answer.into_body()), (second, another.into_body())];
    let mut tunnels = [websocket(websockets).await, websocket(tcp).await];
    let mut all_go_on = async || {
        for (send, answer) in &mut open {
            send.try_send("ping".into()).unwrap();
            let part = soon("the part", answer.frame()).await.unwrap().unwrap();
            assert_eq!(part.into_data().unwrap(), "ping");
        }
        for tunnel in &mut tunnels {
            echoes(tunnel).await;
        }
    };
    all_go_on().await;
    let changes = [
        (to(&two), "two"),
        (Protocol::http(Action::Respond(StatusCode::NOT_FOUND)), "nothing serves here at the moment\n"),
        (Protocol::Tcp(split([(cluster("b", &[one.address]), 100)])), "one"),
    ];
    for (changed, said) in changes {
        apply(Some(changed)).await;
        assert_eq!(Http1::connect(proxy.address).await.get("/").await.body, said);
        all_go_on().await;
    }
    apply(None).await;
    eventually("the close of its socket", || std::net::TcpStream::connect(proxy.address).is_err()).await;
    all_go_on().await;
    apply(Some(to(&one))).await;
    assert_eq!(Http1::connect(proxy.address).await.get("/").await.body, "one");
    all_go_on().await;

    assert_eq!((parts.connections(), sockets.connections()), (2, 2));
    let opened = |name: &str| proxy.metric(&format!("sluice_connections_total{{listener=\"{name}\"}}"));
    assert_eq!(others.each_ref().map(|listener| opened(&listener.name)), [2, 1, 1]);
}

/// A server that says when a connection to it has been closed by the other side.
async fn watched() -> (SocketAddr, tokio::sync::mpsc::Receiver<()>) {
    let listener = tokio::net::TcpListener::bind((own_ip(), 8080)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (closed, closes) = tokio::sync::mpsc::channel(1);
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut buffer = [0; 4096];
        while let Ok(1..) = stream.read(&mut buffer).await {
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
        }
        closed.try_send(()).unwrap();
    });
    (address, closes)
}

#[tokio::test]
async fn a_listener_that_cannot_be_served_is_named_and_the_others_are_served() {
    let app = App::named("a").await;
    let proxy = Proxy::start(Role::Fleet);
    let taken = std::net::TcpListener::bind((own_ip(), 20000)).unwrap();
    let target = || http_to([(cluster("a", &[app.address]), 100)]);
    let good = proxy.listener(target());
    let chain = |name: Option<&str>, tls: bool| FilterChain {
        server_name: name.map(Into::into),
        tls: tls.then(|| ServerTls { client_id: FLEET.into() }),
        protocol: target(),
        idle: None,
    };
    let listener =
        |name: &str, address, chains| Arc::new(Listener { name: name.into(), address, chains, max_connections: None });
    let report = proxy
        .workers
        .apply(&snapshot([
            good,
            listener("taken", taken.local_addr().unwrap(), vec![chain(None, false)]),
            listener("mixed", SocketAddr::new(own_ip(), 1), vec![chain(None, false), chain(Some("a"), true)]),
            listener("twice", SocketAddr::new(own_ip(), 1), vec![chain(Some("a"), true), chain(Some("a"), true)]),
        ]))
        .await
        .unwrap();
    let names: Vec<_> = report.rejected.iter().map(|rejected| rejected.listener.as_str()).collect();
    assert_eq!(names, ["mixed", "taken", "twice"]);
    assert!(report.rejected[1].reason.contains(&taken.local_addr().unwrap().to_string()), "{report:?}");
    assert_eq!(Http1::connect(proxy.address).await.get("/").await.body, "a");
    // A bad version of a good listener leaves the good one.
    let bad = listener("shop/cart:80", taken.local_addr().unwrap(), vec![chain(None, false)]);
    let report = proxy.workers.apply(&snapshot([bad])).await.unwrap();
    assert_eq!(report.rejected.len(), 1);
    assert_eq!(Http1::connect(proxy.address).await.get("/").await.body, "a");
}

#[tokio::test]
async fn an_sni_that_tls_cannot_carry_is_rejected_by_name() {
    let proxy = Proxy::start(Role::Fleet);
    let mut bad: Cluster = cluster("1234567890", &[]);
    bad.tls = Some(sluice_proxy::snapshot::ClientTls { sni: "p80.1234567890".into(), server_id: APP.into() });
    let report = proxy.workers.apply(&snapshot([proxy.listener(http_to([(bad, 100)]))])).await.unwrap();
    assert!(report.rejected[0].reason.contains("p80.1234567890"), "{report:?}");
}

#[tokio::test]
async fn one_of_ten_thousand_endpoints_changes_while_requests_go_on() {
    let app = App::named("a").await;
    let proxy =
        Proxy::with(Role::Fleet, IdentityHandle::default(), |options| options.timing.application_idle = PATIENCE);
    let endpoint = |index: u16| SocketAddr::from(([10, 0, index.to_be_bytes()[0], index.to_be_bytes()[1]], 20443));
    let mut many: Vec<_> = (0..10_000).map(endpoint).collect();
    let serve = |many: &[SocketAddr]| http_to([(cluster("a", &[app.address]), 100), (cluster("b", many), 0)]);
    proxy.serve(serve(&many)).await;
    let mut client = Http1::connect(proxy.address).await;
    for index in 0..100 {
        many[usize::from(index)] = endpoint(10_000 + index);
        soon("the change", proxy.serve(serve(&many))).await;
        assert_eq!(client.get("/").await.body, "a");
    }
    assert_eq!(app.connections(), 1, "what did not change keeps its connections");
}
