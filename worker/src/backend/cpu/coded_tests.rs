//! Matrices kept in codes against their values.

use super::simd::Level;
use super::simd::coded::Codes;
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

/// Shapes: rows, first input, inputs, segments.
const SHAPES: [(usize, usize, usize, usize); 4] =
    [(80, 0, 512, 1), (70, 64, 256, 2), (16, 128, 1024, 8), (100, 0, 384, 1)];

#[test]
fn coded_products_are_those_of_the_values_and_the_same_on_every_level_and_in_every_company() {
    let pool = Pool::new(2, 50).unwrap();
    for scheme in schemes() {
        for (rows, first, cols, segments) in SHAPES {
            let made = Made { scheme, first, cols };
            let plain = Packed::new(&pool, &made, (rows, cols), segments, true, 1).unwrap();
            let Some(coded) = Packed::coded(&pool, &made, (rows, cols), segments, false).unwrap() else {
                panic!("{scheme:?} is not kept in codes");
            };
            assert!(coded.bytes() * 2 < plain.bytes(), "{scheme:?}: {} bytes", coded.bytes());
            let x: Vec<f32> = inputs(100 * cols).iter().map(|x| bf16::from_f32(*x).to_f32()).collect();
            let halves: Vec<bf16> = x.iter().map(|x| bf16::from_f32(*x)).collect();
            let want = product(&pool, Level::best(), KernelFamily::Vector, &plain, &x, 100);
            let mut most = 0.0f32;
            for family in [KernelFamily::Vector, KernelFamily::Amx] {
                let all = product(&pool, Level::portable(), family, &coded, &halves, 100);
                for (got, want) in all.iter().zip(&want) {
                    let (got, want) = (f32::from_bits(*got), f32::from_bits(*want));
                    most = most.max((got - want).abs() / (1.0 + want.abs()));
                }
                assert!(most < 2e-4, "{scheme:?} {family:?} {segments}: {most}");
                for (level, n) in Level::all().into_iter().flat_map(|level| [(level, 1), (level, 7), (level, 100)]) {
                    let got = product(&pool, level, family, &coded, &halves, n);
                    assert!(got == all[..n * rows], "{scheme:?} {level:?} {family:?} {segments} {n}");
                    let wide = product(&pool, level, KernelFamily::Vector, &coded, &x, n);
                    let vector = product(&pool, level, KernelFamily::Vector, &coded, &halves, n);
                    assert!(wide == vector, "{scheme:?} {level:?} {segments} {n} f32");
                }
            }
        }
    }
}

#[test]
fn coded_rows_are_the_values_bit_for_bit() {
    let pool = Pool::new(1, 50).unwrap();
    for scheme in schemes() {
        for (rows, first, cols, segments) in SHAPES {
            let made = Made { scheme, first, cols };
            let coded = Packed::coded(&pool, &made, (rows, cols), segments, false).unwrap().unwrap();
            let (mut got, mut want) = (vec![0.0f32; cols], vec![0.0f32; cols]);
            for row in [0, rows / 2, rows - 1] {
                coded.row(row, &mut got);
                made.read(row, &mut want);
                let bits = |x: &[f32]| x.iter().map(|x| (x + 0.0).to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&got), bits(&want), "{scheme:?}");
            }
        }
    }
}

#[test]
fn windows_of_a_cut_sum_to_the_whole_bit_for_bit() {
    let pool = Pool::new(1, 50).unwrap();
    for scheme in schemes() {
        // Segments that are no whole groups, and one that begins with a group and ends within one.
        for length in [256, 96, 48] {
            let x: Vec<bf16> = inputs(2 * length).into_iter().map(bf16::from_f32).collect();
            let of = |first: usize, cols: usize, segments: usize| {
                let made = Made { scheme, first, cols };
                let coded = Packed::coded(&pool, &made, (40, cols), segments, false).unwrap()?;
                let got = product(&pool, Level::best(), KernelFamily::Vector, &coded, &x[first..first + cols], 1);
                Some(got.into_iter().map(f32::from_bits).collect::<Vec<f32>>())
            };
            let parts = [of(0, length, 1), of(length, length, 1)];
            match (of(0, 2 * length, 2), parts) {
                (Some(whole), [Some(a), Some(b)]) => {
                    let sum: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
                    assert_eq!(whole, sum, "{scheme:?} {length}");
                }
                (None, [None, None]) => {}
                (whole, parts) => {
                    panic!("{scheme:?} {length}: {} and {:?}", whole.is_some(), parts.map(|p| p.is_some()))
                }
            }
        }
    }
}

#[test]
fn a_code_that_is_no_number_makes_its_outputs_none() {
    struct Broken(Made);
    impl Codes for Broken {
        fn scheme(&self) -> Scheme {
            self.0.scheme
        }
        fn first(&self) -> usize {
            0
        }
        fn codes(&self, row: usize, out: &mut [u8]) {
            self.0.codes(row, out);
            if row == 3 {
                out[200] = 0x7f;
            }
        }
        fn groups(&self, row: usize, out: &mut [Group]) {
            self.0.groups(row, out);
        }
    }
    let pool = Pool::new(1, 50).unwrap();
    let scheme = schemes().into_iter().find(|scheme| scheme.code == Code::E4m3).unwrap();
    let source = Broken(Made { scheme, first: 0, cols: 512 });
    let coded = Packed::coded(&pool, &source, (16, 512), 1, false).unwrap().unwrap();
    let x: Vec<bf16> = inputs(512).into_iter().map(bf16::from_f32).collect();
    let got = product(&pool, Level::best(), KernelFamily::Vector, &coded, &x, 1);
    for (row, bits) in got.into_iter().enumerate() {
        assert_eq!(f32::from_bits(bits).is_nan(), row == 3, "{row}");
    }
}

#[test]
fn coded_experts_are_the_products_of_each() {
    let pool = Pool::new(2, 50).unwrap();
    let coded = [0, 1].map(|expert| {
        let made = Made { scheme: schemes()[1 + expert], first: 0, cols: 128 };
        Packed::coded(&pool, &made, (96, 128), 2, false).unwrap().unwrap()
    });
    let x: Vec<bf16> = inputs(60 * 128).into_iter().map(bf16::from_f32).collect();
    let mut out = vec![0.0f32; 60 * 96];
    let source = Source { values: &x, start: 0, stride: 128, picks: None };
    let (level, family) = (Level::best(), KernelFamily::Vector);
    multiply_experts(&pool, level, family, source, &coded, &[0, 5, 60], &[0, 1], &mut out);
    let got: Vec<u32> = out.iter().map(|v| v.to_bits()).collect();
    let alone = [
        product(&pool, level, family, &coded[0], &x[..5 * 128], 5),
        product(&pool, level, family, &coded[1], &x[5 * 128..], 55),
    ];
    assert!(got == alone.concat());
}

#[test]
fn what_codes_cannot_hold_is_left_to_widening() {
    let pool = Pool::new(1, 50).unwrap();
    let scheme = schemes()[0];
    for (first, cols, segments) in [(1, 64, 1), (0, 63, 1), (0, 66, 2)] {
        let made = Made { scheme, first, cols };
        assert!(Packed::coded(&pool, &made, (16, cols), segments, false).unwrap().is_none(), "{first} {cols}");
    }
}
