//! The metrics of one scrape.

use std::collections::BTreeMap;

use ftvm_crds::networks::{NodeNetworks, PathState};
use ftvm_engine::control::{FailingDisk, Role, Status, StorageKind};
use ftvm_engine::seat_io::Reason;
use prometheus::core::Collector;
use prometheus::{IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};
use serde_json::Value;

use super::{STATUS_PATIENCE, Sources};
use crate::arbiter::Leases;
use crate::config::{DiskConfig, NicConfig, SeatConfig};
use crate::kubernetes::node::NodeSeat;
use crate::seat_socket::{DiskProgress, role_name};

/// Labels of what is told of a seat.
const SEAT: [&str; 3] = ["namespace", "vm", "seat"];

/// Figures of an engine, and how long their names are: an engine that its guest has taken over must not fill the memory of whoever scrapes.
const FIGURES_MAX: usize = 128;
const FIGURE_NAME_BYTES_MAX: usize = 64;

/// States of the node's paths.
pub const PATH_STATES: [&str; 4] = ["up", "down", "missing", "shared"];

/// Name and labels of each metric of a node-daemon, for whoever writes rules about them.
///
/// # Errors
/// If a name is used twice.
pub fn described() -> prometheus::Result<BTreeMap<String, Vec<String>>> {
    Ok(Page::new()?.families.labels)
}

/// Whatever can be told.
#[derive(Default)]
struct Families {
    registry: Registry,
    /// By name.
    labels: BTreeMap<String, Vec<String>>,
}

impl Families {
    fn add<C: Collector + Clone + 'static>(&mut self, family: C) -> prometheus::Result<C> {
        for described in family.desc() {
            self.labels
                .insert(described.fq_name.clone(), described.variable_labels.clone());
        }
        self.registry.register(Box::new(family.clone()))?;
        Ok(family)
    }

    fn gauge(&mut self, name: &str, help: &str) -> prometheus::Result<IntGauge> {
        self.add(IntGauge::new(name, help)?)
    }

    fn gauges(&mut self, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntGaugeVec> {
        self.add(IntGaugeVec::new(Opts::new(name, help), labels)?)
    }

    fn counters(&mut self, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntCounterVec> {
        self.add(IntCounterVec::new(Opts::new(name, help), labels)?)
    }
}

/// Made anew for each scrape: nothing of a seat that is gone stays behind.
pub struct Page {
    families: Families,
    seats: IntGauge,
    role: IntGaugeVec,
    protected: IntGaugeVec,
    term: IntGaugeVec,
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
    requests_us: IntCounterVec,
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
    /// If a name is used twice.
    pub fn new() -> prometheus::Result<Page> {
        let mut families = Families::default();
        let told = &mut families;
        Ok(Page {
            seats: told.gauge("ftvm_seats", "Seats of this node")?,
            role: told.gauges(
                "ftvm_seat_role",
                "1 for the role that the seat has now",
                &["namespace", "vm", "seat", "role"],
            )?,
            protected: told.gauges("ftvm_seat_protected", "1 while the seat leads a protected pair", &SEAT)?,
            term: told.gauges("ftvm_seat_term", "Term of the record as the engine knows it", &SEAT)?,
            reachable: told.gauges(
                "ftvm_seat_arbiter_reachable",
                "0 after the engine's last arbiter request failed",
                &SEAT,
            )?,
            connected: told.gauges(
                "ftvm_seat_program_connected",
                "1 while the pod's program is connected",
                &SEAT,
            )?,
            progress: told.gauges(
                "ftvm_seat_progress_percent",
                "Progress of preparing a disk, or of a resync, while there is one",
                &SEAT,
            )?,
            starts: told.counters(
                "ftvm_seat_engine_starts_total",
                "Engines of the seat that this daemon started",
                &SEAT,
            )?,
            exit_code: told.gauges(
                "ftvm_seat_engine_exit_code",
                "Exit code of the seat's last engine that this daemon saw end",
                &SEAT,
            )?,
            figures: told.gauges(
                "ftvm_engine",
                "Counters and measures of the engine by name",
                &["namespace", "vm", "seat", "name"],
            )?,
            refused: told.counters(
                "ftvm_guest_frames_refused_total",
                "Frames of the guest that did not leave, by card and reason, since the engine started",
                &["namespace", "vm", "seat", "nic", "reason"],
            )?,
            disks: told.gauges(
                "ftvm_seat_disk",
                "1 for the state of each of the seat's disks under its engine: works, failed, full, hangs",
                &["namespace", "vm", "seat", "disk", "state"],
            )?,
            storage_failures: told.gauges(
                "ftvm_seat_storage_failures",
                "Engines in a row that ended because of the seat's storage, none of which served for long",
                &SEAT,
            )?,
            requests: told.counters(
                "ftvm_arbiter_requests_total",
                "Requests to the API server for records, by outcome",
                &["request", "outcome"],
            )?,
            requests_us: told.counters(
                "ftvm_arbiter_requests_us_total",
                "Time that requests to the API server for records took, whatever came of them, in microseconds",
                &["request"],
            )?,
            places: told.gauges(
                "ftvm_api_server_place",
                "When an address of the API server is asked for records: the one with 0 first",
                &["server"],
            )?,
            paths: told.gauges(
                "ftvm_node_paths",
                "Paths of the node's networks by role and state: up, down, missing, shared",
                &["role", "state"],
            )?,
            kvm_works: told.gauge("ftvm_kvm_works", "1 while the KVM self-test passes")?,
            synced: told.gauge("ftvm_api_server_synced", "1 once the API server's objects are known")?,
            build: told.gauges(
                "ftvm_build_info",
                "1, with the program and its version",
                &["component", "version"],
            )?,
            families,
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
        TextEncoder::new().encode_to_string(&self.families.registry.gather())
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
        self.term
            .with_label_values(&labels)
            .set(i64::try_from(engine.term).unwrap_or(i64::MAX));
        self.reachable
            .with_label_values(&labels)
            .set(i64::from(engine.arbiter_reachable));
        self.tell_disks(labels, &config.disks, &engine.failing_disks);
        self.tell_refused(labels, &config.nics, engine.counters.get("nic_refused"));
        let figures = engine.counters.iter().filter(|(name, _)| is_figure(name));
        let figures = figures.filter_map(|(name, value)| Some((name, value.as_i64()?)));
        for (name, value) in figures.take(FIGURES_MAX) {
            self.figures
                .with_label_values(&[labels[0], labels[1], labels[2], name])
                .set(value);
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
        for (request, took_us) in leases.took_us() {
            self.requests_us.with_label_values(&[request]).inc_by(took_us);
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

/// Is it a name that an engine's figure can have?
fn is_figure(name: &str) -> bool {
    let known = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    name.len() <= FIGURE_NAME_BYTES_MAX && name.bytes().all(known)
}
