//! Planned bytes against loaded ones.

use crate::ring::{Setting, loaded_bytes};
use anyhow::{Result, ensure};
use coordinator::source::Source;
use model::cut;
use model::mesh::Mesh;
use model::plan::{Guesser, KernelFamily};
use model::quant::Dtype;
use model::size::{self, Keeping};
use model::spec::{Mixer, ModelSpec};
use std::path::Path;

/// Bytes of tables that backends keep as vectors, though planners count them with the rotations.
fn tables(spec: &ModelSpec, mesh: &Mesh, positions: usize) -> u64 {
    let mut scales = Vec::new();
    let mut slopes = 0;
    for layer in &spec.layers {
        let scale = match &layer.mixer {
            Mixer::Grouped(g) => g.query_scale,
            Mixer::Latent(l) => l.query_scale,
        };
        scales.extend(scale.filter(|scale| !scales.contains(scale)));
        if let Mixer::Grouped(g) = &layer.mixer
            && g.alibi
        {
            slopes += g.heads / mesh.tensor;
        }
    }
    ((scales.len() * positions + slopes) * 4) as u64
}

/// Loads the model at `path`, with as many predictors, on the meshes that it can be cut over, in both dtypes and families,
/// and compares.
pub fn check(path: &Path, predictors: usize, meshes: &[(usize, usize, usize, usize)]) -> Result<()> {
    let source = Source::open(path)?;
    let (spec, storage) = (&source.spec.predicting(predictors)?, &source.storage);
    for &(pipeline, data, tensor, expert) in meshes {
        let mesh = Mesh::new(pipeline, data, tensor, expert)?;
        if cut::check(spec, &mesh).is_err() {
            continue;
        }
        for dtype in [Dtype::F32, Dtype::Bf16] {
            for family in [KernelFamily::Vector, KernelFamily::Amx] {
                let setting =
                    Setting { family, guesser: Guesser::of_predictors(predictors), ..Setting::new(mesh, dtype) };
                let loaded = loaded_bytes(path, None, setting)?;
                for (rank, (stages, loaded)) in mesh.all().zip(loaded) {
                    let (place, limits) = (mesh.place(rank), &setting.limits);
                    let keeping = Keeping { storage, dtype, family };
                    // One stage's slopes and scales are only its own.
                    let own = ModelSpec { layers: spec.layers[stages.clone()].to_vec(), ..spec.clone() };
                    let planned = size::rank(spec, &mesh, place, stages, keeping, limits).weights;
                    let tables = tables(&own, &mesh, limits.model_len_max);
                    let what = format!("{} {mesh} {dtype} {family:?} rank {}", path.display(), rank.0);
                    ensure!(planned + tables == loaded, "{what}: {loaded} bytes, {} planned", planned + tables);
                }
            }
        }
    }
    Ok(())
}
