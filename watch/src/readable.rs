//! Objects of a kind that another release may have described otherwise: what can't be read keeps nobody from reading the others.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, Resource, ResourceExt};
use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, Error as _};
use serde_json::Value;

use crate::lasting;

/// An object that is there, and that this release can't read.
#[derive(Debug, Clone, PartialEq)]
pub struct Unreadable {
    /// Which one.
    pub object: ObjectReference,
    /// The field and what is wrong with it.
    pub why: String,
}

/// The objects that are there and can't be read. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct UnreadableObjects(Arc<Mutex<BTreeMap<Key, Unreadable>>>);

/// Namespace and name.
type Key = (Option<String>, String);

fn key<K: Resource>(object: &K) -> Key {
    (object.namespace(), object.name_any())
}

impl UnreadableObjects {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Unreadable>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of them.
    #[must_use]
    pub fn all(&self) -> Vec<Unreadable> {
        self.lock().values().cloned().collect()
    }

    /// Whether the newest version of this object can't be read: what is known of it is old.
    #[must_use]
    pub fn has(&self, namespace: Option<&str>, name: &str) -> bool {
        self.lock()
            .contains_key(&(namespace.map(str::to_owned), name.to_owned()))
    }
}

impl FromIterator<Unreadable> for UnreadableObjects {
    fn from_iter<I: IntoIterator<Item = Unreadable>>(objects: I) -> Self {
        let keyed = objects.into_iter().map(|one| {
            let name = one.object.name.clone().unwrap_or_default();
            ((one.object.namespace.clone(), name), one)
        });
        Self(Arc::new(Mutex::new(keyed.collect())))
    }
}

/// [`lasting`] over all namespaces, for objects that it may not be possible to read. Of one that can't be read the store keeps the last version
/// that could, if there was one, so that nobody takes it for deleted; `unreadable` says which these are.
pub fn lasting_readable<K>(
    client: Client,
    config: watcher::Config,
    store: Store<K>,
    unreadable: UnreadableObjects,
) -> impl Stream<Item = watcher::Result<Event<K>>> + Send
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    let mut sieve = Sieve {
        store,
        unreadable,
        listed: BTreeSet::new(),
    };
    lasting(Api::<Told<K>>::all(client), config)
        .filter_map(move |event| std::future::ready(event.map(|event| sieve.pass(event)).transpose()))
}

/// What the API server tells of an object.
#[derive(Debug, Clone)]
enum Told<K> {
    Read(K),
    Not { metadata: Box<ObjectMeta>, why: String },
}

impl<'de, K: DeserializeOwned> Deserialize<'de> for Told<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Told<K>, D::Error> {
        let value = Value::deserialize(deserializer)?;
        match serde_path_to_error::deserialize(&value) {
            Ok(object) => Ok(Told::Read(object)),
            Err(error) => {
                // The API server's own part of every object.
                let metadata = Box::new(ObjectMeta::deserialize(&value["metadata"]).map_err(D::Error::custom)?);
                let why = error.to_string();
                Ok(Told::Not { metadata, why })
            }
        }
    }
}

impl<K: Resource<DynamicType = ()>> Resource for Told<K> {
    type DynamicType = ();
    type Scope = K::Scope;

    fn kind(_: &()) -> Cow<'_, str> {
        K::kind(&())
    }

    fn group(_: &()) -> Cow<'_, str> {
        K::group(&())
    }

    fn version(_: &()) -> Cow<'_, str> {
        K::version(&())
    }

    fn plural(_: &()) -> Cow<'_, str> {
        K::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        match self {
            Told::Read(object) => object.meta(),
            Told::Not { metadata, .. } => metadata,
        }
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        match self {
            Told::Read(object) => object.meta_mut(),
            Told::Not { metadata, .. } => metadata,
        }
    }
}

/// Lets through what can be read, and keeps books of the rest.
struct Sieve<K: Resource<DynamicType = ()> + 'static> {
    store: Store<K>,
    unreadable: UnreadableObjects,
    /// Those of the list that is being told.
    listed: BTreeSet<Key>,
}

impl<K: Resource<DynamicType = ()> + Clone + 'static> Sieve<K> {
    fn pass(&mut self, event: Event<Told<K>>) -> Option<Event<K>> {
        match event {
            Event::Init => {
                self.listed.clear();
                Some(Event::Init)
            }
            // Its mark goes with the end of the list: until then the store has what it had.
            Event::InitApply(Told::Read(object)) => Some(Event::InitApply(object)),
            Event::InitApply(told) => {
                self.listed.insert(key(&told));
                self.mark(&told);
                self.last(&told).map(Event::InitApply)
            }
            Event::InitDone => {
                let listed = std::mem::take(&mut self.listed);
                self.unreadable.lock().retain(|key, _| listed.contains(key));
                Some(Event::InitDone)
            }
            Event::Apply(Told::Read(object)) => {
                self.unreadable.lock().remove(&key(&object));
                Some(Event::Apply(object))
            }
            // The store has the last one already.
            Event::Apply(told) => {
                self.mark(&told);
                None
            }
            Event::Delete(told) => {
                self.unreadable.lock().remove(&key(&told));
                let object = match told {
                    Told::Read(object) => Some(object),
                    Told::Not { .. } => self.last(&told),
                };
                object.map(Event::Delete)
            }
        }
    }

    /// Enters it in the books if it can't be read.
    fn mark(&self, told: &Told<K>) {
        if let Told::Not { why, .. } = told {
            let (object, why) = (told.object_ref(&()), why.clone());
            self.unreadable.lock().insert(key(told), Unreadable { object, why });
        }
    }

    /// What the store has of this very object.
    fn last(&self, told: &Told<K>) -> Option<K> {
        let mut of = ObjectRef::new(&told.name_any());
        of.namespace = told.namespace();
        let known = self.store.get(&of)?;
        (known.meta().uid == told.meta().uid).then(|| (*known).clone())
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;
    use kube::runtime::reflector::{self, store::Writer};
    use serde_json::json;

    use super::*;

    fn told(name: &str, uid: &str, data: &Value) -> Told<ConfigMap> {
        let object = json!({
            "apiVersion": "v1", "kind": "ConfigMap", "data": data,
            "metadata": {"name": name, "namespace": "shop", "uid": uid, "resourceVersion": "7"},
        });
        serde_json::from_value(object).unwrap()
    }

    fn good(name: &str) -> Told<ConfigMap> {
        told(name, name, &json!({"colour": "red"}))
    }

    fn bad(name: &str) -> Told<ConfigMap> {
        told(name, name, &json!({"colour": 7}))
    }

    struct Watch {
        sieve: Sieve<ConfigMap>,
        writer: Writer<ConfigMap>,
    }

    impl Watch {
        fn new() -> Watch {
            let (store, writer) = reflector::store();
            let sieve = Sieve {
                store,
                unreadable: UnreadableObjects::default(),
                listed: BTreeSet::new(),
            };
            Watch { sieve, writer }
        }

        /// What is known after these events.
        fn after(&mut self, events: impl IntoIterator<Item = Event<Told<ConfigMap>>>) -> (Vec<String>, Vec<String>) {
            for event in events {
                if let Some(event) = self.sieve.pass(event) {
                    self.writer.apply_watcher_event(&event);
                }
            }
            let mut known: Vec<_> = self
                .sieve
                .store
                .state()
                .iter()
                .map(|object| object.name_any())
                .collect();
            known.sort();
            let unreadable = self.sieve.unreadable.all();
            (
                known,
                unreadable.into_iter().filter_map(|one| one.object.name).collect(),
            )
        }
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn list(objects: impl IntoIterator<Item = Told<ConfigMap>>) -> Vec<Event<Told<ConfigMap>>> {
        let objects = objects.into_iter().map(Event::InitApply);
        [Event::Init]
            .into_iter()
            .chain(objects)
            .chain([Event::InitDone])
            .collect()
    }

    #[test]
    fn what_cant_be_read_says_which_field_and_keeps_its_version() {
        let told = bad("web");
        assert_eq!(told.resource_version().as_deref(), Some("7"));
        assert!(
            matches!(&told, Told::Not { why, .. } if why.starts_with("data.colour: invalid type: integer `7`")),
            "{told:?}"
        );
        let reference = told.object_ref(&());
        assert_eq!(
            (reference.kind.as_deref(), reference.uid.as_deref()),
            (Some("ConfigMap"), Some("web"))
        );
    }

    #[test]
    fn one_that_cant_be_read_hides_no_other() {
        let mut watch = Watch::new();
        let after = watch.after(list([bad("a"), good("b"), bad("c")]));
        assert_eq!(after, (names(&["b"]), names(&["a", "c"])));
        let after = watch.after([
            Event::Apply(good("a")),
            Event::Delete(bad("c")),
            Event::Apply(good("d")),
        ]);
        assert_eq!(after, (names(&["a", "b", "d"]), names(&[])));
    }

    #[test]
    fn one_that_can_be_read_no_longer_is_not_taken_for_deleted() {
        let mut watch = Watch::new();
        watch.after(list([good("a"), good("b")]));
        assert_eq!(
            watch.after([Event::Apply(bad("a"))]),
            (names(&["a", "b"]), names(&["a"]))
        );
        // Nor by a list.
        assert_eq!(
            watch.after(list([bad("a"), good("b")])),
            (names(&["a", "b"]), names(&["a"]))
        );
        let has = |name| watch.sieve.unreadable.has(Some("shop"), name);
        assert!(has("a") && !has("b"));
        assert_eq!(watch.after([Event::Delete(bad("a"))]), (names(&["b"]), names(&[])));
    }

    #[test]
    fn what_a_list_lacks_is_gone() {
        let mut watch = Watch::new();
        watch.after(list([good("a"), bad("b")]));
        assert_eq!(watch.after(list([good("a")])), (names(&["a"]), names(&[])));
    }

    /// A list may end in the middle and begin anew.
    #[test]
    fn until_a_list_ends_what_is_known_is_old() {
        let mut watch = Watch::new();
        watch.after(list([good("a")]));
        watch.after([Event::Apply(bad("a"))]);
        let after = watch.after([Event::Init, Event::InitApply(good("a")), Event::Init]);
        assert_eq!(after, (names(&["a"]), names(&["a"])));
        assert_eq!(watch.after(list([good("a")])), (names(&["a"]), names(&[])));
    }

    /// The former one of this name is gone, whatever can be read of its successor.
    #[test]
    fn another_object_of_the_name_is_not_the_one_that_was_read() {
        let mut watch = Watch::new();
        watch.after(list([good("a")]));
        let successor = told("a", "second", &json!({"colour": 7}));
        assert_eq!(watch.after(list([successor])), (names(&[]), names(&["a"])));
    }
}
