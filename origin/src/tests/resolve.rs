//! From names to images, and what is refused on the way.

use std::path::Path;

use hermes_image::ids::{DiffId, Digest};
use hermes_registry::oci::{Descriptor, Platform, media_type};
use hermes_registry::{Auth, LayoutWriter, WrittenLayer};
use http::header::HeaderName;
use serde_json::{Value, json};

use super::harness::{Fault, Rig, amd64, assert_complete, soon};
use crate::credentials::CredentialsConfig;
use crate::{ErrorClass, ImageSource, OriginClient, OriginConfig, OriginError, ResolvedImage, Timeouts};

async fn resolve(source: &str, platform: &Platform) -> Result<ResolvedImage, OriginError> {
    let source: ImageSource = source.parse().expect("a source");
    let docker_config = Some("/nonexistent/config.json".into());
    let credentials = CredentialsConfig { docker_config, ..CredentialsConfig::default() };
    let config = OriginConfig { credentials, hosts_dir: None, ..OriginConfig::default() };
    let client = OriginClient::new(config).expect("a client");
    client.open(&source).await?.resolve(platform, soon()).await
}

fn platform(text: &str) -> Platform {
    text.parse().expect("a platform")
}

fn write_images(writer: &LayoutWriter, platforms: &[&str]) -> Vec<Descriptor> {
    let layer = |text: &str| writer.layer_tar(text.as_bytes()).expect("a layer");
    let image =
        |name: &&str| writer.image(&platform(name), &json!({ "Env": [name] }), &[layer(name)]).expect("an image");
    platforms.iter().map(image).collect()
}

#[tokio::test]
async fn registry_and_layout_agree() {
    let rig = Rig::new(Auth::Open).await;
    let writer = LayoutWriter::create(rig.layout()).expect("the layout");
    let images = write_images(&writer, &["linux/amd64", "linux/arm64", "linux/arm/v7"]);
    let index = writer.index(images.clone()).expect("an index");
    writer.tag(index.clone(), "multi").expect("tagged");
    for (wanted, expected) in [("linux/amd64", 0), ("linux/arm64/v8", 1), ("linux/arm/v7", 2)] {
        let folder = rig.layout();
        let sources = [
            format!("{}/any:multi", rig.server.address),
            format!("{}/any@{}", rig.server.address, index.digest),
            format!("oci:{}:multi", folder.display()),
            format!("oci:{}@{}", folder.display(), index.digest),
        ];
        let mut found = Vec::new();
        for source in &sources {
            let image = resolve(source, &platform(wanted)).await.unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(image.reference, *source);
            assert_eq!((image.target_digest, image.manifest_digest), (index.digest, images[expected].digest));
            assert_eq!(image.layers.len(), 1);
            assert_eq!(image.layers[0].layer.0, image.layers[0].diff_id.0, "an uncompressed layer");
            found.push(ResolvedImage { reference: String::new(), ..image });
        }
        assert!(found.windows(2).all(|pair| pair[0] == pair[1]));
    }
    for source in [format!("{}/any:multi", rig.server.address), format!("oci:{}:multi", rig.layout().display())] {
        let error = resolve(&source, &platform("linux/s390x")).await.expect_err("no such platform");
        assert_eq!((error.class(), error.kind()), (ErrorClass::NotFound, "platform_missing"));
        let text = error.to_string();
        assert!(text.contains("no image for linux/s390x; it has linux/amd64, linux/arm64, linux/arm/v7"), "{text}");
        assert!(text.contains("--platform"), "{text}");
    }
}

#[tokio::test]
async fn a_single_image_of_another_platform_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let writer = LayoutWriter::create(folder.path()).expect("a layout");
    let image = write_images(&writer, &["linux/arm64"]).remove(0);
    writer.tag(image, "v1").expect("tagged");
    let error = resolve(&format!("oci:{}", folder.path().display()), &amd64()).await.expect_err("arm64 only");
    assert!(error.to_string().contains("it has linux/arm64"), "{error}");
}

/// Writes `manifest` over `config` as it stands, and resolves it.
async fn resolve_documents(folder: &Path, config: &Value, manifest: impl FnOnce(&Descriptor) -> Value) -> String {
    let writer = LayoutWriter::create(folder).expect("a layout");
    let config = writer.document(media_type::OCI_CONFIG, config.to_string().as_bytes()).expect("a configuration");
    let manifest = manifest(&config);
    let entry = writer.document(media_type::OCI_MANIFEST, manifest.to_string().as_bytes()).expect("a manifest");
    writer.tag(entry, "v1").expect("tagged");
    let source = format!("oci:{}:v1", folder.display());
    let error = resolve(&source, &amd64()).await.expect_err("not usable");
    let text = error.to_string();
    assert!(text.starts_with(&format!("image {source} from {}: ", folder.display())), "{text}");
    text
}

fn layer(media_type: &str) -> Value {
    json!({ "mediaType": media_type, "digest": Digest([9; 32]), "size": 10 })
}

#[tokio::test]
async fn what_is_no_usable_image_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = json!({ "os": "linux", "architecture": "amd64", "rootfs": { "diff_ids": [DiffId([1; 32])] } });
    let with_layers =
        |layers: Value| move |config: &Descriptor| json!({ "schemaVersion": 2, "config": config, "layers": layers });
    let foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
    let restricted = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip";
    let gzip = media_type::OCI_LAYER_GZIP;
    let cases = [
        (json!([layer(foreign)]), "may not be distributed by registries"),
        (json!([layer(restricted)]), "may not be distributed by registries"),
        (json!([layer("application/vnd.other")]), "of the unknown type 'application/vnd.other'"),
        (json!([]), "the manifest has 0 layers, its configuration 1"),
        (json!([layer(gzip), layer(gzip)]), "the manifest has 2 layers, its configuration 1"),
        (json!([{ "mediaType": gzip, "digest": "sha512:00", "size": 1 }]), "'sha512:00' is not a sha256 digest"),
        (json!("x"), "the manifest is malformed"),
    ];
    for (layers, expected) in cases {
        let text = resolve_documents(folder.path(), &config, with_layers(layers)).await;
        assert!(text.contains(expected) && text.contains("; "), "{text}");
    }
    let schema1 = |_: &Descriptor| json!({ "schemaVersion": 1, "name": "app", "fsLayers": [] });
    let text = resolve_documents(folder.path(), &config, schema1).await;
    assert!(text.contains("schema 1' is not supported"), "{text}");
    let chart = |config: &Descriptor| {
        let config = Descriptor { media_type: "application/vnd.cncf.helm.config.v1+json".to_owned(), ..config.clone() };
        json!({ "schemaVersion": 2, "config": config, "layers": [] })
    };
    let text = resolve_documents(folder.path(), &config, chart).await;
    assert!(text.contains("not a container image") && text.contains("helm"), "{text}");
    let text = resolve_documents(folder.path(), &json!({ "rootfs": 7 }), with_layers(json!([]))).await;
    assert!(text.contains("the configuration is malformed"), "{text}");
    let text = resolve_documents(folder.path(), &config, |_| json!({ "schemaVersion": 2 })).await;
    assert!(text.contains("neither an index nor a manifest"), "{text}");
}

#[tokio::test]
async fn an_image_without_layers_is_an_image() {
    let folder = tempfile::tempdir().expect("a folder");
    let writer = LayoutWriter::create(folder.path()).expect("a layout");
    let image = writer.image(&amd64(), &json!({}), &Vec::<WrittenLayer>::new()).expect("an image");
    writer.tag(image, "v1").expect("tagged");
    let image = resolve(&format!("oci:{}", folder.path().display()), &amd64()).await.expect("an image");
    assert!(image.layers.is_empty());
}

#[tokio::test]
async fn indexes_in_indexes_end() {
    let folder = tempfile::tempdir().expect("a folder");
    let writer = LayoutWriter::create(folder.path()).expect("a layout");
    let mut entry = write_images(&writer, &["linux/amd64"]).remove(0);
    for depth in 1..=4 {
        entry = Descriptor { platform: Some(amd64()), ..writer.index(vec![entry]).expect("an index") };
        writer.tag(entry.clone(), "v1").expect("tagged");
        let result = resolve(&format!("oci:{}", folder.path().display()), &amd64()).await;
        assert_eq!(result.is_ok(), depth < 4, "{depth} indexes");
    }
}

#[tokio::test]
async fn documents_that_are_not_what_they_are_called_are_refused() {
    let rig = Rig::new(Auth::Open).await;
    let other = r#"{"schemaVersion":2,"manifests":[]}"#;
    let pinned = format!("{}/app@{}", rig.server.address, rig.manifest);
    rig.server.plan(move |_| Fault::Answer(http::StatusCode::OK, Vec::new(), other.to_owned()));
    let error = resolve(&pinned, &amd64()).await.expect_err("another manifest");
    assert_eq!((error.class(), error.kind()), (ErrorClass::PeerFault, "wrong_digest"));
    assert_complete(&error, &pinned, None, &rig.server.address.to_string());

    // By tag, the server's own word for the digest must be true.
    let named = rig.manifest.to_string();
    rig.server.plan(move |_| {
        let answer = Fault::Answer(http::StatusCode::OK, Vec::new(), other.to_owned());
        answer.with(HeaderName::from_static("docker-content-digest"), &named)
    });
    assert_eq!(resolve(&rig.image(), &amd64()).await.expect_err("another digest").kind(), "wrong_digest");

    // A configuration that was changed on the way.
    rig.server.plan_blobs(|_| Fault::Answer(http::StatusCode::OK, Vec::new(), "{}".to_owned()));
    let error = resolve(&rig.image(), &amd64()).await.expect_err("another configuration");
    assert!(error.to_string().contains("the configuration has the digest"), "{error}");

    // A body without end.
    rig.server.plan(|_| Fault::Answer(http::StatusCode::OK, Vec::new(), "x".repeat(5 << 20)));
    assert_eq!(resolve(&rig.image(), &amd64()).await.expect_err("too long").kind(), "too_long");
}

#[tokio::test]
async fn an_unknown_image_is_not_found() {
    let rig = Rig::new(Auth::Open).await;
    let image = format!("{}/team/app:v9", rig.server.address);
    let error = resolve(&image, &amd64()).await.expect_err("no such tag");
    assert_eq!((error.class(), error.kind()), (ErrorClass::NotFound, "not_found"));
    assert_complete(&error, &image, None, &rig.server.address.to_string());
    assert!(error.to_string().contains("MANIFEST_UNKNOWN"), "{error}");
}

#[tokio::test]
async fn a_registry_that_is_not_there_is_named() {
    let rig = Rig::new(Auth::Open).await;
    // A port that was free a moment ago.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    drop(listener);
    let image = format!("{address}/app:v1");
    let client = rig.client(Timeouts::default());
    let origin = client.open(&image.parse().expect("a reference")).await.expect("an origin");
    let error = origin.resolve(&amd64(), soon()).await.expect_err("nobody there");
    assert_eq!((error.class(), error.kind()), (ErrorClass::Transient, "connect"));
    assert_complete(&error, &image, None, &address);
    assert!(error.to_string().to_lowercase().contains("connection refused"), "{error}");
}
