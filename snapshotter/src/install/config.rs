//! Editing containerd's configuration as a document: what Hermes needs is set, everything else stays as it was written.
//!
//! Pure: text in, text out. [`edit`] sets single values and remembers what stood there ([`Change`]); [`revert`] takes
//! exactly those back, as far as nobody has changed them since. Whether containerd understands the result is asked of
//! containerd itself ([`super::effective`]); nothing here guesses its defaults, with one exception: a list of
//! `unpack_config` replaces containerd's own, so the overlayfs entry that containerd would have is written beside ours.
//!
//! The main file is edited, never a file that it imports. Measured: containerd 1.6 and 1.7 replace a plugin's whole
//! table by that of an imported file (a drop-in with `snapshotter` alone resets `sandbox_image`), and 2.1 ignores the CRI
//! table of an imported file of version 2.

use serde::{Deserialize, Serialize};
use thiserror::Error;
use toml_edit::{Array, ArrayOfTables, DocumentMut, InlineTable, Item, Table, TableLike, Value};

/// The name of our proxy plugin, which is the snapshotter's name too.
pub const PLUGIN_NAME: &str = "hermes";
/// containerd's own default, for the entry that our own list of `unpack_config` would hide.
const CONTAINERD_SNAPSHOTTER: &str = "overlayfs";
/// The transfer service, in all configuration versions that have it.
const TRANSFER: &str = "io.containerd.transfer.v1.local";
/// The longest configuration that is read, in bytes: real ones have some kilobytes.
pub const CONFIG_MAX_BYTES: u64 = 1 << 20;

/// A configuration that cannot be edited.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// It is no TOML.
    #[error("containerd's configuration is no TOML: {0}; repair it first (containerd refuses it, too)")]
    Syntax(String),
    /// The version is none that is known.
    #[error("containerd's configuration has version {0}; this hermes knows 1, 2 and 3")]
    Version(String),
    /// A value where a table has to be.
    #[error("'{0}' in containerd's configuration is not a table; repair it first")]
    NotATable(String),
}

/// The versions of containerd's configuration, which name plugins differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Dialect {
    /// Plugins by short names. The version is not written in the file.
    V1,
    /// Since containerd 1.3; CRI is one plugin.
    V2,
    /// Since containerd 2.0; CRI is several plugins.
    V3,
}

impl Dialect {
    /// The number that a file of this version carries.
    pub fn number(self) -> i64 {
        match self {
            Self::V1 => 1,
            Self::V2 => 2,
            Self::V3 => 3,
        }
    }

    /// Of a document; `None` when it says nothing at all, and so may have any.
    ///
    /// # Errors
    /// When the number is unknown.
    pub fn of(document: &DocumentMut) -> Result<Option<Self>, ConfigError> {
        match document.get("version") {
            None if document.as_table().is_empty() => Ok(None),
            None => Ok(Some(Self::V1)),
            Some(item) => match item.as_integer() {
                // 0 is how containerd reads a missing number.
                Some(0 | 1) => Ok(Some(Self::V1)),
                Some(2) => Ok(Some(Self::V2)),
                Some(3) => Ok(Some(Self::V3)),
                _ => Err(ConfigError::Version(item.to_string().trim().to_owned())),
            },
        }
    }

    /// Where CRI has `snapshotter` and `disable_snapshot_annotations`.
    pub fn cri_images(self) -> &'static [&'static str] {
        match self {
            Self::V1 => &["plugins", "cri", "containerd"],
            Self::V2 => &["plugins", "io.containerd.grpc.v1.cri", "containerd"],
            Self::V3 => &["plugins", "io.containerd.cri.v1.images"],
        }
    }
}

/// What containerd shall be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The socket that the daemon serves snapshots on.
    pub socket: String,
    /// The folder whose file system holds the images, which the kubelet watches.
    pub root: String,
    /// What the snapshotter can do beyond the basics, in containerd's words.
    pub capabilities: Vec<String>,
    /// Whether CRI takes Hermes for every image.
    pub cri_default: bool,
    /// The version that this containerd writes itself, and that a new file gets.
    pub new_file: Dialect,
    /// Whether this containerd has the transfer service (1.7 and later).
    pub transfer: bool,
    /// This machine, as `os/architecture`, for the transfer service.
    pub platform: String,
}

/// One thing that was set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Change {
    /// A value.
    Value {
        /// The keys that lead to it.
        path: Vec<String>,
        /// What stood there, as TOML.
        before: Option<String>,
        /// What stands there now, as TOML.
        after: String,
        /// Whether the table got its header with it.
        header: bool,
    },
    /// An entry of `unpack_config`, which names this snapshotter.
    Unpack {
        /// The snapshotter.
        snapshotter: String,
    },
}

/// An edited configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edited {
    /// The new text; the old one, byte for byte, when nothing had to be changed.
    pub text: String,
    /// What was changed, in order.
    pub changes: Vec<Change>,
}

fn parse(text: &str) -> Result<DocumentMut, ConfigError> {
    text.parse().map_err(|error: toml_edit::TomlError| {
        let message = error.message().trim().to_owned();
        let line = error.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
        ConfigError::Syntax(line.map_or_else(|| message.clone(), |line| format!("line {line}: {message}")))
    })
}

/// Sets what is `wanted` in `text`.
///
/// # Errors
/// When `text` is not a configuration that can be edited.
pub fn edit(text: &str, wanted: &Wanted) -> Result<Edited, ConfigError> {
    let mut document = parse(text)?;
    let mut changes = Vec::new();
    let dialect = match Dialect::of(&document)? {
        Some(dialect) => dialect,
        None => {
            set(&mut document, &["version"], wanted.new_file.number().into(), &mut changes)?;
            wanted.new_file
        }
    };
    let plugin = ["proxy_plugins", PLUGIN_NAME];
    let under = |more: &'static str| [plugin[0], plugin[1], more];
    set(&mut document, &under("type"), "snapshot".into(), &mut changes)?;
    set(&mut document, &under("address"), wanted.socket.as_str().into(), &mut changes)?;
    if !wanted.capabilities.is_empty() {
        let names = wanted.capabilities.iter().map(String::as_str).collect::<Array>();
        set(&mut document, &under("capabilities"), names.into(), &mut changes)?;
    }
    let exports = ["proxy_plugins", PLUGIN_NAME, "exports"];
    let under = |more: &'static str| [exports[0], exports[1], exports[2], more];
    set(&mut document, &under("root"), wanted.root.as_str().into(), &mut changes)?;
    // A text, because exports are texts. containerd's transfer service (2.1) sends image and layer names only if asked.
    set(&mut document, &under("enable_remote_snapshot_annotations"), "true".into(), &mut changes)?;
    for table in cri_tables(dialect, wanted) {
        let cri = |key: &'static str| [table, &[key]].concat();
        set(&mut document, &cri("disable_snapshot_annotations"), false.into(), &mut changes)?;
        if wanted.cri_default {
            set(&mut document, &cri("snapshotter"), PLUGIN_NAME.into(), &mut changes)?;
        }
    }
    if wanted.transfer && dialect != Dialect::V1 {
        unpack(&mut document, &wanted.platform, &mut changes)?;
    }
    let text = if changes.is_empty() { text.to_owned() } else { document.to_string() };
    Ok(Edited { text, changes })
}

/// Where CRI's keys go. containerd 2.x converts a file of version 2 at each start, and then loses these keys unless the
/// file lists runtimes, too (measured with 2.1.9); its own table, which it takes from such a file as well, is not lost.
fn cri_tables(dialect: Dialect, wanted: &Wanted) -> Vec<&'static [&'static str]> {
    let converted = dialect == Dialect::V2 && wanted.new_file == Dialect::V3;
    let tables = [Some(dialect), converted.then_some(Dialect::V3)];
    tables.into_iter().flatten().map(Dialect::cri_images).collect()
}

/// Takes back those of `changes` that still stand in `text`. Also says which do not: somebody has changed them since,
/// and they are left as they are.
///
/// # Errors
/// When `text` is not a configuration any more.
pub fn revert(text: &str, changes: &[Change]) -> Result<(String, Vec<String>), ConfigError> {
    let mut document = parse(text)?;
    let mut kept = Vec::new();
    for change in changes.iter().rev() {
        match change {
            // What somebody else has added since is written in this version.
            Change::Value { path, .. } if path == &["version"] && document.len() > 1 => {}
            Change::Value { path, before, after, header } => {
                if !take_back(&mut document, path, before.as_deref(), after) {
                    kept.push(path.join("."));
                } else if *header {
                    hide_header(&mut document, path);
                }
            }
            Change::Unpack { snapshotter } => remove_unpack(&mut document, snapshotter),
        }
    }
    Ok((document.to_string(), kept))
}

/// Sets one value, unless it is there already.
fn set(document: &mut DocumentMut, path: &[&str], value: Value, changes: &mut Vec<Change>) -> Result<(), ConfigError> {
    let (key, tables) = path.split_last().expect("every path has a key");
    let header = !tables.is_empty() && lacks_header(document, tables);
    let table = descend(document, tables)?;
    let before = table.get(key).and_then(Item::as_value).map(plain);
    let after = plain(&value);
    if before.as_deref() == Some(after.as_str()) {
        return Ok(());
    }
    match table.get_mut(key).and_then(Item::as_value_mut) {
        // A comment behind the value stays behind it.
        Some(old) => {
            let decor = old.decor().clone();
            *old = value;
            *old.decor_mut() = decor;
        }
        None => insert(table, key, value),
    }
    changes.push(Change::Value { path: path.iter().map(|&part| part.to_owned()).collect(), before, after, header });
    Ok(())
}

/// Inserts a key, indented as its neighbours are.
fn insert(table: &mut dyn TableLike, key: &str, value: Value) {
    let neighbour = table.iter().find(|(_, item)| item.is_value()).map(|(name, _)| name.to_owned());
    let indent = neighbour.and_then(|name| {
        let prefix = table.key(&name)?.leaf_decor().prefix()?.as_str()?.to_owned();
        Some(prefix.rsplit('\n').next().unwrap_or_default().to_owned())
    });
    table.insert(key, Item::Value(value));
    if let (Some(indent), Some(mut inserted)) = (indent, table.key_mut(key))
        && indent.chars().all(char::is_whitespace)
    {
        inserted.leaf_decor_mut().set_prefix(indent);
    }
}

/// The table at `path`, made where it is missing. Tables that only lead to others get no header of their own.
fn descend<'a>(document: &'a mut DocumentMut, path: &[&str]) -> Result<&'a mut dyn TableLike, ConfigError> {
    let mut table: &mut dyn TableLike = document.as_table_mut();
    for (depth, name) in path.iter().enumerate() {
        let item = table.entry(name).or_insert_with(|| {
            let mut new = Table::new();
            new.set_implicit(true);
            Item::Table(new)
        });
        table = item.as_table_like_mut().ok_or_else(|| ConfigError::NotATable(path[..=depth].join(".")))?;
    }
    Ok(table)
}

/// Whether the table at `path` is not there, or only because others are below it.
fn lacks_header(document: &DocumentMut, path: &[&str]) -> bool {
    let mut item = document.as_item();
    for name in path {
        match item.as_table_like().and_then(|table| table.get(name)) {
            Some(next) => item = next,
            None => return true,
        }
    }
    item.as_table().is_some_and(Table::is_implicit)
}

/// Takes its header from the table that holds the key at `path`, unless it has values.
fn hide_header(document: &mut DocumentMut, path: &[String]) {
    let mut item = document.as_item_mut();
    for name in &path[..path.len() - 1] {
        match item.as_table_like_mut().and_then(|table| table.get_mut(name)) {
            Some(next) => item = next,
            None => return,
        }
    }
    if let Some(table) = item.as_table_mut().filter(|table| !table.iter().any(|(_, item)| item.is_value())) {
        table.set_implicit(true);
    }
}

/// A value as TOML without the blanks and comments around it.
fn plain(value: &Value) -> String {
    let mut value = value.clone();
    value.decor_mut().clear();
    value.to_string()
}

/// Puts `before` back where `after` still stands; false when something else does.
fn take_back(document: &mut DocumentMut, path: &[String], before: Option<&str>, after: &str) -> bool {
    let (key, tables) = path.split_last().expect("every path has a key");
    let mut table: &mut dyn TableLike = document.as_table_mut();
    for name in tables {
        match table.get_mut(name).and_then(Item::as_table_like_mut) {
            Some(next) => table = next,
            // Somebody removed the whole table, and with it what was set.
            None => return true,
        }
    }
    let Some(now) = table.get_mut(key).and_then(Item::as_value_mut) else { return true };
    // Quoting may differ, the value may not.
    let same = after.parse::<Value>().is_ok_and(|after| same_value(&after, now));
    if !same {
        return false;
    }
    match before.and_then(|before| before.parse::<Value>().ok()) {
        Some(before) => {
            let decor = now.decor().clone();
            *now = before;
            *now.decor_mut() = decor;
        }
        None => {
            table.remove(key);
            prune(document.as_table_mut(), tables);
        }
    }
    true
}

fn same_value(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::String(one), Value::String(other)) => one.value() == other.value(),
        (Value::Integer(one), Value::Integer(other)) => one.value() == other.value(),
        (Value::Boolean(one), Value::Boolean(other)) => one.value() == other.value(),
        (Value::Array(one), Value::Array(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| same_value(one, other))
        }
        _ => false,
    }
}

/// Removes the table at `path`, and those that lead to it, as far as they are empty and nobody commented them.
fn prune(table: &mut dyn TableLike, path: &[String]) {
    let Some((name, rest)) = path.split_first() else { return };
    let Some(next) = table.get_mut(name) else { return };
    if let Some(inner) = next.as_table_like_mut() {
        prune(inner, rest);
    }
    let commented =
        next.as_table().and_then(|table| table.decor().prefix()?.as_str()).is_some_and(|text| text.contains('#'));
    if next.as_table_like().is_some_and(TableLike::is_empty) && !commented {
        table.remove(name);
    }
}

/// Adds the snapshotter to what the transfer service unpacks with.
fn unpack(document: &mut DocumentMut, platform: &str, changes: &mut Vec<Change>) -> Result<(), ConfigError> {
    let table = descend(document, &["plugins", TRANSFER])?;
    let there = snapshotters(table.get("unpack_config"));
    let missing: &[&str] = match &there {
        None => &[CONTAINERD_SNAPSHOTTER, PLUGIN_NAME],
        Some(there) if there.iter().any(|name| name == PLUGIN_NAME) => &[],
        Some(_) => &[PLUGIN_NAME],
    };
    if missing.is_empty() {
        return Ok(());
    }
    let list = table.entry("unpack_config").or_insert_with(|| Item::ArrayOfTables(ArrayOfTables::new()));
    for name in missing {
        match list {
            Item::ArrayOfTables(tables) => {
                let mut entry = Table::new();
                entry.insert("platform", toml_edit::value(platform));
                entry.insert("snapshotter", toml_edit::value(*name));
                tables.push(entry);
            }
            Item::Value(Value::Array(values)) => {
                let mut entry = InlineTable::new();
                entry.insert("platform", platform.into());
                entry.insert("snapshotter", (*name).into());
                values.push(entry);
            }
            _ => return Err(ConfigError::NotATable(format!("plugins.{TRANSFER}.unpack_config"))),
        }
        changes.push(Change::Unpack { snapshotter: (*name).to_owned() });
    }
    Ok(())
}

/// The snapshotters of a list of `unpack_config`; `None` when there is no list, or an empty one.
pub(super) fn snapshotters(list: Option<&Item>) -> Option<Vec<String>> {
    let name = |entry: &dyn TableLike| entry.get("snapshotter").and_then(Item::as_str).unwrap_or_default().to_owned();
    let names = match list? {
        Item::ArrayOfTables(tables) => tables.iter().map(|table| name(table)).collect::<Vec<_>>(),
        Item::Value(Value::Array(values)) => {
            values.iter().filter_map(Value::as_inline_table).map(|table| name(table)).collect()
        }
        _ => return None,
    };
    (!names.is_empty()).then_some(names)
}

fn remove_unpack(document: &mut DocumentMut, snapshotter: &str) {
    let path = ["plugins".to_owned(), TRANSFER.to_owned()];
    let mut table: &mut dyn TableLike = document.as_table_mut();
    for name in &path {
        let Some(next) = table.get_mut(name).and_then(Item::as_table_like_mut) else { return };
        table = next;
    }
    let is_ours = |entry: &dyn TableLike| entry.get("snapshotter").and_then(Item::as_str) == Some(snapshotter);
    let empty = match table.get_mut("unpack_config") {
        Some(Item::ArrayOfTables(tables)) => {
            // The last one is ours: entries are appended, and an administrator's own stands before it.
            if let Some(at) = (0..tables.len()).rev().find(|&at| tables.get(at).is_some_and(|entry| is_ours(entry))) {
                tables.remove(at);
            }
            tables.is_empty()
        }
        Some(Item::Value(Value::Array(values))) => {
            let ours =
                |at: &usize| values.get(*at).and_then(Value::as_inline_table).is_some_and(|entry| is_ours(entry));
            if let Some(at) = (0..values.len()).rev().find(ours) {
                values.remove(at);
            }
            false
        }
        _ => false,
    };
    if empty {
        table.remove("unpack_config");
    }
    prune(document.as_table_mut(), &path);
}
