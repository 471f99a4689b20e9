//! What an operator may set.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::StoreError;

/// Smallest budget, in bytes: a few groups, below which every put would evict what the last one wrote.
pub const BUDGET_MIN_BYTES: u64 = 4 << 20;
/// Longest time between two sync rounds, in milliseconds. A crash fetches at most this much again.
pub const SYNC_INTERVAL_MAX_MS: u64 = 3_600_000;

/// When the store drops its own copy of bytes from the page cache.
///
/// A byte that a container reads is cached by the kernel where the container reads it (FUSE or EROFS pages). The
/// pages of the layer file behind it would be a second copy that nobody reads again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DropBehind {
    /// Never. Right where the kernel reads layer files directly, so that theirs *is* the one copy.
    Off,
    /// What was written, once it is on disk.
    #[default]
    Written,
    /// What was written, and what a read through the store has been answered with.
    WrittenAndRead,
}

/// Settings of a [`Store`](crate::Store).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreConfig {
    /// The folder that holds everything. Made when missing.
    pub dir: PathBuf,
    /// Most bytes to allocate for layers and artifacts, at least [`BUDGET_MIN_BYTES`]; without it only the
    /// filesystem is the limit. The catalogue (about 30 bytes a chunk) comes on top.
    #[serde(default)]
    pub budget_bytes: Option<u64>,
    /// Free bytes of the filesystem that layers leave alone, so that the catalogue and other users can still write.
    #[serde(default = "free_floor_bytes")]
    pub free_floor_bytes: u64,
    /// Time between two sync rounds, in milliseconds, 1 to [`SYNC_INTERVAL_MAX_MS`]. What was written within it is
    /// fetched again after a crash.
    #[serde(default = "sync_interval_ms")]
    pub sync_interval_ms: u64,
    /// Bytes written since the last sync round that start one early, at least 1.
    #[serde(default = "sync_bytes")]
    pub sync_bytes: u64,
    /// When the store drops its own copy from the page cache.
    #[serde(default)]
    pub drop_behind: DropBehind,
}

/// Room for RocksDB's log (16 MiB at most), a compaction of it, and as much again.
const fn free_floor_bytes() -> u64 {
    64 << 20
}

/// A second of a 1 Gbit/s link is 125 MB: little to fetch again, and one sync a second costs nothing.
const fn sync_interval_ms() -> u64 {
    1000
}

/// Half a second of a 1 Gbit/s link; keeps each fdatasync short on slow disks.
const fn sync_bytes() -> u64 {
    64 << 20
}

impl StoreConfig {
    /// Default settings for a store in `dir`.
    pub fn new(dir: impl AsRef<Path>) -> Self {
        Self {
            dir: dir.as_ref().to_path_buf(),
            budget_bytes: None,
            free_floor_bytes: free_floor_bytes(),
            sync_interval_ms: sync_interval_ms(),
            sync_bytes: sync_bytes(),
            drop_behind: DropBehind::default(),
        }
    }

    /// Checks what the types cannot.
    ///
    /// # Errors
    /// When a value is outside its range; the error names the field and the rule.
    pub fn validate(&self) -> Result<(), StoreError> {
        let bad = |field, value: String, rule| Err(StoreError::Config { field, value, rule });
        if self.dir.as_os_str().is_empty() {
            return bad("dir", String::new(), "must name a folder");
        }
        if let Some(budget) = self.budget_bytes.filter(|budget| *budget < BUDGET_MIN_BYTES) {
            return bad("budget_bytes", budget.to_string(), "must be at least 4194304 (4 MiB)");
        }
        if self.sync_interval_ms == 0 || self.sync_interval_ms > SYNC_INTERVAL_MAX_MS {
            return bad("sync_interval_ms", self.sync_interval_ms.to_string(), "must be between 1 and 3600000");
        }
        if self.sync_bytes == 0 {
            return bad("sync_bytes", self.sync_bytes.to_string(), "must be at least 1");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_out_of_range_are_named() {
        let good = StoreConfig::new("store");
        good.validate().expect("the defaults are valid");
        type Change = fn(&mut StoreConfig);
        let cases: [(&str, Change); 5] = [
            ("dir", |config| config.dir = PathBuf::new()),
            ("budget_bytes", |config| config.budget_bytes = Some(1)),
            ("sync_interval_ms", |config| config.sync_interval_ms = 0),
            ("sync_interval_ms", |config| config.sync_interval_ms = SYNC_INTERVAL_MAX_MS + 1),
            ("sync_bytes", |config| config.sync_bytes = 0),
        ];
        for (name, change) in cases {
            let mut config = good.clone();
            change(&mut config);
            match config.validate() {
                Err(StoreError::Config { field, .. }) => assert_eq!(field, name),
                other => panic!("{name}: {other:?}"),
            }
        }
    }

    #[test]
    fn only_the_folder_must_be_given_and_unknown_fields_are_refused() {
        let config: StoreConfig = serde_json::from_str(r#"{"dir":"store"}"#).expect("parses");
        assert_eq!(config, StoreConfig::new("store"));
        assert!(serde_json::from_str::<StoreConfig>(r#"{"dir":"store","budget":1}"#).is_err());
    }
}
