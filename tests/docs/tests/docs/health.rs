//! The health script for Argo CD in docs/gitops.md, run by the Lua that Argo CD's interpreter is made after (5.1).

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

use serde_json::{Value, json};

use super::pages::pages;

/// The script, as it stands in the page's ConfigMap.
fn script() -> String {
    let page = pages().into_iter().find(|page| page.path.ends_with("gitops.md")).unwrap();
    let key = "resource.customizations.health.sluice.dev_Canary";
    let block = page.blocks().into_iter().find(|block| block.text.contains(key)).expect("the page has the script");
    let manifest: Value = serde_saphyr::from_str(&block.text).unwrap();
    manifest["data"][key].as_str().unwrap().to_owned()
}

/// As a table of Lua.
fn lua(value: &Value) -> String {
    match value {
        Value::Null => "nil".into(),
        Value::Bool(value) => value.to_string(),
        Value::Number(value) => value.to_string(),
        Value::String(value) => format!("{value:?}"),
        Value::Array(items) => format!("{{{}}}", items.iter().map(lua).collect::<Vec<_>>().join(", ")),
        Value::Object(fields) => {
            let fields: Vec<_> = fields.iter().map(|(key, value)| format!("[{key:?}] = {}", lua(value))).collect();
            format!("{{{}}}", fields.join(", "))
        }
    }
}

/// Status and message for a Canary; `None`, said loudly, where there is no Lua.
fn health(script: &str, canary: &Value) -> Option<(String, String)> {
    let program = format!(
        "obj = {}\nlocal function health()\n{script}\nend\nlocal found = health()\nio.write(found.status, '\\n', found.message or '')",
        lua(canary)
    );
    let started = Command::new("lua5.1").arg("-").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let Ok(mut process) = started else {
        // Past the test harness, which captures eprintln: a skipped test must be seen.
        std::io::stderr().write_all(b"SKIPPED: no lua5.1 here\n").unwrap();
        return None;
    };
    process.stdin.take().unwrap().write_all(program.as_bytes()).unwrap();
    let output = process.wait_with_output().unwrap();
    assert!(output.status.success(), "lua5.1 refuses:\n{program}");
    let text = String::from_utf8(output.stdout).unwrap();
    let (status, message) = text.split_once('\n').unwrap();
    Some((status.to_owned(), message.to_owned()))
}

fn canary(generation: u64, conditions: &[(&str, &str, &str)], suspend: bool) -> Value {
    let conditions: Vec<_> = conditions
        .iter()
        .map(|(kind, status, message)| json!({"type": kind, "status": status, "reason": "Reason", "message": message}))
        .collect();
    json!({
        "metadata": {"generation": generation},
        "spec": {"suspend": suspend},
        "status": {"observedGeneration": 3, "conditions": conditions},
    })
}

#[test]
fn argo_cd_sees_a_release_in_progress_a_rollback_as_degraded_and_a_freeze_as_suspended() {
    let script = script();
    let serves = [("Ready", "True", "revision abc serves"), ("Reconciling", "False", ""), ("Stalled", "False", "")];
    let under_way = [("Ready", "False", "step 1/3"), ("Reconciling", "True", "step 1/3"), ("Stalled", "False", "")];
    let rolled_back =
        [("Ready", "False", "rolled back: why"), ("Reconciling", "False", ""), ("Stalled", "True", "rolled back: why")];
    let down = [("Ready", "False", "no ready Pod"), ("Reconciling", "False", ""), ("Stalled", "False", "")];
    for (what, canary, status, message) in [
        ("new", json!({"metadata": {"generation": 1}, "spec": {}}), "Progressing", "has not looked"),
        ("changed", canary(4, &serves, false), "Progressing", "has not looked"),
        ("at rest", canary(3, &serves, false), "Healthy", "revision abc serves"),
        ("releasing", canary(3, &under_way, false), "Progressing", "step 1/3"),
        ("rolled back", canary(3, &rolled_back, false), "Degraded", "rolled back: why"),
        ("frozen", canary(3, &under_way, true), "Suspended", "step 1/3"),
        ("frozen at rest", canary(3, &serves, true), "Healthy", "revision abc serves"),
        ("down", canary(3, &down, false), "Degraded", "no ready Pod"),
    ] {
        let Some(found) = health(&script, &canary) else { return };
        assert!(found.0 == status && found.1.contains(message), "{what}: {found:?}");
    }
}
