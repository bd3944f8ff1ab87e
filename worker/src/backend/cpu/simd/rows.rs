//! Operations on one row at a time: norms, activations, sums.

use super::lanes::{Element, Kernel, LANES, Lanes};
use super::math;
use model::rope::Layout;
use std::marker::PhantomData;

/// RMS norm: the sum of squares in sixteen lanes (element i in lane i mod 16), halved; times `weight`, rounded once.
pub struct Norm<'a, T> {
    pub x: &'a [f32],
    pub weight: &'a [f32],
    pub eps: f32,
    pub out: &'a mut [T],
}

impl<T: Element> Kernel for Norm<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let n = self.x.len();
        assert!(self.weight.len() == n && self.out.len() == n);
        // SAFETY: all three hold `n`.
        unsafe { norm::<L, T>(self.x.as_ptr(), self.weight.as_ptr(), self.eps, n, self.out.as_mut_ptr()) };
    }
}

/// The same in place, f32.
pub struct NormInPlace<'a> {
    pub x: &'a mut [f32],
    pub weight: &'a [f32],
    pub eps: f32,
}

impl Kernel for NormInPlace<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let n = self.x.len();
        assert!(self.weight.len() == n);
        // SAFETY: both hold `n`; a vector is read before it is written.
        unsafe { norm::<L, f32>(self.x.as_ptr(), self.weight.as_ptr(), self.eps, n, self.x.as_mut_ptr()) };
    }
}

#[inline(always)]
unsafe fn norm<L: Lanes, T: Element>(x: *const f32, weight: *const f32, eps: f32, n: usize, out: *mut T) {
    unsafe {
        let mut squares = L::splat(0.0);
        for i in (0..n).step_by(LANES) {
            let v = f32::load_up_to::<L>(x.add(i), n - i);
            squares = L::fma(v, v, squares);
        }
        let inverse = L::splat(1.0 / (L::sum(squares) / n as f32 + eps).sqrt());
        for i in (0..n).step_by(LANES) {
            let v = L::mul(f32::load_up_to::<L>(x.add(i), n - i), inverse);
            T::store_up_to::<L>(out.add(i), L::mul(v, f32::load_up_to::<L>(weight.add(i), n - i)), n - i);
        }
    }
}

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

/// `out = silu(gate) * up`, rounded once.
pub struct Silu<'a, T> {
    pub gate: &'a [f32],
    pub up: &'a [f32],
    pub out: &'a mut [T],
}

impl<T: Element> Kernel for Silu<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let n = self.out.len();
        assert!(self.gate.len() == n && self.up.len() == n);
        for i in (0..n).step_by(LANES) {
            // SAFETY: below `n`.
            unsafe {
                let gate = f32::load_up_to::<L>(self.gate.as_ptr().add(i), n - i);
                let up = f32::load_up_to::<L>(self.up.as_ptr().add(i), n - i);
                let v = L::mul(L::mul(gate, math::sigmoid::<L>(gate)), up);
                T::store_up_to::<L>(self.out.as_mut_ptr().add(i), v, n - i);
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
