//! The Dockerfile, as far as it can be tried without a registry.

use super::pages::root;

#[test]
fn the_image_is_built_by_the_toolchain_of_the_repository() {
    let toolchain = std::fs::read_to_string(root().join("rust-toolchain.toml")).unwrap();
    let channel = toolchain.lines().find_map(|line| line.strip_prefix("channel = ")).unwrap().trim_matches('"');
    let dockerfile = std::fs::read_to_string(root().join("Dockerfile")).unwrap();
    assert!(
        dockerfile.contains(&format!("ARG RUST_VERSION={channel}\n")),
        "Dockerfile builds with another Rust than {channel}"
    );
}

/// Cargo refuses a workspace of which a member is missing.
#[test]
fn every_member_of_the_workspace_is_in_the_context_of_the_image() {
    let manifest = std::fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let members = manifest.split_once("members = [").unwrap().1.split_once(']').unwrap().0;
    let ignore = std::fs::read_to_string(root().join(".dockerignore")).unwrap();
    for member in members.split(',').map(|member| member.trim().trim_matches('"')).filter(|member| !member.is_empty()) {
        let folder = member.split('/').next().unwrap();
        assert!(ignore.lines().any(|line| line == format!("!{folder}")), ".dockerignore leaves {member} out");
    }
}
