//! Alerts and dashboard: every metric and label value that they name is in the tables, promtool takes the rules and sees each of
//! them fire, and docs/operations.md says what to do about each.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use hermes_metrics::{Kind, Metric};
use hermes_tests::command::run;
use serde_json::Value;

use crate::chart::{program, root};

fn tables() -> impl Iterator<Item = &'static Metric> {
    hermes_snapshotter::metrics::METRICS.iter().chain(hermes_controller::metrics::METRICS)
}

/// The series of a metric, by the endings that Prometheus gives those of a histogram.
fn metric(name: &str) -> Option<&'static Metric> {
    let histogram = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
    tables().find(|metric| match metric.kind {
        Kind::Histogram => Some(metric.name) == histogram,
        Kind::Counter | Kind::Gauge => metric.name == name,
    })
}

/// Checks every `hermes_...` of an expression, and the values that its own label is compared with.
fn check(expression: &str) -> Result<()> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut rest = expression;
    while let Some(at) = rest.find("hermes_") {
        let text = &rest[at..];
        let end = text.find(|c| !is_word(c)).unwrap_or(text.len());
        let (name, after) = text.split_at(end);
        let metric = metric(name).with_context(|| format!("no metric is called {name}"))?;
        if let Some(selectors) = after.strip_prefix('{').and_then(|after| after.split('}').next()) {
            for selector in selectors.split("\",") {
                let (label, values) = selector.split_once('=').context("a selector without a value")?;
                let label = label.trim_end_matches('!');
                if ["instance", "job", "le"].contains(&label) {
                    continue;
                }
                let (known, all) = metric.label.with_context(|| format!("{name} has no label {label}"))?;
                ensure!(known == label, "{name} has no label {label}");
                for value in values.trim_start_matches('~').trim_matches('"').split('|') {
                    ensure!(all.contains(&value), "{name} has no {label} {value}");
                }
            }
        }
        rest = after;
    }
    Ok(())
}

#[test]
fn a_name_that_is_no_metric_is_found() {
    check("sum(rate(hermes_chunk_bytes_total{source=~\"peer|registry\",instance=\"a\"}[5m])) > 1")
        .expect("they are there");
    check("hermes_demand_wait_seconds_bucket").expect("a histogram's series");
    for wrong in [
        "hermes_demand_wait_seconds",
        "hermes_x",
        "hermes_chunk_bytes_total{source=\"mars\"}",
        "hermes_store_bytes{a=\"b\"}",
    ] {
        assert!(check(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn alerts_and_dashboard_name_what_there_is() -> Result<()> {
    let read = |path: &str| std::fs::read_to_string(root().join(path)).with_context(|| path.to_owned());
    let alerts = read("deploy/chart/monitoring/alerts.yaml")?;
    check(&alerts)?;
    let dashboard: Value = serde_json::from_str(&read("deploy/chart/monitoring/dashboard.json")?)?;
    let panels = dashboard["panels"].as_array().context("no panels")?;
    let ids: BTreeSet<_> = panels.iter().filter_map(|panel| panel["id"].as_u64()).collect();
    ensure!(ids.len() == panels.len(), "two panels have one id");
    let mut expressions = 0;
    for target in panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten() {
        let expression = target["expr"].as_str().context("a target without an expression")?;
        check(expression).with_context(|| expression.to_owned())?;
        expressions += 1;
    }
    ensure!(expressions > 30, "only {expressions} expressions");
    check(&dashboard["templating"].to_string().replace('\\', ""))?;
    let operations = read("docs/operations.md")?;
    let tests = read("deploy/chart/monitoring/alerts_test.yaml")?;
    for alert in alerts.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")) {
        ensure!(
            operations.contains(&format!("| `{alert}` |")),
            "docs/operations.md does not say what to do about {alert}"
        );
        ensure!(tests.contains(&format!("name: {alert}\n")), "no test has seen {alert} fire");
    }
    Ok(())
}

#[test]
fn promtool_takes_the_rules_and_sees_each_fire() -> Result<()> {
    let promtool = program("promtool")?;
    let folder = root().join("deploy/chart/monitoring");
    run(Command::new(&promtool).current_dir(&folder).args(["check", "rules", "alerts.yaml"]))?;
    run(Command::new(&promtool).current_dir(&folder).args(["test", "rules", "alerts_test.yaml"])).map(drop)
}
