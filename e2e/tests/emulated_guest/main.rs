//! An unmodified Debian under our VMM in an emulated node with real KVM, before any replication. Each test has one node, which has one processor:
//! two of them at a time keep two processors busy.
mod moves;
mod unprotected;

#[test]
fn debian_with_two_vcpus() {
    unprotected::debian_boots_serves_resets_and_stops(2);
}
