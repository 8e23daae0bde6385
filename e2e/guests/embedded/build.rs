//! Links the guest by its own script, without the host's start-up code and libraries.

fn main() {
    let folder = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    println!("cargo:rustc-link-arg=-T{folder}/guest.ld");
    for flag in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        "-Wl,-z,max-page-size=4096",
    ] {
        println!("cargo:rustc-link-arg={flag}");
    }
    println!("cargo:rerun-if-changed=guest.ld");
}
