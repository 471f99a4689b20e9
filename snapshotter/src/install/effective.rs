//! What containerd makes of a configuration: read from its own `config dump`, so that defaults, imports and conversions
//! between versions are containerd's own.

use std::fmt;

use toml_edit::{DocumentMut, Item, TableLike};

use super::config::{ConfigError, Dialect, PLUGIN_NAME, Wanted, snapshotters};

/// The version of a containerd, as far as it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// The first number.
    pub major: u32,
    /// The second.
    pub minor: u32,
}

impl Version {
    /// The oldest that is known to work.
    pub const OLDEST: Self = Self { major: 1, minor: 6 };
    /// Proxy plugins have `exports` and there is a transfer service from here on.
    pub const WITH_EXPORTS: Self = Self { major: 1, minor: 7 };

    /// Of what `containerd --version` prints: name, module, version, revision.
    pub fn parse(said: &str) -> Option<Self> {
        let version = said.split_whitespace().nth(2)?;
        let mut numbers = version.trim_start_matches('v').split(|c: char| !c.is_ascii_digit());
        Some(Self { major: numbers.next()?.parse().ok()?, minor: numbers.next()?.parse().ok()? })
    }

    /// The version of configuration that it writes itself.
    pub fn dialect(self) -> Dialect {
        if self.major >= 2 { Dialect::V3 } else { Dialect::V2 }
    }

    /// Whether proxy plugins have `exports`, and a transfer service exists.
    pub fn has_exports(self) -> bool {
        self >= Self::WITH_EXPORTS
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The parts of a configuration that concern Hermes, as containerd uses them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Effective {
    /// The socket of our plugin.
    pub socket: Option<String>,
    /// What our plugin exports as its folder.
    pub root: Option<String>,
    /// The snapshotter that CRI takes.
    pub cri_snapshotter: Option<String>,
    /// Whether CRI tells snapshotters which image and layer it pulls.
    pub cri_annotations: bool,
    /// Whether CRI is switched off, as in the packages that are made for docker.
    pub cri_disabled: bool,
    /// The snapshotters that the transfer service unpacks with; `None` for containerd's own choice.
    pub unpack: Option<Vec<String>>,
}

impl Effective {
    /// From what `containerd config dump` printed.
    ///
    /// # Errors
    /// When that is no configuration of a known version.
    pub fn parse(dump: &str) -> Result<Self, ConfigError> {
        let document: DocumentMut =
            dump.parse().map_err(|error: toml_edit::TomlError| ConfigError::Syntax(error.message().to_owned()))?;
        let dialect = Dialect::of(&document)?.unwrap_or(Dialect::V2);
        let text = |path: &[&str]| find(&document, path).and_then(Item::as_str).map(str::to_owned);
        let plugin = |key| ["proxy_plugins", PLUGIN_NAME, key];
        let cri = |key: &'static str| [dialect.cri_images(), &[key]].concat();
        let disabled = find(&document, &["disabled_plugins"]).and_then(Item::as_array);
        let is_cri = |name: &str| matches!(name, "cri" | "io.containerd.grpc.v1.cri" | "io.containerd.cri.v1.images");
        Ok(Self {
            socket: text(&plugin("address")).filter(|_| text(&plugin("type")).as_deref() == Some("snapshot")),
            root: text(&["proxy_plugins", PLUGIN_NAME, "exports", "root"]),
            cri_snapshotter: text(&cri("snapshotter")),
            cri_annotations: find(&document, &cri("disable_snapshot_annotations")).and_then(Item::as_bool)
                == Some(false),
            cri_disabled: disabled.is_some_and(|names| names.iter().any(|name| name.as_str().is_some_and(is_cri))),
            unpack: snapshotters(find(&document, &["plugins", "io.containerd.transfer.v1.local", "unpack_config"])),
        })
    }

    /// What is not as `wanted`, in plain words, for a containerd of `version`.
    pub fn differences(&self, wanted: &Wanted, version: Version) -> Vec<String> {
        let mut found = Vec::new();
        let mut differs = |is: bool, what: String| {
            if is {
                found.push(what);
            }
        };
        let shown = |value: &Option<String>| value.clone().unwrap_or_else(|| "nothing".to_owned());
        differs(
            self.socket.as_deref() != Some(wanted.socket.as_str()),
            format!("the proxy plugin '{PLUGIN_NAME}' is at {} instead of {}", shown(&self.socket), wanted.socket),
        );
        differs(
            version.has_exports() && self.root.as_deref() != Some(wanted.root.as_str()),
            format!("the proxy plugin exports {} as its folder instead of {}", shown(&self.root), wanted.root),
        );
        // containerd prints nothing of a plugin that is switched off.
        let cri = !self.cri_disabled;
        differs(cri && !self.cri_annotations, "CRI does not tell snapshotters which image it pulls".to_owned());
        differs(
            cri && wanted.cri_default && self.cri_snapshotter.as_deref() != Some(PLUGIN_NAME),
            format!("CRI uses the snapshotter {}", shown(&self.cri_snapshotter)),
        );
        differs(
            cri && !wanted.cri_default && self.cri_snapshotter.as_deref() == Some(PLUGIN_NAME),
            "CRI uses hermes for every image, which was not asked for".to_owned(),
        );
        let unpacks = self.unpack.as_ref().is_some_and(|names| names.iter().any(|name| name == PLUGIN_NAME));
        differs(wanted.transfer && !unpacks, "the transfer service does not unpack with hermes".to_owned());
        found
    }
}

fn find<'a>(document: &'a DocumentMut, path: &[&str]) -> Option<&'a Item> {
    let (key, tables) = path.split_last()?;
    let mut table: &dyn TableLike = document.as_table();
    for name in tables {
        table = table.get(name)?.as_table_like()?;
    }
    table.get(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_containerd_prints_them() {
        let cases = [
            ("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3", Some((1, 6))),
            (
                "containerd github.com/containerd/containerd v1.7.24 88bf19b2105c8b17560993bee28a01ddc2f97182",
                Some((1, 7)),
            ),
            ("containerd github.com/containerd/containerd/v2 2.1.9+unknown ", Some((2, 1))),
            ("containerd containerd.io 1.6.33 d2d58213f83a351ca8f528a95fbd145f5654e957", Some((1, 6))),
            ("runc version", None),
            ("", None),
        ];
        for (said, expected) in cases {
            let expected = expected.map(|(major, minor)| Version { major, minor });
            assert_eq!(Version::parse(said), expected, "{said}");
        }
    }

    #[test]
    fn what_differs_is_said_in_words() {
        let dump = "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd]\n\
            snapshotter = 'overlayfs'\ndisable_snapshot_annotations = true\n";
        let effective = Effective::parse(dump).expect("a dump");
        assert!(!effective.cri_disabled);
        let wanted = crate::install::config_test::wanted();
        let differences = effective.differences(&wanted, Version { major: 1, minor: 7 });
        let expected = ["at nothing", "exports nothing", "does not tell", "uses the snapshotter overlayfs", "unpack"];
        assert_eq!(differences.len(), expected.len(), "{differences:?}");
        for (said, part) in differences.iter().zip(expected) {
            assert!(said.contains(part), "{said}");
        }
        let disabled = Effective::parse(&format!("disabled_plugins = ['cri']\n{dump}")).expect("a dump");
        assert!(disabled.cri_disabled);
        assert_eq!(disabled.differences(&wanted, Version { major: 1, minor: 7 }).len(), 3);
    }
}
