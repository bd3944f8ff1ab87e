//! `config.json` to [`crate::ModelSpec`]: one file a family, each an adapter that reads what it understands.
//!
//! Every key of a config is read, or stands in [`HARMLESS`], or is an error that names it: a key that changes the
//! computation and is not implemented must never load as if it were not there.

mod deepseek;
mod keys;
mod llama;
mod mistral;
mod mixtral;
mod qwen;
mod rope;

use crate::bounds::{
    self, HEAD_DIM_MAX, HEADS_MAX, HIDDEN_MAX, INTERMEDIATE_MAX, LAYERS_MAX, POSITIONS_MAX, VOCAB_MAX,
};
use crate::error::SpecError;
use crate::spec::{Branch, Dense, Grouped, Head, Layer, Mixer, ModelSpec, Naming, Norm, Residual};
use keys::Keys;
use serde_json::{Map, Value};

/// What all families share.
struct Common {
    hidden: usize,
    layers: usize,
    positions_max: usize,
    norm: Norm,
}

/// An adapter: the layers of a config.
type Layers = fn(&Keys<'_>, &Common) -> Result<Vec<Layer>, SpecError>;

/// `model_type`, the class that must stand in `architectures` where that is given, and the adapter.
const FAMILIES: [(&str, &str, Layers); 8] = [
    ("deepseek_v3", "DeepseekV3ForCausalLM", deepseek::layers),
    // Kimi K2 is published as DeepSeek-V3 under a name of its own.
    ("kimi_k2", "DeepseekV3ForCausalLM", deepseek::layers),
    ("llama", "LlamaForCausalLM", llama::layers),
    ("mistral", "MistralForCausalLM", mistral::layers),
    ("mixtral", "MixtralForCausalLM", mixtral::layers),
    ("qwen2", "Qwen2ForCausalLM", qwen::qwen2),
    ("qwen3", "Qwen3ForCausalLM", qwen::qwen3),
    ("qwen3_moe", "Qwen3MoeForCausalLM", qwen::qwen3_moe),
];

/// Every `model_type` that an adapter reads.
pub fn architectures() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|(name, ..)| *name)
}

/// Keys that change nothing about what a loaded model computes, by the reason why.
const HARMLESS: [(&str, &[&str]); 6] = [
    (
        "training only: dropout is off and losses are not computed when serving",
        &[
            "attention_dropout",
            "hidden_dropout",
            "embd_pdrop",
            "resid_pdrop",
            "initializer_range",
            "router_aux_loss_coef",
            "router_jitter_noise",
            "output_router_logits",
            "aux_loss_alpha",
            "seq_aux",
            "gradient_checkpointing",
        ],
    ),
    (
        "where the file came from, or which code of another program reads it",
        &[
            "_name_or_path",
            "name_or_path",
            "transformers_version",
            "transformers.js_config",
            "auto_map",
            "is_llama_config",
            "unsloth_fixed",
            "unsloth_version",
            "task_specific_params",
            "tokenizer_class",
        ],
    ),
    (
        "how another program runs: the same numbers by other kernels, processes or return types",
        &[
            "use_cache",
            "return_dict",
            "torchscript",
            "use_bfloat16",
            "output_attentions",
            "output_hidden_states",
            "_attn_implementation",
            "_attn_implementation_autoset",
            "attn_implementation",
            "_experts_implementation",
            "experts_implementation",
            "ep_size",
            "tf_legacy_loss",
            "use_return_dict",
            "is_decoder",
        ],
    ),
    ("the files state the format of each tensor themselves", &["torch_dtype", "dtype"]),
    (
        "heads of other tasks, which a causal language model does not have",
        &["id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "pruned_heads"],
    ),
    (
        "padding and sampling, which a request decides",
        &["pad_token_id", "unk_token_id", "sep_token_id", "temperature", "top_p", "top_k", "do_sample", "max_length"],
    ),
];

fn harmless(key: &str) -> bool {
    HARMLESS.iter().any(|(_, keys)| keys.contains(&key))
}

/// The spec that a Hugging Face `config.json` describes. `generation_config` adds its end tokens.
pub fn spec(config_json: &str, generation_config: Option<&str>) -> Result<ModelSpec, SpecError> {
    let map: Map<String, Value> = serde_json::from_str(config_json).map_err(|e| SpecError::Json(e.to_string()))?;
    let keys = Keys::new(&map);
    let (model_type, layers) = family(&keys)?;
    refuse_unimplemented(&keys)?;
    let common = Common {
        hidden: keys.size("hidden_size", HIDDEN_MAX)?,
        layers: keys.size("num_hidden_layers", LAYERS_MAX)?,
        positions_max: keys.size("max_position_embeddings", POSITIONS_MAX)?,
        norm: Norm::rms(keys.float("rms_norm_eps")? as f32),
    };
    let layers = layers(&keys, &common)?;
    let vocab = keys.size("vocab_size", VOCAB_MAX)?;
    let spec = ModelSpec {
        architecture: model_type.to_string(),
        naming: Naming::HuggingFace,
        vocab,
        embedding_rows: vocab,
        hidden: common.hidden,
        embedding_norm: None,
        layers,
        final_norm: common.norm,
        head: Head { tied: keys.flag("tie_word_embeddings", false)? },
        positions_max: common.positions_max,
        end_tokens: end_tokens(&keys, generation_config)?,
        begin_token: keys.tokens("bos_token_id")?.first().copied(),
    };
    keys.finish(&harmless)?;
    bounds::check(&spec)?;
    Ok(spec)
}

/// Chooses the adapter by `model_type`, or by the class where that is absent; the two must agree.
fn family<'a>(keys: &Keys<'a>) -> Result<(&'static str, Layers), SpecError> {
    let class = keys.list("architectures")?.first().and_then(Value::as_str);
    let model_type = keys.text("model_type")?;
    let known = FAMILIES.iter().find(|(name, of, _)| match (model_type, class) {
        (Some(model_type), Some(class)) => *name == model_type && *of == class,
        (Some(model_type), None) => *name == model_type,
        (None, class) => Some(*of) == class,
    });
    let Some((name, _, layers)) = known else {
        let name = match (model_type, class) {
            (Some(model_type), Some(class)) => format!("{model_type} ({class})"),
            (one, other) => one.or(other).unwrap_or("none given").to_string(),
        };
        let known = FAMILIES.map(|(name, class, _)| format!("{name} ({class})")).join(", ");
        return Err(SpecError::UnknownArchitecture { name, known });
    };
    Ok((name, *layers))
}

/// Keys that any family may carry and that are implemented for one value alone.
fn refuse_unimplemented(keys: &Keys<'_>) -> Result<(), SpecError> {
    keys.only("hidden_act", "silu", "the gated branch is computed with silu")?;
    keys.only("pretraining_tp", 1, "a split pretraining layout changes the order of sums")?;
    keys.only("is_encoder_decoder", false, "there is no encoder")?;
    keys.only("add_cross_attention", false, "there is no encoder")?;
    keys.only("tie_encoder_decoder", false, "there is no encoder")?;
    keys.only("chunk_size_feed_forward", 0, "the branch runs whole")?;
    keys.only("use_mrope", false, "positions are one number a token")?;
    keys.only("rope_interleaved", false, "the family pairs channels by halves")?;
    if let Some(value) = keys.value("quantization_config") {
        let method = value.get("quant_method").and_then(Value::as_str).unwrap_or("unnamed");
        let why = format!("quantised checkpoints ({method}) are not implemented; use a bf16, f16, f32 or GGUF file");
        return Err(SpecError::bad("quantization_config", method, why));
    }
    Ok(())
}

fn end_tokens(keys: &Keys<'_>, generation_config: Option<&str>) -> Result<Vec<u32>, SpecError> {
    let mut tokens = keys.tokens("eos_token_id")?;
    if let Some(text) = generation_config {
        let bad = |e: serde_json::Error| SpecError::bad("generation_config.json", "its text", e);
        let map: Map<String, Value> = serde_json::from_str(text).map_err(bad)?;
        for token in Keys::new(&map).tokens("eos_token_id")? {
            if !tokens.contains(&token) {
                tokens.push(token);
            }
        }
    }
    Ok(tokens)
}

/// Head counts and size of grouped attention.
struct Heads {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl Heads {
    fn plain(&self) -> Grouped {
        Grouped::plain(self.heads, self.kv_heads, self.head_dim)
    }
}

/// Reads them; without `head_dim` the hidden size is divided among the heads.
fn heads(keys: &Keys<'_>, common: &Common, default_head_dim: Option<usize>) -> Result<Heads, SpecError> {
    let heads = keys.size("num_attention_heads", HEADS_MAX)?;
    let kv_heads = keys.optional_size("num_key_value_heads", HEADS_MAX)?.unwrap_or(heads);
    let head_dim = match keys.optional_size("head_dim", HEAD_DIM_MAX)?.or(default_head_dim) {
        Some(head_dim) => head_dim,
        None if common.hidden.is_multiple_of(heads) => common.hidden / heads,
        None => {
            let why = format!("not a multiple of {heads} heads, and head_dim is not given");
            return Err(SpecError::bad("hidden_size", common.hidden, why));
        }
    };
    Ok(Heads { heads, kv_heads, head_dim })
}

fn dense(keys: &Keys<'_>, bias: bool) -> Result<Branch, SpecError> {
    let intermediate = keys.size("intermediate_size", INTERMEDIATE_MAX)?;
    Ok(Branch::Dense(Dense { bias, ..Dense::gated(intermediate) }))
}

fn layer(common: &Common, mixer: Mixer, branch: Branch) -> Layer {
    Layer {
        residual: Residual::Stream,
        mixer_norm: common.norm,
        mixer,
        branch_norm: common.norm,
        branches: vec![branch],
    }
}

#[cfg(test)]
mod tests;
