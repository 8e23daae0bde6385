//! Which machine this is, as its kubelet tells it of the Node (`status.nodeInfo.systemUUID`): a node's name may pass to another one.

use std::path::Path;

/// Where kubelet reads it on x86 (cadvisor, `utils/sysfs`): what the firmware says, or else the host's own file, as the host's first process sees it.
const FILES: [&str; 2] = ["/sys/class/dmi/id/product_uuid", "/proc/1/root/etc/machine-id"];

/// This machine; none if it can't be told.
pub fn machine() -> Option<String> {
    let found = first(&FILES.map(Path::new));
    if found.is_none() {
        tracing::warn!(
            "it can't be told which machine this is: nothing is said of pods that were here and are forgotten"
        );
    }
    found
}

/// What the first of these says that there is.
fn first(files: &[&Path]) -> Option<String> {
    let text = files.iter().find_map(|file| std::fs::read_to_string(file).ok())?;
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
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
    }
}
