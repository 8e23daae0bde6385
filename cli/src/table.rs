//! What `status` prints.

use ftvm_engine::control::Role;
use ftvm_node_daemon::api::{Phase, SeatStatus};
use serde_json::json;

use crate::pair::{View, role};

const HEAD: [&str; 8] = ["VM", "SEAT", "NODE", "ROLE", "PROTECTED", "TERM", "EPOCH", "NOTE"];

/// The name of a role as its JSON has it.
pub fn role_name(role: Role) -> &'static str {
    match role {
        Role::Starting => "starting",
        Role::Joining => "joining",
        Role::Standby => "standby",
        Role::Active => "active",
        Role::Frozen => "frozen",
        Role::Ended => "ended",
    }
}

/// A table for people.
pub fn render(view: &View) -> String {
    let mut rows = vec![HEAD.map(str::to_owned).to_vec()];
    for (_, daemon, seat) in view.seats(None) {
        rows.push(row(&daemon.node, seat));
    }
    for (socket, why) in &view.silent {
        let mut row = vec!["-".to_owned(); HEAD.len()];
        row[2] = socket.display().to_string();
        row[7] = why.clone();
        rows.push(row);
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..HEAD.len()).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

fn row(node: &str, seat: &SeatStatus) -> Vec<String> {
    let engine = seat.engine.as_ref();
    let role = match (role(seat), seat.phase) {
        (Some(role), _) => role_name(role),
        (None, Phase::NotSetUp) => "not set up",
        (None, Phase::Running) => "no answer",
        (None, Phase::Waiting) => "waiting",
        (None, Phase::Stopped) => "stopped",
    };
    let protected = match engine {
        Some(engine) if engine.role == Role::Active => match (engine.protected, engine.paused) {
            (true, _) => "yes",
            (false, true) => "no, paused",
            (false, false) => "no",
        },
        _ => "",
    };
    let note = engine
        .map(|engine| engine.why.as_str())
        .filter(|why| !why.is_empty())
        .unwrap_or(&seat.why);
    let number = |value: Option<u64>| value.map_or(String::new(), |value| value.to_string());
    vec![
        seat.vm.clone(),
        seat.seat.clone(),
        node.to_owned(),
        role.to_owned(),
        protected.to_owned(),
        number(engine.map(|engine| engine.term)),
        number(engine.map(|engine| engine.epoch)),
        note.to_owned(),
    ]
}

/// The same and everything else, with stable keys: `vms` sums up, `daemons` has each daemon's own status.
pub fn json(view: &View) -> String {
    let vms: Vec<_> = view
        .vms()
        .into_iter()
        .map(|vm| {
            let named = |wanted| view.seats(Some(vm)).find(|placed| role(placed.2) == Some(wanted));
            json!({
                "vm": vm,
                "active": view.active(vm).map(|(_, _, seat)| &seat.seat),
                "standby": named(Role::Standby).map(|(_, _, seat)| &seat.seat),
                "protected": view.protected(vm),
                "paused": view.paused(vm),
                "stopped": view.seats(Some(vm)).all(|(_, _, seat)| seat.phase == Phase::Stopped),
            })
        })
        .collect();
    let daemons: Vec<_> = view.daemons.iter().map(|(_, daemon)| daemon).collect();
    let silent: Vec<_> = view
        .silent
        .iter()
        .map(|(socket, why)| json!({ "socket": socket, "why": why }))
        .collect();
    format!("{:#}", json!({ "vms": vms, "daemons": daemons, "silent": silent }))
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
