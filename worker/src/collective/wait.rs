//! Sleeping on a word of shared memory, across processes.

use std::sync::atomic::AtomicU32;
use std::time::Duration;

/// Turns of an idle loop before a waiting rank sleeps: some tens of microseconds, about what going to sleep and being
/// woken costs.
pub const SPIN_DEFAULT: u32 = 2000;

/// How long `ranks` ranks of this host should spin: not at all when they outnumber the cores, because then the rank
/// waited for may need the very core that spins.
pub fn spin_for(ranks: usize) -> u32 {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if ranks <= cores { SPIN_DEFAULT } else { 0 }
}

/// Sleeps while `word` is `value`, until woken or `limit` has passed. May return early for no reason.
pub fn sleep(word: &AtomicU32, value: u32, limit: Duration) {
    let limit = libc::timespec { tv_sec: limit.as_secs() as _, tv_nsec: limit.subsec_nanos() as _ };
    // SAFETY: FUTEX_WAIT reads the word, which outlives the call, and the timespec; it writes nothing.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, value, &raw const limit);
    }
}

/// Wakes whoever sleeps on `word`, in this process or another.
pub fn wake(word: &AtomicU32) {
    // SAFETY: FUTEX_WAKE uses the address only as a key.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX);
    }
}
