//! What every answer must say, and what it means if it says something else. No I/O, no clock.
//!
//! One client is the only one that increments, so the guest's whole state after each request is known beforehand. After
//! a contradiction the ledger goes on from what the guest said, so that each loss is counted once.
use std::collections::VecDeque;

use serde::Serialize;

use crate::guest_protocol::{Answer, Checksum, Op, REFUSED, next_chain};

/// A request that was sent and not yet answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sent {
    /// Its number.
    pub seq: u64,
    /// What it asks for.
    pub op: Op,
    /// For [`Op::Sink`] the checksum of its payload.
    pub payload_checksum: u64,
}

/// Everything that must not happen, counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Findings {
    /// Answered increments that a later state does not contain.
    pub lost_answers: u64,
    /// Answered journal records that a later state does not contain.
    pub lost_journal_records: u64,
    /// Answers that came twice.
    pub duplicated_answers: u64,
    /// Requests that the guest carried out more than once.
    pub applied_twice: u64,
    /// States with the right number of increments, but not of those that were sent: two histories.
    pub contradictions: u64,
    /// Starts of the guest that were seen from within the connection.
    pub reboots: u64,
    /// Answers whose guest time is before that of an earlier answer.
    pub time_steps_back: u64,
    /// Answers to nothing that was asked, or not in turn.
    pub out_of_step: u64,
    /// Requests that the guest refused.
    pub refused: u64,
    /// Bulk data or checksums that were wrong.
    pub corrupt_payloads: u64,
    /// Faulty memory pages that the guest found in itself.
    pub memory_errors: u64,
    /// Faulty or missing journal records that the guest found on its disk.
    pub journal_errors: u64,
}

impl Findings {
    /// Answers that a client was given and that turned out not to be true later, of any kind.
    pub fn lost_in_all(&self) -> u64 {
        self.lost_answers + self.lost_journal_records + self.contradictions
    }

    /// Each kind with its number, for those that are not zero.
    pub fn complaints(&self) -> Vec<(&'static str, u64)> {
        let all = [
            ("answers lost", self.lost_answers),
            ("answered journal records lost", self.lost_journal_records),
            ("answers that came twice", self.duplicated_answers),
            ("requests carried out twice", self.applied_twice),
            ("answers of another history", self.contradictions),
            ("restarts of the guest", self.reboots),
            ("steps back of the guest's clock", self.time_steps_back),
            ("answers out of turn", self.out_of_step),
            ("requests refused", self.refused),
            ("payloads corrupted", self.corrupt_payloads),
            ("faulty memory pages found by the guest", self.memory_errors),
            ("faulty journal records found by the guest", self.journal_errors),
        ];
        all.into_iter().filter(|(_, count)| *count > 0).collect()
    }

    /// True if nothing at all was found.
    pub fn is_clean(&self) -> bool {
        *self == Self::default()
    }
}

/// The guest's state as far as it was ever answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Known {
    count: u64,
    chain: u64,
    guest_time_ns: u64,
    journal_seq: u64,
    boots: u32,
    memory_errors: u32,
    journal_errors: u32,
}

impl Known {
    fn of(answer: &Answer) -> Self {
        Self {
            count: answer.count,
            chain: answer.chain,
            guest_time_ns: answer.guest_time_ns,
            journal_seq: answer.journal_seq,
            boots: answer.boots,
            memory_errors: answer.memory_errors,
            journal_errors: answer.journal_errors,
        }
    }
}

/// The books of one connection.
#[derive(Clone, Debug)]
pub struct Ledger {
    known: Option<Known>,
    outstanding: VecDeque<Sent>,
    first_seq: u64,
    next_seq: u64,
    findings: Findings,
}

impl Ledger {
    /// Empty books; requests are numbered from `first_seq` on. Without a first [`Op::Status`] the first answer, of
    /// whatever kind, is believed.
    pub fn new(first_seq: u64) -> Self {
        Self {
            known: None,
            outstanding: VecDeque::new(),
            first_seq,
            next_seq: first_seq,
            findings: Findings::default(),
        }
    }

    /// Enters a request that is about to be sent, and numbers it.
    pub fn send(&mut self, op: Op) -> u64 {
        let seq = self.next_seq;
        self.next_seq += 1;
        self.outstanding.push_back(Sent {
            seq,
            op,
            payload_checksum: 0,
        });
        seq
    }

    /// Enters the payload of the request that was numbered last.
    pub fn send_payload(&mut self, payload: &[u8]) {
        if let Some(sent) = self.outstanding.back_mut() {
            sent.payload_checksum = Checksum::of(payload);
        }
    }

    /// The number of the next request.
    pub fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// The request whose answer is due next.
    pub fn due(&self) -> Option<&Sent> {
        self.outstanding.front()
    }

    /// Requests without an answer.
    pub fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    /// What was found so far.
    pub fn findings(&self) -> &Findings {
        &self.findings
    }

    /// The count of the last answer.
    pub fn count(&self) -> u64 {
        self.known.map_or(0, |known| known.count)
    }

    /// The last journal record that the client was told to be durable.
    pub fn journal_seq(&self) -> u64 {
        self.known.map_or(0, |known| known.journal_seq)
    }

    /// Enters an answer. Returns the request that it belongs to; none if it belongs to none that is open.
    pub fn take(&mut self, answer: &Answer) -> Option<Sent> {
        let sent = self.match_request(answer)?;
        if answer.refused() {
            self.findings.refused += 1;
            return Some(sent);
        }
        match self.known {
            Some(known) => self.compare(known, &sent, answer),
            // The chain of a first answer to a sink is a checksum: begin with any other request.
            None => self.known = Some(Known::of(answer)),
        }
        Some(sent)
    }

    /// Enters a wrong payload of an answer that was right otherwise.
    pub fn corrupt_payload(&mut self) {
        self.findings.corrupt_payloads += 1;
    }

    /// Compares with a state that was asked for outside the connection, after its end: requests without an answer may
    /// have been carried out, in order, or not. Answered ones must be in it.
    pub fn inspect(&mut self, answer: &Answer) {
        let Some(mut known) = self.known else { return };
        self.compare_life(known, answer);
        if answer.count < known.count {
            self.findings.lost_answers += known.count - answer.count;
            return;
        }
        let mut open = self.outstanding.iter().filter(|sent| increments(sent.op));
        while known.count < answer.count {
            let Some(sent) = open.next() else {
                self.findings.applied_twice += answer.count - known.count;
                return;
            };
            known.count += 1;
            known.chain = next_chain(known.chain, sent.seq, known.count);
        }
        if known.chain != answer.chain {
            self.findings.contradictions += 1;
        }
    }

    fn match_request(&mut self, answer: &Answer) -> Option<Sent> {
        let position = self.outstanding.iter().position(|sent| sent.seq == answer.seq);
        let Some(position) = position else {
            if (self.first_seq..self.next_seq).contains(&answer.seq) {
                self.findings.duplicated_answers += 1;
            } else {
                self.findings.out_of_step += 1;
            }
            return None;
        };
        // Answers come in the order of the requests: those before this one were skipped.
        self.findings.out_of_step += position as u64;
        self.outstanding.drain(..position);
        let sent = self.outstanding.pop_front()?;
        if answer.op & !REFUSED != sent.op as u32 {
            self.findings.out_of_step += 1;
        }
        Some(sent)
    }

    fn compare(&mut self, known: Known, sent: &Sent, answer: &Answer) {
        self.compare_life(known, answer);
        let mut next = Known::of(answer);
        let expected_count = known.count + u64::from(increments(sent.op));
        let expected_chain = if increments(sent.op) {
            next_chain(known.chain, sent.seq, expected_count)
        } else {
            known.chain
        };
        if sent.op == Op::Sink {
            next.chain = expected_chain;
            self.findings.corrupt_payloads += u64::from(answer.chain != sent.payload_checksum);
        }
        if answer.count < expected_count {
            self.findings.lost_answers += expected_count - answer.count;
        } else if answer.count > expected_count {
            self.findings.applied_twice += answer.count - expected_count;
        } else if next.chain != expected_chain {
            self.findings.contradictions += 1;
        }
        // A journal request that is answered without a new record did not become durable.
        if sent.op == Op::Journal && answer.journal_seq == known.journal_seq {
            self.findings.lost_journal_records += 1;
        }
        self.known = Some(next);
    }

    /// What must hold between any two states of one guest, whatever was asked in between.
    fn compare_life(&mut self, known: Known, answer: &Answer) {
        let findings = &mut self.findings;
        findings.lost_journal_records += known.journal_seq.saturating_sub(answer.journal_seq);
        if answer.boots != known.boots {
            // Times and error counts begin anew with a boot.
            findings.reboots += u64::from(answer.boots.abs_diff(known.boots));
            findings.memory_errors += u64::from(answer.memory_errors);
            findings.journal_errors += u64::from(answer.journal_errors);
            return;
        }
        findings.time_steps_back += u64::from(answer.guest_time_ns < known.guest_time_ns);
        findings.memory_errors += u64::from(answer.memory_errors.saturating_sub(known.memory_errors));
        findings.journal_errors += u64::from(answer.journal_errors.saturating_sub(known.journal_errors));
    }
}

/// Whether a request adds one to the guest's count.
pub fn increments(op: Op) -> bool {
    matches!(op, Op::Increment | Op::Journal)
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
