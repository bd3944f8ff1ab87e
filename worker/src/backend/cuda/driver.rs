//! The CUDA driver behind safe calls: a device's context and one stream, its memory, copies and launches. Everything here that
//! fails is a [`Fault`] with the call's name; nothing panics, also where the library is missing.
//!
//! Safe as far as addresses go: whoever launches a kernel names memory that lives until the stream has passed.

use cudarc::driver::sys;
use model::fault::{Fault, FaultKind};
use std::ffi::{CStr, CString, c_void};
use std::ptr::{null_mut, without_provenance_mut};

/// An address of the device's memory.
pub type Address = u64;

/// The oldest driver whose functions are all there, as it counts versions.
const DRIVER_LEAST: i32 = 12_000;

/// A context on a device, current on whichever thread calls, and its stream.
pub struct Driver {
    device: sys::CUdevice,
    context: sys::CUcontext,
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

fn check(call: &str, result: sys::CUresult) -> Result<(), Fault> {
    if result == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut name = std::ptr::null();
    // SAFETY: the driver is there, since it answered; a name that it gives is a constant of its own.
    let known = unsafe { sys::cuGetErrorName(result, &mut name) };
    let text = match known == sys::CUresult::CUDA_SUCCESS && !name.is_null() {
        true => unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned(),
        false => format!("error {}", result as u32),
    };
    let kind = match result {
        sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => FaultKind::OutOfMemory,
        sys::CUresult::CUDA_ERROR_NO_DEVICE | sys::CUresult::CUDA_ERROR_INVALID_DEVICE => FaultKind::Incompatible,
        _ => FaultKind::Internal,
    };
    Err(Fault::new(kind, format!("{call}: {text}")))
}

fn refuse<T>(text: String) -> Result<T, Fault> {
    Err(Fault::new(FaultKind::Incompatible, text))
}

/// How many GPUs the host has, if it has a driver that can be used.
pub fn gpus() -> Result<usize, Fault> {
    // SAFETY: asks the loader alone.
    if !unsafe { sys::is_culib_present() } {
        return refuse("no CUDA driver (libcuda.so) on this host".into());
    }
    let (mut version, mut count) = (0, 0);
    // SAFETY: the library is there; every pointer is to a live variable of the type that the call writes.
    unsafe {
        check("cuInit", sys::cuInit(0))?;
        check("cuDriverGetVersion", sys::cuDriverGetVersion(&mut version))?;
        if version < DRIVER_LEAST {
            let of = |v: i32| format!("{}.{}", v / 1000, v % 1000 / 10);
            return refuse(format!("the driver is for CUDA {}, {} is needed", of(version), of(DRIVER_LEAST)));
        }
        check("cuDeviceGetCount", sys::cuDeviceGetCount(&mut count))?;
    }
    Ok(count as usize)
}

impl Driver {
    /// Opens GPU `ordinal`.
    pub fn open(ordinal: usize) -> Result<Driver, Fault> {
        let (count, mut device) = (gpus()?, 0);
        if ordinal >= count {
            return refuse(format!("GPU {ordinal} is asked for, the host has {count}"));
        }
        // SAFETY: the library is there; every pointer is to a live variable of the type that the call writes.
        unsafe {
            check("cuDeviceGet", sys::cuDeviceGet(&mut device, ordinal as i32))?;
            let mut name = [0 as std::ffi::c_char; 128];
            check("cuDeviceGetName", sys::cuDeviceGetName(name.as_mut_ptr(), 127, device))?;
            let attribute = |which| {
                let mut value = 0;
                check("cuDeviceGetAttribute", sys::cuDeviceGetAttribute(&mut value, which, device)).map(|()| value)
            };
            use sys::CUdevice_attribute_enum as Attribute;
            let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
            let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
            let (mut context, mut stream) = (null_mut(), null_mut());
            check("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&mut context, device))?;
            let name = CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned();
            let mut driver = Driver { device, context, stream, name, capability: (major * 10 + minor) as u32 };
            driver.enter()?;
            // Without the old stream's hidden waits.
            check("cuStreamCreate", sys::cuStreamCreate(&mut stream, 1))?;
            driver.stream = stream;
            Ok(driver)
        }
    }

    fn enter(&self) -> Result<(), Fault> {
        // SAFETY: the context is retained until this is dropped.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })
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
        // SAFETY: nobody holds the device any more. What fails now, failed before.
        unsafe {
            if self.enter().is_ok() && !self.stream.is_null() {
                sys::cuStreamDestroy_v2(self.stream);
            }
            sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}
