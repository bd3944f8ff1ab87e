//! Ranks that are processes of one host: shared memory in a file without a name.
//!
//! The creator's descriptor is opened by the other processes through `/proc/<process>/fd/<descriptor>`, which the
//! kernel allows to the same user. Nothing is left anywhere when the processes end, however they end.

use super::region::{Region, nameless_file};
use super::shared::Seats;
use model::fault::{Fault, FaultKind};
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

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
    let unreachable = |why: String| unreachable(offer, &format!("{size} ranks"), &why);
    let seats = Seats::of_file(&file(offer).map_err(unreachable)?, size)?;
    if seats.mark() != offer.mark {
        return Err(unreachable(format!("carries mark {:x}, not {:x}", seats.mark(), offer.mark)));
    }
    Ok(Arc::new(seats))
}

fn unreachable(offer: &Offer, what: &str, why: &str) -> Fault {
    let Offer { process, descriptor, .. } = offer;
    Fault::new(FaultKind::Incompatible, format!("/proc/{process}/fd/{descriptor}, for {what}: {why}"))
}

fn file(offer: &Offer) -> Result<File, String> {
    let path = format!("/proc/{}/fd/{}", offer.process, offer.descriptor);
    let metadata = std::fs::metadata(&path).map_err(|error| error.to_string())?;
    // Never open what is not a plain file: a pipe or a device could block or act.
    if !metadata.is_file() {
        return Err("not a plain file".into());
    }
    OpenOptions::new().read(true).write(true).open(&path).map_err(|error| error.to_string())
}

/// Memory of no form of its own that processes of one host share: its first eight bytes are the mark.
pub struct Mapped {
    region: Region,
    /// Kept by its creator, so that others may open it.
    _file: Option<File>,
}

impl Mapped {
    /// `bytes` of zeros but for the mark, which should not repeat, and how other processes find them.
    pub fn create(bytes: usize, mark: u64) -> Result<(Mapped, Offer), Fault> {
        let failed = |error: std::io::Error| {
            Fault::new(FaultKind::OutOfMemory, format!("a shared file of {bytes} bytes: {error}"))
        };
        let file = nameless_file(bytes).map_err(failed)?;
        let region = Region::of_file(&file, bytes).map_err(failed)?;
        region.long(0).store(mark, Ordering::Release);
        let offer = Offer { process: std::process::id(), descriptor: file.as_raw_fd() as u32, mark };
        Ok((Mapped { region, _file: Some(file) }, offer))
    }

    pub fn open(offer: &Offer, bytes: usize) -> Result<Mapped, Fault> {
        let unreachable = |why: String| unreachable(offer, &format!("{bytes} bytes"), &why);
        let file = file(offer).map_err(unreachable)?;
        let region = Region::of_file(&file, bytes).map_err(|error| unreachable(error.to_string()))?;
        match region.long(0).load(Ordering::Acquire) {
            mark if mark == offer.mark => Ok(Mapped { region, _file: None }),
            mark => Err(unreachable(format!("carries mark {mark:x}, not {:x}", offer.mark))),
        }
    }

    pub fn region(&self) -> &Region {
        &self.region
    }
}
