//! Multi-head attention with shared key/value heads: norms, rotation and the cache write in one operation, attention in
//! the next, the output projection summed over the tensor ranks.

use super::pass::Pass;
use super::weights::LayerLoader;
use crate::backend::{Backend, GroupedShape, Kind};
use model::catalog::Role;
use model::cut;
use model::fault::Fault;
use model::spec::{CacheKind, Grouped};

/// One layer's weights and place in the mesh.
pub struct Attention<B: Backend> {
    shape: GroupedShape,
    /// Query, key and value heads of this rank, stacked.
    qkv: B::Matrix,
    qkv_bias: Option<B::Vector>,
    norms: Option<(B::Vector, B::Vector, f32)>,
    output: B::Matrix,
    output_bias: Option<B::Vector>,
    /// Index of the rope table.
    rope: Option<usize>,
    hidden: usize,
}

impl<B: Backend> Attention<B> {
    pub fn load(spec: &Grouped, from: &LayerLoader<'_, B>, rope: Option<usize>) -> Result<Attention<B>, Fault> {
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
        let norms = match spec.qk_norm {
            Some(norm) => Some((from.vector(&[Role::QueryNorm])?, from.vector(&[Role::KeyNorm])?, norm.norm().eps)),
            None => None,
        };
        Ok(Attention {
            shape,
            qkv: from.matrix(&[Role::Query, Role::Key, Role::Value])?,
            qkv_bias: if spec.qkv_bias { Some(from.vector(&bias)?) } else { None },
            norms,
            output: from.matrix(&[Role::Output])?,
            output_bias: if spec.out_bias { Some(from.vector(&[Role::OutputBias])?) } else { None },
            rope,
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
        ropes: &[B::RopeTable],
        normed: &B::Buffer,
        x: &mut B::Buffer,
        cache: &mut B::Cache,
    ) -> Result<(), Fault> {
        let GroupedShape { heads, kv_heads, head_dim, .. } = self.shape;
        let (packed, mixed) = ((heads + 2 * kv_heads) * head_dim, heads * head_dim);
        let rows = pass.rows;
        let mut qkv = pass.take(packed, Kind::Full)?;
        pass.backend.matmul(normed, &self.qkv, self.qkv_bias.as_ref(), rows, &mut qkv)?;
        let norms = self.norms.as_ref().map(|(q, k, eps)| (q, k, *eps));
        let rope = self.rope.map(|index| &ropes[index]);
        pass.backend.grouped_prepare(&self.shape, &mut qkv, norms, rope, pass.meta, cache)?;
        let mut out = pass.take(mixed, Kind::Input)?;
        pass.backend.grouped_attention(&self.shape, &qkv, pass.meta, cache, &mut out)?;
        pass.give(packed, Kind::Full, qkv);
        let y = pass.matmul_sum(&out, &self.output, self.hidden)?;
        pass.give(mixed, Kind::Input, out);
        pass.backend.add(x, &y, self.output_bias.as_ref(), rows)?;
        pass.give(self.hidden, Kind::Full, y);
        Ok(())
    }
}
