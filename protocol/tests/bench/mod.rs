//! Two cores, a record and obedient drivers: everything works at once, unless a test says otherwise.

use ftvm_protocol::core::{
    Action, Config, Core, EndReason, Event, Gate, GuestReport, HeaderReport, ReadOutcome, Seal, SeatReport,
    StoredHeader, SwapOutcome, Timing,
};
use ftvm_protocol::header::SeatHeader;
use ftvm_protocol::identity::{ArbiterUid, Incarnation, LinkId, SeatId};
use ftvm_protocol::message::Message;
use ftvm_protocol::record::{Phase, Record, Snapshot};
use ftvm_protocol::wire::VERSION_MAX;

/// What becomes of a seat's requests to the arbiter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arbiter {
    /// Answers at once.
    Works,
    /// No answer.
    Away,
    /// Writes land, their answers say unknown; reads work.
    LosesWriteAnswers,
    /// Reads work; writes neither land nor are answered.
    SwallowsWrites,
    /// Reads work; writes are refused.
    RefusesWrites,
}

pub struct Seat {
    pub core: Core,
    pub me: Incarnation,
    pub header: Option<SeatHeader>,
    pub arbiter: Arbiter,
    /// Everything that the core wanted, newest last.
    pub actions: Vec<Action>,
    pub ended: Option<EndReason>,
    /// Its node is gone with its disk; all that can be told is this of its guest.
    pub lost: Option<GuestReport>,
    /// Nothing that it sends arrives.
    pub mute: bool,
    /// Seals are left to the test.
    pub manual_seals: bool,
    /// No header gets to its disk, and none fails.
    pub header_hangs: bool,
    epoch: u64,
}

impl Seat {
    fn new(seat: u128, start: u64, header: Option<SeatHeader>, other: u128, now_ms: u64) -> Self {
        let me = Incarnation {
            seat: SeatId(seat),
            start,
        };
        let config = Config {
            incarnation: me,
            header: header.clone().map_or(StoredHeader::Absent, StoredHeader::Found),
            other_seats: vec![SeatId(other)],
            timing: Timing::default(),
            now_ms,
        };
        Self {
            core: Core::new(config),
            me,
            header,
            arbiter: Arbiter::Works,
            actions: Vec::new(),
            ended: None,
            lost: None,
            mute: false,
            manual_seals: false,
            header_hangs: false,
            epoch: 0,
        }
    }

    /// Did the core ever want this?
    pub fn wanted(&self, test: impl Fn(&Action) -> bool) -> bool {
        self.actions.iter().any(test)
    }
}

pub struct Bench {
    pub now_ms: u64,
    pub seats: [Seat; 2],
    pub record: Option<Snapshot>,
    /// What the hellos of the next link agree on.
    pub version: u16,
    link: Option<LinkId>,
    links: u64,
}

impl Bench {
    /// Two new seats; the first has the original disk.
    pub fn new() -> Self {
        let header = SeatHeader::genesis(SeatId(1), ArbiterUid(1));
        let record = Record::genesis(SeatId(1), Phase::Running);
        let seats = [Seat::new(1, 11, Some(header), 2, 0), Seat::new(2, 21, None, 1, 0)];
        let record = Some(Snapshot {
            record,
            uid: ArbiterUid(1),
            version: 1,
        });
        Self {
            now_ms: 0,
            seats,
            record,
            version: VERSION_MAX,
            link: None,
            links: 0,
        }
    }

    /// A protected pair: seat 0 active, seat 1 standby.
    pub fn pair() -> Self {
        Self::pair_speaking(VERSION_MAX)
    }

    /// The same, one of them of an older version.
    pub fn pair_speaking(version: u16) -> Self {
        let mut bench = Self::new();
        bench.version = version;
        bench.pass(100);
        bench.connect();
        bench.pass(500);
        assert!(
            bench.seats[0].core.status().protected,
            "{:?}",
            bench.seats[0].core.status()
        );
        bench
    }

    pub fn connect(&mut self) {
        self.links += 1;
        let link = LinkId(self.links);
        self.link = Some(link);
        for at in 0..2 {
            let peer = self.seats[1 - at].me;
            let version = self.version;
            self.step(at, Event::Connected { link, peer, version });
        }
    }

    pub fn is_connected(&self) -> bool {
        self.link.is_some()
    }

    pub fn cut(&mut self) {
        if let Some(link) = self.link.take() {
            for at in 0..2 {
                self.step(at, Event::Disconnected { link });
            }
        }
    }

    /// Time passes in steps of 10 ms.
    pub fn pass(&mut self, ms: u64) {
        let until_ms = self.now_ms + ms;
        while self.now_ms < until_ms {
            self.now_ms += 10;
            for at in 0..2 {
                self.step(at, Event::Tick);
            }
        }
    }

    /// One event, and everything that follows at once.
    pub fn step(&mut self, at: usize, event: Event) {
        let mut todo = vec![(at, event)];
        while !todo.is_empty() {
            let (at, event) = todo.remove(0);
            if self.seats[at].ended.is_some() || self.seats[at].lost.is_some() {
                continue;
            }
            let mut actions = Vec::new();
            let now_ms = self.now_ms;
            self.seats[at].core.step(now_ms, event, &mut actions);
            for action in actions {
                self.seats[at].actions.push(action.clone());
                self.execute(at, action, &mut todo);
            }
        }
    }

    fn execute(&mut self, at: usize, action: Action, todo: &mut Vec<(usize, Event)>) {
        match action {
            Action::Send { link, message } if !self.seats[at].mute && self.link == Some(link) => {
                self.carry(at, link, &message, todo);
            }
            Action::WriteHeader { request, header } if !self.seats[at].header_hangs => {
                self.seats[at].header = Some(header);
                todo.push((at, Event::HeaderWritten { request }));
            }
            Action::ReadRecord { request, .. } => {
                let outcome = match self.seats[at].arbiter {
                    Arbiter::Away => ReadOutcome::Unreachable,
                    _ => self.record.clone().map_or(ReadOutcome::Gone, ReadOutcome::Found),
                };
                todo.push((at, Event::RecordRead { request, outcome }));
            }
            Action::SwapRecord {
                request,
                uid,
                version,
                record,
                ..
            } => {
                if self.seats[at].arbiter == Arbiter::SwallowsWrites {
                    return;
                }
                let outcome = self.swap(at, uid, version, record);
                todo.push((at, Event::RecordSwapped { request, outcome }));
            }
            Action::AskSeats { request, seats, .. } => {
                let reports = seats.iter().map(|seat| self.report(*seat)).collect();
                todo.push((at, Event::SeatsReported { request, reports }));
            }
            Action::BootFromDisk { first_epoch, .. } => self.seats[at].epoch = first_epoch,
            Action::LoadAndRun { epoch, .. } => self.seats[at].epoch = epoch + 1,
            Action::StreamResync { .. } => todo.push((at, self.seal_event(at, Seal::JoinCut))),
            Action::Seal(seal) if !self.seats[at].manual_seals => todo.push((at, self.seal_event(at, seal))),
            Action::End(reason) => self.seats[at].ended = Some(reason),
            _ => {}
        }
        // An obedient stream: what a leader sealed is staged at once.
        if let Some((_, Event::EpochSealed { epoch, .. })) = todo.last()
            && let Some(session) = self.seats[at].core.status().session
        {
            let event = Event::EpochStaged {
                session,
                epoch: *epoch,
                leader_acked: self.seats[at].core.status().acked,
            };
            todo.push((1 - at, event));
        }
    }

    /// Over the wire, to a driver that closes a link which brings what its version lacks.
    fn carry(&mut self, from: usize, link: LinkId, message: &Message, todo: &mut Vec<(usize, Event)>) {
        let payload = message.encode(VERSION_MAX).expect("encodes");
        match Message::decode(&payload, self.version) {
            Ok(message) => todo.push((1 - from, Event::Received { link, message })),
            Err(_) => {
                self.link = None;
                todo.extend([0, 1].map(|at| (at, Event::Disconnected { link })));
            }
        }
    }

    fn swap(&mut self, at: usize, uid: ArbiterUid, version: u64, record: Record) -> SwapOutcome {
        if matches!(self.seats[at].arbiter, Arbiter::Away | Arbiter::RefusesWrites) {
            return SwapOutcome::NotSent;
        }
        match &mut self.record {
            Some(now) if now.uid == uid && now.version == version => {
                *now = Snapshot {
                    record,
                    uid,
                    version: version + 1,
                };
                match self.seats[at].arbiter {
                    Arbiter::LosesWriteAnswers => SwapOutcome::Unknown,
                    _ => SwapOutcome::Won(now.clone()),
                }
            }
            Some(_) => SwapOutcome::Conflict,
            None => SwapOutcome::NotSent,
        }
    }

    fn report(&self, seat: SeatId) -> SeatReport {
        let found = self.seats.iter().find(|other| other.me.seat == seat);
        if let Some(guest) = found.and_then(|other| other.lost) {
            let header = HeaderReport::Unreadable;
            return SeatReport { seat, header, guest };
        }
        let header = found
            .and_then(|other| other.header.clone())
            .map_or(HeaderReport::Absent, HeaderReport::Found);
        let holds = found.is_some_and(|other| other.ended.is_none() && other.core.status().holds_guest);
        SeatReport {
            seat,
            header,
            guest: if holds { GuestReport::Present } else { GuestReport::None },
        }
    }

    pub fn seal_event(&mut self, at: usize, seal: Seal) -> Event {
        let epoch = self.seats[at].epoch;
        self.seats[at].epoch += 1;
        Event::EpochSealed { epoch, seal }
    }

    /// The active seals an ordinary epoch; the standby stages it.
    pub fn epoch(&mut self, at: usize) -> u64 {
        self.seal_and_stage(at, Seal::Ordinary)
    }

    /// The active seals an epoch in this way; the standby stages it.
    pub fn seal_and_stage(&mut self, at: usize, seal: Seal) -> u64 {
        let session = self.seats[at].core.status().session.expect("a session");
        let epoch = self.seal(at, seal);
        let leader_acked = self.seats[at].core.status().acked;
        self.step(
            1 - at,
            Event::EpochStaged {
                session,
                epoch,
                leader_acked,
            },
        );
        epoch
    }

    /// The active seals an epoch in this way.
    pub fn seal(&mut self, at: usize, seal: Seal) -> u64 {
        let event = self.seal_event(at, seal);
        let Event::EpochSealed { epoch, .. } = event else {
            unreachable!("a seal")
        };
        self.step(at, event);
        epoch
    }

    /// The process of that seat ends and starts again.
    pub fn restart(&mut self, at: usize) {
        self.cut();
        let (me, header, other) = (self.seats[at].me, self.seats[at].header.clone(), self.seats[1 - at].me);
        self.seats[at] = Seat::new(me.seat.0, me.start + 1, header, other.seat.0, self.now_ms);
    }

    /// Both nodes lose power, and of one nothing comes back; `guest` is what can be told of it.
    pub fn power_cut(&mut self, lost: usize, guest: GuestReport) {
        self.link = None;
        self.seats[lost].lost = Some(guest);
        self.restart(1 - lost);
    }

    pub fn gate(&self, at: usize) -> Gate {
        self.seats[at].core.gate()
    }

    pub fn say(&mut self, from: usize, message: Message) {
        if let Some(link) = self.link {
            self.step(1 - from, Event::Received { link, message });
        }
    }
}
