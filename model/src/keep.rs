//! How a rank keeps a matrix: in the codes that it is stored in, or widened. One rule for those who count a matrix before
//! it is loaded and those who load it, so that planned bytes are loaded bytes.
//!
//! ```text
//! codes     of up to 4 bits a nibble (four pairs of inputs a word), else a byte
//! scales    a number a span, in the scheme's format; nested: an f16 a span, and a byte a run
//! minima    the same; points: a byte a run
//! words     what is not kept in codes: pairs of bf16, or f32
//! ```
//! A run is what is left of a group once windows and segments have cut it: all runs are alike, and none crosses a cut. Runs
//! are summed one by one, so they must be the same on every mesh.

use crate::plan::KernelFamily;
use crate::quant::{Dtype, Format, ScaleFormat, Scales, Scheme, Shift};

/// Outputs come in vectors of this many, the last one padded.
pub const LANES: usize = 16;

/// What a matrix is stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// Numbers one after the other, or codes that nobody keeps (groups that are no runs of neighbours).
    Plain(Format),
    Coded(Scheme),
}

/// A window of a stored matrix; several, stacked, become one kept matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    pub rows: usize,
    pub cols: usize,
    /// Its first column in the stored row, from where groups are counted.
    pub first: usize,
    pub stored: Stored,
}

/// Whether words are f32: the compute dtype is, and not every part is stored as bf16.
pub fn is_wide(dtype: Dtype, stored: impl IntoIterator<Item = Stored>) -> bool {
    dtype == Dtype::F32 && stored.into_iter().any(|s| s != Stored::Plain(Format::Bf16))
}

/// Pairs of inputs to which a segment is filled up: segments of AMX's bf16 order end with whole tiles.
pub fn unit(family: KernelFamily, wide: bool) -> usize {
    if family == KernelFamily::Amx && !wide { 16 } else { 1 }
}

/// Bytes of the matrix that `parts` are stacked to. Codes are counted wherever their layout allows it: numbers that
/// can't be kept (a NaN among them, a scale out of range) are found only when they are read, and take more.
pub fn bytes(parts: &[Window], segments: usize, dtype: Dtype, family: KernelFamily) -> usize {
    let Some(part) = parts.first() else { return 0 };
    let rows: usize = parts.iter().map(|part| part.rows).sum();
    let wide = is_wide(dtype, parts.iter().map(|part| part.stored));
    let alike = parts.iter().all(|other| other.stored == part.stored && other.first == part.first);
    let coding = match part.stored {
        Stored::Coded(scheme) if alike => Coding::of(scheme, part.first, part.cols, segments, wide),
        Stored::Coded(_) | Stored::Plain(_) => None,
    };
    let rows = rows.next_multiple_of(LANES);
    match coding {
        Some(coding) => rows * coding.bytes_each(),
        None => {
            let pairs = (part.cols / segments).div_ceil(2).next_multiple_of(unit(family, wide));
            rows * segments * pairs * 2 * word(wide)
        }
    }
}

const fn word(wide: bool) -> usize {
    if wide { 4 } else { 2 }
}

/// Most inputs of a run.
pub const RUN_MAX: usize = 128;

/// The planes of a matrix that is kept in codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Coding {
    /// Inputs of a run, and of a span of runs that share a nested scale.
    pub run: usize,
    pub span: usize,
    /// Codes are nibbles.
    pub nibbles: bool,
    pub codes: Plane,
    pub scales: Plane,
    pub integers: Plane,
    pub minima: Plane,
    pub minimum_integers: Plane,
    pub points: Plane,
}

/// `count` entries an output, each of `each` bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plane {
    pub count: usize,
    pub each: usize,
}

impl Coding {
    /// For `cols` inputs of `segments` segments, from input `first` of the stored row on. `None` where codes are not kept:
    /// a run of odd length, or no fewer bytes than the matrix would take widened.
    pub fn of(scheme: Scheme, first: usize, cols: usize, segments: usize, wide: bool) -> Option<Coding> {
        let length = cols / segments;
        // A rank's window begins a whole number of segments into the row, so this is the same wherever the cut runs.
        let cuts = divisor(first, length);
        let run = at_most(RUN_MAX, divisor(scheme.group, cuts));
        let (format, nested, span) = match scheme.scales {
            Scales::Single(format) => (format, false, run),
            Scales::Nested { groups } => (ScaleFormat::F16, true, divisor(scheme.group * groups, cuts)),
        };
        let (minimum, point) = (scheme.shift == Shift::Minimum, scheme.shift == Shift::Point);
        if !run.is_multiple_of(2) || (nested && point) {
            return None;
        }
        let (runs, spans) = (cols / run, cols / span);
        let nibbles = scheme.code.bits() <= 4 && run.is_multiple_of(8);
        let plane = |present: bool, count, each| Plane { count: if present { count } else { 0 }, each };
        let coding = Coding {
            run,
            span,
            nibbles,
            codes: if nibbles { plane(true, cols / 8, 4) } else { plane(true, cols, 1) },
            scales: plane(true, spans, format.bytes()),
            integers: plane(nested, runs, 1),
            minima: plane(minimum, spans, format.bytes()),
            minimum_integers: plane(minimum && nested, runs, 1),
            points: plane(point, runs, 1),
        };
        (coding.bytes_each() < cols * word(wide)).then_some(coding)
    }

    /// In the order of the file's header.
    pub fn planes(&self) -> [Plane; 6] {
        [self.codes, self.scales, self.integers, self.minima, self.minimum_integers, self.points]
    }

    /// Bytes of one output.
    pub fn bytes_each(&self) -> usize {
        self.planes().iter().map(|plane| plane.count * plane.each).sum()
    }
}

/// The largest divisor of `n` that is no more than `most`.
fn at_most(most: usize, n: usize) -> usize {
    (1..=most.min(n)).rev().find(|d| n.is_multiple_of(*d)).unwrap_or(n)
}

fn divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::Code;

    fn window(stored: Stored) -> Window {
        Window { rows: 100, cols: 512, first: 0, stored }
    }

    fn kept(stored: Stored, dtype: Dtype) -> usize {
        bytes(&[window(stored)], 1, dtype, KernelFamily::Vector)
    }

    #[test]
    fn codes_of_up_to_four_bits_take_a_nibble_and_others_a_byte() {
        // 112 rows of 512 inputs, 16 groups of 32 or 2 of 256.
        for (format, each) in [
            (Format::Mxfp4, 256 + 16),
            (Format::Q4_0, 256 + 16 * 2),
            (Format::Q2K, 256 + 2 * 2 * 2 + 2 * 32),
            (Format::Q5_0, 512 + 16 * 2),
            (Format::Q6K, 512 + 2 * 2 + 32),
            (Format::Q8_0, 512 + 16 * 2),
        ] {
            let scheme = format.scheme().unwrap();
            for dtype in [Dtype::F32, Dtype::Bf16] {
                assert_eq!(kept(Stored::Coded(scheme), dtype), 112 * each, "{format:?} {dtype}");
            }
        }
    }

    #[test]
    fn bf16_stays_narrow_and_other_numbers_follow_the_dtype() {
        let plain = |format, dtype| kept(Stored::Plain(format), dtype);
        assert_eq!(plain(Format::Bf16, Dtype::F32), 112 * 512 * 2);
        assert_eq!(plain(Format::F16, Dtype::F32), 112 * 512 * 4);
        assert_eq!(plain(Format::F32, Dtype::Bf16), 112 * 512 * 2);
    }

    #[test]
    fn parts_that_are_not_alike_are_widened_together() {
        let coded = |format: Format| window(Stored::Coded(format.scheme().unwrap()));
        let both = |a, b, dtype| bytes(&[a, b], 1, dtype, KernelFamily::Vector);
        let (q4, q6, bf16) = (coded(Format::Q4K), coded(Format::Q6K), window(Stored::Plain(Format::Bf16)));
        assert_eq!(both(q4, q4, Dtype::F32), 208 * (256 + 2 * 2 * 2 + 2 * 16), "one padding for both");
        assert_eq!(both(q4, q6, Dtype::Bf16), 208 * 512 * 2);
        assert_eq!(both(bf16, bf16, Dtype::F32), 208 * 512 * 2);
        assert_eq!(both(q4, bf16, Dtype::F32), 208 * 512 * 4);
    }

    #[test]
    fn cuts_through_groups_make_shorter_runs() {
        let scheme =
            Scheme { code: Code::E4m3, group: 128, scales: Scales::Single(ScaleFormat::F32), shift: Shift::None };
        let runs =
            |first, cols, segments| Coding::of(scheme, first, cols, segments, false).map(|c| (c.run, c.scales.count));
        assert_eq!(runs(0, 512, 1), Some((128, 4)));
        assert_eq!(runs(64, 512, 1), Some((64, 8)));
        assert_eq!(runs(0, 512, 8), Some((64, 8)));
        assert_eq!(runs(64, 64, 1), Some((64, 1)), "a rank's own segment of the row above");
        assert_eq!(runs(128, 64, 1), Some((64, 1)), "and the next one, which begins with a group");
        assert_eq!(runs(0, 24, 8), None, "a segment of three inputs");
        assert_eq!(runs(4, 512, 1), None, "a scale of four bytes for four inputs saves nothing");
    }

    #[test]
    fn a_long_group_is_several_runs_and_short_runs_share_no_words() {
        let scheme =
            |group| Scheme { code: Code::E2m1, group, scales: Scales::Single(ScaleFormat::F16), shift: Shift::None };
        let of = |group| Coding::of(scheme(group), 0, 768, 1, true).map(|c| (c.run, c.nibbles));
        assert_eq!(of(768), Some((128, true)));
        assert_eq!(of(96), Some((96, true)));
        assert_eq!(of(192), Some((96, true)));
        assert_eq!(of(4), Some((4, false)));
    }

    #[test]
    fn tiles_fill_segments_up_where_words_are_bf16() {
        let part = [Window { rows: 16, cols: 80, first: 0, stored: Stored::Plain(Format::Bf16) }];
        assert_eq!(bytes(&part, 2, Dtype::Bf16, KernelFamily::Vector), 16 * 2 * 20 * 4);
        assert_eq!(bytes(&part, 2, Dtype::Bf16, KernelFamily::Amx), 16 * 2 * 32 * 4);
    }
}
