//! Llama 4 Scout and Maverick: three layers rotate and attend within chunks, the fourth does neither; experts whose inputs
//! are weighed, beside a shared one.

use super::{Body, Common, Keys, heads, layer, rope};
use crate::bounds::{EXPERTS_MAX, INTERMEDIATE_MAX, LAYERS_MAX, POSITIONS_MAX};
use crate::error::SpecError;
use crate::rope::Layout;
use crate::spec::{Branch, Dense, Grouped, Mixer, Moe, QkNorm, QueryScale, Router, Score, Span, Weigh};

pub(super) fn body(keys: &Keys<'_>, common: &Common) -> Result<Body, SpecError> {
    keys.value("for_llm_compressor");
    let (rotating, resting) = attention(keys, common)?;
    let rotates = rotating_layers(keys, common)?;
    let intermediate = keys.size("intermediate_size", INTERMEDIATE_MAX)?;
    let mixture = Branch::Moe(Moe {
        weigh: Weigh::Input,
        shared: Some(Dense::gated(intermediate)),
        ..Moe::plain(
            keys.size("num_local_experts", EXPERTS_MAX)?,
            keys.size("num_experts_per_tok", EXPERTS_MAX)?,
            intermediate,
            Router::plain(Score::Sigmoid, false),
        )
    });
    let dense = Branch::Dense(Dense::gated(keys.size("intermediate_size_mlp", INTERMEDIATE_MAX)?));
    let step = keys.optional_size("interleave_moe_layer_step", LAYERS_MAX)?.unwrap_or(1);
    let sparse: Vec<usize> = match numbers(keys, "moe_layers")? {
        Some(listed) => listed,
        None => (step - 1..common.layers).step_by(step).collect(),
    };
    let one = |index: usize| {
        let mixer = if rotates[index] { &rotating } else { &resting };
        let branch = if sparse.contains(&index) { &mixture } else { &dense };
        layer(common, Mixer::Grouped(mixer.clone()), branch.clone())
    };
    Ok((0..common.layers).map(one).collect::<Vec<_>>().into())
}

/// The attention of layers that rotate, and of those that do not.
fn attention(keys: &Keys<'_>, common: &Common) -> Result<(Grouped, Grouped), SpecError> {
    let h = heads(keys, common, None)?;
    let bias = keys.flag("attention_bias", false)?;
    let plain = Grouped { qkv_bias: bias, out_bias: bias, ..h.plain() };
    let chunk = keys.optional_size("attention_chunk_size", POSITIONS_MAX)?.unwrap_or(8192);
    let normed = keys.flag("use_qk_norm", true)?;
    let rotating = Grouped {
        qk_norm: normed.then_some(QkNorm::Rotated(common.norm)),
        rope: Some(rope::read(keys, common, h.head_dim, 5e5, Layout::Interleaved)?),
        span: Span::Chunk(chunk),
        ..plain.clone()
    };
    let beta = keys.optional_float("attn_scale")?.unwrap_or(0.1) as f32;
    let period = keys.optional_size("floor_scale", POSITIONS_MAX)?.unwrap_or(8192);
    let tuned = keys.flag("attn_temperature_tuning", true)?;
    let query_scale = tuned.then_some(QueryScale { beta, period, offset: 1 });
    Ok((rotating, Grouped { query_scale, ..plain }))
}

/// Which layers rotate: a list of ones and zeros, or all but every n-th.
fn rotating_layers(keys: &Keys<'_>, common: &Common) -> Result<Vec<bool>, SpecError> {
    let interval = keys.optional_size("no_rope_layer_interval", LAYERS_MAX)?.unwrap_or(4);
    let rotates: Vec<bool> = match numbers(keys, "no_rope_layers")?.filter(|listed| !listed.is_empty()) {
        Some(listed) => listed.into_iter().map(|n| n != 0).collect(),
        None => (0..common.layers).map(|index| !(index + 1).is_multiple_of(interval)).collect(),
    };
    if rotates.len() != common.layers {
        let why = format!("there are {} layers", common.layers);
        return Err(SpecError::bad("no_rope_layers", format!("{} entries", rotates.len()), why));
    }
    let kinds = keys.list("layer_types")?;
    let differs = |(kind, rotates): (&serde_json::Value, &bool)| {
        kind.as_str() != Some(if *rotates { "chunked_attention" } else { "full_attention" })
    };
    if let Some(kind) = kinds.iter().zip(&rotates).find(|pair| differs(*pair)).map(|pair| pair.0) {
        return Err(keys.bad("layer_types", kind, "layers that rotate attend in chunks, the others to everything"));
    }
    Ok(rotates)
}

fn numbers(keys: &Keys<'_>, key: &str) -> Result<Option<Vec<usize>>, SpecError> {
    if keys.value(key).is_none() {
        return Ok(None);
    }
    let number = |value: &serde_json::Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
    let numbers = keys.list(key)?.iter().map(|v| number(v).ok_or_else(|| keys.bad(key, v, "must be whole numbers")));
    numbers.collect::<Result<_, _>>().map(Some)
}
