//! Where built things are kept between runs: outside the source tree, keyed by what they are made of.
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::Context;
use rustix::fs::FlockOperation;

/// Entries that nobody asked for in this time are removed.
const KEEP: Duration = Duration::from_secs(14 * 24 * 3600);

/// The folder of all caches: `$FTVM_CACHE`, else `$XDG_CACHE_HOME/ftvm`, else `$HOME/.cache/ftvm`.
///
/// # Errors
/// If none of the variables is set.
pub fn folder() -> anyhow::Result<PathBuf> {
    let set = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    set("FTVM_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|folder| folder.join("ftvm")))
        .or_else(|| set("HOME").map(|folder| folder.join(".cache/ftvm")))
        .context("no place for the cache: set FTVM_CACHE or HOME")
}

/// A stable hash of the parts that something is made of (FNV-1a, 64 bits; lengths are part of it).
#[must_use]
pub fn key(parts: &[&[u8]]) -> String {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for part in parts {
        for byte in (part.len() as u64).to_le_bytes().iter().chain(part.iter()) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    format!("{hash:016x}")
}

/// The cached folder `kind-key`, built by `build` in a temporary folder if it is not there. One process builds, others wait for it.
///
/// # Errors
/// Those of `build` and of the file system.
pub fn entry(kind: &str, key: &str, build: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<PathBuf> {
    let parent = folder()?;
    fs::create_dir_all(&parent).with_context(|| format!("cannot make the cache folder {}", parent.display()))?;
    let lock = File::create(parent.join(format!("{kind}.lock")))?;
    rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
    let path = parent.join(format!("{kind}-{key}"));
    if !path.exists() {
        let temporary = parent.join(format!("{kind}-unfinished"));
        if temporary.exists() {
            fs::remove_dir_all(&temporary)?;
        }
        fs::create_dir(&temporary)?;
        build(&temporary)?;
        fs::rename(&temporary, &path)?;
    }
    File::create(path.join("last-used"))?.write_all(b"\n")?;
    forget_old(&parent, kind)?;
    Ok(path)
}

fn forget_old(parent: &Path, kind: &str) -> anyhow::Result<()> {
    for entry in fs::read_dir(parent)? {
        let entry = entry?;
        let of_kind = entry
            .file_name()
            .to_str()
            .is_some_and(|name| name.starts_with(&format!("{kind}-")));
        let used = fs::metadata(entry.path().join("last-used")).and_then(|data| data.modified());
        if of_kind && used.is_ok_and(|used| SystemTime::now().duration_since(used).is_ok_and(|age| age > KEEP)) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_depend_on_every_part_and_its_place() {
        assert_eq!(key(&[b"a", b"b"]), key(&[b"a", b"b"]));
        assert_ne!(key(&[b"a", b"b"]), key(&[b"ab", b""]));
        assert_ne!(key(&[b"a", b"b"]), key(&[b"b", b"a"]));
    }
}
