use super::*;
use crate::seat::testing::Rig;

/// A pod that is being deleted, without an engine.
fn deleted(rig: &Rig) -> Arc<PodSeat> {
    let pod = rig.pod();
    pod.end();
    rig.seat.kill();
    rig.wait("its end is noticed", |rig| !rig.seat.has_engine());
    pod
}

fn ends(pod: &PodSeat) -> bool {
    matches!(pod.outlook(), ToSeat::End { .. })
}

#[test]
fn a_program_ends_after_what_is_said_on_its_pod() {
    let rig = Rig::new();
    let pod = deleted(&rig);
    assert!(ends(&pod), "nothing is said of it");
    pod.is_published();
    assert!(!ends(&pod));
    pod.said_over();
    assert!(ends(&pod));
}

/// The API server may be away for long, and kubelet gives the program a minute.
#[test]
fn a_program_waits_for_nothing_for_ever() {
    let rig = Rig::new();
    let pod = deleted(&rig);
    pod.is_published();
    assert!(!ends(&pod));
    pod.farewell().since = Instant::now().checked_sub(WORD_MAX);
    assert!(ends(&pod));
}

/// What the operator builds on is said once the engine has ended, and not before.
#[test]
fn it_is_over_once_the_pod_is_deleted_and_its_engine_has_ended() {
    let rig = Rig::new();
    let pod = rig.pod();
    assert!(!pod.is_over() && !rig.seat.is_retired(), "the pod stays");
    pod.end();
    assert!(!pod.is_over(), "its engine runs");
    rig.seat.kill();
    rig.wait("its end is noticed", |rig| !rig.seat.has_engine());
    assert!(pod.is_over());
    // A later daemon says the same before it is told of the deletion.
    assert!(rig.pod().is_over());
}
