//! Operations on one row at a time: rotations, sums, roundings, scores.

use super::lanes::{Element, Kernel, LANES, Lanes};
use super::math;
use model::rope::Layout;
use std::marker::PhantomData;

/// Rotates pairs of channels: `(a cos - b sin, b cos + a sin)`, the second product of each rounded first.
pub struct Rotate<'a> {
    /// The rotated channels only.
    pub x: &'a mut [f32],
    /// By pair.
    pub cos: &'a [f32],
    pub sin: &'a [f32],
    pub layout: Layout,
}

impl Kernel for Rotate<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let half = self.cos.len();
        assert!(self.x.len() == 2 * half && self.sin.len() == half);
        if self.layout == Layout::Interleaved {
            for i in 0..half {
                let (a, b, c, s) = (self.x[2 * i], self.x[2 * i + 1], self.cos[i], self.sin[i]);
                self.x[2 * i] = a.mul_add(c, 0.0 - b * s);
                self.x[2 * i + 1] = b.mul_add(c, a * s);
            }
            return;
        }
        let x = self.x.as_mut_ptr();
        for i in (0..half).step_by(LANES) {
            let n = half - i;
            // SAFETY: below `half` in each half.
            unsafe {
                let (a, b) = (f32::load_up_to::<L>(x.add(i), n), f32::load_up_to::<L>(x.add(half + i), n));
                let c = f32::load_up_to::<L>(self.cos.as_ptr().add(i), n);
                let s = f32::load_up_to::<L>(self.sin.as_ptr().add(i), n);
                f32::store_up_to::<L>(x.add(i), L::fma(a, c, L::sub(L::splat(0.0), L::mul(b, s))), n);
                f32::store_up_to::<L>(x.add(half + i), L::fma(b, c, L::mul(a, s)), n);
            }
        }
    }
}

/// `x += y + bias`.
pub struct Add<'a> {
    pub x: &'a mut [f32],
    pub y: &'a [f32],
    pub bias: Option<&'a [f32]>,
}

impl Kernel for Add<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let n = self.x.len();
        assert!(self.y.len() == n && self.bias.is_none_or(|b| b.len() == n));
        for i in (0..n).step_by(LANES) {
            // SAFETY: below `n`.
            unsafe {
                let x = self.x.as_mut_ptr().add(i);
                let mut y = f32::load_up_to::<L>(self.y.as_ptr().add(i), n - i);
                if let Some(bias) = self.bias {
                    y = L::add(y, f32::load_up_to::<L>(bias.as_ptr().add(i), n - i));
                }
                f32::store_up_to::<L>(x, L::add(f32::load_up_to::<L>(x, n - i), y), n - i);
            }
        }
    }
}

/// `acc += weight * y`, the product rounded first.
pub struct Weigh<'a> {
    pub acc: &'a mut [f32],
    pub weight: f32,
    pub y: &'a [f32],
}

impl Kernel for Weigh<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let n = self.acc.len();
        assert!(self.y.len() == n);
        for i in (0..n).step_by(LANES) {
            // SAFETY: below `n`.
            unsafe {
                let acc = self.acc.as_mut_ptr().add(i);
                let term = L::mul(L::splat(self.weight), f32::load_up_to::<L>(self.y.as_ptr().add(i), n - i));
                f32::store_up_to::<L>(acc, L::add(f32::load_up_to::<L>(acc, n - i), term), n - i);
            }
        }
    }
}

/// `x *= by`.
pub struct Scale<'a> {
    pub x: &'a mut [f32],
    pub by: f32,
}

impl Kernel for Scale<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let n = self.x.len();
        for i in (0..n).step_by(LANES) {
            // SAFETY: below `n`.
            unsafe {
                let x = self.x.as_mut_ptr().add(i);
                f32::store_up_to::<L>(x, L::mul(f32::load_up_to::<L>(x, n - i), L::splat(self.by)), n - i);
            }
        }
    }
}

/// `out = by * x`, rounded once.
pub struct Scaled<'a, T> {
    pub x: &'a [T],
    pub by: f32,
    pub out: &'a mut [T],
}

impl<T: Element> Kernel for Scaled<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let n = self.out.len();
        assert!(self.x.len() == n);
        for i in (0..n).step_by(LANES) {
            // SAFETY: below `n`.
            unsafe {
                let v = L::mul(T::load_up_to::<L>(self.x.as_ptr().add(i), n - i), L::splat(self.by));
                T::store_up_to::<L>(self.out.as_mut_ptr().add(i), v, n - i);
            }
        }
    }
}

/// Rounds f32 to `T`.
pub struct Round<'a, T> {
    pub x: &'a [f32],
    pub out: &'a mut [T],
}

impl<T: Element> Kernel for Round<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let n = self.x.len();
        assert!(self.out.len() == n);
        for i in (0..n).step_by(LANES) {
            // SAFETY: below `n`.
            unsafe {
                let v = f32::load_up_to::<L>(self.x.as_ptr().add(i), n - i);
                T::store_up_to::<L>(self.out.as_mut_ptr().add(i), v, n - i);
            }
        }
    }
}

/// Router scores in place: softmax (the sum of exponentials in sixteen lanes, halved) or sigmoid.
pub struct Score<'a> {
    pub x: &'a mut [f32],
    pub softmax: bool,
}

impl Kernel for Score<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let n = self.x.len();
        let x = self.x.as_mut_ptr();
        // SAFETY: every access is below `n`.
        unsafe {
            if !self.softmax {
                for i in (0..n).step_by(LANES) {
                    let v = math::sigmoid::<L>(f32::load_up_to::<L>(x.add(i), n - i));
                    f32::store_up_to::<L>(x.add(i), v, n - i);
                }
                return;
            }
            let mut most = f32::NEG_INFINITY;
            for i in 0..n {
                most = if *x.add(i) > most { *x.add(i) } else { most };
            }
            let index = Positions::<L>::first();
            let mut total = L::splat(0.0);
            for i in (0..n).step_by(LANES) {
                let e = math::exp::<L>(L::sub(f32::load_up_to::<L>(x.add(i), n - i), L::splat(most)));
                let e = L::select_less(index, L::splat((n - i) as f32), e, L::splat(0.0));
                total = L::add(total, e);
                f32::store_up_to::<L>(x.add(i), e, n - i);
            }
            let total = L::splat(L::sum(total));
            for i in (0..n).step_by(LANES) {
                let v = L::div(f32::load_up_to::<L>(x.add(i), n - i), total);
                f32::store_up_to::<L>(x.add(i), v, n - i);
            }
        }
    }
}

/// The numbers of the lanes.
pub struct Positions<L>(PhantomData<L>);

impl<L: Lanes> Positions<L> {
    /// 0 to 15.
    ///
    /// # Safety
    /// As [`Lanes`].
    #[inline(always)]
    pub unsafe fn first() -> L::F {
        const NUMBERS: [f32; LANES] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
        unsafe { L::load(NUMBERS.as_ptr()) }
    }
}
