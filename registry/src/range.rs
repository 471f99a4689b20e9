//! The `Range` header (RFC 9110, section 14), as far as a registry needs it: one range of bytes.

use std::ops::Range;

/// What part of a body a request asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// All of it: no range, or one that a server may ignore (several ranges, another unit, a malformed text).
    Everything,
    /// These bytes; never empty, and within the body.
    Part(Range<u64>),
    /// A range that lies outside the body.
    Unsatisfiable,
}

/// Reads the header `value` for a body of `len_bytes`.
pub(crate) fn wanted(value: &str, len_bytes: u64) -> Wanted {
    let Some(spec) = value.trim().strip_prefix("bytes=") else { return Wanted::Everything };
    let Some((first, last)) = spec.trim().split_once('-') else { return Wanted::Everything };
    match (number(first), number(last)) {
        // The last `count` bytes.
        (None, Some(count)) if first.is_empty() => match count.min(len_bytes) {
            0 => Wanted::Unsatisfiable,
            count => Wanted::Part(len_bytes - count..len_bytes),
        },
        (Some(start), None) if last.is_empty() => part(start, len_bytes, len_bytes),
        (Some(start), Some(end)) if start <= end => part(start, end.saturating_add(1).min(len_bytes), len_bytes),
        _ => Wanted::Everything,
    }
}

fn part(start: u64, end: u64, len_bytes: u64) -> Wanted {
    if start < len_bytes { Wanted::Part(start..end) } else { Wanted::Unsatisfiable }
}

/// Digits only; a number too large for 64 bits lies behind any body and counts as the largest.
fn number(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    digits.then(|| text.parse().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_the_rfc_says() {
        let cases = [
            ("bytes=0-0", 10, Wanted::Part(0..1)),
            ("bytes=0-9", 10, Wanted::Part(0..10)),
            ("bytes=0-10", 10, Wanted::Part(0..10)),
            ("bytes=3-", 10, Wanted::Part(3..10)),
            ("bytes=9-", 10, Wanted::Part(9..10)),
            ("bytes=-1", 10, Wanted::Part(9..10)),
            ("bytes=-10", 10, Wanted::Part(0..10)),
            ("bytes=-99", 10, Wanted::Part(0..10)),
            ("bytes=5-99999999999999999999999999", 10, Wanted::Part(5..10)),
            (" bytes=1-2 ", 10, Wanted::Part(1..3)),
            ("bytes=10-", 10, Wanted::Unsatisfiable),
            ("bytes=10-12", 10, Wanted::Unsatisfiable),
            ("bytes=99999999999999999999999999-", 10, Wanted::Unsatisfiable),
            ("bytes=-0", 10, Wanted::Unsatisfiable),
            ("bytes=0-0", 0, Wanted::Unsatisfiable),
            ("bytes=-5", 0, Wanted::Unsatisfiable),
            ("bytes=2-1", 10, Wanted::Everything),
            ("bytes=0-1,3-4", 10, Wanted::Everything),
            ("bytes=", 10, Wanted::Everything),
            ("bytes=-", 10, Wanted::Everything),
            ("bytes=a-b", 10, Wanted::Everything),
            ("bytes=+1-2", 10, Wanted::Everything),
            ("items=0-1", 10, Wanted::Everything),
            ("", 10, Wanted::Everything),
        ];
        for (value, len_bytes, expected) in cases {
            assert_eq!(wanted(value, len_bytes), expected, "'{value}' of {len_bytes}");
        }
    }
}
