//! The controller's settings: flags and environment. The chart sets them; its values.yaml explains them.

use std::{ffi::OsString, net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, FromArgMatches as _, ValueEnum};
use sluice_xds::SpiffeId;

use crate::{
    admission::{Protection, objects::Address},
    analysis,
    cache::Scope,
    delivery::template::Sidecar,
    lease::LeaseSettings,
    mesh,
};

/// Name of the controllers' Lease, Deployment, service account and headless Service.
const CONTROLLER: &str = "sluice-controller";
/// Port of the webhook's Service.
const WEBHOOK_PORT: u16 = 443;

/// The command line.
#[derive(Debug)]
pub enum CommandLine {
    /// Without a command: the controller.
    Run(Box<Settings>),
    Uninstall(UninstallSettings),
}

impl CommandLine {
    /// # Errors
    /// What is wrong with it, or the help that was asked for.
    pub fn read<I, T>(arguments: I) -> Result<Self, clap::Error>
    where
        I: IntoIterator<Item = T>,
        T: Into<OsString> + Clone,
    {
        let matches = command().try_get_matches_from(arguments)?;
        match matches.subcommand() {
            Some((_, matches)) => Ok(Self::Uninstall(UninstallSettings::from_arg_matches(matches)?)),
            None => Ok(Self::Run(Box::new(Settings::from_arg_matches(&matches)?))),
        }
    }
}

/// Put together by hand: a derived one takes optional settings for absent if all of them come from the environment.
fn command() -> clap::Command {
    let uninstall = clap::Command::new("uninstall").about(
        "Before the chart is uninstalled: waits until no Canary holds traffic, stops the controllers, and removes our \
         admission policies and webhook configuration",
    );
    let controller = clap::Command::new("sluice-controller")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Progressive delivery for Kubernetes: the control plane")
        .subcommand_negates_reqs(true)
        .args_conflicts_with_subcommands(true);
    Settings::augment_args(controller).subcommand(UninstallSettings::augment_args(uninstall))
}

#[derive(Debug, Args)]
pub struct UninstallSettings {
    /// Namespace of the installation.
    #[arg(long, env = "POD_NAMESPACE")]
    pub pod_namespace: String,
    /// Deployment of the controllers.
    #[arg(long, env = "SLUICE_DEPLOYMENT", default_value = CONTROLLER)]
    pub deployment: String,
    /// Only Canaries of the installation's namespace.
    #[arg(long, env = "SLUICE_NAMESPACED")]
    pub namespaced: bool,
    /// For everything. When it has passed, the installation stays.
    #[arg(long, env = "SLUICE_UNINSTALL_SECONDS", default_value_t = 240)]
    pub timeout_seconds: u64,
    #[command(flatten)]
    pub log: LogSettings,
}

#[derive(Clone, Debug, Args)]
pub struct LogSettings {
    /// Filter of the log, such as `info` or `sluice_controller=debug`.
    #[arg(long = "log", env = "SLUICE_LOG", default_value = "info")]
    pub filter: String,
    #[arg(long = "log-format", env = "SLUICE_LOG_FORMAT", value_enum, default_value_t = LogFormat::Json)]
    pub format: LogFormat,
}

#[derive(Clone, Debug, Args)]
pub struct Settings {
    /// Name of our Pod.
    #[arg(long, env = "POD_NAME")]
    pub pod_name: String,
    /// Namespace of our Pod, of the fleet and of everything that belongs to the installation.
    #[arg(long, env = "POD_NAMESPACE")]
    pub pod_namespace: String,
    /// Uid of our Pod: the holder of the Lease.
    #[arg(long, env = "POD_UID")]
    pub pod_uid: String,
    /// Trust domain of all SPIFFE ids.
    #[arg(long, env = "SLUICE_TRUST_DOMAIN", default_value = "cluster.local")]
    pub trust_domain: String,
    /// Life of the certificates of proxies.
    #[arg(long, env = "SLUICE_CERTIFICATE_SECONDS", default_value_t = 86_400)]
    pub certificate_seconds: u64,
    /// From the publication of another root certificate to its first signature: how long it takes until every Pod has the new trust
    /// bundle in its volume. The kubelet needs up to two minutes with its defaults (`syncFrequency` and its cache).
    #[arg(long, env = "SLUICE_ROOT_SPREAD_SECONDS", default_value_t = 300)]
    pub root_spread_seconds: u64,
    /// Service account of the controllers.
    #[arg(long, env = "SLUICE_SERVICE_ACCOUNT", default_value = CONTROLLER)]
    pub service_account: String,
    /// Headless Service of the controllers.
    #[arg(long, env = "SLUICE_SERVICE", default_value = CONTROLLER)]
    pub service: String,
    /// Service account of the fleet: the only one whom sidecars admit.
    #[arg(long, env = "SLUICE_FLEET_SERVICE_ACCOUNT", default_value = "sluice-fleet")]
    pub fleet_service_account: String,
    /// Name of the fleet: value of the label `sluice.dev/fleet` on its Pods.
    #[arg(long, env = "SLUICE_FLEET", default_value = "default")]
    pub fleet: String,
    /// The fleet's `SLUICE_DRAIN_SECONDS`: so long a member that is out of every slice may still serve open connections.
    #[arg(long, env = "SLUICE_FLEET_DRAIN_SECONDS", default_value_t = 60)]
    pub fleet_drain_seconds: u64,
    /// Most connections from clients of each member of the fleet, for each port of a Service. 0 is any number.
    #[arg(long, env = "SLUICE_FLEET_CONNECTIONS_PER_SERVICE", default_value_t = 4096)]
    pub fleet_connections_per_service: u32,
    /// Most open requests of each member of the fleet, for each revision behind a port of a Service. A Canary may ask for less.
    /// 0 is any number.
    #[arg(long, env = "SLUICE_FLEET_REQUESTS_PER_SERVICE", default_value_t = 2048)]
    pub fleet_requests_per_service: u32,
    /// Seconds after which the fleet ends a stream, WebSocket or TCP connection on which nothing has passed. 0 is never.
    #[arg(long, env = "SLUICE_FLEET_STREAM_IDLE_SECONDS", default_value_t = 3600)]
    pub fleet_stream_idle_seconds: u32,
    /// Image of the sidecar.
    #[arg(long, env = "SLUICE_PROXY_IMAGE")]
    pub proxy_image: String,
    /// `Always`, `IfNotPresent` or `Never`; Kubernetes' default where absent.
    #[arg(long, env = "SLUICE_PROXY_PULL_POLICY")]
    pub proxy_pull_policy: Option<String>,
    #[arg(long, env = "SLUICE_SIDECAR_CPU_REQUEST", default_value = "20m")]
    pub sidecar_cpu_request: String,
    #[arg(long, env = "SLUICE_SIDECAR_MEMORY_REQUEST", default_value = "24Mi")]
    pub sidecar_memory_request: String,
    #[arg(long, env = "SLUICE_SIDECAR_CPU_LIMIT")]
    pub sidecar_cpu_limit: Option<String>,
    #[arg(long, env = "SLUICE_SIDECAR_MEMORY_LIMIT")]
    pub sidecar_memory_limit: Option<String>,
    /// Prometheus of Canaries that do not say `metricsServer`.
    #[arg(long, env = "SLUICE_METRICS_SERVER")]
    pub metrics_server: Option<String>,
    /// Folder with what it asks of who asks it, each in a file of its own: `token`, or `username` and `password`; and `ca.crt`.
    #[arg(long, env = "SLUICE_METRICS_CREDENTIALS")]
    pub metrics_credentials: Option<PathBuf>,
    /// Label matchers for the fleet's series, such as `cluster="eu-1"`, for a Prometheus that holds several clusters.
    #[arg(long, env = "SLUICE_METRICS_MATCHERS")]
    pub metrics_matchers: Option<String>,
    /// Floor of time for kube-proxy at takeover and hand-back.
    #[arg(long, env = "SLUICE_SETTLE_SECONDS", default_value_t = 10)]
    pub settle_seconds: u64,
    /// After so long without a renewal a standby takes the Lease.
    #[arg(long, env = "SLUICE_LEASE_SECONDS", default_value_t = 15)]
    pub lease_seconds: u64,
    /// After so long without a renewal the leader stops to write.
    #[arg(long, env = "SLUICE_LEASE_RENEW_SECONDS", default_value_t = 10)]
    pub lease_renew_seconds: u64,
    /// Between two renewals.
    #[arg(long, env = "SLUICE_LEASE_RETRY_SECONDS", default_value_t = 2)]
    pub lease_retry_seconds: u64,
    /// Only Canaries of our own namespace, with rights in that namespace only (and the right to create TokenReviews).
    #[arg(long, env = "SLUICE_NAMESPACED")]
    pub namespaced: bool,
    /// A changed Secret is a release, and a revision has copies of its Secrets. Without it, Secrets stay by reference, and
    /// the controller needs no right to read any.
    #[arg(long, env = "SLUICE_CONFIG_TRACKING_SECRETS", default_value_t = true, action = clap::ArgAction::Set)]
    pub config_tracking_secrets: bool,
    /// gRPC: xDS and certificates.
    #[arg(long, env = "SLUICE_GRPC_ADDRESS", default_value = "0.0.0.0:18000")]
    pub grpc_address: SocketAddr,
    /// HTTP: health and metrics.
    #[arg(long, env = "SLUICE_HTTP_ADDRESS", default_value = "0.0.0.0:18080")]
    pub http_address: SocketAddr,
    /// What keeps our additions to Services and Deployments when Git tools apply them away: policies of the API server, our
    /// webhook, or the repair that follows.
    #[arg(long, env = "SLUICE_PROTECTION", value_enum, default_value_t = Protection::Auto)]
    pub protection: Protection,
    /// HTTPS: the admission webhook.
    #[arg(long, env = "SLUICE_WEBHOOK_ADDRESS", default_value = "0.0.0.0:18443")]
    pub webhook_address: SocketAddr,
    /// Service, with a cluster IP, that leads port 443 to the webhook.
    #[arg(long, env = "SLUICE_WEBHOOK_SERVICE", default_value = "sluice-webhook")]
    pub webhook_service: String,
    #[command(flatten)]
    pub log: LogSettings,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Json,
    Text,
}

impl Settings {
    /// The one whose Canaries are released; all where absent.
    #[must_use]
    pub fn watched_namespace(&self) -> Option<String> {
        self.namespaced.then(|| self.pod_namespace.clone())
    }

    /// What the cache watches.
    #[must_use]
    pub fn scope(&self) -> Scope {
        Scope {
            namespace: self.watched_namespace(),
            release_namespace: self.pod_namespace.clone(),
            namespaces: !self.namespaced,
            secrets: self.config_tracking_secrets,
        }
    }

    /// SPIFFE id of the controllers.
    ///
    /// # Errors
    /// If a name in it is not one.
    pub fn controller_id(&self) -> Result<SpiffeId, sluice_xds::SpiffeError> {
        SpiffeId::new(&self.trust_domain, &self.pod_namespace, &self.service_account)
    }

    /// DNS names of the controllers' Services.
    #[must_use]
    pub fn dns_names(&self) -> Vec<String> {
        let names = [&self.service, &self.webhook_service].map(|service| format!("{service}.{}", self.pod_namespace));
        names
            .into_iter()
            .flat_map(|name| [name.clone(), format!("{name}.svc"), format!("{name}.svc.cluster.local")])
            .collect()
    }

    /// Where the API server finds the webhook.
    #[must_use]
    pub fn webhook(&self) -> Address {
        Address::Service {
            namespace: self.pod_namespace.clone(),
            name: self.webhook_service.clone(),
            port: WEBHOOK_PORT,
        }
    }

    #[must_use]
    pub fn lease(&self) -> LeaseSettings {
        LeaseSettings {
            namespace: self.pod_namespace.clone(),
            name: CONTROLLER.to_owned(),
            holder: self.pod_uid.clone(),
            duration: Duration::from_secs(self.lease_seconds),
            renew_deadline: Duration::from_secs(self.lease_renew_seconds),
            retry: Duration::from_secs(self.lease_retry_seconds),
        }
    }

    /// # Errors
    /// If a name in the fleet's SPIFFE id is not one.
    pub fn mesh(&self) -> Result<mesh::Settings, sluice_xds::SpiffeError> {
        Ok(mesh::Settings {
            fleet_id: SpiffeId::new(&self.trust_domain, &self.pod_namespace, &self.fleet_service_account)?,
            fleet: self.fleet.clone(),
            release_namespace: self.pod_namespace.clone(),
            watched_namespace: self.watched_namespace(),
            limits: mesh::Limits {
                connections: Some(self.fleet_connections_per_service).filter(|most| *most > 0),
                requests: Some(self.fleet_requests_per_service).filter(|most| *most > 0),
                stream_idle: Some(self.fleet_stream_idle_seconds).filter(|seconds| *seconds > 0),
            },
        })
    }

    #[must_use]
    pub fn analysis(&self) -> analysis::Settings {
        analysis::Settings {
            metrics_server: self.metrics_server.clone(),
            credentials: self.metrics_credentials.clone(),
            matchers: self.metrics_matchers.clone(),
            ..analysis::Settings::default()
        }
    }

    #[must_use]
    pub fn sidecar(&self, controller_id: &SpiffeId) -> Sidecar {
        Sidecar {
            image: self.proxy_image.clone(),
            image_pull_policy: self.proxy_pull_policy.clone(),
            controller: format!("{}.{}.svc:{}", self.service, self.pod_namespace, self.grpc_address.port()),
            controller_id: controller_id.to_string(),
            cpu_request: self.sidecar_cpu_request.clone(),
            memory_request: self.sidecar_memory_request.clone(),
            cpu_limit: self.sidecar_cpu_limit.clone(),
            memory_limit: self.sidecar_memory_limit.clone(),
            log: self.log.filter.clone(),
            log_format: match self.log.format {
                LogFormat::Json => "json".to_owned(),
                LogFormat::Text => "text".to_owned(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_command_it_is_the_controller_and_each_has_its_own_needs() {
        command().debug_assert();
        let controller = [
            "sluice-controller",
            "--pod-name=c0",
            "--pod-namespace=sluice-system",
            "--pod-uid=u",
            "--proxy-image=proxy",
            "--protection=webhook",
        ];
        let CommandLine::Run(settings) = CommandLine::read(controller).unwrap() else { panic!("a command") };
        assert_eq!(settings.protection, Protection::Webhook);
        let limits = settings.mesh().unwrap().limits;
        assert_eq!(limits, mesh::Limits { connections: Some(4096), requests: Some(2048), stream_idle: Some(3600) });
        let unlimited =
            ["--fleet-connections-per-service=0", "--fleet-requests-per-service=0", "--fleet-stream-idle-seconds=0"];
        let unlimited = [&controller[..], &unlimited].concat();
        let CommandLine::Run(unlimited) = CommandLine::read(unlimited).unwrap() else { panic!("a command") };
        assert_eq!(unlimited.mesh().unwrap().limits, mesh::Limits::default());
        assert!(settings.dns_names().contains(&"sluice-webhook.sluice-system.svc".to_owned()));
        assert!(CommandLine::read(&controller[..3]).is_err(), "the rest is required");

        let line = CommandLine::read(["sluice-controller", "uninstall", "--pod-namespace=sluice-system"]).unwrap();
        let CommandLine::Uninstall(settings) = line else { panic!("no command") };
        assert_eq!((settings.pod_namespace.as_str(), settings.timeout_seconds), ("sluice-system", 240));
    }
}
