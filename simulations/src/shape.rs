//! Images without content: where chunks and spans lie, and what a start reads.
//!
//! A shape is all that policy can see of an image. It comes from a file (JSON, [`FORMAT`], below) or from parameters. In the
//! synthetic ones a layer is a row of files, each cut every 64 KiB with a shorter last chunk, as the builder cuts; a start
//! reads whole files, in an order that has nothing to do with their places, two chunks at a time, as the kernel does.

use std::ops::Range;
use std::sync::Arc;

use hermes_image::ids::DiffId;
use hermes_image::runs::Runs;
use hermes_policy::geometry::{GeometryError, LayerGeometry, Span};
use hermes_policy::profile::Profile;
use hermes_policy::rng::Rng;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::scenario::ImageConfig;

/// The name and version of the file format.
pub const FORMAT: &str = "hermes-shape/1";
/// Largest file that is read: the shape of a 100 GB image takes a tenth.
pub const FILE_LEN_MAX_BYTES: u64 = 64 << 20;
/// Most layers, as containerd has them.
const LAYERS_MAX: usize = 512;
/// Most reads of a start.
const READS_MAX: usize = 4_000_000;
/// Chunks in one read of a synthetic start: 128 KiB, what the kernel asks for at once.
const READ_CHUNKS: u32 = 2;
/// A whole chunk, and the last one of a synthetic file.
pub(crate) const CHUNK_BYTES: u64 = 65_536;
/// See [`CHUNK_BYTES`]. With one file of six chunks after another the mean is 60 KB, as measured in real images.
const TAIL_BYTES: u64 = 32_768;
/// Chunks of a synthetic file: uniform from one to this, six on average.
const FILE_CHUNKS_MAX: u64 = 11;

/// Why there is no shape.
#[derive(Debug, Error)]
pub enum ShapeError {
    /// No JSON of this format.
    #[error("the shape is no {FORMAT}; export it again with this version")]
    Format(#[source] serde_json::Error),
    /// Another format or version.
    #[error("the shape has format {0:?}, this version reads {FORMAT:?}")]
    Version(String),
    /// A layer that cannot be.
    #[error("layer {layer} of the shape")]
    Layer {
        /// Its place.
        layer: usize,
        /// Why.
        #[source]
        source: GeometryError,
    },
    /// A digest that is none.
    #[error("layer {0} of the shape has no diffID of 64 hexadecimal digits")]
    Digest(usize),
    /// A read of what is not there.
    #[error("read {0} of the shape lies outside its layer")]
    Read(usize),
    /// More than any image has.
    #[error("the shape has more than {LAYERS_MAX} layers or {READS_MAX} reads")]
    TooMany,
    /// Parameters that give no image.
    #[error(
        "an image of {chunks} chunks has no start of {start} chunks; make image.size larger or image.start_chunks smaller"
    )]
    Start {
        /// Of the image.
        chunks: u64,
        /// Of the start.
        start: u64,
    },
}

/// A layer as it lies in a file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerFile {
    /// The diffID in hexadecimal.
    pub diff_id: String,
    /// Lengths of chunks in bytes, and how often in a row.
    pub chunks: Vec<(u64, u32)>,
    /// Spans: number of chunks, and start and end in the compressed blob.
    pub spans: Vec<(u32, u64, u64)>,
}

/// A shape as it lies in a file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShapeFile {
    /// [`FORMAT`].
    pub format: String,
    /// For people.
    pub name: String,
    /// From the base upwards.
    pub layers: Vec<LayerFile>,
    /// What a start reads, in order: layer, first chunk, number of chunks. Empty when nobody has recorded one.
    pub reads: Vec<(u16, u32, u32)>,
}

/// A layer.
#[derive(Debug, Clone)]
pub struct ShapeLayer {
    /// Its name.
    pub diff_id: DiffId,
    /// Its chunks and spans.
    pub geometry: Arc<LayerGeometry>,
    /// Chunks that a start of any image reads.
    pub hot: Runs,
}

/// One read of a start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Read {
    /// The layer's place.
    pub layer: u16,
    /// The chunks.
    pub chunks: Range<u32>,
}

/// One of the images of a shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The places of its layers, from the base upwards.
    pub layers: Vec<usize>,
    /// What a start of it reads, by place among the reads of the shape.
    pub reads: Range<usize>,
    /// Chunks that a start of it reads, layer by layer.
    pub hot: Vec<Runs>,
}

/// Images without content, mostly one.
#[derive(Debug, Clone)]
pub struct Shape {
    /// For people.
    pub name: String,
    /// From the base upwards; of several images the ones that they share first.
    pub layers: Vec<ShapeLayer>,
    /// What starts read, in order, image by image.
    pub reads: Vec<Read>,
    /// The images, the most popular first.
    pub images: Vec<Image>,
}

impl Shape {
    /// Reads the JSON of a file.
    ///
    /// # Errors
    /// When it is no shape.
    pub fn parse(json: &[u8]) -> Result<Self, ShapeError> {
        let file: ShapeFile = serde_json::from_slice(json).map_err(ShapeError::Format)?;
        if file.format != FORMAT {
            return Err(ShapeError::Version(file.format));
        }
        if file.layers.len() > LAYERS_MAX || file.reads.len() > READS_MAX {
            return Err(ShapeError::TooMany);
        }
        let mut layers = Vec::with_capacity(file.layers.len());
        for (place, layer) in file.layers.iter().enumerate() {
            let diff_id = hex(&layer.diff_id).ok_or(ShapeError::Digest(place))?;
            let lens = layer.chunks.iter().flat_map(|(len, count)| std::iter::repeat_n(*len, *count as usize));
            let geometry = LayerGeometry::new(lens).and_then(|geometry| {
                let mut first_chunk = 0_u32;
                let spans = layer.spans.iter().map(|(chunks, blob_start, blob_end)| {
                    let span = Span { first_chunk, blob_start: *blob_start, blob_end: *blob_end };
                    first_chunk = first_chunk.saturating_add(*chunks);
                    span
                });
                geometry.with_spans(spans.collect())
            });
            let geometry = geometry.map_err(|source| ShapeError::Layer { layer: place, source })?;
            layers.push(ShapeLayer { diff_id, geometry: Arc::new(geometry), hot: Runs::new() });
        }
        let mut reads = Vec::with_capacity(file.reads.len());
        for (place, (layer, first, count)) in file.reads.iter().enumerate() {
            let end = first.checked_add(*count).filter(|_| *count > 0);
            let known = layers.get(usize::from(*layer)).map(|layer| layer.geometry.chunk_count());
            match end.zip(known) {
                Some((end, known)) if end <= known => reads.push(Read { layer: *layer, chunks: *first..end }),
                _ => return Err(ShapeError::Read(place)),
            }
        }
        Ok(Self::with_reads(file.name, layers, reads))
    }

    /// A shape by parameters; the same parameters and seed give the same one.
    ///
    /// # Errors
    /// When the start is larger than the image.
    pub fn synthetic(config: &ImageConfig, seed: u64) -> Result<Self, ShapeError> {
        Self::synthetic_images(config, 1, 0, seed)
    }

    /// A shape of several images, each by the same parameters, of which the first `shared` layers are the same.
    ///
    /// # Errors
    /// When the start is larger than an image.
    pub fn synthetic_images(config: &ImageConfig, images: u16, shared: u16, seed: u64) -> Result<Self, ShapeError> {
        let mut rng = Rng::new(seed ^ 0x5348_4150_4553_0001);
        let count = config.layers.max(1);
        let layer_bytes = (config.size.0 / u64::from(count)).max(CHUNK_BYTES);
        let (mut layers, mut reads, mut made) = (Vec::new(), Vec::new(), Vec::new());
        let mut files: Vec<Vec<Read>> = Vec::new();
        for image in 0..images.max(1) {
            let shared = if image == 0 { 0 } else { shared.min(count) };
            let mut places: Vec<usize> = (0..usize::from(shared)).collect();
            for _ in shared..count {
                let (geometry, of_layer) = synthetic_layer(config, layer_bytes, &mut rng)?;
                let mut name = [0; 32];
                name.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&rng.next_u64().to_le_bytes()));
                let place = layers.len();
                layers.push(ShapeLayer { diff_id: DiffId(name), geometry: Arc::new(geometry), hot: Runs::new() });
                files.push(of_layer.into_iter().map(|chunks| Read { layer: place as u16, chunks }).collect());
                places.push(place);
            }
            let chunks: u64 = places.iter().map(|place| u64::from(layers[*place].geometry.chunk_count())).sum();
            let start = u64::from(config.start_chunks);
            if start > chunks {
                return Err(ShapeError::Start { chunks, start });
            }
            let of_image = places.iter().flat_map(|place| files[*place].iter().cloned()).collect();
            let first = reads.len();
            reads.extend(draw_reads(of_image, config.start_chunks, &mut rng));
            made.push((places, first..reads.len()));
        }
        let name = match images {
            0 | 1 => format!("synthetic, {}", config.size),
            _ => format!("{images} synthetic ones, {} each", config.size),
        };
        Ok(Self::with_images(name, layers, reads, made))
    }

    /// The shape of a real image: its layers from the base upwards, and what a profile says that starts read, in its order. Steps
    /// of layers that the image does not have, or of chunks beyond their end, are left out, as the node does.
    pub fn of_index(name: String, layers: Vec<(DiffId, LayerGeometry)>, profile: Option<&Profile>) -> Self {
        let layers: Vec<ShapeLayer> = layers
            .into_iter()
            .map(|(diff_id, geometry)| ShapeLayer { diff_id, geometry: Arc::new(geometry), hot: Runs::new() })
            .collect();
        let steps = profile.into_iter().flat_map(|profile| profile.steps.iter().map(move |step| (profile, step)));
        let reads = steps.filter_map(|(profile, step)| {
            let diff_id = profile.layers.get(usize::from(step.layer))?;
            let layer = layers.iter().position(|layer| layer.diff_id == *diff_id)?;
            let end = step.chunks.end.min(layers[layer].geometry.chunk_count());
            (step.chunks.start < end).then_some(Read { layer: layer as u16, chunks: step.chunks.start..end })
        });
        let reads = reads.take(READS_MAX).collect();
        Self::with_reads(name, layers, reads)
    }

    /// The form of a file; [`Self::parse`] reads it again.
    pub fn file(&self) -> ShapeFile {
        let layer = |layer: &ShapeLayer| {
            let geometry = &layer.geometry;
            let mut chunks: Vec<(u64, u32)> = Vec::new();
            for chunk in 0..geometry.chunk_count() {
                let len_bytes = geometry.len_bytes(&(chunk..chunk + 1));
                match chunks.last_mut() {
                    Some((len, count)) if *len == len_bytes => *count += 1,
                    _ => chunks.push((len_bytes, 1)),
                }
            }
            let spans = (0..geometry.span_count().unwrap_or(0)).map(|span| {
                let (chunks, bytes) = (geometry.span_chunks(&(span..span + 1)), geometry.span_bytes(&(span..span + 1)));
                (chunks.end - chunks.start, bytes.start, bytes.end)
            });
            let diff_id = layer.diff_id.0.iter().map(|byte| format!("{byte:02x}")).collect();
            LayerFile { diff_id, chunks, spans: spans.collect() }
        };
        ShapeFile {
            format: FORMAT.to_owned(),
            name: self.name.clone(),
            layers: self.layers.iter().map(layer).collect(),
            reads: self
                .reads
                .iter()
                .map(|read| (read.layer, read.chunks.start, read.chunks.end - read.chunks.start))
                .collect(),
        }
    }

    /// The shape with a start of `start_chunks` chunks drawn from `seed`, when it has none of its own: runs of chunks as long as
    /// the files of synthetic images, anywhere in the image.
    ///
    /// # Errors
    /// When the image has fewer chunks.
    pub fn or_drawn(self, start_chunks: u32, seed: u64) -> Result<Self, ShapeError> {
        if !self.reads.is_empty() {
            return Ok(self);
        }
        let mut rng = Rng::new(seed ^ 0x5348_4150_4553_0002);
        let mut files = Vec::new();
        for (place, layer) in self.layers.iter().enumerate() {
            let (mut at, count) = (0, layer.geometry.chunk_count());
            while at < count {
                let end = (at + 1 + rng.below(FILE_CHUNKS_MAX) as u32).min(count);
                files.push(Read { layer: place as u16, chunks: at..end });
                at = end;
            }
        }
        if u64::from(start_chunks) > self.chunk_count() {
            return Err(ShapeError::Start { chunks: self.chunk_count(), start: start_chunks.into() });
        }
        let reads = draw_reads(files, start_chunks, &mut rng);
        Ok(Self::with_reads(self.name, self.layers, reads))
    }

    /// A shape of one image, of which a start reads `reads`.
    pub(crate) fn with_reads(name: String, layers: Vec<ShapeLayer>, reads: Vec<Read>) -> Self {
        let image = ((0..layers.len()).collect(), 0..reads.len());
        Self::with_images(name, layers, reads, vec![image])
    }

    fn with_images(
        name: String,
        mut layers: Vec<ShapeLayer>,
        reads: Vec<Read>,
        images: Vec<(Vec<usize>, Range<usize>)>,
    ) -> Self {
        let hot = |place: usize, reads: &[Read]| -> Runs {
            let of_layer = reads.iter().filter(|read| usize::from(read.layer) == place);
            let mut chunks: Vec<Range<u32>> = of_layer.map(|read| read.chunks.clone()).collect();
            chunks.sort_unstable_by_key(|chunks| chunks.start);
            chunks.into_iter().collect()
        };
        let image = |(layers, range): (Vec<usize>, Range<usize>)| {
            let hot = layers.iter().map(|place| hot(*place, &reads[range.clone()])).collect();
            Image { layers, reads: range, hot }
        };
        let images: Vec<Image> = images.into_iter().map(image).collect();
        for image in &images {
            image.layers.iter().zip(&image.hot).for_each(|(place, hot)| layers[*place].hot.insert_all(hot));
        }
        Self { name, layers, reads, images }
    }

    /// Chunks of all layers.
    pub fn chunk_count(&self) -> u64 {
        self.layers.iter().map(|layer| u64::from(layer.geometry.chunk_count())).sum()
    }

    /// Chunks and uncompressed bytes that a start reads.
    pub fn start_size(&self) -> (u64, u64) {
        let count = self.layers.iter().map(|layer| layer.hot.chunk_count()).sum();
        let bytes = |layer: &ShapeLayer| -> u64 { layer.hot.iter().map(|run| layer.geometry.len_bytes(&run)).sum() };
        (count, self.layers.iter().map(bytes).sum())
    }

    /// Compressed bytes of the spans that `wanted` chunks of a layer lie in: what has to be read once at least.
    pub fn compressed_bytes(&self, layer: usize, wanted: &Runs) -> u64 {
        let geometry = &self.layers[layer].geometry;
        let count = geometry.span_count().unwrap_or(0);
        let needed = (0..count).filter(|span| wanted.intersects(&geometry.span_chunks(&(*span..*span + 1))));
        needed.map(|span| geometry.span_bytes(&(span..span + 1))).map(|bytes| bytes.end - bytes.start).sum()
    }
}

/// Files in an order that has nothing to do with their places, until `left` chunks are read, two at a time.
fn draw_reads(mut files: Vec<Read>, mut left: u32, rng: &mut Rng) -> Vec<Read> {
    let mut reads = Vec::new();
    while left > 0 && !files.is_empty() {
        let file = files.swap_remove(rng.below(files.len() as u64) as usize);
        let mut at = file.chunks.start;
        while at < file.chunks.end && left > 0 {
            let end = (at + READ_CHUNKS.min(left)).min(file.chunks.end);
            left -= end - at;
            reads.push(Read { layer: file.layer, chunks: at..end });
            at = end;
        }
    }
    reads
}

fn synthetic_layer(
    config: &ImageConfig,
    layer_bytes: u64,
    rng: &mut Rng,
) -> Result<(LayerGeometry, Vec<Range<u32>>), ShapeError> {
    let (mut lens, mut files, mut spans) = (Vec::new(), Vec::new(), Vec::new());
    let (mut total, mut span_bytes, mut blob) = (0, 0, 0_u64);
    while total < layer_bytes {
        let first = lens.len() as u32;
        let count = 1 + rng.below(FILE_CHUNKS_MAX);
        for no in 0..count {
            let len = if no + 1 == count { TAIL_BYTES } else { CHUNK_BYTES };
            if span_bytes == 0 || span_bytes + len > config.span.0 {
                spans.push((lens.len() as u32, span_bytes));
                span_bytes = 0;
            }
            span_bytes += len;
            total += len;
            lens.push(len);
        }
        files.push(first..lens.len() as u32);
    }
    let mut table = Vec::with_capacity(spans.len());
    for (place, (first_chunk, _)) in spans.iter().enumerate() {
        let len = spans.get(place + 1).map_or(span_bytes, |(_, len)| *len);
        let packed = config.compressed.of(len).max(1);
        table.push(Span { first_chunk: *first_chunk, blob_start: blob, blob_end: blob + packed });
        blob += packed;
    }
    let geometry = LayerGeometry::new(lens).and_then(|geometry| geometry.with_spans(table));
    Ok((geometry.map_err(|source| ShapeError::Layer { layer: 0, source })?, files))
}

fn hex(text: &str) -> Option<DiffId> {
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(DiffId(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{Bytes, Share};

    fn config(start_chunks: u32) -> ImageConfig {
        ImageConfig { size: Bytes(100_000_000), layers: 3, start_chunks, ..ImageConfig::default() }
    }

    #[test]
    fn a_synthetic_image_is_as_large_as_asked_for_and_the_same_each_time() {
        let shape = Shape::synthetic(&config(300), 1).expect("valid");
        let (count, bytes) = shape.start_size();
        assert_eq!((shape.layers.len(), count), (3, 300));
        assert!((55_000..=63_000).contains(&(bytes / count)), "{} bytes a chunk", bytes / count);
        let total: u64 = shape.layers.iter().map(|layer| layer.geometry.len_bytes(&(0..u32::MAX))).sum();
        assert!((100_000_000..102_500_000).contains(&total), "{total}");
        let again = Shape::synthetic(&config(300), 1).expect("valid");
        assert_eq!((&shape.reads, &shape.layers[2].geometry), (&again.reads, &again.layers[2].geometry));
        assert_ne!(shape.reads, Shape::synthetic(&config(300), 2).expect("valid").reads);
        assert!(matches!(Shape::synthetic(&config(30_000), 1), Err(ShapeError::Start { .. })));
    }

    #[test]
    fn images_share_their_lowest_layers_and_read_each_its_own() {
        let shape = Shape::synthetic_images(&config(300), 4, 2, 1).expect("valid");
        assert_eq!((shape.layers.len(), shape.images.len(), shape.reads.len()), (3 + 3, 4, shape.images[3].reads.end));
        for (no, image) in shape.images.iter().enumerate() {
            assert_eq!(image.layers, [0, 1, 2 + no]);
            assert_eq!(image.hot.iter().map(Runs::chunk_count).sum::<u64>(), 300);
            assert!(
                shape.reads[image.reads.clone()].iter().all(|read| image.layers.contains(&usize::from(read.layer)))
            );
            assert_eq!(shape.layers[2 + no].hot, image.hot[2]);
        }
        assert!(shape.layers[0].hot.chunk_count() > shape.images[0].hot[0].chunk_count());
        let one = Shape::synthetic(&config(300), 1).expect("valid");
        assert_eq!(
            (&one.reads[..], one.images[0].reads.clone()),
            (&shape.reads[..one.reads.len()], shape.images[0].reads.clone())
        );
    }

    #[test]
    fn what_must_be_read_is_whole_spans() {
        let config = ImageConfig { compressed: Share(5000), span: Bytes(262_144), ..config(0) };
        let shape = Shape::synthetic(&config, 1).expect("valid");
        let geometry = &shape.layers[0].geometry;
        let span = geometry.span_chunks(&(3..4));
        let packed = shape.compressed_bytes(0, &Runs::one(span.start..span.start + 1));
        assert_eq!(packed, geometry.len_bytes(&span) / 2);
        assert_eq!(shape.compressed_bytes(0, &Runs::new()), 0);
    }

    #[test]
    fn a_shape_is_written_and_read_again_and_gets_a_start_when_it_has_none() {
        let shape = Shape::synthetic(&config(300), 1).expect("valid");
        let json = serde_json::to_vec(&shape.file()).expect("it is written");
        let again = Shape::parse(&json).expect("it is read");
        assert_eq!(again.reads, shape.reads);
        for (one, two) in shape.layers.iter().zip(&again.layers) {
            assert_eq!((one.diff_id, &one.geometry, &one.hot), (two.diff_id, &two.geometry, &two.hot));
        }
        let layers = || shape.layers.iter().map(|layer| (layer.diff_id, (*layer.geometry).clone())).collect();
        let bare = Shape::of_index("bare".to_owned(), layers(), None);
        assert!(bare.reads.is_empty());
        assert_eq!(bare.clone().or_drawn(300, 1).expect("large enough").start_size().0, 300);
        assert!(matches!(bare.or_drawn(1 << 20, 1), Err(ShapeError::Start { .. })));
        // A profile names layers in its own order, and may name what is not there.
        let last = shape.layers.last().expect("it has layers");
        let step = |layer, chunks| hermes_policy::profile::Step { layer, chunks, at_ms: 0, weight: 100, spread_ms: 0 };
        let profile = Profile {
            records: 1,
            newest_seconds: 1,
            layers: vec![DiffId([9; 32]), last.diff_id],
            steps: vec![step(1, 4..7), step(0, 0..2), step(1, last.geometry.chunk_count()..u32::MAX)],
            donors: Vec::new(),
        };
        let shape = Shape::of_index("with a profile".to_owned(), layers(), Some(&profile));
        assert_eq!(shape.reads, [Read { layer: 2, chunks: 4..7 }]);
        assert_eq!(shape.clone().or_drawn(300, 1).expect("it has a start").reads, shape.reads);
    }

    #[test]
    fn files_are_read_and_hostile_ones_refused() {
        let good = serde_json::json!({
            "format": FORMAT, "name": "two", "reads": [[0, 1, 2]],
            "layers": [{"diff_id": "ab".repeat(32), "chunks": [[65536, 3], [100, 1]], "spans": [[2, 0, 500], [2, 499, 900]]}],
        });
        let shape = Shape::parse(good.to_string().as_bytes()).expect("valid");
        assert_eq!((shape.chunk_count(), shape.start_size()), (4, (2, 131_072)));
        for (path, value) in [
            ("/format", serde_json::json!("hermes-shape/9")),
            ("/reads/0", serde_json::json!([0, 3, 2])),
            ("/reads/0", serde_json::json!([1, 0, 1])),
            ("/reads/0", serde_json::json!([0, 4294967295_u32, 2])),
            ("/layers/0/diff_id", serde_json::json!("ab")),
            ("/layers/0/chunks/0", serde_json::json!([0, 3])),
            ("/layers/0/chunks/0", serde_json::json!([65536, 4294967295_u32])),
            ("/layers/0/spans/1", serde_json::json!([2, 499, 0])),
        ] {
            let mut bad = good.clone();
            *bad.pointer_mut(path).expect("is there") = value.clone();
            assert!(Shape::parse(bad.to_string().as_bytes()).is_err(), "{path} = {value}");
        }
    }
}
