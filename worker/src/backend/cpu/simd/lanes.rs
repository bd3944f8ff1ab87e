//! Sixteen f32 lanes as one type, so that a kernel is written once and gives the same bits on every instruction set:
//! each operation is IEEE-exact and lane-wise, and the few sums across lanes have one fixed tree.

use half::bf16;

/// Lanes of one vector, whatever the width of the registers.
pub const LANES: usize = 16;

/// One instruction set.
///
/// # Safety
/// Every function needs the instruction set on the running CPU, and pointers valid for the lanes named.
pub unsafe trait Lanes: Copy + 'static {
    /// Sixteen f32.
    type F: Copy;
    /// Sixteen 32-bit words.
    type I: Copy;
    /// Whether a kernel may keep about 24 vectors in registers (else about 6).
    const WIDE: bool;
    /// Whether `dot` is one instruction.
    const DOT: bool = false;
    /// Whether AMX's tiles may be used.
    const TILES: bool = false;

    unsafe fn splat(x: f32) -> Self::F;
    unsafe fn load(p: *const f32) -> Self::F;
    /// The first `n < 16` lanes; the others are zero.
    unsafe fn load_part(p: *const f32, n: usize) -> Self::F;
    unsafe fn store(p: *mut f32, v: Self::F);
    unsafe fn store_part(p: *mut f32, v: Self::F, n: usize);
    unsafe fn load_half(p: *const bf16) -> Self::F;
    unsafe fn load_half_part(p: *const bf16, n: usize) -> Self::F;
    /// Rounds to nearest even, keeps subnormals, makes NaNs quiet.
    unsafe fn store_half(p: *mut bf16, v: Self::F);
    unsafe fn store_half_part(p: *mut bf16, v: Self::F, n: usize);

    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `a > b ? a : b`, so `b` where either is NaN.
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    /// `a < b ? x : y`, so `y` where `a` or `b` is NaN.
    unsafe fn select_less(a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F;
    /// The bits of `v` plus those of `t` shifted by 23: multiplies `v` by 2^n where `t` is n + 1.5 * 2^23.
    unsafe fn add_exponent(v: Self::F, t: Self::F) -> Self::F;

    unsafe fn load_bits(p: *const u32) -> Self::I;
    unsafe fn splat_bits(x: u32) -> Self::I;
    /// The even element of each bf16 pair, widened.
    unsafe fn low(v: Self::I) -> Self::F;
    /// The odd element of each bf16 pair, widened.
    unsafe fn high(v: Self::I) -> Self::F;
    unsafe fn store_bits(p: *mut u32, v: Self::I);
    /// Sixteen bytes as words.
    unsafe fn bytes(p: *const u8) -> Self::I;
    /// Sixteen 16-bit numbers as words.
    unsafe fn shorts(p: *const u16) -> Self::I;
    /// Sixteen signed bytes as words.
    unsafe fn signed(p: *const u8) -> Self::I;
    /// Signed words of less than 2^24 as numbers.
    unsafe fn number(v: Self::I) -> Self::F;
    /// 2^(n - 127); 0 where n is 0.
    unsafe fn power(v: Self::I) -> Self::F;
    /// A table of sixteen bf16 for [`codes`](Lanes::codes).
    unsafe fn table(entries: &[bf16; 16]) -> Self::I;
    /// Of each half of a word the entry that its `N`th nibble names.
    unsafe fn codes<const N: u32>(table: Self::I, v: Self::I) -> Self::I;
    /// Words whose lower half is an f16 (the upper one is zero), subnormal ones too.
    unsafe fn from_half(v: Self::I) -> Self::F;
    /// Bytes `seeeemmm` as f16 with the same exponent: `s0eeeemmm0000000`.
    unsafe fn spread_fp8(v: Self::I) -> Self::I;
    /// Pairs of numbers that bf16 holds exactly.
    unsafe fn pair(even: Self::F, odd: Self::F) -> Self::I;
    /// Adds both products of bf16 pairs, the odd one first.
    #[inline(always)]
    unsafe fn dot(acc: Self::F, w: Self::I, x: Self::I) -> Self::F {
        unsafe { Self::fma(Self::low(x), Self::low(w), Self::fma(Self::high(x), Self::high(w), acc)) }
    }
    /// Asks for the cache line at `p`, which need not be valid.
    #[inline(always)]
    unsafe fn prefetch(_p: *const u8) {}
    /// The same, into the second cache.
    #[inline(always)]
    unsafe fn prefetch_far(_p: *const u8) {}

    /// Sum over lanes by halving: lane i + lane i+8, then +4, +2, +1.
    #[inline(always)]
    unsafe fn sum(v: Self::F) -> f32 {
        let mut a = [0.0f32; LANES];
        unsafe { Self::store(a.as_mut_ptr(), v) };
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                a[i] += a[i + half];
            }
        }
        a[0]
    }

    /// The greatest lane, by the same halving.
    #[inline(always)]
    unsafe fn greatest(v: Self::F) -> f32 {
        let mut a = [0.0f32; LANES];
        unsafe { Self::store(a.as_mut_ptr(), v) };
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                a[i] = if a[i] > a[i + half] { a[i] } else { a[i + half] };
            }
        }
        a[0]
    }
}

/// A kernel generic over the instruction set; [`super::Level::run`] picks one.
pub trait Kernel {
    type Output;
    /// Marked `#[inline(always)]` by every implementation, so that it is compiled for the level that runs it.
    fn run<L: Lanes>(self) -> Self::Output;
}

/// What activations, weights and caches are stored as.
///
/// # Safety
/// As [`Lanes`].
pub unsafe trait Element: Copy + Default + Send + Sync + bytemuck::Pod {
    fn widened(self) -> f32;
    unsafe fn load<L: Lanes>(p: *const Self) -> L::F;
    unsafe fn load_part<L: Lanes>(p: *const Self, n: usize) -> L::F;
    unsafe fn store<L: Lanes>(p: *mut Self, v: L::F);
    unsafe fn store_part<L: Lanes>(p: *mut Self, v: L::F, n: usize);

    /// `n <= 16` lanes, the rest zero.
    #[inline(always)]
    unsafe fn load_up_to<L: Lanes>(p: *const Self, n: usize) -> L::F {
        unsafe { if n >= LANES { Self::load::<L>(p) } else { Self::load_part::<L>(p, n) } }
    }

    #[inline(always)]
    unsafe fn store_up_to<L: Lanes>(p: *mut Self, v: L::F, n: usize) {
        unsafe { if n >= LANES { Self::store::<L>(p, v) } else { Self::store_part::<L>(p, v, n) } }
    }
}

unsafe impl Element for f32 {
    #[inline(always)]
    fn widened(self) -> f32 {
        self
    }
    #[inline(always)]
    unsafe fn load<L: Lanes>(p: *const f32) -> L::F {
        unsafe { L::load(p) }
    }
    #[inline(always)]
    unsafe fn load_part<L: Lanes>(p: *const f32, n: usize) -> L::F {
        unsafe { L::load_part(p, n) }
    }
    #[inline(always)]
    unsafe fn store<L: Lanes>(p: *mut f32, v: L::F) {
        unsafe { L::store(p, v) }
    }
    #[inline(always)]
    unsafe fn store_part<L: Lanes>(p: *mut f32, v: L::F, n: usize) {
        unsafe { L::store_part(p, v, n) }
    }
}

unsafe impl Element for bf16 {
    #[inline(always)]
    fn widened(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }
    #[inline(always)]
    unsafe fn load<L: Lanes>(p: *const bf16) -> L::F {
        unsafe { L::load_half(p) }
    }
    #[inline(always)]
    unsafe fn load_part<L: Lanes>(p: *const bf16, n: usize) -> L::F {
        unsafe { L::load_half_part(p, n) }
    }
    #[inline(always)]
    unsafe fn store<L: Lanes>(p: *mut bf16, v: L::F) {
        unsafe { L::store_half(p, v) }
    }
    #[inline(always)]
    unsafe fn store_part<L: Lanes>(p: *mut bf16, v: L::F, n: usize) {
        unsafe { L::store_half_part(p, v, n) }
    }
}
