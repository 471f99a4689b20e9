//! The service as `hermes node install` makes it, under a real systemd: readers do not notice that the daemon is killed,
//! restarted or replaced, because systemd keeps its connections to the kernel; and an uninstall leaves nothing.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hermes_tests::containerds;
use hermes_tests::daemon::Reading;
use hermes_tests::faulty::FaultyRegistry;
use hermes_tests::guard::{ScratchDir, wait_for};
use hermes_tests::sample::{Sample, TAG};
use hermes_tests::systemd::Systemd;

/// Longest time that anything here is waited for.
const DEADLINE: Duration = Duration::from_secs(60);
const UNIT: &str = "hermes.service";
/// Where the install puts the program.
const INSTALLED: &str = "/usr/local/bin/hermes";
/// Each file is read for the first time while its case is under way.
const UNREAD: [&str; 3] = ["gzip/first", "zstd/first", "plain/second"];

#[test]
fn readers_do_not_notice_what_happens_to_the_service() -> Result<()> {
    let hermes = env!("CARGO_BIN_EXE_hermes");
    let scratch = ScratchDir::new("systemd")?;
    let sample = Sample::new(&scratch.path().join("layout"))?;
    let index = sample.build_index(Path::new(hermes), scratch.path())?;
    let registry = FaultyRegistry::start(sample.layout.dir())?;
    let systemd = Systemd::boot(&scratch.make("boot")?)?;
    let text = |path: &Path| path.to_str().map(str::to_owned).context("UTF-8");
    let state = text(&scratch.path().join("state"))?;
    let containerd = text(&containerds::programs("1.7")?.join("containerd"))?;
    let log = scratch.path().join("daemon.log");
    systemd.must("mkdir", &["/etc/systemd/system/hermes.service.d"])?;
    let drop_in = systemd.path(Path::new("/etc/systemd/system/hermes.service.d/log.conf"));
    fs::write(drop_in, format!("[Service]\nStandardError=append:{}\n", log.display()))?;
    let said = || fs::read_to_string(&log).unwrap_or_default();

    systemd.must(hermes, &["node", "install", "--containerd", &containerd, "--state", &state, "--", "-v"])?;
    ensure!(systemd.property(UNIT, "ActiveState")? == "active", "{}", said());
    let mut dirs = Vec::new();
    for way in ["erofs-fuse", "fuse-tree"] {
        let dir = scratch.make(way)?;
        let (image, at, folder) = (registry.image(TAG), text(&dir)?, text(&index.folder)?);
        let how = ["--no-build", "--way", way, "--trust", &index.key, "--index", &folder, "--state", &state];
        systemd.must(INSTALLED, &[&["mount", &image, &at], &how[..]].concat()).with_context(said)?;
        dirs.push(systemd.path(&dir));
    }
    // One for layer files, one for the tree that FUSE alone shows.
    ensure!(systemd.property(UNIT, "NFileDescriptorStore")? == "2", "systemd keeps nothing\n{}", said());

    let upgraded = scratch.path().join("hermes-next");
    fs::copy(hermes, &upgraded)?;
    let upgraded = text(&upgraded)?;
    type Change<'a> = (&'a str, &'a str, &'a [&'a str]);
    let changes: [Change<'_>; 3] = [
        ("kill", "systemctl", &["kill", "--signal=KILL", "--kill-who=main", UNIT]),
        ("restart", "systemctl", &["restart", UNIT]),
        ("upgrade", INSTALLED, &["node", "upgrade", &upgraded, "--state", &state]),
    ];
    for ((what, program, arguments), name) in changes.into_iter().zip(UNREAD) {
        let before = systemd.property(UNIT, "MainPID")?;
        let readings = dirs.iter().map(|dir| Reading::start(&dir.join(name))).collect::<Vec<_>>();
        systemd.must(program, arguments).with_context(said)?;
        let again = dirs.iter().map(|dir| Reading::start(&dir.join(name)));
        for reading in readings.into_iter().chain(again.collect::<Vec<_>>()) {
            let (bytes, waited) = reading.end()?;
            ensure!(
                bytes.is_ok_and(|bytes| bytes == sample.content(name)),
                "{what}: wrong after {waited:?}\n{}",
                said()
            );
            println!("{what}: a read took {waited:?}");
        }
        wait_for("the next daemon", DEADLINE, || {
            let state = systemd.property(UNIT, "ActiveState").ok()?;
            let next = systemd.property(UNIT, "MainPID").ok()?;
            (state == "active" && next != before).then_some(())
        })
        .with_context(said)?;
    }
    for dir in &dirs {
        sample.check(dir)?;
    }

    for way in ["erofs-fuse", "fuse-tree"] {
        systemd.must(INSTALLED, &["unmount", &text(&scratch.path().join(way))?, "--state", &state])?;
    }
    systemd.must(hermes, &["node", "uninstall", "--state", &state])?;
    ensure!(systemd.property(UNIT, "LoadState")? == "not-found", "systemd still knows the unit");
    for left in [INSTALLED, "/etc/hermes", "/etc/systemd/system/hermes.service"] {
        ensure!(!systemd.path(Path::new(left)).exists(), "{left} is left");
    }
    Ok(())
}
