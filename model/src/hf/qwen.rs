//! Qwen2 and 2.5 (biased queries, keys and values), Qwen3 (normed heads) and its mixtures.

use super::{Body, Common, Heads, Keys, dense, heads, layer, rope};
use crate::bounds::{EXPERTS_MAX, INTERMEDIATE_MAX, LAYERS_MAX, POSITIONS_MAX};
use crate::error::SpecError;
use crate::rope::Layout;
use crate::spec::{Branch, Grouped, Mixer, Moe, QkNorm, Router, Score, Span};
use serde_json::Value;

pub(super) fn qwen2(keys: &Keys<'_>, common: &Common) -> Result<Body, SpecError> {
    let h = heads(keys, common, None)?;
    let mixer = grouped(keys, common, h, Bias { qkv: true, out: false }, None)?;
    let branch = dense(keys, false)?;
    let spans = spans(keys, common)?;
    Ok(spans.into_iter().map(|span| layer(common, spanned(&mixer, span), branch.clone())).collect::<Vec<_>>().into())
}

pub(super) fn qwen3(keys: &Keys<'_>, common: &Common) -> Result<Body, SpecError> {
    let h = heads(keys, common, Some(128))?;
    let bias = keys.flag("attention_bias", false)?;
    let mixer = grouped(keys, common, h, Bias { qkv: bias, out: bias }, Some(QkNorm::Heads(common.norm)))?;
    let branch = dense(keys, false)?;
    let spans = spans(keys, common)?;
    Ok(spans.into_iter().map(|span| layer(common, spanned(&mixer, span), branch.clone())).collect::<Vec<_>>().into())
}

pub(super) fn qwen3_moe(keys: &Keys<'_>, common: &Common) -> Result<Body, SpecError> {
    let h = heads(keys, common, None)?;
    let bias = keys.flag("attention_bias", false)?;
    // Unlike the dense family this one windows every layer, and never reads where windows would start.
    keys.value("max_window_layers");
    let window = window(keys)?;
    let mixer = grouped(keys, common, h, Bias { qkv: bias, out: bias }, Some(QkNorm::Heads(common.norm)))?;
    let mixer = spanned(&mixer, window.map_or(Span::Full, Span::Window));
    let mixture = mixture(keys)?;
    let step = keys.optional_size("decoder_sparse_step", LAYERS_MAX)?.unwrap_or(1);
    let mut plain = Vec::new();
    for value in keys.list("mlp_only_layers")? {
        plain.push(value.as_u64().ok_or_else(|| keys.bad("mlp_only_layers", value, "must be layer numbers"))?);
    }
    // Read always: a config states it even where no layer is dense.
    let dense = dense(keys, false)?;
    let branch = |index: usize| {
        let sparse = !plain.contains(&(index as u64)) && (index + 1).is_multiple_of(step);
        if sparse { mixture.clone() } else { dense.clone() }
    };
    Ok((0..common.layers).map(|index| layer(common, mixer.clone(), branch(index))).collect::<Vec<_>>().into())
}

struct Bias {
    qkv: bool,
    out: bool,
}

fn grouped(
    keys: &Keys<'_>,
    common: &Common,
    h: Heads,
    bias: Bias,
    qk_norm: Option<QkNorm>,
) -> Result<Grouped, SpecError> {
    Ok(Grouped {
        qkv_bias: bias.qkv,
        out_bias: bias.out,
        qk_norm,
        rope: Some(rope::read(keys, common, h.head_dim, 1e4, Layout::Half)?),
        ..h.plain()
    })
}

fn spanned(mixer: &Grouped, span: Span) -> Mixer {
    Mixer::Grouped(Grouped { span, ..mixer.clone() })
}

/// The window, where one is switched on; its default is the reference class's.
fn window(keys: &Keys<'_>) -> Result<Option<usize>, SpecError> {
    let size = keys.optional_size("sliding_window", POSITIONS_MAX)?;
    if !keys.flag("use_sliding_window", false)? {
        return Ok(None);
    }
    Ok(if size.is_none() && !keys.has("sliding_window") { Some(4096) } else { size })
}

/// Each layer's span: as `layer_types` lists them, else windows from layer `max_window_layers` on.
fn spans(keys: &Keys<'_>, common: &Common) -> Result<Vec<Span>, SpecError> {
    let window = window(keys)?;
    let first = keys.optional_count("max_window_layers")?.unwrap_or(28);
    let span = |index| if index >= first { window.map_or(Span::Full, Span::Window) } else { Span::Full };
    Ok(listed(keys, common, window)?.unwrap_or_else(|| (0..common.layers).map(span).collect()))
}

/// The spans that `layer_types` lists, where it is given.
pub(super) fn listed(keys: &Keys<'_>, common: &Common, window: Option<usize>) -> Result<Option<Vec<Span>>, SpecError> {
    let listed = keys.list("layer_types")?;
    if listed.is_empty() {
        return Ok(None);
    }
    if listed.len() != common.layers {
        let why = format!("there are {} layers", common.layers);
        return Err(SpecError::bad("layer_types", format!("{} entries", listed.len()), why));
    }
    let span = |entry: &Value| match (entry.as_str(), window) {
        (Some("full_attention"), _) => Ok(Span::Full),
        (Some("sliding_attention"), Some(window)) => Ok(Span::Window(window)),
        (Some("sliding_attention"), None) => Err(keys.bad("layer_types", entry, "no sliding window is switched on")),
        _ => Err(keys.bad("layer_types", entry, "only full_attention and sliding_attention are implemented")),
    };
    listed.iter().map(span).collect::<Result<_, _>>().map(Some)
}

fn mixture(keys: &Keys<'_>) -> Result<Branch, SpecError> {
    let named = keys.optional_size("num_experts", EXPERTS_MAX)?;
    let experts = match (named, keys.optional_size("num_local_experts", EXPERTS_MAX)?) {
        (Some(a), Some(b)) if a != b => {
            return Err(SpecError::bad("num_local_experts", b, format!("num_experts says {a}")));
        }
        (a, b) => a.or(b).ok_or_else(|| keys.missing("num_experts"))?,
    };
    Ok(Branch::Moe(Moe::plain(
        experts,
        keys.size("num_experts_per_tok", EXPERTS_MAX)?,
        keys.size("moe_intermediate_size", INTERMEDIATE_MAX)?,
        Router::plain(Score::Softmax, keys.flag("norm_topk_prob", false)?),
    )))
}
