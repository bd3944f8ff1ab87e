//! The CUDA driver, as everyone who calls it needs it: whether it is there, what it refuses, and a device's context. Nothing
//! panics, also where the library is missing.

use cudarc::driver::sys;
pub use cudarc::driver::sys::CUdevice_attribute_enum as Attribute;
use model::fault::{Fault, FaultKind};
use std::ffi::{CStr, c_char};
use std::ptr::null_mut;

/// The oldest driver whose functions are all there, as it counts versions.
const DRIVER_LEAST: i32 = 12_000;

/// What a call came to, under its name.
pub fn check(call: &str, result: sys::CUresult) -> Result<(), Fault> {
    if result == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut name = std::ptr::null();
    // SAFETY: the driver is there, since it answered; a name that it gives is a constant of its own.
    let known = unsafe { sys::cuGetErrorName(result, &mut name) };
    let text = match known == sys::CUresult::CUDA_SUCCESS && !name.is_null() {
        // SAFETY: the same.
        true => unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned(),
        false => format!("error {}", result as u32),
    };
    use sys::CUresult as Error;
    let kind = match result {
        Error::CUDA_ERROR_OUT_OF_MEMORY => FaultKind::OutOfMemory,
        Error::CUDA_ERROR_NO_DEVICE | Error::CUDA_ERROR_INVALID_DEVICE => FaultKind::Incompatible,
        // After each of these every later call fails too.
        Error::CUDA_ERROR_DEVICE_UNAVAILABLE
        | Error::CUDA_ERROR_ECC_UNCORRECTABLE
        | Error::CUDA_ERROR_NVLINK_UNCORRECTABLE
        | Error::CUDA_ERROR_CONTAINED
        | Error::CUDA_ERROR_ILLEGAL_ADDRESS
        | Error::CUDA_ERROR_LAUNCH_TIMEOUT
        | Error::CUDA_ERROR_CONTEXT_IS_DESTROYED
        | Error::CUDA_ERROR_HARDWARE_STACK_ERROR
        | Error::CUDA_ERROR_ILLEGAL_INSTRUCTION
        | Error::CUDA_ERROR_MISALIGNED_ADDRESS
        | Error::CUDA_ERROR_INVALID_ADDRESS_SPACE
        | Error::CUDA_ERROR_INVALID_PC
        | Error::CUDA_ERROR_LAUNCH_FAILED
        | Error::CUDA_ERROR_UNKNOWN => FaultKind::DeviceLost,
        _ => FaultKind::Internal,
    };
    Err(Fault::new(kind, format!("{call}: {text}")))
}

pub fn refuse<T>(text: String) -> Result<T, Fault> {
    Err(Fault::new(FaultKind::Incompatible, text))
}

/// As NVIDIA writes versions: 12.4 for 12040.
pub fn dotted(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// The version of CUDA that the driver is for, if there is a driver that can be used.
pub fn version() -> Result<i32, Fault> {
    // SAFETY: asks the loader alone.
    if !unsafe { sys::is_culib_present() } {
        return refuse("no CUDA driver (libcuda.so) on this host".into());
    }
    let mut version = 0;
    // SAFETY: the library is there; writes to a live variable. A version may be asked before anything is set up.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&mut version) })?;
    if version < DRIVER_LEAST {
        return refuse(format!("the driver is for CUDA {}, {} is needed", dotted(version), dotted(DRIVER_LEAST)));
    }
    Ok(version)
}

/// How many GPUs the host has.
pub fn gpus() -> Result<usize, Fault> {
    version()?;
    let mut count = 0;
    // SAFETY: the library is there; writes to a live variable.
    unsafe {
        check("cuInit", sys::cuInit(0))?;
        check("cuDeviceGetCount", sys::cuDeviceGetCount(&mut count))?;
    }
    Ok(count as usize)
}

/// `NVIDIA H200`, as the driver calls it.
pub fn name(device: sys::CUdevice) -> Result<String, Fault> {
    let mut name = [0 as c_char; 128];
    // SAFETY: the driver writes a text that ends with a zero, within the room.
    unsafe {
        check("cuDeviceGetName", sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as i32 - 1, device))?;
        Ok(CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned())
    }
}

pub fn attribute(device: sys::CUdevice, which: Attribute) -> Result<i32, Fault> {
    let mut value = 0;
    // SAFETY: writes to a live variable; the device is one of the driver's.
    check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&mut value, which, device) })?;
    Ok(value)
}

/// Compute capability: 90 for a Hopper.
pub fn capability(device: sys::CUdevice) -> Result<i32, Fault> {
    let major = attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    Ok(major * 10 + attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?)
}

/// A GPU's primary context, which all of this process that use the GPU share.
pub struct Context {
    pub device: sys::CUdevice,
    context: sys::CUcontext,
}

// SAFETY: contexts may be made current on any thread.
unsafe impl Send for Context {}
// SAFETY: the same; the driver locks.
unsafe impl Sync for Context {}

impl Context {
    /// That of GPU `ordinal`.
    pub fn retain(ordinal: usize) -> Result<Context, Fault> {
        let (count, mut device, mut context) = (gpus()?, 0, null_mut());
        if ordinal >= count {
            return refuse(format!("GPU {ordinal} is asked for, the host has {count}"));
        }
        // SAFETY: the library is there; every pointer is to a live variable of the type that the call writes.
        unsafe {
            check("cuDeviceGet", sys::cuDeviceGet(&mut device, ordinal as i32))?;
            check("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&mut context, device))?;
        }
        Ok(Context { device, context })
    }

    /// Makes it the calling thread's.
    pub fn enter(&self) -> Result<(), Fault> {
        // SAFETY: retained until this is dropped.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: whoever used it holds it no more. What fails now, failed before.
        unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}
