use std::path::Path as FsPath;
use std::sync::Arc;

use bytes::Bytes;
use futures::FutureExt as _;
use hermes_image::access::Access;
use hermes_image::ids::{ArtifactId, DiffId, Digest, LayerId};
use hermes_image::statement::{LayerStatement, Statement};
use hermes_image::verify::Verified;
use hermes_origin::indexing::Artifact;

use super::{ArtifactSettings, Artifacts, ArtifactsError, ImageRecord};
use crate::event::{Event, ImageKey, Name, ReadyIndex, ResolvedLayer, UnixMillis};
use crate::signing::{KeySet, Keys, OVERLAP};

const NOW: UnixMillis = UnixMillis(1_000_000_000_000);

fn artifact(layer: u8, part: u8) -> Artifact {
    let (id, bytes) = Verified::named(Bytes::from([part, layer].repeat(5_000)));
    Artifact { id, bytes }
}

/// A made-up layer; its windows are those of every other layer.
fn layer(number: u8) -> (LayerStatement, [Artifact; 4]) {
    let artifacts = [artifact(number, 1), artifact(number, 2), artifact(number, 3), artifact(0, 4)];
    let statement = LayerStatement {
        layer: LayerId([number; 32]),
        diff_id: DiffId([number ^ 0xff; 32]),
        blob_len_bytes: 100,
        logical_len_bytes: 1024,
        toc: artifacts[0].id,
        chunks: artifacts[1].id,
        seek: artifacts[2].id,
        windows: artifacts[3].id,
    };
    (statement, artifacts)
}

fn record(image: u8, layers: &[u8]) -> ImageRecord {
    let layers = layers.iter().map(|number| layer(*number).0);
    let layers = layers.map(|it| ResolvedLayer { layer: it.layer, diff_id: it.diff_id, len_bytes: it.blob_len_bytes });
    ImageRecord {
        image: ImageKey { manifest: Digest([image; 32]) },
        name: Name { reference: format!("registry.test/app:{image}"), platform: "linux/amd64".to_owned() },
        layers: layers.collect(),
        access: Access::Private,
        begun: NOW,
    }
}

async fn open(folder: &FsPath, keys: &Keys) -> (Artifacts, Vec<Event>) {
    open_with(folder, keys, ArtifactSettings::default(), NOW).await.expect("opened")
}

async fn open_with(
    folder: &FsPath,
    keys: &Keys,
    settings: ArtifactSettings,
    now: UnixMillis,
) -> Result<(Artifacts, Vec<Event>), ArtifactsError> {
    Artifacts::open(folder.to_str().expect("a text"), settings, keys.clone(), now).await
}

async fn build(artifacts: &Artifacts, image: u8, layers: &[u8]) -> ReadyIndex {
    artifacts.begin(record(image, layers)).await.expect("begun");
    for number in layers {
        let (statement, parts) = layer(*number);
        artifacts.put_layer(&statement, parts).await.expect("kept");
    }
    let layers = layers.iter().map(|number| layer(*number).0).collect();
    let statement = Statement::new(Digest([image; 32]), "linux/amd64".to_owned(), layers);
    artifacts.finish(&statement).await.expect("finished")
}

fn names(folder: &FsPath, kind: &str) -> usize {
    std::fs::read_dir(folder.join(kind)).map_or(0, Iterator::count)
}

fn keys() -> Keys {
    Keys::new(KeySet::new(NOW))
}

fn file(folder: &FsPath, id: ArtifactId) -> std::path::PathBuf {
    folder.join("artifacts").join(id.hex())
}

#[tokio::test]
async fn what_was_built_is_there_after_a_restart() {
    let (folder, keys) = (tempfile::tempdir().expect("a folder"), keys());
    let (artifacts, kept) = open(folder.path(), &keys).await;
    assert!(kept.is_empty());
    let index = build(&artifacts, 1, &[1, 2]).await;
    assert_eq!(index.artifacts.len(), 7, "windows that both have are one artifact");
    let image = ImageKey { manifest: Digest([1; 32]) };
    artifacts.put_profile(&image, b"profile").await.expect("kept");
    assert!(folder.path().join("statements").join(format!("{}.json", image.manifest.hex())).exists());
    assert_eq!(
        std::fs::read_to_string(folder.path().join("references").join(image.manifest.hex())).expect("text"),
        "registry.test/app:1"
    );

    let (artifacts, kept) = open(folder.path(), &keys).await;
    let [Event::Kept { image: found, name, index: found_index, layers, access, profile }] = kept.as_slice() else {
        panic!("{kept:?}");
    };
    assert_eq!((found, found_index, *access), (&image, &index, Access::Private));
    assert_eq!((name.reference.as_str(), layers.len()), ("registry.test/app:1", 2));
    assert_eq!(profile.as_deref(), Some(&b"profile"[..]));
    for id in index.artifacts.iter() {
        let plain = artifacts.read(*id).await.expect("readable").expect("there");
        assert_eq!(ArtifactId::of(&plain), *id);
        let len_bytes = artifacts.packed_len_bytes(*id).expect("there");
        let whole = artifacts.read_packed_range(*id, 0..u64::MAX).await.expect("readable").expect("there");
        let tail = artifacts.read_packed_range(*id, 3..len_bytes).await.expect("readable").expect("there");
        assert_eq!((whole.len() as u64, &whole[3..]), (len_bytes, &tail[..]));
    }
    assert!(artifacts.read(ArtifactId([0; 32])).await.expect("readable").is_none());
}

#[tokio::test]
async fn only_what_nobody_needs_is_deleted() {
    let (folder, keys) = (tempfile::tempdir().expect("a folder"), keys());
    let (artifacts, _) = open(folder.path(), &keys).await;
    build(&artifacts, 1, &[1, 2]).await;
    let second = build(&artifacts, 2, &[2, 3]).await;
    artifacts.release(&ImageKey { manifest: Digest([1; 32]) }).await.expect("released");
    assert_eq!((names(folder.path(), "layers"), names(folder.path(), "artifacts")), (2, 7));
    assert_eq!(artifacts.usage().used_bytes, second.index_len_bytes);
    artifacts.release(&ImageKey { manifest: Digest([2; 32]) }).await.expect("released");
    for kind in super::KINDS {
        assert_eq!(names(folder.path(), kind), 0, "{kind}");
    }
    assert_eq!(artifacts.usage(), super::Usage::default());
}

#[tokio::test]
async fn a_build_that_was_cut_short_goes_on_with_its_layers() {
    let (folder, keys) = (tempfile::tempdir().expect("a folder"), keys());
    let (artifacts, _) = open(folder.path(), &keys).await;
    artifacts.begin(record(1, &[1, 2])).await.expect("begun");
    let (statement, parts) = layer(1);
    artifacts.put_layer(&statement, parts).await.expect("kept");
    // A crash in the middle of the next layer leaves artifacts without a record, and half a file.
    let stray = artifact(9, 9);
    std::fs::write(file(folder.path(), stray.id), b"anything").expect("written");
    std::fs::write(file(folder.path(), stray.id).with_extension("half#17"), b"anything").expect("written");

    let (artifacts, kept) = open(folder.path(), &keys).await;
    assert!(kept.is_empty());
    assert_eq!(artifacts.layer(LayerId([1; 32])), Some(statement));
    assert_eq!(names(folder.path(), "artifacts"), 4);
    build(&artifacts, 1, &[1, 2]).await;
    assert_eq!(open(folder.path(), &keys).await.1.len(), 1);
}

#[tokio::test]
async fn a_build_that_nobody_goes_on_with_loses_its_layers() {
    let (folder, keys) = (tempfile::tempdir().expect("a folder"), keys());
    let (artifacts, _) = open(folder.path(), &keys).await;
    artifacts.begin(record(1, &[1])).await.expect("begun");
    let (statement, parts) = layer(1);
    artifacts.put_layer(&statement, parts).await.expect("kept");
    let later = UnixMillis(NOW.0 + super::UNFINISHED_KEPT.as_millis() as u64 + 1);
    assert_eq!(artifacts.unfinished(later).len(), 1);
    let (artifacts, _) = open_with(folder.path(), &keys, ArtifactSettings::default(), later).await.expect("opened");
    assert_eq!(artifacts.usage(), super::Usage::default());
    assert_eq!(names(folder.path(), "layers") + names(folder.path(), "artifacts") + names(folder.path(), "images"), 0);
}

#[tokio::test]
async fn damage_is_found_at_the_start_and_takes_only_its_images() {
    let (folder, keys) = (tempfile::tempdir().expect("a folder"), keys());
    let (artifacts, _) = open(folder.path(), &keys).await;
    build(&artifacts, 1, &[1, 2]).await;
    build(&artifacts, 2, &[2]).await;
    let (damaged, _) = layer(1);
    std::fs::write(file(folder.path(), damaged.toc), b"rotten").expect("written");
    let (artifacts, kept) = open(folder.path(), &keys).await;
    assert!(matches!(kept.as_slice(), [Event::Kept { image, .. }] if image.manifest == Digest([2; 32])), "{kept:?}");
    assert_eq!(artifacts.layer(LayerId([1; 32])), None);
    assert!(artifacts.layer(LayerId([2; 32])).is_some(), "what is right is not built again");
    assert_eq!(names(folder.path(), "statements"), 1);
    assert_eq!(names(folder.path(), "artifacts"), 4);
    build(&artifacts, 1, &[1, 2]).await;
}

#[tokio::test]
async fn damage_that_a_reader_finds_is_removed() {
    let (folder, keys) = (tempfile::tempdir().expect("a folder"), keys());
    let (artifacts, _) = open(folder.path(), &keys).await;
    build(&artifacts, 1, &[1]).await;
    let (statement, _) = layer(1);
    std::fs::write(file(folder.path(), statement.toc), hermes_image::index::wire::pack(b"other")).expect("written");
    assert!(matches!(artifacts.read(statement.toc).await, Err(ArtifactsError::Damaged { .. })));
    assert!(artifacts.list().is_empty());
    assert_eq!((names(folder.path(), "statements"), names(folder.path(), "artifacts")), (0, 0));
}

#[tokio::test]
async fn damage_is_found_while_it_is_in_use_and_said_once() {
    let (folder, keys) = (tempfile::tempdir().expect("a folder"), keys());
    let (artifacts, _) = open(folder.path(), &keys).await;
    let index = build(&artifacts, 1, &[1]).await;
    build(&artifacts, 2, &[2]).await;
    artifacts.check_some().await;
    assert!(artifacts.lost().now_or_never().is_none(), "all is right");
    // One that rots, and one that goes while a node reads it.
    std::fs::write(file(folder.path(), layer(1).0.toc), b"rotten").expect("written");
    std::fs::remove_file(file(folder.path(), layer(2).0.seek)).expect("removed");
    let read = artifacts.read_packed_range(layer(2).0.seek, 0..10).await;
    assert!(read.expect("readable").is_none());
    assert_eq!(artifacts.lost().now_or_never(), Some(ImageKey { manifest: Digest([2; 32]) }));
    artifacts.check_some().await;
    assert_eq!(artifacts.lost().now_or_never(), Some(ImageKey { manifest: Digest([1; 32]) }));
    assert!(artifacts.lost().now_or_never().is_none() && artifacts.list().is_empty());
    assert_eq!(build(&artifacts, 1, &[1]).await.artifacts, index.artifacts);
}

#[tokio::test]
async fn records_that_somebody_else_has_written_are_not_believed() {
    let (folder, keys) = (tempfile::tempdir().expect("a folder"), keys());
    let (artifacts, _) = open(folder.path(), &keys).await;
    build(&artifacts, 1, &[1]).await;
    let record = folder.path().join("images").join(format!("{}.json", Digest([1; 32]).hex()));
    let text = std::fs::read_to_string(&record).expect("text").replace("private", "public");
    std::fs::write(&record, text).expect("written");
    let (artifacts, kept) = open(folder.path(), &keys).await;
    assert!(kept.is_empty() && artifacts.list().is_empty());
    assert_eq!(names(folder.path(), "statements"), 0);
    // Another controller's keys.
    build(&artifacts, 1, &[1]).await;
    assert!(open(folder.path(), &self::keys()).await.1.is_empty());
}

#[tokio::test]
async fn the_quota_refuses_what_is_new_and_keeps_what_is_there() {
    let (folder, keys) = (tempfile::tempdir().expect("a folder"), keys());
    let (artifacts, _) = open(folder.path(), &keys).await;
    let index = build(&artifacts, 1, &[1]).await;
    let settings = ArtifactSettings { quota_bytes: Some(index.index_len_bytes + 10) };
    let (artifacts, kept) = open_with(folder.path(), &keys, settings, NOW).await.expect("opened");
    assert_eq!(kept.len(), 1);
    artifacts.begin(record(2, &[2])).await.expect("there is some room");
    let (statement, parts) = layer(2);
    let error = artifacts.put_layer(&statement, parts).await.expect_err("no room");
    assert!(matches!(error, ArtifactsError::Quota { .. }), "{error}");
    artifacts.release(&ImageKey { manifest: Digest([2; 32]) }).await.expect("released");
    assert_eq!(artifacts.usage().used_bytes, index.index_len_bytes);
}

#[tokio::test]
async fn a_folder_of_somebody_else_is_left_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::create_dir(folder.path().join("statements")).expect("made");
    let statement = folder.path().join("statements").join(format!("{}.json", Digest([1; 32]).hex()));
    std::fs::write(&statement, b"{}").expect("written");
    let error = open_with(folder.path(), &keys(), ArtifactSettings::default(), NOW).await.expect_err("refused");
    assert!(matches!(error, ArtifactsError::NotOurs { .. }), "{error}");
    assert!(statement.exists());
}

#[tokio::test]
async fn an_exchange_of_keys_signs_everything_again() {
    let (folder, first) = (tempfile::tempdir().expect("a folder"), KeySet::new(NOW));
    let document = first.to_document();
    let keys = Keys::new(first);
    let (artifacts, _) = open(folder.path(), &keys).await;
    let before = build(&artifacts, 1, &[1]).await;
    let mut both = KeySet::from_document(&document).expect("its own");
    both.rotate(NOW, OVERLAP).expect("room");
    let both_document = both.to_document();
    keys.replace(both);
    let image = ImageKey { manifest: Digest([1; 32]) };
    assert_eq!(artifacts.outdated(), std::slice::from_ref(&image));
    let again = artifacts.sign_again(&image).await.expect("signed").expect("kept");
    assert_ne!(again.statement, before.statement);
    assert!(artifacts.outdated().is_empty());
    let mut newest = KeySet::from_document(&both_document).expect("its own");
    newest.retire(UnixMillis(u64::MAX));
    assert_eq!(open(folder.path(), &Keys::new(newest)).await.1.len(), 1, "the old key is not needed any more");
}

#[tokio::test]
async fn layers_may_be_written_while_others_are_given_up() {
    let (folder, keys) = (tempfile::tempdir().expect("a folder"), keys());
    let (artifacts, _) = open(folder.path(), &keys).await;
    let artifacts = Arc::new(artifacts);
    for _ in 0..20 {
        let (a, b) = (Arc::clone(&artifacts), Arc::clone(&artifacts));
        build(&artifacts, 1, &[1, 2]).await;
        let giving_up = tokio::spawn(async move { a.release(&ImageKey { manifest: Digest([1; 32]) }).await });
        let building = tokio::spawn(async move { build(&b, 2, &[2, 3]).await });
        giving_up.await.expect("no panic").expect("released");
        let index = building.await.expect("no panic");
        for id in index.artifacts.iter() {
            assert!(artifacts.read(*id).await.expect("readable").is_some());
        }
        artifacts.release(&ImageKey { manifest: Digest([2; 32]) }).await.expect("released");
    }
    assert_eq!(artifacts.usage().used_bytes, 0);
    assert_eq!(names(folder.path(), "artifacts"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_holds_what_a_folder_does() {
    let bucket = super::s3::Bucket::start().await;
    let keys = keys();
    let open = || {
        let settings = ArtifactSettings::default();
        Artifacts::open_in("s3://bucket/hermes", bucket.environment(), settings, keys.clone(), NOW)
    };
    let (artifacts, kept) = open().await.expect("opened");
    assert!(kept.is_empty());
    let index = build(&artifacts, 1, &[1, 2]).await;
    build(&artifacts, 2, &[2]).await;
    let (artifacts, kept) = open().await.expect("opened");
    assert_eq!(kept.len(), 2);
    for id in index.artifacts.iter() {
        assert_eq!(ArtifactId::of(&artifacts.read(*id).await.expect("readable").expect("there")), *id);
        let part = artifacts.read_packed_range(*id, 2..9).await.expect("readable").expect("there");
        assert_eq!(part.len(), 7);
    }
    artifacts.release(&ImageKey { manifest: Digest([1; 32]) }).await.expect("released");
    // The marker; statement, reference and record of the image; one layer with four artifacts.
    assert_eq!(bucket.names().len(), 1 + 3 + 1 + 4, "{:?}", bucket.names());
    assert!(bucket.names().iter().all(|name| name.starts_with("hermes/")));
    assert_eq!(open().await.expect("opened").1.len(), 1);
}
