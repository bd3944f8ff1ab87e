//! The contract suite on every instruction set this host has; all of them, and any number of threads, bit for bit.

use super::simd::Level;
use super::{CpuBackend, CpuConfig};
use crate::backend::{Backend, HostSlice, Kind, MatrixView, suite};
use half::bf16;
use model::plan::KernelFamily;
use model::quant::{Dtype, Format};

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
    if !Level::best().has_tiles() {
        eprintln!("\n*** AMX TILES ARE NOT TESTED: THIS CPU HAS NONE; only their emulation is ***\n");
    }
    every_level_agrees(Dtype::Bf16, KernelFamily::Amx);
}

/// The probe that decides at start whether tiles are offered runs here on whatever there is.
#[test]
fn the_tile_probe_gives_the_same_bits_on_every_instruction_set() {
    let want = super::amx_probe(Level::portable()).expect("a product");
    assert!(want.iter().any(|bits| *bits != 0));
    for level in Level::all() {
        assert!(super::amx_probe(level).expect("a product") == want, "{level:?}");
    }
    assert_eq!(super::families().contains(&KernelFamily::Amx), Level::best().has_tiles());
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

/// Subnormal, huge, infinite and missing numbers: what `VDPBF16PS` makes of them, the others make too.
#[test]
fn extreme_numbers_agree_on_every_instruction_set() {
    let (rows, outputs, inputs) = (7, 40, 66);
    let mut state = 1u64;
    let mut halves = |n: usize| -> Vec<u16> {
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 48) as u16
        };
        // Exponents of any size, most of them small enough that products and sums are subnormal.
        (0..n).map(|i| if i % 9 == 0 { next() } else { next() & 0x9fff }).collect()
    };
    let (x, w) = (halves(rows * inputs), halves(outputs * inputs));
    let bytes: Vec<u8> = w.iter().flat_map(|v| v.to_le_bytes()).collect();
    let mut results = Vec::new();
    for level in Level::all() {
        let config = CpuConfig { dtype: Dtype::Bf16, family: KernelFamily::Vector, threads: 1, spin: 0 };
        let mut backend = CpuBackend::with_level(config, level).expect("a backend");
        let (format, stored_cols) = (Format::Bf16, inputs);
        let view = MatrixView::whole(format, &bytes, outputs, stored_cols);
        let matrix = backend.matrix(&[view], 2).expect("a matrix");
        let mut input = backend.buffer(rows, inputs, Kind::Input).expect("a buffer");
        let mut out = backend.buffer(rows, outputs, Kind::Full).expect("a buffer");
        if let HostSlice::Bf16(host) = backend.host(&mut input, rows).expect("host access") {
            host.iter_mut().zip(&x).for_each(|(to, from)| *to = bf16::from_bits(*from));
        }
        backend.matmul(&input, &matrix, None, rows, &mut out).expect("a product");
        let HostSlice::F32(host) = backend.host(&mut out, rows).expect("host access") else { panic!("not f32") };
        results.push(host.iter().map(|v| if v.is_nan() { u32::MAX } else { v.to_bits() }).collect::<Vec<_>>());
    }
    assert!(results.iter().all(|r| *r == results[0]));
    assert!(results[0].iter().any(|bits| *bits != u32::MAX), "some sums are numbers");
}
