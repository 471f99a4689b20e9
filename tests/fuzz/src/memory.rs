//! An allocator that counts what each thread holds.
//!
//! Targets work on the thread that calls them, so per-thread counts measure one input even while tests run beside each
//! other. What C code takes from malloc itself is not seen: of our decoders that is libzstd alone, whose contexts are
//! bounded by its own window limit, and by libFuzzer's limit on the whole process.
#![allow(unsafe_code)] // an allocator cannot be written without

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    // Neither has a destructor nor is made lazily, so both may be used inside an allocation.
    static LIVE_BYTES: Cell<i64> = const { Cell::new(0) };
    static PEAK_BYTES: Cell<i64> = const { Cell::new(0) };
}

/// The system's allocator, counted.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counting;

fn count(change: i64) {
    LIVE_BYTES.with(|live| {
        live.set(live.get() + change);
        PEAK_BYTES.with(|peak| peak.set(peak.get().max(live.get())));
    });
}

// SAFETY: every call goes to the system's allocator unchanged; counting allocates nothing and cannot panic.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller's promise is the one that the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, len: usize) -> *mut u8 {
        // Both blocks are live while one is copied to the other.
        count(len as i64);
        // SAFETY: as above.
        let moved = unsafe { System.realloc(pointer, layout, len) };
        count(-(layout.size() as i64));
        moved
    }
}

/// Runs `work` and returns the most bytes that it had live on this thread at any one time, beyond what was live before.
/// Zero when the process has another allocator.
pub fn peak_of(work: impl FnOnce()) -> u64 {
    let before = LIVE_BYTES.with(Cell::get);
    PEAK_BYTES.with(|peak| peak.set(before));
    work();
    let peak = PEAK_BYTES.with(Cell::get);
    u64::try_from(peak - before).unwrap_or(0)
}
