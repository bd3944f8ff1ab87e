//! What every plan keeps, whoever made it: the planner checks its own, a worker those it is sent.

use model::ModelSpec;
use model::cut;
use model::mesh::Mesh;
use model::plan::{BLOCK_TOKENS, Plan};
use std::collections::BTreeSet;

/// Refuses a plan that does not hold together, saying which rule it breaks.
pub fn check(spec: &ModelSpec, plan: &Plan) -> Result<(), String> {
    let Mesh { pipeline, data, tensor, expert } = plan.mesh;
    let mesh = Mesh::new(pipeline, data, tensor, expert).map_err(|e| e.to_string())?;
    cut::check(spec, &mesh).map_err(|e| e.to_string())?;
    stages(spec, plan)?;
    members(plan)?;
    limits(spec, plan)
}

/// Stages are as many as the mesh has, none is empty, and they tile the layers in order.
fn stages(spec: &ModelSpec, plan: &Plan) -> Result<(), String> {
    if plan.stages.len() != plan.mesh.pipeline {
        return Err(format!("{} stages for pp {}", plan.stages.len(), plan.mesh.pipeline));
    }
    let mut next = 0;
    for (index, stage) in plan.stages.iter().enumerate() {
        if stage.start != next || stage.end <= stage.start {
            return Err(format!("stage {index} is {stage:?}, it must begin at layer {next} and not be empty"));
        }
        next = stage.end;
    }
    if next != spec.layers.len() {
        return Err(format!("the stages end at layer {next} of {}", spec.layers.len()));
    }
    Ok(())
}

/// Members are distinct, hold ascending ranks, and together every rank once.
fn members(plan: &Plan) -> Result<(), String> {
    let mut workers = BTreeSet::new();
    let mut held = BTreeSet::new();
    for member in &plan.members {
        let name = &member.worker.0;
        if !workers.insert(name) {
            return Err(format!("worker {name} is a member twice"));
        }
        if member.ranks.is_empty() || member.threads == 0 {
            return Err(format!("worker {name} holds {} ranks of {} threads", member.ranks.len(), member.threads));
        }
        if !member.ranks.is_sorted() {
            return Err(format!("the ranks of worker {name} are not ascending"));
        }
        for rank in &member.ranks {
            if rank.0 as usize >= plan.mesh.ranks() {
                return Err(format!("worker {name} holds rank {} of {}", rank.0, plan.mesh.ranks()));
            }
            if !held.insert(*rank) {
                return Err(format!("rank {} is held twice", rank.0));
            }
        }
    }
    if held.len() != plan.mesh.ranks() {
        return Err(format!("{} of {} ranks are held", held.len(), plan.mesh.ranks()));
    }
    Ok(())
}

/// A pool holds a sequence of the longest length, and a step its sequences.
fn limits(spec: &ModelSpec, plan: &Plan) -> Result<(), String> {
    let limits = &plan.limits;
    if limits.model_len_max == 0 || limits.model_len_max > spec.positions_max {
        return Err(format!("sequences of {} tokens for a model of {}", limits.model_len_max, spec.positions_max));
    }
    if limits.blocks < limits.model_len_max.div_ceil(BLOCK_TOKENS) || u32::try_from(limits.blocks).is_err() {
        return Err(format!("{} blocks for a sequence of {} tokens", limits.blocks, limits.model_len_max));
    }
    if limits.step_sequences_max == 0 || limits.step_tokens_max < limits.step_sequences_max {
        return Err(format!("{} sequences in {} tokens", limits.step_sequences_max, limits.step_tokens_max));
    }
    Ok(())
}
