//! Llama 2 and 3, their distillates, SmolLM: grouped attention without head norms, one dense branch.

use super::{Common, Keys, dense, heads, layer, rope};
use crate::error::SpecError;
use crate::rope::Layout;
use crate::spec::{Grouped, Layer, Mixer};

pub(super) fn layers(keys: &Keys<'_>, common: &Common) -> Result<Vec<Layer>, SpecError> {
    let h = heads(keys, common, None)?;
    let bias = keys.flag("attention_bias", false)?;
    let mixer = Mixer::Grouped(Grouped {
        qkv_bias: bias,
        out_bias: bias,
        rope: Some(rope::read(keys, common, h.head_dim, 1e4, Layout::Half)?),
        ..h.plain()
    });
    let branch = dense(keys, keys.flag("mlp_bias", false)?)?;
    Ok(vec![layer(common, mixer, branch); common.layers])
}
