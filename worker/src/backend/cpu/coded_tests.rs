//! Matrices kept in codes against the same ones widened: every product and every row, bit for bit.

use super::simd::Level;
use super::simd::coded::Codes;
use super::simd::flush::Flush;
use super::simd::pack::{Packed, Rows};
use super::simd::panel::{Input, Source, multiply, multiply_experts};
use super::simd::pool::Pool;
use crate::load::codes::{self, Group};
use half::{bf16, f16};
use model::plan::KernelFamily;
use model::quant::{Code, ScaleFormat, Scales, Scheme, Shift};

/// Made-up rows of a scheme, a window from `first` on.
struct Made {
    scheme: Scheme,
    first: usize,
    cols: usize,
}

/// A number that depends on all three, without a pattern.
fn mixed(a: usize, b: usize, c: usize) -> usize {
    let [a, b, c] = [a, b, c].map(|n| n as u64);
    let mut x = a * 0x9e37_79b9 + b * 0x85eb_ca6b + c * 0xc2b2_ae35 + 0x27d4_eb2f;
    for _ in 0..3 {
        x ^= x >> 15;
        x = x.wrapping_mul(0x2c1b_3c6d_f58a_83a1);
        x ^= x >> 31;
    }
    (x >> 8) as usize
}

impl Made {
    fn code(&self, row: usize, k: usize) -> u8 {
        let code = (mixed(row, self.first + k, 1) % (1 << self.scheme.code.bits())) as u8;
        if self.scheme.code == Code::E4m3 && code & 0x7f == 0x7f { 3 } else { code }
    }

    fn group(&self, row: usize, index: usize) -> Group {
        let number = |salt| {
            let n = mixed(row, index, salt);
            let value = (n % 2001) as f32 / 1000.0 - 1.0;
            match self.scheme.scales {
                Scales::Single(ScaleFormat::F32) => value / 3.0,
                Scales::Single(ScaleFormat::Bf16) => bf16::from_f32(value / 7.0).to_f32(),
                Scales::Single(ScaleFormat::E8m0) => f32::from_bits(((100 + n % 30) as u32) << 23),
                // Some are subnormal in f16.
                _ => f16::from_f32(value * [0.1, 1e-6][n / 2001 % 2]).to_f32(),
            }
        };
        // A span shares its numbers.
        let number = |salt| match self.scheme.scales {
            Scales::Nested { groups } => {
                Made { scheme: Scheme { scales: HALF, ..self.scheme }, ..*self }.group_number(row, index / groups, salt)
            }
            _ => number(salt),
        };
        let mut group = Group::scaled(number(2));
        if matches!(self.scheme.scales, Scales::Nested { .. }) {
            group.integer = (mixed(row, index, 3) % 256) as i16 - 128;
        }
        match self.scheme.shift {
            Shift::None => {}
            Shift::Minimum => {
                group.minimum = number(4);
                if matches!(self.scheme.scales, Scales::Nested { .. }) {
                    group.minimum_integer = (mixed(row, index, 5) % 256) as u8;
                }
            }
            Shift::Point => group.point = (mixed(row, index, 6) % 256) as u8,
        }
        group
    }

    fn group_number(&self, row: usize, index: usize, salt: usize) -> f32 {
        f16::from_f32((mixed(row, index, salt) % 2001) as f32 / 100_000.0 - 0.01).to_f32()
    }
}

const HALF: Scales = Scales::Single(ScaleFormat::F16);

impl Codes for Made {
    fn scheme(&self) -> Scheme {
        self.scheme
    }
    fn first(&self) -> usize {
        self.first
    }
    fn codes(&self, row: usize, out: &mut [u8]) {
        out.iter_mut().enumerate().for_each(|(k, out)| *out = self.code(row, k));
    }
    fn groups(&self, row: usize, out: &mut [Group]) {
        let first = self.first / self.scheme.group;
        out.iter_mut().enumerate().for_each(|(i, out)| *out = self.group(row, first + i));
    }
}

impl Rows for Made {
    fn read(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols);
        for (k, out) in out.iter_mut().enumerate() {
            let group = self.group(row, (self.first + k) / self.scheme.group);
            *out = codes::value(&self.scheme, self.code(row, k), &group);
        }
    }
    fn halves(&self, _row: usize) -> Option<&[u8]> {
        None
    }
}

/// Each code with each kind of scale and shift that may go with it.
fn schemes() -> Vec<Scheme> {
    let integer = |bits, offset| Code::Integer { bits, offset };
    let single = Scales::Single;
    let nested = |groups| Scales::Nested { groups };
    [
        (integer(8, 128), 32, HALF, Shift::None),
        (integer(4, 8), 32, HALF, Shift::None),
        (integer(4, 0), 32, HALF, Shift::Minimum),
        (integer(5, 0), 32, HALF, Shift::Minimum),
        (integer(2, 0), 16, nested(16), Shift::Minimum),
        (integer(3, 4), 16, nested(16), Shift::None),
        (integer(5, 0), 32, nested(8), Shift::Minimum),
        (integer(6, 32), 16, nested(16), Shift::None),
        (integer(4, 8), 32, single(ScaleFormat::Bf16), Shift::None),
        (integer(4, 0), 64, HALF, Shift::Point),
        (integer(8, 0), 128, single(ScaleFormat::F32), Shift::Point),
        (Code::Iq4Nl, 32, HALF, Shift::None),
        (Code::Iq4Nl, 32, nested(8), Shift::None),
        (Code::E2m1, 32, single(ScaleFormat::E8m0), Shift::None),
        (Code::E4m3, 128, single(ScaleFormat::F32), Shift::None),
    ]
    .map(|(code, group, scales, shift)| Scheme { code, group, scales, shift })
    .to_vec()
}

fn product<T: Input>(pool: &Pool, level: Level, family: KernelFamily, w: &Packed, x: &[T], n: usize) -> Vec<u32> {
    let mut out = vec![0.0; n * w.rows];
    let source = Source { values: x, start: 0, stride: w.cols, picks: None };
    multiply(pool, level, family, source, w, None, n, &mut out);
    out.iter().map(|v| v.to_bits()).collect()
}

impl AsRef<Packed> for Packed {
    fn as_ref(&self) -> &Packed {
        self
    }
}

fn inputs(n: usize) -> Vec<f32> {
    (0..n).map(|i| (mixed(i, 7, 8) % 4001) as f32 / 2000.0 - 1.0).collect()
}

#[test]
fn coded_products_and_rows_are_the_widened_ones_bit_for_bit() {
    let pool = Pool::new(2, 50).unwrap();
    for scheme in schemes() {
        for (rows, first, cols, segments) in [(80, 0, 512, 1), (70, 64, 256, 2), (16, 16, 1216, 8), (100, 32, 90, 1)] {
            let made = Made { scheme, first, cols };
            for (wide, unit) in [(false, 1), (true, 1), (false, 16)] {
                let plain = Packed::new(&pool, &made, (rows, cols), segments, wide, unit).unwrap();
                let Some(coded) = Packed::coded(&pool, &made, (rows, cols), segments, wide, unit).unwrap() else {
                    panic!("{scheme:?} is not kept in codes");
                };
                assert!(coded.bytes() < plain.bytes(), "{scheme:?}: {} bytes", coded.bytes());
                let (mut got, mut want) = (vec![0.0f32; cols], vec![0.0f32; cols]);
                let _flush = Flush::on();
                for row in [0, rows / 2, rows - 1] {
                    coded.row(row, &mut got);
                    plain.row(row, &mut want);
                    assert_eq!(
                        bytemuck::cast_slice::<_, u32>(&got),
                        bytemuck::cast_slice::<_, u32>(&want),
                        "{scheme:?}"
                    );
                }
                let x = inputs(100 * cols);
                let halves: Vec<bf16> = x.iter().map(|x| bf16::from_f32(*x)).collect();
                let family = if unit == 16 { KernelFamily::Amx } else { KernelFamily::Vector };
                for (level, n) in Level::all().into_iter().flat_map(|level| [(level, 1), (level, 7), (level, 100)]) {
                    let what = format!("{scheme:?} {level:?} {family:?} {wide} {segments} {n}");
                    if !wide {
                        let of = |w| product(&pool, level, family, w, &halves, n);
                        assert!(of(&coded) == of(&plain), "{what}");
                    }
                    if unit == 1 {
                        let of = |w| product(&pool, level, family, w, &x, n);
                        assert!(of(&coded) == of(&plain), "{what} f32");
                    }
                }
            }
        }
    }
}

#[test]
fn coded_experts_are_the_widened_ones_bit_for_bit() {
    let pool = Pool::new(2, 50).unwrap();
    let made = Made { scheme: schemes()[1], first: 0, cols: 128 };
    let plain = [0, 1].map(|_| Packed::new(&pool, &made, (96, 128), 2, false, 1).unwrap());
    let coded = [0, 1].map(|_| Packed::coded(&pool, &made, (96, 128), 2, false, 1).unwrap().unwrap());
    let x: Vec<bf16> = inputs(60 * 128).into_iter().map(bf16::from_f32).collect();
    let of = |w: &[Packed]| {
        let mut out = vec![0.0f32; 60 * 96];
        let source = Source { values: &x, start: 0, stride: 128, picks: None };
        multiply_experts(&pool, Level::best(), KernelFamily::Vector, source, w, &[0, 5, 60], &[0, 1], &mut out);
        out.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
    };
    assert!(of(&coded) == of(&plain));
}

#[test]
fn what_codes_cannot_hold_is_left_to_widening() {
    let pool = Pool::new(1, 50).unwrap();
    let scheme = schemes()[0];
    for (first, cols, segments) in [(1, 64, 1), (0, 63, 1), (0, 66, 2)] {
        let made = Made { scheme, first, cols };
        assert!(Packed::coded(&pool, &made, (16, cols), segments, false, 1).unwrap().is_none(), "{first} {cols}");
    }
}
