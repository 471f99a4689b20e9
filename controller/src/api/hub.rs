//! What nodes are to know, as a state with revisions: whoever is behind is told the newest word on each thing.
//!
//! ```text
//!  Publish, Withdraw --> entry (key, revision, encoded once) <-- members, trust
//!                            |
//!                   by_revision: one revision for each key     cursor of a stream: one number
//! ```
//!
//! There is no queue for a stream: it holds the revision up to which it knows everything, and is given what has changed
//! since, in that order. A thing that changed many times is there once, so a slow stream costs no memory and misses
//! nothing that still counts. What is gone leaves a mark, so that its end is told as well; of marks there are at most
//! [`GONE_MAX`], and a stream that is behind the oldest of them, or comes from another controller, gets a snapshot: all
//! entries but those whose fingerprints it has named. A snapshot is walked by key and not copied; what changes meanwhile
//! is told again after it.
//!
//! Every entry is kept as the bytes of its field in `WatchUpdate`, so an update is a head and a concatenation, and is kept
//! for the other streams that are at the same place, which in peace is all of them.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use hermes_controller_api::Message as _;
use hermes_controller_api::v1;
use hermes_image::access::Access;
use hermes_image::ids::{ArtifactId, DiffId, Digest};
use hermes_image::statement::Statement;
use hermes_p2p::{Multiaddr, PeerId};
use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;

use crate::crd::SeedMode;
use crate::event::{Action, Audience, ImageView, Phase};
use crate::signing::Keys;

/// Most marks of what is gone: as many images as a cluster withdraws in months, or all members once.
const GONE_MAX: usize = 16_384;
/// An update is ended after this many bytes: what a stream has in its buffers, of which there may be thousands.
const UPDATE_LEN_BYTES: usize = 8 * 1024;
/// Most members that are told of: as many as a swarm can have.
const MEMBERS_MAX: usize = hermes_p2p::members::MEMBERS_MAX;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Trust,
    Image(Digest),
    Member(PeerId),
}

#[derive(Debug)]
struct Entry {
    revision: u64,
    /// Its field of an update.
    field: Bytes,
    /// Of an image that is there.
    fingerprint: Option<u64>,
    gone: bool,
    since: Instant,
}

/// An image that is there.
#[derive(Debug, Clone)]
pub struct ReadyImage {
    /// All that is known of it.
    pub view: Arc<ImageView>,
    /// What its statement says of its layers; `None` when no key that signs here has signed it.
    pub statement: Option<Arc<Statement>>,
}

#[derive(Debug, Default)]
struct State {
    revision: u64,
    /// Changes up to here are not known one by one.
    floor: u64,
    entries: BTreeMap<Key, Entry>,
    by_revision: BTreeMap<u64, Key>,
    gone: usize,
    images: BTreeMap<Digest, ReadyImage>,
    artifacts: HashMap<ArtifactId, BTreeSet<Digest>>,
    /// Members that came or went since the last tick.
    pending: BTreeMap<PeerId, Option<Vec<String>>>,
    members: BTreeMap<PeerId, Vec<String>>,
}

/// The newest state of everything that nodes are told. Never waits.
#[derive(Debug)]
pub struct Hub {
    history: u64,
    keys: Keys,
    state: RwLock<State>,
    /// The last update that was made, and from where it leads.
    made: Mutex<Option<(u64, Update)>>,
    changed: watch::Sender<u64>,
}

/// Where a stream is.
#[derive(Debug, Clone)]
pub struct Cursor {
    revision: u64,
    snapshot: Option<Snapshot>,
    /// It has known everything once: what it is told from then on was news.
    caught_up: bool,
    /// How long the oldest news of the last update had waited.
    waited: Option<Duration>,
}

impl Cursor {
    fn told(&mut self, update: &Update) {
        self.revision = update.revision;
        self.waited = self.caught_up.then(|| update.since.elapsed());
    }

    /// How long the oldest change of the last update had waited for it, if the stream knew everything before.
    pub(super) fn waited(&self) -> Option<Duration> {
        self.waited
    }
}

/// A snapshot under way.
#[derive(Debug, Clone)]
struct Snapshot {
    after: Option<Key>,
    /// Where the stream is once it has all of it.
    revision: u64,
    known: Arc<HashSet<u64>>,
    kept: Vec<u64>,
}

#[derive(Debug, Clone)]
struct Update {
    bytes: Bytes,
    revision: u64,
    /// When the oldest of its changes came.
    since: Instant,
}

impl Hub {
    /// Knows nothing yet; statements are read by `keys`.
    pub fn new(keys: Keys) -> Self {
        // Zero means that a stream knows nothing.
        let history = rand::random::<u64>().max(1);
        Self { history, keys, state: RwLock::default(), made: Mutex::default(), changed: watch::Sender::new(0) }
    }

    /// The keys that sign indexes.
    pub(super) fn keys(&self) -> &Keys {
        &self.keys
    }

    /// Tells whenever something has changed.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// How many images are there.
    pub fn image_count(&self) -> usize {
        self.state.read().images.len()
    }

    /// An image that is there.
    pub fn image(&self, manifest: Digest) -> Option<ReadyImage> {
        self.state.read().images.get(&manifest).cloned()
    }

    /// The images that have the artifact.
    pub fn images_with(&self, artifact: ArtifactId) -> Vec<ReadyImage> {
        let state = self.state.read();
        let manifests = state.artifacts.get(&artifact).into_iter().flatten();
        manifests.filter_map(|manifest| state.images.get(manifest).cloned()).collect()
    }

    /// Whom nodes are to believe from now on.
    pub fn set_trust(&self, trust: v1::Trust) {
        let field = field(v1::WatchUpdate { trust: Some(trust), ..Default::default() });
        self.put([(Key::Trust, field, None)]);
    }

    /// A member is, or is not any more, to be found at `addresses`. Told with the next [`Self::tick`], because a fleet that
    /// starts would make each of its nodes hear of each other one by one.
    pub fn set_member(&self, peer: PeerId, addresses: Option<&[Multiaddr]>) {
        let addresses = addresses.map(|all| all.iter().map(ToString::to_string).collect::<Vec<_>>());
        let mut state = self.state.write();
        if state.members.get(&peer) == addresses.as_ref() {
            state.pending.remove(&peer);
        } else if state.pending.len() < 2 * MEMBERS_MAX {
            state.pending.insert(peer, addresses);
        }
    }

    /// Tells of members that came or went. To be called once a second or so.
    pub fn tick(&self) {
        let mut changes = Vec::new();
        {
            let mut state = self.state.write();
            for (peer, addresses) in std::mem::take(&mut state.pending) {
                let is_new = addresses.is_some() && !state.members.contains_key(&peer);
                if is_new && state.members.len() >= MEMBERS_MAX {
                    continue;
                }
                let name = Bytes::from(peer.to_bytes());
                let mut update = v1::WatchUpdate::default();
                match &addresses {
                    Some(addresses) => update.members.push(v1::Member { peer: name, addresses: addresses.clone() }),
                    None => update.gone_members.push(name),
                }
                match addresses {
                    Some(addresses) => drop(state.members.insert(peer, addresses)),
                    None => drop(state.members.remove(&peer)),
                }
                changes.push((Key::Member(peer), field(update), None));
            }
        }
        self.put(changes);
    }

    fn publish(&self, view: &Arc<ImageView>) {
        let manifest = view.image.manifest;
        let Some(index) = view.index.as_ref().filter(|_| view.phase == Phase::Ready) else {
            return self.withdraw(manifest);
        };
        let statement = Statement::open(&index.statement, manifest, &self.keys.public_keys());
        let statement = statement.inspect_err(|error| {
            tracing::error!(%manifest, %error, "the statement of an image is not signed by this controller's keys");
        });
        let image = ReadyImage { view: Arc::clone(view), statement: statement.ok().map(Arc::new) };
        let told = told(view);
        let fingerprint = told.fingerprint;
        {
            let mut state = self.state.write();
            state.forget_artifacts(manifest);
            for artifact in index.artifacts.iter() {
                state.artifacts.entry(*artifact).or_default().insert(manifest);
            }
            state.images.insert(manifest, image);
            // A view may differ in what nodes are not told, such as its names' policies.
            let known = state.entries.get(&Key::Image(manifest)).and_then(|entry| entry.fingerprint);
            if known == Some(fingerprint) {
                return;
            }
        }
        let field = field(v1::WatchUpdate { images: vec![told], ..Default::default() });
        self.put([(Key::Image(manifest), field, Some(fingerprint))]);
    }

    fn withdraw(&self, manifest: Digest) {
        {
            let mut state = self.state.write();
            state.forget_artifacts(manifest);
            if state.images.remove(&manifest).is_none() {
                return;
            }
        }
        let gone_images = vec![Bytes::copy_from_slice(&manifest.0)];
        self.put([(Key::Image(manifest), field(v1::WatchUpdate { gone_images, ..Default::default() }), None)]);
    }

    /// Puts entries in the place of what was there; those of images and members without a fingerprint or address are marks.
    fn put(&self, changes: impl IntoIterator<Item = (Key, Bytes, Option<u64>)>) {
        let revision = {
            let mut state = self.state.write();
            let before = state.revision;
            for (key, field, fingerprint) in changes {
                let gone = match key {
                    Key::Trust => false,
                    Key::Image(_) => fingerprint.is_none(),
                    Key::Member(peer) => !state.members.contains_key(&peer),
                };
                state.put(key, field, fingerprint, gone);
            }
            if state.revision == before {
                return;
            }
            state.revision
        };
        // Only forward: of two who put at once, the later may be here first.
        self.changed.send_if_modified(|known| {
            let newer = *known < revision;
            *known = revision.max(*known);
            newer
        });
    }

    /// Where a stream begins that was at `revision` of `history` and knows the images with the fingerprints `known`.
    pub fn cursor(&self, history: u64, revision: u64, known: impl IntoIterator<Item = u64>) -> Cursor {
        let state = self.state.read();
        if history == self.history && (state.floor..=state.revision).contains(&revision) {
            return Cursor { revision, snapshot: None, caught_up: false, waited: None };
        }
        let known = Arc::new(known.into_iter().collect());
        Cursor {
            revision: 0,
            snapshot: Some(Snapshot { after: None, revision: state.revision, known, kept: Vec::new() }),
            caught_up: false,
            waited: None,
        }
    }

    /// What follows at `cursor`, which is moved on; `None` when there is nothing yet.
    pub fn next(&self, cursor: &mut Cursor) -> Option<Bytes> {
        let state = self.state.read();
        cursor.waited = None;
        if let Some(snapshot) = cursor.snapshot.take() {
            return Some(self.next_part(&state, snapshot, cursor));
        }
        if cursor.revision >= state.revision {
            cursor.caught_up = true;
            return None;
        }
        if cursor.revision < state.floor {
            let known = Arc::default();
            let snapshot = Snapshot { after: None, revision: state.revision, known, kept: Vec::new() };
            return Some(self.next_part(&state, snapshot, cursor));
        }
        let from = cursor.revision;
        if let Some((known_from, update)) = &*self.made.lock()
            && *known_from == from
            && update.revision == state.revision
        {
            cursor.told(update);
            return Some(update.bytes.clone());
        }
        let update = self.changes_after(&state, from);
        cursor.told(&update);
        *self.made.lock() = Some((from, update.clone()));
        Some(update.bytes)
    }

    fn changes_after(&self, state: &State, from: u64) -> Update {
        let mut fields = BytesMut::new();
        let (mut revision, mut since) = (state.revision, Instant::now());
        for (at, key) in state.by_revision.range((Bound::Excluded(from), Bound::Unbounded)) {
            let entry = &state.entries[key];
            since = since.min(entry.since);
            fields.extend_from_slice(&entry.field);
            if fields.len() >= UPDATE_LEN_BYTES {
                revision = *at;
                break;
            }
        }
        let head = v1::WatchUpdate { history: self.history, revision, ..Default::default() };
        Update { bytes: joined(&head, &fields), revision, since }
    }

    fn next_part(&self, state: &State, mut snapshot: Snapshot, cursor: &mut Cursor) -> Bytes {
        let mut fields = BytesMut::new();
        let from = snapshot.after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut is_last = true;
        for (key, entry) in state.entries.range((from, Bound::Unbounded)).filter(|(_, entry)| !entry.gone) {
            if fields.len() >= UPDATE_LEN_BYTES {
                is_last = false;
                break;
            }
            snapshot.after = Some(*key);
            match entry.fingerprint {
                Some(fingerprint) if snapshot.known.contains(&fingerprint) => snapshot.kept.push(fingerprint),
                _ => fields.extend_from_slice(&entry.field),
            }
        }
        let mut head = v1::WatchUpdate { history: self.history, snapshot: true, ..Default::default() };
        if is_last {
            head.revision = snapshot.revision;
            head.kept = std::mem::take(&mut snapshot.kept);
            cursor.revision = snapshot.revision;
        } else {
            cursor.snapshot = Some(snapshot);
        }
        joined(&head, &fields)
    }
}

impl State {
    fn forget_artifacts(&mut self, manifest: Digest) {
        let Some(known) = self.images.get(&manifest) else { return };
        let artifacts = known.view.index.as_ref().map(|index| Arc::clone(&index.artifacts));
        for artifact in artifacts.iter().flat_map(|artifacts| artifacts.iter()) {
            if let Some(of) = self.artifacts.get_mut(artifact) {
                of.remove(&manifest);
                if of.is_empty() {
                    self.artifacts.remove(artifact);
                }
            }
        }
    }

    fn put(&mut self, key: Key, field: Bytes, fingerprint: Option<u64>, gone: bool) {
        self.revision += 1;
        let revision = self.revision;
        if let Some(old) = self.entries.insert(key, Entry { revision, field, fingerprint, gone, since: Instant::now() })
        {
            self.by_revision.remove(&old.revision);
            self.gone -= usize::from(old.gone);
        }
        self.by_revision.insert(revision, key);
        self.gone += usize::from(gone);
        if self.gone > GONE_MAX {
            self.forget_oldest_mark();
        }
    }

    fn forget_oldest_mark(&mut self) {
        let oldest = self.by_revision.iter().find(|(_, key)| self.entries[key].gone);
        let Some((revision, key)) = oldest.map(|(revision, key)| (*revision, *key)) else { return };
        self.by_revision.remove(&revision);
        self.entries.remove(&key);
        self.gone -= 1;
        self.floor = revision;
    }
}

/// The bytes of an update's fields without its head.
fn field(update: v1::WatchUpdate) -> Bytes {
    update.encode_to_vec().into()
}

/// Messages may be joined: that is how Protocol Buffers define repeated fields.
fn joined(head: &v1::WatchUpdate, fields: &[u8]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(head.encoded_len() + fields.len());
    head.encode(&mut bytes).expect("a buffer that grows has room");
    bytes.extend_from_slice(fields);
    bytes.freeze()
}

/// What every node is told of an image: of a private one, that it is there and who is to hold it.
fn told(view: &ImageView) -> v1::Image {
    let mut image = whole(view);
    image.profile = Bytes::new();
    if view.access == Access::Private {
        (image.statement, image.references, image.profile_id) = (Bytes::new(), Vec::new(), Bytes::new());
    }
    image.fingerprint = 0;
    let hash = blake3::hash(&image.encode_to_vec());
    let (word, _) = hash.as_bytes().split_first_chunk().expect("a hash has 32 bytes");
    image.fingerprint = u64::from_le_bytes(*word);
    image
}

/// All of it, for who may have all of it; without a fingerprint.
pub(super) fn whole(view: &ImageView) -> v1::Image {
    let seeds = view.seeds.iter().map(|(node, mode)| v1::Seed {
        node: node.clone(),
        mode: match mode {
            SeedMode::Index => v1::seed::Mode::Index,
            SeedMode::Hot => v1::seed::Mode::Hot,
            SeedMode::Full => v1::seed::Mode::Full,
        }
        .into(),
    });
    let profile = view.profile.as_ref().map(|profile| Bytes::copy_from_slice(profile)).unwrap_or_default();
    v1::Image {
        manifest: Bytes::copy_from_slice(&view.image.manifest.0),
        fingerprint: 0,
        private: view.access == Access::Private,
        statement: view.index.as_ref().map(|index| Bytes::copy_from_slice(&index.statement)).unwrap_or_default(),
        references: view.names.iter().map(|name| name.reference.clone()).collect(),
        seeds: seeds.collect(),
        profile_id: if profile.is_empty() {
            Bytes::new()
        } else {
            Bytes::copy_from_slice(blake3::hash(&profile).as_bytes())
        },
        profile,
    }
}

impl ReadyImage {
    /// Whether `node` may have all of it, when it has shown grants for `granted`: everybody may have a public image; a
    /// private one whoever is to hold a copy by a policy, and whoever has proven to have all its layers.
    pub fn may_be_given(&self, node: &str, granted: &HashSet<DiffId>) -> bool {
        self.is_open_to(node) || self.layers().is_some_and(|mut layers| layers.all(|layer| granted.contains(&layer)))
    }

    /// The same of one of its artifacts: one layer that has it is enough.
    pub fn may_give_artifact(&self, artifact: ArtifactId, node: &str, granted: &HashSet<DiffId>) -> bool {
        let of = |statement: &Statement| {
            let mut layers = statement.layers.iter();
            layers.any(|layer| {
                granted.contains(&layer.diff_id)
                    && [layer.toc, layer.chunks, layer.seek, layer.windows].contains(&artifact)
            })
        };
        self.is_open_to(node) || self.statement.as_deref().is_some_and(of)
    }

    fn is_open_to(&self, node: &str) -> bool {
        self.view.access == Access::Public || self.view.seeds.contains_key(node)
    }

    fn layers(&self) -> Option<impl Iterator<Item = DiffId> + '_> {
        Some(self.statement.as_deref()?.layers.iter().map(|layer| layer.diff_id))
    }
}

impl Audience for Hub {
    fn hear(&self, action: &Action) {
        match action {
            Action::Publish(view) => self.publish(view),
            Action::Withdraw(image) => self.withdraw(image.manifest),
            _ => {}
        }
    }
}
