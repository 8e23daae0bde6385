//! Prints the custom resource definition: `cargo run -p ftvm-crds --bin crd-yaml > crds/ftvm.dev_faulttolerantvms.yaml`.

use std::process::ExitCode;

fn main() -> ExitCode {
    match ftvm_crds::yaml::write(&ftvm_crds::definition()) {
        Ok(text) => {
            print!("{}{text}", ftvm_crds::YAML_HEAD);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
