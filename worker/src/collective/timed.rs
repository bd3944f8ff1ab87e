//! What a rank computes before it enters a collective. Inside one all members wait for the last, so that a step takes equally
//! long on all of them; the time before tells who it is that the others wait for.

use super::hello::Kind;
use super::{Abort, Collective};
use model::fault::Fault;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What a rank does.
const RESTS: u8 = 0;
const COMPUTES: u8 = 1;
const WAITS: u8 = 2;

/// One rank's time, over all its communicators. Written by the rank's thread, read by beats.
#[derive(Debug)]
pub struct Stopwatch {
    origin: Instant,
    /// When the rank began to compute, in nanoseconds since `origin`.
    since: AtomicU64,
    entered: AtomicU64,
    computing_ns: AtomicU64,
    doing: AtomicU8,
    /// Whether the device's queue is within a collective of each kind.
    within: [AtomicBool; 3],
    /// Collectives entered, counted or not.
    waits: AtomicU64,
}

impl Default for Stopwatch {
    fn default() -> Stopwatch {
        let zero = AtomicU64::default;
        Stopwatch {
            origin: Instant::now(),
            since: zero(),
            entered: zero(),
            computing_ns: zero(),
            doing: AtomicU8::new(RESTS),
            within: Default::default(),
            waits: zero(),
        }
    }
}

impl Stopwatch {
    fn now(&self) -> u64 {
        self.origin.elapsed().as_nanos() as u64
    }

    /// The rank computes from now on: a step begins, or a collective has ended.
    pub fn begin(&self) {
        self.since.store(self.now(), Ordering::Relaxed);
        self.doing.store(COMPUTES, Ordering::Relaxed);
    }

    /// The rank has no step from now on.
    pub fn rest(&self) {
        self.doing.store(RESTS, Ordering::Relaxed);
    }

    fn wait(&self) {
        self.waits.fetch_add(1, Ordering::Relaxed);
        self.doing.store(WAITS, Ordering::Relaxed);
    }

    /// Whether the rank is at work on a step by itself, and not within a collective.
    pub fn computes(&self) -> bool {
        self.doing.load(Ordering::Relaxed) == COMPUTES && !self.queue_waits()
    }

    fn queue_waits(&self) -> bool {
        self.within.iter().any(|within| within.load(Ordering::Relaxed))
    }

    /// How often it has entered a collective, while it is in one.
    pub fn waits(&self) -> Option<u64> {
        let waits = match self.doing.load(Ordering::Relaxed) {
            RESTS => false,
            doing => doing == WAITS || self.queue_waits(),
        };
        waits.then(|| self.waits.load(Ordering::Relaxed))
    }

    fn entered(&self) {
        let computing = self.now().saturating_sub(self.since.load(Ordering::Relaxed));
        self.computing_ns.fetch_add(computing, Ordering::Relaxed);
        self.entered.fetch_add(1, Ordering::Relaxed);
    }

    /// What a look at a device's queue shows: whether it is within a collective, how many it has entered since the look before,
    /// and how long ago that was. Takes the place of [`Timed`] where the queue enters collectives while the rank's thread is
    /// ahead of it; looks that are many and even add up to the same times. Those of the tensor group count, as
    /// [`Timed::counting`], the others are passed.
    pub fn look(&self, kind: Kind, within: bool, entered: u64, since: Duration) {
        let rests = self.doing.load(Ordering::Relaxed) == RESTS;
        self.within[kind as usize].store(within && !rests, Ordering::Relaxed);
        if rests {
            return;
        }
        self.waits.fetch_add(entered, Ordering::Relaxed);
        if kind == Kind::Tensor {
            self.entered.fetch_add(entered, Ordering::Relaxed);
            if self.computes() {
                self.computing_ns.fetch_add(since.as_nanos() as u64, Ordering::Relaxed);
            }
        }
    }

    /// Counted collectives entered, and nanoseconds computed before them.
    pub fn read(&self) -> (u64, u64) {
        (self.entered.load(Ordering::Relaxed), self.computing_ns.load(Ordering::Relaxed))
    }
}

/// A communicator under a rank's stopwatch.
pub struct Timed<C> {
    inner: C,
    watch: Arc<Stopwatch>,
    counts: bool,
}

impl<C: Collective> Timed<C> {
    /// One whose members hold equal parts: the time before its collectives can be compared.
    pub fn counting(inner: C, watch: Arc<Stopwatch>) -> Timed<C> {
        Timed { inner, watch, counts: true }
    }

    /// One that is waited in, but before which members may rightly compute for different times.
    pub fn passing(inner: C, watch: Arc<Stopwatch>) -> Timed<C> {
        Timed { inner, watch, counts: false }
    }

    fn within<T>(&mut self, call: impl FnOnce(&mut C) -> Result<T, Fault>) -> Result<T, Fault> {
        if self.counts {
            self.watch.entered();
        }
        self.watch.wait();
        let result = call(&mut self.inner);
        self.watch.begin();
        result
    }
}

impl<C: Collective> Collective for Timed<C> {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn sum(&mut self, values: &mut [f32]) -> Result<(), Fault> {
        self.within(|inner| inner.sum(values))
    }

    fn gather(&mut self, mine: &[u8], all: &mut Vec<Vec<u8>>) -> Result<(), Fault> {
        self.within(|inner| inner.gather(mine, all))
    }

    fn exchange(&mut self, parts: &[Vec<u8>], received: &mut Vec<Vec<u8>>) -> Result<(), Fault> {
        self.within(|inner| inner.exchange(parts, received))
    }

    fn send(&mut self, to: usize, bytes: &[u8]) -> Result<(), Fault> {
        self.within(|inner| inner.send(to, bytes))
    }

    fn receive(&mut self, from: usize, bytes: &mut Vec<u8>) -> Result<(), Fault> {
        self.within(|inner| inner.receive(from, bytes))
    }

    fn abort_handle(&self) -> Arc<dyn Abort> {
        self.inner.abort_handle()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::local;
    use crate::collective::suite::{Members, contract};

    fn members(size: usize) -> Members {
        let timed = |member| Box::new(Timed::counting(member, Arc::default())) as Box<dyn Collective>;
        local::members(size).unwrap().into_iter().map(timed).collect()
    }

    contract!(members);

    #[test]
    fn looks_at_a_queue_add_up_while_the_rank_is_at_work() {
        let (watch, look) = (Stopwatch::default(), Duration::from_millis(1));
        watch.look(Kind::Tensor, false, 3, look);
        assert_eq!(watch.read(), (0, 0), "it rests");
        watch.begin();
        for turn in 0..10 {
            watch.look(Kind::Tensor, turn % 5 == 4, u64::from(turn % 5 == 4), look);
        }
        assert_eq!((watch.read(), watch.waits()), ((2, 8_000_000), Some(2)));
        watch.look(Kind::Pipe, true, 1, look);
        watch.look(Kind::Tensor, false, 0, look);
        assert_eq!(
            (watch.read(), watch.waits()),
            ((2, 8_000_000), Some(3)),
            "what is passed is waited in, and does not count"
        );
        assert!(!watch.computes());
        watch.rest();
        watch.look(Kind::Lane, true, 1, look);
        assert_eq!((watch.computes(), watch.waits()), (false, None));
    }

    #[test]
    fn who_computes_longer_is_told_apart_though_all_wait_equally_long() {
        let watches = [Arc::new(Stopwatch::default()), Arc::new(Stopwatch::default())];
        std::thread::scope(|scope| {
            for (rank, member) in local::members(2).unwrap().into_iter().enumerate() {
                let watch = watches[rank].clone();
                scope.spawn(move || {
                    let mut member = Timed::counting(member, watch.clone());
                    watch.begin();
                    for _ in 0..10 {
                        if rank == 1 {
                            std::thread::sleep(Duration::from_millis(5));
                        }
                        member.sum(&mut [1.0; 8]).unwrap();
                    }
                });
            }
        });
        assert!(watches.iter().all(|watch| watch.computes() && watch.waits().is_none()), "none is within one");
        let [(entered, fast), (_, slow)] = [watches[0].read(), watches[1].read()];
        assert_eq!(entered, 10);
        assert!(slow >= 50_000_000 && fast * 2 < slow, "{fast} ns against {slow} ns");
    }
}
