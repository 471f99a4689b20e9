//! What to drop when the store has to make room.
//!
//! The unit is a group: about 1 MiB of neighbouring chunks of one layer, small enough that the cold half of a warm
//! layer can go, large enough that nothing is counted per chunk. Groups go in the order of their last use. What a
//! container has open and what somebody has pinned never goes; what may be the last copy in the swarm goes only when
//! everything else has gone, because the registry can still give it back.

/// How much a group deserves to stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Protection {
    /// Others have it, nobody here needs it now.
    #[default]
    None,
    /// It may be the last copy outside the registry: spared while anything else can go.
    LastCopy,
    /// Its layer is open: dropping it would stall a running container. Never goes.
    Open,
    /// Its layer is pinned. Never goes.
    Pinned,
}

impl Protection {
    /// Whether a group with this protection may be dropped at all.
    pub const fn evictable(self) -> bool {
        match self {
            Self::None | Self::LastCopy => true,
            Self::Open | Self::Pinned => false,
        }
    }
}

/// A group of chunks that holds bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Candidate {
    /// The layer, by the caller's numbering.
    pub layer: u32,
    /// The group within the layer.
    pub group: u32,
    /// Bytes that dropping it gives back.
    pub len_bytes: u64,
    /// When the group was last used, on any clock that does not run backwards (the store uses Unix seconds).
    pub last_use: u64,
    /// When anything of its layer was last used, on the same clock.
    pub layer_last_use: u64,
    /// What speaks for keeping it.
    pub protection: Protection,
}

/// What to drop, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Indices into the candidates that were given, in the order in which they should go.
    pub victims: Vec<usize>,
    /// Bytes that this gives back. Less than was wanted when there was nothing more to drop.
    pub len_bytes: u64,
}

/// Chooses which of `candidates` to drop so that at least `want_bytes` come back, or as many as can.
///
/// Least protected first, then longest unused, then by the age of the whole layer, so that of two groups of equal age
/// the one of the abandoned layer goes. The rest of the order (layer, group) only makes the answer the same on every
/// run. Costs one sort.
pub fn choose(candidates: &[Candidate], want_bytes: u64) -> Plan {
    let mut order: Vec<usize> = (0..candidates.len())
        .filter(|index| candidates[*index].protection.evictable() && candidates[*index].len_bytes > 0)
        .collect();
    order.sort_unstable_by_key(|index| {
        let candidate = &candidates[*index];
        (candidate.protection, candidate.last_use, candidate.layer_last_use, candidate.layer, candidate.group, *index)
    });
    let mut plan = Plan::default();
    for index in order {
        if plan.len_bytes >= want_bytes {
            break;
        }
        plan.len_bytes = plan.len_bytes.saturating_add(candidates[index].len_bytes);
        plan.victims.push(index);
    }
    plan
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn group(layer: u32, group: u32, last_use: u64, protection: Protection) -> Candidate {
        Candidate { layer, group, len_bytes: MIB, last_use, layer_last_use: last_use, protection }
    }

    #[test]
    fn the_longest_unused_goes_first_and_no_more_than_needed() {
        let candidates =
            [group(0, 0, 30, Protection::None), group(0, 1, 10, Protection::None), group(1, 0, 20, Protection::None)];
        assert_eq!(choose(&candidates, MIB), Plan { victims: vec![1], len_bytes: MIB });
        assert_eq!(choose(&candidates, MIB + 1), Plan { victims: vec![1, 2], len_bytes: 2 * MIB });
        assert_eq!(choose(&candidates, 0), Plan::default());
    }

    #[test]
    fn last_copies_go_last_and_open_or_pinned_groups_never() {
        let candidates = [
            group(0, 0, 1, Protection::LastCopy),
            group(1, 0, 0, Protection::Open),
            group(2, 0, 0, Protection::Pinned),
            group(3, 0, 9, Protection::None),
        ];
        assert_eq!(choose(&candidates, u64::MAX), Plan { victims: vec![3, 0], len_bytes: 2 * MIB });
    }

    #[test]
    fn of_equal_groups_the_one_of_the_older_layer_goes() {
        let mut warm = group(0, 0, 5, Protection::None);
        warm.layer_last_use = 100;
        let cold = group(1, 0, 5, Protection::None);
        assert_eq!(choose(&[warm, cold], MIB).victims, vec![1]);
    }

    fn protection() -> impl Strategy<Value = Protection> {
        prop_oneof![
            Just(Protection::None),
            Just(Protection::LastCopy),
            Just(Protection::Open),
            Just(Protection::Pinned)
        ]
    }

    fn candidate() -> impl Strategy<Value = Candidate> {
        (0_u32..4, 0_u32..8, 0_u64..100, 0_u64..5, 0_u64..5, protection()).prop_map(
            |(layer, group, len_bytes, last_use, layer_last_use, protection)| Candidate {
                layer,
                group,
                len_bytes,
                last_use,
                layer_last_use,
                protection,
            },
        )
    }

    proptest! {
        #[test]
        fn a_plan_is_enough_minimal_and_fair(candidates in proptest::collection::vec(candidate(), 0..40), want in 0_u64..2000) {
            let plan = choose(&candidates, want);
            let possible: u64 = candidates.iter().filter(|c| c.protection.evictable()).map(|c| c.len_bytes).sum();
            let freed: u64 = plan.victims.iter().map(|index| candidates[*index].len_bytes).sum();
            prop_assert_eq!(plan.len_bytes, freed);
            prop_assert!(freed >= want.min(possible));
            // Without its last victim it would not be enough.
            if let Some(last) = plan.victims.last() {
                prop_assert!(freed - candidates[*last].len_bytes < want);
            }
            for (index, kept) in candidates.iter().enumerate() {
                let victim = plan.victims.contains(&index);
                prop_assert!(!victim || kept.protection.evictable());
                if !victim && kept.protection.evictable() && kept.len_bytes > 0 {
                    for gone in &plan.victims {
                        let gone = &candidates[*gone];
                        prop_assert!((gone.protection, gone.last_use) <= (kept.protection, kept.last_use));
                    }
                }
            }
        }
    }
}
