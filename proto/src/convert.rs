//! Plans on the wire.

use crate::WireError;
use crate::cluster::v1 as wire;
use model::mesh::{Mesh, RankId};
use model::plan::{Epoch, Guesser, KernelFamily, Limits, Member, Plan, WorkerId};
use model::quant::Dtype;

pub fn plan_to_wire(plan: &Plan) -> wire::Plan {
    let bounds = plan.stages.iter().map(|s| s.start).chain(plan.stages.last().map(|s| s.end));
    wire::Plan {
        epoch: plan.epoch.0,
        mesh: Some(wire::Mesh {
            pipeline: plan.mesh.pipeline as u32,
            data: plan.mesh.data as u32,
            tensor: plan.mesh.tensor as u32,
            expert: plan.mesh.expert as u32,
        }),
        dtype: match plan.dtype {
            Dtype::F32 => wire::Dtype::F32,
            Dtype::Bf16 => wire::Dtype::Bf16,
        }
        .into(),
        family: family_to_wire(plan.family).into(),
        stage_bounds: bounds.map(|b| b as u32).collect(),
        members: plan.members.iter().map(member_to_wire).collect(),
        limits: Some(wire::Limits {
            model_len_max: plan.limits.model_len_max as u64,
            step_tokens_max: plan.limits.step_tokens_max as u64,
            step_sequences_max: plan.limits.step_sequences_max as u64,
            blocks: plan.limits.blocks as u64,
        }),
        predictors: plan.guesser.predictors() as u32,
        draft: plan.guesser == Guesser::Draft,
    }
}

pub fn plan_from_wire(plan: wire::Plan) -> Result<Plan, WireError> {
    let dtype = match plan.dtype() {
        wire::Dtype::F32 => Dtype::F32,
        wire::Dtype::Bf16 => Dtype::Bf16,
        wire::Dtype::Unspecified => return Err(WireError::Missing("plan.dtype")),
    };
    let family = family_from_wire(plan.family())?;
    let mesh = plan.mesh.ok_or(WireError::Missing("plan.mesh"))?;
    let mesh = Mesh::new(mesh.pipeline as usize, mesh.data as usize, mesh.tensor as usize, mesh.expert as usize)?;
    let limits = plan.limits.ok_or(WireError::Missing("plan.limits"))?;
    let bounds: Vec<usize> = plan.stage_bounds.iter().map(|&b| b as usize).collect();
    if bounds.len() != mesh.pipeline + 1 || !bounds.is_sorted() {
        return Err(WireError::Range { what: "plan.stage_bounds", value: bounds.len() as u64 });
    }
    Ok(Plan {
        epoch: Epoch(plan.epoch),
        mesh,
        dtype,
        family,
        stages: bounds.windows(2).map(|w| w[0]..w[1]).collect(),
        members: plan.members.into_iter().map(|m| member_from_wire(m, &mesh)).collect::<Result<_, _>>()?,
        limits: Limits {
            model_len_max: size(limits.model_len_max, "limits.model_len_max")?,
            step_tokens_max: size(limits.step_tokens_max, "limits.step_tokens_max")?,
            step_sequences_max: size(limits.step_sequences_max, "limits.step_sequences_max")?,
            blocks: size(limits.blocks, "limits.blocks")?,
        },
        guesser: match (plan.draft, plan.predictors) {
            (true, 0) => Guesser::Draft,
            (true, predictors) => return Err(WireError::Range { what: "plan.predictors", value: predictors.into() }),
            (false, predictors) => Guesser::of_predictors(predictors as usize),
        },
    })
}

pub fn family_to_wire(family: KernelFamily) -> wire::KernelFamily {
    match family {
        KernelFamily::Vector => wire::KernelFamily::Vector,
        KernelFamily::Amx => wire::KernelFamily::Amx,
        KernelFamily::Tensor => wire::KernelFamily::Tensor,
    }
}

pub fn family_from_wire(family: wire::KernelFamily) -> Result<KernelFamily, WireError> {
    match family {
        wire::KernelFamily::Vector => Ok(KernelFamily::Vector),
        wire::KernelFamily::Amx => Ok(KernelFamily::Amx),
        wire::KernelFamily::Tensor => Ok(KernelFamily::Tensor),
        wire::KernelFamily::Unspecified => Err(WireError::Missing("kernel family")),
    }
}

fn member_to_wire(member: &Member) -> wire::Member {
    wire::Member {
        worker: member.worker.0.clone(),
        host: member.host.clone(),
        data_address: member.data_address.clone(),
        ranks: member.ranks.iter().map(|r| r.0).collect(),
        threads: member.threads as u32,
    }
}

fn member_from_wire(member: wire::Member, mesh: &Mesh) -> Result<Member, WireError> {
    if let Some(&rank) = member.ranks.iter().find(|&&r| r as usize >= mesh.ranks()) {
        return Err(WireError::Range { what: "member.rank", value: rank.into() });
    }
    Ok(Member {
        worker: WorkerId(member.worker),
        host: member.host,
        data_address: member.data_address,
        ranks: member.ranks.into_iter().map(RankId).collect(),
        threads: member.threads as usize,
    })
}

/// A count that buffers are sized by: bounded, so that no peer can make another allocate absurdly.
fn size(value: u64, what: &'static str) -> Result<usize, WireError> {
    if value > u32::MAX.into() {
        return Err(WireError::Range { what, value });
    }
    Ok(value as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Plan {
        Plan {
            epoch: Epoch(3),
            mesh: Mesh::new(2, 1, 2, 2).expect("a mesh"),
            dtype: Dtype::Bf16,
            family: KernelFamily::Vector,
            stages: vec![0..2, 2..4],
            members: vec![Member {
                worker: WorkerId("w0".into()),
                host: "h".into(),
                data_address: "127.0.0.1:1".into(),
                ranks: vec![RankId(0), RankId(3)],
                threads: 2,
            }],
            limits: Limits { model_len_max: 1024, step_tokens_max: 512, step_sequences_max: 16, blocks: 99 },
            guesser: Guesser::Predictors(1),
        }
    }

    #[test]
    fn a_plan_survives_the_wire() {
        for guesser in [Guesser::Nobody, Guesser::Predictors(1), Guesser::Draft] {
            let plan = Plan { guesser, ..example() };
            assert_eq!(plan_from_wire(plan_to_wire(&plan)), Ok(plan));
        }
    }

    #[test]
    fn a_draft_model_beside_predictors_is_refused() {
        let wire = wire::Plan { draft: true, ..plan_to_wire(&example()) };
        assert_eq!(plan_from_wire(wire), Err(WireError::Range { what: "plan.predictors", value: 1 }));
    }

    #[test]
    fn a_rank_outside_the_mesh_is_refused() {
        let mut wire = plan_to_wire(&example());
        wire.members[0].ranks.push(4);
        assert_eq!(plan_from_wire(wire), Err(WireError::Range { what: "member.rank", value: 4 }));
    }

    #[test]
    fn stages_that_do_not_match_the_mesh_are_refused() {
        let mut wire = plan_to_wire(&example());
        wire.stage_bounds.pop();
        assert!(plan_from_wire(wire).is_err());
    }
}
