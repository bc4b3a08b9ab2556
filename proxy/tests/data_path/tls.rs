use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::StatusCode;
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, HandshakeKind, RootCertStore, ServerConfig, client::Resumption, pki_types::ServerName,
    server::WebPkiClientVerifier,
};
use sluice_proxy::{
    snapshot::{ClientTls, Cluster, FilterChain, Listener, Protocol, ServerTls},
    tls::{ALPN_H2, ALPN_HTTP1, IdentityHandle},
    workers::Role,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsAcceptor, TlsConnector, client::TlsStream};

use crate::support::*;

/// Speaks to a sidecar as a fleet with this identity would, down to the answer.
async fn try_get(sidecar: &Proxy, identity: &IdentityHandle, server_id: &str, sni: &str) -> std::io::Result<String> {
    let mut stream = handshake(sidecar, identity, server_id, sni).await?;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await?;
    let mut answer = String::new();
    soon("an end", stream.read_to_string(&mut answer)).await?;
    Ok(answer)
}

async fn handshake(
    sidecar: &Proxy,
    identity: &IdentityHandle,
    server_id: &str,
    sni: &str,
) -> std::io::Result<TlsStream<TcpStream>> {
    let connector = TlsConnector::from(identity.client_config(server_id, &[ALPN_HTTP1]));
    let stream = TcpStream::connect(sidecar.address).await?;
    let name = ServerName::try_from(sni.to_owned()).unwrap();
    soon("the handshake", connector.connect(name, stream)).await
}

#[tokio::test]
async fn a_sidecar_admits_exactly_the_fleet() {
    let (ip, ca, other) = (own_ip(), Ca::new(), Ca::new());
    let app = App::start(ip, 8080, |_| async { http::Response::new(full("hello")) }).await;
    let sidecar = sidecar(&ca, ip, false).await;

    let fleet = ca.identity(FLEET);
    let answer = try_get(&sidecar, &fleet, APP, "p8080.abc").await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("hello"), "{answer}");
    assert_eq!(app.requests(), 1);

    let with = |change: fn(&mut rcgen::CertificateParams)| {
        let handle = IdentityHandle::default();
        let (chain, key) = ca.issue(FLEET, change);
        handle.set(chain, key, ca.roots()).unwrap();
        handle
    };
    let foreign = IdentityHandle::default();
    let (chain, key) = other.issue(FLEET, |_| {});
    foreign.set(chain, key, ca.roots()).unwrap();
    let table = [
        ("another service account", ca.identity("spiffe://test/ns/sluice-system/sa/other")),
        ("another trust domain", ca.identity("spiffe://other/ns/sluice-system/sa/fleet")),
        ("a longer name", ca.identity(&format!("{FLEET}/x"))),
        ("another authority", foreign),
        (
            "an expired certificate",
            with(|params| {
                params.not_before = rcgen::date_time_ymd(2020, 1, 1);
                params.not_after = rcgen::date_time_ymd(2020, 1, 2);
            }),
        ),
        (
            "two names",
            with(|params| {
                let second = "spiffe://test/ns/shop/sa/cart".try_into().unwrap();
                params.subject_alt_names.push(rcgen::SanType::URI(second));
            }),
        ),
        ("no name", with(|params| params.subject_alt_names.clear())),
    ];
    for (what, identity) in &table {
        assert!(try_get(&sidecar, identity, APP, "p8080.abc").await.is_err(), "{what} was admitted");
    }
    // Another port or revision.
    for sni in ["p9090.abc", "p8080.xyz", "other"] {
        assert!(try_get(&sidecar, &fleet, APP, sni).await.is_err(), "{sni} was admitted");
    }
    let (certificates, names) = (table.len() as u64, 3);
    let count = |reason: &str| sidecar.refused_at("inbound", reason);
    let failures = || sidecar.metric("sluice_tls_failures_total{listener=\"inbound\"}");
    // Counted behind the alert that the client has seen.
    eventually("the count", || failures() == certificates + names).await;
    eventually("the reasons", || (count("tls_certificate"), count("tls_server_name")) == (certificates, names)).await;

    // No certificate at all.
    let roots = RootCertStore { roots: ca.roots().iter().map(|r| webpki_root(r)).collect() };
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let anonymous = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone(roots)))
        .with_no_client_auth();
    let stream = TcpStream::connect(sidecar.address).await.unwrap();
    let name = ServerName::try_from("p8080.abc").unwrap();
    let mut stream = TlsConnector::from(Arc::new(anonymous)).connect(name, stream).await.unwrap();
    let _ = stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert!(soon("the refusal", stream.read_u8()).await.is_err());
    eventually("the count", || count("tls_certificate") == certificates + 1).await;

    // Plaintext.
    let mut stream = TcpStream::connect(sidecar.address).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = soon("the close", stream.read_to_end(&mut answer)).await;
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    eventually("the count", || count("tls_protocol") == 1).await;
    assert_eq!(app.requests(), 1);
}

fn webpki_root(root: &rustls::pki_types::CertificateDer<'_>) -> rustls::pki_types::TrustAnchor<'static> {
    let mut store = RootCertStore::empty();
    store.add(root.clone().into_owned()).unwrap();
    store.roots.remove(0)
}

/// Asks nothing of the server: this is about what the server asks.
#[derive(Debug)]
struct Anyone(#[allow(dead_code)] RootCertStore);

impl rustls::client::danger::ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

#[tokio::test]
async fn the_fleet_believes_exactly_the_revision_s_service_account() {
    let (ip, ca) = (own_ip(), Ca::new());
    let app = App::start(ip, 8080, |_| async { http::Response::new(full("hello")) }).await;
    let sidecar = sidecar(&ca, ip, false).await;
    let fleet = Proxy::with(Role::Fleet, ca.identity(FLEET), |_| {});
    let believing = |server_id: &str| {
        let mut cluster = mesh_cluster("abc", &[&sidecar]);
        cluster.tls.as_mut().unwrap().server_id = server_id.into();
        http_to([(cluster, 100)])
    };
    fleet.serve(believing(APP)).await;
    let mut client = Http1::connect(fleet.address).await;
    assert_eq!(client.get("/").await.body, "hello");
    // Kept connections that were made to another identity are not used any more.
    fleet.serve(believing("spiffe://test/ns/shop/sa/other")).await;
    let answer = client.get("/").await;
    assert_eq!((answer.status, answer.header("x-sluice-response-flag")), (StatusCode::SERVICE_UNAVAILABLE, "UF"));
    assert_eq!(app.requests(), 1);
}

#[tokio::test]
async fn a_fleet_that_a_sidecar_does_not_admit_tries_another_and_then_says_that_it_could_not_connect() {
    let (ip, ca) = (own_ip(), Ca::new());
    let app = App::start(ip, 8080, |_| async { http::Response::new(full("hello")) }).await;
    let sidecars = [sidecar(&ca, ip, false).await, sidecar(&ca, own_ip(), false).await];
    let stranger = Proxy::with(Role::Fleet, ca.identity("spiffe://test/ns/x/sa/y"), |_| {});
    stranger.serve(http_to([(mesh_cluster("abc", &[&sidecars[0], &sidecars[1]]), 100)])).await;
    let answer = Http1::connect(stranger.address).await.get("/").await;
    assert_eq!((answer.status, answer.header("x-sluice-response-flag")), (StatusCode::SERVICE_UNAVAILABLE, "UF"));
    for sidecar in &sidecars {
        // Counted behind the alert that the fleet has seen.
        eventually("the count", || sidecar.metric("sluice_tls_failures_total{listener=\"inbound\"}") == 1).await;
    }
    assert_eq!(app.requests(), 0);
}

#[tokio::test]
async fn a_renewed_certificate_is_used_at_once_and_disturbs_no_connection() {
    let (ip, ca) = (own_ip(), Ca::new());
    let _app = App::start(ip, 8080, |_| async { http::Response::new(full("hello")) }).await;
    let sidecar = sidecar(&ca, ip, false).await;
    let identity = ca.identity(FLEET);
    let fleet = Proxy::with(Role::Fleet, identity.clone(), |_| {});
    fleet.serve(http_to([(mesh_cluster("abc", &[&sidecar]), 100)])).await;
    let mut client = Http1::connect(fleet.address).await;
    assert_eq!(client.get("/").await.body, "hello");
    let opened = || sidecar.metric("sluice_connections_total{listener=\"inbound\"}");
    assert_eq!(opened(), 1);
    // One that the sidecar would refuse in a new handshake: the connection in the pool does not notice.
    ca.renew(&identity, "spiffe://test/ns/x/sa/y");
    assert_eq!(client.get("/").await.body, "hello");
    assert_eq!(opened(), 1);
    // A handshake uses it at once.
    assert!(try_get(&sidecar, &identity, APP, "p8080.abc").await.is_err());
    ca.renew(&identity, FLEET);
    assert!(try_get(&sidecar, &identity, APP, "p8080.abc").await.unwrap().ends_with("hello"));
}

/// A new root takes over (docs/install.md): what is open goes on, and whoever connects is asked by it, and by it alone.
#[tokio::test]
async fn other_roots_count_from_the_next_handshake_on_and_disturb_no_connection() {
    let (ip, opaque_ip, old, new) = (own_ip(), own_ip(), Ca::new(), Ca::new());
    let _app = websocket_echo(ip).await;
    let echo = TcpListener::bind((opaque_ip, 8080)).await.unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = echo.accept().await.unwrap();
        let (mut read, mut write) = stream.split();
        tokio::io::copy(&mut read, &mut write).await
    });
    let (inbound, outbound) = (old.identity(APP), old.identity(FLEET));
    let sidecar = sidecar_of(inbound.clone(), ip, false).await;
    let opaque_sidecar = sidecar_of(inbound.clone(), opaque_ip, true).await;
    let fleet = Proxy::with(Role::Fleet, outbound.clone(), |_| {});
    fleet.serve(http_to([(mesh_cluster("abc", &[&sidecar]), 100)])).await;
    let opaque_fleet = Proxy::with(Role::Fleet, outbound.clone(), |_| {});
    opaque_fleet.serve(Protocol::Tcp(split([(mesh_cluster("abc", &[&opaque_sidecar]), 100)]))).await;

    let (mut http1, mut http2) = (Http1::connect(fleet.address).await, Http2::connect(fleet.address).await);
    let mut tunnels = [websocket(fleet.address).await, TcpStream::connect(opaque_fleet.address).await.unwrap()];
    let mut all_go_on = async || {
        assert_eq!(http1.get("/").await.body, "plain");
        assert_eq!(http2.send(get("/")).await.unwrap().body, "plain");
        for tunnel in &mut tunnels {
            echoes(tunnel).await;
        }
    };
    all_go_on().await;
    let opened = || sidecar.metric("sluice_connections_total{listener=\"inbound\"}");
    let before = opened();
    new.renew(&inbound, APP);
    new.renew(&outbound, FLEET);
    for _ in 0..3 {
        all_go_on().await;
    }
    assert_eq!(opened(), before, "each on the connection that it had");

    // Each of these believes the sidecar, or is believed by it, but not both.
    let mixed = |certificate: &Ca, roots: Vec<_>| {
        let (handle, (chain, key)) = (IdentityHandle::default(), certificate.issue(FLEET, |_| {}));
        handle.set(chain, key, roots).unwrap();
        handle
    };
    let not_believed = mixed(&old, [old.roots(), new.roots()].concat());
    assert!(try_get(&sidecar, &not_believed, APP, "p8080.abc").await.is_err());
    eventually("the count", || sidecar.refused_at("inbound", "tls_certificate") == 1).await;
    assert!(try_get(&sidecar, &mixed(&new, old.roots()), APP, "p8080.abc").await.is_err());
    assert!(try_get(&sidecar, &outbound, APP, "p8080.abc").await.unwrap().ends_with("plain"));
    let late = Proxy::with(Role::Fleet, outbound.clone(), |_| {});
    late.serve(http_to([(mesh_cluster("abc", &[&sidecar]), 100)])).await;
    assert_eq!(Http1::connect(late.address).await.get("/").await.body, "plain");
    all_go_on().await;
}

/// Sends a request on a new connection, reads to the end, and says how the handshake went.
async fn handshake_kind(address: SocketAddr, config: Arc<ClientConfig>) -> std::io::Result<Option<HandshakeKind>> {
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from("p8080.abc").unwrap();
    let mut stream = soon("the handshake", TlsConnector::from(config).connect(name, stream)).await?;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await?;
    // Tickets would come before the answer.
    let mut answer = String::new();
    soon("an end", stream.read_to_string(&mut answer)).await?;
    assert!(answer.ends_with("hello"), "{answer}");
    Ok(stream.get_ref().1.handshake_kind())
}

/// A server that gives tickets and takes them.
async fn resuming_server(ca: &Ca) -> SocketAddr {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(ca.roots().remove(0)).unwrap();
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build().unwrap();
    let (chain, key) = ca.issue(APP, |_| {});
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(clients)
        .with_single_cert(chain, key)
        .unwrap();
    config.alpn_protocols = vec![ALPN_HTTP1.to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind((own_ip(), 20443)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = acceptor.accept(stream).await.unwrap();
            let _ = stream.read(&mut [0; 1024]).await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nhello").await.unwrap();
            stream.shutdown().await.unwrap();
        }
    });
    address
}

/// rustls, `ProducesTickets`: a resumed session is one of a client whose certificate is not looked at again.
#[tokio::test]
async fn a_client_that_would_resume_its_session_has_to_show_its_certificate_again() {
    let (ip, ca, other) = (own_ip(), Ca::new(), Ca::new());
    let _app = App::start(ip, 8080, |_| async { http::Response::new(full("hello")) }).await;
    let (inbound, fleet) = (ca.identity(APP), ca.identity(FLEET));
    let sidecar = sidecar_of(inbound.clone(), ip, false).await;
    let (chain, key) = ca.issue(FLEET, |_| {});
    let mut resuming = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(fleet.server_verifier(APP))
        .with_client_auth_cert(chain, key)
        .unwrap();
    resuming.alpn_protocols = vec![ALPN_HTTP1.to_vec()];
    let resuming = Arc::new(resuming);

    let elsewhere = resuming_server(&ca).await;
    for expected in [HandshakeKind::Full, HandshakeKind::Resumed] {
        let kind = handshake_kind(elsewhere, resuming.clone()).await.unwrap();
        assert_eq!(kind, Some(expected), "where it may, it does");
    }
    // A fleet keeps no sessions, whoever offers them.
    let ours = fleet.client_config(APP, &[ALPN_HTTP1]);
    for _ in 0..2 {
        assert_eq!(handshake_kind(elsewhere, ours.clone()).await.unwrap(), Some(HandshakeKind::Full));
    }
    // A sidecar gives none.
    let mut forgetful = ClientConfig::clone(&resuming);
    forgetful.resumption = Resumption::in_memory_sessions(32);
    let resuming = Arc::new(forgetful);
    for _ in 0..3 {
        let kind = handshake_kind(sidecar.address, resuming.clone()).await.unwrap();
        assert_eq!(kind, Some(HandshakeKind::Full));
    }
    // Who is not believed any more does not come back by what was agreed before.
    let (chain, key) = ca.issue(APP, |_| {});
    inbound.set(chain, key, other.roots()).unwrap();
    assert!(handshake_kind(sidecar.address, resuming).await.is_err());
}

#[tokio::test]
async fn a_connection_ends_in_order_when_the_client_s_certificate_does() {
    let (ip, ca) = (own_ip(), Ca::new());
    let _app = App::start(ip, 8080, |_| async { http::Response::new(full("hello")) }).await;
    let sidecar = sidecar(&ca, ip, false).await;
    let identity = IdentityHandle::default();
    let (chain, key) = ca.issue(FLEET, |params| params.not_after = (SystemTime::now() + Duration::from_secs(3)).into());
    identity.set(chain, key, ca.roots()).unwrap();
    let fleet = Proxy::with(Role::Fleet, identity.clone(), |_| {});
    fleet.serve(http_to([(mesh_cluster("abc", &[&sidecar]), 100)])).await;
    let (mut http1, mut http2) = (Http1::connect(fleet.address).await, Http2::connect(fleet.address).await);
    let opened = || sidecar.metric("sluice_connections_total{listener=\"inbound\"}");
    assert_eq!(
        (http1.get("/").await.body.as_str(), http2.send(get("/")).await.unwrap().body.as_str()),
        ("hello", "hello")
    );
    let before = opened();
    // As the renewal does, long before.
    ca.renew(&identity, FLEET);
    let again = async {
        while opened() < before + 2 {
            assert_eq!(http1.get("/").await.body, "hello");
            assert_eq!(http2.send(get("/")).await.unwrap().body, "hello");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    soon("connections with the renewed certificate", again).await;
    let failed = ["UC", "UF", "UH"]
        .map(|flag| fleet.metric(&format!("sluice_local_errors_total{{listener=\"shop/cart:80\",flag=\"{flag}\"}}")));
    assert_eq!(failed, [0, 0, 0]);
}

#[tokio::test]
async fn a_handshake_in_single_bytes_is_one() {
    let (ip, ca) = (own_ip(), Ca::new());
    let _app = App::start(ip, 8080, |_| async { http::Response::new(full("hello")) }).await;
    let sidecar = sidecar(&ca, ip, false).await;
    // Between client and sidecar, a network that cuts everything into bytes.
    let listener = TcpListener::bind((ip, 0)).await.unwrap();
    let through = listener.local_addr().unwrap();
    let to = sidecar.address;
    let network = tokio::spawn(async move {
        let (client, _) = listener.accept().await.unwrap();
        let server = TcpStream::connect(to).await.unwrap();
        server.set_nodelay(true).unwrap();
        let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
            (client.into_split(), server.into_split());
        let there = async {
            while let Ok(byte) = from_client.read_u8().await {
                to_server.write_u8(byte).await.unwrap();
                tokio::task::yield_now().await;
            }
        };
        let back = tokio::io::copy(&mut from_server, &mut to_client);
        let _ = tokio::join!(there, back);
    });
    let connector = TlsConnector::from(ca.identity(FLEET).client_config(APP, &[ALPN_HTTP1]));
    let stream = TcpStream::connect(through).await.unwrap();
    let name = ServerName::try_from("p8080.abc").unwrap();
    let mut stream = soon("the handshake", connector.connect(name, stream)).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    soon("an end", stream.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.ends_with("hello"), "{answer}");
    drop(stream);
    soon("the end of the network", network).await.unwrap();
}

#[tokio::test]
async fn a_client_that_begins_no_handshake_is_closed() {
    let (ip, ca) = (own_ip(), Ca::new());
    let mut sidecar = Proxy::with(Role::Sidecar, ca.identity(APP), |options| {
        options.timing.tls_handshake = Duration::from_millis(100);
    });
    sidecar.address = SocketAddr::new(ip, 20443);
    let chains = vec![FilterChain {
        server_name: Some("p8080.abc".into()),
        tls: Some(ServerTls { client_id: FLEET.into() }),
        protocol: http_to([(cluster("a", &[]), 1)]),
        idle: None,
    }];
    sidecar
        .apply([Arc::new(Listener { name: "inbound".into(), address: sidecar.address, chains, max_connections: None })])
        .await;
    let mut silent = TcpStream::connect(sidecar.address).await.unwrap();
    let mut slow = TcpStream::connect(sidecar.address).await.unwrap();
    // The beginning of a record that does not come.
    slow.write_all(&[0x16, 3, 1, 2, 0]).await.unwrap();
    for stream in [&mut silent, &mut slow] {
        let read = soon("the end", stream.read(&mut [0; 16])).await;
        assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    }
    let failures = || sidecar.metric("sluice_tls_failures_total{listener=\"inbound\"}");
    eventually("both are counted", || failures() == 2).await;
    eventually("both have their reason", || sidecar.refused_at("inbound", "tls_timeout") == 2).await;
}

#[tokio::test]
async fn a_client_that_leaves_in_the_handshake_is_counted_and_disturbs_nobody() {
    let (ip, ca) = (own_ip(), Ca::new());
    let app = App::start(ip, 8080, |_| async { http::Response::new(full("hello")) }).await;
    let sidecar = sidecar(&ca, ip, false).await;
    let fleet = ca.identity(FLEET);
    let stream = handshake(&sidecar, &fleet, APP, "p8080.abc").await.unwrap();
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let mut kept = Http1(sender);

    let name = ServerName::try_from("p8080.abc").unwrap();
    let mut hello = Vec::new();
    rustls::ClientConnection::new(fleet.client_config(APP, &[ALPN_HTTP1]), name)
        .unwrap()
        .write_tls(&mut hello)
        .unwrap();
    // How much of its hello a client sends, and whether it leaves in order.
    let table = [
        ("before its hello", 0, true),
        ("in the middle of its hello", hello.len() / 2, true),
        ("after its hello", hello.len(), true),
        ("after its hello, by a reset", hello.len(), false),
    ];
    let mut left = 0;
    for (what, length, in_order) in table {
        let mut stream = TcpStream::connect(sidecar.address).await.unwrap();
        stream.write_all(&hello[..length]).await.unwrap();
        if length == hello.len() {
            // Our certificate, and the question for the client's.
            soon("our part of the handshake", stream.read_u8()).await.unwrap();
        }
        if in_order {
            stream.shutdown().await.unwrap();
            soon("the end", stream.read_to_end(&mut Vec::new())).await.unwrap();
        } else {
            stream.set_zero_linger().unwrap();
        }
        drop(stream);
        left += 1;
        eventually(what, || sidecar.refused_at("inbound", "tls_closed") == left).await;
        assert_eq!(kept.get("/").await.body, "hello", "{what}");
    }
    // One that does not believe our certificate, and says so.
    handshake(&sidecar, &fleet, "spiffe://test/ns/shop/sa/other", "p8080.abc").await.unwrap_err();
    eventually("the alert", || sidecar.refused_at("inbound", "tls_closed") == left + 1).await;
    assert_eq!(kept.get("/").await.body, "hello");

    assert_eq!(sidecar.metric("sluice_tls_failures_total{listener=\"inbound\"}"), left + 1);
    assert_eq!(app.requests(), table.len() + 1);
}

#[tokio::test]
async fn the_protocol_is_agreed_by_alpn() {
    let (ip, ca) = (own_ip(), Ca::new());
    let _app =
        App::start(ip, 8080, |request| async move { http::Response::new(full(format!("{:?}", request.version()))) })
            .await;
    let sidecar = sidecar(&ca, ip, false).await;
    let connector = TlsConnector::from(ca.identity(FLEET).client_config(APP, &[ALPN_H2]));
    let stream = TcpStream::connect(sidecar.address).await.unwrap();
    let stream = connector.connect(ServerName::try_from("p8080.abc").unwrap(), stream).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(ALPN_H2));
    let (sender, connection) =
        hyper::client::conn::http2::handshake(hyper_util::rt::TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    tokio::spawn(connection);
    let answer = Http2(sender).send(http::Request::get("https://a/").body(full("")).unwrap()).await.unwrap();
    assert_eq!(answer.body, "HTTP/2.0");
    // None in common.
    let connector = TlsConnector::from(ca.identity(FLEET).client_config(APP, &[b"spdy/3"]));
    let stream = TcpStream::connect(sidecar.address).await.unwrap();
    assert!(connector.connect(ServerName::try_from("p8080.abc").unwrap(), stream).await.is_err());
}

#[tokio::test]
async fn a_client_that_agrees_on_http2_and_says_nothing_is_cut_off() {
    let (ip, ca) = (own_ip(), Ca::new());
    let short = |options: &mut sluice_proxy::workers::Options| options.timing.header = Duration::from_millis(150);
    let sidecar = sidecar_with(ca.identity(APP), ip, false, short).await;
    let connector = TlsConnector::from(ca.identity(FLEET).client_config(APP, &[ALPN_H2]));
    let stream = TcpStream::connect(sidecar.address).await.unwrap();
    let mut stream = connector.connect(ServerName::try_from("p8080.abc").unwrap(), stream).await.unwrap();
    // Half of the preface (RFC 9113, 3.4).
    stream.write_all(b"PRI * HTTP/2").await.unwrap();
    let _ = soon("the end", stream.read(&mut [0])).await;
    eventually("its count", || sidecar.refused_at("inbound", "head_timeout") == 1).await;
}

#[tokio::test]
async fn a_proxy_without_an_identity_refuses_and_serves_once_it_has_one() {
    let (ip, ca) = (own_ip(), Ca::new());
    let _app = App::start(ip, 8080, |_| async { http::Response::new(full("hello")) }).await;
    let sidecar = sidecar(&ca, ip, false).await;
    let identity = IdentityHandle::default();
    let fleet = Proxy::with(Role::Fleet, identity.clone(), |_| {});
    fleet.serve(http_to([(mesh_cluster("abc", &[&sidecar]), 100)])).await;
    let mut client = Http1::connect(fleet.address).await;
    assert_eq!(client.get("/").await.header("x-sluice-response-flag"), "UF");
    ca.renew(&identity, FLEET);
    assert_eq!(client.get("/").await.body, "hello");
}

#[tokio::test]
async fn when_another_fleet_is_admitted_requests_on_connections_of_the_former_are_refused() {
    let (ip, ca) = (own_ip(), Ca::new());
    let app = App::start(ip, 8080, |_| async { http::Response::new(full("hello")) }).await;
    let sidecar = sidecar(&ca, ip, false).await;
    let stream = handshake(&sidecar, &ca.identity(FLEET), APP, "p8080.abc").await.unwrap();
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let mut client = Http1(sender);
    assert_eq!(client.get("/").await.body, "hello");
    let listener = Listener {
        name: "inbound".into(),
        address: sidecar.address,
        chains: vec![FilterChain {
            server_name: Some("p8080.abc".into()),
            tls: Some(ServerTls { client_id: "spiffe://test/ns/new/sa/fleet".into() }),
            protocol: http_to([(cluster("a", &[app.address]), 1)]),
            idle: None,
        }],
        max_connections: None,
    };
    sidecar.apply([Arc::new(listener)]).await;
    let answer = client.get("/").await;
    assert_eq!((answer.status, answer.header("connection")), (StatusCode::FORBIDDEN, "close"));
    assert_eq!(app.requests(), 1);
}

/// RFC 9112, 9.8: an answer that ends with its connection is whole only if TLS was ended, too.
#[tokio::test]
async fn an_answer_that_is_cut_short_inside_tls_is_not_passed_on_as_whole() {
    let (ip, ca) = (own_ip(), Ca::new());
    let address = SocketAddr::new(ip, 20443);
    let listener = TcpListener::bind(address).await.unwrap();
    let acceptor = TlsAcceptor::from(ca.identity(APP).server_config(FLEET, &[ALPN_HTTP1]));
    let upstream = tokio::spawn(async move {
        for orderly in [false, true] {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = acceptor.accept(stream).await.unwrap();
            let mut head = [0; 1024];
            while !head.windows(4).any(|end| end == b"\r\n\r\n") {
                assert!(stream.read(&mut head).await.unwrap() > 0);
            }
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\npart").await.unwrap();
            stream.flush().await.unwrap();
            if orderly {
                stream.shutdown().await.unwrap();
            }
        }
    });
    let fleet = Proxy::with(Role::Fleet, ca.identity(FLEET), |_| {});
    let cluster = Cluster {
        tls: Some(ClientTls { sni: "p8080.abc".into(), server_id: APP.into() }),
        ..cluster("abc", &[address])
    };
    fleet.serve(http_to([(cluster, 100)])).await;
    let mut client = Http1::connect(fleet.address).await;
    let answer = soon("a head", client.start(get("/"))).await.unwrap();
    soon("an end", answer.into_body().collect()).await.unwrap_err();
    let mut client = Http1::connect(fleet.address).await;
    assert_eq!(soon("an answer", client.get("/")).await.body, "part");
    upstream.await.unwrap();
}
