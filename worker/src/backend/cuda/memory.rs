//! A device's memory: one range, reserved when the device is opened, of which everything else is a piece. So a step never asks the
//! driver for memory, and what does not fit is known while loading.

use super::driver::{Address, Driver};
use model::fault::{Fault, FaultKind};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Pieces begin at multiples of this, as the driver's own would.
const ALIGN: usize = 256;

/// The reserved range.
pub struct Memory {
    driver: Arc<Driver>,
    start: Address,
    bytes: usize,
    free: Mutex<Free>,
}

/// Gaps by their first byte; no two touch.
#[derive(Debug, Default, PartialEq)]
struct Free(BTreeMap<Address, usize>);

impl Free {
    /// The first gap that is long enough, from its front.
    fn take(&mut self, bytes: usize) -> Option<Address> {
        let (&at, &length) = self.0.iter().find(|(_, length)| **length >= bytes)?;
        self.0.remove(&at);
        if length > bytes {
            self.0.insert(at + bytes as u64, length - bytes);
        }
        Some(at)
    }

    /// Joins it with the gaps that it touches.
    fn give(&mut self, mut at: Address, mut bytes: usize) {
        if let Some((&before, &length)) = self.0.range(..at).next_back()
            && before + length as u64 == at
        {
            self.0.remove(&before);
            (at, bytes) = (before, length + bytes);
        }
        if let Some(length) = self.0.remove(&(at + bytes as u64)) {
            bytes += length;
        }
        self.0.insert(at, bytes);
    }
}

impl Memory {
    pub fn reserve(driver: Arc<Driver>, bytes: usize) -> Result<Arc<Memory>, Fault> {
        let bytes = bytes / ALIGN * ALIGN;
        let (available, all) = driver.memory()?;
        if bytes == 0 || bytes > available {
            let text = format!("{bytes} bytes asked of {}, which has {available} of {all} free", driver.name);
            return Err(Fault::new(FaultKind::OutOfMemory, text));
        }
        let start = driver.reserve(bytes)?;
        let free = Mutex::new(Free(BTreeMap::from([(start, bytes)])));
        Ok(Arc::new(Memory { driver, start, bytes, free }))
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn piece(self: &Arc<Memory>, bytes: usize) -> Result<Piece, Fault> {
        let whole = bytes.max(1).next_multiple_of(ALIGN);
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        match free.take(whole) {
            Some(at) => Ok(Piece { memory: self.clone(), at, bytes, whole }),
            None => {
                let (left, of) = (free.0.values().sum::<usize>(), self.bytes);
                let text = format!("{bytes} bytes asked of {}, {left} of {of} are left", self.driver.name);
                Err(Fault::new(FaultKind::OutOfMemory, text))
            }
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Err(fault) = self.driver.release(self.start) {
            tracing::warn!("memory of {} could not be given back: {fault}", self.driver.name);
        }
    }
}

/// A part of the memory, given back when dropped. Whatever the stream still does with it comes before what the next owner does.
pub struct Piece {
    memory: Arc<Memory>,
    pub at: Address,
    pub bytes: usize,
    whole: usize,
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.memory.free.lock().unwrap_or_else(PoisonError::into_inner).give(self.at, self.whole);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_join_whatever_comes_back_first() {
        for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2], [0, 2, 1]] {
            let mut free = Free(BTreeMap::from([(512, 1024)]));
            let pieces = [256, 512, 256].map(|bytes| (free.take(bytes).unwrap(), bytes));
            assert_eq!(pieces.map(|p| p.0), [512, 768, 1280]);
            assert_eq!(free.take(256), None);
            for index in order {
                free.give(pieces[index].0, pieces[index].1);
            }
            assert_eq!(free, Free(BTreeMap::from([(512, 1024)])), "{order:?}");
        }
    }
}
