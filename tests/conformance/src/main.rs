//! Our data path, as the fleet runs it, with a static snapshot: what the conformance suites talk to.
//!
//! Prints `ready` when all listeners are open, and ends when standard input does.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "its parent waits for the line")]

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use clap::Parser;
use prost::Message;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use sluice_proxy::{
    config::{Change, Resources},
    metrics::Metrics,
    snapshot::{
        Action, Cluster, FilterChain, Listener, MetricLabels, Protocol, ServerTls, Snapshot, Split, TrafficPolicy,
        Upstream, UpstreamProtocol,
    },
    tls::IdentityHandle,
    workers::{Options, Role, Timing, Workers},
};
use sluice_xds::{TypeUrl, envoy::service::discovery::v3::DeltaDiscoveryResponse};

const CLIENT: &str = "spiffe://conformance/ns/test/sa/client";
const SERVER: &str = "spiffe://conformance/ns/test/sa/server";

#[derive(Parser)]
struct Cli {
    /// Plaintext listeners, each with its upstream: `127.0.0.1:1=127.0.0.1:2`.
    #[arg(long, value_parser = pair)]
    plain: Vec<(SocketAddr, SocketAddr)>,
    /// Listeners with mTLS, each with its (plaintext) upstream. Clients need `client.crt` and `client.key`.
    #[arg(long, value_parser = pair)]
    tls: Vec<(SocketAddr, SocketAddr)>,
    /// Upstreams are spoken to in HTTP/1.1, whatever the client speaks.
    #[arg(long)]
    to_http1: bool,
    /// Folder with files `Cluster` and `Listener`, each a `DeltaDiscoveryResponse`: served in place of the above.
    #[arg(long)]
    xds: Option<PathBuf>,
    /// Folder into which new certificates are written.
    #[arg(long)]
    certificates: PathBuf,
    /// How long the head of a request may take, in milliseconds. Default: as the fleet has it.
    #[arg(long)]
    header_ms: Option<u64>,
    /// Connections that each listener takes at once. Default: no limit.
    #[arg(long)]
    max_connections: Option<u64>,
}

fn pair(text: &str) -> anyhow::Result<(SocketAddr, SocketAddr)> {
    let (listen, upstream) = text.split_once('=').context("it must be LISTEN=UPSTREAM")?;
    Ok((listen.parse()?, upstream.parse()?))
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    write_certificates(&cli.certificates)?;
    let mut timing = Timing::of(Role::Fleet);
    if let Some(header) = cli.header_ms {
        timing.header = Duration::from_millis(header);
    }
    let workers = Workers::start(&Options {
        role: Role::Fleet,
        timing,
        metrics: Metrics::new("conformance", 1),
        identity: identity(&cli.certificates)?,
        access_log: None,
        tracer: None,
        overload: sluice_proxy::overload::Overload::default(),
    })?;
    let protocol = if cli.to_http1 { UpstreamProtocol::Http1 } else { UpstreamProtocol::Downstream };
    let plain = cli.plain.iter().map(|pair| listener(*pair, None, protocol));
    let tls = || ServerTls { client_id: CLIENT.to_owned() };
    let tls = cli.tls.iter().map(|pair| listener(*pair, Some(tls()), protocol));
    let limited = |one| Listener { max_connections: cli.max_connections, ..one };
    let listeners: BTreeMap<_, _> =
        plain.chain(tls).map(limited).map(|one| (one.name.clone(), Arc::new(one))).collect();
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let snapshot = match &cli.xds {
            Some(folder) => from_xds(folder)?,
            None => Arc::new(Snapshot { listeners }),
        };
        let report = workers.apply(&snapshot).await?;
        anyhow::ensure!(report.rejected.is_empty(), "{report:?}");
        println!("ready");
        let wait = || std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        tokio::task::spawn_blocking(wait).await??;
        Ok(())
    })
}

fn from_xds(folder: &Path) -> anyhow::Result<Arc<Snapshot>> {
    let mut resources = Resources::default();
    for (kind, file) in [(TypeUrl::Cluster, "Cluster"), (TypeUrl::Listener, "Listener")] {
        let response = DeltaDiscoveryResponse::decode(&*fs::read(folder.join(file))?)?;
        let rejected = resources.update(Change { kind, resources: &response.resources, removed: &[] });
        anyhow::ensure!(rejected.is_empty(), "{rejected:?}");
    }
    Ok(resources.build())
}

fn listener(
    (address, upstream): (SocketAddr, SocketAddr),
    tls: Option<ServerTls>,
    protocol: UpstreamProtocol,
) -> Listener {
    let name = format!("conformance/{address}");
    let cluster = Cluster {
        name: format!("{name}/a"),
        labels: Some(MetricLabels {
            destination_namespace: "conformance".to_owned(),
            destination_service: address.port().to_string(),
            revision: "a".to_owned(),
        }),
        upstream: Upstream::Endpoints(vec![upstream]),
        near: Vec::new(),
        tls: None,
        protocol,
        connect_timeout: Duration::from_secs(1),
        traffic: TrafficPolicy::default(),
    };
    let split = Split { targets: vec![(Arc::new(cluster), 100)], mirrors: Vec::new() };
    let chain = FilterChain {
        server_name: None,
        tls,
        protocol: Protocol::http(Action::Forward { split, policy: Arc::default() }),
        idle: None,
    };
    Listener { name, address, chains: vec![chain], max_connections: None }
}

/// A root, and certificates of both sides, PEM.
fn write_certificates(folder: &Path) -> anyhow::Result<()> {
    let mut root = CertificateParams::default();
    root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    root.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    root.distinguished_name.push(DnType::CommonName, "conformance root");
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

fn identity(folder: &Path) -> anyhow::Result<IdentityHandle> {
    let read = |name: &str| -> anyhow::Result<Vec<CertificateDer<'static>>> {
        Ok(CertificateDer::pem_file_iter(folder.join(name))?.collect::<Result<_, _>>()?)
    };
    let identity = IdentityHandle::default();
    identity.set(read("server.crt")?, PrivateKeyDer::from_pem_file(folder.join("server.key"))?, read("ca.crt")?)?;
    Ok(identity)
}
