//! Multi-head attention with shared key/value heads: norms, rotation and the cache write in one operation, attention in
//! the next, the output projection summed over the tensor ranks.

use super::comm;
use super::pass::Pass;
use super::tables::{self, Chosen, Tables};
use super::weights::LayerLoader;
use crate::backend::{Backend, GroupedShape, HeadNorm, Kind, PerHead};
use model::catalog::Role;
use model::cut;
use model::fault::Fault;
use model::spec::{CacheKind, Grouped, QkNorm};

/// One layer's weights and place in the mesh.
pub struct Attention<B: Backend> {
    shape: GroupedShape,
    /// Query, key and value heads of this rank, stacked.
    qkv: B::Matrix,
    qkv_bias: Option<B::Vector>,
    norm: Norm<B>,
    per_head: PerHead<B::Vector>,
    output: B::Matrix,
    output_bias: Option<B::Vector>,
    tables: Chosen,
    hidden: usize,
}

/// How query and key heads are normed.
enum Norm<B: Backend> {
    None,
    Heads {
        query: B::Vector,
        key: B::Vector,
        eps: f32,
    },
    /// Over the heads of all tensor ranks.
    Whole {
        query: B::Vector,
        key: B::Vector,
        eps: f32,
        columns: Columns,
    },
    Rotated {
        eps: f32,
    },
}

/// Where a rank's heads stand among those of all tensor ranks: query heads first, then key heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Columns {
    heads: usize,
    width: usize,
    query: usize,
    /// `None` where another rank counts the same key heads.
    key: Option<usize>,
}

impl Columns {
    fn of(spec: &Grouped, tensor: usize, slice: usize) -> Columns {
        let copies = tensor.div_ceil(spec.kv_heads);
        let key = cut::kv_heads(spec.kv_heads, tensor, slice).start;
        Columns {
            heads: spec.heads,
            width: spec.heads + spec.kv_heads,
            query: slice * (spec.heads / tensor),
            key: slice.is_multiple_of(copies).then_some(spec.heads + key),
        }
    }
}

impl<B: Backend> Attention<B> {
    pub fn load(spec: &Grouped, from: &LayerLoader<'_, B>, tables: Chosen) -> Result<Attention<B>, Fault> {
        let mesh = from.mesh;
        let slice = mesh.place(from.rank).slice;
        let shape = GroupedShape {
            heads: spec.heads / mesh.tensor,
            kv_heads: cut::kv_heads(spec.kv_heads, mesh.tensor, slice).len(),
            head_dim: spec.head_dim,
            span: spec.span,
            scale: spec.scale,
            rope: spec.rope.clone(),
        };
        let bias = [Role::QueryBias, Role::KeyBias, Role::ValueBias];
        let weights = || Ok::<_, Fault>((from.vector(&[Role::QueryNorm])?, from.vector(&[Role::KeyNorm])?));
        let norm = match spec.qk_norm {
            None => Norm::None,
            Some(QkNorm::Rotated(norm)) => Norm::Rotated { eps: norm.eps },
            Some(QkNorm::Heads(norm)) => {
                let (query, key) = weights()?;
                Norm::Heads { query, key, eps: norm.eps }
            }
            Some(QkNorm::Whole(norm)) => {
                let (query, key) = weights()?;
                Norm::Whole { query, key, eps: norm.eps, columns: Columns::of(spec, mesh.tensor, slice) }
            }
        };
        let first = slice * shape.heads;
        let slopes = || from.backend.vector(&tables::slopes(spec.heads)[first..first + shape.heads]);
        let per_head = PerHead {
            slopes: if spec.alibi { Some(slopes()?) } else { None },
            sinks: if spec.sinks { Some(from.vector(&[Role::Sinks])?) } else { None },
        };
        Ok(Attention {
            shape,
            qkv: from.matrix(&[Role::Query, Role::Key, Role::Value])?,
            qkv_bias: if spec.qkv_bias { Some(from.vector(&bias)?) } else { None },
            norm,
            per_head,
            output: from.matrix(&[Role::Output])?,
            output_bias: if spec.out_bias { Some(from.vector(&[Role::OutputBias])?) } else { None },
            tables,
            hidden: from.hidden,
        })
    }

    /// What this rank caches of the layer.
    pub fn cache(&self) -> CacheKind {
        CacheKind::Paged { kv_heads: self.shape.kv_heads, head_dim: self.shape.head_dim }
    }

    /// `x += attention(normed)`.
    pub fn run(
        &self,
        pass: &mut Pass<'_, B>,
        tables: &Tables<B>,
        normed: &B::Buffer,
        x: &mut B::Buffer,
        cache: &mut B::Cache,
    ) -> Result<(), Fault> {
        let GroupedShape { heads, kv_heads, head_dim, .. } = self.shape;
        let (packed, mixed) = ((heads + 2 * kv_heads) * head_dim, heads * head_dim);
        let rows = pass.rows;
        let mut qkv = pass.take(packed, Kind::Full)?;
        pass.backend.matmul(normed, &self.qkv, self.qkv_bias.as_ref(), rows, &mut qkv)?;
        self.prepare(pass, tables, &mut qkv, cache)?;
        let mut out = pass.take(mixed, Kind::Input)?;
        let per_head = PerHead { slopes: self.per_head.slopes.as_ref(), sinks: self.per_head.sinks.as_ref() };
        pass.backend.grouped_attention(&self.shape, &qkv, per_head, pass.meta, cache, &mut out)?;
        pass.give(packed, Kind::Full, qkv);
        let y = pass.matmul_sum(&out, &self.output, self.hidden)?;
        pass.give(mixed, Kind::Input, out);
        pass.backend.add(x, &y, self.output_bias.as_ref(), rows)?;
        pass.give(self.hidden, Kind::Full, y);
        Ok(())
    }

    /// Makes query and key heads ready and writes the cache. Where all heads are normed as one, every rank gets the sum
    /// of squares of each head: adding zeros changes no bits, so the ranks add the same numbers in the same order.
    fn prepare(
        &self,
        pass: &mut Pass<'_, B>,
        tables: &Tables<B>,
        qkv: &mut B::Buffer,
        cache: &mut B::Cache,
    ) -> Result<(), Fault> {
        let (rope, scale) = (tables.rope(self.tables), tables.query_scale(self.tables));
        let norm = match &self.norm {
            Norm::None => None,
            Norm::Heads { query, key, eps } => Some(HeadNorm::Heads { query, key, eps: *eps }),
            Norm::Rotated { eps } => Some(HeadNorm::Rotated { eps: *eps }),
            Norm::Whole { query, key, eps, columns } => {
                let (rows, Columns { heads, width, .. }) = (pass.rows, *columns);
                let mut squares = pass.take(width, Kind::Full)?;
                let mine = (columns.query, columns.key);
                pass.backend.head_squares(&self.shape, qkv, mine, rows, &mut squares)?;
                comm::sum(pass, &mut squares, (rows, width))?;
                let norm = Some(HeadNorm::Whole { query, key, eps: *eps, squares: &squares, heads });
                pass.backend.grouped_prepare(&self.shape, qkv, norm, rope, scale, pass.meta, cache)?;
                pass.give(width, Kind::Full, squares);
                return Ok(());
            }
        };
        pass.backend.grouped_prepare(&self.shape, qkv, norm, rope, scale, pass.meta, cache)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_head_is_counted_by_one_rank() {
        for (heads, kv_heads) in [(8, 8), (8, 2), (8, 1), (12, 4)] {
            for tensor in [1, 2, 4] {
                let spec = Grouped::plain(heads, kv_heads, 16);
                let mut counted = vec![0; heads + kv_heads];
                for slice in 0..tensor {
                    let columns = Columns::of(&spec, tensor, slice);
                    let held = cut::kv_heads(kv_heads, tensor, slice).len();
                    counted[columns.query..columns.query + heads / tensor].iter_mut().for_each(|n| *n += 1);
                    if let Some(key) = columns.key {
                        counted[key..key + held].iter_mut().for_each(|n| *n += 1);
                    }
                }
                assert!(counted.iter().all(|n| *n == 1), "{heads} and {kv_heads} heads over {tensor}: {counted:?}");
            }
        }
    }
}
