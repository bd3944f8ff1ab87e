//! The CUDA driver behind safe calls: a device's context and one stream, its memory, copies and launches. Everything here that
//! fails is a [`Fault`] with the call's name; nothing panics, also where the library is missing.
//!
//! Safe as far as addresses go: whoever launches a kernel names memory that lives until the stream has passed.

use crate::collective::nccl::CudaQueue;
use crate::cuda::{self, Context, check};
use cudarc::driver::sys;
use model::fault::{Fault, FaultKind};
use std::ffi::{CString, c_void};
use std::ptr::{null_mut, without_provenance_mut};
use std::sync::Arc;

/// An address of the device's memory.
pub type Address = u64;

/// A context on a device, current on whichever thread calls, and its stream.
pub struct Driver {
    context: Arc<Context>,
    stream: sys::CUstream,
    /// `Fake GPU`, as the driver calls it.
    pub name: String,
    /// Compute capability: 90 for a Hopper.
    pub capability: u32,
}

// SAFETY: handles of the driver may be used by any thread on which the context is current, which every call sees to.
unsafe impl Send for Driver {}
// SAFETY: the same; the driver locks.
unsafe impl Sync for Driver {}

/// A kernel, which lives as long as its device.
#[derive(Clone, Copy)]
pub struct Kernel(sys::CUfunction);

// SAFETY: as for the driver.
unsafe impl Send for Kernel {}
// SAFETY: the same.
unsafe impl Sync for Kernel {}

impl Driver {
    /// Opens GPU `ordinal`.
    pub fn open(ordinal: usize) -> Result<Driver, Fault> {
        let context = Arc::new(Context::retain(ordinal)?);
        let (name, capability) = (cuda::name(context.device)?, cuda::capability(context.device)? as u32);
        context.enter()?;
        let mut stream = null_mut();
        // SAFETY: writes to a live variable. Without the old stream's hidden waits.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&mut stream, 1) })?;
        Ok(Driver { context, stream, name, capability })
    }

    fn enter(&self) -> Result<(), Fault> {
        self.context.enter()
    }

    /// The stream, for collectives that go behind its kernels.
    pub fn queue(self: &Arc<Driver>) -> Result<CudaQueue, Fault> {
        // SAFETY: the stream is one of the context's and lives as long as the driver.
        unsafe { CudaQueue::over(&self.context, self.stream.cast(), self.clone()) }
    }

    /// Bytes free and bytes in all.
    pub fn memory(&self) -> Result<(usize, usize), Fault> {
        self.enter()?;
        let (mut free, mut all) = (0, 0);
        // SAFETY: writes to live variables.
        check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut all) })?;
        Ok((free, all))
    }

    pub fn reserve(&self, bytes: usize) -> Result<Address, Fault> {
        self.enter()?;
        let mut at = 0;
        // SAFETY: writes to a live variable.
        check("cuMemAlloc", unsafe { sys::cuMemAlloc_v2(&mut at, bytes) })?;
        Ok(at)
    }

    /// Gives memory back once the stream has passed.
    pub fn release(&self, at: Address) -> Result<(), Fault> {
        self.wait()?;
        // SAFETY: nothing on the stream uses it any more.
        check("cuMemFree", unsafe { sys::cuMemFree_v2(at) })
    }

    /// Waits for all that was put on the stream.
    pub fn wait(&self) -> Result<(), Fault> {
        self.enter()?;
        // SAFETY: the stream is this driver's.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.stream) })
    }

    /// Copies to the device; `from` is read before this returns, as it is not pinned.
    pub fn upload<T: Copy>(&self, to: Address, from: &[T]) -> Result<(), Fault> {
        if from.is_empty() {
            return Ok(());
        }
        self.enter()?;
        let bytes = std::mem::size_of_val(from);
        // SAFETY: `from` holds `bytes`; the driver refuses what is not the device's.
        check("cuMemcpyHtoD", unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.as_ptr().cast(), bytes, self.stream) })
    }

    /// Copies from the device and waits.
    pub fn download<T: bytemuck::Pod>(&self, from: Address, to: &mut [T]) -> Result<(), Fault> {
        if !to.is_empty() {
            self.enter()?;
            let bytes = std::mem::size_of_val(to);
            // SAFETY: `to` holds `bytes` and lives until the wait below ends; any bytes are a `T`.
            check("cuMemcpyDtoH", unsafe {
                sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from, bytes, self.stream)
            })?;
        }
        self.wait()
    }

    /// Copies within the device.
    pub fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<(), Fault> {
        self.enter()?;
        // SAFETY: the driver refuses what is not the device's.
        check("cuMemcpyDtoD", unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream) })
    }

    pub fn clear(&self, at: Address, bytes: usize) -> Result<(), Fault> {
        if bytes == 0 {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: the driver refuses what is not the device's.
        check("cuMemsetD8", unsafe { sys::cuMemsetD8Async(at, 0, bytes, self.stream) })
    }

    /// The named kernels of an image.
    pub fn load(&self, image: &[u8], names: &[&str]) -> Result<Vec<Kernel>, Fault> {
        self.enter()?;
        let mut module = null_mut();
        // SAFETY: the image is whole; modules live as long as the process, as its kernels may.
        check("cuModuleLoadData", unsafe { sys::cuModuleLoadData(&mut module, image.as_ptr().cast()) })?;
        let find = |name: &&str| {
            let text = CString::new(*name).map_err(|e| Fault::new(FaultKind::Internal, e.to_string()))?;
            let mut kernel = null_mut();
            // SAFETY: module and name are live.
            let got = unsafe { sys::cuModuleGetFunction(&mut kernel, module, text.as_ptr()) };
            check(&format!("cuModuleGetFunction {name}"), got).map(|()| Kernel(kernel))
        };
        names.iter().map(find).collect()
    }

    /// Puts a kernel on the stream, which takes one struct. Its size goes with it, so that the driver sees one that differs.
    pub fn launch<A: Copy>(
        &self,
        kernel: Kernel,
        grid: [usize; 3],
        threads: usize,
        shared: usize,
        args: &A,
    ) -> Result<(), Fault> {
        if grid.contains(&0) {
            return Ok(());
        }
        self.enter()?;
        let [x, y, z] = grid.map(|n| n as u32);
        let mut bytes = size_of::<A>();
        // CU_LAUNCH_PARAM_BUFFER_POINTER and _SIZE.
        let [pointer, size] = [1, 2].map(without_provenance_mut::<c_void>);
        let mut extra =
            [pointer, std::ptr::from_ref(args).cast_mut().cast(), size, (&raw mut bytes).cast(), null_mut()];
        // SAFETY: the driver copies `bytes` of `args` before it returns.
        let launched = unsafe {
            sys::cuLaunchKernel(
                kernel.0,
                x,
                y,
                z,
                threads as u32,
                1,
                1,
                shared as u32,
                self.stream,
                null_mut(),
                extra.as_mut_ptr(),
            )
        };
        check("cuLaunchKernel", launched)
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if self.enter().is_ok() {
            // SAFETY: nobody holds the device any more. What fails now, failed before.
            unsafe { sys::cuStreamDestroy_v2(self.stream) };
        }
    }
}
