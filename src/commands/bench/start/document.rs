//! The document that the result stands in, and what is said of the machine.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, ensure};

use super::sample::{Samples, Verdict};
use super::{plot, table};

/// What stands around the part of the document that is replaced.
const BEGIN: &str = "<!-- made by `hermes bench start --docs`: begin -->";
const END: &str = "<!-- made by `hermes bench start --docs`: end -->";
/// The document, and the picture.
const DOCUMENT: &str = "benchmarks.md";
const PICTURE: &str = "start.svg";

/// Writes the result into the document in `docs`, and draws the picture beside it.
pub(super) fn write(docs: &Path, samples: &Samples, verdicts: &[Verdict], machine: &str) -> anyhow::Result<()> {
    let path = docs.join(DOCUMENT);
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let part =
        format!("{machine}\n\n![Seconds to the first answer]({PICTURE})\n\n{}", table::markdown(samples, verdicts));
    fs::write(&path, replaced(&text, &part).with_context(|| path.display().to_string())?)?;
    fs::write(docs.join(PICTURE), plot::draw(samples)).with_context(|| format!("write {PICTURE}"))
}

/// `text` with another part between its marks.
fn replaced(text: &str, part: &str) -> anyhow::Result<String> {
    let (before, rest) = text.split_once(BEGIN).with_context(|| format!("there is no line '{BEGIN}'"))?;
    let (_, after) = rest.split_once(END).with_context(|| format!("there is no line '{END}'"))?;
    ensure!(!after.contains(BEGIN), "there are two parts to replace");
    Ok(format!("{before}{BEGIN}\n{}\n{END}{after}", part.trim_end()))
}

/// The machine, and what was run on it, as far as it matters to who reads the figures.
pub(super) fn machine(dir: &Path, rounds: u32) -> anyhow::Result<String> {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let line = |file: &str, name: &str| {
        let text = fs::read_to_string(file).unwrap_or_default();
        let found = text.lines().find_map(|line| line.strip_prefix(name));
        found.map(|rest| rest.trim_start_matches([' ', '\t', ':']).trim().to_owned()).unwrap_or_default()
    };
    let memory_kib: u64 = line("/proc/meminfo", "MemTotal").trim_end_matches(" kB").parse().unwrap_or(0);
    let build = if cfg!(debug_assertions) { "a debug build (not for quoting)" } else { "a release build" };
    Ok(format!(
        "{cores} cores ({}), {:.0} GiB, Linux {}, {} on {}; containerd 2.1 with runc; hermes {}, {build}. Medians of {rounds} rounds, in brackets the \
         least and the greatest and how many there are; the ways take turns within a round. Registry, peer and node share the cores.",
        line("/proc/cpuinfo", "model name"),
        memory_kib as f64 / f64::from(1 << 20),
        rustix::system::uname().release().to_string_lossy(),
        file_system(dir)?,
        disk(dir)?,
        env!("CARGO_PKG_VERSION"),
    ))
}

/// The mount that holds `dir`: its file system and its device.
fn mount_of(dir: &Path) -> anyhow::Result<(String, String)> {
    let dir = fs::canonicalize(dir).with_context(|| dir.display().to_string())?;
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    // Field 5 is the mount point; type and device follow a dash (proc_pid_mountinfo(5)).
    let mounts = table.lines().filter_map(|line| {
        let (place, device) = line.split_once(" - ")?;
        let place = place.split(' ').nth(4)?;
        let mut words = device.split(' ');
        dir.starts_with(place).then_some((place.len(), words.next()?.to_owned(), words.next()?.to_owned()))
    });
    // Of those that are mounted over each other the last is seen.
    let found = mounts.max_by_key(|(len, ..)| *len);
    found.map(|(_, kind, device)| (kind, device)).context("the folder is on no mount")
}

fn file_system(dir: &Path) -> anyhow::Result<String> {
    Ok(mount_of(dir)?.0)
}

/// The device without the folder of devices, and whether it rotates.
fn disk(dir: &Path) -> anyhow::Result<String> {
    let device = mount_of(dir)?.1;
    Ok(device.rsplit('/').next().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_part_between_the_marks_is_replaced() {
        let text = format!("# Title\n\n{BEGIN}\nold\n{END}\n\nmore\n");
        let new = replaced(&text, "new\n").expect("it has marks");
        assert_eq!(new, format!("# Title\n\n{BEGIN}\nnew\n{END}\n\nmore\n"));
        assert_eq!(replaced(&new, "new\n").expect("again"), new);
        assert!(replaced("# Title\n", "new").is_err());
    }

    #[test]
    fn the_machine_is_described() {
        let text = machine(Path::new("/"), 5).expect("a machine");
        assert!(text.contains("cores") && text.contains("Linux") && text.contains("5 rounds"), "{text}");
    }
}
