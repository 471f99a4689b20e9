//! Numbers in tar headers and PAX records, as Go's `archive/tar` reads them.

use crate::tree::Timestamp;

/// A field up to its first NUL.
pub(super) fn c_string(field: &[u8]) -> &[u8] {
    &field[..field.iter().position(|byte| *byte == 0).unwrap_or(field.len())]
}

/// An octal field: NULs and spaces around the digits are allowed, and nothing at all is 0.
pub(super) fn octal(field: &[u8]) -> Option<i64> {
    let is_padding = |byte: &u8| *byte == b' ' || *byte == 0;
    let Some(start) = field.iter().position(|byte| !is_padding(byte)) else {
        return Some(0);
    };
    let end = field.iter().rposition(|byte| !is_padding(byte)).map_or(start, |last| last + 1);
    c_string(&field[start..end]).iter().try_fold(0_i64, |value, byte| match byte {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(byte - b'0')),
        _ => None,
    })
}

/// An octal or base-256 field. Base 256 (first bit set) is a big-endian two's complement number of all other bits.
pub(super) fn numeric(field: &[u8]) -> Option<i64> {
    let Some(first) = field.first().copied().filter(|first| first & 0x80 != 0) else {
        return octal(field);
    };
    let negative = first & 0x40 != 0;
    let mask = if negative { 0xff } else { 0 };
    let mut value = u64::from((first ^ mask) & 0x7f);
    for byte in &field[1..] {
        if value >> 56 != 0 {
            return None;
        }
        value = value << 8 | u64::from(byte ^ mask);
    }
    let value = i64::try_from(value).ok()?;
    Some(if negative { !value } else { value })
}

/// A decimal number as Go's `strconv.ParseInt` takes it: an optional sign, then digits only.
pub(super) fn decimal(text: &[u8]) -> Option<i64> {
    let (negative, digits) = match text {
        [b'-', digits @ ..] => (true, digits),
        [b'+', digits @ ..] => (false, digits),
        digits => (false, digits),
    };
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0_i64, |value, byte| {
        let digit = byte.is_ascii_digit().then(|| i64::from(byte - b'0'))?;
        let value = value.checked_mul(10)?;
        if negative { value.checked_sub(digit) } else { value.checked_add(digit) }
    })
}

/// A PAX time: decimal seconds, and any number of decimal places of which nine count.
pub(super) fn pax_time(text: &[u8]) -> Option<Timestamp> {
    let (whole, places) = match text.iter().position(|byte| *byte == b'.') {
        Some(dot) => (&text[..dot], &text[dot + 1..]),
        None => (text, &[][..]),
    };
    let seconds = decimal(whole)?;
    if !places.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let nanoseconds =
        (0..9).fold(0_u32, |value, place| value * 10 + places.get(place).map_or(0, |digit| u32::from(digit - b'0')));
    if nanoseconds == 0 || whole.first() != Some(&b'-') {
        return Some(Timestamp { seconds, nanoseconds });
    }
    Some(Timestamp { seconds: seconds.checked_sub(1)?, nanoseconds: 1_000_000_000 - nanoseconds })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octal_fields() {
        let cases: [(&[u8], Option<i64>); 9] = [
            (b"0000644\0", Some(0o644)),
            (b"   644 \0", Some(0o644)),
            (b"\0\0\0\0", Some(0)),
            (b"", Some(0)),
            (b"12\x0034\0", Some(0o12)),
            (b"77777777777\0", Some(0o77_777_777_777)),
            (b"8", None),
            (b"-1", None),
            (b"1 2", None),
        ];
        for (field, value) in cases {
            assert_eq!(octal(field), value, "{}", field.escape_ascii());
        }
    }

    #[test]
    fn base_256_fields() {
        let cases: [(&[u8], Option<i64>); 7] = [
            (b"\x80\0\0\0\0\0\0\x05", Some(5)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff", Some(-1)),
            (b"\xff\xff\xff\xff\xff\xff\xff\x00", Some(-256)),
            (b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", Some(i64::MAX)),
            (b"\x80\0\0\0\x80\0\0\0\0\0\0\0", None),
            (b"\x80\x01\0\0\0\0\0\0\0\0\0\0", None),
            (b"\xff\xff\xff\xff\x80\0\0\0\0\0\0\0", Some(i64::MIN)),
        ];
        for (field, value) in cases {
            assert_eq!(numeric(field), value, "{}", field.escape_ascii());
        }
    }

    #[test]
    fn decimals() {
        let cases: [(&[u8], Option<i64>); 9] = [
            (b"0", Some(0)),
            (b"+7", Some(7)),
            (b"-7", Some(-7)),
            (b"9223372036854775807", Some(i64::MAX)),
            (b"-9223372036854775808", Some(i64::MIN)),
            (b"9223372036854775808", None),
            (b"", None),
            (b"-", None),
            (b"1_0", None),
        ];
        for (text, value) in cases {
            assert_eq!(decimal(text), value, "{}", text.escape_ascii());
        }
    }

    #[test]
    fn pax_times() {
        let time = |seconds, nanoseconds| Some(Timestamp { seconds, nanoseconds });
        let cases: [(&[u8], Option<Timestamp>); 9] = [
            (b"1350244992.023960108", time(1_350_244_992, 23_960_108)),
            (b"1350244992.02396010899", time(1_350_244_992, 23_960_108)),
            (b"1350244992.3", time(1_350_244_992, 300_000_000)),
            (b"-1.5", time(-2, 500_000_000)),
            (b"-0.25", time(-1, 750_000_000)),
            (b"5.", time(5, 0)),
            (b".5", None),
            (b"5.x", None),
            (b"-9223372036854775808.5", None),
        ];
        for (text, value) in cases {
            assert_eq!(pax_time(text), value, "{}", text.escape_ascii());
        }
    }
}
