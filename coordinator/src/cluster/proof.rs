//! What workers prove of the weights that they loaded, compared: with the model's own list of digests where there is one,
//! else with what the first worker that loaded a segment proved. Two workers whose files differ never serve together.

use model::plan::{Plan, WorkerId};
use model::proof::{self, Digest, SegmentId};
use model::spec::ModelSpec;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Bytes of a digest.
const DIGEST: usize = size_of::<Digest>();

/// Digests by segment, and where each is known from.
#[derive(Debug)]
pub struct Reference {
    spec: Arc<ModelSpec>,
    known: BTreeMap<SegmentId, (Digest, Arc<str>)>,
}

impl Reference {
    /// `list`: the model's own digests (see [`model::proof::List`]).
    pub fn new(spec: Arc<ModelSpec>, list: Option<BTreeMap<SegmentId, Digest>>) -> Reference {
        let source: Arc<str> = "the model's list of digests".into();
        let known = list.unwrap_or_default().into_iter().map(|(id, digest)| (id, (digest, source.clone()))).collect();
        Reference { spec, known }
    }

    /// Takes what `worker` proves of its part of `plan`, or says what is wrong with it.
    pub fn take(&mut self, plan: &Plan, worker: &WorkerId, digests: &[u8]) -> Result<(), String> {
        let member = plan.members.iter().find(|m| m.worker == *worker);
        let member = member.ok_or_else(|| format!("{} has no part in epoch {}", worker.0, plan.epoch.0))?;
        let spec = self.spec.predicting(plan.guesser.predictors()).map_err(|e| e.to_string())?;
        let owed: Vec<SegmentId> =
            proof::owed(&spec, &plan.mesh, &plan.stages, &member.ranks).map(|(id, _)| id).collect();
        if digests.len() != owed.len() * DIGEST {
            let (owed, sent) = (owed.len(), digests.len());
            return Err(format!("its ranks owe {owed} digests of {DIGEST} bytes, it sent {sent} bytes"));
        }
        let who: Arc<str> = worker.0.as_str().into();
        let (digests, _) = digests.as_chunks::<DIGEST>();
        let wrong: Vec<(&SegmentId, &Arc<str>)> = owed
            .iter()
            .zip(digests)
            .filter_map(|(id, digest)| {
                let (known, from) = self.known.get(id)?;
                (known != digest).then_some((id, from))
            })
            .collect();
        if let Some(((tensor, segment), from)) = wrong.first() {
            return Err(format!(
                "its weights are not those of {from}: {} of {} segments differ, the first is segment {segment} of {}",
                wrong.len(),
                owed.len(),
                proof::label(tensor)
            ));
        }
        for (id, digest) in owed.into_iter().zip(digests) {
            self.known.entry(id).or_insert_with(|| (*digest, who.clone()));
        }
        Ok(())
    }

    /// One digest for all of the model's weights, in hexadecimal, once workers have proven all of them.
    pub fn root(&self) -> Option<String> {
        let digests = self.known.iter().map(|(id, (digest, _))| (*id, *digest)).collect();
        proof::root(&self.spec, &digests).map(|root| proof::hex(&root))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::mesh::{Mesh, RankId};
    use model::plan::{Epoch, Guesser, KernelFamily, Limits, Member};
    use model::quant::Dtype;

    const MOE: &str = r#"{"model_type":"qwen3_moe","vocab_size":512,"hidden_size":64,"head_dim":16,
"intermediate_size":128,"moe_intermediate_size":32,"num_hidden_layers":2,"num_attention_heads":8,
"num_key_value_heads":4,"num_experts":16,"num_experts_per_tok":4,"max_position_embeddings":4096,"rms_norm_eps":1e-06,
"eos_token_id":2}"#;

    /// A worker a rank.
    fn plan(mesh: Mesh) -> Plan {
        let member = |rank: u32| Member {
            worker: WorkerId(format!("w{rank}")),
            host: "h".into(),
            data_address: String::new(),
            ranks: vec![RankId(rank)],
            threads: 1,
        };
        Plan {
            epoch: Epoch(1),
            mesh,
            dtype: Dtype::F32,
            family: KernelFamily::Vector,
            stages: std::iter::once(0..2).collect(),
            members: (0..mesh.ranks() as u32).map(member).collect(),
            limits: Limits { model_len_max: 1, step_tokens_max: 1, step_sequences_max: 1, blocks: 1 },
            guesser: Guesser::Nobody,
        }
    }

    /// Of weights that are those of every other mesh, with one byte of one digest changed where that is asked for.
    fn proof_of(spec: &ModelSpec, plan: &Plan, worker: usize, change: Option<usize>) -> Vec<u8> {
        let digest = |((tensor, segment), _): (SegmentId, _)| -> Digest {
            let mut digest = [0; DIGEST];
            for (at, byte) in format!("{tensor:?} {segment}").bytes().enumerate() {
                digest[at % DIGEST] = digest[at % DIGEST] * 3 + byte % 7;
            }
            digest
        };
        let owed = proof::owed(spec, &plan.mesh, &plan.stages, &plan.members[worker].ranks);
        let mut proof = owed.map(digest).collect::<Vec<_>>().concat();
        if let Some(at) = change {
            proof[at] ^= 1;
        }
        proof
    }

    fn id(worker: usize) -> WorkerId {
        WorkerId(format!("w{worker}"))
    }

    #[test]
    fn any_mesh_is_compared_with_what_any_other_proved() {
        let spec = Arc::new(model::hf::spec(MOE, None).unwrap());
        let mut reference = Reference::new(spec.clone(), None);
        let two = plan(Mesh { pipeline: 1, data: 1, tensor: 2, expert: 2 });
        reference.take(&two, &id(0), &proof_of(&spec, &two, 0, None)).unwrap();
        assert_eq!(reference.root(), None, "half of it is not proven");
        reference.take(&two, &id(1), &proof_of(&spec, &two, 1, None)).unwrap();
        let root = reference.root().unwrap();
        let four = plan(Mesh { pipeline: 1, data: 2, tensor: 2, expert: 4 });
        for worker in 0..4 {
            reference.take(&four, &id(worker), &proof_of(&spec, &four, worker, None)).unwrap();
        }
        let one = plan(Mesh::ONE);
        let whole = proof_of(&spec, &one, 0, None);
        for at in (0..whole.len()).step_by(whole.len() / 29) {
            let said = reference.take(&one, &id(0), &proof_of(&spec, &one, 0, Some(at))).unwrap_err();
            assert!(said.contains("1 of") && said.contains("segments differ, the first is segment"), "{said}");
        }
        assert_eq!(reference.root(), Some(root), "who was refused left nothing behind");
        let short = reference.take(&one, &id(0), &whole[1..]).unwrap_err();
        assert!(short.contains("digests of 16 bytes, it sent"), "{short}");
    }

    #[test]
    fn the_models_own_list_counts_from_the_start() {
        let spec = Arc::new(model::hf::spec(MOE, None).unwrap());
        let mut first = Reference::new(spec.clone(), None);
        let one = plan(Mesh::ONE);
        first.take(&one, &id(0), &proof_of(&spec, &one, 0, None)).unwrap();
        let list = first.known.iter().map(|(id, (digest, _))| (*id, *digest)).collect();
        let mut reference = Reference::new(spec.clone(), Some(list));
        assert_eq!(reference.root(), first.root());
        let said = reference.take(&one, &id(0), &proof_of(&spec, &one, 0, Some(40))).unwrap_err();
        assert!(said.contains("not those of the model's list"), "{said}");
    }
}
