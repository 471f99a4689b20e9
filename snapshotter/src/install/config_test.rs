//! Tables and properties of editing containerd's configuration.

use proptest::prelude::*;

use super::config::{Change, ConfigError, Dialect, Wanted, edit, revert};

/// What an ordinary install wants.
pub(super) fn wanted() -> Wanted {
    Wanted {
        socket: "/run/hermes/snapshotter.sock".to_owned(),
        root: "/var/lib/hermes".to_owned(),
        capabilities: Vec::new(),
        cri_default: true,
        new_file: Dialect::V3,
        transfer: true,
        platform: "linux/amd64".to_owned(),
    }
}

fn edited(text: &str) -> String {
    edit(text, &wanted()).expect("edits").text
}

fn assert_has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "lacks {part}:\n{text}");
    }
}

#[test]
fn each_version_gets_its_own_tables() {
    let v1 = edited("root = '/x'\n");
    assert_has(&v1, &["[plugins.cri.containerd]", "snapshotter = \"hermes\"", "[proxy_plugins.hermes]"]);
    assert!(!v1.contains("unpack_config"), "{v1}");
    let v2 = edited("version = 2\n");
    assert_has(&v2, &["[plugins.\"io.containerd.grpc.v1.cri\".containerd]", "disable_snapshot_annotations = false"]);
    let v3 = edited("version = 3\n");
    assert_has(&v3, &["[plugins.\"io.containerd.cri.v1.images\"]", "address = \"/run/hermes/snapshotter.sock\""]);
    // containerd's own entry must not be hidden by ours.
    assert_eq!(v3.matches("unpack_config]]").count(), 2, "{v3}");
    assert_has(&v3, &["snapshotter = \"overlayfs\"", "enable_remote_snapshot_annotations = \"true\""]);
    // Nothing there: the version that this containerd writes itself.
    assert_has(&edited(""), &["version = 3\n"]);
    assert_has(&edited("# only a comment\n"), &["version = 3\n", "# only a comment\n"]);
}

#[test]
fn comments_order_indentation_and_unknown_keys_stay() {
    let before = "\
# the administrator's
version = 2 # two

[plugins]

  [plugins.\"io.containerd.grpc.v1.cri\"]
    sandbox_image = \"example.test/pause:1\"

    [plugins.\"io.containerd.grpc.v1.cri\".containerd]
      default_runtime_name = \"runc\"
      snapshotter = \"overlayfs\"  # changed on purpose
      unknown_key = [ 1,2 ]

[made_up]
  x = 1
";
    let after = edited(before);
    assert_has(
        &after,
        &[
            "# the administrator's\nversion = 2 # two\n",
            "      snapshotter = \"hermes\"  # changed on purpose\n      unknown_key = [ 1,2 ]\n",
            "      disable_snapshot_annotations = false\n",
            "[made_up]\n  x = 1\n",
        ],
    );
    let changes = edit(before, &wanted()).expect("edits").changes;
    assert_eq!(revert(&after, &changes).expect("reverts"), (before.to_owned(), Vec::new()));
}

#[test]
fn a_second_edit_changes_nothing_byte_for_byte() {
    for text in ["", "version = 2\n", "version=3", "[plugins.cri]\n", "version = 2\r\n[plugins]\r\n"] {
        let once = edit(text, &wanted()).expect("edits");
        let twice = edit(&once.text, &wanted()).expect("edits");
        assert_eq!((twice.text, twice.changes), (once.text, Vec::new()), "{text:?}");
    }
}

#[test]
fn lists_to_unpack_with_are_added_to_in_either_form() {
    let tables = "version = 3\n[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nplatform = 'linux/amd64'\n\
        snapshotter = 'native'\n";
    let inline = "version = 3\n[plugins.'io.containerd.transfer.v1.local']\n\
        unpack_config = [{ platform = 'linux/amd64', snapshotter = 'native' }]\n";
    for before in [tables, inline] {
        let change = edit(before, &wanted()).expect("edits");
        assert_has(&change.text, &["'native'", "snapshotter = \"hermes\""]);
        assert!(!change.text.contains("overlayfs"), "{}", change.text);
        assert_eq!(edit(&change.text, &wanted()).expect("edits").changes, []);
        assert_eq!(revert(&change.text, &change.changes).expect("reverts").0, before);
    }
}

#[test]
fn inline_tables_and_dotted_keys_are_edited_where_they_are() {
    let before = "version = 2\nplugins.\"io.containerd.grpc.v1.cri\".containerd.snapshotter = \"overlayfs\"\n\
        proxy_plugins = { stargz = { type = \"snapshot\", address = \"/a\" } }\n";
    let change = edit(before, &wanted()).expect("edits");
    assert_has(&change.text, &["containerd.snapshotter = \"hermes\"", "stargz", "hermes"]);
    assert_eq!(edit(&change.text, &wanted()).expect("edits").changes, []);
    assert_eq!(revert(&change.text, &change.changes).expect("reverts").0, before);
}

#[test]
fn what_others_change_afterwards_stays() {
    let change = edit("version = 2\n", &wanted()).expect("edits");
    let theirs =
        change.text.replacen("snapshotter = \"hermes\"", "snapshotter = \"native\"", 1) + "\n[made_up]\nx = 1\n";
    let (text, kept) = revert(&theirs, &change.changes).expect("reverts");
    assert_has(&text, &["snapshotter = \"native\"", "[made_up]\nx = 1\n"]);
    assert!(!text.contains("hermes"), "{text}");
    assert_eq!(kept, ["plugins.io.containerd.grpc.v1.cri.containerd.snapshotter"]);
}

#[test]
fn the_version_stays_as_long_as_anything_is_written_in_it() {
    let change = edit("", &wanted()).expect("edits");
    assert_eq!(revert(&change.text, &change.changes).expect("reverts").0, "");
    let theirs = format!("{}\n[debug]\nlevel = 'debug'\n", change.text);
    let (text, kept) = revert(&theirs, &change.changes).expect("reverts");
    assert_has(&text, &["version = 3\n", "[debug]\nlevel = 'debug'\n"]);
    assert!(!text.contains("hermes") && kept.is_empty(), "{text}");
}

#[test]
fn what_cannot_be_edited_is_named() {
    let refused = |text: &str| edit(text, &wanted()).expect_err("refused");
    assert!(matches!(refused("version = [\n"), ConfigError::Syntax(said) if said.contains("line")));
    assert_eq!(refused("version = 9\n"), ConfigError::Version("9".to_owned()));
    assert_eq!(refused("proxy_plugins = 1\n"), ConfigError::NotATable("proxy_plugins".to_owned()));
    let list = "version = 3\n[plugins.'io.containerd.transfer.v1.local']\nunpack_config = 1\n";
    assert!(matches!(refused(list), ConfigError::NotATable(path) if path.ends_with("unpack_config")));
}

/// Configurations as people write them: any version, some of the tables, some values of their own.
fn configuration() -> impl Strategy<Value = String> {
    let version = prop_oneof![Just(""), Just("version = 2\n"), Just("version = 3  # three\n"), Just("version = 1\n")];
    let cri = prop_oneof![Just("io.containerd.grpc.v1.cri"), Just("io.containerd.cri.v1.images"), Just("cri")];
    let table = (cri, any::<bool>(), "[a-z]{0,8}", any::<bool>()).prop_map(|(name, inner, own, annotations)| {
        let inner = if inner { ".containerd" } else { "" };
        format!(
            "\n[plugins.'{name}'{inner}]\n  # {own}\n  snapshotter = 'own-{own}'\n  disable_snapshot_annotations = \
             {annotations}\n"
        )
    });
    let proxy =
        "[a-z]{1,6}".prop_map(|name| format!("\n[proxy_plugins.x{name}]\ntype = \"snapshot\"\naddress = '/{name}'\n"));
    let unpack = "[a-z]{1,6}".prop_map(|name| {
        format!("\n[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\n  snapshotter = 'y{name}'\n")
    });
    let unknown = "[a-z]{1,6}".prop_map(|name| format!("\n[unknown_{name}]   # {name}\n\tkey = [1,\n  2]\n"));
    let part = |strategy: BoxedStrategy<String>| prop::option::of(strategy).prop_map(Option::unwrap_or_default);
    (version, part(table.boxed()), part(proxy.boxed()), part(unpack.boxed()), part(unknown.boxed()))
        .prop_map(|(version, table, proxy, unpack, unknown)| format!("{version}{table}{unknown}{proxy}{unpack}"))
}

proptest! {
    #[test]
    fn taking_out_what_was_put_in_leaves_the_same_bytes(before in configuration(), cri_default: bool) {
        let wanted = Wanted { cri_default, ..wanted() };
        let change = edit(&before, &wanted).expect("edits");
        prop_assert!(!change.changes.is_empty());
        prop_assert_eq!(&edit(&change.text, &wanted).expect("edits").changes, &[] as &[Change]);
        let (text, kept) = revert(&change.text, &change.changes).expect("reverts");
        prop_assert_eq!(text, before);
        prop_assert_eq!(kept, Vec::<String>::new());
    }
}
