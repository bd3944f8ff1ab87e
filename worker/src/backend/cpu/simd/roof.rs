//! What the memory and the multipliers of this host can do at most: the roofs that benchmarks measure against.

use super::amx::{self, Tiles};
use super::lanes::{Kernel, LANES, Lanes};
use super::pack::PANEL;
use half::bf16;
use std::hint::black_box;

/// Two by two tiles of which everything is in the first cache.
pub struct Square {
    x: Vec<bf16>,
    w: Vec<u32>,
    acc: Vec<f32>,
}

impl Square {
    const BLOCKS: usize = 4;
    const ROWS: usize = 16;
    pub const FLOPS: usize = 4 * Square::BLOCKS * Square::ROWS * LANES * 32 * 2;

    /// Multiplies for `rounds` of [`Square::FLOPS`] operations. Panics where there are no tiles.
    pub fn run(mut self, rounds: usize) {
        assert!(amx::available(), "a family is measured where it runs");
        let tiles = Tiles::default();
        let cols = Square::BLOCKS * 32;
        for _ in 0..rounds {
            let x = (self.x.as_ptr(), cols * 2, Square::ROWS);
            let acc = (self.acc.as_mut_ptr(), PANEL, true);
            // SAFETY: tiles are available; `x` has two tiles of rows, `w` as many blocks of a panel, and `acc` two tiles of its rows.
            unsafe { amx::square(&tiles, x, (self.w.as_ptr(), Square::BLOCKS), acc, self.w.as_ptr()) };
        }
        black_box(&self.acc);
    }
}

impl Default for Square {
    fn default() -> Square {
        let (rows, cols) = (2 * Square::ROWS, Square::BLOCKS * 32);
        let (x, w) = (vec![bf16::from_f32(0.01); rows * cols], vec![0x3c00_3c00; cols / 2 * PANEL]);
        Square { x, w, acc: vec![0.0; rows * PANEL] }
    }
}

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
