//! Layers that are being read, on the disk as far as they came, so that whoever goes on after a broken connection, a failed
//! build or the end of the process does not read them from the beginning.
//!
//! ```text
//! <state>/partial/<blob digest, hex>    the first bytes of a blob, as its registry sent them
//! ```
//!
//! What is here is believed by nobody: the builder compares the whole blob with its digest, and a build that finds it wrong
//! throws the file away and reads the layer anew. So nothing is synced, and a power cut costs at most a layer that is read
//! twice. A killed process loses the last [`PIECE_LEN_BYTES`] of each layer, and what was on its way to it.
//!
//! A layer has one build at a time (`layers`), and so its file one writer; one whose build was dropped may write its last
//! piece beside the next one, and those are the same bytes. The folder is its owner's alone, for blobs may be of private
//! images. Files go with the end of their build, and when no build needs them any more ([`Partials::retain`]).

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream;
use hermes_image::ids::LayerId;
use hermes_origin::{ByteStream, OriginError};
use parking_lot::Mutex;

/// Bytes that are written, and read back, at once: few enough to lose, many enough that the hand-over to another thread costs
/// nothing beside them.
const PIECE_LEN_BYTES: usize = 256 * 1024;
/// Bytes of all files at most: four layers of 4 GiB. Longer beginnings are not kept.
const LIMIT_BYTES: u64 = 16 << 30;

/// The folder.
#[derive(Debug, Clone)]
pub struct Partials {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    folder: PathBuf,
    used_bytes: AtomicU64,
    limit_bytes: u64,
}

/// The beginning of one layer.
#[derive(Debug, Clone)]
pub(super) struct Partial {
    spool: Arc<Mutex<Spool>>,
}

#[derive(Debug)]
struct Spool {
    inner: Arc<Inner>,
    path: PathBuf,
    /// None as long as nothing is kept.
    file: Option<File>,
    len_bytes: u64,
    /// Whether anything may be kept; not after the disk has failed.
    usable: bool,
}

/// A layer's bytes from a place on: those that are kept, then those of its registry, which are kept as they come.
struct Reading<R> {
    spool: Arc<Mutex<Spool>>,
    at: u64,
    rest: Option<R>,
    body: Option<ByteStream>,
    pending: Vec<Bytes>,
    pending_len_bytes: usize,
    ended: bool,
}

impl Partials {
    /// The folder `folder`, which is made. What is there counts, until [`Partials::retain`] says otherwise.
    ///
    /// # Errors
    /// When it cannot be made or read.
    pub fn open(folder: PathBuf) -> io::Result<Self> {
        Self::with_limit(folder, LIMIT_BYTES)
    }

    fn with_limit(folder: PathBuf, limit_bytes: u64) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        let mut used_bytes = 0;
        for entry in fs::read_dir(&folder)? {
            used_bytes += entry?.metadata()?.len();
        }
        Ok(Self { inner: Arc::new(Inner { folder, used_bytes: AtomicU64::new(used_bytes), limit_bytes }) })
    }

    /// Removes what is kept of layers other than `wanted`. What cannot be removed stays until the next time.
    pub(super) fn retain(&self, wanted: &BTreeSet<LayerId>) {
        let names: BTreeSet<String> = wanted.iter().map(|layer| layer.hex()).collect();
        let Ok(entries) = fs::read_dir(&self.inner.folder) else { return };
        for entry in entries.flatten() {
            if entry.file_name().to_str().is_none_or(|name| !names.contains(name)) {
                self.inner.remove(&entry.path());
            }
        }
    }

    /// What is kept of `layer`, which has `len_bytes` and is built by nobody else.
    pub(super) async fn of(&self, layer: LayerId, len_bytes: u64) -> Partial {
        let inner = Arc::clone(&self.inner);
        let opening = tokio::task::spawn_blocking(move || Spool::open(inner, layer, len_bytes));
        let nothing =
            |_| Spool { inner: Arc::clone(&self.inner), path: PathBuf::new(), file: None, len_bytes: 0, usable: false };
        Partial { spool: Arc::new(Mutex::new(opening.await.unwrap_or_else(nothing))) }
    }
}

impl Inner {
    /// So many bytes are used no more. A write that failed half-way may have been counted otherwise than it was done, so the
    /// sum is one for a limit, and not exact.
    fn give_back(&self, len_bytes: u64) {
        let less = |used: u64| Some(used.saturating_sub(len_bytes));
        let _ = self.used_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    fn remove(&self, path: &std::path::Path) {
        let len_bytes = fs::metadata(path).map_or(0, |found| found.len());
        match fs::remove_file(path) {
            Ok(()) => self.give_back(len_bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(path = %path.display(), %error, "the beginning of a layer cannot be removed"),
        }
    }
}

impl Partial {
    /// Bytes that are kept.
    pub(super) fn len_bytes(&self) -> u64 {
        self.spool.lock().len_bytes
    }

    /// Nobody needs it any more, or it is wrong.
    pub(super) async fn discard(&self) {
        let spool = Arc::clone(&self.spool);
        let removing = tokio::task::spawn_blocking(move || spool.lock().empty());
        if let Err(error) = removing.await {
            tracing::error!(%error, "a task has panicked");
        }
    }

    /// The layer's bytes from `from` on; `rest` reads those that are not kept, from a place to the layer's end.
    pub(super) fn read<R: FnOnce(u64) -> ByteStream + Send + 'static>(&self, from: u64, rest: R) -> ByteStream {
        let reading = Reading {
            spool: Arc::clone(&self.spool),
            at: from,
            rest: Some(rest),
            body: None,
            pending: Vec::new(),
            pending_len_bytes: 0,
            ended: false,
        };
        stream::unfold(reading, Reading::next).boxed()
    }
}

impl Spool {
    fn open(inner: Arc<Inner>, layer: LayerId, layer_len_bytes: u64) -> Self {
        let path = inner.folder.join(layer.hex());
        let mut spool = Self { inner, path, file: None, len_bytes: 0, usable: true };
        let found = File::options().read(true).write(true).open(&spool.path);
        match found.and_then(|file| Ok((file.metadata()?.len(), file))) {
            Ok((len_bytes, file)) => (spool.file, spool.len_bytes) = (Some(file), len_bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => spool.give_up(&error),
        }
        if spool.len_bytes > layer_len_bytes {
            spool.empty();
        }
        spool
    }

    /// Removes what is kept; the next that is kept begins at the layer's first byte.
    fn empty(&mut self) {
        if self.file.take().is_some() {
            self.inner.remove(&self.path);
        }
        self.len_bytes = 0;
    }

    /// Keeps nothing any more.
    fn give_up(&mut self, reason: &io::Error) {
        tracing::warn!(path = %self.path.display(), %reason, "the beginning of a layer is not kept");
        self.empty();
        self.usable = false;
    }

    /// Adds what follows at `at`, if it goes on where the file ends and there is room.
    fn append(&mut self, at: u64, pieces: &[Bytes]) {
        let added: u64 = pieces.iter().map(|piece| piece.len() as u64).sum();
        if !self.usable || at != self.len_bytes {
            return;
        }
        if self.inner.used_bytes.fetch_add(added, Ordering::Relaxed) + added > self.inner.limit_bytes {
            self.inner.give_back(added);
            return;
        }
        match self.write(at, pieces) {
            Ok(()) => self.len_bytes += added,
            Err(error) => {
                self.give_up(&error);
                self.inner.give_back(added);
            }
        }
    }

    fn write(&mut self, mut at: u64, pieces: &[Bytes]) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            none => {
                let new =
                    File::options().create(true).truncate(true).read(true).write(true).mode(0o600).open(&self.path);
                none.insert(new?)
            }
        };
        for piece in pieces {
            file.write_all_at(piece, at)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Up to a piece of what is kept from `at` on; nothing when that is not kept.
    fn piece(&mut self, at: u64) -> Option<Bytes> {
        let kept = self.len_bytes.checked_sub(at).filter(|kept| *kept > 0)?;
        let mut piece = vec![0; (PIECE_LEN_BYTES as u64).min(kept) as usize];
        match self.file.as_ref()?.read_exact_at(&mut piece, at) {
            Ok(()) => Some(piece.into()),
            Err(error) => {
                self.give_up(&error);
                None
            }
        }
    }
}

impl<R: FnOnce(u64) -> ByteStream> Reading<R> {
    async fn next(mut self) -> Option<(Result<Bytes, OriginError>, Self)> {
        if self.ended {
            return None;
        }
        if let Some(rest) = self.rest.take() {
            if let Some(piece) = kept(Arc::clone(&self.spool), self.at).await {
                self.at += piece.len() as u64;
                self.rest = Some(rest);
                return Some((Ok(piece), self));
            }
            self.body = Some(rest(self.at));
        }
        let came = self.body.as_mut()?.next().await;
        match came {
            Some(Ok(piece)) => {
                self.pending_len_bytes += piece.len();
                self.pending.push(piece.clone());
                if self.pending_len_bytes >= PIECE_LEN_BYTES {
                    self.flush().await;
                }
                Some((Ok(piece), self))
            }
            // Whoever goes on asks for what follows upon all that was given.
            Some(Err(error)) => {
                self.flush().await;
                self.ended = true;
                Some((Err(error), self))
            }
            None => None,
        }
    }

    async fn flush(&mut self) {
        let (spool, at, pieces) = (Arc::clone(&self.spool), self.at, std::mem::take(&mut self.pending));
        self.at += std::mem::take(&mut self.pending_len_bytes) as u64;
        let writing = tokio::task::spawn_blocking(move || spool.lock().append(at, &pieces));
        if let Err(error) = writing.await {
            tracing::error!(%error, "a task has panicked");
        }
    }
}

/// Up to a piece of what is kept from `at` on.
async fn kept(spool: Arc<Mutex<Spool>>, at: u64) -> Option<Bytes> {
    if spool.lock().len_bytes <= at {
        return None;
    }
    tokio::task::spawn_blocking(move || spool.lock().piece(at)).await.ok().flatten()
}

#[cfg(test)]
mod tests {
    use futures::TryStreamExt as _;
    use hermes_origin::{ImageSource, OriginClient, OriginConfig};

    use super::*;

    const LAYER: LayerId = LayerId([1; 32]);

    fn bytes(len: usize) -> Vec<u8> {
        (0..len).map(|place| (place % 251) as u8).collect()
    }

    /// An error that a registry could have given.
    async fn broken() -> OriginError {
        let client = OriginClient::new(OriginConfig::default()).expect("a client");
        let missing: ImageSource = "oci:/nonexistent:v1".parse().expect("a source");
        client.open(&missing).await.expect_err("there is none")
    }

    /// What a registry sends of `whole` from a place on, in odd pieces; it breaks off before `end`.
    fn sent(whole: &[u8], end: usize, error: Option<OriginError>) -> impl FnOnce(u64) -> ByteStream + Send + 'static {
        let whole = whole.to_vec();
        move |from| {
            let pieces: Vec<_> =
                whole[from as usize..end].chunks(70_001).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
            stream::iter(pieces.into_iter().chain(error.map(Err))).boxed()
        }
    }

    async fn all(stream: ByteStream) -> (Vec<u8>, bool) {
        let mut seen = Vec::new();
        let ended = stream.try_for_each(|piece| {
            seen.extend_from_slice(&piece);
            futures::future::ready(Ok(()))
        });
        let broke = ended.await.is_err();
        (seen, broke)
    }

    #[tokio::test]
    async fn what_came_is_not_asked_for_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let (partials, whole) = (Partials::open(folder.path().join("partial")).expect("made"), bytes(2_000_000));
        let partial = partials.of(LAYER, 2_000_000).await;
        let (seen, broke) = all(partial.read(0, sent(&whole, 900_000, Some(broken().await)))).await;
        assert!(broke && seen == whole[..900_000]);
        assert_eq!(partial.len_bytes(), 900_000, "all that was given is kept");
        // The same build goes on.
        let (seen, _) = all(partial.read(900_000, sent(&whole, 1_200_000, Some(broken().await)))).await;
        assert_eq!(seen, whole[900_000..1_200_000]);
        drop(partial);
        // The next process does, too.
        let partials = Partials::open(folder.path().join("partial")).expect("opens");
        let partial = partials.of(LAYER, 2_000_000).await;
        let rest = sent(&whole, 2_000_000, None);
        let asked = Arc::new(Mutex::new(None));
        let noted = Arc::clone(&asked);
        let read = partial.read(0, move |from| {
            *noted.lock() = Some(from);
            rest(from)
        });
        assert_eq!(all(read).await.0, whole);
        assert_eq!(*asked.lock(), Some(1_200_000));
        partial.discard().await;
        assert_eq!((partial.len_bytes(), partials.inner.used_bytes.load(Ordering::Relaxed)), (0, 0));
    }

    #[tokio::test]
    async fn room_is_bounded_and_what_nobody_wants_goes() {
        let folder = tempfile::tempdir().expect("a folder");
        let (partials, whole) = (Partials::with_limit(folder.path().into(), 600_000).expect("made"), bytes(1_000_000));
        let partial = partials.of(LAYER, 1_000_000).await;
        assert_eq!(all(partial.read(0, sent(&whole, 1_000_000, None))).await.0, whole, "it is read all the same");
        let kept = partial.len_bytes();
        assert!(kept > 0 && kept <= 600_000, "{kept}");
        let other = partials.of(LayerId([2; 32]), 1_000_000).await;
        assert_eq!(all(other.read(0, sent(&whole, 1_000_000, None))).await.0, whole);
        partials.retain(&[LayerId([2; 32])].into());
        assert!(!folder.path().join(LAYER.hex()).exists());
        assert!(partials.inner.used_bytes.load(Ordering::Relaxed) <= 600_000);
        // A file that is longer than its layer is none of it.
        fs::write(folder.path().join(LAYER.hex()), bytes(100)).expect("written");
        assert_eq!(partials.of(LAYER, 10).await.len_bytes(), 0);
    }
}
