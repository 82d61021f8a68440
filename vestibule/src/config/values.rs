//! Values as they are written in the configuration.

/// A number of bytes: digits with an optional unit `B`, `KiB`, `MiB`, `GiB` or `TiB`.
pub(crate) fn parse_bytes(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic()).trim_end();
    let unit = match text[digits.len()..].trim_start() {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::parse_bytes;

    #[test]
    fn sizes_have_binary_units() {
        let sizes = ["64KiB", "10 GiB", "7", "7B", "7KB", "KiB", "-1", "99999999999999TiB"];
        let parsed = sizes.map(parse_bytes);
        let expected = [Some(65_536), Some(10 << 30), Some(7), Some(7), None, None, None, None];
        assert_eq!(parsed, expected);
    }
}
