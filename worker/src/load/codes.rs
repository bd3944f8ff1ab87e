//! Rows of quantised tensors as they are stored: a code for each value, scale and shift for each group of them. What
//! [`widen`](super::widen) makes of a row follows from these, bit for bit ([`value`]).
//!
//! A format belongs here when a [`Scheme`] describes it; [`scheme`] and the two readers are all that a backend knows.

use super::blocks::{self, BLOCK_MAX};
use super::widen::row_bytes;
use crate::backend::MatrixView;
use model::keep::Stored;
use model::quant::{Scales, Scheme, Shift};

/// What the values of one group share.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Group {
    /// Exactly a number of the scheme's scale format (f16 where nested).
    pub scale: f32,
    /// Multiplies the scale; from -128 to 127 where nested, else 1.
    pub integer: i16,
    /// Subtracted after scaling ([`Shift::Minimum`]), in the scale's format too; else 0.
    pub minimum: f32,
    /// Multiplies the minimum where nested, else 1.
    pub minimum_integer: u8,
    /// [`Shift::Point`]; else 0.
    pub point: u8,
}

impl Group {
    /// Nothing but a scale.
    pub const fn scaled(scale: f32) -> Group {
        Group { scale, integer: 1, minimum: 0.0, minimum_integer: 1, point: 0 }
    }
}

/// How the values of a window follow from codes. `None`: they are plain numbers, or no scheme describes them (stored the
/// other way round, or in groups that are no runs).
pub fn scheme(view: &MatrixView<'_>) -> Option<Scheme> {
    match view.beside {
        Some(beside) => beside.order.is_none().then_some(beside.scheme),
        None if view.transposed => None,
        None => view.format.scheme(),
    }
}

/// What a window is stored in, to those who decide how it is kept.
pub fn stored(view: &MatrixView<'_>) -> Stored {
    scheme(view).map_or(Stored::Plain(view.format), Stored::Coded)
}

/// The groups that a window touches: first and number, counted along the stored row.
pub fn touched(view: &MatrixView<'_>, group: usize) -> (usize, usize) {
    let first = view.col / group;
    (first, (view.col + view.cols).div_ceil(group) - first)
}

/// The value of a code in its group.
pub fn value(scheme: &Scheme, code: u8, group: &Group) -> f32 {
    let nested = matches!(scheme.scales, Scales::Nested { .. });
    let point = (scheme.shift == Shift::Point).then_some(group.point);
    let scale = if nested { group.scale * f32::from(group.integer) } else { group.scale };
    let code = scheme.code.decode(code, point);
    // 2^128 is past f32, but half of it times twice the code is what it stands for.
    let scaled = if scale == f32::INFINITY { code * 2.0 * f32::from_bits(254 << 23) } else { code * scale };
    match (scheme.shift, nested) {
        (Shift::Minimum, true) => scaled - group.minimum * f32::from(group.minimum_integer),
        (Shift::Minimum, false) => scaled - group.minimum,
        _ => scaled,
    }
}

/// Writes the codes of row `row` of a window that has a scheme, one byte each, to `out`, which holds its columns.
pub fn codes(view: &MatrixView<'_>, row: usize, out: &mut [u8]) {
    assert!(row < view.rows && out.len() == view.cols, "row {row} of {}, {} columns", view.rows, out.len());
    if let Some(beside) = &view.beside {
        return beside.codes(view.bytes, view.stored_row(row), view.col, out);
    }
    let mut all = [0u8; BLOCK_MAX];
    let stored = row_bytes(view, view.stored_row(row));
    let (block, size) = (view.format.block(), view.format.block_bytes());
    let mut at = 0;
    while at < view.cols {
        let column = view.col + at;
        let (index, skip) = (column / block, column % block);
        let count = (block - skip).min(view.cols - at);
        blocks::codes(view.format, &stored[index * size..][..size], &mut all);
        out[at..at + count].copy_from_slice(&all[skip..skip + count]);
        at += count;
    }
}

/// Writes the groups of row `row` of a window that has a scheme to `out`, which holds those that it [`touched`].
pub fn groups(view: &MatrixView<'_>, row: usize, out: &mut [Group]) {
    let Some(scheme) = scheme(view) else { panic!("{:?} has no groups", view.format) };
    let (first, count) = touched(view, scheme.group);
    assert!(row < view.rows && out.len() == count, "row {row} of {}, {} groups", view.rows, out.len());
    if let Some(beside) = &view.beside {
        let row = view.stored_row(row);
        return out.iter_mut().zip(first..).for_each(|(out, group)| *out = beside.group(row, group));
    }
    let stored = row_bytes(view, view.stored_row(row));
    let each = view.format.block() / scheme.group;
    for (index, out) in out.iter_mut().enumerate() {
        let (block, within) = ((first + index) / each, (first + index) % each);
        let bytes = &stored[block * view.format.block_bytes()..][..view.format.block_bytes()];
        *out = blocks::group(view.format, bytes, within);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::suite::halves_of;
    use crate::load::widen::widen;
    use half::f16;
    use model::quant::Format;

    /// Blocks whose scales are small halves, some of them subnormal, and whose other bytes run through everything.
    fn blocks_of(format: Format, count: usize) -> Vec<u8> {
        let scales = halves_of(format);
        let mut bytes = Vec::new();
        for block in 0..count {
            let mut b: Vec<u8> =
                (0..format.block_bytes()).map(|i| ((block * 131 + i * 37 + i * i) % 256) as u8).collect();
            for (n, at) in scales.iter().enumerate() {
                let scale = [0.03, -0.017, 1.2e-6, 700.0][block % 4] * (block + n + 1) as f32;
                b[*at..at + 2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
            }
            if format == Format::Mxfp4 {
                b[0] = 100 + (block % 40) as u8;
            }
            bytes.extend(b);
        }
        bytes
    }

    #[test]
    fn codes_and_groups_make_the_widened_values_of_any_window() {
        for format in Format::ALL.into_iter().filter(|f| f.block() > 1) {
            let (rows, stored_cols) = (3, 1024);
            let bytes = blocks_of(format, rows * stored_cols / format.block());
            for (col, cols) in [(0, 1024), (5, 40), (31, 2), (16, 16), (100, 300), (1023, 1), (250, 520)] {
                let view = MatrixView { col, cols, ..MatrixView::whole(format, &bytes, rows, stored_cols) };
                let scheme = scheme(&view).unwrap();
                let (first, count) = touched(&view, scheme.group);
                let (mut want, mut codes_of) = (vec![0.0; cols], vec![0; cols]);
                let mut groups_of = vec![Group::scaled(0.0); count];
                for row in 0..rows {
                    widen(&view, row, &mut want);
                    codes(&view, row, &mut codes_of);
                    groups(&view, row, &mut groups_of);
                    for k in 0..cols {
                        let got = value(&scheme, codes_of[k], &groups_of[(col + k) / scheme.group - first]);
                        assert_eq!(got.to_bits(), want[k].to_bits(), "{format:?} {row} {col} + {k}: {got} {}", want[k]);
                        assert!(u32::from(codes_of[k]) < 1 << scheme.code.bits());
                    }
                }
            }
        }
    }
}
