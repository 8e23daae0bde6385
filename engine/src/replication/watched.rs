//! A storage of which others see that it hangs: whoever uses it waits for it, and says nothing meanwhile.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::storage::Storage;

/// Since when requests have been under way, of all storages that share it.
#[derive(Debug, Default)]
pub struct UnderWay(Mutex<Vec<Instant>>);

impl UnderWay {
    /// Since when the oldest one has been so; none if there is none.
    pub fn since(&self) -> Option<Instant> {
        self.requests().iter().min().copied()
    }

    fn requests(&self) -> MutexGuard<'_, Vec<Instant>> {
        // Changed in single steps: a panic elsewhere leaves it whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn during<T>(&self, work: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        self.requests().push(began);
        let done = work();
        let mut requests = self.requests();
        if let Some(at) = requests.iter().position(|one| *one == began) {
            requests.swap_remove(at);
        }
        done
    }
}

/// A storage whose requests are seen while they are under way.
pub struct Watched {
    storage: Arc<dyn Storage>,
    under_way: Arc<UnderWay>,
}

impl Watched {
    /// The requests of `storage` are seen in `under_way`.
    pub fn new(storage: Arc<dyn Storage>, under_way: Arc<UnderWay>) -> Self {
        Self { storage, under_way }
    }
}

impl Storage for Watched {
    fn size_bytes(&self) -> u64 {
        self.storage.size_bytes()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.under_way.during(|| self.storage.read_at(offset, buf))
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.under_way.during(|| self.storage.write_at(offset, data))
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.under_way.during(|| self.storage.zero(offset, len))
    }

    fn zero_anew(&self, offset: u64, len: u64) -> io::Result<()> {
        self.under_way.during(|| self.storage.zero_anew(offset, len))
    }

    fn sync(&self) -> io::Result<()> {
        self.under_way.during(|| self.storage.sync())
    }

    fn identity(&self) -> Option<u128> {
        self.storage.identity()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};
    use std::thread;

    use super::*;

    /// Writes wait until they are told to go on.
    struct Hangs(Mutex<Receiver<()>>);

    impl Storage for Hangs {
        fn size_bytes(&self) -> u64 {
            512
        }

        fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
            Ok(())
        }

        fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
            let told = self.0.lock().expect("no panic");
            told.recv().map_err(io::Error::other)
        }

        fn zero(&self, _: u64, _: u64) -> io::Result<()> {
            Ok(())
        }

        fn sync(&self) -> io::Result<()> {
            Ok(())
        }

        fn identity(&self) -> Option<u128> {
            Some(7)
        }
    }

    #[test]
    fn the_oldest_request_is_seen_for_as_long_as_it_is_under_way() {
        let (go_on, told) = channel();
        let under_way = Arc::<UnderWay>::default();
        let hangs = Arc::new(Hangs(Mutex::new(told)));
        let storage = Arc::new(Watched::new(hangs, under_way.clone()));
        assert_eq!((storage.size_bytes(), storage.identity()), (512, Some(7)));
        assert_eq!(under_way.since(), None);
        let writer = thread::spawn({
            let storage = storage.clone();
            move || storage.write_at(0, &[1])
        });
        let since = loop {
            match under_way.since() {
                Some(since) => break since,
                None => thread::yield_now(),
            }
        };
        // What is done meanwhile changes nothing.
        storage.sync().expect("no fault");
        storage.read_at(0, &mut [0]).expect("no fault");
        storage.zero(0, 512).expect("no fault");
        assert_eq!(under_way.since(), Some(since));
        go_on.send(()).expect("the writer waits");
        writer.join().expect("no panic").expect("no fault");
        assert_eq!(under_way.since(), None);
    }
}
