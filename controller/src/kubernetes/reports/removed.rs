//! Objects of ours that somebody else has removed: they are written again.
//!
//! Only names are followed. A watch that was cut is taken up with a list, and what the list does not have was removed
//! meanwhile, or is not written yet, which comes to the same: it is to be written.

use std::collections::BTreeSet;

use futures::stream::{self, Stream, StreamExt as _};
use kube::core::{ApiResource, PartialObjectMeta};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client};

use super::write::{Bare, images, nodes};

/// Objects in one page of a list.
const PAGE_SIZE: u32 = 500;

/// A kind of object of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// HermesImage.
    Image,
    /// HermesNode.
    Node,
}

/// What is no more.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Removed {
    /// This object.
    One(Kind, String),
    /// All but these.
    AllBut(Kind, BTreeSet<String>),
}

/// What is removed from now on. Never ends.
pub(super) fn follow(client: &Client) -> impl Stream<Item = Removed> + Send + use<> {
    stream::select(
        follow_kind(client.clone(), Kind::Image, &images()),
        follow_kind(client.clone(), Kind::Node, &nodes()),
    )
}

fn follow_kind(client: Client, kind: Kind, resource: &ApiResource) -> impl Stream<Item = Removed> + Send + use<> {
    let api = Api::<PartialObjectMeta<Bare>>::all_with(client, resource);
    let config = watcher::Config::default().page_size(PAGE_SIZE).timeout(crate::kubernetes::watch::WATCH_SECONDS);
    let steps = watcher(api, config).default_backoff();
    let mut listed = BTreeSet::new();
    let removed = steps.filter_map(move |step| {
        let removed = match step {
            Ok(watcher::Event::Init) => {
                listed.clear();
                None
            }
            Ok(watcher::Event::InitApply(object)) => {
                listed.extend(object.metadata.name);
                None
            }
            Ok(watcher::Event::InitDone) => Some(Removed::AllBut(kind, std::mem::take(&mut listed))),
            Ok(watcher::Event::Delete(object)) => object.metadata.name.map(|name| Removed::One(kind, name)),
            Ok(watcher::Event::Apply(_)) => None,
            Err(error) => {
                tracing::debug!(?kind, %error, "cannot watch for objects that are removed; trying again");
                None
            }
        };
        futures::future::ready(removed)
    });
    removed.boxed()
}
