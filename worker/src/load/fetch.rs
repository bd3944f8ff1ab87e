//! Brings a rank's windows from whoever lends the model's files, a bounded number of bytes ahead of their use, and lets
//! go of them after it: what of a lent file is in memory are the windows in use and those to come.

use super::ahead::order;
use super::image::Hold;
use super::remote::{PART, Remote};
use super::strip::Strip;
use model::catalog::TensorId;
use model::fault::{Fault, FaultKind};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Bytes that are here, or on their way, before anyone has asked for them; a window that is larger comes alone.
const AHEAD_BYTES: u64 = 64 << 20;

/// Reads at the same time: one's answer travels while another's is written and a third one's is being looked up.
const STREAMS: usize = 4;

/// One window of a rank.
pub struct Wanted {
    pub id: TensorId,
    /// Whether to bring it before it is asked for.
    pub ahead: bool,
    pub strips: Vec<(Remote, Strip)>,
}

/// The windows of a rank and the threads that bring them.
pub struct Fetch {
    shared: Arc<Shared>,
    places: BTreeMap<TensorId, usize>,
    threads: Vec<JoinHandle<()>>,
}

/// A window that is here as long as this lives.
pub struct Held {
    shared: Arc<Shared>,
    place: usize,
}

struct Shared {
    windows: Vec<Wanted>,
    inner: Mutex<Inner>,
    changed: Condvar,
}

struct Inner {
    states: Vec<State>,
    /// Reads that are to be done, by place, in order.
    queue: VecDeque<(usize, Remote, Strip)>,
    /// The first place that was not looked at to be brought ahead.
    next: usize,
    /// Bytes of places that nobody has asked for and that are not away.
    ahead: u64,
    fault: Option<Fault>,
    over: bool,
}

#[derive(Default)]
struct State {
    /// Not empty unless it is away.
    holds: Vec<Hold>,
    /// Reads that are not done yet.
    left: usize,
    users: usize,
    /// Counted in [`Inner::ahead`].
    counted: bool,
}

impl Wanted {
    fn bytes(&self) -> u64 {
        self.strips.iter().filter_map(|(_, strip)| strip.bytes()).sum()
    }

    fn holds(&self) -> Vec<Hold> {
        let extent = |strip: &Strip| -> Range<u64> { strip.extent().expect("needs are checked as they are made") };
        self.strips.iter().map(|(remote, strip)| remote.hold(extent(strip))).collect()
    }
}

impl Fetch {
    /// Begins with the first windows.
    pub fn new(mut windows: Vec<Wanted>) -> Result<Fetch, Fault> {
        windows.sort_by_key(|window| order(&window.id));
        let places = windows.iter().enumerate().map(|(place, window)| (window.id, place)).collect();
        let inner = Inner {
            states: windows.iter().map(|_| State::default()).collect(),
            queue: VecDeque::new(),
            next: 0,
            ahead: 0,
            fault: None,
            over: false,
        };
        let shared = Arc::new(Shared { windows, inner: Mutex::new(inner), changed: Condvar::new() });
        let mut fetch = Fetch { shared, places, threads: Vec::new() };
        for number in 0..STREAMS {
            let shared = fetch.shared.clone();
            let thread = std::thread::Builder::new().name(format!("fetch {number}")).spawn(move || run(&shared));
            let failed = |e| Fault::new(FaultKind::Internal, format!("no thread to read from peers: {e}"));
            fetch.threads.push(thread.map_err(failed)?);
        }
        Ok(fetch)
    }

    /// Waits for a window, whose bytes stay while what is returned lives.
    pub fn take(&self, id: TensorId) -> Result<Held, Fault> {
        let unplanned = || Fault::new(FaultKind::Internal, format!("nobody was asked for {id:?}"));
        let place = *self.places.get(&id).ok_or_else(unplanned)?;
        let mut inner = self.shared.lock();
        self.shared.forget_layers_before(&mut inner, place);
        if inner.states[place].holds.is_empty() {
            self.shared.begin(&mut inner, place, false);
        }
        self.shared.count(&mut inner, place, false);
        inner.states[place].users += 1;
        let held = Held { shared: self.shared.clone(), place };
        self.shared.changed.notify_all();
        while inner.states[place].left > 0 && inner.fault.is_none() {
            inner = self.shared.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        let missing = inner.states[place].left > 0;
        let fault = inner.fault.clone().filter(|_| missing);
        drop(inner);
        fault.map_or(Ok(held), Err)
    }
}

impl Drop for Fetch {
    fn drop(&mut self) {
        self.shared.lock().over = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            // One that panicked has told whoever waited.
            let _ = thread.join();
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut inner = self.shared.lock();
        inner.states[self.place].users -= 1;
        self.shared.release(&mut inner, self.place);
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a window's reads: behind the others, or before them where somebody waits for it.
    fn begin(&self, inner: &mut Inner, place: usize, ahead: bool) {
        let window = &self.windows[place];
        let reads = window
            .strips
            .iter()
            .flat_map(|(remote, strip)| strip.parts(PART).into_iter().map(move |part| (place, remote.clone(), part)));
        let reads: Vec<_> = reads.collect();
        inner.states[place].holds = window.holds();
        inner.states[place].left = reads.len();
        match ahead {
            true => inner.queue.extend(reads),
            false => reads.into_iter().rev().for_each(|read| inner.queue.push_front(read)),
        }
        self.count(inner, place, ahead);
    }

    fn count(&self, inner: &mut Inner, place: usize, counts: bool) {
        let before = std::mem::replace(&mut inner.states[place].counted, counts);
        match (before, counts) {
            (false, true) => inner.ahead += self.windows[place].bytes(),
            (true, false) => inner.ahead -= self.windows[place].bytes(),
            (true, true) | (false, false) => {}
        }
    }

    /// Lets go of a window that is whole and that nobody uses.
    fn release(&self, inner: &mut Inner, place: usize) {
        if inner.states[place].users == 0 && inner.states[place].left == 0 {
            inner.states[place].holds.clear();
            self.count(inner, place, false);
        }
    }

    /// What was brought of earlier layers and not asked for is another rank's work by now; who wants it yet asks anew.
    fn forget_layers_before(&self, inner: &mut Inner, place: usize) {
        let layer = self.windows[place].id.layer;
        let past = self.windows.partition_point(|window| window.id.layer < layer);
        for place in 0..past {
            self.release(inner, place);
        }
        inner.next = inner.next.max(past);
    }

    /// Begins the next window that is to be brought ahead, if there is room for it.
    fn begin_ahead(&self, inner: &mut Inner) -> bool {
        while let Some(window) = self.windows.get(inner.next) {
            let state = &inner.states[inner.next];
            let wanted = window.ahead && state.holds.is_empty() && state.users == 0;
            if wanted && inner.ahead > 0 && inner.ahead + window.bytes() > AHEAD_BYTES {
                return false;
            }
            inner.next += 1;
            if wanted {
                self.begin(inner, inner.next - 1, true);
                return true;
            }
        }
        false
    }
}

/// Tells whoever waits that a thread is gone, however it ended.
struct Leaving<'a>(&'a Shared);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        let mut inner = self.0.lock();
        if !inner.over {
            let gone = || Fault::new(FaultKind::Internal, "a thread that reads from peers ended");
            inner.fault.get_or_insert_with(gone);
        }
        drop(inner);
        self.0.changed.notify_all();
    }
}

fn run(shared: &Shared) {
    let _leaving = Leaving(shared);
    let mut inner = shared.lock();
    while !inner.over && inner.fault.is_none() {
        let Some((place, remote, strip)) = inner.queue.pop_front() else {
            if !shared.begin_ahead(&mut inner) {
                inner = shared.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
            } else {
                shared.changed.notify_all();
            }
            continue;
        };
        drop(inner);
        let read = remote.read(&strip);
        inner = shared.lock();
        match read {
            Err(fault) => {
                inner.fault.get_or_insert(fault);
            }
            Ok(()) => {
                inner.states[place].left -= 1;
                if inner.states[place].left == 0 {
                    shared.changed.notify_all();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
