//! What checkpoints call tensors, in both namings, and what they hold that no declaration claims.

use super::{Entry, Part, Role, Source, TensorId};
use crate::spec::{Branch, ModelSpec, Naming};

/// Where a GGUF file keeps what its rotary frequencies are divided by.
pub const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Where `spec`'s checkpoint keeps the tensor `id`.
pub(super) fn source(spec: &ModelSpec, id: &TensorId) -> Source {
    match spec.naming {
        Naming::HuggingFace => Source { name: hugging_face(spec, id), part: Part::WHOLE },
        Naming::Gguf => {
            let stack = id.expert.map(|index| Entry { index, of: experts(spec, id) });
            Source { name: gguf(id), part: Part { stack, ..Part::WHOLE } }
        }
    }
}

fn experts(spec: &ModelSpec, id: &TensorId) -> usize {
    let layer = id.layer.expect("an expert belongs to a layer");
    let count = |b: &Branch| if let Branch::Moe(m) = b { Some(m.experts) } else { None };
    spec.layers[layer].branches.iter().find_map(count).expect("an expert belongs to a mixture")
}

fn hugging_face(spec: &ModelSpec, id: &TensorId) -> String {
    let Some(layer) = id.layer else {
        let name = match id.role {
            Role::Embedding => "model.embed_tokens.weight",
            Role::FinalNorm => "model.norm.weight",
            Role::Head => "lm_head.weight",
            role => unreachable!("{role:?} belongs to a layer"),
        };
        return name.to_string();
    };
    let mixtral = spec.architecture == "mixtral";
    let block = if mixtral { "block_sparse_moe" } else { "mlp" };
    if let Some(expert) = id.expert {
        let matrix = match (id.role, mixtral) {
            (Role::ExpertGate, false) => "gate_proj",
            (Role::ExpertUp, false) => "up_proj",
            (Role::ExpertDown, false) => "down_proj",
            (Role::ExpertGate, true) => "w1",
            (Role::ExpertUp, true) => "w3",
            (Role::ExpertDown, true) => "w2",
            (role, _) => unreachable!("{role:?} is not an expert's"),
        };
        return format!("model.layers.{layer}.{block}.experts.{expert}.{matrix}.weight");
    }
    let name = match id.role {
        Role::Router if mixtral => "block_sparse_moe.gate.weight",
        role => hugging_face_layer(role),
    };
    format!("model.layers.{layer}.{name}")
}

fn hugging_face_layer(role: Role) -> &'static str {
    match role {
        Role::MixerNorm => "input_layernorm.weight",
        Role::BranchNorm => "post_attention_layernorm.weight",
        Role::Query => "self_attn.q_proj.weight",
        Role::Key => "self_attn.k_proj.weight",
        Role::Value => "self_attn.v_proj.weight",
        Role::Output => "self_attn.o_proj.weight",
        Role::QueryBias => "self_attn.q_proj.bias",
        Role::KeyBias => "self_attn.k_proj.bias",
        Role::ValueBias => "self_attn.v_proj.bias",
        Role::OutputBias => "self_attn.o_proj.bias",
        Role::QueryNorm => "self_attn.q_norm.weight",
        Role::KeyNorm => "self_attn.k_norm.weight",
        Role::QueryDown => "self_attn.q_a_proj.weight",
        Role::QueryDownNorm => "self_attn.q_a_layernorm.weight",
        Role::QueryUp => "self_attn.q_b_proj.weight",
        Role::KvDown => "self_attn.kv_a_proj_with_mqa.weight",
        Role::KvDownNorm => "self_attn.kv_a_layernorm.weight",
        Role::KvUp => "self_attn.kv_b_proj.weight",
        Role::Gate => "mlp.gate_proj.weight",
        Role::Up => "mlp.up_proj.weight",
        Role::Down => "mlp.down_proj.weight",
        Role::GateBias => "mlp.gate_proj.bias",
        Role::UpBias => "mlp.up_proj.bias",
        Role::DownBias => "mlp.down_proj.bias",
        Role::Router => "mlp.gate.weight",
        Role::RouterCorrection => "mlp.gate.e_score_correction_bias",
        Role::SharedGate => "mlp.shared_experts.gate_proj.weight",
        Role::SharedUp => "mlp.shared_experts.up_proj.weight",
        Role::SharedDown => "mlp.shared_experts.down_proj.weight",
        Role::Sinks => "self_attn.sinks",
        Role::RouterBias => "mlp.router.bias",
        role => unreachable!("{role:?} is named elsewhere"),
    }
}

fn gguf(id: &TensorId) -> String {
    gguf_name(id.layer, id.role)
}

/// What a GGUF file calls the tensor of `role`; a stack of all experts has one name.
pub fn gguf_name(layer: Option<usize>, role: Role) -> String {
    let name = match role {
        Role::Embedding => "token_embd.weight",
        Role::FinalNorm => "output_norm.weight",
        Role::Head => "output.weight",
        Role::MixerNorm => "attn_norm.weight",
        Role::BranchNorm => "ffn_norm.weight",
        Role::Query => "attn_q.weight",
        Role::Key => "attn_k.weight",
        Role::Value => "attn_v.weight",
        Role::Output => "attn_output.weight",
        Role::QueryBias => "attn_q.bias",
        Role::KeyBias => "attn_k.bias",
        Role::ValueBias => "attn_v.bias",
        Role::OutputBias => "attn_output.bias",
        Role::QueryNorm => "attn_q_norm.weight",
        Role::KeyNorm => "attn_k_norm.weight",
        Role::QueryDown => "attn_q_a.weight",
        Role::QueryDownNorm => "attn_q_a_norm.weight",
        Role::QueryUp => "attn_q_b.weight",
        Role::KvDown => "attn_kv_a_mqa.weight",
        Role::KvDownNorm => "attn_kv_a_norm.weight",
        Role::KvUp => "attn_kv_b.weight",
        Role::Gate => "ffn_gate.weight",
        Role::Up => "ffn_up.weight",
        Role::Down => "ffn_down.weight",
        Role::GateBias => "ffn_gate.bias",
        Role::UpBias => "ffn_up.bias",
        Role::DownBias => "ffn_down.bias",
        Role::Router => "ffn_gate_inp.weight",
        Role::RouterCorrection => "exp_probs_b.bias",
        Role::SharedGate => "ffn_gate_shexp.weight",
        Role::SharedUp => "ffn_up_shexp.weight",
        Role::SharedDown => "ffn_down_shexp.weight",
        Role::ExpertGate => "ffn_gate_exps.weight",
        Role::ExpertUp => "ffn_up_exps.weight",
        Role::ExpertDown => "ffn_down_exps.weight",
        Role::ExpertGateBias => "ffn_gate_exps.bias",
        Role::ExpertUpBias => "ffn_up_exps.bias",
        Role::ExpertDownBias => "ffn_down_exps.bias",
        Role::EmbeddingNorm => "token_embd_norm.weight",
        Role::EmbeddingNormBias => "token_embd_norm.bias",
        Role::FinalNormBias => "output_norm.bias",
        Role::MixerNormBias => "attn_norm.bias",
        Role::BranchNormBias => "ffn_norm.bias",
        Role::Sinks => "attn_sinks.weight",
        Role::RouterBias => "ffn_gate_inp.bias",
    };
    match layer {
        Some(layer) => format!("blk.{layer}.{name}"),
        None => name.to_string(),
    }
}

/// Why a checkpoint's tensor may stay unclaimed; `None` is for a name that must stop the load.
pub fn ignored(spec: &ModelSpec, name: &str) -> Option<&'static str> {
    match spec.naming {
        Naming::HuggingFace => {
            if name.ends_with(".rotary_emb.inv_freq") {
                return Some("rotary frequencies, computed from the config");
            }
            if name == "lm_head.weight" && spec.head.tied {
                return Some("a copy of the embedding, which the head is tied to");
            }
            // Prediction heads are published as layers past the last.
            let number = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
            let layer = number.and_then(|(number, _)| number.parse::<usize>().ok());
            let predicts = matches!(spec.architecture.as_str(), "deepseek_v3" | "kimi_k2");
            (predicts && layer.is_some_and(|l| l >= spec.layers.len()))
                .then_some("a head that predicts tokens further on, which is not used")
        }
        Naming::Gguf => (name == ROPE_FACTORS).then_some("rotary frequency factors, read with the file's metadata"),
    }
}
