//! Registries that fail, so that those who wait for them do not hold up the others.
//!
//! A registry whose last answer was a failure that may pass gets a quarter of what goes on at once, until something comes of it
//! again.

use std::collections::BTreeSet;

use super::reference::repository;
use crate::event::{Failure, FailureClass, Name};

/// The hosts that fail.
#[derive(Debug, Default)]
pub(super) struct Registries {
    failing: BTreeSet<String>,
}

fn host(name: &Name) -> &str {
    let repository = repository(&name.reference);
    repository.split_once('/').map_or(repository, |(host, _)| host)
}

impl Registries {
    /// Something has come of asking for `name`, or failed with `failure`.
    pub(super) fn answered(&mut self, name: &Name, failure: Option<&Failure>) {
        if failure.is_some_and(|failure| failure.class == FailureClass::Transient) {
            self.failing.insert(host(name).to_owned());
        } else {
            self.failing.remove(host(name));
        }
    }

    /// Whether `name` may be asked for, when `most` go on at once and `going` already do.
    pub(super) fn may_ask<'a>(&self, name: &Name, most: usize, going: impl Iterator<Item = &'a Name>) -> bool {
        let host_of_name = host(name);
        let share = (most / 4).max(1);
        !self.failing.contains(host_of_name) || going.filter(|name| host(name) == host_of_name).count() < share
    }
}
