//! Rows of stored tensors as f32, bit for bit as the formats' authors dequantise them. A window may start and end inside
//! a block.

use super::codes::{self, Group};
use crate::backend::MatrixView;
use half::{bf16, f16};
use model::quant::Format;

/// Writes row `row` of the window to `out`, which holds the window's columns.
pub fn widen(view: &MatrixView<'_>, row: usize, out: &mut [f32]) {
    assert!(row < view.rows && out.len() == view.cols, "row {row} of {}, {} columns", view.rows, out.len());
    if view.beside.is_some_and(|beside| beside.order.is_some()) {
        return ordered(view, row, out);
    }
    if codes::scheme(view).is_some() {
        return coded(view, row, out);
    }
    if view.transposed {
        return column(view, view.stored_row(row), out);
    }
    assert!(view.col + view.cols <= view.stored_cols, "the window is wider than the tensor");
    let stored = row_bytes(view, view.stored_row(row));
    plain(view.format, &stored[view.col * view.format.block_bytes()..], out);
}

/// A row of codes and groups.
fn coded(view: &MatrixView<'_>, row: usize, out: &mut [f32]) {
    let scheme = codes::scheme(view).expect("the caller has looked");
    let (first, count) = codes::touched(view, scheme.group);
    let (mut stored, mut groups) = (vec![0; view.cols], vec![Group::scaled(0.0); count]);
    codes::codes(view, row, &mut stored);
    codes::groups(view, row, &mut groups);
    for (index, group) in groups.iter().enumerate() {
        let from = ((first + index) * scheme.group).saturating_sub(view.col);
        let end = ((first + index + 1) * scheme.group - view.col).min(view.cols);
        for (out, code) in out[from..end].iter_mut().zip(&stored[from..end]) {
            *out = codes::value(&scheme, *code, group);
        }
    }
}

/// A row whose every input names its group.
fn ordered(view: &MatrixView<'_>, row: usize, out: &mut [f32]) {
    let beside = view.beside.expect("the caller has looked");
    let (stored_row, mut stored) = (view.stored_row(row), vec![0; view.cols]);
    beside.codes(view.bytes, stored_row, view.col, &mut stored);
    for (k, (out, code)) in out.iter_mut().zip(stored).enumerate() {
        let group = beside.group(stored_row, beside.group_of(view.col + k));
        *out = codes::value(&beside.scheme, code, &group);
    }
}

/// One column of a matrix stored the other way round.
fn column(view: &MatrixView<'_>, stored: usize, out: &mut [f32]) {
    let width = view.format.block_bytes();
    assert!(view.format.block() == 1, "{:?} has blocks along stored rows", view.format);
    for (k, out) in out.iter_mut().enumerate() {
        let at = ((view.col + k) * view.stored_cols + stored) * width;
        plain(view.format, &view.bytes[at..at + width], std::slice::from_mut(out));
    }
}

/// The bytes of a stored row.
pub fn row_bytes<'a>(view: &MatrixView<'a>, stored_row: usize) -> &'a [u8] {
    let each = view.format.bytes(view.stored_cols);
    &view.bytes[stored_row * each..][..each]
}

fn plain(format: Format, bytes: &[u8], out: &mut [f32]) {
    match format {
        Format::F32 => {
            for (out, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *out = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        Format::Bf16 => {
            for (out, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *out = f32::from_bits((u16::from_le_bytes([b[0], b[1]]) as u32) << 16);
            }
        }
        Format::F16 => {
            for (out, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *out = f16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        coded => unreachable!("{coded:?} is nothing by itself; the loader has refused it"),
    }
}

/// The row's bytes inside the window where they are bf16, which needs no widening.
pub fn halves<'a>(view: &MatrixView<'a>, row: usize) -> Option<&'a [u8]> {
    const { assert!(size_of::<bf16>() == 2) };
    let straight = view.format == Format::Bf16 && !view.transposed && view.beside.is_none();
    let bytes = straight.then(|| row_bytes(view, view.stored_row(row)))?;
    Some(&bytes[view.col * 2..(view.col + view.cols) * 2])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::suite::halves_of;

    fn view(format: Format, bytes: &[u8], stored_cols: usize, col: usize, cols: usize) -> MatrixView<'_> {
        let rows = bytes.len() / format.bytes(stored_cols);
        MatrixView { col, cols, ..MatrixView::whole(format, bytes, rows, stored_cols) }
    }

    /// Bytes whose scales are small normal halves and whose other bytes run through everything.
    fn blocks(format: Format, count: usize) -> Vec<u8> {
        let scales = halves_of(format);
        let mut bytes = Vec::new();
        for block in 0..count {
            let mut b: Vec<u8> =
                (0..format.block_bytes()).map(|i| ((block * 131 + i * 37 + i * i) % 256) as u8).collect();
            for (n, at) in scales.iter().enumerate() {
                b[*at..at + 2].copy_from_slice(&f16::from_f32(0.03 * (block + n + 1) as f32).to_le_bytes());
            }
            bytes.extend(b);
        }
        bytes
    }

    #[test]
    fn a_window_is_a_part_of_the_whole_row_in_every_format() {
        for format in Format::ALL.into_iter().filter(|f| f.is_plain() || f.block() > 1) {
            let cols = 512;
            let bytes = blocks(format, 2 * cols / format.block());
            let mut whole = vec![0.0; cols];
            widen(&view(format, &bytes, cols, 0, cols), 1, &mut whole);
            for (col, count) in [(0, 1), (5, 40), (31, 2), (100, 300), (511, 1)] {
                let mut part = vec![0.0; count];
                widen(&view(format, &bytes, cols, col, count), 1, &mut part);
                let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&part), bits(&whole[col..col + count]), "{format:?} {col} {count}");
            }
        }
    }

    #[test]
    fn known_blocks_have_known_values() {
        let half = f16::from_f32(0.5).to_le_bytes();
        let mut q8 = half.to_vec();
        q8.extend((0..32).map(|i| (i as i8 - 16) as u8));
        let mut out = vec![0.0; 32];
        widen(&view(Format::Q8_0, &q8, 32, 0, 32), 0, &mut out);
        assert_eq!((out[0], out[16], out[31]), (-8.0, 0.0, 7.5));

        let mut q4 = half.to_vec();
        q4.extend((0..16).map(|i| i | ((15 - i) << 4)));
        widen(&view(Format::Q4_0, &q4, 32, 0, 32), 0, &mut out);
        assert_eq!((out[0], out[15], out[16], out[31]), (-4.0, 3.5, 3.5, -4.0));

        let mut q41 = half.to_vec();
        q41.extend(f16::from_f32(-1.0).to_le_bytes());
        q41.extend((0..16).map(|i| i | ((15 - i) << 4)));
        widen(&view(Format::Q4_1, &q41, 32, 0, 32), 0, &mut out);
        assert_eq!((out[0], out[15], out[16], out[31]), (-1.0, 6.5, 6.5, -1.0));
    }

    #[test]
    fn six_bit_weights_find_their_bits_and_scales() {
        // Weight 128 + 2 * 32 + 20: second half, third row: high nibble of low byte 64 + 20, bits 4..6 of high byte
        // 32 + 20, scale 8 + 5.
        let mut block = vec![0u8; 210];
        block[64 + 20] = 0xb0;
        block[128 + 32 + 20] = 0b0010_0000;
        block[192 + 8 + 5] = (-3i8) as u8;
        block[208..].copy_from_slice(&f16::from_f32(0.25).to_le_bytes());
        let mut out = vec![0.0; 256];
        widen(&view(Format::Q6K, &block, 256, 0, 256), 0, &mut out);
        assert_eq!(out[128 + 64 + 20], 0.25 * -3.0 * (0b10_1011 as f32 - 32.0));
        assert_eq!(out[128 + 64 + 21], 0.25 * -3.0 * -32.0);
        assert_eq!(out[0], 0.0);
    }
}
