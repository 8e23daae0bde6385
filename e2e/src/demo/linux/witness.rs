//! The client of the Debian guest: counts acknowledged increments over one Redis connection, and downloads files meanwhile.
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use crate::demo::witness::{Tally, Testimony, Witness};
use crate::judge::PhaseReport;
use crate::lab::Sandbox;
use crate::lab::guest::{self, Redis};

const COUNTER: &str = "counter";
/// Pause between two increments: they leave the emulated machine's one CPU time for the resync.
const PACE: Duration = Duration::from_millis(50);
/// `/count-N`, about 100 KB.
const DOWNLOAD: u32 = 20_000;
const PAUSE_OF_DOWNLOADS: Duration = Duration::from_secs(4);

/// What the clients saw so far.
#[derive(Debug, Default)]
struct Books {
    /// The highest value that Redis acknowledged.
    acknowledged: i64,
    answers: u64,
    downloads: u64,
    tally: Tally,
    complaints: Vec<String>,
    ended: bool,
    latencies_us: Vec<u64>,
    phase_since: Option<Instant>,
    phase_answers: u64,
    longest: Duration,
    waiting_since: Option<Instant>,
}

impl Books {
    /// An answer to an increment. The value says whether an earlier answer was forgotten, or an increment was done twice.
    fn answered(&mut self, value: i64, took: Duration) {
        let expected = self.acknowledged + 1;
        if value < expected {
            self.tally.lost += (expected - value).unsigned_abs();
            self.complaints
                .push(format!("the guest forgot: {expected} was due, it said {value}"));
        } else if value > expected {
            self.tally.doubled += (value - expected).unsigned_abs();
            self.complaints.push(format!(
                "increments were done twice: {expected} was due, the guest said {value}"
            ));
        }
        self.acknowledged = value;
        self.answers += 1;
        self.phase_answers += 1;
        self.longest = self.longest.max(took);
        self.latencies_us
            .push(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
        self.waiting_since = None;
    }

    fn turn(&mut self, now: Instant) -> PhaseReport {
        let open = self
            .waiting_since
            .map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        let since = self.phase_since.replace(now).unwrap_or(now);
        PhaseReport {
            length_ms: now.saturating_duration_since(since).as_secs_f64() * 1e3,
            answers: std::mem::take(&mut self.phase_answers),
            gap_ms: std::mem::take(&mut self.longest).max(open).as_secs_f64() * 1e3,
        }
    }

    fn quantile_us(&mut self, share: f64) -> Option<u64> {
        self.latencies_us.sort_unstable();
        let last = self.latencies_us.len().checked_sub(1)?;
        self.latencies_us.get((last as f64 * share) as usize).copied()
    }
}

/// What the threads share.
struct Common {
    sandbox: Arc<Sandbox>,
    books: Mutex<Books>,
    end: AtomicBool,
    quiet: AtomicBool,
    stalled: Duration,
}

impl Common {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The running clients.
pub struct RedisWitness {
    common: Arc<Common>,
    threads: Vec<JoinHandle<()>>,
}

impl RedisWitness {
    /// Connects, waiting for the guest to boot, and begins to count. An increment without an answer for `stalled` ends it.
    pub fn start(sandbox: &Arc<Sandbox>, patience: Duration, stalled: Duration) -> anyhow::Result<Self> {
        let redis = Redis::connect(sandbox, Instant::now() + patience)?;
        let common = Arc::new(Common {
            sandbox: Arc::clone(sandbox),
            books: Mutex::default(),
            end: AtomicBool::new(false),
            quiet: AtomicBool::new(false),
            stalled,
        });
        let threads = vec![
            thread("redis-client", &common, move |common| count(common, redis))?,
            thread("http-client", &common, download)?,
        ];
        Ok(Self { common, threads })
    }

    /// Waits until no request is open.
    fn quieten(&self) -> anyhow::Result<()> {
        self.common.quiet.store(true, Ordering::SeqCst);
        let deadline = Instant::now() + self.common.stalled;
        while self.common.books().waiting_since.is_some() {
            ensure!(Instant::now() < deadline, "an increment stays without an answer");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

fn thread(
    name: &str,
    common: &Arc<Common>,
    body: impl FnOnce(&Common) + Send + 'static,
) -> anyhow::Result<JoinHandle<()>> {
    let common = Arc::clone(common);
    Ok(std::thread::Builder::new()
        .name(name.into())
        .spawn(move || body(&common))?)
}

/// Increments over one connection until told to end. A broken connection is not renewed.
fn count(common: &Common, mut redis: Redis) {
    while !common.end.load(Ordering::SeqCst) {
        std::thread::sleep(PACE);
        {
            // Decided under the lock: whoever asks for quiet and then sees no open request can rely on it.
            let mut books = common.books();
            if common.quiet.load(Ordering::SeqCst) {
                continue;
            }
            books.waiting_since = Some(Instant::now());
        }
        let begin = Instant::now();
        match redis.increment(COUNTER, common.stalled) {
            Ok(value) => common.books().answered(value, begin.elapsed()),
            Err(error) => {
                let mut books = common.books();
                books
                    .complaints
                    .push(format!("the connection to Redis ended: {error:#}"));
                books.ended = true;
                return;
            }
        }
    }
}

/// Downloads a file again and again; each must come whole and right, whatever happens meanwhile.
fn download(common: &Common) {
    while !common.end.load(Ordering::SeqCst) {
        std::thread::sleep(PAUSE_OF_DOWNLOADS);
        if common.quiet.load(Ordering::SeqCst) {
            continue;
        }
        let result = guest::download(&common.sandbox, DOWNLOAD, common.stalled);
        let mut books = common.books();
        match result {
            Ok(_) => books.downloads += 1,
            Err(error) => {
                books.tally.lost += 1;
                books.complaints.push(format!("a download failed: {error:#}"));
            }
        }
    }
}

impl Witness for RedisWitness {
    type Books = ();

    fn answers(&self) -> u64 {
        self.common.books().answers
    }

    fn has_ended(&self) -> bool {
        self.common.books().ended
    }

    fn phase(&self) -> PhaseReport {
        self.common.books().turn(Instant::now())
    }

    fn tally(&self) -> Tally {
        self.common.books().tally
    }

    fn load(&self) -> anyhow::Result<()> {
        self.common.quiet.store(false, Ordering::SeqCst);
        Ok(())
    }

    fn examine(&self) -> anyhow::Result<()> {
        self.quieten()?;
        let log = "/var/lib/redis/appendonlydir/appendonly.aof.manifest";
        let script =
            format!("redis-cli get {COUNTER} && redis-check-aof {log} >/tmp/aof 2>&1 || {{ cat /tmp/aof; exit 1; }}");
        let output = guest::ssh(&self.common.sandbox, &script)?;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        ensure!(
            output.status.success(),
            "the guest's examination failed: {text} {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let (value, acknowledged) = (
            text.parse::<i64>().context("the counter is no number")?,
            self.common.books().acknowledged,
        );
        ensure!(
            value == acknowledged,
            "Redis has {value}, {acknowledged} was acknowledged"
        );
        Ok(())
    }

    fn finish(self) -> (Testimony, ()) {
        self.common.end.store(true, Ordering::SeqCst);
        for thread in self.threads {
            if thread.join().is_err() {
                self.common.books().complaints.push("a client panicked".to_owned());
            }
        }
        let mut books = self.common.books();
        if books.downloads == 0 {
            books.complaints.push("not one download was completed".to_owned());
        }
        let testimony = Testimony {
            answers: books.answers,
            tally: books.tally,
            latency_us_p50: books.quantile_us(0.5),
            latency_us_p99: books.quantile_us(0.99),
            complaints: books.complaints.clone(),
        };
        (testimony, ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forgotten_and_repeated_increments_are_counted() {
        let mut books = Books::default();
        for value in [1, 2, 3] {
            books.answered(value, Duration::from_millis(2));
        }
        assert_eq!(books.tally, Tally::default());
        books.answered(3, Duration::from_millis(9));
        assert_eq!((books.tally.lost, books.tally.doubled, books.tally.other), (1, 0, 0));
        books.answered(5, Duration::from_millis(1));
        assert_eq!((books.tally.lost, books.tally.doubled, books.tally.other), (1, 1, 0));
        assert_eq!(books.complaints.len(), 2);
        let report = books.turn(Instant::now());
        assert_eq!((report.answers, report.gap_ms), (5, 9.0));
    }
}
