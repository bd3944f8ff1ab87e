//! Mixtral 8x7B and 8x22B: Mistral's attention, every branch a mixture with softmax scores and renormalised weights.

use super::{Body, Common, Keys, layer, mistral};
use crate::bounds::{EXPERTS_MAX, INTERMEDIATE_MAX};
use crate::error::SpecError;
use crate::spec::{Branch, Mixer, Moe, Router, Score};

pub(super) fn body(keys: &Keys<'_>, common: &Common) -> Result<Body, SpecError> {
    let mixer = Mixer::Grouped(mistral::attention(keys, common, None, 1e6)?);
    let branch = Branch::Moe(Moe::plain(
        keys.size("num_local_experts", EXPERTS_MAX)?,
        keys.size("num_experts_per_tok", EXPERTS_MAX)?,
        keys.size("intermediate_size", INTERMEDIATE_MAX)?,
        Router::plain(Score::Softmax, true),
    ));
    Ok(vec![layer(common, mixer, branch); common.layers].into())
}
