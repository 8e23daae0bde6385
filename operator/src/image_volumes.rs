//! Whether the cluster has image volumes, asked of the API server before the first seat's pod is made, and again from time to time.
//!
//! Without the feature (Kubernetes before 1.35, by default) an API server takes such a pod and leaves the volume out: the seat would start
//! without a guest. So it is asked what it would make of one (a dry run, in the operator's own namespace), and its answer tells. An answer
//! that tells nothing (a refusal, a time-out) is an error and no answer: pods are not made until there is one.

use std::time::Duration;

use clap::ValueEnum;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};

use crate::api::{ApiError, Objects};
use crate::build::{GuestFiles, SeatImage, image_volume_probe, judge_probe};

/// How long it is gone by what came of a question.
#[derive(Debug, Clone, Copy)]
struct Waits {
    /// By an answer: the control plane may have been upgraded after this time.
    answered: Duration,
    /// By the answer before, after a question that had none.
    kept: Duration,
    /// By there never having been one: VMs that wait for it do not wait for each other's questions as well.
    unanswered: Duration,
}

const WAITS: Waits = Waits {
    answered: Duration::from_secs(3600),
    kept: Duration::from_secs(60),
    unanswered: Duration::from_secs(5),
};
/// An answer that takes longer is none.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// What the command line says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Setting {
    /// Ask the API server.
    Auto,
    /// Guest images are mounted as volumes.
    Always,
    /// Guest images are copied by an init container.
    Never,
}

/// What is known of it.
pub struct ImageVolumes {
    setting: Setting,
    image: SeatImage,
    /// Of the operator's own namespace.
    objects: Objects,
    waits: Waits,
    known: Mutex<Option<Known>>,
}

/// What came of the last question.
struct Known {
    /// How guest images come into pods, or why nobody knows.
    what: Result<GuestFiles, String>,
    /// When to ask again.
    until: Instant,
}

impl ImageVolumes {
    /// Nothing is known yet. `objects` are those of the operator's own namespace.
    pub fn new(setting: Setting, image: SeatImage, objects: Objects) -> ImageVolumes {
        ImageVolumes {
            setting,
            image,
            objects,
            waits: WAITS,
            known: Mutex::default(),
        }
    }

    /// How guest images come into pods that are made now.
    ///
    /// # Errors
    /// If the API server was never asked with success.
    pub async fn files(&self) -> Result<GuestFiles, ApiError> {
        match self.setting {
            Setting::Always => return Ok(GuestFiles::Mounted),
            Setting::Never => return Ok(GuestFiles::Copied),
            Setting::Auto => {}
        }
        // One asks, the others wait for its answer.
        let mut known = self.known.lock().await;
        if let Some(Known { what, until }) = &*known
            && Instant::now() < *until
        {
            return what.clone().map_err(ApiError::ImageVolumes);
        }
        let before = known.as_ref().and_then(|known| known.what.clone().ok());
        let (what, wait) = self.judged(self.ask().await, before);
        *known = Some(Known {
            what: what.clone(),
            until: Instant::now() + wait,
        });
        what.map_err(ApiError::ImageVolumes)
    }

    /// What is gone by after a question, and for how long.
    fn judged(
        &self,
        answer: Result<GuestFiles, String>,
        before: Option<GuestFiles>,
    ) -> (Result<GuestFiles, String>, Duration) {
        match (answer, before) {
            (Ok(files), before) => {
                if before != Some(files) {
                    tracing::info!(?files, "guest images come into new pods of seats like this");
                }
                (Ok(files), self.waits.answered)
            }
            (Err(why), Some(files)) => {
                let again_s = self.waits.kept.as_secs();
                tracing::warn!(%why, ?files, again_s, "whether the cluster still has image volumes is not known; asked again with a pod after that time");
                (Ok(files), self.waits.kept)
            }
            (Err(why), None) => (Err(why), self.waits.unanswered),
        }
    }

    async fn ask(&self) -> Result<GuestFiles, String> {
        let probe = image_volume_probe(&self.image);
        match timeout(ANSWER_MAX, self.objects.try_create(&probe)).await {
            Err(_) => Err(format!("no answer within {} s", ANSWER_MAX.as_secs())),
            Ok(Err(error)) => Err(error.to_string()),
            Ok(Ok(answer)) => judge_probe(&probe, &answer)
                .ok_or_else(|| "the answer is about another pod than the question".to_owned()),
        }
    }
}

#[cfg(test)]
#[path = "image_volumes_tests.rs"]
mod tests;
