//! What the kernel can do, found out by doing it.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::mount::{MountFlags, UnmountFlags};

use super::Finding;
use crate::fs::layers::{LayerCaching, LayerDirectory, LayerFs};
use crate::fs::read::Reader;
use crate::fs::session::{FuseSession, SessionConfig};
use crate::mounts::erofs::Backing;
use crate::mounts::probe;

/// How long reads wait by default; the kernel must not be less patient.
const READ_DEADLINE_SECONDS: u64 = 60;
/// Where the kernel says how long it waits for FUSE daemons at most, if it limits that (Linux 6.15).
const FUSE_TIMEOUT: &str = "/proc/sys/fs/fuse/max_request_timeout";

/// What this version brings that cannot be tried without a daemon that dies.
pub(super) fn version() -> Finding {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    judge_version(&release)
}

fn judge_version(release: &str) -> Finding {
    const WHAT: &str = "kernel";
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        return Finding::warn(WHAT, format!("'{release}' is no version"), "");
    };
    let has = |since: (u32, u32)| (major, minor) >= since;
    let yes = |has: bool| if has { "yes" } else { "no" };
    let seen = format!(
        "Linux {major}.{minor}: EROFS from files {}, FUSE resend and passthrough {}",
        yes(has((6, 12))),
        yes(has((6, 9)))
    );
    // fsopen(2) and its family, which every mount of ours uses.
    if !has((5, 2)) {
        Finding::fail(WHAT, seen, "Hermes needs Linux 5.2 at least; 6.12 or newer is quickest")
    } else if !has((6, 9)) {
        let next =
            "Linux 6.12 or newer is quicker; before 6.9 a request that a killed daemon had under way is not resent";
        Finding::warn(WHAT, seen, next)
    } else if !has((6, 12)) {
        Finding::warn(WHAT, seen, "Linux 6.12 or newer mounts trees in the kernel, which is quicker")
    } else {
        Finding::ok(WHAT, seen)
    }
}

/// Whether the kernel gives up on a FUSE daemon before the daemon gives up on its sources.
pub(super) fn fuse_timeout() -> Finding {
    judge_timeout(fs::read_to_string(FUSE_TIMEOUT).ok().as_deref())
}

fn judge_timeout(setting: Option<&str>) -> Finding {
    const WHAT: &str = "FUSE timeout";
    match setting.map(|text| text.trim().parse::<u64>()) {
        None => Finding::ok(WHAT, "this kernel has none"),
        Some(Ok(0)) => Finding::ok(WHAT, "none is set"),
        Some(Ok(seconds)) if seconds > READ_DEADLINE_SECONDS => Finding::ok(WHAT, format!("{seconds} s")),
        Some(Ok(seconds)) => Finding::warn(
            WHAT,
            format!("the kernel ends connections after {seconds} s, reads may wait {READ_DEADLINE_SECONDS} s"),
            "set fs.fuse.max_request_timeout to 0 (sysctl), or to twice the read deadline",
        ),
        Some(Err(_)) => Finding::warn(WHAT, format!("{FUSE_TIMEOUT} holds no number"), ""),
    }
}

/// Makes one mount of each kind in `scratch`.
pub(super) fn mounts(scratch: &Path) -> Vec<Finding> {
    vec![fuse(&scratch.join("fuse")), erofs(scratch), overlay(&scratch.join("overlay"))]
}

fn fuse(dir: &Path) -> Finding {
    const WHAT: &str = "FUSE";
    let next = "load the module (`modprobe fuse`); in a pod: privileged, with the device /dev/fuse";
    let tried = || -> Result<(), String> {
        fs::create_dir(dir).map_err(|error| error.to_string())?;
        // The file system of layer files, without any.
        let reader = Reader::new(tokio::runtime::Handle::current(), Duration::from_secs(1));
        let files = LayerFs::new(Arc::new(LayerDirectory::default()), reader, LayerCaching::default());
        let session =
            FuseSession::start(files, dir, SessionConfig::default(), None).map_err(|error| error.to_string())?;
        let listed = fs::read_dir(session.path()).map(Iterator::count);
        drop(session);
        listed.map(drop).map_err(|error| format!("the mount works, reading does not: {error}"))
    };
    match tried() {
        Ok(()) => Finding::ok(WHAT, "a mount works"),
        Err(reason) => Finding::fail(WHAT, reason, next),
    }
}

fn erofs(scratch: &Path) -> Finding {
    const WHAT: &str = "EROFS";
    let (image, layer, dir) = (scratch.join("probe.erofs"), scratch.join("probe.layer"), scratch.join("erofs"));
    let prepared = || -> Result<(), String> {
        let tree = probe::tree_image().map_err(|error| error.to_string())?;
        fs::write(&image, tree)
            .and_then(|()| fs::write(&layer, probe::layer_bytes()))
            .and_then(|()| fs::create_dir(&dir))
            .map_err(|error| error.to_string())
    };
    if let Err(reason) = prepared() {
        return Finding::fail(WHAT, reason, "");
    }
    let through = |backing| probe::try_erofs(&image, &layer, &dir, backing);
    match (through(Backing::File), through(Backing::Loop)) {
        (Ok(()), _) => Finding::ok(WHAT, "a mount from files works"),
        (Err(_), Ok(())) => Finding::ok(WHAT, "a mount from loop devices works"),
        (Err(reason), Err(_)) => Finding::warn(
            WHAT,
            reason,
            "trees are shown by FUSE alone, more slowly; `modprobe erofs`, or Linux 6.12 or newer",
        ),
    }
}

fn overlay(dir: &Path) -> Finding {
    const WHAT: &str = "overlayfs";
    let tried = || -> Result<(), std::io::Error> {
        for name in ["lower", "upper", "work", "merged"] {
            fs::create_dir_all(dir.join(name))?;
        }
        fs::write(dir.join("lower/file"), "lower")?;
        let merged = dir.join("merged");
        let at = |name: &str| dir.join(name).display().to_string();
        let options = format!("lowerdir={},upperdir={},workdir={}", at("lower"), at("upper"), at("work"));
        let options = std::ffi::CString::new(options)?;
        rustix::mount::mount("overlay", &merged, "overlay", MountFlags::empty(), options.as_c_str())?;
        let written = fs::write(merged.join("file"), "upper").and_then(|()| fs::read(dir.join("upper/file")));
        rustix::mount::unmount(&merged, UnmountFlags::DETACH)?;
        written.map(drop)
    };
    match tried() {
        Ok(()) => Finding::ok(WHAT, "a mount beside the store works"),
        Err(error) => Finding::fail(
            WHAT,
            format!("a mount beside the store fails: {error}"),
            "put the state folder on ext4 or xfs (containers' upper folders lie there), and load the module overlay",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::install::check::Verdict;

    #[test]
    fn versions_and_limits_are_judged() {
        for (release, verdict) in [
            ("6.12.0-1-amd64", Verdict::Ok),
            ("7.0", Verdict::Ok),
            ("6.9.3", Verdict::Warn),
            ("6.1.0-39-amd64", Verdict::Warn),
            ("4.19.0", Verdict::Fail),
            ("what", Verdict::Warn),
        ] {
            assert_eq!(judge_version(release).verdict, verdict, "{release}");
        }
        for (setting, verdict) in [
            (None, Verdict::Ok),
            (Some("0\n"), Verdict::Ok),
            (Some("120\n"), Verdict::Ok),
            (Some("30\n"), Verdict::Warn),
            (Some("x"), Verdict::Warn),
        ] {
            assert_eq!(judge_timeout(setting).verdict, verdict, "{setting:?}");
        }
    }
}
