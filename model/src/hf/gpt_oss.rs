//! gpt-oss: a learned sink in every softmax, windows in every second layer, biases everywhere, a clamped activation.

use super::{Body, Common, Keys, heads, layer, qwen, rope};
use crate::bounds::{EXPERTS_MAX, INTERMEDIATE_MAX, POSITIONS_MAX};
use crate::error::SpecError;
use crate::rope::Layout;
use crate::spec::{Activation, Branch, Grouped, Mixer, Moe, Router, Score, Span};

pub(super) fn body(keys: &Keys<'_>, common: &Common) -> Result<Body, SpecError> {
    let h = heads(keys, common, Some(64))?;
    let bias = keys.flag("attention_bias", true)?;
    let mixer = Grouped {
        qkv_bias: bias,
        out_bias: bias,
        sinks: true,
        rope: Some(rope::read(keys, common, h.head_dim, 150_000.0, Layout::Half)?),
        ..h.plain()
    };
    let active = keys.size("num_experts_per_tok", EXPERTS_MAX)?;
    for (key, stated) in [("experts_per_token", active), ("initial_context_length", 0)] {
        // The first repeats another key; the second is `original_max_position_embeddings` of the rotation.
        let found = keys.optional_size(key, POSITIONS_MAX)?.unwrap_or(stated);
        if stated > 0 && found != stated {
            return Err(SpecError::bad(key, found, format!("num_experts_per_tok says {stated}")));
        }
    }
    let alpha = keys.optional_float("swiglu_alpha")?.unwrap_or(1.702) as f32;
    let limit = keys.optional_float("swiglu_limit")?.unwrap_or(7.0) as f32;
    let branch = Branch::Moe(Moe {
        activation: Activation::ClampedSwiglu { alpha, limit },
        bias: true,
        ..Moe::plain(
            keys.size("num_local_experts", EXPERTS_MAX)?,
            active,
            keys.size("intermediate_size", INTERMEDIATE_MAX)?,
            // A softmax over the chosen logits is one over all of them, renormalised.
            Router { bias: true, ..Router::plain(Score::Softmax, true) },
        )
    });
    let window = keys.optional_size("sliding_window", POSITIONS_MAX)?.unwrap_or(128);
    let alternate = |index: usize| if index.is_multiple_of(2) { Span::Window(window) } else { Span::Full };
    let spans = qwen::listed(keys, common, Some(window))?;
    let spans = spans.unwrap_or_else(|| (0..common.layers).map(alternate).collect());
    let one = |span| layer(common, Mixer::Grouped(Grouped { span, ..mixer.clone() }), branch.clone());
    Ok(spans.into_iter().map(one).collect::<Vec<_>>().into())
}
