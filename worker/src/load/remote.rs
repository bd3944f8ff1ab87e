//! Files that another worker lends: what is needed of them, read by ranges into an [`Image`].

use super::bad;
use super::image::{Hold, Image};
use super::strip::Strip;
use memmap2::Mmap;
use model::fault::{Fault, FaultKind};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes asked for at a time.
pub const PART: u64 = 1 << 20;

/// Gets bytes, and which of those that were asked for they are, counted from the first.
pub type Take<'a> = &'a mut dyn FnMut(u64, &[u8]) -> Result<(), Fault>;

/// Workers that have a model's files, all with the same names and sizes.
pub trait Lender: Send + Sync {
    /// Names and lengths: descriptions first, then what holds weights.
    fn files(&self) -> &[(String, u64)];

    /// Reads a strip of at most [`PART`] bytes of the file of that number. `take` gets pieces, each with its place in the strip;
    /// after a lender is lost all may come again from another one. Ends within a bounded time of silence, or as soon as
    /// the bytes are not wanted any more.
    fn read(&self, file: usize, strip: &Strip, take: Take<'_>) -> Result<(), Fault>;
}

/// One file of a lender's.
#[derive(Clone)]
pub struct Remote {
    lender: Arc<dyn Lender>,
    index: usize,
    image: Arc<Image>,
    /// What was read to stay: headers, and small tensors that are looked at again and again.
    stays: Arc<Mutex<Vec<Kept>>>,
}

type Kept = (Range<u64>, Hold);

impl std::fmt::Debug for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "file {} of a lender", self.index)
    }
}

impl Remote {
    pub fn new(lender: Arc<dyn Lender>, index: usize) -> Result<Remote, Fault> {
        let (name, bytes) = &lender.files()[index];
        if *bytes == 0 {
            return Err(bad(format!("{name}: the file is empty")));
        }
        let failed = |e| Fault::new(FaultKind::OutOfMemory, format!("{name}: no place for {bytes} bytes: {e}"));
        let image = Image::new(*bytes).map_err(failed)?;
        Ok(Remote { lender, index, image, stays: Arc::default() })
    }

    pub fn map(&self) -> &Arc<Mmap> {
        self.image.map()
    }

    /// Bytes of memory that it takes now.
    #[cfg(test)]
    pub fn taken(&self) -> u64 {
        self.image.taken()
    }

    pub fn hold(&self, range: Range<u64>) -> Hold {
        self.image.hold(range)
    }

    /// Reads a strip of at most [`PART`] bytes into the image, where its extent must be held.
    pub fn read(&self, strip: &Strip) -> Result<(), Fault> {
        self.lender.read(self.index, strip, &mut |mut at, mut bytes| {
            while !bytes.is_empty() {
                let place = strip.place(at);
                let count = ((place.end - place.start) as usize).min(bytes.len());
                let (now, rest) = bytes.split_at(count);
                let full = |e| Fault::new(FaultKind::OutOfMemory, format!("no memory for weights of a peer: {e}"));
                self.image.write(place.start, now).map_err(full)?;
                (at, bytes) = (at + count as u64, rest);
            }
            Ok(())
        })
    }

    /// Reads a range that stays until the image goes.
    pub fn keep(&self, range: Range<u64>) -> Result<(), Fault> {
        let mut stays = self.stays.lock().unwrap_or_else(PoisonError::into_inner);
        if range.is_empty() || stays.iter().any(|(kept, _)| kept.start <= range.start && kept.end >= range.end) {
            return Ok(());
        }
        let hold = self.hold(range.clone());
        for part in Strip::of(range.clone()).parts(PART) {
            self.read(&part)?;
        }
        stays.push((range, hold));
        Ok(())
    }
}
