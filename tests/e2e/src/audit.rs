//! What Sluice asked of the API server: from the audit log that our test cluster keeps (`SLUICE_AUDIT_LOG`). Other clusters
//! have none that could be read; then nothing is known here.

use std::{
    fs::File,
    io::{BufRead, BufReader, Seek, SeekFrom},
    sync::{Mutex, PoisonError},
};

use serde_json::Value;

use crate::cluster::SYSTEM;

/// A request of one of Sluice's service accounts.
#[derive(Clone, Debug)]
pub struct Request {
    /// When it was answered.
    pub at_ms: u64,
    /// Who asked: the name of a Pod.
    pub pod: String,
    pub verb: String,
    pub group: String,
    pub resource: String,
    pub namespace: String,
    pub name: String,
    pub code: u64,
    /// By RBAC. (A namespace that is being deleted refuses with 403, too.)
    pub forbidden: bool,
}

impl Request {
    /// Neither a read nor what goes on for ever: the Lease, and questions about tokens.
    #[must_use]
    pub fn writes(&self) -> bool {
        matches!(&*self.verb, "create" | "update" | "patch" | "delete" | "deletecollection")
            && !matches!(&*self.resource, "leases" | "tokenreviews")
    }
}

#[derive(Default)]
struct Read {
    offset: u64,
    requests: Vec<Request>,
}

static READ: Mutex<Read> = Mutex::new(Read { offset: 0, requests: Vec::new() });

/// Whether there is an audit log.
#[must_use]
pub fn is_kept() -> bool {
    std::env::var_os("SLUICE_AUDIT_LOG").is_some()
}

/// Everything that was answered since `from_ms`; nothing where no audit log is kept.
#[must_use]
pub fn requests(from_ms: u64) -> Vec<Request> {
    let Some(path) = std::env::var_os("SLUICE_AUDIT_LOG") else { return Vec::new() };
    let mut read = READ.lock().unwrap_or_else(PoisonError::into_inner);
    let Ok(mut file) = File::open(path) else { return Vec::new() };
    if file.seek(SeekFrom::Start(read.offset)).is_ok() {
        let mut lines = BufReader::new(file);
        let mut line = String::new();
        // A line without its end is being written: it is read the next time.
        while lines.read_line(&mut line).is_ok_and(|_| line.ends_with('\n')) {
            read.offset += line.len() as u64;
            read.requests.extend(request(&line));
            line.clear();
        }
    }
    read.requests.iter().filter(|request| request.at_ms >= from_ms).cloned().collect()
}

fn request(line: &str) -> Option<Request> {
    // Most lines are of others; parsing them all would take the processor from what is tested.
    if !line.contains(&format!("system:serviceaccount:{SYSTEM}:sluice-")) {
        return None;
    }
    let event: Value = serde_json::from_str(line).ok()?;
    let text = |pointer: &str| event.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
    if text("/stage") != "ResponseComplete" {
        return None;
    }
    let at: jiff::Timestamp = text("/stageTimestamp").parse().ok()?;
    let resource = [text("/objectRef/resource"), text("/objectRef/subresource")];
    Some(Request {
        at_ms: u64::try_from(at.as_millisecond()).ok()?,
        pod: text("/user/extra/authentication.kubernetes.io~1pod-name/0"),
        verb: text("/verb"),
        group: text("/objectRef/apiGroup"),
        resource: resource.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("/"),
        namespace: text("/objectRef/namespace"),
        name: text("/objectRef/name"),
        code: event.pointer("/responseStatus/code").and_then(Value::as_u64).unwrap_or_default(),
        forbidden: text("/annotations/authorization.k8s.io~1decision") == "forbid",
    })
}
