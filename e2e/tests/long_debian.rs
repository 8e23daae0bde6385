//! Debian as in the emulated tier, with one vCPU and more rounds.
use ftvm_e2e::demo::linux;

#[path = "emulated_guest/unprotected.rs"]
mod unprotected;

#[test]
fn pulled_plug_three_times() {
    linux::survives_pulled_plugs(1, 3);
}

#[test]
fn debian_with_one_vcpu() {
    unprotected::debian_boots_serves_resets_and_stops(1);
}
