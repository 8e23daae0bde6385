//! A protected Debian survives the death of its machine: the demonstration with Linux, as a test.
use ftvm_e2e::demo::linux;

/// There and back: each machine dies once, and takes its place again.
#[test]
fn pulled_plug_with_two_vcpus() {
    linux::survives_pulled_plugs(2, 2);
}
