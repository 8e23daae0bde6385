//! Earlier pods of a virtual machine's seats: the record and headers name them long after they are gone (rules 8 and 9).

use ftvm_protocol::core::{GuestReport, HeaderReport, SeatReport};
use ftvm_protocol::identity::SeatId;
use serde::{Deserialize, Serialize};

use super::Seat;

/// An earlier pod of a seat.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Former {
    /// Its UID.
    pub seat_id: SeatId,
    /// Of this seat, whose disk has its header.
    pub own: bool,
    /// It was on this node.
    pub here: bool,
    /// The book says that no engine of it runs any more.
    pub ended: bool,
}

impl Seat {
    /// Earlier pods, as the book has them.
    pub fn set_former(&self, former: Vec<Former>) {
        self.inner().former = former;
    }

    fn former(&self, seat_id: SeatId) -> Option<Former> {
        let inner = self.inner();
        let mut all = inner.former.iter();
        all.find(|former| former.seat_id == seat_id).copied()
    }

    /// Of an earlier pod of any seat: whether it has ended, and if it was of this seat, what the disk that both have says. None if it is no such pod.
    /// `remembered`: this node's daemon has not forgotten it.
    pub fn report_of_former(&self, seat_id: SeatId, remembered: bool) -> Option<SeatReport> {
        let former = self.former(seat_id)?;
        // Its folder may have been removed by hand while its engine runs.
        let remembered = remembered || self.source.has_process_of(seat_id);
        let found = former.own.then(|| self.header_report());
        // A disk that was made anew knows nothing of it.
        let header = match found {
            Some(HeaderReport::Found(header)) if header.incarnations.iter().any(|of| of.seat == seat_id) => {
                HeaderReport::Found(header)
            }
            _ => HeaderReport::Unreadable,
        };
        Some(SeatReport {
            seat: seat_id,
            header,
            guest: former.guest(remembered),
        })
    }

    /// Whether it is an earlier pod of this seat, whose disk nobody else can read.
    pub fn had(&self, seat_id: SeatId) -> bool {
        self.former(seat_id).is_some_and(|former| former.own)
    }
}

impl Former {
    /// A daemon forgets a pod only once its engine has ended and the API server itself has said that it is gone.
    fn guest(self, remembered: bool) -> GuestReport {
        if remembered || !(self.ended || self.here) {
            GuestReport::Unknown
        } else {
            GuestReport::None
        }
    }
}
