//! Sizes as people write them in a spec: a whole number and `Mi`, `Gi` or `Ti`.

use std::ops::RangeInclusive;

/// Pattern of a size, the same for the API server (CEL) and here.
pub const PATTERN: &str = "^[1-9][0-9]{0,6}(Mi|Gi|Ti)$";

/// Least and most memory of a guest in MiB, the same for the API server (CEL) and the node-daemon.
pub const MEMORY_MIB: RangeInclusive<u64> = 16..=1 << 20;

/// Largest whole number that all programs that read JSON agree on.
pub const WHOLE_MAX: u64 = (1 << 53) - 1;

/// A text that is no size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a size: write a whole number with Mi, Gi or Ti, such as 512Mi or 4Gi")]
pub struct QuantityError {
    /// The text, at most 32 characters of it.
    pub text: String,
}

/// Bytes of a size.
///
/// # Errors
/// [`QuantityError`] if it does not have this form.
pub fn bytes(text: &str) -> Result<u64, QuantityError> {
    let bad = || QuantityError {
        text: text.chars().take(32).collect(),
    };
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    if !(1..=7).contains(&digits) || number.starts_with('0') {
        return Err(bad());
    }
    let shift = match unit {
        "Mi" => 20,
        "Gi" => 30,
        "Ti" => 40,
        _ => return Err(bad()),
    };
    let number: u64 = number.parse().map_err(|_| bad())?;
    // Seven digits and 40 bits are fewer than 64 bits.
    Ok(number << shift)
}

/// The shortest text for this many bytes, rounded up to whole MiB.
pub fn text(bytes: u64) -> String {
    let mib = bytes.div_ceil(1 << 20);
    if mib > 0 && mib.is_multiple_of(1 << 10) {
        format!("{}Gi", mib >> 10)
    } else {
        format!("{mib}Mi")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_exactly() {
        for (text, expected) in [
            ("1Mi", 1 << 20),
            ("512Mi", 512 << 20),
            ("4Gi", 4 << 30),
            ("9999999Ti", 9_999_999u64 << 40),
        ] {
            assert_eq!(bytes(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn everything_else_is_refused() {
        for bad in [
            "",
            "Mi",
            "0Mi",
            "01Mi",
            "-1Mi",
            "1.5Gi",
            "1",
            "1G",
            "1Ki",
            "1 Gi",
            "1gi",
            "10000000Ti",
            "é",
            "1Gi ",
        ] {
            let error = bytes(bad).unwrap_err();
            assert!(error.to_string().contains("such as 512Mi"), "{bad}");
        }
    }

    #[test]
    fn texts_round_trip() {
        for size in ["1Mi", "1023Mi", "1Gi", "1025Mi"] {
            assert_eq!(text(bytes(size).unwrap()), size);
        }
        assert_eq!(text((1 << 20) + 1), "2Mi");
    }
}
