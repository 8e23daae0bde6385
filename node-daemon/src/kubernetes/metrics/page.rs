//! The metrics of one scrape.

use std::time::Duration;

use ftvm_crds::metrics::{BUILD_INFO, Durations, Families};
use ftvm_crds::networks::{NodeNetworks, PathState};
use ftvm_engine::control::{FailingDisk, Role, Status, StorageKind};
use ftvm_engine::driver::is_figure;
use ftvm_engine::seat_io::Reason;
use prometheus::{GaugeVec, IntCounterVec, IntGauge, IntGaugeVec, Registry, TextEncoder};
use serde_json::{Map, Value};

use super::list::{METRICS, PATH_STATES};
use super::{STATUS_PATIENCE, Sources};
use crate::arbiter::Leases;
use crate::config::{DiskConfig, NicConfig, SeatConfig};
use crate::kubernetes::node::NodeSeat;
use crate::seat_socket::{DiskProgress, role_name};

/// Made anew for each scrape: nothing of a seat that is gone stays behind.
pub struct Page {
    registry: Registry,
    seats: IntGauge,
    role: IntGaugeVec,
    protected: IntGaugeVec,
    term: IntGaugeVec,
    epoch: IntGaugeVec,
    acknowledged: IntGaugeVec,
    unacknowledged: GaugeVec,
    link_up: IntGaugeVec,
    pauses: Durations,
    holds: Durations,
    reachable: IntGaugeVec,
    connected: IntGaugeVec,
    progress: IntGaugeVec,
    starts: IntCounterVec,
    exit_code: IntGaugeVec,
    figures: IntGaugeVec,
    refused: IntCounterVec,
    disks: IntGaugeVec,
    storage_failures: IntGaugeVec,
    requests: IntCounterVec,
    took: Durations,
    places: IntGaugeVec,
    paths: IntGaugeVec,
    kvm_works: IntGauge,
    synced: IntGauge,
    build: IntGaugeVec,
}

impl Page {
    /// An empty one.
    ///
    /// # Errors
    /// If it is not what the list says.
    pub fn new() -> prometheus::Result<Page> {
        let mut families = Families::new(METRICS);
        let told = &mut families;
        Ok(Page {
            seats: told.gauge("ftvm_seats")?,
            role: told.gauges("ftvm_seat_role")?,
            protected: told.gauges("ftvm_seat_protected")?,
            term: told.gauges("ftvm_seat_term")?,
            epoch: told.gauges("ftvm_seat_epoch")?,
            acknowledged: told.gauges("ftvm_seat_epoch_acknowledged")?,
            unacknowledged: told.real_gauges("ftvm_seat_unacknowledged_seconds")?,
            link_up: told.gauges("ftvm_seat_link_up")?,
            pauses: told.durations("ftvm_seat_guest_pause_seconds")?,
            holds: told.durations("ftvm_seat_output_hold_seconds")?,
            reachable: told.gauges("ftvm_seat_arbiter_reachable")?,
            connected: told.gauges("ftvm_seat_program_connected")?,
            progress: told.gauges("ftvm_seat_progress_percent")?,
            starts: told.counters("ftvm_seat_engine_starts_total")?,
            exit_code: told.gauges("ftvm_seat_engine_exit_code")?,
            figures: told.gauges("ftvm_engine")?,
            refused: told.counters("ftvm_guest_frames_refused_total")?,
            disks: told.gauges("ftvm_seat_disk")?,
            storage_failures: told.gauges("ftvm_seat_storage_failures")?,
            requests: told.counters("ftvm_arbiter_requests_total")?,
            took: told.durations("ftvm_arbiter_request_seconds")?,
            places: told.gauges("ftvm_api_server_place")?,
            paths: told.gauges("ftvm_node_paths")?,
            kvm_works: told.gauge("ftvm_kvm_works")?,
            synced: told.gauge("ftvm_api_server_synced")?,
            build: told.gauges(BUILD_INFO.name)?,
            registry: families.complete()?,
        })
    }

    /// Everything that there is to tell now, in Prometheus' text format.
    ///
    /// # Errors
    /// If it can't be encoded.
    pub fn tell(self, sources: &Sources) -> prometheus::Result<String> {
        let seats = sources.node.seats();
        self.seats.set(i64::try_from(seats.len()).unwrap_or(i64::MAX));
        for seat in seats {
            self.tell_seat(&seat);
        }
        self.tell_arbiter(&sources.leases);
        if let Some(networks) = &*sources.networks.borrow() {
            self.tell_networks(networks);
        }
        self.kvm_works.set(i64::from(sources.tested.trouble().is_none()));
        self.synced.set(i64::from(sources.health.is_synced()));
        self.build
            .with_label_values(&["node-daemon", env!("CARGO_PKG_VERSION")])
            .set(1);
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }

    fn tell_seat(&self, seat: &NodeSeat) {
        let known = seat.known();
        let labels = [known.namespace.as_str(), &known.vm, &known.config.seat];
        let status = seat.pod.seat.status(STATUS_PATIENCE);
        let program = seat.pod.progress();
        self.connected
            .with_label_values(&labels)
            .set(i64::from(program.connected));
        self.starts.with_label_values(&labels).inc_by(status.starts);
        self.storage_failures
            .with_label_values(&labels)
            .set(status.storage_failures.into());
        if let Some(exit) = &status.last_exit {
            self.exit_code.with_label_values(&labels).set(exit.code.into());
        }
        // As its pod says it: a disk that can't be prepared is no progress.
        let preparing = program.disk.as_ref().filter(|_| program.trouble.is_none());
        let percent = match &status.engine {
            Some(engine) => engine.resync_percent,
            None => preparing.map(DiskProgress::percent),
        };
        if let Some(percent) = percent {
            self.progress.with_label_values(&labels).set(percent.into());
        }
        let name = status.engine.as_ref().map_or("none", |engine| role_name(engine.role));
        self.role
            .with_label_values(&[labels[0], labels[1], labels[2], name])
            .set(1);
        if let Some(engine) = &status.engine {
            self.tell_engine(labels, engine, &known.config);
        }
    }

    fn tell_engine(&self, labels: [&str; 3], engine: &Status, config: &SeatConfig) {
        let protected = engine.protected && engine.role != Role::Ended;
        self.protected.with_label_values(&labels).set(i64::from(protected));
        for (gauge, value) in [
            (&self.term, engine.term),
            (&self.epoch, engine.epoch),
            (&self.acknowledged, engine.acknowledged),
        ] {
            let value = i64::try_from(value).unwrap_or(i64::MAX);
            gauge.with_label_values(&labels).set(value);
        }
        if let Some(standby) = &engine.standby {
            let waited = Duration::from_millis(standby.unacknowledged_ms);
            self.unacknowledged.with_label_values(&labels).set(waited.as_secs_f64());
        }
        let link_up = engine.peer.as_ref().is_some_and(|peer| peer.connected);
        self.link_up.with_label_values(&labels).set(i64::from(link_up));
        self.reachable
            .with_label_values(&labels)
            .set(i64::from(engine.arbiter_reachable));
        self.tell_disks(labels, &config.disks, &engine.failing_disks);
        self.tell_refused(labels, &config.nics, engine.counters.get("nic_refused"));
        self.tell_figures(labels, &engine.counters);
    }

    /// Those that there are, whatever else its engine names.
    fn tell_figures(&self, seat: [&str; 3], counters: &Map<String, Value>) {
        let figures = counters.iter().filter(|(name, _)| is_figure(name));
        let figures = figures.filter_map(|(name, value)| Some((name, value.as_i64()?)));
        for (name, value) in figures {
            self.figures
                .with_label_values(&[seat[0], seat[1], seat[2], name])
                .set(value);
        }
        for (durations, counted, sum_us) in [
            (&self.pauses, "pause_us_buckets", "pause_us_total"),
            (&self.holds, "held_us_buckets", "held_us_total"),
        ] {
            let counted = counters.get(counted).and_then(counts);
            let sum = counters.get(sum_us).and_then(Value::as_u64);
            if let Some((counted, sum_us)) = counted.zip(sum) {
                durations.tell(&seat, &counted, Duration::from_micros(sum_us));
            }
        }
    }

    /// Of the disks that the seat has, whatever its engine names.
    fn tell_disks(&self, seat: [&str; 3], disks: &[DiskConfig], failing: &[FailingDisk]) {
        let kinds = [StorageKind::Failed, StorageKind::Full, StorageKind::Hangs];
        for (index, disk) in disks.iter().enumerate() {
            let found = failing.iter().find(|failing| failing.disk == index);
            let now = found.map(|failing| failing.kind);
            for kind in kinds.map(Some).into_iter().chain([None]) {
                let state = match kind {
                    None => "works",
                    Some(StorageKind::Failed) => "failed",
                    Some(StorageKind::Full) => "full",
                    Some(StorageKind::Hangs) => "hangs",
                };
                let labels = [seat[0], seat[1], seat[2], &disk.name, state];
                self.disks.with_label_values(&labels).set((kind == now).into());
            }
        }
    }

    /// Of the cards that the seat has and the reasons that there are, whatever its engine names.
    fn tell_refused(&self, seat: [&str; 3], nics: &[NicConfig], told: Option<&Value>) {
        let Some(told) = told else { return };
        for nic in nics {
            for reason in Reason::ALL.map(Reason::label) {
                let count = told[&nic.name][reason].as_u64().unwrap_or(0);
                let labels = [seat[0], seat[1], seat[2], &nic.name, reason];
                self.refused.with_label_values(&labels).inc_by(count);
            }
        }
    }

    /// Requests, and the API server's addresses, of which there are a few, in their order.
    fn tell_arbiter(&self, leases: &Leases) {
        for (request, outcome, count) in leases.counts() {
            self.requests.with_label_values(&[request, outcome]).inc_by(count);
        }
        for (request, took) in leases.took() {
            self.took.tell(&[request], &took.buckets_us(), took.sum());
        }
        for (place, server) in (0..).zip(leases.server().addresses()) {
            self.places.with_label_values(&[server.as_str()]).set(place);
        }
    }

    /// Of the roles that are configured, so that one without a path that works is told, too.
    fn tell_networks(&self, networks: &NodeNetworks) {
        for (role, paths) in &networks.0 {
            for state in PATH_STATES {
                let of_state = paths.iter().filter(|path| path_state(path.state) == state);
                let count = i64::try_from(of_state.count()).unwrap_or(i64::MAX);
                self.paths.with_label_values(&[role.name(), state]).set(count);
            }
        }
    }
}

fn path_state(state: PathState) -> &'static str {
    match state {
        PathState::Up => "up",
        PathState::SetDown | PathState::NoCarrier | PathState::AddressUnusable => "down",
        PathState::NoInterface | PathState::NoAddress => "missing",
        PathState::SameInterface => "shared",
    }
}

/// Values in microseconds and how often each came, if that is what an engine says.
fn counts(told: &Value) -> Option<Vec<(u64, u64)>> {
    serde_json::from_value(told.clone()).ok()
}
