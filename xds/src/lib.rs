//! The messages between the control plane and the proxies: Envoy's v3 xDS API, trimmed to what docs/xds.md needs (plus
//! what stock Envoy needs to accept the same resources), and our own certificate service.
//!
//! The generated modules follow the protobuf packages: `envoy.config.core.v3.Node` is
//! [`envoy::config::core::v3::Node`]. Maps are `BTreeMap`s, so equal messages encode to equal bytes.

#![forbid(unsafe_code)]

mod spiffe;

pub use spiffe::{PodSubject, SpiffeError, SpiffeId};

use prost::{Message, Name};
use prost_types::Any;

#[allow(clippy::all, clippy::wildcard_enum_match_arm, rustdoc::all, unreachable_pub, unused_qualifications)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/proto.rs"));
}

pub use generated::{envoy, google, sluice};

/// The start of every type URL.
pub const TYPE_URL_PREFIX: &str = "type.googleapis.com/";

/// The resource types that go over our ADS streams, in the order in which the server sends additions (docs/xds.md,
/// "Order"); removals go in reverse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TypeUrl {
    Cluster,
    Endpoints,
    Listener,
    Route,
}

impl TypeUrl {
    /// All of them, in the order of additions.
    pub const ALL: [Self; 4] = [Self::Cluster, Self::Endpoints, Self::Listener, Self::Route];

    /// The type URL on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Cluster => "type.googleapis.com/envoy.config.cluster.v3.Cluster",
            Self::Endpoints => "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            Self::Listener => "type.googleapis.com/envoy.config.listener.v3.Listener",
            Self::Route => "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
        }
    }

    /// The type of this URL; `None` if it is not one of ours.
    pub fn parse(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.as_str() == url)
    }
}

impl std::fmt::Display for TypeUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Wraps `message` with its type URL.
pub fn pack<M: Message + Name>(message: &M) -> Any {
    Any { type_url: format!("{TYPE_URL_PREFIX}{}", M::full_name()), value: message.encode_to_vec() }
}

/// Takes a message of type `M` out of `any`.
///
/// # Errors
/// [`UnpackError::Type`] if `any` holds something else, [`UnpackError::Decode`] if its bytes are no such message.
pub fn unpack<M: Message + Name + Default>(any: &Any) -> Result<M, UnpackError> {
    // Only the part after the last slash names the type (google/protobuf/any.proto).
    let found = any.type_url.rsplit('/').next().unwrap_or_default();
    let wanted = M::full_name();
    if found != wanted {
        return Err(UnpackError::Type { wanted, found: any.type_url.clone() });
    }
    M::decode(any.value.as_slice()).map_err(|source| UnpackError::Decode { wanted, source })
}

/// Why [`unpack`] gave nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UnpackError {
    /// Another type than the one asked for.
    Type { wanted: String, found: String },
    /// The right type, but not its encoding.
    Decode { wanted: String, source: prost::DecodeError },
}

impl std::fmt::Display for UnpackError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Type { wanted, found } => write!(f, "expected a {wanted}, found '{found}'"),
            Self::Decode { wanted, source } => write!(f, "the bytes are no {wanted}: {source}"),
        }
    }
}

impl std::error::Error for UnpackError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Type { .. } => None,
            Self::Decode { source, .. } => Some(source),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use envoy::config::{
        cluster::v3::Cluster, endpoint::v3::ClusterLoadAssignment, listener::v3::Listener,
        route::v3::RouteConfiguration,
    };

    #[test]
    fn type_urls_are_the_names_of_the_messages() {
        let names = [
            Cluster::full_name(),
            ClusterLoadAssignment::full_name(),
            Listener::full_name(),
            RouteConfiguration::full_name(),
        ];
        for (kind, name) in TypeUrl::ALL.into_iter().zip(names) {
            assert_eq!(kind.as_str(), format!("{TYPE_URL_PREFIX}{name}"));
            assert_eq!(TypeUrl::parse(kind.as_str()), Some(kind));
        }
        assert_eq!(TypeUrl::parse("type.googleapis.com/other"), None);
    }

    #[test]
    fn a_packed_message_comes_out_again_and_only_as_its_own_type() {
        let cluster = Cluster { name: "shop/web:80/abc".to_owned(), ..Cluster::default() };
        let any = pack(&cluster);
        assert_eq!(any.type_url, TypeUrl::Cluster.as_str());
        assert_eq!(unpack::<Cluster>(&any).unwrap(), cluster);
        assert!(matches!(unpack::<Listener>(&any), Err(UnpackError::Type { .. })));
        let broken = Any { value: vec![0xff], ..any };
        assert!(matches!(unpack::<Cluster>(&broken), Err(UnpackError::Decode { .. })));
    }
}
