//! Container images without a registry: built from Dockerfiles by buildah, or packed from files. Both are OCI archives, which
//! [`Cluster::import_image`](super::Cluster::import_image) gives to every node.
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use tar::{Builder, Header};

use crate::lab::binaries::{self, Profile};

/// Image of every pod's sandbox; also a TCP service and its client (`e2e/cluster/pod.rs`).
pub const PAUSE: &str = "lab.ftvm.dev/pod:1";
/// The program in it.
pub const POD_PROGRAM: &str = "/pod";

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// A file of an image.
#[derive(Debug, Clone)]
pub struct ImageFile {
    /// The file on this machine.
    pub source: PathBuf,
    /// Its absolute path in the image.
    pub path: String,
    /// Permissions, such as 0o755.
    pub mode: u32,
}

impl ImageFile {
    /// A file that can be read by all.
    #[must_use]
    pub fn new(source: impl Into<PathBuf>, path: &str) -> Self {
        Self {
            source: source.into(),
            path: path.to_owned(),
            mode: 0o644,
        }
    }

    /// A program.
    #[must_use]
    pub fn program(source: impl Into<PathBuf>, path: &str) -> Self {
        Self {
            mode: 0o755,
            ..Self::new(source, path)
        }
    }
}

/// Builds an image from a Dockerfile, as users do, but the stage named `builder` is the folder `binaries` instead: what it would compile is
/// there. `archive` becomes an OCI archive of the image `name`.
///
/// # Errors
/// If buildah fails, with what it said.
pub fn build(dockerfile: &Path, name: &str, binaries: &Path, archive: &Path) -> anyhow::Result<()> {
    let mut builder = OsString::from("builder=");
    builder.push(binaries);
    let options = [OsStr::new("--build-context"), builder.as_os_str()];
    in_a_storage(archive, |storage| {
        let context = storage.join("context");
        fs::create_dir_all(&context)?;
        build_in(storage, &options, (dockerfile, name, context.as_path(), archive))
    })
}

/// Builds an image from a Dockerfile, as users do, with what it copies in the folder `context`. `archive` becomes an OCI archive of the image
/// `name`.
///
/// # Errors
/// If buildah fails, with what it said.
pub fn build_from(context: &Path, dockerfile: &Path, name: &str, archive: &Path) -> anyhow::Result<()> {
    in_a_storage(archive, |storage| {
        build_in(storage, &[], (dockerfile, name, context, archive))
    })
}

/// A folder beside the archive while `build` runs: buildah keeps what it builds, and nobody asks for it again.
fn in_a_storage(archive: &Path, build: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let parent = archive.parent().context("an archive is in a folder")?;
    let storage = parent.join(format!("buildah-{}", std::process::id()));
    fs::create_dir_all(&storage)?;
    let built = build(&storage);
    let removed = fs::remove_dir_all(&storage).with_context(|| format!("cannot remove {}", storage.display()));
    built.and(removed)
}

fn build_in(
    storage: &Path,
    options: &[&OsStr],
    (dockerfile, name, context, archive): (&Path, &str, &Path, &Path),
) -> anyhow::Result<()> {
    let buildah = |words: &[&OsStr]| {
        let mut command = Command::new("buildah");
        command
            .arg("--root")
            .arg(storage.join("root"))
            .arg("--runroot")
            .arg(storage.join("run"))
            .args(["--storage-driver", "vfs"])
            .args(words)
            // Its temporary files are large.
            .env("TMPDIR", storage)
            .stdin(Stdio::null());
        let output = command
            .output()
            .context("cannot start `buildah`: install the Debian package buildah")?;
        ensure!(
            output.status.success(),
            "buildah {}: {}\n{}",
            words.first().map(|word| word.to_string_lossy()).unwrap_or_default(),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(())
    };
    let build = ["build", "--isolation", "chroot", "--tag", name, "--file"].map(OsStr::new);
    let files = [dockerfile.as_os_str(), context.as_os_str()];
    // Options come before the context.
    buildah(&[&build[..], &files[..1], options, &files[1..]].concat())?;
    let target = format!("oci-archive:{}:{name}", archive.display());
    buildah(&["push".as_ref(), name.as_ref(), target.as_ref()])
}

/// Packs a guest image: `/boot/vmlinuz`, `/boot/initrd` and `/disk/NAME` for each disk (name, file).
///
/// # Errors
/// If a file cannot be read, or the archive not be written.
pub fn pack_guest(
    name: &str,
    kernel: &Path,
    initrd: Option<&Path>,
    disks: &[(&str, &Path)],
    archive: &Path,
) -> anyhow::Result<()> {
    let mut files = vec![ImageFile::new(kernel, "/boot/vmlinuz")];
    files.extend(initrd.map(|initrd| ImageFile::new(initrd, "/boot/initrd")));
    files.extend(
        disks
            .iter()
            .map(|(name, disk)| ImageFile::new(*disk, &format!("/disk/{name}"))),
    );
    pack(name, &files, &[], archive)
}

/// Packs files into an image of one layer; `entrypoint` may be empty. `archive` becomes an OCI archive of the image `name`.
///
/// # Errors
/// If a file cannot be read, or the archive not be written.
pub fn pack(name: &str, files: &[ImageFile], entrypoint: &[&str], archive: &Path) -> anyhow::Result<()> {
    let unfinished = archive.with_extension("layer");
    let layer = write_layer(files, &unfinished)?;
    let config = serde_json::to_vec(&json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": entrypoint, "Env": ["PATH=/bin:/usr/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [layer.digest]},
    }))?;
    let config_blob = Blob::of(&config);
    let manifest = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config_blob.descriptor(CONFIG),
        "layers": [layer.descriptor(LAYER)],
    }))?;
    let manifest_blob = Blob::of(&manifest);
    let mut described = manifest_blob.descriptor(MANIFEST);
    described["annotations"] = json!({
        "io.containerd.image.name": name,
        "org.opencontainers.image.ref.name": name,
    });
    let index = serde_json::to_vec(&json!({"schemaVersion": 2, "manifests": [described]}))?;
    let file = File::create(archive).with_context(|| format!("cannot write {}", archive.display()))?;
    let mut tar = Builder::new(io::BufWriter::new(file));
    append(&mut tar, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    append(&mut tar, "index.json", &index)?;
    append(&mut tar, &config_blob.path(), &config)?;
    append(&mut tar, &manifest_blob.path(), &manifest)?;
    tar.append_data(
        &mut header(layer.size_bytes, 0o644),
        layer.path(),
        File::open(&unfinished)?,
    )?;
    tar.into_inner()?.flush()?;
    fs::remove_file(unfinished)?;
    Ok(())
}

/// `archive` becomes that of [`PAUSE`].
pub(super) fn pack_pause(archive: &Path) -> anyhow::Result<()> {
    let program = binaries::build(&[("ftvm-e2e", "ftvm-lab-pod")], Profile::Dev)?;
    let program = program.first().context("cargo built nothing")?;
    let files = [ImageFile::program(program, POD_PROGRAM)];
    pack(PAUSE, &files, &[POD_PROGRAM, "pause"], archive)
}

/// What a manifest says of a part of an image.
struct Blob {
    digest: String,
    size_bytes: u64,
}

impl Blob {
    fn of(bytes: &[u8]) -> Self {
        let mut hashing = Hashing::new(io::sink());
        // A sink takes everything.
        let _ = hashing.write_all(bytes);
        hashing.finish()
    }

    fn path(&self) -> String {
        format!("blobs/{}", self.digest.replace(':', "/"))
    }

    fn descriptor(&self, media_type: &str) -> Value {
        json!({"mediaType": media_type, "digest": self.digest, "size": self.size_bytes})
    }
}

/// Passes bytes on, counts and hashes them.
struct Hashing<W> {
    to: W,
    context: ring::digest::Context,
    size_bytes: u64,
}

impl<W: Write> Hashing<W> {
    fn new(to: W) -> Self {
        Self {
            to,
            context: ring::digest::Context::new(&ring::digest::SHA256),
            size_bytes: 0,
        }
    }

    fn finish(self) -> Blob {
        let digest = self.context.finish();
        let digits: String = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        Blob {
            digest: format!("sha256:{digits}"),
            size_bytes: self.size_bytes,
        }
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let written = self.to.write(buffer)?;
        self.context.update(&buffer[..written]);
        self.size_bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

fn write_layer(files: &[ImageFile], to: &Path) -> anyhow::Result<Blob> {
    let layer = File::create(to).with_context(|| format!("cannot write {}", to.display()))?;
    let mut tar = Builder::new(Hashing::new(io::BufWriter::new(layer)));
    for file in files {
        let shown = file.source.display();
        let content = File::open(&file.source).with_context(|| format!("cannot read {shown}"))?;
        let size_bytes = content.metadata()?.len();
        let path = file.path.trim_start_matches('/');
        // As long as its header says, even if it grows meanwhile.
        tar.append_data(&mut header(size_bytes, file.mode), path, content.take(size_bytes))
            .with_context(|| format!("cannot pack {shown} as {}", file.path))?;
    }
    let mut hashing = tar.into_inner()?;
    hashing.flush()?;
    Ok(hashing.finish())
}

fn append<W: Write>(tar: &mut Builder<W>, path: &str, content: &[u8]) -> io::Result<()> {
    tar.append_data(&mut header(content.len() as u64, 0o644), path, content)
}

/// A regular file of root's, of no particular time: the same files make the same image.
fn header(size_bytes: u64, mode: u32) -> Header {
    let mut header = Header::new_gnu();
    header.set_size(size_bytes);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_sha256() {
        let blob = Blob::of(b"abc");
        assert_eq!(
            blob.digest,
            "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(blob.size_bytes, 3);
    }

    #[test]
    fn the_page_shows_the_dockerfile_of_guest_images() {
        let dockerfile = include_str!("../../../docs/examples/guest.Dockerfile");
        let lines = dockerfile.lines().filter(|line| !line.starts_with('#'));
        let shown: String = lines.map(|line| format!("    {line}\n")).collect();
        assert!(shown.contains("FROM scratch"), "{shown}");
        assert!(include_str!("../../../docs/kubernetes.md").contains(&shown), "{shown}");
    }

    #[test]
    fn a_packed_image_is_a_consistent_archive() {
        let folder = std::env::temp_dir().join(format!("ftvm-images-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let kernel = folder.join("kernel");
        fs::write(&kernel, "a kernel").unwrap();
        let archive = folder.join("guest.tar");
        pack_guest("x.test/guest:1", &kernel, None, &[("root.img", &kernel)], &archive).unwrap();
        let mut names = Vec::new();
        let mut tar = tar::Archive::new(File::open(&archive).unwrap());
        for entry in tar.entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().display().to_string();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            if let Some(digest) = name.strip_prefix("blobs/sha256/") {
                assert_eq!(Blob::of(&content).digest, format!("sha256:{digest}"));
            }
            names.push(name);
        }
        assert_eq!(names.len(), 5, "{names:?}");
        let missing = pack_guest("x.test/guest:1", &folder.join("none"), None, &[], &archive).unwrap_err();
        fs::remove_dir_all(folder).unwrap();
        assert!(format!("{missing:#}").contains("none"), "{missing:#}");
    }
}
