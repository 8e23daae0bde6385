//! Runs one machine without protection, with its console on standard output: to try kernels and devices, and as the
//! smoke test that an unmodified Linux boots. Ends with exit code 0 when the guest switches itself off.
//!
//! `--pause-every-ms` stops and saves the machine periodically, as a checkpoint does, and prints what that cost.
//! `--move-every-ms` moves it into a new machine each time: save, forget, make, load, run on.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Parser;
use ftvm_engine::backends::console::Stdout;
use ftvm_engine::backends::file_disk::FileDisk;
use ftvm_engine::backends::tap::Tap;
use ftvm_engine::backends::{DiskBackend, NetBackend};
use ftvm_engine::boot::BootSource;
use ftvm_engine::devices::DeviceError;
use ftvm_engine::devices::set::{Backends, DeviceSet, DeviceSetConfig};
use ftvm_engine::devices::virtio::blk::DiskConfig;
use ftvm_engine::devices::virtio::net::NetConfig;
use ftvm_engine::kvm::{CpuBaseline, Kvm};
use ftvm_engine::machine::{EventSender, Machine, MachineConfig, VmEvent};
use ftvm_engine::memory::{DirtyPages, GuestRam, PAGE_SIZE};
use ftvm_engine::state::{StateReader, StateWriter};

#[derive(Parser)]
struct Options {
    /// A bzImage or a PVH ELF kernel.
    #[arg(long)]
    kernel: PathBuf,
    /// The initial RAM disk.
    #[arg(long)]
    initrd: Option<PathBuf>,
    /// The kernel command line.
    #[arg(long, default_value = "console=ttyS0")]
    cmdline: String,
    /// Guest memory in MiB.
    #[arg(long, default_value_t = 256)]
    memory: u64,
    /// Number of vCPUs.
    #[arg(long, default_value_t = 1)]
    vcpus: u8,
    /// A tap that exists.
    #[arg(long)]
    tap: Option<String>,
    /// A raw disk.
    #[arg(long)]
    disk: Vec<PathBuf>,
    /// Pause and save at this interval.
    #[arg(long)]
    pause_every_ms: Option<u64>,
    /// Move into a new machine at this interval.
    #[arg(long)]
    move_every_ms: Option<u64>,
    /// Obey lines on standard input: `move`, or `button` for the power button.
    #[arg(long)]
    obey: bool,
    /// Stop after so many seconds, with exit code 3.
    #[arg(long)]
    seconds: Option<u64>,
}

struct Running {
    // The machine ends before what its devices are counted with.
    machine: Machine,
    devices: Arc<DeviceSet>,
    events: Receiver<VmEvent>,
}

struct Solo {
    options: Options,
    kvm: Kvm,
    running: Option<Running>,
    commands: Receiver<String>,
    pauses_us: Vec<u64>,
}

fn source(options: &Options) -> anyhow::Result<BootSource> {
    let open = |path: &PathBuf| File::open(path).with_context(|| format!("opening {}", path.display()));
    Ok(BootSource {
        kernel: open(&options.kernel)?,
        initrd: options.initrd.as_ref().map(open).transpose()?,
        cmdline: options.cmdline.clone(),
        kernel_name: options.kernel.display().to_string(),
        initrd_name: options
            .initrd
            .as_ref()
            .map(|path| path.display().to_string())
            .unwrap_or_default(),
    })
}

fn backends(options: &Options) -> anyhow::Result<Backends> {
    let mut nics: Vec<Box<dyn NetBackend>> = Vec::new();
    if let Some(name) = &options.tap {
        nics.push(Box::new(Tap::attach(name)?));
    }
    let mut disks: Vec<Box<dyn DiskBackend>> = Vec::new();
    for path in &options.disk {
        disks.push(Box::new(FileDisk::open(path, false)?));
    }
    Ok(Backends {
        nics,
        disks,
        console: Box::new(Stdout),
    })
}

fn device_config(options: &Options) -> DeviceSetConfig {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    DeviceSetConfig {
        nics: options
            .tap
            .iter()
            .map(|_| NetConfig {
                mac: [2, 0, 0, 0, 0, 1],
                mtu: 1500,
            })
            .collect(),
        disks: (0..options.disk.len())
            .map(|index| DiskConfig {
                serial: format!("disk{index}"),
                read_only: false,
            })
            .collect(),
        rng_seed: std::array::from_fn(|at| (now.as_nanos() >> (at % 16)) as u8),
        rtc_unix_ns: now.as_nanos() as u64,
    }
}

fn make(options: &Options, kvm: &Kvm, cpu: Option<CpuBaseline>) -> anyhow::Result<Running> {
    let (sender, events) = EventSender::channel();
    let backends = backends(options)?;
    let config = MachineConfig {
        cpu,
        ..MachineConfig::new(options.memory << 20, options.vcpus)
    };
    let mut made = None;
    let machine = Machine::create(&config, kvm, sender, None, |platform| {
        let platform = platform.for_devices(Arc::new(|_| ()));
        let set = Arc::new(DeviceSet::new(&device_config(options), &platform, backends)?);
        made = Some(set.clone());
        Ok::<_, DeviceError>(Box::new(set) as Box<dyn ftvm_engine::machine::DeviceSet>)
    })?;
    Ok(Running {
        machine,
        devices: made.context("no devices were made")?,
        events,
    })
}

impl Solo {
    fn new(options: Options) -> anyhow::Result<Self> {
        let kvm = Kvm::open()?;
        let mut running = make(&options, &kvm, None)?;
        running.machine.boot(&source(&options)?)?;
        running.machine.set_tracking(options.pause_every_ms.is_some())?;
        running.machine.resume()?;
        let (sender, commands) = mpsc::channel();
        if options.obey {
            std::thread::spawn(move || {
                std::io::stdin()
                    .lines()
                    .map_while(Result::ok)
                    .try_for_each(|line| sender.send(line))
            });
        }
        Ok(Self {
            options,
            kvm,
            running: Some(running),
            commands,
            pauses_us: Vec::new(),
        })
    }

    fn running(&mut self) -> anyhow::Result<&mut Running> {
        self.running.as_mut().context("the machine was lost in a move")
    }

    /// Runs until the guest is off (true) or the time is over.
    fn run(&mut self) -> anyhow::Result<bool> {
        let start = Instant::now();
        let interval = self.options.pause_every_ms.or(self.options.move_every_ms);
        let tick = Duration::from_millis(interval.unwrap_or(100));
        loop {
            match self.running()?.events.recv_timeout(tick) {
                Ok(VmEvent::PowerOff) => return Ok(true),
                Ok(VmEvent::Reset | VmEvent::TripleFault) => {
                    eprintln!("the guest resets");
                    let source = source(&self.options)?;
                    let machine = &mut self.running()?.machine;
                    machine.reset(&source)?;
                    machine.resume()?;
                }
                Ok(VmEvent::Fatal(why)) => bail!(why),
                Ok(VmEvent::DirtyRingFull | VmEvent::WritesLimited { .. }) => {}
                Ok(VmEvent::Device(event)) => eprintln!("{event}"),
                Err(RecvTimeoutError::Timeout) if self.options.pause_every_ms.is_some() => self.checkpoint()?,
                Err(RecvTimeoutError::Timeout) if self.options.move_every_ms.is_some() => self.relocate()?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => bail!("the machine has ended"),
            }
            self.obey()?;
            if self
                .options
                .seconds
                .is_some_and(|limit| start.elapsed().as_secs() >= limit)
            {
                return Ok(false);
            }
        }
    }

    fn obey(&mut self) -> anyhow::Result<()> {
        while let Ok(command) = self.commands.try_recv() {
            match command.as_str() {
                "move" => self.relocate()?,
                "button" => self.running()?.devices.press_power_button(),
                other => eprintln!("unknown command {other:?}"),
            }
        }
        Ok(())
    }

    fn checkpoint(&mut self) -> anyhow::Result<()> {
        let start = Instant::now();
        let machine = &mut self.running()?.machine;
        machine.pause_and_save(&mut ftvm_engine::pause::clock::PauseClock::start());
        let mut writer = StateWriter::new();
        machine.save_paused(&mut writer)?;
        let mut dirty = DirtyPages::new(machine.ram().pages());
        machine.harvest(&mut dirty)?;
        machine.resume()?;
        self.pauses_us.push(start.elapsed().as_micros() as u64);
        Ok(())
    }

    /// Into another machine of this process.
    fn relocate(&mut self) -> anyhow::Result<()> {
        let start = Instant::now();
        let mut old = self.running.take().context("the machine was lost in a move")?;
        old.machine.pause();
        let mut writer = StateWriter::new();
        old.machine.save(&mut writer)?;
        let state = writer.finish().to_vec();
        let (ram, cpu) = (old.machine.ram().clone(), old.machine.cpu().clone());
        // The old machine goes first: it holds the locks of tap and disks.
        drop(old);
        let mut new = make(&self.options, &self.kvm, Some(cpu))?;
        copy_ram(&ram, new.machine.ram())?;
        new.machine.load(&StateReader::parse(&state)?)?;
        let mut writer = StateWriter::new();
        new.machine.save(&mut writer)?;
        let again = writer.finish().to_vec();
        if again != state {
            eprintln!("load then save differs:{}", differences(&state, &again)?);
        }
        new.machine.after_takeover();
        new.machine.resume()?;
        self.running = Some(new);
        eprintln!(
            "moved in {} ms, state of {} bytes",
            start.elapsed().as_millis(),
            state.len()
        );
        Ok(())
    }
}

/// Through the files behind the two memories: the kernel copies.
fn copy_ram(from: &GuestRam, into: &GuestRam) -> anyhow::Result<()> {
    let mut chunk = vec![0; 1 << 20];
    let size = u64::from(from.pages()) * PAGE_SIZE as u64;
    for at in (0..size).step_by(chunk.len()) {
        let part = &mut chunk[..((size - at) as usize).min(1 << 20)];
        from.memfd().read_exact_at(part, at)?;
        into.memfd().write_all_at(part, at)?;
    }
    Ok(())
}

/// What differs between two states that should be equal.
fn differences(left: &[u8], right: &[u8]) -> anyhow::Result<String> {
    let (left, right) = (StateReader::parse(left)?, StateReader::parse(right)?);
    let mut found = String::new();
    for (one, other) in left.sections().zip(right.sections()) {
        let bytes: Vec<_> = one
            .bytes
            .iter()
            .zip(other.bytes)
            .enumerate()
            .filter(|(_, (a, b))| a != b)
            .collect();
        if one != other {
            found += &format!(
                " section {:#x}/{}: {:02x?}",
                one.kind,
                one.instance,
                &bytes[..bytes.len().min(24)]
            );
        }
    }
    Ok(found)
}

fn main() -> anyhow::Result<()> {
    let mut solo = Solo::new(Options::parse())?;
    let off = solo.run()?;
    let running = solo.running()?;
    running.machine.pause();
    eprintln!("{:?}", running.devices.counts());
    let pauses = &mut solo.pauses_us;
    pauses.sort_unstable();
    if !pauses.is_empty() {
        let at = |share: usize| pauses[(pauses.len() - 1) * share / 100];
        eprintln!(
            "{} pauses: p50 {} us, p99 {} us, max {} us",
            pauses.len(),
            at(50),
            at(99),
            at(100)
        );
    }
    std::process::exit(if off { 0 } else { 3 });
}
