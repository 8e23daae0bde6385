//! The emulated nodes themselves: do they boot, obey, lose their links, die and come back with their data?
use std::time::{Duration, Instant};

use ftvm_e2e::lab::{Lab, Network, Node, NodeConfig};

/// Long enough for a busy machine; nothing is judged by it.
const PATIENCE: Duration = Duration::from_secs(120);

/// Pings are answered, sooner or later: a machine that was cut off looks for the other one anew, and an emulated one may stand still for a while.
fn one_gets_through(from: &Node, ping: &str) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match from.sh(ping) {
            Ok(_) => return,
            Err(error) => assert!(Instant::now() < deadline, "{error:#}"),
        }
    }
}

/// Pings are sent, and none is answered.
fn none_gets_through(from: &Node, ping: &str) {
    let finished = from.run(&["sh", "-ec", ping]).unwrap();
    let said = String::from_utf8_lossy(&finished.stdout);
    // With 2 it would end for any other reason (ping(8)).
    assert!(finished.code == 1 && said.contains("100% packet loss"), "{finished:?}");
}

#[test]
fn nodes_boot_talk_die_and_return() {
    let lab = Lab::new(&[]).unwrap();
    let begin = Instant::now();
    let one = lab.node("one", 1, NodeConfig::default()).unwrap();
    eprintln!("node booted in {:.1} s", begin.elapsed().as_secs_f64());
    let two = lab.node("two", 2, NodeConfig::default()).unwrap();

    assert_eq!(
        one.sh("hostname; ls /dev/kvm; stat -c %T -f /sys/fs/cgroup").unwrap(),
        "one\n/dev/kvm\ncgroup2fs"
    );
    assert_eq!(
        two.run(&["sh", "-c", "echo out; echo err >&2; exit 7"]).unwrap().code,
        7
    );
    assert!(
        one.start(&ftvm_e2e::lab::wire::Start {
            argv: vec!["/no/such".into()],
            ..Default::default()
        })
        .is_err()
    );

    // Files, larger than any buffer on the way.
    let content: Vec<u8> = (0..3_000_000u32)
        .flat_map(|number| (number.wrapping_mul(2_654_435_761)).to_le_bytes())
        .collect();
    one.write("/data/file", &content).unwrap();
    assert!(one.read("/data/file").unwrap() == content);

    // The shared folder: what the file arbiter relies on.
    let share = lab.share().unwrap();
    share.mount(&one).unwrap();
    share.mount(&two).unwrap();
    one.sh("cd /share; echo first > a; sync a; ln a record").unwrap();
    assert!(
        two.sh("cd /share; echo second > b; ln b record").is_err(),
        "link(2) overwrote a record"
    );
    assert_eq!(
        two.sh("cat /share/record; stat -c %h /share/record").unwrap(),
        "first\n2"
    );
    assert!(
        two.sh("set -o noclobber; echo x > /share/a").is_err(),
        "O_EXCL did not hold"
    );
    assert_eq!(std::fs::read(share.folder().join("record")).unwrap(), b"first\n");
    let race =
        "cd /share; for i in $(seq 50); do echo $0 > t.$0.$i; ln t.$0.$i term.$i 2>/dev/null && echo $i; done; true";
    let (left, right) = std::thread::scope(|scope| {
        let other = scope.spawn(|| two.run(&["sh", "-c", race, "two"]).unwrap());
        (
            one.run(&["sh", "-c", race, "one"]).unwrap().stdout,
            other.join().unwrap().stdout,
        )
    });
    let mut won: Vec<u32> = [left, right]
        .concat()
        .split(|byte| *byte == b'\n')
        .filter_map(|line| std::str::from_utf8(line).ok()?.parse().ok())
        .collect();
    won.sort_unstable();
    assert_eq!(
        won,
        (1..=50).collect::<Vec<_>>(),
        "each term must have exactly one winner"
    );

    // Links.
    let ping = format!("ping -q -c 3 -i 0.2 -W 1 {}", one.address(Network::Replication));
    one_gets_through(&two, &ping);
    one.set_link(Network::Replication, false).unwrap();
    none_gets_through(&two, &ping);
    one.set_link(Network::Replication, true).unwrap();
    one_gets_through(&two, &ping);
    two.impair(Network::Replication, "loss 100%").unwrap();
    none_gets_through(&two, &ping);
    two.impair(Network::Replication, "").unwrap();
    one_gets_through(&two, &ping);

    // A paused machine answers nothing, and goes on.
    let up = || one.sh("cut -d. -f1 /proc/uptime").unwrap().parse::<u64>().unwrap();
    let before = up();
    one.pause().unwrap();
    assert!(one.try_run(&["true"], Duration::from_secs(1)).is_err());
    one.resume().unwrap();
    assert!(up() >= before);

    // Death and return: memory is gone, the data disk is not.
    one.sh("touch /run/memory; sync").unwrap();
    one.kill().unwrap();
    assert!(!one.is_running());
    assert!(one.try_run(&["true"], Duration::from_secs(1)).is_err());
    one.power_on().unwrap();
    assert_eq!(
        one.sh("ls /run/memory 2>/dev/null | wc -l; stat -c %s /data/file")
            .unwrap(),
        "0\n12000000"
    );
}
