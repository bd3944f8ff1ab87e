//! What checkpoints call tensors, in both namings, and what they hold that no declaration claims.

use super::{Entry, Fused, Part, Role, Source, TensorId};
use crate::spec::{Branch, Dialect, Mixer, ModelSpec, Moe, Naming};

/// Where a GGUF file keeps what its rotary frequencies are divided by.
pub const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Where `spec`'s checkpoint keeps the tensor `id`.
pub(super) fn source(spec: &ModelSpec, id: &TensorId) -> Source {
    let stack = |index| Entry { index, of: experts(spec, id) };
    match spec.naming {
        Naming::HuggingFace(dialect) => {
            let name = hugging_face(spec, &dialect, id);
            let stack = id.expert.filter(|_| dialect.stacked).map(stack);
            let transposed =
                dialect.transposed && matches!(id.role, Role::ExpertGate | Role::ExpertUp | Role::ExpertDown);
            Source { name, part: Part { stack, fused: fused(spec, &dialect, id), transposed } }
        }
        Naming::Gguf => Source { name: gguf(spec, id), part: Part { stack: id.expert.map(stack), ..Part::WHOLE } },
    }
}

fn experts(spec: &ModelSpec, id: &TensorId) -> usize {
    mixture(spec, id).experts
}

fn mixture<'a>(spec: &'a ModelSpec, id: &TensorId) -> &'a Moe {
    let layer = id.layer.expect("an expert belongs to a layer");
    let moe = |b: &'a Branch| if let Branch::Moe(m) = b { Some(m) } else { None };
    spec.layer(layer).branches.iter().find_map(moe).expect("an expert belongs to a mixture")
}

/// The dialect in which `architecture` is usually published.
pub fn dialect(architecture: &str) -> Dialect {
    let plain = Dialect { root: "model.", layers: "layers", head: "lm_head.weight", stacked: false, transposed: false };
    match architecture {
        "bloom" => Dialect { root: "transformer.", layers: "h", ..plain },
        "gpt_oss" => Dialect { stacked: true, ..plain },
        "llama4_text" => Dialect { stacked: true, transposed: true, ..plain },
        _ => plain,
    }
}

/// Finds `spec`'s dialect by the names that its checkpoint holds; without any that fit it stays as it is. Predictors that
/// the config tells of and the checkpoint leaves out are dropped.
pub fn settle(spec: &mut ModelSpec, holds: &dyn Fn(&str) -> bool) {
    let Naming::HuggingFace(usual) = spec.naming else { return };
    if let Some(dialect) = settled(spec, usual, holds) {
        spec.naming = Naming::HuggingFace(dialect);
    }
    let has = |index: &usize| {
        let (layer, role) = (Some(spec.layers.len() + index), Role::PredictorEmbeddingNorm);
        holds(&source(spec, &TensorId { layer, role, expert: None }).name)
    };
    let there = (0..spec.predictors.len()).take_while(has).count();
    spec.predictors.truncate(there);
}

fn settled(spec: &ModelSpec, usual: Dialect, holds: &dyn Fn(&str) -> bool) -> Option<Dialect> {
    let roots = match spec.architecture.as_str() {
        "bloom" => &["transformer.", ""][..],
        _ => &["model.", "language_model.model.", "model.language_model.", "language_model."],
    };
    let embedding = TensorId { layer: None, role: Role::Embedding, expert: None };
    let with =
        |dialect: Dialect| ModelSpec { naming: Naming::HuggingFace(dialect), layers: Vec::new(), ..spec.clone() };
    let root = roots.iter().find(|&&root| {
        let dialect = Dialect { root, ..usual };
        holds(&hugging_face(&with(dialect), &dialect, &embedding))
    });
    let &root = root?;
    let layers = if holds(&format!("{root}blocks.0.input_layernorm.weight")) { "blocks" } else { usual.layers };
    let inner = "language_model.lm_head.weight";
    let head = if holds(inner) { inner } else { usual.head };
    let sparse = spec.layers.iter().position(|l| l.branches.iter().any(|b| matches!(b, Branch::Moe(_))));
    let plain_stack = sparse
        .is_some_and(|layer| holds(&format!("{root}{layers}.{}.mlp.experts.gate_up_proj", stored_layer(spec, layer))));
    // gpt-oss turns its experts' matrices around where they are not quantised.
    let transposed = usual.transposed || (plain_stack && spec.architecture == "gpt_oss");
    let stacked = usual.stacked || plain_stack;
    Some(Dialect { root, layers, head, stacked, transposed })
}

/// The number that a layer has in the file, where some of the file's are passed by.
fn stored_layer(spec: &ModelSpec, layer: usize) -> usize {
    spec.passed_by.iter().fold(layer, |at, &passed| if passed <= at { at + 1 } else { at })
}

fn hugging_face(spec: &ModelSpec, dialect: &Dialect, id: &TensorId) -> String {
    let Dialect { root, layers, head, .. } = dialect;
    let bloom = spec.architecture == "bloom";
    let Some(layer) = id.layer else {
        return match (id.role, bloom) {
            (Role::Embedding, false) => format!("{root}embed_tokens.weight"),
            (Role::Embedding, true) => format!("{root}word_embeddings.weight"),
            (Role::EmbeddingNorm, _) => format!("{root}word_embeddings_layernorm.weight"),
            (Role::EmbeddingNormBias, _) => format!("{root}word_embeddings_layernorm.bias"),
            (Role::FinalNorm, false) => format!("{root}norm.weight"),
            (Role::FinalNorm, true) => format!("{root}ln_f.weight"),
            (Role::FinalNormBias, _) => format!("{root}ln_f.bias"),
            (Role::Head, _) => (*head).to_string(),
            (role, _) => unreachable!("{role:?} belongs to a layer"),
        };
    };
    let name = match (id.expert, spec.architecture.as_str()) {
        (Some(_), "gpt_oss" | "llama4_text") => stacked_expert(spec, id.role).to_string(),
        (Some(_), _) if dialect.stacked => stacked_expert(spec, id.role).to_string(),
        (Some(expert), "mixtral" | "minimax_m2") => {
            let matrix = match id.role {
                Role::ExpertGate => "w1",
                Role::ExpertUp => "w3",
                Role::ExpertDown => "w2",
                role => unreachable!("{role:?} is not an expert's"),
            };
            format!("block_sparse_moe.experts.{expert}.{matrix}.weight")
        }
        (Some(expert), _) => {
            let matrix = match id.role {
                Role::ExpertGate => "gate_proj",
                Role::ExpertUp => "up_proj",
                Role::ExpertDown => "down_proj",
                role => unreachable!("{role:?} is not an expert's"),
            };
            format!("mlp.experts.{expert}.{matrix}.weight")
        }
        (None, architecture) => layer_name(architecture, id.role).to_string(),
    };
    format!("{root}{layers}.{}.{name}", stored_layer(spec, layer))
}

/// All experts of a layer in one tensor.
fn stacked_expert(spec: &ModelSpec, role: Role) -> &'static str {
    match (role, spec.architecture == "llama4_text") {
        (Role::ExpertGate | Role::ExpertUp, false) => "mlp.experts.gate_up_proj",
        (Role::ExpertDown, false) => "mlp.experts.down_proj",
        (Role::ExpertGateBias | Role::ExpertUpBias, false) => "mlp.experts.gate_up_proj_bias",
        (Role::ExpertDownBias, false) => "mlp.experts.down_proj_bias",
        (Role::ExpertGate | Role::ExpertUp, true) => "feed_forward.experts.gate_up_proj",
        (Role::ExpertDown, true) => "feed_forward.experts.down_proj",
        (role, _) => unreachable!("{role:?} is not an expert's"),
    }
}

/// Which rows of a shared matrix a tensor has.
fn fused(spec: &ModelSpec, dialect: &Dialect, id: &TensorId) -> Option<Fused> {
    match id.role {
        // Query, key and value of each head follow each other.
        Role::Query | Role::Key | Role::Value | Role::QueryBias | Role::KeyBias | Role::ValueBias
            if spec.architecture == "bloom" =>
        {
            let Mixer::Grouped(g) = &spec.layers[id.layer?].mixer else { return None };
            let index = match id.role {
                Role::Query | Role::QueryBias => 0,
                Role::Key | Role::KeyBias => 1,
                _ => 2,
            };
            Some(Fused { index, of: 3, run: g.head_dim })
        }
        Role::ExpertGate | Role::ExpertUp | Role::ExpertGateBias | Role::ExpertUpBias if dialect.stacked => {
            let index = usize::from(matches!(id.role, Role::ExpertUp | Role::ExpertUpBias));
            // gpt-oss has them by turns, the others one after the other.
            let run = if spec.architecture == "gpt_oss" { 1 } else { mixture(spec, id).intermediate };
            Some(Fused { index, of: 2, run })
        }
        _ => None,
    }
}

fn layer_name(architecture: &str, role: Role) -> &'static str {
    let own = match architecture {
        "bloom" => bloom(role),
        "llama4_text" => llama4(role),
        "mixtral" => (role == Role::Router).then_some("block_sparse_moe.gate.weight"),
        "minimax_m2" => match role {
            Role::Router => Some("block_sparse_moe.gate.weight"),
            Role::RouterCorrection => Some("block_sparse_moe.e_score_correction_bias"),
            _ => None,
        },
        "gpt_oss" => (role == Role::Router).then_some("mlp.router.weight"),
        _ => None,
    };
    own.unwrap_or_else(|| usual(role))
}

fn bloom(role: Role) -> Option<&'static str> {
    Some(match role {
        Role::Query | Role::Key | Role::Value => "self_attention.query_key_value.weight",
        Role::QueryBias | Role::KeyBias | Role::ValueBias => "self_attention.query_key_value.bias",
        Role::Output => "self_attention.dense.weight",
        Role::OutputBias => "self_attention.dense.bias",
        Role::Up => "mlp.dense_h_to_4h.weight",
        Role::UpBias => "mlp.dense_h_to_4h.bias",
        Role::Down => "mlp.dense_4h_to_h.weight",
        Role::DownBias => "mlp.dense_4h_to_h.bias",
        _ => return None,
    })
}

fn llama4(role: Role) -> Option<&'static str> {
    Some(match role {
        Role::Gate => "feed_forward.gate_proj.weight",
        Role::Up => "feed_forward.up_proj.weight",
        Role::Down => "feed_forward.down_proj.weight",
        Role::Router => "feed_forward.router.weight",
        Role::SharedGate => "feed_forward.shared_expert.gate_proj.weight",
        Role::SharedUp => "feed_forward.shared_expert.up_proj.weight",
        Role::SharedDown => "feed_forward.shared_expert.down_proj.weight",
        _ => return None,
    })
}

/// What most families call a layer's tensors.
fn usual(role: Role) -> &'static str {
    match role {
        Role::MixerNorm => "input_layernorm.weight",
        Role::MixerNormBias => "input_layernorm.bias",
        Role::BranchNormBias => "post_attention_layernorm.bias",
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
        Role::PredictorEmbeddingNorm => "enorm.weight",
        Role::PredictorHiddenNorm => "hnorm.weight",
        Role::PredictorProjection => "eh_proj.weight",
        Role::PredictorNorm => "shared_head.norm.weight",
        role => unreachable!("{role:?} is named elsewhere"),
    }
}

fn gguf(spec: &ModelSpec, id: &TensorId) -> String {
    match (spec.architecture.as_str(), id.role, id.layer) {
        // Its converter takes the name literally.
        ("gpt-oss", Role::BranchNorm, Some(layer)) => format!("blk.{layer}.post_attention_norm.weight"),
        _ => gguf_name(id.layer, id.role),
    }
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
        Role::Absorb => "attn_k_b.weight",
        Role::Expand => "attn_v_b.weight",
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
        Role::PredictorEmbeddingNorm => "nextn.enorm.weight",
        Role::PredictorHiddenNorm => "nextn.hnorm.weight",
        Role::PredictorProjection => "nextn.eh_proj.weight",
        Role::PredictorNorm => "nextn.shared_head_norm.weight",
    };
    match layer {
        Some(layer) => format!("blk.{layer}.{name}"),
        None => name.to_string(),
    }
}

/// Where checkpoints keep what sees and hears.
const OTHER_SENSES: [&str; 10] = [
    "vision_tower.",
    "vision_model.",
    "visual.",
    "audio_tower.",
    "multi_modal_projector.",
    "mm_projector.",
    "model.vision_tower.",
    "model.visual.",
    "model.multi_modal_projector.",
    "model.mm_projector.",
];

/// Why a checkpoint's tensor may stay unclaimed; `None` is for a name that must stop the load.
pub fn ignored(spec: &ModelSpec, name: &str) -> Option<&'static str> {
    let Naming::HuggingFace(dialect) = spec.naming else {
        return ignored_gguf(spec, name);
    };
    if name.ends_with(".rotary_emb.inv_freq") {
        return Some("rotary frequencies, computed from the config");
    }
    if name == dialect.head && spec.head.tied {
        return Some("a copy of the embedding, which the head is tied to");
    }
    if name.ends_with(".input_scale") && spec.quantisation.is_some() {
        return Some("a scale for inputs, which are not quantised");
    }
    if spec.part_of.is_some() && OTHER_SENSES.iter().any(|of| name.starts_with(of)) {
        return Some("pictures and sound, which are not read");
    }
    let number = name.strip_prefix(dialect.root)?.strip_prefix(dialect.layers)?.strip_prefix('.')?;
    let layer: usize = number.split_once('.')?.0.parse().ok()?;
    if spec.passed_by.contains(&layer) {
        return Some("a layer that looks at a picture");
    }
    // Predictors are published as layers past the last.
    let predicts = matches!(spec.architecture.as_str(), "deepseek_v3" | "kimi_k2" | "glm4_moe");
    let first = spec.layers.len() + spec.passed_by.len();
    if !predicts || layer < first {
        return None;
    }
    if layer < first + spec.predictors.len() {
        let copy = predictor_copies(spec).iter().any(|(copy, _)| copy == name);
        return copy.then_some("a copy of the embedding or of the head");
    }
    Some("a layer that predicts tokens further on, which is not used")
}

/// Tensors of predictors that repeat one outside layers, and which.
pub fn predictor_copies(spec: &ModelSpec) -> Vec<(String, Role)> {
    let Naming::HuggingFace(Dialect { root, layers, .. }) = spec.naming else { return Vec::new() };
    let head = if spec.head.tied { Role::Embedding } else { Role::Head };
    let copies = [("embed_tokens.weight", Role::Embedding), ("shared_head.head.weight", head)];
    let of = |index: usize| {
        let layer = stored_layer(spec, spec.layers.len() + index);
        copies.map(|(name, role)| (format!("{root}{layers}.{layer}.{name}"), role))
    };
    (0..spec.predictors.len()).flat_map(of).collect()
}

fn ignored_gguf(spec: &ModelSpec, name: &str) -> Option<&'static str> {
    if name == ROPE_FACTORS {
        return Some("rotary frequency factors, read with the file's metadata");
    }
    let (number, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let layer = spec.layers.get(number.parse::<usize>().ok()?);
    match layer {
        None => {
            (spec.architecture == "deepseek2").then_some("a head that predicts tokens further on, which is not used")
        }
        Some(layer) => {
            let halves = matches!(&layer.mixer, Mixer::Latent(l) if l.halves);
            (halves && rest == "attn_kv_b.weight").then_some("what is stored as its two halves too")
        }
    }
}
