//! dots.llm1: Qwen3's normed heads, DeepSeek-V3's mixtures.

use super::{Body, Common, Keys, deepseek, heads, qwen, rope};
use crate::bounds::POSITIONS_MAX;
use crate::error::SpecError;
use crate::rope::Layout;
use crate::spec::{Grouped, Mixer, QkNorm, Span};

pub(super) fn body(keys: &Keys<'_>, common: &Common) -> Result<Body, SpecError> {
    let h = heads(keys, common, None)?;
    let bias = keys.flag("attention_bias", false)?;
    let mixer = Grouped {
        qkv_bias: bias,
        out_bias: bias,
        qk_norm: Some(QkNorm::Heads(common.norm)),
        rope: Some(rope::read(keys, common, h.head_dim, 1e4, Layout::Half)?),
        ..h.plain()
    };
    let defaults = deepseek::Defaults { first_dense: 0, groups: (1, 1), active: 8, scale: 1.0 };
    let mut body = deepseek::mixtures(keys, common, &Mixer::Grouped(mixer.clone()), &defaults)?;
    let window = match keys.optional_size("sliding_window", POSITIONS_MAX)? {
        None if !keys.has("sliding_window") => Some(4096),
        window => window,
    };
    let first = keys.optional_count("max_window_layers")?.unwrap_or(62);
    let usual = |index| if index >= first { window.map_or(Span::Full, Span::Window) } else { Span::Full };
    let spans = qwen::listed(keys, common, window)?;
    let spans = spans.unwrap_or_else(|| (0..common.layers).map(usual).collect());
    for (layer, span) in body.layers.iter_mut().zip(spans) {
        layer.mixer = Mixer::Grouped(Grouped { span, ..mixer.clone() });
    }
    // None was published.
    body.predictors.clear();
    Ok(body)
}
