//! The example's gRPC service, for its clients.
#![forbid(unsafe_code)]

/// `hello.v1`.
#[allow(missing_docs, unused_qualifications, clippy::all, clippy::wildcard_enum_match_arm)]
pub mod v1 {
    tonic::include_proto!("hello.v1");
}
