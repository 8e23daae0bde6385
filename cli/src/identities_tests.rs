use super::*;
use ftvm_node_daemon::identity::load as load_seat;
use std::os::unix::fs::PermissionsExt;

struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        Folder(std::env::temp_dir().join(format!("ftvm-identities-{:x}", random::nonzero_u64())))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn seats_know_each_other_and_the_engine_takes_them() {
    use ftvm_engine::replication::link::TlsIdentity;
    let out = Folder::new();
    assert_eq!(make("demo", &names(&["a", "b"]), &out.0).unwrap(), ["a", "b"]);
    for seat in ["a", "b"] {
        let (who, identity) = load_seat(&out.0.join(seat), "demo", seat).unwrap();
        assert_eq!(who.seats.len(), 2);
        let (certificate, authority) = (&identity.certificate_pem, &identity.authority_pem);
        TlsIdentity::from_pem(who.vm_id, who.seat_id, certificate, &identity.key_pem.0, authority).unwrap();
        let mode = std::fs::metadata(out.0.join(seat).join("key.pem"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}

#[test]
fn a_seat_is_added_without_touching_the_others() {
    let out = Folder::new();
    make("demo", &names(&["a", "b"]), &out.0).unwrap();
    let before = std::fs::read(out.0.join("a/certificate.pem")).unwrap();
    assert_eq!(make("demo", &names(&["a", "b", "c"]), &out.0).unwrap(), ["c"]);
    assert_eq!(std::fs::read(out.0.join("a/certificate.pem")).unwrap(), before);
    let (a, _) = load_seat(&out.0.join("a"), "demo", "a").unwrap();
    let (c, _) = load_seat(&out.0.join("c"), "demo", "c").unwrap();
    assert_eq!(a.seats.get("c"), Some(&c.seat_id));
    assert_eq!((a.vm_id, a.seats), (c.vm_id, c.seats));
}

#[test]
fn strange_names_and_folders_are_refused() {
    let out = Folder::new();
    assert!(matches!(
        make("../x", &names(&["a"]), &out.0),
        Err(IdentitiesError::Name(_))
    ));
    make("demo", &names(&["a"]), &out.0).unwrap();
    assert!(matches!(
        make("other", &names(&["a"]), &out.0),
        Err(IdentitiesError::OtherVm { .. })
    ));
    assert!(load_seat(&out.0.join("a"), "demo", "b").is_err());
    std::fs::write(out.0.join("vm.json"), "{").unwrap();
    assert!(matches!(
        make("demo", &names(&["b"]), &out.0),
        Err(IdentitiesError::Damaged { .. })
    ));
}
