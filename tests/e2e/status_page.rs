//! The status page in a real browser: of a real controller with a real image and node, and of a made-up cluster of 2,000
//! nodes and 200 images, whose controller and streams are real.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hermes_browser::{Browser, Key};
use hermes_controller::api::custody::Custody;
use hermes_controller::api::hub::Hub;
use hermes_controller::api::limits::ApiLimits;
use hermes_controller::api::numbers::Numbers;
use hermes_controller::api::review::Viewers;
use hermes_controller::api::review::tokens::TokenFile;
use hermes_controller::api::{Api, ApiParts};
use hermes_controller::artifacts::{ArtifactSettings, Artifacts};
use hermes_controller::authority::folder::AuthorityFolder;
use hermes_controller::event::{
    Action, Audience as _, Event, Failure, FailureClass, ImageKey, ImageView, Name, NodeReport, Phase, UnixMillis,
};
use hermes_controller::page::{Board, Page};
use hermes_controller::signing::{KeySet, Keys};
use hermes_image::access::Access;
use hermes_image::ids::Digest;
use hermes_tests::daemon::Daemon;
use hermes_tests::faulty::FaultyRegistry;
use hermes_tests::guard::{ProcessGuard, ScratchDir, wait_for};
use hermes_tests::sample::{Sample, TAG};
use serde_json::json;
use tokio::sync::mpsc;

/// How long something may take that has no time of its own, where others compile.
const DEADLINE: Duration = Duration::from_secs(120);
const VIEWER: &str = "a-token-for-people-who-look";
/// A text that would be an attack if anything took it for markup.
const HOSTILE: &str = "<img src=x onerror=window.stung=1>";
/// How long the cluster of the second test may take to join.
const UP_DEADLINE: Duration = Duration::from_secs(300);

fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

fn text_has(id: &str, text: &str) -> String {
    format!("document.getElementById({}).innerText.includes({})", json!(id), json!(text))
}

/// Writes a token into the form and sends it.
fn sign_in(browser: &mut Browser, token: &str) -> Result<()> {
    browser.evaluate("document.querySelector('input').focus()")?;
    browser.write(token)?;
    browser.press(Key::ENTER)
}

fn is_drawn(browser: &mut Browser) -> Result<()> {
    browser.wait("the map", "performance.getEntriesByName('map-drawn').length > 0")
}

/// Which colours the map has, as far as they are many.
fn colours(browser: &mut Browser) -> Result<u64> {
    let expression = "(() => { const canvas = document.querySelector('#map canvas');
        const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d', { willReadFrequently: true });
        copy.drawImage(canvas, 0, 0);
        const data = copy.getImageData(130, 10, canvas.width - 140, canvas.height - 20).data;
        const seen = new Set(); for (let at = 0; at < data.length; at += 4) { seen.add(data[at] << 16 | data[at + 1] << 8 | data[at + 2]); }
        return seen.size; })()";
    browser.evaluate(expression)?.as_u64().context("a count")
}

/// What has the focus after each of so many presses of Tab.
fn tab_through(browser: &mut Browser, presses: usize) -> Result<Vec<String>> {
    let mut passed = Vec::new();
    for _ in 0..presses {
        browser.press(Key::TAB)?;
        let id = browser.evaluate("document.activeElement.id || document.activeElement.textContent.slice(0, 40)")?;
        passed.push(id.as_str().unwrap_or_default().to_owned());
    }
    Ok(passed)
}

/// No text has become an element or a script.
fn nothing_has_run(browser: &mut Browser) -> Result<()> {
    ensure!(browser.evaluate("document.images.length")? == 0, "a text has become an element");
    ensure!(browser.evaluate("typeof window.stung")? == "undefined", "a text has run");
    Ok(())
}

/// A controller without Kubernetes that serves nodes and the page.
struct Controller {
    scratch: ScratchDir,
    _process: ProcessGuard,
}

impl Controller {
    fn start(image: &str) -> Result<Self> {
        let scratch = ScratchDir::new("status-page")?;
        let path = |name: &str| scratch.path().join(name);
        fs::create_dir(path("policies"))?;
        let group = "hermes.cloudpilot.ai/v1alpha1";
        let policy = json!({
            "apiVersion": group, "kind": "HermesPolicy", "metadata": {"name": "everything"},
            "spec": {"imageSelectors": [{"imageRegex": ""}]},
        });
        let hostile = json!({
            "apiVersion": group, "kind": "HermesPolicy", "metadata": {"name": "hostile"},
            "spec": {"imageSelectors": [{"imageRegex": HOSTILE}]},
        });
        let list = json!({"apiVersion": group, "kind": "ImageList", "metadata": {"name": "list"}, "images": [image]});
        fs::write(path("policies/policy.json"), policy.to_string())?;
        fs::write(path("policies/hostile.json"), hostile.to_string())?;
        fs::write(path("policies/list.json"), list.to_string())?;
        fs::write(path("tokens"), format!("node-1 token-of-the-first-node\n@viewer {VIEWER}\n"))?;
        fs::set_permissions(path("tokens"), fs::Permissions::from_mode(0o600))?;
        let mut command = Command::new(hermes());
        command.args(["-v", "controller", "--listen", "127.0.0.1:0", "--cluster", "prod", "--policies"]);
        command.arg(path("policies")).arg("--state").arg(path("state")).arg("--join-tokens").arg(path("tokens"));
        command.arg("--docker-config").arg(path("none.json")).arg("--hosts-dir").arg(path("hosts"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(path("log"))?);
        Ok(Self { _process: ProcessGuard::start(&mut command)?, scratch })
    }

    fn log(&self) -> String {
        fs::read_to_string(self.scratch.path().join("log")).unwrap_or_default()
    }

    fn address(&self) -> Result<String> {
        let said =
            |line: &str| Some(line.split_once("nodes are served")?.1.split_once("address=")?.1.trim().to_owned());
        wait_for("the address", DEADLINE, || self.log().lines().find_map(said)).with_context(|| self.log())
    }

    /// The daemon of `node-1`, with the image mounted and read.
    fn node(&self, address: &str, image: &str, sample: &Sample) -> Result<Daemon> {
        let text = |path: PathBuf| path.display().to_string();
        let token = self.scratch.path().join("token");
        fs::write(&token, "token-of-the-first-node\n")?;
        let arguments = [
            ("--listen", "127.0.0.1:0".to_owned()),
            ("--cluster", "prod".to_owned()),
            ("--controller", address.to_owned()),
            ("--controller-ca", text(self.scratch.path().join("state/api-roots.pem"))),
            ("--controller-token", text(token)),
            ("--node-name", "node-1".to_owned()),
        ];
        let arguments: Vec<&str> = arguments.iter().flat_map(|(name, value)| [*name, value.as_str()]).collect();
        let daemon = Daemon::start(hermes(), &self.scratch.path().join("node"), &arguments)?;
        let dir = self.scratch.make("mount")?;
        wait_for("the node to know the image", DEADLINE, || {
            let mut command = daemon.command(&["mount", image]);
            let mounted = command.arg(&dir).arg("--no-build").output().ok()?;
            mounted.status.success().then_some(())
        })
        .with_context(|| daemon.log())?;
        sample.check(&dir)?;
        Ok(daemon)
    }
}

#[test]
fn the_page_shows_what_a_real_controller_knows() -> Result<()> {
    let layout = ScratchDir::new("status-page-layout")?;
    let sample = Sample::new(&layout.path().join("layout"))?;
    let registry = FaultyRegistry::start(sample.layout.dir())?;
    let image = registry.image(TAG);
    let controller = Controller::start(&image)?;
    let address = controller.address()?;
    let url = format!("https://{address}/status");
    let mut browser = Browser::start(1280, 900)?;

    // Nobody gets in without a token, and a wrong one is none.
    browser.go(&url)?;
    ensure!(browser.evaluate("location.pathname")? == "/status/login");
    ensure!(browser.problems()?.is_empty(), "the form complains");
    sign_in(&mut browser, "a-token-that-nobody-has-given-out")?;
    browser.wait("the refusal", &text_has("notice", "is not known"))?;
    let problems = browser.problems()?;
    ensure!(problems.iter().all(|problem| problem.contains("401")), "{problems:?}");
    let status = browser.evaluate("fetch('/status/api/v1/images').then((answer) => answer.status)")?;
    ensure!(status == 401, "data without a token: {status}");
    browser.problems()?;

    sign_in(&mut browser, VIEWER)?;
    browser.wait("the page", "location.pathname === '/status'")?;
    ensure!(browser.evaluate("document.cookie")? == "", "a script can read the cookie");
    let daemon = controller.node(&address, &image, &sample)?;
    browser.wait("the image", &text_has("image-rows", &image))?;
    browser.wait("its phase", &text_has("image-rows", "Ready"))?;
    browser.wait("the node", &text_has("node-rows", "node-1"))?;
    browser.wait("its connection", &text_has("node-rows", "connected"))?;
    browser.wait("what it holds", "/complete|[1-9]\\d? %/.test(document.getElementById('detail-rows').innerText)")?;
    browser.wait("the policy", &text_has("policy-rows", "everything"))?;
    is_drawn(&mut browser)?;

    browser.wait("the policy that means harm", &text_has("policy-rows", HOSTILE))?;
    nothing_has_run(&mut browser)?;

    // What changes while somebody looks leaves the focus where it is.
    browser.evaluate("document.getElementById('map').focus()")?;
    let before = browser.evaluate("document.getElementById('state').innerText")?;
    let again = format!("document.getElementById('state').innerText !== {before}");
    browser.wait("the next look", &again)?;
    ensure!(browser.evaluate("document.activeElement.id")? == "map");
    ensure!(browser.layout_shift()? == 0.0, "the page moves by {}", browser.layout_shift()?);
    let problems = browser.problems()?;
    ensure!(problems.is_empty(), "{problems:?}");

    browser.evaluate("document.querySelector('header form').requestSubmit()")?;
    browser.wait("the form", "location.pathname === '/status/login' && document.querySelector('input')")?;
    browser.go(&url)?;
    ensure!(browser.evaluate("location.pathname")? == "/status/login", "signing out leaves the door open");
    daemon.stop()?;
    Ok(())
}

/// An API with the page of what `board` hears, which knows the token of [`VIEWER`].
async fn page_of(board: Arc<Board>, scratch: &ScratchDir) -> Result<Api> {
    let keys = Keys::new(KeySet::new(UnixMillis(0)));
    let place = scratch.path().join("artifacts").display().to_string();
    let (artifacts, _) = Artifacts::open(&place, ArtifactSettings::default(), keys.clone(), UnixMillis(0)).await?;
    let path = scratch.path().join("tokens");
    fs::write(&path, format!("@viewer {VIEWER}\n"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    let (tokens, numbers) = (Arc::new(TokenFile::new(path)), Arc::new(Numbers::default()));
    let kept = AuthorityFolder::new(scratch.path().join("authority"));
    let authority = kept.load_or_create(&"prod".parse()?, hermes_p2p::unix_now())?;
    let (events, _) = mpsc::channel(1);
    let viewers = Arc::clone(&tokens) as Arc<dyn Viewers>;
    let page = Some(Arc::new(Page::new("prod", board, viewers, Arc::clone(&numbers))));
    let (hub, limits) = (Arc::new(Hub::new(keys)), ApiLimits::default());
    let custody = Arc::new(Custody::in_folder(authority, kept));
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    Ok(Api::start(ApiParts { listen, custody, reviewer: tokens, hub, artifacts, events, numbers, limits, page })
        .await?)
}

/// An image whose name and failure are hostile.
fn hostile_image() -> ImageView {
    let name = Name { reference: format!("{HOSTILE}:1"), platform: HOSTILE.to_owned() };
    let (class, message) = (FailureClass::Unfit, HOSTILE.to_owned());
    ImageView {
        image: ImageKey { manifest: Digest([7; 32]) },
        names: BTreeSet::from([name]),
        policies: BTreeSet::from([HOSTILE.to_owned()]),
        phase: Phase::Failed,
        failure: Some(Failure { class, reason: "LayerInvalid", message, retry_after: None }),
        attempts: 1,
        next_attempt: None,
        image_len_bytes: 1,
        read_bytes: 0,
        since: UnixMillis(0),
        index: None,
        access: Access::Public,
        profile: None,
        seeds: BTreeMap::new(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_images_and_nodes_are_called_stays_text() -> Result<()> {
    let scratch = ScratchDir::new("status-page-hostile")?;
    let board = Arc::new(Board::new(UnixMillis(0)));
    let api = page_of(Arc::clone(&board), &scratch).await?;
    let view = hostile_image();
    let images = BTreeMap::from([(view.image.manifest, 50)]);
    board.hear(&Action::Publish(Arc::new(view)));
    let report =
        NodeReport { version: HOSTILE.to_owned(), ways: vec![HOSTILE.to_owned()], images, ..NodeReport::default() };
    board.learn(&Event::Reported { node: HOSTILE.to_owned(), report });
    let url = format!("https://{}/status", api.address());
    let looked = tokio::task::spawn_blocking(move || -> Result<()> {
        let mut browser = Browser::start(1280, 900)?;
        browser.go(&url)?;
        sign_in(&mut browser, VIEWER)?;
        is_drawn(&mut browser)?;
        for place in ["image-rows", "node-rows", "detail-title", "detail-rows"] {
            browser.wait(place, &text_has(place, HOSTILE))?;
        }
        browser.evaluate("document.getElementById('map').focus()")?;
        browser.press(Key::RIGHT)?;
        browser.wait("the cell", &text_has("readout", HOSTILE))?;
        nothing_has_run(&mut browser)?;
        let problems = browser.problems()?;
        ensure!(problems.is_empty(), "{problems:?}");
        Ok(())
    });
    looked.await??;
    api.stop().await;
    Ok(())
}

/// `hermes bench page --hold`: where the page is, and a token.
fn made_up_cluster() -> Result<(ProcessGuard, String, String)> {
    let mut command = Command::new(hermes());
    command.args(["bench", "page", "--hold"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut process = ProcessGuard::start(&mut command)?;
    let output = process.child().stdout.take().context("its output is a pipe")?;
    let (tell, told) = std::sync::mpsc::sync_channel(1);
    std::thread::spawn(move || tell.send(BufReader::new(output).lines().next()));
    let line = told.recv_timeout(UP_DEADLINE).context("the cluster does not come up")?.context("it has ended")??;
    let (url, token) = line.split_once(' ').context("a place and a token")?;
    Ok((process, url.to_owned(), token.to_owned()))
}

#[test]
fn two_thousand_nodes_and_two_hundred_images_are_seen_and_walked_by_keyboard() -> Result<()> {
    let (_process, url, token) = made_up_cluster()?;
    let mut browser = Browser::start(1440, 1000)?;
    browser.go(&url)?;
    sign_in(&mut browser, &token)?;
    is_drawn(&mut browser)?;
    browser.go(&url)?;
    is_drawn(&mut browser)?;
    browser.wait("all cells", "document.getElementById('map-count').innerText === '2,000 × 200'")?;
    let (first, content) = browser.first_paint_ms()?;
    println!("first paint {first:.0} ms, first content {content:.0} ms");
    ensure!(colours(&mut browser)? > 20, "the map is empty");
    ensure!(browser.evaluate("document.getElementById('t-nodes').innerText")? == "2,000");
    browser.wait("images that failed", &text_has("image-rows", "AccessDenied"))?;
    browser.wait("the chart", "document.querySelectorAll('#chart polygon').length === 4")?;

    // All that can be used is reached by Tab, once, in the order of the page.
    browser.evaluate("document.activeElement.blur()")?;
    let passed = tab_through(&mut browser, 45)?;
    let place = |id: &str| passed.iter().position(|passed| passed == id).with_context(|| format!("{id}: {passed:?}"));
    let order = ["filter-nodes", "filter-images", "sort", "zoom-in", "map", "show-node", "chart", "phase"];
    let places = order.iter().map(|id| place(id)).collect::<Result<Vec<_>>>()?;
    ensure!(places.is_sorted(), "{passed:?}");

    // In the map, arrows move from cell to cell, and the table beside it says in words what is there.
    browser.evaluate("document.getElementById('map').focus()")?;
    let readout = |browser: &mut Browser| browser.evaluate("document.getElementById('readout').innerText");
    let mut seen = BTreeSet::new();
    for key in [Key::RIGHT, Key::DOWN, Key::RIGHT, Key::END, Key::DOWN, Key::LEFT, Key::PLUS, Key::PLUS, Key::DOWN] {
        browser.press(key)?;
        seen.insert(readout(&mut browser)?.to_string());
    }
    ensure!(seen.len() >= 6 && seen.iter().all(|text| text.contains("node-")), "{seen:?}");
    ensure!(browser.evaluate("document.querySelectorAll('#detail-rows tr').length")? == 200);
    ensure!(
        browser
            .evaluate("document.getElementById('map').scrollHeight > document.getElementById('map').clientHeight")?
            == true
    );
    browser.evaluate("document.getElementById('show-image').click()")?;
    browser.wait("the nodes of the image", &text_has("detail-rows", "node-"))?;

    // Filters hold for map and tables.
    browser.evaluate("document.getElementById('filter-nodes').focus()")?;
    browser.write("node-19")?;
    browser.wait("fewer nodes", "document.getElementById('map-count').innerText === '100 × 200'")?;
    browser.wait("fewer rows", &text_has("node-count", "100 of 2,000"))?;
    browser.evaluate("document.getElementById('filter-nodes').select()")?;
    browser.write("no such node")?;
    browser.wait("no nodes", &text_has("node-rows", "No node is left"))?;
    browser.evaluate("document.getElementById('filter-nodes').select()")?;
    browser.write(" ")?;
    browser.wait("all nodes", "document.getElementById('map-count').innerText === '2,000 × 200'")?;

    // The figures of the chart are there as text.
    browser.evaluate("document.getElementById('chart-table').click()")?;
    browser.wait("the chart's table", "document.querySelectorAll('#chart-rows tr').length === 96")?;
    ensure!(browser.layout_shift()? == 0.0, "the page moves by {}", browser.layout_shift()?);

    // A phone, in the dark: nothing is wider than the screen.
    browser.set_dark(true)?;
    browser.resize(390, 844, 2.0)?;
    browser.wait("a narrow page", "document.documentElement.scrollWidth <= 390")?;
    browser.wait("dark colours", "getComputedStyle(document.body).backgroundColor === 'rgb(15, 20, 26)'")?;
    ensure!(colours(&mut browser)? > 20, "the map is empty on a phone");
    let problems = browser.problems()?;
    ensure!(problems.is_empty(), "{problems:?}");
    Ok(())
}
