//! libFuzzer with one of the proxy's targets (`proxy/src/fuzz`), which `FUZZ_TARGET` names.
#![cfg_attr(feature = "libfuzzer", no_main)]

#[cfg(feature = "libfuzzer")]
mod target {
    use std::{env, sync::LazyLock};

    static RUN: LazyLock<sluice_proxy::fuzz::Target> = LazyLock::new(|| {
        let wanted = env::var("FUZZ_TARGET").unwrap_or_default();
        let all = sluice_proxy::fuzz::TARGETS;
        let found = all.iter().find(|(name, _)| *name == wanted);
        let names: Vec<_> = all.iter().map(|(name, _)| *name).collect();
        found.unwrap_or_else(|| panic!("FUZZ_TARGET is {wanted:?}, and not one of {names:?}")).1
    });

    libfuzzer_sys::fuzz_target!(|bytes: &[u8]| RUN(bytes));
}

#[cfg(not(feature = "libfuzzer"))]
fn main() -> std::process::ExitCode {
    eprintln!("built without a fuzzer; tests/fuzz/run builds it with one");
    std::process::ExitCode::FAILURE
}
