//! Labels, annotations and names that meet the outside world: expensive to change, so in one place.

/// On every object of ours and on every Pod of a revision: the Canary's name.
pub const CANARY: &str = "sluice.dev/canary";
/// On every object and Pod of a revision: the revision's hash. With [`CANARY`] alone it makes up the selector.
pub const REVISION: &str = "sluice.dev/revision";
/// Key that is added to an apex Service's selector (value: the Canary's name), and label of the fleet's Pods (value: the fleet's name).
pub const FLEET: &str = "sluice.dev/fleet";
/// `managed-by` of our EndpointSlices.
pub const MANAGED_BY: &str = "sluice.dev";
/// Annotation on the target Deployment: the replica count its owner wishes for, while it rests at 0.
pub const REPLICAS: &str = "sluice.dev/replicas";
/// Annotation on a fleet Pod that has been silent for too long: RFC 3339 time since when.
pub const LAGGING: &str = "sluice.dev/lagging-since";
/// Annotation on a ConfigMap or Secret: `enabled` or `disabled` overrides whether its content is part of the revision.
pub const CONFIG_TRACKING: &str = "sluice.dev/config-tracking";
/// Annotation on a ControllerRevision: RFC 3339 time at which it was promoted; absent if it never was.
pub const PROMOTED: &str = "sluice.dev/promoted";
/// Annotation on a Canary: `VERB:REVISION`, what somebody asks for by hand. `status.action` says what became of it.
pub const ACTION: &str = "sluice.dev/action";
/// Annotation on the pod template: `127.0.0.1` makes the sidecar dial loopback instead of the Pod's own IP.
pub const LOCAL_ADDRESS: &str = "sluice.dev/local-address";
/// Annotation on the pod template: for how many seconds a container that has no `preStop` hook goes on when its Pod ends; 0 for none.
pub const PRE_STOP_SECONDS: &str = "sluice.dev/pre-stop-seconds";
/// Finalizer of a Canary: traffic is handed back before it goes.
pub const FINALIZER: &str = "sluice.dev/hand-back";
/// Field manager of the controller's writes.
pub const FIELD_MANAGER: &str = "sluice";
/// Backend name of Pods of the user's own Deployment, during takeover and hand-back.
pub const ORIGINAL: &str = "original";
/// ConfigMap in the release namespace while Sluice is being uninstalled: every Canary hands its traffic back.
pub const UNINSTALL: &str = "sluice-uninstall";
/// Annotation on that ConfigMap: RFC 3339 time from which on it says nothing any more.
pub const UNTIL: &str = "sluice.dev/until";
/// ConfigMap with the trust bundle (key `ca.crt`), in the release namespace and every namespace with a Canary.
pub const TRUST_BUNDLE: &str = "sluice-trust-bundle";
/// Annotation on it in the release namespace: JSON, by SHA-256 of each root that is new or leaves, `since` and `until` when.
pub const ROOTS: &str = "sluice.dev/roots";
