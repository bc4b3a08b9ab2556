//! What the documents say is so: tables are those of the code, every reason is explained, links lead somewhere, manifests are
//! accepted by an API server.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

#[path = "docs/alerts.rs"]
mod alerts;
#[path = "docs/health.rs"]
mod health;
#[path = "docs/image.rs"]
mod image;
#[path = "docs/manifests.rs"]
mod manifests;
#[path = "docs/pages.rs"]
mod pages;
#[path = "docs/reasons.rs"]
mod reasons;
#[path = "docs/reference.rs"]
mod reference;
