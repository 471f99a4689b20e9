//! OCI image layouts (image-spec, image-layout.md): writing test images, and reading what is in one.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use hermes_image::ids::{DiffId, Digest, LayerId};
use serde_json::{Value, json};

use crate::compress::{Compression, compress};

/// The annotation that holds a manifest's tag.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The media type of image manifests.
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// A folder in the layout format.
#[derive(Debug, Clone)]
pub struct Layout {
    dir: PathBuf,
}

/// A layer that is to be written: its tar and how to store it.
#[derive(Debug, Clone)]
pub struct NewLayer {
    /// The uncompressed tar stream.
    pub tar: Vec<u8>,
    /// How the blob is compressed.
    pub compression: Compression,
}

/// One image of a layout.
#[derive(Debug, Clone)]
pub struct LayoutImage {
    /// Digest of the manifest.
    pub manifest: Digest,
    /// The configuration's JSON.
    pub config: Value,
    /// The layers, lowest first.
    pub layers: Vec<LayoutLayer>,
}

/// One layer of an image.
#[derive(Debug, Clone)]
pub struct LayoutLayer {
    /// Digest of the blob.
    pub layer_id: LayerId,
    /// Digest of the uncompressed tar.
    pub diff_id: DiffId,
    /// The descriptor's media type.
    pub media_type: String,
    /// Length of the blob in bytes.
    pub blob_len_bytes: u64,
    /// The blob's file.
    pub path: PathBuf,
}

impl Layout {
    /// Makes an empty layout in `dir`, which is created.
    ///
    /// # Errors
    ///
    /// When a file cannot be written.
    pub fn create(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir.join("blobs/sha256")).with_context(|| format!("make {}", dir.display()))?;
        write_json(&dir.join("oci-layout"), &json!({"imageLayoutVersion": "1.0.0"}))?;
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": []
        });
        write_json(&dir.join("index.json"), &index)?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// The layout in `dir`.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn open(dir: &Path) -> Result<Self> {
        read_json(&dir.join("index.json"))?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Adds an image with this tag; a second image with the same tag replaces the first in the index.
    ///
    /// `config` is the `config` object of the image's configuration (Env, Cmd and so on), for which `{}` will do.
    ///
    /// # Errors
    ///
    /// When a file cannot be written or a compressor fails.
    pub fn add(&self, tag: &str, layers: &[NewLayer], config: &Value) -> Result<LayoutImage> {
        let stored = layers.iter().map(|layer| self.put_layer(layer)).collect::<Result<Vec<_>>>()?;
        self.add_stored(tag, &stored, config)
    }

    /// Stores a layer.
    ///
    /// # Errors
    ///
    /// When the file cannot be written or a compressor fails.
    pub fn put_layer(&self, layer: &NewLayer) -> Result<LayoutLayer> {
        let blob = compress(&layer.tar, &layer.compression)?;
        let digest = self.put(&blob)?;
        Ok(LayoutLayer {
            layer_id: LayerId(digest.0),
            diff_id: DiffId(sha256(&layer.tar)),
            media_type: layer.compression.media_type().to_owned(),
            blob_len_bytes: blob.len() as u64,
            path: self.blob_path(digest),
        })
    }

    /// Takes over a layer of another layout, by a hard link where that works.
    ///
    /// # Errors
    ///
    /// When the file cannot be made.
    pub fn share(&self, layer: &LayoutLayer) -> Result<LayoutLayer> {
        let path = self.blob_path(Digest(layer.layer_id.0));
        if !path.exists() && fs::hard_link(&layer.path, &path).is_err() {
            fs::copy(&layer.path, &path).with_context(|| format!("copy {}", layer.path.display()))?;
        }
        Ok(LayoutLayer { path, ..layer.clone() })
    }

    /// Adds an image of layers that are stored already, as [`Layout::add`] does.
    ///
    /// # Errors
    ///
    /// When a file cannot be written.
    pub fn add_stored(&self, tag: &str, layers: &[LayoutLayer], config: &Value) -> Result<LayoutImage> {
        let descriptors = layers.iter().map(|layer| {
            let digest = Digest(layer.layer_id.0).to_string();
            json!({"mediaType": layer.media_type, "digest": digest, "size": layer.blob_len_bytes})
        });
        let descriptors = descriptors.collect::<Vec<_>>();
        let diff_ids = layers.iter().map(|layer| Digest(layer.diff_id.0).to_string()).collect::<Vec<_>>();
        let config = json!({
            "created": "1970-01-01T00:00:00Z", "architecture": "amd64", "os": "linux", "config": config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": vec![json!({"created": "1970-01-01T00:00:00Z"}); layers.len()],
        });
        let config = serde_json::to_vec(&config)?;
        let config_digest = self.put(&config)?;
        let manifest = serde_json::to_vec(&json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "layers": descriptors,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": config_digest.to_string(), "size": config.len()
            },
        }))?;
        let digest = self.put(&manifest)?;
        let mut index = read_json(&self.dir.join("index.json"))?;
        let entries = index["manifests"].as_array_mut().context("index.json has no list 'manifests'")?;
        entries.retain(|entry| entry["annotations"][REF_NAME] != tag);
        entries.push(json!({
            "mediaType": MANIFEST, "digest": digest.to_string(), "size": manifest.len(),
            "platform": {"architecture": "amd64", "os": "linux"}, "annotations": {REF_NAME: tag}
        }));
        write_json(&self.dir.join("index.json"), &index)?;
        self.image(tag)
    }

    /// Stores a blob and returns its digest.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn put(&self, blob: &[u8]) -> Result<Digest> {
        let digest = Digest(sha256(blob));
        let path = self.blob_path(digest);
        fs::write(&path, blob).with_context(|| format!("write {}", path.display()))?;
        Ok(digest)
    }

    /// Where a blob is stored.
    pub fn blob_path(&self, digest: Digest) -> PathBuf {
        self.dir.join("blobs/sha256").join(digest.hex())
    }

    /// The image with this tag.
    ///
    /// # Errors
    ///
    /// When there is none, or its files are not what the image-spec says.
    pub fn image(&self, tag: &str) -> Result<LayoutImage> {
        let index = read_json(&self.dir.join("index.json"))?;
        let entry = index["manifests"]
            .as_array()
            .and_then(|entries| entries.iter().find(|entry| entry["annotations"][REF_NAME] == tag))
            .with_context(|| format!("{} holds no image '{tag}'", self.dir.display()))?;
        let digest = parse_digest(&entry["digest"])?;
        let manifest = read_json(&self.blob_path(digest))?;
        let config = read_json(&self.blob_path(parse_digest(&manifest["config"]["digest"])?))?;
        let layers = manifest["layers"].as_array().context("the manifest has no list 'layers'")?;
        let diff_ids = config["rootfs"]["diff_ids"].as_array().context("the configuration has no 'diff_ids'")?;
        if layers.len() != diff_ids.len() {
            bail!("the manifest has {} layers, the configuration {}", layers.len(), diff_ids.len());
        }
        let layers = layers.iter().zip(diff_ids).map(|(layer, diff_id)| {
            let digest = parse_digest(&layer["digest"])?;
            Ok(LayoutLayer {
                layer_id: LayerId(digest.0),
                diff_id: DiffId(parse_digest(diff_id)?.0),
                media_type: layer["mediaType"].as_str().context("a layer has no media type")?.to_owned(),
                blob_len_bytes: layer["size"].as_u64().context("a layer has no size")?,
                path: self.blob_path(digest),
            })
        });
        Ok(LayoutImage { manifest: digest, layers: layers.collect::<Result<_>>()?, config })
    }
}

/// The sha256 of `bytes`.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    use sha2::Digest as _;
    sha2::Sha256::digest(bytes).into()
}

fn parse_digest(value: &Value) -> Result<Digest> {
    let text = value.as_str().context("a descriptor has no digest")?;
    text.parse().context("read a descriptor")
}

fn read_json(path: &Path) -> Result<Value> {
    let text = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    fs::write(path, serde_json::to_vec_pretty(value)?).with_context(|| format!("write {}", path.display()))
}
