//! A byte stream from one rank to another in shared memory: one writer, one reader, no lock.

use super::inbox::Inbox;
use super::region::Region;
use model::fault::Fault;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// Bytes that a ring's two counters take, a pair of cache lines each.
pub const CONTROL: usize = 256;

/// A ring inside a region: `control` holds how many bytes were ever written and, 128 bytes on, ever read.
pub struct Ring<'a> {
    pub region: &'a Region,
    pub control: usize,
    pub data: usize,
    /// A power of two.
    pub capacity: usize,
}

impl Ring<'_> {
    /// Whether nothing is waiting to be read.
    pub fn is_empty(&self) -> bool {
        self.region.long(self.control).load(Acquire) == self.region.long(self.control + 128).load(Acquire)
    }

    /// Whether nothing more can be written.
    pub fn is_full(&self) -> bool {
        let written = self.region.long(self.control).load(Acquire);
        written - self.region.long(self.control + 128).load(Acquire) >= self.capacity as u64
    }

    /// Writes as much of `bytes` as fits, and says how much. Only the sending rank calls it.
    pub fn push(&self, bytes: &[u8]) -> usize {
        let written = self.region.long(self.control).load(Relaxed);
        let read = self.region.long(self.control + 128).load(Acquire);
        let free = self.capacity - (written - read) as usize;
        let count = bytes.len().min(free);
        let start = written as usize % self.capacity;
        let first = count.min(self.capacity - start);
        // SAFETY: the reader has released these bytes (`read`, acquired) and sees new ones only after the store below.
        unsafe {
            self.region.write(self.data + start, &bytes[..first]);
            self.region.write(self.data, &bytes[first..count]);
        }
        self.region.long(self.control).store(written + count as u64, Release);
        count
    }

    /// Moves what has arrived into `inbox`, and says how much it was. Only the receiving rank calls it.
    pub fn pull(&self, inbox: &mut Inbox) -> Result<usize, Fault> {
        let read = self.region.long(self.control + 128).load(Relaxed);
        let count = (self.region.long(self.control).load(Acquire) - read) as usize;
        let start = read as usize % self.capacity;
        let first = count.min(self.capacity - start);
        // SAFETY: the writer has published these bytes and reuses them only after the store below.
        unsafe {
            inbox.feed(self.region.read(self.data + start..self.data + start + first))?;
            inbox.feed(self.region.read(self.data..self.data + count - first))?;
        }
        self.region.long(self.control + 128).store(read + count as u64, Release);
        Ok(count)
    }
}
