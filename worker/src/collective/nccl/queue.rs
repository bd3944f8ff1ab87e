//! A [`Queue`] on a GPU: a stream of its device's primary context, pinned memory, and a word that the stream writes.

use crate::collective::device::{Address, Queue, Word};
use crate::cuda::{Context, check};
use cudarc::driver::sys;
use model::fault::{Fault, FaultKind};
use std::any::Any;
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Staging memory grows in steps of so many bytes.
const STEP: usize = 1 << 20;

/// Host memory that the device reads and writes itself.
struct Pinned {
    context: Arc<Context>,
    base: *mut c_void,
    bytes: usize,
}

// SAFETY: plain memory of the process.
unsafe impl Send for Pinned {}
// SAFETY: shared only as the word, through an atomic.
unsafe impl Sync for Pinned {}

impl Pinned {
    fn new(context: &Arc<Context>, bytes: usize) -> Result<Pinned, Fault> {
        let mut base = null_mut();
        // SAFETY: writes to a live variable; the memory is zeroed before anyone reads it.
        check("cuMemHostAlloc", unsafe { sys::cuMemHostAlloc(&mut base, bytes, sys::CU_MEMHOSTALLOC_PORTABLE) })?;
        // SAFETY: `bytes` of it are the caller's.
        unsafe { base.cast::<u8>().write_bytes(0, bytes) };
        Ok(Pinned { context: context.clone(), base, bytes })
    }

    fn address(&self) -> Address {
        // The same to host and device, as everywhere with one space of addresses.
        self.base.expose_provenance() as Address
    }
}

impl Word for Pinned {
    fn read(&self) -> u32 {
        // SAFETY: aligned, zeroed memory of four bytes or more, which lives as long as this.
        unsafe { AtomicU32::from_ptr(self.base.cast()) }.load(Ordering::Acquire)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = self.context.enter();
        // SAFETY: allocated by `new`, freed once; the queue that used it is done or destroyed.
        unsafe { sys::cuMemFreeHost(self.base) };
    }
}

/// A stream and what goes with it.
pub struct CudaQueue {
    context: Arc<Context>,
    stream: sys::CUstream,
    /// Of a stream that is not the queue's own.
    keeper: Option<Arc<dyn Any + Send + Sync>>,
    word: Arc<Pinned>,
    staging: Option<Pinned>,
}

// SAFETY: a stream may be used by any thread, one at a time.
unsafe impl Send for CudaQueue {}

impl CudaQueue {
    /// A stream of its own on GPU `ordinal`.
    pub fn open(ordinal: usize) -> Result<CudaQueue, Fault> {
        let context = Arc::new(Context::retain(ordinal)?);
        context.enter()?;
        let mut stream = null_mut();
        // SAFETY: writes to a live variable. Without the old stream's hidden waits.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&mut stream, 1) })?;
        CudaQueue::of(context, stream, None)
    }

    /// A backend's stream, behind whose kernels the collectives shall be. `keeper` is what the stream lives by.
    ///
    /// # Safety
    /// `stream` is a stream of `context` and lives as long as `keeper`.
    pub unsafe fn over(
        context: &Arc<Context>,
        stream: *mut c_void,
        keeper: Arc<dyn Any + Send + Sync>,
    ) -> Result<CudaQueue, Fault> {
        context.enter()?;
        CudaQueue::of(context.clone(), stream.cast(), Some(keeper))
    }

    fn of(
        context: Arc<Context>,
        stream: sys::CUstream,
        keeper: Option<Arc<dyn Any + Send + Sync>>,
    ) -> Result<CudaQueue, Fault> {
        let word = Arc::new(Pinned::new(&context, size_of::<u32>())?);
        Ok(CudaQueue { context, stream, keeper, word, staging: None })
    }

    fn wait(&self) -> Result<(), Fault> {
        // SAFETY: the stream is live.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.stream) })
    }

    fn staged(&self, at: usize, bytes: usize) -> Result<*mut u8, Fault> {
        let there = self.staging.as_ref().filter(|staging| at + bytes <= staging.bytes);
        let lacks = || Fault::new(FaultKind::Internal, format!("bytes {at} to {} of staging memory", at + bytes));
        // SAFETY: within the memory.
        there.map(|staging| unsafe { staging.base.cast::<u8>().add(at) }).ok_or_else(lacks)
    }
}

/// Memory of a queue's device for whoever has no backend to ask, as benchmarks and tests; never for a step.
pub struct DeviceMemory {
    context: Arc<Context>,
    pub at: Address,
}

impl DeviceMemory {
    pub fn new(queue: &CudaQueue, bytes: usize) -> Result<DeviceMemory, Fault> {
        queue.enter()?;
        let mut at = 0;
        // SAFETY: writes to a live variable.
        check("cuMemAlloc", unsafe { sys::cuMemAlloc_v2(&mut at, bytes) })?;
        Ok(DeviceMemory { context: queue.context.clone(), at })
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: allocated by `new`, freed once; the driver waits for what uses it.
            unsafe { sys::cuMemFree_v2(self.at) };
        }
    }
}

impl Queue for CudaQueue {
    fn raw(&self) -> *mut c_void {
        self.stream.cast()
    }

    fn device(&self) -> Result<[u8; 16], Fault> {
        let mut id = sys::CUuuid { bytes: [0; 16] };
        // SAFETY: writes to a live variable.
        check("cuDeviceGetUuid", unsafe { sys::cuDeviceGetUuid_v2(&mut id, self.context.device) })?;
        Ok(id.bytes.map(|byte| byte as u8))
    }

    fn enter(&self) -> Result<(), Fault> {
        self.context.enter()
    }

    fn staging(&mut self, bytes: usize) -> Result<&mut [u8], Fault> {
        if self.staging.as_ref().is_none_or(|staging| staging.bytes < bytes) {
            self.enter()?;
            // The queue may still read what it replaces.
            self.wait()?;
            self.staging = None;
            self.staging = Some(Pinned::new(&self.context, bytes.max(1).next_multiple_of(STEP))?);
        }
        let staging = self.staging.as_ref().expect("made above");
        // SAFETY: initialised memory of so many bytes; copies to and from it have ended, as `fetch` and `store` wait.
        Ok(unsafe { std::slice::from_raw_parts_mut(staging.base.cast(), staging.bytes) })
    }

    fn fetch(&mut self, from: Address, at: usize, bytes: usize) -> Result<(), Fault> {
        let to = self.staged(at, bytes)?;
        self.enter()?;
        if bytes > 0 {
            // SAFETY: `to` has so many bytes; the driver refuses what is not the device's.
            check("cuMemcpyDtoH", unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), from, bytes, self.stream) })?;
        }
        self.wait()
    }

    fn store(&mut self, at: usize, to: Address, bytes: usize) -> Result<(), Fault> {
        let from = self.staged(at, bytes)?;
        self.enter()?;
        if bytes > 0 {
            // SAFETY: `from` has so many bytes; the driver refuses what is not the device's.
            check("cuMemcpyHtoD", unsafe {
                sys::cuMemcpyHtoDAsync_v2(to, from.cast_const().cast(), bytes, self.stream)
            })?;
        }
        self.wait()
    }

    fn mark(&mut self, value: u32) -> Result<(), Fault> {
        let at = self.word.address();
        // SAFETY: pinned memory that lives as long as the queue.
        check("cuStreamWriteValue32", unsafe { sys::cuStreamWriteValue32_v2(self.stream, at, value, 0) })
    }

    fn word(&self) -> Arc<dyn Word> {
        self.word.clone()
    }

    fn is_done(&mut self) -> Result<bool, Fault> {
        // SAFETY: the stream is live.
        match unsafe { sys::cuStreamQuery(self.stream) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => check("cuStreamQuery", result).map(|()| true),
        }
    }
}

impl Drop for CudaQueue {
    fn drop(&mut self) {
        if self.enter().is_ok() {
            // What the queue still does, it does with memory that goes now. What fails, failed before.
            let _ = self.wait();
            if self.keeper.is_none() {
                // SAFETY: made by `open`, destroyed once.
                unsafe { sys::cuStreamDestroy_v2(self.stream) };
            }
        }
    }
}
