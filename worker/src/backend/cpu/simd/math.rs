//! Exponentials and roundings of our own: the platform's libm dispatches by CPU, so it may not answer here.

use super::lanes::Lanes;
use half::bf16;

/// 1.5 * 2^23: added and taken away, it rounds to the nearest integer, whose two's complement stays in the low bits.
const ROUNDER: f32 = 12_582_912.0;
/// Below this e^x is taken as zero; every smaller result would be subnormal.
const SMALLEST: f32 = -87.0;

/// e^x for x <= 0 (up to 2 units in the last place); exactly 0 below -87, 1 at 0, NaN for NaN.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 in two parts (Cody and Waite); the polynomial is the Taylor series of
/// e^r - 1 to degree 7, whose remainder is under 2^-28 there.
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
pub unsafe fn exp<L: Lanes>(x: L::F) -> L::F {
    unsafe {
        let s = |v: f32| L::splat(v);
        let least = s(SMALLEST);
        let bounded = L::max(least, x);
        let t = L::fma(bounded, s(std::f32::consts::LOG2_E), s(ROUNDER));
        let n = L::sub(t, s(ROUNDER));
        let r = L::fma(n, s(-0.693_359_4), bounded);
        let r = L::fma(n, s(2.121_944_4e-4), r);
        let mut p = s(1.984_127e-4);
        for c in [1.388_888_9e-3, 8.333_334e-3, 4.166_666_8e-2, 1.666_666_7e-1, 0.5] {
            p = L::fma(p, r, s(c));
        }
        p = L::fma(L::mul(p, r), r, r);
        let e = L::add_exponent(L::add(p, s(1.0)), t);
        L::select_less(x, least, s(0.0), e)
    }
}

/// 1 / (1 + e^-x), from the exponential of -|x|.
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
pub unsafe fn sigmoid<L: Lanes>(x: L::F) -> L::F {
    unsafe {
        let (zero, one) = (L::splat(0.0), L::splat(1.0));
        let negative = L::sub(zero, x);
        let e = exp::<L>(L::select_less(x, zero, x, negative));
        let numerator = L::select_less(x, zero, e, one);
        L::div(numerator, L::add(one, e))
    }
}

/// Rounds to nearest even, keeps subnormals, makes NaNs quiet.
#[inline(always)]
pub fn round_half(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    bf16::from_bits(((if x.is_nan() { bits | 0x0040_0000 } else { rounded }) >> 16) as u16)
}

#[cfg(test)]
mod tests {
    use super::super::lanes::{Kernel, LANES};
    use super::super::{Level, flush};
    use super::*;

    struct Map<'a>(&'a [f32; LANES], bool);
    impl Kernel for Map<'_> {
        type Output = [f32; LANES];
        #[inline(always)]
        fn run<L: Lanes>(self) -> [f32; LANES] {
            let mut out = [0.0; LANES];
            unsafe {
                let x = L::load(self.0.as_ptr());
                L::store(out.as_mut_ptr(), if self.1 { sigmoid::<L>(x) } else { exp::<L>(x) });
            }
            out
        }
    }

    #[test]
    fn the_exponential_is_near_and_the_same_everywhere() {
        let _flush = flush::Flush::on();
        let levels = Level::all();
        for i in 0..20_000 {
            let mut x = [0.0f32; LANES];
            for (lane, v) in x.iter_mut().enumerate() {
                *v = -((i * LANES + lane) as f32) * 2.8e-4;
            }
            let reference = Level::portable().run(Map(&x, false));
            for lane in 0..LANES {
                let want = (x[lane] as f64).exp();
                let wrong = (reference[lane] as f64 - want).abs();
                assert!(wrong <= want * 2.0e-7 + 1.7e-38, "e^{} is {want}, not {}", x[lane], reference[lane]);
            }
            for level in &levels {
                assert_eq!(level.run(Map(&x, false)).map(f32::to_bits), reference.map(f32::to_bits), "{level:?}");
            }
        }
    }

    #[test]
    fn special_arguments_have_their_limits() {
        let mut x = [0.0f32; LANES];
        x[..5].copy_from_slice(&[0.0, -0.0, f32::NEG_INFINITY, -87.5, f32::NAN]);
        for level in Level::all() {
            let e = level.run(Map(&x, false));
            assert_eq!(&e[..4], &[1.0, 1.0, 0.0, 0.0], "{level:?}");
            assert!(e[4].is_nan(), "{level:?}");
        }
        x[..5].copy_from_slice(&[0.0, 100.0, -100.0, f32::INFINITY, f32::NAN]);
        for level in Level::all() {
            let s = level.run(Map(&x, true));
            assert_eq!(&s[..4], &[0.5, 1.0, 0.0, 1.0], "{level:?}");
            assert!(s[4].is_nan(), "{level:?}");
        }
    }

    #[test]
    fn halves_round_as_the_half_crate_does() {
        for bits in (0..=u32::MAX).step_by(65_521 / 8) {
            let x = f32::from_bits(bits);
            assert_eq!(round_half(x).to_bits(), bf16::from_f32(x).to_bits(), "{bits:#x}");
        }
    }
}
