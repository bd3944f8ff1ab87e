//! What stands between the two multiplications of a branch, one row at a time.

use super::lanes::{Element, Kernel, LANES, Lanes};
use super::math;

/// One activation's arithmetic.
///
/// # Safety
/// As [`Lanes`].
pub unsafe trait Activate: Copy {
    /// What a gate lets through.
    unsafe fn gate<L: Lanes>(self, gate: L::F) -> L::F;

    /// Gate and up joined.
    #[inline(always)]
    unsafe fn join<L: Lanes>(self, gate: L::F, up: L::F) -> L::F {
        unsafe { L::mul(self.gate::<L>(gate), up) }
    }
}

/// `x sigmoid(x)`.
#[derive(Clone, Copy)]
pub struct Silu;

// SAFETY: the caller of `run` vouches for the instruction set.
unsafe impl Activate for Silu {
    #[inline(always)]
    unsafe fn gate<L: Lanes>(self, gate: L::F) -> L::F {
        unsafe { L::mul(gate, math::sigmoid::<L>(gate)) }
    }
}

/// `x / 2 (1 + tanh u)` with `u = sqrt(2 / pi) (x + 0.044715 x^3)`, written as `x sigmoid(2 u)`, which is the same and
/// cancels nothing where `tanh u` is near -1.
#[derive(Clone, Copy)]
pub struct GeluTanh;

/// `2 sqrt(2 / pi)`.
const SLOPE: f32 = 1.595_769;
const CUBE: f32 = 0.044_715;

// SAFETY: as above.
unsafe impl Activate for GeluTanh {
    #[inline(always)]
    unsafe fn gate<L: Lanes>(self, x: L::F) -> L::F {
        unsafe {
            // A square too large is infinite, and so is then the argument: the sigmoid's limits are right.
            let grown = L::fma(L::splat(CUBE), L::mul(x, x), L::splat(1.0));
            L::mul(x, math::sigmoid::<L>(L::mul(L::mul(L::splat(SLOPE), x), grown)))
        }
    }
}

/// `min(gate, limit) sigmoid(alpha gate) (clamp(up) + 1)`.
#[derive(Clone, Copy)]
pub struct ClampedSwiglu {
    pub alpha: f32,
    pub limit: f32,
}

// SAFETY: as above.
unsafe impl Activate for ClampedSwiglu {
    #[inline(always)]
    unsafe fn gate<L: Lanes>(self, gate: L::F) -> L::F {
        unsafe {
            let gate = below::<L>(gate, self.limit);
            L::mul(gate, math::sigmoid::<L>(L::mul(gate, L::splat(self.alpha))))
        }
    }

    #[inline(always)]
    unsafe fn join<L: Lanes>(self, gate: L::F, up: L::F) -> L::F {
        unsafe {
            let (up, least) = (below::<L>(up, self.limit), L::splat(-self.limit));
            let up = L::select_less(up, least, least, up);
            L::mul(L::add(up, L::splat(1.0)), self.gate::<L>(gate))
        }
    }
}

/// At most `most`; a NaN stays.
#[inline(always)]
unsafe fn below<L: Lanes>(x: L::F, most: f32) -> L::F {
    unsafe {
        let most = L::splat(most);
        L::select_less(most, x, most, x)
    }
}

/// `out = join(gate, up)`, rounded once.
pub struct Gated<'a, T, A> {
    pub activation: A,
    pub gate: &'a [f32],
    pub up: &'a [f32],
    pub out: &'a mut [T],
}

impl<T: Element, A: Activate> Kernel for Gated<'_, T, A> {
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
                T::store_up_to::<L>(self.out.as_mut_ptr().add(i), self.activation.join::<L>(gate, up), n - i);
            }
        }
    }
}

/// `out = gate(x)`, rounded once.
pub struct Alone<'a, T, A> {
    pub activation: A,
    pub x: &'a [f32],
    pub out: &'a mut [T],
}

impl<T: Element, A: Activate> Kernel for Alone<'_, T, A> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let n = self.out.len();
        assert!(self.x.len() == n);
        for i in (0..n).step_by(LANES) {
            // SAFETY: below `n`.
            unsafe {
                let x = f32::load_up_to::<L>(self.x.as_ptr().add(i), n - i);
                T::store_up_to::<L>(self.out.as_mut_ptr().add(i), self.activation.gate::<L>(x), n - i);
            }
        }
    }
}
