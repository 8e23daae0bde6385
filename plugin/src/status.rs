//! `kubectl ftvm status`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use futures::StreamExt as _;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;
use kube::runtime::watcher::{self, Event};

use crate::arguments::Status;
use crate::cluster::Cluster;
use crate::failure::Failure;
use crate::objects::{self, Form};
use crate::pace::Pace;
use crate::seen::Seen;
use crate::text::{Cell, Columns, Last, Paper};
use crate::{detail, fleet, print, say};

/// Tells how VMs are.
pub async fn run(status: &Status) -> Result<(), Failure> {
    let cluster = Cluster::connect(&status.place).await?;
    let form = status.output.form();
    match (&status.name, status.watch) {
        (Some(name), false) => print(&one(&cluster, name, cluster.seen(name).await?, form).await?),
        (Some(name), true) => follow(&cluster, name, form).await,
        (None, false) => {
            let vms = cluster.fleet(status.all_namespaces).await?;
            if let Some(form) = form {
                return print(&objects::list(&vms, form));
            }
            if vms.is_empty() {
                say(&nobody(&cluster, status.all_namespaces));
                return Ok(());
            }
            print(&fleet::render(
                &vms,
                status.all_namespaces,
                Timestamp::now(),
                Paper::stdout(),
            ))
        }
        (None, true) => follow_all(&cluster, status.all_namespaces, form).await,
    }
}

fn nobody(cluster: &Cluster, all: bool) -> String {
    if all {
        return "there are no FaultTolerantVMs".to_owned();
    }
    format!(
        "there are no FaultTolerantVMs in namespace {}; --all-namespaces looks elsewhere, too",
        cluster.namespace
    )
}

/// One VM in full, or as an object.
async fn one(cluster: &Cluster, name: &str, seen: Seen, form: Option<Form>) -> Result<String, Failure> {
    if let Some(form) = form {
        return Ok(objects::one(&seen, form));
    }
    let vm = cluster.readable(name, seen)?;
    let said = cluster.said(name).await;
    Ok(detail::render(&vm, &said, Timestamp::now(), Paper::stdout()))
}

/// What comes between two objects.
fn between(form: Option<Form>) -> &'static str {
    match form {
        None => "\n",
        Some(Form::Json) => "",
        Some(Form::Yaml) => "---\n",
    }
}

/// One VM again and again, until it is deleted.
async fn follow(cluster: &Cluster, name: &str, form: Option<Form>) -> Result<(), Failure> {
    // There may be none, which a watch does not tell.
    cluster.seen(name).await?;
    let mut changes = std::pin::pin!(cluster.changes(Some(name), false));
    let mut patience = Impatience::default();
    let (mut told, mut listed): (Option<Option<String>>, bool) = (None, false);
    while let Some(event) = changes.next().await {
        let Some(event) = patience.hear(event)? else { continue };
        match event {
            Event::Init => listed = false,
            Event::InitApply(seen) | Event::Apply(seen) => {
                listed = true;
                let version = seen.resource_version();
                // A list that is begun anew tells what is known.
                if told.as_ref() != Some(&version) {
                    let gap = if told.is_some() { between(form) } else { "" };
                    print(&format!("{gap}{}", one(cluster, name, seen, form).await?))?;
                    told = Some(version);
                }
            }
            Event::InitDone if listed => {}
            Event::InitDone | Event::Delete(_) => {
                return Err(Failure::Gone {
                    namespace: cluster.namespace.clone(),
                    name: name.to_owned(),
                });
            }
        }
    }
    Ok(())
}

/// All VMs, then what changes, for ever.
async fn follow_all(cluster: &Cluster, all: bool, form: Option<Form>) -> Result<(), Failure> {
    let mut changes = std::pin::pin!(cluster.changes(None, all));
    let mut patience = Impatience::default();
    let mut board = Board::new(all, form, Paper::stdout());
    while let Some(event) = changes.next().await {
        // Who can't list them is told so, and does not wait: as without a watch.
        let event = if board.begun {
            patience.hear(event)?
        } else {
            Some(event.map_err(failure)?)
        };
        if let Some(event) = event {
            print(&board.pass(event, Timestamp::now()))?;
        }
    }
    Ok(())
}

/// Why a watch does not go on.
fn failure(error: watcher::Error) -> Failure {
    const WHAT: &str = "watch FaultTolerantVMs";
    match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => Failure::of(WHAT, &error),
        watcher::Error::WatchError(status) => Failure::of(WHAT, &kube::Error::Api(status)),
        error @ watcher::Error::NoResourceVersion => Failure::ApiServer {
            what: WHAT.to_owned(),
            why: error.to_string(),
            lasts: true,
        },
    }
}

/// What a watch can't do, and may be able to in a moment, is told and waited for.
#[derive(Default)]
struct Impatience(Pace);

impl Impatience {
    /// The event, if it is one.
    fn hear(&mut self, event: watcher::Result<Event<Seen>>) -> Result<Option<Event<Seen>>, Failure> {
        let failure = match event {
            Ok(event) => return Ok(Some(event)),
            Err(error) => failure(error),
        };
        if !failure.may_pass() {
            return Err(failure);
        }
        let text = failure.to_string();
        if self.0.is_news(&text, Instant::now()) {
            say(&text);
        }
        Ok(None)
    }
}

/// Namespace and name.
type Key = (String, String);

/// What is on the screen of whoever watches all VMs.
struct Board {
    all: bool,
    form: Option<Form>,
    paper: Paper,
    columns: Columns,
    /// As they were told last, by their looks at the beginning of time: that they grow older is no news.
    known: BTreeMap<Key, Known>,
    listed: BTreeSet<Key>,
    /// The head and the first list are told.
    begun: bool,
}

struct Known {
    seen: Seen,
    looks: Vec<Cell>,
}

impl Board {
    fn new(all: bool, form: Option<Form>, paper: Paper) -> Board {
        Board {
            all,
            form,
            paper,
            columns: Columns::new(0, Last::Cut),
            known: BTreeMap::new(),
            listed: BTreeSet::new(),
            begun: false,
        }
    }

    /// What is to be printed after an event.
    fn pass(&mut self, event: Event<Seen>, now: Timestamp) -> String {
        match event {
            Event::Init => {
                self.listed.clear();
                String::new()
            }
            Event::InitApply(seen) => {
                self.listed.insert(key(&seen));
                self.change(seen, now)
            }
            Event::Apply(seen) => self.change(seen, now),
            Event::InitDone => self.whole(now),
            Event::Delete(seen) => self.remove(&key(&seen), now),
        }
    }

    fn change(&mut self, seen: Seen, now: Timestamp) -> String {
        let looks = fleet::row(&seen, self.all, Timestamp::UNIX_EPOCH);
        let key = key(&seen);
        let same = self.known.get(&key).is_some_and(|known| match self.form {
            Some(_) => known.seen.resource_version() == seen.resource_version(),
            None => known.looks == looks,
        });
        let text = match self.form {
            _ if same => String::new(),
            Some(form) => format!("{}{}", objects::one(&seen, form), between(self.form)),
            // The first ones wait until it is known how wide their columns are.
            None if !self.begun => String::new(),
            None => self.line(&fleet::row(&seen, self.all, now)),
        };
        self.known.insert(key, Known { seen, looks });
        text
    }

    /// A list is told to its end: what is not in it was deleted unseen.
    fn whole(&mut self, now: Timestamp) -> String {
        let gone: Vec<Key> = self
            .known
            .keys()
            .filter(|key| !self.listed.contains(*key))
            .cloned()
            .collect();
        let mut text: String = gone.iter().map(|key| self.remove(key, now)).collect();
        if !self.begun && self.form.is_none() {
            let rows = self.known.values().map(|known| fleet::row(&known.seen, self.all, now));
            let rows: Vec<_> = std::iter::once(fleet::head(self.all)).chain(rows).collect();
            for row in &rows {
                self.columns.fit(row);
            }
            text = rows.iter().map(|row| self.columns.line(row, self.paper)).collect();
        }
        self.begun = true;
        text
    }

    fn remove(&mut self, key: &Key, now: Timestamp) -> String {
        match self.known.remove(key) {
            Some(known) if self.form.is_none() => self.line(&fleet::gone(&known.seen, self.all, now)),
            _ => String::new(),
        }
    }

    fn line(&mut self, row: &[Cell]) -> String {
        self.columns.fit(row);
        self.columns.line(row, self.paper)
    }
}

fn key(seen: &Seen) -> Key {
    (seen.namespace().unwrap_or_default(), seen.name_any())
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;
    use crate::testing::{PROTECTED, RESYNCING, now, seen};

    fn board(form: Option<Form>) -> Board {
        Board::new(false, form, Paper::default())
    }

    fn begin(board: &mut Board) -> String {
        let first = [
            Event::Init,
            Event::InitApply(seen("web", PROTECTED)),
            Event::InitApply(seen("joins", RESYNCING)),
            Event::InitDone,
        ];
        first.into_iter().map(|event| board.pass(event, now())).collect()
    }

    #[test]
    fn whoever_watches_sees_all_and_then_what_changes() {
        let mut board = board(None);
        let first = begin(&mut board);
        let lines: Vec<&str> = first.lines().collect();
        assert!(lines.len() == 3 && lines[0].starts_with("NAME"), "{first}");
        assert!(lines[1].starts_with("joins  Running  no"), "{first}");
        // The same once more, later, is no news.
        let later = now() + k8s_openapi::jiff::SignedDuration::from_hours(1);
        assert_eq!(board.pass(Event::Apply(seen("web", PROTECTED)), later), "");
        let change = board.pass(Event::Apply(seen("joins", PROTECTED)), later);
        assert!(
            change.starts_with("joins  Running  yes") && change.lines().count() == 1,
            "{change}"
        );
        assert_eq!(
            board.pass(Event::Delete(seen("joins", PROTECTED)), later),
            "joins  gone\n"
        );
    }

    #[test]
    fn a_new_list_tells_what_changed_meanwhile_and_no_head() {
        let mut board = board(None);
        begin(&mut board);
        let again = [Event::Init, Event::InitApply(seen("web", RESYNCING)), Event::InitDone];
        let text: String = again.into_iter().map(|event| board.pass(event, now())).collect();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines.len() == 2 && lines[0].starts_with("web    Running  no"), "{text}");
        assert_eq!(lines[1], "joins  gone");
    }

    #[test]
    fn programs_get_each_object_whole() {
        let mut board = board(Some(Form::Yaml));
        let text = begin(&mut board);
        assert_eq!(text.matches("---\n").count(), 2, "{text}");
        assert_eq!(text.matches("kind: FaultTolerantVM\n").count(), 2, "{text}");
    }

    #[test]
    fn what_lasts_ends_a_watch_and_what_passes_does_not() {
        let mut impatience = Impatience::default();
        let answer = |code| Box::new(Status::failure("not so", "Reason").with_code(code));
        assert!(matches!(
            impatience.hear(Err(watcher::Error::WatchError(answer(500)))),
            Ok(None)
        ));
        let forbidden = watcher::Error::InitialListFailed(kube::Error::Api(answer(403)));
        assert_eq!(impatience.hear(Err(forbidden)).unwrap_err().code(), 31);
        assert!(matches!(
            impatience.hear(Ok(Event::InitDone)),
            Ok(Some(Event::InitDone))
        ));
    }
}
