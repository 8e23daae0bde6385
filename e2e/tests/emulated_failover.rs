//! A protected Debian survives the death of its machine: the demonstration with Linux, as a test. More of it is in `long_debian`.
use ftvm_e2e::demo::linux;

#[test]
fn pulled_plug_with_two_vcpus() {
    linux::survives_pulled_plugs(2, 1);
}
