//! Zeroed memory on cache lines, and on huge pages: packed weights, caches and activations. What is smaller than a huge page shares
//! one with its neighbours: an expert's matrix on small pages would miss the address cache at every other line.

use bytemuck::Pod;
use model::fault::{Fault, FaultKind};
use std::alloc::Layout;
use std::ptr::NonNull;
#[cfg(target_os = "linux")]
use std::sync::{Arc, Mutex};

const LINE: usize = 64;
/// What is smaller is left to the allocator.
#[cfg(target_os = "linux")]
const SHARED: usize = 32 << 10;
/// Bytes that are mapped at once to be shared; those not written to take no memory.
#[cfg(target_os = "linux")]
const CHUNK: usize = 32 << 20;
#[cfg(target_os = "linux")]
const HUGE_PAGE: usize = 2 << 20;
/// A multiple of every page size that Linux has.
#[cfg(target_os = "linux")]
const PAGE: usize = 64 << 10;

/// A fixed-size slice whose first element starts a cache line.
pub struct Aligned<T: Pod> {
    start: NonNull<T>,
    len: usize,
    memory: Memory,
}

/// Where the bytes came from, and so how they go back.
enum Memory {
    Heap {
        start: NonNull<u8>,
        layout: Layout,
    },
    #[cfg(target_os = "linux")]
    Mapping {
        _pages: Mapping,
    },
    /// So many bytes of a mapping that others share.
    #[cfg(target_os = "linux")]
    Part {
        start: NonNull<u8>,
        bytes: usize,
        _of: Arc<Mapping>,
    },
}

/// Pages of this process's own, on huge pages where there are any.
#[cfg(target_os = "linux")]
struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: it owns its memory, which nobody reaches through it.
#[cfg(target_os = "linux")]
unsafe impl Send for Mapping {}
// SAFETY: as above.
#[cfg(target_os = "linux")]
unsafe impl Sync for Mapping {}

#[cfg(target_os = "linux")]
impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `map` made this mapping, which is not used after.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

/// What the next small one is cut from, and how much of it is gone. No part is given out twice, so each is zero.
#[cfg(target_os = "linux")]
static OPEN: Mutex<Option<(Arc<Mapping>, usize)>> = Mutex::new(None);

/// `bytes` of a shared mapping.
#[cfg(target_os = "linux")]
fn part(bytes: usize) -> Option<(NonNull<u8>, Arc<Mapping>)> {
    let bytes = bytes.next_multiple_of(LINE);
    let mut open = OPEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let (of, at) = match open.take() {
        Some((of, used)) if used + bytes <= of.bytes => (of, used),
        _ => (Arc::new(map(CHUNK)?), 0),
    };
    // SAFETY: inside the mapping.
    let start = unsafe { of.start.add(at) };
    *open = Some((of.clone(), at + bytes));
    Some((start, of))
}

// SAFETY: it owns its memory, as a Vec does.
unsafe impl<T: Pod + Send> Send for Aligned<T> {}
// SAFETY: as above.
unsafe impl<T: Pod + Sync> Sync for Aligned<T> {}

impl<T: Pod> Aligned<T> {
    /// `len` zeros, or an out-of-memory fault. Large ones take pages only as they are written.
    pub fn zeroed(len: usize) -> Result<Aligned<T>, Fault> {
        let what = || format!("no memory for {len} values of {} bytes", size_of::<T>());
        let refuse = || Fault::new(FaultKind::OutOfMemory, what());
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(refuse)?.max(LINE);
        #[cfg(target_os = "linux")]
        if bytes >= HUGE_PAGE {
            let bytes = bytes.checked_next_multiple_of(PAGE).ok_or_else(refuse)?;
            let mapping = map(bytes).ok_or_else(refuse)?;
            return Ok(Aligned { start: mapping.start.cast(), len, memory: Memory::Mapping { _pages: mapping } });
        }
        #[cfg(target_os = "linux")]
        if bytes >= SHARED {
            let (start, _of) = part(bytes).ok_or_else(refuse)?;
            return Ok(Aligned { start: start.cast(), len, memory: Memory::Part { start, bytes, _of } });
        }
        let layout = Layout::from_size_align(bytes, LINE).map_err(|_| refuse())?;
        // SAFETY: the layout is not empty.
        let start = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) }).ok_or_else(refuse)?;
        Ok(Aligned { start: start.cast(), len, memory: Memory::Heap { start, layout } })
    }
}

/// A private mapping of `bytes`, whole pages, that begins on a huge page. It ends where it was asked to: a last huge page
/// that reached beyond would cost up to 2 MiB a matrix, which nobody planned for.
#[cfg(target_os = "linux")]
fn map(bytes: usize) -> Option<Mapping> {
    let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new anonymous mapping touches nothing that exists.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes.checked_add(HUGE_PAGE)?, access, kind, -1, 0) };
    if start == libc::MAP_FAILED {
        return None;
    }
    let start = NonNull::new(start.cast::<u8>())?;
    let head = start.align_offset(HUGE_PAGE);
    // SAFETY: less than one huge page further, which was asked for on top.
    let first = unsafe { start.add(head) };
    // SAFETY: what is given back lies before and after the `bytes` that are kept, in whole pages of the mapping just
    // made; a refusal leaves it reserved and untouched. Advice changes nothing but the size of pages.
    unsafe {
        if head > 0 {
            libc::munmap(start.as_ptr().cast(), head);
        }
        libc::munmap(first.as_ptr().add(bytes).cast(), HUGE_PAGE - head);
        libc::madvise(first.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE);
    }
    Some(Mapping { start: first, bytes })
}

/// Gives back the memory of the whole pages among these bytes, which nobody reads again; their mapping stays for its other parts.
#[cfg(target_os = "linux")]
fn forget(start: NonNull<u8>, bytes: usize) {
    let head = start.align_offset(PAGE);
    let whole = bytes.saturating_sub(head) / PAGE * PAGE;
    if whole > 0 {
        // SAFETY: inside a part that is gone; its mapping still stands.
        unsafe { libc::madvise(start.as_ptr().add(head).cast(), whole, libc::MADV_DONTNEED) };
    }
}

impl<T: Pod> std::ops::Deref for Aligned<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: allocated for `len` values, zeroed, and T is plain data.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T: Pod> std::ops::DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<T: Pod> Drop for Aligned<T> {
    fn drop(&mut self) {
        match self.memory {
            // SAFETY: allocated with this layout.
            Memory::Heap { start, layout } => unsafe { std::alloc::dealloc(start.as_ptr(), layout) },
            #[cfg(target_os = "linux")]
            Memory::Mapping { .. } => {}
            #[cfg(target_os = "linux")]
            Memory::Part { start, bytes, .. } => forget(start, bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_any_size_is_zero_on_a_line_and_apart_from_others() {
        let sizes = [0, 1, 9_000, 70_001, 200_000, 700_000, 6_000_000];
        let mut all: Vec<(Aligned<u32>, u32)> = Vec::new();
        for (round, len) in sizes.into_iter().cycle().take(8 * sizes.len()).enumerate() {
            let mut memory = Aligned::<u32>::zeroed(len).unwrap();
            assert!(memory.len() == len && memory.as_ptr().addr().is_multiple_of(LINE));
            assert!(memory.iter().all(|v| *v == 0), "{len} values in round {round}");
            memory.fill(round as u32 + 1);
            all.push((memory, round as u32 + 1));
            // Others come and go meanwhile.
            if round % 3 == 2 {
                all.swap_remove(round / 3);
            }
            assert!(all.iter().all(|(memory, value)| memory.iter().all(|v| v == value)), "round {round}");
        }
        assert!(Aligned::<u64>::zeroed(usize::MAX / 4).is_err());
    }
}
