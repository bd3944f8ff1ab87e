//! Weights kept in the codes that they are stored in, widened a chunk at a time into the words that the register tiles
//! read. Panels and lanes are those of [`super::pack`]; every plane is `[panel][index][output]`:
//!
//! ```text
//! codes     a byte a pair of inputs (even in the lower nibble), or a byte an input
//! scales, minima, points    as [`model::keep`] lays them out
//! ```

use super::aligned::Aligned;
use super::lanes::{LANES, Lanes};
use super::math::round_half;
use super::pack::PANEL;
use super::pool::Pool;
use super::shared::Shared;
use crate::load::codes::Group;
use half::{bf16, f16};
use model::fault::Fault;
use model::keep::{self, Coding, is_nibble};
use model::quant::{Code, ScaleFormat, Scales, Scheme};
use std::sync::atomic::{AtomicBool, Ordering};

/// Pairs of inputs that are widened at once: 16 KiB of a panel of bf16, a multiple of AMX's blocks.
pub const TILE_PAIRS: usize = 64;
/// Words of the widest tile.
pub const TILE_WORDS: usize = TILE_PAIRS * 2 * PANEL;

/// Stored rows, one byte a code.
pub trait Codes: Sync {
    fn scheme(&self) -> Scheme;
    /// The first input's place in the stored row, from which groups are counted.
    fn first(&self) -> usize;
    fn codes(&self, row: usize, out: &mut [u8]);
    /// The groups that the row touches.
    fn groups(&self, row: usize, out: &mut [Group]);
}

/// `count` entries an output, each of `each` bytes.
struct Plane {
    bytes: Aligned<u8>,
    count: usize,
    each: usize,
}

impl Plane {
    fn new(rows: usize, count: usize, each: usize) -> Result<Plane, Fault> {
        Ok(Plane { bytes: Aligned::zeroed(rows.next_multiple_of(LANES) * count * each)?, count, each })
    }

    /// Offset of an entry.
    #[inline(always)]
    fn at(&self, (panel, width): (usize, usize), index: usize, lane: usize) -> usize {
        (panel * PANEL * self.count + index * width + lane) * self.each
    }

    #[inline(always)]
    fn pointer(&self, place: (usize, usize), index: usize, lane: usize) -> *const u8 {
        debug_assert!(index < self.count);
        self.bytes.as_ptr().wrapping_add(self.at(place, index, lane))
    }
}

/// A matrix of codes.
pub struct Coded {
    scheme: Scheme,
    /// Inputs of a run, and of a span of runs that share a nested scale.
    run: usize,
    span: usize,
    codes: Plane,
    scales: Plane,
    integers: Plane,
    minima: Plane,
    minimum_integers: Plane,
    points: Plane,
}

impl Coded {
    /// `None` where codes are not kept ([`Coding::of`]), or can't be: numbers that are not finite or do not fit their format.
    pub fn new(
        pool: &Pool,
        source: &dyn Codes,
        (rows, cols): (usize, usize),
        segments: usize,
        wide: bool,
    ) -> Result<Option<Coded>, Fault> {
        let scheme = source.scheme();
        let Some(coding) = Coding::of(scheme, source.first(), cols, segments, wide) else { return Ok(None) };
        let Coding { run, span, .. } = coding;
        let [codes, scales, integers, minima, minimum_integers, points] =
            coding.planes().map(|keep::Plane { count, each }| Plane::new(rows, count, each));
        let (codes, scales, integers) = (codes?, scales?, integers?);
        let (minima, minimum_integers, points) = (minima?, minimum_integers?, points?);
        let mut coded = Coded { scheme, run, span, codes, scales, integers, minima, minimum_integers, points };
        let fits = coded.fill(pool, source, (rows, cols));
        Ok(fits.then_some(coded))
    }

    pub fn bytes(&self) -> usize {
        self.planes().iter().map(|plane| plane.bytes.len()).sum()
    }

    fn planes(&self) -> [&Plane; 6] {
        [&self.codes, &self.scales, &self.integers, &self.minima, &self.minimum_integers, &self.points]
    }

    fn fill(&mut self, pool: &Pool, source: &dyn Codes, (rows, cols): (usize, usize)) -> bool {
        let (scheme, run, span) = (self.scheme, self.run, self.span);
        let format = match scheme.scales {
            Scales::Single(format) => format,
            Scales::Nested { .. } => ScaleFormat::F16,
        };
        let first = source.first();
        let touched = (first + cols).div_ceil(scheme.group) - first / scheme.group;
        let fits = AtomicBool::new(true);
        let planes = [
            &mut self.codes,
            &mut self.scales,
            &mut self.integers,
            &mut self.minima,
            &mut self.minimum_integers,
            &mut self.points,
        ]
        .map(|plane| (plane.count, plane.each, Shared::new(&mut plane.bytes)));
        pool.run(rows.div_ceil(PANEL), &|panel| {
            let width = (rows - panel * PANEL).min(PANEL).next_multiple_of(LANES);
            // SAFETY: panels do not overlap.
            let mut parts = planes.each_ref().map(|(count, each, shared)| unsafe {
                shared.part(panel * PANEL * count * each, width * count * each)
            });
            let mut bytes = vec![0u8; cols];
            let mut groups = vec![Group::scaled(0.0); touched];
            for (lane, row) in (panel * PANEL..rows.min((panel + 1) * PANEL)).enumerate() {
                source.codes(row, &mut bytes);
                source.groups(row, &mut groups);
                let mut good = spread(scheme.code, &bytes, (width, lane), parts[0]);
                let group = |k: usize| &groups[(first + k) / scheme.group - first / scheme.group];
                for (index, k) in (0..cols).step_by(span).enumerate() {
                    let mut number = |plane: usize, value: f32| {
                        let each = planes[plane].1;
                        let at = (index * width + lane) * each;
                        good &= write(format, value, &mut parts[plane][at..at + each]);
                    };
                    number(1, group(k).scale);
                    if planes[3].0 > 0 {
                        number(3, group(k).minimum);
                    }
                }
                for (index, k) in (0..cols).step_by(run).enumerate() {
                    let (group, at) = (group(k), index * width + lane);
                    for (plane, byte) in
                        [(2, (group.integer + 128) as u8), (4, group.minimum_integer), (5, group.point)]
                    {
                        if planes[plane].0 > 0 {
                            parts[plane][at] = byte;
                        }
                    }
                }
                if !good {
                    fits.store(false, Ordering::Relaxed);
                }
            }
        });
        fits.into_inner()
    }

    /// One row's values, as the multiplication sees them.
    pub fn row(&self, (panel, width): (usize, usize), lane: usize, wide: bool, out: &mut [f32]) {
        let byte = |plane: &Plane, index: usize| plane.bytes[plane.at((panel, width), index, lane)];
        let nested = self.integers.count > 0;
        let half = !wide;
        for (index, out) in out.chunks_mut(self.run).enumerate() {
            let k = index * self.run;
            let (mut scale, mut minimum) = (self.number(&self.scales, (panel, width), k / self.span, lane), 0.0);
            if nested {
                scale *= f32::from(byte(&self.integers, index)) - 128.0;
            }
            if self.minima.count > 0 {
                minimum = self.number(&self.minima, (panel, width), k / self.span, lane);
                if nested {
                    minimum *= f32::from(byte(&self.minimum_integers, index));
                }
            }
            let point = (self.points.count > 0).then(|| byte(&self.points, index));
            for (i, out) in out.iter_mut().enumerate() {
                let code = match is_nibble(self.scheme.code) {
                    true => byte(&self.codes, (k + i) / 2) >> (4 * (i % 2)) & 15,
                    false => byte(&self.codes, k + i),
                };
                let mut value = self.scheme.code.decode(code, point) * scale;
                if self.minima.count > 0 {
                    value -= minimum;
                }
                *out = if half { round_half(value).to_f32() } else { value };
            }
        }
    }

    fn number(&self, plane: &Plane, place: (usize, usize), index: usize, lane: usize) -> f32 {
        let at = plane.at(place, index, lane);
        read(plane.each, self.is_bf16(), &plane.bytes[at..at + plane.each])
    }

    fn is_bf16(&self) -> bool {
        self.scheme.scales == Scales::Single(ScaleFormat::Bf16)
    }

    /// Writes `pairs` pairs of inputs from input `first` on, and `pad` pairs of zeros after them, as words of a panel.
    ///
    /// # Safety
    /// The inputs are the matrix's, `first` is even, and `out` holds the words.
    #[inline(always)]
    pub unsafe fn widen<L: Lanes>(
        &self,
        place: (usize, usize),
        (first, pairs, pad): (usize, usize, usize),
        wide: bool,
        out: *mut u32,
    ) {
        unsafe {
            match self.scheme.code {
                Code::E4m3 => self.shifted::<L, Fp8>(place, first, pairs, wide, out),
                code if is_nibble(code) => self.shifted::<L, Nibble<L>>(place, first, pairs, wide, out),
                _ => self.shifted::<L, Byte<L>>(place, first, pairs, wide, out),
            }
            let each = place.1 * if wide { 2 } else { 1 };
            std::ptr::write_bytes(out.add(pairs * each), 0, pad * each);
        }
    }

    #[inline(always)]
    unsafe fn shifted<L: Lanes, D: Decode<L>>(
        &self,
        place: (usize, usize),
        first: usize,
        pairs: usize,
        wide: bool,
        out: *mut u32,
    ) {
        unsafe {
            match wide {
                true => self.lanes::<L, D, true>(place, first, pairs, out),
                false => self.lanes::<L, D, false>(place, first, pairs, out),
            }
        }
    }

    #[inline(always)]
    unsafe fn lanes<L: Lanes, D: Decode<L>, const WIDE: bool>(
        &self,
        place: (usize, usize),
        first: usize,
        pairs: usize,
        out: *mut u32,
    ) {
        let (width, end) = (place.1, first + 2 * pairs);
        let offset = match self.scheme.code {
            Code::Integer { offset, .. } if self.points.count == 0 => offset as f32,
            _ => 0.0,
        };
        let mut table = [0.0f32; LANES];
        for (code, slot) in table.iter_mut().enumerate() {
            *slot = self.scheme.code.decode(code as u8, (self.points.count > 0).then_some(0));
        }
        unsafe {
            let decoder = D::new(&table, offset);
            let mut k = first;
            while k < end {
                let run = k / self.run;
                let stop = end.min((run + 1) * self.run);
                for lane in (0..width).step_by(LANES) {
                    let scale = self.factor::<L>((&self.scales, &self.integers, 128.0), place, (k, run), lane);
                    let minimum = match self.minima.count {
                        0 => L::splat(0.0),
                        _ => self.factor::<L>((&self.minima, &self.minimum_integers, 0.0), place, (k, run), lane),
                    };
                    let point = match self.points.count {
                        0 => L::splat(0.0),
                        _ => L::number(L::bytes(self.points.pointer(place, run, lane))),
                    };
                    let mut codes = self.codes.pointer(place, if D::NIBBLES { k / 2 } else { k }, lane);
                    let mut to = out.add((k - first) / 2 * width * if WIDE { 2 } else { 1 } + lane);
                    for _ in 0..(stop - k) / 2 {
                        let (mut even, mut odd) = decoder.pair(codes, width);
                        if self.points.count > 0 {
                            (even, odd) = (L::sub(even, point), L::sub(odd, point));
                        }
                        (even, odd) = (L::mul(even, scale), L::mul(odd, scale));
                        if self.minima.count > 0 {
                            (even, odd) = (L::sub(even, minimum), L::sub(odd, minimum));
                        }
                        if WIDE {
                            L::store(to.cast(), even);
                            L::store(to.add(width).cast(), odd);
                        } else {
                            L::store_bits(to, L::pair(even, odd));
                        }
                        codes = codes.add(width * if D::NIBBLES { 1 } else { 2 });
                        to = to.add(width * if WIDE { 2 } else { 1 });
                    }
                }
                k = stop;
            }
        }
    }

    /// Sixteen outputs' scale or minimum of a run.
    #[inline(always)]
    unsafe fn factor<L: Lanes>(
        &self,
        (plane, integers, offset): (&Plane, &Plane, f32),
        place: (usize, usize),
        (k, run): (usize, usize),
        lane: usize,
    ) -> L::F {
        let p = plane.pointer(place, k / self.span, lane);
        unsafe {
            let number = match plane.each {
                4 => L::load(p.cast()),
                2 if self.is_bf16() => L::load_half(p.cast()),
                2 => L::from_half(L::shorts(p.cast())),
                _ => L::power(L::bytes(p)),
            };
            match integers.count {
                0 => number,
                _ => {
                    let integer = L::number(L::bytes(integers.pointer(place, run, lane)));
                    L::mul(number, L::sub(integer, L::splat(offset)))
                }
            }
        }
    }
}

/// Writes a row's codes to its lane; false where one is NaN.
fn spread(code: Code, bytes: &[u8], (width, lane): (usize, usize), out: &mut [u8]) -> bool {
    if is_nibble(code) {
        for (pair, both) in bytes.chunks_exact(2).enumerate() {
            out[pair * width + lane] = both[0] | both[1] << 4;
        }
        return true;
    }
    for (k, &byte) in bytes.iter().enumerate() {
        out[k * width + lane] = byte;
    }
    code != Code::E4m3 || bytes.iter().all(|byte| byte & 0x7f != 0x7f)
}

/// Past this a product with a code might leave f32's range.
const GREATEST: f32 = 1e30;

/// Writes a scale in its format; false where it is not one of its numbers, or not fit for arithmetic.
fn write(format: ScaleFormat, value: f32, out: &mut [u8]) -> bool {
    let bits = value.to_bits();
    match format {
        ScaleFormat::F32 => out.copy_from_slice(&bits.to_le_bytes()),
        ScaleFormat::F16 => out.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
        ScaleFormat::Bf16 => out.copy_from_slice(&((bits >> 16) as u16).to_le_bytes()),
        ScaleFormat::E8m0 => out[0] = (bits >> 23) as u8,
    }
    value.abs() < GREATEST && read(out.len(), format == ScaleFormat::Bf16, out).to_bits() == bits
}

fn read(each: usize, is_bf16: bool, bytes: &[u8]) -> f32 {
    match each {
        4 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        2 if is_bf16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        2 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        _ => f32::from_bits(u32::from(bytes[0]) << 23),
    }
}

/// How codes become numbers.
trait Decode<L: Lanes> {
    const NIBBLES: bool;
    unsafe fn new(table: &[f32; LANES], offset: f32) -> Self;
    /// A pair of inputs of sixteen outputs; rows of codes are `width` apart.
    unsafe fn pair(&self, p: *const u8, width: usize) -> (L::F, L::F);
}

/// An entry of a table of sixteen.
struct Nibble<L: Lanes>(L::F);

impl<L: Lanes> Decode<L> for Nibble<L> {
    const NIBBLES: bool = true;
    #[inline(always)]
    unsafe fn new(table: &[f32; LANES], _offset: f32) -> Self {
        unsafe { Nibble(L::load(table.as_ptr())) }
    }
    #[inline(always)]
    unsafe fn pair(&self, p: *const u8, _width: usize) -> (L::F, L::F) {
        unsafe {
            let codes = L::bytes(p);
            (L::lookup(self.0, codes), L::lookup(self.0, L::right::<4>(codes)))
        }
    }
}

/// An integer.
struct Byte<L: Lanes>(L::F);

impl<L: Lanes> Decode<L> for Byte<L> {
    const NIBBLES: bool = false;
    #[inline(always)]
    unsafe fn new(_table: &[f32; LANES], offset: f32) -> Self {
        unsafe { Byte(L::splat(offset)) }
    }
    #[inline(always)]
    unsafe fn pair(&self, p: *const u8, width: usize) -> (L::F, L::F) {
        unsafe {
            let (even, odd) = (L::number(L::bytes(p)), L::number(L::bytes(p.add(width))));
            (L::sub(even, self.0), L::sub(odd, self.0))
        }
    }
}

/// E4M3 by way of f16, whose conversion knows subnormals whatever the mode of arithmetic is.
struct Fp8;

impl<L: Lanes> Decode<L> for Fp8 {
    const NIBBLES: bool = false;
    #[inline(always)]
    unsafe fn new(_table: &[f32; LANES], _offset: f32) -> Self {
        Fp8
    }
    #[inline(always)]
    unsafe fn pair(&self, p: *const u8, width: usize) -> (L::F, L::F) {
        unsafe {
            // Exponents are biased by 7 here and by 15 there.
            let scale = L::splat(256.0);
            let one = |codes: L::I| L::mul(L::from_half(L::spread_fp8(codes)), scale);
            (one(L::bytes(p)), one(L::bytes(p.add(width))))
        }
    }
}
