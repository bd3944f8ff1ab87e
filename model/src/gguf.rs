//! GGUF metadata to [`crate::ModelSpec`]. The loader parses the file; here its key/value pairs get their meaning.
//!
//! Keys of the architecture (`llama.*`) are read, harmless, or an error, as in a `config.json`; the `general`,
//! `tokenizer`, `quantize` and `split` ones describe the file and its text.

mod deepseek2;
pub mod file;
mod gpt_oss;
pub mod split;

pub use file::{Gguf, TensorInfo, Value};

use crate::bounds::{self, EXPERTS_MAX, HEAD_DIM_MAX, HEADS_MAX, HIDDEN_MAX, INTERMEDIATE_MAX, LAYERS_MAX};
use crate::bounds::{POSITIONS_MAX, VOCAB_MAX, within};
use crate::catalog::{ROPE_FACTORS, Role, gguf_name};
use crate::error::SpecError;
use crate::rope::{Layout, Rope, Scaling};
use crate::spec::{
    Branch, Dense, Grouped, Head, Layer, Mixer, ModelSpec, Moe, Naming, Norm, QkNorm, Residual, Router, Score, Span,
};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

const KNOWN: [&str; 6] = ["deepseek2", "gpt-oss", "llama", "qwen2", "qwen3", "qwen3moe"];

/// Keys of an architecture that change nothing about what is computed.
const HARMLESS: [&str; 4] = [
    // Which of the tensors is quantised how is said by each tensor.
    "tensor_data_layout",
    // Stretching was part of training: the same frequencies either way.
    "rope.scaling.finetuned",
    // Sizes of the vocabulary are those of the embedding.
    "vocab_size",
    "use_parallel_residual",
];

/// The spec that a GGUF file describes. `has_tensor` tells whether the file holds a tensor of a name; `rope_factors`
/// are the values of [`ROPE_FACTORS`], where the file holds it (Llama 3's scaling is kept there alone).
pub fn spec(
    metadata: &BTreeMap<String, Value>,
    has_tensor: &dyn Fn(&str) -> bool,
    rope_factors: Option<&[f32]>,
) -> Result<ModelSpec, SpecError> {
    let architecture = match metadata.get("general.architecture") {
        Some(Value::Text(name)) => name.as_str(),
        _ => return Err(SpecError::Missing { key: "general.architecture".into() }),
    };
    if !KNOWN.contains(&architecture) {
        return Err(SpecError::UnknownArchitecture { name: architecture.into(), known: KNOWN.join(", ") });
    }
    let keys = Keys { architecture, metadata, read: RefCell::default() };
    let hidden = keys.size("embedding_length", HIDDEN_MAX)?;
    let layers = keys.size("block_count", LAYERS_MAX)?;
    let positions_max = keys.size("context_length", POSITIONS_MAX)?;
    let epsilon = "attention.layer_norm_rms_epsilon";
    let norm = Norm::rms(keys.float(epsilon)?.ok_or_else(|| keys.missing(epsilon))? as f32);
    if has_tensor(ROPE_FACTORS) != rope_factors.is_some() {
        return Err(SpecError::bad(ROPE_FACTORS, "in the file", "its values must be handed over with the metadata"));
    }
    let file = File { architecture, has_tensor, rope_factors, hidden, positions_max, norm };
    let vocab = vocabulary(&keys)?;
    let layers = match architecture {
        "deepseek2" => deepseek2::layers(&keys, &file, layers)?,
        "gpt-oss" => gpt_oss::layers(&keys, &file, layers)?,
        _ => vec![file.layer(Mixer::Grouped(attention(&keys, &file)?), branch(&keys, &file)?); layers],
    };
    let spec = ModelSpec {
        architecture: architecture.to_string(),
        naming: Naming::Gguf,
        part_of: None,
        // Every tensor of a GGUF file states its own format.
        quantisation: None,
        vocab,
        embedding_rows: vocab,
        hidden,
        embedding_norm: None,
        layers,
        passed_by: Vec::new(),
        final_norm: norm,
        head: Head { tied: !has_tensor(&gguf_name(None, Role::Head)) },
        predictors: Vec::new(),
        positions_max,
        end_tokens: end_tokens(&keys)?,
        begin_token: keys.token("tokenizer.ggml.bos_token_id")?,
    };
    keys.finish()?;
    bounds::check(&spec)?;
    Ok(spec)
}

/// What the readers below share.
struct File<'a> {
    architecture: &'a str,
    has_tensor: &'a dyn Fn(&str) -> bool,
    rope_factors: Option<&'a [f32]>,
    hidden: usize,
    positions_max: usize,
    norm: Norm,
}

impl File<'_> {
    fn layer(&self, mixer: Mixer, branch: Branch) -> Layer {
        let (mixer_norm, branch_norm) = (self.norm, self.norm);
        Layer { residual: Residual::Stream, mixer_norm, mixer, branch_norm, branches: vec![branch] }
    }

    fn holds(&self, layer: usize, role: Role) -> bool {
        (self.has_tensor)(&gguf_name(Some(layer), role))
    }
}

fn attention(keys: &Keys<'_>, file: &File<'_>) -> Result<Grouped, SpecError> {
    let heads = keys.size("attention.head_count", HEADS_MAX)?;
    let kv_heads = keys.optional_size("attention.head_count_kv", HEADS_MAX)?.unwrap_or(heads);
    let head_dim = match keys.optional_size("attention.key_length", HEAD_DIM_MAX)? {
        Some(head_dim) => head_dim,
        None if file.hidden.is_multiple_of(heads) => file.hidden / heads,
        None => {
            let why = format!("not a multiple of {heads} heads, and attention.key_length is not given");
            return Err(SpecError::bad("embedding_length", file.hidden, why));
        }
    };
    let value = keys.optional_size("attention.value_length", HEAD_DIM_MAX)?.unwrap_or(head_dim);
    if value != head_dim {
        return Err(SpecError::bad("attention.value_length", value, format!("keys have {head_dim} channels")));
    }
    let biased = |role| (file.has_tensor)(&gguf_name(Some(0), role));
    let window = keys.optional_count("attention.sliding_window")?.filter(|n| *n > 0);
    Ok(Grouped {
        qkv_bias: biased(Role::QueryBias),
        out_bias: biased(Role::OutputBias),
        qk_norm: file.architecture.starts_with("qwen3").then_some(QkNorm::Heads(file.norm)),
        rope: Some(rope(keys, file, head_dim)?),
        span: window.map_or(Span::Full, Span::Window),
        ..Grouped::plain(heads, kv_heads, head_dim)
    })
}

/// Channels of a key and of a value head, where the file says.
fn attention_lengths(keys: &Keys<'_>) -> Result<(Option<usize>, Option<usize>), SpecError> {
    // Of latent attention in newer files: the whole latent, wider than any head.
    let length = |key| keys.optional_size(key, HIDDEN_MAX);
    Ok((length("attention.key_length")?, length("attention.value_length")?))
}

fn rope(keys: &Keys<'_>, file: &File<'_>, head_dim: usize) -> Result<Rope, SpecError> {
    let dims = keys.optional_size("rope.dimension_count", HEAD_DIM_MAX)?.unwrap_or(head_dim);
    let theta = keys.float("rope.freq_base")?.unwrap_or(1e4);
    let older = keys.float("rope.scale_linear")?;
    let factor = keys.float("rope.scaling.factor")?.or(older);
    let original = keys.optional_size("rope.scaling.original_context_length", POSITIONS_MAX)?;
    let amplitude = keys.float("rope.scaling.attn_factor")?;
    let whole_amplitude = keys.float("rope.scaling.yarn_attn_factor")?;
    let beta = |key, usual| Ok::<f64, SpecError>(keys.float(key)?.unwrap_or(usual));
    let (beta_fast, beta_slow) =
        (beta("rope.scaling.yarn_beta_fast", 32.0)?, beta("rope.scaling.yarn_beta_slow", 1.0)?);
    if let Some(extra) = keys.float("rope.scaling.yarn_ext_factor")?.filter(|extra| *extra != 1.0) {
        return Err(SpecError::bad("rope.scaling.yarn_ext_factor", extra, "only 1 is implemented"));
    }
    let kind = keys.text("rope.scaling.type")?.unwrap_or(if older.is_some() { "linear" } else { "none" });
    let scaling = match (kind, factor, file.rope_factors) {
        ("none", None | Some(1.0), Some(by)) => Scaling::Factors { by: by.to_vec() },
        (_, _, Some(_)) => {
            let why = format!("a file with {ROPE_FACTORS} must not be scaled in another way too");
            return Err(SpecError::bad("rope.scaling.type", kind, why));
        }
        ("none", ..) => Scaling::None,
        ("linear", Some(factor), _) => Scaling::Linear { factor },
        ("yarn", Some(factor), _) => Scaling::Yarn {
            factor,
            original: original.unwrap_or(file.positions_max),
            beta_fast,
            beta_slow,
            truncate: true,
            // The runtime that defined the format multiplies its factor with the paper's.
            amplitude: whole_amplitude
                .unwrap_or_else(|| amplitude.unwrap_or(1.0) * (0.1 * libm::log(factor.max(1.0)) + 1.0)),
        },
        ("linear" | "yarn", None, _) => return Err(keys.missing("rope.scaling.factor")),
        _ => return Err(SpecError::bad("rope.scaling.type", kind, "known: none, linear, yarn")),
    };
    for (key, stated) in [("rope.scaling.attn_factor", amplitude), ("rope.scaling.yarn_attn_factor", whole_amplitude)] {
        if let Some(stated) = stated.filter(|a| *a != 1.0 && !matches!(scaling, Scaling::Yarn { .. })) {
            return Err(SpecError::bad(key, stated, "only yarn has one"));
        }
    }
    // Converters permute the rows of Llama's queries and keys (and their biases) for interleaved rotation, which is
    // DeepSeek's own; the other families they leave alone.
    let layout = if matches!(file.architecture, "llama" | "deepseek2") { Layout::Interleaved } else { Layout::Half };
    Ok(Rope { dims, theta, layout, scaling })
}

fn branch(keys: &Keys<'_>, file: &File<'_>) -> Result<Branch, SpecError> {
    let dense = keys.optional_size("feed_forward_length", INTERMEDIATE_MAX)?;
    let Some(experts) = keys.optional_count("expert_count")?.filter(|n| *n > 0) else {
        let intermediate = dense.ok_or_else(|| keys.missing("feed_forward_length"))?;
        keys.optional_count("expert_used_count")?;
        let bias = (file.has_tensor)(&gguf_name(Some(0), Role::DownBias));
        return Ok(Branch::Dense(Dense { bias, ..Dense::gated(intermediate) }));
    };
    if !(file.has_tensor)(&gguf_name(Some(0), Role::ExpertGate)) {
        let why =
            "the experts of a layer must be stacked in one tensor (blk.0.ffn_gate_exps.weight); convert the file anew";
        return Err(SpecError::bad("expert_count", experts, why));
    }
    for (key, only) in [("expert_shared_count", 0), ("expert_gating_func", 1), ("leading_dense_block_count", 0)] {
        if let Some(value) = keys.optional_count(key)?
            && value != only
        {
            return Err(SpecError::bad(key, value, format!("only {only} is implemented for {}", file.architecture)));
        }
    }
    let own = keys.optional_size("expert_feed_forward_length", INTERMEDIATE_MAX)?;
    // Both families of these files renormalise; the flag is only written where it says no.
    let router = Router {
        scale: keys.float("expert_weights_scale")?.filter(|s| *s != 0.0).unwrap_or(1.0) as f32,
        ..Router::plain(Score::Softmax, keys.flag("expert_weights_norm", true)?)
    };
    Ok(Branch::Moe(Moe::plain(
        within("expert_count", experts, EXPERTS_MAX)?,
        keys.size("expert_used_count", EXPERTS_MAX)?,
        own.or(dense).ok_or_else(|| keys.missing("expert_feed_forward_length"))?,
        router,
    )))
}

/// Rows of the embedding: one for each token of the tokenizer.
fn vocabulary(keys: &Keys<'_>) -> Result<usize, SpecError> {
    match keys.metadata.get("tokenizer.ggml.tokens") {
        Some(Value::List(tokens)) => within("tokenizer.ggml.tokens", tokens.len(), VOCAB_MAX),
        _ => keys.size("vocab_size", VOCAB_MAX),
    }
}

fn end_tokens(keys: &Keys<'_>) -> Result<Vec<u32>, SpecError> {
    let mut out = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
        if let Some(token) = keys.token(key)?
            && !out.contains(&token)
        {
            out.push(token);
        }
    }
    Ok(out)
}

/// Reads keys of one architecture, remembering which.
struct Keys<'a> {
    architecture: &'a str,
    metadata: &'a BTreeMap<String, Value>,
    read: RefCell<BTreeSet<String>>,
}

impl<'a> Keys<'a> {
    fn value(&self, key: &str) -> Option<&'a Value> {
        let name = self.name(key);
        let value = self.metadata.get(&name);
        self.read.borrow_mut().insert(name);
        value
    }

    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn missing(&self, key: &str) -> SpecError {
        SpecError::Missing { key: self.name(key) }
    }

    fn size(&self, key: &str, max: usize) -> Result<usize, SpecError> {
        self.optional_size(key, max)?.ok_or_else(|| self.missing(key))
    }

    fn optional_size(&self, key: &str, max: usize) -> Result<Option<usize>, SpecError> {
        self.optional_count(key)?.map(|n| within(&self.name(key), n, max)).transpose()
    }

    fn optional_count(&self, key: &str) -> Result<Option<usize>, SpecError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let whole = |v: &Value| match v {
            Value::U64(n) => usize::try_from(*n).ok(),
            Value::I64(n) => usize::try_from(*n).ok(),
            _ => None,
        };
        let number = match value {
            // One number a layer, which must all be the same.
            Value::List(all) if all.windows(2).all(|two| two[0] == two[1]) => all.first().and_then(whole),
            other => whole(other),
        };
        number.map(Some).ok_or_else(|| self.bad(key, value, "must be a whole number, the same for every layer"))
    }

    fn float(&self, key: &str) -> Result<Option<f64>, SpecError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        match value {
            Value::F64(f) if f.is_finite() => Ok(Some(*f)),
            Value::U64(n) => Ok(Some(*n as f64)),
            Value::I64(n) => Ok(Some(*n as f64)),
            _ => Err(self.bad(key, value, "must be a finite number")),
        }
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool, SpecError> {
        match self.value(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(value) => Err(self.bad(key, value, "must be true or false")),
        }
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, SpecError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(value) => Err(self.bad(key, value, "must be a string")),
        }
    }

    /// A token id, under its full key.
    fn token(&self, key: &str) -> Result<Option<u32>, SpecError> {
        let id = match self.metadata.get(key) {
            None => return Ok(None),
            Some(Value::U64(n)) => u32::try_from(*n).ok(),
            Some(Value::I64(n)) => u32::try_from(*n).ok(),
            Some(_) => None,
        };
        id.map(Some).ok_or_else(|| SpecError::bad(key, "not a number", "must be a token id"))
    }

    fn bad(&self, key: &str, value: &Value, why: &str) -> SpecError {
        let text = match value {
            Value::List(all) => format!("a list of {}", all.len()),
            other => format!("{other:?}"),
        };
        SpecError::bad(self.name(key), text, why)
    }

    fn finish(&self) -> Result<(), SpecError> {
        let read = self.read.borrow();
        let prefix = self.name("");
        let own = self.metadata.keys().filter(|k| k.starts_with(&prefix) && !read.contains(*k));
        let unread: Vec<&str> = own.filter(|k| !HARMLESS.contains(&&k[prefix.len()..])).map(String::as_str).collect();
        if unread.is_empty() { Ok(()) } else { Err(SpecError::Unread(unread.join(", "))) }
    }
}

#[cfg(test)]
mod tests;
