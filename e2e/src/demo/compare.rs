//! Both seats of a machine compared: memory at one epoch, disks.
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::system::Digest;

/// Both digests at one epoch: the active takes one at its next epoch and has the standby take one there, which may be
/// a moment later; until then the standby answers with its last.
pub fn memory(
    mut digest: impl FnMut(usize) -> anyhow::Result<Digest>,
    active: usize,
    standby: usize,
    patience: Duration,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        let ours = digest(active)?;
        let mut theirs = digest(standby)?;
        while theirs.epoch < ours.epoch && Instant::now() < deadline {
            theirs = digest(standby)?;
        }
        if ours.epoch == theirs.epoch {
            ensure!(
                ours.memory == theirs.memory,
                "memory differs at epoch {}: {} and {}",
                ours.epoch,
                ours.memory,
                theirs.memory
            );
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "no digests of one epoch within {patience:?}: {} and {}",
            ours.epoch,
            theirs.epoch
        );
    }
}

/// The disks become equal once the standby has applied its journal; nobody writes any more.
pub fn disks(active: &Path, standby: &Path, patience: Duration) -> anyhow::Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        let Some(at) = first_difference(active, standby)? else {
            return Ok(());
        };
        ensure!(
            Instant::now() < deadline,
            "the disks differ at byte {at} and stay so for {patience:?}"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Where two files begin to differ.
pub fn first_difference(ours: &Path, theirs: &Path) -> anyhow::Result<Option<u64>> {
    const PART: usize = 1 << 20;
    let open = |path: &Path| File::open(path).with_context(|| format!("cannot open {}", path.display()));
    let (mut ours, mut theirs) = (open(ours)?, open(theirs)?);
    let (mut left, mut right) = (Vec::with_capacity(PART), Vec::with_capacity(PART));
    let mut offset = 0;
    loop {
        left.clear();
        right.clear();
        ours.by_ref().take(PART as u64).read_to_end(&mut left)?;
        theirs.by_ref().take(PART as u64).read_to_end(&mut right)?;
        if left != right {
            let same = left.iter().zip(&right).take_while(|(a, b)| a == b).count();
            return Ok(Some(offset + same as u64));
        }
        if left.is_empty() {
            return Ok(None);
        }
        offset += left.len() as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seats that answer with what they are given, one digest after the other; the last one again and again.
    fn seats<'a>(digests: [&'a [(u64, &'a str)]; 2]) -> impl FnMut(usize) -> anyhow::Result<Digest> + 'a {
        let mut asked = [0; 2];
        move |seat| {
            let told = digests[seat];
            let (epoch, memory) = *told.get(asked[seat]).or(told.last()).context("no digest yet")?;
            asked[seat] += 1;
            let digest = serde_json::json!({"epoch": epoch, "memory": memory});
            Ok(serde_json::from_value(digest)?)
        }
    }

    const ONE: &str = "c5d2460186f7233c";
    const OTHER: &str = "c5d2460186f7233d";

    #[test]
    fn memory_is_equal_at_one_epoch() {
        let patience = Duration::from_secs(3600);
        memory(seats([&[(9, ONE)], &[(9, ONE)]]), 0, 1, patience).unwrap();
        // A standby has its digest a moment later, or the active was asked too early for the one that it has.
        memory(
            seats([&[(9, ONE)], &[(7, OTHER), (8, OTHER), (9, ONE)]]),
            0,
            1,
            patience,
        )
        .unwrap();
        memory(seats([&[(8, OTHER), (9, ONE)], &[(9, ONE)]]), 0, 1, patience).unwrap();
    }

    #[test]
    fn memory_that_differs_or_is_never_compared_is_no_equal_memory() {
        fn fault(digests: [&[(u64, &str)]; 2], patience: Duration) -> String {
            memory(seats(digests), 0, 1, patience).unwrap_err().to_string()
        }
        let patience = Duration::from_secs(3600);
        let differs = format!("memory differs at epoch 9: {ONE} and {OTHER}");
        assert_eq!(fault([&[(9, ONE)], &[(9, OTHER)]], patience), differs);
        // What was equal before does not count.
        assert_eq!(fault([&[(9, ONE)], &[(8, ONE), (9, OTHER)]], patience), differs);
        let soon = Duration::from_millis(1);
        let (behind, ahead) = (
            fault([&[(9, ONE)], &[(8, ONE)]], soon),
            fault([&[(8, ONE)], &[(9, ONE)]], soon),
        );
        assert_eq!(behind, "no digests of one epoch within 1ms: 9 and 8");
        assert_eq!(ahead, "no digests of one epoch within 1ms: 8 and 9");
        // A seat that does not tell is no seat with the same memory.
        assert_eq!(fault([&[(9, ONE)], &[]], patience), "no digest yet");
        assert_eq!(fault([&[], &[(9, ONE)]], patience), "no digest yet");
    }

    #[test]
    fn disks_that_stay_different_are_found() {
        let folder = std::env::temp_dir().join(format!("ftvm-compare-disks-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let (ours, theirs) = (folder.join("ours"), folder.join("theirs"));
        std::fs::write(&ours, b"content").unwrap();
        std::fs::write(&theirs, b"content").unwrap();
        let same = disks(&ours, &theirs, Duration::ZERO);
        std::fs::write(&theirs, b"contend").unwrap();
        let other = disks(&ours, &theirs, Duration::from_millis(1));
        let missing = disks(&ours, &folder.join("none"), Duration::ZERO);
        std::fs::remove_dir_all(folder).unwrap();
        same.unwrap();
        let other = other.unwrap_err().to_string();
        assert!(other.starts_with("the disks differ at byte 6 and stay so"), "{other}");
        assert!(missing.unwrap_err().to_string().starts_with("cannot open"));
    }

    #[test]
    fn differences_are_found_where_they_are() {
        let folder = std::env::temp_dir().join(format!("ftvm-compare-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let file = |name: &str, content: &[u8]| {
            let path = folder.join(name);
            std::fs::write(&path, content).unwrap();
            path
        };
        let long = vec![7; (1 << 20) + 3];
        let mut other = long.clone();
        other[(1 << 20) + 1] = 8;
        let (long, other, short) = (file("long", &long), file("other", &other), file("short", b"\x07\x07"));
        let found = [(&long, &long), (&long, &other), (&long, &short), (&short, &long)]
            .map(|(ours, theirs)| first_difference(ours, theirs).unwrap());
        std::fs::remove_dir_all(folder).unwrap();
        assert_eq!(found, [None, Some((1 << 20) + 1), Some(2), Some(2)]);
    }
}
