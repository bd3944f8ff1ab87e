//! Matrices that stay in their codes: every scheme of GGUF's blocks, and of codes whose scales lie beside them.

use super::{Case, near, same_bits, view};
use crate::backend::{Backend, Kind, MatrixView};
use crate::load::beside::{Beside, Packing, Points, Side};
use crate::load::codes;
use crate::load::widen::widen;
use half::{bf16, f16};
use model::keep::{self, Coding, Stored};
use model::quant::{Code, Format, ScaleFormat, Scales, Scheme, Shift};

const ROWS: usize = 72;
const STORED: usize = 512;
/// First row, rows, first column, columns: whole groups, and runs that a cut has left of them.
const WINDOWS: [(usize, usize, usize, usize); 3] = [(0, ROWS, 0, STORED), (3, 20, 32, 96), (1, 7, 4, 200)];

/// Offsets of a block's f16 numbers.
pub fn halves_of(format: Format) -> &'static [usize] {
    match format {
        Format::Q4_1 | Format::Q5_1 | Format::Q4K | Format::Q5K => &[0, 2],
        Format::Q2K => &[80, 82],
        Format::Q3K => &[108],
        Format::Q6K => &[208],
        Format::Mxfp4 => &[],
        _ => &[0],
    }
}

/// Random blocks whose scales are ordinary numbers.
fn blocks<B: Backend>(case: &mut Case<B>, format: Format) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..format.bytes(ROWS * STORED)).map(|_| (case.random.next() >> 32) as u8).collect();
    for block in bytes.chunks_exact_mut(format.block_bytes()) {
        for at in halves_of(format) {
            let number = case.random.values(1)[0] * 0.01;
            block[*at..at + 2].copy_from_slice(&f16::from_f32(number).to_le_bytes());
        }
        if format == Format::Mxfp4 {
            block[0] = 118 + block[0] % 8;
        }
    }
    bytes
}

pub fn blocked<B: Backend>(case: &mut Case<B>) {
    for format in Format::ALL.into_iter().filter(|format| format.scheme().is_some()) {
        let bytes = blocks(case, format);
        check(case, &format!("{format:?}"), &view(format, &bytes, ROWS, STORED));
    }
}

pub fn beside<B: Backend>(case: &mut Case<B>) {
    let integer = |bits, offset| Code::Integer { bits, offset };
    for (format, code, scale, packing, group, shared) in [
        (Format::F8E4m3, Code::E4m3, ScaleFormat::F32, Packing::Bytes { signed: false }, 128, 24),
        (Format::I8, integer(8, 128), ScaleFormat::Bf16, Packing::Bytes { signed: true }, 128, 1),
        (Format::I32, integer(8, 0), ScaleFormat::F16, Packing::Down { bits: 8 }, 64, 1),
        (Format::I32, integer(4, 0), ScaleFormat::F16, Packing::Across, 128, 1),
        (Format::I32, integer(4, 8), ScaleFormat::Bf16, Packing::Rows { bits: 4 }, 32, 1),
        (Format::U8, Code::E2m1, ScaleFormat::E8m0, Packing::Rows { bits: 4 }, 32, 1),
    ] {
        let groups = STORED / group;
        let mut bytes: Vec<u8> = (0..ROWS * STORED).map(|_| (case.random.next() >> 32) as u8).collect();
        if code == Code::E4m3 {
            // No code that is no number.
            bytes.iter_mut().filter(|byte| **byte & 0x7f == 0x7f).for_each(|byte| *byte = 3);
        }
        let numbers: Vec<f32> = case.random.values(ROWS / shared * groups).iter().map(|v| v * 0.01).collect();
        let scales: Vec<u8> = match scale {
            ScaleFormat::F32 => numbers.iter().flat_map(|v| v.to_le_bytes()).collect(),
            ScaleFormat::F16 => numbers.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
            ScaleFormat::Bf16 => numbers.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
            ScaleFormat::E8m0 => numbers.iter().map(|v| 118 + v.to_bits() as u8 % 8).collect(),
        };
        let pointed = matches!(code, Code::Integer { offset: 0, .. });
        let per_word = 32 / code.bits() as usize;
        let stored: Vec<u8> = (0..ROWS * groups * 4).map(|_| (case.random.next() >> 32) as u8).collect();
        let points = pointed.then_some(Points {
            bytes: &stored,
            bits: code.bits(),
            across: packing == Packing::Across,
            word_stride: 1,
            group_stride: ROWS / per_word,
            less_one: packing != Packing::Across,
        });
        let shift = if pointed { Shift::Point } else { Shift::None };
        let beside = Beside {
            scheme: Scheme { code, group, scales: Scales::Single(scale), shift },
            packing,
            outputs: ROWS,
            inputs: STORED,
            scales: Side { bytes: &scales, run: shared, run_stride: groups, group_stride: 1 },
            points,
            order: None,
        };
        let whole = MatrixView { beside: Some(beside), ..view(format, &bytes, ROWS, STORED) };
        check(case, &format!("{code:?} of {packing:?}"), &whole);
    }
}

/// Products with windows of a matrix, and its rows, against its values.
fn check<B: Backend>(case: &mut Case<B>, what: &str, whole: &MatrixView<'_>) {
    for ((row, rows, col, cols), segments) in WINDOWS.into_iter().flat_map(|window| [(window, 1), (window, 2)]) {
        let what = format!("{what}, {rows} rows from {row}, {cols} columns from {col} in {segments}");
        let window = MatrixView { row, rows, col, cols, ..*whole };
        let matrix = case.backend.matrix(&[window], segments).expect("a matrix");
        let scheme = codes::scheme(&window).expect("codes");
        let wide = keep::is_wide(case.dtype, [Stored::Coded(scheme)]);
        let coded = Coding::of(scheme, col, cols, segments, wide).is_some();
        let mut values = vec![0.0; rows * cols];
        for (row, values) in values.chunks_exact_mut(cols).enumerate() {
            widen(&window, row, values);
        }
        // What is not kept in codes is rounded like any other matrix.
        let values = if coded { values } else { case.rounded(&values) };
        let n = 11;
        let x = case.random.values(n * cols);
        let (rounded, input) = (case.rounded(&x), case.buffer(&x, cols, Kind::Input));
        let mut y = case.empty(n, rows, Kind::Full);
        case.backend.matmul(&input, &matrix, None, n, &mut y).expect("a product");
        let got = case.read(&mut y, n);
        for (x, got) in rounded.chunks_exact(cols).zip(got.chunks_exact(rows)) {
            // A code and what is taken from it may each be larger than their difference.
            let size: f64 = x.iter().map(|x| f64::from(x.abs())).sum();
            for (w, got) in values.chunks_exact(cols).zip(got) {
                let most = w.iter().fold(0.0f32, |most, w| most.max(w.abs()));
                let sum: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                near(&what, *got, sum, cols as f64 * 6e-8 * 4.0 * f64::from(most) * size);
            }
        }
        let alone = case.buffer(&x[cols..2 * cols], cols, Kind::Input);
        case.backend.matmul(&alone, &matrix, None, 1, &mut y).expect("a product");
        let alone = case.read(&mut y, 1);
        same_bits(&what, &alone, &got[rows..2 * rows]);
        let mut rows_read = case.empty(2, cols, Kind::Full);
        case.backend.embed(&matrix, 5, &[5, 4 + rows as u32], &mut rows_read).expect("rows");
        let got = case.read(&mut rows_read, 2);
        for (got, want) in got.chunks_exact(cols).zip([&values[..cols], &values[(rows - 1) * cols..]]) {
            let most = want.iter().fold(0.0f32, |most, w| most.max(w.abs()));
            got.iter().zip(want).for_each(|(got, want)| near(&what, *got, f64::from(*want), f64::from(most) * 1e-6));
        }
    }
}
