//! Grouped-query attention in the order of AMX's blocks. The cache is packed as weights are, and queries and a span's weights
//! are rounded to bf16 once, as every input of a multiplication is.
//!
//! ```text
//! one kv head of a block:  K [head_dim / 2][32 positions] words, pairs of channels
//!                          V a panel for each 64 channels: [16][channels] words, pairs of positions
//! ```
//! Positions that no query of a task sees yet are left out. Those that only others of its queries see are multiplied by zero,
//! which changes nothing as long as values are finite.

use super::attention::{LOWEST, Running, WIDTH_MAX};
use super::chains::{Tiles, fresh};
use super::grouped::{Attend, TASK, weigh};
use super::lanes::{Element, Kernel, LANES, Lanes};
use super::pack::PANEL;
use half::bf16;
use model::plan::BLOCK_TOKENS;
use std::mem::MaybeUninit;

/// Pairs of positions in a span.
const PAIRS: usize = BLOCK_TOKENS / 2;

/// The same as [`Attend`], over a cache in pairs.
pub struct Blocked<'a>(pub Attend<'a, bf16>);

/// What a task works in.
#[repr(C, align(64))]
struct Memory {
    queries: [bf16; TASK * WIDTH_MAX],
    weights: [bf16; TASK * BLOCK_TOKENS],
    sums: [f32; TASK * PANEL],
    outputs: [f32; TASK * WIDTH_MAX],
    /// A span's values where some positions are not there yet.
    values: [u32; PAIRS * WIDTH_MAX],
}

/// Places in a [`Memory`].
struct Place {
    queries: [*const bf16; TASK],
    weights: *mut bf16,
    weight_rows: [*const bf16; TASK],
    sums: *mut f32,
    outputs: *mut f32,
    values: *mut u32,
}

impl Kernel for Blocked<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let attend = self.0;
        let (count, dim, stride) = (attend.check(), attend.layout.head_dim, attend.layout.value_stride());
        assert!(attend.layout.paired && dim.is_multiple_of(2));
        let mut memory = MaybeUninit::<Memory>::uninit();
        let memory = memory.as_mut_ptr();
        let tiles = Tiles::default();
        let mut running = Running::begin();
        // SAFETY: `count` rows of `dim` or `stride` channels fit by the checks above; blocks and cache are checked span by span.
        unsafe {
            let queries = (&raw mut (*memory).queries).cast::<bf16>();
            let weights = (&raw mut (*memory).weights).cast::<bf16>();
            let place = Place {
                queries: std::array::from_fn(|q| queries.add(q * dim).cast_const()),
                weights,
                weight_rows: std::array::from_fn(|q| weights.add(q * BLOCK_TOKENS).cast_const()),
                sums: (&raw mut (*memory).sums).cast(),
                outputs: (&raw mut (*memory).outputs).cast(),
                values: (&raw mut (*memory).values).cast(),
            };
            std::ptr::write_bytes(place.outputs, 0, count * stride);
            for (q, query) in attend.queries.iter().enumerate() {
                for i in (0..dim).step_by(LANES) {
                    let v = f32::load_up_to::<L>(query.add(i), dim - i);
                    bf16::store_up_to::<L>(queries.add(q * dim + i), v, dim - i);
                }
            }
            for span in attend.spans() {
                attend.blocked::<L>(span, &tiles, &place, &mut running);
            }
            attend.finish::<L>(&mut running, place.outputs);
        }
    }
}

impl Attend<'_, bf16> {
    /// # Safety
    /// `place` has room for the task's queries.
    #[inline(always)]
    unsafe fn blocked<L: Lanes>(&self, span: usize, tiles: &Tiles, place: &Place, running: &mut Running) {
        let (count, dim, stride) = (self.queries.len(), self.layout.head_dim, self.layout.value_stride());
        let start = span * BLOCK_TOKENS;
        let block = self.blocks[span];
        let head = self.layout.head_start(block, self.kv_head);
        let keys = &self.cache[head..head + self.layout.head_elements()];
        let values = keys[BLOCK_TOKENS * dim..].as_ptr().cast::<u32>();
        let next = self.layout.head_start(*self.blocks.get(span + 1).unwrap_or(&block), self.kv_head);
        let next = self.cache[next..].as_ptr().cast::<u8>();
        // SAFETY: a head's keys and values are in the cache, by the slice above; the rest is the caller's promise.
        unsafe {
            for line in (0..size_of_val(keys)).step_by(64) {
                L::prefetch(next.wrapping_add(line));
            }
            fresh::<L>(tiles, &place.queries[..count], dim / 2, (keys.as_ptr().cast(), BLOCK_TOKENS), place.sums);
            let (mut most, mut total, mut seen_to) = ([LOWEST; LANES], [0.0f32; LANES], 0);
            let mut sees = [false; TASK];
            for q in 0..count {
                let from = self.sees[q].start.max(start);
                let to = self.sees[q].end.min(start + BLOCK_TOKENS);
                let to_weights = place.weights.add(q * BLOCK_TOKENS);
                sees[q] = from < to;
                if !sees[q] {
                    std::ptr::write_bytes(to_weights, 0, BLOCK_TOKENS);
                    continue;
                }
                seen_to = seen_to.max(to - start);
                let p = place.sums.add(q * PANEL);
                let slope = self.slope(q, start);
                (most[q], total[q]) = weigh::<L>(p, from - start..to - start, slope, self.scale);
                L::store_half(to_weights, L::load(p));
                L::store_half(to_weights.add(LANES), L::load(p.add(LANES)));
            }
            if seen_to == 0 {
                return;
            }
            running.merge::<L>(&most, &total);
            let values = if seen_to == BLOCK_TOKENS {
                values
            } else {
                written(values, stride, seen_to, place.values);
                place.values.cast_const()
            };
            for first in (0..stride).step_by(PANEL) {
                let width = PANEL.min(stride - first);
                let panel = values.add(first * PAIRS);
                fresh::<L>(tiles, &place.weight_rows[..count], PAIRS, (panel, width), place.sums);
                for q in (0..count).filter(|q| sees[*q]) {
                    let join = running.join(q);
                    let (old, new) = (L::splat(*join.old_scale), L::splat(*join.new_scale));
                    for i in (0..width).step_by(LANES) {
                        let (sum, o) = (place.sums.add(q * PANEL + i), place.outputs.add(q * stride + first + i));
                        L::store(o, L::fma(L::load(sum), new, L::mul(L::load(o), old)));
                    }
                }
            }
        }
    }
}

/// A span's values up to a position, zeros behind: what was never written may be anything.
///
/// # Safety
/// Both hold a span of `stride` channels.
#[inline(always)]
unsafe fn written(values: *const u32, stride: usize, positions: usize, to: *mut u32) {
    for first in (0..stride).step_by(PANEL) {
        let width = PANEL.min(stride - first);
        for pair in 0..PAIRS {
            let mask = match positions.saturating_sub(2 * pair) {
                0 => 0,
                1 => 0xffff,
                _ => u32::MAX,
            };
            for word in first * PAIRS + pair * width..first * PAIRS + (pair + 1) * width {
                // SAFETY: the caller's promise.
                unsafe { *to.add(word) = *values.add(word) & mask };
            }
        }
    }
}
