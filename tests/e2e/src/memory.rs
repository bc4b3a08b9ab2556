//! What processes of ours hold in memory: little, and not more and more.
#![allow(clippy::unwrap_used, clippy::print_stdout)] // Of a fixture: what does not work here fails the test.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use k8s_openapi::api::core::v1::Pod;
use kube::{Api, ResourceExt, api::ListParams};

use crate::{
    cluster::{Cluster, SYSTEM},
    node,
};

/// In KiB, like all figures here.
const MIB: u64 = 1024;
/// The most that a controller or a proxy of the fleet holds. In this suite that is some 30 and 20 MiB.
const MOST: u64 = 300 * MIB;
/// The most that a sidecar holds, of which every Pod has one. In this suite that is some 16 MiB.
const MOST_OF_SIDECAR: u64 = 100 * MIB;
/// By so much more than at the first look may a controller or a proxy of the fleet hold at a later one. At either look several
/// tests may be under way, with more or fewer Canaries and connections, and jemalloc keeps pages for some seconds: that is a few
/// MiB. A leak of 2 KiB by request is above this after 33,000 requests: 18 minutes of one test's load on one of two proxies.
const GROWTH: u64 = 64 * MIB;

/// What containers of controllers and fleet held at the first look, in KiB, by container: one that was restarted is another one.
static FIRST: Mutex<BTreeMap<String, u64>> = Mutex::new(BTreeMap::new());

/// Controllers and fleet are small, and have not grown much since the first look of this process. Prints what they hold.
///
/// # Panics
/// If one is not.
pub async fn is_flat(cluster: &Cluster) {
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), SYSTEM);
    for (component, container) in [("controller", "controller"), ("fleet", "proxy")] {
        let labels = format!("app.kubernetes.io/component={component}");
        for pod in pods.list(&ListParams::default().labels(&labels)).await.unwrap() {
            let (Some(id), Some(kib)) = (node::container_id(&pod, container), node::resident_kib(&pod, container))
            else {
                continue;
            };
            let grown = {
                let mut first = FIRST.lock().unwrap_or_else(PoisonError::into_inner);
                grown(&mut first, id, kib)
            };
            let holds = format!("{} MiB, {} MiB more than at first", kib / MIB, grown / MIB);
            println!("memory of {}: {holds}", pod.name_any());
            assert!(kib < MOST && grown < GROWTH, "{} holds {holds}", pod.name_any());
        }
    }
}

/// The sidecars of a namespace are small.
///
/// # Panics
/// If one is not.
pub async fn of_sidecars_is_small(cluster: &Cluster, namespace: &str) {
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), namespace);
    let revisions = ListParams::default().labels("sluice.dev/canary,sluice.dev/revision");
    for pod in pods.list(&revisions).await.unwrap() {
        if let Some(kib) = node::resident_kib(&pod, "sluice-proxy") {
            assert!(kib < MOST_OF_SIDECAR, "the sidecar of {} holds {} MiB", pod.name_any(), kib / MIB);
        }
    }
}

/// By how much more a container holds than when it was looked at first, which may be now.
fn grown(first: &mut BTreeMap<String, u64>, container: String, kib: u64) -> u64 {
    kib.saturating_sub(*first.entry(container).or_insert(kib))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_counts_from_the_first_look_at_each_container() {
        let mut first = BTreeMap::new();
        for (container, kib, expected) in [("a", 30, 0), ("a", 50, 20), ("a", 10, 0), ("b", 90, 0), ("a", 70, 40)] {
            assert_eq!(grown(&mut first, container.to_owned(), kib), expected, "{container}: {kib}");
        }
    }
}
