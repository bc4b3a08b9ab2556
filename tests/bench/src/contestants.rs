//! The two proxies, with the same job: 95 % to one upstream, 5 % to another.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use clap::Args;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use rustls::{
    ClientConfig,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use sluice_proxy::{
    metrics::Metrics,
    snapshot::{
        Action, Cluster, FilterChain, Listener, MetricLabels, Protocol, ServerTls, Snapshot, Split, TrafficPolicy,
        Upstream,
    },
    tls::IdentityHandle,
    workers::{Options, Role, Timing, Workers},
};
use tokio_rustls::TlsConnector;

const CLIENT: &str = "spiffe://bench/ns/bench/sa/client";
const SERVER: &str = "spiffe://bench/ns/bench/sa/server";
const SERVER_NAME: &str = "proxy.bench";
const WEIGHTS: [u32; 2] = [95, 5];

/// A child that is ended with its parent.
pub(crate) struct Running(pub(crate) Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts `program` on one core, with a high priority where that is allowed: others may use the machine.
pub(crate) fn pinned(core: usize, program: &Path) -> Command {
    let mut command = Command::new("nice");
    command.args(["-n", "-10", "taskset", "-c", &core.to_string()]).arg(program);
    command.stdin(Stdio::piped()).stderr(Stdio::inherit());
    command
}

/// Returns when the parent has gone, or wants us to.
pub(crate) async fn until_stdin_ends() {
    let wait = || std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
    let _ = tokio::task::spawn_blocking(wait).await;
}

#[derive(Args)]
pub(crate) struct Proxy {
    listen: SocketAddr,
    upstreams: Vec<SocketAddr>,
    /// Folder with the certificates; plaintext without.
    #[arg(long)]
    tls: Option<PathBuf>,
}

impl Proxy {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let identity = IdentityHandle::default();
        if let Some(folder) = &self.tls {
            let key = PrivateKeyDer::from_pem_file(folder.join("server.key"))?;
            identity.set(certificates(&folder.join("server.crt"))?, key, certificates(&folder.join("ca.crt"))?)?;
        }
        let workers = Workers::start(&Options {
            role: Role::Fleet,
            timing: Timing::of(Role::Fleet),
            metrics: Metrics::new("bench", 1),
            identity,
            access_log: None,
        })?;
        let cluster = |(index, address): (usize, &SocketAddr)| {
            let cluster = Cluster {
                name: format!("bench/bench:80/{index}"),
                labels: Some(MetricLabels {
                    destination_namespace: "bench".to_owned(),
                    destination_service: "bench".to_owned(),
                    revision: index.to_string(),
                }),
                upstream: Upstream::Endpoints(vec![*address]),
                near: Vec::new(),
                tls: None,
                connect_timeout: Duration::from_secs(1),
                traffic: TrafficPolicy::default(),
            };
            (Arc::new(cluster), WEIGHTS[index])
        };
        let targets = self.upstreams.iter().take(WEIGHTS.len()).enumerate().map(cluster).collect();
        let chain = FilterChain {
            server_name: self.tls.is_some().then(|| SERVER_NAME.to_owned()),
            tls: self.tls.is_some().then(|| ServerTls { client_id: CLIENT.to_owned() }),
            protocol: Protocol::Http(Action::Forward { split: Split { targets }, policy: Arc::default() }),
        };
        let listener = Listener { name: "bench".to_owned(), address: self.listen, chains: vec![chain] };
        let snapshot = Snapshot { listeners: BTreeMap::from([("bench".to_owned(), Arc::new(listener))]) };
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
            let report = workers.apply(&snapshot).await?;
            anyhow::ensure!(report.rejected.is_empty(), "{report:?}");
            until_stdin_ends().await;
            Ok(())
        })
    }
}

/// Envoy's configuration for the same, with what a mesh does not use switched off: no access log, no request ids, no
/// extra headers, circuit breakers out of the way.
pub(crate) fn envoy_config(listen: SocketAddr, upstreams: [SocketAddr; 2], tls: Option<&Path>) -> serde_json::Value {
    use serde_json::json;
    let address = |address: SocketAddr| json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}});
    let cluster = |name: &str, upstream: SocketAddr| {
        json!({
            "name": name, "type": "STATIC", "connect_timeout": "1s", "lb_policy": "LEAST_REQUEST",
            "circuit_breakers": {"thresholds": [{"max_connections": 100_000, "max_pending_requests": 100_000,
                "max_requests": 100_000, "max_retries": 100_000}]},
            "load_assignment": {"cluster_name": name,
                "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(upstream)}}]}]},
        })
    };
    let mut chain = json!({"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "bench", "codec_type": "AUTO", "generate_request_id": false,
        "server_header_transformation": "PASS_THROUGH", "use_remote_address": true,
        "route_config": {"virtual_hosts": [{"name": "bench", "domains": ["*"], "routes": [{
            "match": {"prefix": "/"},
            "route": {"timeout": "0s", "weighted_clusters": {"clusters": [
                {"name": "a", "weight": WEIGHTS[0]}, {"name": "b", "weight": WEIGHTS[1]}]}},
        }]}]},
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router",
            "suppress_envoy_headers": true}}],
    }}]});
    if let Some(folder) = tls {
        let file = |name: &str| json!({"filename": folder.join(name)});
        chain["transport_socket"] = json!({"name": "envoy.transport_sockets.tls", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            "require_client_certificate": true,
            "common_tls_context": {
                "tls_params": {"tls_minimum_protocol_version": "TLSv1_3"},
                "alpn_protocols": ["h2", "http/1.1"],
                "tls_certificates": [
                    {"certificate_chain": file("server.crt"), "private_key": file("server.key")}],
                "validation_context": {"trusted_ca": file("ca.crt"), "match_typed_subject_alt_names": [
                    {"san_type": "URI", "matcher": {"exact": CLIENT}}]},
            },
        }});
    }
    json!({"static_resources": {
        "listeners": [{"name": "bench", "address": address(listen), "filter_chains": [chain]}],
        "clusters": [cluster("a", upstreams[0]), cluster("b", upstreams[1])],
    }})
}

/// Writes a root and the certificates of both sides.
pub(crate) fn write_certificates(folder: &Path) -> anyhow::Result<()> {
    let mut root = CertificateParams::default();
    root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    root.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    root.distinguished_name.push(DnType::CommonName, "bench root");
    let key = KeyPair::generate()?;
    fs::write(folder.join("ca.crt"), root.self_signed(&key)?.pem())?;
    let issuer = Issuer::new(root, key);
    for (name, id) in [("client", CLIENT), ("server", SERVER)] {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(id.try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate()?;
        fs::write(folder.join(format!("{name}.crt")), params.signed_by(&key, &issuer)?.pem())?;
        fs::write(folder.join(format!("{name}.key")), key.serialize_pem())?;
    }
    Ok(())
}

/// The client's side of mTLS, with one cipher suite, so that both proxies do the same work.
pub(crate) fn client_tls(folder: &Path) -> anyhow::Result<(TlsConnector, ServerName<'static>)> {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites = vec![aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256];
    provider.kx_groups = vec![aws_lc_rs::kx_group::X25519];
    // The proxy's name is a SPIFFE id, which rustls's own check of DNS names does not know; ours does.
    let ours = IdentityHandle::default();
    let key = || PrivateKeyDer::from_pem_file(folder.join("client.key"));
    ours.set(certificates(&folder.join("client.crt"))?, key()?, certificates(&folder.join("ca.crt"))?)?;
    let verifier = ours.server_verifier(SERVER);
    let config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(certificates(&folder.join("client.crt"))?, key()?)?;
    Ok((TlsConnector::from(Arc::new(config)), ServerName::try_from(SERVER_NAME)?))
}

fn certificates(file: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let read = CertificateDer::pem_file_iter(file).with_context(|| format!("reading {}", file.display()))?;
    Ok(read.collect::<Result<_, _>>()?)
}
