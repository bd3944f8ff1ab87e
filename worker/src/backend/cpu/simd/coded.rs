//! Weights kept in the codes that they are stored in, spread a chunk at a time into the bf16 pairs that the register tiles
//! read (see [`super::runs`]). Panels and lanes are those of [`super::pack`]; every plane is `[panel][index][output]`:
//!
//! ```text
//! codes     a word for four pairs of inputs (nibbles: the even inputs in its lower half), or a byte an input: a signed
//!           integer, or fp8
//! scales, minima, points    as [`model::keep`] lays them out
//! ```

use super::aligned::Aligned;
use super::lanes::{LANES, Lanes};
use super::pack::PANEL;
use super::pool::Pool;
use super::runs::Factors;
use super::shared::Shared;
use crate::load::codes::Group;
use half::{bf16, f16};
use model::fault::Fault;
use model::keep::{self, Coding};
use model::quant::{Code, ScaleFormat, Scales, Scheme, Shift};

/// Pairs of inputs that are spread at once: 16 KiB of a panel. No run is longer.
pub const TILE_PAIRS: usize = keep::RUN_MAX / 2;
/// Words of a tile.
pub const TILE_WORDS: usize = TILE_PAIRS * PANEL;
/// Bytes of codes that are asked for ahead of their use: between bursts of reading the hardware would ask for too few.
const AHEAD: usize = 4096;
/// Runs that are summed at once.
pub const RUNS_MAX: usize = 16;

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

/// What the plane of codes holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    Nibbles,
    Integers,
    Fp8,
}

/// A matrix of codes.
pub struct Coded {
    scheme: Scheme,
    /// Inputs of a run, and of a span of runs that share a nested scale.
    run: usize,
    span: usize,
    held: Held,
    /// What is held for a code, times this, less `point` or the run's own point, is the code's number.
    unit: f32,
    point: f32,
    /// The numbers of nibbles, before a run's point is taken from them.
    entries: [bf16; 16],
    codes: Plane,
    scales: Plane,
    integers: Plane,
    minima: Plane,
    minimum_integers: Plane,
    points: Plane,
}

/// A matrix of codes as another device's kernels read it.
pub struct Image<'a> {
    /// Inputs of a run, and of a span.
    pub run: usize,
    pub span: usize,
    /// The numbers of nibbles; without, bytes are held.
    pub table: Option<&'a [bf16; 16]>,
    pub fp8: bool,
    pub scale: ScaleFormat,
    pub unit: f32,
    pub point: f32,
    /// Codes, scales, integers, minima, minimum integers, points: bytes, entries an output, bytes of each.
    pub planes: [(&'a [u8], usize, usize); 6],
}

/// Bytes are signed: unsigned ones that have a point of their own are held less this.
const MIDDLE: f32 = 128.0;

impl Coded {
    /// `None` where codes are not kept ([`Coding::of`]).
    pub fn new(
        pool: &Pool,
        source: &dyn Codes,
        (rows, cols): (usize, usize),
        segments: usize,
        wide: bool,
    ) -> Result<Option<Coded>, Fault> {
        let scheme = source.scheme();
        let Some(coding) = Coding::of(scheme, source.first(), cols, segments, wide) else { return Ok(None) };
        let Coding { run, span, nibbles, .. } = coding;
        let [codes, scales, integers, minima, minimum_integers, points] =
            coding.planes().map(|keep::Plane { count, each }| Plane::new(rows, count, each));
        let (codes, scales, integers) = (codes?, scales?, integers?);
        let (minima, minimum_integers, points) = (minima?, minimum_integers?, points?);
        let (held, unit, point) = match scheme.code {
            Code::E4m3 => (Held::Fp8, FP8_UNIT, 0.0),
            _ if nibbles => (Held::Nibbles, 1.0, 0.0),
            Code::E2m1 => (Held::Integers, 0.5, 0.0),
            Code::Integer { bits: 8, offset } => (Held::Integers, 1.0, offset as f32 - MIDDLE),
            Code::Integer { .. } | Code::Iq4Nl => (Held::Integers, 1.0, 0.0),
        };
        let own_point = (scheme.shift == Shift::Point).then_some(0);
        let entries = match held {
            Held::Nibbles => std::array::from_fn(|code| bf16::from_f32(scheme.code.decode(code as u8, own_point))),
            Held::Integers | Held::Fp8 => [bf16::ZERO; 16],
        };
        let mut coded = Coded {
            scheme,
            run,
            span,
            held,
            unit,
            point,
            entries,
            codes,
            scales,
            integers,
            minima,
            minimum_integers,
            points,
        };
        coded.fill(pool, source, (rows, cols));
        Ok(Some(coded))
    }

    pub fn image(&self) -> Image<'_> {
        let scale = match self.scheme.scales {
            Scales::Single(format) => format,
            Scales::Nested { .. } => ScaleFormat::F16,
        };
        let planes = self.planes().map(|plane| (&plane.bytes[..], plane.count, plane.each));
        let (table, fp8) = (self.table(), self.is_fp8());
        Image { run: self.run, span: self.span, table, fp8, scale, unit: self.unit, point: self.point, planes }
    }

    pub fn bytes(&self) -> usize {
        self.planes().iter().map(|plane| plane.bytes.len()).sum()
    }

    /// Pairs of inputs of a run, at most [`TILE_PAIRS`].
    pub fn run_pairs(&self) -> usize {
        self.run / 2
    }

    /// Whether sums of inputs count too.
    pub fn is_shifted(&self) -> bool {
        self.minima.count > 0 || self.points.count > 0 || self.point != 0.0
    }

    fn planes(&self) -> [&Plane; 6] {
        [&self.codes, &self.scales, &self.integers, &self.minima, &self.minimum_integers, &self.points]
    }

    fn fill(&mut self, pool: &Pool, source: &dyn Codes, (rows, cols): (usize, usize)) {
        let (scheme, run, span, held) = (self.scheme, self.run, self.span, self.held);
        let format = match scheme.scales {
            Scales::Single(format) => format,
            Scales::Nested { .. } => ScaleFormat::F16,
        };
        let first = source.first();
        let touched = (first + cols).div_ceil(scheme.group) - first / scheme.group;
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
                hold(held, scheme, &bytes, (width, lane), parts[0]);
                let group = |k: usize| &groups[(first + k) / scheme.group - first / scheme.group];
                for (index, k) in (0..cols).step_by(span).enumerate() {
                    let mut number = |plane: usize, value: f32| {
                        let each = planes[plane].1;
                        let at = (index * width + lane) * each;
                        write(format, value, &mut parts[plane][at..at + each]);
                    };
                    // A code that is no number makes its whole run none: what becomes of it in a sum is the same.
                    let broken = held == Held::Fp8 && bytes[k..k + span].iter().any(|byte| byte & 0x7f == 0x7f);
                    number(1, if broken { f32::NAN } else { group(k).scale });
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
            }
        });
    }

    /// One row's values.
    pub fn row(&self, place: (usize, usize), lane: usize, out: &mut [f32]) {
        let byte = |plane: &Plane, index: usize| plane.bytes[plane.at(place, index, lane)];
        let nested = self.integers.count > 0;
        for (index, out) in out.chunks_mut(self.run).enumerate() {
            let k = index * self.run;
            let (mut scale, mut minimum) = (self.number(&self.scales, place, k / self.span, lane), 0.0);
            if nested {
                scale *= f32::from(byte(&self.integers, index)) - 128.0;
            }
            if self.minima.count > 0 {
                minimum = self.number(&self.minima, place, k / self.span, lane);
                if nested {
                    minimum *= f32::from(byte(&self.minimum_integers, index));
                }
            }
            let point = if self.points.count > 0 { f32::from(byte(&self.points, index)) } else { 0.0 };
            for (i, out) in out.iter_mut().enumerate() {
                let code = match self.held {
                    Held::Nibbles => {
                        let (pair, half) = ((k + i) / 2, (k + i) % 2);
                        let at = self.codes.at(place, pair / 4, lane) + 2 * half + pair % 4 / 2;
                        self.entries[usize::from(self.codes.bytes[at] >> (4 * (pair % 2)) & 15)].to_f32()
                    }
                    Held::Integers => f32::from(byte(&self.codes, k + i) as i8) * self.unit,
                    Held::Fp8 => Code::E4m3.decode(byte(&self.codes, k + i), None),
                };
                *out = (code - (point + self.point)) * scale - minimum;
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

    /// Writes what is held for `pairs` pairs of inputs from input `first` on, as words of a panel.
    ///
    /// # Safety
    /// The inputs are whole runs of the matrix's, and `out` holds the words.
    #[inline(always)]
    pub unsafe fn spread<L: Lanes>(&self, place: (usize, usize), (first, pairs): (usize, usize), out: *mut u32) {
        unsafe {
            match self.held {
                Held::Nibbles => self.nibbles::<L>(place, (first, pairs), out),
                Held::Integers => self.bytes_as::<L, Integers>(place, (first, pairs), out),
                Held::Fp8 => self.bytes_as::<L, Fp8>(place, (first, pairs), out),
            }
        }
    }

    #[inline(always)]
    unsafe fn nibbles<L: Lanes>(&self, place: (usize, usize), (first, pairs): (usize, usize), out: *mut u32) {
        let width = place.1;
        unsafe {
            let table = L::table(&self.entries);
            for four in 0..pairs / 4 {
                let from = self.codes.pointer(place, first / 8 + four, 0).cast::<u32>();
                let to = out.add(four * 4 * width);
                for lane in (0..width).step_by(LANES) {
                    let (v, to) = (L::load_bits(from.add(lane)), to.add(lane));
                    L::prefetch_far(from.wrapping_add(lane + AHEAD / 4).cast());
                    L::store_bits(to, L::codes::<0>(table, v));
                    L::store_bits(to.add(width), L::codes::<1>(table, v));
                    L::store_bits(to.add(2 * width), L::codes::<2>(table, v));
                    L::store_bits(to.add(3 * width), L::codes::<3>(table, v));
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn bytes_as<L: Lanes, B: Bytes<L>>(
        &self,
        place: (usize, usize),
        (first, pairs): (usize, usize),
        out: *mut u32,
    ) {
        let width = place.1;
        unsafe {
            for pair in 0..pairs {
                let from = self.codes.pointer(place, first + 2 * pair, 0);
                // A line each: a panel is no wider.
                L::prefetch_far(from.wrapping_add(AHEAD));
                L::prefetch_far(from.wrapping_add(width + AHEAD));
                for lane in (0..width).step_by(LANES) {
                    let from = from.add(lane);
                    L::store_bits(out.add(pair * width + lane), L::pair(B::number(from), B::number(from.add(width))));
                }
            }
        }
    }

    /// Four pairs of inputs of sixteen outputs: the even ones and the odd ones of each pair.
    ///
    /// # Safety
    /// `first` begins four pairs of the matrix, and `lane` a vector of the panel.
    #[inline(always)]
    pub unsafe fn four<L: Lanes, D: Decode<L>>(
        &self,
        decode: &D,
        place: (usize, usize),
        first: usize,
        lane: usize,
    ) -> [[L::F; 2]; 4] {
        let index = if D::NIBBLES { first / 8 } else { first };
        let (p, width) = (self.codes.pointer(place, index, lane), place.1);
        unsafe {
            // A line of nibbles is a vector's, one of bytes the whole panel's.
            let lines = match D::NIBBLES {
                true => 1,
                false if lane == 0 => 8,
                false => 0,
            };
            for line in 0..lines {
                L::prefetch_far(p.wrapping_add(line * width + AHEAD));
            }
            decode.four(p, width)
        }
    }

    /// The entries of nibbles' table, or `None` where bytes are held.
    pub fn table(&self) -> Option<&[bf16; 16]> {
        (self.held == Held::Nibbles).then_some(&self.entries)
    }

    pub fn is_fp8(&self) -> bool {
        self.held == Held::Fp8
    }

    /// Writes scales and shifts of `runs` runs from input `first` on: what a run's sum is multiplied by, and what the sum of
    /// its inputs is.
    ///
    /// # Safety
    /// The runs are the matrix's; `out` is valid for writes.
    #[inline(always)]
    pub unsafe fn factors<L: Lanes>(&self, place: (usize, usize), (first, runs): (usize, usize), out: *mut Factors) {
        unsafe {
            let (unit, constant) = (L::splat(self.unit), L::splat(self.point));
            for index in 0..runs {
                let (k, run) = (first + index * self.run, first / self.run + index);
                for lane in (0..place.1).step_by(LANES) {
                    let scale = self.factor::<L>((&self.scales, &self.integers, 128.0), place, (k, run), lane);
                    L::store((&raw mut (*out).scales[index]).cast::<f32>().add(lane), L::mul(scale, unit));
                    if !self.is_shifted() {
                        continue;
                    }
                    let mut shift = match self.minima.count {
                        0 => L::splat(0.0),
                        _ => self.factor::<L>((&self.minima, &self.minimum_integers, 0.0), place, (k, run), lane),
                    };
                    let mut point = constant;
                    if self.points.count > 0 {
                        point = L::add(point, L::number(L::bytes(self.points.pointer(place, run, lane))));
                    }
                    shift = L::fma(scale, point, shift);
                    L::store((&raw mut (*out).shifts[index]).cast::<f32>().add(lane), shift);
                }
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

/// How what is held for four pairs becomes numbers.
pub trait Decode<L: Lanes> {
    const NIBBLES: bool;
    /// # Safety
    /// As [`Coded::four`]; rows of codes are `width` apart.
    unsafe fn four(&self, p: *const u8, width: usize) -> [[L::F; 2]; 4];
}

/// Entries of a table.
pub struct Nibbles<L: Lanes>(pub L::I);

impl<L: Lanes> Decode<L> for Nibbles<L> {
    const NIBBLES: bool = true;
    #[inline(always)]
    unsafe fn four(&self, p: *const u8, _width: usize) -> [[L::F; 2]; 4] {
        unsafe {
            let v = L::load_bits(p.cast());
            let (a, b) = (L::codes::<0>(self.0, v), L::codes::<1>(self.0, v));
            let (c, d) = (L::codes::<2>(self.0, v), L::codes::<3>(self.0, v));
            [[L::low(a), L::high(a)], [L::low(b), L::high(b)], [L::low(c), L::high(c)], [L::low(d), L::high(d)]]
        }
    }
}

/// A byte's number.
pub trait Bytes<L: Lanes> {
    unsafe fn number(p: *const u8) -> L::F;
}

pub struct Integers;

impl<L: Lanes> Bytes<L> for Integers {
    #[inline(always)]
    unsafe fn number(p: *const u8) -> L::F {
        unsafe { L::number(L::signed(p)) }
    }
}

/// By way of f16, whose conversion knows subnormals whatever the mode of arithmetic is.
pub struct Fp8;

impl<L: Lanes> Bytes<L> for Fp8 {
    #[inline(always)]
    unsafe fn number(p: *const u8) -> L::F {
        unsafe { L::from_half(L::spread_fp8(L::bytes(p))) }
    }
}

/// A byte each.
pub struct Whole<B>(pub B);

impl<L: Lanes, B: Bytes<L>> Decode<L> for Whole<B> {
    const NIBBLES: bool = false;
    #[inline(always)]
    unsafe fn four(&self, p: *const u8, width: usize) -> [[L::F; 2]; 4] {
        let mut pairs = [[unsafe { L::splat(0.0) }; 2]; 4];
        for n in 0..4 {
            let even = p.wrapping_add(2 * n * width);
            pairs[n] = unsafe { [B::number(even), B::number(even.wrapping_add(width))] };
        }
        pairs
    }
}

/// E4M3 as f16 with the same bits of exponent, whose bias is 15 and not 7.
const FP8_UNIT: f32 = 256.0;

/// Writes a row's codes to its lane, which is zero.
fn hold(held: Held, scheme: Scheme, bytes: &[u8], (width, lane): (usize, usize), out: &mut [u8]) {
    let number = |byte: u8| match scheme.code {
        Code::Integer { bits: 8, .. } => f32::from(byte) - MIDDLE,
        Code::E2m1 => 2.0 * scheme.code.decode(byte, None),
        code => code.decode(byte, (scheme.shift == Shift::Point).then_some(0)),
    };
    for (k, &byte) in bytes.iter().enumerate() {
        match held {
            Held::Nibbles => {
                let (pair, half) = (k / 2, k % 2);
                out[(pair / 4 * width + lane) * 4 + 2 * half + pair % 4 / 2] |= byte << (4 * (pair % 2));
            }
            Held::Integers => out[k * width + lane] = number(byte) as i8 as u8,
            Held::Fp8 => out[k * width + lane] = if byte & 0x7f == 0x7f { 0 } else { byte },
        }
    }
}

/// Writes a scale in its format.
fn write(format: ScaleFormat, value: f32, out: &mut [u8]) {
    let bits = value.to_bits();
    match format {
        ScaleFormat::F32 => out.copy_from_slice(&bits.to_le_bytes()),
        ScaleFormat::F16 => out.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
        ScaleFormat::Bf16 => out.copy_from_slice(&((bits >> 16) as u16).to_le_bytes()),
        ScaleFormat::E8m0 => out[0] = (bits >> 23) as u8,
    }
}

fn read(each: usize, is_bf16: bool, bytes: &[u8]) -> f32 {
    match each {
        4 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        2 if is_bf16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        2 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        _ => f32::from_bits(u32::from(bytes[0]) << 23),
    }
}
