//! Raw, qcow2 and compressed files as one thing: pieces of contents in ascending order.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::vec::IntoIter;

use ftvm_node_daemon::disks::source::{Compression, Format, Reading};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, Mapping};
use rustix::fs::SeekFrom as Extent;
use rustix::io::Errno;

use crate::Failure;

/// Contents are read so many bytes at a time.
pub const PIECE_BYTES: usize = 256 << 10;
/// Longest word of an image in what is said of it: the advice comes after it.
const SHOWN_CHARS_MAX: usize = 60;
/// Memory of a decompressor's window.
const WINDOW_BYTES: u64 = 128 << 20;

/// A file as the crate has it.
type Stored = imago::file::File;

/// A backing file.
pub struct Behind {
    /// Its name, for people.
    pub name: String,
    /// What it is.
    pub file: File,
}

/// Takes contents: where, what. In ascending order.
pub trait Sink {
    /// Contents of this place.
    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Failure>;
    /// Zeros up to here.
    fn zeros(&mut self, end: u64) -> Result<(), Failure>;
}

/// What every qcow2 file begins with.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";
/// What begins like one of these is not what it is taken for unless a person says so.
const MAGICS: &[(&str, u64, &[u8])] = &[
    ("qcow2: say source.format Qcow2", 0, &QCOW2_MAGIC),
    ("gzip: say source.compression Gzip", 0, &[0x1f, 0x8b]),
    ("xz: say source.compression Xz", 0, &[0xfd, b'7', b'z', b'X', b'Z', 0]),
    ("Zstandard: say source.compression Zstd", 0, &[0x28, 0xb5, 0x2f, 0xfd]),
    ("VMDK: convert it (qemu-img convert -O qcow2)", 0, b"KDMV"),
    (
        "VMDK: convert it (qemu-img convert -O qcow2)",
        0,
        b"# Disk DescriptorFile",
    ),
    ("VHD: convert it (qemu-img convert -O qcow2)", 0, b"conectix"),
    ("VHDX: convert it (qemu-img convert -O qcow2)", 0, b"vhdxfile"),
    (
        "VDI: convert it (qemu-img convert -O qcow2)",
        0x40,
        &[0x7f, 0x10, 0xda, 0xbe],
    ),
];

/// Says all contents of a file, which is the difference from those behind it, nearest first, from this place on.
pub fn read(
    (file, behind): (File, Vec<Behind>),
    reading: Reading,
    (from, limit): (u64, u64),
    sink: &mut dyn Sink,
) -> Result<(), Failure> {
    match (reading.format, reading.compression) {
        (Format::Raw, Compression::None) => {
            if !reading.certain {
                doubt(&file)?;
            }
            raw(file, (from, limit), sink)
        }
        (Format::Qcow2, Compression::None) => qcow2((file, behind), (from, limit), sink),
        (Format::Qcow2, _) => Err(Failure::new("a compressed qcow2 file can't be read")),
        (Format::Raw, compression) => {
            let file = BufReader::with_capacity(PIECE_BYTES, file);
            let mut unpacked: Box<dyn Read> = match compression {
                Compression::Xz => Box::new(lzma_rust2::XzReader::new_mem_limit(
                    file,
                    true,
                    u32::try_from(WINDOW_BYTES >> 10).unwrap_or(u32::MAX),
                )),
                Compression::Zstd => Box::new(Frames { file, frame: None }),
                Compression::Gzip | Compression::None => Box::new(flate2::bufread::MultiGzDecoder::new(file)),
            };
            stream(unpacked.as_mut(), reading, (from, limit), sink)
        }
    }
}

/// A file that begins like another format was probably meant as that one.
fn doubt(file: &File) -> Result<(), Failure> {
    use std::os::unix::fs::FileExt;
    for (name, at, magic) in MAGICS {
        let mut start = vec![0; magic.len()];
        if file.read_exact_at(&mut start, *at).is_ok() && start == *magic {
            return Err(Failure::new(format!(
                "it is to be read as a raw disk and begins like {name}; or say source.format Raw if it is one after all"
            )));
        }
    }
    Ok(())
}

fn too_large(found: &str, limit: u64) -> Failure {
    Failure::new(format!(
        "it has {found}, more than the disk's {limit} bytes: make the disk larger"
    ))
}

fn raw(mut file: File, (from, limit): (u64, u64), sink: &mut dyn Sink) -> Result<(), Failure> {
    let length = file.metadata()?.len();
    if length > limit {
        return Err(too_large(&format!("{length} bytes"), limit));
    }
    let mut buffer = vec![0u8; PIECE_BYTES];
    let mut at = from;
    while at < length {
        let data = match rustix::fs::seek(&file, Extent::Data(at)) {
            Ok(data) => data.min(length),
            Err(Errno::NXIO) => length,
            // No such call here: everything counts as contents.
            Err(_) => at,
        };
        if data > at {
            sink.zeros(data)?;
            at = data;
            continue;
        }
        file.seek(SeekFrom::Start(at))?;
        let count = usize::try_from(length - at).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES));
        file.read_exact(&mut buffer[..count]).map_err(|error| {
            Failure::new(format!(
                "it ends at byte {at} or later ({error}): it was changed meanwhile"
            ))
        })?;
        sink.data(at, &buffer[..count])?;
        at += count as u64;
    }
    Ok(())
}

/// Reads until the buffer is full or nothing is left; how much it read.
pub fn fill(from: &mut (impl Read + ?Sized), buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match from.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

fn stream(
    from: &mut dyn Read,
    reading: Reading,
    (skip, limit): (u64, u64),
    sink: &mut dyn Sink,
) -> Result<(), Failure> {
    let mut buffer = vec![0u8; PIECE_BYTES];
    let mut at = 0u64;
    loop {
        let filled = fill(from, &mut buffer).map_err(|error| {
            let compression = reading.compression;
            Failure::new(format!(
                "it can't be unpacked as {compression:?} at byte {at} of the contents ({error}): it is damaged or something else"
            ))
        })?;
        let piece = &buffer[..filled];
        if at == 0 && piece.starts_with(&QCOW2_MAGIC) && !reading.certain {
            return Err(Failure::new(
                "it is a compressed qcow2 file, which would have to be unpacked first: let qcow2 compress itself (qemu-img convert -c -O qcow2)",
            ));
        }
        let end = at + filled as u64;
        if end > limit {
            return Err(too_large("more contents", limit));
        }
        if end > skip {
            let known = usize::try_from(skip.saturating_sub(at)).unwrap_or(0);
            sink.data(at + known as u64, &piece[known..])?;
        }
        if filled < buffer.len() {
            return Ok(());
        }
        at = end;
    }
}

/// All frames of a Zstandard file, one after the other.
struct Frames {
    file: BufReader<File>,
    frame: Option<Box<ruzstd::decoding::FrameDecoder>>,
}

impl Read for Frames {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        use std::io::{BufRead, Error};
        loop {
            let Some(decoder) = &mut self.frame else {
                if self.file.fill_buf()?.is_empty() {
                    return Ok(0);
                }
                let mut decoder = ruzstd::decoding::FrameDecoder::new();
                decoder.set_max_window_size(WINDOW_BYTES);
                match decoder.reset(&mut self.file) {
                    Ok(()) => self.frame = Some(Box::new(decoder)),
                    Err(ruzstd::decoding::errors::FrameDecoderError::ReadFrameHeaderError(
                        ruzstd::decoding::errors::ReadFrameHeaderError::SkipFrame { length, .. },
                    )) => {
                        std::io::copy(&mut (&mut self.file).take(length.into()), &mut std::io::sink())?;
                    }
                    Err(error) => return Err(Error::other(error.to_string())),
                }
                continue;
            };
            if decoder.can_collect() == 0 && !decoder.is_finished() {
                let strategy = ruzstd::decoding::BlockDecodingStrategy::UptoBytes(buffer.len().max(1));
                decoder
                    .decode_blocks(&mut self.file, strategy)
                    .map_err(|error| Error::other(error.to_string()))?;
            }
            let count = decoder.read(buffer)?;
            if count > 0 {
                return Ok(count);
            }
            if decoder.is_finished() {
                let sums = (decoder.get_checksum_from_data(), decoder.get_calculated_checksum());
                if let (Some(said), Some(found)) = sums
                    && said != found
                {
                    return Err(Error::other("its checksum is wrong"));
                }
                self.frame = None;
            }
        }
    }
}

fn qcow2((file, behind): (File, Vec<Behind>), (from, limit): (u64, u64), sink: &mut dyn Sink) -> Result<(), Failure> {
    let (image, layers) = open_chain(file, behind)?;
    let size = image.size();
    if size > limit {
        return Err(too_large(&format!("{size} bytes as the guest sees it"), limit));
    }
    // In the order of the layers: what is behind an image comes before it.
    let stored = image.inner().collect_storage_dependencies();
    let whose = if layers.len() > 1 {
        "it or a backing file of it"
    } else {
        "it"
    };
    let mut buffer = vec![0u8; PIECE_BYTES];
    let mut at = from;
    while at < size {
        let damaged =
            |error: std::io::Error| Failure::new(format!("{whose} is damaged at byte {at} of the disk: {error}"));
        let (mapping, length) = image.get_mapping(at, size - at).map_err(damaged)?;
        if length == 0 {
            return Err(damaged(std::io::Error::other("a place without contents")));
        }
        if matches!(mapping, Mapping::Zero { .. }) {
            at += length;
            sink.zeros(at)?;
            continue;
        }
        let count = usize::try_from(length).map_or(PIECE_BYTES, |length| length.min(PIECE_BYTES));
        if let Mapping::Raw { storage, offset, .. } = mapping {
            let place = stored.iter().position(|known| std::ptr::eq(*known, storage));
            let layer = place.and_then(|place| layers.get(place));
            let layer = layer.ok_or_else(|| damaged(std::io::Error::other("contents of no file")))?;
            layer.check(offset, length)?;
        }
        image.read(&mut buffer[..count], at).map_err(damaged)?;
        sink.data(at, &buffer[..count])?;
        at += count as u64;
    }
    Ok(())
}

/// A file of a chain.
struct Layer {
    /// None: the image itself.
    name: Option<String>,
    file_bytes: u64,
    /// So much may be missing at its end.
    cluster_bytes: u64,
}

impl Layer {
    /// Whether the file has these contents.
    fn check(&self, offset: u64, length: u64) -> Result<(), Failure> {
        if offset.saturating_add(length) < self.file_bytes.saturating_add(self.cluster_bytes) {
            return Ok(());
        }
        Err(said_of(self.name.as_deref(), cut_short(offset.max(self.file_bytes))))
    }
}

fn said_of(backing: Option<&str>, failure: Failure) -> Failure {
    match backing {
        Some(name) => failure.of_backing(name),
        None => failure,
    }
}

/// What the crate would not notice, or call by a number. Gives the size of a cluster.
fn check_header(file: &File) -> Result<u64, Failure> {
    use std::os::unix::fs::FileExt;
    let number = |at: u64| {
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, at).map(|()| u32::from_be_bytes(bytes))
    };
    let short = |_| Failure::new("it can't be read as qcow2: it has no whole header");
    let convert = "convert it (qemu-img convert -O qcow2 -o compression_type=zlib,extended_l2=off)";
    if number(0).map_err(short)?.to_be_bytes() != QCOW2_MAGIC {
        return Err(Failure::new(
            "it can't be read as qcow2, for it does not begin like one: name the right file, or convert it (qemu-img convert -O qcow2)",
        ));
    }
    let (version, encryption) = (number(4).map_err(short)?, number(32).map_err(short)?);
    if encryption != 0 {
        return Err(Failure::new(format!("it is encrypted: {convert}")));
    }
    // Incompatible features are 64 bits at byte 72, from version 3 on; known ones are in the lower half.
    let features = if version < 3 { 0 } else { number(76).map_err(short)? };
    let cannot = [
        (1, "it is marked as damaged"),
        (3, "it is compressed with Zstandard"),
        (4, "it has extended L2 entries"),
    ];
    match cannot.iter().find(|(bit, _)| features & (1 << bit) != 0) {
        Some((_, what)) => Err(Failure::new(format!("{what}, which can't be read: {convert}"))),
        None => check_tables(file),
    }
}

/// The crate takes what is behind the end of a file for zeros: an image that was cut short would become an empty disk. (What is
/// missing within the last cluster is not seen here: images may end there.)
fn check_tables(file: &File) -> Result<u64, Failure> {
    use std::os::unix::fs::FileExt;
    let length = file.metadata()?.len();
    let mut header = [0; 48];
    file.read_exact_at(&mut header, 0)?;
    let word = |at: usize| u32::from_be_bytes(std::array::from_fn(|n| header[at + n]));
    let (cluster_bits, entries) = (word(20), u64::from(word(36)));
    let table = u64::from(word(40)) << 32 | u64::from(word(44));
    // QEMU's documentation, interop/qcow2: 512 bytes at least, QEMU itself takes 2 MiB at most.
    if !(9..=21).contains(&cluster_bits) {
        return Err(Failure::new(format!(
            "it can't be read as qcow2: clusters of 2^{cluster_bits} bytes"
        )));
    }
    if table.checked_add(entries * 8).is_none_or(|end| end > length) {
        return Err(cut_short(table));
    }
    let mut piece = vec![0; 64 << 10];
    let mut at = table;
    while at < table + entries * 8 {
        let count = usize::try_from(table + entries * 8 - at).map_or(piece.len(), |left| left.min(piece.len()));
        file.read_exact_at(&mut piece[..count], at)?;
        for entry in piece[..count].chunks_exact(8) {
            let entry = u64::from_be_bytes(std::array::from_fn(|n| entry[n]));
            // Bits 9 to 55: where the L2 table is, a cluster long.
            let second = entry & 0x00ff_ffff_ffff_fe00;
            if second != 0 && second + (1 << cluster_bits) > length {
                return Err(cut_short(second));
            }
        }
        at += count as u64;
    }
    Ok(1 << cluster_bits)
}

fn cut_short(at: u64) -> Failure {
    Failure::new(format!(
        "it is cut short or damaged: what it has at byte {at} is behind its end; fetch it again"
    ))
}

/// An image with all that is behind it, and its files: the last one of the chain first. The crate would open others by their names in
/// headers; it is not asked to, told not to, and in a sandbox where it can't.
fn open_chain(file: File, behind: Vec<Behind>) -> Result<(FormatAccess<Stored>, Vec<Layer>), Failure> {
    let (mut behind, mut layers) = (behind.into_iter(), Vec::new());
    let image = open_qcow2((None, file), &mut behind, &mut layers)?;
    match behind.next() {
        None => Ok((image, layers)),
        Some(Behind { name, .. }) => Err(Failure::new(format!(
            "its chain of backing files ends before {name}: leave that one and those after it out of backing"
        ))),
    }
}

/// One image, and then what is behind it.
fn open_qcow2(
    (name, file): (Option<String>, File),
    behind: &mut IntoIter<Behind>,
    layers: &mut Vec<Layer>,
) -> Result<FormatAccess<Stored>, Failure> {
    let own = |failure: Failure| said_of(name.as_deref(), failure);
    let file_bytes = file.metadata()?.len();
    let cluster_bytes = check_header(&file).map_err(own)?;
    let mut image = open_image(file).map_err(own)?;
    if let Some((format, next)) = next_of(&image, behind).map_err(own)? {
        let backing = match format {
            Format::Qcow2 => open_qcow2((Some(next.name), next.file), behind, layers)?,
            Format::Raw => open_raw(next, layers)?,
        };
        image.set_backing(Some(backing));
    }
    image
        .open_implicit_dependencies_gated(DenyImplicitOpenGate::default())
        .map_err(|error| own(no_image(&error)))?;
    layers.push(Layer {
        name,
        file_bytes,
        cluster_bytes,
    });
    Ok(FormatAccess::new(image))
}

/// A raw file ends a chain. Its format is what the image before it says: nothing that it begins with makes it another one.
fn open_raw(Behind { name, file }: Behind, layers: &mut Vec<Layer>) -> Result<FormatAccess<Stored>, Failure> {
    let file_bytes = file.metadata()?.len();
    let opened = Stored::try_from(file).and_then(|stored| Raw::open_image(stored, false));
    let raw = opened.map_err(|error| Failure::from(error).of_backing(&name))?;
    layers.push(Layer {
        name: Some(name),
        file_bytes,
        // Its mappings end where it does.
        cluster_bytes: 1,
    });
    Ok(FormatAccess::new(raw))
}

fn no_image(error: &std::io::Error) -> Failure {
    Failure::new(format!("it can't be read as qcow2: {error}"))
}

fn open_image(file: File) -> Result<Qcow2<Stored>, Failure> {
    let opened = Stored::try_from(file).and_then(|stored| Qcow2::<Stored>::open_image(stored, false));
    let image = opened.map_err(|error| no_image(&error))?;
    if image.requires_external_data_file() || image.implicit_external_data_file().is_some() {
        return Err(Failure::new(
            "its data is in another file, which is never opened: make it whole (qemu-img convert -O qcow2)",
        ));
    }
    Ok(image)
}

/// What is behind an image: its header says whether anything is, and in which format; which file it is, a person says.
fn next_of(image: &Qcow2<Stored>, behind: &mut IntoIter<Behind>) -> Result<Option<(Format, Behind)>, Failure> {
    let Some(named) = image.implicit_backing_file() else {
        return Ok(None);
    };
    let Some(next) = behind.next() else {
        return Err(Failure::new(format!(
            "it is only the difference from another file (it says {}), which is never opened by that name: name the file in backing, or make it whole (qemu-img convert -O qcow2)",
            shown(named)
        )));
    };
    let format = match image.implicit_backing_format().map(String::as_str) {
        Some("qcow2") => Format::Qcow2,
        Some("raw") => Format::Raw,
        Some(other) => {
            return Err(Failure::new(format!(
                "it says that its backing file is written in {}, and only raw and qcow2 can be read: make it whole (qemu-img convert -O qcow2)",
                shown(other)
            )));
        }
        None => {
            return Err(Failure::new(
                "it does not say what its backing file is written in, which is never guessed: write it there (qemu-img rebase -u -F raw or qcow2, and -b with the file's name; of version 2, qemu-img rebase -u -b '' and qemu-img amend -o compat=1.1 come first), or make it whole (qemu-img convert -O qcow2)",
            ));
        }
    };
    Ok(Some((format, next)))
}

/// A word of an image, as far as it is fit to be shown.
fn shown(word: &str) -> String {
    let plain = |c: char| if c.is_ascii_graphic() || c == ' ' { c } else { '?' };
    format!(
        "`{}`",
        word.chars().take(SHOWN_CHARS_MAX).map(plain).collect::<String>()
    )
}
