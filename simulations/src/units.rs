//! Quantities with units, as people write them in a scenario: `"20 ms"`, `"2 Gbit/s"`, `"12 GB"`, `"10 %"`.
//!
//! Integers inside, so that a run is the same on every machine: nanoseconds, bytes, bytes a second, parts in ten thousand.
//! Decimal prefixes are powers of 1,000 (SI), binary ones (`KiB`) powers of 1,024 (IEC 80000-13).

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;
use thiserror::Error;

use crate::queue::Nanos;

/// Text that is no quantity.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{text:?} is no {wanted}; write for example {example:?}")]
pub struct UnitError {
    text: String,
    wanted: &'static str,
    example: &'static str,
}

/// A number with up to three decimals and what follows it, the number in thousandths.
fn split(text: &str) -> Option<(u128, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.' && c != '_').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let number = number.replace('_', "");
    let (whole, fraction) = number.split_once('.').unwrap_or((&number, ""));
    if whole.is_empty() || whole.len() > 18 || fraction.len() > 3 {
        return None;
    }
    let thousandths: u128 = format!("{fraction:0<3}").parse().ok()?;
    Some((whole.parse::<u128>().ok()? * 1000 + thousandths, unit.trim()))
}

fn scaled(text: &str, factor: impl Fn(&str) -> Option<u128>) -> Option<u64> {
    let (thousandths, unit) = split(text)?;
    u64::try_from(thousandths.checked_mul(factor(unit)?)? / 1000).ok()
}

/// Bytes of a unit.
fn byte_factor(unit: &str) -> Option<u128> {
    Some(match unit {
        "B" => 1,
        "kB" | "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        _ => return None,
    })
}

macro_rules! quantity {
    ($(#[$doc:meta])* $name:ident, $inner:ty, $wanted:literal, $example:literal, $parse:expr, $show:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Deserialize)]
        #[serde(try_from = "String")]
        pub struct $name(pub $inner);

        impl FromStr for $name {
            type Err = UnitError;

            fn from_str(text: &str) -> Result<Self, UnitError> {
                let parse: fn(&str) -> Option<$inner> = $parse;
                let error = || UnitError { text: text.to_owned(), wanted: $wanted, example: $example };
                parse(text).map(Self).ok_or_else(error)
            }
        }

        impl TryFrom<String> for $name {
            type Error = UnitError;

            fn try_from(text: String) -> Result<Self, UnitError> {
                text.parse()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let show: fn($inner) -> String = $show;
                f.write_str(&show(self.0))
            }
        }
    };
}

quantity!(
    /// A duration in nanoseconds.
    Time, Nanos, "duration", "20 ms",
    |text| scaled(text, |unit| Some(match unit {
        "ns" => 1,
        "us" | "µs" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        "min" => 60_000_000_000,
        "h" => 3_600_000_000_000,
        _ => return None,
    })),
    show_nanos
);

quantity!(
    /// A number of bytes.
    Bytes, u64, "number of bytes", "300 MB",
    |text| scaled(text, byte_factor),
    show_bytes
);

quantity!(
    /// A speed in bytes a second; never zero.
    Rate, u64, "speed", "2 Gbit/s",
    |text| scaled(text, |unit| {
        let bits = |unit: &str| Some(match unit {
            "bit" => 1_u128,
            "kbit" => 1_000,
            "Mbit" => 1_000_000,
            "Gbit" => 1_000_000_000,
            "Tbit" => 1_000_000_000_000,
            _ => return None,
        });
        let amount = unit.strip_suffix("/s")?;
        // In bits, so that a part of a byte is lost once only, below.
        bits(amount).or_else(|| Some(byte_factor(amount)? * 8))
    }).map(|bits| bits / 8).filter(|bytes| *bytes > 0),
    |bytes| format!("{}.{:03} Gbit/s", bytes * 8 / 1_000_000_000, bytes * 8 / 1_000_000 % 1000)
);

quantity!(
    /// A share in hundredths of a percent; may be above one.
    Share, u64, "share", "10 %",
    |text| scaled(text, |unit| (unit == "%").then_some(100)),
    |parts| format!("{}.{:02} %", parts / 100, parts % 100)
);

impl Share {
    /// This share of `whole`, rounded down.
    pub fn of(self, whole: u64) -> u64 {
        u64::try_from(u128::from(whole) * u128::from(self.0) / 10_000).unwrap_or(u64::MAX)
    }
}

impl Rate {
    /// How long `len_bytes` take, rounded up to a nanosecond.
    pub fn time(self, len_bytes: u64) -> Nanos {
        let nanos = (u128::from(len_bytes) * 1_000_000_000).div_ceil(u128::from(self.0.max(1)));
        u64::try_from(nanos).unwrap_or(u64::MAX)
    }
}

/// A time for people.
pub fn show_nanos(nanos: Nanos) -> String {
    let (unit, name) = match nanos {
        0..1_000_000 => (1_000, "us"),
        1_000_000..1_000_000_000 => (1_000_000, "ms"),
        _ => (1_000_000_000, "s"),
    };
    format!("{}.{:03} {name}", nanos / unit, nanos % unit * 1000 / unit)
}

/// Bytes for people, in powers of 1,000.
pub fn show_bytes(bytes: u64) -> String {
    let (unit, name) = match bytes {
        0..1_000_000 => (1_000, "kB"),
        1_000_000..1_000_000_000 => (1_000_000, "MB"),
        1_000_000_000..1_000_000_000_000 => (1_000_000_000, "GB"),
        _ => (1_000_000_000_000, "TB"),
    };
    format!("{}.{:03} {name}", bytes / unit, bytes % unit * 1000 / unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read() {
        assert_eq!("20 ms".parse(), Ok(Time(20_000_000)));
        assert_eq!("1.5s".parse(), Ok(Time(1_500_000_000)));
        assert_eq!("2 Gbit/s".parse(), Ok(Rate(250_000_000)));
        assert_eq!("300 MB/s".parse(), Ok(Rate(300_000_000)));
        assert_eq!("64 KiB".parse(), Ok(Bytes(65_536)));
        assert_eq!("10_000 B".parse(), Ok(Bytes(10_000)));
        assert_eq!("12.5 %".parse(), Ok(Share(1250)));
        assert_eq!(Share(1250).of(80), 10);
        assert_eq!(Rate(3).time(1), 333_333_334);
    }

    #[test]
    fn what_is_none_is_refused_with_an_example() {
        for text in ["", "ms", "20", "-1 ms", "1.2345 s", "20 MB", "9999999999999999999 s"] {
            assert!(text.parse::<Time>().is_err(), "{text}");
        }
        assert!("0 bit/s".parse::<Rate>().is_err());
        let error = "fast".parse::<Rate>().expect_err("no speed").to_string();
        assert_eq!(error, "\"fast\" is no speed; write for example \"2 Gbit/s\"");
    }

    #[test]
    fn quantities_are_shown() {
        assert_eq!((show_nanos(1_500), show_nanos(2_030_000_000)), ("1.500 us".into(), "2.030 s".into()));
        assert_eq!(
            (show_bytes(12_000_000_000), Rate(250_000_000).to_string()),
            ("12.000 GB".into(), "2.000 Gbit/s".into())
        );
    }
}
