//! Query and key heads made ready for [`super::grouped`]: normed, rotated and scaled, keys and values put into the cache.

use super::attention::WIDTH_MAX;
use super::grouped::{self, Step};
use super::lanes::{Element, Kernel, LANES, Lanes};
use super::norms::{NormInPlace, Squares, Sum, Weigh, inverse_root};
use super::rows::{Rotate, Scale};
use super::shared::Shared;
use crate::backend::HeadNorm;
use model::plan::BLOCK_TOKENS;
use model::rope::{Layout, Table};
use model::step::BlockId;
use std::mem::MaybeUninit;

/// How one row's query or key heads are normed.
#[derive(Clone, Copy)]
enum One<'a> {
    None,
    /// Each by itself, before its rotation.
    Before {
        weight: &'a [f32],
        eps: f32,
    },
    /// All with one inverse root, before the rotation.
    Known {
        weights: &'a [f32],
        inverse: f32,
    },
    /// Each by itself, after its rotation.
    After {
        eps: f32,
    },
}

/// One position's rotation.
#[derive(Clone, Copy)]
struct Turn<'a> {
    cos: &'a [f32],
    sin: &'a [f32],
    layout: Layout,
}

impl Step<'_> {
    /// Sums of squares of each head, at their columns of `out`; zero in the others.
    pub fn squares(&self, qkv: &[f32], (first, keys): (usize, Option<usize>), n: usize, cols: usize, out: &mut [f32]) {
        let (shape, dim) = (self.shape, self.shape.head_dim);
        self.pool.rows(out, cols, n, 16, &|index, out| {
            out.fill(0.0);
            let row = &qkv[index * self.width()..][..self.width()];
            for (head, x) in row[..(shape.heads + shape.kv_heads) * dim].chunks_exact(dim).enumerate() {
                let column = match keys {
                    _ if head < shape.heads => first + head,
                    Some(keys) => keys + head - shape.heads,
                    None => break,
                };
                out[column] = self.level.run(Squares { x });
            }
        });
    }

    /// Norms, rotates and scales queries and keys of `qkv`, and writes keys and values.
    pub fn prepare<T: Element>(
        &self,
        qkv: &mut [f32],
        norm: Option<HeadNorm<&[f32], &[f32]>>,
        rope: Option<&Table>,
        query_scale: Option<&[f32]>,
        cache: &mut [T],
    ) {
        let (shape, dim) = (self.shape, self.shape.head_dim);
        let cache = Shared::new(cache);
        self.pool.rows(qkv, self.width(), self.meta.rows.len(), 4, &|index, row| {
            let at = self.meta.rows[index];
            let (queries, rest) = row.split_at_mut(shape.heads * dim);
            let (keys, values) = rest.split_at_mut(shape.kv_heads * dim);
            let [of_queries, of_keys] = self.head_norms(norm, index);
            let turn = rope.zip(shape.rope.as_ref()).map(|(table, rope)| {
                let of = at.position * table.pairs..(at.position + 1) * table.pairs;
                Turn { cos: &table.cos[of.clone()], sin: &table.sin[of], layout: rope.layout }
            });
            self.ready(queries, of_queries, turn);
            if let Some(scales) = query_scale {
                self.level.run(Scale { x: queries, by: scales[at.position] });
            }
            self.ready(keys, of_keys, turn);
            for (head, (key, value)) in keys.chunks_exact(dim).zip(values.chunks_exact(dim)).enumerate() {
                let (block, slot) = (at.block, at.slot);
                self.level.run(Write { layout: self.layout, cache: &cache, block, slot, head, key, value });
            }
        });
    }

    /// What norms a row's query heads, and its key heads.
    fn head_norms<'a>(&self, norm: Option<HeadNorm<&'a [f32], &'a [f32]>>, row: usize) -> [One<'a>; 2] {
        match norm {
            None => [One::None; 2],
            Some(HeadNorm::Heads { query, key, eps }) => [query, key].map(|weight| One::Before { weight, eps }),
            Some(HeadNorm::Rotated { eps }) => [One::After { eps }; 2],
            Some(HeadNorm::Whole { query, key, eps, squares, heads }) => {
                let cols = squares.len() / self.meta.rows.len();
                let (queries, keys) = squares[row * cols..][..cols].split_at(heads);
                [(query, queries), (key, keys)].map(|(weights, squares)| {
                    let total = self.level.run(Sum { x: squares });
                    One::Known { weights, inverse: inverse_root(total, squares.len() * self.shape.head_dim, eps) }
                })
            }
        }
    }

    /// Norms and rotates each of some heads.
    fn ready(&self, heads: &mut [f32], norm: One<'_>, turn: Option<Turn<'_>>) {
        if matches!(norm, One::None) && turn.is_none() {
            return;
        }
        let dim = self.shape.head_dim;
        for (head, x) in heads.chunks_exact_mut(dim).enumerate() {
            match norm {
                One::Before { weight, eps } => self.level.run(NormInPlace { x: &mut *x, weight, eps }),
                One::Known { weights, inverse } => {
                    self.level.run(Weigh { x: &mut *x, inverse, weight: &weights[head * dim..][..dim] });
                }
                One::None | One::After { .. } => {}
            }
            if let Some(Turn { cos, sin, layout }) = turn {
                self.level.run(Rotate { x: &mut x[..2 * cos.len()], cos, sin, layout });
            }
            if let One::After { eps } = norm {
                let by = inverse_root(self.level.run(Squares { x: &*x }), dim, eps);
                self.level.run(Scale { x, by });
            }
        }
    }
}

/// Writes one position's keys and values of one head.
pub struct Write<'a, T> {
    pub layout: grouped::Layout,
    pub cache: &'a Shared<'a, T>,
    pub block: BlockId,
    pub slot: usize,
    pub head: usize,
    pub key: &'a [f32],
    pub value: &'a [f32],
}

impl<T: Element> Kernel for Write<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let dim = self.layout.head_dim;
        assert!(self.key.len() == dim && self.value.len() == dim && self.slot < BLOCK_TOKENS && dim <= WIDTH_MAX);
        let keys = self.layout.head_start(self.block, self.head);
        assert!(self.head < self.layout.kv_heads && keys + self.layout.head_elements() <= self.cache.len());
        let values = self.layout.values_start(self.block, self.head);
        let mut rounded = MaybeUninit::<[[T; WIDTH_MAX]; 2]>::uninit();
        let key = rounded.as_mut_ptr().cast::<T>();
        for i in (0..dim).step_by(LANES) {
            // SAFETY: below `dim`, which both ends hold; a (slot, head) belongs to one row and so to one task.
            unsafe {
                let (n, value) = (dim - i, f32::load_up_to::<L>(self.value.as_ptr().add(i), dim - i));
                T::store_up_to::<L>(key.add(i), f32::load_up_to::<L>(self.key.as_ptr().add(i), n), n);
                if self.layout.paired {
                    T::store_up_to::<L>(key.add(WIDTH_MAX + i), value, n);
                } else {
                    let at = values + self.slot * self.layout.value_stride() + i;
                    T::store_up_to::<L>(self.cache.pointer().add(at), value, n);
                }
            }
        }
        for channel in 0..dim {
            // SAFETY: written above; inside the head's keys and values.
            unsafe {
                if self.layout.paired {
                    let at = keys + grouped::Layout::pair_of_key(channel, self.slot);
                    *self.cache.pointer().add(at) = *key.add(channel);
                    let at = values + self.layout.pair_of_value(channel, self.slot);
                    *self.cache.pointer().add(at) = *key.add(WIDTH_MAX + channel);
                } else {
                    *self.cache.pointer().add(keys + channel * BLOCK_TOKENS + self.slot) = *key.add(channel);
                }
            }
        }
    }
}
