//! Room on the disk: a full one fails tests in the middle, under names that have nothing to do with it.
use std::path::Path;

use anyhow::{Context, ensure};

/// What a tier takes: its tests' programs, or three nodes with their images and disks.
const TIER_GIB: u64 = 6;

/// Refuses to begin a tier that cannot end; what is free below `place`, in GiB.
///
/// # Errors
/// If there is less than a tier takes, or nobody can tell.
pub fn ensure_for_a_tier(place: &Path) -> anyhow::Result<u64> {
    let system = rustix::fs::statvfs(place).with_context(|| format!("asking what is free in {}", place.display()))?;
    enough(system.f_bavail.saturating_mul(system.f_frsize) >> 30, place)
}

fn enough(free_gib: u64, place: &Path) -> anyhow::Result<u64> {
    ensure!(
        free_gib >= TIER_GIB,
        "{free_gib} GiB are free in {}, a tier of tests takes up to {TIER_GIB}: make room (other clones' `target` folders are large; what is in \
         ~/.cache/ftvm is built again when it is missing) and try again",
        place.display()
    );
    Ok(free_gib)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_named_before_a_tier_begins() {
        let place = Path::new("/somewhere");
        let refused = enough(TIER_GIB - 1, place).unwrap_err().to_string();
        assert!(
            refused.contains("/somewhere") && refused.contains("make room"),
            "{refused}"
        );
        assert_eq!(enough(TIER_GIB, place).unwrap(), TIER_GIB);
        assert!(ensure_for_a_tier(Path::new("/nowhere/at/all")).is_err());
    }
}
