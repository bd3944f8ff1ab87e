//! A stage's weights on one rank, and how a layer's parts find theirs.

use super::grouped;
use super::latent;
use super::mlp::Mlp;
use super::moe::Mixture;
use crate::backend::Backend;
use crate::load::loader::Loader;
use model::catalog::{Role, TensorId};
use model::fault::Fault;
use model::mesh::{Mesh, RankId};
use model::rope::Rope;
use model::spec::{Branch, CacheKind, Layer, Mixer, ModelSpec};
use std::ops::Range;

/// One decoder layer.
pub struct LayerWeights<B: Backend> {
    pub mixer_norm: (B::Vector, f32),
    pub mixer: MixerWeights<B>,
    pub branch_norm: (B::Vector, f32),
    pub branches: Vec<BranchWeights<B>>,
}

pub enum MixerWeights<B: Backend> {
    Grouped(grouped::Attention<B>),
    Latent(Box<latent::Attention<B>>),
}

pub enum BranchWeights<B: Backend> {
    Dense(Mlp<B>),
    Moe(Box<Mixture<B>>),
}

impl<B: Backend> MixerWeights<B> {
    pub fn cache(&self) -> CacheKind {
        match self {
            MixerWeights::Grouped(a) => a.cache(),
            MixerWeights::Latent(a) => a.cache(),
        }
    }
}

/// Embedding and head: one matrix where a single stage holds both and the model ties them.
pub struct Vocabulary<B: Backend> {
    embedding: Option<B::Matrix>,
    head: Option<B::Matrix>,
    pub final_norm: Option<(B::Vector, f32)>,
    /// Vocabulary rows of this rank.
    pub rows: Range<usize>,
}

impl<B: Backend> Vocabulary<B> {
    /// The embedding on the first stage, the head on the last.
    pub fn load(backend: &B, from: &Loader<'_>, spec: &ModelSpec, first: bool, last: bool) -> Result<Self, Fault> {
        let outer = |role| TensorId { layer: None, role, expert: None };
        let table = |role| backend.matrix(&[from.window(outer(role))?], 1);
        let tied = spec.head.tied;
        Ok(Vocabulary {
            rows: from.vocab_rows(spec.vocab)?,
            embedding: if first || (last && tied) { Some(table(Role::Embedding)?) } else { None },
            head: if last && !tied { Some(table(Role::Head)?) } else { None },
            final_norm: match last {
                true => Some((backend.vector(&from.values(outer(Role::FinalNorm))?)?, spec.final_norm.eps)),
                false => None,
            },
        })
    }

    pub fn embedding(&self) -> &B::Matrix {
        self.embedding.as_ref().expect("the first stage loads the embedding")
    }

    pub fn head(&self) -> &B::Matrix {
        self.head.as_ref().or(self.embedding.as_ref()).expect("the last stage loads the head or what it is tied to")
    }
}

/// Finds one layer's tensors by what they do.
pub struct LayerLoader<'a, B: Backend> {
    pub backend: &'a B,
    pub loader: &'a Loader<'a>,
    pub layer: usize,
    pub mesh: Mesh,
    pub rank: RankId,
    pub hidden: usize,
}

impl<B: Backend> LayerLoader<'_, B> {
    fn id(&self, role: Role, expert: Option<usize>) -> TensorId {
        TensorId { layer: Some(self.layer), role, expert }
    }

    /// This rank's windows, stacked into one matrix with the first one's segments.
    pub fn matrix(&self, roles: &[Role]) -> Result<B::Matrix, Fault> {
        self.stacked(roles, None)
    }

    pub fn expert(&self, roles: &[Role], expert: usize) -> Result<B::Matrix, Fault> {
        self.stacked(roles, Some(expert))
    }

    fn stacked(&self, roles: &[Role], expert: Option<usize>) -> Result<B::Matrix, Fault> {
        let parts: Result<Vec<_>, Fault> = roles.iter().map(|&r| self.loader.window(self.id(r, expert))).collect();
        let segments = self.loader.segments(self.id(roles[0], expert))?;
        self.backend.matrix(&parts?, segments)
    }

    /// This rank's values, one tensor after another.
    pub fn values(&self, roles: &[Role]) -> Result<Vec<f32>, Fault> {
        let mut values = Vec::new();
        for &role in roles {
            values.extend(self.loader.values(self.id(role, None))?);
        }
        Ok(values)
    }

    pub fn vector(&self, roles: &[Role]) -> Result<B::Vector, Fault> {
        self.backend.vector(&self.values(roles)?)
    }

    /// The whole layer. `ropes` are the stage's tables in order.
    pub fn load(&self, layer: &Layer, ropes: &[Rope]) -> Result<LayerWeights<B>, Fault> {
        let rope = layer
            .mixer
            .rope()
            .map(|rope| ropes.iter().position(|r| r == rope).expect("every layer's rope is in the stage's list"));
        let mixer_norm = (self.vector(&[Role::MixerNorm])?, layer.mixer_norm.eps);
        let mixer = match &layer.mixer {
            Mixer::Grouped(g) => MixerWeights::Grouped(grouped::Attention::load(g, self, rope)?),
            Mixer::Latent(l) => {
                let rope = rope.expect("latent attention always rotates");
                MixerWeights::Latent(Box::new(latent::Attention::load(l, self, rope)?))
            }
        };
        let branch_norm = (self.vector(&[Role::BranchNorm])?, layer.branch_norm.eps);
        let mut branches = Vec::with_capacity(layer.branches.len());
        for branch in &layer.branches {
            branches.push(match branch {
                Branch::Dense(d) => BranchWeights::Dense(Mlp::load(d, self)?),
                Branch::Moe(m) => BranchWeights::Moe(Box::new(Mixture::load(m, self)?)),
            });
        }
        Ok(LayerWeights { mixer_norm, mixer, branch_norm, branches })
    }
}
