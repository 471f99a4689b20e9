//! HTTP by hand, and what a daemon serves for monitoring by it.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use anyhow::Result;

use crate::daemon::HANG;

/// Where a daemon with this log says it serves metrics; the last one, where several have the log.
pub fn metrics_address(log: &str) -> Option<String> {
    let line = log.lines().rev().find(|line| line.contains("serving metrics"))?;
    let at = line.find("127.0.0.1:")?;
    Some(line[at..].chars().take_while(|c| c.is_ascii_digit() || matches!(c, '.' | ':')).collect())
}

/// The answer for `path`, with its head.
///
/// # Errors
/// When nobody answers.
pub fn get(address: &str, path: &str) -> Result<String> {
    get_with(address, path, "accept: */*")
}

/// The same for a request with one more line in its head.
///
/// # Errors
/// When nobody answers.
pub fn get_with(address: &str, path: &str, header: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(HANG))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: node\r\nconnection: close\r\n{header}\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// The value of one series.
pub fn metric(metrics: &str, series: &str) -> Option<f64> {
    metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
}
