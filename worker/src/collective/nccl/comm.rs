//! One NCCL communicator, whose calls all return at once and which any thread may end.
//!
//! The library asks that one thread at a time calls, that nobody calls while something is in progress, and that nobody touches what
//! was aborted. So there is a lock around each call (around waits in `shrink` alone); who takes the handle away ends the communicator; and the
//! first fault is the one that everybody gets.

use super::library::{Code, Config, Functions, Handle, Library, SHRINK_ABORT, UniqueId};
use model::fault::{Fault, FaultKind};
use std::ffi::{c_int, c_void};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// How long an abort waits for a call that is under way. The library lets an abort break into a call, at its own risk.
const CALL_MAX: Duration = Duration::from_secs(1);

/// How long whoever finds a communicator ended waits for the queue to be freed of it.
const ABORT_MAX: Duration = Duration::from_secs(5);

/// Idle turns before a waiting thread sleeps between its looks.
const SPIN: u32 = 200;
const NAP: Duration = Duration::from_micros(50);

pub struct Comm {
    library: Arc<Library>,
    handle: AtomicPtr<c_void>,
    busy: Mutex<()>,
    fault: OnceLock<Fault>,
    /// Whether the library has let go of it.
    over: Mutex<bool>,
    is_over: Condvar,
    pub rank: usize,
    pub size: usize,
}

/// Waits between looks: first not at all, then a little.
#[derive(Default)]
pub struct Patience(u32);

impl Patience {
    pub fn wait(&mut self) {
        self.0 += 1;
        if self.0 < SPIN { std::thread::yield_now() } else { std::thread::sleep(NAP) }
    }
}

impl Comm {
    fn of(library: &Arc<Library>, handle: Handle, rank: usize, size: usize) -> Comm {
        Comm {
            library: library.clone(),
            handle: AtomicPtr::new(handle),
            busy: Mutex::default(),
            fault: OnceLock::new(),
            over: Mutex::default(),
            is_over: Condvar::new(),
            rank,
            size,
        }
    }

    /// Begins to connect; it is connected when [`Comm::is_ready`] says so.
    pub fn join(library: &Arc<Library>, id: UniqueId, rank: usize, size: usize) -> Result<Arc<Comm>, Fault> {
        let (mut handle, mut config) = (null_mut(), Config::non_blocking());
        // SAFETY: live variables of the types that the header names; the library copies what it keeps.
        let code =
            Code(unsafe { (library.functions().init)(&mut handle, size as c_int, id, rank as c_int, &mut config) });
        let comm = Comm::of(library, handle, rank, size);
        match code {
            Code::SUCCESS | Code::IN_PROGRESS if !handle.is_null() => Ok(Arc::new(comm)),
            code => Err(comm.failed("ncclCommInitRankConfig", code)),
        }
    }

    /// For texts of faults.
    pub fn who(&self) -> String {
        format!("nccl at rank {} of {}", self.rank, self.size)
    }

    fn failed(&self, what: &str, code: Code) -> Fault {
        let fault = self.library.fault(what, code);
        Fault::new(fault.kind, format!("{}: {}", self.who(), fault.text))
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why it ended, if it has.
    pub fn fault(&self) -> Option<Fault> {
        self.fault.get().cloned()
    }

    fn live(&self) -> Result<Handle, Fault> {
        self.fault().map_or(Ok(()), Err)?;
        let handle = self.handle.load(Ordering::Acquire);
        let gone = || Fault::new(FaultKind::Aborted, format!("{}: it is closed", self.who()));
        if handle.is_null() { Err(gone()) } else { Ok(handle) }
    }

    /// One call of the library, which may be in progress when this returns.
    pub fn call(&self, what: &str, call: impl FnOnce(&Functions, Handle) -> c_int) -> Result<(), Fault> {
        let guard = self.lock();
        let handle = self.live()?;
        let code = Code(call(self.library.functions(), handle));
        drop(guard);
        match code {
            Code::SUCCESS | Code::IN_PROGRESS => self.fault().map_or(Ok(()), Err),
            code => Err(self.fault().unwrap_or_else(|| self.failed(what, code))),
        }
    }

    /// Whether nothing is in progress; a fault if something went wrong behind a call.
    pub fn is_ready(&self) -> Result<bool, Fault> {
        let mut state = 0;
        // SAFETY: the handle is live, as the lock is held; writes to a live variable.
        self.call("ncclCommGetAsyncError", |f, handle| unsafe { (f.async_error)(handle, &mut state) })?;
        match Code(state) {
            Code::SUCCESS => Ok(true),
            Code::IN_PROGRESS => Ok(false),
            code => Err(self.failed("asynchronous error", code)),
        }
    }

    /// The first fault is kept. `true`: it is this one.
    pub fn end(&self, fault: Fault) -> bool {
        self.fault.set(fault).is_ok()
    }

    /// Gives the communicator back to the library, which frees the queue of it, on a thread of its own: it may take its time.
    pub fn abort(self: &Arc<Comm>) {
        let comm = self.clone();
        let spawned = std::thread::Builder::new().name("nccl-abort".into()).spawn(move || comm.abort_here());
        if let Err(error) = spawned {
            tracing::error!("{}: no thread to abort on: {error}", self.who());
        }
    }

    fn abort_here(&self) {
        let end = Instant::now() + CALL_MAX;
        let guard = loop {
            match self.busy.try_lock() {
                Ok(guard) => break Some(guard),
                Err(TryLockError::Poisoned(poisoned)) => break Some(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) if Instant::now() >= end => break None,
                Err(TryLockError::WouldBlock) => std::thread::sleep(NAP),
            }
        };
        self.let_go(self.library.functions().abort);
        drop(guard);
    }

    fn let_go(&self, how: unsafe extern "C" fn(Handle) -> c_int) {
        let handle = self.handle.swap(null_mut(), Ordering::AcqRel);
        if !handle.is_null() {
            // SAFETY: whoever takes the handle is the last to use it.
            let code = Code(unsafe { how(handle) });
            if code != Code::SUCCESS && code != Code::IN_PROGRESS {
                tracing::warn!("{}", self.failed("letting go", code));
            }
            *self.over.lock().unwrap_or_else(PoisonError::into_inner) = true;
            self.is_over.notify_all();
        }
    }

    /// Waits a while for the library to have let go of what is on the queue.
    pub fn wait_over(&self) {
        let over = self.over.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.is_over.wait_timeout_while(over, ABORT_MAX, |over| !*over);
        if waited.is_ok_and(|(_, outcome)| outcome.timed_out()) {
            tracing::error!("{}: the library does not let go: this process has to end", self.who());
        }
    }

    /// After the last call: what is sent is still delivered, for up to `most`.
    pub fn close(&self, most: Duration) {
        let end = Instant::now() + most;
        // SAFETY: the handle is live, as the lock is held.
        let mut flushed = self.call("ncclCommFinalize", |f, handle| unsafe { (f.finalize)(handle) });
        let mut patience = Patience::default();
        while flushed.is_ok() && Instant::now() < end {
            match self.is_ready() {
                Ok(true) => {
                    let _guard = self.lock();
                    return self.let_go(self.library.functions().destroy);
                }
                Ok(false) => patience.wait(),
                Err(fault) => flushed = Err(fault),
            }
        }
        let _guard = self.lock();
        self.let_go(self.library.functions().abort);
    }

    /// The communicator without `lost`; what runs on this one is ended. All others call it.
    pub fn shrink(&self, lost: &[usize], deadline: Instant) -> Result<Arc<Comm>, Fault> {
        let shrink = self.library.shrink()?;
        let mut excluded: Vec<c_int> = lost.iter().map(|rank| *rank as c_int).collect();
        let before = lost.iter().filter(|rank| **rank < self.rank).count();
        let guard = self.lock();
        let parent = self.handle.load(Ordering::Acquire);
        if parent.is_null() {
            let text = format!("{}: it is aborted, nothing is left to shrink", self.who());
            return Err(Fault::new(FaultKind::Aborted, text));
        }
        // The library writes to it until it says that it is done.
        let made: *mut Handle = Box::into_raw(Box::new(null_mut()));
        let count = excluded.len() as c_int;
        // SAFETY: live memory, and the list is copied; no configuration: the parent's.
        let mut code = Code(unsafe { shrink(parent, excluded.as_mut_ptr(), count, made, null_mut(), SHRINK_ABORT) });
        let mut patience = Patience::default();
        while code == Code::IN_PROGRESS {
            if Instant::now() > deadline {
                // The library may still write there: it is left to it.
                let (who, left) = (self.who(), self.size - lost.len());
                let text = format!("{who}: not all of the {left} ranks that are left shrank with it in time");
                return Err(Fault::new(FaultKind::Timeout, text));
            }
            patience.wait();
            let mut state = 0;
            // SAFETY: the handle is live, as the lock is held.
            let asked = Code(unsafe { (self.library.functions().async_error)(parent, &mut state) });
            code = if asked == Code::SUCCESS { Code(state) } else { asked };
        }
        // SAFETY: made above; the library is done with it.
        let handle = *unsafe { Box::from_raw(made) };
        drop(guard);
        if code != Code::SUCCESS || handle.is_null() {
            return Err(self.failed("ncclCommShrink", code));
        }
        Ok(Arc::new(Comm::of(&self.library, handle, self.rank - before, self.size - lost.len())))
    }
}

impl Drop for Comm {
    fn drop(&mut self) {
        self.let_go(self.library.functions().abort);
    }
}
