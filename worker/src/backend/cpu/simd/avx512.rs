//! Lanes as one 512-bit register; with `DOT`, bf16 pairs go through `VDPBF16PS`; with `TILES`, AMX is there too.

use super::lanes::{Kernel, LANES, Lanes};
use half::bf16;
use std::arch::x86_64::*;

#[derive(Clone, Copy)]
pub struct Avx512<const DOT: bool, const TILES: bool>;

/// # Safety
/// The CPU has AVX-512 F, BW, VL, DQ and AVX2 + FMA.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
pub unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx512<false, false>>()
}

/// # Safety
/// The same and AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")]
pub unsafe fn run_dot<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx512<true, false>>()
}

/// # Safety
/// The same, and [`super::amx::available`] said yes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")]
pub unsafe fn run_tiles<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx512<true, true>>()
}

#[inline(always)]
fn mask(n: usize) -> u16 {
    debug_assert!(n < LANES);
    (1u16 << n).wrapping_sub(1)
}

/// Bits of bf16, rounded to nearest even; NaNs become quiet.
#[inline(always)]
unsafe fn narrowed(v: __m512) -> __m256i {
    unsafe {
        let bits = _mm512_castps_si512(v);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
        let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
        _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(_mm512_mask_mov_epi32(rounded, nan, quiet)))
    }
}

#[inline(always)]
unsafe fn widened(v: __m256i) -> __m512 {
    unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(v))) }
}

// SAFETY: the caller of `run` vouches for the instruction set.
unsafe impl<const DOT: bool, const TILES: bool> Lanes for Avx512<DOT, TILES> {
    type F = __m512;
    type I = __m512i;
    const WIDE: bool = true;
    const DOT: bool = DOT;
    const TILES: bool = TILES;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize) -> __m512 {
        unsafe { _mm512_maskz_loadu_ps(mask(n), p) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m512) {
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn store_part(p: *mut f32, v: __m512, n: usize) {
        unsafe { _mm512_mask_storeu_ps(p, mask(n), v) }
    }
    #[inline(always)]
    unsafe fn load_half(p: *const bf16) -> __m512 {
        unsafe { widened(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_half_part(p: *const bf16, n: usize) -> __m512 {
        unsafe { widened(_mm256_maskz_loadu_epi16(mask(n), p.cast())) }
    }
    #[inline(always)]
    unsafe fn store_half(p: *mut bf16, v: __m512) {
        unsafe { _mm256_storeu_si256(p.cast(), narrowed(v)) }
    }
    #[inline(always)]
    unsafe fn store_half_part(p: *mut bf16, v: __m512, n: usize) {
        unsafe { _mm256_mask_storeu_epi16(p.cast(), mask(n), narrowed(v)) }
    }

    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        // The instruction is `a > b ? a : b`.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn select_less(a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x) }
    }
    #[inline(always)]
    unsafe fn add_exponent(v: __m512, t: __m512) -> __m512 {
        unsafe {
            let shifted = _mm512_slli_epi32::<23>(_mm512_castps_si512(t));
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(v), shifted))
        }
    }

    #[inline(always)]
    unsafe fn load_bits(p: *const u32) -> __m512i {
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn splat_bits(x: u32) -> __m512i {
        unsafe { _mm512_set1_epi32(x as i32) }
    }
    #[inline(always)]
    unsafe fn store_bits(p: *mut u32, v: __m512i) {
        unsafe { _mm512_storeu_si512(p.cast(), v) }
    }
    #[inline(always)]
    unsafe fn bytes(p: *const u8) -> __m512i {
        unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn shorts(p: *const u16) -> __m512i {
        unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn signed(p: *const u8) -> __m512i {
        unsafe { _mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn number(v: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(v) }
    }
    #[inline(always)]
    unsafe fn power(v: __m512i) -> __m512 {
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<23>(v)) }
    }
    #[inline(always)]
    unsafe fn table(entries: &[bf16; 16]) -> __m512i {
        // Twice, so that the fifth bit of an index does not count.
        unsafe { _mm512_broadcast_i64x4(_mm256_loadu_si256(entries.as_ptr().cast())) }
    }
    #[inline(always)]
    unsafe fn codes<const N: u32>(table: __m512i, v: __m512i) -> __m512i {
        unsafe {
            match N {
                0 => _mm512_permutexvar_epi16(v, table),
                1 => _mm512_permutexvar_epi16(_mm512_srli_epi16::<4>(v), table),
                2 => _mm512_permutexvar_epi16(_mm512_srli_epi16::<8>(v), table),
                _ => _mm512_permutexvar_epi16(_mm512_srli_epi16::<12>(v), table),
            }
        }
    }
    #[inline(always)]
    unsafe fn from_half(v: __m512i) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)) }
    }
    #[inline(always)]
    unsafe fn spread_fp8(v: __m512i) -> __m512i {
        unsafe {
            let sign = _mm512_slli_epi32::<8>(_mm512_and_si512(v, _mm512_set1_epi32(0x80)));
            _mm512_or_si512(sign, _mm512_slli_epi32::<7>(_mm512_and_si512(v, _mm512_set1_epi32(0x7f))))
        }
    }
    #[inline(always)]
    unsafe fn pair(even: __m512, odd: __m512) -> __m512i {
        unsafe {
            let (even, odd) = (_mm512_castps_si512(even), _mm512_castps_si512(odd));
            _mm512_mask_mov_epi16(_mm512_srli_epi32::<16>(even), 0xaaaa_aaaa, odd)
        }
    }
    #[inline(always)]
    unsafe fn low(v: __m512i) -> __m512 {
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(v)) }
    }
    #[inline(always)]
    unsafe fn high(v: __m512i) -> __m512 {
        unsafe { _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(0xffff_0000u32 as i32))) }
    }
    #[inline(always)]
    unsafe fn dot(acc: __m512, w: __m512i, x: __m512i) -> __m512 {
        unsafe {
            if DOT {
                let (w, x) = (std::mem::transmute::<__m512i, __m512bh>(w), std::mem::transmute::<__m512i, __m512bh>(x));
                _mm512_dpbf16_ps(acc, w, x)
            } else {
                Self::fma(Self::low(x), Self::low(w), Self::fma(Self::high(x), Self::high(w), acc))
            }
        }
    }
    #[inline(always)]
    unsafe fn sum(v: __m512) -> f32 {
        unsafe {
            let (low, high) = (_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            let eight = _mm256_add_ps(low, high);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    unsafe fn greatest(v: __m512) -> f32 {
        // `VMAXPS` is `a > b ? a : b` too.
        unsafe {
            let (low, high) = (_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            let eight = _mm256_max_ps(low, high);
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
