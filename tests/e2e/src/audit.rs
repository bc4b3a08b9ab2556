//! What Sluice asked of the API server: from the audit log that our test cluster keeps (`SLUICE_AUDIT_LOG`). Other clusters
//! have none that could be read; then nothing is known here.

use std::{
    fs::File,
    io::{BufRead, BufReader, Seek, SeekFrom},
    sync::{Mutex, PoisonError},
};

use serde_json::Value;

/// A request of one of Sluice's service accounts.
#[derive(Clone, Debug)]
pub struct Request {
    /// When it was answered. A watch is there twice, when its answer began and when it ended.
    pub at_ms: u64,
    /// Who asked: the namespace and the name of a service account, and the name of a Pod.
    pub home: String,
    pub account: String,
    pub pod: String,
    pub verb: String,
    pub group: String,
    pub resource: String,
    pub namespace: String,
    pub name: String,
    pub code: u64,
    /// By RBAC. (A namespace that is being deleted refuses with 403, too.)
    pub forbidden: bool,
    pub dry_run: bool,
}

impl Request {
    /// Neither a read nor what goes on for ever: the Lease, questions about tokens, and whether the webhook is reached.
    #[must_use]
    pub fn writes(&self) -> bool {
        matches!(&*self.verb, "create" | "update" | "patch" | "delete" | "deletecollection")
            && !matches!(&*self.resource, "leases" | "tokenreviews")
            && !self.dry_run
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
    if !line.contains(":sluice-") {
        return None;
    }
    let event: Value = serde_json::from_str(line).ok()?;
    let text = |pointer: &str| event.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
    // The end of a watch that is under way is not there yet.
    if !matches!(&*text("/stage"), "ResponseComplete" | "ResponseStarted") {
        return None;
    }
    let user = text("/user/username");
    let (home, account) = user.strip_prefix("system:serviceaccount:")?.split_once(':')?;
    if !account.starts_with("sluice-") {
        return None;
    }
    let at: jiff::Timestamp = text("/stageTimestamp").parse().ok()?;
    let resource = [text("/objectRef/resource"), text("/objectRef/subresource")];
    Some(Request {
        at_ms: u64::try_from(at.as_millisecond()).ok()?,
        home: home.to_owned(),
        account: account.to_owned(),
        pod: text("/user/extra/authentication.kubernetes.io~1pod-name/0"),
        verb: text("/verb"),
        group: text("/objectRef/apiGroup"),
        resource: resource.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("/"),
        namespace: text("/objectRef/namespace"),
        name: text("/objectRef/name"),
        code: event.pointer("/responseStatus/code").and_then(Value::as_u64).unwrap_or_default(),
        forbidden: text("/annotations/authorization.k8s.io~1decision") == "forbid",
        dry_run: text("/requestURI").contains("dryRun=All"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(user: &str, stage: &str, decision: &str) -> String {
        serde_json::json!({
            "kind": "Event", "apiVersion": "audit.k8s.io/v1", "level": "Metadata", "stage": stage, "verb": "watch",
            "requestURI": "/apis/apps/v1/deployments?watch=true", "user": {"username": user, "extra": {
                "authentication.kubernetes.io/pod-name": ["sluice-controller-0"],
            }},
            "objectRef": {"resource": "deployments", "subresource": "scale", "apiGroup": "apps", "namespace": "shop", "name": "web"},
            "responseStatus": {"code": 200}, "stageTimestamp": "2026-01-01T00:00:00.000000Z",
            "annotations": {"authorization.k8s.io/decision": decision},
        })
        .to_string()
    }

    #[test]
    fn lines_of_our_accounts_are_requests_and_others_are_none() {
        let ours = "system:serviceaccount:sluice-system:sluice-controller";
        for stage in ["ResponseStarted", "ResponseComplete"] {
            let request = request(&line(ours, stage, "allow")).unwrap();
            assert_eq!((&*request.home, &*request.account), ("sluice-system", "sluice-controller"));
            assert_eq!(request.pod, "sluice-controller-0");
            assert_eq!((&*request.verb, &*request.group, &*request.resource), ("watch", "apps", "deployments/scale"));
            assert_eq!((&*request.namespace, &*request.name), ("shop", "web"));
            assert_eq!((request.at_ms, request.code, request.forbidden), (1_767_225_600_000, 200, false));
        }
        assert!(request(&line(ours, "ResponseComplete", "forbid")).unwrap().forbidden);
        let dry_run = line(ours, "ResponseComplete", "allow").replace("watch=true", "dryRun=All");
        assert!(request(&dry_run).unwrap().dry_run);
        assert!(request(&line(ours, "RequestReceived", "allow")).is_none());
        assert!(request(&line("system:serviceaccount:shop:default", "ResponseComplete", "allow")).is_none());
        let another = "system:serviceaccount:shop:sluice-controller";
        assert_eq!(
            request(&line(another, "ResponseComplete", "allow")).unwrap().home,
            "shop",
            "an installation of its own"
        );
        // Said of us by somebody else.
        let about = line("kubernetes-admin", "ResponseComplete", ours);
        assert!(about.contains(ours) && request(&about).is_none());
    }
}
