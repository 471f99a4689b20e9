//! SOCI, another lazy loader: an index of the image is made before, lies in the registry beside it, and is read from there.
//!
//! SOCI 0.4 asks for its index, and for the layers that the index leaves out, over HTTPS whatever it is told, so the registry
//! listens with TLS on a second port, by a certificate of the run's own. All else, manifests and what is read of layers, comes
//! from the first port without TLS, as in the other ways. It keeps its state in [`STATE`] whatever it is told, so that is a folder of the run's own ([`isolated::own_folder`]), and each
//! node has another one mounted there.
//!
//! Where it cannot have its index, SOCI unpacks the layers instead and says nothing. Such a start is a failure here
//! ([`Index::is_lazy`]).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, ensure};
use hermes_image::ids::Digest;
use hermes_lab::command::run;
use hermes_lab::containerds::Host;
use hermes_lab::guard::{MountGuard, ProcessGuard, ScratchDir, mounts_below, wait_for};
use hermes_lab::wires::REGISTRY;
use hermes_registry::oci::{Descriptor, Manifest};
use hermes_snapshotter::mounts;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair};
use rustix::mount::mount_bind;
use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;

use super::isolated;
use super::rig::{NODE, REGISTRY_PORT, Rig, Times, service};
use super::sample::Sample;
use super::subject::{OLD, Subject};
use super::way::Way;

/// Where the registry listens with TLS.
const TLS_PORT: u16 = 5001;
/// Where SOCI keeps its state.
const STATE: &str = "/var/lib/soci-snapshotter-grpc";
/// Where it keeps indexes and their ztocs in there, by their digests.
const CONTENT: &str = "content/blobs/sha256";
/// What containerd calls it.
const SNAPSHOTTER: &str = "soci";
/// Compressed bytes below which `soci create` indexes no layer by itself: 10 MiB (`soci create --help`).
const LAYER_MIN_BYTES: u64 = 10 << 20;
/// How long its daemon may take until it listens.
const START_MAX: Duration = Duration::from_secs(30);
/// Lines of its daemon's log in the message of a failure.
const LOG_LINES: usize = 20;
/// What of a ztoc's annotations names its layer.
const LAYER: &str = "com.amazon.soci.image-layer-digest";
/// How much of the layers that the index has may come with the pull: a lazy one needs nothing of them but their length.
const PULLED_MAX: f64 = 0.1;

/// What SOCI needs on every node.
pub(super) struct Soci {
    /// The folder of `soci` and `soci-snapshotter-grpc`.
    programs: PathBuf,
    /// The daemon's settings.
    config: PathBuf,
    /// The authority that has signed the registry's certificate.
    authority: PathBuf,
    /// By the subjects' names.
    indexes: BTreeMap<String, Index>,
}

/// An image's index.
#[derive(Debug, PartialEq)]
struct Index {
    digest: Digest,
    /// How many of the image's layers it has. SOCI leaves out what is small, and what is compressed with zstd.
    layers: usize,
    /// Their compressed bytes.
    indexed_bytes: u64,
    /// What a pull needs: the configuration, the index, and the layers that it leaves out.
    needed_bytes: u64,
}

impl Index {
    /// The index `digest` over `image`, with the ztocs in the manifest `index`.
    fn new(digest: Digest, index: &Manifest, image: &Manifest) -> Self {
        let name = |ztoc: &Descriptor| ztoc.annotations.get(LAYER)?.parse::<Digest>().ok();
        let names: Vec<Digest> = index.layers.iter().filter_map(name).collect();
        let (mut indexed_bytes, mut needed_bytes) = (0, image.config.size);
        for layer in &image.layers {
            *(if names.contains(&layer.digest) { &mut indexed_bytes } else { &mut needed_bytes }) += layer.size;
        }
        needed_bytes += index.layers.iter().map(|ztoc| ztoc.size).sum::<u64>();
        Self { digest, layers: index.layers.len(), indexed_bytes, needed_bytes }
    }

    /// Makes sure that SOCI did not unpack what it has an index of, by how many layers it shows lazily and by the bytes of blobs
    /// that it fetched with the pull.
    fn is_lazy(&self, lazy_layers: usize, pulled_bytes: u64) -> anyhow::Result<()> {
        let indexed = self.layers;
        ensure!(
            lazy_layers == indexed,
            "SOCI shows {lazy_layers} of the {indexed} layers lazily that its index has, and has unpacked the others"
        );
        let of_them_bytes = pulled_bytes.saturating_sub(self.needed_bytes);
        ensure!(
            of_them_bytes as f64 <= self.indexed_bytes as f64 * PULLED_MAX,
            "the pull fetched {of_them_bytes} of the {} bytes that SOCI has an index of, which is not lazy",
            self.indexed_bytes
        );
        Ok(())
    }
}

/// A node with SOCI. Dropping it ends it, and nothing of it is left.
struct Node {
    // In this order: containers first, then what shows their files.
    host: Host,
    _daemon: ProcessGuard,
    _state: State,
    log: PathBuf,
}

impl Node {
    /// The end of what its daemon has written: it tells of every layer, and an error says why.
    fn log(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
    }
}

/// An empty [`STATE`], on the disk that is measured.
struct State {
    _dir: ScratchDir,
}

impl State {
    fn new() -> anyhow::Result<Self> {
        let dir = ScratchDir::new("soci")?;
        mount_bind(dir.path(), STATE).with_context(|| format!("mount a folder on {STATE}"))?;
        Ok(Self { _dir: dir })
    }
}

impl Drop for State {
    fn drop(&mut self) {
        match mounts_below(Path::new(STATE)) {
            Ok(mounts) => mounts.into_iter().rev().for_each(|target| drop(MountGuard::adopt(target))),
            Err(error) => eprintln!("guard: cannot read the mount table: {error:#}"),
        }
    }
}

impl Rig {
    /// Has the registry listen with TLS, and puts an index of each subject into it.
    pub(super) fn prepare_soci(&mut self, programs: PathBuf, subjects: &[Subject]) -> anyhow::Result<()> {
        isolated::own_folder(Path::new(STATE))?;
        let authority = self.work.join("soci-authority.pem");
        let tls = Arc::new(certified(&authority)?);
        let (listener, served) = (self.listen(TLS_PORT)?, self.registry.clone());
        tokio::spawn(async move { served.serve_tls(listener, tls, std::future::pending()).await });
        self.write_hosts(TLS_PORT)?;
        let config = self.work.join("soci.toml");
        fs::write(
            &config,
            format!(
                "[[resolver.host.\"{REGISTRY}:{TLS_PORT}\".mirrors]]\nhost = \"{REGISTRY}:{REGISTRY_PORT}\"\ninsecure = true\n"
            ),
        )?;
        let mut soci = Soci { programs, config, authority, indexes: BTreeMap::new() };
        for subject in subjects {
            eprintln!("{}: making its SOCI index", subject.name);
            let index = self.soci_index(&soci, subject).with_context(|| format!("a SOCI index of {}", subject.name))?;
            soci.indexes.insert(subject.name.clone(), index);
        }
        self.soci = Some(soci);
        Ok(())
    }

    /// Makes the index of the old version, on a node that has pulled it, and puts it into the registry.
    fn soci_index(&self, soci: &Soci, subject: &Subject) -> anyhow::Result<Index> {
        let (image, program) = (self.reference(subject, OLD), soci.programs.join("soci"));
        let _state = State::new()?;
        let host = self.plain_host()?;
        let containerd = self.containerd(&host)?;
        let mut fetch = self.client(&self.programs.join("ctr"), &containerd);
        run(fetch.args(["content", "fetch", "--hosts-dir", self.hosts()?, &image]))?;
        let mut create = self.client(&program, &containerd);
        create.arg("create");
        let pulled = subject.image()?;
        if pulled.layers.iter().all(|layer| layer.size < LAYER_MIN_BYTES) {
            // An index without any layer is none.
            create.args(["--min-layer-size", "0"]);
        }
        run(create.arg(&image))?;
        let listed = run(self.client(&program, &containerd).args(["index", "list", "--quiet", "--ref", &image]))?;
        let listed = String::from_utf8(listed).context("a list of indexes that is no text")?;
        let digest = listed.trim().parse().with_context(|| format!("'{listed}' is not the name of one index"))?;
        subject.add_blobs(&Path::new(STATE).join(CONTENT))?;
        Ok(Index::new(digest, &subject.manifest(&digest)?, &pulled))
    }

    /// A node that has nothing, with SOCI's daemon.
    fn soci_node(&self, soci: &Soci) -> anyhow::Result<Node> {
        let (state, host) = (State::new()?, self.plain_host()?);
        let (socket, log) = (host.root().join("run/soci.sock"), host.root().join("soci.log"));
        let plugin = format!(
            "\n[proxy_plugins.{SNAPSHOTTER}]\ntype = \"snapshot\"\naddress = \"{}\"\n\
             [proxy_plugins.{SNAPSHOTTER}.exports]\nenable_remote_snapshot_annotations = \"true\"\n",
            socket.display()
        );
        fs::write(host.config(), host.default_config()? + &plugin)?;
        let mut command = self.wires.node(NODE).command(soci.programs.join("soci-snapshotter-grpc"));
        command.arg("--address").arg(&socket).arg("--config").arg(&soci.config).env("SSL_CERT_FILE", &soci.authority);
        let file = File::create(&log)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let daemon = ProcessGuard::start(&mut command)?;
        let node = Node { host, _daemon: daemon, _state: state, log };
        wait_for("SOCI's daemon", START_MAX, || UnixStream::connect(&socket).ok()).with_context(|| node.log())?;
        Ok(node)
    }

    /// SOCI pulls, and shows what it has an index of lazily.
    pub(super) fn soci_start(&self, subject: &Subject) -> anyhow::Result<Vec<Sample>> {
        let soci = self.soci.as_ref().context("SOCI was not prepared")?;
        let index = soci.indexes.get(&subject.name).context("the image has no SOCI index")?;
        let node = self.soci_node(soci)?;
        let containerd = self.containerd(&node.host)?;
        let (image, digest) = (format!("{REGISTRY}:{TLS_PORT}/{}:{OLD}", subject.name), index.digest.to_string());
        let mut pull = self.client(&soci.programs.join("soci"), &containerd);
        pull.args(["image", "rpull", "--hosts-dir", self.hosts()?, "--soci-index-digest", &digest, &image]);
        self.drop_caches(subject, false)?;
        let (before, begun) = (self.sent()?, Instant::now());
        run(&mut pull).with_context(|| node.log())?;
        let (ready, pulled_bytes) = (Instant::now(), self.blob_bytes_since(before));
        let container = service(&image, SNAPSHOTTER).start(&containerd, "service").with_context(|| node.log())?;
        let started = Instant::now();
        let answered = self.wait_for_answer(subject.port).with_context(|| node.log())?;
        let sample = self.sample(subject, Way::Soci, Times { begun, ready, started, answered }, before)?;
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        index.is_lazy(lazy_layers(&mounts), pulled_bytes).with_context(|| node.log())?;
        drop(container);
        Ok(vec![sample])
    }
}

/// A certificate of the registry's address for its server, by an authority that is written to a file.
fn certified(authority: &Path) -> anyhow::Result<ServerConfig> {
    let (root_key, key) = (KeyPair::generate()?, KeyPair::generate()?);
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "hermes bench start");
    let root = params.self_signed(&root_key)?;
    let certificate = CertificateParams::new(vec![REGISTRY.to_string()])?.signed_by(&key, &root, &root_key)?;
    fs::write(authority, root.pem()).with_context(|| authority.display().to_string())?;
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(|error| anyhow!(error))?;
    Ok(ServerConfig::builder().with_no_client_auth().with_single_cert(vec![certificate.der().clone()], key)?)
}

/// How many layers SOCI shows lazily, by a mount table: it mounts each of them by FUSE.
fn lazy_layers(table: &str) -> usize {
    let is_layer = |(place, kind): &(PathBuf, String)| kind.starts_with("fuse") && place.starts_with(STATE);
    mounts::types_in(table).into_iter().filter(is_layer).count()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn lazy_layers_are_those_that_soci_mounts() {
        let table = "\
22 1 254:1 / / rw,relatime - ext4 /dev/vda rw
90 22 254:1 /var/tmp/x /var/lib/soci-snapshotter-grpc rw,relatime - ext4 /dev/vda rw
91 90 0:50 / /var/lib/soci-snapshotter-grpc/snapshotter/snapshots/1/fs rw,nosuid,nodev,relatime shared:1 - fuse.rawBridge soci rw
92 90 0:51 / /var/lib/soci-snapshotter-grpc/snapshotter/snapshots/2/fs rw,nosuid,nodev,relatime - fuse.rawBridge soci rw
93 22 0:52 / /var/lib/other rw,nosuid,nodev,relatime - fuse.rawBridge soci rw
94 22 0:53 / /run/x/rootfs rw,relatime - overlay overlay rw,lowerdir=/var/lib/soci-snapshotter-grpc/snapshotter/snapshots/1/fs
";
        assert_eq!(lazy_layers(table), 2);
        assert_eq!(lazy_layers(""), 0);
    }

    fn blob(name: u8, size: u64) -> serde_json::Value {
        json!({"mediaType": "application/octet-stream", "digest": Digest([name; 32]), "size": size})
    }

    fn manifest(layers: &[serde_json::Value]) -> Manifest {
        let manifest = json!({"schemaVersion": 2, "config": blob(9, 10), "layers": layers});
        serde_json::from_value(manifest).expect("a manifest")
    }

    #[test]
    fn an_index_says_what_a_lazy_pull_needs() {
        let ztoc = |layer: u8, size| {
            let mut ztoc = blob(layer + 100, size);
            ztoc["annotations"] = json!({ LAYER: Digest([layer; 32]) });
            ztoc
        };
        let image = manifest(&[blob(1, 5000), blob(2, 300), blob(3, 1000)]);
        let index = Index::new(Digest([7; 32]), &manifest(&[ztoc(1, 50), ztoc(3, 10)]), &image);
        // Configuration, ztocs, and the layer that is in none of them.
        let expected = Index { digest: Digest([7; 32]), layers: 2, indexed_bytes: 6000, needed_bytes: 10 + 60 + 300 };
        assert_eq!(index, expected);
        assert!(index.is_lazy(2, 370).is_ok());
        let error = index.is_lazy(1, 370).expect_err("a layer was unpacked").to_string();
        assert!(error.contains("1 of the 2 layers"), "{error}");
        let error = index.is_lazy(2, 6370).expect_err("all came").to_string();
        assert!(error.contains("6000 of the 6000 bytes"), "{error}");
    }
}
