//! Where the analysis finds what gates refer to.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client, runtime::reflector::ObjectRef};
use sluice_crds::MetricTemplate;

use crate::cache::Cache;

/// A Secret is read within this time, or the metrics server counts as unreachable.
const SECRET_DEADLINE: Duration = Duration::from_secs(5);

/// MetricTemplates and the Secrets that they name.
pub trait Sources: Send + Sync + 'static {
    /// From a store in memory: called often.
    fn metric_template(&self, namespace: &str, name: &str) -> Option<Arc<MetricTemplate>>;

    /// The decoded data of a Secret; `None` if there is no such Secret. `Err` says why it could not be read, and that it is
    /// worth trying again.
    fn secret(&self, namespace: String, name: String) -> BoxFuture<'static, Result<Option<SecretData>, String>>;
}

/// Decoded data of a Secret, by key.
pub type SecretData = BTreeMap<String, Vec<u8>>;

/// The cluster's: templates from the cache, Secrets by name (their content is not watched).
pub struct ClusterSources {
    pub cache: Cache,
    pub client: Client,
}

impl Sources for ClusterSources {
    fn metric_template(&self, namespace: &str, name: &str) -> Option<Arc<MetricTemplate>> {
        self.cache.metric_templates.get(&ObjectRef::new(name).within(namespace))
    }

    fn secret(&self, namespace: String, name: String) -> BoxFuture<'static, Result<Option<SecretData>, String>> {
        let client = self.client.clone();
        Box::pin(async move {
            let secrets: Api<Secret> = Api::namespaced(client, &namespace);
            match tokio::time::timeout(SECRET_DEADLINE, secrets.get_opt(&name)).await {
                Ok(Ok(secret)) => Ok(secret.map(|secret| {
                    secret.data.unwrap_or_default().into_iter().map(|(key, value)| (key, value.0)).collect()
                })),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err(format!("no answer within {} s", SECRET_DEADLINE.as_secs())),
            }
        })
    }
}
