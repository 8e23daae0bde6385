use super::*;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ftvm_engine::control::{Answer, Ask};
use ftvm_protocol::identity::{Incarnation, Nonce, SeatId};
use ftvm_protocol::record::{Members, Phase, Snapshot};

use crate::random;
use crate::testing::Folder;

fn genesis() -> Record {
    Record::genesis(SeatId(1), Phase::Running)
}

fn next(of: &Snapshot, holder: u128) -> Record {
    let holder = Incarnation {
        seat: SeatId(holder),
        start: 1,
    };
    let nonce = Nonce(random::u128());
    Record {
        holder,
        members: Members::one(holder),
        term: of.record.term + 1,
        nonce,
        ..of.record.clone()
    }
}

fn far() -> Instant {
    Instant::now() + Duration::from_secs(3600)
}

fn set_up(folder: &Folder) -> (FileArbiter, Snapshot) {
    let arbiter = FileArbiter::new(folder.path());
    arbiter.set_up(&genesis()).unwrap();
    let snapshot = arbiter.newest().unwrap().unwrap();
    (arbiter, snapshot)
}

#[test]
fn a_swap_wins_once() {
    let folder = Folder::new("swap");
    let (arbiter, first) = set_up(&folder);
    let (a, b) = (next(&first, 1), next(&first, 2));
    let (SwapOutcome::Won(won), None) = arbiter.swap(first.uid, first.version, &a, far()) else {
        panic!("a wins")
    };
    assert_eq!(
        won,
        Snapshot {
            record: a.clone(),
            uid: first.uid,
            version: 2
        }
    );
    let (lost, why) = arbiter.swap(first.uid, first.version, &b, far());
    assert_eq!(lost, SwapOutcome::Conflict, "{why:?}");
    assert_eq!(arbiter.read(), (ReadOutcome::Found(won.clone()), None));
    assert!(matches!(
        arbiter.swap(won.uid, won.version, &next(&won, 2), far()).0,
        SwapOutcome::Won(_)
    ));
}

#[test]
fn identity_version_and_term_must_fit() {
    let folder = Folder::new("fit");
    let (arbiter, first) = set_up(&folder);
    let record = next(&first, 1);
    assert_eq!(arbiter.swap(ArbiterUid(7), 1, &record, far()).0, SwapOutcome::Conflict);
    assert_eq!(arbiter.swap(first.uid, 9, &record, far()).0, SwapOutcome::Conflict);
    let stale = Record {
        term: first.record.term,
        ..record.clone()
    };
    assert_eq!(arbiter.swap(first.uid, 1, &stale, far()).0, SwapOutcome::NotSent);
    assert_eq!(
        arbiter.swap(first.uid, 1, &record, Instant::now()).0,
        SwapOutcome::NotSent,
        "past its deadline"
    );
    assert_eq!(arbiter.newest().unwrap().unwrap(), first);
}

#[test]
fn the_newest_of_many_is_found_from_any_hint() {
    let folder = Folder::new("many");
    let (arbiter, mut last) = set_up(&folder);
    for n in 2..=40 {
        let (SwapOutcome::Won(won), _) = arbiter.swap(last.uid, last.version, &next(&last, n), far()) else {
            panic!()
        };
        assert_eq!(
            FileArbiter::new(folder.path()).newest().unwrap().unwrap(),
            won,
            "version {n}"
        );
        last = won;
    }
}

#[test]
fn a_folder_that_is_gone_readonly_empty_or_damaged_is_unreachable_and_says_so() {
    let folder = Folder::new("gone");
    let (arbiter, first) = set_up(&folder);
    let record = next(&first, 1);
    let check = |words: &str| {
        let (outcome, why) = arbiter.read();
        assert_eq!(outcome, ReadOutcome::Unreachable);
        let why = why.unwrap();
        assert!(
            why.contains(words) && why.contains(&folder.path().display().to_string()),
            "{why}"
        );
        let (outcome, why) = arbiter.swap(first.uid, first.version, &record, far());
        assert_eq!(outcome, SwapOutcome::NotSent, "{why:?}");
    };
    let hidden = folder.path().with_extension("hidden");
    std::fs::rename(folder.path(), &hidden).unwrap();
    check("No such file");
    std::fs::create_dir(folder.path()).unwrap();
    check("not set up");
    std::fs::remove_dir(folder.path()).unwrap();
    std::fs::rename(&hidden, folder.path()).unwrap();
    assert_eq!(arbiter.newest().unwrap().unwrap(), first);
    let file = folder.path().join("record.00000000000000000001");
    let good = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, good.replace("Running", "Stopped")).unwrap();
    check("damaged");
    std::fs::write(&file, &good[..good.len() / 2]).unwrap();
    check("damaged");
}

/// Fails at the n-th operation, before or after doing it.
struct Failing {
    at: usize,
    after: bool,
    count: AtomicUsize,
    end: fn(),
}

impl Failing {
    fn step<T>(&self, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let hit = self.count.fetch_add(1, Ordering::SeqCst) == self.at;
        if hit && !self.after {
            (self.end)();
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let result = work();
        if hit {
            (self.end)();
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        result
    }
}

impl Files for Failing {
    fn create(&self, path: &Path, contents: &[u8]) -> io::Result<()> {
        self.step(|| PosixFiles.create(path, contents))
    }
    fn overwrite(&self, path: &Path, contents: &[u8]) -> io::Result<()> {
        self.step(|| PosixFiles.overwrite(path, contents))
    }
    fn touch(&self, path: &Path) -> io::Result<()> {
        self.step(|| PosixFiles.touch(path))
    }
    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step(|| PosixFiles.link(from, to))
    }
    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        self.step(|| PosixFiles.sync_folder(folder))
    }
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.step(|| PosixFiles.read(path))
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.step(|| PosixFiles.remove(path))
    }
}

/// Operations of one swap: identity, record, create or overwrite, link, fsync, remove.
const SWAP_STEPS: usize = 6;

#[test]
fn an_error_at_any_step_is_never_told_wrong() {
    for at in 0..SWAP_STEPS + 1 {
        for (after, spare) in [(false, false), (true, false), (false, true), (true, true)] {
            let folder = Folder::new("steps");
            let (arbiter, first) = set_up(&folder);
            let failing = Failing {
                at: at + usize::from(spare),
                after,
                count: AtomicUsize::new(0),
                end: || {},
            };
            let failing = FileArbiter::with_files(folder.path(), failing);
            if spare {
                // One operation.
                failing.prepare();
            }
            let record = next(&first, 1);
            let (outcome, why) = failing.swap(first.uid, first.version, &record, far());
            let stands = arbiter.newest().unwrap().unwrap();
            let landed = stands.record == record;
            match outcome {
                SwapOutcome::Won(_) => assert!(landed, "step {at}, after {after}, spare {spare}"),
                SwapOutcome::Conflict | SwapOutcome::NotSent => assert!(!landed, "step {at}, after {after}: {why:?}"),
                SwapOutcome::Unknown => assert!(why.is_some()),
            }
            if (at, after) == (3, true) {
                assert!(
                    matches!(outcome, SwapOutcome::Won(_)),
                    "link reported an error after success: {why:?}"
                );
            }
        }
    }
}

fn temporaries(folder: &Folder) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder.path()).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("temporary."))
        .collect()
}

/// A spare file becomes a record once, whatever came of it; a record is never written again.
#[test]
fn a_spare_file_is_used_once_and_not_left_behind() {
    let folder = Folder::new("spare");
    let (arbiter, first) = set_up(&folder);
    arbiter.prepare();
    arbiter.prepare();
    let [spare] = &temporaries(&folder)[..] else {
        panic!("one spare file")
    };
    assert_eq!(std::fs::read(spare).unwrap(), [b' '; 4096]);
    // Somebody else wins: what was written for nothing is not used again.
    let other = FileArbiter::new(folder.path());
    let (SwapOutcome::Won(won), _) = other.swap(first.uid, first.version, &next(&first, 2), far()) else {
        panic!("the first to come wins")
    };
    assert_eq!(
        arbiter.swap(first.uid, first.version, &next(&first, 1), far()).0,
        SwapOutcome::Conflict
    );
    assert!(temporaries(&folder).is_empty());
    arbiter.prepare();
    let record = next(&won, 1);
    let (SwapOutcome::Won(mine), _) = arbiter.swap(won.uid, won.version, &record, far()) else {
        panic!("nobody else tries")
    };
    let bytes = std::fs::read(folder.path().join("record.00000000000000000003")).unwrap();
    assert_eq!(bytes.len(), 4096, "the spare file it is");
    assert!(temporaries(&folder).is_empty());
    // The next ones leave it alone.
    arbiter.prepare();
    assert!(matches!(
        arbiter.swap(mine.uid, mine.version, &next(&mine, 1), far()).0,
        SwapOutcome::Won(_)
    ));
    assert_eq!(
        std::fs::read(folder.path().join("record.00000000000000000003")).unwrap(),
        bytes
    );
    arbiter.prepare();
    drop(arbiter);
    assert!(temporaries(&folder).is_empty());
}

/// The share was taken away and came back without the spare file: the swap makes a new one.
#[test]
fn a_spare_file_that_is_gone_is_not_missed() {
    let folder = Folder::new("no-spare");
    let (arbiter, first) = set_up(&folder);
    arbiter.prepare();
    temporaries(&folder)
        .iter()
        .for_each(|spare| std::fs::remove_file(spare).unwrap());
    let (outcome, why) = arbiter.swap(first.uid, first.version, &next(&first, 1), far());
    assert!(matches!(outcome, SwapOutcome::Won(_)), "{why:?}");
}

#[test]
fn another_ones_record_after_a_failed_link_is_a_conflict() {
    let folder = Folder::new("other");
    let (arbiter, first) = set_up(&folder);
    let other = next(&first, 2);
    arbiter.swap(first.uid, first.version, &other, far());
    let (outcome, _) = arbiter.swap(first.uid, first.version, &next(&first, 1), far());
    assert_eq!(outcome, SwapOutcome::Conflict);
    assert_eq!(arbiter.newest().unwrap().unwrap().record, other);
}

/// An arbiter that does not return before it is told to.
struct Hanging(std::sync::Mutex<std::sync::mpsc::Receiver<()>>);

impl Arbiter for Hanging {
    fn read(&self) -> Said<ReadOutcome> {
        let _ = self.0.lock().unwrap().recv();
        (ReadOutcome::Gone, None)
    }
    fn swap(&self, _: ArbiterUid, _: u64, _: &Record, _: Instant) -> Said<SwapOutcome> {
        let _ = self.0.lock().unwrap().recv();
        (SwapOutcome::Conflict, None)
    }
}

#[test]
fn a_hung_arbiter_is_left_at_the_deadline_and_bounded_in_number() {
    let (sender, receiver) = std::sync::mpsc::channel();
    let bounded = Bounded::new(Arc::new(Hanging(receiver.into())));
    let swap = Ask::SwapRecord {
        uid: ArbiterUid(1),
        version: 1,
        record: genesis(),
    };
    let short = Duration::from_millis(20);
    let begun = Instant::now();
    assert_eq!(
        bounded.ask(&Ask::ReadRecord, short).0,
        Answer::Read(ReadOutcome::Unreachable)
    );
    for _ in 0..7 {
        assert_eq!(bounded.ask(&swap, short).0, Answer::Swap(SwapOutcome::Unknown));
    }
    assert!(begun.elapsed() < Duration::from_secs(10));
    let (answer, why) = bounded.ask(&swap, Duration::from_secs(3600));
    assert_eq!(answer, Answer::Swap(SwapOutcome::NotSent), "{why:?}");
    drop(sender);
}

// ---- races between processes

const RACER: &str = "FTVM_TEST_ARBITER_RACER";

/// A link that looks first and renames then: what an arbiter must not do.
struct LooksThenRenames;

impl Files for LooksThenRenames {
    fn create(&self, path: &Path, contents: &[u8]) -> io::Result<()> {
        PosixFiles.create(path, contents)
    }
    fn overwrite(&self, path: &Path, contents: &[u8]) -> io::Result<()> {
        PosixFiles.overwrite(path, contents)
    }
    fn touch(&self, path: &Path) -> io::Result<()> {
        PosixFiles.touch(path)
    }
    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        if to.exists() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        std::thread::yield_now();
        std::fs::rename(from, to)
    }
    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        PosixFiles.sync_folder(folder)
    }
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        PosixFiles.read(path)
    }
    fn remove(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }
}

fn race<F: Files>(arbiter: &FileArbiter<F>, me: u128, until: u64, wins: &Path) {
    let mut log = String::new();
    loop {
        let snapshot = arbiter.newest().expect("read").expect("set up");
        if snapshot.version >= until {
            break;
        }
        let record = next(&snapshot, me);
        // Some of the racers have a spare file, some have not.
        if me.is_multiple_of(2) {
            arbiter.prepare();
        }
        match arbiter.swap(snapshot.uid, snapshot.version, &record, far()) {
            (SwapOutcome::Won(won), _) => log.push_str(&format!("{} {}\n", won.version, record.nonce)),
            (SwapOutcome::Conflict, _) => {}
            (other, why) => panic!("{other:?}: {why:?}"),
        }
    }
    std::fs::write(wins, log).unwrap();
}

fn racer(folder: &Path, me: usize, kind: &str) -> Child {
    let test = "arbiter::tests::racing_processes_win_each_version_once";
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).stdout(Stdio::null());
    command
        .env(RACER, format!("{kind}:{me}:{}", folder.display()))
        .spawn()
        .unwrap()
}

/// Runs four racing processes; returns who won which version with which nonce.
fn run_race(folder: &Folder, kind: &str) -> Vec<(u64, String)> {
    let (_, first) = set_up(folder);
    assert_eq!(first.version, 1);
    let children: Vec<Child> = (0..4).map(|me| racer(folder.path(), me, kind)).collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let mut wins = Vec::new();
    for me in 0..4 {
        let log = std::fs::read_to_string(folder.path().join(format!("wins.{me}"))).unwrap();
        for line in log.lines() {
            let (version, nonce) = line.split_once(' ').unwrap();
            wins.push((version.parse().unwrap(), nonce.to_owned()));
        }
    }
    wins
}

const RACE_VERSIONS: u64 = 200;

/// What must be true after a race: every version has one winner, whose record stands, and terms grow by one.
fn check_race(folder: &Folder, wins: &[(u64, String)]) -> Result<(), String> {
    let arbiter = FileArbiter::new(folder.path());
    let mut by_version: BTreeMap<u64, Vec<&String>> = BTreeMap::new();
    for (version, nonce) in wins {
        by_version.entry(*version).or_default().push(nonce);
    }
    for (version, winners) in &by_version {
        if winners.len() != 1 {
            return Err(format!("version {version} was won {} times", winners.len()));
        }
        let path: PathBuf = folder.path().join(format!("record.{version:020}"));
        let stored = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
        if !stored.contains(winners[0].as_str()) {
            return Err(format!("version {version} is not what its winner wrote"));
        }
    }
    let last = arbiter
        .newest()
        .map_err(|error| error.to_string())?
        .ok_or("no record")?;
    if last.record.term != last.version || by_version.len() as u64 + 1 != last.version {
        return Err(format!(
            "{} versions won, newest {} of term {}",
            by_version.len(),
            last.version,
            last.record.term
        ));
    }
    Ok(())
}

#[test]
fn racing_processes_win_each_version_once() {
    if let Some(role) = std::env::var_os(RACER) {
        let role = role.into_string().unwrap();
        let (kind, rest) = role.split_once(':').unwrap();
        let (me, folder) = rest.split_once(':').unwrap();
        let wins = Path::new(folder).join(format!("wins.{me}"));
        let me: u128 = me.parse().unwrap();
        match kind {
            "good" => race(&FileArbiter::new(folder), me, RACE_VERSIONS, &wins),
            _ => race(
                &FileArbiter::with_files(folder, LooksThenRenames),
                me,
                RACE_VERSIONS,
                &wins,
            ),
        }
        return;
    }
    let folder = Folder::new("race");
    let wins = run_race(&folder, "good");
    check_race(&folder, &wins).unwrap();
}

#[test]
fn the_race_catches_an_arbiter_that_is_not_atomic() {
    let caught = (0..10).find_map(|_| {
        let folder = Folder::new("race-broken");
        let wins = run_race(&folder, "broken");
        check_race(&folder, &wins).err()
    });
    assert!(
        caught.is_some(),
        "ten races of look-then-rename showed no fault: the check proves nothing"
    );
}

const CRASHER: &str = "FTVM_TEST_ARBITER_CRASHER";

#[test]
fn a_crash_between_any_two_steps_leaves_the_old_or_the_new_record() {
    if let Some(role) = std::env::var_os(CRASHER) {
        let role = role.into_string().unwrap();
        let (at, folder) = role.split_once(':').unwrap();
        let first = FileArbiter::new(folder).newest().unwrap().unwrap();
        let files = Failing {
            at: at.parse().unwrap(),
            after: true,
            count: AtomicUsize::new(0),
            // SAFETY: ends this process like a kill: nothing is flushed, nothing unwound.
            end: || unsafe { libc::_exit(99) },
        };
        FileArbiter::with_files(folder, files).swap(first.uid, first.version, &next(&first, 5), far());
        return;
    }
    let mut landed = Vec::new();
    for at in 0..SWAP_STEPS {
        let folder = Folder::new("crash");
        let (arbiter, first) = set_up(&folder);
        let test = "arbiter::tests::a_crash_between_any_two_steps_leaves_the_old_or_the_new_record";
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", test, "--nocapture"]).stdout(Stdio::null());
        let status = command
            .env(CRASHER, format!("{at}:{}", folder.path().display()))
            .status()
            .unwrap();
        assert_eq!(status.code(), Some(99), "step {at}");
        let after = arbiter.newest().unwrap().unwrap();
        landed.push(after.record.holder.seat == SeatId(5));
        assert!(after.record == first.record || *landed.last().unwrap());
        // The survivors go on.
        let (outcome, why) = arbiter.swap(after.uid, after.version, &next(&after, 2), far());
        assert!(matches!(outcome, SwapOutcome::Won(_)), "step {at}: {why:?}");
    }
    assert_eq!(landed, [false, false, false, true, true, true]);
}
