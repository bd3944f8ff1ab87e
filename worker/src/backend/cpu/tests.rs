//! The contract suite on every instruction set this host has; all of them, and any number of threads, bit for bit.

use super::simd::Level;
use super::{CpuBackend, CpuConfig};
use crate::backend::suite;
use model::plan::KernelFamily;
use model::quant::Dtype;

fn transcript(dtype: Dtype, family: KernelFamily, threads: usize, level: Level) -> suite::Transcript {
    let config = CpuConfig { dtype, family, threads, spin: 50 };
    suite::run(dtype, &mut || CpuBackend::with_level(config.clone(), level).expect("a backend"))
}

fn every_level_agrees(dtype: Dtype, family: KernelFamily) {
    let want = transcript(dtype, family, 1, Level::portable());
    for level in Level::all() {
        assert!(
            transcript(dtype, family, 2, level) == want,
            "{level:?} differs from portable code, {dtype} {family:?}"
        );
    }
}

#[test]
fn f32_keeps_the_contract_on_every_instruction_set() {
    every_level_agrees(Dtype::F32, KernelFamily::Vector);
}

#[test]
fn bf16_keeps_the_contract_on_every_instruction_set() {
    every_level_agrees(Dtype::Bf16, KernelFamily::Vector);
}

#[test]
fn the_amx_order_keeps_the_contract_on_every_instruction_set() {
    every_level_agrees(Dtype::Bf16, KernelFamily::Amx);
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let want = transcript(dtype, KernelFamily::Vector, 1, Level::best());
        for threads in [2, 3, 5] {
            assert!(transcript(dtype, KernelFamily::Vector, threads, Level::best()) == want, "{threads} threads");
        }
    }
}
