//! Our proxy: its data path with a static snapshot, on one thread; and all of it.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use sluice_proxy::{
    metrics::Metrics,
    overload::Overload,
    process,
    snapshot::{
        Action, ClientTls, Cluster, FilterChain, Limits, Listener, MetricLabels, Policy, Protocol, RetryOn,
        RetryPolicy, Route, RouteMatch, ServerTls, Snapshot, Split, StringMatch, StringRule, TrafficPolicy, Upstream,
        UpstreamProtocol,
    },
    tls::IdentityHandle,
    workers::{self, Options, Timing, Workers},
};

use crate::{
    certificates::{self, CLIENT, PROXY, SERVER_NAME, UPSTREAM},
    job::{self, Job, Role, Security, Service, WEIGHTS},
};

/// Serves until standard input ends.
pub(crate) fn run(job: &Job) -> anyhow::Result<()> {
    let (role, own) = match job.role {
        Role::Fleet => (workers::Role::Fleet, "proxy"),
        Role::Sidecar => (workers::Role::Sidecar, "upstream"),
    };
    let identity = if job.downstream == Security::Mtls || job.upstream == Security::Mtls {
        certificates::identity(&job.folder, own)?
    } else {
        IdentityHandle::default()
    };
    let metrics = Metrics::new("bench", 1);
    let timing = Timing::of(role);
    let (access_log, tracer, overload) = (None, None, Overload::default());
    let workers = Workers::start(&Options { role, timing, metrics, identity, access_log, tracer, overload })?;
    let snapshot = snapshot(job);
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let report = workers.apply(&snapshot).await?;
        anyhow::ensure!(report.rejected.is_empty(), "{report:?}");
        drop(snapshot);
        job::until_stdin_ends().await;
        Ok(())
    })
}

/// As the binary does, until standard input ends.
pub(crate) fn fleet(settings: process::Settings) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(async {
        tokio::select! {
            ended = process::run(workers::Role::Fleet, settings) => ended.map_err(anyhow::Error::from),
            () = job::until_stdin_ends() => Ok(()),
        }
    });
    runtime.shutdown_background();
    result
}

fn snapshot(job: &Job) -> Snapshot {
    let policy = Arc::new(match job.role {
        Role::Fleet => Policy {
            timeout: Some(job::REQUEST_TIMEOUT),
            retry: Some(RetryPolicy { on: vec![RetryOn::GatewayError], retries: job::RETRIES, per_try_timeout: None }),
            ..Policy::default()
        },
        Role::Sidecar => Policy::default(),
    });
    let listener = |service: &Service| {
        let targets = service.revisions.iter().enumerate().map(|(revision, endpoints)| {
            (Arc::new(cluster(job, &service.host, revision, endpoints)), WEIGHTS[revision])
        });
        let targets: Vec<_> = targets.collect();
        let split = || Split { targets: targets.clone(), mirrors: Vec::new() };
        let route = |prefix: String| Route {
            matches: RouteMatch {
                path: StringMatch { rule: StringRule::Prefix(prefix), ignore_case: false },
                ..RouteMatch::default()
            },
            action: Action::Forward { split: split(), policy: Arc::clone(&policy) },
        };
        let mtls = job.downstream == Security::Mtls;
        let chain = FilterChain {
            server_name: mtls.then(|| SERVER_NAME.to_owned()),
            tls: mtls.then(|| ServerTls {
                client_id: match job.role {
                    Role::Fleet => CLIENT.to_owned(),
                    Role::Sidecar => PROXY.to_owned(),
                },
            }),
            protocol: match job.protocol {
                job::Protocol::Tcp => Protocol::Tcp(split()),
                job::Protocol::Http1 | job::Protocol::Http2 | job::Protocol::Grpc | job::Protocol::WebSocket => {
                    Protocol::Http(job.prefixes().map(route).collect())
                }
            },
            idle: Some(Duration::from_secs(job::STREAM_IDLE_SECONDS.into())),
        };
        let name = format!("bench/{}/{}", service.host, service.listen);
        let max_connections = match job.role {
            Role::Fleet => Some(u64::from(job::CONNECTIONS)),
            Role::Sidecar => None,
        };
        (name.clone(), Arc::new(Listener { name, address: service.listen, chains: vec![chain], max_connections }))
    };
    Snapshot { listeners: job.services.iter().map(listener).collect::<BTreeMap<_, _>>() }
}

fn cluster(job: &Job, service: &str, revision: usize, endpoints: &[SocketAddr]) -> Cluster {
    let limits = match job.role {
        // As the controller says it for a Canary that says nothing.
        Role::Fleet => Limits {
            connections: Some(u32::MAX),
            pending: Some(job::REQUESTS),
            requests: Some(job::REQUESTS),
            retries: None,
        },
        Role::Sidecar => Limits::default(),
    };
    Cluster {
        name: format!("bench/{service}:80/{revision}"),
        labels: match job.role {
            Role::Fleet => Some(MetricLabels {
                destination_namespace: "bench".to_owned(),
                destination_service: service.to_owned(),
                revision: revision.to_string(),
            }),
            Role::Sidecar => None,
        },
        upstream: match (job.role, endpoints) {
            (Role::Sidecar, [application]) => Upstream::OriginalDst { port: application.port() },
            (Role::Fleet | Role::Sidecar, endpoints) => Upstream::Endpoints(endpoints.to_vec()),
        },
        tls: (job.upstream == Security::Mtls)
            .then(|| ClientTls { sni: SERVER_NAME.to_owned(), server_id: UPSTREAM.to_owned() }),
        protocol: if job.to_http1 { UpstreamProtocol::Http1 } else { UpstreamProtocol::Downstream },
        connect_timeout: job::CONNECT_TIMEOUT,
        traffic: TrafficPolicy { limits, ..TrafficPolicy::default() },
        near: Vec::new(),
    }
}
