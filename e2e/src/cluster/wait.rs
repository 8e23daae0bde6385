//! Waiting with a deadline and a reason.
use std::time::{Duration, Instant};

use anyhow::Context;

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(200);

/// An error that waiting does not mend.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Hopeless(pub String);

/// Looks until `look` succeeds and returns what it found. Its errors say why it is not yet so; the last one is part of the error.
///
/// # Errors
/// If it is not so in time, or [`Hopeless`].
pub fn wait_for<T>(what: &str, patience: Duration, mut look: impl FnMut() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let deadline = Instant::now() + patience;
    loop {
        match look() {
            Ok(found) => return Ok(found),
            Err(error) if error.is::<Hopeless>() => return Err(error).with_context(|| what.to_owned()),
            Err(error) if Instant::now() > deadline => {
                return Err(error).with_context(|| format!("{what}: not so after {} s; last seen", patience.as_secs()));
            }
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::{bail, ensure};

    #[test]
    fn it_says_what_was_seen_last() {
        let mut looks = 0;
        let found = wait_for("a third look", Duration::from_secs(60), || {
            looks += 1;
            ensure!(looks == 3, "look {looks}");
            Ok(looks)
        });
        assert_eq!(found.unwrap(), 3);
        let error = wait_for("the impossible", Duration::ZERO, || -> anyhow::Result<()> {
            bail!("it is not there")
        });
        let text = format!("{:#}", error.unwrap_err());
        assert!(
            text.contains("the impossible") && text.ends_with("it is not there"),
            "{text}"
        );
    }

    #[test]
    fn it_does_not_wait_for_what_is_hopeless() {
        let begin = Instant::now();
        let error = wait_for("a dead process", Duration::from_secs(600), || -> anyhow::Result<()> {
            Err(Hopeless("it ended".to_owned()).into())
        });
        assert!(begin.elapsed() < Duration::from_secs(60));
        assert!(format!("{:#}", error.unwrap_err()).contains("it ended"));
    }
}
