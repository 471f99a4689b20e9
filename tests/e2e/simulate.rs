//! The simulator behind the command: scenarios that come with it and from files, sweeps, checks, and exit codes.

use std::path::Path;
use std::process::{Command, Output};

use hermes_tests::guard::ScratchDir;
use hermes_tests::sample::{Sample, TAG};

/// A scenario of two nodes and a small image.
const SMALL: &str = "name = \"two\"\n[cluster]\nnodes = 2\n[image]\nsize = \"20 MB\"\nlayers = 1\nstart_chunks = 40\n";

fn simulate(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_hermes")).arg("simulate").args(arguments).output().expect("the command starts")
}

fn said(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).expect("text")
}

fn small(scratch: &ScratchDir) -> String {
    let file = scratch.make("scenarios").expect("a folder").join("two.toml");
    std::fs::write(&file, SMALL).expect("write the scenario");
    file.to_str().expect("a UTF-8 path").to_owned()
}

#[test]
fn a_scenario_is_listed_printed_run_and_swept() {
    assert!(said(&simulate(&["list"])).contains("start-1000"));
    assert!(said(&simulate(&["list", "gpu-scale-up"])).contains("[registry]"));
    let scratch = ScratchDir::new("simulate").expect("a folder");
    let file = small(&scratch);
    let run = || {
        let answer = said(&simulate(&["run", &file, "--seed", "7", "--json"]));
        serde_json::from_str::<serde_json::Value>(&answer).expect("JSON")
    };
    let report = run();
    assert_eq!((&report["ready"], &report["starts"], &report["violation"]), (&2.into(), &2.into(), &().into()));
    assert_eq!(report, run(), "one seed is one run");
    let table = said(&simulate(&["sweep", &file, "cluster.nodes=1,3"]));
    assert!(table.contains("1/1") && table.contains("3/3"), "{table}");
    let text = said(&simulate(&["run", &file, "--set", "cluster.nodes=1"]));
    assert!(text.contains("1 of 1 ready") && text.contains("real time"), "{text}");
}

#[test]
fn strategies_are_compared_and_a_page_and_figures_are_written() {
    let scratch = ScratchDir::new("simulate-compare").expect("a folder");
    let file = small(&scratch);
    let folder = scratch.make("reports").expect("a folder");
    let [page, figures] =
        ["two.html", "two.csv"].map(|name| folder.join(name).to_str().expect("a UTF-8 path").to_owned());
    let files = ["--html", &page, "--csv", &figures];
    let table =
        said(&simulate(&[&["compare", &file, "--strategies", "hermes,containerd,kraken"][..], &files].concat()));
    assert!(
        table.contains("FAILED PODS") && ["hermes", "containerd", "kraken"].iter().all(|name| table.contains(name)),
        "{table}"
    );
    let text = std::fs::read_to_string(&page).expect("the page was written");
    assert!(text.contains("<svg") && text.contains("containerd"), "{text}");
    assert!(std::fs::read_to_string(&figures).expect("the figures were written").contains("\nkraken,"));
    said(&simulate(&[&["run", &file][..], &files].concat()));
    assert!(std::fs::read_to_string(&page).expect("the page was written").contains("The run"));
    let models = said(&simulate(&["compare", &file, "--strategies", "hermes", "--models"]));
    assert!(models.contains("| `dragonfly` |"), "{models}");
}

#[test]
fn a_real_image_is_simulated_by_its_shape() -> anyhow::Result<()> {
    let scratch = ScratchDir::new("simulate-shape")?;
    let hermes = Path::new(env!("CARGO_BIN_EXE_hermes"));
    let sample = Sample::new(&scratch.path().join("layout"))?;
    let index = sample.build_index(hermes, &scratch.make("index")?)?;
    let folder = scratch.make("scenario")?;
    let image = format!("oci:{}:{TAG}", sample.layout.dir().display());
    let mut export = Command::new(hermes);
    export.args(["index", "export-shape", &image, "--json", "--index"]).arg(&index.folder);
    let answer = said(&export.arg("--to").arg(folder.join("app.json")).output()?);
    let answer: serde_json::Value = serde_json::from_str(&answer)?;
    let scenario = folder.join("app.toml");
    std::fs::write(
        &scenario,
        "name = \"a sample\"\n[cluster]\nnodes = 3\n[image]\nshape = \"app.json\"\nstart_chunks = 30\n",
    )?;
    let report = said(&simulate(&["run", scenario.to_str().expect("a UTF-8 path"), "--json"]));
    let report: serde_json::Value = serde_json::from_str(&report)?;
    assert_eq!((&answer["start_chunks"], &report["ready"]), (&0.into(), &3.into()));
    // All three layers, of 5 MB, are there: files are not, and neither are their names.
    assert!(answer["chunks"].as_u64().is_some_and(|chunks| chunks > 70), "{answer}");
    let text = std::fs::read_to_string(folder.join("app.json"))?;
    assert!(sample.names().all(|name| !text.contains(name)), "{text}");
    Ok(())
}

#[test]
fn what_does_not_hold_or_cannot_be_read_fails() {
    let scratch = ScratchDir::new("simulate-bad").expect("a folder");
    let file = small(&scratch);
    for (arguments, code, what) in [
        (vec!["run", "no-such-scenario"], 2, "gpu-scale-up"),
        (vec!["run", &file, "--set", "cluster.node=3"], 2, "unknown field `node`"),
        (vec!["run", &file, "--set", "registry.bandwidth=fast"], 2, "`registry.bandwidth`"),
        (vec!["run", &file, "--set", "cluster.zones=0"], 2, "cluster.zones is 0, but must be between 1 and 64"),
        (vec!["compare", &file, "--strategies", "hermes,hades"], 2, "\"hades\" is no strategy"),
        (vec!["sweep", &file, "cluster.nodes="], 2, "write FIELD=A,B,C"),
        (vec!["run", &file, "--set", "expect.ready_within=1 ms"], 1, "liveness"),
        (vec!["replay", &file], 6, "line 1 is no line of a hermes-decisions/1 record"),
        (vec!["replay", "/no/record"], 3, "/no/record"),
    ] {
        let output = simulate(&arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {error}");
        assert!(error.contains(what) && error.trim().lines().count() == 1, "{arguments:?}: {error}");
    }
    assert!(said(&simulate(&["check", "--from", "5", "--seeds", "3"])).contains("3 worlds, nothing violated"));
    assert!(said(&simulate(&["check", "--seed", "1", "--set", "nodes=2"])).contains("drawn from seed 1"));
}
