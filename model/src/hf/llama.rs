//! Llama 2 and 3, the language part of 3.2 Vision, their distillates, SmolLM: grouped attention without head norms, one dense branch.

use super::{Body, Common, Keys, dense, heads, layer, rope};
use crate::error::SpecError;
use crate::rope::Layout;
use crate::spec::{Grouped, Mixer};

pub(super) fn body(keys: &Keys<'_>, common: &Common) -> Result<Body, SpecError> {
    let h = heads(keys, common, None)?;
    let bias = keys.flag("attention_bias", false)?;
    let mixer = Mixer::Grouped(Grouped {
        qkv_bias: bias,
        out_bias: bias,
        rope: Some(rope::read(keys, common, h.head_dim, 1e4, Layout::Half)?),
        ..h.plain()
    });
    let branch = dense(keys, keys.flag("mlp_bias", false)?)?;
    Ok(vec![layer(common, mixer, branch); common.layers].into())
}

/// The language part of Llama 3.2 Vision. Its cross-attention layers look at a picture and are passed by without one; the
/// embedding has rows for tokens that stand for pictures.
pub(super) fn mllama(keys: &Keys<'_>, common: &Common) -> Result<Body, SpecError> {
    keys.value("dropout");
    let mut passed_by = Vec::new();
    for value in keys.list("cross_attention_layers")? {
        let number = value.as_u64().map(|n| n as usize).filter(|n| *n < common.layers);
        passed_by.push(number.ok_or_else(|| keys.bad("cross_attention_layers", value, "must be layer numbers"))?);
    }
    passed_by.sort_unstable();
    passed_by.dedup();
    let layers = Common { layers: common.layers - passed_by.len(), ..*common };
    Ok(Body { extra_embeddings: PICTURE_TOKENS, passed_by, ..body(keys, &layers)? })
}

/// `MllamaTextModel` adds this many rows to its embedding.
const PICTURE_TOKENS: usize = 8;
