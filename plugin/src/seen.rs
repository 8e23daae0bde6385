//! A FaultTolerantVM as the API server tells it: every field, also those that this release does not know, and what this release makes of it.

use std::borrow::Cow;

use ftvm_crds::FaultTolerantVM;
use kube::core::{ObjectMeta, Resource};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _};
use serde_json::Value;

/// An object of the kind.
#[derive(Debug, Clone)]
pub struct Seen {
    /// As it came.
    pub object: Value,
    metadata: ObjectMeta,
    /// As this release reads it; else which field it can't read, and why.
    pub vm: Result<Box<FaultTolerantVM>, String>,
}

impl<'de> Deserialize<'de> for Seen {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Seen, D::Error> {
        let object = Value::deserialize(deserializer)?;
        // The API server's own part of every object.
        let metadata = ObjectMeta::deserialize(&object["metadata"]).map_err(D::Error::custom)?;
        let vm: Result<FaultTolerantVM, _> = serde_path_to_error::deserialize(&object);
        let vm = vm.map(Box::new).map_err(|error| error.to_string());
        Ok(Seen { object, metadata, vm })
    }
}

impl Resource for Seen {
    type DynamicType = ();
    type Scope = <FaultTolerantVM as Resource>::Scope;

    fn kind(_: &()) -> Cow<'_, str> {
        FaultTolerantVM::kind(&())
    }

    fn group(_: &()) -> Cow<'_, str> {
        FaultTolerantVM::group(&())
    }

    fn version(_: &()) -> Cow<'_, str> {
        FaultTolerantVM::version(&())
    }

    fn plural(_: &()) -> Cow<'_, str> {
        FaultTolerantVM::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}
