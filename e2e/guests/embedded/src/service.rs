//! The service: connections on all cards, and what a request does. PROTOCOL.md describes it for clients.

use crate::acpi::Acpi;
use crate::apic;
use crate::blocks::Blocks;
use crate::card::{ALL_CONNECTIONS, Card};
use crate::cpu::{self, out8};
use crate::guest_blocks::{BLOCK_REPORT_BYTES, BlockLoad};
use crate::guest_journal::{Record, Tally};
use crate::journal::{BATCH_RECORDS, Journal, Past};
use crate::memory::Region;
use crate::protocol::{
    ANSWER_BYTES, Answer, CHURN_WORD_ONLY, Checksum, MAX_CARDS, MAX_PAYLOAD_BYTES, Op, REFUSED, REQUEST_BYTES, Request,
    fill_bulk, next_chain,
};
use crate::statics::Once;
use crate::time::{self, Nanoseconds};
use crate::worker::{self, Churn};
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::{Socket, State as TcpState};

/// Requests of one connection that are served before the others' turn.
const REQUESTS_A_TURN: usize = 64;
/// How long a reset or power-off waits for the client's TCP to acknowledge the answer.
const ENDING_NS: u64 = 200_000_000;

static WAITING: Once<[Waiting; ALL_CONNECTIONS]> = Once::new([Waiting::NEW; ALL_CONNECTIONS]);
static CONNECTIONS: Once<[Option<Connection>; ALL_CONNECTIONS]> = Once::new([const { None }; ALL_CONNECTIONS]);

/// What a connection is at.
enum Phase {
    /// The next request.
    Ready,
    /// Taking the payload of a sink.
    Sink { request: Request, left: u64, sum: Checksum },
    /// Sending the data of a bulk.
    Bulk { seq: u64, offset: u64, size: u64 },
    /// Waiting until every vCPU has filled its pages.
    Churn { request: Request, ticket: u64 },
    /// Waiting until memory and journal are checked.
    Verify { request: Request, ticket: u64 },
    /// Waiting until the block load is over.
    Block { request: Request },
    /// Answered; when the client has it, the machine ends.
    Ending { op: Op, deadline: Nanoseconds },
}

/// Answers that wait for their journal records, oldest first.
struct Waiting {
    answers: [(u64, Answer); BATCH_RECORDS],
    first: usize,
    count: usize,
}

impl Waiting {
    const NEW: Self = Self {
        answers: [(0, EMPTY_ANSWER); BATCH_RECORDS],
        first: 0,
        count: 0,
    };

    fn push(&mut self, record: u64, answer: Answer) {
        self.answers[(self.first + self.count) % BATCH_RECORDS] = (record, answer);
        self.count += 1;
    }

    fn front(&self) -> Option<(u64, Answer)> {
        (self.count > 0).then(|| self.answers[self.first])
    }

    fn pop(&mut self) {
        self.first = (self.first + 1) % BATCH_RECORDS;
        self.count -= 1;
    }
}

const EMPTY_ANSWER: Answer = Answer {
    op: 0,
    seq: 0,
    count: 0,
    chain: 0,
    guest_time_ns: 0,
    journal_seq: 0,
    boots: 0,
    memory_errors: 0,
    journal_errors: 0,
    vcpus: 0,
    churned_pages: 0,
    work: 0,
};

struct Connection {
    card: usize,
    handle: SocketHandle,
    phase: Phase,
    waiting: &'static mut Waiting,
}

/// What requests change, apart from connections.
struct Machine {
    journal: Journal,
    blocks: Blocks,
    region: Region,
    acpi: Acpi,
    vcpus: usize,
    /// By card.
    tallies: [Tally; MAX_CARDS],
}

/// The network cards, their connections and the machine behind them.
pub struct Service {
    cards: &'static mut [Option<Card>; MAX_CARDS],
    connections: &'static mut [Option<Connection>; ALL_CONNECTIONS],
    machine: Machine,
    port: u16,
}

impl Service {
    /// Listens on all cards.
    pub fn start(
        cards: &'static mut [Option<Card>; MAX_CARDS],
        port: u16,
        journal: Journal,
        past: Past,
        region: Region,
        acpi: Acpi,
        vcpus: usize,
    ) -> Self {
        let connections = CONNECTIONS.take();
        let mut free = connections.iter_mut().zip(WAITING.take().iter_mut());
        for card in cards.iter_mut().flatten() {
            let number = card.number;
            card.make_sockets(|handle| {
                let (place, waiting) = free.next().expect("as many as all cards' sockets");
                *place = Some(Connection {
                    card: number,
                    handle,
                    phase: Phase::Ready,
                    waiting,
                });
            });
        }
        let machine = Machine {
            journal,
            blocks: Blocks::new(),
            region,
            acpi,
            vcpus,
            tallies: past,
        };
        Self {
            cards,
            connections,
            machine,
            port,
        }
    }

    /// Goes on as far as possible without waiting.
    pub fn poll(&mut self) {
        loop {
            let now = time::now();
            let mut progress = false;
            for card in self.cards.iter_mut().flatten() {
                progress |= card.poll(now);
            }
            progress |= self.machine.journal.poll();
            if self.machine.poll_blocks() {
                // There may be more at once, but this vCPU's worker has its turn before.
                cpu::this().set_wake();
            }
            for connection in self.connections.iter_mut().flatten() {
                let card = self.cards[connection.card].as_mut().expect("it made this connection");
                let socket = card.sockets.get_mut::<Socket>(connection.handle);
                progress |= connection.serve(socket, &mut self.machine, self.port);
            }
            self.cards.iter_mut().flatten().for_each(Card::flush);
            if !progress {
                return;
            }
        }
    }

    /// When [`Service::poll`] has to run again though no interrupt came.
    pub fn next(&mut self, now: Nanoseconds) -> Option<Nanoseconds> {
        let stacks = self.cards.iter_mut().flatten().filter_map(|card| card.next(now));
        let connections = self.connections.iter().flatten();
        let ending = connections.filter_map(|connection| match connection.phase {
            Phase::Ending { deadline, .. } => Some(deadline),
            _ => None,
        });
        stacks.chain(ending).min()
    }
}

impl Connection {
    /// Serves what can be served; true if anything moved.
    fn serve(&mut self, socket: &mut Socket<'_>, machine: &mut Machine, port: u16) -> bool {
        if socket.state() == TcpState::Closed {
            if matches!(self.phase, Phase::Block { .. }) {
                machine.blocks.abandon();
            }
            self.phase = Phase::Ready;
            self.waiting.count = 0;
            socket.listen(port).expect("the port is not 0, the socket is closed");
            return true;
        }
        if matches!(self.phase, Phase::Block { .. }) && socket.state() == TcpState::CloseWait {
            // A client that says no more waits for what there is.
            machine.blocks.stop();
        }
        let mut moved = false;
        for _ in 0..REQUESTS_A_TURN {
            moved |= self.release(socket, machine);
            if !self.advance(socket, machine) {
                break;
            }
            moved = true;
        }
        let idle = matches!(self.phase, Phase::Ready) && self.waiting.count == 0;
        if idle && socket.state() == TcpState::CloseWait && socket.recv_queue() < REQUEST_BYTES {
            socket.close();
            moved = true;
        }
        moved
    }

    /// Sends the answers whose records have become durable, or never will.
    fn release(&mut self, socket: &mut Socket<'_>, machine: &Machine) -> bool {
        let mut moved = false;
        while let Some((record, mut answer)) = self.waiting.front() {
            let durable = record <= machine.journal.durable_seq;
            if !durable && machine.journal.usable() || !room_for_answer(socket) {
                break;
            }
            if !durable {
                answer.op |= REFUSED;
            }
            send(
                socket,
                &machine.state(Answer {
                    journal_seq: machine.journal.durable_seq,
                    ..answer
                }),
            );
            self.waiting.pop();
            moved = true;
        }
        moved
    }

    /// One step of the current request, or the next request. False if it has to wait.
    fn advance(&mut self, socket: &mut Socket<'_>, machine: &mut Machine) -> bool {
        match &mut self.phase {
            Phase::Ready => return self.next_request(socket, machine),
            Phase::Sink { request, left, sum } => {
                if *left > 0 {
                    let taken = socket.recv(|bytes| {
                        let part = bytes.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                        sum.update(&bytes[..part]);
                        (part, part as u64)
                    });
                    let taken = taken.unwrap_or(0);
                    *left -= taken;
                    return taken > 0;
                }
                if !room_for_answer(socket) {
                    return false;
                }
                let chain = sum.finish();
                let answer = Answer {
                    chain,
                    ..machine.answer(self.card, *request)
                };
                send(socket, &answer);
            }
            Phase::Bulk { seq, offset, size } => {
                if *offset < *size {
                    let sent = socket.send(|bytes| {
                        let part = bytes.len().min(usize::try_from(*size - *offset).unwrap_or(usize::MAX));
                        fill_bulk(*seq, *offset, &mut bytes[..part]);
                        (part, part as u64)
                    });
                    let sent = sent.unwrap_or(0);
                    *offset += sent;
                    return sent > 0;
                }
            }
            Phase::Churn { request, ticket } => {
                if !worker::churn_ready(*ticket, machine.vcpus) || !room_for_answer(socket) {
                    return false;
                }
                send(socket, &machine.answer(self.card, *request));
            }
            Phase::Verify { request, ticket } => {
                let done = worker::verified(*ticket, machine.vcpus) && !machine.journal.verifying();
                if !done || !room_for_answer(socket) {
                    return false;
                }
                send(socket, &machine.answer(self.card, *request));
            }
            Phase::Block { request } => {
                if !room_for(socket, ANSWER_BYTES + BLOCK_REPORT_BYTES) {
                    return false;
                }
                let Some(report) = machine.blocks.report() else {
                    return false;
                };
                send(socket, &machine.answer(self.card, *request));
                let _ = socket.send_slice(&report.encode());
            }
            Phase::Ending { op, deadline } => {
                if socket.send_queue() == 0 || time::now() >= *deadline {
                    machine.end(*op);
                }
                return false;
            }
        }
        self.phase = Phase::Ready;
        true
    }

    fn next_request(&mut self, socket: &mut Socket<'_>, machine: &mut Machine) -> bool {
        let mut bytes = [0; REQUEST_BYTES];
        if socket.recv_queue() < REQUEST_BYTES || socket.peek_slice(&mut bytes) != Ok(REQUEST_BYTES) {
            return false;
        }
        let Ok(request) = Request::decode(&bytes) else {
            socket.abort();
            return true;
        };
        let op = Op::from_u32(request.op);
        if op == Some(Op::Journal) && machine.journal.usable() {
            if !machine.journal.ready() || self.waiting.count == BATCH_RECORDS {
                return false;
            }
            consume(socket);
            let (record, answer) = machine.journal_increment(self.card, request);
            self.waiting.push(record, answer);
            return true;
        }
        let churn_ready = || worker::churn_ready(worker::last_churn(), machine.vcpus);
        let busy = match op {
            Some(Op::SetChurn) => !churn_ready(),
            // Until then the churn may use pages that it is to leave.
            Some(Op::Block) => machine.blocks.busy() || !churn_ready(),
            _ => false,
        };
        if self.waiting.count > 0 || busy || !room_for_answer(socket) {
            return false;
        }
        consume(socket);
        self.start(socket, machine, request, op);
        true
    }

    /// Starts a request that needs no earlier answer to go first.
    fn start(&mut self, socket: &mut Socket<'_>, machine: &mut Machine, request: Request, op: Option<Op>) {
        match op {
            Some(Op::Block) if machine.start_blocks(&request) => self.phase = Phase::Block { request },
            Some(Op::SetChurn) if request.arg <= machine.free_pages() => {
                let rate = request.arg2 & !CHURN_WORD_ONLY;
                let words = request.arg2 & CHURN_WORD_ONLY != 0;
                let ticket = worker::order_churn(Churn {
                    pages: request.arg,
                    rate,
                    words,
                });
                machine.wake_others();
                self.phase = Phase::Churn { request, ticket };
            }
            Some(Op::Verify) => {
                machine.journal.verify();
                let ticket = worker::order_verify();
                machine.wake_others();
                self.phase = Phase::Verify { request, ticket };
            }
            Some(Op::Sink) if request.arg <= MAX_PAYLOAD_BYTES => {
                self.phase = Phase::Sink {
                    request,
                    left: request.arg,
                    sum: Checksum::default(),
                };
            }
            Some(Op::Bulk) if request.arg <= MAX_PAYLOAD_BYTES => {
                send(socket, &machine.answer(self.card, request));
                self.phase = Phase::Bulk {
                    seq: request.seq,
                    offset: 0,
                    size: request.arg,
                };
            }
            Some(op @ (Op::Reset | Op::PowerOff)) => {
                send(socket, &machine.answer(self.card, request));
                self.phase = Phase::Ending {
                    op,
                    deadline: time::now() + ENDING_NS,
                };
            }
            _ => {
                let done = op.is_some_and(|op| machine.apply(op, self.card, &request));
                let refused = if done { 0 } else { REFUSED };
                send(
                    socket,
                    &Answer {
                        op: request.op | refused,
                        ..machine.answer(self.card, request)
                    },
                );
                if op == Some(Op::Sink) {
                    // Its payload would be taken for requests.
                    socket.close();
                }
            }
        }
    }
}

impl Machine {
    /// The requests that are done at once. False if it is refused.
    fn apply(&mut self, op: Op, card: usize, request: &Request) -> bool {
        match op {
            Op::Increment => self.increment(card, request.seq),
            Op::Status => {}
            Op::SetWork if request.arg <= 1 => {
                worker::order_work(request.arg == 1);
                self.wake_others();
            }
            Op::Damage => return worker::damage(&self.region, request.arg, request.arg2),
            _ => return false,
        }
        true
    }

    fn increment(&mut self, card: usize, seq: u64) {
        let tally = &mut self.tallies[card];
        tally.count += 1;
        tally.chain = next_chain(tally.chain, seq, tally.count);
    }

    fn journal_increment(&mut self, card: usize, request: Request) -> (u64, Answer) {
        self.increment(card, request.seq);
        let record = Record {
            request_seq: request.seq,
            tallies: self.tallies,
            guest_time_ns: time::now(),
            ..Record::default()
        };
        (self.journal.append(record), self.answer(card, request))
    }

    /// An answer to `request`, which came by this card, with the state as it is now.
    fn answer(&self, card: usize, request: Request) -> Answer {
        let tally = self.tallies[card];
        let known = Answer {
            op: request.op,
            seq: request.seq,
            count: tally.count,
            chain: tally.chain,
            ..EMPTY_ANSWER
        };
        self.state(known)
    }

    /// `answer` with everything that is not the request's own as it is now.
    fn state(&self, answer: Answer) -> Answer {
        let totals = worker::totals();
        Answer {
            guest_time_ns: time::now(),
            journal_seq: self.journal.durable_seq,
            boots: self.journal.boots,
            memory_errors: totals.memory_errors,
            journal_errors: self.journal.errors,
            vcpus: self.vcpus as u32,
            churned_pages: totals.churned,
            work: totals.work,
            ..answer
        }
    }

    /// Begins a block load. False if it is refused.
    fn start_blocks(&mut self, request: &Request) -> bool {
        let Some(order) = BlockLoad::decode(request.arg, request.arg2) else {
            return false;
        };
        let bytes = u64::from(order.block_bytes) * u64::from(order.depth);
        let (Some((first_page, data)), Some(disk)) = (self.region.tail(bytes), self.journal.first_disk()) else {
            return false;
        };
        worker::churn_pages() <= first_page && self.blocks.start(order, first_page, data, disk)
    }

    fn poll_blocks(&mut self) -> bool {
        let disk = self.journal.first_disk();
        disk.is_some_and(|disk| self.blocks.poll(disk))
    }

    /// How many pages the churn may have.
    fn free_pages(&self) -> u64 {
        self.blocks.first_page().unwrap_or(self.region.pages())
    }

    fn wake_others(&self) {
        (1..self.vcpus).for_each(apic::wake);
    }

    /// Ends the machine. Returns only if nothing heeds it.
    fn end(&self, op: Op) {
        const RESET_CONTROL: u16 = 0xCF9;
        const KEYBOARD_CONTROLLER: u16 = 0x64;
        /// The machine may end a little after it was told to.
        const GRACE_US: u64 = 1_000_000;
        if op == Op::PowerOff {
            log!("power off");
            self.acpi.power_off();
            time::spin_us(GRACE_US);
            log!("power off: ACPI names no way, or it had no effect");
        } else {
            log!("reset");
            out8(RESET_CONTROL, 0x02);
            out8(RESET_CONTROL, 0x06);
            time::spin_us(GRACE_US);
            out8(KEYBOARD_CONTROLLER, 0xFE);
            time::spin_us(GRACE_US);
            log!("reset: neither port {RESET_CONTROL:#x} nor {KEYBOARD_CONTROLLER:#x} had an effect");
        }
        cpu::stop();
    }
}

fn room_for_answer(socket: &Socket<'_>) -> bool {
    room_for(socket, ANSWER_BYTES)
}

fn room_for(socket: &Socket<'_>, bytes: usize) -> bool {
    socket.send_capacity() - socket.send_queue() >= bytes
}

/// Sends an answer. There is room: callers ask first. A connection that closed meanwhile gets none.
fn send(socket: &mut Socket<'_>, answer: &Answer) {
    let _ = socket.send_slice(&answer.encode());
}

/// Takes the request that was peeked at out of the buffer.
fn consume(socket: &mut Socket<'_>) {
    let mut bytes = [0; REQUEST_BYTES];
    let _ = socket.recv_slice(&mut bytes);
}
