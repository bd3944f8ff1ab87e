//! What the memory and the multipliers of this host can do at most: the roofs that benchmarks measure against.

use super::lanes::{Kernel, LANES, Lanes};

/// Reads memory and adds it up.
pub struct Read<'a>(pub &'a [u32]);

impl Kernel for Read<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<L: Lanes>(self) -> f32 {
        const CHAINS: usize = 8;
        // SAFETY: whole chunks of the slice.
        unsafe {
            let mut sums = [L::splat(0.0); CHAINS];
            for chunk in self.0.chunks_exact(CHAINS * LANES) {
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = L::max(*sum, L::load(chunk.as_ptr().add(i * LANES).cast()));
                }
            }
            L::sum(sums.into_iter().fold(L::splat(0.0), |a, b| L::max(a, b)))
        }
    }
}

/// Multiplies pairs of bf16 in registers for `rounds` of [`Dot::FLOPS`] operations.
pub struct Dot {
    pub rounds: usize,
    pub pair: u32,
}

impl Dot {
    const CHAINS: usize = 16;
    pub const FLOPS: usize = Dot::CHAINS * LANES * 4;
}

impl Kernel for Dot {
    type Output = f32;
    #[inline(always)]
    fn run<L: Lanes>(self) -> f32 {
        // SAFETY: no memory is touched.
        unsafe {
            let (w, x) = (L::splat_bits(self.pair), L::splat_bits(self.pair));
            let mut sums = [L::splat(0.0); Dot::CHAINS];
            for _ in 0..self.rounds {
                for sum in &mut sums {
                    *sum = L::dot(*sum, w, x);
                }
            }
            L::sum(sums.into_iter().fold(L::splat(0.0), |a, b| L::add(a, b)))
        }
    }
}
