//! `deploy/Containerfile` and the chart agree on who runs what.

use anyhow::{Context as _, Result, ensure};

use crate::chart::root;

#[test]
fn the_image_and_the_chart_run_as_the_same_user() -> Result<()> {
    let read = |path: &str| std::fs::read_to_string(root().join(path)).with_context(|| path.to_owned());
    let file = read("deploy/Containerfile")?;
    let user = file.lines().find_map(|line| line.strip_prefix("USER ")).context("no USER")?;
    let (user, group) = user.split_once(':').context("no group")?;
    ensure!(user != "0", "the controller would be root");
    let controller = read("deploy/manifests/controller.yaml")?;
    for wanted in
        [format!("runAsUser: {user}"), format!("runAsGroup: {group}"), "readOnlyRootFilesystem: true".to_owned()]
    {
        ensure!(controller.contains(&wanted), "the controller's pods have no {wanted}");
    }
    // What the last stage starts is what pods give arguments to.
    ensure!(file.trim_end().ends_with("ENTRYPOINT [\"/usr/local/bin/hermes\"]"), "another entry point");
    Ok(())
}
