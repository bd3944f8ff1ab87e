//! `config.json` to [`crate::ModelSpec`]: one file a family, each an adapter that reads what it understands.
//!
//! Every key of a config is read, or stands in [`HARMLESS`], or is an error that names it: a key that changes the
//! computation and is not implemented must never load as if it were not there.

mod bloom;
mod deepseek;
mod dots;
mod glm;
mod gpt_oss;
mod keys;
mod llama;
mod llama4;
mod minimax;
mod mistral;
mod mixtral;
mod quantisation;
mod qwen;
mod rope;

use crate::bounds::{
    self, HEAD_DIM_MAX, HEADS_MAX, HIDDEN_MAX, INTERMEDIATE_MAX, LAYERS_MAX, POSITIONS_MAX, VOCAB_MAX,
};
use crate::catalog;
use crate::error::SpecError;
use crate::spec::{Branch, Dense, Grouped, Head, Layer, Mixer, ModelSpec, Naming, Norm, Predictor, Residual};
use keys::Keys;
use serde_json::{Map, Value};

/// What all families share.
struct Common {
    hidden: usize,
    layers: usize,
    positions_max: usize,
    norm: Norm,
}

/// What an adapter makes of a config.
#[derive(Default)]
struct Body {
    layers: Vec<Layer>,
    embedding_norm: Option<Norm>,
    /// Rows of the embedding past the vocabulary.
    extra_embeddings: usize,
    /// Layers of the file that are not in `layers`.
    passed_by: Vec<usize>,
    predictors: Vec<Predictor>,
}

impl From<Vec<Layer>> for Body {
    fn from(layers: Vec<Layer>) -> Body {
        Body { layers, ..Body::default() }
    }
}

type Adapter = fn(&Keys<'_>, &Common) -> Result<Body, SpecError>;

/// `model_type`, the class that must stand in `architectures` where that is given, and the adapter.
const FAMILIES: [(&str, &str, Adapter); 18] = [
    ("bloom", "BloomForCausalLM", bloom::body),
    ("deepseek_v3", "DeepseekV3ForCausalLM", deepseek::body),
    ("dots1", "Dots1ForCausalLM", dots::body),
    ("glm4_moe", "Glm4MoeForCausalLM", glm::body),
    ("gpt_oss", "GptOssForCausalLM", gpt_oss::body),
    // Kimi K2 is published as DeepSeek-V3 under a name of its own.
    ("kimi_k2", "DeepseekV3ForCausalLM", deepseek::body),
    ("llama", "LlamaForCausalLM", llama::body),
    ("llama4_text", "Llama4ForCausalLM", llama4::body),
    ("minimax_m2", "MiniMaxM2ForCausalLM", minimax::body),
    ("ministral3", "Ministral3ForCausalLM", mistral::ministral3),
    ("mistral", "MistralForCausalLM", mistral::mistral),
    ("mistral4", "Mistral4ForCausalLM", deepseek::mistral4),
    ("mixtral", "MixtralForCausalLM", mixtral::body),
    ("mllama_text_model", "MllamaForCausalLM", llama::mllama),
    ("qwen2", "Qwen2ForCausalLM", qwen::qwen2),
    ("qwen2_5_vl_text", "Qwen2_5_VLTextModel", qwen::qwen2),
    ("qwen3", "Qwen3ForCausalLM", qwen::qwen3),
    ("qwen3_moe", "Qwen3MoeForCausalLM", qwen::qwen3_moe),
];

/// Models that see or hear: `model_type`, class, and the family of the language part where `text_config` leaves it out
/// (or where there is no such section and the language part's keys stand outside).
const WRAPPERS: [(&str, &str, &str); 6] = [
    ("kimi_k25", "Kimi_K25ForConditionalGeneration", "kimi_k2"),
    ("llama4", "Llama4ForConditionalGeneration", "llama4_text"),
    ("mistral3", "Mistral3ForConditionalGeneration", "mistral"),
    ("mllama", "MllamaForConditionalGeneration", "mllama_text_model"),
    ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl_text"),
    ("voxtral", "VoxtralForConditionalGeneration", "llama"),
];

/// Keys of a wrapper that say how pictures and sound get in, which nothing here reads.
fn of_other_senses(key: &str) -> bool {
    const WHOLE: [&str; 7] = [
        "vision_config",
        "audio_config",
        "spatial_merge_size",
        "multimodal_projector_bias",
        "projector_hidden_act",
        "projection_hidden_size",
        "projection_layer_norm_eps",
    ];
    let token = |of| key.starts_with(of) && (key.ends_with("_token_id") || key.ends_with("_token_index"));
    WHOLE.contains(&key)
        || key.starts_with("vision_feature_")
        || ["image", "video", "audio", "vision", "boi", "eoi", "media"].into_iter().any(token)
        || matches!(key, "use_unified_vision_chunk" | "video_placeholder" | "ignore_index")
}

/// Every `model_type` that an adapter reads.
pub fn architectures() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|(name, ..)| *name).chain(WRAPPERS.iter().map(|(name, ..)| *name))
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
            "attention_softmax_in_fp32",
            "bias_dropout_fusion",
            "masked_softmax_fusion",
            "skip_bias_add",
            "skip_bias_add_qkv",
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

/// The spec that a Hugging Face `config.json` describes. `generation_config` adds its end tokens. Names follow the
/// family's usual dialect until [`crate::catalog::settle`] has seen the files.
pub fn spec(config_json: &str, generation_config: Option<&str>) -> Result<ModelSpec, SpecError> {
    let map: Map<String, Value> = serde_json::from_str(config_json).map_err(|e| SpecError::Json(e.to_string()))?;
    let keys = Keys::new(&map);
    let family = family(&keys)?;
    let Some(wrapper) = family.wrapper else {
        let spec = language(&keys, &family, &keys, generation_config)?;
        keys.finish(&harmless)?;
        return Ok(spec);
    };
    let harmless = |key: &str| harmless(key) || of_other_senses(key);
    let mut spec = match keys.section("text_config")? {
        Some(text) => {
            text.value("model_type");
            let spec = language(&text, &family, &keys, generation_config)?;
            // What a wrapper repeats of its language part says nothing new.
            let repeated = |key: &str| harmless(key) || text.has(key);
            let unread = keys.left(&repeated);
            text.finish(&harmless)?;
            if !unread.is_empty() {
                return Err(SpecError::Unread(unread.join(", ")));
            }
            spec
        }
        None => {
            let spec = language(&keys, &family, &keys, generation_config)?;
            keys.finish(&harmless)?;
            spec
        }
    };
    spec.part_of = Some(wrapper.to_string());
    Ok(spec)
}

/// The language model of `keys`. `outer` is the whole config, which may hold what concerns the whole.
fn language(
    keys: &Keys<'_>,
    family: &Family,
    outer: &Keys<'_>,
    generation_config: Option<&str>,
) -> Result<ModelSpec, SpecError> {
    refuse_unimplemented(keys)?;
    let common = common(keys)?;
    let body = (family.adapter)(keys, &common)?;
    let vocab = keys.size("vocab_size", VOCAB_MAX)?;
    let tied = keys.optional_flag("tie_word_embeddings")?.or(outer.optional_flag("tie_word_embeddings")?);
    let spec = ModelSpec {
        architecture: family.name.to_string(),
        naming: Naming::HuggingFace(catalog::dialect(family.name)),
        part_of: None,
        // Of the whole where it is a wrapper's; some put it into the language part.
        quantisation: quantisation::read(keys)?.map_or_else(|| quantisation::read(outer), |found| Ok(Some(found)))?,
        vocab,
        embedding_rows: vocab + body.extra_embeddings,
        hidden: common.hidden,
        embedding_norm: body.embedding_norm,
        layers: body.layers,
        passed_by: body.passed_by,
        final_norm: common.norm,
        // BLOOM alone ties where the config does not say.
        head: Head { tied: tied.unwrap_or(family.name == "bloom") },
        predictors: body.predictors,
        positions_max: common.positions_max,
        end_tokens: end_tokens(keys, outer, generation_config)?,
        begin_token: keys.tokens("bos_token_id")?.first().copied(),
    };
    bounds::check(&spec)?;
    Ok(spec)
}

/// What all families state, by the names that each uses.
fn common(keys: &Keys<'_>) -> Result<Common, SpecError> {
    let bloom = keys.has("layer_norm_epsilon");
    let (hidden, layers, positions) = if bloom {
        (if keys.has("n_embed") { "n_embed" } else { "hidden_size" }, "n_layer", "seq_length")
    } else {
        ("hidden_size", "num_hidden_layers", "max_position_embeddings")
    };
    Ok(Common {
        hidden: keys.size(hidden, HIDDEN_MAX)?,
        layers: keys.size(layers, LAYERS_MAX)?,
        positions_max: keys.size(positions, POSITIONS_MAX)?,
        norm: match bloom {
            true => Norm::layer(keys.float("layer_norm_epsilon")? as f32),
            false => Norm::rms(keys.float("rms_norm_eps")? as f32),
        },
    })
}

/// Which adapter reads a config.
struct Family {
    /// `model_type` of the language part.
    name: &'static str,
    adapter: Adapter,
    wrapper: Option<&'static str>,
}

/// Chooses the adapter by `model_type`, or by the class where that is absent; the two must agree.
fn family(keys: &Keys<'_>) -> Result<Family, SpecError> {
    let class = keys.list("architectures")?.first().and_then(Value::as_str);
    let model_type = keys.text("model_type")?;
    let fits = |name: &str, of: &str| match (model_type, class) {
        (Some(model_type), Some(class)) => name == model_type && of == class,
        (Some(model_type), None) => name == model_type,
        (None, class) => Some(of) == class,
    };
    let inner = |wrapper, name: &str| {
        let (name, _, adapter) = FAMILIES.iter().find(|(known, ..)| *known == name)?;
        Some(Family { name, adapter: *adapter, wrapper })
    };
    if let Some((name, ..)) = FAMILIES.iter().find(|(name, of, _)| fits(name, of)) {
        return Ok(inner(None, name).expect("it was just found"));
    }
    let unknown = |name: String| {
        let known: Vec<String> = FAMILIES.iter().map(|(name, class, _)| format!("{name} ({class})")).collect();
        let wrappers: Vec<String> = WRAPPERS.iter().map(|(name, class, _)| format!("{name} ({class})")).collect();
        SpecError::UnknownArchitecture { name, known: [known, wrappers].concat().join(", ") }
    };
    let Some((wrapper, _, usual)) = WRAPPERS.iter().find(|(name, of, _)| fits(name, of)) else {
        return Err(unknown(match (model_type, class) {
            (Some(model_type), Some(class)) => format!("{model_type} ({class})"),
            (one, other) => one.or(other).unwrap_or("none given").to_string(),
        }));
    };
    let stated = keys.value("text_config").and_then(|text| text.get("model_type")).and_then(Value::as_str);
    let name = stated.unwrap_or(usual);
    inner(Some(wrapper), name).ok_or_else(|| unknown(format!("{name} (the language part of {wrapper})")))
}

/// Keys that any family may carry and that are implemented for one value alone.
fn refuse_unimplemented(keys: &Keys<'_>) -> Result<(), SpecError> {
    keys.only("hidden_act", "silu", "the gated branch is computed with silu")?;
    // BLOOM sums in the order of its training only where it is told to be slow and exact.
    if keys.flag("slow_but_exact", false)? || !keys.has("slow_but_exact") && !keys.has("layer_norm_epsilon") {
        keys.only("pretraining_tp", 1, "a split pretraining layout changes the order of sums")?;
    } else {
        keys.value("pretraining_tp");
    }
    keys.only("is_encoder_decoder", false, "there is no encoder")?;
    keys.only("add_cross_attention", false, "there is no encoder")?;
    keys.only("tie_encoder_decoder", false, "there is no encoder")?;
    keys.only("chunk_size_feed_forward", 0, "the branch runs whole")?;
    keys.only("use_mrope", false, "positions are one number a token")?;
    keys.only("rope_interleaved", false, "the family pairs channels by halves")?;
    Ok(())
}

fn end_tokens(keys: &Keys<'_>, outer: &Keys<'_>, generation_config: Option<&str>) -> Result<Vec<u32>, SpecError> {
    let mut tokens = keys.tokens("eos_token_id")?;
    let mut add = |more: Vec<u32>| tokens.extend(more.into_iter().filter(|t| !tokens.contains(t)).collect::<Vec<_>>());
    add(outer.tokens("eos_token_id")?);
    if let Some(text) = generation_config {
        let bad = |e: serde_json::Error| SpecError::bad("generation_config.json", "its text", e);
        let map: Map<String, Value> = serde_json::from_str(text).map_err(bad)?;
        add(Keys::new(&map).tokens("eos_token_id")?);
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
