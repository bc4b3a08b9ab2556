//! The whole way over real TLS on loopback; only the API server's word about tokens is made up.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{collections::BTreeMap, net::Ipv4Addr, sync::Arc, time::Duration};

use futures::FutureExt;
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use k8s_openapi::api::authentication::v1::{TokenReviewStatus, UserInfo};
use rcgen::{CertificateParams, DnType, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_RSA_SHA256};
use rustls::{ClientConfig, RootCertStore, crypto::CryptoProvider};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, pem::PemObject};
use sluice_xds::{
    PodSubject, SpiffeId,
    envoy::service::discovery::v3::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
        aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
        aggregated_discovery_service_server::{AggregatedDiscoveryService, AggregatedDiscoveryServiceServer},
    },
    sluice::identity::v1::{
        SignRequest, SignResponse, certificate_service_client::CertificateServiceClient,
        certificate_service_server::CertificateService,
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;
use tokio_stream::Empty;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::{
    Code, Request, Response, Status, Streaming,
    service::Routes,
    transport::{Channel, Endpoint},
};

use super::*;

const DOMAIN: &str = "cluster.local";
const HOST: &str = "sluice-controller.sluice-system.svc";
const DAY: Duration = Duration::from_secs(24 * 3600);

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// An API server that knows these tokens.
struct Known(BTreeMap<&'static str, TokenReviewStatus>);

impl TokenReviews for Known {
    async fn review(&self, token: &str) -> Result<TokenReviewStatus, kube::Error> {
        if token == "hang" {
            return std::future::pending().await;
        }
        if token == "unreachable" {
            return Err(kube::Error::Service("connection refused".into()));
        }
        let unknown = TokenReviewStatus { authenticated: Some(false), ..TokenReviewStatus::default() };
        Ok(self.0.get(token).cloned().unwrap_or(unknown))
    }
}

fn reviewed(audience: &str, extra: &[(&str, &str)]) -> TokenReviewStatus {
    TokenReviewStatus {
        audiences: Some(vec![audience.to_owned()]),
        authenticated: Some(true),
        error: None,
        user: Some(UserInfo {
            username: Some("system:serviceaccount:shop:web".to_owned()),
            extra: Some(extra.iter().map(|(key, value)| ((*key).to_owned(), vec![(*value).to_owned()])).collect()),
            ..UserInfo::default()
        }),
    }
}

/// Says who asks, as an error message.
struct WhoAmI;

#[tonic::async_trait]
impl AggregatedDiscoveryService for WhoAmI {
    type StreamAggregatedResourcesStream = Empty<Result<DiscoveryResponse, Status>>;
    type DeltaAggregatedResourcesStream = Empty<Result<DeltaDiscoveryResponse, Status>>;

    async fn stream_aggregated_resources(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        let who = Peer::of(&request)?.identity()?;
        let answer = format!("{} {} {}", who.id, who.pod.common_name(), who.pod.uid);
        Err(Status::already_exists(answer))
    }

    async fn delta_aggregated_resources(
        &self,
        _: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented(""))
    }
}

struct Running {
    port: u16,
    authority: Arc<Authority>,
    stop: CancellationToken,
    task: AbortOnDropHandle<Result<(), ServeError>>,
}

fn authority(trust_domain: &str) -> Authority {
    Authority::for_tests(trust_domain, DAY)
}

fn subject(trust_domain: &str, name: &str) -> Subject {
    Subject {
        id: SpiffeId::new(trust_domain, "sluice-system", name).unwrap(),
        pod: PodSubject { namespace: "sluice-system".to_owned(), pod: format!("{name}-0"), uid: "c0ffee".to_owned() },
        dns_names: vec![HOST.to_owned()],
    }
}

async fn start() -> Running {
    let authority = Arc::new(authority(DOMAIN));
    let own = OwnCertificate::new(Arc::clone(&authority), provider(), subject(DOMAIN, "sluice-controller")).unwrap();
    let pod = [("authentication.kubernetes.io/pod-name", "web-0"), ("authentication.kubernetes.io/pod-uid", "5f0c")];
    let reviews = Known(BTreeMap::from([
        ("good", reviewed(AUDIENCE, &pod)),
        ("for the API server", reviewed("https://kubernetes.default.svc", &pod)),
        ("without uid", reviewed(AUDIENCE, &pod[..1])),
    ]));
    let address = (Ipv4Addr::LOCALHOST, 0).into();
    let port = GrpcPort::bind(address, Arc::clone(&authority), own, provider()).await.unwrap();
    let address = port.address().unwrap();
    let services = Routes::new(Certificates::server(Arc::clone(&authority), reviews))
        .add_service(AggregatedDiscoveryServiceServer::new(WhoAmI));
    let stop = CancellationToken::new();
    Running {
        port: address.port(),
        authority,
        task: AbortOnDropHandle::new(tokio::spawn(port.serve(services, stop.clone()))),
        stop,
    }
}

/// Of a client that trusts the server's roots, with or without a certificate of its own.
fn tls(server: &Running, certificate: Option<(CertificateDer<'static>, KeyPair)>) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots.add(server.authority.roots()[0].clone()).unwrap();
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match certificate {
        None => config.with_no_client_auth(),
        Some((certificate, key)) => {
            let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
            config.with_client_auth_cert(vec![certificate], key).unwrap()
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    TlsConnector::from(Arc::new(config))
}

async fn connect(
    server: &Running,
    certificate: Option<(CertificateDer<'static>, KeyPair)>,
) -> Result<Channel, tonic::transport::Error> {
    let connector = tls(server, certificate);
    let port = server.port;
    let connect = tower::service_fn(move |_| {
        let connector = connector.clone();
        async move {
            let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
            let name = ServerName::try_from(HOST).unwrap();
            Ok::<_, std::io::Error>(TokioIo::new(connector.connect(name, stream).await?))
        }
    });
    Endpoint::from_static("http://controller").connect_with_connector(connect).await
}

fn csr(key: &KeyPair) -> Vec<u8> {
    let mut params = CertificateParams::default();
    // A wish that must not be granted.
    params.distinguished_name.push(DnType::CommonName, "kube-system/admin");
    params.subject_alt_names =
        vec![rcgen::SanType::URI("spiffe://cluster.local/ns/sluice-system/sa/sluice-controller".try_into().unwrap())];
    params.serialize_request(key).unwrap().der().to_vec()
}

async fn sign(server: &Running, token: &str, csr_der: Vec<u8>) -> Result<SignResponse, Status> {
    let channel = connect(server, None).await.unwrap();
    let request = SignRequest { csr_der, token: token.to_owned() };
    let answer = CertificateServiceClient::new(channel).sign(request).await?;
    Ok(answer.into_inner())
}

/// What the server calls a client with this certificate.
async fn who(server: &Running, certificate: Option<(CertificateDer<'static>, KeyPair)>) -> Result<String, String> {
    let channel = connect(server, certificate).await.map_err(|error| format!("{error:?}"))?;
    let status = AggregatedDiscoveryServiceClient::new(channel)
        .stream_aggregated_resources(tokio_stream::empty())
        .await
        .map(|_| ())
        .unwrap_err();
    if status.code() == Code::AlreadyExists { Ok(status.message().to_owned()) } else { Err(format!("{status:?}")) }
}

fn new_key() -> KeyPair {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap()
}

#[tokio::test]
async fn a_pod_gets_a_certificate_of_its_own_identity_and_is_known_by_it() {
    let server = start().await;
    let key = new_key();
    let before = Timestamp::now().as_second();
    let answer = sign(&server, "good", csr(&key)).await.unwrap();
    assert_eq!(answer.trust_bundle_pem, server.authority.bundle().borrow().to_string());
    let from = answer.not_before.unwrap().seconds;
    let to = answer.not_after.unwrap().seconds;
    assert!((before - 301..=before - 295).contains(&from), "{from} {before}");
    assert_eq!(to - from, 24 * 3600 + 300);

    let certificate = CertificateDer::from_pem_slice(answer.certificate_chain_pem.as_bytes()).unwrap();
    let identity = PeerIdentity::read(&certificate, DOMAIN).unwrap();
    assert_eq!(identity.expires.as_second(), to);
    assert_eq!(
        who(&server, Some((certificate, key))).await.unwrap(),
        "spiffe://cluster.local/ns/shop/sa/web shop/web-0 5f0c"
    );
}

#[tokio::test]
async fn a_token_that_does_not_name_a_pod_gets_nothing() {
    let server = start().await;
    for (token, code, words) in [
        ("", Code::Unauthenticated, "no token"),
        ("unknown", Code::Unauthenticated, "does not accept the token"),
        ("for the API server", Code::Unauthenticated, "audience: sluice.dev"),
        ("without uid", Code::Unauthenticated, "not bound to a Pod"),
        ("unreachable", Code::Unavailable, "try again"),
    ] {
        let status = sign(&server, token, csr(&new_key())).await.unwrap_err();
        assert_eq!(status.code(), code, "{token}: {status:?}");
        assert!(status.message().contains(words), "{token}: {status:?}");
    }
}

#[tokio::test]
async fn a_request_that_its_own_key_did_not_sign_is_refused() {
    let server = start().await;
    let good = csr(&new_key());
    let mut forged = good.clone();
    *forged.last_mut().unwrap() ^= 1;
    let mut longer = good.clone();
    longer.push(0);
    let rsa = csr(&KeyPair::generate_for(&PKCS_RSA_SHA256).unwrap());
    for (bad, words) in [
        (forged, "signature"),
        (longer, "bytes follow"),
        (rsa, "another kind"),
        (vec![0x30; 5000], "4 KiB"),
        (Vec::new(), "not a certificate signing request"),
    ] {
        let status = sign(&server, "good", bad).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert!(status.message().contains(words), "{words}: {status:?}");
    }
    assert!(sign(&server, "good", good).await.is_ok());
}

#[tokio::test]
async fn a_pod_that_asks_all_the_time_has_to_wait() {
    let server = start().await;
    let csr = csr(&new_key());
    for _ in 0..10 {
        sign(&server, "good", csr.clone()).await.unwrap();
    }
    let status = sign(&server, "good", csr).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
}

#[tokio::test]
async fn a_client_without_certificate_may_ask_for_one_and_nothing_else() {
    let server = start().await;
    let refused = who(&server, None).await.unwrap_err();
    assert!(refused.contains("needs a client certificate"), "{refused}");
}

/// Whoever reaches the port may hold connections to it.
#[tokio::test]
async fn connections_that_show_no_certificate_keep_nobody_from_one() {
    let server = start().await;
    let new = || async { TcpStream::connect((Ipv4Addr::LOCALHOST, server.port)).await.unwrap() };
    let name = ServerName::try_from(HOST).unwrap();
    let mut stranger = tls(&server, None).connect(name, new().await).await.unwrap();
    let mut silent = Vec::new();
    for _ in 0..300 {
        silent.push(new().await);
    }
    let within = async {
        sign(&server, "good", csr(&new_key())).await.unwrap();
        // The oldest have given way, the others have not waited for it.
        let _ = stranger.read_to_end(&mut Vec::new()).await;
        silent[0].read_u8().await.unwrap_err();
        assert_eq!(silent[200].try_read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    };
    tokio::time::timeout(Duration::from_secs(30), within).await.unwrap();
}

/// Whoever runs as a Pod with a sidecar has its certificate.
/// After a power cut thousands of sidecars come at once. If all of them waited, those whose turn it is would be the oldest connections
/// of strangers, which give way.
#[tokio::test]
async fn who_comes_when_too_many_wait_for_the_api_server_is_sent_away_at_once() {
    let service = Certificates::new(Arc::new(authority(DOMAIN)), Known(BTreeMap::new()));
    let csr_der = csr(&new_key());
    let ask = |number: u8, token: &str| {
        let mut request = Request::new(SignRequest { csr_der: csr_der.clone(), token: token.to_owned() });
        let address = ([10, 0, 0, number], 1).into();
        request.extensions_mut().insert(Peer { address, identity: None });
        Box::pin(service.sign(request))
    };
    let mut waiting: Vec<_> = (0..160).map(|number| ask(number, "hang")).collect();
    for asked in &mut waiting {
        assert!(asked.now_or_never().is_none());
    }
    let refused = ask(160, "anything").now_or_never().expect("it waits").unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    // Whoever leaves makes room.
    waiting.truncate(31);
    assert_eq!(ask(161, "anything").await.unwrap_err().code(), Code::Unauthenticated);
}

#[tokio::test]
async fn a_pod_has_so_many_connections_and_takes_none_from_others() {
    let server = start().await;
    let name = || ServerName::try_from(HOST).unwrap();
    let of = |pod: &str| {
        let mut subject = subject(DOMAIN, "web");
        subject.pod.uid = pod.to_owned();
        let key = new_key();
        let issued = server.authority.issue(&key, &subject, Timestamp::now()).unwrap();
        tls(&server, Some((issued.certificate, key)))
    };
    let connect = async |connector: &TlsConnector| {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, server.port)).await.unwrap();
        let mut stream = connector.connect(name(), stream).await.unwrap();
        // The server's settings: it is taken.
        stream.read_u8().await.unwrap();
        stream
    };
    let within = async {
        let (greedy, other) = (of("greedy"), of("other"));
        let mut others = connect(&other).await;
        let mut taken = Vec::new();
        for _ in 0..12 {
            taken.push(connect(&greedy).await);
        }
        for first in &mut taken[..4] {
            let _ = first.read_to_end(&mut Vec::new()).await;
        }
        for stays in taken[4..].iter_mut().chain([&mut others]) {
            // The preface, SETTINGS and a PING (RFC 9113, 3.4 and 6.7), which is answered.
            stays.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
            stays.write_all(b"\0\0\x08\x06\0\0\0\0\0are you?").await.unwrap();
            let mut seen = Vec::new();
            while !seen.ends_with(b"are you?") {
                seen.push(stays.read_u8().await.unwrap());
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), within).await.unwrap();
}

#[tokio::test]
async fn certificates_that_are_old_or_strange_are_refused() {
    let server = start().await;
    let issue = |authority: &Authority, subject: &Subject, now: Timestamp| {
        let key = new_key();
        let issued = authority.issue(&key, subject, now).unwrap();
        Some((issued.certificate, key))
    };
    let now = Timestamp::now();
    let web = subject(DOMAIN, "web");
    // Proof that only what follows is wrong with the others.
    assert!(who(&server, issue(&server.authority, &web, now)).await.is_ok());
    let days_ago = now - Duration::from_secs(3 * 24 * 3600);
    let elsewhere = authority(DOMAIN);
    let mut other_namespace = web.clone();
    other_namespace.pod.namespace = "shop".to_owned();
    for (what, certificate) in [
        ("expired", issue(&server.authority, &web, days_ago)),
        ("other root", issue(&elsewhere, &web, now)),
        ("other trust domain", issue(&server.authority, &subject("example.org", "web"), now)),
        ("Pod of another namespace", issue(&server.authority, &other_namespace, now)),
    ] {
        let answer = who(&server, certificate).await;
        assert!(answer.is_err(), "{what}: {answer:?}");
    }
}

#[tokio::test]
async fn the_port_stops_when_told_even_with_open_connections() {
    let server = start().await;
    let _open = connect(&server, None).await.unwrap();
    server.stop.cancel();
    let stopped = tokio::time::timeout(Duration::from_secs(10), server.task).await;
    stopped.expect("still serving").unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_own_certificate_is_renewed_at_two_thirds_of_its_life() {
    // A life that is over at once, by the wall clock: each look finds it due.
    let authority = Arc::new(Authority::for_tests(DOMAIN, Duration::ZERO));
    let own = OwnCertificate::new(authority, provider(), subject(DOMAIN, "sluice-controller"));
    let own = own.unwrap();
    let first = own.chain();
    let keeping = {
        let own = Arc::clone(&own);
        AbortOnDropHandle::new(tokio::spawn(async move { own.keep().await }))
    };
    let renewed = async {
        while own.chain() == first {
            // Paused time: it only moves on while everything waits.
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), renewed).await.expect("never renewed");
    drop(keeping);
}
