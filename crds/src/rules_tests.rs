use super::*;

fn properties<'a>(value: &'a Value, path: &str, visit: &mut impl FnMut(&str, &'a Value)) {
    visit(path, value);
    if let Some(fields) = value["properties"].as_object() {
        fields
            .iter()
            .for_each(|(name, field)| properties(field, &format!("{path}.{name}"), visit));
    }
    if value["items"].is_object() {
        properties(&value["items"], &format!("{path}[]"), visit);
    }
}

fn schema(definition: &Value) -> &Value {
    &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
}

#[test]
fn every_field_is_documented_for_kubectl_explain() {
    let definition = definition();
    let mut bare = Vec::new();
    properties(schema(&definition), "", &mut |path, field| {
        let documented = field["description"].as_str().is_some_and(|text| !text.is_empty());
        if !documented && !path.ends_with("[]") && !path.is_empty() {
            bare.push(path.to_owned());
        }
    });
    assert_eq!(bare, Vec::<String>::new());
}

#[test]
fn what_rules_look_at_is_bounded() {
    let definition = definition();
    let mut unbounded = Vec::new();
    properties(
        &schema(&definition)["properties"]["spec"],
        "spec",
        &mut |path, field| {
            let tolerations = path.starts_with("spec.placement.tolerations[]");
            let text = field["type"] == "string" && field["enum"].is_null() && field["maxLength"].is_null();
            let list = field["type"] == "array" && field["maxItems"].is_null();
            if (text || list) && !tolerations {
                unbounded.push(path.to_owned());
            }
        },
    );
    assert_eq!(unbounded, Vec::<String>::new());
}

/// Of the status, too: an object that can't be read is nobody's any more.
#[test]
fn no_integer_is_larger_than_its_type() {
    let definition = definition();
    let mut unbounded = Vec::new();
    properties(schema(&definition), "", &mut |path, field| {
        if field["type"] == "integer" && (field["minimum"].is_null() || field["maximum"].is_null()) {
            unbounded.push(path.to_owned());
        }
    });
    assert_eq!(unbounded, Vec::<String>::new());
    let status = &schema(&definition)["properties"]["status"]["properties"];
    assert_eq!(status["replacements"]["maximum"], u32::MAX);
}

#[test]
fn messages_say_what_to_write() {
    let messages = messages();
    assert!(messages.len() >= 20, "{messages:#?}");
    for message in messages {
        let advice = [
            "write", "name ", "say ", "choose", "put back", "set ", "lower ", "raise ", "leave",
        ];
        assert!(advice.iter().any(|word| message.contains(word)), "{message}");
    }
}

#[test]
fn a_card_has_at_most_as_many_addresses_as_the_daemon_takes() {
    let definition = definition();
    let networks = &schema(&definition)["properties"]["spec"]["properties"]["networks"];
    let addresses = &networks["items"]["properties"]["addresses"];
    assert_eq!(addresses["maxItems"], crate::ADDRESSES_MAX);
    assert_eq!(
        addresses["items"]["maxLength"],
        "2001:dddd:1111:2222:3333:4444:5555:6666".len()
    );
}

#[test]
fn a_disk_has_at_most_as_many_backing_files_as_the_seat_takes() {
    let definition = definition();
    let disks = &schema(&definition)["properties"]["spec"]["properties"]["disks"];
    for place in ["image", "claim"] {
        let backing = &disks["items"]["properties"]["source"]["properties"][place]["properties"]["backing"];
        assert_eq!(backing["maxItems"], crate::BACKING_MAX, "{place}");
        let default = &backing["default"];
        assert!(
            default.is_null(),
            "{place}: a rule asks whether there is one: {default}"
        );
    }
}

/// What the API server takes, the daemon takes, too.
#[test]
fn memory_is_bounded_by_one_constant() {
    let mib = |text: &str| crate::quantity::bytes(text).unwrap() >> 20;
    assert_eq!(mib("16Mi")..=mib("1Ti"), MEMORY_MIB);
    let rules = memory().to_string();
    for words in ["quantity('16Mi')) >= 0", "quantity('1Ti')) <= 0", "from 16Mi to 1Ti"] {
        assert!(rules.contains(words), "{rules}");
    }
}

#[test]
fn defaults_are_in_the_schema() {
    let definition = definition();
    let spec = &schema(&definition)["properties"]["spec"]["properties"];
    assert_eq!(spec["runStrategy"]["default"], "Always");
    assert_eq!(spec["machine"]["properties"]["vcpus"]["default"], 1);
    assert_eq!(spec["boot"]["properties"]["kernel"]["default"], "/boot/vmlinuz");
    assert_eq!(spec["faultTolerance"]["properties"]["detectionMs"]["default"], 300);
    assert_eq!(spec["faultTolerance"]["default"]["replaceAfterSeconds"], 20);
    assert_eq!(spec["faultTolerance"]["default"]["diskHoldMs"], 10_000);
    assert_eq!(
        spec["placement"]["properties"]["topologyKey"]["default"],
        "kubernetes.io/hostname"
    );
    assert_eq!(spec["volumePolicy"]["default"], "Delete");
}

#[test]
fn the_published_definition_is_of_these_types() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/ftvm.dev_faulttolerantvms.yaml");
    let published: Value = crate::yaml::read(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert!(
        published == definition(),
        "write it anew: cargo run -p ftvm-crds --bin crd-yaml > crds/ftvm.dev_faulttolerantvms.yaml"
    );
}
