//! What both attentions share: a span's weights applied to its values, merged into the running answer.
//!
//! A span has its own maximum m, weights p = exp(score - m), their sum s and outputs o = sum of p v. The running
//! answer (M, S, O), which starts as (lowest, 0, 0), takes spans left to right:
//!
//! ```text
//! M' = max(M, m)    a = exp(M - M')    b = exp(m - M')    S = s b + S a    O = o b + O a     (each one FMA of a product)
//! ```

use super::lanes::{Element, LANES, Lanes};
use super::math;
use model::plan::BLOCK_TOKENS;
use std::ops::Range;

/// The maximum of nothing; finite, so that it may be taken from itself.
pub const LOWEST: f32 = f32::MIN;
/// Queries handled together.
pub const QUERIES: usize = 8;
/// The widest value row (channels of a value head, or a latent's rank) of the running answers on the stack.
pub const WIDTH_MAX: usize = 1024;

/// The weights of a span for some queries: `p[query * query_step + position * position_step]`.
#[derive(Clone, Copy)]
pub struct Weights {
    pub p: *const f32,
    pub query_step: usize,
    pub position_step: usize,
}

/// A span's value rows.
#[derive(Clone, Copy)]
pub struct Values<T> {
    pub rows: *const T,
    /// Elements between positions, at least the width in whole vectors.
    pub stride: usize,
    pub width: usize,
}

/// Running answers: `outputs[query * stride]`.
#[derive(Clone, Copy)]
pub struct Answers {
    pub outputs: *mut f32,
    pub stride: usize,
}

/// How a span joins each running answer: `new_scale = b`, `old_scale = a`.
#[derive(Clone, Copy)]
pub struct Join {
    pub old_scale: *const f32,
    pub new_scale: *const f32,
}

/// Maxima and sums of up to sixteen running answers, and the scales of the last merge.
pub struct Running {
    most: [f32; LANES],
    total: [f32; LANES],
    old_scale: [f32; LANES],
    new_scale: [f32; LANES],
}

impl Running {
    pub fn begin() -> Running {
        Running { most: [LOWEST; LANES], total: [0.0; LANES], old_scale: [0.0; LANES], new_scale: [0.0; LANES] }
    }

    /// Merges a span's maxima and sums; an answer that the span skips has [`LOWEST`] and sum 0 there, and stays.
    ///
    /// # Safety
    /// As [`Lanes`].
    #[inline(always)]
    pub unsafe fn merge<L: Lanes>(&mut self, span_most: &[f32; LANES], span_total: &[f32; LANES]) {
        unsafe {
            let (most, span) = (L::load(self.most.as_ptr()), L::load(span_most.as_ptr()));
            let high = L::max(most, span);
            let (old, new) = (math::exp::<L>(L::sub(most, high)), math::exp::<L>(L::sub(span, high)));
            let total = L::mul(L::load(self.total.as_ptr()), old);
            L::store(self.total.as_mut_ptr(), L::fma(L::load(span_total.as_ptr()), new, total));
            L::store(self.most.as_mut_ptr(), high);
            L::store(self.old_scale.as_mut_ptr(), old);
            L::store(self.new_scale.as_mut_ptr(), new);
        }
    }

    /// The scales of answers `first..`.
    pub fn join(&self, first: usize) -> Join {
        Join { old_scale: self.old_scale[first..].as_ptr(), new_scale: self.new_scale[first..].as_ptr() }
    }

    /// What an answer is multiplied by in the end.
    pub fn inverse(&self, answer: usize) -> f32 {
        1.0 / self.total[answer]
    }

    /// Takes in a last position without a value, whose score `sinks` has for each answer, and returns what the answers
    /// are multiplied by in the end.
    ///
    /// # Safety
    /// As [`Lanes`].
    #[inline(always)]
    pub unsafe fn sink<L: Lanes>(&mut self, sinks: &[f32]) -> [f32; LANES] {
        let (mut most, mut total) = ([LOWEST; LANES], [0.0; LANES]);
        most[..sinks.len()].copy_from_slice(sinks);
        total[..sinks.len()].fill(1.0);
        unsafe { self.merge::<L>(&most, &total) };
        std::array::from_fn(|answer| self.old_scale[answer] / self.total[answer])
    }
}

/// Adds the span's outputs for `queries` queries and positions `at` to their running answers.
///
/// # Safety
/// Weights, values, scales and answers hold what the arguments name.
#[inline(always)]
pub unsafe fn apply<L: Lanes, T: Element>(
    queries: usize,
    at: Range<usize>,
    p: Weights,
    v: Values<T>,
    join: Join,
    out: Answers,
) {
    debug_assert!(at.end <= BLOCK_TOKENS && queries <= QUERIES);
    let mut first = 0;
    while first < queries {
        let left = queries - first;
        // SAFETY: the same promise, some queries further.
        unsafe {
            let p = Weights { p: p.p.add(first * p.query_step), ..p };
            let join = Join { old_scale: join.old_scale.add(first), new_scale: join.new_scale.add(first) };
            let out = Answers { outputs: out.outputs.add(first * out.stride), ..out };
            first += match left {
                8.. => columns::<L, T, 8, 2>(at.clone(), p, v, join, out),
                4.. => columns::<L, T, 4, 4>(at.clone(), p, v, join, out),
                2.. => columns::<L, T, 2, 8>(at.clone(), p, v, join, out),
                _ => columns::<L, T, 1, 8>(at.clone(), p, v, join, out),
            };
        }
    }
}

#[inline(always)]
unsafe fn columns<L: Lanes, T: Element, const Q: usize, const C: usize>(
    at: Range<usize>,
    p: Weights,
    v: Values<T>,
    join: Join,
    out: Answers,
) -> usize {
    let mut column = 0;
    unsafe {
        while v.width.next_multiple_of(LANES) - column >= C * LANES {
            tile::<L, T, Q, C>(at.clone(), p, v, column, join, out);
            column += C * LANES;
        }
        while column < v.width {
            tile::<L, T, Q, 1>(at.clone(), p, v, column, join, out);
            column += LANES;
        }
    }
    Q
}

#[inline(always)]
unsafe fn tile<L: Lanes, T: Element, const Q: usize, const C: usize>(
    at: Range<usize>,
    p: Weights,
    v: Values<T>,
    column: usize,
    join: Join,
    out: Answers,
) {
    unsafe {
        let mut sums = [[L::splat(0.0); C]; Q];
        for t in at {
            let row = v.rows.add(t * v.stride + column);
            let mut values = [T::load::<L>(row); C];
            for c in 1..C {
                values[c] = T::load::<L>(row.add(c * LANES));
            }
            for q in 0..Q {
                let weight = L::splat(*p.p.add(q * p.query_step + t * p.position_step));
                for c in 0..C {
                    sums[q][c] = L::fma(weight, values[c], sums[q][c]);
                }
            }
        }
        for q in 0..Q {
            let (old, new) = (L::splat(*join.old_scale.add(q)), L::splat(*join.new_scale.add(q)));
            for c in 0..C {
                let o = out.outputs.add(q * out.stride + column + c * LANES);
                L::store(o, L::fma(sums[q][c], new, L::mul(L::load(o), old)));
            }
        }
    }
}
