//! gRPC's own xDS client (grpcio) at our state-of-the-world ADS. It is not admitted to the fleet and could not reach a sidecar
//! (docs/xds.md), so the resources are what `mesh` makes, changed in what it would refuse.

use std::collections::BTreeSet;

use prost_types::Any;
use sluice_controller::mesh::Resource;
use sluice_xds::{
    envoy::{
        config::{
            cluster::v3::cluster::LbPolicy,
            core::v3::{AggregatedConfigSource, ConfigSource, config_source::ConfigSourceSpecifier},
        },
        extensions::filters::{
            http::router::v3::Router,
            network::http_connection_manager::v3::{
                HttpConnectionManager, HttpFilter, Rds, http_connection_manager::RouteSpecifier, http_filter,
            },
        },
    },
    pack,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{ChildStdin, ChildStdout},
};

use super::*;

const TARGET: &str = "web.shop:80";
const ROUTE: &str = "shop/web:80";
/// Calls that a share is measured with.
const CALLS: usize = 500;

/// A Python with grpcio; `None`, loudly, if there is none.
async fn python() -> Option<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/grpcio");
    let output = Command::new(script).output().await.expect("tests/grpcio is there");
    if output.status.success() {
        return Some(String::from_utf8(output.stdout).unwrap().trim().into());
    }
    eprintln!("SKIPPED: grpcio could not be installed: {}", String::from_utf8_lossy(&output.stderr));
    None
}

#[tokio::test]
async fn grpc_s_own_client_follows_a_release_and_loses_no_call() {
    let Some(python) = python().await else { return };
    let mut shop = Shop::at(free_address().await).await;
    shop.sidecar = "127.83.19.8";
    let server = Server::start(for_grpc(shop.snapshot("original", None, 0))).await;
    let mut client = Client::start(&python, &server, &shop).await;
    client.reaches(0).await;

    for weight in [0, 20, 60, 100] {
        server.publish(for_grpc(shop.snapshot("original", Some("bbb"), weight)));
        client.reaches(weight).await;
    }
    server.publish(for_grpc(shop.snapshot("bbb", None, 0)));
    client.reaches(100).await;
    // Back at once, as when a canary breaches.
    server.publish(for_grpc(shop.snapshot("original", Some("bbb"), 60)));
    client.reaches(60).await;
    server.publish(for_grpc(shop.snapshot("original", Some("bbb"), 0)));
    client.reaches(0).await;
    client.stop().await;
}

async fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

/// `envoy.config.listener.v3.Listener`, as a client that is its own proxy reads it (gRFC A27).
#[derive(Clone, PartialEq, Message)]
struct ApiListener {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "19")]
    api_listener: Option<Inner>,
}

/// `envoy.config.listener.v3.ApiListener`.
#[derive(Clone, PartialEq, Message)]
struct Inner {
    #[prost(message, optional, tag = "1")]
    api_listener: Option<Any>,
}

/// `ClusterLoadAssignment`, as far as gRPC asks for more than we say.
#[derive(Clone, PartialEq, Message)]
struct Assignment {
    #[prost(string, tag = "1")]
    cluster_name: String,
    #[prost(message, repeated, tag = "2")]
    endpoints: Vec<Locality>,
}

#[derive(Clone, PartialEq, Message)]
struct Locality {
    #[prost(message, optional, tag = "1")]
    locality: Option<()>,
    #[prost(bytes = "vec", repeated, tag = "2")]
    lb_endpoints: Vec<Vec<u8>>,
    #[prost(message, optional, tag = "3")]
    load_balancing_weight: Option<u32>,
}

/// What gRPC asks for (gRFC A27, A28) and we do not say, because no member of the fleet and no sidecar needs it.
fn for_grpc(mut snapshot: Snapshot) -> Snapshot {
    for (kind, resources) in &mut snapshot.fleet.resources {
        for resource in resources.values_mut() {
            match kind {
                TypeUrl::Cluster => {
                    let mut cluster: Cluster = unpack(&resource.body).unwrap();
                    cluster.lb_policy = LbPolicy::RoundRobin.into();
                    // The certificates of `UpstreamTlsContext` would come by SDS.
                    cluster.transport_socket = None;
                    resource.body = Arc::new(pack(&cluster));
                }
                TypeUrl::Endpoints => {
                    let mut assignment = Assignment::decode(resource.body.value.as_slice()).unwrap();
                    for locality in &mut assignment.endpoints {
                        locality.locality = Some(());
                        locality.load_balancing_weight = Some(1);
                    }
                    let (type_url, value) = (resource.body.type_url.clone(), assignment.encode_to_vec());
                    resource.body = Arc::new(Any { type_url, value });
                }
                TypeUrl::Listener | TypeUrl::Route => {}
            }
        }
    }
    let ads = ConfigSourceSpecifier::Ads(AggregatedConfigSource {});
    let config_source = Some(ConfigSource { config_source_specifier: Some(ads), ..ConfigSource::default() });
    let manager = HttpConnectionManager {
        route_specifier: Some(RouteSpecifier::Rds(Rds { config_source, route_config_name: ROUTE.to_owned() })),
        http_filters: vec![HttpFilter {
            name: "router".to_owned(),
            config_type: Some(http_filter::ConfigType::TypedConfig(pack(&Router::default()))),
            ..HttpFilter::default()
        }],
        ..HttpConnectionManager::default()
    };
    let api_listener = Some(Inner { api_listener: Some(pack(&manager)) });
    let listener = ApiListener { name: TARGET.to_owned(), api_listener };
    let body = Any { type_url: TypeUrl::Listener.as_str().to_owned(), value: listener.encode_to_vec() };
    let needs = Arc::new(BTreeSet::from([(TypeUrl::Route, ROUTE.to_owned())]));
    let listener = Resource { version: "1".into(), body: Arc::new(body), needs, empty: false };
    snapshot.fleet.resources.entry(TypeUrl::Listener).or_default().insert(TARGET.to_owned(), listener);
    snapshot
}

struct Client {
    child: Child,
    numbers: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    folder: Folder,
}

#[derive(Debug, serde::Deserialize)]
struct Answered {
    answers: BTreeMap<String, usize>,
    failed: Vec<String>,
}

impl Client {
    async fn start(python: &Path, server: &Server, shop: &Shop) -> Self {
        let folder = Folder::new();
        let bootstrap = json!({
            "xds_servers": [{
                "server_uri": server.address.to_string(),
                "channel_creds": [{"type": "insecure"}],
                "server_features": ["xds_v3"],
            }],
            "node": {"id": "fleet-1"},
        });
        let path = folder.0.join("bootstrap.json");
        fs::write(&path, bootstrap.to_string()).unwrap();
        let mut child = Command::new(python)
            .arg("-B")
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/envoy/calls.py"))
            .arg(format!("xds:///{TARGET}"))
            .arg(format!("original={}", shop.original))
            .arg(format!("bbb={}:20443", shop.sidecar))
            .env("GRPC_XDS_BOOTSTRAP", &path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(folder.0.join("log")).unwrap())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let (numbers, answers) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut client = Self { child, numbers, answers: BufReader::new(answers).lines(), folder };
        assert_eq!(client.line().await, "ready");
        client
    }

    async fn line(&mut self) -> String {
        // Hundreds of calls, on a machine that may have others to serve.
        let line = timeout(4 * PATIENCE, self.answers.next_line()).await;
        line.ok().and_then(Result::unwrap).unwrap_or_else(|| {
            panic!("gRPC says nothing: {}", fs::read_to_string(self.folder.0.join("log")).unwrap_or_default())
        })
    }

    /// Waits until this share of the calls goes to `bbb`. No call may fail meanwhile.
    async fn reaches(&mut self, weight: i32) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.numbers.write_all(format!("{CALLS}\n").as_bytes()).await.unwrap();
            let found: Answered = serde_json::from_str(&self.line().await).unwrap();
            assert_eq!(found.failed, [""; 0], "at {weight}");
            let share = found.answers.get("bbb").copied().unwrap_or(0) as f64 / CALLS as f64;
            let wanted = f64::from(weight) / 100.0;
            // Four standard deviations, which is exact at 0 and at 100.
            if (share - wanted).abs() <= 4.0 * (wanted * (1.0 - wanted) / CALLS as f64).sqrt() {
                return;
            }
            assert!(Instant::now() < deadline, "{weight} percent, but {found:?}");
        }
    }

    async fn stop(mut self) {
        drop(self.numbers);
        let ended = timeout(PATIENCE, self.child.wait()).await.unwrap().unwrap();
        assert!(ended.success(), "{ended}");
    }
}
