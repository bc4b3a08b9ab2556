//! One measurement: from a gate to its [`GateStatus`].

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::future::{BoxFuture, join, join_all};
use jiff::Timestamp;
use reqwest::Url;
use sluice_crds::{GateStatus, Metric, MetricTemplate, VerdictStatus, parse_duration};
use tokio::time::Instant;

use super::{
    DryRunRequest, Settings, Task,
    engine::{Dry, Measure, Measured, Outcome, Part, Work},
    gate::{self, Builtin, Series},
    prometheus::{self, Answer, Endpoint, Prometheus, QueryError, Sample, Times},
    sources::{SecretData, Sources},
    template::{self, TemplateError, Variables},
    window::{Window, window},
};

/// How far before a window's start samples of the fleet's members are looked for: scrape intervals up to 2 minutes.
const LEAD: Duration = Duration::from_secs(150);
/// A Secret is read again after this time, so that rotated credentials are used, and at once after a 401 or 403.
const SECRET_LIFE: Duration = Duration::from_secs(60);
/// Characters of a query that the status takes.
const MOST_OF_QUERY: usize = 8192;
const MAX_SECRETS: usize = 256;

/// Why a gate has no value.
#[derive(Debug, PartialEq, thiserror::Error)]
enum GateError {
    #[error(transparent)]
    Query(#[from] QueryError),
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error(
        "there is no metrics server: set spec.metricsServer, or the controller's own setting (metricsServer in the chart's values)"
    )]
    NoServer,
    #[error("there is no MetricTemplate {namespace}/{name}")]
    NoTemplate { namespace: String, name: String },
    #[error("MetricTemplate {template}: there is no Secret {secret} beside it")]
    NoSecret { template: String, secret: String },
    #[error("MetricTemplate {template}: {error}")]
    InTemplate { template: String, error: Box<GateError> },
    #[error("the Secret {secret} could not be read: {reason}")]
    Secret { secret: String, reason: String },
    #[error("the metrics server's credentials in {} (metricsServerSecret in the chart's values) could not be read: {reason}", folder.display())]
    Credentials { folder: PathBuf, reason: String },
    #[error("the gate has neither a templateRef nor a query, and its name is not one of the built-in ones")]
    NoQuery,
    #[error("interval: {0}")]
    Interval(#[from] sluice_crds::DurationError),
}

impl GateError {
    /// As [`QueryError::is_mistake`].
    fn is_mistake(&self) -> bool {
        match self {
            Self::Query(error) => error.is_mistake(),
            Self::InTemplate { error, .. } => error.is_mistake(),
            Self::Secret { .. } | Self::Credentials { .. } => false,
            Self::Template(_)
            | Self::NoServer
            | Self::NoTemplate { .. }
            | Self::NoSecret { .. }
            | Self::NoQuery
            | Self::Interval(_) => true,
        }
    }
}

/// What a gate's queries need to know of its release; of a [`Task`] and of a [`DryRunRequest`] alike.
struct Subject<'a> {
    namespace: &'a str,
    name: &'a str,
    target: &'a str,
    service: &'a str,
    primary: &'a str,
    canary: &'a str,
    /// The step is judged by copies of requests.
    mirrored: bool,
    metrics_server: Option<&'a str>,
}

impl<'a> Subject<'a> {
    fn of_task(task: &'a Task) -> Self {
        Self {
            namespace: &task.canary.namespace,
            name: &task.canary.name,
            target: &task.target,
            service: &task.service,
            primary: &task.primary_revision,
            canary: &task.canary_revision,
            mirrored: task.mirrored,
            metrics_server: task.metrics_server.as_deref(),
        }
    }

    fn of_dry_run(request: &'a DryRunRequest) -> Self {
        Self {
            namespace: &request.canary.namespace,
            name: &request.canary.name,
            target: &request.target,
            service: &request.service,
            primary: &request.primary_revision,
            canary: &request.canary_revision,
            mirrored: false,
            metrics_server: request.metrics_server.as_deref(),
        }
    }
}

type Secrets = HashMap<(String, String), (Instant, Arc<SecretData>)>;

/// Measures with real servers.
pub(crate) struct Measurer {
    pub(crate) settings: Settings,
    pub(crate) prometheus: Prometheus,
    pub(crate) sources: Arc<dyn Sources>,
    secrets: Mutex<Secrets>,
}

impl Measure for Measurer {
    fn server(&self, work: &Work) -> String {
        let (gate, subject) = match work {
            Work::Measure { task, part: Part::Fleet } => (None, Subject::of_task(task)),
            Work::Measure { task, part: Part::Query(index) } => (task.gates.get(*index), Subject::of_task(task)),
            Work::Dry { request, gate } => (request.gates.get(*gate), Subject::of_dry_run(request)),
        };
        let address = match gate.and_then(|gate| gate.template_ref.as_ref()) {
            Some(reference) => self
                .template(&subject, &reference.name, reference.namespace.as_deref())
                .map(|template| template.spec.provider.address.clone())
                .unwrap_or_default(),
            None => self.address(&subject).unwrap_or_default().to_owned(),
        };
        Url::parse(&address).map_or(address, |url| prometheus::server_name(&url))
    }

    fn run(self: Arc<Self>, work: Work) -> BoxFuture<'static, Outcome> {
        Box::pin(async move {
            match work {
                Work::Measure { task, part: Part::Fleet } => Outcome::Measured(self.fleet(&task).await),
                Work::Measure { task, part: Part::Query(index) } => match task.gates.get(index) {
                    Some(gate) => Outcome::Measured(vec![(index, self.own(&task, gate).await)]),
                    None => Outcome::Measured(Vec::new()),
                },
                Work::Dry { request, gate } => Outcome::Dry(match request.gates.get(gate) {
                    Some(gate) => match self.dry_both(&request, gate).await {
                        Ok(()) => Dry::Fine,
                        Err(error) if error.is_mistake() => Dry::Mistake(error.to_string()),
                        Err(error) => Dry::Unreachable(error.to_string()),
                    },
                    None => Dry::Fine,
                }),
            }
        })
    }

    fn templates(&self, request: &DryRunRequest) -> Vec<Option<Arc<MetricTemplate>>> {
        let subject = Subject::of_dry_run(request);
        let reference = |gate: &Metric| {
            let reference = gate.template_ref.as_ref()?;
            self.template(&subject, &reference.name, reference.namespace.as_deref()).ok()
        };
        request.gates.iter().map(reference).collect()
    }
}

impl Measurer {
    pub(crate) fn new(settings: Settings, sources: Arc<dyn Sources>) -> Self {
        let prometheus = Prometheus::new(settings.query_deadline);
        Self { settings, prometheus, sources, secrets: Mutex::default() }
    }

    /// The built-in gates: one look at the fleet's scrapes serves all of them.
    async fn fleet(&self, task: &Task) -> Vec<(usize, Measured)> {
        let gates: Vec<(usize, &Metric, Builtin)> =
            task.gates.iter().enumerate().filter_map(|(index, gate)| Some((index, gate, Builtin::of(gate)?))).collect();
        let longest =
            gates.iter().filter_map(|(_, gate, _)| parse_duration(&gate.interval).ok()).max().unwrap_or_default();
        let scrapes = match self.endpoint_of(&Subject::of_task(task)) {
            Ok(endpoint) => self.scrapes(&endpoint, task, longest).await.map(|scrapes| (endpoint, scrapes)),
            Err(error) => Err(error),
        };
        match scrapes {
            Ok((endpoint, scrapes)) => {
                join_all(gates.into_iter().map(|(index, gate, builtin)| {
                    let (endpoint, scrapes) = (&endpoint, &scrapes);
                    async move { (index, self.builtin(task, gate, builtin, endpoint, scrapes).await) }
                }))
                .await
            }
            Err(error) => gates.into_iter().map(|(index, gate, _)| (index, failed(gate, &error, ""))).collect(),
        }
    }

    /// When each member of the fleet was scraped, and how the server's clock relates to ours.
    async fn scrapes(&self, endpoint: &Endpoint, task: &Task, longest: Duration) -> Result<Scrapes, GateError> {
        let since = Timestamp::now().duration_since(task.acknowledged_at).unsigned_abs();
        let range = (since.min(longest) + LEAD).as_secs() + 1;
        let matchers = self.settings.matchers.as_deref().unwrap_or_default();
        let members = format!("sluice_member_info{{{matchers}}}[{range}s]");
        let (clock, streams) = join(self.clock(endpoint, task), self.prometheus.query(endpoint, &members, None)).await;
        let (now, acknowledged) = clock?;
        let streams = match streams? {
            Answer::Matrix(streams) => streams,
            Answer::Vector(_) | Answer::Scalar(_) | Answer::Text => Vec::new(),
        };
        Ok(Scrapes { now, acknowledged, streams })
    }

    /// The server's present, and the acknowledgement, in its clock.
    async fn clock(&self, endpoint: &Endpoint, task: &Task) -> Result<(i64, i64), GateError> {
        let asked = Timestamp::now();
        let seconds = self.prometheus.query(endpoint, "time()", None).await?.number()?.unwrap_or_default();
        let now = prometheus::milliseconds(seconds);
        // The server read its clock after `asked`: its offset is at most this, and a later acknowledgement is the safe error.
        let offset = now - asked.as_millisecond();
        Ok((now, task.acknowledged_at.as_millisecond() + offset))
    }

    async fn builtin(
        &self,
        task: &Task,
        gate: &Metric,
        builtin: Builtin,
        endpoint: &Endpoint,
        scrapes: &Scrapes,
    ) -> Measured {
        let length = match parse_duration(&gate.interval) {
            Ok(length) => i64::try_from(length.as_millis()).unwrap_or(i64::MAX),
            Err(error) => return failed(gate, &error.into(), ""),
        };
        let judged = match window(&scrapes.streams, &task.members, scrapes.now, scrapes.acknowledged, length) {
            Ok(judged) => judged,
            Err(error) => {
                let mut status = blank(gate, VerdictStatus::Inconclusive, scrapes.now);
                status.message = bounded(&error.to_string());
                return Measured { status, whole: false };
            }
        };
        let series = Series::of(task, self.settings.matchers.as_deref());
        let query = series.value(builtin, judged);
        let (values, samples) = match self.values(endpoint, &query, &series.samples(builtin, judged), judged).await {
            Ok(both) => both,
            Err(error) => return failed(gate, &error.into(), &query),
        };
        let value = number(&values, &task.canary_revision);
        let samples = number(&samples, &task.canary_revision);
        let (mut verdict, mut message) = gate::judge(gate, value, samples);
        if !judged.whole {
            match verdict {
                VerdictStatus::Pass => message = so_far(judged.length, length),
                VerdictStatus::Fail => {
                    let share = seconds(judged.length) / seconds(length);
                    let fails = match builtin {
                        Builtin::SuccessRate => Ok(value.is_some_and(|value| gate::fails_anyway(gate, value, share))),
                        Builtin::Duration => self.slow_anyway(endpoint, &series, task, gate, judged, share).await,
                    };
                    match fails {
                        Ok(true) => {}
                        Ok(false) => {
                            verdict = VerdictStatus::Inconclusive;
                            message = format!("out of range, but only {}", so_far(judged.length, length));
                        }
                        Err(error) => return failed(gate, &error.into(), &query),
                    }
                }
                VerdictStatus::Inconclusive | VerdictStatus::Error => {}
            }
        }
        let status = GateStatus {
            value,
            primary_value: number(&values, &task.primary_revision),
            samples,
            window_seconds: Some(seconds(judged.length)),
            message: bounded(&message),
            // With long names and matchers it may be longer than the status takes.
            query: query.chars().take(MOST_OF_QUERY).collect(),
            ..blank(gate, verdict, judged.end)
        };
        Measured { status, whole: judged.whole }
    }

    /// As [`gate::fails_anyway`], of a p99: what so many of the requests exceed that they are too many for the whole window.
    async fn slow_anyway(
        &self,
        endpoint: &Endpoint,
        series: &Series,
        task: &Task,
        gate: &Metric,
        judged: Window,
        share: f64,
    ) -> Result<bool, QueryError> {
        let quantile = 1.0 - gate::MAY_BE_SLOWER / share;
        let Some(max) = gate.threshold_range.and_then(|range| range.max).filter(|_| quantile > 0.0) else {
            return Ok(false);
        };
        let query = series.duration(quantile, judged);
        let values = self.prometheus.query(endpoint, &query, Some(judged.end)).await?.vector()?;
        Ok(number(&values, &task.canary_revision).is_some_and(|value| value > max))
    }

    async fn values(
        &self,
        endpoint: &Endpoint,
        value: &str,
        samples: &str,
        judged: Window,
    ) -> Result<(Vec<Sample>, Vec<Sample>), QueryError> {
        let (value, samples) = join(
            self.prometheus.query(endpoint, value, Some(judged.end)),
            self.prometheus.query(endpoint, samples, Some(judged.end)),
        )
        .await;
        Ok((value?.vector()?, samples?.vector()?))
    }

    /// A gate with a query of its own. Its window is inside of its query, so it is judged only once
    /// `interval` has passed since the acknowledgement.
    async fn own(&self, task: &Task, gate: &Metric) -> Measured {
        let subject = Subject::of_task(task);
        let (endpoint, query) = match self.resolve(&subject, gate).await {
            Ok(both) => both,
            Err(error) => return failed(gate, &error, ""),
        };
        let measured = async {
            let length = i64::try_from(parse_duration(&gate.interval)?.as_millis()).unwrap_or(i64::MAX);
            let (now, acknowledged) = self.clock(&endpoint, task).await?;
            let value = self.prometheus.query(&endpoint, &query, Some(now)).await?.number()?;
            Ok::<_, GateError>((length, now, now - acknowledged, value))
        };
        let (length, now, passed, value) = match measured.await {
            Ok(measured) => measured,
            Err(error) => {
                self.forget_refused_secret(&subject, gate, &error);
                return failed(gate, &error, &query);
            }
        };
        let whole = passed >= length;
        let (verdict, message) = match value {
            None => (VerdictStatus::Inconclusive, "the query yields nothing, or NaN".to_owned()),
            Some(value) => match (gate::within(gate, value), whole) {
                (true, true) => (VerdictStatus::Pass, String::new()),
                (true, false) => (VerdictStatus::Pass, so_far(passed, length)),
                (false, true) => (VerdictStatus::Fail, String::new()),
                (false, false) => {
                    (VerdictStatus::Inconclusive, format!("out of range, but only {}", so_far(passed, length)))
                }
            },
        };
        let status =
            GateStatus { value, window_seconds: Some(seconds(length)), message, query, ..blank(gate, verdict, now) };
        Measured { status, whole }
    }

    /// A query may read otherwise where copies are judged.
    async fn dry_both(&self, request: &DryRunRequest, gate: &Metric) -> Result<(), GateError> {
        let subject = Subject::of_dry_run(request);
        self.dry(&subject, gate).await?;
        if request.mirrored { self.dry(&Subject { mirrored: true, ..subject }, gate).await } else { Ok(()) }
    }

    async fn dry(&self, subject: &Subject<'_>, gate: &Metric) -> Result<(), GateError> {
        let length = i64::try_from(parse_duration(&gate.interval)?.as_millis()).unwrap_or(i64::MAX);
        if let Some(builtin) = Builtin::of(gate) {
            let endpoint = self.endpoint_of(subject)?;
            let series = Series::new(
                subject.namespace,
                subject.service,
                subject.primary,
                subject.canary,
                subject.mirrored,
                self.settings.matchers.as_deref(),
            );
            let window = Window { end: 0, length, whole: true, lead: 60_000 };
            for query in [series.value(builtin, window), series.samples(builtin, window)] {
                self.prometheus.query(&endpoint, &query, None).await?.vector()?;
            }
            return Ok(());
        }
        let (endpoint, query) = self.resolve(subject, gate).await?;
        let answer = self.prometheus.query(&endpoint, &query, None).await.and_then(|answer| answer.number());
        let result = answer.map(|_| ()).map_err(GateError::from);
        if let Err(error) = &result {
            self.forget_refused_secret(subject, gate, error);
        }
        result
    }

    fn address<'a>(&'a self, subject: &Subject<'a>) -> Option<&'a str> {
        subject.metrics_server.or(self.settings.metrics_server.as_deref())
    }

    fn endpoint_of(&self, subject: &Subject<'_>) -> Result<Endpoint, GateError> {
        let mut endpoint = Endpoint::new(self.address(subject).ok_or(GateError::NoServer)?)?;
        // Never to an address that a Canary chooses.
        if let (None, Some(folder)) = (subject.metrics_server, &self.settings.credentials) {
            let data = mounted(folder)
                .map_err(|error| GateError::Credentials { folder: folder.clone(), reason: error.to_string() })?;
            endpoint.credentials(&data)?;
        }
        Ok(endpoint)
    }

    fn template(
        &self,
        subject: &Subject<'_>,
        name: &str,
        namespace: Option<&str>,
    ) -> Result<Arc<MetricTemplate>, GateError> {
        let namespace = namespace.unwrap_or(subject.namespace);
        self.sources
            .metric_template(namespace, name)
            .ok_or_else(|| GateError::NoTemplate { namespace: namespace.to_owned(), name: name.to_owned() })
    }

    /// Where the query of a gate goes, and how it reads.
    async fn resolve(&self, subject: &Subject<'_>, gate: &Metric) -> Result<(Endpoint, String), GateError> {
        let variables = Variables {
            name: subject.name,
            namespace: subject.namespace,
            target: subject.target,
            service: subject.service,
            interval: &gate.interval,
            primary: subject.primary,
            canary: subject.canary,
            mirrored: subject.mirrored,
            variables: &gate.template_variables,
        };
        let Some(reference) = &gate.template_ref else {
            let query = gate.query.as_deref().ok_or(GateError::NoQuery)?;
            return Ok((self.endpoint_of(subject)?, template::render(query, &variables)?));
        };
        let template = self.template(subject, &reference.name, reference.namespace.as_deref())?;
        let namespace = reference.namespace.as_deref().unwrap_or(subject.namespace);
        let named = format!("{namespace}/{}", reference.name);
        let inside = |error: GateError| GateError::InTemplate { template: named.clone(), error: Box::new(error) };
        let query = template::render(&template.spec.query, &variables).map_err(|error| inside(error.into()))?;
        let provider = &template.spec.provider;
        let endpoint = async {
            let mut endpoint = Endpoint::new(&provider.address)?;
            for (name, values) in &provider.headers {
                for value in &values.0 {
                    endpoint.header(name, &value.0)?;
                }
            }
            if let Some(secret) = &provider.secret_ref {
                let data = self
                    .secret(namespace, &secret.name)
                    .await?
                    .ok_or_else(|| GateError::NoSecret { template: named.clone(), secret: secret.name.clone() })?;
                endpoint.credentials(&data)?;
            }
            if provider.insecure_skip_verify {
                endpoint.skip_verify();
            }
            Ok(endpoint)
        };
        match endpoint.await {
            Ok(endpoint) => Ok((endpoint, query)),
            Err(error @ (GateError::NoSecret { .. } | GateError::Secret { .. })) => Err(error),
            Err(error) => Err(inside(error)),
        }
    }

    async fn secret(&self, namespace: &str, name: &str) -> Result<Option<Arc<SecretData>>, GateError> {
        let key = (namespace.to_owned(), name.to_owned());
        if let Some((read, data)) = self.secrets.lock().unwrap_or_else(PoisonError::into_inner).get(&key)
            && read.elapsed() < SECRET_LIFE
        {
            return Ok(Some(data.clone()));
        }
        let data = self.sources.secret(key.0.clone(), key.1.clone()).await.map_err(|reason| GateError::Secret {
            secret: format!("{namespace}/{name}"),
            reason: prometheus::shorten(&reason),
        })?;
        let mut secrets = self.secrets.lock().unwrap_or_else(PoisonError::into_inner);
        if secrets.len() >= MAX_SECRETS {
            secrets.clear();
        }
        let data = data.map(Arc::new);
        match &data {
            Some(data) => secrets.insert(key, (Instant::now(), data.clone())),
            None => secrets.remove(&key),
        };
        Ok(data)
    }

    /// After a 401 or 403 the Secret is read anew: it may have been rotated.
    fn forget_refused_secret(&self, subject: &Subject<'_>, gate: &Metric, error: &GateError) {
        if !matches!(error, GateError::Query(QueryError::Status { status: 401 | 403, .. })) {
            return;
        }
        let Some(reference) = &gate.template_ref else { return };
        let Ok(template) = self.template(subject, &reference.name, reference.namespace.as_deref()) else { return };
        if let Some(secret) = &template.spec.provider.secret_ref {
            let namespace = reference.namespace.as_deref().unwrap_or(subject.namespace);
            let mut secrets = self.secrets.lock().unwrap_or_else(PoisonError::into_inner);
            secrets.remove(&(namespace.to_owned(), secret.name.clone()));
        }
    }
}

/// A Secret as it is mounted: a file for each key, small and in memory. The rest are the kubelet's own (`..data`).
fn mounted(folder: &Path) -> io::Result<SecretData> {
    let mut data = SecretData::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let Ok(key) = entry.file_name().into_string() else { continue };
        if !key.starts_with("..") {
            data.insert(key, std::fs::read(entry.path())?);
        }
    }
    Ok(data)
}

/// In the server's clock, milliseconds.
struct Scrapes {
    now: i64,
    acknowledged: i64,
    streams: Vec<Times>,
}

/// A gate's status with nothing but what is always known.
pub(crate) fn blank(gate: &Metric, verdict: VerdictStatus, time: i64) -> GateStatus {
    GateStatus {
        name: gate.name.clone(),
        verdict,
        value: None,
        primary_value: None,
        limit: gate::limit(gate),
        samples: None,
        time: Timestamp::from_millisecond(time).unwrap_or_else(|_| Timestamp::now()),
        window_seconds: None,
        message: String::new(),
        query: String::new(),
    }
}

/// No number: C22's fourth verdict, whatever the reason.
fn failed(gate: &Metric, error: &GateError, query: &str) -> Measured {
    let mut status = blank(gate, VerdictStatus::Error, Timestamp::now().as_millisecond());
    status.message = bounded(&error.to_string());
    query.clone_into(&mut status.query);
    Measured { status, whole: false }
}

/// The value of one revision in a vector by revision; NaN (0 requests of 0) is none.
fn number(samples: &[Sample], revision: &str) -> Option<f64> {
    samples
        .iter()
        .find(|sample| sample.labels.get("revision").is_some_and(|label| label == revision))
        .map(|sample| sample.value)
        .filter(|value| value.is_finite())
}

fn so_far(passed: i64, length: i64) -> String {
    format!("{:.0} s of {:.0} s since the acknowledgement", seconds(passed), seconds(length))
}

#[expect(clippy::cast_precision_loss, reason = "milliseconds of a window are far below 2^52")]
fn seconds(milliseconds: i64) -> f64 {
    milliseconds as f64 / 1000.0
}

/// As long as the status allows.
fn bounded(message: &str) -> String {
    message.chars().take(1000).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use std::{collections::BTreeMap, net::SocketAddr};

    use axum::{Router, extract::State, http::HeaderMap, http::StatusCode};
    use tokio::net::TcpListener;

    use super::*;
    use crate::{analysis::SecretData, cache::CanaryKey};

    /// Templates and Secrets by `namespace/name`; a Secret's token may change.
    #[derive(Default)]
    struct Objects {
        templates: BTreeMap<String, Arc<MetricTemplate>>,
        secrets: Mutex<BTreeMap<String, SecretData>>,
        /// Says so for every Secret.
        secrets_fail: bool,
    }

    impl Sources for Objects {
        fn metric_template(&self, namespace: &str, name: &str) -> Option<Arc<MetricTemplate>> {
            self.templates.get(&format!("{namespace}/{name}")).cloned()
        }
        fn secret(&self, namespace: String, name: String) -> BoxFuture<'static, Result<Option<SecretData>, String>> {
            let result = match self.secrets_fail {
                true => Err("the API server is away".to_owned()),
                false => Ok(self.secrets.lock().unwrap().get(&format!("{namespace}/{name}")).cloned()),
            };
            Box::pin(async move { result })
        }
    }

    /// A Prometheus that knows one token and answers 7 to everything but `time()`.
    async fn server(token: &str) -> (SocketAddr, Arc<Mutex<String>>) {
        let token = Arc::new(Mutex::new(token.to_owned()));
        let answer = async |State(token): State<Arc<Mutex<String>>>, headers: HeaderMap| {
            let expected = format!("Bearer {}", token.lock().unwrap());
            let tenant = headers.get("x-scope-orgid").is_some_and(|value| value == "shop");
            if headers.get("authorization").is_some_and(|value| *value == *expected) && tenant {
                let body = r#"{"status":"success","data":{"resultType":"scalar","result":[1,"1700000000"]}}"#;
                (StatusCode::OK, body.to_owned())
            } else {
                (StatusCode::UNAUTHORIZED, String::new())
            }
        };
        let app = Router::new().fallback(answer).with_state(token.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        (address, token)
    }

    fn template(address: &str) -> Arc<MetricTemplate> {
        Arc::new(
            serde_json::from_value(serde_json::json!({
                "apiVersion": "sluice.dev/v1beta1", "kind": "MetricTemplate",
                "metadata": {"name": "errors", "namespace": "monitoring"},
                "spec": {
                    "provider": {
                        "type": "prometheus", "address": address,
                        "secretRef": {"name": "access"}, "headers": {"X-Scope-OrgID": ["shop"]}
                    },
                    "query": "sum(rate(errors{zone=\"{{ variables.zone }}\"}[{{ interval }}]))"
                }
            }))
            .unwrap(),
        )
    }

    fn gate(namespace: &str, zone: Option<&str>) -> Metric {
        let variables = zone.map(|zone| BTreeMap::from([("zone", zone)])).unwrap_or_default();
        serde_json::from_value(serde_json::json!({
            "name": "errors", "interval": "30s", "thresholdRange": {"max": 1_800_000_000.0},
            "templateRef": {"name": "errors", "namespace": namespace}, "templateVariables": variables
        }))
        .unwrap()
    }

    fn request(gates: Vec<Metric>) -> DryRunRequest {
        DryRunRequest {
            canary: CanaryKey::new("shop", "cart"),
            service: "cart".to_owned(),
            target: "cart".to_owned(),
            primary_revision: "aaaa".to_owned(),
            canary_revision: "bbbb".to_owned(),
            gates,
            mirrored: false,
            metrics_server: None,
        }
    }

    async fn dry(measurer: &Arc<Measurer>, gate: Metric) -> Dry {
        let work = Work::Dry { request: Arc::new(request(vec![gate])), gate: 0 };
        match measurer.clone().run(work).await {
            Outcome::Dry(dry) => dry,
            Outcome::Measured(_) => panic!("a dry run measures nothing"),
        }
    }

    fn measurer(objects: Objects) -> Arc<Measurer> {
        Arc::new(Measurer::new(Settings::default(), Arc::new(objects)))
    }

    fn objects(address: SocketAddr) -> Objects {
        let mut objects = Objects::default();
        objects.templates.insert("monitoring/errors".to_owned(), template(&format!("http://{address}")));
        let data = SecretData::from([("token".to_owned(), b"old".to_vec())]);
        objects.secrets.lock().unwrap().insert("monitoring/access".to_owned(), data);
        objects
    }

    #[tokio::test]
    async fn a_template_of_another_namespace_is_asked_with_the_secret_beside_it() {
        let (address, _token) = server("old").await;
        let measurer = measurer(objects(address));
        assert_eq!(dry(&measurer, gate("monitoring", Some("eu"))).await, Dry::Fine);
        let (endpoint, query) = measurer
            .resolve(&Subject::of_dry_run(&request(Vec::new())), &gate("monitoring", Some("eu")))
            .await
            .unwrap();
        assert_eq!(query, r#"sum(rate(errors{zone="eu"}[30s]))"#);
        assert_eq!(endpoint.server(), format!("http://{address}"));
        let work = Work::Dry { request: Arc::new(request(vec![gate("monitoring", Some("eu"))])), gate: 0 };
        assert_eq!(measurer.server(&work), format!("http://{address}"), "limited by the template's server");
    }

    #[tokio::test]
    async fn rotated_credentials_are_read_anew_after_a_refusal() {
        let (address, token) = server("old").await;
        let objects = Arc::new(objects(address));
        let measurer = Arc::new(Measurer::new(Settings::default(), objects.clone()));
        assert_eq!(dry(&measurer, gate("monitoring", Some("eu"))).await, Dry::Fine);
        "new".clone_into(&mut token.lock().unwrap());
        let data = SecretData::from([("token".to_owned(), b"new".to_vec())]);
        objects.secrets.lock().unwrap().insert("monitoring/access".to_owned(), data);
        assert!(
            matches!(dry(&measurer, gate("monitoring", Some("eu"))).await, Dry::Mistake(words) if words.contains("401"))
        );
        assert_eq!(dry(&measurer, gate("monitoring", Some("eu"))).await, Dry::Fine);
    }

    #[test]
    fn the_installations_credentials_go_to_its_own_metrics_server_alone() {
        let folder = std::env::temp_dir().join(format!("sluice-credentials-{}", std::process::id()));
        let write = |token: &str| std::fs::write(folder.join("token"), token).unwrap();
        // As the kubelet mounts a Secret.
        std::fs::create_dir_all(folder.join("..data")).unwrap();
        write("old\n");
        let settings = Settings {
            metrics_server: Some("https://prometheus:9090".to_owned()),
            credentials: Some(folder.clone()),
            ..Settings::default()
        };
        let measurer = Measurer::new(settings, Arc::new(Objects::default()));
        let own = request(Vec::new());
        let endpoint = || measurer.endpoint_of(&Subject::of_dry_run(&own));
        let with = |token: &str| {
            let mut endpoint = Endpoint::new("https://prometheus:9090").unwrap();
            endpoint.credentials(&SecretData::from([("token".to_owned(), token.into())])).unwrap();
            endpoint
        };
        assert_eq!(endpoint().unwrap(), with("old"));
        write("new");
        assert_eq!(endpoint().unwrap(), with("new"));
        let theirs = DryRunRequest { metrics_server: Some("https://elsewhere".to_owned()), ..request(Vec::new()) };
        let sent = measurer.endpoint_of(&Subject::of_dry_run(&theirs)).unwrap();
        assert_eq!(sent, Endpoint::new("https://elsewhere").unwrap());
        std::fs::remove_dir_all(&folder).unwrap();
        let error = endpoint().unwrap_err();
        assert!(error.to_string().contains("metricsServerSecret") && !error.is_mistake(), "{error}");
    }

    #[tokio::test]
    async fn what_a_gate_refers_to_and_is_not_there_is_named() {
        let (address, _token) = server("old").await;
        let mistake = |dry: Dry| match dry {
            Dry::Mistake(words) => words,
            other @ (Dry::Fine | Dry::Unreachable(_)) => panic!("{other:?}"),
        };
        let whole = measurer(objects(address));
        assert_eq!(mistake(dry(&whole, gate("shop", Some("eu"))).await), "there is no MetricTemplate shop/errors");
        let words = mistake(dry(&whole, gate("monitoring", None)).await);
        assert!(words.starts_with("MetricTemplate monitoring/errors: the query uses a variable"), "{words}");

        let without = objects(address);
        without.secrets.lock().unwrap().clear();
        let words = mistake(dry(&measurer(without), gate("monitoring", Some("eu"))).await);
        assert_eq!(words, "MetricTemplate monitoring/errors: there is no Secret access beside it");

        let failing = Objects { secrets_fail: true, ..objects(address) };
        match dry(&measurer(failing), gate("monitoring", Some("eu"))).await {
            Dry::Unreachable(words) => assert!(words.contains("the API server is away"), "{words}"),
            other @ (Dry::Fine | Dry::Mistake(_)) => {
                panic!("an API server that is away is nobody's mistake: {other:?}")
            }
        }

        let builtin = Metric { name: "request-success-rate".to_owned(), template_ref: None, ..gate("shop", None) };
        assert!(mistake(dry(&whole, builtin).await).starts_with("there is no metrics server"));
    }
}
