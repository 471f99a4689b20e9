//! The power goes while containers run of an image that is completed and handed over to the kernel: with what the disk had
//! written by then, containerd and the daemon start, every container that containerd knows starts once more, both agree on
//! every snapshot, and a complete image needs no registry.
//!
//! Both have their folders on one disk that notes every write ([`hermes_tests::cut_disk`]), as a node has them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hermes_policy::rng::Rng;
use hermes_snapshotter::status::Way;
use hermes_tests::command::run;
use hermes_tests::containerds::RunningContainerd;
use hermes_tests::cri::Cri;
use hermes_tests::cut_disk::{Cut, CutDisk};
use hermes_tests::faulty::Fault;
use hermes_tests::guard::{LoopGuard, MountGuard, mounts_below, wait_for};
use hermes_tests::kept::Kept;
use hermes_tests::runnable::LARGE;
use hermes_tests::sample::content;
use hermes_tests::soak;
use hermes_tests::stage::{Stage, cksum};
use rustix::mount::{MountFlags, UnmountFlags};

/// Cuts beside the two that are always looked at: in short, and in whole. A quarter of them before the first container runs.
const CUTS: (usize, usize) = (8, 100);
/// Chooses the cuts.
const SEED: u64 = 6;
/// The disk in bytes: the 64 MiB that the store leaves alone, the images, and the catalogues of both programs.
const DISK_LEN_BYTES: u64 = 256 << 20;
/// How long something may take that comes by itself.
const DEADLINE: Duration = Duration::from_secs(60);

fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

/// A device with the folders of a node, mounted where its programs look for them. Dropped, nothing is mounted any more.
struct Disk<'a> {
    stage: &'a Stage,
    mounted: Vec<MountGuard>,
}

impl<'a> Disk<'a> {
    fn mount(stage: &'a Stage, device: &Path) -> Result<Self> {
        let root = stage.scratch().join("root");
        fs::create_dir_all(&root)?;
        let mut disk = Self { stage, mounted: Vec::new() };
        disk.mounted.push(MountGuard::mount(device, &root, "ext4", MountFlags::empty(), "")?);
        for (name, place) in [("state", stage.state()), ("containerd", stage.host.root().join("var/lib/containerd"))] {
            fs::create_dir_all(root.join(name))?;
            fs::create_dir_all(&place)?;
            run(Command::new("mount").arg("--bind").args([&root.join(name), &place]))?;
            disk.mounted.push(MountGuard::adopt(place));
        }
        Ok(disk)
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        while self.mounted.pop().is_some() {}
    }
}

/// The programs of a node on its disk. Fields drop in this order.
struct Node<'a> {
    containerd: RunningContainerd<'a>,
    kept: Kept,
    disk: Disk<'a>,
}

impl<'a> Node<'a> {
    fn start(disk: Disk<'a>) -> Result<Self> {
        let kept = disk.stage.kept(&["--complete", "full"])?;
        Ok(Self { containerd: disk.stage.host.start()?, kept, disk })
    }

    /// Ends all of it. What is written from here on nobody looks at.
    fn end(self) -> Result<()> {
        let Self { containerd, kept, disk } = self;
        let stage = disk.stage;
        stage.host.kill_containers()?;
        unmount_below(&stage.host.root().join("run"))?;
        drop(containerd);
        // A machine that starts anew has nothing there; containerd does not start a container whose bundle is left.
        fs::remove_dir_all(stage.host.root().join("run/containerd"))?;
        kept.stop()?;
        // Trees that somebody uses outlive their daemon.
        unmount_below(&stage.state().join("trees"))
    }

    /// Tells the daemon something.
    fn tell(&self, arguments: &[&str]) -> Result<()> {
        let output = self.kept.run(arguments)?;
        ensure!(output.status.success(), "{output:?}");
        Ok(())
    }

    fn run(&self, image: &str, name: &str) -> Result<()> {
        let name = self.containerd.container_name(name);
        let run = ["run", "--detach", "--snapshotter", "hermes", image, &name, "/bin/sleep", "100000"];
        self.containerd.ctr_says(&run).map(drop)
    }

    /// The sum of the large file, as the container `name` reads it now, not from memory.
    fn sum(&self, name: &str) -> Result<String> {
        fs::write("/proc/sys/vm/drop_caches", "3")?;
        let script = format!("cksum < /{}", LARGE.0);
        let exec = ["tasks", "exec", "--exec-id", "reader", name, "/bin/sh", "-c", &script];
        Ok(self.containerd.ctr_says(&exec)?.trim().to_owned())
    }

    fn all(&self, kind: &str) -> Result<Vec<String>> {
        Ok(self.containerd.ctr_says(&[kind, "ls", "--quiet"])?.lines().map(str::to_owned).collect())
    }
}

fn unmount_below(dir: &Path) -> Result<()> {
    for place in mounts_below(dir)?.iter().rev() {
        match rustix::mount::unmount(place, UnmountFlags::DETACH) {
            // Somebody else was quicker.
            Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
            Err(error) => return Err(error).with_context(|| format!("umount {}", place.display())),
        }
    }
    Ok(())
}

/// The writes by which something had come to pass.
struct Marks {
    begun: usize,
    first_runs: usize,
    handed_over: usize,
    ended: usize,
}

/// One container on the lazy tree, then completion, then one on the kernel's.
fn record(stage: &Stage, disk: &CutDisk, expected: &str) -> Result<Marks> {
    let mounted = Disk::mount(stage, disk.device())?;
    rustix::fs::syncfs(fs::File::open(stage.state())?)?;
    let begun = disk.told();
    let node = Node::start(mounted)?;
    node.tell(&["complete", "--pause"])?;
    let image = stage.registry.image("v1");
    Cri::connect(&node.containerd.socket())?.pull(&image)?;
    node.run(&image, "old")?;
    let first_runs = disk.told();
    node.tell(&["complete", "--resume"])?;
    wait_for("a complete image", DEADLINE, || {
        node.kept.status().ok().filter(|status| status.images.iter().all(|image| image.percent_present() == 100.0))
    })
    .with_context(|| node.kept.log())?;
    node.run(&image, "new")?;
    let ways: Vec<Way> = node.kept.status()?.images.iter().map(|image| image.way).collect();
    ensure!(ways.contains(&Way::ErofsFiles), "nothing was handed over: {ways:?}");
    let handed_over = disk.told();
    for name in ["old", "new"] {
        ensure!(node.sum(&node.containerd.container_name(name))? == expected, "{name}: wrong bytes before the cut");
    }
    let ended = disk.told();
    node.end()?;
    Ok(Marks { begun, first_runs, handed_over, ended })
}

/// Starts the node on what a cut has left. Says how many containers it had.
fn look(stage: &Stage, device: &Path, is_handed_over: bool, expected: &str) -> Result<usize> {
    let node = Node::start(Disk::mount(stage, device)?)?;
    let checked = || -> Result<usize> {
        let image = stage.registry.image("v1");
        let (containers, images) = (node.all("containers")?, node.all("images")?);
        ensure!(!is_handed_over || containers.len() == 2, "{containers:?} are left of two containers");
        stage.registry.always(if is_handed_over { Fault::Status(404) } else { Fault::Pass });
        for name in &containers {
            node.containerd.ctr_says(&["tasks", "start", "--detach", name]).context("start a container again")?;
            ensure!(node.sum(name)? == expected, "{name}: wrong bytes");
        }
        if !images.contains(&image) {
            Cri::connect(&node.containerd.socket())?.pull(&image).context("pull again")?;
        }
        let script = format!("cksum < /{}", LARGE.0);
        ensure!(node.containerd.once(&image, &script)? == expected, "a new container reads wrong bytes");
        if is_handed_over {
            let ways: Vec<Way> = node.kept.status()?.images.iter().map(|image| image.way).collect();
            ensure!(ways.iter().all(|way| *way == Way::ErofsFiles), "{ways:?}");
        }
        // Paused when the power went before it was told to go on.
        node.tell(&["complete", "--resume"])?;
        wait_for("a complete image", DEADLINE, || {
            let status = node.kept.status().ok()?;
            (is_handed_over || status.images.iter().all(|image| image.percent_present() == 100.0)).then_some(())
        })?;
        // A snapshot that containerd had not noted yet goes with the first one that is removed after the cut.
        stage.agrees_with(&node.containerd, None)?;
        Ok(containers.len())
    };
    let found = checked().with_context(|| node.kept.log())?;
    node.end()?;
    stage.registry.always(Fault::Pass);
    Ok(found)
}

#[test]
fn containers_start_again_after_a_power_cut() -> Result<()> {
    let stage = Stage::new(hermes(), "1.7")?;
    let folder = stage.scratch().join("disk");
    fs::create_dir_all(&folder)?;
    let mut format = Command::new("mkfs.ext4");
    format.args(["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"]);
    let disk = CutDisk::new(&folder, DISK_LEN_BYTES, &mut format)?;
    let expected = cksum(&content(LARGE.0, LARGE.1))?;
    let marks = record(&stage, &disk, &expected)?;
    let mut rng = Rng::new(SEED);
    let mut cuts = vec![Cut { at: marks.handed_over, seed: SEED }, Cut { at: marks.ended, seed: SEED }];
    for number in 0..soak::choose(CUTS.0, CUTS.1)? {
        let from_to = if number % 4 == 0 { marks.begun..marks.first_runs } else { marks.first_runs..marks.ended };
        let at = from_to.start + rng.below(from_to.len() as u64) as usize;
        cuts.push(Cut { at, seed: rng.next_u64() });
    }
    let mut found = Vec::new();
    for cut in cuts {
        let image: PathBuf = stage.scratch().join("image");
        disk.image(cut, &image)?;
        let device = LoopGuard::attach(&image)?;
        let left = look(&stage, device.device(), cut.at >= marks.handed_over, &expected);
        found.push(left.with_context(|| format!("{cut:?} of {}", marks.ended))?);
    }
    println!("seed {SEED}: containers after each cut: {found:?}");
    ensure!(found.contains(&0) && found.contains(&1), "the cuts all lie in the same place: {found:?}");
    Ok(())
}
