//! Lanes as two 256-bit registers.

use super::lanes::{Kernel, LANES, Lanes};
use half::bf16;
use std::arch::x86_64::*;

#[derive(Clone, Copy)]
pub struct Avx2;

/// # Safety
/// The CPU has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx2>()
}

/// Eight lanes each of bf16 bits, rounded to nearest even, as 32-bit words.
#[inline(always)]
unsafe fn rounded(v: __m256) -> __m256i {
    unsafe {
        let bits = _mm256_castps_si256(v);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let near = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
        _mm256_srli_epi32::<16>(_mm256_blendv_epi8(near, quiet, nan))
    }
}

#[inline(always)]
unsafe fn widened(v: __m128i) -> __m256 {
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(v))) }
}

// SAFETY: the caller of `run` vouches for the instruction set.
unsafe impl Lanes for Avx2 {
    type F = (__m256, __m256);
    type I = (__m256i, __m256i);
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::F {
        unsafe { (_mm256_set1_ps(x), _mm256_set1_ps(x)) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        unsafe { (_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
    }
    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize) -> Self::F {
        let mut a = [0.0f32; LANES];
        unsafe {
            std::ptr::copy_nonoverlapping(p, a.as_mut_ptr(), n);
            Self::load(a.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::F) {
        unsafe {
            _mm256_storeu_ps(p, v.0);
            _mm256_storeu_ps(p.add(8), v.1);
        }
    }
    #[inline(always)]
    unsafe fn store_part(p: *mut f32, v: Self::F, n: usize) {
        let mut a = [0.0f32; LANES];
        unsafe {
            Self::store(a.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(a.as_ptr(), p, n);
        }
    }
    #[inline(always)]
    unsafe fn load_half(p: *const bf16) -> Self::F {
        unsafe { (widened(_mm_loadu_si128(p.cast())), widened(_mm_loadu_si128(p.add(8).cast()))) }
    }
    #[inline(always)]
    unsafe fn load_half_part(p: *const bf16, n: usize) -> Self::F {
        let mut a = [bf16::ZERO; LANES];
        unsafe {
            std::ptr::copy_nonoverlapping(p, a.as_mut_ptr(), n);
            Self::load_half(a.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn store_half(p: *mut bf16, v: Self::F) {
        unsafe {
            let packed = _mm256_packus_epi32(rounded(v.0), rounded(v.1));
            _mm256_storeu_si256(p.cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(packed));
        }
    }
    #[inline(always)]
    unsafe fn store_half_part(p: *mut bf16, v: Self::F, n: usize) {
        let mut a = [bf16::ZERO; LANES];
        unsafe {
            Self::store_half(a.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(a.as_ptr(), p, n);
        }
    }

    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        unsafe { (_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        unsafe { (_mm256_sub_ps(a.0, b.0), _mm256_sub_ps(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        unsafe { (_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        unsafe { (_mm256_div_ps(a.0, b.0), _mm256_div_ps(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        unsafe { (_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)) }
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        // The instruction is `a > b ? a : b`.
        unsafe { (_mm256_max_ps(a.0, b.0), _mm256_max_ps(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn select_less(a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F {
        unsafe {
            (
                _mm256_blendv_ps(y.0, x.0, _mm256_cmp_ps::<_CMP_LT_OQ>(a.0, b.0)),
                _mm256_blendv_ps(y.1, x.1, _mm256_cmp_ps::<_CMP_LT_OQ>(a.1, b.1)),
            )
        }
    }
    #[inline(always)]
    unsafe fn add_exponent(v: Self::F, t: Self::F) -> Self::F {
        unsafe {
            let one = |v: __m256, t: __m256| {
                let shifted = _mm256_slli_epi32::<23>(_mm256_castps_si256(t));
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v), shifted))
            };
            (one(v.0, t.0), one(v.1, t.1))
        }
    }

    #[inline(always)]
    unsafe fn load_bits(p: *const u32) -> Self::I {
        unsafe { (_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(8).cast())) }
    }
    #[inline(always)]
    unsafe fn splat_bits(x: u32) -> Self::I {
        unsafe { (_mm256_set1_epi32(x as i32), _mm256_set1_epi32(x as i32)) }
    }
    #[inline(always)]
    unsafe fn store_bits(p: *mut u32, v: Self::I) {
        unsafe {
            _mm256_storeu_si256(p.cast(), v.0);
            _mm256_storeu_si256(p.add(8).cast(), v.1);
        }
    }
    #[inline(always)]
    unsafe fn bytes(p: *const u8) -> Self::I {
        unsafe {
            (_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast())), _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.add(8).cast())))
        }
    }
    #[inline(always)]
    unsafe fn shorts(p: *const u16) -> Self::I {
        unsafe {
            let (low, high) = (_mm_loadu_si128(p.cast()), _mm_loadu_si128(p.add(8).cast()));
            (_mm256_cvtepu16_epi32(low), _mm256_cvtepu16_epi32(high))
        }
    }
    #[inline(always)]
    unsafe fn signed(p: *const u8) -> Self::I {
        unsafe {
            (_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())), _mm256_cvtepi8_epi32(_mm_loadl_epi64(p.add(8).cast())))
        }
    }
    #[inline(always)]
    unsafe fn number(v: Self::I) -> Self::F {
        unsafe { (_mm256_cvtepi32_ps(v.0), _mm256_cvtepi32_ps(v.1)) }
    }
    #[inline(always)]
    unsafe fn power(v: Self::I) -> Self::F {
        unsafe {
            (_mm256_castsi256_ps(_mm256_slli_epi32::<23>(v.0)), _mm256_castsi256_ps(_mm256_slli_epi32::<23>(v.1)))
        }
    }
    /// Lower bytes of the entries, and upper ones.
    #[inline(always)]
    unsafe fn table(entries: &[bf16; 16]) -> Self::I {
        let of = |shift: u32| {
            let mut bytes = [0u8; 32];
            for i in 0..32 {
                bytes[i] = (entries[i % 16].to_bits() >> shift) as u8;
            }
            unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
        };
        (of(0), of(8))
    }
    #[inline(always)]
    unsafe fn codes<const N: u32>(table: Self::I, v: Self::I) -> Self::I {
        unsafe {
            let count = _mm_cvtsi32_si128(4 * N as i32);
            let one = |v: __m256i| {
                let index = _mm256_and_si256(_mm256_srl_epi16(v, count), _mm256_set1_epi16(15));
                // An index with its uppermost bit set gives zero.
                let low = _mm256_shuffle_epi8(table.0, _mm256_or_si256(index, _mm256_set1_epi16(0x8000u16 as i16)));
                let high = _mm256_or_si256(_mm256_slli_epi16::<8>(index), _mm256_set1_epi16(0x80));
                _mm256_or_si256(low, _mm256_shuffle_epi8(table.1, high))
            };
            (one(v.0), one(v.1))
        }
    }
    #[inline(always)]
    unsafe fn from_half(v: Self::I) -> Self::F {
        unsafe {
            let packed = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(v.0, v.1));
            (_mm256_cvtph_ps(_mm256_castsi256_si128(packed)), _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(packed)))
        }
    }
    #[inline(always)]
    unsafe fn spread_fp8(v: Self::I) -> Self::I {
        unsafe {
            let one = |v: __m256i| {
                let sign = _mm256_slli_epi32::<8>(_mm256_and_si256(v, _mm256_set1_epi32(0x80)));
                _mm256_or_si256(sign, _mm256_slli_epi32::<7>(_mm256_and_si256(v, _mm256_set1_epi32(0x7f))))
            };
            (one(v.0), one(v.1))
        }
    }
    #[inline(always)]
    unsafe fn pair(even: Self::F, odd: Self::F) -> Self::I {
        unsafe {
            let one = |even: __m256, odd: __m256| {
                let even = _mm256_srli_epi32::<16>(_mm256_castps_si256(even));
                _mm256_blend_epi16::<0b1010_1010>(even, _mm256_castps_si256(odd))
            };
            (one(even.0, odd.0), one(even.1, odd.1))
        }
    }
    #[inline(always)]
    unsafe fn low(v: Self::I) -> Self::F {
        unsafe {
            (_mm256_castsi256_ps(_mm256_slli_epi32::<16>(v.0)), _mm256_castsi256_ps(_mm256_slli_epi32::<16>(v.1)))
        }
    }
    #[inline(always)]
    unsafe fn high(v: Self::I) -> Self::F {
        unsafe {
            let odd = _mm256_set1_epi32(0xffff_0000u32 as i32);
            (_mm256_castsi256_ps(_mm256_and_si256(v.0, odd)), _mm256_castsi256_ps(_mm256_and_si256(v.1, odd)))
        }
    }
    #[inline(always)]
    unsafe fn sum(v: Self::F) -> f32 {
        unsafe {
            let eight = _mm256_add_ps(v.0, v.1);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    unsafe fn greatest(v: Self::F) -> f32 {
        unsafe {
            let eight = _mm256_max_ps(v.0, v.1);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    unsafe fn prefetch_far(p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
}
