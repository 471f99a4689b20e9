//! `hermes mount` and `hermes unmount`.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use hermes_snapshotter::control::{self, Answer, ControlError, FailureClass, MountRequest, Request};
use hermes_snapshotter::status::Way;

use super::{ImageArgs, StateArgs};
use crate::output::{self, Classed, failure};

/// How long a daemon may take until it listens: it opens its store and probes the kernel, well below a second each.
const DAEMON_START_TIMEOUT: Duration = Duration::from_secs(30);

/// How often a daemon that ends at that very moment is replaced by a new one.
const MOUNT_ATTEMPTS: u32 = 3;

/// Arguments of `hermes mount`.
#[derive(Debug, Args)]
pub(crate) struct MountArgs {
    #[command(flatten)]
    image: ImageArgs,
    /// An empty folder.
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// A node to ask before the registry, as host:port or a multiaddress. May be given more than once.
    #[arg(long = "peer", value_name = "ADDR")]
    peers: Vec<String>,
    /// A folder of indexes, as `hermes index build --output` writes it. May be given more than once.
    #[arg(long = "index", value_name = "DIR")]
    index_folders: Vec<PathBuf>,
    /// A key whose index statements are accepted, beside the node's own. May be given more than once.
    #[arg(long = "trust", value_name = "KEY")]
    trusted_keys: Vec<String>,
    /// Fail when nobody has an index, instead of reading the whole image once to build it.
    #[arg(long)]
    no_build: bool,
    /// Show the tree this way: erofs-files, erofs-fuse or fuse-tree. The best that works when absent.
    #[arg(long)]
    way: Option<Way>,
    #[command(flatten)]
    state: StateArgs,
    /// Where a daemon that this command starts listens for peers.
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// Print the answer as JSON.
    #[arg(long)]
    json: bool,
}

/// Arguments of `hermes unmount`.
#[derive(Debug, Args)]
pub(crate) struct UnmountArgs {
    /// The folder that was given to `hermes mount`.
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    #[command(flatten)]
    state: StateArgs,
}

/// Arguments of `hermes complete`.
#[derive(Debug, Args)]
pub(crate) struct CompleteArgs {
    /// The folder where it is mounted, or the image as it was named then.
    #[arg(value_name = "DIR|IMAGE", required_unless_present_any = ["pause", "resume"])]
    image: Option<String>,
    /// Pause completing images in the background, until --resume.
    #[arg(long, conflicts_with_all = ["image", "resume"])]
    pause: bool,
    /// Go on with it.
    #[arg(long, conflicts_with = "image")]
    resume: bool,
    #[command(flatten)]
    state: StateArgs,
}

/// Mounts an image through the daemon of the state folder, which is started when there is none.
pub(crate) async fn mount(args: MountArgs) -> anyhow::Result<()> {
    let absolute = |path: &Path| std::path::absolute(path).with_context(|| format!("cannot find {}", path.display()));
    let request = MountRequest {
        image: absolute_layout(&args.image.image)?,
        dir: absolute(&args.dir)?,
        platform: args.image.platform.clone(),
        plain_http: args.image.plain_http,
        peers: args.peers.clone(),
        index_folders: args.index_folders.iter().map(|folder| absolute(folder)).collect::<Result<_, _>>()?,
        trusted_keys: args.trusted_keys.clone(),
        build_missing_index: !args.no_build,
        way: args.way,
    };
    let state = absolute(&args.state.state)?;
    let request = Request::Mount(request);
    let bar = output::byte_bar(0, "mounting");
    let mut attempts = 0;
    let answer = loop {
        ensure_daemon(&state, args.listen.as_deref()).await?;
        attempts += 1;
        match control::ask(&state, &request, |progress| output::show_progress(&bar, progress)).await {
            // It was about to end, because nothing was mounted any more.
            Err(ControlError::NotRunning { .. } | ControlError::NoAnswer) if attempts < MOUNT_ATTEMPTS => {}
            answer => break answer,
        }
    };
    bar.finish_and_clear();
    let answer = expect_done(answer)?;
    if args.json {
        println!("{}", serde_json::to_string(&answer)?);
    } else if let Answer::Mounted { dir, way, detail } = answer {
        println!("{} is mounted at {} ({way}{detail})", args.image.image, dir.display());
    }
    Ok(())
}

/// Unmounts through the daemon.
pub(crate) async fn unmount(args: UnmountArgs) -> anyhow::Result<()> {
    let state = std::path::absolute(&args.state.state)?;
    let request = Request::Unmount { dir: std::path::absolute(&args.dir)? };
    expect_done(control::ask(&state, &request, |_| ()).await)?;
    Ok(())
}

/// Fetches what is missing, through the daemon; or pauses what the daemon does so by itself.
pub(crate) async fn complete(args: CompleteArgs) -> anyhow::Result<()> {
    let state = std::path::absolute(&args.state.state)?;
    let request = match args.image {
        Some(image) => Request::Complete { dir: std::path::absolute(&image)?, image },
        None => Request::PauseCompletion { paused: args.pause },
    };
    let bar = output::byte_bar(0, "fetching");
    let answer = control::ask(&state, &request, |progress| output::show_progress(&bar, progress)).await;
    bar.finish_and_clear();
    expect_done(answer)?;
    Ok(())
}

/// The daemon has another working folder, so a layout's path is made absolute here.
fn absolute_layout(image: &str) -> anyhow::Result<String> {
    let Some(path) = image.strip_prefix("oci:") else { return Ok(image.to_owned()) };
    Ok(format!("oci:{}", std::path::absolute(path)?.display()))
}

/// The last answer, with failures as errors.
pub(crate) fn expect_done(answer: Result<Answer, ControlError>) -> anyhow::Result<Answer> {
    match answer {
        Ok(Answer::Failed(failed)) => Err(Classed(failed).into()),
        Ok(answer) => Ok(answer),
        Err(error @ ControlError::NotRunning { .. }) => Err(failure(
            FailureClass::NotFound,
            format!("{error}; `hermes mount` starts one, --state names another folder"),
        )),
        Err(error @ ControlError::Denied { .. }) => Err(failure(FailureClass::Denied, error.to_string())),
        Err(error) => Err(failure(FailureClass::Local, error.to_string())),
    }
}

/// Starts the daemon of `state` unless it runs. It ends by itself when nothing is mounted any more.
async fn ensure_daemon(state: &Path, listen: Option<&str>) -> anyhow::Result<()> {
    if control::ask(state, &Request::Status, |_| ()).await.is_ok() {
        return Ok(());
    }
    if !rustix::process::geteuid().is_root() {
        return Err(failure(FailureClass::Denied, "mounting needs root; run it with sudo"));
    }
    hermes_snapshotter::node::private_folder(state).map_err(|error| {
        failure(FailureClass::Local, format!("cannot make the state folder {}: {error}", state.display()))
    })?;
    let log_path = state.join("daemon.log");
    let log = std::fs::File::options().create(true).append(true).open(&log_path)?;
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("node").arg("--exit-when-unused").arg("--state").arg(state).arg("-v");
    // Whoever looks into an image has not asked for all of it; `hermes complete` does.
    command.args(["--complete", "never"]);
    if let Some(listen) = listen {
        command.args(["--listen", listen]);
    }
    // Whoever supervises this command does not supervise the daemon.
    command.env_remove("NOTIFY_SOCKET").env_remove("LISTEN_FDS");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).process_group(0);
    let mut child = command.spawn().context("cannot start the daemon")?;
    wait_until_listening(state, &mut child, &log_path).await
}

async fn wait_until_listening(state: &Path, child: &mut Child, log_path: &Path) -> anyhow::Result<()> {
    let deadline = Instant::now() + DAEMON_START_TIMEOUT;
    loop {
        if control::ask(state, &Request::Status, |_| ()).await.is_ok() {
            return Ok(());
        }
        let last_line = || {
            let log = std::fs::read_to_string(log_path).unwrap_or_default();
            log.lines().last().unwrap_or("it said nothing").to_owned()
        };
        if let Some(status) = child.try_wait()? {
            let class = match status.code() {
                Some(4) => FailureClass::Denied,
                _ => FailureClass::Local,
            };
            return Err(failure(class, format!("the daemon ended ({status}): {}", last_line())));
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            return Err(failure(
                FailureClass::Local,
                format!("the daemon did not start within {DAEMON_START_TIMEOUT:?}: {}", last_line()),
            ));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
