//! BLOOM: no rotation but a bias that falls with distance, norms that centre, one fused matrix for queries, keys and
//! values, an ungated branch four times as wide as the stream.

use super::{Body, Common, Heads, Keys};
use crate::bounds::HEADS_MAX;
use crate::error::SpecError;
use crate::spec::{Activation, Branch, Dense, Grouped, Layer, Mixer, Residual};

pub(super) fn body(keys: &Keys<'_>, common: &Common) -> Result<Body, SpecError> {
    let heads = keys.size(if keys.has("n_head") { "n_head" } else { "num_attention_heads" }, HEADS_MAX)?;
    if !common.hidden.is_multiple_of(heads) {
        return Err(SpecError::bad("hidden_size", common.hidden, format!("not a multiple of {heads} heads")));
    }
    let normed = keys.flag("apply_residual_connection_post_layernorm", false)?;
    let h = Heads { heads, kv_heads: heads, head_dim: common.hidden / heads };
    let mixer = Mixer::Grouped(Grouped { qkv_bias: true, out_bias: true, alibi: true, ..h.plain() });
    let branch = Branch::Dense(Dense {
        intermediate: 4 * common.hidden,
        activation: Activation::GeluTanh,
        gated: false,
        bias: true,
    });
    let layer = Layer {
        residual: if normed { Residual::Normed } else { Residual::Stream },
        mixer_norm: common.norm,
        mixer,
        branch_norm: common.norm,
        branches: vec![branch],
    };
    Ok(Body { layers: vec![layer; common.layers], embedding_norm: Some(common.norm), ..Body::default() })
}
