//! A communicator in shared memory: the same algorithm for threads and for processes of one host.
//!
//! ```text
//! header    state: live, aborted or lost | mark
//! seats     for each rank: rounds published | asleep, left
//! controls  for each ordered pair: the counters of its ring
//! slots     for each rank two, used in turn
//! rings     for each ordered pair, for send and receive
//! ```
//!
//! Sums, gathers and exchanges go in rounds. In round `k` each rank writes its slot `k % 2`, publishes `k + 1`, and
//! waits until all others have published it. Whoever publishes round `k + 1` has read everything of round `k`, so a
//! slot is free again when all have published the round after it: two slots a rank suffice and nothing is acknowledged.

use super::inbox::{Channel, HEADER, Inbox, header};
use super::region::Region;
use super::ring::{CONTROL, Ring};
use super::wait::{sleep, wake};
use super::{Abort, Collective, reset, tree};
use model::fault::{Fault, FaultKind};
use std::any::Any;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicU32, AtomicU64, fence};
use std::time::Duration;

/// Bytes of a slot: what a rank can say in one round. Two slots of two ranks stay within a second-level cache.
const SLOT: usize = 128 << 10;

/// More ranks than two add small arrays whole, each for itself; from this many bytes on each adds its share and the
/// shares are gathered: one round more, but each number crosses between cores twice instead of `size - 1` times.
const SHARE_FROM: usize = 16 << 10;

/// A sleeper looks again after this long even if nobody woke it.
const SLEEP_MAX: Duration = Duration::from_millis(500);

const PAGE: usize = 4096;
/// A header, then one seat a rank; counters of different writers are two cache lines apart, because lines are
/// prefetched in pairs.
const LINES: usize = 128;
const SEAT: usize = 2 * LINES;

const LIVE: u32 = 0;
const ABORTED: u32 = 1;
/// State of a communicator that lost rank `r`: `LOST + r`.
const LOST: u32 = 2;

/// The memory of one communicator and where everything lies in it.
pub struct Seats {
    region: Region,
    size: usize,
    ring_bytes: usize,
    slots: usize,
    rings: usize,
}

impl Seats {
    /// Memory for the threads of this process.
    pub fn anonymous(size: usize) -> Result<Seats, Fault> {
        let bytes = Seats::bytes(size);
        Region::anonymous(bytes).map(|region| Seats::over(region, size)).map_err(|error| unmapped(bytes, size, &error))
    }

    /// Memory that other processes map too; the file has at least [`Seats::bytes`] bytes, zero before the first use.
    pub fn of_file(file: &File, size: usize) -> Result<Seats, Fault> {
        let bytes = Seats::bytes(size);
        Region::of_file(file, bytes)
            .map(|region| Seats::over(region, size))
            .map_err(|error| unmapped(bytes, size, &error))
    }

    /// Bytes that a communicator of `size` ranks takes; pages never used take none.
    pub fn bytes(size: usize) -> usize {
        let (_, rings, ring_bytes) = Seats::places(size);
        rings + size * size * ring_bytes
    }

    /// Offsets of slots and rings, and bytes of a ring: a function of the size alone, so that all processes agree.
    fn places(size: usize) -> (usize, usize, usize) {
        assert!((1..=1024).contains(&size), "{size} ranks on one host");
        let ring_bytes = if size <= 8 { 256 << 10 } else { 32 << 10 };
        let slots = (LINES + size * SEAT + size * size * CONTROL).next_multiple_of(PAGE);
        (slots, slots + size * 2 * SLOT, ring_bytes)
    }

    fn over(region: Region, size: usize) -> Seats {
        let (slots, rings, ring_bytes) = Seats::places(size);
        Seats { region, size, ring_bytes, slots, rings }
    }

    fn state(&self) -> &AtomicU32 {
        self.region.word(0)
    }

    /// A number by which a process recognises the memory it was told of.
    pub fn mark(&self) -> u64 {
        self.region.long(8).load(Acquire)
    }

    pub fn set_mark(&self, mark: u64) {
        self.region.long(8).store(mark, Release);
    }

    /// Rounds that `rank` has published.
    fn published(&self, rank: usize) -> &AtomicU64 {
        self.region.long(LINES + rank * SEAT)
    }

    /// Not 0 while `rank` sleeps, or is about to.
    fn asleep(&self, rank: usize) -> &AtomicU32 {
        self.region.word(LINES + rank * SEAT + LINES)
    }

    /// Not 0 once `rank` was dropped in peace.
    fn left(&self, rank: usize) -> &AtomicU32 {
        self.region.word(LINES + rank * SEAT + LINES + 4)
    }

    fn ring(&self, from: usize, to: usize) -> Ring<'_> {
        let pair = from * self.size + to;
        Ring {
            region: &self.region,
            control: LINES + self.size * SEAT + pair * CONTROL,
            data: self.rings + pair * self.ring_bytes,
            capacity: self.ring_bytes,
        }
    }

    fn slot(&self, rank: usize, round: u64) -> usize {
        self.slots + (rank * 2 + (round % 2) as usize) * SLOT
    }

    /// Bytes `range` of what `rank` wrote in `round`. Only called between the wait for that round and the publication
    /// of the next one.
    fn read(&self, rank: usize, round: u64, range: Range<usize>) -> &[u8] {
        assert!(range.end <= SLOT);
        debug_assert!(self.published(rank).load(Relaxed) > round);
        let slot = self.slot(rank, round);
        // SAFETY: `rank` has published this round (acquired by the waiting), and reuses the slot two rounds on, which
        // it cannot begin before this rank publishes the next one.
        unsafe { self.region.read(slot + range.start..slot + range.end) }
    }

    /// Writes into the slot of `rank`, the caller, for `round`, which it has not published yet.
    fn write(&self, rank: usize, round: u64, at: usize, bytes: &[u8]) {
        assert!(at <= SLOT && bytes.len() <= SLOT - at);
        debug_assert_eq!(self.published(rank).load(Relaxed), round);
        // SAFETY: this slot was last used two rounds ago; all ranks have published the round between, so all have read it.
        unsafe { self.region.write(self.slot(rank, round) + at, bytes) };
    }

    /// Wakes `rank` if it sleeps; whatever it is to see was stored before.
    fn ring_bell(&self, rank: usize) {
        fence(SeqCst);
        self.ring_bell_fenced(rank);
    }

    fn ring_bells(&self) {
        fence(SeqCst);
        (0..self.size).for_each(|rank| self.ring_bell_fenced(rank));
    }

    fn ring_bell_fenced(&self, rank: usize) {
        let asleep = self.asleep(rank);
        if asleep.load(Relaxed) != 0 && asleep.swap(0, AcqRel) != 0 {
            wake(asleep);
        }
    }

    /// Ends the communicator because `rank` is gone. One that ended before keeps its first reason.
    pub fn lose(&self, rank: usize) {
        self.end(LOST + rank as u32);
    }

    /// Whether `rank` was dropped in peace, so that the end of its process is no loss.
    pub fn has_left(&self, rank: usize) -> bool {
        self.left(rank).load(Acquire) != 0
    }

    fn end(&self, state: u32) {
        let _ = self.state().compare_exchange(LIVE, state, AcqRel, Acquire);
        self.ring_bells();
    }

    /// Why the communicator has ended, if it has.
    fn ended(&self, rank: usize) -> Option<Fault> {
        let me = format!("rank {rank} of {}", self.size);
        match self.state().load(Acquire) {
            LIVE => None,
            ABORTED => Some(Fault::new(FaultKind::Aborted, format!("{me}: its communicator was aborted"))),
            lost => Some(Fault::new(FaultKind::RankLost, format!("{me}: rank {} is lost", lost - LOST))),
        }
    }
}

impl Abort for Seats {
    fn abort(&self) {
        self.end(ABORTED);
    }
}

fn unmapped(bytes: usize, size: usize, error: &std::io::Error) -> Fault {
    let text = format!("mapping {bytes} bytes for a communicator of {size} ranks: {error}");
    Fault::new(FaultKind::OutOfMemory, text)
}

/// A member whose communicator is memory shared with the others.
pub struct Shared {
    seats: Arc<Seats>,
    rank: usize,
    /// Idle turns before sleeping.
    spin: u32,
    /// Rounds published so far.
    round: u64,
    inboxes: Vec<Inbox>,
    failed: bool,
    /// What has to live as long as the members of this process: the watch over the other processes.
    _keep: Option<Arc<dyn Any + Send + Sync>>,
}

impl Shared {
    /// The member at seat `rank`; each seat is taken once.
    pub fn new(seats: Arc<Seats>, rank: usize, spin: u32) -> Shared {
        assert!(rank < seats.size, "rank {rank} of {}", seats.size);
        let inboxes = (0..seats.size).map(|_| Inbox::default()).collect();
        Shared { seats, rank, spin, round: 0, inboxes, failed: false, _keep: None }
    }

    /// Keeps `what` until the member is dropped.
    pub fn keeping(mut self, what: Arc<dyn Any + Send + Sync>) -> Shared {
        self._keep = Some(what);
        self
    }

    fn peers(&self) -> impl Iterator<Item = usize> + use<> {
        let rank = self.rank;
        (0..self.seats.size).filter(move |peer| *peer != rank)
    }

    /// Runs one operation; a fault in it ends the communicator for everyone.
    fn enter(&mut self, operation: impl FnOnce(&mut Shared) -> Result<(), Fault>) -> Result<(), Fault> {
        if let Some(fault) = self.seats.ended(self.rank) {
            self.failed = true;
            return Err(fault);
        }
        let result = operation(self);
        if result.is_err() {
            self.failed = true;
            self.seats.lose(self.rank);
        }
        result
    }

    /// Returns once `ready`, which depends on rank `on`; a fault if that cannot come any more.
    fn wait(&mut self, on: usize, ready: impl Fn(&Shared) -> bool) -> Result<(), Fault> {
        for _ in 0..self.spin {
            if ready(self) {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        let seats = self.seats.clone();
        let asleep = seats.asleep(self.rank);
        loop {
            asleep.store(1, SeqCst);
            // Pairs with the fence of `ring_bell`: either its ringer sees this rank asleep, or this rank sees its news.
            fence(SeqCst);
            let ended = self.gone(on);
            // Asked after `gone`: a rank that left, or failed, may have said before what is waited for.
            if ready(self) {
                asleep.store(0, Relaxed);
                return Ok(());
            }
            if let Some(fault) = ended {
                asleep.store(0, Relaxed);
                // Whoever waits for this rank in turn hears the true reason.
                seats.lose(on);
                return Err(fault);
            }
            if !self.drain()? {
                sleep(asleep, 1, SLEEP_MAX);
            }
            asleep.store(0, Relaxed);
        }
    }

    fn gone(&self, on: usize) -> Option<Fault> {
        if self.seats.has_left(on) {
            let text = format!("rank {} of {}: rank {on} has left", self.rank, self.seats.size);
            return Some(Fault::new(FaultKind::RankLost, text));
        }
        self.seats.ended(self.rank)
    }

    /// Takes in what others are sending, so that a sender never waits for a rank that itself waits. Says whether
    /// anything came.
    fn drain(&mut self) -> Result<bool, Fault> {
        let mut came = false;
        for from in self.peers() {
            let ring = self.seats.ring(from, self.rank);
            if !ring.is_empty() {
                came |= ring.pull(&mut self.inboxes[from])? > 0;
                self.seats.ring_bell(from);
            }
        }
        Ok(came)
    }

    /// Ends a round's writing and waits for everyone's; afterwards the slots of round `self.round - 1` can be read.
    fn publish(&mut self) -> Result<(), Fault> {
        self.round += 1;
        let round = self.round;
        self.seats.published(self.rank).store(round, Release);
        self.seats.ring_bells();
        for peer in self.peers() {
            self.wait(peer, |me| me.seats.published(peer).load(Acquire) >= round)?;
        }
        Ok(())
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        self.seats.write(self.rank, self.round, at, bytes);
    }

    /// What `rank` said in the round just published by all.
    fn heard(&self, rank: usize, range: Range<usize>) -> &[u8] {
        self.seats.read(rank, self.round - 1, range)
    }

    /// Elements `range` of everyone's slot, added into `out`.
    fn add(&self, range: Range<usize>, out: &mut [f32]) {
        const STACK: usize = 16;
        let bytes = range.start * 4..range.end * 4;
        let source = |rank| bytemuck::cast_slice::<u8, f32>(self.heard(rank, bytes.clone()));
        if self.seats.size <= STACK {
            let mut sources: [&[f32]; STACK] = [&[]; STACK];
            (0..self.seats.size).for_each(|rank| sources[rank] = source(rank));
            tree::add(&sources[..self.seats.size], out);
        } else {
            tree::add(&(0..self.seats.size).map(source).collect::<Vec<_>>(), out);
        }
    }

    /// Sums at most a slot of numbers.
    fn sum_chunk(&mut self, chunk: &mut [f32]) -> Result<(), Fault> {
        let size = self.seats.size;
        self.write(0, bytemuck::cast_slice(chunk));
        self.publish()?;
        if size == 2 || chunk.len() * 4 < SHARE_FROM {
            self.add(0..chunk.len(), chunk);
            return Ok(());
        }
        // Shares end on cache lines, so that no line has two writers or readers more than it must.
        let share = chunk.len().div_ceil(size).next_multiple_of(16);
        let share_of = |rank: usize| (rank * share).min(chunk.len())..((rank + 1) * share).min(chunk.len());
        let shares: Vec<Range<usize>> = (0..size).map(share_of).collect();
        let mine = shares[self.rank].clone();
        self.add(mine.clone(), &mut chunk[mine.clone()]);
        self.write(mine.start * 4, bytemuck::cast_slice(&chunk[mine]));
        self.publish()?;
        for peer in self.peers() {
            let range = shares[peer].clone();
            let bytes = self.heard(peer, range.start * 4..range.end * 4);
            chunk[range].copy_from_slice(bytemuck::cast_slice(bytes));
        }
        Ok(())
    }

    /// Each rank's stream is `lengths` as 8 bytes each, then `pieces` one after another. It travels a slot a round,
    /// as many rounds as the longest takes. `wanted(rank, lengths of rank)` is the part of its pieces, joined, that
    /// this rank appends to `into[rank]`.
    fn stream(
        &mut self,
        lengths: &[u64],
        pieces: &[&[u8]],
        wanted: impl Fn(usize, &[u64]) -> Range<usize>,
        into: &mut [Vec<u8>],
    ) -> Result<(), Fault> {
        let head = lengths.len() * 8;
        let mut wants: Vec<Range<usize>> = Vec::new();
        let mut rounds = 1;
        let mut round = 0;
        while round < rounds {
            let window = round * SLOT..(round + 1) * SLOT;
            if round == 0 {
                self.write(0, bytemuck::cast_slice(lengths));
            }
            let mut start = head;
            for piece in pieces {
                let range = start..start + piece.len();
                let part = overlap(&range, &window);
                if !part.is_empty() {
                    self.write(part.start - window.start, &piece[part.start - start..part.end - start]);
                }
                start = range.end;
            }
            self.publish()?;
            if round == 0 {
                for rank in 0..self.seats.size {
                    let theirs: Vec<u64> = bytemuck::pod_collect_to_vec(self.heard(rank, 0..head));
                    let total = head + theirs.iter().sum::<u64>() as usize;
                    rounds = rounds.max(total.div_ceil(SLOT));
                    let want = wanted(rank, &theirs);
                    into[rank].reserve(want.len());
                    wants.push(head + want.start..head + want.end);
                }
            }
            for peer in self.peers() {
                let part = overlap(&wants[peer], &window);
                if !part.is_empty() {
                    let bytes = self.heard(peer, part.start - window.start..part.end - window.start);
                    into[peer].extend_from_slice(bytes);
                }
            }
            round += 1;
        }
        Ok(())
    }

    fn push(&mut self, to: usize, mut bytes: &[u8]) -> Result<(), Fault> {
        while !bytes.is_empty() {
            let pushed = self.seats.ring(self.rank, to).push(bytes);
            bytes = &bytes[pushed..];
            self.seats.ring_bell(to);
            if !bytes.is_empty() {
                self.wait(to, |me| !me.seats.ring(me.rank, to).is_full())?;
            }
        }
        Ok(())
    }

    fn pull(&mut self, from: usize, bytes: &mut Vec<u8>) -> Result<(), Fault> {
        self.inboxes[from].lend(std::mem::take(bytes));
        loop {
            if let Some(message) = self.inboxes[from].take(Channel::Message) {
                *bytes = message;
                return Ok(());
            }
            let pulled = self.seats.ring(from, self.rank).pull(&mut self.inboxes[from])?;
            if pulled > 0 {
                self.seats.ring_bell(from);
            } else {
                // Draining while it waits may move the message from the ring to the inbox: both are news.
                self.wait(from, |me| {
                    me.inboxes[from].has(Channel::Message) || !me.seats.ring(from, me.rank).is_empty()
                })?;
            }
        }
    }
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}

impl Collective for Shared {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.seats.size
    }

    fn sum(&mut self, values: &mut [f32]) -> Result<(), Fault> {
        assert!(self.seats.size.is_power_of_two(), "a sum over {} ranks has no balanced tree", self.seats.size);
        self.enter(|me| values.chunks_mut(SLOT / 4).try_for_each(|chunk| me.sum_chunk(chunk)))
    }

    fn gather(&mut self, mine: &[u8], all: &mut Vec<Vec<u8>>) -> Result<(), Fault> {
        reset(all, self.seats.size);
        all[self.rank].extend_from_slice(mine);
        self.enter(|me| me.stream(&[mine.len() as u64], &[mine], |_, lengths| 0..lengths[0] as usize, all))
    }

    fn exchange(&mut self, parts: &[Vec<u8>], received: &mut Vec<Vec<u8>>) -> Result<(), Fault> {
        let (size, rank) = (self.seats.size, self.rank);
        assert_eq!(parts.len(), size, "one part a member");
        reset(received, size);
        received[rank].extend_from_slice(&parts[rank]);
        let pieces: Vec<&[u8]> = (0..size).map(|to| if to == rank { &[][..] } else { &parts[to] }).collect();
        let lengths: Vec<u64> = pieces.iter().map(|piece| piece.len() as u64).collect();
        let wanted = |_, lengths: &[u64]| {
            let start = lengths[..rank].iter().sum::<u64>() as usize;
            start..start + lengths[rank] as usize
        };
        self.enter(|me| me.stream(&lengths, &pieces, wanted, received))
    }

    fn send(&mut self, to: usize, bytes: &[u8]) -> Result<(), Fault> {
        assert!(to < self.seats.size && to != self.rank, "rank {} sends to {to}", self.rank);
        self.enter(|me| {
            // Small messages go as one write, so that the receiver wakes once.
            let mut small = [0; 512];
            let head = header(Channel::Message, bytes.len());
            if HEADER + bytes.len() <= small.len() {
                small[..HEADER].copy_from_slice(&head);
                small[HEADER..HEADER + bytes.len()].copy_from_slice(bytes);
                return me.push(to, &small[..HEADER + bytes.len()]);
            }
            me.push(to, &head)?;
            me.push(to, bytes)
        })
    }

    fn receive(&mut self, from: usize, bytes: &mut Vec<u8>) -> Result<(), Fault> {
        assert!(from < self.seats.size && from != self.rank, "rank {} receives from {from}", self.rank);
        self.enter(|me| me.pull(from, bytes))
    }

    fn abort_handle(&self) -> Arc<dyn Abort> {
        self.seats.clone()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.failed || std::thread::panicking() {
            self.seats.lose(self.rank);
        } else {
            self.seats.left(self.rank).store(1, Release);
            self.seats.ring_bells();
        }
    }
}
