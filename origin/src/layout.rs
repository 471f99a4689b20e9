//! An OCI layout on this machine as the source of one image.

use std::io::SeekFrom;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use hermes_image::ids::Digest;
use hermes_registry::oci::MAX_MANIFEST_BYTES;
use hermes_registry::{Layout, LayoutError};
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::time::{Instant, timeout_at};

use super::LayerDescriptor;
use super::body::Wanted;
use super::counters::Meters;
use super::error::{Failure, OriginError, Phase, Subject};
use super::registry::Document;
use super::source::LayoutSelector;

/// Bytes per read: large enough that the hand-over to the reading thread does not count.
const PIECE_BYTES: u64 = 256 << 10;

/// One image in a layout. Cheap to clone.
#[derive(Debug, Clone)]
pub struct LayoutOrigin {
    layout: Arc<Layout>,
    selector: LayoutSelector,
    subject: Subject,
    meters: Arc<Meters>,
}

impl LayoutOrigin {
    pub(super) async fn open(
        path: PathBuf,
        selector: LayoutSelector,
        image: &str,
        meters: Arc<Meters>,
    ) -> Result<Self, OriginError> {
        let subject = Subject { image: image.into(), layer: None, source: path.display().to_string().into() };
        let layout = Arc::new(blocking(&subject, move || Layout::open(path)).await?);
        Ok(Self { layout, selector, subject, meters })
    }

    pub(super) fn subject(&self) -> &Subject {
        &self.subject
    }

    pub(super) async fn target(&self) -> Result<Document, OriginError> {
        match &self.selector {
            LayoutSelector::Digest(digest) => self.document(*digest, MAX_MANIFEST_BYTES).await,
            LayoutSelector::Tag(tag) => {
                let (layout, tag) = (Arc::clone(&self.layout), tag.clone());
                let entry = blocking(&self.subject, move || layout.find(&tag)).await?;
                self.document(entry.digest, MAX_MANIFEST_BYTES).await
            }
        }
    }

    /// The document `digest`, of at most `limit_bytes`, checked.
    pub(super) async fn document(&self, digest: Digest, limit_bytes: u64) -> Result<Document, OriginError> {
        self.meters.request();
        let layout = Arc::clone(&self.layout);
        let bytes = blocking(&self.subject, move || layout.document(&digest, limit_bytes)).await?;
        self.meters.bytes(bytes.len());
        Ok(Document { digest, bytes: bytes.into() })
    }

    /// Begins to read the part `wanted` of `layer`.
    pub(super) async fn read(
        self,
        layer: LayerDescriptor,
        wanted: Wanted,
        deadline: Instant,
    ) -> Result<FileBody, OriginError> {
        self.meters.request();
        let subject = self.subject.of_layer(layer.layer);
        let digest = layer.layer.into();
        let path = self.layout.blob_path(&digest);
        let layout = Arc::clone(&self.layout);
        let (file, actual_bytes) = blocking(&subject, move || layout.open_blob(&digest)).await?;
        if actual_bytes != wanted.len_bytes {
            return Err(subject.error(Failure::WrongLength { wanted_bytes: wanted.len_bytes, actual_bytes }));
        }
        let mut file = File::from_std(file);
        if let Err(source) = file.seek(SeekFrom::Start(wanted.range.start)).await {
            return Err(subject.error(Failure::File { path, source }));
        }
        let left_bytes = wanted.range.end - wanted.range.start;
        Ok(FileBody { file, path, subject, meters: self.meters, deadline, wanted_bytes: left_bytes, left_bytes })
    }
}

async fn blocking<T: Send + 'static>(
    subject: &Subject,
    work: impl FnOnce() -> Result<T, LayoutError> + Send + 'static,
) -> Result<T, OriginError> {
    let done = tokio::task::spawn_blocking(work).await.map_err(|error| subject.error(Failure::Task(error)))?;
    done.map_err(|error| subject.error(Failure::Layout(error)))
}

/// A part of a layer's file under way.
pub(super) struct FileBody {
    file: File,
    path: PathBuf,
    subject: Subject,
    meters: Arc<Meters>,
    deadline: Instant,
    wanted_bytes: u64,
    left_bytes: u64,
}

impl FileBody {
    /// The next piece, never empty, and what is to come after it; `None` when all was passed on.
    pub(super) async fn next(mut self) -> Result<Option<(Bytes, Self)>, OriginError> {
        let count = self.left_bytes.min(PIECE_BYTES);
        if count == 0 {
            return Ok(None);
        }
        let begun = Instant::now();
        let received_bytes = self.wanted_bytes - self.left_bytes;
        // At most `PIECE_BYTES`, so it fits.
        let mut piece = BytesMut::with_capacity(usize::try_from(count).unwrap_or_default());
        let read = timeout_at(self.deadline, (&mut self.file).take(count).read_buf(&mut piece)).await;
        let failure = match read {
            Ok(Ok(0)) => Failure::Truncated { wanted_bytes: self.wanted_bytes, received_bytes, source: None },
            Ok(Ok(_)) => {
                self.meters.bytes(piece.len());
                self.left_bytes -= piece.len() as u64;
                return Ok(Some((piece.freeze(), self)));
            }
            Ok(Err(source)) => Failure::File { path: self.path, source },
            Err(_) => Failure::Timeout { phase: Phase::Deadline, waited: begun.elapsed(), received_bytes },
        };
        Err(self.subject.error(failure))
    }
}
