//! Many Services in the middle of a release, as the controller renders them for its fleet: of each a listener, ten routes, and
//! two revisions with mTLS and ten endpoints.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    ops::Range,
    sync::Arc,
};

use anyhow::ensure;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sluice_controller::{
    cache::CanaryKey,
    mesh::{
        Inputs, Limits, RevisionFacts, RevisionKey, Settings, View, build,
        ports::{self, PortKey},
    },
};

use crate::job;

pub(crate) const FLEET: &str = "spiffe://cluster.local/ns/sluice-system/sa/sluice-fleet";
/// Where the sidecars of all Pods listen (docs/xds.md, "Ports").
pub(crate) const SIDECAR_PORT: u16 = 20_443;
pub(crate) const NAMESPACE: &str = "bench";
/// Of each revision, beside one that may take the place of the last.
const ENDPOINTS: usize = 10;
const REVISIONS: [char; 2] = ['a', 'b'];
/// The port of the Services, and of their applications.
const PORT: u16 = 80;
const TARGET_PORT: u16 = 8080;

pub(crate) struct Fleet {
    settings: Arc<Settings>,
    /// Of the members, one for each Service.
    ports: Vec<u16>,
}

/// What of a Service changes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Release {
    /// Of the canary, in percent.
    pub(crate) weight: u8,
    /// The last Pod of the primary was replaced by another one.
    pub(crate) moved: bool,
}

impl Fleet {
    /// On ports that nobody has, from the last on: tests like to take the first.
    pub(crate) fn new(services: usize) -> anyhow::Result<Self> {
        let allowed = (ports::FIRST..=ports::LAST).rev().filter(|port| !ports::RESERVED.contains(port));
        // Without SO_REUSEPORT: a stale proxy's port is not free.
        let is_free = |port: &u16| TcpListener::bind((Ipv4Addr::UNSPECIFIED, *port)).is_ok();
        let ports: Vec<u16> = allowed.filter(is_free).take(services).collect();
        ensure!(ports.len() == services, "only {} ports of the fleet are free", ports.len());
        let settings = Settings {
            fleet_id: FLEET.parse()?,
            fleet: "default".to_owned(),
            release_namespace: "sluice-system".to_owned(),
            watched_namespace: None,
            limits: Limits {
                connections: Some(job::CONNECTIONS),
                requests: Some(job::REQUESTS),
                stream_idle: Some(job::STREAM_IDLE_SECONDS),
            },
        };
        Ok(Self { settings: Arc::new(settings), ports })
    }

    /// Where a member of the fleet serves this Service.
    pub(crate) fn address(&self, service: usize) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.ports[service]).into()
    }

    /// All resources of these Services.
    pub(crate) fn view(&self, services: Range<usize>, release: Release) -> anyhow::Result<View> {
        let mut inputs = Inputs::empty(Arc::clone(&self.settings));
        for service in services {
            let key = CanaryKey::new(NAMESPACE, name(service));
            inputs.canaries.push(read(canary(service, release))?);
            inputs.services.push(read(json!({
                "metadata": {"namespace": NAMESPACE, "name": name(service)},
                "spec": {"ports": [{"name": "http", "port": PORT, "targetPort": TARGET_PORT}]},
            }))?);
            for (index, revision) in revisions(service).into_iter().enumerate() {
                for endpoint in 0..ENDPOINTS {
                    let last = index == 0 && endpoint == ENDPOINTS - 1;
                    let endpoint = if last && release.moved { ENDPOINTS } else { endpoint };
                    inputs.pods.push(read(pod(service, &revision, ip(service, index, endpoint)))?);
                }
                let facts = RevisionFacts { service_account: name(service), ..RevisionFacts::default() };
                inputs.revisions.insert(RevisionKey { canary: key.clone(), revision }, facts);
            }
            let port = PortKey {
                fleet: self.settings.fleet.clone(),
                namespace: NAMESPACE.to_owned(),
                service: name(service),
                port: PORT,
            };
            inputs.ports.insert(port, self.ports[service]);
        }
        Ok(build(&inputs).fleet)
    }
}

fn read<T: DeserializeOwned>(value: Value) -> anyhow::Result<Arc<T>> {
    Ok(Arc::new(serde_json::from_value(value)?))
}

fn canary(service: usize, Release { weight, .. }: Release) -> Value {
    let [primary, canary] = revisions(service);
    json!({
        "apiVersion": "sluice.dev/v1beta1", "kind": "Canary",
        "metadata": {"namespace": NAMESPACE, "name": name(service)},
        "spec": {
            "targetRef": {"kind": "Deployment", "name": name(service)},
            "skipAnalysis": true,
            "service": {
                "port": PORT, "targetPort": TARGET_PORT,
                "timeout": format!("{}s", job::REQUEST_TIMEOUT.as_secs()),
                "retries": {"attempts": job::RETRIES, "retryOn": "gateway-error"},
                "match": job::many_prefixes().map(|prefix| json!({"uri": {"prefix": prefix}})).collect::<Value>(),
            },
        },
        "status": {"traffic": {"primary": primary, "canary": canary, "weight": weight}},
    })
}

fn pod(service: usize, revision: &str, ip: Ipv4Addr) -> Value {
    let pod = format!("{}-{ip}", name(service));
    json!({
        "metadata": {"namespace": NAMESPACE, "name": pod, "uid": pod, "labels": {
            "sluice.dev/canary": name(service), "sluice.dev/revision": revision,
        }},
        "status": {"phase": "Running", "podIP": ip, "conditions": [{"type": "Ready", "status": "True"}]},
    })
}

pub(crate) fn name(service: usize) -> String {
    format!("service-{service:04}")
}

/// As hashes are: ten characters, and of no other Service.
pub(crate) fn revisions(service: usize) -> [String; REVISIONS.len()] {
    REVISIONS.map(|revision| format!("{service:09}{revision}"))
}

/// What sidecars of this Service prove to be.
pub(crate) fn identity(service: usize) -> String {
    format!("spiffe://cluster.local/ns/{NAMESPACE}/sa/{}", name(service))
}

/// What a sidecar of this revision is called in the handshake.
pub(crate) fn server_name(revision: &str) -> String {
    format!("p{TARGET_PORT}.{revision}")
}

/// Where the Pods of a revision are, whether they are endpoints now or not.
pub(crate) fn sidecars(service: usize, revision: usize) -> impl Iterator<Item = SocketAddr> {
    (0..=ENDPOINTS).map(move |endpoint| (ip(service, revision, endpoint), SIDECAR_PORT).into())
}

/// From 127.2.0.1 on, one for each Pod.
fn ip(service: usize, revision: usize, endpoint: usize) -> Ipv4Addr {
    let index = (service * REVISIONS.len() + revision) * (ENDPOINTS + 1) + endpoint;
    // Each is less than 256 for less than 2,800,000 Pods.
    Ipv4Addr::new(127, (2 + index / 62_500) as u8, (index / 250 % 250) as u8, (index % 250 + 1) as u8)
}
