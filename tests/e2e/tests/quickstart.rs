//! docs/quickstart.md, as a reader types it: every command from `helm install` on, in the order of the page, on the cluster that
//! `KUBECONFIG` names. No other installation may be there; the page's own last commands take this one away.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use std::{path::Path, process::Stdio, time::Duration};

use sluice_e2e::cluster::Cluster;

/// For one block of the page; each command in it has a shorter time of its own.
const DEADLINE: Duration = Duration::from_secs(900);

/// The page's blocks of shell, with the heading above each.
fn blocks(page: &str) -> Vec<(String, String)> {
    let (mut found, mut heading, mut open) = (Vec::new(), String::new(), None::<String>);
    for line in page.lines() {
        match (&mut open, line) {
            (None, "```sh") => open = Some(String::new()),
            (Some(_), "```") => found.extend(open.take().map(|block| (heading.clone(), block))),
            (Some(block), line) => {
                block.push_str(line);
                block.push('\n');
            }
            (None, line) => {
                if let Some(words) = line.strip_prefix("## ") {
                    words.clone_into(&mut heading);
                }
            }
        }
    }
    found
}

/// Runs a block as `bash` does, at the root of the repository, and returns what it printed.
async fn run(heading: &str, block: &str, values: &Path) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let path = std::env::var("PATH").unwrap_or_default();
    let path = std::env::var("SLUICE_K8S_BIN").map_or(path.clone(), |bin| format!("{bin}:{path}"));
    let child = tokio::process::Command::new("bash")
        .args(["-euxo", "pipefail", "-c", block])
        .current_dir(&root)
        .env("PATH", path)
        .env("SLUICE_VALUES", values)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let output =
        tokio::time::timeout(DEADLINE, child.wait_with_output()).await.expect("the block ends in time").unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    println!("{printed}");
    assert!(output.status.success(), "docs/quickstart.md, \"{heading}\": a command fails:\n{block}");
    printed
}

#[tokio::test]
async fn the_commands_of_the_quickstart_do_what_the_page_says() {
    if std::env::var_os("KUBECONFIG").is_none() {
        println!("SKIPPED: KUBECONFIG is not set; `make test` starts a cluster, or set it to one of yours");
        return;
    }
    let ours = std::env::var_os("SLUICE_CLUSTER").is_some();
    if ours && std::env::var("PROMETHEUS").unwrap_or_default().is_empty() {
        println!("SKIPPED: the chart's Prometheus was not built; `tests/e2e/run --test quickstart` does");
        return;
    }
    let cluster = Cluster::connect().await.unwrap();
    let those = if ours { "tests/e2e/manifests/quickstart-values.yaml" } else { "examples/quickstart/values.yaml" };
    let values = Path::new(env!("CARGO_TARGET_TMPDIR")).join("quickstart-values.yaml");
    std::fs::write(&values, cluster.tagged(those).unwrap()).unwrap();

    let blocks = blocks(&cluster.file("docs/quickstart.md").unwrap());
    assert!(blocks.first().is_some_and(|(_, block)| block.starts_with("helm install")), "{blocks:?}");
    let mut seen = Vec::new();
    for (heading, block) in &blocks {
        println!("\n== {heading}");
        let printed = run(heading, block, &values).await;
        match heading.as_str() {
            "Release a good version" => {
                assert!(printed.contains(r#""version":"v2""#), "the load does not see v2");
                seen.push("promoted");
            }
            "Release a bad one" if block.contains("ERROR_RATE") => {
                for words in ["was rolled back", "request-success-rate", "sluice.dev/action=retry:", "RolledBack"] {
                    assert!(printed.contains(words), "\"{words}\" is missing in what was printed");
                }
                seen.push("rolled back");
            }
            _ => {}
        }
    }
    assert_eq!(seen, ["promoted", "rolled back"], "the page's headings are others than this test looks for");
}
