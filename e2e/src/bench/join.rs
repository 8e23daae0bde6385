//! What a standby costs that joins a guest which writes as fast as it can: the guest is held back, and not copied again and again into ever more
//! memory.
use anyhow::{Context, ensure};

use super::process::ProcessMemory;
use crate::demo::system::Seat;

/// Judges the active's seat and the joined standby's engine; says in words what was found. `guest_bytes`: what the guest has of memory, most of
/// which it wrote.
///
/// # Errors
/// If nothing had to be bounded: the guest wrote too little meanwhile. If the standby lacks memory of the guest, or ever held more than 1.1 times
/// the guest's.
pub fn judge(active: &Seat, standby: &ProcessMemory, guest_bytes: u64) -> anyhow::Result<String> {
    let counter = |name: &str| active.counter(name).with_context(|| format!("no counter {name}"));
    let (passes, again_pages) = (counter("resync_passes")?, counter("resync_again_pages")?);
    let braked_us = counter("braked_us")?;
    let said = format!("{passes} passes, {again_pages} pages sent again, guest held back for {braked_us} µs");
    ensure!(
        passes > 0.0 && again_pages > 0.0,
        "a guest that writes while its memory is copied has something sent again: {said}"
    );
    ensure!(braked_us > 0.0, "it writes faster than any link carries: {said}");
    ensure!(
        standby.guest_bytes > guest_bytes / 10 * 9,
        "a standby has the guest's {guest_bytes} bytes: {standby:?}"
    );
    ensure!(
        standby.peak_bytes * 10 <= guest_bytes * 11,
        "at most 1.1 times the guest's {guest_bytes} bytes: {standby:?}"
    );
    Ok(said)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const GUEST_BYTES: u64 = 512 << 20;

    /// An active's status, with those counters of it that count here.
    fn active(passes: u64, again_pages: u64, braked_us: u64) -> Seat {
        let counters = json!({
            "resync_passes": passes, "resync_again_pages": again_pages, "braked_us": braked_us, "link_sent_bytes": 1,
        });
        serde_json::from_value(json!({"role": "active", "protected": true, "counters": counters})).unwrap()
    }

    fn standby(guest_bytes: u64, peak_bytes: u64) -> ProcessMemory {
        ProcessMemory {
            rss_bytes: 9 << 20,
            pss_bytes: 8 << 20,
            guest_bytes,
            peak_bytes,
        }
    }

    #[test]
    fn a_join_is_bounded_only_if_something_had_to_be() {
        let (full, peak) = (GUEST_BYTES, GUEST_BYTES + (20 << 20));
        let judged = |seat: &Seat| judge(seat, &standby(full, peak), GUEST_BYTES);
        let said = judged(&active(3, 70_000, 12_000)).unwrap();
        assert_eq!(said, "3 passes, 70000 pages sent again, guest held back for 12000 µs");
        for (seat, fault) in [
            (active(0, 70_000, 12_000), "sent again: 0 passes"),
            (active(3, 0, 12_000), "sent again: 3 passes, 0 pages"),
            (active(3, 70_000, 0), "faster than any link"),
        ] {
            let found = judged(&seat).unwrap_err().to_string();
            assert!(found.contains(fault), "{found}");
        }
        // Counters of that name that are not there are no zeros.
        let mut without = active(3, 70_000, 12_000);
        without.counters.remove("braked_us");
        assert_eq!(judged(&without).unwrap_err().to_string(), "no counter braked_us");
    }

    #[test]
    fn a_standby_that_lacks_or_hoards_memory_is_found() {
        let seat = active(3, 70_000, 12_000);
        let judged = |guest_bytes, peak_bytes| judge(&seat, &standby(guest_bytes, peak_bytes), GUEST_BYTES);
        let most = GUEST_BYTES * 11 / 10;
        judged(GUEST_BYTES, most).unwrap();
        let lacks = judged(GUEST_BYTES / 2, GUEST_BYTES).unwrap_err().to_string();
        assert!(lacks.starts_with("a standby has the guest's"), "{lacks}");
        // As if a second copy of what is to come were kept beside it.
        for peak_bytes in [most + 1, 2 * GUEST_BYTES] {
            let hoards = judged(GUEST_BYTES, peak_bytes).unwrap_err().to_string();
            assert!(hoards.starts_with("at most 1.1 times"), "{hoards}");
        }
    }
}
