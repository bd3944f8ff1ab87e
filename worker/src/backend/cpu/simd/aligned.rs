//! Zeroed memory on cache lines, and on huge pages where it is large: packed weights, caches and activations.

use bytemuck::Pod;
use model::fault::{Fault, FaultKind};
use std::alloc::Layout;
use std::ptr::NonNull;

const LINE: usize = 64;
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
        start: NonNull<u8>,
        bytes: usize,
    },
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
            let start = map(bytes).ok_or_else(refuse)?;
            return Ok(Aligned { start: start.cast(), len, memory: Memory::Mapping { start, bytes } });
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
fn map(bytes: usize) -> Option<NonNull<u8>> {
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
    Some(first)
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
            // SAFETY: `map` made this mapping, which is not used after.
            Memory::Mapping { start, bytes } => {
                unsafe { libc::munmap(start.as_ptr().cast(), bytes) };
            }
        }
    }
}
