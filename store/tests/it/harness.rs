//! What the integration tests of the store share.

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

/// Runs one test of this very executable in another process, with `settings` in its environment.
pub(crate) fn this_test(name: &str, settings: &[(&str, &str)]) -> Command {
    let executable = std::env::current_exe().expect("the test knows its file");
    let mut command = Command::new(executable);
    with_test(&mut command, name, settings);
    command
}

/// Like [`this_test`], in a mount namespace of its own: what it mounts is gone when it ends, however it ends.
pub(crate) fn this_test_alone(name: &str, settings: &[(&str, &str)]) -> Command {
    let executable = std::env::current_exe().expect("the test knows its file");
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "--"]).arg(executable);
    with_test(&mut command, name, settings);
    command
}

fn with_test(command: &mut Command, name: &str, settings: &[(&str, &str)]) {
    command.args([name, "--exact", "--nocapture", "--test-threads=1"]).envs(settings.iter().copied());
    command.stdin(Stdio::null());
}

/// What a victim says after each step; no message of a failure holds it.
const STEP: u8 = 0;

/// One step was done: the parent may kill now.
pub(crate) fn step() {
    std::io::stderr().write_all(&[STEP]).expect("the parent listens");
}

/// Runs the test `victim` in another process until it has done `steps` steps, and kills it there.
///
/// # Panics
/// When the victim ended by itself, or said anything: it has failed.
pub(crate) fn kill_after(steps: u64, victim: &str, settings: &[(&str, &str)]) {
    let mut process = this_test(victim, settings)
        .env("RUST_BACKTRACE", "0")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the victim starts");
    let mut output = process.stderr.take().expect("piped");
    let (mut seen, mut said, mut buf) = (0, Vec::new(), [0; 64]);
    while seen < steps {
        let len = output.read(&mut buf).expect("reads");
        said.extend(buf[..len].iter().filter(|byte| **byte != STEP));
        seen += buf[..len].iter().filter(|byte| **byte == STEP).count() as u64;
        if len == 0 {
            break;
        }
    }
    process.kill().expect("kills");
    let status = process.wait().expect("ends");
    output.read_to_end(&mut said).expect("reads");
    said.retain(|byte| *byte != STEP);
    let said = String::from_utf8_lossy(&said);
    assert!(status.code().is_none() && said.is_empty(), "{settings:?}: the victim failed: {said}");
}

/// Mounts something with `mount`, as root.
///
/// # Panics
/// When it cannot: the tests of filesystems need root.
pub(crate) fn mount(arguments: &[&str], target: &Path) {
    let status = Command::new("mount").args(arguments).arg(target).status().expect("mount runs");
    assert!(status.success(), "mount {arguments:?} failed: this test needs root");
}
