//! Mistral 7B to Large 2, Magistral and Devstral Small 1: Llama with a window where the config gives one.

use super::{Common, Keys, dense, heads, layer, rope};
use crate::bounds::POSITIONS_MAX;
use crate::error::SpecError;
use crate::rope::Layout;
use crate::spec::{Grouped, Layer, Mixer, Span};

pub(super) fn layers(keys: &Keys<'_>, common: &Common) -> Result<Vec<Layer>, SpecError> {
    let branch = dense(keys, false)?;
    Ok(vec![layer(common, attention(keys, common, Some(4096), 1e4)?, branch); common.layers])
}

/// The attention shared with Mixtral. Null means no window, but absence means the class's own default.
pub(super) fn attention(
    keys: &Keys<'_>,
    common: &Common,
    window_default: Option<usize>,
    theta_default: f64,
) -> Result<Mixer, SpecError> {
    let h = heads(keys, common, None)?;
    let window = match keys.optional_size("sliding_window", POSITIONS_MAX)? {
        None if keys.has("sliding_window") => None,
        window => window.or(window_default),
    };
    Ok(Mixer::Grouped(Grouped {
        rope: Some(rope::read(keys, common, h.head_dim, theta_default, Layout::Half)?),
        span: window.map_or(Span::Full, Span::Window),
        ..h.plain()
    }))
}
