//! Machines on real KVM, with the test guest.

use super::test_guest::{self, Port, PortSeen, Setup};
use super::*;
use crate::memory::PAGE_SIZE;
use std::convert::Infallible;
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

const MEMORY_BYTES: u64 = 16 << 20;
const SETUP: Setup = Setup {
    pages: 256,
    rounds_per_access: 1024,
};
/// No test waits longer for a guest.
const PATIENCE: Duration = Duration::from_secs(90);

/// The test guest's device as part of the machine's state.
struct PortDevice(Arc<Mutex<Port>>);

impl DeviceSet for PortDevice {
    fn save(&mut self, writer: &mut StateWriter) {
        writer.put(kind::DEVICES, 1, 0, &self.0.lock().expect("port").last().to_le_bytes());
    }

    fn check(&self, reader: &StateReader<'_>) -> Result<(), StateError> {
        let section = reader.require(kind::DEVICES, 1, 0)?;
        if section.bytes.len() == 4 {
            Ok(())
        } else {
            Err(section.invalid("it has not four bytes"))
        }
    }

    fn load(&mut self, reader: &StateReader<'_>) -> Result<(), StateError> {
        let bytes = reader.require(kind::DEVICES, 1, 0)?.bytes;
        self.0
            .lock()
            .expect("port")
            .set_last(u32::from_le_bytes(bytes.try_into().expect("checked")));
        Ok(())
    }

    fn reset(&mut self) {}

    fn kick(&mut self) {}
}

struct Bench {
    machine: Machine,
    seen: Arc<PortSeen>,
    events: Receiver<VmEvent>,
}

fn source() -> BootSource {
    BootSource {
        kernel: test_guest::kernel(),
        initrd: None,
        cmdline: String::new(),
        kernel_name: "test guest".into(),
        initrd_name: String::new(),
    }
}

impl Bench {
    fn with(config: &MachineConfig) -> Self {
        let kvm = Kvm::open().expect("KVM");
        let (sender, events) = EventSender::channel();
        let mut seen = None;
        let machine = Machine::create(config, &kvm, sender, None, |platform| {
            let (port, port_seen) = Port::plug_in(&platform.buses);
            seen = Some(port_seen);
            Ok::<_, Infallible>(Box::new(PortDevice(port)) as Box<dyn DeviceSet>)
        })
        .expect("machine");
        Self {
            machine,
            seen: seen.expect("made"),
            events,
        }
    }

    fn new() -> Self {
        Self::with(&MachineConfig::new(MEMORY_BYTES, 1))
    }

    fn booted() -> Self {
        let mut bench = Self::new();
        SETUP.write(bench.machine.ram());
        bench.machine.boot(&source()).expect("boot");
        bench
    }

    fn count(&self) -> u64 {
        test_guest::count(self.machine.ram())
    }

    fn ticks(&self) -> u64 {
        test_guest::ticks(self.machine.ram())
    }

    /// Lets the guest run until `done`; then it is still running.
    fn wait(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            if let Ok(event) = self.events.try_recv() {
                assert_eq!(event, VmEvent::DirtyRingFull, "waiting for {what}");
            }
            self.assert_sound();
            assert!(
                start.elapsed() < PATIENCE,
                "{what}: count {}, ticks {}",
                self.count(),
                self.ticks()
            );
            std::thread::yield_now();
        }
    }

    fn assert_sound(&self) {
        assert_eq!(
            self.seen.failure.load(Ordering::Relaxed),
            0,
            "the guest found a fault at round {}",
            self.count()
        );
    }

    /// Runs the guest for some rounds, ticks and port accesses more, and pauses it.
    fn run_some(&mut self, rounds: u64, ticks: u64) {
        let (count, ticks_before) = (self.count(), self.ticks());
        self.machine.resume().expect("resume");
        self.wait("progress", |bench| {
            bench.count() >= count + rounds && bench.ticks() >= ticks_before + ticks
        });
        self.machine.pause();
        self.assert_sound();
    }

    fn save(&mut self) -> Vec<u8> {
        let mut writer = StateWriter::new();
        self.machine.save(&mut writer).expect("save");
        writer.finish().to_vec()
    }

    fn load(&mut self, state: &[u8]) {
        self.machine
            .load(&StateReader::parse(state).expect("frame"))
            .expect("load");
    }

    fn copy_ram_to(&self, other: &Self) {
        let mut page = [0; PAGE_SIZE];
        for number in 0..self.machine.ram().pages() {
            self.machine.ram().read_page(number, &mut page).expect("page");
            other.machine.ram().write_page(number, &page).expect("page");
        }
    }
}

/// Pages that differ between two machines' RAM.
fn differing(one: &Bench, other: &Bench) -> Vec<u32> {
    let (mut a, mut b) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
    (0..one.machine.ram().pages())
        .filter(|&page| {
            one.machine.ram().read_page(page, &mut a).expect("page");
            other.machine.ram().read_page(page, &mut b).expect("page");
            a != b
        })
        .collect()
}

#[test]
fn the_guest_runs_on_interrupts_and_port_accesses() {
    let mut bench = Bench::booted();
    bench.run_some(100_000, 20);
    assert!(bench.seen.accesses.load(Ordering::Relaxed) > 50);
    let (count, ticks) = (bench.count(), bench.ticks());
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(
        (bench.count(), bench.ticks()),
        (count, ticks),
        "a paused guest stands still"
    );
}

#[test]
fn loaded_state_is_saved_byte_for_byte() {
    let mut active = Bench::booted();
    let mut standby = Bench::new();
    for round in 0..5 {
        active.run_some(10_000, 2);
        let state = active.save();
        standby.load(&state);
        // Time passes, but not for a machine that was loaded and not resumed.
        std::thread::sleep(Duration::from_millis(5));
        let again = standby.save();
        assert_eq!(sections(&state), sections(&again), "round {round}");
        assert_eq!(state, again);
    }
}

/// Kinds and contents, for messages that tell where a difference is.
fn sections(state: &[u8]) -> Vec<(u16, u32, Vec<u8>)> {
    let reader = StateReader::parse(state).expect("frame");
    reader
        .sections()
        .map(|section| (section.kind, section.instance, section.bytes.to_vec()))
        .collect()
}

/// The guest's clock as it was saved.
fn clock_in(state: &[u8]) -> u64 {
    let reader = StateReader::parse(state).expect("frame");
    Chips::parse(&reader).expect("chips").clock.now_ns
}

#[test]
fn a_hundred_takeovers_in_one_process() {
    let mut one = Bench::booted();
    let mut other = Bench::new();
    let mut clock_before = 0;
    let start_ticks = one.ticks();
    for round in 0..100 {
        one.run_some(3_000, u64::from(round % 10 == 0));
        let state = one.save();
        // Not what the clock says now: it runs on while the guest is paused, and what goes on elsewhere is what was saved.
        let clock = clock_in(&state);
        assert!(
            clock >= clock_before,
            "round {round}: the guest's clock stepped back from {clock_before} to {clock}"
        );
        clock_before = clock;
        one.copy_ram_to(&other);
        other.load(&state);
        assert_eq!(
            other.machine.clock().now_ns(),
            clock,
            "round {round}: it begins where it was saved"
        );
        std::mem::swap(&mut one, &mut other);
    }
    assert!(one.count() >= 300_000);
    assert!(one.ticks() >= start_ticks + 10);
}

/// The child's part of [`takeovers_between_two_processes`].
const CHILD_VARIABLE: &str = "FTVM_TEST_TAKEOVER_FOLDER";

#[test]
fn takeovers_between_two_processes() {
    use std::path::Path;
    fn store(bench: &mut Bench, folder: &Path) {
        std::fs::write(folder.join("state"), bench.save()).expect("state");
        let mut ram = Vec::new();
        let mut page = [0; PAGE_SIZE];
        for number in 0..bench.machine.ram().pages() {
            bench.machine.ram().read_page(number, &mut page).expect("page");
            ram.extend_from_slice(&page);
        }
        std::fs::write(folder.join("ram"), ram).expect("ram");
    }
    fn fetch(bench: &mut Bench, folder: &Path) {
        let ram = std::fs::read(folder.join("ram")).expect("ram");
        for (number, page) in ram.chunks_exact(PAGE_SIZE).enumerate() {
            bench
                .machine
                .ram()
                .write_page(number as u32, page.try_into().expect("a page"))
                .expect("page");
        }
        bench.load(&std::fs::read(folder.join("state")).expect("state"));
    }
    if let Some(folder) = std::env::var_os(CHILD_VARIABLE) {
        let mut bench = Bench::new();
        fetch(&mut bench, Path::new(&folder));
        bench.run_some(10_000, 2);
        return store(&mut bench, Path::new(&folder));
    }
    let folder = std::env::temp_dir().join(format!("ftvm-takeover-{}", std::process::id()));
    std::fs::create_dir(&folder).expect("folder");
    let mut bench = Bench::booted();
    for _ in 0..5 {
        bench.run_some(10_000, 2);
        let count = bench.count();
        store(&mut bench, &folder);
        let status = std::process::Command::new(std::env::current_exe().expect("path"))
            .args(["--exact", "machine::tests::takeovers_between_two_processes"])
            .env(CHILD_VARIABLE, &folder)
            .stdout(std::process::Stdio::null())
            .status()
            .expect("child");
        assert!(status.success());
        bench = Bench::new();
        fetch(&mut bench, &folder);
        assert!(bench.count() >= count + 10_000, "the other process ran the guest on");
    }
    std::fs::remove_dir_all(&folder).expect("clean up");
}

/// Replicates by harvested pages only, and compares everything. `drop_one` leaves one harvested page out.
fn replicate(config: &MachineConfig, drop_one: bool) -> Vec<u32> {
    let mut active = Bench::with(config);
    SETUP.write(active.machine.ram());
    active.machine.boot(&source()).expect("boot");
    let standby = Bench::new();
    active.machine.set_tracking(true).expect("tracking");
    active.copy_ram_to(&standby);
    let mut dirty = DirtyPages::new(active.machine.ram().pages());
    let mut page = [0; PAGE_SIZE];
    let mut copied = 0;
    let mut copy = |active: &Bench, dirty: &mut DirtyPages, skip: Option<u32>| {
        for number in dirty.iter().filter(|number| Some(*number) != skip) {
            active.machine.ram().read_page(number, &mut page).expect("page");
            standby.machine.ram().write_page(number, &page).expect("page");
            copied += 1;
        }
        dirty.clear();
    };
    // The page with the guest's counters: it differs for certain.
    let skip = drop_one.then_some(test_guest::COUNTERS_PAGE);
    for _ in 0..6 {
        let (count, ticks) = (active.count(), active.ticks());
        active.machine.resume().expect("resume");
        // Harvest and copy while the guest runs, too.
        while active.count() < count + 20_000 || active.ticks() < ticks + 1 {
            active.machine.harvest(&mut dirty).expect("harvest");
            copy(&active, &mut dirty, skip);
            active.wait("anything", |_| true);
        }
        active.machine.pause();
        active.machine.harvest(&mut dirty).expect("harvest");
        copy(&active, &mut dirty, skip);
        if drop_one {
            break;
        }
        assert_eq!(differing(&active, &standby), Vec::<u32>::new());
    }
    assert!(copied > 0);
    differing(&active, &standby)
}

#[test]
fn harvested_pages_are_all_that_changed() {
    assert_eq!(
        replicate(&MachineConfig::new(MEMORY_BYTES, 1), false),
        Vec::<u32>::new()
    );
}

#[test]
fn harvested_pages_are_all_that_changed_with_the_dirty_log() {
    let config = MachineConfig {
        dirty_ring_entries: 0,
        ..MachineConfig::new(MEMORY_BYTES, 1)
    };
    assert_eq!(replicate(&config, false), Vec::<u32>::new());
}

/// Negative control of the two tests above.
#[test]
fn a_harvested_page_that_is_not_copied_is_noticed() {
    assert_eq!(replicate(&MachineConfig::new(MEMORY_BYTES, 1), true).len(), 1);
}

#[test]
fn a_full_ring_loses_nothing() {
    let config = MachineConfig {
        dirty_ring_entries: 1024,
        ..MachineConfig::new(MEMORY_BYTES, 1)
    };
    let mut active = Bench::with(&config);
    Setup { pages: 2048, ..SETUP }.write(active.machine.ram());
    active.machine.boot(&source()).expect("boot");
    let standby = Bench::new();
    active.machine.set_tracking(true).expect("tracking");
    active.copy_ram_to(&standby);
    active.machine.resume().expect("resume");
    active.wait("more pages than the ring has entries", |bench| bench.count() > 15_000);
    active.machine.pause();
    let mut dirty = DirtyPages::new(active.machine.ram().pages());
    active.machine.harvest(&mut dirty).expect("harvest");
    assert!(dirty.len() > 1024, "{} pages", dirty.len());
    assert!(differing(&active, &standby).iter().all(|page| dirty.contains(*page)));
}

/// The guest of the test above, but it may write so much only: it stands still, and runs on when it is paused and resumed.
#[test]
fn a_guest_that_has_written_all_it_may_stands_still() {
    const RING: usize = 1024;
    const PAGES_MAX: usize = 1200;
    let config = MachineConfig {
        dirty_ring_entries: RING as u32,
        ..MachineConfig::new(MEMORY_BYTES, 1)
    };
    let mut active = Bench::with(&config);
    Setup { pages: 2048, ..SETUP }.write(active.machine.ram());
    active.machine.boot(&source()).expect("boot");
    active.machine.set_tracking(true).expect("tracking");
    assert!(active.machine.limits_writes());
    active.machine.limit_writes(PAGES_MAX);
    let mut counts = vec![0];
    for _ in 0..3 {
        active.machine.resume().expect("resume");
        let event = loop {
            let event = active.events.recv_timeout(PATIENCE).expect("it meets its limit");
            if event != VmEvent::DirtyRingFull {
                break event;
            }
        };
        assert!(matches!(event, VmEvent::WritesLimited { .. }), "{event:?}");
        let count = active.count();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(active.count(), count, "it stands still");
        assert!(
            counts.last().is_some_and(|before| *before < count),
            "it ran: {counts:?}, {count}"
        );
        counts.push(count);
        active.machine.pause();
        let mut dirty = DirtyPages::new(active.machine.ram().pages());
        active.machine.harvest(&mut dirty).expect("harvest");
        assert!(
            (PAGES_MAX..PAGES_MAX + RING + 64).contains(&dirty.len()),
            "{} pages written",
            dirty.len()
        );
    }
    active.machine.limit_writes(usize::MAX);
    active.machine.resume().expect("resume");
    let before = active.count();
    active.wait("a guest without a limit", |bench| bench.count() > before + 20_000);
    active.machine.pause();
}

/// A vCPU stops by itself, because it has written all it may, at any moment of a pause: what is saved is where it stopped.
#[test]
fn a_guest_that_stops_while_it_is_paused_is_saved_as_it_is() {
    let config = MachineConfig {
        dirty_ring_entries: 1024,
        ..MachineConfig::new(MEMORY_BYTES, 1)
    };
    let mut active = Bench::with(&config);
    Setup { pages: 2048, ..SETUP }.write(active.machine.ram());
    active.machine.boot(&source()).expect("boot");
    active.machine.set_tracking(true).expect("tracking");
    active.machine.limit_writes(0);
    let mut limited = 0;
    for round in 0..2000u64 {
        active.machine.resume().expect("resume");
        // About as long as it takes to fill a ring, a little more and a little less.
        let until = Instant::now() + Duration::from_micros(200 + round % 100 * 10);
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        active
            .machine
            .pause_and_save(&mut crate::pause::clock::PauseClock::start());
        // MP state and general registers come first: a vCPU that stands still does not change them.
        let registers = |bench: &Bench| bench.machine.vcpus[0].core().saved()[..4 + 18 * 8].to_vec();
        let saved = registers(&active);
        active.machine.vcpus[0].core().save().expect("saved again");
        assert_eq!(saved, registers(&active), "round {round}");
        limited += active
            .events
            .try_iter()
            .filter(|event| matches!(event, VmEvent::WritesLimited { .. }))
            .count();
    }
    assert!(limited > 0, "it met its limit");
}

/// The guest's clock and its timer stand still while it is paused, and go on from there, time and again; without that the clock runs
/// through the pause.
#[test]
fn time_that_is_held_stands_still_and_goes_on() {
    const STILL: Duration = Duration::from_secs(1);
    let mut bench = Bench::booted();
    for held in [true, true, false, true] {
        bench.run_some(3_000, 2);
        if held {
            bench.machine.hold_time().expect("holds");
            bench.machine.hold_time().expect("once is enough");
        }
        let clock = bench.machine.clock();
        let (before, saved) = (clock.now_ns(), bench.save());
        std::thread::sleep(STILL);
        if held {
            assert_eq!(clock.now_ns(), before);
            assert_eq!(
                bench.save(),
                saved,
                "time is the only thing that moves in a paused machine"
            );
        }
        let resumed = Instant::now();
        bench.machine.resume().expect("resumes");
        let passed = Duration::from_nanos(clock.now_ns() - before);
        // However long this thread had to wait for a processor meanwhile.
        let since = resumed.elapsed();
        bench.machine.pause();
        // What it stood still is not in it, or all of it is.
        if held {
            assert!(passed < since + STILL / 2, "{passed:?} in {since:?}");
        } else {
            assert!(passed >= STILL, "{passed:?}");
        }
    }
    bench.run_some(3_000, 2);
}

#[test]
fn a_reset_boots_anew_in_place() {
    let mut bench = Bench::booted();
    bench.run_some(50_000, 5);
    let clock = bench.machine.clock().now_ns();
    let before = bench.count();
    bench.machine.reset(&source()).expect("reset");
    bench.machine.resume().expect("resume");
    bench.wait("begin again", |bench| bench.count() < before);
    bench.machine.pause();
    bench.run_some(10_000, 3);
    assert!(bench.machine.clock().now_ns() > clock);
}

#[test]
fn a_triple_fault_is_reported_and_a_reset_mends_it() {
    let mut bench = Bench::new();
    // UD2 without an interrupt table.
    let broken = test_guest::file_with(&test_guest::elf(&[0x0F, 0x0B], 0x10_0000, Some(0x10_0000)));
    bench
        .machine
        .boot(&BootSource {
            kernel: broken,
            ..source()
        })
        .expect("boot");
    bench.machine.resume().expect("resume");
    assert_eq!(bench.events.recv_timeout(PATIENCE), Ok(VmEvent::TripleFault));
    SETUP.write(bench.machine.ram());
    bench.machine.reset(&source()).expect("reset");
    bench.run_some(10_000, 2);
}

#[test]
fn several_vcpus_are_saved_and_wait_for_their_start() {
    let config = MachineConfig::new(MEMORY_BYTES, 4);
    let mut one = Bench::with(&config);
    let mut other = Bench::with(&config);
    SETUP.write(one.machine.ram());
    one.machine.boot(&source()).expect("boot");
    for _ in 0..5 {
        one.run_some(5_000, 1);
        let state = one.save();
        one.copy_ram_to(&other);
        other.load(&state);
        assert_eq!(sections(&other.save()), sections(&state));
        std::mem::swap(&mut one, &mut other);
    }
}

#[test]
fn a_refused_state_changes_nothing() {
    let mut active = Bench::booted();
    active.run_some(10_000, 1);
    let good = active.save();
    let mut standby = Bench::new();
    standby.load(&good);
    let before = standby.save();
    let rewrite = |change: &dyn Fn(u16, &mut u16, &mut Vec<u8>) -> bool| {
        let mut writer = StateWriter::new();
        for section in StateReader::parse(&good).expect("frame").sections() {
            let (mut version, mut bytes) = (section.version, section.bytes.to_vec());
            if change(section.kind, &mut version, &mut bytes) {
                writer.put(section.kind, version, section.instance, &bytes);
            }
        }
        writer.finish().to_vec()
    };
    let kinds = [
        kind::MACHINE,
        kind::VCPU,
        kind::IRQCHIP,
        kind::PIT,
        kind::CLOCK,
        kind::DEVICES,
    ];
    let mut refused = Vec::new();
    for wanted in kinds {
        refused.push(rewrite(&|kind, _, _| kind != wanted));
        refused.push(rewrite(&|kind, version, _| {
            *version += u16::from(kind == wanted);
            true
        }));
        refused.push(rewrite(&|kind, _, bytes| {
            if kind == wanted {
                bytes.pop();
            }
            true
        }));
    }
    let mut more = StateWriter::new();
    StateReader::parse(&good)
        .expect("frame")
        .sections()
        .for_each(|s| more.put(s.kind, s.version, s.instance, s.bytes));
    more.put(kind::VCPU, 1, 1, &[]);
    refused.push(more.finish().to_vec());
    for state in refused {
        let reader = StateReader::parse(&state).expect("the frame is sound");
        assert!(matches!(standby.machine.load(&reader), Err(MachineError::State(_))));
    }
    assert_eq!(standby.save(), before);
}

#[test]
fn a_state_of_another_machine_is_refused_with_the_reason() {
    let mut active = Bench::booted();
    let state = active.save();
    let mut larger = Bench::with(&MachineConfig::new(2 * MEMORY_BYTES, 1));
    let error = larger
        .machine
        .load(&StateReader::parse(&state).expect("frame"))
        .expect_err("other size")
        .to_string();
    assert!(
        error.contains("33554432") && error.contains("configure both seats alike"),
        "{error}"
    );
}

#[test]
fn impossible_machines_are_refused() {
    let kvm = Kvm::open().expect("KVM");
    let refuse = |config: &MachineConfig| {
        let none = |_: &Platform| Ok::<_, Infallible>(Box::new(NoDevices) as Box<dyn DeviceSet>);
        Machine::create(config, &kvm, EventSender::channel().0, None, none)
            .err()
            .expect("refused")
            .to_string()
    };
    assert!(refuse(&MachineConfig::new(MEMORY_BYTES, 0)).contains("choose 1 to 16"));
    assert!(refuse(&MachineConfig::new(MEMORY_BYTES, 17)).contains("choose 1 to 16"));
    assert!(refuse(&MachineConfig::new(1 << 42, 1)).contains("give the guest less"));
    assert!(refuse(&MachineConfig::new(12345, 1)).contains("multiple of 4096"));
    let mut cpu = cpu_of_host(&kvm).expect("baseline");
    let leaf = cpu.leaves.iter_mut().find(|leaf| leaf.leaf == 7).expect("leaf 7");
    leaf.registers[1] |= 1 << 16 | 1 << 17;
    if cpu_of_host(&kvm).expect("baseline").check(&cpu, true).is_err() {
        let config = MachineConfig {
            cpu: Some(cpu),
            ..MachineConfig::new(MEMORY_BYTES, 1)
        };
        assert!(refuse(&config).contains("this host lacks avx512"));
    }
}

/// CPUID leaf 0xD tells the size of the registers that XCR0 turns on; it has to follow what the guest sets.
#[test]
fn the_size_of_extended_registers_follows_the_guest() {
    let mut bench = Bench::new();
    let code = [
        &[0x0F, 0x20, 0xE0, 0x0D, 0x00, 0x00, 0x04, 0x00, 0x0F, 0x22, 0xE0][..], // CR4.OSXSAVE
        &[0x31, 0xC9, 0x31, 0xD2, 0xB8, 0x07, 0x00, 0x00, 0x00, 0x0F, 0x01, 0xD1], // XCR0: x87, SSE, AVX
        &[0xB8, 0x0D, 0x00, 0x00, 0x00, 0x31, 0xC9, 0x0F, 0xA2],                 // CPUID 0xD.0
        &[0x89, 0xD8, 0x66, 0xBA, 0x04, 0x05, 0xEF, 0xF4, 0xEB, 0xFD],           // EBX to the port, halt
    ]
    .concat();
    let kernel = test_guest::file_with(&test_guest::elf(&code, 0x10_0000, Some(0x10_0000)));
    bench.machine.boot(&BootSource { kernel, ..source() }).expect("boot");
    bench.machine.resume().expect("resume");
    let start = Instant::now();
    while bench.seen.failure.load(Ordering::Relaxed) == 0 {
        assert!(start.elapsed() < PATIENCE, "{:?}", bench.events.try_recv());
        std::thread::yield_now();
    }
    // 512 bytes of x87 and SSE, 64 of the header, 256 of AVX.
    assert_eq!(bench.seen.failure.load(Ordering::Relaxed), 832);
    bench.machine.pause();
}

/// A state as a host would save it whose TSC runs at `there` instead of `here`, both in kHz.
fn with_tsc(state: &[u8], here: u32, there: u32) -> Vec<u8> {
    let mut writer = StateWriter::new();
    let mut changed = 0;
    for section in StateReader::parse(state).expect("frame").sections() {
        let mut bytes = section.bytes.to_vec();
        if section.kind == kind::VCPU {
            let found = bytes.windows(4).position(|bytes| bytes == here.to_le_bytes());
            let at = found.expect("the frequency is in the section");
            bytes[at..at + 4].copy_from_slice(&there.to_le_bytes());
            changed += 1;
        }
        writer.put(section.kind, section.version, section.instance, &bytes);
    }
    assert_eq!(changed, 1);
    writer.finish().to_vec()
}

#[test]
fn hosts_that_measured_their_tsc_a_little_differently_are_alike() {
    let mut active = Bench::booted();
    active.run_some(10_000, 1);
    let state = active.save();
    let khz = active.machine.offer.machine.tsc_khz;
    let mut standby = Bench::new();
    active.copy_ram_to(&standby);
    let alike = with_tsc(&state, khz, khz + khz / 10_000);
    standby.load(&alike);
    assert_eq!(sections(&standby.save()), sections(&alike));
    standby.machine.resume().expect("resume");
    standby.machine.pause();

    if !standby.machine.vm.capabilities().tsc_scaling {
        let other = with_tsc(&state, khz, khz + khz / 1000);
        let refused = standby.machine.load(&StateReader::parse(&other).expect("frame"));
        let error = refused.expect_err("another frequency").to_string();
        assert!(error.contains("use like hosts"), "{error}");
    }
    let none = with_tsc(&state, khz, 0);
    let refused = standby.machine.load(&StateReader::parse(&none).expect("frame"));
    assert!(matches!(refused, Err(MachineError::State(_))), "{refused:?}");
}
