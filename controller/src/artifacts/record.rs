//! What is written down beside the index: which images are kept or being built, and what is known of each layer.
//!
//! Both are signed by the controller, for it believes them after a restart: a layer's record goes into statements, and an
//! image's record says to whom the image may be given. Their signatures have domains of their own.

use std::sync::Arc;

use hermes_image::access::Access;
use hermes_image::ids::{DiffId, Digest, LayerId};
use hermes_image::statement::{LayerStatement, open_text};
use serde::{Deserialize, Serialize};

use crate::event::{ImageKey, Name, ResolvedLayer, UnixMillis};
use crate::signing::Keys;

/// What precedes the signed text of an image's record.
const IMAGE_DOMAIN: &[u8] = b"hermes controller image v1\0";
/// What precedes the signed text of a layer's record.
const LAYER_DOMAIN: &[u8] = b"hermes controller layer v1\0";
/// The format of both.
const FORMAT: u32 = 1;

/// What is known of an image before and after it is indexed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRecord {
    /// The image.
    pub image: ImageKey,
    /// Where it is indexed from.
    pub name: Name,
    /// Its layers, lowest first.
    pub layers: Arc<[ResolvedLayer]>,
    /// To whom its registry gives it.
    pub access: Access,
    /// When the build began.
    pub begun: UnixMillis,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ImageText {
    format: u32,
    manifest: Digest,
    reference: String,
    platform: String,
    access: Access,
    begun_ms: u64,
    layers: Vec<LayerText>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LayerText {
    layer: LayerId,
    diff_id: DiffId,
    len_bytes: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LayerRecord {
    format: u32,
    layer: LayerStatement,
}

impl ImageRecord {
    /// Compressed bytes of all layers.
    pub fn len_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.len_bytes).sum()
    }

    pub(super) fn sign(&self, keys: &Keys) -> Vec<u8> {
        let layers = self.layers.iter().map(|layer| LayerText {
            layer: layer.layer,
            diff_id: layer.diff_id,
            len_bytes: layer.len_bytes,
        });
        let text = ImageText {
            format: FORMAT,
            manifest: self.image.manifest,
            reference: self.name.reference.clone(),
            platform: self.name.platform.clone(),
            access: self.access,
            begun_ms: self.begun.0,
            layers: layers.collect(),
        };
        keys.sign_text(IMAGE_DOMAIN, serde_json::to_string(&text).expect("texts and numbers only"))
    }

    /// The record of `manifest`; why there is none otherwise.
    pub(super) fn open(signed: &[u8], manifest: Digest, keys: &Keys) -> Result<Self, String> {
        let text = open_text(signed, IMAGE_DOMAIN, &keys.public_keys()).map_err(|error| error.to_string())?;
        let text: ImageText = serde_json::from_str(&text).map_err(|error| error.to_string())?;
        if text.format != FORMAT || text.manifest != manifest {
            return Err("it is of another format or another image".to_owned());
        }
        let layer = |layer: &LayerText| ResolvedLayer {
            layer: layer.layer,
            diff_id: layer.diff_id,
            len_bytes: layer.len_bytes,
        };
        Ok(Self {
            image: ImageKey { manifest },
            name: Name { reference: text.reference, platform: text.platform },
            layers: text.layers.iter().map(layer).collect(),
            access: text.access,
            begun: UnixMillis(text.begun_ms),
        })
    }
}

pub(super) fn sign_layer(layer: &LayerStatement, keys: &Keys) -> Vec<u8> {
    let record = LayerRecord { format: FORMAT, layer: layer.clone() };
    keys.sign_text(LAYER_DOMAIN, serde_json::to_string(&record).expect("texts and numbers only"))
}

/// The record of `layer`; why there is none otherwise.
pub(super) fn open_layer(signed: &[u8], layer: LayerId, keys: &Keys) -> Result<LayerStatement, String> {
    let text = open_text(signed, LAYER_DOMAIN, &keys.public_keys()).map_err(|error| error.to_string())?;
    let record: LayerRecord = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    if record.format != FORMAT || record.layer.layer != layer {
        return Err("it is of another format or another layer".to_owned());
    }
    Ok(record.layer)
}
