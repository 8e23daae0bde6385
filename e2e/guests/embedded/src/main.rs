//! A bare-metal guest that serves numbered requests over TCP, journals them on a disk and checks its own memory.
//!
//! It is entered through its PVH note (boot.s) and does all its work in ring 3: a hypervisor that interprets ring 0 still
//! runs it at full speed. The first vCPU runs the service, and every vCPU its worker. Nothing ever waits by spinning but
//! set-up; an idle vCPU sleeps, and any interrupt makes it look at everything again.
#![no_std]
#![no_main]

#[path = "../../../src/guest_blocks.rs"]
#[allow(dead_code)]
mod guest_blocks;
#[path = "../../../src/guest_journal.rs"]
#[allow(dead_code)]
mod guest_journal;
#[path = "../../../src/guest_protocol.rs"]
#[allow(dead_code)]
mod guest_protocol;

use guest_protocol as protocol;

#[macro_use]
mod serial;
mod acpi;
mod apic;
mod blocks;
mod card;
mod config;
mod cpu;
mod disk;
mod journal;
mod memory;
mod net;
mod pci;
mod runtime;
mod service;
mod start_info;
mod statics;
mod time;
mod virtio;
mod worker;

use acpi::Acpi;
use card::{Card, Identity};
use config::Config;
use cpu::MAX_VCPUS;
use disk::Disk;
use guest_journal::MAX_DISKS;
use journal::Journal;
use memory::Region;
use net::Net;
use protocol::MAX_CARDS;
use service::Service;
use start_info::StartInfo;
use statics::{Once, Published};
use virtio::PciTransport;
use worker::{Churn, Next, Worker};

/// What the other vCPUs need to begin: the pages, and how many vCPUs share them.
static PARTS: Published<(Region, usize)> = Published::new();

/// Too large for the stack.
static CARDS: Once<Cards> = Once::new([const { None }; MAX_CARDS]);
static DISKS: Once<Disks> = Once::new([const { None }; MAX_DISKS]);

type Cards = [Option<Card>; MAX_CARDS];
type Disks = [Option<Disk>; MAX_DISKS];

const NETWORK: u32 = 1;
const BLOCK: u32 = 2;

/// Where boot.s sends the first vCPU.
// SAFETY: no other symbol of the image has this name; boot.s jumps here with this ABI.
#[unsafe(no_mangle)]
extern "C" fn guest_main() -> ! {
    serial::init();
    let info = StartInfo::read();
    let config = Config::parse(info.command_line());
    let acpi = Acpi::read(info.rsdp);
    apic::init();
    let clock = time::start();
    apic::set_timer_hz(clock.apic_hz);
    let region = Region::take(info.ram());
    let vcpus = start_others(&acpi, &config);
    log!(
        "version {}, {vcpus} vcpus, {} MiB free, TSC {} MHz, APIC timer {} MHz",
        env!("CARGO_PKG_VERSION"),
        (region.pages() * memory::PAGE_BYTES) >> 20,
        clock.tsc_hz / 1_000_000,
        clock.apic_hz / 1_000_000
    );
    let (cards, disks) = (CARDS.take(), DISKS.take());
    open_devices(&config, cards, disks);
    let (journal, past) = Journal::open(disks);
    let [Some(_), further @ ..] = &*cards else {
        panic!("no virtio network card: nobody can reach this guest");
    };

    PARTS.set((region, vcpus));
    worker::set_check_rate(config.check_rate);
    if config.churn_pages > 0 {
        let pages = config.churn_pages.min(region.pages());
        worker::order_churn(Churn {
            pages,
            rate: config.churn_rate,
            words: config.churn_words,
        });
    }
    (1..vcpus).for_each(apic::wake);
    log!("network cards: {}", 1 + further.iter().flatten().count());
    if let Some(ip) = config.ips[0] {
        let (boots, count, port) = (journal.boots, past[0].count, config.port);
        log!("boots {boots}, count {count}, ready on {ip} port {port}");
    }
    let mut service = Service::start(cards, config.port, journal, past, region, acpi, vcpus);
    let mut worker = Worker::new(region, vcpus);
    run(
        || {
            service.poll();
            service.next(time::now())
        },
        &mut worker,
    )
}

/// Where boot.s sends every other vCPU.
// SAFETY: no other symbol of the image has this name; boot.s jumps here with this ABI.
#[unsafe(no_mangle)]
extern "C" fn application_main() -> ! {
    apic::init();
    apic::set_timer_hz(apic::timer_hz());
    cpu::this().online.store(1, core::sync::atomic::Ordering::Release);
    let (region, vcpus) = loop {
        cpu::this().clear_wake();
        if let Some(parts) = PARTS.get() {
            break parts;
        }
        cpu::wait();
    };
    run(|| None, &mut Worker::new(region, vcpus))
}

/// A vCPU's loop: `serve` whenever an interrupt came or its time has come, the worker in between, sleep if neither has
/// anything to do. `serve` says when it must run next.
fn run(mut serve: impl FnMut() -> Option<time::Nanoseconds>, worker: &mut Worker) -> ! {
    let area = cpu::this();
    let mut alarm = apic::Alarm::default();
    loop {
        area.check_stack();
        area.clear_wake();
        let due = serve();
        loop {
            let next = worker.step();
            let now = time::now();
            let deadline = match next {
                Next::Busy => None,
                Next::At(at) => Some(due.map_or(at, |due| due.min(at))),
                Next::Idle => due,
            };
            if area.woken() || due.is_some_and(|due| due <= now) {
                break;
            }
            if next == Next::Busy {
                continue;
            }
            if let Some(deadline) = deadline {
                alarm.set(deadline, now);
            }
            cpu::wait();
            break;
        }
    }
}

/// Starts the other vCPUs; returns how many run in all.
fn start_others(acpi: &Acpi, config: &Config) -> usize {
    let listed = acpi.apic_ids();
    let wanted = config.vcpus.unwrap_or(listed.len().max(1)).min(MAX_VCPUS);
    let own = apic::id();
    // Without ACPI the identifiers are 0, 1, 2 …
    let ids = (0..MAX_VCPUS as u32).map(|index| listed.get(index as usize).copied().unwrap_or(index));
    let count = if listed.is_empty() { wanted } else { listed.len() };
    let mut vcpus = 1;
    for apic_id in ids.take(count).filter(|&id| id != own) {
        if vcpus >= wanted {
            break;
        }
        if apic::start_vcpu(vcpus, apic_id) {
            vcpus += 1;
        } else {
            log!("vCPU with APIC identifier {apic_id} does not start, going on without it");
        }
    }
    vcpus
}

/// Opens every disk, and every network card that has an address: the first one always has.
fn open_devices(config: &Config, cards: &mut Cards, disks: &mut Disks) {
    let (mut cards_found, mut disks_opened) = (0, 0);
    pci::for_each_virtio(&[NETWORK, BLOCK], |registers, vector| {
        let (kind, place) = (registers.kind, registers.function);
        let transport = PciTransport::new(registers);
        let opened = match kind {
            NETWORK => {
                let number = cards_found;
                cards_found += 1;
                let Some(identity) = identity(config, number) else {
                    log!("{place}: network card {number} has no address, left alone");
                    return;
                };
                Net::open(transport, number).map(|net| {
                    let [a, b, c, d, e, f] = net.mac;
                    let ip = identity.ip;
                    log!(
                        "{place}: network card {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x} on {ip}, vector {vector}"
                    );
                    cards[number] = Some(Card::new(net, number, &identity));
                })
            }
            _ if disks_opened < MAX_DISKS => Disk::open(transport, disks_opened).map(|disk| {
                log!("{place}: disk of {} sectors, vector {vector}", disk.sectors());
                disks[disks_opened] = Some(disk);
                disks_opened += 1;
            }),
            _ => {
                log!("{place}: a disk beyond {MAX_DISKS}, left alone");
                return;
            }
        };
        if let Err(error) = opened {
            log!("{place}: virtio type {kind} can't be opened: {error}");
        }
    });
}

/// Who the guest is on this card; nobody where the command line says nothing.
fn identity(config: &Config, card: usize) -> Option<Identity> {
    let ip = config.ips.get(card).copied().flatten()?;
    let first = card == 0;
    Some(Identity {
        ip,
        mac: config.mac.filter(|_| first),
        gateway: config.gateway.filter(|_| first),
    })
}
