//! As `emulated_failover`, with one vCPU and another round.
use ftvm_e2e::demo::linux;

#[test]
fn pulled_plug_three_times() {
    linux::survives_pulled_plugs(1, 3);
}
