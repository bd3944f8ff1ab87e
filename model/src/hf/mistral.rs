//! Mistral 7B to Large 2, Magistral, Devstral, Ministral 3: Llama with a window where the config gives one.

use super::{Body, Common, Keys, dense, heads, layer, rope};
use crate::bounds::POSITIONS_MAX;
use crate::error::SpecError;
use crate::rope::Layout;
use crate::spec::{Grouped, Mixer, Span};

pub(super) fn mistral(keys: &Keys<'_>, common: &Common) -> Result<Body, SpecError> {
    let branch = dense(keys, false)?;
    Ok(vec![layer(common, Mixer::Grouped(attention(keys, common, Some(4096), 1e4)?), branch); common.layers].into())
}

/// Ministral 3, Devstral 2: queries grow with the logarithm of their position.
pub(super) fn ministral3(keys: &Keys<'_>, common: &Common) -> Result<Body, SpecError> {
    let branch = dense(keys, false)?;
    let query_scale = rope::query_scale(keys)?;
    let mixer = Mixer::Grouped(Grouped { query_scale, ..attention(keys, common, None, 1e4)? });
    Ok(vec![layer(common, mixer, branch); common.layers].into())
}

/// The attention shared with Mixtral. Null means no window, but absence means the class's own default.
pub(super) fn attention(
    keys: &Keys<'_>,
    common: &Common,
    window_default: Option<usize>,
    theta_default: f64,
) -> Result<Grouped, SpecError> {
    let h = heads(keys, common, None)?;
    let window = match keys.optional_size("sliding_window", POSITIONS_MAX)? {
        None if keys.has("sliding_window") => None,
        window => window.or(window_default),
    };
    Ok(Grouped {
        rope: Some(rope::read(keys, common, h.head_dim, theta_default, Layout::Half)?),
        span: window.map_or(Span::Full, Span::Window),
        ..h.plain()
    })
}
