//! A file of another worker as far as it is needed here: memory of the file's length of which only what is held is kept.
//! Whoever reads of its map sees zeros where nothing was written, so nothing may be read that is not held and written.

use memmap2::Mmap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Linux's smallest page: memory is given back in steps of it, or of a multiple where pages are larger.
const PAGE: u64 = 4096;

pub struct Image {
    memory: File,
    map: Arc<Mmap>,
    /// What is held, in whole pages. A page goes when the last that holds of it lets go.
    held: Mutex<Vec<Range<u64>>>,
}

/// Keeps what is written in its range until it is dropped.
pub struct Hold {
    image: Arc<Image>,
    pages: Range<u64>,
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Image of {} bytes", self.map.len())
    }
}

impl Image {
    /// Of a file of so many bytes, at least one. Takes no memory yet.
    pub fn new(bytes: u64) -> io::Result<Arc<Image>> {
        // SAFETY: the name is a C string, and a descriptor that the kernel returns is owned by nobody else.
        let memory = unsafe {
            let descriptor = libc::memfd_create(c"conclave-weights".as_ptr(), libc::MFD_CLOEXEC);
            if descriptor < 0 {
                return Err(io::Error::last_os_error());
            }
            File::from_raw_fd(descriptor)
        };
        memory.set_len(bytes)?;
        // SAFETY: the memory is this process's own and never cut; bytes change under the map only where nobody holds them
        // yet, before whoever asked for them reads.
        let map = Arc::new(unsafe { Mmap::map(&memory) }?);
        Ok(Arc::new(Image { memory, map, held: Mutex::default() }))
    }

    pub fn map(&self) -> &Arc<Mmap> {
        &self.map
    }

    /// Bytes that it takes now.
    #[cfg(test)]
    pub fn taken(&self) -> u64 {
        std::os::unix::fs::MetadataExt::blocks(&self.memory.metadata().expect("it is open")) * 512
    }

    /// What is written inside `range` from now on stays until the hold is dropped.
    pub fn hold(self: &Arc<Image>, range: Range<u64>) -> Hold {
        assert!(range.start < range.end && range.end <= self.map.len() as u64, "{range:?} of {self:?}");
        let pages = range.start / PAGE * PAGE..range.end.next_multiple_of(PAGE);
        self.lock().push(pages.clone());
        Hold { image: self.clone(), pages }
    }

    /// Writes bytes of the file at their place, which must be held.
    pub fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        assert!(at + bytes.len() as u64 <= self.map.len() as u64, "{} bytes at {at} of {self:?}", bytes.len());
        self.memory.write_all_at(bytes, at)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Range<u64>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives pages back to the system.
    fn forget(&self, pages: Range<u64>) {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let (from, bytes) = (pages.start as libc::off_t, (pages.end - pages.start) as libc::off_t);
        // SAFETY: only numbers are passed. Where it fails the memory stays until the image is dropped.
        unsafe { libc::fallocate(self.memory.as_raw_fd(), mode, from, bytes) };
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut held = self.image.lock();
        if let Some(at) = held.iter().position(|pages| *pages == self.pages) {
            held.swap_remove(at);
        }
        // Under the lock: nobody holds anew, and writes, what is forgotten here.
        for pages in without(&self.pages, &held) {
            self.image.forget(pages);
        }
    }
}

/// What of `range` is in none of `others`.
fn without(range: &Range<u64>, others: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut overlapping: Vec<&Range<u64>> =
        others.iter().filter(|other| other.start < range.end && other.end > range.start).collect();
    overlapping.sort_by_key(|other| other.start);
    let (mut left, mut from) = (Vec::new(), range.start);
    for other in overlapping {
        if other.start > from {
            left.push(from..other.start);
        }
        from = from.max(other.end);
    }
    if from < range.end {
        left.push(from..range.end);
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_stays_and_all_else_takes_no_memory() {
        let image = Image::new(1 << 40).unwrap();
        assert_eq!((image.map().len(), image.taken()), (1 << 40, 0));
        let at = |n: u64| (1 << 39) + n;
        let (first, second) = (image.hold(at(100)..at(6000)), image.hold(at(6000)..at(20_000)));
        image.write(at(100), &[1; 5900]).unwrap();
        image.write(at(6000), &[2; 14_000]).unwrap();
        assert!(image.taken() >= 20_000);
        drop(first);
        let read = |n: u64| image.map()[at(n) as usize];
        assert_eq!((read(5999), read(6000), read(19_999)), (1, 2, 2), "a page of both stays");
        drop(second);
        assert_eq!(image.taken(), 0);
        assert_eq!((read(100), read(5999), read(6000)), (0, 0, 0));
    }

    #[test]
    #[allow(clippy::single_range_in_vec_init)] // lists of ranges
    fn the_rest_of_a_range_is_what_nobody_else_has() {
        for (others, left) in [
            (&[][..], &[10..20][..]),
            (&[0..10, 20..30], &[10..20]),
            (&[0..12, 18..30], &[12..18]),
            (&[14..16, 12..15], &[10..12, 16..20]),
            (&[0..40], &[]),
        ] {
            assert_eq!(without(&(10..20), others), left, "{others:?}");
        }
    }
}
