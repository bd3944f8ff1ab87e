//! Kernels on the CPU, each thread of a block a fiber: planted bugs are found, and the CUDA backend keeps its contract on a driver
//! without a GPU.

#![allow(clippy::unwrap_used)] // all of this file is a test

use conclave_tests::gpp::{Stack, case};
use model::fault::{Fault, FaultKind};
use model::plan::KernelFamily;
use model::quant::Dtype;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};
use worker::backend::cpu::{CpuBackend, CpuConfig};
use worker::backend::cuda::texts::{CAPABILITIES, SOURCES, Text, file};
use worker::backend::cuda::{CudaBackend, CudaConfig, Device, Image, compile};
use worker::backend::{Backend, HostSlice, Kind, suite};

const MEMORY: usize = 256 << 20;

/// The fake stack, built once; `None` where it can't be.
fn stack() -> Option<&'static Stack> {
    static STACK: OnceLock<Option<Stack>> = OnceLock::new();
    let build =
        || Stack::build(&Path::new(env!("CARGO_TARGET_TMPDIR")).join("fake-cuda"), "the CUDA kernels are").unwrap();
    STACK.get_or_init(build).as_ref()
}

/// Runs `test` again as `case` with the fake libraries; its output, empty where there are none, must say that it passed.
fn passes(test: &str, case: &str, settings: &[(&str, &str)]) -> String {
    let Some(stack) = stack() else { return String::new() };
    let ran = stack.again(test, case, settings).unwrap();
    let (out, err) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    assert!(ran.status.success() && out.contains("1 passed"), "{case} {settings:?}:\n{out}\n{err}");
    out.into_owned()
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

fn transcript(dtype: Dtype, family: KernelFamily) -> suite::Transcript {
    let device = Device::open(0, Some(MEMORY)).unwrap();
    let config = CudaConfig { dtype, family, threads: 1 };
    suite::run(dtype, &mut || CudaBackend::new(device.clone(), &config).unwrap())
}

/// The contract's results are the CPU's, bit for bit.
fn agrees(case: &str) {
    let dtype: Dtype = case.parse().unwrap();
    let config = CpuConfig { dtype, family: KernelFamily::Vector, threads: 1, spin: 0 };
    let want = suite::run(dtype, &mut || CpuBackend::new(config.clone()).unwrap());
    let got = transcript(dtype, config.family);
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

/// Products on tensor cores keep the contract too, with the same bits whichever threads run first.
#[test]
fn tensor_cores_keep_the_contract() {
    const SELF: &str = "tensor_cores_keep_the_contract";
    const SUM: &str = "bits ";
    if case().is_some() {
        let bits = transcript(Dtype::Bf16, KernelFamily::Tensor);
        let sum = bits.iter().fold(0u64, |sum, bits| sum.rotate_left(5).wrapping_mul(31) ^ u64::from(*bits));
        return println!("\n{SUM}{sum:x}");
    }
    let told = ["forward", "reverse", "random:3"].map(|schedule| {
        let out = passes(SELF, "tensor", &[("FAKE_CUDA_SCHEDULE", schedule), ("FAKE_CUDA_COPIES", "late")]);
        out.lines().find_map(|line| line.strip_prefix(SUM)).map(str::to_string)
    });
    assert!(told.iter().all(|bits| *bits == told[0]), "{told:?}");
    assert!(told[0].is_some() || stack().is_none());
}

/// Runs one kernel.
fn adds(device: &Arc<Device>) -> Result<(), Fault> {
    let mut backend =
        CudaBackend::new(device.clone(), &CudaConfig { dtype: Dtype::F32, family: KernelFamily::Vector, threads: 1 })?;
    let mut rows = backend.buffer(3, 40, Kind::Full)?;
    let term = backend.buffer(3, 40, Kind::Full)?;
    backend.add(&mut rows, &term, None, 3)?;
    match backend.host(&mut rows, 3)? {
        HostSlice::F32(values) => assert_eq!(*values, [0.0; 120]),
        HostSlice::Bf16(_) => panic!("a Full buffer is f32"),
    }
    Ok(())
}

fn refused(opened: Result<impl Sized, Fault>, kind: FaultKind, text: &str) {
    let fault = opened.err().unwrap();
    assert_eq!((fault.kind, fault.text.as_str()), (kind, text));
}

#[test]
fn what_a_host_lacks_is_one_clear_fault() {
    const SELF: &str = "what_a_host_lacks_is_one_clear_fault";
    use FaultKind::{DeviceLost, Incompatible, OutOfMemory};
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
            let device = Device::open(0, Some(MEMORY)).unwrap();
            adds(&device).unwrap();
            refused(adds(&device), DeviceLost, "cuLaunchKernel: CUDA_ERROR_LAUNCH_FAILED");
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

fn scratch(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// Every image that a program has built in, by source, capability and file.
fn images() -> impl Iterator<Item = (&'static Text, u32, PathBuf)> {
    let folder = scratch("built-in");
    CAPABILITIES.into_iter().flat_map(move |capability| {
        let folder = folder.clone();
        SOURCES.iter().map(move |source| (source, capability, folder.join(file(source, capability))))
    })
}

/// Opens a GPU with the images of [`images`] built in.
fn opened() -> Result<Arc<Device>, Fault> {
    let read: Vec<_> = images().map(|(source, gpu, path)| (source.name, gpu, std::fs::read(path).unwrap())).collect();
    let images: Vec<_> =
        read.iter().map(|&(source, capability, ref bytes)| Image { source, capability, bytes }).collect();
    Device::open_with(0, Some(MEMORY), &images)
}

#[test]
fn kernels_that_are_built_in_need_no_nvrtc() {
    const SELF: &str = "kernels_that_are_built_in_need_no_nvrtc";
    const NO_NVRTC: &str = "no NVRTC (libnvrtc.so) to compile kernels for this GPU with";
    let lacks = |opened, why: &str| refused(opened, FaultKind::Incompatible, &format!("{NO_NVRTC}; {why}"));
    match case().as_deref() {
        Some("make") => {
            std::fs::create_dir_all(scratch("built-in")).unwrap();
            for (source, capability, path) in images() {
                std::fs::write(path, compile(source, capability).unwrap().image).unwrap();
            }
        }
        Some("runs") => adds(&opened().unwrap()).unwrap(),
        Some("none") => lacks(Device::open_with(0, Some(MEMORY), &[]), "none are built into this program"),
        Some("later") => {
            let built = "sm_80, sm_89, sm_90a, sm_100a, sm_120a";
            lacks(opened(), &format!("those built in are for {built}, none of which sm_103 runs"));
        }
        Some("refused") => {
            lacks(opened(), "those built in can't be loaded: cuModuleLoadData: CUDA_ERROR_INVALID_IMAGE");
        }
        Some(other) => panic!("no case {other}"),
        None => {
            passes(SELF, "make", &[]);
            let Some(stack) = stack() else { return };
            // The driver alone.
            let alone = scratch("no-nvrtc");
            std::fs::create_dir_all(&alone).unwrap();
            std::fs::copy(stack.folder().join("libcuda.so"), alone.join("libcuda.so")).unwrap();
            let alone = ("LD_LIBRARY_PATH", alone.to_str().unwrap());
            let capability = |gpu| ("FAKE_CUDA_CAPABILITY", gpu);
            let bad = ("FAKE_CUDA_FAIL", "cuModuleLoadData:1:200");
            for gpu in ["80", "86", "89", "90", "100", "120"] {
                passes(SELF, "runs", &[alone, capability(gpu)]);
            }
            // What is not built in, or can't be loaded, is compiled.
            passes(SELF, "runs", &[capability("103")]);
            passes(SELF, "runs", &[bad]);
            if Command::new("sh").args(["-c", "ldconfig -p | grep -q libnvrtc"]).status().is_ok_and(|s| s.success()) {
                let line = b"SKIPPED: a host without NVRTC is not tested: this one has it\n";
                return std::io::stderr().write_all(line).unwrap();
            }
            passes(SELF, "none", &[alone]);
            passes(SELF, "later", &[alone, capability("103")]);
            passes(SELF, "refused", &[alone, bad]);
        }
    }
}

/// Runs the worker's build script: what it says, and what it leaves to be built in.
fn scripted(script: &Path, folder: Option<&Path>) -> (String, String) {
    let out = scratch("built-in-out");
    let _ = std::fs::remove_dir_all(&out);
    std::fs::create_dir_all(&out).unwrap();
    let mut command = Command::new(script);
    command.env("OUT_DIR", &out).env_remove("CONCLAVE_CUBINS").envs(folder.map(|folder| ("CONCLAVE_CUBINS", folder)));
    let ran = command.output().unwrap();
    assert!(ran.status.success(), "{ran:?}");
    let left = std::fs::read_to_string(out.join("images.rs")).unwrap_or_default();
    (String::from_utf8(ran.stdout).unwrap(), left)
}

#[test]
fn images_of_other_texts_are_not_built_in() {
    let (script, folder) = (scratch("worker-build"), scratch("built-in-folder"));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../worker/build.rs");
    let made = Command::new("rustc").args(["--edition", "2024", "-o"]).args([&script, &source]).status().unwrap();
    assert!(made.success());
    assert_eq!(scripted(&script, None).1, "[\n]\n");
    assert_eq!(scripted(&script, Some(Path::new(""))).1, "[\n]\n");

    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    let names = || images().map(|(_, _, path)| folder.join(path.file_name().unwrap()));
    names().for_each(|path| std::fs::write(path, "an image").unwrap());
    let (said, left) = scripted(&script, Some(&folder));
    assert_eq!(left.matches("include_bytes!").count(), SOURCES.len() * CAPABILITIES.len(), "{said} {left}");

    // As one is called that was made before a change.
    let one = names().find(|path| path.to_string_lossy().contains("experts-sm_89-")).unwrap();
    std::fs::rename(&one, folder.join("experts-sm_89-0123456789abcdef.cubin")).unwrap();
    let (said, left) = scripted(&script, Some(&folder));
    let why = format!(
        "cargo::error=CONCLAVE_CUBINS: there is no {}: none was made of experts.cu as it is now",
        one.display()
    );
    assert!(said.contains(&why) && left.is_empty(), "{said} {left}");
}
