//! Simple mutations from a fixed seed, for the runs that no libFuzzer drives.

/// SplitMix64 (Steele, Lea, Flood 2014): small, seedable, and good enough to choose places with.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The sequence of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let value = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        value ^ (value >> 31)
    }

    /// A number below `limit`; 0 for a limit of 0.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.number() % (limit.max(1) as u64)) as usize
    }
}

/// Numbers at which lengths and offsets go wrong.
const ODD_NUMBERS: [u64; 14] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0x1ff,
    0x200,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    1 << 32,
    i64::MAX as u64,
    u64::MAX,
];

/// Changes `data` in one to four places, with material from `other`; never beyond `len_max_bytes`.
pub fn mutate(random: &mut Random, data: &mut Vec<u8>, other: &[u8], len_max_bytes: usize) {
    for _ in 0..=random.below(4) {
        once(random, data, other);
    }
    data.truncate(len_max_bytes);
}

fn once(random: &mut Random, data: &mut Vec<u8>, other: &[u8]) {
    let at = random.below(data.len());
    let len = 1 + random.below(64.min(data.len() - at.min(data.len())));
    let end = (at + len).min(data.len());
    match random.below(8) {
        0 if at < data.len() => data[at] ^= 1 << random.below(8),
        1 if at < data.len() => data[at] = random.number() as u8,
        2 => {
            let number = ODD_NUMBERS[random.below(ODD_NUMBERS.len())].to_le_bytes();
            let width = 1 << random.below(4);
            for (place, byte) in data.iter_mut().skip(at).zip(&number[..width]) {
                *place = *byte;
            }
        }
        3 if at < data.len() => {
            // A small step up or down, where a length or a number is off by little.
            data[at] = data[at].wrapping_add(random.below(9) as u8).wrapping_sub(4);
        }
        4 => drop(data.drain(at..end)),
        5 => {
            let copied = data[at..end].to_vec();
            let to = random.below(data.len() + 1);
            data.splice(to..to, copied);
        }
        6 => {
            let from = random.below(other.len());
            let len = random.below(other.len() - from.min(other.len())) + 1;
            let piece = other.get(from..(from + len).min(other.len())).unwrap_or_default();
            data.splice(at..end, piece.iter().copied());
        }
        _ if random.below(8) == 0 => data.truncate(at),
        _ => data.push(random.number() as u8),
    }
}
