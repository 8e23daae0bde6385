//! Frames and messages from a hostile peer: truncated, corrupt, replayed, oversized, of other versions. Nothing panics,
//! nothing is accepted, nothing is allocated by an announced length.

use ftvm_protocol::identity::{ArbiterUid, Incarnation, SeatId, SessionId, VmId};
use ftvm_protocol::message::{Message, MessageError, PeerRole, SessionEnd, View};
use ftvm_protocol::wire::{
    FrameHeader, HEADER_BYTES, Hello, Kind, MAGIC, NegotiateError, VERSION_HELLO, VERSION_MAX, VERSION_MIN, WireError,
    encode_header, negotiate,
};

struct Rng(u64);

impl Rng {
    fn bits(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 17 ^ self.0 << 31
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.bits() % limit
    }
}

fn incarnation(seat: u128, start: u64) -> Incarnation {
    Incarnation {
        seat: SeatId(seat),
        start,
    }
}

fn messages() -> Vec<Message> {
    let view = View {
        role: PeerRole::Standby,
        term: u64::MAX,
        uid: Some(ArbiterUid(7)),
        session: Some((incarnation(1, 2), SessionId(3))),
        with: Some(incarnation(1, 2)),
        unsettled: true,
    };
    let session = SessionId(9);
    vec![
        Message::Probe { n: 1, view },
        Message::ProbeReply { n: u64::MAX, view },
        Message::Join {
            session,
            term: 5,
            uid: ArbiterUid(u128::MAX),
        },
        Message::JoinReady { session },
        Message::Ack {
            leader: incarnation(u128::MAX, u64::MAX),
            session,
            epoch: 4,
        },
        Message::End {
            session,
            reason: SessionEnd::FollowerFailed,
        },
        Message::End {
            session,
            reason: SessionEnd::FollowerStorage,
        },
        Message::Switch {
            session,
            epoch: 8,
            term: 4,
        },
        Message::SwitchRefused { session },
        Message::Follow {
            session,
            previous: SessionId(1),
            epoch: 8,
            term: 6,
        },
        Message::Following { session },
        Message::Stopped { term: 2 },
        Message::Claim { session },
        Message::Claimed { session, term: 3 },
        Message::Leave { session },
    ]
}

fn frame(kind: Kind, payload: &[u8]) -> Vec<u8> {
    let mut frame = encode_header(VERSION_MAX, kind, 5, 6, payload).expect("fits").to_vec();
    frame.extend_from_slice(payload);
    frame
}

fn accept(frame: &[u8]) -> Result<FrameHeader, WireError> {
    let (header, payload) = frame.split_first_chunk::<HEADER_BYTES>().ok_or(WireError::Magic(0))?;
    let header = FrameHeader::decode(header, VERSION_MAX)?;
    header.verify(payload)?;
    Ok(header)
}

#[test]
fn every_message_round_trips_in_a_frame() {
    for message in messages() {
        let payload = message.encode(VERSION_MAX).expect("encodes");
        let bytes = frame(Kind::Control, &payload);
        let header = accept(&bytes).expect("valid");
        assert_eq!((header.kind, header.epoch, header.session), (Kind::Control, 5, 6));
        assert_eq!(Message::decode(&bytes[HEADER_BYTES..], VERSION_MAX), Ok(message));
    }
}

#[test]
fn every_truncation_and_every_flipped_bit_of_a_frame_is_found() {
    for message in messages() {
        let good = frame(Kind::Control, &message.encode(VERSION_MAX).expect("encodes"));
        for end in 0..good.len() {
            assert!(accept(&good[..end]).is_err(), "{message:?} cut at {end}");
        }
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(accept(&bad).is_err(), "{message:?} with bit {bit} flipped");
        }
    }
}

#[test]
fn random_bytes_are_neither_frames_nor_cause_panics() {
    let mut rng = Rng(1);
    for _ in 0..20_000 {
        let mut header = [0u8; HEADER_BYTES];
        header.fill_with(|| rng.bits() as u8);
        if rng.below(2) == 0 {
            // Close to the real thing, so that later checks are reached.
            header[0..4].copy_from_slice(&MAGIC.to_le_bytes());
            header[4..6].copy_from_slice(&VERSION_MAX.to_le_bytes());
            header[6..8].copy_from_slice(&(rng.below(48) as u16).to_le_bytes());
        }
        if let Ok(header) = FrameHeader::decode(&header, VERSION_MAX) {
            assert!(header.len <= header.kind.max_len());
            let payload = vec![0; header.len.min(4096) as usize];
            assert!(header.verify(&payload).is_err());
        }
        let length = rng.below(200) as usize;
        let bytes: Vec<u8> = (0..length).map(|_| rng.bits() as u8).collect();
        let _ = Message::decode(&bytes, VERSION_MAX);
        let _ = Hello::decode(&bytes);
    }
}

#[test]
fn mutated_messages_never_decode_to_something_longer_or_panic() {
    let mut rng = Rng(2);
    for message in messages() {
        let good = message.encode(VERSION_MAX).expect("encodes");
        for end in 0..good.len() {
            assert!(
                Message::decode(&good[..end], VERSION_MAX).is_err(),
                "{message:?} cut at {end}"
            );
        }
        let mut long = good.clone();
        long.push(0);
        assert_eq!(
            Message::decode(&long, VERSION_MAX),
            Err(MessageError::Malformed("bytes follow its end"))
        );
        for _ in 0..2_000 {
            let mut bad = good.clone();
            let at = rng.below(bad.len() as u64) as usize;
            bad[at] = rng.bits() as u8;
            let _ = Message::decode(&bad, VERSION_MAX);
        }
    }
    let long = Message::decode(&[0; 4097], VERSION_MAX);
    assert!(matches!(long, Err(MessageError::TooLong(4097))));
}

#[test]
fn lengths_are_bounded_by_kind_before_the_payload_is_read() {
    for kind in Kind::ALL {
        assert_eq!(Kind::from_number(*kind as u16), Some(*kind));
        let mut header = encode_header(VERSION_MAX, *kind, 0, 0, &[]).expect("empty fits");
        header[24..28].copy_from_slice(&(kind.max_len() + 1).to_le_bytes());
        let agreed = if *kind == Kind::Hello {
            VERSION_HELLO
        } else {
            VERSION_MAX
        };
        header[4..6].copy_from_slice(&agreed.to_le_bytes());
        let too_long = WireError::TooLong {
            kind: *kind,
            got: kind.max_len() + 1,
            max: kind.max_len(),
        };
        assert_eq!(FrameHeader::decode(&header, agreed), Err(too_long));
        let payload = vec![0; kind.max_len() as usize + 1];
        assert!(matches!(
            encode_header(VERSION_MAX, *kind, 0, 0, &payload),
            Err(WireError::TooLong { .. })
        ));
    }
}

#[test]
fn other_versions_kinds_and_a_second_hello_are_refused() {
    let good = frame(Kind::Control, b"x");
    let mut other = good.clone();
    other[4] = 9;
    assert_eq!(
        accept(&other),
        Err(WireError::Version {
            got: 9,
            agreed: VERSION_MAX
        })
    );
    let mut unknown = good;
    unknown[6..8].copy_from_slice(&999u16.to_le_bytes());
    assert_eq!(accept(&unknown), Err(WireError::Kind(999)));
    let hello = Hello::new(VmId(1), incarnation(1, 1)).to_frame().expect("encodes");
    assert!(accept(&hello).is_err(), "a hello after the negotiation");
}

/// The oldest version is the first one of every kind: what an older peer would call so is not taken from it, nor sent.
#[test]
fn a_version_that_is_too_old_has_no_kinds() {
    let too_old = VERSION_MIN - 1;
    for kind in Kind::ALL.iter().copied().filter(|kind| *kind != Kind::Hello) {
        let refused = Err(WireError::Kind(kind as u16));
        assert_eq!(encode_header(too_old, kind, 0, 0, &[]).map(drop), refused);
        let mut header = encode_header(VERSION_MIN, kind, 0, 0, &[]).expect("has it");
        assert!(FrameHeader::decode(&header, VERSION_MIN).is_ok());
        header[4..6].copy_from_slice(&too_old.to_le_bytes());
        assert_eq!(FrameHeader::decode(&header, too_old).map(drop), refused);
    }
}

#[test]
fn what_an_older_version_lacks_is_said_in_its_words_or_refused() {
    let mut newer = 0;
    for message in messages() {
        assert_eq!(message.clone().spoken_in(VERSION_MAX), Some(message.clone()));
        assert_eq!(message.clone().spoken_in(VERSION_MIN - 1), None);
        let word = message.clone().spoken_in(VERSION_MIN).expect("there is one");
        let bytes = word.encode(VERSION_MIN).expect("it has that");
        assert_eq!(Message::decode(&bytes, VERSION_MIN), Ok(word.clone()));
        if message.since() <= VERSION_MIN {
            assert_eq!(word, message);
            assert_eq!(message.encode(VERSION_MAX), Ok(bytes), "the same in both");
            continue;
        }
        newer += 1;
        let refused = MessageError::Version {
            since: message.since(),
            agreed: VERSION_MIN,
        };
        assert_eq!(message.encode(VERSION_MIN), Err(refused.clone()));
        let bytes = message.encode(VERSION_MAX).expect("encodes");
        assert_eq!(Message::decode(&bytes, VERSION_MIN), Err(refused));
    }
    assert_eq!(newer, 1, "FollowerStorage");
}

/// What peers of version 2 send and understand, byte by byte.
#[test]
fn the_words_of_version_2_are_what_they_were() {
    let session = SessionId(9);
    let end = |reason| Message::End { session, reason };
    let follow = Message::Follow {
        session,
        previous: SessionId(1),
        epoch: 8,
        term: 6,
    };
    let switch = Message::Switch {
        session,
        epoch: 8,
        term: 4,
    };
    let view = View {
        role: PeerRole::Standby,
        term: 1,
        uid: Some(ArbiterUid(7)),
        session: Some((incarnation(1, 2), SessionId(3))),
        with: None,
        unsettled: true,
    };
    let join = Message::Join {
        session,
        term: 5,
        uid: ArbiterUid(7),
    };
    let ack = Message::Ack {
        leader: incarnation(1, 2),
        session,
        epoch: 4,
    };
    let words: [(Message, &[u8]); 17] = [
        (Message::Probe { n: 4, view }, &[0, 4, 2, 1, 1, 7, 1, 1, 2, 3, 0, 1]),
        (
            Message::ProbeReply { n: 4, view },
            &[1, 4, 2, 1, 1, 7, 1, 1, 2, 3, 0, 1],
        ),
        (join, &[2, 9, 5, 7]),
        (Message::JoinReady { session }, &[3, 9]),
        (ack, &[4, 1, 2, 9, 4]),
        (end(SessionEnd::Ejected), &[5, 9, 0]),
        (end(SessionEnd::JoinAborted), &[5, 9, 1]),
        (end(SessionEnd::FollowerFailed), &[5, 9, 2]),
        (end(SessionEnd::FollowerLeft), &[5, 9, 3]),
        (switch, &[6, 9, 8, 4]),
        (Message::SwitchRefused { session }, &[7, 9]),
        (follow, &[8, 9, 1, 8, 6]),
        (Message::Following { session }, &[9, 9]),
        (Message::Stopped { term: 2 }, &[10, 2]),
        (Message::Claim { session }, &[11, 9]),
        (Message::Claimed { session, term: 3 }, &[12, 9, 3]),
        (Message::Leave { session }, &[13, 9]),
    ];
    for (message, bytes) in words {
        assert_eq!(message.encode(2).as_deref(), Ok(bytes), "{message:?}");
    }
    let roles = [
        PeerRole::Starting,
        PeerRole::Joining,
        PeerRole::Standby,
        PeerRole::Active,
        PeerRole::Frozen,
        PeerRole::Ended,
    ];
    for (number, role) in (0u8..).zip(roles) {
        let view = View { role, ..view };
        let bytes = Message::Probe { n: 4, view }.encode(2).expect("encodes");
        assert_eq!(bytes[2], number, "{role:?}");
    }
    assert_eq!(
        messages().iter().map(first_byte).collect::<Vec<_>>(),
        [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    );
}

/// The number of a message.
fn first_byte(message: &Message) -> u8 {
    message.encode(VERSION_MAX).expect("encodes")[0]
}

fn read_hello(frame: &[u8]) -> Result<Hello, WireError> {
    let (header, payload) = frame.split_first_chunk::<HEADER_BYTES>().ok_or(WireError::Magic(0))?;
    FrameHeader::decode(header, VERSION_HELLO)?.verify(payload)?;
    Hello::decode(payload)
}

#[test]
fn hello_round_trips_and_versions_are_negotiated() {
    let own = Hello::new(VmId(1), incarnation(1, 1));
    assert_eq!(read_hello(&own.to_frame().expect("encodes")), Ok(own));
    let peer = Hello::new(VmId(1), incarnation(2, 1));
    assert_eq!(negotiate(&own, &peer), Ok(VERSION_MAX));

    let newer = Hello {
        version_min: VERSION_MIN,
        version_max: VERSION_MAX + 1,
        ..peer
    };
    assert_eq!(
        negotiate(&own, &newer),
        Ok(VERSION_MAX),
        "version N and N+1 work together"
    );
    assert_eq!(negotiate(&newer, &own), Ok(VERSION_MAX));
    let former = Hello {
        version_max: VERSION_MIN,
        ..peer
    };
    assert_eq!(negotiate(&own, &former), Ok(VERSION_MIN));
    let too_old = Hello {
        version_min: VERSION_MIN - 1,
        version_max: VERSION_MIN - 1,
        ..peer
    };
    assert!(matches!(
        negotiate(&own, &too_old),
        Err(NegotiateError::Versions { .. })
    ));
    let far = Hello {
        version_min: VERSION_MAX + 1,
        version_max: VERSION_MAX + 2,
        ..peer
    };
    assert!(matches!(negotiate(&own, &far), Err(NegotiateError::Versions { .. })));
    let text = negotiate(&own, &far)
        .map_err(|error| error.to_string())
        .expect_err("refused");
    assert!(text.contains("upgrade the older one first"), "{text}");

    let stranger = Hello { vm: VmId(2), ..peer };
    assert!(matches!(
        negotiate(&own, &stranger),
        Err(NegotiateError::OtherVm { .. })
    ));
    let twin = Hello {
        from: incarnation(1, 2),
        ..peer
    };
    assert_eq!(negotiate(&own, &twin), Err(NegotiateError::SameSeat(incarnation(1, 2))));
}

#[test]
fn malformed_hellos_are_refused() {
    let good = Hello::new(VmId(1), incarnation(1, 1));
    let upside_down = Hello {
        version_min: 3,
        version_max: 2,
        ..good
    };
    assert!(read_hello(&upside_down.to_frame().expect("encodes")).is_err());
    let zero = Hello {
        version_min: 0,
        version_max: 2,
        ..good
    };
    assert!(read_hello(&zero.to_frame().expect("encodes")).is_err());
    assert!(Hello::decode(&[0; 43]).is_err() && Hello::decode(&[0; 45]).is_err());
    let frame = good.to_frame().expect("encodes");
    for end in 0..frame.len() {
        assert!(read_hello(&frame[..end]).is_err(), "cut at {end}");
    }
}
