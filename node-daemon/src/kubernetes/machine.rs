//! Which machine this is, as its kubelet tells it of the Node (`status.nodeInfo.systemUUID`): a node's name may pass to another one.

use std::io::ErrorKind;
use std::path::Path;

/// Where kubelet reads it on x86 (cadvisor, `utils/sysfs`): what the firmware says, or else the host's own file. As the host's first process sees
/// them, for something else may be mounted over either, and kubelet sees that.
const FILES: [&str; 2] = [
    "/proc/1/root/sys/class/dmi/id/product_uuid",
    "/proc/1/root/etc/machine-id",
];
/// What firmware says that nobody gave an id: many machines have these.
const PLACEHOLDERS: [&str; 3] = [
    "03000200-0400-0500-0006-000700080009",
    "00000000-0000-0000-0000-000000000000",
    "ffffffff-ffff-ffff-ffff-ffffffffffff",
];

/// This machine; none if it can't be told.
pub fn machine() -> Option<String> {
    let found = first(&FILES.map(Path::new));
    if found.is_none() {
        tracing::warn!(
            "it can't be told which machine this is (no id, or one that many machines have: give it its own in the firmware): nothing is said of pods that were here and are forgotten"
        );
    }
    found
}

/// Whether this is no machine's own id.
pub fn is_placeholder(id: &str) -> bool {
    PLACEHOLDERS.iter().any(|known| known.eq_ignore_ascii_case(id))
}

/// What the Node says of its machine, if that is not what was found here: nothing will be proven, and no seat begins.
pub fn other_than_kubelets(here: Option<&str>, told: &str) -> Option<String> {
    let same = here.is_some_and(|here| here.eq_ignore_ascii_case(told));
    if same || told.is_empty() || (here.is_none() && is_placeholder(told)) {
        return None;
    }
    let here = here.unwrap_or("nothing");
    Some(format!(
        "kubelet tells machine `{told}` (status.nodeInfo.systemUUID of the Node), and {} says `{here}`: seats that the book has on that machine are \
         refused here. The daemon's pod needs hostPID: true, and kubelet the same /sys and /etc as the host's first process",
        FILES[0]
    ))
}

/// What the first of these says that there is. One that can't be read is not passed over: kubelet may be able to read it.
fn first(files: &[&Path]) -> Option<String> {
    let read = files.iter().map(std::fs::read_to_string);
    let mut found = read.skip_while(|text| matches!(text, Err(error) if error.kind() == ErrorKind::NotFound));
    let text = found.next()?.ok()?;
    let text = text.trim();
    (!text.is_empty() && !is_placeholder(text)).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Folder;

    #[test]
    fn the_firmware_comes_first() {
        let folder = Folder::new("machine");
        let (firmware, host) = (folder.path().join("product_uuid"), folder.path().join("machine-id"));
        let told = || first(&[&firmware, &host]);
        assert_eq!(told(), None);
        std::fs::write(&host, "0123\n").unwrap();
        assert_eq!(told().as_deref(), Some("0123"));
        std::fs::write(&firmware, "4567-89\n").unwrap();
        assert_eq!(told().as_deref(), Some("4567-89"));
        std::fs::write(&firmware, "\n").unwrap();
        assert_eq!(told(), None);
        std::fs::remove_file(&firmware).unwrap();
        std::fs::create_dir(&firmware).unwrap();
        assert_eq!(told(), None, "it is there, and can't be read");
    }

    /// Two machines with the same one would vouch for each other.
    #[test]
    fn an_id_that_many_machines_have_is_none() {
        let folder = Folder::new("placeholder");
        let file = folder.path().join("product_uuid");
        for id in PLACEHOLDERS {
            std::fs::write(&file, format!("{}\n", id.to_uppercase())).unwrap();
            assert_eq!(first(&[&file]), None, "{id}");
        }
    }

    #[test]
    fn kubelets_word_is_compared() {
        assert_eq!(other_than_kubelets(Some("Abc"), "aBC"), None);
        assert_eq!(other_than_kubelets(None, PLACEHOLDERS[0]), None);
        assert_eq!(other_than_kubelets(Some("abc"), ""), None, "it tells nothing");
        for (here, told) in [(Some("abc"), "def"), (None, "def")] {
            let why = other_than_kubelets(here, told).unwrap();
            assert!(why.contains("`def`"), "{why}");
        }
    }
}
