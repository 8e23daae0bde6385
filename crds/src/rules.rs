//! Rules that the API server checks (CEL), each with a message that says what to write instead.
//!
//! Lists and texts that a rule looks at are bounded in the schema: the API server refuses rules whose estimated cost is too high.

use kube::CustomResourceExt as _;
use serde_json::{Map, Value, json};

use crate::FaultTolerantVM;
use crate::names::VM_NAME_LENGTH_MAX;
use crate::quantity::{MEMORY_MIB, PATTERN as SIZE, WHOLE_MAX};

/// Paths in an image or a volume.
const PATH: &str = "^(/[A-Za-z0-9_-][A-Za-z0-9._-]*)+$";

fn rule(rule: impl AsRef<str>, message: impl AsRef<str>) -> Value {
    json!({ "rule": rule.as_ref(), "message": message.as_ref() })
}

/// Rules of the whole object: only they see name, spec and status together.
fn root() -> Value {
    let halted = "has(self.status) && has(self.status.phase) && self.status.phase == 'Halted' && oldSelf.spec.runStrategy == 'Halted'";
    let fixed = |field: &str| {
        rule(
            format!("self.spec.{field} == oldSelf.spec.{field} || ({halted})"),
            format!(
                "spec.{field} changes only while the VM is halted: set spec.runStrategy to Halted, wait until the VM's status is Halted, then change it"
            ),
        )
    };
    json!([
        rule(
            format!(
                "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$') && size(self.metadata.name) <= {VM_NAME_LENGTH_MAX}"
            ),
            format!(
                "metadata.name is part of pods' names: write at most {VM_NAME_LENGTH_MAX} lower-case letters, digits and dashes, beginning with a letter, such as web-1"
            ),
        ),
        fixed("machine"),
        fixed("boot"),
        fixed("networks"),
    ])
}

pub(crate) fn spec() -> Value {
    json!([
        rule(
            "self.disks.map(d, d.name) == oldSelf.disks.map(d, d.name)",
            "spec.disks: names and order are fixed for the VM's life: put back what was there, or make another VM",
        ),
        rule(
            "self.networks.map(n, n.name) == oldSelf.networks.map(n, n.name)",
            "spec.networks: names and order are fixed for the VM's life: put back what was there, or make another VM",
        ),
        rule(
            "self.networks.all(n, !self.disks.exists(d, d.name == n.name))",
            "a network and a disk have the same name, which tells them apart: choose another name for one of them, such as net-1",
        ),
    ])
}

/// Of one disk; before and after, the API server compares those of one name.
pub(crate) fn disk() -> Value {
    json!([
        rule(
            "self.size == oldSelf.size && self.source == oldSelf.source",
            "a disk's size and source are fixed for the VM's life: put back what was there, or make another VM",
        ),
        rule(
            "!(has(self.storageClassName) && has(self.storageClassNames))",
            "name one class for both seats in storageClassName, or one for each seat in storageClassNames, and leave the other field out",
        ),
    ])
}

pub(crate) fn memory() -> Value {
    let least = format!("{}Mi", MEMORY_MIB.start());
    let most = format!("{}Ti", MEMORY_MIB.end() >> 20);
    json!([
        rule(
            format!("self.matches('{SIZE}')"),
            "write memory as a whole number with Mi, Gi or Ti, such as 512Mi or 4Gi",
        ),
        rule(
            format!(
                "!self.matches('{SIZE}') || (quantity(self).compareTo(quantity('{least}')) >= 0 && quantity(self).compareTo(quantity('{most}')) <= 0)"
            ),
            format!("memory must be from {least} to {most}: write for example 512Mi"),
        ),
    ])
}

pub(crate) fn size() -> Value {
    json!([rule(
        format!("self.matches('{SIZE}')"),
        "write a size as a whole number with Mi, Gi or Ti, such as 512Mi or 10Gi",
    )])
}

pub(crate) fn cpu() -> Value {
    json!([rule(
        "self.matches('^([1-9][0-9]{0,5}m|[1-9][0-9]{0,2}([.][0-9]{1,3})?)$')",
        "write CPU as a number of CPUs or thousandths with m, such as 2 or 500m",
    )])
}

pub(crate) fn boot() -> Value {
    json!([rule(
        "has(self.image) != has(self.volume)",
        "name exactly one of boot.image (reference: an OCI image) and boot.volume (claimName: a claim)",
    )])
}

pub(crate) fn path() -> Value {
    json!([rule(
        format!("self.matches('{PATH}')"),
        "write an absolute path of letters, digits, dots, dashes and underscores without hidden names, such as /boot/vmlinuz",
    )])
}

pub(crate) fn backing() -> Value {
    json!([
        rule(
            format!("self.all(path, path.matches('{PATH}'))"),
            "write backing files as absolute paths of letters, digits, dots, dashes and underscores without hidden names, nearest first, such as /disk/base.qcow2",
        ),
        rule(
            "self.all(one, self.exists_one(other, other == one))",
            "name each backing file once: a chain that leads back to itself has no end",
        ),
    ])
}

pub(crate) fn source() -> Value {
    let file = "(has(self.image) || has(self.claim) || has(self.http))";
    let backed = "((has(self.image) && has(self.image.backing)) || (has(self.claim) && has(self.claim.backing)))";
    json!([
        rule(
            "[has(self.image), has(self.claim), has(self.http), has(self.blank)].filter(named, named).size() <= 1",
            "name one of source.image, source.claim, source.http and source.blank, or none for a blank disk",
        ),
        rule(
            format!("{file} || !(has(self.format) || has(self.compression) || has(self.sha256))"),
            "source.format, source.compression and source.sha256 are about a file: name it with source.image, source.claim or source.http, or leave them out",
        ),
        rule(
            "!has(self.http) || has(self.sha256)",
            "write the SHA-256 of the file into source.sha256: without it nobody knows what a download brings",
        ),
        rule(
            "!(has(self.format) && self.format == 'Qcow2' && has(self.compression) && self.compression != 'None')",
            "a compressed qcow2 file can't be read: let qcow2 compress itself (qemu-img convert -c -O qcow2), and leave source.compression out",
        ),
        rule(
            format!("!{backed} || !has(self.format) || self.format == 'Qcow2'"),
            "only a qcow2 file has backing files: say source.format Qcow2, or leave backing out",
        ),
    ])
}

pub(crate) fn sha256() -> Value {
    json!([rule(
        "self.matches('^[0-9a-f]{64}$')",
        "write a SHA-256 as 64 hexadecimal digits in lower case, as sha256sum prints it",
    )])
}

pub(crate) fn url() -> Value {
    json!([rule(
        "self.matches('^https?://([A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|\\\\[[0-9A-Fa-f:.]+\\\\])(:[0-9]{1,5})?/[!-~]+$')",
        "write an address of a file, http or https without user and password, such as https://images.example/root.qcow2",
    )])
}

pub(crate) fn authority() -> Value {
    json!([rule(
        "self.startsWith('-----BEGIN CERTIFICATE-----')",
        "write certificates as PEM: the text begins with -----BEGIN CERTIFICATE-----",
    )])
}

pub(crate) fn name() -> Value {
    json!([rule(
        "self.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
        "write a name of lower-case letters, digits and dashes, beginning with a letter, such as root or net-1",
    )])
}

pub(crate) fn disk_name() -> Value {
    json!([
        rule(
            "self.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
            "write a name of lower-case letters, digits and dashes, beginning with a letter, such as root or data-1",
        ),
        rule(
            "self != 'guest' && self != 'identity'",
            "guest and identity are names of the seat's own volumes: choose another name, such as root",
        ),
    ])
}

pub(crate) fn network() -> Value {
    json!([
        rule(
            "has(self.bridge)",
            "say what the card is attached to: bridge (name: a bridge of the nodes)",
        ),
        rule(
            "has(self.mac) == has(oldSelf.mac) && (!has(self.mac) || self.mac == oldSelf.mac)",
            "a card's MAC address is fixed for the VM's life: put back what was there, or make another VM",
        ),
    ])
}

pub(crate) fn mac() -> Value {
    json!([rule(
        "self.matches('^[0-9a-f][02468ace](:[0-9a-f]{2}){5}$') && self != '00:00:00:00:00:00'",
        "write a unicast MAC address in lower case, such as 02:00:00:00:00:01, or leave it out",
    )])
}

pub(crate) fn addresses() -> Value {
    json!([
        rule(
            "self.all(a, isIP(a) && ip.isCanonical(a))",
            "write the guest's addresses without prefixes and in their shortest form, such as 192.0.2.7 or 2001:db8::7",
        ),
        rule(
            "self.all(a, !isIP(a) || ip(a).isGlobalUnicast() || ip(a).isLinkLocalUnicast())",
            "write addresses that one host has, such as 192.0.2.7, no multicast, loopback, broadcast or unspecified ones",
        ),
    ])
}

pub(crate) fn interface() -> Value {
    json!([rule(
        "self.matches('^[A-Za-z0-9_][A-Za-z0-9._-]*$')",
        "write the name of a network interface, such as br0",
    )])
}

pub(crate) fn interval() -> Value {
    json!([rule(
        "self.minMs <= self.maxMs",
        "interval.minMs is above interval.maxMs: write for example minMs 2 and maxMs 50",
    )])
}

pub(crate) fn fault_tolerance() -> Value {
    json!([
        rule(
            "!has(self.targetLatencyMs) || self.targetLatencyMs >= self.interval.minMs",
            "targetLatencyMs can't be met with epochs of interval.minMs: lower interval.minMs, or raise targetLatencyMs",
        ),
        rule(
            "self.detectionMs > self.interval.maxMs",
            "detectionMs must be longer than an epoch: raise detectionMs, or lower interval.maxMs",
        ),
    ])
}

/// The custom resource definition, as it is installed.
pub fn definition() -> Value {
    // Types of the API server itself always encode.
    let mut definition = serde_json::to_value(FaultTolerantVM::crd()).unwrap_or_default();
    let schema = &mut definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    schema["x-kubernetes-validations"] = root();
    simplify(schema);
    definition
}

/// Every rule's message. Tests have an example that is refused with each.
pub fn messages() -> Vec<String> {
    fn collect(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                if let Some(Value::Array(rules)) = fields.get("x-kubernetes-validations") {
                    found.extend(
                        rules
                            .iter()
                            .filter_map(|rule| rule["message"].as_str())
                            .map(str::to_owned),
                    );
                }
                fields.values().for_each(|value| collect(value, found));
            }
            Value::Array(list) => list.iter().for_each(|value| collect(value, found)),
            _ => {}
        }
    }
    let mut found = Vec::new();
    collect(&definition(), &mut found);
    found.sort();
    found.dedup();
    found
}

/// An integer's bounds become those of its Rust type: the API server takes any number, and one that a type can't hold makes the object unreadable.
fn bound(integer: &mut Map<String, Value>, format: &str) {
    let (minimum, maximum) = match format {
        "int32" => (json!(i32::MIN), u64::from(u32::MAX >> 1)),
        "int64" => (json!(-(WHOLE_MAX as i64)), WHOLE_MAX),
        "uint32" => (json!(0), u64::from(u32::MAX)),
        "uint64" => (json!(0), WHOLE_MAX),
        _ => return,
    };
    integer.entry("minimum").or_insert(minimum);
    integer.entry("maximum").or_insert(json!(maximum));
}

/// Bounds integers, and takes out what the API server would only warn of: Rust's unsigned formats, and `default: null`.
fn simplify(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            let unsigned = |format: &Value| format.as_str().is_some_and(|format| format.starts_with("uint"));
            if let Some(format) = fields.get("format").and_then(Value::as_str).map(str::to_owned) {
                bound(fields, &format);
            }
            if fields.get("format").is_some_and(unsigned) {
                fields.remove("format");
            }
            fields.values_mut().for_each(simplify);
        }
        Value::Array(list) => list.iter_mut().for_each(simplify),
        _ => {}
    }
}

#[cfg(test)]
#[path = "rules_tests.rs"]
mod tests;
