//! HTTP by hand, and what a daemon serves for monitoring by it.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use anyhow::{Context as _, Result, ensure};

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
    Ok(String::from_utf8(exchange(address, path, header)?)?)
}

/// The body of the answer for `path`, which must be a good one.
///
/// # Errors
/// When nobody answers, or the answer has another status than 200.
pub fn body(address: &str, path: &str) -> Result<Vec<u8>> {
    let mut answer = exchange(address, path, "accept: */*")?;
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").context("an answer without an end of its head")?;
    let body = answer.split_off(end + 4);
    let head = String::from_utf8_lossy(&answer);
    ensure!(head.split_whitespace().nth(1) == Some("200"), "{path}: {}", head.lines().next().unwrap_or_default());
    Ok(body)
}

fn exchange(address: &str, path: &str, header: &str) -> Result<Vec<u8>> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(HANG))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: node\r\nconnection: close\r\n{header}\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

/// The value of one series.
pub fn metric(metrics: &str, series: &str) -> Option<f64> {
    metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
}
