//! Prints the CustomResourceDefinitions as YAML: `make crds` writes them where they are kept.
#![allow(clippy::print_stdout)]

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for crd in sluice_crds::crds() {
        println!("---");
        print!("{}", serde_saphyr::to_string(&crd)?);
    }
    Ok(())
}
