//! Ranks that are processes of one host: shared memory in a file without a name.
//!
//! The creator's descriptor is opened by the other processes through `/proc/<process>/fd/<descriptor>`, which the
//! kernel allows to the same user. Nothing is left anywhere when the processes end, however they end.

use super::region::nameless_file;
use super::shared::Seats;
use model::fault::{Fault, FaultKind};
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::sync::Arc;

/// The shared file of a new communicator, kept open by its creator until all members have mapped it.
pub struct Origin {
    file: File,
    size: usize,
    seats: Arc<Seats>,
}

/// How another process of the host finds the memory. The mark tells this file from any other that the same numbers
/// would name in another process namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offer {
    pub process: u32,
    pub descriptor: u32,
    pub mark: u64,
}

impl Origin {
    /// `mark` should not repeat between communicators.
    pub fn new(size: usize, mark: u64) -> Result<Origin, Fault> {
        let bytes = Seats::bytes(size);
        let file = nameless_file(bytes).map_err(|error| {
            Fault::new(FaultKind::OutOfMemory, format!("a shared file of {bytes} bytes for {size} ranks: {error}"))
        })?;
        let seats = Arc::new(Seats::of_file(&file, size)?);
        seats.set_mark(mark);
        Ok(Origin { file, size, seats })
    }

    pub fn seats(&self) -> &Arc<Seats> {
        &self.seats
    }

    pub fn offer(&self) -> Offer {
        Offer { process: std::process::id(), descriptor: self.file.as_raw_fd() as u32, mark: self.seats.mark() }
    }

    pub fn size(&self) -> usize {
        self.size
    }
}

/// Maps the memory that another process of this host offers.
pub fn open(offer: &Offer, size: usize) -> Result<Arc<Seats>, Fault> {
    let path = format!("/proc/{}/fd/{}", offer.process, offer.descriptor);
    let unreachable = |why: String| Fault::new(FaultKind::Incompatible, format!("{path}, for {size} ranks: {why}"));
    let metadata = std::fs::metadata(&path).map_err(|error| unreachable(error.to_string()))?;
    // Never open what is not a plain file: a pipe or a device could block or act.
    if !metadata.is_file() {
        return Err(unreachable("not a plain file".into()));
    }
    let file = OpenOptions::new().read(true).write(true).open(&path).map_err(|error| unreachable(error.to_string()))?;
    let seats = Seats::of_file(&file, size)?;
    if seats.mark() != offer.mark {
        return Err(unreachable(format!("carries mark {:x}, not {:x}", seats.mark(), offer.mark)));
    }
    Ok(Arc::new(seats))
}
