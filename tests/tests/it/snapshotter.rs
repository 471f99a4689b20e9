//! The cases of containerd's own snapshotter test suite, on the service behind its socket, with the mounts really made.
//! The names are the suite's. What it has beyond mounts and content (status codes, filters, crashes) is here as well.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Result, ensure};
use hermes_containerd_api::snapshots::{Info, Kind};
use hermes_snapshotter::snapshots::PlainImages;
use hermes_tests::guard::wait_for;
use hermes_tests::snapshotter::{Labels, LocalService, labels, listing};
use tonic::{Code, Status};

/// How long a directory may take to go after its snapshot.
const SWEEP_DEADLINE: Duration = Duration::from_secs(30);

fn start() -> LocalService {
    LocalService::start(Arc::new(PlainImages)).expect("the service starts")
}

fn code<T: std::fmt::Debug>(answer: Result<T, Status>) -> Code {
    answer.expect_err("it is refused").code()
}

fn none() -> Labels {
    Labels::new()
}

/// One change of a tree.
enum Change {
    Dir(&'static str, u32),
    File(String, &'static str, u32),
    Remove(&'static str),
    Chown(&'static str, u32),
    Rename(&'static str, &'static str),
    Link(&'static str, &'static str),
}
use Change::{Chown, Dir, File, Link, Remove, Rename};

fn file(path: &str, content: &'static str, mode: u32) -> Change {
    File(path.to_owned(), content, mode)
}

fn apply(root: &Path, changes: &[Change]) -> Result<()> {
    for change in changes {
        match change {
            Dir(path, mode) => {
                fs::create_dir(root.join(path))?;
                fs::set_permissions(root.join(path), fs::Permissions::from_mode(*mode))?;
            }
            File(path, content, mode) => {
                fs::write(root.join(path), content)?;
                fs::set_permissions(root.join(path), fs::Permissions::from_mode(*mode))?;
            }
            Remove(path) if root.join(path).is_dir() => fs::remove_dir_all(root.join(path))?,
            Remove(path) => fs::remove_file(root.join(path))?,
            Chown(path, owner) => std::os::unix::fs::lchown(root.join(path), Some(*owner), Some(*owner))?,
            Rename(from, to) => fs::rename(root.join(from), root.join(to))?,
            Link(from, to) => fs::hard_link(root.join(from), root.join(to))?,
        }
    }
    Ok(())
}

/// Applies `layers` one above the other, to mounted snapshots and to one ordinary folder, which must stay equal.
fn check_layers(service: &LocalService, layers: &[Vec<Change>]) -> Result<()> {
    let client = service.client();
    let flat = service.make("flat")?;
    let mut parent = String::new();
    for (number, changes) in layers.iter().enumerate() {
        let (key, name) = (format!("key-{number}"), format!("layer-{number}"));
        let mounted = service.mount(&client.prepare(&key, &parent, none())?, &key)?;
        ensure!(listing(mounted.path())? == listing(&flat)?, "layer {number} begins as its parents end");
        apply(mounted.path(), changes)?;
        apply(&flat, changes)?;
        ensure!(listing(mounted.path())? == listing(&flat)?, "layer {number} changes like a folder");
        drop(mounted);
        client.commit(&name, &key, none(), "")?;
        parent = name;
    }
    let view = service.mount(&client.view("view", &parent)?, "view")?;
    ensure!(listing(view.path())? == listing(&flat)?, "the view is the sum of the layers");
    Ok(())
}

#[test]
fn basic() -> Result<()> {
    let service = start();
    let client = service.client();
    let mounted = service.mount(&client.prepare("preparing", "", none())?, "preparing")?;
    apply(mounted.path(), &[file("foo", "foo\n", 0o777), Dir("a", 0o755), Dir("a/b", 0o755), Dir("a/b/c", 0o755)])?;
    drop(mounted);
    client.commit("committed", "preparing", none(), "")?;
    let committed = client.stat("committed")?;
    assert_eq!((committed.kind(), committed.parent.as_str()), (Kind::Committed, ""));
    assert_eq!(code(client.stat("preparing")), Code::NotFound);

    let mounted = service.mount(&client.prepare("next", "committed", none())?, "next")?;
    assert_eq!(listing(mounted.path())?.len(), 4);
    apply(mounted.path(), &[file("bar", "bar\n", 0o777), file("foo", "bar\n", 0o777), Remove("a/b")])?;
    let expected = listing(mounted.path())?;
    drop(mounted);
    let next = client.stat("next")?;
    assert_eq!((next.kind(), next.parent.as_str()), (Kind::Active, "committed"));
    client.commit("committed-next", "next", none(), "")?;
    assert_eq!(client.list(&[])?, [committed, client.stat("committed-next")?]);

    let view = service.mount(&client.view("nextnext", "committed-next")?, "nextnext")?;
    assert_eq!(listing(view.path())?, expected);
    drop(view);
    client.remove("nextnext")?;
    let refused = client.remove("committed").expect_err("it has a child");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("remove"), "{refused}");
    client.remove("committed-next")?;
    client.remove("committed")?;
    client.cleanup()?;
    assert_eq!(service.directories()?.len(), 0);
    Ok(())
}

#[test]
fn stat_active_committed_and_transitivity() -> Result<()> {
    let service = start();
    let client = service.client();
    let mounts = client.prepare("active", "", none())?;
    assert_eq!(client.mounts("active")?, mounts);
    let info = client.stat("active")?;
    assert_eq!((info.kind(), info.name.as_str(), info.parent.as_str()), (Kind::Active, "active", ""));
    client.commit("a", "active", none(), "")?;
    assert_eq!(client.stat("a")?.kind(), Kind::Committed);
    client.prepare("above", "a", none())?;
    client.commit("b", "above", none(), "")?;
    let b = client.stat("b")?;
    assert_eq!(b.parent, "a");
    assert_eq!(client.stat(&b.parent)?.parent, "");
    Ok(())
}

#[test]
fn prepare_view_failing() -> Result<()> {
    let service = start();
    let client = service.client();
    client.prepare("preparing", "", none())?;
    assert_eq!(code(client.prepare("on-active", "preparing", none())), Code::InvalidArgument);
    client.commit("a", "preparing", none(), "")?;
    client.prepare("new", "a", none())?;
    assert_eq!(code(client.view("new", "a")), Code::AlreadyExists);
    assert_eq!(code(client.prepare("new", "a", none())), Code::AlreadyExists);
    client.view("view", "a")?;
    assert_eq!(code(client.view("view", "a")), Code::AlreadyExists);
    assert_eq!(code(client.prepare("x", "missing", none())), Code::NotFound);
    assert_eq!(code(client.prepare("", "", none())), Code::InvalidArgument);
    assert_eq!(code(client.commit("a", "new", none(), "")), Code::AlreadyExists);
    assert_eq!(code(client.commit("x", "missing", none(), "")), Code::NotFound);
    assert_eq!(code(client.commit("x", "view", none(), "")), Code::FailedPrecondition);
    assert_eq!(code(client.mounts("a")), Code::FailedPrecondition);
    assert_eq!(code(client.mounts("missing")), Code::NotFound);
    assert_eq!(code(client.remove("missing")), Code::NotFound);
    assert_eq!(code(client.usage("missing")), Code::NotFound);
    assert_eq!(code(client.update(Info { name: "missing".to_owned(), ..Info::default() }, &[])), Code::NotFound);
    assert_eq!(code(client.list(&["name=x"])), Code::InvalidArgument);
    let long = labels(&[("key", &"x".repeat(4096))]);
    assert_eq!(code(client.prepare("x", "", long)), Code::InvalidArgument);
    assert_eq!(service.directories()?.len(), 3, "what was refused leaves no directory");
    Ok(())
}

/// c1 <- c2 committed, a1 and v1 on c2, a2 and v2 on nothing.
fn base(service: &LocalService) -> Result<()> {
    let client = service.client();
    client.prepare("c1-a", "", none())?;
    client.commit("c1", "c1-a", none(), "")?;
    client.prepare("c2-a", "c1", none())?;
    client.commit("c2", "c2-a", none(), "")?;
    client.prepare("a1", "c2", none())?;
    client.prepare("a2", "", none())?;
    client.view("v1", "c2")?;
    client.view("v2", "")?;
    Ok(())
}

#[test]
fn update() -> Result<()> {
    let service = start();
    let client = service.client();
    let before = SystemTime::now();
    base(&service)?;
    let expected = [
        ("c1", Kind::Committed, ""),
        ("c2", Kind::Committed, "c1"),
        ("a1", Kind::Active, "c2"),
        ("a2", Kind::Active, ""),
        ("v1", Kind::View, "c2"),
        ("v2", Kind::View, ""),
    ];
    for (name, kind, parent) in expected {
        let mut info = client.stat(name)?;
        assert_eq!((info.kind(), info.parent.as_str()), (kind, parent), "{name}");
        let created = SystemTime::try_from(info.created_at.expect("a time"))?;
        assert!(created >= before && created <= SystemTime::now(), "{name}");
        assert_eq!(info.created_at, info.updated_at, "{name}");

        info.parent = "doesnotexist".to_owned();
        info.labels = labels(&[("l1", "v1"), ("l2", "v2"), ("l3", "v3")]);
        let updated = client.update(info.clone(), &[])?;
        assert_eq!((updated.parent.as_str(), &updated.labels), (parent, &info.labels), "{name}");
        assert_eq!(updated.created_at, info.created_at);
        let changed = SystemTime::try_from(updated.updated_at.expect("a time"))?;
        assert!(changed > created, "{name}");

        info.labels = labels(&[("l1", "updated"), ("l4", "v4")]);
        let updated = client.update(info.clone(), &["labels.l1", "labels.l2"])?;
        assert_eq!(updated.labels, labels(&[("l1", "updated"), ("l3", "v3")]), "{name}");
        info.labels = labels(&[("l4", "v4")]);
        assert_eq!(client.update(info.clone(), &["labels"])?.labels, info.labels, "{name}");
        assert_eq!(code(client.update(info, &["parent"])), Code::InvalidArgument, "{name}");
    }
    Ok(())
}

#[test]
fn remove_and_reuse_of_names() -> Result<()> {
    let service = start();
    let client = service.client();
    client.prepare("committed-a", "", none())?;
    client.commit("committed-1", "committed-a", none(), "")?;
    client.prepare("reuse-1", "committed-1", none())?;
    client.remove("reuse-1")?;
    client.view("reuse-1", "committed-1")?;
    client.remove("reuse-1")?;
    client.prepare("reuse-1", "", none())?;
    client.remove("committed-1")?;
    client.commit("committed-1", "reuse-1", none(), "")?;
    // Without Cleanup, which not every client calls, directories go too.
    wait_for("the end of removed directories", SWEEP_DEADLINE, || {
        service.directories().is_ok_and(|left| left.len() == 1).then_some(())
    })
}

#[test]
fn remove_intermediate_snapshot() -> Result<()> {
    let service = start();
    let client = service.client();
    client.prepare("base", "", none())?;
    client.commit("committed-base", "base", none(), "")?;
    client.prepare("inter", "committed-base", none())?;
    client.commit("committed-inter", "inter", none(), "")?;
    client.prepare("top", "committed-inter", none())?;
    assert_eq!(code(client.remove("committed-inter")), Code::FailedPrecondition);
    for name in ["top", "committed-inter", "committed-base"] {
        client.remove(name)?;
    }
    Ok(())
}

#[test]
fn walk() -> Result<()> {
    let service = start();
    let client = service.client();
    let root = |label: Option<&str>| {
        let mut all = labels(&[("containerd.io/gc.root", "check-walk")]);
        all.extend(label.map(|label| ("l".to_owned(), label.to_owned())));
        all
    };
    client.prepare("a-np", "", root(None))?;
    client.prepare("p-tmp", "", root(None))?;
    client.commit("p", "p-tmp", root(None), "")?;
    client.prepare("a", "p", root(None))?;
    client.view("v", "p")?;
    let view = Info { name: "v".to_owned(), labels: root(None), ..Info::default() };
    client.update(view.clone(), &[])?;
    client.prepare("p-wl-tmp", "", root(None))?;
    client.commit("p-wl", "p-wl-tmp", root(Some("1")), "")?;
    client.prepare("a-wl", "p-wl", root(Some("2")))?;
    client.view("v-wl", "p-wl")?;
    client.update(Info { name: "v-wl".to_owned(), labels: root(Some("3")), ..view }, &[])?;
    client.prepare("a-np-wl", "", root(Some("2")))?;
    const ROOT: &str = "labels.\"containerd.io/gc.root\"==check-walk";
    let cases: [(&[String], &str); 11] = [
        (&[ROOT.to_owned()], "a a-np a-np-wl a-wl p p-wl v v-wl"),
        (&[format!("kind==active,{ROOT}")], "a a-np a-np-wl a-wl"),
        (&[format!("kind==view,{ROOT}")], "v v-wl"),
        (&[format!("kind==committed,{ROOT}")], "p p-wl"),
        (&["name==p".to_owned(), "name==a-np-wl".to_owned()], "a-np-wl p"),
        (&["name==a-wl,labels.l".to_owned()], "a-wl"),
        (&["parent==p".to_owned()], "a v"),
        (&[format!("parent!=\"\",{ROOT}")], "a a-wl v v-wl"),
        (&["labels.l".to_owned()], "a-np-wl a-wl p-wl v-wl"),
        (&["labels.l==2".to_owned()], "a-np-wl a-wl"),
        (&["name~=^a-np".to_owned()], "a-np a-np-wl"),
    ];
    for (filters, expected) in cases {
        let filters: Vec<&str> = filters.iter().map(String::as_str).collect();
        let names: Vec<String> = client.names(&filters)?.into_iter().collect();
        assert_eq!(names.join(" "), expected, "{filters:?}");
    }
    Ok(())
}

#[test]
fn stat_in_walk_over_many_batches() -> Result<()> {
    let service = start();
    let client = service.client();
    for number in 0..250 {
        client.prepare(&format!("default/{number}/key"), "", none())?;
    }
    let listed = client.list(&[])?;
    assert_eq!(listed.len(), 250);
    for info in listed {
        assert_eq!(client.stat(&info.name)?, info);
    }
    Ok(())
}

#[test]
fn layer_file_update() -> Result<()> {
    check_layers(
        &start(),
        &[
            vec![
                Dir("etc", 0o700),
                file("etc/hosts", "mydomain 10.0.0.1", 0o644),
                file("etc/profile", "PATH=/usr/bin", 0o644),
            ],
            vec![
                file("etc/hosts", "mydomain 10.0.0.2", 0o644),
                file("etc/profile", "PATH=/usr/bin", 0o666),
                Dir("root", 0o700),
                file("root/.bashrc", "PATH=/usr/sbin:/usr/bin", 0o644),
            ],
        ],
    )
}

#[test]
fn remove_directory_in_lower_layer() -> Result<()> {
    check_layers(
        &start(),
        &[
            vec![Dir("lib", 0o700), file("lib/hidden", "", 0o644)],
            vec![Remove("lib"), Dir("lib", 0o700), file("lib/not-hidden", "", 0o644)],
            vec![file("lib/newfile", "", 0o644)],
        ],
    )
}

#[test]
fn chown() -> Result<()> {
    check_layers(
        &start(),
        &[
            vec![
                Dir("opt", 0o700),
                Dir("opt/a", 0o700),
                Dir("opt/a/b", 0o700),
                file("opt/a/b/file.txt", "hello", 0o644),
            ],
            vec![Chown("opt", 1), Chown("opt/a", 1), Chown("opt/a/b", 1), Chown("opt/a/b/file.txt", 1)],
        ],
    )
}

#[test]
fn directory_permission_on_commit() -> Result<()> {
    let mut first: Vec<Change> = ["dir1", "dir2", "dir3", "dir4", "dir5"].map(|name| Dir(name, 0o700)).into();
    first.extend([file("dir4/f1", "...", 0o644), file("dir5/f1", "...", 0o644)]);
    first.extend(["dir1", "dir2", "dir3", "dir5", "dir5/f1"].map(|name| Chown(name, 1)));
    let second = vec![Chown("dir2", 0), Remove("dir3"), Chown("dir4", 1), Chown("dir4/f1", 1)];
    let third = vec![Dir("dir3", 0o700), Chown("dir3", 1), Remove("dir5"), Dir("dir5", 0o700), Chown("dir5", 1)];
    check_layers(&start(), &[first, second, third])
}

#[test]
fn deleted_files_in_child_snapshot() -> Result<()> {
    let first = vec![file("foo", "foo\n", 0o777), file("foobar", "foobar\n", 0o777)];
    check_layers(&start(), &[first, vec![Remove("foobar")], vec![]])
}

#[test]
fn move_file_from_lower_layer() -> Result<()> {
    check_layers(
        &start(),
        &[
            vec![
                Dir("dir1", 0o700),
                file("dir1/f1", "Hello", 0o644),
                Dir("dir2", 0o700),
                file("dir2/f2", "...", 0o644),
            ],
            vec![
                Dir("dir3", 0o700),
                file("dir3/f1", "Hello", 0o644),
                Remove("dir1"),
                Link("dir2/f2", "dir3/f2"),
                Remove("dir2/f2"),
            ],
        ],
    )
}

#[test]
fn rename() -> Result<()> {
    // Not of a directory from below: overlayfs has no such thing without redirect_dir.
    check_layers(
        &start(),
        &[
            vec![
                Dir("somefiles", 0o700),
                file("somefiles/f1", "was here first!", 0o644),
                file("somefiles/f2", "nothing", 0o644),
            ],
            vec![
                file("somefiles/f1-overwrite", "new content 1", 0o644),
                Rename("somefiles/f1-overwrite", "somefiles/f1"),
                Rename("somefiles/f2", "somefiles/f3"),
            ],
        ],
    )
}

#[test]
fn mount_of_128_layers() -> Result<()> {
    let mut layers = vec![vec![
        file("bottom", "way at the bottom\n", 0o777),
        file("overwriteme", "FIRST!\n", 0o777),
        Dir("addhere", 0o755),
        Dir("onlyme", 0o755),
        file("onlyme/bottom", "bye!\n", 0o777),
    ]];
    layers.extend((1..128).map(|number| {
        vec![
            file("overwriteme", ["even\n", "odd\n"][number % 2], 0o777),
            file(&format!("addhere/file-{number}"), "same\n", 0o755),
            Remove("onlyme"),
            Dir("onlyme", 0o755),
            file(&format!("onlyme/file-{number}"), "only me!\n", 0o777),
        ]
    }));
    check_layers(&start(), &layers)
}

#[test]
fn view_readonly() -> Result<()> {
    let service = start();
    let client = service.client();
    client.prepare("a", "", none())?;
    client.commit("one", "a", none(), "")?;
    client.prepare("b", "one", none())?;
    client.commit("two", "b", none(), "")?;
    for (view, parent) in [("none", ""), ("of-one", "one"), ("of-two", "two")] {
        let mounted = service.mount(&client.view(view, parent)?, view)?;
        let error = fs::write(mounted.path().join("file"), "x").expect_err("a view is read-only");
        assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem, "{view}");
        drop(mounted);
        client.remove(view)?;
    }
    Ok(())
}

#[test]
fn root_permission_and_owner() -> Result<()> {
    let service = start();
    let client = service.client();
    let mounted = service.mount(&client.prepare("first", "", none())?, "first")?;
    assert_eq!(mounted.path().metadata()?.mode() & 0o7777, 0o755);
    std::os::unix::fs::chown(mounted.path(), Some(7), Some(8))?;
    drop(mounted);
    client.commit("layer", "first", none(), "")?;
    let mounted = service.mount(&client.prepare("second", "layer", none())?, "second")?;
    let found = mounted.path().metadata()?;
    assert_eq!((found.uid(), found.gid(), found.mode() & 0o7777), (7, 8, 0o755));
    Ok(())
}

#[test]
fn usage() -> Result<()> {
    let service = start();
    let client = service.client();
    let mounts = client.prepare("active", "", none())?;
    let empty = client.usage("active")?;
    assert_eq!(empty.inodes, 1);
    let mounted = service.mount(&mounts, "active")?;
    fs::write(mounted.path().join("file"), vec![1; 1 << 20])?;
    fs::hard_link(mounted.path().join("file"), mounted.path().join("link"))?;
    rustix::fs::syncfs(fs::File::open(mounted.path())?)?;
    let full = client.usage("active")?;
    assert_eq!(full.inodes, 2);
    assert!((1 << 20..(1 << 20) + 65_536).contains(&(full.size - empty.size)), "{full:?}");
    drop(mounted);
    client.commit("layer", "active", none(), "")?;
    assert_eq!(client.usage("layer")?, full);
    client.view("view", "layer")?;
    assert_eq!(client.usage("view")?.size, 0);
    Ok(())
}

#[test]
fn rebase_at_commit() -> Result<()> {
    let service = start();
    let client = service.client();
    // Layers unpacked side by side, each on nothing, and put above each other when they are committed.
    for (key, name) in [("k1", "one"), ("k2", "two")] {
        let mounted = service.mount(&client.prepare(key, "", none())?, key)?;
        fs::write(mounted.path().join(name), name)?;
    }
    assert_eq!(code(client.commit("two", "k2", none(), "one")), Code::NotFound);
    assert_eq!(code(client.commit("two", "k2", none(), "k1")), Code::FailedPrecondition);
    client.commit("one", "k1", none(), "")?;
    client.commit("two", "k2", none(), "one")?;
    assert_eq!(client.stat("two")?.parent, "one");
    assert_eq!(code(client.remove("one")), Code::FailedPrecondition);
    let view = service.mount(&client.view("view", "two")?, "view")?;
    assert_eq!(listing(view.path())?.len(), 2);
    Ok(())
}

#[test]
fn id_mapped_snapshots() -> Result<()> {
    let service = start();
    let client = service.client();
    let mapping = labels(&[
        ("containerd.io/snapshot/uidmapping", "0:100000:65536"),
        ("containerd.io/snapshot/gidmapping", "0:200000:65536"),
    ]);
    client.prepare("layer-key", "", none())?;
    client.commit("layer", "layer-key", none(), "")?;
    let mounts = client.prepare("mapped", "layer", mapping.clone())?;
    let options = &mounts[0].options;
    assert!(options.contains(&"uidmap=0:100000:65536".to_owned()), "{options:?}");
    assert!(options.contains(&"gidmap=0:200000:65536".to_owned()), "{options:?}");
    let upper = options.iter().find_map(|option| option.strip_prefix("upperdir=")).expect("an upper directory");
    let found = fs::metadata(upper)?;
    assert_eq!((found.uid(), found.gid()), (100_000, 200_000));
    assert_eq!(client.mounts("mapped")?, mounts);
    let mut half = mapping.clone();
    half.pop_last();
    assert_eq!(code(client.prepare("half", "layer", half)), Code::InvalidArgument);
    let mut wrong = mapping;
    wrong.insert("containerd.io/snapshot/uidmapping".to_owned(), "1:2".to_owned());
    assert_eq!(code(client.prepare("wrong", "layer", wrong)), Code::InvalidArgument);
    Ok(())
}

#[test]
fn close_twice_and_what_stays() -> Result<()> {
    let mut service = start();
    base(&service)?;
    let mounted = service.mount(&service.client().mounts("a1")?, "a1")?;
    fs::write(mounted.path().join("file"), "kept")?;
    drop(mounted);
    let before = service.client().list(&[])?;
    fs::create_dir_all(service.root().join("new-99/fs"))?;
    fs::create_dir_all(service.root().join("77/fs"))?;
    for _ in 0..2 {
        service.restart(Arc::new(PlainImages))?;
        assert_eq!(service.client().list(&[])?, before);
    }
    service.client().cleanup()?;
    assert_eq!(service.directories()?.len(), before.len(), "directories without a snapshot are gone");
    let mounted = service.mount(&service.client().mounts("a1")?, "a1")?;
    assert_eq!(fs::read_to_string(mounted.path().join("file"))?, "kept");
    Ok(())
}

#[test]
fn calls_at_the_same_time() -> Result<()> {
    let service = start();
    let client = service.client();
    client.prepare("base-key", "", none())?;
    client.commit("base", "base-key", none(), "")?;
    std::thread::scope(|scope| {
        for worker in 0..8 {
            scope.spawn(move || {
                for round in 0..10 {
                    let (key, name) = (format!("k-{worker}-{round}"), format!("n-{worker}-{round}"));
                    client.prepare(&key, "base", none()).expect("prepares");
                    client.commit(&name, &key, none(), "").expect("commits");
                    client.view(&key, &name).expect("views");
                    client.cleanup().expect("cleans up");
                    client.remove(&key).expect("removes");
                    client.remove(&name).expect("removes");
                }
            });
        }
    });
    client.cleanup()?;
    assert_eq!(client.names(&[])?.into_iter().collect::<Vec<_>>(), ["base"]);
    assert_eq!(service.directories()?.len(), 1);
    Ok(())
}
