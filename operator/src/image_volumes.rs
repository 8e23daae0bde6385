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

/// The control plane may have been upgraded after this time.
const AGAIN: Duration = Duration::from_secs(3600);
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
    again: Duration,
    known: Mutex<Option<(GuestFiles, Instant)>>,
}

impl ImageVolumes {
    /// Nothing is known yet. `objects` are those of the operator's own namespace.
    pub fn new(setting: Setting, image: SeatImage, objects: Objects) -> ImageVolumes {
        ImageVolumes {
            setting,
            image,
            objects,
            again: AGAIN,
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
        if let Some((files, when)) = *known
            && when.elapsed() < self.again
        {
            return Ok(files);
        }
        match (self.ask().await, *known) {
            (Ok(files), before) => {
                if before.map(|(files, _)| files) != Some(files) {
                    tracing::info!(?files, "guest images come into new pods of seats like this");
                }
                *known = Some((files, Instant::now()));
                Ok(files)
            }
            (Err(why), Some((files, _))) => {
                tracing::warn!(%why, ?files, "whether the cluster still has image volumes is not known; asked again with the next pod");
                Ok(files)
            }
            (Err(why), None) => Err(ApiError::ImageVolumes(why)),
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
