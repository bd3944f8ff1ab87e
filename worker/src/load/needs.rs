//! Which stored bytes a window takes: of its codes or values, and of what lies beside them.

use super::beside::{Beside, Packing, Points, Side};
use super::codes;
use super::strip::Strip;
use crate::backend::MatrixView;
use model::quant::{ScaleFormat, Scales};
use std::ops::Range;

/// Some bytes of a tensor.
pub struct Need<'a> {
    pub of: &'a [u8],
    /// Counted from the first byte of `of`.
    pub strip: Strip,
}

impl<'a> Need<'a> {
    fn new(of: &'a [u8], strip: Strip) -> Need<'a> {
        let strip = strip.joined();
        let inside = strip.extent().is_some_and(|extent| extent.end <= of.len() as u64);
        assert!(inside, "{strip:?} of a tensor of {} bytes", of.len());
        Need { of, strip }
    }

    fn whole(of: &'a [u8]) -> Need<'a> {
        Need::new(of, Strip::of(0..of.len() as u64))
    }

    /// From the first byte to the last.
    pub fn extent(&self) -> &'a [u8] {
        let extent = self.strip.extent().expect("as it was made");
        &self.of[extent.start as usize..extent.end as usize]
    }
}

/// All that is read of a window when it is widened, packed or proven.
pub fn needs<'a>(view: &MatrixView<'a>) -> Vec<Need<'a>> {
    if view.rows == 0 || view.cols == 0 {
        return Vec::new();
    }
    let rows = Rows::of(view);
    let Some(beside) = &view.beside else { return vec![values(view, &rows)] };
    let groups = match beside.order {
        // Any input may be in any group.
        Some(_) => 0..usize::MAX,
        None => {
            let (first, count) = codes::touched(view, beside.scheme.group);
            first..first + count
        }
    };
    let mut needs = vec![coded(view, beside, &rows), scales(&beside.scales, beside, &rows.span(), &groups)];
    needs.extend(beside.points.as_ref().map(|side| points(side, &rows.span(), &groups)));
    needs.extend(beside.order.map(Need::whole));
    needs
}

/// The stored rows of a window.
struct Rows {
    first: usize,
    step: usize,
    count: usize,
}

impl Rows {
    /// Exactly the window's rows where they are equally far apart, else all from the first to the last.
    fn of(view: &MatrixView<'_>) -> Rows {
        let row = |row: usize| view.stored_row(row);
        let (first, count) = (row(0), view.rows);
        let step = if count > 1 { row(1) - first } else { 1 };
        match view.fused {
            Some(_) if (0..count).any(|r| row(r) != first + r * step) => {
                Rows { first, step: 1, count: row(count - 1) + 1 - first }
            }
            _ => Rows { first, step, count },
        }
    }

    fn span(&self) -> Range<usize> {
        self.first..self.first + (self.count - 1) * self.step + 1
    }

    /// The same bytes of each row of `each` bytes.
    fn bytes(&self, each: usize, bytes: Range<usize>) -> Strip {
        strip(self.first * each + bytes.start, bytes.len(), self.step * each, self.count)
    }
}

fn strip(start: usize, run: usize, stride: usize, count: usize) -> Strip {
    Strip { start: start as u64, run: run as u64, stride: stride as u64, count: count as u64 }
}

/// `across` of each of `down`, where neighbours in `down` are `stride` apart, all in units of `unit` bytes.
fn grid(unit: usize, down: Range<usize>, stride: usize, across: Range<usize>) -> Strip {
    strip((down.start * stride + across.start) * unit, across.len() * unit, stride * unit, down.len())
}

/// Plain numbers or blocks.
fn values<'a>(view: &MatrixView<'a>, rows: &Rows) -> Need<'a> {
    let (block, size) = (view.format.block(), view.format.block_bytes());
    let cols = view.col..view.col + view.cols;
    if view.transposed {
        return Need::new(view.bytes, grid(size, cols, view.stored_cols, rows.span()));
    }
    let bytes = cols.start / block * size..cols.end.div_ceil(block) * size;
    Need::new(view.bytes, rows.bytes(view.format.bytes(view.stored_cols), bytes))
}

fn coded<'a>(view: &MatrixView<'a>, beside: &Beside<'a>, rows: &Rows) -> Need<'a> {
    let cols = view.col..view.col + view.cols;
    let words = |each: usize, of: Range<usize>| of.start / each..of.end.div_ceil(each);
    let strip = match beside.packing {
        Packing::Bytes { .. } => rows.bytes(beside.inputs, cols),
        // Whole words: that is how they are unpacked.
        Packing::Rows { bits } => {
            let words = words(32 / bits as usize, cols);
            rows.bytes(Beside::row_bytes(bits, beside.inputs), words.start * 4..words.end * 4)
        }
        Packing::Down { bits } => grid(4, words(32 / bits as usize, cols), beside.outputs, rows.span()),
        Packing::Across => grid(4, cols, beside.outputs / 8, words(8, rows.span())),
    };
    Need::new(view.bytes, strip)
}

fn scales<'a>(side: &Side<'a>, beside: &Beside<'a>, rows: &Range<usize>, groups: &Range<usize>) -> Need<'a> {
    let Scales::Single(format) = beside.scheme.scales else { unreachable!("nested scales lie in blocks") };
    let unit = match format {
        ScaleFormat::F32 => 4,
        ScaleFormat::F16 | ScaleFormat::Bf16 => 2,
        ScaleFormat::E8m0 => 1,
    };
    let runs = rows.start / side.run..rows.end.div_ceil(side.run);
    beside_each(side.bytes, unit, (runs, side.run_stride), (groups.clone(), side.group_stride))
}

fn points<'a>(side: &Points<'a>, rows: &Range<usize>, groups: &Range<usize>) -> Need<'a> {
    let each = 32 / side.bits as usize;
    let words = rows.start / each..rows.end.div_ceil(each);
    beside_each(side.bytes, 4, (words, side.word_stride), (groups.clone(), side.group_stride))
}

/// Numbers of `unit` bytes by run and group; all of them where neither lies in order.
fn beside_each(
    bytes: &[u8],
    unit: usize,
    (runs, run_stride): (Range<usize>, usize),
    (groups, group_stride): (Range<usize>, usize),
) -> Need<'_> {
    let all = bytes.len() / unit;
    match (run_stride, group_stride) {
        (_, 1) if groups.end <= run_stride => Need::new(bytes, grid(unit, runs, run_stride, groups)),
        (1, _) if groups.end <= all / group_stride => Need::new(bytes, grid(unit, groups, group_stride, runs)),
        _ => Need::whole(bytes),
    }
}

#[cfg(test)]
mod tests;
