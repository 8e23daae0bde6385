//! Objects for programs: all fields as the API server has them, but for `managedFields`, which kubectl leaves out, too.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::seen::Seen;
use crate::text::is_plain;

/// In which form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// RFC 8259.
    Json,
    /// As kubectl writes it.
    Yaml,
}

/// One object.
pub fn one(seen: &Seen, form: Form) -> String {
    write(&shown(seen), form)
}

/// A list as kubectl has it.
pub fn list(vms: &[Seen], form: Form) -> String {
    let items: Vec<Value> = vms.iter().map(shown).collect();
    write(
        &json!({"apiVersion": "v1", "kind": "List", "metadata": {}, "items": items}),
        form,
    )
}

fn shown(seen: &Seen) -> Value {
    let mut object = seen.object.clone();
    if let Some(metadata) = object["metadata"].as_object_mut() {
        metadata.remove("managedFields");
    }
    object
}

fn write(value: &Value, form: Form) -> String {
    if form == Form::Yaml
        && let Ok(text) = ftvm_crds::yaml::write(value)
        && text.chars().all(|character| character == '\n' || is_plain(character))
    {
        return text;
    }
    // YAML has no escapes outside of quotes; and JSON is YAML.
    escaped(&format!("{value:#}\n"))
}

/// JSON that shows what is in it: outside of texts it has ASCII alone, and within a text an escape is the same character.
fn escaped(json: &str) -> String {
    let mut safe = String::with_capacity(json.len());
    for character in json.chars() {
        if character == '\n' || is_plain(character) {
            safe.push(character);
        } else {
            for unit in character.encode_utf16(&mut [0; 2]).iter() {
                // A String takes everything.
                let _ = write!(safe, "\\u{unit:04x}");
            }
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::seen;

    const HOSTILE: &str = "a\u{1b}[2J\u{9b}1m\u{202e}b\u{e0041}\u{7f}\n";

    fn hostile() -> Seen {
        let mut seen = seen("web", "");
        seen.object["status"]["later"] = json!(HOSTILE);
        seen.object["metadata"]["managedFields"] = json!([{"manager": "x"}]);
        seen
    }

    #[test]
    fn programs_get_every_field_and_terminals_no_control_character() {
        let seen = hostile();
        for form in [Form::Json, Form::Yaml] {
            let text = one(&seen, form);
            assert!(
                text.chars().all(|character| character == '\n' || is_plain(character)),
                "{text}"
            );
        }
        let read: Value = serde_json::from_str(&one(&seen, Form::Json)).unwrap();
        assert_eq!(read["status"]["later"], HOSTILE);
        assert_eq!(read["spec"], seen.object["spec"]);
        assert!(read["metadata"]["managedFields"].is_null(), "{read}");
    }

    #[test]
    fn yaml_is_the_same_object() {
        let seen = seen("web", "phase: Running");
        let text = one(&seen, Form::Yaml);
        assert!(text.contains("  phase: Running\n"), "{text}");
        let read: Value = ftvm_crds::yaml::read(&text).unwrap();
        assert_eq!(read, seen.object);
    }

    #[test]
    fn a_list_is_one_object() {
        let vms = [seen("a", ""), seen("b", "")];
        let read: Value = serde_json::from_str(&list(&vms, Form::Json)).unwrap();
        assert_eq!((&read["kind"], &read["items"][1]), (&json!("List"), &vms[1].object));
        assert_eq!(read["items"].as_array().unwrap().len(), 2);
    }
}
