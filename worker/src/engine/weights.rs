//! A stage's weights on one rank, and how a layer's parts find theirs.

use super::comm;
use super::grouped;
use super::latent;
use super::mlp::Mlp;
use super::moe::Mixture;
use super::pass::Pass;
use super::tables::Kinds;
use crate::backend::{Backend, MatrixView, NormWeights};
use crate::load::loader::{Loader, Window};
use crate::load::shelf::{Label, Shelf};
use model::catalog::{self, Role, TensorId};
use model::fault::Fault;
use model::mesh::{Mesh, RankId};
use model::spec::{Branch, CacheKind, Layer, Mixer, ModelSpec, Norm, NormForm, Residual};
use std::ops::Range;

/// One decoder layer.
pub struct LayerWeights<B: Backend> {
    pub residual: Residual,
    pub mixer_norm: NormWeights<B::Vector>,
    pub mixer: MixerWeights<B>,
    pub branch_norm: NormWeights<B::Vector>,
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
    /// Of the embeddings themselves, on the first stage.
    pub embedding_norm: Option<NormWeights<B::Vector>>,
    head: Option<B::Matrix>,
    pub final_norm: Option<NormWeights<B::Vector>>,
    /// This rank's rows of the embedding table, which may have more than the head.
    pub embedded: Range<usize>,
    /// This rank's tokens that the head answers with.
    pub rows: Range<usize>,
}

impl<B: Backend> Vocabulary<B> {
    /// The embedding on the first stage, the head on the last, which needs the embedding too where something predicts.
    pub fn load(
        backend: &B,
        from: &Loader<'_>,
        shelf: &Shelf<B::Matrix>,
        spec: &ModelSpec,
        (first, last): (bool, bool),
    ) -> Result<Self, Fault> {
        let outer = |role| TensorId { layer: None, role, expert: None };
        let table = |role| {
            let label = Label { pieces: vec![from.piece(outer(role))?], segments: 1, number: 0 };
            shelf.get(label, || backend.matrix(&[from.window(outer(role))?.view()], 1))
        };
        let norm = |of: &Norm, [weight, bias]: [Role; 2]| -> Result<NormWeights<B::Vector>, Fault> {
            let vector = |role| backend.vector(&from.values(outer(role))?);
            let bias = if of.form == NormForm::Layer { Some(vector(bias)?) } else { None };
            Ok(NormWeights { norm: *of, weight: vector(weight)?, bias })
        };
        let tied = spec.head.tied;
        assert!(!tied || spec.embedding_rows == spec.vocab, "a tied head answers with every token that can be read");
        Ok(Vocabulary {
            embedded: from.vocab_rows(spec.embedding_rows)?,
            rows: from.vocab_rows(spec.vocab)?,
            embedding_norm: match &spec.embedding_norm {
                Some(of) if first => Some(norm(of, [Role::EmbeddingNorm, Role::EmbeddingNormBias])?),
                Some(_) | None => None,
            },
            embedding: if first || (last && catalog::embeds_last(spec)) { Some(table(Role::Embedding)?) } else { None },
            head: if last && !tied { Some(table(Role::Head)?) } else { None },
            final_norm: match last {
                true => Some(norm(&spec.final_norm, [Role::FinalNorm, Role::FinalNormBias])?),
                false => None,
            },
        })
    }

    fn embedding(&self) -> &B::Matrix {
        self.embedding.as_ref().expect("the stages that embed load the embedding")
    }

    /// The embeddings of a pass's rows, complete on every tensor rank.
    pub fn embed(&self, pass: &mut Pass<'_, B>, ids: &[u32], x: &mut B::Buffer) -> Result<(), Fault> {
        let rows = pass.rows;
        pass.backend.embed(self.embedding(), self.embedded.start as u32, ids, x)?;
        if pass.communicators.tensor.size() > 1 {
            comm::sum(pass, x, (rows, pass.hidden))?;
        } else {
            // A sum over ranks turns a stored -0 into +0, so one rank must too.
            comm::full(pass.backend, x, rows)?.iter_mut().for_each(|v| *v += 0.0);
            pass.backend.host_done(x, rows)?;
        }
        Ok(())
    }

    pub fn head(&self) -> &B::Matrix {
        self.head.as_ref().or(self.embedding.as_ref()).expect("the last stage loads the head or what it is tied to")
    }
}

/// Finds one layer's tensors by what they do.
pub struct LayerLoader<'a, B: Backend> {
    pub backend: &'a B,
    pub loader: &'a Loader<'a>,
    pub shelf: &'a Shelf<B::Matrix>,
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
        let alone = |role: &Role| catalog::stack(*role) != catalog::stack(roles[0]);
        assert!(!roles.iter().any(alone), "the catalogue does not stack {roles:?}, and plans count by it");
        let segments = self.loader.segments(self.id(roles[0], expert))?;
        let pieces: Result<Vec<_>, Fault> = roles.iter().map(|&r| self.loader.piece(self.id(r, expert))).collect();
        self.shelf.get(Label { pieces: pieces?, segments, number: 0 }, || {
            let windows: Result<Vec<Window<'_>>, Fault> =
                roles.iter().map(|&r| self.loader.window(self.id(r, expert))).collect();
            let windows = windows?;
            let parts: Vec<MatrixView<'_>> = windows.iter().map(Window::view).collect();
            self.backend.matrix(&parts, segments)
        })
    }

    /// The `number`-th of the matrices, of one segment each, that are made of a tensor's window.
    pub fn made_of(
        &self,
        role: Role,
        number: usize,
        make: impl FnOnce() -> Result<B::Matrix, Fault>,
    ) -> Result<B::Matrix, Fault> {
        let pieces = vec![self.loader.piece(self.id(role, None))?];
        self.shelf.get(Label { pieces, segments: 1, number }, make)
    }

    /// This rank's window of a tensor.
    pub fn window(&self, role: Role) -> Result<Window<'_>, Fault> {
        self.loader.window(self.id(role, None))
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

    /// The same of one expert's tensors.
    pub fn expert_vector(&self, roles: &[Role], expert: usize) -> Result<B::Vector, Fault> {
        let mut values = Vec::new();
        for &role in roles {
            values.extend(self.loader.values(self.id(role, Some(expert)))?);
        }
        self.backend.vector(&values)
    }

    /// A norm's weight, and its bias where it has one.
    pub fn norm(&self, of: &Norm, weight: Role, bias: Role) -> Result<NormWeights<B::Vector>, Fault> {
        let bias = if of.form == NormForm::Layer { Some(self.vector(&[bias])?) } else { None };
        Ok(NormWeights { norm: *of, weight: self.vector(&[weight])?, bias })
    }

    /// A norm that never has a bias.
    pub fn plain_norm(&self, of: &Norm, weight: Role) -> Result<NormWeights<B::Vector>, Fault> {
        assert_eq!(of.form, NormForm::Rms, "the catalogue declares no bias for the norm of {weight:?}");
        Ok(NormWeights { norm: *of, weight: self.vector(&[weight])?, bias: None })
    }

    /// The whole layer. `kinds` are those of the stage's tables.
    pub fn load(&self, layer: &Layer, kinds: &Kinds) -> Result<LayerWeights<B>, Fault> {
        let tables = kinds.chosen(&layer.mixer);
        let mixer_norm = self.norm(&layer.mixer_norm, Role::MixerNorm, Role::MixerNormBias)?;
        let mixer = match &layer.mixer {
            Mixer::Grouped(g) => MixerWeights::Grouped(grouped::Attention::load(g, self, tables)?),
            Mixer::Latent(l) => MixerWeights::Latent(Box::new(latent::Attention::load(l, self, tables)?)),
        };
        let branch_norm = self.norm(&layer.branch_norm, Role::BranchNorm, Role::BranchNormBias)?;
        let mut branches = Vec::with_capacity(layer.branches.len());
        for branch in &layer.branches {
            branches.push(match branch {
                Branch::Dense(d) => BranchWeights::Dense(Mlp::load(d, self)?),
                Branch::Moe(m) => BranchWeights::Moe(Box::new(Mixture::load(m, self)?)),
            });
        }
        Ok(LayerWeights { residual: layer.residual, mixer_norm, mixer, branch_norm, branches })
    }
}
