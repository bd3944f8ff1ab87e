//! Kernels on the CPU, each thread of a block a fiber: planted bugs are found, and the CUDA backend keeps its contract on a driver
//! without a GPU.

#![allow(clippy::unwrap_used)] // all of this file is a test

use conclave_tests::gpp::{Stack, case};
use model::fault::{Fault, FaultKind};
use model::plan::KernelFamily;
use model::quant::Dtype;
use std::path::Path;
use std::sync::OnceLock;
use worker::backend::cpu::{CpuBackend, CpuConfig};
use worker::backend::cuda::{CudaBackend, CudaConfig, Device};
use worker::backend::suite;

const MEMORY: usize = 256 << 20;

/// The fake stack, built once; `None` where it can't be.
fn stack() -> Option<&'static Stack> {
    static STACK: OnceLock<Option<Stack>> = OnceLock::new();
    let build =
        || Stack::build(&Path::new(env!("CARGO_TARGET_TMPDIR")).join("fake-cuda"), "the CUDA kernels are").unwrap();
    STACK.get_or_init(build).as_ref()
}

/// Runs `test` again as `case` with the fake libraries; its output must say that it passed.
fn passes(test: &str, case: &str, settings: &[(&str, &str)]) {
    let Some(stack) = stack() else { return };
    let ran = stack.again(test, case, settings).unwrap();
    let (out, err) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    assert!(ran.status.success() && out.contains("1 passed"), "{case} {settings:?}:\n{out}\n{err}");
}

/// Without a bug every schedule gives the sums of plain loops; each of the planted ones shows under at least one.
#[test]
fn schedules_find_every_planted_bug() {
    let Some(stack) = stack() else { return };
    let ran = stack.planted().output().unwrap();
    let said = String::from_utf8_lossy(&ran.stdout);
    assert!(ran.status.success(), "{said}{}", String::from_utf8_lossy(&ran.stderr));
    assert_eq!(said.lines().count(), 18, "{said}");
    assert!(said.starts_with("bug  0:  0 of 16 schedules\n"), "{said}");
}

fn transcript(dtype: Dtype) -> suite::Transcript {
    let device = Device::open(0, Some(MEMORY)).unwrap();
    let config = CudaConfig { dtype, threads: 1 };
    suite::run(dtype, &mut || CudaBackend::new(device.clone(), &config).unwrap())
}

/// The contract's results are the CPU's, bit for bit.
fn agrees(case: &str) {
    let dtype: Dtype = case.parse().unwrap();
    let config = CpuConfig { dtype, family: KernelFamily::Vector, threads: 1, spin: 0 };
    let want = suite::run(dtype, &mut || CpuBackend::new(config.clone()).unwrap());
    let got = transcript(dtype);
    assert_eq!(got.len(), want.len());
    let differs = got.iter().zip(&want).filter(|(got, want)| got != want).count();
    assert!(differs == 0, "{differs} of {} results differ from the CPU's", want.len());
}

#[test]
fn the_contract_is_kept_with_the_bits_of_the_cpu() {
    const SELF: &str = "the_contract_is_kept_with_the_bits_of_the_cpu";
    if let Some(case) = case() {
        return agrees(&case);
    }
    for (dtype, schedule, copies) in [
        ("f32", "forward", "early"),
        ("bf16", "forward", "late"),
        ("bf16", "reverse", "late"),
        ("f32", "random:7", "late"),
        ("bf16", "ahead:1", "early"),
    ] {
        passes(SELF, dtype, &[("FAKE_CUDA_SCHEDULE", schedule), ("FAKE_CUDA_COPIES", copies)]);
    }
}

fn refused(opened: Result<impl Sized, Fault>, kind: FaultKind, text: &str) {
    let fault = opened.err().unwrap();
    assert_eq!((fault.kind, fault.text.as_str()), (kind, text));
}

#[test]
fn what_a_host_lacks_is_one_clear_fault() {
    const SELF: &str = "what_a_host_lacks_is_one_clear_fault";
    use FaultKind::{Incompatible, Internal, OutOfMemory};
    match case().as_deref() {
        Some("no device") => refused(Device::open(0, Some(MEMORY)), Incompatible, "cuInit: CUDA_ERROR_NO_DEVICE"),
        Some("third") => refused(Device::open(2, Some(MEMORY)), Incompatible, "GPU 2 is asked for, the host has 1"),
        Some("old") => {
            refused(Device::open(0, Some(MEMORY)), Incompatible, "the driver is for CUDA 11.8, 12.0 is needed");
        }
        Some("small") => {
            let text = "268435456 bytes asked of Fake GPU, which has 1000000 of 1000000 free";
            refused(Device::open(0, Some(MEMORY)), OutOfMemory, text);
        }
        Some("fails") => refused(Device::open(0, Some(MEMORY)), OutOfMemory, "cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY"),
        Some("launch") => {
            use worker::backend::{Backend, Kind};
            let config = CudaConfig { dtype: Dtype::F32, threads: 1 };
            let mut backend = CudaBackend::new(Device::open(0, Some(MEMORY)).unwrap(), &config).unwrap();
            let mut rows = backend.buffer(3, 40, Kind::Full).unwrap();
            let term = backend.buffer(3, 40, Kind::Full).unwrap();
            backend.add(&mut rows, &term, None, 3).unwrap();
            refused(backend.add(&mut rows, &term, None, 3), Internal, "cuLaunchKernel: CUDA_ERROR_LAUNCH_FAILED");
        }
        Some(other) => panic!("no case {other}"),
        None => {
            // Without the fake, where the host has no GPU either: no driver at all, or one that finds nothing.
            if !Path::new("/dev/nvidiactl").exists()
                && let Err(fault) = Device::open(0, Some(MEMORY))
            {
                let said =
                    fault.text == "no CUDA driver (libcuda.so) on this host" || fault.text.starts_with("cuInit: ");
                assert!(fault.kind == Incompatible && said, "{fault:?}");
            }
            passes(SELF, "no device", &[("FAKE_CUDA_DEVICES", "0")]);
            passes(SELF, "third", &[]);
            passes(SELF, "old", &[("FAKE_CUDA_VERSION", "11080")]);
            passes(SELF, "small", &[("FAKE_CUDA_MEMORY", "1000000")]);
            passes(SELF, "fails", &[("FAKE_CUDA_FAIL", "cuMemAlloc_v2:1:2")]);
            passes(SELF, "launch", &[("FAKE_CUDA_FAIL", "cuLaunchKernel:2:719")]);
        }
    }
}
