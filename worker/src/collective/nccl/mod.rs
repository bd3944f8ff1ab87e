//! NCCL: one rank a device, on the device's own queue. *Fast* level: the library sums in an order of its own; where bits are
//! promised, ranks on devices use [`Staged`](super::staged::Staged).
//!
//! ```text
//! connect   all ranks say who they are over a host's collective; an id is made; the library connects, with a deadline
//! calls     mark 2n | the library's kernel | mark 2n + 1     on the queue, so also in a graph that replays them
//! watch     1,000 looks a second: errors, neighbours, marks that stand still
//! the end   the first fault is everyone's: kept, written on the board, the queue freed by ncclCommAbort
//! ```
//! Ranks of a host name each other (`board`); a rank of another host that stands still is named by the coordinator, which
//! compares the stopwatches that beats carry.

mod board;
mod comm;
mod library;
mod meet;
mod queue;
mod watch;

pub use library::{Library, Version};
pub use queue::{CudaQueue, DeviceMemory};

use super::device::{Address, DeviceCollective, Queue};
use super::hello::Kind;
use super::timed::Stopwatch;
use super::{Abort, Collective};
use board::{Seat, State};
use comm::{Comm, Patience};
use library::{BYTES, FLOAT32, Functions, Handle, SUM, Stream};
pub use meet::obstacle;
use meet::{Guard, meet};
use model::fault::{Fault, FaultKind};
use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::ptr::{with_exposed_provenance, with_exposed_provenance_mut};
use std::sync::Arc;
use std::time::{Duration, Instant};
use watch::{Link, Watch};

/// How to connect and how long to wait.
#[derive(Debug, Clone)]
pub struct Options {
    /// For all ranks to have connected, and to have shrunk.
    pub deadline: Duration,
    /// A collective that is not over so long after this rank's queue came to it has failed.
    pub stall: Duration,
    /// After a fault the members may shrink the communicator for so long; the queue is freed then, or at once where it is zero.
    pub linger: Duration,
    /// Told what the queue is at.
    pub stopwatch: Arc<Stopwatch>,
    /// Which of the rank's groups this is: a process's groups connect one after the other, in one order.
    pub kind: Kind,
}

impl Default for Options {
    fn default() -> Options {
        let (deadline, stall) = (Duration::from_secs(60), Duration::from_secs(10));
        Options { deadline, stall, linger: Duration::ZERO, stopwatch: Arc::default(), kind: Kind::Tensor }
    }
}

/// What was sent before a member was dropped is delivered within this time.
const CLOSE_MAX: Duration = Duration::from_secs(2);

/// A rank's membership. Whoever drops it has settled, or leaves what is on the queue to its fate.
pub struct Nccl<Q> {
    /// Dropped first: it frees the queue, which is waited for when it is dropped.
    member: Member,
    queue: Q,
}

/// What is not the queue.
struct Member {
    link: Arc<Link>,
    /// Ends before the communicator is closed.
    watch: Option<Watch>,
    calls: u32,
    options: Options,
}

impl<Q: Queue + 'static> Nccl<Q> {
    /// Connects the ranks of `host`, which all call it at about the same time, each with its own device's queue.
    pub fn connect(
        library: &Arc<Library>,
        host: &mut dyn Collective,
        queue: Q,
        options: &Options,
    ) -> Result<Nccl<Q>, Fault> {
        let deadline = Instant::now() + options.deadline;
        queue.enter()?;
        let (id, seat) = {
            let _guard = Guard::until(deadline, host.abort_handle())?;
            meet(library, host, queue.device()?)?
        };
        seat.set_state(State::Joins);
        let comm = Comm::join(library, id, seat.rank, seat.lines.len())?;
        let member = Member::of(Link::new(comm, seat, queue.word(), options), 0, options)?;
        member.until(deadline, "connecting", |link| link.comm.is_ready())?;
        member.link.seat.set_state(State::Ready);
        member.until(deadline, "connecting", |link| {
            let waits = |(_, line)| matches!(link.seat.state(line), State::Absent | State::Joins);
            Ok(!link.seat.neighbours().any(waits))
        })?;
        Ok(Nccl { queue, member })
    }

    /// Puts one call on the queue, which waits for `peer`, or for everyone.
    fn put(
        &mut self,
        what: &str,
        peer: Option<usize>,
        body: impl FnOnce(&Functions, Handle, Stream) -> c_int,
    ) -> Result<(), Fault> {
        let (queue, member) = (&mut self.queue, &mut self.member);
        member.check()?;
        member.calls = member.calls.wrapping_add(1) & (u32::MAX >> 1);
        let mark = 2 * member.calls;
        let link = member.link.clone();
        link.begins(peer);
        link.tell();
        let put = || {
            queue.enter()?;
            queue.mark(mark)?;
            let stream = queue.raw();
            link.comm.call(what, |functions, handle| body(functions, handle, stream))?;
            // A kernel that the library launches from a thread of its own is on the queue only now.
            let began = Instant::now();
            let mut patience = Patience::default();
            while !link.comm.is_ready()? {
                if began.elapsed() > link.stall {
                    return Err(link.late(
                        &format!("putting call {} ({what}) on the queue", mark / 2),
                        began.elapsed(),
                        mark,
                    ));
                }
                patience.wait();
            }
            queue.mark(mark + 1)?;
            link.issued(mark + 1);
            Ok(())
        };
        put().map_err(|fault: Fault| member.fail(fault))
    }

    fn peer(&self, peer: usize) -> c_int {
        assert!(peer < self.size() && peer != self.rank(), "rank {} of {} and {peer}", self.rank(), self.size());
        peer as c_int
    }
}

impl Member {
    fn of(link: Link, calls: u32, options: &Options) -> Result<Member, Fault> {
        let link = Arc::new(link);
        let watch = Some(Watch::start(&link)?);
        Ok(Member { link, watch, calls, options: options.clone() })
    }

    fn until(
        &self,
        deadline: Instant,
        what: &str,
        mut done: impl FnMut(&Link) -> Result<bool, Fault>,
    ) -> Result<(), Fault> {
        let mut patience = Patience::default();
        loop {
            self.check()?;
            match done(&self.link) {
                Ok(true) => return Ok(()),
                Ok(false) if Instant::now() < deadline => patience.wait(),
                Ok(false) => return Err(self.fail(self.link.late(what, self.options.deadline, 1))),
                Err(fault) => return Err(self.fail(fault)),
            }
        }
    }

    fn check(&self) -> Result<(), Fault> {
        self.link.comm.fault().map_or(Ok(()), |fault| Err(self.fail(fault)))
    }

    /// The first fault, once the queue is free.
    fn fail(&self, fault: Fault) -> Fault {
        let first = self.link.end(fault);
        if self.options.linger.is_zero() {
            self.link.comm.wait_over();
        }
        first
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let (link, panics) = (&self.link, std::thread::panicking());
        if panics {
            let text = format!("{}: this rank panicked", link.comm.who());
            link.end(Fault::new(FaultKind::RankLost, text));
        }
        self.watch = None;
        if link.comm.fault().is_none() {
            link.comm.close(CLOSE_MAX);
            link.seat.set_state(State::Left);
        } else {
            // It may have been kept for a shrink that nobody wants any more.
            link.comm.abort();
            link.comm.wait_over();
        }
    }
}

impl<Q: Queue + 'static> DeviceCollective for Nccl<Q> {
    fn rank(&self) -> usize {
        self.member.link.comm.rank
    }

    fn size(&self) -> usize {
        self.member.link.comm.size
    }

    fn queue(&mut self) -> &mut dyn Queue {
        &mut self.queue
    }

    fn sum(&mut self, at: Address, count: usize) -> Result<(), Fault> {
        // SAFETY: the caller vouches for the device's memory, and the lock is held.
        self.put("ncclAllReduce", None, |f, handle, stream| unsafe {
            (f.all_reduce)(read(at), write(at), count, FLOAT32, SUM, handle, stream)
        })
    }

    fn gather(&mut self, mine: Address, bytes: usize, all: Address) -> Result<(), Fault> {
        // SAFETY: as for a sum.
        self.put("ncclAllGather", None, |f, handle, stream| unsafe {
            (f.all_gather)(read(mine), write(all), bytes, BYTES, handle, stream)
        })
    }

    fn exchange(
        &mut self,
        from: Address,
        sent: &[Range<usize>],
        to: Address,
        received: &[Range<usize>],
    ) -> Result<(), Fault> {
        assert!(sent.len() == self.size() && received.len() == self.size(), "one range a member");
        let at = |base: Address, range: &Range<usize>| base + range.start as Address;
        // SAFETY: as for a sum. A group that was started is always ended; the first failure is what is returned.
        self.put("ncclGroupEnd", None, |f, handle, stream| unsafe {
            let mut code = (f.group_start)();
            if code != 0 {
                return code;
            }
            for (peer, (out, into)) in sent.iter().zip(received).enumerate() {
                if code == 0 && !out.is_empty() {
                    code = (f.send)(read(at(from, out)), out.len(), BYTES, peer as c_int, handle, stream);
                }
                if code == 0 && !into.is_empty() {
                    code = (f.receive)(write(at(to, into)), into.len(), BYTES, peer as c_int, handle, stream);
                }
            }
            let ended = (f.group_end)();
            if code == 0 { ended } else { code }
        })
    }

    fn send(&mut self, to: usize, at: Address, bytes: usize) -> Result<(), Fault> {
        let peer = self.peer(to);
        // SAFETY: as for a sum.
        self.put("ncclSend", Some(to), |f, handle, stream| unsafe {
            (f.send)(read(at), bytes, BYTES, peer, handle, stream)
        })
    }

    fn receive(&mut self, from: usize, at: Address, bytes: usize) -> Result<(), Fault> {
        let peer = self.peer(from);
        // SAFETY: as for a sum.
        self.put("ncclRecv", Some(from), |f, handle, stream| unsafe {
            (f.receive)(write(at), bytes, BYTES, peer, handle, stream)
        })
    }

    fn settle(&mut self) -> Result<(), Fault> {
        let mut patience = Patience::default();
        self.queue.enter()?;
        loop {
            let done = self.queue.is_done();
            // What is done after an abort is done wrongly.
            self.member.check()?;
            match done {
                Ok(true) => {
                    self.member.link.tell();
                    return Ok(());
                }
                Ok(false) => patience.wait(),
                Err(fault) => return Err(self.member.fail(fault)),
            }
        }
    }

    fn shrink(self: Box<Self>, lost: &[usize]) -> Result<Box<dyn DeviceCollective>, Fault> {
        let Nccl { queue, mut member } = *self;
        let (link, options) = (member.link.clone(), member.options.clone());
        assert!(lost.iter().all(|rank| *rank < link.comm.size) && !lost.contains(&link.comm.rank), "{lost:?} are lost");
        queue.enter()?;
        // The watch would take the parent from under the library.
        member.watch = None;
        let comm = link.comm.shrink(lost, Instant::now() + options.deadline)?;
        link.comm.end(Fault::new(FaultKind::Aborted, format!("{}: it was shrunk", link.comm.who())));
        link.comm.abort();
        let kept = link.seat.lines.iter().enumerate().filter(|(rank, _)| !lost.contains(rank));
        let lines = kept.map(|(_, line)| *line).collect();
        let (board, generation) = (link.seat.board.clone(), link.seat.generation + 1);
        let seat = Seat { board, generation, lines, rank: comm.rank };
        seat.set_state(State::Ready);
        let shrunk = Member::of(Link::new(comm, seat, queue.word(), &options), member.calls, &options)?;
        Ok(Box::new(Nccl { queue, member: shrunk }))
    }

    fn abort_handle(&self) -> Arc<dyn Abort> {
        self.member.link.clone()
    }
}

impl Abort for Link {
    fn abort(&self) {
        self.end(Fault::new(FaultKind::Aborted, format!("{}: aborted", self.comm.who())));
    }
}

fn read(at: Address) -> *const c_void {
    with_exposed_provenance(at as usize)
}

fn write(at: Address) -> *mut c_void {
    with_exposed_provenance_mut(at as usize)
}
