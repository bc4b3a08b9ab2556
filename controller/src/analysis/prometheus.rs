//! Asks a Prometheus, or anything that speaks its HTTP API (Thanos, Mimir, VictoriaMetrics): instant queries only
//! (<https://prometheus.io/docs/prometheus/latest/querying/api/#instant-queries>).

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use reqwest::{
    Certificate, Client, Url,
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue},
    redirect,
};
use serde::Deserialize;

/// An answer is read up to this many bytes: a query that forgot to aggregate must not fill the controller's memory.
const MAX_ANSWER: usize = 4 << 20;
/// Longer queries are sent by POST: proxies in front of a Prometheus commonly refuse URLs of 8 KiB and more.
const MAX_URL: usize = 4096;
/// How much of a server's own words is passed on to people.
const MAX_MESSAGE: usize = 300;
/// Clients that are kept; one is needed for each combination of CA and verification.
const MAX_CLIENTS: usize = 64;

/// Where a query goes, and with which credentials.
#[derive(Clone, Debug, PartialEq)]
pub struct Endpoint {
    url: Url,
    headers: HeaderMap,
    trust: Trust,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
enum Trust {
    /// What the system trusts.
    #[default]
    System,
    /// A CA of the user's own (PEM), and nothing else.
    Own(Vec<u8>),
    /// Anybody. For tests.
    Anybody,
}

/// Why there is no number. C22: none of these says anything about the canary.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum QueryError {
    #[error("{server} could not be asked: {reason}")]
    Unreachable { server: String, reason: String },
    #[error("{server} answered {status}{}{message}", if message.is_empty() { "" } else { ": " })]
    Status { server: String, status: u16, message: String },
    #[error("{server} did not answer as a Prometheus does ({reason}): check the address, its path included")]
    Malformed { server: String, reason: String },
    #[error("{server} answered with more than 4 MiB: aggregate the query to one number, for example with sum(...)")]
    TooLarge { server: String },
    #[error("the query yields {count} series: aggregate it to one number, for example with sum(...)")]
    NotOneSeries { count: usize },
    #[error(
        "the query yields a {kind}, not a number at one time: remove the range, or put a function such as rate() around it"
    )]
    NotANumber { kind: &'static str },
    #[error("{0}")]
    Endpoint(String),
}

impl QueryError {
    /// A person must mend the query, the address or the credentials: asking again will not help.
    #[must_use]
    pub fn is_mistake(&self) -> bool {
        match self {
            Self::Unreachable { .. } => false,
            // 408 and 429 pass by themselves, like 5xx.
            Self::Status { status, .. } => *status < 500 && *status != 408 && *status != 429,
            Self::Malformed { .. }
            | Self::TooLarge { .. }
            | Self::NotOneSeries { .. }
            | Self::NotANumber { .. }
            | Self::Endpoint(_) => true,
        }
    }
}

impl Endpoint {
    /// A base URL, such as `http://prometheus.monitoring:9090` or `https://metrics.example.com/prometheus`. User name and password in
    /// it are sent as basic auth.
    ///
    /// # Errors
    /// If it is not an http or https URL.
    pub fn new(address: &str) -> Result<Self, QueryError> {
        let url = Url::parse(address.trim())
            .map_err(|error| QueryError::Endpoint(format!("metrics server address {address:?}: {error}")))?;
        if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
            return Err(QueryError::Endpoint(format!(
                "metrics server address {address:?}: write http://HOST:PORT or https://HOST:PORT"
            )));
        }
        Ok(Self { url, headers: HeaderMap::new(), trust: Trust::default() })
    }

    /// Adds a header to every query.
    ///
    /// # Errors
    /// If name or value cannot stand in an HTTP header.
    pub fn header(&mut self, name: &str, value: &str) -> Result<(), QueryError> {
        let bad = |error: &dyn std::fmt::Display| QueryError::Endpoint(format!("header {name:?}: {error}"));
        let parsed: HeaderName = name.parse().map_err(|error| bad(&error))?;
        let mut value: HeaderValue = value.parse().map_err(|error| bad(&error))?;
        value.set_sensitive(parsed == AUTHORIZATION);
        self.headers.append(parsed, value);
        Ok(())
    }

    /// Credentials as Flagger's Secrets have them: `token`, or `username` and `password`; and `ca.crt` (PEM).
    ///
    /// # Errors
    /// If a value cannot be used; it names the key, never the value.
    pub fn credentials(&mut self, secret: &BTreeMap<String, Vec<u8>>) -> Result<(), QueryError> {
        let text = |key: &str| -> Result<Option<&str>, QueryError> {
            let Some(value) = secret.get(key) else { return Ok(None) };
            // Files are often made with a line end (`echo secret | ...`), which no credential has.
            std::str::from_utf8(value)
                .map(|text| Some(text.trim_end_matches(['\r', '\n'])))
                .map_err(|_| QueryError::Endpoint(format!("the Secret's key {key} is not UTF-8 text")))
        };
        if let Some(ca) = secret.get("ca.crt") {
            let found = Certificate::from_pem_bundle(ca).map_or(0, |certificates| certificates.len());
            if found == 0 {
                return Err(QueryError::Endpoint("the Secret's key ca.crt holds no PEM certificate".to_owned()));
            }
            self.trust = Trust::Own(ca.clone());
        }
        let authorization = match (text("token")?, text("username")?, text("password")?) {
            (Some(token), _, _) => format!("Bearer {token}"),
            (None, Some(user), password) => {
                use std::fmt::Write;
                let mut plain = String::new();
                let _ = write!(plain, "{user}:{}", password.unwrap_or_default());
                format!("Basic {}", base64(plain.as_bytes()))
            }
            (None, None, Some(_)) => {
                return Err(QueryError::Endpoint("the Secret has a password, but no username beside it".to_owned()));
            }
            (None, None, None) if secret.contains_key("ca.crt") => return Ok(()),
            (None, None, None) => {
                return Err(QueryError::Endpoint(
                    "the Secret has neither token, nor username and password, nor ca.crt".to_owned(),
                ));
            }
        };
        let mut value = HeaderValue::try_from(authorization)
            .map_err(|_| QueryError::Endpoint("the Secret's credentials cannot stand in an HTTP header".to_owned()))?;
        value.set_sensitive(true);
        self.headers.insert(AUTHORIZATION, value);
        Ok(())
    }

    /// Does not check the server's certificate.
    pub fn skip_verify(&mut self) {
        self.trust = Trust::Anybody;
    }

    /// For messages: without user, password and query.
    #[must_use]
    pub fn server(&self) -> String {
        server_name(&self.url)
    }

    fn query_url(&self) -> Url {
        let mut url = self.url.clone();
        let path = format!("{}/api/v1/query", url.path().trim_end_matches('/'));
        url.set_path(&path);
        url.set_fragment(None);
        url
    }
}

/// Names the server of an address for messages and for the limit of queries at once.
pub(crate) fn server_name(url: &Url) -> String {
    let mut url = url.clone();
    // Both fail only for URLs that cannot have credentials; those have none.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_query(None);
    url.set_fragment(None);
    url.as_str().trim_end_matches('/').to_owned()
}

/// Standard base64 with padding: for basic auth only (RFC 7617).
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let word =
            chunk.iter().enumerate().fold(0_u32, |word, (index, byte)| word | u32::from(*byte) << (16 - 8 * index));
        for index in 0..4 {
            out.push(if index <= chunk.len() {
                char::from(ALPHABET[(word >> (18 - 6 * index)) as usize & 63])
            } else {
                '='
            });
        }
    }
    out
}

/// One number with its labels.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub labels: BTreeMap<String, String>,
    pub value: f64,
}

/// The times of one series' samples, in milliseconds, ascending.
#[derive(Clone, Debug, PartialEq)]
pub struct Times {
    pub labels: BTreeMap<String, String>,
    pub times: Vec<i64>,
}

/// What a query yields.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    Scalar(f64),
    Vector(Vec<Sample>),
    /// A range of samples: `metric[1m]`.
    Matrix(Vec<Times>),
    Text,
}

impl Answer {
    /// Exactly one number; `None` where there is no series at all, or it is not a number.
    ///
    /// # Errors
    /// On several series, a range or a text.
    pub fn number(&self) -> Result<Option<f64>, QueryError> {
        let value = match self {
            Self::Scalar(value) => *value,
            Self::Vector(samples) => match samples.as_slice() {
                [] => return Ok(None),
                [sample] => sample.value,
                more => return Err(QueryError::NotOneSeries { count: more.len() }),
            },
            Self::Matrix(_) => return Err(QueryError::NotANumber { kind: "range of samples" }),
            Self::Text => return Err(QueryError::NotANumber { kind: "text" }),
        };
        // A division by zero is no data, not an infinitely good or bad canary.
        Ok(value.is_finite().then_some(value))
    }

    /// # Errors
    /// On anything but a vector.
    pub fn vector(self) -> Result<Vec<Sample>, QueryError> {
        match self {
            Self::Vector(samples) => Ok(samples),
            Self::Scalar(_) => Err(QueryError::NotANumber { kind: "scalar" }),
            Self::Matrix(_) => Err(QueryError::NotANumber { kind: "range of samples" }),
            Self::Text => Err(QueryError::NotANumber { kind: "text" }),
        }
    }
}

/// Asks. Cheap to clone; connections are kept.
#[derive(Clone, Debug)]
pub struct Prometheus {
    deadline: Duration,
    clients: Arc<Mutex<HashMap<(bool, Trust), Client>>>,
}

impl Prometheus {
    /// `deadline`: of one query, the reading of its answer included.
    #[must_use]
    pub fn new(deadline: Duration) -> Self {
        Self { deadline, clients: Arc::default() }
    }

    /// Runs an instant query; at `time` (Unix milliseconds), or at the server's present where there is none.
    ///
    /// # Errors
    /// Everything that is not an answer of the wanted shape.
    pub async fn query(&self, endpoint: &Endpoint, query: &str, time: Option<i64>) -> Result<Answer, QueryError> {
        let server = endpoint.server();
        let client = self.client(endpoint)?;
        let mut form = endpoint.query_url();
        form.query_pairs_mut().append_pair("query", query);
        // VictoriaMetrics would answer as of 30 s ago (`-search.latencyOffset`), which is before the step that is judged. Others ignore it.
        form.query_pairs_mut().append_pair("nocache", "1");
        if let Some(time) = time {
            form.query_pairs_mut()
                .append_pair("time", &format!("{}.{:03}", time.div_euclid(1000), time.rem_euclid(1000)));
        }
        let request = if form.as_str().len() <= MAX_URL {
            client.get(form)
        } else {
            client
                .post(endpoint.query_url())
                .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
                .body(form.query().unwrap_or_default().to_owned())
        };
        let unreachable = |error: reqwest::Error| QueryError::Unreachable {
            server: server.clone(),
            reason: explain(error, self.deadline),
        };
        let mut response = request.headers(endpoint.headers.clone()).send().await.map_err(unreachable)?;
        let status = response.status().as_u16();
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(unreachable)? {
            if body.len() + chunk.len() > MAX_ANSWER {
                return Err(QueryError::TooLarge { server });
            }
            body.extend_from_slice(&chunk);
        }
        let parsed: Result<Wire, _> = serde_json::from_slice(&body);
        if status != 200 {
            // Only in Prometheus's own form: the page of some other server tells people nothing, and might tell too much.
            let message = parsed.ok().and_then(|wire| wire.error).unwrap_or_default();
            return Err(QueryError::Status { server, status, message: shorten(&message) });
        }
        let malformed = |reason: String| QueryError::Malformed { server: server.clone(), reason };
        let wire = parsed.map_err(|error| malformed(error.to_string()))?;
        let data = wire.data.ok_or_else(|| malformed(wire.error.unwrap_or_else(|| "no data".to_owned())))?;
        data.answer().map_err(malformed)
    }

    fn client(&self, endpoint: &Endpoint) -> Result<Client, QueryError> {
        let tls = endpoint.url.scheme() == "https";
        let key = (tls, if tls { endpoint.trust.clone() } else { Trust::default() });
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(&key) {
            return Ok(client.clone());
        }
        let bad = |error: reqwest::Error| QueryError::Endpoint(format!("{}: {}", endpoint.server(), chain(&error)));
        let builder = Client::builder()
            .timeout(self.deadline)
            .connect_timeout(self.deadline)
            .pool_idle_timeout(Duration::from_secs(30))
            .pool_max_idle_per_host(4)
            // Credentials and queries go where they were meant to go, or nowhere.
            .redirect(redirect::Policy::none())
            .no_proxy();
        let builder = match &key {
            // Without this an image that has no CA files could not even ask http:// servers: the system's verifier
            // refuses to be made without roots.
            (false, _) => builder.tls_certs_only([]),
            (true, Trust::System) => builder,
            (true, Trust::Own(pem)) => builder.tls_certs_only(Certificate::from_pem_bundle(pem).map_err(bad)?),
            (true, Trust::Anybody) => builder.tls_danger_accept_invalid_certs(true),
        };
        let client = builder.build().map_err(|error| {
            QueryError::Endpoint(format!(
                "{}: {}; put the CA into the key ca.crt of the secretRef",
                endpoint.server(),
                chain(&error)
            ))
        })?;
        if clients.len() >= MAX_CLIENTS {
            clients.clear();
        }
        clients.insert(key, client.clone());
        Ok(client)
    }
}

/// Why a server could not be asked, in words, without the URL (it may hold credentials).
fn explain(error: reqwest::Error, deadline: Duration) -> String {
    if error.is_timeout() {
        return format!("no answer within {} s", deadline.as_secs_f64());
    }
    chain(&error.without_url())
}

/// An error with its causes; reqwest's own words are only "error sending request".
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    shorten(&text)
}

/// At most [`MAX_MESSAGE`] characters, on one line.
pub(crate) fn shorten(text: &str) -> String {
    let mut line: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if let Some((end, _)) = line.char_indices().nth(MAX_MESSAGE) {
        line.truncate(end);
        line.push('…');
    }
    line
}

#[derive(Deserialize)]
struct Wire {
    #[serde(default)]
    error: Option<String>,
    #[serde(default)]
    data: Option<WireData>,
}

#[derive(Deserialize)]
#[serde(tag = "resultType", content = "result", rename_all = "lowercase")]
enum WireData {
    Scalar(WirePoint),
    Vector(Vec<WireSample>),
    Matrix(Vec<WireSeries>),
    String(serde::de::IgnoredAny),
}

type WirePoint = (f64, String);

#[derive(Deserialize)]
struct WireSample {
    #[serde(default)]
    metric: BTreeMap<String, String>,
    value: WirePoint,
}

#[derive(Deserialize)]
struct WireSeries {
    #[serde(default)]
    metric: BTreeMap<String, String>,
    #[serde(default)]
    values: Vec<(f64, serde::de::IgnoredAny)>,
}

impl WireData {
    fn answer(self) -> Result<Answer, String> {
        // Rust reads Prometheus's NaN, +Inf and -Inf as they are.
        let number = |text: &str| text.parse::<f64>().map_err(|_| format!("{:?} is not a number", shorten(text)));
        Ok(match self {
            Self::Scalar((_, value)) => Answer::Scalar(number(&value)?),
            Self::Vector(samples) => Answer::Vector(
                samples
                    .into_iter()
                    .map(|sample| Ok(Sample { value: number(&sample.value.1)?, labels: sample.metric }))
                    .collect::<Result<_, String>>()?,
            ),
            Self::Matrix(series) => Answer::Matrix(
                series
                    .into_iter()
                    .map(|series| Times {
                        labels: series.metric,
                        times: series.values.iter().map(|(seconds, _)| milliseconds(*seconds)).collect(),
                    })
                    .collect(),
            ),
            Self::String(_) => Answer::Text,
        })
    }
}

/// Prometheus keeps times in milliseconds and writes them as decimal seconds.
#[expect(clippy::cast_possible_truncation, reason = "saturates, far from any time of day")]
pub(crate) fn milliseconds(seconds: f64) -> i64 {
    (seconds * 1000.0).round() as i64
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use std::net::SocketAddr;

    use axum::{
        Router,
        body::Body,
        extract::{Request, State},
        http::Response,
    };
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
        sync::mpsc,
    };

    use super::*;

    const ONE: &str =
        r#"{"status":"success","data":{"resultType":"vector","result":[{"metric":{"a":"b"},"value":[1.5,"2"]}]}}"#;

    /// What a client sent: method, URL, headers, body.
    struct Seen {
        method: String,
        url: String,
        headers: HeaderMap,
        body: String,
    }

    /// A server that gives one answer to everything, and hands over what it was asked.
    async fn server(status: u16, body: impl Into<String>) -> (SocketAddr, mpsc::Receiver<Seen>) {
        let (sender, receiver) = mpsc::channel(16);
        let answer = async |State((status, body, seen)): State<(u16, String, mpsc::Sender<Seen>)>, request: Request| {
            let (parts, sent) = request.into_parts();
            let sent = axum::body::to_bytes(sent, 1 << 20).await.unwrap();
            let _ = seen.try_send(Seen {
                method: parts.method.to_string(),
                url: parts.uri.to_string(),
                headers: parts.headers,
                body: String::from_utf8(sent.to_vec()).unwrap(),
            });
            Response::builder().status(status).header("location", "/elsewhere").body(Body::from(body)).unwrap()
        };
        let app = Router::new().fallback(answer).with_state((status, body.into(), sender));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        (address, receiver)
    }

    fn prometheus() -> Prometheus {
        Prometheus::new(Duration::from_secs(5))
    }

    fn secret(pairs: &[(&str, &str)]) -> BTreeMap<String, Vec<u8>> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), value.as_bytes().to_vec())).collect()
    }

    #[tokio::test]
    async fn a_query_keeps_the_base_path_and_carries_its_time() {
        let (address, mut seen) = server(200, ONE).await;
        let endpoint = Endpoint::new(&format!("http://{address}/prom/")).unwrap();
        let answer = prometheus().query(&endpoint, "sum(x{a=\"b\"})", Some(1_700_000_000_042)).await.unwrap();
        assert_eq!(answer.number().unwrap(), Some(2.0));
        let seen = seen.recv().await.unwrap();
        assert_eq!(seen.method, "GET");
        assert_eq!(seen.url, "/prom/api/v1/query?query=sum%28x%7Ba%3D%22b%22%7D%29&nocache=1&time=1700000000.042");
    }

    #[tokio::test]
    async fn a_query_too_long_for_an_url_is_posted() {
        let (address, mut seen) = server(200, ONE).await;
        let endpoint = Endpoint::new(&format!("http://{address}")).unwrap();
        prometheus().query(&endpoint, &"a+".repeat(3000), None).await.unwrap();
        let seen = seen.recv().await.unwrap();
        assert_eq!((seen.method.as_str(), seen.url.as_str()), ("POST", "/api/v1/query"));
        assert!(seen.body.starts_with("query=a%2Ba%2B"), "{}", seen.body);
        assert_eq!(seen.headers[CONTENT_TYPE], "application/x-www-form-urlencoded");
    }

    #[tokio::test]
    async fn credentials_and_headers_are_sent() {
        let (address, mut seen) = server(200, ONE).await;
        for (pairs, expected) in [
            (&[("username", "ann"), ("password", "s3cret\n")][..], "Basic YW5uOnMzY3JldA=="),
            (&[("token", "abc\r\n")][..], "Bearer abc"),
            (&[("token", "abc"), ("username", "ann")][..], "Bearer abc"),
            (&[("username", "a")][..], "Basic YTo="),
        ] {
            let mut endpoint = Endpoint::new(&format!("http://{address}")).unwrap();
            endpoint.header("X-Scope-OrgID", "one").unwrap();
            endpoint.header("x-scope-orgid", "two").unwrap();
            endpoint.credentials(&secret(pairs)).unwrap();
            prometheus().query(&endpoint, "up", None).await.unwrap();
            let headers = seen.recv().await.unwrap().headers;
            assert_eq!(headers[AUTHORIZATION], expected);
            assert_eq!(headers.get_all("x-scope-orgid").iter().collect::<Vec<_>>(), ["one", "two"]);
        }
        let endpoint = Endpoint::new(&format!("http://bob:pass@{address}")).unwrap();
        prometheus().query(&endpoint, "up", None).await.unwrap();
        assert_eq!(seen.recv().await.unwrap().headers[AUTHORIZATION], "Basic Ym9iOnBhc3M=");
        assert_eq!(endpoint.server(), format!("http://{address}"), "messages do not show credentials");
    }

    #[test]
    fn base64_has_the_rfcs_test_vectors() {
        for (plain, encoded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(plain.as_bytes()), encoded);
        }
    }

    #[test]
    fn credentials_that_cannot_be_used_are_refused_without_being_shown() {
        for (pairs, words) in [
            (&[("password", "hush")][..], "no username"),
            (&[("apikey", "hush")][..], "neither token, nor username"),
            (&[("token", "hu\nsh")][..], "HTTP header"),
            (&[("token", "t"), ("ca.crt", "hush")][..], "ca.crt holds no PEM certificate"),
        ] {
            let error = Endpoint::new("http://p").unwrap().credentials(&secret(pairs)).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
            assert!(!error.to_string().contains("hush") && !error.to_string().contains("hu\nsh"), "{error}");
            assert!(error.is_mistake());
        }
        for address in ["prometheus:9090", "ftp://p", "", "http://"] {
            assert!(Endpoint::new(address).unwrap_err().is_mistake(), "{address}");
        }
    }

    #[tokio::test]
    async fn what_a_server_refuses_is_told_in_its_own_words_if_it_is_a_prometheus() {
        let refusal =
            r#"{"status":"error","errorType":"bad_data","error":"1:4: parse error:  unclosed\n left parenthesis"}"#;
        for (status, body, mistake, words) in [
            (400, refusal, true, "answered 400: 1:4: parse error: unclosed left parenthesis"),
            (422, refusal, true, "answered 422: 1:4"),
            (401, "<html>please log in</html>", true, "answered 401"),
            (404, "404 page not found", true, "answered 404"),
            (302, "", true, "answered 302"),
            (429, "", false, "answered 429"),
            (500, "boom", false, "answered 500"),
            (503, refusal, false, "answered 503: 1:4"),
            (200, "<html>hello</html>", true, "did not answer as a Prometheus does"),
            (200, r#"{"status":"success"}"#, true, "did not answer as a Prometheus does"),
            (200, r#"{"status":"success","data":{"resultType":"scalar","result":[1,"x"]}}"#, true, "is not a number"),
        ] {
            let (address, _seen) = server(status, body).await;
            let endpoint = Endpoint::new(&format!("http://{address}")).unwrap();
            let error = prometheus().query(&endpoint, "sum(", None).await.unwrap_err();
            assert_eq!(error.is_mistake(), mistake, "{error}");
            assert!(error.to_string().contains(words), "{error}");
            assert!(!error.to_string().contains("html>please"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_server_that_is_away_or_silent_is_unreachable_and_no_mistake() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let silent = listener.local_addr().unwrap();
        let endpoint = Endpoint::new(&format!("http://u:hush@{silent}")).unwrap();
        let error = Prometheus::new(Duration::from_millis(200)).query(&endpoint, "up", None).await.unwrap_err();
        assert_eq!(
            error,
            QueryError::Unreachable { server: format!("http://{silent}"), reason: "no answer within 0.2 s".to_owned() }
        );
        drop(listener);
        let error = prometheus().query(&endpoint, "up", None).await.unwrap_err();
        assert!(matches!(error, QueryError::Unreachable { .. }) && !error.is_mistake(), "{error}");
        assert!(error.to_string().contains("refused") && !error.to_string().contains("hush"), "{error}");
    }

    #[tokio::test]
    async fn an_answer_without_end_is_cut_off() {
        let (address, _seen) = server(200, "x".repeat(MAX_ANSWER + 1)).await;
        let endpoint = Endpoint::new(&format!("http://{address}")).unwrap();
        let error = prometheus().query(&endpoint, "up", None).await.unwrap_err();
        assert!(matches!(error, QueryError::TooLarge { .. }), "{error}");
    }

    #[tokio::test]
    async fn answers_become_one_number_or_say_why_not() {
        let data = |kind: &str, result: &str| {
            format!(r#"{{"status":"success","data":{{"resultType":"{kind}","result":{result}}}}}"#)
        };
        for (body, expected) in [
            (data("scalar", r#"[1,"42.5"]"#), Ok(Some(42.5))),
            (data("vector", "[]"), Ok(None)),
            (data("vector", r#"[{"metric":{},"value":[1,"NaN"]}]"#), Ok(None)),
            (data("vector", r#"[{"metric":{},"value":[1,"+Inf"]}]"#), Ok(None)),
            (data("vector", r#"[{"metric":{},"value":[1,"-1e3"]}]"#), Ok(Some(-1000.0))),
            (
                data("vector", r#"[{"metric":{},"value":[1,"1"]},{"metric":{},"value":[1,"1"]}]"#),
                Err(QueryError::NotOneSeries { count: 2 }),
            ),
            (
                data("matrix", r#"[{"metric":{},"values":[[1,"1"]]}]"#),
                Err(QueryError::NotANumber { kind: "range of samples" }),
            ),
            (data("string", r#"[1,"x"]"#), Err(QueryError::NotANumber { kind: "text" })),
        ] {
            let (address, _seen) = server(200, body.clone()).await;
            let endpoint = Endpoint::new(&format!("http://{address}")).unwrap();
            let answer = prometheus().query(&endpoint, "x", None).await.unwrap();
            assert_eq!(answer.number(), expected, "{body}");
        }
    }

    /// An https server with a certificate from a CA of its own; it answers everything with [`ONE`].
    async fn tls_server() -> (SocketAddr, String) {
        let ca_key = rcgen::KeyPair::generate().unwrap();
        let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
        ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let ca_pem = ca.self_signed(&ca_key).unwrap().pem();
        let issuer = rcgen::Issuer::new(ca, ca_key);
        let key = rcgen::KeyPair::generate().unwrap();
        let leaf =
            rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![leaf.der().clone()],
                rustls_pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let Ok(mut stream) = acceptor.accept(stream).await else { continue };
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    match stream.read_u8().await {
                        Ok(byte) => request.push(byte),
                        Err(_) => break,
                    }
                }
                let answer =
                    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{ONE}", ONE.len());
                let _ = stream.write_all(answer.as_bytes()).await;
                let _ = stream.shutdown().await;
            }
        });
        (address, ca_pem)
    }

    #[tokio::test]
    async fn a_ca_of_the_users_own_is_trusted_and_nobody_else() {
        let (address, ca) = tls_server().await;
        let (_, other_ca) = tls_server().await;
        let prometheus = prometheus();
        let mut own = Endpoint::new(&format!("https://{address}")).unwrap();
        own.credentials(&secret(&[("ca.crt", &ca)])).unwrap();
        assert_eq!(prometheus.query(&own, "up", None).await.unwrap().number(), Ok(Some(2.0)));
        let mut other = Endpoint::new(&format!("https://{address}")).unwrap();
        other.credentials(&secret(&[("ca.crt", &other_ca)])).unwrap();
        let error = prometheus.query(&other, "up", None).await.unwrap_err();
        assert!(
            matches!(error, QueryError::Unreachable { .. }) && error.to_string().contains("certificate"),
            "{error}"
        );
        let mut anybody = Endpoint::new(&format!("https://{address}")).unwrap();
        anybody.skip_verify();
        assert!(prometheus.query(&anybody, "up", None).await.is_ok());
        // Where the system has no CA files this is another error, and still one.
        assert!(prometheus.query(&Endpoint::new(&format!("https://{address}")).unwrap(), "up", None).await.is_err());
    }
}
