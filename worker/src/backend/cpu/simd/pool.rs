//! The threads of one backend: `run` divides a job's tasks among the caller and the helpers.
//!
//! Each thread has a share of neighbouring tasks, so that what it reads lies in one stretch, and takes from the ends of the
//! others' shares when its own is done.
//!
//! A helper that comes late finds the job closed and touches nothing, so a caller waits only for helpers at work and
//! ranks may outnumber cores. Helpers spin a little between jobs, then sleep; an idle pool costs nothing.

use super::flush::Flush;
use super::shared::Shared;
use std::any::Any;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*, fence};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

type Task<'a> = &'a (dyn Fn(usize) + Sync + 'a);

/// One job at a time; `run` from two threads takes turns.
pub struct Pool {
    shared: Arc<Control>,
    helpers: Vec<JoinHandle<()>>,
    turn: Mutex<()>,
}

/// `state` is `generation << 32 | open << 31 | helpers at work`.
struct Control {
    state: AtomicU64,
    /// The caller's, then each helper's.
    shares: Box<[Share]>,
    job: UnsafeCell<Option<Task<'static>>>,
    sleeping: AtomicUsize,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    door: Mutex<()>,
    bell: Condvar,
    spin: u32,
}

/// Tasks that wait, `first << 32 | end`. A line of its own.
#[derive(Default)]
#[repr(align(128))]
struct Share(AtomicU64);

impl Share {
    fn fill(&self, tasks: Range<usize>) {
        self.0.store((tasks.start as u64) << 32 | tasks.end as u64, Relaxed);
    }

    fn first(&self) -> Option<usize> {
        let taken = self.0.fetch_update(Relaxed, Relaxed, |s| (s >> 32 < s & LOW).then(|| s + (1 << 32)));
        taken.ok().map(|s| (s >> 32) as usize)
    }

    fn last(&self) -> Option<usize> {
        let taken = self.0.fetch_update(Relaxed, Relaxed, |s| (s >> 32 < s & LOW).then(|| s - 1));
        taken.ok().map(|s| ((s & LOW) - 1) as usize)
    }
}

const LOW: u64 = u32::MAX as u64;
const OPEN: u64 = 1 << 31;
const WORKING: u64 = OPEN - 1;

// SAFETY: `job` is written only while no helper is at work and the state is closed, and read only by helpers that
// entered an open state.
unsafe impl Sync for Control {}
// SAFETY: as above; nothing in it belongs to a thread.
unsafe impl Send for Control {}

impl Pool {
    /// `threads` in all, the caller's own included; `spin` rounds of waiting before a helper sleeps.
    pub fn new(threads: usize, spin: u32) -> std::io::Result<Pool> {
        let shared = Arc::new(Control {
            state: AtomicU64::new(0),
            shares: (0..threads.max(1)).map(|_| Share::default()).collect(),
            job: UnsafeCell::new(None),
            sleeping: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
            door: Mutex::new(()),
            bell: Condvar::new(),
            spin,
        });
        let mut pool = Pool { shared, helpers: Vec::new(), turn: Mutex::new(()) };
        for index in 1..threads {
            let control = pool.shared.clone();
            let helper = std::thread::Builder::new().name(format!("kernel-{index}"));
            pool.helpers.push(helper.spawn(move || control.help(index))?);
        }
        Ok(pool)
    }

    pub fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Calls `task` with each of `0..tasks` once, on any thread and in any order, and returns when all are done.
    /// A task's panic is passed on. Subnormals are flushed throughout.
    pub fn run(&self, tasks: usize, task: Task<'_>) {
        assert!(tasks as u64 <= LOW, "{tasks} tasks");
        let _flush = Flush::on();
        if tasks <= 1 || self.helpers.is_empty() {
            (0..tasks).for_each(task);
            return;
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let open = self.shared.open(task, tasks);
        self.shared.work(task, 0);
        drop(open);
        let panic = self.shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// `run` over `0..n` in ranges of about `grain`.
    pub fn ranges(&self, n: usize, grain: usize, task: &(dyn Fn(std::ops::Range<usize>) + Sync)) {
        let grain = grain.max(1);
        self.run(n.div_ceil(grain), &|i| task(i * grain..n.min((i + 1) * grain)));
    }

    /// `task(row, its columns)` for the first `n` rows of `values`, `grain` rows at a time.
    pub fn rows<T: Send>(
        &self,
        values: &mut [T],
        cols: usize,
        n: usize,
        grain: usize,
        task: &(dyn Fn(usize, &mut [T]) + Sync),
    ) {
        let shared = Shared::new(values);
        self.ranges(n, grain, &|range| {
            for row in range {
                // SAFETY: each row belongs to one range.
                task(row, unsafe { shared.part(row * cols, cols) });
            }
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        drop(self.shared.door.lock().unwrap_or_else(PoisonError::into_inner));
        self.shared.bell.notify_all();
        for helper in self.helpers.drain(..) {
            // A helper catches its tasks' panics, so joining can't fail.
            let _ = helper.join();
        }
    }
}

/// An open job; dropping it, also by a panic of the caller's own task, closes it and waits for the helpers in it.
struct Open<'a>(&'a Control);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.state.fetch_and(!OPEN, AcqRel);
        let mut rounds = 0u32;
        while self.0.state.load(Acquire) & WORKING != 0 {
            rounds += 1;
            if rounds < self.0.spin { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
    }
}

impl Control {
    fn open<'a>(&'a self, task: Task<'_>, tasks: usize) -> Open<'a> {
        // SAFETY: the lifetime is erased, not extended: `Open`'s drop waits until no helper uses the task. The cell
        // is ours: the state is closed and nobody is at work since the last `Open` was dropped.
        unsafe { *self.job.get() = Some(std::mem::transmute::<Task<'_>, Task<'static>>(task)) };
        for (index, share) in self.shares.iter().enumerate() {
            share.fill(tasks * index / self.shares.len()..tasks * (index + 1) / self.shares.len());
        }
        let generation = (self.state.load(Relaxed) >> 32).wrapping_add(1) & 0xffff_ffff;
        self.state.store(generation << 32 | OPEN, SeqCst);
        fence(SeqCst);
        if self.sleeping.load(SeqCst) > 0 {
            drop(self.door.lock().unwrap_or_else(PoisonError::into_inner));
            self.bell.notify_all();
        }
        Open(self)
    }

    fn work(&self, task: Task<'_>, own: usize) {
        while let Some(index) = self.shares[own].first() {
            task(index);
        }
        for other in 1..self.shares.len() {
            let share = &self.shares[(own + other) % self.shares.len()];
            while let Some(index) = share.last() {
                task(index);
            }
        }
    }

    /// A helper's life.
    fn help(&self, own: usize) {
        let _flush = Flush::on();
        let mut seen = 0u64;
        while let Some(generation) = self.wait(seen) {
            seen = generation;
            if !self.enter(generation) {
                continue;
            }
            // SAFETY: entered while open, so the caller keeps the task alive until we leave.
            let job = unsafe { *self.job.get() };
            if let Some(task) = job
                && let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.work(task, own)))
            {
                self.shares.iter().for_each(|share| share.fill(0..0));
                *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
            }
            self.state.fetch_sub(1, AcqRel);
        }
    }

    /// The next generation after `seen`, or `None` at the end.
    fn wait(&self, seen: u64) -> Option<u64> {
        let fresh = || (self.state.load(SeqCst) >> 32 != seen).then(|| self.state.load(SeqCst) >> 32);
        for _ in 0..self.spin {
            if let Some(generation) = fresh() {
                return Some(generation);
            }
            if self.stop.load(Relaxed) {
                return None;
            }
            std::hint::spin_loop();
        }
        let mut door = self.door.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleeping.fetch_add(1, SeqCst);
        fence(SeqCst);
        let found = loop {
            if self.stop.load(SeqCst) {
                break None;
            }
            if let Some(generation) = fresh() {
                break Some(generation);
            }
            door = self.bell.wait(door).unwrap_or_else(PoisonError::into_inner);
        };
        self.sleeping.fetch_sub(1, SeqCst);
        found
    }

    /// Counts this helper in, unless the job of that generation is over.
    fn enter(&self, generation: u64) -> bool {
        let mut state = self.state.load(Acquire);
        while state >> 32 == generation && state & OPEN != 0 {
            match self.state.compare_exchange_weak(state, state + 1, AcqRel, Acquire) {
                Ok(_) => return true,
                Err(now) => state = now,
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_threads() {
        for (threads, spin) in [(1, 0), (2, 0), (4, 0), (3, 1000)] {
            let pool = Pool::new(threads, spin).expect("threads");
            for tasks in [0, 1, 2, 7, 500] {
                for _ in 0..50 {
                    let hits: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    pool.run(tasks, &|i| {
                        hits[i].fetch_add(1, Relaxed);
                    });
                    assert!(hits.iter().all(|h| h.load(Relaxed) == 1), "{threads} threads, {tasks} tasks");
                }
            }
        }
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(3, 0).expect("threads");
        for at in [0, 17, 63] {
            let caught = catch_unwind(AssertUnwindSafe(|| pool.run(64, &|i| assert!(i != at, "task {i}"))));
            assert!(caught.is_err());
            let done = AtomicUsize::new(0);
            pool.run(64, &|_| {
                done.fetch_add(1, Relaxed);
            });
            assert_eq!(done.load(Relaxed), 64);
        }
    }

    #[test]
    fn ranges_tile_their_whole() {
        let pool = Pool::new(2, 0).expect("threads");
        let sum = AtomicUsize::new(0);
        pool.ranges(103, 10, &|range| {
            sum.fetch_add(range.sum::<usize>(), Relaxed);
        });
        assert_eq!(sum.load(Relaxed), 102 * 103 / 2);
    }
}
