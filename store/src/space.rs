//! Room: how many bytes are used, and which go when there are too many.
//!
//! A put takes its room before it writes, so that many at once cannot overrun the budget together. What layers really
//! have allocated is read from their files after each sync and each eviction; in between, the length of what was
//! written counts, which is less by at most a block (4 KiB) for each end of a run. So the budget is kept to within the
//! rounding of one sync interval.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};

use hermes_image::ids::DiffId;
use hermes_policy::evict::{Candidate, Protection, choose};
use parking_lot::Mutex;

use crate::error::{FullCause, StoreError};
use crate::images::ImageRecord;
use crate::shared::Shared;

/// Whether this node may hold the last copy of a layer outside the registry.
pub(crate) type LastCopy = dyn Fn(DiffId) -> bool + Send + Sync;

/// Evicted beyond what is asked for, so that not every put evicts: a 32nd of the budget within these bounds, in bytes.
const SLACK_MIN_BYTES: u64 = 1 << 20;
const SLACK_MAX_BYTES: u64 = 64 << 20;
/// Groups evicted under one synced write of the catalogue.
const EVICT_GROUPS: usize = 64;
/// Times that others may take the room that was just made before a put gives up.
const RESERVE_ATTEMPTS: u32 = 4;

/// The account of used bytes.
#[derive(Debug, Default)]
pub(crate) struct Space {
    used_bytes: AtomicU64,
    /// One eviction at a time; the others wait for it and look again.
    evicting: Mutex<()>,
    /// Counts what can make something evictable that was not.
    changes: AtomicU64,
    /// The value of `changes`, plus 1, at which nothing was evictable.
    nothing_at: AtomicU64,
}

/// Room that was taken for bytes about to be written. Dropped, it is given back.
#[derive(Debug)]
pub(crate) struct Room<'a> {
    space: &'a Space,
    len_bytes: u64,
}

impl Room<'_> {
    /// `written_bytes` of it were used; the rest is given back.
    pub(crate) fn spend(mut self, written_bytes: u64) {
        self.len_bytes = self.len_bytes.saturating_sub(written_bytes);
        self.space.something_changed();
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.space.adjust(self.len_bytes, 0);
    }
}

impl Space {
    pub(crate) fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }

    /// Replaces an amount that was counted by another. Never goes below zero, whatever order updates arrive in.
    pub(crate) fn adjust(&self, before: u64, now: u64) {
        let change = |used: u64| Some(used.saturating_add(now).saturating_sub(before));
        // The closure always answers, so the update always happens.
        let _ = self.used_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, change);
    }

    /// Something may be evictable now that was not.
    pub(crate) fn something_changed(&self) {
        self.changes.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes `len_bytes` if that stays within `budget_bytes`; what is used otherwise.
    fn take(&self, len_bytes: u64, budget_bytes: u64) -> Result<Room<'_>, u64> {
        let within = |used: u64| used.checked_add(len_bytes).filter(|used| *used <= budget_bytes);
        self.used_bytes
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, within)
            .map(|_| Room { space: self, len_bytes })
    }
}

impl Shared {
    /// Takes room for `len_bytes` that are about to be written, evicting if it must.
    ///
    /// # Errors
    /// [`StoreError::Full`] when there is none and nothing may be evicted.
    pub(crate) fn reserve(&self, len_bytes: u64) -> Result<Room<'_>, StoreError> {
        if self.is_closed() {
            return Err(StoreError::Closed);
        }
        if let Ok(room) = self.take_room(len_bytes)? {
            return Ok(room);
        }
        let _one = self.space.evicting.lock();
        let mut attempt = 0;
        loop {
            let (shortage_bytes, cause) = match self.take_room(len_bytes)? {
                Ok(room) => return Ok(room),
                Err(short) => short,
            };
            attempt += 1;
            if attempt > RESERVE_ATTEMPTS || self.evict_some(shortage_bytes.saturating_add(self.slack_bytes()))? == 0 {
                return Err(StoreError::Full { needed_bytes: len_bytes, cause });
            }
        }
    }

    /// Takes room as it is now, or says how many bytes are too few and why.
    fn take_room(&self, len_bytes: u64) -> Result<Result<Room<'_>, (u64, FullCause)>, StoreError> {
        let budget_bytes = self.config.budget_bytes.unwrap_or(u64::MAX);
        let room = match self.space.take(len_bytes, budget_bytes) {
            Ok(room) => room,
            Err(used_bytes) => {
                let shortage = used_bytes.saturating_add(len_bytes).saturating_sub(budget_bytes);
                return Ok(Err((shortage, FullCause::Budget { used_bytes, budget_bytes })));
            }
        };
        let floor_bytes = self.config.free_floor_bytes;
        if floor_bytes > 0 {
            let free_bytes = self.free_bytes()?;
            let wanted = floor_bytes.saturating_add(len_bytes);
            if free_bytes < wanted {
                return Ok(Err((wanted - free_bytes, FullCause::Floor { free_bytes, floor_bytes })));
            }
        }
        Ok(Ok(room))
    }

    /// Bytes that the filesystem has for an ordinary user.
    pub(crate) fn free_bytes(&self) -> Result<u64, StoreError> {
        let stat = rustix::fs::statvfs(self.dir()).map_err(StoreError::io("ask the free space of", self.dir()))?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn slack_bytes(&self) -> u64 {
        let budget = self.config.budget_bytes.unwrap_or(u64::MAX);
        (budget / 32).clamp(SLACK_MIN_BYTES, SLACK_MAX_BYTES)
    }

    /// Evicts at least `bytes`, or as much as may go; how much went.
    ///
    /// # Errors
    /// When the catalogue cannot be written or no hole can be punched.
    pub(crate) fn make_room(&self, bytes: u64) -> Result<u64, StoreError> {
        let _one = self.space.evicting.lock();
        self.evict_some(bytes)
    }

    /// Evicts, while the caller holds `evicting`.
    fn evict_some(&self, bytes: u64) -> Result<u64, StoreError> {
        // Before the look around, so that a change in the middle of it is not missed.
        let changes = self.space.changes.load(Ordering::Relaxed);
        if self.space.nothing_at.load(Ordering::Relaxed) == changes + 1 {
            return Ok(0);
        }
        let layers = self.all_layers();
        let pinned = self.pinned_layers()?;
        let last_copy = self.last_copy.read().clone();
        let mut candidates = Vec::new();
        for (index, layer) in (0_u32..).zip(&layers) {
            let protection = if pinned.contains(&layer.diff_id()) {
                Protection::Pinned
            } else if layer.is_held() {
                Protection::Open
            } else if last_copy.as_ref().is_some_and(|last_copy| last_copy(layer.diff_id())) {
                Protection::LastCopy
            } else {
                Protection::None
            };
            if !protection.evictable() || layer.present_bytes() == 0 {
                continue;
            }
            let layer_last_use = layer.last_use_seconds();
            for group in 0..layer.group_count() {
                let len_bytes = layer.group_bytes(group);
                if len_bytes > 0 {
                    let last_use = layer.group_last_use(group).into();
                    candidates.push(Candidate { layer: index, group, len_bytes, last_use, layer_last_use, protection });
                }
            }
        }
        let plan = choose(&candidates, bytes);
        if plan.victims.is_empty() {
            self.space.nothing_at.store(changes + 1, Ordering::Relaxed);
            return Ok(0);
        }
        let victims: BTreeSet<(u32, u32)> =
            plan.victims.iter().map(|index| (candidates[*index].layer, candidates[*index].group)).collect();
        let mut freed = 0;
        for (index, layer) in (0_u32..).zip(&layers) {
            let groups: Vec<u32> = victims.range((index, 0)..=(index, u32::MAX)).map(|(_, group)| *group).collect();
            for groups in groups.chunks(EVICT_GROUPS) {
                match layer.evict(groups) {
                    Ok(bytes) => freed += bytes,
                    // Somebody removed the layer just now, which freed more than this.
                    Err(StoreError::LayerRemoved { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        tracing::debug!(wanted_bytes = bytes, freed_bytes = freed, groups = victims.len(), "evicted");
        Ok(freed)
    }

    /// The layers of the pinned images.
    fn pinned_layers(&self) -> Result<BTreeSet<DiffId>, StoreError> {
        let mut pinned = BTreeSet::new();
        for digest in self.catalogue.pins()?.into_iter().map(|(digest, _)| digest).collect::<BTreeSet<_>>() {
            if let Some(json) = self.catalogue.image(digest)? {
                match ImageRecord::decode(digest, &json) {
                    Ok(record) => pinned.extend(record.layers.iter().map(|layer| layer.diff_id)),
                    // Nobody can say which layers it meant; the store must not be stuck for that.
                    Err(error) => tracing::warn!(%digest, %error, "pin of an unreadable image has no effect"),
                }
            }
        }
        Ok(pinned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_taken_once_and_given_back() {
        let space = Space::default();
        let room = space.take(60, 100).expect("fits");
        assert_eq!(space.take(60, 100).expect_err("does not fit"), 60);
        room.spend(40);
        assert_eq!(space.used_bytes(), 40);
        drop(space.take(60, 100).expect("fits now"));
        assert_eq!(space.used_bytes(), 40);
        space.adjust(50, 0);
        assert_eq!(space.used_bytes(), 0, "never below zero");
    }
}
