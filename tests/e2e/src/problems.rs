//! What goes wrong in Sluice while tests run: lines of the logs of controllers, fleet and sidecars that are no INFO (warnings,
//! errors, panics), containers of ours that restart, and requests of ours that RBAC forbids. A test that causes some declares
//! them; any other fails the test that ends next. A panic and a missing right fail it always.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use anyhow::Context;
use futures::TryStreamExt;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use kube::{
    Api, Client, ResourceExt,
    runtime::{WatchStreamExt, watcher},
};

use crate::{audit, logs, watch::unix_ms};

/// What follows from a fault may be said a little later than the test that caused it ends.
const GRACE_MS: u64 = 15_000;

/// How a request that RBAC forbids begins, as the audit log tells of it.
const FORBIDDEN: &str = "403 by RBAC: ";

/// What an API server says of one.
const NOT_ALLOWED: &str = "forbidden: User ";

/// Something that went wrong.
#[derive(Clone, Debug)]
pub struct Problem {
    pub at_ms: u64,
    /// `namespace/pod/container`.
    pub place: String,
    pub text: String,
}

struct Expectation {
    parts: Vec<String>,
    /// Missing rights, too.
    rights: bool,
    from_ms: u64,
    /// While it is `None`, the test still runs.
    until_ms: Option<u64>,
}

#[derive(Default)]
struct Seen {
    problems: Vec<Problem>,
    expected: Vec<Expectation>,
    /// Restarts by `namespace/pod/container`.
    restarts: BTreeMap<String, i32>,
    audited_ms: u64,
}

static SEEN: Mutex<Option<Seen>> = Mutex::new(None);

fn with<T>(f: impl FnOnce(&mut Seen) -> T) -> T {
    let mut seen: MutexGuard<'_, Option<Seen>> = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
    f(seen.get_or_insert_default())
}

/// Problems that contain one of the words it was made with are expected until it is dropped, and some seconds longer.
#[must_use]
pub struct Expected(usize);

/// Declares what a test is about to cause: parts of lines (`namespace/pod/container: text`). It covers no panic and no missing
/// right, whatever the words.
pub fn expect(parts: &[&str]) -> Expected {
    declare(parts, false)
}

/// The API server is about to begin anew: until it has read the roles it forbids what they allow.
pub fn roles_are_unread() -> Expected {
    declare(&[FORBIDDEN, NOT_ALLOWED], true)
}

fn declare(parts: &[&str], rights: bool) -> Expected {
    let parts = parts.iter().map(|&part| part.to_owned()).collect();
    with(|seen| {
        seen.expected.push(Expectation { parts, rights, from_ms: unix_ms(), until_ms: None });
        Expected(seen.expected.len() - 1)
    })
}

impl Drop for Expected {
    fn drop(&mut self) {
        with(|seen| seen.expected[self.0].until_ms = Some(unix_ms() + GRACE_MS));
    }
}

/// What went wrong since it was asked last, and was not expected.
#[must_use]
pub fn unexpected() -> Vec<Problem> {
    with(|seen| {
        for request in audit::requests(seen.audited_ms) {
            seen.audited_ms = seen.audited_ms.max(request.at_ms + 1);
            if request.forbidden {
                let place = request.pod.clone();
                seen.problems.push(Problem { at_ms: request.at_ms, place, text: format!("{FORBIDDEN}{request:?}") });
            }
        }
        let expected = &seen.expected;
        let mut problems = std::mem::take(&mut seen.problems);
        problems.retain(|problem| {
            let line = problem.to_string();
            let excused = expected.iter().any(|expectation| {
                let until = expectation.until_ms.unwrap_or(u64::MAX);
                (expectation.from_ms..until).contains(&problem.at_ms)
                    && expectation.parts.iter().any(|part| line.contains(part.as_str()))
                    && (expectation.rights || !is_inexcusable(&problem.text))
            });
            !excused
        });
        problems
    })
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.place, self.text)
    }
}

/// Starts to follow everything of Sluice in the cluster that `KUBECONFIG` names, once for the whole run. Tests have a runtime
/// each that ends with them, so this one has a thread of its own.
///
/// # Errors
/// If there can be no such thread.
pub fn watch() -> anyhow::Result<()> {
    static STARTED: OnceLock<()> = OnceLock::new();
    if STARTED.set(()).is_err() {
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("problems".to_owned()).spawn(move || {
        runtime.block_on(async {
            if let Err(error) = follow_all().await {
                note(unix_ms(), "the tests".to_owned(), format!("the logs of Sluice are not followed: {error:#}"));
            }
        });
    })?;
    Ok(())
}

fn note(at_ms: u64, place: String, text: String) {
    with(|seen| seen.problems.push(Problem { at_ms, place, text }));
}

async fn follow_all() -> anyhow::Result<()> {
    let client = Client::try_default().await?;
    // What was logged before is not of this run.
    let began_ms = unix_ms();
    with(|seen| seen.audited_ms = began_ms);
    let pods: Api<Pod> = Api::all(client.clone());
    let mut followed = BTreeSet::new();
    let mut events = std::pin::pin!(watcher(pods, watcher::Config::default()).default_backoff().applied_objects());
    loop {
        let pod = match events.try_next().await {
            Ok(pod) => pod.context("the watch ended")?,
            // It is started again: the API server may be what a test stops.
            Err(_) => continue,
        };
        let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
        for container in ours(&pod) {
            let place = format!("{namespace}/{name}/{}", container.name);
            restarted(&place, &container, began_ms);
            let started = container.container_id.as_ref().is_some_and(|id| !id.is_empty());
            if started && followed.insert((pod.uid(), container.name.clone())) {
                let api: Api<Pod> = Api::namespaced(client.clone(), &namespace);
                tokio::spawn(logs::follow(api, name.clone(), container.name, move |time, line| {
                    let at_ms = u64::try_from(time.as_millisecond()).unwrap_or_default();
                    if at_ms >= began_ms && is_problem(line) {
                        note(at_ms, place.clone(), line.to_owned());
                    }
                }));
            }
        }
    }
}

/// Containers of a Pod that run a program of Sluice.
fn ours(pod: &Pod) -> Vec<ContainerStatus> {
    let Some(status) = &pod.status else { return Vec::new() };
    let all = status.init_container_statuses.iter().chain(&status.container_statuses).flatten();
    all.filter(|container| ["/sluice-controller", "/sluice-proxy"].iter().any(|image| container.image.contains(image)))
        .cloned()
        .collect()
}

fn restarted(place: &str, container: &ContainerStatus, began_ms: u64) {
    let restarts = container.restart_count;
    let before = with(|seen| seen.restarts.insert(place.to_owned(), restarts)).unwrap_or(0);
    let ended = container.last_state.as_ref().and_then(|state| state.terminated.as_ref());
    let at = ended
        .and_then(|ended| ended.finished_at.as_ref())
        .map_or(began_ms, |time| u64::try_from(time.0.as_millisecond()).unwrap_or_default());
    // Kubernetes says it in whole seconds.
    if restarts > before && at + 1000 > began_ms {
        let why =
            ended.map(|ended| format!("exit code {}, {}", ended.exit_code, ended.reason.clone().unwrap_or_default()));
        note(unix_ms(), place.to_owned(), format!("the container was restarted: {}", why.unwrap_or_default()));
    }
}

/// Whether a line of the log of a program of ours says that something is wrong.
fn is_problem(line: &str) -> bool {
    let words = line.to_lowercase();
    let quiet =
        ["\"level\":\"info\"", "\"level\":\"debug\"", " info ", " debug "].iter().any(|level| words.contains(level));
    // Kubernetes says of its own controllers' Pods that a quota forbids them.
    let refused = words.contains("forbidden") && !words.contains("exceeded quota");
    !line.trim().is_empty() && (!quiet || refused || words.contains("panicked"))
}

/// No fault that a test causes is a reason for a panic, or for a right that the chart does not grant. What else "forbidden" says
/// (a quota, a policy, a namespace that is being deleted) does not name the user.
fn is_inexcusable(text: &str) -> bool {
    let unauthorized = text.contains(NOT_ALLOWED) && text.contains(" cannot ");
    text.contains("panicked at") || unauthorized || text.starts_with(FORBIDDEN)
}

/// How long a test waits at most for what it caused to be over.
pub const PATIENCE: Duration = Duration::from_secs(120);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_info_is_a_problem() {
        for quiet in [r#"{"timestamp":"x","level":"INFO","message":"ready"}"#, "2026-01-01T00:00:00Z  INFO ready", ""] {
            assert!(!is_problem(quiet), "{quiet}");
        }
        for loud in [
            r#"{"timestamp":"x","level":"WARN","message":"watch failed"}"#,
            "2026-01-01T00:00:00Z ERROR sluice_proxy: x",
            "thread 'main' panicked at x.rs:1:1:",
            r#"{"level":"INFO","message":"pods is forbidden: User cannot list"}"#,
            r#"{"level":"WARN","message":"forbidden: exceeded quota"}"#,
            "Error: no API server",
        ] {
            assert!(is_problem(loud), "{loud}");
        }
    }

    #[test]
    fn what_was_expected_is_not_reported_and_the_rest_is_once() {
        let expected = expect(&["no stream to the control plane"]);
        note(unix_ms(), "a/b/c".into(), "no stream to the control plane: x".into());
        note(unix_ms(), "a/b/c".into(), "another".into());
        drop(expected);
        let found = unexpected();
        assert_eq!(found.iter().map(ToString::to_string).collect::<Vec<_>>(), ["a/b/c: another"]);
        assert!(unexpected().is_empty());

        // Not even whoever expects everything of a namespace expects these.
        let expected = expect(&["a/"]);
        let inexcusable = [
            "thread 'main' panicked at x.rs:1:1:",
            r#"{"level":"WARN","message":"watch failed: pods is forbidden: User \"system:serviceaccount:a:b\" cannot list resource \"pods\""}"#,
            "403 by RBAC: Request { x }",
        ];
        for text in inexcusable {
            note(unix_ms(), "a/b/c".into(), text.into());
        }
        for text in [
            "ERROR x",
            "the container was restarted: exit code 137, Error",
            "services \"x\" is forbidden: unable to create new content in namespace a because it is being terminated",
            "pods \"x\" is forbidden: exceeded quota: quota",
        ] {
            note(unix_ms(), "a/b/c".into(), text.into());
        }
        drop(expected);
        assert_eq!(unexpected().iter().map(|problem| problem.text.clone()).collect::<Vec<_>>(), inexcusable);

        // But what an API server forbids as long as it has not read the roles. A panic is none of that.
        let expected = roles_are_unread();
        for text in inexcusable {
            note(unix_ms(), "a/b/c".into(), text.into());
        }
        drop(expected);
        assert_eq!(unexpected().iter().map(|problem| problem.text.clone()).collect::<Vec<_>>(), inexcusable[..1]);
    }
}
