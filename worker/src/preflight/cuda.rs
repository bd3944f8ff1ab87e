//! GPUs, and the libraries that ranks on them need.

use super::{Line, binary};
use crate::backend::cuda::{BUILT_IN, architectures};
use crate::collective::nccl::Library as Nccl;
use crate::cuda::{self, Attribute};
use cudarc::driver::sys::{self as driver, CUdevice_P2PAttribute_enum as Peer};
use cudarc::nvrtc::sys as nvrtc;
use libloading::Library;
use model::fault::Fault;
use std::ffi::c_int;

/// The oldest architecture that kernels are compiled for.
const CAPABILITY_LEAST: c_int = 80;

/// Names of cuBLASLt, newest first.
const CUBLASLT: [&str; 3] = ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"];

/// The first that lacks is why no rank runs on a GPU. Without a driver that is all there is to say.
pub fn lines() -> Vec<Line> {
    let driver = match driver_version() {
        Ok(line) => line,
        Err(line) => return vec![line],
    };
    let mut lines = vec![driver, nvrtc_version(), cublaslt_version(), nccl_version()];
    match gpus() {
        Ok(gpus) => lines.extend(gpus),
        Err(line) => lines.push(line),
    }
    lines
}

fn check(call: &str, result: driver::CUresult) -> Result<(), Line> {
    cuda::check(call, result).map_err(lacks)
}

fn lacks(fault: Fault) -> Line {
    Line::lacks("cuda", fault.text)
}

fn driver_version() -> Result<Line, Line> {
    let version = cuda::version().map_err(lacks)?;
    // `NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  ...`
    let module = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
    let module = module.lines().next().and_then(|line| {
        line.split_whitespace().find(|word| word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit()))
    });
    let module = module.map(|version| format!(", kernel module {version}")).unwrap_or_default();
    Ok(Line::has("driver", format!("CUDA {}{module}", cuda::dotted(version))))
}

fn nvrtc_version() -> Line {
    // SAFETY: asks the loader alone.
    if !unsafe { nvrtc::is_culib_present() } {
        return match BUILT_IN.is_empty() {
            true => Line::lacks("nvrtc", "no libnvrtc.so: kernels are compiled by it when a worker starts"),
            false => {
                Line::note("nvrtc", format!("no libnvrtc.so: kernels are built in for {}", architectures(BUILT_IN)))
            }
        };
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is there; writes to live variables.
    unsafe { nvrtc::nvrtcVersion(&mut major, &mut minor) };
    Line::has("nvrtc", format!("{major}.{minor}"))
}

fn cublaslt_version() -> Line {
    // SAFETY: loading it runs its initialisers alone.
    let Some((name, library)) = CUBLASLT.iter().find_map(|name| Some((name, unsafe { Library::new(*name) }.ok()?)))
    else {
        return Line::note("cublaslt", format!("no {}: kernels of our own multiply", CUBLASLT[0]));
    };
    // SAFETY: the type is that of the library's header.
    match unsafe { library.get::<unsafe extern "C" fn() -> usize>("cublasLtGetVersion") } {
        Ok(version) => {
            // SAFETY: takes nothing.
            let version = unsafe { version() };
            Line::has("cublaslt", format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100))
        }
        Err(_) => Line::note("cublaslt", format!("{name} has no cublasLtGetVersion")),
    }
}

/// Needed by several GPUs alone: one that is missing is no lack of a host with one.
fn nccl_version() -> Line {
    match Nccl::open() {
        Ok(library) => Line::has("nccl", format!("{} ({})", library.version(), library.name())),
        Err(fault) => Line::note("nccl", format!("{}: several GPUs exchange through host memory", fault.text)),
    }
}

fn gpus() -> Result<Vec<Line>, Line> {
    let count = cuda::gpus().map_err(lacks)? as c_int;
    if count == 0 {
        return Err(Line::lacks("cuda", "the driver sees no GPU"));
    }
    let mut lines = (0..count).map(gpu).collect::<Result<Vec<_>, Line>>()?;
    // One that serves is enough.
    if lines.iter().any(|line| line.standing == super::Standing::Has) {
        lines.iter_mut().filter(|line| line.standing == super::Standing::Lacks).for_each(|line| {
            line.standing = super::Standing::Note;
        });
    }
    if count > 1 {
        lines.push(peers(count)?);
    }
    Ok(lines)
}

/// `9.0` for 90.
fn tenths(capability: c_int) -> String {
    format!("{}.{}", capability / 10, capability % 10)
}

fn gpu(ordinal: c_int) -> Result<Line, Line> {
    let (mut device, mut bytes) = (0, 0);
    // SAFETY: writes to live variables.
    unsafe {
        check("cuDeviceGet", driver::cuDeviceGet(&mut device, ordinal))?;
        check("cuDeviceTotalMem", driver::cuDeviceTotalMem_v2(&mut bytes, device))?;
    }
    let (name, capability) = (cuda::name(device).map_err(lacks)?, cuda::capability(device).map_err(lacks)?);
    let corrects = cuda::attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_ECC_ENABLED).map_err(lacks)?;
    let ecc = if corrects == 0 { "off" } else { "on" };
    let what = format!("gpu {ordinal}");
    let text = format!("{name}, {}, compute capability {}, ECC {ecc}", binary(bytes as u64), tenths(capability));
    if capability < CAPABILITY_LEAST {
        return Ok(Line::lacks(what, format!("{text}: {} is needed", tenths(CAPABILITY_LEAST))));
    }
    Ok(Line::has(what, text))
}

/// How GPUs reach each other's memory. Atomics across tell NVLink from PCIe, where they are missing.
fn peers(count: c_int) -> Result<Line, Line> {
    let (mut pairs, mut reach, mut linked) = (0, 0, 0);
    for one in 0..count {
        for other in one + 1..count {
            let (mut can, mut atomics) = (0, 0);
            // SAFETY: writes to live variables; both are the driver's devices.
            unsafe {
                check("cuDeviceCanAccessPeer", driver::cuDeviceCanAccessPeer(&mut can, one, other))?;
                let which = Peer::CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED;
                check("cuDeviceGetP2PAttribute", driver::cuDeviceGetP2PAttribute(&mut atomics, which, one, other))?;
            }
            pairs += 1;
            reach += i32::from(can != 0);
            linked += i32::from(atomics != 0);
        }
    }
    let text =
        format!("{reach} of {pairs} pairs of GPUs reach each other's memory, {linked} with atomics, as over NVLink");
    Ok(if reach == pairs { Line::has("peers", text) } else { Line::note("peers", text) })
}
