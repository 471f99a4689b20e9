//! What has been said so far, and what follows from what is seen. Pure.
//!
//! Of each thing only a hash of what was said last is kept, so that the many changes of objects that change nothing here
//! are not said again. Templates are kept themselves: they are said anew when the pull secrets of their ServiceAccount
//! change. A list that begins anew counts up; what it has not named when it ends is gone.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher as _, Hash, RandomState};

use super::objects::{Place, Reading, Thing};
use crate::event::{Event, SecretRef, Workload, WorkloadId, WorkloadKind};

/// What is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Kind {
    Policies,
    Nodes,
    Accounts,
    Workloads(WorkloadKind),
}

impl Kind {
    /// All of them.
    pub(super) const ALL: [Self; 9] = [
        Self::Policies,
        Self::Nodes,
        Self::Accounts,
        Self::Workloads(WorkloadKind::Pod),
        Self::Workloads(WorkloadKind::Deployment),
        Self::Workloads(WorkloadKind::StatefulSet),
        Self::Workloads(WorkloadKind::DaemonSet),
        Self::Workloads(WorkloadKind::Job),
        Self::Workloads(WorkloadKind::CronJob),
    ];

    /// As the API names it.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Policies => "hermespolicies",
            Self::Nodes => "nodes",
            Self::Accounts => "serviceaccounts",
            Self::Workloads(WorkloadKind::Pod) => "pods",
            Self::Workloads(WorkloadKind::Deployment) => "deployments",
            Self::Workloads(WorkloadKind::StatefulSet) => "statefulsets",
            Self::Workloads(WorkloadKind::DaemonSet) => "daemonsets",
            Self::Workloads(WorkloadKind::Job) => "jobs",
            Self::Workloads(WorkloadKind::CronJob) => "cronjobs",
        }
    }
}

/// Something that a watch has seen.
#[derive(Debug)]
pub(super) enum Seen {
    /// A list begins; everything that is there follows.
    Began,
    /// An object.
    Read(Reading),
    /// The list has ended.
    Listed,
}

/// One thing that is there.
#[derive(Debug)]
struct Entry {
    /// The hash of what was said; `None` before anything was.
    said: Option<u64>,
    /// The list that named it last.
    list: u64,
    /// A template, with its ServiceAccount if that gives it pull secrets.
    template: Option<Box<(Workload, Option<String>)>>,
}

/// All that is known.
#[derive(Debug, Default)]
pub(super) struct Known {
    hashes: RandomState,
    things: BTreeMap<Kind, BTreeMap<Place, Entry>>,
    /// The pull secrets of ServiceAccounts that have some.
    accounts: BTreeMap<Place, (u64, Vec<String>)>,
    /// The number of the list that was begun last.
    lists: BTreeMap<Kind, u64>,
    /// What has been listed once.
    listed: BTreeSet<Kind>,
    synced: bool,
}

impl Known {
    /// Takes in what was seen and adds what follows to `events`.
    pub(super) fn apply(&mut self, kind: Kind, seen: Seen, events: &mut Vec<Event>) {
        match seen {
            Seen::Began => *self.lists.entry(kind).or_default() += 1,
            Seen::Read(Reading::There(thing)) => self.there(kind, thing, events),
            Seen::Read(Reading::Gone(place)) => self.gone(kind, &place, events),
            Seen::Listed => self.list_ended(kind, events),
        }
    }

    fn there(&mut self, kind: Kind, thing: Thing, events: &mut Vec<Event>) {
        let list = self.lists.get(&kind).copied().unwrap_or_default();
        match thing {
            Thing::Account(place, secrets) => {
                let before = self.accounts.insert(place.clone(), (list, secrets.clone()));
                if before.is_none_or(|(_, before)| before != secrets) {
                    self.say_templates_of(&place, events);
                }
            }
            Thing::Policy(policy) => {
                let place = Place { namespace: String::new(), name: policy.name.clone() };
                // A text, because what a spec is made of has no hash.
                let text = serde_json::to_string(&policy.spec).unwrap_or_default();
                if self.is_news(kind, place, list, &(policy.generation, text)) {
                    events.push(Event::Policy(policy));
                }
            }
            Thing::Node(node) => {
                let place = Place { namespace: String::new(), name: node.name.clone() };
                if self.is_news(kind, place, list, &(&node.labels, &node.zone, node.schedulable)) {
                    events.push(Event::Node(node));
                }
            }
            Thing::Workload(workload, _) if workload.id.kind == WorkloadKind::Pod => {
                let place = place_of(&workload.id);
                if self.is_news(kind, place, list, &(&workload.images, &workload.pull_secrets, workload.waiting)) {
                    events.push(Event::Workload(workload));
                }
            }
            Thing::Workload(workload, account) => {
                let place = place_of(&workload.id);
                let entry = self.things.entry(kind).or_default().entry(place.clone());
                let entry = entry.or_insert(Entry { said: None, list, template: None });
                (entry.list, entry.template) = (list, Some(Box::new((workload, account))));
                self.say_template(kind, &place, events);
            }
        }
    }

    /// Notes that a thing is there and whether what is now said of it is new.
    fn is_news(&mut self, kind: Kind, place: Place, list: u64, facts: &impl Hash) -> bool {
        let hash = self.hashes.hash_one(facts);
        let entry = Entry { said: Some(hash), list, template: None };
        let before = self.things.entry(kind).or_default().insert(place, entry);
        before.is_none_or(|before| before.said != Some(hash))
    }

    /// Says a template with the pull secrets of its ServiceAccount, unless that is what was said last. Nothing is said
    /// before the accounts are known: images would be asked for without logins, and refused.
    fn say_template(&mut self, kind: Kind, place: &Place, events: &mut Vec<Event>) {
        if !self.listed.contains(&Kind::Accounts) {
            return;
        }
        let Some(entry) = self.things.get_mut(&kind).and_then(|things| things.get_mut(place)) else { return };
        let Some((workload, account)) = entry.template.as_deref() else { return };
        let mut workload = workload.clone();
        if let Some(account) = account {
            let account = Place { namespace: place.namespace.clone(), name: account.clone() };
            let names = self.accounts.get(&account).map(|(_, names)| names.as_slice()).unwrap_or_default();
            let secret = |name: &String| SecretRef { namespace: place.namespace.clone(), name: name.clone() };
            workload.pull_secrets = names.iter().map(secret).collect();
        }
        let hash = self.hashes.hash_one((&workload.images, &workload.pull_secrets));
        if entry.said.replace(hash) != Some(hash) {
            events.push(Event::Workload(workload));
        }
    }

    /// Says the templates anew whose ServiceAccount is at `account`.
    fn say_templates_of(&mut self, account: &Place, events: &mut Vec<Event>) {
        let is_meant = |(place, entry): &(&Place, &Entry)| {
            let named = entry.template.as_ref().and_then(|template| template.1.as_deref());
            place.namespace == account.namespace && named == Some(account.name.as_str())
        };
        let meant = |(kind, things): (&Kind, &BTreeMap<Place, Entry>)| {
            let from = Place { namespace: account.namespace.clone(), name: String::new() };
            let here = things.range(from..).take_while(|(place, _)| place.namespace == account.namespace);
            here.filter(is_meant).map(|(place, _)| (*kind, place.clone())).collect::<Vec<_>>()
        };
        let all: Vec<_> = self.things.iter().flat_map(meant).collect();
        for (kind, place) in all {
            self.say_template(kind, &place, events);
        }
    }

    fn gone(&mut self, kind: Kind, place: &Place, events: &mut Vec<Event>) {
        if kind == Kind::Accounts {
            if self.accounts.remove(place).is_some() {
                self.say_templates_of(place, events);
            }
            return;
        }
        let before = self.things.get_mut(&kind).and_then(|things| things.remove(place));
        if before.is_some_and(|before| before.said.is_some()) {
            events.extend(gone_event(kind, place));
        }
    }

    fn list_ended(&mut self, kind: Kind, events: &mut Vec<Event>) {
        let list = self.lists.get(&kind).copied().unwrap_or_default();
        let lost: Vec<Place> = match kind {
            Kind::Accounts => {
                self.accounts.iter().filter(|(_, account)| account.0 != list).map(|(place, _)| place.clone()).collect()
            }
            _ => {
                let things = self.things.get(&kind).into_iter().flatten();
                things.filter(|(_, entry)| entry.list != list).map(|(place, _)| place.clone()).collect()
            }
        };
        for place in lost {
            self.gone(kind, &place, events);
        }
        let first = self.listed.insert(kind);
        if kind == Kind::Accounts && first {
            let is_template = |entry: &Entry| entry.template.is_some();
            let places = |(kind, things): (&Kind, &BTreeMap<Place, Entry>)| {
                let templates = things.iter().filter(|(_, entry)| is_template(entry));
                templates.map(|(place, _)| (*kind, place.clone())).collect::<Vec<_>>()
            };
            let held: Vec<_> = self.things.iter().flat_map(places).collect();
            for (kind, place) in held {
                self.say_template(kind, &place, events);
            }
        }
        if !self.synced && Kind::ALL.iter().all(|kind| self.listed.contains(kind)) {
            self.synced = true;
            events.push(Event::Synced);
        }
    }
}

fn place_of(id: &WorkloadId) -> Place {
    Place { namespace: id.namespace.clone(), name: id.name.clone() }
}

/// That a thing is gone; ServiceAccounts are no facts of their own.
fn gone_event(kind: Kind, place: &Place) -> Option<Event> {
    match kind {
        Kind::Policies => Some(Event::PolicyGone(place.name.clone())),
        Kind::Nodes => Some(Event::NodeGone(place.name.clone())),
        Kind::Workloads(kind) => {
            let (namespace, name) = (place.namespace.clone(), place.name.clone());
            Some(Event::WorkloadGone(WorkloadId { kind, namespace, name }))
        }
        Kind::Accounts => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::ClusterNode;

    fn place(name: &str) -> Place {
        Place { namespace: "n".to_owned(), name: name.to_owned() }
    }

    fn read(thing: Thing) -> Seen {
        Seen::Read(Reading::There(thing))
    }

    fn workload(kind: WorkloadKind, name: &str, images: &[&str]) -> Workload {
        Workload {
            id: WorkloadId { kind, namespace: "n".to_owned(), name: name.to_owned() },
            images: images.iter().map(|&image| image.to_owned()).collect(),
            pull_secrets: Vec::new(),
            waiting: false,
        }
    }

    /// What follows, in words.
    fn apply(known: &mut Known, kind: Kind, seen: Seen) -> Vec<String> {
        let mut events = Vec::new();
        known.apply(kind, seen, &mut events);
        let words = |event: &Event| match event {
            Event::Workload(it) => {
                let secrets: Vec<_> = it.pull_secrets.iter().map(|secret| secret.name.as_str()).collect();
                format!("{} {}", it.id.name, secrets.join("+"))
            }
            Event::WorkloadGone(id) => format!("{} gone", id.name),
            Event::Node(node) => format!("node {}", node.name),
            Event::NodeGone(name) => format!("node {name} gone"),
            Event::Synced => "synced".to_owned(),
            other => format!("{other:?}"),
        };
        events.iter().map(words).collect()
    }

    const PODS: Kind = Kind::Workloads(WorkloadKind::Pod);
    const JOBS: Kind = Kind::Workloads(WorkloadKind::Job);

    #[test]
    fn what_changes_nothing_is_not_said_again() {
        let mut known = Known::default();
        let pod = |images: &[&str]| read(Thing::Workload(workload(WorkloadKind::Pod, "p", images), None));
        assert_eq!(apply(&mut known, PODS, pod(&["a"])), ["p "]);
        assert_eq!(apply(&mut known, PODS, pod(&["a"])), [""; 0]);
        assert_eq!(apply(&mut known, PODS, pod(&["b"])), ["p "]);
        assert_eq!(apply(&mut known, PODS, Seen::Read(Reading::Gone(place("p")))), ["p gone"]);
        assert_eq!(apply(&mut known, PODS, Seen::Read(Reading::Gone(place("p")))), [""; 0]);
    }

    #[test]
    fn what_a_new_list_does_not_name_is_gone() {
        let mut known = Known::default();
        let node = |name: &str| {
            let node =
                ClusterNode { name: name.to_owned(), labels: BTreeMap::new(), zone: String::new(), schedulable: true };
            read(Thing::Node(node))
        };
        for round in [["a", "b"], ["b", "c"]] {
            assert_eq!(apply(&mut known, Kind::Nodes, Seen::Began), [""; 0]);
            for name in round {
                apply(&mut known, Kind::Nodes, node(name));
            }
            let ended = apply(&mut known, Kind::Nodes, Seen::Listed);
            assert_eq!(ended, if round[0] == "a" { vec![] } else { vec!["node a gone"] });
        }
    }

    #[test]
    fn a_template_waits_for_its_account_and_follows_it() {
        let mut known = Known::default();
        let template = |account: Option<&str>| {
            let mut workload = workload(WorkloadKind::Job, "t", &["a"]);
            if account.is_none() {
                workload.pull_secrets = vec![SecretRef { namespace: "n".to_owned(), name: "own".to_owned() }];
            }
            read(Thing::Workload(workload, account.map(str::to_owned)))
        };
        let account = |secrets: &[&str]| {
            read(Thing::Account(place("robot"), secrets.iter().map(|&name| name.to_owned()).collect()))
        };
        assert_eq!(apply(&mut known, JOBS, template(Some("robot"))), [""; 0]);
        assert_eq!(apply(&mut known, Kind::Accounts, account(&["x"])), [""; 0]);
        assert_eq!(apply(&mut known, Kind::Accounts, Seen::Listed), ["t x"]);
        assert_eq!(apply(&mut known, Kind::Accounts, account(&["x"])), [""; 0]);
        assert_eq!(apply(&mut known, Kind::Accounts, account(&["x", "y"])), ["t x+y"]);
        assert_eq!(apply(&mut known, Kind::Accounts, Seen::Read(Reading::Gone(place("robot")))), ["t "]);
        assert_eq!(apply(&mut known, JOBS, template(None)), ["t own"]);
        assert_eq!(apply(&mut known, Kind::Accounts, account(&["x"])), [""; 0]);
    }

    #[test]
    fn it_is_synced_once_when_everything_was_listed() {
        let mut known = Known::default();
        let (last, others) = Kind::ALL.split_last().expect("kinds");
        for kind in others {
            assert_eq!(apply(&mut known, *kind, Seen::Listed), [""; 0]);
        }
        assert_eq!(apply(&mut known, *last, Seen::Listed), ["synced"]);
        assert_eq!(apply(&mut known, *last, Seen::Listed), [""; 0]);
    }
}
