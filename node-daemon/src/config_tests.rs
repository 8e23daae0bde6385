use super::*;

const EXAMPLE: &str = include_str!("../../docs/examples/standalone-a.yaml");

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(text, Path::new("test.yaml"))
}

fn example() -> Config {
    parse(EXAMPLE).unwrap()
}

#[test]
fn examples_load_and_form_a_pair() {
    let (a, b) = (
        example(),
        parse(include_str!("../../docs/examples/standalone-b.yaml")).unwrap(),
    );
    let (a, b) = (&a.seats[0], &b.seats[0]);
    assert_eq!((&a.vm, &a.machine, &a.boot), (&b.vm, &b.machine, &b.boot));
    assert_eq!(a.link.peers[0].address, b.link.listen);
    assert_eq!(b.link.peers[0].address, a.link.listen);
    assert_eq!((a.original_disk, b.original_disk), (true, false));
    a.check_beside(b).unwrap();
}

#[test]
fn yaml_round_trips() {
    assert_eq!(parse(&example().to_yaml()).unwrap(), example());
}

#[test]
fn unknown_fields_are_refused_with_their_place() {
    let error = parse(&EXAMPLE.replace("memory_mib:", "memory_mb:"))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("memory_mb") && error.contains("line") && error.contains("test.yaml"),
        "{error}"
    );
    let error = Config::load(Path::new("/nonexistent.yaml")).unwrap_err().to_string();
    assert!(
        error.contains("/nonexistent.yaml") && error.contains("No such file"),
        "{error}"
    );
}

#[test]
fn the_addresses_of_a_card_are_read_and_what_is_none_is_refused() {
    const MAC: &str = "        mac: 02:00:00:00:00:01\n";
    assert!(EXAMPLE.contains(MAC) && example().seats[0].nics[0].addresses.is_empty());
    let with = |addresses: &str| {
        let text = EXAMPLE.replace(MAC, &format!("{MAC}        addresses: {addresses}\n"));
        parse(&text).and_then(|config| config.check().map(|()| config))
    };
    let config = with("[192.0.2.7, '2001:db8::7']").unwrap();
    let known: [std::net::IpAddr; 2] = [[192, 0, 2, 7].into(), "2001:db8::7".parse().unwrap()];
    assert_eq!(config.seats[0].nics[0].addresses, known);
    assert_eq!(parse(&config.to_yaml()).unwrap(), config);
    for none in ["[192.0.2.7/24]", "[web]", "192.0.2.7"] {
        assert!(with(none).is_err(), "{none}");
    }
}

#[test]
fn contradictions_are_refused_with_a_reason() {
    type Change = fn(&mut Config);
    let cases: &[(&str, Change)] = &[
        ("17 vCPUs", |c| c.seats[0].machine.vcpus = 17),
        ("8 MiB", |c| c.seats[0].machine.memory_mib = 8),
        ("is no name", |c| c.seats[0].vm = "../x".into()),
        ("is this seat itself", |c| c.seats[0].link.peers[0].seat = "a".into()),
        ("is this seat itself", |c| {
            c.seats[0].link.peers[0].address = c.seats[0].link.listen
        }),
        ("no unicast MAC", |c| {
            c.seats[0].nics[0].mac = "ff:ff:ff:ff:ff:ff".into()
        }),
        ("no unicast MAC", |c| {
            c.seats[0].nics[0].mac = "+2:00:00:00:00:01".into()
        }),
        ("no host has 224.0.0.1", |c| {
            c.seats[0].nics[0].addresses = vec![[224, 0, 0, 1].into()]
        }),
        ("no host has ::ffff:192.0.2.7", |c| {
            c.seats[0].nics[0].addresses = vec!["::ffff:192.0.2.7".parse().unwrap()]
        }),
        ("192.0.2.7 appears twice", |c| {
            c.seats[0].nics[0].addresses = vec![[192, 0, 2, 7].into(); 2]
        }),
        ("17 addresses", |c| {
            c.seats[0].nics[0].addresses = (1..=17).map(|host| [192, 0, 2, host].into()).collect()
        }),
        ("no device name", |c| {
            c.seats[0].nics[0].tap = "a-very-long-tap-name".into()
        }),
        ("twice heartbeat", |c| c.seats[0].timing.peer_lost_ms = Some(10)),
        ("500 to 60000", |c| c.seats[0].timing.disk_hang_ms = Some(499)),
        ("500 to 60000", |c| c.seats[0].timing.disk_hang_ms = Some(60_001)),
        ("disk_hold_ms must be", |c| {
            c.seats[0].timing.disk_hold_ms = Some(60_001)
        }),
        ("have the same name", |c| c.seats.push(c.seats[0].clone())),
        ("same identity folder", |c| add(c, |_| {})),
        ("both listen on", |c| add(c, |s| s.identity = "/elsewhere".into())),
        ("both use /", |c| {
            add(c, |s| {
                s.identity = "/elsewhere".into();
                s.link.listen.set_port(1);
            });
        }),
        ("both use tap", |c| {
            add(c, |s| {
                s.identity = "/elsewhere".into();
                s.link.listen.set_port(1);
                s.disks.clear();
                (s.header, s.journal) = (None, None);
            });
        }),
    ];
    for (words, change) in cases {
        let mut config = example();
        change(&mut config);
        let error = config.check().expect_err(words).to_string();
        assert!(error.contains(words), "{error} should say {words}");
    }
}

fn add(config: &mut Config, change: fn(&mut SeatConfig)) {
    let mut seat = config.seats[0].clone();
    seat.seat = "c".into();
    change(&mut seat);
    config.seats.push(seat);
}

#[test]
fn the_published_schema_is_of_these_types() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/standalone-schema.json");
    let published: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert_eq!(
        published,
        Config::schema(),
        "write it anew: ftvm-node-daemon schema > docs/standalone-schema.json"
    );
}
