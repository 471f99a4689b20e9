//! Indexes that were built and signed.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::command::run;

/// A folder of indexes that `hermes index build` wrote, and the key that signed them.
#[derive(Debug, Clone)]
pub struct Index {
    /// The folder.
    pub folder: PathBuf,
    /// The public key, as `--trust` takes it.
    pub key: String,
}

impl Index {
    /// Builds the index of `image` into `folder`, which is created, with a key that is made there unless it is there.
    ///
    /// # Errors
    ///
    /// When the command fails; the message holds what it said.
    pub fn build(program: &Path, image: &str, folder: &Path) -> Result<Self> {
        let mut command = Command::new(program);
        command.args(["index", "build", image, "--json", "--output"]).arg(folder);
        command.arg("--key").arg(folder.join("index-key")).arg("--state").arg(folder);
        let answer: Value = serde_json::from_slice(&run(&mut command)?).context("parse the answer of index build")?;
        let key = answer["key"].as_str().context("index build names no key")?.to_owned();
        Ok(Self { folder: folder.to_owned(), key })
    }
}
