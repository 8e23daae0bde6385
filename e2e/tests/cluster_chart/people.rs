//! What people get by the cluster's own roles.
use ftvm_e2e::cluster::wait_for;

use crate::admission::{Installed, PATIENCE, SHOP, is_yes};

#[test]
fn editors_have_vms_and_not_their_book() {
    let installed = Installed::new();
    for role in ["view", "edit", "admin"] {
        let words = [
            "create",
            "rolebinding",
            role,
            "--namespace",
            SHOP,
            &format!("--clusterrole={role}"),
            &format!("--user={role}"),
        ];
        installed.cluster.kubectl(&words).unwrap();
    }
    let may = |user: &str, verb: &str, part: &str| {
        let words = [
            "auth",
            "can-i",
            verb,
            "faulttolerantvms.ftvm.dev",
            &format!("--subresource={part}"),
            "--namespace",
            SHOP,
            &format!("--as={user}"),
        ];
        is_yes(installed.cluster.kubectl(&words))
    };
    // The controller manager adds the rules to the roles some time after.
    wait_for("the roles are aggregated", PATIENCE, || {
        let all = ["view", "edit", "admin"].iter().all(|user| may(user, "get", ""));
        anyhow::ensure!(all && may("admin", "delete", ""), "not yet");
        Ok(())
    })
    .unwrap();
    for (user, verb, part, expected) in [
        ("view", "create", "", false),
        ("edit", "create", "", true),
        ("edit", "delete", "", true),
        ("view", "get", "status", true),
        ("edit", "update", "status", false),
        ("admin", "patch", "status", false),
    ] {
        assert_eq!(may(user, verb, part), expected, "{user} {verb} {part}");
    }
}
