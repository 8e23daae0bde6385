//! What an engine's status counts and measures, by name. Node-daemons tell Prometheus these and no others (`ftvm_engine`), for an engine
//! that its guest has taken over may call figures what it likes.

/// A number in the status of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Figure {
    /// Its name, with the unit in it.
    pub name: &'static str,
    /// It only ever grows, from the engine's start on. Otherwise it is what is so now, or was last.
    pub is_total: bool,
    /// What it says.
    pub help: &'static str,
}

/// Units as names have them, and in full.
const UNITS: &[(&str, &str)] = &[
    ("us", "microseconds"),
    ("ms", "milliseconds"),
    ("bytes", "bytes"),
    ("pages", "pages"),
];

impl Figure {
    /// What it is measured in, as its name says.
    #[must_use]
    pub fn unit(&self) -> &'static str {
        let known = |word: &str| UNITS.iter().find(|(short, _)| *short == word);
        self.name.split('_').find_map(known).map_or("1", |(_, unit)| *unit)
    }
}

const fn total(name: &'static str, help: &'static str) -> Figure {
    Figure {
        name,
        is_total: true,
        help,
    }
}

const fn measure(name: &'static str, help: &'static str) -> Figure {
    Figure {
        name,
        is_total: false,
        help,
    }
}

/// Is there a figure of this name?
#[must_use]
pub fn is_figure(name: &str) -> bool {
    FIGURES.iter().any(|figure| figure.name == name)
}

/// All of them.
pub const FIGURES: &[Figure] = &[
    measure(
        "pause_us_p50",
        "For how long the guest stood still for an epoch: half of all pauses were no longer",
    ),
    measure("pause_us_p99", "The same: 99 of 100 pauses were no longer"),
    measure("pause_us_max", "The longest pause for an epoch"),
    total("pause_us_total", "All pauses for epochs together"),
    measure(
        "ack_us_p50",
        "From the end of an epoch until the standby has it: half of all took no longer",
    ),
    measure("ack_us_p99", "The same: 99 of 100 took no longer"),
    total("epochs", "Epochs that were cut"),
    total("residue_pages", "Pages that were copied while the guest stood still"),
    total(
        "precopy_rounds",
        "Rounds in which pages were sent before an epoch was cut",
    ),
    total("pages_sent", "Pages that were looked at for epochs"),
    total("pages_zero", "Those of them that were all zeroes"),
    total(
        "pages_unchanged",
        "Those of them that were as they had been sent last, and were not sent",
    ),
    total("pages_raw", "Those of them that were sent as they are"),
    measure(
        "delta_cache_bytes",
        "Memory of what was sent last, against which pages are compared",
    ),
    measure("resync_us", "The last resync that this seat led, from begin to end"),
    measure(
        "resync_copied_bytes",
        "What it copied of memory and disks, zeroes and pages sent again included",
    ),
    measure("resync_disk_bytes", "What it copied of disks, zeroes included"),
    measure(
        "resync_spared_bytes",
        "What it did not copy of disks, because the other side had it",
    ),
    measure("resync_passes", "How often it sent pages again"),
    measure("resync_again_pages", "Pages that it sent again"),
    measure("resync_sent_bytes", "What it gave to the link"),
    total("epoch_sent_bytes", "What was given to the link for epochs"),
    measure(
        "link_sent_bytes",
        "What was given to the links that are up, since they are",
    ),
    total(
        "braked_us",
        "Time that the guest was held back because it outran the link",
    ),
    total(
        "paused_us",
        "Time that the guest stood still because no standby would take over",
    ),
    total(
        "output_dropped",
        "Output that the host did not take, or that had no room where it waited",
    ),
    total(
        "nic_tx_dropped",
        "Frames of the guest that were none, or longer than its MTU",
    ),
    total(
        "nic_rx_dropped",
        "Frames for the guest that did not fit its buffers or its MTU",
    ),
    total("input_frames", "Frames that the guest was given"),
    total("released_items", "Pieces of output that left"),
    total("released_bytes", "Bytes of output that left"),
    total(
        "held_us_total",
        "Time that output was held back before it left, of all pieces together",
    ),
    measure(
        "held_us_max",
        "The longest that a piece of output was held back before it left",
    ),
    measure(
        "held_us_p50",
        "For how long output was held back that did not leave at once: half of all no longer",
    ),
    measure("held_us_p90", "The same: nine of ten no longer"),
    measure(
        "output_waits_us",
        "For how long the oldest output has been held back that has not left yet",
    ),
    total("disk_errors", "Requests of disks that failed"),
    measure(
        "disk_request_us_max",
        "The longest that a request of a disk was seen to be under way",
    ),
    total(
        "disk_held",
        "Requests of disks whose error was kept from the guest for a while",
    ),
    measure("disk_held_ms_max", "The longest that such an error was kept"),
    measure(
        "takeover_us",
        "The last takeover of this seat, from the notice of the loss until output could leave",
    ),
    measure(
        "takeover_silence_us",
        "How long before that notice the last contact was",
    ),
    measure(
        "takeover_applied_us",
        "From that notice until memory was at the last acknowledged epoch",
    ),
    measure("takeover_loaded_us", "Until the machine had that epoch's state"),
    measure("takeover_read_us", "Until the arbiter had given the record"),
    measure("takeover_swapped_us", "Until the arbiter had taken the new record"),
    measure("takeover_running_us", "Until the guest ran"),
    measure("takeover_header_us", "Until the disks' header was durable"),
    measure("takeover_released_us", "Until output could leave"),
    measure(
        "takeover_answered_us",
        "Until the first output left that the guest produced here",
    ),
    measure(
        "switchover_us",
        "The last planned switchover to this seat, from the source's word until output could leave",
    ),
    measure(
        "switchover_applied_us",
        "From the source's word until memory was at its last epoch",
    ),
    measure("switchover_loaded_us", "Until the machine had that epoch's state"),
    measure("switchover_running_us", "Until the guest ran"),
    measure("switchover_followed_us", "Until the source followed"),
    measure("switchover_sealed_us", "Until the first epoch was cut here"),
    measure("switchover_sent_us", "Until that epoch was given to the link"),
    measure(
        "switchover_released_us",
        "Until output could leave that the guest produced here",
    ),
    measure("switchover_answered_us", "Until the first such output left"),
];
