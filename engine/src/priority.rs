//! Priority of the threads that send and answer heartbeats: a peer that waits for a busy CPU must not look like a dead one.
//!
//! The driver and the link threads do little and wait most of the time; vCPUs and encoders take all that they get. The
//! daemon allows its engines this priority (RLIMIT_NICE); without that the engine runs as well as it can.
//!
//! Threads that somebody waits for with the guest standing still, or that frames wait for, ask for short turns besides: what
//! wakes then runs at once instead of after a turn of whatever has the CPU (some milliseconds). Over a longer time they get no
//! more of it for that.

use rustix::process::setpriority_process;

/// The nice value of these threads; the daemon's limit allows it and no more.
pub const NICE: i32 = -10;

/// Raises the calling thread and those that it starts from now on; false if that is not permitted.
pub fn raise() -> bool {
    // For Linux the process of number 0 is the calling thread (setpriority(2), "C library/kernel differences").
    setpriority_process(None, NICE).is_ok()
}

/// `struct sched_attr`, sched_setattr(2), in its first version.
#[repr(C)]
#[derive(Debug, Default)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    /// For the ordinary policies the length of a turn in nanoseconds, since Linux 6.12; ignored before.
    runtime_ns: u64,
    deadline_ns: u64,
    period_ns: u64,
}

/// The shortest turn that Linux gives.
const TURN_NS: u64 = 100_000;

/// Asks for short turns for the calling thread and those that it starts from now on, as far as they inherit its priority;
/// false if the system has none.
pub fn take_short_turns() -> bool {
    const SIZE: u32 = size_of::<Attributes>() as u32;
    let mut attributes = Attributes::default();
    // SAFETY: the structure has the size that is given, 0 is the calling thread, and there are no flags.
    let known = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, SIZE, 0) } == 0;
    let ordinary = attributes.policy == libc::SCHED_OTHER as u32 || attributes.policy == libc::SCHED_BATCH as u32;
    if !known || !ordinary {
        return false;
    }
    attributes.size = SIZE;
    attributes.runtime_ns = TURN_NS;
    // SAFETY: as above; the structure says its own size.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) == 0 }
}

/// Leaves the calling thread as it is, and lets threads that it starts from now on begin with the usual priority.
pub fn keep_from_children() {
    // SAFETY: reads and sets the scheduling policy of the calling thread; the parameter is a valid structure, and its
    // priority is 0, as the policies without real time demand.
    unsafe {
        let policy = libc::sched_getscheduler(0);
        if policy >= 0 {
            let parameter: libc::sched_param = std::mem::zeroed();
            libc::sched_setscheduler(0, policy | libc::SCHED_RESET_ON_FORK, &parameter);
        }
    }
    // That call takes them back.
    take_short_turns();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nice() -> i32 {
        rustix::process::getpriority_process(None).expect("own priority")
    }

    #[test]
    fn links_inherit_it_and_what_is_started_later_does_not() {
        let child = || std::thread::spawn(nice).join().expect("thread");
        let test = move || {
            let usual = nice();
            if !raise() {
                // As an ordinary user without the daemon's limit: nothing has changed.
                assert_eq!(nice(), usual);
                return;
            }
            assert_eq!((nice(), child()), (NICE, NICE));
            keep_from_children();
            assert_eq!((nice(), child()), (NICE, 0));
        };
        std::thread::spawn(test).join().expect("thread");
    }

    #[test]
    fn short_turns_change_neither_policy_nor_priority() {
        let test = || {
            // SAFETY: reads the policy of the calling thread.
            let policy = || unsafe { libc::sched_getscheduler(0) };
            let before = (nice(), policy());
            let taken = take_short_turns();
            assert_eq!((nice(), policy()), before);
            if !taken {
                return;
            }
            let mut attributes = Attributes::default();
            let size = size_of::<Attributes>() as u32;
            // SAFETY: the structure has the size that is given, 0 is the calling thread.
            let read = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) };
            assert_eq!(read, 0);
            // Before Linux 6.12 they are accepted and ignored.
            assert!([0, TURN_NS].contains(&attributes.runtime_ns), "{attributes:?}");
        };
        std::thread::spawn(test).join().expect("thread");
    }
}
