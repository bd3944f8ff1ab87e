//! A piece of memory that threads or processes share. Says nothing of what lies where: that is [`super::shared`]'s.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

/// A shared mapping, zero at first; pages take memory when they are first touched. Unmapped on drop.
pub struct Region {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the memory is reached through atomics, or through `read` and `write`, whose callers vouch for exclusion.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Memory for the threads of this process.
    pub fn anonymous(bytes: usize) -> io::Result<Region> {
        Region::map(bytes, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1)
    }

    /// Memory of `file`, which must be at least `bytes` long and never be cut.
    pub fn of_file(file: &File, bytes: usize) -> io::Result<Region> {
        let length = file.metadata()?.len();
        if length < bytes as u64 {
            return Err(io::Error::other(format!("shared file has {length} bytes, needs {bytes}")));
        }
        Region::map(bytes, libc::MAP_SHARED, file.as_raw_fd())
    }

    fn map(bytes: usize, flags: i32, file: i32) -> io::Result<Region> {
        // SAFETY: a fresh mapping at an address of the kernel's choice disturbs nothing that exists.
        let base =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, file, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).expect("a mapping is never placed at null");
        Ok(Region { base, bytes })
    }

    /// The word at offset `at`; only ever used as an atomic.
    pub fn word(&self, at: usize) -> &AtomicU32 {
        assert!(at.is_multiple_of(4) && at + 4 <= self.bytes);
        // SAFETY: in bounds and aligned (the base is a page's); the mapping lives as long as `self`.
        unsafe { AtomicU32::from_ptr(self.base.as_ptr().add(at).cast()) }
    }

    /// The double word at offset `at`; only ever used as an atomic.
    pub fn long(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at + 8 <= self.bytes);
        // SAFETY: as in `word`.
        unsafe { AtomicU64::from_ptr(self.base.as_ptr().add(at).cast()) }
    }

    /// The bytes in `range`.
    ///
    /// # Safety
    /// Nobody, in any process, writes them while the slice lives.
    pub unsafe fn read(&self, range: Range<usize>) -> &[u8] {
        assert!(range.start <= range.end && range.end <= self.bytes);
        // SAFETY: in bounds; the caller vouches that nobody writes.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().add(range.start), range.len()) }
    }

    /// Copies `bytes` to offset `at`.
    ///
    /// # Safety
    /// Nobody else, in any process, reads or writes there meanwhile.
    pub unsafe fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at <= self.bytes && bytes.len() <= self.bytes - at);
        // SAFETY: in bounds; the caller vouches for exclusion, so `bytes` is elsewhere too.
        unsafe { self.base.as_ptr().add(at).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this size; borrows of it ended with `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

/// A file of `bytes` zero bytes that has no name anywhere: the kernel frees it with its last descriptor and mapping,
/// however the processes end. It can never be cut, so a mapping of it cannot fault.
pub fn nameless_file(bytes: usize) -> io::Result<File> {
    // SAFETY: the name is a terminated string; a non-negative result is a descriptor that nobody else owns.
    let file = unsafe {
        let descriptor = libc::memfd_create(c"conclave".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        File::from_raw_fd(descriptor)
    };
    file.set_len(bytes as u64)?;
    // SAFETY: plain calls on a descriptor that is open.
    let sealed = unsafe {
        libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL)
    };
    if sealed < 0 { Err(io::Error::last_os_error()) } else { Ok(file) }
}
