//! Prints what the parts of replication do in a second on this machine:
//! `cargo run --release -p ftvm-engine --example replication_rates`.
//!
//! Pages are encoded from memory and checked and applied to memory, without a link. The link is measured on the
//! loopback against the same TLS library used plainly (one thread that writes, one that reads, 256 KiB at a time), a
//! resync against both. Nothing here is judged.
//!
//! `replication_rates plain MEGABYTES` measures the plain stream alone, once, and prints its bytes a second: for the
//! benchmark, which compares a real resync with it.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ftvm_engine::kvm::{CpuBaseline, CpuOffer};
use ftvm_engine::memory::GuestRam;
use ftvm_engine::replication::epoch::{EpochSender, StagingLimits};
use ftvm_engine::replication::journal::JOURNAL_MIN_BYTES;
use ftvm_engine::replication::link::{LinkConfig, LinkEvent, LinkHub, LinkSender, SessionSink, TlsIdentity};
use ftvm_engine::replication::memory::{PAGE_SIZE, Page, PageMemory};
use ftvm_engine::replication::pages::{
    Compression, CopiedPages, EncoderConfig, PageChunk, PageEncoder, PageStats, SinkClosed,
};
use ftvm_engine::replication::resync::{Offer, ResyncSource, ResyncTarget, StillDigest};
use ftvm_engine::replication::standby_disks::StandbyDisks;
use ftvm_engine::replication::storage::FileStorage;
use ftvm_protocol::identity::{Incarnation, SeatId, SessionId, VmId, identity_name};
use ftvm_protocol::wire::{Hello, Kind};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

const VM: VmId = VmId(1);
const PAGES: u32 = 8192;
const LINK_BYTES: usize = 512 << 20;
const PIECE: usize = 256 * 1024;
const RESYNC_PAGES: u32 = 64 * 1024;

/// Other work on the machine disturbs every figure: the streams take turns, and medians are compared.
const ROUNDS: usize = 5;

fn main() -> Result<()> {
    let mut words = std::env::args().skip(1);
    if words.next().as_deref() == Some("plain") {
        let megabytes: usize = words.next().context("how many megabytes?")?.parse()?;
        println!("{:.0}", plain_tls(megabytes << 20)? * 1e6);
        return Ok(());
    }
    println!("pages ({PAGES} a round)");
    pages()?;
    let mut rates = vec![Vec::new(); 2 + RESYNCS.len()];
    for _ in 0..ROUNDS {
        rates[0].push(plain_tls(LINK_BYTES)?);
        rates[1].push(link_rate()?);
        for (index, &(_, compression, fill)) in RESYNCS.iter().enumerate() {
            rates[2 + index].push(resync(compression, fill)?);
        }
    }
    let medians: Vec<f64> = rates.iter_mut().map(|rates| median(rates)).collect();
    println!("\nstreams on the loopback, medians of {ROUNDS} rounds in turn");
    let names = ["plain TLS stream", "link, frames of 256 KiB"]
        .into_iter()
        .chain(RESYNCS.map(|(name, ..)| name));
    for (name, rate) in names.zip(&medians) {
        println!(
            "  {name:<40} {rate:8.0} MB/s {:5.0} % of plain",
            rate / medians[0] * 100.0
        );
    }
    Ok(())
}

/// What a resync copies: name, compression, every how many pages one is in use (and incompressible).
const RESYNCS: [(&str, Compression, u32); 3] = [
    ("resync, incompressible memory", Compression::Lz4, 1),
    ("resync, the same, compression off", Compression::Off, 1),
    ("resync, every fourth page in use", Compression::Lz4, 4),
];

/// No CPU at all: a host without KVM can be measured too.
fn offer() -> CpuOffer {
    let nothing = CpuBaseline {
        leaves: Vec::new(),
        tsc_khz: 0,
    };
    CpuOffer {
        host: nothing.clone(),
        machine: nothing,
        tsc_scaling: true,
    }
}

fn median(rates: &mut [f64]) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

fn megabytes(bytes: usize, time: Duration) -> f64 {
    bytes as f64 / 1e6 / time.as_secs_f64()
}

/// A generator that needs no crate: xorshift64.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn page(&mut self) -> Page {
        let mut page = [0; PAGE_SIZE];
        page.chunks_exact_mut(8)
            .for_each(|word| word.copy_from_slice(&self.next().to_le_bytes()));
        page
    }
}

type Change = fn(&mut Noise, &mut Page);

/// How a guest's page changes from one epoch to the next.
const PATTERNS: [(&str, Change); 6] = [
    ("unchanged", |_, _| {}),
    ("one word", |noise, page| {
        page[8 * (noise.next() as usize % 512)..][..8].copy_from_slice(&noise.next().to_le_bytes())
    }),
    ("32 words", |noise, page| {
        for _ in 0..32 {
            page[8 * (noise.next() as usize % 512)..][..8].copy_from_slice(&noise.next().to_le_bytes());
        }
    }),
    ("a byte in every word", |_, page| {
        page.chunks_exact_mut(8)
            .for_each(|word| word[0] = word[0].wrapping_add(1))
    }),
    ("zero", |_, page| page.fill(0)),
    ("all, incompressible", |noise, page| *page = noise.page()),
];

fn pages() -> Result<()> {
    for (workers, compression) in [(1, Compression::Lz4), (1, Compression::Off), (2, Compression::Lz4)] {
        println!(
            "  {workers} thread(s), {compression:?}:        encode pages/s   check pages/s   apply pages/s   bytes/page"
        );
        for (name, change) in PATTERNS {
            let (encode, check, apply, stats) = page_rates(workers, compression, change)?;
            let bytes = stats.encoded_bytes as f64 / stats.pages as f64;
            println!("    {name:<22} {encode:14.0} {check:15.0} {apply:15.0} {bytes:12.1}");
        }
    }
    Ok(())
}

fn page_rates(workers: usize, compression: Compression, change: Change) -> Result<(f64, f64, f64, PageStats)> {
    let mut encoder = PageEncoder::new(EncoderConfig {
        workers,
        cache_bytes: 64 << 20,
        compression,
    })?;
    let mut noise = Noise(88172645463325252);
    let memory = ram(PAGES)?;
    let mut contents: Vec<Page> = (0..PAGES).map(|_| noise.page()).collect();
    let (mut encoding, mut checking, mut applying) = (Duration::ZERO, Duration::ZERO, Duration::ZERO);
    let mut total = PageStats::default();
    for round in 0..8 {
        let mut copied = CopiedPages::with_capacity(PAGES as usize);
        contents
            .iter()
            .zip(0..)
            .for_each(|(page, number)| copied.push(number, page));
        let chunks = Arc::new(Mutex::new(Vec::new()));
        let taken = chunks.clone();
        let sink = move |payload| {
            taken.lock().map_err(|_| SinkClosed)?.push(payload);
            Ok(())
        };
        let begun = Instant::now();
        let stats = encoder.encode(Arc::new(copied), Arc::new(sink))?;
        let encoded = begun.elapsed();
        let payloads = std::mem::take(&mut *chunks.lock().ok().context("poisoned")?);
        let begun = Instant::now();
        let checked: Vec<_> = payloads
            .into_iter()
            .map(|payload| PageChunk::check(payload, PAGES))
            .collect::<Result<_, _>>()?;
        let check = begun.elapsed();
        let begun = Instant::now();
        checked.iter().for_each(|chunk| chunk.apply(&memory));
        let apply = begun.elapsed();
        // The first round fills the cache.
        if round > 0 {
            total.add(&stats);
            encoding += encoded;
            checking += check;
            applying += apply;
        }
        contents.iter_mut().for_each(|page| change(&mut noise, page));
    }
    let rate = |time: Duration| total.pages as f64 / time.as_secs_f64();
    Ok((rate(encoding), rate(checking), rate(applying), total))
}

struct Authority(Issuer<'static, KeyPair>, String);

impl Authority {
    fn new() -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec![])?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key)?.pem();
        Ok(Self(Issuer::new(params, key), pem))
    }

    fn config(&self, seat: SeatId) -> Result<LinkConfig> {
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new(vec![identity_name(VM, seat)])?.signed_by(&key, &self.0)?;
        let identity = TlsIdentity::from_pem(VM, seat, &certificate.pem(), &key.serialize_pem(), &self.1)?;
        let hello = Hello::new(
            VM,
            Incarnation {
                seat,
                start: u64::from(seat.0 as u32),
            },
        );
        Ok(LinkConfig::new(hello, identity))
    }
}

/// The same library, plainly: server certificate only, as most streams are.
fn plain_tls(bytes: usize) -> Result<f64> {
    let key = KeyPair::generate()?;
    let certificate = CertificateParams::new(vec!["plain.test".to_owned()])?.self_signed(&key)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let der = certificate.der().clone();
    let private = rustls::pki_types::PrivatePkcs8KeyDer::from(key.serialize_der()).into();
    let server = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![der.clone()], private)?;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(der)?;
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let reading = std::thread::spawn(move || -> Result<()> {
        let (stream, _) = listener.accept()?;
        let mut tls = rustls::StreamOwned::new(rustls::ServerConnection::new(server.into())?, stream);
        let mut buffer = vec![0; PIECE];
        let mut left = bytes / PIECE * PIECE;
        while left > 0 {
            let read = tls.read(&mut buffer)?;
            anyhow::ensure!(read > 0, "the stream ended early");
            left -= read;
        }
        Ok(tls.write_all(b"done")?)
    });
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let mut tls = rustls::StreamOwned::new(
        rustls::ClientConnection::new(client.into(), "plain.test".try_into()?)?,
        stream,
    );
    let piece = vec![7; PIECE];
    let begun = Instant::now();
    for _ in 0..bytes / PIECE {
        tls.write_all(&piece)?;
    }
    tls.read_exact(&mut [0; 4])?;
    let rate = megabytes(bytes / PIECE * PIECE, begun.elapsed());
    reading.join().ok().context("reader panicked")??;
    Ok(rate)
}

/// Two hubs, linked: sender of the first, both hubs, and what the second receives goes to `events`.
fn linked(
    events: impl Fn(LinkEvent) + Send + Sync + 'static,
) -> Result<(LinkSender, LinkHub, LinkHub, std::sync::mpsc::Receiver<LinkEvent>)> {
    let authority = Authority::new()?;
    let (a, b) = (SeatId(1), SeatId(2));
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let second = LinkHub::start(authority.config(b)?, Some(listener), events)?;
    second.add_peer(a, None);
    let (ups, up) = channel();
    let first = LinkHub::start(authority.config(a)?, None, move |event| drop(ups.send(event)))?;
    first.add_peer(b, Some(address));
    loop {
        match up.recv_timeout(Duration::from_secs(10)).context("no link")? {
            LinkEvent::Up { sender, .. } => return Ok((sender, first, second, up)),
            event => println!("  {event:?}"),
        }
    }
}

fn link_rate() -> Result<f64> {
    let (ended, end) = channel();
    let (sender, first, second, _events) = linked(move |event| {
        if let LinkEvent::Frame { frame, .. } = event
            && frame.kind == Kind::ResyncEnd
        {
            let _ = ended.send(());
        }
    })?;
    let piece = vec![7; PIECE];
    let begun = Instant::now();
    for _ in 0..LINK_BYTES / PIECE {
        sender.send(Kind::ResyncMemory, 0, 0, piece.clone())?;
    }
    sender.send(Kind::ResyncEnd, 0, 0, vec![])?;
    end.recv_timeout(Duration::from_secs(120)).context("no end")?;
    let rate = megabytes(LINK_BYTES, begun.elapsed());
    drop((first, second));
    Ok(rate)
}

/// A whole resync of memory: encoder, link, check, apply. The guest stands still. Megabytes of memory a second.
fn resync(compression: Compression, fill: u32) -> Result<f64> {
    let memory = Arc::new(ram(RESYNC_PAGES)?);
    let mut noise = Noise(88172645463325252);
    (0..RESYNC_PAGES)
        .filter(|page| page % fill == 0)
        .for_each(|page| PageMemory::write_page(&*memory, page, &noise.page()));
    let (frames, received) = channel();
    let (sender, first, second, events) = linked(move |event| {
        let frame = match event {
            LinkEvent::Frame { frame, .. } => Some(frame),
            LinkEvent::Up { sender, .. } => {
                if let Ok(mut reply) = REPLY.lock() {
                    *reply = Some(sender);
                }
                return;
            }
            _ => None,
        };
        let _ = frames.send(frame);
    })?;
    let encoder = PageEncoder::new(EncoderConfig {
        workers: 2,
        cache_bytes: 0,
        compression,
    })?;
    let mut epochs = EpochSender::new(Arc::new(SessionSink::new(sender, SessionId(1))), encoder);
    let source = ResyncSource::new(memory.clone(), offer().machine, vec![], vec![], Vec::new);
    let window = source.window();
    let credits = std::thread::spawn(move || {
        for event in events {
            if let LinkEvent::Frame { frame, .. } = event
                && window.credited(&frame.payload).is_err()
            {
                window.close();
            }
        }
    });
    let standby = ram(RESYNC_PAGES)?;
    let journal = tempfile()?;
    let journal = FileStorage::allocated(journal, JOURNAL_MIN_BYTES)?;
    let mut disks = StandbyDisks::open(Arc::new(journal), vec![], &None)?;
    let limits = StagingLimits {
        page_count: RESYNC_PAGES,
        disk_bytes: vec![],
        nics: 0,
        max_epoch_bytes: 1 << 20,
    };
    let offer = Offer {
        cpu: offer(),
        nics: vec![],
    };
    let mut target = ResyncTarget::new(&limits, offer, false);
    let begun = Instant::now();
    let sending = std::thread::spawn(move || source.copy(&mut epochs)?.end(&mut epochs));
    while !target.is_complete() {
        let frame = received.recv()?.context("the link broke")?;
        if let Some((kind, credit)) = target.accept(frame.kind, frame.payload, &standby, &mut disks)? {
            let to = REPLY.lock().ok().context("poisoned")?.clone().context("no link")?;
            to.send(kind, 0, 1, credit)?;
        }
    }
    let time = begun.elapsed();
    sending.join().ok().context("sender panicked")??;
    let digest = |memory: &dyn PageMemory| StillDigest::default().advance(memory, memory.page_count());
    anyhow::ensure!(digest(&*memory) == digest(&standby), "the memories differ");
    drop((first, second));
    credits.join().ok().context("credits panicked")?;
    Ok(megabytes(RESYNC_PAGES as usize * PAGE_SIZE, time))
}

fn ram(pages: u32) -> Result<GuestRam> {
    Ok(GuestRam::new(u64::from(pages) * PAGE_SIZE as u64, true)?)
}

/// Where the receiving side of a resync sends its credit.
static REPLY: Mutex<Option<LinkSender>> = Mutex::new(None);

fn tempfile() -> Result<std::fs::File> {
    let fd = rustix::fs::memfd_create(c"journal", rustix::fs::MemfdFlags::CLOEXEC)?;
    Ok(fd.into())
}
