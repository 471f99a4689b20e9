//! `hermes index`: build, inspect, verify.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::Context as _;
use bytes::Bytes;
use clap::{Args, Subcommand};
use futures::StreamExt as _;
use hermes_image::build::Options;
use hermes_image::ids::{ArtifactId, Digest, SpanNo};
use hermes_image::index::chunks::ChunkTable;
use hermes_image::index::seek::{SeekTable, SpanEntry};
use hermes_image::index::toc::Toc;
use hermes_image::span::SpanDecoder;
use hermes_image::statement::{self, LayerStatement, PublicKey, SigningKey, Statement, StatementError};
use hermes_image::verify::Verified;
use hermes_origin::indexing::{Artifact, ImageIndex, build_index};
use hermes_origin::{LayerDescriptor, Origin, ResolvedImage, find_image};
use hermes_policy::geometry::{GeometryError, LayerGeometry, Span};
use hermes_policy::profile::{Profile, codec};
use hermes_simulations::shape::Shape;
use hermes_snapshotter::control::FailureClass;
use hermes_snapshotter::index_folder::IndexFolder;
use hermes_snapshotter::node::{NodeError, find_class, keys, origin_class};
use serde_json::json;

use super::{ImageArgs, StateArgs, guess};
use crate::output::{self, failure};

/// Time for one request while checking an image: a span is half a megabyte.
const VERIFY_READ_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(60);

/// Commands of `hermes index`.
#[derive(Debug, Subcommand)]
pub(crate) enum IndexCommand {
    /// Read the image once and write its signed index.
    Build(BuildArgs),
    /// Show what an index holds.
    Inspect(InspectArgs),
    /// Write what `hermes simulate` needs of an image: chunks, spans and what starts read, without content and without names of files.
    ExportShape(ExportShapeArgs),
    /// Check an index: its signature, its parts, that it fits the image, and with --read every byte.
    Verify(VerifyArgs),
}

/// Where the index is.
#[derive(Debug, Clone, Args)]
pub(crate) struct FolderArgs {
    /// The folder of indexes; `indexes` below the state folder when absent.
    #[arg(long = "index", visible_alias = "output", value_name = "DIR")]
    folder: Option<PathBuf>,
    #[command(flatten)]
    state: StateArgs,
    /// Print the answer as JSON.
    #[arg(long)]
    json: bool,
}

impl FolderArgs {
    fn folder(&self) -> IndexFolder {
        IndexFolder::new(self.folder.clone().unwrap_or_else(|| self.state.state.join("indexes")))
    }

    fn key_path(&self, named: Option<&Path>) -> PathBuf {
        named.map_or_else(|| self.state.state.join("index-key"), Path::to_owned)
    }
}

/// Arguments of `hermes index build`.
#[derive(Debug, Args)]
pub(crate) struct BuildArgs {
    #[command(flatten)]
    image: ImageArgs,
    #[command(flatten)]
    folder: FolderArgs,
    /// The file with the signing key; made when it is missing. `index-key` below the state folder when absent.
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
}

/// Arguments of `hermes index inspect`.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    #[command(flatten)]
    image: ImageArgs,
    /// Say what a first start of the image is expected to read, and why. Reads some of the image's scripts and headers.
    #[arg(long)]
    guess: bool,
    /// A profile of starts to compare the guess with, as `hermes profile export` writes it; the one in the folder of indexes, if
    /// any, when absent.
    #[arg(long, value_name = "FILE", requires = "guess")]
    profile: Option<PathBuf>,
    #[command(flatten)]
    folder: FolderArgs,
}

/// Arguments of `hermes index export-shape`.
#[derive(Debug, Args)]
pub(crate) struct ExportShapeArgs {
    #[command(flatten)]
    image: ImageArgs,
    #[command(flatten)]
    folder: FolderArgs,
    /// The file to write.
    #[arg(long, value_name = "FILE")]
    to: PathBuf,
    /// A profile of starts, as `hermes profile export` writes it; the one in the folder of indexes, if any, when absent.
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
}

/// Arguments of `hermes index verify`.
#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    #[command(flatten)]
    image: ImageArgs,
    #[command(flatten)]
    folder: FolderArgs,
    /// A key that may have signed the index; the one in the state folder when absent. May be given more than once.
    #[arg(long = "trust", value_name = "KEY")]
    trusted_keys: Vec<String>,
    /// Fetch every span of every layer and check every chunk.
    #[arg(long)]
    read: bool,
}

/// Runs a command.
pub(crate) async fn run(command: IndexCommand) -> anyhow::Result<()> {
    match command {
        IndexCommand::Build(args) => build(args).await,
        IndexCommand::Inspect(args) => inspect(args).await,
        IndexCommand::ExportShape(args) => export_shape(args).await,
        IndexCommand::Verify(args) => verify(args).await,
    }
}

/// Finds the image's manifest and where its layers are read.
pub(crate) async fn resolve(args: &ImageArgs) -> anyhow::Result<(Arc<Origin>, ResolvedImage)> {
    let found = find_image(&args.image, args.platform.as_deref(), args.plain_http).await;
    found.map_err(|error| failure(find_class(&error), error.to_string()))
}

fn node_failure(error: &NodeError) -> anyhow::Error {
    failure(error.class(), error.to_string())
}

fn local_failure(error: impl std::fmt::Display) -> anyhow::Error {
    failure(FailureClass::Local, error.to_string())
}

/// Builds, signs and writes the index of an image. Returns it with the length of its wire form in bytes.
pub(crate) async fn build_into(
    origin: &Arc<Origin>,
    image: &ResolvedImage,
    folder: &IndexFolder,
    key: &SigningKey,
) -> anyhow::Result<(ImageIndex, u64)> {
    let bar = output::byte_bar(image.layers.iter().map(|layer| layer.len_bytes).sum(), "indexing");
    let wire_bytes = Arc::new(AtomicU64::new(0));
    let (kept_in, kept_bytes) = (folder.clone(), Arc::clone(&wire_bytes));
    let keep = move |artifact: &Artifact| {
        let put = kept_in.put_artifact(artifact.id, &artifact.bytes);
        put.map(|len_bytes| {
            kept_bytes.fetch_add(len_bytes, Ordering::Relaxed);
        })
    };
    let built = build_index(origin, image, Options::default(), keep, |done| bar.set_position(done)).await;
    bar.finish_and_clear();
    let index = built.map_err(|error| node_failure(&error.into()))?;
    let wire_bytes = wire_bytes.load(Ordering::Relaxed);
    folder.put_statement(image.manifest_digest, &key.sign(&index.statement)).map_err(local_failure)?;
    Ok((index, wire_bytes))
}

async fn build(args: BuildArgs) -> anyhow::Result<()> {
    let (origin, image) = resolve(&args.image).await?;
    let key_path = args.folder.key_path(args.key.as_deref());
    if let Some(parent) = key_path.parent() {
        std::fs::create_dir_all(parent)
            .map_err(|error| local_failure(format!("cannot make {}: {error}", parent.display())))?;
    }
    let key = keys::load_or_create(&key_path).map_err(|error| node_failure(&error))?;
    let folder = args.folder.folder();
    let started = Instant::now();
    let (index, wire_bytes) = build_into(&origin, &image, &folder, &key).await?;
    if !args.image.image.starts_with("oci:") {
        folder.put_reference(image.manifest_digest, &args.image.image).map_err(local_failure)?;
    }
    let elapsed = started.elapsed().as_secs_f64();
    let compressed: u64 = image.layers.iter().map(|layer| layer.len_bytes).sum();
    let logical: u64 = index.statement.layers.iter().map(|layer| layer.logical_len_bytes).sum();
    if args.folder.json {
        let answer = json!({
            "manifest": image.manifest_digest, "platform": image.platform.to_string(), "layers": image.layers.len(),
            "compressed_bytes": compressed, "logical_bytes": logical, "index_bytes": wire_bytes,
            "elapsed_s": elapsed, "key": key.public().to_string(), "folder": folder.path(),
        });
        println!("{answer}");
    } else {
        println!(
            "indexed {} ({}, {} layers, {} compressed, {} unpacked) in {elapsed:.1} s\n  index: {} ({:.2} % of the layers) in {}\n  signed by {}",
            image.reference,
            image.manifest_digest,
            image.layers.len(),
            output::bytes(compressed),
            output::bytes(logical),
            output::bytes(wire_bytes),
            wire_bytes as f64 * 100.0 / compressed.max(1) as f64,
            folder.path().display(),
            key.public(),
        );
    }
    Ok(())
}

/// An index that was read and checked part by part.
pub(super) struct OpenIndex {
    statement: Statement,
    pub(super) layers: Vec<OpenLayerIndex>,
}

pub(super) struct OpenLayerIndex {
    pub(super) toc: Toc,
    pub(super) chunks: ChunkTable,
    pub(super) seek: SeekTable,
    pub(super) windows: Verified<Bytes>,
}

fn open_index(folder: &IndexFolder, image: &ResolvedImage, trusted: &[PublicKey]) -> anyhow::Result<OpenIndex> {
    let manifest = image.manifest_digest;
    let signed = folder.statement(manifest).map_err(local_failure)?.ok_or_else(|| no_index(folder, image, manifest))?;
    let statement = Statement::open(&signed, manifest, trusted).map_err(|error| refused(image, trusted, &error))?;
    let layers = image.layers.iter().map(LayerDescriptor::manifest_layer);
    statement.check_image(&image.platform.to_string(), layers).map_err(|error| corrupt(image, error))?;
    let layers =
        statement.layers.iter().map(|layer| open_layer(folder, image, layer)).collect::<anyhow::Result<_>>()?;
    Ok(OpenIndex { statement, layers })
}

/// Why an index is not accepted, and what would change that.
fn refused(image: &ResolvedImage, trusted: &[PublicKey], error: &StatementError) -> anyhow::Error {
    let (class, advice) = match error {
        StatementError::Untrusted { .. } if trusted.is_empty() => (
            FailureClass::Denied,
            "no key is trusted: name the signer's with --trust, if it is the one that its owner has told you",
        ),
        StatementError::Untrusted { .. } => {
            (FailureClass::Denied, "add --trust KEY, if one of these is the key that its owner has told you")
        }
        StatementError::BadSignature { .. } => (FailureClass::Denied, "somebody has changed it; build it again"),
        _ => (FailureClass::Corrupt, "build it again"),
    };
    failure(class, format!("the index of {}: {error}; {advice}", image.reference))
}

fn no_index(folder: &IndexFolder, image: &ResolvedImage, manifest: Digest) -> anyhow::Error {
    let message = format!(
        "{} holds no index of {} ({manifest}); build one with `hermes index build`",
        folder.path().display(),
        image.reference
    );
    failure(FailureClass::NotFound, message)
}

fn corrupt(image: &ResolvedImage, reason: impl std::fmt::Display) -> anyhow::Error {
    let message = format!("the index of {} is damaged: {reason}; build it again", image.reference);
    failure(FailureClass::Corrupt, message)
}

fn open_layer(folder: &IndexFolder, image: &ResolvedImage, layer: &LayerStatement) -> anyhow::Result<OpenLayerIndex> {
    let get = |id: ArtifactId, what: &str| {
        let found = folder.artifact(id).map_err(|error| corrupt(image, error))?;
        found.ok_or_else(|| corrupt(image, format!("the {what} of layer {} ({id}) is missing", layer.layer)))
    };
    let toc = Toc::decode(get(layer.toc, "table of contents")?.into_inner()).map_err(|error| corrupt(image, error))?;
    let chunks =
        ChunkTable::decode(get(layer.chunks, "chunk table")?.into_inner()).map_err(|error| corrupt(image, error))?;
    let seek = SeekTable::decode(get(layer.seek, "seek table")?.into_inner()).map_err(|error| corrupt(image, error))?;
    layer.check_toc(&toc).map_err(|error| corrupt(image, error))?;
    layer.check_chunks(&chunks).map_err(|error| corrupt(image, error))?;
    layer.check_seek(&seek, &chunks).map_err(|error| corrupt(image, error))?;
    let windows = get(seek.windows_id(), "windows")?;
    if windows.len() as u64 != seek.windows_len_bytes() {
        return Err(corrupt(image, format!("the windows of layer {} have another length", layer.layer)));
    }
    for span in 0..seek.count() {
        let range = seek.window_range(SpanNo(span));
        let window = windows.slice(range.start as usize..range.end as usize);
        seek.verify_window(SpanNo(span), window).map_err(|error| corrupt(image, format!("window {span}: {error}")))?;
    }
    Ok(OpenLayerIndex { toc, chunks, seek, windows })
}

/// The profile of an image's starts: from a file, or the one beside its index.
fn profile_of(file: Option<&Path>, folder: &IndexFolder, image: &ResolvedImage) -> anyhow::Result<Option<Profile>> {
    let bytes = match file {
        Some(file) => Some(
            std::fs::read(file).map_err(|error| local_failure(format!("cannot read {}: {error}", file.display())))?,
        ),
        None => folder.profile(image.manifest_digest).map_err(local_failure)?,
    };
    let decoded = bytes.map(|bytes| codec::decode(&bytes)).transpose();
    decoded.map_err(|error| failure(FailureClass::Corrupt, format!("the profile of {}: {error}", image.reference)))
}

async fn export_shape(args: ExportShapeArgs) -> anyhow::Result<()> {
    let (_, image) = resolve(&args.image).await?;
    let folder = args.folder.folder();
    let index = open_index(&folder, &image, &signers(&folder, &image)?)?;
    let layer = |layer: &OpenLayerIndex| -> Result<_, GeometryError> {
        let span = |span: SpanEntry| Span {
            first_chunk: span.chunks.start,
            blob_start: span.blob.start,
            blob_end: span.blob.end,
        };
        let geometry = LayerGeometry::of_table(&layer.chunks)?.with_spans(layer.seek.spans().map(span).collect())?;
        Ok((layer.chunks.diff_id(), geometry))
    };
    let layers =
        index.layers.iter().map(layer).collect::<Result<Vec<_>, _>>().map_err(|error| corrupt(&image, error))?;
    let profile = profile_of(args.profile.as_deref(), &folder, &image)?;
    let shape = Shape::of_index(image.reference.to_string(), layers, profile.as_ref());
    let text = serde_json::to_vec(&shape.file())?;
    std::fs::write(&args.to, &text)
        .map_err(|error| local_failure(format!("cannot write {}: {error}", args.to.display())))?;
    let (chunks, start) = (shape.chunk_count(), shape.start_size().0);
    if args.folder.json {
        println!("{}", json!({"file": args.to, "bytes": text.len(), "chunks": chunks, "start_chunks": start}));
    } else {
        let of_start =
            if profile.is_some() { format!("a start reads {start}") } else { "no start is known".to_owned() };
        println!("{} chunks, {of_start}: {} in {}", chunks, output::bytes(text.len() as u64), args.to.display());
    }
    Ok(())
}

/// Whose signatures an index carries. Reading one needs no trust in its signer: inspect accepts whoever signed it, and says
/// who that was.
fn signers(folder: &IndexFolder, image: &ResolvedImage) -> anyhow::Result<Vec<PublicKey>> {
    let manifest = image.manifest_digest;
    let signed = folder.statement(manifest).map_err(local_failure)?.ok_or_else(|| no_index(folder, image, manifest))?;
    Ok(statement::signers(&signed))
}

async fn inspect(args: InspectArgs) -> anyhow::Result<()> {
    let (origin, image) = resolve(&args.image).await?;
    let folder = args.folder.folder();
    let signers = signers(&folder, &image)?;
    let (index, image) = (Arc::new(open_index(&folder, &image, &signers)?), Arc::new(image));
    let guessed = match args.guess {
        true => Some(guess::of_image(origin, Arc::clone(&image), Arc::clone(&index)).await?),
        false => None,
    };
    let profile = profile_of(args.profile.as_deref(), &folder, &image)?;
    let signers = signers.iter().map(ToString::to_string).collect::<Vec<_>>();
    let layers = index.statement.layers.iter().zip(&index.layers);
    if args.folder.json {
        let layers = layers.map(|(statement, layer)| {
            json!({
                "layer": statement.layer, "diff_id": statement.diff_id, "compression": compression_name(layer),
                "compressed_bytes": statement.blob_len_bytes, "logical_bytes": statement.logical_len_bytes,
                "entries": layer.toc.entry_count(), "chunks": layer.chunks.count(), "spans": layer.seek.count(),
                "toc": {"id": statement.toc, "bytes": layer.toc.bytes().len()},
                "chunk_table": {"id": statement.chunks, "bytes": layer.chunks.bytes().len()},
                "seek_table": {"id": statement.seek, "bytes": layer.seek.bytes().len()},
                "windows": {"id": layer.seek.windows_id(), "bytes": layer.windows.len()},
            })
        });
        let answer = json!({
            "image": image.reference.to_string(), "manifest": image.manifest_digest, "platform": index.statement.platform,
            "signed_by": signers, "layers": layers.collect::<Vec<_>>(),
            "guess": guessed.as_ref().map(|guessed| guessed.as_json(profile.as_ref(), &index)),
        });
        println!("{}", serde_json::to_string_pretty(&answer)?);
        return Ok(());
    }
    println!(
        "{} ({}, {})\nsigned by {}\n",
        image.reference,
        image.manifest_digest,
        index.statement.platform,
        signers.join(", ")
    );
    let rows = layers.map(|(statement, layer)| {
        vec![
            statement.layer.hex()[..12].to_owned(),
            compression_name(layer).to_owned(),
            output::bytes(statement.blob_len_bytes),
            output::bytes(statement.logical_len_bytes),
            layer.toc.entry_count().to_string(),
            layer.chunks.count().to_string(),
            layer.seek.count().to_string(),
            output::bytes(layer.toc.bytes().len() as u64),
            output::bytes(layer.chunks.bytes().len() as u64),
            output::bytes((layer.seek.bytes().len() + layer.windows.len()) as u64),
        ]
    });
    let header = [
        "layer",
        "compression",
        "compressed",
        "unpacked",
        "entries",
        "chunks",
        "spans",
        "toc",
        "chunk table",
        "seek table",
    ];
    println!("{}", output::table(&header, rows.collect()));
    if let Some(guessed) = guessed {
        println!("{}", guessed.as_table(profile.as_ref(), &index));
    }
    Ok(())
}

async fn verify(args: VerifyArgs) -> anyhow::Result<()> {
    let (origin, image) = resolve(&args.image).await?;
    let folder = args.folder.folder();
    let mut trusted = Vec::new();
    for key in &args.trusted_keys {
        trusted.push(key.parse().map_err(|error| failure(FailureClass::Usage, format!("--trust: {error}")))?);
    }
    if trusted.is_empty() {
        let path = args.folder.key_path(None);
        let own =
            path.exists().then(|| keys::load_or_create(&path)).transpose().map_err(|error| node_failure(&error))?;
        trusted.extend(own.map(|key| key.public()));
    }
    let index = open_index(&folder, &image, &trusted)?;
    let mut chunks = 0;
    if args.read {
        let bar = output::byte_bar(image.layers.iter().map(|layer| layer.len_bytes).sum(), "verifying");
        for (layer, descriptor) in index.layers.iter().zip(&image.layers) {
            chunks += read_layer(&origin, descriptor, layer, |bytes| bar.inc(bytes)).await?;
        }
        bar.finish_and_clear();
    }
    let signers = signers(&folder, &image)?;
    if args.folder.json {
        let signers = signers.iter().map(|key| json!({"key": key.to_string(), "trusted": trusted.contains(key)}));
        println!(
            "{}",
            json!({
                "manifest": image.manifest_digest, "layers": index.layers.len(), "chunks_read": chunks, "ok": true,
                "signed_by": signers.collect::<Vec<_>>(),
            })
        );
    } else {
        let read = if args.read { format!(", {chunks} chunks read and right") } else { String::new() };
        println!("the index of {} is right: {} layers{read}", image.reference, index.layers.len());
        for key in signers {
            println!("  signed by {key}, {}", if trusted.contains(&key) { "trusted" } else { "not trusted" });
        }
    }
    Ok(())
}

/// Decodes every span of a layer on its own, each from its restart point. Returns the number of chunks.
async fn read_layer(
    origin: &Origin,
    descriptor: &LayerDescriptor,
    layer: &OpenLayerIndex,
    progress: impl Fn(u64),
) -> anyhow::Result<u64> {
    let mut chunks = 0;
    for span in 0..layer.seek.count() {
        let window = layer.seek.window_range(SpanNo(span));
        let window = layer.windows.slice(window.start as usize..window.end as usize);
        let wrong = |error: hermes_image::span::SpanError| {
            failure(FailureClass::Corrupt, format!("layer {}: {error}", descriptor.layer))
        };
        let mut decoder = SpanDecoder::new(&layer.seek, &layer.chunks, SpanNo(span), &window).map_err(wrong)?;
        let deadline = (Instant::now() + VERIFY_READ_TIMEOUT).into();
        let mut body = std::pin::pin!(origin.read(descriptor, layer.seek.blob_range(span..span + 1), deadline));
        let mut decoded = Vec::new();
        while let Some(piece) = body.next().await {
            let piece = piece.map_err(|error| failure(origin_class(&error), error.to_string()))?;
            progress(piece.len() as u64);
            decoder.push(&piece, &mut decoded).map_err(wrong)?;
            chunks += decoded.drain(..).count() as u64;
        }
        decoder.finish().map_err(wrong)?;
    }
    if chunks != u64::from(layer.chunks.count()) {
        return Err(failure(
            FailureClass::Corrupt,
            format!("layer {}: {chunks} chunks decoded of {}", descriptor.layer, layer.chunks.count()),
        ));
    }
    Ok(chunks)
}

/// The bytes of an image's configuration, for whoever starts its program.
pub(crate) fn config_bytes(image: &ResolvedImage) -> anyhow::Result<&[u8]> {
    Some(image.config_bytes.as_ref()).context("the image has no configuration")
}

fn compression_name(layer: &OpenLayerIndex) -> &'static str {
    use hermes_image::inflate::Compression;
    match layer.seek.header().compression {
        Compression::Plain => "none",
        Compression::Gzip => "gzip",
        Compression::Zstd => "zstd",
    }
}
