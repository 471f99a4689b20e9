//! Small numbers for manifests, so that what a cluster's nodes hold takes three bytes for each image of each node.

use std::collections::HashMap;

use hermes_image::ids::Digest;

/// Most images that are told apart: more than the largest cluster that is tested for has, and few enough for [`Slot`].
pub(super) const SLOTS_MAX: usize = 16_384;

/// The number of an image.
pub(super) type Slot = u16;

/// Which image has which number.
#[derive(Debug, Default)]
pub(super) struct Slots {
    numbers: HashMap<Digest, Slot>,
    free: Vec<Slot>,
    /// The lowest number that nobody ever had.
    next: usize,
}

impl Slots {
    /// The number of `manifest`, if it has one.
    pub(super) fn get(&self, manifest: &Digest) -> Option<Slot> {
        self.numbers.get(manifest).copied()
    }

    /// The number of `manifest`, from now on if it had none; `None` when there are too many.
    pub(super) fn give(&mut self, manifest: Digest) -> Option<Slot> {
        if let Some(known) = self.get(&manifest) {
            return Some(known);
        }
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None if self.next < SLOTS_MAX => {
                self.next += 1;
                Slot::try_from(self.next - 1).ok()?
            }
            None => return None,
        };
        self.numbers.insert(manifest, slot);
        Some(slot)
    }

    /// Whether no number is left.
    pub(super) fn is_full(&self) -> bool {
        self.free.is_empty() && self.next == SLOTS_MAX
    }

    /// Takes back the numbers of images that nobody needs.
    pub(super) fn keep(&mut self, is_needed: impl Fn(&Digest, Slot) -> bool) {
        let free = &mut self.free;
        self.numbers.retain(|manifest, slot| {
            let needed = is_needed(manifest, *slot);
            if !needed {
                free.push(*slot);
            }
            needed
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(number: usize) -> Digest {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        Digest(bytes)
    }

    #[test]
    fn numbers_are_few_and_used_again() {
        let mut slots = Slots::default();
        for number in 0..SLOTS_MAX {
            assert_eq!(slots.give(manifest(number)).map(usize::from), Some(number));
        }
        assert!(slots.is_full());
        assert_eq!(slots.give(manifest(SLOTS_MAX)), None);
        assert_eq!(slots.give(manifest(3)), Some(3), "who has one keeps it");
        slots.keep(|_, slot| slot != 7);
        assert_eq!((slots.get(&manifest(7)), slots.give(manifest(SLOTS_MAX))), (None, Some(7)));
    }
}
