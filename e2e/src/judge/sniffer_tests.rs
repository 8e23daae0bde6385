//! The sniffer on real links: two hosts speak as the guest, by frames made by hand.
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::*;
use crate::hosts::outer::test_inside;
use crate::hosts::{Host, Lab, LabPlan};
use crate::judge::packet::{Segment, build};

const GUEST: Mac = [2, 0xF7, 0, 0, 0, 1];

/// Sends one frame out of a host's link to the client network.
fn send(host: &Host, source: Mac, seq: u32, payload: &[u8]) {
    let segment = Segment {
        source: "10.77.0.2:7777".parse().unwrap(),
        destination: "10.77.0.1:40000".parse().unwrap(),
        seq,
        ack: 0,
        syn: false,
        fin: false,
        rst: false,
        payload,
    };
    host.send_frame(build::frame(source, &segment)).unwrap();
}

#[test]
fn hosts_that_speak_as_the_guest_are_told_apart() {
    test_inside(
        "judge::sniffer::tests::hosts_that_speak_as_the_guest_are_told_apart",
        || {
            // Unit tests have no folder of their own from cargo.
            let folder = PathBuf::from(std::env::current_exe().unwrap().parent().unwrap()).join("sniffer-test");
            std::fs::create_dir_all(&folder).unwrap();
            let lab = Lab::new(&LabPlan::three_hosts(&folder)).unwrap();
            let ports = lab.hosts().iter().map(Host::client_port).collect();
            let sniffer = Sniffer::start(GUEST, ports).unwrap();
            let seen = |count: u64| {
                let deadline = Instant::now() + Duration::from_secs(90);
                loop {
                    let report = sniffer.emissions().report().clone();
                    if report.frames.values().sum::<u64>() >= count {
                        return report;
                    }
                    assert!(Instant::now() < deadline, "{report:?} instead of {count} frames");
                    std::thread::sleep(Duration::from_millis(5));
                }
            };
            send(lab.host(0), GUEST, 100, b"from the first");
            send(lab.host(0), [2, 0, 0, 0, 0, 9], 100, b"not the guest");
            send(lab.host(1), GUEST, 100, b"from the first");
            let report = seen(2);
            assert_eq!((report.handovers, report.dual_active), (0, 0), "{report:?}");
            send(lab.host(1), GUEST, 114, b"from the second");
            send(lab.host(0), GUEST, 129, b"from the first again");
            let report = seen(4);
            assert_eq!((report.handovers, report.dual_active), (1, 1), "{report:?}");

            // A restarted host has new links and is still recognised.
            lab.host(0).kill().unwrap();
            lab.host(0).start().unwrap();
            send(lab.host(0), GUEST, 149, b"again");
            let report = seen(5);
            assert_eq!(report.frames.get(&0), Some(&3), "{report:?}");
            assert_eq!(report.dual_active, 2);
            assert_eq!(sniffer.finish().unwrap(), 0, "frames were missed");
            std::fs::remove_dir_all(folder).ok();
        },
    );
}
