//! Lanes as a plain array: what every other instruction set must agree with, and what hosts without one run.

use super::lanes::{LANES, Lanes};
use half::bf16;

#[derive(Clone, Copy)]
pub struct Portable;

#[inline(always)]
fn each(f: impl Fn(usize) -> f32) -> [f32; LANES] {
    let mut out = [0.0; LANES];
    for i in 0..LANES {
        out[i] = f(i);
    }
    out
}

// SAFETY: plain Rust; the pointers are the caller's promise.
unsafe impl Lanes for Portable {
    type F = [f32; LANES];
    type I = [u32; LANES];
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::F {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        unsafe { p.cast::<[f32; LANES]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize) -> Self::F {
        each(|i| if i < n { unsafe { *p.add(i) } } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::F) {
        unsafe { p.cast::<[f32; LANES]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn store_part(p: *mut f32, v: Self::F, n: usize) {
        for i in 0..n {
            unsafe { *p.add(i) = v[i] };
        }
    }
    #[inline(always)]
    unsafe fn load_half(p: *const bf16) -> Self::F {
        each(|i| unsafe { f32::from_bits(((*p.add(i)).to_bits() as u32) << 16) })
    }
    #[inline(always)]
    unsafe fn load_half_part(p: *const bf16, n: usize) -> Self::F {
        each(|i| if i < n { unsafe { f32::from_bits(((*p.add(i)).to_bits() as u32) << 16) } } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn store_half(p: *mut bf16, v: Self::F) {
        for i in 0..LANES {
            unsafe { *p.add(i) = super::math::round_half(v[i]) };
        }
    }
    #[inline(always)]
    unsafe fn store_half_part(p: *mut bf16, v: Self::F, n: usize) {
        for i in 0..n {
            unsafe { *p.add(i) = super::math::round_half(v[i]) };
        }
    }

    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        each(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        each(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        each(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        each(|i| a[i] / b[i])
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        each(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        each(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn select_less(a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F {
        each(|i| if a[i] < b[i] { x[i] } else { y[i] })
    }
    #[inline(always)]
    unsafe fn add_exponent(v: Self::F, t: Self::F) -> Self::F {
        each(|i| f32::from_bits(v[i].to_bits().wrapping_add(t[i].to_bits() << 23)))
    }

    #[inline(always)]
    unsafe fn load_bits(p: *const u32) -> Self::I {
        unsafe { p.cast::<[u32; LANES]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn splat_bits(x: u32) -> Self::I {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn low(v: Self::I) -> Self::F {
        each(|i| f32::from_bits(v[i] << 16))
    }
    #[inline(always)]
    unsafe fn high(v: Self::I) -> Self::F {
        each(|i| f32::from_bits(v[i] & 0xffff_0000))
    }
    #[inline(always)]
    unsafe fn store_bits(p: *mut u32, v: Self::I) {
        unsafe { p.cast::<[u32; LANES]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn bytes(p: *const u8) -> Self::I {
        unsafe { p.cast::<[u8; LANES]>().read_unaligned() }.map(u32::from)
    }
    #[inline(always)]
    unsafe fn shorts(p: *const u16) -> Self::I {
        unsafe { p.cast::<[u16; LANES]>().read_unaligned() }.map(u32::from)
    }
    #[inline(always)]
    unsafe fn signed(p: *const u8) -> Self::I {
        unsafe { p.cast::<[i8; LANES]>().read_unaligned() }.map(|v| i32::from(v) as u32)
    }
    #[inline(always)]
    unsafe fn number(v: Self::I) -> Self::F {
        v.map(|v| v as i32 as f32)
    }
    #[inline(always)]
    unsafe fn power(v: Self::I) -> Self::F {
        v.map(|v| f32::from_bits(v << 23))
    }
    #[inline(always)]
    unsafe fn table(entries: &[bf16; 16]) -> Self::I {
        entries.map(|entry| u32::from(entry.to_bits()))
    }
    #[inline(always)]
    unsafe fn codes<const N: u32>(table: Self::I, v: Self::I) -> Self::I {
        v.map(|v| table[(v >> (4 * N) & 15) as usize] | table[(v >> (16 + 4 * N) & 15) as usize] << 16)
    }
    #[inline(always)]
    unsafe fn from_half(v: Self::I) -> Self::F {
        v.map(|v| half::f16::from_bits(v as u16).to_f32())
    }
    #[inline(always)]
    unsafe fn spread_fp8(v: Self::I) -> Self::I {
        v.map(|v| (v & 0x80) << 8 | (v & 0x7f) << 7)
    }
    #[inline(always)]
    unsafe fn pair(even: Self::F, odd: Self::F) -> Self::I {
        let mut out = [0; LANES];
        for i in 0..LANES {
            out[i] = even[i].to_bits() >> 16 | odd[i].to_bits() & 0xffff_0000;
        }
        out
    }
}
