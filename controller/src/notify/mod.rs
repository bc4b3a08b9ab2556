//! Events for people: `kubectl describe canary`, `kubectl events`. Best effort: a reconcile never waits for one.

use std::time::Duration;

use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1::Event},
    apimachinery::pkg::apis::meta::v1::MicroTime,
};
use kube::{
    Api, Client, Resource,
    api::{ObjectMeta, PostParams},
};
use sluice_crds::Canary;
use tokio::sync::mpsc;

use crate::delivery::{machine, reconciler::Announce};

/// Events that wait to be written. When it is full, further ones are dropped and logged.
const QUEUE: usize = 256;
const DEADLINE: Duration = Duration::from_secs(10);
/// The API's limit on `note` (events.k8s.io/v1).
const NOTE: usize = 1024;

/// Hands events to the task that writes them.
#[derive(Clone, Debug)]
pub struct Notifier {
    queue: mpsc::Sender<Event>,
    instance: String,
}

/// Writes events, one after the other. The future ends when the last [`Notifier`] is gone.
///
/// Each is an object of its own. kube's `Recorder` would join those of one reason to a series that keeps only the first
/// text, but each of ours says something else: another revision, another step.
pub fn start(client: Client, pod_name: &str) -> (Notifier, impl Future<Output = ()> + use<>) {
    let (queue, mut receiver) = mpsc::channel::<Event>(QUEUE);
    let write = async move {
        while let Some(event) = receiver.recv().await {
            let namespace = event.metadata.namespace.clone().unwrap_or_default();
            let api: Api<Event> = Api::namespaced(client.clone(), &namespace);
            match tokio::time::timeout(DEADLINE, api.create(&PostParams::default(), &event)).await {
                Ok(Ok(_)) => {}
                // A namespace that is going away takes no more events.
                Ok(Err(error)) if error.to_string().contains("being terminated") => {
                    tracing::debug!(reason = event.reason, %error, "cannot write an event");
                }
                Ok(Err(error)) => tracing::warn!(reason = event.reason, %error, "cannot write an event"),
                Err(_) => {
                    tracing::warn!(reason = event.reason, "cannot write an event: the API server does not answer")
                }
            }
        }
    };
    (Notifier { queue, instance: pod_name.to_owned() }, write)
}

impl Announce for Notifier {
    fn announce(&self, canary: &Canary, event: &machine::Event) {
        let regarding = canary.object_ref(&());
        let event = written(&self.instance, regarding, event);
        if let Err(error) = self.queue.try_send(event) {
            let event = error.into_inner();
            tracing::warn!(reason = event.reason, "an event is dropped: too many wait to be written");
        }
    }
}

fn written(instance: &str, regarding: ObjectReference, event: &machine::Event) -> Event {
    let mut note = event.message.clone();
    if note.len() > NOTE {
        let end = (0..=NOTE - 3).rev().find(|end| note.is_char_boundary(*end)).unwrap_or(0);
        note.truncate(end);
        note.push_str("...");
    }
    Event {
        metadata: ObjectMeta {
            namespace: regarding.namespace.clone(),
            // What is generated from must be a name by itself once dashes at its end are gone: a dot there is refused.
            generate_name: regarding.name.as_ref().map(|name| format!("{name}-")),
            ..ObjectMeta::default()
        },
        event_time: Some(MicroTime(jiff::Timestamp::now())),
        reporting_controller: Some("sluice.dev/controller".to_owned()),
        reporting_instance: Some(instance.to_owned()),
        action: Some("Release".to_owned()),
        reason: Some(event.reason.to_owned()),
        regarding: Some(regarding),
        note: Some(note),
        type_: Some(if event.warning { "Warning" } else { "Normal" }.to_owned()),
        ..Event::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_message_is_cut_at_a_character_and_says_so() {
        let message = "ä".repeat(NOTE);
        let event = machine::Event { warning: true, reason: "RolledBack", message };
        let written = written("controller-0", ObjectReference::default(), &event);
        let note = written.note.unwrap_or_default();
        assert!(note.len() <= NOTE && note.ends_with("ä..."), "{} bytes", note.len());
        assert_eq!(written.type_.as_deref(), Some("Warning"));
    }

    #[test]
    fn the_name_is_made_from_one_that_an_api_server_takes() {
        let event = machine::Event { warning: false, reason: "Promoted", message: String::new() };
        let regarding = ObjectReference { name: Some("cart".to_owned()), ..ObjectReference::default() };
        let written = written("controller-0", regarding, &event);
        assert_eq!(written.metadata.generate_name.as_deref(), Some("cart-"));
    }
}
