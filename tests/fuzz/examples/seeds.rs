//! Writes the first inputs of every target's corpus from real structures: `seeds FOLDER`.
//!
//! Tars, compressed layers and refused layers are those of `hermes_tests::odd`; everything else is made of them by the
//! code that makes it in production.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use hermes_fuzz::parts::join;
use hermes_fuzz::{INPUT_LEN_MAX_BYTES, ISSUER_SEED, STATEMENT_KEY_SEED};
use hermes_image::build::{Expect, LayerBuilder, LayerIndex, Options, SpanLimits};
use hermes_image::erofs;
use hermes_image::ids::{ArtifactId, ChunkNo, DiffId, Digest, LayerId, SpanNo};
use hermes_image::index::wire;
use hermes_image::merge::merge;
use hermes_image::runs::Runs;
use hermes_image::statement::{LayerStatement, SigningKey, Statement};
use hermes_p2p::admission::certificate::Certificate;
use hermes_p2p::admission::grants::Grant;
use hermes_p2p::admission::revocation::Revocation;
use hermes_p2p::admission::signed::Document as _;
use hermes_p2p::exchange::codec::{
    Accept, Answer, Class, Duty, Encoding, LENGTH_LEN_BYTES, PeerName, Reason, Request, Want,
};
use hermes_p2p::{ClusterId, Multiaddr, PeerId};
use hermes_policy::profile::{FirstTouch, StartRecord, TouchSource, codec, merge as merge_records};
use hermes_tests::compress::{Compression, compress};
use hermes_tests::odd;
use hermes_tests::tarball::{Entry, Tarball};
use libp2p::identity::{PublicKey, ed25519};
use sha2::{Digest as _, Sha256};

/// Chunks that the seeds of the exchange count.
const CHUNK_COUNT: u32 = 10_000;

struct Corpus {
    folder: PathBuf,
    written: BTreeSet<Vec<u8>>,
}

impl Corpus {
    fn add(&mut self, target: &str, name: &str, data: Vec<u8>) -> Result<()> {
        if data.len() > INPUT_LEN_MAX_BYTES || !self.written.insert([target.as_bytes(), &data].concat()) {
            return Ok(());
        }
        let folder = self.folder.join(target);
        fs::create_dir_all(&folder)?;
        let path = folder.join(name);
        fs::write(&path, data).with_context(|| format!("cannot write {}", path.display()))
    }
}

fn main() -> Result<()> {
    let folder = env::args_os().nth(1).context("usage: seeds FOLDER")?;
    let mut corpus = Corpus { folder: Path::new(&folder).to_owned(), written: BTreeSet::new() };
    for image in odd::images(1) {
        let mut tables = Vec::new();
        for (no, layer) in image.layers.iter().enumerate() {
            let name = format!("{}-{no}", image.tag);
            tars(&mut corpus, &name, &layer.tar)?;
            if layer.tar.len() > 4 * INPUT_LEN_MAX_BYTES {
                continue;
            }
            let blob = compress(&layer.tar, &layer.compression)?;
            if let Some(index) = layer_of(&mut corpus, &name, &blob, &layer.tar)? {
                tables.push(index.toc);
            }
        }
        let Ok(tree) = merge(&tables) else { continue };
        if let Ok(image_bytes) = erofs::write(&tree) {
            corpus.add("erofs_reader", &image.tag, image_bytes)?;
        }
        let few: Vec<&[u8]> = tables.iter().take(3).map(|toc| toc.bytes().as_ref()).collect();
        if !few.is_empty() {
            let mut parts = few.clone();
            parts.resize(3, &[]);
            corpus.add("merge", &image.tag, [&[few.len() as u8 - 1], join(&parts).as_slice()].concat())?;
        }
    }
    for refused in odd::refused(1) {
        tars(&mut corpus, refused.tag, &refused.tar)?;
    }
    spans(&mut corpus)?;
    sets(&mut corpus)?;
    statements(&mut corpus)?;
    profiles(&mut corpus)?;
    guesses(&mut corpus)?;
    messages(&mut corpus)?;
    documents(&mut corpus)?;
    members(&mut corpus)
}

fn tars(corpus: &mut Corpus, name: &str, tar: &[u8]) -> Result<()> {
    let cut = &tar[..tar.len().min(5 * 1024)];
    corpus.add("tar", name, cut.to_vec())?;
    corpus.add("tar_pushes", name, [&[1; 8], &cut[..cut.len().min(2048)]].concat())?;
    corpus.add("layer_builder", &format!("sealed-{name}"), [&[5], &cut[..cut.len().min(2048)]].concat())
}

fn index_of(blob: &[u8], tar: &[u8]) -> Result<LayerIndex> {
    let layer = LayerId(Sha256::digest(blob).into());
    let diff_id = DiffId(Sha256::digest(tar).into());
    let expect = Expect { layer, diff_id, compressed_len_bytes: blob.len() as u64 };
    let spans = SpanLimits { min_len_bytes: 32 * 1024, max_len_bytes: 64 * 1024, joined_len_bytes: 96 * 1024 };
    let mut builder = LayerBuilder::new(expect, Options { threads: 1, spans, ..Options::default() })?;
    builder.push(blob)?;
    Ok(builder.finish()?)
}

/// Everything that is made of one layer.
fn layer_of(corpus: &mut Corpus, name: &str, blob: &[u8], tar: &[u8]) -> Result<Option<LayerIndex>> {
    let target = match blob.get(..2) {
        Some([0x1f, 0x8b]) => "inflate_gzip",
        Some([0x28, 0xb5]) => "inflate_zstd",
        _ => "tar",
    };
    if target != "tar" && blob.len() <= 6 * 1024 {
        corpus.add(target, name, [&[1; 4], blob].concat())?;
    }
    if blob.len() <= 6 * 1024 {
        corpus.add("layer_builder", name, [&[0], blob].concat())?;
    }
    let Ok(index) = index_of(blob, tar) else { return Ok(None) };
    corpus.add("toc", name, index.toc.bytes().to_vec())?;
    corpus.add("chunk_table", name, index.chunks.bytes().to_vec())?;
    corpus.add("seek_table", name, index.seek.bytes().to_vec())?;
    corpus.add("wire", name, wire::pack(index.toc.bytes()))?;
    Ok(Some(index))
}

/// Layers of several spans, in every compression.
fn spans(corpus: &mut Corpus) -> Result<()> {
    let text: Vec<u8> = (0..30_000_u64).flat_map(|line| format!("line {}\n", line % 977).into_bytes()).collect();
    let tar = Tarball::of([Entry::file("text", text), Entry::file("small", *b"and little")]);
    for (no, kind) in Compression::all().into_iter().enumerate() {
        let blob = compress(&tar, &kind)?;
        let index = index_of(&blob, &tar)?;
        corpus.add("seek_table", &format!("spans-{no}"), index.seek.bytes().to_vec())?;
        corpus.add("chunk_table", &format!("spans-{no}"), index.chunks.bytes().to_vec())?;
        if let Some(name) = (blob.len() <= 24 * 1024).then(|| format!("spans-{no}")) {
            corpus.add("layer_builder", &name, [&[0], blob.as_slice()].concat())?;
        }
        for span in (0..index.seek.count()).take(3) {
            let window = index.seek.window_range(SpanNo(span));
            let blob_range = index.seek.blob_range(span..span + 1);
            let parts = join(&[
                index.seek.bytes(),
                index.chunks.bytes(),
                &index.windows[window.start as usize..window.end as usize],
                &blob[blob_range.start as usize..blob_range.end as usize],
            ]);
            if parts.len() <= 12 * 1024 {
                corpus.add(
                    "span_decoder",
                    &format!("spans-{no}-{span}"),
                    [&[span as u8, 1, 99], parts.as_slice()].concat(),
                )?;
            }
        }
    }
    Ok(())
}

fn sets(corpus: &mut Corpus) -> Result<()> {
    let sets =
        [Runs::new(), Runs::one(0..1), Runs::one(5..9000), (0..40).map(|no| no * 100..no * 100 + no + 1).collect()];
    for (no, set) in sets.iter().enumerate() {
        let mut data = CHUNK_COUNT.to_le_bytes().to_vec();
        data.push(255);
        set.encode(&mut data);
        sets[sets.len() - 1 - no].encode(&mut data);
        corpus.add("runs", &format!("set-{no}"), data)?;
    }
    Ok(())
}

/// Commands of every kind that is known, with what they run.
fn guesses(corpus: &mut Corpus) -> Result<()> {
    // This program: a real ELF file, cut after its headers.
    let elf = fs::read(env::current_exe()?)?;
    let elf = &elf[..elf.len().min(4 << 10)];
    let shell = br#"#!/bin/sh
if [ -z "${APP}" ]; then . "$(dirname "$0")"/one.py; else JARS="${APP%/*}/jars"; fi
case "${1#-}" in x|y*) set -- a "$@" ;; *) exec "${RUNNER:-java}" -cp "$JARS/*" Main "$@" ;; esac
run() { for f in /bin/*; do [ -x "$f" ] && C+=("$f"); done; while read -r X; do a "$X"; done < <(a "$@" | a); }
run x && exec "${C[@]:0:2}" || [[ $X == a* && ! -f /x ]]
"#;
    let cases: [(&str, &str, [&[u8]; 3]); 6] = [
        ("elf", "a -x\nLD_LIBRARY_PATH=/lib:/app", [elf, elf, elf]),
        ("shell", "/app/main -x\nAPP=/app/x", [shell, b"", b"export JARS=/app/jars\nreturn 0\n"]),
        ("shell-c", "sh -c a;exec<<E\n", [b"", b"#!/bin/a", b""]),
        (
            "python",
            "python3 -m main\nPYTHONPATH=/app",
            [b"import one, os as o\nfrom . import x\n", b"", b"import main.a\n"],
        ),
        (
            "node",
            "node /app/main.js",
            [b"const p = require('p');\nimport './main.py'", br#"{"main": "index"}"#, b"require('..')"],
        ),
        ("java", "java -Xmx1g -cp jars/*:/app/main Main", [b"", b"PK", b""]),
    ];
    for (name, command, contents) in cases {
        let [run, runner, needed] = contents;
        corpus.add("guess", name, join(&[command.as_bytes(), run, runner, needed]))?;
    }
    Ok(())
}

/// Starts of three shapes, one by one and together, and what is made of them.
fn profiles(corpus: &mut Corpus) -> Result<()> {
    let start = |no: u32| {
        let touches = (0..40 * (no + 1)).map(|at| FirstTouch {
            at_ms: at * 7,
            layer: (at % 3) as u16,
            // The first and the last have most in common.
            chunk: (at * 37 + no % 2) % 5000,
            waited: at % 2 == 0,
            source: TouchSource::ALL[(at % 4) as usize],
        });
        StartRecord::of(1_700_000_000 + u64::from(no), (1..4).map(|no| DiffId([no; 32])).collect(), touches.collect())
    };
    let records: Vec<_> = (0..3).map(start).collect();
    for (no, record) in records.iter().enumerate() {
        corpus.add("start_profile", &format!("record-{no}"), codec::encode_record(record))?;
    }
    corpus.add("start_profile", "records", codec::encode_records(&records))?;
    for count in 1..=3 {
        let profile = merge_records(&records[..count]).context("records without anything in common")?;
        corpus.add("start_profile", &format!("profile-of-{count}"), codec::encode(&profile))?;
    }
    Ok(())
}

fn statements(corpus: &mut Corpus) -> Result<()> {
    let artifact = |no: u8| ArtifactId([no; 32]);
    let layer = |no: u8| LayerStatement {
        layer: LayerId([no; 32]),
        diff_id: DiffId([no; 32]),
        blob_len_bytes: 12_345,
        logical_len_bytes: 54_321,
        toc: artifact(1),
        chunks: artifact(2),
        seek: artifact(3),
        windows: artifact(4),
    };
    for (name, layers) in [("no-layers", Vec::new()), ("two-layers", vec![layer(7), layer(8)])] {
        let statement = Statement::new(Digest([0x11; 32]), "linux/arm64/v8".to_owned(), layers);
        let signed = SigningKey::from_seed(&STATEMENT_KEY_SEED).sign(&statement);
        corpus.add("statement", &format!("signed-{name}"), signed)?;
        corpus.add("statement", &format!("text-{name}"), serde_json::to_vec(&statement)?)?;
    }
    Ok(())
}

fn messages(corpus: &mut Corpus) -> Result<()> {
    let (layer, table) = (DiffId([1; 32]), ArtifactId([2; 32]));
    let chunks: Runs = [0..3, 10..11, 700..900].into_iter().collect();
    let get = |class, accept, want, extent| Request::Get {
        layer,
        table,
        class,
        accept,
        want,
        extent,
        chunks: chunks.clone(),
    };
    let owner = |duty, again| Want::Owner { duty, again, can_read: !again };
    let requests = [
        Request::Hello { version: 1 },
        Request::Have { layer, table },
        get(Class::Demand, Accept::Plain, Want::Here, 0..0),
        get(Class::Prefetch, Accept::Zstd, owner(Duty::Zone, false), 0..1000),
        Request::Artifact { id: table, offset: 3, len: 70_000 },
        Request::Statement { manifest: Digest([3; 32]) },
        Request::Profile { manifest: Digest([4; 32]) },
        Request::Watch { layer, table },
        get(Class::Demand, Accept::Zstd, Want::Here, 64..128),
        get(Class::Demand, Accept::Zstd, owner(Duty::Cluster, true), 0..900),
        Request::Grant { grant: Bytes::from_static(b"may read layer 1") },
    ];
    // The same at every run: the hash of a key that nobody has.
    let peer = |seed: u8| PeerId::from_bytes(&[&[0x12, 32], [seed; 32].as_slice()].concat());
    let address = |text: &str| text.parse::<Multiaddr>();
    let far = PeerName {
        peer: peer(5)?,
        addresses: vec![address("/ip4/10.0.0.7/tcp/4100")?, address("/ip6/fd00::7/tcp/4100")?],
    };
    let unknown = PeerName { peer: peer(6)?, addresses: Vec::new() };
    let answers = [
        Answer::Hello { version: 1 },
        Answer::HaveMap { cut_short: true, chunks: chunks.clone() },
        Answer::HaveMore { chunks: chunks.clone() },
        Answer::Data { chunk: ChunkNo(9), encoding: Encoding::Zstd, body: Bytes::from_static(b"a chunk") },
        Answer::Lacks { chunks: chunks.clone() },
        Answer::Blob { total_len_bytes: 1 << 33 },
        Answer::Piece { body: Bytes::from_static(b"a piece") },
        Answer::End,
        Answer::NotFound,
        Answer::Busy { retry_after_ms: 250 },
        Answer::Denied,
        Answer::Error { reason: Reason::Flood },
        Answer::Pending { eta_ms: 20, registry_rests_ms: 3000 },
        Answer::Refer { chunks: chunks.clone(), peers: vec![unknown, far] },
        Answer::Delegate { chunks },
        Answer::NotMine { epoch: 7 },
    ];
    let mut add = |name: String, encode: &dyn Fn(&mut Vec<u8>)| {
        let mut frame = Vec::new();
        encode(&mut frame);
        let data = [&CHUNK_COUNT.to_le_bytes(), &frame[LENGTH_LEN_BYTES..]].concat();
        corpus.add("exchange_codec", &name.to_lowercase(), data)
    };
    for (no, request) in requests.iter().enumerate() {
        add(format!("request-{no}-{}", request.name()), &|out| request.encode(out))?;
    }
    for (no, answer) in answers.iter().enumerate() {
        add(format!("answer-{no}-{}", answer.name()), &|out| answer.encode(out))?;
    }
    Ok(())
}

/// The same key at every run.
fn pair(seed: [u8; 32]) -> Result<ed25519::Keypair> {
    Ok(ed25519::SecretKey::try_from_bytes(seed)?.into())
}

fn documents(corpus: &mut Corpus) -> Result<()> {
    let issuer = pair(ISSUER_SEED)?;
    let peer = |seed: u8| anyhow::Ok(PublicKey::from(pair([seed; 32])?.public()).to_peer_id());
    let (start, hour) = (1_700_000_000, 3600);
    for (cluster, zone) in [("prod", ""), ("prod", "rack-1"), ("a-cluster-of-another-name", "eu-west-1a")] {
        let cluster: ClusterId = cluster.parse()?;
        let name = format!("{cluster}-{}", if zone.is_empty() { "no-zone" } else { zone });
        let (not_before, not_after) = (start, start + hour);
        let said = Certificate {
            cluster: cluster.clone(),
            peer: peer(1)?,
            zone: zone.parse()?,
            epoch: 3,
            not_before,
            not_after,
        };
        corpus.add("certificate", &name, said.sign(&issuer).encode())?;
        let said = Grant { cluster: cluster.clone(), peer: peer(2)?, layer: DiffId([7; 32]), not_after };
        corpus.add("grant", &name, said.sign(&issuer).encode())?;
        let mut last = None;
        for seed in 1..=3 {
            let notice = Revocation::with(&cluster, last.as_ref(), &peer(seed)?, start).context("a notice")?;
            corpus.add("revocation", &format!("{name}-{seed}"), notice.clone().sign(&issuer).encode())?;
            last = Some(notice);
        }
    }
    Ok(())
}

/// What members say, written here field by field as docs/protocol.md has it: the crate makes entries of a running node
/// only.
fn members(corpus: &mut Corpus) -> Result<()> {
    let signed = |domain: &[u8], seed: u8, body: &[u8]| {
        let signature = pair([seed; 32])?.sign(&[domain, b"\x04prod", body].concat());
        anyhow::Ok([body, &signature].concat())
    };
    let entry = |seed: u8, addresses: &[&[u8]], zone: &[u8], flags: u8, certificate: &[u8]| {
        let key = pair([seed; 32])?.public().to_bytes();
        let (count, zone_len) = (addresses.len() as u8, zone.len() as u8);
        let head = [&[1], key.as_slice(), &[count], &addresses.concat(), &[zone_len], zone, &[flags]].concat();
        let body = [&head, 9_u64.to_le_bytes().as_slice(), certificate].concat();
        signed(b"hermes member entry v1\0", seed, &body)
    };
    let (four, six) = ([4, 10, 0, 0, 7, 0xa1, 0x0f], [&[6, 0xfd], [0; 15].as_slice(), &[0xa1, 0x0f]].concat());
    let certificate = [&[1], [5; 24].as_slice(), &[6; 64]].concat();
    let entries = [
        ("open", entry(1, &[&four], b"", 0, &[0])?),
        ("closed", entry(2, &[&four, &six], b"rack-1", 2, &certificate)?),
        ("drains", entry(3, &[], b"a", 1, &certificate)?),
    ];
    for (name, bytes) in &entries {
        corpus.add("member_entry", name, bytes.clone())?;
    }
    let suspicion = {
        let (target, reporter) = (pair([1; 32])?.public().to_bytes(), pair([2; 32])?.public().to_bytes());
        let body = [target.as_slice(), &9_u64.to_le_bytes(), &reporter].concat();
        signed(b"hermes member suspicion v1\0", 2, &body)?
    };
    let notice = Revocation::with(&"prod".parse()?, None, &PublicKey::from(pair([4; 32])?.public()).to_peer_id(), 5)
        .context("a notice")?;
    let notice = notice.sign(&pair(ISSUER_SEED)?).encode();
    let mut news = [&[0], (notice.len() as u32).to_le_bytes().as_slice(), &notice].concat();
    news.extend((entries.len() as u16).to_le_bytes());
    for (_, bytes) in &entries {
        news.extend((bytes.len() as u16).to_le_bytes());
        news.extend(bytes);
    }
    news.extend([&[1, 0], suspicion.as_slice(), &[1, 0], &[8; 8]].concat());
    let no_news = [0; 11];
    let greeting = [1; 24];
    let messages: [(&str, Vec<u8>); 5] = [
        ("greeting", [&[1], greeting.as_slice()].concat()),
        ("same", vec![2]),
        ("differs", [&[3], greeting.as_slice(), &[2; 2048], &no_news].concat()),
        ("summary", [&[4], [0xff; 32].as_slice(), &[1, 0], &[3; 16], &no_news].concat()),
        ("news", [&[5], news.as_slice()].concat()),
    ];
    for (name, bytes) in messages {
        corpus.add("member_message", name, bytes)?;
    }
    Ok(())
}
