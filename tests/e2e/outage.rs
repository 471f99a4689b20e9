//! What a node is without: its registry, its network, its logins, itself. Containers on a real containerd go on with what
//! is here, wait for what is not, and are told in time when it does not come.
//!
//! Outages are short here, and as long as they are meant to be in `make soak`.
//!
//! A crash of the machine is played by killing everything at once, undoing its mounts and having the kernel forget what it
//! has cached. What had been written and not synced is still there then; the loss of that is what the store's own model
//! tests play.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hermes_registry::{Auth, Options};
use hermes_tests::compress::Compression;
use hermes_tests::containerds::RunningContainerd;
use hermes_tests::cri::Cri;
use hermes_tests::daemon::Daemon;
use hermes_tests::faulty::{Fault, FaultyRegistry, login_header};
use hermes_tests::guard::{mounts_below, wait_for};
use hermes_tests::kept::Kept;
use hermes_tests::layout::{Layout, NewLayer};
use hermes_tests::network::without_network;
use hermes_tests::runnable::{self, LARGE};
use hermes_tests::sample::content;
use hermes_tests::stage::{Stage, cksum, last_pull};
use hermes_tests::tarball::{Entry, Tarball};
use hermes_tests::{soak, web};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use serde_json::{Value, json};

/// The line of containerd where one is enough.
const LINE: &str = "1.7";
/// How long something may take that comes by itself.
const DEADLINE: Duration = Duration::from_secs(60);
/// How long the registry is away, in short and in whole.
const AWAY: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(30));
/// The deadline of reads where it is waited for, in milliseconds.
const READ_DEADLINE_MS: &str = "2000";
/// An image with layers of a file each, and their length in bytes.
const PARTS: &str = "parts";
const PART_LEN_BYTES: u64 = 1_500_000;
/// Layers of [`PARTS`], in short and in whole: one is read with each login.
const LOGINS: (usize, usize) = (3, 12);
/// How long the registry's tokens are good.
const TOKEN_LIFETIME: Duration = Duration::from_secs(2);
/// Where a daemon serves metrics that has a network of its own.
const METRICS: &str = "127.0.0.1:9464";

fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

fn part(number: usize) -> String {
    format!("opt/part{number}")
}

/// The usual images, and one of which each layer has to be asked for.
fn images(dir: &Path) -> Result<Layout> {
    let layout = runnable::images(dir)?;
    let file = |number: usize| Entry::file(part(number), content(&part(number), PART_LEN_BYTES));
    let layer = |number| NewLayer { tar: Tarball::of([file(number)]), compression: Compression::Gzip(1) };
    let count = soak::choose(LOGINS.0, LOGINS.1)?;
    let layers: Vec<NewLayer> = [runnable::programs()?].into_iter().chain((0..=count).map(layer)).collect();
    layout.add(PARTS, &layers, &json!({}))?;
    Ok(layout)
}

/// The container that most tests have.
fn container(containerd: &RunningContainerd<'_>) -> String {
    containerd.container_name("outage")
}

fn end_container(containerd: &RunningContainerd<'_>) -> Result<()> {
    containerd.ctr_says(&["tasks", "rm", "--force", &container(containerd)])?;
    containerd.ctr_says(&["containers", "rm", &container(containerd)]).map(drop)
}

fn run_container(containerd: &RunningContainerd<'_>, image: &str) -> Result<()> {
    let name = container(containerd);
    let sleeper = ["run", "--detach", "--snapshotter", "hermes", image, &name, "/bin/sleep", "100000"];
    containerd.ctr_says(&sleeper).map(drop)
}

/// Runs a script in the container, to its end.
fn exec(containerd: &RunningContainerd<'_>, id: &str, script: &str) -> Result<Output> {
    let mut command = containerd.ctr();
    // Longer than the longest outage; ctr's usual timeout here is shorter.
    command.args([
        "--timeout",
        "120s",
        "tasks",
        "exec",
        "--exec-id",
        id,
        &container(containerd),
        "/bin/sh",
        "-c",
        script,
    ]);
    command.stdin(Stdio::null()).output().context("start ctr")
}

fn printed(output: &Output) -> Result<String> {
    ensure!(output.status.success(), "{output:?}");
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn large_script() -> String {
    format!("cksum < /{}", LARGE.0)
}

fn large_sum() -> Result<String> {
    cksum(&content(LARGE.0, LARGE.1))
}

/// The lines of a log that say that a read has failed.
fn failures(log: &str) -> Vec<&str> {
    log.lines().filter(|line| line.contains("a read failed with EIO")).collect()
}

#[test]
fn a_registry_that_comes_back_in_time_is_waited_for() -> Result<()> {
    let mut stage = Stage::new(hermes(), LINE)?;
    let daemon = stage.daemon(&[])?;
    let (away, expected) = (soak::choose(AWAY.0, AWAY.1)?, large_sum()?);
    // The registry is taken from the stage, which containerd's host is borrowed from.
    let Stage { host, registry, .. } = &mut stage;
    let containerd = host.start()?;
    let image = registry.image("v1");
    Cri::connect(&containerd.socket())?.pull(&image)?;
    run_container(&containerd, &image)?;
    // It gives the beginning and then nothing; and then it is gone.
    registry.plan(|request| if request < 2 { Fault::Pass } else { Fault::Hang });
    let (sum, waited) = thread::scope(|scope| -> Result<(String, Duration)> {
        let reading = scope.spawn(|| exec(&containerd, "reader", &large_script()));
        wait_for("a read that waits", DEADLINE, || {
            daemon.status().ok().filter(|status| status.waiting.demand > 0 && registry.blob_requests() > 2)
        })?;
        registry.go();
        // The outage itself, not a wait for something.
        thread::sleep(away);
        ensure!(!reading.is_finished(), "the read did not wait: {:?}", reading.join());
        registry.always(Fault::Pass);
        registry.come_back()?;
        let back = Instant::now();
        let output = reading.join().expect("it does not panic")?;
        Ok((printed(&output).with_context(|| daemon.log())?, back.elapsed()))
    })?;
    ensure!(sum == expected, "the container read {sum}");
    let log = daemon.log();
    ensure!(failures(&log).is_empty(), "{log}");
    let attempts = log.lines().filter(|line| line.contains("cannot read the registry")).count();
    println!("a registry that was away for {away:?}: all was read {waited:?} later; {attempts} lines about attempts");
    drop(containerd);
    daemon.stop().map(drop)
}

#[test]
fn a_registry_that_stays_away_is_an_io_error_and_one_line() -> Result<()> {
    let mut stage = Stage::new(hermes(), LINE)?;
    let daemon = stage.daemon(&["--read-deadline-ms", READ_DEADLINE_MS])?;
    let layer = stage.layout.image("v1")?.layers[1].diff_id.to_string();
    let Stage { host, registry, .. } = &mut stage;
    let containerd = host.start()?;
    let image = registry.image("v1");
    Cri::connect(&containerd.socket())?.pull(&image)?;
    run_container(&containerd, &image)?;
    // What the shell needs is here from now on.
    printed(&exec(&containerd, "warm", "cat /etc/a; cksum < /etc/a")?)?;
    registry.go();
    let begun = Instant::now();
    // Not by cksum, which in coreutils 9.0 to 9.2 takes an error for the end.
    let output = exec(&containerd, "reader", "cat /opt/large > /dev/null")?;
    let took = begun.elapsed();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success() && said.contains("Input/output error"), "{output:?}");
    println!("a registry that is away: an I/O error after {took:?}, with a deadline of {READ_DEADLINE_MS} ms");
    // Many more, one after the other and at once.
    let again = "for i in 1 2 3 4 5 6 7 8; do cat /opt/large > /dev/null & done; wait; cat /opt/large > /dev/null";
    let again = exec(&containerd, "again", again)?;
    ensure!(String::from_utf8_lossy(&again.stderr).matches("Input/output error").count() == 9, "{again:?}");
    ensure!(printed(&exec(&containerd, "here", "cat /etc/a")?)? == "a2", "what is here was not read");

    let wanted = [image.as_str(), "/opt/large", &layer, &registry.host()];
    wait_for("the line about the failed reads", DEADLINE, || (!failures(&daemon.log()).is_empty()).then_some(()))?;
    registry.come_back()?;
    let mut last = None;
    let well = wait_for("reads that are well again", DEADLINE, || {
        let output = exec(&containerd, "well", &format!("cat /opt/large > /dev/null && {}", large_script()));
        let sum = output.as_ref().ok().and_then(|output| printed(output).ok());
        last = Some(output);
        sum
    });
    ensure!(well.with_context(|| format!("{last:?}\n{}", daemon.log()))? == large_sum()?, "wrong bytes");
    let log = daemon.log();
    let lines = failures(&log);
    ensure!(lines.len() == 1, "{} lines for one outage:\n{}", lines.len(), lines.join("\n"));
    ensure!(wanted.iter().all(|part| lines[0].contains(part)), "not all of {wanted:?} in {}", lines[0]);
    println!("{}", lines[0]);
    let over: Vec<_> = log.lines().filter(|line| line.contains("reads that failed go on")).collect();
    ensure!(over.len() == 1, "{over:?}");
    println!("{}", over[0]);
    let attempts = log.lines().filter(|line| line.contains("cannot read the registry")).count();
    println!("{attempts} lines about attempts to read it");
    drop(containerd);
    daemon.stop().map(drop)
}

/// Starts a daemon in a network without routes; how long until it said that it is ready.
fn boot_alone(stage: &Stage) -> Result<(Daemon, Duration)> {
    without_network(|| {
        thread::scope(|scope| {
            let begun = Instant::now();
            let ready = scope.spawn(move || {
                wait_for("readiness", DEADLINE, || {
                    web::get(METRICS, "/readyz").ok().filter(|answer| answer.starts_with("HTTP/1.1 200"))
                })
                .map(|_| begun.elapsed())
            });
            let daemon = stage.daemon(&["--metrics-listen", METRICS, "--read-deadline-ms", READ_DEADLINE_MS])?;
            Ok((daemon, ready.join().expect("it does not panic")?))
        })
    })
}

#[test]
fn a_node_boots_without_a_network_and_complete_images_start() -> Result<()> {
    let mut stage = Stage::with(hermes(), LINE, &["v1", PARTS], FaultyRegistry::start, images)?;
    let (complete, partly) = (stage.registry.image("v1"), stage.registry.image(PARTS));
    let script = format!("cat /etc/a; {}", large_script());
    let expected = format!("a2{}", large_sum()?);
    let daemon = stage.daemon(&[])?;
    {
        let containerd = stage.host.start()?;
        let cri = Cri::connect(&containerd.socket())?;
        [&complete, &partly].into_iter().try_for_each(|image| cri.pull(image))?;
        let part = format!("cksum < /{}", part(0));
        ensure!(containerd.once(&partly, &part)? == cksum(&content("opt/part0", PART_LEN_BYTES))?);
        run_container(&containerd, &complete)?;
        let images = daemon.status()?.images;
        let dir = images.iter().find(|image| image.reference == complete).context("a tree")?.dir.clone();
        let completed = daemon.run(&["complete", &dir])?;
        ensure!(completed.status.success(), "{completed:?}");
        end_container(&containerd)?;
    }
    daemon.stop()?;
    stage.registry.go();
    let (daemon, ready) = boot_alone(&stage)?;
    println!("without a network, the daemon is ready {ready:?} after its start");
    let containerd = stage.host.start()?;
    let begun = Instant::now();
    let read = containerd.once(&complete, &script).with_context(|| daemon.log())?;
    ensure!(read == expected, "the container read {read}");
    println!("a container of a complete image has started and read all in {:?}", begun.elapsed());
    // What is here of the other image is as good.
    let read = containerd.once(&partly, &format!("cksum < /{}", part(0))).with_context(|| daemon.log())?;
    ensure!(read == cksum(&content("opt/part0", PART_LEN_BYTES))?, "the container read {read}");
    // What it printed last may be lost with the container; how it ended is not.
    let told = r#"case "$said" in *"Input/output error"*) exit 42;; esac"#;
    let missing = containerd.once(&partly, &format!("said=$(cat /{} 2>&1 > /dev/null); {told}", part(1)));
    let said = format!("{:#}", missing.err().context("what is not here was read")?);
    ensure!(said.contains("exit status: 42"), "{said}");
    drop(containerd);
    daemon.stop().map(drop)
}

/// What is started first after a crash.
#[derive(Debug, Clone, Copy)]
enum First {
    Hermes,
    Containerd,
}

/// Everything ends at once, as when the power fails: processes, mounts, what the kernel has cached, and what is kept in
/// memory below /run.
fn crash(stage: &Stage, kept: Kept, containerd: RunningContainerd<'_>) -> Result<()> {
    let daemon = kept.daemon()?.context("a daemon")?.as_raw_nonzero().get().unsigned_abs();
    let mut kept = kept;
    stage.host.kill_containers_and(&[kept.keeper().id(), daemon, containerd.id()])?;
    drop((kept, containerd));
    for root in [stage.host.root(), stage.scratch()] {
        for dir in mounts_below(root)?.iter().rev() {
            match unmount(dir.as_path(), UnmountFlags::DETACH) {
                // Gone with another one that it was a copy of.
                Ok(()) | Err(Errno::INVAL) => {}
                Err(error) => return Err(error).with_context(|| format!("unmount {}", dir.display())),
            }
        }
    }
    for dir in ["run/containerd", "run/hermes"] {
        let dir = stage.host.root().join(dir);
        fs::remove_dir_all(&dir)?;
        fs::create_dir(&dir)?;
    }
    // What is dirty is written and not lost; what is clean is read from the disk again.
    fs::write("/proc/sys/vm/drop_caches", "3").context("have the kernel forget what it has cached")
}

fn boot<'a>(stage: &'a Stage, first: First) -> Result<(Kept, RunningContainerd<'a>)> {
    match first {
        First::Hermes => {
            let kept = stage.kept(&[])?;
            Ok((kept, stage.host.start()?))
        }
        First::Containerd => {
            let containerd = stage.host.start()?;
            Ok((stage.kept(&[])?, containerd))
        }
    }
}

/// Does what a kubelet does after a boot: old pods go, images that containerd has forgotten are pulled, pods start.
fn as_a_kubelet(stage: &Stage, containerd: &RunningContainerd<'_>, round: usize) -> Result<()> {
    let cri = Cri::connect(&containerd.socket())?;
    let pods = wait_for("the end of the old pods", DEADLINE, || cri.remove_all_pods().ok())?;
    println!("{pods} pods of the time before");
    for (tag, expected) in [("v1", "a2"), ("v2", "other")] {
        let image = stage.registry.image(tag);
        let mut last = None;
        // containerd pauses between attempts to reach a snapshotter that was not there.
        let pulled = wait_for("a pull", DEADLINE, || cri.pull(&image).map_err(|error| last = Some(error)).ok());
        pulled.with_context(|| format!("{last:?}"))?;
        let pod = cri.run_pod(&format!("{tag}-{round}"), &image, &["/bin/sleep", "100000"])?;
        let read = cri.exec(&pod, &["/bin/sh", "-c", &format!("cat /etc/a; {}", large_script())])?;
        ensure!(read == format!("{expected}{}", large_sum()?), "{tag}: the pod read {read}");
    }
    Ok(())
}

#[test]
fn a_machine_that_crashed_has_its_containers_again() -> Result<()> {
    // v2 and what is pulled only after the crash have no index.
    let stage = Stage::new(hermes(), LINE)?;
    let (mut kept, mut containerd) = boot(&stage, First::Hermes)?;
    as_a_kubelet(&stage, &containerd, 0)?;
    let image = stage.registry.image("v1");
    run_container(&containerd, &image)?;
    printed(&exec(&containerd, "write", "echo mine > /etc/kept")?)?;
    for (round, first) in [(1, First::Hermes), (2, First::Containerd)] {
        let pulls = kept.status()?.pulls;
        ensure!(pulls.iter().any(|pull| pull.decision == "lazy") || round > 1, "{pulls:?}");
        crash(&stage, kept, containerd).context("the crash")?;
        let begun = Instant::now();
        (kept, containerd) = boot(&stage, first).with_context(|| format!("{first:?} first"))?;
        println!("{first:?} first: both answer after {:?}", begun.elapsed());
        as_a_kubelet(&stage, &containerd, round).with_context(|| format!("{first:?} first\n{}", kept.log()))?;
        // The very container that ran, on the layer that it had written.
        let name = container(&containerd);
        containerd.ctr_says(&["tasks", "start", "--detach", &name]).with_context(|| kept.log())?;
        let read = printed(&exec(&containerd, "read", &format!("cat /etc/kept /etc/a; {}", large_script()))?)?;
        ensure!(read == format!("mine\na2{}", large_sum()?), "the container read {read}");
        let agreed = stage.agrees_with(&containerd, None)?;
        println!("{first:?} first: all runs {:?} after the start; {agreed} snapshots", begun.elapsed());
        ensure!(failures(&kept.log()).is_empty(), "{}", kept.log());
    }
    // What was never here can be pulled as ever.
    end_container(&containerd)?;
    Cri::connect(&containerd.socket())?.remove_all_pods()?;
    containerd.remove_all_images()?;
    let image = stage.registry.image("v2");
    Cri::connect(&containerd.socket())?.pull(&image)?;
    ensure!(containerd.once(&image, "cat /etc/a")? == "other");
    containerd.remove_all_images()?;
    stage.agrees_with(&containerd, Some(0))?;
    drop(containerd);
    ensure!(kept.stop()?.success());
    Ok(())
}

/// A kubelet's credential provider, whose password is in a file, and its configuration. Returns the arguments for the
/// daemon.
fn provider(stage: &Stage) -> Result<Vec<String>> {
    let (bin, config) = (stage.scratch().join("bin"), stage.scratch().join("providers.json"));
    fs::create_dir_all(&bin)?;
    let host = stage.registry.host();
    let answer = json!({
        "kind": "CredentialProviderResponse",
        "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
        "cacheKeyType": "Registry",
        "cacheDuration": "1s",
        "auth": { &host: { "username": "node", "password": "PASSWORD" } },
    });
    let (before, after) =
        answer.to_string().split_once("PASSWORD").map(|(a, b)| (a.to_owned(), b.to_owned())).context("a place")?;
    let password = stage.scratch().join("password");
    let script = format!(
        "#!/bin/sh\ncat > /dev/null\nprintf '%s' '{before}'\ncat '{}'\nprintf '%s' '{after}'\n",
        password.display()
    );
    fs::write(bin.join("rotating"), script)?;
    fs::set_permissions(bin.join("rotating"), fs::Permissions::from_mode(0o755))?;
    let provider = json!({
        "name": "rotating",
        "matchImages": [host],
        "defaultCacheDuration": "1s",
        "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
    });
    let text = json!({
        "kind": "CredentialProviderConfig", "apiVersion": "kubelet.config.k8s.io/v1", "providers": [provider],
    });
    fs::write(&config, text.to_string())?;
    let path = |path: &Path| path.display().to_string();
    Ok(["--credential-provider-config", &path(&config), "--credential-provider-bin-dir", &path(&bin)]
        .map(str::to_owned)
        .to_vec())
}

/// From now on the registry wants another password, which the provider has.
fn rotate(stage: &Stage, number: usize) -> Result<String> {
    let password = format!("password-{number}");
    fs::write(stage.scratch().join("password"), &password)?;
    stage.registry.want_login("node", &password);
    Ok(password)
}

/// A token for the login, or the head of the refusal.
fn token(registry: &FaultyRegistry, password: &str) -> Result<std::result::Result<String, String>> {
    let header = format!("authorization: {}", login_header("node", password));
    let path = "/token?service=test&scope=repository:team/app:pull";
    let answer = web::get_with(&registry.host(), path, &header)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer")?;
    if !head.starts_with("HTTP/1.1 200") {
        return Ok(Err(head.to_owned()));
    }
    let body: Value = serde_json::from_str(body)?;
    Ok(Ok(body["token"].as_str().context("a token")?.to_owned()))
}

#[test]
fn logins_that_end_are_renewed_without_a_failed_read() -> Result<()> {
    let auth = Auth::Token { login: None, lifetime: TOKEN_LIFETIME };
    let serve = |dir: &Path| FaultyRegistry::with_options(dir, Options { auth, ..Options::default() });
    let stage = Stage::with(hermes(), LINE, &[PARTS], serve, images)?;
    let arguments = provider(&stage)?;
    let mut password = rotate(&stage, 0)?;
    let daemon = stage.daemon(&arguments.iter().map(String::as_str).collect::<Vec<_>>())?;
    let containerd = stage.host.start()?;
    let image = stage.registry.image(PARTS);
    Cri::connect(&containerd.socket())?.pull_as(&image, "node", &password)?;
    let decided = last_pull(daemon.status()?)?;
    ensure!(decided.decision == "lazy", "{decided:?}\n{}", daemon.log());
    run_container(&containerd, &image)?;
    for number in 0..=soak::choose(LOGINS.0, LOGINS.1)? {
        let before = stage.registry.counters().blob_bytes;
        let read = printed(&exec(&containerd, "reader", &format!("cksum < /{}", part(number)))?);
        let read = read.with_context(|| daemon.log())?;
        ensure!(read == cksum(&content(&part(number), PART_LEN_BYTES))?, "part {number}: the container read {read}");
        let came = stage.registry.counters().blob_bytes - before;
        ensure!(came > PART_LEN_BYTES / 10, "only {came} bytes came with login {number}");

        // The next login; all that was given for this one ends.
        let given = token(&stage.registry, &password)?.map_err(anyhow::Error::msg)?;
        let next = rotate(&stage, number + 1)?;
        let bearer = format!("authorization: Bearer {given}");
        wait_for("the end of a token", DEADLINE, || {
            let answer = web::get_with(&stage.registry.host(), "/v2/", &bearer).ok()?;
            answer.starts_with("HTTP/1.1 401").then_some(())
        })?;
        let refused = token(&stage.registry, &password)?.err().context("an old password is still good")?;
        ensure!(refused.starts_with("HTTP/1.1 401"), "{refused}");
        password = next;
    }
    let log = daemon.log();
    ensure!(failures(&log).is_empty(), "{log}");
    let tried = soak::choose(LOGINS.0, LOGINS.1)? + 1;
    ensure!(stage.registry.logins().refused == tried, "{:?}\n{log}", stage.registry.logins());
    println!("{:?}; refused were only the old ones that this test tried", stage.registry.logins());
    drop(containerd);
    daemon.stop().map(drop)
}
