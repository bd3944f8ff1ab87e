//! A weight matrix packed for streaming.
//!
//! Outputs are cut into panels of 64 (the last one is narrower, a multiple of 16). A panel holds its pairs of inputs
//! one after the other, each pair-row as wide as the panel; a segment starts a new pair and ends with a whole one
//! (zeros fill it up), so that segments of any length keep apart.
//!
//! ```text
//! bf16:  [panel][pair][output] of (even, odd) in one word        f32:  [panel][pair][even | odd][output]
//! ```

use super::aligned::Aligned;
use super::coded::{Coded, Codes};
use super::lanes::LANES;
use super::math::round_half;
use super::pool::Pool;
use super::shared::Shared;
use model::fault::{Fault, FaultKind};
use std::ops::Range;

/// Outputs of a full panel.
pub const PANEL: usize = 64;

/// A packed `[rows, cols]` matrix.
pub struct Packed {
    pub rows: usize,
    pub cols: usize,
    pub segments: usize,
    /// Pairs of one segment, filled up.
    pub pairs: usize,
    /// Words: pairs of bf16, or bits of f32.
    pub words: Aligned<u32>,
    /// What takes the place of words ([`super::runs`]).
    pub coded: Option<Coded>,
    /// Words are f32.
    pub wide: bool,
}

/// What a packed matrix is made from, row by row.
pub trait Rows: Sync {
    /// Widens a row into `out`.
    fn read(&self, row: usize, out: &mut [f32]);
    /// The row's bytes where it is stored as bf16, which needs no widening.
    fn halves(&self, row: usize) -> Option<&[u8]>;
}

impl Packed {
    /// `wide` stores f32, else bf16 (rounded where the source is finer); segments are filled up to `unit` pairs.
    pub fn new(
        pool: &Pool,
        source: &dyn Rows,
        (rows, cols): (usize, usize),
        segments: usize,
        wide: bool,
        unit: usize,
    ) -> Result<Packed, Fault> {
        check(cols, segments)?;
        let pairs = (cols / segments).div_ceil(2).next_multiple_of(unit);
        let words_each = segments * pairs * if wide { 2 } else { 1 };
        let mut words = Aligned::<u32>::zeroed(rows.next_multiple_of(LANES) * words_each)?;
        let shared = Shared::new(&mut words);
        let shape = Shape { rows, cols, segments, pairs, wide };
        pool.run(rows.div_ceil(PANEL), &|panel| {
            let width = shape.width(panel);
            // SAFETY: panels do not overlap.
            let part = unsafe { shared.part(panel * PANEL * words_each, width * words_each) };
            shape.fill(source, panel, part);
        });
        Ok(Packed { rows, cols, segments, pairs, words, coded: None, wide })
    }

    /// The same matrix kept in its codes, where they are fewer bytes than its words (f32 where `wide`); else `None`.
    pub fn coded(
        pool: &Pool,
        source: &dyn Codes,
        (rows, cols): (usize, usize),
        segments: usize,
        wide: bool,
    ) -> Result<Option<Packed>, Fault> {
        check(cols, segments)?;
        let Some(coded) = Coded::new(pool, source, (rows, cols), segments, wide)? else {
            return Ok(None);
        };
        let words = Aligned::zeroed(0)?;
        Ok(Some(Packed { rows, cols, segments, pairs: cols / segments / 2, words, coded: Some(coded), wide: false }))
    }

    pub fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Outputs of a panel, filled up to whole vectors.
    pub fn width(&self, panel: usize) -> usize {
        self.shape().width(panel)
    }

    /// Where a panel's words begin.
    pub fn panel_start(&self, panel: usize) -> usize {
        panel * PANEL * self.words_each()
    }

    /// Words of one output.
    pub fn words_each(&self) -> usize {
        self.segments * self.pairs * if self.wide { 2 } else { 1 }
    }

    pub fn bytes(&self) -> usize {
        self.words.len() * 4 + self.coded.as_ref().map_or(0, Coded::bytes)
    }

    /// One row, widened: an embedding.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let panel = row / PANEL;
        let (width, lane) = (self.width(panel), row % PANEL);
        if let Some(coded) = &self.coded {
            return coded.row((panel, width), lane, out);
        }
        let length = self.cols / self.segments;
        let start = self.panel_start(panel) + lane;
        for segment in 0..self.segments {
            let pair_start = segment * self.pairs;
            for k in 0..length {
                let pair = pair_start + k / 2;
                out[segment * length + k] = if self.wide {
                    f32::from_bits(self.words[start + (pair * 2 + k % 2) * width])
                } else {
                    f32::from_bits((self.words[start + pair * width] >> (16 * (k % 2))) << 16)
                };
            }
        }
    }

    fn shape(&self) -> Shape {
        Shape { rows: self.rows, cols: self.cols, segments: self.segments, pairs: self.pairs, wide: self.wide }
    }
}

fn check(cols: usize, segments: usize) -> Result<(), Fault> {
    if segments == 0 || !segments.is_power_of_two() || segments > 8 || !cols.is_multiple_of(segments) {
        let text = format!("{cols} inputs can't be summed in {segments} segments");
        return Err(Fault::new(FaultKind::Internal, text));
    }
    Ok(())
}

struct Shape {
    rows: usize,
    cols: usize,
    segments: usize,
    pairs: usize,
    wide: bool,
}

impl Shape {
    fn width(&self, panel: usize) -> usize {
        (self.rows - panel * PANEL).min(PANEL).next_multiple_of(LANES)
    }

    fn fill(&self, source: &dyn Rows, panel: usize, part: &mut [u32]) {
        let rows = panel * PANEL..self.rows.min((panel + 1) * PANEL);
        let width = self.width(panel);
        if !self.wide && self.fill_halves(source, rows.clone(), width, part) {
            return;
        }
        let length = self.cols / self.segments;
        let mut values = vec![0.0f32; self.cols];
        for (lane, row) in rows.enumerate() {
            source.read(row, &mut values);
            for (segment, values) in values.chunks_exact(length.max(1)).enumerate() {
                let start = segment * self.pairs;
                for (k, &value) in values.iter().enumerate() {
                    let pair = start + k / 2;
                    if self.wide {
                        part[(pair * 2 + k % 2) * width + lane] = value.to_bits();
                    } else {
                        part[pair * width + lane] |= (round_half(value).to_bits() as u32) << (16 * (k % 2));
                    }
                }
            }
        }
    }

    /// bf16 to bf16: words move as they are; all rows of the panel advance together, to write whole lines. False, and
    /// nothing written, where a row is stored otherwise.
    fn fill_halves(&self, source: &dyn Rows, rows: Range<usize>, width: usize, part: &mut [u32]) -> bool {
        let length = self.cols / self.segments;
        let mut lanes: [&[u8]; PANEL] = [&[]; PANEL];
        let count = rows.len();
        for (lane, row) in rows.enumerate() {
            match source.halves(row) {
                Some(bytes) => lanes[lane] = bytes,
                None => return false,
            }
        }
        for segment in 0..self.segments {
            let bytes = segment * length * 2;
            for pair in 0..length / 2 {
                let out = &mut part[(segment * self.pairs + pair) * width..][..count];
                let at = bytes + pair * 4;
                for (out, lane) in out.iter_mut().zip(&lanes) {
                    *out = u32::from_le_bytes([lane[at], lane[at + 1], lane[at + 2], lane[at + 3]]);
                }
            }
            if length % 2 == 1 {
                let out = &mut part[(segment * self.pairs + length / 2) * width..][..count];
                let at = bytes + (length - 1) * 2;
                for (out, lane) in out.iter_mut().zip(&lanes) {
                    *out = u16::from_le_bytes([lane[at], lane[at + 1]]) as u32;
                }
            }
        }
        true
    }
}

/// Rows already widened.
pub struct Widened<'a> {
    pub values: &'a [f32],
    pub cols: usize,
}

impl Rows for Widened<'_> {
    fn read(&self, row: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.values[row * self.cols..][..self.cols]);
    }
    fn halves(&self, _row: usize) -> Option<&[u8]> {
        None
    }
}
