//! Where first contents come from and what they are written in.

use ftvm_crds::BACKING_MAX;
use serde::{Deserialize, Serialize};

/// First contents of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Source {
    /// Where they are.
    pub place: Place,
    /// The format; by the ending of the name if missing.
    #[serde(default)]
    pub format: Option<Format>,
    /// The compression; by the ending of the name if missing.
    #[serde(default)]
    pub compression: Option<Compression>,
    /// SHA-256 of the file as it is there, 64 hexadecimal digits.
    #[serde(default)]
    pub sha256: Option<String>,
}

/// Where a file is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Place {
    /// In the guest image, by its path there.
    Image {
        /// The path.
        path: String,
        /// Those of the files there that it is the difference from, nearest first.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        backing: Vec<String>,
    },
    /// In a claim that is mounted for reading, by its path there.
    Claim {
        /// The path.
        path: String,
        /// Those of the files there that it is the difference from, nearest first.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        backing: Vec<String>,
    },
    /// At a web server.
    Http {
        /// Where.
        url: String,
        /// Who vouches for the server instead of the public authorities: certificates, PEM.
        #[serde(default)]
        authority: Option<String>,
    },
}

/// What a file is written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// As the guest sees it.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
}

/// What a file is compressed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip (RFC 1952).
    Gzip,
    /// xz.
    Xz,
    /// Zstandard (RFC 8878).
    Zstd,
}

/// What to read a file as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reading {
    /// The format within the compression.
    pub format: Format,
    /// The compression.
    pub compression: Compression,
    /// A person said so: what the file begins with is no reason to doubt it.
    pub certain: bool,
}

impl Source {
    /// The file's name, from which the rest follows where nobody says it.
    pub fn name(&self) -> &str {
        match &self.place {
            Place::Image { path, .. } | Place::Claim { path, .. } => path,
            Place::Http { url, .. } => url.split(['?', '#']).next().unwrap_or(url),
        }
    }

    /// Its backing files' paths.
    fn backing(&self) -> &[String] {
        match &self.place {
            Place::Image { backing, .. } | Place::Claim { backing, .. } => backing,
            Place::Http { .. } => &[],
        }
    }

    /// What to read it as.
    ///
    /// # Errors
    /// If that is nothing that can be read.
    pub fn reading(&self) -> Result<Reading, String> {
        let name = self.name().to_ascii_lowercase();
        let by_ending = [
            (".gz", Compression::Gzip),
            (".xz", Compression::Xz),
            (".zst", Compression::Zstd),
        ];
        let ending = by_ending.iter().find(|(ending, _)| name.ends_with(ending));
        let compression = self
            .compression
            .unwrap_or(ending.map_or(Compression::None, |(_, compression)| *compression));
        let inner = ending.map_or(name.as_str(), |(ending, _)| name.trim_end_matches(ending));
        let other = [".vmdk", ".vhd", ".vhdx", ".vdi", ".ova", ".iso", ".zip", ".bz2"];
        if self.format.is_none()
            && let Some(ending) = other.iter().find(|ending| inner.ends_with(**ending))
        {
            return Err(format!(
                "{} can't be read as {ending}: convert it (qemu-img convert -O qcow2), or say source.format Raw if it is the disk itself",
                self.name()
            ));
        }
        let format = self.format.unwrap_or(if inner.ends_with(".qcow2") {
            Format::Qcow2
        } else {
            Format::Raw
        });
        if format == Format::Qcow2 && compression != Compression::None {
            return Err(format!(
                "{} is a compressed qcow2 file, which would have to be unpacked first: let qcow2 compress itself (qemu-img convert -c -O qcow2)",
                self.name()
            ));
        }
        if format == Format::Raw && !self.backing().is_empty() {
            return Err(format!(
                "{} is to be read as a raw disk, and only a qcow2 file has backing files: say source.format Qcow2, or leave backing out",
                self.name()
            ));
        }
        if self.backing().len() > BACKING_MAX {
            return Err(format!(
                "{} has {} backing files, and {BACKING_MAX} can be read: make some of them one (qemu-img convert -O qcow2)",
                self.name(),
                self.backing().len()
            ));
        }
        Ok(Reading {
            format,
            compression,
            certain: self.format.is_some(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(path: &str) -> Source {
        Source {
            place: Place::Image {
                path: path.to_owned(),
                backing: Vec::new(),
            },
            format: None,
            compression: None,
            sha256: None,
        }
    }

    #[test]
    fn the_name_says_what_nobody_else_does() {
        for (name, format, compression) in [
            ("/disk/root.raw", Format::Raw, Compression::None),
            ("/disk/root", Format::Raw, Compression::None),
            ("/disk/ROOT.QCOW2", Format::Qcow2, Compression::None),
            ("/disk/root.raw.gz", Format::Raw, Compression::Gzip),
            ("/disk/root.img.xz", Format::Raw, Compression::Xz),
            ("/disk/root.zst", Format::Raw, Compression::Zstd),
        ] {
            let found = source(name).reading().unwrap();
            assert_eq!(
                (found.format, found.compression, found.certain),
                (format, compression, false)
            );
        }
        let mut said = source("/disk/root.qcow2");
        said.format = Some(Format::Raw);
        let found = said.reading().unwrap();
        assert_eq!((found.format, found.certain), (Format::Raw, true));
        let mut url = source("");
        url.place = Place::Http {
            url: "https://images.example/a.qcow2?token=.raw#x".to_owned(),
            authority: None,
        };
        assert_eq!(url.reading().unwrap().format, Format::Qcow2);
    }

    #[test]
    fn only_qcow2_has_backing_files_and_not_too_many() {
        let over = |path: &str, count: usize| Source {
            place: Place::Claim {
                path: path.to_owned(),
                backing: (0..count).map(|n| format!("/base-{n}.qcow2")).collect(),
            },
            ..source("")
        };
        assert_eq!(over("/a.qcow2", BACKING_MAX).reading().unwrap().format, Format::Qcow2);
        let why = over("/a.qcow2", BACKING_MAX + 1).reading().unwrap_err();
        assert!(why.contains("9 backing files") && why.contains("convert"), "{why}");
        let why = over("/a.img", 1).reading().unwrap_err();
        assert!(why.contains("say source.format Qcow2"), "{why}");
        let said = Source {
            format: Some(Format::Qcow2),
            ..over("/a.img", 1)
        };
        assert_eq!(said.reading().unwrap().format, Format::Qcow2);
    }

    #[test]
    fn what_cannot_be_read_is_refused_with_advice() {
        for name in [
            "/disk/root.qcow2.gz",
            "/disk/root.vmdk",
            "/disk/root.vhd",
            "/disk/appliance.ova",
        ] {
            let why = source(name).reading().unwrap_err();
            assert!(why.contains(name) && why.contains("qemu-img"), "{why}");
        }
    }
}
