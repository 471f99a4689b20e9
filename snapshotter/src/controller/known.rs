//! What the controller has said: a value that updates change, and that lies on disk between two daemons.
//!
//! Everything has a limit, because a controller may be wrong; what is beyond is left out and logged. On disk it is one
//! file: a magic, the message `NodeState`, and the BLAKE3 hash of both.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use hermes_controller_api::{Message as _, v1};
use hermes_files::{OWNER_ONLY, write_whole};
use hermes_image::ids::{ArtifactId, Digest};
use hermes_image::statement::{PublicKey, SIGNED_LEN_MAX_BYTES};
use hermes_image::verify::Verified;
use hermes_p2p::admission::certificate::{SignedCertificate, Trust};
use hermes_p2p::members::MEMBERS_MAX;
use hermes_p2p::members::provider::Seed;
use hermes_p2p::{Multiaddr, PeerId, PeerKey};
use thiserror::Error;

const MAGIC: &[u8; 8] = b"HCTRLST1";
const HASH_LEN_BYTES: usize = 32;
/// Most images that are remembered.
pub(super) const IMAGES_MAX: usize = 10_000;
/// Most bytes of all that is remembered of them: statements of a thousand images of hundred layers.
const IMAGES_LEN_MAX_BYTES: usize = 64 << 20;
/// Longest file: all of that, the members, and the rest.
const FILE_LEN_MAX_BYTES: u64 = 96 << 20;
/// Most keys of a kind.
const KEYS_MAX: usize = 8;
/// Most addresses of a member.
const ADDRESSES_MAX: usize = 8;

/// What lies on disk and cannot be used, or cannot be written.
#[derive(Debug, Error)]
pub(super) enum KnownError {
    #[error("cannot {doing} {path}: {source}")]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    #[error("{path} is damaged")]
    Damaged { path: PathBuf },
}

/// What a node is to hold of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The image.
    pub manifest: Digest,
    /// Where it is from; empty when the image is private, and has to be asked for.
    pub references: Vec<String>,
    /// How much of it.
    pub mode: v1::seed::Mode,
}

/// What an update has changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Changed {
    pub(super) images: bool,
    pub(super) members: bool,
    pub(super) trust: bool,
}

/// All of it.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) certificate: Bytes,
    pub(super) member: Option<SignedCertificate>,
    trust: v1::Trust,
    history: u64,
    revision: u64,
    images: BTreeMap<Digest, v1::Image>,
    images_len_bytes: usize,
    members: BTreeMap<PeerId, Vec<Multiaddr>>,
    /// What came in the snapshot under way.
    fresh_images: BTreeSet<Digest>,
    fresh_members: BTreeSet<PeerId>,
}

fn digest(bytes: &[u8]) -> Option<Digest> {
    bytes.try_into().ok().map(Digest)
}

impl Known {
    /// Where a watch goes on.
    pub(super) fn request(&self) -> v1::WatchRequest {
        let known = self.images.values().map(|image| image.fingerprint).collect();
        v1::WatchRequest { history: self.history, revision: self.revision, known }
    }

    /// A watch begins anew: what came in a snapshot that was cut short counts as not come.
    pub(super) fn begin(&mut self) {
        self.fresh_images.clear();
        self.fresh_members.clear();
    }

    /// Takes an update.
    pub(super) fn take(&mut self, update: v1::WatchUpdate) -> Changed {
        let mut changed = Changed {
            images: !update.images.is_empty() || !update.gone_images.is_empty(),
            members: !update.members.is_empty() || !update.gone_members.is_empty(),
            trust: update.trust.is_some(),
        };
        if let Some(trust) = update.trust {
            self.set_trust(trust);
        }
        for image in update.images {
            self.put_image(image, update.snapshot);
        }
        for manifest in update.gone_images.iter().filter_map(|bytes| digest(bytes)) {
            self.remove_image(manifest);
        }
        for member in update.members {
            self.put_member(&member, update.snapshot);
        }
        for peer in update.gone_members.iter().filter_map(|bytes| PeerId::from_bytes(bytes).ok()) {
            self.members.remove(&peer);
        }
        if update.revision > 0 {
            (self.history, self.revision) = (update.history, update.revision);
            if update.snapshot {
                self.end_snapshot(&update.kept);
                (changed.images, changed.members) = (true, true);
            }
        }
        changed
    }

    fn end_snapshot(&mut self, kept: &[u64]) {
        let (kept, fresh) = (kept.iter().collect::<BTreeSet<_>>(), std::mem::take(&mut self.fresh_images));
        let gone = self
            .images
            .iter()
            .filter(|(manifest, image)| !fresh.contains(manifest) && !kept.contains(&image.fingerprint));
        for manifest in gone.map(|(manifest, _)| *manifest).collect::<Vec<_>>() {
            self.remove_image(manifest);
        }
        let fresh = std::mem::take(&mut self.fresh_members);
        self.members.retain(|peer, _| fresh.contains(peer));
    }

    fn put_image(&mut self, image: v1::Image, is_snapshot: bool) {
        let Some(manifest) = digest(&image.manifest) else { return };
        self.remove_image(manifest);
        let len_bytes = image.encoded_len();
        let fits = self.images.len() < IMAGES_MAX && self.images_len_bytes + len_bytes <= IMAGES_LEN_MAX_BYTES;
        if !fits || image.statement.len() > SIGNED_LEN_MAX_BYTES {
            tracing::warn!(%manifest, "the controller tells of more images than this node remembers");
            return;
        }
        self.images_len_bytes += len_bytes;
        self.images.insert(manifest, image);
        if is_snapshot {
            self.fresh_images.insert(manifest);
        }
    }

    fn remove_image(&mut self, manifest: Digest) {
        if let Some(old) = self.images.remove(&manifest) {
            self.images_len_bytes -= old.encoded_len();
        }
    }

    fn put_member(&mut self, member: &v1::Member, is_snapshot: bool) {
        let Ok(peer) = PeerId::from_bytes(&member.peer) else { return };
        if self.members.len() >= MEMBERS_MAX && !self.members.contains_key(&peer) {
            return;
        }
        let addresses = member.addresses.iter().take(ADDRESSES_MAX).filter_map(|text| text.parse().ok());
        self.members.insert(peer, addresses.collect());
        if is_snapshot {
            self.fresh_members.insert(peer);
        }
    }

    /// Believes others from now on.
    pub(super) fn set_trust(&mut self, mut trust: v1::Trust) {
        trust.roots.truncate(KEYS_MAX);
        trust.issuer_keys.truncate(KEYS_MAX);
        trust.index_keys.truncate(KEYS_MAX);
        self.trust = trust;
    }

    /// The roots, X.509 in DER; none before the first join.
    pub(super) fn roots(&self) -> &[Bytes] {
        &self.trust.roots
    }

    /// When the certificates were issued, in seconds since 1970; 0 before the first join.
    pub(super) fn issued_at(&self) -> u64 {
        self.member.as_ref().map_or(0, |member| member.said().not_before)
    }

    /// The newest notice of who was taken out.
    pub(super) fn notice(&self) -> Bytes {
        self.trust.revocation.clone()
    }

    /// Whose certificates and grants the swarm believes.
    pub(super) fn swarm_trust(&self) -> Trust {
        let keys = self.trust.issuer_keys.iter().filter_map(|key| key.as_ref().try_into().ok());
        Trust { keys: keys.map(PeerKey::from_bytes).collect(), epoch_min: 0 }
    }

    /// Whose statements are good.
    pub(super) fn index_keys(&self) -> Vec<PublicKey> {
        self.trust.index_keys.iter().filter_map(|key| key.parse().ok()).collect()
    }

    pub(super) fn image(&self, manifest: Digest) -> Option<v1::Image> {
        self.images.get(&manifest).cloned()
    }

    pub(super) fn wanted(&self, node: &str) -> Vec<Wanted> {
        let of = |(manifest, image): (&Digest, &v1::Image)| {
            let seed = image.seeds.iter().find(|seed| seed.node == node)?;
            Some(Wanted { manifest: *manifest, references: image.references.clone(), mode: seed.mode() })
        };
        self.images.iter().filter_map(of).collect()
    }

    pub(super) fn places(&self) -> Vec<Seed> {
        let of = |(peer, addresses): (&PeerId, &Vec<Multiaddr>)| {
            let peer = *peer;
            addresses.iter().map(move |address| Seed { peer: Some(peer), address: address.clone() }).collect::<Vec<_>>()
        };
        self.members.iter().flat_map(of).collect()
    }

    /// What was saved at `path`; nothing when there is no file. Blocks.
    pub(super) fn load(path: &Path) -> Result<Self, KnownError> {
        let failed = |source| KnownError::Io { doing: "read", path: path.to_owned(), source };
        let damaged = || KnownError::Damaged { path: path.to_owned() };
        let len = match std::fs::metadata(path) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(failed(error)),
        };
        if len > FILE_LEN_MAX_BYTES {
            return Err(damaged());
        }
        let bytes = Bytes::from(std::fs::read(path).map_err(failed)?);
        let Some(body_len) = bytes.len().checked_sub(HASH_LEN_BYTES) else { return Err(damaged()) };
        let (body, hash) = (bytes.slice(..body_len), bytes.slice(body_len..));
        if name_of(&body).0 != hash.as_ref() || !body.starts_with(MAGIC) {
            return Err(damaged());
        }
        let state = v1::NodeState::decode(body.slice(MAGIC.len()..)).map_err(|_| damaged())?;
        let mut known = Self {
            certificate: state.certificate,
            member: SignedCertificate::decode(&state.member_certificate).ok(),
            history: state.history,
            revision: state.revision,
            ..Self::default()
        };
        known.set_trust(state.trust.unwrap_or_default());
        state.images.into_iter().for_each(|image| known.put_image(image, false));
        state.members.iter().for_each(|member| known.put_member(member, false));
        Ok(known)
    }

    /// The bytes of the file.
    pub(super) fn encode(&self) -> Vec<u8> {
        let member = |(peer, addresses): (&PeerId, &Vec<Multiaddr>)| v1::Member {
            peer: peer.to_bytes().into(),
            addresses: addresses.iter().map(ToString::to_string).collect(),
        };
        let state = v1::NodeState {
            certificate: self.certificate.clone(),
            member_certificate: self.member.as_ref().map(|it| it.encode().into()).unwrap_or_default(),
            trust: Some(self.trust.clone()),
            history: self.history,
            revision: self.revision,
            images: self.images.values().cloned().collect(),
            members: self.members.iter().map(member).collect(),
        };
        let mut bytes = MAGIC.to_vec();
        state.encode(&mut bytes).expect("a vector has room");
        let hash = name_of(&bytes.clone().into());
        bytes.extend_from_slice(&hash.0);
        bytes
    }
}

/// Writes what [`Known::encode`] has made to `path`. Blocks until it is durable.
pub(super) fn save(path: &Path, bytes: &[u8]) -> Result<(), KnownError> {
    let written = write_whole(path, OWNER_ONLY, bytes);
    written.map_err(|source| KnownError::Io { doing: "write", path: path.to_owned(), source })
}

/// The BLAKE3 hash of some bytes.
fn name_of(bytes: &Bytes) -> ArtifactId {
    Verified::named(bytes.clone()).0
}
