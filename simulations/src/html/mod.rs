//! Reports as a page that people look at, and as CSV.
//!
//! One file without scripts, fonts or anything else from elsewhere: it can be mailed, printed, and opened years later. Every
//! chart has its numbers in a table below it, for those who cannot see it and those who want to copy them.

mod chart;

use std::fmt::Write as _;

use crate::queue::{Nanos, SECOND};
use crate::report::Report;
use crate::units::{show_bytes, show_nanos};

use chart::{Bar, Curve, bars, curves, escaped};

/// The page's style.
const STYLE: &str = include_str!("style.css");
/// Rows of a table over time: enough to see its shape, few enough to print.
const TIME_ROWS: usize = 20;

fn seconds(nanos: Nanos) -> f64 {
    nanos as f64 / SECOND as f64
}

fn show_seconds(value: f64) -> String {
    match value {
        0.0 => "0".to_owned(),
        _ if value > 7200.0 => format!("{:.1} h", value / 3600.0),
        _ if value >= 10.0 => format!("{value:.0} s"),
        _ if value >= 1.0 => format!("{value:.1} s"),
        _ => format!("{:.0} ms", value * 1000.0),
    }
}

fn show_amount(value: f64) -> String {
    let scale = [(1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")];
    match scale.into_iter().find(|(unit, _)| value >= *unit) {
        Some((unit, name)) if value / unit >= 100.0 => format!("{:.0} {name}", value / unit),
        Some((unit, name)) => format!("{:.1} {name}", value / unit),
        None => format!("{value:.0} B"),
    }
}

fn show_times(value: f64) -> String {
    if value >= 100.0 { format!("{value:.0} x") } else { format!("{value:.2} x") }
}

fn show_percent(value: f64) -> String {
    format!("{value:.0} %")
}

fn show_count(value: f64) -> String {
    format!("{value:.0}")
}

/// A table with a head; the first cell of a row names it.
fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let head: String = head.iter().map(|name| format!("<th scope=\"col\">{}</th>", escaped(name))).collect();
    let row = |cells: &Vec<String>| {
        let cell = |(place, cell): (usize, &String)| match place {
            0 => format!("<th scope=\"row\">{}</th>", escaped(cell)),
            _ => format!("<td>{}</td>", escaped(cell)),
        };
        format!("<tr>{}</tr>", cells.iter().enumerate().map(cell).collect::<String>())
    };
    let rows: String = rows.iter().map(row).collect();
    format!("<div class=\"scroll\"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>")
}

fn figure(title: &str, about: &str, chart: &str, numbers: &str) -> String {
    format!(
        "<figure><figcaption><h2>{}</h2><p>{}</p></figcaption>{chart}<details><summary>Numbers</summary>{numbers}</details></figure>\n",
        escaped(title),
        escaped(about)
    )
}

/// What is compared: a strategy's name, or the scenario's where there is one run only.
fn name(report: &Report) -> String {
    report.strategy.to_owned()
}

/// How often the registry sent what is needed once.
fn egress(report: &Report) -> f64 {
    report.registry_bytes as f64 / report.needed_bytes.max(1) as f64
}

/// The columns of a comparison, for people: the command prints the same.
pub const COLUMNS: [&str; 10] = [
    "strategy",
    "ready p50",
    "ready p99",
    "last ready",
    "registry",
    "of unique",
    "between zones",
    "max upload",
    "failed pods",
    "failed reads",
];

/// The row of a run under [`COLUMNS`].
pub fn row(report: &Report) -> Vec<String> {
    vec![
        name(report),
        show_nanos(report.ready_after.p50_ns),
        show_nanos(report.ready_after.p99_ns),
        show_nanos(report.finished_ns),
        show_bytes(report.registry_bytes),
        show_times(egress(report)),
        show_bytes(report.between_zones_bytes),
        show_bytes(report.upload_max_bytes),
        (report.starts - report.ready).to_string(),
        report.failed_reads.to_string(),
    ]
}

/// The page for one run or several of one scenario.
pub fn page(reports: &[Report]) -> String {
    let Some(first) = reports.first() else { return String::new() };
    let mut body = String::new();
    let about = match reports.len() {
        1 => format!("{}, {} nodes, seed {}", first.strategy, first.nodes, first.seed),
        count => format!("{count} strategies in the same world: {} nodes, seed {}", first.nodes, first.seed),
    };
    put(&mut body, format_args!("<h1>{}</h1><p class=\"about\">{}</p>", escaped(&first.scenario), escaped(&about)));
    for report in reports {
        if let Some(violation) = &report.violation {
            let (kind, what) = (violation.kind, escaped(&violation.what));
            put(&mut body, format_args!("<p class=\"failed\"><b>{}: {kind}.</b> {what}</p>", report.strategy));
        }
    }
    if reports.len() == 1 {
        body.push_str(&cards(first));
    } else {
        body.push_str(&table(&COLUMNS, &reports.iter().map(row).collect::<Vec<_>>()));
        body.push_str(&compared(reports));
    }
    for part in [ready, registry, sources, uploads] {
        body.push_str(&part(reports));
    }
    body.push_str(&reports.iter().take(if reports.len() == 1 { 1 } else { 0 }).map(timeline).collect::<String>());
    let traces: Vec<String> = reports.iter().map(|report| format!("{} {}", report.strategy, report.trace)).collect();
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>{}</title><style>\n{STYLE}</style></head><body><main>\n{body}</main><footer>Simulated by hermes {}. The model and what \
         it cannot say: docs/simulation.md. The same scenario and seed give the same run: {}</footer></body></html>\n",
        escaped(&first.scenario),
        env!("CARGO_PKG_VERSION"),
        traces.join(", ")
    )
}

fn cards(report: &Report) -> String {
    let bound = match report.bound_ns {
        0 => "no bound".to_owned(),
        bound => format!("{:.2} x the bound of {}", report.finished_ns as f64 / bound as f64, show_nanos(bound)),
    };
    let cards = [
        (format!("{} of {}", report.ready, report.starts), "starts are ready".to_owned()),
        (show_nanos(report.finished_ns), format!("until the last one was: {bound}")),
        (
            show_bytes(report.registry_bytes),
            format!("left the registry: {} what is needed once", show_times(egress(report))),
        ),
        (show_nanos(report.waits.p99_ns), "99 % of the reads that waited took less".to_owned()),
    ];
    let card = |(value, what): &(String, String)| {
        format!("<div class=\"card\"><b>{}</b><span>{}</span></div>", escaped(value), escaped(what))
    };
    format!("<div class=\"cards\">{}</div>", cards.iter().map(card).collect::<String>())
}

fn compared(reports: &[Report]) -> String {
    let parts = ["half are ready".to_owned(), "99 % are".to_owned(), "the last is".to_owned()];
    let times =
        |report: &Report| [report.ready_after.p50_ns, report.ready_after.p99_ns, report.finished_ns].map(seconds);
    let rows: Vec<Bar> =
        reports.iter().map(|report| Bar { name: name(report), parts: times(report).to_vec() }).collect();
    let numbers: Vec<Vec<String>> = reports
        .iter()
        .map(|report| std::iter::once(name(report)).chain(times(report).map(show_seconds)).collect())
        .collect();
    let title = "Time until pods are ready";
    let first = figure(
        title,
        "From a pod's landing on its node; the last from the first pod on.",
        &bars(title, show_seconds, &parts, &rows, false),
        &table(&["strategy", "half", "99 %", "last"], &numbers),
    );
    let rows: Vec<Bar> = reports.iter().map(|report| Bar { name: name(report), parts: vec![egress(report)] }).collect();
    let numbers: Vec<Vec<String>> = reports
        .iter()
        .map(|report| {
            vec![
                name(report),
                show_bytes(report.registry_bytes),
                show_bytes(report.needed_bytes),
                show_times(egress(report)),
            ]
        })
        .collect();
    let title = "What the registry sends";
    first
        + &figure(
            title,
            "As a multiple of the compressed bytes that starts read and no node had at first.",
            &bars(title, show_times, &["registry".to_owned()], &rows, false),
            &table(&["strategy", "sent", "needed once", "multiple"], &numbers),
        )
}

fn ready(reports: &[Report]) -> String {
    let curve = |report: &Report| Curve {
        name: name(report),
        points: report
            .ready_quantiles_ns
            .iter()
            .enumerate()
            .map(|(part, time)| (seconds(*time), part as f64))
            .collect(),
    };
    let lines: Vec<Curve> = reports.iter().map(curve).collect();
    let parts = [0, 10, 25, 50, 75, 90, 99, 100];
    let numbers: Vec<Vec<String>> = reports
        .iter()
        .map(|report| {
            let at =
                |part: &usize| report.ready_quantiles_ns.get(*part).map_or_else(String::new, |time| show_nanos(*time));
            std::iter::once(name(report)).chain(parts.iter().map(at)).collect()
        })
        .collect();
    let title = "Time to ready";
    let chart =
        curves(title, ("time after the pod landed", show_seconds), show_percent, &lines, &[], reports.len() > 1);
    figure(
        title,
        "The share of starts that took no longer.",
        &chart,
        &table(&["strategy", "first", "10 %", "25 %", "50 %", "75 %", "90 %", "99 %", "last"], &numbers),
    )
}

/// Samples of a run since its first start, in seconds.
fn over_time<'a>(report: &'a Report, values: &'a [u64]) -> impl Iterator<Item = (f64, f64)> + 'a {
    let since = |at: &Nanos| seconds(at.saturating_sub(report.first_start_ns));
    report.series.at_ns.iter().zip(values).map(move |(at, value)| (since(at), *value as f64))
}

fn registry(reports: &[Report]) -> String {
    let curve = |report: &Report| Curve {
        name: name(report),
        points: over_time(report, &report.series.registry_bytes).collect(),
    };
    let lines: Vec<Curve> = reports.iter().map(curve).collect();
    let longest = lines.iter().flat_map(|line| &line.points).map(|point| point.0).fold(0.0, f64::max);
    let times: Vec<f64> = (0..=8).map(|step| longest * f64::from(step) / 8.0).collect();
    let at = |line: &Curve, time: f64| {
        line.points.iter().take_while(|point| point.0 <= time).last().map_or(0.0, |point| point.1)
    };
    let numbers: Vec<Vec<String>> = lines
        .iter()
        .map(|line| {
            std::iter::once(line.name.clone()).chain(times.iter().map(|time| show_amount(at(line, *time)))).collect()
        })
        .collect();
    let head: Vec<String> =
        std::iter::once("strategy".to_owned()).chain(times.iter().map(|time| show_seconds(*time))).collect();
    let title = "Bytes that left the registry";
    let chart = curves(title, ("time since the first pod", show_seconds), show_amount, &lines, &[], reports.len() > 1);
    figure(
        title,
        "All together, until then. Preloading sends its bytes before the first pod.",
        &chart,
        &table(&head.iter().map(String::as_str).collect::<Vec<_>>(), &numbers),
    )
}

fn sources(reports: &[Report]) -> String {
    let parts = ["registry", "other nodes", "own layers"].map(str::to_owned);
    let of = |report: &Report| [report.from_registry_bytes, report.from_peers_bytes, report.from_local_bytes];
    let rows: Vec<Bar> = reports
        .iter()
        .map(|report| Bar { name: name(report), parts: of(report).map(|bytes| bytes as f64).to_vec() })
        .collect();
    let numbers: Vec<Vec<String>> = reports
        .iter()
        .map(|report| std::iter::once(name(report)).chain(of(report).map(show_bytes)).collect())
        .collect();
    let title = "Where bytes came from";
    let about = "What all nodes got: uncompressed bytes of chunks under Hermes, compressed ones under the models";
    figure(
        title,
        about,
        &bars(title, show_amount, &parts, &rows, true),
        &table(&["strategy", "registry", "other nodes", "own layers"], &numbers),
    )
}

fn uploads(reports: &[Report]) -> String {
    let curve = |report: &Report| Curve {
        name: name(report),
        points: report.upload_quantiles.iter().enumerate().map(|(part, bytes)| (part as f64, *bytes as f64)).collect(),
    };
    let lines: Vec<Curve> = reports.iter().map(curve).collect();
    let parts = [0, 25, 50, 75, 90, 99, 100];
    let numbers: Vec<Vec<String>> = reports
        .iter()
        .map(|report| {
            let at =
                |part: &usize| report.upload_quantiles.get(*part).map_or_else(String::new, |bytes| show_bytes(*bytes));
            std::iter::once(name(report)).chain(parts.iter().map(at)).collect()
        })
        .collect();
    let title = "Who gives how much";
    let chart = curves(title, ("share of nodes that gave no more", show_percent), show_amount, &lines, &[], false);
    figure(
        title,
        "Bytes that a node gave to others: a flat line is an even load, a hook at its end a few that carry all.",
        &chart,
        &table(&["strategy", "least", "25 %", "50 %", "75 %", "90 %", "99 %", "most"], &numbers),
    )
}

fn timeline(report: &Report) -> String {
    let begun: Vec<u64> = report.series.begun.iter().map(|count| u64::from(*count)).collect();
    let ready: Vec<u64> = report.series.ready.iter().map(|count| u64::from(*count)).collect();
    let lines = [
        Curve { name: "landed".to_owned(), points: over_time(report, &begun).collect() },
        Curve { name: "ready".to_owned(), points: over_time(report, &ready).collect() },
    ];
    let marks: Vec<(f64, String)> = report
        .marks
        .iter()
        .map(|mark| (seconds(mark.at_ns.saturating_sub(report.first_start_ns)), mark.what.clone()))
        .collect();
    let step = report.series.at_ns.len().div_ceil(TIME_ROWS).max(1);
    let mut numbers: Vec<Vec<String>> = (0..report.series.at_ns.len())
        .step_by(step)
        .map(|no| {
            let time = seconds(report.series.at_ns[no].saturating_sub(report.first_start_ns));
            let bytes = [report.series.registry_bytes[no], report.series.peer_bytes[no]].map(show_bytes);
            let [registry, peers] = bytes;
            vec![show_seconds(time), begun[no].to_string(), ready[no].to_string(), registry, peers]
        })
        .collect();
    numbers.extend(marks.iter().map(|(at, what)| vec![format!("{}: {what}", show_seconds(*at))]));
    let title = "The run";
    let chart = curves(title, ("time since the first pod", show_seconds), show_count, &lines, &marks, false);
    figure(
        title,
        "Pods that have landed and that are ready, and what went wrong meanwhile.",
        &chart,
        &table(&["time", "landed", "ready", "registry sent", "nodes gave"], &numbers),
    )
}

fn put(text: &mut String, more: std::fmt::Arguments<'_>) {
    text.write_fmt(more).expect("a string takes all that is written");
}

/// The samples of all runs as CSV: one row for each strategy and moment.
pub fn csv(reports: &[Report]) -> String {
    let mut text = String::from("strategy,seconds,registry_bytes,peer_bytes,landed,ready\n");
    for report in reports {
        let series = &report.series;
        for (no, at) in series.at_ns.iter().enumerate() {
            let (registry, peers) = (series.registry_bytes[no], series.peer_bytes[no]);
            let (landed, ready) = (series.begun[no], series.ready[no]);
            let millis = at / 1_000_000;
            put(
                &mut text,
                format_args!(
                    "{},{}.{:03},{registry},{peers},{landed},{ready}\n",
                    report.strategy,
                    millis / 1000,
                    millis % 1000
                ),
            );
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::scenario::Scenario;
    use crate::strategy::Strategy;

    fn reports(strategies: &[Strategy]) -> Vec<Report> {
        let text = "name = \"a <small> world\"\n[cluster]\nnodes = 3\n[image]\nsize = \"20 MB\"\nlayers = 1\nstart_chunks = 40\n\
                    [[fault]]\nat = \"10 ms\"\nkind = \"registry-down\"\nfor = \"200 ms\"";
        let scenario = Scenario::parse(text, &[]).expect("it is one");
        let shape = crate::synthetic_shape(&scenario, 1).expect("an image");
        crate::compare::compare(&scenario, &Arc::clone(&shape), 1, strategies, |_, _| {})
    }

    #[test]
    fn a_page_stands_alone_and_every_chart_has_its_numbers() {
        for strategies in [&[Strategy::Hermes][..], &Strategy::SYSTEMS] {
            let page = page(&reports(strategies));
            assert!(page.starts_with("<!doctype html>") && page.contains("a &lt;small&gt; world"));
            assert!(
                !page.contains("<script") && !page.contains("http") && !page.contains("NaN") && !page.contains("inf")
            );
            let count = |what: &str| page.matches(what).count();
            assert_eq!(count("<figure>"), count("<details>"));
            assert_eq!(count("<figure>"), count("role=\"img\""));
            assert!(count("<figure>") >= 5);
            for tag in ["figure", "table", "svg", "tr", "ul", "div", "details"] {
                assert_eq!(
                    count(&format!("<{tag}>")) + count(&format!("<{tag} ")),
                    count(&format!("</{tag}>")),
                    "{tag}"
                );
            }
        }
        assert_eq!(super::page(&[]), "");
    }

    #[test]
    fn csv_has_a_row_for_each_moment() {
        let reports = reports(&[Strategy::Hermes, Strategy::Containerd]);
        let text = csv(&reports);
        let samples: usize = reports.iter().map(|report| report.series.at_ns.len()).sum();
        assert_eq!(text.lines().count(), samples + 1);
        assert!(text.lines().all(|line| line.split(',').count() == 6));
    }
}
