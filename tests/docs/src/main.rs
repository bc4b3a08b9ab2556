//! Prints docs/reference.md: `make reference` writes it where it is kept.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout)]

fn main() -> serde_json::Result<()> {
    print!("{}", sluice_docs::reference()?);
    Ok(())
}
