//! What the integration tests of the store share.

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

/// Mounts something with `mount`, as root.
///
/// # Panics
/// When it cannot: the tests of filesystems need root.
pub(crate) fn mount(arguments: &[&str], target: &Path) {
    let status = Command::new("mount").args(arguments).arg(target).status().expect("mount runs");
    assert!(status.success(), "mount {arguments:?} failed: this test needs root");
}
