//! Multi-head latent attention in its absorbed form, for prefill as for decode: queries are carried into the latent
//! space, attend there, and what they find is carried out again, so that one cached vector serves all heads.

use super::pass::Pass;
use super::tables::{Chosen, Tables};
use super::weights::LayerLoader;
use crate::backend::{Backend, Kind, LatentShape, MatrixView, NormWeights};
use model::catalog::Role;
use model::fault::Fault;
use model::spec::{CacheKind, Latent};
use std::cell::OnceCell;

/// One layer's weights and place in the mesh.
pub struct Attention<B: Backend> {
    shape: LatentShape,
    query: Query<B>,
    kv_down: B::Matrix,
    kv_norm: NormWeights<B::Vector>,
    /// `[kv_rank, nope]` a head.
    absorb: Vec<B::Matrix>,
    /// `[value, kv_rank]` a head.
    expand: Vec<B::Matrix>,
    output: B::Matrix,
    tables: Chosen,
    hidden: usize,
}

/// The way from hidden to query heads.
enum Query<B: Backend> {
    Direct(B::Matrix),
    Low { rank: usize, down: B::Matrix, norm: NormWeights<B::Vector>, up: B::Matrix },
}

impl<B: Backend> Attention<B> {
    pub fn load(spec: &Latent, from: &LayerLoader<'_, B>, tables: Chosen) -> Result<Attention<B>, Fault> {
        let shape = LatentShape {
            heads: spec.heads / from.mesh.tensor,
            kv_rank: spec.kv_rank,
            nope_dim: spec.nope_dim,
            rope_dim: spec.rope_dim,
            value_dim: spec.value_dim,
            scale: spec.scale,
            rope: spec.rope.clone(),
        };
        let query = match spec.query_rank {
            None => Query::Direct(from.matrix(&[Role::Query])?),
            Some(rank) => Query::Low {
                rank,
                down: from.matrix(&[Role::QueryDown])?,
                norm: from.plain_norm(&spec.latent_norm, Role::QueryDownNorm)?,
                up: from.matrix(&[Role::QueryUp])?,
            },
        };
        let (absorb, expand) = if spec.halves { halves(&shape, from)? } else { split(&shape, from)? };
        Ok(Attention {
            shape,
            query,
            kv_down: from.matrix(&[Role::KvDown])?,
            kv_norm: from.plain_norm(&spec.latent_norm, Role::KvDownNorm)?,
            absorb,
            expand,
            output: from.matrix(&[Role::Output])?,
            tables,
            hidden: from.hidden,
        })
    }

    /// What this rank caches of the layer.
    pub fn cache(&self) -> CacheKind {
        CacheKind::Latent { kv_rank: self.shape.kv_rank, rope_dim: self.shape.rope_dim }
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
        let LatentShape { heads, kv_rank, nope_dim, rope_dim, value_dim, .. } = self.shape;
        let (query_cols, kv_cols, mixed) = (heads * (nope_dim + rope_dim), kv_rank + rope_dim, heads * value_dim);
        let rows = pass.rows;
        let mut q = self.queries(pass, normed, query_cols)?;
        let mut kv = pass.take(kv_cols, Kind::Full)?;
        pass.backend.matmul(normed, &self.kv_down, None, rows, &mut kv)?;
        let rope = tables.rope(self.tables).expect("latent attention always rotates");
        let scale = tables.query_scale(self.tables);
        let norm = &self.kv_norm;
        pass.backend.latent_prepare(&self.shape, &mut q, &mut kv, norm, rope, scale, pass.meta, cache)?;
        pass.give(kv_cols, Kind::Full, kv);
        let mut out = pass.take(mixed, Kind::Input)?;
        pass.backend.latent_attention(&self.shape, &q, &self.absorb, &self.expand, pass.meta, cache, &mut out)?;
        pass.give(query_cols, Kind::Full, q);
        let y = pass.matmul_sum(&out, &self.output, self.hidden)?;
        pass.give(mixed, Kind::Input, out);
        pass.backend.add(x, &y, None, rows)?;
        pass.give(self.hidden, Kind::Full, y);
        Ok(())
    }

    fn queries(&self, pass: &mut Pass<'_, B>, normed: &B::Buffer, cols: usize) -> Result<B::Buffer, Fault> {
        let rows = pass.rows;
        let mut q = pass.take(cols, Kind::Full)?;
        match &self.query {
            Query::Direct(w) => pass.backend.matmul(normed, w, None, rows, &mut q)?,
            Query::Low { rank, down, norm, up } => {
                let mut low = pass.take(*rank, Kind::Full)?;
                pass.backend.matmul(normed, down, None, rows, &mut low)?;
                let mut low_normed = pass.take(*rank, Kind::Input)?;
                pass.backend.norm(&low, norm, rows, &mut low_normed)?;
                pass.backend.matmul(&low_normed, up, None, rows, &mut q)?;
                pass.give(*rank, Kind::Full, low);
                pass.give(*rank, Kind::Input, low_normed);
            }
        }
        Ok(q)
    }
}

/// The halves of the up projection as they are stored.
#[allow(clippy::type_complexity)] // two lists of matrices
fn halves<B: Backend>(
    shape: &LatentShape,
    from: &LayerLoader<'_, B>,
) -> Result<(Vec<B::Matrix>, Vec<B::Matrix>), Fault> {
    let heads = |role, each: usize| -> Result<Vec<B::Matrix>, Fault> {
        let window = from.window(role)?;
        let all = window.view();
        assert_eq!(all.rows, shape.heads * each, "the catalogue declares this rank's heads");
        let head = |head| MatrixView { row: all.row + head * each, rows: each, ..all };
        (0..shape.heads).map(|h| from.made_of(role, h, || from.backend.matrix(&[head(h)], 1))).collect()
    };
    Ok((heads(Role::Absorb, shape.kv_rank)?, heads(Role::Expand, shape.value_dim)?))
}

/// The heads of the up projection `[nope + value, kv_rank]`, each taken apart into its absorbing half, transposed, and
/// its expanding half.
#[allow(clippy::type_complexity)] // two lists of matrices
fn split<B: Backend>(
    shape: &LatentShape,
    from: &LayerLoader<'_, B>,
) -> Result<(Vec<B::Matrix>, Vec<B::Matrix>), Fault> {
    let LatentShape { heads, kv_rank, nope_dim, value_dim, .. } = *shape;
    let up = OnceCell::new();
    // Read only where some matrix is not at hand.
    let head = |index: usize| -> Result<(&[f32], &[f32]), Fault> {
        let up: &Vec<f32> = match up.get() {
            Some(up) => up,
            None => {
                let values = from.values(&[Role::KvUp])?;
                let all = heads * (nope_dim + value_dim) * kv_rank;
                assert_eq!(values.len(), all, "the catalogue declares this rank's heads");
                up.get_or_init(|| values)
            }
        };
        let each = (nope_dim + value_dim) * kv_rank;
        Ok(up[index * each..(index + 1) * each].split_at(nope_dim * kv_rank))
    };
    let absorbing = |index| {
        let (key, _) = head(index)?;
        let mut transposed = vec![0.0; nope_dim * kv_rank];
        for (n, row) in key.chunks_exact(kv_rank).enumerate() {
            for (k, v) in row.iter().enumerate() {
                transposed[k * nope_dim + n] = *v;
            }
        }
        from.backend.matrix_f32(&transposed, kv_rank, nope_dim, 1)
    };
    let (mut absorb, mut expand) = (Vec::with_capacity(heads), Vec::with_capacity(heads));
    for index in 0..heads {
        absorb.push(from.made_of(Role::KvUp, 2 * index, || absorbing(index))?);
        let expanding = || from.backend.matrix_f32(head(index)?.1, value_dim, kv_rank, 1);
        expand.push(from.made_of(Role::KvUp, 2 * index + 1, expanding)?);
    }
    Ok((absorb, expand))
}
