//! `deploy/userdata/install.sh` on a host with a real systemd, from a web server that is sometimes wrong.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, Result, ensure};
use hermes_tests::command::run;
use hermes_tests::containerds;
use hermes_tests::guard::ScratchDir;
use hermes_tests::systemd::Systemd;
use sha2::Digest as _;

use crate::chart::root;

const UNIT: &str = "hermes.service";
const INSTALLED: &str = "/usr/local/bin/hermes";

/// Serves one file to whoever asks, and counts.
fn serve(file: PathBuf) -> Result<(SocketAddr, Arc<AtomicUsize>)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let (address, served) = (listener.local_addr()?, Arc::new(AtomicUsize::new(0)));
    let counted = Arc::clone(&served);
    // It ends with the process of the test.
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut stream = stream;
            let _ = stream.read(&mut [0; 4096]);
            counted.fetch_add(1, Ordering::Relaxed);
            let body = fs::read(&file).unwrap_or_default();
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
        }
    });
    Ok((address, served))
}

#[test]
fn shellcheck_finds_no_fault() -> Result<()> {
    let scripts = ["deploy/userdata/install.sh", "tools/render", "tools/helm", "tools/promtool"];
    run(Command::new("shellcheck").current_dir(root()).args(scripts)).map(drop)
}

#[test]
fn a_node_without_the_daemon_set_is_installed_and_taken_back() -> Result<()> {
    let scratch = ScratchDir::new("installer")?;
    let systemd = Systemd::boot(&scratch.make("boot")?)?;
    let text = |path: &Path| path.to_str().map(str::to_owned).context("UTF-8");
    let program = fs::read(env!("CARGO_BIN_EXE_hermes"))?;
    let sum = hex::encode(sha2::Sha256::digest(&program));
    let (address, served) = serve(PathBuf::from(env!("CARGO_BIN_EXE_hermes")))?;
    let (script, url) = (text(&root().join("deploy/userdata/install.sh"))?, format!("http://{address}/hermes"));
    let containerd = text(&containerds::programs("1.7")?.join("containerd"))?;
    let state = text(&scratch.path().join("state"))?;
    let install = |sum: &str, more: &[&str]| -> Result<(Option<i32>, String)> {
        let first = [&script, "--url", &url, "--sha256", sum, "--containerd", &containerd, "--state", &state];
        let output = systemd.run("sh", &[&first[..], more].concat())?;
        let said = [output.stdout, output.stderr].concat();
        Ok((output.status.code(), String::from_utf8_lossy(&said).into_owned()))
    };
    let done = |(code, said): (Option<i32>, String)| -> Result<String> {
        ensure!(code == Some(0), "{code:?}: {said}");
        Ok(said)
    };
    // Nothing that is not what it shall be is run.
    let (code, said) = install(&"0".repeat(64), &[])?;
    ensure!(code == Some(6) && said.contains("another checksum"), "{code:?}: {said}");
    for wrong in ["abc", ""] {
        ensure!(install(wrong, &[])?.0 == Some(2), "the checksum '{wrong}' was taken");
    }
    let there = |path: &str| systemd.path(Path::new(path)).exists();
    ensure!(!there(INSTALLED) && !there("/etc/hermes"), "something was installed");
    let left = fs::read_dir(systemd.path(Path::new("/usr/local/bin")))?.flatten();
    ensure!(
        left.map(|entry| entry.file_name()).all(|name| !name.to_string_lossy().contains("hermes")),
        "something is left"
    );

    done(install(&sum, &["--", "-v"])?)?;
    ensure!(systemd.property(UNIT, "ActiveState")? == "active", "the service does not run");
    let first = systemd.property(UNIT, "MainPID")?;
    // Again, in capitals: nothing is downloaded, and nothing changes.
    let before = served.load(Ordering::Relaxed);
    let said = done(install(&sum.to_uppercase(), &["--", "-v"])?)?;
    ensure!(said.contains("nothing to change") && served.load(Ordering::Relaxed) == before, "{said}");
    ensure!(systemd.property(UNIT, "MainPID")? == first, "the daemon was restarted for nothing");
    let said = done(install(&sum, &["--", "-v", "--plain"])?)?;
    ensure!(said.contains("exchanged") && systemd.property(UNIT, "MainPID")? != first, "{said}");

    // containerd itself does not run here, so what restarts it is a unit that does nothing.
    fs::write(
        systemd.path(Path::new("/etc/systemd/system/containerd.service")),
        "[Unit]\nDefaultDependencies=no\n[Service]\nExecStart=/bin/sleep infinity\n",
    )?;
    systemd.must("systemctl", &["daemon-reload"])?;
    systemd.must("sh", &[&script, "--uninstall", "--purge", "--state", &state])?;
    for left in [INSTALLED, "/etc/hermes", "/etc/systemd/system/hermes.service"] {
        ensure!(!there(left), "{left} is left");
    }
    ensure!(!Path::new(&state).exists(), "the store is left");
    systemd.must("sh", &[&script, "--uninstall"]).map(drop)
}
