//! Namespaces in which nothing outlives the benchmark.
//!
//! The command runs itself again as the first process of a process namespace, with mounts of its own: when that process
//! ends, the kernel kills every other one in it (containerd, shims, containers, daemons), and with the last of them go its mounts
//! and networks. It is killed itself when this one ends. What is left then is the folder of the run and the control groups of
//! its containers, and sweepers remove those, also when this process is killed.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};
use hermes_lab::guard::{ScratchDir, Sweeper};
use rustix::mount::{MountFlags, mount, mount_bind_recursive};

/// Longest path of the folder that a run is in: a socket's path has at most 107 bytes (unix(7)), and below the folder that of
/// containerd's is 77 bytes long.
const DIR_LEN_MAX_BYTES: usize = 30;

/// Runs this command again, isolated, with a folder below `dir` for all that it needs.
pub(super) fn run(dir: &Path) -> anyhow::Result<()> {
    let dir = std::path::absolute(dir)?;
    if dir.as_os_str().len() > DIR_LEN_MAX_BYTES {
        bail!(
            "{} is too long for the sockets below it; give a --dir of at most {DIR_LEN_MAX_BYTES} bytes",
            dir.display()
        );
    }
    let scratch = ScratchDir::new_in(&dir, "s")?;
    let _folder = Sweeper::watch(scratch.path())?;
    let _groups = Sweeper::watch_groups(&format!("k8s.io/*-hermes-{}-*", name(scratch.path())))?;
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "unshare", "--mount", "--propagation", "private", "--pid", "--fork"]);
    command.args(["--kill-child", "--mount-proc", "--"]).arg(program).args(std::env::args_os().skip(1));
    command.arg("--inside").arg(scratch.path()).env("TMPDIR", scratch.path()).stdin(Stdio::null());
    let status = command.status().context("cannot start unshare; install util-linux")?;
    if !status.success() {
        bail!("the benchmark ended with {status}");
    }
    Ok(())
}

/// What the folders of the run in `work` are named after, and with them the containers on its hosts.
pub(super) fn name(work: &Path) -> String {
    let name = work.file_name().unwrap_or_default().to_string_lossy();
    name.trim_start_matches("hermes-").to_owned()
}

/// Puts a folder of this run's own in the place where runtimes keep their state.
pub(super) fn settle() -> anyhow::Result<()> {
    mount("none", "/run", "tmpfs", MountFlags::empty(), Some(c"mode=755")).context("cannot mount a folder for runtimes")
}

/// Makes an empty `folder` of this run's own, for a program that keeps its state there whatever it is told. What else is beside it
/// stays where it was, by links; the machine's own folder of that name is out of sight and untouched.
pub(super) fn own_folder(folder: &Path) -> anyhow::Result<()> {
    let (beside, name) = folder.parent().zip(folder.file_name()).context("a folder without a name")?;
    // In the place that `settle` has made, where nothing is the machine's.
    let real = Path::new("/run/beside").join(name);
    fs::create_dir_all(&real)?;
    mount_bind_recursive(beside, &real).with_context(|| format!("cannot show {} elsewhere", beside.display()))?;
    mount("none", beside, "tmpfs", MountFlags::empty(), Some(c"mode=755"))
        .context("cannot mount a folder for states")?;
    for entry in fs::read_dir(&real)? {
        let other = entry?.file_name();
        if other != name {
            symlink(real.join(&other), beside.join(&other))?;
        }
    }
    fs::create_dir(folder).with_context(|| folder.display().to_string())
}
