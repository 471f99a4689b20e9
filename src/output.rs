//! What a person or a machine sees: logs, errors, tables, progress bars, units.

use std::io::IsTerminal as _;
use std::process::ExitCode;

use hermes_snapshotter::control::{Answer, Failure, FailureClass};
use indicatif::{ProgressBar, ProgressStyle};
use tracing_subscriber::EnvFilter;

/// Exit code of an error that has no class: nobody foresaw it.
const EXIT_UNFORESEEN: u8 = 1;

/// An error of a known class, as the outermost thing that is said.
#[derive(Debug)]
pub(crate) struct Classed(pub(crate) Failure);

impl std::fmt::Display for Classed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl std::error::Error for Classed {}

/// An error with `class`, in one line.
pub(crate) fn failure(class: FailureClass, message: impl Into<String>) -> anyhow::Error {
    Classed(Failure { message: message.into(), class }).into()
}

/// Logs go to standard error, so that standard output is the answer alone. `HERMES_LOG` has tracing's filter syntax.
pub(crate) fn start_logging(verbosity: u8) {
    let default = match verbosity {
        0 => "warn",
        1 => "hermes=info,warn",
        2 => "hermes=debug,info",
        _ => "hermes=trace,debug",
    };
    let filter = EnvFilter::try_from_env("HERMES_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    // The reloading filter knows the type of what it filters, so it comes last.
    let log = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(filter)
        .with_filter_reloading();
    let handle = log.reload_handle();
    log.init();
    hermes_snapshotter::telemetry::set_reload(move |text| {
        let filter = EnvFilter::try_new(text);
        let filter = filter.map_err(|error| format!("'{text}' is no level and no filter of logs: {error}"))?;
        handle.reload(filter).map_err(|error| error.to_string())
    });
}

/// Prints one clear line and chooses the exit code.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    let class = error.chain().find_map(|cause| cause.downcast_ref::<Classed>()).map(|classed| classed.0.class);
    eprintln!("hermes: {error:#}");
    ExitCode::from(class.map_or(EXIT_UNFORESEEN, FailureClass::exit_code))
}

/// Bytes for people: decimal units, as links and registries count.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit < UNITS.len() - 1 {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// How many percent `part` is of `whole`.
pub(crate) fn percent(part: u64, whole: u64) -> String {
    format!("{:.1} %", if whole == 0 { 0.0 } else { part as f64 * 100.0 / whole as f64 })
}

/// A bar of bytes that shows itself on a terminal only.
pub(crate) fn byte_bar(total_bytes: u64, message: &str) -> ProgressBar {
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new(total_bytes) } else { ProgressBar::hidden() };
    let style = ProgressStyle::with_template(
        "{msg:28!} {bar:30} {decimal_bytes:>9}/{decimal_total_bytes:9} {decimal_bytes_per_sec}",
    )
    .unwrap_or_else(|_| ProgressStyle::default_bar());
    bar.set_style(style);
    bar.set_message(message.to_owned());
    bar
}

/// Shows the daemon's progress as a bar.
pub(crate) fn show_progress(bar: &ProgressBar, answer: &Answer) {
    if let Answer::Progress { step, done_bytes, total_bytes } = answer {
        bar.set_message(step.clone());
        bar.set_length(*total_bytes);
        bar.set_position(*done_bytes);
    }
}

/// A table without frames: columns are as wide as they need to be.
pub(crate) fn table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(header.iter().map(|name| name.to_uppercase()));
    table.add_rows(rows);
    table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_decimal_units() {
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1_000), "1.0 kB");
        assert_eq!(bytes(589_800_000), "589.8 MB");
    }
}
