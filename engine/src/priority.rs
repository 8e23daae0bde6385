//! Priority of the threads that send and answer heartbeats: a peer that waits for a busy CPU must not look like a dead one.
//!
//! The driver and the link threads do little and wait most of the time; vCPUs and encoders take all that they get. The
//! daemon allows its engines this priority (RLIMIT_NICE); without that the engine runs as well as it can.

use rustix::process::setpriority_process;

/// The nice value of these threads; the daemon's limit allows it and no more.
pub const NICE: i32 = -10;

/// Raises the calling thread and those that it starts from now on; false if that is not permitted.
pub fn raise() -> bool {
    // For Linux the process of number 0 is the calling thread (setpriority(2), "C library/kernel differences").
    setpriority_process(None, NICE).is_ok()
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
}
