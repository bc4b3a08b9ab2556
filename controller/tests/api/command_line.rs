//! The binary takes its settings as the chart gives them: from the environment alone.

use std::process::Command;

#[test]
fn both_commands_take_their_settings_from_the_environment() {
    let controller = [
        ("POD_NAME", "c0"),
        ("POD_NAMESPACE", "sluice-system"),
        ("POD_UID", "u"),
        ("SLUICE_PROXY_IMAGE", "proxy"),
        ("SLUICE_HTTP_ADDRESS", "127.0.0.1:0"),
    ];
    for (arguments, environment) in [(&[][..], &controller[..]), (&["uninstall"], &controller[1..2])] {
        let output = Command::new(env!("CARGO_BIN_EXE_sluice-controller"))
            .args(arguments)
            .env_clear()
            // They come as far as to look for a cluster.
            .env("KUBECONFIG", "/nowhere")
            .envs(environment.iter().copied())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("no API server"), "{arguments:?}: {said}");
    }
}
