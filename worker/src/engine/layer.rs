//! One decoder layer over a pass's rows: `x += mixer(norm(x)); x += branches(norm(x))`.

use super::pass::Pass;
use super::tables::Tables;
use super::weights::{BranchWeights, LayerWeights, MixerWeights};
use crate::backend::{Backend, Kind, NormWeights, Routing};
use model::fault::Fault;
use model::spec::Residual;

impl<B: Backend> LayerWeights<B> {
    /// Runs it over `x`, with `normed` to work in; the choices of its mixtures. Without rows only lanes that share a
    /// mixture's experts meet.
    pub fn run(
        &self,
        pass: &mut Pass<'_, B>,
        tables: &Tables<B>,
        cache: &mut B::Cache,
        x: &mut B::Buffer,
        normed: &mut B::Buffer,
    ) -> Result<Vec<Routing>, Fault> {
        let rows = pass.rows;
        if rows > 0 {
            enter(pass, &self.mixer_norm, self.residual, x, normed)?;
            match &self.mixer {
                MixerWeights::Grouped(a) => a.run(pass, tables, normed, x, cache)?,
                MixerWeights::Latent(a) => a.run(pass, tables, normed, x, cache)?,
            }
            enter(pass, &self.branch_norm, self.residual, x, normed)?;
        }
        let mut routings = Vec::new();
        for branch in &self.branches {
            match branch {
                BranchWeights::Dense(mlp) if rows > 0 => mlp.run(pass, normed, x)?,
                BranchWeights::Moe(moe) if rows > 0 || moe.meets() => routings.push(moe.run(pass, normed, x)?),
                BranchWeights::Dense(_) | BranchWeights::Moe(_) => {}
            }
        }
        Ok(routings)
    }
}

/// The normed input of a mixer or of branches; `x` becomes what their results are added to.
fn enter<B: Backend>(
    pass: &mut Pass<'_, B>,
    norm: &NormWeights<B::Vector>,
    residual: Residual,
    x: &mut B::Buffer,
    normed: &mut B::Buffer,
) -> Result<(), Fault> {
    pass.backend.norm(x, norm, pass.rows, normed)?;
    match residual {
        Residual::Stream => Ok(()),
        Residual::Normed => replace(pass, norm, x),
    }
}

/// `x = norm(x)`, unrounded.
pub fn replace<B: Backend>(
    pass: &mut Pass<'_, B>,
    norm: &NormWeights<B::Vector>,
    x: &mut B::Buffer,
) -> Result<(), Fault> {
    let cols = pass.hidden;
    let mut out = pass.take(cols, Kind::Full)?;
    pass.backend.norm(x, norm, pass.rows, &mut out)?;
    std::mem::swap(x, &mut out);
    pass.give(cols, Kind::Full, out);
    Ok(())
}
