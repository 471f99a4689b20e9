//! Limits of symlink targets.

use super::error::FileProblem;

/// Longest target: `PATH_MAX` without the zero that ends it (include/uapi/linux/limits.h).
pub(super) const TARGET_LEN_MAX_BYTES: usize = 4095;

/// Refuses what symlink(2) refuses.
pub(super) fn check(target: &[u8]) -> Result<(), FileProblem> {
    if !(1..=TARGET_LEN_MAX_BYTES).contains(&target.len()) || target.contains(&0) {
        return Err(FileProblem::Target(target.len()));
    }
    Ok(())
}
