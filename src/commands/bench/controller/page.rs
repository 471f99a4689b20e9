//! `hermes bench page`: the status page of a large cluster in a real browser.
//!
//! The controller, its nodes and their reports are those of `hermes bench controller`; what they report is made up. The
//! browser is Debian's Chromium without a window, on the same cores.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use hermes_browser::Browser;

use super::super::report::{self, Line};
use super::made_up::{self, IMAGES};
use super::nodes::{Cluster, TOKEN};
use super::{Controller, JOIN_MAX, raise_file_limit};

/// When the first of the page is to be painted, in milliseconds.
const FIRST_PAINT_MS: f64 = 1000.0;
/// Loads of the page; the slowest counts.
const LOADS: usize = 5;
/// The window, in pixels of the page.
const WINDOW: (u32, u32) = (1440, 1000);

/// Arguments of `hermes bench page`.
#[derive(Debug, Args)]
pub(crate) struct PageArgs {
    /// Nodes, each with a stream, that hold parts of 200 images.
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    nodes: u32,
    /// Write a picture of the page there, as PNG, and measure nothing.
    #[arg(long, value_name = "FILE")]
    screenshot: Option<PathBuf>,
    /// The picture is of the dark page.
    #[arg(long, requires = "screenshot")]
    dark: bool,
    /// Print where the page is and a token for it, and serve it until the input ends.
    #[arg(long, conflicts_with = "screenshot")]
    hold: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the benchmark.
pub(crate) async fn run(args: PageArgs) -> anyhow::Result<()> {
    raise_file_limit(u64::from(args.nodes) + 1000)?;
    let folder = tempfile::tempdir()?;
    let controller = Controller::start(folder.path(), args.nodes, IMAGES, &["--page"]).await?;
    let mut cluster = Cluster::start(&controller.address, folder.path(), args.nodes as usize, Some(made_up::report));
    tokio::time::timeout(JOIN_MAX, cluster.settled()).await.context("the nodes did not all join")??;
    let url = format!("https://{}/status", controller.address);
    if args.hold {
        println!("{url} {TOKEN}");
        tokio::task::spawn_blocking(|| std::io::copy(&mut std::io::stdin(), &mut std::io::sink())).await??;
    } else {
        let nodes = args.nodes;
        let seen =
            tokio::task::spawn_blocking(move || look(&url, nodes, args.screenshot.as_deref(), args.dark)).await??;
        if !seen.is_empty() {
            report::print("page", &seen, args.json)?;
        }
    }
    drop(cluster);
    controller.stop().await
}

fn sign_in(browser: &mut Browser, url: &str) -> anyhow::Result<()> {
    browser.go(url)?;
    browser.evaluate("document.querySelector('input').focus()")?;
    browser.write(TOKEN)?;
    browser.evaluate("document.querySelector('form').requestSubmit()")?;
    browser.wait("the map", "performance.getEntriesByName('map-drawn').length > 0")
}

fn look(url: &str, nodes: u32, screenshot: Option<&Path>, is_dark: bool) -> anyhow::Result<Vec<Line>> {
    let mut browser = Browser::start(WINDOW.0, WINDOW.1)?;
    browser.set_dark(is_dark)?;
    sign_in(&mut browser, url)?;
    if let Some(path) = screenshot {
        // A cell somewhere in the middle, and all of the page.
        browser.evaluate("document.getElementById('map').focus({ preventScroll: true })")?;
        for key in [hermes_browser::Key::RIGHT; 17] {
            browser.press(key)?;
        }
        browser.evaluate("document.activeElement.blur()")?;
        let height = browser.evaluate("document.documentElement.scrollHeight")?;
        let height = height.as_u64().and_then(|height| u32::try_from(height).ok()).unwrap_or(WINDOW.1);
        browser.resize(WINDOW.0, height, 1.0)?;
        browser.evaluate("new Promise((done) => setTimeout(done, 500))")?;
        browser.screenshot(path)?;
        return Ok(Vec::new());
    }
    let (mut paint, mut drawn, mut shift) = (0.0_f64, 0.0_f64, 0.0_f64);
    for _ in 0..LOADS {
        browser.go(url)?;
        browser.wait("the map", "performance.getEntriesByName('map-drawn').length > 0")?;
        paint = paint.max(browser.first_paint_ms()?.1);
        let mark = browser.evaluate("performance.getEntriesByName('map-drawn')[0].startTime")?;
        drawn = drawn.max(mark.as_f64().context("a mark has a time")?);
        shift = shift.max(browser.layout_shift()?);
    }
    let bytes = "performance.getEntriesByType('resource').reduce((sum, entry) => sum + entry.transferSize, 0)";
    let bytes = browser.evaluate(bytes)?.as_f64().unwrap_or_default();
    let line = |what: &str, figure: String, against: &str, ratio: f64, reach: &'static str| Line {
        what: format!("{what}, {nodes} nodes x {IMAGES} images"),
        figure,
        against: against.to_owned(),
        ratio,
        reach,
    };
    Ok(vec![
        line("first paint", format!("{paint:.0} ms"), "1 s", paint / FIRST_PAINT_MS, "<= 1"),
        line("map drawn", format!("{drawn:.0} ms"), "1 s", drawn / FIRST_PAINT_MS, ""),
        line("layout shift", format!("{shift:.4}"), "0.1 is good", shift / 0.1, "<= 0"),
        line("data of the first load", format!("{:.0} KB", bytes / 1000.0), "1 MB", bytes / 1.0e6, ""),
    ])
}
