//! A window whose needed bytes alone are there has the values, and the digest, of the whole tensor's.

use super::*;
use crate::load::proof::digest;
use crate::load::widen::widen;
use model::catalog::Fused;
use model::quant::{Code, Format, Scheme, Shift};

const OUTPUTS: usize = 64;
const INPUTS: usize = 512;

/// Bytes that are small numbers in most formats.
fn bytes(count: usize, seed: usize) -> Vec<u8> {
    (0..count).map(|i| ((i * 37 + i / 7 + seed * 11) % 61) as u8).collect()
}

/// The same with nothing but what is needed.
fn only(of: &[u8], needs: &[Need<'_>]) -> Vec<u8> {
    let mut left = vec![0xa5; of.len()];
    for need in needs.iter().filter(|need| need.of.as_ptr() == of.as_ptr()) {
        for at in 0..need.strip.bytes().unwrap() {
            let place = need.strip.place(at).start as usize;
            left[place] = of[place];
        }
    }
    left
}

fn check(view: &MatrixView<'_>, what: &str) {
    let needs = needs(view);
    let codes = only(view.bytes, &needs);
    let side = |bytes: &[u8]| only(bytes, &needs);
    let scales = view.beside.map(|b| side(b.scales.bytes));
    let points = view.beside.and_then(|b| b.points).map(|p| side(p.bytes));
    let beside = view.beside.map(|b| Beside {
        scales: Side { bytes: scales.as_ref().unwrap(), ..b.scales },
        points: b.points.map(|p| Points { bytes: points.as_ref().unwrap(), ..p }),
        ..b
    });
    let part = MatrixView { bytes: &codes, beside, ..*view };
    for row in 0..view.rows {
        let (mut want, mut got) = (vec![0.0; view.cols], vec![0.0; view.cols]);
        widen(view, row, &mut want);
        widen(&part, row, &mut got);
        let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&want), bits(&got), "{what}: row {row}");
    }
    assert_eq!(digest(view), digest(&part), "{what}");
}

/// Windows as cuts make them, and others.
const WINDOWS: [(usize, usize, usize, usize); 6] =
    [(0, 16, 0, 512), (8, 8, 0, 512), (0, 16, 256, 256), (3, 1, 64, 64), (5, 6, 33, 70), (15, 1, 511, 1)];

fn windows(view: MatrixView<'_>, what: &str) {
    for (row, rows, col, cols) in WINDOWS {
        check(&MatrixView { row, rows, col, cols, ..view }, &format!("{what} {row}+{rows} {col}+{cols}"));
    }
}

#[test]
fn plain_and_blocked_windows_need_no_more() {
    for format in Format::ALL.into_iter().filter(|f| f.is_plain() || f.block() > 1) {
        let stored = bytes(format.bytes(INPUTS) * OUTPUTS, 1);
        let whole = MatrixView::whole(format, &stored, OUTPUTS, INPUTS);
        windows(whole, &format!("{format:?}"));
        for (index, of, run) in [(1, 2, 1), (1, 4, 16), (0, 3, 5), (2, 3, 4)] {
            let fused = Some(Fused { index, of, run });
            windows(MatrixView { fused, ..whole }, &format!("{format:?} {fused:?}"));
        }
        if format.block() == 1 {
            let stored = bytes(format.bytes(OUTPUTS) * INPUTS, 2);
            for fused in [None, Some(Fused { index: 1, of: 2, run: 1 })] {
                let other = MatrixView {
                    bytes: &stored,
                    stored_cols: OUTPUTS,
                    transposed: true,
                    fused,
                    ..MatrixView::whole(format, &stored, OUTPUTS, INPUTS)
                };
                windows(other, &format!("{format:?} {fused:?} the other way round"));
            }
        }
    }
}

#[test]
fn a_cut_matrix_needs_its_share() {
    let stored = bytes(Format::Bf16.bytes(INPUTS) * OUTPUTS, 1);
    let half = MatrixView { col: 256, cols: 256, ..MatrixView::whole(Format::Bf16, &stored, OUTPUTS, INPUTS) };
    let [need] = &needs(&half)[..] else { panic!("one tensor") };
    assert_eq!(need.strip, Strip { start: 512, run: 512, stride: 1024, count: 64 });
    let rows = MatrixView { row: 16, rows: 16, ..MatrixView::whole(Format::Bf16, &stored, OUTPUTS, INPUTS) };
    assert_eq!(needs(&rows)[0].strip, Strip::of(16 * 1024..32 * 1024));
}

#[test]
fn codes_need_what_lies_beside_them() {
    const GROUP: usize = 32;
    let groups = INPUTS / GROUP;
    let order: Vec<u8> = (0..INPUTS).flat_map(|k| ((k * 5 % groups) as u32).to_le_bytes()).collect();
    for (packing, bits) in [
        (Packing::Bytes { signed: true }, 8),
        (Packing::Rows { bits: 4 }, 4),
        (Packing::Rows { bits: 8 }, 8),
        (Packing::Down { bits: 4 }, 4),
        (Packing::Down { bits: 8 }, 8),
        (Packing::Across, 4),
    ] {
        let codes = bytes(OUTPUTS * INPUTS * bits / 8, 3);
        let (scales, points) = (bytes(OUTPUTS * groups * 2, 4), bytes(OUTPUTS * groups * bits / 8, 5));
        let code = Code::Integer { bits: bits as u32, offset: 0 };
        for outputs_first in [true, false] {
            let each = 32 / bits;
            let (run_stride, group_stride) = if outputs_first { (groups, 1) } else { (1, OUTPUTS) };
            let (word_stride, word_group) = if outputs_first { (groups, 1) } else { (1, OUTPUTS / each) };
            for (points_too, ordered, run) in [(false, false, 1), (true, false, 1), (true, true, 1), (false, false, 4)]
            {
                let across = packing == Packing::Across;
                let side = Points {
                    bytes: &points,
                    bits: bits as u32,
                    across,
                    word_stride,
                    group_stride: word_group,
                    less_one: false,
                };
                let scheme = Scheme {
                    code,
                    group: GROUP,
                    scales: Scales::Single(ScaleFormat::F16),
                    shift: if points_too { Shift::Point } else { Shift::None },
                };
                let beside = Beside {
                    scheme,
                    packing,
                    outputs: OUTPUTS,
                    inputs: INPUTS,
                    scales: Side { bytes: &scales, run, run_stride, group_stride },
                    points: points_too.then_some(side),
                    order: ordered.then_some(&order[..]),
                };
                let view =
                    MatrixView { beside: Some(beside), ..MatrixView::whole(Format::U8, &codes, OUTPUTS, INPUTS) };
                windows(view, &format!("{packing:?} {outputs_first} {points_too} {ordered} {run}"));
            }
        }
    }
}
