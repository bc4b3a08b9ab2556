//! What Sluice's service accounts may do, right by right, against what they were seen to do: a right that nothing uses is one
//! too many.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, bail, ensure};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, PolicyRule, Role, RoleBinding, RoleRef, Subject};
use kube::{
    Api, Client, ResourceExt,
    api::{ListParams, ObjectList},
};
use serde_json::Value;

use crate::{audit::Request, cluster::SYSTEM};

/// One verb on one resource, as a rule of a role grants it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Right {
    /// The service account, of [`SYSTEM`].
    pub account: String,
    /// In this namespace only; everywhere where absent.
    pub namespace: Option<String>,
    pub group: String,
    /// With its subresource: `deployments/scale`.
    pub resource: String,
    /// Of this object only; of all where absent.
    pub name: Option<String>,
    pub verb: String,
}

impl std::fmt::Display for Right {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {} {}", self.account, self.verb, self.resource)?;
        if !self.group.is_empty() {
            write!(f, ".{}", self.group)?;
        }
        if let Some(name) = &self.name {
            write!(f, " {name}")?;
        }
        match &self.namespace {
            Some(namespace) => write!(f, " in {namespace}"),
            None => Ok(()),
        }
    }
}

impl Right {
    /// Whether RBAC allows a request by this right. Others may allow it, too: the API server asks cluster-wide ones first, and
    /// which of them it found says nothing about an installation that has the other alone.
    #[must_use]
    pub fn allows(&self, request: &Request) -> bool {
        // A list or a watch of one object, by a field selector, has its name in the log, as in RBAC.
        self.account == request.account
            && self.verb == request.verb
            && self.resource == request.resource
            && self.group == request.group
            && self.namespace.as_ref().is_none_or(|namespace| *namespace == request.namespace)
            && self.name.as_ref().is_none_or(|name| *name == request.name)
    }
}

/// Roles and who has them.
#[derive(Default)]
pub struct Roles {
    cluster_roles: BTreeMap<String, ClusterRole>,
    /// By namespace and name.
    roles: BTreeMap<(String, String), Role>,
    cluster_bindings: Vec<ClusterRoleBinding>,
    bindings: Vec<RoleBinding>,
}

impl Roles {
    /// All that the API server has.
    ///
    /// # Errors
    /// If it cannot be asked.
    pub async fn installed(client: &Client) -> anyhow::Result<Self> {
        let all = ListParams::default();
        let cluster_roles: ObjectList<ClusterRole> = Api::all(client.clone()).list(&all).await?;
        let roles: ObjectList<Role> = Api::all(client.clone()).list(&all).await?;
        let cluster_bindings: ObjectList<ClusterRoleBinding> = Api::all(client.clone()).list(&all).await?;
        let bindings: ObjectList<RoleBinding> = Api::all(client.clone()).list(&all).await?;
        Ok(Self {
            cluster_roles: cluster_roles.into_iter().map(|role| (role.name_any(), role)).collect(),
            roles: roles
                .into_iter()
                .map(|role| ((role.namespace().unwrap_or_default(), role.name_any()), role))
                .collect(),
            cluster_bindings: cluster_bindings.items,
            bindings: bindings.items,
        })
    }

    /// Those of a manifest; other kinds are left out. Objects without a namespace are in [`SYSTEM`].
    ///
    /// # Errors
    /// If it is no YAML, or one of them is not as it should be.
    pub fn of(manifest: &str) -> anyhow::Result<Self> {
        let mut found = Self::default();
        for object in serde_saphyr::from_multiple::<Value>(manifest).context("no YAML")? {
            match object["kind"].as_str() {
                Some("ClusterRole") => {
                    let role: ClusterRole = serde_json::from_value(object)?;
                    found.cluster_roles.insert(role.name_any(), role);
                }
                Some("Role") => {
                    let role: Role = serde_json::from_value(object)?;
                    let namespace = role.namespace().unwrap_or_else(|| SYSTEM.to_owned());
                    found.roles.insert((namespace, role.name_any()), role);
                }
                Some("ClusterRoleBinding") => found.cluster_bindings.push(serde_json::from_value(object)?),
                Some("RoleBinding") => found.bindings.push(serde_json::from_value(object)?),
                _ => {}
            }
        }
        Ok(found)
    }

    /// Every right of Sluice's service accounts.
    ///
    /// # Errors
    /// If a binding names a role that is not there, or a rule has a wildcard or can allow nothing.
    pub fn rights(&self) -> anyhow::Result<BTreeSet<Right>> {
        let mut rights = BTreeSet::new();
        for binding in &self.cluster_bindings {
            for account in accounts(binding.subjects.as_deref(), SYSTEM) {
                let role = &binding.role_ref;
                rights.extend(expand(&account, None, &role.name, self.rules(role, "")?)?);
            }
        }
        for binding in &self.bindings {
            let namespace = binding.namespace().unwrap_or_else(|| SYSTEM.to_owned());
            for account in accounts(binding.subjects.as_deref(), &namespace) {
                let role = &binding.role_ref;
                rights.extend(expand(&account, Some(&namespace), &role.name, self.rules(role, &namespace)?)?);
            }
        }
        Ok(rights)
    }

    fn rules(&self, role: &RoleRef, namespace: &str) -> anyhow::Result<&[PolicyRule]> {
        let name = &role.name;
        // What is not of the chart is not for the chart to use up.
        ensure!(
            name.starts_with("sluice-"),
            "a service account of Sluice has {} {name}, which is not of the chart",
            role.kind
        );
        let rules = match &*role.kind {
            "ClusterRole" => self.cluster_roles.get(name).map(|role| &role.rules),
            _ => self.roles.get(&(namespace.to_owned(), name.clone())).map(|role| &role.rules),
        };
        let rules = rules.with_context(|| format!("{} {name} is bound, and is not there", role.kind))?;
        Ok(rules.as_deref().unwrap_or_default())
    }
}

/// Service accounts of Sluice among these.
fn accounts(subjects: Option<&[Subject]>, default_namespace: &str) -> Vec<String> {
    let ours = |subject: &&Subject| {
        let namespace = subject.namespace.as_deref().unwrap_or(default_namespace);
        subject.kind == "ServiceAccount" && namespace == SYSTEM && subject.name.starts_with("sluice-")
    };
    subjects.unwrap_or_default().iter().filter(ours).map(|subject| subject.name.clone()).collect()
}

/// The rights of these rules.
///
/// # Errors
/// If one of them has a wildcard, a URL, or can allow nothing.
pub fn expand(account: &str, namespace: Option<&str>, role: &str, rules: &[PolicyRule]) -> anyhow::Result<Vec<Right>> {
    let mut rights = Vec::new();
    for rule in rules {
        let groups = rule.api_groups.as_deref().unwrap_or_default();
        let resources = rule.resources.as_deref().unwrap_or_default();
        let urls = rule.non_resource_urls.as_deref().unwrap_or_default();
        let mut words = groups.iter().chain(resources).chain(urls).chain(&rule.verbs);
        if words.any(|word| word.contains('*')) {
            bail!("{role} has a wildcard: {rule:?}");
        }
        ensure!(urls.is_empty(), "{role} has URLs, which are not compared with the audit log here: {rule:?}");
        let names = rule.resource_names.as_deref().unwrap_or_default();
        let nameless =
            resources.iter().any(|resource| !resource.contains('/')) && rule.verbs.iter().any(|verb| verb == "create");
        ensure!(
            names.is_empty() || !nameless,
            "{role} lets objects of some names be created, and no creation has a name yet: {rule:?}"
        );
        let names: Vec<Option<String>> =
            if names.is_empty() { vec![None] } else { names.iter().cloned().map(Some).collect() };
        for (group, resource) in groups.iter().flat_map(|group| resources.iter().map(move |resource| (group, resource)))
        {
            for (name, verb) in names.iter().flat_map(|name| rule.verbs.iter().map(move |verb| (name, verb))) {
                rights.push(Right {
                    account: account.to_owned(),
                    namespace: namespace.map(str::to_owned),
                    group: group.clone(),
                    resource: resource.clone(),
                    name: name.clone(),
                    verb: verb.clone(),
                });
            }
        }
    }
    Ok(rights)
}

/// Rights that no test uses, and why they are there all the same.
#[derive(Clone, Copy, Debug)]
pub struct Spared {
    pub account: &'static str,
    pub namespace: Option<&'static str>,
    pub group: &'static str,
    pub resources: &'static [&'static str],
    /// All objects, if there is none.
    pub names: &'static [&'static str],
    pub verbs: &'static [&'static str],
    pub why: &'static str,
}

impl Spared {
    fn rights(&self) -> Vec<Right> {
        let list = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
        let names: Vec<_> =
            if self.names.is_empty() { vec![None] } else { list(self.names).into_iter().map(Some).collect() };
        let mut rights = Vec::new();
        for resource in list(self.resources) {
            for name in &names {
                rights.extend(list(self.verbs).into_iter().map(|verb| Right {
                    account: self.account.to_owned(),
                    namespace: self.namespace.map(str::to_owned),
                    group: self.group.to_owned(),
                    resource: resource.clone(),
                    name: name.clone(),
                    verb,
                }));
            }
        }
        rights
    }
}

/// What became of all rights.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Neither used nor spared.
    pub unused: Vec<String>,
    /// Spared, and not granted by any rule.
    pub stale: Vec<String>,
    /// Spared, and used all the same.
    pub used: Vec<String>,
    /// Spared and unused, with the reason.
    pub spared: Vec<String>,
}

/// Compares rights with requests, of which those that RBAC forbade count for nothing.
#[must_use]
pub fn judge(rights: &BTreeSet<Right>, requests: &[Request], spared: &[Spared]) -> Verdict {
    let mut left: BTreeSet<&Right> = rights.iter().collect();
    for request in requests.iter().filter(|request| !request.forbidden) {
        left.retain(|right| !right.allows(request));
    }
    let mut verdict = Verdict::default();
    let mut named = BTreeSet::new();
    for entry in spared {
        for right in entry.rights() {
            let list = match (rights.contains(&right), left.contains(&right)) {
                (false, _) => &mut verdict.stale,
                (true, false) => &mut verdict.used,
                (true, true) => &mut verdict.spared,
            };
            list.push(format!("{right}: {}", entry.why));
            named.insert(right);
        }
    }
    verdict.unused = left.into_iter().filter(|right| !named.contains(*right)).map(ToString::to_string).collect();
    verdict
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANIFEST: &str = "
apiVersion: v1
kind: ServiceAccount
metadata: {name: sluice-controller, namespace: sluice-system}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: sluice-controller}
rules:
  - {apiGroups: [apps], resources: [deployments, deployments/scale], verbs: [get, patch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: sluice-controller}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: sluice-controller}
subjects:
  - {kind: ServiceAccount, name: sluice-controller, namespace: sluice-system}
  - {kind: ServiceAccount, name: sluice-controller, namespace: elsewhere}
  - {kind: User, name: sluice-admin}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: sluice-controller, namespace: sluice-system}
rules:
  - {apiGroups: [''], resources: [secrets], resourceNames: [a, b], verbs: [watch]}
  - {apiGroups: [''], resources: [secrets], verbs: [create]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: sluice-controller, namespace: sluice-system}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: sluice-controller}
subjects:
  - {kind: ServiceAccount, name: sluice-controller}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: another, namespace: sluice-system}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: not-ours}
subjects:
  - {kind: ServiceAccount, name: prometheus}
";

    fn request(verb: &str, group: &str, resource: &str, namespace: &str, name: &str) -> Request {
        Request {
            home: SYSTEM.into(),
            at_ms: 0,
            account: "sluice-controller".into(),
            pod: String::new(),
            verb: verb.into(),
            group: group.into(),
            resource: resource.into(),
            namespace: namespace.into(),
            name: name.into(),
            code: 200,
            forbidden: false,
            dry_run: false,
        }
    }

    fn unused(requests: &[Request]) -> Vec<String> {
        judge(&Roles::of(MANIFEST).unwrap().rights().unwrap(), requests, &[]).unused
    }

    fn rules(yaml: &str) -> Vec<PolicyRule> {
        serde_saphyr::from_str(yaml).unwrap()
    }

    #[test]
    fn a_rule_is_a_right_for_each_resource_name_and_verb() {
        assert_eq!(
            unused(&[]),
            [
                "sluice-controller: get deployments.apps",
                "sluice-controller: patch deployments.apps",
                "sluice-controller: get deployments/scale.apps",
                "sluice-controller: patch deployments/scale.apps",
                "sluice-controller: create secrets in sluice-system",
                "sluice-controller: watch secrets a in sluice-system",
                "sluice-controller: watch secrets b in sluice-system",
            ]
        );
    }

    #[test]
    fn a_request_uses_what_rbac_would_allow_it_by_and_nothing_else() {
        let all = unused(&[]).len();
        for (used, request) in [
            (1, request("get", "apps", "deployments", "shop", "web")),
            (1, request("patch", "apps", "deployments/scale", "shop", "web")),
            (1, request("watch", "", "secrets", "sluice-system", "a")),
            (1, request("create", "", "secrets", "sluice-system", "c")),
            // Another verb, group, subresource, namespace, name; all names; another account; forbidden.
            (0, request("list", "apps", "deployments", "shop", "")),
            (0, request("get", "", "deployments", "shop", "web")),
            (0, request("get", "apps", "deployments/status", "shop", "web")),
            (0, request("watch", "", "secrets", "shop", "a")),
            (0, request("watch", "", "secrets", "sluice-system", "c")),
            (0, request("watch", "", "secrets", "sluice-system", "")),
            (0, Request { account: "sluice-fleet".into(), ..request("get", "apps", "deployments", "shop", "web") }),
            (0, Request { forbidden: true, ..request("get", "apps", "deployments", "shop", "web") }),
        ] {
            let left = unused(std::slice::from_ref(&request)).len();
            assert_eq!(all - left, used, "{request:?}");
        }
    }

    #[test]
    fn a_request_uses_every_right_that_would_do() {
        let mut rights = BTreeSet::new();
        let rule = rules("[{apiGroups: [''], resources: [secrets], verbs: [get]}]");
        rights.extend(expand("sluice-controller", None, "wide", &rule).unwrap());
        let rule = rules("[{apiGroups: [''], resources: [secrets], resourceNames: [a], verbs: [get]}]");
        rights.extend(expand("sluice-controller", Some(SYSTEM), "narrow", &rule).unwrap());
        assert_eq!(judge(&rights, &[request("get", "", "secrets", SYSTEM, "b")], &[]).unused.len(), 1);
        assert_eq!(judge(&rights, &[request("get", "", "secrets", SYSTEM, "a")], &[]).unused.len(), 0);
    }

    #[test]
    fn what_is_spared_is_told_apart_by_whether_it_is_granted_and_used() {
        let spared = Spared {
            account: "sluice-controller",
            namespace: None,
            group: "apps",
            resources: &["deployments"],
            names: &[],
            verbs: &["get", "patch", "delete"],
            why: "x",
        };
        let elsewhere = Spared { namespace: Some("shop"), verbs: &["get"], ..spared };
        let one_name = Spared { names: &["web"], verbs: &["get"], ..spared };
        let rights = Roles::of(MANIFEST).unwrap().rights().unwrap();
        let verdict =
            judge(&rights, &[request("get", "apps", "deployments", "shop", "web")], &[spared, elsewhere, one_name]);
        assert_eq!(verdict.used, ["sluice-controller: get deployments.apps: x"]);
        assert_eq!(verdict.spared, ["sluice-controller: patch deployments.apps: x"]);
        assert_eq!(
            verdict.stale,
            [
                "sluice-controller: delete deployments.apps: x",
                "sluice-controller: get deployments.apps in shop: x",
                "sluice-controller: get deployments.apps web: x",
            ]
        );
        assert_eq!(verdict.unused.len(), 5);
    }

    #[test]
    fn rules_that_cannot_be_held_to_use_are_refused_by_role() {
        for rule in [
            "[{apiGroups: ['*'], resources: [pods], verbs: [get]}]",
            "[{apiGroups: [''], resources: ['*'], verbs: [get]}]",
            "[{apiGroups: [apps], resources: ['*/scale'], verbs: [get]}]",
            "[{apiGroups: [''], resources: [pods], verbs: ['*']}]",
            "[{nonResourceURLs: [/metrics], verbs: [get]}]",
            "[{apiGroups: [''], resources: [pods], resourceNames: [a], verbs: [create]}]",
        ] {
            let error = expand("sluice-controller", None, "sluice-wide", &rules(rule)).unwrap_err();
            assert!(error.to_string().contains("sluice-wide"), "{rule}: {error}");
        }
        // A creation of a subresource does have a name.
        let scale = rules("[{apiGroups: [''], resources: [pods/eviction], resourceNames: [a], verbs: [create]}]");
        assert_eq!(expand("sluice-controller", None, "x", &scale).unwrap().len(), 1);
    }

    #[test]
    fn roles_that_are_missing_or_not_of_the_chart_are_named() {
        let without = MANIFEST.replace("kind: Role\n", "kind: Rule\n");
        assert!(format!("{:#}", Roles::of(&without).unwrap().rights().unwrap_err()).contains("Role sluice-controller"));
        let foreign = MANIFEST.replace("name: sluice-controller}\nsubjects", "name: cluster-admin}\nsubjects");
        assert!(format!("{:#}", Roles::of(&foreign).unwrap().rights().unwrap_err()).contains("cluster-admin"));
    }
}
