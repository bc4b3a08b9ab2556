//! Follows the log of a container, whatever happens to the API server or to the container meanwhile.

use std::time::Duration;

use futures::{AsyncBufReadExt, TryStreamExt};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, api::LogParams};

/// Between two tries where there is no log (yet, or no longer).
const RETRY: Duration = Duration::from_millis(200);

/// Calls `each` with every line and its time, across restarts of the container, until the Pod has ended or is gone.
pub async fn follow(pods: Api<Pod>, pod: String, container: String, mut each: impl FnMut(Timestamp, &str)) {
    let mut last = Timestamp::UNIX_EPOCH;
    loop {
        // Sent in whole seconds, rounded: what was seen already is left out below.
        let since = last.checked_sub(jiff::SignedDuration::from_secs(1)).ok().filter(|_| last > Timestamp::UNIX_EPOCH);
        let params = LogParams {
            container: Some(container.clone()),
            follow: true,
            timestamps: true,
            since_time: since,
            ..LogParams::default()
        };
        if let Ok(stream) = pods.log_stream(&pod, &params).await {
            let mut lines = std::pin::pin!(stream.lines());
            while let Ok(Some(line)) = lines.try_next().await {
                let Some((time, text)) = line.split_once(' ') else { continue };
                let Ok(time) = time.parse::<Timestamp>() else { continue };
                if time > last {
                    last = time;
                    each(time, text);
                }
            }
        }
        let ended = |pod: &Pod| {
            let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
            matches!(phase, Some("Succeeded" | "Failed"))
        };
        match pods.get_opt(&pod).await {
            Ok(None) => return,
            Ok(Some(pod)) if ended(&pod) => return,
            Ok(Some(_)) | Err(_) => tokio::time::sleep(RETRY).await,
        }
    }
}
