//! Products of a pair of inputs with sixteen outputs' weights, for each format of either.

use super::lanes::Lanes;
use half::bf16;

/// How one format of activations meets one format of weights.
pub trait Product<L: Lanes> {
    type X: Copy;
    /// Sixteen outputs' weights of a pair of inputs.
    type W: Copy;
    /// A pair of inputs, splat.
    type P: Copy;
    /// Words of a pair in one output.
    const WORDS: usize;
    unsafe fn weights(p: *const u32, width: usize) -> Self::W;
    unsafe fn pair(p: *const Self::X) -> Self::P;
    /// A last input without a partner.
    unsafe fn lone(p: *const Self::X) -> Self::P;
    unsafe fn odd(acc: L::F, w: Self::W, x: Self::P) -> L::F;
    unsafe fn even(acc: L::F, w: Self::W, x: Self::P) -> L::F;
    #[inline(always)]
    unsafe fn both(acc: L::F, w: Self::W, x: Self::P) -> L::F {
        unsafe { Self::even(Self::odd(acc, w, x), w, x) }
    }
}

pub struct HalfByHalf;

impl<L: Lanes> Product<L> for HalfByHalf {
    type X = bf16;
    type W = L::I;
    type P = L::I;
    const WORDS: usize = 1;
    #[inline(always)]
    unsafe fn weights(p: *const u32, _width: usize) -> L::I {
        unsafe { L::load_bits(p) }
    }
    #[inline(always)]
    unsafe fn pair(p: *const bf16) -> L::I {
        unsafe { L::splat_bits(p.cast::<u32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn lone(p: *const bf16) -> L::I {
        unsafe { L::splat_bits((*p).to_bits() as u32) }
    }
    #[inline(always)]
    unsafe fn odd(acc: L::F, w: L::I, x: L::I) -> L::F {
        unsafe { L::fma(L::high(x), L::high(w), acc) }
    }
    #[inline(always)]
    unsafe fn even(acc: L::F, w: L::I, x: L::I) -> L::F {
        unsafe { L::fma(L::low(x), L::low(w), acc) }
    }
    #[inline(always)]
    unsafe fn both(acc: L::F, w: L::I, x: L::I) -> L::F {
        unsafe { L::dot(acc, w, x) }
    }
}

pub struct FullByHalf;

impl<L: Lanes> Product<L> for FullByHalf {
    type X = f32;
    type W = L::I;
    type P = (L::F, L::F);
    const WORDS: usize = 1;
    #[inline(always)]
    unsafe fn weights(p: *const u32, _width: usize) -> L::I {
        unsafe { L::load_bits(p) }
    }
    #[inline(always)]
    unsafe fn pair(p: *const f32) -> Self::P {
        unsafe { (L::splat(*p), L::splat(*p.add(1))) }
    }
    #[inline(always)]
    unsafe fn lone(p: *const f32) -> Self::P {
        unsafe { (L::splat(*p), L::splat(0.0)) }
    }
    #[inline(always)]
    unsafe fn odd(acc: L::F, w: L::I, x: Self::P) -> L::F {
        unsafe { L::fma(x.1, L::high(w), acc) }
    }
    #[inline(always)]
    unsafe fn even(acc: L::F, w: L::I, x: Self::P) -> L::F {
        unsafe { L::fma(x.0, L::low(w), acc) }
    }
}

pub struct FullByFull;

impl<L: Lanes> Product<L> for FullByFull {
    type X = f32;
    type W = (L::F, L::F);
    type P = (L::F, L::F);
    const WORDS: usize = 2;
    #[inline(always)]
    unsafe fn weights(p: *const u32, width: usize) -> Self::W {
        unsafe { (L::load(p.cast()), L::load(p.add(width).cast())) }
    }
    #[inline(always)]
    unsafe fn pair(p: *const f32) -> Self::P {
        unsafe { (L::splat(*p), L::splat(*p.add(1))) }
    }
    #[inline(always)]
    unsafe fn lone(p: *const f32) -> Self::P {
        unsafe { (L::splat(*p), L::splat(0.0)) }
    }
    #[inline(always)]
    unsafe fn odd(acc: L::F, w: Self::W, x: Self::P) -> L::F {
        unsafe { L::fma(x.1, w.1, acc) }
    }
    #[inline(always)]
    unsafe fn even(acc: L::F, w: Self::W, x: Self::P) -> L::F {
        unsafe { L::fma(x.0, w.0, acc) }
    }
}
