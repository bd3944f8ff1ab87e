//! Numbers of devices exchanged by a host's collective: down through pinned memory, across, and up again. The twin of
//! [`Nccl`](super::nccl::Nccl) with the bits of the collective within (*Canonical*), for ranks of which several share a device, for
//! hosts without the library, and to compare it with.

use super::device::{Address, DeviceCollective, Queue};
use super::{Abort, Collective};
use model::fault::{Fault, FaultKind};
use std::ops::Range;
use std::sync::Arc;

/// A rank's membership: a host's, and the queue of its device.
pub struct Staged<C, Q> {
    inner: C,
    queue: Q,
    parts: Vec<Vec<u8>>,
    received: Vec<Vec<u8>>,
}

impl<C: Collective, Q: Queue> Staged<C, Q> {
    pub fn new(inner: C, queue: Q) -> Staged<C, Q> {
        Staged { inner, queue, parts: Vec::new(), received: Vec::new() }
    }

    /// The device's bytes.
    fn down(&mut self, from: Address, bytes: usize) -> Result<&mut [u8], Fault> {
        self.queue.staging(bytes)?;
        self.queue.fetch(from, 0, bytes)?;
        Ok(&mut self.queue.staging(bytes)?[..bytes])
    }

    /// What `rank` sent, to the device.
    fn up(&mut self, rank: usize, to: Address, bytes: usize) -> Result<(), Fault> {
        let theirs = &self.received[rank];
        if theirs.len() != bytes {
            let (me, sent) = (self.inner.rank(), theirs.len());
            let text = format!("rank {rank} sent {sent} bytes to rank {me}, which expects {bytes}");
            return Err(Fault::new(FaultKind::Diverged, text));
        }
        self.queue.staging(bytes)?[..bytes].copy_from_slice(theirs);
        self.queue.store(0, to, bytes)
    }
}

impl<C: Collective + 'static, Q: Queue + 'static> DeviceCollective for Staged<C, Q> {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn queue(&mut self) -> &mut dyn Queue {
        &mut self.queue
    }

    fn sum(&mut self, at: Address, count: usize) -> Result<(), Fault> {
        let bytes = count * size_of::<f32>();
        self.down(at, bytes)?;
        self.inner.sum(bytemuck::cast_slice_mut(&mut self.queue.staging(bytes)?[..bytes]))?;
        self.queue.store(0, at, bytes)
    }

    fn gather(&mut self, mine: Address, bytes: usize, all: Address) -> Result<(), Fault> {
        self.down(mine, bytes)?;
        self.inner.gather(&self.queue.staging(bytes)?[..bytes], &mut self.received)?;
        (0..self.size()).try_for_each(|rank| self.up(rank, all + (rank * bytes) as Address, bytes))
    }

    fn exchange(
        &mut self,
        from: Address,
        sent: &[Range<usize>],
        to: Address,
        received: &[Range<usize>],
    ) -> Result<(), Fault> {
        assert!(sent.len() == self.size() && received.len() == self.size(), "one range a member");
        let end = sent.iter().map(|range| range.end).max().unwrap_or(0);
        let mut parts = std::mem::take(&mut self.parts);
        super::reset(&mut parts, sent.len());
        let all = self.down(from, end)?;
        parts.iter_mut().zip(sent).for_each(|(part, range)| part.extend_from_slice(&all[range.clone()]));
        self.inner.exchange(&parts, &mut self.received)?;
        self.parts = parts;
        received
            .iter()
            .enumerate()
            .try_for_each(|(rank, range)| self.up(rank, to + range.start as Address, range.len()))
    }

    fn send(&mut self, to: usize, at: Address, bytes: usize) -> Result<(), Fault> {
        self.down(at, bytes)?;
        self.inner.send(to, &self.queue.staging(bytes)?[..bytes])
    }

    fn receive(&mut self, from: usize, at: Address, bytes: usize) -> Result<(), Fault> {
        self.received.resize_with(self.size(), Vec::new);
        self.inner.receive(from, &mut self.received[from])?;
        self.up(from, at, bytes)
    }

    /// Every call has waited; other things on the queue may not be done.
    fn settle(&mut self) -> Result<(), Fault> {
        self.queue.enter()?;
        while !self.queue.is_done()? {
            std::thread::yield_now();
        }
        Ok(())
    }

    /// A host's communicator is made anew, from a plan.
    fn shrink(self: Box<Self>, lost: &[usize]) -> Result<Box<dyn DeviceCollective>, Fault> {
        let text = format!("the communicator of rank {} is a host's: without {lost:?} it is made anew", self.rank());
        Err(Fault::new(FaultKind::Incompatible, text))
    }

    fn abort_handle(&self) -> Arc<dyn Abort> {
        self.inner.abort_handle()
    }
}
