//! How ranks exchange numbers that lie in a device's memory: the device's side of [`Collective`].
//!
//! ```text
//! engine ── host slices ─────> Collective         threads, shared memory, TCP
//!        └─ device addresses > DeviceCollective ─ Nccl            the library, on the device's queue
//!                                               └ Staged<C>       pinned copies around any Collective
//! ```
//! Calls are put on the rank's [`Queue`] behind what is there and return before they are done, so that the host runs ahead and a
//! graph can record them. What went wrong is a fault of a later call, at the latest of [`DeviceCollective::settle`]: **numbers
//! that came of a queue are to be trusted only after a `settle` that says so**, because an aborted collective lets the queue
//! go on with whatever is in its buffers.
//!
//! [`Collective`]: super::Collective

use super::Abort;
use model::fault::Fault;
use std::ffi::c_void;
use std::ops::Range;
use std::sync::Arc;

/// An address of a device's memory.
pub type Address = u64;

/// Rows that lie behind each other in a device's memory.
#[derive(Debug, Clone, Copy)]
pub struct DeviceRows {
    pub at: Address,
    /// Bytes of one.
    pub width: usize,
}

/// A word that a queue writes when it gets there and any thread may read.
pub trait Word: Send + Sync {
    fn read(&self) -> u32;
}

/// A device's queue of work, and a piece of host memory that the device copies to and from at full speed.
pub trait Queue: Send {
    /// `cudaStream_t`, for libraries.
    fn raw(&self) -> *mut c_void;

    /// Which device, the same number for whoever uses it: no two ranks of one communicator may share a device under NCCL.
    fn device(&self) -> Result<[u8; 16], Fault>;

    /// Makes its context the calling thread's.
    fn enter(&self) -> Result<(), Fault>;

    /// The host memory: at least `bytes`, aligned for any number. What was in it may be lost when it grows.
    fn staging(&mut self, bytes: usize) -> Result<&mut [u8], Fault>;

    /// Copies `bytes` of the device behind everything on the queue to offset `at` of the staging memory, and waits.
    fn fetch(&mut self, from: Address, at: usize, bytes: usize) -> Result<(), Fault>;

    /// Copies `bytes` from offset `at` of the staging memory to the device, behind everything on the queue, and waits.
    fn store(&mut self, at: usize, to: Address, bytes: usize) -> Result<(), Fault>;

    /// [`Queue::word`] becomes `value` when the queue gets there.
    fn mark(&mut self, value: u32) -> Result<(), Fault>;

    fn word(&self) -> Arc<dyn Word>;

    /// Whether all that was put on it is done; never waits.
    fn is_done(&mut self) -> Result<bool, Fault>;
}

/// One rank's membership, as [`Collective`](super::Collective): the same calls in the same order on all members.
pub trait DeviceCollective: Send {
    fn rank(&self) -> usize;

    fn size(&self) -> usize;

    /// What calls are put on.
    fn queue(&mut self) -> &mut dyn Queue;

    /// Replaces `count` f32 numbers at `at` on every member by the sum over members, in an order of whoever adds: for what is not
    /// promised to the bit, as benchmarks. An engine adds what `gather` and `exchange` bring.
    fn sum(&mut self, at: Address, count: usize) -> Result<(), Fault>;

    /// `bytes` of every member, in rank order, to `all`, which has room for all of them; the same number on all members.
    fn gather(&mut self, mine: Address, bytes: usize, all: Address) -> Result<(), Fault>;

    /// Sends bytes `sent[r]` of `from` to each member `r` and puts what `r` sent here into `received[r]` of `to`. The lengths
    /// that two members name to each other are equal; they may differ between pairs and be zero. Ranges that receive do not
    /// overlap, and neither do the two memories. What a graph records has lengths of full capacity, the counts within.
    fn exchange(
        &mut self,
        from: Address,
        sent: &[Range<usize>],
        to: Address,
        received: &[Range<usize>],
    ) -> Result<(), Fault>;

    /// Sends bytes to one other member; pairs with its `receive` of as many. May wait for it: members that send to each other
    /// at once use `exchange`.
    fn send(&mut self, to: usize, at: Address, bytes: usize) -> Result<(), Fault>;

    fn receive(&mut self, from: usize, at: Address, bytes: usize) -> Result<(), Fault>;

    /// Waits until all that was put on the queue is done; a fault if any of it was not done as it should.
    fn settle(&mut self) -> Result<(), Fault>;

    /// The communicator of the members without `lost`, who keep their order; all the others call it. After a fault too, while
    /// the library allows.
    fn shrink(self: Box<Self>, lost: &[usize]) -> Result<Box<dyn DeviceCollective>, Fault>;

    /// Wakes and fails every pending and later call on all members, from any thread, and returns at once.
    fn abort_handle(&self) -> Arc<dyn Abort>;
}

/// A rank's groups whose devices reach each other without the host.
#[derive(Default)]
pub struct Devices {
    pub tensor: Option<Box<dyn DeviceCollective>>,
    pub lane: Option<Box<dyn DeviceCollective>>,
    pub pipe: Option<Box<dyn DeviceCollective>>,
}

impl Devices {
    /// [`DeviceCollective::settle`] of each.
    pub fn settle(&mut self) -> Result<(), Fault> {
        [&mut self.tensor, &mut self.lane, &mut self.pipe]
            .into_iter()
            .flatten()
            .try_for_each(|members| members.settle())
    }
}
