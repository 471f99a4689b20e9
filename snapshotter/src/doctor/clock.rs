//! The clock: certificates, tokens and signed addresses are refused when it is wrong.
#![allow(unsafe_code)] // adjtimex(2) has no safe form in rustix; it fills in a structure.

use super::Finding;

/// Whether somebody keeps this machine's clock right, by the kernel's own word.
pub(super) fn synchronised() -> Finding {
    const WHAT: &str = "clock";
    // SAFETY: `timex` is plain numbers, for all of which zero is a value; `modes` 0 makes the call read only.
    let (state, status) = unsafe {
        let mut timex: libc::timex = std::mem::zeroed();
        (libc::adjtimex(&mut timex), timex.status)
    };
    let next = "run a time service: chrony, systemd-timesyncd, or the hypervisor's";
    if state < 0 {
        return Finding::warn(WHAT, format!("the kernel does not say: {}", std::io::Error::last_os_error()), next);
    }
    if status & libc::STA_UNSYNC != 0 {
        return Finding::warn(WHAT, "nothing keeps it right (STA_UNSYNC)", next);
    }
    Finding::ok(WHAT, "kept right")
}
