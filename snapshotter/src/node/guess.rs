//! Fetching what the first start of an image is likely to read, as far as the image itself tells ([`hermes_image::guess`]).
//!
//! Begins when the image's first container is prepared, its tree is shown, and no profile of it is found (which knows better):
//! the configuration is asked of the registry,
//! and the command in it followed through the tree. What is found is asked for at once, as what nobody waits for, and so is
//! what has to be read to follow it (headers, scripts), all that is known at a time; then it is read as a container would
//! read it. The container's own reads go before it. Nothing waits for any of it, and nothing fails with it. It ends with its bounds, or when the tree is shown
//! no more: then its layers are closed, and asking for them fails.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hermes_image::erofs::Image;
use hermes_image::guess::{Command, GuessedFile, LIMITS, Source, guess};
use hermes_image::ids::{DiffId, Digest};
use hermes_image::runs::Runs;
use tokio::runtime::Handle;
use tokio::task::JoinSet;

use super::Inner;
use crate::fetch::{Class, FetchHandle};
use crate::fs::read::{LayerFile, Piece, Plan, Reader};

/// What is not here by then was not needed by this start: it is left to readers.
const PATIENCE: Duration = Duration::from_secs(60);

/// A first start.
pub(super) struct Start {
    /// The image, by which its registry is found.
    pub(super) reference: String,
    pub(super) manifest: Digest,
    /// The tree's EROFS image.
    pub(super) tree: Bytes,
    /// The layers, lowest first.
    pub(super) layers: Vec<DiffId>,
}

/// Guesses and fetches. Returns when all of it has come, or will not.
pub(super) async fn prefetch(node: Weak<Inner>, start: Start) {
    let Some(inner) = node.upgrade() else { return };
    let image = start.reference.clone();
    let command = match inner.resolve_manifest(&start.reference, start.manifest).await {
        Ok((_, resolved)) => Command::of_config(&resolved.config_bytes),
        Err(refusal) => return tracing::debug!(image, reason = refusal.reason, "a start is not guessed"),
    };
    let Some(command) = command else { return };
    let files: Option<Vec<_>> = {
        let open = inner.layers.lock();
        // What is read to guess is no start's: nobody notes it.
        let unnoted = |file: &LayerFile| Arc::new(LayerFile { touches: Arc::default(), ..file.clone() });
        start.layers.iter().map(|layer| open.get(layer).map(|(_, file)| unnoted(file))).collect()
    };
    let (Some(files), Ok(tree)) = (files, Image::open(start.tree)) else { return };
    let (reader, fetch) = (inner.reader.clone(), inner.fetch.clone());
    drop(inner);
    let guessing = tokio::task::spawn_blocking(move || {
        let runtime = Handle::current();
        let (asked, coming) = (BTreeMap::new(), JoinSet::new());
        let mut ahead = Ahead { files: &files, reader: &reader, fetch: &fetch, runtime: &runtime, asked, coming };
        let guess = guess(&tree, &command, LIMITS, &mut ahead);
        let bytes: u64 = guess.files.iter().map(GuessedFile::len_bytes).sum();
        (guess.files.len(), bytes, guess.is_cut, ahead.coming)
    });
    if let Ok((files, bytes, is_cut, coming)) = guessing.await {
        tracing::info!(image, files, bytes, is_cut, "guessed what a first start reads");
        coming.join_all().await;
    }
}

/// Reads what the guess has to know, and asks for what it says.
struct Ahead<'a> {
    files: &'a [Arc<LayerFile>],
    reader: &'a Reader,
    fetch: &'a FetchHandle,
    runtime: &'a Handle,
    asked: BTreeMap<u16, Runs>,
    /// What was asked for.
    coming: JoinSet<()>,
}

impl Source for Ahead<'_> {
    fn read(&mut self, layer: u16, range: Range<u64>) -> Option<Vec<u8>> {
        let file = Arc::clone(self.files.get(usize::from(layer))?);
        let mut plan = Plan::default();
        let len = usize::try_from(range.end.checked_sub(range.start)?).ok()?;
        (range.end <= file.table().logical_len_bytes()).then_some(())?;
        plan.push(Piece::Layer { file, offset: range.start, len });
        self.runtime.block_on(self.reader.read(&plan)).ok()
    }

    fn ahead(&mut self, parts: &[(u16, Range<u64>)]) {
        // Layer by layer: what lies side by side is one question.
        let mut wanted: BTreeMap<u16, Runs> = BTreeMap::new();
        for (layer, range) in parts {
            let Some(of) = self.files.get(usize::from(*layer)) else { continue };
            let asked = self.asked.entry(*layer).or_default();
            let new = Runs::one(of.table().covering(range.clone())).difference(asked);
            asked.insert_all(&new);
            wanted.entry(*layer).or_default().insert_all(&new);
        }
        for (layer, new) in wanted {
            let Some(of) = self.files.get(usize::from(layer)) else { continue };
            let missing: Runs = new.iter().flat_map(|run| of.layer.missing(run).iter().collect::<Vec<_>>()).collect();
            if !missing.is_empty() {
                self.need(of.layer.diff_id(), missing);
            }
        }
    }

    fn found(&mut self, file: &GuessedFile) {
        self.ahead(&file.pieces);
    }
}

impl Ahead<'_> {
    /// The one place where guessed chunks are asked for. There are at most as many as a guess has files and waves.
    fn need(&mut self, layer: DiffId, chunks: Runs) {
        let fetch = self.fetch.clone();
        let ask = async move {
            let came = fetch.need(layer, chunks, Class::Prefetch, Instant::now() + PATIENCE).await;
            if let Err(error) = came {
                tracing::debug!(%layer, %error, "what was guessed did not come");
            }
        };
        self.coming.spawn_on(ask, self.runtime);
    }
}
