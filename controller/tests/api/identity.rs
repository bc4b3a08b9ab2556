//! Certificates on the word of a real API server, and what is kept in it for them.

use std::{net::Ipv4Addr, sync::Arc, time::Duration};

use futures::StreamExt as _;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::{
    authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
    core::v1::{ConfigMap, Pod, Secret, ServiceAccount},
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, ObjectMeta, Patch, PatchParams, PostParams},
    runtime::{WatchStreamExt as _, watcher},
};
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::{ClientConfig, RootCertStore, crypto::CryptoProvider};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use serde_json::json;
use sluice_controller::{
    cache::Cache,
    identity::{
        AUDIENCE, Authority, CA_SECRET, Certificates, GrpcPort, KubeTokenReviews, OwnCertificate, PeerIdentity,
        Rotation, ServeError, Subject, Times, TrustBundle,
    },
    lease::{Election, LeaseSettings},
};
use sluice_crds::{Canary, labels};
use sluice_xds::{
    PodSubject, SpiffeId,
    sluice::identity::v1::{SignRequest, SignResponse, certificate_service_client::CertificateServiceClient},
};
use tokio::{
    net::TcpStream,
    sync::{Mutex, MutexGuard},
    task::JoinSet,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::{Code, Status, service::Routes, transport::Endpoint};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::server;

const DOMAIN: &str = "cluster.local";
const HOST: &str = "sluice-controller.sluice-system.svc";
const SOON: Duration = Duration::from_secs(60);
const TIMES: Times = Times { life: Duration::from_secs(86_400), spread: Duration::from_secs(300) };

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

async fn authority(client: &Client, namespace: &str) -> Authority {
    Authority::open(client, namespace, DOMAIN, TIMES).await.unwrap()
}

struct Port {
    port: u16,
    authority: Arc<Authority>,
    _serving: AbortOnDropHandle<Result<(), ServeError>>,
}

async fn serve(client: &Client, namespace: &str) -> Port {
    let authority = Arc::new(authority(client, namespace).await);
    let subject = Subject {
        id: SpiffeId::new(DOMAIN, namespace, "sluice-controller").unwrap(),
        pod: PodSubject { namespace: namespace.to_owned(), pod: "controller-0".to_owned(), uid: "c0".to_owned() },
        dns_names: vec![HOST.to_owned()],
    };
    let own = OwnCertificate::new(Arc::clone(&authority), provider(), subject).unwrap();
    let address = (Ipv4Addr::LOCALHOST, 0).into();
    let port = GrpcPort::bind(address, Arc::clone(&authority), own, provider()).await.unwrap();
    let address = port.address().unwrap();
    let reviews = KubeTokenReviews::new(client.clone());
    let services = Routes::new(Certificates::server(Arc::clone(&authority), reviews));
    let serving = tokio::spawn(port.serve(services, CancellationToken::new()));
    Port { port: address.port(), authority, _serving: AbortOnDropHandle::new(serving) }
}

async fn sign(server: &Port, token: String) -> Result<SignResponse, Status> {
    let mut roots = RootCertStore::empty();
    roots.add(server.authority.roots()[0].clone()).unwrap();
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let port = server.port;
    let connect = tower::service_fn(move |_| {
        let connector = connector.clone();
        async move {
            let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
            Ok::<_, std::io::Error>(TokioIo::new(connector.connect(ServerName::try_from(HOST).unwrap(), stream).await?))
        }
    });
    let channel = Endpoint::from_static("http://controller").connect_with_connector(connect).await.unwrap();
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let csr_der = CertificateParams::default().serialize_request(&key).unwrap().der().to_vec();
    Ok(CertificateServiceClient::new(channel).sign(SignRequest { csr_der, token }).await?.into_inner())
}

/// A token as the kubelet would project it; not bound to a Pod for `None`.
async fn token(client: &Client, namespace: &str, audience: &str, pod: Option<&Pod>) -> String {
    let bound = pod.map(|pod| BoundObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        name: pod.metadata.name.clone(),
        uid: pod.metadata.uid.clone(),
    });
    let request = TokenRequest {
        spec: TokenRequestSpec {
            audiences: vec![audience.to_owned()],
            bound_object_ref: bound,
            expiration_seconds: Some(3600),
        },
        ..TokenRequest::default()
    };
    let api: Api<ServiceAccount> = Api::namespaced(client.clone(), namespace);
    let answer = api.create_token_request("web", &PostParams::default(), &request).await.unwrap();
    answer.status.unwrap().token
}

#[tokio::test]
async fn only_the_projected_token_of_a_living_pod_gets_a_certificate() {
    let Some((client, _)) = server::client().await else { return };
    let namespace = server::namespace(&client, "identity-tokens").await;
    let account = ServiceAccount {
        metadata: ObjectMeta { name: Some("web".to_owned()), ..ObjectMeta::default() },
        ..ServiceAccount::default()
    };
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), &namespace);
    accounts.create(&PostParams::default(), &account).await.unwrap();
    let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": "web-0"},
        "spec": {"serviceAccountName": "web", "containers": [{"name": "web", "image": "web"}]},
    }))
    .unwrap();
    let pod = pods.create(&PostParams::default(), &pod).await.unwrap();
    let server = serve(&client, &namespace).await;

    let good = token(&client, &namespace, AUDIENCE, Some(&pod)).await;
    let answer = sign(&server, good.clone()).await.unwrap();
    let leaf = CertificateDer::from_pem_slice(answer.certificate_chain_pem.as_bytes()).unwrap();
    let identity = PeerIdentity::read(&leaf, DOMAIN).unwrap();
    assert_eq!(identity.id.to_string(), format!("spiffe://{DOMAIN}/ns/{namespace}/sa/web"));
    assert_eq!(identity.pod.common_name(), format!("{namespace}/web-0"));
    assert_eq!(Some(identity.pod.uid), pod.metadata.uid);

    let for_api_server = token(&client, &namespace, "https://kubernetes.default.svc.cluster.local", Some(&pod)).await;
    let unbound = token(&client, &namespace, AUDIENCE, None).await;
    for (what, token, words) in [
        ("made up", "nonsense".to_owned(), "does not accept the token"),
        ("of the API server's audience", for_api_server, "does not accept the token"),
        ("not bound to a Pod", unbound, "not bound to a Pod"),
    ] {
        let status = sign(&server, token).await.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated, "{what}: {status:?}");
        assert!(status.message().contains(words), "{what}: {status:?}");
    }

    pods.delete("web-0", &DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() }).await.unwrap();
    // The API server remembers its answers for ten seconds.
    let refused = async {
        loop {
            match sign(&server, good.clone()).await {
                Ok(_) => tokio::time::sleep(Duration::from_secs(2)).await,
                Err(status) => return status,
            }
        }
    };
    let status = timeout(SOON, refused).await.expect("the token of a Pod that is gone is still good");
    assert_eq!(status.code(), Code::Unauthenticated, "{status:?}");
}

#[tokio::test]
async fn replicas_that_start_at_once_agree_on_one_root_and_keep_it() {
    let Some((client, _)) = server::client().await else { return };
    let namespace = server::namespace(&client, "identity-root").await;
    let all: [Authority; 3] =
        futures::future::join_all((0..3).map(|_| authority(&client, &namespace))).await.try_into().unwrap();
    assert!(all.iter().all(|one| one.roots() == all[0].roots()));
    assert_eq!(authority(&client, &namespace).await.roots(), all[0].roots());

    // One that cannot be used is never replaced silently.
    let secrets: Api<Secret> = Api::namespaced(client.clone(), &namespace);
    let broken = json!({"stringData": {"tls.key": "nonsense"}});
    secrets.patch(CA_SECRET, &PatchParams::default(), &Patch::Merge(&broken)).await.unwrap();
    let error = Authority::open(&client, &namespace, DOMAIN, TIMES).await.unwrap_err();
    assert!(error.to_string().contains("tls.key is not a private key"), "{error}");
}

/// Waits until the bundle in `namespace` is as `wanted` says.
async fn bundle_is(client: &Client, namespace: &str, what: &str, wanted: impl Fn(Option<&ConfigMap>) -> bool) {
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let by_name = watcher::Config::default().fields(&format!("metadata.name={}", labels::TRUST_BUNDLE));
    let mut found = None;
    let waiting = async {
        let mut events = std::pin::pin!(watcher(api, by_name).default_backoff());
        while let Some(event) = events.next().await {
            match event.unwrap() {
                watcher::Event::Apply(map) | watcher::Event::InitApply(map) => found = Some(map),
                watcher::Event::Delete(_) | watcher::Event::Init => found = None,
                watcher::Event::InitDone => {}
            }
            if wanted(found.as_ref()) {
                return;
            }
        }
    };
    timeout(SOON, waiting).await.unwrap_or_else(|_| panic!("the bundle in {namespace} is not {what}"));
}

/// One leader at a time writes into the namespaces of all Canaries: two would write over each other for ever.
static LEADS: Mutex<()> = Mutex::const_new(());

/// What the leader keeps in a release namespace, and in that of each Canary.
struct Kept {
    authority: Arc<Authority>,
    _tasks: JoinSet<()>,
    _leads: MutexGuard<'static, ()>,
}

impl Kept {
    async fn new(client: &Client, release: &str, times: Times) -> Self {
        let leads = LEADS.lock().await;
        let mut tasks = JoinSet::new();
        let cache = Cache::start(client, &server::scope(release), &mut tasks);
        cache.warm().await.unwrap();
        let settings = LeaseSettings {
            namespace: release.to_owned(),
            name: "bundle".to_owned(),
            holder: "me".to_owned(),
            duration: Duration::from_secs(15),
            renew_deadline: Duration::from_secs(10),
            retry: Duration::from_secs(2),
        };
        let (election, lease) = Election::new(client.clone(), settings).unwrap();
        tasks.spawn(async move {
            election.run(CancellationToken::new()).await.unwrap();
        });
        let authority = Arc::new(Authority::open(client, release, DOMAIN, times).await.unwrap());
        let bundle = TrustBundle {
            client: client.clone(),
            authority: Arc::clone(&authority),
            release_namespace: release.to_owned(),
            watched: None,
        };
        tasks.spawn(bundle.keep(cache, lease.clone()));
        let rotation =
            Rotation { client: client.clone(), authority: Arc::clone(&authority), namespace: release.to_owned() };
        tasks.spawn(rotation.follow(lease));
        Self { authority, _tasks: tasks, _leads: leads }
    }
}

async fn canary_in(client: &Client, namespace: &str) -> (Api<Canary>, Canary) {
    let canary: Canary = serde_json::from_value(json!({
        "apiVersion": "sluice.dev/v1beta1", "kind": "Canary", "metadata": {"name": "web"},
        "spec": {
            "targetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web"},
            "service": {"port": 80}, "skipAnalysis": true,
        },
    }))
    .unwrap();
    let canaries: Api<Canary> = Api::namespaced(client.clone(), namespace);
    let canary = canaries.create(&PostParams::default(), &canary).await.unwrap();
    (canaries, canary)
}

#[tokio::test]
async fn the_trust_bundle_is_in_every_namespace_with_a_canary_and_nowhere_else() {
    let Some((client, _)) = server::client().await else { return };
    let release = server::namespace(&client, "identity-bundle").await;
    let shop = server::namespace(&client, "identity-bundle-shop").await;
    let kept = Kept::new(&client, &release, TIMES).await;
    let pem = kept.authority.bundle().borrow().to_string();
    let right = move |map: Option<&ConfigMap>| {
        map.and_then(|map| map.data.as_ref()?.get("ca.crt")).is_some_and(|data| *data == pem)
    };
    bundle_is(&client, &release, "there", &right).await;

    let (canaries, canary) = canary_in(&client, &shop).await;
    bundle_is(&client, &shop, "there", &right).await;

    // Whoever edits or deletes it meets the leader.
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), &shop);
    let edited = json!({"data": {"ca.crt": "edited"}});
    api.patch(labels::TRUST_BUNDLE, &PatchParams::default(), &Patch::Merge(&edited)).await.unwrap();
    bundle_is(&client, &shop, "mended", &right).await;
    let first = api.get(labels::TRUST_BUNDLE).await.unwrap();
    api.delete(labels::TRUST_BUNDLE, &DeleteParams::default()).await.unwrap();
    bundle_is(&client, &shop, "there again", |map| {
        right(map) && map.is_some_and(|map| map.metadata.uid != first.metadata.uid)
    })
    .await;

    canaries.delete(&canary.name_any(), &DeleteParams::default()).await.unwrap();
    bundle_is(&client, &shop, "gone", |map| map.is_none()).await;
    bundle_is(&client, &release, "there", &right).await;
}

fn roots_in(map: Option<&ConfigMap>) -> Vec<CertificateDer<'static>> {
    let pem = map.and_then(|map| map.data.as_ref()?.get("ca.crt")).map_or("", String::as_str);
    CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>().unwrap_or_default()
}

/// The certificate that a proxy would get now.
fn signed_by(authority: &Authority, root: &CertificateDer<'_>) -> bool {
    let subject = Subject {
        id: SpiffeId::new(DOMAIN, "shop", "web").unwrap(),
        pod: PodSubject { namespace: "shop".to_owned(), pod: "web-0".to_owned(), uid: "5f0c".to_owned() },
        dns_names: Vec::new(),
    };
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let leaf = authority.issue(&key, &subject, jiff::Timestamp::now()).unwrap().certificate;
    let (_, leaf) = X509Certificate::from_der(&leaf).unwrap();
    let (_, root) = X509Certificate::from_der(root).unwrap();
    leaf.verify_signature(Some(root.public_key())).is_ok()
}

#[tokio::test]
async fn another_root_is_made_known_before_it_signs() {
    let Some((client, _)) = server::client().await else { return };
    let release = server::namespace(&client, "identity-another").await;
    let shop = server::namespace(&client, "identity-another-shop").await;
    let kept = Kept::new(&client, &release, TIMES).await;
    canary_in(&client, &shop).await;
    let old = kept.authority.roots()[0].clone();
    bundle_is(&client, &shop, "of the first root", |map| roots_in(map) == [old.clone()]).await;

    // Whoever deletes the Secret gets a new root. A standby learns of it, too.
    let standby = authority(&client, &release).await;
    let secrets: Api<Secret> = Api::namespaced(client.clone(), &release);
    secrets.delete(CA_SECRET, &DeleteParams::default()).await.unwrap();
    let both = |map: Option<&ConfigMap>| roots_in(map).len() == 2 && roots_in(map).contains(&old);
    bundle_is(&client, &shop, "of both roots", both).await;
    assert!(signed_by(&kept.authority, &old), "not every proxy knows the new root yet");
    assert!(signed_by(&standby, &old));

    // A replica that starts meanwhile has nothing to sign with; and what somebody does to the bundle changes nothing.
    let late = authority(&client, &release).await;
    assert_eq!(late.roots().len(), 2);
    let memory: Api<ConfigMap> = Api::namespaced(client.clone(), &release);
    memory.delete(labels::TRUST_BUNDLE, &DeleteParams::default()).await.unwrap();
    bundle_is(&client, &release, "there again, with both roots", both).await;
}

#[tokio::test]
async fn another_root_signs_when_it_is_known_and_the_former_one_leaves_last() {
    let Some((client, _)) = server::client().await else { return };
    let release = server::namespace(&client, "identity-rotation").await;
    let shop = server::namespace(&client, "identity-rotation-shop").await;
    let times = Times { life: Duration::from_secs(3), spread: Duration::from_secs(3) };
    let kept = Kept::new(&client, &release, times).await;
    canary_in(&client, &shop).await;
    let old = kept.authority.roots()[0].clone();
    bundle_is(&client, &shop, "of the first root", |map| roots_in(map) == [old.clone()]).await;

    let secrets: Api<Secret> = Api::namespaced(client.clone(), &release);
    secrets.delete(CA_SECRET, &DeleteParams::default()).await.unwrap();
    bundle_is(&client, &shop, "of both roots", |map| roots_in(map).len() == 2).await;
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), &shop);
    let new = roots_in(Some(&maps.get(labels::TRUST_BUNDLE).await.unwrap()))[0].clone();
    let signs = async {
        let mut bundle = kept.authority.bundle();
        while !signed_by(&kept.authority, &new) {
            // Signing changes no bundle, so there is a deadline for each look.
            let _ = timeout(Duration::from_millis(200), bundle.changed()).await;
        }
    };
    timeout(SOON, signs).await.expect("the new root never signs");
    bundle_is(&client, &shop, "of the new root alone", |map| roots_in(map) == [new.clone()]).await;
    let alone = async {
        let mut bundle = kept.authority.bundle();
        while kept.authority.roots() != [new.clone()] {
            bundle.changed().await.unwrap();
        }
    };
    timeout(SOON, alone).await.expect("the old root is trusted for ever");
}
