//! How ranks exchange numbers inside a step. One trait, several transports, one contract suite (`suite`).
//!
//! ```text
//! solo     one member                          nothing to do
//! local    threads of one process              shared memory, private to it
//! memfd    processes of one host               shared memory without a name: gone with its last process
//! tcp      processes of several hosts          a full mesh of sockets, under TLS where the worker has certificates
//! nccl     devices, one rank each               NVIDIA's library, on buffers of the devices ([`device`])
//! staged   devices, any number of ranks each    copies around one of the others
//! ```
//!
//! Over the same door one worker lends another its model's files ([`weights`]).
//!
//! Bits are part of the contract (*Canonical* level): [`Collective::sum`] adds by the balanced binary tree over ranks
//! in f32 whatever the transport, so that a rank of a power-of-two communicator continues the tree of segments that
//! its kernels began (see `model::cut`).

#[cfg(test)]
mod authority;
pub mod checked;
pub mod connect;
mod credentials;
pub mod device;
mod door;
pub mod hello;
mod inbox;
mod link;
pub mod local;
pub mod memfd;
pub mod nccl;
pub mod refused;
mod region;
mod ring;
mod session;
pub mod shared;
mod sockets;
pub mod solo;
pub mod staged;
#[cfg(test)]
mod suite;
pub mod tcp;
pub mod timed;
mod tree;
mod wait;
mod watch;
pub mod weights;

use model::fault::Fault;
use std::sync::Arc;

/// One rank's membership in an ordered set of ranks. All members call the same operations in the same order; a member
/// that fails or is aborted makes every other's pending and later call return a fault, never wait for ever. A member
/// that is dropped has left: whoever waits for it, then or later, gets a fault.
pub trait Collective: Send {
    /// This rank's place among the members, from 0.
    fn rank(&self) -> usize;

    /// Number of members.
    fn size(&self) -> usize;

    /// Replaces `values` on every member by the element-wise sum over members: neighbours first, then pairs of pairs
    /// (ranks 0+1, 2+3, then 01+23), each addition rounded in f32. The length is the same on all members. The number of
    /// members must be a power of two.
    fn sum(&mut self, values: &mut [f32]) -> Result<(), Fault>;

    /// Every member's `mine`, in rank order. Lengths may differ; `all` is cleared and filled, one entry a member.
    fn gather(&mut self, mine: &[u8], all: &mut Vec<Vec<u8>>) -> Result<(), Fault>;

    /// Sends `parts[r]` to each member `r` and receives theirs: afterwards `received[r]` is what `r` had for this rank.
    /// `parts[rank]` comes back as it is. Lengths may differ and be zero.
    fn exchange(&mut self, parts: &[Vec<u8>], received: &mut Vec<Vec<u8>>) -> Result<(), Fault>;

    /// Sends bytes to one other member; pairs with its `receive`. Returns once the bytes may be reused. A large message
    /// may wait for its receiver, but two members may send to each other at once: whoever waits takes in what comes.
    fn send(&mut self, to: usize, bytes: &[u8]) -> Result<(), Fault>;

    /// Receives one message of `from`, another member, replacing `bytes`.
    fn receive(&mut self, from: usize, bytes: &mut Vec<u8>) -> Result<(), Fault>;

    /// Wakes and fails every pending and later call of this communicator, on all members, from any thread.
    fn abort_handle(&self) -> Arc<dyn Abort>;
}

/// Ends a communicator from another thread.
pub trait Abort: Send + Sync {
    fn abort(&self);
}

impl<C: Collective + ?Sized> Collective for Box<C> {
    fn rank(&self) -> usize {
        (**self).rank()
    }

    fn size(&self) -> usize {
        (**self).size()
    }

    fn sum(&mut self, values: &mut [f32]) -> Result<(), Fault> {
        (**self).sum(values)
    }

    fn gather(&mut self, mine: &[u8], all: &mut Vec<Vec<u8>>) -> Result<(), Fault> {
        (**self).gather(mine, all)
    }

    fn exchange(&mut self, parts: &[Vec<u8>], received: &mut Vec<Vec<u8>>) -> Result<(), Fault> {
        (**self).exchange(parts, received)
    }

    fn send(&mut self, to: usize, bytes: &[u8]) -> Result<(), Fault> {
        (**self).send(to, bytes)
    }

    fn receive(&mut self, from: usize, bytes: &mut Vec<u8>) -> Result<(), Fault> {
        (**self).receive(from, bytes)
    }

    fn abort_handle(&self) -> Arc<dyn Abort> {
        (**self).abort_handle()
    }
}

/// `list` emptied and ready to take one entry a member, keeping its allocations.
fn reset(list: &mut Vec<Vec<u8>>, size: usize) {
    list.resize_with(size, Vec::new);
    list.iter_mut().for_each(Vec::clear);
}
