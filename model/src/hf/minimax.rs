//! MiniMax-M2: queries and keys normed as whole vectors, half of each head rotated, every branch a mixture.

use super::{Body, Common, Keys, heads, layer, rope};
use crate::bounds::{EXPERTS_MAX, HEAD_DIM_MAX, INTERMEDIATE_MAX};
use crate::error::SpecError;
use crate::rope::Layout;
use crate::spec::{Branch, Grouped, Mixer, Moe, QkNorm, Router, Score};

pub(super) fn body(keys: &Keys<'_>, common: &Common) -> Result<Body, SpecError> {
    keys.only("scoring_func", "sigmoid", "experts are scored by a sigmoid")?;
    keys.only("use_qk_norm", true, "queries and keys are normed")?;
    keys.only("qk_norm_type", "per_layer", "each norm spans all heads")?;
    keys.only("use_routing_bias", true, "scores are corrected for the choice")?;
    keys.only("shared_intermediate_size", 0, "there is no shared expert")?;
    // Heads that predict tokens further on; the published files leave them out.
    for key in ["use_mtp", "num_mtp_modules", "mtp_transformer_layers"] {
        keys.value(key);
    }
    if let Some(other) = keys.list("attn_type_list")?.iter().find(|kind| kind.as_u64() != Some(1)) {
        return Err(keys.bad("attn_type_list", other, "only 1, softmax attention, is implemented"));
    }
    let h = heads(keys, common, None)?;
    let rotated = keys.optional_size("rotary_dim", HEAD_DIM_MAX)?.unwrap_or(h.head_dim);
    let part = rotated as f64 / h.head_dim as f64;
    let mixer = Mixer::Grouped(Grouped {
        qk_norm: Some(QkNorm::Whole(common.norm)),
        rope: Some(rope::read_part(keys, common, h.head_dim, part, 5e6, Layout::Half)?),
        ..h.plain()
    });
    let branch = Branch::Moe(Moe::plain(
        keys.size("num_local_experts", EXPERTS_MAX)?,
        keys.size("num_experts_per_tok", EXPERTS_MAX)?,
        keys.size("intermediate_size", INTERMEDIATE_MAX)?,
        Router { correction_bias: true, ..Router::plain(Score::Sigmoid, true) },
    ));
    Ok(vec![layer(common, mixer, branch); common.layers].into())
}
