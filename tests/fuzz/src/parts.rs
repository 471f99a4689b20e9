//! Inputs of several parts: 16-bit lengths, little endian, of all parts but the last, then the parts.

/// Joins parts; [`split`] takes them apart. Parts but the last are cut at 65,535 bytes.
pub fn join(parts: &[&[u8]]) -> Vec<u8> {
    let Some((last, first)) = parts.split_last() else { return Vec::new() };
    let mut joined = Vec::new();
    for part in first {
        joined.extend_from_slice(&(part.len().min(0xffff) as u16).to_le_bytes());
    }
    for part in first {
        joined.extend_from_slice(&part[..part.len().min(0xffff)]);
    }
    joined.extend_from_slice(last);
    joined
}

/// The `N` parts of an input, whatever its lengths say: a part ends where the input does.
pub fn split<const N: usize>(data: &[u8]) -> [&[u8]; N] {
    let lens_len = 2 * N.saturating_sub(1);
    let (lens, mut rest) = data.split_at(lens_len.min(data.len()));
    let mut parts = [&data[..0]; N];
    for (no, part) in parts.iter_mut().enumerate() {
        let len =
            lens.get(2 * no..2 * no + 2).map_or(usize::MAX, |len| usize::from(u16::from_le_bytes([len[0], len[1]])));
        let len = if no + 1 == N { rest.len() } else { len.min(rest.len()) };
        (*part, rest) = rest.split_at(len);
    }
    parts
}

/// The first `N` bytes as small numbers, zero where there are none, and what follows them.
pub fn numbers<const N: usize>(data: &[u8]) -> ([u8; N], &[u8]) {
    let (head, rest) = data.split_at(N.min(data.len()));
    let mut numbers = [0; N];
    numbers[..head.len()].copy_from_slice(head);
    (numbers, rest)
}
