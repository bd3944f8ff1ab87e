//! Norms of one row or one head. Sums run in sixteen lanes (element i in lane i mod 16), which are halved.

use super::lanes::{Element, Kernel, LANES, Lanes};
use super::rows::Positions;

/// RMS norm: times the inverse root of the mean square, times `weight`, rounded once.
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
        unsafe {
            let inverse = inverse_root(squares::<L>(self.x.as_ptr(), n), n, self.eps);
            weigh::<L, T>(self.x.as_ptr(), inverse, self.weight.as_ptr(), n, self.out.as_mut_ptr());
        }
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
        unsafe {
            let inverse = inverse_root(squares::<L>(self.x.as_ptr(), n), n, self.eps);
            weigh::<L, f32>(self.x.as_ptr(), inverse, self.weight.as_ptr(), n, self.x.as_mut_ptr());
        }
    }
}

/// The same in place with an inverse root that is known.
pub struct Weigh<'a> {
    pub x: &'a mut [f32],
    pub inverse: f32,
    pub weight: &'a [f32],
}

impl Kernel for Weigh<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let n = self.x.len();
        assert!(self.weight.len() == n);
        // SAFETY: both hold `n`; a vector is read before it is written.
        unsafe { weigh::<L, f32>(self.x.as_ptr(), self.inverse, self.weight.as_ptr(), n, self.x.as_mut_ptr()) };
    }
}

/// The sum of squares.
pub struct Squares<'a> {
    pub x: &'a [f32],
}

impl Kernel for Squares<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<L: Lanes>(self) -> f32 {
        // SAFETY: it holds its length.
        unsafe { squares::<L>(self.x.as_ptr(), self.x.len()) }
    }
}

/// The sum.
pub struct Sum<'a> {
    pub x: &'a [f32],
}

impl Kernel for Sum<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<L: Lanes>(self) -> f32 {
        // SAFETY: it holds its length.
        unsafe { sum::<L>(self.x.as_ptr(), self.x.len()) }
    }
}

/// Layer norm: the mean first, then the mean square of what is left without it; rounded once.
pub struct LayerNorm<'a, T> {
    pub x: &'a [f32],
    pub weight: &'a [f32],
    pub bias: &'a [f32],
    pub eps: f32,
    pub out: &'a mut [T],
}

impl<T: Element> Kernel for LayerNorm<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let n = self.x.len();
        assert!(self.weight.len() == n && self.bias.len() == n && self.out.len() == n);
        let (x, weight, bias) = (self.x.as_ptr(), self.weight.as_ptr(), self.bias.as_ptr());
        // SAFETY: all four hold `n`.
        unsafe {
            let mean = L::splat(sum::<L>(x, n) / n as f32);
            let index = Positions::<L>::first();
            let mut squares = L::splat(0.0);
            for i in (0..n).step_by(LANES) {
                let v = L::sub(f32::load_up_to::<L>(x.add(i), n - i), mean);
                // Lanes past the end hold no value, and so no distance from the mean.
                let v = L::select_less(index, L::splat((n - i) as f32), v, L::splat(0.0));
                squares = L::fma(v, v, squares);
            }
            let inverse = L::splat(inverse_root(L::sum(squares), n, self.eps));
            for i in (0..n).step_by(LANES) {
                let v = L::mul(L::sub(f32::load_up_to::<L>(x.add(i), n - i), mean), inverse);
                let (w, b) = (f32::load_up_to::<L>(weight.add(i), n - i), f32::load_up_to::<L>(bias.add(i), n - i));
                T::store_up_to::<L>(self.out.as_mut_ptr().add(i), L::fma(v, w, b), n - i);
            }
        }
    }
}

/// What a row of `n` values is multiplied with, from its sum of squares.
#[inline(always)]
pub fn inverse_root(squares: f32, n: usize, eps: f32) -> f32 {
    1.0 / (squares / n as f32 + eps).sqrt()
}

#[inline(always)]
unsafe fn sum<L: Lanes>(x: *const f32, n: usize) -> f32 {
    unsafe {
        let mut total = L::splat(0.0);
        for i in (0..n).step_by(LANES) {
            total = L::add(total, f32::load_up_to::<L>(x.add(i), n - i));
        }
        L::sum(total)
    }
}

#[inline(always)]
unsafe fn squares<L: Lanes>(x: *const f32, n: usize) -> f32 {
    unsafe {
        let mut squares = L::splat(0.0);
        for i in (0..n).step_by(LANES) {
            let v = f32::load_up_to::<L>(x.add(i), n - i);
            squares = L::fma(v, v, squares);
        }
        L::sum(squares)
    }
}

#[inline(always)]
unsafe fn weigh<L: Lanes, T: Element>(x: *const f32, inverse: f32, weight: *const f32, n: usize, out: *mut T) {
    unsafe {
        let inverse = L::splat(inverse);
        for i in (0..n).step_by(LANES) {
            let v = L::mul(f32::load_up_to::<L>(x.add(i), n - i), inverse);
            T::store_up_to::<L>(out.add(i), L::mul(v, f32::load_up_to::<L>(weight.add(i), n - i)), n - i);
        }
    }
}
