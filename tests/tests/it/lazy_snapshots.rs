//! The seam between snapshots and images that are shown lazily: what the service asks of it and when, and what becomes
//! of the mounts. The images here are ordinary folders.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::Result;
use futures::future::BoxFuture;
use hermes_containerd_api::snapshots::Kind;
use hermes_image::ids::{ChainId, DiffId, Digest, LayerId};
use hermes_snapshotter::snapshots::{Decision, Images, ImagesError, PlainImages, PulledLayer, RemoteChain};
use hermes_store::{RemoteLayer, SnapshotUsage};
use hermes_tests::guard::{ScratchDir, mounts_below};
use hermes_tests::snapshotter::{Labels, LocalService, labels, listing};
use tonic::Code;

/// The label that makes these images lazy.
const LAZY: &str = "containerd.io/snapshot/test.lazy";
/// What every remote layer takes.
const USAGE: SnapshotUsage = SnapshotUsage { size_bytes: 4711, inodes: 0 };

/// Images whose trees are folders, named by the first byte of their chain.
#[derive(Debug)]
struct Folders {
    dir: PathBuf,
    calls: Mutex<Vec<String>>,
    broken: bool,
}

fn layer(number: u8) -> RemoteLayer {
    let bytes = [number; 32];
    RemoteLayer { chain: ChainId(bytes), diff_id: DiffId(bytes), layer: LayerId(bytes), manifest: Digest([0; 32]) }
}

fn target(number: u8) -> String {
    layer(number).chain.to_string()
}

impl Folders {
    fn new(dir: &ScratchDir, broken: bool) -> Arc<Self> {
        Arc::new(Self { dir: dir.path().to_owned(), calls: Mutex::default(), broken })
    }

    fn call(&self, what: &str, layer: &RemoteLayer) {
        self.calls.lock().expect("no panic").push(format!("{what} {}", layer.chain.0[0]));
    }

    /// What was asked since the last look.
    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.calls.lock().expect("no panic"))
    }
}

impl Images for Folders {
    fn decide<'a>(&'a self, pulled: &'a PulledLayer) -> BoxFuture<'a, Decision> {
        Box::pin(async move {
            match pulled.target.parse::<ChainId>() {
                Ok(chain) if pulled.labels.contains_key(LAZY) => Decision::Lazy(layer(chain.0[0])),
                _ => Decision::Plain { reason: "it has no label".to_owned() },
            }
        })
    }

    fn show<'a>(&'a self, chain: &'a RemoteChain) -> BoxFuture<'a, Result<PathBuf, ImagesError>> {
        self.call("show", &chain.layer);
        Box::pin(async move {
            if self.broken {
                return Err(ImagesError::Unavailable("nobody has it".to_owned()));
            }
            let tree = self.dir.join(format!("tree-{}", chain.layer.chain.0[0]));
            fs::create_dir_all(&tree).expect("a tree");
            fs::write(tree.join(format!("from-{}", chain.below.len() + 1)), "lazy").expect("a file");
            Ok(tree)
        })
    }

    fn places<'a>(&'a self, _chain: &'a RemoteChain) -> BoxFuture<'a, Vec<PathBuf>> {
        Box::pin(async { Vec::new() })
    }

    fn release<'a>(&'a self, chain: &'a RemoteChain, _place: Option<&'a Path>) -> BoxFuture<'a, ()> {
        self.call("release", &chain.layer);
        Box::pin(async {})
    }

    fn usage<'a>(&'a self, _layer: &'a RemoteLayer) -> BoxFuture<'a, Result<SnapshotUsage, ImagesError>> {
        Box::pin(async { Ok(USAGE) })
    }

    fn removed<'a>(&'a self, layer: &'a RemoteLayer) -> BoxFuture<'a, ()> {
        self.call("removed", layer);
        Box::pin(async {})
    }
}

fn none() -> Labels {
    Labels::new()
}

/// A mapping of ids in the form of containerd's labels.
fn mapping() -> Labels {
    labels(&[
        ("containerd.io/snapshot/uidmapping", "0:100000:65536"),
        ("containerd.io/snapshot/gidmapping", "0:200000:65536"),
    ])
}

/// What containerd sends when it unpacks layer `number`.
fn lazily(number: u8) -> Labels {
    labels(&[("containerd.io/snapshot.ref", &target(number)), (LAZY, "yes")])
}

/// Pulls layer `number` onto `parent` as containerd does; the name under which it is found.
fn pull(service: &LocalService, key: &str, number: u8, parent: &str) -> Result<String> {
    let refused = service.client().prepare(key, parent, lazily(number)).expect_err("it is there already");
    assert_eq!(refused.code(), Code::AlreadyExists);
    let filter = format!("labels.\"containerd.io/snapshot.ref\"=={},parent==\"{parent}\"", target(number));
    let found = service.client().list(&[&filter])?;
    assert_eq!((found.len(), found[0].kind()), (1, Kind::Committed));
    Ok(found[0].name.clone())
}

#[test]
fn an_image_of_remote_layers_is_one_lower_directory() -> Result<()> {
    let dir = ScratchDir::new("trees")?;
    let images = Folders::new(&dir, false);
    let service = LocalService::start(images.clone())?;
    let client = service.client();
    let low = pull(&service, "default/1/extract-1", 1, "")?;
    let top = pull(&service, "default/2/extract-2", 2, &low)?;
    assert_eq!((&low, &top), (&target(1), &target(2)));
    assert_eq!(images.calls(), Vec::<String>::new(), "layers alone need no tree");
    assert_eq!(client.usage(&top)?.size, 4711);
    assert_eq!(service.directories()?, BTreeSet::new());

    let mounts = client.prepare("container", &top, none())?;
    let lower = format!("lowerdir={}", dir.path().join("tree-2").display());
    assert!(mounts[0].options.contains(&lower), "{mounts:?}");
    assert_eq!(client.mounts("container")?, mounts);
    let view = client.view("view", &top)?;
    assert_eq!((view[0].r#type.as_str(), view[0].options.join(",").as_str()), ("bind", "ro,rbind"));
    assert_eq!(images.calls(), ["show 2", "show 2", "show 2"]);
    let mounted = service.mount(&mounts, "container")?;
    assert_eq!(fs::read_to_string(mounted.path().join("from-2"))?, "lazy");
    fs::write(mounted.path().join("written"), "upper")?;
    drop(mounted);

    client.remove("view")?;
    assert_eq!(images.calls(), Vec::<String>::new(), "the container still needs the tree");
    assert_eq!(client.remove(&top).expect_err("it has a child").code(), Code::FailedPrecondition);
    client.remove("container")?;
    assert_eq!(images.calls(), ["release 2"]);
    client.remove(&top)?;
    client.remove(&low)?;
    assert_eq!(images.calls(), ["removed 2", "removed 1"]);
    client.cleanup()?;
    assert_eq!((client.list(&[])?.len(), service.directories()?.len()), (0, 0));
    Ok(())
}

#[test]
fn ids_above_a_tree_are_mapped_and_go_before_it() -> Result<()> {
    let dir = ScratchDir::new("trees")?;
    let service = LocalService::start(Folders::new(&dir, false))?;
    let client = service.client();
    let image = pull(&service, "extract", 1, "")?;
    let mounts = client.prepare("container", &image, mapping())?;
    let options = mounts[0].options.join(",");
    assert!(!options.contains("map=") && options.contains("/mapped/0"), "{options}");
    assert_eq!(client.mounts("container")?, mounts);
    let mounted = service.mount(&mounts, "container")?;
    let owner = |path: PathBuf| fs::metadata(path).map(|found| (found.uid(), found.gid()));
    assert_eq!(owner(mounted.path().join("from-1"))?, (100_000, 200_000));
    assert_eq!(owner(mounted.path().to_owned())?, (100_000, 200_000));
    drop(mounted);
    assert_eq!(mounts_below(&service.root())?.len(), 1);
    client.remove("container")?;
    assert_eq!(mounts_below(&service.root())?, Vec::<PathBuf>::new());
    client.cleanup()?;
    assert_eq!(service.directories()?, BTreeSet::new());
    assert!(dir.path().join("tree-1/from-1").exists(), "nothing was deleted through a mount");
    Ok(())
}

#[test]
fn ids_are_not_mapped_above_owners_that_containerd_has_changed() -> Result<()> {
    let dir = ScratchDir::new("trees")?;
    let service = LocalService::start(Folders::new(&dir, false))?;
    let client = service.client();
    let image = pull(&service, "k8s.io/1/extract", 1, "")?;
    // What containerd does for a snapshotter that has not said that it maps ids.
    let changed = format!("k8s.io/3/{image}-100000-200000");
    client.prepare("k8s.io/2/remap", &image, none())?;
    client.commit(&changed, "k8s.io/2/remap", none(), "")?;
    let mounts = client.prepare("container", &changed, mapping())?;
    let options = mounts[0].options.join(",");
    assert!(!options.contains("map"), "{options}");
    // Other owners than those that it was changed to are mapped as ever.
    let other = labels(&[
        ("containerd.io/snapshot/uidmapping", "0:300000:65536"),
        ("containerd.io/snapshot/gidmapping", "0:200000:65536"),
    ]);
    assert!(client.prepare("other", &changed, other)?[0].options.join(",").contains("/mapped/1"));
    client.remove("other")?;
    Ok(())
}

#[test]
fn plain_layers_stand_above_and_below_remote_ones() -> Result<()> {
    let dir = ScratchDir::new("trees")?;
    let images = Folders::new(&dir, false);
    let service = LocalService::start(images.clone())?;
    let client = service.client();
    // Below: unpacked before the node knew the image.
    client.prepare("plain-key", "", none())?;
    client.commit("plain", "plain-key", none(), "")?;
    let remote = pull(&service, "extract", 3, "plain")?;
    // Above: a build's step, or `nerdctl commit`.
    let mounted = service.mount(&client.prepare("step", &remote, none())?, "step")?;
    fs::write(mounted.path().join("built"), "plain")?;
    drop(mounted);
    assert_eq!(images.calls(), ["show 3"]);
    client.commit("built", "step", none(), "")?;
    assert_eq!(images.calls(), ["release 3"], "a committed layer needs no tree");
    let mounts = client.prepare("container", "built", none())?;
    let lower =
        mounts[0].options.iter().find_map(|option| option.strip_prefix("lowerdir=")).expect("lower directories");
    assert_eq!(lower.split(':').count(), 2, "{lower}");
    assert!(lower.ends_with("/tree-3"), "{lower}");
    let mounted = service.mount(&mounts, "container")?;
    let names: Vec<_> = listing(mounted.path())?.into_keys().collect();
    assert_eq!(names, [PathBuf::from("built"), PathBuf::from("from-2")]);
    drop(mounted);
    // A layer that is not lazy is prepared as ever, on a remote one too.
    let unlabelled = labels(&[("containerd.io/snapshot.ref", &target(9))]);
    assert_eq!(client.prepare("extract-plain", &remote, unlabelled)?.len(), 1);
    Ok(())
}

#[test]
fn namespaces_share_a_layer_and_other_parents_do_not() -> Result<()> {
    let dir = ScratchDir::new("trees")?;
    let images = Folders::new(&dir, false);
    let service = LocalService::start(images.clone())?;
    let client = service.client();
    let first = pull(&service, "default/1/extract-1", 1, "")?;
    assert_eq!(pull(&service, "k8s.io/1/extract-2", 1, "")?, first);
    client.prepare("plain-key", "", none())?;
    client.commit("plain", "plain-key", none(), "")?;
    let other = pull(&service, "default/2/extract-3", 1, "plain")?;
    assert!(other.starts_with(&target(1)) && other != first, "{other}");
    client.remove(&first)?;
    assert_eq!(images.calls(), Vec::<String>::new(), "the layer is still there under another name");
    client.remove(&other)?;
    assert_eq!(images.calls(), ["removed 1"]);
    Ok(())
}

#[test]
fn trees_come_back_and_broken_ones_stop_nothing() -> Result<()> {
    let dir = ScratchDir::new("trees")?;
    let mut service = LocalService::start(Folders::new(&dir, false))?;
    let top = pull(&service, "extract", 4, "")?;
    service.client().prepare("container", &top, none())?;

    let again = Folders::new(&dir, false);
    service.restart(again.clone())?;
    assert_eq!(again.calls(), ["show 4"]);

    let broken = Folders::new(&dir, true);
    service.restart(broken.clone())?;
    assert_eq!(broken.calls(), ["show 4"]);
    let client = service.client();
    assert_eq!(client.mounts("container").expect_err("it cannot be shown").code(), Code::Unavailable);
    assert_eq!(client.prepare("other", &top, none()).expect_err("it cannot be shown").code(), Code::Unavailable);
    assert_eq!(client.stat("other").expect_err("it was not made").code(), Code::NotFound);
    assert_eq!(client.prepare("plain", "", none())?.len(), 1);
    broken.calls();
    client.remove("container")?;
    assert_eq!(broken.calls(), ["release 4"]);

    service.restart(Arc::new(PlainImages))?;
    let refused = service.client().prepare("other", &top, none()).expect_err("nothing is lazy");
    assert!(refused.message().contains("pull it again"), "{refused}");
    service.client().remove(&top)?;
    Ok(())
}
